"""Measure a checkpoint: a benchmark in, a table with intervals, the failures to look at and files for the Hub out.

    python validate.py --model DIR --benchmark refcoco --split val --data refer/ --images coco/train2014 --output out/a
    python validate.py --model DIR --benchmark scenes_refer --seed 1234567 --limit 500 --output out/b
    python validate.py --model DIR --benchmark coco --data my_labels/ --output out/c      # instances json and pictures
    accelerate launch --config_file recipes/accelerate/ddp.yaml validate.py --model DIR --benchmark pope ...
    python validate.py --predictions answers.jsonl --benchmark refcoco --data refer/ --output out/e
    python validate.py --compare out/a/summary.json out/f/summary.json

The model writes its answers by itself (free-running, greedy); boxes and masks are compared in pixels of the original
picture. A run that was stopped goes on where it was when the same command is given again. What OUTPUT then holds:

| file | content |
| --- | --- |
| `predictions.jsonl` | per sample: prompt, answer, objects (masks as COCO RLE), why there is none |
| `summary.json`, `summary.md` | every number with its 95 % interval and how it came about |
| `samples.jsonl` | per sample what each metric counted: what `--compare` reads |
| `worst.jpg`, `random.jpg` | cases to look at: the reference on the left, the prediction on the right |
| `calibration.png` | scores against the truth |
| `.eval_results/*.yaml`, `model_index.yaml` | for the model's repository on the Hub, and for its card |

docs/evaluating.md explains them; `recipes/benchmarks/*.yaml` lists the benchmarks.
"""

import argparse
import difflib
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from perceptiongpt import reporting, scoring
from perceptiongpt.configuration_perceptiongpt import IMAGE_TOKEN, VIS_TOKEN
from perceptiongpt.data.reading import Problems, read_json, safe_join
from perceptiongpt.data.schema import row_to_messages
from perceptiongpt.data.sources import rows as source_rows
from perceptiongpt.data.sources import source_arguments
from perceptiongpt.data.templates import load_templates
from perceptiongpt.predict import BROKEN_IMAGE_ERRORS, InputError, check_name, load


BENCHMARKS_FOLDER = Path(__file__).parent / "recipes" / "benchmarks"
BENCHMARK_KEYS = {
    "source": None,
    "arguments": {},
    "tasks": None,
    "splits": [None],
    "metrics": [],
    "headline": None,
    "prompt": {},
    "group": False,
    "max_new_tokens": 128,
    "limit": None,
    "seed": 0,
    "hub_dataset": None,
    "note": None,
}
FIRST_TEST_SEED = 10**6
SPLIT_NAMES = {"val": ("val", "valid", "validation")}  # as folders and files of one's own are named
FILES_TO_LOOK_FOR = 20  # pictures of one's own labels, in each folder
RUN_KEYS = (  # what makes two runs' predictions the same
    "model", "checkpoint_sha256", "benchmark", "split", "data", "images", "annotations", "seed", "prompt",
    "max_new_tokens", "dtype",
)  # fmt: skip
PARTS = "predictions.{:05d}.part"
LONGEST_WAIT = timedelta(days=7)  # one process may be done long before another


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def read_benchmarks(folder: Path = BENCHMARKS_FOLDER) -> dict[str, dict]:
    """The benchmarks of every YAML file in a folder, by name; their keys are those of `BENCHMARK_KEYS`."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        found |= read_benchmark_file(path)
    return found


def read_benchmark_file(path: Path) -> dict[str, dict]:
    """The benchmarks of one YAML file.

    Raises:
        InputError: it is no YAML, or a benchmark has a key, source or metric that does not exist.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(values, dict) for values in given.values()):
        raise InputError(f"{path}: expected benchmarks by name, each a mapping")
    found = {}
    for name, values in given.items():
        for key in values:
            if key not in BENCHMARK_KEYS:
                near = difflib.get_close_matches(key, BENCHMARK_KEYS, n=1) or list(BENCHMARK_KEYS)
                raise InputError(f"{path}: {name} has the unknown key {key!r}; meant was perhaps {', '.join(near)}")
        spec = {**BENCHMARK_KEYS, **values, "name": name}
        if not isinstance(spec["metrics"], dict):
            spec["metrics"] = dict.fromkeys(spec["metrics"], spec["tasks"])
        if not spec["source"] or not spec["metrics"]:
            raise InputError(f"{path}: {name} needs a source and metrics")
        spec["headline"] = spec["headline"] or next(iter(spec["metrics"]))
        for module in (*spec["metrics"], spec["headline"].split("/")[0]):
            if module not in scoring.METRICS:
                known = ", ".join(scoring.METRICS)
                raise InputError(f"{path}: {name} asks for the metric {module!r}; there are {known}")
        try:
            source_arguments(spec["source"])
        except ValueError as error:
            raise InputError(f"{path}: {name}: {error}") from error
        found[name] = spec
    return found


