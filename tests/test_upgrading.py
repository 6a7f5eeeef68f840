"""
A canary for each private or undocumented name that `docs/upgrading.md` lists: it exists, takes the arguments that are
passed, and does what is relied on. A failure says what breaks.
"""

import ast
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import evaluate
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch.utils.data import get_worker_info
from transformers import configuration_utils
from transformers.cache_utils import DynamicLayer
from transformers.pipelines import pt_utils
from transformers.utils import chat_template_utils, output_capturing

from perceptiongpt import PerceptionPipeline
from rows import GRID_TOKENS, IMAGE, tiny_model


ROOT = Path(__file__).parents[1]
LISTED = (ROOT / "docs/upgrading.md").read_text()
CODE_FILES = sorted(ROOT.glob("*.py")) + [
    path
    for folder in sorted(ROOT.iterdir())
    if folder.is_dir() and not folder.name.startswith(".") and folder.name not in ("tests", "outputs", "build", "dist")
    for path in sorted(folder.rglob("*.py"))
]
LIBRARY_CLASSES = (
    transformers.PreTrainedModel,
    transformers.PreTrainedConfig,
    transformers.GenerationMixin,
    transformers.ProcessorMixin,
    transformers.BatchFeature,
    transformers.Pipeline,
    transformers.Trainer,
    evaluate.Metric,
)


class Canary(NamedTuple):
    """What the code relies on: `owner.name` takes `parameters` (by name), and `behaves()` is true."""

    owner: Any
    name: str
    breaks: str
    behaves: Callable[[], bool]
    parameters: tuple[str, ...] = ()


# ---- behaviours ------------------------------------------------------------------------------------------------------


shared_model = functools.cache(tiny_model)


