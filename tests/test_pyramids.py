"""Vision towers whose layers are maps of several sizes: joined, trained, saved, and loaded by remote code."""

import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from backbones import PYRAMID_FAMILIES, TINY_IMAGE_SIZE


# A width of 24 over grids of 4 and 8: no two sizes of any map are the same, so swapped axes cannot go unseen.
SIZES = {"image_grid": 4, "mask_grid": 8, "feature_size": 24}


@pytest.fixture(params=PYRAMID_FAMILIES)
def pyramid(request, make_tiny_model):
    """(model in eval mode, processor), a tiny pyramid joined with a tiny Llama."""
    model, processor = make_tiny_model(vision=request.param, image_size=TINY_IMAGE_SIZE, **SIZES)
    return model, processor


def training_inputs(model, images: int = 2) -> dict:
    """A batch of rows `<image> x <vis>` whose `<vis>` is supervised with a box and a mask."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[config.image_token_id] * config.image_seq_length + [5, config.vis_token_id]] * images)
    size = config.mask_config.size
    masks = torch.zeros(images, 1, size, size, dtype=torch.uint8)
    masks[..., : size // 2, : size // 3] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.where(ids == config.vis_token_id, -100),
        "pixel_values": torch.randn(images, 3, config.image_size, config.image_size, generator=generator),
        "boxes": torch.tensor([[[0.1, 0.2, 0.4, 0.6]]]).expand(images, -1, -1),
        "masks": masks,
    }


def test_sizes_come_from_the_config(pyramid):
    model, processor = pyramid
    config = model.config
    features = model.get_image_features(torch.randn(3, 3, TINY_IMAGE_SIZE, TINY_IMAGE_SIZE))
    assert features.pooler_output.shape == (3, 16, config.text_config.hidden_size)
    assert features.mask_features.shape == (3, config.mask_cells, 24)
    assert config.mask_cells == 8**2 + config.fine_grid**2
    assert [stage["grid"] for stage in config.vision_stages] == sorted(
        {stage["grid"] for stage in config.vision_stages}, reverse=True
    )
    assert processor.image_seq_length == 16 and processor.image_processor.size["height"] == TINY_IMAGE_SIZE
    # Pretrained or not, convolutions and windows say nothing of where they are; Hiera has position embeddings.
    assert config.position_gain == (0.0 if config.vision_config.model_type == "hiera" else 1.0)


def test_every_stage_is_the_last_map_of_its_size(pyramid):
    model, _ = pyramid
    tower, config = model.model.vision_tower, model.config
    pixels = torch.randn(1, 3, TINY_IMAGE_SIZE, TINY_IMAGE_SIZE)
    outputs = tower(pixels, output_hidden_states=True)
    layers = model.model._vision_layers(model.model.encode_tower(pixels)[1])
    for stage, layer in zip(config.vision_stages, layers, strict=True):
        # The tokens of Swin and Hiera, of which the maps must be a view in the right order.
        hidden = outputs.hidden_states[stage["layer"]]
        reshaped = getattr(outputs, "reshaped_hidden_states", None)
        if config.vision_config.model_type == "hiera":
            hidden = reshaped[stage["layer"]].permute(0, 3, 1, 2)
        elif reshaped is not None:
            hidden = hidden.transpose(1, 2).unflatten(-1, (stage["grid"], stage["grid"]))
        assert hidden.shape == (1, stage["channels"], stage["grid"], stage["grid"])
        assert layer.shape == (1, 24, stage["grid"], stage["grid"])
        later = outputs.hidden_states[stage["layer"] + 1 :]
        assert all(
            other.shape[1:].numel() != hidden.shape[1:].numel() or other.shape == hidden.shape for other in later
        )


def test_one_step_reaches_every_stage(pyramid):
    model, _ = pyramid
    loss = model.train()(**training_inputs(model)).loss
    loss.backward()
    stages = model.model.vision_stages
    for index, projection in enumerate(stages.projections):
        assert projection.weight.grad.abs().max() > 0, f"stage {index}"
    assert all(p.grad is not None for p in model.model.mask_decoder.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert model(**training_inputs(model)).loss < loss


def test_a_row_in_training_mode_does_not_depend_on_the_others(pyramid):
    model, _ = pyramid
    model.train()
    assert not any(m.training for m in model.model.vision_tower.modules() if isinstance(m, nn.BatchNorm2d))
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__.endswith("DropPath"):
            module.eval()
    inputs = training_inputs(model)
    inputs["pixel_values"][1] *= 30
    together = model(**inputs)
    for row in range(2):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone.logits[0], together.logits[row], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone.pred_mask_logits[0], together.pred_mask_logits[row], atol=1e-4, rtol=1e-4)


def test_batch_norm_statistics_stay(make_tiny_model):
    model, _ = make_tiny_model(vision="mobilenet_v2", image_size=TINY_IMAGE_SIZE, **SIZES)
    before = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    model.train()(**training_inputs(model))
    assert before and all(torch.equal(before[name], value) for name, value in model.named_buffers() if name in before)


def test_generate_grounds_in_the_image(pyramid):
    model, processor = pyramid
    image = torch.randint(0, 255, (3, 40, 60), dtype=torch.uint8)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Find the cup."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    bias = [[[model.config.vis_token_id], 1e4]]
    output = model.generate(**inputs, max_new_tokens=2, sequence_bias=bias, return_dict_in_generate=True)
    (result,) = processor.post_process_generation(output, target_sizes=[(40, 60)])
    assert result["masks"].shape == (2, 40, 60) and result["boxes"].shape == (2, 4)
    blank = model.generate(
        **{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])},
        max_new_tokens=2,
        sequence_bias=bias,
        return_dict_in_generate=True,
    )
    assert not torch.allclose(blank.mask_logits, output.mask_logits)


@pytest.mark.slow
def test_remote_code_reloads_them_all(make_tiny_model, tmp_path):
    from perceptiongpt import PerceptionGPTForConditionalGeneration

    expected, folders = {}, {}
    for family in PYRAMID_FAMILIES:
        model, processor = make_tiny_model(vision=family, image_size=TINY_IMAGE_SIZE, **SIZES)
        folder = tmp_path / family
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        with torch.no_grad():
            expected[family] = model(**training_inputs(model)).loss
            reloaded = PerceptionGPTForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()
            torch.testing.assert_close(reloaded(**training_inputs(model)).loss, expected[family])
        assert reloaded.config.text_config._attn_implementation == "sdpa"
        torch.save(training_inputs(model), folder / "inputs.pt")
        folders[family] = str(folder)
    code = f"""
