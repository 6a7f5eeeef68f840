"""New models from pretrained parts: a vision tower and a language model, or a whole LLaVA checkpoint."""

import torch
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)
from transformers.utils import logging

from .configuration_perceptiongpt import ADDED_TOKENS, PerceptionGPTConfig, add_perception_tokens
from .vision_perceptiongpt import has_absolute_positions


logger = logging.get_logger(__name__)

# The config's names for the first of `ADDED_TOKENS`; the rest are reserved.
TOKEN_ID_NAMES = ("image_token_id", "vis_token_id", "phrase_start_token_id", "phrase_end_token_id")


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
    def from_llava_pretrained(cls, llava: str, *, tokenizer=None, dtype=None, **config_kwargs):
        """
        Starts from a LLaVA checkpoint: the same logits at first, and signal modules to train.

        Args:
            llava (`str`): a checkpoint of [`LlavaForConditionalGeneration`], from the Hub or a folder.
            tokenizer, dtype, config_kwargs: as in [`from_vision_text_pretrained`].
        """
        model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=dtype)
        config, num_layers = model.config, model.config.vision_config.num_hidden_layers
        layer = config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(
                f"{llava} concatenates the tower layers {layer}: expected a single `vision_feature_layer`."
            )
        # LLaVA counts the embeddings as layer 0, the mixtures start with the output of the first layer.
        initial_layer = (layer if layer >= 0 else num_layers + 1 + layer) - 1
        config_kwargs = {
            "mixture_base_layer": initial_layer,
            "projector_hidden_act": config.projector_hidden_act,
            "multimodal_projector_bias": config.multimodal_projector_bias,
            "image_token_id": config.image_token_id,
            **config_kwargs,
        }
        if tokenizer is None:
            tokenizer = cls._find_tokenizer(llava)
        joined = cls._join(
            model.model.vision_tower,
            model.model.language_model,
            model.lm_head,
            tokenizer,
            config_kwargs,
            first_new_row=config.text_config.vocab_size,  # LLaVA's own rows stay, so its logits do
        )
        joined.model.multi_modal_projector.load_state_dict(model.model.multi_modal_projector.state_dict())
        return joined

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
        if tokenizer is None:
            ids = list(range(vocabulary, vocabulary + len(ADDED_TOKENS)))
        else:
            add_perception_tokens(tokenizer)
            ids = tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
        token_ids = dict(zip(TOKEN_ID_NAMES, ids, strict=False), reserved_token_ids=ids[len(TOKEN_ID_NAMES) :])
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
