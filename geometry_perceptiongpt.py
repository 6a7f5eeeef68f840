"""
Between the pixels of an image and the padded square that the model sees.

Outside, boxes are absolute xyxy pixels of the original image and masks have its size. Inside, boxes are xyxy in 0..1
of the padded square and masks are grids over it. The square is what `LlavaImageProcessor(do_pad=True)` makes: its side
is the longer side of the image, which lies in the centre. A pixel is the unit square from its index to the next.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F


try:
    from pycocotools import mask as coco_mask
except ImportError:  # only polygons that come in and RLE that goes out need it
    coco_mask = None

OVERHANG = 1.0  # pixels by which an annotation may leave its image: rounding, not a mistake
INTERIOR_DEPTH = 0.25  # a click is at least this share of an object's depth away from its edge


def letterbox(height: int, width: int) -> tuple[int, int, int]:
    """Side of the padded square in pixels, and the rows above and columns left of a `(height, width)` image in it."""
    side = max(height, width)
    return side, (side - height) // 2, (side - width) // 2


def boxes_to_square(boxes, height: int, width: int) -> torch.Tensor:
    """
    Moves boxes into the padded square.

    Args:
        boxes (`torch.Tensor`, array or list of shape `(..., 4)`): xyxy, pixels of a `(height, width)` image.

    Returns:
        `torch.Tensor` of the same shape, float32: xyxy in 0..1 of the padded square.
    """
    side, top, left = letterbox(height, width)
    boxes = torch.as_tensor(boxes, dtype=torch.float64)
    return ((boxes + boxes.new_tensor([left, top, left, top])) / side).float()


def boxes_from_square(boxes, height: int, width: int) -> torch.Tensor:
    """The inverse of [`boxes_to_square`], float32 pixels; what lies in the padding is clipped to the image."""
    side, top, left = letterbox(height, width)
    boxes = torch.as_tensor(boxes, dtype=torch.float64)
    pixels = boxes * side - boxes.new_tensor([left, top, left, top])
    return pixels.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height])).float()


def _sum_over_cells(values: np.ndarray, cells: int, side: int, offset: int) -> np.ndarray:
    """Integral of `(length, n)` pixels along their first axis over each of `cells` along the square: (cells, n)."""
    up_to = np.zeros((len(values) + 1, values.shape[1]))
    np.cumsum(values, axis=0, out=up_to[1:])
    edges = (np.arange(cells + 1) * (side / cells) - offset).clip(0, len(values))
    whole = np.minimum(edges.astype(np.int64), len(values) - 1)
    return np.diff(up_to[whole] + (edges - whole)[:, None] * values[whole], axis=0)


def mask_coverage(mask: np.ndarray, size: int) -> np.ndarray:
    """
    How much of each cell of a grid over the padded square a mask covers.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): bool.
        size (`int`): side M of the grid.

    Returns:
        `np.ndarray` of shape `(M, M)`, float64 in 0..1.
    """
    height, width = mask.shape
    side, top, left = letterbox(height, width)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.zeros((size, size))
    # Most masks are small: what lies around the object is left out.
    mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # By running sums: in the workers of a data loader, products of small matrices wait for numpy's threads.
    lit = _sum_over_cells(mask, size, side, top + int(rows[0]))
    return _sum_over_cells(lit.T, size, side, left + int(columns[0])).T * (size / side) ** 2


def mask_to_square(mask: np.ndarray, size: int) -> np.ndarray:
    """
    Resamples a mask to a grid over the padded square: a cell is lit where the mask covers at least half of it.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): bool.
        size (`int`): side M of the grid.

    Returns:
        `np.ndarray` of shape `(M, M)`, uint8. The best covered cell of a mask that is not empty is always lit.
    """
    coverage = mask_coverage(mask, size)
    # A little below, so that cells which are covered alike, or by exactly a half, do not depend on rounding.
    threshold = min(0.5, float(coverage.max())) * 0.9998
    return ((coverage >= threshold) & (coverage > 0)).astype(np.uint8)


def sample_mask_logits(mask_logits: torch.Tensor, height: int, width: int, frames=None) -> torch.Tensor:
    """
    Samples grids over the padded square at the pixel centres of the image, bilinearly.

    Args:
        mask_logits (`torch.Tensor` of shape `(N, h, w)`): grids over the padded square, or over `frames`.
        frames (`torch.Tensor` of shape `(N, 4)`, *optional*):
            xyxy in 0..1 of the padded square, the part of it that each grid lies on; beyond it logits are -inf.

    Returns:
        `torch.Tensor` of shape `(N, height, width)`, float32.
    """
    if len(mask_logits) == 0:
        return mask_logits.new_zeros((0, height, width), dtype=torch.float32)
    side, top, left = letterbox(height, width)
    device = mask_logits.device
    y = (torch.arange(height, device=device) + (top + 0.5)) * (2 / side) - 1
    x = (torch.arange(width, device=device) + (left + 0.5)) * (2 / side) - 1
    if frames is not None:
        x0, y0, x1, y1 = (frames.to(device, torch.float32) * 2 - 1)[..., None].unbind(1)
        x, y = ((values - low) * (2 / (high - low)) - 1 for values, low, high in ((x, x0, x1), (y, y0, y1)))
        shape = (len(mask_logits), height, width)
        points = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=-1)
        sampled = F.grid_sample(mask_logits[:, None].float(), points, padding_mode="border", align_corners=False)[:, 0]
        return sampled.masked_fill((points.abs() > 1).any(-1), -torch.inf)
    points = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
    return F.grid_sample(mask_logits[None].float(), points[None], padding_mode="border", align_corners=False)[0]


def clip_box(box, height: float, width: float) -> list[float]:
    """
    Checks one box and clips what overhangs a `(height, width)` image by at most one pixel. (A size that is not known
    is infinite.)

    Returns:
        `list[float]`: xyxy pixels inside the image.

    Raises:
        ValueError: not four finite numbers with x0 < x1 and y0 < y1, or further outside the image.
    """
    expected = f"expected [x0, y0, x1, y1] in pixels with x0 < x1 <= {width} and y0 < y1 <= {height}"
    try:
        values = [float(value) for value in box]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != 4:
        raise ValueError(f"box {box!r:.200} is not four numbers; {expected}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"box {values} is not finite; {expected}")
    x0, y0, x1, y1 = values
    if x1 < x0 or y1 < y0:
        raise ValueError(f"box {values} is inverted and has no area; {expected}")
    overhang = max(-x0, -y0, x1 - width, y1 - height)
    if overhang > OVERHANG:
        raise ValueError(f"box {values} lies {overhang:g} px outside the {width} x {height} image; {expected}")
    clipped = [max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))]
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise ValueError(f"box {values} has no area inside its image; {expected}")
    return clipped


def clip_point(point, height: float, width: float) -> list[float]:
    """
    Checks one point and clips what overhangs a `(height, width)` image by at most one pixel. (A size that is not known
    is infinite.)

    Returns:
        `list[float]`: x and y in pixels inside the image.

    Raises:
        ValueError: not two finite numbers, or further outside the image.
    """
    expected = f"expected [x, y] in pixels with x <= {width} and y <= {height}"
    try:
        values = [float(value) for value in point]
    except (TypeError, ValueError, OverflowError):
        values = []
    if len(values) != 2:
        raise ValueError(f"point {point!r:.200} is not two numbers; {expected}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"point {values} is not finite; {expected}")
    x, y = values
    overhang = max(-x, -y, x - width, y - height)
    if overhang > OVERHANG:
        raise ValueError(f"point {values} lies {overhang:g} px outside the {width} x {height} image; {expected}")
    return [min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))]


def box_iou(boxes, other_boxes) -> np.ndarray:
    """IoU of xyxy boxes `(..., 4)` (arrays or lists) in continuous coordinates, broadcast as numpy does."""
    boxes, other_boxes = np.asarray(boxes, dtype=np.float64), np.asarray(other_boxes, dtype=np.float64)
    sides = np.minimum(boxes[..., 2:], other_boxes[..., 2:]) - np.maximum(boxes[..., :2], other_boxes[..., :2])
    intersection = sides.clip(min=0).prod(axis=-1)
    area, other_area = ((some[..., 2:] - some[..., :2]).prod(axis=-1) for some in (boxes, other_boxes))
    return intersection / (area + other_area - intersection)


def tight_box(mask: np.ndarray) -> list[float]:
    """The smallest box, xyxy pixels, around a `(height, width)` bool mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def mask_depth(mask: np.ndarray) -> np.ndarray:
    """
    How deep each pixel lies inside a mask: the exact Euclidean distance from its centre to that of the nearest pixel
    outside. What lies beyond the image is outside.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): bool.

    Returns:
        `np.ndarray` of shape `(height, width)`, float64: 0 outside, at least 1 inside.
    """
    height, width = mask.shape
    # Down each column first: the distance to the nearest pixel outside above or below.
    rows = np.arange(height, dtype=np.int32)[:, None]
    above = np.maximum.accumulate(np.where(mask, np.int32(-1), rows), axis=0)
    below = np.minimum.accumulate(np.where(mask, np.int32(height), rows)[::-1], axis=0)[::-1]
    column_squared = np.minimum(rows - above, below - rows) ** 2
    # Then from column to column, as far as a pixel outside can still be the nearest to any pixel.
    padded = np.pad(column_squared, ((0, 0), (width, width)))
    squared, shifted = column_squared.copy(), np.empty_like(column_squared)
    for offset in range(1, width + 1):
        if offset**2 >= squared.max():
            break
        for start in (width - offset, width + offset):
            np.add(padded[:, start : start + width], offset**2, out=shifted)
            np.minimum(squared, shifted, out=squared)
    return np.sqrt(squared)


