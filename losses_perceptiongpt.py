"""The losses of one forward (paper, equations 2 to 6): each term is a sum over its own count."""

import torch

from .signals_perceptiongpt import SIGNALS


def signal_losses(
    config,
    decoded: dict,
    slots: dict,
    supervised: torch.Tensor,
    counts: dict,
    share: torch.Tensor | float,
    chosen: dict,
) -> tuple[dict, torch.Tensor]:
    """
    The losses of all signals and of their predicted qualities.

    Args:
        config (`PerceptionGPTConfig`)
        decoded (`dict`): by signal name the predictions `(N, ...)` and qualities `(N,)` of all slots; of one slot alone
            for signals that are not given.
        slots (`dict`): see [`prepare_slots`].
        supervised (`torch.Tensor` of shape `(batch_size, K)`): bool, the slots that stand in an answer.
        counts (`dict`): numbers of supervised values by `Signal.count_name`; those of this batch where one is missing.
        share (`float` or `torch.Tensor`):
            How large a part of its optimizer step this batch is; scales the losses of signals whose count is missing.
        chosen (`dict[str, torch.Tensor]`):
            Of signals that were not decoded for all slots, the indices of those that they were decoded for.

    Returns:
        the loss of each signal by `Signal.loss_name`, and the loss of all qualities.
    """
    terms, loss_quality = {}, 0.0
    for name, (predictions, quality) in decoded.items():
        signal = SIGNALS[name]
        targets = slots["values"][name].flatten(0, 1).to(predictions.device)
        # Of a signal that is not given nothing is valid: its losses are 0 whatever was decoded.
        wanted = (supervised & slots["valid"][name].to(supervised.device)).flatten()
        if name in chosen:
            targets, wanted = targets[chosen[name]], wanted[chosen[name]]
        value_loss, quality_loss = signal.loss(config, predictions, quality, targets)
        count = counts.get(signal.count_name)
        if count is None:
            count = wanted.sum().clamp(min=1) / share
        terms[signal.loss_name] = (value_loss * wanted).sum() / count
        loss_quality = loss_quality + (quality_loss * wanted).sum() / count
    return terms, loss_quality
