"""Metrics of boxes and masks, and what all metrics share: loading, batches, processes, bad predictions."""

import gzip
import itertools
import json
import math
import multiprocessing
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from metric_inputs import approx, compute, kept, rectangle, rle
from perceptiongpt import metrics


EMPTY = rectangle(0, 0, 0, 0)
FULL = rectangle(0, 0, 30, 20)

PERSON = {"caption": "a man rides a horse", "phrases": ["a man", "a horse"]}
# Rows of each metric: (predictions, references), the second prediction bad or missing.
ROWS = {
    "box_accuracy": ([[0, 0, 10, 8], [], [1, 1, 3, 3]], [[0, 0, 10, 10], [0, 0, 5, 5], [1, 1, 3, 4]]),
    "referring_iou": ([rectangle(0, 0, 9, 10), None, FULL], [rectangle(0, 0, 10, 10), FULL, FULL]),
    "generalized_referring": ([[rectangle(0, 0, 9, 10)], None, []], [[rectangle(0, 0, 10, 10)], [FULL], []]),
    "generalized_boxes": ([[[0, 0, 9, 10]], None, []], [[[0, 0, 10, 10]], [[0, 0, 2, 2]], []]),
    "point_accuracy": ([[[5.5, 5]], None, [[9, 9], [40, 5]]], [[rectangle(0, 0, 9, 10)], [FULL], [FULL, FULL]]),
    "attributes_right": (
        ["a red star", None, "A striped blue circle, partly hidden by a green ring."],
        ["A red star.", "A heart.", "A blue striped circle, partly hidden by a plain green ring."],
    ),
    "vqa_accuracy": (["two", "", "Cat."], [["2"] * 4 + ["3"] * 6, ["a"] * 10, ["cat"] * 9 + ["dog"]]),
    "pope": (["Yes, it is.", None, "No."], ["yes", "no", "no"]),
    "caption_scores": (
        ["a man on a horse", None, "two dogs play"],
        [["a man rides a horse", "a man on a horse"], ["a red bus"], ["two dogs play outside", "dogs"]],
    ),
    "coco_detection": (
        [[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 10], "score": 0.5}], None, []],
        [
            [{"id": number, "image_id": number, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 100, "iscrowd": 0}]
            for number in (1, 2, 3)
        ],
    ),
    "grounded_caption": (
        [
            PERSON | {"masks": [rectangle(0, 0, 9, 10), EMPTY], "scores": [0.9, 0.2]},
            None,
            PERSON | {"masks": [FULL, FULL]},
        ],
        [PERSON | {"masks": [rectangle(0, 0, 10, 10), FULL]}] * 2 + [PERSON | {"masks": [FULL, rectangle(0, 0, 3, 3)]}],
    ),
}
WITHOUT_JAVA = {"caption_scores": {"tokenizer": "python", "meteor": False}}
WITHOUT_JAVA["grounded_caption"] = WITHOUT_JAVA["caption_scores"]


def test_every_metric_has_rows():
    assert set(ROWS) == set(metrics.NAMES)


@pytest.mark.parametrize("name", ROWS)
def test_loads_from_its_folder_and_describes_its_inputs(name, tmp_path):
    metric = evaluate.load(str(Path(metrics.__file__).parent / name), cache_dir=str(tmp_path))
    assert "Args:" in metric.inputs_description and "Returns:" in metric.inputs_description
    assert metric.description
    assert "predictions:" in metric.compute.__doc__


def test_unknown_metric():
    with pytest.raises(ValueError, match="no metric 'spice'"):
        metrics.load("spice")


@pytest.mark.parametrize("name", ROWS)
def test_batches_and_order_change_nothing_and_bad_predictions_count(name, tmp_path):
    predictions, references = ROWS[name]
    options = WITHOUT_JAVA.get(name, {})
    whole = compute(name, tmp_path, predictions, references, **options)
    assert whole["n"] == 3
    assert whole["problems"] == {"missing": 1}
    for batch_size in (1, 2, 8):
        assert compute(name, tmp_path, predictions, references, batch_size, **options) == whole
    backwards = compute(name, tmp_path, predictions[::-1], references[::-1], **options)
    assert kept(backwards) == approx(whole)
    samples = compute(name, tmp_path, predictions, references, per_sample=True, **options)["samples"]
    assert len(samples) == 3
    json.dumps(whole | {"samples": samples})


