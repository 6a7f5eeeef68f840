"""Convert a data set from its original files to parquet shards in the schema of `data/schema.py`.

    python -m perceptiongpt.data.prepare coco --root coco --split train --output prepared/coco
    python -m perceptiongpt.data.prepare refer --root refer --dataset refcoco --split_by unc --split val \
        --images coco/train2014 --output prepared/refcoco --preview 12
    python -m perceptiongpt.data.prepare SOURCE --help       # what a source takes

OUTPUT holds `<split>-00000-of-0000N.parquet`, `summary.json` (counts of rows, images and signals per task, what was
left out and why) and a `README.md` from which `datasets.load_dataset(OUTPUT)` and the Hub know the files of each split.
The shards hold the paths of the images, or with `--embed_images` the images. The same command again resumes a stopped
run and gives the same bytes.
"""

import argparse
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import shutil
import sys
import textwrap
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from io import BytesIO
from itertools import islice
from pathlib import Path

import pyarrow
import yaml
from pyarrow import parquet
from tqdm import tqdm

from perceptiongpt.data.reading import Problems, image_size
from perceptiongpt.data.schema import describe_row, row_features, row_images, validate_row
from perceptiongpt.data.sources import (
    COMMON_ARGUMENTS,
    SOURCES,
    default_split,
    raw_rows,
    source_arguments,
    source_help,
)


ROWS_PER_SHARD = {"path": 10_000, "embed": 1_000, "none": 10_000}  # after a stop, unfinished shards are made anew
ROWS_PER_GROUP = {"path": 500, "embed": 50, "none": 500}  # what a reader of the shards holds in memory
EXAMPLES_PRINTED = 3  # of each reason; summary.json holds more
COUNTED = ("rows", "boxes", "masks", "points")  # per task
CARD = """---
configs:
- config_name: default
  data_files:
{files}
---
Prepared for PerceptionGPT from {sources}; one row is one conversation about its image.
`summary.json` holds the counts. The licences of the original annotations and images apply.
"""


def prepare(
    source: str,
    output: str | Path,
    *,
    split: str | None = None,
    pictures: str = "path",
    num_proc: int = 1,
    on_error: str = "raise",
    rows_per_shard: int | None = None,
    progress: bool = False,
    **arguments,
) -> dict:
    """Write the rows of one split of a source to parquet shards.

    Args:
        source: one of `data.sources.SOURCES`.
        output: the folder to write to; other splits may be there already.
        split: handed to the source, and what the files are called; None: the source's own default.
        pictures: `path` (the shards hold the paths of the images), `embed` (they hold the images) or `none`.
        num_proc: processes that check rows, read images and write; one process reads the source itself.
        on_error: `raise` at the first bad record, or `skip` bad records and count them.
        rows_per_shard: rows of the source per shard.
        progress: show a progress bar.
        arguments: further arguments of the source.

    Returns:
        The summary of this split, as in `summary.json`.

    Raises:
        ValueError: for a bad record, or if `output` holds this split made from something else.
    """
    if pictures not in ROWS_PER_SHARD or on_error not in ("raise", "skip"):
        raise ValueError(f"pictures {pictures!r} is one of path, embed, none; on_error {on_error!r} of raise, skip")
    rows_per_shard = rows_per_shard or ROWS_PER_SHARD[pictures]
    split = default_split(source) if split is None else split
    if min(num_proc, rows_per_shard) < 1:
        raise ValueError(f"num_proc {num_proc} and rows_per_shard {rows_per_shard} must be at least 1")
    if not re.fullmatch(r"\w[\w.+-]*", split):
        raise ValueError(f"split {split!r} cannot be a file's name")
    if arguments.get("limit") is not None and arguments["limit"] < 1:
        raise ValueError(f"limit {arguments['limit']} must be at least 1")
    if pictures == "none":
        arguments["images"] = False
    arguments = {name: value for name, value in {"split": split, **arguments}.items() if value is not None}
    settings = {"source": source, "arguments": arguments, "pictures": pictures, "on_error": on_error}
    settings = json.loads(json.dumps({**settings, "rows_per_shard": rows_per_shard}, default=str))

    output = Path(output)
    work = output / f".{split}"
    done = read_summary(output).get(split)
    if done is None and not work.exists() and any(output.glob(f"{split}-[0-9]*-of-*.parquet")):
        raise ValueError(f"{output}: holds files of the split {split!r} that summary.json does not know")
    check_settings(output, split, settings, done["settings"] if done else _settings_of_work(work, settings))
    if done is None:
        done = read_json_file(work / "summary.json")  # it was stopped between the last shard and the end
        if done is None:
            try:
                work.mkdir(parents=True, exist_ok=True)
                write_json(work / "settings.json", settings)
            except OSError as error:
                raise ValueError(f"{output}: cannot be written to: {error}") from error
            done = _make_shards(source, arguments, work, pictures, num_proc, on_error, rows_per_shard, progress)
            done = {"settings": settings, **done}
            write_json(work / "summary.json", done)
        for index in range(done["shards"]):
            shard = work / f"{index:05d}.parquet"
            if shard.exists():
                os.replace(shard, output / f"{split}-{index:05d}-of-{done['shards']:05d}.parquet")
        summary = {**read_summary(output), split: done}
        write_text(output / "README.md", dataset_card(summary))
        write_json(output / "summary.json", summary)
    if work.exists():
        shutil.rmtree(work)
    return done


