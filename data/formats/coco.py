"""COCO instances (a json and a folder of images) as rows of the schema.

Tasks: `refer` ("the dog", or "the second cup from the left" where the category occurs several times), `detect` (every
instance of a category), `no_target` (a category that is not in the image), `box_to_mask`; and, where they are asked
for, `point` and `point_all` (as `refer` and `detect`, with the point to point at) and `point_to_mask` (a click).

Crowd regions are never targets. If a category has one in an image, then "the dog", "every dog" and "there is no dog"
are all unclear there; the category's other instances still make rows of `box_to_mask` and `point_to_mask`. The same
holds for an instance without area, which real files contain.
"""

import marshal
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset
from pycocotools import mask as coco_mask

from perceptiongpt.configuration_perceptiongpt import IMAGE_TOKEN, VIS_TOKEN
from perceptiongpt.data.conversation import usual_files
from perceptiongpt.data.reading import (
    MissingImage,
    Problems,
    image_size,
    open_file,
    plain_name,
    safe_join,
    stream_json_array,
)
from perceptiongpt.data.schema import POINT_TASKS, check_size, decode_rle, naming, row_features
from perceptiongpt.data.templates import render_prompt, stable_generator
from perceptiongpt.geometry_perceptiongpt import clip_box, deepest_pixel, interior_point, rle_runs


COCO_TASKS = ("refer", "detect", "no_target", "box_to_mask", *POINT_TASKS)
ORDINALS = ("", "second ", "third ", "fourth ", "fifth ", "sixth ", "seventh ", "eighth ", "ninth ", "tenth ")
POSITION_MARGIN = 0.02  # least distance, as a share of the image's side, to tell two objects apart by position
SIZE_RATIO = 1.5  # least ratio of box areas for telling them apart by size
PER_CATEGORY_TASKS = ("refer", "box_to_mask", "detect", "point", "point_all", "point_to_mask")
EXPRESSION_KEYS = {"refer": "expression", "point": "point expression"}  # of the random draw among expressions
# Why a task makes no row of an instance or category.
BESIDE_CROWD = "category with a crowd region or an instance without area in the image"
TOO_SMALL = "instance below min_area_share"
NO_EXPRESSION = "no phrase that means this instance alone"


def load_coco(
    annotations: str | Path,
    images: str | Path,
    tasks: Iterable[str] = ("refer", "detect", "no_target"),
    min_area_share: float = 0.0,
    seed: int = 0,
    limit: int | None = None,
    image_ids: Iterable[int] | None = None,
    split: str = "train",
    evaluation: bool = False,
) -> Dataset:
    """The rows of `coco_rows` as a `datasets.Dataset` that opens each image when its row is read."""
    rows = list(coco_rows(annotations, images, tasks, min_area_share, seed, limit, image_ids, split, evaluation))
    features = row_features()
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in features}, features=features)


def coco_folder_rows(
    root: str | Path | None = None,
    *,
    split: str = "train",
    annotations: Iterable[str | Path] | None = None,
    images: str | Path | bool | None = None,
    tasks: Iterable[str] | None = None,
    seed: int = 0,
    evaluation: bool = False,
    limit: int | None = None,
    problems: Problems | None = None,
    min_area_share: float = 0.0,
    image_ids: Iterable[int] | None = None,
) -> Iterator[dict]:
    """The source `coco`: `coco_rows` of each instances file.

    Args:
        root: a folder with `annotations/instances_<split>2017.json` (or 2014, or without a year, packed or plain, also
            without the folder `annotations`) and the images in `<split>2017/` (or 2014, or `images/`).
        annotations, images: the files and the folder, if they are elsewhere; `images=False`: rows without images.
        tasks: default `refer`, `detect`, `no_target`.
        Others: as in `coco_rows`.
    """
    stems = [f"{split}{year}" for year in ("2017", "2014", "")]
    if annotations is None:
        if root is None:
            raise ValueError("the coco source needs a root, or annotations and images")
        names = [f"instances_{stem}.json" for stem in stems]
        annotations = usual_files(root, [*names, "instances.json"])[:1]
        if not annotations:
            raise ValueError(f"{root}: holds no annotations/{names[0]}; name the file with --annotations")
        found = plain_name(annotations[0]).removeprefix("instances_").removesuffix(".json")
        stems.sort(key=lambda stem: stem != found)  # the images of the same release, where there are several
    if images is None:
        if root is None:
            raise ValueError("the coco source needs a root or images, the folder of the images")
        images = next((Path(root, name) for name in (*stems, "images") if Path(root, name).is_dir()), root)
    tasks = ("refer", "detect", "no_target") if tasks is None else tasks
    for file in annotations:
        yield from coco_rows(file, images, tasks, min_area_share, seed, limit, image_ids, split, evaluation, problems)


