"""Publishing: the stage, its check, the card, adapters, and the upload to a Hub on the loopback interface.

Clients of the Hub are unmodified and run as processes of their own; those that load what was published cannot import
the package.
"""

import importlib.metadata
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, SpaceCard, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image
from safetensors.torch import load_file, save_file

from backbones import TINY_SIGNALS
from hub_server import Fault, File, Hub, Repository, client_environment, serve
from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor, PerceptionPipeline
from perceptiongpt.inference import checkpoint_hash
from perceptiongpt.publish import main as publish_main
from perceptiongpt.publishing import adapters
from perceptiongpt.publishing.card import (
    Facts,
    checked_card,
    eval_result_files,
    read_evaluation,
    without_absolute_paths,
    without_paths,
    write_card,
)
from perceptiongpt.publishing.examples import answer_in_fresh_process, keep_example
from perceptiongpt.publishing.publication import Publication, add_given_card, publish, run_publication
from perceptiongpt.publishing.space import space_card, stage_space
from perceptiongpt.publishing.stage import PublishError, Stage, stage_checkpoint
from perceptiongpt.webapp.page import EXAMPLES


ROOT = Path(__file__).parents[1]
USERS = {
    "token-ann": {"name": "ann", "orgs": ["lab"], "role": "write"},
    "token-read": {"name": "ann", "orgs": [], "role": "read"},
    "token-bob": {"name": "bob", "orgs": [], "role": "write"},
}
# A process that publishes folders: a line of JSON in, a line of JSON out. Starting one takes seconds.
UPLOADER = """
import json, sys
from pathlib import Path
from perceptiongpt.publishing.stage import PublishError
from perceptiongpt.publishing.upload import find_target, upload

for line in sys.stdin:
    asked = json.loads(line)
    try:
        target = find_target(asked["repo"], asked["token"], asked["replace"])
        commit, kept = upload(target, Path(asked["folder"]), message="Publish", private=None, tag=asked["tag"])
        answer = {"commit": commit, "kept": kept, "repo": target.repo_id}
    except PublishError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""
# What a stranger runs: the package is hidden, so only what was published is there.
STRANGER = """
import importlib.abc, json, sys

class HiddenPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perceptiongpt":
            raise ModuleNotFoundError("hidden")

