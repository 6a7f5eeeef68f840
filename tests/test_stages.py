"""Recipes with stages: what each starts from, what it leaves, and runs that stop anywhere."""

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml

from drawn_rows import drawn_coco_folder
from perceptiongpt import PerceptionGPTForConditionalGeneration
from perceptiongpt import train as training
from perceptiongpt.training import recipe as recipes
from perceptiongpt.training.recipe import complete_recipe, read_recipe, stage_recipes
from perceptiongpt.training.stages import last_checkpoint, plan_stages


class Killed(RuntimeError):
    pass


@pytest.fixture(scope="module")
def coco_folder(tmp_path_factory):
    return drawn_coco_folder(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def shifting_kind(monkeypatch):
    """A kind of stage that adds its section's `amount` to a weight; the list of its calls."""
    calls = []

    def run_stage(recipe, model, processor, output, resume):
        calls.append((recipe["shifting"], resume))
        model.model.position_table.gain.data.add_(recipe["shifting"]["amount"])
        history = [{"step": 2, "loss": 3.0, "loss_shift": 3.0}, {"step": 4, "loss": 2.0, "loss_shift": 2.0}]
        (output / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        model.save_pretrained(output)
        processor.save_pretrained(output)

    module = types.ModuleType("shifting_stage")
    module.DEFAULTS, module.run_stage = {"amount": 1.0, "other": None}, run_stage
    monkeypatch.setitem(sys.modules, "shifting_stage", module)
    monkeypatch.setitem(recipes.KINDS, "shifting", "shifting_stage")
    return calls


def make_recipe(coco_folder, checkpoint: str, stages: list[dict]) -> dict:
    source = {"annotations": str(coco_folder / "instances.json"), "images": str(coco_folder), "tasks": ["refer"]}
    arguments = {"use_cpu": True, "disable_tqdm": True, "max_steps": 4, "save_steps": 2, "logging_steps": 1}
    return {
        "model": {"checkpoint": checkpoint},
        "adapter": {"mode": "full"},
        "data": {"train": source, "generate_rows": 0},
        "training": {**arguments, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
        "stages": stages,
    }


def weights(folder) -> dict:
    return PerceptionGPTForConditionalGeneration.from_pretrained(folder).state_dict()


def test_a_stage_goes_on_with_the_packing_it_began_with(tmp_path):
    """Outputs of a time when rows were not packed by default have no `pack` in their recipe, only in the stage's."""
    checkpoint = tmp_path / "first/checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    recipe = make_recipe(tmp_path, "x", [{"name": "first"}, {"name": "second"}])
    (tmp_path / "first/recipe.yaml").write_text(yaml.safe_dump({"collator": {"pack": None}}))
    packs = [stage.recipe["collator"]["pack"] for stage in plan_stages(recipe, tmp_path, resume=True)]
    assert packs == [None, "auto"]
    recipe["stages"][0]["collator"] = {"pack": 4}
    assert plan_stages(recipe, tmp_path, resume=True)[0].recipe["collator"]["pack"] == 4


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


STAGES = [
    {"name": "shift", "kind": "shifting", "shifting": {"amount": 2.5}},
    {"name": "heads", "adapter": {"mode": "heads"}, "training": {"max_steps": 2}},
    {"name": "all"},
]


@pytest.mark.slow
def test_stages_run_one_after_the_other_and_resume_anywhere(tiny_model_dir, coco_folder, tmp_path, shifting_kind):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe(coco_folder, tiny_model_dir, STAGES)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    training.main(["--config", str(path), "--output", str(whole)])
    assert shifting_kind == [({"amount": 2.5, "other": None}, None)]
    gains = [weights(folder)["model.position_table.gain"] for folder in (tiny_model_dir, whole / "shift")]
    assert gains[1] == gains[0] + 2.5
    assert_equal(weights(whole), weights(whole / "all"))
    for name in ("processor_config.json", "trainer_state.json", "losses.png", "recipe.yaml"):
        assert (whole / name).is_file() and (whole / "all" / name).is_file()

    # Curves of each stage, and of all with steps that go on counting.
    history = json.loads((whole / "trainer_state.json").read_text())["log_history"]
    losses = [(entry["stage"], entry["step"]) for entry in history if "loss" in entry]
    assert losses == [
        ("shift", 2),
        ("shift", 4),
        *(("heads", 4 + i) for i in (1, 2)),
        *(("all", 6 + i) for i in (1, 2, 3, 4)),
    ]
    own = json.loads((whole / "all/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in own if "loss" in entry] == [1, 2, 3, 4]

    # The last stage is stopped behind its first checkpoint; then a stop before anything of it is kept.
    class Kill(training.PerceptionTrainer):
        stop_at = 3

        def training_step(self, *args, **kwargs):
            if self.args.output_dir.endswith("all") and self.state.global_step == self.stop_at:
                raise Killed
            return super().training_step(*args, **kwargs)

    shifting_kind.clear()
    for stop_at, arguments in ((0, ["--config", str(path)]), (3, ["--resume"]), (None, ["--resume"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Kill, "stop_at", stop_at)
            patch.setattr(training, "PerceptionTrainer", Kill)
            if stop_at is None:
                training.main([*arguments, "--output", str(cut)])
            else:
                with pytest.raises(Killed):
                    training.main([*arguments, "--output", str(cut)])
    assert len(shifting_kind) == 1  # finished stages do not run again
    assert_equal(weights(cut), weights(whole))
    resumed = json.loads((cut / "trainer_state.json").read_text())["log_history"]
    assert [entry.get("loss") for entry in resumed] == [entry.get("loss") for entry in history]

    with pytest.raises(SystemExit, match="holds a checkpoint already"):
        training.main(["--config", str(path), "--output", str(whole)])
    assert training.train(read_recipe(whole / "recipe.yaml"), whole, resume=True) is None  # nothing is left to do


def test_half_written_checkpoints_are_passed_over(tmp_path):
    recipe = {"data": {"train": []}}
    assert last_checkpoint(tmp_path, recipe) is None
    for step, state in ((2, "{}"), (10, "{}"), (30, '{"log'), (40, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state:
            (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path, recipe) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-2/stream_0.json").write_text("{}")
    assert last_checkpoint(tmp_path, {"data": {"train": {"mixture": []}}}) == str(tmp_path / "checkpoint-2")


def test_what_a_stage_takes_from_the_recipe(coco_folder):
    stages = [{"name": "one", "data": {"train": {"source": "scenes"}}}, {"name": "two", "collator": {"pack": 4}}]
    recipe = make_recipe(coco_folder, "start", stages)
    recipe["model"]["dtype"] = "bfloat16"
    (_, _, one), (_, _, two) = stage_recipes(complete_recipe(recipe), "out")
    assert one["model"]["checkpoint"] == "start" and two["model"]["checkpoint"] == "out/one"
    assert one["model"]["dtype"] == two["model"]["dtype"] == "bfloat16"
    assert one["data"]["train"] == [{"source": "scenes"}] and "annotations" in two["data"]["train"][0]
    assert (one["collator"]["pack"], two["collator"]["pack"], two["collator"]["box_jitter"]) == ("auto", 4, 0.02)


def test_example_in_the_documentation():
    page = (Path(training.__file__).parent / "docs/training.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (_, _, heads), (_, _, everything) = stage_recipes(complete_recipe(yaml.safe_load(example)))
    assert (heads["adapter"]["mode"], everything["adapter"]["mode"]) == ("heads", "full")
    assert heads["training"]["max_steps"] == 1000 and heads["training"]["save_steps"] == 500


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"name": "a"}, "must be a list of mappings"),
        ([{"kind": "joint"}], "needs a name of its own"),
        ([{"name": "a"}, {"name": "a"}], "needs a name of its own"),
        ([{"name": "../a"}], "needs a name of its own"),
        ([{"name": "a", "kind": "jont"}], "stage 'a': kind 'jont' is none of joint"),
        ([{"name": "a", "trainig": {}}], "stage 'a': unknown key 'trainig'.*training"),
        ([{"name": "a", "training": {"max_step": 1}}], "stage 'a': unknown key 'training.max_step'"),
        ([{"name": "a", "kind": "shifting", "shifting": {"amont": 1}}], "'shifting.amont'.*shifting.amount"),
        ([{"name": "a", "shifting": {"amount": 1}}], "stage 'a': unknown key 'shifting'"),
        ([{"name": "a"}, {"name": "b", "model": {"llava": "x"}}], "stage 'b': model.llava: only the first stage"),
    ],
)
def test_wrong_stages(coco_folder, shifting_kind, stages, message):
    with pytest.raises(ValueError, match=message):
        complete_recipe(make_recipe(coco_folder, "start", stages))


def test_overrides_of_one_stage(coco_folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(make_recipe(coco_folder, "start", [{"name": "a"}, {"name": "b"}])))
    recipe = read_recipe(path, ["stages.b.training.max_steps=7", "training.max_steps=5"])
    assert [own["training"]["max_steps"] for _, _, own in stage_recipes(recipe)] == [5, 7]
    with pytest.raises(ValueError, match="no entry of the list has the name 'c'"):
        read_recipe(path, ["stages.c.training.max_steps=7"])
    with pytest.raises(ValueError, match="'stages' is a list"):
        read_recipe(path, ["stages.a=7"])
    with pytest.raises(ValueError, match="nothing|no stage in .* is finished"):
        training.train(recipe, tmp_path / "new", resume=True)
