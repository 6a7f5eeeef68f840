"""Predictions against references: what each metric module gets, what each sample counts, intervals and calibration.

The modules of `metrics/` compute the numbers, and say what each sample counted (such as intersection and union). From
sums of that a number is made again: for its 95 % interval, and for the comparison of two runs.
"""

import contextlib
import io
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval, Params

from perceptiongpt import metrics
from perceptiongpt.configuration_perceptiongpt import PHRASE_END_TOKEN, PHRASE_START_TOKEN, VIS_TOKEN
from perceptiongpt.metrics.caption_scores.caption_scores import start_meteor, tokenize_ptb, tokenize_python
from perceptiongpt.metrics.coco_detection.coco_detection import STATISTICS
from perceptiongpt.metrics.shared import box_iou, is_number, parse_box, parse_mask
from perceptiongpt.metrics.shared import empty_mask as mask_without_pixels


TEACHER_FORCED = {"box_accuracy", "referring_iou"}
WHOLE_SET = {"caption_scores", "grounded_caption", "coco_detection"}  # say nothing of one sample before all are known
BOX_THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]
MASK_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
GENERALIZED_THRESHOLDS = (0.7, 0.8, 0.9)
RESAMPLES = 1000
AP_RESAMPLES = 200
BLEU_ORDERS = 4
# METEOR 1.5's parameters for English: recall's weight, the penalty's power and weight, the weight of content words, and
# those of the kinds of matches (exact, stem, synonym, paraphrase). Its statistics come in this order.
METEOR_ALPHA, METEOR_BETA, METEOR_GAMMA, METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
METEOR_KINDS = (1.0, 0.6, 0.8, 0.6)
METEOR_STATISTICS = ("length", "reference_length", "function", "reference_function") + tuple(
    f"{name}{kind}"
    for kind in range(len(METEOR_KINDS))
    for name in ("content_match", "reference_content_match", "function_match", "reference_function_match")
) + ("chunks", "matches", "reference_matches")  # fmt: skip
LEAST_PICTURES = 10  # with fewer, intervals take samples as independent
SAME = 1e-6  # numbers no further apart are equal: different batches round differently
CALIBRATION_BINS = 10
DECISION_THRESHOLDS = 101
BENCH_SIDES = (("< 16", 0, 16), ("16-32", 16, 32 + 1e-9), ("> 32", 32 + 1e-9, math.inf))
SMALLEST_EXACT_SIDE = 16  # Acc@0.9 of the scenes bench counts sides from here on
Z95 = 1.959964
DETECTION_ESTIMATES = [f"{kind}_{name}" for kind in ("bbox", "segm") for name in STATISTICS]


# ---- samples and predictions -----------------------------------------------------------------------------------------


def targets(sample: dict) -> list[tuple]:
    """(box, mask) of everything that the true answers point at; of several answers each thing once."""
    found = {}
    for answer in sample["answers"]:
        for box, mask in zip(answer["boxes"], answer["masks"], strict=True):
            key = (tuple(box or ()), mask and mask["counts"]) if len(sample["answers"]) > 1 else len(found)
            found.setdefault(key, (tight_box(mask) if box is None else box, mask))
    return list(found.values())


def tight_box(mask: dict) -> list[float]:
    """xyxy of an RLE's pixels."""
    x, y, width, height = coco_mask.toBbox(mask).tolist()
    return [x, y, x + width, y + height]


def plain_text(content: str) -> str:
    """An answer without its markers."""
    for token in (VIS_TOKEN, PHRASE_START_TOKEN, PHRASE_END_TOKEN):
        content = content.replace(token, "")
    return " ".join(content.split())


def marked_phrases(content: str) -> list[str | None]:
    """The phrase before each `<vis>` of an answer; None for a bare one."""
    phrases, phrase = [], None
    for part in content.split(PHRASE_START_TOKEN):
        if PHRASE_END_TOKEN in part:
            phrase, part = part.split(PHRASE_END_TOKEN, 1)
        for piece in part.split(VIS_TOKEN)[:-1]:
            phrase = None if piece.strip() else phrase
            phrases.append(phrase)
    return phrases


def empty_mask(sample: dict) -> dict:
    """An RLE without pixels, of the picture's size."""
    return text_rle(mask_without_pixels([sample["height"], sample["width"]]))


def rectangle_mask(sample: dict, box: list[float]) -> dict:
    """A box as an RLE: the pixels whose centres lie in it."""
    mask = np.zeros((sample["height"], sample["width"]), dtype=np.uint8, order="F")
    x0, y0, x1, y1 = (max(math.ceil(side - 0.5), 0) for side in box)
    mask[y0:y1, x0:x1] = 1
    return text_rle(coco_mask.encode(mask))