sys.meta_path.insert(0, HiddenPackage())
"""


@pytest.fixture(scope="module")
def hub():
    with serve(Hub(USERS)) as served:
        yield served
        assert served.unknown == [] and served.leaked == []


@pytest.fixture(autouse=True)
def no_faults_left(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").faults.clear()


class Uploader:
    """One `UPLOADER` process."""

    def __init__(self, hub: Hub, home: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-c", UPLOADER],
            env=client_environment(hub, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, folder, repo: str, token: str | None = "token-ann", tag=None, replace=False) -> None:
        asked = {"folder": str(folder), "repo": repo, "token": token, "tag": tag, "replace": replace}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()

    def __call__(self, *args, **kwargs) -> dict:
        self.start(*args, **kwargs)
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def upload(hub, tmp_path_factory):
    """`upload(folder, repo, token, tag, replace)` -> {"commit", "kept", "repo"} or {"error"}."""
    uploader = Uploader(hub, tmp_path_factory.mktemp("uploader"))
    yield uploader
    uploader.kill()


@pytest.fixture
def stage_folder(tmp_path) -> Path:
    """A folder that looks like a stage to the upload: two large files, small ones, and a card."""
    folder = tmp_path / "stage"
    (folder / "images").mkdir(parents=True)
    generator = torch.Generator().manual_seed(int.from_bytes(str(tmp_path).encode()[-4:], "big"))
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({name[:11]: torch.randn(100_000, generator=generator)}, folder / name)
    (folder / "config.json").write_text('{"model_type": "perceptiongpt"}')
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A model\n")
    (folder / "images/answers.jpg").write_bytes(b"\xff\xd8 a picture")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(hub: Hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    files = hub.model(repo).files(revision)
    files.pop(".gitattributes", None)
    return files


# ---- upload ----------------------------------------------------------------------------------------------------------


def test_one_commit_with_a_tag(hub, upload, stage_folder):
    done = upload(stage_folder, "ann/one", tag="v1")
    repository = hub.model("ann/one")
    assert published(hub, "ann/one") == contents(stage_folder)
    assert repository.history() == ["Publish", "initial commit"]
    assert repository.tags == {"v1": done["commit"]} == {"v1": repository.branches["main"]}
    # The same once more changes nothing, with or without the tag.
    assert upload(stage_folder, "ann/one", tag="v1")["commit"] == done["commit"]
    assert repository.history() == ["Publish", "initial commit"]
    # The tag of another revision is not moved, and nothing is sent.
    (stage_folder / "config.json").write_text('{"model_type": "perceptiongpt", "dtype": "float32"}')
    refused = upload(stage_folder, "ann/one", tag="v1")
    assert "the tag v1 marks another revision of ann/one (config.json is another)" in refused["error"]
    assert repository.history() == ["Publish", "initial commit"]
    second = upload(stage_folder, "ann/one", tag="v2")
    assert repository.tags == {"v1": done["commit"], "v2": second["commit"]}
    assert published(hub, "ann/one", "v1") != published(hub, "ann/one", "v2") == contents(stage_folder)


def test_what_an_earlier_publication_left_goes_and_foreign_files_stay(hub, upload, stage_folder):
    upload(stage_folder, "own")
    (stage_folder / "notes.txt").write_text("mine")
    upload(stage_folder, "own")
    (stage_folder / "notes.txt").unlink()
    for path in stage_folder.glob("model-*"):
        path.unlink()
    save_file({"all": torch.zeros(10)}, stage_folder / "model.safetensors")
    done = upload(stage_folder, "own")
    assert done["kept"] == ["notes.txt"] and done["repo"] == "ann/own"
    assert published(hub, "ann/own") == contents(stage_folder) | {"notes.txt": b"mine"}
    assert hub.model("ann/own").history() == ["Publish"] * 3 + ["initial commit"]


def test_large_files_in_parts(hub, upload, stage_folder):
    hub.chunk_size = 150_000
    try:
        upload(stage_folder, "ann/parts")
    finally:
        hub.chunk_size = None
    assert published(hub, "ann/parts") == contents(stage_folder)
    assert sum(bool(re.search(r"PUT /lfs/\w+/\d+$", request)) for request in hub.requests) == 6


def model(hub: Hub, repo: str, files: dict[str, bytes], private: bool = False) -> None:
    hub.repositories["models", repo] = Repository(repo, private)
    hub.model(repo).commit("main", "theirs", {path: File(content, False) for path, content in files.items()})


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("ann/refused", None, "there is no access token: log in with `hf auth login`, or set HF_TOKEN"),
        ("ann/refused", "token-wrong", "the access token was refused .*make a new one at https://"),
        ("ann/refused", "token-read", "the access token of ann can only read: make one with write access"),
        ("bob/refused", "token-ann", "ann has no right to publish under 'bob': .* begins with one of ann, lab"),
        ("bob/model", "token-ann", "the name is taken: bob/model exists, and ann may not write to it"),
        ("bob/private", "token-ann", "ann has no right to publish under 'bob'"),
        ("ann/llama", "token-ann", "the name is taken: ann/llama holds a model of the type 'llama'; .*--replace"),
        ("ann/weights", "token-ann", "the name is taken: ann/weights holds other weights .model.gguf.; .*--replace"),
        ("ann/adapter-there", "token-ann", "the name is taken: ann/adapter-there holds an adapter; choose another"),
        ("ann/two/names", "token-ann", "'ann/two/names' cannot be the name of a repository"),
        ("ann/..", "token-ann", "cannot be the name of a repository"),
    ],
)
def test_refused_before_anything_is_sent(hub, upload, stage_folder, repo, token, message):
    model(hub, "bob/model", {"config.json": b"{}"})
    model(hub, "bob/private", {"config.json": b"{}"}, private=True)
    model(hub, "ann/llama", {"config.json": b'{"model_type": "llama"}'})
    model(hub, "ann/weights", {"model.gguf": b"GGUF"})
    model(hub, "ann/adapter-there", {"adapter_config.json": b"{}", "adapter_model.safetensors": b""})
    before, requests = set(hub.repositories), len(hub.requests)
    answer = upload(stage_folder, repo, token)
    assert re.search(message, answer["error"]) and "\n" not in answer["error"]
    assert set(hub.repositories) == before
    assert not [request for request in hub.requests[requests:] if not request.startswith(("GET", "HEAD"))]


def test_replacing_another_model_when_told_so(hub, upload, stage_folder):
    model(hub, "ann/other", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"old"})
    assert upload(stage_folder, "ann/other", replace=True).get("kept") == []
    assert published(hub, "ann/other") == contents(stage_folder)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault("POST /api/repos/create", 409, "You already created it"),
            "the name is taken: .*cannot read",
        ),
        (Fault("POST /api/repos/create", 403, "no rights"), "ann has no right to create .*no rights"),
        (Fault("POST .*/preupload/", 401, "expired"), "the access token was refused .expired.* Nothing was published"),
        (
            Fault("POST .*/objects/batch", 403, "storage is full"),
            "no right to write .*storage is full.*main is as",
        ),
        (Fault("POST .*/commit/", 412, "A commit has happened since"), "changed by another upload meanwhile"),
        (Fault("POST .*/commit/", 403, "no write access"), "no right to write .*Nothing was published"),
        (
            Fault("POST .*/commit/", after_bytes=200),
            "connection .* was lost .*all files or none.*same command",
        ),
        (Fault("POST .*/tag/", 403, "tags are protected"), "main is published as .*; the tag is missing"),
        (Fault("GET /api/whoami"), "connection to .* was lost"),
    ],
)
def test_refused_or_cut_off_on_the_way(hub, upload, stage_folder, tmp_path, fault, message):
    repo = f"ann/{tmp_path.name}"
    hub.faults.append(fault)
    answer = upload(stage_folder, repo, tag="v1")
    assert fault.times == 0 and re.search(message, answer["error"]) and "\n" not in answer["error"]
    if ("models", repo) in hub.repositories and "tag" not in fault.path:
        assert published(hub, repo) == {}  # nothing of it
    # The same command again succeeds.
    assert upload(stage_folder, repo, tag="v1")["commit"] == hub.model(repo).tags["v1"]
    assert published(hub, repo) == contents(stage_folder)


def test_a_connection_that_is_cut_once_is_tried_again(hub, upload, stage_folder):
    fault = Fault("PUT /lfs/", after_bytes=1000)
    hub.faults.append(fault)
    assert "commit" in upload(stage_folder, "ann/cut")
    assert fault.reached.is_set() and published(hub, "ann/cut") == contents(stage_folder)


def test_an_upload_that_was_killed_half_way_continues(hub, stage_folder, tmp_path):
    first = Uploader(hub, tmp_path / "first")
    files = [path for path in stage_folder.rglob("*") if path.suffix in (".safetensors", ".jpg")]
    sizes = {checkpoint_sha(path): path.stat().st_size for path in files}
    # Files go in parallel: one is held in the middle until all others have arrived.
    held = next(oid for oid, size in sizes.items() if size > 1000)
    fault = Fault(f"PUT /lfs/{held}", after_bytes=1000, hold=True)
    hub.faults.append(fault)
    first.start(stage_folder, "ann/killed", tag="v1")
    assert fault.reached.wait(60)
    others = [oid for oid in sizes if oid != held]
    for _ in range(200):
        if all(oid in hub.objects for oid in others):
            break
        fault.released.wait(0.05)
    first.kill()
    fault.released.set()
    assert published(hub, "ann/killed") == {} and hub.model("ann/killed").tags == {}
    second = Uploader(hub, tmp_path / "second")
    done = second(stage_folder, "ann/killed", tag="v1")
    second.kill()
    assert published(hub, "ann/killed") == contents(stage_folder) == published(hub, "ann/killed", "v1")
    assert hub.model("ann/killed").history() == ["Publish", "initial commit"] and done["kept"] == []
    # What had arrived was not sent again.
    assert {oid: hub.received[oid] for oid in sizes} == sizes


def checkpoint_sha(path: Path) -> str:
    from perceptiongpt.publishing.upload import file_hash

    return file_hash(path, git_blob=False)


@pytest.mark.slow  # the client waits longer and longer before it gives up
def test_a_network_that_stays_away(hub, upload, stage_folder):
    hub.faults.append(Fault("PUT /lfs/", after_bytes=100, times=100))
    answer = upload(stage_folder, "ann/away")
    assert re.search("connection .* was lost .* Nothing was published: main is as it was. Give", answer["error"])
    assert published(hub, "ann/away") == {}
    hub.faults.clear()
    assert "commit" in upload(stage_folder, "ann/away") and published(hub, "ann/away") == contents(stage_folder)


# ---- stage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def output(tiny_model_dir, tmp_path) -> Path:
    """A copy of a tiny checkpoint with what train.py leaves beside one."""
    folder = tmp_path / "output"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2/optimizer.pt").write_bytes(b"state")
    (folder / "adapter").mkdir()
    for name in ("README.md", "optimizer.pt", "mine.txt", ".env"):
        (folder / name).write_text("SECRET=1")
    (folder / "trainer_state.json").write_text('{"global_step": 7}')
    recipe = {
        "model": {"checkpoint": None, "vision": "openai/clip-tiny", "text": str(tmp_path), "llava": None},
        "adapter": {"mode": "lora", "rank": 2},
        "data": {"train": [{"source": "coco", "annotations": "/home/ann/private/a.json"}]},
        "training": {"seed": 3, "hub_token": "hf_secret"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_the_stage_holds_what_belongs_on_the_hub_and_nothing_else(output, tmp_path):
    stage = stage_checkpoint(output, tmp_path / "stage")
    names = {name for name, _ in stage.files()}
    code = {path.name for path in ROOT.glob("*_perceptiongpt.py")}
    expected = {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"}
    assert names == code | expected | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert all((stage.folder / name).read_bytes() == (output / name).read_bytes() for name in names)
    assert set(stage.left_out) == {path.name for path in output.iterdir()} - names
    assert stage.left_out["checkpoint-2"] == "state to resume training from"
    assert "not published:" in stage.table() and "SECRET" not in stage.table()


def test_shards_are_staged_with_their_index(tiny_model, tmp_path):
    for part, options in zip(tiny_model, ({"max_shard_size": "200KB"}, {}), strict=True):
        part.save_pretrained(tmp_path / "model", **options)
    stage = stage_checkpoint(tmp_path / "model", tmp_path / "stage")
    weights = {name for name, _ in stage.files() if name.startswith("model")} - {"modeling_perceptiongpt.py"}
    assert weights == {path.name for path in (tmp_path / "model").glob("model*safetensors*")} and len(weights) > 2
    next((tmp_path / "model").glob("model-00002-*")).unlink()
    with pytest.raises(PublishError, match="names shards that are missing: model-00002"):
        stage_checkpoint(tmp_path / "model", tmp_path / "again")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds checkpoint-2 but no final model: .*--resume"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llava"}'), "type 'llava', expected"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "perceptiongpt"}'), "has no auto_map"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "chat_template.jinja").unlink(), "has no chat_template.jinja"),
        (lambda folder: (folder / "processor_config.json").unlink(), "processor_config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: cut_off(folder / "model.safetensors"), "damaged or was cut off"),
        (lambda folder: (folder / "modeling_perceptiongpt.py").unlink(), "has no modeling_perceptiongpt.py"),
        (lambda folder: (folder / "geometry_perceptiongpt.py").unlink(), "imports a file that is missing"),
    ],
)
def test_folders_that_are_no_whole_checkpoint(output, tmp_path, spoil, message):
    spoil(output)
    with pytest.raises(PublishError, match=message) as raised:
        stage_checkpoint(output, tmp_path / "stage")
    assert "\n" not in str(raised.value)


def test_other_folders_that_are_refused(output, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(PublishError, match="is an adapter: .*--adapter_only"):
        stage_checkpoint(tmp_path / "adapter", tmp_path / "stage")
    with pytest.raises(PublishError, match="it has no config.json"):
        stage_checkpoint(tmp_path, tmp_path / "stage")
    with pytest.raises(PublishError, match="is not empty"):
        stage_checkpoint(output, tmp_path)
    with pytest.raises(PublishError, match="--image and --text go together"):
        publish(output, Publication("ann/x", dry_run=True, text="Find it."), print)


@pytest.mark.slow
def test_a_stage_that_needs_the_package_is_not_published(output, tmp_path):
    path = output / "modeling_perceptiongpt.py"
    path.write_text(path.read_text() + "\ntry:\n    import perceptiongpt\nfinally:\n    pass\n")
    stage = stage_checkpoint(output, tmp_path / "stage")
    (tmp_path / "work").mkdir()
    example = keep_example(Image.new("RGB", (20, 10)), "Find it.", tmp_path, 0)
    with pytest.raises(PublishError, match="does not load and answer by itself: .*the package is hidden") as raised:
        answer_in_fresh_process(stage.folder, [example], tmp_path / "work")
    assert "\n" not in str(raised.value)


# ---- card ------------------------------------------------------------------------------------------------------------


def write_evaluation(folder: Path, model: Path, dataset: str = "local/scenes_refer", value: float = 0.25) -> Path:
    """The files of validate.py that a card is made from."""
    benchmark = dataset.split("/")[-1]
    (folder / ".eval_results").mkdir(parents=True)
    command = f"validate.py --model {model} --benchmark {benchmark} --data /home/ann/data/refer"
    summary = {
        "benchmark": benchmark,
        "checkpoint": str(model),
        "checkpoint_sha256": checkpoint_hash(model),
        "command": command,
        "split": "testA",
        "n": 12,
        "decoding": "free-running, greedy",
        "note": "a note of the benchmark",
        "not_measured": {"caption_scores": "no references"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    result = EvalResult(
        task_type="image-text-to-text", dataset_type=dataset, dataset_name=benchmark, dataset_split="testA",
        metric_type="box_accuracy", metric_value=value, metric_name="box_accuracy, acc@0.5",
        metric_args={"interval_95": [0.1, 0.5], "n": 12, "command": command},
    )  # fmt: skip
    index = {"model-index": eval_results_to_model_index("output", [result])}
    (folder / "model_index.yaml").write_text(yaml.safe_dump(index))
    entry = EvalResultEntry(dataset, f"{benchmark}_testA", value, notes=f"seed 0; {command}")
    (folder / f".eval_results/{benchmark}_testA.yaml").write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry])))
    return folder


def test_the_card_says_what_is_known_and_what_is_not(output, tmp_path):
    folders = [
        write_evaluation(tmp_path / "scores", output, "lmms-lab/refcoco", 0.625),
        write_evaluation(tmp_path / "scenes", output),
    ]
    facts = Facts("apache-2.0", ["en"], ["ann/photos"], {"coco": "CC BY 4.0"})
    content = write_card(
        "ann/tiny",
        json.loads((output / "config.json").read_text()),
        yaml.safe_load((output / "recipe.yaml").read_text()),
        [read_evaluation(folder, output, "ann/tiny") for folder in folders],
        facts,
        parameters=219_220,
        steps=7,
        picture="images/answers.jpg",
        about_picture="Answers about drawn scenes.",
        prompts=['Find the "red" cup.'],
    )
    card = ModelCard(content)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text"
    assert data["license"] == "apache-2.0" and data["language"] == ["en"] and "custom_code" in data["tags"]
    assert data["base_model"] == "openai/clip-tiny" and data["datasets"] == ["ann/photos"]
    assert data["metrics"] == ["box_accuracy"]
    found = {(one.dataset_type, one.metric_value, one.dataset_split) for one in card.data.eval_results}
    assert found == {("lmms-lab/refcoco", 0.625, "testA"), ("scenes_refer", 0.25, "testA")}
    assert data["model-index"][0]["name"] == "tiny"
    for text in (
        "| refcoco | testA | box_accuracy, acc@0.5 | 0.6250 | 0.1000 to 0.5000 | 12 |",
        "- scenes_refer, caption_scores: no references.",
        "a note of the benchmark",
        "![What this checkpoint answers](images/answers.jpg)",
        'model="ann/tiny", trust_remote_code=True',
        r'"Find the \"red\" cup."',
        "7 optimizer steps.",
        "Adapter mode `lora` of rank 2.",
        "It has 0.2 million parameters",
        "- Data `coco`: CC BY 4.0.",
        "- Data `ann/photos`: licence not stated by the author.",
        "- These weights: apache-2.0.",
        "Bias, safety",
    ):
        assert text in content, text
    not_measured = content.split("### Not measured")[1].split("## Training")[0]
    listed = re.findall(r"[\w+]+", " ".join(re.findall(r"Benchmarks \(\w+\): (.*)\.", not_measured)))
    assert {"refcoco+", "coco", "pope"} < set(listed) and not {"refcoco", "scenes_refer"} & set(listed)
    assert not re.search(r"home|private/|hf_secret|hub_token", content) and str(tmp_path) not in content


def test_a_card_without_evaluations_or_recipe(output):
    content = write_card("ann/tiny", json.loads((output / "config.json").read_text()), {}, parameters=2_500_000_000)
    data = ModelCard(content).data.to_dict()
    assert not {"license", "base_model", "datasets", "metrics", "model-index", "language"} & data.keys()
    for text in ("has not been measured", "is not recorded", "not stated by the author; ask", "2.5 billion parameters"):
        assert text in content, text


def test_evaluations_of_other_weights_are_refused(output, tmp_path):
    folder = write_evaluation(tmp_path / "scores", output)
    assert read_evaluation(folder, output, "ann/tiny").name == "scenes_refer"
    weights = load_file(output / "model.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: weights[name] + 1}, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PublishError, match="measured other weights .*run validate.py --model .* again"):
        read_evaluation(folder, output, "ann/tiny")
    with pytest.raises(PublishError, match="has no summary.json: give the output folder of a finished validate.py"):
        read_evaluation(output, output, "ann/tiny")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"checkpoint_sha256": None, "checkpoint": "ann/tiny"}))
    assert read_evaluation(folder, output, "ann/tiny").results
    with pytest.raises(PublishError, match="measured ann/tiny, not the model in"):
        read_evaluation(folder, output, "ann/other")
    (folder / "model_index.yaml").write_text("model-index: 3")
    with pytest.raises(PublishError, match="cannot be read as a model-index"):
        read_evaluation(folder, output, "ann/tiny")


def test_eval_results_that_the_hub_can_use(output, tmp_path):
    folders = [
        write_evaluation(tmp_path / "hub", output, "lmms-lab/refcoco"),
        write_evaluation(tmp_path / "local", output),
    ]
    files, left_out = eval_result_files(folders)
    assert [path.name for path in files] == ["refcoco_testA.yaml"]
    assert list(left_out) == [".eval_results/scenes_refer_testA.yaml"]
    same_name = write_evaluation(tmp_path / "again", output, "lmms-lab/refcoco", 0.5)
    with pytest.raises(PublishError, match="have one name"):
        eval_result_files([*folders, same_name])
    (same_name / ".eval_results/refcoco_testA.yaml").write_text("- {value: 1}")
    with pytest.raises(PublishError, match="is not a valid file of evaluation results"):
        eval_result_files([same_name])


def test_what_of_a_recipe_and_a_command_is_public():
    recipe = {"a": "/home/ann/x.json", "b": ["C:\\data\\y", "openai/clip"], "hub_token": "hf_x", "c": None, "d": 0}
    assert without_paths(recipe) == {"a": "x.json", "b": ["y", "openai/clip"], "d": 0}
    command = "validate.py --model /home/ann/m --data ~/refer/ --images coco/val https://x.org/a/b"
    assert without_absolute_paths(command) == "validate.py --model m --data refer --images coco/val https://x.org/a/b"


def test_a_given_card_brings_its_images(tmp_path):
    (tmp_path / "stage").mkdir()
    stage = Stage(tmp_path / "stage")
    head = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n"
    (tmp_path / "mine").mkdir()
    card = tmp_path / "mine/card.md"
    Image.new("RGB", (4, 4)).save(tmp_path / "mine/a.png")
    card.write_text(f'{head}![a](a.png) ![b](https://x.org/b.png) <img src="a.png">')
    add_given_card(stage, card)
    assert [name for name, _ in stage.files()] == ["README.md", "a.png"]
    for content, message in (
        (f"{head}![c](c.png)", "shows c.png, which is not a file beside it"),
        (f"{head}![c](../stage/a.png)", "which is not a file beside it"),
        ("# no metadata", "does not begin with metadata"),
        ("---\n[1, 2]\n---\n", "metadata cannot be read"),
        ("---\na: [\n---\n", "metadata cannot be read"),
        ("---\nlibrary_name: timm\n---\n", "library_name is 'timm'"),
        ("---\nlibrary_name: transformers\n---\n", "pipeline_tag is None"),
        (head.replace("---\n", "model-index: 3\n---\n", 2).replace("model-index: 3\n", "", 1), "cannot be read"),
    ):
        card.write_text(content)
        with pytest.raises(PublishError, match=message):
            add_given_card(stage, card)
    assert checked_card(head) == head


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_output(tiny_backbones, tmp_path_factory) -> Path:
    """What train.py leaves after a LoRA run over joined backbones; the mask modules stay as they were joined."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter_output")
    vision, text = tiny_backbones()
    recipe = {"model": {"vision": vision, "text": text, "config": TINY_SIGNALS}, "training": {"seed": 5}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model, processor = adapters.build_base(adapters.base_of_recipe(recipe))
    added = [model.config.vis_token_id]
    config = LoraConfig(
        r=2,
        target_modules=r".*\blanguage_model\..*\.q_proj",
        modules_to_save=["multi_modal_projector", "box_encoder", "box_decoder"],
        trainable_token_indices={"embed_tokens": added, "lm_head": added},
        init_lora_weights=False,
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter += 0.1
    for part in (model, processor):
        part.save_pretrained(folder / "adapter")
    for part in (model.merge_and_unload(), processor):
        part.save_pretrained(folder)
    return folder


def record_base(adapter: Path, base: dict, **changes) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    adapters.set_base(adapter / "adapter_config.json", None, None, adapters.describe_base(base, config) | changes)


def same_weights(model, folder: Path) -> None:
    found, expected = model.state_dict(), load_file(folder / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5)


def test_an_adapter_finds_its_base_by_names_and_seed(adapter_output, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_output / "adapter", adapter)
    base = adapters.base_of_recipe(yaml.safe_load((adapter_output / "recipe.yaml").read_text()))
    with pytest.raises(ValueError, match="its config names no base; give base="):
        adapters.load_adapter(adapter)
    record_base(adapter, base)
    model, processor = adapters.load_adapter(adapter)
    same_weights(model, adapter_output)
    assert type(processor).__name__ == "PerceptionGPTProcessor" and not model.training
    # The seed decides the mask modules, which the adapter does not bring along: another one is noticed.
    config = json.loads((adapter / "adapter_config.json").read_text())
    recorded = config["auto_mapping"][adapters.BASE_KEY]
    record_base(adapter, base, seed=6, torch="1.0")
    with pytest.raises(ValueError, match=r"have other values here .*seed 6 and torch 1.0 .*--base_repo.*give base="):
        adapters.load_adapter(adapter)
    # A saved copy of the base is what the message proposes.
    saved, _ = adapters.build_base(base)
    saved.save_pretrained(tmp_path / "base")
    same_weights(adapters.load_adapter(adapter, base=tmp_path / "base")[0], adapter_output)
    adapters.set_base(adapter / "adapter_config.json", str(tmp_path / "base"), None, None)
    model, _ = adapters.load_adapter(adapter, dtype="bfloat16")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for m in model.model.signal_modules().values() for p in m.parameters()} == {torch.float32}
    assert recorded["seed"] == 5 and len(recorded["fresh_sha256"]) == 64


def test_the_hash_counts_what_is_fresh_and_stays(adapter_output):
    base = adapters.base_of_recipe(yaml.safe_load((adapter_output / "recipe.yaml").read_text()))
    config = json.loads((adapter_output / "adapter/adapter_config.json").read_text())
    model, _ = adapters.build_base(base)
    expected = adapters.fresh_hash(model, config)
    assert adapters.fresh_hash(adapters.build_base(base)[0], config) == expected
    with torch.no_grad():
        model.model.box_encoder.norm.weight += 1  # the adapter replaces it
        model.get_input_embeddings().weight[model.config.vis_token_id] += 1  # and this row
        model.model.vision_tower.load_state_dict({n: p + 1 for n, p in model.model.vision_tower.state_dict().items()
                                                  if p.is_floating_point()}, strict=False)  # fmt: skip
    assert adapters.fresh_hash(model, config) == expected
    with torch.no_grad():
        model.get_input_embeddings().weight[model.config.image_token_id] += 1
    assert adapters.fresh_hash(model, config) != expected


def test_adapters_whose_base_nobody_could_find(adapter_output, tmp_path):
    recipe = yaml.safe_load((adapter_output / "recipe.yaml").read_text())
    base = adapters.base_of_recipe(recipe)
    with pytest.raises(PublishError, match="on vision .*, a local folder that nobody else has: give --base_repo"):
        adapters.pin_revisions(base)
    with pytest.raises(PublishError, match="the run had stages"):
        adapters.base_of_recipe(recipe | {"stages": {"a": {}}})
    with pytest.raises(PublishError, match="does not say what the adapter was trained on"):
        adapters.base_of_recipe({})
    other, _ = adapters.build_base(base | {"seed": 6})
    with pytest.raises(PublishError, match="does not give model.safetensors: .* differs. The base has"):
        adapters.check_same_model(adapter_output, adapter_output / "adapter", other)
    adapters.check_same_model(adapter_output, adapter_output / "adapter", adapters.build_base(base)[0])
    with pytest.raises(PublishError, match="has no adapter/adapter_config.json"):
        adapters.check_adapter_folder(tmp_path)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hub_token": "hf_x"}, "set HF_TOKEN"),
        ({"hub_strategy": "every_save"}, "published when it is finished"),
        ({"hub_revision": "dev"}, "published to main"),
    ],
)
def test_hub_settings_of_a_recipe_that_are_refused(settings, message, tmp_path):
    with pytest.raises(PublishError, match=message):
        run_publication(tmp_path, {"push_to_hub": True, **settings})


