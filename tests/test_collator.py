"""The collator: labels, seeded draws, packing, the finer mask path."""

import pickle
from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, MistralConfig

from drawn_rows import drawn_rows
from perceptiongpt.data.collator import (
    AUTO_PACK,
    IGNORED_LABEL,
    PerceptionCollator,
    answer_slots,
    group_rows_by_image,
    packing_window,
)
from perceptiongpt.data.scenes.dataset import ScenesDataset
from perceptiongpt.data.schema import row_features
from perceptiongpt.geometry_perceptiongpt import decode_mask
from perceptiongpt.signals_perceptiongpt import SIGNALS


# Drawn for the first of `drawn_rows` by the first release: runs go on with the draws that they began with.
PINNED_NOISE = [0.0004789717495441437, -0.0005439966917037964, 0.0019030645489692688, -0.00018718838691711426]


@pytest.fixture(scope="module")
def tiny(make_tiny_model):
    return make_tiny_model()


@pytest.fixture(scope="module")
def rows():
    return drawn_rows(4)


def one_row(batch: dict, index: int, slots: int) -> dict:
    """The signals of one row of a batch: flags without padding, values that are valid."""
    found = {}
    for signal in SIGNALS.values():
        valid = batch[signal.valid_name][index, :slots]
        found |= {signal.valid_name: valid, signal.read_name: batch[signal.read_name][index, :slots]}
        for name in set(signal.input_names) - set(found):
            found[name] = batch[name][index, :slots][valid] if valid.any() else None
    return found


def test_shapes_and_dtypes(tiny, rows):
    model, processor = tiny
    batch = PerceptionCollator(processor)(rows[:5])
    size = model.config.mask_config.size
    assert batch["boxes"].shape == batch["boxes_noise"].shape == (5, 4, 4)
    assert batch["boxes"].dtype == batch["boxes_noise"].dtype == torch.float32
    assert batch["masks"].shape == (5, 4, size, size) and batch["masks"].dtype == torch.uint8
    for signal in SIGNALS.values():
        for name in (signal.valid_name, signal.read_name):
            assert batch[name].shape == (5, 4) and batch[name].dtype == torch.bool
    # No row has a point: there are no values, so that nothing is computed from them.
    assert batch["points"].shape == (5, 0, 2) and not batch["points_valid"].any()
    boxes_alone = PerceptionCollator(processor)(rows[1:2])
    assert boxes_alone["boxes"].shape == (1, 1, 4) and boxes_alone["masks"].shape == (1, 0, size, size)
    assert boxes_alone["masks_valid"].shape == (1, 1)
    assert batch["pixel_values"].shape[0] == 5
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    lengths = batch["attention_mask"].sum(1)
    assert all((mask[:length] == 1).all() for mask, length in zip(batch["attention_mask"], lengths))  # right padding
    nothing = PerceptionCollator(processor)(rows[4:5])
    assert nothing["boxes"].shape == (1, 0, 4) and nothing["masks"].shape == (1, 0, size, size)


@pytest.mark.parametrize("pack", [None, 2])
def test_a_batch_without_a_signal_can_be_trained_on(make_tiny_model, rows, pack):
    """Questions, captions and dialogues alone; no signal module takes part."""
    model, processor = make_tiny_model()
    batch = PerceptionCollator(processor, model.config, pack=pack)(rows[4::5])
    assert batch["boxes"].shape[1] == batch["boxes_noise"].shape[1] == 0
    model.train()(**batch).loss.backward()
    modules = model.model.signal_modules().values()
    assert all(parameter.grad is None for module in modules for parameter in module.parameters())
    assert model.model.language_model.embed_tokens.weight.grad is not None


def test_labels_are_the_answers_alone(tiny, rows):
    _, processor = tiny
    batch = PerceptionCollator(processor)(rows[:5])
    end = processor.tokenizer.eos_token
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"]):
        supervised = labels != IGNORED_LABEL
        assert torch.equal(labels[supervised], ids[supervised])
        assert processor.tokenizer.decode(ids[supervised]).strip() == row["messages"][-1]["content"] + end
        assert not (ids[supervised] == processor.image_token_id).any()
    answers = answer_slots(batch["input_ids"], batch["labels"], processor.vis_token_id, 4)
    assert answers.int().sum(1).tolist() == [1, 1, 1, 3, 0]
    assert answers[3].tolist() == [False, True, True, True]


