"""Generalized referring expression segmentation (gRefCOCO): any number of targets per expression, none included."""

from perceptiongpt.metrics import shared


class GeneralizedReferring(shared.StoredMetric):
    description = """gIoU, cIoU, N-acc, T-acc and Pr@X of gRefCOCO. The masks of a sample are merged into one. Without
a target, predicting nothing has IoU 1 and adds nothing to cIoU, and predicting something has IoU 0 and adds its pixels
to the union. With targets, predicting nothing has IoU 0 and adds their pixels to the union."""
    citation = "Liu, Ding, Jiang. GRES: Generalized Referring Expression Segmentation. CVPR 2023."
    inputs = """
Args:
    predictions: a list of masks per expression as COCO RLE; [] means that there is no target. None (no answer) and a
        list with a broken mask, or with one of another size than the references, are always wrong.
    references: a list of masks (RLE) per expression; empty where there is no target.
    per_sample: also return `samples`, with the `intersection`, `union`, `iou`, `target` (whether there is one) and
        `answered` (whether a target is predicted exactly where there is one) of each.

Returns:
    giou: mean IoU of all samples. ciou: sum of intersections over sum of unions.
    n_acc: share of the samples without a target for which none is predicted.
    t_acc: share of the samples with targets for which some are predicted.
    pr@0.7, pr@0.8, pr@0.9: share of the samples with targets that have IoU >= X (as ReLA's script has it).
    Each is None if there are no such samples, or no pixels.
    n, n_no_target: number of rows, and of rows without a target. problems: {reason: number of predictions}.
"""

    def score(self, predictions, references, problems):
        references = shared.read_references(references, parse_masks)
        samples = []
        for prediction, reference in zip(predictions, references, strict=True):
            target = shared.mask_area(shared.join_masks(reference)) > 0

            def parse(value, size=reference and reference[0]["size"]):
                masks = parse_masks(value)
                if size and masks and masks[0]["size"] != size:
                    raise ValueError("mask of another size than its reference")
                return masks

            (masks,) = shared.read_predictions([prediction], parse, problems)
            answered = masks is not None and bool(masks) == target
            intersection, union = shared.intersection_union(
                shared.join_masks(masks or []), shared.join_masks(reference)
            )
            iou = intersection / union if union else float(answered and not target)
            samples.append(
                {"intersection": intersection, "union": union, "iou": iou, "target": target, "answered": answered}
            )
        with_target = [sample for sample in samples if sample["target"]]
        without = [sample for sample in samples if not sample["target"]]
        results = {
            "giou": shared.mean([sample["iou"] for sample in samples]),
            "ciou": shared.share(*(sum(sample[part] for sample in samples) for part in ("intersection", "union"))),
            "n_acc": shared.mean([sample["answered"] for sample in without]),
            "t_acc": shared.mean([sample["answered"] for sample in with_target]),
        }
        for limit in (0.7, 0.8, 0.9):
            results[f"pr@{limit}"] = shared.mean([sample["iou"] >= limit for sample in with_target])
        return results | {"n_no_target": len(without)}, samples


def parse_masks(value) -> list[dict]:
    masks = shared.parse_list(value, shared.parse_mask, "masks")
    shared.join_masks(masks)
    return masks