def test_the_library_is_kept_from_uploading_checkpoints(tmp_path):
    from perceptiongpt.training.trainer import training_arguments

    arguments = training_arguments({"training": {"push_to_hub": True, "hub_model_id": "ann/x", "seed": 3}}, tmp_path)
    assert not arguments.push_to_hub and arguments.hub_model_id is None and arguments.seed == 3


# ---- everything together ---------------------------------------------------------------------------------------------


def run(command: list, hub: Hub, home: Path, token: str | None = None, cwd: Path | None = None):
    done = subprocess.run(command, env=client_environment(hub, home, token), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def forced_answer(pipe, image: str):
    """The boxes of an answer of two `<vis>`."""
    vis = pipe.model.config.vis_token_id
    return pipe(image, "Find the cup.", max_new_tokens=2, sequence_bias=[[[vis], 1e4]])["boxes"].tolist()


def ask_as_a_stranger(hub: Hub, tmp_path: Path, output: Path, image: str) -> None:
    """`from_pretrained` and `pipeline` of a process that has neither the package nor the folder: the same answers."""
    code = (
        STRANGER
        + inspect.getsource(forced_answer)
        + f"""
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
model = AutoModelForImageTextToText.from_pretrained("ann/tiny", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("ann/tiny", trust_remote_code=True, revision="v1")
pipe = pipeline("perception", model="ann/tiny", trust_remote_code=True)
print(json.dumps([[type(part).__module__ for part in (model, processor, pipe)], forced_answer(pipe, {image!r})]))
"""
    )
    stranger = run([sys.executable, "-I", "-c", code], hub, tmp_path / "stranger")
    modules, boxes = json.loads(stranger.splitlines()[-1])
    assert all(name.startswith("transformers_modules.ann.tiny") for name in modules)
    model = PerceptionGPTForConditionalGeneration.from_pretrained(output)
    pipe = PerceptionPipeline(model=model, processor=PerceptionGPTProcessor.from_pretrained(output))
    torch.testing.assert_close(torch.tensor(boxes), torch.tensor(forced_answer(pipe, image)), atol=1e-3, rtol=0)


@pytest.fixture
def red_image(tmp_path) -> str:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_a_stranger_uses_what_was_uploaded(hub, upload, output, red_image, tmp_path):
    stage = stage_checkpoint(output, tmp_path / "stage")
    hub.repositories.pop(("models", "ann/tiny"), None)
    assert "commit" in upload(stage.folder, "ann/tiny", tag="v1")
    # The download of the weights is cut off once, and resumes where it was.
    cut = Fault("GET /storage/", after_bytes=100_000)
    hub.faults.append(cut)
    ask_as_a_stranger(hub, tmp_path, output, red_image)
    assert cut.reached.is_set()


@pytest.mark.slow
def test_a_stranger_uses_what_the_command_published(hub, output, red_image, tmp_path):
    hub.repositories.pop(("models", "ann/tiny"), None)
    evaluation = write_evaluation(tmp_path / "scores", output, "lmms-lab/refcoco")
    command = [sys.executable, ROOT / "publish.py", "--model", output, "--repo", "ann/tiny", "--tag", "v1"]
    command += ["--image", red_image, "--text", "Find the cup.", "--evaluation", evaluation, "--license", "mit"]
    report = run(command, hub, tmp_path / "home", "token-ann")
    files = published(hub, "ann/tiny", "v1")
    assert f"published {hub.endpoint}/ann/tiny at {hub.model('ann/tiny').branches['main']}, tagged v1" in report
    assert "optimizer.pt (pickled" in report
    assert files["model.safetensors"] == (output / "model.safetensors").read_bytes()
    assert {".eval_results/refcoco_testA.yaml", "images/answers.jpg", "README.md"} < files.keys()
    assert not [name for name in files if b"SECRET" in files[name]] and b"/home/ann" not in b"".join(files.values())
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    ask_as_a_stranger(hub, tmp_path, output, red_image)


# ---- Spaces ----------------------------------------------------------------------------------------------------------


def test_the_stage_of_a_space(tmp_path):
    stage = stage_space(tmp_path / "stage", "ann/tiny-app", "ann/tiny", "abc", Facts(license="mit"))
    examples = {f"examples/{path.name}" for path in (ROOT / "examples").iterdir()}
    named = {"app.py", "requirements.txt", "space.json", "README.md"}
    named |= {f"webapp/{path.name}" for path in (ROOT / "webapp").glob("*.py")}
    assert {name for name, _ in stage.files()} == named | examples and examples == {name for name, _ in EXAMPLES}
    assert "not published" not in stage.table()
    data = SpaceCard.load(stage.folder / "README.md").data
    assert (data.sdk, data.app_file, data.models, data.license) == ("gradio", "app.py", ["ann/tiny"], "mit")
    assert data.sdk_version == importlib.metadata.version("gradio") and re.fullmatch(r"3\.\d+", data.python_version)
    assert len(data.to_dict()["short_description"]) <= 60  # the Hub takes no more
    content = (stage.folder / "README.md").read_text()
    assert content.startswith("---\n") and "license" not in space_card("ann/a", "ann/tiny", Facts()).split("---")[1]
    required = (stage.folder / "requirements.txt").read_text().split()
    names = {re.match(r"[\w-]+", line)[0] for line in required}
    assert names == {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "pillow", "pycocotools"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "outputs/mine/", "--repo", "ann/app"], "publish it first, give USER/NAME here"),
        (["--model", "ann/tiny", "--repo", "ann/app", "--image", "a.png"], "takes --license alone"),
        (["--model", "ann/tiny", "--repo", "ann/app", "--adapter_only"], "not --adapter_only"),
    ],
)
def test_spaces_that_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        publish_main([*arguments, "--space", "--dry_run"])
    assert re.search(message, str(raised.value) + capsys.readouterr().err)


