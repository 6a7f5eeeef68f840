"""Models from pretrained parts: what a LLaVA checkpoint brings along, its chat template above all."""

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    VipLlavaConfig,
)

from backbones import (
    TINY_IMAGE_SIZE,
    TINY_PATCH_SIZE,
    TINY_SIGNALS,
    save_tiny_llava,
    save_tiny_vlm,
    tiny_tokenizer,
)
from drawn_rows import drawn_rows
from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt import train as training
from perceptiongpt.chat_perceptiongpt import CHAT_TEMPLATE, ITEMS, STRING, TEXT_ITEM, chat_form
from perceptiongpt.data.collator import IGNORED_LABEL, PerceptionCollator
from perceptiongpt.publishing.adapters import build_base


TEMPLATES = Path(__file__).parent / "chat_templates"
ROWS = Path(__file__).parent / "fixtures/0.1.0/rows"
LLAVA_TEMPLATE = (TEMPLATES / "llava.jinja").read_text()


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory) -> str:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"), LLAVA_TEMPLATE)


@pytest.fixture(scope="module")
def joined(llava_folder):
    model = PerceptionGPTForConditionalGeneration.from_vlm_pretrained(llava_folder).eval()
    return model, PerceptionGPTProcessor.from_backbones(llava_folder, llava_folder, model.config)


def question(*images: Image.Image) -> dict:
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": "Where is the red cup?"}]}


@pytest.mark.parametrize("images", [0, 1, 2])
@torch.no_grad()
def test_a_prompt_is_what_llava_makes_of_it(joined, llava_folder, images):
    model, processor = joined
    generator = torch.Generator().manual_seed(0)
    side = (TINY_IMAGE_SIZE, TINY_IMAGE_SIZE, 3)  # a square, which neither pads nor crops
    pixels = [torch.randint(0, 256, side, dtype=torch.uint8, generator=generator) for _ in range(images)]
    messages = [question(*(Image.fromarray(image.numpy()) for image in pixels))]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    llava_processor = AutoProcessor.from_pretrained(llava_folder)
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == llava_processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "USER: " + images * "<image>\n" + "Where is the red cup? ASSISTANT:"

    inputs = processor.apply_chat_template(messages, **options)
    expected = llava_processor.apply_chat_template(messages, **options)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    logits = LlavaForConditionalGeneration.from_pretrained(llava_folder).eval()(**expected).logits
    found = model(**inputs).logits[..., : logits.shape[-1]]
    known = model.config.vis_token_id  # the added tokens have rows of their own
    torch.testing.assert_close(found[..., :known], logits[..., :known], atol=1e-5, rtol=0)


