"""Processor: conversations with signals to tensors, generated sequences to objects, hostile input to clear errors."""

import base64
import io
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoImageProcessor, AutoProcessor, LlavaImageProcessorPil, PreTrainedTokenizerFast
from transformers import pipeline as make_pipeline

from backbones import TINY_IMAGE_SIZE, tiny_tokenizer
from perceptiongpt.configuration_perceptiongpt import (
    PHRASE_END_TOKEN,
    PHRASE_START_TOKEN,
    PerceptionGPTConfig,
    add_perception_tokens,
)
from perceptiongpt.geometry_perceptiongpt import boxes_to_square, mask_to_square
from perceptiongpt.processing_perceptiongpt import CHAT_TEMPLATE, PerceptionGPTProcessor
from perceptiongpt.signals_perceptiongpt import SIGNALS


ROOT = Path(__file__).parents[1]
GRID, MASK_SIZE = 4, 16
HEIGHT, WIDTH = 60, 100
BOX = [10.0, 20.0, 50.0, 45.0]
BOTH = {"box": BOX, "point": [50, 30]}
MASKED = {"mask": [[10, 20, 50, 20, 50, 45, 10, 45]]}
TEMPLATES = {path.stem: path.read_text() for path in sorted((ROOT / "tests/chat_templates").glob("*.jinja"))}
# What a family's tokenizer holds as one id, besides begin and end.
FAMILY_TOKENS = {
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "smollm": ["<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
}
END_OF_TURN = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "smollm": "<|im_end|>", "qwen3": "<|im_end|>"}