def find_benchmark(name: str) -> dict:
    """A benchmark by its name, or the only one of a YAML file."""
    if name.endswith((".yaml", ".yml")):
        found = read_benchmark_file(Path(name))
        if len(found) != 1:
            raise InputError(f"--benchmark {name}: holds {len(found)} benchmarks, expected one: {', '.join(found)}")
        return next(iter(found.values()))
    known = read_benchmarks()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"meant was perhaps {', '.join(near)}" if near else f"there are {', '.join(known)}"
        raise InputError(f"--benchmark {name}: there is none of that name; {hint}")
    return known[name]


def choose_split(spec: dict, split: str | None, seed: int) -> str | None:
    """The split that was asked for, or the benchmark's first; of scenes the one that goes with the seed."""
    if split is not None or spec["source"] != "scenes":
        return split or spec["splits"][0]
    return spec["splits"][-1] if seed < FIRST_TEST_SEED else spec["splits"][0]


def find_coco_files(data: Path, splits: list[str]) -> dict:
    """Arguments of the source `coco` for a folder that holds instances files and pictures in any usual arrangement.

    The first of `splits` that a file, or the folder it is in, is named after is taken; a file that is alone may have
    any name.

    Raises:
        InputError: there is no such file, there are several, or the pictures are not there.
    """
    pattern = re.compile(r"\.json(\.gz|\.xz|\.zip)?$")
    files = [
        path for depth in ("", "*/", "*/*/") for path in sorted(data.glob(f"{depth}*")) if pattern.search(path.name)
    ]
    instances = [path for path in files if path.name.startswith("instances")]
    instances = instances or [path for path in files if len(files) == 1 or is_instances(path)]
    if not instances:
        raise InputError(f"--data {data}: holds no COCO instances json; give --annotations")
    named = {path: split for split in reversed(splits) for path in instances if is_named_after(path, data, split)}
    found = min(named, key=lambda path: splits.index(named[path]), default=instances[0])
    if found not in named and len(instances) > 1:
        names = ", ".join(str(path.relative_to(data)) for path in instances)
        raise InputError(f"--data {data}: choose one of {names} with --split or --annotations")
    return {
        "annotations": [str(found)],
        "images": find_coco_images(data, found),
        "split": named.get(found, "all"),
    }


def is_named_after(path: Path, data: Path, split: str) -> bool:
    """Whether a file below `data`, or a folder on the way to it, has the name of a split."""
    words = "|".join(map(re.escape, SPLIT_NAMES.get(split, (split,))))
    places = path.relative_to(data).as_posix().split(".json")[0]
    return bool(re.search(rf"(^|[/_.-])({words})(20\d\d)?($|/)", places))


def is_instances(path: Path) -> bool:
    """Whether a json file holds what COCO's instances files do."""
    try:
        content = read_json(path)
    except ValueError:  # some other json of the user's, which need not be sound
        return False
    keys = ("images", "annotations", "categories")
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys)


def is_picture_in(folder: Path, name: str) -> bool:
    """Whether a file of that name, which must not lead out of the folder, is there."""
    try:
        return safe_join(folder, name).is_file()
    except ValueError:  # whoever reads the records says which one it is
        return False


