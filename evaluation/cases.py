"""What people look at after a run: the worst and some random cases, and the calibration plots."""

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.drawing import SHEET_MARGIN, card, contact_sheet, draw_objects
from perceptiongpt.evaluation.benchmarks import Benchmark
from perceptiongpt.evaluation.measures import MEASURES
from perceptiongpt.evaluation.predictions import SIGNALS, Prediction, plain_text, references
from perceptiongpt.evaluation.results import Result
from perceptiongpt.evaluation.samples import read_sample_image


CASES = 12  # on a sheet
CASE_COLUMNS = 4  # two cases: reference, prediction, reference, prediction
CASES_OF_AN_IMAGE = 2  # at most, while there are cases of other images
CASE_CELL = 420  # pixels, with the margin
CASE_HEIGHT = 300  # pixels, of an image
SHEET_BYTES = 600_000


def write_cases(
    output: Path, benchmark: Benchmark, samples: list[dict], entries: dict, result: Result, seed: int
) -> None:
    """`worst.jpg`: by the headline metric, among equals the highest score first; `random.jpg`: drawn by the seed.

    Without images (`--no_images`) nothing is written.
    """
    headline = benchmark.headline_metric
    metric = headline if result.columns.get(headline) else next(iter(result.columns), headline)
    columns = result.columns.get(metric, {})

    def quality(sample: dict) -> tuple:
        score = max((one["score"] for one in result.predictions[sample["id"]].objects), default=0.0)
        return columns.get(sample["id"], {"value": 1.0})["value"], -score

    if samples[0]["image"] is None:
        return
    known = [sample for sample in samples if sample["id"] in columns] or samples
    order = np.random.default_rng(seed).permutation(len(samples))
    chosen = {"worst": sorted(known, key=quality), "random": [samples[index] for index in order]}
    for name, some in chosen.items():
        cards = []
        for sample in of_many_images(some)[:CASES]:
            value = columns.get(sample["id"], {}).get("value")
            verdict = "" if value is None else f", {MEASURES[metric].value} {value:.2f}"
            try:
                cards += draw_case(sample, entries.get(sample["id"]), result.predictions[sample["id"]], verdict)
            except ValueError as error:
                cards += [Image.new("RGB", (CASE_HEIGHT, CASE_HEIGHT), "grey")] * 2
                print(f"{name}.jpg: sample {sample['id']}: {error}")
        contact_sheet(cards, CASE_COLUMNS, output / f"{name}.jpg", cell=CASE_CELL, max_bytes=SHEET_BYTES)


def of_many_images(samples: list[dict]) -> list[dict]:
    """The samples in their order, but those whose image has had its cases come last."""
    seen, first, last = Counter(), [], []
    for sample in samples:
        seen[sample["image_id"]] += 1
        (first if seen[sample["image_id"]] <= CASES_OF_AN_IMAGE else last).append(sample)
    return first + last


def draw_case(sample: dict, entry: dict | None, prediction: Prediction, verdict: str) -> list[Image.Image]:
    """The reference and the prediction, each with its text; `verdict` is added to the prediction's title."""
    image = read_sample_image(sample)
    width = CASE_CELL - SHEET_MARGIN
    longer_side = max(1, int(max(image.size) * min(width / image.width, CASE_HEIGHT / image.height)))
    # The prompt's own objects are drawn as the references of a conversation that ends before the answer.
    asked = [_drawn(one, "asked about") for one in references({"answers": [sample]})]
    wanted = [_drawn(one) for one in references(sample)]
    labels = [one["phrase"] if wanted else "" for one in asked + wanted]  # the title says it if there is nothing else
    found = [_drawn(one, one["phrase"] or "", one["score"]) for one in prediction.objects if one["box"]]
    true = plain_text(sample["answers"][0]["content"])
    said = (entry or {}).get("text") or (f"[{prediction.reason}]" if prediction.reason else VIS_TOKEN * len(found))
    sides = (
        (
            "asked about" if asked and not wanted else "reference",
            asked + wanted,
            labels,
            f"{sample['prompt']} | {true or VIS_TOKEN}",
        ),
        (f"prediction{verdict}", found, [f"{one['phrase']} {one['score']:.2f}".strip() for one in found], f"> {said}"),
    )
    return [
        card(draw_objects(image, {"objects": some}, labels=labels, longer_side=longer_side), title, text, width)
        for title, some, labels, text in sides
    ]


def _drawn(one: dict, phrase: str = "", score: float | None = None) -> dict:
    return {"phrase": phrase, "score": score} | {name: one[name] for name in SIGNALS}


def plot_calibration(calibration: dict, path: Path) -> None:
    """Reliability, precision over recall, and the decision whether there is a target; no file if none is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in SIGNALS if kind in calibration]
    panels = [*kinds, *(["precision_recall"] if kinds else []), *(["no_target"] if "no_target" in calibration else [])]
    if not panels:
        path.unlink(missing_ok=True)
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained", squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        if panel in kinds:
            bins = calibration[panel]["bins"]
            starts, right = [one["from"] for one in bins], [one["correct"] for one in bins]
            axis.bar(starts, right, [one["to"] - one["from"] for one in bins], align="edge", alpha=0.6)
            axis.plot([one["score"] for one in bins], right, "o", color="black", markersize=3)
            axis.plot([0, 1], [0, 1], "--", color="grey")
            title = f"{panel}: ECE {calibration[panel]['ece']:.3f}, {calibration[panel]['n']} objects"
            axis.set(title=title, xlabel="score", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
        elif panel == "precision_recall":
            for kind in kinds:
                curve = calibration[kind]["precision_recall"]
                axis.plot(curve["recall"], curve["precision"], ".-", label=kind)
            axis.set(title="over the score", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
            axis.legend()
        else:
            curve = calibration["no_target"]
            axis.plot(curve["threshold"], curve["n_acc"], label="no target: none found")
            axis.plot(curve["threshold"], curve["t_acc"], label="target: some found")
            axis.set(title="is there a target?", xlabel="threshold of the score", ylabel="share decided rightly")
            axis.legend()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
