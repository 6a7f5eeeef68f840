"""
From the vision tower to features: maps of one width from towers that are plain ViTs or pyramids, their learned mixture,
the position table and the projector.
"""

import inspect
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import can_return_tuple

from .configuration_perceptiongpt import PerceptionGPTConfig
from .outputs_perceptiongpt import PerceptionGPTImageFeatures
from .signal_mask_perceptiongpt import sine_position_table


# Towers whose `reshaped_hidden_states` have the channels last; those of all others have them first.
CHANNELS_LAST_TOWERS = ("hiera",)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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


class VisionMixin:
    """What [`PerceptionGPTModel`] does with its tower: one pass, and the features made of it."""

    def _new_vision_tower(self, config: PerceptionGPTConfig) -> PreTrainedModel:
        """A fresh tower; one that cannot take the attention implementation that was asked for gets eager."""
        vision_config = config.vision_config
        tower_class = MODEL_MAPPING[type(vision_config)]
        supported = {
            "sdpa": tower_class._supports_sdpa,
            "flash_attention_2": tower_class._supports_flash_attn,
            "flex_attention": tower_class._supports_flex_attn,
        }
        kwargs = {} if supported.get(vision_config._attn_implementation, True) else {"attn_implementation": "eager"}
        return AutoModel.from_config(vision_config, **kwargs)

    def train(self, mode: bool = True):
        """As in torch, but the tower's batch norms keep to their stored statistics: a row must not depend on others."""
        super().train(mode)
        for module in self.vision_tower.modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
        return self

    def encode_tower(self, pixel_values: torch.Tensor, **kwargs):
        """
        One pass of the tower over `(images, 3, S, S)`. Without a gradient where no weight of the tower trains: gradient
        checkpointing would make its embeddings ask for one, run the tower back and encode every image twice.

        Returns:
            the outputs of the tower, and what `tower_states` of [`forward`] takes: of a plain ViT the outputs `(images,
            cells, width)` of its layers 1..n, class and register tokens dropped; of a pyramid the last map `(images,
            channels, height, width)` of each stage, finest first.
        """
        if self.config.is_pyramid:  # convolutions on a CPU are fastest with the channels last
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        learns = torch.is_grad_enabled() and (
            pixel_values.requires_grad or any(weight.requires_grad for weight in self.vision_tower.parameters())
        )
        with torch.set_grad_enabled(learns):
            outputs = tower_layers(self.vision_tower, self.config.vision_config, pixel_values, **kwargs)
        if self.config.is_pyramid:
            maps = feature_maps(outputs, self.config.vision_config.model_type)
            return outputs, tuple(maps[stage["layer"]] for stage in self.config.vision_stages)
        cells = (pixel_values.shape[-1] // self.config.vision_config.patch_size) ** 2
        return outputs, tuple(layer[:, layer.shape[1] - cells :] for layer in outputs.hidden_states[1:])

    def _vision_layers(self, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What equation 1 mixes: states of the tower, of a pyramid brought to `feature_size` channels."""
        return self.vision_stages(list(states)) if self.config.is_pyramid else states

    def _mix(self, mixture: FeatureMixture, layers: tuple[torch.Tensor, ...], grid: int) -> torch.Tensor:
        """Equation 1 over what [`_vision_layers`] returns: `(images, grid * grid, feature_size)`."""
        if self.config.is_pyramid:
            layers = tuple(resample(layer, grid).flatten(2).transpose(1, 2) for layer in layers)
        return mixture(layers)

    def _mask_features(self, layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`(images, mask_cells, feature_size)`: the mixture on the mask grid and, of a pyramid, the finest map."""
        features = self._mix(self.mask_mixture, layers, self.config.mask_grid)
        if self.config.is_pyramid:
            features = torch.cat([features, layers[0].flatten(2).transpose(1, 2)], dim=1)
        return features

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None,
        tower_states: tuple[torch.Tensor, ...] | None = None,
        with_mask_features: bool = True,
        **kwargs,
    ) -> PerceptionGPTImageFeatures:
        """
        Encodes images, each with one pass of the tower.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, S, S)`)
            tower_states (`tuple[torch.Tensor]`, *optional*): what [`encode_tower`] made of the images; it is not run.
            with_mask_features (`bool`, defaults to `True`):
                Whether to compute what the mask decoder reads; if not, the result has `tower_states` to do so later.
            kwargs: for the tower, such as `output_hidden_states` and `output_attentions`.
        """
        wants_states = kwargs.get("output_hidden_states")
        if wants_states is None:
            wants_states = self.config.vision_config.output_hidden_states
        outputs = None
        if tower_states is None:
            outputs, tower_states = self.encode_tower(pixel_values, **kwargs)
        layers = self._vision_layers(tower_states)
        reads_masks_here = not self.config.mask_image_size  # and not from finer images
        mixed = self._mix(self.language_mixture, layers, self.config.image_grid)
        features = self.position_table(mixed)
        return PerceptionGPTImageFeatures(
            last_hidden_state=layers[-1],
            pooler_output=self.multi_modal_projector(features),
            hidden_states=getattr(outputs, "hidden_states", None) if wants_states else None,
            attentions=getattr(outputs, "attentions", None),
            mask_features=self._mask_features(layers) if reads_masks_here and with_mask_features else None,
            tower_states=tower_states if reads_masks_here and not with_mask_features else None,
            layers=self.reencoding_layers(layers, mixed) if self.config.reenc_queries else None,
        )

    def get_mask_features(
        self, mask_pixel_values: torch.Tensor | None, tower_states: tuple[torch.Tensor, ...] | None = None
    ) -> torch.Tensor:
        """`(images, 3, S', S')`, or what [`encode_tower`] made of them, to `(images, mask_cells, feature_size)`."""
        if tower_states is None:
            _, tower_states = self.encode_tower(mask_pixel_values)
        return self._mask_features(self._vision_layers(tower_states))
