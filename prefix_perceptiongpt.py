"""
One start of many prompts, encoded once: an image and the text before it, whose keys and values all rows share.

Rows are padded on the left, so prefix and padding change places: `[padding, prefix, question]` becomes
`[prefix, padding, question]`. The attention mask hides the padding, and positions count only what it shows.
"""

import copy
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class PrefixCache(DynamicCache):
    """
    Keys and values of one row, which no call of `generate` or `ground` changes.

    Attributes:
        input_ids (`torch.Tensor` of shape `(1, n)`): the tokens, without padding.
        signal_state (`SignalState`): the images, as the loop of `generate` keeps them.
    """

    input_ids: torch.Tensor | None = None
    signal_state = None

    def share(self, num_rows: int) -> DynamicCache:
        """A cache of `num_rows` rows that starts as views of this one; what is added goes to the new one alone."""
        return select_rows(self, torch.zeros(num_rows, dtype=torch.long))


@dataclass
class PromptLayout:
    """
    Where the tokens of the prompts stand in the cache, for prompts that share a prefix.

    Args:
        length (`int`): of the prompts as they were given.
        input_ids, attention_mask (`torch.Tensor` of shape `(rows, n)`): as they stand in the cache.
    """

    length: int
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    def select(self, rows: torch.Tensor) -> "PromptLayout":
        """The layout of some rows, or of repeated ones."""
        rows = rows.to(self.input_ids.device)
        return PromptLayout(self.length, self.input_ids[rows], self.attention_mask[rows])


def select_rows(cache, rows: torch.Tensor) -> DynamicCache:
    """
    A new cache with some rows of a dynamic one, which stays as it is. One row that is repeated is not copied.

    Raises:
        ValueError: the cache is of another kind.
    """
    selected = DynamicCache()
    selected.layers = []
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or type(cache) not in (DynamicCache, PrefixCache):
            raise ValueError(f"Rows can be taken from a dynamic cache only, this is a {type(cache).__name__}.")
        layer = copy.copy(layer)
        if layer.is_initialized:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.expand(len(rows), -1, -1, -1) if len(old) == 1 else old[rows.to(old.device)]
                setattr(layer, name, new)
        selected.layers.append(layer)
    return selected


def attention_from_padding(input_ids: torch.Tensor, generation_config) -> torch.Tensor:
    """The attention mask that `generate` assumes where none is given: 0 on padding, unless an end looks the same."""
    pad, end = generation_config.pad_token_id, generation_config.eos_token_id
    ends = end if isinstance(end, (list, tuple)) else [end]
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


def require_left_padding(attention_mask: torch.Tensor) -> torch.Tensor:
    """The number of tokens of each row, `(rows,)`; `ValueError` unless padding stands before them."""
    if not torch.equal(attention_mask.cummax(1).values, attention_mask):
        raise ValueError("Prompts that share a prefix must be padded on the left.")
    return attention_mask.sum(1)


def shared_length(input_ids: torch.Tensor, lengths: torch.Tensor, vis_token_id: int) -> int:
    """How many tokens all left-padded rows start with; of several rows, those before the first `<vis>`."""
    total = input_ids.shape[1]
    rows = [row[total - length :] for row, length in zip(input_ids, lengths.tolist(), strict=True)]
    if len(rows) == 1:
        return len(rows[0])
    shortest = min(len(row) for row in rows)
    rows = torch.stack([row[:shortest] for row in rows])
    same = (rows == rows[0]).all(0) & (rows[0] != vis_token_id)
    return int(same.long().cumprod(0).sum())


def lay_out(prefix_ids: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor, pad_token_id: int):
    """
    Moves the padding of prompts that start with a prefix behind it.

    Args:
        prefix_ids (`torch.Tensor` of shape `(1, n)`)
        input_ids, attention_mask (`torch.Tensor` of shape `(rows, length)`): padded on the left.

    Returns:
        [`PromptLayout`]

    Raises:
        ValueError: a row does not start with the prefix, or has nothing after it.
    """
    prefix_length, length = prefix_ids.shape[1], input_ids.shape[1]
    lengths = require_left_padding(attention_mask)
    index = (length - lengths)[:, None] + torch.arange(prefix_length, device=input_ids.device)
    agree = (input_ids.gather(1, index.clamp(max=length - 1)) == prefix_ids) & (index < length)
    for row, matched in enumerate(agree.long().cumprod(1).sum(1).tolist()):
        if matched < prefix_length or lengths[row] <= prefix_length:
            raise ValueError(
                f"Row {row} has {int(lengths[row])} tokens, of which the first {matched} are those of the prefix: "
                f"expected all {prefix_length} tokens of the prefix and at least one more."
            )
    longest = int(lengths.max()) - prefix_length
    shown = torch.arange(longest, device=input_ids.device) >= longest - (lengths - prefix_length)[:, None]
    tails = input_ids[:, length - longest :].masked_fill(~shown, pad_token_id)
    mask = torch.cat([shown.new_ones(len(input_ids), prefix_length), shown], dim=1)
    ids = torch.cat([prefix_ids.expand(len(input_ids), -1), tails], dim=1)
    return PromptLayout(length, ids, mask.to(attention_mask.dtype))
