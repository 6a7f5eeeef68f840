"""
The mask signal: a mask in, one token embedding out; one hidden state and the image's features in, mask logits out.

Masks lie on the padded square, at `config.mask_config.size` pixels a side.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.configuration_utils import strict

from .geometry_perceptiongpt import decode_mask, encode_rle, mask_to_polygons, mask_to_square, sample_mask_logits
from .signal_perceptiongpt import Signal, SignalEmbeddingNorm, normalize_states


# A mask has at least so many cells a side, whatever the patch grid: coarser ones cap the IoU of what is predicted.
SMALLEST_GRID = 128
# What masks are returned as: bool arrays, compressed COCO RLE, COCO polygons, not at all.
MASK_FORMATS = ("bool", "rle", "polygons", None)


def check_mask_format(mask_format: str | None) -> None:
    """`ValueError` unless this is one of `MASK_FORMATS`."""
    if mask_format not in MASK_FORMATS:
        raise ValueError(f"`mask_format` is {mask_format!r}; expected one of {MASK_FORMATS}")


@strict
class PerceptionGPTMaskConfig(PreTrainedConfig):
    r"""
    Sizes and loss weights of the mask signal.

    Args:
        size (`int`, *optional*):
            Side M of the masks that go in and of the mask logits that come out. By default the patch grid doubled
            until it is at least 128.
        hidden_size (`int`, defaults to 256): width of the two-way transformer.
        num_hidden_layers (`int`, defaults to 2): number of two-way blocks.
        num_attention_heads (`int`, defaults to 8): attention heads of the two-way transformer.
        mlp_dim (`int`, defaults to 1024): width of the MLPs of the two-way transformer.
        attention_downsample_rate (`int`, defaults to 2): by how much the cross attentions narrow the width.
        layer_norm_eps (`float`, defaults to 1e-6): epsilon of the layer norms in the two-way blocks.
        upscale_channels (`int`, defaults to 32): least width of the upsampled image features.
        encoder_channels (`list[int]`, defaults to `[32, 64, 64]`): width of each stage of the mask encoder's ResNet.
        encoder_grid (`int`, defaults to 8): side of the feature map that the encoder's linear layer reads.
        bce_weight, dice_weight, iou_weight (`float`): weights of the loss terms, each a mean over one mask.
    """

    model_type = "perceptiongpt_mask"
    base_config_key = "mask_config"

    size: int | None = None
    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    mlp_dim: int = 1024
    attention_downsample_rate: int = 2
    layer_norm_eps: float | int = 1e-6
    upscale_channels: int = 32
    encoder_channels: list[int] | tuple[int, ...] = (32, 64, 64)
    encoder_grid: int = 8
    bce_weight: float | int = 2.0
    dice_weight: float | int = 2.0
    iou_weight: float | int = 1.0


def sine_position_table(grid: int, width: int, device=None) -> torch.Tensor:
    """
    Fixed 2-D position embeddings: the first half of the width tells the row, the second the column.

    Returns:
        `torch.Tensor` of shape `(grid * grid, width)`, float32, rows of the grid one after the other.
    """
    quarter = width // 4
    # From a quarter of a wave over the image, which tells left from right by itself, to four, which tell neighbours
    # in a grid of 32 apart. Positions run over 0..1, so a finer grid reads the same table at points in between.
    steps = torch.arange(quarter, dtype=torch.float32, device=device) / max(quarter - 1, 1)
    frequencies = 0.5 * math.pi * 16**steps
    angles = ((torch.arange(grid, dtype=torch.float32, device=device) + 0.5) / grid)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = line[:, None].expand(grid, grid, -1)
    columns = line[None].expand(grid, grid, -1)
    table = torch.cat([rows, columns], dim=-1).reshape(grid * grid, -1)
    return F.pad(table, (0, width - table.shape[-1]))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm, which batches and micro-batches alike leave unchanged."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False)
        self.norm_1 = nn.GroupNorm(math.gcd(8, out_channels), out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(math.gcd(8, out_channels), out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.shortcut(hidden_states)
        hidden_states = F.relu(self.norm_1(self.conv_1(hidden_states)))
        return F.relu(self.norm_2(self.conv_2(hidden_states)) + residual)


class MaskEncoder(nn.Module):
    """A small ResNet followed by a linear layer, from a mask to the embedding of its `<vis>` (paper, section 3.1)."""

    def __init__(self, config, text_hidden_size: int, embedding_rms: float):
        super().__init__()
        first, *others = config.encoder_channels
        self.grid = config.encoder_grid
        self.stem = nn.Conv2d(1, first, 4, stride=4)
        self.blocks = nn.ModuleList(
            ResidualBlock(before, after) for before, after in zip([first, *others], others, strict=False)
        )
        # The feature map is read with its positions: a mean over it would forget where the mask lies.
        self.linear = nn.Linear(config.encoder_channels[-1] * self.grid**2, text_hidden_size)
        self.norm = SignalEmbeddingNorm(text_hidden_size, embedding_rms)

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        """`masks` of shape `(N, M, M)` in 0..1 to float32 embeddings of shape `(N, text_hidden_size)`."""
        hidden_states = self.stem(masks[:, None].to(self.stem.weight.dtype))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        hidden_states = F.adaptive_avg_pool2d(hidden_states, self.grid)
        return self.norm(self.linear(hidden_states.flatten(1)))


class TwoWayAttention(nn.Module):
    """Attention whose queries, keys and values are narrowed by `downsample_rate`."""

    def __init__(self, config, downsample_rate: int = 1):
        super().__init__()
        internal_size = config.hidden_size // downsample_rate
        self.num_heads = config.num_attention_heads
        if internal_size % self.num_heads:
            raise ValueError(
                f"mask_config: {self.num_heads} attention heads do not divide the width {internal_size} "
                f"(hidden_size {config.hidden_size} / {downsample_rate})."
            )
        self.q_proj = nn.Linear(config.hidden_size, internal_size)
        self.k_proj = nn.Linear(config.hidden_size, internal_size)
        self.v_proj = nn.Linear(config.hidden_size, internal_size)
        self.out_proj = nn.Linear(internal_size, config.hidden_size)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        )
        # Written out: one side always has two tokens, where the fused kernels' backward is slower.
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2))


class TwoWayMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.lin1 = nn.Linear(config.hidden_size, config.mlp_dim)
        self.lin2 = nn.Linear(config.mlp_dim, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lin2(F.relu(self.lin1(hidden_states)))


class TwoWayAttentionBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens."""

    def __init__(self, config, is_first: bool):
        super().__init__()
        rate = config.attention_downsample_rate
        self.self_attn = TwoWayAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn_token_to_image = TwoWayAttention(config, rate)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = TwoWayMLP(config)
        self.layer_norm3 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layer_norm4 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn_image_to_token = TwoWayAttention(config, rate)
        self.is_first = is_first

    def forward(self, queries, keys, query_positions, key_positions):
        if self.is_first:
            queries = self.self_attn(queries, queries, queries)
        else:
            query = queries + query_positions
            queries = queries + self.self_attn(query, query, queries)
        queries = self.layer_norm1(queries)
        key = keys + key_positions
        queries = self.layer_norm2(queries + self.cross_attn_token_to_image(queries + query_positions, key, keys))
        queries = self.layer_norm3(queries + self.mlp(queries))
        keys = self.layer_norm4(keys + self.cross_attn_image_to_token(key, queries + query_positions, queries))
        return queries, keys


