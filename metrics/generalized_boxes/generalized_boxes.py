"""Generalized referring expression comprehension (GREC): any number of boxes per expression, none included."""

from scipy.optimize import linear_sum_assignment

from perceptiongpt.geometry_perceptiongpt import box_iou
from perceptiongpt.metrics import shared


class GeneralizedBoxes(shared.StoredMetric):
    description = """Pr@(F1=1, IoU>=0.5), N-acc and T-acc. An expression is right if its predicted and its true boxes
can be matched one to one with IoU >= 0.5 and none is left over; without a target, if no box is predicted."""
    citation = "He, Ding, Liu, Jiang. GREC: Generalized Referring Expression Comprehension. 2023."
    inputs = """
Args:
    predictions: a list of boxes [x0, y0, x1, y1] per expression; [] means that there is no target. None (no answer)
        and a list with a malformed box are always wrong.
    references: a list of boxes per expression; empty where there is no target.
    scores: optionally a list of scores per expression, one per predicted box.
    score_threshold: leave out boxes that score less; default: keep all. (The authors' script uses 0.7; a threshold
        should be tuned on the val split.)
    per_sample: also return `samples`, with `correct`, `answered` (whether a target is predicted exactly where there is
        one), `matched` (number of matches) and `target` (whether there is one) of each.

Returns:
    pr@f1: share of all expressions that are right.
    n_acc: share of the expressions without a target for which nothing is predicted; None if there are none.
    t_acc: share of the expressions with targets for which something is predicted; None if there are none.
    n, n_no_target: number of rows, and of rows without a target. problems: {reason: number of predictions}.
"""
    optional = ("scores",)

    def score(self, predictions, references, scores, problems, score_threshold: float | None = None):
        if score_threshold is not None and None in scores:
            raise ValueError("score_threshold needs scores for every row")

        def parse(row):
            boxes, box_scores = row
            boxes = parse_boxes(boxes)
            if box_scores is None:
                return boxes
            if not (isinstance(box_scores, list) and all(map(shared.is_number, box_scores))):
                raise ValueError("scores are not numbers")
            if len(box_scores) != len(boxes):
                raise ValueError("not as many scores as boxes")
            return [
                box
                for box, box_score in zip(boxes, box_scores, strict=True)
                if score_threshold is None or box_score >= score_threshold
            ]

        found = shared.read_predictions(zip(predictions, scores, strict=True), parse, problems)
        samples = []
        for boxes, targets in zip(found, shared.read_references(references, parse_boxes), strict=True):
            matched = count_matches(boxes, targets) if boxes and targets else 0
            samples.append(
                {
                    "correct": boxes is not None and matched == len(boxes) == len(targets),
                    "answered": boxes is not None and bool(boxes) == bool(targets),
                    "matched": matched,
                    "target": bool(targets),
                }
            )
        without = [sample["answered"] for sample in samples if not sample["target"]]
        results = {
            "pr@f1": shared.mean([sample["correct"] for sample in samples]),
            "n_acc": shared.mean(without),
            "t_acc": shared.mean([sample["answered"] for sample in samples if sample["target"]]),
            "n_no_target": len(without),
        }
        return results, samples


def parse_boxes(value) -> list[list[float]]:
    return shared.parse_list(value, shared.parse_box, "boxes")


def count_matches(boxes: list, targets: list) -> int:
    """The largest number of matches with IoU >= 0.5 in any one-to-one matching."""
    overlaps = box_iou([[box] for box in boxes], [targets]) >= 0.5
    return int(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum())
