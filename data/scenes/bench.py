"""The fixed test sets of drawn scenes: one expression an image, in fixed shares of kinds, with fixed prompts.

`scenes-bench-1` asks for anything that training shows. In `scenes-bench-1-combinations` every target is one of
`HELD_OUT`, the pairs of colour and shape that training never shows. Both are defined at 128 px for seeds from 10^6 on;
their rows never change.
"""

from pathlib import Path
from random import Random

import numpy as np

from perceptiongpt.data.scenes.expressions import find_expression, selected
from perceptiongpt.data.scenes.photos import Photos
from perceptiongpt.data.scenes.pictures import (
    HELD_OUT,
    POOL_SCENES,
    REFERENCE_SIZE,
    Layout,
    Scene,
    draw_scene,
    draw_sides,
)
from perceptiongpt.data.scenes.tasks import SCENE_TRIES, Question, refer_question
from perceptiongpt.geometry_perceptiongpt import box_iou


BENCH, BENCH_COMBINATIONS = "scenes-bench-1", "scenes-bench-1-combinations"
BENCH_LAYOUTS = {
    BENCH: Layout((3, 9), (10.0, 56.0), hidden=0.3),
    BENCH_COMBINATIONS: Layout((3, 9), (10.0, 56.0), hidden=0.3, held_out=True),
}
BENCH_IMAGES = 2000  # of a whole test set
FIRST_TEST_SEED = 10**6
# Of every 20 samples so many are of these kinds.
BENCH_SHARES = {
    ("attribute",): 5,
    ("position", "ordinal"): 5,
    ("relation",): 4,
    ("size", "superlative"): 3,
    ("negation",): 1,
    ("none",): 2,
}
BENCH_BLOCK = sum(BENCH_SHARES.values())
TRIES_PER_SIDES = 40  # scenes that are tried with the same number and sides of objects


def draw_bench(split: str, seed: int, index: int, photos: Photos | None = None) -> tuple[Scene, Question]:
    """One sample. Number and sides of its objects do not depend on the expression."""
    layout, held_out = BENCH_LAYOUTS[split], split == BENCH_COMBINATIONS
    base = f"{split}/{seed}"
    block, place = divmod(index, BENCH_BLOCK)
    schedule = [kinds for kinds, count in BENCH_SHARES.items() for _ in range(count)]
    kinds = Random(f"{base}/{block}/kinds").sample(schedule, BENCH_BLOCK)[place]
    plain = Random(f"{base}/{block}/plain").sample([False, True] * (BENCH_BLOCK // 2), BENCH_BLOCK)[place]
    wanted = 0 if kinds == ("none",) else 1
    for attempt in range(SCENE_TRIES):
        rng = Random(f"{base}/{index}/{attempt}/questions")
        sides = draw_sides(Random(f"{base}/{index}/{attempt // TRIES_PER_SIDES}/sides"), REFERENCE_SIZE, layout)
        scene = draw_scene(
            f"{base}/{index}/{attempt}", plain=plain, sides=sides, layout=layout, photos=photos,
            pool=f"{base}/{index // POOL_SCENES}",
        )  # fmt: skip

        def fits(targets: tuple[int, ...]) -> bool:
            if len(targets) != wanted:
                return False
            one = scene.objects[targets[0]] if targets else None
            return not held_out or one is None or (one.color, one.shape) in HELD_OUT

        for kind in rng.sample(kinds, len(kinds)):
            found = find_expression(scene, kind, rng, fits, held_out=held_out)
            if found is not None and (kind == "none" or len(selected(scene, None, None, found.named)) > 1):
                return scene, refer_question(scene, found, None)
    raise ValueError(f"scenes: none of {SCENE_TRIES} scenes allows sample {index} of {split}")


def scene_details(split: str, image_id: str, photos: str | Path | None = None) -> dict:
    """`ScenesDataset.details` of a bench row, from its `split` and `image_id`; `photos` as the row was made with."""
    if split not in BENCH_LAYOUTS:
        raise ValueError(f"scenes: split {split!r} has several rows an image; use ScenesDataset.details")
    seed, index = (int(part) for part in image_id.split("-")[-2:])
    scene, question = draw_bench(split, seed, index, None if photos is None else Photos(photos))
    return question.details(scene)


def bench_baselines(length: int = BENCH_IMAGES, seed: int = FIRST_TEST_SEED, split: str = BENCH) -> dict[str, float]:
    """Acc@0.5 on a bench split, over its samples with a target, of answers that need no model.

    Returns:
        `random_of_class`: expected, of a random object of the class that the expression names; `largest`: of the
        object of which most is visible; `samples`: with a target.
    """
    random_of_class, largest = [], []
    for index in range(length):
        scene, question = draw_bench(split, seed, index)
        if question.target is None:
            continue
        of_class = [one.box for one in selected(scene, None, None, question.expression.named)]
        random_of_class.append(np.mean(box_iou(of_class, question.target.box) >= 0.5))
        largest.append(box_iou(max(scene.objects, key=lambda one: one.area).box, question.target.box) >= 0.5)
    return {
        "random_of_class": float(np.mean(random_of_class)),
        "largest": float(np.mean(largest)),
        "samples": len(largest),
    }
