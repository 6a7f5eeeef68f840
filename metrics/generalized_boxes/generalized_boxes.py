"""Generalized referring expression comprehension (GREC): any number of boxes per expression, none included."""

from scipy.optimize import linear_sum_assignment

from perceptiongpt.metrics import shared


class GeneralizedBoxes(shared.StoredMetric):
    description = """Pr@(F1=1, IoU>=0.5): the share of expressions for which predicted and true boxes can be paired
one to one, none left over, with IoU >= 0.5 each; without a target: for which nothing is predicted. And N-acc, T-acc."""
    citation = "He, Ding, Liu, Jiang. GREC: Generalized Referring Expression Comprehension. 2023."
    inputs = """
Args:
    predictions: a list of boxes [x0, y0, x1, y1] per expression; [] says that there is no target. None (no answer) and
        a list with something that is no box are wrong, whatever was asked for.
    references: a list of boxes per expression; empty where there is no target.
    scores: optionally a list of scores per expression, one for each of its boxes.
    score_threshold: boxes that score less are left out; default: none is. (The authors' script takes 0.7; where it was
        not tuned on val it is a fault.)
    per_sample: also return `samples`, with `correct`, `answered` (a target is rightly predicted, or rightly not),
        `matched` (number of pairs) and `target` (is there one) of each.

Returns:
    pr@f1: share of all expressions. n_acc: share of those without a target for which nothing is predicted.
    t_acc: share of those with targets for which something is. None where there are no such expressions.
    n, n_no_target: number of rows, and of those without a target. problems: {reason: number of predictions}.
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
            matched = count_pairs(boxes, targets) if boxes and targets else 0
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


def count_pairs(boxes: list, targets: list) -> int:
    """The most pairs of IoU >= 0.5 that a one-to-one matching has."""
    overlaps = shared.box_iou([[box] for box in boxes], [targets]) >= 0.5
    return int(overlaps[linear_sum_assignment(overlaps, maximize=True)].sum())
