"""What the library expects of a vision-language model, for every family of language model and of vision tower."""

import re

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.activations import ACT2FN

from backbones import TINY_IMAGE_SIZE
from perceptiongpt.modeling_perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTModel
from perceptiongpt.training.adapters import unreached_tower_parameters


TEXTS = ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "smollm")
TIED = ("llama_tied", "gemma", "smollm")
# Tokens before the patches: class and registers.
PREFIX_TOKENS = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_registers": 5}
ALL = [(text, vision) for text in TEXTS for vision in PREFIX_TOKENS]
# Every family of either kind at least once, for what is slow or depends on one of them alone.
PAIRS = [
    ("llama", "clip"),
    ("llama_tied", "siglip"),
    ("mistral", "dinov2"),
    ("qwen2", "dinov2_registers"),
    ("qwen3", "siglip"),
    ("gemma", "dinov2"),
    ("smollm", "clip"),
]
FIELDS = ("logits", "pred_boxes", "pred_mask_logits", "pred_box_iou", "pred_mask_iou")


@pytest.fixture(scope="module")
def saved(make_tiny_model, tmp_path_factory):
    """`saved(text, vision)` -> (folder, processor) of a tiny random model; made once. Read only."""
    made = {}

    def save(text: str, vision: str):
        if (text, vision) not in made:
            model, processor = make_tiny_model(text, vision, position_gain=0.5)
            folder = tmp_path_factory.mktemp(f"{text}_{vision}")
            model.save_pretrained(folder)
            made[text, vision] = str(folder), processor
        return made[text, vision]

    return save


@pytest.fixture(scope="module")
def load(saved):
    """`load(text, vision, **from_pretrained)` -> (model in eval mode, a batch of unlike rows with labels)."""

    def load(text: str, vision: str, **kwargs):
        folder, processor = saved(text, vision)
        return PerceptionGPTForConditionalGeneration.from_pretrained(folder, **kwargs).eval(), batch(processor)

    return load


def content(*items) -> list[dict]:
    """Content items from strings, images, boxes, points and (box, mask) pairs."""
    kinds = []
    for item in items:
        if isinstance(item, str):
            kinds.append({"type": "text", "text": item})
        elif isinstance(item, Image.Image):
            kinds.append({"type": "image", "image": item})
        elif isinstance(item, list) and len(item) == 2:
            kinds.append({"type": "point", "point": item})
        elif isinstance(item, list):
            kinds.append({"type": "box", "box": item})
        else:
            kinds.append({"type": "region", "box": item[0], "mask": item[1]})
    return kinds


def image_of(seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (24, 36, 3), dtype=torch.uint8, generator=generator).numpy())


def conversations() -> list[list[dict]]:
    """Three rows, questions and answers: a box and a region, two images with a point, text alone."""
    mask = torch.zeros(24, 36, dtype=torch.bool)
    mask[4:15, 9:30] = True
    region = ([9, 4, 30, 15], mask.numpy())
    first, second, third = (image_of(seed) for seed in range(3))
    rows = [
        (content(first, "What is in ", [2, 3, 20, 21], " and ", region, "?"), content("The red cup ", region)),
        (content(second, third, "Find the cat at ", [7, 9], "."), content([1, 5, 20, 22], [8, 2, 30, 12], [9, 4])),
        (content("Who is on the left of the table?"), content("There is no person.")),
    ]
    return [[{"role": "user", "content": user}, {"role": "assistant", "content": answer}] for user, answer in rows]


def batch(processor) -> dict:
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    inputs = dict(processor.apply_chat_template(conversations(), **options))
    answer = inputs.pop("assistant_masks").bool()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~answer, -100)}


def prompts(inputs: dict) -> dict:
    """The batch without its labels, as `generate` takes it: its answers become history."""
    return {name: value for name, value in inputs.items() if name != "labels"}


def always_vis(model, **kwargs) -> dict:
    bias = [[[model.config.vis_token_id], 1e4]]
    return {"max_new_tokens": 3, "sequence_bias": bias, "return_dict_in_generate": True, "do_sample": False, **kwargs}