def text_rle(rle: dict) -> dict:
    """pycocotools' RLE with a string in place of bytes."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


@dataclass
class Prediction:
    """A checked prediction.

    Attributes:
        text: the answer, None if there is none.
        objects: those that score enough: `box` and `mask` (None where missing or malformed), `score`, `mask_score`,
            `phrase`.
        emitted: how many objects there were at all.
        reason: why something that is needed is missing or malformed, or None.
        failed: there is no answer that could be right, not even "there is none".
    """

    text: str | None = None
    objects: list[dict] = field(default_factory=list)
    emitted: int = 0
    reason: str | None = None
    failed: bool = False

    def first(self, name: str):
        return self.objects[0][name] if self.objects else None


def check_prediction(sample: dict, entry: dict | None, threshold: float, needs: set[str]) -> Prediction:
    """Read one line of a predictions file, whoever wrote it. Nothing in it raises: it gets a reason instead.

    Args:
        sample: what was asked.
        entry: its line, or None.
        threshold: objects that score less are left out.
        needs: what has to be there: `text`, and `box` and `mask` of every object.
    """
    if entry is None:
        return Prediction(reason="no prediction", failed=True)
    if entry.get("error"):
        return Prediction(reason=str(entry["error"]).split(":")[0], failed=True)
    text = entry.get("text")
    found = Prediction(text if isinstance(text, str) else None)
    objects = entry.get("objects", [])
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        return Prediction(found.text, reason="malformed list of objects", failed=True)
    found.emitted = len(objects)
    for one in objects:
        scores = [1.0 if one.get("score") is None else one["score"]]
        scores.append(scores[0] if one.get("mask_score") is None else one["mask_score"])
        if not all(map(is_number, scores)):
            found.reason = found.reason or "malformed score: not a number"
            one, scores = {"phrase": one.get("phrase")}, [max(threshold, 0.0)] * 2  # finds nothing
        elif scores[0] < threshold:
            continue
        box, box_reason = _checked(one.get("box"), "box", parse_box)
        mask, mask_reason = _checked(one.get("mask"), "mask", lambda value: _parse_mask(value, sample))
        reasons = [reason for kind, reason in (("box", box_reason), ("mask", mask_reason)) if kind in needs]
        found.reason = found.reason or next(filter(None, reasons), None)
        phrase = one.get("phrase")
        found.objects.append(
            {
                "box": box,
                "mask": mask,
                "score": float(scores[0]),
                "mask_score": float(scores[1]),
                "phrase": phrase if isinstance(phrase, str) else "",
            }
        )
    if found.reason is None and targets(sample) and not found.objects:
        if objects:
            found.reason = "every object below the threshold"
        elif (found.text or "").startswith("There is no"):
            found.reason = "answered that there is none"
        else:
            found.reason = "no <vis> in the answer" if entry.get("finished", True) else "cut off before any <vis>"
    if found.reason is None and "text" in needs and not (found.text or "").strip():
        found.reason = "no text in the answer"
    return found


def _checked(value, kind: str, parse: Callable) -> tuple:
    """(parsed value or None, why it is None or finds nothing)."""
    if value is None:
        return None, f"object without {kind}"
    try:
        parsed = parse(value)
    except ValueError as error:
        return None, f"malformed {kind}: {error}"
    is_empty = kind == "mask" and coco_mask.area(parsed) == 0
    return parsed, "mask without pixels" if is_empty else None


def _parse_mask(value, sample: dict) -> dict:
    mask = parse_mask(value)
    if mask["size"] != [sample["height"], sample["width"]]:
        raise ValueError("of another size than the picture")
    return mask if isinstance(mask["counts"], str) else text_rle(mask)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def ratio(numerator: str, denominator: str = "one", within_one: bool = True) -> Callable[[dict], np.ndarray]:
    """An estimate: the sum of a column over the sum of another; `within_one`: no sample's part is above 1."""

    def estimate(sums: dict) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.divide(sums[numerator], sums[denominator])

    estimate.columns, estimate.is_ratio, estimate.within_one = (numerator, denominator), True, within_one
    return estimate


def bleu(order: int) -> Callable[[dict], np.ndarray]:
    """The estimate of BLEU up to n-grams of this order, from `bleu_columns`."""

    def estimate(sums: dict) -> np.ndarray:
        shares = [(sums[f"correct{n}"] + 1e-15) / (sums[f"guess{n}"] + 1e-9) for n in range(1, order + 1)]
        short = np.minimum(1 - sums["reference"] / np.maximum(sums["length"], 1e-9), 0)
        return np.exp(short) * np.prod(shares, axis=0) ** (1 / order)

    counts = (f"{name}{n}" for name in ("correct", "guess") for n in range(1, order + 1))
    estimate.columns, estimate.is_ratio, estimate.within_one = ("length", "reference", *counts), False, True
    return estimate


def meteor(sums: dict) -> np.ndarray:
    """The estimate of METEOR of a set, from `meteor_columns`: as the Java program makes it of the summed statistics."""
    sums = {name: sums[f"meteor_{name}"] for name in METEOR_STATISTICS}
    shares = []
    for side in ("", "reference_"):
        words, function = sums[f"{side}length"], sums[f"{side}function"]
        matched = sum(
            weight * (METEOR_DELTA * sums[f"{side}content_match{kind}"]
                      + (1 - METEOR_DELTA) * sums[f"{side}function_match{kind}"])
            for kind, weight in enumerate(METEOR_KINDS)
        )  # fmt: skip
        weighted = METEOR_DELTA * (words - function) + (1 - METEOR_DELTA) * function
        shares.append(matched / np.maximum(weighted, 1e-9))
    precision, recall = shares
    mean = precision * recall / np.maximum(METEOR_ALPHA * precision + (1 - METEOR_ALPHA) * recall, 1e-9)
    fragments = sums["chunks"] / np.maximum((sums["matches"] + sums["reference_matches"]) / 2, 1e-9)
    return mean * (1 - METEOR_GAMMA * fragments**METEOR_BETA)


meteor.columns, meteor.is_ratio = tuple(f"meteor_{name}" for name in METEOR_STATISTICS), False
meteor.within_one = True


@dataclass(frozen=True)
class Metric:
    """How `validate.py` uses one module of `metrics/`.

    Attributes:
        inputs: (sample, prediction) -> what the module takes for it: `predictions`, `references` and others. Without
            `columns`: the sample's part of `detection_tables`.
        columns: what the module says of one sample (`per_sample=True`) -> what the sample adds to the sums.
        more: (inputs of all samples, the module's results) -> further columns of each.
        estimates: result key -> function of the summed columns. Its attributes: `columns` (it is left out where these
            are missing), `is_ratio` (of the first to the second) and `within_one` (it lies between 0 and 1).
        detections: result key -> name among `detection_estimates`, of what is AP or AR.
        piece: what `inputs` gives -> what the sample adds to these (`detection_tables`).
        needs: of `text`, `box` and `mask`, what a prediction must have not to be a missing one.
        single: measures only samples with one target.
        hit, value: what the columns of these names are, for people.

    The column `hit` says whether a sample was right, `value` how good it was: for the running score, the worst cases
    and `--compare`. Captions have no `hit`.
    """

    inputs: Callable[[dict, Prediction], dict]
    columns: Callable[[dict], dict[str, float]] | None
    estimates: dict[str, Callable[[dict], np.ndarray]]
    needs: tuple[str, ...] = ()
    single: bool = False
    more: Callable[[list[dict], dict], list[dict]] | None = None
    detections: dict[str, str] = field(default_factory=dict)
    piece: Callable[[dict], dict] | None = None
    hit: str = ""
    value: str = ""


def _first_box(sample, prediction):
    return {"predictions": prediction.first("box") or [], "references": targets(sample)[0][0]}


def _first_box_columns(row):
    hits = {f"hit@{threshold:.2f}": float(row["iou"] >= threshold) for threshold in BOX_THRESHOLDS}
    values = {"value": row["iou"], "hit": hits["hit@0.50"], "mean_hit": sum(hits.values()) / len(hits)}
    return values | hits


def _first_mask(sample, prediction):
    reference = targets(sample)[0][1] or empty_mask(sample)
    return {"predictions": prediction.first("mask"), "references": reference, "ignore": sample["ignore"]}


def _first_mask_columns(row):
    hits = {f"hit@{threshold}": float(row["iou"] > threshold) for threshold in MASK_THRESHOLDS}
    sums = {name: float(row[name]) for name in ("intersection", "union")}
    return {"value": row["iou"], "hit": hits["hit@0.5"], **sums, **hits}