SIGLIP = {"model_type": "siglip_vision_model"}
PATCHES = (TINY_IMAGE_SIZE // TINY_PATCH_SIZE) ** 2


@pytest.mark.parametrize(
    ("kind", "vision", "config"),
    [
        ("llava", SIGLIP, {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}),
        ("llava", {}, {"multimodal_projector_bias": False, "projector_hidden_act": "relu", "vision_feature_layer": 1}),
        ("video_llava", {}, {}),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_model_it_starts_from(kind, vision, config, tmp_path):
    folder = save_tiny_vlm(kind, tmp_path, LLAVA_TEMPLATE, vision, **config)
    library = AutoModelForImageTextToText.from_pretrained(folder).eval()
    model = PerceptionGPTForConditionalGeneration.from_vlm_pretrained(folder).eval()
    processor = PerceptionGPTProcessor.from_backbones(folder, folder, model.config)
    assert processor.chat_template == LLAVA_TEMPLATE
    ours, theirs = (part.multi_modal_projector.state_dict() for part in (model.model, library.model))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    image = Image.effect_noise((TINY_IMAGE_SIZE, TINY_IMAGE_SIZE), 90).convert("RGB")
    inputs = processor.apply_chat_template(
        [question(image)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == library.config.image_token_id).sum() == PATCHES
    names = ("input_ids", "attention_mask", "pixel_values")
    expected = library(**{name: inputs[name] for name in names}).logits
    known = model.config.vis_token_id  # the added tokens have rows of their own
    torch.testing.assert_close(model(**inputs).logits[..., :known], expected[..., :known], atol=1e-5, rtol=0)


REFUSED = {
    "tiles": (LlavaNextConfig(), "'llava_next': it reads an image as tiles"),
    "several layers": (VipLlavaConfig(), "'vipllava': its projector reads several layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_with_other_image_tokens_are_refused_by_their_config(name, tmp_path):
    config, message = REFUSED[name]
    config.save_pretrained(tmp_path)  # and no weights
    with pytest.raises(ValueError, match=f"cannot be the base: a model of the type {message}"):
        PerceptionGPTForConditionalGeneration.from_vlm_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("vision", "config", "message"),
    [
        ({}, {"vision_feature_select_strategy": "full"}, "'full' it reads 17 of the tower's 17 tokens"),
        (SIGLIP, {}, "'default' it reads 15 of the tower's 16 tokens, expected the 16 patches alone"),
        ({}, {"vision_feature_layer": [-2, -1]}, "concatenates the tower layers"),
        ({"model_type": "pixtral"}, {"vision_feature_select_strategy": "full"}, "'pixtral' reads an image at a size"),
    ],
)
def test_a_llava_whose_image_tokens_are_not_its_patches_is_refused(vision, config, message, tmp_path):
    folder = save_tiny_vlm("llava", tmp_path, LLAVA_TEMPLATE, vision, **config)
    with pytest.raises(ValueError, match=message):
        PerceptionGPTForConditionalGeneration.from_vlm_pretrained(folder)


def test_other_bases_are_refused(tiny_backbones, tiny_model_dir):
    for folder, message in ((tiny_backbones().text, "'llama': its patches"), (tiny_model_dir, "a PerceptionGPT alrea")):
        with pytest.raises(ValueError, match=message):
            PerceptionGPTForConditionalGeneration.from_vlm_pretrained(folder)


@pytest.fixture(scope="module")
def captions_folder(tmp_path_factory) -> Path:
    """Three images with two captions each, in COCO's folders."""
    folder = tmp_path_factory.mktemp("captions")
    (folder / "annotations").mkdir()
    (folder / "train2017").mkdir()
    images, captions = [], []
    for number in range(3):
        Image.effect_noise((40, 30), 90).convert("RGB").save(folder / f"train2017/{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 40, "height": 30})
        captions += [{"id": 2 * number + i, "image_id": number, "caption": f"Noise {number}, {i}."} for i in range(2)]
    content = {"images": images, "annotations": captions}
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("vision", ["clip", "resnet"])
def test_aligning_trains_the_projector_alone(tiny_backbones, captions_folder, tmp_path, vision):
    """`recipes/align.yaml`; stage maps of a pyramid are the first part of its projector."""
    backbones, output = tiny_backbones(vision=vision), tmp_path / "run"
    settings = [f"model.vision={backbones.vision}", f"model.text={backbones.text}", "model.dtype=float32"]
    settings += ["model.attn_implementation=eager"]  # a ResNet has no other
    settings += [f"model.config={json.dumps(TINY_SIGNALS)}", f"data.train.root={captions_folder}"]
    settings += ["training.max_steps=2", "training.warmup_steps=0", "training.dataloader_num_workers=0"]
    settings += ["training.gradient_accumulation_steps=1", "training.use_cpu=true", "training.disable_tqdm=true"]
    recipe = Path(training.__file__).parent / "recipes/align.yaml"
    training.main(["--config", str(recipe), *settings, "--output", str(output)])

    torch.manual_seed(42)  # of the recipe's training arguments
    before = PerceptionGPTForConditionalGeneration.from_vision_text_pretrained(*backbones, **TINY_SIGNALS).state_dict()
    after = PerceptionGPTForConditionalGeneration.from_pretrained(output).state_dict()
    assert before.keys() == after.keys()
    moved = {name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}
    assert moved == {"multi_modal_projector"} | ({"vision_stages"} if vision == "resnet" else set())
    assert not (output / "adapter").exists()


@pytest.mark.parametrize("key", ["vlm", "llava"])
def test_training_starts_from_a_llava_checkpoint(llava_folder, tmp_path, key):
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(f"data: {{train: {{source: parquet, root: {ROWS}}}}}")
    settings = ["adapter.mode=heads", "training.max_steps=1", "training.use_cpu=true", "training.disable_tqdm=true"]
    training.main(["--config", str(recipe), f"model.{key}={llava_folder}", *settings, "--output", str(output)])
    assert PerceptionGPTProcessor.from_pretrained(output).chat_template == LLAVA_TEMPLATE
    assert PerceptionGPTForConditionalGeneration.from_pretrained(output).config.mixture_base_layer == 1


@pytest.mark.parametrize("key", ["vlm", "llava"])
def test_the_base_of_an_adapter_is_joined_again(llava_folder, key):
    """Adapters that were published under the older name find their base."""
    model, processor = build_base({"model": {key: llava_folder}, "seed": 0})
    expected = LlavaForConditionalGeneration.from_pretrained(llava_folder).model.multi_modal_projector.state_dict()
    found = model.model.multi_modal_projector.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert processor.chat_template == LLAVA_TEMPLATE


def test_a_config_that_cannot_be_is_an_error_of_one_line(tiny_backbones, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{train: {{source: parquet, root: {ROWS}}}}}")
    vision, text = tiny_backbones()
    model = [f"model.vision={vision}", f"model.text={text}", "model.config.position_gain=abc"]
    with pytest.raises(SystemExit, match="^error: .*position_gain"):
        training.main(["--config", str(recipe), *model, "training.use_cpu=true", "--output", str(tmp_path / "run")])


def test_answers_after_llavas_template_are_supervised_to_their_end(joined):
    """The template writes no end of turn, and puts a blank between its prompt and an answer that it does not mark."""
    model, processor = joined
    batch = PerceptionCollator(processor, model.config)(drawn_rows(1))
    for ids, labels, row in zip(batch["input_ids"], batch["labels"], drawn_rows(1), strict=True):
        answer = ids[labels != IGNORED_LABEL]
        assert processor.tokenizer.decode(answer) == f" {row['messages'][1]['content']}</s>"
        start = int((labels != IGNORED_LABEL).int().argmax())
        assert processor.tokenizer.decode(ids[:start]).endswith(" ASSISTANT:")


def test_a_turn_that_is_continued_is_left_open(joined):
    _, processor = joined
    messages = [question(), {"role": "assistant", "content": "On the"}]
    text = processor.apply_chat_template(messages, continue_final_message=True)
    assert text == "USER: Where is the red cup? ASSISTANT: On the"
    assert processor.apply_chat_template(messages) == f"{text}</s> "


def test_text_before_an_image_stays_before_it(joined):
    """So that a signal still belongs to the last image before it."""
    _, processor = joined
    image = Image.new("RGB", (20, 20))
    content = [
        {"type": "image", "image": image},
        {"type": "text", "text": "Is "},
        {"type": "box", "box": [1, 2, 10, 11]},
        {"type": "text", "text": " in "},
        {"type": "image", "image": image.resize((8, 40))},
        {"type": "text", "text": "?"},
    ]
    messages = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(messages) == "USER: <image>\nIs <vis> in <image>? "
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    torch.testing.assert_close(inputs["boxes"][0, 0], torch.tensor([1.0, 2.0, 10.0, 11.0]) / 20)


def test_a_template_in_the_processors_file_is_found(llava_folder, joined, tmp_path):
    model, _ = joined
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(Path(llava_folder, name).read_bytes())
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": LLAVA_TEMPLATE}))
    processor = PerceptionGPTProcessor.from_backbones(llava_folder, str(tmp_path), model.config)
    assert processor.chat_template == LLAVA_TEMPLATE


TURNS = "{% for m in messages %}{{ m['role'] }}: "
REST = "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
ITEM_LOOP = "{% for item in m['content'] %}{% if item['type'] == 'text' %}{{ item['text'] }}"
FORMS = {
    "string": (f"{TURNS}{{{{ m['content'] }}}}</s>{REST}", STRING),
    "items": (f"{TURNS}{ITEM_LOOP}{{% else %}}<image>{{% endif %}}{{% endfor %}}</s>{REST}", ITEMS),
    # writes another model's image token, or none
    "other_token": (f"{TURNS}{ITEM_LOOP}{{% else %}}<|pad|>{{% endif %}}{{% endfor %}}</s>{REST}", TEXT_ITEM),
    "text_items": (f"{TURNS}{ITEM_LOOP}{{% endif %}}{{% endfor %}}</s>{REST}", TEXT_ITEM),
    "image_last": (
        f"{TURNS}{ITEM_LOOP}{{% endif %}}{{% endfor %}}"
        "{% for item in m['content'] if item['type'] == 'image' %}<image>{% endfor %}</s>" + REST,
        TEXT_ITEM,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_template_gets_the_contents_it_reads(joined, name):
    template, content = FORMS[name]
    model, processor = joined
    form = chat_form(template, processor.tokenizer)
    assert (form.content, form.ends_answers, form.problem) == (content, True, None)
    messages = [question(Image.new("RGB", (9, 9))), {"role": "assistant", "content": "On the table."}]
    text = processor.apply_chat_template(messages, template)
    assert text == "user: <image>Where is the red cup?</s>\nassistant: On the table.</s>\n"
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(messages, template, **options)
    mask = torch.as_tensor(inputs["assistant_masks"])[0].bool()
    assert processor.tokenizer.decode(inputs["input_ids"][0][mask]).startswith("On the table.</s>")


LOSSY = {
    "no_images": (f"{TURNS}{{{{ m['content'] | replace('<image>', '') }}}}{REST}", "loses the image"),
    "no_answers": ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "loses the answer"),
    "raises": ("{{ raise_exception('no system message') }}", "no system message"),
    "prints_lists": ("{% for m in messages %}{{ m['content'] | list }}{% endfor %}", "loses the"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_template_that_loses_something_is_replaced_with_a_warning(joined, name, caplog, tmp_path):
    _, processor = joined
    template, lost = LOSSY[name]
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens(list(processor.tokenizer.get_added_vocab()), special_tokens=True)
    with caplog.at_level(logging.WARNING):
        made = PerceptionGPTProcessor(processor.image_processor, tokenizer)
    assert made.chat_template == CHAT_TEMPLATE
    assert "own chat template is used in place of the tokenizer's" in caplog.text and lost in caplog.text
    made.save_pretrained(tmp_path)
    caplog.clear()
    assert PerceptionGPTProcessor.from_pretrained(tmp_path).chat_template == CHAT_TEMPLATE
    assert not caplog.text
    # The caller's own choice stands.
    assert (
        PerceptionGPTProcessor(processor.image_processor, tokenizer, chat_template=template).chat_template == template
    )


def test_rows_of_added_tokens_do_not_depend_on_the_seed(tiny_backbones):
    """They start near the mean of the loaded rows, in and out; new rows of the resized matrices take no part in it."""
    rows, loaded = [], AutoModelForCausalLM.from_pretrained(tiny_backbones().text)
    for seed in range(2):
        torch.manual_seed(seed)
        model = PerceptionGPTForConditionalGeneration.from_vision_text_pretrained(*tiny_backbones(), **TINY_SIGNALS)
        rows.append([model.get_input_embeddings().weight, model.lm_head.weight])
    known = loaded.config.vocab_size
    for first, second, before in zip(*rows, (loaded.get_input_embeddings().weight, loaded.lm_head.weight), strict=True):
        assert torch.equal(first, second) and len(first) > known
        spread = (first[known:] - before.mean(0)).std()
        assert spread < 0.2 * before.std()


def test_new_rows_of_a_llava_start_near_the_mean(llava_folder, joined):
    model, _ = joined
    loaded = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    before, after = (part.get_input_embeddings().weight for part in (loaded, model))
    known = loaded.config.text_config.vocab_size
    assert torch.equal(after[:known], before[:known])  # at the first step the logits are LLaVA's
    assert len(after) > known and (after[known:] - before.mean(0)).std() < 0.2 * before.std()
