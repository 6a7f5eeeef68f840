"""`ground` is the first step of `generate`, and `generate` goes on from it as if it had started itself."""

import copy

import pytest
import torch
from PIL import Image
from transformers import StaticCache, pipeline

from perceptiongpt.signals_perceptiongpt import SIGNALS
from rows import IMAGE, VIS, batch_and_singles, tiny_model


RESULTS = [name for signal in SIGNALS.values() for name in signal.result_names]


class BiasedHead(torch.nn.Module):
    """A head that likes `<vis>` better by `bias`, and never says `<image>` or an end."""

    def __init__(self, head, bias: float = 0.0):
        super().__init__()
        self.head, self.bias = head, bias

    def forward(self, states):
        logits = self.head(states)
        logits[..., [2, IMAGE]] = -1e4
        logits[..., VIS] += self.bias
        return logits


def model_that_points(num_rows: int):
    """A model that begins its answers to `num_rows` of the five prompts with `<vis>`, and those rows."""
    model = tiny_model()
    model.lm_head = BiasedHead(model.lm_head)
    inputs, _ = batch_and_singles()
    logits = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True).logits[0]
    lead = logits.max(-1).values - logits[:, VIS]
    order = lead.argsort()
    # Half-way between two rows: no rounding decides.
    model.lm_head.bias = float(lead[order[num_rows - 1 : num_rows + 1]].mean())
    return model, sorted(order[:num_rows].tolist())


@pytest.fixture(scope="module")
def pointing():
    return model_that_points(3)


def generate(model, inputs, steps, **kwargs):
    return model.generate(**inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, **kwargs)


def check_same(first, second, tolerance=1e-6):
    assert type(first) is type(second)
    assert torch.equal(first.sequences, second.sequences)
    assert torch.equal(first.object_valid, second.object_valid)
    assert torch.equal(first.positions, second.positions)
    assert first.prompt_length == second.prompt_length
    for name in RESULTS:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("mask", ["given", "inferred"])
def test_ground_is_the_first_step_of_generate(pointing, padding, mask):
    model, rows = pointing
    inputs, _ = batch_and_singles(padding)
    if mask == "inferred":
        inputs.pop("attention_mask")
    expected, output = generate(model, inputs, 1), model.ground(**inputs)
    check_same(output, expected)
    assert output.object_valid[:, 0].tolist() == [row in rows for row in range(5)]
    states = [cache.past_key_values.signal_state for cache in (output, expected)]
    assert states[0].length == states[1].length == inputs["input_ids"].shape[1]
    assert torch.equal(states[0].unfed_tokens, states[1].unfed_tokens)
    assert torch.equal(states[0].image_of_row, states[1].image_of_row)
    torch.testing.assert_close(states[0].last_state, states[1].last_state)


def test_each_row_alone_and_only_some_signals(pointing):
    model, _ = pointing
    inputs, singles = batch_and_singles()
    together = model.ground(**inputs)
    for row, single in enumerate(singles):
        alone = model.ground(**single, signals=["mask", "box"])
        assert torch.equal(alone.sequences[0, -1], together.sequences[row, -1])
        for name in ("boxes", "mask_logits", "object_scores"):
            seen = together.object_valid[row]
            torch.testing.assert_close(alone[name][0], together[name][row][seen], atol=1e-4, rtol=1e-4)
        assert alone.points is None and alone.object_point_scores is None
    boxes = generate(model, inputs, 3, signals=["box"])
    assert boxes.mask_logits is None and boxes.boxes.shape[1] > 0