def metaspace_tokenizer(prepend_scheme: str) -> PreTrainedTokenizerFast:
    """A BPE that writes blanks as SentencePiece does; with `always`, after each special token too, as Llama-2's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.BpeTrainer(
        vocab_size=90,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:;?!'0123456789[]/<>|_\n▁"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bytes": tiny_tokenizer,
    "metaspace_first": lambda: metaspace_tokenizer("first"),
    "metaspace_always": lambda: metaspace_tokenizer("always"),
}


def make_processor(tokenizer=None, chat_template=None, **kwargs) -> PerceptionGPTProcessor:
    tokenizer = tokenizer or tiny_tokenizer()
    add_perception_tokens(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    size = {"height": TINY_IMAGE_SIZE, "width": TINY_IMAGE_SIZE}
    image_processor = LlavaImageProcessorPil(do_pad=True, do_center_crop=False, size=size)
    kwargs = {"image_seq_length": GRID**2, "mask_size": MASK_SIZE, "signals": list(SIGNALS)} | kwargs
    return PerceptionGPTProcessor(image_processor, tokenizer, chat_template=chat_template, **kwargs)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[30:40, 60:90] = True
    return mask


def user(*content):
    return {"role": "user", "content": list(content)}


def assistant(*content):
    return {"role": "assistant", "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


def picture(image):
    return {"type": "image", "image": image}


def box_item(box=BOX, **kwargs):
    return {"type": "box", "box": box, **kwargs}


def encode(processor, conversation, **kwargs):
    kwargs = {"tokenize": True, "return_dict": True, "return_tensors": "pt"} | kwargs
    return processor.apply_chat_template(conversation, **kwargs)


# In


def test_signals_of_a_conversation(processor, image, mask):
    region = {"type": "region", "box": BOX, "mask": mask}
    first = [
        user(picture(image), text("What is in "), box_item(), text(" and "), {"type": "mask", "mask": mask}, text("?")),
        assistant(text("<p>A cup</p>"), region, text(" and "), {"type": "mask", "mask": mask}, text(".")),
    ]
    batch = encode(processor, [first, [user(text("Hello"))]])
    vis = processor.vis_token_id
    assert (batch["input_ids"] == vis).sum(1).tolist() == [4, 0]
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [GRID**2, 0]
    assert batch["pixel_values"].shape == (1, 3, TINY_IMAGE_SIZE, TINY_IMAGE_SIZE)
    assert batch["boxes"].shape == (2, 4, 4) and batch["boxes"].dtype == torch.float32
    assert batch["masks"].shape == (2, 4, MASK_SIZE, MASK_SIZE) and batch["masks"].dtype == torch.uint8
    # a mask alone in a prompt stays one; as a target it gets its tight box
    assert batch["boxes_valid"].tolist() == [[True, False, True, True], [False] * 4]
    assert batch["masks_valid"].tolist() == [[False, True, True, True], [False] * 4]
    assert torch.equal(batch["boxes_read"], batch["boxes_valid"])
    assert torch.equal(batch["masks_read"], batch["masks_valid"])
    expected = boxes_to_square([BOX, [0] * 4, BOX, [60, 30, 90, 40]], HEIGHT, WIDTH)
    expected[1] = 0
    torch.testing.assert_close(batch["boxes"][0], expected, atol=0, rtol=0)
    np.testing.assert_array_equal(batch["masks"][0, 1], mask_to_square(mask, MASK_SIZE))
    assert not batch["boxes"][1].any() and not batch["masks"][1].any()
    assert "signal_image_index" not in batch and "token_type_ids" not in batch


def test_points_of_a_conversation(processor, image):
    conversation = [
        user(
            picture(image), text("Is "), {"type": "point", "point": [25, 0.5]}, text(" in "), {"type": "region"} | BOTH
        ),
        assistant({"type": "point", "point": [99.75, 60]}, text(" is "), {"type": "region", "point": [1, 2], **MASKED}),
    ]
    batch = encode(processor, conversation)
    assert batch["points"].shape == (1, 4, 2) and batch["points"].dtype == torch.float32
    # 100 x 60 lies 20 pixels down in a square of 100
    expected = torch.tensor([[0.25, 0.205], [0.5, 0.5], [0.9975, 0.8], [0.01, 0.22]])
    torch.testing.assert_close(batch["points"][0], expected, atol=1e-7, rtol=0)
    assert batch["points_valid"].all() and torch.equal(batch["points_read"], batch["points_valid"])
    assert batch["boxes_valid"].tolist() == [[False, True, False, True]]  # of a target mask the tight one
    assert batch["masks_valid"].tolist() == [[False, False, False, True]]


def test_a_checkpoint_has_the_tensors_of_its_signals(image, mask):
    first = make_processor(signals=["mask", "box"])
    batch = encode(first, [user(picture(image), box_item(), {"type": "mask", "mask": mask})])
    assert not [name for name in (*batch, *first.model_input_names) if name.startswith("points")]
    for conversation in ([{"type": "point", "point": [1, 2]}], [{"type": "region", "point": [1, 2]} | {"box": BOX}]):
        with pytest.raises(ValueError, match="sample 0, turn 0: this checkpoint has no 'point' signal.*signals="):
            encode(first, [user(picture(image), *conversation)])
    with pytest.raises(ValueError, match="sample 0: this checkpoint has no 'point' signal"):
        first(images=[image], text="<image><vis>", points=[[[1, 2]]])
    assert first(images=[image], text="<image><vis>", boxes=[[BOX]], points=[[None]])["boxes_valid"].all()
    with pytest.raises(ValueError, match="names .'depth'.; expected some of"):
        make_processor(signals=["box", "depth"])
    with pytest.raises(ValueError, match="expected box among them"):
        make_processor(signals=["mask"])


def test_a_processor_from_before_signals_were_listed(tmp_path, image):
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("signals") == ["box", "mask", "point"]
    path.write_text(json.dumps(stored))
    assert PerceptionGPTProcessor.from_pretrained(tmp_path).signals == ["box", "mask"]
    extended = PerceptionGPTProcessor.from_pretrained(tmp_path, signals=["box", "mask", "point"])
    assert encode(extended, [user(picture(image), {"type": "point", "point": [1, 2]})])["points_valid"].all()


def test_the_tensors_of_signals_are_there_without_signals(processor):
    batch = encode(processor, [user(text("Hello"))])
    names = [name for name in batch if name.startswith(("boxes", "masks", "points"))]
    assert {name: tuple(batch[name].shape) for name in names} == {
        "boxes": (1, 0, 4),
        "masks": (1, 0, MASK_SIZE, MASK_SIZE),
        "points": (1, 0, 2),
        **{f"{name}_{flag}": (1, 0) for name in ("boxes", "masks", "points") for flag in ("valid", "read")},
    }
    assert set(names) <= set(processor.model_input_names)
    assert "pixel_values" not in batch


def test_token_types_are_left_out():
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer("Hello")
    assert "token_type_ids" not in encode(make_processor(tokenizer), [user(text("Hello"))])


def test_a_call_with_markers_equals_the_conversation(processor, image, mask):
    conversation = [user(picture(image), text("What is "), {"type": "region", "box": BOX, "mask": mask}, text("?"))]
    batch = encode(processor, conversation)
    prompt = processor.apply_chat_template(conversation)
    assert prompt == "user:\n<image>What is <vis>?\n"
    for images in ([image], [[image]], image):
        called = processor(images=images, text=[prompt], boxes=[[BOX]], masks=[[mask]], return_tensors="pt")
        assert called.keys() == batch.keys()
        assert all(torch.equal(called[name], batch[name]) for name in batch)
    assert isinstance(processor(images=[image], text=prompt, boxes=[[BOX]])["input_ids"], list)


def test_images_are_dealt_out_to_their_rows(processor, image):
    other = image.resize((50, 80))
    texts = ["<image> <image> <vis>", "no picture", "<image> <vis>"]
    batch = processor(images=[image, other, image], text=texts, boxes=[[[0, 0, 50, 80]], [], [BOX]])
    assert batch["boxes"][0, 0].tolist() == boxes_to_square([0, 0, 50, 80], 80, 50).tolist()
    assert batch["boxes"][2, 0].tolist() == boxes_to_square(BOX, HEIGHT, WIDTH).tolist()


def test_a_signal_says_which_image_it_belongs_to(processor, image):
    tall = image.resize((50, 80))
    low = [0, 50, 50, 80]  # outside the first picture
    rows = [
        [user(picture(image), picture(tall), text("Compare "), box_item(BOX, image=0), box_item(low))],
        [user(picture(tall), text("What is "), box_item(low))],
    ]
    batch = encode(processor, rows)
    assert batch["signal_image_index"].tolist() == [[0, 1], [0, 0]]
    torch.testing.assert_close(batch["boxes"][0, 0], boxes_to_square(BOX, HEIGHT, WIDTH))
    torch.testing.assert_close(batch["boxes"][0, 1], boxes_to_square(low, 80, 50))


def test_the_finer_pictures_are_there_where_asked_for(image):
    batch = encode(make_processor(mask_image_size=80), [user(picture(image), text("Hello"))])
    assert batch["mask_pixel_values"].shape == (1, 3, 80, 80)
    assert batch["pixel_values"].shape == (1, 3, TINY_IMAGE_SIZE, TINY_IMAGE_SIZE)


def test_boxes_stay_float32(processor, image):
    width = 1000
    box = [123.456, 10.0, 777.77, 500.0]
    conversation = [user(picture(image.resize((width, 700))), box_item(box))]
    for move in (
        lambda batch: batch.to("cpu", torch.bfloat16),
        lambda batch: batch.to(torch.bfloat16),
        lambda batch: batch.to(dtype=torch.float16),
        lambda batch: type(batch)(dict(**batch)).to(torch.bfloat16),
        lambda batch: pickle.loads(pickle.dumps(batch)).to("cpu", torch.bfloat16),
    ):
        batch = encode(processor, conversation)
        batch["boxes_noise"] = torch.full_like(batch["boxes"], 1e-4)
        batch["points"] = batch["boxes"][..., :2].clone()
        batch = move(batch)
        assert batch["pixel_values"].dtype in (torch.bfloat16, torch.float16)
        assert batch["boxes"].dtype == batch["boxes_noise"].dtype == batch["points"].dtype == torch.float32
        assert abs(batch["boxes"][0, 0, 0].item() * width - box[0]) < 0.01


# Pictures


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_mode_of_picture_becomes_rgb(processor, mode):
    grey = np.full((20, 30), 128, dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32))
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    loaded = processor.load_image(image)
    assert (loaded.mode, loaded.size) == ("RGB", (30, 20))
    assert abs(np.asarray(loaded).mean() - 128) < (2 if mode != "1" else 3)


def test_transparent_pixels_are_white(processor):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(processor.load_image(image)).min() == 255


@pytest.mark.parametrize(
    "array",
    [
        np.full((20, 30, 3), 128, np.uint8),
        np.full((3, 20, 30), 128, np.uint8),
        np.full((20, 30), 128, np.uint8),
        np.full((20, 30, 3), 0.5, np.float32),
        np.full((20, 30, 1), 128.0),
        np.full((20, 30, 3), 128 * 257, np.uint16),
        torch.full((3, 20, 30), 0.5),
    ],
    ids=["HWC", "CHW", "HW", "float", "HW1", "uint16", "tensor"],
)
def test_arrays_are_pictures(processor, array):
    loaded = processor.load_image(array)
    assert loaded.size == (30, 20)
    assert abs(np.asarray(loaded).mean() - 128) <= 1


@pytest.mark.parametrize(
    "array", [np.zeros((5, 5, 2)), np.zeros(5), np.zeros((0, 5, 3)), np.full((5, 5), np.nan), np.full((5, 5), -3.0)]
)
def test_arrays_that_are_no_pictures(processor, array):
    with pytest.raises(ValueError, match="sample 0, image 0.*cannot be read as an image"):
        processor(images=[array], text="<image>")


def test_a_turned_photo_is_upright(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert processor.load_image(tmp_path / "turned.jpg").size == (20, 40)
    # so boxes are told in pixels of the upright picture
    batch = processor(images=[str(tmp_path / "turned.jpg")], text="<image><vis>", boxes=[[[0, 0, 20, 40]]])
    assert batch["boxes"][0, 0].tolist() == [0.25, 0, 0.75, 1]


def test_pictures_by_path_and_uri(processor, image, tmp_path):
    path = tmp_path / "picture.png"
    image.save(path)
    uri = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    items = [picture(path), picture(str(path)), {"type": "image", "path": str(path)}, {"type": "image", "url": uri}]
    batch = encode(processor, [[user(item)] for item in [picture(image), *items]])
    assert all(torch.equal(batch["pixel_values"][0], other) for other in batch["pixel_values"][1:])


def test_real_photos_and_their_annotations(processor, data_dir):
    annotations = json.loads(next((data_dir / "tiny_coco").rglob("instances*.json")).read_text())
    folder = data_dir / "tiny_coco" / "train2017"
    rows, boxes = [], []
    for record in annotations["images"][:10]:
        items = [item for item in annotations["annotations"] if item["image_id"] == record["id"]]
        regions = []
        for item in items:
            x, y, width, height = item["bbox"]
            boxes.append(torch.tensor([x, y, x + width, y + height]))
            regions.append({"type": "region", "box": boxes[-1].tolist(), "mask": item["segmentation"]})
        rows.append([user(picture(folder / record["file_name"]), text("What are ")), assistant(*regions)])
    batch = encode(processor, rows)
    assert batch["pixel_values"].shape[0] == 10 and len(boxes) == batch["boxes_valid"].sum() > 20
    assert batch["masks"][batch["masks_valid"]].flatten(1).any(1).all()


def _damaged(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.jpg"
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG" if kind == "broken_png" else "JPEG")
    whole = buffer.getvalue()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "broken_png": whole[:60] + b"\0" * 50 + whole[110:],
        "not_a_picture": b"hello, I am a text",
        "empty": b"",
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    return path


@pytest.mark.parametrize("kind", ["truncated", "broken_png", "not_a_picture", "empty", "missing"])
def test_an_unreadable_file_is_named(processor, image, kind, tmp_path):
    path = _damaged(kind, tmp_path)
    rows = [[user(picture(image))], [user(picture(image), picture(path))]]
    with pytest.raises(ValueError, match=rf"sample 1, image 1 \(.*{kind}.jpg\): cannot be read as an image"):
        encode(processor, rows)
    if path.exists() and kind == "truncated":  # opened by the user, so the damage shows only when it is decoded
        with pytest.raises(ValueError, match=rf"sample 0, image 0 \(.*{kind}.jpg\)"):
            encode(processor, [user(picture(Image.open(path)))])


def test_a_decompression_bomb_is_refused(processor, image, tmp_path, monkeypatch):
    image.save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="bomb.png.*DecompressionBombError"):
        encode(processor, [user(picture(tmp_path / "bomb.png"))])


def test_thin_and_tiny_pictures(processor):
    with pytest.raises(ValueError, match="sample 1, image 0: 20000 x 10 pixels are too thin"):
        encode(processor, [[user(text("Hello"))], [user(picture(Image.new("RGB", (20000, 10))))]])
    with pytest.raises(ValueError, match="10 x 20000 pixels are too thin"):
        encode(processor, [user(picture(Image.new("RGB", (10, 20000))))])
    dot = Image.new("RGB", (1, 1), (255, 0, 0))
    batch = encode(processor, [user(picture(dot), {"type": "mask", "mask": np.ones((1, 1), dtype=bool)})])
    assert batch["pixel_values"].shape == (1, 3, TINY_IMAGE_SIZE, TINY_IMAGE_SIZE) and batch["masks"].all()
    limit = Image.new("RGB", (TINY_IMAGE_SIZE, 1))
    assert encode(processor, [user(picture(limit))])["pixel_values"].shape[0] == 1


# Hostile signals


@pytest.mark.parametrize(
    "item, message",
    [
        (
            box_item([10, 20, float("nan"), 40]),
            r"sample 1, <vis> 1: box \[10.0, 20.0, nan, 40.0\] is not finite.*expected",
        ),
        (box_item([50, 20, 10, 45]), "sample 1, <vis> 1: .*inverted"),
        (box_item([10, 20, 10, 45]), "sample 1, <vis> 1: .*no area"),
        (box_item([10, 20, 102, 45]), "sample 1, <vis> 1: .*outside the 100 x 60 image"),
        (box_item([10, 20, 30]), "sample 1, <vis> 1: .*not four numbers"),
        ({"type": "box"}, "sample 1, turn 0: .*has no 'box'"),
        ({"type": "region"}, "sample 1, turn 0: .*has none of box, mask, point"),
        ({"type": "point"}, "sample 1, turn 0: .*has no 'point'"),
        ({"type": "point", "point": [10, 20, 30]}, "sample 1, <vis> 1: point .*not two numbers"),
        ({"type": "point", "point": [10, 62]}, "sample 1, <vis> 1: point .*2 px outside the 100 x 60 image"),
        ({"type": "mask", "mask": np.ones((WIDTH, HEIGHT), dtype=bool)}, r"sample 1, <vis> 1: .*shape \(100, 60\)"),
        ({"type": "mask", "mask": np.zeros((HEIGHT, WIDTH))}, "sample 1, <vis> 1: .*empty"),
        ({"type": "mask", "mask": {"size": [HEIGHT, WIDTH], "counts": "52203"}}, "sample 1, <vis> 1: RLE run lengths"),
        ({"type": "mask", "mask": [[1, 1, 5, 5]]}, "sample 1, <vis> 1: .*2 points"),
        (box_item(image=3), "sample 1, <vis> 1: belongs to image 3"),
        ({"type": "depth", "depth": 3}, "sample 1, turn 0: .*type 'depth'"),
        ("loose words", "sample 1, turn 0: content item loose words"),
        ({"type": "text", "text": 3}, "sample 1, turn 0: text item holds 3"),
    ],
)
def test_a_bad_signal_is_named(processor, image, item, message):
    rows = [[user(picture(image), box_item())], [user(picture(image), box_item(), text(" or "), item)]]
    with pytest.raises(ValueError, match=message):
        encode(processor, rows)


@pytest.mark.parametrize("token", ["<vis>", "<image>"])
@pytest.mark.parametrize("turn", ["string", "item", "assistant"])
@pytest.mark.parametrize("tokenize", [True, False])
def test_typed_tokens_are_an_error(processor, image, token, turn, tokenize):
    words = f"what is {token} here"
    message = {
        "string": {"role": "user", "content": words},
        "item": user(text(words)),
        "assistant": assistant(text(words)),
    }
    with pytest.raises(ValueError, match=f"sample 1, turn 1: .*contains {token}"):
        rows = [[user(picture(image))], [user(picture(image)), message[turn]]]
        processor.apply_chat_template(rows, tokenize=tokenize)


def test_signals_need_their_picture(processor, image):
    with pytest.raises(ValueError, match="sample 0, <vis> 0: a signal in a row without an image"):
        encode(processor, [[user(text("What is "), box_item())], [user(picture(image))]])
    with pytest.raises(ValueError, match="sample 0, <vis> 0: stands before the first image"):
        encode(processor, [user(box_item(), picture(image))])
    assert encode(processor, [user(box_item(image=0), picture(image))])["boxes_valid"].all()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"boxes": [[BOX, BOX], [BOX]]}, "sample 0: 2 boxes for 1 <vis>"),
        ({"boxes": [[BOX], []]}, "sample 1: 0 boxes for 1 <vis>"),
        ({"boxes": [[BOX]]}, "`boxes` holds 1 lists for 2 texts"),
        ({"boxes": [[BOX], [None]]}, "sample 1, <vis> 0: carries no signal; expected at least one of box, mask, point"),
        ({}, "sample 0, <vis> 0: carries no signal"),
        ({"boxes": [[BOX], [BOX]], "masks": [[None], []]}, "sample 1: 0 masks for 1 <vis>"),
        ({"boxes": [[BOX], ["tight"]]}, "sample 1, <vis> 0: box 'tight' is not"),
    ],
)
def test_as_many_signals_as_markers(processor, image, kwargs, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[image, image], text=["<image><vis>", "<image><vis>"], **kwargs)


def test_as_many_pictures_as_markers(processor, image):
    with pytest.raises(ValueError, match="1 images were given for 2 <image>"):
        processor(images=[image], text=["<image>", "<image>"])
    with pytest.raises(ValueError, match="sample 1: 2 images were given for 1 <image>"):
        processor(images=[[image], [image, image]], text=["<image>", "<image>"])
    with pytest.raises(ValueError, match="sample 0: 0 images were given for 1 <image>"):
        encode(processor, [user({"type": "image"})])


def test_truncation_that_eats_a_signal_is_an_error(processor, image):
    prompt = "<image>What is in the picture <vis>"
    with pytest.raises(ValueError, match="sample 0: 0 of 1 <vis> are left"):
        processor(
            images=[image], text=prompt, boxes=[[BOX]], truncation=True, max_length=GRID**2 + 2, padding_side="right"
        )


# Templates and assistant masks


def family_processor(family: str, tokenizer: str = "bytes", chat_template: str | None = None):
    made = TOKENIZERS[tokenizer]()
    made.add_special_tokens({"additional_special_tokens": FAMILY_TOKENS.get(family, [])})
    return make_processor(made, chat_template or TEMPLATES[family])


def history(image, mask):
    return [
        user(picture(image), text("Where is the red cup?")),
        assistant({"type": "mask", "mask": mask}),
        user(text("And what is in "), box_item(), text("? yes")),
        assistant(text("It is "), text("<p>the man</p>"), box_item(), text(" on the left. yes")),
    ]


ANSWERS = ["<vis>", "It is <p>the man</p><vis> on the left. yes"]


def masked_runs(batch, row: int) -> list[torch.Tensor]:
    """The runs of assistant tokens of a row."""
    ids, mask = batch["input_ids"][row], batch["assistant_masks"][row].bool()
    edges = np.diff(mask.int().numpy(), prepend=0, append=0)
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return [ids[start:end] for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", [*TEMPLATES, "ours"])
def test_assistant_masks_cover_the_answers_of_every_family(family, tokenizer, padding_side, image, mask):
    processor = family_processor(family, tokenizer, chat_template=CHAT_TEMPLATE if family == "ours" else None)
    messages = history(image, mask)
    kwargs = {"return_assistant_tokens_mask": True, "processor_kwargs": {"padding_side": padding_side}}
    batch = encode(processor, [messages, messages[:2], messages[:1]], **kwargs)
    assert batch["assistant_masks"].shape == batch["input_ids"].shape
    end_of_turn = END_OF_TURN.get(family, processor.tokenizer.eos_token)
    for row, answers in enumerate((ANSWERS, ANSWERS[:1], [])):
        runs = masked_runs(batch, row)
        assert len(runs) == len(answers)
        for run, answer in zip(runs, answers, strict=True):
            decoded = processor.tokenizer.decode(run)
            assert re.sub(r"\s+", "", decoded) == re.sub(r"\s+", "", answer + end_of_turn)
        real = batch["attention_mask"][row].bool()
        assert not batch["assistant_masks"][row][~real].any()


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", [*TEMPLATES, "ours"])
def test_the_prompt_ends_where_the_first_answer_begins(family, tokenizer, image, mask):
    """What is supervised first is what the model is asked to generate first: thinking stays off in both."""
    processor = family_processor(family, tokenizer, chat_template=CHAT_TEMPLATE if family == "ours" else None)
    messages = history(image, mask)
    trained = encode(processor, messages[:2], return_assistant_tokens_mask=True)
    prompt = encode(processor, messages[:1], add_generation_prompt=True)["input_ids"][0]
    start = int(trained["assistant_masks"][0].argmax())
    assert prompt.tolist() == trained["input_ids"][0, :start].tolist()
    if family == "qwen3":
        assert processor.apply_chat_template(messages[:1], add_generation_prompt=True).endswith("</think>\n\n")
        thinking = processor.apply_chat_template(messages[:1], add_generation_prompt=True, enable_thinking=True)
        assert thinking.endswith("assistant\n")


def test_assistant_masks_are_the_difference_of_tokens(image, mask):
    """Where the template marks nothing: tokens of messages[:i+1] minus tokens of messages[:i] and the prompt."""
    processor = family_processor("smollm")
    messages = history(image, mask)
    batch = encode(processor, messages, return_assistant_tokens_mask=True)
    for turn, run in zip((1, 3), masked_runs(batch, 0), strict=True):
        before = encode(processor, messages[:turn], add_generation_prompt=True)["input_ids"][0].tolist()
        after = encode(processor, messages[: turn + 1])["input_ids"][0].tolist()
        assert after[: len(before)] == before
        assert run.tolist() == after[len(before) :]


def test_marked_and_unmarked_answers_agree(image, mask):
    messages = history(image, mask)
    unmarked = re.sub(r"\s*\{%- (end)?generation %\}", "", CHAT_TEMPLATE)
    assert "generation %" not in unmarked
    batch = encode(make_processor(chat_template=CHAT_TEMPLATE), messages, return_assistant_tokens_mask=True)
    plain = encode(make_processor(chat_template=unmarked), messages, return_assistant_tokens_mask=True)
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    line_breaks = plain["assistant_masks"] - batch["assistant_masks"]  # after the end of the turn, and harmless
    assert line_breaks.min() == 0 and line_breaks.sum() == 2


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}A:{% endif %}",
            "sample 0, turn 1: .*generation prompt",
        ),
        ("{% for m in messages if m['role'] != 'assistant' %}{{ m['content'] }}{% endfor %}", "sample 0: no token"),
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
            "sample 0, turn 1: .*<think>",
        ),
        (
            "{% for m in messages %}{% if loop.last %}last: {% endif %}{{ m['content'] }}{% endfor %}",
            "sample 0, turn 1: ",
        ),
    ],
    ids=["no_branch", "no_branch_no_prompt", "other_prompt", "rewritten"],
)
def test_a_template_that_loses_answers_is_an_error(template, message, image, mask):
    with pytest.raises(ValueError, match=message):
        messages = [user(picture(image), text("Where?")), assistant(text("There is no cup.")), user(text("Sure?"))]
        encode(make_processor(chat_template=template), messages, return_assistant_tokens_mask=True)


def test_truncated_answers_are_an_error(processor, image):
    messages = [user(picture(image), text("Where is the cup?")), assistant(text("There is no cup."))]
    length = encode(processor, messages[:1])["input_ids"].shape[1]
    kwargs = {"truncation": True, "max_length": length, "padding_side": "right"}
    with pytest.raises(ValueError, match="sample 0: no token of its assistant turns is left"):
        encode(processor, messages, return_assistant_tokens_mask=True, processor_kwargs=kwargs)


def test_the_tokenizers_own_template_is_used_and_stored(tmp_path):
    tokenizer = tiny_tokenizer(TEMPLATES["smollm"])
    processor = make_processor(tokenizer)
    assert processor.chat_template == TEMPLATES["smollm"]
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATES["smollm"]
    assert PerceptionGPTProcessor.from_pretrained(tmp_path).chat_template == TEMPLATES["smollm"]
    assert make_processor().chat_template == CHAT_TEMPLATE


def test_the_template_file_is_ours():
    assert (ROOT / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_the_callers_messages_are_left_alone(processor, image):
    messages = [user(picture(image), text("What is "), box_item())]
    items = list(messages[0]["content"])
    encode(processor, messages)
    assert messages[0]["content"] == items


# Saving


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_backbones):
    """A processor from backbones, saved: SigLIP's mean, a tokenizer without a padding token."""
    folder = tmp_path_factory.mktemp("saved")
    backbones = tiny_backbones("llama", "siglip")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "text")
    vision_config = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}
    config = PerceptionGPTConfig(vision_config=vision_config, mask_config={"size": MASK_SIZE}, mask_image_size=64)
    processor = PerceptionGPTProcessor.from_backbones(backbones.vision, str(folder / "text"), config)
    processor.save_pretrained(folder / "processor")
    return processor, folder / "processor"


