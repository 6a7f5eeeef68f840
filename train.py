"""Fine-tune PerceptionGPT on a recipe.

    python train.py --config recipes/coco_lora.yaml data.train.annotations=instances.json data.train.images=photos \
        model.checkpoint=DIR --output runs/mine
    python train.py --output runs/mine --resume       # go on where it stopped; what is given again goes over its recipe
    accelerate launch --config_file recipes/accelerate/ddp.yaml train.py --config ... --output ...

A recipe is YAML with the sections of `DEFAULTS`; `section.key=value` on the command line goes over it. Everything in
`training` goes to `transformers.TrainingArguments` (`report_to`, `bf16`, `gradient_checkpointing`, ...).

What OUTPUT holds: `checkpoint-*` (to resume from), `adapter/` (the PEFT adapter, where the mode has one),
`recipe.yaml`, `trainer_state.json` (every logged number), `losses.png`, and at the top the final plain model, adapter
merged, with its processor: `from_pretrained(OUTPUT)` works.

Adapter modes: `heads` (projector, mixtures, signal modules and the rows of the added tokens), `lora` (and rank r on the
language model's projections), `qlora` (the same over 4-bit weights), `full`.
"""

import argparse
import difflib
import json
import os
import re
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import PartialState
from datasets import concatenate_datasets
from torch.utils.data import DataLoader
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.data.collator import IGNORED_LABEL, PerceptionCollator, answer_slots, group_rows_by_image
from perceptiongpt.data.mixtures import (
    MIXTURE_DEFAULTS,
    PART_KEYS,
    PREPARE_KEYS,
    Mixture,
    MixtureCollator,
    load_parts,
    print_parts,
)
from perceptiongpt.data.schema import DIRECT_TASKS, decode_rle, row_to_messages
from perceptiongpt.data.sources import COMMON_ARGUMENTS, SOURCES, load_source, source_arguments


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_MODES = ("heads", "lora", "qlora", "full")
BACKBONES = ("vision_tower", "language_model")
# Parts of a tower behind the last layer whose output is used, and mask tokens: no loss reaches them.
UNREACHED_TOWER_PARTS = re.compile(
    r"vision_tower\.(vision_model\.)?(post_layernorm|layernorm|head|pooler)\.|mask_token"
)
LOSS_TERMS = ("loss_lm", "loss_box", "loss_mask", "loss_iou")
SIGNAL_LABELS = ("labels", "boxes", "masks", "boxes_valid", "masks_valid")
RECIPE_SOURCES = (*SOURCES, "parquet")  # the last: a folder that data.prepare has made

DEFAULTS = {
    # One of: `checkpoint` (a PerceptionGPT folder or id), `vision` and `text` (backbones), `llava` (a LLaVA id).
    # `config`: sizes, for new joins only. `attn_implementation`: as in `from_pretrained`.
    "model": {
        "checkpoint": None,
        "vision": None,
        "text": None,
        "llava": None,
        "config": {},
        "dtype": "float32",
        "attn_implementation": "sdpa",
    },
    "adapter": {
        "mode": "lora",
        "rank": 32,
        "alpha": 64,
        "dropout": 0.0,
        "target_modules": list(LORA_TARGETS),
        "train_vision_tower": False,
    },
    # `train` and `eval`: one source or a list of them: {source: coco, annotations: .., images: .., tasks: [..], ..} or
    # {source: parquet, root: .., split: ..}. `train` may be a mixture instead: see `data/mixtures.py`.
    # Besides the losses, evaluation lets the model answer `generate_rows` direct prompts by itself.
    "data": {"train": None, "eval": None, "generate_rows": 64, "generate_batch_size": 8, "generate_tokens": 64},
    # The arguments of `PerceptionCollator`.
    "collator": {
        "seed": 0,
        "box_jitter": 0.02,
        "read_probabilities": None,
        "pack": None,
        "max_length": None,
        "cache_rows": 0,
    },
    # Weights that replace those of the config, e.g. {lm: 1, box_giou: 2, mask_dice: 2}.
    "loss": {},
    "training": {},
}
TRAINING_DEFAULTS = {
    "report_to": "none",
    "logging_steps": 10,
    "per_device_train_batch_size": 8,
    "remove_unused_columns": False,
    "label_names": list(SIGNAL_LABELS),
    "prediction_loss_only": True,
}
FREE_KEYS = {"model.config", "collator.read_probabilities", "loss"}


