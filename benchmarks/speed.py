"""What grounding and answering cost, beside a LLaVA with the same backbones and beside what the machine allows.

    python benchmarks/speed.py                       # small: the size of the checkpoint in the root
    python benchmarks/speed.py --size 0.5B           # Qwen2.5-0.5B with CLIP ViT-B/16: 2 GB of memory, some minutes
    python benchmarks/speed.py --size 0.5B --device cuda --dtype bfloat16

All weights are random. Every line compares two runs that take turns within one process: the median of the ratios of its
pairs, and the 95 % interval of that median from its order statistics. A bar is met if the interval reaches it. Floors
are what no program could be faster than, see `measuring.Floors`.

Digits and bins are what a LLaVA would write in place of one `<vis>`: a box as 20 tokens of digits or 4 of bins, the
contour of a mask by 32 points as 320 or 64 (paper, tables 4 and 7). Training is in training_step.py, packing in
packing.py, and how cost grows in growth.py.
"""

import argparse
from collections.abc import Callable

import torch
from measuring import SIZES, Floors, Lines, build, median_interval, print_machine, prompts, seconds
from transformers import LogitsProcessor


__all__ = ["SIZES", "build", "median_interval", "seconds"]  # for packing.py
PHRASES, MASKS, BATCH = 16, 64, 8
STEPS = 32  # decoded, for the cost of one
SHORT, CAPTION = 4, 64  # tokens of answers
DISCRETE = {"digits, box": 20, "bins, box": 4, "digits, contour": 320, "bins, contour": 64}
# Bars by line and size; without one a line is only reported.
BARS = {
    "a decoded token, beside LLaVA": {"small": "<= 1.08", "0.5B": "<= 1.03"},
    "generate() of one token, beside LLaVA": {},
    "ground(), box, beside the prefill": {"small": "<= 1.03", "0.5B": "<= 1.01"},
    "ground(), box and mask, beside the prefill": {"small": "<= 1.45", "0.5B": "<= 1.05"},
    "digits, box, beside ours beyond the prefill": {"0.5B": ">= 16"},
    "bins, box, beside ours beyond the prefill": {"0.5B": ">= 3"},
    "digits, contour, beside ours beyond the prefill": {"0.5B": ">= 150"},
    "bins, contour, beside ours beyond the prefill": {"0.5B": ">= 30"},
    "16 calls, beside 16 phrases on one prefix": {"small": ">= 6", "0.5B": ">= 6"},
    "64 masks in one batch, beside one": {"small": "<= 24", "0.5B": "<= 24"},  # on a GPU <= 4
    "one further object, box, beside a plain token": {"small": "<= 1.3", "0.5B": "<= 1.05"},
    "one further object, box and mask, beside a plain token": {},
    "8 short answers one by one, beside a batch": {"small": ">= 1.7"},
    "8 captions one by one, beside a batch": {"small": ">= 2.5", "0.5B": ">= 2.5"},
}


