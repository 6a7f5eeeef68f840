"""
Looking again inside one call of `generate`: where a row emits `<look>`, the crop around its last `<vis>` is encoded and
read as pads in the same step, in which the other rows read their own tokens behind slots that nothing attends to.
"""

import copy
import sys

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.integrations import is_deepspeed_zero3_enabled

from .generation_perceptiongpt import PerceptionGPTGenerationMixin
from .generation_state_perceptiongpt import SignalState
from .geometry_perceptiongpt import boxes_from_square
from .look_geometry_perceptiongpt import crop_frame, crop_pixel_values, look_crop, out_of_frame, whole_frames
from .prefix_perceptiongpt import PrefixCache, PromptLayout
from .signals_perceptiongpt import SIGNALS
from .slots_perceptiongpt import several_processes


class LookState:
    """
    What the loop remembers of looks: an attribute of [`SignalState`]. Rows are those of the batch; crops are numbered
    in the order in which they were seen.

    Attributes:
        vis, look, end, reenc (`int`): ids of tokens.
        reencodes, decodes_in_crops (`bool`): what the config says.
        images (`list`): the originals, uint8 `(3, height, width)`; `None` for those that were not given.
        image_of_row (`list[int]`): the last image of each row, -1 for none, at hand without asking the device.
        stats (`torch.Tensor` of shape `(2, 3)`): mean and standard deviation of the image processor.
        most (`int`): how often a row may look in this call; `bias` (`float`) is added to the logit of `<look>`.
        frames (`list[list[float]]`), mask_features (`list[torch.Tensor]`): of all crops.
        crop_of_row (`list[int]`): the crop that a row saw last, -1 for none.
        tokens (`list[int]`): the token of each row that was read last.
        allowed (`list[bool]`): whether a row may look now, right behind a `<vis>` whose box is known.
        may_reencode (`list[bool]`): whether a row may encode its image again now, once in a call.
        layers (`tuple[torch.Tensor]` or `None`): what it reads then, of all images.
        counts (`list[int]`): how often each row has looked in this call, in either way.
        decoded_in (`list[list[int]]`): for each step of this call, the crop in whose frame the state of each row is
            decoded, -1 for none.
        recent (`list`): of the last two steps, of an earlier call, too, the states and their entry of `decoded_in`.
        found (`list[dict]`): the looks of this call, of either kind.
        next_crops (`list[int]`): what will be the next entry of `decoded_in`.
        head (`torch.Tensor` of shape `(rows, n)`): the tokens that the cache held before this call, zeros for unknown.
        read (`list[torch.Tensor]`): the tokens of each step of this call as they stand in the cache.
        prompt_length (`int`): of the prompts as they were given.
        attention_mask (`torch.Tensor` of shape `(rows, n)` or `None`): over the cache and the token that is next.
        pending: the attention mask and positions of a step in which rows look, until it has run.
        made_room (`bool`): whether the cache holds pads, or slots beside those of other rows, of this call.
    """

    def __init__(self, num_rows: int, config):
        # Read off the config once: it is slow to ask, and every step asks.
        self.vis, self.look, self.end = config.vis_token_id, config.look_token_id, config.look_end_token_id
        self.reenc, self.reencodes = config.reenc_token_id, bool(config.reenc_queries)
        self.decodes_in_crops = config.look_frame == "crop"
        self.images, self.stats = [], None
        self.image_of_row = [-1] * num_rows
        self.frames, self.mask_features = [], []
        self.crop_of_row = [-1] * num_rows
        self.tokens = [-1] * num_rows
        self.allowed = [False] * num_rows
        self.may_reencode = [False] * num_rows
        self.layers = None
        self.recent = []
        self.begin(0, 0.0)

    def begin(self, most: int, bias: float) -> None:
        """Starts a call of `generate`."""
        self.most, self.bias = most, bias
        self.counts = [0] * len(self.crop_of_row)
        self.reencoded = [False] * len(self.crop_of_row)
        self.decoded_in, self.found, self.read = [], [], []
        self.attention_mask = self.pending = None
        self.made_room = False
        self.next_crops = [-1] * len(self.crop_of_row)
        self.head, self.prompt_length = None, 0

    def select(self, rows: list[int]) -> "LookState":
        """The state of some rows, or of repeated ones. Images and crops are not copied."""
        state = copy.copy(self)
        for name in ("image_of_row", "crop_of_row", "tokens", "allowed", "may_reencode", "counts", "reencoded"):
            setattr(state, name, [getattr(self, name)[row] for row in rows])
        state.images, state.frames, state.mask_features = self.images[:], self.frames[:], self.mask_features[:]
        state.recent = [(states[rows], [crops[row] for row in rows]) for states, crops in self.recent]
        state.decoded_in, state.found, state.read = [], [], []
        state.head = None if self.head is None else self.head[rows]
        return state

    def frames_of(self, crops: torch.Tensor) -> torch.Tensor:
        """The frames of crops, `(..., 4)`; of -1 the whole square."""
        frames = torch.cat([torch.tensor(self.frames).reshape(-1, 4), whole_frames(1)])
        return frames.to(crops.device)[crops]

    def lay_out(self, num_steps: int, length: int) -> PromptLayout:
        """Where the sequences that this call returned stand in the cache, which holds `length` tokens now."""
        ids = torch.cat([self.head, *self.read], dim=1)[:, :length]
        mask = torch.ones_like(ids) if self.attention_mask is None else self.attention_mask[:, :length]
        return PromptLayout(self.prompt_length + num_steps - 1, ids, mask)