class TwoWayTransformer(nn.Module):
    """
    Transformer that lets a few tokens and the cells of a feature map read each other (Segment Anything's mask decoder).
    Computes what `transformers.models.sam.modeling_sam.SamTwoWayTransformer` computes, on the same weights.
    """

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(config, is_first=index == 0) for index in range(config.num_hidden_layers)
        )
        self.final_attn_token_to_image = TwoWayAttention(config, config.attention_downsample_rate)
        self.layer_norm_final_attn = nn.LayerNorm(config.hidden_size)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor, image_positions: torch.Tensor):
        """
        Args:
            tokens (`torch.Tensor` of shape `(N, num_tokens, hidden_size)`)
            image, image_positions (`torch.Tensor` of shape `(N, cells, hidden_size)`)

        Returns:
            the tokens and the image after the last block, in the shapes they came in.
        """
        queries, keys = tokens, image
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, image_positions)
        attended = self.final_attn_token_to_image(queries + tokens, keys + image_positions, keys)
        return self.layer_norm_final_attn(queries + attended), keys


class MaskDecoder(nn.Module):
    """
    Predicts a mask and its IoU from the hidden state that predicts a `<vis>` and the features of the image it speaks
    of (paper, section 3.1: a two-layer, bidirectional transformer).
    """

    def __init__(self, config, grid: int, text_hidden_size: int, feature_size: int, fine_grid: int | None = None):
        super().__init__()
        self.grid = grid
        self.size = config.size
        width = config.hidden_size
        self.state_proj = nn.Linear(text_hidden_size, width)
        self.image_norm = nn.LayerNorm(feature_size)
        self.image_proj = nn.Linear(feature_size, width)
        self.iou_token = nn.Embedding(1, width)
        self.transformer = TwoWayTransformer(config)
        self.upscale = nn.ModuleList()
        self.upscale_norms = nn.ModuleList()
        channels = width
        num_stages = max(0, math.ceil(math.log2(self.size / grid)))
        # The finest map enters at the first stage that is as fine, or at the last.
        self.fine_stage = None
        if fine_grid is not None:
            self.fine_stage = min(max(0, math.ceil(math.log2(fine_grid / grid)) - 1), num_stages - 1)
        for stage in range(num_stages):
            narrower = max(width // 2 ** (stage + 2), config.upscale_channels)
            self.upscale.append(nn.ConvTranspose2d(channels, narrower, 2, stride=2))
            if stage == self.fine_stage:
                self.fine_norm = nn.LayerNorm(feature_size)
                self.fine_proj = nn.Linear(feature_size, narrower)
            is_last = stage == num_stages - 1
            self.upscale_norms.append(nn.Identity() if is_last else nn.GroupNorm(1, narrower))
            channels = narrower
        self.hyper_1 = nn.Linear(width, width)
        self.hyper_2 = nn.Linear(width, channels + 1)
        self.iou_head = nn.Linear(width, 1)

    def forward(self, states: torch.Tensor, image_features: torch.Tensor, image_index: torch.Tensor):
        """
        Args:
            states (`torch.Tensor` of shape `(N, text_hidden_size)`): final-norm hidden states.
            image_features (`torch.Tensor` of shape `(images, cells, feature_size)`):
                The cells of the grid, and behind them those of the finest map where the tower is a pyramid.
            image_index (`torch.Tensor` of shape `(N,)`, int64): the image each state speaks of, -1 for none.

        Returns:
            float32 logits of shape `(N, size, size)` on the padded square and predicted IoU of shape `(N,)` in 0..1.
        """
        dtype = self.state_proj.weight.dtype
        states = normalize_states(states).to(dtype)
        # Projected once an image, then handed to each of its states; the row of zeros at the end is for no image.
        coarse, fine = image_features.to(dtype).split([self.grid**2, image_features.shape[1] - self.grid**2], dim=1)
        image = F.pad(self.image_proj(self.image_norm(coarse)), (0, 0, 0, 0, 0, 1))[image_index]
        positions = sine_position_table(self.grid, image.shape[-1], image.device).to(dtype)
        iou_token = self.iou_token(torch.zeros(len(states), dtype=torch.long, device=states.device))
        tokens = torch.stack([iou_token, self.state_proj(states)], dim=1)
        tokens, image = self.transformer(tokens, image, positions[None])
        cells = image.transpose(1, 2).unflatten(-1, (self.grid, self.grid))
        for stage, (conv, norm) in enumerate(zip(self.upscale, self.upscale_norms, strict=True)):
            cells = conv(cells)
            if stage == self.fine_stage:
                side = math.isqrt(fine.shape[1])
                fine = self.fine_proj(self.fine_norm(fine)).transpose(1, 2).unflatten(-1, (side, side))
                if side != cells.shape[-1]:
                    fine = F.interpolate(fine, size=cells.shape[-1], mode="bilinear", align_corners=False)
                cells = cells + F.pad(fine, (0, 0, 0, 0, 0, 0, 0, 1))[image_index]
            # At this size an activation costs as much as the convolution: ReLU, whose backward is the cheapest.
            cells = F.relu(norm(cells))
        kernel = self.hyper_2(F.gelu(self.hyper_1(tokens[:, 1]))).float()
        logits = torch.einsum("nc,nchw->nhw", kernel[:, :-1], cells.float()) * (kernel.shape[-1] - 1) ** -0.5
        logits = logits + kernel[:, -1, None, None]
        if logits.shape[-1] != self.size:
            logits = F.interpolate(logits[:, None], size=self.size, mode="bilinear", align_corners=False)[:, 0]
        return logits, self.iou_head(tokens[:, 0]).float().squeeze(-1).sigmoid()


def mask_iou(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """IoU of `logits > 0` with binary `targets`, `(N, M, M)` each, of shape `(N,)`; 1 where both are empty."""
    predicted, targets = logits > 0, targets > 0.5
    intersection = (predicted & targets).flatten(1).sum(1).float()
    union = (predicted | targets).flatten(1).sum(1).float()
    return torch.where(union > 0, intersection / union.clamp(min=1), torch.ones_like(union))


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 - Dice coefficient of each mask by itself, `(N, M, M)` to `(N,)`; 1 is added above and below the line."""
    probabilities, targets = logits.sigmoid().flatten(1), targets.flatten(1)
    overlap = (probabilities * targets).sum(1)
    return 1 - (2 * overlap + 1) / (probabilities.sum(1) + targets.sum(1) + 1)


class MaskSignal(Signal):
    """Masks: grids over the padded square, decoded from the features of an image."""

    name = "mask"
    plural = "masks"
    config_class = PerceptionGPTMaskConfig
    prediction_names = ("pred_mask_logits", "pred_mask_iou")
    result_names = ("mask_logits", "object_mask_scores")
    score_name = "mask_score"
    column = {"size": ["int32"], "counts": "string"}
    stays_float32 = False
    reads_image = True
    drawn_as = "mask"

    def complete_config(self, config) -> None:
        """Derives the side of the masks from the patch grid."""
        mask_config = config.mask_config
        mask_config.encoder_channels = list(mask_config.encoder_channels)
        if mask_config.size is None:
            doublings = max(0, math.ceil(math.log2(SMALLEST_GRID / config.mask_grid)))
            mask_config.size = config.mask_grid * 2**doublings

    def build_modules(self, config, embedding_rms: float) -> dict[str, nn.Module]:
        width = config.text_config.hidden_size
        return {
            "mask_encoder": MaskEncoder(config.mask_config, width, embedding_rms),
            "mask_decoder": MaskDecoder(
                config.mask_config, config.mask_grid, width, config.feature_size, config.fine_grid
            ),
        }

    def encode(self, model, values: torch.Tensor) -> torch.Tensor:
        """Masks `(N, M, M)` to float32 embeddings `(N, hidden_size)`."""
        return model.mask_encoder(values)

    def decode(self, model, states: torch.Tensor, image_features: torch.Tensor, image_index: torch.Tensor):
        """States `(N, hidden_size)` to mask logits `(N, M, M)` and predicted IoU `(N,)`."""
        return model.mask_decoder(states, image_features, image_index)

    def loss(self, config, predictions: torch.Tensor, quality: torch.Tensor, targets: torch.Tensor):
        """
        Per mask: binary cross-entropy + Dice (paper, section 3.2), and the squared error of the predicted IoU; both of
        shape `(N,)`.
        """
        targets = targets.to(predictions.dtype)
        bce = F.binary_cross_entropy_with_logits(predictions, targets, reduction="none").flatten(1).mean(1)
        weights = config.mask_config
        signal_loss = weights.bce_weight * bce + weights.dice_weight * dice_loss(predictions, targets)
        iou = mask_iou(predictions.detach(), targets)
        return signal_loss, weights.iou_weight * (quality - iou).square()

    def pad(self, config, batch_size: int, slots: int, device) -> torch.Tensor:
        """Empty masks, `(batch_size, slots, M, M)` uint8."""
        size = config.mask_config.size
        return torch.zeros(batch_size, slots, size, size, dtype=torch.uint8, device=device)

    def parse(self, value, height: int, width: int, mask_size: int) -> np.ndarray:
        """Whatever [`decode_mask`] reads to uint8 `(M, M)` on the square."""
        return mask_to_square(decode_mask(value, height, width), mask_size)

    def empty(self, batch_size: int, slots: int, mask_size: int) -> np.ndarray:
        return np.zeros((batch_size, slots, mask_size, mask_size), dtype=np.uint8)

    def present(
        self, values: torch.Tensor, size: tuple[int, int] | None, mask_format: str | None, frames=None
    ) -> tuple:
        """
        Logits `(N, h, w)` as masks, logit > 0, of the image or of the square: a bool tensor `(N, height, width)`, a
        list in other formats, `None` without a format; and each by itself.
        """
        if mask_format is None:
            return None, [None] * len(values)
        if size is None and frames is None:
            masks = values > 0
        else:  # one at a time: the logits at the size of a photo take far more memory than the masks
            size = tuple(values.shape[1:]) if size is None else size  # grids in frames are pasted on the square
            own_frames = [None] * len(values) if frames is None else frames.split(1)
            masks = [
                sample_mask_logits(logits[None], *size, frame) > 0
                for logits, frame in zip(values, own_frames, strict=True)
            ]
            masks = torch.cat(masks) if masks else torch.zeros((0, *size), dtype=torch.bool)
        masks = masks.cpu()
        if mask_format != "bool":
            masks = [encode_rle(mask) if mask_format == "rle" else mask_to_polygons(mask) for mask in masks.numpy()]
        return masks, list(masks)

    def check_column(self, value, height: float, width: float) -> tuple[dict, bool]:
        """Compressed COCO RLE, `{"size": [height, width], "counts": str}`, with at least one pixel inside."""
        if set(value) != {"size", "counts"} or not isinstance(value["counts"], str):
            raise ValueError("mask is not compressed COCO RLE with the keys 'size' and 'counts' (a string)")
        own_height, own_width = value["size"]
        size = (own_height, own_width) if math.isinf(height) else (height, width)
        decode_mask(value, *size)
        return value, False
