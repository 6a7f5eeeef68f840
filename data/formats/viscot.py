"""Visual-CoT (a question, its answer and the box of the region to look at) as rows of the schema.

| record | where |
| --- | --- |
| `question`, `answer`, `image`, `bboxs` [[x0, y0, x1, y1]], `width`, `height`, `dataset` | `metadata/*.jsonl` |
| `conversations`, `image` [path, "path###[x0, y0, x1, y1]"] | `viscot_363k.json` |
| `expression` (the question), `bbox`, `img_path`, `width`, `height` | the detection benchmark, without answers |
"""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from perceptiongpt.configuration_perceptiongpt import (
    IMAGE_TOKEN,
    LOOK_MARKER,
    PHRASE_END_TOKEN,
    PHRASE_START_TOKEN,
    VIS_TOKEN,
)
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
)
from perceptiongpt.data.reading import Problems, read_records, without_copies
from perceptiongpt.data.templates import render_turn


VISCOT_TASKS = ("reasoning", "grounded_vqa", "region_vqa", "vqa")
REQUEST = "Please provide the bounding box"  # what viscot_363k.json puts behind each question


def viscot_rows(
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
    looks: bool = False,
) -> Iterator[dict]:
    """Yield the rows of Visual-CoT: where to look (`reasoning`), and, where there is an answer, the answer with the
    box as evidence (`grounded_vqa`), about the box (`region_vqa`) and without it (`vqa`).

    Args:
        root: folder with `metadata/*<split>*.jsonl`, else `viscot_363k.json`, else json lines; images in
            `cot/<dataset>`, `cot_image_data/<dataset>` or `images`.
        split: picks the metadata files, and is what the column `split` says.
        annotations: the files, if they are elsewhere.
        images: the folder that the records' paths are relative to; False: rows without images.
        tasks: any of `VISCOT_TASKS`; default: all that a record offers.
        seed, evaluation: seed of the drawn prompts and choices; True: the fixed evaluation prompts.
        limit: read only the first `limit` records of each file.
        problems: collects bad records; None: the first one raises.
        looks: for models that look again: `grounded_vqa` asks as `vqa` does, and answers behind a look at the box.
    """
    tasks = chosen_tasks(tasks, VISCOT_TASKS, "viscot")
    root = Path(root)
    usual = (f"metadata/*{split}*.jsonl*", f"*{split}*.jsonl*", "viscot_363k.json*", "*.jsonl*")
    files = list(
        annotations or without_copies(next(filter(None, (sorted(root.glob(pattern)) for pattern in usual)), ()))
    )
    if not files:
        raise ValueError(f"{root}: there is no metadata/*{split}*.jsonl and no viscot_363k.json")
    finder = ImageFinder(images, root, root / "images", root / "cot_image_data", root / "cot_images")
    draw = Draw("viscot", seed, evaluation)

    def make(record) -> Iterator[dict]:
        name, question, answer, boxes = _read(record)
        path = PurePosixPath(name.removeprefix("cot/"))  # with its folder: its data sets number alike
        if len(path.parts) == 1 and "dataset" in record:
            path = get(record, "dataset") / path
        coco_id = coco_image_id(name)
        columns = finder.columns(
            f"cot/{path}", str(path), size=stated_size(record), coco_id=None if coco_id is None else int(coco_id)
        )
        columns |= {"source": "viscot", "image_id": coco_id or str(path.with_suffix("")), "split": split}
        slots = [(check_box(box, known_size(columns), f"box {i}"), None) for i, box in enumerate(boxes)]
        marks = VIS_TOKEN * len(slots)
        for task, content, evidence in (
            ("reasoning", marks, ""),
            ("grounded_vqa", answer, f"{PHRASE_START_TOKEN}this part{PHRASE_END_TOKEN}{marks}"),
            ("region_vqa", answer, ""),
            ("vqa", answer, ""),
        ):
            if task in tasks and content is not None and (task != "region_vqa" or len(slots) == 1):
                generator = draw(columns["image_id"], task, question)
                prompt, reply = render_turn(task, question, content, generator, evidence)
                if looks and task == "grounded_vqa" and len(slots) == 1:
                    prompt, reply = render_turn("vqa", question, content, generator)
                    reply = f"{VIS_TOKEN}{LOOK_MARKER} {reply}"
                yield make_row(task, [Turn(prompt, reply, [] if task == "vqa" else slots)], columns)

    for path in files:
        yield from each_record(islice(read_records(path, problems=problems), limit), make, problems)


def _read(record: dict) -> tuple[str, str, str | None, list]:
    """(image, question, answer or None, boxes) of any of the three forms."""
    if "conversations" in record:
        paths, turns = get(record, "image", of=list), get(record, "conversations", of=list)
        if len(paths) != 2 or len(turns) != 4:
            raise ValueError(f"{len(paths)} images and {len(turns)} turns, expected 2 (one a part of the other) and 4")
        name, box = paths[0], str(paths[1]).partition("###")[2]
        try:
            boxes = [json.loads(box)]
        except ValueError as error:
            raise ValueError(f"{str(paths[1])[:80]!r} does not end with ###[x0, y0, x1, y1]") from error
        question = get(turns[0], "value").replace(IMAGE_TOKEN, "").split(REQUEST)[0]
        answer = get(turns[3], "value")
    else:
        name, question = get(record, "image", "img_path"), get(record, "question", "expression")
        answer = get(record, "answer") if "answer" in record else None
        boxes = get(record, "bboxs", "bbox", of=list)
        boxes = boxes if "bboxs" in record else [boxes]
    if not isinstance(name, str) or not boxes or not all(isinstance(box, list) and len(box) == 4 for box in boxes):
        raise ValueError(f"image {name!r} with the boxes {str(boxes)[:60]}, expected a file and [x0, y0, x1, y1]")
    answer = None if answer is None else clean_text(answer, "answer")
    return name, clean_text(question, "question"), answer, reading_order(boxes)
