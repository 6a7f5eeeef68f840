"""COCO panoptic (a json and a PNG per image, id = R + 256 G + 65536 B) as rows of the schema.

Crowd segments are never targets, and a category with one makes no `refer` or `detect` row about that image.
"""

import io
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from perceptiongpt.configuration_perceptiongpt import PHRASE_END_TOKEN, PHRASE_START_TOKEN, VIS_TOKEN
from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    box_from_xywh,
    chosen_tasks,
    clean_text,
    each_record,
    get,
    make_row,
    stated_size,
    usual_files,
)
from perceptiongpt.data.formats.coco import instance_rows, read_section
from perceptiongpt.data.reading import BROKEN, Problems, safe_join, until_broken
from perceptiongpt.data.templates import render_turn
from perceptiongpt.geometry_perceptiongpt import encode_rle


PANOPTIC_TASKS = ("refer", "detect", "no_target", "box_to_mask", "region_caption", "spotting_caption")
PLURALS = {"person": "people", "mouse": "mice", "knife": "knives"}
PLURALS |= {name: name for name in ("sheep", "skis", "scissors", "broccoli")}
TURNED_ROUND = ("floor-wood", "wall-brick", "wall-stone", "wall-tile", "wall-wood")


def coco_panoptic_rows(
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
    masks: str | Path | None = None,
) -> Iterator[dict]:
    """Yield the rows of COCO panoptic, image by image.

    `refer` and `box_to_mask` as the source `coco`, `detect` and `no_target` too, but for things only; `region_caption`
    asks what a segment is, given by its mask, its box or both; `spotting_caption` lists what is in the image, with
    every segment marked.

    Args:
        root: folder with `annotations/panoptic_<split>2017.json`, the PNGs in `annotations/panoptic_<split>2017` (both
            also directly in `root`) and the images in `<split>2017`.
        annotations, images: the files and the folder, if they are elsewhere; `images=False`: rows without images.
        tasks: any of `PANOPTIC_TASKS`; default: all.
        seed, evaluation: seed of the drawn prompts and choices; True: the fixed evaluation prompts.
        limit: read only the first `limit` images.
        problems: collects bad records; None: the first one raises.
        masks: the folder or zip of the PNGs; default: the one beside the json with the same name.
    """
    problems = problems or Problems()
    tasks = chosen_tasks(tasks, PANOPTIC_TASKS, "coco_panoptic")
    root = Path(root)
    files = list(annotations or usual_files(root, [f"panoptic_{split}{year}.json" for year in ("2017", "")])[:1])
    if not files:
        raise ValueError(f"{root}: there is no annotations/panoptic_{split}2017.json; name the file as annotations")
    finder = ImageFinder(images, *(root / f"{split}{year}" for year in ("2017", "2014", "")), root / "images", root)
    draw = Draw("coco_panoptic", seed, evaluation)

    for file in map(Path, files):
        pngs = masks
        if pngs is None:
            name = file.name.split(".json")[0]
            places = [folder / (name + suffix) for folder in (file.parent, root) for suffix in ("", ".zip")]
            found = [path for path in places if path.exists()]
            if not found:
                raise ValueError(f"{file}: there is no folder {name} with the PNGs beside it; name it as masks")
            pngs = found[0]
        segment_ids = SegmentIds(pngs)
        try:
            records = {get(one, "id", of=int): _needed(one) for one in read_section(file, "images")}
            listed = list(read_section(file, "categories"))
            categories = {get(one, "id", of=int): plain_name(get(one, "name")) for one in listed}
            things = {one["id"] for one in listed if one.get("isthing", 1)}
        except ValueError as error:
            reason = str(error).removeprefix(f"{file}: ")
            raise ValueError(f"{file}: in images or categories: {reason}") from error

        def make(annotation) -> Iterator[dict]:
            image_id = get(annotation, "image_id", of=int)
            if image_id not in records:
                raise ValueError(f"belongs to image {image_id}, which is not listed")
            record = records[image_id]
            size = stated_size(record)
            if size is None:
                raise ValueError(f"image {image_id} lacks width and height")
            name = get(record, "file_name")
            columns = finder.columns(name, size=size, coco_id=image_id)
            columns |= {"source": "coco_panoptic", "image_id": str(image_id), "split": split}
            ids = segment_ids(get(annotation, "file_name"), size)
            groups = _read_segments(annotation, ids, size, categories, problems)
            return list(_rows(groups, categories, things, columns, tasks, draw, problems))

        found = until_broken(read_section(file, "annotations"), file, problems)
        numbered = ((f"{file}: annotation {number}", one) for number, one in enumerate(found))
        yield from each_record(islice(numbered, limit), make, problems)


def _needed(record: dict) -> dict:
    return {key: record[key] for key in ("file_name", "width", "height") if key in record}


def plain_name(name: str) -> str:
    """A panoptic category in plain words: "wall-brick" -> "brick wall", "sky-other-merged" -> "sky"."""
    if name in TURNED_ROUND:
        return " ".join(reversed(name.split("-")))
    for ending in ("-merged", "-other", "-stuff"):
        name = name.removesuffix(ending)
    return clean_text(name.replace("-", " "), "category")


