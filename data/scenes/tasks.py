"""Questions about a scene: one function per task, worded here or by the templates.

A task's function takes the scene, a random generator, the generator of the prompts (None: the fixed ones), the kinds of
expressions that `refer` and `dialogue` may use, and in which of the forms `GIVEN_BY` a prompt may give an object. It
returns a question, or None where the scene allows none.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

import numpy as np

from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.data.scenes.expressions import (
    KINDS,
    RELATIONS,
    TEST_KINDS,
    Expression,
    find_expression,
    noun_phrase,
    plural,
    related,
    selected,
    with_article,
)
from perceptiongpt.data.scenes.pictures import DOT, LEAST_HIDDEN, LEAST_PATTERN_SIDE, Scene, SceneObject
from perceptiongpt.data.templates import render_prompt, render_turn
from perceptiongpt.geometry_perceptiongpt import decode_mask, deepest_pixel, interior_point


# How often `refer` draws each kind of expression, and `detect` each of those that can mean several objects.
KIND_WEIGHTS = dict(zip(KINDS, (25, 15, 10, 20, 6, 9, 5, 10), strict=True)) | dict.fromkeys(TEST_KINDS, 10)
DETECT_KINDS = {"attribute": 6, "relation": 2, "negation": 1, "size": 1}
RELATION = re.compile("|".join((*RELATIONS.values(), "larger than", "smaller than")))
NUMBERS = "none one two three four five six seven eight nine ten eleven twelve".split()
GIVEN_BY = ("box", "mask", "both", "point")  # how the prompt of a region task may give its object
SCENE_TRIES = 200  # scenes that are drawn in search of one that a question can be asked about


@dataclass
class Question:
    """One row in the making: its turns (user, assistant), its slots (box, mask, point; each may be None), and, where it
    has them, the kind of its expression, its one target, and the expression."""

    task: str
    turns: list[tuple[str, str]]
    slots: list[tuple]
    kind: str | None = None
    target: SceneObject | None = None
    expression: Expression | None = None

    def details(self, scene: Scene) -> dict:
        """An entry of `ScenesDataset.details`."""
        return {
            "kind": self.kind,
            "side": self.target and self.target.side,
            "text": self.expression and self.expression.text,
            "targets": self.expression and self.expression.targets,
            "named": self.expression and self.expression.named,
            "scene": scene,
        }


def _slots(objects: Iterable[SceneObject], with_points: bool = False) -> list[tuple]:
    return [(one.box, one.mask, deepest_pixel(_visible(one)) if with_points else None) for one in objects]


def _visible(one: SceneObject) -> np.ndarray:
    """What can be seen of an object, as a bool array of the image's size."""
    return decode_mask(one.mask, *one.mask["size"])


def _click(one: SceneObject, rng: Random) -> list[float]:
    return interior_point(_visible(one), np.random.Generator(np.random.PCG64(rng.getrandbits(64))))


def _in_order(objects: Iterable[SceneObject]) -> list[SceneObject]:
    return sorted(objects, key=lambda one: one.box)  # x0, then y0; ties by the rest


def _grounded(text: str, objects: Iterable[SceneObject]) -> str:
    return f"<p>{text}</p>{VIS_TOKEN * len(list(objects))}"


def _describe(one: SceneObject) -> str:
    return noun_phrase(one.color, None if one.pattern == "plain" else one.pattern, one.shape)


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _sentence(text: str) -> str:
    start = text.startswith("<p>") * 3
    return f"{text[:start]}{text[start].upper()}{text[start + 1 :]}."


def refer_question(scene: Scene, found: Expression, generator) -> Question:
    """The question that asks for the one referent of an expression, or for one that has none."""
    prompt = render_prompt("refer", f"the {found.text}", generator)
    if not found.targets:
        return Question("no_target", [(prompt, f"There is no {found.text}.")], [], found.kind, None, found)
    one = scene.objects[found.targets[0]]
    return Question("refer", [(prompt, VIS_TOKEN)], _slots([one]), found.kind, one, found)


def _refer(scene: Scene, rng: Random, generator, kinds, given_by) -> Question | None:
    found = _one_target(scene, rng, kinds)
    return found and refer_question(scene, found, generator)


def _one_target(scene: Scene, rng: Random, kinds) -> Expression | None:
    """An expression of one of these kinds that means one object."""
    weights = [KIND_WEIGHTS[kind] for kind in kinds]
    for _ in range(4):
        found = find_expression(scene, rng.choices(kinds, weights)[0], rng, lambda targets: len(targets) == 1, tries=8)
        if found is not None:
            return found
    return None


def _no_target(scene: Scene, rng: Random, generator, kinds, given_by) -> Question | None:
    found = find_expression(scene, "none", rng, lambda targets: not targets, tries=8)
    if found is None:
        return None
    question = refer_question(scene, found, generator)
    if " the " not in f" {found.text}" and rng.random() < 0.4:
        question.turns = [(render_prompt("detect", found.text, generator), question.turns[0][1])]
    return question


