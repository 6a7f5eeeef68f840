"""Chat with a checkpoint about an image, in a browser: boxes and masks go in by hand, and come out drawn.

    python app.py                                       # the checkpoint beside this file
    python app.py --model outputs/mine --port 7861
    python app.py --model user/name --revision v1

Without `--model`, the environment variable PERCEPTIONGPT_MODEL (and PERCEPTIONGPT_REVISION) names the checkpoint, then
space.json beside this file, which `publish.py --space` writes, then the folder of this file. The code that comes with
the checkpoint is run. Nothing else of this repository is needed: gradio, torch, transformers and pycocotools.
"""

import argparse
import contextlib
import html
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)


FOLDER = Path(__file__).resolve().parent
SPACE_FILE = "space.json"
EXAMPLES = (
    ("examples/shapes.jpg", "Find every square."),
    ("examples/cat.jpg", "Find the red circle."),
    ("examples/coffee.jpg", "Find the blue star."),
)

MOST_MEGAPIXELS = 40
MOST_LETTERS = 500  # of a question
MOST_NEW_TOKENS = 256
LEAST_NEW_TOKENS = 16  # with less room for an answer the conversation is over
MOST_WAITING = 32  # questions, of all users
LARGEST_FILE = "50mb"
SECONDS_KEPT = 3600  # an image and its conversation after their last use

REGION_PLACEHOLDER = "<region>"
ANSWER_TAB = "answer"
NO_PHRASE = "object"
NOTHING_SAID = "(no words and no object)"
COLORS = "#FF3B5C #1E90FF #2ECC40 #FF9F1C #B14AED #00CFCF #F5E027 #F564E3 #A0522D #7FDBB6 #3D5AFE #C0D72F".split()
GIVEN_COLOR = "#FFFFFF"  # of the user's box and mask, on a dark edge
GIVEN_EDGE = "#202020"
DARK_TEXT_ABOVE = 140  # luma of a colour, 0..255
MASK_OPACITY = 0.45
SHORTEST_LONGER_SIDE, LONGEST_LONGER_SIDE = 640, 1280  # of the image in the browser, in pixels

INTRODUCTION = f"""# PerceptionGPT
Ask about an image. What the model finds is drawn in the colour of its words. To ask about a region, click two corners
of a box, or paint a mask; `{REGION_PLACEHOLDER}` in a question stands for it, else it follows the question."""


# ---- the model -------------------------------------------------------------------------------------------------------


def find_model() -> tuple[str, str | None]:
    """The checkpoint that the surroundings name: (folder or repository id, revision)."""
    if name := os.environ.get("PERCEPTIONGPT_MODEL"):
        return name, os.environ.get("PERCEPTIONGPT_REVISION")
    if (FOLDER / SPACE_FILE).is_file():
        named = json.loads((FOLDER / SPACE_FILE).read_text(encoding="utf-8"))
        return named["model"], named["revision"]
    if (FOLDER / "config.json").is_file():
        return str(FOLDER), None
    sys.exit("error: there is no checkpoint here: give --model, or set PERCEPTIONGPT_MODEL")


