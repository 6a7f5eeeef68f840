"""ReasonSeg: implicit questions about an image, answered with one region."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from pycocotools import mask as coco_mask

from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    chosen_tasks,
    clean_text,
    get,
    known_size,
    make_row,
)
from perceptiongpt.data.formats.refer import find_split, read_phrase
from perceptiongpt.data.reading import (
    Problems,
    find_image,
    image_size,
    is_archive,
    open_file,
    open_members,
    without_copies,
)
from perceptiongpt.data.templates import render_prompt, render_turn
from perceptiongpt.geometry_perceptiongpt import OVERHANG, encode_rle, tight_box


PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG")


def reasonseg_rows(
    root: str | Path,
    *,
    split: str = "train",
    annotations: Iterable[str | Path] | None = None,
    images: str | Path | bool | None = None,
    tasks: Iterable[str] | None = None,
    seed: int = 0,
    evaluation: bool = False,
    limit: int | None = None,
    problems: Problems | None = None,
) -> Iterator[dict]:
    """Yield a `reasoning` row per text of ReasonSeg (training files carry six texts about one region).

    All target shapes together are one region: one `<vis>` with the mask and its tight box. What an `ignore` shape
    covers is not target. Training treats it as background; for the IoU, which leaves it out, the rows made under
    `evaluation` have one key beyond the schema: `ignore`, an RLE or None. `validate` reads it here; prepared shards
    hold the schema's columns only.

    Args:
        root: folder with `<split>/<name>.json` and `<split>/<name>.jpg`, or that folder itself.
        split: train, val or test.
        annotations: the json files, or archives or folders of them, where they are elsewhere.
        images: folder of the images; None: beside the json files. False: no images; the size, which masks need,
            then comes from the json (`imageWidth`, `imageHeight`) or from an image beside it.
        tasks: `reasoning`.
        seed, evaluation: seed of the drawn prompts; True: the fixed evaluation prompt.
        limit: at most this many rows.
        problems: collects bad records; None: the first one raises.
    """
    problems = problems or Problems()
    chosen_tasks(tasks, ("reasoning",), "reasonseg")
    draw, split = Draw("reasonseg", seed, evaluation), find_split(split)

    def rows() -> Iterator[dict]:
        for where, folder, name, content in _files(Path(root), split, annotations):
            try:
                made = list(_file_rows(content, folder, name, images, split, draw, problems))
            except ValueError as error:
                problems.report(where, error)
                continue
            yield from made

    yield from islice(rows(), limit)


def target_and_ignore(shapes: list[dict], width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint the shapes of one file, large ones first, as (target, ignore): bool masks of shape (height, width).

    A smaller shape replaces what it covers; `flag` shapes mean nothing.

    Raises:
        ValueError: for a shape that is no polygon on the image, or of another label.
    """
    painted = []
    for number, shape in enumerate(shapes):
        label = get(shape, "label").strip().lower()
        if label == "flag":
            continue
        if label not in ("target", "ignore") or shape.get("shape_type", "polygon") != "polygon":
            kind = shape.get("shape_type", "polygon")
            raise ValueError(f"shape {number}: {kind} {label!r}, expected a polygon target, ignore or flag")
        polygon = _polygon(get(shape, "points", of=list), width, height, f"shape {number}")
        rle = coco_mask.frPyObjects([polygon], height, width)[0]
        painted.append((int(coco_mask.area(rle)), label == "target", rle))
    target, ignore = np.zeros((2, height, width), dtype=bool)
    # Of shapes of the same area the first of the file ends on top, as in the authors' code.
    for _, is_target, rle in sorted(reversed(painted), key=lambda shape: -shape[0]):
        covered = coco_mask.decode(rle).astype(bool)
        target[covered], ignore[covered] = is_target, not is_target
    return target, ignore


