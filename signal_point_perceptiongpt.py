"""
The point signal: a point in, one token embedding out; one hidden state in, a point out.

Points are `(x, y)` in 0..1 of the padded square, float32 from file to file.
"""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.configuration_utils import strict

from .geometry_perceptiongpt import clip_point, letterbox
from .look_geometry_perceptiongpt import into_frame, out_of_frame
from .signal_perceptiongpt import CoordinateEncoder, Signal, StateMLP


@strict
class PerceptionGPTPointConfig(PreTrainedConfig):
    r"""
    Sizes and loss weights of the point signal.

    Args:
        hidden_size (`int`, defaults to 1024): width of the two hidden layers of the point encoder and decoder.
        l1_weight (`float`, defaults to 5.0): weight of the L1 term, summed over the two coordinates.
        score_weight (`float`, defaults to 1.0): weight of the squared error of the predicted score.
        score_scale (`float`, defaults to 0.05):
            The distance from its target, as a share of the square, at which a point deserves a score of 1/e.
    """

    model_type = "perceptiongpt_point"
    base_config_key = "point_config"

    hidden_size: int = 1024
    l1_weight: float | int = 5.0
    score_weight: float | int = 1.0
    score_scale: float | int = 0.05


class PointEncoder(CoordinateEncoder):
    """Three-layer MLP from a point `(..., 2)` to the embedding of its `<vis>`."""

    def __init__(self, config: PerceptionGPTPointConfig, text_hidden_size: int, embedding_rms: float):
        super().__init__(2, config.hidden_size, text_hidden_size, embedding_rms)


class PointDecoder(StateMLP):
    """Three-layer MLP from the hidden state that predicts a `<vis>` to a point and the score it expects to deserve."""

    def __init__(self, config: PerceptionGPTPointConfig, text_hidden_size: int):
        super().__init__(text_hidden_size, config.hidden_size, 3)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            states (`torch.Tensor` of shape `(..., text_hidden_size)`): final-norm hidden states.

        Returns:
            `points` of shape `(..., 2)` in 0..1, and `score` of shape `(...)` in 0..1.
        """
        outputs = super().forward(states).sigmoid()
        return outputs[..., :2], outputs[..., 2]


class PointSignal(Signal):
    """Points: a click of the user, or where the model points."""

    name = "point"
    plural = "points"
    config_class = PerceptionGPTPointConfig
    prediction_names = ("pred_points", "pred_point_score")
    result_names = ("points", "object_point_scores")
    score_name = "point_score"
    column = ["float64"]
    drawn_as = "dot"

    def build_modules(self, config, embedding_rms: float) -> dict[str, nn.Module]:
        width = config.text_config.hidden_size
        return {
            "point_encoder": PointEncoder(config.point_config, width, embedding_rms),
            "point_decoder": PointDecoder(config.point_config, width),
        }

    def encode(self, model, values: torch.Tensor) -> torch.Tensor:
        """Points `(N, 2)` to float32 embeddings `(N, hidden_size)`."""
        return model.point_encoder(values)

    def decode(self, model, states: torch.Tensor, image_features: torch.Tensor, image_index: torch.Tensor):
        """States `(N, hidden_size)` to points `(N, 2)` and predicted scores `(N,)`; the image is not needed."""
        return model.point_decoder(states)

    def loss(self, config, predictions: torch.Tensor, quality: torch.Tensor, targets: torch.Tensor):
        """
        Per point: L1, and the squared error of the predicted score; both of shape `(N,)`.

        The score that a point deserves is exp(-distance / `score_scale`). Whether it lies inside the object would say
        more, but only where a mask is known: the same score would then mean two things. The distance is always known,
        and since the target is the deepest pixel of its object, a point near to it lies inside.
        """
        weights = config.point_config
        difference = predictions - targets.to(predictions)
        deserved = (-difference.detach().norm(dim=-1) / weights.score_scale).exp()
        return weights.l1_weight * difference.abs().sum(-1), weights.score_weight * (quality - deserved).square()

    def pad(self, config, batch_size: int, slots: int, device) -> torch.Tensor:
        """The centre of the square, `(batch_size, slots, 2)`."""
        return torch.full((1, 1, 2), 0.5, device=device).expand(batch_size, slots, 2)

    def into_frame(self, values: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return into_frame(values, frames)

    def out_of_frame(self, values: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return out_of_frame(values, frames)

    def parse(self, value, height: int, width: int, mask_size: int) -> np.ndarray:
        """[x, y] in pixels to float32 xy in 0..1 of the square."""
        side, top, left = letterbox(height, width)
        return ((np.array(clip_point(value, height, width)) + [left, top]) / side).astype(np.float32)

    def empty(self, batch_size: int, slots: int, mask_size: int) -> np.ndarray:
        return np.zeros((batch_size, slots, 2), dtype=np.float32)

    def present(
        self, values: torch.Tensor, size: tuple[int, int] | None, mask_format: str | None, frames=None
    ) -> tuple:
        """Points `(N, 2)` in float32 xy pixels, those in the padding clipped to the image; and each as two floats."""
        points = values.float().cpu()
        if size is not None:
            height, width = size
            side, top, left = letterbox(height, width)
            pixels = points.double() * side - torch.tensor([left, top])
            points = pixels.clamp(min=0).minimum(pixels.new_tensor([width, height])).float()
        return points, points.tolist()

    def check_column(self, value, height: float, width: float) -> tuple[list[float], bool]:
        clipped = clip_point(value, height, width)
        return clipped, clipped != [float(number) for number in value]