@contextmanager
def skipping(problems: Problems | None, where: str | Path) -> Iterator[None]:
    """Count a `ValueError` in `problems` if bad records are skipped; else raise it."""
    try:
        yield
    except ValueError as error:
        if problems is None or not problems.skip:
            raise
        problems.report(str(where), error)


def coco_rows(
    annotations: str | Path,
    images: str | Path | bool,
    tasks: Iterable[str] = ("refer", "detect", "no_target"),
    min_area_share: float = 0.0,
    seed: int = 0,
    limit: int | None = None,
    image_ids: Iterable[int] | None = None,
    split: str = "train",
    evaluation: bool = False,
    problems: Problems | None = None,
) -> Iterator[dict]:
    """Yield the rows of a COCO instances file, image by image; images are given by path.

    Args:
        annotations: the instances json.
        images: the folder that its `file_name`s are relative to; False for rows without images.
        tasks: any of `COCO_TASKS`.
        min_area_share: an object is a target only if its box covers at least this share of the padded square
            (box area / longer side squared). A smaller one still makes an expression ambiguous and keeps its category
            from a `detect` row, whose answer would otherwise be incomplete.
        seed: decides the expressions, the prompts and the absent categories, per row.
        limit: read only the first `limit` images.
        image_ids: only these images, which must exist.
        split: what the column `split` says.
        evaluation: use each task's fixed evaluation prompt.
        problems: collects bad records; None: the first one raises.

    Raises:
        ValueError: naming file, annotation or image, for anything that is missing, broken or outside; nothing is
            skipped silently. (A category with a bad annotation makes no row about that image.)
    """
    tasks = tuple(tasks)
    if unknown := sorted(set(tasks) - set(COCO_TASKS)):
        raise ValueError(f"unknown tasks {unknown}; the coco source makes {', '.join(COCO_TASKS)}")
    records, instances, categories = read_instances(annotations, problems)
    if image_ids is not None:
        by_id = {record["id"]: record for record in records}
        if unknown := [image_id for image_id in image_ids if image_id not in by_id]:
            raise ValueError(f"{annotations}: there are no images with the ids {unknown}")
        records = [by_id[image_id] for image_id in image_ids]

    for record in records[:limit]:
        path = False if images is False else None
        with skipping(problems, annotations):
            path = path if path is False else image_path(images, record, annotations)
        if path is None:
            continue
        common = {
            "image": {"path": str(path), "bytes": None} if path else None,
            "source": "coco",
            "image_id": str(record["id"]),
            "split": split,
            "width": record["width"],
            "height": record["height"],
        }
        groups = defaultdict(list)
        for annotation in instances[record["id"]]:
            target = None
            with skipping(problems, annotations):
                target = read_annotation(annotation, record, annotations)
                if target is None and problems is not None:
                    problems.leave_out("crowd region or instance without area")
            groups[annotation["category_id"]].append(target)
        for row in instance_rows(groups, categories, record, tasks, min_area_share, seed, evaluation, problems):
            yield {**common, **row}


class PackedAnnotations(Mapping):
    """{image id: its annotations}, serialised: as Python objects they would take seven times the memory."""

    def __init__(self):
        self.packed = {}

    def add_image(self, image_id: int) -> None:
        self.packed[image_id] = []

    def add(self, image_id: int, annotation: dict) -> None:
        self.packed[image_id].append(marshal.dumps(annotation))

    def __getitem__(self, image_id: int) -> list[dict]:
        return [marshal.loads(annotation) for annotation in self.packed[image_id]]

    def __contains__(self, image_id) -> bool:
        return image_id in self.packed

    def __iter__(self) -> Iterator[int]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)


