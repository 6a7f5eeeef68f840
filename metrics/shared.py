"""What the metrics share: how rows are stored, how bad predictions are counted, and operations on masks."""

import functools
import json
import math
from collections import Counter
from collections.abc import Callable

import evaluate
from datasets import Features, Value
from pycocotools import mask as coco_mask

from perceptiongpt.geometry_perceptiongpt import rle_runs


LARGEST_MASK = 2**32 - 1  # pixels: pycocotools counts them in 32 bits


class StoredMetric(evaluate.Metric):
    """A metric that stores every row as it was given, even a malformed one, and computes everything in `compute`.

    Rows are stored as JSON text, because no fixed schema of columns can hold a malformed prediction. Batch size, number
    of processes (`num_process`, `process_id`, `experiment_id`, as in every `evaluate` metric) and order of the rows do
    not change the results.

    A subclass defines `description`, `citation` and `inputs` (texts), `optional` (names of columns besides predictions
    and references that may be left out) and `score`.
    """

    description = citation = inputs = ""
    optional: tuple[str, ...] = ()

    def _info(self) -> evaluate.MetricInfo:
        columns = ("predictions", "references", *self.optional)
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.citation,
            inputs_description=self.inputs,
            features=Features({name: Value("string") for name in columns}),
        )

    def score(self, predictions: list, references: list, problems: Counter, **columns) -> tuple[dict, list]:
        """Return (results over all rows, one dict per row); `problems` counts the bad predictions by reason."""
        raise NotImplementedError

    def add_batch(self, *, predictions=None, references=None, **columns):
        """Add rows: lists of equal length."""
        if predictions is None or references is None:
            raise ValueError("predictions and references must be given together")
        given = {"predictions": predictions, "references": references, **columns}
        given |= {name: [None] * len(predictions) for name in self.optional if columns.get(name) is None}
        lengths = {name: len(values) for name, values in given.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of unequal length: {lengths}")
        super().add_batch(**{name: [to_json(value) for value in values] for name, values in given.items()})

    def add(self, *, prediction=None, reference=None, **columns):
        """Add one row."""
        columns = {name: None if value is None else [value] for name, value in columns.items()}
        self.add_batch(predictions=[prediction], references=[reference], **columns)

    def compute(self, *, predictions=None, references=None, **kwargs):
        """Results over all rows added before and given here; None in processes other than the first.

        `per_sample=True` adds `samples`: one dict per row, in the order of the rows (process after process).
        """
        kwargs = dict.fromkeys(self.optional) | kwargs
        return super().compute(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions, references, per_sample: bool = False, **kwargs) -> dict:
        columns = {name: kwargs.pop(name) for name in self.optional}
        columns |= {"predictions": predictions, "references": references}
        columns = {name: [json.loads(text) for text in values] for name, values in columns.items()}
        problems = Counter()
        results, samples = self.score(**columns, problems=problems, **kwargs)
        results |= {"n": len(samples), "problems": dict(problems)}
        return results | ({"samples": samples} if per_sample else {})


def to_json(value) -> str:
    """JSON text of a row: arrays become lists, bytes become text, and anything that JSON cannot hold its `repr`."""

    def plain(part):
        if isinstance(part, bytes):
            return part.decode("ascii", errors="replace")
        return part.tolist() if hasattr(part, "tolist") else {"unknown": repr(part)}

    try:
        return json.dumps(value, default=plain)
    except TypeError:  # a key is not text: only that part becomes a `repr`
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(to_json, value))}]"
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return f"{{{', '.join(f'{json.dumps(key)}: {to_json(part)}' for key, part in value.items())}}}"
        return json.dumps({"unknown": repr(value)})


def share(part: float, whole: float) -> float | None:
    """`part / whole`; None if `whole` is 0."""
    return float(part / whole) if whole else None


def mean(values) -> float | None:
    """Mean, summed so that the order does not change the rounding; None of no values."""
    return share(math.fsum(values), len(values))


