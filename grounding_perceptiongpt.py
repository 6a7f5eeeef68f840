"""
Grounding without decoding: the state that ends a prompt already holds the box, mask, point and score of the `<vis>`
that it predicts, so one forward answers.
"""

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from .generation_perceptiongpt import register_entry_points
from .generation_state_perceptiongpt import SignalState, vis_probability
from .outputs_perceptiongpt import PerceptionGPTGenerateOutput
from .prefix_perceptiongpt import attention_from_padding, select_rows
from .signals_perceptiongpt import SIGNALS


class GroundingMixin:
    """`ground`, for models that have [`PerceptionGPTGenerationMixin`]."""

    @torch.no_grad()
    def ground(self, prefix=None, signals=None, max_new_tokens: int = 1, **inputs) -> PerceptionGPTGenerateOutput:
        r"""
        The first object of each answer, from one forward over the prompts: the state that ends a prompt already holds
        the box, mask, point and score of a `<vis>` that follows. No token is decoded.

        It decides as greedy decoding does, without the processors of the logits that a generation config may ask for. A
        row whose likeliest token is not `<vis>` has no object, and that token instead. It never looks again.
        `generate` continues from the returned `sequences` and `past_key_values`, to further objects of a row or to the
        end of its sentence.

        Args:
            prefix, signals (*optional*): as in [`generate`].
            max_new_tokens (`int`, defaults to 1):
                With more than one, rows that do not begin with an object are continued greedily, up to so many tokens.
                Rows that do begin with one stay as they are.
            inputs: the tensors of the processor, as in [`generate`]; also `past_key_values` of an earlier call.

        Returns:
            [`PerceptionGPTGenerateOutput`] with at most one object a row, or as many as the continued rows have.
            `past_key_values` is `None` where rows were continued.

        Raises:
            `ValueError`: as in [`generate`].
        """
        names = self._signal_names(signals)
        register_entry_points(self)
        given, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if given is None and embeds is None:
            raise ValueError("`ground` got no prompt: expected `input_ids` or `inputs_embeds`.")
        inputs = self._lay_out(inputs, prefix)
        state, inputs = self._begin_signals(inputs, names)
        ids = inputs.get("input_ids") if embeds is None else None
        model_inputs, attention_mask = self._prefill_inputs(inputs, state)
        outputs = self(**model_inputs)
        logits, state.last_state = outputs.logits.squeeze(1), outputs.last_hidden_state.squeeze(1)
        cache, state.prefix = outputs.past_key_values, None
        cache.signal_state = state
        tokens = logits.argmax(-1, keepdim=True)
        state.length, state.from_beams, state.unfed_tokens = int(cache.get_seq_length()), False, tokens.squeeze(1)
        prompts = tokens[:, :0] if given is None else given
        sequences = torch.cat([prompts, tokens.to(prompts.device)], dim=1)
        fields = self._first_objects(state, logits, tokens, prompts.shape[1], names)
        output = PerceptionGPTGenerateOutput(sequences=sequences, past_key_values=cache, **fields)
        if max_new_tokens > 1:
            output = self._continue_texts(output, ids, attention_mask, max_new_tokens, names)
        return output

    def _first_objects(self, state: SignalState, logits, tokens, prompt_length: int, names) -> dict:
        """
        The objects of rows whose first token is `<vis>`, as fields of the output: [`_add_objects`] of a single step.

        Args:
            logits (`torch.Tensor` of shape `(rows, vocabulary)`), tokens (`torch.Tensor` of shape `(rows, 1)`)
        """
        vis_token_id = self.config.vis_token_id
        valid = tokens == vis_token_id
        states, images = state.last_state[:, None], state.image_of_row.to(tokens.device)[:, None]
        probabilities = vis_probability(logits, vis_token_id)[:, None]
        if [vis_token_id] not in tokens.tolist():
            valid, states, images, probabilities = (part[:, :0] for part in (valid, states, images, probabilities))
        fields = self._decode_states(states, probabilities, images, valid, state, names)
        positions = torch.where(valid, prompt_length, -1)
        return {**fields, "object_valid": valid, "positions": positions, "prompt_length": prompt_length}

    def _prefill_inputs(self, inputs: dict, state: SignalState) -> tuple[dict, torch.Tensor]:
        """
        What `forward` takes for the prompts that `_begin_signals` has seen, as `generate` would prepare it, and the
        attention mask over all that is in the cache then.
        """
        ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
        attention_mask, position_ids = inputs.pop("attention_mask", None), inputs.pop("position_ids", None)
        cache = inputs.pop("past_key_values", None)
        mm_encoder_outputs = inputs.pop("mm_encoder_outputs", None)
        if inputs:
            raise ValueError(f"`ground` does not take {', '.join(f'`{name}`' for name in inputs)}.")
        device = state.image_of_row.device
        tokens = (ids if embeds is None else embeds).to(device)
        if cache is None:
            cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        if attention_mask is None:
            attention_mask = (
                attention_from_padding(tokens, self.generation_config)
                if embeds is None
                else tokens.new_ones(tokens.shape[:2], dtype=torch.long)
            )
        attention_mask = attention_mask.to(device)
        padded = not bool(attention_mask.all())
        if position_ids is None and padded:
            position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
        if attention_mask.shape[1] == tokens.shape[1]:
            tokens = tokens[:, state.prompt_start :]
        model_inputs = {
            "input_ids" if embeds is None else "inputs_embeds": tokens,
            "attention_mask": attention_mask if padded else None,
            "position_ids": None if position_ids is None else position_ids[..., -tokens.shape[1] :].to(device),
            "past_key_values": cache,
            "mm_encoder_outputs": mm_encoder_outputs,
            "signal_embeds": state.prompt_embeds,
            "signal_embeds_mask": None if state.prompt_embeds is None else state.prompt_replaced,
            "use_cache": True,
            "logits_to_keep": 1,
            "return_dict": True,
        }
        return model_inputs, attention_mask

    def _continue_texts(self, output, input_ids, attention_mask: torch.Tensor, max_new_tokens: int, names):
        """
        The output of `ground`, with the rows that do not begin with an object written to their end.

        Args:
            input_ids (*optional*): the prompts as they stand in the cache.
            attention_mask (`torch.Tensor` of shape `(rows, n)`): over what is in the cache.
        """
        tokens, end = output.sequences[:, -1].to(attention_mask.device), self.generation_config.eos_token_id
        ends = [] if end is None else end if isinstance(end, list) else [end]
        ended = torch.isin(tokens, tokens.new_tensor([self.config.vis_token_id, *ends]))
        rows = (~ended).nonzero().flatten()
        if not len(rows):
            return output
        cache = select_rows(output.past_key_values, rows)
        cache.signal_state = output.past_key_values.signal_state.select(rows)
        cache.signal_state.layout = None
        read = tokens[rows, None]
        if input_ids is not None and input_ids.shape[1] == attention_mask.shape[1]:
            read = torch.cat([input_ids.to(read.device)[rows], read], dim=1)
        more = self.generate(
            input_ids=read,
            attention_mask=F.pad(attention_mask[rows], (0, 1), value=1),
            past_key_values=cache,
            signals=names,
            max_new_tokens=max_new_tokens - 1,
            max_looks=0,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
        )
        pad, length = self.generation_config.pad_token_id, output.sequences.shape[1]
        new = more.sequences[:, more.prompt_length :].to(output.sequences.device)
        fields = dict(output) | {"past_key_values": None}
        fields["sequences"] = F.pad(output.sequences, (0, new.shape[1]), value=[*ends, 0][0] if pad is None else pad)
        fields["sequences"][rows.to(new.device), length:] = new
        more.positions = torch.where(more.object_valid, more.positions - more.prompt_length + length, -1)
        slots = max(output.object_valid.shape[1], more.object_valid.shape[1])
        results = [name for signal in names for name in SIGNALS[signal].result_names]
        for name in ("object_valid", "positions", *results):
            short, continued = output[name], more[name]
            merged = short.new_full((len(short), slots, *short.shape[2:]), -1 if name == "positions" else 0)
            merged[:, : short.shape[1]] = short
            merged[rows] = -1 if name == "positions" else 0
            merged[rows, : continued.shape[1]] = continued
            fields[name] = merged
        return type(output)(**fields)
