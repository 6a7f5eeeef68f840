"""
PerceptionGPT (arXiv 2311.06612): a vision tower, a language model, and `<vis>`, whose embedding is computed from a box
or a mask on the way in and whose predicting hidden state is decoded to a box and a mask on the way out.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils import can_return_tuple, logging, torch_compilable_check

from .configuration_perceptiongpt import (
    ADDED_TOKENS,
    IMAGE_TOKEN,
    PerceptionGPTConfig,
    add_perception_tokens,
)
from .generation_perceptiongpt import PerceptionGPTGenerationMixin
from .signal_mask_perceptiongpt import sine_position_table
from .signal_perceptiongpt import SignalEmbeddingNorm
from .signals_perceptiongpt import SIGNALS, take_signal_counts, take_signal_inputs, with_signal_fields
from .slots_perceptiongpt import align_slots, prepare_slots, several_processes, slot_images, slot_positions


logger = logging.get_logger(__name__)

# The config's names for the first of `ADDED_TOKENS`; the rest are reserved.
TOKEN_ID_NAMES = ("image_token_id", "vis_token_id", "phrase_start_token_id", "phrase_end_token_id")


@dataclass
class PerceptionGPTImageFeatures(BaseModelOutputWithPooling):
    r"""
    pooler_output (`torch.Tensor` of shape `(images, grid * grid, text_hidden_size)`):
        What stands in for the `<image>` tokens of each picture.
    mask_features (`torch.Tensor` of shape `(images, grid * grid, vision_hidden_size)`):
        What the mask decoder reads, from the same pass of the tower; `None` where the config has a finer mask path.
    """

    mask_features: torch.Tensor | None = None


@dataclass
class PerceptionGPTModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_hidden_states (`torch.Tensor` of shape `(images, grid * grid, text_hidden_size)`, *optional*):
        The projected features of the pictures.
    mask_features (`torch.Tensor` of shape `(images, mask_grid * mask_grid, vision_hidden_size)`, *optional*):
        The features that the mask decoder reads.
    """

    image_hidden_states: torch.Tensor | None = None
    mask_features: torch.Tensor | None = None


@with_signal_fields(lambda signal: (signal.loss_name, *signal.prediction_names))
@dataclass
class PerceptionGPTOutputWithPast(ModelOutput):
    r"""
    loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
        The sum of the terms below, each already weighted (paper, equations 2 to 5).
    loss_lm, loss_box, loss_mask, loss_point, loss_iou (`torch.Tensor` of shape `()`, *optional*):
        Cross-entropy; L1 + GIoU; binary cross-entropy + Dice; L1; squared error of the predicted IoUs and of the
        predicted scores of points. Each is a sum over its own tokens, boxes, masks or points, divided by their number.
    logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`)
    past_key_values (`Cache`, *optional*)
    pred_boxes (`torch.Tensor` of shape `(batch_size, K, 4)`, *optional*):
        xyxy in 0..1 of the padded square, from the state that predicts the k-th `<vis>` of each row.
    pred_mask_logits (`torch.Tensor` of shape `(batch_size, K, M, M)`, *optional*): on the padded square.
    pred_points (`torch.Tensor` of shape `(batch_size, K, 2)`, *optional*): xy in 0..1 of the padded square.
    pred_box_iou, pred_mask_iou (`torch.Tensor` of shape `(batch_size, K)`, *optional*): the IoU expected of each.
    pred_point_score (`torch.Tensor` of shape `(batch_size, K)`, *optional*):
        How near to its target each point is expected to be, see [`PointSignal.loss`].
    last_hidden_state (`torch.Tensor` of shape `(batch_size, kept, hidden_size)`, *optional*):
        The states that `logits` was read from; left out when there are `labels`.
    hidden_states, attentions (`tuple(torch.Tensor)`, *optional*): of the language model.
    image_hidden_states (`torch.Tensor`, *optional*): the projected features of the images.
    """

    loss: torch.Tensor | None = None
    loss_lm: torch.Tensor | None = None
    loss_box: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    loss_point: torch.Tensor | None = None
    loss_iou: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    pred_boxes: torch.Tensor | None = None
    pred_mask_logits: torch.Tensor | None = None
    pred_points: torch.Tensor | None = None
    pred_box_iou: torch.Tensor | None = None
    pred_mask_iou: torch.Tensor | None = None
    pred_point_score: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


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
        weights = weights.to(layers[0].dtype)
        mixture = weights[0] * layers[0]
        for index, layer in enumerate(layers[1:], start=1):
            mixture = mixture + weights[index] * layer
        return mixture


