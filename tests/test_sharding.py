"""Weights in pieces: FSDP2, DDP with unlike batches, weights that wait on another device; against one plain model."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import distributed as dist

from perceptiongpt import PerceptionGPTForConditionalGeneration
from perceptiongpt.training.adapters import add_adapter
from processes import free_port
from rows import GRID_TOKENS, IMAGE, MASK_SIZE, VIS, ForcedVis, batch_and_singles, tiny_model


TOLERANCE = 1e-4
TIMEOUT = 300
STEPS = (1, 3)
FIELDS = ("sequences", "boxes", "mask_logits", "points", "object_scores", "object_valid")


# ---- what every process and the plain model run ----------------------------------------------------------------------


def load(folder: str, mode: str = "full", **kwargs):
    model = PerceptionGPTForConditionalGeneration.from_pretrained(folder)
    return add_adapter(model, mode, **kwargs)


def training_batches() -> list[dict]:
    """Two batches: two rows with images, boxes, masks and points; and one of text alone."""
    picture = [IMAGE] * GRID_TOKENS
    ids = torch.tensor([[1, *picture, 5, VIS, 6, 7, VIS, 2], [1, *picture, 8, 9, 10, VIS, VIS, 2]])
    labels = ids.clone()
    labels[:, : GRID_TOKENS + 4] = -100
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(2, 2, MASK_SIZE, MASK_SIZE, dtype=torch.uint8)
    masks[:, 0, 4:20, 8:30], masks[:, 1, 10:, :12] = 1, 1
    with_signals = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "boxes": torch.rand(2, 2, 2, 2, generator=generator).sort(dim=2).values.flatten(2),
        "masks": masks,
        "boxes_valid": torch.tensor([[True, True], [True, False]]),
        "masks_valid": torch.tensor([[True, False], [True, True]]),
        "points": torch.rand(2, 2, 2, generator=generator),
        "points_valid": torch.tensor([[True, True], [False, True]]),
    }
    ids = torch.tensor([[1, 11, 12, 13, 14, 15, 2]])
    return [with_signals, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]


def targets_of_all_batches() -> dict:
    """Supervised tokens, boxes, masks and points of `training_batches`."""
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in training_batches())
    counts = {"num_boxes_in_batch": 2, "num_masks_in_batch": 2, "num_points_in_batch": 2}
    return {"num_items_in_batch": tokens, **counts}


def prompts(pieces: str = "layers") -> list[dict]:
    """Prompts of two processes. With towers and signal modules as pieces of their own, all need all of them."""
    _, singles = batch_and_singles()
    return [singles[2], singles[3] if pieces == "layers" else singles[0]]


def answer(model, inputs: dict) -> dict:
    output = model.eval().generate(
        **inputs,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        logits_processor=[ForcedVis(inputs["input_ids"].shape[1], STEPS)],
    )
    assert output.object_valid.any()
    return {name: output[name] for name in FIELDS}


def step(model) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=0.05).step()


def gradients(model) -> dict:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def plain_step(folder: str, **kwargs):
    """One training step over all batches in one process."""
    model = load(folder, **kwargs).train()
    losses = [model(**batch, **targets_of_all_batches()).loss for batch in training_batches()]
    sum(losses).backward()
    found = gradients(model)
    step(model)
    return model, found, [loss.item() for loss in losses]


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- one process of two ----------------------------------------------------------------------------------------------


def shard(model, pieces: str) -> None:
    """`layers`: the decoder layers and the rest. `all`: as accelerate wraps what `_no_split_modules` names."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    wrapped = [*model.model.language_model.layers]
    if pieces == "all":
        names = set(model._no_split_modules) | set(model.model.vision_tower._no_split_modules)
        wrapped = [m for m in model.modules() if type(m).__name__ in names or m in wrapped]
        assert len(wrapped) > len(model.model.language_model.layers) + 5
    for module in wrapped:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def fsdp_worker(folder: str, output: Path, rank: int, pieces: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = load(folder)
    shard(model, pieces)
    loss = model.train()(**training_batches()[rank], **targets_of_all_batches()).loss
    (2 * loss).backward()  # FSDP takes the mean over processes
    step(model)
    answered = answer(model, prompts(pieces)[rank])
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(output / "saved", state_dict=state)
    torch.save({"loss": loss.item(), "answer": answered}, output / f"rank{rank}.pt")


def ddp_worker(folder: str, output: Path, rank: int, tower: str) -> None:
    from torch.nn.parallel import DistributedDataParallel

    model = load(folder, train_vision_tower=tower == "trained")
    wrapped = DistributedDataParallel(model.train())
    for _ in range(2):  # parameters that got no gradient are noticed at the start of the second step
        model.zero_grad()
        loss = wrapped(**training_batches()[rank], **targets_of_all_batches()).loss
        (2 * loss).backward()
    torch.save({"loss": loss.item(), "gradients": gradients(model)}, output / f"rank{rank}.pt")


def run_rank(rank: int, worker: str, folder: str, output: str, argument: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    {"fsdp": fsdp_worker, "ddp": ddp_worker}[worker](folder, Path(output), rank, argument)
    dist.destroy_process_group()


def in_two_processes(worker: str, folder: str, output: Path, argument: str) -> list[dict]:
    """Runs a worker above in two new processes, and what each of them saved."""
    done = subprocess.run(
        [sys.executable, __file__, worker, folder, str(output), argument],
        env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return [torch.load(output / f"rank{rank}.pt") for rank in range(2)]


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("pieces", ["layers", "all"])
def test_fsdp2_equals_one_process(folder, tmp_path, pieces):
    """One process has pictures, boxes and masks, the other text alone: neither waits for the other."""
    ranks = in_two_processes("fsdp", folder, tmp_path, pieces)
    model, _, losses = plain_step(folder)
    for rank, inputs in enumerate(prompts(pieces)):
        assert ranks[rank]["loss"] == pytest.approx(losses[rank], abs=TOLERANCE)
        assert_same(ranks[rank]["answer"], answer(model, inputs))
    saved = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert_same(saved.state_dict(), model.state_dict())
    before = PerceptionGPTForConditionalGeneration.from_pretrained(folder).state_dict()
    moved = {name.split(".")[1] for name, value in saved.state_dict().items() if not torch.equal(value, before[name])}
    assert moved >= {"language_model", "weight", *saved.model.signal_modules()}


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_ddp_over_unlike_batches_equals_one_process(folder, tmp_path, tower):
    ranks = in_two_processes("ddp", folder, tmp_path, tower)
    _, expected, losses = plain_step(folder, train_vision_tower=tower == "trained")
    for rank in range(2):
        assert ranks[rank]["loss"] == pytest.approx(losses[rank], abs=TOLERANCE)
        assert_same(ranks[rank]["gradients"], expected)


def offload(module):
    cpu_offload(module, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}


def test_cpu_offload_equals_the_plain_model(folder, tmp_path):
    """Every weight waits elsewhere and is fetched for the forward of its own module alone."""
    plain, model = (PerceptionGPTForConditionalGeneration.from_pretrained(folder).eval() for _ in range(2))
    offload(model)
    for inputs in prompts():
        assert_same(answer(model, inputs), answer(plain, inputs))
    for batch in training_batches():
        with torch.no_grad():
            expected, output = plain(**batch), model(**batch)
        for name in ("loss_lm", "loss_box", "loss_mask", "loss_iou", "logits"):
            torch.testing.assert_close(output[name], expected[name], atol=TOLERANCE, rtol=TOLERANCE)
    model.save_pretrained(tmp_path, state_dict=get_state_dict_offloaded_model(model))
    saved = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(saved.state_dict(), plain.state_dict())


def test_training_over_offloaded_backbones(folder, tmp_path):
    """A step in the mode `heads`: gradients pass through the frozen, offloaded backbones. accelerate trains none of
    what it offloads."""
    models, steps = [], []
    for offloaded in (False, True):
        model = PerceptionGPTForConditionalGeneration.from_pretrained(folder).train()
        model.lm_head.requires_grad_(False)
        for backbone in (model.model.vision_tower, model.model.language_model):
            backbone.requires_grad_(False)
            if offloaded:
                offload(backbone)
        loss = sum(model(**batch, **targets_of_all_batches()).loss for batch in training_batches())
        loss.backward()
        found = gradients(model)
        assert all(gradient.abs().max() > 0 for name, gradient in found.items() if not name.endswith("k_proj.bias"))
        step(model)
        models.append(model)
        steps.append({**found, "loss": loss})
    assert_same(*steps)
    for inputs in prompts():
        assert_same(*(answer(model, inputs) for model in models))
    models[1].save_pretrained(tmp_path, state_dict=get_state_dict_offloaded_model(models[1]))
    saved = PerceptionGPTForConditionalGeneration.from_pretrained(tmp_path)
    assert_same(saved.state_dict(), models[0].state_dict())


if __name__ == "__main__":
    # Forked here, where nothing but imports has run: they take longer than everything else.
    torch.multiprocessing.start_processes(run_rank, tuple(sys.argv[1:]), nprocs=2, start_method="fork")
