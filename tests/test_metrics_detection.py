"""COCO's AP and AR, and grounded captions."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from metric_inputs import approx, compute, kept, rectangle
from perceptiongpt import metrics


PYTHON = {"tokenizer": "python", "meteor": False}
NAMES = "ap ap50 ap75 ap_small ap_medium ap_large ar1 ar10 ar100 ar_small ar_medium ar_large".split()


@pytest.fixture(scope="module")
def coco(data_dir) -> dict:
    """The first photos of tiny_coco, with the categories that are in them."""
    with open(data_dir / "tiny_coco" / "annotations" / "instances_train2017.json") as file:
        whole = json.load(file)
    images = whole["images"][:20]
    annotations = [one for one in whole["annotations"] if one["image_id"] in {image["id"] for image in images}]
    used = {one["category_id"] for one in annotations}
    categories = [category for category in whole["categories"] if category["id"] in used]
    return whole | {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def results(coco) -> list[dict]:
    """Each annotation moved a little, some twice, some under another category, with scores that repeat."""
    generator = np.random.default_rng(0)
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    categories = [category["id"] for category in coco["categories"]]
    made = []
    for annotation in coco["annotations"]:
        for _ in range(generator.integers(0, 3)):
            x, y, width, height = annotation["bbox"]
            box = [x + generator.normal() * width / 10, y + generator.normal() * height / 10, width, height]
            mask = np.zeros(sizes[annotation["image_id"]], dtype=np.uint8, order="F")
            x0, y0 = (max(int(side), 0) for side in box[:2])
            mask[y0 : y0 + int(height) + 1, x0 : x0 + int(width) + 1] = 1
            encoded = coco_mask.encode(mask)
            made.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"] if generator.random() < 0.9 else categories[0],
                    "bbox": box,
                    "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode()},
                    "score": round(float(generator.random()), 1),
                }
            )
    return made


def pycocotools_statistics(coco: dict, results: list[dict], kind: str) -> dict:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(coco)
        truth.createIndex()
        judged = "bbox" if kind == "segm" else "segmentation"  # with a bbox, loadRes takes its area for the mask's
        found = [{key: value for key, value in result.items() if key != judged} for result in results]
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, evaluation.stats.tolist(), strict=True))


def test_real_photos_equal_pycocotools(coco, results, tmp_path):
    ours = compute("coco_detection", tmp_path, results, coco)
    for kind in ("bbox", "segm"):
        for name, value in pycocotools_statistics(coco, results, kind).items():
            assert ours[f"{kind}_{name}"] == (None if value < 0 else pytest.approx(value, abs=1e-12)), (kind, name)
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "instances.json").write_text(json.dumps(coco))
    assert compute("coco_detection", tmp_path, tmp_path / "results.json", str(tmp_path / "instances.json")) == ours
    assert 0.05 < ours["segm_ap"] < ours["bbox_ap"] < 0.9
    assert (ours["n"], ours["problems"]) == (20, {})


def test_images_in_batches_equal_the_whole(coco, results, tmp_path):
    images = [image["id"] for image in coco["images"]][:6][::-1]
    found = [[result for result in results if result["image_id"] == number] for number in images]
    truth = [
        {
            "images": [image for image in coco["images"] if image["id"] == number],
            "annotations": [annotation for annotation in coco["annotations"] if annotation["image_id"] == number],
            "categories": coco["categories"],
        }
        for number in images
    ]
    file = coco | {key: [item for part in truth for item in part[key]] for key in ("images", "annotations")}
    whole = compute("coco_detection", tmp_path, [result for part in found for result in part], file)
    assert whole["n"] == 6 and whole["segm_ap"] > 0
    for batch_size in (1, 8):
        assert compute("coco_detection", tmp_path, found, truth, batch_size) == whole
    # All annotations with each half of the results, as processes that read the same file have them.
    metric = metrics.load("coco_detection", cache_dir=str(tmp_path))
    for half in (found[:3], found[3:]):
        metric.add_batch(predictions=[result for part in half for result in part], references=file)
    assert metric.compute() == whole
    # The lists alone: the same, but for pictures with neither annotations nor results.
    alone = compute("coco_detection", tmp_path, [result for part in found for result in part], with_rle(file))
    assert kept(alone | {"n": 6}) == approx(whole)


def with_rle(coco: dict) -> list[dict]:
    """The annotations with their polygons as RLE, which need no list of pictures."""
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = copy.deepcopy(coco)
        index.createIndex()
    return [annotation | {"segmentation": index.annToRLE(annotation)} for annotation in coco["annotations"]]


def annotation(number, x, image_id=1, crowd=0, category=1) -> dict:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": [x, 0, 10, 10],
        "area": 100,
        "iscrowd": crowd,
    }


def result(x, score, image_id=1, category=1) -> dict:
    return {"image_id": image_id, "category_id": category, "bbox": [x, 0, 10, 10], "score": score}


def test_average_precision_by_hand(tmp_path):
    # Right, wrong, right: precision 1 up to recall 1/2 (51 of 101 points), then 2/3 (50 points).
    found, truth = [result(0, 0.9), result(500, 0.8), result(100, 0.7)], [annotation(1, 0), annotation(2, 100)]
    results = compute("coco_detection", tmp_path, found, truth)
    assert results["bbox_ap"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert (results["bbox_ar1"], results["bbox_ar10"]) == (0.5, 1)
    assert results["bbox_ap_small"] == results["bbox_ap"] and results["bbox_ap_large"] is None
    assert "segm_ap" not in results


def test_ties_keep_the_order_of_the_results(tmp_path):
    right_first = compute("coco_detection", tmp_path, [result(0, 0.5), result(50, 0.5)], [annotation(1, 0)])
    wrong_first = compute("coco_detection", tmp_path, [result(50, 0.5), result(0, 0.5)], [annotation(1, 0)])
    assert (right_first["bbox_ap"], wrong_first["bbox_ap"]) == (pytest.approx(1), pytest.approx(0.5))


def test_ids_that_are_zero_or_shared(tmp_path):
    found = [result(0, 0.9), result(100, 0.8)]
    for ids in ((0, 1), (7, 7), (1, 2)):
        truth = [annotation(number, x) for number, x in zip(ids, (0, 100), strict=True)]
        results = compute("coco_detection", tmp_path, found, truth, per_sample=True)
        assert results["bbox_ap"] == pytest.approx(1)
        assert results["samples"] == [{"image_id": 1, "bbox_matched": 2, "bbox_results": 2, "bbox_annotations": 2}]
    # An object found twice is found once.
    results = compute("coco_detection", tmp_path, [result(0, 0.9)] * 2, [annotation(1, 0)], per_sample=True)
    assert results["samples"][0]["bbox_matched"] == 1 and results["samples"][0]["bbox_results"] == 2


def test_what_lies_in_a_crowd_is_not_counted(tmp_path):
    crowd = annotation(2, 200, crowd=1) | {"bbox": [200, 0, 100, 100], "area": 10000}
    found = [result(210, 0.95), result(220, 0.94), result(0, 0.9)]
    results = compute("coco_detection", tmp_path, found, [annotation(1, 0), crowd], per_sample=True)
    assert results["bbox_ap"] == pytest.approx(1)
    assert results["samples"] == [{"image_id": 1, "bbox_matched": 1, "bbox_results": 1, "bbox_annotations": 1}]
    found[0]["bbox"][0] = 500
    assert compute("coco_detection", tmp_path, found, [annotation(1, 0), crowd])["bbox_ap"] == pytest.approx(0.5)


def test_images_without_annotations_count(tmp_path):
    truth = {"images": [{"id": 1}, {"id": 2}], "annotations": [annotation(1, 0)], "categories": [{"id": 1}]}
    found = [result(0, 0.5), result(0, 0.9, image_id=2)]
    assert compute("coco_detection", tmp_path, found, truth)["bbox_ap"] == pytest.approx(0.5)
    assert compute("coco_detection", tmp_path, found, truth["annotations"])["bbox_ap"] == pytest.approx(0.5)
    assert compute("coco_detection", tmp_path, [], truth)["bbox_ap"] == 0


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"image_id": 1, "category_id": 1, "score": 0.9}, "bbox is not x, y, width, height"),
        (result(0, 0.9) | {"bbox": [0, 0, -1, 5]}, "bbox is not x, y, width, height"),
        (result(0, "high"), "score is not a number"),
        (result(0, float("nan")), "score is not a number"),
        (result(0, 0.9, image_id=77), "result of an unknown image or category"),
        (result(0, 0.9, category=77), "result of an unknown image or category"),
        ({"bbox": [0, 0, 1, 1]}, "result without image_id or category_id"),
        ("cat", "result without image_id or category_id"),
    ],
)
def test_reasons_of_bad_results(bad, reason, tmp_path):
    truth = {"images": [{"id": 1}], "annotations": [annotation(1, 0)], "categories": [{"id": 1}]}
    results = compute("coco_detection", tmp_path, [bad, result(50, 0.1)], truth)
    assert results["problems"] == {reason: 1}
    assert results["bbox_ap"] == 0


def test_masks_by_hand(tmp_path):
    truth = {
        "images": [{"id": 1, "height": 20, "width": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}],
        "categories": [{"id": 1}],
    }
    found = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": rectangle(0, 0, 10, 6)}
    results = compute("coco_detection", tmp_path, [found], truth)
    # IoU 0.6 passes 0.5, 0.55 and 0.6; boxes and areas come from the masks.
    assert results["segm_ap"] == results["bbox_ap"] == pytest.approx(0.3)
    bad = [found | {"segmentation": rectangle(0, 0, 5, 5, height=30, width=20)}, found | {"segmentation": {"size": 1}}]
    bad.append(result(0, 0.9))
    results = compute("coco_detection", tmp_path, [*bad, found], truth)
    assert results["segm_ap"] == pytest.approx(0.3)
    assert sum(results["problems"].values()) == 3


def test_bad_annotations_are_errors(tmp_path):
    image = {"images": [{"id": 1}], "categories": [{"id": 1}]}
    with pytest.raises(ValueError, match="not listed"):
        compute("coco_detection", tmp_path, [], image | {"annotations": [annotation(1, 0, image_id=2)]})
    with pytest.raises(ValueError, match="polygons need the height and width"):
        polygons = annotation(1, 0) | {"segmentation": [[0, 0, 1, 0, 1, 1]]}
        compute("coco_detection", tmp_path, [], image | {"annotations": [polygons]})
    with pytest.raises(ValueError, match="neither bbox nor segmentation"):
        compute("coco_detection", tmp_path, [], [{"id": 1, "image_id": 1, "category_id": 1}])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"images": 5}, "images is not a list"),
        ({"images": [{"file_name": "a.jpg"}]}, "images has an entry without an id"),
        ({"categories": ["cat"]}, "categories has an entry without an id"),
        ({"annotations": [annotation(1, 0) | {"bbox": [1, 2]}]}, "bbox is not x, y, width, height"),
        ({"annotations": [annotation(1, 0) | {"area": "big"}]}, "area is not a number"),
        ({"annotations": [annotation(1, 0) | {"segmentation": [[1, 2]]}]}, "polygon is not a list of numbers"),
        # pycocotools would never come back from either of these two.
        ({"annotations": [annotation(1, 0) | {"segmentation": {"size": [20, 30], "counts": "zzzz"}}]}, "broken RLE"),
        ({"annotations": [annotation(1, 0) | {"segmentation": {"size": [20, 30], "counts": [5]}}]}, "broken RLE"),
        ({"annotations": [annotation(1, 0) | {"segmentation": rectangle(0, 0, 1, 1, height=5)}]}, "another size"),
    ],
)
def test_malformed_references_are_errors(part, message, tmp_path):
    truth = {"images": [{"id": 1, "height": 20, "width": 30}], "annotations": [], "categories": [{"id": 1}]}
    found = result(0, 0.5) | {"segmentation": rectangle(0, 0, 10, 10)}
    with pytest.raises(ValueError, match=message):
        compute("coco_detection", tmp_path, [found], truth | part)


def test_a_result_that_is_no_json_leaves_the_others(tmp_path):
    found = [{np.int64(1): 2}, result(0, 0.9) | {"bbox": {(1, 2): 3}}, result(0, 0.5)]
    results = compute("coco_detection", tmp_path, found, {"annotations": [annotation(1, 0)]})
    assert results["bbox_ap"] == pytest.approx(1)
    assert sum(results["problems"].values()) == 2


def grounded(caption, *masks, scores=None) -> dict:
    made = {"caption": caption, "phrases": ["thing"] * len(masks), "masks": list(masks)}
    return made if scores is None else made | {"scores": scores}


def test_grounded_captions_by_hand(tmp_path):
    square, other, far = rectangle(0, 0, 10, 10), rectangle(10, 0, 20, 10), rectangle(0, 15, 5, 20)
    references = [
        grounded("a man rides a horse", square, other),
        grounded("two dogs", square),
        grounded("a red bus", square),
        grounded("the sky"),
    ]
    predictions = [
        grounded("a man on a horse", rectangle(0, 0, 9, 10), far, scores=[0.9, 0.1]),
        grounded("two dogs", rectangle(0, 0, 5, 10), None, scores=[0.8, 0.7]),
        None,
        grounded("the sky"),
    ]
    results = compute("grounded_caption", tmp_path, predictions, references, per_sample=True, **PYTHON)
    # Matched: IoU 0.9 and, a tie at the limit, 0.5; of four true masks.
    assert results["miou"] == pytest.approx((0.9 + 0.5) / 2)
    assert results["recall"] == 2 / 4
    # By score: right, right, wrong (the broken mask), wrong: precision 1 up to recall 1/2.
    assert results["ap50"] == pytest.approx(51 / 101)
    captions = [["a man rides a horse"], ["two dogs"], ["a red bus"], ["the sky"]]
    texts = compute("caption_scores", tmp_path, ["a man on a horse", "two dogs", "", "the sky"], captions, **PYTHON)
    assert results["cider"] == texts["cider"]
    assert results["problems"] == {"missing": 2}
    assert [sample["matched"] for sample in results["samples"]] == [1, 1, 0, 0]


def test_grounded_captions_match_the_best_pair_first(tmp_path):
    wide, narrow = rectangle(0, 0, 10, 10), rectangle(0, 0, 6, 10)
    # The first mask overlaps both (0.8 and 0.75) and takes the better; the second then has IoU 0.6 with the other.
    predictions = [grounded("a", rectangle(0, 0, 8, 10), wide)]
    results = compute("grounded_caption", tmp_path, predictions, [grounded("a", wide, narrow)], **PYTHON)
    assert results["miou"] == pytest.approx((1 + 0.75) / 2) and results["recall"] == 1
    # A mask may be matched once.
    results = compute("grounded_caption", tmp_path, [grounded("a", wide)], [grounded("a", wide, wide)], **PYTHON)
    assert results["recall"] == 0.5
    results = compute("grounded_caption", tmp_path, [grounded("a", wide, wide)], [grounded("a", wide)], **PYTHON)
    assert results["recall"] == 1 and results["ap50"] == pytest.approx(1)


def test_a_missing_mask_takes_no_memory(tmp_path):
    large = {"size": [60000, 60000], "counts": [3_600_000_000]}
    results = compute("grounded_caption", tmp_path, [grounded("a", large, None)], [grounded("a")], **PYTHON)
    assert results["problems"] == {"missing": 1}


def test_grounded_captions_without_masks(tmp_path):
    results = compute("grounded_caption", tmp_path, [grounded("a dog")], [grounded("a dog")], **PYTHON)
    assert results["ap50"] is results["miou"] is results["recall"] is None
    wide = rectangle(0, 0, 10, 10)
    results = compute("grounded_caption", tmp_path, [grounded("a dog")], [grounded("a dog", wide)], **PYTHON)
    assert results["ap50"] == results["miou"] == results["recall"] == 0


@pytest.mark.parametrize(
    ("prediction", "reason"),
    [
        (grounded("a", rectangle(0, 0, 1, 1), scores=[]), "phrases, masks and scores are not lists of one length"),
        (grounded("a", rectangle(0, 0, 1, 1), scores=["x"]), "scores are not numbers"),
        (grounded(5, rectangle(0, 0, 1, 1)), "caption is not text"),
        ("a dog", "not a dict with caption, phrases, masks and scores"),
        (grounded(" ", rectangle(0, 0, 1, 1)), "missing caption"),
        (grounded("a", {"size": [20, 30], "counts": "?"}), "mask with broken RLE counts"),
        (grounded("a", rectangle(0, 0, 1, 1, height=5)), "mask of another size than the image"),
    ],
)
def test_reasons_of_bad_grounded_captions(prediction, reason, tmp_path):
    reference = grounded(["a dog", "dogs"], rectangle(10, 10, 20, 20))
    results = compute("grounded_caption", tmp_path, [prediction], [reference], **PYTHON)
    assert results["problems"] == {reason: 1}
    assert results["ap50"] == results["recall"] == 0