# ---- recipe ----------------------------------------------------------------------------------------------------------


class RecipeLoader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everyone expects."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)
RecipeLoader.yaml_implicit_resolvers = {  # integers stay integers: their resolver is asked first
    first: sorted(resolvers, key=lambda resolver: resolver[0] != "tag:yaml.org,2002:int")
    for first, resolvers in RecipeLoader.yaml_implicit_resolvers.items()
}


def read_recipe(path: str | Path, overrides: list[str] = (), under: str | Path | None = None) -> dict:
    """Read a recipe, put `section.key=value` overrides over it, fill in `DEFAULTS`, and check every key.

    Args:
        path: its YAML.
        overrides: the command line's.
        under: the recipe of an earlier run, over which this one goes.

    Raises:
        ValueError: for a key that nothing reads, with the nearest known ones.
    """
    given = read_yaml(path)
    if under is not None:
        before = read_yaml(under)
        for part, sources in before["data"].items():
            if isinstance(sources, list) and len(sources) == 1:
                before["data"][part] = sources[0]  # as recipes have it
        given = put_over(before, given)
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not key=value")
        *parents, last = name.split(".")
        node = given
        for parent in parents:
            if node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
            if not isinstance(node, dict):
                raise ValueError(f"{name!r}: {parent!r} is a {type(node).__name__}, not a section")
        node[last] = yaml.load(value, RecipeLoader)
    return complete_recipe(given)


def read_yaml(path: str | Path) -> dict:
    """The content of a YAML file; `ValueError` if it cannot be read as such."""
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), RecipeLoader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from error


def put_over(below, above):
    """`above`, with what only `below` has where both are mappings."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: put_over(below.get(key), value) for key, value in above.items()}}


def complete_recipe(given: dict) -> dict:
    """Fill a recipe's sections up with `DEFAULTS` and check its keys; see `read_recipe`."""
    training_keys = [field.name for field in fields(TrainingArguments) if field.init]
    known = {section: list(values) for section, values in DEFAULTS.items()}
    known["training"] = [key for key in training_keys if key != "output_dir"]  # --output says it
    everything = [section for section in known] + [f"{section}.{key}" for section in known for key in known[section]]

    def check(name: str, allowed: list[str]) -> None:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.4)
            near += [full for full in everything if full.endswith("." + name)]
            raise ValueError(f"unknown key {name!r} in the recipe; the nearest known are {', '.join(near) or allowed}")

    recipe = {}
    for section in given:
        check(section, list(known))
    for section, defaults in DEFAULTS.items():
        values = given.get(section) or {}
        if not isinstance(values, dict):
            raise ValueError(f"section {section!r} of the recipe must be a mapping, got {values!r}")
        if section not in FREE_KEYS:
            for key in values:
                check(f"{section}.{key}", [f"{section}.{key}" for key in known[section]])
        # YAML reads a bare `no` as false; the strategies of the library's Trainer are called "no".
        strategies = {key: "no" for key, value in values.items() if key.endswith("_strategy") and value is False}
        recipe[section] = {**defaults, **values, **strategies}
    for part in ("train", "eval"):
        sources, more = recipe["data"][part] or [], ()
        if part == "train" and isinstance(sources, dict) and "mixture" in sources:
            for key in sources:
                check(f"data.train.{key}", [f"data.train.{key}" for key in MIXTURE_DEFAULTS])
            recipe["data"][part] = {**MIXTURE_DEFAULTS, **sources}
            sources, more = sources["mixture"], (*PART_KEYS, *PREPARE_KEYS)
            if int(recipe["training"].get("max_steps") or 0) < 1:
                raise ValueError("a mixture is a stream without end: set training.max_steps")
        else:
            recipe["data"][part] = sources = [sources] if isinstance(sources, dict) else list(sources)
        for source in sources:
            name = source.get("source", "coco")
            if name not in RECIPE_SOURCES:
                raise ValueError(f"data.{part}: source {name!r} is none of {', '.join(RECIPE_SOURCES)}")
            if part == "train" and name == "scenes" and source.get("split", "train") != "train":
                raise ValueError(f"data.train: scenes of the split {source['split']!r} are kept from training")
            own = ("root", "split") if name == "parquet" else (*COMMON_ARGUMENTS, *source_arguments(name))
            for key in source:
                check(f"data.{part}.{key}", [f"data.{part}.{key}" for key in ("source", *own, *more)])
    if not recipe["data"]["train"]:
        raise ValueError("the recipe has no data.train")
    if recipe["adapter"]["mode"] not in ADAPTER_MODES:
        raise ValueError(f"adapter.mode {recipe['adapter']['mode']!r} is none of {', '.join(ADAPTER_MODES)}")
    model = recipe["model"]
    ways = [model["checkpoint"] is not None, model["llava"] is not None, bool(model["vision"] and model["text"])]
    if sum(ways) != 1 or (model["vision"] is None) != (model["text"] is None):
        raise ValueError("the recipe's model needs either checkpoint, or llava, or vision together with text")
    if model["config"] and not ways[2]:
        raise ValueError("model.config is for joining vision and text; a checkpoint's sizes are fixed")
    if recipe["adapter"]["mode"] == "qlora" and not ways[0]:
        raise ValueError("qlora needs model.checkpoint: only a saved model can be loaded in 4 bit")
    return recipe