class PositionTable(nn.Module):
    """
    Adds a fixed 2-D position table times a learned gain: a fresh tower says nothing of where its patches lie.

    The table is laid out at `AMPLITUDE` times each picture's features, whatever scale a tower works at: enough for a
    linear probe of the projected tokens to find the patch with R2 > 0.9, be the fresh tower CLIP, SigLIP or DINOv2.
    """

    AMPLITUDE = 4.0

    def __init__(self, initial_gain: float):
        super().__init__()
        self.initial_gain = initial_gain
        self.gain = nn.Parameter(torch.full((1,), initial_gain))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`features` of shape `(images, grid * grid, width)`."""
        grid = round(features.shape[1] ** 0.5)
        table = sine_position_table(grid, features.shape[2], features.device)
        scale = features.detach().float().square().mean((1, 2), keepdim=True).sqrt()
        return features + (self.gain.float() * self.AMPLITUDE * scale * table).to(features.dtype)


class PerceptionGPTMultiModalProjector(nn.Module):
    """Two-layer MLP from the tower's width to the language model's, named as LLaVA names it."""

    def __init__(self, config: PerceptionGPTConfig):
        super().__init__()
        text_width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, text_width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_width, text_width, bias=bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))


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

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """As in the library, but names on disk are those of `state_dict()`, not a tower's older ones."""
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

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
        self.vision_tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        num_layers = config.vision_config.num_hidden_layers
        self.language_mixture = FeatureMixture(num_layers, config.mixture_base_layer)
        self.mask_mixture = FeatureMixture(num_layers, config.mixture_base_layer)
        self.position_table = PositionTable(config.position_gain)
        self.multi_modal_projector = PerceptionGPTMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
        # Gemma scales its token embeddings inside the embedding layer.
        embedding_scale = getattr(self.language_model.get_input_embeddings(), "scalar_embed_scale", 1.0)
        embedding_rms = embedding_scale * getattr(config.text_config, "initializer_range", 0.02)
        self.signals = {name: SIGNALS[name] for name in config.signals}
        self._signal_module_names = []
        parts = list(self.multi_modal_projector.modules())
        for signal in self.signals.values():
            for name, module in signal.build_modules(config, embedding_rms).items():
                setattr(self, name, module)
                self._signal_module_names.append(name)
                parts.extend(module.modules())
        for part in parts:
            part.is_signal_part = True
        # Coordinates stay float32 whatever the rest is loaded in.
        self._keep_in_fp32_modules_strict = self._signal_module_names
        self._no_split_modules = [
            *self._no_split_modules,
            *(type(module).__name__ for module in self.signal_modules().values()),
        ]
        self.post_init()

    def signal_modules(self) -> dict[str, nn.Module]:
        """The modules of the checkpoint's signals by attribute name."""
        return {name: getattr(self, name) for name in self._signal_module_names}

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model

    def _tower_layers(self, pixel_values: torch.Tensor, **kwargs) -> tuple[torch.Tensor, ...]:
        """Outputs of layers 1..n of the tower on `(images, 3, S, S)`, class and register tokens dropped."""
        config = self.config.vision_config
        if pixel_values.shape[-1] != config.image_size:
            accepted = inspect.signature(self.vision_tower.forward).parameters
            # DINOv2 interpolates its position embeddings without being asked.
            if "interpolate_pos_encoding" in accepted:
                kwargs["interpolate_pos_encoding"] = True
        outputs = self.vision_tower(
            pixel_values.to(self.vision_tower.dtype), output_hidden_states=True, return_dict=True, **kwargs
        )
        cells = (pixel_values.shape[-1] // config.patch_size) ** 2
        return tuple(layer[:, layer.shape[1] - cells :] for layer in outputs.hidden_states[1:])

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> PerceptionGPTImageFeatures:
        """
        Encodes pictures, each with one pass of the tower.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, 3, S, S)`)
        """
        kwargs.pop("return_dict", None)
        layers = self._tower_layers(pixel_values, **kwargs)
        features = self.position_table(self.language_mixture(layers))
        return PerceptionGPTImageFeatures(
            last_hidden_state=layers[-1],
            pooler_output=self.multi_modal_projector(features),
            mask_features=None if self.config.mask_image_size else self.mask_mixture(layers),
        )

    def get_mask_features(self, mask_pixel_values: torch.Tensor) -> torch.Tensor:
        """`(images, 3, S', S')` to what the mask decoder reads, `(images, mask_grid**2, vision_hidden_size)`."""
        return self.mask_mixture(self._tower_layers(mask_pixel_values))

    def encode_signals(self, values: dict, read: dict) -> torch.Tensor:
        """
        Embeddings of `<vis>` slots: the mean over the signals that are read.

        Args:
            values (`dict[str, torch.Tensor]`): by signal name, of shape `(batch_size, K, ...)` or `(1, 1, ...)`.
            read (`dict[str, torch.Tensor]`): by signal name, bool of shape `(batch_size, K)` or `(1, 1)`.

        Returns:
            `torch.Tensor` of shape `(batch_size, K, hidden_size)`, float32, of no meaning where nothing is read.
        """
        total, count = 0, 0
        # Outside autocast: bfloat16 coordinates would fall into bins.
        with torch.autocast(next(iter(values.values())).device.type, enabled=False):
            for name, value in values.items():
                embeddings = self.signals[name].encode(self, value.flatten(0, 1)).unflatten(0, value.shape[:2])
                weight = read[name][..., None].to(embeddings)
                total, count = total + weight * embeddings, count + weight
            return total / count.clamp(min=1)

    def decode_signals(
        self,
        states: torch.Tensor,
        image_features: torch.Tensor,
        image_index: torch.Tensor,
        names=None,
        every_signal: bool = False,
    ) -> dict:
        """
        Decodes final-norm hidden states, each the one that predicts a `<vis>`.

        Args:
            states (`torch.Tensor` of shape `(N, hidden_size)`)
            image_features (`torch.Tensor` of shape `(images, mask_grid * mask_grid, vision_hidden_size)`)
            image_index (`torch.Tensor` of shape `(N,)`, int64): the image each state speaks of, -1 for none.
            names (`Iterable[str]`, *optional*): the signals to decode; by default all.
            every_signal (`bool`): whether the other signals are decoded, too, from the first state alone.

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: by signal name the values `(N, ...)` and their predicted
            quality `(N,)`.
        """
        decoded = {}
        with torch.autocast(states.device.type, enabled=False):
            for name, signal in self.signals.items():
                if names is None or name in names:
                    decoded[name] = signal.decode(self, states, image_features, image_index)
                elif every_signal:
                    decoded[name] = signal.decode(self, states[:1], image_features, image_index[:1])
        return decoded

    def feed_back(self, states: torch.Tensor) -> torch.Tensor:
        """
        Closes the loop: states `(rows, hidden_size)` to the values they decode to, and those to the embeddings, of the
        same shape, that the language model reads as the `<vis>` just emitted. The table says which signals are fed
        back: the box alone, unless another one says so.
        """
        with torch.autocast(states.device.type, enabled=False):
            fed_back = [signal for signal in self.signals.values() if signal.fed_back]
            embeddings = [signal.encode(self, signal.decode(self, states, None, None)[0]) for signal in fed_back]
            return sum(embeddings) / len(embeddings)

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
        signal_embeds: torch.Tensor | None = None,
        signal_embeds_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
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
                questions behind one picture; `position_ids` must then be given.
            mask_pixel_values (`torch.Tensor` of shape `(images, 3, S', S')`, *optional*): for the finer mask path.
            mask_image_index (`torch.LongTensor` of shape `(images,)`, *optional*):
                Row of `mask_pixel_values` of each picture, -1 where it was left out; by default picture i has row i.
            boxes (`torch.Tensor` of shape `(batch_size, K, 4)`, *optional*):
                xyxy in 0..1 of the padded square; slot k is the k-th `<vis>` of its row.
            masks (`torch.Tensor` of shape `(batch_size, K, M, M)`, *optional*): same slots, on the padded square.
            points (`torch.Tensor` of shape `(batch_size, K, 2)`, *optional*): same slots, xy in 0..1 of the square.
            boxes_valid, masks_valid, points_valid (`torch.Tensor` of shape `(batch_size, K)`, bool, *optional*):
                The value is known; by default where the tensor is given.
            boxes_read, masks_read, points_read (`torch.Tensor` of shape `(batch_size, K)`, bool, *optional*):
                The value enters the embedding of its `<vis>`; by default where it is valid.
            boxes_noise (`torch.Tensor` of shape `(batch_size, K, 4)`, *optional*): added to the boxes that are read.
            signal_embeds, signal_embeds_mask (`(batch_size, n, hidden_size)` and bool `(batch_size, n)`, *optional*):
                Ready-made embeddings for the last n positions, used where the bool mask is True.
            mm_encoder_outputs (`dict`, *optional*): `{"image": get_image_features(...)}` computed earlier.
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
        elif run_every_module:
            side = self.config.vision_config.image_size
            unused = self.get_image_features(inputs_embeds.new_zeros(1, 3, side, side), return_dict=True)
            mask_features = unused.mask_features
            inputs_embeds = inputs_embeds + 0 * unused.pooler_output.sum().to(inputs_embeds)
        if mask_pixel_values is not None and self.config.mask_image_size:
            mask_features = self.get_mask_features(mask_pixel_values)
            if mask_image_index is not None:
                mask_features = mask_features[mask_image_index.clamp(min=0)]
        elif mask_features is None and run_every_module:
            side, images = self.config.mask_image_size, 1 if image_features is None else len(image_features)
            blank = self.get_mask_features(inputs_embeds.new_zeros(1, 3, side, side))
            mask_features = blank.expand(images, -1, -1)

        slots = prepare_slots(self.config, signals, vis_mask.device, run_every_module)
        if slots is not None:
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


class PerceptionGPTForConditionalGeneration(PerceptionGPTGenerationMixin, PerceptionGPTPreTrainedModel):
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
        points: torch.Tensor | None = None,
        boxes_valid: torch.Tensor | None = None,
        masks_valid: torch.Tensor | None = None,
        points_valid: torch.Tensor | None = None,
        boxes_read: torch.Tensor | None = None,
        masks_read: torch.Tensor | None = None,
        points_read: torch.Tensor | None = None,
        boxes_noise: torch.Tensor | None = None,
        signal_image_index: torch.LongTensor | None = None,
        signal_embeds: torch.Tensor | None = None,
        signal_embeds_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict | None = None,
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
            num_items_in_batch (`int` or `torch.Tensor`, *optional*):
                Supervised tokens in all micro-batches and processes of the step: what the sum of the language modelling
                losses is divided by. By default those of this batch.
            num_boxes_in_batch, num_masks_in_batch, num_points_in_batch (`int` or `torch.Tensor`, *optional*):
                Likewise for boxes, masks and points. By default those of this batch; then the mean over them counts for
                as large a share of the step as the batch has of the step's tokens.
            logits_to_keep (`int`, defaults to 0): compute logits for the last positions only; 0 for all.
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
            signal_embeds=signal_embeds,
            signal_embeds_mask=signal_embeds_mask,
            mm_encoder_outputs=mm_encoder_outputs,
            run_every_module=run_every_module,
            return_dict=True,
            **signals,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        kept_states = hidden_states[:, kept]
        logits = self.lm_head(kept_states)

        fields, decoded, supervised = {}, {}, None
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
            if self.config.mask_image_size and mask_pixel_values is None and outputs.image_hidden_states is not None:
                self.require_finer_images(names, slots, supervised if labels is not None else None)
            states = hidden_states.gather(
                1, (positions - 1).clamp(min=0)[..., None].expand(-1, -1, hidden_states.shape[2])
            )
            image_index = slot_images(image_mask, positions, self.config.image_seq_length, signal_image_index)
            image_features = outputs.mask_features
            if image_features is None:
                image_features = states.new_zeros(0, self.config.mask_grid**2, self.config.vision_config.hidden_size)
                image_index = torch.full_like(image_index, -1)
            decoded = self.model.decode_signals(
                states.flatten(0, 1), image_features, image_index.flatten(), names, run_every_module
            )
            for name in names:
                parts = [part.unflatten(0, positions.shape) for part in decoded[name]]
                fields |= dict(zip(SIGNALS[name].prediction_names, parts, strict=True))
        if labels is not None:
            fields |= self.compute_losses(logits, labels, slots, supervised, decoded, num_items_in_batch, counts)
        return PerceptionGPTOutputWithPast(
            logits=logits,
            past_key_values=outputs.past_key_values,
            last_hidden_state=kept_states if labels is None else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **fields,
        )

    def require_finer_images(self, names, slots: dict, supervised: torch.Tensor | None) -> None:
        """`ValueError` if a signal is decoded from images whose finer pixels are missing, and the result matters."""
        message = (
            f"The model decodes masks from images at {self.config.mask_image_size} pixels, but `mask_pixel_values` is "
            "missing; pass what the processor of this checkpoint returns under that name."
        )
        for name in names:
            if SIGNALS[name].reads_image and supervised is None:
                raise ValueError(message)
            if SIGNALS[name].reads_image:
                wanted = supervised & slots["valid"][name].to(supervised.device)
                torch_compilable_check(~wanted.any(), message)

    def compute_losses(self, logits, labels, slots, supervised, decoded, num_items_in_batch, counts) -> dict:
        """`loss` and its terms (paper, equations 2 to 6) by name; each is a sum over its own count."""
        loss_lm = self.config.lm_loss_weight * self.loss_function(
            logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
        )
        share = 1.0
        if num_items_in_batch is not None:
            # Of a step that this batch is a part of, where only the step's tokens were counted.
            share = (labels[:, 1:] != -100).sum() / num_items_in_batch
        terms = {SIGNALS[name].loss_name: loss_lm.new_zeros(()) for name in self.model.signals}
        loss_iou = loss_lm.new_zeros(())
        for name, (predictions, quality) in decoded.items():
            targets = slots["values"][name].flatten(0, 1).to(predictions.device)
            wanted = (supervised & slots["valid"][name].to(supervised.device)).flatten()
            value_loss, quality_loss = SIGNALS[name].loss(self.config, predictions, quality, targets)
            value_loss, quality_loss = (value_loss * wanted).sum(), (quality_loss * wanted).sum()
            count = counts.get(SIGNALS[name].count_name)
            if count is None:
                count = wanted.sum().clamp(min=1) / share
            value_loss, quality_loss = value_loss / count, quality_loss / count
            terms[SIGNALS[name].loss_name] = value_loss
            loss_iou = loss_iou + quality_loss
        loss = loss_lm
        for term in (*terms.values(), loss_iou):
            loss = loss + term
        return {"loss": loss, "loss_lm": loss_lm, **terms, "loss_iou": loss_iou}

    @classmethod
    def from_vision_text_pretrained(cls, vision: str, text: str, *, tokenizer=None, dtype=None, **config_kwargs):
        """
        Joins a vision backbone and a causal language model, both from the Hub or a folder.

        Args:
            vision (`str`): a vision model, or a CLIP or SigLIP whose vision half is taken.
            text (`str`): a causal language model; it is loaded with its head.
            tokenizer (*optional*):
                The tokenizer that says which ids the added tokens have; by default the one beside `text`, to which they
                are added. Where there is none, they follow the vocabulary.
            dtype (`torch.dtype` or `str`, *optional*): what the backbones are loaded in.
            config_kwargs: any argument of [`PerceptionGPTConfig`]; `position_gain` is 0 unless given, since pretrained
                towers know where their patches lie (pass 1 for backbones that were never trained).
        """
        vision_config = AutoConfig.from_pretrained(vision)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        vision_tower = MODEL_MAPPING[type(vision_config)].from_pretrained(vision, config=vision_config, dtype=dtype)
        text_model = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
        if tokenizer is None:
            tokenizer = cls._find_tokenizer(text)
        model = cls._join(vision_tower, text_model.base_model, text_model.lm_head, tokenizer, config_kwargs)
        model._init_added_rows(text_model.config.vocab_size)
        return model

    @classmethod
    def from_llava_pretrained(cls, llava: str, *, tokenizer=None, dtype=None, **config_kwargs):
        """
        Starts from a LLaVA checkpoint: the same logits at first, and signal modules to train.

        Args:
            llava (`str`): a checkpoint of [`LlavaForConditionalGeneration`], from the Hub or a folder.
            tokenizer, dtype, config_kwargs: as in [`from_vision_text_pretrained`].
        """
        model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=dtype)
        config, num_layers = model.config, model.config.vision_config.num_hidden_layers
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(
                f"{llava} concatenates the tower layers {layer}: expected a single `vision_feature_layer`."
            )
        # LLaVA counts the embeddings as layer 0, the mixtures start with the output of the first layer.
        initial_layer = (layer if layer >= 0 else num_layers + 1 + layer) - 1
        config_kwargs = {
            "mixture_base_layer": initial_layer,
            "projector_hidden_act": config.projector_hidden_act,
            "multimodal_projector_bias": config.multimodal_projector_bias,
            "image_token_id": config.image_token_id,
            **config_kwargs,
        }
        if tokenizer is None:
            tokenizer = cls._find_tokenizer(llava)
        joined = cls._join(
            model.model.vision_tower, model.model.language_model, model.lm_head, tokenizer, config_kwargs
        )
        joined._init_added_rows(config.text_config.vocab_size, first=config.text_config.vocab_size)
        joined.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
        return joined

    @staticmethod
    def _find_tokenizer(folder_or_id: str):
        """The tokenizer of a checkpoint with `ADDED_TOKENS`, or `None` where there is none."""
        try:
            return AutoTokenizer.from_pretrained(folder_or_id)
        except (OSError, ValueError, KeyError) as error:
            logger.warning(f"No tokenizer beside {folder_or_id}, added tokens follow its vocabulary ({error}).")
            return None

    @classmethod
    def _join(cls, vision_tower, language_model, lm_head, tokenizer, config_kwargs: dict):
        """Builds the model around loaded backbones, gives the added tokens their rows and the signals their scale."""
        text_config, vocabulary = language_model.config, language_model.config.vocab_size
        if tokenizer is None:
            ids = list(range(vocabulary, vocabulary + len(ADDED_TOKENS)))
        else:
            add_perception_tokens(tokenizer)
            ids = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
        token_ids = dict(zip(TOKEN_ID_NAMES, ids, strict=False), reserved_token_ids=ids[len(TOKEN_ID_NAMES) :])
        config = PerceptionGPTConfig(
            vision_config=vision_tower.config,
            text_config=text_config,
            # A new composite config would reset those of the loaded parts.
            attn_implementation={
                "vision_config": vision_tower.config._attn_implementation,
                "text_config": text_config._attn_implementation,
            },
            **{"position_gain": 0.0, **token_ids, **config_kwargs},
        )
        model = cls(config, vision_tower=vision_tower, language_model=language_model, lm_head=lm_head)
        model.to(language_model.dtype)
        for module in model.model.signal_modules().values():
            module.float()
        if max(ids) >= vocabulary:
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        model.tie_weights()
        return model

    @torch.no_grad()
    def _init_added_rows(self, vocabulary: int, first: int = 0) -> None:
        """
        Sets the rows of the added tokens with an id of at least `first`, in and out, to the mean of the `vocabulary`
        rows that were loaded and a little noise, and the signals' scale to the length of the token embeddings.
        """
        ids = [getattr(self.config, name) for name in TOKEN_ID_NAMES] + self.config.reserved_token_ids
        new = [index for index in ids if index >= first]
        embeddings = self.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        for weight in {id(weight): weight for weight in (embeddings.weight, self.lm_head.weight)}.values():
            rows = weight[:vocabulary].float()
            noise = torch.randn(len(new), weight.shape[1], generator=generator).to(weight.device) * rows.std()
            weight[new] = (rows.mean(0) + 0.1 * noise).to(weight.dtype)
        sample = torch.arange(min(vocabulary, 4096), device=embeddings.weight.device)
        embedding_rms = embeddings(sample).float().square().mean().sqrt()
        for module in self.model.signal_modules().values():
            if hasattr(module, "norm"):
                module.norm.weight.fill_(embedding_rms)


PerceptionGPTModel.register_for_auto_class("AutoModel")
PerceptionGPTForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["PerceptionGPTForConditionalGeneration", "PerceptionGPTModel", "PerceptionGPTPreTrainedModel"]
