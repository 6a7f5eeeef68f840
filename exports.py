"""Write the answers of `predict.py` in the formats of other tools: COCO, supervision and YOLO.

Each writer takes the entries of `predictions.json` that have no `error`, with a phrase for every object. Classes are
the phrases, in the order in which they come.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from perceptiongpt.geometry_perceptiongpt import mask_to_polygons
from perceptiongpt.images_perceptiongpt import read_image
from perceptiongpt.pipeline_perceptiongpt import PROMPTS


YOLO_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}  # what its tools look for
YOLO_DIGITS = 6


def label_of(prompt: str) -> str:
    """What a prompt asks for, "dog" of "Find every dog." and "the red cup" of "Find the red cup."; else the prompt."""
    for task in ("detect", "refer"):
        start, end = PROMPTS[task].split("{phrase}")
        if prompt.startswith(start) and prompt.endswith(end) and len(prompt) > len(start) + len(end):
            return prompt[len(start) : len(prompt) - len(end)]
    return prompt


def class_numbers(entries: list[dict]) -> dict[str, int]:
    """The number of each class, from 0."""
    names = [found["phrase"] for entry in entries for found in entry["objects"]]
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def write_coco(entries: list[dict], output: Path) -> Path:
    """`annotations.json`: a COCO data set whose annotations have a `score`; masks as compressed RLE.

    File names are relative to the folder that all images share.
    """
    classes, images, annotations = class_numbers(entries), [], []
    paths = [os.path.abspath(entry["image"]) for entry in entries]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    for image_id, (entry, path) in enumerate(zip(entries, paths, strict=True), 1):
        name = Path(os.path.relpath(path, folder)).as_posix()
        images.append({"id": image_id, "file_name": name, "width": entry["width"], "height": entry["height"]})
        for found in entry["objects"]:
            x0, y0, x1, y1 = found["box"]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": classes[found["phrase"]] + 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "score": found["score"],
            }
            if found.get("mask"):
                annotation |= {"segmentation": found["mask"], "area": int(coco_mask.area(found["mask"]))}
            annotations.append(annotation)
    categories = [{"id": number + 1, "name": name} for name, number in classes.items()]
    content = {"info": {"image_folder": folder}, "images": images, "annotations": annotations, "categories": categories}
    path = output / "annotations.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_supervision(entries: list[dict], output: Path) -> Path:
    """`detections.json`: a list with one item per image, which `supervision.Detections.from_inference` reads."""
    classes, items = class_numbers(entries), []
    for entry in entries:
        predictions = []
        for found in entry["objects"]:
            x0, y0, x1, y1 = found["box"]
            prediction = {"x": (x0 + x1) / 2, "y": (y0 + y1) / 2, "width": x1 - x0, "height": y1 - y0}
            prediction |= {"class": found["phrase"], "class_id": classes[found["phrase"]], "confidence": found["score"]}
            if found.get("mask"):
                prediction["rle_mask"] = found["mask"]
            predictions.append(prediction)
        size = {"width": entry["width"], "height": entry["height"]}
        items.append({"file_name": entry["image"], "image": size, "predictions": predictions})
    path = output / "detections.json"
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def write_yolo(entries: list[dict], output: Path) -> Path:
    """`data.yaml`, `images/` and `labels/`: a YOLO data set with a copy of the images.

    An object with a mask is its outline, holes filled and parts joined; one without is its box. Scores have no place in
    the format.
    """
    classes = class_numbers(entries)
    for folder in ("images", "labels"):
        (output / folder).mkdir(exist_ok=True)
    for entry in entries:
        source, stem = Path(entry["image"]), Path(entry["drawing"]).stem
        if source.suffix.lower() in YOLO_SUFFIXES:
            shutil.copyfile(source, output / "images" / f"{stem}{source.suffix.lower()}")
        else:
            read_image(source).save(output / "images" / f"{stem}.png")
        size = np.array([entry["width"], entry["height"]])
        lines = []
        for found in entry["objects"]:
            values = (_yolo_points(found) / size).round(YOLO_DIGITS).ravel().tolist()
            lines.append(f"{classes[found['phrase']]} {' '.join(map(str, values))}\n")
        (output / "labels" / f"{stem}.txt").write_text("".join(lines))
    names = "".join(f"  {number}: {json.dumps(name, ensure_ascii=False)}\n" for name, number in classes.items())
    path = output / "data.yaml"
    names = f"names:\n{names}" if names else "names: []\n"
    path.write_text(f"train: images\nval: images\n{names}", encoding="utf-8")
    return path


WRITERS = {"coco": write_coco, "supervision": write_supervision, "yolo": write_yolo}


def _yolo_points(found: dict) -> np.ndarray:
    """The outline of an object, `(n, 2)` in pixels; of one without a mask the centre and the sides of its box."""
    x0, y0, x1, y1 = found["box"]
    if not found.get("mask"):
        return np.array([[(x0 + x1) / 2, (y0 + y1) / 2], [x1 - x0, y1 - y0]])
    polygons = mask_to_polygons(coco_mask.decode(found["mask"]))
    return join_polygons(polygons) if polygons else np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])


def join_polygons(polygons: list[list[float]]) -> np.ndarray:
    """
    One polygon `(n, 2)` that covers what several cover, `[x0, y0, x1, y1, ...]` each: from one to the next and back
    along the same line, where they are nearest to each other.
    """
    joined, *others = sorted((np.array(polygon).reshape(-1, 2) for polygon in polygons), key=len, reverse=True)
    for other in others:
        distances = np.square(joined[:, None] - other[None]).sum(-1)
        at, start = np.unravel_index(distances.argmin(), distances.shape)
        detour = [np.roll(other, -start, axis=0), other[start : start + 1]]
        joined = np.concatenate([joined[: at + 1], *detour, joined[at:]])
    return joined
