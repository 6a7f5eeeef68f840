"""Data sets of the Hub (or a local folder of parquet, json or arrow files) as rows of the schema, by a column mapping.

| role | its column holds |
| --- | --- |
| `image` | the picture (required) |
| `phrase` | what the signals show: a text, or a list of texts for the same object -> `refer` |
| `box` | four numbers, or a list of such boxes |
| `mask` | COCO polygons (also one flat polygon), an RLE, or a picture of the mask |
| `caption` | a text, or several -> `caption`; with a box or mask, its `region_caption` |
| `question`, `answer` | texts -> `vqa`; with a box or mask, `region_vqa` |
| `image_id` | a name or number of the picture; COCO file names become COCO's number |

A data set that has the schema's own columns needs no mapping.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Image as ImageFeature
from datasets import load_dataset
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.data.coco import segmentation_to_rle
from perceptiongpt.data.conversation import (
    Draw,
    Turn,
    box_from_xywh,
    check_box,
    chosen_tasks,
    clean_text,
    coco_image_id,
    each_record,
    inside_sentence,
    make_row,
)
from perceptiongpt.data.reading import Problems, find_image, picture_size
from perceptiongpt.data.schema import row_features
from perceptiongpt.data.templates import render_prompt, render_turn


ROLES = ("image", "phrase", "box", "mask", "caption", "question", "answer", "image_id")
HUB_TASKS = ("refer", "box_to_mask", "caption", "region_caption", "vqa", "region_vqa")
BOX_FORMATS = ("xyxy", "xywh", "xyxy_relative", "xywh_relative")
# Columns of known data sets: all of the first must be there.
KNOWN_COLUMNS = {
    # lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg: `question` is a prompt, `answer` holds the expressions
    ("image", "answer", "segmentation", "bbox", "iscrowd", "file_name"): (
        {"image": "image", "phrase": "answer", "box": "bbox", "mask": "segmentation", "image_id": "file_name"},
        "xywh",
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
        root: its id, or a local folder.
        split: one of its splits.
        annotations: files of the data set, instead of all (`data_files` of `load_dataset`).
        images: the folder of pictures that are given by name, default `root`; False: rows without pictures.
        tasks: any of `HUB_TASKS` that the columns offer; default all. Each phrase is a sample of its own.
        seed, evaluation: of the prompts; the fixed evaluation prompts instead.
        limit: only the first `limit` records.
        problems: takes what is wrong with a record; default: raise.
        columns: role -> column, as a mapping or as "role=column role=column"; default: by the columns of known data
            sets.
        box_format: one of `BOX_FORMATS`; pixels unless relative.
        name: a configuration of the data set.
    """
    problems = problems or Problems()
    files = None if annotations is None else {split: [str(path) for path in annotations]}
    try:
        if files is not None and not Path(root).is_dir():
            dataset = load_dataset(str(root), name, split=split, streaming=True, data_files=files)
        elif files is not None:
            kind = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}.get(Path(files[split][0]).suffix, "json")
            dataset = load_dataset(kind, split=split, streaming=True, data_files=files)
        else:
            dataset = load_dataset(str(root), name, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{root}: split {split!r} cannot be read as a data set: {error}") from error
    found = list(dataset.features or next(iter(dataset)))
    mapping, box_format = _find_mapping(columns, box_format, found, str(root))
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, ImageFeature):
            dataset = dataset.cast_column(column, ImageFeature(decode=False))
    records = ((f"{root}, {split}: record {number}", (number, record)) for number, record in enumerate(dataset))
    records = islice(records, limit)
    if mapping is None:
        chosen_tasks(tasks, [] if tasks else HUB_TASKS, f"hub ({root} has the schema's own columns)")
        yield from each_record(records, lambda numbered: [_own_row(numbered[1], images)], problems)
        return
    tasks = chosen_tasks(tasks, _offered(mapping), "hub")
    draw = Draw("hub", seed, evaluation)

    def make(numbered) -> Iterator[dict]:
        number, record = numbered
        image, (width, height) = _read_image(record.get(mapping["image"]), images or root)
        image_id = str(record[mapping["image_id"]]) if "image_id" in mapping else str(number)
        common = {"image": None if images is False else image, "width": width, "height": height}
        common |= {"source": "hub", "image_id": coco_image_id(image_id) or image_id, "split": split}
        value = {role: record.get(column) for role, column in mapping.items()}
        slots = _read_slots(value.get("box"), value.get("mask"), box_format, width, height)
        return list(_record_rows(value, slots, number, common, tasks, draw))

    yield from each_record(records, make, problems)


def _find_mapping(columns, box_format: str, found: list[str], root: str) -> tuple[dict | None, str]:
    """(role -> column, box format); None as the mapping for a data set that has the schema's columns."""
    if columns is None:
        if set(row_features()) <= set(found):
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