@pytest.mark.parametrize("name", ROWS)
def test_what_is_malformed_is_as_bad_as_nothing(name, tmp_path):
    predictions, references = ROWS[name]
    options = WITHOUT_JAVA.get(name, {})
    missing = compute(name, tmp_path, predictions, references, **options)
    huge = {"size": [10**9, 10**9], "counts": [10**18]}
    odd_keys = ({np.int64(1): 2}, [{(1, 2): "no text"}])
    for bad in (7, {"a": 1}, [{"size": "x"}], object(), [[1, 2, 3]], math.nan, True, huge, [huge], *odd_keys):
        if name == "coco_detection" and isinstance(bad, dict):
            continue  # a dict among the predictions is a result of the flat form
        results = compute(name, tmp_path, [predictions[0], bad, predictions[2]], references, **options)
        assert kept(results) == approx(missing), bad
        assert sum(results["problems"].values()) == 1, results["problems"]


@pytest.mark.parametrize("name", ROWS)
def test_no_rows(name, tmp_path):
    results = compute(name, tmp_path, [], [], **WITHOUT_JAVA.get(name, {}))
    assert results["n"] == 0
    for key in set(results) - {"n", "n_no_target", "problems", "tokenizer"}:
        assert results[key] is None or (name == "pope" and results[key] == 0), key


@pytest.mark.parametrize("name", ROWS)
def test_bad_reference_is_an_error(name, tmp_path):
    predictions, references = ROWS[name]
    with pytest.raises(ValueError, match=r"references\[1\]"):
        compute(name, tmp_path, predictions, [references[0], 5, references[2]], **WITHOUT_JAVA.get(name, {}))


def test_columns_of_unequal_length(tmp_path):
    with pytest.raises(ValueError, match="unequal length"):
        compute("box_accuracy", tmp_path, [[]], [[0, 0, 1, 1]] * 2)
    with pytest.raises(ValueError, match="together"):
        compute("box_accuracy", tmp_path, None, [[0, 0, 1, 1]])


def compute_share(name, folder, process_id, queue):
    metric = metrics.load(name, cache_dir=folder, num_process=2, process_id=process_id, experiment_id="two")
    predictions, references = ([*column[process_id::2]] for column in ROWS[name])
    metric.add_batch(predictions=predictions, references=references)
    queue.put((process_id, metric.compute(**WITHOUT_JAVA.get(name, {}))))


