"""
The closed loop: `<vis>` is emitted, its box decoded, encoded again, and read at the next step, on the library's own
generation loop. Every step records one hidden state and one probability a row; boxes are returned, and masks decoded at
all, once after the loop.
"""

import sys
from dataclasses import dataclass

import torch
from transformers import GenerationMixin
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, GenerationMode

from .signals_perceptiongpt import SIGNALS, take_signal_inputs, with_signal_fields
from .slots_perceptiongpt import align_slots, prepare_slots, slot_positions


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


@dataclass
class PerceptionGPTGenerateOutput(SignalGenerateFields, GenerateDecoderOnlyOutput):
    pass


@dataclass
class PerceptionGPTGenerateBeamOutput(SignalGenerateFields, GenerateBeamDecoderOnlyOutput):
    pass


class SignalState:
    """
    What the loop remembers. It is an attribute of the cache in use, so that a second call of `generate` finds it there.

    Attributes:
        mask_features (`torch.Tensor` of shape `(images, cells, width)` or `None`): what masks are decoded from.
        mask_pixel_values (`torch.Tensor` of shape `(images, 3, S', S')` or `None`): the same, before the finer pass.
        image_of_row (`torch.Tensor` of shape `(rows,)`): the last image of each row, -1 for none.
        prompt_embeds, prompt_replaced: embeddings `(rows, n, hidden)` of the prompt's `<vis>` and the bool mask of
            where they go, over the n prompt tokens that are not in the cache yet; `None` where there are none.
        prompt_start (`int`): how many tokens the cache held before them.
        states, probabilities (`list`): of each step, `(rows, hidden)` and p(`<vis>`) of shape `(rows,)`.
        step_embeds (`list`): boxes fed back, `(rows, hidden)` a step; only kept when decoding without a cache.
        last_state (`torch.Tensor` of shape `(rows, hidden)`): predicts the token that is read next; follows the beams.
        length (`int`): tokens in the cache when the last call ended.
        unfed_tokens (`torch.Tensor` of shape `(rows,)`): each row's last token, which no step has read yet.
        from_beams (`bool`): whether the last call was a beam search.
    """

    def __init__(self, num_rows: int, device):
        self.mask_features = None
        self.mask_pixel_values = None
        self.image_of_row = torch.full((num_rows,), -1, dtype=torch.long, device=device)
        self.num_images = 0
        self.last_state = None
        self.length = 0
        self.unfed_tokens = None
        self.from_beams = False
        self.begin(None, None, 0)

    def begin(self, prompt_embeds, prompt_replaced, prompt_start: int) -> None:
        """Starts a call of `generate`."""
        self.prompt_embeds = prompt_embeds
        self.prompt_replaced = prompt_replaced
        self.prompt_start = prompt_start
        self.states, self.probabilities, self.step_embeds = [], [], []

    def add_images(self, images_per_row: torch.Tensor, mask_features, mask_pixel_values) -> None:
        """Appends the images of a new prompt, rows in order."""
        last = self.num_images + images_per_row.cumsum(0) - 1
        self.image_of_row = torch.where(images_per_row > 0, last, self.image_of_row)
        self.num_images += int(images_per_row.sum())
        for name, new in (("mask_features", mask_features), ("mask_pixel_values", mask_pixel_values)):
            old = getattr(self, name)
            if new is not None:
                setattr(self, name, new if old is None else torch.cat([old, new]))

    def expand(self, expand_size: int) -> None:
        """Repeats every row, as the library does for beams and returned sequences. Images are not copied."""
        self.image_of_row = self.image_of_row.repeat_interleave(expand_size, dim=0)
        if self.prompt_embeds is not None:
            self.prompt_embeds = self.prompt_embeds.repeat_interleave(expand_size, dim=0)
            self.prompt_replaced = self.prompt_replaced.repeat_interleave(expand_size, dim=0)

    def record(self, states: torch.Tensor, logits: torch.Tensor, vis_token_id: int) -> None:
        """Keeps the final-norm states `(rows, hidden)` and p(`<vis>`) under the raw logits `(rows, vocabulary)`."""
        logits = logits.float()
        self.last_state = states
        self.states.append(states)
        self.probabilities.append((logits[:, vis_token_id] - logits.logsumexp(-1)).exp())

    def reorder(self, beam_idx: torch.Tensor) -> None:
        self.last_state = self.last_state.index_select(0, beam_idx.to(self.last_state.device))


