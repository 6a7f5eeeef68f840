"""Ask a checkpoint about pictures; write its answers, and the pictures with boxes, masks, phrases and scores.

    python predict.py --model . --image photo.jpg holiday/ --text "Find every dog." --output outputs/dogs
    python predict.py --model . --image photo.jpg --text "What is in <region>?" --box 40,30,200,180 --output outputs/box

`OUTPUT/predictions.json` is a list with one entry per picture, in order: `image`, `prompt`, `text` (the answer),
`width`, `height`, `objects` (as `post_process_generation` gives them, masks as COCO RLE), `drawing` (the PNG beside it)
and `error`: None, or why there is no answer; the other pictures are answered all the same, and the exit status is 1.
The file is complete after every picture. `--text` goes to the model as it is written; the region of `--box` and
`--mask` takes the place of `<region>` in it, or its end. Boxes are absolute pixels of the picture.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import perceptiongpt
from perceptiongpt.drawing import draw_objects


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
REGION_PLACEHOLDER = "<region>"
LIST_END = b"\n]\n"
# What Pillow raises for files that are no pictures, cut short, damaged, or too large to be meant.
BROKEN_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class InputError(ValueError):
    """Something that whoever typed the command can mend."""


def box_argument(text: str) -> list[float]:
    try:
        box = [float(number) for number in text.split(",")]
    except ValueError:
        box = []
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
        raise argparse.ArgumentTypeError(f"{text!r} is not x0,y0,x1,y1 in pixels with x0 < x1 and y0 < y1")
    return box


def find_images(paths: list[str]) -> list[Path]:
    """Files as they stand, folders as their pictures in order of name (hidden files and sub-folders left out).

    Raises:
        InputError: a path does not exist, or a folder holds no pictures.
    """
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"--image {path}: there is no such file or folder")
        if path.is_dir():
            inside = [
                file
                for file in sorted(path.iterdir())
                if file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
            ]
            if not inside:
                raise InputError(f"--image {path}: no pictures in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})")
            found += inside
        else:
            found.append(path)
    return found


def drawing_paths(images: list[Path], output: Path) -> list[Path]:
    """`output/<name>.png` for each picture, numbered where two have one name; never one of the pictures themselves."""
    taken = {str(image.resolve()).lower() for image in images}
    paths = []
    for image in images:
        path, number = output / f"{image.stem}.png", 1
        while str(path.resolve()).lower() in taken:
            number += 1
            path = output / f"{image.stem}_{number}.png"
        taken.add(str(path.resolve()).lower())
        paths.append(path)
    return paths


def question_content(text: str, box: list[float] | None, mask: np.ndarray | None) -> list[dict]:
    """The content items of the prompt behind its picture: text, the region where `<region>` stands or at the end."""
    if box is None and mask is None:
        if REGION_PLACEHOLDER in text:
            raise InputError(f"--text names {REGION_PLACEHOLDER}, which needs --box or --mask")
        return [{"type": "text", "text": text}]
    region = {"type": "region" if box and mask is not None else "box" if box else "mask", "box": box, "mask": mask}
    region = {key: value for key, value in region.items() if value is not None}
    if REGION_PLACEHOLDER not in text:
        text = f"{text.rstrip()} {REGION_PLACEHOLDER}"
    content = []
    for index, part in enumerate(text.split(REGION_PLACEHOLDER)):
        if index:
            content.append(region)
        if part:
            content.append({"type": "text", "text": part})
    return content


def read_image(path: Path) -> Image.Image:
    """The picture in RGB, turned as its EXIF data says."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def answer(model, processor, images: list[Image.Image], content: list[dict], max_new_tokens: int) -> list[dict]:
    """One dict of `post_process_generation` per picture, or `{"error": ...}` where the processor refuses it."""
    messages = [[{"role": "user", "content": [{"type": "image", "image": image}, *content]}] for image in images]
    try:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except ValueError as error:
        if len(images) == 1:
            return [{"error": str(error)}]
        return [answer(model, processor, [image], content, max_new_tokens)[0] for image in images]
    output = model.generate(
        **inputs.to(model.device, model.dtype),
        return_dict_in_generate=True,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    sizes = [(image.height, image.width) for image in images]
    return processor.post_process_generation(output, target_sizes=sizes, mask_format="rle")


def append_entry(file: BinaryIO, entry: dict) -> None:
    """Add to a JSON list in a file that starts as `[\\n]\\n`: the file is a complete list before and after."""
    separator = b",\n" if file.seek(-len(LIST_END), os.SEEK_END) > 1 else b"\n"
    file.write(separator + json.dumps(entry, allow_nan=False).encode() + LIST_END)
    file.flush()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, epilog = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="predict.py", description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or a repository id on the Hub")
    parser.add_argument(
        "--image", required=True, nargs="+", action="extend", metavar="PATH", help="pictures, or folders of pictures"
    )
    parser.add_argument("--text", required=True, help="the prompt; <region> in it stands for --box or --mask")
    parser.add_argument("--box", type=box_argument, metavar="x0,y0,x1,y1", help="a region, in pixels of each picture")
    parser.add_argument("--mask", metavar="FILE.png", help="a region: whatever is not black, of each picture's size")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parsed = parser.parse_args(arguments)
    for name in ("batch_size", "max_new_tokens"):
        if getattr(parsed, name) < 1:
            parser.error(f"argument --{name}: {getattr(parsed, name)} is not a positive number")
    return parsed


def check_name(name: str) -> None:
    """`InputError` unless this is a folder or could be a repository id."""
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise InputError(f"--model {name}: there is no such folder")


def load(name: str, device: str | None, dtype: str):
    """(model in eval mode, processor) of a folder or a repository id.

    Raises:
        InputError: there is no such checkpoint, or it is not one of this kind.
    """
    check_name(name)
    perceptiongpt.register()
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=True, dtype=dtype)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: not a checkpoint that can be loaded: {error}") from error
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.eval().to(device), processor


