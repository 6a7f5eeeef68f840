"""Configuration of PerceptionGPT, and the special tokens that every part of the package agrees on."""

import math

from transformers import AddedToken, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec, strict

from .signal_box_perceptiongpt import PerceptionGPTBoxConfig
from .signal_mask_perceptiongpt import PerceptionGPTMaskConfig
from .signal_point_perceptiongpt import PerceptionGPTPointConfig
from .signals_perceptiongpt import FIRST_SIGNALS, SIGNALS, choose_signals


IMAGE_TOKEN = "<image>"
VIS_TOKEN = "<vis>"
PHRASE_START_TOKEN = "<p>"
PHRASE_END_TOKEN = "</p>"
RESERVED_TOKENS = tuple(f"<reserved_{index}>" for index in range(8))
# What stands for a look in the messages of rows; in the sequence it is the first of these tokens, pads, and the last.
LOOK_MARKER = "<look>"
LOOK_TOKEN, LOOK_END_TOKEN, LOOK_PAD_TOKEN, REENC_TOKEN = RESERVED_TOKENS[:4]
REENC_MARKER = "<reenc>"
REENC_PROJECTORS = ("film", "paper")
LOOK_ENCODERS = ("same",)
LOOK_FRAMES = ("image", "crop")
# Of pyramid towers: what a config that does not say otherwise gets.
PYRAMID_IMAGE_SIZE = 224
PIXELS_PER_CELL = 16
PYRAMID_FEATURE_SIZE = 256
ADDED_TOKENS = (IMAGE_TOKEN, VIS_TOKEN, PHRASE_START_TOKEN, PHRASE_END_TOKEN, *RESERVED_TOKENS)


def add_perception_tokens(tokenizer) -> int:
    """
    Adds `ADDED_TOKENS` to a tokenizer as special tokens, each a single id that never eats the blanks around it.

    Returns:
        `int`: how many of them the tokenizer did not know before.
    """
    tokens = [AddedToken(token, normalized=False, lstrip=False, rstrip=False, special=True) for token in ADDED_TOKENS]
    return tokenizer.add_tokens(tokens, special_tokens=True)


