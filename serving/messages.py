"""Requests and responses of the chat endpoint, in the form of OpenAI's `POST /v1/chat/completions`, without Ray.

A request is JSON:

    {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}},
        {"type": "text", "text": "What is in "}, {"type": "box", "box": [x0, y0, x1, y1]}]}],
     "max_tokens": 64, "stream": false}

A content is a string or a list of items: `text`; `image_url` as OpenAI has it, or `{"type": "image", "image": URL}`;
`box`, `mask` (COCO RLE or polygons), `point` and `region` as `apply_chat_template` takes them, in pixels of the image.
Beside these keys a request may have `temperature` (0, the default, is greedy), `top_p`, `ground`, `threshold` and
`masks`; `model`, `user` and `n` = 1 are accepted. Anything else is refused, and an error names what it is about.
"""

import base64
import binascii
import io
import json
import re
import time
import uuid
from dataclasses import dataclass, field
from urllib.error import URLError
from urllib.request import urlopen

from PIL import Image

from perceptiongpt.images_perceptiongpt import read_image
from perceptiongpt.signals_perceptiongpt import SIGNALS


ROLES = ("system", "user", "assistant")
REQUEST_KEYS = (
    "messages", "model", "max_tokens", "max_completion_tokens", "stream", "temperature", "top_p", "n", "user", "ground",
    "threshold", "masks",
)  # fmt: skip
URL_TIMEOUT = 10  # seconds
IMAGE_NAME = "image_url"  # OpenAI's name of an image item


class RequestError(ValueError):
    """A request that is refused.

    Args:
        message: what to tell the client.
        status: of HTTP.
        param: the part of the request that it is about, such as `messages[0].content[2]`.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None):
        super().__init__(message, status, param)
        self.message, self.status, self.param = message, status, param


@dataclass(frozen=True)
class Limits:
    """What a request may hold at most.

    Attributes:
        body_bytes: of the JSON, data URLs included.
        images: in all messages.
        image_pixels: of one image.
        new_tokens: of an answer; also what a request gets that asks for no number.
        urls: whether images may be given as http(s) URLs, which the server then fetches.
    """

    body_bytes: int = 20 * 2**20
    images: int = 8
    image_pixels: int = 40_000_000
    new_tokens: int = 512
    urls: bool = False


@dataclass(frozen=True)
class ChatRequest:
    """A request as the model takes it.

    Attributes:
        messages: for `apply_chat_template`, images as PIL images.
        sizes: (height, width) of each image.
        options: keywords of `inference.answer`; requests with equal ones may share a batch.
        stream: whether the answer is sent while it is generated.
    """

    messages: list[dict]
    sizes: list[tuple[int, int]]
    options: dict = field(default_factory=dict)
    stream: bool = False


# ---- in --------------------------------------------------------------------------------------------------------------


def read_request(body: bytes, limits: Limits) -> ChatRequest:
    """The request in a body of HTTP.

    Raises:
        RequestError: 413 for what is larger than the limits, 400 for anything else that is wrong.
    """
    if len(body) > limits.body_bytes:
        raise RequestError(f"the request has {len(body):,} bytes; at most {limits.body_bytes:,} are taken", 413)
    try:
        given = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise RequestError("the request is not a JSON object")
    for key in given:
        if key not in REQUEST_KEYS:
            raise RequestError(f"unknown key {key!r}; known are {', '.join(REQUEST_KEYS)}", param=key)
    if given.get("n") not in (None, 1):
        raise RequestError(f"n is {given['n']!r}; only one answer is given", param="n")
    messages, sizes = read_messages(given.get("messages"), limits)
    return ChatRequest(messages, sizes, read_options(given, limits), _flag(given, "stream", False))


def read_options(given: dict, limits: Limits) -> dict:
    """Keywords of `inference.answer` from the keys of a request."""
    asked = given.get("max_completion_tokens", given.get("max_tokens"))
    tokens = limits.new_tokens if asked is None else asked
    if not _is_number(tokens) or not 1 <= tokens <= limits.new_tokens or int(tokens) != tokens:
        raise RequestError(f"max_tokens is {asked!r}; expected 1 to {limits.new_tokens}", param="max_tokens")
    options = {"max_new_tokens": int(tokens), "mask_format": "rle" if _flag(given, "masks", True) else None}
    options["threshold"] = _number(given, "threshold", 0.0, 0.0, 1.0)
    if _flag(given, "ground", False):
        options["ground"] = True
    temperature, top_p = _number(given, "temperature", 0.0, 0.0, 2.0), _number(given, "top_p", 1.0, 0.0, 1.0)
    if temperature:
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        if options.get("ground"):
            raise RequestError("ground decides as temperature 0 does; leave one of them out", param="ground")
    if options.get("ground") and _flag(given, "stream", False):
        raise RequestError("ground answers at once; leave stream out", param="stream")
    return options


def read_messages(messages, limits: Limits) -> tuple[list[dict], list[tuple[int, int]]]:
    """Messages for `apply_chat_template`, and (height, width) of their images."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is no list with at least one message", param="messages")
    found, sizes = [], []
    for turn, message in enumerate(messages):
        where = f"messages[{turn}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestError(f"{where}: expected a message whose role is one of {', '.join(ROLES)}", param=where)
        content = message.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, list):
            raise RequestError(f"{where}: content is neither a string nor a list of items", param=where)
        items = []
        for number, item in enumerate(content):
            place = f"{where}.content[{number}]"
            items.append(read_item(item, place, limits))
            if items[-1]["type"] == "image":
                if len(sizes) == limits.images:
                    raise RequestError(f"{place}: more than {limits.images} images", 413, place)
                image = items[-1]["image"]
                sizes.append((image.height, image.width))
        found.append({"role": message["role"], "content": items})
    if found[-1]["role"] != "user":
        raise RequestError("the last message is not the user's: there is nothing to answer", param="messages")
    return found, sizes


