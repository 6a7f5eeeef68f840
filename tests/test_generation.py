"""The closed loop: what `generate` returns is what one forward over the finished sequences gives."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer, TextStreamer

from perceptiongpt.signals_perceptiongpt import SIGNALS
from rows import GRID_TOKENS, IMAGE, VIS, ForcedVis, batch_and_singles, tiny_model


TOLERANCE = 1e-4
STEPS = (1, 3, 4, 7)
RESULTS = [name for signal in SIGNALS.values() for name in signal.result_names]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def run(model, inputs, steps=STEPS, **kwargs):
    prompt_length = inputs["input_ids"].shape[1]
    kwargs = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True} | kwargs
    kwargs.setdefault("logits_processor", [ForcedVis(prompt_length, steps)])
    return model.generate(**inputs, **kwargs)


def replay(model, inputs, output, sequences_per_row=1):
    """One forward over the finished sequences, the decoded boxes given as input; predictions at the emitted `<vis>`."""
    new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    prompt_slots = inputs["input_ids"].eq(VIS).sum(1).repeat_interleave(sequences_per_row)
    per_row = {k: v for k, v in inputs.items() if k != "pixel_values"}
    expanded = {name: value.repeat_interleave(sequences_per_row, dim=0) for name, value in per_row.items()}
    count, new_slots = len(output.sequences), output.boxes.shape[1]
    signals = {
        name: torch.cat([value, value.new_zeros(count, new_slots, *value.shape[2:])], dim=1)
        for name, value in expanded.items()
        if name.startswith(("boxes", "masks", "points"))
    }
    for index, start in enumerate(prompt_slots.tolist()):
        number = int(output.object_valid[index].sum())
        signals["boxes"][index, start : start + number] = output.boxes[index, :number]
        signals["boxes_valid"][index, start : start + number] = True
    pictures = inputs.get("pixel_values")
    if pictures is not None and sequences_per_row > 1:
        images = inputs["input_ids"].eq(IMAGE).sum(1) // GRID_TOKENS
        groups = pictures.split(images.tolist())
        pictures = torch.cat([group for group in groups for _ in range(sequences_per_row)])
    ones = expanded["attention_mask"].new_ones(count, new)
    with torch.no_grad():
        forward = model(
            input_ids=output.sequences,
            attention_mask=torch.cat([expanded["attention_mask"], ones], dim=1),
            pixel_values=pictures,
            **signals,
        )
    picks = [slice(start, start + int(v.sum())) for start, v in zip(prompt_slots.tolist(), output.object_valid)]
    probabilities = forward.logits.softmax(-1)
    for index, pick in enumerate(picks):
        seen = output.object_valid[index]
        positions = output.positions[index][seen]
        torch.testing.assert_close(output.boxes[index][seen], forward.pred_boxes[index, pick], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(
            output.mask_logits[index][seen], forward.pred_mask_logits[index, pick], atol=TOLERANCE, rtol=TOLERANCE
        )
        p = probabilities[index, positions - 1, VIS]
        torch.testing.assert_close(output.points[index][seen], forward.pred_points[index, pick], atol=TOLERANCE, rtol=0)
        for signal in SIGNALS.values():
            expected = p * forward[signal.prediction_names[1]][index, pick]
            torch.testing.assert_close(output[signal.result_names[1]][index][seen], expected, atol=TOLERANCE, rtol=0)
    return forward


def check_same(first, second):
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.object_valid, second.object_valid)
    seen = first.object_valid
    for name in RESULTS:
        torch.testing.assert_close(first[name][seen], second[name][seen], atol=TOLERANCE, rtol=TOLERANCE)


def test_cached_equals_uncached(model):
    inputs, _ = batch_and_singles()
    check_same(run(model, inputs), run(model, inputs, use_cache=False))


def test_boxes_are_fed_back(model, monkeypatch):
    """The loop is what the other tests say it is: with another box read back, the answers change."""
    inputs, _ = batch_and_singles()
    expected = run(model, inputs)
    feed_back = model.model.feed_back
    monkeypatch.setattr(model.model, "feed_back", lambda states: -feed_back(states))
    changed = run(model, inputs)
    assert torch.allclose(expected.boxes[:, 0], changed.boxes[:, 0])
    assert (expected.boxes[:, 1:] - changed.boxes[:, 1:]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("padding", [0, 3])
def test_batch_of_unlike_rows_equals_each_alone(model, padding):
    batch, singles = batch_and_singles(padding)
    together = run(model, batch)
    for index, inputs in enumerate(singles):
        alone = run(model, inputs)
        assert torch.equal(
            together.sequences[index, batch["input_ids"].shape[1] :], alone.sequences[0, alone.prompt_length :]
        )
        seen = together.object_valid[index]
        for name in RESULTS:
            torch.testing.assert_close(together[name][index][seen], alone[name][0], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.7, "top_k": 20}])
def test_generation_equals_teacher_forcing(model, sampling, use_cache):
    inputs, _ = batch_and_singles()
    torch.manual_seed(1)
    output = run(model, inputs, use_cache=use_cache, **sampling)
    assert output.object_valid.sum() >= 2 * len(inputs["input_ids"])
    replay(model, inputs, output)


def test_returned_samples_equal_teacher_forcing(model):
    inputs, _ = batch_and_singles()
    torch.manual_seed(1)
    output = run(model, inputs, do_sample=True, num_return_sequences=3)
    assert len(output.sequences) == 15
    replay(model, inputs, output, sequences_per_row=3)


def beams(model, inputs):
    return run(model, inputs, num_beams=4, num_return_sequences=3)


def test_each_returned_beam_equals_its_replay(model):
    inputs, _ = batch_and_singles()
    output = beams(model, inputs)
    assert output.object_valid.any(1).all() and len(output.sequences.unique(dim=0)) > 10
    replay(model, inputs, output, sequences_per_row=3)


def test_beams_need_the_reordering(model, monkeypatch):
    inputs, _ = batch_and_singles()
    monkeypatch.setattr("perceptiongpt.generation_perceptiongpt.SignalState.reorder", lambda self, beam_idx: None)
    output = beams(model, inputs)
    with pytest.raises(AssertionError, match="not close"):
        replay(model, inputs, output, sequences_per_row=3)


@pytest.mark.parametrize("kind", ["static", "own_static", "own_dynamic"])
def test_other_caches_equal_the_dynamic_one(model, kind):
    inputs, _ = batch_and_singles()
    expected = run(model, inputs)
    if kind == "static":
        check_same(expected, run(model, inputs, cache_implementation="static"))
    else:
        config = model.config.get_text_config(decoder=True)
        cache = DynamicCache(config=config) if kind == "own_dynamic" else StaticCache(config=config, max_cache_len=96)
        check_same(expected, run(model, inputs, past_key_values=cache))


@pytest.mark.parametrize("full_prompt", [True, False])
@pytest.mark.parametrize("cut", range(1, 10))
def test_continuing_after_every_cut(model, cut, full_prompt):
    """Also right after a `<vis>`, whose box nothing has read yet; with the whole text given again or its end alone."""
    inputs, _ = batch_and_singles()
    prompt_length = inputs["input_ids"].shape[1]
    expected = run(model, inputs)
    first = run(model, inputs, max_new_tokens=cut)
    cache = first.past_key_values
    new = {
        "input_ids": first.sequences if full_prompt else first.sequences[:, cache.get_seq_length() :],
        "attention_mask": torch.cat(
            [inputs["attention_mask"], torch.ones(len(first.sequences), cut, dtype=torch.long)], 1
        ),
    }
    steps = tuple(step - cut + (0 if full_prompt else 0) for step in STEPS)
    shown = new["input_ids"].shape[1]
    second = model.generate(
        **new,
        past_key_values=cache,
        max_new_tokens=10 - cut,
        do_sample=False,
        return_dict_in_generate=True,
        logits_processor=[ShiftedVis(shown, steps, cut)],
    )
    assert torch.equal(expected.sequences[:, prompt_length + cut :], second.sequences[:, second.prompt_length :])
    for index in range(len(expected.sequences)):
        late = expected.object_valid[index] & (expected.positions[index] >= prompt_length + cut)
        seen = second.object_valid[index]
        for name in RESULTS:
            torch.testing.assert_close(
                expected[name][index][late], second[name][index][seen], atol=TOLERANCE, rtol=TOLERANCE
            )


class ShiftedVis(ForcedVis):
    """`ForcedVis` of a generation that started `cut` tokens earlier."""

    def __init__(self, prompt_length, steps, cut):
        super().__init__(prompt_length, tuple(step + cut for step in steps))
        self.cut = cut

    def __call__(self, input_ids, scores):
        self.prompt_length -= self.cut
        scores = super().__call__(input_ids, scores)
        self.prompt_length += self.cut
        return scores


def test_static_cache_generation_compiles_in_one_graph():
    model = tiny_model()
    inputs, _ = batch_and_singles()
    expected = run(model, inputs, max_new_tokens=4)
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    check_same(expected, run(model, inputs, max_new_tokens=4, cache_implementation="static"))


def test_new_text_with_its_own_signals_after_an_answer(model):
    """A second question over the same cache: only its own text and box are given, the picture is found in the state."""
    _, singles = batch_and_singles()
    inputs = singles[0]
    first = run(model, inputs, max_new_tokens=5, steps=(1, 4))
    assert first.sequences[0, -1] == VIS
    question = torch.tensor([[20, VIS, 21]])
    ids = torch.cat([first.sequences, question], dim=1)
    box = torch.tensor([[[0.2, 0.1, 0.7, 0.3]]])
    second = run(
        model,
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "boxes": box},
        past_key_values=first.past_key_values,
        steps=(1,),
    )
    boxes = torch.cat([inputs["boxes"], first.boxes, box, second.boxes], dim=1)
    with torch.no_grad():
        forward = model(input_ids=second.sequences, pixel_values=inputs["pixel_values"], boxes=boxes)
    torch.testing.assert_close(second.boxes[0], forward.pred_boxes[0, -1:], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(second.mask_logits[0], forward.pred_mask_logits[0, -1:], atol=TOLERANCE, rtol=TOLERANCE)


def test_questions_share_the_prefix_of_a_picture(model):
    """A copied cache answers as a prompt read in one go; the picture is encoded once."""
    _, singles = batch_and_singles()
    inputs = singles[4]
    prefix = {**inputs, "input_ids": inputs["input_ids"][:, :-2], "attention_mask": inputs["attention_mask"][:, :-2]}
    shared = run(model, prefix, max_new_tokens=1, steps=()).past_key_values
    for tail in ([17, 18], [30, 31]):
        ids = torch.cat([prefix["input_ids"], torch.tensor([tail])], dim=1)
        whole = {**inputs, "input_ids": ids}
        text_only = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        check_same(run(model, whole), run(model, text_only, past_key_values=copy.deepcopy(shared)))


def test_inputs_embeds_equal_ids(model):
    _, singles = batch_and_singles()
    inputs = dict(singles[0])
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    forced = [ForcedVis(0, STEPS)]
    expected = run(model, singles[0])
    output = model.generate(
        inputs_embeds=embeds,
        **inputs,
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        logits_processor=forced,
    )
    assert torch.equal(output.sequences, expected.sequences[:, ids.shape[1] :])
    torch.testing.assert_close(output.boxes, expected.boxes, atol=TOLERANCE, rtol=0)


def test_chunked_prefill_equals_one_go(model):
    _, singles = batch_and_singles()
    check_same(run(model, singles[2]), run(model, singles[2], prefill_chunk_size=7))


def test_one_tower_pass_however_many_sequences(model):
    inputs, _ = batch_and_singles()
    passes = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    run(model, inputs, num_beams=3, num_return_sequences=2)
    run(model, inputs, use_cache=False)
    hook.remove()
    assert passes == [5, 5]


def test_grounding_takes_one_forward(model, monkeypatch):
    """The last state of the prompt already holds box, mask and score of a direct answer."""
    _, singles = batch_and_singles()
    calls = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    output = run(model, singles[4], max_new_tokens=1, steps=(0,))
    assert len(calls) == 1 and output.object_valid.tolist() == [[True]]
    monkeypatch.undo()
    replay(model, singles[4], output)


def test_finer_masks_see_only_pictures_that_were_pointed_at(monkeypatch):
    model = tiny_model(mask_image_size=64)
    inputs, singles = batch_and_singles()
    fine = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    passes = []
    get_mask_features = model.model.get_mask_features
    monkeypatch.setattr(
        model.model, "get_mask_features", lambda pixels: passes.append(len(pixels)) or get_mask_features(pixels)
    )
    silent = run(model, inputs | {"mask_pixel_values": fine}, steps=())
    assert passes == [] and silent.mask_logits.shape[1] == 0
    together = run(model, inputs | {"mask_pixel_values": fine})
    # Row 2 has two pictures and speaks of its last one, row 3 has none.
    assert passes == [4]
    alone = run(model, singles[4] | {"mask_pixel_values": fine[4:]})
    seen = together.object_valid[4]
    torch.testing.assert_close(together.mask_logits[4][seen], alone.mask_logits[0], atol=TOLERANCE, rtol=TOLERANCE)


def test_output_fields(model):
    inputs, _ = batch_and_singles()
    output = run(model, inputs)
    rows, slots = output.object_valid.shape
    assert output.boxes.shape == (rows, slots, 4) and output.boxes.dtype == torch.float32
    assert output.mask_logits.shape == (rows, slots, 32, 32)
    assert output.prompt_length == inputs["input_ids"].shape[1]
    assert (output.sequences.gather(1, output.positions.clamp(min=0))[output.object_valid] == VIS).all()
    assert (output.positions[~output.object_valid] == -1).all()
    none = run(model, inputs, steps=())
    assert none.boxes.shape == (rows, 0, 4) and none.object_scores.shape == (rows, 0)
    assert output.points.shape == (rows, slots, 2) and output.points.dtype == torch.float32
    assert isinstance(run(model, inputs, return_dict_in_generate=False), torch.Tensor)


@pytest.mark.parametrize("streamer_class", [TextStreamer, TextIteratorStreamer])
def test_text_streamers(model, streamer_class, tiny_backbones, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_backbones("llama", "clip").text)
    _, singles = batch_and_singles()
    streamer = streamer_class(tokenizer, skip_prompt=True)
    output = run(model, singles[0], streamer=streamer)
    text = "".join(streamer) if streamer_class is TextIteratorStreamer else capsys.readouterr().out
    assert text.strip() == tokenizer.decode(output.sequences[0, output.prompt_length :]).strip()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 2, "use_cache": False}, "use_cache=True"),
        ({"prompt_lookup_num_tokens": 2}, "Assisted and prompt-lookup"),
        ({"assistant_model": "self"}, "Assisted and prompt-lookup"),
        ({"cache_implementation": "paged"}, "Continuous batching"),
    ],
)
def test_modes_that_could_not_feed_boxes_back_are_refused(model, kwargs, message):
    _, singles = batch_and_singles()
    if kwargs.get("assistant_model"):
        kwargs = {"assistant_model": model}
    with pytest.raises(ValueError, match=message):
        model.generate(**singles[0], max_new_tokens=3, **kwargs)


def test_other_refusals(model):
    inputs, singles = batch_and_singles()
    with pytest.raises(ValueError, match="Continuous batching"):
        model.generate_batch([[1, 2]])
    returned = run(model, inputs, num_beams=2)
    with pytest.raises(ValueError, match="beam search"):
        model.generate(input_ids=returned.sequences, past_key_values=returned.past_key_values)
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
    with pytest.raises(ValueError, match="no signal state"):
        model.generate(input_ids=torch.tensor([[1, 2, 3, 4]]), past_key_values=cache)
    cache = run(model, singles[4], max_new_tokens=3).past_key_values
    with pytest.raises(ValueError, match=r"holds 21 tokens, the prompt 2: pass the whole text.*attention_mask"):
        model.generate(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
    for missing in (
        {"boxes_valid": torch.zeros(1, 1, dtype=torch.bool)},
        {"boxes": None, "masks": None, "points": None},
    ):
        with pytest.raises(ValueError, match=r"Row 0: the 1\. `<vis>` .* carries nothing.*slot 0"):
            model.generate(**{**singles[0], **missing})
