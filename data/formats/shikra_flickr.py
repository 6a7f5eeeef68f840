"""Shikra's grounded json lines as rows of the schema.

Captions (`CWB_flickr30k_*.jsonl`): `image_id`, `boxes` (xyxy in pixels), `sentence` with `<ph_st>phrase<ph_ed>`, and
`boxes_seq`: per phrase, in order, the numbers of its boxes. Reasoning (`GPT4GEN_*.jsonl`): `img_path`, `boxes`,
`question` and `cot_with_ans` with phrases marked likewise, `question_boxes_seq` and `answer_boxes_seq`.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    check_box,
    chosen_tasks,
    clean_text,
    each_record,
    get,
    known_size,
    make_row,
    reading_order,
    stated_size,
)
from perceptiongpt.data.formats.flickr30k_entities import FLICKR_TASKS, grounded_caption_rows, mark_phrases
from perceptiongpt.data.reading import Problems, read_records, without_copies
from perceptiongpt.data.templates import render_prompt


SHIKRA_TASKS = (*FLICKR_TASKS, "grounded_vqa")


def shikra_flickr_rows(
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
    """Yield the rows of Shikra's grounded captions and questions, line by line.

    A caption makes what `flickr30k_entities_rows` makes of one, a question `grounded_vqa`.

    Args:
        root: folder with `*flickr30k*<split>*.jsonl` (Shikra's val and test lines are called `eval`) and the images
            in `flickr30k-images`.
        split: picks the file, and is what the column `split` says.
        annotations: the json lines, if they are elsewhere.
        images: the folder of images; False: rows without images, if the lines state `width` and `height`.
        tasks: any of `SHIKRA_TASKS`; default: all.
        seed, evaluation: seed of the drawn prompts and choices; True: the fixed evaluation prompts.
        limit: read only the first `limit` lines of each file.
        problems: collects bad records; None: the first one raises.
    """
    tasks = chosen_tasks(tasks, SHIKRA_TASKS, "shikra_flickr")
    root = Path(root)
    names = (split, "eval") if split in ("val", "test") else (split,)
    usual = [sorted(root.glob(f"*flickr30k*{name}*.json*")) for name in names]
    files = list(annotations or without_copies(next(filter(None, usual), ())))
    if not files:
        raise ValueError(f"{root}: there is no file *flickr30k*{split}*.jsonl")
    finder = ImageFinder(images, root / "flickr30k-images", root / "flickr30k_images", root / "images", root)
    draw = Draw("shikra_flickr", seed, evaluation)

    def make(numbered) -> Iterator[dict]:
        number, record = numbered
        if "image_id" in record:
            image_id = str(get(record, "image_id", of=(int, str))).removesuffix(".jpg")
            name = f"{image_id}.jpg"
        else:
            name = get(record, "img_path", "image", of=str)
            image_id = Path(name).stem
        columns = finder.columns(name, size=stated_size(record))
        columns |= {"source": "shikra_flickr", "image_id": image_id, "split": split}
        boxes = get(record, "boxes", of=list)
        boxes = [check_box(box, known_size(columns), f"box {index}") for index, box in enumerate(boxes)]
        if "sentence" in record:
            pieces, groups = _read_marked(record, "sentence", "boxes_seq", boxes)
            line_draw = Draw(f"shikra_flickr {number}", seed, evaluation)
            yield from grounded_caption_rows([pieces], groups, columns, tasks, line_draw)
        elif "grounded_vqa" in tasks:
            question, slots = mark_phrases(*_read_marked(record, "question", "question_boxes_seq", boxes))
            answer, answer_slots = mark_phrases(*_read_marked(record, "cot_with_ans", "answer_boxes_seq", boxes))
            prompt = render_prompt("grounded_vqa", question, draw(image_id, number))
            yield make_row("grounded_vqa", [Turn(prompt, answer, slots + answer_slots)], columns)

    for path in files:
        records = enumerate(read_records(path, problems=problems))
        numbered = ((where, (number, record)) for number, (where, record) in records)
        yield from each_record(islice(numbered, limit), make, problems)


def _read_marked(record: dict, text_key: str, groups_key: str, boxes: list) -> tuple[list, dict[str, list]]:
    """(pieces of the text, boxes per phrase) for `grounded_caption_rows`; phrases are named by their number."""
    text, groups = clean_text(get(record, text_key), text_key), record.get(groups_key) or []
    parts = re.split(r"(<ph_st>|<ph_ed>)", text)
    marks = parts[1::2]
    if marks != ["<ph_st>", "<ph_ed>"] * (len(marks) // 2):
        raise ValueError(f"<ph_st> and <ph_ed> do not pair up in {text[:80]!r}")
    if not isinstance(groups, list) or len(groups) != len(marks) // 2:
        raise ValueError(f"{len(marks) // 2} phrases in {text_key!r}, but {groups_key!r} is {str(groups)[:60]}")
    pieces, named = [], {}
    for position, words in enumerate(parts[::2]):
        if position % 2 == 0:
            pieces.append((words, None))
            continue
        group = groups[position // 2]
        if not isinstance(group, list) or not all(isinstance(i, int) and 0 <= i < len(boxes) for i in group):
            raise ValueError(f"{groups_key}[{position // 2}] is {group}, expected numbers of the {len(boxes)} boxes")
        numbers = sorted(set(group))
        name = f"boxes {numbers}" if numbers else f"phrase {position // 2}"
        pieces.append((clean_text(words, "phrase"), name))
        if numbers:
            named[name] = reading_order([boxes[i] for i in numbers])
    return pieces, named
