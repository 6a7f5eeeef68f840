"""A recipe: the YAML that a training run is described by, its defaults, and what may stand in it."""

import difflib
import importlib
import inspect
import re
from dataclasses import fields
from pathlib import Path

import yaml
from transformers import TrainingArguments

from perceptiongpt.data.mixtures import MIXTURE_DEFAULTS, PART_KEYS, PREPARE_KEYS
from perceptiongpt.data.sources import COMMON_ARGUMENTS, SOURCES, source_arguments
from perceptiongpt.training.language_model import save_language_model


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTER_MODES = ("projector", "heads", "lora", "qlora", "full")
RECIPE_SOURCES = (*SOURCES, "parquet")  # the last: a folder that data.prepare has written

DEFAULTS = {
    # One of: `checkpoint` (a PerceptionGPT folder or id), `vision` and `text` (backbones), `vlm` (an id or folder that
    # `from_vlm_pretrained` takes, such as a LLaVA's; `llava` is the older name).
    # `text` may be the arguments of `language_model.save_language_model` instead: a fresh language model.
    # `config`: sizes, for new joins only. `signals`: those of the model, by default all for new joins and a
    # checkpoint's own; [box, mask, point] gives a checkpoint of boxes and masks points as well. `dtype`: of the weights
    # that do not train, and of the computation; weights that train are float32. `attn_implementation`: as in
    # `from_pretrained`. `looks`: {look_max: 2, look_tokens: 64, ..}, for a model that looks again (docs/look_again.md).
    "model": {
        "checkpoint": None,
        "vision": None,
        "text": None,
        "vlm": None,
        "llava": None,
        "config": {},
        "signals": None,
        "looks": {},
        "dtype": "float32",
        "attn_implementation": "sdpa",
    },
    "adapter": {
        "mode": "lora",
        "rank": 32,
        "alpha": 64,
        "dropout": 0.0,
        "target_modules": list(LORA_TARGETS),
        "train_vision_tower": False,
        "rates": {},  # of parts, as shares of the learning rate, e.g. {vision_tower: 0.1, multi_modal_projector: 0}
    },
    # `train` and `eval`: one source or a list of them: {source: coco, annotations: .., images: .., tasks: [..], ..} or
    # {source: parquet, root: .., split: ..}. `train` may be a mixture instead: see `data/mixtures.py`.
    # Besides the losses, evaluation lets the model answer `generate_rows` direct prompts by itself.
    # `feature_cache`: a folder for what a frozen vision tower makes of images (`training/features.py`).
    "data": {
        "train": None,
        "eval": None,
        "generate_rows": 64,
        "generate_batch_size": 8,
        "generate_tokens": 64,
        "feature_cache": None,
    },
    # The arguments of `PerceptionCollator`. `pack`: the most questions of an image in a row; null: no packing.
    "collator": {
        "seed": 0,
        "box_jitter": 0.02,
        "read_probabilities": None,
        "pack": "auto",
        "max_length": None,
        "cache_rows": 0,
        "mask_targets": None,
        "looks": {},  # of a model that looks again: the arguments of `data.looks.Looks`
    },
    # Of the loss of the attention heads that are told where to look (`training/guidance.py`).
    "guidance": {"weight": 0.0},
    # Weights that replace those of the config, e.g. {lm: 1, box_giou: 2, mask_dice: 2}.
    "loss": {},
    # The arguments of `transformers.TrainingArguments`.
    "training": {},
}
FREE_SECTIONS = {"loss"}  # their keys are checked against the model
LOOK_KEYS = ("look_max", "look_tokens", "look_margin", "look_min_side", "look_encoder", "look_frame") + (
    "reenc_queries",
    "reenc_projector",
)
# What a model starts from: only the first stage says it.
MODEL_ORIGINS = ("checkpoint", "vision", "text", "vlm", "llava", "config")

# The kinds of stages and the modules that run them (see `training/stages.py`); train.py itself runs `joint`.
KINDS = {"joint": None, "dense": "perceptiongpt.training.dense"}
STAGE_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


class RecipeLoader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"), list("-+.0123456789")
)
RecipeLoader.yaml_implicit_resolvers = {  # integers stay integers: their resolver is asked first
    first: sorted(resolvers, key=lambda resolver: resolver[0] != "tag:yaml.org,2002:int")
    for first, resolvers in RecipeLoader.yaml_implicit_resolvers.items()
}


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_recipe(path: str | Path, overrides: list[str] = (), under: str | Path | None = None) -> dict:
    """Read a recipe, apply the command line's overrides, fill in `DEFAULTS`, and check every key.

    Args:
        path: the recipe's YAML file.
        overrides: `section.key=value` each. `stages.NAME.section.key=value` changes one stage only.
        under: the recipe of an earlier run; a key of `path` replaces the same key of it.

    Raises:
        ValueError: a key is unknown (the error names similar ones), or a value cannot be used.
    """
    given = read_yaml(path)
    if under is not None:
        before = read_yaml(under)
        for part, sources in (before.get("data") or {}).items():
            if isinstance(sources, list) and len(sources) == 1:
                before["data"][part] = sources[0]  # as recipes have it
        given = merge(before, given)
    for override in overrides:
        apply_override(given, override)
    return complete_recipe(given)


