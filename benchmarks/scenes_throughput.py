"""Scenes per second that one core draws, with annotations and questions; and the accuracy of trivial answers.

    python benchmarks/scenes_throughput.py [--images 1000] [--photos FOLDER] [--paste COCO_FOLDER] [--baselines]

The target is 300 images a second at 128 px, 60 with pasted objects. Processor time counts this process alone and does
not depend on other work on the machine; wall-clock time is printed beside it.
"""

import argparse
import resource
import time

from perceptiongpt.data.scenes.bench import (
    BENCH,
    BENCH_COMBINATIONS,
    BENCH_IMAGES,
    FIRST_TEST_SEED,
    bench_baselines,
)
from perceptiongpt.data.scenes.dataset import ScenesDataset


def measure(name: str, draw, images: int, least: float | None = None) -> None:
    """Print the rate of `draw(index)` over `images` indices, after ten that are not counted."""
    for index in range(10):
        draw(index)
    wall, processor = time.perf_counter(), time.process_time()
    rows = sum(len(draw(index)) for index in range(10, images + 10))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    wanted = "" if least is None else f"   target: {least:g}"
    print(
        f"{name:44s} {images / processor:7.0f} images/s of processor time {images / wall:7.0f} of wall-clock "
        f"{rows / processor:7.0f} rows/s{wanted}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--photos", help="folder of photos for backgrounds")
    parser.add_argument("--paste", help="folder in COCO's layout whose objects are pasted")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--baselines", action="store_true", help="also the trivial answers on scenes-bench-1")
    arguments = parser.parse_args()

    modes = [("drawn", {}, 300.0)]
    if arguments.photos:
        modes.append(("drawn, photos behind", {"photos": arguments.photos}, 300.0))
    if arguments.paste:
        modes.append(("pasted", {"paste": arguments.paste}, 60.0))
    for name, options, least in modes:
        least = least if arguments.size == 128 else None
        dataset = ScenesDataset(10**6, 0, size=arguments.size, questions=1, **options)
        measure(f"{name}, one question", dataset.__getitem__, arguments.images, least)
        dataset.questions = 8
        measure(f"{name}, 8 questions", dataset.__getitem__, arguments.images, least)
        measure(f"{name}, one question of every task", dataset.image_rows, arguments.images, least)
    bench = ScenesDataset(10**6, FIRST_TEST_SEED, split=BENCH)
    measure(BENCH, bench.image_rows, arguments.images)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    if arguments.baselines:
        for split in (BENCH, BENCH_COMBINATIONS):
            values = bench_baselines(BENCH_IMAGES, FIRST_TEST_SEED, split)
            print(
                f"{split}: Acc@0.5 over {values['samples']} samples with a target (of {BENCH_IMAGES}): a random "
                f"object of the named class {values['random_of_class']:.3f} (limit 0.45), the largest object "
                f"{values['largest']:.3f} (limit 0.35)"
            )


if __name__ == "__main__":
    main()
