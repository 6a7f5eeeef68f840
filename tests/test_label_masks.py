"""data/label_masks.py with small random models saved to disk: agreement with the library, resuming, thresholds."""

import hashlib
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from transformers import (
    Sam2Config,
    Sam2Model,
    Sam3TrackerConfig,
    Sam3TrackerModel,
    SamConfig,
    SamHQConfig,
    SamHQModel,
    SamModel,
)

from drawn_rows import drawn_rows
from perceptiongpt.data import label_masks as labelling
from perceptiongpt.data import prepare as preparing
from perceptiongpt.data.label_masks import MaskLabeller, answer_slots_of, label_masks
from perceptiongpt.data.schema import decode_rle, validate_row
from perceptiongpt.data.sources import load_source


SIDE = 64
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 16}
VISION |= {"output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32, "num_pos_feats": 16}
PROMPT = {"hidden_size": 32, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}
DECODER = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> str:
    """Folder of a small random SAM with its processor."""
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    config = SamConfig(vision_config=VISION, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER)
    SamModel(config).save_pretrained(folder)
    SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder of 15 drawn rows in two shards; five of their answers' boxes lack a mask."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "raw_rows", lambda *args, **kwargs: iter(drawn_rows(3)))
        patch.setattr(preparing, "default_split", lambda name: "train")
        preparing.prepare("drawn", root, pictures="embed", rows_per_shard=10)
    return root


def test_masks_equal_those_of_the_librarys_own_processor(sam):
    from transformers import SamProcessor
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (50, 90, 3), dtype=np.uint8)), Image.new("RGB", (40, 77), "red")]
    boxes = [[[3.0, 4.0, 60.0, 40.0], [10.5, 2.0, 30.0, 49.0], [0.0, 0.0, 90.0, 50.0]], [[1.0, 2.0, 30.0, 70.0]]]
    labeller = MaskLabeller(sam, boxes_per_pass=2)
    found = labeller(pictures, boxes)
    processor = SamProcessor(SamImageProcessorPil.from_pretrained(sam))
    for picture, own, masks in zip(pictures, boxes, found, strict=True):
        inputs = processor(picture, input_boxes=[own], return_tensors="pt")
        torch.testing.assert_close(labeller.prepare(picture), inputs["pixel_values"][0].float(), atol=0.02, rtol=0)
        with torch.no_grad():
            output = labeller.model(
                pixel_values=labeller.prepare(picture)[None], input_boxes=inputs["input_boxes"], multimask_output=False
            )
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        expected = processor.image_processor.post_process_masks(output.pred_masks, *sizes)[0][:, 0]
        assert expected.shape[0] == len(masks)
        for (mask, iou), one, score in zip(masks, expected, output.iou_scores[0, :, 0], strict=True):
            assert (decode_rle(mask).astype(bool) != one.numpy()).mean() < 0.01
            assert iou == pytest.approx(float(score), abs=1e-4)


def test_what_is_labelled_and_what_is_dropped(sam, folder, tmp_path):
    before = load_source("parquet", root=folder)
    done = label_masks(folder, tmp_path / "all", sam, min_iou=-100.0, batch_size=2)["labelled"]
    assert done["kept"] + done.get("empty", 0) == 3 and "below min_iou" not in done
    rows = parquet.read_table(sorted((tmp_path / "all").glob("*.parquet"))).to_pylist()
    assert len(rows) == len(before)
    for row, old in zip(rows, before, strict=True):
        assert (row["messages"], row["boxes"]) == (old["messages"], old["boxes"])
        validate_row(row)
        slots = zip(old["boxes"], old["masks"], row["masks"], row["mask_iou"], answer_slots_of(old), strict=True)
        for _, had, mask, iou, in_answer in slots:
            assert (iou is not None) == (in_answer and had is None)
            assert mask == had or (had is None and iou is not None)
    none = label_masks(folder, tmp_path / "none", sam, min_iou=100.0)["labelled"]
    assert "kept" not in none and none["below min_iou"] + none.get("empty", 0) == 3
    assert load_source("parquet", root=tmp_path / "none")["masks"] == before["masks"]
    with pytest.raises(ValueError, match="min_iou"):
        label_masks(folder, tmp_path / "none", sam, min_iou=0.5)