def test_same_row_and_epoch_draw_the_same_whatever_the_batch(tiny, rows):
    _, processor = tiny
    collator = PerceptionCollator(processor)
    together = collator(rows)
    state = torch.get_rng_state()
    for index, row in enumerate(rows):
        alone = collator([row])
        assert (torch.get_rng_state() == state).all()
        expected = one_row(alone, 0, len(row["boxes"]))
        for name, value in one_row(together, index, len(row["boxes"])).items():
            assert value is expected[name] is None or torch.equal(value, expected[name]), name
    reversed_batch = collator(rows[::-1])
    assert torch.equal(reversed_batch["boxes_noise"].flip(0), together["boxes_noise"])
    copied = pickle.loads(pickle.dumps(collator))
    assert torch.equal(copied(rows)["boxes_noise"], together["boxes_noise"])
    collator.set_epoch(1)
    assert not torch.equal(collator(rows)["boxes_noise"], together["boxes_noise"])
    collator.set_epoch(0)
    assert torch.equal(collator(rows)["boxes_noise"], together["boxes_noise"])
    other_seed = PerceptionCollator(processor, seed=1)(rows)
    assert not torch.equal(other_seed["boxes_noise"], together["boxes_noise"])
    cached = PerceptionCollator(processor, cache_rows=3)
    for _ in range(2):
        again = cached(rows)
        assert all(torch.equal(again[name], together[name]) for name in together)
    assert len(cached._cache) == 3


def test_what_is_read_is_drawn_as_asked(tiny, rows):
    _, processor = tiny
    asked = {"box": 0.5, "mask": 0.2, "both": 0.3}
    collator = PerceptionCollator(processor, read_probabilities=asked, cache_rows=5)
    drawn, jitter = Counter(), []
    for epoch in range(150):
        collator.set_epoch(epoch)
        batch = collator(rows[:4])
        box, mask = batch["boxes_read"], batch["masks_read"]
        assert box[1, 0] and not mask[1, 0]  # with one signal only, that one is read
        assert box[3, 0] and not mask[3, 0] and not batch["boxes_noise"][3, 0].any()  # the prompt's, as it is
        assert (box | mask)[batch["boxes_valid"] | batch["masks_valid"]].all()
        drawn.update(zip(box[3, 1:].tolist(), mask[3, 1:].tolist(), strict=True))
        read = batch["boxes"] + batch["boxes_noise"]
        valid = read[batch["boxes_valid"]]
        assert (valid >= 0).all() and (valid <= 1).all() and (valid[:, :2] < valid[:, 2:]).all()
        sides = (batch["boxes"][3, 1:, 2:] - batch["boxes"][3, 1:, :2]).repeat(1, 2)
        jitter.append(batch["boxes_noise"][3, 1:] / sides)
    total = sum(drawn.values())
    shares = {(True, False): "box", (False, True): "mask", (True, True): "both"}
    for key, name in shares.items():
        assert drawn[key] / total == pytest.approx(asked[name], abs=0.08)
    assert torch.cat(jitter).std().item() == pytest.approx(0.02, rel=0.15)
    evaluation = collator.for_evaluation()(rows[:4])
    assert not evaluation["boxes_noise"].any() and torch.equal(evaluation["boxes_read"], evaluation["boxes_valid"])


