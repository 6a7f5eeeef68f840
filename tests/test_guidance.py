"""Guidance of attention heads: its loss, what it is told, and where it is refused."""

import pytest
import torch

from drawn_rows import drawn_rows
from perceptiongpt.data.collator import PerceptionCollator
from perceptiongpt.training import guidance as guiding
from perceptiongpt.training.guidance import NUM_HEADS, Guidance, cells_in_boxes


@pytest.mark.parametrize("pack", [None, 3])
def test_it_is_minus_the_log_of_the_attention_to_the_target(make_tiny_model, monkeypatch, pack):
    """As from the attention maps of the eager implementation; guided attention itself changes nothing."""
    monkeypatch.setattr(guiding, "LEAST_CELLS", 0.0)
    model, processor = make_tiny_model()
    rows = [row for row in drawn_rows() if row["task"] == "refer"][:4]
    batch = PerceptionCollator(processor, model.config, box_jitter=0.0, pack=pack)(rows)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        expected = model(**batch, output_attentions=True)
        guidance = Guidance(model)
        guidance.watch(batch)
        looking, positions, targets = guidance.targets
        found = model(**batch)
    assert len(looking) == 4
    answers = (batch["input_ids"] == model.config.vis_token_id) & (batch["labels"] != -100)
    assert torch.equal(torch.stack([looking, positions + 1], 1), answers.nonzero())
    middle = expected.attentions[len(expected.attentions) // 2]
    paid = (middle[looking, :NUM_HEADS, positions] * targets[:, None]).sum(-1)
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