def deepest_pixel(mask: np.ndarray) -> list[float]:
    """
    The point of a mask that is farthest from its edge, where one would point at the object: of equally deep pixels the
    one nearest to the middle of all its pixels.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): bool, not empty.

    Returns:
        `list[float]`: [x, y], the pixel's centre.
    """
    x0, y0, x1, y1 = map(int, tight_box(mask))
    mask = mask[y0:y1, x0:x1]
    depth = mask_depth(mask)
    rows, columns = np.nonzero(depth == depth.max())
    all_rows, all_columns = np.nonzero(mask)
    nearest = np.argmin((rows - all_rows.mean()) ** 2 + (columns - all_columns.mean()) ** 2)
    return [x0 + float(columns[nearest]) + 0.5, y0 + float(rows[nearest]) + 0.5]


def interior_point(mask: np.ndarray, generator: np.random.Generator) -> list[float]:
    """
    A point as a user would click it: drawn evenly from the pixels of a mask that are not at its edge, those at least
    `INTERIOR_DEPTH` as deep as the deepest.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): bool, not empty.
        generator (`np.random.Generator`): where to draw from, one number.

    Returns:
        `list[float]`: [x, y], the pixel's centre.
    """
    x0, y0, x1, y1 = map(int, tight_box(mask))
    depth = mask_depth(mask[y0:y1, x0:x1])
    rows, columns = np.nonzero(depth >= INTERIOR_DEPTH * depth.max())
    chosen = generator.integers(len(rows))
    return [x0 + float(columns[chosen]) + 0.5, y0 + float(rows[chosen]) + 0.5]