def test_points_are_read_as_drawn(tiny, rows):
    """With a box beside it a point is read only where that is drawn; alone, and in a prompt, always."""
    _, processor = tiny
    pointed = [
        {**rows[0], "points": [[3.0, 4.0]]},
        {**rows[1], "boxes": [None], "points": [[3.0, 4.0]]},
        {**rows[3], "boxes": [None, *rows[3]["boxes"][1:]], "points": [[5.0, 6.0], None, [7.0, 8.0], None]},
    ]
    default, asked = Counter(), Counter()
    for counter, probabilities in ((default, None), (asked, {"box": 0.5, "point+mask": 0.25, "point": 0.25})):
        collator = PerceptionCollator(processor, read_probabilities=probabilities, cache_rows=3)
        for epoch in range(60):
            collator.set_epoch(epoch)
            batch = collator(pointed)
            flags = [batch[f"{name}_read"] for name in ("boxes", "masks", "points")]
            assert [flag[1, 0].item() for flag in flags] == [False, False, True]
            assert [flag[2, 0].item() for flag in flags] == [False, False, True]
            counter.update(tuple(flag[row, slot].item() for flag in flags) for row, slot in ((0, 0), (2, 2)))
    assert set(default) == {(True, False, False), (False, True, False), (True, True, False)}
    shares = {key: count / sum(asked.values()) for key, count in asked.items()}
    assert shares[True, False, False] == pytest.approx(0.5, abs=0.15)
    assert shares[False, True, True] == pytest.approx(0.25, abs=0.15)
    assert set(shares) == {(True, False, False), (False, True, True), (False, False, True)}


def test_a_column_without_points_leaves_the_draws_alone(tiny, rows):
    _, processor = tiny
    without = [{name: value for name, value in row.items() if name != "points"} for row in rows]
    with_column, before = PerceptionCollator(processor)(rows), PerceptionCollator(processor)(without)
    assert all(torch.equal(with_column[name], before[name]) for name in before)
    assert with_column["boxes_noise"][0, 0].tolist() == pytest.approx(PINNED_NOISE, abs=1e-7)


def test_a_click_is_drawn_inside_its_object(tiny, rows):
    _, processor = tiny
    row = {
        **rows[0],
        "task": "point_to_mask",
        "messages": [
            {"role": "user", "content": "<image>What is at <vis>?"},
            {"role": "assistant", "content": "<vis>"},
        ],
        "boxes": [None, *rows[0]["boxes"]],
        "masks": [None, *rows[0]["masks"]],
        "points": [[5.5, 6.5], None],
    }
    collator, found = PerceptionCollator(processor, cache_rows=1), []
    inside = decode_mask(row["masks"][1], row["height"], row["width"])
    stored = SIGNALS["point"].parse([5.5, 6.5], row["height"], row["width"], 0)
    for epoch in range(12):
        collator.set_epoch(epoch)
        batch = collator([row])
        assert batch["points_read"].tolist() == [[True, False]] and batch["masks_valid"].tolist() == [[False, True]]
        (x, y), _ = SIGNALS["point"].present(batch["points"][0], (row["height"], row["width"]), None)[1]
        assert inside[int(y), int(x)]
        found.append((x, y))
    assert len(set(found)) > 3
    assert torch.equal(collator([row])["points"], batch["points"])
    assert collator.for_evaluation()([row])["points"][0, 0].tolist() == stored.tolist()


def test_jitter_keeps_boxes_valid_at_the_border_and_at_any_size(tiny, rows):
    _, processor = tiny
    collator = PerceptionCollator(processor, box_jitter=0.1, cache_rows=0)
    width, height = rows[0]["width"], rows[0]["height"]
    for box in ([0, 0, width, height], [0, 0, 0.01, 0.01], [width - 0.01, height - 0.01, width, height]):
        for epoch in range(20):
            collator.set_epoch(epoch)
            batch = collator([{**rows[1], "boxes": [box]}])
            read = (batch["boxes"] + batch["boxes_noise"])[0, 0]
            assert (read >= 0).all() and (read <= 1).all() and (read[:2] < read[2:]).all()


def test_a_row_that_cannot_be_is_an_error(tiny, rows):
    _, processor = tiny
    with pytest.raises(ValueError, match="max_length is 20"):
        PerceptionCollator(processor, max_length=20)(rows[:1])
    for wrong in ({"boxes": 1.0}, {"box": 0.5}, {"box+dept": 1.0}, {"box": 1.5, "mask": -0.5}, {}):
        with pytest.raises(ValueError, match="read_probabilities"):
            PerceptionCollator(processor, read_probabilities=wrong)
    with pytest.raises(ValueError, match="box_jitter"):
        PerceptionCollator(processor, box_jitter=0.5)
    prompt_only = {**rows[4], "messages": rows[4]["messages"][:1]}
    with pytest.raises(ValueError, match="supervised"):
        PerceptionCollator(processor)([prompt_only])


