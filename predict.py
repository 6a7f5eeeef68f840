"""Ask a checkpoint about images; write its answers, and the images with boxes, masks, phrases and scores drawn on them.

    python predict.py --model . --image photo.jpg holiday/ --text "Find every dog." --output outputs/dogs
    python predict.py --model . --image photo.jpg --text "What is in <region>?" --box 40,30,200,180 --output outputs/box
    python predict.py --model . --image photo.jpg --text "Segment <region>." --point 120,90 --output outputs/point
    python predict.py --model . --image holiday/ --text "Find the red cup." --ground --output outputs/cup
    python predict.py --model . --image holiday/ --text "Find every dog." --format yolo --output outputs/dogs

`OUTPUT/predictions.json` is a list with one entry per image, in order: `image`, `prompt`, `text` (the answer),
`width`, `height`, `objects` (as `post_process_generation` gives them, masks as COCO RLE), `looks` (of a checkpoint that
looks again: where it looked, drawn as thin frames), `drawing` (the PNG beside it) and `error`: None, or why there is no
answer; then the exit status is 1, and the other images are answered all the same. The file is complete after every
batch. `--text` goes to the model as it is written; what `--box`, `--mask` and `--point` describe takes the place of
`<region>` in it, or stands at its end. Coordinates are pixels of the image.

At its end a run can write the answers in one more format, beside that file: `--format coco` writes `annotations.json`,
a COCO data set; `--format supervision` `detections.json`, a list of what `supervision.Detections.from_inference` reads;
`--format yolo` a YOLO data set of `data.yaml`, `images/` and `labels/`. Classes are the phrases of the answers, or
`--label`.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from perceptiongpt import exports
from perceptiongpt.drawing import draw_objects
from perceptiongpt.images_perceptiongpt import read_image
from perceptiongpt.inference import InputError, answer_each, hide_progress_bars_in_logs, load
from perceptiongpt.pipeline_perceptiongpt import question_content


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
LIST_END = b"\n]\n"


def numbers_argument(text: str, form: str) -> list[float]:
    """The numbers of an argument written like `form`, e.g. `x,y`."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != form.count(",") + 1 or not all(map(math.isfinite, numbers)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form} in pixels")
    return numbers


def box_argument(text: str) -> list[float]:
    """`--box` as a list of four floats."""
    box = numbers_argument(text, "x0,y0,x1,y1")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise argparse.ArgumentTypeError(f"{text!r} is not x0,y0,x1,y1 in pixels with x0 < x1 and y0 < y1")
    return box


def point_argument(text: str) -> list[float]:
    """`--point` as a list of two floats."""
    return numbers_argument(text, "x,y")


