"""data/mixtures.py: what an epoch holds, its shares, exact resuming, token budgets, what is left out, training."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer

from drawn_rows import drawn_rows
from perceptiongpt import train as training
from perceptiongpt.data import mixtures
from perceptiongpt.data import prepare as preparing
from perceptiongpt.data.collator import PerceptionCollator
from perceptiongpt.data.mixtures import DrawnPart, Mixture, MixtureCollator, Part, load_parts
from perceptiongpt.data.prepare import prepare
from perceptiongpt.data.sources import prepared_files


SIZES = {"a": 6, "b": 3, "c": 1}  # pictures a part, 5 rows each


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Prepared folders of drawn rows, small shards and row groups."""
    root = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(preparing.ROWS_PER_GROUP, "embed", 5)
        for seed, (name, pictures) in enumerate(SIZES.items()):
            found = [row | {"source": name} for row in drawn_rows(pictures, seed)]
            patch.setattr(preparing, "raw_rows", lambda *args, found=found, **kwargs: iter(found))
            prepare(name, root / name, pictures="embed", rows_per_shard=20)
    return root


def parts_of(folders: Path, **own) -> list[Part]:
    return [Part(name, prepared_files(folders / name), **own.get(name, {})) for name in SIZES]


def name_of(row: dict) -> tuple:
    return row["source"], row["image_id"], row["messages"][0]["content"]


def names_of(batch: dict) -> list:
    rows = [row for item in batch["rows"] for row in (item if isinstance(item, list) else [item])]
    return [(row["epoch"], *name_of(row)) for row in rows]


def test_an_epoch_gives_every_row_once_in_the_proportions_asked_for(folders):
    parts = parts_of(folders, a={"weight": 3}, b={"weight": 1}, c={"weight": 1, "per_epoch": 2})
    assert [len(part) for part in parts] == [30, 15, 5]
    mixture = Mixture(parts)
    epochs = [[tuple(reference.values()) for reference in mixture.references(epoch)] for epoch in range(3)]
    for found in epochs:
        assert len(set(found)) == len(found) == 30 + 15 + 2
        assert Counter(part for part, _, _ in found) == {0: 30, 1: 15, 2: 2}
    assert epochs[0] != epochs[1] and set(epochs[0]) != set(epochs[1])  # another order, other capped rows
    assert [tuple(reference.values()) for reference in Mixture(parts).references(1)] == epochs[1]
    many = [Part(name, prepared_files(folders / name), weight) for name, weight in (("a", 9), ("a", 1))]
    first = [reference["part"] for reference in Mixture(many, seed=1).references(0)][:30]
    assert first.count(0) > 20


def test_processes_and_workers_share_an_epoch_without_overlap(folders):
    whole = Counter(tuple(reference.values()) for reference in Mixture(parts_of(folders)).references(0))
    shared = Counter()
    for consumer in range(4):
        found = [tuple(reference.values()) for reference in Mixture(parts_of(folders)).references(0, consumer, 4)]
        assert 11 <= len(found) <= 14
        shared.update(found)
    assert shared == whole
    with pytest.raises(ValueError, match="too few for 100"):
        Mixture(parts_of(folders)).references(0, 99, 100)
    rows = []
    for process in range(2):
        mixture = Mixture(parts_of(folders), batch_size=4, process=process, processes=2)
        rows += [name for batch in islice(mixture, 20) for name in names_of(batch)]
    rows = [row for row in rows if row[0] == 0]
    assert len(rows) == len(set(rows)) == 50


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 4},
        {"batch_size": 2, "pack": 3, "window": 16},
        {"token_budget": 60, "window": 12},
        {"token_budget": 90, "pack": 4, "window": 20},
        {"batch_size": 4, "stopping_strategy": "first_exhausted"},
        {"batch_size": 4, "stopping_strategy": "all_exhausted"},
    ],
)
def test_resumed_stream_equals_uninterrupted_at_every_batch(folders, arguments):
    arguments = {"length": lambda row: (10 + len(row["messages"][0]["content"]) % 7, 5), **arguments}
    whole = list(islice(Mixture(parts_of(folders), **arguments), 45))
    expected = [names_of(batch) for batch in whole]
    assert {name[0] for batch in expected for name in batch} >= {0, 1}  # into the second epoch
    for used in range(0, 40, 3):
        cut = Mixture(parts_of(folders), **arguments)
        for index, batch in enumerate(islice(cut, used + 2)):  # two more are made than used, as a loader does
            if index < used:
                cut.took(batch["state"])
        resumed = Mixture(parts_of(folders), **arguments)
        resumed.load_state_dict(json.loads(json.dumps(cut.state_dict())))
        assert [names_of(batch) for batch in islice(resumed, 5)] == expected[used : used + 5]