# ---- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_packed_equals_alone(make_tiny_model, rows, family, implementation):
    model, processor = make_tiny_model(family)
    model.set_attn_implementation({"text_config": implementation})
    packed = PerceptionCollator(processor, model.config, pack=5)(rows)
    alone = PerceptionCollator(processor)(rows)
    assert packed["input_ids"].shape[0] == packed["pixel_values"].shape[0] == 4
    assert packed["attention_mask"].shape == (4, 1, *[packed["input_ids"].shape[1]] * 2)
    losses = []
    for batch in (packed, alone):
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        gradient = model.model.multi_modal_projector.linear_1.weight.grad.clone()
        terms = [output.loss_lm, output.loss_box, output.loss_mask, output.loss_iou]
        losses.append((torch.stack(terms), gradient, output))
    torch.testing.assert_close(losses[0][0], losses[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses[0][1], losses[1][1], atol=1e-5, rtol=1e-4)
    for batch, (_, _, output) in zip((packed, alone), losses):
        supervised = batch["labels"][:, 1:] != IGNORED_LABEL
        answers = answer_slots(batch["input_ids"], batch["labels"], processor.vis_token_id, batch["boxes"].shape[1])
        batch["found"] = (
            output.logits[:, :-1][supervised],
            output.pred_boxes[answers],
            output.pred_mask_logits[answers],
        )
    for found, expected in zip(packed["found"], alone["found"], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def packed_scenes(*tasks: str) -> list[list[dict]]:
    dataset = ScenesDataset(
        6, seed=9, size=64, questions=6, tasks=tasks or None, given_by=["box", "mask", "both", "point"]
    )
    return [dataset[index] for index in range(3)]


@pytest.mark.parametrize("finer", [None, 64])
def test_packed_rows_are_encoded_at_once_as_one_by_one(make_tiny_model, monkeypatch, finer):
    model, processor = make_tiny_model(mask_image_size=finer)
    collator = PerceptionCollator(processor, model.config, pack=6)
    read = []
    count = type(processor.image_processor).__call__
    monkeypatch.setattr(type(processor.image_processor), "__call__", lambda *a, **k: read.append(1) or count(*a, **k))
    found = collator(packed_scenes())
    assert len(read) == (6 if finer else 3)  # each of three images once, at each resolution
    monkeypatch.setattr(collator, "_process_packed", lambda rows: [collator._process(row) for row in rows])
    expected = collator(packed_scenes())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_some_masks_of_a_packed_row_are_learned(tiny):
    model, processor = tiny
    rows = packed_scenes("refer", "detect", "box_to_mask")
    collator = PerceptionCollator(processor, model.config, pack=6, mask_targets=2)
    every, some = PerceptionCollator(processor, model.config, pack=6)(rows), collator(rows)
    answers = answer_slots(every["input_ids"], every["labels"], processor.vis_token_id, every["boxes"].shape[1])
    assert (every["masks_valid"] & answers).sum(1).min() > 2
    assert (some["masks_valid"] & answers).sum(1).tolist() == [2, 2, 2]
    # Prompts keep theirs, and whatever was read is still read, as what it has.
    assert torch.equal(some["masks_valid"] & ~answers, every["masks_valid"] & ~answers)
    read = [sum(batch[f"{name}_read"] for name in ("boxes", "masks", "points")) > 0 for batch in (some, every)]
    assert torch.equal(*read) and not (some["masks_read"] & ~some["masks_valid"]).any()
    collator.set_epoch(1)
    assert not torch.equal(collator(rows)["masks_valid"], some["masks_valid"])
    assert torch.equal(collator.for_evaluation()(rows)["masks_valid"], every["masks_valid"])


def test_rows_are_packed_by_picture(tiny, rows):
    model, processor = tiny
    collator = PerceptionCollator(processor, model.config, pack=2)
    assert collator(rows[:5])["input_ids"].shape[0] == 3  # 2 + 2 + 1 questions
    assert collator(rows[4:6])["input_ids"].shape[0] == 2  # two pictures
    assert collator([rows[:5]])["input_ids"].shape[0] == 1  # a list is packed as it is
    system = [{"role": "system", "content": "Look well."}, *rows[1]["messages"]]
    with pytest.raises(ValueError, match="same image"):
        collator([[rows[0], {**rows[1], "messages": system}]])


def test_grouping_covers_every_row_once(rows):
    dataset = Dataset.from_list(rows, features=row_features())
    for source in (dataset, rows):
        groups = group_rows_by_image(source, 3)
        lists = [groups[index] for index in range(len(groups))]
        assert sorted(map(len, lists)) == [2] * 4 + [3] * 4
        found = Counter((row["image_id"], str(row["messages"])) for group in lists for row in group)
        assert found == Counter((row["image_id"], str(row["messages"])) for row in rows)
        assert all(len({row["image_id"] for row in group}) == 1 for group in lists)
        assert all(row["image"] is group[0]["image"] for group in lists for row in group)
    assert groups.groups == group_rows_by_image(dataset, 3).groups
    with pytest.raises(ValueError, match="at least 1"):
        group_rows_by_image(dataset, 0)


def test_packing_is_refused_where_it_cannot_be(tiny, rows):
    model, processor = tiny
    flash = LlamaConfig()
    flash._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        PerceptionCollator(processor, flash, pack=2)
    with pytest.raises(ValueError, match="needs the model's config"):
        PerceptionCollator(processor, pack=2)
    with pytest.raises(ValueError, match="sliding window of 40"):
        PerceptionCollator(processor, MistralConfig(sliding_window=40), pack=5)(rows[:5])
    assert packing_window(MistralConfig(sliding_window=None)) is None
    assert packing_window(model.config) is None
    for wrong in (0, True, 2.5, "all"):
        with pytest.raises(ValueError, match="expected 'auto', a number"):
            PerceptionCollator(processor, model.config, pack=wrong)


def test_auto_packs_where_attention_allows_it(tiny, rows):
    model, processor = tiny
    flash = LlamaConfig()
    flash._attn_implementation = "flash_attention_2"
    assert PerceptionCollator(processor, model.config, pack="auto").pack == AUTO_PACK
    assert PerceptionCollator(processor, flash, pack="auto").pack is None
    assert PerceptionCollator(processor, MistralConfig(sliding_window=40), pack="auto").pack is None
    with pytest.raises(ValueError, match="needs the model's config"):
        PerceptionCollator(processor, pack="auto")


def test_auto_leaves_out_of_a_row_what_cannot_share_it(tiny, rows):
    model, processor = tiny
    system = {**rows[1], "messages": [{"role": "system", "content": "Look well."}, *rows[1]["messages"]]}
    group = [rows[0], system, rows[2]]
    packed = PerceptionCollator(processor, model.config, pack="auto")([group])
    assert packed["attention_mask"].ndim == 4 and len(packed["input_ids"]) == len(packed["pixel_values"]) == 2
    losses = [model(**batch).loss for batch in (packed, PerceptionCollator(processor)(group))]
    torch.testing.assert_close(*losses)


def test_rows_that_share_no_image_have_a_plain_mask(tiny, rows):
    model, processor = tiny
    found = PerceptionCollator(processor, model.config, pack="auto")(rows[::5])
    expected = PerceptionCollator(processor)(rows[::5])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# ---- finer mask path -------------------------------------------------------------------------------------------------


def test_fine_pictures_only_where_a_mask_is_wanted(make_tiny_model, rows):
    model, processor = make_tiny_model(mask_image_size=64)
    batch = PerceptionCollator(processor)(rows[:5])
    assert batch["mask_image_index"].tolist() == [0, -1, 1, 2, -1]
    assert batch["mask_pixel_values"].shape[0] == 3
    found = model(**batch)
    fine = [processor.image_processor(rows[0]["image"], size={"height": 64, "width": 64}, return_tensors="pt")] * 5
    everything = {key: value for key, value in batch.items() if key != "mask_image_index"}
    everything["mask_pixel_values"] = torch.cat([picture["pixel_values"] for picture in fine])
    torch.testing.assert_close(found.loss_mask, model(**everything).loss_mask)
    without = PerceptionCollator(processor)([rows[1], rows[4]])
    assert "mask_pixel_values" not in without and "mask_image_index" not in without
    assert torch.isfinite(model(**without).loss)