def test_a_processor_from_backbones(saved):
    processor, _ = saved
    assert list(processor.image_processor.image_mean) == [0.5, 0.5, 0.5]
    assert (processor.image_seq_length, processor.mask_size, processor.mask_image_size) == (16, MASK_SIZE, 64)
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token
    for words in ("a <vis>b", "<p>the cup</p><vis><vis>", "<image><vis>"):
        ids = processor.tokenizer(words, add_special_tokens=False)["input_ids"]
        for token, token_id in (("<vis>", processor.vis_token_id), ("<image>", processor.image_token_id)):
            assert ids.count(token_id) == words.count(token)
    for token in (PHRASE_START_TOKEN, PHRASE_END_TOKEN):
        assert len(processor.tokenizer(token, add_special_tokens=False)["input_ids"]) == 1


def test_a_saved_processor_comes_back(saved, image, mask):
    processor, folder = saved
    for loaded in (
        PerceptionGPTProcessor.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder, trust_remote_code=True),
    ):
        assert loaded.to_dict().items() <= processor.to_dict().items()
        assert loaded.tokenizer.padding_side == "left" and loaded.tokenizer.pad_token == processor.tokenizer.pad_token
        rows = [history(image, mask), history(image, mask)[:1]]
        before, after = encode(processor, rows), encode(loaded, rows)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    image_processor = AutoImageProcessor.from_pretrained(folder)
    assert dict(image_processor.size) == dict(processor.image_processor.size) and image_processor.do_pad
    # the name without its back end: where torchvision is installed, the library picks that one
    assert '"image_processor_type": "LlavaImageProcessor"' in (folder / "processor_config.json").read_text()


