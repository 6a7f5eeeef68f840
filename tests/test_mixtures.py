"""data/mixtures.py: what an epoch holds, its shares, exact resuming, token budgets, what is left out, training.

`python tests/test_mixtures.py FOLDER STEP` is one process of the two-process test.
"""

import json
import multiprocessing
import os
import re
import sys
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Trainer

from drawn_rows import drawn_rows
from perceptiongpt import train as training
from perceptiongpt.data import mixtures
from perceptiongpt.data import prepare as preparing
from perceptiongpt.data.collator import PerceptionCollator
from perceptiongpt.data.leakage import LeftOutImages
from perceptiongpt.data.mixtures import DrawnPart, Mixture, MixtureCollator, Part, load_parts
from perceptiongpt.data.prepare import prepare
from perceptiongpt.data.schema import POINT_TASKS, TASKS
from perceptiongpt.data.sources import prepared_files
from perceptiongpt.training.datasets import load_mixture, stream_file
from perceptiongpt.training.recipe import complete_recipe
from perceptiongpt.training.trainer import training_arguments
from processes import run_two_processes


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
            patch.setattr(preparing, "default_split", lambda name: "train")
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
def test_resumed_stream_equals_uninterrupted_at_every_batch(folders, arguments, monkeypatch):
    rows = {}  # each is decoded once: this is about their order
    read = Part.read

    def read_once(part, *where):
        key = (part.name, *where)
        if key not in rows:
            rows[key] = read(part, *where)
        return dict(rows[key])

    monkeypatch.setattr(Part, "read", read_once)
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


@pytest.mark.parametrize("used", [4, *(pytest.param(used, marks=pytest.mark.slow) for used in (3, 9))])
def test_resuming_with_dataloader_workers(folders, used):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["perceptiongpt.data.mixtures"])

    def loader(mixture):
        return DataLoader(mixture, batch_size=None, num_workers=2, collate_fn=dict, multiprocessing_context=context)

    expected = [names_of(batch) for batch in islice(loader(Mixture(parts_of(folders), batch_size=3)), used + 4)]
    cut = Mixture(parts_of(folders), batch_size=3)
    for batch in islice(loader(cut), used):
        cut.took(batch["state"])
    resumed = Mixture(parts_of(folders), batch_size=3)
    resumed.load_state_dict(cut.state_dict())
    assert [names_of(batch) for batch in islice(loader(resumed), 4)] == expected[used:]
    with pytest.raises(ValueError, match="2 dataloader workers"):
        next(iter(resumed))
    with pytest.raises(ValueError, match="saved by 1 processes.*by 2"):
        Mixture(parts_of(folders), processes=2).load_state_dict(cut.state_dict())


@pytest.mark.parametrize(("left_with", "given", "goes_on_with"), [(3, None, 3), (1, None, 0), (3, 2, 2)])
def test_a_stream_goes_on_with_as_many_workers(tmp_path, tiny_model, left_with, given, goes_on_with):
    """Whatever the default is by then; a number in the recipe is refused later if it is another."""
    model, processor = tiny_model
    recipe = {
        "model": {"checkpoint": "x"},
        "data": {"train": {"mixture": [{"source": "scenes"}]}},
        "training": {"max_steps": 1, "use_cpu": True, **({} if given is None else {"dataloader_num_workers": given})},
    }
    recipe = complete_recipe(recipe)
    state = {"processes": 1, "workers": left_with, "next_worker": 0, "states": {}}
    stream_file(tmp_path, 0).write_text(json.dumps(state))
    args = training_arguments(recipe, tmp_path)
    load_mixture(recipe, PerceptionCollator(processor, model.config), args, str(tmp_path))
    assert args.dataloader_num_workers == goes_on_with


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
    # With one phrasing and one task there are fewer questions than objects.
    few = DrawnPart(
        "scenes", per_epoch=80, questions=40, size=64, tasks=["refer"], kinds=["attribute"], evaluation=True
    )
    prompts = [few.read(1, row)["messages"][0]["content"] for row in range(40)]
    assert 1 < len(set(prompts)) < 40
    with pytest.raises(ValueError, match="scenes in a mixture"):
        load_parts({"mixture": [{"source": "scenes", "limit": 7}], "leave_out": []}, tmp_path)
    with pytest.raises(ValueError, match="at least 9"):
        DrawnPart("scenes", per_epoch=3, questions=9)