def prompt() -> dict:
    return {
        "input_ids": torch.tensor([[1, *[IMAGE] * GRID_TOKENS, 5, 6]]),
        "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    }


def calls_of(name: str, **generate) -> list[tuple[tuple, dict, Any]]:
    """The arguments and results of a method of the model while it generates three tokens."""
    model, calls = shared_model(), []
    method = getattr(model, name)

    def spy(*args, **kwargs):
        calls.append((args, kwargs, method(*args, **kwargs)))
        return calls[-1][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, name, spy)
        model.generate(**prompt(), max_new_tokens=3, min_new_tokens=3, do_sample=False, **generate)
    return calls


def tells_the_attention() -> bool:
    return transformers.LlamaConfig(attn_implementation="eager")._attn_implementation == "eager"


def normalizes() -> bool:
    image_url = {"type": "image_url", "image_url": {"url": "a.png"}}
    messages = [{"role": "user", "content": [image_url], "tool_calls": None}]
    one = [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]
    normalize = transformers.ProcessorMixin._normalize_conversations
    return normalize(None, messages) == ([one], False) and normalize(None, [messages]) == ([one], True)


def adjusts_masks() -> bool:
    # <image> at 0..7 was replaced by 14 characters; the answer stood at 8..10 before.
    rows = {
        "input_ids": [[7, 7, 3, 4]],
        "offset_mapping": [[(0, 7), (7, 14), (14, 15), (15, 17)]],
        "text_replacement_offsets": [[{"span": (0, 7), "new_span": (0, 14)}]],
    }
    adjusted = transformers.ProcessorMixin._adjust_assistant_masks_indices(None, rows, [[(8, 10)]])
    return adjusted["assistant_masks"] == [[0, 0, 0, 1]] and "offset_mapping" not in adjusted


def layers_hold_keys_and_values() -> bool:
    cache = shared_model().generate(**prompt(), max_new_tokens=2, return_dict_in_generate=True).past_key_values
    grown = [layer.keys for layer in cache.layers]
    cache.update(*[torch.ones_like(grown[0][:, :, :1])] * 2, layer_idx=0)
    is_new = cache.layers[0].keys is not grown[0]  # nothing is written into tensors that caches share
    return is_new and all(type(layer) is DynamicLayer for layer in cache.layers) and cache.is_sliding == [False, False]


def reads_signatures() -> bool:
    source = inspect.getsource(transformers.GenerationMixin.prepare_inputs_for_generation)
    return "inspect.signature(self.forward)" in source and hasattr(type(shared_model()).forward, "__signature__")


def prepares_the_cache() -> bool:
    ((args, _, _),) = calls_of("_prepare_cache_for_generation")
    model_kwargs = args[1]
    return isinstance(model_kwargs["past_key_values"], transformers.Cache) and "signal_state" in model_kwargs


def expands_inputs() -> bool:
    calls = calls_of("_expand_inputs_for_generation", num_beams=2)
    return any(call["expand_size"] == 2 and result[0].shape[0] == 2 for _, call, result in calls)


def updates_every_step() -> bool:
    calls = calls_of("_update_model_kwargs_for_generation")
    return len(calls) == 3 and all({"logits", "last_hidden_state"} <= set(args[0].keys()) for args, _, _ in calls)


def reorders_the_cache() -> bool:
    calls = calls_of("_reorder_cache", num_beams=2)
    return len(calls) >= 2 and all(len(args[1]) == 2 for args, _, _ in calls)


def worker_info_is_that_variable() -> bool:
    module = torch.utils.data._utils.worker
    before = module._worker_info
    try:
        module._worker_info = "this worker"
        return get_worker_info() == "this worker"
    finally:
        module._worker_info = before


def casts_inputs() -> bool:
    source = inspect.getsource(transformers.Trainer._prepare_inputs)
    return "_prepare_input(" in source and "_prepare_inputs(" in inspect.getsource(transformers.Trainer.training_step)


def renders() -> bool:
    template = "{% for m in messages %}{% generation %}{{ m['content'] + end }}{% endgeneration %}{% endfor %}"
    rendered = chat_template_utils.render_jinja_template(
        [[{"role": "user", "content": "a"}]], chat_template=template, return_assistant_tokens_mask=True, end="!"
    )
    return rendered == (["a!"], [[(0, 2)]])


def is_strict() -> bool:
    @configuration_utils.strict
    class Strict(transformers.PreTrainedConfig):
        size: int = 1

    with pytest.raises(Exception, match="size"):
        Strict(size="a")
    return Strict(size=2).size == 2


def counts_over_the_window() -> bool:
    return "get_batch_samples(" in inspect.getsource(
        transformers.Trainer
    ) and "num_items_in_batch" in inspect.getsource(transformers.Trainer.compute_loss)


def caches_take_attributes() -> bool:
    caches = [transformers.DynamicCache(), transformers.StaticCache(transformers.LlamaConfig(), max_cache_len=4)]
    for cache in caches:
        cache.signal_state = "kept"
    return all(cache.signal_state == "kept" for cache in caches)


def gemma_scales() -> bool:
    config = transformers.GemmaConfig(
        vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=16
    )
    return transformers.GemmaModel(config).get_input_embeddings().scalar_embed_scale == 4.0


def hooks_are_installed() -> bool:
    """Before the first forward, and once."""
    tower = shared_model().model.vision_tower
    before = sum(len(module._forward_hooks) for module in tower.modules())
    output_capturing.maybe_install_capturing_hooks(tower)
    return 0 < before == sum(len(module._forward_hooks) for module in tower.modules())


def plus(number: int, more: int) -> int:
    return number + more


def merges_parameters() -> bool:
    pipe = PerceptionPipeline(model=shared_model(), task="perception", device="cpu", max_new_tokens=5)
    merged = pipe._prepare_generate_kwargs({"num_beams": 2}, return_dict_in_generate=True)
    return merged.items() >= {"num_beams": 2, "return_dict_in_generate": True}.items()


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(5, 4)
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)


def adapter_names(**arguments) -> set[str]:
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, modules_to_save=["second"], **arguments))
    return {name for name, _ in model.named_parameters()}


