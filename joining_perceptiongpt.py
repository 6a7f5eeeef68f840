"""New models from pretrained parts: a vision tower and a language model, or a whole vision-language model."""

import inspect

import torch
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.utils import logging

from .configuration_perceptiongpt import ADDED_TOKENS, PerceptionGPTConfig, add_perception_tokens
from .vision_perceptiongpt import has_absolute_positions


logger = logging.get_logger(__name__)

# The config's names for the first of `ADDED_TOKENS`; the rest are reserved.
TOKEN_ID_NAMES = ("image_token_id", "vis_token_id", "phrase_start_token_id", "phrase_end_token_id")

# Vision-language models whose image tokens are the patches of one layer of their tower, in order, each mapped by a
# two-layer projector of LLaVA's names: by model type the attribute that holds the tower for images.
VLM_TOWERS = {"llava": "vision_tower", "video_llava": "image_tower"}
# Models like these that are something else, each with the reason why it cannot be the base.
_TILES = "it reads an image as tiles, as many as its shape asks for"
_SHUFFLE = "it joins neighbouring patches before they are projected"
_NORMED = "its projector reads the tower's last layer after a norm, which a mixture of layers cannot express"
_BOTH_WAYS = "its tokens of a prompt or an image attend to later ones"
VLM_REFUSALS = {
    "aya_vision": _SHUFFLE,
    "cohere2_vision": _SHUFFLE,
    "deepseek_vl": _NORMED,
    "deepseek_vl_hybrid": "it reads an image with two towers",
    "fast_vlm": "its tower is a model of timm, which is not supported",
    "gemma3": _BOTH_WAYS,
    "idefics2": "a resampler stands between its tower and its language model",
    "idefics3": _SHUFFLE,
    "internvl": _SHUFFLE,
    "janus": _NORMED,
    "lighton_ocr": "it reads an image at a size of its own, not on a fixed grid",
    "llava_next": _TILES,
    "llava_next_video": _TILES,
    "llava_onevision": _TILES,
    "mistral3": "it reads an image at a size of its own, not on a fixed grid",
    "paligemma": _BOTH_WAYS,
    "perception_lm": _TILES,
    "smolvlm": _SHUFFLE,
    "vipllava": "its projector reads several layers of the tower side by side, under a norm",
}
# Arguments of towers that read images at sizes of their own.
SIZE_ARGUMENTS = ("image_sizes", "spatial_shapes", "image_grid_thw", "grid_thw")