def find_images(paths: list[str]) -> list[Path]:
    """The files as given, and for a folder its images in order of name (without hidden files and sub-folders).

    Raises:
        InputError: a path does not exist, or a folder holds no images.
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
                raise InputError(f"--image {path}: no images in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})")
            found += inside
        else:
            found.append(path)
    return found


def drawing_paths(images: list[Path], output: Path) -> list[Path]:
    """`output/<name>.png` for each image, numbered where two have one name; never one of the images themselves."""
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


def read_mask(path: str) -> np.ndarray:
    """The mask in an image file: True where a pixel is not black.

    Raises:
        InputError: the file cannot be read, or every pixel is black.
    """
    try:
        mask = np.asarray(read_image(path).convert("L")) > 0
    except ValueError as error:
        raise InputError(f"--mask {path}: {error}") from error
    if not mask.any():
        raise InputError(f"--mask {path}: every pixel is black")
    return mask


def check_yolo_output(output: Path, images: list[Path]) -> None:
    """`InputError` if a YOLO data set cannot be written to a folder: old labels in it would have other classes."""
    copies = (output / "images").resolve()
    if any(copies in image.resolve().parents for image in images):
        raise InputError(f"--format yolo writes copies of the images to {copies}, which holds some of them already")
    if any((output / "labels").glob("*.txt")):
        raise InputError(f"--format yolo: {output / 'labels'} holds labels already; give another --output")


def append_entry(file: BinaryIO, entry: dict) -> None:
    """Add to a JSON list in a file that starts as `[\\n]\\n`: the file is a complete list before and after."""
    separator = b",\n" if file.seek(-len(LIST_END), os.SEEK_END) > 1 else b"\n"
    file.write(separator + json.dumps(entry, allow_nan=False).encode() + LIST_END)
    file.flush()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    summary, _, epilog = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="predict.py", description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or a repository id on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of a repository on the Hub")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the checkpoint"
    )
    parser.add_argument(
        "--image", required=True, nargs="+", action="extend", metavar="PATH", help="images, or folders of images"
    )
    parser.add_argument("--text", required=True, help="the prompt; <region> in it stands for --box, --mask or --point")
    parser.add_argument("--box", type=box_argument, metavar="x0,y0,x1,y1", help="a region, in pixels of each image")
    parser.add_argument(
        "--mask", metavar="FILE.png", help="a region: the pixels that are not black; of each image's size"
    )
    parser.add_argument(
        "--point", type=point_argument, metavar="x,y", help="a region: a click, in pixels of each image"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument(
        "--format",
        default="json",
        choices=["json", *exports.WRITERS],
        help="also write the answers in this format (default: json, predictions.json alone)",
    )
    parser.add_argument(
        "--label", metavar="NAME",
        help="class of objects without a phrase, for --format; default: what the prompt asks for ('dog' of 'Find every "
        "dog.'), or the whole prompt",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument(
        "--ground", action="store_true",
        help="the prompt asks for one object: read it from the prompt, without writing an answer token by token",
    )  # fmt: skip
    parser.add_argument(
        "--max_looks", type=int, metavar="N",
        help="how often the model may look again in an answer; default: as often as the checkpoint does",
    )  # fmt: skip
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parsed = parser.parse_args(arguments)
    for name in ("batch_size", "max_new_tokens"):
        if getattr(parsed, name) < 1:
            parser.error(f"argument --{name}: {getattr(parsed, name)} is not a positive number")
    return parsed


def answer_batch(model, processor, paths: list[Path], content: list[dict], **options) -> list[tuple]:
    """(image, result) of each path; (None, `{"error": why}`) for an image that cannot be read or used.

    Args:
        options: of `inference.answer`.
    """
    images, results = {}, {}
    for path in paths:
        try:
            images[path] = read_image(path)
        except ValueError as error:
            results[path] = {"error": str(error)}
    if images:
        messages = [
            [{"role": "user", "content": [{"type": "image", "image": image}, *content]}] for image in images.values()
        ]
        sizes = [(image.height, image.width) for image in images.values()]
        answers = answer_each(model, processor, messages, sizes, **options)
        results |= dict(zip(images, answers, strict=True))
    return [(images.get(path), results[path]) for path in paths]


def predict(arguments: argparse.Namespace) -> int:
    """Answer for every image; returns how many have an error.

    Raises:
        InputError: an argument that cannot be used, found before the model is loaded where possible.
    """
    images = find_images(arguments.image)
    mask = read_mask(arguments.mask) if arguments.mask else None
    given = {"box": arguments.box, "mask": mask, "point": arguments.point}
    try:
        content = question_content(arguments.text, {name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise InputError(f"--text: {error}") from error
    if arguments.format == "yolo":
        check_yolo_output(arguments.output, images)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {arguments.output}: cannot be made: {error}") from error
    if not os.access(arguments.output, os.W_OK):
        raise InputError(f"--output {arguments.output}: no permission to write there")
    model, processor = load(
        arguments.model,
        arguments.device,
        arguments.dtype,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )

    options = {"max_new_tokens": arguments.max_new_tokens, "ground": arguments.ground}
    if arguments.max_looks is not None:
        most = model.config.look_max
        if arguments.ground or not 0 <= arguments.max_looks <= most:
            reason = "--ground never looks again" if arguments.ground else f"this checkpoint looks 0 to {most} times"
            raise InputError(f"--max_looks {arguments.max_looks}: {reason}")
        options["max_looks"] = arguments.max_looks
    errors, drawings = 0, iter(drawing_paths(images, arguments.output))
    with (
        (arguments.output / "predictions.json").open("wb") as file,
        tqdm(total=len(images), unit="image", disable=None) as progress,
    ):
        file.write(b"[" + LIST_END)
        file.flush()
        for start in range(0, len(images), arguments.batch_size):
            paths = images[start : start + arguments.batch_size]
            answered = answer_batch(model, processor, paths, content, **options)
            for path, (image, result) in zip(paths, answered, strict=True):
                drawing, entry = next(drawings), {"image": str(path), "prompt": arguments.text}
                if error := result.get("error"):
                    errors += 1
                    progress.write(f"{path}: {error}", file=sys.stderr)
                    entry |= {"text": None, "objects": [], "drawing": None, "error": error}
                else:
                    draw_objects(image, result, caption=result["text"]).save(drawing)
                    entry |= {"text": result["text"], "width": image.width, "height": image.height}
                    looks = {"looks": result["looks"]} if "looks" in result else {}
                    entry |= {"objects": result["objects"], **looks, "drawing": drawing.name, "error": None}
                append_entry(file, entry)
                progress.update()
    return errors


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parsed = parse_arguments(arguments)
    hide_progress_bars_in_logs()
    try:
        errors = predict(parsed)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    predictions = parsed.output / "predictions.json"
    print(predictions)
    if parsed.format in exports.WRITERS:
        entries = [entry for entry in json.loads(predictions.read_bytes()) if entry["error"] is None]
        label = parsed.label or exports.label_of(parsed.text)
        for found in (found for entry in entries for found in entry["objects"]):
            found["phrase"] = found["phrase"] or label
        print(exports.WRITERS[parsed.format](entries, parsed.output))
    if errors:
        print(f"{errors} of the images could not be answered: see `error` in predictions.json", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
