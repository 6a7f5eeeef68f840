"""The tower runs once for each image and resolution, and not at all for images whose features are on disk."""

import os

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from drawn_rows import drawn_coco_folder, drawn_rows
from perceptiongpt import PerceptionGPTForConditionalGeneration, PerceptionGPTProcessor
from perceptiongpt import train as training
from perceptiongpt.data.collator import PerceptionCollator
from perceptiongpt.training.adapters import add_adapter
from perceptiongpt.training.features import FeatureCache
from perceptiongpt.training.recipe import complete_recipe
from perceptiongpt.training.trainer import TRAINING_DEFAULTS, PerceptionTrainer


LOSSES = ("loss", "loss_lm", "loss_box", "loss_mask", "loss_iou")


def count_images(tower) -> list[tuple[int, int]]:
    """(images, their side) of each pass of a tower from now on."""
    passes = []
    tower.register_forward_pre_hook(lambda module, inputs: passes.append((len(inputs[0]), inputs[0].shape[-1])))
    return passes


def frozen(model):
    """The model inside, with a tower that does not train."""
    model.model.vision_tower.requires_grad_(False)
    return model.model


@pytest.mark.parametrize(("vision", "finer"), [("clip", None), ("clip", 64), ("convnextv2", None)])
def test_a_packed_image_is_encoded_once_at_each_resolution(make_tiny_model, tmp_path, vision, finer):
    sizes = {"mask_image_size": finer} if finer else {}
    if vision != "clip":
        sizes |= {"image_size": 32, "image_grid": 4, "mask_grid": 8, "feature_size": 24}
    model, processor = make_tiny_model(vision=vision, **sizes)
    rows = drawn_rows(2)
    passes, cache = count_images(model.model.vision_tower), FeatureCache(tmp_path, frozen(model), "float32")
    plain = PerceptionCollator(processor, model.config, pack="auto")
    collator = PerceptionCollator(processor, model.config, pack="auto", feature_cache=cache)
    expected = model(**plain(rows))
    assert passes == [(2, 32), (2, finer)][: 2 if finer else 1]
    passes.clear()

    # Until all images of a batch are there, it has their pixels and keys.
    batch = collator(rows)
    for name, keep in (("pixel_values", True), ("mask_pixel_values", bool(finer))):
        assert (f"{name}_keys" in batch) == (name in batch) == keep
        if keep:
            cache.write(batch.pop(f"{name}_keys"), model.model.encode_tower(batch[name])[1])
    passes.clear()
    cached = collator(rows)
    assert not {"pixel_values", "mask_pixel_values", "pixel_values_keys"} & set(cached)
    found = model(**cached)
    assert not passes
    for name in LOSSES:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)
    found.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="at most one of"):
        model(**cached, pixel_values=torch.zeros(2, 3, 32, 32))


def recipe_with_cache(tiny_model_dir, coco_folder, cache, **training_settings) -> dict:
    source = {"annotations": str(coco_folder / "instances.json"), "images": str(coco_folder)}
    settings = {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 3, "num_train_epochs": 2}
    return complete_recipe(
        {
            "model": {"checkpoint": tiny_model_dir},
            "adapter": {"mode": "lora", "rank": 4},
            "data": {"train": source, "eval": source, "generate_rows": 0, "feature_cache": cache and str(cache)},
            "training": {**settings, "logging_steps": 1, "eval_strategy": "epoch", **training_settings},
        }
    )