class JoiningMixin:
    """Class methods of [`PerceptionGPTForConditionalGeneration`] that build a model around pretrained backbones."""

    @classmethod
    def from_vision_text_pretrained(cls, vision: str, text: str, *, tokenizer=None, dtype=None, **config_kwargs):
        """
        Joins a vision backbone and a causal language model, both from the Hub or a folder.

        Args:
            vision (`str`): a vision model, or a CLIP or SigLIP whose vision half is taken.
            text (`str`): a causal language model; it is loaded with its head.
            tokenizer (*optional*):
                The tokenizer that says which ids the added tokens have; by default the one beside `text`, to which they
                are added. Where there is none, they follow the vocabulary.
            dtype (`torch.dtype` or `str`, *optional*): what the backbones are loaded in.
            config_kwargs: any argument of [`PerceptionGPTConfig`]. Unless given, `position_gain` is 0 for a tower with
                absolute position embeddings, which tell where its patches lie, and 1 for any other (pass 1 for a tower
                that was never trained).
        """
        vision_config = AutoConfig.from_pretrained(vision)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        vision_tower = MODEL_MAPPING[type(vision_config)].from_pretrained(vision, config=vision_config, dtype=dtype)
        text_model = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
        if tokenizer is None:
            tokenizer = cls._find_tokenizer(text)
        return cls._join(vision_tower, text_model.base_model, text_model.lm_head, tokenizer, config_kwargs)

    @classmethod
    def from_vlm_pretrained(cls, vlm: str, *, tokenizer=None, dtype=None, **config_kwargs):
        """
        Starts from a vision-language model: the same logits at first, and signal modules to train.

        The tower, the projector, the language model and its head are taken over. `from_backbones(vlm, vlm, config)` of
        the processor takes over its chat template and its normalisation of images.

        Args:
            vlm (`str`):
                A checkpoint, from the Hub or a folder, of LLaVA or of Video-LLaVA, of which the tower for videos is
                left out.
            tokenizer, dtype, config_kwargs: as in [`from_vision_text_pretrained`].

        Raises:
            ValueError: image tokens of the checkpoint are not the patches of one layer of a tower on a fixed grid; the
                message says what they are. Where the config tells, no weights are loaded.
        """
        settings = cls._projector_settings(vlm, AutoConfig.from_pretrained(vlm))
        model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=dtype)
        if tokenizer is None:
            tokenizer = cls._find_tokenizer(vlm)
        joined = cls._join(
            getattr(model.model, VLM_TOWERS[model.config.model_type]),
            model.model.language_model,
            model.lm_head,
            tokenizer,
            {**settings, **config_kwargs},
            first_new_row=model.config.text_config.vocab_size,  # its own rows stay, so its logits do
        )
        joined.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
        return joined

    @classmethod
    def from_llava_pretrained(cls, llava: str, **kwargs):
        """The older name of [`from_vlm_pretrained`]."""
        return cls.from_vlm_pretrained(llava, **kwargs)

    @classmethod
    def _projector_settings(cls, vlm: str, config) -> dict:
        """The arguments of [`PerceptionGPTConfig`] under which image tokens are those of a vision-language model."""
        kind, refused = config.model_type, f"{vlm} cannot be the base"
        if kind == cls.config_class.model_type:
            raise ValueError(f"{vlm} is a PerceptionGPT already: load it with `from_pretrained`.")
        if kind not in VLM_TOWERS:
            reason = VLM_REFUSALS.get(kind, "its patches are not known to become image tokens one by one")
            raise ValueError(f"{refused}: a model of the type {kind!r}: {reason}. Expected {' or '.join(VLM_TOWERS)}.")
        vision, layer = config.vision_config, config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(f"{refused}: it concatenates the tower layers {layer}, expected a single one.")
        with torch.device("meta"):
            tower = AutoModel.from_config(vision)
        ragged = [name for name in SIZE_ARGUMENTS if name in inspect.signature(tower.forward).parameters]
        if ragged:
            raise ValueError(
                f"{refused}: its tower {vision.model_type!r} reads an image at a size of its own (`{ragged[0]}`), "
                "not on a fixed grid."
            )
        side = vision.image_size
        with torch.no_grad():
            tokens = tower(torch.zeros(1, 3, side, side, device="meta")).last_hidden_state.shape[1]
        left_out = int(config.vision_feature_select_strategy == "default")
        if tokens - left_out != (side // vision.patch_size) ** 2:
            raise ValueError(
                f"{refused}: with `vision_feature_select_strategy` {config.vision_feature_select_strategy!r} it reads "
                f"{tokens - left_out} of the tower's {tokens} tokens, expected the {(side // vision.patch_size) ** 2} "
                "patches alone."
            )
        # LLaVA counts the embeddings as layer 0, the mixtures start with the output of the first layer.
        initial_layer = (layer if layer >= 0 else vision.num_hidden_layers + 1 + layer) - 1
        return {
            "mixture_base_layer": initial_layer,
            "projector_hidden_act": config.projector_hidden_act,
            "multimodal_projector_bias": config.multimodal_projector_bias,
            "image_token_id": config.image_token_id,
        }

    @classmethod
    def join_configs(cls, vision: str, text: str, *, tokenizer=None, **config_kwargs) -> PerceptionGPTConfig:
        """
        The config of what [`from_vision_text_pretrained`] or, where both names are the same,
        [`from_vlm_pretrained`] makes, without reading weights: `position_gain`, which depends on them, is the
        config's default. Arguments as there.
        """
        vision_config = AutoConfig.from_pretrained(vision)
        text_config = vision_config if vision == text else AutoConfig.from_pretrained(text)
        if vision == text:
            config_kwargs = {**cls._projector_settings(vision, vision_config), **config_kwargs}
        vision_config = getattr(vision_config, "vision_config", vision_config)
        text_config = text_config.get_text_config(decoder=True)
        ids, token_ids = cls._added_token_ids(tokenizer or cls._find_tokenizer(text), text_config.vocab_size)
        text_config.vocab_size = max(text_config.vocab_size, *(index + 1 for index in ids))
        return PerceptionGPTConfig(
            vision_config=vision_config, text_config=text_config, **{**token_ids, **config_kwargs}
        )

    @staticmethod
    def _added_token_ids(tokenizer, vocabulary: int) -> tuple[list[int], dict]:
        """Ids of `ADDED_TOKENS`, in a tokenizer that gets them or behind a vocabulary; and as the config has them."""
        if tokenizer is None:
            ids = list(range(vocabulary, vocabulary + len(ADDED_TOKENS)))
        else:
            add_perception_tokens(tokenizer)
            ids = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
        return ids, dict(zip(TOKEN_ID_NAMES, ids, strict=False), reserved_token_ids=ids[len(TOKEN_ID_NAMES) :])

    @staticmethod
    def _find_tokenizer(folder_or_id: str):
        """The tokenizer of a checkpoint with `ADDED_TOKENS`, or `None` where there is none."""
        try:
            return AutoTokenizer.from_pretrained(folder_or_id)
        except (OSError, ValueError, KeyError) as error:
            logger.warning(f"No tokenizer beside {folder_or_id}, added tokens follow its vocabulary ({error}).")
            return None

    @classmethod
    def _join(cls, vision_tower, language_model, lm_head, tokenizer, config_kwargs: dict, first_new_row: int = 0):
        """Builds the model around loaded backbones, gives the added tokens their rows and the signals their scale."""
        text_config, vocabulary = language_model.config, language_model.config.vocab_size
        ids, token_ids = cls._added_token_ids(tokenizer, vocabulary)
        config = PerceptionGPTConfig(
            vision_config=vision_tower.config,
            text_config=text_config,
            # A new composite config would reset those of the loaded parts.
            attn_implementation={
                "vision_config": vision_tower.config._attn_implementation,
                "text_config": text_config._attn_implementation,
            },
            **{"position_gain": float(not has_absolute_positions(vision_tower)), **token_ids, **config_kwargs},
        )
        model = cls(config, vision_tower=vision_tower, language_model=language_model, lm_head=lm_head)
        model.to(language_model.dtype)
        for module in model.model.signal_modules().values():
            module.float()
        if max(ids) >= vocabulary:
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        model.tie_weights()
        model._init_added_rows(vocabulary, first_new_row)
        return model

    @torch.no_grad()
    def _init_added_rows(self, vocabulary: int, first_new_row: int) -> None:
        """
        Sets the rows of the added tokens from `first_new_row` on, in and out, to the mean of the `vocabulary` rows that
        were loaded and a little noise, and the signals' scale to the length of the token embeddings.
        """
        ids = [getattr(self.config, name) for name in TOKEN_ID_NAMES] + self.config.reserved_token_ids
        new = [index for index in ids if index >= first_new_row]
        embeddings = self.get_input_embeddings()
        generator = torch.Generator().manual_seed(0)
        for weight in {id(weight): weight for weight in (embeddings.weight, self.lm_head.weight)}.values():
            rows = weight[:vocabulary].float()
            noise = torch.randn(len(new), weight.shape[1], generator=generator).to(weight.device) * rows.std()
            weight[new] = (rows.mean(0) + 0.1 * noise).to(weight.dtype)
        sample = torch.arange(min(vocabulary, 4096), device=embeddings.weight.device)
        embedding_rms = embeddings(sample).float().square().mean().sqrt()
        for module in self.model.signal_modules().values():
            if hasattr(module, "norm"):
                module.norm.weight.fill_(embedding_rms)


__all__ = ["JoiningMixin"]