def test_a_space_is_published(hub, tmp_path):
    """One process: each command of it is a line, and the answer the end of what it prints."""
    code = """
import sys
from perceptiongpt.publish import main
for line in sys.stdin:
    try:
        main(line.split())
    except SystemExit as error:
        print(error)
    print("====", flush=True)
"""
    config = b'{"model_type": "perceptiongpt"}'
    model(hub, "ann/shown", {"config.json": config})
    model(hub, "ann/llama", {"config.json": b'{"model_type": "llama"}'})
    foreign = Repository("ann/foreign")
    foreign.commit("main", "theirs", {"app.py": File(b"print()", False)})
    hub.repositories["spaces", "ann/foreign"] = foreign
    commands = [
        "--model ann/shown --repo ann/app --tag v1 --license mit",
        "--model ann/shown --repo ann/app --tag v1 --license mit",
        "--model ann/none --repo ann/app",
        "--model ann/llama --repo ann/app",
        "--model ann/shown --repo ann/foreign",
        "--model ann/shown --repo bob/app",
        f"--model ann/later --repo ann/other --dry_run --stage {tmp_path / 'stage'}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code],
        input="".join(f"{command} --space\n" for command in commands),
        env=client_environment(hub, tmp_path / "home", "token-ann"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, again, none, llama, taken, bob, dry, _ = done.stdout.split("====\n")
    space = hub.repositories["spaces", "ann/app"]
    commit = space.branches["main"]
    assert f"published {hub.endpoint}/spaces/ann/app at {commit}, tagged v1" in first
    assert again == first and space.history() == ["Publish a Space", "initial commit"] and space.tags == {"v1": commit}
    files = space.files()
    assert files["app.py"] == (ROOT / "app.py").read_bytes() and "examples/cat.jpg" in files
    assert json.loads(files["space.json"]) == {
        "model": "ann/shown",
        "revision": hub.model("ann/shown").branches["main"],
    }
    assert "ann/none: there is no such model on the Hub" in none and "is of the type 'llama'" in llama
    assert "the name is taken: ann/foreign holds another app" in taken and "no right to publish under 'bob'" in bob
    assert "dry run: nothing was sent" in dry and ("spaces", "ann/other") not in hub.repositories
    assert json.loads((tmp_path / "stage/space.json").read_text()) == {"model": "ann/later", "revision": None}
    assert space.files() == files


@pytest.mark.slow
def test_a_space_answers_with_what_it_holds_alone(hub, output, tmp_path):
    """As the Hub runs it: the staged files, the model from the Hub, and no package of this name."""
    stage = stage_checkpoint(output, tmp_path / "stage")
    model(hub, "ann/shown", contents(stage.folder))
    revision = hub.model("ann/shown").branches["main"]
    space = stage_space(tmp_path / "space", "ann/app", "ann/shown", revision, Facts())
    code = (
        STRANGER
        + f"""
sys.path.insert(0, {str(space.folder)!r})
import webapp
from webapp.assistant import Assistant
from webapp.page import EXAMPLES, build
from webapp.session import ask, open_image
from webapp.start import find_model
name, revision = find_model()
assistant = Assistant(name, revision)
page = build(assistant)
session = open_image(assistant, webapp.FOLDER / EXAMPLES[0][0])
vis = assistant.processor.vis_token_id
list(ask(assistant, session, EXAMPLES[0][1], None, max_new_tokens=2, sequence_bias=[[[vis], 1e4]]))
print(json.dumps([name, revision, len(session.turns[0].objects), str(webapp.FOLDER)]))
"""
    )
    answer = run([sys.executable, "-I", "-c", code], hub, tmp_path / "stranger").splitlines()[-1]
    assert json.loads(answer) == ["ann/shown", revision, 2, str(space.folder)]


LOAD_ADAPTER = """
from perceptiongpt.publishing.adapters import load_adapter
model, processor = load_adapter("ann/adapter")
model.save_pretrained(sys.argv[1])
"""


@pytest.mark.slow
def test_an_adapter_and_its_base_as_two_repositories(hub, adapter_output, red_image, tmp_path):
    command = [
        sys.executable,
        ROOT / "publish.py",
        "--model",
        adapter_output,
        "--repo",
        "ann/adapter",
        "--adapter_only",
    ]
    command += ["--base_repo", "ann/base", "--image", red_image, "--text", "Find the cup.", "--license", "mit"]
    run(command, hub, tmp_path / "home", "token-ann")
    files = published(hub, "ann/adapter")
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "ann/base"
    assert config["revision"] == hub.model("ann/base").branches["main"]
    assert "training_args.bin" not in files and "model.safetensors" not in files
    card = ModelCard(files["README.md"].decode()).data
    assert card.base_model == "ann/base" and card.library_name == "peft" and card["base_model_relation"] == "adapter"
    # As the card says, with nothing but the libraries.
    usage = re.search(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)[1]
    code = f"{STRANGER}{usage}\nmodel.save_pretrained(sys.argv[1])\n"
    run([sys.executable, "-I", "-c", code, tmp_path / "loaded"], hub, tmp_path / "stranger")
    same_weights(PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path / "loaded"), adapter_output)
    run([sys.executable, "-c", "import sys\n" + LOAD_ADAPTER, tmp_path / "again"], hub, tmp_path / "third")
    same_weights(PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path / "again"), adapter_output)


