"""inference.py: what is loaded, whose code runs, and what an answer says."""

import json
import shutil

import pytest
import torch

from drawn_rows import drawn_coco_folder, drawn_rows
from perceptiongpt import PerceptionGPTProcessor, inference
from perceptiongpt import train as training
from perceptiongpt.data.schema import row_to_messages
from perceptiongpt.training.recipe import complete_recipe


def conversations(rows: list[dict]) -> tuple[list, list]:
    """The messages before the answers, and the sizes of the images."""
    return [row_to_messages(row)[:-1] for row in rows], [(row["height"], row["width"]) for row in rows]


def test_answers_of_a_batch(tiny_model_dir):
    model, processor = inference.load(tiny_model_dir, "cpu", "float32")
    assert not model.training and isinstance(processor, PerceptionGPTProcessor)
    messages, sizes = conversations(drawn_rows(2)[3::5])
    results = inference.answer(model, processor, messages, sizes, max_new_tokens=3)
    for result in results:
        assert {"text", "objects", "tokens", "finished"} <= set(result)
        assert result["tokens"] == 3 or result["finished"]
    alone = inference.answer(model, processor, messages[1:], sizes[1:], max_new_tokens=3)
    assert alone[0]["text"] == results[1]["text"]
    sampled = inference.answer(model, processor, messages, sizes, max_new_tokens=2, do_sample=True, mask_format=None)
    assert all(found["mask"] is None for result in sampled for found in result["objects"])


def test_grounded_answers_are_the_free_ones_up_to_their_first_object(tiny_model_dir):
    model, processor = inference.load(tiny_model_dir, "cpu", "float32")
    messages, sizes = conversations(drawn_rows(2)[3::5])
    inputs = inference.prepare_inputs(model, processor, messages, add_generation_prompt=True)
    with torch.no_grad():  # the first question is answered with an object, again and again
        state = model(**inputs, logits_to_keep=1).last_hidden_state[:, -1]
        direction = state[0] - state[1] * (state[0] @ state[1]) / (state[1] @ state[1])
        model.lm_head.weight[processor.vis_token_id] = direction * 100
    options = {"max_new_tokens": 4, "mask_format": None}
    free = inference.answer(model, processor, messages, sizes, **options)
    grounded = inference.answer(model, processor, messages, sizes, ground=True, **options)
    assert (grounded[0]["tokens"], grounded[0]["finished"]) == (1, True) and len(grounded[0]["objects"]) == 1
    assert grounded[0]["objects"][0]["box"] == pytest.approx(free[0]["objects"][0]["box"], abs=1e-3)
    first = grounded[1]["objects"], grounded[1]["text"], grounded[1]["tokens"], grounded[1]["finished"]
    assert first == (free[1]["objects"], free[1]["text"], free[1]["tokens"], free[1]["finished"])
    assert free[1]["tokens"] > 1


def test_the_length_of_an_answer_counts_its_end(tiny_model_dir, monkeypatch):
    model, processor = inference.load(tiny_model_dir, "cpu")
    messages, sizes = conversations(drawn_rows(1)[:2])
    end = model.generation_config.eos_token_id
    end = end[0] if isinstance(end, list) else end
    generate = model.generate

    def ending(**kwargs):
        output = generate(**kwargs)
        output.sequences[0, output.prompt_length :] = torch.tensor([7, end, 0, 0])
        output.sequences[1, output.prompt_length :] = 7
        return output

    monkeypatch.setattr(model, "generate", ending)
    found = inference.answer(model, processor, messages, sizes, max_new_tokens=4, min_new_tokens=4)
    assert [(result["tokens"], result["finished"]) for result in found] == [(2, True), (4, False)]


def test_refused_conversations_do_not_stop_the_others(tiny_model_dir):
    model, processor = inference.load(tiny_model_dir, "cpu")
    messages, sizes = conversations(drawn_rows(1)[:3])
    messages[1][0]["content"].append({"type": "text", "text": "a typed <vis>"})
    with pytest.raises(inference.RefusedError, match="<vis>"):
        inference.answer(model, processor, messages, sizes, max_new_tokens=2)
    found = inference.answer_each(model, processor, messages, sizes, max_new_tokens=2)
    assert ["error" in result for result in found] == [False, True, False] and "<vis>" in found[1]["error"]


def test_an_adapter_answers_as_the_merged_model(tiny_model_dir, tmp_path):
    source = drawn_coco_folder(tmp_path)
    recipe = {
        "model": {"checkpoint": tiny_model_dir},
        "adapter": {"mode": "lora", "rank": 4},
        "data": {"train": {"annotations": str(source / "instances.json"), "images": str(source)}},
        "training": {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "learning_rate": 1e-2},
    }
    training.train(complete_recipe(recipe), tmp_path / "run")
    messages, sizes = conversations(drawn_rows(1)[:2])
    answers = []
    for folder in ("run", "run/adapter"):
        model, processor = inference.load(str(tmp_path / folder), "cpu")
        inputs = inference.prepare_inputs(model, processor, messages, add_generation_prompt=True)
        answers.append(model(**inputs).logits)
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


def test_code_of_a_checkpoint_does_not_run_unasked(tiny_model_dir, tmp_path):
    """The registered classes are used; a checkpoint of another type needs `trust_remote_code`."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for folder in (ours, other):
        shutil.copytree(tiny_model_dir, folder)
        for path in folder.glob("*.py"):
            path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    model, _ = inference.load(str(ours), "cpu")
    assert type(model).__module__.startswith("perceptiongpt.")
    config = json.loads((other / "config.json").read_text()) | {"model_type": "unknown_perception"}
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(inference.InputError, match="trust_remote_code"):
        inference.load(str(other), "cpu")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(AttributeError):  # what runs then defines no class
        inference.load(str(other), "cpu", trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_checkpoints_of_other_kinds(tiny_backbones, tmp_path):
    with pytest.raises(inference.InputError, match="there is no such folder"):
        inference.load("nowhere")
    with pytest.raises(inference.InputError, match="not a checkpoint that can be loaded"):
        inference.load(tiny_backbones().text)
