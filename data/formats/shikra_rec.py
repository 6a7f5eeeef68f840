"""Shikra's lists of expressions: json lines with an expression and its box each. Boxes only, no masks."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    check_box,
    chosen_tasks,
    coco_image_id,
    get,
    known_size,
    stated_size,
)
from perceptiongpt.data.formats.refer import IMAGE_FOLDERS, expression_row, find_split, read_phrase
from perceptiongpt.data.reading import Problems, read_records, without_copies


FILE_DATASET = re.compile(r"refcoco(\+|plus|g)?(?![a-z])", re.IGNORECASE)
FILE_SPLIT_BY = re.compile(r"(?<![a-z])(unc|google|umd)(?![a-z])", re.IGNORECASE)
FILE_SPLIT = re.compile(r"(?<![a-z])(train|validation|val|test[ab]?)(?![a-z])", re.IGNORECASE)


def shikra_rec_rows(
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
    split_by: str | None = None,
) -> Iterator[dict]:
    """Yield a `refer` row per line of Shikra's REC files.

    Args:
        root: folder with `REC_<dataset>_<split_by>_<split>.jsonl`.
        split: train, val, test, testA or testB. A line says its split itself, else the file's name does, else it is
            the one asked for. None: all.
        annotations: the files, where they are elsewhere.
        images: folder of the COCO images (see `refer_rows`); False: no images.
        tasks: `refer`.
        limit: at most this many rows.
        problems: collects bad records; None: the first one raises.
        dataset: only refcoco, refcoco+ or refcocog.
        split_by: only the files of unc, google or umd.
    """
    chosen_tasks(tasks, ("refer",), "shikra_rec")
    files = find_lists(root, annotations, "*.jsonl*", dataset, split_by, split)
    options = (root, images, split, dataset, Draw("shikra_rec", seed, evaluation), problems or Problems())
    yield from islice(list_rows("shikra_rec", files, read_shikra, *options), limit)


def read_shikra(record: dict) -> dict:
    """The fields of one line."""
    name = get(record, "img_path", "image")
    split = get(record, "split", of=(str, type(None))) if "split" in record else None
    image_id = get(record, "image_id", of=(int, str)) if "image_id" in record else coco_image_id(name)
    return {
        "name": name,
        "image_id": str(image_id or Path(name).stem),
        "is_coco": coco_image_id(name) is not None,
        "text": get(record, "expression"),
        "box": read_numbers(get(record, "bbox", of=list), "[x0, y0, x1, y1]"),
        "split": split,
        "dataset": record.get("dataset_name"),
    }


# ---- what lists of (image, text, box) share ------------------------------------------------------------------------


def list_rows(
    source: str,
    files: list[Path],
    read: Callable[[dict], dict],
    root: str | Path,
    images: str | Path | bool | None,
    split: str | None,
    dataset: str | None,
    draw: Draw,
    problems: Problems,
) -> Iterator[dict]:
    """A row per record of the files that belongs to `split` and `dataset`; `read` gives a record's fields."""
    finder = ImageFinder(images, *(Path(root) / folder for folder in IMAGE_FOLDERS))
    split, seen, used = find_split(split), Counter(), False
    for file in files:
        file_split = split_in_name(file) or split
        for where, record in read_records(file, problems=problems):
            try:
                fields = read(record)
                own_split = find_split(fields["split"] or file_split)
                seen[own_split] += 1
                if split not in (None, own_split) or not is_dataset(fields["dataset"], dataset):
                    continue
                used = True
                coco_id = int(fields["image_id"]) if fields["is_coco"] and fields["image_id"].isdecimal() else None
                size = stated_size(record)
                columns = finder.columns(fields["name"], size=size, coco_id=coco_id)
                columns |= {"source": source, "image_id": fields["image_id"], "split": own_split or "train"}
                targets = []
                if fields["box"] is not None:
                    targets = [(check_box(fields["box"], known_size(columns)), None)]
                phrase = read_phrase(fields["text"])
                row = expression_row(phrase, targets, columns, draw("refer", fields["image_id"], phrase, fields["box"]))
            except ValueError as error:
                used = True
                problems.report(where, error)
                continue
            yield row
    if not used:
        names = ", ".join(map(str, files))
        raise ValueError(f"{names}: nothing of split {split!r} and data set {dataset!r}; found {dict(seen)}")


def find_lists(
    root: str | Path, annotations, pattern: str, dataset: str | None, split_by: str | None, split: str | None
) -> list[Path]:
    """The files of a folder, or one level below, whose names do not exclude the data set and split asked for."""
    if annotations:
        return [Path(path) for path in annotations]
    split = find_split(split)
    found = []
    for path in sorted([*Path(root).glob(pattern), *Path(root).glob(f"*/{pattern}")]):
        partition = FILE_SPLIT_BY.search(path.name)
        if split_by not in (None, partition and partition[1].lower()) or not path.is_file():
            continue
        if split in (None, split_in_name(path) or split) and is_dataset(path.name, dataset):
            found.append(path)
    found = without_copies(found)
    if not found:
        raise ValueError(f"{root}: there is no file {pattern} of {dataset or 'any data set'}, split {split!r}")
    return found


def split_in_name(path: Path) -> str | None:
    """The split in a file's name ("testA" for "REC_refcoco_unc_testA.jsonl.gz"), if there is one."""
    match = FILE_SPLIT.search(path.name)
    return match and find_split(match[1].lower())


def is_dataset(name: str | None, dataset: str | None) -> bool:
    """Whether a data set's or file's name ("jxu124/refcocoplus") may be about `dataset` ("refcoco+")."""
    match = FILE_DATASET.search(name) if isinstance(name, str) else None
    return dataset is None or match is None or match[0].lower().replace("plus", "+") == dataset


def read_numbers(values: list, form: str) -> list[float]:
    """Four checked numbers; `form` describes them in the error message."""
    if len(values) != 4 or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        raise ValueError(f"box {str(values)[:60]} is not {form}")
    try:
        return [float(value) for value in values]
    except OverflowError as error:
        raise ValueError(f"box {str(values)[:60]} has a number that is too large") from error