def check_output(output: Path, resume: bool) -> str | None:
    """The checkpoint to resume from, or None; `ValueError` if the output cannot be used as asked."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written to: {error}") from error
    last = get_last_checkpoint(output)
    if resume and last is None:
        raise ValueError(f"--resume: there is no checkpoint-* in {output}")
    if not resume and (last is not None or (output / "config.json").exists()):
        raise ValueError(f"--output {output}: holds a checkpoint already; give --resume or another folder")
    return last


# ---- data and model --------------------------------------------------------------------------------------------------


def load_sources(sources: list[dict], evaluation: bool = False):
    """Load and concatenate the data sets of a recipe's `data.train` or `data.eval`; None if there are none."""
    parts = []
    for source in sources:
        arguments = dict(source) if source.get("source") == "parquet" else {"evaluation": evaluation, **source}
        parts.append(load_source(**arguments))
    return concatenate_datasets(parts) if parts else None


def load_mixture(recipe: dict, collator: PerceptionCollator, args: TrainingArguments) -> Mixture:
    """The recipe's mixture as this process's stream of batches; the first process prepares what is not there yet."""
    settings = recipe["data"]["train"]
    with args.main_process_first(local=False, desc="preparing the sources of the mixture"):
        parts = load_parts(settings, settings["cache"] or Path(args.output_dir, "prepared"))
    if args.process_index == 0:
        print_parts(parts)
    return Mixture(
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


def stream_file(checkpoint: str | Path, process: int) -> Path:
    """Where a checkpoint keeps how far a process has come in its stream."""
    return Path(checkpoint, f"stream_{process}.json")


def load_model(recipe: dict, quantized: bool = False):
    """The recipe's model with its loss weights, and its processor."""
    model_class, settings = PerceptionGPTForConditionalGeneration, recipe["model"]
    dtype = getattr(torch, str(settings["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"model.dtype {settings['dtype']!r} is no torch dtype, e.g. float32 or bfloat16")
    if settings["checkpoint"] is not None:
        kwargs = {"dtype": dtype, "attn_implementation": settings["attn_implementation"]}
        if quantized:
            with torch.device("meta"):
                model_on_meta = model_class(model_class.config_class.from_pretrained(settings["checkpoint"]))
            # Naming any module drops the default, which spares `lm_head`; float32 modules must not be quantised.
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=["lm_head", "model.vision_tower"]
                + [f"model.{name}" for name in own_modules(model_on_meta)],
            )
        model = model_class.from_pretrained(settings["checkpoint"], **kwargs)
        processor = PerceptionGPTProcessor.from_pretrained(settings["checkpoint"])
    else:
        if settings["llava"] is not None:
            backbones = (settings["llava"], settings["llava"])
            model = model_class.from_llava_pretrained(settings["llava"], dtype=dtype)
        else:
            backbones = (settings["vision"], settings["text"])
            model = model_class.from_vision_text_pretrained(*backbones, dtype=dtype, **settings["config"])
        processor = PerceptionGPTProcessor.from_backbones(*backbones, model.config)
        model.set_attn_implementation(dict.fromkeys(("vision_config", "text_config"), settings["attn_implementation"]))
    for name, weight in recipe["loss"].items():
        signal, _, term = name.partition("_")
        owner = model.config if name == "lm" else getattr(model.config, f"{signal}_config", None)
        attribute = "lm_loss_weight" if name == "lm" else f"{term}_weight"
        if not hasattr(owner, attribute):
            raise ValueError(f"loss.{name}: the config has no such weight; e.g. lm, box_l1, box_giou, mask_dice")
        setattr(owner, attribute, float(weight))
    return model, processor


def own_modules(model) -> list[str]:
    """Names of the modules beside the two backbones: projector, mixtures, position table, signal modules."""
    return [
        name
        for name, module in model.model.named_children()
        if name not in BACKBONES and next(module.parameters(), None) is not None
    ]


def add_adapter(
    model,
    mode: str,
    rank: int = 32,
    alpha: int = 64,
    dropout: float = 0.0,
    target_modules=LORA_TARGETS,
    train_vision_tower: bool = False,
    autocast_adapter_dtype: bool = True,
):
    """Make the parts of a model trainable that an adapter mode trains (`ADAPTER_MODES`), and freeze the others.

    Args:
        model: a `PerceptionGPTForConditionalGeneration`.
        mode: `heads`, `lora`, `qlora` or `full`.
        rank, alpha, dropout: of LoRA (paper: rank 32).
        target_modules: names of the language model's projections that get LoRA.
        train_vision_tower: for `full` only.
        autocast_adapter_dtype: keep adapters in float32 beside bfloat16 weights (FSDP wants one dtype).

    Returns:
        The model itself for `full`, else a `PeftModel` around it.
    """
    if train_vision_tower and mode != "full":
        raise ValueError(f"adapter.train_vision_tower needs the mode full; {mode} keeps the tower frozen")
    if mode == "full":
        for name, parameter in model.named_parameters():
            in_tower = "vision_tower." in name
            parameter.requires_grad_(not in_tower or (train_vision_tower and not UNREACHED_TOWER_PARTS.search(name)))
        return model
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    config = model.config
    added = [config.image_token_id, config.vis_token_id, config.phrase_start_token_id, config.phrase_end_token_id]
    added += config.reserved_token_ids
    # A pattern, because vision towers have a q_proj too. `heads` has no LoRA layers, only what follows.
    projections = rf".*\blanguage_model\..*\.({'|'.join(target_modules)})"
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=DUMMY_TARGET_MODULES if mode == "heads" else projections,
        modules_to_save=own_modules(model),
        trainable_token_indices={"embed_tokens": added, "lm_head": added},
    )
    return get_peft_model(model, lora_config, autocast_adapter_dtype=autocast_adapter_dtype)


def parameter_table(model) -> list[tuple[str, int, int]]:
    """(part, trainable parameters, parameters) for each part of a model, adapters included, and last their total."""
    counts = {}
    for name, parameter in model.named_parameters():
        if "original_module." in name:  # PEFT's frozen copy of a module that is trained fully
            continue
        path = name.removeprefix("base_model.model.").removeprefix("model.")
        part = path.split(".")[0]
        if "lora_" in name:
            part = f"{part} (LoRA)"
        elif "trainable_tokens_" in name:
            part = "rows of added tokens"
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else int(np.prod(state.shape))
        trainable, total = counts.get(part, (0, 0))
        counts[part] = (trainable + size * parameter.requires_grad, total + size)
    rows = [(part, trainable, total) for part, (trainable, total) in counts.items()]
    return [*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]


def print_parameter_table(model) -> None:
    """Print `parameter_table`."""
    print(f"{'part':<28}{'trainable':>16}{'parameters':>16}{'share':>9}")
    for part, trainable, total in parameter_table(model):
        print(f"{part:<28}{trainable:>16,}{total:>16,}{trainable / max(total, 1):>9.2%}")


# ---- trainer ---------------------------------------------------------------------------------------------------------


class PerceptionTrainer(Trainer):
    """The library's `Trainer`, with loss terms over their own counts, each logged, and free-running evaluation.

    Args:
        generation_rows: rows of the schema with direct tasks that evaluation lets the model answer, or None.
        generate_batch_size, generate_tokens: how many at a time, and the most tokens of an answer.
        Others: as `Trainer`; `processing_class` is the processor.
    """

    def __init__(self, *args, generation_rows=None, generate_batch_size: int = 8, generate_tokens: int = 64, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError("several GPUs need one process each: start with `accelerate launch` or `torchrun`")
        if not self.args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices must stay on: losses are sums over all processes' counts")
        self.model_accepts_loss_kwargs = True
        self.generation_rows = generation_rows
        self.generate_batch_size, self.generate_tokens = generate_batch_size, generate_tokens
        self.vis_token_id = self.processing_class.tokenizer.convert_tokens_to_ids(VIS_TOKEN)
        self._terms = {
            "train": torch.zeros(4, device=self.args.device),
            "eval": torch.zeros(4, device=self.args.device),
        }
        self._train_steps, self._eval_counts = 0, torch.zeros(3, device=self.args.device)
        self.add_callback(_EpochOfCollator(self.data_collator))

    def count_targets(self, batches: list[dict]) -> torch.Tensor:
        """Supervised tokens, boxes and masks in the batches of all processes, float64 (3,)."""
        counts = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        for batch in batches:
            labels, valid = batch["labels"], batch["boxes_valid"]
            answers = answer_slots(batch["input_ids"], labels, self.vis_token_id, valid.shape[1])
            targets = (labels[:, 1:] != IGNORED_LABEL, answers & valid, answers & batch["masks_valid"])
            counts += torch.stack([target.sum() for target in targets]).to(counts)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return counts

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimizer step, each told how many targets all of them hold, over all processes."""
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        counts = self.count_targets(batches).clamp(min=1)
        for batch in batches:
            if "stream_state" in batch:
                self.train_dataset.took(batch.pop("stream_state"))
            batch["num_boxes_in_batch"], batch["num_masks_in_batch"] = counts[1], counts[2]
        self._train_steps += 1
        return batches, counts[0]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As the library's; each term is added up for the log."""
        part = "train" if model.training else "eval"
        if part == "eval":
            inputs = self._without_repeated_rows(inputs)
            self._eval_counts += self.count_targets([inputs])
            # Sums, not means, so that the means over the data set do not depend on its batches.
            one = num_items_in_batch = torch.ones((), device=self.args.device)
            inputs = {**inputs, "num_boxes_in_batch": one, "num_masks_in_batch": one}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._terms[part] += torch.stack([outputs[name].detach().double() for name in LOSS_TERMS])
        return (loss, outputs) if return_outputs else loss

    def _without_repeated_rows(self, inputs: dict) -> dict:
        """Take the labels off the rows that fill up the last batch over all processes: they were there before."""
        state, labels = self.accelerator.gradient_state, inputs["labels"]
        if not state.end_of_dataloader or state.remainder < 1:
            return inputs
        row = self.accelerator.process_index * len(labels) + torch.arange(len(labels), device=labels.device)
        return {**inputs, "labels": labels.masked_fill((row >= state.remainder)[:, None], IGNORED_LABEL)}

    def _prepare_inputs(self, inputs):
        """Coordinates stay float32: DeepSpeed's preparation casts every float to the model's dtype."""
        prepared = super()._prepare_inputs(inputs)
        for name in ("boxes", "boxes_noise"):
            if name in inputs:
                prepared[name] = inputs[name].to(self.args.device)
        return prepared

    def log(self, logs, *args, **kwargs):
        """Adds the mean of each loss term over the steps since the last log."""
        if "loss" in logs and self._train_steps:
            terms = self.accelerator.reduce(self._terms["train"], "sum") / self._train_steps
            logs = {**logs, **dict(zip(LOSS_TERMS, terms.tolist(), strict=True))}
            self._terms["train"].zero_()
            self._train_steps = 0
        super().log(logs, *args, **kwargs)

    def get_train_dataloader(self):
        """As the library's; a mixture makes its batches, and shares itself among the processes, by itself."""
        if not isinstance(self.train_dataset, Mixture):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_size=None,
            collate_fn=MixtureCollator(self.data_collator),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def _save_rng_state(self, output_dir):
        """Every process saves its state here: that of its stream too."""
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, Mixture):
            stream_file(output_dir, self.args.process_index).write_text(json.dumps(self.train_dataset.state_dict()))

    def get_eval_dataloader(self, eval_dataset=None):
        """As the library's, with the collator's evaluation form: no jitter, no dropping."""
        collator = self.data_collator
        try:
            self.data_collator = collator.for_evaluation()
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The library's (teacher-forced losses), each term over its own count, and what the model answers freely."""
        self._terms["eval"].zero_()
        self._eval_counts.zero_()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = self.accelerator.reduce(self._terms["eval"], "sum")
        tokens, boxes, masks = self._eval_counts
        counts = torch.stack([tokens, boxes, masks, (boxes + masks) / 2])  # both kinds have a predicted IoU
        terms = (sums / counts.clamp(min=1)).tolist()
        metrics = {"loss": sum(terms), **dict(zip(LOSS_TERMS, terms, strict=True))}
        if self.generation_rows is not None and len(self.generation_rows):
            metrics |= self.answer_freely(self.generation_rows)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    @torch.no_grad()
    def answer_freely(self, rows) -> dict[str, float]:
        """Let the model answer the prompts of direct tasks.

        Returns:
            `acc@0.5`, `acc@0.75` (share of single-target answers whose first box has that IoU), `mask_miou`,
            `emission` (share of answers with as many `<vis>` as the task calls for, none where nothing is there).
            A missing answer counts as 0.
        """
        rank, world, step = self.accelerator.process_index, self.accelerator.num_processes, self.generate_batch_size
        # Every process makes the same number of calls: sharded models need that. The surplus has weight 0.
        per_process = -(-len(rows) // world)
        indices = [rank * per_process + i for i in range(per_process)]
        sums = torch.zeros(6, dtype=torch.float64, device=self.args.device)
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        was_training = model.training
        model.eval()
        for start in range(0, per_process, step):
            chosen = indices[start : start + step]
            batch = [rows[min(index, len(rows) - 1)] for index in chosen]
            for index, row, result in zip(chosen, batch, self._generate(model, batch), strict=True):
                if index < len(rows):
                    sums += torch.tensor(score_answer(row, result), dtype=torch.float64).to(sums)
        model.train(was_training)
        answers, emitted, targets, at_50, at_75, mask_iou = self.accelerator.reduce(sums, "sum").tolist()
        scores = {"emission": emitted / answers}
        if targets:
            scores |= {"acc@0.5": at_50 / targets, "acc@0.75": at_75 / targets, "mask_miou": mask_iou / targets}
        return scores

    def _generate(self, model, rows: list[dict]) -> list[dict]:
        inputs = self.processing_class.apply_chat_template(
            [row_to_messages(row)[:-1] for row in rows],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(
            **self._prepare_inputs(inputs),
            max_new_tokens=self.generate_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            synced_gpus=self.is_fsdp_enabled or self.is_deepspeed_enabled,
        )
        sizes = [(row["height"], row["width"]) for row in rows]
        return self.processing_class.post_process_generation(output, target_sizes=sizes)


class _EpochOfCollator(TrainerCallback):
    """Tells the collator which epoch its draws are for."""

    def __init__(self, collator: PerceptionCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.set_epoch(int(state.epoch or 0))


def score_answer(row: dict, result: dict) -> list[float]:
    """[1, emission is right, has a single target, IoU >= 0.5, IoU >= 0.75, mask IoU] of one answer, original pixels."""
    expected = row["messages"][-1]["content"].count(VIS_TOKEN)
    found = len(result["objects"])
    scores = [1.0, float(found == expected), 0.0, 0.0, 0.0, 0.0]
    if expected == 1:
        scores[2] = 1.0
        if found:
            first = result["objects"][0]
            iou = box_iou(first["box"], row["boxes"][-1])
            scores[3:5] = [float(iou >= 0.5), float(iou >= 0.75)]
            target, mask = decode_rle(row["masks"][-1]).astype(bool), np.asarray(first["mask"], dtype=bool)
            scores[5] = float((target & mask).sum() / (target | mask).sum())
    return scores


def box_iou(first: list[float], second: list[float]) -> float:
    """IoU of two xyxy boxes, continuous coordinates."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return intersection / (sum(areas) - intersection)


def choose_generation_rows(dataset, count: int):
    """At most `count` rows with direct tasks, evenly spread over the data set."""
    if dataset is None or count < 1:
        return None
    direct = [index for index, task in enumerate(dataset["task"]) if task in DIRECT_TASKS]
    chosen = np.linspace(0, len(direct) - 1, min(count, len(direct))).round().astype(int)
    return dataset.select([direct[index] for index in chosen])


def plot_losses(log_history: list[dict], path: Path) -> None:
    """Draw each logged loss over the steps, training and evaluation, one panel a term."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ("loss", *LOSS_TERMS)
    figure, panels = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), layout="constrained")
    for name, panel in zip(names, panels, strict=True):
        for key, style in ((name, "-"), (f"eval_{name}", "o--")):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                panel.plot(*zip(*points), style, label=key, markersize=3)
                panel.legend()
        panel.set(title=name, xlabel="step")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


# ---- run -------------------------------------------------------------------------------------------------------------


def train(recipe: dict, output: str | Path, resume: bool = False) -> PerceptionTrainer:
    """Run a recipe (`read_recipe`) and leave everything in `output`; see the head of this file.

    Raises:
        ValueError: for an output that cannot be written to or holds a checkpoint, before anything is loaded, and for
            whatever is wrong with the data.
    """
    output = Path(output)
    last_checkpoint = check_output(output, resume)
    # Before the model: the arguments set up distributed training and ZeRO-3, which builds models in pieces.
    args = TrainingArguments(**{**TRAINING_DEFAULTS, **recipe["training"], "output_dir": str(output)})
    set_seed(args.seed)
    streams = isinstance(recipe["data"]["train"], dict)
    train_dataset = None if streams else load_sources(recipe["data"]["train"])
    eval_dataset = eval_rows = load_sources(recipe["data"]["eval"], evaluation=True)
    if not streams and (train_dataset is None or len(train_dataset) == 0):
        raise ValueError("data.train gives no rows: no object of the asked size, or no such task")

    model, processor = load_model(recipe, quantized=recipe["adapter"]["mode"] == "qlora")
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    model = add_adapter(model, **recipe["adapter"], autocast_adapter_dtype=not sharded)
    collator = PerceptionCollator(processor, model.config, **recipe["collator"])
    if streams:
        train_dataset = load_mixture(recipe, collator, args)
        args.ignore_data_skip = True  # the stream seeks by itself
        if last_checkpoint is not None:
            train_dataset.load_state_dict(json.loads(stream_file(last_checkpoint, args.process_index).read_text()))
    elif collator.pack is not None:
        train_dataset = group_rows_by_image(train_dataset, collator.pack, collator.seed)
    if collator.pack is not None:
        eval_dataset = eval_rows and group_rows_by_image(eval_rows, collator.pack, collator.seed)
    trainer = PerceptionTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        generation_rows=choose_generation_rows(eval_rows, recipe["data"]["generate_rows"]),
        generate_batch_size=recipe["data"]["generate_batch_size"],
        generate_tokens=recipe["data"]["generate_tokens"],
    )
    if trainer.is_world_process_zero():
        print_parameter_table(model)
        (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    trainer.train(resume_from_checkpoint=last_checkpoint)
    trainer.save_state()
    save_plain_model(trainer, recipe, output)
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, output / "losses.png")
    return trainer


def save_plain_model(trainer: PerceptionTrainer, recipe: dict, output: Path) -> None:
    """Save the adapter, if there is one, and the plain model with it merged in, with its processor."""
    if recipe["adapter"]["mode"] == "full":
        trainer.save_model(str(output))
        return
    trainer.save_model(str(output / "adapter"))
    if not trainer.is_world_process_zero():
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or recipe["adapter"]["mode"] == "qlora":
        # In pieces or in 4 bit, the weights cannot be merged into: a plain copy of the base is.
        from peft import PeftModel

        set_seed(trainer.args.seed)
        base, _ = load_model(recipe)
        peft_model = PeftModel.from_pretrained(base, output / "adapter")
    else:
        peft_model = trainer.accelerator.unwrap_model(trainer.model)
    trainer.model = peft_model.merge_and_unload()
    trainer.model.save_pretrained(output)
    trainer.processing_class.save_pretrained(output)


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="the recipe; with --resume, that of the run unless given")
    parser.add_argument("--output", required=True, metavar="DIR", help="where checkpoints and the final model go")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="over the recipe, e.g. training.max_steps=9")
    options = parser.parse_intermixed_args(arguments)
    before = Path(options.output, "recipe.yaml")
    before = before if options.resume and before.is_file() else None
    if options.config is None and before is None:
        parser.error("--config is needed (without it, --resume goes on with the recipe.yaml of an output)")
    try:
        recipe = read_recipe(options.config or before, options.overrides, before if options.config else None)
        train(recipe, options.output, options.resume)
        PartialState().destroy_process_group()  # of several processes: or its threads may outlive the interpreter
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
