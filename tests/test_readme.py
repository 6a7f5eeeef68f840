"""Every command and every piece of Python in the README runs, on the checkpoint in the root and on real photos."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from backbones import save_tiny_text, save_tiny_vision
from hub_server import Hub, client_environment, serve


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
INSTALL = [block for block in BLOCKS if "pip install" in block]
(PUBLISH,) = [block for block in BLOCKS if "publish.py" in block]
COMMANDS = [block for block in BLOCKS if block not in (*INSTALL, PUBLISH)]
USERS = {"token-ann": {"name": "ann", "orgs": [], "role": "write"}}
NOT_COPIED = shutil.ignore_patterns(".*", "build", "outputs", "*.egg-info", "__pycache__", "docs", "tests")


@pytest.fixture(scope="module")
def clone(data_dir, tmp_path_factory) -> Path:
    """A copy of the repository with what the README's reader is said to have: photos, and a COCO folder."""
    clone = tmp_path_factory.mktemp("readme") / "clone"
    shutil.copytree(ROOT, clone, ignore=NOT_COPIED, symlinks=True)
    source = data_dir / "tiny_coco"
    instances = json.loads((source / "annotations/instances_train2017.json").read_text())
    with_objects = {annotation["image_id"] for annotation in instances["annotations"]}
    instances["images"] = [image for image in instances["images"] if image["id"] in with_objects][:3]
    kept = {image["id"] for image in instances["images"]}
    instances["annotations"] = [item for item in instances["annotations"] if item["image_id"] in kept]
    for folder in ("photos", "my_coco/images"):
        (clone / folder).mkdir(parents=True)
        for image in instances["images"]:
            shutil.copy(source / "train2017" / image["file_name"], clone / folder)
    (clone / "my_coco/annotations.json").write_text(json.dumps(instances))
    shutil.copy(clone / "photos" / instances["images"][0]["file_name"], clone / "photo.jpg")
    # A folder is preferred to a repository id: the README's backbones, tiny.
    save_tiny_vision("clip", clone / re.search(r"model\.vision=(\S+)", README)[1])
    save_tiny_text("llama", clone / re.search(r"model\.text=(\S+)", README)[1])
    return clone


def run_block(block: str, cwd: Path, scripts: Path, environment=os.environ) -> subprocess.CompletedProcess:
    environment = environment | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", block], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.parametrize("block", COMMANDS)
def test_commands(clone, block):
    block = block.replace("\\\n", " ")
    block = re.sub(r"^python train\.py.*", r"\g<0> training.max_steps=2", block, flags=re.MULTILINE)
    run_block(block, clone, Path(sys.executable).parent)
    for output in re.findall(r"predict\.py .*--output (\S+)", block):
        entries = json.loads((clone / output / "predictions.json").read_text())
        assert entries and all(entry["error"] is None for entry in entries)
        assert all((clone / output / entry["drawing"]).is_file() for entry in entries)


def test_python(clone):
    (clone / "readme.py").write_text(PYTHON + '\nassert set(result) >= {"text", "objects", "boxes", "masks"}\n')
    run_block("python readme.py", clone, Path(sys.executable).parent)


@pytest.mark.slow
@pytest.mark.parametrize("block", INSTALL)
def test_install(clone, tmp_path, block):
    """In a new environment that sees the installed dependencies, so that only the package itself is installed."""
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv/bin"
    site = subprocess.run(
        [scripts / "python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    run_block(block, clone, scripts)
    show = "perceptiongpt-predict --help; python -c 'import perceptiongpt; print(perceptiongpt.__file__)'"
    shown = run_block(show, tmp_path, scripts)
    assert "--batch_size" in shown.stdout and str(site) in shown.stdout


def required_distributions() -> dict[str, Distribution]:
    """What the package requires without an extra, and what that requires, by name."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found, todo = {}, [Requirement(line) for line in setup["options"]["install_requires"].split()]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = distribution(name)
        todo += [Requirement(line) for line in found[name].requires or ()]
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> list[str]:
    """A Python that has the packages of `install_requires` in their pinned versions, and nothing else."""
    site = tmp_path_factory.mktemp("site")
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    for name, package in required_distributions().items():
        # What only torch's wheels for accelerators require has no pin.
        assert package.version.split("+")[0] == pins.get(name, package.version), name
        for top in {file.parts[0] for file in package.files} - {".."}:
            if not (site / top).exists() and top != "__pycache__":
                (site / top).symlink_to(package.locate_file(top))
    start = f"import sys; sys.path.insert(0, {str(site)!r}); exec(open(sys.argv[1]).read())"
    return [sys.executable, "-I", "-S", "-c", start]


@pytest.mark.slow
def test_what_is_published_is_used_without_this_repository(clone, bare_python, tmp_path):
    """The README's commands publish to a Hub on the loopback interface, and its Python runs on what is there."""
    if not (clone / "outputs/mine").exists():  # the README's training makes it, in another test
        files = ("*.json", "model.safetensors", "chat_template.jinja", "*_perceptiongpt.py")
        (clone / "outputs/mine").mkdir(parents=True)
        for path in (path for pattern in files for path in clone.glob(pattern)):
            shutil.copy(path, clone / "outputs/mine")
    block = PUBLISH.replace("USER/", "ann/").replace("hf auth login", "hf auth whoami")
    with serve(Hub(USERS)) as hub:
        published = run_block(
            block, clone, Path(sys.executable).parent, client_environment(hub, tmp_path / "author", "token-ann")
        )
        assert "tagged v1" in published.stdout
        code = PYTHON.replace('repo = "."', 'repo = "ann/mine"')
        code += "\nassert type(model).__module__.startswith('transformers_modules.ann.mine.'), type(model)\n"
        others = ("perceptiongpt", "accelerate", "datasets", "peft", "pycocotools", "supervision")
        code += f"import importlib.util\nassert not any(map(importlib.util.find_spec, {others}))\n"
        (tmp_path / "readme.py").write_text(code)
        shutil.copy(clone / "photo.jpg", tmp_path)
        environment = client_environment(hub, tmp_path / "stranger")
        done = subprocess.run(
            [*bare_python, "readme.py"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.unknown == [] and hub.leaked == []


def test_what_is_left_out_is_known():
    fences = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    unchecked = [text for language, text in fences if language not in ("bash", "python")]
    assert unchecked == ["make demo\nmake test\n"]
    assert COMMANDS and INSTALL and PYTHON
