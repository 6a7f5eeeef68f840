"""A prefix that is encoded once gives what separate calls give, and is not changed by them."""

import copy

import pytest
import torch
from transformers import DynamicCache

from perceptiongpt.signals_perceptiongpt import SIGNALS
from rows import GRID_TOKENS, IMAGE, MASK_SIZE, VIS, ForcedVis, collate, tiny_model, unlike_rows


RESULTS = [name for signal in SIGNALS.values() for name in signal.result_names]
SQUARE = torch.zeros(MASK_SIZE, MASK_SIZE, dtype=torch.uint8)
SQUARE[3:12, 5:20] = 1
START = [1, 5, 6, *[IMAGE] * GRID_TOKENS]
# Questions of unlike lengths about one image: plain ones, with a box, with a mask and a point.
QUESTIONS = [
    {"ids": [7, 8, 9], "slots": []},
    {"ids": [7, 10, VIS, 11, 12, 13, 14], "slots": [{"boxes": [0.1, 0.2, 0.5, 0.9]}]},
    {"ids": [15], "slots": []},
    {"ids": [16, VIS, VIS], "slots": [{"masks": SQUARE}, {"points": [0.3, 0.6]}]},
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def pixels():
    return unlike_rows()[-1]["pixels"]


def rows_and_singles(pixels, padding: int = 0, start=START, slots=(), images: int = 1):
    """The questions after one start as a left-padded batch, and each by itself."""
    rows = [{"ids": [*start, *q["ids"]], "images": images, "slots": [*slots, *q["slots"]]} for q in QUESTIONS]
    batch = collate(rows, pixels[:images].repeat(len(rows), 1, 1, 1), padding)
    return batch, [collate([row], pixels[:images]) for row in rows]


def run(model, inputs, steps=6, forced=(1, 3), **kwargs):
    processors = [ForcedVis(inputs["input_ids"].shape[1], forced)] if "logits_processor" not in kwargs else []
    kwargs = {"do_sample": False, "return_dict_in_generate": True, "logits_processor": processors} | kwargs
    return model.generate(**inputs, max_new_tokens=steps, **kwargs)


class LaidOutVis(ForcedVis):
    """`ForcedVis` by the number of its own calls: the prompts are laid out in another length."""

    def __init__(self, steps):
        super().__init__(0, steps)
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.prompt_length = input_ids.shape[1] - self.calls
        self.calls += 1
        return super().__call__(input_ids, scores)


def check_rows(together, alone, tolerance=1e-5):
    """Each row of the one output against an output of its own."""
    for row, single in enumerate(alone):
        answer = together.sequences[row, together.prompt_length :]
        assert torch.equal(answer, single.sequences[0, single.prompt_length :])
        seen = together.object_valid[row]
        offset = together.prompt_length - single.prompt_length
        assert torch.equal(together.positions[row][seen] - offset, single.positions[0])
        for name in RESULTS:
            torch.testing.assert_close(together[name][row][seen], single[name][0], atol=tolerance, rtol=1e-4)


def snapshot(prefix):
    tensors = [tensor for layer in prefix.layers for tensor in (layer.keys, layer.values)]
    state = prefix.signal_state
    tensors += [prefix.input_ids, state.image_of_row, state.mask_features]
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("images", ["given", "left out"])
def test_answers_of_separate_calls(model, pixels, padding, images):
    batch, singles = rows_and_singles(pixels, padding)
    prefix = model.encode_prefix(**batch)
    assert prefix.get_seq_length() == len(START) and prefix.input_ids.tolist() == [START]
    before = snapshot(prefix)
    if images == "left out":
        batch.pop("pixel_values")
    for _ in range(2):
        output = run(model, batch, prefix=prefix, logits_processor=[LaidOutVis((1, 3))])
        assert torch.equal(output.sequences[:, : output.prompt_length], batch["input_ids"])
        check_rows(output, [run(model, single) for single in singles])
        grounded = model.ground(prefix=prefix, **batch)
        check_rows(grounded, [model.ground(**single) for single in singles])
        texts = model.ground(prefix=prefix, max_new_tokens=4, **batch)
        check_rows(texts, [model.ground(max_new_tokens=4, **single) for single in singles])
    for old, new in zip(before, snapshot(prefix), strict=True):
        assert torch.equal(old, new)
    as_tensor = run(model, batch, prefix=prefix, logits_processor=[LaidOutVis((1, 3))], return_dict_in_generate=False)
    assert torch.equal(as_tensor, output.sequences)


def test_without_an_attention_mask(model, pixels):
    batch, singles = rows_and_singles(pixels)
    batch.pop("attention_mask")
    prefix = model.encode_prefix(**batch)
    check_rows(model.ground(prefix=prefix, **batch), [model.ground(**single) for single in singles])


def test_the_image_is_encoded_once_and_its_keys_are_not_copied(model, pixels, monkeypatch):
    batch, _ = rows_and_singles(pixels)
    images, tokens = [], []
    tower, language_model = model.model.vision_tower, model.model.language_model
    hooks = [
        tower.register_forward_pre_hook(lambda module, args: images.append(len(args[0]))),
        language_model.register_forward_pre_hook(
            lambda module, args, kwargs: tokens.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
        ),
    ]
    prefix = model.encode_prefix(**batch)
    model.ground(prefix=prefix, **batch)
    for hook in hooks:
        hook.remove()
    assert images == [1] and tokens == [(1, len(START)), (4, 7)]
    shared = prefix.share(4)
    for layer, own in zip(shared.layers, prefix.layers, strict=True):
        assert layer.keys.data_ptr() == own.keys.data_ptr() and layer.values.data_ptr() == own.values.data_ptr()


@pytest.mark.parametrize("mode", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 2}])
def test_beams_and_several_sequences(model, pixels, mode):
    batch, _ = rows_and_singles(pixels)
    prefix = model.encode_prefix(**batch)
    if "num_beams" not in mode:
        mode |= {"do_sample": True}
    outputs = []
    for how in ({}, {"prefix": prefix}):
        torch.manual_seed(3)
        outputs.append(run(model, batch, logits_processor=[LaidOutVis((1, 3))], **mode, **how))
    expected, output = outputs
    assert torch.equal(output.sequences, expected.sequences) and len(output.sequences) == 8
    for name in RESULTS:
        torch.testing.assert_close(output[name], expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", ["given", "inferred", "new tokens alone"])
@pytest.mark.parametrize("first_call", ["ground", "generate"])
def test_another_turn_after_a_prefix(model, pixels, mask, first_call):
    """The padding stands elsewhere in such a cache; what the caller passes is as ever."""
    batch, singles = rows_and_singles(pixels, padding=2)
    prefix = model.encode_prefix(**batch)
    turn = torch.tensor([[20, VIS, 21]])
    box = torch.tensor([[[0.2, 0.1, 0.7, 0.3]]])

    def talk(inputs, **kwargs):
        count = len(inputs["input_ids"])
        if first_call == "ground":
            first = model.ground(**inputs, **kwargs)
        else:
            first = run(model, inputs, 3, logits_processor=[LaidOutVis((1,))], **kwargs)
        new = first.sequences.shape[1] - inputs["input_ids"].shape[1]
        cached = first.past_key_values.get_seq_length()
        ids = torch.cat([first.sequences, turn.expand(count, -1)], dim=1)
        shown = {
            "input_ids": ids,
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, new + 3), value=1),
        }
        if mask == "inferred":
            shown.pop("attention_mask")
        elif mask == "new tokens alone":
            shown["input_ids"] = torch.cat([first.sequences[:, -1:], turn.expand(count, -1)], dim=1)
            assert shown["input_ids"].shape[1] < cached
        return run(
            model,
            {**shown, "boxes": box.expand(count, -1, -1)},
            4,
            past_key_values=first.past_key_values,
            logits_processor=[LaidOutVis((0, 2))],
        )

    check_rows(talk(batch, prefix=prefix), [talk(single) for single in singles])


