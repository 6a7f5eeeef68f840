"""A model's answers to samples, batch by batch, written down so that a stopped run can go on."""

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from perceptiongpt import inference
from perceptiongpt.data.schema import ONE_OBJECT_TASKS, row_to_messages
from perceptiongpt.evaluation.predictions import read_entries
from perceptiongpt.evaluation.samples import read_sample_image, signal_columns
from perceptiongpt.signals_perceptiongpt import SIGNALS


PREDICTIONS = "predictions.jsonl"
PARTS = "predictions.{:05d}.part"  # of each process, until the end
GREY = (128, 128, 128)


def no_answer(error: str | None) -> dict:
    """The prediction of a sample without an answer."""
    return {"text": None, "objects": [], "tokens": 0, "finished": True, "error": error}


def answer(
    model, processor, samples: list[dict], images: list[Image.Image], max_new_tokens: int, ground: bool = False
) -> list[dict]:
    """The model's own greedy answers: {`text`, `objects`, `tokens`, `finished`, `error`} per sample.

    Args:
        ground: answers to questions for one object end with it, as `ground` of `inference.answer` does.
    """
    answered = {}
    for grounded in (True, False):
        some = [index for index, one in enumerate(samples) if (ground and one["task"] in ONE_OBJECT_TASKS) == grounded]
        if some:
            messages = [row_to_messages({**samples[index], "image": images[index]}) for index in some]
            sizes = _sizes([samples[index] for index in some])
            results = inference.answer(
                model, processor, messages, sizes, max_new_tokens=max_new_tokens, ground=grounded
            )
            answered |= dict(zip(some, results, strict=True))
    kept = ("text", "objects", "tokens", "finished")
    return [{**{name: answered[index][name] for name in kept}, "error": None} for index in range(len(samples))]


@torch.no_grad()
def answer_teacher_forced(model, processor, samples: list[dict], images: list[Image.Image], _=None) -> list[dict]:
    """The objects decoded before each `<vis>` of the reference answer, which the model reads: one per target."""
    messages = []
    for sample, image in zip(samples, images, strict=True):
        true = sample["answers"][0]
        turn = {"role": "assistant", "content": true["content"]}
        row = {**sample, "image": image, "messages": [*sample["messages"], turn]}
        row |= {column: sample[column] + true[column] for column in signal_columns(sample)}
        messages.append(row_to_messages(row))
    inputs = inference.prepare_inputs(model, processor, messages)
    is_slot = inputs["input_ids"] == processor.vis_token_id
    slots = int(is_slot.sum(1).max())
    if slots == 0:
        return [no_answer("no target to be forced to") for _ in samples]
    output = model(**inputs)
    ids = inputs["input_ids"]
    positions = torch.zeros(len(samples), slots, dtype=torch.long, device=ids.device)
    valid = torch.zeros_like(positions, dtype=torch.bool)
    for row, sample in enumerate(samples):
        found = is_slot[row].nonzero().flatten()
        given = sum(message["content"].count(processor.vis_token) for message in sample["messages"])
        positions[row, : len(found)] = found
        valid[row, given : len(found)] = True
    rows = torch.arange(len(samples), device=ids.device)[:, None]
    emission = output.logits[rows, (positions - 1).clamp(min=0)].float().softmax(-1)[..., processor.vis_token_id]
    values = {"sequences": ids, "prompt_length": ids.shape[1], "object_valid": valid, "positions": positions}
    for signal in (SIGNALS[name] for name in model.config.signals):
        (prediction, quality), (value, score) = signal.prediction_names, signal.result_names
        values |= {value: output[prediction], score: emission * output[quality]}
    results = processor.post_process_generation(values, target_sizes=_sizes(samples), mask_format="rle")
    return [no_answer(None) | {"objects": result["objects"]} for result in results]


def _sizes(samples: list[dict]) -> list[tuple[int, int]]:
    return [(sample["height"], sample["width"]) for sample in samples]


def read_images(batch: list[dict], grey: bool) -> dict[str, Image.Image | str]:
    """Id -> the sample's image (`grey`: a grey one of its size), or why it cannot be read."""
    images = {}
    for sample in batch:
        try:
            image = read_sample_image(sample)
            images[sample["id"]] = Image.new("RGB", image.size, GREY) if grey else image
        except ValueError as error:
            images[sample["id"]] = f"image cannot be read: {error}"
    return images


