"""COCO captions (and Karpathy's splits of them, or of Flickr30k) as rows of the schema; one row per caption."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    chosen_tasks,
    clean_text,
    coco_image_id,
    each_record,
    get,
    make_row,
    stated_size,
    usual_files,
)
from perceptiongpt.data.reading import Problems, read_json
from perceptiongpt.data.templates import render_turn


KARPATHY = "karpathy_"
YEARS = ("2017", "2014", "2015", "")


def coco_captions_rows(
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
    """Yield one row of task `caption` per caption, image by image.

    Args:
        root: folder with `annotations/captions_<split>2017.json` (or 2014) and the images in `<split>2017`.
        split: `train`, `val`, or Karpathy's `karpathy_train` (with his `restval`), `karpathy_val`, `karpathy_test`:
            these are read from `dataset_coco.json` (or `dataset_flickr30k.json`) in `root` or `root/annotations`.
        annotations: the files, if they are elsewhere. Beside Karpathy's, a COCO captions file may stand, which then
            only gives the images' sizes.
        images: the folder of images, or of `train2014`, `val2014`, ..; False: rows without images.
        tasks: `caption`.
        seed, evaluation: seed of the drawn prompts; True: the fixed evaluation prompt.
        limit: read only the first `limit` images.
        problems: collects bad records; None: the first one raises.
    """
    problems = problems or Problems()
    chosen_tasks(tasks, ["caption"], "coco_captions")
    root = Path(root)
    if annotations is None:
        names = [f"captions_{split}{year}.json" for year in YEARS]
        if split.startswith(KARPATHY):
            names = ["dataset_coco.json", "dataset_flickr30k.json"]
        annotations = usual_files(root, names)[:1]
        if not annotations:
            raise ValueError(f"{root}: there is none of {', '.join(names)}, there or in annotations")
    contents = [(path, read_json(path)) for path in annotations]
    for path, content in contents:
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise ValueError(f"{path}: there is no list under 'images'; expected a captions file of COCO or Karpathy")
    coco = [(path, content) for path, content in contents if isinstance(content.get("annotations"), list)]
    karpathy = [(path, content) for path, content in contents if "annotations" not in content]
    if split.startswith(KARPATHY):
        if not karpathy:
            raise ValueError(f"split {split!r} needs Karpathy's dataset_coco.json; got {contents[0][0]}")
        sizes = {}
        for _, content in coco:
            sizes |= {record.get("id"): stated_size(record) for record in content["images"]}
        records = [one for path, content in karpathy for one in _of_karpathy(path, content, split, sizes, problems)]
    else:
        if not coco:
            raise ValueError(f"{annotations[0]}: there is no list under 'annotations'; expected COCO captions")
        records = [one for path, content in coco for one in _of_coco(path, content, problems)]
    folders = [root / f"{split}{year}" for year in YEARS] + [root / name for name in ("flickr30k-images", "images", "")]
    finder = ImageFinder(images, *folders)
    draw = Draw("coco_captions", seed, evaluation)

    def make(record) -> Iterator[dict]:
        columns = finder.columns(*record["names"], size=record["size"], coco_id=record["coco_id"])
        columns |= {"source": "coco_captions", "image_id": record["image_id"], "split": split}
        texts = ((record["where"], (number, text)) for number, text in enumerate(record["captions"]))
        return list(each_record(texts, lambda numbered: [caption_row(columns, *numbered)], problems))

    def caption_row(columns: dict, number: int, text) -> dict:
        text = clean_text(text, f"caption {number}")
        texts = render_turn("caption", "", text, draw(columns["image_id"], number))
        return make_row("caption", [Turn(*texts)], columns)

    yield from each_record(((record["where"], record) for record in islice(records, limit)), make, problems)


def _of_coco(path: Path, content: dict, problems: Problems) -> list[dict]:
    """Captions joined to their images, in the order of the images; those without captions are left out."""
    records = {}
    for number, image in enumerate(content["images"]):
        try:
            name, image_id = get(image, "file_name"), get(image, "id", of=int)
            where, size = f"{path}: image {image_id}", stated_size(image)
        except ValueError as error:
            problems.report(f"{path}: image record {number}", str(error))
            continue
        record = {"where": where, "names": [name], "size": size, "coco_id": None, "image_id": str(image_id)}
        record["coco_id"] = image_id if coco_image_id(name) else None
        records[image_id] = {**record, "captions": []}
    for number, annotation in enumerate(content["annotations"]):
        try:
            image_id = get(annotation, "image_id", of=int)
            if image_id not in records:
                raise ValueError(f"belongs to image {image_id}, which is not listed")
            records[image_id]["captions"].append(get(annotation, "caption"))
        except ValueError as error:
            problems.report(f"{path}: annotation record {number}", str(error))
    return [record for record in records.values() if record["captions"]]


def _of_karpathy(path: Path, content: dict, split: str, sizes: dict, problems: Problems) -> list[dict]:
    wanted = {"train": ("train", "restval")}.get(split.removeprefix(KARPATHY), (split.removeprefix(KARPATHY),))
    records = []
    for number, image in enumerate(content["images"]):
        where = f"{path}: image record {number}"
        try:
            if get(image, "split") not in wanted:
                continue
            name = get(image, "filename")
            coco_id = get(image, "cocoid", of=int) if "cocoid" in image else None
            names = [f"{image['filepath']}/{name}", name] if image.get("filepath") else [name]
            image_id = coco_image_id(name) or Path(name).stem if coco_id is None else str(coco_id)
            captions = [get(sentence, "raw") for sentence in get(image, "sentences", of=list)]
        except ValueError as error:
            problems.report(where, str(error))
            continue
        size = sizes.get(coco_id)
        record = {"where": where, "names": names, "size": size, "coco_id": coco_id, "image_id": image_id}
        records.append({**record, "captions": captions})
    if not records:
        splits = sorted({str(image.get("split")) for image in content["images"] if isinstance(image, dict)})
        raise ValueError(f"{path}: no images of the split {split!r}; there are {', '.join(splits)}")
    return records