@torch.no_grad()
def forward(model, inputs: dict):
    return model(**inputs)


def assert_same_output(first, second, inputs: dict, tolerance: float = 1e-4, vocabulary: int | None = None) -> None:
    seen = inputs["attention_mask"].bool()
    slots = inputs["boxes_valid"] | inputs["masks_valid"]
    for name in FIELDS:
        pick, last = (seen, vocabulary) if name == "logits" else (slots, None)
        torch.testing.assert_close(
            first[name][pick][..., :last], second[name][pick][..., :last], atol=tolerance, rtol=tolerance
        )


def assert_tied(model, tied: bool) -> None:
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.tie_word_embeddings == model.config.text_config.tie_word_embeddings == tied


@pytest.mark.parametrize(("text", "vision"), ALL)
def test_save_and_load(make_tiny_model, tmp_path, text, vision):
    model, processor = make_tiny_model(text, vision)
    inputs = batch(processor)
    model.save_pretrained(tmp_path)
    loaded, info = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = text in TIED
    assert_tied(model, tied)
    assert_tied(loaded, tied)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - ({"lm_head.weight"} if tied else set())
    for (name, before), (other, after) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(before, after), name
    assert loaded.config.to_dict() == PerceptionGPTForConditionalGeneration(loaded.config).config.to_dict()
    assert_same_output(forward(model, inputs), forward(loaded.eval(), inputs), inputs, tolerance=1e-6)