def _record_rows(value, slots, number, columns, tasks, draw) -> Iterator[dict]:
    single = slots if len(slots) == 1 else []
    for index, phrase in enumerate(_texts(value.get("phrase"), "phrase")):
        if "refer" in tasks and slots:
            prompt = render_prompt("refer", inside_sentence(phrase), draw(number, "refer", index))
            yield make_row("refer", [Turn(prompt, VIS_TOKEN * len(slots), slots)], columns)
    if "box_to_mask" in tasks and single and None not in single[0]:
        prompt = render_prompt("box_to_mask", "", draw(number, "box_to_mask"))
        yield make_row("box_to_mask", [Turn(prompt, VIS_TOKEN, [(single[0][0], None), *single])], columns)
    captions = value.get("caption") if value.get("caption") is not None else value.get("phrase")
    for index, caption in enumerate(_texts(captions, "caption")):
        for task in ("caption", "region_caption"):
            if task in tasks and (single or task == "caption"):
                texts = render_turn(task, "", caption, draw(number, task, index))
                yield make_row(task, [Turn(*texts, single if task == "region_caption" else [])], columns)
    for task in ("vqa", "region_vqa"):
        if task in tasks and (single or task == "vqa"):
            question = clean_text(value["question"], "question")
            answers = _texts(value["answer"], "answer")
            if not answers:
                raise ValueError("there is no answer")
            texts = render_turn(task, question, answers[0], draw(number, task))
            yield make_row(task, [Turn(*texts, single if task == "region_vqa" else [])], columns)


def _texts(value, what: str) -> list[str]:
    values = [] if value is None else [value] if isinstance(value, str) else list(value)
    return [clean_text(text, what) for text in values]


def _read_image(value, folder: str | Path) -> tuple[dict, tuple[int, int]]:
    """({`bytes`, `path`}, (width, height)) of an undecoded picture, or of a name in `folder`."""
    value = {"path": value, "bytes": None} if isinstance(value, str) else value
    if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
        raise ValueError(f"the picture is {str(value)[:60]}, expected an image column or a path")
    if value.get("bytes"):
        return {"path": None, "bytes": value["bytes"]}, _size_of_bytes(value["bytes"])
    path = value["path"]
    if Path(path).is_absolute() and Path(path).is_relative_to(Path(folder).absolute()):
        path = str(Path(path).relative_to(Path(folder).absolute()))
    path = str(find_image(folder, path))
    return {"path": path, "bytes": None}, picture_size(path)


def _size_of_bytes(data: bytes) -> tuple[int, int]:
    return picture_size.__wrapped__(io.BytesIO(data))


def _own_row(record: dict, images: bool | None) -> dict:
    """A row that has the schema's columns already."""
    row = {column: record[column] for column in row_features()}
    return row | ({"image": None} if images is False else {})


def _read_slots(box, mask, box_format: str, width: int, height: int) -> list[tuple]:
    """(box, mask) per object, from left to right."""
    boxes = _read_boxes(box, box_format, width, height) if box is not None else []
    masks = _read_masks(mask, width, height) if mask is not None else []
    if not boxes and not masks:
        return []
    if boxes and masks and len(boxes) != len(masks):
        raise ValueError(f"{len(boxes)} boxes and {len(masks)} masks")
    slots = list(zip(boxes or [None] * len(masks), masks or [None] * len(boxes)))
    return sorted(slots, key=lambda slot: slot[0][:2]) if boxes else slots


def _read_boxes(value, box_format: str, width: int, height: int) -> list[list[float]]:
    boxes = [value] if len(value) and not isinstance(value[0], (list, tuple)) else list(value)
    scale = [width, height] * 2 if box_format.endswith("_relative") else [1] * 4
    read = box_from_xywh if box_format.startswith("xywh") else check_box
    if any(len(box) != 4 for box in boxes):
        raise ValueError(f"box {str(value)[:60]} is not four numbers")
    return [read([number * unit for number, unit in zip(_decimals(box), scale)], (width, height)) for box in boxes]


def _decimals(numbers: list) -> list:
    """What the numbers were before a float32 column: 468.29998779 -> 468.3. (A polygon would else lose pixels.)"""
    try:
        values = [float(number) for number in numbers]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(numbers)[:60]} are not numbers") from error
    return [float(str(np.float32(value))) if value == np.float32(value) else value for value in values]


def _read_masks(value, width: int, height: int) -> list[dict]:
    """One mask (polygons, RLE, picture), or a list of RLEs or pictures."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [mask for one in value for mask in _read_masks(one, width, height)]
    if isinstance(value, dict) and value.get("bytes"):
        try:
            with Image.open(io.BytesIO(value["bytes"])) as image:
                mask = np.asarray(image.convert("L")) > 0
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"the mask cannot be read as a picture: {error}") from error
        if mask.shape != (height, width):
            raise ValueError(f"the mask is {mask.shape[1]} x {mask.shape[0]} pixels, the picture {width} x {height}")
        rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        value = {"size": [height, width], "counts": rle["counts"].decode("ascii")}
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