# Out


def generated(processor, answers, prompt="<image>Where?", grid=8, images=1):
    """What `generate` returns for prompts that were answered so; object k of each row is told apart by its box."""
    tokenizer = processor.tokenizer
    prompt_ids = tokenizer(prompt.replace("<image>", "<image>" * GRID**2), add_special_tokens=False)["input_ids"]
    rows = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    longest, most = max(map(len, rows)), max(row.count(processor.vis_token_id) for row in rows)
    sequences = torch.tensor([prompt_ids + row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    shape = (len(rows), most)
    output = {
        "sequences": sequences,
        "boxes": torch.zeros(*shape, 4),
        "mask_logits": torch.full((*shape, grid, grid), -1.0),
        "points": torch.zeros(*shape, 2),
        "object_point_scores": torch.zeros(shape),
        "object_scores": torch.zeros(shape),
        "object_mask_scores": torch.zeros(shape),
        "object_valid": torch.zeros(shape, dtype=torch.bool),
        "positions": torch.zeros(shape, dtype=torch.long),
        "prompt_length": len(prompt_ids),
    }
    for row, ids in enumerate(rows):
        found = [at for at, token in enumerate(ids) if token == processor.vis_token_id]
        for slot, at in enumerate(found):
            output["positions"][row, slot] = len(prompt_ids) + at
            output["object_valid"][row, slot] = True
            output["boxes"][row, slot] = torch.tensor([0.25, 0.25, 0.5, 0.5 + 0.1 * slot])
            output["object_scores"][row, slot] = 0.9 - 0.2 * slot
            output["object_mask_scores"][row, slot] = 0.5
            output["points"][row, slot] = torch.tensor([0.3, 0.4])
            output["object_point_scores"][row, slot] = 0.25
            output["mask_logits"][row, slot, 2:4, 2:4] = 1.0
    return output


def test_answers_become_objects(processor):
    answer = "I see <p>the red cup</p><vis><vis> and a dog <vis>.</s>"
    output = generated(processor, [answer, "There is no zebra.</s>", "<vis></s>"])
    results = processor.post_process_generation(output, target_sizes=[(60, 100), (10, 10), (200, 100)])
    first, empty, bare = results
    assert first["text"] == "I see the red cup and a dog ."
    assert first["labels"] == first["text_labels"] == ["the red cup", "the red cup", None]
    for found in first["objects"][:2]:
        assert first["text"][slice(*found["span"])] == found["phrase"] == "the red cup"
    assert first["objects"][2]["span"] is None
    # 100 x 60 lies 20 pixels down in a square of 100
    torch.testing.assert_close(first["boxes"][0], torch.tensor([25.0, 5.0, 50.0, 30.0]))
    assert [set(found) for found in first["objects"]] == [
        {"phrase", "span", "box", "score", "mask_score", "mask", "point_score", "point", "image"}
    ] * 3
    found = first["objects"][0]
    assert found["box"] == [25.0, 5.0, 50.0, 30.0] and all(type(value) is float for value in found["box"])
    assert found["point"] == pytest.approx([30, 20], abs=1e-4) and found["point_score"] == 0.25
    assert first["points"].shape == (3, 2) and empty["points"].shape == (0, 2)
    assert type(found["score"]) is type(found["mask_score"]) is float and found["image"] == 0
    assert found["score"] == pytest.approx(0.9) and found["mask_score"] == 0.5
    assert first["masks"].shape == (3, 60, 100) and first["masks"].dtype == torch.bool
    rows, columns = torch.where(first["masks"][0])  # cells 2 and 3 of 8, and half a cell of blend around them
    assert abs(columns.float().mean() + 0.5 - 37.5) < 1 and abs(rows.float().mean() + 0.5 - 17.5) < 1
    torch.testing.assert_close(first["scores"], torch.tensor([0.9, 0.7, 0.5]))

    assert empty["text"] == "There is no zebra." and empty["objects"] == [] and empty["labels"] == []
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 10, 10) and len(empty["scores"]) == 0
    assert bare["text"] == "" and bare["labels"] == [None]
    torch.testing.assert_close(bare["boxes"][0], torch.tensor([0.0, 50.0, 50.0, 100.0]))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    "answer, words, labels",
    [
        ("<vis><vis>", "", [None, None]),
        ("<p>the cup</p><vis> on <p>the table</p><vis>.", "the cup on the table.", ["the cup", "the table"]),
        ("See <p>the cup</p> and <vis>.", "See the cup and.", [None]),
        ("<p> the cup </p><vis> here", "the cup here", ["the cup"]),
        ("<p></p><vis> nothing", "nothing", [None]),
        ("<p>the cup<vis>", "the cup", [None]),
        ("the cup</p><vis>", "the cup", [None]),
        ("<p>the <p>cup</p><vis></s>", "the cup", ["cup"]),
        ("A cup.", "A cup.", []),
        ("", "", []),
    ],
)
def test_spans_are_where_phrases_stand(tokenizer, answer, words, labels):
    processor = make_processor(TOKENIZERS[tokenizer]())
    result = processor.post_process_generation(generated(processor, [answer]), [(60, 100)])[0]
    assert result["text"].replace(" .", ".").replace("and.", "and.") == words
    assert result["labels"] == labels
    for found in result["objects"]:
        span = found["span"]
        assert found["phrase"] == (result["text"][slice(*span)] if span else None)


