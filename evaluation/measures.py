"""Measures: how the modules of `metrics/` are used. What each gets of a sample, and which numbers come out.

The modules compute the numbers and say what each sample counted (such as intersection and union). From sums of these
columns a number is made again, for its interval and for the comparison of two runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

from perceptiongpt.evaluation.detection import detection_input, detection_tables, images_with_objects
from perceptiongpt.evaluation.intervals import Ratio, WholeSet
from perceptiongpt.evaluation.predictions import (
    Prediction,
    empty_mask,
    marked_phrases,
    plain_text,
    rectangle_mask,
    references,
)
from perceptiongpt.metrics.coco_detection.coco_detection import STATISTICS


BOX_THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]  # of mAcc
MASK_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)  # of Prec@X
GENERALIZED_THRESHOLDS = (0.7, 0.8, 0.9)  # of Pr@X
BLEU_ORDERS = range(1, 5)
HUMAN_ANSWERS = 10  # per question, in VQA v2
FIRST_OBJECT = {"box_accuracy", "referring_iou"}  # look at the first object of an answer alone
TEACHER_FORCED = {"box_accuracy", "referring_iou", "point_accuracy"}  # what a forced `<vis>` of the answer can tell


def columns_of_rows(inputs: list[dict], copies: list[int] | None = None) -> dict[str, list]:
    """One column per key of the inputs."""
    return {key: [one[key] for one in inputs] for key in inputs[0]}


@dataclass(frozen=True)
class Measure:
    """How one module of `metrics/` is used.

    Attributes:
        inputs: (sample, prediction) -> what the module gets for it.
        columns: what the module says of one sample (`per_sample=True`) -> what the sample adds to the sums.
        estimates: result -> how it is made of the sums, or `WholeSet`.
        needs: of `text` and the signals of every object, what a prediction must have; else it counts as missing.
        single: measures only samples with one target.
        arguments: (inputs, copies) -> the columns that the module takes; `copies` as in `detection_tables`.
        support: (inputs, result) -> the number of images that a whole-set result is about; default: all.
        hit, value: what the columns `hit` and `value` are called in reports.

    The column `hit` says whether a sample was right and `value` how good it was: for the running score, the worst cases
    and the comparison. Captions have no `hit`.
    """

    inputs: Callable[[dict, Prediction], dict]
    columns: Callable[[dict], dict[str, float]] | None
    estimates: dict[str, Ratio | WholeSet]
    needs: tuple[str, ...] = ()
    single: bool = False
    arguments: Callable[[list[dict], list[int] | None], dict] = columns_of_rows
    support: Callable[[list[dict], str], int] | None = None
    hit: str = ""
    value: str = ""

    @property
    def ratios(self) -> dict[str, Ratio]:
        return {key: one for key, one in self.estimates.items() if isinstance(one, Ratio)}

    @property
    def whole_set(self) -> dict[str, WholeSet]:
        return {key: one for key, one in self.estimates.items() if isinstance(one, WholeSet)}


# ---- one object ------------------------------------------------------------------------------------------------------


def _first_box(sample, prediction):
    return {"predictions": prediction.first("box") or [], "references": references(sample)[0]["box"]}


def _first_box_columns(row):
    hits = {f"hit@{threshold:.2f}": float(row["iou"] >= threshold) for threshold in BOX_THRESHOLDS}
    values = {"value": row["iou"], "hit": hits["hit@0.50"], "mean_hit": sum(hits.values()) / len(hits)}
    return values | hits


def _first_mask(sample, prediction):
    reference = references(sample)[0]["mask"] or empty_mask(sample)
    return {"predictions": prediction.first("mask"), "references": reference, "ignore": sample["ignore"]}


def _first_mask_columns(row):
    hits = {f"hit@{threshold}": float(row["iou"] > threshold) for threshold in MASK_THRESHOLDS}
    sums = {name: float(row[name]) for name in ("intersection", "union")}
    return {"value": row["iou"], "hit": hits["hit@0.5"], **sums, **hits}


# ---- several objects -------------------------------------------------------------------------------------------------


def _masks(sample, prediction):
    return {"predictions": prediction.all("mask"), "references": _reference_masks(sample)}


def _reference_masks(sample):
    return [one["mask"] or empty_mask(sample) for one in references(sample)]


def _generalized_columns(row):
    columns = {name: float(row[name]) for name in ("intersection", "union")} | _answered_columns(row)
    columns |= {"value": row["iou"], "hit": float(row["iou"] > 0.5)}
    hits = {f"hit@{limit}": float(row["target"] and row["iou"] >= limit) for limit in GENERALIZED_THRESHOLDS}
    return columns | hits


def _answered_columns(row):
    target, answered = bool(row["target"]), bool(row["answered"])
    return {
        "target": float(target),
        "no_target": float(not target),
        "target_answered": float(target and answered),
        "no_target_answered": float(not target and answered),
    }


def _boxes(sample, prediction):
    return {"predictions": prediction.all("box"), "references": [one["box"] for one in references(sample)]}


def _boxes_columns(row):
    return {"hit": float(row["correct"]), "value": float(row["correct"]), **_answered_columns(row)}


def _points(sample, prediction):
    return {"predictions": prediction.all("point"), "references": _reference_masks(sample)}


def _points_columns(row):
    counts = {name: float(row[name]) for name in ("matched", "predicted", "annotated")}
    return counts | {"value": row["share"], "hit": float(row["share"] == 1)}


# ---- text ------------------------------------------------------------------------------------------------------------


def _reference_text(sample):
    return plain_text(sample["answers"][0]["content"])


def _question(sample, prediction):
    text, reference = prediction.text or "", _reference_text(sample)
    if sample["task"] == "grounded_vqa":  # "the red cup: Two."
        text, reference = (part.rpartition(":")[2].strip().rstrip(".") for part in (text, reference))
    return {"predictions": text, "references": sample["human_answers"] or [reference] * HUMAN_ANSWERS}


def _question_columns(row):
    return {"value": row["accuracy"], "hit": float(row["accuracy"] >= 0.5)}


def _yes_no(sample, prediction):
    return {"predictions": prediction.text or "", "references": _reference_text(sample).lower().rstrip(".")}


def _yes_no_columns(row):
    columns, positive = {"value": float(row["correct"])}, row["reference"] == "yes"
    for prefix in ("", "strict_"):
        correct = row[f"{prefix}correct"]
        claimed = correct == positive  # a wrong answer to a no counts as a yes, whatever it says
        parts = {"hit": correct, "yes": row[f"{prefix}answer"] == "yes", "right": correct and positive}
        parts |= {"claimed": claimed, "positive": positive, "twice_right": 2 * (correct and positive)}
        parts |= {"claimed_or_positive": claimed + positive}
        columns |= {f"{prefix}{name}": float(value) for name, value in parts.items()}
    return columns


def _yes_no_estimates(prefix):
    return {
        f"{prefix}accuracy": Ratio(f"{prefix}hit"),
        f"{prefix}precision": Ratio(f"{prefix}right", f"{prefix}claimed"),
        f"{prefix}recall": Ratio(f"{prefix}right", f"{prefix}positive"),
        f"{prefix}f1": Ratio(f"{prefix}twice_right", f"{prefix}claimed_or_positive"),
        f"{prefix}yes_ratio": Ratio(f"{prefix}yes"),
    }


def _description(sample, prediction):
    return {"predictions": prediction.text or "", "references": _reference_text(sample)}


def _description_columns(row):
    columns = {name: float(value) for name, value in row.items()}
    return columns | {"hit": columns["right"], "value": columns["right"]}


def _caption(sample, prediction):
    texts = [plain_text(answer["content"]) for answer in sample["answers"]]
    return {"predictions": prediction.text or "", "references": texts}


def _caption_columns(row):
    return {"value": row["cider"], "rouge_l": row["rouge_l"]}


def _grounded(sample, prediction):
    wanted = references(sample)
    as_boxes = all(one["mask"] is None for one in wanted)  # then both sides are compared as filled rectangles

    def area(one):
        mask = one["box"] and rectangle_mask(sample, one["box"]) if as_boxes else one["mask"]
        return mask or empty_mask(sample)

    phrases = [phrase or "" for answer in sample["answers"] for phrase in marked_phrases(answer["content"])]
    found = {
        "caption": prediction.text or "",
        "phrases": [one["phrase"] for one in prediction.objects],
        "masks": [area(one) for one in prediction.objects],
        "scores": [one["score"] if as_boxes else one["mask_score"] for one in prediction.objects],
    }
    reference = {
        "caption": [plain_text(answer["content"]) for answer in sample["answers"]],
        "phrases": phrases[: len(wanted)],
        "masks": [area(one) for one in wanted],
    }
    return {"predictions": found, "references": reference}


def _grounded_columns(row):
    columns = {name: float(row[name]) for name in ("matched", "matched_iou", "annotated")}
    columns |= {"hit": float(row["matched"] == row["annotated"] == row["predicted"])}
    return columns | {"value": row["matched"] / max(row["annotated"], row["predicted"], 1)}


def _images_with_masks(inputs, key):
    return sum(bool(given["references"]["masks"]) for given in inputs) if key == "ap50" else len(inputs)


# ---- table -----------------------------------------------------------------------------------------------------------


MEASURES = {
    "box_accuracy": Measure(
        _first_box,
        _first_box_columns,
        {
            "acc@0.5": Ratio("hit@0.50"),
            "acc@0.75": Ratio("hit@0.75"),
            "acc@0.9": Ratio("hit@0.90"),
            "macc": Ratio("mean_hit"),
            "miou": Ratio("value"),
        },
        needs=("box",),
        single=True,
        hit="acc@0.5",
        value="box IoU",
    ),
    "referring_iou": Measure(
        _first_mask,
        _first_mask_columns,
        {"ciou": Ratio("intersection", "union"), "miou": Ratio("value")}
        | {f"prec@{threshold}": Ratio(f"hit@{threshold}") for threshold in MASK_THRESHOLDS},
        needs=("mask",),
        single=True,
        hit="prec@0.5",
        value="mask IoU",
    ),
    "generalized_referring": Measure(
        _masks,
        _generalized_columns,
        {
            "giou": Ratio("value"),
            "ciou": Ratio("intersection", "union"),
            "n_acc": Ratio("no_target_answered", "no_target"),
            "t_acc": Ratio("target_answered", "target"),
            **{f"pr@{threshold}": Ratio(f"hit@{threshold}", "target") for threshold in GENERALIZED_THRESHOLDS},
        },
        needs=("mask",),
        hit="mask IoU > 0.5",
        value="mask IoU",
    ),
    "generalized_boxes": Measure(
        _boxes,
        _boxes_columns,
        {
            "pr@f1": Ratio("hit"),
            "n_acc": Ratio("no_target_answered", "no_target"),
            "t_acc": Ratio("target_answered", "target"),
        },
        needs=("box",),
        hit="pr@f1",
        value="pr@f1",
    ),
    "point_accuracy": Measure(
        _points,
        _points_columns,
        {
            "points_in_mask": Ratio("value"),
            "precision": Ratio("matched", "predicted"),
            "recall": Ratio("matched", "annotated"),
        },
        needs=("point",),
        hit="points_in_mask",
        value="points in mask",
    ),
    "vqa_accuracy": Measure(
        _question,
        _question_columns,
        {"accuracy": Ratio("value")},
        needs=("text",),
        hit="accuracy >= 0.5",
        value="accuracy",
    ),
    "pope": Measure(
        _yes_no,
        _yes_no_columns,
        _yes_no_estimates("") | _yes_no_estimates("strict_"),
        needs=("text",),
        hit="accuracy",
        value="accuracy",
    ),
    "attributes_right": Measure(
        _description,
        _description_columns,
        {"attributes_right": Ratio("right"), "own_attributes_right": Ratio("own_right")}
        | {f"{kind}_right": Ratio(f"{kind}_right") for kind in ("color", "pattern", "shape")},
        needs=("text",),
        hit="attributes_right",
        value="attributes right",
    ),
    "caption_scores": Measure(
        _caption,
        _caption_columns,
        {"cider": WholeSet(highest=None), "rouge_l": Ratio("rouge_l"), "meteor": WholeSet()}
        | {f"bleu{order}": WholeSet() for order in BLEU_ORDERS},
        needs=("text",),
        hit="answered",
        value="CIDEr",
    ),
    "grounded_caption": Measure(
        _grounded,
        _grounded_columns,
        {
            "cider": WholeSet(highest=None),
            "meteor": WholeSet(),
            "ap50": WholeSet(),
            "miou": Ratio("matched_iou", "matched"),
            "recall": Ratio("matched", "annotated"),
        },
        needs=("text",),
        support=_images_with_masks,
        hit="answered",
        value="phrases found",
    ),
    "coco_detection": Measure(
        detection_input,
        None,
        {f"{kind}_{name}": WholeSet() for kind in ("bbox", "segm") for name in STATISTICS},
        needs=("box",),
        arguments=detection_tables,
        support=images_with_objects,
        hit="answered",
    ),
}


def metrics_without_reference(metrics: dict, samples: list[dict]) -> dict[str, str]:
    """{metric: why it cannot be measured}: it needs masks, and the annotations have none."""
    masks = [one["mask"] is not None for sample in samples for one in references(sample)]
    if not masks or any(masks):
        return {}
    needed = {"mask", "point"}  # a point is compared with a mask
    return {name: "the annotations have no masks" for name in metrics if needed & set(MEASURES[name].needs)}
