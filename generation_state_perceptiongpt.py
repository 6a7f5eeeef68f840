"""What the closed loop of `generate` remembers between its steps, and from one call to the next."""

import copy
from itertools import accumulate

import torch

from .slots_perceptiongpt import several_processes


class SignalState:
    """
    What the loop remembers. It is an attribute of the cache in use, so that a second call of `generate` finds it there.

    Attributes:
        mask_features (`torch.Tensor` of shape `(images, cells, width)` or `None`): what masks are decoded from.
        mask_pixel_values (`torch.Tensor` of shape `(images, 3, S', S')` or `None`): the same, before the finer pass.
        finer_features (`tuple[torch.Tensor, torch.Tensor]` or `None`):
            Which images the last finer pass saw, and their features, in place of `mask_features`.
        tower_states (`tuple[torch.Tensor]` or `None`): of the images behind those in `mask_features`, if no signal that
            reads an image was asked for when they came.
        image_of_row (`torch.Tensor` of shape `(rows,)`): the last image of each row, -1 for none.
        prompt_embeds, prompt_replaced: embeddings `(rows, n, hidden)` of the prompt's `<vis>` and the bool mask of
            where they go, over the n prompt tokens that are not in the cache yet; `None` where there are none.
        prompt_start (`int`): how many tokens the cache held before them.
        states, probabilities (`list`): of each step, `(rows, hidden)` and p(`<vis>`) of shape `(rows,)`.
        pending_logits (`torch.Tensor` of shape `(rows, vocabulary)`): of the last step, while its p(`<vis>`) may turn
            out not to be needed; `None` otherwise.
        step_embeds (`list`): boxes fed back, `(rows, hidden)` a step; only kept when decoding without a cache.
        last_state (`torch.Tensor` of shape `(rows, hidden)`): predicts the token that is read next; follows the beams.
        length (`int`): tokens in the cache when the last call ended.
        unfed_tokens (`torch.Tensor` of shape `(rows,)`): each row's last token, which no step has read yet.
        from_beams (`bool`): whether the last call was a beam search.
        layout (`PromptLayout`): of prompts that share a prefix, `None` for others.
        prefix (`PrefixCache`): while a call runs that got one.
        looks (`LookState`): of models that look again, `None` for others.
        frames (`torch.Tensor` of shape `(rows, 4)`): what `last_state` is decoded in, `None` for the image's square.
    """

    def __init__(self, num_rows: int, device):
        self.mask_features = None
        self.mask_pixel_values = None
        self.finer_features = None
        self.tower_states = None
        self.image_of_row = torch.full((num_rows,), -1, dtype=torch.long, device=device)
        self.num_images = 0
        self.last_state = None
        self.length = 0
        self.unfed_tokens = None
        self.from_beams = False
        self.layout = None
        self.prefix = None
        self.looks = None
        self.frames = None
        self.begin(None, None, 0)

    def begin(self, prompt_embeds, prompt_replaced, prompt_start: int) -> None:
        """Starts a call of `generate`."""
        self.prompt_embeds = prompt_embeds
        self.prompt_replaced = prompt_replaced
        self.prompt_start = prompt_start
        self.states, self.probabilities, self.step_embeds = [], [], []
        self.pending_logits = None

    def select(self, rows: torch.Tensor) -> "SignalState":
        """A state for a new call with some rows of this one, or with repeated ones. Images are not copied."""
        state = copy.copy(self)
        state.image_of_row = self.image_of_row[rows]
        state.last_state = None if self.last_state is None else self.last_state[rows]
        state.unfed_tokens = None if self.unfed_tokens is None else self.unfed_tokens[rows]
        state.layout = None if self.layout is None else self.layout.select(rows)
        state.looks = None if self.looks is None else self.looks.select(rows.tolist())
        state.frames = None if self.frames is None else self.frames[rows]
        state.begin(None, None, 0)
        return state

    def add_images(self, images_per_row: list[int], mask_features, mask_pixel_values, tower_states) -> None:
        """Appends the images of a new prompt, rows in order."""
        device = self.image_of_row.device
        last = torch.tensor([self.num_images + seen - 1 for seen in accumulate(images_per_row)], device=device)
        if not all(images_per_row):
            last = torch.where(torch.tensor(images_per_row, device=device) > 0, last, self.image_of_row)
        self.image_of_row = last
        self.num_images += sum(images_per_row)
        for name, new in (("mask_features", mask_features), ("mask_pixel_values", mask_pixel_values)):
            old = getattr(self, name)
            if new is not None:
                setattr(self, name, new if old is None else torch.cat([old, new]))
        if tower_states is not None:
            old = self.tower_states
            pairs = None if old is None else zip(old, tower_states, strict=True)
            self.tower_states = tower_states if pairs is None else tuple(torch.cat(pair) for pair in pairs)

    def expand(self, expand_size: int) -> None:
        """Repeats every row, as the library does for beams and returned sequences. Images are not copied."""
        self.image_of_row = self.image_of_row.repeat_interleave(expand_size, dim=0)
        if self.prompt_embeds is not None:
            self.prompt_embeds = self.prompt_embeds.repeat_interleave(expand_size, dim=0)
            self.prompt_replaced = self.prompt_replaced.repeat_interleave(expand_size, dim=0)
        if self.layout is not None:
            rows = torch.arange(len(self.layout.input_ids)).repeat_interleave(expand_size)
            self.layout = self.layout.select(rows)
        if self.looks is not None:
            self.looks = self.looks.select([row for row in range(len(self.looks.counts)) for _ in range(expand_size)])

    def finish(self, length: int, unfed_tokens: torch.Tensor, from_beams: bool) -> None:
        """Ends a call of `generate` after which the cache holds `length` tokens."""
        self.length, self.unfed_tokens, self.from_beams = length, unfed_tokens, from_beams
        if self.looks is not None and self.looks.made_room:
            self.layout = self.looks.lay_out(len(self.states), length)

    def images_of(self, steps: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """
        What the states of steps speak of, `(S, K)` of both: an image by its number, or a crop by its number after those
        of all images.
        """
        images = self.image_of_row.to(rows.device)[rows]
        if self.looks is None or not self.looks.frames:
            return images
        crops = torch.tensor(self.looks.decoded_in, device=rows.device)[steps, rows]
        return torch.where(crops >= 0, self.num_images + crops, images)

    def record(self, states: torch.Tensor, logits: torch.Tensor, vis_token_id: int) -> None:
        """Keeps the final-norm states `(rows, hidden)` and p(`<vis>`) under the raw logits `(rows, vocabulary)`."""
        self.last_state = states
        self.states.append(states)
        self.pending_logits = logits
        if not may_skip_feedback(states.device):
            self.settle(vis_token_id)

    def settle(self, vis_token_id: int, needed: bool = True) -> None:
        """Turns the logits of the last step into p(`<vis>`), or into zeros where nobody will ask for it."""
        if self.pending_logits is None:
            return
        logits = self.pending_logits
        if needed:
            self.probabilities.append(vis_probability(logits, vis_token_id))
        else:
            self.probabilities.append(logits.new_zeros(len(logits), dtype=torch.float32))
        self.pending_logits = None

    def reorder(self, beam_idx: torch.Tensor) -> None:
        self.last_state = self.last_state.index_select(0, beam_idx.to(self.last_state.device))


def vis_probability(logits: torch.Tensor, vis_token_id: int) -> torch.Tensor:
    """p(`<vis>`) in float32, of shape `(rows,)`, under raw logits `(rows, vocabulary)`."""
    logits = logits.float()
    return (logits[:, vis_token_id] - logits.logsumexp(-1)).exp()


def may_skip_feedback(device: torch.device) -> bool:
    """
    Whether the host may look if a row emitted a `<vis>` before it computes what only such a row needs: on an
    accelerator it would have to wait for the device, and several processes have to run the same modules.
    """
    return device.type == "cpu" and not several_processes()
