"""gRefCOCO: expressions with several targets or none, in the form of REFER (`data/formats/refer.py`)."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from perceptiongpt.data.conversation import Draw, chosen_tasks
from perceptiongpt.data.formats.refer import expression_row, is_integer, read_sentences, read_target, ref_rows
from perceptiongpt.data.reading import Problems


GREFCOCO_TASKS = ("refer", "no_target")


def grefcoco_rows(
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
    split_by: str | None = None,
) -> Iterator[dict]:
    """Yield the rows of gRefCOCO: `refer` with one `<vis>` per target, and `no_target`.

    A crowd annotation among the targets is left out; an expression with no others makes no row. Both are counted.

    Args:
        root: folder with `grefs(<split_by>).json` and `instances.json`, itself or in `grefcoco/`.
        split, annotations, images, limit, problems: as in `refer_rows`.
        tasks: any of `GREFCOCO_TASKS`, by default both.
    """
    problems = problems or Problems()
    tasks = chosen_tasks(tasks, GREFCOCO_TASKS, "grefcoco")
    draw = Draw("grefcoco", seed, evaluation)

    def rows_of(where: str, ref: dict, found: dict, columns: dict) -> Iterator[dict]:
        ids = target_ids(ref)
        if missing := [ann_id for ann_id in ids if ann_id not in found]:
            raise ValueError(f"annotations {missing} are not in the instances file")
        kept = [ann_id for ann_id in ids if not found[ann_id].get("iscrowd")]
        if ids and not kept:
            problems.leave_out("expression about crowds only", len(ref["sentences"]))
            return
        problems.leave_out("crowd among the targets", len(ids) - len(kept))
        targets = [read_target(found[ann_id], ref["image_id"], columns) for ann_id in kept]
        if ("refer" if targets else "no_target") in tasks:
            for key, phrase in read_sentences(where, ref, problems):
                key = (columns["image_id"], ref.get("ref_id"), *key)
                yield expression_row(phrase, targets, columns, draw("refer", *key))

    files = (root, annotations, "grefcoco", split_by)
    yield from islice(ref_rows("grefcoco", rows_of, target_ids, files, split, images, problems), limit)


def target_ids(ref: dict) -> list[int]:
    """The annotation ids of a ref, each once; none where the expression has no target.

    Raises:
        ValueError: if they are not integers, or `no_target` says otherwise.
    """
    ids = ref["ann_id"] if isinstance(ref["ann_id"], list) else [ref["ann_id"]]
    if not ids or not all(map(is_integer, ids)):
        raise ValueError(f"ann_id {ref['ann_id']!r} is not a list of integers")
    ids = [ann_id for ann_id in dict.fromkeys(ids) if ann_id != -1]
    no_target = ref.get("no_target", not ids)
    if no_target not in (True, False) or bool(no_target) == bool(ids):
        raise ValueError(f"no_target is {no_target!r}, but ann_id is {ref['ann_id']!r}")
    return ids
