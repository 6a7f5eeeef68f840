"""What `forward` and `generate` return."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput

from .signals_perceptiongpt import with_signal_fields


@dataclass
class PerceptionGPTImageFeatures(BaseModelOutputWithPooling):
    r"""
    pooler_output (`torch.Tensor` of shape `(images, grid * grid, text_hidden_size)`):
        What stands in for the `<image>` tokens of each image.
    mask_features (`torch.Tensor` of shape `(images, mask_cells, feature_size)`):
        What the mask decoder reads, from the same pass of the tower; `None` where the config has a finer mask path.
    tower_states (`tuple[torch.Tensor]`, *optional*):
        What `mask_features` can be made of, where they were not asked for.
    layers (`tuple[torch.Tensor]`, *optional*):
        Of models that encode an image again what they read then, see [`reencoding_layers`].
    """

    mask_features: torch.Tensor | None = None
    tower_states: tuple[torch.Tensor, ...] | None = None
    layers: tuple[torch.Tensor, ...] | None = None


@dataclass
class PerceptionGPTModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    image_hidden_states (`torch.Tensor` of shape `(images, grid * grid, text_hidden_size)`, *optional*):
        The projected features of the images.
    mask_features (`torch.Tensor` of shape `(images, mask_cells, feature_size)`, *optional*):
        The features that the mask decoder reads.
    look_mask_features (`torch.Tensor` of shape `(crops, mask_cells, feature_size)`, *optional*):
        Likewise of the crops, where masks are decoded from them.
    """

    image_hidden_states: torch.Tensor | None = None
    mask_features: torch.Tensor | None = None
    look_mask_features: torch.Tensor | None = None


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
    pred_mask_logits (`torch.Tensor` of shape `(batch_size, K, M, M)`, *optional*):
        On the padded square, or on the frame of the crop that they were decoded in. In a training step zeros where no
        mask is learned.
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


@with_signal_fields(lambda signal: signal.result_names)
@dataclass
class SignalGenerateFields:
    r"""
    What `generate` adds to the library's output. S = sequences, K = most `<vis>` emitted by one of them.

    Args:
        boxes (`torch.Tensor` of shape `(S, K, 4)`): float32 xyxy in 0..1 of the padded square.
        mask_logits (`torch.Tensor` of shape `(S, K, M, M)`): on the padded square.
        points (`torch.Tensor` of shape `(S, K, 2)`): float32 xy in 0..1 of the padded square.
        object_scores, object_mask_scores, object_point_scores (`torch.Tensor` of shape `(S, K)`):
            Probability of the `<vis>` under the raw logits times the predicted IoU of its box or mask, or the predicted
            score of its point.
        object_valid (`torch.Tensor` of shape `(S, K)`): bool, whether the sequence has a k-th `<vis>`.
        positions (`torch.Tensor` of shape `(S, K)`): index into `sequences`, -1 where there is none.
        prompt_length (`int`): where the answers start in `sequences`.
        object_frames (`torch.Tensor` of shape `(S, K, 4)`, *optional*):
            Where any object was decoded in a crop: the frame, xyxy in 0..1 of the padded square, that `mask_logits` of
            each object lie on; 0, 0, 1, 1 for the others.
        look_positions (`torch.Tensor` of shape `(S, N)`, *optional*):
            Of models that look again: index into `sequences` of each `<look>` and `<reenc>`, -1 where there is none.
        look_boxes (`torch.Tensor` of shape `(S, N, 4)`, *optional*):
            The box that each look was at, float32 xyxy in 0..1 of the padded square; of `<reenc>` all of it.
        look_crops (`torch.Tensor` of shape `(S, N, 4)`, *optional*):
            The crop that it saw, int64 xyxy in pixels of the original image; 0, 0, 0, 0 where it saw none, because the
            crop would have been nearly the whole image.
    """

    boxes: torch.FloatTensor | None = None
    mask_logits: torch.FloatTensor | None = None
    points: torch.FloatTensor | None = None
    object_scores: torch.FloatTensor | None = None
    object_mask_scores: torch.FloatTensor | None = None
    object_point_scores: torch.FloatTensor | None = None
    object_valid: torch.BoolTensor | None = None
    positions: torch.LongTensor | None = None
    prompt_length: int | None = None
    object_frames: torch.FloatTensor | None = None
    look_positions: torch.LongTensor | None = None
    look_boxes: torch.FloatTensor | None = None
    look_crops: torch.LongTensor | None = None


@dataclass
class PerceptionGPTGenerateOutput(SignalGenerateFields, GenerateDecoderOnlyOutput):
    pass


@dataclass
class PerceptionGPTGenerateBeamOutput(SignalGenerateFields, GenerateBeamDecoderOnlyOutput):
    pass
