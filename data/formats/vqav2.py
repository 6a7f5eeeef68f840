"""VQA v2 and OK-VQA (questions and, apart, annotations with ten answers each) as rows of the schema, task `vqa`."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    chosen_tasks,
    clean_text,
    each_record,
    get,
    make_row,
    usual_files,
)
from perceptiongpt.data.reading import Problems, open_file, read_records
from perceptiongpt.data.templates import render_prompt, render_turn


SUBTYPES = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
VQAV2_FILES = (
    ("v2_OpenEnded_mscoco_{}_questions.json", "v2_Questions_{}_mscoco"),
    ("v2_mscoco_{}_annotations.json", "v2_Annotations_{}_mscoco"),
)
OKVQA_FILES = (("OpenEnded_mscoco_{}_questions.json",), ("mscoco_{}_annotations.json",))


def vqav2_rows(
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
    """Yield one row per question, answered with the most frequent answer (of equals, the first).

    Args:
        root: folder with `v2_OpenEnded_mscoco_train2014_questions.json`, `v2_mscoco_train2014_annotations.json` (also
            packed, or in `annotations`) and the images in `train2014`, `val2014`, `test2015`.
        split: `train`, `val`, `test` or `test-dev`.
        annotations: the files, if they are elsewhere; questions and annotations are told apart by what they hold. With
            questions alone (a test split), rows end with the question.
        images: the folder of images, or of COCO's folders of images; False: rows without images.
        tasks: `vqa`.
        seed, evaluation: seed of the drawn prompts; True: the fixed evaluation prompt, and two more
            keys in each row: `answers`, what each person said, and `question_id`.
        limit: read only the first `limit` questions.
        problems: collects bad records; None: the first one raises.
    """
    return _vqa_rows("vqav2", VQAV2_FILES, root, split, annotations, images, tasks, seed, evaluation, limit, problems)


def okvqa_rows(
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
    """Yield the rows of OK-VQA, as `vqav2_rows` does for VQA v2.

    Args:
        root: folder with `OpenEnded_mscoco_train2014_questions.json`, `mscoco_train2014_annotations.json` (also packed,
            or in `annotations`) and the images in `train2014`, `val2014`.
        split: `train` or `val`.
        Others: as in `vqav2_rows`.
    """
    return _vqa_rows("okvqa", OKVQA_FILES, root, split, annotations, images, tasks, seed, evaluation, limit, problems)


def most_given_answer(annotation: dict) -> str:
    """`multiple_choice_answer`, or else the most frequent of `answers` that is not blank, of equals the first."""
    if "multiple_choice_answer" in annotation:
        return clean_text(get(annotation, "multiple_choice_answer"), "multiple_choice_answer")
    given = [get(answer, "answer") for answer in get(annotation, "answers", of=list)]
    answers = [clean_text(answer, "answer") for answer in given if answer.strip()]  # OK-VQA has blank ones
    if not answers:
        raise ValueError("there are no answers")
    return Counter(answers).most_common(1)[0][0]


def _vqa_rows(
    source, names, root, split, annotations, images, tasks, seed, evaluation, limit, problems
) -> Iterator[dict]:
    problems = problems or Problems()
    chosen_tasks(tasks, ["vqa"], source)
    root = Path(root)
    subtype = SUBTYPES.get(split, split)
    if annotations is None:
        fills = (subtype, split.capitalize())
        annotations = [usual_files(root, [name.format(fill) for name, fill in zip(part, fills)])[:1] for part in names]
        annotations = [path for found in annotations for path in found]
    files = {"questions": [], "annotations": []}
    for path in annotations:
        files[_kind(Path(path))].append(path)
    if not files["questions"]:
        raise ValueError(
            f"{root}: there is no {names[0][0].format(subtype)}; give them with --annotations QUESTIONS ANNOTATIONS"
        )
    answers = {}

    def read(annotation) -> list:
        ten = get(annotation, "answers", of=list) if evaluation and "answers" in annotation else []
        given = [get(answer, "answer") for answer in ten]
        answers[get(annotation, "question_id", of=(int, str))] = most_given_answer(annotation), given
        return []

    for path in files["annotations"]:
        list(each_record(read_records(path, "annotations", problems=problems), read, problems))
    finder = ImageFinder(images, root, root / "images")
    draw = Draw(source, seed, evaluation)

    def make(record) -> list[dict]:
        number, image_id = get(record, "question_id", of=(int, str)), get(record, "image_id", of=int)
        question = clean_text(get(record, "question"), f"question {number}")
        if files["annotations"] and number not in answers:
            raise ValueError(f"question {number} has no annotation")
        folder = re.sub(r"-dev", "", subtype)
        columns = finder.columns(f"{folder}/COCO_{folder}_{image_id:012d}.jpg", coco_id=image_id)
        columns |= {"source": source, "image_id": str(image_id), "split": split}
        generator = draw(image_id, number)
        if files["annotations"]:
            answer, given = answers[number]
            turn = Turn(*render_turn("vqa", question, answer, generator))
        else:
            turn, given = Turn(render_prompt("vqa", question, generator), None), []
        row = make_row("vqa", [turn], columns)
        return [row | {"answers": given, "question_id": number} if evaluation else row]

    for path in files["questions"]:
        yield from each_record(islice(read_records(path, "questions", problems=problems), limit), make, problems)


def _kind(path: Path) -> str:
    """Whether a file holds `questions` or `annotations`, by its first keys, or those of its first record."""
    with open_file(path) as stream:
        head = stream.read(1 << 16).decode("utf-8", errors="replace")
    found = re.search(r'"(questions|annotations)"\s*:\s*\[', head)
    if found:
        return found[1]
    if re.match(r"\s*\[", head):
        return "annotations" if '"answers"' in head else "questions"
    raise ValueError(f"{path}: there is no list under 'questions' or 'annotations'")
