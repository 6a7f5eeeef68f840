"""The one row schema: a conversation about its image or images, with at least one signal per `<vis>`.

A row is a dictionary with the columns of `row_features`:

| column | content |
| --- | --- |
| `image` | a PIL image (or a list of them: `row_features(several_images=True)`) |
| `messages` | list of {`role`, `content`}; `<image>` opens the first user turn, once per image; a `<vis>` per signal |
| `boxes` | per `<vis>`, in reading order: xyxy in absolute pixels of the original image, or None |
| `masks` | per `<vis>`: {`size`: [height, width], `counts`: str}, compressed COCO RLE, or None |
| `points` | per `<vis>`: [x, y] in absolute pixels of the original image, or None; the column may be missing |
| `task` | one of `TASKS` |
| `source`, `image_id`, `split` | strings |
| `width`, `height` | of the (first) original image, pixels |

In an answer, `<look>` right behind a `<vis>` says that the model looks at it again; a `<vis>` right behind that is the
same object, found again. `<reenc>` in an answer says that the model encodes the image again there.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from datasets import Features, Image, List, Value

from perceptiongpt.configuration_perceptiongpt import (
    IMAGE_TOKEN,
    LOOK_MARKER,
    PHRASE_END_TOKEN,
    PHRASE_START_TOKEN,
    REENC_MARKER,
    VIS_TOKEN,
)
from perceptiongpt.geometry_perceptiongpt import decode_mask
from perceptiongpt.images_perceptiongpt import read_image
from perceptiongpt.signals_perceptiongpt import FIRST_SIGNALS, SIGNALS


TASKS = (
    "caption",
    "region_caption",
    "refer",
    "detect",
    "box_to_mask",
    "no_target",
    "spotting_caption",
    "vqa",
    "region_vqa",
    "grounded_vqa",
    "reasoning",
    "dialogue",
    "point",
    "point_all",
    "point_to_mask",
)
POINT_TASKS = ("point", "point_all", "point_to_mask")
DIRECT_TASKS = ("refer", "detect", "box_to_mask", "no_target", *POINT_TASKS)
# Those that ask for one object, which may be absent.
ONE_OBJECT_TASKS = ("refer", "box_to_mask", "point", "point_to_mask")
MAX_IMAGE_PIXELS = 178_956_970  # Pillow opens none that is larger


class RowImage(Image):
    """A `datasets.Image` that reads images with `read_image`. (`datasets` would drop transparency.)"""

    def decode_example(self, value, token_per_repo_id=None):
        return read_image(value)

    def __eq__(self, other) -> bool:  # so that data sets of both kinds can be concatenated
        return isinstance(other, Image) and vars(self) == vars(other)


def row_features(several_images: bool = False) -> Features:
    """The `datasets.Features` of the schema; `several_images` makes `image` a list of images."""
    image = RowImage(mode="RGB")
    return Features(
        {
            "image": List(image) if several_images else image,
            "messages": List({"role": Value("string"), "content": Value("string")}),
            **{signal.plural: List(_feature(signal.column)) for signal in SIGNALS.values()},
            "task": Value("string"),
            "source": Value("string"),
            "image_id": Value("string"),
            "split": Value("string"),
            "width": Value("int32"),
            "height": Value("int32"),
        }
    )


def _feature(column):
    """The type of a signal's column, `Signal.column`, as a feature."""
    if isinstance(column, str):
        return Value(column)
    if isinstance(column, list):
        return List(_feature(column[0]))
    return {key: _feature(value) for key, value in column.items()}


COLUMNS = tuple(row_features())
# Rows and files from before there was a signal lack its column.
_LATER = {signal.plural for name, signal in SIGNALS.items() if name not in FIRST_SIGNALS}
REQUIRED_COLUMNS = tuple(column for column in COLUMNS if column not in _LATER)


def _given_columns(row: dict) -> dict[str, list]:
    """The columns of a row by signal, without those of later signals that hold no value at all."""
    columns = {name: row.get(signal.plural) for name, signal in SIGNALS.items()}
    return {
        name: values
        for name, values in columns.items()
        if name in FIRST_SIGNALS or any(value is not None for value in values or [])
    }


