"""What a training step costs, in time and memory, beside a LLaVA with the same backbones.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --size 0.5B --pairs 15

All weights are random. A step is forward, losses, backward and AdamW over all weights but the tower's, which is frozen
in both. Lines are those of speed.py. Memory is what torch has allocated at most in a step, beyond weights and
optimizer; its unit is MiB.
"""

import argparse
from collections.abc import Callable

import torch
from measuring import SIZES, Floors, Lines, build, bytes_at_most, print_machine, prompts, seconds


ROWS, ANSWER = 4, 3  # rows of a batch; tokens of an answer, the first of which is `<vis>` where there are signals
BARS = {
    "a step, rows without signals, beside LLaVA": {"small": "<= 1.05", "0.5B": "<= 1.03"},
    "a step, box and mask on every row, beside LLaVA": {"small": "<= 1.25", "0.5B": "<= 1.15"},
    "peak memory of that step, beside LLaVA": {"small": "<= 1.15", "0.5B": "<= 1.1"},
}


def training_batch(config, device: str, dtype: torch.dtype, inputs: dict) -> dict:
    """Rows with an answer of a `<vis>`, a word and the end; the `<vis>` has a box and a mask."""
    answer = torch.tensor([config.vis_token_id, 10, 2], device=device).expand(ROWS, -1)
    ids = torch.cat([inputs["input_ids"], answer], dim=1)
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    side = config.mask_config.size
    masks = torch.zeros(ROWS, 1, side, side, dtype=torch.uint8, device=device)
    masks[:, :, side // 4 : side // 2, side // 4 : side // 2] = 1
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": inputs["pixel_values"],
        "boxes": torch.tensor([[[0.25, 0.25, 0.5, 0.5]]], device=device).expand(ROWS, -1, -1),
        "masks": masks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--pairs", type=int, help="default: 100 at the small size, 15 at 0.5B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    size, device, dtype = arguments.size, arguments.device, getattr(torch, arguments.dtype)
    ours, llava = build(size, device, dtype)
    inputs = prompts(ours, ROWS, device, dtype)
    with_signals = training_batch(ours.config, device, dtype, inputs)
    plain = {name: value for name, value in with_signals.items() if name not in ("boxes", "masks")}
    # The same rows with a word in place of `<vis>`: a LLaVA has no such token, and a row without signals none either.
    plain |= {
        name: plain[name].masked_fill(plain[name] == ours.config.vis_token_id, 11) for name in ("input_ids", "labels")
    }

    def stepper(model) -> Callable[[dict], None]:
        model.train()
        model.model.vision_tower.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

        def step(batch: dict) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    our_step, llava_step = stepper(ours), stepper(llava)
    floors = Floors(ours, plain["input_ids"].shape[1], device, dtype)
    print_machine(size, device, dtype, floors)
    lines = Lines(BARS, size, arguments.pairs or (100 if size == "small" else 15))
    lines.print_heads()
    # Forward and backward of what trains; the frozen tower runs forward alone.
    floor = ROWS * (3 * floors.prefill - 2 * floors.image)
    first, second, third = BARS
    lines.compare(first, lambda: seconds(lambda: our_step(plain)), lambda: seconds(lambda: llava_step(plain)), floor)
    lines.compare(
        second, lambda: seconds(lambda: our_step(with_signals)), lambda: seconds(lambda: llava_step(plain)), floor
    )
    lines.pairs = min(lines.pairs, 3)  # memory hardly varies
    lines.print_heads("MiB")

    def mebibytes(step: Callable[[dict], None], batch: dict) -> float:
        return bytes_at_most(lambda: step(batch), device) / 2**20 / 1e3  # lines print thousandths

    lines.compare(third, lambda: mebibytes(our_step, with_signals), lambda: mebibytes(llava_step, plain))


if __name__ == "__main__":
    main()