def read_predictions(values: list, parse: Callable, problems: Counter) -> list:
    """Each value parsed; None where `parse` raises a `ValueError`, whose text is counted in `problems`."""
    parsed = []
    for value in values:
        try:
            parsed.append(parse(value))
        except ValueError as error:
            problems[str(error)] += 1
            parsed.append(None)
    return parsed


def read_references(values: list, parse: Callable) -> list:
    """Each value parsed.

    Raises:
        ValueError: a reference is malformed; the message names its row.
    """
    parsed = []
    for index, value in enumerate(values):
        try:
            parsed.append(parse(value))
        except ValueError as error:
            raise ValueError(f"references[{index}]: {error}, got {str(value)[:200]}") from None
    return parsed


def parse_box(value) -> list[float]:
    """[x0, y0, x1, y1] with x0 < x1 and y0 < y1; `ValueError` with the reason otherwise."""
    if value is None or value == []:
        raise ValueError("missing")
    if not isinstance(value, list) or len(value) != 4 or not all(is_number(number) for number in value):
        raise ValueError("box is not four finite numbers")
    if value[0] >= value[2] or value[1] >= value[3]:
        raise ValueError("box has no area")
    return [float(number) for number in value]


def parse_text(value) -> str:
    """A text that is not blank; `ValueError` with the reason otherwise."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("missing")
    if not isinstance(value, str):
        raise ValueError("not text")
    return value


def parse_mask(value) -> dict:
    """COCO RLE, `counts` compressed (text) or a list of ints, as pycocotools takes it; `ValueError` with the reason."""
    if value is None or value == []:
        raise ValueError("missing")
    size = value.get("size") if isinstance(value, dict) else None
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ValueError("mask is not an RLE with size [height, width] and counts")
    if size[0] * size[1] > LARGEST_MASK:
        raise ValueError("mask is too large")
    counts = value.get("counts")
    if isinstance(counts, str):
        sound = counted_pixels(counts) == size[0] * size[1]
    else:
        sound = isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts)
        sound = sound and sum(counts) == size[0] * size[1]
    if not sound:
        raise ValueError("mask with broken RLE counts")
    mask = {"size": size, "counts": counts}
    return mask if isinstance(counts, str) else coco_mask.frPyObjects(mask, *size)


@functools.lru_cache(maxsize=10000)  # expressions about the same object share its mask
def counted_pixels(counts: str) -> int | None:
    """The number of pixels that compressed RLE counts describe; None if they are broken."""
    try:
        runs = rle_runs(counts)
    except ValueError:
        return None
    return sum(runs) if runs and min(runs) >= 0 else None


def parse_list(value, parse: Callable, what: str) -> list:
    """Each item of a list, which may be empty, parsed; `ValueError` for anything but a list."""
    if value is None:
        raise ValueError("missing")
    if not isinstance(value, list):
        raise ValueError(f"not a list of {what}")
    return [parse(item) for item in value]


def is_number(value) -> bool:
    """Whether the value is a finite int or float (no bool) whose square, as in areas, is finite."""
    return type(value) in (int, float) and abs(value) < 1e150


def empty_mask(size: list[int]) -> dict:
    """The mask [height, width] without pixels."""
    return coco_mask.frPyObjects({"size": size, "counts": [size[0] * size[1]]}, *size)


def mask_area(mask: dict | None) -> int:
    return 0 if mask is None else int(coco_mask.area(mask))


def join_masks(masks: list[dict]) -> dict | None:
    """The union of the masks; None of no masks. `ValueError` if their sizes differ."""
    if len({tuple(mask["size"]) for mask in masks}) > 1:
        raise ValueError("masks of different sizes")
    return coco_mask.merge(masks) if masks else None


def intersection_union(mask: dict | None, other: dict | None) -> tuple[int, int]:
    """Pixels of the intersection and of the union of two masks of one size; None has no pixels."""
    intersection = mask_area(coco_mask.merge([mask, other], intersect=True)) if mask and other else 0
    return intersection, mask_area(mask) + mask_area(other) - intersection