def answer_batch(batch: list[dict], images: dict[str, Image.Image | str], answer_some: Callable) -> list[dict]:
    """One prediction per sample; one whose image is broken, or that the processor refuses, has an `error` instead."""
    start = time.perf_counter()
    asked = [sample for sample in batch if not isinstance(images[sample["id"]], str)]
    entries = {name: no_answer(image) for name, image in images.items() if isinstance(image, str)}
    try:
        if asked:
            found = answer_some(asked, [images[sample["id"]] for sample in asked])
            entries |= {sample["id"]: entry for sample, entry in zip(asked, found, strict=True)}
    except inference.RefusedError as error:
        if len(asked) == 1:
            entries[asked[0]["id"]] = no_answer(f"refused by the processor: {error}")
        else:
            for sample in asked:
                entries |= {sample["id"]: answer_batch([sample], images, answer_some)[0]}
    milliseconds = round(1000 * (time.perf_counter() - start) / len(batch), 3)
    heads = ({name: sample[name] for name in ("id", "image_id", "task", "prompt")} for sample in batch)
    return [{**head, **entries[head["id"]], "ms": milliseconds} for head in heads]


def collect(folder: Path, samples: list[dict]) -> dict[str, dict]:
    """Merge what the processes wrote into `predictions.jsonl`, in the order of the samples; returns it by id."""
    parts = sorted(folder.glob("predictions.*.part"))
    entries = {}
    for path in (folder / PREDICTIONS, *parts):
        for entry in read_entries(path):
            entries.setdefault(entry["id"], entry)
    order = [sample["id"] for sample in samples if sample["id"] in entries]
    order += sorted(set(entries) - set(order))  # of a run with a higher --limit
    temporary = folder / f"{PREDICTIONS}.new"
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entries[name]) + "\n" for name in order)
    temporary.replace(folder / PREDICTIONS)
    for path in parts:
        path.unlink()
    return entries


def predict_all(
    samples: list[dict],
    folder: Path,
    batch_size: int,
    answer_some: Callable,
    state: PartialState,
    grey: bool = False,
    running: Callable[[dict, dict], float | None] = lambda sample, entry: None,
    title: str = "",
    score_name: str = "",
) -> dict[str, dict]:
    """The predictions of all samples by id: those on disk, and of the others what `answer_some(samples, images)` gives.

    Every process answers its share and appends it to its file batch by batch.

    Args:
        grey: ask about grey images.
        running: (sample, prediction) -> the score whose mean the progress bar shows as `score_name`, or None.
        title: the progress bar's.
    """
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        collect(folder, samples)
    state.wait_for_everyone()
    done = {entry["id"] for entry in read_entries(folder / PREDICTIONS)}
    missing = [sample for sample in samples if sample["id"] not in done]
    if len(missing) < len(samples) and state.is_main_process:
        kept = len(samples) - len(missing)
        print(f"{title}: {kept} of {len(samples)} predictions are on disk already", file=sys.stderr)
    todo = missing[state.process_index :: state.num_processes]
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    scores, path = [], folder / PARTS.format(state.process_index)
    state.wait_for_everyone()  # nobody collects again before everybody has read
    with (
        path.open("a", encoding="utf-8") as file,
        tqdm(total=len(todo), unit="sample", desc=title, disable=not state.is_main_process) as progress,
        ThreadPoolExecutor(1) as reader,
    ):
        ahead = [reader.submit(read_images, batch, grey) for batch in batches[:1]]
        for index, batch in enumerate(batches):
            images = ahead.pop().result()
            # The next images are read while the model answers.
            ahead += [reader.submit(read_images, following, grey) for following in batches[index + 1 : index + 2]]
            entries = answer_batch(batch, images, answer_some)
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
            file.flush()
            values = (running(sample, entry) for sample, entry in zip(batch, entries, strict=True))
            scores += [value for value in values if value is not None]
            if scores:
                progress.set_postfix_str(f"{score_name} {sum(scores) / len(scores):.3f}", refresh=False)
            progress.update(len(batch))
    state.wait_for_everyone()
    entries = collect(folder, samples) if state.is_main_process else {}
    state.wait_for_everyone()
    return entries