def find_coco_images(data: Path, instances: Path) -> str:
    """The folder below `data` that the `file_name`s of an instances file are relative to, nearest to the file first."""
    try:
        names = [str(record["file_name"]) for record in read_json(instances)["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{instances}: no COCO instances file with pictures: {error!r}") from error
    names = names[:FILES_TO_LOOK_FOR]
    stem = instances.name.split(".json")[0].removeprefix("instances_")
    below = [path for depth in ("*/", "*/*/") for path in sorted(data.glob(depth)) if path.is_dir()]
    below.sort(key=lambda path: path.name != stem)
    found = {folder: sum(is_picture_in(folder, name) for name in names) for folder in [instances.parent, data, *below]}
    best = max(found, key=found.get)
    if not found[best]:
        raise InputError(
            f"--data {data}: of the pictures {names[:3]} .. of {instances.name} none is there; give --images"
        )
    return str(best)


# ---- samples ---------------------------------------------------------------------------------------------------------


def read_samples(spec: dict, options: argparse.Namespace, problems: Problems) -> list[dict]:
    """The benchmark's first `options.limit` samples, in the order of its source.

    Returns:
        Dictionaries with `id`, `task`, `image_id`, `image` (as in a row), `width`, `height`, `messages`, `boxes` and
        `masks` (the conversation before the answer, as in a row), `prompt` (its last text), `answers` (the true ones:
        {`content`, `boxes`, `masks`} each), `ten` (of a question, what each person said) and `ignore` (an RLE or None).

    Raises:
        InputError: the data cannot be read, or there is nothing to measure.
    """
    arguments = dict(spec["arguments"], root=options.data, split=options.split, seed=options.seed, evaluation=True)
    arguments |= {"problems": problems, "images": options.images, "annotations": options.annotations}
    if options.no_images:
        arguments["images"] = False
    if spec["source"] == "coco" and options.data and not options.annotations:
        arguments |= find_coco_files(Path(options.data), [options.split] if options.split else spec["splits"])
        options.split = arguments["split"]
        if options.images or options.no_images:
            arguments["images"] = options.images or False
    is_bench = str(options.split).startswith("scenes-bench")
    arguments["tasks"] = None if is_bench else spec["tasks"]
    if spec["source"] == "scenes":
        arguments["limit"] = options.limit
    samples, by_question, of_image = [], {}, Counter()
    try:
        for row in source_rows(spec["source"], **arguments):
            if row["messages"][-1]["role"] != "assistant":
                raise InputError(f"split {options.split!r} has no answers to measure against")
            sample, answer = split_row(row, spec["prompt"])
            key = (row["image_id"], sample["prompt"], json.dumps([sample["boxes"], sample["masks"]]))
            if spec["group"] and key in by_question:
                by_question[key]["answers"].append(answer)
                continue
            if options.limit is not None and len(samples) == options.limit:
                break
            sample["id"] = f"{row['image_id']}-{of_image[row['image_id']]}"
            of_image[row["image_id"]] += 1
            sample["answers"] = [answer]
            samples.append(by_question.setdefault(key, sample) if spec["group"] else sample)
    except InputError:
        raise
    except (ValueError, OSError) as error:
        hint = "" if options.data or spec["source"] == "scenes" else "; is --data DIR missing?"
        raise InputError(f"benchmark {spec['name']}, split {options.split!r}: {error}{hint}") from error
    if not samples:
        raise InputError(f"benchmark {spec['name']}, split {options.split!r}: there are no samples")
    return samples


def split_row(row: dict, prompts: dict[str, str]) -> tuple[dict, dict]:
    """A row as what the model is asked and what it should answer."""
    *before, last = row["messages"]
    count = last["content"].count(VIS_TOKEN)
    first = len(row["boxes"]) - count
    messages = [dict(message) for message in before]
    prompt = messages[-1]["content"].removeprefix(IMAGE_TOKEN)
    name, template = evaluation_prompt(row["task"], prompt) or (None, "")
    start, hole, end = template.partition("{phrase}")
    phrase = prompt[len(start) : len(prompt) - len(end)] if hole else None
    if name in prompts:
        template = prompts[name]
        prompt = template.replace("{phrase}", phrase or "")
        messages[-1]["content"] = IMAGE_TOKEN * (len(messages) == 1) + prompt
    image = row["image"]
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
    sample = {name: row[name] for name in ("task", "image_id", "width", "height", "source", "split")}
    sample |= {"image": image, "messages": messages, "prompt": prompt}
    sample |= {"boxes": row["boxes"][:first], "masks": row["masks"][:first]}
    sample |= {"ten": row.get("answers"), "ignore": row.get("ignore"), "phrase": phrase, "template": template}
    return sample, {"content": last["content"], "boxes": row["boxes"][first:], "masks": row["masks"][first:]}


def evaluation_prompt(task: str, prompt: str) -> tuple[str, str] | None:
    """(task, template) that an evaluation prompt was made of; None if it is worded otherwise.

    What is not there is asked for in the words of `detect` or `refer`.
    """
    for name in ("detect", "refer") if task == "no_target" else (task,):
        template = load_templates().get(name, {}).get("evaluation", "")
        start, hole, end = template.partition("{phrase}")
        if template and (prompt.startswith(start) and prompt.endswith(end) if hole else prompt == template):
            return name, template
    return None


# ---- answers ---------------------------------------------------------------------------------------------------------


class Refused(ValueError):
    """The processor does not take a sample."""


def no_answer(error: str) -> dict:
    """The prediction of a sample that got none."""
    return {"text": None, "objects": [], "tokens": 0, "finished": True, "error": error}


def model_inputs(model, processor, messages: list, **kwargs):
    """The conversations as the model takes them; `Refused` says why one cannot be."""
    try:
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **kwargs)
    except ValueError as error:
        raise Refused(str(error)) from error
    return inputs.to(model.device, model.dtype)


