"""train.py: equal losses and gradients however a step is cut up, exact resume, adapters, recipes, refusals.

`python tests/test_train.py FOLDER OUTPUT` is one process of the two-process test.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from backbones import TINY_SIGNALS
from drawn_rows import drawn_coco_folder, drawn_rows
from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt import train as training
from perceptiongpt.data.collator import PerceptionCollator, group_rows_by_image
from perceptiongpt.data.schema import decode_rle
from perceptiongpt.signals_perceptiongpt import SIGNALS
from perceptiongpt.training.adapters import own_modules, parameter_table
from perceptiongpt.training.answers import mean_scores, score_answer
from perceptiongpt.training.recipe import LORA_TARGETS, complete_recipe, stage_recipes
from perceptiongpt.training.trainer import TRAINING_DEFAULTS, PerceptionTrainer
from processes import free_port, run_two_processes


LOSS_TERMS = ("loss_lm", *(f"loss_{name}" for name in SIGNALS), "loss_iou")


class KeepGradients(TrainerCallback):
    """Copies the gradients of the first optimizer step, then stops."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True
        control.should_log = True


def rows_with_targets(images: int) -> list[dict]:
    """Drawn rows in which every signal has targets and is read; of an answer, a point only where it stands alone."""
    rows = drawn_rows(images)
    for row in (*rows[::5], *rows[1::5]):
        x0, y0, x1, y1 = row["boxes"][0]
        row["points"] = [[(x0 + x1) / 2, (y0 + y1) / 2]]
    for row in rows[1::5]:
        row["boxes"] = row["masks"] = [None]
    return rows


def first_step(folder: str, output: str, rows=None, **arguments) -> tuple[dict, dict]:
    """Losses and gradients (by name) of the first step of a full fine-tuning."""
    model = PerceptionGPTForConditionalGeneration.from_pretrained(folder)
    processor = PerceptionGPTProcessor.from_pretrained(folder)
    keep = KeepGradients()
    arguments = {"use_cpu": True, "max_grad_norm": 0.0, "seed": 3, "disable_tqdm": True, **arguments}
    trainer = training.PerceptionTrainer(
        model=training.add_adapter(model, "full", train_vision_tower=True),
        args=TrainingArguments(output, **{**TRAINING_DEFAULTS, **arguments}),
        data_collator=PerceptionCollator(processor),
        train_dataset=rows_with_targets(4) if rows is None else rows,
        processing_class=processor,
        callbacks=[keep],
    )
    trainer.train()
    losses = {key: trainer.state.log_history[0][key] for key in ("loss", *LOSS_TERMS)}
    return losses, keep.gradients


def assert_same_step(first: tuple[dict, dict], second: tuple[dict, dict]) -> None:
    for name, loss in first[0].items():
        assert loss == pytest.approx(second[0][name], abs=1e-4), name
        assert loss > 0 and math.isfinite(loss)
    assert first[1].keys() == second[1].keys()
    for name, gradient in first[1].items():
        torch.testing.assert_close(gradient, second[1][name], atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")
    assert sum(gradient.abs().sum() for gradient in first[1].values()) > 1


@pytest.fixture(scope="module")
def whole_batch(tiny_model_dir, tmp_path_factory):
    return first_step(tiny_model_dir, str(tmp_path_factory.mktemp("whole")), per_device_train_batch_size=8)


def test_accumulation_equals_one_batch(tiny_model_dir, tmp_path, whole_batch):
    # The drawn rows have 0, 1 or 3 targets, with boxes, masks or both: every micro-batch holds another number of them.
    accumulated = first_step(
        tiny_model_dir, str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert_same_step(whole_batch, accumulated)


def test_logits_are_computed_where_a_token_is_learned(tiny_model_dir, tmp_path):
    """The losses and gradients are those of `forward` on the whole rows."""
    model = PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir).train()
    processor = PerceptionGPTProcessor.from_pretrained(tiny_model_dir)
    trainer = PerceptionTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), **TRAINING_DEFAULTS, use_cpu=True),
        data_collator=PerceptionCollator(processor, model.config, pack="auto"),
        processing_class=processor,
    )
    batch, positions, found = trainer.data_collator(rows_with_targets(2)), [], []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: positions.append(inputs[0].shape[1]))
    tokens = (batch["labels"][:, 1:] != -100).sum()
    for loss in (lambda: model(**batch).loss, lambda: trainer.compute_loss(model, batch, num_items_in_batch=tokens)):
        model.zero_grad()
        value = loss()
        value.backward()
        found.append(
            (value.detach(), model.lm_head.weight.grad, model.model.multi_modal_projector.linear_1.weight.grad)
        )
    for whole, kept in zip(*found, strict=True):
        torch.testing.assert_close(whole, kept, atol=1e-6, rtol=1e-4)
    learned = (batch["labels"] != -100).any(0).sum()
    assert positions == [batch["labels"].shape[1], learned] and learned < 0.5 * batch["labels"].shape[1]


