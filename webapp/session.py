"""What one user has in front of them: an image, the region that they give, and the conversation about it."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from .assistant import Assistant, refusal


MOST_MEGAPIXELS = 40
MOST_LETTERS = 500  # of a question
REGION_PLACEHOLDER = "<region>"
SHORTEST_LONGER_SIDE, LONGEST_LONGER_SIDE = 640, 1280  # of the image in the browser, in pixels


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
) -> Iterator[str]:
    """Ask a question in a session, which then has the turn and its files; the clicks are used up.

    Yields:
        What the last turn of the session has got: `"text"`, `"object"`, and at last `"answer"`: all, with masks.

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
                if part["type"] == "text":
                    turn.text += part["text"]
                elif part["type"] == "object":
                    turn.objects.append(part)
                else:
                    # A history needs something between two questions.
                    turn.answer = part["content"] or [{"type": "text", "text": ""}]
                    turn.text, turn.objects, turn.finished = part["text"], part["objects"], part["finished"]
                yield part["type"]
    except BaseException:  # the user has gone, or it failed: there is no such turn
        session.turns.remove(turn)
        session.clicks = clicks
        raise
