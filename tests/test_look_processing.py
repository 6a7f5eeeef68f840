"""Looks in the processor: originals for the model, crops in given answers, and what the model looked at in results."""

import json
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor

from perceptiongpt import PerceptionGPTProcessor, PerceptionPipeline
from perceptiongpt.configuration_perceptiongpt import LOOK_END_TOKEN, LOOK_PAD_TOKEN, LOOK_TOKEN
from perceptiongpt.drawing import draw_objects
from perceptiongpt.look_geometry_perceptiongpt import crop_frame, crop_pixel_values, into_frame, look_crop


SIZE = (90, 160)
BOX = [60.0, 20.0, 84.0, 44.0]
CROP = (54, 14, 90, 50)


@pytest.fixture(scope="module")
def looking(make_tiny_model):
    return make_tiny_model(look_max=2, look_tokens=4, look_min_side=24, look_frame="crop")


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def conversation(image, crop=CROP, behind=(), **look):
    mask = np.zeros(SIZE, dtype=bool)
    mask[22:42, 64:80] = True
    region = {"type": "region", "box": BOX, "mask": mask}
    question = [{"type": "image", "image": image}, {"type": "text", "text": "Find the dot."}]
    answer = [region, {"type": "look", "crop": crop} if not look else look, *behind]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def process(processor, *conversations, **kwargs):
    return processor.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def test_the_model_gets_the_originals(looking, image):
    model, processor = looking
    small = image.resize((20, 30))
    batch = process(processor, conversation(image)[:1], conversation(small)[:1], conversation(image)[:1])
    assert isinstance(batch["look_images"], list)
    for tensor, one in zip(batch["look_images"], (image, small, image), strict=True):
        assert tensor.dtype == torch.uint8 and torch.equal(tensor, torch.from_numpy(np.array(one)).permute(2, 0, 1))
    stats = batch["look_image_stats"]
    cast = process(processor, conversation(image)[:1]).to(torch.bfloat16)
    assert cast["look_image_stats"].dtype == torch.float32 and cast["look_images"][0].dtype == torch.uint8
    # What the model makes of a crop is what the processor makes of it.
    found = crop_pixel_values(batch["look_images"][0], CROP, model.config.image_size, *stats)
    expected = torch.from_numpy(processor.crop_pixels([image.crop(CROP)])[0])
    assert ((found - expected).abs() * stats[1][:, None, None] * 255).max() < 2.01
    assert {"look_images", "look_image_stats"} <= set(processor.model_input_names)
    arrays = processor(images=[image], text="<image>Where?", return_tensors="np")
    assert isinstance(arrays["look_images"][0], np.ndarray)


def test_a_processor_without_looks_is_as_before(make_tiny_model, image, tmp_path):
    _, processor = make_tiny_model()
    batch = process(processor, conversation(image)[:1])
    assert not [name for name in batch if "look" in name]
    assert not [name for name in processor.to_dict() if name.startswith("look_")]
    with pytest.raises(ValueError, match="'look'"):
        process(processor, conversation(image))
    with pytest.raises(ValueError, match="does not look again"):
        processor(images=[image], text="<image>", look_crops=[[CROP]])


def test_it_is_saved_and_loaded(looking, tmp_path):
    _, processor = looking
    processor.save_pretrained(tmp_path)
    again = PerceptionGPTProcessor.from_pretrained(tmp_path)
    assert (again.look_tokens, again.look_frame) == (4, "crop")


