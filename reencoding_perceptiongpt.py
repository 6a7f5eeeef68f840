"""
Encoding an image again under control of the language model: the state that predicts `<reenc>` chooses what it reads
from the layers of the tower, in which the image lies already.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import torch_compilable_check

from .configuration_perceptiongpt import REENC_TOKEN
from .signal_perceptiongpt import normalize_states
from .vision_perceptiongpt import resample


def pool(cells: torch.Tensor, grid: int) -> torch.Tensor:
    """`(images, cells, width)` to `(images, grid * grid, width)`: means of cells, or bilinear if finer."""
    side = math.isqrt(cells.shape[1])
    return resample(cells.transpose(1, 2).unflatten(-1, (side, side)), grid).flatten(2).transpose(1, 2)


class FilmReencoder(nn.Module):
    """
    Another mixture of the tower's layers, scaled and shifted, and read by queries: all of it as a state says.

    What a state says is a sum that starts at zero, so that at first the image is what it was, pooled.
    """

    def __init__(self, config, num_layers: int):
        super().__init__()
        width, text_width = config.feature_size, config.text_config.hidden_size
        self.grid = math.isqrt(config.reenc_queries)
        self.layer_weights = nn.Linear(text_width, num_layers)
        self.film = nn.Linear(text_width, 2 * width)
        self.queries = nn.Embedding(config.reenc_queries, width)
        self.norm = nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        for module in (self.layer_weights, self.film, self.out_proj):
            module.starts_at_zero = True

    def forward(self, states: torch.Tensor, mixed: torch.Tensor, layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor` of shape `(rows, text_hidden_size)`): final-norm states that predict `<reenc>`.
            mixed (`torch.Tensor` of shape `(rows, cells, width)`): what the language model saw of each row's image.
            layers (`tuple[torch.Tensor]`): likewise the tower's layers, before their mixture.

        Returns:
            `torch.Tensor` of shape `(rows, reenc_queries, width)`, what the projector of the images reads.
        """
        states = normalize_states(states).to(self.film.weight.dtype)
        weights = self.layer_weights(states).float().softmax(-1).to(mixed.dtype)
        features = mixed
        for weight, layer in zip(weights.unbind(-1), layers, strict=True):
            features = features + (weight - 1 / len(layers))[:, None, None] * layer
        scale, shift = self.film(states)[:, None].to(features.dtype).chunk(2, dim=-1)
        features = features * (1 + scale) + shift
        keys = self.norm(features)
        index = torch.arange(self.queries.num_embeddings, device=states.device)
        query = self.q_proj(self.queries(index)).to(keys.dtype)
        read = F.scaled_dot_product_attention(query.expand(len(states), -1, -1), self.k_proj(keys), self.v_proj(keys))
        return pool(features, self.grid) + self.out_proj(read)