def test_every_parameter_the_loss_can_reach_gets_a_gradient(tiny_model_dir, whole_batch):
    model = PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir)
    training.add_adapter(model, "full", train_vision_tower=True)
    assert set(whole_batch[1]) == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_two_processes_equal_one(tiny_model_dir, tmp_path, whole_batch):
    run_two_processes(__file__, tiny_model_dir, str(tmp_path))
    for rank in range(2):
        losses, gradients, evaluation = torch.load(tmp_path / f"rank{rank}.pt")
        if rank == 0:  # only the first process logs
            assert_same_step(whole_batch, (losses, gradients))
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole_batch[1][name], atol=1e-4, rtol=1e-4)
    expected = evaluate(tiny_model_dir, str(tmp_path / "one"), per_device_eval_batch_size=7)
    for name, value in expected.items():
        assert evaluation[name] == pytest.approx(value, abs=1e-4), name


def evaluate(folder: str, output: str, **arguments) -> dict:
    """Evaluation metrics of an untrained model on drawn rows."""
    processor = PerceptionGPTProcessor.from_pretrained(folder)
    rows = rows_with_targets(2)
    trainer = training.PerceptionTrainer(
        model=PerceptionGPTForConditionalGeneration.from_pretrained(folder),
        args=TrainingArguments(output, **{**TRAINING_DEFAULTS, "use_cpu": True, **arguments}),
        data_collator=PerceptionCollator(processor),
        eval_dataset=rows,
        processing_class=processor,
        generation_rows=[row for row in rows if row["task"] != "dialogue"],
        generate_batch_size=2,
        generate_tokens=3,
    )
    metrics = trainer.evaluate()
    timing = ("runtime", "per_second", "preparation_time")
    return {name: value for name, value in metrics.items() if not name.endswith(timing)}


def test_evaluation_does_not_depend_on_its_batches(tiny_model_dir, tmp_path):
    one, three = (evaluate(tiny_model_dir, str(tmp_path), per_device_eval_batch_size=size) for size in (1, 3))
    assert {f"eval_{name}" for name in ("loss", *LOSS_TERMS, "emission", "acc@0.5", "mask_miou")} <= set(one)
    assert one == pytest.approx(three, abs=1e-5)
    assert one["eval_loss"] == pytest.approx(sum(one[f"eval_{name}"] for name in LOSS_TERMS))


def test_evaluation_divides_as_training_does(tiny_model_dir, tmp_path):
    """Where only boxes are known, where only masks are, and where both are."""
    model = PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir).eval()
    processor = PerceptionGPTProcessor.from_pretrained(tiny_model_dir)
    for number, chosen in enumerate(([1], [2], [0, 1, 2, 3])):
        rows = [row for picture in (0, 1) for row in np.take(rows_with_targets(2)[5 * picture :], chosen)]
        trainer = PerceptionTrainer(
            model=model,
            args=TrainingArguments(str(tmp_path / str(number)), **TRAINING_DEFAULTS, use_cpu=True),
            data_collator=PerceptionCollator(processor),
            eval_dataset=rows,
            processing_class=processor,
        )
        found = trainer.evaluate()
        with torch.no_grad():
            expected = model(**PerceptionCollator(processor).for_evaluation()(rows))
        for name in ("loss", *LOSS_TERMS):
            assert found[f"eval_{name}"] == pytest.approx(expected[name].item(), abs=1e-5), name


