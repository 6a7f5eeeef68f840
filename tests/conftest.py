"""Fixtures shared by all tests: the real photos, and tiny random backbones saved in the Hub's formats."""

import os


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes, each with a core to itself
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from backbones import PYRAMID_FAMILIES, TINY_SIGNALS, Backbones, save_tiny_pyramid, save_tiny_text, save_tiny_vision


ROOT = Path(__file__).parents[1]
DATA_DIR = Path(os.environ.get("PERCEPTIONGPT_DATA", ROOT / "../shared/data")).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test begins first, so that the others fit beside it."""
    items.sort(key=lambda item: item.path.name != "test_learning.py")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real photos and annotations (`PERCEPTIONGPT_DATA`)."""
    if not DATA_DIR.is_dir():
        if os.environ.get("PERCEPTIONGPT_DATA_REQUIRED") == "1":
            pytest.fail(f"PERCEPTIONGPT_DATA_REQUIRED=1 and there is no folder {DATA_DIR}")
        pytest.skip(f"no real photos at {DATA_DIR} (set PERCEPTIONGPT_DATA)")
    return DATA_DIR


@pytest.fixture(scope="session")
def tiny_backbones(tmp_path_factory) -> Callable[..., Backbones]:
    """`tiny_backbones(family, vision)` -> `Backbones`; each folder is made once in a session."""
    folder = tmp_path_factory.mktemp("backbones")

    def make(family: str = "llama", vision: str = "clip") -> Backbones:
        text_folder, vision_folder = folder / f"text_{family}", folder / f"vision_{vision}"
        if not text_folder.exists():
            save_tiny_text(family, text_folder)
        if not vision_folder.exists():
            (save_tiny_pyramid if vision in PYRAMID_FAMILIES else save_tiny_vision)(vision, vision_folder)
        return Backbones(str(vision_folder), str(text_folder))

    return make


@pytest.fixture(scope="session")
def make_tiny_model(tiny_backbones):
    """`make_tiny_model(family, vision, **config)` -> (model in eval mode, processor), random and new at each call."""
    from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor

    def make(family: str = "llama", vision: str = "clip", **config):
        backbones = tiny_backbones(family, vision)
        torch.manual_seed(0)
        config = TINY_SIGNALS | config
        model = PerceptionGPTForConditionalGeneration.from_vision_text_pretrained(*backbones, **config).eval()
        return model, PerceptionGPTProcessor.from_backbones(*backbones, model.config)

    return make


@pytest.fixture(scope="session")
def tiny_model_dir(make_tiny_model, tmp_path_factory) -> str:
    """Folder of one tiny Llama + CLIP checkpoint with its processor. Read only."""
    folder = tmp_path_factory.mktemp("tiny_model")
    for part in make_tiny_model():
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_model(tiny_model_dir):
    """(model in eval mode, processor) loaded from `tiny_model_dir`: a test may change them."""
    from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor

    model = PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir).eval()
    return model, PerceptionGPTProcessor.from_pretrained(tiny_model_dir)
