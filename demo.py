"""Draw images, train on them, ask about new ones: in a few minutes what a COCO folder of your own goes through.

    python demo.py --output outputs/demo
    python demo.py --output outputs/scratch --from_scratch     # from random weights: recipes/demo_from_scratch.yaml

The checkpoint in this folder knows circles, squares, triangles and stars; the demo teaches it crosses. Everything is
drawn here or ships with scikit-image. `OUTPUT` gets COCO folders of drawn images, the recipe and the trained model, and
images with the answers drawn on them, whose paths are printed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import skimage
import torch
import yaml
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from perceptiongpt.data.templates import load_templates
from perceptiongpt.drawing import draw_objects
from perceptiongpt.inference import answer, hide_progress_bars_in_logs, load
from perceptiongpt.training.answers import answer_and_score, choose_generation_rows, mean_scores
from perceptiongpt.training.datasets import load_sources
from perceptiongpt.training.recipe import merge, read_yaml


ROOT = Path(__file__).resolve().parent
EVALUATED_PROMPTS = 200
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "grass.png", "brick.png")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 90, 220),
    "yellow": (245, 215, 30),
    "purple": (140, 60, 190),
    "white": (245, 245, 245),
}


def regular_polygon(corners: int, start: float, inner: float = 1.0) -> np.ndarray:
    """Corners `(corners, 2)` on the unit circle from the angle `start` on, every second one at the radius `inner`."""
    angles = start + 2 * np.pi * np.arange(corners) / corners
    radii = np.where(np.arange(corners) % 2, inner, 1.0)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]


PLUS = [[-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1], [1, 3], [-1, 3], [-1, 1], [-3, 1], [-3, -1], [-1, -1]]
KNOWN_SHAPES = {
    "circle": regular_polygon(48, 0),
    "square": regular_polygon(4, np.pi / 4),
    "triangle": regular_polygon(3, -np.pi / 2),
    "star": regular_polygon(10, -np.pi / 2, 0.4),
}
NEW_SHAPES = {"cross": np.array(PLUS) / 3}
SHAPES = KNOWN_SHAPES | NEW_SHAPES


@cache
def read_photo(name: str) -> Image.Image:
    """A photo that ships with scikit-image."""
    return Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")


def draw_background(rng: np.random.Generator, size: int) -> Image.Image:
    """A gradient between two muted colours, or a piece of a photo that ships with scikit-image, both a little noisy."""
    if rng.random() < 0.5:
        first, second = rng.uniform(40, 200, (2, 3))
        weight = np.linspace(0, 1, size)[:, None, None]
        pixels = np.broadcast_to(first * weight + second * (1 - weight), (size, size, 3))
        pixels = np.rot90(pixels, rng.integers(4))
    else:
        photo = read_photo(rng.choice(PHOTOS))
        side = int(rng.uniform(0.4, 1) * min(photo.size))
        left, top = rng.integers(photo.width - side + 1), rng.integers(photo.height - side + 1)
        pixels = np.asarray(photo.crop((left, top, left + side, top + side)).resize((size, size)))
    return Image.fromarray((pixels + rng.normal(0, 4, (size, size, 3))).clip(0, 255).astype(np.uint8))


def draw_image(rng: np.random.Generator, shapes: list[str], background: Image.Image | None = None):
    """
    One to three shapes that do not touch, on a background of 128 x 128 pixels unless one is given.

    Returns:
        the image, and a list of (category, polygon as x0, y0, x1, y1, ... in pixels).
    """
    background = draw_background(rng, 128) if background is None else background
    unit = min(background.size) / 128
    # Drawn twice as large, then shrunk: smooth edges.
    canvas = background.resize((background.width * 2, background.height * 2))
    objects, taken = [], []
    for _ in range(rng.choice([1, 1, 2, 2, 3])):
        radius = unit * float(np.exp(rng.uniform(np.log(10), np.log(26))))
        x, y = rng.uniform(radius, np.array(background.size) - radius)
        if any(np.hypot(x - a, y - b) < radius + r + 2 * unit for a, b, r in taken):
            continue
        taken.append((x, y, radius))
        color, shape = str(rng.choice(list(COLORS))), str(rng.choice(shapes))
        turn = rng.uniform(-0.2, 0.2)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        points = np.array([x, y]) + radius * SHAPES[shape] @ rotation
        shade = tuple((np.array(COLORS[color]) + rng.normal(0, 10, 3)).clip(0, 255).astype(int).tolist())
        ImageDraw.Draw(canvas).polygon([tuple(point) for point in points * 2], fill=shade, outline=(20, 20, 20))
        objects.append((f"{color} {shape}", points.round(2).ravel().tolist()))
    return canvas.resize(background.size, Image.Resampling.LANCZOS), objects


def draw_coco(folder: Path, count: int, seed: int, shapes: list[str]) -> dict:
    """A COCO folder of drawn images; returns it as a source of a recipe."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, images, annotations = np.random.default_rng(seed), [], []
    names = [f"{color} {shape}" for color in COLORS for shape in dict.fromkeys(shapes)]
    for image_id in trange(count, desc=f"drawing {folder.name}", unit="image", disable=None):
        image, objects = draw_image(rng, shapes)
        file_name = f"{image_id:06d}.png"
        image.save(folder / "images" / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": image.width, "height": image.height})
        for name, polygon in objects:
            xs, ys = np.array(polygon[::2]), np.array(polygon[1::2])
            box = [float(value) for value in (xs.min(), ys.min(), np.ptp(xs), np.ptp(ys))]
            common = {"id": len(annotations), "image_id": image_id, "category_id": names.index(name), "iscrowd": 0}
            annotations.append({**common, "bbox": box, "area": box[2] * box[3], "segmentation": [polygon]})
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return {"source": "coco", "annotations": str(folder / "instances.json"), "images": str(folder / "images")}


def small_backbones(folder: Path, source: dict) -> None:
    """Save a small CLIP tower that knows the drawn shapes, and a small random Llama with a tokenizer of its own."""
    torch.manual_seed(0)
    things = [f"the {place} {color} {shape}" for place in ("left", "largest") for color in COLORS for shape in SHAPES]
    templates = [load_templates()[task] for task in ("refer", "detect", "box_to_mask")]
    prompts = [prompt for task in templates for prompt in (*task["prompts"], task["evaluation"])]
    corpus = [prompt.replace("{phrase}", thing) for prompt in prompts for thing in things]
    corpus += ["user assistant There is no"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "text")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        initializer_range=0.07,  # 1 / sqrt(hidden_size): the usual 0.02 is for models twenty times as wide
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(text).save_pretrained(folder / "text")
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=5,
        image_size=128,
        patch_size=16,
    )
    tower = CLIPVisionModel(vision)
    warm_up_tower(tower, source)
    tower.save_pretrained(folder / "vision")


