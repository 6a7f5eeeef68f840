"""Grounded captions: each phrase of the caption has a mask."""

import numpy as np
from pycocotools import mask as coco_mask

from perceptiongpt.metrics import shared
from perceptiongpt.metrics.caption_scores.caption_scores import score_captions
from perceptiongpt.metrics.coco_detection.coco_detection import evaluate_kind


class GroundedCaption(shared.StoredMetric):
    description = """Grounded caption generation: CIDEr-D (and METEOR if Java is installed) of the captions, AP50 of the
masks whatever their phrases, mean IoU of matched masks, and recall. Masks are matched one to one, the pair with the
highest IoU first, down to IoU 0.5. GLaMM defines recall and mIoU otherwise (similar phrases, means over images), so its
numbers do not compare."""
    citation = "Rasheed et al. GLaMM: Pixel Grounding Large Multimodal Model. CVPR 2024."
    inputs = """
Args:
    predictions: {"caption": text, "phrases": list of texts, "masks": a COCO RLE or None per phrase, "scores": a number
        per phrase (optional; default: all equal)} per image. A missing caption counts as an empty one; a missing or
        broken mask matches nothing but counts as a detection in AP50.
    references: the same per image, without scores; `caption` may be a list of captions.
    tokenizer, meteor: as in `caption_scores`.
    per_sample: also return `samples`, with `cider`, `matched`, `predicted`, `annotated` (numbers of masks) and
            `matched_iou` (the sum over the matches) of each.

Returns:
    cider, meteor (if Java is installed), tokenizer: of the captions. ap50: of all masks as one category.
    miou: mean IoU of all matches, 0 if there are none. recall: matches per reference mask.
    ap50, miou and recall are None if no image has a reference mask.
    n: number of rows. problems: {reason: number of predictions or of their masks}.
"""

    def score(self, predictions, references, problems, tokenizer: str | None = None, meteor: bool | None = None):
        references = shared.read_references(references, parse_reference)
        predictions = shared.read_predictions(predictions, parse_prediction, problems)
        captions, annotations, results, ious, samples = [], [], [], [], []
        for index, (prediction, (_, true_masks)) in enumerate(zip(predictions, references, strict=True)):
            caption, masks, scores = prediction or ("", [], [])
            if prediction is not None and not caption.strip():
                problems["missing caption"] += 1
            captions.append(caption)
            masks = shared.read_predictions(masks, shared.parse_mask, problems)
            size = next((mask["size"] for mask in [*true_masks, *masks] if mask), [1, 1])
            for place, mask in enumerate(masks):
                if mask is None or mask["size"] != size:
                    if mask is not None:
                        problems["mask of another size than the image"] += 1
                    masks[place] = shared.empty_mask(size)
            matched = match_greedily(masks, true_masks)
            ious += matched
            sample = {"matched": len(matched), "predicted": len(masks), "annotated": len(true_masks)}
            samples.append(sample | {"matched_iou": sum(matched)})
            common = {"image_id": index, "category_id": 1}
            results += [
                common | {"segmentation": mask, "score": score} for mask, score in zip(masks, scores, strict=True)
            ]
            annotations += [common | {"segmentation": mask, "iscrowd": 0} for mask in true_masks]
        texts, per_caption = score_captions(captions, [human for human, _ in references], tokenizer, meteor)
        for number, annotation in enumerate(annotations, 1):
            mask = annotation["segmentation"]
            annotation |= {"id": number, "area": shared.mask_area(mask), "bbox": coco_mask.toBbox(mask).tolist()}
        dataset = {"images": [{"id": index, "height": 0, "width": 0} for index in range(len(samples))]}
        dataset |= {"categories": [{"id": 1}], "annotations": annotations}
        statistics, _ = evaluate_kind(dataset, results, "segm")
        found = {
            "ap50": statistics["ap50"],
            "miou": (shared.mean(ious) or 0.0) if annotations else None,
            "recall": shared.share(len(ious), len(annotations)),
        }
        samples = [{"cider": text["cider"]} | sample for text, sample in zip(per_caption, samples, strict=True)]
        return {name: texts[name] for name in ("cider", "meteor", "tokenizer") if name in texts} | found, samples


def parse_prediction(value) -> tuple[str, list, list[float]]:
    """(caption, unchecked masks, scores)."""
    if value is None:
        raise ValueError("missing")
    if not isinstance(value, dict):
        raise ValueError("not a dict with caption, phrases, masks and scores")
    caption, masks = value.get("caption") or "", value.get("masks") or []
    phrases, scores = value.get("phrases", masks), value.get("scores")
    scores = [1.0] * len(masks) if scores is None else scores
    if not isinstance(caption, str):
        raise ValueError("caption is not text")
    if not all(isinstance(part, list) and len(part) == len(masks) for part in (masks, phrases, scores)):
        raise ValueError("phrases, masks and scores are not lists of one length")
    if not all(map(shared.is_number, scores)):
        raise ValueError("scores are not numbers")
    return caption, masks, scores


def parse_reference(value) -> tuple[list[str], list[dict]]:
    """(captions, masks)."""
    caption, masks, _ = parse_prediction(value | {"caption": ""} if isinstance(value, dict) else value)
    captions = value["caption"] if isinstance(value.get("caption"), list) else [value.get("caption")]
    if not captions or not all(isinstance(text, str) and text.strip() for text in captions):
        raise ValueError("caption is neither text nor a list of texts")
    masks = [shared.parse_mask(mask) for mask in masks]
    shared.join_masks(masks)
    return captions, masks


def match_greedily(masks: list[dict], targets: list[dict]) -> list[float]:
    """IoU of each match (IoU >= 0.5), the highest first; among equals the first mask, then the first target."""
    if not masks or not targets:
        return []
    overlaps, matched = coco_mask.iou(masks, targets, [0] * len(targets)), []
    while overlaps.max() >= 0.5:
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        matched.append(float(overlaps[row, column]))
        overlaps[row, :] = overlaps[:, column] = -1
    return matched
