"""A dry run: what a recipe would train, on what batches, with how much memory on each GPU. No weight is read.

    python train.py --config recipes/paper_7b.yaml --dry_run

Configs and tokenizers come from folders or the Hub. Of each source the first rows are read, as many as a batch has;
where there are fewer, as in a fragment of a data set, they come again. Sources that are prepared before training are
read here as they are.
"""

import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import torch
from pyarrow import parquet

from perceptiongpt import PerceptionGPTConfig, PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt.data.collator import PerceptionCollator, image_key
from perceptiongpt.data.mixtures import PART_KEYS, PREPARE_KEYS, open_images
from perceptiongpt.data.sources import default_split, prepared_files, rows
from perceptiongpt.training.adapters import add_adapter, model_dtype, print_parameter_table, set_loss_weights
from perceptiongpt.training.language_model import save_language_model
from perceptiongpt.training.memory import STRATEGIES, BatchShape, memory_per_gpu, step_bytes, with_layers
from perceptiongpt.training.trainer import TRAINING_DEFAULTS


GPUS = (2, 4, 8, 16)
GIB = 2**30


# ---- the model -------------------------------------------------------------------------------------------------------


def read_config(recipe: dict) -> tuple[PerceptionGPTConfig, PerceptionGPTProcessor]:
    """The config of a recipe's model, and its processor; see `adapters.load_model`.

    Raises:
        ValueError: the model looks again, which the estimate of memory does not know of.
    """
    settings = recipe["model"]
    signals = {} if settings["signals"] is None else {"signals": settings["signals"]}
    if settings["checkpoint"] is not None:
        config = PerceptionGPTConfig.from_pretrained(settings["checkpoint"], **signals)
        processor = PerceptionGPTProcessor.from_pretrained(settings["checkpoint"], **signals)
    elif isinstance(settings["text"], dict):
        with tempfile.TemporaryDirectory() as folder:
            save_language_model(folder, **settings["text"])
            return read_config({**recipe, "model": {**settings, "text": folder}})
    else:
        vision, text = (settings["vlm"] or settings[name] for name in ("vision", "text"))
        config = PerceptionGPTForConditionalGeneration.join_configs(vision, text, **settings["config"], **signals)
        processor = PerceptionGPTProcessor.from_backbones(vision, text, config)
    if settings["looks"] or config.look_max:
        raise ValueError("--dry_run does not count what looks cost; leave model.looks out, or take another model")
    set_loss_weights(config, recipe["loss"])
    return config, processor


def build_on_meta(config: PerceptionGPTConfig, recipe: dict, dtype: torch.dtype, layers: int | None = None):
    """A recipe's model with its adapter on the meta device, with so many layers of the language model or all."""
    chosen, parts = recipe["model"]["attn_implementation"], ("vision_config", "text_config")
    chosen = chosen if isinstance(chosen, dict) else dict.fromkeys(parts, chosen)
    # Other fused kernels keep what sdpa keeps, and may not be installed here.
    attention = {part: "eager" if chosen.get(part) == "eager" else "sdpa" for part in parts}
    with torch.device("meta"):
        model = PerceptionGPTForConditionalGeneration(config if layers is None else with_layers(config, layers))
        model.to(dtype)
        for module in model.model.signal_modules().values():
            module.float()
        model.set_attn_implementation(attention)
        return add_adapter(model, **recipe["adapter"])


# ---- the data --------------------------------------------------------------------------------------------------------


def first_rows(source: dict) -> Iterator[dict]:
    """The rows of one source of a recipe, or of one part of a mixture, as they are stored."""
    arguments = {key: value for key, value in source.items() if key not in (*PART_KEYS, *PREPARE_KEYS)}
    name = arguments.pop("source", "coco")
    if name == "parquet":
        for file in prepared_files(**arguments):
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=64):
                yield from batch.to_pylist()
        return
    if name != "scenes":
        arguments.setdefault("split", default_split(name))
    yield from rows(name, **arguments)


def items_of(found: Iterable[dict], pack: int | None) -> Iterator[dict | list[dict]]:
    """Rows as a batch has them: by themselves, or lists of consecutive rows about one image, at most `pack`."""
    if pack is None:
        yield from found
        return
    group = []
    for row in found:
        if group and (len(group) == pack or image_key(row) is None or image_key(row) != image_key(group[0])):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def one_batch(source: dict, collator: PerceptionCollator, size: int, token_budget: int | None) -> tuple[dict, int]:
    """A batch of one source, and how many rows were read for it.

    Raises:
        ValueError: the source cannot be read, or has no rows with an answer.
    """
    answered = (row for row in first_rows(source) if any(turn["role"] == "assistant" for turn in row["messages"]))
    items = list(islice(items_of(answered, collator.pack), size))
    if not items:
        raise ValueError("no rows with an answer")
    count = sum(len(item) if isinstance(item, list) else 1 for item in items)
    items = [open_images(item) for item in items]
    if token_budget is not None:
        longest = collator(items)["input_ids"].shape[1]
        size = token_budget // longest
        if size < 1:
            raise ValueError(f"a row has {longest} tokens, token_budget is {token_budget}")
    return collator(list(islice(cycle(items), size))), count


