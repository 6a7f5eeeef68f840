"""Images of scenes, drawn or pasted together from photos, with exact boxes and masks of the visible parts.

A scene depends only on its key and the arguments. Objects are placed back to front on a map of which object each pixel
belongs to. An object's mask is its visible part, its box the tight box of that part. Drawn objects have a shape, a
colour and a pattern; pasted ones are real objects cut out along their COCO masks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from perceptiongpt.data.scenes.photos import Cutouts, Photos
from perceptiongpt.geometry_perceptiongpt import deepest_pixel, encode_rle, mask_depth, tight_box


COLORS = {
    "red": (215, 35, 35),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "yellow": (240, 215, 40),
    "orange": (240, 135, 25),
    "purple": (130, 50, 170),
    "pink": (250, 150, 190),
    "cyan": (60, 205, 215),
    "brown": (120, 72, 35),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "gray": (128, 128, 128),
}
PATTERNS = ("plain", "striped", "checkered", "dotted")
DOT = "dot"  # the name of a shape that is too small for its form to be seen
LEAST_SHAPE_SIDE, LEAST_PATTERN_SIDE = 10.0, 16.0  # pixels from which a shape, and a pattern, can be seen
LEAST_VISIBLE = 0.45  # share of every object that stays visible
LEAST_HIDDEN = 0.06  # from this share on an object counts as partly hidden
REFERENCE_SIZE = 128  # sides of a `Layout` are pixels of an image of this size
SUPERSAMPLING = 4  # shapes are drawn this much larger, then reduced
POOL_SCENES = 256  # consecutive scenes that share `POOL_PHOTOS` photos
LEAST_CUTOUT_PIXELS = 24  # of a pasted object
LAYOUT_TRIES = 500  # until a scene counts as impossible
DIGITS, LETTERS = "0123456789", "ACEFHJKLMNPRTUVWXY"  # none that looks like another
LEAST_GLYPH_SIDE = 5  # pixels of the smallest digit or letter that is written on an object
GLYPH_SHARE = 1.3  # height of a glyph as a share of how deep the object is where it stands


def _arc(start: float, stop: float, points: int, radius: float = 1.0, x: float = 0.0, y: float = 0.0) -> list:
    return [(x + radius * math.cos(t), y + radius * math.sin(t)) for t in np.linspace(start, stop, points)]


def _regular(corners: int, inner: float | None = None) -> list:
    points = corners if inner is None else 2 * corners
    radii = [1.0 if inner is None or i % 2 == 0 else inner for i in range(points)]
    angles = [-math.pi / 2 + 2 * math.pi * i / points for i in range(points)]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, angles, strict=True)]


_HEART = [
    (16 * math.sin(t) ** 3, 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) - 13 * math.cos(t))
    for t in np.linspace(0, 2 * math.pi, 40)
]
# Per shape: its outline (y points down), the largest turn in radians, the largest stretch, and the share of a hole.
SHAPES = {
    "circle": (_arc(0, 2 * math.pi, 48), 0.0, 0.0, 0.0),
    "square": ([(-1, -1), (1, -1), (1, 1), (-1, 1)], 0.2, 0.0, 0.0),
    "triangle": (_regular(3), 0.4, 0.1, 0.0),
    "star": (_regular(5, 0.42), 3.1, 0.0, 0.0),
    "diamond": ([(0, -1), (0.66, 0), (0, 1), (-0.66, 0)], 0.15, 0.05, 0.0),
    "cross": (
        [(x * 0.33 if i in (0, 2) else x, y * 0.33 if i in (1, 2) else y) for x, y, i in (
            (-1, -1, 0), (1, -1, 0), (1, -1, 2), (1, -1, 1), (1, 1, 1), (1, 1, 2),
            (1, 1, 0), (-1, 1, 0), (-1, 1, 2), (-1, 1, 1), (-1, -1, 1), (-1, -1, 2),
        )],
        0.3,
        0.0,
        0.0,
    ),
    "ring": (_arc(0, 2 * math.pi, 48), 0.0, 0.0, 0.55),
    "heart": (_HEART, 0.35, 0.1, 0.0),
    "hexagon": (_regular(6), 3.1, 0.0, 0.0),
    "crescent": (_arc(0.65, 5.63, 32) + _arc(5.25, 1.03, 24, 0.78, 0.42), 1.2, 0.0, 0.0),
    "arrow": ([(-1, -0.24), (0.1, -0.24), (0.1, -0.7), (1, 0), (0.1, 0.7), (0.1, 0.24), (-1, 0.24)], 3.1, 0.0, 0.0),
    "drop": ([(0, -1.15)] + _arc(-0.45, math.pi + 0.45, 32, 0.68, 0, 0.32), 0.5, 0.0, 0.0),
}  # fmt: skip
# One colour a shape that training never shows; the split of held-out combinations asks for these.
HELD_OUT = frozenset((list(COLORS)[(5 * i + 3) % len(COLORS)], shape) for i, shape in enumerate(SHAPES))


@dataclass(frozen=True)
class Layout:
    """What the scenes of a split look like.

    Args:
        counts: least and most objects.
        sides: least and most longer side of an object as a whole, in pixels of an image of 128 x 128; log-uniform.
        hidden: at least this share of the objects is partly hidden; None: a share drawn from 0 to 0.5 is tried.
        held_out: whether combinations of `HELD_OUT` occur (one at least); otherwise they never do.
        odd: share of the scenes in which all objects but one have something in common.
    """

    counts: tuple[int, int] = (2, 12)
    sides: tuple[float, float] = (4.0, 56.0)
    hidden: float | None = None
    held_out: bool = False
    odd: float = 0.0


@dataclass(eq=False)
class SceneObject:
    """One object: `shape` (or category), `color` and `pattern` (None if pasted), `side` (longer side as a whole, as it
    was drawn, pixels), `window` (x, y, bool array: the whole object's place and form), `area` and `box` (xyxy) of what
    is visible, its centre `x`, `y`, `hidden` (share of the whole that others cover), `covered` (that share per object),
    `glyph` (the digit or letter on it, or None)
    """

    index: int
    shape: str
    color: str | None
    pattern: str | None
    side: float
    window: tuple
    area: int = 0
    box: list[float] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    hidden: float = 0.0
    covered: dict[int, float] = field(default_factory=dict)
    mask: dict | None = None
    glyph: str | None = None


@dataclass(eq=False)
class Scene:
    """An image (uint8, (size, size, 3)), its objects, and the kind of its background.

    `absent`: names that may be said to be absent (shapes, or categories that the photo behind does not hold either).
    `behind`: categories that the photo behind holds, which are not annotated.
    """

    size: int
    image: np.ndarray
    objects: list[SceneObject]
    background: str
    absent: list[str]
    pasted: bool = False
    behind: frozenset[str] = frozenset()


def draw_scene(
    key: str,
    *,
    size: int = REFERENCE_SIZE,
    layout: Layout = Layout(),
    plain: bool | None = None,
    sides: Sequence[float] | None = None,
    photos: Photos | None = None,
    paste: Cutouts | None = None,
    pool: str = "",
    glyphs: bool = False,
) -> Scene:
    """Draw the scene of a key.

    Args:
        key: the scene's random numbers depend on this string (and the arguments) alone.
        size: side of the image in pixels.
        layout: what it looks like.
        plain: whether its background is plain or a gradient, or else textured or a photo; None: drawn.
        sides: the objects' longer sides in pixels; None: drawn from the layout.
        photos: photos for some of the backgrounds.
        paste: real objects; none are drawn then.
        pool: scenes with the same string use the same few photos, so that they are read once.
        glyphs: whether each drawn object that is large enough has a digit or a letter on it. All else is as without.

    Raises:
        ValueError: a photo or cut-out that cannot be used, or objects that cannot be placed.
    """
    rng = Random(key)
    noise = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
    objects, tries = [], 0
    while len(objects) < 2 or (sides is not None and len(objects) < len(sides)):
        if tries == LAYOUT_TRIES:
            raise ValueError(f"scenes: {tries} tries placed no two of the objects; are they too thin, or without area?")
        wanted = draw_sides(rng, size, layout) if sides is None or tries >= 20 else list(sides)
        tries += 1
        if paste is not None:
            kinds, patches, ground = _pasted(rng, Random(pool), paste, wanted)
        else:
            kinds = _choose_attributes(rng, wanted, layout)
            patches, ground = [_drawn(rng, noise, *kind, side) for kind, side in zip(kinds, wanted, strict=True)], None
        masks = [alpha >= 128 for _, alpha in patches]
        strict = layout.hidden is not None
        hidden = layout.hidden if strict else rng.random() * 0.5
        placed = _place(rng, masks, wanted, size, math.ceil(hidden * len(masks)), strict)
        if placed is None:
            continue
        owner, places = placed
        if sides is not None and tries >= 20:
            sides = wanted
        kept = [i for i, place in enumerate(places) if place is not None]
        objects = []
        for new, i in enumerate(kept):
            window = (*places[i][:2], masks[i])
            objects.append(SceneObject(new, *kinds[i], float(wanted[i]), window))
    if plain is None:
        plain = rng.random() < 0.5
    if ground is not None:
        background, image = "photo", Photos.background(ground, size, rng)
    else:
        background, image = _background(rng, noise, size, plain, objects, photos, Random(pool))
    if glyphs:
        written = Random(f"{key}/glyphs")
        for one, i in zip(objects, kept, strict=True):
            one.glyph = _write_glyph(written, *patches[i])
    renumber = np.full(len(masks) + 1, -1, dtype=np.int8)
    renumber[kept] = np.arange(len(kept))
    for i in sorted(kept, key=lambda i: places[i][2]):
        (x, y, _), (patch, alpha) = places[i], patches[i]
        below = image[y : y + alpha.shape[0], x : x + alpha.shape[1]]
        share = alpha[..., None] * np.float32(1 / 255)
        if ground is not None:  # a part of the light of the place
            patch = patch + 0.25 * (below.mean() - patch.mean())
        below[...] = np.clip(below + (patch - below) * share, 0, 255)
    if rng.random() < 0.2:
        grain = noise.integers(0, 24, image.shape, dtype=np.uint8)
        image = np.where(image < 232, image + grain, image)
    _annotate(objects, renumber[owner])
    behind = frozenset(paste.names[ground]) if ground is not None else frozenset()
    present = {one.shape for one in objects} | behind
    absent = [name for name in (SHAPES if paste is None else paste.categories) if name not in present]
    return Scene(size, image, objects, background, absent, paste is not None, behind)


def draw_sides(rng: Random, size: int, layout: Layout) -> list[float]:
    """The longer sides of a scene's objects: their number uniform, each log-uniform from `layout.sides` on."""
    low, high = (side * size / REFERENCE_SIZE for side in layout.sides)
    if low < LEAST_SHAPE_SIDE < high and rng.random() < 0.5:
        low = LEAST_SHAPE_SIDE  # half of the scenes have no dots
    return [low * (high / low) ** rng.random() for _ in range(rng.randint(*layout.counts))]


def _choose_attributes(rng: Random, sides: list[float], layout: Layout) -> list[tuple[str, str, str]]:
    """(shape, colour, pattern) per object, of few of each, so that it takes more than one word to tell them apart."""
    shapes = rng.sample(list(SHAPES), rng.choice((1, 2, 2, 3, 3, 4)))
    colors = rng.sample(list(COLORS), rng.choice((1, 2, 2, 3, 3, 4)))
    patterns = ["plain"] if rng.random() < 0.4 else ["plain", *rng.sample(PATTERNS[1:], rng.choice((1, 1, 2)))]
    held = [pair for pair in HELD_OUT if pair[1] == shapes[0]]
    if layout.held_out:
        colors = list(dict.fromkeys([held[0][0], *colors]))
    pairs = [(c, s) for c in colors for s in shapes if layout.held_out or (c, s) not in HELD_OUT]
    while not pairs:
        pairs = [pair for pair in [(rng.choice(list(COLORS)), shapes[0])] if pair not in HELD_OUT]
    result = []
    for side in sides:
        color, shape = rng.choice(pairs)
        pattern = rng.choice(patterns) if side >= LEAST_PATTERN_SIDE else "plain"
        result.append((shape if side >= LEAST_SHAPE_SIDE else DOT, color, pattern))
    if layout.held_out:
        large = [i for i, kind in enumerate(result) if kind[0] != DOT]
        for i in rng.sample(large, min(len(large), max(1, len(large) // 3))):
            result[i] = (shapes[0], held[0][0], result[i][2])
    elif rng.random() < layout.odd:
        _make_odd(rng, result)
    return result


def _make_odd(rng: Random, kinds: list[tuple[str, str, str]]) -> None:
    """Give all objects but one the same shape or colour."""
    different, part = rng.randrange(len(kinds)), rng.randrange(2)
    common = kinds[different - 1][part]
    for i, kind in enumerate(kinds):
        if i != different and DOT not in (kind[0], common):
            changed = (common, *kind[1:]) if part == 0 else (kind[0], common, kind[2])
            kinds[i] = changed if changed[1::-1] not in HELD_OUT else kind


def _drawn(rng: Random, noise, shape: str, color: str, pattern: str, side: float) -> tuple[np.ndarray, np.ndarray]:
    """A drawn object as float32 (h, w, 3) and uint8 alpha (h, w), its longer side `side` pixels."""
    shape = "circle" if shape == DOT else shape
    _, turn, stretch, hole = SHAPES[shape]
    turn, stretch = rng.uniform(-turn, turn), 1 + rng.uniform(-stretch, stretch)
    cos, sin = math.cos(turn), math.sin(turn)
    xs, ys = _outline(shape)
    xs, ys = (stretch * cos) * xs - sin * ys, (stretch * sin) * xs + cos * ys
    x0, x1, y0, y1 = float(xs.min()), float(xs.max()), float(ys.min()), float(ys.max())
    scale = side / max(x1 - x0, y1 - y0)
    width, height = math.ceil((x1 - x0) * scale), math.ceil((y1 - y0) * scale)
    middle_x, middle_y = (extent * SUPERSAMPLING / 2 - 0.5 for extent in (width, height))
    scale *= SUPERSAMPLING
    points = np.stack([(xs - (x0 + x1) / 2) * scale, (ys - (y0 + y1) / 2) * scale], axis=1)
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    draw = ImageDraw.Draw(canvas)
    draw.polygon((points + (middle_x, middle_y)).ravel().tolist(), fill=255)
    if hole:
        draw.polygon((points * hole + (middle_x, middle_y)).ravel().tolist(), fill=0)
    alpha = np.asarray(canvas.reduce(SUPERSAMPLING))

    values = [min(max(value + rng.uniform(-16, 16), 0.0), 255.0) for value in COLORS[color]]
    light, base = sum(values) > 330, np.array(values, dtype=np.float32)
    x, y = np.arange(width, dtype=np.float32)[None], np.arange(height, dtype=np.float32)[:, None]
    patch = np.empty((height, width, 3), dtype=np.float32)
    patch[:] = base
    if pattern != "plain":
        second = base * 0.45 if light else base + (255 - base) * 0.5
        patch[_pattern(rng, pattern, side, x, y)] = second
    angle, depth = rng.uniform(0, 6.3), rng.uniform(0, 0.22)
    shade = 1 + depth * (math.cos(angle) * (x / width - 0.5) + math.sin(angle) * (y / height - 0.5))
    patch *= shade[..., None]
    if rng.random() < 0.25:
        patch += (noise.integers(0, 32, (height, width, 1), dtype=np.uint8) - np.float32(16)) * rng.random()
    if side >= LEAST_SHAPE_SIDE:
        inner = np.zeros_like(alpha)
        inner[1:-1, 1:-1] = alpha[1:-1, 1:-1]
        for across, shifted in ((inner[1:], alpha[:-1]), (inner[:-1], alpha[1:]), (inner[:, 1:], alpha[:, :-1])):
            np.minimum(across, shifted, out=across)
        np.minimum(inner[:, :-1], alpha[:, 1:], out=inner[:, :-1])
        strength = rng.uniform(0.5, 1.0) * min(side / 40, 1.0)  # a thin shape is nearly all edge
        edge = (alpha - inner) * np.float32(strength / 255)
        line = base * 0.3 if light else base + (255 - base) * 0.55
        patch += (line - patch) * edge[..., None]
    return patch, alpha


def _write_glyph(rng: Random, patch: np.ndarray, alpha: np.ndarray) -> str | None:
    """Write a digit or a letter on an object, in place, where it is deepest; None if it is too small for one."""
    glyph, inside = rng.choice(DIGITS if rng.random() < 0.5 else LETTERS), alpha >= 128
    depth = float(mask_depth(inside).max())
    height = GLYPH_SHARE * depth
    if height < LEAST_GLYPH_SIDE:
        return None
    font = ImageFont.load_default(round(4 * height))
    left, top, right, bottom = font.getbbox(glyph)
    large = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(large).text((-left, -top), glyph, fill=255, font=font)
    size = tuple(max(1, round(height * side / max(large.size))) for side in large.size)
    ink = np.asarray(large.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255
    x, y = (
        min(max(round(middle - side / 2), 0), room - side)
        for middle, side, room in zip(deepest_pixel(inside), size, alpha.shape[::-1], strict=True)
    )
    place = slice(y, y + size[1]), slice(x, x + size[0])
    below = patch[place]
    below += (np.float32(20 if below.mean() > 120 else 240) - below) * (ink * inside[place])[..., None]
    return glyph


@lru_cache
def _outline(shape: str) -> np.ndarray:
    return np.array(SHAPES[shape][0], dtype=np.float64).T.copy()


def _pattern(rng: Random, pattern: str, side: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the second colour goes, bool (h, w)."""
    if pattern == "striped":
        angle, period = rng.uniform(0, math.pi), max(4.0, side / rng.uniform(3, 5))
        return (x * math.cos(angle) + y * math.sin(angle)) % period < period / 2
    if pattern == "checkered":
        step = max(3, round(side / rng.uniform(4, 6)))
        return (x // step + y // step) % 2 == 0
    step = max(5.0, side / rng.uniform(3, 5))
    return (x % step - step / 2) ** 2 + (y % step - step / 2) ** 2 < (0.33 * step) ** 2


def _pasted(rng: Random, pool: Random, paste: Cutouts, sides: list[float]) -> tuple[list, list, Path | None]:
    """(category, None, None) and the cut-out object per side, and the photo behind them; changes `sides` in place."""
    chosen, ground = paste.choose(rng, pool, len(sides))
    kinds, patches, kept = [], [], []
    for (category, photo, number), side in zip(chosen, sides, strict=True):
        cut = paste.cut(photo, number, side, rng)
        if cut is not None and (cut[1] >= 128).sum() >= LEAST_CUTOUT_PIXELS:
            kinds.append((category, None, None))
            patches.append(cut)
            kept.append(side)
    sides[:] = kept
    return kinds, patches, ground


def _place(rng: Random, masks: list[np.ndarray], sides: list[float], size: int, hidden: int, strict: bool):
    """Place objects back to front, so that `hidden` of them are partly hidden and all stay visible enough.

    Returns:
        The number of the object at each pixel, int8 (size, size), -1 for none, and (x, y, rank) or None per object;
        None if it did not work out. Unless `strict`, objects may be left out and fewer hidden.
    """
    count = len(masks)
    areas = np.array([mask.sum() for mask in masks], dtype=np.int64)
    least = np.array([0.85 if side < LEAST_SHAPE_SIDE else LEAST_VISIBLE for side in sides]) * areas
    order = sorted(range(count), key=lambda i: -sides[i] * rng.uniform(0.6, 1.7))
    owner = np.full((size, size), -1, dtype=np.int8)
    visible, places, whole = areas.copy(), [None] * count, []
    done = 0
    for rank, i in enumerate(order):
        mask = masks[i]
        height, width = mask.shape
        if height > size or width > size:
            return None
        for attempt in range(14):
            aim = rng.choice(whole) if done < hidden and whole and attempt < 10 else None
            if aim is None:
                x, y = rng.randint(0, size - width), rng.randint(0, size - height)
            else:
                angle, reach = rng.uniform(0, 6.3), rng.uniform(0.25, 0.7) * (sides[i] + sides[aim]) / 2
                x = places[aim][0] + (masks[aim].shape[1] - width) / 2 + reach * math.cos(angle)
                y = places[aim][1] + (masks[aim].shape[0] - height) / 2 + reach * math.sin(angle)
                x, y = min(max(round(x), 0), size - width), min(max(round(y), 0), size - height)
            covered = np.bincount(owner[y : y + height, x : x + width][mask] + 1, minlength=count + 1)[1:]
            if aim is not None and covered[aim] < 1.3 * LEAST_HIDDEN * areas[aim]:
                continue
            if not covered.any() or ((visible - covered >= least) | (covered == 0)).all():
                break
        else:
            if strict:
                return None
            continue
        owner[y : y + height, x : x + width][mask] = i
        places[i] = (x, y, rank)
        if covered.any():
            visible -= covered
            newly = [j for j in whole if visible[j] <= (1 - LEAST_HIDDEN) * areas[j]]
            done += len(newly)
            whole = [j for j in whole if j not in newly]
        if sides[i] >= LEAST_SHAPE_SIDE:
            whole.append(i)
    return None if strict and done < hidden else (owner, places)


def _annotate(objects: list[SceneObject], owner: np.ndarray) -> None:
    """Fill in what is visible of each object, from the map of which object a pixel belongs to."""
    numbers = np.arange(len(objects), dtype=np.int8)
    visible = np.ascontiguousarray(owner.T)[None] == numbers[:, None, None]  # (objects, x, y)
    areas = visible.sum((1, 2)).tolist()
    for one, mask, area in zip(objects, visible.transpose(0, 2, 1), areas, strict=True):
        one.mask, one.box, one.area = encode_rle(mask), tight_box(mask), area
        x0, y0, x1, y1 = one.box
        one.x, one.y = x0 + (x1 - x0) / 2, y0 + (y1 - y0) / 2
        left, top, whole = one.window
        total = int(whole.sum())
        one.hidden = 1 - area / total
        if area < total:
            over = np.bincount(
                owner[top : top + whole.shape[0], left : left + whole.shape[1]][whole], minlength=len(objects)
            )
            one.covered = {i: over[i] / total for i in np.flatnonzero(over).tolist() if i != one.index}


def _background(rng: Random, noise, size: int, plain: bool, objects, photos: Photos | None, pool: Random):
    """(kind, uint8 (size, size, 3)): colours keep away from those of the objects."""
    taken = np.array([COLORS[one.color] for one in objects if one.color] or [(0, 0, 0)], dtype=np.float32)
    options = noise.integers(0, 256, (24, 3)).astype(np.float32)
    distance = np.linalg.norm(options[:, None] - taken[None], axis=2).min(1)
    first, second = options[np.argsort(-distance, kind="stable")[[rng.randrange(4), 4 + rng.randrange(3)]]]
    if not plain and photos is not None and rng.random() < 0.6:
        return "photo", photos.background(photos.choose(rng, pool), size, rng)
    x, y = np.linspace(-1, 1, size, dtype=np.float32)[None], np.linspace(-1, 1, size, dtype=np.float32)[:, None]
    kind = rng.choice(("plain", "gradient") if plain else ("noise", "texture", "texture"))
    if kind == "plain":
        image = np.empty((size, size, 3), dtype=np.uint8)
        image[:] = first.astype(np.uint8)
    elif kind == "gradient":
        angle = rng.uniform(0, 6.3)
        if rng.random() < 0.3:
            share = np.minimum((x - rng.uniform(-1, 1)) ** 2 + (y - rng.uniform(-1, 1)) ** 2, 2) / 2
        else:
            share = (x * math.cos(angle) + y * math.sin(angle)) * 0.35 + 0.5
        image = (first + (second - first) * share[..., None]).astype(np.uint8)
    elif kind == "noise":
        spread = rng.choice((24, 48, 72))
        grain = noise.integers(0, spread, (size, size, rng.choice((1, 3))), dtype=np.uint8)
        image = (np.minimum(first, 255 - spread).astype(np.uint8) + grain).astype(np.uint8)
    else:
        share = _texture(rng, noise, size, x, y) * rng.uniform(0.4, 1.0)
        image = (first + (second - first) * share[..., None]).astype(np.uint8)
        if rng.random() < 0.5:
            image = (image >> 3) * 7 + noise.integers(0, 31, (size, size, 1), dtype=np.uint8)
    if rng.random() < 0.4:
        image = _clutter(rng, image, first, second)
    return kind, np.array(np.broadcast_to(image, (size, size, 3)))


def _texture(rng: Random, noise, size: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A random field in 0..1, (size, size): clouds, stripes, tiles or waves."""
    style = rng.randrange(4)
    if style == 0:
        coarse = noise.integers(0, 256, (rng.choice((4, 8, 16, 32)),) * 2, dtype=np.uint8)
        cloud = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(cloud, dtype=np.float32) / 255
    angle, waves = rng.uniform(0, 3.2), rng.uniform(4, 14)
    across = x * math.cos(angle) + y * math.sin(angle)
    if style == 1:
        return (across * waves % 2 < 1).astype(np.float32)
    if style == 2:
        along = y * math.cos(angle) - x * math.sin(angle)
        return ((across * waves // 1 + along * waves // 1) % 2).astype(np.float32)
    return 0.5 + 0.5 * np.sin(across * waves * 2 + rng.uniform(1, 3) * np.sin(3 * y))


def _clutter(rng: Random, image: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Thin strokes in shades of the background: things that are not objects."""
    size = image.shape[0]
    canvas = Image.fromarray(np.broadcast_to(image, (size, size, 3)))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(3, 16)):
        shade = np.clip(first + (second - first) * rng.random() + rng.uniform(-50, 50), 0, 255)
        x, y, angle, length = (
            rng.random() * size,
            rng.random() * size,
            rng.uniform(0, 6.3),
            rng.uniform(0.03, 0.3) * size,
        )
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        draw.line([(x, y), end], fill=tuple(shade.astype(int).tolist()), width=rng.choice((1, 1, 2)))
    return np.array(canvas)
