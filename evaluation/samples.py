"""Samples: what the model is asked, and the reference answers, made of the rows of a source.

A sample is a dictionary:

| key | content |
| --- | --- |
| `id` | the image's id and the number of the sample about this image |
| `task`, `image_id`, `width`, `height`, `source`, `split` | as in the row |
| `image` | {`path`, `bytes`}, or None |
| `messages`, `boxes`, `masks`, .. | the conversation before the answer, as in the row, with the values of its `<vis>` |
| `prompt` | the text of the last question |
| `phrase`, `template` | what the prompt asks for, and its wording; None and "" if the source has its own words |
| `answers` | the reference answers: {`content`, `boxes`, `masks`, ..} each |
| `human_answers` | of a question: what each of ten people answered, or None |
| `ignore` | an RLE of the pixels that do not count, or None |
"""

import argparse
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from perceptiongpt.configuration_perceptiongpt import IMAGE_TOKEN, VIS_TOKEN
from perceptiongpt.data.reading import Problems
from perceptiongpt.data.sources import rows as source_rows
from perceptiongpt.data.templates import load_templates
from perceptiongpt.evaluation.benchmarks import Benchmark, choose_split
from perceptiongpt.evaluation.coco_folder import find_coco_files, find_coco_images, is_named_after
from perceptiongpt.images_perceptiongpt import read_image
from perceptiongpt.inference import InputError
from perceptiongpt.signals_perceptiongpt import SIGNALS


BENCH_PREFIX = "scenes-bench"  # splits of the scenes whose rows are fixed
IMAGE_SUFFIX = ".png"


def complete_options(options: argparse.Namespace, benchmark: Benchmark) -> None:
    """Fill in what the command line leaves open: seed, limit, split and, for the source `coco`, the files.

    Raises:
        InputError: a folder does not exist, or the files of a COCO folder cannot be found.
    """
    for name in ("data", "images"):
        if getattr(options, name) and not Path(getattr(options, name)).is_dir():
            raise InputError(f"--{name} {getattr(options, name)}: there is no such folder")
    options.seed = benchmark.seed if options.seed is None else options.seed
    options.limit = benchmark.limit if options.limit is None else options.limit
    options.max_new_tokens = options.max_new_tokens or benchmark.max_new_tokens
    if benchmark.source != "coco":
        options.split = choose_split(benchmark, options.split, options.seed)
        return
    splits = [options.split] if options.split else [split for split in benchmark.splits if split]
    images = False if options.no_images else options.images
    if options.annotations:
        if options.split is None:
            file = Path(options.annotations[0]).absolute()
            options.split = next((split for split in splits if is_named_after(file, file.parent.parent, split)), "all")
        if options.data and images is None:
            options.images = find_coco_images(Path(options.data), Path(options.annotations[0]))
    elif options.data:
        found = find_coco_files(Path(options.data), splits, images)
        options.annotations, options.split, options.images = (
            found["annotations"],
            found["split"],
            found["images"] or None,
        )


def read_samples(benchmark: Benchmark, options: argparse.Namespace, problems: Problems) -> list[dict]:
    """The benchmark's first `options.limit` samples, in the order of its source.

    Args:
        options: as `complete_options` leaves them.

    Raises:
        InputError: the data cannot be read, or there are no samples.
    """
    arguments = dict(benchmark.arguments, root=options.data, split=options.split, seed=options.seed, evaluation=True)
    arguments |= {"problems": problems, "images": options.images, "annotations": options.annotations}
    if options.no_images:
        arguments["images"] = False
    arguments["tasks"] = None if is_scenes_bench(options.split) else benchmark.tasks
    if benchmark.source == "scenes":
        arguments["limit"] = options.limit
    samples, by_question, of_image = [], {}, Counter()
    try:
        for row in source_rows(benchmark.source, **arguments):
            if row["messages"][-1]["role"] != "assistant":
                raise InputError(f"split {options.split!r} has no answers to compare with")
            sample, answer = split_row(row, benchmark.prompt)
            key = (row["image_id"], sample["prompt"], json.dumps([sample[name] for name in signal_columns(sample)]))
            if benchmark.group and key in by_question:
                by_question[key]["answers"].append(answer)
                continue
            if options.limit is not None and len(samples) == options.limit:
                break
            sample["id"] = f"{row['image_id']}-{of_image[row['image_id']]}"
            of_image[row["image_id"]] += 1
            sample["answers"] = [answer]
            samples.append(by_question.setdefault(key, sample) if benchmark.group else sample)
    except InputError:
        raise
    except (ValueError, OSError) as error:
        hint = "" if options.data or benchmark.source == "scenes" else "; is --data DIR missing?"
        raise InputError(f"benchmark {benchmark.name}, split {options.split!r}: {error}{hint}") from error
    if not samples:
        raise InputError(f"benchmark {benchmark.name}, split {options.split!r}: there are no samples")
    return samples


def is_scenes_bench(split: str | None) -> bool:
    """Whether a split of the scenes is one of fixed rows."""
    return str(split).startswith(BENCH_PREFIX)


def signal_columns(row: dict) -> list[str]:
    """The columns of a row, or keys of a sample, that hold one value per `<vis>`."""
    return [signal.plural for signal in SIGNALS.values() if signal.plural in row]


def split_row(row: dict, prompts: dict[str, str]) -> tuple[dict, dict]:
    """A row as a sample without its id and answers, and the reference answer."""
    *before, last = row["messages"]
    columns = signal_columns(row)
    first = len(row[columns[0]]) - last["content"].count(VIS_TOKEN)
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
    sample |= {"image": image, "messages": messages, "prompt": prompt, "phrase": phrase, "template": template}
    sample |= {"human_answers": row.get("answers"), "ignore": row.get("ignore")}
    sample |= {column: row[column][:first] for column in columns}
    return sample, {"content": last["content"]} | {column: row[column][first:] for column in columns}


def evaluation_prompt(task: str, prompt: str) -> tuple[str, str] | None:
    """(task, template) that an evaluation prompt was made of; None if the prompt has other words.

    A sample without a target is asked in the words of `detect` or `refer`.
    """
    for name in ("detect", "refer") if task == "no_target" else (task,):
        template = load_templates().get(name, {}).get("evaluation", "")
        start, hole, end = template.partition("{phrase}")
        if template and (prompt.startswith(start) and prompt.endswith(end) if hole else prompt == template):
            return name, template
    return None


def read_sample_image(sample: dict) -> Image.Image:
    """The sample's image in RGB, upright."""
    return read_image(sample["image"])


def describe_samples(samples: list[dict], folder: Path | None) -> Iterator[dict]:
    """What another model needs to answer each sample: `id`, `prompt`, `image` (a path) and the earlier `messages`.

    Args:
        folder: where images that have no file, such as drawn scenes, are saved as `images/<id>.png`; None: their path
            is None.
    """
    for sample in samples:
        image = sample["image"] and sample["image"]["path"]
        if folder and sample["image"] and sample["image"]["bytes"] is not None:
            image = folder / "images" / f"{sample['id']}{IMAGE_SUFFIX}"
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(sample["image"]["bytes"])
        found = {name: sample[name] for name in ("id", "task", "prompt", "image_id", "width", "height")}
        found["image"] = image and str(image)
        if len(sample["messages"]) > 1:
            found["messages"] = sample["messages"]
        yield found | {column: sample[column] for column in signal_columns(sample) if sample[column]}
