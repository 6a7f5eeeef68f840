"""Files to download: the conversation as JSON, its objects in COCO's layout, the last answer as PNG."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco_mask

from .drawing import draw
from .markup import NO_PHRASE
from .session import SHORTEST_LONGER_SIDE, Session


def encoded(mask) -> dict:
    """A mask as compressed COCO RLE."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def as_json(session: Session) -> dict:
    """The whole conversation; masks are COCO RLE, coordinates pixels of the image."""

    def plain(item: dict) -> dict:
        return {key: encoded(value) if key == "mask" and value is not None else value for key, value in item.items()}

    return {
        "image": {"file_name": session.name, "width": session.image.width, "height": session.image.height},
        "turns": [
            {
                "question": turn.question,
                "region": plain(turn.region),
                "text": turn.text,
                "finished": turn.finished,
                "objects": [plain(found) for found in turn.objects],
            }
            for turn in session.turns
        ],
    }


def as_coco(session: Session) -> dict:
    """The objects of all answers in the layout of COCO's instances; their phrases are the categories."""
    objects = [found for turn in session.turns for found in turn.objects]
    names = list(dict.fromkeys(found["phrase"] or NO_PHRASE for found in objects))
    annotations = []
    for number, found in enumerate(objects, 1):
        x0, y0, x1, y1 = found["box"]
        annotation = {
            "id": number,
            "image_id": 1,
            "category_id": names.index(found["phrase"] or NO_PHRASE) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "score": found["score"],
        }
        if found.get("mask") is not None:
            annotation |= {"segmentation": encoded(found["mask"]), "area": int(np.sum(found["mask"]))}
        annotations.append(annotation)
    image = {"id": 1, "file_name": session.name, "width": session.image.width, "height": session.image.height}
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": [image], "annotations": annotations, "categories": categories}


def export(session: Session) -> tuple[str, str, str]:
    """Write the files to download: the conversation as JSON, its objects as COCO, the last answer as PNG."""
    folder, stem = Path(session.folder.name), Path(session.name).stem
    paths = folder / f"{stem}_answers.json", folder / f"{stem}_coco.json", folder / f"{stem}_drawn.png"
    for path, content in zip(paths, (as_json(session), as_coco(session)), strict=False):
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    turn = session.turns[-1]
    scale = max(1.0, SHORTEST_LONGER_SIDE / max(session.image.size))
    draw(session.image, turn.objects, turn.region, [], scale).save(paths[2])
    return tuple(map(str, paths))