def read_item(item, place: str, limits: Limits) -> dict:
    """A content item for `apply_chat_template`, of what is known of it alone: no path of the server gets through."""
    kind = item.get("type") if isinstance(item, dict) else None
    try:
        if kind == "text":
            if not isinstance(item.get("text"), str):
                raise ValueError('there is no string under "text"')
            return {"type": "text", "text": item["text"]}
        if kind in ("image", IMAGE_NAME):
            source = item.get(kind)
            source = source.get("url") if isinstance(source, dict) else source
            return {"type": "image", "image": read_given_image(source, limits)}
        if kind in SIGNALS or kind == "region":
            values = {name: item[name] for name in SIGNALS if item.get(name) is not None}
            if not values or (kind in SIGNALS and list(values) != [kind]):
                raise ValueError(
                    f"expected its value under {kind!r}" if kind in SIGNALS else "expected box, mask or point"
                )
            for name, value in values.items():
                check_value(name, value)
            if item.get("image") is not None:
                if isinstance(item["image"], bool) or not isinstance(item["image"], int):
                    raise ValueError(f"image is {item['image']!r}; expected the number of an image")
                values["image"] = item["image"]
            return {"type": kind, **values}
    except RequestError as error:
        raise RequestError(f"{place}: {error.message}", error.status, place) from error
    except ValueError as error:
        raise RequestError(f"{place}: {error}", param=place) from error
    known = ("text", IMAGE_NAME, "image", *SIGNALS, "region")
    raise RequestError(f"{place}: the type {kind!r} is none of {', '.join(known)}", param=place)


def check_value(name: str, value) -> None:
    """`ValueError` unless a value of a signal has a form that JSON can hold; what it says, the processor checks."""
    if name == "mask":
        is_rle = (
            isinstance(value, dict) and set(value) == {"size", "counts"} and isinstance(value["counts"], (str, list))
        )
        rings = value if isinstance(value, list) else []
        if not is_rle and not (rings and all(isinstance(ring, list) and all(map(_is_number, ring)) for ring in rings)):
            raise ValueError("mask is neither COCO RLE (size, counts) nor a list of polygons")
    elif not isinstance(value, list) or not all(map(_is_number, value)):
        raise ValueError(f"{name} is {str(value)[:80]}; expected a list of numbers")


