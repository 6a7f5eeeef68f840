"""What a model that trains answers by itself: the rows that evaluation asks about, and how an answer is scored."""

import numpy as np
import torch

from perceptiongpt.configuration_perceptiongpt import LOOK_MARKER, VIS_TOKEN
from perceptiongpt.data.schema import DIRECT_TASKS, decode_rle, row_to_messages
from perceptiongpt.inference import answer
from perceptiongpt.signal_box_perceptiongpt import box_iou_and_giou


# Of an answer: it counts; it has as many `<vis>` as it should; it should have one, and that one's box is known; its
# first box has IoU >= 0.5, >= 0.75; it should have one, and that one's mask is known; the IoU of its first mask.
SCORES = ("answers", "emission", "box_targets", "acc@0.5", "acc@0.75", "mask_targets", "mask_miou")


def choose_generation_rows(dataset, count: int):
    """At most `count` rows with direct tasks, evenly spread over the data set."""
    if dataset is None or count < 1:
        return None
    direct = [index for index, task in enumerate(dataset["task"]) if task in DIRECT_TASKS]
    chosen = np.linspace(0, len(direct) - 1, min(count, len(direct))).round().astype(int)
    return dataset.select([direct[index] for index in chosen])


def score_answer(row: dict, result: dict) -> list[float]:
    """The `SCORES` of one answer.

    Args:
        row: the row that was asked about, with its true answer.
        result: the entry of `post_process_generation` with bool masks, in pixels of the original image.
    """
    written = row["messages"][-1]["content"]
    found_again = written.count(VIS_TOKEN + LOOK_MARKER + VIS_TOKEN)  # the same object, which counts once
    expected = written.count(VIS_TOKEN) - found_again
    found = result["objects"]
    scores = dict.fromkeys(SCORES, 0.0) | {"answers": 1.0, "emission": float(len(found) == expected)}
    if expected == 1:
        box, mask = row["boxes"][-1], row["masks"][-1]
        scores["box_targets"], scores["mask_targets"] = float(box is not None), float(mask is not None)
        if found and box is not None:
            iou = float(box_iou_and_giou(*torch.tensor([found[0]["box"], box], dtype=torch.float64))[0])
            scores["acc@0.5"], scores["acc@0.75"] = float(iou >= 0.5), float(iou >= 0.75)
        if found and mask is not None:
            target, mask = decode_rle(mask).astype(bool), np.asarray(found[0]["mask"], dtype=bool)
            scores["mask_miou"] = float((target & mask).sum() / (target | mask).sum())
    return [scores[name] for name in SCORES]


def answer_and_score(model, processor, rows: list[dict], **generate_kwargs) -> list[list[float]]:
    """Let a model answer the last prompt of each row; the `SCORES` of each answer."""
    results = answer(
        model,
        processor,
        [row_to_messages(row)[:-1] for row in rows],
        [(row["height"], row["width"]) for row in rows],
        mask_format="bool",
        **generate_kwargs,
    )
    return [score_answer(row, result) for row, result in zip(rows, results, strict=True)]


def mean_scores(sums: list[float]) -> dict[str, float]:
    """The means over their own counts, of sums of `SCORES`; those without a target are left out."""
    total = dict(zip(SCORES, sums, strict=True))
    counts = {"emission": "answers", "acc@0.5": "box_targets", "acc@0.75": "box_targets", "mask_miou": "mask_targets"}
    return {name: total[name] / total[count] for name, count in counts.items() if total[count]}