def _settings_of_work(work: Path, settings: dict) -> dict | None:
    """The settings with which unfinished work must be resumed; None: any.

    Without a finished shard there is nothing to keep. A run that a bad record stopped may go on with `on_error="skip"`:
    the finished shards have no bad record.
    """
    before = read_json_file(work / "settings.json")
    if before is None or not any(work.glob("[0-9]*.json")):
        return None
    return {**before, "on_error": settings["on_error"]} if before["on_error"] == "raise" else before


def read_summary(output: str | Path) -> dict:
    """`summary.json` of a prepared folder: per split what `prepare` returned; empty if there is none."""
    return read_json_file(Path(output) / "summary.json") or {}


# ---- shards ----------------------------------------------------------------------------------------------------------


def _make_shards(source, arguments, work, pictures, num_proc, on_error, rows_per_shard, progress) -> dict:
    """Cut the stream of rows into shards and write those that are not there; the summary of all of them."""
    problems = Problems(skip=on_error == "skip")
    stream = raw_rows(source, **arguments, problems=problems)
    total, index = _Summary(), 0
    waiting: deque[Future] = deque()
    bar = tqdm(desc=f"{source} {arguments['split']}", unit=" rows", disable=not progress)

    def collect(report: dict) -> None:
        total.add(report)
        bar.update(report["rows"])

    with bar, _Workers(num_proc) as workers:
        while chunk := list(islice(stream, rows_per_shard)):
            digest = _digest(chunk)
            report = read_json_file(work / f"{index:05d}.json")
            if report is not None and report["digest"] == digest:
                collect(report)
            else:
                shard = (chunk, digest, index * rows_per_shard, work / f"{index:05d}", pictures, on_error)
                waiting.append(workers.submit(_write_shard, *shard))
            index += 1
            while len(waiting) > num_proc:
                collect(waiting.popleft().result())
        while waiting:
            collect(waiting.popleft().result())
    total.problems.update(problems)
    if not total.rows:
        example = "".join(f", such as: {text.partition(': ')[2]}" for text in total.problems.examples[:1])
        raise ValueError(f"source {source!r} gives no rows for {arguments}; {_listed(total.problems)}{example}")
    return {"shards": index, **total.as_dict()}


def _write_shard(rows, digest, first, path, pictures, on_error) -> dict:
    """Check the rows of a shard and write them: first the shard, then, in one step that makes it valid, its report."""
    problems = Problems(skip=on_error == "skip")
    total, kept = _Summary(), []
    for index, row in enumerate(rows, first):
        try:
            row, clipped = validate_row(row, index, pictures != "none")
            row = {**row, "image": _stored(row, pictures, index)}
        except ValueError as error:
            if on_error == "raise":
                raise
            problems.report(describe_row(row, index), error, "row breaks the schema")
            continue
        total.count(row, clipped)
        kept.append(row)
    several = any(isinstance(row["image"], list) for row in kept)
    if several:
        kept = [{**row, "image": row_images(row)} for row in kept]
    table = pyarrow.Table.from_pylist(kept, schema=row_features(several).arrow_schema)
    replace_file(path.with_suffix(".parquet"), lambda file: parquet.write_table(table, file, ROWS_PER_GROUP[pictures]))
    total.problems = problems
    report = {"digest": digest, **total.as_dict(with_images=True)}
    write_json(path.with_suffix(".json"), report)
    return report


