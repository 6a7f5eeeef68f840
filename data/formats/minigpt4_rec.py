"""MiniGPT-4's (v2) lists of expressions: json with an expression and its [x, y, width, height] each. No masks."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from perceptiongpt.data.conversation import Draw, chosen_tasks, get
from perceptiongpt.data.formats.shikra_rec import find_lists, list_rows, read_numbers
from perceptiongpt.data.reading import Problems


IMAGE_NAME = re.compile(r"(COCO_\w+?_(\d{12}))(_\d+)?(\.\w+)?")  # the second number is the object's


def minigpt4_rec_rows(
    root: str | Path,
    *,
    split: str | None = "train",
    annotations: Iterable[str | Path] | None = None,
    images: str | Path | bool | None = None,
    tasks: Iterable[str] | None = None,
    seed: int = 0,
    evaluation: bool = False,
    limit: int | None = None,
    problems: Problems | None = None,
    dataset: str | None = None,
) -> Iterator[dict]:
    """Yield a `refer` row per record of MiniGPT-4's REC files.

    Args:
        root: folder with `<dataset>_<split>.json`.
        split, annotations, images, tasks, limit, problems, dataset: as in `shikra_rec_rows`; only the file's name
            tells its split.
    """
    chosen_tasks(tasks, ("refer",), "minigpt4_rec")
    files = find_lists(root, annotations, "refcoco[_+g]*.json*", dataset, None, split)
    options = (root, images, split, dataset, Draw("minigpt4_rec", seed, evaluation), problems or Problems())
    yield from islice(list_rows("minigpt4_rec", files, read_minigpt4, *options), limit)


def read_minigpt4(record: dict) -> dict:
    """The fields of one record."""
    match = IMAGE_NAME.fullmatch(get(record, "img_id"))
    if not match:
        raise ValueError(f"img_id {record['img_id']!r} is not like COCO_train2014_000000580957_4")
    x, y, width, height = read_numbers(get(record, "bbox", of=list), "[x, y, width, height]")
    return {
        "name": f"{match[1]}.jpg",
        "image_id": str(int(match[2])),
        "is_coco": True,
        "text": get(record, "sents"),
        "box": [x, y, x + width, y + height],
        "split": None,
        "dataset": None,
    }