@pytest.mark.slow
def test_an_adapter_over_backbones_on_the_hub(hub, adapter_output, tiny_backbones, red_image, tmp_path):
    """Published without its base: whoever loads it joins the backbones of the recorded revisions again."""
    output = tmp_path / "output"
    shutil.copytree(adapter_output, output)
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    for key, folder in zip(("vision", "text"), tiny_backbones(), strict=True):
        model(hub, f"bob/{key}", contents(Path(folder)))
        recipe["model"][key] = f"bob/{key}"
    (output / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, ROOT / "publish.py", "--model", output, "--repo", "ann/adapter", "--adapter_only"]
    hub.repositories.pop(("models", "ann/adapter"), None)
    run([*command, "--image", red_image, "--text", "Find the cup."], hub, tmp_path / "home", "token-ann")
    recorded = json.loads(published(hub, "ann/adapter")["adapter_config.json"])["auto_mapping"][adapters.BASE_KEY]
    assert recorded["revisions"] == {key: hub.model(f"bob/{key}").branches["main"] for key in ("vision", "text")}
    # The authors of a backbone go on: the adapter keeps to the revision that it was trained on.
    hub.model("bob/text").commit("main", "broken", {"config.json": File(b"{}", False)})
    run([sys.executable, "-c", "import sys\n" + LOAD_ADAPTER, tmp_path / "loaded"], hub, tmp_path / "third")
    same_weights(PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path / "loaded"), output)