def read_yaml(path: str | Path) -> dict:
    """The content of a YAML file.

    Raises:
        ValueError: the file cannot be read as YAML.
    """
    try:
        return yaml.load(Path(path).read_text(encoding="utf-8"), RecipeLoader) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from error


def merge(below, above):
    """`above`, completed with the keys that only `below` has, at every depth of nested mappings."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: merge(below.get(key), value) for key, value in above.items()}}


def apply_override(recipe: dict, override: str) -> None:
    """Set one `section.key=value` in a recipe. In a list of mappings, the key is the `name` of one of them."""
    path, equals, value = override.partition("=")
    if not equals:
        raise ValueError(f"{override!r} is not key=value")
    *parents, last = path.split(".")
    node = recipe
    for parent in parents:
        if isinstance(node, list):
            named = [item for item in node if isinstance(item, dict) and item.get("name") == parent]
            if not named:
                raise ValueError(f"{path!r}: no entry of the list has the name {parent!r}")
            node = named[0]
            continue
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, (dict, list)):
            raise ValueError(f"{path!r}: {parent!r} is a {type(node).__name__}, not a section")
    if isinstance(node, list):
        raise ValueError(f"{path!r}: {parents[-1]!r} is a list, not a section")
    node[last] = yaml.load(value, RecipeLoader)


# ---- checking --------------------------------------------------------------------------------------------------------


def complete_recipe(given: dict) -> dict:
    """Fill in the sections of a recipe with `DEFAULTS` and check its keys; see `read_recipe`.

    A recipe with `stages` is checked, and returned as it is: each stage completes its own sections (`stage_recipes`).
    """
    if given.get("stages") is None:
        return complete_sections({section: values for section, values in given.items() if section != "stages"})
    for section in given:
        check_key(section, [*DEFAULTS, "stages"])
    stage_recipes(given)
    return given


def stage_recipes(recipe: dict, output: str | Path = "OUTPUT") -> list[tuple[str, str, dict]]:
    """(name, kind, completed recipe) of each stage of a recipe.

    A key of a stage's section replaces the same key of the recipe's section. Every stage but the first starts from
    the folder `output`/NAME of the stage before it.
    """
    stages = recipe["stages"]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError("stages must be a list of mappings, each with a name and sections of the recipe")
    found = []
    for stage in map(dict, stages):
        name, kind = str(stage.pop("name", "")), stage.pop("kind", "joint")
        if not STAGE_NAME.fullmatch(name) or name in [other for other, _, _ in found]:
            raise ValueError(f"stages: each needs a name of its own, of letters, digits, - and _; got {name!r}")
        if kind not in KINDS:
            raise ValueError(f"stage {name!r}: kind {kind!r} is none of {', '.join(KINDS)}")
        try:
            sections = {section: values for section, values in recipe.items() if section != "stages"}
            for section, values in stage.items():
                below = sections.get(section)
                both = isinstance(below, dict) and isinstance(values, dict)
                sections[section] = {**below, **values} if both else values
            if found:
                origins = [key for key in MODEL_ORIGINS if (stage.get("model") or {}).get(key)]
                if origins:
                    raise ValueError(f"model.{origins[0]}: only the first stage says what the model starts from")
                model = {key: value for key, value in (sections.get("model") or {}).items() if key not in MODEL_ORIGINS}
                sections["model"] = {**model, "checkpoint": str(Path(output, found[-1][0]))}
            own = {} if KINDS[kind] is None else {kind: importlib.import_module(KINDS[kind]).DEFAULTS}
            if own and (sections.get("data") or {}).get("feature_cache"):
                raise ValueError(f"data.feature_cache is for stages of the kind joint; {kind} has no use for it")
            found.append((name, kind, complete_sections(sections, own)))
        except ValueError as error:
            raise ValueError(f"stage {name!r}: {error}") from error
    return found


def complete_sections(given: dict, more: dict | None = None) -> dict:
    """The sections of a recipe without stages, or of one stage, completed and checked.

    Args:
        given: values by section and key.
        more: defaults of sections beside those of `DEFAULTS`, by section and key.
    """
    every_section = {**DEFAULTS, **(more or {})}
    known = {section: list(values) for section, values in every_section.items()}
    known["training"] = [field.name for field in fields(TrainingArguments) if field.init and field.name != "output_dir"]
    everything = [*known, *(f"{section}.{key}" for section in known for key in known[section])]
    for section in given:
        check_key(section, list(known), everything)
    recipe = {}
    for section, defaults in every_section.items():
        values = given.get(section) or {}
        if not isinstance(values, dict):
            raise ValueError(f"section {section!r} of the recipe must be a mapping, got {values!r}")
        if section not in FREE_SECTIONS:
            for key in values:
                check_key(f"{section}.{key}", [f"{section}.{key}" for key in known[section]], everything)
        # YAML reads a bare `no` as false; the strategies of the library's Trainer are called "no".
        strategies = {key: "no" for key, value in values.items() if key.endswith("_strategy") and value is False}
        recipe[section] = {**defaults, **values, **strategies}
    check_data(recipe)
    check_model(recipe)
    return recipe


def check_key(name: str, allowed: list[str], everything: list[str] = ()) -> None:
    """`ValueError` for a key that is not allowed, with similar ones, and those of other sections with its last word."""
    if name not in allowed:
        near = difflib.get_close_matches(name, allowed, n=3, cutoff=0.4)
        near += [full for full in everything if full.endswith("." + name)]
        raise ValueError(f"unknown key {name!r} in the recipe; similar keys are {', '.join(near or allowed)}")


def check_data(recipe: dict) -> None:
    """Complete `data.train` and `data.eval`, as lists of sources or as a mixture, and check their keys."""
    for part in ("train", "eval"):
        sources, more = recipe["data"][part] or [], ()
        if part == "train" and isinstance(sources, dict) and "mixture" in sources:
            for key in sources:
                check_key(f"data.train.{key}", [f"data.train.{key}" for key in MIXTURE_DEFAULTS])
            recipe["data"][part] = {**MIXTURE_DEFAULTS, **sources}
            sources, more = sources["mixture"], (*PART_KEYS, *PREPARE_KEYS)
            if int(recipe["training"].get("max_steps") or 0) < 1:
                raise ValueError("a mixture is a stream without end: set training.max_steps")
        else:
            recipe["data"][part] = sources = [sources] if isinstance(sources, dict) else list(sources)
        for source in sources:
            name = source.get("source", "coco")
            if name not in RECIPE_SOURCES:
                raise ValueError(f"data.{part}: source {name!r} is none of {', '.join(RECIPE_SOURCES)}")
            if part == "train" and name == "scenes" and source.get("split", "train") != "train":
                raise ValueError(f"data.train: scenes of the split {source['split']!r} are kept from training")
            own = ("root", "split") if name == "parquet" else (*COMMON_ARGUMENTS, *source_arguments(name))
            for key in source:
                check_key(f"data.{part}.{key}", [f"data.{part}.{key}" for key in ("source", *own, *more)])
    if not recipe["data"]["train"]:
        raise ValueError("the recipe has no data.train")


def check_model(recipe: dict) -> None:
    """`ValueError` unless the recipe says in one way what the model starts from, and its mode can train that."""
    mode, model = recipe["adapter"]["mode"], recipe["model"]
    if model["llava"] is not None and model["vlm"] is None:
        model["vlm"], model["llava"] = model["llava"], None
    if mode not in ADAPTER_MODES:
        raise ValueError(f"adapter.mode {mode!r} is none of {', '.join(ADAPTER_MODES)}")
    joins = bool(model["vision"] and model["text"])
    ways = [model["checkpoint"] is not None, model["vlm"] is not None, model["llava"] is not None, joins]
    if sum(ways) != 1 or (model["vision"] is None) != (model["text"] is None):
        raise ValueError("the recipe's model needs either checkpoint, or vlm, or vision together with text")
    if isinstance(model["text"], dict):
        known = [f"model.text.{key}" for key in inspect.signature(save_language_model).parameters if key != "output"]
        for key in model["text"]:
            check_key(f"model.text.{key}", known)
    if model["config"] and not joins:
        raise ValueError("model.config is for joining vision and text; a checkpoint's sizes are fixed")
    if recipe["data"]["feature_cache"] and recipe["adapter"]["train_vision_tower"]:
        raise ValueError(
            "data.feature_cache keeps what a frozen vision tower puts out: leave it out, or set "
            "adapter.train_vision_tower: false"
        )
    for key in model["looks"]:
        check_key(f"model.looks.{key}", [f"model.looks.{name}" for name in LOOK_KEYS])
    if mode == "qlora" and not ways[0]:
        raise ValueError("qlora needs model.checkpoint: only a saved model can be loaded in 4 bit")
    if recipe["training"].get("label_smoothing_factor"):
        raise ValueError(
            "training.label_smoothing_factor is not supported: the library's smoothing would replace the model's loss, "
            "and with it those of boxes and masks"
        )
