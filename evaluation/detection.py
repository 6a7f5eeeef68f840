"""Samples as COCO's annotations and results, for average precision."""

from pycocotools import mask as coco_mask
from pycocotools.cocoeval import Params

from perceptiongpt.evaluation.predictions import Prediction, empty_mask, references


ABSENT_START, ABSENT_END = "There is no ", "."  # around the name, in the reference answer without a target


def detection_input(sample: dict, prediction: Prediction) -> dict:
    """A sample's part of `detection_tables`: its image, the category that it asks for, annotations and results."""
    true, found = [], []
    for reference in references(sample):
        box, mask = reference["box"], reference["mask"]
        one = {"bbox": _xywh(box), "area": (box[2] - box[0]) * (box[3] - box[1])}
        true.append(one if mask is None else one | {"area": float(coco_mask.area(mask)), "segmentation": mask})
    for one in prediction.objects:
        result = {"bbox": _xywh(one["box"] or [0.0] * 4), "score": one["score"]}
        found.append(result | {"segmentation": one["mask"] or empty_mask(sample)})
    size = {name: sample[name] for name in ("image_id", "width", "height")}
    return size | {"category": asked_category(sample), "true": true, "found": found}


def _xywh(box: list[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def asked_category(sample: dict) -> str:
    """What a sample asks to find, as a category: "cup" of "Find every cup." and of "There is no cup."."""
    if sample["task"] == "no_target":
        return sample["answers"][0]["content"].removeprefix(ABSENT_START).removesuffix(ABSENT_END)
    return sample["phrase"]


def detection_tables(inputs: list[dict], copies: list[int] | None = None) -> dict:
    """The columns of the metric: COCO's annotations and results, with images and categories numbered as they appear.

    Args:
        inputs: of `detection_input`.
        copies: tells copies of an image apart, in a resample that has it several times.
    """
    images, categories = {}, {}
    annotations, results = [], []
    has_masks = all("segmentation" in one for given in inputs for one in given["true"])
    for given, copy in zip(inputs, copies or [0] * len(inputs), strict=True):
        image = images.setdefault((given["image_id"], copy), {"id": len(images) + 1})
        image |= {"width": given["width"], "height": given["height"], "file_name": given["image_id"]}
        category = categories.setdefault(given["category"], len(categories) + 1)
        common = {"image_id": image["id"], "category_id": category}
        for one in given["true"]:
            annotations.append(common | {"id": len(annotations) + 1, "iscrowd": 0} | one)
        results += [common | one for one in given["found"]]
    if not has_masks:
        results = [{key: value for key, value in one.items() if key != "segmentation"} for one in results]
        annotations = [{key: value for key, value in one.items() if key != "segmentation"} for one in annotations]
    table = {"info": {}, "images": list(images.values()), "annotations": annotations}
    table["categories"] = [{"id": number, "name": name} for name, number in categories.items()]
    return {"predictions": [results], "references": [table]}


def images_with_objects(inputs: list[dict], key: str) -> int:
    """The number of images that one of COCO's numbers is about: those with an object of its size."""
    params = Params(iouType="bbox")
    low, high = dict(zip(params.areaRngLbl, params.areaRng, strict=True)).get(key.split("_")[-1], params.areaRng[0])
    return len({given["image_id"] for given in inputs if any(low <= one["area"] <= high for one in given["true"])})
