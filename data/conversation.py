"""What the importers share: checking fields, finding images, and building rows of the schema from turns."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from perceptiongpt.configuration_perceptiongpt import ADDED_TOKENS, IMAGE_TOKEN
from perceptiongpt.data.reading import (
    COCO_NAMES,
    MissingImage,
    Problems,
    find_coco_image,
    find_image,
    image_size,
    plain_name,
    safe_join,
    without_copies,
)
from perceptiongpt.data.schema import check_size, check_unicode, naming
from perceptiongpt.data.templates import stable_generator
from perceptiongpt.geometry_perceptiongpt import clip_box


MARKERS = re.compile("|".join(map(re.escape, ADDED_TOKENS)))


@dataclass
class Turn:
    """A question and its answer. `slots` holds (box, mask) per `<vis>` of both, in reading order.

    Where the annotations give no answer, `answer` is None and the row ends with the question.
    """

    prompt: str
    answer: str | None
    slots: list[tuple[list[float] | None, dict | None]] = field(default_factory=list)


def make_row(task: str, turns: list[Turn], columns: dict) -> dict:
    """A row of the schema from its turns; `columns` gives image, source, image_id, split, width and height."""
    messages = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.prompt})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": turn.answer})
    messages[0]["content"] = IMAGE_TOKEN + messages[0]["content"]
    slots = [slot for turn in turns for slot in turn.slots]
    return {
        **columns,
        "messages": messages,
        "boxes": [box for box, _ in slots],
        "masks": [mask for _, mask in slots],
        "points": [None] * len(slots),
        "task": task,
    }


class Draw:
    """The random generators of a source, one per key."""

    def __init__(self, source: str, seed: int, evaluation: bool):
        self.source, self.seed, self.evaluation = source, seed, evaluation

    def __call__(self, *key):
        """The generator for a prompt; None under `evaluation`, which means the fixed prompt."""
        return None if self.evaluation else self.always(*key)

    def always(self, *key):
        """The generator for a choice that is also made under `evaluation`."""
        return stable_generator(self.seed, self.source, *key)


def each_record(
    records: Iterable[tuple[str, object]], make: Callable[[object], Iterable], problems: Problems | None
) -> Iterator:
    """All that `make(record)` yields for each (where, record). A `ValueError` in it goes to `problems`."""
    problems = problems or Problems()
    for where, record in records:
        try:
            made = list(make(record))
        except ValueError as error:
            problems.report(where, error)
            continue
        yield from made


def chosen_tasks(tasks: Iterable[str] | None, offered: Iterable[str], source: str) -> tuple[str, ...]:
    """The tasks that are asked for; None: all that are offered. `ValueError` for a task that is not offered."""
    offered = tuple(offered)
    tasks = offered if tasks is None else tuple(tasks)
    if unknown := sorted(set(tasks) - set(offered)):
        raise ValueError(f"unknown tasks {unknown}; {source} makes {', '.join(offered)} from these files")
    return tasks


def usual_files(root: str | Path, names: Iterable[str]) -> list[Path]:
    """The files of these names in `root` or `root/annotations`, plain or packed, in the order of the names.

    Raises:
        ValueError: if there are two files of one name.
    """
    there = [path for folder in (Path(root), Path(root) / "annotations") for path in folder.glob("*") if path.is_file()]
    return [path for name in names for path in without_copies(p for p in there if plain_name(p) == name)]


# ---- fields ----------------------------------------------------------------------------------------------------------


def get(record, *names: str, of: type | tuple = str):
    """The value of the first key in `names` that `record` has; `ValueError` if it is missing or of a wrong type."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {str(record)[:60]}")
    for name in names:
        if name in record:
            value = record[name]
            if not isinstance(value, of) or isinstance(value, bool):
                expected = " or ".join(kind.__name__ for kind in (of if isinstance(of, tuple) else (of,)))
                raise ValueError(f"{name!r} is {str(value)[:60]!r}, expected {expected}")
            return value
    raise ValueError(f"there is no {' or '.join(map(repr, names))}; found {', '.join(map(repr, record))}"[:200])


