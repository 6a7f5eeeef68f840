"""Tiny random text and vision backbones, saved as the Hub's folders are. No test lives here."""

from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


TINY_IMAGE_SIZE = 32
TINY_PATCH_SIZE = 8
TINY_SIGNALS = {
    "box_config": {"hidden_size": 64},
    "point_config": {"hidden_size": 64},
    "mask_config": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "mlp_dim": 64,
        "upscale_channels": 8,
        "encoder_channels": [8, 16],
        "encoder_grid": 4,
    },
}

# name -> (config class, what differs from the shared sizes below). SmolLM is a Llama with an odd number of heads, tied.
TEXT_FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "num_key_value_heads": 1}),
    "smollm": (
        "LlamaConfig",
        {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}
# name -> (model class, image processor class). `clip` and `siglip` are the folders as published, text tower included.
VISION_FAMILIES = {
    "clip": ("CLIPModel", "CLIPImageProcessor"),
    "clip_vision": ("CLIPVisionModel", "CLIPImageProcessor"),
    "siglip": ("SiglipModel", "SiglipImageProcessor"),
    "siglip_vision": ("SiglipVisionModel", "SiglipImageProcessor"),
    "dinov2": ("Dinov2Model", "BitImageProcessor"),
    "dinov2_registers": ("Dinov2WithRegistersModel", "BitImageProcessor"),
}
# Towers whose layers are maps of several sizes, by config class; all read 32-pixel images here.
PYRAMID_FAMILIES = {
    "convnextv2": ("ConvNextV2Config", {"hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "num_stages": 3}),
    "swin": ("SwinConfig", {"embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 2}),
    "resnet": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 12, 16], "depths": [1, 1, 1]}),
    "hiera": (
        "HieraConfig",
        {"embed_dim": 12, "depths": [1, 1, 1], "num_heads": [1, 1, 2], "num_query_pool": 2, "masked_unit_size": [4, 4]},
    ),
    "mobilenet_v2": ("MobileNetV2Config", {"depth_multiplier": 0.25, "finegrained_output": False}),
}
TOKENIZER_CORPUS = [
    "What is in the picture? Where is the red cup on the left of the table?",
    "Find every person, dog, cat and chair. There is no zebra. Segment the largest one.",
    "user assistant system: the man in the blue shirt, second from the right.",
]


class Backbones(NamedTuple):
    """Folders of a vision tower and of a causal language model, as `from_vision_text_pretrained` takes them."""

    vision: str
    text: str


def tiny_tokenizer(chat_template: str | None = None) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 entries: any text goes in and comes back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_CORPUS, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = chat_template
    return fast


def save_tiny_text(family: str, folder: Path, chat_template: str | None = None) -> str:
    """Save a random causal language model of `TEXT_FAMILIES` with its tokenizer; returns the folder."""
    config_class, differs = TEXT_FAMILIES[family]
    tokenizer = tiny_tokenizer(chat_template)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family == "gemma",
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = getattr(transformers, config_class)(**(sizes | differs))
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_tiny_pyramid(family: str, folder: Path) -> str:
    """Save a random tower of `PYRAMID_FAMILIES` with its image processor; returns the folder."""
    config_class, sizes = PYRAMID_FAMILIES[family]
    if family == "hiera":
        sizes = sizes | {"image_size": [TINY_IMAGE_SIZE, TINY_IMAGE_SIZE]}
    elif family != "resnet":
        sizes = sizes | {"image_size": TINY_IMAGE_SIZE}
    torch.manual_seed(0)
    tower = transformers.AutoModel.from_config(getattr(transformers, config_class)(**sizes))
    for module in tower.modules():
        if isinstance(module, torch.nn.Conv2d):
            # With the library's N(0, 0.02) and batch norm in eval mode nothing would reach the last maps.
            torch.nn.init.kaiming_normal_(module.weight)
    tower.save_pretrained(folder)
    size = {"height": TINY_IMAGE_SIZE, "width": TINY_IMAGE_SIZE}
    transformers.BitImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    return str(folder)


def save_tiny_vision(
    family: str, folder: Path, image_size: int = TINY_IMAGE_SIZE, patch_size: int = TINY_PATCH_SIZE
) -> str:
    """Save a random vision tower of `VISION_FAMILIES` with its image processor; returns the folder."""
    model_name, processor_name = VISION_FAMILIES[family]
    model_class = getattr(transformers, model_name)
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if "Dinov2" in model_name:
        config = model_class.config_class(**tower, mlp_ratio=2, image_size=image_size, patch_size=patch_size)
    else:
        tower |= {"intermediate_size": 64}
        vision = tower | {"image_size": image_size, "patch_size": patch_size}
        if model_name.endswith("VisionModel"):
            config = model_class.config_class(**vision)
        else:
            text = tower | {
                "vocab_size": 64,
                "projection_dim": 32,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            }
            config = model_class.config_class(vision_config=vision | {"projection_dim": 32}, text_config=text)
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    kwargs = {"crop_size": size} if processor_name != "SiglipImageProcessor" else {}
    getattr(transformers, processor_name)(size=size, **kwargs).save_pretrained(folder)
    return str(folder)


def save_tiny_llava(folder: Path, chat_template: str) -> str:
    """Save a random LLaVA checkpoint with its processor, as the Hub's are; returns the folder."""
    save_tiny_vlm("llava", folder, chat_template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    size = {"height": TINY_IMAGE_SIZE, "width": TINY_IMAGE_SIZE}
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=TINY_PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(folder)
    return str(folder)


def save_tiny_vlm(kind: str, folder: Path, chat_template: str, vision: dict | None = None, **config) -> str:
    """Save a random `llava` or `video_llava` with its tokenizer; returns the folder.

    Args:
        vision: what differs from a CLIP tower of three layers.
        config: other arguments of the model's config.
    """
    tokenizer = tiny_tokenizer(chat_template)
    tokens = ("<image>", "<video>")
    tokenizer.add_tokens(
        [transformers.AddedToken(token, normalized=False, special=True) for token in tokens], special_tokens=True
    )
    image_id, video_id = tokenizer.convert_tokens_to_ids(tokens)
    config_class, model_class = {
        "llava": (transformers.LlavaConfig, transformers.LlavaForConditionalGeneration),
        "video_llava": (transformers.VideoLlavaConfig, transformers.VideoLlavaForConditionalGeneration),
    }[kind]
    vision_sizes = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": TINY_IMAGE_SIZE,
        "patch_size": TINY_PATCH_SIZE,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer) + 3,  # LLaVA's table is padded, too
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    settings = {
        "vision_config": vision_sizes | (vision or {}),
        "text_config": text,
        "image_token_index": image_id,
        "image_seq_length": (TINY_IMAGE_SIZE // TINY_PATCH_SIZE) ** 2,
    }
    if kind == "video_llava":
        settings["video_token_index"] = video_id
    torch.manual_seed(0)
    model_class(config_class(**settings, **config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