def read_given_image(source, limits: Limits) -> Image.Image:
    """The image in a data URL or, where the limits allow it, behind an http(s) URL; its size is checked before it is
    decoded."""
    if not isinstance(source, str):
        raise ValueError("there is no URL of an image")
    if source.startswith("data:"):
        head, _, encoded = source.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("the data URL is not base64")
        try:
            content = base64.b64decode(encoded, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the data URL is not base64: {error}") from error
    elif re.match("https?://", source):
        content = fetch(source, limits)
    else:
        raise ValueError("images are given as data URLs (data:image/png;base64,...)")
    try:
        with Image.open(io.BytesIO(content)) as opened:
            width, height = opened.size
    except Exception as error:  # Pillow has a kind of error for each format
        raise ValueError("the image cannot be read") from error
    if width * height > limits.image_pixels:
        raise RequestError(f"the image has {width} x {height} pixels; at most {limits.image_pixels:,} are taken", 413)
    return read_image(content)


def fetch(url: str, limits: Limits) -> bytes:
    """What is behind an http(s) URL, up to the size of a request."""
    if not limits.urls:
        raise ValueError("this server does not fetch images; send a data URL (data:image/png;base64,...)")
    try:
        with urlopen(url, timeout=URL_TIMEOUT) as response:
            content = response.read(limits.body_bytes + 1)
    except (URLError, OSError, ValueError) as error:
        raise ValueError(f"the image cannot be fetched: {error}") from error
    if len(content) > limits.body_bytes:
        raise RequestError(f"the image has more than {limits.body_bytes:,} bytes", 413)
    return content


def _refuse_constant(name: str):
    raise ValueError(f"{name} is no number of JSON")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(given: dict, key: str, default: float, low: float, high: float) -> float:
    value = default if given.get(key) is None else given[key]
    if not _is_number(value) or not low <= value <= high:
        raise RequestError(f"{key} is {value!r}; expected {low:g} to {high:g}", param=key)
    return float(value)


def _flag(given: dict, key: str, default: bool) -> bool:
    value = default if given.get(key) is None else given[key]
    if not isinstance(value, bool):
        raise RequestError(f"{key} is {value!r}; expected true or false", param=key)
    return value


# ---- out -------------------------------------------------------------------------------------------------------------


def refused(reason: str) -> RequestError:
    """What the processor did not accept, as an error of the request: it counts conversations, a client has one."""
    reason = re.sub(r"^sample \d+, turn (\d+)", r"messages[\1]", reason)
    place = re.match(r"messages\[\d+\]", reason)
    return RequestError(reason, param=place and place[0])


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None) -> dict:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def completion(result: dict, model: str) -> dict:
    """The response to a request: `choices[0].message` is {role, content, objects}.

    Args:
        result: of `inference.answer`.
        model: the name of the model that answered.
    """
    message = {"role": "assistant", "content": result["text"], "objects": result["objects"]}
    choice = {"index": 0, "message": message, "finish_reason": "stop" if result["finished"] else "length"}
    return {**_head("chat.completion", model), "choices": [choice]}


class Chunks:
    """The parts of a streamed answer, as lines of server-sent events.

    Args:
        model: the name of the model that answers.
    """

    def __init__(self, model: str):
        self.head = _head("chat.completion.chunk", model)

    def _line(self, delta: dict, finish_reason: str | None = None) -> str:
        return sse({**self.head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]})

    def start(self) -> str:
        """The first part, which says whose words follow."""
        return self._line({"role": "assistant", "content": ""})

    def event(self, event: dict) -> str:
        """An event of `ObjectIteratorStreamer`: text as `delta.content`, an object, and later its mask, as
        `delta.objects`, told apart by their `index`."""
        if event["type"] == "text":
            return self._line({"content": event["text"]})
        return self._line({"objects": [{key: value for key, value in event.items() if key != "type"}]})

    def end(self, finished: bool) -> str:
        """The last part, and the mark that OpenAI's clients wait for."""
        return self._line({}, "stop" if finished else "length") + "data: [DONE]\n\n"


def sse(content: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


def _head(kind: str, model: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