def test_the_same_phrase_twice_has_two_spans(processor):
    answer = "<p>a cup</p><vis> and <p>a cup</p><vis>"
    result = processor.post_process_generation(generated(processor, [answer]), [(60, 100)])[0]
    assert [found["span"] for found in result["objects"]] == [(0, 5), (10, 15)]


def test_letters_beyond_ascii_keep_their_spans(processor):
    answer = "Là <p>une tasse à thé ☕</p><vis> là"
    result = processor.post_process_generation(generated(processor, [answer]), [(60, 100)])[0]
    assert result["text"] == "Là une tasse à thé ☕ là" and result["labels"] == ["une tasse à thé ☕"]


def test_forms_of_masks_and_targets(processor):
    answers = ["<vis><vis>", "There is no cup."]
    output = generated(processor, answers)
    reference = processor.post_process_generation(output, target_sizes=torch.tensor([[60, 100], [60, 100]]))
    rle = processor.post_process_generation(output, target_sizes=[(60, 100)] * 2, mask_format="rle")
    polygons = processor.post_process_generation(output, target_sizes=[[(5, 5), (60, 100)]] * 2, mask_format="polygons")
    none = processor.post_process_generation(SimpleNamespace(**output), [(60, 100)] * 2, mask_format=None)
    for slot in range(2):
        expected = reference[0]["masks"][slot].numpy()
        assert torch.equal(reference[0]["objects"][slot]["mask"], reference[0]["masks"][slot])
        np.testing.assert_array_equal(coco_mask.decode(rle[0]["masks"][slot]), expected)
        assert isinstance(rle[0]["objects"][slot]["mask"]["counts"], str)
        drawn = coco_mask.merge(coco_mask.frPyObjects(polygons[0]["objects"][slot]["mask"], 60, 100))
        np.testing.assert_array_equal(coco_mask.decode(drawn), expected)
    assert polygons[0]["objects"][0]["image"] == 1 and polygons[0]["boxes"].equal(reference[0]["boxes"])
    assert none[0]["masks"] is None and [found["mask"] for found in none[0]["objects"]] == [None, None]
    assert rle[1]["masks"] == polygons[1]["masks"] == []
    with pytest.raises(ValueError, match="`mask_format` is 'png'"):
        processor.post_process_generation(output, mask_format="png")
    with pytest.raises(ValueError, match="1 entries for 2 sequences"):
        processor.post_process_generation(output, [(60, 100)])