def _means_one(text: str) -> bool:
    """Whether an expression means a single object in any scene, so that nobody would ask for every such one."""
    relation = RELATION.search(text)  # the first is its own; others belong to what it refers to
    distances = RELATIONS["closest"], RELATIONS["farthest"]
    return text.startswith(("larger ", "smaller ")) or (relation is not None and relation[0] in distances)


def _several_targets(scene: Scene, rng: Random) -> Expression | None:
    """An expression that one can ask for every object of; mostly there are several."""
    least = 1 if rng.random() < 0.25 else 2
    for _ in range(3):
        kind = rng.choices(tuple(DETECT_KINDS), tuple(DETECT_KINDS.values()))[0]
        found = find_expression(scene, kind, rng, lambda targets: len(targets) >= least, tries=8)
        if found is not None and not _means_one(found.text):
            return found
    return None


def _detect(scene: Scene, rng: Random, generator, kinds, given_by) -> Question | None:
    found = _several_targets(scene, rng)
    if found is None:
        return None
    objects = _in_order(scene.objects[i] for i in found.targets)
    turn = render_prompt("detect", found.text, generator), VIS_TOKEN * len(objects)
    return Question("detect", [turn], _slots(objects), found.kind, None, found)


def _box_to_mask(scene: Scene, rng: Random, generator, kinds, given_by) -> Question:
    one = rng.choice(scene.objects)
    turn = render_prompt("box_to_mask", "", generator), VIS_TOKEN
    return Question("box_to_mask", [turn], [(one.box, None, None), *_slots([one])], None, one)


def _point(scene: Scene, rng: Random, generator, kinds, given_by) -> Question | None:
    found = _one_target(scene, rng, kinds)
    if found is None:
        return None
    one = scene.objects[found.targets[0]]
    turn = render_prompt("point", f"the {found.text}", generator), VIS_TOKEN
    return Question("point", [turn], _slots([one], with_points=True), found.kind, one, found)


def _point_all(scene: Scene, rng: Random, generator, kinds, given_by) -> Question | None:
    found = _several_targets(scene, rng)
    if found is None:
        return None
    objects = _in_order(scene.objects[i] for i in found.targets)
    turn = render_prompt("point_all", found.text, generator), VIS_TOKEN * len(objects)
    return Question("point_all", [turn], _slots(objects, with_points=True), found.kind, None, found)


def _point_to_mask(scene: Scene, rng: Random, generator, kinds, given_by) -> Question:
    one = rng.choice(scene.objects)
    turn = render_prompt("point_to_mask", "", generator), VIS_TOKEN
    return Question("point_to_mask", [turn], [(None, None, _click(one, rng)), *_slots([one])], None, one)


def _caption_parts(scene: Scene) -> list[tuple[str, list[SceneObject]]]:
    """What is in the scene, things alike together, the largest first."""
    groups = {}
    for one in sorted(scene.objects, key=lambda one: -one.area):
        groups.setdefault(_describe(one), []).append(one)
    return [
        (with_article(text) if len(group) == 1 else f"{NUMBERS[len(group)]} {plural(text)}", _in_order(group))
        for text, group in groups.items()
    ]


def _caption(scene: Scene, rng: Random, generator, kinds, given_by) -> Question:
    ground = {"photo": "in front of a photo", "texture": "on a textured background", "noise": "on a grainy background"}
    ground = ground.get(scene.background, f"on a {scene.background} background")
    answer = _sentence(f"{_list([text for text, _ in _caption_parts(scene)])} {ground}")
    return Question("caption", [render_turn("caption", answer=answer, generator=generator)], [])


def _spotting_caption(scene: Scene, rng: Random, generator, kinds, given_by) -> Question:
    parts = _caption_parts(scene)
    answer = _sentence(_list([_grounded(text, group) for text, group in parts]))
    turn = render_turn("spotting_caption", answer=answer, generator=generator)
    return Question("spotting_caption", [turn], _slots(one for _, group in parts for one in group))


def _prompt_slot(one: SceneObject, rng: Random, given_by: tuple[str, ...]) -> tuple:
    """An object in a prompt, in one of the forms `given_by`."""
    form = rng.choice(given_by)
    box, mask = one.box if form in ("box", "both") else None, one.mask if form in ("mask", "both") else None
    return box, mask, _click(one, rng) if form == "point" else None


