"""Text and objects as a stream: the finished answer, each part as soon as it is there, and masks only if wanted."""

import queue
import re
from threading import Thread, active_count

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor

from perceptiongpt import ObjectIteratorStreamer, PerceptionPipeline


HEIGHT, WIDTH = 60, 100
ANSWER = "Here: <p>the red cup</p><vis><vis>, a <p> naïve 猫 </p><vis> and <vis>.</s>"


class Forced(LogitsProcessor):
    """Makes the model answer with given tokens, and notes what `watched` says before each of them."""

    def __init__(self, tokens: list[int], watched=lambda: None):
        self.tokens, self.watched, self.seen = tokens, watched, []

    def __call__(self, input_ids, scores):
        token = self.tokens[len(self.seen)]
        self.seen.append(self.watched())
        scores = torch.full_like(scores, -1e4)
        scores[:, token] = 1e4
        return scores


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def parts(make_tiny_model):
    return make_tiny_model()


def prepare(processor, image):
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is here?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip


def answer(processor, watched=lambda: None, text: str = ANSWER) -> dict:
    """What makes `generate` write `ANSWER`."""
    tokens = processor.tokenizer(text, add_special_tokens=False).input_ids
    return {"logits_processor": [Forced(tokens, watched)], "max_new_tokens": len(tokens), "do_sample": False}


def count_calls(module) -> list:
    calls = []
    module.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    return calls


def objects_of(events: list[dict]) -> list[dict]:
    """The objects of a stream as `post_process_generation` writes them."""
    found = {event["index"]: dict(event) for event in events if event["type"] == "object"}
    for event in events:
        if event["type"] not in ("text", "object"):
            found[event["index"]] |= event
    return [{key: value for key, value in one.items() if key not in ("type", "index")} for one in found.values()]


def check_objects(events: list[dict], objects: list[dict]) -> None:
    streamed = objects_of(events)
    assert len(streamed) == len(objects) == 4
    for one, expected in zip(streamed, objects, strict=True):
        assert one.keys() == expected.keys()
        mask, expected_mask = one.pop("mask"), expected.pop("mask")
        assert mask is expected_mask is None or torch.equal(mask, expected_mask)
        for name, value in expected.items():
            close = isinstance(value, (float, list))
            assert one[name] == (pytest.approx(value, abs=1e-4) if close else value), name


def test_a_stream_is_the_answer(parts, image):
    model, processor = parts
    inputs = prepare(processor, image)
    output = model.generate(**inputs, **answer(processor), return_dict_in_generate=True)
    (result,) = processor.post_process_generation(output, [(HEIGHT, WIDTH)])
    assert result["text"] == "Here: the red cup, a naïve 猫 and ."
    streamer = processor.object_streamer((HEIGHT, WIDTH))
    thread = Thread(target=model.generate, kwargs={**inputs, **answer(processor), "streamer": streamer})
    thread.start()
    events = list(streamer)
    thread.join()
    assert "".join(event["text"] for event in events if event["type"] == "text") == result["text"]
    assert not any("\ufffd" in event.get("text", "") for event in events)
    check_objects(events, result["objects"])
    # Each object after its phrase and before its mask, and before the words that follow.
    kinds = [event["type"] for event in events]
    assert re.sub("(text )+", "text ", " ".join(kinds)) == (
        "text object mask object mask text object mask text object mask text"
    )
    said = ""
    for event in events:
        said += event.get("text", "")
        if event.get("span"):
            assert said.endswith(event["phrase"]) and said[slice(*event["span"])] == event["phrase"]


def test_objects_come_while_the_answer_is_written(parts, image):
    model, processor = parts
    streamer = processor.object_streamer((HEIGHT, WIDTH), mask_format="rle")
    options = answer(processor, lambda: [event["type"] for event in streamer.events.queue])
    (forced,) = options["logits_processor"]
    model.generate(**prepare(processor, image), **options, streamer=streamer)
    for step, token in enumerate(forced.tokens[:-1]):
        if token == processor.vis_token_id:
            assert forced.seen[step + 1][len(forced.seen[step]) :][-2:] == ["object", "mask"]