class PerceptionGPTGenerationMixin(GenerationMixin):
    """`generate` with signals in and out."""

    # Run outside `forward`, so FSDP has to gather the weights for them as it does for `forward`.
    _signal_entry_points = ("get_image_features", "get_mask_features", "encode_signals", "decode_signals", "feed_back")

    def get_mask_features(self, mask_pixel_values: torch.Tensor) -> torch.Tensor:
        """See [`PerceptionGPTModel.get_mask_features`]."""
        return self.model.get_mask_features(mask_pixel_values)

    def encode_signals(self, values: dict, read: dict) -> torch.Tensor:
        """See [`PerceptionGPTModel.encode_signals`]."""
        return self.model.encode_signals(values, read)

    def decode_signals(
        self, states: torch.Tensor, image_features: torch.Tensor, image_index: torch.Tensor, **kwargs
    ) -> dict:
        """See [`PerceptionGPTModel.decode_signals`]."""
        return self.model.decode_signals(states, image_features, image_index, **kwargs)

    def feed_back(self, states: torch.Tensor) -> torch.Tensor:
        """See [`PerceptionGPTModel.feed_back`]."""
        return self.model.feed_back(states)

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, **kwargs):
        r"""
        [`GenerationMixin.generate`] with the tensors of the processor as further inputs: `pixel_values`,
        `mask_pixel_values`, and of each signal `boxes`, `boxes_valid`, `boxes_read` and so on.

        To continue from the cache of an earlier call, pass its `past_key_values` and `sequences` (with text appended or
        not) and the images and signals of the new text only.

        Returns:
            What the library returns; with `return_dict_in_generate=True` the fields of [`SignalGenerateFields`] beside.

        Raises:
            `ValueError`: for decoding modes that the loop cannot run in, a prompt `<vis>` that carries nothing, and a
            cache that does not come from `generate`.
        """
        self._refuse_modes(generation_config, kwargs)
        register_entry_points(self)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            kwargs["input_ids"] = self._first_token(generation_config or self.generation_config, kwargs)
        state, kwargs = self._begin_signals(kwargs)
        output = super().generate(generation_config=generation_config, signal_state=state, **kwargs)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = kwargs.get("past_key_values")
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if cache is not None:
            state.length = int(cache.get_seq_length())
            state.from_beams = getattr(output, "beam_indices", None) is not None
            state.unfed_tokens = sequences[:, -1]
        if isinstance(output, torch.Tensor):
            return output
        prompt_length = 0 if kwargs.get("input_ids") is None else kwargs["input_ids"].shape[1]
        return self._add_objects(output, state, prompt_length)

    def _first_token(self, generation_config, kwargs: dict) -> torch.Tensor:
        """What `generate` starts from without a prompt, as in the library."""
        bos_token_id = kwargs.get("bos_token_id", generation_config.bos_token_id)
        if bos_token_id is None:
            raise ValueError("`generate` got no prompt, and there is no `bos_token_id` to start from.")
        return torch.full((1, 1), bos_token_id, dtype=torch.long, device=self.device)

    def generate_batch(self, *args, **kwargs):
        raise ValueError(CONTINUOUS_BATCHING_REFUSED)

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(CONTINUOUS_BATCHING_REFUSED)

    def _refuse_modes(self, generation_config, kwargs) -> None:
        """Refuses decoding modes in which a box would silently not be fed back."""
        if kwargs.get("cache_implementation") == "paged":
            raise ValueError(CONTINUOUS_BATCHING_REFUSED)
        settings = {key: value for key, value in kwargs.items() if key not in ("assistant_model", "streamer")}
        config, _ = self._prepare_generation_config(generation_config, **settings)
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        if mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "Assisted and prompt-lookup decoding are not supported: a candidate `<vis>` has no box to be read with "
                "before the model itself has predicted it."
            )
        if config.num_beams > 1 and not config.use_cache:
            raise ValueError(
                "Beam search needs `use_cache=True`: the boxes fed back follow their beams through the reordering of "
                "the cache."
            )

    def _begin_signals(self, kwargs: dict) -> tuple[SignalState, dict]:
        """Encodes the images and signals of the prompt, each once and before any row is repeated."""
        signals = take_signal_inputs(kwargs)
        for name in ("mask_image_index", "signal_image_index"):
            kwargs.pop(name, None)
        input_ids, inputs_embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        device = tokens.device if self.device.type == "meta" else self.device
        ids, embeds = (None, inputs_embeds) if inputs_embeds is not None else (input_ids.to(device), None)

        cache = kwargs.get("past_key_values")
        past_length = 0 if cache is None else int(cache.get_seq_length())
        state = getattr(cache, "signal_state", None) if past_length else None
        if past_length:
            if state is None:
                raise ValueError(
                    f"`past_key_values` holds {past_length} tokens but no signal state: it has to come from `generate`."
                )
            if state.from_beams:
                raise ValueError(
                    "`past_key_values` comes from a beam search: its rows are the beams that were running at the end, "
                    "not the sequences that were returned. Continue from `sequences` without a cache."
                )
            if len(state.image_of_row) != len(tokens):
                raise ValueError(
                    f"`past_key_values` has {len(state.image_of_row)} rows, the prompt {len(tokens)}: expected as many."
                )
            attention_mask = kwargs.get("attention_mask")
            if attention_mask is None and tokens.shape[1] <= past_length:
                raise ValueError(
                    f"`past_key_values` holds {past_length} tokens, the prompt {tokens.shape[1]}: pass the whole text, "
                    "that of the cache included, or, with new tokens alone, an `attention_mask` over both."
                )
            if attention_mask is None or attention_mask.shape[1] == tokens.shape[1]:
                ids = None if ids is None else ids[:, past_length:]
                embeds = None if embeds is None else embeds[:, past_length:]
        else:
            state = SignalState(len(tokens), device)

        vis_mask = self.model.token_mask(ids, embeds, self.config.vis_token_id)
        image_mask = self.model.token_mask(ids, embeds, self.config.image_token_id)
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None:
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(pixel_values.to(device), return_dict=True)}
        image_outputs = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        images_per_row = torch.div(image_mask.sum(1), self.config.image_seq_length, rounding_mode="floor")
        mask_pixel_values = kwargs.pop("mask_pixel_values", None)
        if self.config.mask_image_size and image_outputs is not None and mask_pixel_values is None:
            raise ValueError(
                f"The model decodes masks from images at {self.config.mask_image_size} pixels, but `mask_pixel_values` "
                "is missing; pass what the processor of this checkpoint returns under that name."
            )
        state.add_images(images_per_row, getattr(image_outputs, "mask_features", None), mask_pixel_values)

        # A `<vis>` that the last call emitted and nothing has read yet takes the box that predicted it.
        waiting = torch.zeros_like(vis_mask[:, 0])
        if past_length and past_length == state.length:
            waiting = vis_mask[:, 0] & (state.unfed_tokens.to(device) == self.config.vis_token_id)
        carried = vis_mask.clone()
        carried[:, 0] &= ~waiting

        slots = prepare_slots(self.config, signals, device)
        prompt_embeds, prompt_replaced = None, torch.zeros_like(vis_mask)
        if slots is not None:
            values, read = ({name: t.to(device) for name, t in slots[key].items()} for key in ("values", "read"))
            prompt_embeds, prompt_replaced = align_slots(self.encode_signals(values, read), read, carried)
        empty = (carried & ~prompt_replaced).nonzero()
        if len(empty):
            row, position = empty[0].tolist()
            number = int(carried[row, : position + 1].sum())
            plurals = " or ".join(f"`{SIGNALS[name].plural}`" for name in self.config.signals)
            raise ValueError(
                f"Row {row}: the {number}. `<vis>` of the prompt carries nothing; pass a value in slot {number - 1} of "
                f"{plurals} and mark it valid."
            )
        if waiting.any():
            feedback = self.feed_back(state.last_state)
            if prompt_embeds is None:
                prompt_embeds = feedback.new_zeros(*vis_mask.shape, feedback.shape[-1])
            prompt_embeds[:, 0] = torch.where(waiting[:, None], feedback.to(prompt_embeds), prompt_embeds[:, 0])
            prompt_replaced[:, 0] |= waiting
        state.begin(prompt_embeds, prompt_replaced, past_length)
        return state, kwargs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"].signal_state = model_kwargs["signal_state"]

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        state = model_kwargs.get("signal_state")
        if state is not None and expand_size > 1:
            if state.prompt_start:
                raise ValueError(
                    "Continuing from a cache returns one sequence a row: repeat the rows and the cache first."
                )
            state.expand(expand_size)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        is_first_iteration=False,
        signal_state=None,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if signal_state is None:
            return model_inputs
        ids, vis_token_id = model_inputs["input_ids"], self.config.vis_token_id
        if is_first_iteration:
            embeds = signal_state.prompt_embeds
            if embeds is not None:
                # The window that this forward reads: all of the prompt, or a chunk of it.
                seen = (
                    0 if past_key_values is None else int(past_key_values.get_seq_length()) - signal_state.prompt_start
                )
                length = (model_inputs["inputs_embeds"] if ids is None else ids).shape[1]
                model_inputs["signal_embeds"] = embeds[:, seen : seen + length]
                model_inputs["signal_embeds_mask"] = signal_state.prompt_replaced[:, seen : seen + length]
            return model_inputs
        feedback = self.feed_back(signal_state.last_state)[:, None]
        replaced = ids == vis_token_id
        if past_key_values is None:
            signal_state.step_embeds.append(feedback)
            feedback = torch.cat(signal_state.step_embeds, dim=1)
            replaced = replaced[:, -feedback.shape[1] :]
            if signal_state.prompt_embeds is not None:
                feedback = torch.cat([signal_state.prompt_embeds, feedback.to(signal_state.prompt_embeds)], dim=1)
                replaced = torch.cat([signal_state.prompt_replaced, replaced], dim=1)
        model_inputs["signal_embeds"], model_inputs["signal_embeds_mask"] = feedback, replaced
        return model_inputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        state = model_kwargs.get("signal_state")
        if state is not None:
            state.record(outputs.last_hidden_state[:, -1], outputs.logits[:, -1], self.config.vis_token_id)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _reorder_cache(self, past_key_values, beam_idx: torch.Tensor):
        past_key_values.reorder_cache(beam_idx)
        past_key_values.signal_state.reorder(beam_idx)
        return past_key_values

    def _add_objects(self, output, state: SignalState, prompt_length: int):
        """Decodes every emitted `<vis>` to its value of each signal, in one batch."""
        answers = output.sequences[:, prompt_length:]
        num_sequences, length = answers.shape
        device = state.states[0].device
        is_vis = answers.to(device) == self.config.vis_token_id
        num_slots = int(is_vis.sum(1).max()) if length else 0
        positions, valid = slot_positions(is_vis, num_slots)
        rows = torch.arange(num_sequences, device=device)[:, None].expand(-1, num_slots)
        beam_indices = getattr(output, "beam_indices", None)
        if beam_indices is not None:
            rows = beam_indices.to(device).long().gather(1, positions).clamp(min=0)
        states = torch.stack(state.states)[positions, rows]
        probabilities = torch.stack(state.probabilities)[positions, rows]

        image_features, image_index = self._image_features(state, state.image_of_row.to(device)[rows], valid)
        decoded = self.decode_signals(states.flatten(0, 1), image_features.to(device), image_index.flatten())
        fields = {}
        for name, parts in decoded.items():
            signal_values, predicted_iou = (part.unflatten(0, (num_sequences, num_slots)) for part in parts)
            fields.update(SIGNALS[name].to_result(signal_values, predicted_iou, probabilities))
        output_class = PerceptionGPTGenerateOutput if beam_indices is None else PerceptionGPTGenerateBeamOutput
        return output_class(
            **output,
            **fields,
            object_valid=valid,
            positions=torch.where(valid, positions + prompt_length, -1),
            prompt_length=prompt_length,
        )

    def _image_features(self, state: SignalState, image_of_slot: torch.Tensor, valid: torch.Tensor):
        """What masks are decoded from, and each slot's index into it; a finer pass sees images with a `<vis>`."""
        if state.mask_pixel_values is not None:
            image_of_slot = torch.where(valid, image_of_slot, -1)
            wanted = image_of_slot[image_of_slot >= 0].unique()
            if len(wanted):
                pixel_values = state.mask_pixel_values.to(image_of_slot.device)[wanted]
                index = torch.searchsorted(wanted, image_of_slot)
                return self.get_mask_features(pixel_values), torch.where(image_of_slot >= 0, index, -1)
        if state.mask_features is None:
            shape = (0, self.config.mask_cells, self.config.feature_size)
            return torch.zeros(shape, device=image_of_slot.device), torch.full_like(image_of_slot, -1)
        return state.mask_features, image_of_slot


CONTINUOUS_BATCHING_REFUSED = (
    "Continuous batching is not supported: it schedules rows over a paged cache, which does not carry the boxes "
    "that are fed back."
)


def register_entry_points(model) -> None:
    """Lets FSDP2 gather the weights around the methods that `generate` calls beside `forward`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # there if anyone has sharded a model
    if fsdp and isinstance(model, fsdp.FSDPModule) and not getattr(model, "_entry_points_registered", False):
        for name in model._signal_entry_points:
            fsdp.register_fsdp_forward_method(model, name)
        model._entry_points_registered = True
