"""Referring expression comprehension: one box per expression."""

import numpy as np

from perceptiongpt.geometry_perceptiongpt import box_iou
from perceptiongpt.metrics import shared


THRESHOLDS = [percent / 100 for percent in range(50, 100, 5)]


class BoxAccuracy(shared.StoredMetric):
    description = """Acc@t, the share of expressions whose predicted box has IoU >= t with the true one (t = 0.5, 0.75,
0.9), its mean over t = 0.5, 0.55, ..., 0.95, and the mean IoU. Boxes are xyxy in continuous coordinates (no + 1)."""
    inputs = """
Args:
    predictions: a box [x0, y0, x1, y1] per expression. A missing box ([] or None) and a malformed one (not four finite
        numbers, no area) have IoU 0.
    references: a box [x0, y0, x1, y1] per expression, in the same unit.
    per_sample: also return `samples`, with the `iou` of each.

Returns:
    acc@0.5, acc@0.75, acc@0.9, macc, miou: shares, None if there are no rows.
    n: number of rows. problems: {reason: number of predictions}.
"""

    def score(self, predictions, references, problems):
        boxes = shared.read_predictions(predictions, shared.parse_box, problems)
        references = shared.read_references(references, shared.parse_box)
        ious = np.zeros(len(boxes))
        found = [index for index, box in enumerate(boxes) if box is not None]
        if found:
            ious[found] = box_iou([boxes[index] for index in found], [references[index] for index in found])
        accuracy = {t: shared.share((ious >= t).sum(), len(ious)) for t in THRESHOLDS}
        results = {f"acc@{t}": accuracy[t] for t in (0.5, 0.75, 0.9)}
        results["macc"] = shared.share(sum((ious >= t).sum() for t in THRESHOLDS), len(ious) * len(THRESHOLDS))
        results["miou"] = shared.mean(ious)
        return results, [{"iou": float(iou)} for iou in ious]