def row_slots(row: dict) -> list[dict]:
    """The values of each `<vis>` of a row that are not None, by the signal's name."""
    columns = _given_columns(row)
    if len({len(values) for values in columns.values()}) > 1:
        found = ", ".join(f"{len(values)} {SIGNALS[name].plural}" for name, values in columns.items())
        raise ValueError(f"{describe_row(row)}: {found}; expected one of each, or None, per {VIS_TOKEN}")
    slots = (zip(columns, values) for values in zip(*columns.values(), strict=True))
    return [{name: value for name, value in slot if value is not None} for slot in slots]


def row_images(row: dict) -> list:
    """The images of a row as a list."""
    return list(row["image"]) if isinstance(row["image"], (list, tuple)) else [row["image"]]


def row_to_messages(row: dict) -> list[dict]:
    """Turn a row into messages for `PerceptionGPTProcessor.apply_chat_template`.

    The strings are split at `<image>` and `<vis>` into content items: `image` items carry the row's images, and a
    `<vis>` becomes an item of the signal in its slot, or a `region` item where there are several, and a `<look>` behind
    it a `look` item. `<p>..</p>` stays in the text.

    Raises:
        ValueError: if there are more or fewer `<image>` or `<vis>` than images or slots.
    """
    images, slots = row_images(row), row_slots(row)
    contents = [message["content"] for message in row["messages"]]
    for token, values in ((IMAGE_TOKEN, images), (VIS_TOKEN, slots)):
        found = sum(content.count(token) for content in contents)
        if found != len(values):
            raise ValueError(f"{describe_row(row)}: {found} {token} in the messages, but {len(values)} values")
    images, slots = iter(images), iter(slots)
    messages = []
    for message, content in zip(row["messages"], contents, strict=True):
        items = []
        for piece in re.split(f"({IMAGE_TOKEN}|{VIS_TOKEN}(?:{LOOK_MARKER})?|{REENC_MARKER})", content):
            if piece == IMAGE_TOKEN:
                items.append({"type": "image", "image": next(images)})
            elif piece.startswith(VIS_TOKEN):
                given = next(slots)
                items.append({"type": "region" if len(given) > 1 else next(iter(given)), **given})
                if piece.endswith(LOOK_MARKER):
                    items.append({"type": "look"})
            elif piece == REENC_MARKER and message["role"] == "assistant":
                items.append({"type": "reenc"})
            elif piece:
                items.append({"type": "text", "text": piece})
        messages.append({"role": message["role"], "content": items})
    return messages


def describe_row(row: dict, index: int | str | None = None) -> str:
    """A short name of a row for error messages."""
    place = "row" if index is None else f"row {index}"
    return f"{place} (source {row.get('source')!r}, image {row.get('image_id')!r}, task {row.get('task')!r})"


def validate_row(row: dict, index: int | str | None = None, with_images: bool = True) -> tuple[dict, int]:
    """Check a row against the schema.

    Args:
        row: a row with the columns of `row_features`.
        index: its number or name, for the error message.
        with_images: False admits a row whose image is not at hand (`image` None); if it has no signals, its size may
            be unknown (0 x 0).

    Returns:
        The row with all columns, its coordinates as floats, clipped to the image; and how many boxes and points
        overhung the image by at most one pixel and were clipped.

    Raises:
        ValueError: naming the row, the value and what was expected.
    """
    name = describe_row(row, index)
    missing = [column for column in REQUIRED_COLUMNS if column not in row]
    if missing:
        raise ValueError(f"{name}: missing columns {missing}")
    if row["task"] not in TASKS:
        raise ValueError(f"{name}: task {row['task']!r} is none of {', '.join(TASKS)}")
    for column in ("source", "image_id", "split"):
        check_unicode(row[column], f"{name}, {column}")
    _validate_messages(row, name, with_images)
    several = len(row_images(row)) > 1  # width and height are those of the first image only
    unknown = not with_images and not row["boxes"] and row["width"] == row["height"] == 0
    if not several and not unknown:
        check_size(row["width"], row["height"], name)

    height, width = (math.inf, math.inf) if several else (row["height"], row["width"])
    columns, clipped = {signal.plural: [] for signal in SIGNALS.values()}, 0
    for index, slot in enumerate(row_slots(row)):
        if not slot:
            raise ValueError(f"{name}: slot {index} has none of {', '.join(SIGNALS)}")
        for key, signal in SIGNALS.items():
            value = slot.get(key)
            if value is not None:
                with naming(f"{name}, slot {index}"):
                    value, was_clipped = signal.check_column(value, height, width)
                clipped += was_clipped
            columns[signal.plural].append(value)
    return {**row, **columns}, clipped