def _stored(row: dict, pictures: str, index: int):
    """The column `image` as the shard holds it."""
    if pictures == "none":
        return None
    name = describe_row(row, index)
    several = isinstance(row["image"], (list, tuple))
    stored = []
    for image in row_images(row):
        if not isinstance(image, dict):  # an image that was made, not read
            buffer = BytesIO()
            image.save(buffer, "PNG")
            image = {"path": None, "bytes": buffer.getvalue()}
        opened = BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
        size = image_size.__wrapped__(opened) if isinstance(opened, BytesIO) else image_size(opened)
        if not several and size != (row["width"], row["height"]):
            raise ValueError(
                f"{name}: {image['path'] or 'the image'} is {size[0]} x {size[1]} pixels, the annotations say "
                f"{row['width']} x {row['height']}"
            )
        if image.get("bytes") is not None:
            stored.append({"path": image.get("path") and Path(image["path"]).name, "bytes": image["bytes"]})
        elif pictures == "embed":
            stored.append({"path": Path(image["path"]).name, "bytes": Path(image["path"]).read_bytes()})
        else:
            stored.append({"path": str(Path(image["path"]).resolve()), "bytes": None})
    return stored if several else stored[0]


class _Summary:
    """Counts over rows."""

    def __init__(self):
        self.rows, self.clipped, self.images, self.tasks = 0, 0, set(), {}
        self.problems = Problems(skip=True)

    def count(self, row: dict, clipped: int) -> None:
        self.rows += 1
        self.clipped += clipped
        self.images.add(_short_digest(f"{row['source']}/{row['image_id']}"))
        given = {"rows": 1, "boxes": len(row["boxes"]) - row["boxes"].count(None)}
        given["masks"] = len(row["masks"]) - row["masks"].count(None)
        given["points"] = len(row["points"]) - row["points"].count(None)
        self.tasks[row["task"]] = dict(Counter(given) + Counter(self.tasks.get(row["task"], {})))

    def add(self, report: dict) -> None:
        self.rows += report["rows"]
        self.clipped += report["clipped"]
        self.images.update(report["image_digests"])
        for task, counts in report["tasks"].items():
            counts = {key: counts.get(key, 0) for key in COUNTED}
            self.tasks[task] = dict(Counter(counts) + Counter(self.tasks.get(task, {})))
        self.problems.update(Problems(True, counts=Counter(report["left_out"]), examples=report["examples"]))

    def as_dict(self, with_images: bool = False) -> dict:
        left_out = self.problems.by_task
        tasks = {
            task: {key: self.tasks.get(task, {}).get(key, 0) for key in COUNTED}
            | ({"left_out": dict(sorted(left_out[task].items()))} if task in left_out else {})
            for task in sorted({*self.tasks, *left_out})
        }
        summary = {"rows": self.rows, "images": len(self.images), "clipped": self.clipped, "tasks": tasks}
        summary |= {"left_out": dict(sorted(self.problems.counts.items())), "examples": self.problems.examples}
        return {**summary, "image_digests": sorted(self.images)} if with_images else summary


