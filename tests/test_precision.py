"""Coordinates are float32 from file to file, whatever the rest computes in: bfloat16 boxes are bins of pixels."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import TrainingArguments
from transformers import pipeline as make_pipeline

from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt.data.collator import PerceptionCollator
from perceptiongpt.training.trainer import TRAINING_DEFAULTS, PerceptionTrainer
from rows import GRID_TOKENS, IMAGE, VIS, tiny_model


WIDTH, HEIGHT = 1000, 600
BOX_PIXELS = [123.456, 1.234, 777.777, 588.888]
POINT_PIXELS = [321.987, 0.777]
# On the padded square of 1000 x 1000 pixels, the picture centred.
BOX_SQUARE = torch.tensor([123.456, 201.234, 777.777, 788.888])
POINT_SQUARE = torch.tensor([321.987, 200.777])


@pytest.fixture
def image():
    return Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 90))


def question(image) -> list[dict]:
    content = [
        {"type": "image", "image": image},
        {"type": "text", "text": "What is in "},
        {"type": "region", "box": BOX_PIXELS, "point": POINT_PIXELS},
        {"type": "text", "text": "?"},
    ]
    return [{"role": "user", "content": content}]


def watch_coordinates(model) -> dict[str, list[torch.Tensor]]:
    """Fills with what the box and the point encoder of a model read."""
    seen = {"box": [], "point": []}
    for name, values in seen.items():
        encoder = next(module for key, module in model.named_modules() if key.endswith(f"{name}_encoder"))
        encoder.register_forward_pre_hook(lambda module, args, values=values: values.append(args[0].detach()))
    return seen


def assert_exact(seen: dict[str, list[torch.Tensor]]) -> None:
    """The first box and the first point read are the prompt's, to a hundredth of a pixel at 1000 pixels."""
    for name, expected in (("box", BOX_SQUARE), ("point", POINT_SQUARE)):
        values = seen[name][0].reshape(-1, len(expected))
        assert values.dtype == torch.float32
        assert ((values * 1000 - expected).abs().amax(1) < 0.01).any(), values * 1000


def test_bfloat16_would_fail_this():
    exact = {"box": BOX_SQUARE / 1000, "point": POINT_SQUARE / 1000}
    assert_exact({name: [value[None]] for name, value in exact.items()})
    for name in exact:
        with pytest.raises(AssertionError):
            assert_exact({key: [(v.bfloat16().float() if key == name else v)[None]] for key, v in exact.items()})