def _masks(sample, prediction):
    found = None if prediction.failed else [one["mask"] for one in prediction.objects]
    return {"predictions": found, "references": [mask or empty_mask(sample) for _, mask in targets(sample)]}


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
    found = None if prediction.failed else [one["box"] for one in prediction.objects]
    return {"predictions": found, "references": [box for box, _ in targets(sample)]}


def _boxes_columns(row):
    return {"hit": float(row["correct"]), "value": float(row["correct"]), **_answered_columns(row)}


def _question(sample, prediction):
    text, reference = prediction.text or "", plain_text(sample["answers"][0]["content"])
    if sample["task"] == "grounded_vqa":  # "the red cup: Two."
        text, reference = (part.rpartition(":")[2].strip().rstrip(".") for part in (text, reference))
    return {"predictions": text, "references": sample["ten"] or [reference] * 10}


def _question_columns(row):
    return {"value": row["accuracy"], "hit": float(row["accuracy"] >= 0.5)}


def _yes_no(sample, prediction):
    label = plain_text(sample["answers"][0]["content"]).lower().rstrip(".")
    return {"predictions": prediction.text or "", "references": label}


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


def yes_no_estimates(prefix: str) -> dict[str, Callable[[dict], np.ndarray]]:
    """The estimates of `pope` in one reading."""
    return {
        f"{prefix}accuracy": ratio(f"{prefix}hit"),
        f"{prefix}precision": ratio(f"{prefix}right", f"{prefix}claimed"),
        f"{prefix}recall": ratio(f"{prefix}right", f"{prefix}positive"),
        f"{prefix}f1": ratio(f"{prefix}twice_right", f"{prefix}claimed_or_positive"),
        f"{prefix}yes_ratio": ratio(f"{prefix}yes"),
    }


def _caption(sample, prediction):
    references = [plain_text(answer["content"]) for answer in sample["answers"]]
    return {"predictions": prediction.text or "", "references": references}


def _caption_columns(row):
    return {"value": row["cider"], "rouge_l": row["rouge_l"]}


def caption_columns(inputs: list[dict], values: dict) -> list[dict[str, float]]:
    """`bleu_columns` and, where METEOR was computed, `meteor_columns` of each caption."""
    pairs = [(one["predictions"], one["references"]) for one in inputs]
    return _word_columns(pairs, values, (bleu_columns, meteor_columns) if "meteor" in values else (bleu_columns,))


def grounded_columns(inputs: list[dict], values: dict) -> list[dict[str, float]]:
    """`meteor_columns` of each caption, where METEOR was computed."""
    pairs = [(one["predictions"]["caption"], one["references"]["caption"]) for one in inputs]
    return _word_columns(pairs, values, (meteor_columns,) if "meteor" in values else ())


def _word_columns(pairs: list[tuple], values: dict, kinds: tuple[Callable, ...]) -> list[dict[str, float]]:
    """Columns of each (caption, references), split into words as the module did."""
    if not kinds:
        return [{} for _ in pairs]
    tokenize = {"ptb": tokenize_ptb, "python": tokenize_python}[values["tokenizer"]]
    captions = tokenize([caption for caption, _ in pairs])
    words = iter(tokenize([text for _, references in pairs for text in references]))
    rows = []
    for caption, (_, references) in zip(captions, pairs, strict=True):
        references = [next(words) for _ in references]
        row = {name: value for columns in kinds for name, value in columns(caption, references).items()}
        rows.append({name: float(value) for name, value in row.items()})
    return rows


def bleu_columns(caption: str, references: list[str]) -> dict[str, float]:
    """What BLEU sums up of a caption: n-grams that are right (`correct1` ..), all (`guess1` ..), and lengths."""
    counts = BleuScorer(caption, references).ctest[0]
    length = counts["testlen"]
    row = {"length": length, "reference": min((abs(other - length), other) for other in counts["reflen"])[1]}
    for order in range(BLEU_ORDERS):
        row |= {f"{name}{order + 1}": counts[name][order] for name in ("correct", "guess")}
    return row


def meteor_columns(caption: str, references: list[str]) -> dict[str, float]:
    """What METEOR sums up of a caption, as its Java program says it; the one chunk of a caption that is the reference
    does not count there."""
    row = dict(zip(METEOR_STATISTICS, map(float, start_meteor()._stat(caption, references).split()), strict=True))
    sides = (row["length"], row["reference_length"])
    if row["chunks"] == 1 and (row["matches"], row["reference_matches"]) == sides:
        row["chunks"] = 0.0
    return {f"meteor_{name}": value for name, value in row.items()}


def _grounded(sample, prediction):
    wanted = targets(sample)
    as_boxes = all(mask is None for _, mask in wanted)  # of references that are boxes: both as filled rectangles

    def area(box, mask):
        if as_boxes:
            mask = box and rectangle_mask(sample, box)
        return mask or empty_mask(sample)

    phrases = [phrase or "" for answer in sample["answers"] for phrase in marked_phrases(answer["content"])]
    found = {
        "caption": prediction.text or "",
        "phrases": [one["phrase"] for one in prediction.objects],
        "masks": [area(one["box"], one["mask"]) for one in prediction.objects],
        "scores": [one["score"] if as_boxes else one["mask_score"] for one in prediction.objects],
    }
    reference = {
        "caption": [plain_text(answer["content"]) for answer in sample["answers"]],
        "phrases": phrases[: len(wanted)],
        "masks": [area(*target) for target in wanted],
    }
    return {"predictions": found, "references": reference}


def _grounded_piece(inputs):
    true, found = inputs["references"]["masks"], inputs["predictions"]

    def describe(mask):
        return {"bbox": coco_mask.toBbox(mask).tolist(), "area": float(coco_mask.area(mask)), "segmentation": mask}

    results = zip(found["masks"], found["scores"], strict=True)
    return {"category": "", "true": [describe(mask) for mask in true],
            "found": [describe(mask) | {"score": score} for mask, score in results]}  # fmt: skip


def _detections(sample, prediction):
    true, found = [], []
    for box, mask in targets(sample):
        one = {"bbox": _xywh(box), "area": (box[2] - box[0]) * (box[3] - box[1])}
        true.append(one if mask is None else one | {"area": float(coco_mask.area(mask)), "segmentation": mask})
    for one in prediction.objects:
        result = {"bbox": _xywh(one["box"] or [0.0] * 4), "score": one["score"]}
        found.append(result | {"segmentation": one["mask"] or empty_mask(sample)})
    return {"category": asked_category(sample), "true": true, "found": found}