@pytest.mark.slow
def test_a_training_run_is_published_when_it_is_finished(hub, tiny_model_dir, tmp_path):
    recipe = {
        "model": {"checkpoint": tiny_model_dir},
        "adapter": {"mode": "heads"},
        "data": {"train": {"source": "scenes", "limit": 2, "seed": 1}},
        "training": {"max_steps": 1, "use_cpu": True, "push_to_hub": True, "hub_model_id": "ann/trained"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, ROOT / "train.py", "--config", tmp_path / "recipe.yaml", "--output"]
    refused = subprocess.run(
        [*command, tmp_path / "refused"],
        env=client_environment(hub, tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1 and "error: there is no access token" in refused.stderr
    assert not list((tmp_path / "refused").glob("*"))  # before the training
    run([*command, tmp_path / "run"], hub, tmp_path / "home", "token-ann")
    files = published(hub, "ann/trained")
    assert (
        files["model.safetensors"] == (tmp_path / "run/model.safetensors").read_bytes() and "recipe.yaml" not in files
    )
    assert hub.model("ann/trained").history() == ["Publish a checkpoint", "initial commit"]
    assert "1 optimizer step" in files["README.md"].decode()


PAGE = (ROOT / "docs/publishing.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_on_publishing_followed_literally(hub, output, tiny_backbones, adapter_output, tmp_path):
    """Every command of docs/publishing.md in order, then its Python, against the Hub of this test."""
    (tmp_path / "publish.py").symlink_to(ROOT / "publish.py")
    outputs = tmp_path / "outputs"
    shutil.copytree(output, outputs / "mine")
    shutil.copytree(adapter_output, outputs / "joined")
    write_evaluation(outputs / "mine_scores", outputs / "mine")
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.jpg")
    environment = client_environment(hub, tmp_path / "home", "token-ann")
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} == {"bash", "python"}
    for language, block in blocks:
        block = block.replace("USER/", "ann/").replace("hf auth login", "hf auth whoami")
        command = ["bash", "-ec", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    assert published(hub, "ann/mine", "v1").keys() >= {"README.md", "model.safetensors"}
    assert "space.json" in hub.repositories["spaces", "ann/mine-app"].files()
    assert {"models", "ann/mine-adapter"} | {"models", "ann/mine-base"} <= {
        part for key in hub.repositories for part in key
    }