def test_masks_can_be_asked_for_after_boxes(pointing):
    """What they are decoded from is made when a later call on the cache wants it, of old images and new ones."""
    model, _ = pointing
    inputs, _ = batch_and_singles()
    count, made = model.model.mask_mixture.register_forward_hook, []
    handle = count(lambda module, inputs, output: made.append(len(output)))
    first = model.ground(**inputs, signals=["box"])
    assert not made
    new = {**inputs, "input_ids": torch.cat([first.sequences, inputs["input_ids"]], dim=1)}
    new["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(5, 1), inputs["attention_mask"]], 1).long()
    outputs = []
    for names in (["box"], ["box", "mask", "point"]):
        cache = model.ground(**inputs, signals=names).past_key_values
        outputs.append(model.generate(**new, past_key_values=cache, max_new_tokens=8, return_dict_in_generate=True))
    handle.remove()
    assert made == [5, 5, 5, 5]  # 5 images in each prompt: of the first prompt late, and at once
    assert outputs[0].object_valid.any()
    check_same(*outputs)


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("whole", [True, False])
def test_generate_goes_on_from_it(pointing, steps, whole):
    """To further instances where the first token was an object, and through the sentence where it was not."""
    model, _ = pointing
    inputs, _ = batch_and_singles(2)
    prompt_length = inputs["input_ids"].shape[1]
    expected, first = generate(model, inputs, steps + 1), model.ground(**inputs)
    mask = torch.cat([inputs["attention_mask"], torch.ones(5, 1, dtype=torch.long)], dim=1)
    shown = first.sequences if whole else first.sequences[:, -1:]
    more = generate(model, {"input_ids": shown, "attention_mask": mask}, steps, past_key_values=first.past_key_values)
    assert torch.equal(more.sequences[:, shown.shape[1] :], expected.sequences[:, prompt_length + 1 :])
    late = expected.object_valid & (expected.positions > prompt_length)
    assert torch.equal(more.object_valid.sum(1), late.sum(1))
    for name in RESULTS:
        torch.testing.assert_close(more[name][more.object_valid], expected[name][late], atol=1e-4, rtol=1e-4)
    assert steps < 6 or late.any()


def test_it_continues_from_a_cache(pointing):
    """A second question over the cache of a first answer, whole or as new tokens alone."""
    model, _ = pointing
    inputs, _ = batch_and_singles()
    first = generate(model, inputs, 3)
    sequences = torch.cat([first.sequences, torch.tensor([[20, 21]]).expand(5, -1)], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(5, 5, dtype=torch.long)], dim=1)
    outputs = []
    for ids in (sequences, sequences[:, first.past_key_values.get_seq_length() :]):
        asked = {"input_ids": ids, "attention_mask": mask}
        outputs.append(model.ground(**asked, past_key_values=copy.deepcopy(first.past_key_values)))
        check_same(outputs[-1], generate(model, asked, 1, past_key_values=copy.deepcopy(first.past_key_values)))
    for name in RESULTS:
        torch.testing.assert_close(outputs[0][name], outputs[1][name])


def test_static_cache(pointing):
    model, _ = pointing
    inputs, _ = batch_and_singles()

    def static():
        return StaticCache(config=model.config.text_config, max_cache_len=64)

    check_same(model.ground(**inputs, past_key_values=static()), model.ground(**inputs), tolerance=1e-4)
    with pytest.raises(ValueError, match="Rows can be taken from a dynamic cache only, this is a StaticCache"):
        model.ground(**inputs, past_key_values=static(), max_new_tokens=4)


def test_embeddings_as_prompts(pointing):
    model, _ = pointing
    _, singles = batch_and_singles()
    inputs = dict(singles[0])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    check_same(model.ground(**inputs), generate(model, inputs, 1))


def test_one_forward_and_no_loop(pointing, monkeypatch):
    model, _ = pointing
    inputs, _ = batch_and_singles()
    calls = []
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    monkeypatch.setattr(model, "generate", None)
    model.ground(**inputs)
    assert calls == [1]