def _xywh(box: list[float]) -> list[float]:
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def asked_category(sample: dict) -> str:
    """What a sample asks to find, as a category: "cup" of "Find every cup." and of "There is no cup."."""
    content = sample["answers"][0]["content"]
    if sample["task"] == "no_target":
        return content.removeprefix("There is no ").removesuffix(".")
    return sample["phrase"]


def _grounded_columns(row):
    columns = {name: float(row[name]) for name in ("matched", "matched_iou", "annotated")}
    columns |= {"cider": row["cider"], "hit": float(row["matched"] == row["annotated"] == row["predicted"])}
    return columns | {"value": row["matched"] / max(row["annotated"], row["predicted"], 1)}


METRICS = {
    "box_accuracy": Metric(
        _first_box,
        _first_box_columns,
        {
            "acc@0.5": ratio("hit@0.50"),
            "acc@0.75": ratio("hit@0.75"),
            "acc@0.9": ratio("hit@0.90"),
            "macc": ratio("mean_hit"),
            "miou": ratio("value"),
        },
        needs=("box",),
        single=True,
        hit="acc@0.5",
        value="box IoU",
    ),
    "referring_iou": Metric(
        _first_mask,
        _first_mask_columns,
        {"ciou": ratio("intersection", "union"), "miou": ratio("value")}
        | {f"prec@{threshold}": ratio(f"hit@{threshold}") for threshold in MASK_THRESHOLDS},
        needs=("mask",),
        single=True,
        hit="prec@0.5",
        value="mask IoU",
    ),
    "generalized_referring": Metric(
        _masks,
        _generalized_columns,
        {
            "giou": ratio("value"),
            "ciou": ratio("intersection", "union"),
            "n_acc": ratio("no_target_answered", "no_target"),
            "t_acc": ratio("target_answered", "target"),
            **{f"pr@{threshold}": ratio(f"hit@{threshold}", "target") for threshold in GENERALIZED_THRESHOLDS},
        },
        needs=("mask",),
        hit="mask IoU > 0.5",
        value="mask IoU",
    ),
    "generalized_boxes": Metric(
        _boxes,
        _boxes_columns,
        {
            "pr@f1": ratio("hit"),
            "n_acc": ratio("no_target_answered", "no_target"),
            "t_acc": ratio("target_answered", "target"),
        },
        needs=("box",),
        hit="pr@f1",
        value="pr@f1",
    ),
    "vqa_accuracy": Metric(
        _question,
        _question_columns,
        {"accuracy": ratio("value")},
        needs=("text",),
        hit="accuracy >= 0.5",
        value="accuracy",
    ),
    "pope": Metric(
        _yes_no,
        _yes_no_columns,
        yes_no_estimates("") | yes_no_estimates("strict_"),
        needs=("text",),
        hit="accuracy",
        value="accuracy",
    ),
    "caption_scores": Metric(
        _caption,
        _caption_columns,
        {"cider": ratio("value", within_one=False), "rouge_l": ratio("rouge_l")}
        | {f"bleu{order}": bleu(order) for order in range(1, BLEU_ORDERS + 1)}
        | {"meteor": meteor},
        needs=("text",),
        more=caption_columns,
        hit="answered",
        value="CIDEr",
    ),
    "grounded_caption": Metric(
        _grounded,
        _grounded_columns,
        {
            "cider": ratio("cider", within_one=False),
            "meteor": meteor,
            "miou": ratio("matched_iou", "matched"),
            "recall": ratio("matched", "annotated"),
        },
        needs=("text",),
        more=grounded_columns,
        detections={"ap50": "segm_ap50"},
        piece=_grounded_piece,
        hit="answered",
        value="phrases found",
    ),
    "coco_detection": Metric(
        _detections,
        None,
        {},
        needs=("box",),
        detections={name: name for name in DETECTION_ESTIMATES},
        piece=dict,
        hit="answered",
    ),
}


def metrics_without_reference(metrics: Iterable[str], samples: list[dict]) -> dict[str, str]:
    """{metric: why it cannot be measured}: the annotations hold boxes where it needs masks."""
    kinds = [mask is not None for sample in samples for _, mask in targets(sample)]
    if not kinds or any(kinds):
        return {}
    return {name: "the annotations hold no masks" for name in metrics if "mask" in METRICS[name].needs}


@dataclass
class Result:
    """Everything that is known about one pass over the samples."""

    metrics: dict[str, dict]
    intervals: dict[str, dict]
    n_of_metric: dict[str, int]
    n_of_number: dict[str, dict[str, int]]  # of the numbers that count only some of a metric's samples
    columns: dict[str, dict[str, dict]]  # metric -> id -> column -> value
    pieces: dict[str, dict[str, dict]]  # metric -> id -> what AP is made of
    predictions: dict[str, Prediction]
    missing: Counter
    emission: dict
    speed: dict
    calibration: dict

    def summary(self) -> dict:
        return {
            "metrics": self.metrics,
            "intervals": self.intervals,
            "interval": "95 %: shares binomial (Wilson, widened by how alike the samples of a picture are), others "
            f"bootstrap over pictures, {RESAMPLES} resamples (AP {AP_RESAMPLES}); over samples where there are fewer "
            f"than {LEAST_PICTURES} pictures; binomial where all resamples are equal",
            "n_of_metric": self.n_of_metric,
            "n_of_number": self.n_of_number,
            "missing": dict(self.missing.most_common()),
            "emission": self.emission,
            "speed": self.speed,
            "calibration": self.calibration,
        }


