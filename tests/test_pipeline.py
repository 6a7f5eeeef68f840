"""The pipeline: several questions about one image, verbs, regions, and data sets as streams."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from perceptiongpt import PerceptionPipeline
from perceptiongpt import pipeline_perceptiongpt as module
from perceptiongpt.data.templates import load_templates
from perceptiongpt.geometry_perceptiongpt import decode_mask
from perceptiongpt.prefix_perceptiongpt import PrefixCache


QUESTIONS = ["Find the red cup.", "Find every dog that stands on the grass.", "Cup?", "Where is it?", "Is it a dog?"]
BOXES = [[10.0, 20.0, 50.0, 45.0], [0.0, 0.0, 30.0, 30.0], [40.0, 5.0, 99.0, 60.0]]
TOKENS = 2


def noise(seed: int = 0, size: tuple[int, int] = (60, 100)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def image():
    return noise()


@pytest.fixture(scope="module")
def pipe(make_tiny_model):
    """Answers with `TOKENS` tokens, objects among them."""
    model, processor = make_tiny_model()
    bias = [[[processor.vis_token_id], 1.0]]
    return PerceptionPipeline(
        model=model, processor=processor, max_new_tokens=TOKENS, do_sample=False, sequence_bias=bias
    )


@pytest.fixture
def calls(pipe, monkeypatch):
    """The conversations of each call of the processor, and how many images the tower saw in each pass."""
    conversations, images = [], []
    template = pipe.processor.apply_chat_template

    def spy(messages, **kwargs):
        conversations.extend(messages)
        return template(messages, **kwargs)

    monkeypatch.setattr(pipe.processor, "apply_chat_template", spy)
    hook = pipe.model.model.vision_tower.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    yield conversations, images
    hook.remove()


def check_same(results, expected):
    assert len(results) == len(expected)
    for result, one in zip(results, expected, strict=True):
        assert result["text"] == one["text"] and len(result["objects"]) == len(one["objects"])
        torch.testing.assert_close(result["boxes"], one["boxes"], atol=0.01, rtol=0)
        assert (result["masks"] != one["masks"]).float().mean() < 0.01 or not len(one["masks"])


# ---- several questions about one image -------------------------------------------------------------------------------


@pytest.mark.parametrize(("at_once", "ground"), [(16, False), (2, True)])
def test_several_questions_encode_their_image_once(pipe, image, calls, monkeypatch, at_once, ground):
    monkeypatch.setattr(module, "QUESTIONS_AT_ONCE", at_once)
    options = {"ground": ground} | ({"max_new_tokens": TOKENS} if ground else {})
    alone = [pipe(image, question, **options) for question in QUESTIONS]
    calls[1].clear()
    check_same(pipe(image, QUESTIONS, **options), alone)
    assert calls[1] == [1]
    check_same(pipe({"image": image, "text": QUESTIONS}, **options), alone)
    assert any(result["objects"] for result in alone) or ground


def test_inputs_with_one_and_with_several_questions_in_one_batch(pipe, image):
    other = noise(1, (80, 50))
    rows = [
        {"image": other, "text": QUESTIONS[0]},
        {"image": image, "text": QUESTIONS[:3]},
        {"image": image, "text": QUESTIONS[3]},
        {"image": other, "text": QUESTIONS[:1]},
        {"image": other, "text": QUESTIONS[1:3]},
    ]
    together = pipe(rows, batch_size=5)
    for result, row in zip(together, rows, strict=True):
        alone = pipe(row)
        assert isinstance(result, dict) == isinstance(row["text"], str)
        check_same(*([found] if isinstance(found, dict) else found for found in (result, alone)))
    nested = pipe([image, other], [QUESTIONS[:3], QUESTIONS[0]], batch_size=2)
    check_same(nested[0], together[1])
    check_same([nested[1]], [together[0]])
    returned = pipe(image, QUESTIONS[:2], num_beams=2, num_return_sequences=2)
    assert [len(sequences) for sequences in returned] == [2, 2]


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_other_caches_than_a_prefix_can_start(pipe, image, calls, options):
    expected = pipe(image, QUESTIONS[:2])
    calls[1].clear()
    check_same(pipe(image, QUESTIONS[:2], **options), expected)
    assert calls[1] == [2]


def test_sliding_windows(make_tiny_model, image):
    model, processor = make_tiny_model("mistral")
    for config in (model.config.text_config, model.model.language_model.config):
        config.sliding_window = 20
    pipe = PerceptionPipeline(model=model, processor=processor, max_new_tokens=TOKENS, do_sample=False)
    assert any(PrefixCache(config=model.config.get_text_config(decoder=True)).is_sliding)
    alone = [pipe(image, question) for question in QUESTIONS[:3]]
    images = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    check_same(pipe(image, QUESTIONS[:3]), alone)
    assert images == [1]


# ---- verbs and regions -----------------------------------------------------------------------------------------------


def test_prompts_are_those_of_the_evaluation():
    templates = load_templates()
    prompts = {task: prompt.replace(module.REGION_PLACEHOLDER, "<vis>") for task, prompt in module.PROMPTS.items()}
    assert prompts.pop("region_vqa") in templates["region_vqa"]["prompts"]
    assert prompts == {task: templates[task]["evaluation"] for task in prompts}


@pytest.mark.parametrize(
    ("verb", "arguments", "prompt"),
    [
        ("detect", {"phrase": "dog"}, "Find every dog."),
        ("segment", {"phrase": "the red cup"}, "Find the red cup."),
        ("segment", {"box": BOXES[0]}, "Segment the object in [box]."),
        ("segment", {"mask": [[10, 20, 50, 20, 50, 45]]}, "Segment the object in [mask]."),
        ("segment", {"point": [30, 20]}, "Segment the object at the point [point]."),
        ("segment", {"point": [30, 20], "box": BOXES[0]}, "Segment the object in [box point]."),
        ("caption", {}, "Describe the image in one sentence."),
        ("caption", {"grounded": True}, "Describe the image and mark what you mention."),
        ("describe_region", {"box": BOXES[0]}, "Describe the region [box] briefly."),
        ("ask", {"question": "What colour is it?"}, "What colour is it?"),
        ("ask", {"question": "What colour is it?", "box": BOXES[0]}, "Look at [box]. What colour is it?"),
        ("ask", {"question": "Is <region> red?", "box": BOXES[0]}, "Is [box] red?"),
        ("detect", {"phrase": "dog in <region>", "box": BOXES[0]}, "Find every dog in [box]."),
    ],
)
def test_verbs(pipe, image, calls, verb, arguments, prompt):
    def said(messages):
        (message,) = messages
        first, *items = message["content"]
        assert first["type"] == "image" and first["image"].size == image.size
        words = []
        for item in items:
            names = [name for name in ("box", "mask", "point") if name in item]
            assert all(item[name] == arguments[name] for name in names)
            words.append(item["text"] if item["type"] == "text" else f"[{' '.join(names)}]")
        return "".join(words)

    result = getattr(pipe, verb)(image, **arguments, threshold=0.0, mask_format="rle")
    assert {"text", "objects", "boxes", "masks"} <= set(result)
    assert [said(messages) for messages in calls[0]] == [prompt]
    both = getattr(pipe, verb)([image, image], **arguments, batch_size=2)
    assert [said(messages) for messages in calls[0]] == [prompt] * 3 and len(both) == 2


def test_several_phrases_and_regions(pipe, image, calls):
    phrases = ["dog", "cup", "red chair"]
    expected = [pipe.detect(image, phrase) for phrase in phrases]
    boxed = [pipe.describe_region(image, box) for box in BOXES]
    calls[1].clear()
    check_same(pipe.detect(image, phrases), expected)
    for boxes in (np.array(BOXES), torch.tensor(BOXES)):
        check_same(pipe.describe_region(image, boxes), boxed)
    check_same(pipe(image, "Describe the region <region> briefly.", box=BOXES), boxed)
    assert calls[1] == [1] * 4
    check_same(pipe.describe_region([image] * 3, BOXES), boxed)
    asked = pipe.ask(image, ["What is it?", "Is it red?"], box=BOXES[:2])
    singles = [pipe.ask(image, "What is it?", box=BOXES[0]), pipe.ask(image, "Is it red?", box=BOXES[1])]
    check_same(asked, singles)


def test_several_masks(pipe, image):
    masks = np.zeros((2, 60, 100), dtype=bool)
    masks[0, 5:20, 5:40], masks[1, 30:50, 60:90] = True, True
    masks[0] |= decode_mask([[60, 5, 90, 5, 75, 25]], 60, 100)
    # The rings of the first have unequal numbers of corners.
    polygons = [[[5, 5, 40, 5, 40, 20, 5, 20], [60, 5, 90, 5, 75, 25]], [[60, 30, 90, 30, 90, 50, 60, 50]]]
    expected = [pipe.describe_region(image, mask=mask) for mask in masks]
    for several in (masks, [Image.fromarray(mask) for mask in masks], polygons):
        check_same(pipe.describe_region(image, mask=several), expected)
    for one in (masks[0], polygons[0], list(map(np.array, polygons[0]))):
        check_same([pipe.describe_region(image, mask=one)], expected[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe, image: pipe.segment(image), "got neither"),
        (lambda pipe, image: pipe.segment(image, "a cup", box=BOXES[0]), "got both"),
        (lambda pipe, image: pipe.describe_region(image), "names <region>, which needs any of 'box'"),
        (lambda pipe, image: pipe(image, box=BOXES[0]), "'box' came without a text"),
        (lambda pipe, image: pipe(image, []), "lengths {'text': 0}"),
        (lambda pipe, image: pipe(image, ["a", "b"], box=BOXES), "lengths {'box': 3, 'text': 2}"),
        (lambda pipe, image: pipe([image], "a", box=BOXES), "3 boxes were given for 1 images"),
        (lambda pipe, image: pipe((one for one in [image]), "a", box=BOXES[0]), "expected them in its items"),
    ],
)
def test_refusals(pipe, image, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(pipe, image)


# ---- data sets and generators ----------------------------------------------------------------------------------------


class Rows(Dataset):
    """Rows with an image and more, which count how often they are read."""

    def __init__(self, count: int):
        self.read, self.count = [], count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return {"picture": noise(index), "label": index}


def test_data_sets_and_generators_are_streams(pipe):
    expected = [pipe.detect(noise(index), "dog") for index in range(4)]
    rows = Rows(4)
    results = pipe.detect(KeyDataset(rows, "picture"), "dog", batch_size=2)
    first = next(results)
    assert rows.read == [0, 1]
    check_same([first, *results], expected)

    read = []

    def images():
        for index in range(4):
            read.append(index)
            yield noise(index)

    results = pipe.detect(images(), "dog", batch_size=2)
    first = next(results)
    assert len(read) <= 3  # the library looks at the first one ahead
    check_same([first, *results], expected)

    both = list(pipe.detect(KeyDataset(Rows(2), "picture"), ["dog", "cup"], batch_size=2))
    check_same([pair[0] for pair in both], expected[:2])
    assert [len(pair) for pair in both] == [2, 2]
    dicts = pipe.describe_region({"image": noise(index), "box": BOXES[index]} for index in range(3))
    check_same(list(dicts), [pipe.describe_region(noise(index), BOXES[index]) for index in range(3)])


# ---- how it is made --------------------------------------------------------------------------------------------------


def test_no_task_named(tiny_model_dir, image):
    pipe = pipeline(model=tiny_model_dir, trust_remote_code=True)
    assert type(pipe).__name__ == "PerceptionPipeline" and pipe.task == "perception"
    assert {"text", "objects"} <= set(pipe.caption(image, max_new_tokens=2))
