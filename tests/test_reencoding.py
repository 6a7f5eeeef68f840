"""Encoding an image again: what it is at first, in the middle of `generate`, and in training."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from look_rows import LOOK, REENC, Scripted, looking_batch, looking_model, run, teacher_forced

from drawn_rows import drawn_rows
from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt.data.collator import IGNORED_LABEL, PerceptionCollator
from perceptiongpt.data.schema import validate_row
from perceptiongpt.reencoding_perceptiongpt import pool
from perceptiongpt.training.adapters import add_adapter
from rows import VIS, tiny_config


TOLERANCE = 1e-4
QUERIES = 4
# Alone, beside a look in the same step, behind a look, where there is no image, and not at all.
SCRIPT = (
    (8, REENC, 9, VIS),
    (VIS, LOOK, 0, REENC, VIS),
    (REENC, VIS, LOOK, 0, VIS),
    (4, REENC, 5, 6),
    (6, VIS, 8, 9),
)


def reencoding_model(projector: str = "film", **kwargs):
    """A model whose re-encoder is no longer what it was at first."""
    settings = {"reenc_queries": QUERIES, "reenc_projector": projector, "look_frame": "crop", "look_tokens": 9}
    model = looking_model(**{**settings, **kwargs})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.model.reencoder.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.fixture(scope="module", params=["film", "paper"])
def model(request):
    return reencoding_model(request.param)


def test_at_first_it_is_the_image_pooled():
    model = looking_model(reenc_queries=QUERIES)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        layers = model.get_image_features(pixels, return_dict=True).layers
        again = model.reencode(torch.randn(2, 48), layers)
        pooled = model.get_look_features(pixels).pooler_output
    torch.testing.assert_close(again, pooled, atol=1e-5, rtol=1e-5)


def test_it_depends_on_the_state_and_the_image(model):
    pixels, states = torch.randn(2, 3, 32, 32), torch.randn(2, 48)
    with torch.no_grad():
        layers = model.get_image_features(pixels, return_dict=True).layers
        first = model.reencode(states, layers)
        assert first.shape == (2, QUERIES, 48)
        assert (first - model.reencode(states.flip(0), layers)).abs().max() > 1e-2
        assert (first - model.reencode(states, tuple(layer.flip(0) for layer in layers))).abs().max() > 1e-2


def test_the_papers_projector_is_a_map_of_rank_one_beside_the_identity():
    model = reencoding_model("paper")
    encoder = model.model.reencoder
    with torch.no_grad():
        layers = model.get_image_features(torch.randn(1, 3, 32, 32), return_dict=True).layers
        found = model.reencode(torch.randn(1, 48), layers)
        features = encoder.feature_proj(encoder.feature_norm(pool(layers[0], 2)))
    assert torch.linalg.matrix_rank((found - features)[0], atol=1e-4) == 1


def check_replay(model, inputs, output):
    forward_inputs, places = teacher_forced(model, inputs, output)
    with torch.no_grad():
        forward = model(**forward_inputs)
    for row, place in enumerate(places):
        start = int((inputs["attention_mask"][row] == 0).sum())
        for step, logits in enumerate(output.logits):
            at = place[output.prompt_length - start + step] - 1
            torch.testing.assert_close(logits[row], forward.logits[row, at], atol=TOLERANCE, rtol=TOLERANCE)
        seen = output.object_valid[row]
        slots = int((inputs["input_ids"][row] == VIS).sum())
        pick = slice(slots, slots + int(seen.sum()))
        for name, expected in (("boxes", "pred_boxes"), ("mask_logits", "pred_mask_logits")):
            values = output[name][row][seen], forward[expected][row, pick]
            torch.testing.assert_close(*values, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_equals_teacher_forcing(model, cache):
    inputs, _ = looking_batch()
    output = run(model, inputs, SCRIPT, cache_implementation=cache)
    answers = output.sequences[:, output.prompt_length :]
    assert (answers == REENC).sum(1).tolist() == [1, 1, 1, 0, 0]
    assert (output.look_positions >= 0).sum(1).tolist() == [1, 2, 2, 0, 0]
    assert output.look_boxes[0, 0].tolist() == [0, 0, 1, 1] and not output.look_crops[0].any()
    check_replay(model, inputs, output)


def test_a_mixed_batch_equals_its_rows_alone(model):
    batch, singles = looking_batch()
    together = run(model, batch, SCRIPT)
    for row, inputs in enumerate(singles):
        alone = run(model, inputs, SCRIPT[row : row + 1])
        for step, logits in enumerate(together.logits):
            torch.testing.assert_close(logits[row], alone.logits[step][0], atol=TOLERANCE, rtol=TOLERANCE)


def test_continuing_right_behind_it():
    model, (inputs, _) = reencoding_model(), looking_batch()
    expected = run(model, inputs, SCRIPT)
    for cut in (1, 2, 4):
        first = run(model, inputs, SCRIPT, max_new_tokens=cut)
        more = torch.ones(5, cut, dtype=torch.long)
        new = {"input_ids": first.sequences, "attention_mask": torch.cat([inputs["attention_mask"], more], 1)}
        script = [Scripted(first.past_key_values.get_seq_length() + 1, SCRIPT, start=cut)]
        kwargs = {"past_key_values": first.past_key_values, "max_new_tokens": 10 - cut}
        second = run(model, new, logits_processor=script, **kwargs)
        assert torch.equal(second.sequences, expected.sequences)
        for step, logits in enumerate(second.logits):
            torch.testing.assert_close(logits, expected.logits[cut + step], atol=TOLERANCE, rtol=TOLERANCE)


def test_it_is_one_of_the_looks():
    model, (inputs, _) = reencoding_model(), looking_batch()
    output = run(model, inputs, ((REENC, REENC, 8, REENC), (VIS, LOOK, 0, REENC)) + SCRIPT[2:], max_looks=1)
    answers = output.sequences[:, output.prompt_length :]
    assert (answers == REENC).sum(1).tolist() == [1, 0, 1, 0, 0]
    assert not (run(model, inputs, SCRIPT, max_looks=0).sequences == REENC).any()


@pytest.mark.parametrize("wrong", [{"reenc_queries": 3}, {"reenc_queries": -4}, {"reenc_projector": "other"}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(StrictDataclassError, match="reenc"):
        tiny_config(look_max=1, **wrong)
    with pytest.raises(StrictDataclassError, match="look_max"):
        tiny_config(reenc_queries=4)


# ---- training --------------------------------------------------------------------------------------------------------


def reencoding_rows() -> list[dict]:
    refer, second, *_ = drawn_rows(1)
    refer = {**refer, "task": "dialogue"}
    refer["messages"] = [refer["messages"][0], {"role": "assistant", "content": "<reenc>It is <vis>"}]
    return [refer, second]


@pytest.fixture(scope="module", params=["film", "paper"])
def parts(request, make_tiny_model):
    return make_tiny_model(look_max=1, look_tokens=4, reenc_queries=QUERIES, reenc_projector=request.param)


def test_a_row_trains_all_of_it(parts):
    model, processor = parts
    for row in reencoding_rows():
        validate_row(row)
    batch = PerceptionCollator(processor, model.config)(reencoding_rows())
    ids, token = batch["input_ids"], model.config.reenc_token_id
    assert (ids == token).sum(1).tolist() == [1 + QUERIES, 0]
    assert (batch["labels"][ids == token] != IGNORED_LABEL).sum() == 1
    model.train()
    for _ in range(2):  # what starts at zero lets a gradient through after a step
        model.zero_grad()
        model(**batch).loss.backward()
        with torch.no_grad():
            for parameter in model.model.reencoder.parameters():
                parameter -= 0.1 * parameter.grad
    for name, parameter in model.model.reencoder.named_parameters():
        assert name == "k_proj.bias" or parameter.grad.abs().max() > 0, name
    assert model.get_input_embeddings().weight.grad[token].abs().max() > 0
    assert model.lm_head.weight.grad[token].abs().max() > 0
    model.eval()
    model.zero_grad()
    with pytest.raises(ValueError, match="cannot be packed"):
        PerceptionCollator(processor, model.config, pack=2)(reencoding_rows())
    packed = PerceptionCollator(processor, model.config, pack="auto")(reencoding_rows())
    assert len(packed["input_ids"]) == 2


def test_what_cannot_be_encoded_again_is_refused(parts):
    model, processor = parts
    batch = PerceptionCollator(processor, model.config).for_evaluation()(reencoding_rows())
    without = {name: value for name, value in batch.items() if name not in ("pixel_values", "labels")}
    without["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, 5)
    with pytest.raises(ValueError, match="image before it"):
        model(**without)
    twice = {**batch, "input_ids": batch["input_ids"].clone()}
    twice["input_ids"][0, 1] = model.config.reenc_token_id
    with pytest.raises(ValueError, match="more than once"):
        model(**twice)


def test_it_is_saved_and_trained_by_adapters(parts, tmp_path):
    model, processor = parts
    for part in parts:
        part.save_pretrained(tmp_path)
    again = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert PerceptionGPTProcessor.from_pretrained(tmp_path).reenc_queries == QUERIES
    batch = PerceptionCollator(processor, model.config).for_evaluation()(reencoding_rows())
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).loss, model(**batch).loss)
    adapted = add_adapter(again, "lora", rank=2)
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("reencoder" in name for name in names)
    adapted(**batch).loss.backward()
