"""How many scenes a second one core draws, with their annotations and questions; and what trivial answers reach.

    python benchmarks/scenes_throughput.py [--pictures 1000] [--photos FOLDER] [--paste COCO_FOLDER] [--baselines]

Asked for: at least 300 pictures a second at 128 px, 60 where real objects are pasted. Processor time is that of this
process alone, so it says the same on a machine that is busy; wall-clock time is printed beside it.
"""

import argparse
import resource
import time

from perceptiongpt.data.scenes.dataset import (
    BENCH,
    BENCH_COMBINATIONS,
    BENCH_PICTURES,
    FIRST_TEST_SEED,
    ScenesDataset,
    bench_baselines,
)


def measure(name: str, draw, pictures: int, least: float | None = None) -> None:
    """Print the rate of `draw(index)` over so many pictures, after ten that are not counted."""
    for index in range(10):
        draw(index)
    wall, processor = time.perf_counter(), time.process_time()
    rows = sum(len(draw(index)) for index in range(10, pictures + 10))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    wanted = "" if least is None else f"   asked for: {least:g}"
    print(
        f"{name:44s} {pictures / processor:7.0f} pictures/s of processor time {pictures / wall:7.0f} of wall-clock "
        f"{rows / processor:7.0f} rows/s{wanted}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
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
        measure(f"{name}, one question", dataset.__getitem__, arguments.pictures, least)
        dataset.questions = 8
        measure(f"{name}, 8 questions", dataset.__getitem__, arguments.pictures, least)
        measure(f"{name}, one question of every task", dataset.picture_rows, arguments.pictures, least)
    bench = ScenesDataset(10**6, FIRST_TEST_SEED, split=BENCH)
    measure(BENCH, bench.picture_rows, arguments.pictures)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    if arguments.baselines:
        for split in (BENCH, BENCH_COMBINATIONS):
            values = bench_baselines(BENCH_PICTURES, FIRST_TEST_SEED, split)
            print(
                f"{split}: Acc@0.5 over {values['samples']} samples with a target (of {BENCH_PICTURES}): a random "
                f"object of the named class {values['random_of_class']:.3f} (limit 0.45), the largest object "
                f"{values['largest']:.3f} (limit 0.35)"
            )


if __name__ == "__main__":
    main()
