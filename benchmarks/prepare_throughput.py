"""Rows per second and peak memory of data.prepare on a made-up Visual Genome file of any size.

python benchmarks/prepare_throughput.py --regions 1000000 --num_proc 1
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from perceptiongpt.data.prepare import prepare


REGIONS_PER_IMAGE = 50


def write_regions(root: Path, count: int) -> None:
    """`region_descriptions.json` and `image_data.json` in Visual Genome's form, written image by image."""
    images = -(-count // REGIONS_PER_IMAGE)
    with (root / "region_descriptions.json").open("w") as file:
        for image in range(images):
            regions = [
                {
                    "region_id": image * REGIONS_PER_IMAGE + index,
                    "image_id": image,
                    "phrase": f"the number {index} thing beside a tree ",
                    "x": index,
                    "y": 2 * index,
                    "width": 20 + index,
                    "height": 30 + index,
                }
                for index in range(min(REGIONS_PER_IMAGE, count - image * REGIONS_PER_IMAGE))
            ]
            file.write(("[" if image == 0 else ", ") + json.dumps({"id": image, "regions": regions}))
        file.write("]")
    size = {"width": 800, "height": 600, "coco_id": None}
    data = [{"image_id": image, "url": f"https://x/{image}.jpg", **size} for image in range(images)]
    (root / "image_data.json").write_text(json.dumps(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, default=1_000_000)
    parser.add_argument("--num_proc", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_regions(root, options.regions)
        before = resource.getrusage(resource.RUSAGE_SELF)
        start = time.perf_counter()
        summary = prepare(
            "visual_genome",
            root / "out",
            root=str(root),
            tasks=["region_caption"],
            pictures="none",
            num_proc=options.num_proc,
        )
        seconds = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_SELF)
        workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = {
        "regions": options.regions,
        "rows": summary["rows"],
        "num_proc": options.num_proc,
        "seconds": round(seconds, 1),
        "rows_per_second": round(summary["rows"] / seconds),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_memory_mb_before": before.ru_maxrss // 1024,
        "peak_memory_mb": after.ru_maxrss // 1024,
        "peak_memory_mb_of_a_worker": workers.ru_maxrss // 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
