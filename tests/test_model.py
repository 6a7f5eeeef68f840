"""One forward: what it reads, what it predicts, what it learns from, and where its weights come from."""

import json
import sys
from datetime import timedelta

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from perceptiongpt import PerceptionGPTConfig, PerceptionGPTForConditionalGeneration
from perceptiongpt.configuration_perceptiongpt import ADDED_TOKENS
from perceptiongpt.signal_box_perceptiongpt import box_iou_and_giou
from perceptiongpt.signals_perceptiongpt import SIGNALS
from perceptiongpt.slots_perceptiongpt import packed_mask
from perceptiongpt.training.adapters import add_adapter, parameter_table
from perceptiongpt.training.recipe import LORA_TARGETS
from processes import run_two_processes
from rows import GRID_TOKENS, IMAGE, MASK_SIZE, VIS, batch_and_singles, tiny_config, tiny_model


TOLERANCE = 1e-4
LOSSES = ("loss", "loss_lm", "loss_box", "loss_mask", "loss_point", "loss_iou")
SIGNAL_PARTS = tuple(f"{name}_{part}" for name in SIGNALS for part in ("encoder", "decoder"))
PREDICTIONS = [name for signal in SIGNALS.values() for name in signal.prediction_names]
TRAINED_PARTS = (*SIGNAL_PARTS, "language_mixture", "mask_mixture", "position_table", "multi_modal_projector")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def forward(model):
    """`forward(**inputs)` without gradients."""

    @torch.no_grad()
    def run(**inputs):
        return model(**inputs)

    return run


