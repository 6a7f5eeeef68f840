"""The memory of a training step on each GPU, computed from configs: no weight is read, nothing is allocated.

Weights are counted on the meta device. What the forward keeps for the backward is found by running it over fake
tensors, which have shapes and no values, with two layers of the language model: the others are like the second. Not
counted: the CUDA context (about half a GiB), fragmentation, buffers of communication beside
those that are named in `memory_per_gpu`.
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from perceptiongpt.data.collator import IGNORED_LABEL, answer_slots


STRATEGIES = ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3")
FLOAT32 = 4  # bytes
NF4 = 0.5 + 4 / 64  # bytes of a 4-bit weight, with its share of the scale of a block
GATHERED_BY_ZERO3 = 10**9  # DeepSpeed's default of `stage3_max_live_parameters`


@dataclass(frozen=True)
class BatchShape:
    """What the memory of a step depends on in a batch.

    Attributes:
        rows, length: of `input_ids`.
        learned: positions of which logits are computed.
        images, finer_images: rows of `pixel_values` and of `mask_pixel_values`.
        slots: the most `<vis>` of a row.
        masks, masks_read: answers whose mask is learned, and slots that are read as masks.
    """

    rows: int
    length: int
    learned: int
    images: int = 0
    finer_images: int = 0
    slots: int = 0
    masks: int = 0
    masks_read: int = 0

    @classmethod
    def of(cls, batch: dict, config) -> "BatchShape":
        """The shape of a batch of `PerceptionCollator`."""
        labels, slots = batch["labels"], batch["boxes_valid"].shape[1]
        masks = 0
        if "masks_valid" in batch:
            answers = answer_slots(batch["input_ids"], labels, config.vis_token_id, slots)
            masks = int((answers & batch["masks_valid"]).sum())
        return cls(
            *labels.shape,
            learned=int((labels[:, 1:] != IGNORED_LABEL).any(0).sum()),
            images=len(batch.get("pixel_values", ())),
            finer_images=len(batch.get("mask_pixel_values", ())),
            slots=slots,
            masks=masks,
            masks_read=int(batch["masks_read"].sum()) if "masks_read" in batch else 0,
        )


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a training step in one process that holds everything.

    Attributes:
        weights: of all parameters.
        trained: the float32 weights that train, which are among them; their gradients take as much, Adam twice that.
        piece: weights of the largest module that FSDP gathers by itself.
        root: weights that belong to no such module, gathered all along; `root_trained`: those that train.
        activations: what the forward keeps for the backward, without logits.
        checkpointed: the same with gradient checkpointing: the states between layers, and one layer at a time.
        logits: logits, their loss and their gradient.
        backward: gradients of activations that are there at a time: three of the widest tensor that a layer keeps, as
            where two projections of an MLP are multiplied.
    """

    weights: int
    trained: int
    piece: int
    root: int
    root_trained: int
    activations: int
    checkpointed: int
    logits: int
    backward: int


# ---- one process -----------------------------------------------------------------------------------------------------


def step_bytes(build: Callable, shape: BatchShape, compute_dtype: torch.dtype, quantized: bool = False) -> StepBytes:
    """The bytes of a step.

    Args:
        build: `build(layers)` returns the model on the meta device with its adapter, and with so many layers of the
            language model; all for None.
        shape: of the batch.
        compute_dtype: what autocast computes in.
        quantized: the frozen weights of the language model's layers are 4-bit ones.
    """
    model = build(None)
    num_layers = plain(model).config.text_config.num_hidden_layers

    def size(parameters) -> int:
        return sum(
            int(p.numel() * (NF4 if quantized and in_layer and p.ndim == 2 and not p.requires_grad else p.itemsize))
            for p, in_layer in parameters
        )

    in_layers = {id(p) for p in plain(model).model.language_model.layers.parameters()}
    everything = {id(p): (p, id(p) in in_layers) for p in model.parameters()}
    names = set(plain(model)._no_split_modules)
    pieces = [module for module in model.modules() if type(module).__name__ in names]
    in_pieces = {id(p) for piece in pieces for p in piece.parameters()}
    root = [both for key, both in everything.items() if key not in in_pieces]
    trained = [p for p, _ in everything.values() if p.requires_grad]

    before, layer, behind, logits, states, widest = kept_for_backward(build(2), shape, compute_dtype)
    # Autocast keeps the copies of trained weights that it makes until the forward ends.
    lowers = compute_dtype.itemsize < FLOAT32
    casts = sum(p.numel() for p, in_layer in everything.values() if in_layer and p.requires_grad) if lowers else 0
    return StepBytes(
        weights=size(everything.values()),
        trained=sum(p.numel() * FLOAT32 for p in trained),
        piece=max((size((p, id(p) in in_layers) for p in piece.parameters()) for piece in pieces), default=0),
        root=size(root),
        root_trained=sum(p.numel() * FLOAT32 for p, _ in root if p.requires_grad),
        activations=before + num_layers * layer + behind,
        checkpointed=before + num_layers * states + casts * compute_dtype.itemsize + layer + behind,
        logits=logits,
        backward=3 * widest,
    )


