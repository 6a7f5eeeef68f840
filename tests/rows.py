"""Tiny random models built from a config alone, and batches of unlike rows for them. No test lives here."""

import torch
from transformers import LogitsProcessor

from backbones import TINY_IMAGE_SIZE, TINY_PATCH_SIZE, TINY_SIGNALS


VOCABULARY = 120
IMAGE, VIS = 100, 101
GRID_TOKENS = (TINY_IMAGE_SIZE // TINY_PATCH_SIZE) ** 2
MASK_SIZE = 32


def tiny_config(vision: dict | None = None, text: dict | None = None, **kwargs):
    """A config whose weights are large enough that a changed input changes every output by far more than 1e-4."""
    from perceptiongpt import PerceptionGPTConfig

    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": TINY_IMAGE_SIZE,
        "patch_size": TINY_PATCH_SIZE,
    }
    text_config = {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    ids = {
        "image_token_id": IMAGE,
        "vis_token_id": VIS,
        "phrase_start_token_id": 102,
        "phrase_end_token_id": 103,
        "reserved_token_ids": list(range(104, 112)),
    }
    signals = {**TINY_SIGNALS, "mask_config": {**TINY_SIGNALS["mask_config"], "size": MASK_SIZE}}
    return PerceptionGPTConfig(
        vision_config={**vision_config, **(vision or {})},
        text_config={**text_config, **(text or {})},
        # A small gain: in models this narrow the position of a patch would drown what the rows differ in.
        **{"position_gain": 0.25, **signals, **ids, **kwargs},
    )


def tiny_model(seed: int = 0, **kwargs):
    from perceptiongpt import PerceptionGPTForConditionalGeneration

    torch.manual_seed(seed)
    return PerceptionGPTForConditionalGeneration(tiny_config(**kwargs)).eval()


def unlike_rows() -> list[dict]:
    """Five prompts: with a box; a mask; two images, all signals and a point; no image; no signal. Then the images."""
    generator = torch.Generator().manual_seed(7)
    image = [IMAGE] * GRID_TOKENS
    square = torch.zeros(MASK_SIZE, MASK_SIZE, dtype=torch.uint8)
    square[4:20, 10:28] = 1
    return [
        {"ids": [1, 5, *image, 6, VIS, 7], "images": 1, "slots": [{"boxes": [0.1, 0.2, 0.5, 0.9]}]},
        {"ids": [1, *image, 8, VIS, 9, 10, 11], "images": 1, "slots": [{"masks": square}]},
        {
            "ids": [1, *image, 5, *image, 12, VIS, 13, VIS],
            "images": 2,
            "slots": [
                {"boxes": [0.3, 0.3, 0.4, 0.6], "masks": square.flip(0), "points": [0.3, 0.5]},
                {"points": [0.7, 0.2]},
            ],
        },
        {"ids": [1, 14, 15, 16], "images": 0, "slots": []},
        {"ids": [1, *image, 17, 18], "images": 1, "slots": []},
    ] + [{"pixels": torch.randn(5, 3, TINY_IMAGE_SIZE, TINY_IMAGE_SIZE, generator=generator)}]


def collate(rows: list[dict], pixels: torch.Tensor, padding: int = 0) -> dict:
    """Left-padded model inputs of rows whose images are `pixels`, with `padding` tokens more than needed."""
    length = max(len(row["ids"]) for row in rows) + padding
    slots = max(len(row["slots"]) for row in rows)
    inputs = {
        "input_ids": torch.zeros(len(rows), length, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), length, dtype=torch.long),
        "boxes": torch.zeros(len(rows), slots, 4),
        "masks": torch.zeros(len(rows), slots, MASK_SIZE, MASK_SIZE, dtype=torch.uint8),
        "points": torch.zeros(len(rows), slots, 2),
    }
    plurals = ("boxes", "masks", "points")
    inputs |= {f"{name}_valid": torch.zeros(len(rows), slots, dtype=torch.bool) for name in plurals}
    for index, row in enumerate(rows):
        inputs["input_ids"][index, length - len(row["ids"]) :] = torch.tensor(row["ids"])
        inputs["attention_mask"][index, length - len(row["ids"]) :] = 1
        for slot, values in enumerate(row["slots"]):
            for name, value in values.items():
                inputs[name][index, slot] = torch.as_tensor(value)
                inputs[f"{name}_valid"][index, slot] = True
    if len(pixels):
        inputs["pixel_values"] = pixels
    return inputs


def batch_and_singles(padding: int = 0) -> tuple[dict, list[dict]]:
    """The five rows as one batch, and each by itself."""
    *rows, last = unlike_rows()
    starts = [sum(row["images"] for row in rows[:index]) for index in range(len(rows))]
    singles = [
        collate([row], last["pixels"][start : start + row["images"]]) for row, start in zip(rows, starts, strict=True)
    ]
    return collate(rows, last["pixels"], padding), singles


class ForcedVis(LogitsProcessor):
    """
    Makes `<vis>` by far the likeliest token at given steps, and impossible elsewhere; never an end or an `<image>`.

    Steps are taken modulo the sequence's own tokens, so rows and beams differ in where they emit one.
    """

    def __init__(self, prompt_length: int, steps: tuple[int, ...]):
        self.prompt_length, self.steps = prompt_length, steps

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length
        scores = scores.clone()
        scores[:, [2, IMAGE, VIS]] = -1e4
        if step in self.steps:
            scores[:, VIS] = 1e4 if step % 2 else scores.max(-1).values + 0.1
        return scores
