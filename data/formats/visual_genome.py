"""Visual Genome: region descriptions, objects and questions (v1.0, v1.2, v1.4) as rows of the schema.

Files (json, plain or packed; told apart by their content): `region_descriptions` (a box and a phrase each: `refer`,
`region_caption`, `dialogue`), `objects` (a box and names each: `refer`, `detect`), `question_answers` (`vqa`; where the
objects of question or answer are given with boxes, `region_vqa` and `grounded_vqa`) and `image_data` (sizes).
All are streamed image by image. Regions have `width` and `height`, objects `w` and `h`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath

from perceptiongpt.configuration_perceptiongpt import PHRASE_END_TOKEN, PHRASE_START_TOKEN, VIS_TOKEN
from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    box_from_xywh,
    check_box,
    chosen_tasks,
    clean_text,
    each_record,
    get,
    inside_sentence,
    known_size,
    make_row,
)
from perceptiongpt.data.reading import (
    Problems,
    is_archive,
    member_names,
    open_file,
    read_json,
    stream_json_array,
    until_broken,
)
from perceptiongpt.data.templates import render_prompt, render_turn


KINDS = {"regions": "region_descriptions", "objects": "objects", "qas": "question_answers", "url": "image_data"}
TASKS = {
    "regions": ("refer", "region_caption", "dialogue"),
    "objects": ("refer", "detect"),
    "qas": ("vqa", "region_vqa", "grounded_vqa"),
}
DIALOGUE_TURNS = 4


def visual_genome_rows(
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
    split_file: str | Path | None = None,
) -> Iterator[dict]:
    """Yield the rows of Visual Genome, image by image, file after file.

    A phrase that occurs twice in an image makes no `refer` row. `detect` asks for the objects that are listed, and
    Visual Genome does not list every one.

    Args:
        root: folder with `region_descriptions.json`, `objects.json`, `question_answers.json`, `image_data.json` (also
            packed, or with a version in the name; of several versions, the files go to `annotations`) and the images
            in `VG_100K` and `VG_100K_2`.
        split: what the column `split` says; with `split_file`, the split to take.
        annotations: the files, if they are elsewhere; those that are given are used, no others.
        images: the folder of images; False: rows without images, sizes from `image_data`.
        tasks: any of `TASKS` that the files offer; default: all.
        seed, evaluation: seed of the drawn prompts and choices; True: the fixed evaluation prompts.
        limit: read only the first `limit` images of each file.
        problems: collects bad records; None: the first one raises.
        split_file: json {split: [image ids]} (as DenseCap's `densecap_splits.json`): Visual Genome has no splits.
    """
    problems = problems or Problems()
    files = defaultdict(list)
    for path in list(annotations or _usual_files(Path(root))):
        for kind, member in _kinds(Path(path)):
            files[kind].append((Path(path), member))
    offered = dict.fromkeys(task for kind in TASKS if kind in files for task in TASKS[kind])
    if not offered:
        names = ", ".join(name for kind, name in KINDS.items() if kind != "url")
        raise ValueError(f"{root}: no Visual Genome file there; looked for {names}")
    tasks = chosen_tasks(tasks, offered, "visual_genome")
    known = _read_image_data(files["url"], problems)
    wanted = None if split_file is None else _read_split(split_file, split)
    finder = ImageFinder(images, *(Path(root) / name for name in ("VG_100K", "VG_100K_2", "images", "images2", "")))
    draw = Draw("visual_genome", seed, evaluation)
    makers = {"regions": _region_rows, "objects": _object_rows, "qas": _question_rows}

    for kind, make in makers.items():
        if not set(tasks) & set(TASKS[kind]):
            continue
        for path, member in files[kind]:
            taken = 0
            for where, record in _stream(path, member, problems):
                if limit is not None and taken >= limit:
                    break
                try:
                    image_id = _image_id(record)
                    if wanted is not None and image_id not in wanted:
                        continue
                    entries = get(record, kind, of=list)
                    columns = finder.columns(f"{image_id}.jpg", f"{image_id}.png", size=known.get(image_id))
                except ValueError as error:
                    problems.report(where, error)
                    continue
                taken += 1
                columns |= {"source": "visual_genome", "image_id": str(image_id), "split": split}
                yield from make(entries, columns, tasks, draw, problems, where)


# ---- files -----------------------------------------------------------------------------------------------------------


def _usual_files(root: Path) -> list[Path]:
    """The file of each kind; `ValueError` if there are several, such as two versions of Visual Genome."""
    found = []
    for name in KINDS.values():
        candidates = [path for path in sorted(root.glob(f"{name}*")) if ".json" in path.name or is_archive(path)]
        if len(candidates) > 1:
            listed = ", ".join(path.name for path in candidates)
            raise ValueError(f"{root}: holds {listed}; say with --annotations which files to read")
        found += candidates
    return found


def _kinds(path: Path) -> Iterator[tuple[str, str]]:
    """(kind, member) of each json file in `path`; a plain file is its own member."""
    members = [PurePosixPath(name).name for name in member_names(path) if name.endswith(".json")] or ["*"]
    for member in members:
        first = next((record for _, record in _stream(path, member, Problems())), None)
        kind = next((kind for kind in KINDS if isinstance(first, dict) and kind in first), None)
        if first is not None and kind is None:
            keys = ", ".join(KINDS)
            raise ValueError(f"{path}: its first record is {str(first)[:80]}; expected one with a key of {keys}")
        if kind:
            yield kind, member


def _stream(path: Path, member: str, problems: Problems) -> Iterator[tuple[str, dict]]:
    with open_file(path, member) as stream:
        for number, record in enumerate(until_broken(stream_json_array(stream), path, problems)):
            yield f"{path}: record {number}", record


def _image_id(record: dict) -> int:
    """The id in an image's record: v1.0 and v1.2 name it differently, and some versions keep it in the regions."""
    if not isinstance(record, dict) or "image_id" in record or "id" in record:
        return get(record, "image_id", "id", of=int)
    entries = chain.from_iterable(record[kind] for kind in TASKS if isinstance(record.get(kind), list))
    return get(next(entries, {}), "image_id", "image", of=int)


def _read_image_data(files, problems: Problems) -> dict[int, tuple[int, int]]:
    sizes = {}
    for path, member in files:
        for where, record in _stream(path, member, problems):
            try:
                sizes[_image_id(record)] = get(record, "width", of=int), get(record, "height", of=int)
            except ValueError as error:
                problems.report(where, error)
    return sizes


def _read_split(path: str | Path, split: str) -> set[int]:
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(split), list):
        raise ValueError(f"{path}: there is no list under {split!r}; expected {{split: [image ids]}}")
    return set(content[split])


