"""The model of a recipe: how it is loaded, which parts of it train, and how it is saved without its adapter.

Adapter modes: `projector` trains what stands between the two backbones, the projector and a pyramid tower's stage maps;
`heads` trains everything beside the two backbones (projector, mixtures, signal modules) and the rows of the added
tokens; `lora` trains that and low-rank updates of the language model's projections; `qlora` is `lora` over 4-bit
weights; `full` trains all weights. Weights that train are float32 whatever `model.dtype` is: in bfloat16, an update
smaller than 1/256 of a weight is lost.
"""

import copy
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import BitsAndBytesConfig, set_seed

from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt.training.language_model import save_language_model
from perceptiongpt.training.recipe import LORA_TARGETS


BACKBONES = ("vision_tower", "language_model")
PROJECTORS = ("vision_stages.", "multi_modal_projector.")  # what stands between them
PLAIN_MODES = ("projector", "full")  # that train weights of the model itself, without an adapter
# Outputs of `get_image_features` that hold a tower's own states, not what the model makes of them.
TOWER_OUTPUTS = ("last_hidden_state", "hidden_states", "attentions")


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_model(recipe: dict, quantized: bool | None = None):
    """The recipe's model with its loss weights, and its processor.

    Args:
        recipe: a completed recipe without stages, or that of one stage.
        quantized: load the weights in 4 bit; by default in the mode `qlora`.
    """
    model_class, settings = PerceptionGPTForConditionalGeneration, recipe["model"]
    dtype = model_dtype(recipe)
    signals = {} if settings["signals"] is None else {"signals": settings["signals"]}
    more = {**signals, **settings["looks"]}
    if settings["checkpoint"] is not None:
        kwargs = {"dtype": dtype, "attn_implementation": settings["attn_implementation"], **more}
        if recipe["adapter"]["mode"] == "qlora" if quantized is None else quantized:
            with torch.device("meta"):
                model_on_meta = model_class(model_class.config_class.from_pretrained(settings["checkpoint"], **more))
            # Naming any module drops the default, which spares `lm_head`; float32 modules must not be quantised.
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=["lm_head", "model.vision_tower"]
                + [f"model.{name}" for name in own_modules(model_on_meta)],
            )
        model = model_class.from_pretrained(settings["checkpoint"], **kwargs)
        if model.config.look_max:
            signals |= {name: getattr(model.config, name) for name in ("look_tokens", "look_frame", "reenc_queries")}
        processor = PerceptionGPTProcessor.from_pretrained(settings["checkpoint"], **signals)
    else:
        if settings["vlm"] is not None:
            model = model_class.from_vlm_pretrained(settings["vlm"], dtype=dtype, **more)
            processor = PerceptionGPTProcessor.from_backbones(settings["vlm"], settings["vlm"], model.config)
        else:
            config = {**settings["config"], **more}
            model, processor = join_backbones(settings["vision"], settings["text"], dtype, config)
        model.set_attn_implementation(dict.fromkeys(("vision_config", "text_config"), settings["attn_implementation"]))
    set_loss_weights(model.config, recipe["loss"])
    return model, processor


def join_backbones(vision: str, text: str | dict, dtype: torch.dtype, config: dict):
    """A new model over two backbones, and its processor; `text` may be the arguments of a fresh language model."""
    if isinstance(text, dict):
        with tempfile.TemporaryDirectory() as folder:
            save_language_model(folder, **text)
            return join_backbones(vision, folder, dtype, config)
    model = PerceptionGPTForConditionalGeneration.from_vision_text_pretrained(vision, text, dtype=dtype, **config)
    return model, PerceptionGPTProcessor.from_backbones(vision, text, model.config)