class SegmentIds:
    """The panoptic PNGs in a folder or a zip; a zip is opened and listed once.

    Raises:
        ValueError: if the zip cannot be read.
    """

    def __init__(self, masks: str | Path):
        self.masks, self.archive, self.entries = Path(masks), None, defaultdict(list)
        if self.masks.is_file():
            try:
                self.archive = zipfile.ZipFile(self.masks)
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(f"{masks}: cannot be read as a zip file: {error}") from error
            for entry in self.archive.namelist():
                self.entries[entry.rsplit("/", 1)[-1]].append(entry)

    def __call__(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """The segment ids (height, width) in the PNG of that name; `ValueError` if there is none of `size`."""
        try:
            with Image.open(self._find(name)) as image:
                colors = np.asarray(image.convert("RGB"), dtype=np.uint32)
        except (*BROKEN, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:  # RuntimeError: encrypted
            raise ValueError(f"{name} in {self.masks} cannot be read as an image: {error}") from error
        if colors.shape[1::-1] != tuple(size):
            shape = f"{colors.shape[1]} x {colors.shape[0]}"
            raise ValueError(f"{name} is {shape} pixels, the image {size[0]} x {size[1]}")
        return colors @ np.array([1, 256, 65536], dtype=np.uint32)

    def _find(self, name: str) -> Path | io.BytesIO:
        if self.archive is None:
            return safe_join(self.masks, name)
        if len(entries := self.entries.get(name, ())) != 1:
            raise ValueError(f"{self.masks}: holds {len(entries)} files named {name!r}, expected one")
        return io.BytesIO(self.archive.read(entries[0]))


def _read_segments(annotation, ids, size, categories, problems) -> dict[int, list[dict | None]]:
    """{category: its segments as {box, mask}}; None stands for a crowd segment."""
    groups = defaultdict(list)
    for segment in get(annotation, "segments_info", of=list):
        number, category = get(segment, "id", of=int), get(segment, "category_id", of=int)
        if category not in categories:
            raise ValueError(f"segment {number} has the category {category}, which is not listed")
        box = box_from_xywh(get(segment, "bbox", of=list), size, f"bbox of segment {number}")
        mask = ids == number
        if not mask.any():
            raise ValueError(f"segment {number} has no pixel in {annotation['file_name']}")
        if segment.get("iscrowd"):
            problems.leave_out("crowd region or instance without area")
            groups[category].append(None)
            continue
        groups[category].append({"box": box, "mask": encode_rle(mask)})
    return groups


def _rows(groups, categories, things, columns, tasks, draw, problems) -> Iterator[dict]:
    record = {"id": columns["image_id"], "width": columns["width"], "height": columns["height"]}
    names = {categories[category] for category in groups}
    # "The wall" is not clear where there is a "brick wall" besides.
    vague = {name for name in names if any(other.endswith(" " + name) for other in names)}
    clear = {category: group for category, group in groups.items() if categories[category] not in vague}
    usable = {category: [one for one in group if one is not None] for category, group in groups.items()}
    absent = {category: categories[category] for category in things if categories[category] not in names}
    for part, among, wanted in (
        (clear, {category: categories[category] for category in clear}, ("refer",)),
        # Of "stuff" there is one segment, however many windows it covers.
        ({category: group for category, group in clear.items() if category in things}, categories, ("detect",)),
        (groups, {category: categories[category] for category in groups}, ("box_to_mask",)),
        ({}, absent, ("no_target",)),
    ):
        wanted = tuple(task for task in wanted if task in tasks)
        for row in instance_rows(part, among, record, wanted, 0.0, draw.seed, draw.evaluation, problems):
            yield columns | row

    if "region_caption" in tasks:
        for category, group in usable.items():
            name = _with_article(categories[category]) if category in things else categories[category]
            for number, segment in enumerate(group):
                yield region_row(segment, name, (category, number), columns, draw)
    if "spotting_caption" in tasks:
        phrases, slots = [], []
        for category, group in clear.items():
            if None in group:
                continue
            group = sorted(group, key=lambda segment: segment["box"][:2])
            name = categories[category]
            if category in things:
                name = _with_article(name) if len(group) == 1 else _plural(name)
            phrases.append(f"{PHRASE_START_TOKEN}{name}{PHRASE_END_TOKEN}{VIS_TOKEN * len(group)}")
            slots += [(segment["box"], segment["mask"]) for segment in group]
        if phrases:
            listing = phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
            texts = render_turn("spotting_caption", "", f"The image shows {listing}.", draw(record["id"], "spotting"))
            yield make_row("spotting_caption", [Turn(*texts, slots)], columns)


def region_row(instance: dict, name: str, key, columns: dict, draw: Draw) -> dict:
    """Ask what an object {box, mask} is, given by its mask, its box or both (under evaluation: its mask)."""
    reading = 0 if draw.evaluation else draw.always(columns["image_id"], "reading", key).integers(3)
    box, mask = (None if reading == 0 else instance["box"]), (None if reading == 1 else instance["mask"])
    texts = render_turn("region_caption", "", name, draw(columns["image_id"], "region", key))
    return make_row("region_caption", [Turn(*texts, [(box, mask)])], columns)


def _with_article(name: str) -> str:
    if PLURALS.get(name) == name:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _plural(name: str) -> str:
    return PLURALS.get(name) or name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")
