"""Looks in training: labels, crops, frames, packing, gradients, adapters, and a checkpoint that other processes load.

`python -I tests/test_look_training.py FOLDER RESULTS.pt` is a process that cannot import the package.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image


PATCHES = {"look_max": 2, "look_tokens": 4, "look_min_side": 16, "look_margin": 1.2}
GENERATED = ("sequences", "boxes", "mask_logits", "look_boxes", "look_crops", "object_frames")


def looking_answer(model, inputs) -> dict:
    """What a model generates that writes `<vis>` and looks wherever it may."""
    output = model.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=False,
        return_dict_in_generate=True,
        sequence_bias=[[[model.config.vis_token_id], 1e4]],
        look_bias=2e4,
    )
    return {name: output[name] for name in GENERATED}


def question() -> list[dict]:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": "Find the red cup."}]
    return [{"role": "user", "content": content}]


def ask(model, processor) -> dict:
    inputs = processor.apply_chat_template(
        [question()], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return looking_answer(model, inputs)


if __name__ == "__main__":
    from transformers import AutoModelForImageTextToText, AutoProcessor

    remote = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
    assert "perceptiongpt" not in sys.modules
    torch.save(ask(remote, AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)), sys.argv[2])
    sys.exit()


from drawn_rows import drawn_coco_folder, drawn_rows  # noqa: E402
from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor  # noqa: E402
from perceptiongpt import train as training  # noqa: E402
from perceptiongpt.data.collator import IGNORED_LABEL, PerceptionCollator  # noqa: E402
from perceptiongpt.data.looks import LOOK, Looks  # noqa: E402
from perceptiongpt.data.scenes.dataset import ScenesDataset  # noqa: E402
from perceptiongpt.data.schema import decode_rle, validate_row  # noqa: E402
from perceptiongpt.data.sources import rows  # noqa: E402
from perceptiongpt.geometry_perceptiongpt import boxes_from_square, boxes_to_square  # noqa: E402
from perceptiongpt.look_geometry_perceptiongpt import crop_frame, into_frame, look_crop, out_of_frame  # noqa: E402
from perceptiongpt.signal_box_perceptiongpt import box_iou_and_giou  # noqa: E402
from perceptiongpt.training.adapters import add_adapter  # noqa: E402
from perceptiongpt.training.answers import score_answer  # noqa: E402
from perceptiongpt.training.recipe import complete_recipe  # noqa: E402


@pytest.fixture(scope="module", params=["image", "crop"])
def looking(request, make_tiny_model):
    return make_tiny_model(look_frame=request.param, **PATCHES)


@pytest.fixture(scope="module")
def image_looking(make_tiny_model):
    return make_tiny_model(**PATCHES)


def looking_rows() -> list[dict]:
    """Rows that look and find again, look and answer in words, look twice, and do not look."""
    refer, second, last, dialogue, absent = drawn_rows(1)
    again = {**refer, "boxes": refer["boxes"] * 2, "masks": refer["masks"] * 2, "points": [None] * 2}
    words = {**second, "task": "vqa"}
    twice = {**dialogue, "task": "dialogue"}
    for row, answer in ((again, f"{LOOK}<vis>"), (words, f"{LOOK} 7"), (twice, f"{LOOK} a <vis> {LOOK}.")):
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": answer}]
    return [again, words, twice, last, absent]


def collate(parts, rows, evaluation=True, pack=None, **looks):
    model, processor = parts
    collator = PerceptionCollator(processor, model.config, pack=pack, looks=looks or None)
    return (collator.for_evaluation() if evaluation else collator)(rows)


def test_the_rows_are_rows_of_the_schema():
    for row in looking_rows():
        validate_row(row)
    wrong = looking_rows()[1]
    wrong["messages"] = [{"role": "user", "content": f"<image>{LOOK}?"}, {"role": "assistant", "content": "7"}]
    with pytest.raises(ValueError, match="only answers look again"):
        validate_row(wrong)


def test_labels_are_on_what_is_written(looking):
    config = looking[0].config
    batch = collate(looking, looking_rows())
    ids, labels = batch["input_ids"], batch["labels"]
    counts = {name: (ids == getattr(config, f"{name}_token_id")).sum(1).tolist() for name in ("look", "look_end")}
    assert counts["look"] == counts["look_end"] == [1, 1, 2, 0, 0]
    for token in (config.look_token_id, config.look_end_token_id):
        assert (labels[ids == token] == token).all()
    pads = ids == config.look_pad_token_id
    assert (labels[pads] == IGNORED_LABEL).all() and pads.sum() == 4 * len(batch["look_pixel_values"]) == 16
    assert batch["look_frames"].shape == (5, 2, 4)


def test_crops_are_those_of_inference(looking):
    """In evaluation at the box of the row, in training at the box that the `<vis>` is read as."""
    config, processor, rows = looking[0].config, looking[1], looking_rows()
    size = rows[0]["height"], rows[0]["width"]
    slots = ((0, 0), (1, 0), (2, 1), (2, 3))
    for evaluation in (True, False):
        batch = collate(looking, rows, evaluation, wrong=0.0, drop=0.0)
        boxes = batch["boxes"] + batch["boxes_noise"]
        assert ((boxes >= 0) & (boxes <= 1)).all()
        for number, (row, slot) in enumerate(slots):
            assert batch["boxes_read"][row, slot] and not batch["masks_read"][row, slot]
            moved = batch["boxes_noise"][row, slot].abs().max()
            assert moved < 1e-6 if evaluation else moved > 1e-3
            pixels = boxes_from_square(boxes[row, slot], *size).tolist()
            crop = look_crop(pixels, *size, config.look_margin, config.look_min_side)
            expected = torch.from_numpy(processor.crop_pixels([rows[row]["image"].crop(crop)])[0])
            assert torch.equal(batch["look_pixel_values"][number], expected)
            frame = batch["look_frames"][row, 1 if slot == 3 else 0]
            torch.testing.assert_close(frame, torch.tensor(crop_frame(crop, *size)))


def test_draws_depend_on_row_and_epoch_alone(image_looking):
    model, processor = image_looking
    collator = PerceptionCollator(processor, model.config)
    first, again = collator(looking_rows()), collator(looking_rows()[::-1])
    assert torch.equal(first["boxes_noise"][0], again["boxes_noise"][4])
    assert torch.equal(first["look_pixel_values"][0], again["look_pixel_values"][-1])
    collator.set_epoch(1)
    assert (collator(looking_rows())["boxes_noise"][0, 0] - first["boxes_noise"][0, 0]).abs().max() > 1e-3


def test_losses_are_taken_in_the_frame_of_each_vis(looking):
    model, _ = looking
    batch = collate(looking, looking_rows()[:1])
    with torch.no_grad():
        outputs = model(**batch)
    predicted, targets = outputs.pred_boxes[0], batch["boxes"][0]
    if model.config.look_frame == "crop":
        frame = batch["look_frames"][0, 0]
        predicted = torch.stack([predicted[0], into_frame(predicted[1], frame)])
        targets = torch.stack([targets[0], into_frame(targets[1], frame)])
        # The mask that is learned there is the object as it lies on the crop's square.
        size = batch["masks"].shape[-1]
        x0, y0, x1, y1 = (targets[1] * size).round().int().tolist()
        inside = torch.zeros(size, size)
        inside[y0:y1, x0:x1] = 1
        assert (batch["masks"][0, 1] - inside).abs().mean() < 0.02
    _, giou = box_iou_and_giou(predicted, targets)
    config = model.config.box_config
    expected = config.l1_weight * (predicted - targets).abs().sum(-1) + config.giou_weight * (1 - giou)
    torch.testing.assert_close(outputs.loss_box, expected.mean(), atol=1e-4, rtol=1e-4)
    assert all(torch.isfinite(outputs[name]) for name in ("loss", "loss_mask", "loss_iou"))


def test_a_batch_is_its_rows(looking):
    model, rows = looking[0], looking_rows()
    batch = collate(looking, rows)
    with torch.no_grad():
        together = model(**{name: value for name, value in batch.items() if name != "labels"})
        for index, row in enumerate(rows):
            single = collate(looking, [row])
            alone = model(**{name: value for name, value in single.items() if name != "labels"})
            length = single["input_ids"].shape[1]
            torch.testing.assert_close(together.logits[index, :length], alone.logits[0], atol=1e-4, rtol=1e-4)
            if alone.pred_boxes is not None:
                number = alone.pred_boxes.shape[1]
                torch.testing.assert_close(together.pred_boxes[index, :number], alone.pred_boxes[0], atol=1e-4, rtol=0)


def test_packed_rows_are_rows_alone(looking):
    model, rows = looking[0], looking_rows()
    alone, packed = collate(looking, rows), collate(looking, rows, pack=8)
    assert packed["input_ids"].shape[0] == 1 and packed["look_frames"].shape == (1, 4, 4)
    with torch.no_grad():
        first, second = model(**alone), model(**packed)
    for name in ("loss", "loss_lm", "loss_box", "loss_mask"):
        torch.testing.assert_close(first[name], second[name], atol=1e-4, rtol=1e-4)
    slots = [len(row["boxes"]) for row in rows]
    boxes = torch.cat([first.pred_boxes[row, :count] for row, count in enumerate(slots)])
    valid = packed["boxes_valid"][0] & (packed["labels"].gather(1, vis_positions(model, packed))[0] != IGNORED_LABEL)
    torch.testing.assert_close(second.pred_boxes[0][valid], boxes[valid], atol=1e-4, rtol=0)


def vis_positions(model, batch) -> torch.Tensor:
    return (batch["input_ids"] == model.config.vis_token_id).nonzero()[:, 1][None]


@pytest.mark.parametrize("pack", [None, 8])
def test_the_first_view_is_hidden_behind_a_look_in_training_alone(looking, pack):
    model, rows = looking[0], looking_rows()
    config = model.config
    batch = collate(looking, rows, False, pack=pack, wrong=0.0, drop=1.0)
    mask = batch["attention_mask"]
    assert mask.dtype == torch.bool and mask.ndim == 4
    for row, ids in enumerate(batch["input_ids"]):
        images = ids == config.image_token_id
        position = batch["position_ids"][row]
        ended = False
        for place, token in enumerate(ids.tolist()):
            if place and position[place] <= position[place - 1]:
                ended = False  # another packed question
            if position[place] or not place:
                seen = mask[row, 0, place][images & (torch.arange(len(ids)) <= place)]
                assert not seen.any() if ended else seen.all()
            after = ids[place - 1] == config.look_pad_token_id if place else False
            ended |= bool(token == config.look_end_token_id and after)
    with torch.no_grad():
        assert torch.isfinite(model(**batch).loss)
    for other in (collate(looking, rows, True, pack=None, drop=1.0), collate(looking, rows, False, drop=0.0)):
        assert other["attention_mask"].ndim == 2


def test_what_is_hidden_changes_the_answer_alone(image_looking):
    """The mask reaches the language model: with it, what follows the look does not depend on how the image attends."""
    model, rows = image_looking[0], looking_rows()[1:2]
    hidden = collate(image_looking, rows, False, wrong=0.0, drop=1.0)
    shown = {**hidden, "attention_mask": torch.ones_like(hidden["input_ids"])}
    with torch.no_grad():
        first, second = model(**hidden).logits[0], model(**shown).logits[0]
    end = int((hidden["input_ids"][0] == model.config.look_end_token_id).nonzero())
    torch.testing.assert_close(first[: end + 1], second[: end + 1], atol=1e-4, rtol=1e-4)
    assert (first - second)[end + 1 :].abs().amax(-1).min() > 1e-3


def test_a_wrong_look_is_followed_by_another_or_by_the_first_view(image_looking):
    rows = looking_rows()
    config = image_looking[0].config
    batch = collate(image_looking, rows[:3], False, wrong=1.0, drop=1.0)
    looks = (batch["input_ids"] == config.look_token_id).sum(1).tolist()
    assert looks == [2, 2, 2]  # the third may not look once more, and what it says does not follow from the first view
    assert batch["attention_mask"].ndim == 4  # of the third alone: who looked elsewhere needs the first view
    images = batch["input_ids"] == config.image_token_id
    last = [int(row.nonzero()[-1]) for row in batch["labels"] != IGNORED_LABEL]
    sees = [bool(batch["attention_mask"][row, 0, last[row], images[row]].all()) for row in range(3)]
    assert sees == [True, True, False]
    for row, slots in ((0, 3), (1, 2)):
        assert batch["boxes_valid"][row].sum() == slots and (batch["boxes"][row, 0] == batch["boxes"][row, 1]).all()
        read = batch["boxes"][row] + batch["boxes_noise"][row]
        right, wrong = (box_iou_and_giou(read[slot], batch["boxes"][row, slot])[0] for slot in (1, 0))
        assert right > 0.2 and right > wrong
    with torch.no_grad():
        assert torch.isfinite(image_looking[0](**batch).loss)
    once = type(config).from_dict({**config.to_diff_dict(), "look_max": 1})
    collator = PerceptionCollator(image_looking[1], once, looks={"wrong": 1.0})
    batch = collator([rows[0], rows[1]])
    assert (batch["input_ids"] == config.look_token_id).sum(1).tolist() == [1, 1]
    moved = batch["boxes_noise"].abs().amax(-1)
    assert moved[0, 0] > 0.05
    assert validate_row(collator.looks.rewrite(rows[0]))[0]["wrong_look"]


def test_small_targets_are_looked_at(image_looking):
    refer, *_, dialogue, absent = drawn_rows(1)
    batch = collate(image_looking, [refer, dialogue, absent], below=0.9)
    looks = (batch["input_ids"] == image_looking[0].config.look_token_id).sum(1).tolist()
    assert looks == [1, 0, 0]  # three targets are more than two looks
    assert torch.equal(batch["boxes"][0, 0], batch["boxes"][0, 1])
    assert torch.equal(batch["masks"][0, 0], batch["masks"][0, 1])
    two = {**dialogue, "task": "dialogue"}
    answers = ("<vis><vis>", "And <vis>.")
    two["messages"] = [dialogue["messages"][0], {"role": "assistant", "content": answers[0]}]
    two["messages"] += [{"role": "user", "content": "More?"}, {"role": "assistant", "content": answers[1]}]
    looks = Looks(image_looking[1], image_looking[0].config, below=0.9, wrong=0.0)
    contents = [message["content"] for message in looks.rewrite(two)["messages"]]
    assert contents[1::2] == [f"{LOOK}<vis>" * 2, f"And {LOOK}<vis>."]  # at most two in each answer
    assert not (collate(image_looking, [refer], below=0.01)["input_ids"] == 104).any()
    model, processor = image_looking
    collator = PerceptionCollator(processor, model.config, looks={"below": 0.9})
    length = int(collator.for_evaluation()([refer])["attention_mask"].sum())
    assert collator.length(refer)[0] == length


def test_a_crop_of_nearly_the_whole_image_has_no_pads(make_tiny_model):
    parts = make_tiny_model(**{**PATCHES, "look_min_side": 500})
    batch = collate(parts, looking_rows())
    assert "look_pixel_values" not in batch
    config = parts[0].config
    assert not (batch["input_ids"] == config.look_pad_token_id).any()
    assert (batch["input_ids"] == config.look_token_id).sum() == 4
    assert torch.isfinite(parts[0](**batch).loss)


@pytest.mark.parametrize(
    "looks, message",
    [
        ({"scale": (0.0, 2.0)}, "scale"),
        ({"shift": 0.7}, "shift"),
        ({"below": 3.0}, "below"),
        ({"wrong": 2.0}, "wrong"),
    ],
)
def test_impossible_looks_are_refused(image_looking, looks, message):
    with pytest.raises(ValueError, match=message):
        collate(image_looking, looking_rows(), **looks)


def test_models_and_rows_that_do_not_fit_are_refused(make_tiny_model, image_looking):
    plain = make_tiny_model()
    with pytest.raises(ValueError, match="look_max.*is 0"):
        collate(plain, looking_rows(), below=0.5)
    with pytest.raises(ValueError, match="look"):
        PerceptionCollator(plain[1])(looking_rows())
    with pytest.raises(ValueError, match="wrong looks need"):
        collate(make_tiny_model(look_frame="crop", **PATCHES), looking_rows(), wrong=0.5)
    flash = type(image_looking[0].config).from_dict(image_looking[0].config.to_diff_dict())
    flash.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="looks.drop"):
        PerceptionCollator(image_looking[1], flash)
    many = looking_rows()[2]
    many["messages"][1]["content"] = f"{LOOK} {LOOK} {LOOK}"
    with pytest.raises(ValueError, match="3 looks in an answer"):
        collate(image_looking, [many])
    with pytest.raises(ValueError, match="model that does not look"):
        plain[0](**collate(image_looking, looking_rows()))


def test_every_new_row_gets_a_gradient(looking):
    model = looking[0].train()
    config = model.config
    model.zero_grad()
    model(**collate(looking, looking_rows(), False, wrong=0.0)).loss.backward()
    inputs, outputs = model.get_input_embeddings().weight.grad, model.lm_head.weight.grad
    for token in (config.look_token_id, config.look_end_token_id, config.look_pad_token_id):
        assert inputs[token].abs().max() > 0 and outputs[token].abs().max() > 0
    parameters = dict(model.model.named_parameters())
    for part in ("multi_modal_projector", "language_mixture", "position_table", "box_decoder", "mask_decoder"):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in parameters.items() if n.startswith(part))
    model.zero_grad()
    model.eval()


def test_gradient_checkpointing_gives_the_same_gradients(make_tiny_model):
    gradients = []
    for checkpointing in (False, True):
        parts = make_tiny_model(look_frame="crop", **PATCHES)
        model = parts[0].train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**collate(parts, looking_rows())).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["lora", "heads"])
def test_adapters_train_the_rows_of_looks(make_tiny_model, mode):
    parts = make_tiny_model(**PATCHES)
    model = add_adapter(parts[0], mode, rank=4)
    config = parts[0].config
    batch = collate(parts, looking_rows())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    assert model(**batch).loss < before
    merged = model.merge_and_unload()
    fresh = make_tiny_model(**PATCHES)[0]
    ids = [config.look_token_id, config.look_end_token_id, config.look_pad_token_id]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        moved = (getattr(merged, name)().weight - getattr(fresh, name)().weight).abs().amax(-1)
        assert (moved[ids] > 0).all() and (moved[:50] == 0).all()


def test_a_saved_checkpoint_looks_alike_in_other_processes(make_tiny_model, tmp_path):
    model, processor = make_tiny_model(look_frame="crop", **PATCHES)
    folder = tmp_path / "looking"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    expected = ask(model, processor)
    assert (expected["look_crops"][0].abs().sum(-1) > 0).tolist() == [True, True]
    again = PerceptionGPTForConditionalGeneration.from_pretrained(folder).eval()
    found = ask(again, PerceptionGPTProcessor.from_pretrained(folder))
    results = tmp_path / "results.pt"
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-I", str(Path(__file__).resolve()), str(folder), str(results)]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path, capture_output=True, timeout=300)
    for other in (found, torch.load(results)):
        for name in GENERATED:
            torch.testing.assert_close(other[name], expected[name])


def test_a_checkpoint_without_looks_learns_them(tiny_model_dir, tmp_path):
    folder = drawn_coco_folder(tmp_path)
    source = {"source": "coco", "annotations": str(folder / "instances.json"), "images": str(folder)}
    recipe = {
        "model": {"checkpoint": tiny_model_dir, "looks": {**PATCHES, "look_frame": "crop"}},
        "adapter": {"mode": "lora", "rank": 4},
        "data": {
            "train": source,
            "eval": {**source, "limit": 4},
            "generate_rows": 2,
            "generate_tokens": 4,
        },
        "collator": {"looks": {"below": 0.9}},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    training.main(["--config", str(path), "--output", str(tmp_path / "run")])
    model = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    processor = PerceptionGPTProcessor.from_pretrained(tmp_path / "run")
    assert (model.config.look_max, processor.look_tokens, processor.look_frame) == (2, 4, "crop")
    assert ask(model, processor)["look_crops"].abs().sum() > 0
    with pytest.raises(ValueError, match="model.looks.look_often"):
        complete_recipe({**recipe, "model": {**recipe["model"], "looks": {"look_often": 1}}})


def test_an_object_that_is_found_again_counts_once():
    row = looking_rows()[0]
    box = {"box": row["boxes"][0], "mask": np.ones((row["height"], row["width"]), dtype=bool)}
    assert score_answer(row, {"objects": [box]})[1] == 1.0 and score_answer(row, {"objects": [box, box]})[1] == 0.0


def test_frames_of_boxes_and_points_are_undone(image_looking):
    signals = image_looking[0].model.signals
    frames = torch.tensor([[[0.2, -0.1, 0.5, 0.2]]])
    for name, width in (("box", 4), ("point", 2)):
        values = torch.rand(1, 1, width)
        there = signals[name].into_frame(values, frames)
        torch.testing.assert_close(signals[name].out_of_frame(there, frames), values)
        torch.testing.assert_close(out_of_frame(there, frames), values)
    assert boxes_to_square([0, 0, 4, 4], 4, 4).tolist() == [0, 0, 1, 1]


def test_scenes_have_something_to_read():
    plain, written = (ScenesDataset(12, seed=5, size=256, glyphs=glyphs) for glyphs in (False, True))
    asked = 0
    for index in range(12):
        (first, second), glyphs = (
            [part.details(index, every_task=True)[0]["scene"] for part in (plain, written)],
            written.details(index, every_task=True),
        )
        assert [one.box for one in first.objects] == [one.box for one in second.objects]
        objects = [one for one in second.objects if one.glyph]
        assert objects or all(one.side < 20 for one in second.objects)
        changed = np.any(first.image != second.image, axis=-1)
        inside = np.zeros_like(changed)
        for one in objects:
            inside |= decode_rle(one.mask).astype(bool)
            assert changed[decode_rle(one.mask).astype(bool)].any() or one.hidden > 0.06
        # Elsewhere it shows at most through the soft edge of an object on top.
        assert (changed & ~inside).sum() <= 0.02 * changed.sum()
        rows = written.image_rows(index)
        for row, detail in zip(rows, glyphs, strict=True):
            if row["task"] == "grounded_vqa":
                target = second.objects[detail["targets"][0]]
                kind = "digit" if target.glyph.isdigit() else "letter"
                assert f"hich {kind} is on the {detail['text']}?" in row["messages"][0]["content"]
                assert row["messages"][1]["content"] == f"<p>The {detail['text']}</p><vis>: {target.glyph}."
                validate_row(row)
                asked += 1
    assert asked >= 3 and rows[0]["image_id"].startswith("256px-glyphs-")
    with pytest.raises(ValueError, match="glyphs"):
        ScenesDataset(1, seed=0, glyphs=True, paste="folder")
    with pytest.raises(ValueError, match="is defined"):
        ScenesDataset(1, seed=10**6, split="scenes-bench-1", glyphs=True)


def test_what_is_read_is_read_behind_a_look(image_looking):
    (row,) = ScenesDataset(40, seed=5, size=256, glyphs=True, tasks=["grounded_vqa"], kinds=["attribute"]).image_rows(0)
    model, processor = image_looking
    looks = Looks(processor, model.config, below=1.0, wrong=0.0)
    (content,) = [message["content"] for message in looks.rewrite(row)["messages"] if message["role"] == "assistant"]
    assert content == row["messages"][1]["content"].replace("<vis>", f"{LOOK}<vis>")
    assert torch.isfinite(model(**collate(image_looking, [row], False, below=1.0)).loss)


def test_visual_cot_answers_behind_a_look(tmp_path):
    record = {"question": "What does it say?", "answer": "stop", "image": "a.png", "bboxs": [[4, 5, 20, 30]]}
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata/some_train.jsonl").write_text(json.dumps({**record, "width": 60, "height": 40}))
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    for looks, expected in ((False, "<p>this part</p><vis>: stop"), (True, f"{LOOK} stop")):
        arguments = {"evaluation": True, "looks": looks, "tasks": ["grounded_vqa"]}
        (row,) = rows("viscot", root=str(tmp_path), images=str(tmp_path), **arguments)
        assert row["messages"][1]["content"] == expected and row["boxes"] == [[4, 5, 20, 30]]