def check_unicode(text, name: str) -> None:
    """`ValueError` unless this is a string that UTF-8 can encode: json may hold half of a surrogate pair."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: {str(text)[:80]!r} is not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: {text[:80]!r} is not Unicode text: {error.reason}") from error


def check_size(width, height, name: str) -> None:
    """`ValueError` unless these are possible sides of an image in pixels."""
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in (width, height))
    if not whole or min(width, height) < 1 or width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{name}: image of {str(width)[:20]} x {str(height)[:20]} pixels")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a name before the message of a `ValueError` raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _validate_messages(row: dict, name: str, with_images: bool) -> None:
    messages = row["messages"]
    if not messages:
        raise ValueError(f"{name}: no messages")
    for message in messages:
        if message.get("role") not in ("system", "user", "assistant") or not isinstance(message.get("content"), str):
            raise ValueError(f"{name}: message {message!r} is not a role (system, user, assistant) with a string")
        check_unicode(message["content"], name)
    contents = [message["content"] for message in messages]
    images = row_images(row)
    if not images or (with_images and any(image is None for image in images)):
        raise ValueError(f"{name}: column 'image' holds no image")
    first_user = next((content for message, content in zip(messages, contents) if message["role"] == "user"), "")
    if not first_user.startswith(IMAGE_TOKEN * len(images)) or "".join(contents).count(IMAGE_TOKEN) != len(images):
        raise ValueError(
            f"{name}: the first user turn must open with {len(images)} {IMAGE_TOKEN}, with none elsewhere: {contents}"
        )
    slots = sum(content.count(VIS_TOKEN) for content in contents)
    counts = {SIGNALS[key].plural: len(values) for key, values in _given_columns(row).items()}
    if set(counts.values()) != {slots}:
        listed = ", ".join(f"{count} {column}" for column, count in counts.items())
        raise ValueError(f"{name}: {slots} {VIS_TOKEN} in the messages, but {listed}; expected as many of each")
    for message, content in zip(messages, contents, strict=True):
        if VIS_TOKEN + LOOK_MARKER in content and message["role"] != "assistant":
            raise ValueError(f"{name}: only answers look again, got {VIS_TOKEN + LOOK_MARKER} in {content!r}")
        tags = re.findall(f"{PHRASE_START_TOKEN}|{PHRASE_END_TOKEN}", content)
        if tags != [PHRASE_START_TOKEN, PHRASE_END_TOKEN] * (len(tags) // 2):
            raise ValueError(f"{name}: {PHRASE_START_TOKEN} and {PHRASE_END_TOKEN} do not pair up in {content!r}")
    answer = messages[-1]["content"]
    if row["task"] in DIRECT_TASKS:
        found = f"{re.escape(VIS_TOKEN)}({LOOK_MARKER}{re.escape(VIS_TOKEN)})*"
        expected = r"There is no .+\." if row["task"] == "no_target" else f"({found})+"
        if messages[-1]["role"] != "assistant" or not re.fullmatch(expected, answer):
            raise ValueError(f"{name}: the answer of this task must match {expected!r}, got {answer!r}")


def decode_rle(mask: dict) -> np.ndarray:
    """A mask of the schema as a bool array (height, width); `ValueError` if it is broken or empty."""
    return decode_mask(mask, *mask["size"])
