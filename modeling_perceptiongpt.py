"""
PerceptionGPT (arXiv 2311.06612): a vision tower, a language model, and `<vis>`, whose embedding is computed from a
signal (a box, a mask, a point) on the way in and whose predicting hidden state is decoded to them on the way out.
"""

import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple, logging, torch_compilable_check
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_perceptiongpt import IMAGE_TOKEN, PerceptionGPTConfig
from .encoding_perceptiongpt import SignalModulesMixin
from .grounding_perceptiongpt import GroundingMixin
from .joining_perceptiongpt import JoiningMixin
from .look_encoding_perceptiongpt import LookEncodingMixin, into_frames, slot_crops
from .look_generation_perceptiongpt import LookGenerationMixin
from .losses_perceptiongpt import signal_losses
from .outputs_perceptiongpt import (
    PerceptionGPTImageFeatures,
    PerceptionGPTModelOutputWithPast,
    PerceptionGPTOutputWithPast,
)
from .reencoding_perceptiongpt import ReencodingMixin
from .signal_perceptiongpt import SignalEmbeddingNorm
from .signals_perceptiongpt import SIGNALS, take_signal_counts, take_signal_inputs
from .slots_perceptiongpt import (
    align_slots,
    packed_mask,
    prepare_slots,
    require_finer_images,
    several_processes,
    slot_images,
    slot_positions,
)
from .vision_perceptiongpt import (
    FeatureMixture,
    PerceptionGPTMultiModalProjector,
    PositionTable,
    VisionMixin,
    VisionStages,
    find_stages,
)


logger = logging.get_logger(__name__)


class PerceptionGPTPreTrainedModel(PreTrainedModel):
    config: PerceptionGPTConfig
    config_class = PerceptionGPTConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["PerceptionGPTMultiModalProjector"]
    _skip_keys_device_placement = ["past_key_values", "signal_state"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self):
        """As in the library, but only parts that are there are named as such: FSDP looks for each of them."""
        super().post_init()
        there = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in self._no_split_modules or () if name in there]

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As in the library, but names on disk are those of `state_dict()`, not a tower's older ones."""
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def activation_checkpointing_enable(self, *args, **kwargs):
        """As in the library; a tower that has no activation checkpointing goes without, and a warning says so."""
        super().activation_checkpointing_enable(*args, **kwargs)
        tower = getattr(self, self.base_model_prefix, self).vision_tower
        if not tower.supports_gradient_checkpointing:
            logger.warning(f"{type(tower).__name__} has no activation checkpointing: its activations are kept.")

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # N(0, 0.02), right for the backbones, would let almost no gradient through the projector and the signals.
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif getattr(module, "is_signal_part", False) and isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif getattr(module, "is_signal_part", False) and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, SignalEmbeddingNorm):
            first = getattr(self, self.base_model_prefix, self).first_embedding_norm()
            if module is first:
                init.constant_(module.weight, module.initial_value)
            else:  # a signal that is added to a checkpoint starts at the scale of those that it has
                init.copy_(module.weight, first.weight.float().square().mean().sqrt().expand_as(module.weight))
        elif isinstance(module, PositionTable):
            init.constant_(module.gain, module.initial_gain)
        elif isinstance(module, FeatureMixture):
            init.zeros_(module.logits)
            if module.initial_layer is not None:
                init.zeros_(module.gate)
                one_hot = torch.arange(len(module.logits), device=module.logits.device) == module.initial_layer
                init.copy_(module.logits, 6.0 * one_hot)


