"""Add masks from a segment-anything model to boxes that have none: prepared folder in, prepared folder out.

    python -m perceptiongpt.data.label_masks --input prepared/vg --output labelled/vg --model facebook/sam-vit-huge \
        --num_proc 2 --device cuda:0 cuda:1

The model is any mask generation checkpoint of transformers, by id or folder (SAM, SAM-HQ, SAM 2, SAM 3's tracker). Each
box in an answer is a prompt for its mask, as in the paper for Visual Genome and Flickr30k. The column `mask_iou` holds
the IoU that the model predicts for its mask (per `<vis>`, null without a prediction). A mask below `--min_iou`, or an
empty one, is dropped, and its box stays without a mask. The same command again labels the missing shards.
"""

import argparse
import multiprocessing
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pyarrow
import torch
from datasets import Features, List, Value
from PIL import Image
from pyarrow import parquet
from pycocotools import mask as coco_mask
from tqdm import tqdm
from transformers import AutoModelForMaskGeneration, ImageProcessingMixin

from perceptiongpt.configuration_perceptiongpt import VIS_TOKEN
from perceptiongpt.data.collator import image_key
from perceptiongpt.data.prepare import (
    check_settings,
    end_with_parent,
    read_json_file,
    read_summary,
    replace_file,
    write_json,
)
from perceptiongpt.data.schema import describe_row, row_features
from perceptiongpt.data.sources import prepared_files
from perceptiongpt.geometry_perceptiongpt import encode_rle
from perceptiongpt.images_perceptiongpt import read_image


KEEPING_RATIO = ("sam", "sam_hq")  # resize the longer side and pad; the later ones stretch both
# For a folder without the settings of its image processor.
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CENTRED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # SAM 3


