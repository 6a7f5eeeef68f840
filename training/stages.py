"""The stages of a run: where each one writes, what it starts from, and how a run that stopped goes on.

A recipe may hold `stages`:

    stages:
      - {name: tower, kind: dense, training: {max_steps: 1000}, data: {train: {source: scenes}}}
      - {name: together, training: {max_steps: 5000, learning_rate: 5.0e-4}}

They run one after the other. `name` names the stage's folder, OUTPUT/NAME, and `kind` (by default `joint`) how it
trains. Everything else is a section of the recipe: its keys replace those of the recipe's own section. The first stage
starts from the recipe's model, each other one from the model that the stage before saved. A finished stage is not run
again; `--resume` continues the first one that is not finished from its last checkpoint, or starts it.

A kind is a line in `training.recipe.KINDS`, name -> module. The module has

    DEFAULTS: dict
        The keys, with defaults, of the stage's section that has the kind's name, e.g. `dense: {box_weight: 5}`.

    def run_stage(recipe, model, processor, output, resume):
        recipe (dict): the stage's completed recipe, with its section `recipe[kind]`.
        model: the plain `PerceptionGPTForConditionalGeneration` to train, in `recipe["model"]["dtype"]`.
        processor: its processor.
        output (Path): the stage's folder; it exists.
        resume (str or None): the last `checkpoint-*` in it, where there is one: go on from there.
        Returns the `Trainer` that ran, if there is one.

`run_stage` is called in every process. It makes its `TrainingArguments` by `trainer.training_arguments(recipe,
output)`, keeps `checkpoint-*` in `output` as the library's Trainer does, and before it returns leaves there the plain
model with its processor (`adapters.save_plain_model`) and `trainer_state.json` (`Trainer.save_state`), whose
`log_history` names losses `loss` and `loss_*`, `eval_loss` and `eval_loss_*`. The function `train_jointly` of train.py
does the same for the kind `joint`.

After each stage OUTPUT gets `trainer_state.json` and `losses.png` over the stages so far, with steps that go on
counting; in the end also the model of the last stage.
"""

import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from perceptiongpt.training.curves import plot_losses
from perceptiongpt.training.datasets import stream_file
from perceptiongpt.training.recipe import KINDS, read_yaml, stage_recipes


FINISHED = "stages.json"  # the names of the finished stages
STATE = "trainer_state.json"
# What a stage keeps to itself; everything else in its folder is the model that it saved.
RECORDS = ("adapter", "losses.png", "prepared", "recipe.yaml", "runs", "training_args.bin", STATE)


@dataclass
class Stage:
    """One stage of a run.

    Attributes:
        name: its name; None where the recipe has no stages.
        kind: one of `KINDS`.
        recipe: its completed recipe.
        output: its folder.
        checkpoint: the checkpoint that it goes on from, or None.
        is_finished: whether its model has been saved by an earlier run.
    """

    name: str | None
    kind: str
    recipe: dict
    output: Path
    checkpoint: str | None
    is_finished: bool = False

    @property
    def run_stage(self) -> Callable:
        """The function of its kind; see the head of this file."""
        return importlib.import_module(KINDS[self.kind]).run_stage


def plan_stages(recipe: dict, output: Path, resume: bool) -> list[Stage]:
    """The stages of a recipe in order; the recipe itself where it has none.

    Raises:
        ValueError: the output cannot be written to, holds another run, or holds nothing to resume.
    """
    check_writable(output)
    if recipe.get("stages") is None:
        check_unused(output, resume)
        checkpoint = last_checkpoint(output, recipe)
        if resume and checkpoint is None:
            raise ValueError(f"--resume: there is no complete checkpoint-* in {output}")
        return [Stage(None, "joint", recipe, output, checkpoint)]
    finished = json.loads((output / FINISHED).read_text()) if (output / FINISHED).is_file() else []
    stages = []
    for given, (name, kind, own) in zip(recipe["stages"], stage_recipes(recipe, output), strict=True):
        folder = output / name
        check_unused(folder, resume)
        checkpoint, begun_with = last_checkpoint(folder, own), folder / "recipe.yaml"
        says_pack = any("pack" in (sections.get("collator") or {}) for sections in (recipe, given))
        if checkpoint is not None and not says_pack and begun_with.is_file():
            # The default has changed: a stage goes on with the rows that it began with.
            own["collator"]["pack"] = read_yaml(begun_with)["collator"]["pack"]
        stages.append(Stage(name, kind, own, folder, checkpoint, name in finished))
    check_unused(output, resume)
    if resume and not any(stage.is_finished or stage.checkpoint for stage in stages):
        raise ValueError(f"--resume: no stage in {output} is finished or has a complete checkpoint-*")
    return stages


def check_writable(output: Path) -> None:
    """Make a folder; `ValueError` if that or writing to it fails."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written to: {error}") from error


def check_unused(output: Path, resume: bool) -> None:
    """`ValueError` if a new run would write over a checkpoint or a model."""
    if not resume and (any(output.glob("checkpoint-*")) or (output / "config.json").exists()):
        raise ValueError(f"--output {output}: holds a checkpoint already; give --resume or another folder")


def last_checkpoint(output: Path, recipe: dict) -> str | None:
    """The last complete checkpoint in a folder: a run may have been stopped while it wrote one."""
    needed = [STATE]
    if isinstance(recipe["data"]["train"], dict):  # a mixture
        needed.append(stream_file("", 0).name)
    numbered = [(int(path.name.split("-")[1]), path) for path in output.glob("checkpoint-[0-9]*")]
    for _, path in sorted(numbered, reverse=True):
        try:
            for name in needed:
                json.loads((path / name).read_text(encoding="utf-8"))
            return str(path)
        except (OSError, ValueError):
            continue  # the one before it is whole
    return None


def finish_stage(stages: list[Stage], stage: Stage, output: Path) -> None:
    """Note that a stage is finished, and write the log and the curves of all finished stages. One process calls it."""
    stage.is_finished = True
    finished = [stage for stage in stages if stage.is_finished]
    history = joint_history([(stage.name, stage.output / STATE) for stage in finished])
    (output / STATE).write_text(json.dumps({"log_history": history}, indent=2) + "\n")
    plot_losses(history, output / "losses.png")
    temporary = output / f"{FINISHED}.new"
    temporary.write_text(json.dumps([stage.name for stage in finished]))
    os.replace(temporary, output / FINISHED)


def joint_history(states: list[tuple[str, Path]]) -> list[dict]:
    """The log entries of several stages, each with its `stage`, and with steps counted from the first one's start."""
    history, before = [], 0
    for name, path in states:
        entries = json.loads(path.read_text())["log_history"]
        history += [{"stage": name, **entry, "step": before + entry["step"]} for entry in entries]
        before = max((entry["step"] for entry in history), default=before)
    return history


def copy_model(stage: Stage, output: Path) -> None:
    """Copy the model that a stage saved to the top of the output. One process calls it."""
    for path in stage.output.iterdir():
        if path.is_file() and path.name not in RECORDS:
            shutil.copy2(path, output / path.name)
