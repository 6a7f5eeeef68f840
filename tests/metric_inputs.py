"""Inputs of the metric tests: masks as RLE, and metrics that keep their files in a folder of their own."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from perceptiongpt import metrics


def rle(pixels) -> dict:
    """COCO RLE, counts as text, of an array (height, width)."""
    encoded = coco_mask.encode(np.asfortranarray(np.asarray(pixels, dtype=np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def rectangle(x0, y0, x1, y1, height=20, width=30) -> dict:
    pixels = np.zeros((height, width))
    pixels[y0:y1, x0:x1] = 1
    return rle(pixels)


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