def teacher_forced_batch() -> dict:
    """
    Rows with an image: a prompt `<vis>` with a box; answers with all signals, a box alone, a mask alone, and a point
    alone. A row without an image and without a `<vis>`. `labels` start behind the prompt.
    """
    picture = [IMAGE] * GRID_TOKENS
    rows = [
        ([1, *picture, 5, VIS, 6], [7, VIS, 8, VIS, 2]),
        ([1, *picture, 9], [VIS, 10, VIS, 2]),
        ([1, 11, 12], [13, 14, 2]),
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids, labels = torch.zeros(3, length, dtype=torch.long), torch.full((3, length), -100)
    for index, (prompt, answer) in enumerate(rows):
        whole = torch.tensor(prompt + answer)
        ids[index, : len(whole)] = whole
        labels[index, len(prompt) : len(whole)] = whole[len(prompt) :]
    generator = torch.Generator().manual_seed(4)
    boxes = torch.rand(3, 3, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    masks = torch.zeros(3, 3, MASK_SIZE, MASK_SIZE, dtype=torch.uint8)
    for row in range(3):
        for slot in range(3):
            masks[row, slot, 3 * slot : 16 + 3 * row, 4 : 20 + slot] = 1
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "boxes": boxes,
        "masks": masks,
        "boxes_valid": torch.tensor([[1, 1, 1], [0, 0, 0], [0, 0, 0]]).bool(),
        "masks_valid": torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool(),
        "points": torch.rand(3, 3, 2, generator=generator),
        "points_valid": torch.tensor([[0, 1, 0], [0, 1, 0], [0, 0, 0]]).bool(),
    }


COUNTED = ("items", "boxes", "masks", "points")
SUPERVISED_BOXES = [(0, 1), (0, 2)]
SUPERVISED_MASKS = [(0, 1), (1, 0)]
SUPERVISED_POINTS = [(0, 1), (1, 1)]


def read_embeddings(model, inputs) -> torch.Tensor:
    """What the language model reads, `(batch_size, length, hidden)`."""
    seen = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen["inputs_embeds"]


# ---- rows and losses -------------------------------------------------------------------------------------------------


def test_a_mixed_batch_equals_its_rows(forward):
    batch, singles = batch_and_singles(padding=2)
    together = forward(**batch)
    assert together.pred_boxes.shape == (5, 2, 4)
    assert together.pred_mask_logits.shape == (5, 2, MASK_SIZE, MASK_SIZE)
    assert together.pred_points.shape == (5, 2, 2)
    assert together.pred_box_iou.shape == together.pred_mask_iou.shape == together.pred_point_score.shape == (5, 2)
    for index, inputs in enumerate(singles):
        alone = forward(**inputs)
        length, slots = inputs["input_ids"].shape[1], inputs["boxes"].shape[1]
        torch.testing.assert_close(together.logits[index, -length:], alone.logits[0], atol=TOLERANCE, rtol=TOLERANCE)
        for name in PREDICTIONS:
            if slots == 0:
                assert getattr(alone, name) is None
            else:
                torch.testing.assert_close(
                    together[name][index, :slots], alone[name][0], atol=TOLERANCE, rtol=TOLERANCE
                )


def test_predictions_come_from_the_state_before(model, forward):
    inputs = teacher_forced_batch()
    output = forward(**{**inputs, "labels": None})
    position = inputs["input_ids"][0].eq(VIS).nonzero()[1, 0]
    state = output.last_hidden_state[0, position - 1]
    torch.testing.assert_close(model.model.box_decoder(state)[0], output.pred_boxes[0, 1], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.lm_head(state), output.logits[0, position - 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("counts", [None, (50, 7, 5, 3)])
def test_losses_by_hand(model, forward, counts):
    inputs = teacher_forced_batch()
    given = {}
    if counts is not None:
        given = {f"num_{name}_in_batch": count for name, count in zip(COUNTED, counts, strict=True)}
    output = forward(**inputs, **given)
    labels = inputs["labels"][:, 1:]
    tokens, num_boxes, num_masks, num_points = counts or (int((labels != -100).sum()), 2, 2, 2)
    entropy = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels, reduction="sum", ignore_index=-100)
    box = mask = point = iou_error = 0
    for row, slot in SUPERVISED_BOXES:
        predicted, target = output.pred_boxes[row, slot], inputs["boxes"][row, slot]
        iou, giou = box_iou_and_giou(predicted, target)
        box += 5 * (predicted - target).abs().sum() + 2 * (1 - giou)
        iou_error += (output.pred_box_iou[row, slot] - iou) ** 2 / num_boxes
    for row, slot in SUPERVISED_MASKS:
        logits, target = output.pred_mask_logits[row, slot], inputs["masks"][row, slot].float()
        p = logits.sigmoid()
        dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
        mask += 2 * F.binary_cross_entropy(p, target) + 2 * dice
        hit = (logits > 0) & target.bool()
        iou = hit.sum() / ((logits > 0) | target.bool()).sum()
        iou_error += (output.pred_mask_iou[row, slot] - iou) ** 2 / num_masks
    for row, slot in SUPERVISED_POINTS:
        difference = output.pred_points[row, slot] - inputs["points"][row, slot]
        point += 5 * difference.abs().sum()
        iou_error += (output.pred_point_score[row, slot] - (-difference.norm() / 0.05).exp()) ** 2 / num_points
    torch.testing.assert_close(output.loss_point, point / num_points, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss_lm, entropy / tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss_box, box / num_boxes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss_mask, mask / num_masks, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss_iou, iou_error, atol=1e-5, rtol=1e-5)
    terms = sum(output[name] for name in LOSSES[1:])
    torch.testing.assert_close(output.loss, terms)


@pytest.mark.parametrize("name", ["boxes", "masks", "points"])
def test_only_known_answers_are_supervised(forward, name):
    """Targets of a prompt, of an unknown value, or behind the last `<vis>` teach nothing; each of the others does."""
    inputs = teacher_forced_batch()
    nothing = torch.zeros_like(inputs["boxes_valid"])
    inputs |= {"boxes_read": nothing, "masks_read": nothing, "points_read": nothing}
    before = forward(**inputs).loss
    taught = {"boxes": SUPERVISED_BOXES, "masks": SUPERVISED_MASKS, "points": SUPERVISED_POINTS}[name]
    for row in range(3):
        for slot in range(3):
            values = inputs[name].clone()
            values[row, slot] = torch.tensor([0.0, 0.9, 0.1, 1.0]) if name == "boxes" else 1 - values[row, slot]
            after = forward(**{**inputs, name: values}).loss
            assert torch.equal(before, after) == ((row, slot) not in taught), (row, slot)


def test_without_targets_the_signal_losses_are_zero(forward):
    inputs = teacher_forced_batch()
    nothing = torch.zeros_like(inputs["boxes_valid"])
    output = forward(**{**inputs, **dict.fromkeys(("boxes_valid", "masks_valid", "points_valid"), nothing)})
    assert all(output[name] == 0 for name in LOSSES[2:]) and output.loss == output.loss_lm > 0


def test_loss_weights_come_from_the_config():
    inputs = teacher_forced_batch()
    model = tiny_model()
    with torch.no_grad():
        before = model(**inputs)
        model.config.lm_loss_weight = 3.0
        model.config.box_config.giou_weight *= 2
        model.config.box_config.l1_weight *= 2
        model.config.mask_config.bce_weight = model.config.mask_config.dice_weight = 0.0
        after = model(**inputs)
    torch.testing.assert_close(after.loss_lm, 3 * before.loss_lm)
    torch.testing.assert_close(after.loss_box, 2 * before.loss_box)
    assert after.loss_mask == 0


def test_tuples_equal_dicts(model, forward):
    inputs = teacher_forced_batch()
    as_tuple, as_dict = forward(**inputs, return_dict=False), forward(**inputs)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(as_dict)
    assert torch.equal(as_tuple[0], as_dict.loss) and list(as_dict)[:7] == [*LOSSES, "logits"]
    assert torch.equal(as_tuple[6], as_dict["logits"])
    assert "loss" not in forward(**{**inputs, "labels": None})


# ---- what a `<vis>` is read as ---------------------------------------------------------------------------------------


def test_a_vis_is_read_as_the_mean_of_what_is_read(model):
    inputs = teacher_forced_batch()
    at = inputs["input_ids"][0].eq(VIS).nonzero()[1, 0]
    static = model.get_input_embeddings().weight[VIS]
    box = model.model.box_encoder(inputs["boxes"][0, 1])
    mask = model.model.mask_encoder(inputs["masks"][0, 1][None])[0]
    point = model.model.point_encoder(inputs["points"][0, 1])
    names = ("boxes", "masks", "points")
    expected = {
        "boxes": box,
        "masks": mask,
        "points": point,
        "boxes masks": (box + mask) / 2,
        "boxes masks points": (box + mask + point) / 3,
        "": static,
    }
    for reads, embedding in expected.items():
        flags = {f"{name}_read": inputs[f"{name}_valid"].clone() for name in names}
        for name in names:
            flags[f"{name}_read"][0, 1] = name in reads.split()
        read = read_embeddings(model, inputs | flags)
        torch.testing.assert_close(read[0, at], embedding, atol=1e-5, rtol=1e-5)
    default = read_embeddings(model, inputs)
    torch.testing.assert_close(default[0, at], expected["boxes masks points"], atol=1e-5, rtol=1e-5)
    inputs["points_valid"][1, 1] = False
    nothing_known = inputs["input_ids"][1].eq(VIS).nonzero()[1, 0]
    assert torch.equal(read_embeddings(model, inputs)[1, nothing_known], static)


def test_values_alone_are_valid(model):
    """`boxes` without flags: every slot is known and read."""
    inputs = teacher_forced_batch()
    plain = {name: inputs[name] for name in ("input_ids", "pixel_values", "boxes")}
    read = read_embeddings(model, plain)
    where = inputs["input_ids"][1].eq(VIS).nonzero()[:, 0]
    torch.testing.assert_close(read[1, where], model.model.box_encoder(inputs["boxes"][1, :2]), atol=1e-5, rtol=1e-5)


def test_noise_is_read_but_not_learned(model, forward):
    inputs = teacher_forced_batch()
    # Two values of the same sum: what is read is the same, so only targets could differ.
    noise = 0.05 * torch.ones_like(inputs["boxes"])
    moved = {**inputs, "boxes": inputs["boxes"] + noise, "boxes_noise": -noise}
    noisy = {**inputs, "boxes_noise": noise}
    torch.testing.assert_close(read_embeddings(model, moved), read_embeddings(model, inputs), atol=1e-5, rtol=1e-5)
    assert (read_embeddings(model, noisy) - read_embeddings(model, inputs)).abs().max() > 1e-3
    output, moved_output = forward(**inputs), forward(**moved)
    torch.testing.assert_close(output.pred_boxes, moved_output.pred_boxes, atol=1e-5, rtol=0)
    assert (output.loss_box - moved_output.loss_box).abs() > 1e-3
    silent = {**noisy, "boxes_read": torch.zeros_like(inputs["boxes_valid"])}
    quiet = {**silent, "boxes_noise": None}
    assert torch.equal(forward(**silent).loss, forward(**quiet).loss)


def test_a_slot_belongs_to_the_last_picture_before_it(model, monkeypatch):
    seen = []
    decode = model.model.decode_signals
    monkeypatch.setattr(
        model.model,
        "decode_signals",
        lambda states, features, index, *others: (
            seen.append(index.tolist()) or decode(states, features, index, *others)
        ),
    )
    picture = [IMAGE] * GRID_TOKENS
    rows = [[VIS, *picture, VIS, *picture, 5, VIS], [*picture, VIS, 6, VIS, *([0] * (GRID_TOKENS + 1))]]
    inputs = {
        "input_ids": torch.tensor(rows),
        "pixel_values": torch.randn(3, 3, 32, 32),
        "boxes": torch.tensor([0.1, 0.2, 0.5, 0.6]).expand(2, 3, 4),
    }
    with torch.no_grad():
        model(**inputs)
        model(**inputs, signal_image_index=torch.tensor([[1, -1, 0], [0, -1, -1]]))
    assert seen[0][:5] == [-1, 0, 1, 2, 2]
    assert seen[1][:5] == [1, 0, 0, 2, 2]


def test_masks_are_decoded_from_the_picture_of_their_slot(model, forward):
    picture = [IMAGE] * GRID_TOKENS
    ids = torch.tensor([[*picture, 4, *picture, 5, VIS]])
    pixels, other = torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32)
    boxes = torch.tensor([[[0.1, 0.2, 0.5, 0.6]]])
    features = model.get_image_features(pixels, return_dict=True)
    first, second = (features.mask_features.clone() for _ in range(2))
    changed = model.get_image_features(other, return_dict=True).mask_features[0]
    first[0], second[1] = changed, changed

    def logits(mask_features, index):
        outputs = {"image": type(features)(pooler_output=features.pooler_output, mask_features=mask_features)}
        index = torch.tensor([[index]])
        return forward(
            input_ids=ids, mm_encoder_outputs=outputs, boxes=boxes, signal_image_index=index
        ).pred_mask_logits

    for index, changes in ((-1, second), (1, second), (0, first)):
        same = first if changes is second else second
        base = logits(features.mask_features, index)
        torch.testing.assert_close(base, logits(same, index), atol=1e-6, rtol=0)
        assert (base - logits(changes, index)).abs().max() > 1e-3


# ---- packing ---------------------------------------------------------------------------------------------------------


def packed_questions() -> tuple[dict, list[dict]]:
    """Three questions behind one picture as one row, and each as a row of its own."""
    prefix = [1, *[IMAGE] * GRID_TOKENS]
    questions = [[5, 6, VIS, 7], [8, VIS, 9, VIS, 10, 11], [12, 13]]
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.0, 0.1, 0.3, 1.0], [0.4, 0.4, 0.9, 0.5]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    owner = torch.tensor([0] * len(prefix) + [i for i, q in enumerate(questions, start=1) for _ in q])
    length = len(owner)
    mask = ((owner[:, None] == owner) | (owner == 0)[None]) & torch.ones(length, length, dtype=torch.bool).tril()
    positions = [*range(len(prefix))] + [len(prefix) + step for question in questions for step in range(len(question))]
    packed = {
        "input_ids": torch.tensor([prefix + sum(questions, [])]),
        "attention_mask": mask[None, None],
        "position_ids": torch.tensor([positions]),
        "pixel_values": pixels,
        "boxes": boxes[None],
    }
    starts = [0, 1, 3]
    alone = [
        {
            "input_ids": torch.tensor([prefix + question]),
            "pixel_values": pixels,
            "boxes": boxes[None, start : start + question.count(VIS)],
        }
        for start, question in zip(starts, questions, strict=True)
    ]
    return packed, alone


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag")
@pytest.mark.parametrize(
    ("attention", "compiles"),
    [
        ("sdpa", False),
        ("eager", False),
        ("flex_attention", False),
        pytest.param("flex_attention", True, marks=pytest.mark.slow),  # it compiles itself, for half a minute
    ],
)
def test_packed_questions_equal_each_alone(attention, compiles):
    model = tiny_model()
    model.set_attn_implementation({"text_config": attention})
    packed, alone = packed_questions()
    with torch.no_grad(), torch.compiler.set_stance("default" if compiles else "force_eager"):
        together = model(**packed)
        at, slot = 1 + GRID_TOKENS, 0
        for inputs in alone:
            single = model(**inputs)
            count, slots = inputs["input_ids"].shape[1] - 1 - GRID_TOKENS, inputs["boxes"].shape[1]
            expected = single.logits[0, 1 + GRID_TOKENS :]
            torch.testing.assert_close(together.logits[0, at : at + count], expected, atol=TOLERANCE, rtol=TOLERANCE)
            if slots:
                for name in PREDICTIONS:
                    part = together[name][0, slot : slot + slots]
                    torch.testing.assert_close(part, single[name][0], atol=TOLERANCE, rtol=TOLERANCE)
            at, slot = at + count, slot + slots
        leaky = model(**{**packed, "attention_mask": torch.ones_like(packed["attention_mask"]).tril()})
    assert (leaky.logits - together.logits)[0, -1].abs().max() > 100 * TOLERANCE


