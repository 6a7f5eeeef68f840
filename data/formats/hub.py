"""Data sets of the Hub (or a local folder of parquet, json or arrow files) as rows of the schema, by a column mapping.

| role | its column holds |
| --- | --- |
| `image` | the image, or its path (required) |
| `phrase` | what the signals show, a text or several -> `refer` |
| `box` | four numbers, or a list of such boxes |
| `mask` | COCO polygons (also one flat polygon), an RLE, or an image of the mask; or a list of RLEs or images |
| `caption` | a text, or several -> `caption`; with a box or mask, its `region_caption` |
| `question`, `answer` | texts -> `vqa`; with a box or mask, `region_vqa` |
| `image_id` | a name or number of the image; COCO file names, here or of the image, become COCO's number |
| `width`, `height` | of the image, in pixels; needed only if images given by path are missing |

A single text is about all objects of its record. Several texts are all about the one object, or, if there are as many
texts as objects, about one object each (a text that occurs twice: about both).

A data set that has the schema's own columns needs no mapping.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Image as ImageFeature
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from PIL import Image

from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    box_from_xywh,
    check_box,
    chosen_tasks,
    clean_text,
    coco_image_id,
    each_record,
    inside_sentence,
    known_size,
    make_row,
    stated_size,
)
from perceptiongpt.data.formats.coco import segmentation_to_rle
from perceptiongpt.data.reading import BROKEN, Problems, image_size, safe_join, until_broken
from perceptiongpt.data.schema import COLUMNS, REQUIRED_COLUMNS
from perceptiongpt.data.templates import render_prompt, render_turn
from perceptiongpt.geometry_perceptiongpt import encode_rle


ROLES = ("image", "phrase", "box", "mask", "caption", "question", "answer", "image_id", "width", "height")
HUB_TASKS = ("refer", "box_to_mask", "caption", "region_caption", "vqa", "region_vqa")
BOX_FORMATS = ("xyxy", "xywh", "xyxy_relative", "xywh_relative")
# Columns of known data sets: all of the first must be there.
KNOWN_COLUMNS = {
    # lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg: `question` is a prompt, `answer` holds the expressions
    ("image", "answer", "segmentation", "bbox", "iscrowd", "file_name"): (
        {"image": "image", "phrase": "answer", "box": "bbox", "mask": "segmentation", "image_id": "file_name"},
        "xywh",
    ),
    # jxu124/refcoco, refcocoplus, refcocog: without the images
    ("image_path", "captions", "bbox", "sentences", "ref_id"): (
        {"image": "image_path", "phrase": "captions", "box": "bbox", "image_id": "image_path"},
        "xyxy",
    ),
}


def hub_rows(
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
    columns: Mapping[str, str] | Iterable[str] | None = None,
    box_format: str = "xyxy",
    name: str | None = None,
) -> Iterator[dict]:
    """Yield the rows of a Hub data set; it is streamed, not downloaded as a whole.

    Args:
        root: its id, or a local folder or file.
        split: one of its splits.
        annotations: files of the data set, instead of all (`data_files` of `load_dataset`).
        images: the folder of images that are given by path (COCO's also under their other names), default `root`;
            False: rows without images.
        tasks: any of `HUB_TASKS` that the columns offer; default: all. Each phrase is a sample of its own.
        seed, evaluation: seed of the drawn prompts; True: the fixed evaluation prompt.
        limit: read only the first `limit` records.
        problems: collects bad records; None: the first one raises.
        columns: which column has which role, as a mapping, as "role=column role=column", or as a list of such pairs
            (`--columns image=photo phrase=answer box=bbox`). A column `image` needs no mention. Default: by the
            columns of known data sets.
        box_format: one of `BOX_FORMATS`; pixels unless relative.
        name: a configuration of the data set.

    Raises:
        ValueError: for a data set, split, role or column that is not there, and through `problems` for a broken file
            or record. A record that none of the tasks fits is left out and counted.
    """
    problems = problems or Problems()
    if annotations is None and Path(root).is_file():
        root, annotations = Path(root).parent, [root]
    files = None if annotations is None else {split: [str(path) for path in annotations]}
    try:
        if files is not None and not Path(root).is_dir():
            dataset = load_dataset(str(root), name, split=split, streaming=True, data_files=files)
        elif files is not None:
            kind = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}.get(Path(files[split][0]).suffix, "json")
            dataset = load_dataset(kind, split=split, streaming=True, data_files=files)
        else:
            place = Path(root).absolute() if Path(root).is_dir() else root  # "." has no name, which `datasets` needs
            dataset = load_dataset(str(place), name, split=split, streaming=True)
        found = list(dataset.features or next(iter(dataset), ()))
    except (*BROKEN, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(f"{root}: split {split!r} cannot be read as a data set: {error}") from error
    except StopIteration:  # a json file without a line
        found = []
    if not found:
        raise ValueError(f"{root}: split {split!r} holds no records")
    mapping, box_format = _find_mapping(columns, box_format, found, str(root))
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(column, ImageFeature(decode=False))
    where = f"{root}, {split}"
    read = enumerate(until_broken(_read_all(dataset), where, problems))
    records = islice(((f"{where}: record {number}", (number, record)) for number, record in read), limit)
    if mapping is None:
        chosen_tasks(tasks, [] if tasks else HUB_TASKS, f"hub ({root} has the schema's own columns)")
        yield from each_record(records, lambda numbered: [_own_row(numbered[1], images)], problems)
        return
    if not _offered(mapping):
        raise ValueError(f"{root}: the roles {', '.join(mapping)} are enough for none of {', '.join(HUB_TASKS)}")
    tasks = chosen_tasks(tasks, _offered(mapping), "hub")
    draw, finder = Draw("hub", seed, evaluation), ImageFinder(images, Path(root))

    def make(numbered) -> list[dict]:
        number, record = numbered
        value = {role: record.get(column) for role, column in mapping.items()}
        common = _read_image(value["image"], finder, root, stated_size(value))
        # A bare record number would be taken for the image of that number in another data set.
        image_id = _image_id(value, f"{Path(root).absolute().name} {number}")
        common |= {"source": "hub", "image_id": image_id, "split": split}
        slots = _read_slots(value.get("box"), value.get("mask"), box_format, common)
        if not slots and ("box" in mapping or "mask" in mapping):
            raise ValueError("there is neither a box nor a mask")
        made = list(_record_rows(value, slots, number, common, tasks, draw))
        problems.leave_out("record that none of the tasks fits", not made)
        return made

    yield from each_record(records, make, problems)


def _find_mapping(columns, box_format: str, found: list[str], root: str) -> tuple[dict | None, str]:
    """(role -> column, box format); None as the mapping for a data set that has the schema's columns."""
    if columns is None:
        if set(REQUIRED_COLUMNS) <= set(found):
            return None, box_format
        for known, (mapping, known_format) in KNOWN_COLUMNS.items():
            if set(known) <= set(found):
                return mapping, known_format
        raise ValueError(
            f"{root}: columns {', '.join(found)}; say with columns which has which role of {', '.join(ROLES)}"
        )
    if not isinstance(columns, Mapping):
        pairs = [str(pair).partition("=") for pair in (columns.split() if isinstance(columns, str) else columns)]
        if any(not equals for _, equals, _ in pairs):
            raise ValueError(f"columns {columns} are not role=column")
        columns = {role: column for role, _, column in pairs}
    if unknown := sorted(set(columns) - set(ROLES)):
        raise ValueError(f"unknown roles {unknown}; there are {', '.join(ROLES)}")
    if missing := sorted(set(columns.values()) - set(found)):
        raise ValueError(f"{root}: there are no columns {missing}; found {', '.join(found)}")
    if "image" not in columns and "image" in found:
        columns = {"image": "image", **columns}
    if "image" not in columns:
        raise ValueError(f"{root}: no column has the role 'image'")
    if box_format not in BOX_FORMATS:
        raise ValueError(f"box_format {box_format!r} is none of {', '.join(BOX_FORMATS)}")
    return dict(columns), box_format


def _offered(mapping: dict) -> list[str]:
    signal = "box" in mapping or "mask" in mapping
    return [
        task
        for task, possible in (
            ("refer", "phrase" in mapping and signal),
            ("box_to_mask", "box" in mapping and "mask" in mapping),
            ("caption", "caption" in mapping and not signal),
            ("region_caption", signal and ("caption" in mapping or "phrase" in mapping)),
            ("vqa", {"question", "answer"} <= set(mapping) and not signal),
            ("region_vqa", {"question", "answer"} <= set(mapping) and signal),
        )
        if possible
    ]


def _read_all(dataset) -> Iterator[dict]:
    """The records of a streamed data set; errors of its reader become `ValueError`s."""
    try:
        yield from dataset
    except (*BROKEN, RuntimeError, DatasetsError) as error:
        raise ValueError(f"truncated or broken: {error}") from error


def _record_rows(value, slots, number, columns, tasks, draw) -> Iterator[dict]:
    def row(task: str, texts: tuple[str, str], slots: list) -> dict:
        return make_row(task, [Turn(*texts, slots)], columns)

    single = slots if len(slots) == 1 else []
    phrases = _about(_texts(value["phrase"], "phrase"), slots) if "phrase" in value else []
    if "refer" in tasks:
        for index, (phrase, shown) in enumerate(phrases):
            prompt = render_prompt("refer", inside_sentence(phrase), draw(number, "refer", index))
            yield row("refer", (prompt, VIS_TOKEN * len(shown)), shown)
    if "box_to_mask" in tasks:
        for index, slot in enumerate(slots):
            if None not in slot:
                prompt = render_prompt("box_to_mask", "", draw(number, "box_to_mask", index))
                yield row("box_to_mask", (prompt, VIS_TOKEN), [(slot[0], None), slot])
    captions = _about(_texts(value["caption"], "caption"), slots) if "caption" in value else phrases
    for index, (caption, shown) in enumerate(captions):
        for task in ("caption", "region_caption"):
            if task in tasks and (len(shown) == 1 or task == "caption"):
                texts = render_turn(task, "", caption, draw(number, task, index))
                yield row(task, texts, shown if task == "region_caption" else [])
    for task in ("vqa", "region_vqa"):
        if task in tasks and (single or task == "vqa"):
            question, answer = clean_text(value["question"], "question"), _texts(value["answer"], "answer")[0]
            yield row(task, render_turn(task, question, answer, draw(number, task)), single)


def _texts(value, what: str) -> list[str]:
    if value is None or value == []:
        raise ValueError(f"there is no {what}")
    return [clean_text(text, what) for text in (value if isinstance(value, list) else [value])]


def _about(texts: list[str], slots: list[tuple]) -> list[tuple[str, list[tuple]]]:
    """(text, the slots it is about, from left to right) of a record; see the head of this file."""
    if min(len(texts), len(slots)) < 2:
        pairs = [(text, slots) for text in texts]
    elif len(texts) == len(slots):
        groups = {}
        for text, slot in zip(texts, slots, strict=True):
            groups.setdefault(text, []).append(slot)
        pairs = list(groups.items())
    else:
        raise ValueError(f"{len(texts)} texts about {len(slots)} objects; expected one text, or as many as objects")
    return [(text, sorted(shown, key=lambda slot: slot[0][:2] if slot[0] else [])) for text, shown in pairs]


def _image_id(value: dict, otherwise: str) -> str:
    """The value of the column `image_id`, else COCO's number in the image's file name, else `otherwise`."""
    if "image_id" not in value:
        path = value["image"] if isinstance(value["image"], str) else value["image"].get("path")
        return coco_image_id(path or "") or otherwise
    if value["image_id"] is None or value["image_id"] == "":
        raise ValueError("there is no image_id")
    return coco_image_id(str(value["image_id"])) or str(value["image_id"])


def _read_image(value, finder: ImageFinder, root: str | Path, size: tuple[int, int] | None) -> dict:
    """The columns `image`, `width` and `height` of an undecoded image, or of a path in the folder of images."""
    value = {"path": value, "bytes": None} if isinstance(value, str) else value
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise ValueError(f"the image is {str(value)[:60]}, expected an image column or a path")
    if value.get("bytes"):
        measured = image_size.__wrapped__(io.BytesIO(value["bytes"]))
        if size not in (None, measured):
            raise ValueError(f"the image is {measured[0]} x {measured[1]} pixels, the columns say {size}")
        image = {"path": None, "bytes": value["bytes"]} if finder.wanted else None
        return {"image": image, "width": measured[0], "height": measured[1]}
    path, folders = value["path"], [Path(folder).absolute() for folder in (*finder.folders, root)]
    if Path(path).is_absolute():  # as `datasets` gives those of an image folder
        path = next(
            (str(Path(path).relative_to(folder)) for folder in folders if Path(path).is_relative_to(folder)), path
        )
    try:
        there = safe_join(root, path)
    except ValueError as error:
        raise ValueError(f"{error}; images elsewhere need --images FOLDER, the folder that holds them") from error
    if not finder.wanted and size is None and there.is_file():
        size = image_size(there)
    coco_id = coco_image_id(path)
    return finder.columns(path, size=size, coco_id=None if coco_id is None else int(coco_id))


def _own_row(record: dict, images: bool | None) -> dict:
    """A row that has the schema's columns already."""
    row = {column: record.get(column) for column in COLUMNS}
    return row | ({"image": None} if images is False else {})


def _read_slots(box, mask, box_format: str, columns: dict) -> list[tuple]:
    """(box, mask) per object, in the order of the record."""
    if not box and not mask:
        return []
    width, height = known_size(columns)
    boxes = _read_boxes(box, box_format, width, height) if box else []
    masks = _read_masks(mask, width, height) if mask else []
    if boxes and masks and len(boxes) != len(masks):
        raise ValueError(f"{len(boxes)} boxes and {len(masks)} masks")
    return list(zip(boxes or [None] * len(masks), masks or [None] * len(boxes)))


def _read_boxes(value, box_format: str, width: int, height: int) -> list[list[float]]:
    if not isinstance(value, list):
        raise ValueError(f"box {str(value)[:60]} is not four numbers")
    boxes = value if isinstance(value[0], list) else [value]
    scale = [width, height] * 2 if box_format.endswith("_relative") else [1] * 4
    read = box_from_xywh if box_format.startswith("xywh") else check_box
    if not all(isinstance(box, list) and len(box) == 4 for box in boxes):
        raise ValueError(f"box {str(value)[:60]} is not four numbers")
    return [read([number * unit for number, unit in zip(_decimals(box), scale)], (width, height)) for box in boxes]


def _decimals(numbers: list) -> list:
    """The numbers as they were before a float32 column: 468.29998779 -> 468.3. (Else a polygon loses pixels.)"""
    try:
        values = [float(number) for number in numbers]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(numbers)[:60]} are not numbers") from error
    return [float(str(np.float32(value))) if value == np.float32(value) else value for value in values]


def _read_masks(value, width: int, height: int) -> list[dict]:
    """One mask (polygons, RLE, image), or a list of RLEs or images."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [mask for one in value for mask in _read_masks(one, width, height)]
    if isinstance(value, dict) and value.get("bytes"):
        try:
            with Image.open(io.BytesIO(value["bytes"])) as image:
                mask = np.asarray(image.convert("L")) > 0
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"the mask cannot be read as an image: {error}") from error
        if mask.shape != (height, width):
            raise ValueError(f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, the image {width} x {height}")
        value = encode_rle(mask)
    if isinstance(value, dict) and isinstance(value.get("counts"), bytes):
        value = {**value, "counts": value["counts"].decode("ascii", errors="replace")}
    elif isinstance(value, list) and value and isinstance(value[0], (int, float)):
        value = [value]
    if isinstance(value, list):
        value = [_decimals(polygon) for polygon in value]
    mask = segmentation_to_rle(value, height, width, "mask")
    if mask is None:
        raise ValueError("the mask is empty")
    return [mask]