@pytest.mark.parametrize("known", ["ids", "embeds", "new tokens alone"])
def test_rows_without_an_object_are_written_to_their_end(pointing, known):
    """They get what generation in one go writes; rows that begin with an object stay."""
    model, rows = pointing
    inputs, singles = batch_and_singles(1)
    start = None
    if known == "embeds":
        inputs = dict(singles[next(row for row in range(5) if row not in rows)])
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        rows = []
    elif known == "new tokens alone":
        start = generate(model, inputs, 2)
        mask = torch.cat([inputs["attention_mask"], torch.ones(5, 3, dtype=torch.long)], dim=1)
        read = torch.cat([start.sequences[:, -1:], torch.full((5, 1), 20)], dim=1)
        inputs = {"input_ids": read, "attention_mask": mask}
    cache = {} if start is None else {"past_key_values": copy.deepcopy(start.past_key_values)}
    expected = generate(model, inputs, 6, **cache)
    cache = {} if start is None else {"past_key_values": start.past_key_values}
    output = model.ground(**inputs, max_new_tokens=6, **cache)
    length = output.prompt_length
    if start is not None:
        rows = (output.sequences[:, length] == VIS).nonzero().flatten().tolist()
    others = [row for row in range(len(output.sequences)) if row not in rows]
    assert others and output.past_key_values is None
    assert torch.equal(output.sequences[others], expected.sequences[others])
    for row in others:
        seen = expected.object_valid[row]
        assert torch.equal(output.positions[row][output.object_valid[row]], expected.positions[row][seen])
        for name in RESULTS:
            found = output[name][row][output.object_valid[row]]
            torch.testing.assert_close(found, expected[name][row][seen], atol=1e-4, rtol=1e-4)
    for row in rows:
        assert output.sequences[row, length] == VIS and (output.sequences[row, length + 1 :] == 0).all()
        assert output.object_valid[row].sum() == 1 and output.positions[row, 0] == length
        torch.testing.assert_close(output.boxes[row, 0], expected.boxes[row, 0], atol=1e-4, rtol=0)


def test_nothing_to_continue():
    """Neither after an object nor after an end: the cache is that of the one forward."""
    model, rows = model_that_points(4)
    _, singles = batch_and_singles()
    (other,) = set(range(5)) - set(rows)
    pointed = model.ground(**singles[rows[0]], max_new_tokens=5)
    assert pointed.sequences[0, -1] == VIS and pointed.past_key_values is not None
    model.generation_config.eos_token_id = [2, int(model.ground(**singles[other]).sequences[0, -1])]
    ended = model.ground(**singles[other], max_new_tokens=5)
    assert ended.past_key_values is not None and not ended.object_valid.any()


def test_results_in_pixels(make_tiny_model):
    model, processor = make_tiny_model()
    content = [{"type": "image", "image": Image.new("RGB", (40, 20))}, {"type": "text", "text": "Find it."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        model.lm_head.weight[model.config.vis_token_id] = model.model(**inputs).last_hidden_state[0, -1] * 10
    results = processor.post_process_generation(model.ground(**inputs), target_sizes=[(20, 40)])
    assert results[0]["text"] == "" and len(results[0]["objects"]) == 1 and results[0]["masks"].shape == (1, 20, 40)


def test_pipeline(tiny_model_dir, monkeypatch):
    pipe = pipeline("perception", model=tiny_model_dir, trust_remote_code=True)
    image, vis = Image.new("RGB", (40, 20), "red"), pipe.model.config.vis_token_id
    free = pipe(image, "Find it.", max_new_tokens=3)
    assert pipe(image, "Find it.", max_new_tokens=3, ground=True)["text"] == free["text"]
    with torch.no_grad():
        pipe.model.lm_head.weight.zero_()
        pipe.model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(pipe.model.lm_head.weight)))
        pipe.model.lm_head.bias[vis] = 5
    monkeypatch.setattr(pipe.model, "generate", None)
    found = pipe([image, image], "Find it.", ground=True, batch_size=2, mask_format="rle")
    assert [len(result["objects"]) for result in found] == [1, 1]


def test_what_it_does_not_take(pointing):
    model, _ = pointing
    _, singles = batch_and_singles()
    with pytest.raises(ValueError, match=r"`ground` does not take `do_sample`\."):
        model.ground(**singles[0], do_sample=True)
    with pytest.raises(ValueError, match="no prompt"):
        model.ground()
    with pytest.raises(ValueError, match="`signals`: this checkpoint has no 'depth' signal"):
        model.ground(**singles[0], signals=["depth"])
