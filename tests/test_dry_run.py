"""train.py --dry_run: memory of a step against a measured one, models without weights, the paper's recipes."""

import json
import pickle
import re
import shutil
import zipfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import profile
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, SamConfig, SamModel

from backbones import TINY_SIGNALS, save_tiny_llava, tiny_tokenizer
from drawn_rows import drawn_coco_folder
from perceptiongpt import train as training
from perceptiongpt.data.label_masks import label_masks
from perceptiongpt.data.prepare import prepare
from perceptiongpt.training import memory
from perceptiongpt.training.adapters import add_adapter, load_model, parameter_table
from perceptiongpt.training.dry_run import build_on_meta, dry_run, read_config
from perceptiongpt.training.recipe import complete_recipe
from rows import GRID_TOKENS, IMAGE, MASK_SIZE, VIS, tiny_config


WORDS = 200
RECIPES = Path(training.__file__).parent / "recipes"
LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def recipe_of(model: dict, mode: str = "lora", **sections) -> dict:
    return complete_recipe(
        {
            "model": model,
            "adapter": {"mode": mode, "rank": 4},
            "data": {"train": {"annotations": "a", "images": "b"}},
            **sections,
        }
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def training_batch(rows: int) -> dict:
    """Rows with an image, words and two `<vis>`, the first of which has a mask in some; one is shorter by a token."""
    ids = torch.tensor([[1, *[IMAGE] * GRID_TOKENS, *[5] * WORDS, VIS, 6, 7, VIS, 2]] * rows)
    labels = ids.clone()
    labels[:, : GRID_TOKENS + WORDS + 1] = -100
    attention = torch.ones_like(ids)
    attention[0, -1] = 0
    known = torch.ones(rows, 2, dtype=torch.bool)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": attention,
        "pixel_values": torch.randn(rows, 3, 32, 32),
        "boxes": torch.rand(rows, 2, 2, 2).sort(dim=2).values.flatten(2),
        "masks": torch.ones(rows, 2, MASK_SIZE, MASK_SIZE, dtype=torch.uint8),
        **dict.fromkeys(("boxes_valid", "boxes_read"), known),
        "masks_valid": torch.tensor([[True, False]] * 2 + [[False, False]] * (rows - 2)),
        "masks_read": torch.tensor([[True, False]] + [[False, False]] * (rows - 1)),
    }


def peak_of(run) -> int:
    """Bytes that torch had allocated at most while `run` ran, beyond what there was before."""
    with profile(profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("mode", "dtype", "more"),
    [
        ("lora", torch.float32, {}),
        ("lora", torch.bfloat16, {}),
        ("heads", torch.bfloat16, {}),
        ("full", torch.float32, {"train_vision_tower": True}),
    ],
)
def test_memory_of_a_step_against_a_measured_one(mode, dtype, more):
    """What the forward keeps within 2 %, the peak of forward and backward within 15 %, also with checkpointing."""
    text = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    config, batch = tiny_config(text=text), training_batch(6)
    recipe = recipe_of({"checkpoint": "x"}, mode)
    recipe["adapter"] |= more
    shape = memory.BatchShape.of(batch, config)
    assert shape == memory.BatchShape(6, GRID_TOKENS + WORDS + 6, 5, 6, 0, 2, 2, 1)
    step = memory.step_bytes(partial(build_on_meta, config, recipe, dtype), shape, dtype)

    from perceptiongpt import PerceptionGPTForConditionalGeneration

    real = PerceptionGPTForConditionalGeneration(config).to(dtype)
    for module in real.model.signal_modules().values():
        module.float()
    real = add_adapter(real, **recipe["adapter"]).train()
    parameters = list(real.parameters())
    assert step.weights == sum(p.nbytes for p in parameters)
    assert step.trained == sum(p.nbytes for p in parameters if p.requires_grad)
    learned = (batch["labels"][:, 1:] != -100).any(0).nonzero()[:, 0]

    def forward():
        with torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else nullcontext():
            return real(**batch, logits_to_keep=learned).loss

    own, kept = {memory.id_of(tensor) for tensor in (*parameters, *real.buffers())}, {}
    with saved_tensors_hooks(
        lambda tensor: kept.update({memory.id_of(tensor): tensor}) or tensor, lambda tensor: tensor
    ):
        loss = forward()
    measured = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    assert step.activations + step.logits == pytest.approx(measured, rel=0.02)
    loss.backward()  # the gradients are there now, as in a second micro-batch
    del loss
    kept.clear()
    expected = step.activations + step.logits + step.backward
    assert peak_of(lambda: forward().backward()) == pytest.approx(expected, rel=0.15)
    memory.plain(real).activation_checkpointing_enable()
    if not more:  # a tower that trains would be checkpointed, too
        expected = step.checkpointed + step.logits + step.backward
        assert peak_of(lambda: forward().backward()) == pytest.approx(expected, rel=0.15)


