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


@pytest.fixture(scope="module")
def whole():
    """A model that decodes in crops, and what it answers in one call."""
    model, (inputs, _) = looking_model(look_frame="crop"), looking_batch()
    return model, inputs, run(model, inputs)


@pytest.mark.parametrize("cut", range(1, 9))
def test_continuing_after_every_cut(whole, cut):
    """Also right after `<vis>`, `<look>` and `</look>`, which nothing has read yet."""
    model, inputs, expected = whole
    length = inputs["input_ids"].shape[1]
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


def test_an_object_behind_a_look_is_decoded_in_its_crop():
    inputs, _ = looking_batch()
    output = run(looking_model(look_frame="crop"), inputs)
    whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
    for row, slots in enumerate(((1,), (1,), (1, 2), (), ())):
        for slot in range(int(output.object_valid[row].sum())):
            frame, box = output.object_frames[row, slot], output.boxes[row, slot]
            if slot not in slots:
                assert torch.equal(frame, whole)
                continue
            assert (frame[2:] - frame[:2]).max() < 0.95
            assert (box[:2] >= frame[:2] - 1e-6).all() and (box[2:] <= frame[2:] + 1e-6).all()
    assert run(looking_model(), inputs).object_frames.sub(whole).abs().max() == 0


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.5}])
def test_no_looks_are_those_of_a_model_that_cannot(sampling):
    inputs, _ = looking_batch()
    model, plain = looking_model(look_frame="crop"), looking_model(look_max=0)
    only_plain = {name: value for name, value in inputs.items() if not name.startswith("look_")}
    torch.manual_seed(0)
    expected = run(plain, only_plain, logits_processor=[], suppress_tokens=[LOOK, LOOK_END, LOOK_PAD], **sampling)
    for given in (inputs, only_plain):
        torch.manual_seed(0)
        output = run(model, given, logits_processor=[], max_looks=0, **sampling)
        assert torch.equal(output.sequences, expected.sequences)
        for first, second in zip(output.logits, expected.logits, strict=True):
            assert torch.equal(first, second)
        for name in RESULTS:
            assert torch.equal(output[name], expected[name])
        assert output.look_positions is None and output.object_frames is None


def test_fewer_looks_than_the_script_asks_for(model):
    inputs, _ = looking_batch()
    output = run(model, inputs, max_looks=1)
    assert tuple((output.look_positions >= 0).sum(1).tolist()) == (1, 1, 1, 0, 0)
    check_replay(model, inputs, output)


def test_the_bias_is_the_knob():
    model, (inputs, _) = looking_model(), looking_batch()
    scripts = [(VIS, 0, 0, VIS)] * 5

    class AfterVis(Scripted):
        """Leaves `<look>` to the model."""

        def __call__(self, input_ids, scores):
            given = scores[:, LOOK].clone()
            scores = super().__call__(input_ids, scores)
            scores[:, LOOK] = given
            return scores

    def looks(bias):
        processors = [AfterVis(inputs["input_ids"].shape[1], scripts)]
        output = run(model, inputs, look_bias=bias, logits_processor=processors, max_new_tokens=6)
        return int((output.look_positions >= 0).sum())

    assert looks(-1e3) == 0 and looks(1e3) == 8  # two in each row, but the one without an image


def test_a_changed_crop_changes_only_what_follows(model):
    inputs, _ = looking_batch()
    output = run(model, inputs)
    forwards = []
    for change in (None, lambda crop: crop.flip(-1) + 1):
        forward_inputs, places = teacher_forced(model, inputs, output, change)
        with torch.no_grad():
            forwards.append(model(**forward_inputs))
    first, second = (forward.logits for forward in forwards)
    for row, looks in enumerate(output.look_positions.tolist()):
        start = int((inputs["attention_mask"][row] == 0).sum())
        steps = [places[row][look - start] for look in looks if look >= 0]
        seen = forward_inputs["attention_mask"][row].bool()
        if not steps:
            assert torch.equal(first[row][seen], second[row][seen])
            continue
        torch.testing.assert_close(first[row, : steps[0] + 1], second[row, : steps[0] + 1], atol=1e-6, rtol=0)
        assert (first[row] - second[row])[seen][steps[0] + 1 :].abs().amax(-1).min() > 10 * TOLERANCE
        slots = (inputs["input_ids"][row] == VIS).sum()  # the first `<vis>` of the answer is predicted before any look
        boxes = [forward.pred_boxes[row] for forward in forwards]
        torch.testing.assert_close(boxes[0][: slots + 1], boxes[1][: slots + 1], atol=1e-6, rtol=0)
        assert (boxes[0][slots + 1] - boxes[1][slots + 1]).abs().max() > 10 * TOLERANCE


def test_returned_samples_look_by_themselves(model):
    _, singles = looking_batch()
    inputs = singles[2]
    torch.manual_seed(0)
    script = [Scripted(inputs["input_ids"].shape[1], SCRIPT[2:3] + ((VIS, LOOK, 0, VIS, 9),), repeat=1)]
    output = run(model, inputs, do_sample=True, num_return_sequences=2, logits_processor=script)
    assert (output.look_positions >= 0).sum(1).tolist() == [2, 1]
    repeated = {
        name: value.repeat_interleave(2, dim=0)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and name not in ("pixel_values", "look_image_stats")
    }
    repeated |= {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1), "look_images": inputs["look_images"] * 2}
    check_replay(model, repeated, output)


