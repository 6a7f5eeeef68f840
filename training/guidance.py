"""Guidance: a layer of the language model is told which cells of the image to look at.

A box is read from one cell among hundreds. Until the model looks at the right one, the loss of the box says little.
Guidance adds minus the log of the attention that the heads of the middle layer pay to the cells of the target, from the
state that predicts its `<vis>`. It costs no further pass: the scores of those states are computed beside the attention.
"""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from perceptiongpt.data.collator import IGNORED_LABEL, packing_window


GUIDED = "guided_sdpa"
LEAST_CELLS = 1.5  # area of a box: of a smaller one, no cell may show the object


def cells_in_boxes(boxes: torch.Tensor, grid: int) -> torch.Tensor:
    """The cells whose centre lies in a box, and the cell of the box's centre.

    Args:
        boxes (`torch.Tensor` of shape `(n, 4)`): xyxy in 0..1 of the padded square.
        grid (`int`): cells per side.

    Returns:
        bool tensor of shape `(n, grid * grid)`.
    """
    centres = (torch.arange(grid, device=boxes.device) + 0.5) / grid
    nearest = ((boxes[:, :2] + boxes[:, 2:]) / 2 * grid).long().clamp(0, grid - 1)
    columns, rows = (
        ((centres >= boxes[:, axis, None]) & (centres <= boxes[:, axis + 2, None]))
        | (nearest[:, axis, None] == torch.arange(grid, device=boxes.device))
        for axis in (0, 1)
    )
    return (rows[:, :, None] & columns[:, None, :]).flatten(1)


class Guidance:
    """Computes the loss of the guided heads during a forward pass.

    Args:
        model: a `PerceptionGPTForConditionalGeneration`. The attention of its language model is set to `guided_sdpa`,
            which computes what sdpa does.

    Raises:
        ValueError: the language model does not call the library's attention interface, has another attention than
            sdpa, or sees only a window of a row, in which the image may not be.
    """

    def __init__(self, model):
        AttentionInterface.register(GUIDED, guided_attention)
        AttentionMaskInterface.register(GUIDED, sdpa_mask)
        layers = [module for module in model.model.language_model.modules() if hasattr(module, "q_proj")]
        if not layers:
            raise ValueError("guidance: the language model has no layers with `q_proj`; set guidance.weight to 0")
        implementation = model.config.text_config._attn_implementation
        if implementation not in ("sdpa", GUIDED) or packing_window(model.config) is not None:
            raise ValueError(
                f"guidance needs sdpa without sliding windows, and the language model has {implementation!r}; choose "
                "another model.attn_implementation, or set guidance.weight to 0"
            )
        model.set_attn_implementation({"text_config": GUIDED})
        self.config, self.targets, self.value = model.config, None, None
        layers[len(layers) // 2].guidance = self

    def watch(self, batch: dict[str, torch.Tensor]) -> None:
        """Say what the next pass looks for: the boxes in the answers of a batch of `PerceptionCollator`.

        Rows with several images are left out: it is not known which one is meant. So are boxes of less than
        `LEAST_CELLS` cells: what cannot be seen would only keep the heads from choosing.
        """
        ids, valid = batch["input_ids"], batch["boxes_valid"]
        self.targets, self.value = None, torch.zeros((), device=ids.device)
        is_vis, is_image = ids == self.config.vis_token_id, ids == self.config.image_token_id
        rows, positions = (is_vis & (batch["labels"] != IGNORED_LABEL)).nonzero(as_tuple=True)
        slots = (is_vis.cumsum(1) - 1)[rows, positions]
        told = valid[rows, slots] & (is_image.sum(1) == self.config.image_seq_length)[rows]
        sides = (batch["boxes"][rows, slots, 2:] - batch["boxes"][rows, slots, :2]) * self.config.image_grid
        told &= sides.prod(-1) >= LEAST_CELLS
        rows, positions, slots = rows[told], positions[told], slots[told]
        if len(rows):
            cells = cells_in_boxes(batch["boxes"][rows, slots], self.config.image_grid)
            targets = torch.zeros_like(is_image[rows]).masked_scatter(is_image[rows], cells)
            self.targets = rows, positions - 1, targets

    def look(self, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float) -> None:
        """Keep the loss of a layer.

        Args:
            query (`torch.Tensor` of shape `(B, heads, L, d)`), key (`torch.Tensor` of shape `(B, kv_heads, L, d)`).
            attention_mask (`torch.Tensor` of shape `(B, 1, L, L)`, *optional*): bool or added; `None` for causal.
            scaling (`float`): of the scores.
        """
        rows, positions, targets = self.targets
        groups, heads = query.shape[1] // key.shape[1], torch.arange(query.shape[1], device=query.device)
        query = query[rows[:, None], heads, positions[:, None]].float()
        key = key[rows[:, None], heads // groups].float()
        scores = torch.einsum("nhd,nhld->nhl", query, key) * scaling
        if attention_mask is None:
            allowed = torch.arange(scores.shape[-1], device=scores.device) <= positions[:, None]
        else:
            allowed = attention_mask[rows, 0, positions]
            allowed = allowed if allowed.dtype == torch.bool else allowed == 0
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        paid = scores.masked_fill(~targets[:, None], -torch.inf).logsumexp(-1) - scores.logsumexp(-1)
        self.value, self.targets = -paid.mean(), None


def guided_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """`sdpa`, and the guidance of the module where it has one that waits for a pass."""
    guidance = getattr(module, "guidance", None)
    if guidance is not None and guidance.targets is not None:
        guidance.look(query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