def test_a_given_look_is_its_tokens_and_its_crop(looking, image):
    model, processor = looking
    behind = ({"type": "region", "box": BOX, "mask": conversation(image)[1]["content"][0]["mask"]},)
    text = processor.apply_chat_template(conversation(image))
    assert text.count(f"<vis>{LOOK_TOKEN}{LOOK_PAD_TOKEN * 4}{LOOK_END_TOKEN}") == 1
    batch = process(processor, conversation(image, behind=behind), conversation(image, crop=None))
    ids, config = batch["input_ids"], model.config
    assert (ids == config.look_pad_token_id).sum(1).tolist() == [4, 0]
    assert (ids == config.look_token_id).sum(1).tolist() == (ids == config.look_end_token_id).sum(1).tolist() == [1, 1]
    assert torch.equal(batch["look_pixel_values"], torch.from_numpy(processor.crop_pixels([image.crop(CROP)])))
    expected = torch.tensor([[crop_frame(CROP, *SIZE)], [[0.0] * 4]])
    torch.testing.assert_close(batch["look_frames"], expected)
    # The mask right behind the look lies on the crop's square: 20 x 16 of 36 x 36 pixels, from (10, 8) on.
    masks, size = batch["masks"].float(), processor.mask_size
    scale = size / 36
    assert abs(masks[0, 1].mean() - 320 / 36**2) < 0.01
    rows, columns = np.nonzero(masks[0, 1].numpy())
    assert abs(rows.min() - 8 * scale) <= 1 and abs(columns.min() - 10 * scale) <= 1
    assert abs(masks[0, 0].mean() - 320 / 160**2) < 0.01
    assert batch["masks_valid"].tolist() == [[True, True], [True, False]]
    assert batch["masks_read"].tolist() == [[True, False], [True, False]]
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if name not in ("look_images", "look_image_stats")})


def test_masks_stay_on_the_image_where_they_are_decoded_there(make_tiny_model, image):
    _, processor = make_tiny_model(look_max=1, look_tokens=4)
    behind = ({"type": "mask", "mask": conversation(image)[1]["content"][0]["mask"]},)
    batch = process(processor, conversation(image, behind=behind))
    assert torch.equal(batch["masks"][0, 0], batch["masks"][0, 1]) and batch["masks_read"].all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"crop": (54, 14, 90.5, 50)}, "look 0: crop .* whole pixels"),
        ({"crop": (54, 14, 190, 50)}, "160 x 90"),
        ({"crop": (54, 14, 54, 50)}, "crop"),
        ({"crop": "all"}, "crop"),
        ({"behind": ({"type": "look", "crop": CROP},)}, "right behind"),
        ({"behind": ({"type": "text", "text": f"a {LOOK_TOKEN}"},)}, "contains"),
    ],
)
def test_wrong_looks_are_refused(looking, image, change, message):
    with pytest.raises(ValueError, match=message):
        process(looking[1], conversation(image, **change))


@pytest.mark.parametrize(
    "answer, crops, message",
    [
        (f"<vis>{LOOK_TOKEN}{LOOK_END_TOKEN}", [CROP], "0 pads do not fit"),
        (f"<vis>{LOOK_TOKEN}{LOOK_PAD_TOKEN * 4}{LOOK_END_TOKEN}", [None], "4 pads do not fit"),
        (f"<vis>{LOOK_TOKEN}{LOOK_PAD_TOKEN * 3}{LOOK_END_TOKEN}", None, "3 pads; expected 4"),
        (f"<vis>{LOOK_TOKEN}{LOOK_END_TOKEN}", [None, None], "2 `look_crops` for 1 looks"),
        (f"<vis>{LOOK_TOKEN}", None, "a look is"),
        (f"<vis> {LOOK_TOKEN}{LOOK_END_TOKEN}", None, "right behind"),
    ],
)
def test_wrong_texts_are_refused(looking, image, answer, crops, message):
    with pytest.raises(ValueError, match=message):
        looking[1](
            images=[image],
            text=f"<image>Find it. {answer}",
            boxes=[[BOX]],
            look_crops=None if crops is None else [crops],
        )


def test_pads_may_be_for_crops_of_the_caller(looking, image):
    batch = process(looking[1], conversation(image, type="look"))
    assert (batch["input_ids"] == looking[0].config.look_pad_token_id).sum() == 4
    assert "look_pixel_values" not in batch and "look_frames" not in batch


def test_the_image_processor_must_resize_as_the_model_does(looking):
    processor = looking[1]
    other = type(processor.image_processor)(**{**processor.image_processor.to_dict(), "resample": 2})
    with pytest.raises(ValueError, match="bicubically"):
        PerceptionGPTProcessor(other, processor.tokenizer, look_tokens=4)