def test_nothing_is_float64_on_the_device(tiny_model_dir, tmp_path, monkeypatch):
    """Apple's GPUs have no float64."""
    processor = PerceptionGPTProcessor.from_pretrained(tiny_model_dir)
    rows = drawn_rows(1)
    trainer = PerceptionTrainer(
        model=PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir),
        args=TrainingArguments(str(tmp_path), **TRAINING_DEFAULTS, use_cpu=True, max_steps=1, disable_tqdm=True),
        data_collator=PerceptionCollator(processor),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=processor,
        generation_rows=rows[:1],
        generate_tokens=2,
    )
    seen = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seen.update(value.dtype for value in tree_leaves(result) if isinstance(value, torch.Tensor))
            return result

    def watched(function):
        def call(*args, **kwargs):
            with Watch():
                return function(*args, **kwargs)

        return call

    for name in ("count_targets", "compute_loss"):
        monkeypatch.setattr(trainer, name, watched(getattr(trainer, name)))
    reduce = trainer.accelerator.reduce
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda sums, how: seen.add(sums.dtype) or reduce(sums, how))
    trainer.train()
    trainer.evaluate()
    assert torch.float32 in seen and torch.int64 in seen and torch.float64 not in seen


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory):
    return drawn_coco_folder(tmp_path_factory.mktemp("coco"))


def make_recipe(coco_folder: Path, model: dict, mode: str = "lora", **arguments) -> dict:
    source = {"annotations": str(coco_folder / "instances.json"), "images": str(coco_folder)}
    return complete_recipe(
        {
            "model": model,
            "adapter": {"mode": mode, "rank": 4},
            "data": {"train": source, "eval": {**source, "limit": 1}, "generate_rows": 3, "generate_tokens": 3},
            "training": {
                "use_cpu": True,
                "disable_tqdm": True,
                "per_device_train_batch_size": 4,
                "learning_rate": 1e-2,
                "logging_steps": 2,
                **arguments,
            },
        }
    )


def state_of(folder: Path) -> dict:
    model = PerceptionGPTForConditionalGeneration.from_pretrained(folder)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("mode", "pack"), [("lora", None), ("full", 3)])
def test_resumed_equals_uninterrupted_exactly(tiny_model_dir, coco_folder, tmp_path, mode, pack):
    arguments = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    arguments["per_device_train_batch_size"] = 3 if pack else 8
    recipe = make_recipe(coco_folder, {"checkpoint": tiny_model_dir}, mode, **arguments)
    recipe["collator"]["pack"] = pack
    recipe["adapter"]["dropout"] = 0.1  # the torch generator's state must come back too
    whole = training.train(recipe, tmp_path / "whole")
    assert whole.state.epoch > 1

    class Killed(RuntimeError):
        pass

    class Kill(training.PerceptionTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise Killed
            return super().training_step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "PerceptionTrainer", Kill)
        training.train(recipe, tmp_path / "cut")
    resumed = training.train(recipe, tmp_path / "cut", resume=True)

    expected, found = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    histories = [
        [{key: value for key, value in entry.items() if "loss" in key or "@" in key} for entry in run.log_history[:-1]]
        for run in (whole.state, resumed.state)
    ]
    assert histories[0] == histories[1]


def test_parts_have_rates_of_their_own(make_tiny_model, coco_folder, tmp_path):
    model, processor = make_tiny_model()
    recipe = make_recipe(coco_folder, {"checkpoint": "unused"}, "full", weight_decay=0.1)
    rates = {"multi_modal_projector": 0, "box_decoder": 0.25, "layers.0.self_attn": 3}
    recipe["adapter"] |= {"rates": rates}
    model = training.add_adapter(model, **recipe["adapter"])
    args = training.training_arguments(recipe, tmp_path)
    trainer = training.PerceptionTrainer(model, args, processing_class=processor, rates=rates)
    groups = trainer.create_optimizer().param_groups
    found = {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}
    assert {decay for _, decay in found.values()} == {0.0, 0.1}
    for name, parameter in model.named_parameters():
        part = name.split(".")[1]
        if part in ("vision_tower", "multi_modal_projector"):
            assert not parameter.requires_grad and id(parameter) not in found, name
        else:
            expected = 2.5e-3 if part == "box_decoder" else 3e-2 if ".layers.0.self_attn." in name else 1e-2
            assert found[id(parameter)][0] == pytest.approx(expected), name
    for wrong in ({"box_decodr": 1}, {"box_decoder": -1}, {"vision_tower": 0.1}):
        with pytest.raises(ValueError, match=f"adapter.rates: {next(iter(wrong))}: .*box_decoder"):
            training.add_adapter(make_tiny_model()[0], "full", rates=wrong)