def test_seeking_reads_no_row_that_was_passed_over(folders, monkeypatch):
    mixture = Mixture(parts_of(folders), batch_size=4)
    for batch in islice(mixture, 9):
        mixture.took(batch["state"])
    read = []
    monkeypatch.setattr(
        Part, "read", lambda self, *where, read_row=Part.read: read.append(where) or read_row(self, *where)
    )
    resumed = Mixture(parts_of(folders), batch_size=4)
    resumed.load_state_dict(mixture.state_dict())
    assert len(next(iter(resumed))["rows"]) == len(read) == 4


@pytest.mark.parametrize("used", [3, 4, 9])
def test_resuming_with_dataloader_workers(folders, used):
    def loader(mixture):
        return DataLoader(
            mixture, batch_size=None, num_workers=2, collate_fn=dict, multiprocessing_context="forkserver"
        )

    expected = [names_of(batch) for batch in islice(loader(Mixture(parts_of(folders), batch_size=3)), used + 4)]
    cut = Mixture(parts_of(folders), batch_size=3)
    for batch in islice(loader(cut), used):
        cut.took(batch["state"])
    resumed = Mixture(parts_of(folders), batch_size=3)
    resumed.load_state_dict(cut.state_dict())
    assert [names_of(batch) for batch in islice(loader(resumed), 4)] == expected[used:]
    with pytest.raises(ValueError, match="2 dataloader workers"):
        next(iter(resumed))
    with pytest.raises(ValueError, match="left by 1 processes.*by 2"):
        Mixture(parts_of(folders), processes=2).load_state_dict(cut.state_dict())


@pytest.mark.parametrize("pack", [None, 3])
def test_batches_stay_within_the_token_budget(folders, tiny_model, pack):
    model, processor = tiny_model
    collator = PerceptionCollator(processor, model.config, pack=pack)
    for row in drawn_rows(1):
        encoded = collator._process(row)["input_ids"]
        length, prefix = collator.length(row)
        assert length == len(encoded) and encoded[prefix - 1] == collator.image_token_id
        assert collator.image_token_id not in encoded[prefix:]
    longest = max(collator.length(row)[0] for row in drawn_rows(1))
    budget = 4 * longest
    mixture = Mixture(parts_of(folders), token_budget=budget, length=collator.length, pack=pack, window=30)
    sizes = []
    for batch in islice(mixture, 12):
        collated = MixtureCollator(collator)(batch)
        assert collated["input_ids"].numel() <= budget and "stream_state" in collated
        sizes.append(collated["input_ids"].shape)
        if pack:
            assert max(len(item) for item in batch["rows"]) > 1
    assert len({shape[1] for shape in sizes}) > 1  # like lengths were put together
    if pack is None:
        small = Mixture(parts_of(folders), token_budget=longest - 1, length=collator.length)
        with pytest.raises(ValueError, match=f"{longest} tokens, the budget is"):
            list(islice(small, 30))
        with pytest.raises(ValueError, match="needs a function"):
            Mixture(parts_of(folders), token_budget=longest)


def test_collator_takes_the_epoch_of_a_row(tiny_model):
    _, processor = tiny_model
    collator, row = PerceptionCollator(processor), drawn_rows(1)[0]
    noise = [collator([row | {"epoch": epoch}])["boxes_noise"] for epoch in (0, 1)]
    assert torch.equal(noise[0], collator([row])["boxes_noise"]) and not torch.equal(*noise)