# ---- boxes on their way in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_inputs_moved_to_bfloat16(tiny_model_dir, image, call):
    model = PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir, dtype=torch.bfloat16).eval()
    processor = PerceptionGPTProcessor.from_pretrained(tiny_model_dir)
    inputs = processor.apply_chat_template(
        [question(image)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    seen = watch_coordinates(model)
    with torch.no_grad():
        model(**inputs) if call == "forward" else model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert_exact(seen)


def test_pipeline_in_bfloat16(tiny_model_dir, image):
    pipe = make_pipeline("perception", model=tiny_model_dir, trust_remote_code=True, dtype=torch.bfloat16)
    assert pipe.model.dtype == torch.bfloat16
    seen = watch_coordinates(pipe.model)
    pipe({"image": image, "text": "What?", "box": BOX_PIXELS, "point": POINT_PIXELS}, max_new_tokens=2)
    assert_exact(seen)


def training_rows(image) -> list[dict]:
    row = {
        "image": image,
        "messages": [
            {"role": "user", "content": "<image>What is in <vis>?"},
            {"role": "assistant", "content": "<p>A cup</p><vis>"},
        ],
        "boxes": [BOX_PIXELS, [10.0, 20.0, 30.0, 40.0]],
        "masks": [None, None],
        "points": [POINT_PIXELS, None],
        "task": "dialogue",
        "source": "drawn",
        "image_id": "1",
        "split": "train",
        "width": WIDTH,
        "height": HEIGHT,
    }
    return [row, row]


def make_trainer(folder: str, output, image, **arguments):
    processor = PerceptionGPTProcessor.from_pretrained(folder)
    dtype = arguments.pop("dtype", torch.float32)
    settings = {"use_cpu": True, "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return PerceptionTrainer(
        model=PerceptionGPTForConditionalGeneration.from_pretrained(folder, dtype=dtype),
        args=TrainingArguments(str(output), **{**TRAINING_DEFAULTS, **settings, **arguments}),
        data_collator=PerceptionCollator(processor),
        train_dataset=training_rows(image),
        processing_class=processor,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_trainer(tiny_model_dir, tmp_path, image, dtype):
    """Mixed precision, over float32 and over bfloat16 weights."""
    trainer = make_trainer(tiny_model_dir, tmp_path, image, bf16=True, dtype=dtype)
    seen = watch_coordinates(trainer.model)
    computed = []
    trainer.model.model.language_model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: computed.append(output.dtype)
    )
    trainer.train()
    assert set(computed) == {torch.bfloat16}
    assert_exact(seen)
    assert trainer.state.log_history[0]["loss_box"] > 0


def test_deepspeeds_preparation(tiny_model_dir, tmp_path, image, monkeypatch):
    """DeepSpeed is not run here; its trainer casts every float of a batch to the dtype of its config, as done here."""
    trainer = make_trainer(tiny_model_dir, tmp_path, image, dtype=torch.bfloat16)
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin)
    trainer.is_deepspeed_enabled = True
    batch = trainer.data_collator(training_rows(image))
    prepared = trainer._prepare_inputs(batch)
    assert prepared["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(prepared["boxes_noise"], batch["boxes_noise"])
    seen = watch_coordinates(trainer.model)
    trainer.model.train()(**prepared).loss.backward()
    assert_exact(seen)
    # The same for prompts that evaluation generates from.
    inputs = trainer.processing_class.apply_chat_template(
        [question(image)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for values in seen.values():
        values.clear()
    trainer.model.eval().generate(**trainer._prepare_inputs(inputs), max_new_tokens=1, do_sample=False)
    assert_exact(seen)


# ---- boxes on their way out ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("random")
    tiny_model().save_pretrained(folder)
    return str(folder)


def in_bfloat16(kind: str, folder: str):
    dtype = torch.bfloat16 if kind.startswith("loaded") else torch.float32
    model = PerceptionGPTForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    return model.to(torch.bfloat16) if kind.startswith("cast") else model


KINDS = ["loaded", "cast", "autocast", "loaded, autocast", "cast, autocast"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_model_predicts_many_places(random_folder, kind):
    model = in_bfloat16(kind, random_folder)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(10_000, config.text_config.hidden_size, generator=generator).bfloat16()
    features = torch.randn(1, config.mask_grid**2, config.vision_config.hidden_size, generator=generator).bfloat16()
    boxes, points = [], []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in kind):
        for chunk in states.split(2500):
            decoded = model.decode_signals(chunk, features, torch.zeros(len(chunk), dtype=torch.long))
            boxes.append(decoded["box"][0])
            points.append(decoded["point"][0])
        embeddings = model.feed_back(states)
    boxes = torch.cat(boxes)
    assert boxes.dtype == embeddings.dtype == torch.float32
    assert len(boxes[:, 0].unique()) > 5000 and len(torch.cat(points)[:, 0].unique()) > 5000
    assert len(boxes.bfloat16()[:, 0].unique()) < 1000  # what this test is there to find
    # The weights may be rounded, what is computed with them is not.
    exact, _ = copy.deepcopy(model.model.box_decoder).float()(states.float())
    torch.testing.assert_close(boxes, exact, atol=1e-5, rtol=0)
    # The boxes that are fed back are those that are returned, unrounded.
    torch.testing.assert_close(embeddings, model.model.box_encoder(boxes), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_forward_keeps_boxes_apart(random_folder, kind):
    """Boxes a hundredth of a pixel apart, at 1000 pixels, are read as different; predictions do not fall into bins."""
    model = in_bfloat16(kind, random_folder)
    seen = watch_coordinates(model)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 90, (4, 200), generator=generator)
    text[:, 1::2] = VIS
    ids = torch.cat([torch.full((4, GRID_TOKENS), IMAGE), text], dim=1)
    boxes = torch.rand(4, 100, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="autocast" in kind):
        output = model(
            input_ids=ids,
            labels=ids,
            pixel_values=torch.randn(4, 3, 32, 32, generator=generator),
            boxes=boxes,
            points=boxes[..., :2],
            boxes_noise=torch.full_like(boxes, 1e-5),
        )
    assert torch.equal(seen["box"][0], (boxes + 1e-5).flatten(0, 1))
    assert torch.equal(seen["point"][0], boxes[..., :2].flatten(0, 1))
    assert output.pred_points.dtype == torch.float32 and len(output.pred_points[..., 0].unique()) > 350
    assert output.pred_boxes.dtype == torch.float32 and output.loss.isfinite()
    assert len(output.pred_boxes[..., 0].unique()) > 350


def test_signal_modules_stay_float32_where_the_model_is_loaded(random_folder):
    model = in_bfloat16("loaded", random_folder)
    assert model.dtype == torch.bfloat16
    for name, module in model.model.signal_modules().items():
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}, name