class LookLogitsProcessor(LogitsProcessor):
    """Lets a row look only right behind a `<vis>`, ends each look, and lets a row encode its image again once."""

    def __init__(self, state: SignalState, config):
        self.state = state
        self.look, self.end = config.look_token_id, config.look_end_token_id
        self.reenc = config.reenc_token_id
        own = [self.look, self.end, config.look_pad_token_id, *([self.reenc] if config.reenc_queries else [])]
        self.own = torch.tensor(own, device=state.image_of_row.device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        looks, given = self.state.looks, scores
        scores = scores.index_fill(1, self.own.to(scores.device), -torch.inf)
        for token, allowed in ((self.look, looks.allowed), (self.reenc, looks.may_reencode)):
            if any(allowed):
                rows = torch.tensor(allowed, device=scores.device)
                scores[rows, token] = given[rows, token] + looks.bias
        if self.look in looks.tokens:
            ends = torch.tensor([token == self.look for token in looks.tokens], device=scores.device)
            scores[ends] = -torch.inf
            scores[ends, self.end] = 0.0
        return scores


class LookGenerationMixin(PerceptionGPTGenerationMixin):
    """`generate`, with looks where the config's `look_max` is not 0."""

    _signal_entry_points = (*PerceptionGPTGenerationMixin._signal_entry_points, "get_look_features", "reencode")

    def reencode(self, states: torch.Tensor, image_layers: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """See [`PerceptionGPTModel.reencode`]."""
        return self.model.reencode(states, image_layers)

    def get_look_features(self, look_pixel_values: torch.Tensor, **kwargs):
        """See [`PerceptionGPTModel.get_look_features`]."""
        return self.model.get_look_features(look_pixel_values, **kwargs)

    def _generate_objects(self, inputs, generation_config, **kwargs):
        most, bias = kwargs.pop("max_looks", None), kwargs.pop("look_bias", 0.0)
        if most is None:
            most = self.config.look_max
        if not isinstance(most, int) or not 0 <= most <= self.config.look_max:
            raise ValueError(
                f"`max_looks` is {most!r}; expected 0 to {self.config.look_max}, `look_max` of the config."
            )
        if self.config.look_max:
            kwargs["max_looks"], kwargs["look_bias"] = most, float(bias)
        elif bias:
            raise ValueError("`look_bias` is for a model that looks again: `look_max` of this config is 0.")
        return super()._generate_objects(inputs, generation_config, **kwargs)

    def _refuse_modes(self, generation_config, kwargs: dict, prefix) -> None:
        super()._refuse_modes(generation_config, kwargs, prefix)
        if not kwargs.get("max_looks"):
            return

        def setting(name: str, default):
            values = (
                kwargs.get(name),
                *(getattr(one, name, None) for one in (generation_config, self.generation_config)),
            )
            return next((value for value in values if value is not None), default)

        fsdp = sys.modules.get("torch.distributed.fsdp")
        shared_out = is_deepspeed_zero3_enabled() or bool(fsdp and isinstance(self, fsdp.FSDPModule))
        problem = None
        if setting("num_beams", 1) > 1:
            problem = "beams would have to take the crops that they have seen with them when they change places"
        elif not setting("use_cache", True):
            problem = "crops are read into the cache, and `use_cache` is false"
        elif kwargs.get("synced_gpus") or (shared_out and several_processes()):
            problem = "processes that share out the weights (`synced_gpus`) would all have to look at once"
        if problem:
            raise ValueError(
                f"The model cannot look again here: {problem}. Pass `max_looks=0` to answer without looks."
            )

    def _begin_signals(self, kwargs: dict, names: list[str]) -> tuple[SignalState, dict]:
        config = self.config
        if not config.look_max:
            return super()._begin_signals(kwargs, names)
        images, stats = kwargs.pop("look_images", None), kwargs.pop("look_image_stats", None)
        most, bias = kwargs.pop("max_looks", None), kwargs.pop("look_bias", 0.0)
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        past_length = 0 if cache is None else int(cache.get_seq_length())
        state, kwargs = super()._begin_signals(kwargs, names)
        if state.looks is None:
            state.looks = LookState(len(state.image_of_row), config)
        looks = state.looks
        looks.begin(most or 0, bias)
        new_layers = getattr((kwargs.get("mm_encoder_outputs") or {}).get("image"), "layers", None)
        if new_layers is not None:
            old = looks.layers
            pairs = None if old is None else zip(old, new_layers, strict=True)
            looks.layers = new_layers if pairs is None else tuple(torch.cat(pair) for pair in pairs)
        if images is not None and isinstance(cache, PrefixCache):  # it has the first images of its first row alone
            images = images[: state.num_images]
        self._add_look_images(state, images, stats)
        if most is None:  # not a call of `generate`
            return state, kwargs

        tokens = ids if ids is not None else kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask")
        cached = tokens.shape[1] if mask is None else mask.shape[1]
        moved = 0 if state.layout is None else state.layout.attention_mask.shape[1] - state.layout.length
        looks.prompt_length = cached - moved
        whole = ids is not None and cached == ids.shape[1]
        looks.head = (
            ids[:, :past_length].to(state.image_of_row.device)
            if whole
            else torch.zeros(len(tokens), past_length, dtype=torch.long, device=state.image_of_row.device)
        )
        # What the last call ended with counts only if this one goes on right there.
        goes_on = bool(past_length) and past_length == state.length and cached == past_length + 1
        if goes_on and ids is not None:
            goes_on = torch.equal(ids[:, -1].to(state.unfed_tokens), state.unfed_tokens)
        elif past_length and past_length == state.length and looks.most:
            asks = ((config.look_token_id, looks.allowed), (config.reenc_token_id, looks.may_reencode))
            unfed = state.unfed_tokens.tolist()
            unread = [any(token == unfed[row] and may[row] for token, may in asks) for row in range(len(unfed))]
            if any(unread):
                raise ValueError(
                    f"Row {unread.index(True)}: the last call ended with a look that nothing has read yet: continue "
                    "with its sequences before new text is appended."
                )
        if not goes_on or not looks.most:
            looks.allowed, looks.may_reencode = ([False] * len(looks.allowed) for _ in range(2))
        if not goes_on:
            looks.recent = []
        elif not looks.recent:  # the last call was one of `ground`
            looks.recent = [(state.last_state, [-1] * len(looks.allowed))]
        processors = [*(kwargs.pop("logits_processor", None) or []), LookLogitsProcessor(state, config)]
        kwargs["logits_processor"] = LogitsProcessorList(processors)
        return state, kwargs

    def _add_look_images(self, state: SignalState, images, stats) -> None:
        """Appends the originals of a new prompt, in the order of its `pixel_values`."""
        looks = state.looks
        new = state.num_images - len(looks.images)
        if images is None:
            images = [None] * new
        elif stats is None:
            raise ValueError("`look_images` came without `look_image_stats`; pass both as the processor returns them.")
        if len(images) != new:
            raise ValueError(f"`look_images` has {len(images)} images, the new text {new}: expected as many.")
        looks.images.extend(images)
        looks.stats = looks.stats if stats is None else stats
        looks.image_of_row = state.image_of_row.tolist()
        if looks.most and any(looks.images[index] is None for index in looks.image_of_row if index >= 0):
            raise ValueError(
                "The model looks again at the original images, but `look_images` is missing; pass what the processor "
                "of this checkpoint returns under that name, or `max_looks=0`."
            )

    def _lay_out_prompts(self, inputs: dict, prefix) -> dict:
        images, ids = inputs.pop("look_images", None), inputs.get("input_ids")
        if images is not None:
            per_image = self.config.image_seq_length
            shared = int((prefix.input_ids == self.config.image_token_id).sum()) // per_image
            per_row = (ids == self.config.image_token_id).sum(1) // per_image
            new = [number >= shared for count in per_row.tolist() for number in range(count)]
            inputs["look_images"] = [image for image, is_new in zip(images, new, strict=True) if is_new]
        return super()._lay_out_prompts(inputs, prefix)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        looks = model_kwargs["signal_state"].looks
        if looks is not None:
            # Each look of any row takes room in all of them.
            pads = max(self.config.look_tokens, self.config.reenc_queries)
            max_cache_length += len(looks.counts) * looks.most * pads
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if looks is not None and looks.most and len(looks.counts) > 1 and any(cache.is_sliding):
            raise ValueError(
                "Rows that look at unlike steps cannot share a batch under sliding-window attention, which would count "
                "the slots of others: pass one row at a time, or `max_looks=0`."
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
        looks = getattr(signal_state, "looks", None)
        outputs = {}
        if looks is not None:
            tokens = input_ids[:, -1].tolist() if input_ids.shape[1] else [-1] * len(input_ids)
            pads, outputs = self._look_again(signal_state, tokens)
            if pads:
                past = int(past_key_values.get_seq_length())
                input_ids, attention_mask, kwargs["position_ids"] = self._make_room(
                    pads, input_ids, attention_mask, kwargs["position_ids"], past, past_key_values
                )
                next_sequence_length = max(pads.values()) + 1
                looks.pending, looks.made_room = (attention_mask, kwargs["position_ids"]), True
            self._follow(signal_state, tokens, is_first_iteration)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            signal_state=signal_state,
            **kwargs,
        )
        if outputs:
            model_inputs["mm_encoder_outputs"] = outputs
        if looks is not None and past_key_values is not None:
            ids = model_inputs["input_ids"]
            shape = model_inputs["inputs_embeds"].shape[:2] if ids is None else None
            looks.read.append(looks.head.new_zeros(shape) if ids is None else ids.to(looks.head.device))
        return model_inputs

    def _look_again(self, state: SignalState, tokens: list[int]) -> tuple[dict[int, int], dict]:
        """
        What rows see that have just asked for it.

        Args:
            tokens (`list[int]`): what each row reads in this step.

        Returns:
            how many pads follow the token of a row, by row; and their features, as `mm_encoder_outputs` of `forward`.
        """
        looks = state.looks
        pads, outputs = {}, {}
        rows = [row for row, token in enumerate(tokens) if token == looks.look and looks.allowed[row]]
        if rows:
            seen, features = self._look(state, rows)
            if seen:
                outputs["look"] = features
                pads |= dict.fromkeys(seen, self.config.look_tokens)
        rows = [row for row, token in enumerate(tokens) if token == looks.reenc and looks.may_reencode[row]]
        if rows:
            index = torch.tensor(rows, device=state.last_state.device)
            images = [looks.image_of_row[row] for row in rows]
            layers = tuple(layer[images] for layer in looks.layers)
            outputs["reenc"] = self.reencode(state.last_state[index], layers)
            pads |= dict.fromkeys(rows, self.config.reenc_queries)
            for row in rows:
                looks.counts[row] += 1
                looks.reencoded[row] = True
                box = whole_frames(1)[0]
                looks.found.append({"row": row, "step": len(state.states) - 1, "box": box, "crop": None})
        return pads, outputs

    def _look(self, state: SignalState, rows: list[int]):
        """
        Cuts and encodes the crops of rows that have just emitted `<look>`.

        Returns:
            the rows that have a crop, and the features of the crops, `None` if there are none.
        """
        config, looks = self.config, state.looks
        states, crops = looks.recent[-2]  # of the step that predicted `<vis>`: the last one predicted `<look>`
        chosen = torch.tensor(rows, device=states.device)
        no_image = torch.full_like(chosen, -1)
        no_features = states.new_zeros(0, config.mask_cells, config.feature_size)
        decoded = self.decode_signals(states[chosen], no_features, no_image, names=["box"])
        boxes = decoded[SIGNALS["box"].name][0].float().cpu()
        boxes = out_of_frame(boxes, looks.frames_of(torch.tensor([crops[row] for row in rows])))
        seen, pixel_values = [], []
        for row, box in zip(rows, boxes, strict=True):
            image = looks.images[looks.image_of_row[row]]
            height, width = image.shape[1:]
            pixels = boxes_from_square(box, height, width).tolist()
            crop = look_crop(pixels, height, width, config.look_margin, config.look_min_side)
            looks.counts[row] += 1
            looks.found.append({"row": row, "step": len(state.states) - 1, "box": box, "crop": crop})
            looks.crop_of_row[row] = -1
            if crop is not None:
                looks.crop_of_row[row] = len(looks.frames)
                looks.frames.append(crop_frame(crop, height, width))
                mean, std = looks.stats.to(image.device, torch.float32)
                pixel_values.append(crop_pixel_values(image, crop, config.image_size, mean, std).to(states.device))
                seen.append(row)
        if not seen:
            return seen, None
        reads_masks = config.look_frame == "crop"
        outputs = self.get_look_features(torch.stack(pixel_values), with_mask_features=reads_masks)
        if reads_masks:
            looks.mask_features.append(outputs.mask_features)
        return seen, outputs

    def _make_room(self, pads: dict[int, int], input_ids, attention_mask, position_ids, past_length: int, cache):
        """
        Tokens, attention mask and positions of a step in which some rows read pads behind their token. In front of each
        row's own there are slots that nothing attends to, so that all end together.

        Args:
            pads (`dict[int, int]`): number of pads by row.
        """
        count, most = len(input_ids), max(pads.values())
        if cache.is_compileable and past_length + most + 1 > cache.get_max_length():
            raise ValueError(
                f"The cache holds {past_length} of {cache.get_max_length()} tokens, and a look takes {most + 1}: it "
                "needs room for as many looks as all rows together may take."
            )
        device, config = input_ids.device, self.config
        own = torch.tensor([pads.get(row, 0) for row in range(count)], device=device)[:, None]
        steps = torch.arange(most + 1, device=device) - (most - own)  # 0 at each row's token, below 0 before it
        filler, last = self.generation_config.pad_token_id, input_ids[:, -1:]
        pad = torch.where(last == config.look_token_id, config.look_pad_token_id, last)  # `<reenc>` is its own pad
        ids = torch.where(steps > 0, pad, torch.where(steps == 0, last, 0 if filler is None else filler))
        input_ids = torch.cat([input_ids[:, :-1], ids], dim=1)
        steps = steps.to(position_ids.device)
        position_ids = position_ids.expand(count, -1)
        positions = (position_ids[:, -1:] + steps) * (steps >= 0)
        position_ids = torch.cat([position_ids[:, :-1], positions], dim=1)
        if attention_mask is None and bool((own < most).any()):
            attention_mask = torch.ones(count, past_length + 1, dtype=torch.long, device=device)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask[:, :-1], (steps >= 0).to(attention_mask)], dim=1)
        return input_ids, attention_mask, position_ids

    def _follow(self, state: SignalState, tokens: list[int], is_first_iteration: bool) -> None:
        """Takes note of the token that each row reads in this step."""
        looks = state.looks
        # The box of a `<vis>` in a prompt is the user's; one that the last call ended with is the model's.
        is_known = not is_first_iteration or bool(looks.recent)
        may = [image >= 0 and seen < looks.most for image, seen in zip(looks.image_of_row, looks.counts, strict=True)]
        looks.allowed = [is_known and one and token == looks.vis for one, token in zip(may, tokens, strict=True)]
        if looks.reencodes and looks.layers is not None:
            looks.may_reencode = [
                one and not done and token not in (looks.look, looks.reenc)
                for one, done, token in zip(may, looks.reencoded, tokens, strict=True)
            ]
        looks.tokens = tokens
        looks.next_crops = [
            crop if looks.decodes_in_crops and token == looks.end else -1
            for crop, token in zip(looks.crop_of_row, tokens, strict=True)
        ]

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        state = model_kwargs.get("signal_state")
        looks = getattr(state, "looks", None)
        if looks is not None and looks.pending is not None:
            model_kwargs["attention_mask"], model_kwargs["position_ids"] = looks.pending
            looks.pending = None
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if looks is not None:
            looks.attention_mask = model_kwargs.get("attention_mask")
            looks.decoded_in.append(looks.next_crops)
            looks.recent = [*looks.recent[-1:], (state.last_state, looks.next_crops)]
            state.frames = None
            if max(looks.next_crops) >= 0:
                state.frames = looks.frames_of(torch.tensor(looks.next_crops, device=state.last_state.device))
        return model_kwargs

    def _decode_states(self, states, probabilities, images, valid, state: SignalState, names: list[str]) -> dict:
        fields = super()._decode_states(states, probabilities, images, valid, state, names)
        if state.looks is not None and state.looks.frames:
            crops = torch.where(valid, images - state.num_images, -1).clamp(min=-1)
            frames = state.looks.frames_of(crops)
            for name in names:
                values = SIGNALS[name].result_names[0]
                fields[values] = SIGNALS[name].out_of_frame(fields[values], frames)
            fields["object_frames"] = frames
        return fields

    def _image_features(self, state: SignalState, image_of_slot: torch.Tensor, valid: torch.Tensor):
        if state.looks is None or not state.looks.mask_features:
            return super()._image_features(state, image_of_slot, valid)
        crops = image_of_slot - state.num_images
        features, index = super()._image_features(state, torch.where(crops < 0, image_of_slot, -1), valid)
        of_crops = torch.cat(state.looks.mask_features).to(features)
        return torch.cat([features, of_crops]), torch.where(crops >= 0, len(features) + crops, index)

    def _add_objects(self, output, state: SignalState, prompt_length: int, names: list[str]):
        output = super()._add_objects(output, state, prompt_length, names)
        looks = state.looks
        if looks is None or not looks.most:
            return output
        by_row = [[look for look in looks.found if look["row"] == row] for row in range(len(output.sequences))]
        most = max(len(found) for found in by_row)
        device = output.sequences.device
        output.look_positions = torch.full((len(by_row), most), -1, device=device)
        output.look_boxes = torch.zeros(len(by_row), most, 4, device=device)
        output.look_crops = torch.zeros(len(by_row), most, 4, dtype=torch.long, device=device)
        for row, found in enumerate(by_row):
            for number, look in enumerate(found):
                output.look_positions[row, number] = prompt_length + look["step"]
                output.look_boxes[row, number] = look["box"]
                output.look_crops[row, number] = torch.tensor(look["crop"] or (0, 0, 0, 0))
        return output


__all__ = ["LookGenerationMixin"]