def test_without_sizes_the_square_is_returned(processor):
    result = processor.post_process_generation(generated(processor, ["<vis>"]))[0]
    assert result["objects"][0]["box"] == [0.25, 0.25, 0.5, 0.5]
    assert result["objects"][0]["point"] == pytest.approx([0.3, 0.4])
    assert result["masks"].shape == (1, 8, 8) and result["masks"].sum() == 4


def test_a_model_without_a_signal_has_none_of_its_results(processor):
    output = generated(processor, ["<vis>"])
    without = {name: value for name, value in output.items() if "point" not in name}
    result = processor.post_process_generation(without, [(60, 100)])[0]
    assert "points" not in result and not {"point", "point_score"} & set(result["objects"][0])
    assert list(result["objects"][0]) == ["phrase", "span", "box", "score", "mask_score", "mask", "image"]


def test_weak_objects_are_dropped(processor):
    output = generated(processor, ["<p>cups</p><vis><vis><vis>"])
    result = processor.post_process_generation(output, [(60, 100)], threshold=0.6)[0]
    assert [round(found["score"], 1) for found in result["objects"]] == [0.9, 0.7]
    assert result["masks"].shape[0] == result["boxes"].shape[0] == len(result["scores"]) == len(result["labels"]) == 2


def test_emitted_objects_belong_to_the_last_image(processor):
    output = generated(processor, ["<vis>"], prompt="<image><image>Compare.")
    assert processor.post_process_generation(output, [(60, 100)])[0]["objects"][0]["image"] == 1


