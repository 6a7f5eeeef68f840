"""Predictions and references: the one place that knows how a signal stands in a predictions file and in a row.

A line of a predictions file has `id`, `text` (the answer) and `objects`: a list of {`box`, `mask`, `point`, `score`,
`mask_score`, `point_score`, `phrase`}, all of them optional. Coordinates are pixels of the original image.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from perceptiongpt.configuration_perceptiongpt import PHRASE_END_TOKEN, PHRASE_START_TOKEN, VIS_TOKEN
from perceptiongpt.geometry_perceptiongpt import box_iou, encode_rle, tight_box
from perceptiongpt.inference import InputError
from perceptiongpt.metrics.point_accuracy.point_accuracy import parse_point, points_in_masks
from perceptiongpt.metrics.shared import empty_mask as mask_without_pixels
from perceptiongpt.metrics.shared import is_number, parse_box, parse_mask
from perceptiongpt.signals_perceptiongpt import SIGNALS as MODEL_SIGNALS


MARKERS = (VIS_TOKEN, PHRASE_START_TOKEN, PHRASE_END_TOKEN)
NO_TARGET_START = "There is no"


# ---- signals ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectSignal:
    """How one signal of an object is written, read and compared.

    Attributes:
        name: of the model's signal, and the object's key of its value.
        parse: (value, sample) -> the checked value; `ValueError` with the reason.
        compared_with: the signal of the reference that it is compared with.
        overlaps: (values, reference values) -> array (values, references); from 0.5 on a value is right.
    """

    name: str
    parse: Callable
    compared_with: str
    overlaps: Callable

    @property
    def column(self) -> str:
        """The column of a row, with one value per `<vis>`."""
        return MODEL_SIGNALS[self.name].plural

    @property
    def score(self) -> str:
        """The object's key of the signal's score; where it is missing, the score of the box counts."""
        return MODEL_SIGNALS[self.name].score_name


def _parse_mask_of(value, sample: dict) -> dict:
    mask = parse_mask(value)
    if mask["size"] != [sample["height"], sample["width"]]:
        raise ValueError("of another size than the image")
    return mask if isinstance(mask["counts"], str) else text_rle(mask)


_SIGNALS = (
    ObjectSignal(
        name="box",
        parse=lambda value, sample: parse_box(value),
        compared_with="box",
        overlaps=lambda boxes, others: np.nan_to_num(box_iou([[box] for box in boxes], [others])),
    ),
    ObjectSignal(
        name="mask",
        parse=_parse_mask_of,
        compared_with="mask",
        overlaps=lambda masks, others: np.array(coco_mask.iou(masks, others, [0] * len(others))),
    ),
    ObjectSignal(
        name="point",
        parse=lambda value, sample: parse_point(value),
        compared_with="mask",
        overlaps=lambda points, masks: points_in_masks(points, masks).astype(float),
    ),
)
SIGNALS = {signal.name: signal for signal in _SIGNALS}


def box_of_mask(mask: dict) -> list[float] | None:
    """The tight box of an RLE, xyxy; None of a mask without pixels."""
    pixels = coco_mask.decode(mask)
    return tight_box(pixels) if pixels.any() else None


def empty_mask(sample: dict) -> dict:
    """An RLE without pixels, of the image's size."""
    return text_rle(mask_without_pixels([sample["height"], sample["width"]]))


def rectangle_mask(sample: dict, box: list[float]) -> dict:
    """A box as an RLE: the pixels whose centres lie in it."""
    mask = np.zeros((sample["height"], sample["width"]), dtype=bool)
    x0, y0, x1, y1 = (max(math.ceil(side - 0.5), 0) for side in box)
    mask[y0:y1, x0:x1] = True
    return encode_rle(mask)


def text_rle(rle: dict) -> dict:
    """pycocotools' RLE with a string in place of bytes."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


# ---- references ------------------------------------------------------------------------------------------------------


def references(sample: dict) -> list[dict]:
    """The objects of the reference answers, {signal: value or None} each; of several answers each object once."""
    found = {}
    for answer in sample["answers"]:
        columns = [answer.get(signal.column) for signal in SIGNALS.values()]
        length = max((len(values) for values in columns if values), default=0)
        for values in zip(*(values or [None] * length for values in columns), strict=True):
            key = json.dumps(values) if len(sample["answers"]) > 1 else len(found)
            found.setdefault(key, _with_box(dict(zip(SIGNALS, values, strict=True))))
    return list(found.values())


def _with_box(values: dict) -> dict:
    """The values with the tight box of the mask where there is no box."""
    if values["box"] is None and values["mask"] is not None:
        values["box"] = box_of_mask(values["mask"])
    return values


def plain_text(content: str) -> str:
    """An answer without its markers."""
    for token in MARKERS:
        content = content.replace(token, "")
    return " ".join(content.split())


def marked_phrases(content: str) -> list[str | None]:
    """The phrase before each `<vis>` of an answer; None for a `<vis>` without one."""
    phrases, phrase = [], None
    for part in content.split(PHRASE_START_TOKEN):
        if PHRASE_END_TOKEN in part:
            phrase, part = part.split(PHRASE_END_TOKEN, 1)
        for piece in part.split(VIS_TOKEN)[:-1]:
            phrase = None if piece.strip() else phrase
            phrases.append(phrase)
    return phrases


# ---- predictions -----------------------------------------------------------------------------------------------------


@dataclass
class Prediction:
    """A checked prediction.

    Attributes:
        text: the answer without markers; None if there is none.
        objects: those that score enough: each signal (None where missing or malformed), its score, and `phrase`.
        emitted: number of objects, whatever they score.
        reason: why something that a metric needs is missing or malformed, or None.
        failed: there is no answer that could be right, not even "there is none".
    """

    text: str | None = None
    objects: list[dict] = field(default_factory=list)
    emitted: int = 0
    reason: str | None = None
    failed: bool = False

    def first(self, signal: str):
        """The first object's value of a signal, or None."""
        return self.objects[0][signal] if self.objects else None

    def all(self, signal: str) -> list | None:
        """Every object's value of a signal; None if there is no answer."""
        return None if self.failed else [one[signal] for one in self.objects]