# ---- rows ------------------------------------------------------------------------------------------------------------


def _region_rows(entries, columns, tasks, draw, problems, where) -> Iterator[dict]:
    image_id = columns["image_id"]

    def read(region) -> list[tuple]:
        number = get(region, "region_id", "id", of=int)
        values = [get(region, key, of=(int, float)) for key in ("x", "y", "width", "height")]
        box = box_from_xywh(values, known_size(columns), f"region {number}")
        return [(number, clean_text(get(region, "phrase"), f"phrase of region {number}"), box)]

    regions = list(each_record(((f"{where}, image {image_id}", entry) for entry in entries), read, problems))
    counts = defaultdict(int)
    for _, phrase, _ in regions:
        counts[inside_sentence(phrase).lower()] += 1
    unique = {number for number, phrase, _ in regions if counts[inside_sentence(phrase).lower()] == 1}

    def refer(number: int, phrase: str, box: list[float]) -> Turn:
        prompt = render_prompt("refer", inside_sentence(phrase), draw(image_id, "refer", number))
        return Turn(prompt, VIS_TOKEN, [(box, None)])

    def caption(number: int, phrase: str, box: list[float]) -> Turn:
        return Turn(*render_turn("region_caption", "", phrase, draw(image_id, "caption", number)), [(box, None)])

    for region in regions:
        if "refer" in tasks and region[0] in unique:
            yield make_row("refer", [refer(*region)], columns)
        if "region_caption" in tasks:
            yield make_row("region_caption", [caption(*region)], columns)
    if "dialogue" in tasks:
        spoken_of = [region for region in regions if region[0] in unique]
        generator = draw.always(image_id, "dialogue")
        order = [spoken_of[i] for i in generator.permutation(len(spoken_of))]
        for start in range(0, len(order) - 1, DIALOGUE_TURNS):
            turns = [
                (refer if generator.integers(2) else caption)(*one) for one in order[start : start + DIALOGUE_TURNS]
            ]
            if len(turns) > 1:
                yield make_row("dialogue", turns, columns)


