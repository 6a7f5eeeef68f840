"""Scoring: predictions of samples in, every number with its interval out."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from perceptiongpt import metrics
from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.evaluation.calibration import calibration
from perceptiongpt.evaluation.intervals import (
    LEAST_IMAGES,
    RESAMPLES,
    WHOLE_SET_RESAMPLES,
    Ratio,
    counted_samples,
    ratio_intervals,
    resampled_values,
    spread,
    wide_enough,
)
from perceptiongpt.evaluation.measures import MEASURES, Measure
from perceptiongpt.evaluation.predictions import Prediction, check_prediction, references


INTERVALS = (
    "95 %: shares binomial (Wilson, widened by how alike the samples of an image are); other sums bootstrap over "
    f"images, {RESAMPLES} resamples; AP, CIDEr, BLEU and METEOR: 1.96 standard deviations of {WHOLE_SET_RESAMPLES} "
    f"resamples of the images; with fewer than {LEAST_IMAGES} images, samples are resampled; binomial where all "
    "resamples are equal"
)


@dataclass
class Result:
    """Everything that is known about one pass over the samples.

    Attributes:
        metrics, intervals: module -> result -> value, and [low, high] or None.
        n_of_metric: module -> number of samples that it measures.
        n_of_number: module -> result -> number of samples, of the results that count only some of them.
        columns: module -> id -> what the sample adds to the sums.
        inputs: module -> id -> what the module got for it, of the modules with whole-set results.
        predictions: id -> the checked prediction.
        missing: how often a prediction is missing or malformed, by reason.
        emission, speed, calibration: see the functions of these names.
    """

    metrics: dict[str, dict]
    intervals: dict[str, dict]
    n_of_metric: dict[str, int]
    n_of_number: dict[str, dict[str, int]]
    columns: dict[str, dict[str, dict]]
    inputs: dict[str, dict[str, dict]]
    predictions: dict[str, Prediction]
    missing: Counter
    emission: dict
    speed: dict
    calibration: dict

    def summary(self) -> dict:
        """What summary.json holds of it."""
        found = {name: getattr(self, name) for name in ("metrics", "intervals", "n_of_metric", "n_of_number")}
        found |= {"interval": INTERVALS, "missing": dict(self.missing.most_common())}
        return found | {"emission": self.emission, "speed": self.speed, "calibration": self.calibration}


class Scorer:
    """Scores predictions by some metrics.

    Args:
        metrics: module -> the tasks that it measures (None: all).
        threshold: objects that score less are left out.
        intervals: whether to compute intervals, which takes most of the time of AP and of captions.
    """

    def __init__(self, metrics: dict[str, list[str] | None], threshold: float = 0.0, intervals: bool = True):
        self.metrics, self.threshold, self.intervals, self.loaded = metrics, threshold, intervals, {}

    def applies(self, name: str, sample: dict) -> bool:
        """Whether a metric measures a sample."""
        tasks = self.metrics[name]
        if tasks is not None and sample["task"] not in tasks:
            return False
        return not MEASURES[name].single or len(references(sample)) == 1

    def check(self, sample: dict, entry: dict | None) -> Prediction:
        """`check_prediction` with what these metrics need."""
        needs = {need for name in self.metrics if self.applies(name, sample) for need in MEASURES[name].needs}
        return check_prediction(sample, entry, self.threshold, needs)

    def running(self, name: str, sample: dict, entry: dict) -> float | None:
        """What a sample adds to the running score: whether it is right; None if the metric does not measure it.

        Whole-set metrics say nothing of one sample before all are known: whether there is an answer.
        """
        if name not in self.metrics or not self.applies(name, sample):
            return None
        measure = MEASURES[name]
        if measure.whole_set:
            return float(self.check(sample, entry).reason is None)
        if name not in self.loaded:
            self.loaded[name] = metrics.load(name)
        given = dict.fromkeys(self.loaded[name].optional) | measure.inputs(sample, self.check(sample, entry))
        _, (row,) = self.loaded[name].score(**measure.arguments([given], None), problems=Counter())
        return measure.columns(row)["hit"]

    def score(self, samples: list[dict], entries: dict[str, dict]) -> Result:
        """Every number of all samples; one with a missing or malformed entry counts as wrong."""
        predictions = {sample["id"]: self.check(sample, entries.get(sample["id"])) for sample in samples}
        values, intervals, counts, parts_of, columns, inputs_of = {}, {}, {}, {}, {}, {}
        for name in self.metrics:
            chosen = [sample for sample in samples if self.applies(name, sample)]
            counts[name] = len(chosen)
            if not chosen:
                continue
            measure, ids = MEASURES[name], [sample["id"] for sample in chosen]
            inputs = [measure.inputs(sample, predictions[sample["id"]]) for sample in chosen]
            values[name], rows = compute(name, inputs)
            parts_of[name] = counted_samples(rows, measure.ratios) if rows else {}
            columns[name] = dict(zip(ids, rows, strict=True)) if rows else {}
            inputs_of[name] = dict(zip(ids, inputs, strict=True)) if measure.whole_set else {}
            if self.intervals:
                images = [sample["image_id"] for sample in chosen]
                intervals[name] = intervals_of(name, values[name], rows, inputs, images)
        single = {name for name in self.metrics if MEASURES[name].single}
        first_only = {sample["id"] for sample in samples if any(self.applies(name, sample) for name in single)}
        return Result(
            values,
            intervals,
            counts,
            parts_of,
            columns,
            inputs_of,
            predictions,
            Counter(prediction.reason for prediction in predictions.values() if prediction.reason),
            emission_rate(samples, predictions, self.intervals),
            speed(entries.values()),
            calibration(samples, predictions, first_only, self.intervals),
        )


def compute(name: str, inputs: list[dict]) -> tuple[dict, list[dict]]:
    """(the results of a module, None where they are not finite because JSON has no NaN; columns per sample)."""
    measure, module = MEASURES[name], metrics.load(name)
    rows = {"per_sample": True} if measure.columns else {}
    values = module.compute(**measure.arguments(inputs, None), **rows)
    rows = [measure.columns(row) for row in values.pop("samples", ())]
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}, rows


def intervals_of(name: str, values: dict, rows: list[dict], inputs: list[dict], images: list[str]) -> dict:
    """The interval of each of a module's results: [low, high], or None where there is none."""
    measure = MEASURES[name]
    found = ratio_intervals(rows, measure.ratios, images) if rows else {}
    keys = [key for key in measure.whole_set if values.get(key) is not None]
    drawn = resampled_values(whole_set_function(name, measure, inputs), images, keys, name) if keys else {}
    for key in keys:
        support = measure.support(inputs, key) if measure.support else len(set(images))
        highest = measure.whole_set[key].highest
        interval = spread(values[key], drawn[key], highest)
        found[key] = wide_enough(interval, None if highest is None else values[key], support)
    return found


