"""Detection and instance segmentation: COCO's average precision and recall."""

import contextlib
import io
import json
import os
from collections import Counter, defaultdict

from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from perceptiongpt.metrics import shared


STATISTICS = "ap ap50 ap75 ap_small ap_medium ap_large ar1 ar10 ar100 ar_small ar_medium ar_large".split()


class CocoDetection(shared.StoredMetric):
    description = """AP and AR of COCO, for boxes and for masks, computed by pycocotools. Annotations get new ids first:
pycocotools reads the id 0 as "not matched" and keeps only the last of several annotations with the same id."""
    citation = "Lin et al. Microsoft COCO: Common Objects in Context. ECCV 2014."
    inputs = """
Args:
    predictions: COCO results: a list of {"image_id", "category_id", "bbox": [x, y, width, height], "score",
        "segmentation": RLE}, with bbox, segmentation or both. A result that is malformed, or has an unknown image or
        category, is left out. Also the path of such a file, or a `COCO` of results.
    references: COCO annotations: {"images", "annotations", "categories"}, as in a file; or only the list of annotations
        (then the images and categories are those of annotations and results).
        Also the path of such a file, or a `COCO`.
    Batches, for `add_batch`: two lists of equal length; each pair holds results and annotations as above, of one image
        or more. The same image, or annotation (same id, same content), in several pairs counts once.
    per_sample: also return `samples`, one dict per image in the order of its id: `image_id` and, at IoU 0.5 over all
        sizes, `bbox_matched`, `bbox_results`, `bbox_annotations` (without crowds), and the same for `segm`.

Returns:
    bbox_ap (mean over IoU 0.5:0.05:0.95), bbox_ap50, bbox_ap75, bbox_ap_small, bbox_ap_medium, bbox_ap_large, bbox_ar1,
        bbox_ar10, bbox_ar100, bbox_ar_small, bbox_ar_medium, bbox_ar_large: None where there are no annotations.
    segm_ap, ...: the same for masks, if annotations and results (or no result at all) have masks.
    n: number of images. problems: {reason: number of results}.
"""

    def add_batch(self, *, predictions=None, references=None):
        """Add results and annotations: whole files as `compute` takes them, or two lists of equal length."""
        predictions, references = read_file(predictions), read_file(references)
        if isinstance(predictions, dict):
            predictions = predictions["annotations"]
        whole = isinstance(references, dict) or any(isinstance(part, dict) for part in predictions or ())
        if whole or any(isinstance(part, dict) and "image_id" in part for part in references or ()):
            predictions, references = [predictions], [references]
        super().add_batch(predictions=predictions, references=references)

    def score(self, predictions, references, problems):
        return score_detections(predictions, references, problems)


def read_file(value):
    """What a JSON file holds, for its path; what a `COCO` holds; other values as they are."""
    if isinstance(value, (str, os.PathLike)):
        with open(value, encoding="utf-8") as file:
            return json.load(file)
    return getattr(value, "dataset", value)


def score_detections(predictions: list, references: list, problems: Counter) -> tuple[dict, list[dict]]:
    """The results of `CocoDetection` over pairs (results, annotations), and one dict per image."""
    images, annotations, categories = merge_references(references)
    results = []
    for part in predictions:
        if isinstance(part, list):
            results += part
        else:
            problems["missing" if part is None else "not a list of results"] += 1
    if any(isinstance(part, list) for part in references):
        # A bare list of annotations does not list the images and categories without annotations.
        for result in filter(is_result, results):
            images.setdefault(result["image_id"], {})
            categories.add(result["category_id"])
    # pycocotools breaks ties of scores by image number, so the numbers follow the order of the ids.
    order = {number: index for index, number in enumerate(sorted(images, key=lambda n: (isinstance(n, str), n)), 1)}
    dataset = {
        "images": [{**images[number], "id": index} for number, index in order.items()],
        "categories": [{"id": number} for number in categories],
        "annotations": complete_annotations(annotations, images, order),
    }
    kinds = ["bbox"]
    if annotations and all(annotation.get("segmentation") for annotation in annotations):
        if not results or any(isinstance(result, dict) and result.get("segmentation") for result in results):
            kinds.append("segm")
    usable = {kind: [] for kind in kinds}
    for result in results:
        try:
            for kind in kinds:
                usable[kind].append(parse_result(result, kind, images, categories, order))
        except ValueError as error:
            problems[str(error)] += 1
    scores, samples = {}, [{"image_id": number} for number in order]
    for kind in kinds:
        statistics, matches = evaluate_kind(dataset, usable[kind], kind)
        scores |= {f"{kind}_{name}": value for name, value in statistics.items()}
        for sample in samples:
            counts = matches[order[sample["image_id"]]]
            sample |= {f"{kind}_{name}": counts[name] for name in ("matched", "results", "annotations")}
    return scores, samples