def test_training_from_features_equals_training_from_images(tiny_model_dir, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    coco_folder, passes, histories = drawn_coco_folder(folder), [], []

    def load_and_count(recipe):
        model, processor = load_model(recipe)
        passes.append(count_images(model.model.vision_tower))
        return model, processor

    load_model = training.load_model
    monkeypatch.setattr(training, "load_model", load_and_count)
    for index, cache in enumerate((None, tmp_path / "features")):
        recipe = recipe_with_cache(tiny_model_dir, coco_folder, cache)
        log = training.train(recipe, tmp_path / f"run{index}").state.log_history
        histories.append([{key: entry[key] for key in entry if "loss" in key} for entry in log])
    # One step, then one batch of evaluation, in each of two epochs.
    assert passes == [[(3, 32)] * 4, [(3, 32)]]
    for expected, entry in zip(*histories, strict=True):
        assert entry == pytest.approx(expected, abs=1e-5)


def test_features_are_kept_for_one_tower(make_tiny_model, tmp_path):
    """Other weights, another dtype and other pixels are not mixed up."""
    model, processor = make_tiny_model()
    folders = [FeatureCache(tmp_path, frozen(model), dtype).folder for dtype in ("float32", "float32", "bfloat16")]
    with torch.no_grad():
        model.model.vision_tower.get_parameter(next(iter(dict(model.model.vision_tower.named_parameters())))).add_(1e-4)
    folders.append(FeatureCache(tmp_path, model.model, "float32").folder)
    assert folders[0] == folders[1] and len(set(folders)) == 3
    pixels = torch.rand(2, 3, 32, 32)
    keys, other = FeatureCache.keys(pixels), FeatureCache.keys(pixels + 1e-6)
    assert keys.shape == (2, 2) and torch.equal(keys, FeatureCache.keys(pixels.clone()))
    assert not (keys[:, None] == other).all(-1).any() and not torch.equal(keys[0], keys[1])


def write_in_a_worker(cache, keys, states):
    """A loader whose workers all write the same images, over and over."""

    class Writes(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            cache.write(keys, states)
            found = cache.read(keys)
            return all(torch.equal(a, b) for a, b in zip(found, states, strict=True))

    return DataLoader(Writes(), batch_size=4, num_workers=2)


def test_several_processes_and_interrupted_writes(make_tiny_model, tmp_path, monkeypatch):
    model, _ = make_tiny_model()
    cache = FeatureCache(tmp_path, frozen(model), "float32")
    pixels = torch.rand(3, 3, 32, 32)
    keys, (_, states) = cache.keys(pixels), model.model.encode_tower(pixels)
    assert cache.read(keys) is None
    assert all(batch.all() for batch in write_in_a_worker(cache, keys, states))
    assert not list(cache.folder.rglob("*.new"))
    # A file that the machine left cut off is as good as none, and written again.
    path = cache.path(keys[1])
    path.write_bytes(path.read_bytes()[:-20])
    assert cache.read(keys) is None and cache.read(keys[:1]) is not None
    # A process that is stopped before it moves its file has changed nothing.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def stop(*arguments):
            raise KeyboardInterrupt

        patch.setattr(os, "replace", stop)
        cache.write(keys[1:2], [layer[1:2] for layer in states])
    assert cache.read(keys) is None
    cache.write(keys[1:2], [layer[1:2] for layer in states])
    assert all(torch.equal(a, b) for a, b in zip(cache.read(keys), states, strict=True))


def test_the_cache_is_refused_where_the_tower_trains(tiny_model, tmp_path, tiny_model_dir):
    model, _ = tiny_model
    with pytest.raises(ValueError, match="this one trains"):
        FeatureCache(tmp_path, model.model, "float32")
    recipe = {
        "model": {"checkpoint": tiny_model_dir},
        "adapter": {"mode": "full", "train_vision_tower": True},
        "data": {"train": {"annotations": "a", "images": "b"}, "feature_cache": str(tmp_path)},
    }
    with pytest.raises(ValueError, match="adapter.train_vision_tower: false"):
        complete_recipe(recipe)
    dense = {**recipe, "adapter": {}, "stages": [{"name": "cells", "kind": "dense"}]}
    with pytest.raises(ValueError, match="stage 'cells': data.feature_cache is for stages of the kind joint"):
        complete_recipe(dense)


def test_a_frozen_tower_runs_once_under_gradient_checkpointing(tiny_model_dir, tmp_path):
    model = PerceptionGPTForConditionalGeneration.from_pretrained(tiny_model_dir)
    processor = PerceptionGPTProcessor.from_pretrained(tiny_model_dir)
    runs, learns = [], []
    tower = model.model.vision_tower
    (layer,) = (module for name, module in tower.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda module, inputs: runs.append(inputs[0].requires_grad))
    model.model.language_mixture.register_forward_pre_hook(lambda _, inputs: learns.append(inputs[0][0].requires_grad))
    settings = {**TRAINING_DEFAULTS, "use_cpu": True, "max_steps": 1, "gradient_checkpointing": True}
    trainer = PerceptionTrainer(
        model=add_adapter(model, "lora", rank=2),
        args=TrainingArguments(str(tmp_path), **settings, disable_tqdm=True),
        data_collator=PerceptionCollator(processor),
        train_dataset=drawn_rows(1),
        processing_class=processor,
    )
    trainer.train()
    assert runs == [False] and learns == [False]
