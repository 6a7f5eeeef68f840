"""Backbones for a model of drawn shapes from random weights: what the checkpoint in the root started from."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from perceptiongpt.data.shapes import COLORS, SHAPES
from perceptiongpt.data.templates import load_templates


def small_backbones(folder: Path, source: dict) -> None:
    """Save a small CLIP tower that knows the drawn shapes, and a small random Llama with a tokenizer of its own."""
    torch.manual_seed(0)
    things = [f"the {place} {color} {shape}" for place in ("left", "largest") for color in COLORS for shape in SHAPES]
    templates = [load_templates()[task] for task in ("refer", "detect", "box_to_mask")]
    prompts = [prompt for task in templates for prompt in (*task["prompts"], task["evaluation"])]
    corpus = [prompt.replace("{phrase}", thing) for prompt in prompts for thing in things]
    corpus += ["user assistant There is no"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "text")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        initializer_range=0.07,  # 1 / sqrt(hidden_size): the usual 0.02 is for models twenty times as wide
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(text).save_pretrained(folder / "text")
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=5,
        image_size=128,
        patch_size=16,
    )
    tower = CLIPVisionModel(vision)
    warm_up_tower(tower, source)
    tower.save_pretrained(folder / "vision")


def patch_labels(folder: Path, patch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The images of a drawn COCO folder, uint8 `(N, 3, 128, 128)`, and for each patch of each the category that covers
    most of it, `(N, patches)`, 0 for none, with that object's box, xyxy in 0..1, `(N, patches, 4)`.
    """
    content = json.loads((folder / "instances.json").read_text())
    objects = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    images, labels, boxes = [], [], []
    for image in content["images"]:
        pixels = np.asarray(Image.open(folder / "images" / image["file_name"]))
        cover = Image.new("L", (image["width"], image["height"]))
        for number, annotation in enumerate(objects[image["id"]], 1):
            ImageDraw.Draw(cover).polygon(annotation["segmentation"][0], fill=number)
        grid = image["width"] // patch_size
        patches = np.asarray(cover).reshape(grid, patch_size, grid, patch_size).swapaxes(1, 2).reshape(grid * grid, -1)
        numbers = np.arange(1, len(objects[image["id"]]) + 1)
        share = (patches[:, None] == numbers[:, None]).mean(-1)
        owner = np.where(share.max(1) > 0.15, share.argmax(1) + 1, 0)
        categories = np.array([0] + [annotation["category_id"] + 1 for annotation in objects[image["id"]]])
        corners = [[x, y, x + width, y + height] for x, y, width, height in (a["bbox"] for a in objects[image["id"]])]
        images.append(pixels.transpose(2, 0, 1))
        labels.append(categories[owner])
        boxes.append(np.array([[0.0] * 4, *corners])[owner] / image["width"])
    return torch.tensor(np.array(images)), torch.tensor(np.array(labels)), torch.tensor(np.array(boxes)).float()


def warm_up_tower(tower: CLIPVisionModel, source: dict, num_steps: int = 1200, batch_size: int = 48) -> None:
    """Train a fresh tower to name what each patch shows: from answers alone that would take very long."""
    config = tower.config
    images, labels, boxes = patch_labels(Path(source["images"]).parent, config.patch_size)
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    num_classes = int(labels.max()) + 1
    head = torch.nn.Linear(config.hidden_size, num_classes + 4)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_steps, pct_start=0.1)
    progress = trange(num_steps, desc="warming up the tower", unit="step", disable=None)
    for _ in progress:
        index = torch.randint(len(images), (batch_size,))
        features = tower((images[index].float() / 255 - mean) / std).last_hidden_state[:, 1:]
        classes, corners = head(features).split([num_classes, 4], dim=-1)
        target, covered = labels[index], labels[index] > 0
        box_loss = (corners.sigmoid() - boxes[index])[covered].abs().mean()
        loss = torch.nn.functional.cross_entropy(classes.flatten(0, 1), target.flatten()) + 5 * box_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        accuracy = (classes.argmax(-1) == target)[covered].float().mean()
        progress.set_postfix(accuracy=f"{accuracy:.2f}", box_error=f"{box_loss:.3f}", refresh=False)
