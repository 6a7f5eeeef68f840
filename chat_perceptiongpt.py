"""Conversations as strings, what a chat template expects of a message, and where answers stand in what it renders."""

import re
from functools import lru_cache
from typing import NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from .configuration_perceptiongpt import (
    IMAGE_TOKEN,
    LOOK_END_TOKEN,
    LOOK_PAD_TOKEN,
    LOOK_TOKEN,
    PHRASE_END_TOKEN,
    PHRASE_START_TOKEN,
    REENC_TOKEN,
    VIS_TOKEN,
)
from .look_processing_perceptiongpt import look_text, reenc_text
from .signals_perceptiongpt import SIGNALS, refuse_signal


# For tokenizers that bring no template of their own. An answer starts right after the line break, so that the state
# that ends a prompt is the one that predicts the `<vis>` of a direct task.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- message['role'] + ':\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
            {{- message['content'] + (eos_token or '') }}
        {%- endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'assistant:\\n' }}
{%- endif %}
"""

# What a message's content may be, in the order in which a template is tried.
STRING, ITEMS, TEXT_ITEM = "a string", "image items and a text item", "a text item"
# Both kinds of quotation marks, so that a template that prints a list instead of reading it is found out.
PROBE_QUESTION = f"""Where's the "zebra" {VIS_TOKEN}?"""
PROBE_ANSWER = f"""It's the {PHRASE_START_TOKEN}"zebra"{PHRASE_END_TOKEN}{VIS_TOKEN}"""
PROBE = (
    {"role": "user", "content": IMAGE_TOKEN + PROBE_QUESTION},
    {"role": "assistant", "content": PROBE_ANSWER},
)


class ChatForm(NamedTuple):
    """
    How a chat template is used.

    Attributes:
        content (`str`): `STRING`, `ITEMS` or `TEXT_ITEM`.
        ends_answers (`bool`): whether the template writes something after an answer by which the model can end it.
        marks_answers (`bool`):
            Whether its generation tags hold an answer from the end of the generation prompt to its end-of-turn token.
        problem (`str`, *optional*): what the template loses in every form of content; the rest is then a guess.
    """

    content: str
    ends_answers: bool
    marks_answers: bool
    problem: str | None = None


def chat_form(template: str, tokenizer) -> ChatForm:
    """
    How a Jinja chat template of a tokenizer is used, read off what it makes of a short conversation.

    Args:
        template (`str`): the template.
        tokenizer (`PreTrainedTokenizerBase`): gives the special tokens that the template may name.
    """
    return _probe(template, tuple(sorted(tokenizer.special_tokens_map.items())))