def answer(model, processor, samples: list[dict], images: list[Image.Image], max_new_tokens: int) -> list[dict]:
    """What the model writes by itself: {`text`, `objects`, `tokens`, `finished`, `error`} per sample."""
    messages = [row_to_messages({**sample, "image": image}) for sample, image in zip(samples, images, strict=True)]
    output = model.generate(
        **model_inputs(model, processor, messages, add_generation_prompt=True),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends if ends is not None else -1])
    is_end = torch.isin(output.sequences[:, output.prompt_length :].cpu(), ends)
    sizes = [(sample["height"], sample["width"]) for sample in samples]
    results = processor.post_process_generation(output, target_sizes=sizes, mask_format="rle")
    return [
        {
            "text": result["text"],
            "objects": result["objects"],
            "tokens": int(end.int().argmax()) + 1 if end.any() else len(end),
            "finished": bool(end.any()),
            "error": None,
        }
        for result, end in zip(results, is_end, strict=True)
    ]


@torch.no_grad()
def answer_teacher_forced(model, processor, samples: list[dict], images: list[Image.Image], _=None) -> list[dict]:
    """What is decoded before each `<vis>` of the true answer, which the model reads: one object per target."""
    messages = []
    for sample, image in zip(samples, images, strict=True):
        true = sample["answers"][0]
        row = {**sample, "image": image, "messages": [*sample["messages"], {"role": "assistant", **true}]}
        row |= {name: sample[name] + true[name] for name in ("boxes", "masks")}
        messages.append(row_to_messages(row))
    inputs = model_inputs(model, processor, messages)
    if inputs["boxes"].shape[1] == 0:
        return [no_answer("no target to be forced to") for _ in samples]
    output = model(**inputs)
    ids, slots = inputs["input_ids"], inputs["boxes"].shape[1]
    positions = torch.zeros(len(samples), slots, dtype=torch.long, device=ids.device)
    valid = torch.zeros_like(positions, dtype=torch.bool)
    for row, sample in enumerate(samples):
        found = (ids[row] == processor.vis_token_id).nonzero().flatten()
        positions[row, : len(found)] = found
        valid[row, len(sample["boxes"]) : len(found)] = True
    rows = torch.arange(len(samples), device=ids.device)[:, None]
    emission = output.logits[rows, (positions - 1).clamp(min=0)].float().softmax(-1)[..., processor.vis_token_id]
    values = {
        "sequences": ids,
        "prompt_length": ids.shape[1],
        "boxes": output.pred_boxes,
        "mask_logits": output.pred_mask_logits,
        "object_scores": emission * output.pred_box_iou,
        "object_mask_scores": emission * output.pred_mask_iou,
        "object_valid": valid,
        "positions": positions,
    }
    sizes = [(sample["height"], sample["width"]) for sample in samples]
    results = processor.post_process_generation(values, target_sizes=sizes, mask_format="rle")
    return [{**no_answer(""), "objects": result["objects"], "error": None} for result in results]