@pytest.mark.parametrize(("text", "vision"), ALL)
def test_every_reachable_parameter_gets_a_gradient(load, text, vision):
    model, inputs = load(text, vision)
    model.train()(**inputs).loss.backward()
    # The bias of a key adds the same to all scores of a query: its gradient is 0 but for rounding.
    without = {
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not (parameter.grad.any() or re.search(r"(k_proj|key)\.bias$", name))
    }
    assert without == unreached_tower_parameters(model)
    documented = {
        "clip": {"post_layernorm"},
        "siglip": {"post_layernorm", "head"},
        "dinov2": {"layernorm", "mask_token"},
        "dinov2_registers": {"layernorm", "mask_token"},
    }
    words = {word for name in without for word in name.split(".") if word in documented[vision]}
    assert words == documented[vision]
    assert all(documented[vision].intersection(name.split(".")) for name in without)


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_gradient_checkpointing(load, text, vision):
    results = []
    for checkpointing in (False, True):
        model, inputs = load(text, vision)
        if checkpointing:
            model.activation_checkpointing_enable()
        passes = {"vision_tower": 0, "language_model": 0}
        for part in passes:
            # A leaf of the part's first layer: the layer's own hooks lie outside its checkpoint.
            layer = next(m for name, m in getattr(model.model, part).named_modules() if re.search(r"layers?\.0$", name))
            leaf = next(module for module in layer.modules() if not list(module.children()))
            leaf.register_forward_pre_hook(lambda *_, part=part: passes.update({part: passes[part] + 1}))
        loss = model.train()(**inputs).loss
        loss.backward()
        assert passes == dict.fromkeys(passes, 2 if checkpointing else 1)
        results.append((loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (other_loss, other_gradients) = results
    torch.testing.assert_close(loss, other_loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, other_gradients[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_attention_back_ends_agree(load, text, vision):
    outputs = []
    for name in ("eager", "sdpa"):
        model, inputs = load(text, vision, attn_implementation=name)
        assert model.model.language_model.config._attn_implementation == name
        assert model.model.vision_tower.config._attn_implementation == name
        outputs.append(forward(model, inputs))
    assert_same_output(*outputs, inputs)
    mixed, _ = load(text, vision, attn_implementation={"vision_config": "eager", "text_config": "sdpa"})
    assert mixed.model.language_model.config._attn_implementation == "sdpa"
    assert mixed.model.vision_tower.config._attn_implementation == "eager"
    assert forward(load(text, vision, attn_implementation="eager")[0], inputs | {"output_attentions": True}).attentions


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_resize_token_embeddings(load, tmp_path, text, vision):
    model, inputs = load(text, vision)
    before, size = forward(model, inputs), model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 7, mean_resizing=False)
    assert model.config.get_text_config().vocab_size == size + 7
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape
    assert_tied(model, text in TIED)
    model.save_pretrained(tmp_path)
    loaded = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path).eval()
    for resized in (model, loaded):
        after = forward(resized, inputs)
        assert after.logits.shape[-1] == size + 7
        assert_same_output(before, after, inputs, tolerance=1e-6, vocabulary=size)
        assert forward(resized, {"input_ids": torch.tensor([[size + 6]])}).logits.isfinite().all()


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_generation_modes(load, text, vision):
    model, inputs = load(text, vision)
    inputs = prompts(inputs)
    greedy = model.generate(**inputs, **always_vis(model))
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        output = model.generate(**inputs, **always_vis(model, **other))
        for name in ("boxes", "mask_logits", "object_scores"):
            torch.testing.assert_close(greedy[name], output[name], atol=1e-4, rtol=1e-4)
    assert (greedy.boxes[:, 1:] != greedy.boxes[:, :-1]).any()
    free = {"sequence_bias": None}
    for kwargs in ({"do_sample": True}, {"num_beams": 3}):
        for forced in ({}, free):
            output = model.generate(**inputs, **always_vis(model, num_return_sequences=2, **kwargs, **forced))
            assert output.sequences.shape[0] == output.boxes.shape[0] == 6
            assert output.boxes.isfinite().all() and output.mask_logits.isfinite().all()
            # Beams differ, so of them only the best is all `<vis>`.
            assert forced or output.object_valid[::2].all()
    torch.manual_seed(3)
    sampled = model.generate(**inputs, **always_vis(model, do_sample=True, **free)).sequences
    torch.manual_seed(3)
    assert torch.equal(sampled, model.generate(**inputs, **always_vis(model, do_sample=True, **free)).sequences)


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_tuples_hold_what_dicts_do(load, text, vision):
    model, inputs = load(text, vision)
    for part, given in ((model, inputs), (model.model, prompts(inputs))):
        for extra in ({}, {"output_hidden_states": True}):
            given = {**given, "use_cache": False, **extra}
            expected = forward(part, {**given, "return_dict": True}).to_tuple()
            found = forward(part, {**given, "return_dict": False})
            assert isinstance(found, tuple) and len(found) == len(expected)
            for first, second in zip(found, expected, strict=True):
                torch.testing.assert_close(first, second, atol=0, rtol=0)
    features = model.get_image_features(inputs["pixel_values"], return_dict=False)
    assert isinstance(features, tuple) and features[0].shape[0] == 3


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_meta_device_and_missing_weights(load, saved, tmp_path, text, vision):
    folder, _ = saved(text, vision)
    model, inputs = load(text, vision)
    with torch.device("meta"):
        empty = PerceptionGPTForConditionalGeneration(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}

    # What is not on disk starts as a new model's parts do, though the model is built on the meta device.
    model.config.save_pretrained(tmp_path)
    tensors = load_file(f"{folder}/model.safetensors")
    ours = r"model\.(box_|mask_|point_|language_mixture|position_table|multi_modal_projector)"
    kept = {name: tensor for name, tensor in tensors.items() if not re.match(ours, name)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == set(tensors) - set(kept)
    fresh = dict(PerceptionGPTForConditionalGeneration(model.config).named_parameters())
    for name, parameter in loaded.named_parameters():
        if name in kept:
            assert torch.equal(parameter, kept[name]), name
        elif fresh[name].unique().numel() == 1:  # a constant, such as the zeros of a bias
            assert torch.equal(parameter, fresh[name]), name
        else:
            # Six standard errors of the ratio of two sample deviations.
            bound = 6 * parameter.numel() ** -0.5
            assert parameter.std().item() == pytest.approx(fresh[name].std().item(), rel=bound), name
    assert loaded.model.position_table.gain.item() == 0.5
    for part in (loaded.model.language_mixture, loaded.model.mask_mixture):
        assert part.logits.tolist() == [0.0, 0.0]
    for part in (loaded.model.box_encoder, loaded.model.mask_encoder):
        assert (part.norm.weight == part.norm.initial_value).all()
    assert forward(loaded.eval(), inputs).loss.isfinite()


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_backbones_are_as_on_disk(make_tiny_model, tiny_backbones, text, vision):
    model, _ = make_tiny_model(text, vision)
    folders = tiny_backbones(text, vision)
    tower = AutoModel.from_pretrained(folders.vision)
    tower = getattr(tower, "vision_model", tower) if vision in ("clip", "siglip") else tower
    language_model = AutoModelForCausalLM.from_pretrained(folders.text)
    rows = language_model.config.vocab_size
    own_tower = dict(getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).named_parameters())
    assert len(own_tower) == len(list(tower.parameters()))
    for name, parameter in tower.named_parameters():
        assert torch.equal(parameter, own_tower[name]), name
    own_text = dict(model.model.language_model.named_parameters())
    assert len(own_text) == len(list(language_model.base_model.parameters()))
    for name, parameter in language_model.base_model.named_parameters():
        assert torch.equal(parameter, own_text[name][:rows] if "embed_tokens" in name else own_text[name]), name
    assert torch.equal(language_model.lm_head.weight, model.lm_head.weight[:rows])


@pytest.mark.parametrize("text", TEXTS)
def test_signal_embeddings_are_as_long_as_token_embeddings(make_tiny_model, text):
    model, processor = make_tiny_model(text, "siglip")
    torch.manual_seed(1)
    for built in (model, PerceptionGPTForConditionalGeneration(model.config)):
        tokens = torch.arange(3, built.config.text_config.vocab_size - 12)  # neither padding nor the added ones
        length = built.get_input_embeddings()(tokens).norm(dim=-1).mean().item()
        corners = torch.rand(20, 2) / 2
        boxes = torch.cat([corners, corners + 0.3], dim=-1)
        masks = torch.rand(20, 128, 128) > 0.5
        for embeddings in (built.model.box_encoder(boxes), built.model.mask_encoder(masks)):
            assert embeddings.norm(dim=-1).mean().item() == pytest.approx(length, rel=0.05)
        gemma_scale = model.config.text_config.hidden_size**0.5 if text == "gemma" else 1.0
        raw = built.get_input_embeddings().weight[tokens].norm(dim=-1).mean().item()
        assert length == pytest.approx(gemma_scale * raw, rel=1e-3)


@pytest.mark.parametrize("vision", PREFIX_TOKENS)
@torch.no_grad()
def test_features_are_the_mixture_of_all_layers(load, vision):
    """Paper, equation 1, written out; then the position table, and the projector by its formula."""
    model, inputs = load("llama", vision)
    own, pixels = model.model, inputs["pixel_values"]
    generator = torch.Generator().manual_seed(0)
    hidden_states = own.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(hidden_states) == model.config.vision_config.num_hidden_layers + 1
    mixtures = []
    for mixture in (own.language_mixture, own.mask_mixture):
        mixture.logits.copy_(torch.randn(len(mixture.logits), generator=generator))
        weights = mixture.logits.exp() / mixture.logits.exp().sum()
        mixtures.append(sum(w * h[:, PREFIX_TOKENS[vision] :] for w, h in zip(weights, hidden_states[1:], strict=True)))
    features = model.get_image_features(pixels)
    torch.testing.assert_close(features.mask_features, mixtures[1], atol=1e-5, rtol=1e-5)
    placed = own.position_table(mixtures[0])
    assert not torch.allclose(placed, mixtures[0], atol=1e-3) and features.pooler_output.shape == (
        3,
        16,
        model.config.text_config.hidden_size,
    )
    projector = own.multi_modal_projector
    projected = projector.linear_2(ACT2FN["gelu"](projector.linear_1(placed)))
    torch.testing.assert_close(features.pooler_output, projected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vision", PREFIX_TOKENS)
def test_finer_pass_interpolates_positions(make_tiny_model, vision):
    model, processor = make_tiny_model("llama", vision, mask_image_size=2 * TINY_IMAGE_SIZE)
    inputs = batch(processor)
    assert inputs["mask_pixel_values"].shape[-1] == 2 * inputs["pixel_values"].shape[-1]
    output = forward(model, inputs)
    assert model.model.get_mask_features(inputs["mask_pixel_values"]).shape[1] == 64
    assert output.loss.isfinite() and output.pred_mask_logits.shape[-1] == 128


@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_text_alone_is_the_language_model(make_tiny_model, tiny_backbones, text):
    model, _ = make_tiny_model(text, "clip")
    plain = AutoModelForCausalLM.from_pretrained(tiny_backbones(text).text).eval()
    ids = torch.tensor([[5, 9, 20, 31, 44]])
    expected = plain(ids).logits
    torch.testing.assert_close(model(ids).logits[..., : expected.shape[-1]], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits, atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(("text", "vision"), PAIRS)
@torch.no_grad()
def test_images_of_a_row_stand_where_their_tokens_do(load, text, vision):
    model, inputs = load(text, vision)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    is_image = inputs["input_ids"] == model.config.image_token_id
    assert is_image.sum(1).tolist() == [16, 32, 0]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds[0, is_image[0]] = features[0]
    embeds[1, is_image[1]] = torch.cat([features[1], features[2]])
    expected = model.model.language_model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    seen = inputs["attention_mask"].bool()
    found = model.model(**inputs).last_hidden_state
    torch.testing.assert_close(found[seen], expected.last_hidden_state[seen], atol=1e-5, rtol=1e-5)
    swapped = model.model(**inputs | {"pixel_values": inputs["pixel_values"][[0, 2, 1]]}).last_hidden_state
    changed = (found - swapped).abs().amax((1, 2))
    assert changed[0] < 1e-5 < 1e-4 < changed[1]


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_device_map(load, text, vision):
    model, inputs = load(text, vision)
    expected = forward(model, inputs)
    for device_map in ("auto", {"": "cpu"}):
        mapped, _ = load(text, vision, device_map=device_map)
        found = forward(mapped, {name: value.to(mapped.device) for name, value in inputs.items()})
        assert_same_output(expected, {name: found[name].cpu() for name in FIELDS}, inputs, tolerance=1e-3)


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_bfloat16_keeps_signals_float32(load, text, vision):
    model, inputs = load(text, vision, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        in_signal = any(f".{part}." in name for part in model.model.signal_modules())
        assert parameter.dtype == (torch.float32 if in_signal else torch.bfloat16), name
    output = forward(model, inputs)
    assert output.logits.dtype == torch.bfloat16 and output.loss.isfinite()
    assert output.pred_boxes.dtype == output.pred_mask_logits.dtype == torch.float32
    generated = model.generate(**prompts(inputs), **always_vis(model))
    assert generated.boxes.dtype == torch.float32
    whole = forward(load(text, vision)[0], inputs)
    slots = inputs["boxes_valid"] | inputs["masks_valid"]
    assert (output.pred_boxes - whole.pred_boxes)[slots].abs().max() < 0.05


def test_seeds_fix_a_model(make_tiny_model):
    (first, processor), (second, _) = make_tiny_model(), make_tiny_model()
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
    third = type(first)(first.config)
    assert not torch.equal(third.model.box_encoder.linear_1.weight, first.model.box_encoder.linear_1.weight)
    # The model itself never draws: in training too the loss depends on its input alone.
    inputs = batch(processor)
    torch.manual_seed(1)
    loss = first.train()(**inputs).loss
    torch.manual_seed(2)
    assert torch.equal(loss, first(**inputs).loss)


def test_base_model_is_the_model_without_its_head(saved, load):
    folder, _ = saved("llama", "clip")
    model, inputs = load("llama", "clip")
    base = PerceptionGPTModel.from_pretrained(folder).eval()
    inputs = prompts(inputs)
    with torch.no_grad():
        logits = model.lm_head(base(**inputs).last_hidden_state)
    torch.testing.assert_close(logits, forward(model, inputs).logits, atol=1e-6, rtol=1e-6)
    assert not hasattr(base, "lm_head") and not base.can_generate()
