"""
Slots: the k-th slot of a row belongs to the k-th `<vis>` of its sequence, in prompts and answers alike.

All shapes are fixed by the caller's, so that the host never waits to learn how many `<vis>` there are.
"""

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.utils import torch_compilable_check

from .signals_perceptiongpt import SIGNALS, refuse_signal


def prepare_slots(config, inputs: dict, device, every_signal: bool = False) -> dict | None:
    """
    Fills in what the caller left out of the signal tensors.

    Args:
        config (`PerceptionGPTConfig`)
        inputs (`dict[str, torch.Tensor]`): tensors of the signals by keyword; what is `None` or has no slots counts as
            not given.
        every_signal (`bool`): whether signals that are not given get one slot, which nothing reads or supervises.

    Returns:
        `dict` of `values`, `valid` and `read`, each by signal name, `(batch_size, K, ...)`, or `(1, 1, ...)` for a
        signal that is not given; and `given`, the names of those that are. `None` where there would be nothing in them.

    Raises:
        ValueError: a signal that the checkpoint does not have, or signals with unlike numbers of slots.
    """
    given = {name: inputs.get(signal.plural) for name, signal in SIGNALS.items()}
    given = {name: values for name, values in given.items() if values is not None and values.shape[1] > 0}
    for name in given:
        refuse_signal(name, config.signals, f"`{SIGNALS[name].plural}`: ")
    if len({values.shape[1] for values in given.values()}) > 1:
        slots = {SIGNALS[name].plural: values.shape[1] for name, values in given.items()}
        raise ValueError(f"Expected as many slots of each signal, got {slots}.")
    if not given and not every_signal:
        return None
    slots = {"given": list(given), "values": {}, "valid": {}, "read": {}}
    for name in config.signals:
        signal = SIGNALS[name]
        if name in given:
            values = given[name]
            valid, read = inputs.get(signal.valid_name), inputs.get(signal.read_name)
            if valid is None:
                valid = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
            read = valid if read is None else read
        elif every_signal:
            values = signal.pad(config, 1, 1, device)
            valid = read = torch.zeros(1, 1, dtype=torch.bool, device=device)
        else:
            continue
        slots["values"][name], slots["valid"][name], slots["read"][name] = values, valid, read
    return slots


def align_slots(embeddings: torch.Tensor, read: dict, vis_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Lays slot embeddings `(batch_size, K, hidden_size)` out over the sequence.

    Returns:
        embeddings `(batch_size, sequence_length, hidden_size)` and the bool mask of the `<vis>` that take theirs; a
        `<vis>` for which nothing is read, or beyond the slots, keeps its static row.
    """
    num_slots = embeddings.shape[1]
    embeddings = embeddings.expand(len(vis_mask), -1, -1)
    slot = vis_mask.cumsum(1) - 1
    in_range = vis_mask & (slot < num_slots)
    slot = slot.clamp(0, num_slots - 1)
    read_any = torch.zeros(len(vis_mask), num_slots, dtype=torch.bool, device=vis_mask.device)
    for flags in read.values():
        read_any = read_any | flags.to(vis_mask.device)
    aligned = embeddings.gather(1, slot[..., None].expand(-1, -1, embeddings.shape[2]))
    return aligned, in_range & read_any.gather(1, slot)


def slot_positions(vis_mask: torch.Tensor, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the k-th `<vis>` of each row stands, `(batch_size, num_slots)`, and whether there is one."""
    length = vis_mask.shape[1]
    order = vis_mask * torch.arange(length, 0, -1, device=vis_mask.device)
    found, positions = order.topk(min(num_slots, length), dim=1)
    missing = num_slots - positions.shape[1]
    return F.pad(positions, (0, missing)), F.pad(found, (0, missing)) > 0


def slot_images(
    image_mask: torch.Tensor, positions: torch.Tensor, image_seq_length: int, signal_image_index=None
) -> torch.Tensor:
    """
    Index into the flat list of images for each slot, `(batch_size, K)`, -1 for none.

    Args:
        image_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): bool, where `<image>` tokens stand.
        positions (`torch.Tensor` of shape `(batch_size, K)`): of the slots' `<vis>`.
        image_seq_length (`int`): `<image>` tokens per image.
        signal_image_index (`torch.Tensor` of shape `(batch_size, K)`, *optional*):
            Index within the row; where it is negative, the last `<image>` before the `<vis>` counts.
    """
    seen = image_mask.cumsum(1)
    images = torch.div(seen[:, -1], image_seq_length, rounding_mode="floor")
    within = torch.div(seen.gather(1, positions) + image_seq_length - 1, image_seq_length, rounding_mode="floor") - 1
    if signal_image_index is not None:
        within = torch.where(signal_image_index >= 0, signal_image_index, within)
    return torch.where(within >= 0, (images.cumsum(0) - images)[:, None] + within, -1)


def several_processes() -> bool:
    """Whether this process is one of several that train or evaluate together, and wait for each other's modules."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def require_finer_images(config, names, slots: dict, supervised: torch.Tensor | None) -> None:
    """
    `ValueError` if signals are decoded from images whose finer pixels are missing, and the result matters.

    Args:
        names (`Iterable[str]`): the signals that are decoded.
        supervised (`torch.Tensor` of shape `(batch_size, K)`, *optional*):
            Bool, the slots whose values matter if they are valid; all of them by default.
    """
    message = (
        f"The model decodes masks from images at {config.mask_image_size} pixels, but `mask_pixel_values` is missing; "
        "pass what the processor of this checkpoint returns under that name."
    )
    for name in names:
        if SIGNALS[name].reads_image:
            if supervised is None:
                raise ValueError(message)
            wanted = supervised & slots["valid"][name].to(supervised.device)
            torch_compilable_check(~wanted.any(), message)


def packed_mask(config, attention_mask: torch.Tensor, position_ids, dtype: torch.dtype) -> torch.Tensor | BlockMask:
    """
    A bool `(batch_size, 1, L, L)` mask as the attention back end takes it: blocks of it for flex attention, which skips
    those that are empty, and for the others what they add to their scores.
    """
    text_config = config.text_config
    implementation = str(text_config._attn_implementation)
    if "flash" in implementation:
        raise ValueError("Packed rows need a 4-D attention mask, which flash attention cannot take: use sdpa or eager.")
    window = getattr(text_config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(text_config, "layer_types", None) or ["sliding_attention"])
    if window is not None and sliding and window < attention_mask.shape[-1]:
        raise ValueError(
            f"A packed row of {attention_mask.shape[-1]} tokens is longer than the sliding window of {window}: "
            "pack fewer questions."
        )
    if position_ids is None:
        raise ValueError("A 4-D `attention_mask` needs `position_ids`: each packed question restarts its own.")
    if "flex" in implementation:
        rows, _, length, _ = attention_mask.shape
        return create_block_mask(
            lambda row, head, query, key: attention_mask[row, 0, query, key],
            *(rows, None, length, length),
            device=attention_mask.device,
        )
    lowest = torch.finfo(dtype).min
    return torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device).masked_fill(
        ~attention_mask, lowest
    )