def read_pictures(batch: list[dict], grey: bool) -> dict[str, Image.Image | str]:
    """By id the sample's picture (grey: one of its size without content), or why it cannot be read."""
    pictures = {}
    for sample in batch:
        try:
            picture = reporting.read_picture(sample)
            pictures[sample["id"]] = Image.new("RGB", picture.size, (128, 128, 128)) if grey else picture
        except BROKEN_IMAGE_ERRORS as error:
            pictures[sample["id"]] = f"picture cannot be read: {error}"
    return pictures


def answer_batch(batch: list[dict], pictures: dict[str, Image.Image | str], answer_some: Callable) -> list[dict]:
    """One prediction per sample; what cannot be read, or the processor refuses, has an `error` instead."""
    start = time.perf_counter()
    asked = [sample for sample in batch if not isinstance(pictures[sample["id"]], str)]
    entries = {name: no_answer(picture) for name, picture in pictures.items() if isinstance(picture, str)}
    try:
        if asked:
            found = answer_some(asked, [pictures[sample["id"]] for sample in asked])
            entries |= {sample["id"]: entry for sample, entry in zip(asked, found, strict=True)}
    except Refused as error:
        if len(asked) == 1:
            entries[asked[0]["id"]] = no_answer(f"refused by the processor: {error}")
        else:
            for sample in asked:
                entries |= {sample["id"]: answer_batch([sample], pictures, answer_some)[0]}
    milliseconds = round(1000 * (time.perf_counter() - start) / len(batch), 3)
    heads = ({name: sample[name] for name in ("id", "image_id", "task", "prompt")} for sample in batch)
    return [{**head, **entries[head["id"]], "ms": milliseconds} for head in heads]


# ---- predictions on disk ---------------------------------------------------------------------------------------------


def read_entries(path: Path) -> Iterator[dict]:
    """The whole lines of a predictions file; what a kill left of the last one is passed over."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                if line.endswith(b"\n"):
                    raise InputError(f"{path}, line {number}: not json: {error}") from error


def collect(folder: Path, samples: list[dict]) -> dict[str, dict]:
    """Put what the processes have written into `predictions.jsonl`, in the order of the samples; returns it by id."""
    parts = sorted(folder.glob("predictions.*.part"))
    entries = {}
    for path in (folder / "predictions.jsonl", *parts):
        for entry in read_entries(path):
            entries.setdefault(entry["id"], entry)
    order = [sample["id"] for sample in samples if sample["id"] in entries]
    order += sorted(set(entries) - set(order))  # of a longer run than this one
    temporary = folder / "predictions.jsonl.new"
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entries[name]) + "\n" for name in order)
    temporary.replace(folder / "predictions.jsonl")
    for path in parts:
        path.unlink()
    return entries


def check_run(folder: Path, run: dict, overwrite: bool) -> None:
    """Make the folder this run's, or make sure that what it holds belongs to the same run.

    Raises:
        InputError: it cannot be written to, or holds predictions of another run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        if overwrite:
            for old in (path, *folder.glob("predictions.*"), *folder.glob("*/predictions.*")):
                old.unlink(missing_ok=True)
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [f"{key} {before.get(key)!r}, now {run[key]!r}" for key in RUN_KEYS if before.get(key) != run[key]]
            if other:
                raise InputError(
                    f"--output {folder}: holds the predictions of another run ({'; '.join(other)}); give another "
                    "folder, or --overwrite"
                )
        elif (folder / "predictions.jsonl").exists():
            raise InputError(f"--output {folder}: holds predictions of an unknown run; give another folder")
        path.write_text(json.dumps(run, indent=1), encoding="utf-8")
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"--output {folder}: cannot be used: {error}") from error


