"""Descriptions of drawn objects: are colour, pattern and shape the right ones?"""

import re
from collections import Counter

from perceptiongpt.data.scenes.pictures import COLORS, DOT, PATTERNS, SHAPES
from perceptiongpt.metrics import shared


WORDS = {"color": tuple(COLORS), "pattern": PATTERNS, "shape": (*SHAPES, DOT)}
KIND_OF_WORD = {word: kind for kind, words in WORDS.items() for word in words}
IMPLIED = ("plain",)  # a caption need not name this pattern
HIDDEN_BY = re.compile(r"\bhidden by\b|\bbehind\b", re.IGNORECASE)


class AttributesRight(shared.StoredMetric):
    description = """The share of descriptions that name exactly the colours, patterns and shapes of the reference. The
text before "hidden by" is about the object, the text after it about what hides it; each part must have the same
attribute words, in any order. The words are those of the drawn scenes (data/scenes); "plain" may be left out."""
    inputs = """
Args:
    predictions: a description (text) per object; a missing or blank one is wrong.
    references: the true description (text) of each object, which names at least one attribute.
    per_sample: also return `samples`, with `right`, `own_right`, `color_right`, `pattern_right`, `shape_right` of each.

Returns:
    attributes_right: share of descriptions with exactly the attributes of the reference.
    own_attributes_right: the same for the text before "hidden by", the object itself.
    color_right, pattern_right, shape_right: the same for the object's words of one kind. All None if there are no rows.
    n: number of rows. problems: {reason: number of predictions}.
"""

    def score(self, predictions, references, problems):
        references = shared.read_references(references, parse_reference)
        predictions = shared.read_predictions(predictions, shared.parse_text, problems)
        samples = []
        for prediction, reference in zip(predictions, references, strict=True):
            found, wanted = attributes(prediction or ""), attributes(reference)
            answered = prediction is not None
            sample = {"right": answered and found == wanted, "own_right": answered and found[0] == wanted[0]}
            for kind in WORDS:
                sample[f"{kind}_right"] = answered and of_kind(found[0], kind) == of_kind(wanted[0], kind)
            samples.append(sample)
        names = {"right": "attributes_right", "own_right": "own_attributes_right"}
        keys = ("right", "own_right", *(f"{kind}_right" for kind in WORDS))
        return {names.get(key, key): shared.mean([sample[key] for sample in samples]) for key in keys}, samples


def attributes(text: str) -> list[Counter]:
    """How often each attribute word occurs in the text before "hidden by", and after it."""
    parts = HIDDEN_BY.split(text, maxsplit=1)
    found = []
    for part in [*parts, ""][:2]:
        words = re.findall(r"[a-z]+", part.lower())
        found.append(Counter(word for word in words if word in KIND_OF_WORD and word not in IMPLIED))
    return found


def of_kind(words: Counter, kind: str) -> dict[str, int]:
    """The words of one kind."""
    return {word: count for word, count in words.items() if KIND_OF_WORD[word] == kind}


def parse_reference(value) -> str:
    if not any(attributes(shared.parse_text(value))):
        raise ValueError("names no colour, pattern or shape")
    return value