def merge_references(references: list) -> tuple[dict, list, set]:
    """({image id: {} or its height and width}, annotations, category ids); repeated parts count once."""
    images, annotations, categories, seen = {}, [], set(), set()
    for index, part in enumerate(references):
        part = {"annotations": part} if isinstance(part, list) else part
        if not isinstance(part, dict) or not isinstance(part.get("annotations"), list):
            raise ValueError(f"references[{index}]: expected COCO annotations, got {str(part)[:200]}")
        for image in read_records(part, "images", index):
            sides = {side: image.get(side) for side in ("height", "width")}
            images[image["id"]] = {side: int(value) for side, value in sides.items() if shared.is_number(value)}
        categories |= {category["id"] for category in read_records(part, "categories", index)}
        # Within a part, two annotations with one id are two; the same annotation in another part is a repetition.
        texts = [json.dumps(annotation, sort_keys=True) for annotation in part["annotations"]]
        for annotation, text in zip(part["annotations"], texts, strict=True):
            if not is_result(annotation):
                raise ValueError(f"references[{index}]: annotation without image_id or category_id: {text[:200]}")
            if "images" in part and annotation["image_id"] not in images:
                raise ValueError(f"references[{index}]: annotation of an image that is not listed: {text[:200]}")
            try:
                annotation = check_annotation(annotation)
            except ValueError as error:
                raise ValueError(f"references[{index}]: {error}: {text[:200]}") from None
            if "id" not in annotation or text not in seen:
                annotations.append(annotation)
            size = images.setdefault(annotation["image_id"], {})
            if not size and isinstance(annotation.get("segmentation"), dict):
                size["height"], size["width"] = annotation["segmentation"]["size"]
            categories.add(annotation["category_id"])
        seen.update(texts)
    return images, annotations, categories


def read_records(part: dict, key: str, index: int) -> list[dict]:
    """The list `key` of a part; `ValueError` if it is not a list, or an entry has no id."""
    records = part.get(key, [])
    if not isinstance(records, list):
        raise ValueError(f"references[{index}]: {key} is not a list, but {str(records)[:200]}")
    for record in records:
        if not isinstance(record, dict) or type(record.get("id")) not in (int, str):
            raise ValueError(f"references[{index}]: {key} has an entry without an id: {str(record)[:200]}")
    return records


def check_annotation(annotation: dict) -> dict:
    """The annotation with its RLE as pycocotools needs it (a broken one hangs it); `ValueError` with the reason."""
    box, area, mask = (annotation.get(key) for key in ("bbox", "area", "segmentation"))
    if box is not None and not is_box(box):
        raise ValueError("bbox is not x, y, width, height")
    if area is not None and not shared.is_number(area):
        raise ValueError("area is not a number")
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list) or len(polygon) < 4 or not all(map(shared.is_number, polygon)):
                raise ValueError("polygon is not a list of numbers")
    elif mask:
        return annotation | {"segmentation": shared.parse_mask(mask)}
    return annotation


def is_box(value) -> bool:
    """Whether the value is [x, y, width, height]."""
    return isinstance(value, list) and len(value) == 4 and all(map(shared.is_number, value)) and min(value[2:]) >= 0


