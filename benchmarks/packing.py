"""What packing is worth: training steps on N questions about each image, packed behind it and as rows of their own.

    python benchmarks/packing.py                     # small: the size of the checkpoint in the root
    python benchmarks/packing.py --size 0.5B --questions 8 --pairs 3
    python benchmarks/packing.py --size 0.5B --device cuda --dtype bfloat16

All weights are random. A step is forward, losses and backward of all weights but the tower's, without the optimizer;
each question asks for one box. The two ways take turns, on the same questions.
"""

import argparse
import statistics

import torch
from speed import SIZES, build, median_interval, seconds


IMAGES = 2  # in a batch
PROMPT_TOKENS, ANSWER_TOKENS = 14, 2  # the answer: `<vis>` and the end


def batches(config, questions: int, device: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """The same questions packed and as rows of their own, as `PerceptionCollator` makes them."""
    generator = torch.Generator().manual_seed(0)
    side, cells = config.image_size, config.image_seq_length
    prefix = torch.cat([torch.tensor([1]), torch.full((cells,), config.image_token_id)])
    words = torch.randint(5, 500, (IMAGES, questions, PROMPT_TOKENS), generator=generator)
    answer = torch.tensor([config.vis_token_id, 2]).expand(IMAGES, questions, -1)
    texts = torch.cat([words, answer], dim=2)
    targets = texts.clone()
    targets[:, :, :PROMPT_TOKENS] = -100
    low, high = torch.rand(2, IMAGES, questions, 2, generator=generator).mul(0.4)
    boxes = torch.cat([low, high + 0.5], dim=-1)
    pixels = torch.randn(IMAGES, 3, side, side, generator=generator).to(dtype)

    def lay_out(ids: torch.Tensor, labels: torch.Tensor, boxes: torch.Tensor, pixels: torch.Tensor) -> dict:
        rows = len(ids)
        return {
            "input_ids": torch.cat([prefix.expand(rows, -1), ids], dim=1),
            "labels": torch.cat([torch.full((rows, len(prefix)), -100), labels], dim=1),
            "boxes": boxes,
            "pixel_values": pixels,
        }

    alone = lay_out(texts.flatten(0, 1), targets.flatten(0, 1), boxes.flatten(0, 1)[:, None],
                    pixels.repeat_interleave(questions, dim=0))  # fmt: skip
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    packed = lay_out(texts.flatten(1), targets.flatten(1), boxes, pixels)
    length = PROMPT_TOKENS + ANSWER_TOKENS
    owner = torch.cat([torch.zeros(len(prefix)), torch.arange(1, questions + 1).repeat_interleave(length)])
    mask = ((owner[:, None] == owner) | (owner == 0)[None]) & torch.ones(len(owner), len(owner)).tril().bool()
    positions = torch.cat([torch.arange(len(prefix)), len(prefix) + torch.arange(length).repeat(questions)])
    packed["attention_mask"] = mask.expand(IMAGES, 1, -1, -1)
    packed["position_ids"] = positions.expand(IMAGES, -1)
    return tuple({name: value.to(device) for name, value in batch.items()} for batch in (packed, alone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    model, _ = build(arguments.size, device, dtype)
    model.train().model.vision_tower.requires_grad_(False)

    def step(batch: dict) -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    print(
        f"{arguments.size}, {device}, {arguments.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(
        f"{'questions an image':>18}{'tokens a row':>14}{'packed, ms':>12}{'alone, ms':>12}{'questions/s':>13}  faster"
    )
    for questions in arguments.questions:
        packed, alone = batches(model.config, questions, device, dtype)
        step(packed), step(alone)
        times = [(seconds(lambda: step(packed)), seconds(lambda: step(alone))) for _ in range(arguments.pairs)]
        median, low, high = median_interval([second / first for first, second in times])
        first, second = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"{questions:>18}{packed['input_ids'].shape[1]:>14}{1e3 * first:>12.1f}{1e3 * second:>12.1f}"
            f"{IMAGES * questions / first:>13.1f}  {median:.2f}x [{low:.2f}, {high:.2f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
