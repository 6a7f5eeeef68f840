"""The package itself: lazy imports, registration, what a wheel holds, the backbones the other tests stand on."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers

import perceptiongpt
from backbones import TEXT_FAMILIES, TINY_IMAGE_SIZE, TINY_PATCH_SIZE, VISION_FAMILIES


ROOT = Path(perceptiongpt.__file__).parent


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_lazy(tmp_path):
    code = "import sys, perceptiongpt; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert run_python(code, tmp_path) == "[]"


def test_public_names_come_from_their_modules():
    for name in perceptiongpt.__all__:
        assert getattr(perceptiongpt, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        perceptiongpt.Nothing  # noqa: B018


def test_naming_one_class_registers_all(tmp_path):
    code = """
import perceptiongpt
config = perceptiongpt.PerceptionGPTConfig()
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
print(type(AutoConfig.for_model("perceptiongpt")).__name__)
print(AutoModel._model_mapping[type(config)].__name__)
print(AutoModelForImageTextToText._model_mapping[type(config)].__name__)
print(PROCESSOR_MAPPING[type(config)].__name__)
print(PIPELINE_REGISTRY.check_task("perception")[1]["impl"].__name__)
"""
    assert run_python(code, tmp_path).split("\n") == [
        "PerceptionGPTConfig",
        "PerceptionGPTModel",
        "PerceptionGPTForConditionalGeneration",
        "PerceptionGPTProcessor",
        "PerceptionPipeline",
    ]


def test_wheel_holds_every_root_module(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "build", "outputs", "tests", "*.egg-info", "*.safetensors", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore, symlinks=True)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    run_python(build, source)
    (wheel,) = tmp_path.glob("perceptiongpt-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"perceptiongpt/{path.name}" for path in ROOT.glob("*.py")}
    for folder in ("data", "evaluation", "metrics", "publishing", "training", "webapp"):
        wanted |= {f"perceptiongpt/{path.relative_to(ROOT)}" for path in ROOT.glob(f"{folder}/**/*.py")}
    wanted |= {f"perceptiongpt/{path.relative_to(ROOT)}" for path in ROOT.glob("data/*.yaml")}
    wanted |= {f"perceptiongpt/{path.relative_to(ROOT)}" for path in ROOT.glob("recipes/**/*.yaml")}
    wanted |= {f"perceptiongpt/{path.relative_to(ROOT)}" for path in ROOT.glob("examples/*")}
    wanted |= {"perceptiongpt/chat_template.jinja"}
    assert wanted <= held, wanted - held
    assert not [name for name in held if "tests" in name or name.endswith(".safetensors")]


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 error")])
def test_missing_photos_skip_or_fail(tmp_path, required, outcome):
    environment = os.environ | {"PERCEPTIONGPT_DATA": str(tmp_path / "none"), "PERCEPTIONGPT_DATA_REQUIRED": required}
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_readme.py::test_python", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome in done.stdout, done.stdout


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_tiny_text_backbones_load(tiny_backbones, family):
    folder = tiny_backbones(family).text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Where is the red cup? Où ça, 猫?"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    assert torch.isfinite(model(ids).logits).all()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (family in {"llama_tied", "gemma", "smollm"})


@pytest.mark.parametrize("vision", VISION_FAMILIES)
def test_tiny_vision_towers_load(tiny_backbones, vision):
    folder = tiny_backbones(vision=vision).vision
    model = transformers.AutoModel.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(torch.zeros(3, 50, 40, dtype=torch.uint8), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, TINY_IMAGE_SIZE, TINY_IMAGE_SIZE)
    length = getattr(model, "vision_model", model)(pixel_values=pixels).last_hidden_state.shape[1]
    prefix = {"siglip": 0, "siglip_vision": 0, "dinov2_registers": 5}.get(vision, 1)
    assert length == (TINY_IMAGE_SIZE // TINY_PATCH_SIZE) ** 2 + prefix
