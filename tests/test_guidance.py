"""Guidance of attention heads: its loss, what it is told, and where it is refused."""

import pytest
import torch

from drawn_rows import drawn_coco_folder, drawn_rows
from perceptiongpt.data.collator import PerceptionCollator
from perceptiongpt.train import train
from perceptiongpt.training import guidance as guiding
from perceptiongpt.training.guidance import Guidance, cells_in_boxes
from perceptiongpt.training.recipe import complete_recipe


@pytest.mark.parametrize("pack", [None, 3])
def test_it_is_minus_the_log_of_the_attention_to_the_target(make_tiny_model, monkeypatch, pack):
    """As from the attention maps of the eager implementation; guided attention itself changes nothing."""
    monkeypatch.setattr(guiding, "LEAST_CELLS", 0.0)
    model, processor = make_tiny_model()
    rows = [row for row in drawn_rows() if row["task"] == "refer"][:4]
    batch = PerceptionCollator(processor, model.config, box_jitter=0.0, pack=pack)(rows)
    with torch.no_grad():
        model.set_attn_implementation({"text_config": "eager"})
        expected = model(**batch, output_attentions=True)
        model.set_attn_implementation({"text_config": "sdpa"})
        guidance = Guidance(model)
        guidance.watch(batch)
        looking, positions, targets = guidance.targets
        found = model(**batch)
    assert len(looking) == 4
    answers = (batch["input_ids"] == model.config.vis_token_id) & (batch["labels"] != -100)
    assert torch.equal(torch.stack([looking, positions + 1], 1), answers.nonzero())
    middle = expected.attentions[len(expected.attentions) // 2]
    paid = (middle[looking, :, positions] * targets[:, None]).sum(-1)
    assert float(guidance.value) == pytest.approx(float(-paid.log().mean()), rel=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_nothing_is_told_without_boxes(make_tiny_model):
    model, processor = make_tiny_model()
    rows = [row for row in drawn_rows() if row["task"] == "no_target"][:2]
    guidance = Guidance(model)
    batch = PerceptionCollator(processor, model.config)(rows)
    guidance.watch(batch)
    model(**batch)
    assert guidance.targets is None and guidance.value == 0


def test_small_boxes_are_left_out(make_tiny_model):
    model, processor = make_tiny_model()
    rows = [row for row in drawn_rows() if row["task"] == "refer"][:2]
    batch = PerceptionCollator(processor, model.config, box_jitter=0.0)(rows)
    batch["boxes"][:, 0] = torch.tensor([[0.0, 0.0, 0.4, 0.2], [0.0, 0.0, 0.4, 0.5]])  # 1.28 and 3.2 of 16 cells
    guidance = Guidance(model)
    guidance.watch(batch)
    assert guidance.targets[0].tolist() == [1]


def test_cells_in_boxes():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.25], [0.49, 0.6, 0.51, 0.62]])
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[0, 0, :2] = True  # centres at 1/8, 3/8, ..
    expected[1, 2, 2] = True  # no centre inside: the cell of the box's own
    assert torch.equal(cells_in_boxes(boxes, 4).reshape(2, 4, 4), expected)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_is_guided_and_evaluated(tiny_model_dir, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(guiding, "LEAST_CELLS", 0.0)  # the tiny model has large cells
    folder = drawn_coco_folder(tmp_path)
    source = {"annotations": str(folder / "instances.json"), "images": str(folder)}
    recipe = {
        "model": {"checkpoint": tiny_model_dir},
        "adapter": {"mode": mode, "rank": 4},
        "data": {"train": source, "eval": source, "generate_rows": 0},
        "guidance": {"weight": 0.5},
        "training": {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1, "use_cpu": True},
    }
    history = train(complete_recipe(recipe), tmp_path / "run").state.log_history
    guided = [entry["loss_guidance"] for entry in history if "loss_guidance" in entry]
    assert len(guided) == 2 and min(guided) > 0
    terms = next(entry for entry in history if "loss_lm" in entry)
    names = ("loss_lm", "loss_box", "loss_mask", "loss_point", "loss_iou", "loss_guidance")
    assert terms["loss"] == pytest.approx(sum(terms[name] for name in names), rel=1e-3)
    (evaluated,) = [entry for entry in history if "eval_loss" in entry]
    assert "eval_loss_box" in evaluated and "eval_loss_guidance" not in evaluated


def test_other_attention_is_refused(make_tiny_model):
    for family, implementation in (("llama", "eager"), ("mistral", "sdpa")):
        model, _ = make_tiny_model(family)
        model.set_attn_implementation({"text_config": implementation})
        if family == "mistral":
            model.config.text_config.sliding_window = 40
        with pytest.raises(ValueError, match="sdpa without sliding windows"):
            Guidance(model)