@pytest.mark.parametrize(("family", "mode"), [("llama", "lora"), ("llama_tied", "lora"), ("llama_tied", "heads")])
def test_only_the_added_rows_move(make_tiny_model, coco_folder, tmp_path, family, mode):
    model, processor = make_tiny_model(family)
    base = tmp_path / "base"
    model.save_pretrained(base)
    processor.save_pretrained(base)
    before = state_of(base)
    recipe = make_recipe(coco_folder, {"checkpoint": str(base)}, mode, max_steps=3)
    trainer = training.train(recipe, tmp_path / "run")
    after = state_of(tmp_path / "run")
    assert before.keys() == after.keys()
    config = model.config
    added = processor.tokenizer.convert_tokens_to_ids(list(processor.tokenizer.get_added_vocab()))
    added = torch.tensor([i for i in added if i >= config.image_token_id])
    assert len(added) == 12
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        moved = (before[name] != after[name]).any(1)
        assert not moved[torch.isin(torch.arange(len(moved)), added, invert=True)].any()
        if name == "lm_head.weight":
            assert moved[added].all()  # the softmax reaches every row
    assert config.tie_word_embeddings == (family == "llama_tied")
    if config.tie_word_embeddings:
        assert torch.equal(after["lm_head.weight"], after["model.language_model.embed_tokens.weight"])
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parts = {name.split(".")[1] for name in moved if name.startswith("model.")}
    assert not any("vision_tower" in name for name in moved)
    projections = [name for name in moved if ".language_model.layers." in name]
    if mode == "lora":
        assert {name.split(".")[-2] for name in projections} == set(LORA_TARGETS)
    else:
        assert not projections
    assert set(own_modules(model)) - {"point_encoder", "point_decoder"} <= parts  # no row has a point
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert (tmp_path / "run/losses.png").exists() and Image.open(tmp_path / "run/losses.png").width > 500
    inputs = PerceptionCollator(processor)(drawn_rows(1))
    reloaded = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    torch.testing.assert_close(trainer.model.eval()(**inputs).logits, reloaded(**inputs).logits)


def test_merged_model_equals_its_adapter(tiny_model_dir, coco_folder, tmp_path):
    from peft import PeftModel

    training.train(make_recipe(coco_folder, {"checkpoint": tiny_model_dir}, max_steps=3), tmp_path)
    inputs = PerceptionCollator(PerceptionGPTProcessor.from_pretrained(tmp_path))(drawn_rows(1))
    merged = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path).eval()
    base = PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir)
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    first, second = merged(**inputs), with_adapter(**inputs)
    torch.testing.assert_close(first.logits, second.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(first.pred_boxes, second.pred_boxes, atol=1e-4, rtol=1e-4)


def test_from_backbones_with_packing_and_loss_weights(tiny_backbones, coco_folder, tmp_path, capsys):
    backbones = tiny_backbones("qwen3", "siglip")
    config = {"box_config": {"hidden_size": 32}, "mask_config": {"hidden_size": 16, "num_attention_heads": 2}}
    model = {"vision": backbones.vision, "text": backbones.text, "config": config}
    recipe = make_recipe(coco_folder, model, "full", max_steps=2)
    recipe["collator"]["pack"] = 4
    recipe["loss"] = {"lm": 0.5, "box_giou": 3, "mask_dice": 1}
    training.train(recipe, tmp_path)
    saved = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path).config
    assert (saved.lm_loss_weight, saved.box_config.giou_weight, saved.mask_config.dice_weight) == (0.5, 3.0, 1.0)
    assert "language_model" in capsys.readouterr().out
    with pytest.raises(ValueError, match="loss.box_iuo"):
        training.load_model({**recipe, "loss": {"box_iuo": 1}})


def test_quantized_training_merges_into_a_plain_model(tiny_backbones, make_tiny_model, coco_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    _, processor = make_tiny_model()
    config = AutoConfig.from_pretrained(tiny_backbones().text)
    config.intermediate_size = 128  # 4-bit blocks are 64 wide
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "text")
    processor.tokenizer.save_pretrained(tmp_path / "text")
    model = PerceptionGPTForConditionalGeneration.from_vision_text_pretrained(
        tiny_backbones().vision, str(tmp_path / "text"), **TINY_SIGNALS
    )
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    recipe = make_recipe(coco_folder, {"checkpoint": str(tmp_path / "base")}, "qlora", max_steps=2)
    training.train(recipe, tmp_path / "run")
    before, after = state_of(tmp_path / "base"), state_of(tmp_path / "run")
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert "quantization_config" not in json.loads((tmp_path / "run/config.json").read_text())