def test_scenes_are_drawn_on_the_fly(tmp_path):
    (part,) = load_parts(
        {"mixture": [{"source": "scenes", "per_epoch": 7, "questions": 3, "size": 64}], "leave_out": []}, tmp_path
    )
    mixture = Mixture([part], batch_size=2, pack=3)
    batches = [batch["rows"] for batch in islice(mixture, 4)]
    items = [item for batch in batches for item in batch]
    assert [len(item) for item in items[:3]] == [3, 3, 1]
    assert items[0][0]["image"].size == (64, 64)
    pictures = [item[0]["image_id"] for item in items]
    assert len(set(pictures)) == len(pictures)  # the second epoch draws others
    with pytest.raises(ValueError, match="scenes in a mixture"):
        load_parts({"mixture": [{"source": "scenes", "limit": 7}], "leave_out": []}, tmp_path)
    with pytest.raises(ValueError, match="at least 9"):
        DrawnPart("scenes", per_epoch=3, questions=9)


# ---- with real fragments ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(data_dir, tmp_path_factory):
    """Parts of a recipe over real fragments, every task among them, and the folder they are cached in."""
    root = tmp_path_factory.mktemp("real")
    (root / "reasonseg/train").mkdir(parents=True)
    for file in (data_dir / "reasonseg/train").glob("*.json"):  # its photos are not at hand: a stand-in of their size
        (root / "reasonseg/train" / file.name).write_bytes(file.read_bytes())
        points = [point for shape in json.loads(file.read_bytes())["shapes"] for point in shape["points"]]
        size = [int(max(point[axis] for point in points)) + 2 for axis in (0, 1)]
        Image.new("RGB", size, "grey").save(root / "reasonseg/train" / f"{file.stem}.jpg")
    photos, coco = data_dir / "coco128/train2017", data_dir / "tiny_coco"
    vqa = [str(data_dir / f"vqav2/in_stock_{name}.json") for name in ("questions", "annotations")]
    panoptic = data_dir / "coco_val2017_subset"
    flickr = data_dir / "flickr30k_entities"
    refs = str(data_dir / "refcoco_mini/refs_joined.json")
    mixture = [
        {"source": "coco", "root": str(coco), "limit": 10, "tasks": ["refer", "detect", "no_target", "box_to_mask"]},
        {"source": "coco_captions", "root": str(coco), "limit": 10, "per_epoch": 20, "weight": 0.5},
        {"source": "coco_panoptic", "root": str(panoptic), "split": "val", "limit": 4},
        {
            "source": "refer",
            "root": str(Path(refs).parent),
            "annotations": [refs],
            "images": str(photos),
            "split": "val",
        },
        {"source": "vqav2", "root": str(data_dir / "vqav2"), "annotations": vqa, "images": str(photos)},
        {"source": "flickr30k_entities", "root": str(flickr), "images": str(flickr / "flickr30k-images")}
        | {"split": "val", "on_error": "skip"},
        {"source": "reasonseg", "root": str(root / "reasonseg")},
        {"source": "scenes", "per_epoch": 40, "weight": 2, "size": 64},
    ]
    return root, mixture, refs


def test_pictures_of_refcoco_evaluation_are_left_out_and_counted(real, data_dir, capsys):
    root, mixture, refs = real
    settings = {**mixtures.MIXTURE_DEFAULTS, "mixture": [mixture[4]], "leave_out": refs}
    (whole,) = load_parts({**settings, "leave_out": []}, root / "cache")
    ids = Counter(whole.read(*where)["image_id"] for where in zip(*whole.epoch(0, 0, False), strict=True))
    expected = sum(count for image_id, count in ids.items() if image_id in ("154", "309"))
    assert expected > 0
    (part,) = load_parts(settings, root / "cache")
    assert (part.left_out_rows, len(part)) == (expected, len(whole) - expected) and part.left_out_images in (1, 2)
    assert not {"154", "309"} & {part.read(*where)["image_id"] for where in zip(*part.epoch(0, 0, False), strict=True)}
    mixtures.print_parts([part])
    assert f"{expected}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has no rows to train on; 4 were left out"):
        load_parts({**settings, "mixture": [mixture[3]]}, root / "cache")
    left_out = mixtures._LeftOut({"154"}, None)
    assert left_out("coco", "154") and not left_out("flickr30k_entities", "154")
    with pytest.raises(ValueError, match="image_data"):
        left_out("visual_genome", "1")


