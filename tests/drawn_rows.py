"""Rows of the schema over a few drawn pictures, of every kind that a batch mixes. No test lives here."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask


def rle(mask: np.ndarray) -> dict:
    """A bool array (height, width) as the schema's RLE."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def drawn_rows(pictures: int = 4, seed: int = 0) -> list[dict]:
    """Five rows a picture: box and mask, box only, mask only, three instances after a box prompt, no target."""
    rng = np.random.default_rng(seed)
    rows = []
    for picture in range(pictures):
        width, height = (int(side) for side in rng.integers(40, 80, 2))
        image = Image.new("RGB", (width, height), tuple(rng.integers(0, 255, 3).tolist()))
        boxes, masks = [], []
        for index in range(3):
            x0, y0 = 2 + 12 * index, int(rng.integers(1, 15))
            box = [x0, y0, x0 + int(rng.integers(4, 11)), y0 + int(rng.integers(5, 20))]
            ImageDraw.Draw(image).rectangle(box, fill=tuple(rng.integers(0, 255, 3).tolist()))
            mask = np.zeros((height, width), dtype=bool)
            mask[box[1] : box[3], box[0] : box[2]] = True
            boxes.append([float(side) for side in box])
            masks.append(rle(mask))
        none = None
        for task, prompt, answer, row_boxes, row_masks in (
            ("refer", "Find the first.", "<vis>", boxes[:1], masks[:1]),
            ("refer", "Where is the second?", "<vis>", boxes[1:2], [none]),
            ("refer", "The last one, please.", "<vis>", [none], masks[2:]),
            ("dialogue", "Things like <vis>?", "<vis><vis><vis>", [boxes[0], *boxes], [none, *masks]),
            ("no_target", "Is there a dog? Mark it.", "There is no dog.", [], []),
        ):
            messages = [("user", "<image>" + prompt), ("assistant", answer)]
            rows.append(
                {
                    "image": image,
                    "messages": [{"role": role, "content": content} for role, content in messages],
                    "boxes": row_boxes,
                    "masks": row_masks,
                    "points": [None] * len(row_boxes),
                    "task": task,
                    "source": "drawn",
                    "image_id": str(picture),
                    "split": "train",
                    "width": width,
                    "height": height,
                }
            )
    return rows


def drawn_coco_folder(folder: Path) -> Path:
    """Fill a folder with three drawn images and `instances.json`: three objects of two categories in each."""
    images, annotations = [], []
    for index, row in enumerate(drawn_rows(3)[3::5]):
        row["image"].save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": row["width"], "height": row["height"]})
        for category, (x0, y0, x1, y1) in enumerate(row["boxes"][1:]):
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": index,
                    "category_id": category % 2,
                    "iscrowd": 0,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )
    categories = [{"id": index, "name": name} for index, name in enumerate(("bar", "block", "ball"))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder
