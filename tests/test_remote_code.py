"""The folders that the package and remote code save: the same answers from either, through every kind of re-save.

`python -I tests/test_remote_code.py JOBS.json RESULTS.pt` is a fresh process that cannot import the package.
"""

import ast
import importlib
import importlib.abc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    pipeline,
)
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports


ROOT = Path(__file__).parents[1]
CODE_FILES = sorted(ROOT.glob("*_perceptiongpt.py"))
ALLOWED_IMPORTS = {"torch", "transformers", "numpy", "PIL", "safetensors"}
AUTO_MAP = {
    "AutoConfig": "configuration_perceptiongpt.PerceptionGPTConfig",
    "AutoModel": "modeling_perceptiongpt.PerceptionGPTModel",
    "AutoModelForImageTextToText": "modeling_perceptiongpt.PerceptionGPTForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_perceptiongpt.PerceptionGPTForConditionalGeneration",
    "AutoProcessor": "processing_perceptiongpt.PerceptionGPTProcessor",
}
HAS_CHECKPOINT = (ROOT / "config.json").exists()
FOLDERS = ("first", "again", "merged", "odd", "remote", "remote_merged", "remote_again", "package_after_remote")
# Each chain of saves is asked at its end: `package_after_remote` comes after `first`, `again` and both `remote`.
ASKED = ("first", "odd", "remote_merged", "package_after_remote")
GENERATED = (
    "sequences",
    "boxes",
    "mask_logits",
    "points",
    "object_scores",
    "object_mask_scores",
    "object_point_scores",
)
ODD_NAME = "7b tïny-model v1.0 (copy)"


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def questions() -> list[list[dict]]:
    """Two prompts of unlike length: one with a box and a mask, one with a picture and text alone."""
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:20, 10:50] = True
    image = {"type": "image", "image": picture()}
    box, region = {"type": "box", "box": [3.0, 4.5, 30.0, 38.0]}, {"type": "mask", "mask": mask}
    contents = [
        [image, {"type": "text", "text": "What is in "}, box, {"type": "text", "text": " and "}, region],
        [image, {"type": "text", "text": "Find the red cup."}],
    ]
    return [[{"role": "user", "content": content}] for content in contents]


def emit_vis(config) -> dict:
    """Arguments of `generate` that make every new token a `<vis>`, so that boxes are fed back."""
    return {"max_new_tokens": 3, "do_sample": False, "sequence_bias": [[[config.vis_token_id], 1e4]]}


def load(folder, **kwargs) -> tuple:
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()
    return model, AutoProcessor.from_pretrained(folder, **kwargs)