def model_dtype(recipe: dict) -> torch.dtype:
    """The recipe's `model.dtype`."""
    dtype = getattr(torch, str(recipe["model"]["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"model.dtype {recipe['model']['dtype']!r} is no torch dtype, e.g. float32 or bfloat16")
    return dtype


def set_loss_weights(config, weights: dict[str, float]) -> None:
    """Set the weights of loss terms in a model's config, by names such as `lm` or `box_giou`."""
    for name, weight in weights.items():
        signal, _, term = name.partition("_")
        owner = config if name == "lm" else getattr(config, f"{signal}_config", None)
        attribute = "lm_loss_weight" if name == "lm" else f"{term}_weight"
        if not hasattr(owner, attribute):
            raise ValueError(f"loss.{name}: the config has no such weight; e.g. lm, box_l1, box_giou, mask_dice")
        setattr(owner, attribute, float(weight))


# ---- what trains -----------------------------------------------------------------------------------------------------


def own_modules(model) -> list[str]:
    """Names of the modules beside the two backbones: projector, mixtures, stage maps, position table, signals."""
    return [
        name
        for name, module in model.model.named_children()
        if name not in BACKBONES and next(module.parameters(), None) is not None
    ]


def add_adapter(
    model,
    mode: str,
    rank: int = 32,
    alpha: int = 64,
    dropout: float = 0.0,
    target_modules=LORA_TARGETS,
    train_vision_tower: bool = False,
    rates: dict[str, float] | None = None,
):
    """Make the parts of a model trainable, in float32, that an adapter mode trains, and freeze the others.

    Args:
        model: a `PerceptionGPTForConditionalGeneration`.
        mode: `projector`, `heads`, `lora`, `qlora` or `full`.
        rank, alpha, dropout: of LoRA (paper: rank 32).
        target_modules: names of the language model's projections that get LoRA.
        train_vision_tower: for `full` only.
        rates: by the name of a part, or a dotted name in it, its learning rate as a share of the run's; 0 freezes it.

    Returns:
        The model itself for `projector` and `full`, else a `PeftModel` around it.

    Raises:
        ValueError: a part of `rates` does not train, or its rate is negative.
    """
    rates = rates or {}
    if train_vision_tower and mode != "full":
        raise ValueError(f"adapter.train_vision_tower needs the mode full; {mode} keeps the tower frozen")
    if mode == "projector":
        for name, parameter in model.model.named_parameters():
            parameter.requires_grad_(name.startswith(PROJECTORS))
        model.lm_head.requires_grad_(False)
    elif mode == "full":
        unreached = unreached_tower_parameters(model) if train_vision_tower else set()
        for name, parameter in model.named_parameters():
            in_tower = name.startswith("model.vision_tower.")
            parameter.requires_grad_(not in_tower or (train_vision_tower and name not in unreached))
        if train_vision_tower:
            model.model.vision_tower.float()  # parts that no loss reaches read the float32 states of those that train
    else:
        model = add_peft_adapter(model, mode, rank, alpha, dropout, target_modules)
    for part, rate in rates.items():
        found = [one for name, one in model.named_parameters() if f".{part}." in f".{name}." and one.requires_grad]
        if not found or not rate >= 0:
            trained = ", ".join(name for name, trainable, _ in parameter_table(model) if trainable and name != "all")
            raise ValueError(
                f"adapter.rates: {part}: {rate}; expected numbers from 0 on for parts that train: {trained}"
            )
        for parameter in found:
            parameter.requires_grad_(rate > 0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def add_peft_adapter(model, mode: str, rank: int, alpha: int, dropout: float, target_modules):
    """The PEFT adapter of `heads`, `lora` and `qlora`; see `add_adapter`."""
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import DUMMY_TARGET_MODULES

    config = model.config
    added = [config.image_token_id, config.vis_token_id, config.phrase_start_token_id, config.phrase_end_token_id]
    added += config.reserved_token_ids
    # A pattern, because vision towers have a q_proj too. `heads` has no LoRA layers, only what follows.
    projections = rf".*\blanguage_model\..*\.({'|'.join(target_modules)})"
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=DUMMY_TARGET_MODULES if mode == "heads" else projections,
        modules_to_save=own_modules(model),
        trainable_token_indices={"embed_tokens": added, "lm_head": added},
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks for it
        return get_peft_model(model, lora_config)


def unreached_tower_parameters(model) -> set[str]:
    """Names of the vision tower's parameters that no loss depends on, such as its pooler, head or last norm.

    The model's image features are computed once on the meta device, without values, and traced back.
    """
    side, finer = model.config.image_size, model.config.mask_image_size
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config)).model.eval()
        outputs = dict(twin.get_image_features(torch.zeros(1, 3, side, side), return_dict=True))
        if finer:
            outputs["mask_features"] = twin.get_mask_features(torch.zeros(1, 3, finer, finer))
    read = [tensor for name, value in outputs.items() if name not in TOWER_OUTPUTS for tensor in tensors_in(value)]
    parameters = dict(twin.vision_tower.named_parameters())
    gradients = torch.autograd.grad(sum(tensor.sum() for tensor in read), [*parameters.values()], allow_unused=True)
    return {
        f"model.vision_tower.{name}" for name, gradient in zip(parameters, gradients, strict=True) if gradient is None
    }


def tensors_in(value) -> Iterator[torch.Tensor]:
    """The tensors with a gradient in a value that may be a tensor, a mapping or a sequence of such."""
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


# ---- the table -------------------------------------------------------------------------------------------------------


def named_parts(model) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(part, parameter) of every parameter of a model, adapters included."""
    for name, parameter in model.named_parameters():
        if "original_module." in name:  # PEFT's frozen copy of a module that is trained fully
            continue
        part = name.removeprefix("base_model.model.").removeprefix("model.").split(".")[0]
        if "lora_" in name:
            part = f"{part} (LoRA)"
        elif "trainable_tokens_" in name:
            part = "rows of added tokens"
        yield part, parameter


def parameter_table(model) -> list[tuple[str, int, int]]:
    """(part, trainable parameters, parameters) for each part of a model, adapters included, and last their total."""
    counts = {}
    for part, parameter in named_parts(model):
        state = getattr(parameter, "quant_state", None)
        size = parameter.numel() if state is None else int(np.prod(state.shape))
        trainable, total = counts.get(part, (0, 0))
        counts[part] = (trainable + size * parameter.requires_grad, total + size)
    rows = [(part, trainable, total) for part, (trainable, total) in counts.items()]
    return [*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]


def trainable_dtypes(model) -> dict[str, str]:
    """For each part of a model of which something trains, the dtypes of what trains."""
    found = {}
    for part, parameter in named_parts(model):
        if parameter.requires_grad:
            for key in (part, "all"):
                found.setdefault(key, set()).add(str(parameter.dtype).removeprefix("torch."))
    return {part: ", ".join(sorted(dtypes)) for part, dtypes in found.items()}


def print_parameter_table(model) -> None:
    """Print `parameter_table` and `trainable_dtypes`."""
    dtypes = trainable_dtypes(model)
    print(f"{'part':<28}{'trainable':>16}{'parameters':>16}{'share':>9}  dtype of what trains")
    for part, trainable, total in parameter_table(model):
        share = trainable / max(total, 1)
        print(f"{part:<28}{trainable:>16,}{total:>16,}{share:>9.2%}  {dtypes.get(part, '')}".rstrip())


# ---- saving ----------------------------------------------------------------------------------------------------------


def save_plain_model(trainer, recipe: dict, output: Path) -> None:
    """Save the adapter, if there is one, and the plain model with it merged in, with its processor.

    The plain model has the recipe's `model.dtype`; `trainer.model` is it afterwards, where it fits into one process.
    """
    if trainer.is_fsdp_enabled:  # the final model is whole, whatever checkpoints are
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    if recipe["adapter"]["mode"] in PLAIN_MODES:
        trainer.save_model(str(output))
        rounds = model_dtype(recipe) != torch.float32
        if (rounds or trainer.is_fsdp_enabled) and trainer.is_world_process_zero():
            round_saved_model(output, model_dtype(recipe))
        return
    trainer.save_model(str(output / "adapter"))
    if not trainer.is_world_process_zero():
        return
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or recipe["adapter"]["mode"] == "qlora":
        # In pieces or in 4 bit, the weights cannot be merged into: a plain copy of the base is.
        from peft import PeftModel

        set_seed(trainer.args.seed)  # a base that was joined with new modules gets the same ones
        base, _ = load_model(recipe, quantized=False)
        peft_model = PeftModel.from_pretrained(base, output / "adapter")
    else:
        peft_model = trainer.accelerator.unwrap_model(trainer.model)
    model = peft_model.merge_and_unload()
    signal_parameters = {id(p) for module in model.model.signal_modules().values() for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in signal_parameters and parameter.is_floating_point():
            parameter.data = parameter.data.to(model_dtype(recipe))
    model.save_pretrained(output)
    trainer.processing_class.save_pretrained(output)
    trainer.model = model


def round_saved_model(folder: Path, dtype: torch.dtype) -> None:
    """Save a model again in another dtype; the modules that must be float32 stay so.

    Beside a model that was in pieces, the library saves the code of FSDP's class in place of the model's own.
    """
    model = PerceptionGPTForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    rounded = folder / "rounded"
    model.save_pretrained(rounded)
    for old in (*folder.glob("model*.safetensors*"), *folder.glob("_fsdp_*.py")):
        old.unlink()
    for path in rounded.iterdir():
        path.replace(folder / path.name)
    shutil.rmtree(rounded)
