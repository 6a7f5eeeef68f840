"""
The seam: the signals that a `<vis>` can carry. A new one is a file like `signal_box_perceptiongpt.py` and a line here.
"""

from .signal_box_perceptiongpt import BoxSignal
from .signal_mask_perceptiongpt import MaskSignal


SIGNALS = {"box": BoxSignal, "mask": MaskSignal}