def predict_all(
    samples: list[dict],
    folder: Path,
    batch_size: int,
    answer_some: Callable | None,
    state: PartialState,
    grey: bool = False,
    running: Callable[[dict, dict], float | None] = lambda sample, entry: None,
    title: str = "",
    what: str = "",
) -> dict[str, dict]:
    """The predictions of all samples by id: those on disk, and of the others what `answer_some(samples, images)` gives.

    Every process answers its share and writes it down batch by batch, and shows the mean of `running`, called `what`.
    """
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        collect(folder, samples)
    state.wait_for_everyone()
    done = {entry["id"] for entry in read_entries(folder / "predictions.jsonl")}
    missing = [sample for sample in samples if sample["id"] not in done]
    if len(missing) < len(samples) and state.is_main_process:
        kept = len(samples) - len(missing)
        print(f"{title}: {kept} of {len(samples)} samples are on disk already", file=sys.stderr)
    todo = missing[state.process_index :: state.num_processes]
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    scores, path = [], folder / PARTS.format(state.process_index)
    state.wait_for_everyone()  # nobody collects again before everybody has read
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(todo), unit="sample", desc=title, disable=not state.is_main_process) as progress,
        ThreadPoolExecutor(1) as reader,
    ):
        ahead = [reader.submit(read_pictures, batch, grey) for batch in batches[:1]]
        for index, batch in enumerate(batches):
            pictures = ahead.pop().result()
            # While the model answers, the next pictures are read.
            ahead += [reader.submit(read_pictures, following, grey) for following in batches[index + 1 : index + 2]]
            entries = answer_batch(batch, pictures, answer_some)
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            file.flush()
            values = (running(sample, entry) for sample, entry in zip(batch, entries, strict=True))
            scores += [value for value in values if value is not None]
            if scores:
                progress.set_postfix_str(f"{what} {sum(scores) / len(scores):.3f}", refresh=False)
            progress.update(len(batch))
    state.wait_for_everyone()
    entries = collect(folder, samples) if state.is_main_process else {}
    state.wait_for_everyone()
    return entries


def given_predictions(path: Path, samples: list[dict]) -> tuple[dict[str, dict], int]:
    """Predictions that somebody else made: json lines with `id`, and `text`, `objects` or both. Checked when scored.

    Returns:
        The entries by id, and how many lines are about no sample.

    Raises:
        InputError: there is no such file, a line is no object with an id, an id occurs twice, or none is a sample's.
    """
    if not path.is_file():
        raise InputError(f"--predictions {path}: there is no such file")
    entries, known, others = {}, {sample["id"] for sample in samples}, set()
    for number, entry in enumerate(read_entries(path), 1):
        name = entry.get("id") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            raise InputError(f"{path}, line {number}: expected an object with a sample's id, got {str(entry)[:80]}")
        if name in entries or name in others:
            raise InputError(f"{path}, line {number}: the id {name!r} occurs twice")
        if name in known:
            entries[name] = {**entry, "ms": None}
        else:
            others.add(name)
    if not entries:
        example = ", ".join(sample["id"] for sample in samples[:3])
        raise InputError(f"--predictions {path}: none of its ids is a sample's, such as {example}")
    return entries, len(others)


# ---- run -------------------------------------------------------------------------------------------------------------


def checkpoint_hash(model: str) -> str | None:
    """SHA-256 over the config and the weights of a checkpoint in a folder; of one on the Hub None."""
    files = [
        path for path in sorted(Path(model).glob("*")) if path.name == "config.json" or path.suffix == ".safetensors"
    ]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


def prompts_used(samples: list[dict]) -> dict[str, str]:
    """The wordings that each task was asked in."""
    found = {}
    for sample in samples:
        found.setdefault(sample["task"], set()).add(sample["template"] or "the source's own words")
    return {task: " or ".join(sorted(wordings)) for task, wordings in sorted(found.items())}


