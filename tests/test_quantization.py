"""Smaller weights: what is quantised and what is not, what the answers lose, and weights that wait on the disk."""

import importlib.util

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from backbones import TINY_SIGNALS
from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTModel, PerceptionGPTProcessor
from perceptiongpt.training.adapters import add_adapter, load_model
from perceptiongpt.training.recipe import complete_recipe
from rows import GRID_TOKENS, IMAGE, VIS


def quantization(kind: str):
    """A configuration of the library; a test that asks for it is skipped where its package is missing."""
    package = "torchao" if kind == "torchao int8" else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; make test-quant installs it beside the environment")
    if kind == "torchao int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bitsandbytes 8-bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


KINDS = ("bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao int8")


@pytest.fixture(scope="module")
def folder(tiny_backbones, make_tiny_model, tmp_path_factory) -> str:
    """A checkpoint whose widths are multiples of a 4-bit block."""
    folder = tmp_path_factory.mktemp("quantization")
    _, processor = make_tiny_model()
    config = AutoConfig.from_pretrained(tiny_backbones().text)
    config.intermediate_size = 128
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "text")
    processor.tokenizer.save_pretrained(folder / "text")
    model = PerceptionGPTForConditionalGeneration.from_vision_text_pretrained(
        tiny_backbones().vision, str(folder / "text"), **TINY_SIGNALS
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return str(folder / "model")


def is_quantized(module: nn.Linear) -> bool:
    """Whether a linear layer is of another class than torch's, or holds something other than numbers."""
    plain = type(module.weight.data) is torch.Tensor and module.weight.dtype.is_floating_point
    return not plain or type(module).__module__.startswith(("bitsandbytes", "torchao"))


def linear_layers(model) -> dict[str, list[nn.Linear]]:
    """The linear layers of each part of the model and, under `head`, of its head."""
    base = getattr(model, "model", model)
    layers = {
        name: [part for part in module.modules() if isinstance(part, nn.Linear)]
        for name, module in base.named_children()
    }
    return layers | ({"head": [model.lm_head]} if hasattr(model, "lm_head") else {})


def signal_dtypes(model) -> set[torch.dtype]:
    modules = getattr(model, "model", model).signal_modules().values()
    return {one.dtype for module in modules for one in (*module.parameters(), *module.buffers())}


@torch.no_grad()
def predict(model) -> dict[str, torch.Tensor]:
    """What a model makes of one image and two `<vis>`, one of them read."""
    ids = torch.tensor([[1, *[IMAGE] * GRID_TOKENS, 6, VIS, 7, 8, VIS]])
    ids[ids == IMAGE], ids[ids == VIS] = model.config.image_token_id, model.config.vis_token_id
    side, generator = model.config.image_size, torch.Generator().manual_seed(0)
    output = model.eval()(
        input_ids=ids,
        pixel_values=torch.randn(1, 3, side, side, generator=generator),
        boxes=torch.tensor([[[0.1, 0.2, 0.3, 0.5], [0.0] * 4]]),
        boxes_valid=torch.tensor([[True, False]]),
    )
    return {name: output[name].float() for name in ("logits", "pred_boxes", "pred_mask_logits")}


@pytest.mark.parametrize("model_class", [PerceptionGPTForConditionalGeneration, PerceptionGPTModel])
@pytest.mark.parametrize("kind", KINDS)
def test_signal_modules_are_not_quantised(folder, kind, model_class):
    """Whoever loads the model need not name them; the library's default skip of the head stays."""
    model = model_class.from_pretrained(folder, quantization_config=quantization(kind), dtype=torch.bfloat16)
    layers = linear_layers(model)
    for name in getattr(model, "model", model).signal_modules():
        assert not any(map(is_quantized, layers[name])), name
    assert signal_dtypes(model) == {torch.float32}
    assert layers["box_decoder"] and layers["mask_decoder"] and all(map(is_quantized, layers["language_model"]))
    assert not any(map(is_quantized, layers.get("head", ())))


def test_what_qlora_trains_is_not_quantised(folder):
    quantization("bitsandbytes 4-bit")
    data = {"train": {"annotations": "a", "images": "b"}}
    recipe = complete_recipe({"model": {"checkpoint": folder}, "adapter": {"mode": "qlora"}, "data": data})
    model, _ = load_model(recipe)
    trained = add_adapter(model, **recipe["adapter"])
    layers = linear_layers(model)
    for name in (*model.model.signal_modules(), "multi_modal_projector", "head"):
        assert not any(map(is_quantized, layers[name])), name
    base = [layer for layer in layers["language_model"] if "lora" not in type(layer).__module__]
    assert sum(map(is_quantized, base)) == 7 * model.config.text_config.num_hidden_layers
    assert {one.dtype for one in trained.parameters() if one.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stay_near_and_survive_saving(folder, kind, tmp_path):
    model_class = PerceptionGPTForConditionalGeneration
    exact = predict(model_class.from_pretrained(folder))
    model = model_class.from_pretrained(folder, quantization_config=quantization(kind), dtype=torch.float32)
    found = predict(model)
    assert not torch.equal(found["logits"], exact["logits"])
    assert (found["pred_boxes"] - exact["pred_boxes"]).abs().max() < (0.15 if "4-bit" in kind else 0.02)
    spread = exact["logits"].std()
    assert (found["logits"] - exact["logits"]).square().mean().sqrt() < (0.5 if "4-bit" in kind else 0.1) * spread
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path)
    assert not any(map(is_quantized, linear_layers(again)["mask_decoder"])) and signal_dtypes(again) == {torch.float32}
    assert all(map(is_quantized, linear_layers(again)["language_model"]))
    for name, value in predict(again).items():
        torch.testing.assert_close(value, found[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_answers(folder, kind):
    model = PerceptionGPTForConditionalGeneration.from_pretrained(
        folder, quantization_config=quantization(kind), dtype=torch.bfloat16
    )
    processor = PerceptionGPTProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": torch.zeros(3, 40, 60)}, {"type": "text", "text": "Find it."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, torch.bfloat16)
    bias = [[[model.config.vis_token_id], 1e4]]
    output = model.generate(**inputs, max_new_tokens=2, sequence_bias=bias, return_dict_in_generate=True)
    (result,) = processor.post_process_generation(output, target_sizes=[(40, 60)])
    assert len(result["objects"]) == 2 and result["masks"].shape == (2, 40, 60)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_part_of_a_signal_module_is_half(folder, dtype):
    model = PerceptionGPTForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert model.dtype == dtype and signal_dtypes(model) == {torch.float32}
    assert {weight.dtype for weight in model.model.language_model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_the_disk_give_the_same_answers(folder, tmp_path, dtype):
    """`device_map` with offload: the language model and the mask decoder are read from the disk as they are needed."""
    plain = PerceptionGPTForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    device_map = {f"model.{name}": "cpu" for name, _ in plain.model.named_children()} | {"lm_head": "cpu"}
    device_map |= {"model.language_model": "disk", "model.mask_decoder": "disk"}
    offloaded = PerceptionGPTForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, device_map=device_map, offload_folder=tmp_path
    )
    for part in ("language_model", "mask_decoder"):
        assert all(weight.is_meta for weight in getattr(offloaded.model, part).parameters())
    expected = predict(plain)
    for name, value in predict(offloaded).items():
        assert torch.equal(value, expected[name]), name
