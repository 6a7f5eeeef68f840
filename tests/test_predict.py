"""predict.py: what goes in, what is written, and what happens when a picture or an argument is no good."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from perceptiongpt import predict


class FakeProcessor:
    """Answers with one object per image, the left half; remembers the prompts; refuses what the real one would."""

    def __init__(self):
        self.batches = []

    def apply_chat_template(self, messages, **kwargs):
        sizes = [row[0]["content"][0]["image"].size for row in messages]
        if any(size[0] > 10 * size[1] for size in sizes):
            raise ValueError("the shorter side would fall below one pixel")
        self.batches.append(messages)
        return FakeInputs(sizes=torch.tensor(sizes))

    def post_process_generation(self, output, target_sizes, threshold, mask_format):
        assert mask_format == "rle" and threshold == 0
        results = []
        for height, width in target_sizes:
            half = np.zeros((height, width), dtype=np.uint8, order="F")
            half[:, : width // 2] = 1
            rle = coco_mask.encode(half)
            found = {
                "phrase": "left half",
                "span": (0, 9),
                "box": [0.0, 0.0, width / 2, float(height)],
                "score": 0.5,
                "mask": {"size": rle["size"], "counts": rle["counts"].decode()},
                "image": 0,
            }
            results.append({"text": "left half", "objects": [found], "boxes": None, "masks": None})
        return results


class FakeInputs(dict):
    def to(self, *args):
        return self


class FakeModel:
    device, dtype = torch.device("cpu"), torch.float32
    generation_config = GenerationConfig(eos_token_id=2)

    def generate(self, sizes, **kwargs):
        assert kwargs["do_sample"] is False
        return ModelOutput(sequences=torch.full((len(sizes), 3), 2), prompt_length=1)


@pytest.fixture
def fake(monkeypatch):
    processor = FakeProcessor()
    monkeypatch.setattr(predict, "load", lambda *arguments, **kwargs: (FakeModel(), processor))
    return processor


def save_image(path: Path, size=(60, 40)) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path)
    return str(path)


def run(output: Path, *images: str, text: str = "Find it.", extra: tuple = ()) -> tuple[int, list]:
    arguments = ["--model", "unused", "--image", *images, "--text", text, "--output", str(output), *extra]
    status = predict.main(arguments)
    return status, json.loads((output / "predictions.json").read_text())


def test_files_and_folders_in_order(fake, tmp_path):
    for name in ("folder/b.PNG", "folder/a.jpg", "folder/.hidden.jpg", "single.webp"):
        save_image(tmp_path / name)
    (tmp_path / "folder/notes.txt").write_text("no image")
    extra = ("--batch_size", "2")
    status, entries = run(tmp_path / "out", str(tmp_path / "folder"), str(tmp_path / "single.webp"), extra=extra)
    assert status == 0
    assert [Path(entry["image"]).name for entry in entries] == ["a.jpg", "b.PNG", "single.webp"]
    assert [len(batch) for batch in fake.batches] == [2, 1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.json", "a.png", "b.png", "single.png"}
    entry = entries[0]
    assert (entry["prompt"], entry["text"], entry["error"], entry["drawing"]) == (
        "Find it.",
        "left half",
        None,
        "a.png",
    )
    assert (entry["width"], entry["height"]) == (60, 40)
    (found,) = entry["objects"]
    assert found["box"] == [0.0, 0.0, 30.0, 40.0] and found["score"] == 0.5 and found["phrase"] == "left half"
    assert coco_mask.decode(found["mask"]).sum() == 30 * 40


def test_same_names_do_not_overwrite_each_other_or_the_input(fake, tmp_path):
    output = tmp_path / "out"
    images = [save_image(tmp_path / name) for name in ("a/x.jpg", "b/x.png", "c/x_2.jpg", "d/X.jpg", "out/x.png")]
    before = Path(images[-1]).read_bytes()
    _, entries = run(output, *images)
    drawings = [entry["drawing"] for entry in entries]
    assert len({name.lower() for name in drawings}) == 5 and "x.png" not in drawings
    assert all((output / name).is_file() for name in drawings)
    assert Path(images[-1]).read_bytes() == before


@pytest.mark.parametrize("batch_size", ["1", "8"])
def test_broken_images_lose_nothing(fake, tmp_path, capsys, batch_size):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    truncated, text, damaged = tmp_path / "cut.jpg", tmp_path / "text.jpg", tmp_path / "damaged.png"
    truncated.write_bytes(whole.read_bytes()[:900])
    text.write_text("not an image")
    Image.open(whole).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:60] + b"\0" * 50 + damaged.read_bytes()[110:])
    long = save_image(tmp_path / "long.png", (2000, 10))
    images = [str(whole), str(truncated), str(text), str(damaged), long, save_image(tmp_path / "last.jpg")]
    status, entries = run(tmp_path / "out", *images, extra=("--batch_size", batch_size))
    assert status == 1
    assert [entry["image"] for entry in entries] == images
    assert [entry["error"] is None for entry in entries] == [True, False, False, False, False, True]
    assert "one pixel" in entries[4]["error"] and entries[4]["objects"] == []
    errors = capsys.readouterr().err
    assert "cut.jpg" in errors and "4 of the images" in errors
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"whole", "last"}


def test_predictions_are_complete_json_whenever_the_run_stops(fake, tmp_path, monkeypatch):
    images = [save_image(tmp_path / f"{index}.jpg") for index in range(3)]
    drawn = predict.draw_objects

    def draw_two(*arguments, **kwargs):
        entries = json.loads((tmp_path / "out/predictions.json").read_text())
        if len(entries) == 2:
            raise KeyboardInterrupt
        return drawn(*arguments, **kwargs)

    monkeypatch.setattr(predict, "draw_objects", draw_two)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", *images)
    entries = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [Path(entry["image"]).stem for entry in entries] == ["0", "1"]


def test_images_are_turned_as_exif_says(fake, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    _, (entry,) = run(tmp_path / "out", str(tmp_path / "turned.jpg"))
    assert (entry["width"], entry["height"]) == (40, 60)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("What is in <region>?", ["text", "box", "text"]),
        ("What is this?", ["text", "box"]),
        ("<region> or <region>", ["box", "text", "box"]),
    ],
)
def test_box_joins_the_text(fake, tmp_path, text, kinds):
    run(tmp_path / "out", save_image(tmp_path / "x.jpg"), text=text, extra=("--box", "1,2,30.5,20"))
    content = fake.batches[0][0][0]["content"]
    assert [item["type"] for item in content] == ["image", *kinds]
    assert [item for item in content if item["type"] == "box"][0]["box"] == [1.0, 2.0, 30.5, 20.0]


def test_mask_and_box_are_one_region(fake, tmp_path):
    image = save_image(tmp_path / "x.jpg")
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[5:10, 5:10] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run(tmp_path / "mask", image, extra=("--mask", str(tmp_path / "mask.png")))
    run(tmp_path / "both", image, extra=("--mask", str(tmp_path / "mask.png"), "--box", "5,5,10,10"))
    only_mask, both = (batch[0][0]["content"][-1] for batch in fake.batches)
    assert only_mask["type"] == "mask" and set(only_mask) == {"type", "mask"}
    assert np.array_equal(only_mask["mask"], mask.astype(bool))
    assert both["type"] == "region" and both["box"] == [5, 5, 10, 10]


def test_a_click_joins_the_text(fake, tmp_path):
    image = save_image(tmp_path / "x.jpg")
    run(tmp_path / "out", image, text="Segment <region>.", extra=("--point", "12,30.5"))
    run(tmp_path / "both", image, extra=("--point", "12,30.5", "--box", "1,2,30,40"))
    point, both = (batch[0][0]["content"] for batch in fake.batches)
    assert point[1:] == [
        {"type": "text", "text": "Segment "},
        {"type": "point", "point": [12.0, 30.5]},
        {"type": "text", "text": "."},
    ]
    assert both[-1] == {"type": "region", "box": [1, 2, 30, 40], "point": [12.0, 30.5]}


@pytest.mark.parametrize("point", ["1", "1,2,3", "a,b", "nan,0", "0,inf"])
def test_bad_point_is_refused(tmp_path, capsys, point):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path / "out", "x.jpg", extra=("--point", point))
    assert exit_status.value.code == 2
    assert f"argument --point: '{point}' is not x,y in pixels" in capsys.readouterr().err


def test_transparency_is_white(fake, tmp_path):
    Image.new("RGBA", (60, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    run(tmp_path / "out", str(tmp_path / "clear.png"))
    (image,) = (item["image"] for item in fake.batches[0][0][0]["content"] if item["type"] == "image")
    assert image.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("box", ["1,2,3", "a,b,c,d", "nan,0,1,1", "5,5,2,9", "5,5,5,9", "0,0,inf,3"])
def test_bad_box_is_refused(tmp_path, capsys, box):
    with pytest.raises(SystemExit) as exit_status:
        run(tmp_path / "out", "x.jpg", extra=("--box", box))
    assert exit_status.value.code == 2
    assert f"argument --box: '{box}' is not x0,y0,x1,y1" in capsys.readouterr().err


def test_arguments_that_cannot_work(tmp_path, capsys):
    image = save_image(tmp_path / "x.jpg")
    Image.new("L", (60, 40)).save(tmp_path / "black.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("in the way")
    good = {"--model": str(tmp_path), "--image": image, "--text": "Find it.", "--output": str(tmp_path / "out")}
    bad = [
        ({"--model": "nowhere"}, "--model nowhere: there is no such folder"),
        ({"--model": str(tmp_path / "empty")}, "empty: not a checkpoint that can be loaded"),
        ({"--image": str(tmp_path / "missing.jpg")}, "missing.jpg: there is no such file or folder"),
        ({"--image": str(tmp_path / "empty")}, "empty: no images in this folder"),
        ({"--output": str(tmp_path / "file/out")}, "file/out: cannot be made"),
        ({"--output": str(tmp_path / "file")}, "file: cannot be made"),
        ({"--mask": str(tmp_path / "file")}, "--mask"),
        ({"--mask": str(tmp_path / "none.png")}, "none.png"),
        ({"--mask": str(tmp_path / "black.png")}, "every pixel is black"),
        (
            {"--text": "What is in <region>?"},
            "--text: The text names <region>, which needs any of 'box', 'mask', 'point'",
        ),
    ]
    for changed, message in bad:
        arguments = [word for pair in (good | changed).items() for word in pair]
        assert predict.main(arguments) == 2, changed
        error = capsys.readouterr().err.strip().split("\n")[-1]
        assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out/predictions.json").exists()


def test_one_object_without_decoding(fake, tmp_path, monkeypatch):
    fake.vis_token_id = 7

    def ground(self, sizes, max_new_tokens):
        assert max_new_tokens == 5
        return ModelOutput(sequences=torch.full((len(sizes), 2), 7), prompt_length=1)

    monkeypatch.setattr(FakeModel, "ground", ground, raising=False)
    monkeypatch.setattr(FakeModel, "generate", None)
    status, entries = run(tmp_path / "out", save_image(tmp_path / "a.jpg"), extra=("--ground", "--max_new_tokens", "5"))
    assert status == 0 and len(entries[0]["objects"]) == 1


def test_command_line_on_a_checkpoint(tiny_model_dir, tmp_path):
    images = [save_image(tmp_path / "a.jpg"), save_image(tmp_path / "b.jpg", (30, 70))]
    command = [sys.executable, str(Path(predict.__file__)), "--model", tiny_model_dir, "--image", *images]
    command += ["--text", "What is in <region>?", "--box", "2,3,20,30", "--output", "out", "--max_new_tokens", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().split("\n")[-1] == str(Path("out/predictions.json"))
    entries = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["image"] for entry in entries] == images
    assert all(isinstance(entry["text"], str) and (tmp_path / "out" / entry["drawing"]).is_file() for entry in entries)
