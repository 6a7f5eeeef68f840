"""validate.py: samples, answers that survive a kill, intervals, calibration, comparison, files for the Hub."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiongpt import reporting, scoring, validate
from perceptiongpt.inference import InputError


WORDS = ("the dog", "every left red cup", "a person", "the zebra on the left")
SIZE = {"width": 60, "height": 40}
PICTURES = "coco128/train2017"


@pytest.fixture(scope="session")
def eager_model_dir(make_tiny_model, tmp_path_factory) -> str:
    """A random model that mostly answers with one `<vis>`, as a trained one would; where it is differs by question."""
    model, processor = make_tiny_model()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    messages = []
    for words in WORDS:
        items = [{"type": "image", "image": picture}, {"type": "text", "text": f"Find {words}."}]
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
    """The command line of the eight expressions of RefCOCO that are about a photo at hand."""
    folders = ["--data", str(data_dir / "refcoco_mini"), "--images", str(data_dir / PICTURES)]
    return ["--benchmark", "refcoco", "--split", "testB", *folders]


@pytest.fixture
def no_pictures(monkeypatch):
    """Leaves out the sheets, which take most of the time."""
    monkeypatch.setattr(reporting, "write_cases", lambda *args: None)
    monkeypatch.setattr(reporting, "plot_calibration", lambda *args: None)


def run(*arguments) -> dict:
    """validate.py in this process; its summary."""
    arguments = [str(argument) for argument in arguments]
    assert validate.main(arguments) == 0
    return json.loads(Path(arguments[arguments.index("--output") + 1], "summary.json").read_text())


def samples_of(*arguments, output="unused") -> list[dict]:
    options = validate.parse_arguments(["--predictions", "x", "--output", str(output), *map(str, arguments)])
    spec = validate.find_benchmark(options.benchmark)
    options.seed = spec["seed"] if options.seed is None else options.seed
    options.limit = options.limit or spec["limit"]
    if spec["source"] != "coco":
        options.split = validate.choose_split(spec, options.split, options.seed)
    return validate.read_samples(spec, options, validate.Problems())


def perfect(sample: dict) -> dict:
    """The line of a predictions file that is right."""
    objects = [
        {"box": box, "mask": mask, "score": 0.9, "mask_score": 0.8, "phrase": "it"}
        for box, mask in scoring.targets(sample)
    ]
    return {"id": sample["id"], "text": scoring.plain_text(sample["answers"][0]["content"]), "objects": objects}


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rle(mask: np.ndarray) -> dict:
    return scoring.text_rle(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def rectangle(x0, y0, x1, y1) -> dict:
    mask = np.zeros((SIZE["height"], SIZE["width"]))
    mask[y0:y1, x0:x1] = 1
    return rle(mask)


def made_sample(number: int, targets: list, task="refer", text="<vis>", **more) -> dict:
    boxes, masks = [list(map(float, box)) for box in targets], [rectangle(*box) for box in targets]
    answers = [{"content": text * len(targets) or "There is no cup.", "boxes": boxes, "masks": masks}]
    sample = {"id": f"{number}-0", "image_id": str(number), "task": task, "phrase": "cup", "answers": answers, **SIZE}
    return sample | {"prompt": "Find every cup.", "ten": None, "ignore": None} | more


def made_entry(sample: dict, boxes: list, scores=None) -> dict:
    scores = scores or [0.5] * len(boxes)
    objects = [
        {"box": list(map(float, box)), "mask": rectangle(*box), "score": score, "mask_score": score, "phrase": None}
        for box, score in zip(boxes, scores, strict=True)
    ]
    return {"id": sample["id"], "text": "", "objects": objects, "error": None, "finished": True, "tokens": 2, "ms": 1.0}


# ---- benchmarks and samples ------------------------------------------------------------------------------------------


def test_every_benchmark_names_what_exists():
    known = validate.read_benchmarks()
    expected = (
        "refcoco refcoco+ refcocog grefcoco reasonseg flickr30k_spotting coco_multi_instance coco refcocog_regions"
    )
    expected += " visual_genome_regions coco_captions flickr30k_captions vqav2 okvqa pope scenes_bench_1"
    tasks = set(validate.load_templates()) | {"no_target", "dialogue"}
    assert set(expected.split()) <= set(known) and {f"scenes_{task}" for task in tasks} <= set(known)
    for name, spec in known.items():
        assert set(spec["tasks"]) <= tasks and spec["splits"][0], name
        module, key = spec["headline"].split("/")
        assert module in spec["metrics"], name
        assert key in scoring.METRICS[module].estimates and scoring.METRICS[module].hit, name


def test_what_is_wrong_with_a_benchmark_is_said(tmp_path, capsys):
    cases = {
        "a: {source: refer, metrics: [box_accuracy], split: [val]}": "unknown key 'split'",
        "a: {source: nowhere, metrics: [box_accuracy]}": "'nowhere' is none of",
        "a: {source: refer, metrics: [accuracy]}": "the metric 'accuracy'",
        "a: {source: refer}": "needs a source and metrics",
        "[1, 2]": "benchmarks by name",
        "a: {": "cannot be read as YAML",
    }
    for text, message in cases.items():
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            validate.find_benchmark(str(tmp_path / "own.yaml"))
    with pytest.raises(InputError, match="meant was perhaps .*refcoco"):
        validate.find_benchmark("refcocoo")
    assert validate.main(["--benchmark", "refcoco", "--predictions", "x", "--data", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert validate.main(["--benchmark", "refcoco", "--predictions", "x", "--data", str(tmp_path)]) == 2
    assert "refcoco/refs" in capsys.readouterr().err


def test_samples_of_expressions_and_of_regions(mini, data_dir):
    samples = samples_of(*mini)
    assert len(samples) == len({sample["id"] for sample in samples}) == 8
    assert {sample["prompt"] for sample in samples} >= {"Find zebra in the middle."}
    assert all(sample["messages"][0]["content"] == f"<image>{sample['prompt']}" for sample in samples)
    assert [sample["id"] for sample in samples_of(*mini, "--limit", 3)] == [sample["id"] for sample in samples[:3]]

    folders = ["--data", data_dir / "refcoco_mini", "--images", data_dir / PICTURES]
    regions = samples_of("--benchmark", "refcocog_regions", "--split", "val", *folders)
    assert [len(sample["answers"]) for sample in regions] == [2, 2]  # one sample per region, a reference per sentence
    assert all(len(sample["boxes"]) == 1 and not scoring.targets(sample) for sample in regions)


def test_samples_of_questions_keep_all_ten_answers(data_dir):
    files = [data_dir / "vqav2" / f"in_stock_{part}.json" for part in ("questions", "annotations")]
    questions = json.loads(files[0].read_text())["questions"]
    pictures = {
        path.stem for folder in ("coco128/train2017", "tiny_coco/train2017") for path in (data_dir / folder).glob("*")
    }
    arguments = ["--benchmark", "vqav2", "--data", data_dir, "--annotations", *files]
    spec, options = (
        validate.find_benchmark("vqav2"),
        validate.parse_arguments(["--predictions", "x", *map(str, arguments)]),
    )
    options.split, options.seed, options.no_images = "val", 0, True
    samples = validate.read_samples(spec, options, validate.Problems())
    assert len(samples) == len(questions) and all(len(sample["ten"]) == 10 for sample in samples) and pictures
    entries = {sample["id"]: {"text": sample["ten"][0]} for sample in samples}
    result = scoring.Scorer(spec["metrics"]).score(samples, entries)
    assert 0.3 < result.metrics["vqa_accuracy"]["accuracy"] <= 1 and not result.missing


def test_grounded_captions_are_held_against_all_five(data_dir):
    folder = data_dir / "flickr30k_entities"
    names = sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))
    files = [folder / "Annotations", folder / "Sentences"]
    arguments = ["--benchmark", "flickr30k_spotting", "--data", folder, "--annotations", *files, "--split"]
    found = [
        name for name in ("val", "train", "test") if set((folder / f"{name}.txt").read_text().split()) & set(names)
    ]
    samples = samples_of(*arguments, found[0], "--limit", 3)
    assert all(1 < len(sample["answers"]) <= 5 for sample in samples)
    boxes = [tuple(box) for box, _ in scoring.targets(samples[0])]
    assert len(boxes) == len(set(boxes)) > 1
    scorer = scoring.Scorer({"grounded_caption": None})
    (pair,) = [scoring.METRICS["grounded_caption"].inputs(samples[0], scorer.check(samples[0], perfect(samples[0])))]
    assert len(pair["references"]["caption"]) == len(samples[0]["answers"])
    assert pair["predictions"]["masks"] == pair["references"]["masks"]  # boxes, as rectangles, on both sides


def test_a_dialogue_is_asked_up_to_its_last_turn():
    (sample,) = samples_of("--benchmark", "scenes_dialogue", "--seed", 1_000_123, "--limit", 1)
    assert [message["role"] for message in sample["messages"]][-1] == "user" and len(sample["messages"]) >= 3
    slots = sum(message["content"].count("<vis>") for message in sample["messages"])
    assert len(sample["boxes"]) == len(sample["masks"]) == slots
    assert reporting.read_picture(sample).size == (sample["width"], sample["height"])


@pytest.mark.parametrize("seed, split", [(1_000_123, "test"), (5, "val")])
def test_any_seed_is_a_test_set_of_its_own(seed, split):
    arguments = ["--benchmark", "scenes_refer", "--limit", 2, "--seed"]
    samples = samples_of(*arguments, seed)
    assert {sample["split"] for sample in samples} == {split}
    others = samples_of(*arguments, seed + 1)
    assert [sample["image"]["bytes"] for sample in samples] != [sample["image"]["bytes"] for sample in others]


def test_a_prompt_of_ones_own_replaces_the_evaluation_prompt(mini):
    spec = {**validate.find_benchmark("refcoco"), "prompt": {"refer": "Where is {phrase}?"}}
    options = validate.parse_arguments(["--predictions", "x", *mini])
    options.seed = 0
    (sample, *_) = validate.read_samples(spec, options, validate.Problems())
    assert sample["prompt"] == "Where is zebra in the middle?"
    assert sample["messages"][0]["content"] == "<image>Where is zebra in the middle?"


def test_folders_of_ones_own_labels(tmp_path, data_dir):
    instances = json.loads((data_dir / "coco128" / "instances_train2017.json").read_text())
    name = instances["images"][0]["file_name"]
    source = data_dir / PICTURES / name

    def make(folder: str, pictures: str, file: str) -> Path:
        root = tmp_path / folder
        (root / pictures).mkdir(parents=True, exist_ok=True)
        (root / file).parent.mkdir(exist_ok=True)
        shutil.copy(source, root / pictures / name)
        part = {key: value for key, value in instances.items() if key != "images"} | {"images": instances["images"][:1]}
        kept = instances["images"][0]["id"]
        part["annotations"] = [one for one in part["annotations"] if one["image_id"] == kept]
        (root / file).write_text(json.dumps(part))
        return root

    for root in (make("a", "photos", "labels.json"), make("b", "", "annotations/instances_val.json")):
        samples = samples_of("--benchmark", "coco", "--data", root)
        assert {sample["image_id"] for sample in samples} == {str(instances["images"][0]["id"])}
    shutil.copy(root / "annotations/instances_val.json", root / "annotations/instances_train.json")
    assert {one["split"] for one in samples_of("--benchmark", "coco", "--data", root)} == {"val"}
    labels = root / "annotations/instances_val.json"
    with_bad_names = json.loads(labels.read_text())
    for number, bad_name in enumerate(("x" * 300, "../a.jpg", "/a.jpg"), 10**9):
        with_bad_names["images"].append({"id": number, "file_name": bad_name, "width": 4, "height": 4})
    (tmp_path / "own.json").write_text(json.dumps(with_bad_names))
    assert validate.find_coco_images(root, tmp_path / "own.json") == str(root)
    with pytest.raises(
        InputError, match="choose one of annotations/instances_train.json, annotations/instances_val.json"
    ):
        samples_of("--benchmark", "coco", "--data", root, "--split", "minival")
    assert samples_of("--benchmark", "coco", "--data", root, "--split", "train")
    (root / name).unlink()
    with pytest.raises(InputError, match="none is there; give --images"):
        samples_of("--benchmark", "coco", "--data", root, "--split", "val")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no COCO instances json"):
        samples_of("--benchmark", "coco", "--data", tmp_path / "none")

    # A folder per split with its labels among its pictures, beside other json files.
    for split in ("train", "valid"):
        root = make("c", split, f"{split}/_annotations.coco.json")
    (root / "data.json").write_text("{not json")
    (root / "valid" / "info.json").write_text("[]")
    for given, split, folder in ((None, "val", "valid"), ("train", "train", "train")):
        found = validate.find_coco_files(root, [given] if given else ["val", "test", "train"])
        assert found == {
            "annotations": [str(root / folder / "_annotations.coco.json")],
            "images": str(root / folder),
            "split": split,
        }
    assert samples_of("--benchmark", "coco", "--data", root)


# ---- a model ---------------------------------------------------------------------------------------------------------


def numbers(summary: dict) -> dict:
    return {(module, key): value for module, values in summary["metrics"].items() for key, value in values.items()}


def assert_same_numbers(first: dict, second: dict) -> None:
    a, b = numbers(first), numbers(second)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == b[key] if not isinstance(value, float) else value == pytest.approx(b[key], abs=1e-4), key


def test_batches_and_an_interrupted_run_give_the_same_numbers(
    mini, eager_model_dir, tmp_path, monkeypatch, no_pictures, capsys
):
    model = ["--model", eager_model_dir, "--device", "cpu", *mini]
    by_eight = run(*model, "--output", tmp_path / "eight")
    assert by_eight["n"] == 8 and by_eight["decoding"].startswith("free-running")
    assert by_eight["metrics"]["referring_iou"]["miou"] > 0 and by_eight["emission"]["rate"] > 0.5
    assert_same_numbers(by_eight, run(*model, "--output", tmp_path / "one", "--batch_size", 1))
    shown = capsys.readouterr().err
    assert f"acc@0.5 {by_eight['metrics']['box_accuracy']['acc@0.5']:.3f}" in shown and "on disk" not in shown

    asked, real = [], validate.answer

    def dies(*args):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(sample["id"] for sample in args[2])
        return real(*args)

    monkeypatch.setattr(validate, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*model, "--output", tmp_path / "killed", "--batch_size", 2)
    (part,) = (tmp_path / "killed").glob("predictions.*.part")
    assert len(part.read_text().splitlines()) == 4
    with part.open("a") as file:
        file.write('{"id": "154-4", "text": "half a li')  # what a kill leaves of a line
    monkeypatch.setattr(validate, "answer", lambda *args: asked.extend(s["id"] for s in args[2]) or real(*args))
    summary = run(*model, "--output", tmp_path / "killed", "--batch_size", 2)
    assert Counter(asked) == Counter(sample["id"] for sample in samples_of(*mini))  # nothing twice
    assert "refcoco: 4 of 8 samples are on disk already" in capsys.readouterr().err
    assert_same_numbers(by_eight, summary)
    files = [(tmp_path / name / "predictions.jsonl").read_text().splitlines() for name in ("eight", "killed")]
    assert [json.loads(line)["id"] for line in files[0]] == [json.loads(line)["id"] for line in files[1]]

    assert validate.main([*model, "--output", str(tmp_path / "eight"), "--max_new_tokens", "3"]) == 2
    assert run(*model, "--output", tmp_path / "eight", "--max_new_tokens", 3, "--overwrite")["max_new_tokens"] == 3


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
    model, processor = validate.load(eager_model_dir, "cpu", "float32")
    samples = samples_of(*mini)[:3]
    images = [reporting.read_picture(sample) for sample in samples]
    entries = validate.answer_teacher_forced(model, processor, samples, images)
    assert all(len(entry["objects"]) == 1 and not entry["error"] for entry in entries)
    free = validate.answer(model, processor, samples, images, 4)
    for forced, own in zip(entries, free, strict=True):  # the first <vis> comes after the same words
        if own["text"] == "" and own["objects"]:
            assert forced["objects"][0]["box"] == pytest.approx(own["objects"][0]["box"], abs=0.05)
            assert forced["objects"][0]["score"] == pytest.approx(own["objects"][0]["score"], abs=1e-4)


def test_pictures_that_cannot_be_answered_count_as_wrong(eager_model_dir, tmp_path):
    model, processor = validate.load(eager_model_dir, "cpu", "float32")
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
        return validate.answer(model, processor, batch, images, 4)

    entries = validate.answer_batch(samples, validate.read_pictures(samples, False), how)
    assert entries[0]["error"] is None
    assert entries[1]["error"].startswith("refused by the processor: ")
    assert entries[2]["error"].startswith("picture cannot be read: ")
    result = scoring.Scorer({"box_accuracy": None}).score(samples, {entry["id"]: entry for entry in entries})
    assert result.metrics["box_accuracy"]["n"] == 3
    assert {"refused by the processor", "picture cannot be read"} <= set(result.missing)


# ---- given predictions -----------------------------------------------------------------------------------------------


def test_given_predictions_perfect_missing_and_malformed(mini, tmp_path, no_pictures):
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
        "no <vis> in the answer": 1,
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


def test_every_task_of_ones_own_labels_is_perfect_with_perfect_predictions(data_dir, tmp_path, no_pictures):
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


# ---- numbers ---------------------------------------------------------------------------------------------------------


def noisy_set(seed: int, pictures: int = 12) -> tuple[list[dict], dict[str, dict]]:
    """Samples with none, one or two targets, and predictions of them that are often off."""
    rng = np.random.default_rng(seed)
    samples, entries = [], {}
    for number in range(pictures * 2):
        boxes = [(5 + 25 * i, 5, 25 + 25 * i, 30) for i in range(number % 3)]
        task = ("no_target", "refer", "detect")[number % 3]
        sample = made_sample(number, boxes, task=task, image_id=str(number // 2))
        moved = [tuple(int(side + step) for side, step in zip(box, rng.integers(-4, 5, 4))) for box in boxes]
        if rng.random() < 0.3:
            moved.append((30, 8, 40, 20))
        if rng.random() < 0.2:
            moved = []
        samples.append(sample)
        entries[sample["id"]] = made_entry(sample, moved, rng.random(len(moved)).tolist())
    return samples, entries


def assert_sums_make_the_numbers(result: scoring.Result, name: str) -> None:
    """The module's numbers come out of the summed columns, and each lies in its interval."""
    table = scoring.column_table(list(result.columns[name].values()))
    sums = {column: values.sum() for column, values in table.items()}
    for key, estimate in scoring.METRICS[name].estimates.items():
        value = result.metrics[name][key]
        assert float(estimate(sums)) == pytest.approx(value, abs=1e-6), (name, key)
        low, high = result.intervals[name][key]
        assert low - 1e-9 <= value <= high + 1e-9 and low < high, (name, key)


