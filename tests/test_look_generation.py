"""Looking again in one call of `generate`: what it returns is what one forward with the crops that it chose gives."""

import pytest
import torch
from look_rows import LOOK, LOOK_END, LOOK_PAD, SCRIPT, Scripted, looking_batch, looking_model, run, teacher_forced

from perceptiongpt.geometry_perceptiongpt import boxes_from_square
from perceptiongpt.look_geometry_perceptiongpt import look_crop
from perceptiongpt.signals_perceptiongpt import SIGNALS
from rows import VIS


TOLERANCE = 1e-4
RESULTS = [name for signal in SIGNALS.values() for name in signal.result_names]
LOOKS = (1, 1, 2, 0, 0)  # of each row of the script


@pytest.fixture(scope="module", params=["image", "crop"])
def model(request):
    return looking_model(look_frame=request.param)


def check_replay(model, inputs, output):
    """One forward over what was generated gives the same logits, values and scores."""
    forward_inputs, places = teacher_forced(model, inputs, output)
    with torch.no_grad():
        forward = model(**forward_inputs)
    prompt_slots = (inputs["input_ids"] == VIS).sum(1).tolist()
    for row, place in enumerate(places):
        start = int((inputs["attention_mask"][row] == 0).sum())
        for step, logits in enumerate(output.logits):
            at = place[output.prompt_length - start + step] - 1
            torch.testing.assert_close(logits[row], forward.logits[row, at], atol=TOLERANCE, rtol=TOLERANCE)
        seen = output.object_valid[row]
        pick = slice(prompt_slots[row], prompt_slots[row] + int(seen.sum()))
        for signal in SIGNALS.values():
            values, scores = (output[name][row][seen] for name in signal.result_names)
            expected, quality = (forward[name][row, pick] for name in signal.prediction_names)
            torch.testing.assert_close(values, expected, atol=TOLERANCE, rtol=TOLERANCE)
            steps = output.positions[row][seen] - output.prompt_length
            p = torch.stack(output.logits)[steps, row].softmax(-1)[:, VIS]
            torch.testing.assert_close(scores, p * quality, atol=TOLERANCE, rtol=0)
    return forward


def check_same(first, second):
    assert torch.equal(first.sequences, second.sequences)
    for name in ("look_positions", "look_crops", "object_valid"):
        assert torch.equal(first[name], second[name])
    for name in RESULTS:
        seen = first.object_valid
        torch.testing.assert_close(first[name][seen], second[name][seen], atol=TOLERANCE, rtol=TOLERANCE)


def test_rows_look_as_their_scripts_say(model):
    inputs, _ = looking_batch()
    output = run(model, inputs)
    assert tuple((output.look_positions >= 0).sum(1).tolist()) == LOOKS
    for row, script in enumerate(SCRIPT):
        answer = output.sequences[row, output.prompt_length :].tolist()
        for step, token in enumerate(script):
            if token and not (token == LOOK and not LOOKS[row]):
                assert answer[step] == token
        # Only what is allowed is ever written: no pads, each look behind a `<vis>`, each end behind a look.
        assert LOOK_PAD not in answer
        for before, token in zip([0, *answer], answer):
            assert token != LOOK or before == VIS
            assert (token == LOOK_END) == (before == LOOK)


def test_generation_equals_teacher_forcing(model):
    inputs, _ = looking_batch()
    output = run(model, inputs)
    check_replay(model, inputs, output)
    images = (0, 1, 3)
    for row, image in enumerate(images):
        height, width = inputs["look_images"][image].shape[1:]
        for box, crop in zip(output.look_boxes[row][: LOOKS[row]], output.look_crops[row].tolist()):
            pixels = boxes_from_square(box, height, width)
            expected = look_crop(pixels, height, width, model.config.look_margin, model.config.look_min_side)
            assert tuple(crop) == expected
    # The box that a look is at is that of the `<vis>` before it.
    torch.testing.assert_close(output.look_boxes[0, 0], output.boxes[0, 0])
    torch.testing.assert_close(output.look_boxes[2, 1], output.boxes[2, 1])


def test_samples_equal_teacher_forcing(model):
    inputs, _ = looking_batch()
    torch.manual_seed(2)
    output = run(model, inputs, do_sample=True, temperature=0.8)
    check_replay(model, inputs, output)


@pytest.mark.parametrize("padding", [0, 3])
def test_a_mixed_batch_equals_its_rows_alone(model, padding):
    batch, singles = looking_batch(padding)
    together = run(model, batch)
    for row, inputs in enumerate(singles):
        alone = run(model, inputs, scripts=SCRIPT[row : row + 1])
        answers = (together.sequences[row, together.prompt_length :], alone.sequences[0, alone.prompt_length :])
        assert torch.equal(*answers)
        number = alone.look_crops.shape[1]
        assert torch.equal(together.look_crops[row, :number], alone.look_crops[0])
        seen = together.object_valid[row]
        for name in RESULTS:
            torch.testing.assert_close(together[name][row][seen], alone[name][0], atol=TOLERANCE, rtol=TOLERANCE)
        for step, logits in enumerate(together.logits):
            torch.testing.assert_close(logits[row], alone.logits[step][0], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_static_cache_equals_the_dynamic_one(model):
    inputs, _ = looking_batch()
    check_same(run(model, inputs), run(model, inputs, cache_implementation="static"))


@pytest.mark.parametrize("cut", range(1, 10))
def test_continuing_after_every_cut(model, cut):
    """Also right after `<vis>`, `<look>` and `</look>`, which nothing has read yet."""
    inputs, _ = looking_batch()
    length = inputs["input_ids"].shape[1]
    expected = run(model, inputs)
    first = run(model, inputs, max_new_tokens=cut)
    new = {
        "input_ids": first.sequences,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(5, cut, dtype=torch.long)], 1),
    }
    script = [Scripted(first.past_key_values.get_seq_length() + 1, start=cut)]
    second = run(model, new, past_key_values=first.past_key_values, max_new_tokens=10 - cut, logits_processor=script)
    assert torch.equal(expected.sequences, second.sequences)
    for step, logits in enumerate(second.logits):
        torch.testing.assert_close(logits, expected.logits[cut + step], atol=TOLERANCE, rtol=TOLERANCE)
    for row in range(5):
        late = expected.object_valid[row] & (expected.positions[row] >= length + cut)
        seen = second.object_valid[row]
        for name in RESULTS:
            torch.testing.assert_close(
                expected[name][row][late], second[name][row][seen], atol=TOLERANCE, rtol=TOLERANCE
            )
    looks = (first.look_positions >= 0).sum() + (second.look_positions >= 0).sum()
    assert looks == sum(LOOKS)