def validate(options: argparse.Namespace, command: str) -> dict | None:
    """Run one benchmark and write everything to `options.output`; returns the summary (in the main process).

    Raises:
        InputError: something that whoever typed the command can mend, before the model is loaded where possible.
    """
    spec = find_benchmark(options.benchmark)
    options.seed = spec["seed"] if options.seed is None else options.seed
    options.limit = spec["limit"] if options.limit is None else options.limit
    options.max_new_tokens = options.max_new_tokens or spec["max_new_tokens"]
    if spec["source"] != "coco":
        options.split = choose_split(spec, options.split, options.seed)
    if options.teacher_forced and not scoring.TEACHER_FORCED & set(spec["metrics"]):
        names = " nor ".join(sorted(scoring.TEACHER_FORCED))
        raise InputError(f"--teacher_forced: {spec['name']} is measured by neither {names}; elsewhere it means nothing")
    if options.model:
        check_name(options.model)
    for name in ("data", "images"):
        if getattr(options, name) and not Path(getattr(options, name)).is_dir():
            raise InputError(f"--{name} {getattr(options, name)}: there is no such folder")

    # Without `cpu`, processes that torchrun starts where there is no accelerator would not know of each other.
    on_cpu = str(options.device) == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
    problems = Problems()
    samples = read_samples(spec, options, problems)
    absent = scoring.metrics_without_reference(spec["metrics"], samples)
    output = Path(options.output or Path("outputs", f"{spec['name']}_{options.split}".replace("/", "_")))
    model = processor = None
    run = {key: getattr(options, key, None) for key in ("model", "split", "data", "images", "annotations", "seed")}
    run |= {"benchmark": spec["name"], "prompt": prompts_used(samples), "max_new_tokens": options.max_new_tokens}
    run |= {"dtype": options.dtype, "checkpoint_sha256": None}
    if options.predictions:
        run["model"] = f"predictions in {options.predictions}"
    elif state.is_main_process:
        run["checkpoint_sha256"] = checkpoint_hash(options.model)
    if state.is_main_process:
        check_run(output, run, options.overwrite)
    state.wait_for_everyone()

    measured = {name: tasks for name, tasks in spec["metrics"].items() if name not in absent}
    scorer = scoring.Scorer(measured, options.threshold)
    chosen, others = {"grey_picture": samples}, 0
    if options.predictions:
        entries, others = given_predictions(Path(options.predictions), samples)
        predicted = {"": entries}
    else:
        model, processor = load(options.model, str(options.device or state.device), options.dtype)

        def run_pass(title: str, folder: Path, how: Callable, some=samples, grey: bool = False) -> dict[str, dict]:
            def answer_some(batch, images):
                return how(model, processor, batch, images, options.max_new_tokens)

            headline = spec["headline"]
            return predict_all(
                some, folder, options.batch_size, answer_some, state, grey,
                lambda sample, entry: scorer.running(headline, sample, entry), title,
                scoring.METRICS[headline.split("/")[0]].hit,
            )  # fmt: skip

        predicted = {"": run_pass(spec["name"], output, answer)}
        if options.teacher_forced:
            chosen["teacher_forced"] = [sample for sample in samples if scoring.targets(sample)]
            predicted["teacher_forced"] = run_pass(
                "teacher forced", output / "teacher_forced", answer_teacher_forced, chosen["teacher_forced"]
            )
        if str(options.split).startswith("scenes-bench"):
            predicted["grey_picture"] = run_pass("grey pictures", output / "grey_picture", answer, grey=True)
    if not state.is_main_process:
        return None

    summary = {
        "benchmark": spec["name"],
        "checkpoint": options.model or run["model"],
        "checkpoint_sha256": run["checkpoint_sha256"],
        "command": command,
        "split": options.split,
        "n": len(samples),
        "predictions_without_sample": others,
        "pictures": len({sample["image_id"] for sample in samples}),
        "seed": options.seed,
        "prompt": run["prompt"],
        "decoding": "free-running, greedy" if model is not None else "given predictions",
        "resolution": {"compared at": "original picture"},
        "threshold": {"score": options.threshold, "mask": "logit > 0"},
        "max_new_tokens": options.max_new_tokens,
        "note": spec["note"],
        "data": {"source": spec["source"], "root": options.data, "left out": dict(problems.counts)},
        "versions": {name: version(name) for name in ("perceptiongpt", "torch", "transformers", "pycocotools")},
    }
    if model is not None:
        config = model.config
        summary["resolution"] |= {
            "model reads": config.vision_config.image_size,
            "masks from": config.mask_image_size or config.vision_config.image_size,
            "mask logits": config.mask_config.size,
        }
        summary |= {"dtype": str(model.dtype), "device": str(model.device), "batch_size": options.batch_size}
        summary |= {"processes": state.num_processes, "revision": getattr(config, "_commit_hash", None)}
    result = scorer.score(samples, predicted[""])
    summary |= result.summary() | {"not_measured": absent}
    for name, entries in predicted.items():
        if name:
            some = scoring.TEACHER_FORCED if name == "teacher_forced" else set(measured)
            modules = {key: tasks for key, tasks in measured.items() if key in some}
            beside = scoring.Scorer(modules, options.threshold).score(chosen[name], entries).summary()
            summary[name] = {key: beside[key] for key in ("metrics", "intervals", "n_of_metric", "n_of_number")}
    if str(options.split).startswith("scenes-bench"):
        summary |= scoring.bench_details(samples, result, options)
    reporting.write(output, spec, summary, samples, predicted[""], result, options.hub_dataset)
    return summary


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, epilog = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="validate.py", description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--model", help="folder of a checkpoint, or a repository id on the Hub")
    parser.add_argument("--predictions", metavar="FILE", help="measure these (json lines) instead of a model's")
    parser.add_argument("--benchmark", help="a name, or a YAML file with one benchmark; --list shows the names")
    parser.add_argument("--split", help="default: the benchmark's first")
    parser.add_argument("--data", metavar="DIR", help="the folder that the benchmark's source reads")
    parser.add_argument("--images", metavar="DIR", help="the pictures, where they are elsewhere")
    parser.add_argument(
        "--annotations", nargs="+", metavar="FILE", help="the annotation files, where they are elsewhere"
    )
    parser.add_argument("--no_images", action="store_true", help="with --predictions: score without the pictures")
    parser.add_argument("--limit", type=int, help="only the first so many samples")
    parser.add_argument("--seed", type=int, help="of what is drawn: scenes (from 10^6 on), coco's expressions")
    parser.add_argument("--output", metavar="DIR", help="default: outputs/<benchmark>_<split>")
    parser.add_argument("--overwrite", action="store_true", help="forget the predictions that are in OUTPUT")
    parser.add_argument("--teacher_forced", action="store_true", help="also measure along the true answers, beside")
    parser.add_argument("--threshold", type=float, default=0.0, help="objects that score less are left out")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, help="default: the benchmark's")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the process's accelerator")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--hub_dataset", metavar="ID", help="the data set on the Hub that .eval_results names")
    parser.add_argument("--compare", nargs=2, metavar="SUMMARY", help="two summaries: what differs, beyond chance?")
    parser.add_argument("--list", action="store_true", help="the benchmarks, with their splits and metrics")
    parsed = parser.parse_args(arguments)
    if not parsed.compare and not parsed.list:
        if not parsed.benchmark:
            parser.error("--benchmark is missing; --list shows the names")
        if bool(parsed.model) == bool(parsed.predictions):
            parser.error("give either --model or --predictions")
        if parsed.no_images and (parsed.model or parsed.images):
            parser.error("--no_images goes with --predictions, without --images")
        for name in ("batch_size", "max_new_tokens", "limit"):
            if getattr(parsed, name) is not None and getattr(parsed, name) < 1:
                parser.error(f"argument --{name}: {getattr(parsed, name)} is not a positive number")
        if not math.isfinite(parsed.threshold):
            parser.error(f"argument --threshold: {parsed.threshold} is not a finite number")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the head of this file."""
    options = parse_arguments(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if options.list:
            for name, spec in read_benchmarks().items():
                print(f"{name}: splits {', '.join(map(str, spec['splits']))}; metrics {', '.join(spec['metrics'])}")
        elif options.compare:
            print(reporting.compare(*options.compare, options.output))
        else:
            summary = validate(options, shlex.join(["validate.py", *words]))
            if summary is not None:
                print(reporting.table(summary))
            PartialState().destroy_process_group()  # of several processes: or its threads may outlive the interpreter
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