def test_sums_of_columns_make_the_modules_numbers():
    samples, entries = noisy_set(0)
    names = {"box_accuracy": None, "referring_iou": None, "generalized_referring": None, "generalized_boxes": None}
    result = scoring.Scorer(names).score(samples, entries)
    for name in names:
        assert_sums_make_the_numbers(result, name)
    low, high = result.emission["interval"]
    assert low < result.emission["rate"] < high


@pytest.mark.slow  # METEOR is
def test_sums_of_words_make_bleu_and_meteor_and_a_caption_has_an_interval():
    words = "a red cup stands on the old wooden table beside two small green apples".split()
    samples, entries = [], {}
    for number in range(12):
        texts = [" ".join(words[number % 3 + i :]) for i in range(2)]
        answers = [{"content": text, "boxes": [], "masks": []} for text in texts]
        samples.append(made_sample(number, [], task="caption") | {"answers": answers})
        text = " ".join(words[: 14 - number] if number % 2 else words[number % 5 :]).replace("stands", "standing")
        entries[samples[-1]["id"]] = made_entry(samples[-1], []) | {"text": text}
    result = scoring.Scorer({"caption_scores": None, "grounded_caption": None}).score(samples, entries)
    assert_sums_make_the_numbers(result, "caption_scores")
    assert result.intervals["grounded_caption"]["meteor"] == result.intervals["caption_scores"]["meteor"]