def plain(model):
    """A model without its adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def with_layers(config, layers: int):
    """A config with so many layers of the language model."""
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = layers
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:layers]
    return config


def kept_for_backward(model, shape: BatchShape, compute_dtype: torch.dtype) -> tuple[int, ...]:
    """What a forward keeps for its backward beside weights, in bytes.

    Args:
        model: on the meta device, with its adapter and two layers of the language model.

    Returns:
        what comes before these layers; a layer; what comes behind them; logits, their loss and their gradient; and,
        which are parts of a layer, its output and the widest tensor that it keeps.
    """
    model.train()
    base = plain(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        own = {id_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
        kept, at = {}, []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if id_of(tensor) not in own:
                kept[id_of(tensor)] = tensor
            return tensor

        def note(*_) -> None:
            at.append([tensor.untyped_storage().nbytes() for tensor in kept.values()])

        for layer in base.model.language_model.layers:
            layer.register_forward_pre_hook(note)
        layer.register_forward_hook(note)
        autocast = torch.autocast("cpu", dtype=compute_dtype) if compute_dtype != torch.float32 else nullcontext()
        with saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            states = run_forward(base, shape)
            note()
            logits = base.lm_head(states[:, : shape.learned])
            labels = torch.zeros(logits.shape[:2], dtype=torch.long)
            base.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=torch.ones(()),
                shift_labels=labels,
            )
            note()
        first, second, end_of_layers, before_logits, everything = map(sum, at)
        gradient = logits.numel() * (FLOAT32 + logits.itemsize)  # in float32, and again in the logits' dtype
        parts = (first, end_of_layers - second, before_logits - end_of_layers, everything - before_logits + gradient)
        return *parts, states.numel() * states.itemsize, max(at[2][len(at[1]) :], default=0)


def id_of(tensor: torch.Tensor) -> int:
    """What views of one storage have in common."""
    return tensor.untyped_storage()._cdata


def run_forward(model, shape: BatchShape) -> torch.Tensor:
    """What `PerceptionGPTForConditionalGeneration.forward` runs for a batch before its logits, but for what looks at
    values; returns the last hidden states, `(rows, length, hidden_size)`."""
    inner, config = model.model, model.config
    embeddings = inner.get_input_embeddings()(torch.zeros(shape.rows, shape.length, dtype=torch.long))
    features = torch.empty(0, config.mask_cells, config.feature_size)
    if shape.images:
        side = config.image_size
        image = inner.get_image_features(torch.empty(shape.images, 3, side, side), return_dict=True)
        features = features if image.mask_features is None else image.mask_features
        cells = torch.ones(shape.rows, shape.length, 1, dtype=torch.bool)
        embeddings = embeddings.masked_scatter(cells, image.pooler_output.to(embeddings.dtype))
    if shape.finer_images:
        side = config.mask_image_size
        features = inner.get_mask_features(torch.empty(shape.finer_images, 3, side, side))
    for name, signal in inner.signals.items():
        count = shape.masks_read if signal.reads_image else shape.rows * shape.slots
        if count:
            with torch.autocast("cpu", enabled=False):
                encoded = signal.encode(inner, signal.pad(config, 1, count, "cpu")[0]).to(embeddings.dtype)
            embeddings = embeddings.flatten(0, 1).index_add(0, torch.arange(count), encoded).view_as(embeddings)
    attention = torch.ones(shape.rows, 1, shape.length, shape.length, dtype=torch.bool)
    states = inner.language_model(inputs_embeds=embeddings, attention_mask=attention).last_hidden_state
    if shape.slots:
        answers = states[:, :1].expand(-1, shape.slots, -1).flatten(0, 1)
        image_index = torch.zeros(len(answers), dtype=torch.long)
        names = [name for name, signal in inner.signals.items() if shape.masks or not signal.reads_image]
        learned = {name: torch.arange(shape.masks) for name in names if inner.signals[name].reads_image}
        decoded = inner.decode_signals(answers, features, image_index, names, False, learned)
        for name in names:
            values, quality = decoded[name]
            inner.signals[name].loss(config, values, quality, torch.zeros_like(values))
    return states


# ---- several processes -----------------------------------------------------------------------------------------------


def memory_per_gpu(step: StepBytes, strategy: str | None, gpus: int) -> dict[str, int]:
    """Bytes on each of several GPUs: `weights`, `training` (gradients and Adam's moments), `activations` and
    `checkpointed` (each with its gradients), and `logits`.

    Args:
        step: of one process; for ZeRO that of float32 weights, as its recipes have them.
        strategy: one of `STRATEGIES`; None for a single GPU.
    """
    ways = {"activations": step.activations, "checkpointed": step.checkpointed}
    shared = {name: kept + step.backward for name, kept in ways.items()} | {"logits": step.logits}
    if strategy is None:
        weights, training = step.weights, 3 * step.trained
    elif strategy == "DDP":  # gradients are there twice: in the buckets that are summed, too
        weights, training = step.weights, 4 * step.trained
    elif strategy == "FSDP2":  # gathered: the root, one piece, and the next one, which is fetched meanwhile
        weights = step.weights // gpus + step.root + 2 * step.piece
        training = 3 * step.trained // gpus + step.root_trained
    elif strategy == "ZeRO-2":  # the optimizer has a copy of its part of the weights
        weights, training = step.weights, 4 * step.trained // gpus
    else:
        weights = step.weights // gpus + min(step.weights, GATHERED_BY_ZERO3 * FLOAT32)
        training = 4 * step.trained // gpus
    return {"weights": weights, "training": training, **shared}