def has_no_lora_layers() -> bool:
    names = adapter_names(target_modules=DUMMY_TARGET_MODULES)
    return not any("lora_" in name for name in names) and any("modules_to_save" in name for name in names)


def peft_names_its_parameters() -> bool:
    names = adapter_names(target_modules=["first"], trainable_token_indices={"embed_tokens": [1]})
    parts = ("original_module.", "trainable_tokens_", "lora_")
    return all(any(part in name for name in names) for part in parts) and all(
        name.startswith("base_model.model.") for name in names
    )


GENERATION, PROCESSOR = transformers.GenerationMixin, transformers.ProcessorMixin
MODEL, TRAINER = transformers.PreTrainedModel, transformers.Trainer


def views_share_a_storage() -> bool:
    whole, other = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    ids = [tensor.untyped_storage()._cdata for tensor in (whole, whole[1:], other)]
    return ids[0] == ids[1] != ids[2]


CANARIES = [
    Canary(
        transformers.PreTrainedConfig,
        "_attn_implementation",
        "joins reset the attention of their backbones, packed rows are not refused under flash attention",
        tells_the_attention,
    ),
    *(
        Canary(
            MODEL,
            name,
            "towers that cannot take sdpa are not built with eager attention",
            lambda name=name: (
                hasattr(transformers.CLIPVisionModel, name) and not hasattr(transformers.ResNetModel, "x")
            ),
        )
        for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")
    ),
    Canary(PROCESSOR, "_normalize_conversations", "apply_chat_template", normalizes, ("conversation",)),
    Canary(
        PROCESSOR,
        "_adjust_assistant_masks_indices",
        "the labels of training",
        adjusts_masks,
        ("processed_dict", "generation_indices"),
    ),
    Canary(
        PROCESSOR,
        "_process_images",
        "nothing: an image that stands in many rows is resized for each",
        lambda: "self._process_images(images, " in inspect.getsource(PROCESSOR.__call__),
        ("images", "kwargs"),
    ),
    Canary(
        GENERATION,
        "_prepare_cache_for_generation",
        "generate does not feed boxes back",
        prepares_the_cache,
        ("generation_config", "model_kwargs"),
    ),
    Canary(
        GENERATION,
        "_expand_inputs_for_generation",
        "beams and num_return_sequences",
        expands_inputs,
        ("expand_size", "is_encoder_decoder", "input_ids", "model_kwargs"),
    ),
    Canary(
        GENERATION,
        "_update_model_kwargs_for_generation",
        "generate returns no boxes and masks",
        updates_every_step,
        ("outputs", "model_kwargs"),
    ),
    Canary(None, "_reorder_cache", "beams feed back the boxes of other beams", reorders_the_cache),
    Canary(
        transformers.Pipeline,
        "_prepare_generate_kwargs",
        'pipeline("perception")',
        merges_parameters,
        ("generate_kwargs", "overrides"),
    ),
    Canary(TRAINER, "_prepare_inputs", "coordinates are cast to bfloat16 under DeepSpeed", casts_inputs, ("inputs",)),
    Canary(
        torch.utils.data._utils.worker,
        "_worker_info",
        "dataloader workers but the first get no rows of a mixture",
        worker_info_is_that_variable,
    ),
    Canary(
        chat_template_utils,
        "render_jinja_template",
        "no processor can be made",
        renders,
        ("conversations", "chat_template", "return_assistant_tokens_mask", "add_generation_prompt", "kwargs"),
    ),
    Canary(configuration_utils, "strict", "no config can be loaded", is_strict),
    Canary(
        pt_utils,
        "PipelineDataset",
        'pipeline("perception")',
        lambda: list(pt_utils.PipelineDataset([1, 2], plus, {"more": 3})) == [4, 5],
        ("dataset", "process", "params"),
    ),
    Canary(
        pt_utils,
        "PipelineIterator",
        'pipeline("perception")',
        lambda: list(pt_utils.PipelineIterator(iter([1, 2]), plus, {"more": 3})) == [4, 5],
        ("loader", "infer", "params"),
    ),
    Canary(
        TRAINER,
        "get_batch_samples",
        "losses with gradient accumulation",
        counts_over_the_window,
        ("epoch_iterator", "num_batches", "device"),
    ),
    Canary(
        None,
        "model_accepts_loss_kwargs",
        "losses with gradient accumulation",
        lambda: "self.model_accepts_loss_kwargs" in inspect.getsource(TRAINER.compute_loss),
    ),
    Canary(DynamicLayer, "update", "prefixes are copied or written to", layers_hold_keys_and_values),
    Canary(None, "forward.__signature__", "nothing: a step of generate takes longer", reads_signatures),
    Canary(transformers.Cache, "reorder_cache", "generate", caches_take_attributes, ("beam_idx",)),
    Canary(
        output_capturing, "maybe_install_capturing_hooks", "torch.compile(model, fullgraph=True)", hooks_are_installed
    ),
    Canary(None, "scalar_embed_scale", "signals of Gemma models start too short", gemma_scales),
    Canary(torch.UntypedStorage, "_cdata", "train.py --dry_run counts views twice", views_share_a_storage),
    Canary(None, "DUMMY_TARGET_MODULES", "adapter.mode=heads", has_no_lora_layers),
    Canary(None, "trainable_tokens_", "the table of trainable parameters counts twice", peft_names_its_parameters),
]


