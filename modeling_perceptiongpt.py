"""
PerceptionGPT (arXiv 2311.06612): a vision tower, a language model, and `<vis>`, whose embedding is computed from a box
or a mask on the way in and whose predicting hidden state is decoded to a box and a mask on the way out.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import can_return_tuple, logging, torch_compilable_check

from .configuration_perceptiongpt import IMAGE_TOKEN, PerceptionGPTConfig
from .generation_perceptiongpt import PerceptionGPTGenerationMixin
from .joining_perceptiongpt import JoiningMixin
from .signal_box_perceptiongpt import SignalEmbeddingNorm
from .signals_perceptiongpt import SIGNALS
from .vision_perceptiongpt import (
    FeatureMixture,
    PerceptionGPTMultiModalProjector,
    PositionTable,
    VisionStages,
    feature_maps,
    find_stages,
    resample,
    tower_layers,
)


logger = logging.get_logger(__name__)


@dataclass
class PerceptionGPTImageFeatures(BaseModelOutputWithPooling):
    r"""
    pooler_output (`torch.Tensor` of shape `(images, grid * grid, text_hidden_size)`):
        What stands in for the `<image>` tokens of each picture.
    mask_features (`torch.Tensor` of shape `(images, mask_cells, feature_size)`):
        What the mask decoder reads, from the same pass of the tower; `None` where the config has a finer mask path.
    """

    mask_features: torch.Tensor | None = None


@dataclass
class PerceptionGPTModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_hidden_states (`torch.Tensor` of shape `(images, grid * grid, text_hidden_size)`, *optional*):
        The projected features of the pictures.
    mask_features (`torch.Tensor` of shape `(images, mask_cells, feature_size)`, *optional*):
        The features that the mask decoder reads.
    """

    image_hidden_states: torch.Tensor | None = None
    mask_features: torch.Tensor | None = None


