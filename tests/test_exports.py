"""Every format of `predict.py --format`, read back by the tools that it is for."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from drawn_rows import rle
from perceptiongpt import exports, predict


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # OpenCV is not installed
    import supervision as sv


SIZES = {"a.jpg": (90, 60), "sub/b.png": (50, 80), "sub/a.jpg": (64, 64)}  # (width, height)


def two_parts(width: int, height: int) -> np.ndarray:
    mask = np.zeros((height, width), dtype=bool)
    mask[5:30, 4:24] = mask[35 : height - 5, 20:44] = True
    return mask


def objects_of(width: int, height: int) -> list[dict]:
    """Two parts; a named object; on square images one more without a mask and one with an empty one."""
    whole = np.zeros((height, width), dtype=bool)
    whole[10:40, 8:40] = True
    found = [
        {"phrase": None, "box": [4.5, 5.0, 44.0, height - 5.0], "score": 0.75, "mask": rle(two_parts(width, height))},
        {"phrase": 'the "red" cup: 猫', "box": [8.0, 10.0, 40.0, 40.0], "score": 0.5, "mask": rle(whole)},
    ]
    if width == height:
        found.append({"phrase": None, "box": [1.0, 2.0, 31.0, 22.0], "score": 0.25, "mask": rle(whole & False)})
    return found


class FakeModel:
    device, dtype = torch.device("cpu"), torch.float32
    generation_config = GenerationConfig(eos_token_id=2)

    def generate(self, sizes, **kwargs):
        return ModelOutput(sequences=torch.full((len(sizes), 3), 2), prompt_length=1)


class FakeProcessor:
    def apply_chat_template(self, messages, **kwargs):
        class Inputs(dict):
            def to(self, *args):
                return self

        return Inputs(sizes=[row[0]["content"][0]["image"].size for row in messages])

    def post_process_generation(self, output, target_sizes, **kwargs):
        found = [objects_of(width, height) for height, width in target_sizes]
        return [{"text": "x", "objects": [{"span": None, "image": 0} | one for one in objects]} for objects in found]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(*arguments)` asks about the images, one that is broken and one that is turned; returns the last line."""
    monkeypatch.setattr(predict, "load", lambda *args, **kwargs: (FakeModel(), FakeProcessor()))
    monkeypatch.setattr(predict, "draw_objects", lambda image, *args, **kwargs: image)
    (tmp_path / "in/sub").mkdir(parents=True)
    for name, size in SIZES.items():
        Image.new("RGB", size, "teal").save(tmp_path / "in" / name)
    turned, exif = Image.new("RGB", SIZES["a.jpg"][::-1], "teal"), Image.Exif()
    exif[0x0112] = 6  # stored on its side
    turned.save(tmp_path / "in/a.jpg", exif=exif)
    (tmp_path / "in/broken.png").write_text("no image")

    def predict_with(*arguments):
        command = ["--model", "unused", "--image", str(tmp_path / "in"), str(tmp_path / "in/sub")]
        command += ["--text", "Find every dog.", "--output", str(tmp_path / "out"), *arguments]
        assert predict.main(command) == 1  # of the broken image
        return Path(capsys.readouterr().out.strip().split("\n")[-1])

    return predict_with


def expected(name: str) -> list[dict]:
    return objects_of(*SIZES[name])


def check(detections, name: str, classes: list[str], scores: bool = True, boxes: bool = True, least_iou: float = 1.0):
    """Detections of supervision against the objects of an image."""
    objects = expected(name)
    assert len(detections) == len(objects)
    assert [classes[number] for number in detections.class_id] == [one["phrase"] or "dog" for one in objects]
    if boxes:
        np.testing.assert_allclose(detections.xyxy, [one["box"] for one in objects], atol=0.01)
    if scores:
        np.testing.assert_allclose(detections.confidence, [one["score"] for one in objects])
    for mask, one in zip(detections.mask, objects, strict=True):
        true = coco_mask.decode(one["mask"]).astype(bool)
        if true.any():
            assert (mask & true).sum() / (mask | true).sum() >= least_iou


def test_json_stays_as_it_is(run, tmp_path):
    path = run()
    assert path == tmp_path / "out/predictions.json"
    assert {file.suffix for file in path.parent.iterdir()} == {".json", ".png"}
    assert [entry["error"] is None for entry in json.loads(path.read_text())] == [True, False, True, True]


def test_coco(run, tmp_path):
    path = run("--format", "coco")
    coco = COCO(str(path))
    assert [image["file_name"] for image in coco.dataset["images"]] == ["a.jpg", "sub/a.jpg", "sub/b.png"]
    for image in coco.loadImgs(coco.getImgIds()):
        assert (image["width"], image["height"]) == SIZES[image["file_name"]]
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        objects = expected(image["file_name"])
        assert len(annotations) == len(objects)
        for annotation, one in zip(annotations, objects, strict=True):
            mask = coco_mask.decode(one["mask"])
            assert np.array_equal(coco.annToMask(annotation), mask) and annotation["area"] == mask.sum()
            x, y, width, height = annotation["bbox"]
            assert [x, y, x + width, y + height] == one["box"] and annotation["score"] == one["score"]
            assert coco.loadCats(annotation["category_id"])[0]["name"] == (one["phrase"] or "dog")
    results = coco.loadRes(coco.dataset["annotations"])  # as results of a detector, too
    assert len(results.anns) == 7
    data = sv.DetectionDataset.from_coco(str(tmp_path / "in"), str(path))
    assert len(data) == 3
    for name, image, detections in data:
        check(detections, Path(name).relative_to(tmp_path / "in").as_posix(), data.classes, scores=False)
        assert image.shape[:2] == SIZES[Path(name).relative_to(tmp_path / "in").as_posix()][::-1]


