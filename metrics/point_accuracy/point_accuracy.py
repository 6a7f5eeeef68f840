"""Pointing: does each predicted point lie in the mask of the object that was asked for?"""

import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from perceptiongpt.metrics import shared


class PointAccuracy(shared.StoredMetric):
    description = """The share of predicted points that lie in a reference mask, each mask taking one point. A missing
point and a surplus one count as wrong."""
    inputs = """
Args:
    predictions: a list of points [x, y] per expression, in pixels of the image: x to the right, y down, the pixel in
        column c and row r covers c <= x < c + 1 and r <= y < r + 1. [] means that there is no target. None (no answer)
        and a list with a malformed point are always wrong.
    references: a list of masks (COCO RLE) per expression; empty where there is no target.
    per_sample: also return `samples`, with `matched` (points in a mask of their own), `predicted` and `annotated`
        (numbers of points and masks) and `share` (matched of the larger of the two) of each.

Returns:
    points_in_mask: mean `share` of the expressions; with one target each, the share of points that lie in it.
    precision, recall: matched points of all predicted points, and of all masks. None where there are none.
    n: number of rows. problems: {reason: number of predictions}.
"""

    def score(self, predictions, references, problems):
        references = shared.read_references(references, parse_masks)
        points = shared.read_predictions(predictions, parse_points, problems)
        samples = []
        for found, masks in zip(points, references, strict=True):
            matched = count_matches(found, masks) if found and masks else 0
            larger = max(len(found or ()), len(masks))
            share = matched / larger if larger else float(found is not None)
            sample = {"matched": matched, "predicted": len(found or ()), "annotated": len(masks), "share": share}
            samples.append(sample)
        total = {key: sum(sample[key] for sample in samples) for key in ("matched", "predicted", "annotated")}
        results = {
            "points_in_mask": shared.mean([sample["share"] for sample in samples]),
            "precision": shared.share(total["matched"], total["predicted"]),
            "recall": shared.share(total["matched"], total["annotated"]),
        }
        return results, samples


def parse_point(value) -> list[float]:
    """[x, y]; `ValueError` with the reason otherwise."""
    if value is None or value == []:
        raise ValueError("missing")
    if not isinstance(value, list) or len(value) != 2 or not all(map(shared.is_number, value)):
        raise ValueError("point is not two finite numbers")
    return [float(number) for number in value]


def parse_points(value) -> list[list[float]]:
    return shared.parse_list(value, parse_point, "points")


def parse_masks(value) -> list[dict]:
    masks = shared.parse_list(value, shared.parse_mask, "masks")
    shared.join_masks(masks)  # refuses different sizes
    return masks


def points_in_masks(points: list, masks: list[dict]) -> np.ndarray:
    """Whether each point lies in each mask, bool (points, masks). The right and lower border belong to the image."""
    height, width = masks[0]["size"]
    x, y = np.asarray(points, dtype=float).T
    inside = (x >= 0) & (y >= 0) & (x <= width) & (y <= height)
    column = np.clip(np.floor(x), 0, width - 1).astype(int)
    row = np.clip(np.floor(y), 0, height - 1).astype(int)
    return inside[:, None] & np.stack([coco_mask.decode(mask)[row, column] > 0 for mask in masks], axis=1)


def count_matches(points: list, masks: list[dict]) -> int:
    """The largest number of points that can be given a mask of their own that they lie in."""
    inside = points_in_masks(points, masks)
    return int(inside[linear_sum_assignment(inside, maximize=True)].sum())