@dataclass
class PerceptionGPTOutputWithPast(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
        The sum of the four terms below, each already weighted (paper, equations 2 to 5).
    loss_lm, loss_box, loss_mask, loss_iou (`torch.Tensor` of shape `()`, *optional*):
        Cross-entropy; L1 + GIoU; binary cross-entropy + Dice; squared error of the predicted IoUs. Each is a sum over
        its own tokens, boxes or masks, divided by their number.
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`)
    past_key_values (`Cache`, *optional*)
    pred_boxes (`torch.Tensor` of shape `(batch_size, K, 4)`, *optional*):
        xyxy in 0..1 of the padded square, from the state that predicts the k-th `<vis>` of each row.
    pred_mask_logits (`torch.Tensor` of shape `(batch_size, K, M, M)`, *optional*): on the padded square.
    pred_box_iou, pred_mask_iou (`torch.Tensor` of shape `(batch_size, K)`, *optional*): the IoU expected of each.
    last_hidden_state (`torch.Tensor` of shape `(batch_size, kept, hidden_size)`, *optional*):
        The states that `logits` was read from; left out when there are `labels`.
    hidden_states, attentions (`tuple(torch.Tensor)`, *optional*): of the language model.
    image_hidden_states (`torch.Tensor`, *optional*): the projected features of the pictures.
    """

    loss: torch.Tensor | None = None
    loss_lm: torch.Tensor | None = None
    loss_box: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    loss_iou: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    pred_boxes: torch.Tensor | None = None
    pred_mask_logits: torch.Tensor | None = None
    pred_box_iou: torch.Tensor | None = None
    pred_mask_iou: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class PerceptionGPTPreTrainedModel(PreTrainedModel):
    config: PerceptionGPTConfig
    config_class = PerceptionGPTConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BoxEncoder", "BoxDecoder", "MaskEncoder", "MaskDecoder", "PerceptionGPTMultiModalProjector"]
    _skip_keys_device_placement = ["past_key_values", "signal_state"]
    # Coordinates stay float32 whatever the rest is loaded in.
    _keep_in_fp32_modules_strict = ["box_encoder", "box_decoder", "mask_encoder", "mask_decoder"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

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
        if getattr(module, "is_signal_part", False) and isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif getattr(module, "is_signal_part", False) and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, SignalEmbeddingNorm):
            init.constant_(module.weight, module.initial_value)
        elif isinstance(module, PositionTable):
            init.constant_(module.gain, module.initial_gain)
        elif isinstance(module, FeatureMixture):
            init.zeros_(module.logits)
            if module.initial_layer is not None:
                init.zeros_(module.gate)
                one_hot = torch.arange(len(module.logits), device=module.logits.device) == module.initial_layer
                init.copy_(module.logits, 6.0 * one_hot)


class PerceptionGPTModel(PerceptionGPTPreTrainedModel):
    """
    The vision tower, the language model without its head, and the signal modules.

    Args:
        config ([`PerceptionGPTConfig`])
        vision_tower, language_model (`PreTrainedModel`, *optional*): loaded backbones to take over instead of new ones.
    """

    def __init__(self, config: PerceptionGPTConfig, vision_tower=None, language_model=None):
        super().__init__(config)
        self.vision_tower = self._new_vision_tower(config) if vision_tower is None else vision_tower
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
        self.language_mixture = FeatureMixture(num_layers, config.mixture_base_layer)
        self.mask_mixture = FeatureMixture(num_layers, config.mixture_base_layer)
        self.position_table = PositionTable(config.position_gain)
        self.multi_modal_projector = PerceptionGPTMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
        # Gemma scales its token embeddings inside the embedding layer.
        embedding_scale = getattr(self.language_model.get_input_embeddings(), "scalar_embed_scale", 1.0)
        embedding_rms = embedding_scale * getattr(config.text_config, "initializer_range", 0.02)
        self._signal_module_names = []
        parts.extend(self.multi_modal_projector.modules())
        for signal in SIGNALS.values():
            for name, module in signal.build_modules(config, embedding_rms).items():
                setattr(self, name, module)
                self._signal_module_names.append(name)
                parts.extend(module.modules())
        for part in parts:
            part.is_signal_part = True
        self.post_init()

    def signal_modules(self) -> dict[str, nn.Module]:
        """The modules of all signals by attribute name."""
        return {name: getattr(self, name) for name in self._signal_module_names}

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

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
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _vision_layers(self, pixel_values: torch.Tensor, **kwargs):
        """
        One pass of the tower over `(images, 3, S, S)`.

        Returns:
            the outputs of the tower, and what equation 1 mixes: of a plain ViT the outputs `(images, cells, width)` of
            its layers 1..n, class and register tokens dropped; of a pyramid one map `(images, feature_size, height,
            width)` a stage.
        """
        if self.config.is_pyramid:  # convolutions on a CPU are fastest with the channels last
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        outputs = tower_layers(self.vision_tower, self.config.vision_config, pixel_values, **kwargs)
        if self.config.is_pyramid:
            maps = feature_maps(outputs, self.config.vision_config.model_type)
            return outputs, self.vision_stages([maps[stage["layer"]] for stage in self.config.vision_stages])
        cells = (pixel_values.shape[-1] // self.config.vision_config.patch_size) ** 2
        return outputs, tuple(layer[:, layer.shape[1] - cells :] for layer in outputs.hidden_states[1:])

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
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> PerceptionGPTImageFeatures:
        """
        Encodes images, each with one pass of the tower.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, S, S)`)
            kwargs: for the tower, such as `output_hidden_states` and `output_attentions`.
        """
        wants_states = kwargs.get("output_hidden_states")
        if wants_states is None:
            wants_states = self.config.vision_config.output_hidden_states
        outputs, layers = self._vision_layers(pixel_values, **kwargs)
        features = self.position_table(self._mix(self.language_mixture, layers, self.config.image_grid))
        return PerceptionGPTImageFeatures(
            last_hidden_state=layers[-1],
            pooler_output=self.multi_modal_projector(features),
            hidden_states=outputs.hidden_states if wants_states else None,
            attentions=getattr(outputs, "attentions", None),
            mask_features=None if self.config.mask_image_size else self._mask_features(layers),
        )

    def get_mask_features(self, mask_pixel_values: torch.Tensor) -> torch.Tensor:
        """`(images, 3, S', S')` to what the mask decoder reads, `(images, mask_cells, feature_size)`."""
        return self._mask_features(self._vision_layers(mask_pixel_values)[1])

    def encode_signals(self, values: dict, read: dict) -> torch.Tensor:
        """
        Embeddings of `<vis>` slots: the mean over the signals that are read.

        Args:
            values (`dict[str, torch.Tensor]`): by signal name, of shape `(batch_size, K, ...)`.
            read (`dict[str, torch.Tensor]`): by signal name, bool of shape `(batch_size, K)`.

        Returns:
            `torch.Tensor` of shape `(batch_size, K, hidden_size)`, float32, of no meaning where nothing is read.
        """
        total, count = 0, 0
        # Outside autocast: bfloat16 coordinates would fall into bins.
        with torch.autocast(values["box"].device.type, enabled=False):
            for name, signal in SIGNALS.items():
                embeddings = signal.encode(self, values[name].flatten(0, 1)).unflatten(0, values[name].shape[:2])
                weight = read[name][..., None].to(embeddings)
                total, count = total + weight * embeddings, count + weight
            return total / count.clamp(min=1)

    def decode_signals(self, states: torch.Tensor, image_features: torch.Tensor, image_index: torch.Tensor) -> dict:
        """
        Decodes final-norm hidden states, each the one that predicts a `<vis>`.

        Args:
            states (`torch.Tensor` of shape `(N, hidden_size)`)
            image_features (`torch.Tensor` of shape `(images, mask_cells, feature_size)`)
            image_index (`torch.Tensor` of shape `(N,)`, int64): the picture each state speaks of, -1 for none.

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: by signal name the values `(N, ...)` and their predicted
            IoU `(N,)`.
        """
        with torch.autocast(states.device.type, enabled=False):
            return {name: signal.decode(self, states, image_features, image_index) for name, signal in SIGNALS.items()}

    def feed_back(self, states: torch.Tensor) -> torch.Tensor:
        """
        Closes the loop: states `(rows, hidden_size)` to the boxes they decode to, and those to the embeddings, of the
        same shape, that the language model reads as the `<vis>` just emitted. Masks are not fed back.
        """
        with torch.autocast(states.device.type, enabled=False):
            boxes, _ = SIGNALS["box"].decode(self, states, None, None)
            return SIGNALS["box"].encode(self, boxes)

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
        boxes_valid: torch.Tensor | None = None,
        masks_valid: torch.Tensor | None = None,
        boxes_read: torch.Tensor | None = None,
        masks_read: torch.Tensor | None = None,
        boxes_noise: torch.Tensor | None = None,
        signal_embeds: torch.Tensor | None = None,
        signal_embeds_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> PerceptionGPTModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Each `<image>` already expanded to `config.image_seq_length` tokens.
            pixel_values (`torch.Tensor` of shape `(images, 3, S, S)`): flat, rows in order.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                Or bool `(batch_size, 1, sequence_length, sequence_length)`, True = attends, for rows that pack several
                questions behind one picture; `position_ids` must then be given.
            mask_pixel_values (`torch.Tensor` of shape `(images, 3, S', S')`, *optional*): for the finer mask path.
            mask_image_index (`torch.LongTensor` of shape `(images,)`, *optional*):
                Row of `mask_pixel_values` of each picture, -1 where it was left out; by default picture i has row i.
            boxes (`torch.Tensor` of shape `(batch_size, K, 4)`, *optional*):
                xyxy in 0..1 of the padded square; slot k is the k-th `<vis>` of its row.
            masks (`torch.Tensor` of shape `(batch_size, K, M, M)`, *optional*): same slots, on the padded square.
            boxes_valid, masks_valid (`torch.Tensor` of shape `(batch_size, K)`, bool, *optional*):
                The value is known; by default where the tensor is given.
            boxes_read, masks_read (`torch.Tensor` of shape `(batch_size, K)`, bool, *optional*):
                The value enters the embedding of its `<vis>`; by default where it is valid.
            boxes_noise (`torch.Tensor` of shape `(batch_size, K, 4)`, *optional*): added to the boxes that are read.
            signal_embeds, signal_embeds_mask (`(batch_size, n, hidden_size)` and bool `(batch_size, n)`, *optional*):
                Ready-made embeddings for the last n positions, used where the bool mask is True.
            mm_encoder_outputs (`dict`, *optional*): `{"image": get_image_features(...)}` computed earlier.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of `input_ids` and `inputs_embeds`.")
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("Expected at most one of `pixel_values` and `mm_encoder_outputs`.")
        vis_mask = self.token_mask(input_ids, inputs_embeds, self.config.vis_token_id)
        image_mask = self.token_mask(input_ids, inputs_embeds, self.config.image_token_id)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        image_outputs = (mm_encoder_outputs or {}).get("image")
        if image_outputs is None and pixel_values is not None:
            image_outputs = self.get_image_features(pixel_values, return_dict=True)
        image_features = mask_features = None
        if image_outputs is not None:
            mask_features = getattr(image_outputs, "mask_features", None)
            image_features = image_outputs.pooler_output
            if not isinstance(image_features, torch.Tensor):
                image_features = torch.stack(list(image_features))
            image_features = image_features.to(inputs_embeds.device, inputs_embeds.dtype)
            torch_compilable_check(
                image_mask.sum() == image_features.shape[0] * image_features.shape[1],
                lambda: (
                    f"The rows hold {image_mask.sum()} {IMAGE_TOKEN} tokens, the {image_features.shape[0]} pictures "
                    f"given have {image_features.shape[0] * image_features.shape[1]} features: expected one token each."
                ),
            )
            inputs_embeds = inputs_embeds.masked_scatter(image_mask[..., None], image_features)
        elif self.training:
            # Every module runs in every step, here on a blank picture, or processes whose batches differ in kind
            # wait for each other.
            side = self.config.image_size
            unused = self.get_image_features(inputs_embeds.new_zeros(1, 3, side, side), return_dict=True)
            mask_features = unused.mask_features
            inputs_embeds = inputs_embeds + 0 * unused.pooler_output.sum().to(inputs_embeds)
        if mask_pixel_values is not None and self.config.mask_image_size:
            mask_features = self.get_mask_features(mask_pixel_values)
            if mask_image_index is not None:
                mask_features = mask_features[mask_image_index.clamp(min=0)]
        elif mask_features is None and self.training:
            side, images = self.config.mask_image_size, 1 if image_features is None else len(image_features)
            blank = self.get_mask_features(inputs_embeds.new_zeros(1, 3, side, side))
            mask_features = blank.expand(images, -1, -1)

        slots = self.prepare_slots(boxes, masks, boxes_valid, masks_valid, boxes_read, masks_read, vis_mask)
        if slots is not None:
            values, read = slots["values"], slots["read"]
            if boxes_noise is not None and boxes_noise.shape[1]:  # a batch without signals has one padded slot
                values = {**values, "box": values["box"] + boxes_noise.to(values["box"])}
            embeddings = self.encode_signals(values, read).to(inputs_embeds.device, inputs_embeds.dtype)
            embeddings, replaced = self.align_slots(embeddings, read, vis_mask)
            inputs_embeds = torch.where(replaced[..., None], embeddings, inputs_embeds)
        if signal_embeds is not None:
            length = inputs_embeds.shape[1] - signal_embeds.shape[1]
            tail = torch.where(
                signal_embeds_mask[..., None], signal_embeds.to(inputs_embeds), inputs_embeds[:, length:]
            )
            inputs_embeds = torch.cat([inputs_embeds[:, :length], tail], dim=1) if length else tail

        # With a static cache `generate` hands over a dict of masks, one for each kind of layer.
        if getattr(attention_mask, "dtype", None) == torch.bool and attention_mask.ndim == 4:
            attention_mask = self.additive_mask(attention_mask, position_ids, inputs_embeds.dtype)
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
        )

    def prepare_slots(self, boxes, masks, boxes_valid, masks_valid, boxes_read, masks_read, like) -> dict | None:
        """
        Fills in what the caller left out of the six signal tensors; `like` is any tensor with the batch's rows and
        device.

        Returns:
            `dict` of `values`, `valid` and `read`, each by signal name; `None` where there is no slot and no training.
        """
        given = {"box": (boxes, boxes_valid, boxes_read), "mask": (masks, masks_valid, masks_read)}
        tensors = [value for value, _, _ in given.values() if value is not None]
        num_slots = max((value.shape[1] for value in tensors), default=0)
        if num_slots == 0 and not self.training:
            return None
        # One slot that nothing reads and nothing supervises, so that the signal modules run in every step.
        batch_size, num_slots, device = len(like), max(num_slots, 1), like.device
        slots = {"values": {}, "valid": {}, "read": {}}
        for name, (value, valid, read) in given.items():
            if value is None or value.shape[1] == 0:
                value = SIGNALS[name].pad(self.config, batch_size, num_slots, device)
                valid = read = torch.zeros(batch_size, num_slots, dtype=torch.bool, device=device)
            elif valid is None:
                valid = torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
            slots["values"][name] = value
            slots["valid"][name] = valid
            slots["read"][name] = valid if read is None else read
        return slots

    def align_slots(self, embeddings: torch.Tensor, read: dict, vis_mask: torch.Tensor):
        """
        Lays slot embeddings `(batch_size, K, hidden_size)` out over the sequence.

        Returns:
            embeddings `(batch_size, sequence_length, hidden_size)` and the bool mask of the `<vis>` that take theirs;
            a `<vis>` for which nothing is read, or beyond the slots, keeps its static row.
        """
        slot = vis_mask.cumsum(1) - 1
        in_range = vis_mask & (slot < embeddings.shape[1])
        slot = slot.clamp(0, embeddings.shape[1] - 1)
        read_any = torch.stack(list(read.values())).any(0).to(vis_mask.device)
        aligned = embeddings.gather(1, slot[..., None].expand(-1, -1, embeddings.shape[2]))
        return aligned, in_range & read_any.gather(1, slot)

    def slot_positions(self, vis_mask: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Where the k-th `<vis>` of each row stands, `(batch_size, num_slots)`, and whether there is one; of fixed shape,
        so that the host never waits to learn how many there are.
        """
        length = vis_mask.shape[1]
        order = vis_mask * torch.arange(length, 0, -1, device=vis_mask.device)
        found, positions = order.topk(min(num_slots, length), dim=1)
        missing = num_slots - positions.shape[1]
        return nn.functional.pad(positions, (0, missing)), nn.functional.pad(found, (0, missing)) > 0

    def slot_images(self, image_mask: torch.Tensor, positions: torch.Tensor, signal_image_index=None) -> torch.Tensor:
        """
        Index into the flat list of pictures for each slot, `(batch_size, K)`: the last `<image>` before it in its row,
        unless `signal_image_index` (same shape, index within the row, negative = no choice) says otherwise; -1: none.
        """
        length = self.config.image_seq_length
        seen = image_mask.cumsum(1)
        images = torch.div(seen[:, -1], length, rounding_mode="floor")
        within = torch.div(seen.gather(1, positions) + length - 1, length, rounding_mode="floor") - 1
        if signal_image_index is not None:
            within = torch.where(signal_image_index >= 0, signal_image_index, within)
        return torch.where(within >= 0, (images.cumsum(0) - images)[:, None] + within, -1)

    def additive_mask(self, attention_mask: torch.Tensor, position_ids, dtype: torch.dtype) -> torch.Tensor:
        """A bool `(batch_size, 1, L, L)` mask as what the attention back ends add to their scores."""
        text_config = self.config.text_config
        if "flash" in str(text_config._attn_implementation):
            raise ValueError(
                "Packed rows need a 4-D attention mask, which flash attention cannot take: use sdpa or eager."
            )
        window = getattr(text_config, "sliding_window", None)
        sliding = "sliding_attention" in (getattr(text_config, "layer_types", None) or ["sliding_attention"])
        if window is not None and sliding and window < attention_mask.shape[-1]:
            raise ValueError(
                f"A packed row of {attention_mask.shape[-1]} tokens is longer than the sliding window of {window}: "
                "pack fewer questions."
            )
        if position_ids is None:
            raise ValueError("A 4-D `attention_mask` needs `position_ids`: each packed question restarts its own.")
        lowest = torch.finfo(dtype).min
        return torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device).masked_fill(
            ~attention_mask, lowest
        )


