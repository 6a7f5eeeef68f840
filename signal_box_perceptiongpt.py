"""
The box signal: a box in, one token embedding out; one hidden state in, a box out.

Boxes are `(x0, y0, x1, y1)` in 0..1 of the padded square, float32 from file to file: in bfloat16 a coordinate falls
into bins of 2.5 pixels at 640 pixels.
"""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.configuration_utils import strict

from .geometry_perceptiongpt import boxes_from_square, boxes_to_square, clip_box, decode_mask, tight_box
from .look_geometry_perceptiongpt import into_frame, out_of_frame
from .signal_perceptiongpt import CoordinateEncoder, Signal, StateMLP


# Smallest side a predicted box can have, as a share of the square: keeps x0 < x1 in float32.
SMALLEST_SIDE = 1e-4
# In place of a box: the tight box of the mask beside it.
TIGHT = "tight"
# Jitter beyond so many standard deviations is cut off.
LARGEST_JITTER = 3


@strict
class PerceptionGPTBoxConfig(PreTrainedConfig):
    r"""
    Sizes and loss weights of the box signal.

    Args:
        hidden_size (`int`, defaults to 1024): width of the two hidden layers of the box encoder and decoder.
        l1_weight (`float`, defaults to 5.0): weight of the L1 term, summed over the four coordinates.
        giou_weight (`float`, defaults to 2.0): weight of the GIoU term.
        iou_weight (`float`, defaults to 1.0): weight of the squared error of the predicted IoU.
    """

    model_type = "perceptiongpt_box"
    base_config_key = "box_config"

    hidden_size: int = 1024
    l1_weight: float | int = 5.0
    giou_weight: float | int = 2.0
    iou_weight: float | int = 1.0


class BoxEncoder(CoordinateEncoder):
    """Three-layer MLP from a box `(..., 4)` to the embedding of its `<vis>` (paper, section 3.1)."""

    def __init__(self, config: PerceptionGPTBoxConfig, text_hidden_size: int, embedding_rms: float):
        super().__init__(4, config.hidden_size, text_hidden_size, embedding_rms)


class BoxDecoder(StateMLP):
    """Three-layer MLP from the hidden state that predicts a `<vis>` to a box and the IoU it expects to have."""

    def __init__(self, config: PerceptionGPTBoxConfig, text_hidden_size: int):
        super().__init__(text_hidden_size, config.hidden_size, 5)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            states (`torch.Tensor` of shape `(..., text_hidden_size)`): final-norm hidden states.

        Returns:
            `boxes` of shape `(..., 4)` with 0 <= x0 < x1 <= 1 for any state, and `iou` of shape `(...)` in 0..1.
        """
        outputs = super().forward(states)
        # Size first, then where in the room that the size leaves: no clamp, so a box at the border keeps its gradient.
        # The room is sigmoid(-x), not 1 - sigmoid(x), which float32 rounds to 0 for a box that fills the square.
        shares, others = outputs.sigmoid(), (-outputs).sigmoid()
        room = (1 - SMALLEST_SIDE) * others[..., 0:2]
        top_left = room * shares[..., 2:4]
        bottom_right = 1 - room * others[..., 2:4]
        return torch.cat([top_left, bottom_right], dim=-1), shares[..., 4]


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


class BoxSignal(Signal):
    """Boxes: the signal that every checkpoint has, since it is what is fed back."""

    name = "box"
    plural = "boxes"
    config_class = PerceptionGPTBoxConfig
    prediction_names = ("pred_boxes", "pred_box_iou")
    result_names = ("boxes", "object_scores")
    score_name = "score"
    column = ["float64"]
    fed_back = True
    takes_noise = True
    drawn_as = "box"

    def build_modules(self, config, embedding_rms: float) -> dict[str, nn.Module]:
        width = config.text_config.hidden_size
        return {
            "box_encoder": BoxEncoder(config.box_config, width, embedding_rms),
            "box_decoder": BoxDecoder(config.box_config, width),
        }

    def encode(self, model, values: torch.Tensor) -> torch.Tensor:
        """Boxes `(N, 4)` to float32 embeddings `(N, hidden_size)`."""
        return model.box_encoder(values)

    def decode(self, model, states: torch.Tensor, image_features: torch.Tensor, image_index: torch.Tensor):
        """States `(N, hidden_size)` to boxes `(N, 4)` and predicted IoU `(N,)`; the image is not needed."""
        return model.box_decoder(states)

    def loss(self, config, predictions: torch.Tensor, quality: torch.Tensor, targets: torch.Tensor):
        """
        Per box: L1 + GIoU (paper, section 3.2), and the squared error of the predicted IoU; both of shape `(N,)`.
        """
        iou, giou = box_iou_and_giou(predictions, targets.to(predictions))
        l1 = (predictions - targets).abs().sum(-1)
        signal_loss = config.box_config.l1_weight * l1 + config.box_config.giou_weight * (1 - giou)
        return signal_loss, config.box_config.iou_weight * (quality - iou.detach()).square()

    def pad(self, config, batch_size: int, slots: int, device) -> torch.Tensor:
        """The whole square, `(batch_size, slots, 4)`, on which no formula divides by 0."""
        return torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(batch_size, slots, 4)

    def default_target(self, item: dict):
        """A target mask without a box gets its tight box."""
        return TIGHT if item.get("mask") is not None else None

    def complete(self, value, item: dict, height: int, width: int):
        """`"tight"` as the tight box of the item's mask, xyxy pixels."""
        if isinstance(value, str) and value == TIGHT and item.get("mask") is not None:
            return tight_box(decode_mask(item["mask"], height, width))
        return value

    def into_frame(self, values: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return into_frame(values, frames)

    def out_of_frame(self, values: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return out_of_frame(values, frames)

    def parse(self, value, height: int, width: int, mask_size: int) -> np.ndarray:
        """xyxy in pixels to float32 xyxy in 0..1 of the square."""
        return boxes_to_square(clip_box(value, height, width), height, width).numpy()

    def empty(self, batch_size: int, slots: int, mask_size: int) -> np.ndarray:
        return np.zeros((batch_size, slots, 4), dtype=np.float32)

    def present(
        self, values: torch.Tensor, size: tuple[int, int] | None, mask_format: str | None, frames=None
    ) -> tuple:
        """Boxes `(N, 4)` in float32 xyxy pixels, and each as four floats."""
        boxes = values.float().cpu()
        boxes = boxes if size is None else boxes_from_square(boxes, *size)
        return boxes, boxes.tolist()

    def check_column(self, value, height: float, width: float) -> tuple[list[float], bool]:
        clipped = clip_box(value, height, width)
        return clipped, clipped != [float(number) for number in value]

    def draw_noise(self, values: torch.Tensor, generator, share: float) -> torch.Tensor:
        """Moves each corner of boxes `(K, 4)` by `share` of the box's side, but never out of the square."""
        drawn = torch.from_numpy(generator.standard_normal((len(values), 4))).float()
        jitter = drawn.clamp(-LARGEST_JITTER, LARGEST_JITTER) * share
        sides = (values[:, 2:] - values[:, :2]).repeat(1, 2)
        return (values + jitter * sides).clamp(0, 1) - values