def test_a_prefix_with_a_region_and_two_images(model, pixels):
    """A dialogue so far, as it is: of one row, with all that its `<vis>` carry, and then asked in several ways."""
    start = [1, *[IMAGE] * GRID_TOKENS, 5, VIS, *[IMAGE] * GRID_TOKENS, 6, VIS, 7]
    slots = [{"boxes": [0.3, 0.3, 0.4, 0.6]}, {"masks": SQUARE}]
    batch, singles = rows_and_singles(pixels, 1, start, slots, images=2)
    first = {name: value[:1] for name, value in batch.items()} | {"pixel_values": batch["pixel_values"][:2]}
    prefix = model.encode_prefix(length=len(start), **first)
    assert prefix.get_seq_length() == len(start)
    check_rows(
        run(model, batch, prefix=prefix, logits_processor=[LaidOutVis((1, 3))]),
        [run(model, single) for single in singles],
    )
    # By default it ends with the last image that the rows share before a `<vis>`.
    assert model.encode_prefix(**batch).get_seq_length() == 1 + GRID_TOKENS
    assert model.encode_prefix(**first).get_seq_length() == start.index(6)


def test_more_images_after_the_prefix(model, pixels):
    tail = [9, *[IMAGE] * GRID_TOKENS, 10]
    rows = [
        {"ids": [*START, 7, 8], "images": 1, "slots": []},
        {"ids": [*START, *tail], "images": 2, "slots": []},
    ]
    batch = collate(rows, pixels[[0, 0, 3]])
    prefix = model.encode_prefix(**batch)
    singles = [collate(rows[:1], pixels[:1]), collate(rows[1:], pixels[[0, 3]])]
    check_rows(
        run(model, batch, prefix=prefix, logits_processor=[LaidOutVis((1, 3))]),
        [run(model, single) for single in singles],
    )
    with pytest.raises(ValueError, match="`pixel_values` has 1 images, the rows 3"):
        model.ground(prefix=prefix, **{**batch, "pixel_values": pixels[:1]})
    with pytest.raises(ValueError, match="images after the prefix, but `pixel_values` is missing"):
        model.ground(prefix=prefix, **{**batch, "pixel_values": None})