@torch.no_grad()
def answers(folder, pipeline_class=None, **kwargs) -> dict[str, torch.Tensor]:
    """
    All that a folder says through the five Auto classes and the pipeline, as one flat dict of tensors. The library asks
    for trust in the folder's pipeline even where the package is installed, unless its class is given.
    """
    config = AutoConfig.from_pretrained(folder, **kwargs)
    model, processor = load(folder, **kwargs)
    inputs = processor.apply_chat_template(
        questions(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    base = AutoModel.from_pretrained(folder, **kwargs).eval()
    multimodal = AutoModelForMultimodalLM.from_pretrained(folder, **kwargs)
    assert [type(part).__name__ for part in (config, base, model, multimodal, processor)] == [
        name.split(".")[1] for name in AUTO_MAP.values()
    ]
    output = model(**inputs)
    generated = model.generate(**inputs, **emit_vis(config), return_dict_in_generate=True)
    results = processor.post_process_generation(generated, target_sizes=[(40, 60)] * 2)
    pipe = pipeline("perception", model=str(folder), pipeline_class=pipeline_class, **kwargs)
    piped = pipe(picture(), "the red cup", **emit_vis(config))
    library = pipeline("image-text-to-text", model=str(folder), **kwargs)
    assert type(library).__module__ == "transformers.pipelines.image_text_to_text"
    found = {
        "base": base(**inputs).last_hidden_state,
        **{f"inputs.{name}": value for name, value in inputs.items()},
        **{f"forward.{name}": output[name] for name in output if name == "logits" or name.startswith("pred_")},
        **{f"generate.{name}": generated[name] for name in GENERATED if name in generated},
        **{f"results.{row}.{name}": result[name] for row, result in enumerate(results) for name in ("boxes", "masks")},
        **{f"pipeline.{name}": piped[name] for name in ("boxes", "masks", "scores")},
    }
    assert generated.object_valid.sum() == 6 and piped["boxes"].shape == (3, 4)
    return found


def merge_adapter(model):
    """A LoRA whose weights are not zero, with fully trained modules and token rows beside it, merged into the model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    adapter = LoraConfig(
        r=4,
        target_modules=r".*\blanguage_model\..*\.(q_proj|v_proj)",
        modules_to_save=["multi_modal_projector", "box_encoder"],
        trainable_token_indices={"embed_tokens": [model.config.vis_token_id], "lm_head": [model.config.vis_token_id]},
        init_lora_weights=False,
    )
    return get_peft_model(model, adapter).merge_and_unload()


def save(parts, folder) -> None:
    for part in parts:
        part.save_pretrained(folder)


class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "perceptiongpt":
            raise ModuleNotFoundError("the package is hidden")


def remote_process(jobs: dict, results: str) -> None:
    """`jobs`: folders to ask (`ask`), to save again (`save`: from -> to) and to merge an adapter into (`merge`)."""
    sys.meta_path.insert(0, NoPackage())
    try:
        importlib.import_module("perceptiongpt")
    except ModuleNotFoundError:
        found = {}
    for task, finish in (("save", lambda model: model), ("merge", merge_adapter)):
        for source, target in jobs.get(task, {}).items():
            model, processor = load(source, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules.")
            save((finish(model), processor), target)
    for folder in jobs["ask"]:
        found[folder] = answers(folder, trust_remote_code=True)
    assert not [name for name in sys.modules if name.split(".")[0] == "perceptiongpt"]
    torch.save(found, results)


if __name__ == "__main__":
    remote_process(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
    sys.exit()


@pytest.fixture(scope="module")
def run_remotely(tmp_path_factory):
    """`run_remotely(jobs)` -> what a fresh process answered, in an empty working directory with an empty cache."""

    def run(jobs: dict) -> dict:
        folder = tmp_path_factory.mktemp("elsewhere")
        environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HOME": str(folder / "home")}
        (folder / "jobs.json").write_text(json.dumps(jobs))
        (folder / "empty").mkdir()
        command = [sys.executable, "-I", __file__, folder / "jobs.json", folder / "results.pt"]
        done = subprocess.run(command, cwd=folder / "empty", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return torch.load(folder / "results.pt")

    return run


@pytest.fixture(scope="module")
def folders(tiny_model_dir, tmp_path_factory, run_remotely) -> dict[str, str]:
    """One model, saved in every way: by the package or by remote code, once, again, and after an adapter was merged."""
    from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor

    parent = tmp_path_factory.mktemp("saved")
    paths = {name: str(parent / name) for name in FOLDERS} | {"first": tiny_model_dir, "odd": str(parent / ODD_NAME)}

    def package_parts(name):
        model = PerceptionGPTForConditionalGeneration.from_pretrained(paths[name])
        return model, PerceptionGPTProcessor.from_pretrained(paths[name])

    save(package_parts("first"), paths["again"])
    model, processor = package_parts("again")
    save((merge_adapter(model), processor), paths["merged"])
    shutil.copytree(paths["merged"], paths["odd"])
    # `remote_again` is saved by the copy of the code that lies in `remote`.
    saves = {paths["again"]: paths["remote"], paths["remote"]: paths["remote_again"]}
    run_remotely({"save": saves, "merge": {paths["remote"]: paths["remote_merged"]}, "ask": []})
    save(package_parts("remote_again"), paths["package_after_remote"])
    return paths


@pytest.fixture(scope="module")
def answered(folders, run_remotely) -> tuple[dict, dict]:
    """By name what each folder answers in the package, and to remote code."""
    from perceptiongpt import PerceptionPipeline

    folders = {name: folders[name] for name in ASKED} | ({"root": str(ROOT)} if HAS_CHECKPOINT else {})
    remote = run_remotely({"ask": list(folders.values())})
    package = {name: answers(folder, PerceptionPipeline) for name, folder in folders.items()}
    return package, {name: remote[folder] for name, folder in folders.items()}


def assert_equal(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-6, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ASKED)
def test_remote_code_answers_as_the_package(answered, name):
    package, remote = answered
    assert_equal(package[name], remote[name])


def test_saving_changes_nothing(answered):
    """An adapter that remote code merged adds what one that was merged in the package adds."""
    package, _ = answered
    assert_equal(package["package_after_remote"], package["first"])
    assert_equal(package["remote_merged"], package["odd"])


def test_answers_tell_models_apart(answered):
    """The equality above means something: a merged adapter changes the logits and the boxes."""
    first, merged = (answered[0][name] for name in ("first", "odd"))
    for name in ("forward.logits", "generate.boxes", "pipeline.boxes"):
        assert not torch.allclose(first[name], merged[name], atol=1e-4), name


@pytest.mark.parametrize("name", FOLDERS)
def test_every_save_keeps_code_auto_map_and_pipeline(folders, name):
    folder = Path(folders[name])
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["custom_pipelines"] == {
        "perception": {
            "impl": "pipeline_perceptiongpt.PerceptionPipeline",
            "pt": ["AutoModelForImageTextToText"],
            "default": None,
            "type": "multimodal",
        }
    }
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    assert sorted(path.name for path in folder.glob("*.py")) == [path.name for path in CODE_FILES]
    for path in CODE_FILES:
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.skipif(not HAS_CHECKPOINT, reason="the repository's root holds no checkpoint")
def test_the_root_loads_as_a_model_repository(answered):
    package, remote = answered
    assert_equal(package["root"], remote["root"])


def forbidden_imports(path: Path) -> set[str]:
    """What a file imports, at any depth, that the loader of remote code would stumble over."""
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.split(".")[0] not in allowed)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.update({node.module} if node.module.split(".")[0] not in allowed else ())
        elif isinstance(node, ast.ImportFrom):
            sibling = node.level == 1 and node.module and "." not in node.module
            if not sibling or not (ROOT / f"{node.module}.py").exists():
                found.add("." * node.level + (node.module or ""))
        for child in ast.iter_child_nodes(node):
            # The loader lets what is tried be missing; a sibling it would still have to copy.
            if not (isinstance(node, ast.Try) and isinstance(child, (ast.Import, ast.ImportFrom)) and not level(child)):
                visit(child)

    def level(node):
        return getattr(node, "level", 0)

    allowed = ALLOWED_IMPORTS | sys.stdlib_module_names
    visit(ast.parse(path.read_text(encoding="utf-8")))
    # The loader's own reading is textual: docstrings count.
    found.update(set(get_imports(path)) - allowed)
    found.update("." + name for name in get_relative_imports(path) if not (ROOT / f"{name}.py").exists())
    return found


@pytest.mark.parametrize("path", CODE_FILES, ids=lambda path: path.stem)
def test_model_files_import_only_what_remote_code_may(path):
    assert forbidden_imports(path) == set()


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import cv2", {"cv2"}),
        ("def f():\n    if True:\n        from pycocotools import mask", {"pycocotools"}),
        ("from . import signals_perceptiongpt", {"."}),
        ("from .data.schema import x", {".data.schema"}),
        ("from ..other import x", {"..other"}),
        ("import perceptiongpt", {"perceptiongpt"}),
        ('"""\nfrom .missing import x\n"""', {".missing"}),
        ("try:\n    import cv2\nexcept ImportError:\n    cv2 = None", set()),
        ("import json, torch.nn\nfrom .signals_perceptiongpt import SIGNALS", set()),
    ],
)
def test_forbidden_imports_are_found(tmp_path, code, found):
    path = tmp_path / "code.py"
    path.write_text(code)
    assert {name for name in forbidden_imports(path) if name} >= found
    assert bool(forbidden_imports(path)) == bool(found)


def test_saving_reaches_every_model_file():
    """The files that the loader follows from those that `auto_map` and the pipeline name are all there are."""
    named = {ROOT / f"{target.split('.')[0]}.py" for target in AUTO_MAP.values()}
    followed = {Path(file) for path in named for file in get_relative_import_files(path)}
    assert named | followed == set(CODE_FILES)