def read_section(path: str | Path, key: str) -> Iterator:
    """The items of one list of a COCO file, plain or packed, one by one."""
    with open_file(path) as stream:
        yield from stream_json_array(stream, key)


def read_instances(
    annotations: str | Path, problems: Problems | None = None
) -> tuple[list[dict], Mapping[int, list[dict]], dict[int, str]]:
    """Read and check an instances json, piece by piece.

    Returns:
        The image records in file order, the annotations per image id, and the name per category id.

    Raises:
        ValueError: broken json, a missing key, a category without a name, a repeated image or annotation id, an
            impossible image size, or an annotation whose image or category does not exist.
    """
    categories = {}
    for number, category in enumerate(read_section(annotations, "categories")):
        if not isinstance(category, dict) or not isinstance(category.get("id"), int):
            raise ValueError(f"{annotations}: category {number} is {str(category)[:60]}, expected id and name")
        if not isinstance(category.get("name"), str) or not category["name"].strip():
            raise ValueError(f"{annotations}: category {category['id']!r} has no name")
        categories[category["id"]] = category["name"].strip()
    instances, records = PackedAnnotations(), []
    for number, record in enumerate(read_section(annotations, "images")):
        with skipping(problems, annotations):
            if not isinstance(record, dict):
                raise ValueError(f"{annotations}: image {number} is {str(record)[:60]}, expected an object")
            if "file_name" not in record and isinstance(record.get("coco_url"), str):  # LVIS v1
                record["file_name"] = "/".join(record["coco_url"].split("/")[-2:])
            if missing := [key for key in ("id", "file_name", "width", "height") if key not in record]:
                raise ValueError(f"{annotations}: image {record.get('id')!r} lacks {missing}")
            name = f"{annotations}: image {record['id']!r}"
            if not isinstance(record["id"], (int, str)) or not isinstance(record["file_name"], str):
                raise ValueError(f"{name}, file {record['file_name']!r}: expected an id and a file name")
            check_size(record["width"], record["height"], name)
            if record["id"] in instances:
                raise ValueError(f"{annotations}: image id {record['id']!r} occurs twice")
            instances.add_image(record["id"])
            records.append(record)
    seen = set()
    for number, annotation in enumerate(read_section(annotations, "annotations")):
        with skipping(problems, annotations):
            if not isinstance(annotation, dict):
                raise ValueError(f"{annotations}: annotation {number} is {str(annotation)[:60]}, expected an object")
            name = f"{annotations}: annotation {annotation.get('id')!r}"
            if missing := [key for key in ("image_id", "category_id", "bbox", "segmentation") if key not in annotation]:
                raise ValueError(f"{name} lacks {missing}")
            image_id, category_id = annotation["image_id"], annotation["category_id"]
            if not isinstance(image_id, (int, str)) or image_id not in instances:
                raise ValueError(f"{name} belongs to image {image_id!r}, which is not listed")
            if not isinstance(category_id, int) or category_id not in categories:
                raise ValueError(f"{name} has the category {category_id!r}, which is not listed")
            if isinstance(annotation.get("id"), int):
                if annotation["id"] in seen:
                    raise ValueError(f"{name}: this id occurs twice")
                seen.add(annotation["id"])
            instances.add(image_id, annotation)
    return records, instances, categories


