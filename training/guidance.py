"""Guidance: attention heads of the language model are told which cells of the image to look at.

A box is read from one cell among hundreds. Until the model looks at the right one, the loss of the box says little.
Guidance adds minus the log of the attention that two heads pay to the cells of the target: in one layer from the words
of the question, in the next from the state that predicts the `<vis>`. It costs no further pass: the scores of those few
tokens are computed beside the attention.
"""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


GUIDED = "guided_sdpa"
NUM_HEADS = 2
NUM_WORDS = 12
IGNORED_LABEL = -100


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

    In the layer before the middle one, some of the words before an answer should look at the target: the attention that
    the last `NUM_WORDS` of them pay on average counts. In the middle layer the state that predicts the `<vis>` should.

    Args:
        model: a `PerceptionGPTForConditionalGeneration`. The attention of its language model is set to `guided_sdpa`,
            which computes what sdpa does.

    Raises:
        ValueError: the language model does not call the library's attention interface, or has a single layer.
    """

    def __init__(self, model):
        AttentionInterface.register(GUIDED, guided_attention)
        AttentionMaskInterface.register(GUIDED, sdpa_mask)
        layers = [module for module in model.model.language_model.modules() if hasattr(module, "q_proj")]
        if len(layers) < 2:
            raise ValueError("guidance: the language model has not two layers with `q_proj`; set guidance.weight to 0")
        model.set_attn_implementation({"text_config": GUIDED})
        self.config, self.looks, self.losses = model.config, {}, []
        middle = len(layers) // 2
        for name, layer in (("words", layers[middle - 1]), ("states", layers[middle])):
            layer.guidance, layer.guided = self, name

    def watch(self, batch: dict[str, torch.Tensor]) -> None:
        """Say what the next pass looks for: the boxes in the answers of a batch of `PerceptionCollator`.

        Rows with several images are left out: it is not known which one is meant.
        """
        ids, valid = batch["input_ids"], batch["boxes_valid"]
        self.looks, self.losses = {}, []
        is_vis, is_image = ids == self.config.vis_token_id, ids == self.config.image_token_id
        rows, positions = (is_vis & (batch["labels"] != IGNORED_LABEL)).nonzero(as_tuple=True)
        slots = (is_vis.cumsum(1) - 1)[rows, positions]
        told = valid[rows, slots] & (is_image.sum(1) == self.config.image_seq_length)[rows]
        rows, positions, slots = rows[told], positions[told] - 1, slots[told]
        if len(rows):
            cells = cells_in_boxes(batch["boxes"][rows, slots], self.config.image_grid)
            targets = torch.zeros_like(is_image[rows]).masked_scatter(is_image[rows], cells)
            before = (positions[:, None] - torch.arange(1, NUM_WORDS + 1, device=ids.device)).clamp(min=0)
            self.looks = {
                "words": (rows, positions, before, ~is_image[rows[:, None], before], targets),
                "states": (rows, positions, positions[:, None], torch.ones_like(positions[:, None] > 0), targets),
            }

    @property
    def value(self) -> torch.Tensor:
        """The loss of the last pass, the mean over its layers; 0 if nothing was looked for."""
        return torch.stack(self.losses).mean() if self.losses else torch.zeros(())

    def look(self, name: str, query: torch.Tensor, key: torch.Tensor, attention_mask, scaling: float) -> None:
        """Keep the loss of a layer.

        Args:
            name: `words` or `states`.
            query (`torch.Tensor` of shape `(B, heads, L, d)`), key (`torch.Tensor` of shape `(B, kv_heads, L, d)`).
            attention_mask (`torch.Tensor` of shape `(B, 1, L, L)`, *optional*): bool or added; `None` for causal.
            scaling (`float`): of the scores.
        """
        rows, states, positions, counts, targets = self.looks.pop(name)
        groups, heads = query.shape[1] // key.shape[1], torch.arange(NUM_HEADS, device=query.device)
        query = query[rows[:, None, None], heads[:, None], positions[:, None]].float()
        key = key[rows[:, None], heads // groups].float()
        scores = torch.einsum("nhpd,nhld->nhpl", query, key) * scaling
        if attention_mask is None:
            allowed = torch.arange(scores.shape[-1], device=scores.device) <= positions[..., None]
            same = torch.ones_like(counts)
        else:
            allowed = attention_mask[rows[:, None], 0, positions]
            same = attention_mask[rows[:, None], 0, states[:, None], positions]  # words of other packed questions
            allowed, same = (one if one.dtype == torch.bool else one == 0 for one in (allowed, same))
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        paid = scores.masked_fill(~targets[:, None, None], -torch.inf).logsumexp(-1) - scores.logsumexp(-1)
        counts = (counts & same)[:, None].expand_as(paid)
        has_any = counts.any(-1)
        paid = paid.masked_fill(~counts, -torch.inf)[has_any].logsumexp(-1) - counts.sum(-1)[has_any].log()
        self.losses.append(-paid.sum() / has_any.sum().clamp(min=1))


def guided_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """`sdpa`, and the guidance of the module where it has one that waits for a pass."""
    guidance = getattr(module, "guidance", None)
    if guidance is not None and module.guided in guidance.looks:
        guidance.look(
            module.guided, query, key, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