@pytest.mark.parametrize("name", ["box_accuracy", "generalized_referring", "caption_scores", "coco_detection"])
def test_two_processes_change_nothing(name, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=compute_share, args=(name, str(tmp_path), number, queue)) for number in (0, 1)]
    for worker in workers:
        worker.start()
    answers = dict(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert answers[1] is None
    alone = compute(name, tmp_path, *ROWS[name], **WITHOUT_JAVA.get(name, {}))
    assert kept(answers[0]) == approx(alone)
    assert answers[0]["problems"] == alone["problems"]


def test_arrays_and_tensors_are_inputs(tmp_path):
    boxes, truth = np.array([[0, 0, 10, 8.1], [0, 0, 1, 1]], dtype=np.float32), [[0, 0, 10, 10], [0, 0, 1, 1]]
    expected = compute("box_accuracy", tmp_path, boxes.tolist(), truth)
    assert compute("box_accuracy", tmp_path, boxes, np.array(truth)) == expected
    assert compute("box_accuracy", tmp_path, list(torch.tensor(boxes)), truth) == expected
    as_bytes = FULL | {"counts": FULL["counts"].encode()}
    as_runs = {"size": [20, 30], "counts": [0, 600]}
    results = compute("referring_iou", tmp_path, [as_bytes, as_runs], [as_runs, as_bytes])
    assert results["ciou"] == results["prec@0.9"] == 1


def test_boxes_agree_with_counted_pixels(tmp_path):
    generator = np.random.default_rng(0)
    boxes = generator.integers(0, 12, (2, 400, 4))
    boxes = np.concatenate([boxes[..., :2], boxes[..., :2] + 1 + boxes[..., 2:] % 6], axis=-1)
    pixels = np.zeros((2, 400, 20, 20), dtype=bool)
    for side, row in itertools.product(range(2), range(400)):
        x0, y0, x1, y1 = boxes[side, row]
        pixels[side, row, y0:y1, x0:x1] = True
    ious = (pixels[0] & pixels[1]).sum((1, 2)) / (pixels[0] | pixels[1]).sum((1, 2))
    results = compute("box_accuracy", tmp_path, boxes[0].tolist(), boxes[1].tolist(), per_sample=True)
    assert [sample["iou"] for sample in results["samples"]] == pytest.approx(list(ious), abs=1e-12)
    assert results["miou"] == pytest.approx(ious.mean())
    assert results["acc@0.5"] == np.mean(ious >= 0.5)
    over = [np.mean(ious >= t) for t in (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)]
    assert results["macc"] == pytest.approx(np.mean(over))


def test_box_ties_count_and_nothing_is_added_to_sides(tmp_path):
    for percent in range(50, 100, 5):
        results = compute("box_accuracy", tmp_path, [[0, 0, percent, 100]], [[0, 0, 100, 100]])
        assert results["macc"] == pytest.approx((percent - 45) / 50)
        assert results["acc@0.5"] == 1 and results["acc@0.9"] == (percent >= 90)
    # With + 1 on the sides these two would overlap by half.
    assert compute("box_accuracy", tmp_path, [[0, 0, 1, 1]], [[1, 0, 2, 1]])["miou"] == 0


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([], "missing"),
        (None, "missing"),
        ([1, 2, 3], "box is not four finite numbers"),
        ([1, 2, 3, math.inf], "box is not four finite numbers"),
        ([1, 2, 3, 10**400], "box is not four finite numbers"),
        (["1", "2", "3", "4"], "box is not four finite numbers"),
        ("none", "box is not four finite numbers"),
        ([[0, 0, 1, 1]], "box is not four finite numbers"),
        ([3, 3, 1, 1], "box has no area"),
        ([1, 1, 1, 4], "box has no area"),
    ],
)
def test_reasons_of_bad_boxes(box, reason, tmp_path):
    results = compute("box_accuracy", tmp_path, [box, [0, 0, 1, 1]], [[0, 0, 1, 1]] * 2)
    assert results["problems"] == {reason: 1}
    assert results["acc@0.5"] == results["miou"] == 0.5


def random_masks(count: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.random((count, 13, 17)) < generator.random((count, 1, 1))


def test_referring_agrees_with_counted_pixels(tmp_path):
    found, truth, ignored = random_masks(60), random_masks(60, seed=1), random_masks(60, seed=2)
    masks = [[rle(mask) for mask in some] for some in (found, truth, ignored)]
    for ignore in (False, True):
        kept = ~ignored if ignore else np.ones_like(ignored)
        both, either = (found & truth & kept).sum((1, 2)), ((found | truth) & kept).sum((1, 2))
        ious = both / np.maximum(either, 1)
        columns = {"ignore": masks[2]} if ignore else {}
        results = compute("referring_iou", tmp_path, masks[0], masks[1], 7, columns=columns)
        assert results["ciou"] == pytest.approx(both.sum() / either.sum(), abs=1e-12)
        assert results["miou"] == pytest.approx(ious.mean(), abs=1e-12)
        for limit in (0.5, 0.6, 0.7, 0.8, 0.9):
            assert results[f"prec@{limit}"] == np.mean(ious > limit)


def test_referring_by_hand(tmp_path):
    # IoU exactly 0.5, 0.7 and 0.9 is not over these limits; missing, empty and broken masks leave the union.
    truth = [rectangle(0, 0, 10, 10)] * 6
    found = [rectangle(0, 0, part, 10) for part in (5, 7, 9)] + [None, EMPTY, {"size": [20, 30], "counts": "oops"}]
    results = compute("referring_iou", tmp_path, found, truth)
    assert results["ciou"] == pytest.approx(210 / 600)
    assert results["miou"] == pytest.approx(2.1 / 6)
    assert [results[f"prec@0.{digit}"] for digit in (5, 6, 7, 8, 9)] == pytest.approx([2 / 6, 2 / 6, 1 / 6, 1 / 6, 0])
    assert results["problems"] == {"missing": 1, "mask with broken RLE counts": 1}
    # cIoU weighs by size, mIoU does not.
    results = compute("referring_iou", tmp_path, [FULL, None], [FULL, rectangle(0, 0, 1, 1)])
    assert (results["ciou"], results["miou"]) == (600 / 601, 0.5)


def test_referring_without_any_pixel(tmp_path):
    results = compute("referring_iou", tmp_path, [EMPTY, FULL], [EMPTY, FULL])
    assert (results["ciou"], results["miou"], results["problems"]) == (1.0, 0.5, {})
    assert compute("referring_iou", tmp_path, [EMPTY], [EMPTY])["ciou"] == 0


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ({"size": [20, 30], "counts": FULL["counts"] + "o"}, "mask with broken RLE counts"),
        ({"size": [20, 30], "counts": ""}, "mask with broken RLE counts"),
        ({"size": [20, 30], "counts": "\x00 é"}, "mask with broken RLE counts"),
        ({"size": [20, 30], "counts": [600, -5, 5]}, "mask with broken RLE counts"),
        ({"size": [20, 30], "counts": [1.5]}, "mask with broken RLE counts"),
        ({"size": [20, 30]}, "mask with broken RLE counts"),
        ({"size": [2**16, 2**16], "counts": [2**32]}, "mask is too large"),
        ({"counts": FULL["counts"]}, "mask is not an RLE with size [height, width] and counts"),
        ({"size": [20.0, 30.0], "counts": "x"}, "mask is not an RLE with size [height, width] and counts"),
        (rectangle(0, 0, 1, 1, height=30, width=20), "mask of another size than its reference"),
    ],
)
def test_reasons_of_bad_masks(mask, reason, tmp_path):
    results = compute("referring_iou", tmp_path, [mask, FULL], [FULL, FULL])
    assert results["problems"] == {reason: 1}
    assert results["ciou"] == results["miou"] == 0.5
    generalized = compute("generalized_referring", tmp_path, [[mask], [FULL]], [[FULL], [FULL]])
    assert generalized["problems"] == {reason: 1}
    assert generalized["ciou"] == generalized["giou"] == generalized["t_acc"] == 0.5


