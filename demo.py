"""Ask the checkpoint in this folder about scenes and photos, teach it a shape that it does not know, and ask again.

    python demo.py --output outputs/demo

The new shape is a house. Training on it takes two to three minutes. `OUTPUT` gets the trained model and images with the
answers drawn on them, those about the new shape before and after training side by side. Their paths are printed.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from perceptiongpt.data.scenes import pictures
from perceptiongpt.data.scenes.dataset import ScenesDataset
from perceptiongpt.drawing import contact_sheet, draw_objects
from perceptiongpt.inference import answer, hide_progress_bars_in_logs, load
from perceptiongpt.train import train
from perceptiongpt.training.answers import answer_and_score, mean_scores
from perceptiongpt.training.recipe import complete_recipe, merge, read_yaml


ROOT = Path(__file__).resolve().parent
NEW_SHAPE = "house"
# Outline, largest turn, largest stretch, share of a hole: as in `pictures.SHAPES`.
OUTLINE = ([(-0.75, 1), (0.75, 1), (0.75, -0.1), (0, -1), (-0.75, -0.1)], 0.2, 0.1, 0.0)
BESIDE = ("circle", "square", "triangle", "star")  # shapes in the scenes with houses
TEST_SEED = 1_234_567
SCORED_PROMPTS = 100
SHOWN_SCENES = 6
QUESTIONS = 3  # about each shown scene
# Photos that ship with scikit-image and in docs/images/photos, and what is asked about them.
PHOTOS = {
    "astronaut.png": ("Find the person.", "Find every dog."),
    "chelsea.png": ("Find the cat.", "Find every car."),
    "coffee.png": ("Find the cup.", "Find every person."),
    "000000234748.jpg": ("Find the car.", "Find the person.", "Find every potted plant."),
    "000000516008.jpg": ("Find the laptop.", "Find the scissors.", "Find every keyboard."),
}


def read_photo(name: str) -> Image.Image:
    """A photo of `PHOTOS`."""
    if (ROOT / "docs/images/photos" / name).is_file():
        return Image.open(ROOT / "docs/images/photos" / name).convert("RGB")
    import skimage

    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def ask(model, processor, image: Image.Image, prompts: list[str]) -> Image.Image:
    """The image with the answers to all prompts drawn on it, each object under its prompt, and the texts below."""
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
        for prompt in prompts
    ]
    results = answer(model, processor, messages, [(image.height, image.width)] * len(prompts), max_new_tokens=32)
    objects = [
        {**found, "phrase": prompt.removeprefix("Find ").rstrip(".")}
        for prompt, result in zip(prompts, results, strict=True)
        for found in result["objects"]
    ]
    texts = [f"{prompt} {result['text']}" for prompt, result in zip(prompts, results, strict=True) if result["text"]]
    return draw_objects(image, {"objects": objects}, caption="  ".join(texts) or None)


def prompt_of(row: dict) -> str:
    """What a row asks."""
    return row["messages"][0]["content"].removeprefix("<image>")


def scenes(**arguments) -> ScenesDataset:
    """Scenes that no training draws, with the fixed prompt of each task."""
    return ScenesDataset(10_000, TEST_SEED, split="test", evaluation=True, **arguments)


def rows_about(shape: str, count: int) -> list[dict]:
    """The first `count` rows that ask for one object of a shape by what it looks like."""
    dataset, rows = scenes(tasks=["refer"], kinds=["attribute"], questions=8), []
    for index in range(len(dataset)):
        for row in dataset[index]:
            if f" {shape}" in prompt_of(row):
                rows.append(row)
        if len(rows) >= count:
            return rows[:count]
    raise ValueError(f"the scenes have only {len(rows)} questions about {shape}")


def score(model, processor, rows: list[dict]) -> dict[str, float]:
    """The model's own answers to rows, scored."""
    batches = [rows[start : start + 20] for start in range(0, len(rows), 20)]
    scores = [answer_and_score(model, processor, batch, max_new_tokens=8) for batch in batches]
    return mean_scores(np.sum([one for batch in scores for one in batch], axis=0).tolist())


def main() -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder for images and the model")
    parser.add_argument("--max_steps", type=int, help="training steps; by default those of recipes/demo.yaml")
    options = parser.parse_args()
    hide_progress_bars_in_logs()
    output = options.output
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output / "model", ignore_errors=True)

    model, processor = load(str(ROOT))
    known = scenes(tasks=["refer"], questions=QUESTIONS)
    drawn = [
        ask(model, processor, rows[0]["image"], list(map(prompt_of, rows)))
        for rows in (known[index] for index in range(SHOWN_SCENES))
    ]
    contact_sheet(drawn, 3, output / "scenes.png")
    photos = [ask(model, processor, read_photo(name), list(prompts)) for name, prompts in PHOTOS.items()]
    contact_sheet(photos, 3, output / "photos.png")

    pictures.SHAPES = {NEW_SHAPE: OUTLINE} | {name: pictures.SHAPES[name] for name in BESIDE}
    rows = rows_about(NEW_SHAPE, SCORED_PROMPTS)
    shown = list({row["image_id"]: row for row in rows}.values())[:SHOWN_SCENES]
    scores, sheets = [], []
    for folder in (ROOT, output / "model"):
        if folder != ROOT:
            given = {"model": {"checkpoint": str(ROOT)}}
            given |= {"training": {"max_steps": options.max_steps}} if options.max_steps else {}
            train(complete_recipe(merge(read_yaml(ROOT / "recipes/demo.yaml"), given)), folder)
            model, processor = load(str(folder))
        scores.append(score(model, processor, rows))
        sheets.append([ask(model, processor, row["image"], [prompt_of(row)]) for row in shown])
    print(f"{len(rows)} questions about a {NEW_SHAPE}, answered before and after training:")
    for name in scores[0]:
        print(f"  {name:<10} {scores[0][name]:.3f}  {scores[1][name]:.3f}")
    contact_sheet([*sheets[0], *sheets[1]], SHOWN_SCENES, output / "before_and_after.png")
    for name in ("scenes", "photos", "before_and_after"):
        print(output / f"{name}.png")


if __name__ == "__main__":
    main()
