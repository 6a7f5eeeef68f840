"""Every command and every piece of Python in docs/data.md runs, on real fragments laid out as its reader has them."""

import json
import pickle
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import SamConfig, SamModel

from drawn_rows import drawn_rows
from perceptiongpt import train as training
from perceptiongpt.data import label_masks, prepare, sources
from perceptiongpt.data.schema import validate_row


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
TRAIN, PREPARE = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
(PYTHON,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
LABELLING = re.search(r"`(python -m perceptiongpt\.data\.label_masks.*?)`", PAGE, re.DOTALL)[1]


def arguments_of(command: str, start: str) -> list[str]:
    words = shlex.split(command.replace("\\\n", " "))
    assert " ".join(words).startswith(start), words
    return words[len(start.split()) :]


def test_known_data_set(data_dir, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "refer/refcoco"
    folder.mkdir(parents=True)
    refs = json.loads((data_dir / "refcoco_mini/refs_joined.json").read_text())
    named = {"dataset": "refcoco", "splitBy": "unc"}
    refs = [ref | named | {"ref_id": index, "split": ("train", "val")[index % 2]} for index, ref in enumerate(refs)]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    shutil.copy(data_dir / "refcoco_mini/instances.json", folder)
    (tmp_path / "coco/train2014").mkdir(parents=True)
    for number in {ref["image_id"] for ref in refs}:
        photo = data_dir / f"coco128/train2017/{number:012d}.jpg"
        shutil.copy(photo, tmp_path / f"coco/train2014/COCO_train2014_{number:012d}.jpg")
    monkeypatch.chdir(tmp_path)
    arguments = arguments_of(PREPARE, "python -m perceptiongpt.data.prepare")
    arguments[arguments.index("--num_proc") + 1] = "1"  # other processes: tests/test_prepare.py
    prepare.main(arguments)
    assert "refer" in capsys.readouterr().out
    summary = json.loads(Path("prepared/refcoco/summary.json").read_text())
    data = load_dataset("prepared/refcoco", cache_dir=str(tmp_path / "cache"))
    for name in ("train", "val"):
        said = sum(len(ref["sentences"]) for ref in refs if ref["split"] == name)
        assert summary[name]["tasks"]["refer"]["rows"] == said and len(data[name]) == summary[name]["rows"]
        with Image.open(f"prepared/refcoco/preview-{name}.png") as sheet:
            assert sheet.format == "PNG" and sheet.width > 1000


def test_own_coco_folder(data_dir, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    instances = json.loads((data_dir / "tiny_coco/annotations/instances_train2017.json").read_text())
    kept = {annotation["image_id"] for annotation in instances["annotations"][:3]}
    instances["images"] = [image for image in instances["images"] if image["id"] in kept]
    instances["annotations"] = [entry for entry in instances["annotations"] if entry["image_id"] in kept]
    Path("mine/images").mkdir(parents=True)
    for image in instances["images"]:
        shutil.copy(data_dir / "tiny_coco/train2017" / image["file_name"], "mine/images")
    Path("mine/instances.json").write_text(json.dumps(instances))
    shutil.copytree(tiny_model_dir, tmp_path, dirs_exist_ok=True)
    Path("recipes").symlink_to(ROOT / "recipes")
    quick = ["training.max_steps=1", "training.use_cpu=true", "training.bf16=false", "model.dtype=float32"]
    training.main([*arguments_of(TRAIN, "python train.py"), *quick])
    assert Path("outputs/mine/model.safetensors").is_file()


def test_own_rows_and_their_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    found = [row | {"masks": [None] * len(row["boxes"])} for row in drawn_rows(1) if None not in row["boxes"]]
    exec(PYTHON, {"my_rows": lambda: found})
    loaded = sources.load_source("parquet", root="mine")
    assert [row["boxes"] for row in loaded] == [validate_row(row)[0]["boxes"] for row in found]

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    vision |= {"output_channels": 32, "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 32, "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    sam = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder))
    arguments = arguments_of(LABELLING, "python -m perceptiongpt.data.label_masks")
    sam.save_pretrained(arguments[arguments.index("--model") + 1])  # a folder is preferred to a repository id
    Path("prepared").mkdir()
    Path("mine").rename(arguments[arguments.index("--input") + 1])
    label_masks.main([*arguments, "--device", "cpu", "--min_iou", "-1000"])
    labelled = sources.load_source("parquet", root=arguments[arguments.index("--output") + 1])
    assert len(labelled) == len(found) and any(mask for row in labelled for mask in row["masks"])


def test_names_of_the_table():
    named = re.findall(r"^\| (`[^|]*`) \|", PAGE, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(named))) == sorted(sources.SOURCES)


def test_adding_a_source(tmp_path, monkeypatch, capsys):
    def boxes_rows(
        root, *, split="train", annotations=None, images=None, tasks=None, seed=0, evaluation=False, limit=None,
        problems=None, phrase="the block",
    ):  # fmt: skip
        for row in drawn_rows(1)[:2]:
            path = Path(root, "a.png")
            row["image"].save(path)
            prompt = [{"role": "user", "content": f"<image>Find {phrase}."}, row["messages"][-1]]
            yield row | {"messages": prompt, "image": {"path": str(path), "bytes": None}, "split": split}

    module = types.ModuleType("perceptiongpt.data.boxes")
    module.boxes_rows = boxes_rows
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sources.SOURCES, "boxes", "boxes:boxes_rows")
    arguments = ["boxes", "--root", str(tmp_path), "--output", str(tmp_path / "out"), "--phrase", "a thing"]
    prepare.main(arguments)
    (row, *_) = sources.load_source("parquet", root=tmp_path / "out")
    assert row["messages"][0]["content"] == "<image>Find a thing." and row["image"].size
    with pytest.raises(SystemExit):
        prepare.main([*arguments[:2], "x", "--help"])
    assert "--phrase" in capsys.readouterr().out
