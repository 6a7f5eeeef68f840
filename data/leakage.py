"""Keeping the images of evaluation sets out of training: those of the RefCOCO family's val and test splits.

These are images of COCO, which many other data sets use as well. `refcoco_family_eval_images` lists them, and
`LeftOutImages` recognises them in the rows of any source.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from perceptiongpt.data.conversation import coco_image_id
from perceptiongpt.data.formats.minigpt4_rec import read_minigpt4
from perceptiongpt.data.formats.refer import SPLIT_BY, find_split, is_integer, locate, packed_data_set, read_refs
from perceptiongpt.data.formats.shikra_rec import read_shikra, split_in_name
from perceptiongpt.data.reading import Problems, open_file, read_records, stream_json_array


# Sources whose `image_id`, if it is a number, is COCO's.
COCO_SOURCES = {"lvis", "refer", "minigpt4_rec", "grefcoco", "vqav2", "okvqa", "hub"}
# Sources whose `image_id` is COCO's number only if the image file, where one is named, has a COCO name.
MOSTLY_COCO_SOURCES = {"coco", "coco_captions", "coco_panoptic", "shikra_rec", "refcocos", "pope", "llava", "viscot"}
# Visual Genome's images, with its numbers, in LLaVA's and Visual-CoT's data (GQA and Visual7W use its images).
VISUAL_GENOME_NAME = re.compile(r"(?:^|/)(?:VG_100K(?:_2)?/|gqa/(?:images/)?|v7w_)(\d+)$")


def refcoco_family_eval_images(*paths: str | Path) -> set[str]:
    """The ids (COCO's numbers, as in the column `image_id`) of the images in any val or test split.

    RefCOCO, RefCOCO+ and RefCOCOg share COCO's train2014 images, so give the files of all three.

    Args:
        paths: each of them is a folder that holds the folders `refcoco`, `refcoco+`, `refcocog` and `grefcoco`; or one
            of these folders, also packed (`refcoco.zip`); or a folder of lists as `shikra_rec` and `minigpt4_rec`
            read them; or a single file of any of these. Of several refs files in a folder, the one by `SPLIT_BY`
            counts. (RefCOCOg by google shares images between train and val.)

    Raises:
        ValueError: if one of `paths` has no image of a val or test split, or cannot be read.
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
            raise ValueError(f"{path}: there are no images of a val or test split")
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


class LeftOutImages:
    """Tells whether a row is about one of the images to leave out.

    Other collections number their images in the same range, so a number counts only where the source or the name of
    the image file says that it is COCO's.

    Args:
        coco_ids: COCO's numbers of the images to leave out.
        image_data: Visual Genome's `image_data.json`, which gives COCO's numbers of its images.
    """

    def __init__(self, coco_ids: set[str], image_data: str | Path | None):
        self.coco_ids, self.of_visual_genome = coco_ids, None
        if image_data is not None:
            with open_file(image_data) as stream:
                found = [record for record in stream_json_array(stream) if str(record.get("coco_id")) in coco_ids]
            self.of_visual_genome = {str(record.get("image_id", record.get("id"))) for record in found}

    def __call__(self, source: str, image_id: str, paths: tuple[str | None, ...] = ()) -> bool:
        found = VISUAL_GENOME_NAME.search(image_id)
        if source == "visual_genome" or found:
            if self.of_visual_genome is None:
                raise ValueError(
                    f"leave_out: only Visual Genome's image_data.json tells whether its image {image_id!r} (source "
                    f"{source}) is one to leave out; name that file as image_data"
                )
            return (found[1] if found else image_id) in self.of_visual_genome
        names = [path for path in paths if path]
        numbers = {coco_image_id(name) for name in names}
        if source in COCO_SOURCES or (source in MOSTLY_COCO_SOURCES and not names):
            numbers.add(image_id)
        return not numbers.isdisjoint(self.coco_ids)