def test_flex_attention_gets_the_blocks_of_a_packed_row():
    """Two questions of 128 tokens behind 128 of an image: the second does not read the block of the first."""
    config = tiny_config()
    config.text_config._attn_implementation = "flex_attention"
    owner = torch.arange(3).repeat_interleave(128)
    mask = ((owner[:, None] == owner) | (owner == 0)[None]) & torch.ones(384, 384, dtype=torch.bool).tril()
    blocks = packed_mask(config, mask[None, None], torch.zeros(1, 384, dtype=torch.long), torch.float32)
    assert isinstance(blocks, BlockMask)
    assert blocks.to_dense()[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


def test_packing_is_refused_where_it_cannot_be_right(model):
    packed, _ = packed_questions()
    with pytest.raises(ValueError, match="position_ids"):
        model(**{**packed, "position_ids": None})
    mistral = {"model_type": "mistral", "sliding_window": 16, "head_dim": 12}
    short_window = tiny_model(text=mistral)
    with pytest.raises(ValueError, match="sliding window of 16"):
        short_window(**packed)
    wide_window = tiny_model(text={**mistral, "sliding_window": 64})
    assert wide_window(**packed).logits.isfinite().all()
    flash = tiny_model()
    flash.config.text_config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention"):
        flash(**packed)


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_inputs_embeds_equal_ids(model, forward):
    inputs = teacher_forced_batch()
    expected = forward(**inputs)
    ids = inputs.pop("input_ids")
    output = forward(inputs_embeds=model.get_input_embeddings()(ids), **inputs)
    for name in ("loss", "logits", *PREDICTIONS):
        torch.testing.assert_close(output[name], expected[name], atol=1e-5, rtol=1e-5)


def test_encoded_pictures_equal_pixels(model, forward):
    inputs = teacher_forced_batch()
    expected = forward(**inputs)
    with torch.no_grad():
        encoded = {"image": model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
    output = forward(mm_encoder_outputs=encoded, **inputs)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.pred_mask_logits, expected.pred_mask_logits)


def test_wrong_inputs_are_named(model):
    inputs = teacher_forced_batch()
    with pytest.raises(ValueError, match="2 <image> tokens|48 features|one token each"):
        model(**{**inputs, "pixel_values": torch.randn(3, 3, 32, 32)})
    encoded = {"image": model.get_image_features(inputs["pixel_values"], return_dict=True)}
    with pytest.raises(ValueError, match="pixel_values.*mm_encoder_outputs"):
        model(**inputs, mm_encoder_outputs=encoded)
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        model(**inputs, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]))
    with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
        model(pixel_values=inputs["pixel_values"])


