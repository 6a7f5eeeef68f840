"""data/label_masks.py with small random models saved to disk: agreement with the library, resuming, thresholds."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from transformers import SamConfig, SamModel

from drawn_rows import drawn_rows
from perceptiongpt.data import label_masks as labelling
from perceptiongpt.data import prepare as preparing
from perceptiongpt.data.label_masks import MaskLabeller, answer_slots_of, label_masks
from perceptiongpt.data.schema import decode_rle, validate_row
from perceptiongpt.data.sources import load_source


SIDE = 64
DECODER = {"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32}


@pytest.fixture(scope="module")
def sam(tmp_path_factory) -> str:
    """Folder of a small random SAM with its processor."""
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 16}
    vision |= {"output_channels": 32, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 32, "num_pos_feats": 16}
    prompt = {"hidden_size": 32, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=DECODER)
    SamModel(config).save_pretrained(folder)
    SamImageProcessorPil(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder of 15 drawn rows in two shards; five of their answers' boxes lack a mask."""
    root = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "raw_rows", lambda *args, **kwargs: iter(drawn_rows(3)))
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


def test_later_models_stretch_the_picture():
    """Their interface: a list of feature levels, a square without padding."""

    class Levels(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def get_image_embeddings(self, pixels):
            assert pixels.shape == (1, 3, 32, 32)
            return [pixels.new_zeros(1, 2, 4, 4), pixels.new_zeros(1, 2, 2, 2)]

        def forward(self, image_embeddings, input_boxes, multimask_output):
            assert [level.shape[0] for level in image_embeddings] == [1, 1]
            torch.testing.assert_close(input_boxes, torch.tensor([[[0.0, 16.0, 16.0, 32.0]]]))
            logits = torch.full((1, 1, 1, 8, 8), -1.0)
            logits[..., 4:, :4] = 1.0
            return type("Output", (), {"pred_masks": logits, "iou_scores": torch.tensor([[[0.9]]])})

    labeller = MaskLabeller.__new__(MaskLabeller)
    labeller.model, labeller.side, labeller.keeps_ratio, labeller.boxes_per_pass = Levels(), 32, False, 4
    labeller.mean, labeller.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    (((mask, iou),),) = labeller([Image.new("RGB", (80, 40))], [[[0.0, 20.0, 40.0, 40.0]]])
    assert iou == pytest.approx(0.9)
    expected = np.zeros((40, 80), dtype=bool)
    expected[20:, :40] = True
    assert (decode_rle(mask).astype(bool) != expected).mean() < 0.01  # the corner is rounded
