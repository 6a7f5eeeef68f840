"""Scenes that are drawn when they are read: any number of rows of the schema, with exact boxes, masks and points.

    rows = scenes_rows(split="train", seed=0, limit=1000)                  # a source like any other
    dataset = ScenesDataset(length=10**6, seed=0, questions=8)             # on the fly, for a Trainer
    dataset = ScenesDataset(2000, seed=10**6, split="scenes-bench-1")      # a fixed test set

Image and questions depend on (split, seed, index) and the arguments alone, so any row can be made at any time.

| split | scenes | seeds |
| --- | --- | --- |
| `train` | 2-12 objects of 4-56 px (at 128 px); nothing of `HELD_OUT`, no reasoning | < 10^6 |
| `val` | the same, with reasoning | < 10^6 |
| `test` | the same as `val` | >= 10^6 |
| `scenes-bench-1` | one expression an image, fixed shares of kinds, fixed prompts: see `bench.py` | >= 10^6 |
| `scenes-bench-1-combinations` | the same; every target is one of `HELD_OUT`, which training never shows | >= 10^6 |

For a breakdown, `ScenesDataset.details` tells the kind of each row and the size of its target; of a bench row,
`scene_details` in `bench.py` does, from its `split` and `image_id`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from perceptiongpt.configuration_perceptiongpt import IMAGE_TOKEN
from perceptiongpt.data.scenes.bench import BENCH_IMAGES, BENCH_LAYOUTS, FIRST_TEST_SEED, draw_bench
from perceptiongpt.data.scenes.expressions import KINDS, TEST_KINDS
from perceptiongpt.data.scenes.photos import Cutouts, Photos
from perceptiongpt.data.scenes.pictures import POOL_SCENES, REFERENCE_SIZE, Layout, Scene, draw_scene
from perceptiongpt.data.scenes.tasks import GIVEN_BY, SCENE_TRIES, TASK_FUNCTIONS, Question
from perceptiongpt.data.schema import POINT_TASKS, TASKS


TRAINING_SPLITS = ("train", "val")  # their seeds are below `FIRST_TEST_SEED`
LAYOUTS = {"train": Layout(), "val": Layout(odd=0.15), "test": Layout(odd=0.15), **BENCH_LAYOUTS}
DEFAULT_IMAGES = 10_000
LEAST_SIZE, LARGEST_SIZE = 32, 2048  # pixels
PASTED_SIDES = (12.0, 64.0)  # a smaller cat cannot be told from a smaller dog
# Points are asked for by name: a checkpoint may have none, and the usual rows of a seed stay what they are.
USUAL_TASKS = tuple(task for task in TASKS if task not in POINT_TASKS)
TRAINING_TASKS = tuple(task for task in USUAL_TASKS if task != "reasoning")
USUALLY_GIVEN_BY = tuple(form for form in GIVEN_BY if form != "point")
TASK_WEIGHTS = dict.fromkeys(TASKS, 1.0) | {"refer": 8.0, "detect": 2.0, "no_target": 1.5}
TRIES_PER_QUESTION = 6  # draws of a task in search of one that a scene allows


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
    given_by: Iterable[str] | None = None,
    size: int = REFERENCE_SIZE,
    photos: str | Path | None = None,
    paste: str | Path | None = None,
    glyphs: bool = False,
) -> Iterator[dict]:
    """Yield rows image by image: one of each task that can be asked about it; in a bench split one.

    Args:
        root: a folder of photos for backgrounds, as `photos`.
        split: one of the table above.
        annotations: scenes have none; anything but None is an error.
        images: False: rows without their images; a folder: as `photos`.
        tasks: of `TASKS`; None: all but those of points, in training without `reasoning`.
        seed: of everything; from 10^6 on for testing, below for training; None: the split's first.
        evaluation: use each task's fixed prompt.
        limit: the number of images; None: 10,000, or 2,000 of a bench split.
        start: the index of the first image: where a shard or a resumed run begins.
        problems: not used: scenes have no broken records.
        kinds: the kinds of expressions that `refer` asks with; None: all, in training without `reasoning`.
        given_by: the forms in which the prompts of `region_caption`, `region_vqa` and `dialogue` give an object, of
            `GIVEN_BY`; None: all but `point`.
        size: side of the images in pixels; 128 in a bench split.
        photos: a folder of photos for some of the backgrounds.
        paste: a folder in COCO's layout whose objects are pasted on its photos; nothing is drawn then.
        glyphs: whether objects have digits and letters on them; then `grounded_vqa` asks to read one.

    Raises:
        ValueError: arguments that exclude each other, an unknown name, or a folder that cannot be used.
    """
    if annotations is not None:
        raise ValueError("scenes are drawn and have no annotation files")
    if not isinstance(start, int) or start < 0:
        raise ValueError(f"scenes: start must be a whole number from 0 on, got {start!r}")
    if seed is None:
        seed = 0 if split in TRAINING_SPLITS else FIRST_TEST_SEED
    if limit is None:
        limit = BENCH_IMAGES if split in BENCH_LAYOUTS else DEFAULT_IMAGES
    folder = photos or (images if images is not True else None) or root
    dataset = ScenesDataset(
        start + limit, seed, split=split, tasks=tasks, kinds=kinds, given_by=given_by, size=size,
        photos=folder or None, paste=paste, evaluation=evaluation, glyphs=glyphs,
    )  # fmt: skip
    for index in range(start, start + limit):
        for row in dataset.image_rows(index):
            yield {**row, "image": None} if images is False else row


class ScenesDataset(Dataset):
    """A map-style data set of scenes that are drawn when they are read.

    `dataset[i]` is a row, or with `questions` the list of rows about one image that `PerceptionCollator(pack=..)`
    packs. Neighbouring indices share photos, so that reading in order reads each photo once. (Scenes are independent:
    shuffling gains nothing.)

    Args:
        length: the number of images.
        seed, split, tasks, kinds, given_by, size, photos, paste, evaluation, glyphs: see `scenes_rows`.
        questions: the most rows per image, no two alike, their tasks drawn by `weights`; None: one row, not in a list.
        weights: per task, how often it is drawn; the others keep their `TASK_WEIGHTS`.
    """

    def __init__(
        self,
        length: int,
        seed: int = 0,
        *,
        split: str = "train",
        tasks: Iterable[str] | None = None,
        kinds: Iterable[str] | None = None,
        given_by: Iterable[str] | None = None,
        size: int = REFERENCE_SIZE,
        photos: str | Path | None = None,
        paste: str | Path | None = None,
        evaluation: bool = False,
        questions: int | None = None,
        weights: dict[str, float] | None = None,
        glyphs: bool = False,
    ):
        self.is_bench = split in BENCH_LAYOUTS
        if split not in LAYOUTS:
            raise ValueError(f"scenes: split {split!r} is none of {', '.join(LAYOUTS)}")
        if not isinstance(seed, int) or seed < 0 or (seed < FIRST_TEST_SEED) != (split in TRAINING_SPLITS):
            bounds = "below 10^6" if split in TRAINING_SPLITS else "from 10^6 on"
            raise ValueError(
                f"scenes: seed {seed!r} with split {split!r}; its seeds are whole numbers {bounds}. "
                "Those from 10^6 on are for testing and never trained on"
            )
        is_changed = any(value is not None for value in (tasks, kinds, given_by, paste)) or size != REFERENCE_SIZE
        is_changed |= glyphs
        if glyphs and paste is not None:
            raise ValueError("scenes: glyphs are written on drawn objects, and paste draws none")
        if self.is_bench and is_changed:
            raise ValueError(f"scenes: {split} is defined at {REFERENCE_SIZE} px, with its own tasks and kinds, drawn")
        if not isinstance(size, int) or not LEAST_SIZE <= size <= LARGEST_SIZE:
            raise ValueError(f"scenes: size must be {LEAST_SIZE} to {LARGEST_SIZE} pixels, got {size!r}")
        if questions is not None and questions < 1:
            raise ValueError(f"scenes: questions must be at least 1, got {questions}")
        tasks, kinds, given_by = ([value] if isinstance(value, str) else value for value in (tasks, kinds, given_by))
        in_training = split == "train"
        self.tasks = tuple(tasks) if tasks is not None else TRAINING_TASKS if in_training else USUAL_TASKS
        usual = tuple(kind for kind in KINDS if kind != "none")
        self.kinds = tuple(kinds) if kinds is not None else usual if in_training else (*usual, *TEST_KINDS)
        self.given_by = tuple(given_by) if given_by is not None else USUALLY_GIVEN_BY
        known_kinds = (*usual, *TEST_KINDS)
        for name, values, known in (
            ("task", self.tasks, TASKS), ("kind", self.kinds, known_kinds), ("given_by", self.given_by, GIVEN_BY)
        ):  # fmt: skip
            if not values:
                raise ValueError(f"scenes: no {name} was given; there are {', '.join(known)}")
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
        # Rows of one image, and no others, agree in their image_id.
        self.prefix = "" if size == REFERENCE_SIZE else f"{size}px-"
        self.glyphs = glyphs
        self.prefix += "glyphs-" if glyphs else ""
        self.prefix += "paste-" if paste is not None else "photos-" if photos is not None else ""
        self.photos = None if photos is None else Photos(photos)
        self.paste = None if paste is None else Cutouts(paste)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict | list[dict]:
        scene, questions = self._draw(index, self.questions or 1)
        rows = self._rows(index, scene, questions)
        return rows if self.questions else rows[0]

    def image_rows(self, index: int) -> list[dict]:
        """All rows of an image: one of each task that can be asked about it, in a bench split one."""
        return self._rows(index, *self._draw(index, None))

    def details(self, index: int, every_task: bool = False) -> list[dict]:
        """What a breakdown and a check need to know, per row of `dataset[index]` or of `image_rows(index)`.

        Returns:
            Per row: `kind` (of the expression; None where the task asks with none), `side` (the longer side in pixels
            of its one target, as a whole; None without one), `text` (the expression without its article), `targets`
            (numbers of its referents), `named` (the class that the expression names; None: any), and `scene`.
        """
        scene, questions = self._draw(index, None if every_task else self.questions or 1)
        return [question.details(scene) for question in questions]

    def _draw(self, index: int, count: int | None) -> tuple[Scene, list[Question]]:
        """The scene of an index, and `count` questions about it, or one of each task (None)."""
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length}")
        if self.is_bench:
            scene, question = draw_bench(self.split, self.seed, index, self.photos)
            return scene, [question]
        key, pool = f"{self.split}/{self.seed}/{index}", f"{self.split}/{self.seed}/{index // POOL_SCENES}"
        shared = {"size": self.size, "layout": self.layout, "photos": self.photos, "paste": self.paste, "pool": pool}
        shared["glyphs"] = self.glyphs
        for attempt in range(SCENE_TRIES):
            scene = draw_scene(f"{key}/{attempt}", **shared)
            questions = self._ask(scene, Random(f"{key}/{attempt}/questions"), count)
            if questions:
                return scene, questions
        raise ValueError(f"scenes: none of {SCENE_TRIES} scenes allows a question of {self.tasks} with {self.kinds}")

    def _ask(self, scene: Scene, rng: Random, count: int | None) -> list[Question]:
        generator = None if self.evaluation else np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
        if count is None:
            found = [self._question(task, scene, rng, generator) for task in self.tasks]
            return [question for question in found if question is not None]
        questions, seen = [], set()
        weights = [self.weights[task] for task in self.tasks]
        for _ in range(TRIES_PER_QUESTION * count):
            task = rng.choices(self.tasks, weights)[0]
            question = self._question(task, scene, rng, generator)
            if question is None or (about := (task, repr(question.expression or question.turns))) in seen:
                continue
            seen.add(about)
            questions.append(question)
            if len(questions) == count:
                break
        return questions

    def _question(self, task: str, scene: Scene, rng: Random, generator) -> Question | None:
        return TASK_FUNCTIONS[task](scene, rng, generator, self.kinds, self.given_by)

    def _rows(self, index: int, scene: Scene, questions: list[Question]) -> list[dict]:
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
                    "boxes": [box for box, _, _ in question.slots],
                    "masks": [mask for _, mask, _ in question.slots],
                    "points": [point for _, _, point in question.slots],
                    "task": question.task,
                    "source": "scenes",
                    "image_id": f"{self.prefix}{self.seed}-{index}",
                    "split": self.split,
                    "width": scene.size,
                    "height": scene.size,
                }
            )
        return rows