def is_result(record) -> bool:
    """Whether the record names its image and its category."""
    return isinstance(record, dict) and all(type(record.get(key)) in (int, str) for key in ("image_id", "category_id"))


def complete_annotations(annotations: list[dict], images: dict, order: dict) -> list[dict]:
    """The annotations numbered from 1, with their masks as RLE, and with the box and area that were not given."""
    completed = []
    for number, annotation in enumerate(annotations, 1):
        completed.append({"iscrowd": 0, **annotation, "id": number, "image_id": order[annotation["image_id"]]})
        mask = annotation.get("segmentation")
        if mask:
            size = images[annotation["image_id"]]
            if isinstance(mask, list):
                if len(size) < 2:
                    raise ValueError(f"annotation {number}: polygons need the height and width of the image")
                mask = coco_mask.merge(coco_mask.frPyObjects(mask, size["height"], size["width"]))
            elif mask["size"] != [size.get(side, mask["size"][i]) for i, side in enumerate(("height", "width"))]:
                raise ValueError(f"annotation {number}: mask of another size than the image")
            completed[-1]["segmentation"] = mask
        elif annotation.get("bbox") is None:
            raise ValueError(f"annotation {number}: neither bbox nor segmentation: {str(annotation)[:200]}")
        if annotation.get("bbox") is None:
            completed[-1]["bbox"] = coco_mask.toBbox(mask).tolist()
        if annotation.get("area") is None:
            _, _, width, height = completed[-1]["bbox"]
            completed[-1]["area"] = shared.mask_area(mask) if mask else width * height
    return completed


def parse_result(result, kind: str, images: dict, categories: set, order: dict) -> dict:
    """The result with only its box or only its mask, as pycocotools needs it; `ValueError` with the reason."""
    if not is_result(result):
        raise ValueError("result without image_id or category_id")
    if result["image_id"] not in images or result["category_id"] not in categories:
        raise ValueError("result of an unknown image or category")
    if not shared.is_number(result.get("score")):
        raise ValueError("score is not a number")
    box, mask = result.get("bbox") or None, result.get("segmentation") or None
    if mask is not None and (kind == "segm" or box is None):
        mask = shared.parse_mask(mask)
        if mask["size"] != [
            images[result["image_id"]].get(side, mask["size"][i]) for i, side in enumerate(("height", "width"))
        ]:
            raise ValueError("mask of another size than the image")
        box = box or coco_mask.toBbox(mask).tolist()
    if kind == "segm" and mask is None:
        raise ValueError("result without segmentation")
    if kind == "bbox":
        if not is_box(box):
            raise ValueError("bbox is not x, y, width, height")
    kept = {"bbox": box} if kind == "bbox" else {"segmentation": mask}
    return kept | {
        "image_id": order[result["image_id"]],
        "category_id": result["category_id"],
        "score": result["score"],
    }


def evaluate_kind(dataset: dict, results: list[dict], kind: str) -> tuple[dict, dict]:
    """pycocotools' statistics by name, None for its -1; and {image number: Counter of matches at IoU 0.5}."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = dataset | {"annotations": [dict(annotation) for annotation in dataset["annotations"]]}
        found.dataset = dataset | {"annotations": []}
        truth.createIndex()
        found.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results) if results else found, kind)
        if not dataset["images"]:
            return dict.fromkeys(STATISTICS), {}
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    statistics = [None if value < 0 else float(value) for value in evaluation.stats]
    matches = defaultdict(Counter)
    for entry in filter(None, evaluation.evalImgs):
        if entry["aRng"] == evaluation.params.areaRng[0]:
            counted, kept = entry["gtIgnore"] == 0, ~entry["dtIgnore"][0]
            matches[entry["image_id"]] += Counter(
                matched=int((counted & (entry["gtMatches"][0] > 0)).sum()),
                results=int(kept.sum()),
                annotations=int(counted.sum()),
            )
    return dict(zip(STATISTICS, statistics, strict=True)), matches
