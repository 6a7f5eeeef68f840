"""COCO folders of a few drawn shapes, on photos that ship with scikit-image or on gradients: what demo.py trains on."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageDraw
from tqdm import trange


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