def test_finer_pictures_may_be_left_out():
    """Picture 0 has no finer one; masks of picture 1 are those of a batch with both."""
    model = tiny_model(mask_image_size=64)
    inputs = teacher_forced_batch()
    fine = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        both = model(**inputs, mask_pixel_values=fine)
        one = model(**inputs, mask_pixel_values=fine[1:], mask_image_index=torch.tensor([-1, 0]))
        swapped = model(**inputs, mask_pixel_values=fine.flip(0), mask_image_index=torch.tensor([1, 0]))
        wrong = model(**inputs, mask_pixel_values=fine.flip(0))
    torch.testing.assert_close(one.pred_mask_logits[1], both.pred_mask_logits[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(swapped.pred_mask_logits, both.pred_mask_logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.logits, both.logits)
    assert (wrong.pred_mask_logits[1, :2] - both.pred_mask_logits[1, :2]).abs().max() > 1e-3


def test_masks_without_their_finer_images_are_refused():
    """They would be decoded from nothing."""
    model = tiny_model(mask_image_size=64)
    inputs = teacher_forced_batch()
    with pytest.raises(ValueError, match="`mask_pixel_values` is missing"):
        model(**inputs)
    with pytest.raises(ValueError, match="`mask_pixel_values` is missing"):
        model(**{**inputs, "labels": None})
    prompt = {name: value[:1] for name, value in inputs.items() if name != "labels"}
    with pytest.raises(ValueError, match="`mask_pixel_values` is missing"):
        model.generate(**prompt, max_new_tokens=1)
    text = text_only_batch()
    assert model(**text, boxes=torch.zeros(1, 1, 4)).loss.isfinite()


@pytest.mark.parametrize("training", [True, False])
def test_finer_pictures_may_all_be_left_out(training):
    """Nobody wants a mask of any of the pictures: boxes are predicted all the same."""
    model = tiny_model(mask_image_size=64).train(training)
    inputs = teacher_forced_batch()
    inputs["masks_valid"] = torch.zeros_like(inputs["masks_valid"])
    fine = torch.randn(2, 3, 64, 64)
    without, given = model(**inputs), model(**inputs, mask_pixel_values=fine)
    torch.testing.assert_close(without.loss_box, given.loss_box)
    assert without.loss_mask == 0 and without.pred_mask_logits.isfinite().all()


# ---- which signals a checkpoint has ----------------------------------------------------------------------------------


def test_only_parts_that_are_there_are_kept_whole():
    """accelerate looks for every name of `_no_split_modules` and stops at a missing one, as CLIP text layers."""
    model = tiny_model()
    names = set(model._no_split_modules)
    assert {"CLIPEncoderLayer", "LlamaDecoderLayer", "BoxDecoder"} <= names
    assert names <= {type(module).__name__ for module in model.modules()}


@pytest.fixture(scope="module")
def first_folder(tmp_path_factory) -> str:
    """A checkpoint of before there were points, whose config does not list its signals."""
    folder = tmp_path_factory.mktemp("first")
    tiny_model(signals=["mask", "box"]).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("signals") == ["box", "mask"] and config.pop("point_config") is None
    path.write_text(json.dumps(config))
    return str(folder)


def test_a_checkpoint_without_points_loads(first_folder):
    model, info = PerceptionGPTForConditionalGeneration.from_pretrained(first_folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.signals == list(model.model.signals) == ["box", "mask"] and model.config.point_config is None
    assert not hasattr(model.model, "point_encoder") and "BoxDecoder" in model._no_split_modules
    assert "PointDecoder" not in model._no_split_modules
    inputs = teacher_forced_batch()
    without = {name: value for name, value in inputs.items() if not name.startswith("points")}
    output = model(**without)
    assert output.loss > 0 and "loss_point" not in output and "pred_points" not in output
    with pytest.raises(ValueError, match=r"this checkpoint has no 'point' signal.*signals=\['box', 'mask', 'point'\]"):
        model(**inputs)
    prompt = {name: value[:1] for name, value in inputs.items() if name != "labels"}
    with pytest.raises(ValueError, match="this checkpoint has no 'point' signal"):
        model.generate(**prompt, max_new_tokens=1)


def test_a_checkpoint_can_get_points(first_folder, tmp_path):
    first = PerceptionGPTForConditionalGeneration.from_pretrained(first_folder)
    first.model.box_encoder.norm.weight.data.fill_(0.7)
    first.save_pretrained(tmp_path / "first")
    signals = ["box", "mask", "point"]
    model, info = PerceptionGPTForConditionalGeneration.from_pretrained(
        tmp_path / "first", signals=signals, point_config={"hidden_size": 64}, output_loading_info=True
    )
    assert info["missing_keys"] and all(".point_" in name for name in info["missing_keys"])
    assert model.config.signals == signals and model.config.point_config.hidden_size == 64
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    # It starts like a signal of a fresh model, at the scale of the signals that the language model has learned to read.
    fresh = tiny_model()
    for part in ("point_encoder", "point_decoder"):
        for name, parameter in getattr(model.model, part).named_parameters():
            spread = getattr(fresh.model, part).get_parameter(name).std()
            if name != "norm.weight":
                assert parameter.std().item() == pytest.approx(spread.item(), rel=0.3), name
    torch.testing.assert_close(model.model.point_encoder.norm.weight, torch.full((48,), 0.7))
    output = model.train()(**teacher_forced_batch())
    output.loss.backward()
    assert output.loss_point > 0 and model.model.point_decoder.linear_1.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path / "again")
    again = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert again.config.signals == signals
    assert torch.equal(again.model.point_encoder.linear_1.weight, model.model.point_encoder.linear_1.weight)


def test_signals_of_a_config():
    assert PerceptionGPTConfig().signals == list(SIGNALS)
    assert tiny_config(signals=("point", "box")).signals == ["box", "point"]
    old = {name: value for name, value in tiny_config().to_dict().items() if name != "signals"}
    assert PerceptionGPTConfig.from_dict(old).signals == ["box", "mask"]
    assert PerceptionGPTConfig.from_dict(tiny_config().to_dict()).signals == list(SIGNALS)
    for wrong, message in ((["mask"], "box among them"), (["box", "smell"], "names .'smell'.")):
        with pytest.raises(ValueError, match=message):
            tiny_config(signals=wrong)


# ---- what runs in a training step ------------------------------------------------------------------------------------


def text_only_batch() -> dict:
    ids = torch.tensor([[1, 5, 6, 7, 2]])
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def batch_of(kind: str) -> dict:
    """Text alone, images without signals, or images with the signals that `kind` names."""
    if kind == "text":
        return text_only_batch()
    kept = kind.split()
    batch = teacher_forced_batch()
    return {name: value for name, value in batch.items() if not name.startswith(("boxes", "masks", "points"))} | {
        name: value for name, value in batch.items() if name.split("_")[0] in kept
    }


@pytest.mark.parametrize("kind", ["text", "image", "boxes", "masks", "boxes points", "boxes masks points"])
def test_one_process_runs_only_what_the_batch_needs(kind):
    model, inputs, runs = tiny_model().train(), batch_of(kind), []
    for part in (*TRAINED_PARTS, "vision_tower"):
        getattr(model.model, part).register_forward_hook(lambda *args, part=part: runs.append(part))
    output = model(**inputs)
    output.loss.backward()
    needed = [f"{name}_{part}" for name in SIGNALS if SIGNALS[name].plural in kind for part in ("encoder", "decoder")]
    if kind != "text":
        needed += ["vision_tower", "language_mixture", "mask_mixture", "position_table", "multi_modal_projector"]
    assert sorted(runs) == sorted(needed)
    learn = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert learn >= set(needed) - {"mask_mixture"} and ("mask_mixture" in learn) == ("masks" in kind)
    for signal in SIGNALS.values():
        given = signal.plural in kind
        assert (output[signal.loss_name] > 0) == given
        assert (output[signal.prediction_names[0]] is not None) == given if given else True
        assert given or signal.prediction_names[0] not in output


def test_values_without_slots_count_as_not_given():
    inputs = text_only_batch()
    empty = {
        "boxes": torch.zeros(1, 0, 4),
        "masks": torch.zeros(1, 0, MASK_SIZE, MASK_SIZE, dtype=torch.uint8),
        "points": torch.zeros(1, 0, 2),
        "boxes_noise": torch.zeros(1, 0, 4),
        **dict.fromkeys(("boxes_valid", "masks_valid", "points_valid"), torch.zeros(1, 0, dtype=torch.bool)),
    }
    model = tiny_model().train()
    assert torch.equal(model(**inputs, **empty).loss, model(**inputs).loss)


def unlike_worker(kinds: list[str]) -> None:
    """One process of two, each with a batch of another kind: all parts run, in the same order, and get a gradient."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    inputs = batch_of(kinds[torch.distributed.get_rank()])
    for finer in (None, 64):
        model, runs = tiny_model(mask_image_size=finer), []
        if finer and "pixel_values" in inputs:
            inputs["mask_pixel_values"] = torch.ones(2, 3, finer, finer)
        expected = model(**inputs).loss
        for part in (*TRAINED_PARTS, "vision_tower"):
            getattr(model.model, part).register_forward_hook(lambda *args, part=part: runs.append(part))
        output = model.train()(**inputs)
        output.loss.backward()
        torch.testing.assert_close(output.loss, expected)
        assert set(runs) == {*TRAINED_PARTS, "vision_tower"}, runs
        for part in TRAINED_PARTS:
            for name, parameter in getattr(model.model, part).named_parameters():
                assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{part}.{name}"
        orders = [None, None]
        torch.distributed.all_gather_object(orders, [run for run in runs if run in SIGNAL_PARTS])
        assert orders[0] == orders[1] and sorted(orders[0]) == sorted(SIGNAL_PARTS)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [("text", "boxes masks points"), ("image", "boxes")], ids=str)
def test_two_processes_run_every_part(kinds):
    """Processes whose batches differ in kind would wait for each other."""
    run_two_processes(__file__, *kinds)


def compiled_equals_plain(model, inputs) -> None:
    torch.compiler.reset()
    output = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    expected = model(**inputs)
    for name in ("loss", *PREDICTIONS):
        found, wanted = output[name], expected[name]
        if model.training and "mask" in name:  # a graph of fixed shapes decodes the others, too
            found, wanted = (torch.stack([value[place] for place in SUPERVISED_MASKS]) for value in (found, wanted))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    if model.training:
        output.loss.backward()
        assert model.model.mask_decoder.hyper_1.weight.grad.abs().max() > 0


def test_a_training_step_decodes_only_the_masks_that_are_learned():
    """Evaluation decodes all slots: the losses and the gradients are the same."""
    batch, found, decoded = teacher_forced_batch(), [], []
    for training in (True, False):
        model = tiny_model().train(training)
        hook = model.model.mask_decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(len(inputs[0])))
        output = model(**batch)
        output.loss.backward()
        hook.remove()
        found.append({"loss": output.loss.detach(), **{name: one.grad for name, one in model.named_parameters()}})
    assert decoded == [len(SUPERVISED_MASKS), batch["masks_valid"].numel()]
    for name, value in found[1].items():
        assert (value is None) == (found[0][name] is None), name
        if value is not None:
            torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [False, True])
def test_forward_compiles_in_one_graph(training):
    compiled_equals_plain(tiny_model().train(training), teacher_forced_batch())


# ---- the library's own trainer ---------------------------------------------------------------------------------------


def plain_trainer(tmp_path, **arguments) -> Trainer:
    """Over eight equal rows with every signal."""
    batch = {name: value[:1] for name, value in teacher_forced_batch().items()}

    def collate(rows: list[dict]) -> dict:
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    settings = {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "use_cpu": True, "save_strategy": "no"}
    settings |= {"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    return Trainer(
        model=tiny_model(),
        args=TrainingArguments(str(tmp_path), **settings, **arguments),
        data_collator=collate,
        train_dataset=[batch] * 8,
    )


def test_accumulation_changes_no_loss_and_no_gradient(tmp_path):
    """Also without the signals' own counts, which only our trainer gives."""
    logs = []
    for steps in (1, 2, 4):
        trainer = plain_trainer(tmp_path, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for log in logs[1:]:
        assert log["loss"] == pytest.approx(logs[0]["loss"], rel=1e-4)
        assert log["grad_norm"] == pytest.approx(logs[0]["grad_norm"], rel=1e-3)


def test_label_smoothing_is_refused(tmp_path):
    """It would take the labels away, and with them the losses of the signals."""
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        plain_trainer(tmp_path, label_smoothing_factor=0.1).train()


# ---- joining backbones -----------------------------------------------------------------------------------------------


def same_weights(part, loaded, prefix_rows: int | None = None):
    state, expected = part.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys() and state
    for name, weight in expected.items():
        assert torch.equal(state[name][:prefix_rows] if "embed_tokens" in name else state[name], weight), name


@pytest.mark.parametrize("vision", ["clip", "clip_vision"])
@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_weights_of_both_backbones_come_through(tiny_backbones, make_tiny_model, family, vision):
    backbones = tiny_backbones(family, vision)
    model, processor = make_tiny_model(family, vision)
    text = AutoModelForCausalLM.from_pretrained(backbones.text)
    rows = text.config.vocab_size
    same_weights(model.model.language_model, text.model, rows)
    same_weights(model.model.vision_tower, CLIPVisionModel.from_pretrained(backbones.vision))
    assert torch.equal(model.lm_head.weight[:rows], text.lm_head.weight)
    tied = family == "llama_tied"
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    config = model.config
    ids = [config.image_token_id, config.vis_token_id, config.phrase_start_token_id, config.phrase_end_token_id]
    ids += config.reserved_token_ids
    assert processor.tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS)) == ids
    assert len(model.get_input_embeddings().weight) == max(ids) + 1 == config.text_config.vocab_size
    # New rows are as long as the others, and so are the embeddings of signals.
    embeddings = model.get_input_embeddings()
    usual = embeddings.weight[:rows].square().mean().sqrt()
    boxes = model.model.box_encoder(torch.rand(20, 2, 2).sort(dim=1).values.flatten(1))
    masks = model.model.mask_encoder((torch.rand(20, 128, 128) > 0.5).float())
    for signal in (boxes, masks):
        torch.testing.assert_close(signal.square().mean().sqrt(), usual, rtol=0.02, atol=0)


def test_signals_are_as_long_as_gemmas_scaled_embeddings(make_tiny_model):
    model, _ = make_tiny_model("gemma", "clip")
    usual = model.get_input_embeddings()(torch.arange(300)).square().mean().sqrt()
    signal = model.model.box_encoder(torch.rand(20, 2, 2).sort(dim=1).values.flatten(1))
    torch.testing.assert_close(signal.square().mean().sqrt(), usual, rtol=0.1, atol=0)


@pytest.fixture(scope="module", params=[(-2, "default"), (-1, "full"), (1, "default")], ids=str)
def llava_folder(request, tmp_path_factory):
    layer, _ = request.param
    folder = tmp_path_factory.mktemp("llava")
    sizes = tiny_config()
    text = {**sizes.text_config.to_dict(), "vocab_size": 500}
    config = LlavaConfig(
        vision_config=sizes.vision_config.to_dict(),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=GRID_TOKENS,
        vision_feature_layer=layer,
    )
    torch.manual_seed(3)
    llava = LlavaForConditionalGeneration(config)
    for parameter in llava.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    llava.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_from_llava_equals_llava(llava_folder, tmp_path, with_tokenizer):
    from backbones import tiny_tokenizer

    folder, image_id, arguments = str(llava_folder), IMAGE, {}
    if with_tokenizer:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        image_id = tokenizer.convert_tokens_to_ids("<image>")
        arguments = {"tokenizer": tokenizer}
    llava = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    llava.config.image_token_id = image_id
    ids = torch.tensor([[1, 5, *[image_id] * GRID_TOKENS, 6, 7, 8], [1, *[image_id] * GRID_TOKENS, 9, 10, 11, 12]])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = PerceptionGPTForConditionalGeneration.from_llava_pretrained(folder, **arguments, image_token_id=image_id)
    with torch.no_grad():
        expected = llava(input_ids=ids, pixel_values=pixels).logits
        output = model.eval()(input_ids=ids, pixel_values=pixels).logits
        other = model(input_ids=ids, pixel_values=pixels.flip(0)).logits
    rows = expected.shape[-1]
    torch.testing.assert_close(output[..., :rows], expected, atol=1e-5, rtol=0)
    assert (other[..., :rows] - expected).abs().max() > 1e-2  # the pictures matter
    # The way to the other layers is open: the gates and the gain move, though they start at 0.
    model.train()(input_ids=ids, pixel_values=pixels, labels=ids).loss.backward()
    for parameter in (model.model.language_mixture.gate, model.model.position_table.gain):
        assert parameter.item() == 0 and parameter.grad.abs() > 0
    model.save_pretrained(tmp_path)
    again = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids, pixel_values=pixels).logits, output)


