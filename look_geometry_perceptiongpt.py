"""
Where a look goes: from the box of a `<vis>` to a crop of the original image, the frame of that crop, and its pixels.

A *crop* is xyxy in whole pixels of the original image. Its *frame* is the square that the image processor pads it to:
xyxy in 0..1 of the padded square of the whole image, beyond which it may reach. What is predicted in a frame lies in
0..1 of the frame.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

from .geometry_perceptiongpt import letterbox


# A crop of at least this share of the image's longer side would show nothing new: there is no look.
WHOLE_SHARE = 0.9


def look_crop(box, height: int, width: int, margin: float, min_side: int) -> tuple[int, int, int, int] | None:
    """
    The crop of a `(height, width)` image around a box: a square where the image is large enough, moved inside it.

    Args:
        box: xyxy in pixels of the image; of any size and anywhere. One that is empty, or not finite, counts as its
            centre, or as that of the image.
        margin (`float`): side of the crop as a multiple of the longer side of the box.
        min_side (`int`): least side of the crop in pixels, as far as the image has so many.

    Returns:
        `tuple[int, int, int, int]`: xyxy in whole pixels; `None` if it would be nearly the whole image.
    """
    x0, y0, x1, y1 = (float(value) for value in box)
    if not all(map(math.isfinite, (x0, y0, x1, y1))):
        x0, y0, x1, y1 = width / 2, height / 2, width / 2, height / 2
    longest = max(height, width)
    # No box makes a crop larger than the image; numbers beyond every image would overflow.
    side = math.ceil(max(min(margin * max(x1 - x0, y1 - y0), longest), min_side))
    crop = []
    for low, high, length in ((x0, x1, width), (y0, y1, height)):
        own = min(side, length)
        centre = min(max((low + high) / 2, 0), length)
        start = min(max(round(centre - own / 2), 0), length - own)
        crop.append((start, start + own))
    if max(end - start for start, end in crop) >= WHOLE_SHARE * longest:
        return None
    (left, right), (top, bottom) = crop
    return left, top, right, bottom


def crop_frame(crop, height: int, width: int) -> list[float]:
    """The frame of a crop of a `(height, width)` image."""
    left, top, right, bottom = crop
    side, above, before = letterbox(height, width)
    crop_side, crop_above, crop_before = letterbox(bottom - top, right - left)
    x, y = left - crop_before + before, top - crop_above + above
    return [x / side, y / side, (x + crop_side) / side, (y + crop_side) / side]


def into_frame(coordinates: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """
    Moves coordinates into frames.

    Args:
        coordinates (`torch.Tensor` of shape `(..., 2 n)`): x, y, x, y and so on in 0..1 of the image's square.
        frames (`torch.Tensor` of shape `(..., 4)`)

    Returns:
        `torch.Tensor` of the shape of `coordinates`, in 0..1 of the frames where it lies in them.
    """
    origins, sides = _origins_and_sides(coordinates, frames)
    return (coordinates - origins) / sides


def out_of_frame(coordinates: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
    """The inverse of [`into_frame`]."""
    origins, sides = _origins_and_sides(coordinates, frames)
    return origins + sides * coordinates


def _origins_and_sides(coordinates: torch.Tensor, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    frames = frames.to(coordinates.device, torch.float32)
    pairs = coordinates.shape[-1] // 2
    return torch.cat([frames[..., :2]] * pairs, -1), torch.cat([frames[..., 2:] - frames[..., :2]] * pairs, -1)


def whole_frames(*shape: int, device=None) -> torch.Tensor:
    """Frames `(*shape, 4)` that are the image's own square, in which nothing moves."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0], device=device).expand(*shape, 4)


def crop_pixel_values(image: torch.Tensor, crop, side: int, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """
    What the image processor makes of a crop: padded to the square with the mean colour, resized, normalised.

    Args:
        image (`torch.Tensor` of shape `(3, height, width)`): uint8, the original.
        crop: xyxy in whole pixels of it.
        side (`int`): of the result.
        mean, std (`torch.Tensor` of shape `(3,)`): of the image processor.

    Returns:
        `torch.Tensor` of shape `(3, side, side)`, float32.
    """
    left, top, right, bottom = crop
    pixels = image[:, top:bottom, left:right].float()
    mean, std = (values.to(pixels.device, torch.float32)[:, None, None] for values in (mean, std))
    square_side, above, before = letterbox(bottom - top, right - left)
    square = (mean * 255).floor().expand(3, square_side, square_side).clone()
    square[:, above : above + bottom - top, before : before + right - left] = pixels
    # Columns, then rows, and bytes after each, as Pillow does it.
    resized = square[None]
    for size in ((square_side, side), (side, side)):
        resized = F.interpolate(resized, size=size, mode="bicubic", antialias=True).clamp(0, 255).round()
    return (resized[0] / 255 - mean) / std


def crop_mask(mask: np.ndarray, crop) -> np.ndarray:
    """The part of a `(height, width)` mask that lies in a crop; it may be empty."""
    left, top, right, bottom = crop
    return mask[top:bottom, left:right]


__all__ = [
    "crop_frame",
    "crop_mask",
    "crop_pixel_values",
    "into_frame",
    "look_crop",
    "out_of_frame",
    "whole_frames",
]