def test_supervision(run, tmp_path):
    path = run("--format", "supervision")
    items = json.loads(path.read_text())
    names = [Path(item["file_name"]).relative_to(tmp_path / "in").as_posix() for item in items]
    assert names == ["a.jpg", "sub/a.jpg", "sub/b.png"]
    for name, item in zip(names, items, strict=True):
        detections = sv.Detections.from_inference(item)
        check(detections, name, ["dog", 'the "red" cup: 猫'])
        assert detections["class_name"].tolist() == [one["phrase"] or "dog" for one in expected(name)]


def test_yolo(run, tmp_path):
    path = run("--format", "yolo", "--label", "puppy")
    assert path == tmp_path / "out/data.yaml"
    data = sv.DetectionDataset.from_yolo(str(path.parent / "images"), str(path.parent / "labels"), str(path))
    assert data.classes == ["puppy", 'the "red" cup: 猫'] and len(data) == 3
    classes = ["dog", data.classes[1]]
    names = {"a.jpg": "a.jpg", "a_2.jpg": "sub/a.jpg", "b.png": "sub/b.png"}
    for name, image, detections in data:
        # Its outlines are filled with their edges, so a mask is read a pixel larger.
        check(detections, names[Path(name).name], classes, scores=False, boxes=False, least_iou=0.85)
        assert image.shape[:2] == SIZES[names[Path(name).name]][::-1]


def test_yolo_boxes_and_other_images(tmp_path):
    """Without masks lines are boxes; an image in a format that YOLO does not know is converted."""
    Image.new("RGB", (40, 20), "teal").save(tmp_path / "x.gif")
    objects = [{"phrase": "dog", "box": [4.0, 5.0, 24.0, 15.0], "score": 0.5, "mask": None}]
    entry = {"image": str(tmp_path / "x.gif"), "width": 40, "height": 20, "objects": objects, "drawing": "x.png"}
    empty = entry | {"objects": [], "drawing": "y.png"}
    path = exports.write_yolo([entry, empty], tmp_path)
    data = sv.DetectionDataset.from_yolo(str(tmp_path / "images"), str(tmp_path / "labels"), str(path))
    (first, second) = (data.annotations[str(tmp_path / f"images/{name}.png")] for name in "xy")
    np.testing.assert_allclose(first.xyxy, [objects[0]["box"]], atol=1e-3)
    assert first.mask is None and len(second) == 0
    assert (tmp_path / "labels/x.txt").read_text() == "0 0.35 0.5 0.5 0.5\n"
    path = exports.write_yolo([empty], tmp_path)
    assert sv.DetectionDataset.from_yolo(str(tmp_path / "images"), str(tmp_path / "none"), str(path)).classes == []


def test_labels_of_another_run_are_not_mixed_with_new_ones(run, capsys):
    path = run("--format", "yolo")
    command = ["--model", "unused", "--image", str(path.parents[1] / "in"), "--text", "x", "--output", str(path.parent)]
    assert predict.main([*command, "--format", "yolo"]) == 2
    assert "labels holds labels already" in capsys.readouterr().err


def test_copies_do_not_overwrite_the_images(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 20), "teal").save(tmp_path / "images/x.png")
    command = ["--model", ".", "--image", str(tmp_path / "images"), "--text", "x", "--output", str(tmp_path)]
    assert predict.main([*command, "--format", "yolo"]) == 2
    assert "which holds some of them already" in capsys.readouterr().err


def test_nothing_found(tmp_path):
    Image.new("RGB", (40, 20), "teal").save(tmp_path / "x.png")
    entry = {"image": str(tmp_path / "x.png"), "width": 40, "height": 20, "objects": [], "drawing": "x_2.png"}
    assert COCO(str(exports.write_coco([entry], tmp_path))).getAnnIds() == []
    (item,) = json.loads(exports.write_supervision([entry], tmp_path).read_text())
    assert len(sv.Detections.from_inference(item)) == 0
    assert json.loads(exports.write_coco([], tmp_path).read_text())["images"] == []


def test_joined_polygons_cover_the_same_pixels():
    mask = two_parts(90, 60)
    mask[50:58, 70:85] = True
    polygons = exports.mask_to_polygons(mask)
    joined = exports.join_polygons(polygons)
    assert len(polygons) == 3 and len(joined) == sum(len(polygon) // 2 for polygon in polygons) + 4
    (filled,) = [coco_mask.decode(one) for one in coco_mask.frPyObjects([joined.ravel().tolist()], 60, 90)]
    assert np.array_equal(filled.astype(bool), mask)


def test_labels_of_prompts():
    prompts = {"Find every dog.": "dog", "Find the red cup.": "the red cup", "What is this?": "What is this?"}
    assert {prompt: exports.label_of(prompt) for prompt in prompts} == prompts