class PaperReencoder(nn.Module):
    """
    The projector of Visual Perception Tokens (arXiv 2502.17425): the image's features f and the state as a condition c
    are projected to the language model's width, and f + (f . c) c takes the place of the image.
    """

    def __init__(self, config, num_layers: int):
        super().__init__()
        width, text_width = config.feature_size, config.text_config.hidden_size
        self.grid = math.isqrt(config.reenc_queries)
        self.feature_norm, self.state_norm = nn.LayerNorm(width), nn.LayerNorm(text_width)
        self.feature_proj, self.state_proj = nn.Linear(width, text_width), nn.Linear(text_width, text_width)

    def forward(self, states: torch.Tensor, mixed: torch.Tensor, layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """As [`FilmReencoder.forward`], but `(rows, reenc_queries, text_hidden_size)`, what the pads read."""
        features = self.feature_proj(self.feature_norm(pool(mixed, self.grid)))
        condition = self.state_proj(self.state_norm(normalize_states(states).to(features.dtype)))[:, None]
        return features + (features * condition).sum(-1, keepdim=True) * condition


REENCODERS = {"film": FilmReencoder, "paper": PaperReencoder}


class ReencodingMixin:
    """What `PerceptionGPTModel` does where its config's `reenc_queries` is not 0."""

    def add_reencoder(self, config, num_layers: int) -> list[nn.Module]:
        """Makes the re-encoder an attribute of the model; returns all its parts."""
        if not config.reenc_queries:
            return []
        self.reencoder = REENCODERS[config.reenc_projector](config, num_layers)
        return list(self.reencoder.modules())

    def reencoding_layers(self, layers: tuple[torch.Tensor, ...], mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What [`reencode`] reads of images: their mixture, and behind it each layer on the same grid."""
        if self.config.is_pyramid:
            grid = self.config.image_grid
            layers = tuple(resample(layer, grid).flatten(2).transpose(1, 2) for layer in layers)
        return (mixed, *layers)

    def reencode(self, states: torch.Tensor, image_layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """
        Args:
            states (`torch.Tensor` of shape `(rows, hidden_size)`): final-norm states, each predicts a `<reenc>`.
            image_layers (`tuple[torch.Tensor]`): [`reencoding_layers`] of the image of each row.

        Returns:
            `torch.Tensor` of shape `(rows, reenc_queries, hidden_size)`: what is added to the pads of `<reenc>`.
        """
        mixed, *layers = image_layers
        features = self.reencoder(states, mixed, tuple(layers))
        if self.config.reenc_projector == "paper":
            return features
        return self.multi_modal_projector(self.position_table(features))

    def add_reencodings(
        self,
        inputs_embeds,
        input_ids,
        given_embeds,
        given: torch.Tensor | None,
        image_outputs,
        run_language_model,
        run_every_module: bool,
    ) -> torch.Tensor:
        """
        Adds what `<reenc>` reads to the embeddings of its pads, which are the tokens `<reenc>` that follow the first.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): of everything else.
            input_ids, given_embeds (*optional*): what tells where tokens stand, see [`token_mask`].
            given (`torch.Tensor` of shape `(rows, reenc_queries, hidden_size)`, *optional*):
                What [`reencode`] made of rows with a `<reenc>`; by default it is made here, of the state before each.
            image_outputs ([`PerceptionGPTImageFeatures`], *optional*): of all images, rows in order.
            run_language_model (`Callable`): gives the final-norm states of embeddings, without a cache.
            run_every_module (`bool`): whether the re-encoder runs where there is no `<reenc>`, too.
        """
        config = self.config
        if given is None and inputs_embeds.shape[1] == 1 and not run_every_module:
            return inputs_embeds  # a step of decoding
        token_mask = self.token_mask(input_ids, given_embeds, config.reenc_token_id)
        pad_mask = token_mask & F.pad(token_mask[:, :-1], (1, 0))
        if given is None:
            has_reenc = bool(pad_mask.any())
            if not has_reenc and not run_every_module:
                return inputs_embeds
            first = token_mask & ~pad_mask
            torch_compilable_check(
                (first.sum(1) <= 1).all(), f"A row holds {REENC_TOKEN} more than once; an image is encoded again once."
            )
            position = (first.int().argmax(1) - 1).clamp(min=0)
            states = run_language_model(inputs_embeds)
            states = states.gather(1, position[:, None, None].expand(-1, -1, states.shape[-1]))[:, 0]
            image_mask = self.token_mask(input_ids, given_embeds, config.image_token_id)
            image = torch.div(image_mask.cumsum(1), config.image_seq_length, rounding_mode="floor")
            before = image[:, -1].cumsum(0) - image[:, -1] + image.gather(1, position[:, None])[:, 0] - 1
            rows = pad_mask.any(1)
            layers = getattr(image_outputs, "layers", None)
            if has_reenc and (layers is None or not (image.gather(1, position[:, None])[:, 0] > 0)[rows].all()):
                raise ValueError(f"{REENC_TOKEN} encodes the image before it again, but there is none.")
            if layers is not None and len(layers[0]) != int(image[:, -1].sum()):
                raise ValueError(f"The prompt holds {REENC_TOKEN}: let `generate` return one sequence a row.")
            if layers is None:
                blank = inputs_embeds.new_zeros(1, config.image_seq_length, config.feature_size)
                layers = (blank,) * (1 + self.num_vision_layers)
            features = self.reencode(states, tuple(layer[before.clamp(min=0)] for layer in layers))
            if not has_reenc:
                return inputs_embeds + 0 * features.sum().to(inputs_embeds)
            given = features[rows]
        torch_compilable_check(
            pad_mask.sum() == given.shape[0] * given.shape[1],
            lambda: f"{pad_mask.sum()} pads of {REENC_TOKEN}; expected {config.reenc_queries} in each row that has it.",
        )
        added = torch.zeros_like(inputs_embeds).masked_scatter(pad_mask[..., None], given.to(inputs_embeds))
        return inputs_embeds + added
