"""
From the vision tower to features: maps of one width from towers that are plain ViTs or pyramids, their learned mixture,
the position table and the projector.
"""

import inspect
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .signal_mask_perceptiongpt import sine_position_table


# Towers whose `reshaped_hidden_states` have the channels last; those of all others have them first.
CHANNELS_LAST_TOWERS = ("hiera",)


def feature_maps(outputs, model_type: str) -> tuple[torch.Tensor, ...]:
    """The hidden states of a pyramid tower as maps `(images, channels, height, width)`, the embeddings first."""
    maps = getattr(outputs, "reshaped_hidden_states", None)
    if maps is None:
        maps = outputs.hidden_states
    elif model_type in CHANNELS_LAST_TOWERS:
        maps = tuple(feature_map.permute(0, 3, 1, 2) for feature_map in maps)
    return tuple(maps)


@torch.no_grad()
def find_stages(tower: nn.Module, image_size: int) -> list[dict[str, int]]:
    """
    The stages of a pyramid tower: the last map of each size, found by encoding one blank image.

    Returns:
        `list[dict]`, finest first: `layer`, the index of the map in [`feature_maps`], and its `channels` and `grid`.
    """
    weight = next(tower.parameters())
    was_training = tower.training
    blank = torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device)
    outputs = tower.eval()(blank, output_hidden_states=True, return_dict=True)
    tower.train(was_training)
    stages = {}
    for layer, feature_map in enumerate(feature_maps(outputs, tower.config.model_type)):
        channels, height, width = feature_map.shape[1:]
        stages[height, width] = {"layer": layer, "channels": channels, "grid": height}
    return sorted(stages.values(), key=lambda stage: -stage["grid"])


def has_absolute_positions(tower: nn.Module) -> bool:
    """Whether a tower has position embeddings that tell where in the image a patch lies."""
    names = [name for name, _ in [*tower.named_parameters(), *tower.named_buffers()] if "relative" not in name]
    return any("position_embedding" in name or "pos_embed" in name for name in names)


def resample(feature_map: torch.Tensor, grid: int) -> torch.Tensor:
    """`(images, channels, height, width)` to `(images, channels, grid, grid)`: means of cells, or bilinear if finer."""
    if feature_map.shape[-1] == grid:
        return feature_map
    if feature_map.shape[-1] > grid:
        return F.adaptive_avg_pool2d(feature_map, grid)
    return F.interpolate(feature_map, size=grid, mode="bilinear", align_corners=False)


class VisionStages(nn.Module):
    """
    One linear map for each stage of a pyramid tower, to the width that all stages share.

    Args:
        channels (`list[int]`): width of each stage, finest first.
        feature_size (`int`): the common width.
    """

    def __init__(self, channels: list[int], feature_size: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in channels)
        self.projections = nn.ModuleList(nn.Linear(width, feature_size) for width in channels)

    def forward(self, stages: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Maps `(images, channels[i], height, width)` to maps `(images, feature_size, height, width)`."""
        return tuple(
            projection(norm(stage.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            for norm, projection, stage in zip(self.norms, self.projections, stages, strict=True)
        )


class FeatureMixture(nn.Module):
    """
    Learned mixture of all layers of the vision tower, `V = sum_i softmax(a)_i V_i` (paper, equation 1).

    With `initial_layer` the mixture starts exactly at that layer and a gate, 0 at first, lets the softmax in: one logit
    alone would have to be so large that its softmax passes no gradient to the others.
    """

    def __init__(self, num_layers: int, initial_layer: int | None = None):
        super().__init__()
        self.initial_layer = initial_layer
        self.logits = nn.Parameter(torch.zeros(num_layers))
        if initial_layer is not None:
            self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`layers`: n tensors `(images, cells, width)`. A running sum: the layers are never stacked."""
        weights = self.logits.float().softmax(0)
        if self.initial_layer is not None:
            base = torch.zeros_like(weights)
            base[self.initial_layer] = 1.0
            weights = base + self.gate.float() * (weights - base)
        first, *others = weights.to(layers[0].dtype).unbind()
        mixture = first * layers[0]
        for weight, layer in zip(others, layers[1:], strict=True):
            mixture = torch.addcmul(mixture, weight, layer)
        return mixture


class PositionTable(nn.Module):
    """
    Adds a fixed 2-D position table times a learned gain: a fresh tower says nothing of where its patches lie.

    The table is laid out at `AMPLITUDE` times each image's features, whatever scale a tower works at: enough for a
    linear probe of the projected tokens to find the patch with R2 > 0.9, be the fresh tower CLIP, SigLIP or DINOv2.
    """

    AMPLITUDE = 4.0

    def __init__(self, initial_gain: float):
        super().__init__()
        self.initial_gain = initial_gain
        self.gain = nn.Parameter(torch.full((1,), initial_gain))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`features` of shape `(images, grid * grid, width)`."""
        table = sine_position_table(math.isqrt(features.shape[1]), features.shape[2], features.device)
        scale = features.detach().float().square().mean((1, 2), keepdim=True).sqrt()
        return features + (self.gain.float() * self.AMPLITUDE * scale * table).to(features.dtype)


class PerceptionGPTMultiModalProjector(nn.Module):
    """Two-layer MLP from the features' width to the language model's, named as LLaVA names it."""

    def __init__(self, config):
        super().__init__()
        text_width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.feature_size, text_width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_width, text_width, bias=bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))


def tower_layers(tower: nn.Module, vision_config, pixel_values: torch.Tensor, **kwargs):
    """
    One pass of the tower.

    Args:
        pixel_values (`torch.Tensor` of shape `(images, 3, S, S)`): a plain ViT interpolates its position embeddings
            where S is not its own image size.

    Returns:
        the outputs of the tower with `hidden_states`.
    """
    own_size = getattr(vision_config, "image_size", None)
    own_size = own_size[0] if isinstance(own_size, (list, tuple)) else own_size
    # DINOv2 and convolutions take other sizes without being asked.
    if pixel_values.shape[-1] != own_size and "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        kwargs["interpolate_pos_encoding"] = True
    return tower(
        pixel_values.to(next(tower.parameters()).dtype), **{**kwargs, "output_hidden_states": True, "return_dict": True}
    )
