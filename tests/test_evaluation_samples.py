"""What a benchmark asks: definitions, files of a user's own folder, samples."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from metric_inputs import mini_arguments, perfect, samples_of
from perceptiongpt import validate
from perceptiongpt.data.templates import load_templates
from perceptiongpt.evaluation import reporting
from perceptiongpt.evaluation.benchmarks import find_benchmark, read_benchmarks
from perceptiongpt.evaluation.coco_folder import find_coco_files, find_coco_images
from perceptiongpt.evaluation.measures import MEASURES
from perceptiongpt.evaluation.predictions import references
from perceptiongpt.evaluation.results import Scorer
from perceptiongpt.evaluation.samples import read_sample_image
from perceptiongpt.geometry_perceptiongpt import decode_mask
from perceptiongpt.inference import InputError


IMAGES = "coco128/train2017"


@pytest.fixture
def mini(data_dir) -> list[str]:
    return mini_arguments(data_dir)


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def test_every_benchmark_names_what_exists():
    known = read_benchmarks()
    expected = (
        "refcoco refcoco+ refcocog grefcoco reasonseg flickr30k_spotting coco_multi_instance coco refcocog_regions "
        "visual_genome_regions coco_captions flickr30k_captions vqav2 okvqa pope scenes_bench_1"
    )
    tasks = set(load_templates()) | {"no_target", "dialogue"}
    assert set(expected.split()) <= set(known) and {f"scenes_{task}" for task in tasks} <= set(known)
    for name, benchmark in known.items():
        assert set(benchmark.tasks) <= tasks and benchmark.splits[0], name
        module, key = benchmark.headline.split("/")
        assert module in benchmark.metrics, name
        assert key in MEASURES[module].estimates and MEASURES[module].hit, name
    assert "coco_detection" in known["scenes_detect"].metrics
    assert "attributes_right" in known["scenes_region_caption"].metrics


def test_errors_of_a_benchmark_are_said(tmp_path, capsys):
    cases = {
        "a: {source: refer, metrics: [box_accuracy], split: [val]}": "unknown key 'split'; did you mean splits",
        "a: {source: nowhere, metrics: [box_accuracy]}": "'nowhere' is none of",
        "a: {source: refer, metrics: [accuracy]}": "the metric 'accuracy'",
        "a: {source: refer, metrics: [box_accuracy], headline: iou/x}": "the metric 'iou'",
        "a: {source: refer}": "needs a source and metrics",
        "[1, 2]": "benchmarks by name",
        "a: {": "cannot be read as YAML",
        "{a: {source: refer, metrics: [pope]}, b: {source: refer, metrics: [pope]}}": "holds 2 benchmarks",
    }
    for text, message in cases.items():
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            find_benchmark(str(tmp_path / "own.yaml"))
    with pytest.raises(InputError, match="did you mean .*refcoco"):
        find_benchmark("refcocoo")
    assert validate.main(["--benchmark", "refcoco", "--predictions", "x", "--data", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert validate.main(["--benchmark", "refcoco", "--predictions", "x", "--data", str(tmp_path)]) == 2
    assert "refcoco/refs" in capsys.readouterr().err


# ---- a user's own COCO folder ----------------------------------------------------------------------------------------


class OwnFolders:
    """Makes folders with one image of coco128 and its instances files."""

    def __init__(self, parent: Path, data_dir: Path):
        instances = json.loads((data_dir / "coco128" / "instances_train2017.json").read_text())
        image = instances["images"][0]
        self.parent, self.photo = parent, data_dir / IMAGES / image["file_name"]
        self.content = instances | {"images": [image]}
        self.content["annotations"] = [one for one in instances["annotations"] if one["image_id"] == image["id"]]

    def make(self, name: str, images: str, *files: str) -> Path:
        root = self.parent / name
        (root / images).mkdir(parents=True, exist_ok=True)
        shutil.copy(self.photo, root / images)
        for file in files:
            (root / file).parent.mkdir(exist_ok=True, parents=True)
            content = json.dumps(self.content).encode()
            (root / file).write_bytes(gzip.compress(content) if file.endswith(".gzip") else content)
        return root


@pytest.fixture
def folders(tmp_path, data_dir) -> OwnFolders:
    return OwnFolders(tmp_path, data_dir)


def test_a_folder_of_any_arrangement(folders, tmp_path):
    for root in (
        folders.make("a", "photos", "labels.json"),
        folders.make("b", "", "annotations/instances_val.json"),
        folders.make("packed", "photos", "annotations/instances_val2017.json.gzip"),
    ):
        samples = samples_of("--benchmark", "coco", "--data", root)
        assert {sample["image_id"] for sample in samples} == {str(folders.content["images"][0]["id"])}
    root = folders.make("b", "", "annotations/instances_train.json")
    assert {one["split"] for one in samples_of("--benchmark", "coco", "--data", root)} == {"val"}
    assert {one["split"] for one in samples_of("--benchmark", "coco", "--data", root, "--split", "train")} == {"train"}
    choice = "choose one of annotations/instances_train.json, annotations/instances_val.json"
    with pytest.raises(InputError, match=choice):
        samples_of("--benchmark", "coco", "--data", root, "--split", "minival")

    content = json.loads(json.dumps(folders.content))
    for number, bad_name in enumerate(("x" * 300, "../a.jpg", "/a.jpg"), 10**9):
        content["images"].append({"id": number, "file_name": bad_name, "width": 4, "height": 4})
    (tmp_path / "own.json").write_text(json.dumps(content))
    assert find_coco_images(root, tmp_path / "own.json") == str(root)
    (root / folders.photo.name).unlink()
    with pytest.raises(InputError, match="is there; give --images"):
        samples_of("--benchmark", "coco", "--data", root, "--split", "val")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no COCO instances file"):
        samples_of("--benchmark", "coco", "--data", tmp_path / "none")


def test_a_folder_per_split_beside_other_json_files(folders):
    for split in ("train", "valid"):
        root = folders.make("c", split, f"{split}/_annotations.coco.json")
    (root / "data.json").write_text("{not json")
    (root / "valid" / "info.json").write_text("[]")
    for given, split, folder in ((None, "val", "valid"), ("train", "train", "train")):
        assert find_coco_files(root, [given] if given else ["val", "test", "train"]) == {
            "annotations": [str(root / folder / "_annotations.coco.json")],
            "images": str(root / folder),
            "split": split,
        }
    assert samples_of("--benchmark", "coco", "--data", root)


def test_images_of_a_folder_may_be_elsewhere_or_nowhere(folders):
    elsewhere = folders.make("photos", "")
    root = folders.make("labels", "images", "instances_val.json")
    shutil.rmtree(root / "images")
    samples = samples_of("--benchmark", "coco", "--data", root, "--images", elsewhere)
    assert {Path(sample["image"]["path"]).parent for sample in samples} == {elsewhere}
    samples = samples_of("--benchmark", "coco", "--data", root, "--no_images")
    assert samples and all(sample["image"] is None for sample in samples)


def test_annotations_alone_tell_their_split(folders):
    root = folders.make("d", "photos", "annotations/instances_val2017.json", "labels.json")
    named = ["--benchmark", "coco", "--annotations", root / "annotations" / "instances_val2017.json"]
    assert {one["split"] for one in samples_of(*named, "--images", root / "photos")} == {"val"}
    assert {one["split"] for one in samples_of(*named, "--data", root)} == {"val"}
    other = ["--benchmark", "coco", "--annotations", root / "labels.json", "--data", root]
    assert {one["split"] for one in samples_of(*other)} == {"all"}
    assert {one["split"] for one in samples_of(*other, "--split", "mine")} == {"mine"}


def test_files_of_the_same_split_are_not_chosen_between(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "write_cases", lambda *args: None)
    monkeypatch.setattr(reporting, "plot_calibration", lambda *args: None)
    root = folders.make("e", "photos", "first/instances_val.json", "second/instances_val.json")
    with pytest.raises(InputError, match="choose one of first/instances_val.json, second/instances_val.json"):
        samples_of("--benchmark", "coco", "--data", root)
    file = str(root / "second" / "instances_val.json")
    arguments = ["--benchmark", "coco", "--data", str(root), "--annotations", file, "--limit", "1"]
    samples = samples_of(*arguments)
    (tmp_path / "given").write_text(json.dumps(perfect(samples[0])))
    arguments += ["--predictions", str(tmp_path / "given"), "--output", str(tmp_path / "out"), "--no_intervals"]
    assert validate.main(arguments) == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["annotations"] == [file]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["data"]["annotations"] == [file]
    assert file in (tmp_path / "out" / "summary.md").read_text()


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_samples_of_expressions_and_of_regions(mini, data_dir):
    samples = samples_of(*mini)
    assert len(samples) == len({sample["id"] for sample in samples}) == 8
    assert {sample["prompt"] for sample in samples} >= {"Find zebra in the middle."}
    assert all(sample["messages"][0]["content"] == f"<image>{sample['prompt']}" for sample in samples)
    assert [sample["id"] for sample in samples_of(*mini, "--limit", 3)] == [sample["id"] for sample in samples[:3]]

    folders = ["--data", data_dir / "refcoco_mini", "--images", data_dir / IMAGES]
    regions = samples_of("--benchmark", "refcocog_regions", "--split", "val", *folders)
    assert [len(sample["answers"]) for sample in regions] == [2, 2]  # one sample per region, a reference per sentence
    assert all(len(sample["boxes"]) == 1 and not references(sample) for sample in regions)


def test_samples_of_questions_keep_all_ten_answers(data_dir):
    files = [data_dir / "vqav2" / f"in_stock_{part}.json" for part in ("questions", "annotations")]
    questions = json.loads(files[0].read_text())["questions"]
    samples = samples_of("--benchmark", "vqav2", "--data", data_dir, "--no_images", "--annotations", *files)
    assert len(samples) == len(questions) and all(len(sample["human_answers"]) == 10 for sample in samples)
    entries = {sample["id"]: {"text": sample["human_answers"][0]} for sample in samples}
    result = Scorer({"vqa_accuracy": None}).score(samples, entries)
    assert 0.3 < result.metrics["vqa_accuracy"]["accuracy"] <= 1 and not result.missing


def test_grounded_captions_are_compared_with_all_five(data_dir):
    folder = data_dir / "flickr30k_entities"
    names = sorted(path.stem for path in (folder / "Annotations").glob("*.xml"))
    files = [folder / "Annotations", folder / "Sentences"]
    arguments = ["--benchmark", "flickr30k_spotting", "--data", folder, "--annotations", *files, "--split"]
    found = [
        name for name in ("val", "train", "test") if set((folder / f"{name}.txt").read_text().split()) & set(names)
    ]
    sample, *_ = samples = samples_of(*arguments, found[0], "--limit", 3)
    assert all(1 < len(sample["answers"]) <= 5 for sample in samples)
    boxes = [tuple(one["box"]) for one in references(sample)]
    assert len(boxes) == len(set(boxes)) > 1
    prediction = Scorer({"grounded_caption": None}).check(sample, perfect(sample))
    given = MEASURES["grounded_caption"].inputs(sample, prediction)
    assert len(given["references"]["caption"]) == len(sample["answers"])
    assert given["predictions"]["masks"] == given["references"]["masks"]  # boxes, as rectangles, on both sides


def test_a_dialogue_is_asked_up_to_its_last_turn():
    (sample,) = samples_of("--benchmark", "scenes_dialogue", "--seed", 1_000_123, "--limit", 1)
    assert [message["role"] for message in sample["messages"]][-1] == "user" and len(sample["messages"]) >= 3
    slots = sum(message["content"].count("<vis>") for message in sample["messages"])
    assert len(sample["boxes"]) == len(sample["masks"]) == slots
    assert read_sample_image(sample).size == (sample["width"], sample["height"])


@pytest.mark.parametrize("seed, split", [(1_000_123, "test"), (5, "val")])
def test_every_seed_draws_other_scenes(seed, split):
    arguments = ["--benchmark", "scenes_refer", "--limit", 2, "--seed"]
    samples = samples_of(*arguments, seed)
    assert {sample["split"] for sample in samples} == {split}
    others = samples_of(*arguments, seed + 1)
    assert [sample["image"]["bytes"] for sample in samples] != [sample["image"]["bytes"] for sample in others]


def test_a_benchmark_may_have_prompts_of_its_own(mini, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(
        "a: {source: refer, arguments: {dataset: refcoco}, tasks: [refer], metrics: [box_accuracy], "
        "prompt: {refer: 'Where is {phrase}?'}}"
    )
    sample, *_ = samples_of(*mini, "--benchmark", own)
    assert sample["prompt"] == "Where is zebra in the middle?"
    assert sample["messages"][0]["content"] == "<image>Where is zebra in the middle?"


def test_samples_are_listed_for_other_models(mini, tmp_path, capsys):
    assert validate.main(["--list_samples", *mini]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    samples = samples_of(*mini)
    assert [(line["id"], line["prompt"]) for line in lines] == [(one["id"], one["prompt"]) for one in samples]
    assert all(Path(line["image"]).is_file() and "messages" not in line for line in lines)
    assert not (tmp_path / "images").exists()

    drawn = ["--list_samples", "--benchmark", "scenes_dialogue", "--limit", "2", "--output", str(tmp_path)]
    assert validate.main(drawn) == 0
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert Path(line["image"]) == tmp_path / "images" / f"{line['id']}.png" and Path(line["image"]).is_file()
        assert [message["role"] for message in line["messages"][:2]] == ["user", "assistant"]


@pytest.mark.parametrize("task", ["point", "point_all"])
def test_points_are_compared_with_masks(task):
    samples = samples_of("--benchmark", f"scenes_{task}", "--limit", 3)
    entries = {sample["id"]: perfect(sample) for sample in samples}  # the deepest pixel of each object
    assert all(one["point"] for sample in samples for one in references(sample))
    scorer = Scorer(find_benchmark(f"scenes_{task}").metrics)
    right = scorer.score(samples, entries)
    assert right.metrics["point_accuracy"]["points_in_mask"] == 1 == right.calibration["point"]["accuracy"]
    for entry in entries.values():
        entry["objects"][0]["point"] = [-5.0, 3.0]
    wrong = scorer.score(samples, entries)
    assert wrong.metrics["point_accuracy"]["points_in_mask"] < 1 > wrong.calibration["point"]["accuracy"]
    for entry in entries.values():
        del entry["objects"][0]["point"]
    assert scorer.score(samples, entries).missing == {"object without point": 3}


def test_a_click_of_the_prompt_is_kept(data_dir):
    clicks = samples_of("--benchmark", "scenes_point_to_mask", "--limit", 1)
    clicks += samples_of("--benchmark", "coco_point_to_mask", "--data", data_dir / "coco128", "--limit", 1)
    for sample in clicks:
        ((x, y),) = sample["points"]
        (target,) = references(sample)
        assert decode_mask(target["mask"], sample["height"], sample["width"])[int(y), int(x)]
        result = Scorer({"referring_iou": None}).score([sample], {sample["id"]: perfect(sample)})
        assert result.metrics["referring_iou"]["ciou"] == 1
