"""Prompts and forms of answers of every task, from `templates.yaml` beside this file."""

import re
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import yaml


QUESTION_TASKS = ("vqa", "region_vqa", "grounded_vqa", "reasoning")  # where a phrase is a sentence
ASKS = re.compile(
    r"(((at|by|for|from|in|of|on|to|with) )?(how|what|when|where|which|who|whom|whose|why)|are|can|could|did|do|does|"
    r"had|has|have|is|may|might|should|was|were|will|would)\b",
    re.IGNORECASE,
)


@cache
def load_templates() -> dict[str, dict]:
    """Per task: `prompts`, a list of phrasings; `evaluation`, the one for evaluation; and, unless it is a direct task,
    `answers`, the forms of its answer."""
    return yaml.safe_load((Path(__file__).parent / "templates.yaml").read_text(encoding="utf-8"))


def render_prompt(task: str, phrase: str = "", generator: np.random.Generator | None = None) -> str:
    """A prompt of `task` about `phrase`: drawn with `generator`, or the evaluation prompt without one."""
    return _fill(task, _draw_prompt(task, generator), phrase)


def render_turn(
    task: str, phrase: str = "", answer: str = "", generator: np.random.Generator | None = None, evidence: str = ""
) -> tuple[str, str]:
    """A prompt of `task` with its answer in one of the task's forms.

    The evaluation prompt always goes with the first form, which is the bare answer.

    Args:
        task: a task that has templates.
        phrase: what the prompt is about; for questions, the question.
        answer: the answer's content.
        generator: draws prompt and form; None: the evaluation prompt.
        evidence: for `grounded_vqa`, the grounded phrases that the answer rests on ("<p>the cup</p><vis>").
    """
    template = _draw_prompt(task, generator)
    forms = load_templates()[task].get("answers", ["{answer}"])
    is_evaluation = template == load_templates()[task]["evaluation"]
    form = forms[0] if is_evaluation else forms[generator.integers(len(forms))]
    return _fill(task, template, phrase), form.format(answer=answer, evidence=evidence)


def _draw_prompt(task: str, generator: np.random.Generator | None) -> str:
    templates = load_templates()
    if task not in templates:
        raise ValueError(f"no prompt templates for task {task!r}; there are {', '.join(templates)}")
    prompts = templates[task]["prompts"]
    return templates[task]["evaluation"] if generator is None else prompts[generator.integers(len(prompts))]


def _fill(task: str, template: str, phrase: str) -> str:
    if task in QUESTION_TASKS and phrase:
        phrase = phrase[0].upper() + phrase[1:]
        if phrase.rstrip("\"')")[-1:] not in (".", "?", "!"):
            phrase += "?" if ASKS.match(phrase) else "."
    prompt = template.format(phrase=phrase)
    return prompt[0].upper() + prompt[1:]


def stable_generator(seed: int, *key) -> np.random.Generator:
    """A random generator that depends only on `seed` and the printed form of `key`."""
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32).tolist()])