class Forced(LogitsProcessor):
    """Makes each step's token the one that is asked for."""

    def __init__(self, prompt_length: int, tokens: list[int]):
        self.prompt_length, self.tokens = prompt_length, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.tokens[min(input_ids.shape[1] - self.prompt_length, len(self.tokens) - 1)]] = 1e4
        return scores


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--pairs", type=int, help="default: 100 at the small size, 15 at 0.5B; bars above 3x: 5")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    size, device, dtype = arguments.size, arguments.device, getattr(torch, arguments.dtype)

    ours, llava = build(size, device, dtype)
    inputs = prompts(ours, 1, device, dtype)
    vis, end, length = ours.config.vis_token_id, ours.generation_config.eos_token_id, inputs["input_ids"].shape[1]
    floors = Floors(ours, length, device, dtype)
    print_machine(size, device, dtype, floors)
    lines = Lines(BARS, size, arguments.pairs or (100 if size == "small" else 15))
    lines.print_heads()

    def generate(model, tokens: int, given=inputs, **more) -> float:
        fixed = {"min_new_tokens": tokens} if "logits_processor" not in more else {}
        return seconds(
            lambda: model.generate(
                **given, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, **fixed, **more
            )
        )

    def forced(model, tokens: list[int], **more) -> float:
        return generate(model, len(tokens), logits_processor=[Forced(length, tokens)], **more)

    def token(model) -> float:
        return (generate(model, STEPS + 1) - generate(model, 1)) / STEPS

    def prefill() -> float:
        return seconds(lambda: ours(**inputs, use_cache=True, logits_to_keep=1))

    names = iter(BARS)
    lines.compare(next(names), lambda: token(ours), lambda: token(llava), floors.step)
    lines.compare(next(names), lambda: generate(ours, 1), lambda: generate(llava, 1), floors.prefill)
    # Without a `<vis>` nothing would be decoded: in these two lines the state that ends a prompt predicts one.
    always = torch.zeros_like(ours.lm_head.weight)
    always[vis] = ours(**inputs, logits_to_keep=1).last_hidden_state[0, -1]
    head, ours.lm_head.weight = ours.lm_head.weight, torch.nn.Parameter(always)
    assert bool(ours.ground(**inputs).object_valid.all())
    for signals in (["box"], ["box", "mask"]):

        def ground(signals=signals) -> float:
            return seconds(lambda: ours.ground(**inputs, signals=signals))

        lines.compare(next(names), ground, prefill, floors.prefill)
    ours.lm_head.weight = head

    # ---- what others write in place of `<vis>`, up to and with the end token ----
    def beyond(run: Callable[[], float]) -> Callable[[], float]:
        return lambda: max(run() - prefill(), 1e-6)

    for name, tokens in DISCRETE.items():
        signals = ["box"] if name.endswith("box") else ["box", "mask"]
        written = [10 + index % 10 for index in range(tokens)] + [end]
        lines.compare(
            next(names),
            beyond(lambda written=written: forced(llava, written)),
            beyond(lambda signals=signals: forced(ours, [vis, end], signals=signals)),
            tokens * floors.step,
        )

    phrases = prompts(ours, PHRASES, device, dtype)
    singles = [{name: value[row : row + 1] for name, value in phrases.items()} for row in range(PHRASES)]

    def on_a_prefix():
        prefix = ours.encode_prefix(**phrases)
        ours.ground(prefix=prefix, **phrases)

    def one_by_one():
        for single in singles:
            ours.ground(**single)

    lines.compare(next(names), lambda: seconds(one_by_one), lambda: seconds(on_a_prefix), PHRASES * floors.prefill)

    features = ours.get_image_features(inputs["pixel_values"], return_dict=True).mask_features

    def masks(count: int) -> float:
        states = torch.randn(count, ours.config.text_config.hidden_size, device=device, dtype=dtype)
        index = torch.zeros(count, dtype=torch.long, device=device)
        return seconds(lambda: ours.model.decode_signals(states, features, index, ["mask"]))

    line = next(names)
    if device != "cpu":
        BARS[line][size] = "<= 4"
    lines.compare(line, lambda: masks(MASKS), lambda: masks(1))

    def step_of(written: int, signals: list[str]) -> float:
        long, short = ([written] * count for count in (STEPS + 1, 1))
        return (forced(ours, long, signals=signals) - forced(ours, short, signals=signals)) / STEPS

    for signals in (["box"], ["box", "mask"]):

        def further(written: int, signals=signals) -> float:
            return step_of(written, signals)

        lines.compare(next(names), lambda f=further: f(vis), lambda f=further: f(10), floors.step)

    several = prompts(ours, BATCH, device, dtype)
    alone = [{name: value[row : row + 1] for name, value in several.items()} for row in range(BATCH)]
    for tokens in (SHORT, CAPTION):

        def each(tokens=tokens) -> float:
            return sum(generate(ours, tokens, one) for one in alone)

        floor = BATCH * (floors.prefill + tokens * floors.step)
        lines.compare(next(names), each, lambda tokens=tokens: generate(ours, tokens, several), floor)


if __name__ == "__main__":
    main()