def predict(arguments: argparse.Namespace) -> int:
    """Answer for every picture; returns how many were broken.

    Raises:
        InputError: an argument that cannot be worked with, found before the model is loaded where possible.
    """
    images = find_images(arguments.image)
    mask = None
    if arguments.mask:
        try:
            with Image.open(arguments.mask) as file:
                mask = np.asarray(file.convert("L")) > 0
        except BROKEN_IMAGE_ERRORS as error:
            raise InputError(f"--mask {arguments.mask}: {error}") from error
        if not mask.any():
            raise InputError(f"--mask {arguments.mask}: every pixel is black")
    content = question_content(arguments.text, arguments.box, mask)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {arguments.output}: cannot be made: {error}") from error
    if not os.access(arguments.output, os.W_OK):
        raise InputError(f"--output {arguments.output}: no permission to write there")
    model, processor = load(arguments.model, arguments.device, arguments.dtype)

    broken = 0
    todo = list(zip(images, drawing_paths(images, arguments.output)))
    with (arguments.output / "predictions.json").open("wb") as file, tqdm(total=len(todo), unit="picture") as progress:
        file.write(b"[" + LIST_END)
        file.flush()
        for start in range(0, len(todo), arguments.batch_size):
            batch = todo[start : start + arguments.batch_size]
            pictures, results = {}, {}
            for path, _ in batch:
                try:
                    pictures[path] = read_image(path)
                except BROKEN_IMAGE_ERRORS as error:
                    results[path] = {"error": f"not a picture that can be read: {error}"}
            if pictures:
                answers = answer(model, processor, list(pictures.values()), content, arguments.max_new_tokens)
                results |= dict(zip(pictures, answers))
            for path, drawing in batch:
                result, entry = results[path], {"image": str(path), "prompt": arguments.text}
                if error := result.get("error"):
                    broken += 1
                    progress.write(f"{path}: {error}", file=sys.stderr)
                    entry |= {"text": None, "objects": [], "drawing": None, "error": error}
                else:
                    picture = pictures[path]
                    draw_objects(picture, result, caption=result["text"]).save(drawing)
                    entry |= {"text": result["text"], "width": picture.width, "height": picture.height}
                    entry |= {"objects": result["objects"], "drawing": drawing.name, "error": None}
                append_entry(file, entry)
                progress.update()
    return broken


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    try:
        broken = predict(parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(parsed.output / "predictions.json")
    if broken:
        print(f"{broken} of the pictures could not be answered: see `error` in predictions.json", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