class PerceptionGPTForConditionalGeneration(JoiningMixin, PerceptionGPTGenerationMixin, PerceptionGPTPreTrainedModel):
    """
    PerceptionGPT with its language modelling head: reads pictures, text, boxes and masks; writes text, boxes and masks.

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
        boxes_valid: torch.Tensor | None = None,
        masks_valid: torch.Tensor | None = None,
        boxes_read: torch.Tensor | None = None,
        masks_read: torch.Tensor | None = None,
        boxes_noise: torch.Tensor | None = None,
        signal_image_index: torch.LongTensor | None = None,
        signal_embeds: torch.Tensor | None = None,
        signal_embeds_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_boxes_in_batch: torch.Tensor | int | None = None,
        num_masks_in_batch: torch.Tensor | int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> PerceptionGPTOutputWithPast:
        r"""
        As [`PerceptionGPTModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                -100 where there is nothing to learn; boxes and masks are supervised where the label of their `<vis>` is
                not -100 and they are valid.
            signal_image_index (`torch.LongTensor` of shape `(batch_size, K)`, *optional*):
                Picture, within its row, that a slot speaks of; negative for the last one before it.
            num_items_in_batch, num_boxes_in_batch, num_masks_in_batch (`int` or `torch.Tensor`, *optional*):
                Supervised tokens, boxes and masks in all micro-batches and processes of the step: what the sums are
                divided by. By default those of this batch.
            logits_to_keep (`int`, defaults to 0): compute logits for the last positions only; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mask_pixel_values=mask_pixel_values,
            mask_image_index=mask_image_index,
            boxes=boxes,
            masks=masks,
            boxes_valid=boxes_valid,
            masks_valid=masks_valid,
            boxes_read=boxes_read,
            masks_read=masks_read,
            boxes_noise=boxes_noise,
            signal_embeds=signal_embeds,
            signal_embeds_mask=signal_embeds_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept_states = hidden_states[:, kept]
        logits = self.lm_head(kept_states)

        result = PerceptionGPTOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            last_hidden_state=kept_states if labels is None else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )
        slots = self.model.prepare_slots(boxes, masks, boxes_valid, masks_valid, boxes_read, masks_read, hidden_states)
        supervised = None
        if slots is not None:
            vis_mask = self.model.token_mask(input_ids, inputs_embeds, self.config.vis_token_id)
            image_mask = self.model.token_mask(input_ids, inputs_embeds, self.config.image_token_id)
            num_slots = slots["valid"]["box"].shape[1]
            positions, supervised = self.model.slot_positions(vis_mask, num_slots)
            predicting = (positions - 1).clamp(min=0)
            states = hidden_states.gather(1, predicting[..., None].expand(-1, -1, hidden_states.shape[2]))
            image_index = self.model.slot_images(image_mask, positions, signal_image_index)
            image_features = outputs.mask_features
            if image_features is None:
                image_features = states.new_zeros(0, self.config.mask_cells, self.config.feature_size)
                image_index = torch.full_like(image_index, -1)
            decoded = self.model.decode_signals(states.flatten(0, 1), image_features, image_index.flatten())
            shape = (hidden_states.shape[0], num_slots)
            result.pred_boxes, result.pred_box_iou = (part.unflatten(0, shape) for part in decoded["box"])
            result.pred_mask_logits, result.pred_mask_iou = (part.unflatten(0, shape) for part in decoded["mask"])
            if labels is not None:
                supervised = supervised & (labels.gather(1, positions) != -100)
        if labels is not None:
            counts = {"box": num_boxes_in_batch, "mask": num_masks_in_batch}
            self.add_losses(result, labels, slots, supervised, decoded if slots else {}, num_items_in_batch, counts)
        # Made anew: as a tuple or dict it lists its fields in the order they were set in, and the loss comes first.
        return replace(result)

    def add_losses(self, result, labels, slots, supervised, decoded, num_items_in_batch, counts) -> None:
        """Sets `loss` and its terms (paper, equations 2 to 6) on `result`; each is a sum over its own count."""
        result.loss_lm = self.config.lm_loss_weight * self.loss_function(
            logits=result.logits,
            labels=labels,
            vocab_size=result.logits.shape[-1],
            num_items_in_batch=num_items_in_batch,
        )
        terms = dict.fromkeys(SIGNALS, result.loss_lm.new_zeros(()))
        result.loss_iou = result.loss_lm.new_zeros(())
        for name, (predictions, predicted_iou) in decoded.items():
            targets = slots["values"][name].flatten(0, 1).to(predictions.device)
            wanted = (supervised & slots["valid"][name].to(supervised.device)).flatten()
            signal_loss, iou_loss = SIGNALS[name].loss(self.config, predictions, predicted_iou, targets)
            count = wanted.sum().clamp(min=1) if counts[name] is None else counts[name]
            terms[name] = (signal_loss * wanted).sum() / count
            result.loss_iou = result.loss_iou + (iou_loss * wanted).sum() / count
        result.loss_box, result.loss_mask = terms["box"], terms["mask"]
        result.loss = result.loss_lm + result.loss_box + result.loss_mask + result.loss_iou


PerceptionGPTModel.register_for_auto_class("AutoModel")
PerceptionGPTForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["PerceptionGPTForConditionalGeneration", "PerceptionGPTModel", "PerceptionGPTPreTrainedModel"]
