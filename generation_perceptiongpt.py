"""
The closed loop: `<vis>` is emitted, its box decoded, encoded again, and read at the next step, on the library's own
generation loop. Every step records one hidden state and one probability a row; boxes are returned, and masks decoded at
all, once after the loop. [`GroundingMixin.ground`] does without the loop.
"""

import functools
import sys

import torch
from transformers import GenerationMixin

from .generation_state_perceptiongpt import SignalState, may_skip_feedback
from .outputs_perceptiongpt import PerceptionGPTGenerateBeamOutput, PerceptionGPTGenerateOutput
from .prefix_perceptiongpt import (
    PrefixCache,
    attention_from_padding,
    lay_out,
    require_left_padding,
    shared_length,
)
from .signals_perceptiongpt import SIGNALS, refuse_signal, take_signal_inputs
from .slots_perceptiongpt import align_slots, prepare_slots, several_processes, slot_positions


class PerceptionGPTGenerationMixin(GenerationMixin):
    """`generate` with signals in and out."""

    # Run outside `forward`, so FSDP has to gather the weights for them as it does for `forward`.
    _signal_entry_points = ("get_image_features", "get_mask_features", "encode_signals", "decode_signals", "feed_back")

    def get_mask_features(self, mask_pixel_values: torch.Tensor | None, **kwargs) -> torch.Tensor:
        """See [`PerceptionGPTModel.get_mask_features`]."""
        return self.model.get_mask_features(mask_pixel_values, **kwargs)

    def encode_signals(self, values: dict, read: dict) -> torch.Tensor:
        """See [`PerceptionGPTModel.encode_signals`]."""
        return self.model.encode_signals(values, read)

    def decode_signals(
        self, states: torch.Tensor, image_features: torch.Tensor, image_index: torch.Tensor, **kwargs
    ) -> dict:
        """See [`PerceptionGPTModel.decode_signals`]."""
        return self.model.decode_signals(states, image_features, image_index, **kwargs)

    def feed_back(self, states: torch.Tensor, frames: torch.Tensor | None = None) -> torch.Tensor:
        """See [`PerceptionGPTModel.feed_back`]."""
        return self.model.feed_back(states) if frames is None else self.model.feed_back(states, frames)

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, **kwargs):
        r"""
        [`GenerationMixin.generate`] with the tensors of the processor as further inputs: `pixel_values`,
        `mask_pixel_values`, `look_images` and `look_image_stats`, and of each signal `boxes`, `boxes_valid`,
        `boxes_read` and so on.

        To continue from the cache of an earlier call, pass its `past_key_values` and `sequences` (with text appended or
        not) and the images and signals of the new text only.

        Args:
            prefix (`PrefixCache`, *optional*):
                From [`encode_prefix`]: what every row starts with and need not compute again. All else is passed as
                without it, for whole rows; `pixel_values` and `mask_pixel_values` may be left out where all images are
                in the prefix.
            signals (`Iterable[str]`, *optional*):
                The signals that an emitted `<vis>` is decoded to, by name; by default all of the checkpoint.
            max_looks (`int`, *optional*):
                How often a row may look again, for checkpoints that do; by default `look_max` of the config. With 0 the
                tokens of a look are never emitted.
            look_bias (`float`, defaults to 0.0):
                Added to the logit of `<look>` where the model may look: below 0 for fewer looks, above for more.
            streamer (`BaseStreamer`, *optional*):
                One of the library's, for text, or a [`ObjectIteratorStreamer`], for objects, too.

        Returns:
            What the library returns; with `return_dict_in_generate=True` the fields of [`SignalGenerateFields`] beside.

        Raises:
            `ValueError`: for decoding modes that the loop cannot run in, a prompt `<vis>` that carries nothing, a
            cache that does not come from `generate`, and rows that do not start with the prefix.
        """
        streamer = kwargs.get("streamer")
        try:
            return self._generate_objects(inputs, generation_config, **kwargs)
        except BaseException as error:
            if hasattr(streamer, "fail"):  # whoever reads from it waits in another thread
                streamer.fail(error)
            raise

    def _generate_objects(self, inputs, generation_config, **kwargs):
        """`generate`, but for telling the streamer of errors."""
        prefix, names = kwargs.pop("prefix", None), self._signal_names(kwargs.pop("signals", None))
        self._refuse_modes(generation_config, kwargs, prefix)
        register_entry_points(self)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            kwargs["input_ids"] = self._first_token(generation_config or self.generation_config, kwargs)
        given = kwargs.get("input_ids")
        kwargs = self._lay_out(kwargs, prefix)
        state, kwargs = self._begin_signals(kwargs, names)
        if hasattr(kwargs.get("streamer"), "watch"):
            if several_processes():
                raise ValueError("Objects are streamed by one process alone: other processes would not decode with it.")
            kwargs["streamer"].watch(functools.partial(self._decode_step, state), names)
        output = super().generate(generation_config=generation_config, signal_state=state, **kwargs)
        state.settle(self.config.vis_token_id)
        state.prefix = None
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = kwargs.get("past_key_values")
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        if kwargs.get("input_ids") is not given:  # prompts were laid out in another way
            given = given.repeat_interleave(len(sequences) // len(given), dim=0).to(sequences.device)
            sequences = torch.cat([given, sequences[:, kwargs["input_ids"].shape[1] :]], dim=1)
        if cache is not None:
            from_beams = getattr(output, "beam_indices", None) is not None
            state.finish(int(cache.get_seq_length()), sequences[:, -1], from_beams)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return self._add_objects(output, state, 0 if given is None else given.shape[1], names)

    @torch.no_grad()
    def encode_prefix(self, length: int | None = None, **inputs) -> PrefixCache:
        r"""
        Encodes what several prompts start with, their images above all, once.

        ```python
        inputs = processor.apply_chat_template(conversations, ...)  # any number of questions about one image
        prefix = model.encode_prefix(**inputs)
        output = model.ground(prefix=prefix, **inputs)  # or generate; as often as wanted, with other questions, too
        ```

        Args:
            length (`int`, *optional*):
                How many tokens the prefix has, padding not counted. By default it ends with the last `<image>` that
                all rows share, so that any question about the images fits; without images, where rows begin to differ.
            inputs: the tensors of the processor for one or more rows with the same images, padded on the left.

        Raises:
            `ValueError`: rows that do not share `length` tokens or their images, and a `<vis>` in the prefix of several
            rows.
        """
        register_entry_points(self)
        input_ids, attention_mask = inputs.pop("input_ids"), inputs.pop("attention_mask", None)
        if attention_mask is None:
            attention_mask = attention_from_padding(input_ids, self.generation_config)
        lengths = require_left_padding(attention_mask)
        shared = shared_length(input_ids, lengths, self.config.vis_token_id)
        ids = input_ids[:1, input_ids.shape[1] - int(lengths[0]) :][:, :shared]
        is_image = ids[0] == self.config.image_token_id
        if length is None:
            length = int(is_image.nonzero()[-1]) + 1 if is_image.any() else shared
        if not 0 < length <= shared:
            raise ValueError(
                f"The prefix would have {length} tokens; the rows start with {shared} that they share, up to their "
                "first `<vis>` if there are several."
            )
        num_images = int(is_image[:length].sum()) // self.config.image_seq_length
        images_per_row = (input_ids == self.config.image_token_id).sum(1) // self.config.image_seq_length
        starts = images_per_row.cumsum(0) - images_per_row
        for name in ("pixel_values", "mask_pixel_values"):
            images = inputs.pop(name, None)
            if images is None or not num_images:
                continue
            first = images[:num_images]
            for row, start in enumerate(starts.tolist()):
                if not torch.equal(images[start : start + num_images], first):
                    raise ValueError(f"Row {row} has other images than row 0: a prefix is about the same images.")
            inputs[name] = first
        signals = take_signal_inputs(inputs)
        if len(input_ids) == 1:
            inputs |= signals
        inputs.pop("signal_image_index", None)
        inputs |= {"input_ids": ids[:, :length], "attention_mask": torch.ones_like(ids[:, :length])}
        inputs["past_key_values"] = cache = PrefixCache(config=self.config.get_text_config(decoder=True))
        state, inputs = self._begin_signals(inputs, self.config.signals)
        self(**self._prefill_inputs(inputs, state)[0])
        state.begin(None, None, 0)
        cache.input_ids, cache.signal_state = ids[:, :length].to(self.device), state
        return cache

    def _signal_names(self, names) -> list[str]:
        """The signals to decode, in the order in which they run."""
        for name in names or ():
            refuse_signal(name, self.config.signals, "`signals`: ")
        return [name for name in self.config.signals if names is None or name in names]

    def _lay_out(self, inputs: dict, prefix: PrefixCache | None) -> dict:
        """
        Inputs whose prompts share a prefix as the cache has them: a cache that starts with the prefix, the padding
        behind it, and the images and signals of what follows. Others are left as they are.
        """
        cache = inputs.get("past_key_values")
        if prefix is not None:
            if cache is not None:
                raise ValueError("`prefix` and `past_key_values` were both given: a prefix starts a cache of its own.")
            return self._lay_out_prompts(dict(inputs), prefix)
        if getattr(cache, "input_ids", None) is not None:
            raise ValueError("`past_key_values` is a prefix, which stays as it is: pass it as `prefix`.")
        layout = getattr(getattr(cache, "signal_state", None), "layout", None)
        ids = inputs.get("input_ids")
        if layout is None or ids is None or cache.get_seq_length() == 0:
            return inputs
        # Continuing: the prompts of the call before stand in the cache as laid out then.
        mask, length = inputs.get("attention_mask"), layout.length
        if mask is None:
            mask = attention_from_padding(ids, self.generation_config)
        whole = mask.shape[1] == ids.shape[1]
        inputs = {**inputs, "attention_mask": torch.cat([layout.attention_mask.to(mask), mask[:, length:]], dim=1)}
        if whole:
            inputs["input_ids"] = torch.cat([layout.input_ids.to(ids), ids[:, length:]], dim=1)
        return inputs

    def _lay_out_prompts(self, inputs: dict, prefix: PrefixCache) -> dict:
        """Whole prompts that start with the prefix, as `_lay_out` returns them."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None or inputs.get("inputs_embeds") is not None:
            raise ValueError("`prefix` needs `input_ids`: what a row starts with is read from them.")
        ids = ids.to(self.device)
        mask = attention_from_padding(ids, self.generation_config) if mask is None else mask.to(self.device)
        pad = self.generation_config.pad_token_id
        layout = lay_out(prefix.input_ids, ids, mask, 0 if pad is None else pad)
        if any(prefix.is_sliding) and not layout.attention_mask.all():
            raise ValueError(
                "Rows of unlike lengths cannot share a prefix under sliding-window attention, which would count their "
                "padding: pass rows of one length together."
            )
        known = int((prefix.input_ids == self.config.vis_token_id).sum())
        for name, values in take_signal_inputs(inputs).items():
            inputs[name] = None if values is None else values[:, known:]
        per_image = self.config.image_seq_length
        shared = int((prefix.input_ids == self.config.image_token_id).sum()) // per_image
        images_per_row = (ids == self.config.image_token_id).sum(1) // per_image
        has_more = bool((images_per_row > shared).any())
        for name in ("pixel_values", "mask_pixel_values"):
            images = inputs.pop(name, None)
            if images is not None:
                if len(images) != int(images_per_row.sum()):
                    raise ValueError(
                        f"`{name}` has {len(images)} images, the rows {int(images_per_row.sum())}: expected those of "
                        "whole rows, the prefix included."
                    )
                new = torch.cat([torch.arange(count) >= shared for count in images_per_row.tolist()])
                inputs[name] = images[new.to(images.device)] if has_more else None
            elif has_more and name == "pixel_values" and inputs.get("mm_encoder_outputs") is None:
                raise ValueError("Some rows have images after the prefix, but `pixel_values` is missing.")
        rows = torch.zeros(len(ids), dtype=torch.long)
        state = prefix.signal_state.select(rows)
        state.layout, state.prefix = layout, prefix
        cache = prefix.share(len(ids))
        cache.signal_state = state
        inputs |= {"input_ids": layout.input_ids, "attention_mask": layout.attention_mask, "past_key_values": cache}
        inputs.pop("position_ids", None)
        return inputs

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

    def _refuse_modes(self, generation_config, kwargs: dict, prefix) -> None:
        """Refuses decoding modes in which a box would silently not be fed back, or a prefix not be shared."""

        def setting(name: str, default=None):
            for value in (kwargs.get(name), getattr(generation_config, name, None)):
                if value is not None:
                    return value
            value = getattr(self.generation_config, name, None)
            return default if value is None else value

        if kwargs.get("cache_implementation") == "paged":
            raise ValueError(CONTINUOUS_BATCHING_REFUSED)
        if prefix is not None and (setting("cache_implementation") or not setting("use_cache", True)):
            raise ValueError("`prefix` is the start of a dynamic cache: it needs `use_cache=True` and no other kind.")
        num_beams = setting("num_beams", 1)
        assisted = any(setting(name) for name in ASSISTED)
        if assisted and num_beams == 1:
            raise ValueError(
                "Assisted and prompt-lookup decoding are not supported: a candidate `<vis>` has no box to be read with "
                "before the model itself has predicted it."
            )
        if num_beams > 1 and not setting("use_cache", True):
            raise ValueError(
                "Beam search needs `use_cache=True`: the boxes fed back follow their beams through the reordering of "
                "the cache."
            )

    def _begin_signals(self, kwargs: dict, names: list[str]) -> tuple[SignalState, dict]:
        """
        Encodes the images and signals of the prompt, each once and before any row is repeated; what only signals other
        than `names` read of the images is left for later.
        """
        signals = take_signal_inputs(kwargs)
        for name in ("mask_image_index", "signal_image_index"):
            kwargs.pop(name, None)
        input_ids, inputs_embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        own = self.device
        device = tokens.device if own.type == "meta" else own
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

        per_image = self.config.image_seq_length
        if ids is None:
            image_mask = self.model.token_mask(ids, embeds, self.config.image_token_id)
            images_per_row = [count // per_image for count in image_mask.sum(1).tolist()]
            has_vis = bool(self.model.token_mask(ids, embeds, self.config.vis_token_id).any())
        else:  # counted by the host: it has to know in any case, and asks the device once
            rows = ids.tolist()
            images_per_row = [row.count(self.config.image_token_id) // per_image for row in rows]
            has_vis = any(self.config.vis_token_id in row for row in rows)
        pixel_values = kwargs.pop("pixel_values", None)
        if pixel_values is not None:
            wants_masks = any(SIGNALS[name].reads_image for name in names)
            features = self.get_image_features(
                pixel_values.to(device), with_mask_features=wants_masks, return_dict=True
            )
            kwargs["mm_encoder_outputs"] = {"image": features}
        image_outputs = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        mask_pixel_values = kwargs.pop("mask_pixel_values", None)
        if self.config.mask_image_size and image_outputs is not None and mask_pixel_values is None:
            raise ValueError(
                f"The model decodes masks from images at {self.config.mask_image_size} pixels, but `mask_pixel_values` "
                "is missing; pass what the processor of this checkpoint returns under that name."
            )
        mask_features = getattr(image_outputs, "mask_features", None)
        if mask_features is not None:
            self._settle_mask_features(state)
        tower_states = getattr(image_outputs, "tower_states", None)
        state.add_images(images_per_row, mask_features, mask_pixel_values, tower_states)

        slots = prepare_slots(self.config, signals, device)
        if not has_vis:
            state.begin(None, None, past_length)
            return state, kwargs
        vis_mask = self.model.token_mask(ids, embeds, self.config.vis_token_id)
        # A `<vis>` that the last call emitted and nothing has read yet takes the box that predicted it.
        waiting = torch.zeros_like(vis_mask[:, 0])
        if past_length and past_length == state.length:
            waiting = vis_mask[:, 0] & (state.unfed_tokens.to(device) == self.config.vis_token_id)
        carried = vis_mask.clone()
        carried[:, 0] &= ~waiting

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
            feedback = self.feed_back(state.last_state, state.frames)
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
            if state.prefix is not None:
                model_kwargs["past_key_values"] = state.prefix.share(len(state.image_of_row) * expand_size)
            elif state.prompt_start:
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
        replaced = ids == vis_token_id
        last_replaced = replaced[:, -1]
        needed = not may_skip_feedback(ids.device) or bool(last_replaced.any())
        signal_state.settle(vis_token_id, needed)
        if not needed and past_key_values is not None and not past_key_values.is_compileable:
            return model_inputs
        state = signal_state.last_state
        frames, nothing = signal_state.frames, torch.zeros_like(state, dtype=torch.float32)
        feedback = (self.feed_back(state, frames) if needed else nothing)[:, None]
        if past_key_values is None:
            signal_state.step_embeds.append(feedback)
            feedback = torch.cat(signal_state.step_embeds, dim=1)
            replaced = replaced[:, -feedback.shape[1] :]
            if signal_state.prompt_embeds is not None:
                feedback = torch.cat([signal_state.prompt_embeds, feedback.to(signal_state.prompt_embeds)], dim=1)
                replaced = torch.cat([signal_state.prompt_replaced, replaced], dim=1)
        model_inputs["signal_embeds"] = feedback
        model_inputs["signal_embeds_mask"] = replaced[:, -feedback.shape[1] :]
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

    def _add_objects(self, output, state: SignalState, prompt_length: int, names: list[str]):
        """Decodes every emitted `<vis>` to its values of the signals `names`, in one batch."""
        answers = output.sequences[:, prompt_length:]
        num_sequences, length = answers.shape
        device = state.states[0].device
        is_vis = answers.to(device) == self.config.vis_token_id
        num_slots = int(is_vis.sum(1).max()) if length else 0
        if length == 1:
            positions, valid = torch.zeros_like(is_vis[:, :num_slots], dtype=torch.long), is_vis[:, :num_slots]
        else:
            positions, valid = slot_positions(is_vis, num_slots)
        rows = torch.arange(num_sequences, device=device)[:, None].expand(-1, num_slots)
        beam_indices = getattr(output, "beam_indices", None)
        if beam_indices is not None:
            rows = beam_indices.to(device).long().gather(1, positions).clamp(min=0)
        states = torch.stack(state.states)[positions, rows]
        probabilities = torch.stack(state.probabilities)[positions, rows]
        images = state.images_of(positions, rows)
        fields = self._decode_states(states, probabilities, images, valid, state, names)
        output_class = PerceptionGPTGenerateOutput if beam_indices is None else PerceptionGPTGenerateBeamOutput
        return output_class(
            **output,
            **fields,
            object_valid=valid,
            positions=torch.where(valid, positions + prompt_length, -1),
            prompt_length=prompt_length,
        )

    def _decode_step(self, state: SignalState, step: int, names: list[str]) -> dict:
        """What the state before the token of one step is decoded to, for a loop over one row that still runs."""
        state.settle(self.config.vis_token_id)
        states, probabilities = state.states[step][:, None], state.probabilities[step][:, None]
        images = state.images_of(*torch.tensor([[[step]], [[0]]], device=states.device))
        return self._decode_states(states, probabilities, images, torch.ones_like(images).bool(), state, names)

    def _decode_states(self, states, probabilities, images, valid, state: SignalState, names: list[str]) -> dict:
        """
        Values and scores of the signals `names`, under the names that they have in the output of `generate`.

        Args:
            states (`torch.Tensor` of shape `(S, K, hidden)`): each predicts a `<vis>`.
            probabilities, images, valid (`torch.Tensor` of shape `(S, K)`): p(`<vis>`); the image that each state
                speaks of; whether it counts.
        """
        fields = {}
        if not valid.shape[1] and not several_processes():  # plain text: nothing to run the decoders for
            for name in names:
                nothing = SIGNALS[name].pad(self.config, len(valid), 0, states.device).float()
                fields |= SIGNALS[name].to_result(nothing, nothing.new_zeros(len(valid), 0), probabilities)
            return fields
        image_features = image_index = None
        if any(SIGNALS[name].reads_image for name in names):
            image_features, image_index = self._image_features(state, images, valid)
            image_features, image_index = image_features.to(states.device), image_index.flatten()
        decoded = self.decode_signals(states.flatten(0, 1), image_features, image_index, names=names)
        for name, parts in decoded.items():
            signal_values, predicted_iou = (part.unflatten(0, valid.shape) for part in parts)
            fields |= SIGNALS[name].to_result(signal_values, predicted_iou, probabilities)
        return fields

    def _image_features(self, state: SignalState, image_of_slot: torch.Tensor, valid: torch.Tensor):
        """What masks are decoded from, and each slot's index into it; a finer pass sees images with a `<vis>`."""
        if state.mask_pixel_values is not None:
            image_of_slot = torch.where(valid, image_of_slot, -1)
            wanted = image_of_slot[image_of_slot >= 0].unique()
            if len(wanted):
                if state.finer_features is None or not torch.equal(state.finer_features[0], wanted):
                    pixel_values = state.mask_pixel_values.to(image_of_slot.device)[wanted]
                    state.finer_features = wanted, self.get_mask_features(pixel_values)
                index = torch.searchsorted(wanted, image_of_slot)
                return state.finer_features[1], torch.where(image_of_slot >= 0, index, -1)
        self._settle_mask_features(state)
        if state.mask_features is None:
            shape = (0, self.config.mask_cells, self.config.feature_size)
            return torch.zeros(shape, device=image_of_slot.device), torch.full_like(image_of_slot, -1)
        return state.mask_features, image_of_slot

    def _settle_mask_features(self, state: SignalState) -> None:
        """Makes what masks are decoded from of images for which nobody had asked for it."""
        if state.tower_states is not None:
            features = self.get_mask_features(None, tower_states=state.tower_states)
            old, state.tower_states = state.mask_features, None
            state.mask_features = features if old is None else torch.cat([old, features])


# Settings with which the library turns greedy decoding and sampling into assisted decoding.
ASSISTED = ("assistant_model", "use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit")
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