def test_what_is_shared_out_among_gpus():
    step = memory.StepBytes(
        weights=8000,
        trained=400,
        piece=100,
        root=50,
        root_trained=8,
        activations=6,
        checkpointed=4,
        logits=3,
        backward=1,
    )

    def of(strategy, gpus):
        found = memory.memory_per_gpu(step, strategy, gpus)
        assert [found[name] for name in ("activations", "checkpointed", "logits")] == [7, 5, 3]
        return found["weights"], found["training"]

    assert of(None, 1) == (8000, 1200)
    assert of("DDP", 8) == of("DDP", 2) == (8000, 1600)
    assert of("FSDP2", 8) == (1000 + 50 + 200, 150 + 8)
    assert of("ZeRO-2", 4) == (8000, 400)
    assert of("ZeRO-3", 4) == (2000 + 8000, 400)


# ---- models without weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["checkpoint", "backbones", "vlm", "fresh text", "pyramid"])
def test_models_on_meta_have_the_parameters_of_real_ones(tiny_backbones, tiny_model_dir, tmp_path, origin):
    vision, text = tiny_backbones(vision="resnet" if origin == "pyramid" else "clip")
    fresh = {"vocab_size": 800, "hidden_size": 48, "num_layers": 2, "num_heads": 2}
    model = {
        "checkpoint": lambda: {"checkpoint": tiny_model_dir},
        "backbones": lambda: {"vision": vision, "text": text, "config": TINY_SIGNALS, "signals": ["box", "mask"]},
        "vlm": lambda: {"vlm": save_tiny_llava(tmp_path, AutoTokenizer.from_pretrained(text).chat_template)},
        "fresh text": lambda: {"vision": vision, "text": fresh, "config": TINY_SIGNALS},
        "pyramid": lambda: {"vision": vision, "text": text, "config": TINY_SIGNALS, "attn_implementation": "eager"},
    }[origin]()
    recipe = recipe_of(model)
    config, processor = read_config(recipe)
    real, real_processor = load_model(recipe)
    expected = {name: p.shape for name, p in add_adapter(real, **recipe["adapter"]).named_parameters()}
    on_meta = build_on_meta(config, recipe, torch.float32)
    assert {name: p.shape for name, p in on_meta.named_parameters()} == expected
    assert parameter_table(on_meta)[-1][1] > 0 and {p.device.type for p in on_meta.parameters()} == {"meta"}
    assert len(processor.tokenizer) == len(real_processor.tokenizer)
    assert (config.vis_token_id, config.signals) == (real.config.vis_token_id, real.config.signals)


# ---- the paper's recipes ---------------------------------------------------------------------------------------------


def test_a_model_that_looks_again_is_refused(tiny_model_dir):
    with pytest.raises(ValueError, match="does not count what looks cost"):
        read_config(recipe_of({"checkpoint": tiny_model_dir, "looks": {"look_max": 1}}))