def test_without_masks_their_decoder_does_not_run(make_tiny_model, image):
    model, processor = make_tiny_model()
    calls = count_calls(model.model.mask_decoder)
    inputs = prepare(processor, image)
    silent = [
        (processor.object_streamer(mask_format=None), {}),
        (processor.object_streamer(), {"signals": ["box"]}),
        (processor.object_streamer(threshold=2.0), {}),
    ]
    for streamer, options in silent:
        model.generate(**inputs, **answer(processor), **options, streamer=streamer)
    assert not calls
    kinds = [{event["type"] for event in streamer} for streamer, _ in silent]
    assert kinds == [{"text", "object"}, {"text", "object"}, {"text"}]
    streamer = processor.object_streamer()
    model.generate(**inputs, **answer(processor), streamer=streamer)
    assert len(calls) == 4
    events = list(streamer)
    boxes = torch.tensor([event["box"] for event in events if event["type"] == "object"])
    assert boxes.min() >= 0 and boxes.max() <= 1  # no size was told: of the padded square
    assert events[-2]["mask"].shape == (model.config.mask_config.size,) * 2 and events[-1]["type"] == "text"
    model.generate(**inputs, **answer(processor), signals=["mask"], streamer=streamer)
    assert {"mask", "mask_score"} < set(next(event for event in streamer if event["type"] == "object"))


def test_a_finer_image_is_encoded_once(make_tiny_model, image):
    model, processor = make_tiny_model(mask_image_size=64)
    calls = count_calls(model.model.vision_tower)
    streamer = processor.object_streamer((HEIGHT, WIDTH))
    inputs = prepare(processor, image)
    output = model.generate(**inputs, **answer(processor), streamer=streamer, return_dict_in_generate=True)
    assert len(calls) == 2
    (result,) = processor.post_process_generation(output, [(HEIGHT, WIDTH)])
    check_objects(list(streamer), result["objects"])


def test_what_goes_wrong_reaches_the_reader(parts, image):
    model, processor = parts
    inputs = prepare(processor, image)
    streamer = ObjectIteratorStreamer(processor, timeout=0.01)
    with pytest.raises(queue.Empty):
        next(streamer)

    def generate(**kwargs):
        with pytest.raises(ValueError):
            model.generate(**kwargs, streamer=streamer, max_new_tokens=2)

    pair = {name: torch.cat([value, value]) for name, value in inputs.items()}
    for kwargs, message in (
        ({**inputs, "num_beams": 2}, "cannot be used with beam search"),
        ({**inputs, "prompt_lookup_num_tokens": 2}, "Assisted and prompt-lookup"),
        (pair, "one row at a time; got 2 rows"),
    ):
        thread = Thread(target=generate, kwargs=kwargs)
        thread.start()
        thread.join()
        with pytest.raises(ValueError, match=message):
            list(streamer)
    with pytest.raises(ValueError, match="of a PerceptionGPT model only"):
        streamer.put(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="`mask_format` is 'png'"):
        processor.object_streamer(mask_format="png")


def test_several_processes_are_refused(parts, image, monkeypatch):
    model, processor = parts
    monkeypatch.setattr("perceptiongpt.generation_perceptiongpt.several_processes", lambda: True)
    with pytest.raises(ValueError, match="by one process alone"):
        model.generate(**prepare(processor, image), streamer=processor.object_streamer(), max_new_tokens=2)


# ---- the pipeline ----------------------------------------------------------------------------------------------------


def test_pipeline(parts, image):
    model, processor = parts
    pipe = PerceptionPipeline(model=model, processor=processor, mask_format=None)
    result = pipe(image, "What is here?", **answer(processor), mask_format="bool")
    events = list(pipe(image, "What is here?", **answer(processor), stream=True, mask_format="bool"))
    assert "".join(event.get("text", "") for event in events) == result["text"]
    check_objects(events, result["objects"])
    events = list(pipe.describe_region(image, [1, 2, 30, 40], **answer(processor), stream=True))
    assert {event["type"] for event in events} == {"text", "object"}  # the pipeline's own setting: no masks
    with pytest.raises(ValueError, match="beam search"):
        list(pipe(image, "What is here?", stream=True, num_beams=2))
    for inputs, text, options in (
        ([image, image], "a", {}),
        (image, ["a", "b"], {}),
        (image, "a", {"ground": True}),
    ):
        with pytest.raises(ValueError, match="`stream=True` is for one question about one input"):
            pipe(inputs, text, stream=True, **options)


def test_closing_a_stream_ends_generation(make_tiny_model, image):
    model, processor = make_tiny_model()
    pipe = PerceptionPipeline(model=model, processor=processor)
    steps, threads = count_calls(model.lm_head), active_count()
    events = pipe(image, "What is here?", stream=True, max_new_tokens=300, min_new_tokens=300)
    next(events)
    events.close()
    assert len(steps) < 300 and active_count() == threads