class MaskLabeller:
    """A segment-anything model that turns boxes into masks.

    Images are prepared here and not by the model's own processor, which for SAM 2 and 3 needs torchvision.

    Args:
        model: checkpoint id or folder.
        device, dtype: where and in what the model runs.
        boxes_per_pass: boxes of one image that are decoded at a time.

    Raises:
        ValueError: if there is no such model, it is none for mask generation, or weights of it are missing.
    """

    def __init__(self, model: str, device: str = "cpu", dtype: str = "float32", boxes_per_pass: int = 16):
        try:
            loaded, report = AutoModelForMaskGeneration.from_pretrained(
                model, dtype=getattr(torch, dtype), output_loading_info=True
            )
        except OSError as error:
            raise ValueError(f"model {model!r} cannot be loaded: {error}") from error
        if missing := sorted(report["missing_keys"]):  # they would be random, and so would the masks
            raise ValueError(
                f"model {model!r} lacks {len(missing)} weights of a {type(loaded).__name__}: {missing[:3]}"
            )
        self.model = loaded.to(device).eval()
        config = self.model.config
        self.side = config.prompt_encoder_config.image_size
        self.keeps_ratio = config.model_type in KEEPING_RATIO
        self.boxes_per_pass = boxes_per_pass
        try:
            stored = ImageProcessingMixin.get_image_processor_dict(model)[0]
        except OSError:
            stored = {}
        usual = CENTRED if config.model_type.startswith("sam3") else IMAGENET
        values = [stored.get(name, usual[name]) for name in ("image_mean", "image_std")]
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in values)

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the part of the model's square that an image covers."""
        if not self.keeps_ratio:
            return self.side, self.side
        scale = self.side / max(width, height)
        return int(width * scale + 0.5), int(height * scale + 0.5)

    def prepare(self, image: Image.Image) -> torch.Tensor:
        """An image as the model's input, float32 (3, side, side)."""
        width, height = self.resized_size(*image.size)
        resized = read_image(image).resize((width, height), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
        padding = (0, self.side - width, 0, self.side - height)
        return torch.nn.functional.pad((pixels - self.mean) / self.std, padding)

    @torch.inference_mode()
    def __call__(self, images: list[Image.Image], boxes: list[list[list[float]]]) -> list[list[tuple[dict, float]]]:
        """Predict the masks of boxes.

        Args:
            images: images, encoded in one batch.
            boxes: per image its boxes, xyxy in pixels.

        Returns:
            Per image and box (compressed COCO RLE, predicted IoU).
        """
        device, dtype = self.model.device, self.model.dtype
        pixels = torch.stack([self.prepare(image) for image in images]).to(device, dtype)
        encoded = self.model.get_image_embeddings(pixels)
        results = []
        for index, (image, own) in enumerate(zip(images, boxes, strict=True)):
            features = self._features_of(encoded, index)
            width, height = self.resized_size(*image.size)
            scale = torch.tensor([width / image.width, height / image.height] * 2)
            results.append([])
            for some in _batches(own, self.boxes_per_pass):
                prompts = (torch.tensor(some) * scale)[None].to(device)  # bfloat16 has bins of 8 px at 1024
                output = self.model(**features, input_boxes=prompts, multimask_output=False)
                masks = self._to_image(output.pred_masks[0, :, :1].float(), width, height, image.size)
                for mask, iou in zip(masks, output.iou_scores[0, :, 0].float().tolist(), strict=True):
                    results[-1].append((encode_rle(mask.cpu().numpy()), iou))
        return results

    def _features_of(self, encoded, index: int) -> dict:
        """What `get_image_embeddings` gives for one image of a batch, as arguments of the model."""
        if self.model.config.model_type == "sam_hq":
            last, earlier = encoded
            return {
                "image_embeddings": last[index, None],
                "intermediate_embeddings": [layer[index, None] for layer in earlier],
            }
        if isinstance(encoded, list):  # SAM 2 and 3: feature levels, the finest first
            return {"image_embeddings": [level[index, None] for level in encoded]}
        return {"image_embeddings": encoded[index, None]}

    def _to_image(self, logits: torch.Tensor, width: int, height: int, size: tuple[int, int]) -> torch.Tensor:
        """Low-resolution logits (N, 1, h, w) -> bool masks (N, H, W) of the image."""
        if self.keeps_ratio:
            square = (self.side, self.side)
            logits = torch.nn.functional.interpolate(logits, square, mode="bilinear", align_corners=False)
            logits = logits[..., :height, :width]
        logits = torch.nn.functional.interpolate(logits, size[::-1], mode="bilinear", align_corners=False)
        return logits[:, 0] > 0


def answer_slots_of(row: dict) -> list[bool]:
    """For each `<vis>` of a row, whether the assistant says it."""
    return [
        message["role"] == "assistant"
        for message in row["messages"]
        for _ in range(message["content"].count(VIS_TOKEN))
    ]


def label_rows(
    rows: list[dict], labeller: MaskLabeller, batch_size: int, min_iou: float, bar: tqdm | None = None
) -> tuple[list[dict], Counter]:
    """Rows with the masks that their answers lack, and how many were kept, too uncertain and empty.

    `bar` counts the rows of the images that went through the model.
    """
    images_rows = []  # (rows of one image, its boxes without a mask, each once)
    for _, group in groupby(enumerate(rows), lambda item: image_key(item[1]) or item[0]):
        own = [row for _, row in group]
        wanted = {tuple(box): None for row in own for box in _boxes_without_mask(row) if box is not None}
        images_rows.append((own, list(wanted)))
    counts = Counter()
    found = {}
    for some in _batches(((own, boxes) for own, boxes in images_rows if boxes), batch_size):
        images = [_open_image(own[0]) for own, _ in some]
        for (own, boxes), masks in zip(some, labeller(images, [boxes for _, boxes in some]), strict=True):
            found[id(own)] = dict(zip(boxes, masks, strict=True))
        if bar is not None:
            bar.update(sum(len(own) for own, _ in some))
    labelled = []
    for own, _ in images_rows:
        for row in own:
            masks, ious = list(row["masks"]), [None] * len(row["masks"])
            for slot, box in enumerate(_boxes_without_mask(row)):
                if box is not None:
                    mask, ious[slot] = found[id(own)][tuple(box)]
                    is_empty, is_sure = coco_mask.area(mask) == 0, ious[slot] >= min_iou
                    counts["empty" if is_empty else "kept" if is_sure else "below min_iou"] += 1
                    masks[slot] = mask if is_sure and not is_empty else None
            labelled.append({**row, "masks": masks, "mask_iou": ious})
    return labelled, counts


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while some := list(islice(items, size)):
        yield some


def _boxes_without_mask(row: dict) -> list:
    """Per slot its box if it is in an answer and lacks a mask, else None."""
    slots = zip(row["boxes"], row["masks"], answer_slots_of(row), strict=True)
    return [box if mask is None and in_answer else None for box, mask, in_answer in slots]


def _open_image(row: dict) -> Image.Image:
    if isinstance(row["image"], list):
        raise ValueError(f"{describe_row(row)}: has several images; it is not known which of them a box is on")
    if row["image"] is None:
        raise ValueError(f"{describe_row(row)}: was prepared without its image")
    return read_image(row["image"], describe_row(row))


def label_masks(
    input: str | Path,
    output: str | Path,
    model: str,
    *,
    split: str = "train",
    min_iou: float = 0.8,
    batch_size: int = 8,
    boxes_per_pass: int = 16,
    dtype: str = "float32",
    device: Iterable[str] = ("cpu",),
    num_proc: int = 1,
    progress: bool = False,
) -> dict:
    """Label one split of a prepared folder.

    Args:
        input, output: prepared folders; the shards keep their names.
        model, dtype, boxes_per_pass: see `MaskLabeller`.
        split: which one.
        min_iou: a mask of lower predicted IoU is dropped.
        batch_size: images that are encoded at a time.
        device: of the processes, in turn.
        num_proc: processes, each with its own copy of the model.

    Returns:
        The entry of this split in `summary.json`: the input's, with `labelled`: the counts.
    """
    files = [Path(file) for file in prepared_files(input, split)]
    settings = {"input": str(input), "model": str(model), "min_iou": min_iou, "dtype": dtype}
    output, device = Path(output), list(device)
    work = output / f".{split}"
    done = read_summary(output).get(split)
    before = done["labelled"]["settings"] if done else read_json_file(work / "settings.json")
    check_settings(output, split, settings, before)
    if done is None:
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / "settings.json", settings)
        missing = [file for file in files if not (work / f"{file.name}.json").exists()]
        work_of = [(missing[index::num_proc], device[index % len(device)]) for index in range(num_proc)]
        common = (output, work, model, dtype, boxes_per_pass, batch_size, min_iou)
        if num_proc == 1:
            _label_files(*work_of[0], *common, progress)
        else:
            spawn = multiprocessing.get_context("spawn")
            pools = [ProcessPoolExecutor(1, spawn, initializer=end_with_parent) for _ in work_of]
            try:
                jobs = [
                    pool.submit(_label_files, *own, *common, progress, line)
                    for line, (pool, own) in enumerate(zip(pools, work_of, strict=True))
                ]
                for job in jobs:
                    job.result()
            finally:
                for pool in pools:
                    pool.shutdown(cancel_futures=True)
        counts = Counter()
        for file in files:
            counts.update(read_json_file(work / f"{file.name}.json"))
        done = read_summary(input).get(split, {"shards": len(files)})
        done = {**done, "labelled": {"settings": settings, **dict(sorted(counts.items()))}}
        if (Path(input) / "README.md").exists():
            replace_file(output / "README.md", lambda new: shutil.copyfile(Path(input) / "README.md", new))
        write_json(output / "summary.json", {**read_summary(output), split: done})
    if work.exists():
        shutil.rmtree(work)
    return done