def _region_caption(scene: Scene, rng: Random, generator, kinds, given_by) -> Question:
    one = rng.choice(scene.objects)
    answer = with_article(_describe(one))
    above = max(one.covered, key=one.covered.get, default=None)
    if above is not None and one.covered[above] >= LEAST_HIDDEN:
        other = _describe(scene.objects[above])
        answer += f", partly hidden by {f'another {other}' if other == _describe(one) else with_article(other)}"
    turn = render_turn("region_caption", answer=_sentence(answer), generator=generator)
    return Question("region_caption", [turn], [_prompt_slot(one, rng, given_by)], None, one)


def _count_or_exists(scene: Scene, rng: Random, counts: bool):
    """(question, answer, evidence as [(phrase, objects)])"""
    if rng.random() < 0.25:
        found = find_expression(scene, "none", rng, lambda targets: not targets, tries=4)
    else:
        found = find_expression(scene, "attribute", rng, lambda targets: len(targets) > 0, tries=2)
    if found is None or " the " in found.text:
        return None  # only what a noun phrase says
    objects = _in_order(scene.objects[i] for i in found.targets)
    if counts:
        phrase = f"the {found.text if len(objects) == 1 else plural(found.text)}"
        return f"How many {plural(found.text)} are there?", NUMBERS[len(objects)], [(phrase, objects)]
    phrase = with_article(found.text) if len(objects) == 1 else plural(found.text)
    return f"Is there {with_article(found.text)}?", "yes" if objects else "no", [(phrase, objects)]


def _compare(scene: Scene, rng: Random):
    names = sorted({one.shape for one in scene.objects})
    if len(names) < 2:
        return None
    first, second = rng.sample(names, 2)
    groups = [_in_order(selected(scene, None, None, name)) for name in (first, second)]
    question = f"Are there more {plural(first)} than {plural(second)}?"
    texts = [name if len(group) == 1 else plural(name) for name, group in zip((first, second), groups)]
    evidence = [(f"the {text}", group) for text, group in zip(texts, groups)]
    return question, "yes" if len(groups[0]) > len(groups[1]) else "no", evidence


def _property(scene: Scene, rng: Random):
    if scene.pasted:
        return None
    kind = rng.choice(("position", "ordinal", "superlative", "relation"))
    found = find_expression(scene, kind, rng, lambda targets: len(targets) == 1, tries=6)
    if found is None:
        return None
    one = scene.objects[found.targets[0]]
    options = [("What color is the {}?", one.color), ("What shape is the {}?", one.shape)]
    if one.side >= LEAST_PATTERN_SIDE:
        options.append(("Is the {} plain, striped, checkered or dotted?", one.pattern))
    question, answer = rng.choice(options)
    if answer in found.text.split() or answer == DOT or (answer == one.shape and found.named is not None):
        return None
    return question.format(found.text), answer, [(f"the {found.text}", [one])]


def _any_question(scene: Scene, rng: Random, evident: bool):
    for _ in range(8):
        form = rng.randrange(5)
        found = (
            _count_or_exists(scene, rng, counts=form == 0)
            if form < 2
            else _compare(scene, rng)
            if form == 2
            else _property(scene, rng)
        )
        if found is not None and not (evident and any(not group for _, group in found[2])):
            return found
    return None


def _vqa(scene: Scene, rng: Random, generator, kinds, given_by) -> Question | None:
    found = _any_question(scene, rng, evident=False)
    return found and Question("vqa", [render_turn("vqa", *found[:2], generator)], [])


def _read_glyph(scene: Scene, rng: Random, generator) -> Question | None:
    """What is written on an object that can be seen as a whole: first the object, then its digit or letter."""
    found = find_expression(scene, "attribute", rng, lambda targets: len(targets) == 1, tries=8)
    if found is None:
        return None
    one = scene.objects[found.targets[0]]
    if one.glyph is None or one.hidden >= LEAST_HIDDEN:
        return None
    question = f"Which {'digit' if one.glyph.isdigit() else 'letter'} is on the {found.text}?"
    prompt, _ = render_turn("grounded_vqa", question, "", generator)
    answer = f"{_grounded(f'The {found.text}', [one])}: {one.glyph}."
    return Question("grounded_vqa", [(prompt, answer)], _slots([one]), found.kind, one, found)


def _grounded_vqa(scene: Scene, rng: Random, generator, kinds, given_by) -> Question | None:
    if any(one.glyph for one in scene.objects):
        return _read_glyph(scene, rng, generator)
    found = _any_question(scene, rng, evident=True)
    if found is None:
        return None
    question, answer, evidence = found
    marked = _list([_grounded(text, group) for text, group in evidence])
    turn = render_turn("grounded_vqa", question, _sentence(answer), generator, marked)
    return Question("grounded_vqa", [turn], _slots(one for _, group in evidence for one in group))