def test_finer_masks(pixels):
    model = tiny_model(mask_image_size=64)
    batch, singles = rows_and_singles(pixels)
    fine = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    prefix = model.encode_prefix(**batch, mask_pixel_values=fine.expand(4, -1, -1, -1))
    expected = [run(model, single | {"mask_pixel_values": fine}) for single in singles]
    check_rows(
        run(model, batch | {"pixel_values": None}, prefix=prefix, logits_processor=[LaidOutVis((1, 3))]), expected
    )


def test_text_alone(model):
    rows = [{"ids": [1, 5, 6, *q["ids"]], "images": 0, "slots": q["slots"]} for q in QUESTIONS]
    batch = collate(rows, torch.zeros(0))
    prefix = model.encode_prefix(**batch)
    assert prefix.input_ids.tolist() == [[1, 5, 6]]
    check_rows(model.ground(prefix=prefix, **batch), [model.ground(**collate([row], torch.zeros(0))) for row in rows])


@pytest.mark.parametrize("window", [4, 40])
def test_sliding_windows(pixels, window):
    """Padding inside the rows would count against the window; rows of one length have none."""
    text = {"model_type": "mistral", "sliding_window": window}
    model = tiny_model(text=text)
    batch, singles = rows_and_singles(pixels)
    prefix = model.encode_prefix(**batch)
    with pytest.raises(ValueError, match="sliding-window attention"):
        model.ground(prefix=prefix, **batch)
    for row, single in enumerate(singles):
        alone = run(model, single, prefix=prefix, logits_processor=[LaidOutVis((1, 3))])
        check_rows(alone, [run(model, single)])
        assert row < 4


def test_refusals(model, pixels):
    batch, singles = rows_and_singles(pixels)
    prefix = model.encode_prefix(**batch)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][2, -3] = 40  # of [.., image, image, 15]: now an image token is missing
    with pytest.raises(ValueError, match=r"Row 2 has 20 tokens, of which the first 17 are those of the prefix: .* 19"):
        model.ground(prefix=prefix, **other)
    short = {"input_ids": torch.tensor([START]), "attention_mask": torch.ones(1, len(START), dtype=torch.long)}
    for how in (model.ground, model.generate):
        with pytest.raises(ValueError, match="at least one more"):
            how(prefix=prefix, **short)
        with pytest.raises(ValueError, match="were both given"):
            how(prefix=prefix, past_key_values=DynamicCache(), **singles[0])
        with pytest.raises(ValueError, match="pass it as `prefix`"):
            how(past_key_values=prefix, **singles[0])
        with pytest.raises(ValueError, match="`prefix` needs `input_ids`"):
            how(prefix=prefix, inputs_embeds=torch.zeros(1, 20, 48))
        right = {**batch, "attention_mask": batch["attention_mask"].flip(1)}
        with pytest.raises(ValueError, match="padded on the left"):
            how(prefix=prefix, **right)
    for wrong in ({"cache_implementation": "static"}, {"use_cache": False}):
        with pytest.raises(ValueError, match="start of a dynamic cache"):
            model.generate(prefix=prefix, **singles[0], **wrong)
    with pytest.raises(ValueError, match="Row 1 has other images"):
        model.encode_prefix(**{**batch, "pixel_values": pixels[:4]})
    for length in (0, 25):
        with pytest.raises(ValueError, match=f"would have {length} tokens; the rows start with 19 that they share"):
            model.encode_prefix(length=length, **batch)


def test_a_prefix_can_be_copied_and_moved_about(model, pixels):
    batch, _ = rows_and_singles(pixels)
    prefix = model.encode_prefix(**batch)
    twin = copy.deepcopy(prefix)
    first, second = model.ground(prefix=prefix, **batch), model.ground(prefix=twin, **batch)
    assert torch.equal(first.boxes, second.boxes) and torch.equal(first.sequences, second.sequences)