class StopWhenSet(StoppingCriteria):
    """Ends a generation whose user has gone."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


class Assistant:
    """A model that answers one question after another, whoever asks: the questions of all users wait in one line.

    Args:
        model: a folder or a repository id.
        revision: branch, tag or commit of the repository.
    """

    def __init__(self, model: str, revision: str | None = None):
        hub = {"revision": revision, "trust_remote_code": True}
        self.name = model
        self.processor = AutoProcessor.from_pretrained(model, **hub)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", **hub).eval().to(device)
        self.worker = ThreadPoolExecutor(max_workers=1)

    def prepare(self, messages: list[dict]):
        """The tensors of a conversation, and how many tokens its answer may have.

        Raises:
            gr.Error: the processor does not accept it, or there is no room for an answer.
        """
        try:
            inputs = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except ValueError as error:
            raise refusal(f"The model does not take this question: {error}.") from error
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = MOST_NEW_TOKENS if longest is None else longest - inputs["input_ids"].shape[1]
        if room < LEAST_NEW_TOKENS:
            raise refusal("The conversation is too long for this model: start a new one.")
        return inputs.to(self.model.device, self.model.dtype), min(room, MOST_NEW_TOKENS)

    def answer(self, messages: list[dict], size: tuple[int, int], **generate_kwargs) -> Iterator[str | dict]:
        """Answer a conversation.

        Args:
            messages: as `apply_chat_template` takes them.
            size: (height, width) of the image.
            generate_kwargs: for `model.generate`, in place of greedy decoding.

        Yields:
            The text as far as it is written, each time that it grows; at last the dict of `post_process_generation`
            with `content`, the answer as content items of a message, and `finished`, whether the model ended it.
        """
        inputs, most_tokens = self.prepare(messages)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        gone = threading.Event()
        generation = self.worker.submit(
            torch.no_grad()(self.model.generate),
            **inputs,
            **{"do_sample": False, "max_new_tokens": most_tokens, **generate_kwargs},
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([StopWhenSet(gone)]),
            return_dict_in_generate=True,
        )
        # An error ends the stream, too; `result` raises it.
        generation.add_done_callback(lambda _: streamer.end())
        text = ""
        try:
            for piece in streamer:
                text += piece
                if piece:
                    yield text.lstrip()
        finally:
            gone.set()
        output = generation.result()
        (result,) = self.processor.post_process_generation(output, target_sizes=[size])
        ids = output.sequences[0, output.prompt_length :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        length = next((index for index, token in enumerate(ids) if token in ends), len(ids))
        content = self.answer_content(ids[:length], [found["box"] for found in result["objects"]])
        for found in result["objects"]:
            if found.get("mask") is not None:
                found["mask"] = np.asarray(found["mask"])
        yield {**result, "content": content, "finished": length < len(ids)}

    def answer_content(self, ids: list[int], boxes: list[list[float]]) -> list[dict]:
        """An answer as content items of a history: its text, and a box at each `<vis>`, as it was fed back.

        Args:
            ids: the answer's tokens, without its end.
            boxes: one per `<vis>`, xyxy in pixels of the image.
        """
        content, start = [], 0
        positions = [index for index, token in enumerate(ids) if token == self.processor.vis_token_id]
        for position, box in zip([*positions, len(ids)], [*boxes, None], strict=True):
            if text := self.processor.tokenizer.decode(ids[start:position], skip_special_tokens=False):
                content.append({"type": "text", "text": text})
            if box is not None:
                content.append({"type": "box", "box": box})
            start = position + 1
        return content


def refusal(message: str) -> gr.Error:
    """What a user did that cannot be done, to be raised: Gradio shows it, and everything stays as it was."""
    return gr.Error(html.escape(message, quote=False), print_exception=False, title="Please change this")


# ---- images, regions, questions --------------------------------------------------------------------------------------


@dataclass
class Turn:
    """A question and its answer.

    Attributes:
        question: as the user wrote it.
        region: any of the user's `box` (xyxy in pixels), `point` (xy in pixels) and `mask` (bool, of the image's size).
        prompt, answer: both as content items.
        text, objects: of `post_process_generation`.
        finished: whether the model ended the answer.
    """

    question: str
    region: dict
    prompt: list[dict]
    answer: list[dict] = field(default_factory=list)
    text: str = ""
    objects: list[dict] = field(default_factory=list)
    finished: bool = True


@dataclass
class Session:
    """What one user has in front of them: an image, the clicks on it, and the conversation about it."""

    image: Image.Image
    name: str
    clicks: list[tuple[float, float]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    folder: tempfile.TemporaryDirectory = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="answers_"))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.height, self.image.width

    @property
    def box(self) -> list[float] | None:
        """The box between two clicks, in any order."""
        if len(self.clicks) < 2:
            return None
        (x0, x1), (y0, y1) = (sorted(values) for values in zip(*self.clicks, strict=True))
        return [x0, y0, x1, y1]


def open_image(assistant: Assistant, path: str | None) -> Session:
    """A new session about an image file; its size is looked at before its pixels are decoded.

    Raises:
        gr.Error: it is no image, too large, or too thin.
    """
    if path is None:
        raise refusal("Upload an image first.")
    try:
        with Image.open(path) as opened:
            megapixels = opened.width * opened.height / 1e6
    except Image.DecompressionBombError as error:
        raise refusal(f"The image has far more than {MOST_MEGAPIXELS} megapixels: make it smaller.") from error
    except OSError as error:
        raise refusal("This file is not an image that can be read: upload a PNG, JPEG, WebP or the like.") from error
    if megapixels > MOST_MEGAPIXELS:
        raise refusal(f"The image has {megapixels:.0f} megapixels; at most {MOST_MEGAPIXELS} are allowed.")
    try:
        image = assistant.processor.load_image(path)
    except ValueError as error:
        reason = str(error).replace(str(path), Path(path).name)
        raise refusal(f"The image cannot be used: {reason}.") from error
    return Session(image, Path(path).name)


def view_scale(image: Image.Image) -> float:
    """By how much an image is enlarged for the browser."""
    longer = max(image.size)
    return min(max(longer, SHORTEST_LONGER_SIDE), LONGEST_LONGER_SIDE) / longer


def click(session: Session | None, x: float, y: float) -> None:
    """Note a click as a corner of a box; the third one begins a new box.

    Args:
        session: of the user.
        x, y: in pixels of the image as the browser shows it.

    Raises:
        gr.Error: there is no image, or the second corner makes no box.
    """
    if session is None:
        raise refusal("Upload an image first.")
    scale = view_scale(session.image)
    corner = (min(x / scale, session.image.width), min(y / scale, session.image.height))
    if len(session.clicks) == 2:
        session.clicks.clear()
    if session.clicks and min(abs(a - b) for a, b in zip(corner, session.clicks[0], strict=True)) < 1:
        raise refusal("These two corners make no box: click the opposite corner.")
    session.clicks.append(corner)


def stroke_mask(drawn: dict | None, size: tuple[int, int]) -> np.ndarray | None:
    """What was painted in an `ImageEditor`, as a bool mask of an image of `size` (height, width); None if nothing."""
    layers = [] if drawn is None else drawn["layers"]
    painted = np.zeros(size, dtype=bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        painted |= np.asarray(alpha.resize(size[::-1], Image.Resampling.BILINEAR)) > 127
    return painted if painted.any() else None


def given_region(session: Session, drawn: dict | None, signals: list[str]) -> dict:
    """Those of `box`, `point` and `mask` that a user gave; one click is a point.

    Args:
        session: of the user.
        drawn: value of the `ImageEditor`.
        signals: what the checkpoint knows.

    Raises:
        gr.Error: the checkpoint does not know what was given.
    """
    region = {"box": session.box, "mask": stroke_mask(drawn, session.size)}
    if len(session.clicks) == 1:
        if "point" not in signals:
            raise refusal("The box has one corner only: click the opposite one, or clear the region.")
        region["point"] = list(session.clicks[0])
    region = {name: value for name, value in region.items() if value is not None}
    if unknown := [name for name in region if name not in signals]:
        raise refusal(f"This model does not know a {unknown[0]}: clear the region.")
    return region


def question_content(question: str, region: dict, special: list[str]) -> list[dict]:
    """A question as content items, the region where `<region>` stands or at its end.

    Args:
        question: what the user wrote.
        region: of `given_region`.
        special: tokens that a user may not write.

    Raises:
        gr.Error: it is empty, too long, has a special token, or names a region that was not given.
    """
    question = question.strip()
    if not question:
        raise refusal("Write a question.")
    if len(question) > MOST_LETTERS:
        raise refusal(f"The question has {len(question)} letters; at most {MOST_LETTERS} are allowed.")
    if found := [token for token in special if token in question]:
        raise refusal(f"{found[0]} has a meaning of its own for the model: leave it out of the question.")
    if not region:
        if REGION_PLACEHOLDER in question:
            raise refusal(f"The question names {REGION_PLACEHOLDER}: click a box or paint a mask.")
        return [{"type": "text", "text": question}]
    if REGION_PLACEHOLDER not in question:
        question = f"{question} {REGION_PLACEHOLDER}"
    item = {"type": "region" if len(region) > 1 else next(iter(region)), **region}
    content = []
    for index, part in enumerate(question.split(REGION_PLACEHOLDER)):
        content += [item] if index else []
        content += [{"type": "text", "text": part}] if part else []
    return content


def conversation(session: Session) -> list[dict]:
    """The turns of a session as messages; the last one is without its answer while it is asked."""
    messages = []
    for index, turn in enumerate(session.turns):
        image = [] if index else [{"type": "image", "image": session.image}]
        messages.append({"role": "user", "content": [*image, *turn.prompt]})
        if turn.answer:
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def ask(
    assistant: Assistant, session: Session | None, question: str, drawn: dict | None, **generate_kwargs
) -> Iterator[str | None]:
    """Ask a question in a session, which then has the turn and its files; the clicks are used up.

    Yields:
        The answer as far as it is written; None when it is complete.

    Raises:
        gr.Error: there is no image, or the question or the region cannot be used; the session is as it was.
    """
    if session is None:
        raise refusal("Upload an image first.")
    processor = assistant.processor
    region = given_region(session, drawn, processor.signals)
    turn = Turn(
        question.strip(), region, question_content(question, region, [processor.image_token, processor.vis_token])
    )
    session.turns.append(turn)
    clicks, session.clicks = session.clicks, []
    try:
        with contextlib.closing(assistant.answer(conversation(session), session.size, **generate_kwargs)) as parts:
            for part in parts:
                if isinstance(part, str):
                    yield part
        turn.answer, turn.text, turn.objects = part["content"], part["text"], part["objects"]
        turn.finished = part["finished"]
    except BaseException:  # the user has gone, or it failed: there is no such turn
        session.turns.remove(turn)
        session.clicks = clicks
        raise
    if not turn.answer:  # a history needs something between two questions
        turn.answer = [{"type": "text", "text": ""}]
    yield None


# ---- drawing ---------------------------------------------------------------------------------------------------------


def object_colors(objects: list[dict]) -> list[str]:
    """A colour per object; those of one phrase share theirs."""
    keys = [found["span"] if found["span"] else index for index, found in enumerate(objects)]
    order = list(dict.fromkeys(keys))
    return [COLORS[order.index(key) % len(COLORS)] for key in keys]


def text_color(color: str) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = ImageColor.getrgb(color)
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > DARK_TEXT_ABOVE else "#FFFFFF"


def tint(pixels: np.ndarray, mask: np.ndarray, color: str) -> None:
    """Lay a colour over the pixels of a mask that may have another size."""
    size = pixels.shape[1::-1]
    inside = np.asarray(Image.fromarray(np.asarray(mask, dtype=bool)).resize(size, Image.Resampling.NEAREST))
    shade = np.array(ImageColor.getrgb(color)) * MASK_OPACITY
    pixels[inside] = (pixels[inside] * (1 - MASK_OPACITY) + shade).astype(np.uint8)


def draw(
    image: Image.Image, objects: list[dict], region: dict, clicks: list[tuple[float, float]], scale: float
) -> Image.Image:
    """A copy of an image with what was found and what the user gave.

    Args:
        image: the image.
        objects: of `post_process_generation`, with masks as bool arrays.
        region: of the user, in white.
        clicks: corners of a box that is being made, xy in pixels of the image.
        scale: by how much the copy is larger.
    """
    size = tuple(max(1, round(side * scale)) for side in image.size)
    pixels = np.array(image.resize(size, Image.Resampling.BICUBIC))
    colors = object_colors(objects)
    if "mask" in region:
        tint(pixels, region["mask"], GIVEN_COLOR)
    for found, color in zip(objects, colors, strict=True):
        if found.get("mask") is not None:
            tint(pixels, found["mask"], color)
    canvas = Image.fromarray(pixels)
    drawing = ImageDraw.Draw(canvas)
    line = max(2, round(max(size) / 250))
    if "box" in region:
        box = [value * scale for value in region["box"]]
        drawing.rectangle(box, outline=GIVEN_EDGE, width=line + 2)
        drawing.rectangle([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=GIVEN_COLOR, width=line)
    for found, color in zip(objects, colors, strict=True):
        drawing.rectangle([value * scale for value in found["box"]], outline=color, width=line)
        if found.get("point") is not None:
            dot(drawing, [value * scale for value in found["point"]], 2 * line, color)
    font, taken = ImageFont.load_default(max(14, round(min(size) * 0.03))), []
    for number, (found, color) in enumerate(zip(objects, colors, strict=True), 1):
        # The font that comes with PIL has Latin letters only; the number leads to the phrase in any case.
        phrase = found["phrase"] if found["phrase"] and found["phrase"].isascii() else ""
        label(drawing, f"{number} {phrase}".rstrip(), [value * scale for value in found["box"][:2]], font, color, taken)
    for corner in [region["point"], *clicks] if "point" in region else clicks:
        dot(drawing, [value * scale for value in corner], 2 * line, GIVEN_COLOR)
    return canvas


def dot(drawing: ImageDraw.ImageDraw, center: list[float], radius: float, color: str) -> None:
    x, y = center
    drawing.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color, outline=GIVEN_EDGE, width=2)


def label(drawing: ImageDraw.ImageDraw, text: str, corner: list[float], font, color: str, taken: list[list]) -> None:
    """A text on its colour, above the upper left corner of a box, or lower where there is no room.

    Args:
        drawing: of the image.
        text: the label.
        corner: xy of the box.
        font: of PIL.
        color: of the box.
        taken: xyxy of the labels that are there; this one is added.
    """
    width, height = drawing.im.size
    left, top, right, bottom = drawing.textbbox((0, 0), text, font=font)
    padding = 3
    box_width, box_height = right - left + 2 * padding, bottom - top + 2 * padding
    x = max(0, min(corner[0], width - box_width))
    y = max(0, min(corner[1] - box_height, height - box_height))
    while y + 2 * box_height < height and any(
        x < x1 and x0 < x + box_width and y < y1 and y0 < y + box_height for x0, y0, x1, y1 in taken
    ):
        y += box_height
    taken.append([x, y, x + box_width, y + box_height])
    drawing.rectangle(taken[-1], fill=color)
    drawing.text((x + padding - left, y + padding - top), text, font=font, fill=text_color(color))


def view(session: Session) -> Image.Image:
    """The image as the browser shows it: the last answer, and the clicks since then."""
    objects, region = [], {}
    if session.turns:
        objects, region = session.turns[-1].objects, session.turns[-1].region
    if session.clicks:
        region = {} if session.box is None else {"box": session.box}
    return draw(session.image, objects, region, session.clicks, view_scale(session.image))


# ---- the conversation as Markdown ------------------------------------------------------------------------------------


def literal(text: str) -> str:
    """Text that neither Markdown nor HTML reads anything into."""
    lines = text.splitlines()
    return "<br>".join(
        "".join(one if one.isalnum() or one == " " else f"&#{ord(one)};" for one in line) for line in lines
    )


def marked(text: str, color: str) -> str:
    style = f"background-color: {color}; color: {text_color(color)}; border-radius: 4px; padding: 1px 4px"
    return f'<span style="{style}">{literal(text)}</span>'


def rounded(coordinates: list[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in coordinates)


def question_markup(turn: Turn) -> str:
    """A question, with its region in white."""
    if not turn.region:
        return literal(turn.question)
    names = [f"{name} {rounded(turn.region[name])}" for name in ("box", "point") if name in turn.region]
    names += ["painted mask"] if "mask" in turn.region else []
    question = turn.question if REGION_PLACEHOLDER in turn.question else f"{turn.question} {REGION_PLACEHOLDER}"
    return marked(" and ".join(names), GIVEN_COLOR).join(literal(part) for part in question.split(REGION_PLACEHOLDER))


def answer_markup(turn: Turn) -> str:
    """An answer with its phrases in the colours of their objects, each with the numbers of those; then the others."""
    colors = object_colors(turn.objects)
    numbers, others = {}, []
    for number, (found, color) in enumerate(zip(turn.objects, colors, strict=True), 1):
        if found["span"]:
            numbers.setdefault(tuple(found["span"]), (color, []))[1].append(str(number))
        else:
            others.append(marked(f"{NO_PHRASE} {number}", color) + literal(f" {found['score']:.2f}"))
    pieces, end = [], 0
    for (start, stop), (color, found) in sorted(numbers.items()):
        pieces += [literal(turn.text[end:start]), marked(f"{turn.text[start:stop]} {','.join(found)}", color)]
        end = stop
    markup = " ".join(filter(None, ["".join([*pieces, literal(turn.text[end:])]), *others])) or literal(NOTHING_SAID)
    return markup if turn.finished else f"{markup} {literal('(the answer was too long and is cut off)')}"


def chat_messages(session: Session | None, partial: str | None = None) -> list[dict]:
    """The conversation as a `Chatbot` shows it.

    Args:
        session: of the user.
        partial: the last answer as far as it is written; None if it is complete.
    """
    messages = []
    turns = session.turns if session else []
    for turn in turns:
        is_open = partial is not None and turn is turns[-1]
        answer = literal(partial) or "&#8230;" if is_open else answer_markup(turn)
        messages.append({"role": "user", "content": question_markup(turn)})
        messages.append({"role": "assistant", "content": answer})
    return messages


# ---- files to download -----------------------------------------------------------------------------------------------


def encoded(mask) -> dict:
    """A mask as compressed COCO RLE."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def as_json(session: Session) -> dict:
    """The whole conversation; masks are COCO RLE, coordinates pixels of the image."""

    def plain(item: dict) -> dict:
        return {key: encoded(value) if key == "mask" and value is not None else value for key, value in item.items()}

    return {
        "image": {"file_name": session.name, "width": session.image.width, "height": session.image.height},
        "turns": [
            {
                "question": turn.question,
                "region": plain(turn.region),
                "text": turn.text,
                "finished": turn.finished,
                "objects": [plain(found) for found in turn.objects],
            }
            for turn in session.turns
        ],
    }