def test_a_shared_prefix_gives_the_same_looks(model):
    _, singles = looking_batch()
    inputs = singles[0]
    prefix = model.encode_prefix(**inputs)
    without_pixels = {name: value for name, value in inputs.items() if name not in ("pixel_values", "look_images")}
    for given in (inputs, without_pixels):
        output = run(model, given, scripts=SCRIPT[:1], prefix=prefix)
        check_same(run(model, inputs, scripts=SCRIPT[:1]), output)
    # Where the sequences that came back stand in the cache is known to the next call.
    ids = output.sequences
    script = [Scripted(output.past_key_values.get_seq_length() + 1, ((VIS, 7),))]
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    second = run(model, more, past_key_values=output.past_key_values, logits_processor=script, max_new_tokens=3)
    whole = run(model, inputs, scripts=(SCRIPT[0] + (0,) * 4 + (VIS, 7),), max_new_tokens=13)
    assert torch.equal(whole.sequences, second.sequences)
    torch.testing.assert_close(second.boxes[0, 0], whole.boxes[0, int(whole.object_valid.sum()) - 1])


def test_a_crop_of_nearly_the_whole_image_is_not_read():
    model, (inputs, _) = looking_model(look_min_side=1000, look_frame="crop"), looking_batch()
    output = run(model, inputs)
    assert tuple((output.look_positions >= 0).sum(1).tolist()) == LOOKS
    assert output.look_crops.abs().sum() == 0 and output.object_frames is None
    check_replay(model, inputs, output)


def test_after_ground_a_row_may_look():
    model, (_, singles) = looking_model(look_frame="crop"), looking_batch()
    inputs = singles[0]
    with torch.no_grad():
        model.lm_head.weight[VIS] = 3 * model.lm_head.weight.abs().max()  # the likeliest token in half of all states
        first = model(**{name: value for name, value in inputs.items() if not name.startswith("look_")})
        model.lm_head.weight[VIS] *= first.last_hidden_state[0, -1].sum().sign()
    grounded = model.ground(**inputs)
    assert grounded.sequences[0, -1] == VIS
    ids = grounded.sequences
    script = [Scripted(ids.shape[1], ((LOOK, 0, VIS),))]
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = run(model, more, past_key_values=grounded.past_key_values, logits_processor=script, max_new_tokens=5)
    expected = run(model, inputs, scripts=((VIS, LOOK, 0, VIS),), max_new_tokens=6)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.look_boxes, expected.look_boxes)
    torch.testing.assert_close(output.boxes[0, 0], expected.boxes[0, 1])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"num_beams": 2}, "beams.*max_looks=0"),
        ({"use_cache": False}, "use_cache.*max_looks=0"),
        ({"synced_gpus": True}, "synced_gpus.*max_looks=0"),
        ({"max_looks": 3}, "max_looks.*0 to 2"),
        ({"max_looks": -1}, "max_looks"),
        ({"look_images": None}, "look_images.*missing"),
        ({"look_images": []}, "look_images.*0 images"),
        ({"look_image_stats": None}, "look_image_stats"),
    ],
)
def test_what_cannot_look_is_refused(kwargs, message):
    inputs, _ = looking_batch()
    model = looking_model()
    with pytest.raises(ValueError, match=message):
        run(model, inputs | {name: kwargs[name] for name in kwargs if name in inputs}, **{
            name: value for name, value in kwargs.items() if name not in inputs
        })  # fmt: skip


def test_beams_and_no_cache_answer_without_looks():
    model, (inputs, _) = looking_model(), looking_batch()
    for kwargs in ({"num_beams": 2}, {"use_cache": False}):
        output = run(model, inputs, max_looks=0, logits_processor=[], **kwargs)
        assert not torch.isin(
            output.sequences[:, output.prompt_length :], torch.tensor([LOOK, LOOK_END, LOOK_PAD])
        ).any()


def test_sliding_windows_look_one_row_at_a_time():
    text = {"model_type": "mistral", "sliding_window": 4}
    model, (batch, singles) = looking_model(text=text), looking_batch()
    with pytest.raises(ValueError, match="sliding-window.*one row at a time"):
        run(model, batch)
    check_replay(model, singles[0], run(model, singles[0], scripts=SCRIPT[:1]))


def test_a_full_static_cache_says_so():
    from transformers import StaticCache

    model, (_, singles) = looking_model(), looking_batch()
    inputs = singles[0]
    length = inputs["input_ids"].shape[1] + 5
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    with pytest.raises(ValueError, match=f"of {length} tokens, and a look takes 5"):
        run(model, inputs, scripts=SCRIPT[:1], past_key_values=cache, max_new_tokens=5)


def test_text_behind_a_look_that_was_not_read_is_refused(whole):
    model, inputs, _ = whole
    first = run(model, inputs, max_new_tokens=2)  # the first row has just asked for a look
    ids = torch.cat([first.sequences, torch.full((5, 2), 9)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(5, 4, dtype=torch.long)], dim=1)
    with pytest.raises(ValueError, match="Row 0: the last call ended with a look"):
        run(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)
    with pytest.raises(ValueError, match="look_bias"):
        looking_model(look_max=0).generate(inputs["input_ids"][:1], look_bias=1.0, max_new_tokens=1)
