"""The data of a recipe: its sources as data sets, or its mixture as a stream."""

import json
from pathlib import Path

from datasets import concatenate_datasets
from transformers import TrainingArguments

from perceptiongpt.data.collator import PerceptionCollator, group_rows_by_image
from perceptiongpt.data.mixtures import Mixture, load_parts, print_parts
from perceptiongpt.data.sources import load_source


def load_sources(sources: list[dict], evaluation: bool = False):
    """Load and concatenate the data sets of a recipe's `data.train` or `data.eval`; None if there are none."""
    parts = []
    for source in sources:
        arguments = dict(source) if source.get("source") == "parquet" else {"evaluation": evaluation, **source}
        parts.append(load_source(**arguments))
    return concatenate_datasets(parts) if parts else None


def load_train_rows(recipe: dict):
    """The rows that a recipe trains on; None where it trains on a mixture (`load_mixture`)."""
    if isinstance(recipe["data"]["train"], dict):
        return None
    rows = load_sources(recipe["data"]["train"])
    if rows is None or len(rows) == 0:
        raise ValueError("data.train gives no rows: no object of the asked size, or no such task")
    return rows


def pack_rows(rows, collator: PerceptionCollator):
    """Rows grouped by image where the collator packs them; None for None."""
    if rows is None or collator.pack is None:
        return rows
    return group_rows_by_image(rows, collator.pack, collator.seed)


def load_mixture(
    recipe: dict, collator: PerceptionCollator, args: TrainingArguments, checkpoint: str | None = None
) -> Mixture:
    """The recipe's mixture as this process's stream of batches, behind the last batch of a checkpoint.

    The first process prepares the sources that are not prepared yet.
    """
    settings = recipe["data"]["train"]
    with args.main_process_first(local=False, desc="preparing the sources of the mixture"):
        parts = load_parts(settings, settings["cache"] or Path(args.output_dir, "prepared"))
    if args.process_index == 0:
        print_parts(parts)
    mixture = Mixture(
        parts,
        args.per_device_train_batch_size,
        settings["token_budget"],
        collator.length,
        collator.pack,
        settings["window"],
        settings["seed"],
        settings["stopping_strategy"],
        args.process_index,
        args.world_size,
    )
    if checkpoint is not None:
        state = json.loads(stream_file(checkpoint, args.process_index).read_text())
        if "dataloader_num_workers" not in recipe["training"] and state["workers"] is not None:
            # Only as many workers as left a stream can take it up; one is as good as none.
            args.dataloader_num_workers = state["workers"] if state["workers"] > 1 else 0
        mixture.load_state_dict(state)
    return mixture


def stream_file(checkpoint: str | Path, process: int) -> Path:
    """Where a checkpoint keeps how far a process has come in its stream."""
    return Path(checkpoint, f"stream_{process}.json")