def save_backbones(root: Path, text: dict) -> tuple[str, str]:
    """Folders with the configs, and no weights, of CLIP ViT-L/14 at 336 pixels and of a Llama; and a tokenizer."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    CLIPVisionConfig(**vision, patch_size=14, image_size=336).save_pretrained(root / "vision")
    LlamaConfig(**text, num_key_value_heads=text["num_attention_heads"], vocab_size=32000).save_pretrained(
        root / "text"
    )
    tiny_tokenizer().save_pretrained(root / "text")
    return str(root / "vision"), str(root / "text")


def save_sam(folder: Path) -> str:
    """A small random SAM."""
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
    vision |= {"output_channels": 32, "window_size": 2, "global_attn_indexes": [0], "mlp_dim": 32, "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    SamModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def fragments(data_dir, tmp_path_factory) -> Path:
    """A folder with fragments of the paper's data sets under the names that its recipes give them."""
    root = tmp_path_factory.mktemp("paper")
    coco, flickr = data_dir / "tiny_coco", data_dir / "flickr30k_entities"
    (root / "coco/annotations").mkdir(parents=True)
    for year in ("train2014", "train2017"):
        (root / "coco" / year).symlink_to(coco / "train2017")
    shutil.copy(coco / "annotations/captions_train2017.json", root / "coco/annotations")
    instances = (coco / "annotations/instances_train2017.json").read_bytes()
    for name, split_by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")):
        refs = [
            {
                "ref_id": number,
                "split": "train",
                "sentences": [{"sent_id": number, "raw": "The thing", "sent": "thing"}],
            }
            | {key: one[of] for key, of in (("ann_id", "id"), ("image_id", "image_id"), ("category_id", "category_id"))}
            for number, one in enumerate(json.loads(instances)["annotations"][:6])
        ]
        (root / "refer" / name).mkdir(parents=True)
        (root / "refer" / name / "instances.json").write_bytes(instances)
        (root / "refer" / name / f"refs({split_by}).p").write_bytes(pickle.dumps(refs))
    (root / "llava_cc3m").mkdir()
    (root / "llava_cc3m/images").symlink_to(coco / "train2017")
    turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "a photo of it"}]
    chats = [{"id": name, "image": name, "conversations": turns} for name in ("000000005802.jpg", "000000012448.jpg")]
    (root / "llava_cc3m/chat.json").write_text(json.dumps(chats))

    # Visual Genome: the images of the fragment are not at hand, so drawn ones of their size.
    (root / "vg/VG_100K").mkdir(parents=True)
    (packed,) = (data_dir / "visual_genome").glob("region_descriptions*.zip")
    with zipfile.ZipFile(packed) as archive:
        for name in ("image_data", "region_descriptions"):
            content = json.loads(archive.read(f"dummy_data/{name}.json.zip/{name}.json"))
            (root / "vg" / f"{name}.json").write_text(json.dumps(content))
            for entry in content if name == "image_data" else ():
                size = (entry["width"], entry["height"])
                Image.new("RGB", size, "grey").save(root / f"vg/VG_100K/{entry['image_id']}.jpg")
    (root / "flickr30k").mkdir()
    photos = sorted(path.stem for path in (flickr / "flickr30k-images").glob("*.jpg"))
    found = [name for name in photos if (flickr / f"Annotations/{name}.xml").is_file()][:2]
    (root / "flickr30k/train.txt").write_text("\n".join(found))
    for name in ("Annotations", "Sentences", "flickr30k-images"):
        (root / "flickr30k" / name).symlink_to(flickr / name)
    sam = save_sam(root / "sam")
    for source, name, limit in (("visual_genome", "vg", 1), ("flickr30k_entities", "flickr30k", 2)):
        labelled = "visual_genome" if name == "vg" else name
        prepare(source, root / "prepared" / labelled, root=str(root / name), limit=limit)
        label_masks(root / "prepared" / labelled, root / "labelled" / labelled, sam, min_iou=-10)
    return root


