"""Which pictures are in the val and test splits of the RefCOCO family, so that training leaves them out."""

import re
from collections.abc import Iterator
from pathlib import Path

from perceptiongpt.data.formats.minigpt4_rec import read_minigpt4
from perceptiongpt.data.formats.refer import SPLIT_BY, find_split, is_integer, locate, packed_data_set, read_refs
from perceptiongpt.data.formats.shikra_rec import read_shikra, split_in_name
from perceptiongpt.data.reading import Problems, open_file, read_records


def refcoco_family_eval_images(*paths: str | Path) -> set[str]:
    """The ids (as in the column `image_id`, COCO's numbers) of the pictures in any val or test split.

    RefCOCO, RefCOCO+ and RefCOCOg share COCO's train2014 pictures, so give the files of all three.

    Args:
        paths: each a folder with `refcoco`, `refcoco+`, `refcocog` and `grefcoco` folders, one such folder (of several
            refs files in it the one by `SPLIT_BY` counts: RefCOCOg by google shares pictures between train and val),
            the same packed (`refcoco.zip`), a folder of lists as `shikra_rec` and `minigpt4_rec` read them, or a
            single file of any of these.

    Raises:
        ValueError: if one of `paths` holds no picture of a val or test split, or cannot be read.
    """
    ids = set()
    for path in map(Path, paths):
        found = set()
        if path.is_dir():
            for folder in (path, *sorted(path.glob("*/"))):
                found = found.union(*(_of_refs(*file) for file in _refs_in(folder)))
                for file in (*folder.glob("*ref*.jsonl*"), *folder.glob("refcoco[_+g]*.json*")):
                    found |= _of_file(file)
        else:
            found = _of_file(path)
        if not found:
            raise ValueError(f"{path}: there are no pictures of a val or test split")
        ids |= found
    return ids


def _refs_in(folder: Path) -> Iterator[tuple[Path, str]]:
    if any(folder.glob("grefs*")):
        yield from locate(folder, None, "grefcoco", None)[0]
    if any(folder.glob("refs*")):
        yield from locate(folder, None, folder.name if folder.name in SPLIT_BY else None, None)[0]
    for dataset, split_by in SPLIT_BY.items():
        if packed := packed_data_set(folder, dataset):
            yield from locate(folder, packed, dataset, split_by)[0]


def _of_file(path: Path) -> set[str]:
    if not _is_refs(path):
        return _of_list(path)
    split_by = SPLIT_BY.get(path.name.split(".")[0])  # of a packed data set
    return set().union(*(_of_refs(*file) for file in locate(path.parent, [path], None, split_by)[0]))


def _is_refs(path: Path) -> bool:
    """Refs, or a list of expressions with their boxes?"""
    if not re.search(r"\.jsonl?(\.\w+)*$", path.name.lower()):
        return True
    with open_file(path) as stream:
        start = stream.peek(4000)[:4000]
    return b'"img_path"' not in start and b'"img_id"' not in start


def _of_refs(path: Path, member: str) -> set[str]:
    ids = set()
    for where, ref in read_refs(path, member, Problems()):
        if find_split(ref.get("split")) != "train":
            if not is_integer(ref.get("image_id")):
                raise ValueError(f"{where}: image_id {ref.get('image_id')!r} is not an integer")
            ids.add(str(ref["image_id"]))
    return ids


def _of_list(path: Path) -> set[str]:
    ids = set()
    for where, record in read_records(path):
        try:
            fields = (read_shikra if "img_path" in record else read_minigpt4)(record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if find_split(fields["split"] or split_in_name(path)) != "train":
            ids.add(fields["image_id"])
    return ids
