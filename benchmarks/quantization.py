"""What smaller weights cost in quality, and what they save in memory and time.

    pip install --constraint constraints.txt ".[quant]"
    python benchmarks/quantization.py                     # the checkpoint in the root: two minutes on two CPU cores
    python benchmarks/quantization.py --model outputs/mine --benchmark coco --data my_coco --limit 200

The checkpoint is loaded in each format as a user loads it, saved, and evaluated from there by `validate.py` on the same
questions, which ask for one object each: Acc@0.5 of boxes and mean IoU of masks, with 95 % intervals. MB are those of
the saved weights, which is also what they take in memory; GB of models as large as LLaVA's follow from shapes alone.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from perceptiongpt import PerceptionGPTConfig, PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt.data.reading import Problems
from perceptiongpt.data.shapes import KNOWN_SHAPES, draw_coco
from perceptiongpt.evaluation.answers import answer, read_images
from perceptiongpt.evaluation.benchmarks import find_benchmark
from perceptiongpt.evaluation.run import validate
from perceptiongpt.evaluation.samples import complete_options, read_samples
from perceptiongpt.inference import load
from perceptiongpt.validate import parse_arguments


ROOT = Path(__file__).resolve().parents[1]
BATCH, ROUNDS = 8, 9
SHAPES_SEED, SHAPES_IMAGES = 1000077, 150  # images that were used neither in training nor for choosing settings
SHAPES = {
    "source": "coco",
    "splits": ["test"],
    "tasks": ["refer"],
    "metrics": ["box_accuracy", "referring_iou"],
    "headline": "box_accuracy/acc@0.5",
    "max_new_tokens": 32,
}
BLOCK = 64  # weights that share a scale in 4 bit, a float32
# name -> (bytes of a weight that is quantised, bytes of any other, bytes of a signal module's)
BYTES = {"float32": (4, 4, 4), "bfloat16": (2, 2, 4), "int8": (1, 2, 4), "4-bit": (0.5 + 4 / BLOCK, 2, 4)}


def load_in(name: str, model: str):
    """A checkpoint in one of the formats of `BYTES`."""
    kwargs = {"dtype": torch.float32 if name == "float32" else torch.bfloat16}
    if name == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        kwargs["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    elif name == "4-bit":
        kwargs["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return PerceptionGPTForConditionalGeneration.from_pretrained(model, **kwargs)


def gigabytes_of_large_models() -> dict[str, dict[str, float]]:
    """Size in each format of models with the shapes of Vicuna-7B and -13B with CLIP ViT-L/14-336."""
    sizes = {"7B": {}, "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}}
    found = {}
    for size, differs in sizes.items():
        heads = differs.get("num_hidden_layers", 32)  # of these models as many as layers
        text = {"model_type": "llama", "vocab_size": 32064, **differs}
        text |= {"num_attention_heads": heads, "num_key_value_heads": heads}
        with torch.device("meta"):
            model = PerceptionGPTForConditionalGeneration(PerceptionGPTConfig(text_config=text))
        signals = {id(one) for module in model.model.signal_modules().values() for one in module.parameters()}
        linear = {id(module.weight) for module in model.model.modules() if isinstance(module, nn.Linear)} - signals
        counts = [0, 0, 0]
        for parameter in model.parameters():
            kind = 2 if id(parameter) in signals else 0 if id(parameter) in linear else 1
            counts[kind] += parameter.numel()
        found[size] = {
            name: sum(map(float.__mul__, map(float, counts), map(float, BYTES[name]))) / 1e9 for name in BYTES
        }
    return found


def measure(folder: Path, words: list[str], output: Path) -> dict:
    """The summary that `validate.py` writes of a checkpoint."""
    words = ["--model", str(folder), "--output", str(output), "--device", "cpu", *words]
    return validate(parse_arguments(words), f"validate.py {' '.join(words)}")


def median_milliseconds(folders: dict[str, Path], words: list[str]) -> dict[str, float]:
    """Per format the median time of a question; they take turns at one batch, so that all share the busy times."""
    options = parse_arguments(["--model", "unused", *words])
    benchmark = find_benchmark(options.benchmark)
    complete_options(options, benchmark)
    batch = read_samples(benchmark, options, Problems())[:BATCH]
    images = read_images(batch, grey=False)
    images = [images[sample["id"]] for sample in batch]
    models = {name: load(str(folder), "cpu") for name, folder in folders.items()}
    times = {name: [] for name in models}
    for _ in range(ROUNDS + 1):  # the first is not counted
        for name, (model, processor) in models.items():
            start = time.perf_counter()
            answer(model, processor, batch, images, options.max_new_tokens)
            times[name].append(1000 * (time.perf_counter() - start) / len(batch))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def interval(summary: dict, module: str, number: str) -> str:
    low, high = summary["intervals"][module][number]
    return f"{summary['metrics'][module][number]:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT), help="a checkpoint that is not quantised")
    parser.add_argument("--benchmark", help="of validate.py; default: scenes_refer, and drawn shapes in a COCO folder")
    parser.add_argument("--data", help="the folder that the benchmark reads")
    parser.add_argument("--limit", type=int, default=200, help="questions of a benchmark (default: 200)")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        work, limit = Path(temporary), ["--limit", str(options.limit)]
        if options.benchmark:
            data = ["--data", options.data] if options.data else []
            questions = {options.benchmark: ["--benchmark", options.benchmark, *data, *limit]}
        else:
            draw_coco(work / "shapes", SHAPES_IMAGES, SHAPES_SEED, list(KNOWN_SHAPES))
            (work / "shapes.yaml").write_text(json.dumps({"shapes": SHAPES}))
            questions = {
                "scenes": ["--benchmark", "scenes_refer", *limit],
                "shapes": ["--benchmark", str(work / "shapes.yaml"), "--data", str(work / "shapes"), *limit],
            }
        processor = PerceptionGPTProcessor.from_pretrained(options.model)
        folders = {name: work / name for name in BYTES}
        for name, folder in folders.items():
            for part in (load_in(name, options.model), processor):
                part.save_pretrained(folder)
        rows = []
        for title, words in questions.items():
            milliseconds = median_milliseconds(folders, words)
            for name, folder in folders.items():
                summary = measure(folder, words, work / f"{name}_{title}")
                boxes, masks = interval(summary, "box_accuracy", "acc@0.5"), interval(summary, "referring_iou", "miou")
                rows.append(f"{title:<10}{name:<10}{boxes:<22}{masks:<22}{milliseconds[name]:>12.0f}")
        print(f"{'questions':<10}{'format':<10}{'Acc@0.5':<22}{'mask mIoU':<22}{'ms/question':>12}")
        print("\n".join(rows))
        large = gigabytes_of_large_models()
        print(f"\n{'format':<10}{'MB':>8}" + "".join(f"{f'{size}, GB':>10}" for size in large))
        for name, folder in folders.items():
            megabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
            print(f"{name:<10}{megabytes:>8.1f}" + "".join(f"{sizes[name]:>10.1f}" for sizes in large.values()))


if __name__ == "__main__":
    main()
