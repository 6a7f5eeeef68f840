"""The demo, from drawing to drawn answers, with a few steps of training."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


ROOT = Path(__file__).parents[1]


def test_drawn_shapes_are_where_their_annotations_say(tmp_path):
    from perceptiongpt.data.formats.coco import load_coco
    from perceptiongpt.data.schema import decode_rle
    from perceptiongpt.data.shapes import COLORS, KNOWN_SHAPES, draw_coco

    source = draw_coco(tmp_path, 12, 3, list(KNOWN_SHAPES))
    source.pop("source")
    again = draw_coco(tmp_path / "again", 12, 3, list(KNOWN_SHAPES))
    assert Path(source["annotations"]).read_text() == Path(again["annotations"]).read_text()
    rows = list(load_coco(**source, tasks=["refer"]))
    assert len(rows) > 15
    for row in rows:
        color = next(name for name in COLORS if f" {name} " in row["messages"][0]["content"].lower())
        pixels = np.asarray(row["image"].convert("RGB"), dtype=float)
        mask = decode_rle(row["masks"][0]).astype(bool)
        assert np.abs(np.median(pixels[mask], axis=0) - COLORS[color]).max() < 60
        ys, xs = np.nonzero(mask)
        x0, y0, x1, y1 = row["boxes"][0]
        assert np.abs([xs.min() - x0, ys.min() - y0, xs.max() + 1 - x1, ys.max() + 1 - y1]).max() <= 2


@pytest.mark.slow
def test_demo_from_the_command_line(tmp_path):
    output = tmp_path / "a #2, b"  # which YAML would read otherwise
    command = [sys.executable, "demo.py", "--output", str(output), "--images", "8"]
    for _ in range(2):  # a second run starts anew beside what the first one left
        run = subprocess.run(
            [*command, "training.max_steps=2", "data.generate_rows=4"], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr[-2000:]
    paths = [Path(line) for line in run.stdout.splitlines() if line.endswith(".png")]
    assert len(paths) >= 2 and all(min(Image.open(path).size) > 200 for path in paths)
    assert "mask_miou" in run.stdout
    # A log gets neither progress bars nor warnings about the data loader.
    assert "it/s" not in run.stderr and "pin_memory" not in run.stderr and len(run.stderr.splitlines()) < 5, run.stderr