def image_path(folder: str | Path, record: dict, annotations: str | Path) -> Path:
    """The path of an image, checked: inside `folder`, not truncated, and of the size that `record` states."""
    name = f"{annotations}: image {record['id']!r}, file {record['file_name']!r}"
    try:
        path = safe_join(folder, record["file_name"])
        size = image_size(path)
    except MissingImage as error:
        raise MissingImage(f"{name}: does not exist in {folder}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if size != (record["width"], record["height"]):
        raise ValueError(
            f"{name}: is {size[0]} x {size[1]} pixels, the annotations say {record['width']} x {record['height']}"
        )
    return path


def read_annotation(annotation: dict, record: dict, annotations: str | Path) -> dict | None:
    """One object as {`box` (xyxy pixels), `mask` (RLE)}; None for a crowd region or an object without area."""
    name = f"{annotations}: annotation {annotation.get('id')!r} of image {record['id']!r}"
    mask = segmentation_to_rle(annotation["segmentation"], record["height"], record["width"], name)
    if annotation.get("iscrowd"):
        return None
    bbox = annotation["bbox"]
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(isinstance(value, (int, float)) for value in bbox):
        raise ValueError(f"{name}: bbox {bbox!r} is not [x, y, width, height]")
    x, y, width, height = bbox
    if (width == 0 or height == 0) or mask is None:
        return None
    with naming(name):
        box = clip_box([x, y, x + width, y + height], record["height"], record["width"])
    return {"box": box, "mask": mask}


def segmentation_to_rle(segmentation, height: int, width: int, name: str = "segmentation") -> dict | None:
    """Polygons, uncompressed or compressed RLE -> {`size`, `counts` (str)}; None if it covers no pixel.

    Raises:
        ValueError: for a polygon of less than three points or odd length or with a point further outside the image
            than its longer side, or an RLE of another size.
    """
    if isinstance(segmentation, list):
        side = max(height, width)  # pycocotools would walk along an edge to a point at 1e9, pixel by pixel
        if not segmentation:
            return None
        for polygon in segmentation:
            is_polygon = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
            if not is_polygon or not all(isinstance(v, (int, float)) and v == v for v in polygon):  # not NaN
                raise ValueError(f"{name}: polygon {str(polygon)[:60]} is not [x1, y1, x2, y2, ...] of three points")
            if min(polygon) < -side or max(polygon) > 2 * side:
                raise ValueError(f"{name}: polygon {str(polygon)[:60]} lies far outside the {width} x {height} image")
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation, dict) and segmentation.get("size") in ([height, width], (height, width)):
        counts = segmentation.get("counts")
        with naming(name):
            runs = rle_runs(counts) if isinstance(counts, str) else counts
        is_runs = isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)
        if not is_runs or sum(runs) != height * width:
            raise ValueError(f"{name}: the RLE's run lengths do not sum up to {height} x {width}")
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": runs}, height, width)
    else:
        raise ValueError(f"{name}: segmentation is neither polygons nor an RLE of size [{height}, {width}]")
    if coco_mask.area(rle) == 0:
        return None
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def instance_rows(
    groups: Mapping[int, list[dict | None]],
    categories: Mapping[int, str],
    record: dict,
    tasks: Iterable[str],
    min_area_share: float,
    seed: int,
    evaluation: bool,
    problems: Problems | None = None,
) -> Iterator[dict]:
    """The rows of one image, without the columns that describe the image.

    Args:
        groups: per category its instances {box, mask}; None for a crowd region or an instance without area.
        categories: the name of each category; those that are not in `groups` are absent from the image.
        record: `id`, `width` and `height` of the image.
        tasks: of `COCO_TASKS`.
        min_area_share, seed, evaluation: as in `coco_rows`.
        problems: counts, per task, the rows that cannot be made.
    """
    problems = problems or Problems()
    least_area = min_area_share * max(record["width"], record["height"]) ** 2

    def make(task: str, prompt_task: str, phrase: str, slots: list[dict], answer: str, key) -> dict:
        generator = None if evaluation else stable_generator(seed, record["id"], task, key)
        prompt = render_prompt(prompt_task, phrase, generator)
        return {
            "messages": [
                {"role": "user", "content": IMAGE_TOKEN + prompt},
                {"role": "assistant", "content": answer},
            ],
            "boxes": [slot.get("box") for slot in slots],
            "masks": [slot.get("mask") for slot in slots],
            "points": [slot.get("point") for slot in slots],
            "task": task,
        }

    for category_id, group in groups.items():
        name, is_whole = categories[category_id], None not in group
        objects = sorted((one for one in group if one is not None), key=lambda instance: instance["box"][:2])
        boxes = [instance["box"] for instance in objects]
        large = [i for i, box in enumerate(boxes) if box_area(box) >= least_area]
        for task in PER_CATEGORY_TASKS:
            if task not in tasks or not objects:
                continue
            asks_for_all, names_it = task in ("detect", "point_all"), task in ("refer", "point")
            if not is_whole and (asks_for_all or names_it):
                problems.leave_out_row(task, BESIDE_CROWD, 1 if asks_for_all else len(objects))
                continue
            if asks_for_all:
                if len(large) < len(objects):
                    problems.leave_out_row(task, TOO_SMALL)
                    continue
                slots = objects if task == "detect" else [with_point(instance) for instance in objects]
                yield make(task, task, name, slots, VIS_TOKEN * len(objects), category_id)
                continue
            problems.leave_out_row(task, TOO_SMALL, len(objects) - len(large))
            expressions = refer_expressions(name, boxes, record["width"], record["height"]) if names_it else None
            for i in large:
                instance, phrase, given = objects[i], "", []
                if names_it:
                    if not expressions[i]:
                        problems.leave_out_row(task, NO_EXPRESSION)
                        continue
                    draw = stable_generator(seed, record["id"], EXPRESSION_KEYS[task], category_id, i)
                    phrase = expressions[i][draw.integers(len(expressions[i]))]
                elif task == "box_to_mask":
                    given = [{"box": instance["box"]}]
                else:
                    draw = stable_generator(seed, record["id"], "click", category_id, i)
                    given = [{"point": interior_point(decode_rle(instance["mask"]), draw)}]
                answer = with_point(instance) if task == "point" else instance
                yield make(task, task, phrase, [*given, answer], VIS_TOKEN, (category_id, i))

    absent = sorted(category_id for category_id in categories if category_id not in groups)
    if "no_target" in tasks and absent:
        draw = stable_generator(seed, record["id"], "absent")
        name = categories[absent[draw.integers(len(absent))]]
        prompt_task = "refer" if draw.integers(2) else "detect"
        phrase = f"the {name}" if prompt_task == "refer" else name
        yield make("no_target", prompt_task, phrase, [], f"There is no {name}.", "absent")