def _region_vqa(scene: Scene, rng: Random, generator, kinds, given_by) -> Question:
    one = rng.choice(scene.objects)
    alike = NUMBERS[len(selected(scene, None, None, one.shape)) - 1]
    if scene.pasted:
        options = [("What is this?", one.shape), ("How many more of its kind are there?", alike)]
    else:
        others = NUMBERS[len(selected(scene, one.color, None, None)) - 1]
        options = [
            ("What shape is it?", one.shape),
            ("What color is it?", one.color),
            ("How many other shapes have its color?", others),
            ("How many more of its kind are there?", alike),
        ]
        if one.side >= LEAST_PATTERN_SIDE:
            options.append(("Is it plain, striped, checkered or dotted?", one.pattern))
        if one.hidden >= LEAST_HIDDEN or one.hidden == 0:
            options.append(("Is it partly hidden?", "yes" if one.hidden else "no"))
    turn = render_turn("region_vqa", *rng.choice(options), generator)
    return Question("region_vqa", [turn], [_prompt_slot(one, rng, given_by)], None, one)


def _reasoning(scene: Scene, rng: Random, generator, kinds, given_by) -> Question | None:
    found = find_expression(scene, "reasoning", rng, lambda targets: len(targets) == 1)
    if found is None:
        return None
    one = scene.objects[found.targets[0]]
    turn = render_turn("reasoning", f"Which is the {found.text}?", VIS_TOKEN, generator)
    return Question("reasoning", [turn], _slots([one]), "reasoning", one, found)


def _dialogue(scene: Scene, rng: Random, generator, kinds, given_by) -> Question | None:
    """Two to four turns: the later ones ask about what the earlier ones found ("it")."""
    kinds = [kind for kind in kinds if kind in ("attribute", "position", "superlative")] or ["attribute"]
    found = find_expression(scene, rng.choice(kinds), rng, lambda targets: len(targets) == 1, tries=12)
    if found is None:
        return None
    one = scene.objects[found.targets[0]]
    turns = [
        (
            rng.choice(("Show me the {}.", "Can you find the {}?", "Where is the {}?")).format(found.text),
            rng.choice(("Here is {}.", "This is {}.", "I found {}.")).format(_grounded(f"the {found.text}", [one])),
        )
    ]
    slots, fresh = _slots([one]), [other for other in scene.objects if other is not one]
    for _ in range(rng.randint(1, 3)):
        form = rng.randrange(4)
        if form == 0:
            relation, named = rng.choice(tuple(RELATIONS)), rng.choice(scene.objects).shape
            noun = named if scene.pasted or rng.random() < 0.5 else "shape"
            members = related(scene, relation, selected(scene, None, None, None if noun == "shape" else noun), one)
            if not members:
                continue
            members = _in_order(members)
            is_one = relation in ("closest", "farthest")
            question = f"Which {noun} is {RELATIONS[relation]} it?" if is_one else (
                f"Which {plural(noun)} are {RELATIONS[relation]} it?"
            )  # fmt: skip
            names = [_grounded(with_article(_describe(other)), [other]) for other in members]
            turns.append((question, _sentence(_list(names))))
            slots += _slots(members)
            if len(members) > 1:
                break  # "it" would not be clear any more
            one = members[0]
            fresh = [other for other in fresh if other is not one]
        elif form == 1 and fresh:
            one = fresh.pop(rng.randrange(len(fresh)))
            question = rng.choice(("And what is this, <vis>?", "What do you see at <vis>?", "Now <vis>: what is it?"))
            turns.append((question, _sentence(with_article(_describe(one)))))
            slots.append(_prompt_slot(one, rng, given_by))
        elif form == 2 and one.color is not None:
            other = rng.choice([other for other in scene.objects if other is not one])
            same = "Yes, it does." if one.color == other.color else f"No, that one is {other.color}."
            turns.append(("Does <vis> have the same color as it?", same))
            slots.append(_prompt_slot(other, rng, given_by))
            break
        elif form == 3:
            others = _in_order(other for other in selected(scene, None, None, one.shape) if other is not one)
            if others:
                text = one.shape if len(others) == 1 else plural(one.shape)
                text = f"{NUMBERS[len(others)]} other {text}"
            answer = f"Yes, {_grounded(text, others)}." if others else f"No, it is the only {one.shape}."
            turns.append(("Are there more of its kind?", answer))
            slots += _slots(others)
            break
    return Question("dialogue", turns, slots, found.kind) if len(turns) > 1 else None


TASK_FUNCTIONS = {
    "caption": _caption,
    "region_caption": _region_caption,
    "refer": _refer,
    "detect": _detect,
    "box_to_mask": _box_to_mask,
    "no_target": _no_target,
    "spotting_caption": _spotting_caption,
    "vqa": _vqa,
    "region_vqa": _region_vqa,
    "grounded_vqa": _grounded_vqa,
    "reasoning": _reasoning,
    "dialogue": _dialogue,
    "point": _point,
    "point_all": _point_all,
    "point_to_mask": _point_to_mask,
}
