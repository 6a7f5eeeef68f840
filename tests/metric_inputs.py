"""Inputs of the tests of metrics and evaluation: masks as RLE, made samples and predictions. No test lives here."""

import json
from pathlib import Path

import numpy as np
import pytest

from perceptiongpt import metrics, validate
from perceptiongpt.data.reading import Problems
from perceptiongpt.evaluation.benchmarks import find_benchmark
from perceptiongpt.evaluation.predictions import plain_text, references
from perceptiongpt.evaluation.samples import complete_options, read_samples
from perceptiongpt.geometry_perceptiongpt import encode_rle


SIZE = {"width": 60, "height": 40}  # of a made sample's image


def rle(pixels) -> dict:
    """COCO RLE, counts as text, of an array (height, width)."""
    return encode_rle(np.asarray(pixels, dtype=bool))


def rectangle(x0, y0, x1, y1, height=20, width=30) -> dict:
    pixels = np.zeros((height, width))
    pixels[y0:y1, x0:x1] = 1
    return rle(pixels)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def compute(name: str, folder, predictions, references, batch_size: int | None = None, columns=None, **options) -> dict:
    """Results of a metric, all rows at once or in batches; `columns`: further columns."""
    metric = metrics.load(name, cache_dir=str(folder))
    columns = columns or {}
    if batch_size is None:
        return metric.compute(predictions=predictions, references=references, **columns, **options)
    for start in range(0, len(predictions), batch_size):
        rows = slice(start, start + batch_size)
        parts = {key: column[rows] for key, column in columns.items()}
        metric.add_batch(predictions=predictions[rows], references=references[rows], **parts)
    return metric.compute(**options)


def kept(results: dict) -> dict:
    """The numbers among the results."""
    return {key: value for key, value in results.items() if key not in ("problems", "samples", "tokenizer")}


def approx(results: dict) -> dict:
    """What equals `kept` of results that differ by rounding only."""
    return {key: value if value is None else pytest.approx(value, abs=1e-9) for key, value in kept(results).items()}


# ---- evaluation ------------------------------------------------------------------------------------------------------


def made_sample(number: int, targets: list, task="refer", text="<vis>", **more) -> dict:
    """A sample whose targets are boxes, with rectangles as their masks."""
    boxes, masks = [list(map(float, box)) for box in targets], [rectangle(*box, **SIZE) for box in targets]
    answers = [{"content": text * len(targets) or "There is no cup.", "boxes": boxes, "masks": masks}]
    sample = {"id": f"{number}-0", "image_id": str(number), "task": task, "phrase": "cup", "answers": answers, **SIZE}
    return sample | {"prompt": "Find every cup.", "human_answers": None, "ignore": None} | more


def made_entry(sample: dict, boxes: list, scores=None) -> dict:
    """A model's prediction of boxes, with rectangles as their masks."""
    scores = scores or [0.5] * len(boxes)
    objects = [
        {"box": list(map(float, b)), "mask": rectangle(*b, **SIZE), "score": score, "mask_score": score, "phrase": None}
        for b, score in zip(boxes, scores, strict=True)
    ]
    return {"id": sample["id"], "text": "", "objects": objects, "error": None, "finished": True, "tokens": 2, "ms": 1.0}


def perfect(sample: dict) -> dict:
    """The line of a predictions file that is right."""
    known = [{key: value for key, value in one.items() if value is not None} for one in references(sample)]
    objects = [one | {"score": 0.9, "mask_score": 0.8, "phrase": "it"} for one in known]
    return {"id": sample["id"], "text": plain_text(sample["answers"][0]["content"]), "objects": objects}


def noisy_set(seed: int, images: int = 12) -> tuple[list[dict], dict[str, dict]]:
    """Samples with none, one or two targets, and predictions of them that are often off."""
    rng = np.random.default_rng(seed)
    samples, entries = [], {}
    for number in range(images * 2):
        boxes = [(5 + 25 * i, 5, 25 + 25 * i, 30) for i in range(number % 3)]
        task = ("no_target", "refer", "detect")[number % 3]
        sample = made_sample(number, boxes, task=task, image_id=str(number // 2))
        moved = [tuple(int(side + step) for side, step in zip(box, rng.integers(-4, 5, 4))) for box in boxes]
        if rng.random() < 0.3:
            moved.append((30, 8, 40, 20))
        if rng.random() < 0.2:
            moved = []
        samples.append(sample)
        entries[sample["id"]] = made_entry(sample, moved, rng.random(len(moved)).tolist())
    return samples, entries


def mini_arguments(data_dir: Path) -> list[str]:
    """The command line of the eight expressions of RefCOCO whose photo is at hand."""
    folders = ["--data", str(data_dir / "refcoco_mini"), "--images", str(data_dir / "coco128/train2017")]
    return ["--benchmark", "refcoco", "--split", "testB", *folders]


def samples_of(*arguments) -> list[dict]:
    """The samples that `validate.py` would measure."""
    options = validate.parse_arguments(["--predictions", "x", *map(str, arguments)])
    benchmark = find_benchmark(options.benchmark)
    complete_options(options, benchmark)
    return read_samples(benchmark, options, Problems())


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
