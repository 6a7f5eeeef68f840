"""LVIS (v0.5 and v1) as rows of the schema.

Like COCO instances, but an image is annotated for some categories only: those in `neg_category_ids` are absent, those
in `not_exhaustive_category_ids` have more instances than are annotated, and of the others nothing is known. v1 has no
`file_name`; the end of `coco_url` replaces it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from perceptiongpt.data.conversation import Draw, ImageFinder, chosen_tasks, get, usual_files
from perceptiongpt.data.formats.coco import instance_rows, read_annotation, read_instances, skipping
from perceptiongpt.data.formats.coco_panoptic import region_row
from perceptiongpt.data.reading import Problems


LVIS_TASKS = ("refer", "detect", "no_target", "box_to_mask", "region_caption")


def lvis_rows(
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
    """Yield the rows of LVIS, image by image.

    `refer` and `detect` only for categories that are annotated exhaustively, `no_target` only for those that are known
    to be absent; `box_to_mask` and `region_caption` (by mask, box or both) for every instance.

    Args:
        root: folder with `lvis_v1_<split>.json` (also packed, or in `annotations`) and COCO's `train2017`, `val2017`:
            the images of LVIS val are in both.
        split: picks the file, and is what the column `split` says.
        annotations, images: the files and the folder, if they are elsewhere; `images=False`: rows without images.
        tasks: any of `LVIS_TASKS`; default: all.
        seed, evaluation: seed of the drawn prompts and choices; True: the fixed evaluation prompts.
        limit: read only the first `limit` images.
        problems: collects bad records; None: the first one raises.
    """
    tasks = chosen_tasks(tasks, LVIS_TASKS, "lvis")
    root = Path(root)
    files = annotations or usual_files(root, [f"lvis_{version}_{split}.json" for version in ("v1", "v0.5")])[:1]
    if not files:
        raise ValueError(f"{root}: there is no lvis_v1_{split}.json; name the file as annotations")
    finder = ImageFinder(images, root, root / "images")
    draw = Draw("lvis", seed, evaluation)
    for file in files:
        records, instances, categories = read_instances(file, problems)
        categories = {number: " ".join(name.replace("_", " ").split()) for number, name in categories.items()}
        for record in records[:limit]:
            made = []
            with skipping(problems, file):
                annotations = instances[record["id"]]
                made = list(_image_rows(file, record, annotations, categories, finder, tasks, draw, problems))
            for row in made:
                yield row | {"split": split}


def _image_rows(file, record, annotations, categories, finder, tasks, draw, problems) -> Iterator[dict]:
    name = f"{file}: image {record['id']!r}"
    try:
        absent = _category_ids(record, "neg_category_ids") if "no_target" in tasks else []
        more = _category_ids(record, "not_exhaustive_category_ids")
        size = get(record, "width", of=int), get(record, "height", of=int)
        columns = finder.columns(record["file_name"], size=size, coco_id=record["id"])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    columns |= {"source": "lvis", "image_id": str(record["id"])}
    if unknown := [number for number in absent if number not in categories]:
        raise ValueError(f"{name}: neg_category_ids {unknown} are not listed")
    groups = defaultdict(list)
    for annotation in annotations:
        instance = None
        with skipping(problems, file):
            instance = read_annotation(annotation, record, file)
            if instance is None and problems is not None:
                problems.leave_out("crowd region or instance without area")
        groups[annotation["category_id"]].append(instance)
    complete = {category: group for category, group in groups.items() if category not in more}
    usable = {category: [one for one in group if one is not None] for category, group in groups.items()}
    for part, among, wanted in (
        (complete, {category: categories[category] for category in complete}, ("refer", "detect")),
        (groups, {category: categories[category] for category in groups}, ("box_to_mask",)),
        ({}, {category: categories[category] for category in absent if category not in groups}, ("no_target",)),
    ):
        wanted = tuple(task for task in wanted if task in tasks)
        for row in instance_rows(part, among, record, wanted, 0.0, draw.seed, draw.evaluation, problems):
            yield columns | row
    if "region_caption" in tasks:
        for category, group in usable.items():
            for number, instance in enumerate(group):
                yield region_row(instance, categories[category], (category, number), columns, draw)


def _category_ids(record, key: str) -> list[int]:
    numbers = get(record, key, of=list)
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"{key} is {str(numbers)[:60]}, expected numbers of categories")
    return numbers
