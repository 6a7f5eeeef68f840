"""What grounding and answering cost, beside a LLaVA with the same backbones and beside what the machine allows.

    python benchmarks/speed.py                       # small: the size of the checkpoint in the root
    python benchmarks/speed.py --size 0.5B           # Qwen2.5-0.5B with CLIP ViT-B/16: 2 GB of memory, some minutes
    python benchmarks/speed.py --size 0.5B --device cuda --dtype bfloat16

All weights are random. Every line compares two runs that take turns within one process: the median of the ratios of its
pairs, and the 95 % interval of that median from its order statistics. A bar is met if the interval reaches it. Floors
are what no program could be faster than: the bytes of the weights over the memory bandwidth for a decoding step, the
multiplications over the speed of a large matrix product for a prefill.
"""

import argparse
import gc
import math
import os
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from perceptiongpt import PerceptionGPTConfig, PerceptionGPTForConditionalGeneration


TEXT_TOKENS = 16  # of a prompt, beside its image
PHRASES = 16
STEPS = 32  # decoded, for the cost of one
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
# Bars by line and size; `None` where the line is only reported.
BARS = {
    "a decoded token, beside LLaVA": {"small": 1.08, "0.5B": 1.03},
    "generate() of one token, beside LLaVA": {"small": None, "0.5B": None},
    "ground(), box, beside the prefill": {"small": 1.03, "0.5B": 1.01},
    "ground(), box and mask, beside the prefill": {"small": 1.45, "0.5B": 1.05},
    "16 calls, beside 16 phrases on one prefix": {"small": 6.0, "0.5B": 6.0},
}


def build(size: str, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our model and LLaVA with backbones of the same shapes."""
    sizes = SIZES[size]
    vision = {"model_type": "clip_vision_model", **sizes["vision"]}
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


def prompts(model, rows: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Questions of unlike words about one image, as the processor would make them."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    image = torch.full((rows, config.image_seq_length), config.image_token_id)
    words = torch.randint(5, 500, (rows, TEXT_TOKENS - 1), generator=generator)
    side = config.vision_config.image_size
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


def compare(line: str, size: str, pairs: int, first: Callable[[], float], second: Callable[[], float]) -> None:
    """Print the ratio of two times, measured in turns after one pair that is not counted."""
    first(), second()
    times = []
    for index in range(pairs):
        gc.collect()
        if index % 2:
            b, a = second(), first()
        else:
            a, b = first(), second()
        times.append((a, b))
    median, low, high = median_interval([a / b for a, b in times])
    a, b = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    bar, verdict = BARS[line][size], ""
    if bar is not None:
        at_least = bar > 2
        met = high >= bar if at_least else low <= bar
        verdict = f"   bar {'>=' if at_least else '<='} {bar:g}: {'met' if met else 'NOT met'}"
    print(
        f"{line:44s} {median:7.3f} [{low:.3f}, {high:.3f}] of {pairs} pairs ({a:.2f} ms, {b:.2f} ms){verdict}",
        flush=True,
    )


def print_floors(model, tokens: int, device: str, dtype: torch.dtype) -> None:
    """Print the bounds that the machine sets, from its bandwidth and its matrix product as measured just now."""
    block = torch.empty(2**26 if device != "cpu" else 2**25, device=device)
    bandwidth = block.nbytes / min(seconds(lambda: block.sum()) for _ in range(5))
    side = 1024 if device == "cpu" else 8192
    square = torch.randn(side, side, device=device, dtype=dtype)
    products = 2 * side**3 / min(seconds(lambda: square @ square) for _ in range(5))
    text = sum(p.numel() for p in model.model.language_model.layers.parameters())
    head = model.lm_head.weight.numel()
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    step = (text + head) * model.lm_head.weight.element_size() / bandwidth
    prefill = 2 * (text * tokens + head + tower * model.config.image_seq_length) / products
    print(
        f"floors: decoding step {1e3 * step:.2f} ms at {bandwidth / 1e9:.1f} GB/s; prefill {1e3 * prefill:.2f} ms at "
        f"{products / 1e9:.0f} GFLOP/s"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--pairs", type=int, help="default: 100 at the small size, 15 at 0.5B; bars above 3x need 3")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    size, device, dtype = arguments.size, arguments.device, getattr(torch, arguments.dtype)
    pairs = arguments.pairs or (100 if size == "small" else 15)

    ours, llava = build(size, device, dtype)
    inputs = prompts(ours, 1, device, dtype)
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    threads = torch.get_num_threads()
    print(f"{size}, {device}, {arguments.dtype}, {threads} threads, load {load}, torch {torch.__version__}")
    print_floors(ours, inputs["input_ids"].shape[1], device, dtype)

    def generate(model, tokens: int) -> float:
        return seconds(
            lambda: model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, return_dict_in_generate=True
            )
        )

    def token(model) -> float:
        return (generate(model, STEPS + 1) - generate(model, 1)) / STEPS

    def prefill() -> float:
        return seconds(lambda: ours(**inputs, use_cache=True, logits_to_keep=1))

    lines = iter(BARS)
    compare(next(lines), size, pairs, lambda: token(ours), lambda: token(llava))
    compare(next(lines), size, pairs, lambda: generate(ours, 1), lambda: generate(llava, 1))
    # Without a `<vis>` nothing would be decoded: in the lines below the state that ends a prompt predicts one.
    always = torch.zeros_like(ours.lm_head.weight)
    state = ours(**inputs, logits_to_keep=1).last_hidden_state[0, -1]
    always[ours.config.vis_token_id] = state
    head, ours.lm_head.weight = ours.lm_head.weight, torch.nn.Parameter(always)
    found = ours.ground(**inputs)
    assert bool(found.object_valid.all())
    compare(next(lines), size, pairs, lambda: seconds(lambda: ours.ground(**inputs, signals=["box"])), prefill)
    compare(next(lines), size, pairs, lambda: seconds(lambda: ours.ground(**inputs, signals=["box", "mask"])), prefill)
    ours.lm_head.weight = head

    phrases = prompts(ours, PHRASES, device, dtype)
    singles = [{name: value[row : row + 1] for name, value in phrases.items()} for row in range(PHRASES)]

    def on_a_prefix():
        prefix = ours.encode_prefix(**phrases)
        ours.ground(prefix=prefix, **phrases)

    def one_by_one():
        for single in singles:
            ours.ground(**single)

    few = max(3, pairs // 5)
    compare(next(lines), size, few, lambda: seconds(one_by_one), lambda: seconds(on_a_prefix))


if __name__ == "__main__":
    main()