def clean_text(value, what: str = "text", keep_lines: bool = False) -> str:
    """A text without superfluous white space.

    Raises:
        ValueError: if it is empty, no text, or contains one of the tokens that have a meaning in a row.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {str(value)[:60]!r}, expected a text")
    check_unicode(value, what)
    if marker := MARKERS.search(value):
        raise ValueError(f"{what} {value[:80]!r} contains {marker[0]!r}, which would be read as a marker")
    return value.strip() if keep_lines else " ".join(value.split())


def check_box(box_xyxy_pixels, size: tuple[int, int], what: str = "box") -> list[float]:
    """The box as floats, checked as by `clip_box`. `validate_row` clips an overhang of a pixel, and counts it."""
    with naming(what):
        clip_box(box_xyxy_pixels, *reversed(size))
    return [float(value) for value in box_xyxy_pixels]


def box_from_xywh(box, size: tuple[int, int], what: str = "box") -> list[float]:
    """[x, y, width, height] in pixels -> a checked xyxy box."""
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        raise ValueError(f"{what} {str(box)[:60]} is not [x, y, width, height]")
    x, y, width, height = box
    return check_box([x, y, x + width, y + height], size, what)


def reading_order(boxes_xyxy: list[list[float]]) -> list[list[float]]:
    """Boxes in the order of an answer with several instances: by x0, then y0."""
    return sorted(boxes_xyxy, key=lambda box: box[:2])


def inside_sentence(phrase: str) -> str:
    """A phrase as it stands inside a sentence: "The clock is green." -> "the clock is green"."""
    phrase = phrase.rstrip(". ") or phrase
    first = phrase.split()[0]
    return phrase if first != first.capitalize() or first == "I" else phrase[0].lower() + phrase[1:]


# ---- images --------------------------------------------------------------------------------------------------------


class ImageFinder:
    """Finds a source's images, and gives the columns `image`, `width` and `height` of a row.

    Args:
        images: the folder; None: the first of `usual` that has the image; False: rows without images.
        usual: folders of the format's usual layout.
    """

    def __init__(self, images: str | Path | bool | None, *usual: Path):
        if images not in (None, False) and not Path(images).is_dir():
            raise ValueError(f"images: there is no folder {images}")
        self.wanted = images is not False
        self.folders = [Path(images)] if images else list(usual)

    def columns(self, *names: str, size: tuple[int, int] | None = None, coco_id: int | None = None) -> dict:
        """Columns of one image.

        Args:
            names: file names, the first that exists counts.
            size: (width, height) that the annotations state; an image of another size is an error.
            coco_id: look the image up by COCO's number, too.

        Returns:
            `image`, `width`, `height`; without images and without a stated size both sides are 0, which the schema
            admits for rows without boxes and masks.
        """
        if not self.wanted:
            for name in names:
                safe_join(".", name)  # a bad name is refused here, too
            width, height = size or (0, 0)
            return {"image": None, "width": width, "height": height}
        path = self.find(*names, coco_id=coco_id)
        measured = image_size(path)
        if size is not None and measured != size:
            raise ValueError(
                f"{path} is {measured[0]} x {measured[1]} pixels, the annotations say {size[0]} x {size[1]}"
            )
        width, height = measured
        return {"image": {"path": str(path), "bytes": None}, "width": width, "height": height}

    def find(self, *names: str, coco_id: int | None = None) -> Path:
        """The path of an image; `MissingImage` if there is none, `ValueError` if a name leaves its folder."""
        for folder in self.folders:
            for look_up in [(find_image, name) for name in names] + [(find_coco_image, coco_id)]:
                try:
                    if look_up[1] is not None:
                        return look_up[0](folder, look_up[1])
                except MissingImage:
                    continue
        first = names[0] if names else COCO_NAMES[0].format(coco_id)
        raise MissingImage(
            f"image {first!r} is not in {', '.join(map(str, self.folders))}; name the folder of the images with "
            "--images, make rows without images (--no_images), or skip such records (--on_error skip)"
        )


def stated_size(record: dict) -> tuple[int, int] | None:
    """(width, height) of a record that has either; None of one without; `ValueError` if no image is of that size."""
    if "width" not in record and "height" not in record:
        return None
    size = get(record, "width", of=int), get(record, "height", of=int)
    check_size(*size, "width and height")
    return size


def known_size(columns: dict) -> tuple[int, int]:
    """(width, height) for boxes; `ValueError` if neither the annotations nor an image tell."""
    if not columns["width"]:
        raise ValueError("the image's size is in no annotation file, but boxes need it; give the images as well")
    return columns["width"], columns["height"]


def coco_image_id(file_name: str) -> str | None:
    """COCO's number in a COCO file name ("COCO_train2014_000000000009.jpg", "000000000009.jpg"), else None."""
    found = re.search(r"(?:^|[/\\]|COCO_\w+?_)(\d{12})(?:_\d+)?\.\w+$", file_name)
    return str(int(found[1])) if found else None
