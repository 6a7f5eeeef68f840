"""
The whole path on real photos: a COCO folder goes in, a model trained from random weights answers by itself.

Answering for the photos that it was trained on proves the way from pixels to pixels and nothing more.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from backbones import tiny_tokenizer


pytestmark = pytest.mark.slow

SEED = 0
# Photos, by data set and id. The first eight may be shown: their licences are 4 and 5 (COCO's numbering).
SHOWN = {"tiny_coco": [60623, 412151, 522418, 144941, 173350], "coco128": [208, 309, 529]}
OTHERS = {"tiny_coco": [318219, 574769, 515289, 222564, 118113], "coco128": [143, 536, 443]}
ANNOTATIONS = {
    "tiny_coco": "tiny_coco/annotations/instances_train2017.json",
    "coco128": "coco128/instances_train2017.json",
}
LEAST_AREA_SHARE = 0.01  # of the padded square
WIDTH, IMAGE_SIZE, PATCH_SIZE = 192, 256, 16


def save_backbones(folder: Path) -> tuple[str, str]:
    """A CLIP tower and a Llama of four layers each, random."""
    torch.manual_seed(SEED)
    tokenizer = tiny_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        initializer_range=WIDTH**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    LlamaForCausalLM(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return str(folder / "vision"), str(folder / "text")


def sources(data_dir: Path, least_area_share: float) -> list[dict]:
    return [
        {
            "source": "coco",
            "annotations": str(data_dir / annotations),
            "images": str(data_dir / name / "train2017"),
            "tasks": ["refer"],
            "image_ids": SHOWN[name] + OTHERS[name],
            "min_area_share": least_area_share,
            "evaluation": True,
        }
        for name, annotations in ANNOTATIONS.items()
    ]


def answer(model, processor, rows) -> list[dict]:
    """What the model says to each row's prompt by itself, and how it compares in pixels of the original photo."""
    scored = []
    for start in range(0, len(rows), 16):
        batch = [rows[index] for index in range(start, min(start + 16, len(rows)))]
        images = [row["image"].convert("RGB") for row in batch]
        messages = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": image},
                        {"type": "text", "text": row["messages"][0]["content"].removeprefix("<image>")},
                    ],
                }
            ]
            for row, image in zip(batch, images, strict=True)
        ]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        sizes = [(image.height, image.width) for image in images]
        results = processor.post_process_generation(output, target_sizes=sizes, mask_format="rle")
        for row, image, result in zip(batch, images, results, strict=True):
            box_iou = mask_iou = 0.0
            if result["objects"]:
                found = result["objects"][0]
                boxes = [np.array([[x0, y0, x1 - x0, y1 - y0]]) for x0, y0, x1, y1 in (found["box"], row["boxes"][0])]
                box_iou = float(coco_mask.iou(*boxes, [0])[0, 0])
                mask_iou = float(coco_mask.iou([found["mask"]], [row["masks"][0]], [0])[0, 0])
            x0, y0, x1, y1 = row["boxes"][0]
            scored.append(
                {
                    "image": image,
                    "image_id": int(row["image_id"]),
                    "prompt": row["messages"][0]["content"],
                    "result": result,
                    "emitted": len(result["objects"]) == 1 and result["text"] == "",
                    "box_iou": box_iou,
                    "mask_iou": mask_iou,
                    "large": (x1 - x0) * (y1 - y0) >= LEAST_AREA_SHARE * max(image.size) ** 2,
                }
            )
    return scored


def summary(scored: list[dict]) -> dict:
    boxes = np.array([one["box_iou"] for one in scored])
    return {
        "n": len(scored),
        "acc@0.5": round(float((boxes >= 0.5).mean()), 4),
        "acc@0.75": round(float((boxes >= 0.75).mean()), 4),
        "mask_miou": round(float(np.mean([one["mask_iou"] for one in scored])), 4),
        "emission": float(np.mean([one["emitted"] for one in scored])),
    }


def test_sixteen_photos_are_learned(data_dir, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from perceptiongpt.drawing import contact_sheet, draw_objects
    from perceptiongpt.train import train
    from perceptiongpt.training.datasets import load_sources
    from perceptiongpt.training.recipe import complete_recipe

    vision, text = save_backbones(tmp_path)
    large = load_sources(sources(data_dir, LEAST_AREA_SHARE))
    assert len(large) >= 60
    recipe = {
        "model": {
            "vision": vision,
            "text": text,
            "attn_implementation": "eager",
            "config": {
                "position_gain": 1.0,
                "signals": ["box", "mask"],
                "box_config": {"hidden_size": 256},
                "mask_config": {
                    "hidden_size": 128,
                    "num_attention_heads": 4,
                    "mlp_dim": 256,
                    "upscale_channels": 16,
                    "encoder_channels": [16, 32, 32],
                },
            },
        },
        "adapter": {"mode": "full", "train_vision_tower": True},
        "data": {"train": sources(data_dir, LEAST_AREA_SHARE), "eval": None},
        "collator": {"pack": 10, "cache_rows": 200, "seed": SEED},
        "training": {
            "max_steps": 1200,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-4,
            # Boxes are right early; the outlines of masks need a high rate for long.
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": 300},
            "warmup_steps": 50,
            "logging_steps": 20,
            "save_strategy": "no",
            "seed": SEED,
        },
    }
    output = Path(os.environ.get("PERCEPTIONGPT_LEARNING_OUTPUT", tmp_path / "learned"))
    started = time.monotonic()
    train(complete_recipe(recipe), output)
    seconds = time.monotonic() - started

    model = AutoModelForImageTextToText.from_pretrained(output).eval()
    processor = AutoProcessor.from_pretrained(output)
    everything = load_sources(sources(data_dir, 0.0))
    scored = answer(model, processor, everything)
    report = {
        "seconds": round(seconds),
        "large": summary([one for one in scored if one["large"]]),
        "smaller": summary([one for one in scored if not one["large"]]),
    }
    print(json.dumps(report))
    (output / "report.json").write_text(json.dumps(report))
    shown = [number for numbers in SHOWN.values() for number in numbers]
    pictures = [draw_together(scored, image_id, draw_objects) for image_id in shown]
    contact_sheet(pictures, 4, output / "contact_sheet.jpg")
    assert (output / "losses.png").exists() and Image.open(output / "contact_sheet.jpg").width > 1000

    # Seeds 0, 1 and 2 gave 1.0, 1.0, 0.859 to 0.885 and 1.0.
    result = report["large"]
    assert result["n"] == len(large)
    assert result["acc@0.5"] >= 0.97 and result["acc@0.75"] >= 0.88 and result["mask_miou"] >= 0.78
    assert result["emission"] == 1.0


def draw_together(scored: list[dict], image_id: int, draw_objects) -> Image.Image:
    """One photo with the answers to all the questions about its large objects, each under its question's phrase."""
    of_image = [one for one in scored if one["image_id"] == image_id and one["large"] and one["result"]["objects"]]
    objects = [
        {**one["result"]["objects"][0], "phrase": one["prompt"].removeprefix("<image>Find ").rstrip(".")}
        for one in of_image
    ]
    return draw_objects(of_image[0]["image"], {"objects": objects})
