"""Calibration: do the scores tell how often an object is right, and whether there is a target?"""

import numpy as np

from perceptiongpt.evaluation.intervals import (
    RESAMPLES,
    draw_weights,
    resampled_sums,
    sample_groups,
    spread,
    wide_enough,
)
from perceptiongpt.evaluation.predictions import SIGNALS, Prediction, references


BINS = 10
CURVE_POINTS = 101  # of the curves over the threshold
RIGHT_FROM = 0.5  # IoU


def calibration(
    samples: list[dict], predictions: dict[str, Prediction], first_only: set[str], intervals: bool = True
) -> dict:
    """Scores compared with the truth.

    Args:
        first_only: ids of samples of which only the first object counts.

    Returns:
        Per signal that references and predictions have: `n`, `ece` (expected calibration error) with its 95 % interval
        `ece_interval`, `mean_score`, `accuracy` (share with IoU >= 0.5 with a target that no surer object has), `bins`
        and `precision_recall` over the score. And `no_target`: the share of samples without (`n_acc`) and with
        (`t_acc`) a target that are decided rightly, if a target counts as found from a score on.
    """
    found = {}
    for name, signal in SIGNALS.items():
        scored, wanted = [], 0
        for sample in samples:
            targets = [reference[signal.compared_with] for reference in references(sample)]
            if any(target is None for target in targets):
                continue
            objects = predictions[sample["id"]].objects
            objects = objects[:1] if sample["id"] in first_only else objects
            objects = sorted((one for one in objects if one[name] is not None), key=lambda one: -one[signal.score])
            wanted += len(targets)
            right = matches(signal.overlaps, [one[name] for one in objects], targets)
            scored += [(one[signal.score], index in right, sample["image_id"]) for index, one in enumerate(objects)]
        if scored and wanted:
            found[name] = _reliability(*map(np.array, zip(*scored, strict=True)), wanted, intervals)
    box_score = SIGNALS["box"].score
    decided = [
        (max((one[box_score] for one in predictions[sample["id"]].objects), default=-1.0), bool(references(sample)))
        for sample in samples
        if sample["answers"][0]["content"]
    ]
    if any(has_target for _, has_target in decided) and not all(has_target for _, has_target in decided):
        found["no_target"] = _no_target_curve(*map(np.array, zip(*decided, strict=True)))
    return found


def matches(overlaps, values: list, targets: list) -> set[int]:
    """Indices of the values that get a target: in their order, each the best target that is left."""
    if not values or not targets:
        return set()
    ious, right = overlaps(values, targets), set()
    for index, row in enumerate(ious):
        best = int(row.argmax())
        if row[best] >= RIGHT_FROM:
            right.add(index)
            ious[:, best] = -1
    return right


def _reliability(scores: np.ndarray, right: np.ndarray, images: np.ndarray, wanted: int, intervals: bool) -> dict:
    edges = np.linspace(0, 1, BINS + 1)
    index = np.clip(np.digitize(scores, edges) - 1, 0, BINS - 1)
    bins, columns = [], {"one": np.ones(len(scores))}
    for number in range(BINS):
        inside = index == number
        columns[f"gap{number}"] = inside * (scores - right)
        if inside.any():
            score, share = float(scores[inside].mean()), float(right[inside].mean())
            bins.append({"from": edges[number].item(), "to": edges[number + 1].item(), "n": int(inside.sum())})
            bins[-1] |= {"score": score, "correct": share}
    error = float(_expected_error({name: values.sum() for name, values in columns.items()}))
    interval = None
    if intervals:
        groups = sample_groups(images)
        weights = draw_weights(groups, RESAMPLES)
        drawn = _expected_error(resampled_sums(columns, groups, weights))
        interval = wide_enough(spread(error, drawn), error, weights.shape[1])
    order = np.argsort(-scores, kind="mergesort")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores are kept or dropped together
    kept, hits = np.arange(1, len(order) + 1)[last], np.cumsum(right[order])[last]
    thin = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), CURVE_POINTS)).round().astype(int))
    return {
        "n": len(scores),
        "ece": error,
        "ece_interval": interval,
        "mean_score": float(scores.mean()),
        "accuracy": float(right.mean()),
        "bins": bins,
        "precision_recall": {
            "threshold": scores[order][last][thin].tolist(),
            "precision": (hits / kept)[thin].tolist(),
            "recall": (hits / wanted)[thin].tolist(),
        },
    }


def _expected_error(sums: dict) -> np.ndarray:
    return sum(abs(sums[f"gap{number}"]) for number in range(BINS)) / sums["one"]


def _no_target_curve(best_scores: np.ndarray, has_target: np.ndarray) -> dict:
    thresholds = np.linspace(0, 1, CURVE_POINTS)
    found = best_scores[None] >= thresholds[:, None]
    return {
        "threshold": thresholds.tolist(),
        "n_acc": (~found[:, ~has_target]).mean(1).tolist(),
        "t_acc": found[:, has_target].mean(1).tolist(),
    }