def test_bfloat16_output(processor):
    output = generated(processor, ["<vis>"])
    for name in ("mask_logits", "object_scores", "object_mask_scores"):
        output[name] = output[name].bfloat16()
    result = processor.post_process_generation(output, [(60, 100)])[0]
    assert result["boxes"].dtype == result["scores"].dtype == torch.float32


@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_an_image_that_stands_in_many_rows_is_read_and_resized_once(
    make_tiny_model, image, return_tensors, monkeypatch
):
    _, processor = make_tiny_model(mask_image_size=64)
    other, counts = image.resize((50, 80)), []
    texts = ["<image>a", "<image><image>b", "<image>c"]
    rows = [[image], [other, image], [other]]
    expected = processor(
        images=[[one.copy() for one in row] for row in rows], text=texts, return_tensors=return_tensors
    )
    process = type(processor.image_processor).__call__
    monkeypatch.setattr(
        type(processor.image_processor),
        "__call__",
        lambda self, images, **kwargs: (counts.append(len(images)), process(self, images, **kwargs))[1],
    )
    found = processor(images=rows, text=texts, return_tensors=return_tensors)
    assert counts == [2, 2]
    for name in ("pixel_values", "mask_pixel_values", "input_ids"):
        assert type(found[name]) is type(expected[name]) and len(found[name]) == len(expected[name])
        if name != "input_ids":
            assert all((one == wanted).all() for one, wanted in zip(found[name], expected[name], strict=True))