@strict
class PerceptionGPTConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PerceptionGPTForConditionalGeneration`]. Without arguments: Vicuna-7B and CLIP ViT-L/14-336.

    Args:
        vision_config, text_config (`PreTrainedConfig` or `dict`, *optional*): the two backbones.
        signals (`list[str]`, *optional*):
            Names of the signals that the model has, in any order; all of `SIGNALS` by default. A saved config that does
            not list them has `["box", "mask"]`.
        box_config, mask_config, point_config (`PreTrainedConfig` or `dict`, *optional*):
            Sizes and loss weights of the signals; `None` for signals that the model does not have. A signal beyond
            these has its `<name>_config` in the same way.
        image_token_id, vis_token_id, phrase_start_token_id, phrase_end_token_id (`int`):
            Ids of `<image>`, `<vis>`, `<p>` and `</p>`.
        reserved_token_ids (`list[int]`): ids of the rows kept for later signals.
        projector_hidden_act (`str`, defaults to `"gelu"`): activation of the projector.
        multimodal_projector_bias (`bool`, defaults to `True`): whether the projector has biases.
        mixture_base_layer (`int`, *optional*):
            Index (0 = first layer) of the tower layer that both feature mixtures start from exactly; `None` starts
            from the plain mean of all layers.
        position_gain (`float`, defaults to 1.0):
            What the gain of the 2-D position table starts at: 1 for fresh towers and for those without absolute
            position embeddings, 0 for other pretrained ones.
        image_size (`int`, *optional*): Side in pixels of the square images that the tower reads; by default its own.
        image_grid (`int`, *optional*):
            Cells per side of what the language model sees of an image. Of a plain ViT always its patches; of a pyramid
            by default one cell for 16 pixels.
        mask_grid (`int`, *optional*):
            Cells per side that the mask decoder's transformer reads. Of a plain ViT always the patches of the pass that
            it reads; of a pyramid by default `image_grid`.
        feature_size (`int`, *optional*):
            Width of the features of an image. Of a plain ViT always its hidden size; of a pyramid the width to which
            all stages are mapped, by default 256.
        vision_stages (`list[dict]`, *optional*):
            The stages of a pyramid, found when the model is first built: see [`find_stages`].
        mask_image_size (`int`, *optional*):
            Side in pixels of a second, finer pass of the tower for the mask decoder; `None` shares the one pass.
        lm_loss_weight (`float`, defaults to 1.0): weight of the language modelling loss (paper, equation 2).
        look_max (`int`, defaults to 0):
            How often at most the model looks again in one answer, at a crop of the original image around a `<vis>`; 0
            for models that do not. The other `look_*` count where it is not 0, and are saved only then.
        look_tokens (`int`, *optional*):
            Number of tokens of a look, a square number; by default those of an image, `image_seq_length`.
        look_margin (`float`, defaults to 1.5): side of a crop as a multiple of the longer side of the box in it.
        look_min_side (`int`, *optional*):
            Least side of a crop in pixels of the original image; by default half of `image_size`.
        look_encoder (`str`, defaults to `"same"`): what encodes a crop: the tower and the projector of the images.
        look_frame (`str`, defaults to `"image"`):
            Where a `<vis>` right behind a look is decoded: `"image"`, as every other one, or `"crop"`, on the square
            around the crop, from which it is mapped back.
        reenc_queries (`int`, defaults to 0):
            Number of tokens, a square number, that the model reads where it encodes an image again (`<reenc>`), which
            counts as one of its looks; 0 for models that do not.
        reenc_projector (`str`, defaults to `"film"`):
            How: `"film"`, see [`FilmReencoder`], or `"paper"`, see [`PaperReencoder`].
    """

    model_type = "perceptiongpt"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "patch_size": 14,
                "image_size": 336,
                "projection_dim": 768,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 32064}),
        **{
            signal.config_key: SubConfigSpec(config_class=signal.config_class, optional=True)
            for signal in SIGNALS.values()
        },
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    signals: list[str] | tuple[str, ...] | None = None
    box_config: dict | PreTrainedConfig | None = None
    mask_config: dict | PreTrainedConfig | None = None
    point_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    vis_token_id: int = 32001
    phrase_start_token_id: int = 32002
    phrase_end_token_id: int = 32003
    reserved_token_ids: list[int] | tuple[int, ...] = tuple(range(32004, 32012))
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    mixture_base_layer: int | None = None
    position_gain: float | int = 1.0
    image_size: int | None = None
    image_grid: int | None = None
    mask_grid: int | None = None
    feature_size: int | None = None
    vision_stages: list[dict] | None = None
    mask_image_size: int | None = None
    lm_loss_weight: float | int = 1.0
    look_max: int = 0
    look_tokens: int | None = None
    look_margin: float | int = 1.5
    look_min_side: int | None = None
    look_encoder: str = "same"
    look_frame: str = "image"
    reenc_queries: int = 0
    reenc_projector: str = "film"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.signals = choose_signals(SIGNALS if self.signals is None else self.signals)
        for name, signal in SIGNALS.items():
            # A signal without a field above comes with the other keywords.
            given = kwargs.pop(signal.config_key, getattr(self, signal.config_key, None))
            setattr(self, signal.config_key, ({} if given is None else given) if name in self.signals else None)
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)
        self.reserved_token_ids = list(self.reserved_token_ids)
        self._set_vision_sizes()
        if self.look_max:
            self.look_tokens = self.look_tokens or self.image_seq_length
            self.look_min_side = self.look_min_side or self.image_size // 2
        for name in self.signals:
            SIGNALS[name].complete_config(self)
        # Said here rather than at saving time, so that every re-save, of a fine-tuned or merged model too, stays
        # loadable with `trust_remote_code=True` and keeps `pipeline("perception")`.
        self.auto_map = {
            "AutoConfig": "configuration_perceptiongpt.PerceptionGPTConfig",
            "AutoModel": "modeling_perceptiongpt.PerceptionGPTModel",
            "AutoModelForImageTextToText": "modeling_perceptiongpt.PerceptionGPTForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_perceptiongpt.PerceptionGPTForConditionalGeneration",
            "AutoProcessor": "processing_perceptiongpt.PerceptionGPTProcessor",
        }
        self.custom_pipelines = {
            "perception": {
                "impl": "pipeline_perceptiongpt.PerceptionPipeline",
                "pt": ["AutoModelForImageTextToText"],
                "default": None,
                "type": "multimodal",
            }
        }

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in the library; `signals` and looks decide what else is made, so they are set before the others."""
        signals = kwargs.pop("signals", None) or config_dict.get("signals") or FIRST_SIGNALS
        looks = {
            name: kwargs.pop(name)
            for name in list(kwargs)
            if name in cls.__annotations__ and name.startswith(("look_", "reenc_"))
        }
        return super().from_dict({**config_dict, **looks, "signals": list(signals)}, **kwargs)

    def _set_vision_sizes(self) -> None:
        """Fills in `image_size`, `image_grid`, `mask_grid` and `feature_size`, and checks those that were given."""
        vision = self.vision_config
        own_size = getattr(vision, "image_size", None)
        own_size = own_size[0] if isinstance(own_size, (list, tuple)) else own_size
        if self.image_size is None:
            self.image_size = PYRAMID_IMAGE_SIZE if own_size is None else own_size
        if self.is_pyramid:
            least_side = PIXELS_PER_CELL
        else:
            least_side = vision.patch_size
        for name in ("image_size", "mask_image_size"):
            side = getattr(self, name)
            if side is not None and (not isinstance(side, int) or side < least_side):
                raise ValueError(f"`{name}` is {side!r}, expected an int of at least one patch of square images.")
        if self.is_pyramid:
            self.image_grid = self.image_grid or self.image_size // PIXELS_PER_CELL
            self.mask_grid = self.mask_grid or self.image_grid
            self.feature_size = self.feature_size or PYRAMID_FEATURE_SIZE
            return
        derived = {
            "image_grid": self.image_size // vision.patch_size,
            "mask_grid": (self.mask_image_size or self.image_size) // vision.patch_size,
            "feature_size": vision.hidden_size,
        }
        for name, value in derived.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected {value}, which this tower has.")
            setattr(self, name, value)

    def validate_mixture_base_layer(self) -> None:
        """The layer that the mixtures start from exists; how many stages a pyramid has is known once it is built."""
        layers = len(self.vision_stages or ()) if self.is_pyramid else self.vision_config.num_hidden_layers
        if layers and self.mixture_base_layer is not None and not 0 <= self.mixture_base_layer < layers:
            raise ValueError(f"`mixture_base_layer` is {self.mixture_base_layer}, expected one of 0 to {layers - 1}.")

    def validate_looks(self) -> None:
        """The sizes of a look are possible, and the model has what it needs to look."""
        if self.look_max < 0:
            raise ValueError(f"`look_max` is {self.look_max}, expected 0 or more.")
        queries = self.reenc_queries
        if queries and (queries < 0 or math.isqrt(queries) ** 2 != queries or not self.look_max):
            raise ValueError(
                f"`reenc_queries` is {queries}, expected a square number beside a `look_max` of 1 or more."
            )
        if self.reenc_projector not in REENC_PROJECTORS:
            raise ValueError(f"`reenc_projector` is {self.reenc_projector!r}, expected one of {REENC_PROJECTORS}.")
        if not self.look_max:
            return
        tokens, min_side = self.look_tokens, self.look_min_side
        if tokens is not None and (tokens < 1 or math.isqrt(tokens) ** 2 != tokens):
            raise ValueError(f"`look_tokens` is {tokens}, expected a square number.")
        if not 1 <= self.look_margin < math.inf:
            raise ValueError(f"`look_margin` is {self.look_margin}, expected a number of at least 1.")
        if min_side is not None and min_side < 1:
            raise ValueError(f"`look_min_side` is {min_side}, expected at least one pixel.")
        for name, allowed in (("look_encoder", LOOK_ENCODERS), ("look_frame", LOOK_FRAMES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {allowed}.")
        if len(self.reserved_token_ids) < 4:
            raise ValueError(f"Looks take four `reserved_token_ids`, there are {len(self.reserved_token_ids)}.")
        if self.signals is not None and "box" not in self.signals:
            raise ValueError("Looks need the box signal: a crop is cut around the box of a `<vis>`.")
        if self.look_frame == "crop" and self.mask_image_size:
            raise ValueError(
                "`look_frame='crop'` decodes masks from a crop, `mask_image_size` from a finer image: use one of them."
            )

    def to_diff_dict(self) -> dict:
        """As in the library; the config of a model that does not look says nothing of looks."""
        saved = super().to_diff_dict()
        left_out = (*(() if self.look_max else ("look_",)), *(() if self.reenc_queries else ("reenc_",)))
        return {name: value for name, value in saved.items() if not name.startswith(left_out)}

    @property
    def look_token_id(self) -> int:
        """Id of `<look>`, by which the model asks for a crop: a reserved one, as the two that follow."""
        return self.reserved_token_ids[0]

    @property
    def look_end_token_id(self) -> int:
        """Id of `</look>`, which ends a look."""
        return self.reserved_token_ids[1]

    @property
    def look_pad_token_id(self) -> int:
        """Id of `<look_pad>`, on whose embedding the features of a crop are added."""
        return self.reserved_token_ids[2]

    @property
    def reenc_token_id(self) -> int:
        """Id of `<reenc>`, by which the model asks for the image again, and of the pads that follow it."""
        return self.reserved_token_ids[3]

    @property
    def is_pyramid(self) -> bool:
        """Whether the tower's layers are maps of several sizes and widths, as those of ConvNeXt, Swin and ResNet."""
        sizes = ("hidden_size", "num_hidden_layers", "patch_size")
        plain = all(isinstance(getattr(self.vision_config, name, None), int) for name in sizes)
        return not plain or hasattr(self.vision_config, "depths")

    @property
    def image_seq_length(self) -> int:
        """Number of `<image>` tokens per image."""
        return self.image_grid**2

    @property
    def fine_grid(self) -> int | None:
        """Cells per side of a pyramid's finest map, which enters the mask decoder where it upsamples."""
        if self.vision_stages is None:
            return None
        return self.vision_stages[0]["grid"] * (self.mask_image_size or self.image_size) // self.image_size

    @property
    def mask_cells(self) -> int:
        """Number of cells that the mask decoder reads of an image: those of its grid, and of a pyramid's finest map."""
        return self.mask_grid**2 + (self.fine_grid or 0) ** 2


PerceptionGPTConfig.register_for_auto_class()

__all__ = [
    "PerceptionGPTBoxConfig",
    "PerceptionGPTConfig",
    "PerceptionGPTMaskConfig",
    "PerceptionGPTPointConfig",
]
