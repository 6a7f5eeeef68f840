"""LLaVA's instruction data and its caption and box records as rows of the schema.

| record | rows |
| --- | --- |
| `id`, `image`, `conversations` [{`from` human or gpt, `value`}] | `dialogue`, in the data's own words |
| `image`, `instruction`, `output` | `vqa`, in the data's own words |
| `image`, `text` (questions without answers) | `vqa`, ending with the question |
| `image`, `captions`, `instances` [{`category`, `bbox` relative xyxy}] | `caption`, `refer`, `detect` |
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from perceptiongpt.configuration_perceptiongpt import IMAGE_TOKEN, VIS_TOKEN
from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    check_box,
    chosen_tasks,
    clean_text,
    coco_image_id,
    each_record,
    get,
    known_size,
    make_row,
    reading_order,
    stated_size,
    usual_files,
)
from perceptiongpt.data.formats.coco import refer_expressions
from perceptiongpt.data.reading import Problems, read_records, without_copies
from perceptiongpt.data.templates import render_prompt, render_turn


LLAVA_TASKS = ("dialogue", "vqa", "caption", "refer", "detect")
LLAVA_FILES = ("llava_instruct_150k.json", "llava_instruct_80k.json", "llava_v1_5_mix665k.json")
WRITTEN_BOX = re.compile(r"\[\s*[01]?\.\d+(?:\s*,\s*[01]?\.\d+){3}\s*\]")


def llava_rows(
    root: str | Path,
    *,
    split: str = "train",
    annotations: Iterable[str | Path] | None = None,
    images: str | Path | bool | None = None,
    tasks: Iterable[str] | None = None,
    seed: int = 0,
    evaluation: bool = False,
    limit: int | None = None,
    problems: Problems | None = None,
) -> Iterator[dict]:
    """Yield the rows of LLaVA's files. Conversations without an image, and those in which boxes are written as
    numbers, are left out and counted.

    Args:
        root: folder with one of `LLAVA_FILES`, else with json files or lines of these forms, and the images.
        split: what the column `split` says.
        annotations: the files, if they are elsewhere.
        images: the folder that the records' `image` is relative to; False: rows without images.
        tasks: any of `LLAVA_TASKS`; default: all that a record offers.
        seed, evaluation: seed of the drawn prompts and choices; True: the fixed evaluation prompts.
        limit: read only the first `limit` records of each file.
        problems: collects bad records; None: the first one raises.
    """
    problems = problems or Problems()
    tasks = chosen_tasks(tasks, LLAVA_TASKS, "llava")
    root = Path(root)
    files = list(annotations or usual_files(root, LLAVA_FILES)[:1] or without_copies(sorted(root.glob("*.json*"))))
    if not files:
        raise ValueError(f"{root}: there is no json file")
    finder = ImageFinder(images, root, root / "images", root / "train2017", root / "train2014", root / "val2014")
    draw = Draw("llava", seed, evaluation)

    def make(record) -> Iterator[dict]:
        if "image" not in record:
            problems.leave_out("conversation without an image")
            return
        name = get(record, "image")
        coco_id = coco_image_id(name)
        columns = finder.columns(name, size=stated_size(record), coco_id=None if coco_id is None else int(coco_id))
        # With its folder: `vg/VG_100K/5.jpg` and `ocr_vqa/images/5.jpg` are different images.
        columns |= {"source": "llava", "image_id": coco_id or str(PurePosixPath(name).with_suffix("")), "split": split}
        if "conversations" in record:
            conversations = get(record, "conversations", of=list)
            texts = [turn.get("value") for turn in conversations if isinstance(turn, dict)]
            if any(isinstance(text, str) and WRITTEN_BOX.search(text) for text in texts):
                problems.leave_out("boxes written as numbers")
            elif "dialogue" in tasks:
                yield make_row("dialogue", read_conversation(conversations), columns)
        elif "instances" in record:
            yield from _caption_rows(record, columns, tasks, draw)
            if columns["width"]:
                yield from _box_rows(record, columns, tasks, draw)
            elif record["instances"]:
                problems.leave_out("relative boxes of an image of unknown size")
        elif "vqa" in tasks:
            question = _own_words(get(record, "instruction", "text", "question"))
            answer = _own_words(get(record, "output", "answer")) if {"output", "answer"} & set(record) else None
            yield make_row("vqa", [Turn(question, answer)], columns)

    for path in files:
        yield from each_record(islice(read_records(path, problems=problems), limit), make, problems)


def read_conversation(conversations: list[dict]) -> list[Turn]:
    """Alternating human and gpt turns; the `<image>` of the first one is left to the row."""
    values = [get(turn, "value") for turn in conversations]
    speakers = [get(turn, "from") for turn in conversations]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise ValueError(f"the speakers are {speakers}, expected human and gpt in turns")
    if values[0].count(IMAGE_TOKEN) > 1 or any(IMAGE_TOKEN in value for value in values[1:]):
        raise ValueError(f"{IMAGE_TOKEN} must stand once, in the first turn: {values[0][:60]!r}")
    values[0] = values[0].replace(IMAGE_TOKEN, "")
    texts = list(map(_own_words, values))
    return [Turn(question, answer) for question, answer in zip(texts[::2], texts[1::2])]


def _own_words(text: str) -> str:
    return clean_text(text, keep_lines=True)


def _caption_rows(record, columns, tasks, draw) -> Iterator[dict]:
    for number, caption in enumerate(get(record, "captions", of=list) if "caption" in tasks else ()):
        caption = clean_text(caption, f"caption {number}")
        texts = render_turn("caption", "", caption, draw(columns["image_id"], "caption", number))
        yield make_row("caption", [Turn(*texts)], columns)


def _box_rows(record, columns, tasks, draw) -> Iterator[dict]:
    image_id, size = columns["image_id"], known_size(columns)
    by_category = defaultdict(list)
    for number, instance in enumerate(get(record, "instances", of=list)):
        box = get(instance, "bbox", of=list)
        if len(box) != 4 or not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in box):
            raise ValueError(f"bbox {box} of instance {number} is not relative [x0, y0, x1, y1] between 0 and 1")
        box = [value * side for value, side in zip(box, size * 2)]
        name = clean_text(get(instance, "category"), f"category of instance {number}")
        by_category[name].append(check_box(box, size, f"bbox of instance {number}"))
    for name, boxes in by_category.items():
        boxes = reading_order(boxes)
        for number, (box, phrases) in enumerate(zip(boxes, refer_expressions(name, boxes, *size))):
            if "refer" in tasks and phrases:
                phrase = phrases[draw.always(image_id, "expression", name, number).integers(len(phrases))]
                prompt = render_prompt("refer", phrase, draw(image_id, "refer", name, number))
                yield make_row("refer", [Turn(prompt, VIS_TOKEN, [(box, None)])], columns)
        if "detect" in tasks:
            prompt = render_prompt("detect", name, draw(image_id, "detect", name))
            yield make_row("detect", [Turn(prompt, VIS_TOKEN * len(boxes), [(box, None) for box in boxes])], columns)
