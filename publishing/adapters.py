"""Adapters by themselves: what they need to find their base again, and loading both.

The base of an adapter is a repository of its own (`base_model_name_or_path` and `revision` of the adapter's config, as
PEFT has them), or it is joined again from its parts: `auto_mapping["perceptiongpt_base"]` of the adapter's config then
holds their names and revisions, the seed of the modules that were fresh, and a hash of those that the adapter does not
replace. Modules with other values than in training would make the adapter's answers wrong without an error.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, model_info, snapshot_download
from safetensors import safe_open
from transformers import set_seed
from transformers.utils import logging

from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt.publishing.card import MODEL_ORIGINS, is_hub_id
from perceptiongpt.publishing.stage import ADAPTER_FILES, PublishError, read_json, weight_files


logger = logging.get_logger(__name__)

BASE_KEY = "perceptiongpt_base"
DEFAULT_SEED = 42  # of `transformers.TrainingArguments`
BACKBONES = ("model.vision_tower.", "model.language_model.", "lm_head.")
TOKEN_ROWS = ("model.language_model.embed_tokens.weight", "lm_head.weight")
LARGEST_DIFFERENCE = 1e-4  # relative, between the published plain model and the adapter on its base
LOADED_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]


# ---- the base --------------------------------------------------------------------------------------------------------


def base_of_recipe(recipe: dict) -> dict:
    """How the base of a training run is made: {"model": its part of the recipe, "seed"}.

    Raises:
        PublishError: the run had stages, so that its adapter is over weights that an earlier stage trained.
    """
    if recipe.get("stages"):
        raise PublishError("the run had stages: its adapter belongs to the model of the stage before, not to a base")
    model = {key: value for key, value in (recipe.get("model") or {}).items() if value not in (None, {})}
    if not any(key in model for key in MODEL_ORIGINS):
        raise PublishError("recipe.yaml does not say what the adapter was trained on (model.checkpoint, or its parts)")
    seed = (recipe.get("training") or {}).get("seed", DEFAULT_SEED)
    return {"model": model, "seed": seed}


def pin_revisions(base: dict) -> dict:
    """The base with the commit of every repository that it names.

    Raises:
        PublishError: a part is a local folder, which nobody else has.
    """
    revisions = {}
    for key in MODEL_ORIGINS:
        name = base["model"].get(key)
        if name is None:
            continue
        if not is_hub_id(name):
            raise PublishError(
                f"the adapter was trained on {key} {name}, a local folder that nobody else has: give --base_repo "
                "USER/NAME to publish the base, too"
            )
        revisions[key] = model_info(name).sha
    return {**base, "revisions": revisions}


def local_copy(name: str, revision: str | None) -> str:
    """The folder of a model: itself, or a snapshot of a repository."""
    return name if Path(name).is_dir() else snapshot_download(name, revision=revision, allow_patterns=LOADED_PATTERNS)


def build_base(base: dict):
    """Load or join the base again: (model, processor).

    Args:
        base: {"model": part of a recipe, "seed", "revisions": by key of the model}.
    """
    settings, revisions = base["model"], base.get("revisions", {})
    dtype = settings.get("dtype", "float32")
    folders = {key: local_copy(settings[key], revisions.get(key)) for key in MODEL_ORIGINS if key in settings}
    model_class = PerceptionGPTForConditionalGeneration
    if "checkpoint" in folders:
        model = model_class.from_pretrained(folders["checkpoint"], dtype=dtype)
        return model, PerceptionGPTProcessor.from_pretrained(folders["checkpoint"])
    set_seed(base["seed"])
    vlm = folders.get("vlm", folders.get("llava"))  # the latter is the older name
    if vlm is not None:
        backbones = (vlm, vlm)
        model = model_class.from_vlm_pretrained(vlm, dtype=dtype)
    else:
        backbones = (folders["vision"], folders["text"])
        model = model_class.from_vision_text_pretrained(*backbones, dtype=dtype, **settings.get("config", {}))
    return model, PerceptionGPTProcessor.from_backbones(*backbones, model.config)


def fresh_hash(model, adapter_config: dict) -> str:
    """SHA-256 over the fresh tensors of a joined model that an adapter does not replace.

    Fresh are the modules beside the two backbones and the rows of the added tokens. What the adapter brings along
    (`modules_to_save`, `trainable_token_indices`) has no influence once it is loaded, so it does not count.
    """
    replaced = tuple(f"model.{name}." for name in adapter_config.get("modules_to_save") or ())
    rows = adapter_config.get("trainable_token_indices") or {}
    rows = set(rows.get("embed_tokens", ())) if isinstance(rows, dict) else set(rows)
    config = model.config
    added = [config.image_token_id, config.vis_token_id, config.phrase_start_token_id, config.phrase_end_token_id]
    kept = [index for index in (*added, *config.reserved_token_ids) if index not in rows]
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in TOKEN_ROWS:
            tensor = tensor[kept]
        elif name.startswith((*BACKBONES, *replaced)):
            continue
        if tensor.numel():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def describe_base(base: dict, adapter_config: dict) -> dict:
    """The base as the adapter's config records it: with the hash of what is fresh and stays, and torch's version."""
    model, _ = build_base(base)
    return {**base, "fresh_sha256": fresh_hash(model, adapter_config), "torch": torch.__version__}


# ---- loading ---------------------------------------------------------------------------------------------------------


def read_adapter_config(adapter: str, revision: str | None = None) -> dict:
    """The adapter_config.json of a folder or a repository."""
    path = Path(adapter, ADAPTER_FILES[0])
    if not Path(adapter).is_dir():
        path = Path(hf_hub_download(adapter, ADAPTER_FILES[0], revision=revision))
    return read_json(path)


def load_adapter(
    adapter: str | Path,
    *,
    revision: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    merge: bool = True,
):
    """Load an adapter that was published by itself, on the base that its config names.

    Args:
        adapter: a folder or a repository with adapter_config.json.
        revision: of that repository.
        base: a folder or repository to take as the base, in place of the one that the config names.
        dtype: of the weights (the signal modules stay float32); None: as the base was saved, or joined in training.
        merge: return a plain model; otherwise the `PeftModel`.

    Returns:
        (model in eval mode, processor).

    Raises:
        ValueError: the config names no base, or the modules of a base that was joined again differ from those that the
            adapter was trained on; the message says what to do.
    """
    from peft import PeftModel

    adapter = str(adapter)
    config = read_adapter_config(adapter, revision)
    named, recorded = config.get("base_model_name_or_path"), (config.get("auto_mapping") or {}).get(BASE_KEY)
    if base is not None or named:
        source, base_revision = (str(base), None) if base is not None else (named, config.get("revision"))
        model = PerceptionGPTForConditionalGeneration.from_pretrained(source, revision=base_revision or "main")
    elif recorded:
        model, _ = build_base(recorded)
        found, expected = fresh_hash(model, config), recorded["fresh_sha256"]
        if found != expected:
            raise ValueError(
                f"{adapter}: the modules that were fresh in training have other values here (sha256 {found[:12]}, "
                f"expected {expected[:12]}): seed {recorded['seed']} and torch {recorded['torch']} made them; "
                f"this is torch {torch.__version__}. Install that version; or ask the author to publish the joined "
                "base (publish.py --adapter_only --base_repo); or give base=, a saved copy of it"
            )
    else:
        raise ValueError(f"{adapter}: its config names no base; give base=, the folder or repository it was trained on")
    model = PeftModel.from_pretrained(model, adapter, revision=revision)
    processor = PerceptionGPTProcessor.from_pretrained(adapter, revision=revision or "main")
    if merge:
        model = model.merge_and_unload()
    if dtype is not None:
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        for module in (model if merge else model.get_base_model()).model.signal_modules().values():
            module.float()  # coordinates need float32
    return model.eval(), processor


# ---- staging ---------------------------------------------------------------------------------------------------------


def check_adapter_folder(source: str | Path) -> Path:
    """The adapter's folder in an output of `train.py`.

    Raises:
        PublishError: there is none, or it is not whole.
    """
    source = Path(source)
    folder = source / "adapter"
    for name in (*ADAPTER_FILES, "processor_config.json"):
        if not (folder / name).is_file():
            raise PublishError(f"{source} has no adapter/{name}: only modes with an adapter write one (not `full`)")
    if not (source / "recipe.yaml").is_file():
        raise PublishError(f"{source} has no recipe.yaml, which says what the adapter was trained on")
    return folder


def check_same_model(source: Path, adapter: Path, base) -> None:
    """Check that the adapter on its base is the plain model that training saved.

    Args:
        source: the output of training, with the plain model.
        adapter: the adapter's folder.
        base: a freshly loaded base model, which is used up.

    Raises:
        PublishError: a tensor differs, so that the base is not the one that was trained on.
    """
    from peft import PeftModel

    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    for path in weight_files(source):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                expected, found = file.get_tensor(name).float(), merged[name].float()
                # The plain model may have been rounded to the recipe's dtype after merging.
                limit = max(LARGEST_DIFFERENCE, 2 * torch.finfo(file.get_tensor(name).dtype).eps)
                if expected.shape != found.shape or not torch.allclose(expected, found, rtol=limit, atol=limit):
                    raise PublishError(
                        f"{source}: the adapter on the base of recipe.yaml does not give {path.name}: {name} differs. "
                        "The base has changed since training; publish the plain model (without --adapter_only)"
                    )


def set_base(config_path: Path, name: str | None, revision: str | None, base: dict | None) -> None:
    """Write into an adapter's config where its base is."""
    config = read_json(config_path)
    config |= {"base_model_name_or_path": name, "revision": revision}
    mapping = {key: value for key, value in (config.get("auto_mapping") or {}).items() if key != BASE_KEY}
    config["auto_mapping"] = mapping | ({BASE_KEY: base} if base else {})
    # In a stage the file may be a link to the one in the output, which stays as it is.
    text = json.dumps(config, indent=2, sort_keys=True)
    config_path.unlink()
    config_path.write_text(re.sub(r"\s+$", "", text) + "\n", encoding="utf-8")