import json, sys, torch
sys.modules["perceptiongpt"] = None  # an import of the package fails
from transformers import AutoModelForImageTextToText
losses = {{}}
for family, folder in json.loads({json.dumps(json.dumps(folders))}).items():
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        losses[family] = model(**torch.load(folder + "/inputs.pt")).loss.item()
print(json.dumps(losses))
"""
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().split("\n")[-1]) == pytest.approx(
        {family: loss.item() for family, loss in expected.items()}, rel=1e-5
    )


def test_gradient_checkpointing_says_what_it_skips(make_tiny_model, caplog):
    model, _ = make_tiny_model(vision="mobilenet_v2", image_size=TINY_IMAGE_SIZE, **SIZES)
    logger = logging.getLogger("perceptiongpt.modeling_perceptiongpt")
    logger.addHandler(caplog.handler)
    try:
        model.activation_checkpointing_enable()
    finally:
        logger.removeHandler(caplog.handler)
    assert "MobileNetV2Model has no activation checkpointing" in caplog.text
    model.train()(**training_inputs(model)).loss.backward()


def test_a_config_without_a_model_has_the_sizes():
    from perceptiongpt import PerceptionGPTConfig

    tower = transformers.ResNetConfig()
    config = PerceptionGPTConfig(vision_config=tower, image_size=256)
    assert (config.image_grid, config.mask_grid, config.feature_size, config.image_seq_length) == (16, 16, 256, 256)
    assert PerceptionGPTConfig(vision_config=tower).image_size == 224  # ResNet's config has none
    plain = PerceptionGPTConfig()
    assert (plain.image_size, plain.image_grid, plain.mask_grid, plain.feature_size) == (336, 24, 24, 1024)
    with pytest.raises(ValueError, match="`image_grid` is 12, expected 24"):
        PerceptionGPTConfig(image_grid=12)


def test_the_image_size_of_a_mobilenet_is_free(make_tiny_model):
    model, processor = make_tiny_model(vision="mobilenet_v2", image_size=64, **SIZES | {"image_grid": 5})
    assert processor.image_processor.size["height"] == 64 and processor.image_seq_length == 25
    assert model.get_image_features(torch.randn(1, 3, 64, 64)).pooler_output.shape[1] == 25


def test_a_finer_pass_of_a_pyramid(make_tiny_model):
    """Masks from images of twice the side: finer maps, the same modules."""
    model, _ = make_tiny_model(vision="convnextv2", image_size=TINY_IMAGE_SIZE, mask_image_size=64, **SIZES)
    inputs = training_inputs(model)
    fine = torch.randn(2, 3, 64, 64)
    output = model(**inputs, mask_pixel_values=fine)
    assert model.get_mask_features(fine).shape == (2, model.config.mask_cells, 24) and model.config.fine_grid == 16
    assert not torch.allclose(output.pred_mask_logits, model(**inputs, mask_pixel_values=0 * fine).pred_mask_logits)