def test_interval_of_a_share_is_wilsons_and_knows_that_samples_of_a_picture_are_alike():
    from scipy.stats import binomtest

    hits = np.array([1.0] * 13 + [0.0] * 27)
    one = np.ones(40)
    low, high = scoring.share_interval(hits, one, np.arange(40))
    reference = binomtest(13, 40).proportion_ci(method="wilson")
    # The design effect of samples that are independent is estimated as n / (n - 1).
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=3e-3)
    assert scoring.share_interval(np.zeros(40), one, np.arange(40)) == pytest.approx(
        list(binomtest(0, 40).proportion_ci(method="wilson")), abs=1e-6
    )
    fourfold = [np.repeat(column, 4) for column in (hits, one, np.arange(40))]
    assert scoring.share_interval(*fourfold) == pytest.approx([low, high], abs=1e-9)  # no more known than before


def test_bootstrap_of_a_mean_is_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(0.4, 0.1, 400)
    rows = [{"value": value} for value in values]
    found = scoring.intervals_of(rows, {"mean": scoring.ratio("value")}, [str(i) for i in range(400)])["mean"]
    half = 1.96 * values.std() / 20
    assert found == pytest.approx([values.mean() - half, values.mean() + half], abs=2e-3)


def detection_set(seed: int) -> tuple[list[dict], dict[str, dict]]:
    """Questions for two categories about pictures that hold objects of every size of COCO's, and rough answers.

    The mask of an object is the upper half of its box: often of a smaller one of COCO's three sizes.
    """

    def upper_half(box) -> list[float]:
        return [*box[:3], (box[1] + box[3]) / 2]

    rng = np.random.default_rng(seed)
    size, samples, entries = {"width": 400, "height": 300}, [], {}
    for number in range(24):
        boxes = []
        for side in rng.choice([12, 20, 50, 80, 110, 150], rng.integers(0, 5)):
            x, y = rng.integers(0, [400 - side, 300 - side])
            boxes.append((x, y, x + side, y + side * 0.9))
        category = ("cup", "dog")[number % 2]
        sample = made_sample(number, [], task="detect" if boxes else "no_target", image_id=str(number // 2))
        answer = {"content": "<vis>" * len(boxes) or f"There is no {category}."}
        answer |= {"boxes": [list(map(float, box)) for box in boxes]}
        samples.append(sample | size | {"phrase": category})
        answer["masks"] = [scoring.rectangle_mask(samples[-1], upper_half(box)) for box in boxes]
        samples[-1]["answers"] = [answer]
        objects = []
        for box in [*boxes, *boxes[: rng.integers(0, 2)]]:
            if rng.random() < 0.85:
                moved = (np.array(box) + rng.normal(0, 0.04, 4) * (box[2] - box[0])).tolist()
                mask = scoring.rectangle_mask(samples[-1], upper_half(moved))
                objects.append({"box": moved, "mask": mask, "score": float(rng.random())})
        entries[sample["id"]] = {"id": sample["id"], "text": "", "objects": objects}
    return samples, entries


def test_resampled_detection_is_pycocotools_on_pictures_that_occur_twice():
    samples, entries = detection_set(1)
    result = scoring.Scorer({"coco_detection": None}).score(samples, entries)
    annotations, results = scoring.detection_tables(samples, list(result.pieces["coco_detection"].values()))
    weights = np.ones((2, len(annotations["images"])), dtype=np.float32)
    weights[1, :3] = 2  # the first three pictures twice
    again = {"images": list(annotations["images"]), "annotations": list(annotations["annotations"])}
    more = list(results)
    for number in (1, 2, 3):
        again["images"].append({**annotations["images"][number - 1], "id": number + 100})
        for part, target in ((annotations["annotations"], again["annotations"]), (results, more)):
            for one in part:
                if one["image_id"] == number:
                    target.append({**one, "image_id": number + 100} | ({"id": len(target) + 1} if "id" in one else {}))
    again["categories"] = annotations["categories"]
    copies = scoring.metrics.load("coco_detection").compute(predictions=more, references=again)
    for kind in ("bbox", "segm"):
        for name, (once, doubled) in scoring.resampled_detection(annotations, results, kind, weights).items():
            key = f"{kind}_{name}"
            assert once == pytest.approx(result.metrics["coco_detection"][key], abs=1e-6), key
            assert doubled == pytest.approx(copies[key], abs=1e-6), key
            low, high = result.intervals["coco_detection"][key]
            assert low <= once <= high and high - low > 0.05, key
    assert set(result.intervals["coco_detection"]) == set(scoring.DETECTION_ESTIMATES)


def test_an_interval_of_ap_holds_the_ap_though_that_of_drawn_samples_is_larger():
    drawn = np.random.default_rng(0).normal(0.45, 0.01, 1000)
    low, high = scoring.centred_percentiles(np.array([0.4, *drawn]))
    assert (low, high) == pytest.approx((0.38, 0.42), abs=2e-3)
    assert scoring.centred_percentiles(np.array([1.0, *drawn]))[1] == 1
    assert scoring.centred_percentiles(np.array([np.nan, *drawn])) is None


def test_ap_of_no_detection_at_all_has_an_interval():
    samples, _ = detection_set(1)
    result = scoring.Scorer({"coco_detection": None}).score(samples, {})
    pieces = list(result.pieces["coco_detection"].values())
    assert result.metrics["coco_detection"]["bbox_ap"] == 0
    for key, interval in result.intervals["coco_detection"].items():
        assert interval == scoring.wilson(0, scoring.pictures_with_objects(samples, pieces, key)), key


def test_equal_resamples_make_no_interval_without_width():
    from scipy.stats import binomtest

    samples = [made_sample(number, [(5, 5, 25, 30)], image_id=str(number % 3)) for number in range(13)]
    wrong = {sample["id"]: made_entry(sample, [(40, 5, 55, 30)]) for sample in samples}
    right = {sample["id"]: perfect(sample) for sample in samples}
    names = dict.fromkeys(("box_accuracy", "referring_iou", "generalized_referring", "coco_detection"))
    for entries, share in ((wrong, 0), (right, 1)):
        result = scoring.Scorer(names).score(samples, entries)
        for module, intervals in result.intervals.items():
            for key, interval in intervals.items():
                value = result.metrics[module][key]
                if value is None:
                    assert interval is None, key
                else:
                    assert interval[0] <= value <= interval[1] and interval[1] - interval[0] > 0.01, key
        for key, n in (("referring_iou/ciou", 13), ("coco_detection/segm_ap", 3), ("coco_detection/bbox_ap_small", 3)):
            module, key = key.split("/")
            wilson = binomtest(n * share, n).proportion_ci(method="wilson")
            assert result.intervals[module][key] == pytest.approx([wilson.low, wilson.high], abs=1e-6), key
    cider = scoring.ratio("value", within_one=False)
    assert scoring.intervals_of([{"value": 0.4}] * 3, {"cider": cider}, ["a", "b", "c"]) == {"cider": None}


def test_one_large_object_does_not_make_ap_of_large_ones_sure():
    samples, _ = detection_set(1)
    pieces = [{"true": [{"area": 100.0 + 9900 * (sample is samples[0])}]} for sample in samples]
    counts = [scoring.pictures_with_objects(samples, pieces, f"bbox_{key}") for key in ("ap", "ap50", "ap_large")]
    assert counts == [12, 12, 1]


def test_sums_of_answers_make_popes_numbers():
    answers = ["Yes.", "No.", "yes", "no, there is not", "Nothing", "NO.", "", "A dog. No cat.", "Yes", "I see none."]
    samples, entries = [], {}
    for number in range(60):
        label = ("yes", "no", "no")[number % 3]
        answer = [{"content": label.capitalize() + ".", "boxes": [], "masks": []}]
        samples.append(made_sample(number, [], task="vqa", image_id=str(number // 4)) | {"answers": answer})
        if number != 7:
            entries[samples[-1]["id"]] = {"text": answers[number * 7 % 11 % 10]}
    result = scoring.Scorer({"pope": None}).score(samples, entries)
    assert_sums_make_the_numbers(result, "pope")
    shares = {key for key, value in result.metrics["pope"].items() if isinstance(value, float)}
    assert shares == set(result.intervals["pope"]) and len(shares) == 10


@pytest.mark.slow  # METEOR is
def test_ap50_of_grounded_captions_has_an_interval():
    samples, entries = noisy_set(2)
    for sample in samples:
        sample["answers"][0]["content"] = "<p>a cup</p><vis>" * len(sample["answers"][0]["boxes"]) or "nothing"
        entries[sample["id"]]["text"] = "a cup"
    result = scoring.Scorer({"grounded_caption": None}).score(samples, entries)
    low, high = result.intervals["grounded_caption"]["ap50"]
    assert low <= result.metrics["grounded_caption"]["ap50"] <= high and high - low > 0.05


def test_calibration_by_hand():
    samples = [made_sample(number, [(5, 5, 25, 30)]) for number in range(4)] + [made_sample(4, [], task="no_target")]
    right, wrong = (5, 5, 25, 30), (40, 5, 55, 30)
    boxes = [[right], [right], [wrong], [], [wrong]]
    scores = [[0.95], [0.55], [0.55], [], [0.25]]
    entries = {s["id"]: made_entry(s, b, p) for s, b, p in zip(samples, boxes, scores, strict=True)}
    found = scoring.Scorer({"box_accuracy": ["refer"]}).score(samples, entries).calibration
    # Bins 0.9-1: score .95, all right; 0.5-0.6: .55, half right; 0.2-0.3: .25, none right (there is no target).
    assert found["box"]["ece"] == pytest.approx(0.25 * 0.05 + 0.5 * 0.05 + 0.25 * 0.25)
    low, high = found["box"]["ece_interval"]
    assert 0 <= low < found["box"]["ece"] < high <= 1
    curve = found["box"]["precision_recall"]
    assert curve["threshold"] == [0.95, 0.55, 0.25]
    assert curve["precision"] == pytest.approx([1, 2 / 3, 2 / 4]) and curve["recall"] == pytest.approx(
        [1 / 4, 2 / 4, 2 / 4]
    )
    decided = found["no_target"]
    at = decided["threshold"].index(0.25)
    assert [decided["n_acc"][at], decided["n_acc"][at + 1]] == [0, 1]  # found from 0.25 on, none above
    assert [decided["t_acc"][0], decided["t_acc"][56], decided["t_acc"][96]] == [3 / 4, 1 / 4, 0]


def test_an_object_gets_a_target_that_no_surer_one_has():
    sample = made_sample(0, [(5, 5, 25, 30), (30, 5, 50, 30)], task="detect")
    entry = made_entry(sample, [(5, 5, 25, 30), (5, 5, 25, 29), (30, 5, 50, 30)], [0.3, 0.9, 0.6])
    found = scoring.Scorer({"generalized_boxes": None}).score([sample], {sample["id"]: entry})
    assert found.calibration["box"]["accuracy"] == pytest.approx(2 / 3)
    assert found.calibration["box"]["precision_recall"]["precision"] == pytest.approx([1, 1, 2 / 3])


def test_what_is_ignored_counts_for_neither_side():
    sample = made_sample(0, [(0, 0, 20, 20)], task="reasoning", ignore=rectangle(10, 0, 20, 20))
    entry = made_entry(sample, [(0, 0, 10, 20)])
    result = scoring.Scorer({"referring_iou": None}).score([sample], {sample["id"]: entry})
    assert result.metrics["referring_iou"]["ciou"] == 1


def test_only_the_answer_after_the_evidence_is_measured():
    answers = [{"content": "<p>the red cup</p><vis>: Two.", "boxes": [[1, 1, 9, 9]], "masks": [rectangle(1, 1, 9, 9)]}]
    sample = made_sample(0, [], task="grounded_vqa") | {"answers": answers}
    for text, value in (("the blue dog: Two.", 1), ("the red cup: Three.", 0), ("Two", 1)):
        entry = made_entry(sample, []) | {"text": text}
        result = scoring.Scorer({"vqa_accuracy": None}).score([sample], {sample["id"]: entry})
        assert result.metrics["vqa_accuracy"]["accuracy"] == value


def test_phrases_of_an_answer():
    content = "<p>Two cups</p><vis><vis> beside <p>a dog</p><vis> and <vis>."
    assert scoring.marked_phrases(content) == ["Two cups", "Two cups", "a dog", None]
    assert scoring.plain_text(content) == "Two cups beside a dog and ."


# ---- comparison ------------------------------------------------------------------------------------------------------


def test_comparison_of_two_runs(mini, tmp_path, no_pictures, capsys):
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
    same = scoring.paired_differences(*[reporting.read_run(a)[1]] * 2, "referring_iou")
    assert same["estimates"]["ciou"]["difference"] == 0 and same["estimates"]["ciou"]["p"] == 1 and not same["gained"]
    assert validate.main(["--compare", a, str(tmp_path / "nowhere")]) == 2
    other = json.loads(Path(a).read_text()) | {"split": "val"}
    Path(a).write_text(json.dumps(other))
    assert validate.main(["--compare", a, b]) == 2


def test_rounding_is_no_difference():
    samples, entries = noisy_set(3)
    result = scoring.Scorer({"box_accuracy": ["refer"]}).score(samples, entries)
    runs = []
    for noise in (0, 1e-7):
        columns = {name: row | {"value": row["value"] - noise} for name, row in result.columns["box_accuracy"].items()}
        known = {sample["id"]: sample for sample in samples if sample["id"] in columns}
        runs.append(
            {name: one | {"columns": {"box_accuracy": columns[name]}, "pieces": {}} for name, one in known.items()}
        )
    row = scoring.paired_differences(*runs, "box_accuracy")["estimates"]["miou"]
    assert (row["difference"], row["interval"], row["p"]) == (0, [0, 0], 1)


def test_ap_is_compared_on_the_same_pictures(tmp_path):
    samples, entries = detection_set(2)
    runs = []
    for seed, share in ((0, 0.6), (1, 1.0)):
        rng = np.random.default_rng(seed)
        kept = {
            name: entry | {"objects": [one for one in entry["objects"] if rng.random() < share]}
            for name, entry in entries.items()
        }
        result = scoring.Scorer({"coco_detection": None}).score(samples, kept)
        rows = {one["id"]: one | {"columns": {}} for one in samples}
        runs.append({name: row | {"pieces": {"coco_detection": result.pieces["coco_detection"][name]}}
                     for name, row in rows.items()} | {"result": result})  # fmt: skip
    results = [run.pop("result") for run in runs]
    found = json.loads(json.dumps(scoring.paired_differences(*runs, "coco_detection")))["estimates"]
    for key, row in found.items():
        assert [row["a"], row["b"]] == pytest.approx([one.metrics["coco_detection"][key] for one in results]), key
    assert found["bbox_ap"]["interval"][0] > 0 and found["bbox_ap"]["p"] < 0.05
    assert set(found) == set(scoring.DETECTION_ESTIMATES)


# ---- what people read ------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_this_folder_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "tiny-model").mkdir()
    monkeypatch.chdir(tmp_path / "tiny-model")
    assert reporting.checkpoint_name(".") == "tiny-model"
    assert reporting.checkpoint_name("owner/model") == "owner/model"


def test_cases_are_of_many_pictures():
    samples = [made_sample(number, [], image_id="a" if number < 5 else str(number)) for number in range(8)]
    order = [int(sample["id"].split("-")[0]) for sample in reporting.of_many_pictures(samples)]
    assert order == [0, 1, 5, 6, 7, 2, 3, 4]


def test_a_case_shows_both_sides_at_any_shape(tmp_path):
    for size in ((60, 40), (40, 900), (3000, 2)):
        Image.new("RGB", size, "teal").save(tmp_path / "picture.png")
        image = {"image": {"path": str(tmp_path / "picture.png"), "bytes": None}}
        sample = made_sample(0, [], boxes=[], masks=[], **image) | dict(zip(("width", "height"), size, strict=True))
        found = scoring.check_prediction(sample, {"objects": [{"box": [1, 0, 9, 2], "score": 0.5}]}, 0, set())
        cards = reporting.draw_case(sample, None, found, ", box IoU 0.00")
        assert [one.width for one in cards] == [reporting.CASE_CELL - reporting.SHEET_MARGIN] * 2
        assert max(one.height for one in cards) <= reporting.CASE_CELL, size


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
@pytest.mark.parametrize("task", [task for task in validate.load_templates()] + ["no_target", "dialogue"])
def test_every_task_of_the_scenes(task, eager_model_dir, tmp_path, no_pictures):
    arguments = ["--benchmark", f"scenes_{task}", "--seed", 1_000_777, "--limit", 4, "--max_new_tokens", 4]
    summary = run("--model", eager_model_dir, "--device", "cpu", *arguments, "--output", tmp_path)
    assert summary["n"] == 4 and summary["split"] == "test"
    assert set(summary["metrics"]) == set(validate.find_benchmark(f"scenes_{task}")["metrics"])


@pytest.mark.slow
def test_the_scenes_bench_is_broken_down_with_what_needs_no_model_beside_it(eager_model_dir, tmp_path):
    arguments = ["--benchmark", "scenes_bench_1", "--limit", 20, "--max_new_tokens", 4, "--output", tmp_path]
    summary = run("--model", eager_model_dir, "--device", "cpu", *arguments)
    kinds = summary["breakdown"]["kind"]
    assert sum(row["n"] for row in kinds.values()) == 18 and summary["n_of_metric"]["generalized_referring"] == 20
    assert sum(row["n"] for row in summary["breakdown"]["side"].values()) == 18
    assert set(summary["grey_picture"]["metrics"]) == set(summary["metrics"])
    assert {"random_of_class", "largest"} <= set(summary["without a model, acc@0.5"])