def decode_mask(mask, height: int, width: int) -> np.ndarray:
    """
    Reads a mask of a `(height, width)` image in any of the forms that users have.

    Args:
        mask: an array, tensor or PIL image of the image's size (not zero = inside); a COCO RLE `{"size": [height,
            width], "counts": str | bytes | list[int]}`; or a list of polygons `[x0, y0, x1, y1, ...]` in pixels.

    Returns:
        `np.ndarray` of shape `(height, width)`, bool, not empty.

    Raises:
        ValueError: another size, nothing inside, a broken RLE, a polygon of fewer than three points.
        ImportError: polygons without pycocotools.
    """
    if isinstance(mask, dict):
        decoded = _decode_rle(mask, height, width)
    elif isinstance(mask, (list, tuple)):
        decoded = _decode_polygons(mask, height, width)
    else:
        if hasattr(mask, "getbands") and len(mask.getbands()) > 1:
            mask = mask.convert("L")
        decoded = np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask)
        if decoded.dtype.kind not in "buif":
            raise ValueError(
                f"mask is a {type(mask).__name__}; expected an array, a PIL image, a COCO RLE or a list of polygons"
            )
        if decoded.shape != (height, width):
            raise ValueError(f"mask has the shape {decoded.shape}; expected (height, width) = {(height, width)}")
        if decoded.dtype.kind == "f" and not np.isin(decoded, (0, 1)).all():
            raise ValueError("mask holds floats other than 0 and 1; expected a bool array, so apply a threshold first")
        decoded = decoded != 0
    if not decoded.any():
        raise ValueError(f"mask is empty; expected at least one of {height} x {width} pixels inside")
    return decoded