def _object_rows(entries, columns, tasks, draw, problems, where) -> Iterator[dict]:
    image_id = columns["image_id"]

    def read(entry) -> list[tuple]:
        number = get(entry, "object_id", "id", of=int)
        return [(_name(entry, f"object {number}"), _object_box(entry, columns, f"object {number}"))]

    by_name = defaultdict(list)
    for name, box in each_record(((f"{where}, image {image_id}", entry) for entry in entries), read, problems):
        if box not in by_name[name]:
            by_name[name].append(box)
    for name, boxes in by_name.items():
        if "refer" in tasks and len(boxes) == 1:
            prompt = render_prompt("refer", f"the {name}", draw(image_id, "object", name))
            yield make_row("refer", [Turn(prompt, VIS_TOKEN, [(boxes[0], None)])], columns)
        if "detect" in tasks:
            prompt = render_prompt("detect", name, draw(image_id, "detect", name))
            slots = [(box, None) for box in sorted(boxes)]
            yield make_row("detect", [Turn(prompt, VIS_TOKEN * len(slots), slots)], columns)


def _question_rows(entries, columns, tasks, draw, problems, where) -> Iterator[dict]:
    image_id = columns["image_id"]

    def make(entry) -> Iterator[dict]:
        number = get(entry, "qa_id", "id", of=int)
        question = clean_text(get(entry, "question"), f"question {number}")
        answer = clean_text(get(entry, "answer"), f"answer to question {number}")
        asked, answered = (_named_boxes(entry.get(key), columns, number) for key in ("q_objects", "a_objects"))
        if "vqa" in tasks:
            yield make_row("vqa", [Turn(*render_turn("vqa", question, answer, draw(image_id, "vqa", number)))], columns)
        if "region_vqa" in tasks and len(asked) == 1 and len(slots := next(iter(asked.values()))) == 1:
            texts = render_turn("region_vqa", question, answer, draw(image_id, "region_vqa", number))
            yield make_row("region_vqa", [Turn(*texts, slots)], columns)
        grounds = answered or asked
        if "grounded_vqa" in tasks and grounds:
            prompt = draw(image_id, "grounded_vqa", number)
            marked = _mark_in_place(answer, answered)
            if marked is not None:
                turn = Turn(render_prompt("grounded_vqa", question, prompt), *marked)
            else:
                evidence = " and ".join(
                    f"{PHRASE_START_TOKEN}{name}{PHRASE_END_TOKEN}{VIS_TOKEN * len(slots)}"
                    for name, slots in grounds.items()
                )
                texts = render_turn("grounded_vqa", question, answer, prompt, evidence)
                turn = Turn(*texts, [slot for slots in grounds.values() for slot in slots])
            yield make_row("grounded_vqa", [turn], columns)

    yield from each_record(((f"{where}, image {image_id}", entry) for entry in entries), make, problems)


def _named_boxes(objects, columns: dict, number: int) -> dict[str, list]:
    """The objects of a question or an answer that come with a box: {name: slots}."""
    by_name = defaultdict(list)
    if objects is not None and not isinstance(objects, list):
        raise ValueError(f"the objects of question {number} are {str(objects)[:60]}, expected a list")
    for entry in objects or ():
        if isinstance(entry, dict) and "x" in entry:
            what = f"object of question {number}"
            box = _object_box(entry, columns, what)
            name = _name(entry, what)
            if (box, None) not in by_name[name]:
                by_name[name].append((box, None))
    return {name: sorted(slots, key=lambda slot: slot[0]) for name, slots in by_name.items()}


def _mark_in_place(answer: str, objects: dict[str, list]) -> tuple[str, list] | None:
    """The answer with its objects' names marked in it, and the slots; None if a name does not occur in it."""
    found = []
    for name, slots in objects.items():
        match = re.search(rf"\b{re.escape(name)}\b", answer, re.IGNORECASE)
        if match is None:
            return None
        found.append((match.start(), match.end(), slots))
    found.sort(key=lambda item: item[:2])
    if not found or any(first[1] > second[0] for first, second in zip(found, found[1:])):
        return None
    for start, end, slots in reversed(found):
        marked = f"{PHRASE_START_TOKEN}{answer[start:end]}{PHRASE_END_TOKEN}{VIS_TOKEN * len(slots)}"
        answer = answer[:start] + marked + answer[end:]
    return answer, [slot for _, _, slots in found for slot in slots]


def _object_box(entry: dict, columns: dict, what: str) -> list[float]:
    x, y = (get(entry, key, of=(int, float)) for key in ("x", "y"))
    width, height = (get(entry, *keys, of=(int, float)) for keys in (("w", "width"), ("h", "height")))
    return check_box([x, y, x + width, y + height], known_size(columns), what)


def _name(entry: dict, what: str) -> str:
    """The first of an object's names."""
    names = get(entry, "names", "name", "entity_name", of=(list, str))
    names = [names] if isinstance(names, str) else names
    return clean_text(names[0] if names else None, f"name of {what}")