def output_with_looks(processor):
    """An answer `<p>dot</p><vis><look></look><vis>, <vis><look></look>7` on a 90 x 160 image."""
    ids = processor.tokenizer
    vis, start, end = (ids.convert_tokens_to_ids(token) for token in ("<vis>", "<p>", "</p>"))
    look, look_end = processor.look_token_id, processor.look_end_token_id
    dot, comma, seven = (ids.encode(text, add_special_tokens=False) for text in ("dot", ",", " 7"))
    answer = [start, *dot, end, vis, look, look_end, vis, *comma, vis, look, look_end, *seven]
    positions = [place for place, token in enumerate(answer) if token == vis]
    looks = [place for place, token in enumerate(answer) if token == look]
    frame = torch.tensor(crop_frame(CROP, *SIZE))
    boxes = torch.tensor([[0.4, 0.4, 0.5, 0.5], [0.375, 0.34375, 0.5, 0.46875], [0.1, 0.3, 0.2, 0.4]])
    logits = torch.full((1, 3, 32, 32), -1.0)
    logits[0, 1, 8:24, 4:20] = 1.0
    logits[0, 2, 9:12, 3:6] = 1.0
    return {
        "sequences": torch.tensor([answer]),
        "prompt_length": 0,
        "boxes": boxes[None],
        "mask_logits": logits,
        "points": boxes[None, :, :2],
        **{name: torch.ones(1, 3) for name in ("object_scores", "object_mask_scores", "object_point_scores")},
        "object_valid": torch.ones(1, 3, dtype=torch.bool),
        "positions": torch.tensor([positions]),
        "object_frames": torch.stack([torch.tensor([0.0, 0, 1, 1]), frame, torch.tensor([0.0, 0, 1, 1])])[None],
        "look_positions": torch.tensor([looks]),
        "look_boxes": boxes[None, [0, 2]],
        "look_crops": torch.tensor([[CROP, (0, 0, 0, 0)]]),
    }


def test_results_list_looks_and_what_was_found_again(looking):
    processor = looking[1]
    output = output_with_looks(processor)
    (result,) = processor.post_process_generation(output, target_sizes=[SIZE])
    assert result["text"] == "dot, 7" and [one["phrase"] for one in result["objects"]] == ["dot", None]
    assert result["objects"][0]["box"] == [60.0, 20.0, 80.0, 40.0]  # as it was found in the crop
    first, second = result["looks"]
    assert (first["crop"], first["object"], second["crop"], second["object"]) == (list(CROP), 0, None, 1)
    assert (first["kind"], first["position"]) == ("look", output["look_positions"][0, 0])
    assert first["box"] == pytest.approx([64, 29, 80, 45], abs=1e-4)
    # The mask is pasted where the crop lies: cells 4..20 and 8..24 of 32 over its 36 pixels.
    mask = result["objects"][0]["mask"].numpy()
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max() + 1) == (14 + 9, 14 + 27) and (columns.min(), columns.max() + 1) == (59, 76)
    whole = processor.post_process_generation(output)[0]["objects"]
    assert whole[0]["mask"].shape == (32, 32) and torch.equal(whole[1]["mask"], output["mask_logits"][0, 2] > 0)
    share = whole[0]["mask"].float().mean() * 160**2
    assert abs(share - mask.sum()) < 0.4 * mask.sum()  # at 5 pixels a cell
    plain = {name: value for name, value in output.items() if not name.startswith(("look_", "object_frames"))}
    assert "looks" not in processor.post_process_generation(plain)[0]


def test_a_mask_goes_into_its_crop_and_back(looking):
    """Cut, learned on the crop's square, sampled at the image's pixels: the same mask but for its edge."""
    from perceptiongpt.geometry_perceptiongpt import mask_to_square, sample_mask_logits

    rng = np.random.default_rng(1)
    for _ in range(10):
        height, width = rng.integers(60, 200, 2).tolist()
        y, x = np.mgrid[:height, :width]
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        mask = (x + 0.5 - cx) ** 2 + (y + 0.5 - cy) ** 2 < rng.uniform(3, 12) ** 2
        if not mask.any():
            continue
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        crop = look_crop(box, height, width, 1.5, 20)
        left, top, right, bottom = crop
        square = torch.from_numpy(mask_to_square(mask[top:bottom, left:right], 128)).float() - 0.5
        frame = torch.tensor([crop_frame(crop, height, width)])
        back = (sample_mask_logits(square[None], height, width, frame) > 0)[0].numpy()
        assert (back & mask).sum() / (back | mask).sum() > 0.95
        local = into_frame(torch.tensor([[0.5, 0.5]]), frame)
        assert local.shape == (1, 2)