@pytest.mark.parametrize("canary", CANARIES, ids=lambda canary: canary.name)
def test_what_the_libraries_do_not_promise_still_holds(canary):
    says = f"{canary.name}: see docs/upgrading.md. What breaks: {canary.breaks}"
    if canary.owner is not None:
        assert hasattr(canary.owner, canary.name), f"{says}. There is no such name."
    if canary.parameters:
        found = inspect.signature(getattr(canary.owner, canary.name)).parameters
        missing = [name for name in canary.parameters if name not in found]
        assert not missing, f"{says}. It does not take {missing} any more."
    assert canary.behaves(), f"{says}. It does something else."


# ---- completeness ----------------------------------------------------------------------------------------------------


def private_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The private names that a file defines, and those that it uses."""
    defined, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            used.update(alias.name for alias in node.names)
    return tuple({name for name in names if re.match(r"_[a-z]", name)} for names in (defined, used))


def test_every_private_name_is_listed():
    """Names of the libraries are those that the repository does not define, and those that it defines anew."""
    defined, used = set(), set()
    for path in CODE_FILES:
        for names, found in zip((defined, used), private_names(ast.parse(path.read_text())), strict=True):
            names |= found
    library = {name for owner in LIBRARY_CLASSES for name in dir(owner)}
    foreign = (used - defined) | (defined & library)
    own = {"_utils", "_exit", "_stat"}  # on the way to `_worker_info`; of `os`; of the METEOR program's wrapper
    missing = {name for name in foreign - own if f"`{name}`" not in LISTED and f".{name}`" not in LISTED}
    assert not missing, f"docs/upgrading.md does not list {sorted(missing)}"


def test_every_canary_is_listed():
    for canary in CANARIES:
        assert canary.name in LISTED, canary.name


def extension_points() -> list[tuple[type, str]]:
    owners = {"PreTrainedModel": MODEL, "Pipeline": transformers.Pipeline, "evaluate.Metric": evaluate.Metric}
    table = LISTED.partition("## Extension points")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", table, flags=re.MULTILINE)
    return [(owners[owner], name) for owner, names in rows for name in re.findall(r"`(\w+)`", names)]


def test_extension_points_are_still_asked_for():
    points = extension_points()
    assert len(points) == 22
    missing = [f"{owner.__name__}.{name}" for owner, name in points if not hasattr(owner, name)]
    assert not missing, f"{missing}: see docs/upgrading.md, no library asks for them any more"