class PerceptionGPTModel(
    LookEncodingMixin, ReencodingMixin, VisionMixin, SignalModulesMixin, PerceptionGPTPreTrainedModel
):
    """
    The vision tower, the language model without its head, and the signal modules.

    Args:
        config ([`PerceptionGPTConfig`])
        vision_tower, language_model (`PreTrainedModel`, *optional*): loaded backbones to take over instead of new ones.
    """

    def __init__(self, config: PerceptionGPTConfig, vision_tower=None, language_model=None):
        super().__init__(config)
        self.vision_tower = self._new_vision_tower(config) if vision_tower is None else vision_tower
        for part in self.vision_tower.modules():
            if isinstance(part, PreTrainedModel) and part.can_record_outputs:
                # The tower would do this in its first forward, where `torch.compile` cannot follow.
                maybe_install_capturing_hooks(part)
        parts = []
        if config.is_pyramid:
            if config.vision_stages is None:
                config.vision_stages = find_stages(self.vision_tower, config.image_size)
            channels = [stage["channels"] for stage in config.vision_stages]
            self.vision_stages = VisionStages(channels, config.feature_size)
            parts.extend(self.vision_stages.modules())
            num_layers = len(channels)
        else:
            num_layers = config.vision_config.num_hidden_layers
        self.num_vision_layers = num_layers
        self.language_mixture = FeatureMixture(num_layers, config.mixture_base_layer)
        self.mask_mixture = FeatureMixture(num_layers, config.mixture_base_layer)
        self.position_table = PositionTable(config.position_gain)
        self.multi_modal_projector = PerceptionGPTMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
        # Gemma scales its token embeddings inside the embedding layer.
        embedding_scale = getattr(self.language_model.get_input_embeddings(), "scalar_embed_scale", 1.0)
        embedding_rms = embedding_scale * getattr(config.text_config, "initializer_range", 0.02)
        parts.extend(self.multi_modal_projector.modules())
        parts.extend(self.add_signal_modules(config, embedding_rms))
        parts.extend(self.add_reencoder(config, num_layers))
        for part in parts:
            part.is_signal_part = True
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def token_mask(self, input_ids, inputs_embeds, token_id: int) -> torch.Tensor:
        """Bool `(batch_size, sequence_length)`: where a token stands, read from its embedding if there are no ids."""
        if input_ids is not None:
            return input_ids == token_id
        embedding = self.get_input_embeddings()(torch.tensor([token_id], device=inputs_embeds.device))
        return (inputs_embeds == embedding.to(inputs_embeds)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mask_pixel_values: torch.Tensor | None = None,
        mask_image_index: torch.LongTensor | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        points: torch.Tensor | None = None,
        boxes_valid: torch.Tensor | None = None,
        masks_valid: torch.Tensor | None = None,
        points_valid: torch.Tensor | None = None,
        boxes_read: torch.Tensor | None = None,
        masks_read: torch.Tensor | None = None,
        points_read: torch.Tensor | None = None,
        boxes_noise: torch.Tensor | None = None,
        look_pixel_values: torch.Tensor | None = None,
        signal_embeds: torch.Tensor | None = None,
        signal_embeds_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        tower_states: tuple[torch.Tensor, ...] | None = None,
        mask_tower_states: tuple[torch.Tensor, ...] | None = None,
        run_every_module: bool | None = None,
        **kwargs,
    ) -> PerceptionGPTModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Each `<image>` already expanded to `config.image_seq_length` tokens.
            pixel_values (`torch.Tensor` of shape `(images, 3, S, S)`): flat, rows in order.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Or bool `(batch_size, 1, sequence_length, sequence_length)`, True = attends, for rows that pack several
                questions behind one image; `position_ids` must then be given.
            mask_pixel_values (`torch.Tensor` of shape `(images, 3, S', S')`, *optional*): for the finer mask path.
            mask_image_index (`torch.LongTensor` of shape `(images,)`, *optional*):
                Row of `mask_pixel_values` of each image, -1 where it was left out; by default image i has row i.
            boxes (`torch.Tensor` of shape `(batch_size, K, 4)`, *optional*):
                xyxy in 0..1 of the padded square; slot k is the k-th `<vis>` of its row.
            masks (`torch.Tensor` of shape `(batch_size, K, M, M)`, *optional*): same slots, on the padded square.
            points (`torch.Tensor` of shape `(batch_size, K, 2)`, *optional*): same slots, xy in 0..1 of the square.
            boxes_valid, masks_valid, points_valid (`torch.Tensor` of shape `(batch_size, K)`, bool, *optional*):
                The value is known; by default where the tensor is given.
            boxes_read, masks_read, points_read (`torch.Tensor` of shape `(batch_size, K)`, bool, *optional*):
                The value enters the embedding of its `<vis>`; by default where it is valid.
            boxes_noise (`torch.Tensor` of shape `(batch_size, K, 4)`, *optional*): added to the boxes that are read.
            look_pixel_values (`torch.Tensor` of shape `(crops, 3, S, S)`, *optional*):
                The crops of rows that look again, flat, rows in order; each has `config.look_tokens` pads in its row.
            signal_embeds, signal_embeds_mask (`(batch_size, n, hidden_size)` and bool `(batch_size, n)`, *optional*):
                Ready-made embeddings for the last n positions, used where the bool mask is True.
            mm_encoder_outputs (`dict`, *optional*):
                Computed earlier, any of `{"image": get_image_features(...), "look": get_look_features(...), "reenc":
                reencode(...)}`.
            tower_states, mask_tower_states (`tuple[torch.Tensor]`, *optional*):
                What [`encode_tower`] made of `pixel_values` and of `mask_pixel_values`, in their place.
            run_every_module (`bool`, *optional*):
                Whether modules that the batch does not need run, too, without an effect; by default in training where
                there are several processes: those whose batches differ in kind would wait for each other.
        """
        signals = {
            "boxes": boxes,
            "boxes_valid": boxes_valid,
            "boxes_read": boxes_read,
            "boxes_noise": boxes_noise,
            "masks": masks,
            "masks_valid": masks_valid,
            "masks_read": masks_read,
            "points": points,
            "points_valid": points_valid,
            "points_read": points_read,
            **take_signal_inputs(kwargs),
        }
        if run_every_module is None:
            run_every_module = self.training and several_processes()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of `input_ids` and `inputs_embeds`.")
        if sum(images is not None for images in (pixel_values, tower_states, mm_encoder_outputs)) > 1:
            raise ValueError("Expected at most one of `pixel_values`, `tower_states` and `mm_encoder_outputs`.")
        given_embeds = inputs_embeds
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is None and (pixel_values is not None or tower_states is not None):
            image_outputs = self.get_image_features(pixel_values, tower_states, return_dict=True)
        image_features = mask_features = None
        if image_outputs is not None:
            mask_features = getattr(image_outputs, "mask_features", None)
            image_features = image_outputs.pooler_output
            if not isinstance(image_features, torch.Tensor):
                image_features = torch.stack(list(image_features))
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            image_mask = self.token_mask(input_ids, given_embeds, self.config.image_token_id)
            torch_compilable_check(
                image_mask.sum() == image_features.shape[0] * image_features.shape[1],
                lambda: (
                    f"The rows hold {image_mask.sum()} {IMAGE_TOKEN} tokens, the {image_features.shape[0]} images "
                    f"given have {image_features.shape[0] * image_features.shape[1]} features: expected one token each."
                ),
            )
            inputs_embeds = inputs_embeds.masked_scatter(image_mask[..., None], image_features)
        elif run_every_module:
            side = self.config.image_size
            unused = self.get_image_features(inputs_embeds.new_zeros(1, 3, side, side), return_dict=True)
            mask_features = unused.mask_features
            inputs_embeds = inputs_embeds + 0 * unused.pooler_output.sum().to(inputs_embeds)
        has_finer_images = mask_pixel_values is not None or mask_tower_states is not None
        if has_finer_images and self.config.mask_image_size:
            mask_features = self.get_mask_features(mask_pixel_values, mask_tower_states)
            if mask_image_index is not None:
                mask_features = mask_features[mask_image_index.clamp(min=0)]
        elif mask_features is None and run_every_module:
            side, images = self.config.mask_image_size, 1 if image_features is None else len(image_features)
            blank = self.get_mask_features(inputs_embeds.new_zeros(1, 3, side, side))
            mask_features = blank.expand(images, -1, -1)

        look_outputs = (mm_encoder_outputs or {}).get("look")
        inputs_embeds, look_mask_features = self.add_looks(
            inputs_embeds, input_ids, given_embeds, look_pixel_values, look_outputs, run_every_module
        )
        slots = prepare_slots(self.config, signals, inputs_embeds.device, run_every_module)
        if slots is not None:
            vis_mask = self.token_mask(input_ids, given_embeds, self.config.vis_token_id)
            values = dict(slots["values"])
            for name in values:
                noise = signals.get(self.signals[name].noise_name)
                if noise is not None and noise.shape[1]:
                    values[name] = values[name] + noise.to(values[name])
            embeddings = self.encode_signals(values, slots["read"]).to(inputs_embeds.device, inputs_embeds.dtype)
            embeddings, replaced = align_slots(embeddings, slots["read"], vis_mask)
            inputs_embeds = torch.where(replaced[..., None], embeddings, inputs_embeds)
        if signal_embeds is not None:
            length = inputs_embeds.shape[1] - signal_embeds.shape[1]
            tail = torch.where(
                signal_embeds_mask[..., None], signal_embeds.to(inputs_embeds), inputs_embeds[:, length:]
            )
            inputs_embeds = torch.cat([inputs_embeds[:, :length], tail], dim=1) if length else tail

        # With a static cache `generate` hands over a dict of masks, one for each kind of layer.
        if getattr(attention_mask, "dtype", None) == torch.bool and attention_mask.ndim == 4:
            attention_mask = packed_mask(self.config, attention_mask, position_ids, inputs_embeds.dtype)
        if self.config.reenc_queries:

            def run_language_model(embeds: torch.Tensor) -> torch.Tensor:
                if isinstance(attention_mask, dict) or (past_key_values and past_key_values.get_seq_length()):
                    raise ValueError("A prompt in which an image is encoded again needs a dynamic cache that is empty.")
                given_to_model = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": False}
                return self.language_model(inputs_embeds=embeds, **given_to_model).last_hidden_state

            reencoded = (mm_encoder_outputs or {}).get("reenc")
            inputs_embeds = self.add_reencodings(
                inputs_embeds, input_ids, given_embeds, reencoded, image_outputs, run_language_model, run_every_module
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return PerceptionGPTModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            mask_features=mask_features,
            look_mask_features=look_mask_features,
        )


class PerceptionGPTForConditionalGeneration(
    JoiningMixin, GroundingMixin, LookGenerationMixin, PerceptionGPTPreTrainedModel
):
    """
    PerceptionGPT with its language modelling head: reads images, text and signals; writes text and signals.

    Args:
        config ([`PerceptionGPTConfig`])
        vision_tower, language_model, lm_head (*optional*): loaded parts to take over instead of new ones.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: PerceptionGPTConfig, vision_tower=None, language_model=None, lm_head=None):
        super().__init__(config)
        self.model = PerceptionGPTModel(config, vision_tower=vision_tower, language_model=language_model)
        text_config = config.text_config
        self.lm_head = (
            nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False) if lm_head is None else lm_head
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> PerceptionGPTImageFeatures:
        """See [`PerceptionGPTModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        mask_pixel_values: torch.Tensor | None = None,
        mask_image_index: torch.LongTensor | None = None,
        boxes: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        points: torch.Tensor | None = None,
        boxes_valid: torch.Tensor | None = None,
        masks_valid: torch.Tensor | None = None,
        points_valid: torch.Tensor | None = None,
        boxes_read: torch.Tensor | None = None,
        masks_read: torch.Tensor | None = None,
        points_read: torch.Tensor | None = None,
        boxes_noise: torch.Tensor | None = None,
        signal_image_index: torch.LongTensor | None = None,
        look_pixel_values: torch.Tensor | None = None,
        look_frames: torch.Tensor | None = None,
        signal_embeds: torch.Tensor | None = None,
        signal_embeds_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        tower_states: tuple[torch.Tensor, ...] | None = None,
        mask_tower_states: tuple[torch.Tensor, ...] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_boxes_in_batch: torch.Tensor | int | None = None,
        num_masks_in_batch: torch.Tensor | int | None = None,
        num_points_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> PerceptionGPTOutputWithPast:
        r"""
        As [`PerceptionGPTModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                -100 where there is nothing to learn; a value is supervised where the label of its `<vis>` is not -100
                and it is valid. With labels, only the signals that are given are decoded.
            signal_image_index (`torch.LongTensor` of shape `(batch_size, K)`, *optional*):
                Image, within its row, that a slot speaks of; negative for the last one before it.
            look_frames (`torch.Tensor` of shape `(batch_size, N, 4)`, *optional*):
                The frames of each row's crops, see [`crop_frame`]. With `look_frame="crop"` a `<vis>` right behind a
                look is decoded, and its loss taken, in the frame of the crop; its mask is given on the frame, its other
                values on the image's square, as they are read there. Predictions come back on the square, but masks.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*):
                Supervised tokens in all micro-batches and processes of the step: what the sum of the language modelling
                losses is divided by. By default those of this batch.
            num_boxes_in_batch, num_masks_in_batch, num_points_in_batch (`int` or `torch.Tensor`, *optional*):
                Likewise for boxes, masks and points. By default those of this batch; then the mean over them counts for
                as large a share of the step as the batch has of the step's tokens.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Compute logits for the last positions only, 0 for all, or for those of an index. With labels the loss is
                that of the tokens behind these positions.
        """
        if labels is None and num_items_in_batch is not None:
            raise ValueError(
                "`num_items_in_batch` was given without `labels`. The `Trainer` takes the labels away where "
                "`label_smoothing_factor` or `compute_loss_func` is set; the losses of the signals need them, so train "
                "without either."
            )
        run_every_module = several_processes() and (self.training or labels is not None)
        signals = {
            "boxes": boxes,
            "boxes_valid": boxes_valid,
            "boxes_read": boxes_read,
            "boxes_noise": boxes_noise,
            "masks": masks,
            "masks_valid": masks_valid,
            "masks_read": masks_read,
            "points": points,
            "points_valid": points_valid,
            "points_read": points_read,
            **take_signal_inputs(kwargs),
        }
        counts = {
            "num_boxes_in_batch": num_boxes_in_batch,
            "num_masks_in_batch": num_masks_in_batch,
            "num_points_in_batch": num_points_in_batch,
            **take_signal_counts(kwargs),
        }
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mask_pixel_values=mask_pixel_values,
            mask_image_index=mask_image_index,
            look_pixel_values=look_pixel_values,
            signal_embeds=signal_embeds,
            signal_embeds_mask=signal_embeds_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            tower_states=tower_states,
            mask_tower_states=mask_tower_states,
            run_every_module=run_every_module,
            return_dict=True,
            **signals,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept_states = hidden_states[:, kept]
        logits = self.lm_head(kept_states)

        fields, decoded, supervised, chosen = {}, {}, None, {}
        slots = prepare_slots(self.config, signals, hidden_states.device, run_every_module)
        if slots is not None:
            vis_mask = self.model.token_mask(input_ids, inputs_embeds, self.config.vis_token_id)
            image_mask = self.model.token_mask(input_ids, inputs_embeds, self.config.image_token_id)
            num_slots = max([valid.shape[1] for valid in slots["valid"].values()])
            positions, supervised = slot_positions(vis_mask, num_slots)
            if labels is not None:
                supervised = supervised & (labels.gather(1, positions) != -100)
            # Without labels every signal is predicted, with them those that may have a target.
            names = list(self.model.signals) if labels is None else slots["given"]
            has_finer_images = mask_pixel_values is not None or mask_tower_states is not None
            if self.config.mask_image_size and not has_finer_images and outputs.image_hidden_states is not None:
                require_finer_images(self.config, names, slots, supervised if labels is not None else None)
            states = hidden_states.gather(
                1, (positions - 1).clamp(min=0)[..., None].expand(-1, -1, hidden_states.shape[2])
            )
            image_index = slot_images(image_mask, positions, self.config.image_seq_length, signal_image_index)
            image_features = outputs.mask_features
            if image_features is None:
                image_features = states.new_zeros(0, self.config.mask_cells, self.config.feature_size)
                image_index = torch.full_like(image_index, -1)
            frames = None
            if look_frames is not None and self.config.look_frame == "crop":
                end_mask, pad_mask = (
                    self.model.token_mask(input_ids, inputs_embeds, token_id)
                    for token_id in (self.config.look_end_token_id, self.config.look_pad_token_id)
                )
                crop_index, frames = slot_crops(end_mask, pad_mask, positions, look_frames)
                if outputs.look_mask_features is not None:
                    image_index = torch.where(crop_index >= 0, len(image_features) + crop_index, image_index)
                    image_features = torch.cat([image_features, outputs.look_mask_features])
                slots = into_frames(slots, frames)
            if labels is not None:
                wanted = {name: supervised & slots["valid"][name].to(supervised.device) for name in names}
                chosen = self.model.chosen_slots(wanted)
            decoded = self.model.decode_signals(
                states.flatten(0, 1), image_features, image_index.flatten(), names, run_every_module, chosen
            )
            for name in names:
                parts = decoded[name]
                if name in chosen:  # zeros stand for what was not decoded
                    parts = [
                        part.new_zeros(positions.numel(), *part.shape[1:]).index_copy(0, chosen[name], part)
                        for part in parts
                    ]
                parts = [part.unflatten(0, positions.shape) for part in parts]
                if frames is not None:
                    parts[0] = SIGNALS[name].out_of_frame(parts[0], frames)
                fields |= dict(zip(SIGNALS[name].prediction_names, parts, strict=True))
        if labels is not None:
            loss_lm = self.config.lm_loss_weight * self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=F.pad(labels[:, 1:], (0, 1), value=-100)[:, kept],
            )
            share = 1.0 if num_items_in_batch is None else (labels[:, 1:] != -100).sum() / num_items_in_batch
            terms, loss_iou = signal_losses(self.config, decoded, slots, supervised, counts, share, chosen)
            zero = loss_lm.new_zeros(())
            terms = {signal.loss_name: terms.get(signal.loss_name, zero) for signal in self.model.signals.values()}
            terms["loss_iou"] = zero + loss_iou
            fields |= {"loss": sum(terms.values(), start=loss_lm), "loss_lm": loss_lm, **terms}
        return PerceptionGPTOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            last_hidden_state=kept_states if labels is None else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **fields,
        )


# `generate` asks for this signature at every step, and taking it apart again each time costs as much as a layer.
PerceptionGPTForConditionalGeneration.forward.__signature__ = inspect.signature(
    PerceptionGPTForConditionalGeneration.forward
)

PerceptionGPTModel.register_for_auto_class("AutoModel")
PerceptionGPTForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["PerceptionGPTForConditionalGeneration", "PerceptionGPTModel", "PerceptionGPTPreTrainedModel"]