def whole_set_function(name: str, measure: Measure, inputs: list[dict]):
    """`compute` of `resampled_values`: the module's results of some of the inputs, without storing their rows."""
    module = metrics.load(name)

    def compute_some(indices: list[int], copies: list[int]) -> dict:
        columns = measure.arguments([inputs[index] for index in indices], copies)
        return module.score(**columns, problems=Counter())[0]

    return compute_some


def emission_rate(samples: list[dict], predictions: dict[str, Prediction], intervals: bool) -> dict:
    """How often the answer has as many objects as the reference, none where there is no target."""
    single = [sample for sample in samples if len(sample["answers"]) == 1]
    right = [
        predictions[sample["id"]].emitted == sample["answers"][0]["content"].count(VIS_TOKEN)
        and predictions[sample["id"]].reason != "no prediction"
        for sample in single
    ]
    if not single:
        return {"rate": None, "interval": None, "n": 0}
    rows, images = [{"right": float(one)} for one in right], [sample["image_id"] for sample in single]
    interval = ratio_intervals(rows, {"rate": Ratio("right")}, images)["rate"] if intervals else None
    return {"rate": sum(right) / len(single), "interval": interval, "n": len(single)}


def speed(entries: Iterable[dict]) -> dict:
    """Means over the answers: preparing the image, answering and decoding, without reading the image's file."""
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