def test_a_fresh_mixture_is_the_mean_of_all_layers(model):
    layers = tuple(torch.randn(2, 16, 32) for _ in range(3))
    fresh = model.model.language_mixture(layers)
    torch.testing.assert_close(fresh, torch.stack(layers).mean(0), atol=1e-6, rtol=0)


def test_a_mixture_is_the_softmax_of_its_logits(model):
    from perceptiongpt.modeling_perceptiongpt import FeatureMixture

    layers = tuple(torch.randn(2, 16, 32) for _ in range(3))
    for initial_layer in (None, 1):
        mixture = FeatureMixture(3, initial_layer)
        mixture.logits.data = torch.tensor([0.3, -1.0, 2.0])
        if initial_layer is not None:
            mixture.gate.data.fill_(1.0)
        weights = mixture.logits.softmax(0)
        expected = sum(weight * layer for weight, layer in zip(weights, layers, strict=True))
        torch.testing.assert_close(mixture(layers), expected, atol=1e-6, rtol=0)


# ---- sizes -----------------------------------------------------------------------------------------------------------


TEXT_SIZES = {
    "7B": {},  # the config's defaults: Vicuna-7B and CLIP ViT-L/14 at 336 pixels
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
ALL_PROJECTIONS = LORA_TARGETS


def table_on_meta(size: str, mode: str, **adapter) -> dict:
    text = {"model_type": "llama", "vocab_size": 32064, **TEXT_SIZES[size]}
    if "num_attention_heads" in text:
        text["num_key_value_heads"] = text["num_attention_heads"]
    with torch.device("meta"):
        model = PerceptionGPTForConditionalGeneration(PerceptionGPTConfig(text_config=text))
        model = add_adapter(model, mode, **adapter)
    return {part: (trainable, total) for part, trainable, total in parameter_table(model)}


@pytest.mark.parametrize("size", TEXT_SIZES)
def test_share_of_trainable_parameters(size):
    """Vicuna-7B and 13B with CLIP ViT-L/14-336: the table for ranks 8, 32 and full, and what is promised of it."""
    shares, lora = {}, {}
    for name, mode, adapter in (
        ("r8", "lora", {"rank": 8}),
        ("r32", "lora", {"rank": 32}),
        ("r32 q,v", "lora", {"rank": 32, "target_modules": ("q_proj", "v_proj")}),
        ("full", "full", {}),
    ):
        table = table_on_meta(size, mode, **adapter)
        trainable, total = table["all"]
        shares[name] = trainable / total
        lora[name] = table.get("language_model (LoRA)", (0, 0))[0]
        assert table["language_model"][1] > {"7B": 6.7e9, "13B": 12.8e9}[size] - 4e8
        if mode == "lora":
            assert table["language_model"][0] == table["vision_tower"][0] == table["lm_head"][0] == 0
            for part in TRAINED_PARTS:
                assert table[part][0] == table[part][1] > 0
        print(f"{size} {name:<8} {trainable:>15,} {total:>15,} {shares[name]:.2%}")
    hidden, middle, layers = {"7B": (4096, 11008, 32), "13B": (5120, 13824, 40)}[size]
    assert lora["r32"] == 4 * lora["r8"] == layers * 32 * (4 * 2 * hidden + 3 * (hidden + middle))
    assert lora["r32 q,v"] == layers * 32 * 2 * 2 * hidden
    assert shares["r32"] <= 0.029 and shares["r32 q,v"] <= 0.015 and shares["r8"] < shares["r32"]
    assert 0.9 < shares["full"] < 1


def test_every_signal_has_its_parts_on_the_model(model):
    built = {name for signal in SIGNALS.values() for name in signal.build_modules(model.config, 0.02)}
    assert built == set(model.model.signal_modules()) == set(SIGNAL_PARTS)
    assert not [name for name, _ in model.model.named_parameters(recurse=False)]


if __name__ == "__main__":
    unlike_worker(sys.argv[1:])