class _Workers:
    """A pool of `num_proc` processes, or this one if it is to be one."""

    def __init__(self, num_proc: int):
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(num_proc, spawn, initializer=end_with_parent) if num_proc > 1 else None

    def submit(self, function, *arguments) -> Future:
        if self.pool:
            return self.pool.submit(function, *arguments)
        future = Future()
        future.set_result(function(*arguments))
        return future

    def __enter__(self) -> "_Workers":
        return self

    def __exit__(self, *error) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """A worker whose parent was killed would wait for ever, or go on writing beside the next run."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _digest(rows: list[dict]) -> str:
    """A digest of the rows of a shard as the source gives them."""

    def plain(value):
        content = value if isinstance(value, bytes) else value.tobytes()  # an image
        return hashlib.blake2b(content, digest_size=16).hexdigest()

    return hashlib.blake2b(json.dumps(rows, default=plain).encode(), digest_size=16).hexdigest()


def _short_digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


# ---- files that are written in one step ------------------------------------------------------------------------------


def replace_file(path: Path, write) -> None:
    """Let `write` fill a new file and put it in the place of `path` in one step."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json_file(path: Path) -> dict | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def check_settings(output: Path, split: str, settings: dict, before: dict | None) -> None:
    if before is not None and before != settings:
        changed = [
            f"{key}={before.get(key)!r} (now {settings[key]!r})" for key in settings if before.get(key) != settings[key]
        ]
        raise ValueError(
            f"{output}: the split {split!r} was made with {', '.join(changed)}; choose another output or delete it"
        )


def dataset_card(summary: dict) -> str:
    # `datasets` wants names without a hyphen; and `test-*` would be `test-dev`, too.
    names = {split: re.sub(r"[^\w.]", "_", split) for split in summary}
    files = "\n".join(f'  - split: {name}\n    path: "{split}-[0-9]*.parquet"' for split, name in names.items())
    return CARD.format(
        files=files, sources=", ".join(sorted({part["settings"]["source"] for part in summary.values()}))
    )


# ---- command line ---------------------------------------------------------------------------------------------------


def print_summary(split: str, summary: dict) -> None:
    """Print what `prepare` returned."""
    print(f"{split}: {summary['rows']:,} rows about {summary['images']:,} images in {summary['shards']} shards")
    print(f"  {'task':<20}" + "".join(f"{key:>12}" for key in COUNTED))
    for task, counts in summary["tasks"].items():
        print(f"  {task:<20}" + "".join(f"{counts.get(key, 0):>12,}" for key in COUNTED))
    if summary["clipped"]:
        print(f"  {summary['clipped']:,} boxes and points overhung their image by at most a pixel and were clipped")
    for task, counts in summary["tasks"].items():
        for reason, count in counts.get("left_out", {}).items():
            print(f"  no row of {task}: {count:,} x {reason}")
    for reason, count in summary["left_out"].items():
        print(f"  left out: {count:,} x {reason}")
        examples = [example for example in summary["examples"] if example.startswith(f"{reason}: ")]
        for example in examples[:EXAMPLES_PRINTED]:
            print(f"    {example.removeprefix(f'{reason}: ')}")


def _listed(problems: Problems) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in problems.counts.items()) or "nothing was left out"


def _own_arguments(name: str) -> Iterator[tuple[str, inspect.Parameter]]:
    for argument, parameter in source_arguments(name).items():
        if argument not in COMMON_ARGUMENTS and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            yield argument, parameter


def _takes_several(parameter: inspect.Parameter) -> bool:
    return "Iterable" in str(parameter.annotation)


def _source_epilog(name: str, summary: str, entries: dict[str, str]) -> str:
    """The part of `--help` about one source: what it reads and makes, and what the common options mean for it."""
    said, default = {}, f" Default: {default_split(name)}."
    entries = {"split": "picks the files, and is what the column `split` says."} | entries
    for argument in COMMON_ARGUMENTS:
        if argument in entries and argument != "problems":  # which is --on_error
            said.setdefault(entries[argument], []).append(argument)
    lines = [
        textwrap.fill(
            f"{', '.join(arguments)}: {entry}{default if 'split' in arguments else ''}",
            100,
            initial_indent="  ",
            subsequent_indent="      ",
        )
        for entry, arguments in said.items()
    ]
    return "\n".join([f"the source {name}:", "", summary, "", *lines])


