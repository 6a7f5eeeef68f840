"""Guidance of attention heads: its loss, what it is told, and where it is refused."""

import numpy as np
import pytest
import torch

from backbones import TINY_IMAGE_SIZE, TINY_PATCH_SIZE
from drawn_rows import drawn_rows
from perceptiongpt.data.collator import PerceptionCollator
from perceptiongpt.training.guidance import NUM_HEADS, NUM_WORDS, Guidance, cells_in_boxes


GRID = TINY_IMAGE_SIZE // TINY_PATCH_SIZE


@pytest.mark.parametrize("pack", [None, 3])
def test_it_is_minus_the_log_of_the_attention_to_the_target(make_tiny_model, pack):
    """As from the attention maps of the eager implementation; guided attention itself changes nothing."""
    model, processor = make_tiny_model()
    rows = [row for row in drawn_rows() if row["task"] == "refer"][:4]
    batch = PerceptionCollator(processor, model.config, box_jitter=0.0, pack=pack)(rows)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        eager = model(**batch, output_attentions=True)
        guidance = Guidance(model)
        guidance.watch(batch)
        found = model(**batch)
    torch.testing.assert_close(found.loss, eager.loss, rtol=1e-5, atol=1e-6)

    ids, middle = batch["input_ids"], len(eager.attentions) // 2
    slots = (ids == model.config.vis_token_id).cumsum(1) - 1
    is_image = ids == model.config.image_token_id
    of_words, of_states = [], []
    for row, position in ((ids == model.config.vis_token_id) & (batch["labels"] != -100)).nonzero().tolist():
        slot, state = slots[row, position], position - 1
        if not batch["boxes_valid"][row, slot]:
            continue
        cells = is_image[row].nonzero()[:, 0][cells_in_boxes(batch["boxes"][row, slot][None], GRID)[0]]
        reached = eager.attentions[-1][row, 0, state] > 0  # not the words of questions that are packed beside it
        words = [word for word in range(state - NUM_WORDS, state) if not is_image[row, word] and reached[word]]
        for head in range(NUM_HEADS):
            of_words.append(np.mean([eager.attentions[middle - 1][row, head, word, cells].sum() for word in words]))
            of_states.append(float(eager.attentions[middle][row, head, state, cells].sum()))
    assert len(of_words) == 4 * NUM_HEADS
    expected = -(np.log(of_words).mean() + np.log(of_states).mean()) / 2
    assert float(guidance.value) == pytest.approx(expected, rel=1e-4)


def test_nothing_is_told_without_boxes(make_tiny_model):
    model, processor = make_tiny_model()
    rows = [row for row in drawn_rows() if row["task"] == "no_target"][:2]
    guidance = Guidance(model)
    batch = PerceptionCollator(processor, model.config)(rows)
    guidance.watch(batch)
    model(**batch)
    assert not guidance.looks and guidance.value == 0


def test_cells_in_boxes():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.25], [0.49, 0.6, 0.51, 0.62]])
    expected = torch.zeros(2, 4, 4, dtype=torch.bool)
    expected[0, 0, :2] = True  # centres at 1/8, 3/8, ..
    expected[1, 2, 2] = True  # no centre inside: the cell of the box's own
    assert torch.equal(cells_in_boxes(boxes, 4).reshape(2, 4, 4), expected)