def test_visual_genome_pictures_are_left_out_by_coco_numbers(tmp_path):
    records = [{"image_id": 1, "coco_id": 154}, {"image_id": 2, "coco_id": None}, {"image_id": 154, "coco_id": 7}]
    (tmp_path / "image_data.json").write_text(json.dumps(records))
    left_out = mixtures._LeftOut({"154"}, tmp_path / "image_data.json")
    assert [left_out("visual_genome", image_id) for image_id in ("1", "2", "154")] == [True, False, False]


def recipe_of(folder: str, real, **data) -> dict:
    root, mixture, _ = real
    return training.complete_recipe(
        {
            "model": {"checkpoint": folder},
            "adapter": {"mode": "full"},
            "data": {"train": {"mixture": mixture, "cache": str(root / "cache"), **data}},
            "training": {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4}
            | {"gradient_accumulation_steps": 2, "max_steps": 6, "save_steps": 2, "logging_steps": 1},
        }
    )


def run(recipe: dict, output: Path, resume: bool = False, stop_at: int | None = None) -> tuple[dict, dict]:
    """Rows of each step and the final weights."""
    seen = {}

    class Killed(RuntimeError):
        pass

    class Kept(training.PerceptionTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if self.state.global_step == stop_at:
                raise Killed
            seen.setdefault(self.state.global_step, []).append(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PerceptionTrainer", Kept)
        try:
            trainer = training.train(recipe, output, resume)
        except Killed:
            return seen, {}
    return seen, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.slow
def test_training_on_a_mixture_with_all_tasks_and_resuming_it(tiny_model_dir, real, tmp_path, capsys):
    recipe = recipe_of(tiny_model_dir, real, token_budget=1600, window=64)
    parts = load_parts(recipe["data"]["train"], real[0] / "cache")
    tasks, sources = Counter(), set()
    for part in parts:
        for where in zip(*part.epoch(0, 0, False), strict=True):
            row = part.read(*where)
            tasks[row["task"]] += 1
            sources.add(row["source"])
    assert set(tasks) == set(mixtures_tasks()) and len(sources) >= 5
    whole, weights = run(recipe, tmp_path / "whole")
    assert sorted(whole) == list(range(6))
    assert "left out" in capsys.readouterr().out
    first, _ = run(recipe, tmp_path / "cut", stop_at=5)
    second, resumed = run(recipe, tmp_path / "cut", resume=True)
    assert sorted(second) == [4, 5]
    assert {**first, **second} == whole
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def mixtures_tasks():
    from perceptiongpt.data.schema import TASKS

    return TASKS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.max_steps=0"}, "without end: set training.max_steps"),
        ({"data.train.widow=3"}, "data.train.window"),
        ({"data.train.mixture=[{source: cocoo}]"}, "'cocoo' is none of coco"),
        ({"data.train.mixture=[{source: coco, wieght: 2}]"}, "data.train.weight"),
    ],
)
def test_wrong_recipes(tmp_path, changes, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {checkpoint: x}\ndata: {train: {mixture: [{source: coco, root: x}]}}\ntraining: {max_steps: 3}"
    )
    with pytest.raises(ValueError, match=message):
        training.read_recipe(path, list(changes))


def test_shipped_recipe():
    path = Path(training.__file__).parent / "recipes/mixture_example.yaml"
    recipe = training.read_recipe(path, ["model.checkpoint=x"])
    assert len(recipe["data"]["train"]["mixture"]) >= 5


# ---- other trainers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_losses", [False, True])
def test_collator_in_the_sft_trainer_of_trl(tiny_model, tmp_path, all_losses):
    """As it is, it trains on the text alone: it has a loss of its own. With the model's, on the signals too."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from perceptiongpt.data.schema import row_features

    model, processor = tiny_model
    features = row_features()
    rows = drawn_rows(1)
    dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in features}, features=features)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class WithAllLosses(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    trainer = (WithAllLosses if all_losses else trl.SFTTrainer)(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            report_to="none",
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            disable_tqdm=True,
        ),
        data_collator=PerceptionCollator(processor),
        train_dataset=dataset,
        processing_class=processor,
    )
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert "language_model" in moved
    assert {"box_decoder", "mask_decoder"} <= moved if all_losses else not {"box_decoder", "mask_decoder"} & moved
