"""validate.py: runs with a model or given predictions, stopped and continued runs, comparison, files for the Hub."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from metric_inputs import made_sample, mini_arguments, perfect, samples_of, write_lines
from perceptiongpt import validate
from perceptiongpt.drawing import SHEET_MARGIN
from perceptiongpt.evaluation import intervals, reporting
from perceptiongpt.evaluation import run as evaluation_run
from perceptiongpt.evaluation.answers import answer, answer_batch, answer_teacher_forced, read_images
from perceptiongpt.evaluation.benchmarks import find_benchmark
from perceptiongpt.evaluation.cases import CASE_CELL, draw_case, of_many_images
from perceptiongpt.evaluation.comparison import paired_differences, read_run
from perceptiongpt.evaluation.predictions import check_prediction
from perceptiongpt.evaluation.results import Scorer
from perceptiongpt.evaluation.samples import read_sample_image
from perceptiongpt.inference import load


WORDS = ("the dog", "every left red cup", "a person", "the zebra on the left")
SCENE_TASKS = (
    "refer detect no_target box_to_mask caption region_caption spotting_caption vqa region_vqa grounded_vqa reasoning "
    "dialogue"
).split()


def test_the_resolution_is_the_models_own_and_not_the_towers(make_tiny_model):
    model, _ = make_tiny_model("llama", "resnet", image_size=96, signals=["box"])
    assert evaluation_run.model_resolution(model.config) == {"model reads": 96}
    model, _ = make_tiny_model("llama", "resnet", image_size=96, signals=["box", "mask"])
    assert evaluation_run.model_resolution(model.config)["masks from"] == 96


@pytest.fixture(scope="session")
def eager_model_dir(make_tiny_model, tmp_path_factory) -> str:
    """A random model that mostly answers with one `<vis>`, as a trained one would; where it is differs by question."""
    model, processor = make_tiny_model()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    messages = []
    for words in WORDS:
        items = [{"type": "image", "image": image}, {"type": "text", "text": f"Find {words}."}]
        answer = {"role": "assistant", "content": [{"type": "box", "box": [5, 5, 30, 30]}]}
        messages.append([{"role": "user", "content": items}, answer])
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    place = (inputs["input_ids"] == processor.vis_token_id).int().argmax(1)
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
        rows = torch.arange(len(place))
        for token, at in ((processor.vis_token_id, place - 1), (processor.tokenizer.eos_token_id, place)):
            direction = states[rows, at].mean(0)
            model.lm_head.weight[token] = 0.6 * direction / direction.norm()
    folder = tmp_path_factory.mktemp("eager")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def mini(data_dir) -> list[str]:
    return mini_arguments(data_dir)


@pytest.fixture
def no_sheets(monkeypatch):
    """Leaves out the images of cases, which take most of the time, and most resamples."""
    monkeypatch.setattr(reporting, "write_cases", lambda *args: None)
    monkeypatch.setattr(reporting, "plot_calibration", lambda *args: None)
    monkeypatch.setattr(intervals, "WHOLE_SET_RESAMPLES", 3)


def run(*arguments) -> dict:
    """validate.py in this process; its summary."""
    arguments = [str(argument) for argument in arguments]
    assert validate.main(arguments) == 0
    return json.loads(Path(arguments[arguments.index("--output") + 1], "summary.json").read_text())


# ---- a model ---------------------------------------------------------------------------------------------------------


def numbers(summary: dict) -> dict:
    return {(module, key): value for module, values in summary["metrics"].items() for key, value in values.items()}


def assert_same_numbers(first: dict, second: dict) -> None:
    a, b = numbers(first), numbers(second)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == b[key] if not isinstance(value, float) else value == pytest.approx(b[key], abs=1e-4), key


def test_batches_and_an_interrupted_run_give_the_same_numbers(
    mini, eager_model_dir, tmp_path, monkeypatch, no_sheets, capsys
):
    model = ["--model", eager_model_dir, "--device", "cpu", *mini]
    by_eight = run(*model, "--output", tmp_path / "eight")
    assert by_eight["n"] == 8 and by_eight["decoding"].startswith("free-running")
    assert by_eight["metrics"]["referring_iou"]["miou"] > 0 and by_eight["emission"]["rate"] > 0.5
    assert_same_numbers(by_eight, run(*model, "--output", tmp_path / "one", "--batch_size", 1))
    shown = capsys.readouterr().err
    assert f"acc@0.5 {by_eight['metrics']['box_accuracy']['acc@0.5']:.3f}" in shown and "on disk" not in shown

    asked, real = [], evaluation_run.answer

    def dies(*args):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(sample["id"] for sample in args[2])
        return real(*args)

    monkeypatch.setattr(evaluation_run, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*model, "--output", tmp_path / "killed", "--batch_size", 2)
    (part,) = (tmp_path / "killed").glob("predictions.*.part")
    assert len(part.read_text().splitlines()) == 4
    with part.open("a") as file:
        file.write('{"id": "154-4", "text": "half a li')  # what a kill leaves of a line
    monkeypatch.setattr(evaluation_run, "answer", lambda *args: asked.extend(s["id"] for s in args[2]) or real(*args))
    summary = run(*model, "--output", tmp_path / "killed", "--batch_size", 2)
    assert Counter(asked) == Counter(sample["id"] for sample in samples_of(*mini))  # nothing twice
    assert "refcoco: 4 of 8 predictions are on disk already" in capsys.readouterr().err
    assert_same_numbers(by_eight, summary)
    files = [(tmp_path / name / "predictions.jsonl").read_text().splitlines() for name in ("eight", "killed")]
    assert [json.loads(line)["id"] for line in files[0]] == [json.loads(line)["id"] for line in files[1]]

    assert validate.main([*model, "--output", str(tmp_path / "eight"), "--max_new_tokens", "3"]) == 2
    assert run(*model, "--output", tmp_path / "eight", "--max_new_tokens", 3, "--overwrite")["max_new_tokens"] == 3


def test_grounded_answers_give_the_same_numbers(mini, eager_model_dir, tmp_path, no_sheets, capsys):
    """One forward per batch where one object is asked for; not where a metric counts all of them."""
    model = ["--model", eager_model_dir, "--device", "cpu"]
    free = run(*model, *mini, "--output", tmp_path / "free")
    grounded = run(*model, *mini, "--output", tmp_path / "grounded", "--ground")
    assert grounded["decoding"].startswith("greedy, up to the first object")
    assert_same_numbers(free, grounded)
    assert free["metrics"]["referring_iou"]["miou"] > 0
    assert grounded["speed"]["tokens_per_answer"] < free["speed"]["tokens_per_answer"]
    assert validate.main([*model, *mini, "--output", str(tmp_path / "free"), "--ground"]) == 2
    assert "ground None, now True" in capsys.readouterr().err
    assert validate.main([*model, "--benchmark", "scenes_point", "--output", str(tmp_path / "all"), "--ground"]) == 2
    assert "measures point with point_accuracy, which counts all objects" in capsys.readouterr().err


def test_a_run_says_how_it_came_about(mini, eager_model_dir, tmp_path):
    summary = run("--model", eager_model_dir, *mini, "--output", tmp_path, "--teacher_forced", "--device", "cpu")
    expected = (
        "checkpoint checkpoint_sha256 command split n seed prompt resolution threshold intervals missing speed note"
    )
    assert not [key for key in expected.split() if key not in summary]
    assert summary["command"].startswith("validate.py --model") and summary["prompt"] == {"refer": "Find {phrase}."}
    low, high = summary["intervals"]["box_accuracy"]["acc@0.5"]
    assert 0 <= low <= summary["metrics"]["box_accuracy"]["acc@0.5"] <= high <= 1 and high - low > 0.1
    assert set(summary["teacher_forced"]["metrics"]) == {"box_accuracy", "referring_iou"}
    assert summary["speed"]["tokens_per_answer"] >= 2
    for name in ("summary.md", "samples.jsonl", "worst.jpg", "random.jpg", "calibration.png"):
        assert (tmp_path / name).stat().st_size > 100, name
    assert "| box_accuracy | acc@0.5 |" in (tmp_path / "summary.md").read_text()
    for module, values in summary["metrics"].items():
        shares = {key for key, value in values.items() if isinstance(value, float)}
        assert shares == set(summary["intervals"][module]), module

    (file,) = (tmp_path / ".eval_results").glob("*.yaml")
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert {entry.dataset_id for entry in entries} == {"lmms-lab/RefCOCO"}
    assert entries[0].value == summary["metrics"]["box_accuracy"]["acc@0.5"] and "95 % interval" in entries[0].notes
    index = yaml.safe_load((tmp_path / "model_index.yaml").read_text())["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == Path(eager_model_dir).name and results[0].metric_value == entries[0].value


def test_teacher_forced_objects_are_those_of_the_forward_pass(mini, eager_model_dir):
    model, processor = load(eager_model_dir, "cpu", "float32")
    samples = samples_of(*mini)[:3]
    images = [read_sample_image(sample) for sample in samples]
    entries = answer_teacher_forced(model, processor, samples, images)
    assert all(len(entry["objects"]) == 1 and not entry["error"] for entry in entries)
    free = answer(model, processor, samples, images, 4)
    for forced, own in zip(entries, free, strict=True):  # the first <vis> comes after the same words
        if own["text"] == "" and own["objects"]:
            assert forced["objects"][0]["box"] == pytest.approx(own["objects"][0]["box"], abs=0.05)
            assert forced["objects"][0]["score"] == pytest.approx(own["objects"][0]["score"], abs=1e-4)


def test_images_that_cannot_be_answered_count_as_wrong(eager_model_dir, tmp_path):
    model, processor = load(eager_model_dir, "cpu", "float32")
    files = {"good.png": (60, 40), "thin.png": (2000, 1), "broken.png": None}
    samples = []
    for number, (name, size) in enumerate(files.items()):
        path = tmp_path / name
        if size:
            Image.new("RGB", size, "red").save(path)
        else:
            path.write_bytes(b"\x89PNG not really")
        sample = made_sample(number, [(5, 5, 30, 30)], image={"path": str(path), "bytes": None}, boxes=[], masks=[])
        samples.append(sample | {"messages": [{"role": "user", "content": "<image>Find the cup."}], "source": "made"})

    def how(batch, images):
        return answer(model, processor, batch, images, 4)

    entries = answer_batch(samples, read_images(samples, False), how)
    assert entries[0]["error"] is None
    assert entries[1]["error"].startswith("refused by the processor: ")
    assert entries[2]["error"].startswith("image cannot be read: ")
    result = Scorer({"box_accuracy": None}).score(samples, {entry["id"]: entry for entry in entries})
    assert result.metrics["box_accuracy"]["n"] == 3
    assert {"refused by the processor", "image cannot be read"} <= set(result.missing)


def test_another_revision_of_a_hub_model_is_another_run(
    mini, eager_model_dir, tmp_path, monkeypatch, no_sheets, capsys
):
    repository = tmp_path / "cache" / "models--owner--tiny"
    for commit in ("a" * 40, "b" * 40):
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluation_run, "load", lambda name, *args: load(eager_model_dir, "cpu", "float32"))
    command = ["--model", "owner/tiny", "--device", "cpu", *mini, "--limit", "2", "--output", str(tmp_path / "out")]
    for commit, status in (("a" * 40, 0), ("a" * 40, 0), ("b" * 40, 2)):
        (repository / "refs" / "main").write_text(commit)
        assert validate.main(command) == status
    assert f"revision '{'a' * 40}', now '{'b' * 40}'" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["revision"] == "a" * 40
    assert validate.main(["--model", "owner/other", *command[2:-1], str(tmp_path / "other")]) == 2
    assert "--model owner/other: not a checkpoint that can be loaded" in capsys.readouterr().err


# ---- given predictions -----------------------------------------------------------------------------------------------


def test_given_predictions_perfect_missing_and_malformed(mini, tmp_path, no_sheets):
    samples = samples_of(*mini)
    lines = [perfect(sample) for sample in samples]
    summary = run("--predictions", write_lines(tmp_path / "all", lines), *mini, "--output", tmp_path / "a")
    assert summary["metrics"]["box_accuracy"]["macc"] == summary["metrics"]["referring_iou"]["ciou"] == 1
    assert summary["missing"] == {} and summary["emission"]["rate"] == 1

    lines[0]["objects"] = []
    lines[1] |= {"objects": [], "text": "There is no zebra."}
    lines[2]["objects"][0] |= {"box": [1, 2, math.inf, 4], "mask": {"size": [3, 3], "counts": "04"}}
    lines[3]["objects"] = "none"
    lines[4]["objects"][0]["mask"]["counts"] = "~~"
    lines[5] = {"id": lines[5]["id"], "objects": [], "finished": False}
    del lines[6]
    lines.append({"id": "of something else"})
    lines[6]["objects"][0]["score"] = "high"
    path = tmp_path / "some"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = run("--predictions", path, *mini, "--output", tmp_path / "b")
    assert summary["n"] == 8 and summary["metrics"]["box_accuracy"]["acc@0.5"] == 1 / 8
    assert summary["metrics"]["referring_iou"]["miou"] == 0 and summary["predictions_without_sample"] == 1
    assert summary["missing"] == {
        "no objects in the prediction": 1,
        "answered that there is none": 1,
        "malformed box: box is not four finite numbers": 1,
        "malformed list of objects": 1,
        "malformed mask: mask with broken RLE counts": 1,
        "cut off before any <vis>": 1,
        "no prediction": 1,
        "malformed score: not a number": 1,
    }
    assert run("--predictions", tmp_path / "all", *mini, "--output", tmp_path / "c", "--threshold", 0.95)[
        "missing"
    ] == {"every object below the threshold": 8}
    path.write_text("not json\n")
    assert validate.main(["--predictions", str(path), *mini, "--output", str(tmp_path / "d")]) == 2


def test_every_task_of_ones_own_labels_is_perfect_with_perfect_predictions(data_dir, tmp_path, no_sheets):
    arguments = ["--benchmark", "coco", "--data", data_dir / "tiny_coco", "--limit", 60]
    samples = samples_of(*arguments)
    assert {sample["task"] for sample in samples} == {"refer", "detect", "no_target"}
    path = write_lines(tmp_path / "all", [perfect(sample) for sample in samples])
    summary = run("--predictions", path, *arguments, "--output", tmp_path / "a")
    found = summary["metrics"]
    for module, key in (
        ("box_accuracy", "acc@0.9"),
        ("referring_iou", "ciou"),
        ("generalized_referring", "giou"),
        ("generalized_referring", "n_acc"),
        ("generalized_boxes", "pr@f1"),
        ("coco_detection", "bbox_ap"),
        ("coco_detection", "segm_ap"),
    ):
        assert found[module][key] == pytest.approx(1), (module, key)
    without = sum(sample["task"] == "no_target" for sample in samples)
    detected = sum(sample["task"] in ("detect", "no_target") for sample in samples)
    rows = (tmp_path / "a" / "summary.md").read_text().splitlines()
    notes = "".join(file.read_text() for file in (tmp_path / "a" / ".eval_results").glob("*.yaml"))
    for module, key, n in (
        ("generalized_referring", "n_acc", without),
        ("coco_detection", "bbox_ap", detected),
        ("box_accuracy", "acc@0.5", summary["metrics"]["box_accuracy"]["n"]),
    ):
        assert 0 < n < 60
        assert [row for row in rows if row.startswith(f"| {module} | {key} |") and row.endswith(f" | {n} |")], key
        assert f"{module}, {key}; given predictions; n = {n};" in notes
    assert summary["calibration"]["box"]["ece"] == pytest.approx(0.1)
    assert summary["calibration"]["no_target"]["n_acc"][1] == 1


# ---- comparison ------------------------------------------------------------------------------------------------------


def test_comparison_of_two_runs(mini, tmp_path, no_sheets, capsys):
    samples = samples_of(*mini)
    good = [perfect(sample) for sample in samples]
    worse = [line if index > 2 else line | {"objects": []} for index, line in enumerate(good)]
    for name, lines in (("good", good), ("worse", worse[:-1])):
        run("--predictions", write_lines(tmp_path / f"{name}.jsonl", lines), *mini, "--output", tmp_path / name)
    a, b = (str(tmp_path / name / "summary.json") for name in ("worse", "good"))
    capsys.readouterr()
    assert validate.main(["--compare", a, b, "--output", str(tmp_path / "both")]) == 0
    result = json.loads((tmp_path / "both" / "comparison.json").read_text())
    values = result["metrics"]["box_accuracy"]
    missed = [sample["id"] for sample in (*samples[:3], samples[-1])]
    assert values["gained"] == missed and values["lost"] == [] and result["n"] == 8
    row = values["estimates"]["acc@0.5"]
    assert (row["a"], row["b"], row["difference"]) == (0.5, 1, 0.5) and row["interval"][0] > 0 and row["p"] < 0.05
    shown = capsys.readouterr().out
    assert f"- {missed[0]}: {samples[0]['prompt']}" in shown and f"(`{a}`)" in shown and f"(`{b}`)" in shown

    assert validate.main(["--compare", a, str(tmp_path / "worse")]) == 0
    same = paired_differences(*[read_run(a)[1]] * 2, "referring_iou")
    assert same["estimates"]["ciou"]["difference"] == 0 and same["estimates"]["ciou"]["p"] == 1 and not same["gained"]
    assert validate.main(["--compare", a, str(tmp_path / "nowhere")]) == 2
    other = json.loads(Path(a).read_text()) | {"split": "val"}
    Path(a).write_text(json.dumps(other))
    assert validate.main(["--compare", a, b]) == 2


# ---- reports ------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_this_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "tiny-model").mkdir()
    monkeypatch.chdir(tmp_path / "tiny-model")
    assert reporting.checkpoint_name(".") == "tiny-model"
    assert reporting.checkpoint_name("owner/model") == "owner/model"


def test_cases_are_of_many_images():
    samples = [made_sample(number, [], image_id="a" if number < 5 else str(number)) for number in range(8)]
    order = [int(sample["id"].split("-")[0]) for sample in of_many_images(samples)]
    assert order == [0, 1, 5, 6, 7, 2, 3, 4]


def test_a_case_shows_both_sides_at_any_shape(tmp_path):
    for size in ((60, 40), (40, 900), (3000, 2)):
        Image.new("RGB", size, "teal").save(tmp_path / "image.png")
        image = {"image": {"path": str(tmp_path / "image.png"), "bytes": None}}
        sample = made_sample(0, [], boxes=[], masks=[], **image) | dict(zip(("width", "height"), size, strict=True))
        found = check_prediction(sample, {"objects": [{"box": [1, 0, 9, 2], "score": 0.5}]}, 0, set())
        cards = draw_case(sample, None, found, ", box IoU 0.00")
        assert [one.width for one in cards] == [CASE_CELL - SHEET_MARGIN] * 2
        assert max(one.height for one in cards) <= CASE_CELL, size


# ---- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_processes_give_the_same_numbers_as_one(launcher, mini, eager_model_dir, tmp_path):
    command = ["-m", "perceptiongpt.validate", "--model", eager_model_dir, *mini, "--batch_size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    config = Path(__file__).parents[1] / "recipes" / "accelerate" / "cpu.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    launch += ["--main_process_port", "0"]
    if launcher == "torchrun":
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for name, words in (("one", command), ("two", [*launch, *command])):
        words = [sys.executable, *words, "--output", str(tmp_path / name)]
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert_same_numbers(one, two)
    assert not list((tmp_path / "two").glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("task", SCENE_TASKS)
def test_every_task_of_the_scenes(task, eager_model_dir, tmp_path, no_sheets):
    arguments = ["--benchmark", f"scenes_{task}", "--seed", 1_000_777, "--limit", 4, "--max_new_tokens", 4]
    summary = run("--model", eager_model_dir, "--device", "cpu", *arguments, "--output", tmp_path)
    assert summary["n"] == 4 and summary["split"] == "test"
    assert set(summary["metrics"]) == set(find_benchmark(f"scenes_{task}").metrics)


@pytest.mark.slow
def test_the_scenes_bench_is_broken_down_beside_answers_without_a_model(eager_model_dir, tmp_path):
    arguments = ["--benchmark", "scenes_bench_1", "--limit", 20, "--max_new_tokens", 4, "--output", tmp_path]
    summary = run("--model", eager_model_dir, "--device", "cpu", *arguments)
    kinds = summary["breakdown"]["kind"]
    assert sum(row["n"] for row in kinds.values()) == 18 and summary["n_of_metric"]["generalized_referring"] == 20
    assert sum(row["n"] for row in summary["breakdown"]["side"].values()) == 18
    assert set(summary["grey_image"]["metrics"]) == set(summary["metrics"])
    assert {"random_of_class", "largest"} <= set(summary["without a model, acc@0.5"])
