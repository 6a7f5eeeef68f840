"""Expressions about a scene that are true of exactly the objects they are made for.

An expression is proposed, its referents are computed over all objects, and it is dropped if anything about it is
unclear: the visible boxes of two objects told apart by position differ in their centres by `POSITION_MARGIN` of the
image's side, and neither edge says otherwise; by size they differ in side and visible area by `SIZE_RATIO`; by
distance of the centres, by both.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random

from perceptiongpt.data.scenes.pictures import DOT, HELD_OUT, LEAST_HIDDEN, Scene, SceneObject


KINDS = ("attribute", "position", "ordinal", "relation", "size", "superlative", "negation", "none")
TEST_KINDS = ("reasoning",)  # never in training
POSITION_MARGIN, SIZE_RATIO = 0.03, 1.25
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
    "closest": "closest to",
    "farthest": "farthest from",
    "behind": "partly hidden by",
    "front": "partly covering",
}
# Per end of the image: the word for what is nearest to it, the first of a box's two edges on that axis, and the sign.
ENDS = {"left": ("leftmost", 0, 1), "right": ("rightmost", 0, -1), "top": ("topmost", 1, 1)}
ENDS["bottom"] = ("bottommost", 1, -1)
IRREGULAR = {"person": "people", "mouse": "mice", "knife": "knives", "wine glass": "wine glasses", "sheep": "sheep"}
IRREGULAR |= {name: name for name in ("scissors", "skis", "broccoli")}
ONE_OF = {"scissors": "a pair of scissors", "skis": "a pair of skis", "broccoli": "some broccoli"}
# What the expressions of kind `reasoning` call for: of drawn shapes, of their colours, and of COCO's categories.
SHAPE_RIDDLES = {
    "one that would roll away": ("circle", "ring", DOT),
    "one without any corners": ("circle", "ring", DOT),
    "one that would fit on a finger": ("ring",),
    "one with three sides": ("triangle",),
    "one that twinkles at night": ("star",),
    "one that stands for love": ("heart",),
    "one that marks a hospital": ("cross",),
    "one shaped like a bee's cell": ("hexagon",),
    "one that shows the way": ("arrow",),
    "one that falls when it rains": ("drop",),
    "one that looks like the young moon": ("crescent",),
}
COLOR_RIDDLES = {
    "one as white as snow": "white",
    "one that has the color of grass": "green",
    "one that has the color of a ripe tomato": "red",
    "one that has the color of a lemon": "yellow",
    "one as black as coal": "black",
    "one that has the color of chocolate": "brown",
    "one that has the color of a carrot": "orange",
}
CATEGORY_RIDDLES = {
    "one that can bark": ("dog",),
    "one that purrs": ("cat",),
    "one that says moo": ("cow",),
    "one that gives wool": ("sheep",),
    "one with a very long neck": ("giraffe",),
    "one with a trunk": ("elephant",),
    "one with black and white stripes": ("zebra",),
    "one that tells the time": ("clock",),
    "one that can fly": ("bird", "airplane", "kite"),
    "one that could be peeled and eaten": ("banana", "orange"),
    "one that keeps off the rain": ("umbrella",),
    "one that a reader would pick up": ("book",),
    "one that moves on rails": ("train",),
}
ODD_ONE = "one that does not belong"


@dataclass(frozen=True)
class Expression:
    """`text` without its article, its `kind`, the numbers of its referents, and the class it names (None: any)."""

    text: str
    kind: str
    targets: tuple[int, ...]
    named: str | None


@dataclass(frozen=True)
class _Group:
    """Objects that fit a colour, a pattern and a shape (None: any), and what they are called."""

    text: str
    members: list[SceneObject]
    named: str | None


def find_expression(
    scene: Scene,
    kind: str,
    rng: Random,
    fits: Callable[[tuple[int, ...]], bool],
    tries: int = 24,
    held_out: bool = False,
) -> Expression | None:
    """An expression of a kind whose referents fit, or None if none was found in so many tries.

    Args:
        scene: the scene.
        kind: one of `KINDS` or `TEST_KINDS`.
        rng: where to draw from.
        fits: says of the referents' numbers whether they are welcome.
        tries: proposals.
        held_out: whether an expression of kind `none` asks for a held-out combination; otherwise it never does.
    """
    for _ in range(tries):
        found = _none(scene, rng, held_out) if kind == "none" else PROPOSE[kind](scene, rng)
        if found is not None and fits(found.targets):
            return found
    return None


def selected(scene: Scene, color: str | None, pattern: str | None, shape: str | None) -> list[SceneObject]:
    """The objects of a colour, pattern and shape; None stands for any."""
    return [
        one
        for one in scene.objects
        if (color is None or one.color == color)
        and (pattern is None or one.pattern == pattern)
        and (shape is None or one.shape == shape)
    ]


def noun_phrase(color: str | None, pattern: str | None, shape: str | None) -> str:
    """ "striped red circle"; an object of any shape is a "shape"."""
    return " ".join(word for word in (pattern, color, shape or "shape") if word)


def with_article(text: str) -> str:
    """ "an arrow"."""
    return ONE_OF.get(text) or f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def plural(text: str) -> str:
    """The plural of a noun phrase that ends with its noun."""
    for name, several in IRREGULAR.items():
        if text == name or text.endswith(" " + name):
            return text.removesuffix(name) + several
    if text.endswith(("s", "x", "ch", "sh")):
        return text + "es"
    return text[:-1] + "ies" if text.endswith("y") and text[-2] not in "aeiou" else text + "s"


def _expression(text: str, kind: str, targets: Iterable[SceneObject], named: str | None) -> Expression:
    return Expression(text, kind, tuple(one.index for one in targets), named)


def _group(scene: Scene, rng: Random, least: int) -> _Group | None:
    """A group of at least so many objects, named after one of them."""
    for _ in range(4):
        one, draw = rng.choice(scene.objects), rng.random()
        if scene.pasted or draw < 0.5:
            choice = (None, None, one.shape)
        elif draw < 0.7:
            choice = (one.color, None, one.shape)
        elif draw < 0.85:
            choice = (one.color, None, None)
        elif draw < 0.95 or one.pattern == "plain":
            choice = (None, None, None)
        else:
            choice = (None, one.pattern, one.shape)
        members = selected(scene, *choice)
        if len(members) >= least:
            return _Group(noun_phrase(*choice), members, choice[2])
    return None


def _attribute(scene: Scene, rng: Random) -> Expression:
    one = rng.choice(scene.objects)
    if scene.pasted:
        choice = (None, None, one.shape)
    else:
        parts = rng.choice(((1, 0, 1), (1, 0, 1), (1, 0, 1), (1, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 1, 0)))
        if one.pattern == "plain" and rng.random() < 0.7:
            parts = (parts[0], 0, parts[2] or not parts[0])
        choice = tuple(value if part else None for value, part in zip((one.color, one.pattern, one.shape), parts))
    return _expression(noun_phrase(*choice), "attribute", selected(scene, *choice), choice[2])


def _ahead(scene: Scene, one: SceneObject, other: SceneObject, end: str) -> bool | None:
    """Whether one object is nearer than another to an end of the image; None if that is unclear."""
    start, sign = ENDS[end][1:]
    gaps = [sign * (other.box[edge] - one.box[edge]) for edge in (start, start + 2)]
    if abs(sum(gaps)) / 2 < POSITION_MARGIN * scene.size or min(gaps) <= 0 <= max(gaps):
        return None
    return sum(gaps) > 0


def _ranked(scene: Scene, members: list[SceneObject], end: str, rank: int) -> SceneObject | None:
    """The one with so many others nearer to an end of the image, if it is clear."""
    start, sign = ENDS[end][1:]
    one = sorted(members, key=lambda other: sign * (other.box[start] + other.box[start + 2]))[rank]
    return None if None in [_ahead(scene, one, other, end) for other in members if other is not one] else one


def _nearest(scene: Scene, members: list[SceneObject], x: float, y: float, far: bool = False) -> SceneObject | None:
    """The nearest to a point (or the farthest), if it is clear."""
    order = sorted((math.hypot(one.x - x, one.y - y), one.index) for one in members)
    if far:
        order.reverse()
    (first, index), (second, _) = order[:2]
    near, distant = min(first, second), max(first, second)
    if distant - near < POSITION_MARGIN * scene.size or distant < SIZE_RATIO * near:
        return None
    return scene.objects[index]


def _position(scene: Scene, rng: Random) -> Expression | None:
    group = _group(scene, rng, 2)
    if group is None:
        return None
    if rng.random() < 0.25:
        corner = rng.choice((None, ("top", "left"), ("top", "right"), ("bottom", "left"), ("bottom", "right")))
        if corner is None:
            place, x, y = "center", scene.size / 2, scene.size / 2
        else:
            place, x, y = f"{' '.join(corner)} corner", scene.size * (corner[1] == "right"), 0
            y = scene.size * (corner[0] == "bottom")
        one, text = _nearest(scene, group.members, x, y), f"{group.text} closest to the {place}"
    else:
        end = rng.choice(tuple(ENDS))
        one = _ranked(scene, group.members, end, 0)
        far = end in ("left", "right") and rng.random() < 0.4
        text = f"{group.text} farthest to the {end}" if far else f"{ENDS[end][0]} {group.text}"
    return one and _expression(text, "position", [one], group.named)


def _ordinal(scene: Scene, rng: Random) -> Expression | None:
    group = _group(scene, rng, 3)
    if group is None:
        return None
    end = rng.choice(tuple(ENDS))
    rank = rng.randrange(1, min(len(group.members), len(ORDINALS)))
    one = _ranked(scene, group.members, end, rank)
    return one and _expression(f"{ORDINALS[rank]} {group.text} from the {end}", "ordinal", [one], group.named)


def _larger(one: SceneObject, other: SceneObject) -> bool | None:
    """Whether one object is larger than another; None if that is unclear."""
    for first, second, result in ((one, other, True), (other, one, False)):
        if first.side >= SIZE_RATIO * second.side and first.area >= SIZE_RATIO * second.area:
            return result
    return None


def _size(scene: Scene, rng: Random) -> Expression | None:
    group = _group(scene, rng, 2)
    if group is None:
        return None
    larger = rng.random() < 0.5
    word = "larger" if larger else "smaller"
    if len(group.members) == 2 and rng.random() < 0.7:
        truth = _larger(*group.members)
        one = group.members[0 if truth == larger else 1]
        return None if truth is None else _expression(f"{word} {group.text}", "size", [one], group.named)
    anchor = _anchor(scene, rng)
    if anchor is None:
        return None
    truths = [_larger(one, anchor[1]) for one in group.members if one is not anchor[1]]
    if None in truths or len(truths) < 2:
        return None
    others = [one for one in group.members if one is not anchor[1]]
    targets = [one for one, truth in zip(others, truths, strict=True) if truth == larger]
    return _expression(f"{group.text} {word} than the {anchor[0]}", "size", targets, group.named)


def _superlative(scene: Scene, rng: Random) -> Expression | None:
    group = _group(scene, rng, 2)
    if group is None:
        return None
    count = len(group.members)
    rank = 1 if count > 2 and rng.random() < 0.2 else 0
    largest = rng.random() < 0.5
    one = sorted(group.members, key=lambda one: -one.side if largest else one.side)[rank]
    truths = [_larger(one, other) for other in group.members if other is not one]
    if None in truths or truths.count(not largest) != rank:
        return None
    word = ("second " if rank else "") + ("largest" if largest else "smallest")
    return _expression(f"{word} {group.text}", "superlative", [one], group.named)


def _anchor(scene: Scene, rng: Random) -> tuple[str, SceneObject] | None:
    """An object and the words (without article) that tell it from all others."""
    for _ in range(5):
        found = _position(scene, rng) if rng.random() < 0.2 else _attribute(scene, rng)
        if found is not None and len(found.targets) == 1:
            return found.text, scene.objects[found.targets[0]]
    return None


def _holds(scene: Scene, relation: str, one: SceneObject, anchor: SceneObject) -> bool | None:
    """Whether an object stands in a relation to another; None if that is unclear."""
    if relation in ("behind", "front"):
        share = (one, anchor) if relation == "behind" else (anchor, one)
        share = share[0].covered.get(share[1].index, 0.0)
        return True if share >= LEAST_HIDDEN else None if share else False
    return _ahead(scene, one, anchor, {"above": "top", "below": "bottom"}.get(relation, relation))


def related(scene: Scene, relation: str, members: list[SceneObject], anchor: SceneObject) -> list[SceneObject] | None:
    """Those of `members` that stand in a relation to `anchor`; None if that is unclear of any."""
    members = [one for one in members if one is not anchor]
    if relation in ("closest", "farthest"):
        if len(members) < 2:
            return None
        one = _nearest(scene, members, anchor.x, anchor.y, relation == "farthest")
        return None if one is None else [one]
    truths = [_holds(scene, relation, one, anchor) for one in members]
    return None if None in truths else [one for one, truth in zip(members, truths, strict=True) if truth]


def _relation(scene: Scene, rng: Random, negate: bool = False) -> Expression | None:
    group, anchor = _group(scene, rng, 2), _anchor(scene, rng)
    if group is None or anchor is None or len(group.members) - (anchor[1] in group.members) < 2:
        return None
    relation = rng.choice(tuple(RELATIONS)[:4] if negate else tuple(RELATIONS))
    targets = related(scene, relation, group.members, anchor[1])
    if targets is None:
        return None
    if negate:
        if anchor[1] in group.members:
            return None
        targets = [one for one in group.members if one not in targets]
    text = f"{group.text} {'that is not ' if negate else ''}{RELATIONS[relation]} the {anchor[0]}"
    return _expression(text, "negation" if negate else "relation", targets, group.named)


def _negation(scene: Scene, rng: Random) -> Expression | None:
    form = rng.randrange(5)
    if scene.pasted or form == 4:
        return _relation(scene, rng, negate=True)
    one, other = rng.choice(scene.objects), rng.choice(scene.objects)
    if form == 0:
        group = selected(scene, None, None, one.shape)
        text, targets = f"{one.shape} that is not {other.color}", [o for o in group if o.color != other.color]
    elif form == 1:
        group = selected(scene, one.color, None, None)
        text = f"{one.color} shape that is not {with_article(other.shape)}"
        targets = [o for o in group if o.shape != other.shape]
    elif form == 2:
        if other.pattern == "plain":
            return None
        group = selected(scene, None, None, one.shape)
        text, targets = f"{one.shape} that is not {other.pattern}", [o for o in group if o.pattern != other.pattern]
    else:
        first, second = rng.choice(scene.objects).color, other.color
        if first == second:
            return None
        group = selected(scene, None, None, one.shape)
        text = f"{one.shape} that is neither {first} nor {second}"
        targets = [o for o in group if o.color not in (first, second)]
    if len(targets) == len(group):
        return None  # nothing is excluded
    return _expression(text, "negation", targets, None if form == 1 else one.shape)


def _none(scene: Scene, rng: Random, held_out: bool) -> Expression | None:
    draw = rng.random()
    if scene.pasted:
        if draw < 0.6 and scene.absent:
            name = rng.choice(scene.absent)
            return _expression(name, "none", [], name)
    elif held_out:
        color, shape = rng.choice(sorted(HELD_OUT))
        present = selected(scene, color, None, None) and selected(scene, None, None, shape)
        found = selected(scene, color, None, shape)
        return _expression(noun_phrase(color, None, shape), "none", found, shape) if present else None
    elif draw < 0.6:
        one, other, third = (rng.choice(scene.objects) for _ in range(3))
        pattern = third.pattern if third.pattern != "plain" and rng.random() < 0.4 else None
        choice = (one.color, pattern, other.shape)
        if choice[::2] in HELD_OUT:
            return None
        return _expression(noun_phrase(*choice), "none", selected(scene, *choice), other.shape)
    elif draw < 0.7 and scene.absent:
        color, shape = rng.choice(scene.objects).color, rng.choice(scene.absent)
        if (color, shape) in HELD_OUT:
            return None
        return _expression(noun_phrase(color, None, shape), "none", [], shape)
    elif draw < 0.8:
        group = _group(scene, rng, 2)
        if group is None or len(group.members) >= len(ORDINALS):
            return None
        text = f"{ORDINALS[len(group.members)]} {group.text} from the {rng.choice(tuple(ENDS))}"
        return _expression(text, "none", [], group.named)
    found = _relation(scene, rng)
    return found and Expression(found.text, "none", found.targets, found.named)


def odd_ones(scene: Scene) -> set[int]:
    """The objects that lack a colour, shape or pattern that all others share."""
    found = set()
    for name in ("shape", "color", "pattern"):
        values = [getattr(one, name) for one in scene.objects]
        for value in set(values):
            if value is not None and values.count(value) == len(values) - 1 >= 3:
                found.add(next(one.index for one in scene.objects if getattr(one, name) != value))
    return found


def _reasoning(scene: Scene, rng: Random) -> Expression | None:
    if scene.pasted:
        text, names = rng.choice(tuple(CATEGORY_RIDDLES.items()))
        if scene.behind.intersection(names):
            return None
        return _expression(text, "reasoning", [one for one in scene.objects if one.shape in names], None)
    odd = odd_ones(scene)
    if len(odd) == 1 and rng.random() < 0.7:
        return Expression(ODD_ONE, "reasoning", tuple(odd), None)
    if rng.random() < 0.65:
        text, names = rng.choice(tuple(SHAPE_RIDDLES.items()))
        return _expression(text, "reasoning", [one for one in scene.objects if one.shape in names], None)
    text, color = rng.choice(tuple(COLOR_RIDDLES.items()))
    return _expression(text, "reasoning", [one for one in scene.objects if one.color == color], None)


PROPOSE = {
    "attribute": _attribute,
    "position": _position,
    "ordinal": _ordinal,
    "relation": _relation,
    "size": _size,
    "superlative": _superlative,
    "negation": _negation,
    "reasoning": _reasoning,
}