def read_command_line(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """The options; `own` are those that the source alone takes."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m perceptiongpt.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", choices=SOURCES, metavar="SOURCE", help=", ".join(SOURCES))
    parser.add_argument(
        "--root", metavar="DIR", help="the folder with the files of the data set (default: the folder of --annotations)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument("--split", nargs="+", help="one or more splits (default: the source's own, see its --help)")
    parser.add_argument("--images", metavar="DIR", help="the folder of the images, if it is elsewhere")
    parser.add_argument("--annotations", nargs="+", metavar="FILE", help="the annotation files, if they are elsewhere")
    parser.add_argument("--tasks", nargs="+", help="make only these of the source's tasks")
    parser.add_argument("--seed", type=int, help="seed of the prompts and of everything else that is drawn (default 0)")
    parser.add_argument("--evaluation", action="store_true", help="use the fixed evaluation prompts")
    parser.add_argument("--limit", type=int, metavar="N", help="read only the first N images or records")
    parser.add_argument("--embed_images", action="store_true", help="store the images in the shards")
    parser.add_argument("--no_images", action="store_true", help="make rows without images, which may be missing")
    parser.add_argument("--num_proc", type=int, default=1, metavar="N", help="number of processes")
    parser.add_argument(
        "--on_error", choices=["raise", "skip"], default="raise", help="what to do about a bad record (default: raise)"
    )
    parser.add_argument("--rows_per_shard", type=int, metavar="N", help="rows per shard")
    parser.add_argument("--preview", type=int, default=0, metavar="N", help="draw N rows to OUTPUT/preview-<split>.png")
    parser.add_argument("--push_to_hub", metavar="REPO", help="then upload the folder to a data set repository")
    named = next((argument for argument in arguments if argument in SOURCES), None)
    own = list(_own_arguments(named)) if named else []
    if named:
        summary, entries = source_help(named)
        parser.epilog = _source_epilog(named, summary, entries)
        group = parser.add_argument_group(f"options of the source {named}")
        for name, parameter in own:
            text = entries.get(name, "").replace("%", "%%")
            text += "" if parameter.default is None else f" (default: {parameter.default})"
            several = "+" if _takes_several(parameter) else None
            group.add_argument(f"--{name}", dest=f"own_{name}", metavar="VALUE", nargs=several, help=text)
    options = parser.parse_args(arguments)
    if options.embed_images and options.no_images:
        parser.error("--embed_images and --no_images exclude each other")
    if options.push_to_hub and not (options.embed_images or options.no_images):
        parser.error("--push_to_hub needs --embed_images (or --no_images): paths are of no use elsewhere")
    options.own = {}
    for name, parameter in own:
        value = getattr(options, f"own_{name}")
        if isinstance(value, list):
            read = [yaml.safe_load(word) for word in value]
            value = read[0] if len(read) == 1 else read
            options.own[name] = value.split() if isinstance(value, str) else value
        elif value is not None:
            options.own[name] = value if isinstance(parameter.default, str) else yaml.safe_load(value)
    return options


def push(output: str | Path, repository: str) -> None:
    """Upload a prepared folder to a data set repository of the Hub, which is made if it is not there."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, repo_type="dataset", exist_ok=True)
    api.upload_folder(
        repo_id=repository,
        repo_type="dataset",
        folder_path=str(output),
        allow_patterns=["*.parquet", "summary.json", "README.md"],
        commit_message="Prepared data",
    )


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line; see the head of this file."""
    options = read_command_line(arguments)
    common = {name: getattr(options, name) for name in ("root", "annotations", "tasks", "seed", "limit", "images")}
    common["evaluation"] = options.evaluation or None
    takes = source_arguments(options.source)
    try:
        for name, value in common.items():
            if value is not None and name not in takes:
                raise ValueError(f"source {options.source!r} takes no --{name}")
        for split in options.split or [default_split(options.source)]:
            summary = prepare(
                options.source,
                options.output,
                split=split,
                pictures="embed" if options.embed_images else "none" if options.no_images else "path",
                num_proc=options.num_proc,
                on_error=options.on_error,
                rows_per_shard=options.rows_per_shard,
                progress=True,
                **common,
                **options.own,
            )
            print_summary(split, summary)
            if options.preview:
                from perceptiongpt.data.preview import draw_row, preview_rows
                from perceptiongpt.drawing import contact_sheet

                drawn = [draw_row(row) for row in preview_rows(options.output, split, options.preview)]
                sheet = contact_sheet(
                    drawn, 4, Path(options.output, f"preview-{split}.png"), cell=512, max_bytes=8_000_000
                )
                print(f"  {sheet}")
        if options.push_to_hub:
            push(options.output, options.push_to_hub)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