def launch(processes: dict, folder: Path, *arguments: str, machines: int = 1) -> None:
    """Run train.py as `accelerate launch` would with the settings of a recipe of processes, on so many machines."""
    configs, port = [], int(free_port())
    for rank in range(machines):
        several = (
            {"num_machines": machines, "machine_rank": rank, "main_process_ip": "127.0.0.1"} if machines > 1 else {}
        )
        configs.append(folder / f"processes_{rank}.yaml")
        settings = {**processes, "use_cpu": True, "main_process_port": port, **several}
        configs[-1].write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    runs = [
        subprocess.Popen(
            [*command, "--config_file", str(config), training.__file__, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for config in configs
    ]
    try:
        for run in runs:
            printed, _ = run.communicate(timeout=300)
            assert run.returncode == 0, printed[-4000:]
    finally:
        for run in runs:
            run.kill()


def process_recipe(name: str) -> dict:
    return yaml.safe_load((Path(training.__file__).parent / f"recipes/accelerate/{name}.yaml").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("recipe_of_processes", "mode"), [("cpu", "lora"), ("fsdp2", "lora"), ("fsdp2", "full")])
def test_shipped_process_recipes_over_gloo(tiny_model_dir, coco_folder, tmp_path, recipe_of_processes, mode):
    """Two processes with DDP, with fsdp2.yaml too: accelerate applies FSDP beside accelerators only."""
    recipe = make_recipe(coco_folder, {"checkpoint": tiny_model_dir, "dtype": "bfloat16"}, mode, max_steps=2)
    recipe["training"] |= {"save_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]
    launch(process_recipe(recipe_of_processes), tmp_path, *arguments)
    history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert any("eval_emission" in entry for entry in history)
    before, after = state_of(Path(tiny_model_dir)), state_of(tmp_path / "run")
    assert before.keys() == after.keys()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert {value.dtype for name, value in after.items() if "box_decoder" in name} == {torch.float32}
    assert any(not torch.equal(value.to(after[name]), after[name]) for name, value in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_several_processes_and_what_they_saved(tiny_model_dir, coco_folder, tmp_path, machines):
    """Losses of two processes with DDP, of one machine or two, and of one process that resumes from their checkpoint,
    equal those of one process from the start."""
    recipe = make_recipe(coco_folder, {"checkpoint": tiny_model_dir}, "lora", max_steps=2, save_steps=1)
    recipe["data"] |= {"eval": [], "train": recipe["data"]["train"] * 4}  # no batch has to be filled up
    recipe["collator"]["pack"] = None
    recipe["training"] |= {"logging_steps": 1, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2}
    recipe["training"]["adam_epsilon"] = 1e-3  # or Adam makes steps of full size from what rounding leaves
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--output"]
    launch(process_recipe("cpu"), tmp_path, *arguments, str(tmp_path / "run"), machines=machines)
    alone = ["training.per_device_train_batch_size=4", "training.max_steps=4"]
    training.main([*arguments, str(tmp_path / "run"), "--resume", *alone])
    training.main([*arguments, str(tmp_path / "alone"), *alone])
    histories = []
    for name in ("run", "alone"):
        entries = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        histories.append([[entry[term] for term in LOSS_TERMS] for entry in entries if "loss_lm" in entry])
    assert len(histories[1]) == 4
    np.testing.assert_allclose(*histories, atol=1e-4)
    resumed, expected = state_of(tmp_path / "run"), state_of(tmp_path / "alone")
    for name, value in expected.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: name + text)


def test_packed_and_alone_train_alike(tiny_model_dir, tmp_path):
    rows = drawn_rows(2)
    groups = group_rows_by_image(rows, 5)
    processor = PerceptionGPTProcessor.from_pretrained(tiny_model_dir)
    model = PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir).eval()
    args = TrainingArguments(str(tmp_path), **TRAINING_DEFAULTS, use_cpu=True)
    counts = []
    for batch in (
        PerceptionCollator(processor, model.config, pack=5)([groups[0], groups[1]]),
        PerceptionCollator(processor)(rows),
    ):
        trainer = training.PerceptionTrainer(
            model=model, args=args, data_collator=PerceptionCollator(processor), processing_class=processor
        )
        counts.append(trainer.count_targets([batch]).tolist())
    # Per image 1 + 1 + 1 + 3 answers; the second has no mask, the third's box is its mask's.
    assert counts[0] == counts[1] and counts[0][1:3] == [12, 10]


def test_coordinates_stay_float32_where_inputs_are_cast(tiny_model_dir, tmp_path, monkeypatch):
    processor = PerceptionGPTProcessor.from_pretrained(tiny_model_dir)
    trainer = training.PerceptionTrainer(
        model=PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir),
        args=TrainingArguments(str(tmp_path), **TRAINING_DEFAULTS, use_cpu=True),
        data_collator=PerceptionCollator(processor),
        processing_class=processor,
    )
    batch = PerceptionCollator(processor)(drawn_rows(1))
    cast = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    monkeypatch.setattr(Trainer, "_prepare_inputs", lambda self, inputs: dict(cast))  # as under DeepSpeed
    prepared = trainer._prepare_inputs(batch)
    assert prepared["pixel_values"].dtype == torch.bfloat16
    assert torch.equal(prepared["boxes"], batch["boxes"]) and torch.equal(prepared["boxes_noise"], batch["boxes_noise"])


# ---- adapters, scores, recipes, refusals -----------------------------------------------------------------------------


def test_parameter_table_counts_what_is_trained(tiny_model):
    model, _ = tiny_model
    size = sum(parameter.numel() for parameter in model.parameters())
    adapted = training.add_adapter(model, "lora", rank=4)
    table = {part: (trainable, total) for part, trainable, total in parameter_table(adapted)}
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert table["all"] == (trainable, size + table["language_model (LoRA)"][1] + table["rows of added tokens"][1])
    assert table["language_model"][0] == table["vision_tower"][0] == table["lm_head"][0] == 0
    assert table["rows of added tokens"][0] == 2 * 12 * model.config.text_config.hidden_size
    assert table["box_decoder"][0] == table["box_decoder"][1] > 0
    with pytest.raises(ValueError, match="train_vision_tower"):
        training.add_adapter(model, "lora", train_vision_tower=True)


@pytest.mark.parametrize("family", ["convnextv2", "swin", "resnet", "hiera", "mobilenet_v2"])
def test_every_trained_parameter_of_a_pyramid_gets_a_gradient(make_tiny_model, family):
    """One without a gradient would stop training in several processes: parts behind the last map are frozen."""
    model, processor = make_tiny_model(vision=family, image_size=32, image_grid=4, mask_grid=8, feature_size=24)
    training.add_adapter(model, "full", train_vision_tower=True).train()
    assert "vision_stages" in own_modules(model)
    assert not any(module.training for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    model(**PerceptionCollator(processor)(rows_with_targets(1))).loss.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not without and len(frozen) < 5
    assert any("conv_1x1" in name for name in frozen) == (family == "mobilenet_v2")


def test_a_tower_over_bfloat16_weights_trains_as_a_whole(tiny_model_dir):
    model = PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    training.add_adapter(model, "full", train_vision_tower=True).train()
    batch = PerceptionCollator(PerceptionGPTProcessor.from_pretrained(tiny_model_dir))(drawn_rows(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch).loss.backward()
    assert {p.dtype for p in model.model.vision_tower.parameters()} == {torch.float32}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_what_trains_is_float32(tiny_model_dir, coco_folder, tmp_path, capsys, mode):
    """Over bfloat16 weights, and computed in bfloat16: updates below a bfloat16's resolution are kept."""
    recipe = make_recipe(coco_folder, {"checkpoint": tiny_model_dir, "dtype": "bfloat16"}, mode, max_steps=2)
    recipe["training"] |= {"learning_rate": 1e-6, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    computed, trained = set(), []

    class Watched(PerceptionTrainer):
        def training_step(self, model, *args, **kwargs):
            modules = dict(model.named_modules())
            if not trained:
                (mlp,) = (module for name, module in modules.items() if name.endswith("language_model.layers.0.mlp"))
                mlp.register_forward_hook(lambda module, args, output: computed.add(output.dtype))
            trained.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
            return super().training_step(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PerceptionTrainer", Watched)
        training.train(recipe, tmp_path)
    assert computed == {torch.bfloat16}
    assert {value.dtype for value in trained[0].values()} == {torch.float32}
    moments = torch.load(tmp_path / "checkpoint-2/optimizer.pt")["state"].values()
    assert {moment[name].dtype for moment in moments for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    first, second = ([value for name, value in step.items() if "projector" in name] for step in trained)
    moved = torch.cat([(a != b).flatten() for a, b in zip(first, second, strict=True)]).float().mean()
    assert moved > 0.9  # each by about 1e-6, of weights of about 0.1
    table = capsys.readouterr().out
    assert "dtype of what trains" in table and "float32" in table and "bfloat16" not in table
    # What is saved has the dtype that was asked for; signals stay float32.
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["lm_head.weight"].dtype == saved["model.multi_modal_projector.linear_1.weight"].dtype == torch.bfloat16
    assert saved["model.box_decoder.linear_1.weight"].dtype == torch.float32


def test_smoothed_labels_are_refused(coco_folder):
    with pytest.raises(ValueError, match="label_smoothing_factor is not supported"):
        make_recipe(coco_folder, {"checkpoint": "x"}, label_smoothing_factor=0.1)


def test_scores_of_answers():
    refer, box_only, mask_only, _, no_target = drawn_rows(1)
    mask = decode_rle(refer["masks"][0]).astype(bool)
    right = {"objects": [{"box": refer["boxes"][0], "mask": mask}]}
    assert score_answer(refer, right) == [1, 1, 1, 1, 1, 1, 1]
    assert score_answer(refer, {"objects": []}) == [1, 0, 1, 0, 0, 1, 0]
    x0, y0, x1, y1 = refer["boxes"][0]
    half = {"objects": [{"box": [x0, y0, (x0 + x1) / 2, y1], "mask": ~mask}] * 2}
    assert score_answer(refer, half) == [1, 0, 1, 1, 0, 1, 0]
    # A row whose answer has no mask, or no box, says nothing about masks, or boxes.
    assert score_answer(box_only, {"objects": [{"box": box_only["boxes"][0], "mask": mask}]}) == [1, 1, 1, 1, 1, 0, 0]
    mask = decode_rle(mask_only["masks"][0]).astype(bool)
    assert score_answer(mask_only, {"objects": [{"box": [0, 0, 1, 1], "mask": mask}]}) == [1, 1, 0, 0, 0, 1, 1]
    assert score_answer(no_target, {"objects": []}) == [1, 1, 0, 0, 0, 0, 0]
    assert score_answer(no_target, right) == [1, 0, 0, 0, 0, 0, 0]
    assert mean_scores([4, 3, 2, 2, 1, 0, 0]) == {"emission": 0.75, "acc@0.5": 1, "acc@0.75": 0.5}


def test_recipe_overrides_and_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {checkpoint: somewhere}\ndata: {train: {annotations: a}}\ntraining: {learning_rate: 3e-4}\n"
    )
    overrides = ["data.train.images=b", "training.max_steps=20", "collator.pack=4", "training.bf16=true"]
    recipe = training.read_recipe(path, overrides)
    assert recipe["data"]["train"] == [{"annotations": "a", "images": "b"}]
    assert recipe["training"] == {"learning_rate": 3e-4, "max_steps": 20, "bf16": True}
    assert type(recipe["training"]["max_steps"]) is int
    assert recipe["adapter"]["rank"] == 32 and recipe["collator"]["pack"] == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "'training.learning_rat'.*training.learning_rate"),
        ("max_steps=3", "'max_steps'.*training.max_steps"),
        ("adaptor.mode=lora", "'adaptor'.*adapter"),
        ("collator.box_jiter=0", "collator.box_jitter"),
        ("data.train.anotations=x", "data.train.annotations"),
        ("data.train.source=lviss", "none of coco"),
        ("data.train={source: scenes, split: val}", "'val' are kept from training"),
        ("training.output_dir=x", "unknown key 'training.output_dir'"),
        ("adapter.mode=lore", "none of projector, heads, lora, qlora, full"),
        ("model.vision=x", "vision together with text"),
        ("model.llava=x", "either checkpoint, or vlm"),
        ("model={llava: x, vlm: y}", "either checkpoint, or vlm"),
        ("model.config.box_config=1", "sizes are fixed"),
        ("model=3", "must be a mapping"),
        ("max_steps", "not key=value"),
        ("adapter.mode.x=3", "not a section"),
    ],
)
def test_wrong_recipes(tmp_path, override, message):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {checkpoint: x}\nadapter: {mode: lora}\ndata: {train: {annotations: a, images: b}}\n")
    with pytest.raises(ValueError, match=message):
        training.read_recipe(path, [override])
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        training.read_recipe(tmp_path / "none.yaml")


def test_shipped_recipes_are_complete():
    folder = Path(training.__file__).parent / "recipes"
    shipped = sorted(folder.glob("coco_*.yaml"))
    assert len(shipped) == 4
    for path in shipped:
        ways = ["model.vision=a", "model.text=b"] if "heads" in path.name else ["model.checkpoint=a"]
        recipe = training.read_recipe(path, [*ways, "data.train.annotations=a", "data.train.images=b"])
        assert f"coco_{recipe['adapter']['mode']}.yaml" == path.name
    recipe = training.read_recipe(folder / "align.yaml", ["model.vlm=a", "data.train.root=b"])
    assert recipe["adapter"]["mode"] == "projector"
    for name in ("paper_7b.yaml", "paper_13b.yaml"):
        assert training.read_recipe(folder / name)["training"]["learning_rate"] == 3e-4
    for name, kinds in (("root.yaml", ["dense", "joint", "joint"]), ("warm_up.yaml", ["dense", "joint"])):
        assert [kind for _, kind, _ in stage_recipes(training.read_recipe(folder / name))] == kinds
    recipe = training.read_recipe(folder / "scenes.yaml", ["model.checkpoint=a"])
    assert [part["source"] for part in recipe["data"]["train"]["mixture"]] == ["scenes"]
    mixture = "data.train.mixture=[{source: scenes, split: test, seed: 1000000}]"
    with pytest.raises(ValueError, match="'test' are kept from training"):
        training.read_recipe(folder / "scenes.yaml", ["model.checkpoint=a", mixture])
    for path in (folder / "accelerate").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["num_processes"] == 2


def test_outputs_that_cannot_be_used(tiny_model_dir, coco_folder, tmp_path):
    recipe = make_recipe(coco_folder, {"checkpoint": "nowhere-at-all"})  # refused before the model is looked for
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        training.train(recipe, tmp_path / "file" / "run")
    with pytest.raises(ValueError, match="no complete checkpoint-"):
        training.train(recipe, tmp_path / "new", resume=True)
    (tmp_path / "used/checkpoint-5").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a checkpoint already; give --resume"):
        training.train(recipe, tmp_path / "used")
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        training.train(recipe, tiny_model_dir)
    recipe["data"]["train"][0]["min_area_share"] = 2.0
    recipe["data"]["train"][0]["tasks"] = ["refer"]
    with pytest.raises(ValueError, match="gives no rows"):
        training.train(recipe, tmp_path / "empty")


def test_command_line(tiny_model_dir, coco_folder, tmp_path):
    recipe = make_recipe(coco_folder, {"checkpoint": tiny_model_dir}, "heads", max_steps=2, save_steps=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    arguments = ["--config", str(path), "--output", str(tmp_path / "run")]
    training.main([*arguments[:2], "training.max_steps=1", *arguments[2:]])
    training.main([*arguments, "--resume"])
    state = json.loads((tmp_path / "run/trainer_state.json").read_text())
    assert state["global_step"] == 2
    # The run's own recipe is gone on with; another recipe and overrides go over it.
    training.main(["--output", str(tmp_path / "run"), "--resume", "training.max_steps=3"])
    (tmp_path / "other.yaml").write_text("training: {max_steps: 4}\ndata: {train: {seed: 0}}\n")
    training.main(["--config", str(tmp_path / "other.yaml"), "--output", str(tmp_path / "run"), "--resume"])
    assert json.loads((tmp_path / "run/trainer_state.json").read_text())["global_step"] == 4
    with pytest.raises(SystemExit):
        training.main(["--config", str(path)])
    with pytest.raises(SystemExit):
        training.main(["--output", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="error: .*holds a checkpoint already"):
        training.main(arguments)


if __name__ == "__main__":
    checkpoint, output = sys.argv[1:]
    step = first_step(
        checkpoint, output, per_device_train_batch_size=2, gradient_accumulation_steps=2, ddp_backend="gloo"
    )
    metrics = evaluate(checkpoint, output, per_device_eval_batch_size=2, ddp_backend="gloo")
    torch.save((*step, metrics), Path(output) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()  # or its threads may outlive the interpreter


def test_a_bare_no_is_a_strategy():
    path = Path(training.__file__).parent / "recipes/coco_full.yaml"
    recipe = training.read_recipe(path, ["model.checkpoint=somewhere", "training.eval_strategy=no"])
    assert recipe["training"]["eval_strategy"] == "no"
