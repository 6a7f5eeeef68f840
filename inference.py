"""Load a checkpoint, read an image, and let the model answer: what every command shares."""

import hashlib
import re
import sys
from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from perceptiongpt import PerceptionGPTConfig  # naming a class registers all of them with the Auto classes


class InputError(ValueError):
    """Something that the person who typed the command can correct."""


class RefusedError(ValueError):
    """The processor does not accept a conversation."""


def hide_progress_bars_in_logs() -> None:
    """Turn the libraries' progress bars off unless standard error is a terminal: a file would get a line a step."""
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


# ---- loading ---------------------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """`InputError` unless this is a folder or could be a repository id."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise InputError(f"--model {name}: there is no such folder")


def load(
    name: str,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """Load a checkpoint.

    Args:
        name: a folder, or a repository id on the Hub; or the folder of an adapter beside its base.
        device: by default the accelerator, where there is one.
        dtype: `auto` for the checkpoint's own.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: run Python code that comes with a checkpoint. PerceptionGPT checkpoints do not need it here.

    Returns:
        (model in eval mode, processor)

    Raises:
        InputError: there is no such checkpoint, or it is not one of PerceptionGPT.
    """
    check_name(name)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(name, **hub)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **hub)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--model {name}: not a checkpoint that can be loaded: {error}") from error
    if not hasattr(processor, "post_process_generation"):
        kind, known = model.config.model_type, PerceptionGPTConfig.model_type
        raise InputError(f"--model {name}: a checkpoint of the type {kind!r}, expected {known!r}")
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), processor


def checkpoint_hash(model: str | Path) -> str | None:
    """SHA-256 over the config and the weights of a checkpoint in a folder; None of one on the Hub."""
    files = [
        path for path in sorted(Path(model).glob("*")) if path.name == "config.json" or path.suffix == ".safetensors"
    ]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None


# ---- answering -------------------------------------------------------------------------------------------------------


def prepare_inputs(model, processor, conversations: list[list[dict]], **kwargs):
    """Conversations (lists of messages) as the model takes them, on its device.

    Args:
        kwargs: for `processor.apply_chat_template`, such as `add_generation_prompt=True`.

    Raises:
        RefusedError: the processor does not accept one of them.
    """
    try:
        inputs = processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
        )
    except ValueError as error:
        raise RefusedError(str(error)) from error
    return inputs.to(model.device, model.dtype)


@torch.no_grad()
def answer(
    model,
    processor,
    conversations: list[list[dict]],
    sizes: list[tuple[int, int]],
    *,
    mask_format: str | None = "rle",
    threshold: float = 0.0,
    ground: bool = False,
    **generate_kwargs,
) -> list[dict]:
    """Let the model answer a batch of conversations, greedily unless `generate_kwargs` say otherwise.

    Args:
        conversations: lists of messages as `apply_chat_template` takes them, without the answer.
        sizes: (height, width) of each conversation's image: boxes and masks are given in its pixels.
        mask_format, threshold: of `processor.post_process_generation`.
        ground: the conversations ask for one object each: an answer that begins with an object ends with it, and is
            read from the prompt without decoding. Other answers are written to their end.
        generate_kwargs: for `model.generate`, such as `max_new_tokens`.

    Returns:
        For each conversation the dict of `post_process_generation`, and in it `tokens`, the length of the answer with
        its end, and `finished`, whether the model ended it.

    Raises:
        RefusedError: the processor does not accept one of the conversations.
    """
    inputs = prepare_inputs(model, processor, conversations, add_generation_prompt=True)
    if ground:
        output = model.ground(**inputs, **generate_kwargs)
    else:
        output = model.generate(**inputs, **{"do_sample": False, **generate_kwargs}, return_dict_in_generate=True)
    results = processor.post_process_generation(
        output, target_sizes=sizes, threshold=threshold, mask_format=mask_format
    )
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])
    answers = output.sequences[:, output.prompt_length :].cpu()
    is_end = torch.isin(answers, ends)
    if ground:
        is_end[:, 0] |= answers[:, 0] == processor.vis_token_id
    for result, end in zip(results, is_end, strict=True):
        finished = bool(end.any())
        result |= {"tokens": int(end.int().argmax()) + 1 if finished else len(end), "finished": finished}
    return results


def answer_each(model, processor, conversations: list, sizes: list[tuple[int, int]], **kwargs) -> list[dict]:
    """As `answer`; for a conversation that the processor does not accept, `{"error": why}` instead of its result."""
    try:
        return answer(model, processor, conversations, sizes, **kwargs)
    except RefusedError as error:
        if len(conversations) == 1:
            return [{"error": str(error)}]
    pairs = zip(conversations, sizes, strict=True)
    return [answer_each(model, processor, [one], [size], **kwargs)[0] for one, size in pairs]