def with_point(instance: dict) -> dict:
    """An instance {box, mask} with its deepest pixel as `point`."""
    if "deepest" not in instance:  # several tasks ask for it
        instance["deepest"] = deepest_pixel(decode_rle(instance["mask"]))
    return {**instance, "point": instance["deepest"]}


def box_area(box_xyxy: list[float]) -> float:
    """Area of an xyxy box."""
    return (box_xyxy[2] - box_xyxy[0]) * (box_xyxy[3] - box_xyxy[1])


def refer_expressions(name: str, boxes_xyxy_pixels: list[list[float]], width: int, height: int) -> list[list[str]]:
    """For every object of one category in an image, the phrases that are true of it and of no other.

    A single object is "the <name>". Of several, one is named by its rank along x or y if each of the others lies
    clearly before or behind it (centre by `POSITION_MARGIN` of the side, and both edges), and as the largest or
    smallest if its box area differs from each of the others' by `SIZE_RATIO`. An empty list: nothing holds.
    """
    count = len(boxes_xyxy_pixels)
    if count == 1:
        return [[f"the {name}"]]
    expressions = []
    for i, box in enumerate(boxes_xyxy_pixels):
        others = boxes_xyxy_pixels[:i] + boxes_xyxy_pixels[i + 1 :]
        options = []
        for axis, side, first, last in ((0, width, "left", "right"), (1, height, "top", "bottom")):
            before = sum(_precedes(other, box, axis, side) for other in others)
            behind = sum(_precedes(box, other, axis, side) for other in others)
            if before + behind != len(others):
                continue
            for rank, end in ((before, first), (behind, last)):
                if rank == 0:
                    options.append(f"the {end}most {name}")
                elif rank <= behind + before - rank and rank < len(ORDINALS):
                    options.append(f"the {ORDINALS[rank]}{name} from the {end}")
        area = box_area(box)
        if all(area >= SIZE_RATIO * box_area(other) for other in others):
            options.append(f"the largest {name}")
        if all(area * SIZE_RATIO <= box_area(other) for other in others):
            options.append(f"the smallest {name}")
        expressions.append(options)
    return expressions


def _precedes(first: list[float], second: list[float], axis: int, side: float) -> bool:
    """Whether the first box lies clearly before the second along an axis (0: x, 1: y) of length `side`."""
    centre_gap = (second[axis] + second[axis + 2] - first[axis] - first[axis + 2]) / 2
    edges_agree = first[axis] < second[axis] and first[axis + 2] < second[axis + 2]
    return centre_gap >= POSITION_MARGIN * side and edges_agree
