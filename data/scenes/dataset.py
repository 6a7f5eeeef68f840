"""Scenes that are drawn as they are read: rows of the schema without end, with exact boxes and masks.

    rows = scenes_rows(split="train", seed=0, limit=1000)                  # a source like any other
    dataset = ScenesDataset(length=10**6, seed=0, questions=8)             # on the fly, for a Trainer
    dataset = ScenesDataset(2000, seed=10**6, split="scenes-bench-1")      # the test set of METRICS

Picture and questions depend on (split, seed, index) and the arguments alone, so any row can be made at any time.

| split | scenes | seeds |
| --- | --- | --- |
| `train` | 2-12 objects of 4-56 px (at 128 px); nothing of `HELD_OUT`, no reasoning | < 10^6 |
| `val` | the same, with reasoning | < 10^6 |
| `test` | the same as `val` | >= 10^6 |
| `scenes-bench-1` | as METRICS defines it: one expression a picture, fixed shares of kinds, fixed prompts | >= 10^6 |
| `scenes-bench-1-combinations` | the same; every target is one of `HELD_OUT`, which training never shows | >= 10^6 |

Tasks with words of their own beside the templates' (questions, dialogue) are worded here. Every row can tell its kind
and the side of its target: `ScenesDataset.details`, or `scene_details` from the row's `split` and `image_id`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from perceptiongpt.configuration_perceptiongpt import IMAGE_TOKEN, VIS_TOKEN
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
from perceptiongpt.data.scenes.pictures import (
    DOT,
    HELD_OUT,
    LEAST_HIDDEN,
    LEAST_PATTERN_SIDE,
    POOL_SCENES,
    REFERENCE_SIZE,
    Cutouts,
    Layout,
    Photos,
    Scene,
    SceneObject,
    draw_scene,
    draw_sides,
)
from perceptiongpt.data.schema import TASKS
from perceptiongpt.data.templates import render_prompt, render_turn
from perceptiongpt.geometry_perceptiongpt import box_iou


FIRST_TEST_SEED = 10**6
TRAINING_SPLITS = ("train", "val")  # their seeds are below
BENCH, BENCH_COMBINATIONS = "scenes-bench-1", "scenes-bench-1-combinations"
BENCH_PICTURES, DEFAULT_PICTURES = 2000, 10_000
LARGEST_SIZE = 2048
LAYOUTS = {
    "train": Layout(),
    "val": Layout(odd=0.15),
    "test": Layout(odd=0.15),
    BENCH: Layout((3, 9), (10.0, 56.0), hidden=0.3),
    BENCH_COMBINATIONS: Layout((3, 9), (10.0, 56.0), hidden=0.3, held_out=True),
}
PASTED_SIDES = (12.0, 64.0)  # a smaller cat cannot be told from a smaller dog
TRAINING_TASKS = tuple(task for task in TASKS if task != "reasoning")
TASK_WEIGHTS = dict.fromkeys(TASKS, 1.0) | {"refer": 8.0, "detect": 2.0, "no_target": 1.5}
KIND_WEIGHTS = dict(zip(KINDS, (25, 15, 10, 20, 6, 9, 5, 10), strict=True)) | dict.fromkeys(TEST_KINDS, 10)
DETECT_KINDS = {"attribute": 6, "relation": 2, "negation": 1, "size": 1}
# Of every 20 samples of the bench so many are of these kinds.
BENCH_SHARES = {
    ("attribute",): 5,
    ("position", "ordinal"): 5,
    ("relation",): 4,
    ("size", "superlative"): 3,
    ("negation",): 1,
    ("none",): 2,
}
BENCH_BLOCK = sum(BENCH_SHARES.values())
RELATION = re.compile("|".join((*RELATIONS.values(), "larger than", "smaller than")))
NUMBERS = "none one two three four five six seven eight nine ten eleven twelve".split()
TRIES = 200  # scenes that are drawn in search of one that a question can be asked about


def scenes_rows(
    root: str | Path | None = None,
    *,
    split: str = "train",
    annotations=None,
    images: str | Path | bool | None = None,
    tasks: Iterable[str] | None = None,
    seed: int | None = None,
    evaluation: bool = False,
    limit: int | None = None,
    start: int = 0,
    problems=None,
    kinds: Iterable[str] | None = None,
    size: int = REFERENCE_SIZE,
    photos: str | Path | None = None,
    paste: str | Path | None = None,
) -> Iterator[dict]:
    """Yield rows picture by picture: one of each task that can be asked about it; of a bench split one.

    Args:
        root: a folder of photos for backgrounds, as `photos`.
        split: see the table above.
        annotations: scenes have none; anything but None is an error.
        images: False: rows without their pictures; a folder: as `photos`.
        tasks: of `TASKS`; None: all, in training without `reasoning`.
        seed: of everything; from 10^6 on for testing, below for training; None: the split's first.
        evaluation: use each task's fixed prompt.
        limit: so many pictures; None: 10,000, or 2,000 of a bench split.
        start: the index of the first of them: what a shard or a resumed run begins with.
        problems: not used: there is nothing broken in a scene.
        kinds: the kinds of expressions that `refer` asks with; None: all, in training without `reasoning`.
        size: side of the pictures in pixels; 128 in a bench split.
        photos: a folder of photos for some of the backgrounds.
        paste: a folder in COCO's layout whose objects are pasted on its photos; nothing is drawn then.

    Raises:
        ValueError: a seed, split, task, kind or size that does not go together, or a folder that cannot be used.
    """
    if annotations is not None:
        raise ValueError("scenes are drawn and have no annotation files")
    if not isinstance(start, int) or start < 0:
        raise ValueError(f"scenes: start must be a whole number from 0 on, got {start!r}")
    if seed is None:
        seed = 0 if split in TRAINING_SPLITS else FIRST_TEST_SEED
    if limit is None:
        limit = BENCH_PICTURES if split in (BENCH, BENCH_COMBINATIONS) else DEFAULT_PICTURES
    folder = photos or (images if images is not True else None) or root
    dataset = ScenesDataset(
        start + limit, seed, split=split, tasks=tasks, kinds=kinds, size=size, photos=folder or None, paste=paste,
        evaluation=evaluation,
    )  # fmt: skip
    for index in range(start, start + limit):
        for row in dataset.picture_rows(index):
            yield {**row, "image": None} if images is False else row


@dataclass
class _Question:
    """One row in the making: its turns (user, assistant), and what it points at."""

    task: str
    turns: list[tuple[str, str]]
    slots: list[tuple[list[float] | None, dict | None]]
    kind: str | None = None
    target: SceneObject | None = None
    expression: Expression | None = None


class ScenesDataset(Dataset):
    """A map-style data set of scenes that are drawn when they are read.

    `dataset[i]` is a row, or with `questions` the list of rows about one picture that `PerceptionCollator(pack=..)`
    packs. Neighbouring indices share photos: reading in order (scenes are independent, shuffling gains nothing) reads
    each photo once.

    Args:
        length: pictures.
        seed, split, tasks, kinds, size, evaluation: see `scenes_rows`.
        photos, paste: see `scenes_rows`.
        questions: at most so many rows a picture, no two alike, their tasks drawn by `weights`; None: one row, not in
            a list.
        weights: per task, how often it is drawn; those not named keep their `TASK_WEIGHTS`.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        *,
        split: str = "train",
        tasks: Iterable[str] | None = None,
        kinds: Iterable[str] | None = None,
        size: int = REFERENCE_SIZE,
        photos: str | Path | None = None,
        paste: str | Path | None = None,
        evaluation: bool = False,
        questions: int | None = None,
        weights: dict[str, float] | None = None,
    ):
        self.is_bench = split in (BENCH, BENCH_COMBINATIONS)
        if split not in LAYOUTS:
            raise ValueError(f"scenes: split {split!r} is none of {', '.join(LAYOUTS)}")
        if not isinstance(seed, int) or seed < 0 or (seed < FIRST_TEST_SEED) != (split in TRAINING_SPLITS):
            bounds = "below 10^6" if split in TRAINING_SPLITS else "from 10^6 on"
            raise ValueError(
                f"scenes: seed {seed!r} with split {split!r}; its seeds are whole numbers {bounds}. "
                "Those from 10^6 on are for testing and never trained on"
            )
        if self.is_bench and (size != REFERENCE_SIZE or tasks is not None or kinds is not None or paste is not None):
            raise ValueError(f"scenes: {split} is defined at {REFERENCE_SIZE} px, with its own tasks and kinds, drawn")
        if not isinstance(size, int) or not 32 <= size <= LARGEST_SIZE:
            raise ValueError(f"scenes: size must be at least 32 pixels and at most {LARGEST_SIZE}, got {size!r}")
        if questions is not None and questions < 1:
            raise ValueError(f"scenes: questions must be at least 1, got {questions}")
        tasks, kinds = ([value] if isinstance(value, str) else value for value in (tasks, kinds))
        in_training = split == "train"
        self.tasks = tuple(tasks) if tasks is not None else TRAINING_TASKS if in_training else TASKS
        usual = tuple(kind for kind in KINDS if kind != "none")
        self.kinds = tuple(kinds) if kinds is not None else usual if in_training else (*usual, *TEST_KINDS)
        for name, values, known in (("task", self.tasks, TASKS), ("kind", self.kinds, (*usual, *TEST_KINDS))):
            if not values:
                raise ValueError(f"scenes: no {name}s were given; there are {', '.join(known)}")
            for value in values:
                if value not in known:
                    raise ValueError(f"scenes: {name} {value!r} is none of {', '.join(known)}")
                if in_training and value == "reasoning":
                    raise ValueError(f"scenes: {name} 'reasoning' is kept from the split 'train'; use 'val' or 'test'")
        if unknown := sorted(set(weights or {}) - set(TASKS)):
            raise ValueError(f"scenes: weights of {unknown}, which are none of {', '.join(TASKS)}")
        self.weights = TASK_WEIGHTS | (weights or {})
        self.length, self.seed, self.split, self.size, self.evaluation = length, seed, split, size, evaluation
        self.questions, self.layout = questions, LAYOUTS[split]
        if paste is not None:
            self.layout = replace(self.layout, sides=PASTED_SIDES)
        # Rows of one picture, and no others, agree in their image_id.
        self.prefix = "" if size == REFERENCE_SIZE else f"{size}px-"
        self.prefix += "paste-" if paste is not None else "photos-" if photos is not None else ""
        self.photos = None if photos is None else Photos(photos)
        self.paste = None if paste is None else Cutouts(paste)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict | list[dict]:
        scene, questions = self._draw(index, self.questions or 1)
        rows = self._rows(index, scene, questions)
        return rows if self.questions else rows[0]

    def picture_rows(self, index: int) -> list[dict]:
        """All rows of a picture: one of each task that can be asked about it, of a bench split one."""
        return self._rows(index, *self._draw(index, None))

    def details(self, index: int, every_task: bool = False) -> list[dict]:
        """What a breakdown and a check need to know, per row of `dataset[index]` or of `picture_rows(index)`.

        Returns:
            Per row: `kind` (of the expression; None where the task asks with none), `side` (the longer side in pixels
            of its one target, as a whole; None without one), `text` (the expression without its article), `targets`
            (numbers of its referents), `named` (the class that the expression names; None: any), and `scene`.
        """
        scene, questions = self._draw(index, None if every_task else self.questions or 1)
        return [
            {
                "kind": question.kind,
                "side": question.target and question.target.side,
                "text": question.expression and question.expression.text,
                "targets": question.expression and question.expression.targets,
                "named": question.expression and question.expression.named,
                "scene": scene,
            }
            for question in questions
        ]

    def _draw(self, index: int, count: int | None) -> tuple[Scene, list[_Question]]:
        """The scene of an index, and `count` questions about it, or one of each task (None)."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        key = f"{self.split}/{self.seed}/{index}"
        shared = {
            "size": self.size,
            "layout": self.layout,
            "photos": self.photos,
            "pool": f"{self.split}/{self.seed}/{index // POOL_SCENES}",
        }
        for attempt in range(TRIES):
            rng = Random(f"{key}/{attempt}/questions")
            if self.is_bench:
                scene, questions = self._bench(index, f"{key}/{attempt}", rng, attempt, shared)
            else:
                scene = draw_scene(f"{key}/{attempt}", paste=self.paste, **shared)
                questions = self._ask(scene, rng, count)
            if questions:
                return scene, questions
        raise ValueError(f"scenes: none of {TRIES} scenes allows a question of {self.tasks} with {self.kinds}")

    def _ask(self, scene: Scene, rng: Random, count: int | None) -> list[_Question]:
        generator = None if self.evaluation else np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
        if count is None:
            found = [TASK_FUNCTIONS[task](scene, rng, generator, self.kinds) for task in self.tasks]
            return [question for question in found if question is not None]
        questions, seen = [], set()
        weights = [self.weights[task] for task in self.tasks]
        for _ in range(6 * count):
            task = rng.choices(self.tasks, weights)[0]
            question = TASK_FUNCTIONS[task](scene, rng, generator, self.kinds)
            if question is None or (about := (task, repr(question.expression or question.turns))) in seen:
                continue
            seen.add(about)
            questions.append(question)
            if len(questions) == count:
                break
        return questions

    def _bench(self, index: int, key: str, rng: Random, attempt: int, shared: dict):
        """One sample of METRICS' scenes-bench-1. Number and sides of the objects do not depend on the expression."""
        block, place = divmod(index, BENCH_BLOCK)
        schedule = [kinds for kinds, count in BENCH_SHARES.items() for _ in range(count)]
        base = f"{self.split}/{self.seed}"
        kinds = Random(f"{base}/{block}/kinds").sample(schedule, BENCH_BLOCK)[place]
        plain = Random(f"{base}/{block}/plain").sample([False, True] * (BENCH_BLOCK // 2), BENCH_BLOCK)[place]
        sides = draw_sides(Random(f"{base}/{index}/{attempt // 40}/sides"), self.size, shared["layout"])
        scene = draw_scene(key, plain=plain, sides=sides, **shared)
        held_out = self.split == BENCH_COMBINATIONS
        wanted = 0 if kinds == ("none",) else 1

        def fits(targets: tuple[int, ...]) -> bool:
            if len(targets) != wanted:
                return False
            one = scene.objects[targets[0]] if targets else None
            return not held_out or one is None or (one.color, one.shape) in HELD_OUT

        for kind in rng.sample(kinds, len(kinds)):
            found = find_expression(scene, kind, rng, fits, held_out=held_out)
            if found is not None and (kind == "none" or len(selected(scene, None, None, found.named)) > 1):
                return scene, [_refer_question(scene, found, None)]
        return scene, []

    def _rows(self, index: int, scene: Scene, questions: list[_Question]) -> list[dict]:
        image = Image.fromarray(scene.image)
        rows = []
        for question in questions:
            messages = []
            for user, assistant in question.turns:
                user = user if messages else IMAGE_TOKEN + user
                messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
            rows.append(
                {
                    "image": image,
                    "messages": messages,
                    "boxes": [box for box, _ in question.slots],
                    "masks": [mask for _, mask in question.slots],
                    "task": question.task,
                    "source": "scenes",
                    "image_id": f"{self.prefix}{self.seed}-{index}",
                    "split": self.split,
                    "width": scene.size,
                    "height": scene.size,
                }
            )
        return rows


def scene_details(split: str, image_id: str, photos: str | Path | None = None) -> dict:
    """`ScenesDataset.details` of a bench row, from its `split` and `image_id`; `photos` as the row was made with."""
    if split not in (BENCH, BENCH_COMBINATIONS):
        raise ValueError(f"scenes: split {split!r} has several rows a picture; use ScenesDataset.details")
    seed, index = (int(part) for part in image_id.split("-")[-2:])
    return ScenesDataset(index + 1, seed, split=split, photos=photos).details(index)[0]


def bench_baselines(length: int = BENCH_PICTURES, seed: int = FIRST_TEST_SEED, split: str = BENCH) -> dict[str, float]:
    """Acc@0.5 on a bench split, over its samples with a target, of answers that need no model.

    Returns:
        `random_of_class`: expected, of a random object of the class that the expression names; `largest`: of the
        object of which most is visible; `samples`: with a target.
    """
    dataset = ScenesDataset(length, seed, split=split)
    random_of_class, largest = [], []
    for index in range(length):
        (details,) = dataset.details(index)
        if not details["targets"]:
            continue
        scene = details["scene"]
        box = scene.objects[details["targets"][0]].box
        of_class = [one.box for one in selected(scene, None, None, details["named"])]
        random_of_class.append(np.mean(box_iou(of_class, box) >= 0.5))
        largest.append(box_iou(max(scene.objects, key=lambda one: one.area).box, box) >= 0.5)
    return {
        "random_of_class": float(np.mean(random_of_class)),
        "largest": float(np.mean(largest)),
        "samples": len(largest),
    }


# ---- tasks: (scene, rng, generator of the prompts or None for the fixed ones, kinds) -> question or None -------------


def _slots(objects: Iterable[SceneObject]) -> list[tuple]:
    return [(one.box, one.mask) for one in objects]


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


def _refer_question(scene: Scene, found: Expression, generator) -> _Question:
    """The row of an expression with one referent, or none."""
    prompt = render_prompt("refer", f"the {found.text}", generator)
    if not found.targets:
        return _Question("no_target", [(prompt, f"There is no {found.text}.")], [], found.kind, None, found)
    one = scene.objects[found.targets[0]]
    return _Question("refer", [(prompt, VIS_TOKEN)], _slots([one]), found.kind, one, found)


def _refer(scene: Scene, rng: Random, generator, kinds) -> _Question | None:
    weights = [KIND_WEIGHTS[kind] for kind in kinds]
    for _ in range(4):
        found = find_expression(scene, rng.choices(kinds, weights)[0], rng, lambda targets: len(targets) == 1, tries=8)
        if found is not None:
            return _refer_question(scene, found, generator)
    return None


def _no_target(scene: Scene, rng: Random, generator, kinds) -> _Question | None:
    found = find_expression(scene, "none", rng, lambda targets: not targets, tries=8)
    if found is None:
        return None
    question = _refer_question(scene, found, generator)
    if " the " not in f" {found.text}" and rng.random() < 0.4:
        question.turns = [(render_prompt("detect", found.text, generator), question.turns[0][1])]
    return question


def _means_one(text: str) -> bool:
    """Whether an expression means a single object in any scene, so that nobody would ask for every such one."""
    relation = RELATION.search(text)  # the first is its own; others belong to what it refers to
    distances = RELATIONS["closest"], RELATIONS["farthest"]
    return text.startswith(("larger ", "smaller ")) or (relation is not None and relation[0] in distances)


def _detect(scene: Scene, rng: Random, generator, kinds) -> _Question | None:
    least = 1 if rng.random() < 0.25 else 2
    for _ in range(3):
        kind = rng.choices(tuple(DETECT_KINDS), tuple(DETECT_KINDS.values()))[0]
        found = find_expression(scene, kind, rng, lambda targets: len(targets) >= least, tries=8)
        if found is not None and not _means_one(found.text):
            objects = _in_order(scene.objects[i] for i in found.targets)
            turn = render_prompt("detect", found.text, generator), VIS_TOKEN * len(objects)
            return _Question("detect", [turn], _slots(objects), kind, None, found)
    return None


def _box_to_mask(scene: Scene, rng: Random, generator, kinds) -> _Question:
    one = rng.choice(scene.objects)
    turn = render_prompt("box_to_mask", "", generator), VIS_TOKEN
    return _Question("box_to_mask", [turn], [(one.box, None), *_slots([one])], None, one)


def _caption_parts(scene: Scene) -> list[tuple[str, list[SceneObject]]]:
    """What is in the scene, things alike together, the largest first."""
    groups = {}
    for one in sorted(scene.objects, key=lambda one: -one.area):
        groups.setdefault(_describe(one), []).append(one)
    return [
        (with_article(text) if len(group) == 1 else f"{NUMBERS[len(group)]} {plural(text)}", _in_order(group))
        for text, group in groups.items()
    ]


def _caption(scene: Scene, rng: Random, generator, kinds) -> _Question:
    ground = {"photo": "in front of a photo", "texture": "on a textured background", "noise": "on a grainy background"}
    ground = ground.get(scene.background, f"on a {scene.background} background")
    answer = _sentence(f"{_list([text for text, _ in _caption_parts(scene)])} {ground}")
    return _Question("caption", [render_turn("caption", answer=answer, generator=generator)], [])


def _spotting_caption(scene: Scene, rng: Random, generator, kinds) -> _Question:
    parts = _caption_parts(scene)
    answer = _sentence(_list([_grounded(text, group) for text, group in parts]))
    turn = render_turn("spotting_caption", answer=answer, generator=generator)
    return _Question("spotting_caption", [turn], _slots(one for _, group in parts for one in group))


def _prompt_slot(one: SceneObject, rng: Random) -> tuple:
    """An object as a user may give it: box, mask or both."""
    return rng.choice(((one.box, None), (None, one.mask), (one.box, one.mask)))


def _region_caption(scene: Scene, rng: Random, generator, kinds) -> _Question:
    one = rng.choice(scene.objects)
    answer = with_article(_describe(one))
    above = max(one.covered, key=one.covered.get, default=None)
    if above is not None and one.covered[above] >= LEAST_HIDDEN:
        other = _describe(scene.objects[above])
        answer += f", partly hidden by {f'another {other}' if other == _describe(one) else with_article(other)}"
    turn = render_turn("region_caption", answer=_sentence(answer), generator=generator)
    return _Question("region_caption", [turn], [_prompt_slot(one, rng)], None, one)


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


def _vqa(scene: Scene, rng: Random, generator, kinds) -> _Question | None:
    found = _any_question(scene, rng, evident=False)
    return found and _Question("vqa", [render_turn("vqa", *found[:2], generator)], [])


def _grounded_vqa(scene: Scene, rng: Random, generator, kinds) -> _Question | None:
    found = _any_question(scene, rng, evident=True)
    if found is None:
        return None
    question, answer, evidence = found
    marked = _list([_grounded(text, group) for text, group in evidence])
    turn = render_turn("grounded_vqa", question, _sentence(answer), generator, marked)
    return _Question("grounded_vqa", [turn], _slots(one for _, group in evidence for one in group))


def _region_vqa(scene: Scene, rng: Random, generator, kinds) -> _Question:
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
    return _Question("region_vqa", [turn], [_prompt_slot(one, rng)], None, one)


def _reasoning(scene: Scene, rng: Random, generator, kinds) -> _Question | None:
    found = find_expression(scene, "reasoning", rng, lambda targets: len(targets) == 1)
    if found is None:
        return None
    one = scene.objects[found.targets[0]]
    turn = render_turn("reasoning", f"Which is the {found.text}?", VIS_TOKEN, generator)
    return _Question("reasoning", [turn], _slots([one]), "reasoning", one, found)


def _dialogue(scene: Scene, rng: Random, generator, kinds) -> _Question | None:
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
            slots.append(_prompt_slot(one, rng))
        elif form == 2 and one.color is not None:
            other = rng.choice([other for other in scene.objects if other is not one])
            same = "Yes, it does." if one.color == other.color else f"No, that one is {other.color}."
            turns.append(("Does <vis> have the same color as it?", same))
            slots.append(_prompt_slot(other, rng))
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
    return _Question("dialogue", turns, slots, found.kind) if len(turns) > 1 else None


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
}