def check_prediction(sample: dict, entry: dict | None, threshold: float, needs: set[str]) -> Prediction:
    """Check one line of a predictions file, whoever wrote it. Nothing in it raises: it gets a reason instead.

    Args:
        sample: what was asked.
        entry: its line, or None.
        threshold: objects that score less are left out.
        needs: what the metrics need: `text`, and signals of every object.
    """
    if entry is None:
        return Prediction(reason="no prediction", failed=True)
    if entry.get("error"):
        return Prediction(reason=str(entry["error"]).split(":")[0], failed=True)
    text = entry.get("text")
    text = text if isinstance(text, str) else None
    if text and any(marker in text for marker in MARKERS):
        text = plain_text(text)
    objects = entry.get("objects", [])
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        return Prediction(text, reason="malformed list of objects", failed=True)
    found = Prediction(text, emitted=len(objects))
    for one in objects:
        checked, reason = check_object(sample, one, threshold, needs)
        found.reason = found.reason or reason
        if checked is not None:
            found.objects.append(checked)
    if found.reason is None and references(sample) and not found.objects:
        found.reason = _why_no_object(entry, found)
    if found.reason is None and "text" in needs and not (text or "").strip():
        found.reason = "no text in the answer"
    return found


def check_object(sample: dict, given: dict, threshold: float, needs: set[str]) -> tuple[dict | None, str | None]:
    """(the checked object, or None if it scores below the threshold; the first thing wrong with it, or None)."""
    box_score = SIGNALS["box"].score
    default = 1.0 if given.get(box_score) is None else given[box_score]
    scores = {signal.score: given.get(signal.score) for signal in SIGNALS.values()}
    scores = {key: default if score is None else score for key, score in scores.items()}
    reason, values = None, given
    if not all(map(is_number, scores.values())):  # the object stays, without anything that could match
        reason, values, scores = "malformed score: not a number", {}, dict.fromkeys(scores, max(threshold, 0.0))
    elif scores[box_score] < threshold:
        return None, None
    checked = {}
    for name, signal in SIGNALS.items():
        value = values.get(name)
        try:
            checked[name] = None if value is None else signal.parse(value, sample)
        except ValueError as error:
            checked[name] = None
            reason = reason or (f"malformed {name}: {error}" if name in needs else None)
    if values.get("box") is None:
        _with_box(checked)
    for name in SIGNALS:
        if name in needs and reason is None:
            reason = f"object without {name}" if checked[name] is None else _why_empty(name, checked[name])
    phrase = given.get("phrase")
    checked |= {key: float(score) for key, score in scores.items()}
    return checked | {"phrase": phrase if isinstance(phrase, str) else ""}, reason


def _why_empty(signal: str, value) -> str | None:
    return "mask without pixels" if signal == "mask" and coco_mask.area(value) == 0 else None


def _why_no_object(entry: dict, found: Prediction) -> str:
    """Why a sample with a target got no object."""
    if found.emitted:
        return "every object below the threshold"
    if (found.text or "").startswith(NO_TARGET_START):
        return "answered that there is none"
    if "finished" not in entry:  # given predictions, which need not come from a model with a `<vis>`
        return "no objects in the prediction"
    return f"no {VIS_TOKEN} in the answer" if entry["finished"] else f"cut off before any {VIS_TOKEN}"


# ---- files -----------------------------------------------------------------------------------------------------------


def read_entries(path: Path) -> Iterator[dict]:
    """The lines of a predictions file; an incomplete last line, which a killed process leaves, is skipped.

    Raises:
        InputError: another line is not JSON.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise InputError(f"{path}, line {number}: not JSON: {error}") from error


def given_predictions(path: Path, samples: list[dict]) -> tuple[dict[str, dict], int]:
    """Predictions of another model: JSON lines with `id`, and `text`, `objects` or both. Scoring checks the rest.

    Returns:
        The entries by id, and how many lines belong to no sample.

    Raises:
        InputError: there is no such file, a line has no id, an id occurs twice, or none is a sample's.
    """
    if not path.is_file():
        raise InputError(f"--predictions {path}: there is no such file")
    entries, known, others = {}, {sample["id"] for sample in samples}, set()
    for number, entry in enumerate(read_entries(path), 1):
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise InputError(f"{path}, line {number}: expected an object with a sample's id, got {str(entry)[:80]}")
        if name in entries or name in others:
            raise InputError(f"{path}, line {number}: the id {name!r} occurs twice")
        if name in known:
            entries[name] = {**entry, "ms": None}
        else:
            others.add(name)
    if not entries:
        example = ", ".join(sample["id"] for sample in samples[:3])
        raise InputError(f"--predictions {path}: none of its ids is a sample's, such as {example}; see --list_samples")
    return entries, len(others)