def patch_labels(folder: Path, patch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The images of a drawn COCO folder, uint8 `(N, 3, 128, 128)`, and for each patch of each the category that covers
    most of it, `(N, patches)`, 0 for none, with that object's box, xyxy in 0..1, `(N, patches, 4)`.
    """
    content = json.loads((folder / "instances.json").read_text())
    objects = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    images, labels, boxes = [], [], []
    for image in content["images"]:
        pixels = np.asarray(Image.open(folder / "images" / image["file_name"]))
        cover = Image.new("L", (image["width"], image["height"]))
        for number, annotation in enumerate(objects[image["id"]], 1):
            ImageDraw.Draw(cover).polygon(annotation["segmentation"][0], fill=number)
        grid = image["width"] // patch_size
        patches = np.asarray(cover).reshape(grid, patch_size, grid, patch_size).swapaxes(1, 2).reshape(grid * grid, -1)
        numbers = np.arange(1, len(objects[image["id"]]) + 1)
        share = (patches[:, None] == numbers[:, None]).mean(-1)
        owner = np.where(share.max(1) > 0.15, share.argmax(1) + 1, 0)
        categories = np.array([0] + [annotation["category_id"] + 1 for annotation in objects[image["id"]]])
        corners = [[x, y, x + width, y + height] for x, y, width, height in (a["bbox"] for a in objects[image["id"]])]
        images.append(pixels.transpose(2, 0, 1))
        labels.append(categories[owner])
        boxes.append(np.array([[0.0] * 4, *corners])[owner] / image["width"])
    return torch.tensor(np.array(images)), torch.tensor(np.array(labels)), torch.tensor(np.array(boxes)).float()


def warm_up_tower(tower: CLIPVisionModel, source: dict, num_steps: int = 1200, batch_size: int = 48) -> None:
    """Train a fresh tower to name what each patch shows: from answers alone that would take very long."""
    config = tower.config
    images, labels, boxes = patch_labels(Path(source["images"]).parent, config.patch_size)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    num_classes = int(labels.max()) + 1
    head = torch.nn.Linear(config.hidden_size, num_classes + 4)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.1)
    progress = trange(num_steps, desc="warming up the tower", unit="step", disable=None)
    for _ in progress:
        index = torch.randint(len(images), (batch_size,))
        features = tower((images[index].float() / 255 - mean) / std).last_hidden_state[:, 1:]
        classes, corners = head(features).split([num_classes, 4], dim=-1)
        target, covered = labels[index], labels[index] > 0
        box_loss = (corners.sigmoid() - boxes[index])[covered].abs().mean()
        loss = torch.nn.functional.cross_entropy(classes.flatten(0, 1), target.flatten()) + 5 * box_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        accuracy = (classes.argmax(-1) == target)[covered].float().mean()
        progress.set_postfix(accuracy=f"{accuracy:.2f}", box_error=f"{box_loss:.3f}", refresh=False)


def write_recipe(path: Path, name: str, model: dict, train_source: dict, eval_source: dict) -> None:
    """A recipe of `recipes/`, completed with the model and the data of this demo."""
    given = {"model": model, "data": {"train": train_source, "eval": eval_source}}
    path.write_text(yaml.safe_dump(merge(read_yaml(ROOT / "recipes" / name), given), sort_keys=False))


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
    parser.add_argument("--from_scratch", action="store_true", help="from random weights, without the new shape")
    parser.add_argument("--images", type=int, help="how many to draw for training; default 400, from scratch 6000")
    parser.add_argument("--resume", action="store_true", help="continue a run from scratch that was interrupted")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe, as for train.py")
    options = parser.parse_intermixed_args()
    hide_progress_bars_in_logs()
    output, scratch = options.output, options.from_scratch
    if not options.resume:
        shutil.rmtree(output / "model", ignore_errors=True)

    shapes = list(KNOWN_SHAPES) if scratch else [*KNOWN_SHAPES, *NEW_SHAPES, *NEW_SHAPES]
    train_source = draw_coco(output / "drawn_train", options.images or (6000 if scratch else 400), 0, shapes)
    eval_source = draw_coco(output / "drawn_eval", 100, 10**6, shapes)
    model = {"checkpoint": str(ROOT)}
    if scratch:
        model = {name: str(output / "backbones" / name) for name in ("vision", "text")}
        if not options.resume:
            small_backbones(output / "backbones", train_source)
    name = "demo_from_scratch.yaml" if scratch else "demo.yaml"
    write_recipe(output / name, name, model, train_source, eval_source)
    command = ["--config", str(output / name), "--output", str(output / "model"), *options.overrides]
    command += ["--resume"] if options.resume else []
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