def test_generalized_referring_agrees_with_loops_over_pixels(tmp_path):
    generator = np.random.default_rng(3)
    predictions, references, ious, intersections, unions = [], [], [], 0, 0
    counts = {"TP": 0, "FN": 0, "TN": 0, "FP": 0}
    for row in range(80):
        found, truth = (random_masks(generator.integers(0, 3), seed=row + side) for side in (0, 100))
        predictions.append([rle(mask) for mask in found])
        references.append([rle(mask) for mask in truth])
        joined, wanted = found.any(0), truth.any(0)
        intersection, union = (joined & wanted).sum(), (joined | wanted).sum()
        if len(truth) == 0:
            counts["FN" if len(found) else "TP"] += 1
            ious.append((float(not len(found)), False))
            intersection = 0
        else:
            counts["TN" if len(found) else "FP"] += 1
            ious.append((intersection / union, True))
        intersections, unions = intersections + intersection, unions + union
    results = compute("generalized_referring", tmp_path, predictions, references, 9)
    assert min(counts.values()) > 3
    assert results["giou"] == pytest.approx(np.mean([iou for iou, _ in ious]), abs=1e-12)
    assert results["ciou"] == pytest.approx(intersections / unions, abs=1e-12)
    assert results["n_acc"] == counts["TP"] / (counts["TP"] + counts["FN"])
    assert results["t_acc"] == counts["TN"] / (counts["TN"] + counts["FP"])
    with_target = [iou for iou, target in ious if target]
    assert results["pr@0.7"] == np.mean(np.array(with_target) >= 0.7)
    assert (results["n"], results["n_no_target"]) == (80, counts["TP"] + counts["FN"])


def test_generalized_referring_by_hand(tmp_path):
    left, right, half = rectangle(0, 0, 10, 10), rectangle(10, 0, 20, 10), rectangle(0, 0, 7, 10)
    predictions = [[], [left], [], [right, left], [left, left], [half], None, None, [EMPTY]]
    references = [[], [], [left], [left, right], [left, right], [left], [left], [], []]
    results = compute("generalized_referring", tmp_path, predictions, references)
    # Rightly none 1; wrongly something 0, U 100; wrongly none 0, U 100; all 1, I = U = 200; half 0.5, I 100, U 200;
    # 0.7, I 70, U 100; no answer 0, U 100; no answer 0; an emitted mask without pixels is not "none": 0.
    assert results["giou"] == pytest.approx((1 + 1 + 0.5 + 0.7) / 9)
    assert results["ciou"] == pytest.approx(370 / 800)
    assert (results["n_acc"], results["t_acc"]) == (1 / 4, 3 / 5)
    assert [results["pr@0.7"], results["pr@0.8"], results["pr@0.9"]] == [2 / 5, 1 / 5, 1 / 5]
    assert results["problems"] == {"missing": 2}


