"""What lies in each cell of an image: labels for the stage `dense`, made from rows with masks."""

import re
from collections.abc import Sequence

import numpy as np

from perceptiongpt.configuration_perceptiongpt import PHRASE_END_TOKEN, PHRASE_START_TOKEN, VIS_TOKEN
from perceptiongpt.data.schema import decode_rle
from perceptiongpt.data.templates import load_templates
from perceptiongpt.geometry_perceptiongpt import boxes_to_square, mask_coverage, tight_box


BITS = 4  # a cell has BITS x BITS bits, which tell the object in it from what is around it
LEAST_COVERED = 0.25  # an object owns a cell from this share on
# Words that do not say how an object looks: articles, numbers, and words that only place it.
EMPTY_WORDS = frozenset(
    "a an the one two three four five six seven eight nine ten eleven twelve some all every each of and or in on at to "
    "from with that this is are his her its their other another pair shape shapes left right top bottom middle center "
    "leftmost rightmost topmost bottommost largest smallest first second third fourth fifth sixth seventh eighth ninth "
    "tenth".split()
)
# After these words a phrase speaks of other objects, or of the place.
RELATION_STARTS = re.compile(
    r"\b(?:closest|nearest|farthest|furthest|next|to|on|in|at|of|from|with|that|which|who|above|below|under|behind|"
    r"partly|larger|smaller)\b"
)
IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse"}
IRREGULAR |= {"knives": "knife", "feet": "foot", "teeth": "tooth", "geese": "goose", "buses": "bus"}
NO_PLURALS = ("ss", "us", "is", "skis", "scissors", "pants", "jeans", "shorts")


def cell_labels(masks: Sequence[np.ndarray], grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Which object owns each cell, and which part of the cell it covers.

    The owner is the object that covers most of the cell, `LEAST_COVERED` at least. An object that owns no cell gets the
    one that it covers most and that is not the only cell of another object.

    Args:
        masks: bool or uint8 (height, width) of one image.
        grid: cells per side of the padded square.

    Returns:
        owner, int64 (grid, grid): the index of the object or -1; bits, bool (grid, grid, BITS * BITS), row by row: the
        parts of which the owner covers half or more.
    """
    owner = np.full((grid, grid), -1, dtype=np.int64)
    if not len(masks):
        return owner, np.zeros((grid, grid, BITS * BITS), dtype=bool)
    parts = np.stack([mask_coverage(mask, grid * BITS) for mask in masks])
    parts = parts.reshape(-1, grid, BITS, grid, BITS).transpose(0, 1, 3, 2, 4).reshape(-1, grid, grid, BITS * BITS)
    covered = parts.mean(-1)
    owner = np.where(covered.max(0) >= LEAST_COVERED, covered.argmax(0), owner)
    for index in sorted(range(len(masks)), key=lambda i: -covered[i].sum()):  # the smallest is the last to choose
        if (owner == index).any():
            continue
        for cell in np.argsort(-covered[index], axis=None, kind="stable")[: np.count_nonzero(covered[index])]:
            if owner.flat[cell] < 0 or (owner == owner.flat[cell]).sum() > 1:
                owner.flat[cell] = index
                break
    owned = np.take_along_axis(parts, owner.clip(min=0)[None, ..., None], axis=0)[0]
    return owner, (owned >= 0.5) & (owner >= 0)[..., None]


def objects_of_rows(rows: Sequence[dict]) -> list[dict]:
    """The objects with a mask that rows about one image speak of.

    An object's words are those of the phrases that it is the referent of: what stands in `<p>..</p>` before its
    `<vis>`, or what a prompt of `refer` or `detect` asks for. The same mask in several rows is one object.

    Returns:
        per object `words` (list, without repetition), `box` (xyxy in 0..1 of the padded square) and `mask` (bool
        (height, width)).
    """
    found = {}
    for row in rows:
        for phrase, mask in zip(slot_phrases(row), row["masks"], strict=True):
            if mask is not None:
                words = found.setdefault((tuple(mask["size"]), mask["counts"]), [])
                words += [word for word in phrase_words(phrase) if word not in words]
    objects = []
    for (size, counts), words in found.items():
        mask = decode_rle({"size": list(size), "counts": counts})
        objects.append({"words": words, "box": boxes_to_square(tight_box(mask), *size).tolist(), "mask": mask})
    return objects


def slot_phrases(row: dict) -> list[str]:
    """The phrase of each `<vis>` of a row, "" where there is none."""
    phrases, asked = [], ""
    for message in row["messages"]:
        phrase = ""
        for piece in re.split(f"({PHRASE_START_TOKEN}.*?{PHRASE_END_TOKEN}|{VIS_TOKEN})", message["content"]):
            if piece == VIS_TOKEN:
                phrases.append(phrase or (asked if message["role"] == "assistant" else ""))
            elif piece.startswith(PHRASE_START_TOKEN):
                phrase = piece.removeprefix(PHRASE_START_TOKEN).removesuffix(PHRASE_END_TOKEN)
            elif piece:
                phrase = ""
        asked = asked_phrase(row["task"], message["content"]) if message["role"] == "user" else asked
    return phrases


def asked_phrase(task: str, prompt: str) -> str:
    """What a prompt of the tasks `refer` and `detect` asks for; "" for other tasks and other phrasings."""
    if task not in ("refer", "detect"):
        return ""
    prompt = prompt.rpartition(">")[2]
    for template in sorted(load_templates()[task]["prompts"], key=len, reverse=True):  # the most words first
        before, after = template.split("{phrase}")
        start, end = len(before), len(prompt) - len(after)
        if prompt.lower().startswith(before.lower()) and prompt.endswith(after) and start < end:
            return prompt[start:end]
    return ""


def phrase_words(phrase: str) -> list[str]:
    """The words of a phrase that say how something looks, in lower case and in the singular."""
    phrase = RELATION_STARTS.split(phrase.lower())[0]
    words = [singular(word) for word in re.findall(r"[^\W\d_]+", phrase) if word not in EMPTY_WORDS]
    return list(dict.fromkeys(words))


def singular(word: str) -> str:
    """The singular of an English noun, by its ending; other words mostly stay as they are."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("xes", "ches", "shes", "sses", "zzes")):
        return word[:-2]
    return word if word.endswith(NO_PLURALS) or not word.endswith("s") or len(word) < 4 else word[:-1]