def as_coco(session: Session) -> dict:
    """The objects of all answers in the layout of COCO's instances; their phrases are the categories."""
    objects = [found for turn in session.turns for found in turn.objects]
    names = list(dict.fromkeys(found["phrase"] or NO_PHRASE for found in objects))
    annotations = []
    for number, found in enumerate(objects, 1):
        x0, y0, x1, y1 = found["box"]
        annotation = {
            "id": number,
            "image_id": 1,
            "category_id": names.index(found["phrase"] or NO_PHRASE) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "iscrowd": 0,
            "score": found["score"],
        }
        if found.get("mask") is not None:
            annotation |= {"segmentation": encoded(found["mask"]), "area": int(np.sum(found["mask"]))}
        annotations.append(annotation)
    image = {"id": 1, "file_name": session.name, "width": session.image.width, "height": session.image.height}
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": [image], "annotations": annotations, "categories": categories}


def export(session: Session) -> tuple[str, str, str]:
    """Write the files to download: the conversation as JSON, its objects as COCO, the last answer as PNG."""
    folder, stem = Path(session.folder.name), Path(session.name).stem
    paths = folder / f"{stem}_answers.json", folder / f"{stem}_coco.json", folder / f"{stem}_drawn.png"
    for path, content in zip(paths, (as_json(session), as_coco(session)), strict=False):
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    turn = session.turns[-1]
    scale = max(1.0, SHORTEST_LONGER_SIDE / max(session.image.size))
    draw(session.image, turn.objects, turn.region, [], scale).save(paths[2])
    return tuple(map(str, paths))


