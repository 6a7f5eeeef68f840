"""Every snippet of docs/using.md runs, in order, on a tiny checkpoint; what they leave behind is as the page says."""

import functools
import importlib.util
import re
import shlex
import shutil
import types
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import AutoConfig, GenerationConfig

from perceptiongpt import predict


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/using.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
HEIGHT, WIDTH = 60, 100


@pytest.fixture(scope="module")
def left(tiny_model_dir, tmp_path_factory):
    """The names that the snippets define, and what they print; answers are cut after three tokens, with objects."""
    folder = tmp_path_factory.mktemp("using")
    shutil.copytree(tiny_model_dir, folder, dirs_exist_ok=True)
    config = GenerationConfig.from_pretrained(folder)
    vis = AutoConfig.from_pretrained(folder, trust_remote_code=True).vis_token_id
    config.update(sequence_bias=[[[vis], 2.0]])
    config.save_pretrained(folder)
    (folder / "photos").mkdir()
    for index, name in enumerate(("photo.jpg", "photos/a.jpg", "photos/b.jpg")):
        pixels = np.random.default_rng(index).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    names, printed = types.SimpleNamespace(), []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # supervision without OpenCV
        patch.chdir(folder)
        patch.setattr(predict, "load", functools.cache(predict.load))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
        vars(names)["print"] = lambda *words, **kwargs: printed.extend(words)
        for language, snippet in SNIPPETS:
            snippet = snippet.replace("max_new_tokens=64", "max_new_tokens=3").replace(": 64", ": 3")
            if "BitsAndBytesConfig" in snippet and importlib.util.find_spec("bitsandbytes") is None:
                continue  # `make test-quant` has it
            if language == "python":
                exec(compile(snippet, "docs/using.md", "exec"), vars(names))
                continue
            for line in snippet.strip().split("\n"):
                python, script, *arguments = shlex.split(line)
                assert (python, script) == ("python", "predict.py")
                assert predict.main([*arguments, "--max_new_tokens", "3"]) == 0
    names.printed, names.folder = printed, folder
    return names


def test_kinds_of_snippets():
    assert {language for language, _ in SNIPPETS} == {"python", "bash"}
    assert sum("max_new_tokens=64" in snippet for _, snippet in SNIPPETS) >= 4


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantised_model_is_used_like_any_other(left):
    layer = left.small.model.model.language_model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit"
    assert type(left.small.model.model.box_decoder.linear_1).__name__ == "Float32Linear"
    assert left.small.detect(str(left.folder / "photo.jpg"), "dog")["boxes"].shape[1] == 4


def test_results(left):
    assert set(left.dogs) == {
        "text", "objects", "boxes", "masks", "points", "scores", "text_labels", "labels"
    }  # fmt: skip
    for found in left.dogs["objects"] + left.cup["objects"]:
        assert {"phrase", "span", "box", "score", "mask", "mask_score"} <= set(found)
        assert len(found["box"]) == 4 and found["mask"].shape == (HEIGHT, WIDTH)
    assert left.dogs["objects"] and type(left.pipe).__name__ == "PerceptionPipeline"
    assert len(left.described) == 2 and all(isinstance(result, dict) for result in left.described)
    assert isinstance(left.per_file, list) and len(left.per_file) == len(left.files) == 2
    assert left.result["boxes"].shape == (int(left.first.object_valid.sum()), 4)  # asked twice, the same
    printed = [str(word) for word in left.printed]
    assert {"object", "mask"} <= set(printed)
    assert any(word.startswith("[0: [") for word in printed) and any(
        word.startswith("[mask of 0: ") for word in printed
    )


def test_files_of_other_tools(left):
    assert len(left.coco.imgs) == len(left.detections) == len(left.data) == 2
    assert left.data.classes == ["dog"] and len(left.coco.anns) == sum(map(len, left.detections)) > 0
    assert left.coco.dataset["info"]["image_folder"] == str(left.folder / "photos")


def test_links():
    heads = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
    linked = re.findall(r"\]\(#([\w-]+)\)", PAGE)
    assert len(linked) == 6 and set(linked) <= anchors