@pytest.mark.slow
def test_the_papers_recipe(fragments, tmp_path, monkeypatch, capsys):
    """A model of the paper's size from configs alone, and one batch of each of its data sets."""
    monkeypatch.chdir(fragments)
    vision, language = save_backbones(tmp_path, LLAMA_7B)
    arguments = [
        "--config",
        str(RECIPES / "paper_7b.yaml"),
        "--dry_run",
        f"model.vision={vision}",
        f"model.text={language}",
    ]
    with pytest.raises(SystemExit) as stopped:
        training.main(arguments)
    assert stopped.value.code is None, stopped.value
    printed = capsys.readouterr().out
    print(printed)
    recipe = yaml.safe_load((RECIPES / "paper_7b.yaml").read_text())
    lines = printed.splitlines()
    sources = [source["source"] for source in recipe["data"]["train"]["mixture"]]
    batches = lines[[line.startswith("source ") for line in lines].index(True) + 1 :][: len(sources)]
    for source, line in zip(sources, batches, strict=True):
        assert line.startswith(source) and " 32 x " in line, line
    learns_masks = [source for source, line in zip(sources, batches, strict=True) if int(line.split()[-2]) > 0]
    assert learns_masks == ["refer", "refer", "refer", "parquet", "parquet"]
    assert "20,000 steps of 32 rows x 1 micro-batches" in printed
    (ddp,) = (line.split() for line in lines if line.startswith("DDP") and line.split()[1] == "8")
    assert ddp[2] == "256"
    weights, _, _, _, checkpointed, _, kept = map(float, ddp[3:])
    billions = 6.7
    assert 2 * billions / 1.074 < weights < 2 * billions / 1.074 + 2.5  # bfloat16, in GiB, and what trains in float32
    assert weights < checkpointed < 80 < kept
    assert {path.name for path in tmp_path.iterdir()} == {"vision", "text"}  # nothing was written


def test_what_a_dry_run_finds(tiny_model_dir, tmp_path, capsys):
    """Sources that are not there are all told at once; epochs, packing and token budgets; refusals."""
    (tmp_path / "coco").mkdir()
    coco = drawn_coco_folder(tmp_path / "coco")
    source = {"annotations": str(coco / "instances.json"), "images": str(coco)}
    recipe = recipe_of({"checkpoint": tiny_model_dir}, "heads", training={"per_device_train_batch_size": 3})
    recipe["data"]["train"] = [source, {"source": "lvis", "root": str(tmp_path / "none")}]
    (missing,) = dry_run(recipe)
    assert missing.startswith("lvis") and str(tmp_path / "none") in missing
    printed = capsys.readouterr().out
    assert "3 epochs of 3 rows" in printed and "ZeRO-3" in printed
    recipe["collator"]["pack"] = None
    assert dry_run(recipe) and " 3 x " in capsys.readouterr().out
    recipe["data"]["train"] = {"mixture": [{**source, "weight": 2}, {"source": "scenes"}], "token_budget": 600}
    recipe["training"]["max_steps"] = 7
    assert dry_run(recipe) == []
    printed = capsys.readouterr().out
    rows, length = map(int, re.search(r"\ncoco +3 +(\d+) x (\d+) ", printed).groups())
    assert 300 < rows * length <= 600 and "\n7 steps of " in printed
    recipe["data"]["train"]["token_budget"] = 100
    assert ["token_budget is 100" in failed for failed in dry_run(recipe)] == [True]
    recipe["data"]["train"] = [{"source": "lvis", "root": str(tmp_path / "none")}]
    with pytest.raises(ValueError, match="no source of data.train gives a batch: lvis"):
        dry_run(recipe)
    with pytest.raises(ValueError, match="without stages"):
        dry_run({"stages": []})
    with pytest.raises(ValueError, match="config or tokenizer cannot be read"):
        dry_run(recipe_of({"checkpoint": str(tmp_path / "nowhere")}))
    with pytest.raises(SystemExit, match="no batch from"):
        path = tmp_path / "recipe.yaml"
        recipe["data"]["train"] = [source, {"source": "lvis", "root": str(tmp_path / "none")}]
        path.write_text(yaml.safe_dump(recipe))
        training.main(["--config", str(path), "--dry_run"])