# ---- with real fragments ---------------------------------------------------------------------------------------------


def conversation_about(name: str) -> dict:
    said = ["<image>\nWhat is shown?", "A scene outdoors.", "Is it day?", "Yes."]
    turns = [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(said)]
    return {"id": Path(name).stem, "image": name, "conversations": turns}


def viscot_record(path: Path, box: list[int]) -> dict:
    with Image.open(path) as image:
        width, height = image.size
    record = {"question": "What is seen here?", "answer": "A person.", "image": path.name, "bboxs": [box]}
    return record | {"width": width, "height": height, "dataset": "flickr30k", "split": "train"}


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
    # Of these two only questions without answers are at hand: records of their forms about photos that are.
    (root / "llava.json").write_text(json.dumps([conversation_about(f"{number:012d}.jpg") for number in (25, 71, 154)]))
    (root / "viscot/metadata").mkdir(parents=True)
    records = []
    for photo in sorted((data_dir / "flickr30k_entities/flickr30k-images").glob("*.jpg"))[:4]:
        marks = (data_dir / f"flickr30k_entities/Annotations/{photo.stem}.xml").read_text()
        box = [int(re.search(rf"<{side}>(\d+)<", marks)[1]) for side in ("xmin", "ymin", "xmax", "ymax")]
        records.append(viscot_record(photo, box))
    (root / "viscot/metadata/flickr30k_cot_train.jsonl").write_text("\n".join(map(json.dumps, records)))
    photos, coco = data_dir / "coco128/train2017", data_dir / "tiny_coco"
    vqa = [str(data_dir / f"vqav2/in_stock_{name}.json") for name in ("questions", "annotations")]
    panoptic = data_dir / "coco_val2017_subset"
    flickr = data_dir / "flickr30k_entities"
    refs = str(data_dir / "refcoco_mini/refs_joined.json")
    mixture = [
        {"source": "coco", "root": str(coco), "limit": 10, "tasks": ["refer", "detect", "no_target", "box_to_mask"]}
        | {"per_epoch": 60},
        {"source": "coco_captions", "root": str(coco), "limit": 10, "per_epoch": 20, "weight": 0.5},
        {"source": "coco_panoptic", "root": str(panoptic), "split": "val", "limit": 4, "per_epoch": 40},
        {
            "source": "refer",
            "root": str(Path(refs).parent),
            "annotations": [refs],
            "images": str(photos),
            "split": "val",
        },
        {"source": "vqav2", "root": str(data_dir / "vqav2"), "annotations": vqa, "images": str(photos)},
        {"source": "flickr30k_entities", "root": str(flickr), "images": str(flickr / "flickr30k-images")}
        | {"split": "val", "on_error": "skip", "per_epoch": 60},
        {"source": "reasonseg", "root": str(root / "reasonseg")},
        {"source": "llava", "root": str(root), "annotations": [str(root / "llava.json")], "images": str(photos)},
        {"source": "viscot", "root": str(root / "viscot"), "images": str(flickr / "flickr30k-images")},
        {"source": "scenes", "per_epoch": 20, "size": 64},
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
    with pytest.raises(ValueError, match="has no rows to train on; 4 were left out, 0 have no answer"):
        load_parts({**settings, "mixture": [mixture[3]]}, root / "cache")


def test_questions_without_an_answer_are_left_out_and_counted(tmp_path, monkeypatch, capsys):
    found = drawn_rows(2)
    cut = [{**row, "messages": row["messages"][:1], "boxes": [], "masks": []} | {"task": "vqa"} for row in found[:3]]
    for row in cut:
        row["messages"][0]["content"] = "<image>What is it?"
    monkeypatch.setattr(preparing, "raw_rows", lambda *args, **kwargs: iter([*found, *cut]))
    monkeypatch.setattr(preparing, "default_split", lambda name: "train")
    prepare("some", tmp_path, pictures="embed")
    part = Part("some", prepared_files(tmp_path))
    assert len(part) == len(found) and part.unanswered_rows == 3
    rows = [part.read(*where) for where in zip(*part.epoch(0, 0, False), strict=True)]
    assert {row["messages"][-1]["role"] for row in rows} == {"assistant"}
    mixtures.print_parts([part])
    assert "some: 3 rows without an answer are left out" in capsys.readouterr().out


def test_rows_without_pictures_are_refused_before_training(data_dir, tmp_path):
    for images, pictures in ((data_dir / "coco128/train2017", "path"), (None, "none")):
        arguments = {"root": str(data_dir / "refcoco_mini"), "split": "val", "images": images and str(images)}
        prepare("refer", tmp_path / pictures, pictures=pictures, **arguments)
    assert len(Part("with", prepared_files(tmp_path / "path", "val"))) == 4
    with pytest.raises(ValueError, match="without: .*val-00000-of-00001.parquet was prepared without its images"):
        Part("without", prepared_files(tmp_path / "none", "val"))


@pytest.mark.parametrize("pictures", ["path", "embed"])
def test_only_pictures_of_coco_are_left_out_by_their_number(tmp_path, pictures):
    """Visual Genome, Flickr30k and others number theirs alike; LLaVA and Visual-CoT hold pictures of all of them."""
    coco = "000000000154.jpg"
    names = [f"coco/train2017/{coco}", "gqa/images/154.jpg", "vg/VG_100K_2/9.jpg", "ocr_vqa/images/154.jpg", "154.jpg"]
    names += ["flickr30k/154.jpg", "v7w/v7w_9.jpg", f"vsr/{coco}"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "llava.json").write_text(json.dumps([conversation_about(name) for name in names[:5]]))
    records = [
        viscot_record(tmp_path / name, [1, 2, 20, 20]) | {"dataset": name.split("/")[0]}
        for name in (*names[5:], "gqa/images/154.jpg")
    ]
    (tmp_path / "viscot.jsonl").write_text("\n".join(map(json.dumps, records)))
    numbers = {"images": [{"id": 154, "file_name": "mine.jpg", "width": 40, "height": 30}], "annotations": []}
    numbers |= {"categories": [{"id": 1, "name": "cup"}]}
    box = {"id": 1, "image_id": 154, "category_id": 1, "iscrowd": 0, "bbox": [1, 2, 9, 9]}
    numbers["annotations"] = [box | {"segmentation": [[1, 2, 10, 2, 10, 11, 1, 11]], "area": 81}]
    Image.new("RGB", (40, 30)).save(tmp_path / "mine.jpg")
    (tmp_path / "own.json").write_text(json.dumps(numbers))
    genome = [{"image_id": 9, "coco_id": 154}, {"image_id": 154, "coco_id": None}]
    (tmp_path / "image_data.json").write_text(json.dumps(genome))
    left_out = LeftOutImages({"154"}, tmp_path / "image_data.json")

    kept = {}
    for source, file in (("llava", "llava.json"), ("viscot", "viscot.jsonl"), ("coco", "own.json")):
        output = tmp_path / f"{source}-out"
        prepare(source, output, root=str(tmp_path), annotations=[tmp_path / file], images=tmp_path, pictures=pictures)
        part = Part(source, prepared_files(output), is_left_out=left_out)
        kept[source] = {part.read(*where)["image_id"] for where in zip(*part.epoch(0, 0, False), strict=True)}
        assert part.left_out_images == (0 if source == "coco" else 2)
        if source != "coco":
            with pytest.raises(ValueError, match="name that file as image_data"):
                Part(source, prepared_files(output), is_left_out=LeftOutImages({"154"}, None))
    assert kept["llava"] == {"gqa/images/154", "ocr_vqa/images/154", "154"}
    assert kept["viscot"] == {"flickr30k/154", "gqa/154"} and kept["coco"] == {"154"}
    # Rows without a stored name (made elsewhere, or with --no_images) go by what their source numbers.
    assert left_out("coco", "154") and left_out("vqav2", "154") and left_out("hub", "154", ("picture-0.png",))
    assert left_out("mine", "7", (f"photos/COCO_train2014_{coco}",)) and not left_out("mine", "154", ("154.jpg",))
    assert not left_out("flickr30k_entities", "154")
    assert [left_out("visual_genome", number) for number in ("9", "8", "154")] == [True, False, False]


def recipe_of(folder: str, real, **data) -> dict:
    root, mixture, _ = real
    return complete_recipe(
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
    sources = defaultdict(set)
    for part in parts:
        for where in zip(*part.epoch(0, 0, False), strict=True):
            row = part.read(*where)
            sources[row["source"]].add(row["task"])
    assert len(sources.keys() - {"scenes"}) >= 5
    usual = set(TASKS) - set(POINT_TASKS)
    assert set.union(*(tasks for source, tasks in sources.items() if source != "scenes")) == usual
    trained = Counter()
    encode = PerceptionCollator._encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PerceptionCollator,
            "_encode",
            lambda self, row, *done: trained.update([row["task"]]) or encode(self, row, *done),
        )
        whole, weights = run(recipe, tmp_path / "whole")
    assert sorted(whole) == list(range(6)) and set(trained) == usual
    assert "left out" in capsys.readouterr().out
    first, _ = run(recipe, tmp_path / "cut", stop_at=5)
    second, resumed = run(recipe, tmp_path / "cut", resume=True)
    assert sorted(second) == [4, 5]
    assert {**first, **second} == whole
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


@pytest.mark.slow
def test_two_processes_draw_an_epoch_once_and_go_on_where_they_were_stopped(tiny_model_dir, real, tmp_path):
    """`train.py` itself in two processes, stopped behind a checkpoint and resumed."""
    root, mixture, _ = real
    caps = {"coco": 12, "coco_captions": 9, "vqav2": 28, "llava": 3, "viscot": 10, "scenes": 13}
    chosen = [{**part, "per_epoch": caps[part["source"]]} for part in mixture if part["source"] in caps]
    recipe = recipe_of(tiny_model_dir, (root, chosen, None))
    recipe["training"] |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 7, "save_steps": 3}
    recipe["training"]["ddp_backend"] = "gloo"
    recipe["collator"]["pack"] = None
    parts = load_parts(recipe["data"]["train"], root / "cache")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for stop_at in ("4", "none"):
        run_two_processes(__file__, str(tmp_path), stop_at, returncode=0 if stop_at == "none" else 3)
    seen = []
    for rank in range(2):
        before, after = (
            json.loads((tmp_path / f"rows_{rank}_{stop_at}.json").read_text()) for stop_at in ("4", "none")
        )
        assert len(before) == 5 and len(after) == 3
        stream = Mixture(parts, batch_size=7, process=rank, processes=2)
        expected = [[list(name) for name in names_of(batch)] for batch in islice(stream, 6)]
        assert before == expected[:5] and after == expected[3:]
        seen += [tuple(name) for batch in expected for name in batch if name[0] == 0]
    epoch = [(0, *name_of(part.read(*where))) for part in parts for where in zip(*part.epoch(0, 0, False), strict=True)]
    assert len(parts) >= 6 and Counter(seen) == Counter(epoch) and len(epoch) == sum(caps.values())


def train_in_one_process(folder: Path, stop_at: str) -> None:
    """What each of the two processes does: train, noting the rows of every batch, or end without a word at a step."""
    rows, collate = [], PerceptionCollator.__call__

    def noting(self, batch):
        rows.append(names_of({"rows": batch}))
        return collate(self, batch)

    class Stopped(training.PerceptionTrainer):
        def training_step(self, *args, **kwargs):
            if str(self.state.global_step) == stop_at:
                note()
                os._exit(3)
            return super().training_step(*args, **kwargs)

    def note() -> None:
        (folder / f"rows_{os.environ['RANK']}_{stop_at}.json").write_text(json.dumps(rows))

    PerceptionCollator.__call__, training.PerceptionTrainer = noting, Stopped
    training.train(json.loads((folder / "recipe.json").read_text()), folder / "run", resume=stop_at == "none")
    note()


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


if __name__ == "__main__":
    train_in_one_process(Path(sys.argv[1]), sys.argv[2])
    PartialState().destroy_process_group()  # or its threads may outlive the interpreter