def _polygon(points: list, width: int, height: int, name: str) -> list[float]:
    for point in points:
        is_pair = isinstance(point, list) and len(point) == 2
        if not is_pair or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in point):
            raise ValueError(f"{name}: point {str(point)[:60]} is not [x, y]")
    if len(points) < 3:
        raise ValueError(f"{name}: {len(points)} points; a polygon has at least three")
    for values, side in zip(zip(*points), (width, height), strict=True):
        low, high = -OVERHANG, side + OVERHANG
        if not all(low <= value <= high for value in values):  # false of NaN, too
            raise ValueError(f"{name}: its points lie outside the {width} x {height} image")
    return [value for point in points for value in point]


def _file_rows(
    content: bytes,
    folder: Path,
    name: str,
    images: str | Path | bool | None,
    split: str,
    draw: Draw,
    problems: Problems,
) -> Iterator[dict]:
    record = _parse(content)
    texts, shapes = get(record, "text", of=(list, str)), get(record, "shapes", of=list)
    is_sentence = record.get("is_sentence", True)
    if not isinstance(is_sentence, bool):
        raise ValueError(f"is_sentence is {is_sentence!r}, expected true or false")
    columns = _columns(record, folder, name, images)
    columns |= {"source": "reasonseg", "image_id": name, "split": split}
    width, height = known_size(columns)
    target, ignore = target_and_ignore(shapes, width, height)
    labels = [shape["label"].strip().lower() for shape in shapes]
    problems.leave_out("flag shape", labels.count("flag"))
    if not target.any():
        raise ValueError(f"no pixel is target; the shapes are {labels}")
    slot = (tight_box(target), encode_rle(target))
    for number, text in enumerate([texts] if isinstance(texts, str) else texts):
        generator = draw("reasoning", name, number)
        if is_sentence:
            question = clean_text(text)
            question = question if question.endswith((".", "?", "!")) else f"{question}."
            prompt, answer = render_turn("reasoning", question, VIS_TOKEN, generator)
        else:  # "the thing that .."
            prompt = render_prompt("refer", read_phrase(text), generator)
            answer = render_turn("reasoning", "", VIS_TOKEN, generator)[1]
        row = make_row("reasoning", [Turn(prompt, answer, [slot])], columns)
        yield row | {"ignore": encode_rle(ignore) if ignore.any() else None} if draw.evaluation else row


def _parse(content: bytes) -> dict:
    for encoding in ("utf-8-sig", "cp1252"):
        try:
            return json.loads(content.decode(encoding))
        except UnicodeDecodeError:
            continue
        except (ValueError, RecursionError) as error:
            raise ValueError(f"truncated or not json: {error}") from error
    raise ValueError("is neither UTF-8 nor cp1252 text")


def _columns(record: dict, folder: Path, name: str, images: str | Path | bool | None) -> dict:
    stated = [record.get(key) for key in ("imageWidth", "imageHeight")]
    size = None if None in stated else (get(record, "imageWidth", of=int), get(record, "imageHeight", of=int))
    names = [name + suffix for suffix in PICTURE_SUFFIXES]
    if images is False and size is None:
        # Where there is none, `known_size` says what is missing.
        there = [candidate for candidate in names if (folder / candidate).is_file()]
        size = image_size(find_image(folder, there[0])) if there else None
    return ImageFinder(images, folder).columns(*names, size=size)


def _files(root: Path, split: str, annotations) -> Iterator[tuple[str, Path, str, bytes]]:
    """(name for messages, folder of the images, name without ending, content) per json file."""
    image_folder = root / split if (root / split).is_dir() else root
    if annotations:
        paths = [Path(path) for path in annotations]
    else:
        packed = [path for path in sorted(root.glob(f"{split}.*")) if is_archive(path)]
        paths = [image_folder] if any(image_folder.glob("*.json")) else without_copies(packed)
    found = False
    for path in paths:
        if path.is_dir() or is_archive(path):
            for name, content in open_members(path, "*.json"):
                found = True
                yield f"{path}: {name}", path if path.is_dir() else image_folder, PurePosixPath(name).stem, content
        else:
            found = True
            with open_file(path) as stream:
                yield str(path), path.parent, path.name.split(".json")[0], stream.read()
    if not found:
        raise ValueError(f"{root}: there are no json files of split {split!r}")