def test_generalized_referring_of_one_kind(tmp_path):
    results = compute("generalized_referring", tmp_path, [[FULL]], [[FULL]])
    assert (results["n_acc"], results["t_acc"]) == (None, 1)
    results = compute("generalized_referring", tmp_path, [[]], [[]])
    assert (results["giou"], results["ciou"], results["n_acc"], results["t_acc"]) == (1, None, 1, None)


def test_generalized_boxes_agree_with_all_pairings(tmp_path):
    generator = np.random.default_rng(0)
    predictions, references, right = [], [], []
    for _ in range(120):
        corners = generator.integers(0, 4, (2, 3, 2))
        boxes = np.concatenate([corners, corners + generator.integers(3, 6, (2, 3, 2))], axis=-1).tolist()
        found, truth = (boxes[side][: generator.integers(0, 4)] for side in (0, 1))
        predictions.append(found)
        references.append(truth)
        fits = [
            all(iou_of(box, other) >= 0.5 for box, other in zip(found, order, strict=True))
            for order in itertools.permutations(truth)
            if len(found) == len(truth)
        ]
        right.append(any(fits))
    results = compute("generalized_boxes", tmp_path, predictions, references, 11)
    assert 10 < sum(right) < 60
    assert results["pr@f1"] == np.mean(right)
    without = [not found for found, truth in zip(predictions, references, strict=True) if not truth]
    assert results["n_acc"] == np.mean(without)


def iou_of(box, other) -> float:
    width = max(min(box[2], other[2]) - max(box[0], other[0]), 0)
    height = max(min(box[3], other[3]) - max(box[1], other[1]), 0)
    area, other_area = ((some[2] - some[0]) * (some[3] - some[1]) for some in (box, other))
    return width * height / (area + other_area - width * height)


def test_generalized_boxes_by_hand(tmp_path):
    unit, half, far = [0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60]
    predictions = [[half], [unit, unit], [unit], [unit, far], [], [unit], [], None, [[1, 1, 0, 0]]]
    references = [[unit], [unit], [unit, far], [far, unit], [], [], [unit], [], [unit]]
    results = compute("generalized_boxes", tmp_path, predictions, references)
    # A tie at 0.5 counts; one box twice, too few, and what is no answer do not.
    assert results["pr@f1"] == pytest.approx(3 / 9)
    assert (results["n_acc"], results["t_acc"], results["n_no_target"]) == (1 / 3, 4 / 6, 3)
    assert results["problems"] == {"missing": 1, "box has no area": 1}
    # Taking the best pair first would leave the second box without a partner.
    found, truth = [[0, 0, 10, 10], [0, 0, 10, 16]], [[0, 0, 10, 9], [0, 0, 10, 6]]
    assert iou_of(found[0], truth[0]) > iou_of(found[0], truth[1]) > 0.5 < iou_of(found[1], truth[0])
    assert compute("generalized_boxes", tmp_path, [found], [truth])["pr@f1"] == 1


def test_generalized_boxes_scores(tmp_path):
    rows = [[[0, 0, 1, 1], [5, 5, 6, 6]], [[0, 0, 1, 1]]], [[[0, 0, 1, 1]], []]
    scores = {"scores": [[0.7, 0.6], [0.69]]}
    assert compute("generalized_boxes", tmp_path, *rows, columns=scores)["pr@f1"] == 0
    results = compute("generalized_boxes", tmp_path, *rows, 1, columns=scores, score_threshold=0.7)
    assert (results["pr@f1"], results["n_acc"]) == (1, 1)
    results = compute("generalized_boxes", tmp_path, *rows, columns={"scores": [[0.7], ["x"]]})
    assert results["problems"] == {"not as many scores as boxes": 1, "scores are not numbers": 1}
    with pytest.raises(ValueError, match="needs scores"):
        compute("generalized_boxes", tmp_path, *rows, score_threshold=0.7)


