"""The seam: a fourth signal is one file and one line in the table. Here it is a depth, in a copy of the model files."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from backbones import tiny_tokenizer
from drawn_rows import drawn_rows
from perceptiongpt.data.collator import PerceptionCollator
from perceptiongpt.data.schema import row_features, row_to_messages
from perceptiongpt.signals_perceptiongpt import SIGNALS
from rows import tiny_config


ROOT = Path(__file__).parents[1]
PACKAGE = "perceptiongpt_with_depth"
FARTHEST = 10.0
# The whole of the signal: a number in metres, 0 to 10, that belongs to no place in the image.
SIGNAL_FILE = """
import numpy as np
import torch
from transformers import PreTrainedConfig
from transformers.configuration_utils import strict

from .signal_perceptiongpt import CoordinateEncoder, Signal, StateMLP


@strict
class PerceptionGPTDepthConfig(PreTrainedConfig):
    model_type = "perceptiongpt_depth"
    base_config_key = "depth_config"

    hidden_size: int = 16
    weight: float | int = 1.0


class DepthEncoder(CoordinateEncoder):
    pass


class DepthDecoder(StateMLP):
    def forward(self, states):
        return super().forward(states).sigmoid().unbind(-1)


class DepthSignal(Signal):
    name = "depth"
    plural = "depths"
    config_class = PerceptionGPTDepthConfig
    prediction_names = ("pred_depths", "pred_depth_quality")
    result_names = ("depths", "object_depth_scores")
    score_name = "depth_score"
    column = "float64"

    def build_modules(self, config, embedding_rms):
        width, hidden_size = config.text_config.hidden_size, config.depth_config.hidden_size
        return {
            "depth_encoder": DepthEncoder(1, hidden_size, width, embedding_rms),
            "depth_decoder": DepthDecoder(width, hidden_size, 2),
        }

    def encode(self, model, values):
        return model.depth_encoder(values[..., None])

    def decode(self, model, states, image_features, image_index):
        return model.depth_decoder(states)

    def loss(self, config, predictions, quality, targets):
        error = (predictions - targets).abs()
        return config.depth_config.weight * error, (quality - (1 - error.detach())).square()

    def pad(self, config, batch_size, slots, device):
        return torch.zeros(batch_size, slots, device=device)

    def parse(self, value, height, width, mask_size):
        if not 0 <= value <= 10:
            raise ValueError(f"depth {value} is not between 0 and 10 m")
        return np.float32(value / 10)

    def empty(self, batch_size, slots, mask_size):
        return np.zeros((batch_size, slots), dtype=np.float32)

    def present(self, values, size, mask_format):
        metres = values.float().cpu() * 10
        return metres, metres.tolist()

    def check_column(self, value, height, width):
        return float(value), False
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The model files with one more and one more line in the table, imported; its modules by their short names."""
    parent = tmp_path_factory.mktemp("seam")
    folder = parent / PACKAGE
    folder.mkdir()
    for path in ROOT.glob("*_perceptiongpt.py"):
        shutil.copy(path, folder)
    (folder / "__init__.py").write_text("")
    (folder / "signal_depth_perceptiongpt.py").write_text(SIGNAL_FILE)
    table = folder / "signals_perceptiongpt.py"
    line = "        PointSignal(),\n"
    code = table.read_text()
    assert code.count(line) == 1
    code = code.replace(line, line + "        DepthSignal(),\n")
    table.write_text(
        re.sub(r"\nfrom \.signal_box", "\nfrom .signal_depth_perceptiongpt import DepthSignal\\g<0>", code)
    )
    sys.path.insert(0, str(parent))
    names = ("configuration", "modeling", "processing", "pipeline", "signals")
    modules = {name: importlib.import_module(f"{PACKAGE}.{name}_perceptiongpt") for name in names}
    yield SimpleNamespace(**modules)
    sys.path.remove(str(parent))
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def parts(package):
    """(model in eval mode, processor) with all four signals."""
    tokenizer = tiny_tokenizer()
    package.configuration.add_perception_tokens(tokenizer)
    tokens = ["<image>", "<vis>", "<p>", "</p>"]
    names = ("image_token_id", "vis_token_id", "phrase_start_token_id", "phrase_end_token_id")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    config = tiny_config(text={"vocab_size": len(tokenizer)}).to_dict()
    config = package.configuration.PerceptionGPTConfig(
        **{**config, **ids, "signals": None, "depth_config": {"weight": 2}}
    )
    assert config.signals == [*SIGNALS, "depth"] and config.depth_config.hidden_size == 16
    torch.manual_seed(0)
    model = package.modeling.PerceptionGPTForConditionalGeneration(config).eval()
    image_processor = package.processing.LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size={"height": config.image_size, "width": config.image_size}
    )
    processor = package.processing.PerceptionGPTProcessor(
        image_processor,
        tokenizer,
        image_seq_length=config.image_seq_length,
        mask_size=config.mask_config.size,
        signals=config.signals,
    )
    return model, processor


def question(depth: float, **others) -> list[dict]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    item = {"type": "region" if others else "depth", "depth": depth, **others}
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is "}, item]}
    ]


def answer(model, processor, messages):
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(torch.float32)
    output = model.generate(
        **inputs,
        max_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        sequence_bias=[[[processor.vis_token_id], 1e4]],
    )
    return inputs, output, processor.post_process_generation(output, [(40, 60)] * len(messages))


def test_it_goes_in_and_comes_out(package, parts):
    model, processor = parts
    inputs, output, results = answer(model, processor, [question(2.5), question(7.5, box=[3, 4, 30, 38])])
    assert inputs["depths"].tolist() == [[0.25], [0.75]] and inputs["depths_valid"].all()
    assert output.depths.shape == output.object_depth_scores.shape == output.boxes.shape[:2] == (2, 4)
    for row, result in enumerate(results):
        assert result["depths"].shape == (4,)
        for slot, found in enumerate(result["objects"]):
            assert found["depth"] == pytest.approx(FARTHEST * output.depths[row, slot].item(), abs=1e-5)
            assert found["depth_score"] == pytest.approx(output.object_depth_scores[row, slot].item())
    # What is read matters.
    _, other, _ = answer(model, processor, [question(9.5), question(7.5, box=[3, 4, 30, 38])])
    assert (output.boxes[0] - other.boxes[0]).abs().max() > 1e-4
    torch.testing.assert_close(output.boxes[1], other.boxes[1])
    with pytest.raises(ValueError, match="depth 11 is not between 0 and 10 m"):
        answer(model, processor, [question(11)])
    pipe = package.pipeline.PerceptionPipeline(model=model, processor=processor, task="perception")
    asked = {"image": question(2.5)[0]["content"][0]["image"], "text": "What is", "depth": 2.5}
    piped = pipe(asked, max_new_tokens=2, sequence_bias=[[[processor.vis_token_id], 1e4]])
    assert piped["depths"].shape == (2,)


def test_it_trains_from_rows(parts, package, monkeypatch):
    """The schema, the collator and one step of the model: nothing of them names the signal."""
    model, processor = parts
    monkeypatch.setitem(SIGNALS, "depth", package.signals.SIGNALS["depth"])
    assert row_features()["depths"].feature.dtype == "float64"
    rows = [{**row, "depths": [None] * len(row["boxes"])} for row in drawn_rows(1)]
    rows[0]["depths"], rows[3]["depths"] = [4.0], [1.0, None, 3.0, None]
    rows[1] |= {"boxes": [None], "depths": [6.0]}
    assert row_to_messages(rows[1])[1]["content"] == [{"type": "depth", "depth": 6.0}]
    batch = PerceptionCollator(processor)(rows)
    assert batch["depths"][1, 0] == pytest.approx(0.6) and batch["depths_valid"].sum() == 4
    assert batch["depths_read"][1, 0] and batch["depths_read"][3, 0] and not batch["depths_read"][0, 0]
    trained = package.modeling.PerceptionGPTForConditionalGeneration(model.config).train()
    trained.load_state_dict(model.state_dict())
    output = trained(**batch)
    supervised = [(0, 0), (1, 0), (3, 2)]
    expected = 2 * sum((output.pred_depths[at] - batch["depths"][at]).abs() for at in supervised) / 3
    torch.testing.assert_close(output.loss_depth, expected)
    terms = [output[name] for name in output if name.startswith("loss_")]
    assert len(terms) == 6
    torch.testing.assert_close(output.loss, sum(terms))
    counted = trained(**batch, num_items_in_batch=10, num_depths_in_batch=6)
    torch.testing.assert_close(counted.loss_depth, expected / 2)
    output.loss.backward()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    optimizer.step()
    for part in ("depth_encoder", "depth_decoder"):
        for name, parameter in getattr(trained.model, part).named_parameters():
            assert not torch.equal(parameter, getattr(model.model, part).get_parameter(name)), f"{part}.{name}"
    assert trained(**batch).loss < output.loss


def test_it_is_saved_and_loaded(package, parts, tmp_path):
    model, processor = parts
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["signals"] == [*SIGNALS, "depth"] and config["depth_config"]["weight"] == 2
    assert (tmp_path / "signal_depth_perceptiongpt.py").read_text() == SIGNAL_FILE  # remote code finds it
    loaded = (
        package.modeling.PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path).eval(),
        package.processing.PerceptionGPTProcessor.from_pretrained(tmp_path),
    )
    _, expected, _ = answer(model, processor, [question(2.5)])
    _, output, _ = answer(*loaded, [question(2.5)])
    assert torch.equal(output.depths, expected.depths) and torch.equal(output.boxes, expected.boxes)
    half = package.modeling.PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.model.depth_encoder.linear_1.weight.dtype == torch.float32
    assert {"DepthEncoder", "DepthDecoder"} <= set(half._no_split_modules)
    batch = answer(*loaded, [question(2.5)])[0]
    assert batch.to(torch.bfloat16)["depths"].dtype == torch.float32
    without = package.modeling.PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path, signals=["box", "mask"])
    assert not hasattr(without.model, "depth_decoder")
