"""
The box signal: a box in, one token embedding out; one hidden state in, a box out.

Boxes are `(x0, y0, x1, y1)` in 0..1 of the padded square, float32 from file to file: in bfloat16 a coordinate falls
into bins of 2.5 pixels at 640 pixels.
"""

import torch
from torch import nn
from torch.nn import functional as F


# Smallest side a predicted box can have, as a share of the square: keeps x0 < x1 in float32.
SMALLEST_SIDE = 1e-4


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever the dtype its weights were cast to."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(hidden_states.float(), self.weight.float(), bias)


class SignalEmbeddingNorm(nn.Module):
    """
    Scales a signal's embedding to the length that the language model's own token embeddings have.

    Args:
        hidden_size (`int`): width of the language model.
        root_mean_square (`float`): root mean square of the entries of a token embedding.
    """

    def __init__(self, hidden_size: int, root_mean_square: float):
        super().__init__()
        self.initial_value = root_mean_square
        self.weight = nn.Parameter(torch.full((hidden_size,), root_mean_square))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), eps=1e-6)


def normalize_states(states: torch.Tensor) -> torch.Tensor:
    """Hidden states `(..., hidden)` of any finite size in float32, with mean 0 and variance 1."""
    # Their squares stay finite, and with them whatever is decoded.
    states = states.float().clamp(-1e15, 1e15)
    return F.layer_norm(states, states.shape[-1:])


class BoxEncoder(nn.Module):
    """Three-layer MLP from a box to the embedding of its `<vis>` (paper, section 3.1)."""

    def __init__(self, config, text_hidden_size: int, embedding_rms: float):
        super().__init__()
        self.linear_1 = Float32Linear(4, config.hidden_size)
        self.linear_2 = Float32Linear(config.hidden_size, config.hidden_size)
        self.linear_3 = Float32Linear(config.hidden_size, text_hidden_size)
        self.norm = SignalEmbeddingNorm(text_hidden_size, embedding_rms)

    def forward(self, boxes: torch.Tensor) -> torch.Tensor:
        """`boxes` of shape `(..., 4)` to float32 embeddings of shape `(..., text_hidden_size)`."""
        hidden_states = F.gelu(self.linear_1(boxes.float() * 2 - 1))
        hidden_states = F.gelu(self.linear_2(hidden_states))
        return self.norm(self.linear_3(hidden_states))


class BoxDecoder(nn.Module):
    """Three-layer MLP from the hidden state that predicts a `<vis>` to a box and the IoU it expects to have."""

    def __init__(self, config, text_hidden_size: int):
        super().__init__()
        self.linear_1 = Float32Linear(text_hidden_size, config.hidden_size)
        self.linear_2 = Float32Linear(config.hidden_size, config.hidden_size)
        self.linear_3 = Float32Linear(config.hidden_size, 5)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            states (`torch.Tensor` of shape `(..., text_hidden_size)`): final-norm hidden states.

        Returns:
            `boxes` of shape `(..., 4)` with 0 <= x0 < x1 <= 1 for any state, and `iou` of shape `(...)` in 0..1.
        """
        hidden_states = F.gelu(self.linear_1(normalize_states(states)))
        hidden_states = F.gelu(self.linear_2(hidden_states))
        outputs = self.linear_3(hidden_states)
        # Size first, then where in the room that the size leaves: no clamp, so a box at the border keeps its gradient.
        # The room is sigmoid(-x), not 1 - sigmoid(x), which float32 rounds to 0 for a box that fills the square.
        room = (1 - SMALLEST_SIDE) * (-outputs[..., 0:2]).sigmoid()
        top_left = room * outputs[..., 2:4].sigmoid()
        bottom_right = 1 - room * (-outputs[..., 2:4]).sigmoid()
        return torch.cat([top_left, bottom_right], dim=-1), outputs[..., 4].sigmoid()


def box_iou_and_giou(boxes: torch.Tensor, other_boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    IoU and generalized IoU (Rezatofighi et al. 2019) of boxes pair by pair, `(..., 4)` xyxy each, of shape `(...)`.
    """
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    other_area = (other_boxes[..., 2:] - other_boxes[..., :2]).clamp(min=0).prod(-1)
    overlap = torch.minimum(boxes[..., 2:], other_boxes[..., 2:]) - torch.maximum(boxes[..., :2], other_boxes[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    union = area + other_area - intersection
    hull = torch.maximum(boxes[..., 2:], other_boxes[..., 2:]) - torch.minimum(boxes[..., :2], other_boxes[..., :2])
    hull_area = hull.prod(-1)
    tiny = torch.finfo(boxes.dtype).tiny
    iou = intersection / union.clamp(min=tiny)
    return iou, iou - (hull_area - union) / hull_area.clamp(min=tiny)


class BoxSignal:
    """The functions that every signal file has; the modules they run are attributes of the model."""

    values_name = "boxes"

    @staticmethod
    def build_modules(config, embedding_rms: float) -> dict[str, nn.Module]:
        """The modules of this signal, by the attribute names they get on the model."""
        width = config.text_config.hidden_size
        return {
            "box_encoder": BoxEncoder(config.box_config, width, embedding_rms),
            "box_decoder": BoxDecoder(config.box_config, width),
        }

    @staticmethod
    def encode(model, values: torch.Tensor) -> torch.Tensor:
        """Boxes `(N, 4)` to float32 embeddings `(N, hidden)`."""
        return model.box_encoder(values)

    @staticmethod
    def decode(model, states: torch.Tensor, image_features: torch.Tensor, image_index: torch.Tensor):
        """States `(N, hidden)` to boxes `(N, 4)` and predicted IoU `(N,)`; the picture is not needed."""
        return model.box_decoder(states)

    @staticmethod
    def loss(config, predictions: torch.Tensor, predicted_iou: torch.Tensor, targets: torch.Tensor):
        """
        Per box: L1 + GIoU (paper, section 3.2), and the squared error of the predicted IoU; both of shape `(N,)`.
        """
        iou, giou = box_iou_and_giou(predictions, targets.to(predictions))
        l1 = (predictions - targets).abs().sum(-1)
        signal_loss = config.box_config.l1_weight * l1 + config.box_config.giou_weight * (1 - giou)
        return signal_loss, config.box_config.iou_weight * (predicted_iou - iou.detach()).square()

    @staticmethod
    def pad(config, batch_size: int, slots: int, device) -> torch.Tensor:
        """Values that say nothing, `(batch_size, slots, 4)`: the whole square, on which no formula divides by 0."""
        return torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(batch_size, slots, 4)

    @staticmethod
    def to_result(values: torch.Tensor, predicted_iou: torch.Tensor, probability: torch.Tensor) -> dict:
        """What `generate` adds to its output: boxes `(S, K, 4)` and scores, p(`<vis>`) x predicted IoU, `(S, K)`."""
        return {"boxes": values, "object_scores": probability * predicted_iou}
