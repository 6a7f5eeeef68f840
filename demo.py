"""Draw images, train on them, ask about new ones: in a few minutes what a COCO folder of your own goes through.

    python demo.py --output outputs/demo

The checkpoint in this folder knows circles, squares, triangles and stars; the demo teaches it crosses. Everything is
drawn here or ships with scikit-image. `OUTPUT` gets COCO folders of drawn images, the recipe and the trained model, and
images with the answers drawn on them, whose paths are printed.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from perceptiongpt.data.shapes import (
    COLORS,
    KNOWN_SHAPES,
    NEW_SHAPES,
    draw_background,
    draw_coco,
    draw_image,
    read_photo,
)
from perceptiongpt.drawing import draw_objects
from perceptiongpt.inference import answer, hide_progress_bars_in_logs, load
from perceptiongpt.training.answers import answer_and_score, choose_generation_rows, mean_scores
from perceptiongpt.training.datasets import load_sources
from perceptiongpt.training.recipe import merge, read_yaml


ROOT = Path(__file__).resolve().parent
EVALUATED_PROMPTS = 200


def score(model, processor, source: dict, count: int) -> dict[str, float]:
    """The model's own answers to `count` prompts about the images of a source, scored."""
    rows = choose_generation_rows(load_sources([{**source, "tasks": ["refer", "detect", "no_target"]}], True), count)
    batches = [[rows[i] for i in range(start, min(start + 40, len(rows)))] for start in range(0, len(rows), 40)]
    scores = [answer_and_score(model, processor, batch, max_new_tokens=16) for batch in batches]
    return mean_scores(np.sum([one for batch in scores for one in batch], axis=0).tolist())


def ask(model, processor, image: Image.Image, there: list[str], absent: str, path: Path) -> None:
    """Ask for everything that is in an image, and for one thing that is not; draw the answers."""
    names = [*there, absent]
    content = [[{"type": "image", "image": image}, {"type": "text", "text": f"Find every {name}."}] for name in names]
    messages = [[{"role": "user", "content": items}] for items in content]
    results = answer(model, processor, messages, [(image.height, image.width)] * len(names), max_new_tokens=16)
    objects = [{**found, "phrase": name} for name, result in zip(names, results) for found in result["objects"]]
    draw_objects(image, {"objects": objects}, caption=results[-1]["text"] or None).save(path)


def main() -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--images", type=int, default=400, help="how many to draw for training (default: 400)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe, as for train.py")
    options = parser.parse_intermixed_args()
    hide_progress_bars_in_logs()
    output = options.output
    shutil.rmtree(output / "model", ignore_errors=True)

    shapes = [*KNOWN_SHAPES, *NEW_SHAPES, *NEW_SHAPES]
    train_source = draw_coco(output / "drawn_train", options.images, 0, shapes)
    eval_source = draw_coco(output / "drawn_eval", 100, 10**6, shapes)
    given = {"model": {"checkpoint": str(ROOT)}, "data": {"train": train_source, "eval": eval_source}}
    recipe = output / "demo.yaml"
    recipe.write_text(yaml.safe_dump(merge(read_yaml(ROOT / "recipes/demo.yaml"), given), sort_keys=False))
    command = ["--config", str(recipe), "--output", str(output / "model"), *options.overrides]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *command], check=True)

    model, processor = load(str(output / "model"))
    print("On 100 new drawn images, answering by itself:")
    for name, value in score(model, processor, eval_source, EVALUATED_PROMPTS).items():
        print(f"  {name:<10} {value:.3f}")
    for number, name in enumerate(("coffee.png", "chelsea.png", None, None)):
        rng = np.random.default_rng(2 * 10**6 + number)
        background = read_photo(name) if name else draw_background(rng, 512)
        image, objects = draw_image(rng, shapes, background)
        there = sorted({category for category, _ in objects})
        absent = next(f"{color} {shape}" for color in COLORS for shape in shapes if f"{color} {shape}" not in there)
        path = output / f"{Path(name).stem if name else f'drawn_{number}'}.png"
        ask(model, processor, image, there, absent, path)
        print(path)


if __name__ == "__main__":
    main()