# ---- all of it -------------------------------------------------------------------------------------------------------


def dry_run(recipe: dict) -> list[str]:
    """Print what a recipe would train: parameters, a batch of each source, memory per GPU and steps.

    Args:
        recipe: a completed recipe without stages.

    Returns:
        the sources that gave no batch, each with its reason.

    Raises:
        ValueError: the recipe has stages, its model has no config or tokenizer, or no source gives a batch.
    """
    if recipe.get("stages") is not None:
        raise ValueError("--dry_run is for recipes without stages: later stages start from weights of earlier ones")
    try:
        config, processor = read_config(recipe)
    except OSError as error:
        raise ValueError(f"the model's config or tokenizer cannot be read: {error}") from error
    dtype = model_dtype(recipe)
    model = build_on_meta(config, recipe, dtype)
    print_parameter_table(model)
    collator = PerceptionCollator(processor, config, **recipe["collator"])

    train = recipe["data"]["train"]
    is_mixture = isinstance(train, dict)
    sources, budget = (train["mixture"], train["token_budget"]) if is_mixture else (train, None)
    settings = {**TRAINING_DEFAULTS, **recipe["training"]}
    size = settings["per_device_train_batch_size"]
    print(f"\n{'source':<30}{'rows read':>10}{'batch':>14}{'images':>8}{'masks':>8}{'tokens learned':>16}")
    shapes, failed = [], []
    for source in sources:
        name = source.get("source", "coco")
        name = f"{name} ({source.get('dataset') or Path(source['root']).name})" if "root" in source else name
        try:
            batch, count = one_batch(source, collator, size, budget)
        except (ValueError, OSError) as error:
            failed.append(f"{name}: {error}")
            print(f"{name:<30}  {error}")
            continue
        shape = BatchShape.of(batch, config)
        shapes.append(shape)
        learned = int((batch["labels"] >= 0).sum())
        cells = f"{shape.rows} x {shape.length}"
        print(f"{name:<30}{count:>10,}{cells:>14}{shape.images:>8}{shape.masks:>8}{learned:>16,}")
    if not shapes:
        raise ValueError("no source of data.train gives a batch: " + "; ".join(failed))

    largest = max(shapes, key=lambda shape: shape.rows * shape.length)
    quantized = recipe["adapter"]["mode"] == "qlora"
    step = step_bytes(partial(build_on_meta, config, recipe, dtype), largest, dtype, quantized)
    in_float32 = step
    if dtype != torch.float32:  # what the recipes of DeepSpeed ask for
        build = partial(build_on_meta, config, recipe, torch.float32)
        in_float32 = step_bytes(build, largest, torch.float32, quantized)
    accumulation = settings.get("gradient_accumulation_steps") or 1
    steps = int(settings.get("max_steps") or 0)
    length = f"{steps:,} steps" if steps > 0 else f"{settings.get('num_train_epochs', 3)} epochs"
    print(
        f"\n{length} of {largest.rows} rows x {accumulation} micro-batches a GPU. GiB on each GPU for a batch of "
        f"{largest.rows} x {largest.length} tokens (computed, not run):"
    )
    heads = ("weights", "training", "logits", "activations", "all", "activations", "all")
    print(f"{'':<20}{'':>12}{'':>36}{'checkpointed':>24}{'kept':>24}")
    print(f"{'strategy':<14}{'GPUs':>6}{'rows a step':>12}" + "".join(f"{head:>12}" for head in heads))
    for strategy, gpus in [(None, 1), *((strategy, gpus) for strategy in STRATEGIES for gpus in GPUS)]:
        found = memory_per_gpu(in_float32 if str(strategy).startswith("ZeRO") else step, strategy, gpus)
        base = [found[name] for name in ("weights", "training", "logits")]
        values = [*base]
        for way in ("checkpointed", "activations"):
            values += [found[way], sum(base) + found[way]]
        numbers = "".join(f"{value / GIB:>12.1f}" for value in values)
        print(f"{strategy or 'one GPU':<14}{gpus:>6}{largest.rows * accumulation * gpus:>12,}{numbers}")
    print("training: gradients and Adam's moments, in float32. ZeRO: with model.dtype=float32 (recipes/accelerate)")
    return failed