class Written(LogitsProcessor):
    """Makes the model write given tokens."""

    def __init__(self, tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -1e4)
        scores[:, self.tokens[self.step]] = 1e4
        self.step += 1
        return scores


def test_a_stream_gives_each_object_as_it_was_found_last(looking, image):
    model, processor = looking
    looked = f"<vis>{LOOK_TOKEN}{LOOK_END_TOKEN}"
    text = f"The <p>dot</p>{looked}<vis>, <p>one</p>{looked}7 and <vis><vis>{looked}"
    tokens = processor.tokenizer(text, add_special_tokens=False).input_ids
    inputs = process(processor, conversation(image)[:1], add_generation_prompt=True)
    kwargs = {"max_new_tokens": len(tokens), "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, **kwargs, logits_processor=[Written(tokens)])
    (whole,) = processor.post_process_generation(output, target_sizes=[SIZE])
    assert len(whole["objects"]) == 5 and len(whole["looks"]) == 2  # no third look, two are all that it may take
    streamer = processor.object_streamer(target_size=SIZE)
    answered = Thread(target=model.generate, kwargs={**inputs, **kwargs, "streamer": streamer} | {
        "logits_processor": [Written(tokens)]
    })  # fmt: skip
    answered.start()
    events = list(streamer)
    answered.join()
    assert "".join(event["text"] for event in events if event["type"] == "text") == whole["text"]
    found = [event for event in events if event["type"] == "object"]
    masks = [event["mask"] for event in events if event["type"] == "mask"]
    assert [event["index"] for event in found] == [1, 2, 3, 4, 5]
    for event, mask, one in zip(found, masks, whole["objects"], strict=True):
        assert (event["phrase"], event["span"]) == (one["phrase"], one["span"])
        assert event["box"] == pytest.approx(one["box"], abs=1e-3)
        assert (mask ^ one["mask"]).float().mean() < 1e-3


def test_looks_are_drawn_and_listed(looking, image, tmp_path, capsys):
    from perceptiongpt import predict

    drawn = draw_objects(image, {"objects": [], "looks": [{"crop": list(CROP)}, {"crop": None}]}, longer_side=160)
    changed = np.any(np.asarray(drawn) != np.asarray(image), axis=-1)
    rows, columns = np.nonzero(changed)
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == CROP
    assert not changed[18:46, 58:86].any()
    for part in looking:
        part.save_pretrained(tmp_path / "model")
    image.save(tmp_path / "image.png")
    command = ["--model", str(tmp_path / "model"), "--image", str(tmp_path / "image.png"), "--text", "Find it."]
    command += ["--output", str(tmp_path / "out"), "--max_new_tokens", "2"]
    predict.main(command)
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert entry["error"] is None and entry["looks"] == []
    for more, message in ((["3"], "looks 0 to 2 times"), (["1", "--ground"], "--ground never looks")):
        assert predict.main([*command, "--max_looks", *more]) == 2
        assert message in capsys.readouterr().err


def test_the_pipeline_lists_looks_of_one_question_and_of_several(looking, image):
    model, processor = looking
    pipe = PerceptionPipeline(model=model, processor=processor)
    bias = [[[model.config.vis_token_id], 1e4]]
    options = {"max_new_tokens": 7, "do_sample": False, "sequence_bias": bias, "look_bias": 2e4}
    questions = ["Find the dot.", "Find another one."]
    together = pipe(image, questions, **options)
    for question, result in zip(questions, together, strict=True):
        alone = pipe(image, question, **options)
        assert len(result["looks"]) == len(alone["looks"]) == 2
        assert [look["crop"] for look in result["looks"]] == [look["crop"] for look in alone["looks"]]
        assert len(result["objects"]) == len(alone["objects"]) == 1
        assert result["objects"][0]["box"] == pytest.approx(alone["objects"][0]["box"], abs=1e-2)
    assert pipe(image, questions[0], **{**options, "look_bias": 0.0, "max_looks": 0}).get("looks") is None
    assert pipe(image, questions[0], ground=True)["text"] is not None