class Scorer:
    """Scores predictions by some metrics.

    Args:
        metrics: module -> the tasks that it measures.
        threshold: objects that score less are left out.
    """

    def __init__(self, metrics: dict[str, list[str]], threshold: float = 0.0):
        self.metrics, self.threshold, self.loaded = metrics, threshold, {}

    def applies(self, name: str, sample: dict) -> bool:
        """Whether a metric measures a sample."""
        tasks = self.metrics[name]
        if tasks is not None and sample["task"] not in tasks:
            return False
        return not METRICS[name].single or len(targets(sample)) == 1

    def check(self, sample: dict, entry: dict | None) -> Prediction:
        """`check_prediction` with what these metrics need."""
        needs = {need for name in self.metrics if self.applies(name, sample) for need in METRICS[name].needs}
        return check_prediction(sample, entry, self.threshold, needs)

    def running(self, headline: str, sample: dict, entry: dict) -> float | None:
        """What a sample adds to the running score: was it right (of captions: is there one); None if not measured."""
        name = headline.split("/")[0]
        if name not in self.metrics or not self.applies(name, sample):
            return None
        if name in WHOLE_SET:
            return float(self.check(sample, entry).reason is None)
        if name not in self.loaded:
            self.loaded[name] = metrics.load(name)
        inputs = METRICS[name].inputs(sample, self.check(sample, entry))
        inputs = dict.fromkeys(self.loaded[name].optional) | inputs
        _, (row,) = self.loaded[name].score(**{key: [value] for key, value in inputs.items()}, problems=Counter())
        return METRICS[name].columns(row)["hit"]

    def score(self, samples: list[dict], entries: dict[str, dict]) -> Result:
        """All numbers of all samples; one without an entry, or with a bad one, counts as wrong."""
        predictions = {sample["id"]: self.check(sample, entries.get(sample["id"])) for sample in samples}
        values, intervals, counts, parts_of, columns, pieces = {}, {}, {}, {}, {}, {}
        for name in self.metrics:
            chosen = [sample for sample in samples if self.applies(name, sample)]
            counts[name] = len(chosen)
            if not chosen:
                continue
            found = [predictions[sample["id"]] for sample in chosen]
            values[name], intervals[name], rows, parts = measure(name, chosen, found)
            ids = [sample["id"] for sample in chosen]
            parts_of[name] = counted_samples(rows, METRICS[name].estimates) if rows else {}
            columns[name] = dict(zip(ids, rows, strict=True)) if rows else {}
            pieces[name] = dict(zip(ids, parts, strict=True)) if parts else {}
        missing = Counter(prediction.reason for prediction in predictions.values() if prediction.reason)
        single = {name for name in self.metrics if METRICS[name].single}
        first_only = {sample["id"] for sample in samples if any(self.applies(name, sample) for name in single)}
        return Result(
            values,
            intervals,
            counts,
            parts_of,
            columns,
            pieces,
            predictions,
            missing,
            emission_rate(samples, predictions),
            speed(entries.values()),
            calibration(samples, predictions, first_only),
        )


def measure(name: str, samples: list[dict], predictions: list[Prediction]) -> tuple[dict, dict, list, list]:
    """(the module's results, their intervals, columns per sample, `piece` per sample) of one metric."""
    metric, module = METRICS[name], metrics.load(name)
    inputs = [metric.inputs(sample, prediction) for sample, prediction in zip(samples, predictions, strict=True)]
    pieces = [metric.piece(one) for one in inputs] if metric.piece else []
    intervals, rows = {}, []
    if metric.columns is None:
        annotations, results = detection_tables(samples, pieces)
        values = module.compute(predictions=results, references=annotations)
    else:
        values = module.compute(**{key: [one[key] for one in inputs] for key in inputs[0]}, per_sample=True)
        rows = [metric.columns(row) for row in values.pop("samples")]
        if metric.more:
            rows = [row | more for row, more in zip(rows, metric.more(inputs, values), strict=True)]
        intervals = intervals_of(rows, metric.estimates, [sample["image_id"] for sample in samples])
    if pieces:
        found = detection_estimates(samples, pieces, AP_RESAMPLES)
        for key, other in metric.detections.items():
            if other in found:
                pictures = pictures_with_objects(samples, pieces, other)
                found[other][0] = values[key]  # another sum may differ in the last digit
                intervals[key] = wide_enough(centred_percentiles(found[other]), values[key], pictures)
    return clean_numbers(values), intervals, rows, pieces


def clean_numbers(values: dict) -> dict:
    """None for a number that is not finite: JSON has no NaN."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


# ---- intervals -------------------------------------------------------------------------------------------------------


def column_table(rows: list[dict]) -> dict[str, np.ndarray]:
    """Columns of all samples, with `one` for counting them."""
    table = {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}
    return table | {"one": np.ones(len(rows))}


def counted_samples(rows: list[dict], estimates: dict[str, Callable]) -> dict[str, int]:
    """How many samples count for an estimate that leaves some out, as a share of those without a target does."""
    table, found = column_table(rows), {}
    for key, estimate in estimates.items():
        if estimate.is_ratio and set(estimate.columns) <= set(table):
            counted = table[estimate.columns[1]]
            if np.isin(counted, (0, 1)).all() and not counted.all():
                found[key] = int(counted.sum())
    return found


def sample_groups(pictures: list[str]) -> np.ndarray:
    """The number of each sample's picture, or of the sample itself where there are too few pictures to draw from."""
    numbers = np.unique(pictures, return_inverse=True)[1]
    return numbers if numbers.max() + 1 >= LEAST_PICTURES else np.arange(len(pictures))


def picture_weights(groups: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """How often each picture is drawn in each resample: (resamples, pictures)."""
    count = int(groups.max()) + 1
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float32)