def test_the_bar_counts_rows_batch_by_batch(sam, folder, tmp_path, monkeypatch):
    seen = []

    class Bar(labelling.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append((self.n, self.total))

    monkeypatch.setattr(labelling, "tqdm", Bar)
    label_masks(folder, tmp_path / "out", sam, batch_size=1, progress=True)
    rows = len(load_source("parquet", root=folder))
    shards = len(list(folder.glob("*.parquet")))
    assert seen[-1] == (rows, rows) and len(seen) > shards and seen == sorted(seen)


def test_resuming_gives_the_same_bytes(sam, folder, tmp_path, monkeypatch):
    def contents(path):
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}

    label_masks(folder, tmp_path / "whole", sam)
    real, calls = labelling.label_rows, []

    def stops(rows, *arguments):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(rows, *arguments)

    monkeypatch.setattr(labelling, "label_rows", stops)
    with pytest.raises(KeyboardInterrupt):
        label_masks(folder, tmp_path / "cut", sam)
    label_masks(folder, tmp_path / "cut", sam)
    assert calls == [10, 5, 5]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_from_the_command_line(sam, folder, tmp_path, capsys):
    arguments = ["--input", str(folder), "--model", sam, "--min_iou", "-100", "--device", "cpu"]
    labelling.main([*arguments, "--output", str(tmp_path / "one")])
    labelling.main([*arguments, "--output", str(tmp_path / "two"), "--num_proc", "2"])
    assert "masks: " in capsys.readouterr().out
    for file in (tmp_path / "one").glob("*.parquet"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


LEVELS = {"fpn_hidden_size": 32, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}


def small_sam_hq():
    decoder = {**DECODER, "vit_dim": 32}
    return SamHQModel(SamHQConfig(vision_config=VISION, prompt_encoder_config=PROMPT, mask_decoder_config=decoder))


def small_sam2():
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [SIDE, SIDE]}
    backbone |= {"blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64]}
    backbone |= {"num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 2, 2, 2]}
    backbone |= {"global_attention_blocks": [3], "window_positional_embedding_background_size": [2, 2]}
    vision = {"backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], **LEVELS}
    return Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=PROMPT, mask_decoder_config=DECODER))


def small_sam3():
    backbone = {"model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    backbone |= {"num_attention_heads": 2, "image_size": 56, "patch_size": 14, "window_size": 2}
    backbone |= {"global_attn_indexes": [1], "pretrain_image_size": 28}
    vision, prompt = {"backbone_config": backbone, **LEVELS}, {**PROMPT, "image_size": 56, "patch_size": 14}
    return Sam3TrackerModel(
        Sam3TrackerConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER)
    )


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
LATER = {  # model, side of its square, mean and standard deviation where the folder does not say
    "sam_hq": (small_sam_hq, 64, *IMAGENET),
    "sam2": (small_sam2, 64, *IMAGENET),
    "sam3": (small_sam3, 56, [0.5] * 3, [0.5] * 3),
}


@pytest.fixture(scope="module", params=LATER)
def later(request, tmp_path_factory) -> tuple[str, str]:
    """(name, folder) of a small random model of another family, saved without an image processor."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    LATER[request.param][0]().save_pretrained(folder)
    return request.param, str(folder)


def test_later_models_equal_their_own_forward(later):
    name, folder = later
    _, side, mean, std = LATER[name]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    boxes = [[3.0, 4.0, 60.0, 40.0], [10.5, 2.0, 30.0, 49.0], [0.0, 0.0, 90.0, 50.0]]
    labeller = MaskLabeller(folder, boxes_per_pass=2)
    found = labeller([Image.new("RGB", (40, 77), "red"), picture], [[[1.0, 2.0, 30.0, 70.0]], boxes])[1]

    width, height = (side, round(50 * side / 90)) if name == "sam_hq" else (side, side)  # SAM 2 and 3 stretch
    pixels = np.zeros((3, side, side), dtype=np.float32)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)) / 255
    pixels[:, :height, :width] = ((resized - mean) / std).transpose(2, 0, 1)
    scaled = torch.tensor(boxes) * torch.tensor([width / 90, height / 50] * 2)
    with torch.no_grad():
        output = labeller.model(
            pixel_values=torch.from_numpy(pixels)[None], input_boxes=scaled[None], multimask_output=False
        )
    for (mask, iou), logits, score in zip(found, output.pred_masks[0], output.iou_scores[0, :, 0], strict=True):
        if name == "sam_hq":
            square = torch.nn.functional.interpolate(logits[None], (side, side), mode="bilinear")
            logits = square[0, :, :height, :width]
        expected = torch.nn.functional.interpolate(logits[None], (50, 90), mode="bilinear")[0, 0] > 0
        assert mask["size"] == [50, 90] and iou == pytest.approx(float(score), abs=1e-5)
        assert (coco_mask.decode(mask).astype(bool) != expected.numpy()).mean() < 0.001


def test_later_models_label_a_folder(later, folder, tmp_path):
    done = label_masks(folder, tmp_path, later[1], min_iou=-100.0)["labelled"]
    assert done["kept"] + done.get("empty", 0) == 3
    for row in load_source("parquet", root=tmp_path):
        validate_row(row)


def test_boxes_reach_a_bfloat16_model_exactly(sam):
    labeller, seen = MaskLabeller(sam, dtype="bfloat16"), []
    labeller.model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_boxes"]), with_kwargs=True)
    labeller([Image.new("RGB", (SIDE, SIDE))], [[[1.1, 2.3, 60.7, 61.9]]])
    torch.testing.assert_close(seen[0], torch.tensor([[[1.1, 2.3, 60.7, 61.9]]]))


def test_models_that_would_label_at_random_are_refused(sam, tmp_path):
    shutil.copytree(sam, tmp_path / "cut")
    weights = load_file(tmp_path / "cut/model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, tmp_path / "cut/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a SamModel: \['mask_decoder.iou_token.weight'\]"):
        MaskLabeller(str(tmp_path / "cut"))
    with pytest.raises(ValueError, match="cannot be loaded"):
        MaskLabeller(str(tmp_path / "gone"))
