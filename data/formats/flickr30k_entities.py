"""Flickr30k Entities (xml and txt per image) as rows of the schema.

`Sentences/<id>.txt` holds one caption a line, `[/EN#<chain>/<type>.. words]` around its phrases; `Annotations/<id>.xml`
holds the boxes of the chains, **1-based and inclusive**: 1 is subtracted from all four numbers. An object may belong to
several chains, a chain may have many boxes or none (`scene`, `nobndbox`, chain 0).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

from perceptiongpt.configuration_perceptiongpt import PHRASE_END_TOKEN, PHRASE_START_TOKEN, VIS_TOKEN
from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    check_box,
    chosen_tasks,
    clean_text,
    inside_sentence,
    make_row,
    reading_order,
    usual_files,
)
from perceptiongpt.data.reading import Problems, open_file, open_members
from perceptiongpt.data.templates import render_prompt, render_turn


FLICKR_TASKS = ("spotting_caption", "caption", "refer", "region_caption", "dialogue")
PHRASE = re.compile(r"\[/EN#(\d+)((?:/[^\s\]/]+)+)\s+([^\[\]]*)\]")


def flickr30k_entities_rows(
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
    leave_out_unrelated: bool = False,
) -> Iterator[dict]:
    """Yield the rows of one split of Flickr30k Entities, image by image.

    Per caption: `spotting_caption` (phrases with boxes marked, the others plain) and `caption`. Per chain with boxes
    whose phrase no other chain of the image has: `refer` (all its boxes) and, with a single box, `region_caption`.
    Per image: a `dialogue`, the first grounded caption followed by questions about its phrases.

    Args:
        root: folder with `Annotations`, `Sentences`, `train.txt`, `val.txt`, `test.txt` and the images in
            `flickr30k-images`. What the two folders lack is looked for in `annotations.zip` or an archive
            `Flickr30kEntities_<split>.*` beside them.
        split: `train`, `val` or `test`, or the name of another list `<split>.txt`. Without any list: everything.
        annotations: archives or folders with the xml and txt files, and split lists, if they are elsewhere.
        images: the folder of images; False: rows without images.
        tasks: any of `FLICKR_TASKS`; default: all.
        seed, evaluation: seed of the drawn prompts and choices; True: the fixed evaluation prompts.
        limit: read only the first `limit` images.
        problems: collects bad records; None: the first one raises.
        leave_out_unrelated: leave out the captions listed in `UNRELATED_CAPTIONS`.
    """
    problems = problems or Problems()
    tasks = chosen_tasks(tasks, FLICKR_TASKS, "flickr30k_entities")
    root = Path(root)
    given = [Path(path) for path in annotations or ()]
    lists = [path for path in given if ".txt" in path.name]
    lists = [path for path in lists if path.name.startswith(split)] or lists or usual_files(root, [f"{split}.txt"])
    archives = [path for path in given if path not in lists] or [
        root,
        *usual_files(root, ["annotations"]),
        *sorted(root.glob(f"Flickr30kEntities*_{split}.*")),
    ]
    names = _read_list(lists[0]) if lists else None
    if names is None and usual_files(root, ["train.txt", "val.txt", "test.txt"]):
        raise ValueError(f"{root}: there is no list {split}.txt of the images of this split")
    texts = _read_texts(archives, names)
    if not texts:
        raise ValueError(f"no Sentences/<id>.txt of the split {split!r} in {', '.join(map(str, archives))}")
    names = list(texts) if names is None else names
    problems.leave_out("on the split's list, but without annotations", sum(name not in texts for name in names))
    unrelated = _read_unrelated(root) if leave_out_unrelated else set()
    finder = ImageFinder(images, root / "flickr30k-images", root / "flickr30k_images", root / "images", root)
    draw = Draw("flickr30k_entities", seed, evaluation)

    for name in [name for name in names if name in texts][:limit]:
        try:
            if missing := {"xml", "txt"} - set(texts[name]):
                raise ValueError(f"there is no {missing.pop()} file")
            size, boxes = _read_xml(texts[name]["xml"])
            captions = _read_sentences(texts[name]["txt"])
            columns = finder.columns(f"{name}.jpg", size=size)
        except ValueError as error:
            problems.report(f"{archives[0]}: image {name}", error)
            continue
        related = [caption for number, caption in enumerate(captions, 1) if (name, number) not in unrelated]
        problems.leave_out("caption listed in UNRELATED_CAPTIONS", len(captions) - len(related))
        columns |= {"source": "flickr30k_entities", "image_id": name, "split": split}
        yield from grounded_caption_rows(related, boxes, columns, tasks, draw)


def grounded_caption_rows(
    captions: list[list[tuple[str, str | None]]],
    boxes: dict[str, list],
    columns: dict,
    tasks: Iterable[str],
    draw: Draw,
) -> Iterator[dict]:
    """The rows of one image with grounded captions.

    Args:
        captions: each a list of (text, name of what it refers to, or None), which put together are the caption.
        boxes: xyxy in pixels of the things that have any.
        columns, tasks, draw: as for every row.
    """
    image_id = columns["image_id"]
    turns = []
    for number, pieces in enumerate(captions):
        generator = draw(image_id, "caption", number)
        answer, slots = mark_phrases(pieces, boxes)
        turn = Turn(*render_turn("spotting_caption", "", answer, generator), slots)
        turns += [turn] if slots else []
        if "spotting_caption" in tasks and slots:
            yield make_row("spotting_caption", [turn], columns)
        if "caption" in tasks:
            plain = "".join(text for text, _ in pieces)
            yield make_row("caption", [Turn(*render_turn("caption", "", plain, generator))], columns)

    named = [(inside_sentence(text), name) for pieces in captions for text, name in pieces if name]
    meanings = Counter(key for key, _ in {(phrase.lower(), name) for phrase, name in named})
    asked, questions = set(), []
    for phrase, name in named:
        if name not in boxes or meanings[phrase.lower()] > 1 or phrase.lower() in asked:
            continue
        asked.add(phrase.lower())
        slots = [(box, None) for box in boxes[name]]
        refer = Turn(render_prompt("refer", phrase, draw(image_id, "refer", phrase)), VIS_TOKEN * len(slots), slots)
        questions.append(refer)
        if "refer" in tasks:
            yield make_row("refer", [refer], columns)
        if len(slots) == 1:
            region = Turn(*render_turn("region_caption", "", phrase, draw(image_id, "region", phrase)), slots)
            questions.append(region)
            if "region_caption" in tasks:
                yield make_row("region_caption", [region], columns)
    if "dialogue" in tasks and turns and questions:
        chosen = draw.always(image_id, "dialogue").permutation(len(questions))[:3]
        yield make_row("dialogue", [turns[0], *(questions[i] for i in chosen)], columns)


def mark_phrases(pieces: list[tuple[str, str | None]], boxes: dict[str, list]) -> tuple[str, list]:
    """Pieces of a caption -> "<p>a dog</p><vis> barks", and its slots."""
    words, slots = [], []
    for text, name in pieces:
        if found := boxes.get(name):
            text = f"{PHRASE_START_TOKEN}{text}{PHRASE_END_TOKEN}{VIS_TOKEN * len(found)}"
            slots += [(box, None) for box in found]
        words.append(text)
    return "".join(words), slots


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_list(path: Path) -> list[str]:
    with open_file(path) as stream:
        return stream.read().decode("utf-8-sig").split()


def _read_unrelated(root: Path) -> set[tuple[str, int]]:
    """(image, number of the sentence from 1) of captions that do not describe their image."""
    files = usual_files(root, ["UNRELATED_CAPTIONS"])
    if not files:
        raise ValueError(f"{root}: there is no file UNRELATED_CAPTIONS")
    with open_file(files[0]) as stream:
        lines = [line.split() for line in stream.read().decode("utf-8").splitlines() if not line.startswith("#")]
    return {(line[0], int(line[1])) for line in lines if len(line) == 2 and line[1].isdigit()}


def _read_texts(sources: list[Path], names: list[str] | None) -> dict[str, dict[str, bytes]]:
    """{image: {"xml": .., "txt": ..}} of the wanted images; the first source that has a file counts."""
    wanted, texts = None if names is None else set(names), {}
    for source in sources:
        if source.is_dir():
            inner = [source / folder for folder in ("Annotations", "Sentences") if (source / folder).is_dir()]
            files = ((path.name, path) for folder in inner or [source] for path in sorted(folder.iterdir()))
        else:
            files = open_members(source, "*.[xt][mx][lt]")
        for name, content in files:
            stem, _, kind = PurePosixPath(name).name.rpartition(".")
            if kind in ("xml", "txt") and stem.isdigit() and (wanted is None or stem in wanted):
                found = texts.setdefault(stem, {})
                if kind not in found:
                    found[kind] = content.read_bytes() if isinstance(content, Path) else content
    return texts


def _read_xml(content: bytes) -> tuple[tuple[int, int], dict[str, list[list[float]]]]:
    """((width, height), {chain: its boxes from left to right})."""
    try:
        if b"<!ENTITY" in content:
            raise ValueError("the xml defines entities, which no annotation does")
        tree = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise ValueError(f"truncated or broken xml: {error}") from error
    size = _number(tree, "size/width"), _number(tree, "size/height")
    boxes = defaultdict(list)
    for element in tree.iter("object"):
        names = [(name.text or "").strip() for name in element.findall("name")]
        if not names or not all(name.isdigit() for name in names):
            raise ValueError(f"an object has the names {names}, expected numbers of chains")
        if element.find("bndbox") is None:
            if element.find("scene") is None and element.find("nobndbox") is None:
                raise ValueError(f"the object of chain {names[0]} has neither bndbox nor scene nor nobndbox")
            continue
        corners = [_number(element, f"bndbox/{key}") - 1 for key in ("xmin", "ymin", "xmax", "ymax")]
        box = check_box(corners, size, f"box of chain {names[0]}, less 1,")
        for name in dict.fromkeys(names):
            boxes[name].append(box)
    return size, {name: reading_order(found) for name, found in boxes.items()}


def _number(element, path: str) -> int:
    text = (element.findtext(path) or "").strip()
    if not re.fullmatch(r"-?\d+", text):
        raise ValueError(f"{path} is {text!r}, expected a whole number")
    return int(text)


def _read_sentences(content: bytes) -> list[list[tuple[str, str | None]]]:
    """Per caption its pieces in order: (words, chain or None)."""
    try:
        lines = [" ".join(line.split()) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"the sentences are not UTF-8 text: {error}") from error
    if not lines:
        raise ValueError("there are no sentences")
    captions = []
    for number, line in enumerate(lines, 1):
        clean_text(line, f"sentence {number}")
        pieces, end = [], 0
        for match in PHRASE.finditer(line):
            pieces += [(line[end : match.start()], None), (clean_text(match[3], "phrase"), match[1])]
            end = match.end()
        pieces.append((line[end:], None))
        if any("[/EN" in text for text, _ in pieces):
            raise ValueError(f"sentence {number}: a phrase is not [/EN#chain/type words]: {line[:80]!r}")
        captions.append(pieces)
    return captions
