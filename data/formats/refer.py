"""RefCOCO, RefCOCO+ and RefCOCOg in the form of the REFER toolkit: refs (a pickle or a json list) beside a COCO
instances file.

A ref's `file_name` does not name an image (its end numbers the object); `image_id` does. Every sentence of a ref makes
one row, also where the same text names two objects of an image.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path, PurePosixPath

from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    box_from_xywh,
    chosen_tasks,
    clean_text,
    get,
    known_size,
    make_row,
    stated_size,
)
from perceptiongpt.data.formats.coco import segmentation_to_rle
from perceptiongpt.data.reading import (
    Problems,
    is_archive,
    load_plain_pickle,
    member_names,
    open_file,
    read_json,
    stream_json_array,
    until_broken,
    without_copies,
)
from perceptiongpt.data.templates import render_prompt, render_turn


REFER_TASKS = ("refer", "box_to_mask", "region_caption")
SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "grefcoco": "unc"}  # what the field reports on
SPLIT_NAMES = {"validation": "val", "valid": "val", "testa": "testA", "testb": "testB"}
IMAGE_FOLDERS = ("", "images", "images/mscoco/images", "images/mscoco", "mscoco", "coco", "coco/images")
PICKLE_NAME = re.compile(r"\.(p|pkl|pickle)(\.\w+)*$", re.IGNORECASE)


def refer_rows(
    root: str | Path,
    *,
    split: str | None = "train",
    annotations: Iterable[str | Path] | None = None,
    images: str | Path | bool | None = None,
    tasks: Iterable[str] | None = None,
    seed: int = 0,
    evaluation: bool = False,
    limit: int | None = None,
    problems: Problems | None = None,
    dataset: str | None = None,
    split_by: str | None = None,
) -> Iterator[dict]:
    """Yield the rows of RefCOCO, RefCOCO+ or RefCOCOg.

    Args:
        root: folder with `<dataset>/refs(<split_by>).p` and `<dataset>/instances.json`, or these two files
            themselves, or `<dataset>.zip`. The refs may also be a json list of the same records.
        split: train, val, test, testA or testB, as the refs say; None: all.
        annotations: refs and instances files that are elsewhere; without instances these are looked for beside the
            refs, without refs these are looked for under `root`.
        images: folder of the COCO images, under their 2014 or 2017 names, in `train2014` and the like or directly.
            False: no images; `image` is None.
        tasks: any of `REFER_TASKS`; by default `refer` alone, one row per sentence. `box_to_mask` gives one row per
            ref, `region_caption` one per sentence.
        seed, evaluation: seed of the drawn prompts; True: the fixed evaluation prompt.
        limit: at most this many rows.
        problems: collects bad records; None: the first one raises.
        dataset: refcoco, refcoco+ or refcocog.
        split_by: unc, google or umd; by default the one that the field reports on.

    Raises:
        ValueError: for files that are missing, broken or ambiguous, and through `problems` for single records.
    """
    problems = problems or Problems()
    tasks = chosen_tasks(tasks or ("refer",), REFER_TASKS, "refer")
    draw = Draw("refer", seed, evaluation)

    def rows_of(where: str, ref: dict, found: dict, columns: dict) -> Iterator[dict]:
        annotation = ref["ann"] if isinstance(ref.get("ann"), dict) else found.get(ref["ann_id"])
        if annotation is None:
            raise ValueError(f"annotation {ref['ann_id']!r} is not in the instances file")
        target = read_target(annotation, ref["image_id"], columns)
        for key, phrase in read_sentences(where, ref, problems):
            key = (columns["image_id"], ref["ann_id"], *key)
            if "refer" in tasks:
                yield expression_row(phrase, [target], columns, draw("refer", *key))
            if "region_caption" in tasks:
                yield _caption_row(phrase, target, columns, draw("region_caption", *key))
        if "box_to_mask" in tasks and target[1]:
            generator = draw("box_to_mask", columns["image_id"], ref["ann_id"])
            turn = Turn(render_prompt("box_to_mask", "", generator), VIS_TOKEN, [(target[0], None), target])
            yield make_row("box_to_mask", [turn], columns)

    files = (root, annotations, dataset, split_by)
    yield from islice(ref_rows("refer", rows_of, _target_id, files, split, images, problems), limit)


# ---- what the sources of expressions share ---------------------------------------------------------------------------


def expression_row(phrase: str, targets: list[tuple], columns: dict, generator) -> dict:
    """A `refer` row with a `<vis>` per target (box, mask), by x0, then y0; a `no_target` row without targets."""
    prompt = render_prompt("refer", phrase, generator)
    if not targets:
        return make_row("no_target", [Turn(prompt, f"There is no {without_article(phrase)}.")], columns)
    targets = sorted(targets, key=lambda target: target[0][:2])
    return make_row("refer", [Turn(prompt, VIS_TOKEN * len(targets), targets)], columns)


def read_phrase(text) -> str:
    """An expression on one line, without a full stop at its end (the prompts add one)."""
    return clean_text(clean_text(text, "expression").rstrip(". "), "expression")


def without_article(phrase: str) -> str:
    """The phrase as it stands in "There is no ..."."""
    return re.sub(r"^(the|an?)\s+(?=\S)", "", phrase, flags=re.IGNORECASE)


def find_split(split: str | None) -> str | None:
    """The RefCOCO family's own name of a split ("val" for "validation")."""
    return SPLIT_NAMES.get(split.lower(), split) if isinstance(split, str) else split