def test_points_by_hand(tmp_path):
    left, right = rectangle(0, 0, 10, 10), rectangle(10, 0, 20, 10)
    rows = [
        ([[3, 4]], [left], 1, 1),
        ([[10, 4]], [left], 0, 0),  # a pixel reaches up to, but not over, its right border
        ([[9.99, 9.99]], [left], 1, 1),
        ([[30, 20]], [FULL], 1, 1),  # the border of the image
        ([[30.1, 5]], [FULL], 0, 0),
        ([[-0.1, 5]], [left], 0, 0),
        ([[3, 4], [12, 4]], [right, left], 2, 1),
        ([[3, 4], [4, 4]], [left, right], 1, 1 / 2),  # a mask takes one point
        ([[12, 4], [3, 4]], [FULL, right], 2, 1),  # the first point may be in both, the second only in one
        ([[3, 4], [25, 15]], [left], 1, 1 / 2),
        ([], [left], 0, 0),
        ([], [], 0, 1),
        ([[3, 4]], [], 0, 0),
        (None, [], 0, 0),
    ]
    results = compute("point_accuracy", tmp_path, *([row[i] for row in rows] for i in (0, 1)), per_sample=True)
    assert [sample["matched"] for sample in results["samples"]] == [row[2] for row in rows]
    assert [sample["share"] for sample in results["samples"]] == [row[3] for row in rows]
    assert results["points_in_mask"] == pytest.approx(sum(row[3] for row in rows) / len(rows))
    assert (results["precision"], results["recall"]) == (9 / 15, 9 / 14)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([[1, 2, 3]], "point is not two finite numbers"),
        ([[1, math.nan]], "point is not two finite numbers"),
        ([None], "missing"),
        ([1, 2], "point is not two finite numbers"),
        ("here", "not a list of points"),
    ],
)
def test_reasons_of_bad_points(points, reason, tmp_path):
    results = compute("point_accuracy", tmp_path, [points, [[1, 1]]], [[FULL], [FULL]])
    assert results["problems"] == {reason: 1} and results["points_in_mask"] == 0.5


@pytest.fixture(scope="module")
def refcoco_val(data_dir) -> list[dict]:
    path = data_dir / "refcoco_rec_jsonl" / "REC_refcoco_unc_val.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_boxes_of_refcoco_val(refcoco_val, tmp_path):
    truth = [row["bbox"] for row in refcoco_val]
    assert len(truth) == 10834
    truth = truth[::4]
    # Moved to the right by 3/10 of its width, a box has IoU 0.7 / 1.3.
    moved = [[x0 + 0.3 * (x1 - x0), y0, x1 + 0.3 * (x1 - x0), y1] for x0, y0, x1, y1 in truth]
    perfect, shifted, empty = (
        compute("box_accuracy", tmp_path, boxes, truth, 64) for boxes in (truth, moved, [[]] * len(truth))
    )
    assert perfect["acc@0.9"] == perfect["macc"] == 1
    assert shifted["acc@0.5"] == 1 and shifted["acc@0.75"] == 0 and shifted["miou"] == pytest.approx(0.7 / 1.3)
    assert empty["miou"] == empty["acc@0.5"] == 0 and empty["problems"] == {"missing": len(truth)}


def test_masks_of_refcoco_val(refcoco_val, tmp_path):
    """Its boxes filled, in the size of their photos: an ellipse in each as the prediction."""
    turns = np.linspace(0, 2 * np.pi, 40)
    circle = np.stack([np.cos(turns), np.sin(turns)], axis=-1) / 2 + 0.5
    truth, found = [], []
    for row in refcoco_val[::10]:
        height, width, (x0, y0, x1, y1) = row["height"], row["width"], row["bbox"]
        polygon = (circle * [x1 - x0, y1 - y0] + [x0, y0]).ravel().tolist()
        for masks, shape in ((truth, [x0, y0, x1, y0, x1, y1, x0, y1]), (found, polygon)):
            mask = coco_mask.frPyObjects([shape], height, width)[0]
            masks.append({"size": mask["size"], "counts": mask["counts"].decode()})
    results = compute("referring_iou", tmp_path, found, truth, 64)
    # The ellipse has pi / 4 of the box.
    assert results["miou"] == pytest.approx(np.pi / 4, abs=0.01) == results["ciou"]
    assert results["n"] == len(truth) and not results["problems"]