@lru_cache
def _probe(template: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatForm:
    variables = dict(special_tokens)
    if "enable_thinking" in template:
        variables["enable_thinking"] = False
    has_tags = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    def render(messages: list[dict], **kwargs) -> tuple[str, list[tuple[int, int]]]:
        rendered, spans = render_jinja_template([messages], chat_template=template, **kwargs, **variables)
        return rendered[0], spans[0] if spans else []

    problems = {}
    for content in (STRING, ITEMS, TEXT_ITEM):
        messages = shape_contents(PROBE, content)
        try:
            rendered, spans = render(messages, return_assistant_tokens_mask=has_tags)
            prompt, _ = render(messages[:1], add_generation_prompt=True)
        except Exception as error:  # a template is a program: given another form than its own it raises nearly anything
            problems[content] = f"fails: {type(error).__name__}: {error}"
            continue
        image, question, answer = (rendered.find(part) for part in (IMAGE_TOKEN, PROBE_QUESTION, PROBE_ANSWER))
        if rendered.count(IMAGE_TOKEN) != 1:
            problems[content] = "loses the image"
        elif question < 0 or answer < 0:
            problems[content] = f"loses the {'question' if question < 0 else 'answer'}"
        elif not image < question < answer:
            problems[content] = "changes the order of image, question and answer"
        else:
            answer_end = answer + len(PROBE_ANSWER)
            ends = bool(rendered[answer_end:].strip())
            from_prompt = not rendered.startswith(prompt) or (spans and spans[0][0] <= len(prompt))
            marks = bool(spans) and from_prompt and (not ends or spans[-1][1] > answer_end)
            return ChatForm(content, ends_answers=ends, marks_answers=marks)
    problem = "; ".join(f"given {content} it {what}" for content, what in problems.items())
    return ChatForm(STRING, ends_answers=True, marks_answers=has_tags, problem=problem)


def shape_contents(messages, content: str) -> list[dict]:
    """
    Messages whose contents are strings with `<image>` and `<vis>` in them, in the form that a template expects.

    As items, the images that open a message are items of their own, which a template may write in its own way and may
    move to the front; whatever follows them is one text item, so that nothing changes its place.
    """
    if content == STRING:
        return list(messages)
    shaped = []
    for message in messages:
        text = message["content"]
        items = []
        if content == ITEMS:
            rest = text
            while rest.startswith(IMAGE_TOKEN):
                rest = rest.removeprefix(IMAGE_TOKEN)
                items.append({"type": "image"})
            text = rest
        if text or not items:
            items.append({"type": "text", "text": text})
        shaped.append({**message, "content": items})
    return shaped


def end_answers(messages: list[dict], end: str | None, is_open: bool = False) -> list[dict]:
    """Messages whose answers end with the token `end`, if there is one; not the last message if it `is_open`."""
    ended = []
    for turn, message in enumerate(messages):
        if end and message["role"] == "assistant" and not (is_open and turn == len(messages) - 1):
            message = {**message, "content": message["content"].removesuffix(end) + end}
        ended.append(message)
    return ended


def answer_spans(sample: int, messages: list[dict], render, end: str | None = None) -> list[tuple[int, int]]:
    """
    Where the assistant's turns stand in a rendered conversation: turn i is what `messages[: i + 1]` renders to after
    what `messages[:i]` and the generation prompt render to.

    Args:
        sample (`int`): the index of the conversation, for errors.
        messages (`list[dict]`): the conversation.
        render: `render(messages, add_generation_prompt)` gives the text.
        end (`str`, *optional*): the token that ends an answer, if what the template writes after it is not part of it.
    """
    full, spans = render(messages, False), []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, prompt, answered = (
            render(messages[:turn], False),
            render(messages[:turn], True),
            render(messages[: turn + 1], False),
        )
        if not answered.startswith(prompt):
            raise ValueError(
                f"sample {sample}, turn {turn}: the chat template does not render the answer after its generation "
                f"prompt: the prompt ends with {prompt[-60:]!r}, the answered turn starts with "
                f"{answered[len(before) :][:80]!r}. Mark the answers in the template with generation tags."
            )
        answer = answered[len(prompt) :]
        # Templates such as Qwen3's write an earlier answer without what its generation prompt said of thinking.
        start = len(prompt) if full.startswith(prompt + answer) else full.find(answer, len(before))
        if not full.startswith(before) or start < 0:
            raise ValueError(f"sample {sample}, turn {turn}: the chat template rewrites this turn when others follow")
        length = len(answer) if end is None or end not in answer else answer.rindex(end) + len(end)
        spans.append((start, start + length))
    return spans


def flatten_messages(
    sample: int, messages: list[dict], signals: list[str], look_tokens: int = 0, reenc_queries: int = 0
) -> tuple[list[dict], list, list[dict]]:
    """
    One conversation with contents as strings, its images, and per `<vis>` the value of each signal and its image; and
    as `look` the content item of a look, which has `look_tokens` pads, right behind it. An item `reenc` has
    `reenc_queries` pads.
    """
    kept = (IMAGE_TOKEN, VIS_TOKEN)
    kept += (LOOK_TOKEN, LOOK_END_TOKEN, LOOK_PAD_TOKEN) if look_tokens else ()
    kept += (REENC_TOKEN,) if reenc_queries else ()
    flat_messages, images, slots = [], [], []
    for turn, message in enumerate(messages):
        content = message.get("content", "")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        pieces = []
        for item in items:
            name = f"sample {sample}, turn {turn}"
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "text":
                text = item.get("text")
                if not isinstance(text, str):
                    raise ValueError(f'{name}: text item holds {text!r}; expected a string under "text"')
                for token in kept:
                    if token in text:
                        raise ValueError(
                            f"{name}: the text {text[:80]!r} contains {token}; expected a content item of its own"
                        )
                pieces.append(text)
            elif kind == "image":
                images += [item[key] for key in ("image", "url", "path", "base64") if item.get(key) is not None][:1]
                pieces.append(IMAGE_TOKEN)
            elif kind in SIGNALS or kind == "region":
                for key in SIGNALS:
                    if kind == key or item.get(key) is not None:
                        refuse_signal(key, signals, f"{name}: ")
                slot = {key: item.get(key) for key in (*signals, "image")}
                if kind in SIGNALS and slot[kind] is None:
                    raise ValueError(f"{name}: content item of type {kind!r} has no {kind!r}")
                if all(slot[key] is None for key in signals):
                    raise ValueError(f"{name}: content item of type {kind!r} has none of {', '.join(signals)}")
                if message["role"] == "assistant":
                    slot |= {key: SIGNALS[key].default_target(item) for key in signals if slot[key] is None}
                slots.append(slot)
                pieces.append(VIS_TOKEN)
            elif kind == "reenc" and reenc_queries:
                pieces.append(reenc_text(reenc_queries))
            elif kind == "look" and look_tokens:
                if not pieces or pieces[-1] != VIS_TOKEN:
                    raise ValueError(f"{name}: a look stands right behind the content item that it is at")
                slots[-1]["look"] = item
                pieces.append(look_text(0 if item.get("crop", item) is None else look_tokens))
            else:
                raise ValueError(
                    f"{name}: content item {str(item)[:80]} has the type {kind!r}; expected one of "
                    f"{('image', 'text', *SIGNALS, 'region')}"
                )
        flat_messages.append({**message, "content": "".join(pieces)})
    return flat_messages, images, slots


__all__ = [
    "CHAT_TEMPLATE",
    "ChatForm",
    "answer_spans",
    "chat_form",
    "end_answers",
    "flatten_messages",
    "shape_contents",
]
