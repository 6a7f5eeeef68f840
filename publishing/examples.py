"""What a staged repository is asked in its check, and the picture of its answers for the card."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from perceptiongpt.drawing import contact_sheet, draw_objects
from perceptiongpt.images_perceptiongpt import read_image
from perceptiongpt.publishing.stage import IMAGE_FOLDER, PublishError, Stage


SCENES_SEED = 1_000_300
SCENES = 4
MOST_TOKENS = 64
SHEET_COLUMNS = 2
LAST_LINES = 3


def image_examples(paths: Sequence[str | Path], text: str, folder: Path) -> list[dict]:
    """Examples that ask the same about some images, copied upright and without metadata into `folder`.

    Raises:
        PublishError: an image cannot be read.
    """
    examples = []
    for path in paths:
        try:
            image = read_image(Path(path))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise PublishError(f"--image {path} cannot be read as an image: {error}") from error
        examples.append(keep_example(image, text, folder, len(examples)))
    return examples


def scene_examples(folder: Path) -> list[dict]:
    """Examples about drawn scenes, the same ones for every checkpoint; no training run draws them."""
    from perceptiongpt.configuration_perceptiongpt import IMAGE_TOKEN
    from perceptiongpt.data.sources import rows

    tasks = ["refer", "detect"]
    found = list(rows("scenes", split="test", limit=4 * SCENES, seed=SCENES_SEED, tasks=tasks, evaluation=True))
    # One question a picture, the tasks in turn.
    chosen = []
    for row in found:
        wanted = tasks[len(chosen) % len(tasks)]
        if row["task"] == wanted and row["image_id"] not in {one["image_id"] for one in chosen}:
            chosen.append(row)
    return [
        keep_example(row["image"], row["messages"][0]["content"].replace(IMAGE_TOKEN, "").strip(), folder, number)
        for number, row in enumerate(chosen[:SCENES])
    ]


def keep_example(image: Image.Image, text: str, folder: Path, number: int) -> dict:
    path = folder / f"example_{number}.png"
    image.convert("RGB").save(path)
    return {"image": str(path), "text": text}


def answer_in_fresh_process(stage: Path, examples: list[dict], folder: Path, base: Path | None = None) -> list[dict]:
    """Answer examples with a stage alone: a new process, remote code, this package hidden, no network.

    Args:
        stage: the staged model, or the staged adapter of `base`.
        examples: {"image": path, "text": prompt}.
        folder: an existing folder for the process's files.
        base: the folder of the base model, where the stage is an adapter.

    Returns:
        For each example {"text", "objects"} with masks as bool arrays of the image's size.

    Raises:
        PublishError: the stage cannot be loaded or does not answer; the message ends with the process's last words.
    """
    request = {
        "folder": str(base or stage),
        "adapter": str(stage) if base else None,
        "examples": examples,
        "max_new_tokens": MOST_TOKENS,
        "answers": str(folder),
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"} | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_HOME": str(folder / "home"),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-I", str(Path(__file__).with_name("check.py")), str(folder / "request.json")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = " | ".join(line.strip() for line in done.stderr.strip().splitlines()[-LAST_LINES:])
        raise PublishError(f"the stage {stage} does not load and answer by itself: {last}")
    results = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    for number, result in enumerate(results):
        for one, mask in zip(result["objects"], np.load(folder / f"{number}.npy"), strict=True):
            one["mask"] = mask
    return results


def draw_answers(examples: list[dict], results: list[dict], stage: Stage) -> str:
    """Draw the answers side by side into the stage; returns the picture's path in it."""
    drawn = []
    for example, result in zip(examples, results, strict=True):
        with Image.open(example["image"]) as image:
            caption = f"{example['text']} -> {result['text'] or '(no words)'}"
            drawn.append(draw_objects(image.convert("RGB"), result, caption=caption))
    path = f"{IMAGE_FOLDER}/answers.jpg"
    contact_sheet(drawn, min(SHEET_COLUMNS, len(drawn)), stage.folder / path)
    return path