def is_integer(value) -> bool:
    """Whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _caption_row(phrase: str, target: tuple, columns: dict, generator) -> dict:
    box, mask = target
    given = 0 if generator is None or mask is None else generator.integers(3)
    slot = ((box, None), (None, mask), (box, mask))[given]
    return make_row("region_caption", [Turn(*render_turn("region_caption", "", phrase, generator), [slot])], columns)


# ---- REFER records ---------------------------------------------------------------------------------------------------


def read_target(annotation: dict, image_id: int, columns: dict) -> tuple[list[float], dict | None]:
    """(xyxy box, mask) of a COCO annotation on the image of `columns`; the mask is None if it covers no pixel."""
    if annotation.get("image_id", image_id) != image_id:
        raise ValueError(f"annotation {annotation.get('id')!r} belongs to image {annotation['image_id']!r}")
    name = f"annotation {annotation.get('id')!r}"
    width, height = known_size(columns)
    box = box_from_xywh(get(annotation, "bbox", of=list), (width, height), name)
    return box, segmentation_to_rle(get(annotation, "segmentation", of=(list, dict)), height, width, name)


def read_sentences(where: str, ref: dict, problems: Problems) -> Iterator[tuple[tuple, str]]:
    """(key, text) per sentence of a ref."""
    problems.leave_out("ref without a sentence", not ref["sentences"])
    for number, sentence in enumerate(ref["sentences"]):
        try:
            yield (sentence.get("sent_id"), number), read_phrase(get(sentence, "sent", "raw"))
        except ValueError as error:
            problems.report(f"{where}, sentence {number}", str(error))


def ref_rows(
    source: str,
    rows_of: Callable[[str, dict, dict, dict], Iterator[dict]],
    ids_of: Callable[[dict], list[int]],
    files: tuple,
    split: str | None,
    images: str | Path | bool | None,
    problems: Problems,
) -> Iterator[dict]:
    """The rows that `rows_of(where, ref, annotations by id, columns)` makes of each ref of a split.

    Args:
        ids_of: the annotation ids of a ref, which it checks.
        files: root, annotations, dataset, split_by of `refer_rows`.
    """
    root, _, dataset, split_by = files
    split = find_split(split)
    ref_files, instances_files = locate(*files)
    refs, seen, there = [], Counter(), Counter()
    for path, member in ref_files:
        for where, ref in read_refs(path, member, problems):
            partition = ref.get("splitBy", ref.get("dataset_partition", split_by))
            there[f"{ref.get('dataset', dataset)} by {partition}"] += 1
            if dataset not in (None, ref.get("dataset", dataset)) or split_by not in (None, partition):
                continue
            own_split = find_split(ref.get("split"))
            seen[own_split if isinstance(own_split, str) else None] += 1
            if split is not None and isinstance(own_split, str) and own_split != split:
                continue
            try:
                _check_ref(ref)
                refs.append((where, ref, ids_of(ref)))
            except ValueError as error:
                problems.report(where, str(error))
    if not refs and (split is None or not seen[split]):
        names = ", ".join(str(path) for path, _ in ref_files)
        if there and not seen:
            asked = f"--dataset {dataset or '(any)'} --split_by {split_by or '(any)'}"
            raise ValueError(f"{names}: no refs of {asked}; found {dict(there)}")
        raise ValueError(f"{names}: no refs of split {split!r}; found {dict(seen)}")

    image_ids = {ref["image_id"] for _, ref, _ in refs}
    ann_ids = {ann_id for _, ref, ids in refs if not isinstance(ref.get("ann"), dict) for ann_id in ids}
    if ann_ids and not instances_files:
        raise ValueError(f"{root}: there is no instances.json beside the refs")
    found, records = {}, {}
    for path, member in instances_files:
        records |= _select(path, member, "images", image_ids, problems)
        found |= _select(path, member, "annotations", ann_ids, problems)

    finder = ImageFinder(images, *(Path(root) / folder for folder in IMAGE_FOLDERS))
    for where, ref, _ in refs:
        try:
            record = records.get(ref["image_id"], {})
            if instances_files and not record:
                raise ValueError(f"image {ref['image_id']!r} is not in the instances file")
            names = [record["file_name"]] if record.get("file_name") else []
            columns = finder.columns(*names, size=stated_size(record), coco_id=ref["image_id"])
            columns |= {"source": source, "image_id": str(ref["image_id"]), "split": find_split(ref["split"])}
            rows = list(rows_of(where, ref, found, columns))
        except ValueError as error:
            problems.report(where, error)
            continue
        yield from rows


def _target_id(ref: dict) -> list[int]:
    if not is_integer(ref["ann_id"]):
        raise ValueError(f"ann_id {ref['ann_id']!r} is not an integer")
    return [ref["ann_id"]]


def _check_ref(ref: dict) -> None:
    if missing := [key for key in ("image_id", "ann_id", "sentences", "split") if key not in ref]:
        raise ValueError(f"the ref lacks {missing}")
    get(ref, "split"), get(ref, "image_id", of=int)
    if not all(isinstance(sentence, dict) for sentence in get(ref, "sentences", of=list)):
        raise ValueError(f"sentences {str(ref['sentences'])[:60]} is not a list of objects")


def read_refs(path: Path, member: str, problems: Problems) -> Iterator[tuple[str, dict]]:
    """("<file>: ref <n> (ref_id <id>)", record) of a pickled or json list; `{"refs": [...]}` is read as well."""
    name = path.name if member == "*" else member
    if PICKLE_NAME.search(name):
        content = load_plain_pickle(path, member)
    else:
        with open_file(path, member) as stream:
            is_list = stream.peek(64).lstrip(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        content = stream_json_array(open_file(path, member)) if is_list else read_json(path, member)
    if isinstance(content, dict):
        content = content.get("refs", content.get("ref"))
    if isinstance(content, (dict, str)) or not isinstance(content, Iterable):
        raise ValueError(f"{path}: expected a list of refs")
    for number, ref in enumerate(until_broken(content, path, problems)):
        where = f"{path}: ref {number}"
        if isinstance(ref, dict):
            yield where if ref.get("ref_id") is None else f"{where} (ref_id {ref['ref_id']!r})", ref
        else:
            problems.report(where, f"expected an object, found {str(ref)[:60]}")


def _select(path: Path, member: str, key: str, ids: set, problems: Problems) -> dict[int, dict]:
    """The records with these ids from a list of a COCO file."""
    found = {}
    if not ids:
        return found
    with open_file(path, member) as stream:
        for number, record in enumerate(until_broken(stream_json_array(stream, key), path, problems)):
            if not isinstance(record, dict) or not is_integer(record.get("id")):
                problems.report(f"{path}: {key} {number}", f"has no integer id: {str(record)[:60]}")
            elif record["id"] in ids:
                found[record["id"]] = record
    return found


def locate(root: str | Path, annotations, dataset: str | None, split_by: str | None) -> tuple[list, list]:
    """(refs files, instances files), each as (path, member of the archive)."""
    root = Path(root)
    prefix = "grefs" if dataset == "grefcoco" else "refs"
    if annotations:
        paths = [Path(path) for path in annotations]
    else:
        folders = [folder for folder in (root / (dataset or "."), root) if any(folder.glob(f"{prefix}*"))][:1]
        if not folders and not dataset:
            folders = sorted({path.parent for path in root.glob(f"*/{prefix}*")})
        if len(folders) > 1:
            names = ", ".join(folder.name for folder in folders)
            raise ValueError(f"{root}: holds refs of several data sets; choose one with --dataset: {names}")
        paths = [
            path for folder in folders for name in (prefix, "instances") for path in sorted(folder.glob(f"{name}*"))
        ]
        if not paths and dataset:
            paths = packed_data_set(root, dataset) or packed_data_set(root / dataset, dataset)
        if not paths:
            there = sorted({path.parent.name for path in root.glob(f"*/{prefix}*")})
            there = f"; there are {', '.join(there)}: choose with --dataset" if there else ""
            place = f"{dataset or '<dataset>'}/{prefix}({split_by or '<split_by>'}).*"
            raise ValueError(f"{root}: there is no {place}{there}; files of other names go to --annotations")

        paths = without_copies(paths)
    files = [(path, member) for path in paths for member in _wanted_members(path)]
    instances = [file for file in files if _is_instances(*file)]
    refs = [file for file in files if file not in instances]
    if annotations and not refs:  # only the instances are elsewhere
        return locate(root, None, dataset, split_by)[0], instances
    partitions = {file: _partition(*file) for file in refs}
    named = sorted({partition for partition in partitions.values() if partition})
    if split_by is None and len(named) > 1 and not annotations:
        split_by = SPLIT_BY.get(dataset or refs[0][0].parent.name)
        if split_by not in named:
            raise ValueError(f"{root}: there are refs by {', '.join(named)}; choose with --split_by")
    refs = [file for file in refs if split_by is None or partitions[file] in (split_by, None)]
    if not refs:
        raise ValueError(f"{root}: there are no refs by {split_by!r}, only by {', '.join(named) or 'none'}")
    if not instances:
        beside = [refs[0][0].parent, *([root / dataset] if dataset else []), root]
        found = (without_copies(sorted(folder.glob("instances*.json*"))) for folder in beside)
        instances = [(path, "*") for path in next(filter(None, found), [])[:1]]
    return refs, instances


def packed_data_set(folder: Path, dataset: str) -> list[Path]:
    """The archive of a data set (`<dataset>.zip`, or a tar), if there is one."""
    return without_copies(path for path in sorted(folder.glob(f"{dataset}.*")) if is_archive(path))


def _wanted_members(path: Path) -> list[str]:
    names = [PurePosixPath(name).name for name in member_names(path)]
    wanted = [name for name in names if "refs" in name or name.startswith("instances")]
    return wanted or (names if len(names) == 1 else ["*"])


def _partition(path: Path, member: str) -> str | None:
    match = re.search(r"refs\((\w+)\)", path.name if member == "*" else member)
    return match and match[1]


def _is_instances(path: Path, member: str) -> bool:
    name = (path.name if member == "*" else member).lower()
    if name.startswith("instances") or "refs" in name or PICKLE_NAME.search(name):
        return name.startswith("instances")
    with open_file(path, member) as stream:
        start = stream.peek(400)[:400]
    return start.lstrip()[:1] == b"{" and not re.match(rb'\s*\{\s*"refs?"', start)