def resampled_sums(table: dict[str, np.ndarray], groups: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The sums of the columns in each resample."""
    return {name: weights.astype(float) @ np.bincount(groups, values) for name, values in table.items()}


def intervals_of(
    rows: list[dict], estimates: dict[str, Callable], pictures: list[str]
) -> dict[str, list[float] | None]:
    """The 95 % interval [low, high] of each estimate; None where it has no value."""
    table, groups = column_table(rows), sample_groups(pictures)
    sums, found = None, {}
    for key, estimate in estimates.items():
        if not set(estimate.columns) <= set(table):
            continue
        parts = [table[name] for name in estimate.columns]
        if estimate.is_ratio and parts[1].sum() == 0:
            found[key] = None
        elif estimate.is_ratio and estimate.within_one and all(np.isin(part, (0, 1)).all() for part in parts):
            found[key] = share_interval(*parts, groups)
        else:
            sums = sums or resampled_sums(table, groups, picture_weights(groups, RESAMPLES))
            whole = float(estimate({name: values.sum() for name, values in table.items()}))
            counted = table[estimate.columns[1] if estimate.is_ratio else "one"] > 0
            drawn = percentiles(estimate(sums))
            found[key] = wide_enough(drawn, whole if estimate.within_one else None, len(np.unique(groups[counted])))
    return found


def percentiles(values: np.ndarray) -> list[float] | None:
    """The middle 95 % of resampled values."""
    values = values[np.isfinite(values)]
    return np.percentile(values, [2.5, 97.5]).tolist() if len(values) else None


def wide_enough(interval: list[float] | None, share: float | None, n: int) -> list[float] | None:
    """The interval of resamples, unless they are all equal: as sure as that no small set is.

    In their place comes Wilson's interval of `share` among `n` pictures, as no mean of numbers between 0 and 1 varies
    more than a share; None where the number has no such bounds (`share` is None).
    """
    if interval is None or interval[1] - interval[0] > SAME:
        return interval
    return None if share is None else wilson(share, n)


def centred_percentiles(values: np.ndarray) -> list[float] | None:
    """`percentiles` of all values but the first, moved so that their mean is the first, which is that of all samples.

    Of samples that are drawn again, AP and calibration error come out too large on average: peaks, and gaps whatever
    their sign, grow with chance. The numbers are shares, and the interval ends where these do.
    """
    drawn = values[1:][np.isfinite(values[1:])]
    if not len(drawn) or not math.isfinite(values[0]):
        return None
    low, high = percentiles(drawn - drawn.mean() + values[0])
    return [min(max(low, 0.0), float(values[0])), max(min(high, 1.0), float(values[0]))]


def share_interval(hits: np.ndarray, counted: np.ndarray, groups: np.ndarray) -> list[float]:
    """Wilson's interval of a share. Samples of one picture are alike, which counts as fewer samples (design effect)."""
    n = counted.sum()
    share = hits.sum() / n
    binomial, pictures = share * (1 - share) / n, len(np.unique(groups[counted > 0]))
    effect = 1.0
    if binomial > 0 and pictures > 1:
        residuals = np.bincount(groups, hits - share * counted)
        effect = max(1.0, (residuals**2).sum() / n**2 * pictures / (pictures - 1) / binomial)
    return wilson(share, n / effect)


def wilson(share: float, n: float) -> list[float]:
    """Wilson's 95 % interval of a share of `n`."""
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    low, high = float(centre - half), float(centre + half)
    return [max(min(low, float(share)), 0.0), min(max(high, float(share)), 1.0)]  # whatever the last digit is


# ---- detection -------------------------------------------------------------------------------------------------------


def detection_tables(samples: list[dict], pieces: list[dict]) -> tuple[dict, list[dict]]:
    """(annotations, results) in COCO's form; pictures and categories are numbered in order of appearance.

    Args:
        samples: `image_id`, `width` and `height` of each.
        pieces: of each `category` (a name) and `true` and `found`, as in COCO's annotations and results.
    """
    pictures, categories = {}, {}
    annotations, results = [], []
    has_masks = all("segmentation" in one for piece in pieces for one in piece["true"])
    for sample, piece in zip(samples, pieces, strict=True):
        image = pictures.setdefault(sample["image_id"], {"id": len(pictures) + 1})
        image |= {"width": sample["width"], "height": sample["height"], "file_name": sample["image_id"]}
        category = categories.setdefault(piece["category"], len(categories) + 1)
        common = {"image_id": image["id"], "category_id": category}
        for one in piece["true"]:
            annotations.append(common | {"id": len(annotations) + 1, "iscrowd": 0} | one)
        results += [common | one for one in piece["found"]]
    if not has_masks:
        results = [{key: value for key, value in one.items() if key != "segmentation"} for one in results]
        annotations = [{key: value for key, value in one.items() if key != "segmentation"} for one in annotations]
    table = {"info": {}, "images": list(pictures.values()), "annotations": annotations}
    table["categories"] = [{"id": number, "name": name} for name, number in categories.items()]
    return table, results


def pictures_with_objects(samples: list[dict], pieces: list[dict], name: str) -> int:
    """The number of pictures that one of `detection_estimates` is about: those with an object of its size."""
    params = Params(iouType="bbox")
    low, high = dict(zip(params.areaRngLbl, params.areaRng, strict=True)).get(name.split("_")[-1], params.areaRng[0])
    pairs = zip(samples, pieces, strict=True)
    return len(
        {sample["image_id"] for sample, piece in pairs if any(low <= one["area"] <= high for one in piece["true"])}
    )


def detection_estimates(samples: list[dict], pieces: list[dict], resamples: int) -> dict[str, np.ndarray]:
    """Of pictures that are drawn again and again, COCO's twelve numbers for boxes and, where there are masks, masks.

    Args:
        samples, pieces: as in `detection_tables`.

    Returns:
        {`bbox_ap`, ..: (1 + resamples,)}, first of the pictures as they are; NaN where there is nothing to find.
    """
    annotations, results = detection_tables(samples, pieces)
    if not annotations["annotations"]:
        return {}
    weights = picture_weights(np.arange(len(annotations["images"])), resamples)
    weights = np.concatenate([np.ones_like(weights[:1]), weights])
    kinds = [kind for kind, key in (("bbox", "bbox"), ("segm", "segmentation")) if key in annotations["annotations"][0]]
    return {
        f"{kind}_{name}": values
        for kind in kinds
        for name, values in resampled_detection(annotations, results, kind, weights).items()
    }


def resampled_detection(
    annotations: dict, results: list[dict], kind: str, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """COCO's numbers with each picture counted `weights` times: pycocotools matches once, only the sums are made anew.

    Args:
        annotations, results: of `detection_tables`.
        kind: `bbox` or `segm`.
        weights: (resamples, pictures), pictures in the order of their ids from 1 on.

    Returns:
        {`ap`, ..: (resamples,)} in the order of `STATISTICS`; a category that a resample has no objects of does not
        enter its mean.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth, found = COCO(), COCO()
        truth.dataset, found.dataset = annotations, annotations | {"annotations": []}
        truth.createIndex()
        found.createIndex()
        if results:  # beside a box, pycocotools would call a mask small or large by the area of the box
            beside = "bbox" if kind == "segm" else "segmentation"
            found = truth.loadRes([{key: one[key] for key in one if key != beside} for one in results])
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
    params = evaluation.params
    areas = {tuple(limits): name for limits, name in zip(params.areaRng, params.areaRngLbl, strict=True)}
    entries = defaultdict(lambda: defaultdict(list))
    for entry in filter(None, evaluation.evalImgs):
        entries[areas[tuple(entry["aRng"])]][entry["category_id"]].append(entry)
    values = {}
    for area, of_category in entries.items():
        suffix, limits = ("", params.maxDets) if area == "all" else (f"_{area}", params.maxDets[-1:])
        parts = [_category_curves(some, weights, params.recThrs, limits) for some in of_category.values()]
        has_objects = np.stack([part[0] for part in parts]) > 0  # (categories, resamples)
        precision, recall = (np.stack([part[i] for part in parts]) for i in (1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            precision, recall = ((part * has_objects[..., None]).sum(0) / has_objects.sum(0)[:, None]
                                 for part in (precision, recall))  # fmt: skip
        values[f"ap{suffix}"] = precision.mean(1)
        if area == "all":
            for threshold in (0.5, 0.75):
                values[f"ap{100 * threshold:.0f}"] = precision[:, np.isclose(params.iouThrs, threshold)][:, 0]
            values |= {f"ar{limit}": recall[:, index] for index, limit in enumerate(limits)}
        else:
            values[f"ar{suffix}"] = recall[:, 0]
    return {name: values[name] for name in STATISTICS if name in values}


def _category_curves(
    entries: list[dict], weights: np.ndarray, points: np.ndarray, limits: list[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one category: the objects (resamples,), the mean precision over the recall `points` (resamples, thresholds),
    and the recall, mean over thresholds, with at most so many results per picture (resamples, limits)."""
    objects = np.array([np.sum(entry["gtIgnore"] == 0) for entry in entries], dtype=float)
    wanted = weights[:, [entry["image_id"] - 1 for entry in entries]] @ objects
    scores = np.concatenate([entry["dtScores"] for entry in entries])
    order = np.argsort(-scores, kind="mergesort")
    picture = np.concatenate([[entry["image_id"] - 1] * len(entry["dtScores"]) for entry in entries]).astype(int)
    rank = np.concatenate([np.arange(len(entry["dtScores"])) for entry in entries])[order]
    matched, ignored = (
        np.concatenate([np.asarray(entry[key], dtype=bool) for entry in entries], axis=1)[:, order]
        for key in ("dtMatches", "dtIgnore")
    )
    drawn = weights[:, picture[order]].astype(float)
    least = np.maximum(wanted, 1e-9)
    precisions, recalls = np.zeros((len(weights), len(matched))), np.zeros((len(weights), len(limits)))
    for number, (is_match, is_ignored) in enumerate(zip(matched, ignored, strict=True)):
        hit = is_match & ~is_ignored
        if not hit.any():
            continue
        right = np.cumsum(drawn * hit, axis=1)[:, hit]  # precision has its peaks, and recall its steps, at the hits
        all_results = np.cumsum(drawn * ~is_ignored, axis=1)[:, hit]
        precision = right / np.maximum(all_results, 1e-9)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = right / least[:, None]
        for row in range(len(weights)):
            index = np.searchsorted(recall[row], points)
            precisions[row, number] = precision[row][index[index < precision.shape[1]]].sum() / len(points)
        for column, limit in enumerate(limits):
            recalls[:, column] += (drawn * (hit & (rank < limit))).sum(1) / least / len(matched)
    return wanted, precisions, recalls


# ---- emission, speed, calibration ------------------------------------------------------------------------------------


def emission_rate(samples: list[dict], predictions: dict[str, Prediction]) -> dict:
    """How often the answer has as many `<vis>` as the true one, none where none is called for."""
    single = [sample for sample in samples if len(sample["answers"]) == 1]
    right = [
        predictions[sample["id"]].emitted == sample["answers"][0]["content"].count(VIS_TOKEN)
        and predictions[sample["id"]].reason != "no prediction"
        for sample in single
    ]
    if not single:
        return {"rate": None, "interval": None, "n": 0}
    pictures = [sample["image_id"] for sample in single]
    interval = intervals_of([{"right": float(one)} for one in right], {"rate": ratio("right")}, pictures)["rate"]
    return {"rate": sum(right) / len(single), "interval": interval, "n": len(single)}


def speed(entries: Iterable[dict]) -> dict:
    """Means over the answers: scaling of the picture, answering and decoding, without reading the picture's file."""
    entries = [entry for entry in entries if entry and entry.get("ms")]
    if not entries:
        return {}
    seconds = sum(entry["ms"] for entry in entries) / 1000
    objects = sum(len(entry["objects"]) for entry in entries)
    tokens = sum(entry["tokens"] for entry in entries)
    return {
        "ms_per_answer": 1000 * seconds / len(entries),
        "objects_per_second": objects / seconds,
        "tokens_per_answer": tokens / len(entries),
        "tokens_per_object": tokens / objects if objects else None,
    }


def calibration(samples: list[dict], predictions: dict[str, Prediction], first_only: set[str]) -> dict:
    """Scores against the truth.

    Args:
        first_only: ids of samples of whose objects only the first counts.

    Returns:
        `box` and `mask` (of what references there are): `n`, `ece` with its 95 % interval `ece_interval`, `mean_score`,
        `accuracy` (share with IoU >= 0.5 of a target that no surer object has), `bins` and `precision_recall` over the
        score; `no_target`: the shares of samples without (`n_acc`) and with (`t_acc`) a target that are decided rightly
        when a target is there from a score on.
    """
    found = {}
    for kind, score, number in (("box", "score", 0), ("mask", "mask_score", 1)):
        pairs, wanted = [], 0
        for sample in samples:
            references = [target[number] for target in targets(sample)]
            if any(reference is None for reference in references):
                continue
            prediction = predictions[sample["id"]]
            objects = [one for one in prediction.objects if one[kind] is not None]
            objects = prediction.objects[:1] if sample["id"] in first_only else objects
            objects = sorted((one for one in objects if one[kind] is not None), key=lambda one: -one[score])
            wanted += len(references)
            right = _right_objects(kind, [one[kind] for one in objects], references)
            pairs += [(one[score], index in right, sample["image_id"]) for index, one in enumerate(objects)]
        if pairs and wanted:
            found[kind] = _reliability(*map(np.array, zip(*pairs, strict=True)), wanted)
    decided = [(max((one["score"] for one in predictions[sample["id"]].objects), default=-1.0), bool(targets(sample)))
               for sample in samples if sample["answers"][0]["content"]]  # fmt: skip
    if any(not has_target for _, has_target in decided) and any(has_target for _, has_target in decided):
        found["no_target"] = _no_target_curve(*map(np.array, zip(*decided, strict=True)))
    return found


def _right_objects(kind: str, objects: list, references: list) -> set[int]:
    """Indices of the objects that get a target: in order of their scores, each the best one that is left."""
    if not objects or not references:
        return set()
    if kind == "box":
        ious = np.nan_to_num([box_iou(one, references) for one in objects])
    else:
        ious = np.array(coco_mask.iou(objects, references, [0] * len(references)))
    right = set()
    for index, row in enumerate(ious):
        best = int(row.argmax())
        if row[best] >= 0.5:
            right.add(index)
            ious[:, best] = -1
    return right


def _reliability(scores: np.ndarray, right: np.ndarray, pictures: np.ndarray, wanted: int) -> dict:
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    index = np.clip(np.digitize(scores, edges) - 1, 0, CALIBRATION_BINS - 1)
    bins, columns = [], {"one": np.ones(len(scores))}
    for number in range(CALIBRATION_BINS):
        inside = index == number
        columns[f"gap{number}"] = inside * (scores - right)
        if inside.any():
            score, share = float(scores[inside].mean()), float(right[inside].mean())
            bins.append({"from": edges[number].item(), "to": edges[number + 1].item(), "n": int(inside.sum())})
            bins[-1] |= {"score": score, "correct": share}
    groups = sample_groups(pictures)

    def expected_error(sums: dict) -> np.ndarray:
        return sum(abs(sums[f"gap{number}"]) for number in range(CALIBRATION_BINS)) / sums["one"]

    weights = picture_weights(groups, RESAMPLES)
    errors = expected_error(resampled_sums(columns, groups, np.concatenate([np.ones_like(weights[:1]), weights])))
    error = float(errors[0])
    order = np.argsort(-scores, kind="mergesort")
    last = np.append(np.diff(scores[order]) != 0, True)  # equal scores are kept or dropped together
    kept, hits = np.arange(1, len(order) + 1)[last], np.cumsum(right[order])[last]
    thin = np.unique(np.linspace(0, len(kept) - 1, min(len(kept), DECISION_THRESHOLDS)).round().astype(int))
    return {
        "n": len(scores),
        "ece": error,
        "ece_interval": wide_enough(centred_percentiles(errors), error, weights.shape[1]),
        "mean_score": float(scores.mean()),
        "accuracy": float(right.mean()),
        "bins": bins,
        "precision_recall": {
            "threshold": scores[order][last][thin].tolist(),
            "precision": (hits / kept)[thin].tolist(),
            "recall": (hits / wanted)[thin].tolist(),
        },
    }


def _no_target_curve(best_scores: np.ndarray, has_target: np.ndarray) -> dict:
    thresholds = np.linspace(0, 1, DECISION_THRESHOLDS)
    found = best_scores[None] >= thresholds[:, None]
    return {
        "threshold": thresholds.tolist(),
        "n_acc": (~found[:, ~has_target]).mean(1).tolist(),
        "t_acc": found[:, has_target].mean(1).tolist(),
    }


# ---- scenes bench ----------------------------------------------------------------------------------------------------


def bench_details(samples: list[dict], result: Result, options) -> dict:
    """What METRICS asks for beside the numbers of the scenes bench: the breakdown and the answers without a model."""
    from perceptiongpt.data.scenes.bench import bench_baselines, scene_details

    photos = options.data or options.images
    kinds, sides, exact = defaultdict(list), defaultdict(list), []
    for sample in samples:
        columns = result.columns["box_accuracy"].get(sample["id"])
        if columns is None:
            continue
        details = scene_details(sample["split"], sample["image_id"], photos)
        kinds[details["kind"]].append(columns)
        side = details["side"]
        sides[next(name for name, low, high in BENCH_SIDES if low <= side < high)].append(columns)
        if side >= SMALLEST_EXACT_SIDE:
            exact.append(columns["hit@0.90"])

    def interval(hits: list[float]) -> list[float]:
        return share_interval(np.array(hits), np.ones(len(hits)), np.arange(len(hits)))

    def mean(rows: list[dict]) -> dict:
        keys = (("acc@0.5", "hit"), ("acc@0.75", "hit@0.75"), ("miou", "value"))
        means = {key: float(np.mean([row[column] for row in rows])) for key, column in keys}
        return {"n": len(rows), **means, "interval of acc@0.5": interval([row["hit"] for row in rows])}

    breakdown = {"kind": {name: mean(rows) for name, rows in sorted(kinds.items())}}
    breakdown["side"] = {name: mean(sides[name]) for name, _, _ in BENCH_SIDES if sides[name]}
    breakdown["acc@0.9 of sides >= 16"] = float(np.mean(exact)) if exact else None
    breakdown["interval of acc@0.9 of sides >= 16"] = interval(exact) if exact else None
    pictures = len({sample["image_id"] for sample in samples})
    baselines = bench_baselines(pictures, options.seed, options.split)
    return {"breakdown": breakdown, "without a model, acc@0.5": baselines}


# ---- comparison ------------------------------------------------------------------------------------------------------


def paired_differences(first: dict[str, dict], second: dict[str, dict], name: str) -> dict:
    """Two runs on the same samples by one metric.

    Args:
        first, second: id -> {`image_id`, `width`, `height`, `columns`: {metric: {column: value}},
            `pieces`: {metric: piece}}, with the same ids.
        name: the metric.

    Returns:
        `estimates`: key -> {`a`, `b`, `difference`, `interval`, `p`} (b less a; p: two-sided, of no difference),
        `n`, and where a sample is right or wrong `gained` and `lost`: ids that only b, only a has right.
    """
    metric, runs = METRICS[name], (first, second)
    ids = [one for one in first if all(name in run[one]["columns"] or name in run[one]["pieces"] for run in runs)]
    result, values = {"n": len(ids)}, {}  # values: key -> (of all samples, of each resample) of each run
    if metric.columns:
        groups = sample_groups([first[one]["image_id"] for one in ids])
        tables = [column_table([run[one]["columns"][name] for one in ids]) for run in runs]
        for column in set(tables[0]) & set(tables[1]):
            same = abs(tables[1][column] - tables[0][column]) < SAME
            tables[1][column] = np.where(same, tables[0][column], tables[1][column])
        weights = picture_weights(groups, RESAMPLES)
        sums = [resampled_sums(table, groups, weights) for table in tables]
        wholes = [{column: numbers.sum() for column, numbers in table.items()} for table in tables]
        for key, estimate in metric.estimates.items():
            if all(set(estimate.columns) <= set(table) for table in tables):
                values[key] = [(float(estimate(whole)), estimate(drawn)) for whole, drawn in zip(wholes, sums)]
        if "hit" in tables[0]:
            pairs = list(zip(ids, *(table["hit"] > 0 for table in tables), strict=True))
            result["gained"] = [one for one, was, now in pairs if now and not was]
            result["lost"] = [one for one, was, now in pairs if was and not now]
    if metric.piece:
        samples = [first[one] for one in ids]
        found = [detection_estimates(samples, [run[one]["pieces"][name] for one in ids], AP_RESAMPLES) for run in runs]
        for key, other in metric.detections.items():
            if all(other in one for one in found):
                values[key] = [(float(one[other][0]), one[other][1:]) for one in found]
    estimates = {}
    for key, ((a, drawn_a), (b, drawn_b)) in values.items():
        drawn = drawn_b - drawn_a
        drawn = drawn[np.isfinite(drawn)]
        if not math.isfinite(a) or not math.isfinite(b) or not len(drawn):
            continue
        p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + len(drawn)))
        estimates[key] = {"a": a, "b": b, "difference": b - a, "interval": percentiles(drawn), "p": float(p)}
    return result | {"estimates": estimates}