# Pipeline


@pytest.fixture(scope="module")
def pipe(tiny_model_dir):
    return make_pipeline("perception", model=tiny_model_dir, trust_remote_code=True)


@pytest.fixture
def emitting(pipe, monkeypatch):
    """`pipe` with a model that says `<vis>` first."""
    generate = type(pipe.model).generate
    vis = pipe.processor.vis_token_id

    class First:
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == self.length:
                scores = torch.full_like(scores, -1e4)
                scores[:, vis] = 0
            return scores

    def with_vis(self, **kwargs):
        first = First()
        first.length = kwargs["input_ids"].shape[1]
        return generate(self, **kwargs, logits_processor=[first])

    monkeypatch.setattr(type(pipe.model), "generate", with_vis)
    return pipe


def test_pipeline_calls(emitting, image, tmp_path):
    path = tmp_path / "picture.png"
    image.save(path)
    kwargs = {"max_new_tokens": 3, "do_sample": False}
    single = emitting(image, "the red cup", **kwargs)
    assert single["objects"] and single["masks"].shape[1:] == (HEIGHT, WIDTH)
    assert single["boxes"][:, 2].max() <= WIDTH and single["boxes"][:, 3].max() <= HEIGHT
    content = user(picture(image), text("the red cup"))
    same = [
        emitting(str(path), "the red cup", **kwargs),
        emitting({"image": image, "text": "the red cup"}, **kwargs),
        emitting([content], **kwargs),
        emitting([[content]], **kwargs)[0],
        *emitting([image, image], "the red cup", batch_size=2, **kwargs),
        *emitting(({"image": image, "text": "the red cup"} for _ in range(3)), batch_size=2, **kwargs),
    ]
    assert len(same) == 9
    for result in same:
        assert result["text"] == single["text"]
        torch.testing.assert_close(result["boxes"], single["boxes"], atol=0.01, rtol=0)
    clicked = emitting({"image": image, "text": "What is this?", "point": [30, 20]}, **kwargs)
    assert clicked["points"].shape == (len(clicked["objects"]), 2) and len(clicked["objects"][0]["point"]) == 2
    asked = emitting({"image": image, "text": "What is this?", "box": BOX}, mask_format="rle", **kwargs)
    assert asked["objects"][0]["mask"]["size"] == [HEIGHT, WIDTH]
    beams = emitting(image, "the red cup", max_new_tokens=3, num_beams=2, num_return_sequences=2)
    assert isinstance(beams, list) and len(beams) == 2
    assert emitting(image, "the red cup", threshold=2.0, **kwargs)["objects"] == []


def test_pipeline_batch_equals_each_alone(emitting, image):
    questions = ["the red cup", "Where is the man in the blue shirt, second from the right?", "dog"]
    pictures = [image, image.resize((50, 80)), image.crop((0, 0, 30, 30))]
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    together = emitting(pictures, questions, batch_size=3, **kwargs)
    for one, picture_, question in zip(together, pictures, questions, strict=True):
        alone = emitting(picture_, question, **kwargs)
        assert one["text"] == alone["text"] and one["masks"].shape[1:] == picture_.size[::-1]
        torch.testing.assert_close(one["boxes"], alone["boxes"], atol=0.01, rtol=0)


def test_pipeline_keeps_boxes_exact_in_bfloat16(tiny_model_dir, image, monkeypatch):
    pipe = make_pipeline("perception", model=tiny_model_dir, trust_remote_code=True, dtype=torch.bfloat16)
    seen = {}
    generate = type(pipe.model).generate

    def spy(self, **kwargs):
        seen.update({name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)})
        return generate(self, **kwargs)

    monkeypatch.setattr(type(pipe.model), "generate", spy)
    result = pipe(
        {"image": image.resize((1000, 600)), "text": "What?", "box": [123.456, 1, 500, 500]}, max_new_tokens=2
    )
    assert seen["pixel_values"].dtype == torch.bfloat16 and seen["boxes"].dtype == torch.float32
    assert abs(seen["boxes"][0, 0, 0].item() * 1000 - 123.456) < 0.01
    assert result["boxes"].dtype == torch.float32


def test_pipeline_refuses_what_it_cannot_read(pipe, image):
    with pytest.raises(ValueError, match="expected an image and a text"):
        pipe({"picture": image})
    with pytest.raises(ValueError, match="2 texts were given for 1 images"):
        pipe([image], ["a", "b"])
    with pytest.raises(ValueError, match="contains <vis>"):
        pipe(image, "what is <vis>?")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        pipe("missing.png", "the red cup")
