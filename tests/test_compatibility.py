"""Checkpoints, recipes, prepared rows and interrupted runs of earlier versions keep working (`tests/fixtures`)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt import train as training
from perceptiongpt.data.sources import load_source
from perceptiongpt.training.recipe import read_recipe, read_yaml


FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
CHECKPOINTS = [(version, name) for version in VERSIONS for name in ("plain", "finer")]
RECIPES = sorted(FIXTURES.glob("*/recipes/*.yaml"))
MASK_STRIDE = 16  # every 16th mask logit in either direction is stored


def conversation() -> list[dict]:
    """The conversation that the stored numbers were computed for."""
    pixels = np.arange(20 * 30 * 3, dtype=np.uint32).reshape(20, 30, 3) * 7919 % 251
    mask = np.zeros((20, 30), dtype=bool)
    mask[3:15, 8:21] = True
    question = [
        {"type": "image", "image": Image.fromarray(pixels.astype(np.uint8))},
        {"type": "text", "text": "Is "},
        {"type": "box", "box": [2.0, 3.0, 12.5, 17.25]},
        {"type": "text", "text": " in "},
        {"type": "mask", "mask": mask},
        {"type": "text", "text": "?"},
    ]
    answer = [
        {"type": "text", "text": "<p>It</p>"},
        {"type": "region", "box": [8.0, 3.0, 21.0, 15.0], "mask": mask},
    ]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(("version", "name"), CHECKPOINTS)
@torch.no_grad()
def test_a_checkpoint_computes_what_it_did(version, name):
    folder = FIXTURES / version / name
    model, info = PerceptionGPTForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model, processor = model.eval(), PerceptionGPTProcessor.from_pretrained(folder)
    expected = load_file(FIXTURES / version / f"{name}_expected.safetensors")

    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([conversation()], return_assistant_tokens_mask=True, **options)
    answer = torch.as_tensor(inputs.pop("assistant_masks")).bool()
    labels = inputs["input_ids"].masked_fill(~answer, -100)
    assert torch.equal(inputs["input_ids"], expected["input_ids"]) and torch.equal(labels, expected["labels"])

    output = model(**inputs, labels=labels)
    losses = ("loss", "loss_lm", "loss_box", "loss_mask", "loss_iou")
    found = {name: output[name] for name in ("pred_boxes", "pred_box_iou", "pred_mask_iou")}
    found["last_logits"] = output.logits[:, -1]
    found["pred_mask_logits"] = output.pred_mask_logits[..., ::MASK_STRIDE, ::MASK_STRIDE]
    found["losses"] = torch.stack([output[name] for name in losses])

    prompt = processor.apply_chat_template([conversation()[:1]], add_generation_prompt=True, **options)
    generated = model.generate(
        **prompt,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        sequence_bias=[[[model.config.vis_token_id], 1e4]],
    )
    found |= {name: generated[name] for name in ("object_scores", "object_mask_scores")}
    found["generated_boxes"] = generated.boxes
    found["generated_mask_logits"] = generated.mask_logits[..., ::MASK_STRIDE, ::MASK_STRIDE]
    assert found.keys() == expected.keys() - {"input_ids", "labels"}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(("version", "name"), CHECKPOINTS)
def test_a_config_keeps_its_values(version, name):
    """The library writes the dtype of the weights into every sub-config and its own version on top."""

    def assert_kept(given: dict, found: dict) -> None:
        for key in given.keys() - {"dtype", "transformers_version"}:
            if isinstance(given[key], dict):
                assert_kept(given[key], found[key])
            else:
                assert found[key] == given[key], key

    folder = FIXTURES / version / name
    config = PerceptionGPTForConditionalGeneration.config_class.from_pretrained(folder)
    assert_kept(json.loads((folder / "config.json").read_text()), config.to_dict())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parts[-3]}-{path.stem}")
def test_a_recipe_is_read(path):
    # The recipes leave the model to the command line; `model.config` is for a pair of backbones.
    joins = "config" in read_yaml(path).get("model", {})
    overrides = ["model.vision=DIR", "model.text=DIR"] if joins else ["model.checkpoint=DIR"]
    recipe = read_recipe(path, overrides)
    for section, values in read_yaml(path).items():
        for key in values.keys() - {"train", "eval"}:
            assert recipe[section][key] == values[key] or values[key] is False, f"{section}.{key}"
    assert recipe["data"]["train"]


@pytest.mark.parametrize("version", VERSIONS)
def test_prepared_rows_are_read(version):
    rows = load_source("parquet", root=str(FIXTURES / version / "rows"), split="train")
    assert len(rows) == 10
    assert [row["messages"][1]["content"].count("<vis>") for row in rows] == 2 * [1, 1, 1, 3, 0]
    for row in rows:
        slots = sum(message["content"].count("<vis>") for message in row["messages"])
        assert len(row["boxes"]) == len(row["masks"]) == slots


@pytest.mark.parametrize("version", VERSIONS)
def test_an_interrupted_run_goes_on(version, tmp_path, monkeypatch):
    """With `--resume`: from its own recipe, to the losses that it would have had without the stop."""
    monkeypatch.chdir(FIXTURES / version)  # the recipe names its model and rows from there
    shutil.copytree("run", tmp_path / "run")
    training.main(["--output", str(tmp_path / "run"), "--resume"])
    expected = json.loads(Path("run_expected.json").read_text())
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss_lm" in entry]
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4, 5]
    for entry, before in zip(logged, expected, strict=True):
        assert {key: entry[key] for key in before} == pytest.approx(before, abs=1e-3)
    PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path / "run")
