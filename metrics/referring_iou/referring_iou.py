"""Referring expression segmentation: one mask per expression."""

from pycocotools import mask as coco_mask

from perceptiongpt.metrics import shared


class ReferringIoU(shared.StoredMetric):
    description = """cIoU (sum of intersections over sum of unions, also called oIoU), mIoU (mean IoU of the
expressions) and Prec@X, the share of expressions with IoU > X, on the pixels of the original image."""
    inputs = """
Args:
    predictions: a mask per expression as COCO RLE {"size": [height, width], "counts": str, bytes or list}, or None. A
        mask that is missing, broken or of another size than its reference counts as a mask without pixels.
    references: a mask (RLE) per expression. If neither mask has a pixel, the IoU is 0.
    ignore: optionally a mask (RLE) or None per expression; its pixels are removed from both masks.
    per_sample: also return `samples`, with the `intersection`, `union` and `iou` of each.

Returns:
    ciou (0 if no mask has a pixel), miou, prec@0.5, ..., prec@0.9: shares, None if there are no rows.
    n: number of rows. problems: {reason: number of predictions}.
"""
    optional = ("ignore",)

    def score(self, predictions, references, ignore, problems):
        references = shared.read_references(references, shared.parse_mask)
        ignore = shared.read_references(ignore, lambda value: value if value is None else shared.parse_mask(value))
        samples = []
        for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):

            def parse(value, size=reference["size"]):
                mask = shared.parse_mask(value)
                if mask["size"] != size:
                    raise ValueError("mask of another size than its reference")
                return mask

            (mask,) = shared.read_predictions([prediction], parse, problems)
            if ignore[index] is not None:
                kept = invert(ignore[index])
                mask, reference = (part and coco_mask.merge([part, kept], intersect=True) for part in (mask, reference))
            intersection, union = shared.intersection_union(mask, reference)
            samples.append({"intersection": intersection, "union": union, "iou": intersection / max(union, 1)})
        ious = [sample["iou"] for sample in samples]
        union = sum(sample["union"] for sample in samples)
        results = {"ciou": sum(sample["intersection"] for sample in samples) / max(union, 1) if samples else None}
        results["miou"] = shared.mean(ious)
        for limit in (0.5, 0.6, 0.7, 0.8, 0.9):
            results[f"prec@{limit}"] = shared.share(sum(iou > limit for iou in ious), len(ious))
        return results, samples


def invert(mask: dict) -> dict:
    """The mask of all other pixels."""
    return coco_mask.encode(1 - coco_mask.decode(mask))
