"""
The seam: the signals that a `<vis>` can carry. A new one is a file like `signal_box_perceptiongpt.py` and a line here.
"""

from dataclasses import fields, make_dataclass

import torch

from .signal_box_perceptiongpt import BoxSignal
from .signal_mask_perceptiongpt import MaskSignal
from .signal_point_perceptiongpt import PointSignal


SIGNALS = {
    signal.name: signal
    for signal in (
        BoxSignal(),
        MaskSignal(),
        PointSignal(),
    )
}
# What checkpoints have whose config was saved before it listed its signals.
FIRST_SIGNALS = ("box", "mask")


def choose_signals(names) -> list[str]:
    """
    The signals of a checkpoint in the order of the table, which is the order that they run in.

    Raises:
        ValueError: a name that the table does not have, or none whose value is fed back.
    """
    unknown = [name for name in names if name not in SIGNALS]
    if unknown:
        raise ValueError(f"`signals` names {unknown}; expected some of {list(SIGNALS)}.")
    chosen = [name for name, signal in SIGNALS.items() if name in names]
    if not any(SIGNALS[name].fed_back for name in chosen):
        needed = [name for name, signal in SIGNALS.items() if signal.fed_back]
        raise ValueError(f"`signals` is {chosen}; expected {' or '.join(needed)} among them, which is fed back.")
    return chosen


def refuse_signal(name: str, signals, place: str = "") -> None:
    """`ValueError`, which starts with `place`, unless a checkpoint with these signals has the one of this name."""
    if name not in signals:
        raise ValueError(
            f"{place}this checkpoint has no {name!r} signal, only {', '.join(signals)}. To add it, load model and "
            f"processor with `from_pretrained(..., signals={[*signals, name]})` and fine-tune the model."
        )


def take_signal_inputs(kwargs: dict) -> dict:
    """Removes the tensors of all signals from keyword arguments and returns them."""
    names = [name for signal in SIGNALS.values() for name in signal.input_names]
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def take_signal_counts(kwargs: dict) -> dict:
    """Removes the numbers of supervised values of all signals from keyword arguments and returns them."""
    return {s.count_name: kwargs.pop(s.count_name) for s in SIGNALS.values() if s.count_name in kwargs}


def with_signal_fields(names_of):
    """
    Class decorator that adds to a dataclass of outputs the fields, by default `None`, that it does not spell out.

    Args:
        names_of (`Callable`): gives for a [`Signal`] the names of its fields.
    """

    def add_fields(output_class):
        spelled_out = {field.name for field in fields(output_class)}
        names = [name for signal in SIGNALS.values() for name in names_of(signal) if name not in spelled_out]
        if not names:
            return output_class
        new = [(name, torch.Tensor | None, None) for name in names]
        made = make_dataclass(output_class.__name__, new, bases=(output_class,))
        made.__module__, made.__doc__ = output_class.__module__, output_class.__doc__
        return made

    return add_fields
