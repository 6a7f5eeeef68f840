"""refcocos: multi-hop expressions on COCO val2017 images, some without a target. Boxes only."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from perceptiongpt.data.conversation import Draw, chosen_tasks, coco_image_id, get
from perceptiongpt.data.formats.shikra_rec import find_lists, list_rows, read_numbers
from perceptiongpt.data.reading import Problems


REFCOCOS_TASKS = ("refer", "no_target")


def refcocos_rows(
    root: str | Path,
    *,
    split: str | None = "test",
    annotations: Iterable[str | Path] | None = None,
    images: str | Path | bool | None = None,
    tasks: Iterable[str] | None = None,
    seed: int = 0,
    evaluation: bool = False,
    limit: int | None = None,
    problems: Problems | None = None,
) -> Iterator[dict]:
    """Yield a `refer` row per expression of refcocos, and a `no_target` row per `solution` that is null.

    Args:
        root: folder with `refcocos*.json`.
        split: what the column `split` says; the records say none.
        annotations, images, limit, problems: as in `shikra_rec_rows`.
        tasks: any of `REFCOCOS_TASKS`, by default both.
    """
    tasks = chosen_tasks(tasks, REFCOCOS_TASKS, "refcocos")

    def read(record: dict) -> dict:
        return {**read_refcocos(record), "split": split}

    files = find_lists(root, annotations, "refcocos*.json*", None, None, None)
    options = (root, images, split, None, Draw("refcocos", seed, evaluation), problems or Problems())
    rows = (row for row in list_rows("refcocos", files, read, *options) if row["task"] in tasks)
    yield from islice(rows, limit)


def read_refcocos(record: dict) -> dict:
    """The fields of one record.

    Raises:
        ValueError: for a missing or wrong one, or if `solution` and `categories.empty_case` contradict each other.
    """
    name = get(record, "image", "file_name")
    solution = get(record, "solution", of=(list, type(None)))
    categories = record.get("categories")
    empty = categories.get("empty_case") if isinstance(categories, dict) else None
    if isinstance(empty, bool) and empty != (solution is None):
        raise ValueError(f"solution is {solution!r}, but empty_case is {empty!r}")
    coco_id = coco_image_id(name)
    return {
        "name": name,
        "image_id": coco_id or Path(name).stem,
        "is_coco": coco_id is not None,
        "text": get(record, "normal_caption", "caption"),
        "box": None if solution is None else read_numbers(solution, "[x0, y0, x1, y1]"),
        "split": None,
        "dataset": None,
    }
