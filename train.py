"""Train PerceptionGPT as a recipe says.

    python train.py --config recipes/coco_lora.yaml data.train.annotations=instances.json data.train.images=photos \
        model.checkpoint=DIR --output runs/mine
    python train.py --output runs/mine --resume       # continue after an interruption, with the recipe of that run
    accelerate launch --config_file recipes/accelerate/ddp.yaml train.py --config ... --output ...
    python train.py --config recipes/paper_7b.yaml --dry_run      # memory per GPU and steps; reads no weights

A recipe is YAML with the sections of `training.recipe.DEFAULTS`; `section.key=value` on the command line replaces one
of its values. Everything in `training` goes to `transformers.TrainingArguments` (`report_to`, `bf16`,
`gradient_checkpointing`, ...). A recipe with `stages` runs them one after the other (training/stages.py); then each
stage has a folder in OUTPUT. The adapter modes are in the head of training/adapters.py.

What OUTPUT holds: `checkpoint-*` (to resume from), `adapter/` (the PEFT adapter, where the mode has one),
`recipe.yaml`, `trainer_state.json` (every logged number), `losses.png`, and at the top the final plain model, adapter
merged, with its processor: `from_pretrained(OUTPUT)` works.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments, set_seed

from perceptiongpt.data.collator import PerceptionCollator
from perceptiongpt.inference import hide_progress_bars_in_logs
from perceptiongpt.publishing.publication import publish, run_publication
from perceptiongpt.training.adapters import (
    add_adapter,
    load_model,
    model_dtype,
    print_parameter_table,
    save_plain_model,
)
from perceptiongpt.training.answers import choose_generation_rows
from perceptiongpt.training.curves import plot_losses
from perceptiongpt.training.datasets import load_mixture, load_sources, load_train_rows, pack_rows
from perceptiongpt.training.dry_run import dry_run
from perceptiongpt.training.features import FeatureCache
from perceptiongpt.training.recipe import read_recipe
from perceptiongpt.training.stages import copy_model, finish_stage, plan_stages
from perceptiongpt.training.trainer import PerceptionTrainer, training_arguments


def train_jointly(recipe: dict, args: TrainingArguments, resume: str | None) -> PerceptionTrainer:
    """Train all signals and the language model together on rows of the schema: the stage kind `joint`.

    Args:
        recipe: a completed recipe without stages.
        args: its training arguments; their output folder gets the checkpoints and the final model.
        resume: the checkpoint to continue from, or None.
    """
    output = Path(args.output_dir)
    train_rows = load_train_rows(recipe)
    eval_rows = load_sources(recipe["data"]["eval"], evaluation=True)

    model, processor = load_model(recipe)
    features, inner_model = None, model.model
    model = add_adapter(model, **recipe["adapter"])
    if recipe["data"]["feature_cache"] is not None:
        computed_in = "bfloat16" if args.bf16 else "float16" if args.fp16 else str(recipe["model"]["dtype"])
        features = FeatureCache(recipe["data"]["feature_cache"], inner_model, computed_in)
    collator = PerceptionCollator(processor, model.config, **recipe["collator"], feature_cache=features)
    if train_rows is None:
        train_dataset = load_mixture(recipe, collator, args, resume)
        args.ignore_data_skip = True  # the stream finds its place by itself
    else:
        train_dataset = pack_rows(train_rows, collator)

    trainer = PerceptionTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=pack_rows(eval_rows, collator),
        processing_class=processor,
        generation_rows=choose_generation_rows(eval_rows, recipe["data"]["generate_rows"]),
        generate_batch_size=recipe["data"]["generate_batch_size"],
        generate_tokens=recipe["data"]["generate_tokens"],
        compute_dtype=model_dtype(recipe),
        guidance_weight=recipe["guidance"]["weight"],
        rates=recipe["adapter"]["rates"],
        feature_cache=features,
    )
    if trainer.is_world_process_zero():
        print_parameter_table(model)
        write_recipe(recipe, output)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    save_plain_model(trainer, recipe, output)
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, output / "losses.png")
    return trainer


def train(recipe: dict, output: str | Path, resume: bool = False):
    """Run a recipe (`read_recipe`), stage by stage where it has stages, and leave everything in `output`.

    Returns:
        The `Trainer` of the last stage that ran; None if all stages were finished before.

    Raises:
        ValueError: the output cannot be written to or holds a checkpoint (found before anything is loaded), or
            something is wrong with the data or the model.
    """
    output, trainer = Path(output), None
    stages = plan_stages(recipe, output, resume)
    settings = recipe.get("training") or {}
    publishes = settings.get("push_to_hub") and os.environ.get("RANK", "0") == "0"
    publication = run_publication(output, settings) if publishes else None
    has_stages = stages[0].name is not None
    for stage in stages:
        if stage.is_finished:
            continue
        trainer = None  # frees the model of the stage before
        stage.output.mkdir(exist_ok=True)
        args = training_arguments(stage.recipe, stage.output)
        set_seed(args.seed)
        if has_stages and args.process_index == 0:
            write_recipe(recipe, output)
            print(f"stage {stage.name} ({stage.kind})")
        if stage.kind == "joint":
            trainer = train_jointly(stage.recipe, args, stage.checkpoint)
        else:
            model, processor = load_model(stage.recipe)
            trainer = stage.run_stage(stage.recipe, model, processor, stage.output, stage.checkpoint)
            del model
        if has_stages:
            if args.process_index == 0:
                finish_stage(stages, stage, output)
            PartialState().wait_for_everyone()  # the next stage reads what this one saved
    if has_stages and PartialState().is_main_process:
        copy_model(stages[-1], output)
    if publication is not None:
        publish(output, publication)
    return trainer


def write_recipe(recipe: dict, output: Path) -> None:
    """Keep a recipe in an output, for `--resume`."""
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE", help="the recipe; with --resume, by default that of the run")
    parser.add_argument("--output", metavar="DIR", help="where checkpoints and the final model go")
    parser.add_argument(
        "--dry_run", action="store_true",
        help="print parameters, a batch of each source, memory per GPU and steps; reads no weight, writes nothing",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in the output")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of the recipe to replace")
    options = parser.parse_intermixed_args(arguments)
    if options.output is None and not options.dry_run:
        parser.error("--output is needed (but for --dry_run)")
    before = Path(options.output or "", "recipe.yaml")
    before = before if options.resume and before.is_file() else None
    if options.config is None and before is None:
        parser.error("--config is needed (without it, --resume reads the recipe.yaml in the output)")
    hide_progress_bars_in_logs()
    try:
        recipe = read_recipe(options.config or before, options.overrides, before if options.config else None)
        if options.dry_run:
            failed = dry_run(recipe)
            sys.exit("no batch from " + "; ".join(failed) if failed else None)
        train(recipe, options.output, options.resume)
        PartialState().destroy_process_group()  # of several processes: or its threads may outlive the interpreter
    except (ValueError, StrictDataclassError) as error:  # the latter from a value in model.config
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
