"""What the fixed scenes bench reports beside its metrics: a breakdown, and answers that need no model."""

import argparse
import math
from collections import defaultdict

import numpy as np

from perceptiongpt.data.scenes.bench import bench_baselines, scene_details
from perceptiongpt.evaluation.intervals import share_interval
from perceptiongpt.evaluation.results import Result


# Name, least side, and side above it, of the target's longer side in pixels; a side of 32 belongs to the middle.
SIDES = (("< 16", 0, 16), ("16-32", 16, math.nextafter(32, 33)), ("> 32", math.nextafter(32, 33), math.inf))
SMALLEST_EXACT_SIDE = 16  # Acc@0.9 counts targets from this side on
SHOWN = (("acc@0.5", "hit"), ("acc@0.75", "hit@0.75"), ("miou", "value"))


def bench_details(samples: list[dict], result: Result, options: argparse.Namespace) -> dict:
    """Acc@0.5 and others by the expression's kind and the target's side, and Acc@0.5 of answers without a model."""
    photos = options.data or options.images
    kinds, sides, exact = defaultdict(list), defaultdict(list), []
    for sample in samples:
        columns = result.columns["box_accuracy"].get(sample["id"])
        if columns is None:
            continue
        details = scene_details(sample["split"], sample["image_id"], photos)
        kinds[details["kind"]].append(columns)
        side = details["side"]
        sides[next(name for name, low, high in SIDES if low <= side < high)].append(columns)
        if side >= SMALLEST_EXACT_SIDE:
            exact.append(columns["hit@0.90"])
    breakdown = {"kind": {name: _means(rows) for name, rows in sorted(kinds.items())}}
    breakdown["side"] = {name: _means(sides[name]) for name, _, _ in SIDES if sides[name]}
    breakdown["acc@0.9 of sides >= 16"] = float(np.mean(exact)) if exact else None
    breakdown["interval of acc@0.9 of sides >= 16"] = _interval(exact) if exact else None
    images = len({sample["image_id"] for sample in samples})
    baselines = bench_baselines(images, options.seed, options.split)
    return {"breakdown": breakdown, "without a model, acc@0.5": baselines}


def _means(rows: list[dict]) -> dict:
    means = {key: float(np.mean([row[column] for row in rows])) for key, column in SHOWN}
    return {"n": len(rows), **means, "interval of acc@0.5": _interval([row["hit"] for row in rows])}


def _interval(hits: list[float]) -> list[float]:
    return share_interval(np.array(hits), np.ones(len(hits)), np.arange(len(hits)))