# ---- the page --------------------------------------------------------------------------------------------------------


def region_text(session: Session | None) -> str:
    """What the clicks say, in words."""
    if session is None or not session.clicks:
        return "No box and no point."
    if session.box is None:
        return f"Point {rounded(session.clicks[0])}; for a box, click the opposite corner."
    return f"Box {rounded(session.box)}"


def plain_editor(session: Session | None) -> dict | None:
    """The image without strokes, for an `ImageEditor`."""
    if session is None:
        return None
    scale = view_scale(session.image)
    size = tuple(max(1, round(side * scale)) for side in session.image.size)
    return {"background": session.image.resize(size, Image.Resampling.BICUBIC), "layers": [], "composite": None}


def build(assistant: Assistant) -> gr.Blocks:
    """The page. Its functions do nothing but put the results of those above into its components."""
    examples = [(str(FOLDER / name), question) for name, question in EXAMPLES if (FOLDER / name).is_file()]
    with gr.Blocks(title="PerceptionGPT", analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as page:
        gr.Markdown(INTRODUCTION)
        state = gr.State(None, time_to_live=SECONDS_KEPT)
        with gr.Row():
            with gr.Column():
                file = gr.File(label="Image", file_types=["image"], type="filepath", height=110, elem_id="file")
                with gr.Tabs() as tabs:
                    with gr.Tab("Answer and box", id=ANSWER_TAB):
                        shown = gr.Image(
                            label="Click two corners of a box", interactive=False, format="png",
                            buttons=["fullscreen"], elem_id="shown",
                        )  # fmt: skip
                        box_text = gr.Markdown(region_text(None), elem_id="box_text")
                    # Rendered from the start: what is set before an editor is there does not appear in it.
                    with gr.Tab("Mask", render_children=True):
                        editor = gr.ImageEditor(
                            label="Paint over what you mean", type="pil", sources=(), transforms=(), layers=False,
                            brush=gr.Brush(default_size=24, colors=[GIVEN_COLOR], color_mode="fixed"),
                            canvas_size=(SHORTEST_LONGER_SIDE, SHORTEST_LONGER_SIDE), format="png", buttons=[],
                            height=560,
                            elem_id="editor",
                        )  # fmt: skip
                clear = gr.Button("Clear the region", size="sm", elem_id="clear")
            with gr.Column():
                chat = gr.Chatbot(
                    label="Conversation", height=460, latex_delimiters=[], buttons=[], elem_id="chat",
                    sanitize_html=False,  # `literal` leaves nothing to sanitize, and the colours are styles
                )  # fmt: skip
                question = gr.Textbox(
                    label="Question", placeholder="Find the red circle.", max_length=MOST_LETTERS, submit_btn=True,
                    elem_id="question",
                )  # fmt: skip
                new = gr.Button("New conversation about this image", size="sm", elem_id="new")
                with gr.Row():
                    names = ("JSON", "COCO", "PNG")
                    downloads = [
                        gr.DownloadButton(f"Download {name}", size="sm", interactive=False, elem_id=name.lower())
                        for name in names
                    ]
        if examples:
            example = gr.Dataset(
                label="Examples", components=["image", "textbox"], samples=[list(one) for one in examples],
                type="index", elem_id="examples",
            )  # fmt: skip

        def no_files() -> list:
            return [gr.DownloadButton(value=None, interactive=False) for _ in downloads]

        opened = [state, shown, editor, box_text, chat, *downloads]

        def show(session: Session | None):
            image = None if session is None else view(session)
            return session, image, plain_editor(session), region_text(session), [], *no_files()

        def on_file(path):
            return show(None if path is None else open_image(assistant, path))

        def on_new(session):
            return show(session and Session(session.image, session.name))

        def on_example(index):
            path, text = examples[index]
            return path, text, *show(open_image(assistant, path))

        def on_click(session, event: gr.SelectData):
            click(session, *event.index)
            return view(session), region_text(session)

        def on_clear(session):
            if session is not None:
                session.clicks.clear()
            return session and view(session), plain_editor(session), region_text(session)

        def on_ask(session, text, drawn):
            unchanged = gr.skip()
            for part in ask(assistant, session, text, drawn):
                if part is not None:
                    yield "", chat_messages(session, part), *[unchanged] * 7
            files = [gr.DownloadButton(value=path, interactive=True) for path in export(session)]
            shows_answer = gr.Tabs(selected=ANSWER_TAB)
            values = view(session), plain_editor(session), region_text(session)
            yield "", chat_messages(session), *values, shows_answer, *files

        private = {"api_visibility": "private"}
        file.upload(on_file, file, opened, **private)
        file.clear(on_file, file, opened, **private)
        gr.on([new.click, chat.clear], on_new, state, opened, **private)
        shown.select(on_click, state, [shown, box_text], show_progress="hidden", **private)
        clear.click(on_clear, state, [shown, editor, box_text], **private)
        asked = [question, chat, shown, editor, box_text, tabs, *downloads]
        question.submit(on_ask, [state, question, editor], asked, show_progress_on=chat, **private)
        if examples:
            example.click(on_example, example, [file, question, *opened], **private)
    return page.queue(max_size=MOST_WAITING)


def launch(page: gr.Blocks, **kwargs):
    """Serve the page; nothing in it comes from another server."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return page.launch(
        theme=theme,
        max_file_size=LARGEST_FILE,
        allowed_paths=[str(FOLDER / "examples")],
        share=False,
        ssr_mode=False,
        footer_links=[],
        **kwargs,
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the head of this file."""
    summary, _, epilog = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="app.py", description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a checkpoint, or a repository id on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of a repository on the Hub")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--open", action="store_true", help="open it in a browser")
    options = parser.parse_args(arguments)
    name, revision = (options.model, options.revision) if options.model else find_model()
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        sys.exit(f"error: --model {name}: there is no such folder")
    try:
        assistant = Assistant(name, revision)
    except (OSError, ValueError) as error:
        sys.exit(f"error: --model {name}: not a checkpoint that can be loaded: {error}")
    launch(build(assistant), server_port=options.port, inbrowser=options.open)


if __name__ == "__main__":
    main()