def _label_files(
    files, device, output, work, model, dtype, boxes_per_pass, batch_size, min_iou, progress=False, line=0
):
    """Label shards in one process, whose bar stands in this line of the terminal."""
    if not files:
        return
    labeller = MaskLabeller(model, device, dtype, boxes_per_pass)
    total, before = sum(parquet.read_metadata(file).num_rows for file in files), 0
    with tqdm(total=total, disable=not progress, desc=f"process {line}", unit=" rows", position=line) as bar:
        for file in files:
            table = parquet.read_table(file)
            several = pyarrow.types.is_list(table.schema.field("image").type)
            schema = Features({**row_features(several), "mask_iou": List(Value("float32"))}).arrow_schema
            rows, counts = label_rows(table.to_pylist(), labeller, batch_size, min_iou, bar)
            group_rows = parquet.ParquetFile(file).metadata.row_group(0).num_rows if len(rows) else None
            labelled = pyarrow.Table.from_pylist(rows, schema=schema)
            replace_file(output / file.name, lambda new: parquet.write_table(labelled, new, group_rows))
            write_json(work / f"{file.name}.json", dict(counts))
            before += len(rows)
            bar.update(before - bar.n)  # the rows that want no mask


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line; see the head of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m perceptiongpt.data.label_masks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input", required=True, metavar="DIR", help="a folder that data.prepare has made")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write to")
    parser.add_argument("--model", required=True, metavar="ID", help="a checkpoint id or folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--min_iou", type=float, default=0.8, help="drop masks of lower predicted IoU (default 0.8)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="images per batch")
    parser.add_argument(
        "--boxes_per_pass", type=int, default=16, metavar="N", help="boxes of an image per forward pass"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", nargs="+", default=[default_device], help="devices of the processes, in turn")
    parser.add_argument("--num_proc", type=int, default=1, metavar="N", help="number of processes")
    try:
        summary = label_masks(**vars(parser.parse_args(arguments)), progress=True)
    except ValueError as error:
        sys.exit(f"error: {error}")
    counts = {key: value for key, value in summary["labelled"].items() if key != "settings"}
    print("masks: " + (", ".join(f"{count:,} {name}" for name, count in counts.items()) or "no box lacks one"))


if __name__ == "__main__":
    main()
