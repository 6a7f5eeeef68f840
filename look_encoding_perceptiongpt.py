"""
What a look is in a sequence: `<look>`, pads that carry the features of a crop, `</look>`; and where a `<vis>` right
behind it is decoded.
"""

import math

import torch
from torch.nn import functional as F
from transformers.utils import torch_compilable_check

from .configuration_perceptiongpt import LOOK_PAD_TOKEN
from .look_geometry_perceptiongpt import whole_frames
from .outputs_perceptiongpt import PerceptionGPTImageFeatures
from .signals_perceptiongpt import SIGNALS
from .vision_perceptiongpt import resample


class LookEncodingMixin:
    """What `PerceptionGPTModel` does with crops: they are images, of `config.look_tokens` tokens each."""

    def get_look_features(
        self, look_pixel_values: torch.Tensor, with_mask_features: bool = True
    ) -> PerceptionGPTImageFeatures:
        """
        Encodes crops with the tower, the mixtures and the projector of the images.

        Args:
            look_pixel_values (`torch.Tensor` of shape `(crops, 3, S, S)`)
            with_mask_features (`bool`, defaults to `True`): whether to compute what the mask decoder reads.
        """
        _, tower_states = self.encode_tower(look_pixel_values)
        layers = self._vision_layers(tower_states)
        grid = math.isqrt(self.config.look_tokens)
        features = self._mix(self.language_mixture, layers, grid)
        own_grid = math.isqrt(features.shape[1])
        if own_grid != grid:
            cells = features.transpose(1, 2).unflatten(-1, (own_grid, own_grid))
            features = resample(cells, grid).flatten(2).transpose(1, 2)
        return PerceptionGPTImageFeatures(
            last_hidden_state=layers[-1],
            pooler_output=self.multi_modal_projector(self.position_table(features)),
            mask_features=self._mask_features(layers) if with_mask_features else None,
        )

    def add_looks(
        self,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor | None,
        given_embeds: torch.Tensor | None,
        look_pixel_values: torch.Tensor | None,
        look_outputs: PerceptionGPTImageFeatures | None,
        run_every_module: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Adds the features of crops to the embeddings of their pads: the row of `<look_pad>` is the learned embedding by
        which the model tells a crop from an image.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`): those of the tokens.
            input_ids, given_embeds (*optional*): what tells where pads stand, see [`token_mask`].
            look_pixel_values (`torch.Tensor` of shape `(crops, 3, S, S)`, *optional*): flat, rows in order.
            look_outputs ([`PerceptionGPTImageFeatures`], *optional*): what was made of crops earlier, in their place.
            run_every_module (`bool`): whether the tower runs for a blank crop where there is none.

        Returns:
            the embeddings, and what the mask decoder reads of the crops `(crops, mask_cells, feature_size)` or `None`.
        """
        config = self.config
        is_blank = look_outputs is None and look_pixel_values is None
        if is_blank:
            if not run_every_module or not config.look_max:
                return inputs_embeds, None
            look_pixel_values = inputs_embeds.new_zeros(1, 3, config.image_size, config.image_size)
        elif not config.look_max:
            raise ValueError("Crops were given to a model that does not look: `look_max` of its config is 0.")
        if look_outputs is None:
            look_outputs = self.get_look_features(look_pixel_values, with_mask_features=config.look_frame == "crop")
        features = look_outputs.pooler_output.to(inputs_embeds)
        if is_blank:
            return inputs_embeds + 0 * features.sum(), None
        pad_mask = self.token_mask(input_ids, given_embeds, config.look_pad_token_id)
        torch_compilable_check(
            pad_mask.sum() == features.shape[0] * features.shape[1],
            lambda: (
                f"The rows hold {pad_mask.sum()} tokens for crops ({LOOK_PAD_TOKEN}), the {features.shape[0]} crops "
                f"given have {features.shape[0] * features.shape[1]} features: expected one token each."
            ),
        )
        added = torch.zeros_like(inputs_embeds).masked_scatter(pad_mask[..., None], features)
        return inputs_embeds + added, look_outputs.mask_features


def into_frames(slots: dict, frames: torch.Tensor) -> dict:
    """What [`prepare_slots`] returned, the values that are given in the frames `(batch_size, K, 4)` of their slots."""
    given = {name: SIGNALS[name].into_frame(slots["values"][name].to(frames.device), frames) for name in slots["given"]}
    return {**slots, "values": {**slots["values"], **given}}


def slot_crops(
    end_mask: torch.Tensor, pad_mask: torch.Tensor, positions: torch.Tensor, look_frames: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The crop in whose frame each slot is decoded: that of a look which ends right before its `<vis>`.

    Args:
        end_mask, pad_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            Bool, where `</look>` and pads stand.
        positions (`torch.Tensor` of shape `(batch_size, K)`): of the slots' `<vis>`.
        look_frames (`torch.Tensor` of shape `(batch_size, N, 4)`): the frames of each row's crops.

    Returns:
        index into the flat list of crops `(batch_size, K)`, -1 for none; and the frames `(batch_size, K, 4)`.
    """
    ends = end_mask & F.pad(pad_mask[:, :-1], (1, 0))  # of looks that have a crop
    before = (positions - 1).clamp(min=0)
    within = torch.where(ends.gather(1, before) & (positions > 0), ends.cumsum(1).gather(1, before) - 1, -1)
    in_row = ends.sum(1)
    most = look_frames.shape[1]
    torch_compilable_check(
        (in_row <= most).all(), lambda: f"A row has {in_row.max()} crops, `look_frames` has {most} for each row."
    )
    index = torch.where(within >= 0, (in_row.cumsum(0) - in_row)[:, None] + within, -1)
    whole = whole_frames(*positions.shape, device=positions.device)
    if not most:
        return index, whole
    frames = look_frames.to(positions.device).gather(1, within.clamp(min=0)[..., None].expand(-1, -1, 4))
    return index, torch.where(within[..., None] >= 0, frames, whole)
