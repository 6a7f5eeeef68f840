"""What the speed benchmarks share: the two models, prompts, time, memory, and a line that compares two runs."""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import profile
from transformers import LlavaConfig, LlavaForConditionalGeneration

from perceptiongpt import PerceptionGPTConfig, PerceptionGPTForConditionalGeneration


TEXT_TOKENS = 16  # of a prompt, beside its image
# `special`: the first of the twelve ids that the processor adds, at the end of the vocabulary.
SIZES = {
    "small": {
        "vision": {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 5,
                   "image_size": 128, "patch_size": 16},
        "text": {"model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
                 "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 612},
        "signals": {"box_config": {"hidden_size": 256}, "point_config": {"hidden_size": 256},
                    "mask_config": {"hidden_size": 128, "num_attention_heads": 4, "mlp_dim": 256,
                                    "upscale_channels": 16, "encoder_channels": [16, 32, 32], "encoder_grid": 4}},
        "special": 600,
    },
    "0.5B": {
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                   "image_size": 224, "patch_size": 16},
        "text": {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                 "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
                 "tie_word_embeddings": True},
        "signals": {},
        "special": 151700,
    },
}  # fmt: skip


def build(
    size: str, device: str, dtype: torch.dtype, image_size: int | None = None
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our model and LLaVA with backbones of the same shapes, reading images of `image_size` or their usual size."""
    sizes = SIZES[size]
    vision = {"model_type": "clip_vision_model", **sizes["vision"]}
    vision["image_size"] = image_size or vision["image_size"]
    text, first = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **sizes["text"]}, sizes["special"]
    names = ("image_token_id", "vis_token_id", "phrase_start_token_id", "phrase_end_token_id")
    ids = {name: first + index for index, name in enumerate(names)}
    ids["reserved_token_ids"] = list(range(first + 4, first + 12))
    tied = text.get("tie_word_embeddings", False)
    common = {"vision_config": vision, "text_config": text, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    ours = PerceptionGPTForConditionalGeneration(PerceptionGPTConfig(**common, **ids, **sizes["signals"]))
    cells = (vision["image_size"] // vision["patch_size"]) ** 2
    llava = LlavaForConditionalGeneration(LlavaConfig(**common, image_token_index=first, image_seq_length=cells))
    return tuple(model.eval().to(device, dtype) for model in (ours, llava))


def prompts(model, rows: int, device: str, dtype: torch.dtype, tokens: int = TEXT_TOKENS) -> dict[str, torch.Tensor]:
    """Questions of unlike words about one image, as the processor would make them."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    image = torch.full((rows, config.image_seq_length), config.image_token_id)
    words = torch.randint(5, 500, (rows, tokens - 1), generator=generator)
    side = config.image_size
    pixels = torch.randn(1, 3, side, side, generator=generator).expand(rows, -1, -1, -1)
    ids = torch.cat([torch.ones(rows, 1, dtype=torch.long), image, words], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}
    return {name: value.to(device) for name, value in inputs.items()}


def seconds(run: Callable[[], object]) -> float:
    """The wall-clock time of one call, until the device is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % interval from order statistics, which assumes nothing about the distribution."""
    ordered, count = sorted(values), len(values)
    rank, below = 0, 0.5**count
    while rank < count // 2 and below + math.comb(count, rank + 1) * 0.5**count <= 0.025:
        rank += 1
        below += math.comb(count, rank) * 0.5**count
    return statistics.median(ordered), ordered[rank], ordered[count - 1 - rank]


def bytes_at_most(run: Callable[[], object], device: str) -> int:
    """The most memory that torch had allocated while `run` ran, beyond what there was before."""
    if device != "cpu":
        before = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        run()
        return torch.accelerator.max_memory_allocated() - before
    with profile(profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


class Lines:
    """Prints one line after another, each with the bar that it has at a size.

    Args:
        bars: by the name of a line its bars by size, such as `<= 1.08` or `>= 6`.
        size: one of `SIZES`.
        pairs: how often each line is measured; lines whose bar is above 3 need a few only.
    """

    def __init__(self, bars: dict[str, dict[str, str]], size: str, pairs: int):
        self.bars, self.size, self.pairs = bars, size, pairs

    def compare(
        self, line: str, first: Callable[[], float], second: Callable[[], float], floor: float | None = None
    ) -> None:
        """Print the ratio of two measurements, taken in turns after one pair that is not counted.

        Args:
            floor: the least seconds that any program needs for the first; None where it is not known.
        """
        stated, verdict = self.bars[line].get(self.size), ""
        sign, bar = stated.split() if stated else ("", "0")
        bar = float(bar)
        pairs = self.pairs if bar <= 3 else min(self.pairs, 5)
        first(), second()
        measured = []
        for index in range(pairs):
            gc.collect()
            if index % 2:
                b, a = second(), first()
            else:
                a, b = first(), second()
            measured.append((a, b))
        median, low, high = median_interval([a / b for a, b in measured])
        a, b = (statistics.median(column) for column in zip(*measured, strict=True))
        if stated:
            met = high >= bar if sign == ">=" else low <= bar
            verdict = f"   bar {stated}: {'met' if met else 'NOT met'}"
        least = f"{1e3 * floor:9.2f}" if floor is not None else f"{'':9}"
        print(
            f"{line:54s}{f'{median:.3f} [{low:.3f}, {high:.3f}] of {pairs}':>34}{1e3 * a:13.2f}{1e3 * b:11.2f}{least}"
            f"{verdict}",
            flush=True,
        )

    @staticmethod
    def print_heads(unit: str = "ms") -> None:
        """The heads of the columns."""
        print(f"{'':54s}{'ratio [95 %] of pairs':>34}{'first, ' + unit:>13}{'second':>11}{'floor':>9}")


class Floors:
    """What no program could be faster than: for decoding the bytes of the weights over the memory's bandwidth, for a
    prefill multiplications and additions over the speed of a large matrix product; both measured just now.

    Attributes:
        step, prefill, image: seconds of a decoding step, of a forward over a prompt, of the tower for one image.
    """

    def __init__(self, model, tokens: int, device: str, dtype: torch.dtype):
        block = torch.empty(2**26 if device != "cpu" else 2**25, device=device)
        bandwidth = block.nbytes / min(seconds(lambda: block.sum()) for _ in range(5))
        side = 1024 if device == "cpu" else 8192
        square = torch.randn(side, side, device=device, dtype=dtype)
        products = 2 * side**3 / min(seconds(lambda: square @ square) for _ in range(5))
        text = sum(p.numel() for p in model.model.language_model.layers.parameters())
        head = model.lm_head.weight.numel()
        tower = sum(p.numel() for p in model.model.vision_tower.parameters())
        self.step = (text + head) * model.lm_head.weight.element_size() / bandwidth
        self.image = 2 * tower * model.config.image_seq_length / products
        self.prefill = 2 * (text * tokens + head) / products + self.image
        self.machine = f"{bandwidth / 1e9:.1f} GB/s, {products / 1e9:.0f} GFLOP/s"


def print_machine(size: str, device: str, dtype: torch.dtype, floors: Floors) -> None:
    """The first line of a benchmark."""
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    name = str(dtype).removeprefix("torch.")
    print(
        f"{size}, {device}, {name}, {torch.get_num_threads()} threads, load {load}, torch {torch.__version__}, "
        f"{floors.machine}"
    )