def _decode_rle(rle: dict, height: int, width: int) -> np.ndarray:
    size, counts = rle.get("size"), rle.get("counts")
    if np.shape(size) != (2,) or list(size) != [height, width]:
        raise ValueError(f"RLE mask has the size {size}; expected [height, width] = {[height, width]}")
    runs = rle_runs(counts) if isinstance(counts, (str, bytes)) else counts
    is_list = isinstance(runs, (list, tuple, np.ndarray))
    if not is_list or not all(isinstance(run, (int, np.integer)) and run >= 0 for run in runs):
        raise ValueError(f"RLE counts {str(counts)[:60]!r} are not run lengths")
    total = sum(map(int, runs))
    if total != height * width:
        raise ValueError(f"RLE run lengths sum up to {total}; expected {height} x {width} = {height * width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def rle_runs(counts: str | bytes) -> list[int]:
    """
    The run lengths in a compressed COCO RLE string: base-32 digits, lowest first, each the difference from the run two
    before. Written out because pycocotools reads and writes past its buffers when runs do not fill the image.

    Raises:
        ValueError: the string is no such string.
    """
    codes = counts.encode("latin-1", "replace") if isinstance(counts, str) else counts
    runs, value, shift = [], 0, 0
    for code in codes:
        digit = code - 48
        if not 0 <= digit < 64 or shift > 60:
            raise ValueError(f"RLE string {str(counts)[:60]!r} is broken at {chr(code)!r}")
        value |= (digit & 0x1F) << shift
        shift += 5
        if not digit & 0x20:
            if digit & 0x10:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError(f"RLE string {str(counts)[:60]!r} ends too early")
    return runs


def _decode_polygons(polygons: list | tuple, height: int, width: int) -> np.ndarray:
    flat_polygons = []
    for polygon in polygons:
        try:
            points = np.asarray(polygon)
            if points.dtype.kind not in "uif":
                raise TypeError  # rows of bools are a mask written as a list, not points
            points = points.astype(np.float64).reshape(-1, 2)
        except (TypeError, ValueError):
            raise ValueError(f"polygon {str(polygon)[:60]} is not numbers [x0, y0, x1, y1, ...]") from None
        if len(points) < 3:
            raise ValueError(f"polygon {str(polygon)[:60]} has {len(points)} points; expected at least 3")
        if not ((points >= -OVERHANG) & (points <= np.array([width, height]) + OVERHANG)).all():  # NaN too
            raise ValueError(f"polygon {str(polygon)[:60]} lies outside the {width} x {height} image")
        flat_polygons.append(points.clip(0, [width, height]).ravel().tolist())
    if not flat_polygons:
        raise ValueError("mask is a list without polygons")
    _require_pycocotools()
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(flat_polygons, height, width))).astype(bool)


def encode_rle(mask: np.ndarray) -> dict:
    """A `(height, width)` bool mask as compressed COCO RLE, `{"size": [height, width], "counts": str}`."""
    _require_pycocotools()
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")}


def _require_pycocotools() -> None:
    if coco_mask is None:
        raise ImportError("polygons and RLE need pycocotools: pip install pycocotools")


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """
    The outer outlines of a mask along its pixels' edges, so that drawing them gives the mask back, its holes filled.

    Args:
        mask (`np.ndarray` of shape `(height, width)`): bool.

    Returns:
        `list[list[float]]`: COCO polygons `[x0, y0, x1, y1, ...]` in pixels, one per part, clockwise.
    """
    padded = np.pad(np.asarray(mask, dtype=bool), 1)
    inside = padded[1:-1, 1:-1]
    # Walking a part clockwise: the direction along each kind of edge, where it is open, the pixel corner it starts at.
    edges = (
        ((1, 0), inside & ~padded[:-2, 1:-1], (0, 0)),
        ((0, 1), inside & ~padded[1:-1, 2:], (1, 0)),
        ((-1, 0), inside & ~padded[2:, 1:-1], (1, 1)),
        ((0, -1), inside & ~padded[1:-1, :-2], (0, 1)),
    )
    leaving: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for step, is_open, (dx, dy) in edges:
        for y, x in np.argwhere(is_open).tolist():
            leaving.setdefault((x + dx, y + dy), []).append(step)
    polygons = []
    while leaving:
        start = corner = next(iter(leaving))
        step, ring, area = None, [], 0
        while True:
            steps = leaving.get(corner, [])
            right_turn = step and (-step[1], step[0])  # where parts touch at a corner, this one is followed
            if corner == start and step and right_turn not in steps:
                break
            following = right_turn if right_turn in steps else steps[0]
            steps.remove(following)
            if not steps:
                del leaving[corner]
            if following != step:
                ring += map(float, corner)
            step = following
            area += corner[0] * step[1] - corner[1] * step[0]
            corner = (corner[0] + step[0], corner[1] + step[1])
        if area > 0:  # holes are walked the other way round
            polygons.append(ring)
    return polygons
