"""What the library's own tests ask of a vision-language model and its processor."""

import base64
import io

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoModelForMultimodalLM, pipeline

from backbones import TINY_IMAGE_SIZE, TINY_PATCH_SIZE
from perceptiongpt import PerceptionGPTConfig, PerceptionGPTForConditionalGeneration
from perceptiongpt.configuration_perceptiongpt import PerceptionGPTBoxConfig, PerceptionGPTMaskConfig
from rows import tiny_config, tiny_model


CELLS = (TINY_IMAGE_SIZE // TINY_PATCH_SIZE) ** 2


# ---- image features --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(2, 3, TINY_IMAGE_SIZE, TINY_IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("by", ["keyword", "config"])
@torch.no_grad()
def test_image_features_come_with_the_towers_states(model, pixel_values, by):
    layers = model.config.vision_config.num_hidden_layers
    own = tiny_model()
    own.set_attn_implementation("eager")  # the one that gives attentions away
    if by == "keyword":
        features = own.get_image_features(pixel_values, output_hidden_states=True, output_attentions=True)
    else:
        own.config.vision_config.output_hidden_states = own.config.vision_config.output_attentions = True
        features = own.get_image_features(pixel_values)
    assert len(features.hidden_states) == layers + 1
    assert all(states.shape == (2, CELLS + 1, 32) for states in features.hidden_states)
    assert len(features.attentions) == layers
    assert all(attention.shape == (2, 4, CELLS + 1, CELLS + 1) for attention in features.attentions)
    torch.testing.assert_close(features.last_hidden_state, features.hidden_states[-1][:, 1:])
    # Nobody asked: nothing of the tower is kept.
    plain = model.get_image_features(pixel_values)
    assert plain.hidden_states is None and plain.attentions is None
    torch.testing.assert_close(plain.pooler_output, features.pooler_output, atol=1e-5, rtol=1e-5)
    as_tuple = model.get_image_features(pixel_values, return_dict=False, output_hidden_states=True)
    assert isinstance(as_tuple, tuple) and any(isinstance(part, tuple) for part in as_tuple)


# ---- processor -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(make_tiny_model):
    return make_tiny_model()[1]


@pytest.mark.parametrize("form", ["array", "channels_first", "tensor", "list_of_batches", "one_batch_per_text"])
def test_images_come_in_batches(processor, form):
    batch = np.random.default_rng(0).integers(0, 256, (3, 24, 36, 3), dtype=np.uint8)
    texts = ["<image><image>", "<image>"]
    alone = processor(images=list(batch), text=texts, return_tensors="pt")
    images = {
        "array": batch,
        "channels_first": batch.transpose(0, 3, 1, 2),
        "tensor": torch.from_numpy(batch).permute(0, 3, 1, 2),
        "list_of_batches": [batch[:1], batch[1:]],
        "one_batch_per_text": [[batch[:2]], [batch[2:]]],
    }[form]
    inputs = processor(images=images, text=texts, return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 3
    assert torch.equal(inputs["pixel_values"], alone["pixel_values"])
    with pytest.raises(ValueError, match="3 images were given for 1 <image>"):
        processor(images=batch, text="<image>")


@pytest.mark.parametrize("key", ["image", "url", "base64"])
def test_images_come_as_base64(processor, key):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs, expected = (
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image", name: value}]}], **options)
        for name, value in ((key, encoded), ("image", image))
    )
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("text", [[1], 1, [["a"]], ["a", None], {"a": 1}])
def test_text_that_is_no_text_is_refused(processor, text):
    with pytest.raises(ValueError, match="expected a string or a list of strings"):
        processor(text=text)


# ---- generation ------------------------------------------------------------------------------------------------------


def test_generation_starts_from_nothing(model):
    output = model.generate(max_new_tokens=4, do_sample=False)
    expected = model.generate(torch.tensor([[1]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(output, expected) and output[0, 0] == model.generation_config.bos_token_id == 1
    other = model.generate(max_new_tokens=4, do_sample=False, bos_token_id=7)
    assert torch.equal(other, model.generate(torch.tensor([[7]]), max_new_tokens=4, do_sample=False))
    bare = tiny_model(text={"bos_token_id": None})
    bare.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="no `bos_token_id` to start from"):
        bare.generate(max_new_tokens=2)


def test_any_to_any_finds_the_model(tiny_model_dir, monkeypatch):
    assert isinstance(AutoModelForMultimodalLM.from_pretrained(tiny_model_dir), PerceptionGPTForConditionalGeneration)
    # The pipeline asks for torchvision, which nothing in it needs for images that are loaded.
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *args: None)
    pipe = pipeline("any-to-any", model=tiny_model_dir)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Where is the cup?"}]
    answer = pipe(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(answer[0]["generated_text"], str)


# ---- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position_gain", "abc"),
        ("image_token_id", "x"),
        ("vis_token_id", 1.5),
        ("vis_token_id", None),
        ("reserved_token_ids", "abc"),
        ("reserved_token_ids", [1, "x"]),
        ("projector_hidden_act", 3),
        ("multimodal_projector_bias", "yes"),
        ("mixture_base_layer", "first"),
        ("lm_loss_weight", "1"),
        ("text_config", 7),
    ],
)
def test_a_config_refuses_values_of_another_type(name, value):
    with pytest.raises(StrictDataclassError, match=name):
        PerceptionGPTConfig(**{name: value})
    if name != "text_config":
        config = tiny_config()
        with pytest.raises(StrictDataclassError, match=name):
            setattr(config, name, value)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_config_refuses_a_layer_that_the_tower_does_not_have(layer):
    with pytest.raises(StrictDataclassError, match=f"`mixture_base_layer` is {layer}, expected one of 0 to 2"):
        tiny_config(mixture_base_layer=layer)


def test_a_config_takes_whole_numbers_for_weights():
    config = tiny_config(position_gain=1, lm_loss_weight=2, box_config={"l1_weight": 3})
    assert (config.position_gain, config.lm_loss_weight, config.box_config.l1_weight) == (1, 2, 3)


@pytest.mark.parametrize(
    ("config_class", "name"), [(PerceptionGPTBoxConfig, "hidden_size"), (PerceptionGPTMaskConfig, "encoder_channels")]
)
def test_the_signals_configs_are_strict_too(config_class, name):
    with pytest.raises(StrictDataclassError, match=name):
        config_class(**{name: "wide"})
