"""serving/ and serve.py: requests and refusals, answers and streams of a model, and, with Ray, replicas behind HTTP."""

import base64
import http.client
import importlib.util
import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiongpt import serve
from perceptiongpt.serving.answering import answer_requests, stream_answer
from perceptiongpt.serving.messages import (
    Chunks,
    Limits,
    RequestError,
    completion,
    read_request,
    refused,
)


LIMITS = Limits(body_bytes=200_000, images=2, image_pixels=10_000, new_tokens=20)


def picture(width: int = 60, height: int = 40, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def data_url(image: Image.Image) -> str:
    content = io.BytesIO()
    image.save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


IMAGE = {"type": "image_url", "image_url": {"url": data_url(picture())}}


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def body(*messages: dict, **keys) -> bytes:
    return json.dumps({"messages": list(messages), **keys}).encode()


# ---- requests --------------------------------------------------------------------------------------------------------


def test_a_request_becomes_a_conversation():
    rle = {"size": [40, 60], "counts": "0Z1"}
    items = [
        words("What is in "),
        {"type": "box", "box": [1, 2, 30, 30]},
        {"type": "mask", "mask": rle},
        {"type": "region", "box": [1, 2, 3, 4], "mask": [[1, 1, 9, 1, 9, 9]], "image": 0},
        {"type": "point", "point": [3.5, 4]},
    ]
    history = [user(IMAGE, words("Hello")), {"role": "assistant", "content": "Yes?"}]
    second = {"type": "image", "image": data_url(picture(30, 50, "blue"))}
    chat = read_request(body(*history, user(second, *items), max_tokens=7, masks=False), LIMITS)
    assert chat.sizes == [(40, 60), (50, 30)] and not chat.stream
    assert chat.options == {"max_new_tokens": 7, "mask_format": None, "threshold": 0.0}
    assert chat.messages[1] == {"role": "assistant", "content": [words("Yes?")]}
    image, *others = chat.messages[2]["content"]
    assert image["type"] == "image" and image["image"].getpixel((0, 0)) == (0, 0, 255)
    assert others == items
    more = read_request(body(user(words("Hi")), temperature=0.5, top_p=0.9, stream=True, model="any", n=1), LIMITS)
    assert more.stream and more.options["do_sample"] and more.options["top_p"] == 0.9
    assert more.options["max_new_tokens"] == 20 and more.options["mask_format"] == "rle"
    assert read_request(body(user(IMAGE, words("Find it.")), ground=True), LIMITS).options["ground"] is True


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "not a JSON object"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"messages": [], "threshold": NaN}', 400, "NaN is no number"),
        (b" " * 200_001, 413, "200,001 bytes; at most 200,000"),
        (body(), 400, "at least one message"),
        (body({"role": "robot", "content": "x"}), 400, r"messages\[0\]: expected a message whose role"),
        (body({"role": "user", "content": 3}), 400, r"messages\[0\]: content is neither"),
        (body({"role": "assistant", "content": "x"}), 400, "last message is not the user's"),
        (body(user("text")), 400, r"messages\[0\]\.content\[0\]: the type None"),
        (body(user(words("a"), {"type": "video"})), 400, r"content\[1\]: the type 'video' is none of text, image_url"),
        (body(user({"type": "text", "text": 3})), 400, "no string under"),
        (body(user({"type": "image", "image": "/etc/passwd"})), 400, "given as data URLs"),
        (body(user({"type": "image", "path": "/etc/passwd"})), 400, "no URL of an image"),
        (body(user({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}})), 400, "does not fetch images"),
        (body(user({"type": "image", "image": "data:image/png,abc"})), 400, "not base64"),
        (body(user({"type": "image", "image": "data:image/png;base64,a*"})), 400, "not base64"),
        (body(user({"type": "image", "image": "data:image/png;base64,YWJj"})), 400, "cannot be read"),
        (body(user({"type": "image", "image": data_url(picture(200, 51))})), 413, "200 x 51 pixels; at most 10,000"),
        (body(user(IMAGE, IMAGE, IMAGE)), 413, r"content\[2\]: more than 2 images"),
        (body(user(IMAGE, {"type": "box", "box": "1,2"})), 400, r"content\[1\]: box is 1,2"),
        (body(user(IMAGE, {"type": "box", "mask": [[1, 1]]})), 400, "expected its value under 'box'"),
        (body(user(IMAGE, {"type": "mask", "mask": "mask.png"})), 400, "neither COCO RLE"),
        (body(user(IMAGE, {"type": "region"})), 400, "expected box, mask or point"),
        (body(user(IMAGE, {"type": "box", "box": [1, 2, 3, 4], "image": "x"})), 400, "the number of an image"),
        (body(user(words("x")), max_tokens=21), 400, "max_tokens is 21; expected 1 to 20"),
        (body(user(words("x")), max_tokens=True), 400, "max_tokens is True"),
        (body(user(words("x")), max_tokens="big").replace(b'"big"', b"1e999"), 400, "max_tokens is inf"),
        (body(user(words("x")), temperature=3), 400, "temperature is 3; expected 0 to 2"),
        (body(user(words("x")), threshold="high"), 400, "threshold is 'high'"),
        (body(user(words("x")), stream=1), 400, "stream is 1; expected true or false"),
        (body(user(words("x")), n=2), 400, "only one answer"),
        (body(user(words("x")), tools=[]), 400, "unknown key 'tools'; known are messages"),
        (body(user(words("x")), ground=True, temperature=1), 400, "ground decides as temperature 0"),
        (body(user(words("x")), ground=True, stream=True), 400, "ground answers at once"),
    ],
)
def test_refusals_name_what_is_wrong(given, status, message):
    with pytest.raises(RequestError, match=message) as error:
        read_request(given, LIMITS)
    assert error.value.status == status


def test_images_are_fetched_only_where_the_server_says_so(tmp_path, monkeypatch):
    fetched = []

    def urlopen(url, timeout):
        fetched.append(url)
        return io.BytesIO(base64.b64decode(data_url(picture()).split(",")[1]))

    monkeypatch.setattr("perceptiongpt.serving.messages.urlopen", urlopen)
    given = body(user({"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}))
    assert read_request(given, Limits(urls=True)).sizes == [(40, 60)] and fetched == ["https://example.org/x.png"]
    monkeypatch.setattr("perceptiongpt.serving.messages.urlopen", lambda url, timeout: io.BytesIO(bytes(1000)))
    with pytest.raises(RequestError, match="the image has more than 150 bytes") as error:
        read_request(body(user({"type": "image", "image": "https://x.org/y"})), Limits(body_bytes=150, urls=True))
    assert error.value.status == 413


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def talkative(tiny_model):
    """A tiny model whose answers hold objects: `<vis>` follows wherever the likeliest token has an even number."""
    model, processor = tiny_model
    model.generation_config.eos_token_id = None

    def prefer_vis(module, arguments, logits):
        is_even = logits.argmax(-1) % 2 == 0
        logits[..., processor.vis_token_id] = torch.where(is_even, logits.amax(-1) + 1, logits.amin(-1))

    model.lm_head.register_forward_hook(prefer_vis)
    return model, processor


def test_answers_of_a_batch_are_those_of_the_command(talkative):
    from perceptiongpt.inference import answer

    model, processor = talkative
    questions = ["Find the red cup.", "What is it?"]
    images = [picture(), picture(30, 50, "blue")]
    requests = [
        read_request(body(user({"type": "image", "image": data_url(image)}, words(text)), max_tokens=8), LIMITS)
        for image, text in zip(images, questions, strict=True)
    ]
    broken = read_request(body(user(words("No <vis> here.")), max_tokens=8), LIMITS)
    other = read_request(body(user(IMAGE, words("Hello")), max_tokens=5), LIMITS)
    results = answer_requests(model, processor, [requests[0], broken, other, requests[1]])
    assert "contains <vis>" in results[1]["error"] and len(results) == 4
    for image, text, result in zip(images, questions, (results[0], results[3]), strict=True):
        conversation = [user({"type": "image", "image": image}, words(text))]
        (alone,) = answer(model, processor, [conversation], [(image.height, image.width)], max_new_tokens=8)
        assert (result["text"], result["finished"]) == (alone["text"], alone["finished"])
        assert len(result["objects"]) == len(alone["objects"])
        for found, expected in zip(result["objects"], alone["objects"], strict=True):
            assert found["box"] == pytest.approx(expected["box"], abs=1e-2)
            assert found["mask"]["size"] == [image.height, image.width]
    assert sum(len(result.get("objects", [])) for result in results) > 0
    response = json.loads(json.dumps(completion(results[0], "tiny"), allow_nan=False))
    (choice,) = response["choices"]
    assert set(choice["message"]) == {"role", "content", "objects"} and choice["message"]["role"] == "assistant"
    assert response["object"] == "chat.completion" and choice["finish_reason"] == "length"


def test_a_stream_gives_what_the_answer_holds(talkative):
    model, processor = talkative
    chat = read_request(body(user(IMAGE, words("Find the red cup.")), max_tokens=8), LIMITS)
    (whole,) = answer_requests(model, processor, [chat])
    chunks, lines = Chunks("tiny"), []
    for event in stream_answer(model, processor, chat, threading.Event()):
        lines.append(chunks.end(event["finished"]) if event["type"] == "end" else chunks.event(event))
    *parts, last, done = [line[len("data: ") :] for line in "".join([chunks.start(), *lines]).split("\n\n") if line]
    deltas = [json.loads(part)["choices"][0]["delta"] for part in parts]
    assert done == "[DONE]" and json.loads(last)["choices"][0]["finish_reason"] == "length"
    assert "".join(delta.get("content", "") for delta in deltas) == whole["text"]
    found = {}
    for given in (given for delta in deltas for given in delta.get("objects", [])):
        found.setdefault(given["index"], {}).update(given)
    assert len(found) == len(whole["objects"]) > 0
    for index, expected in enumerate(whole["objects"]):
        assert found[index]["box"] == pytest.approx(expected["box"], abs=1e-2)
        assert found[index]["mask"] == expected["mask"]


def test_a_stream_ends_when_it_is_closed_and_tells_refusals(talkative):
    model, processor = talkative
    closed = threading.Event()
    chat = read_request(body(user(IMAGE, words("Find the red cup.")), max_tokens=400), Limits())
    events = stream_answer(model, processor, chat, closed)
    next(events)
    closed.set()
    rest = list(events)
    assert rest[-1] == {"type": "end", "finished": False} and len(rest) < 400
    broken = read_request(body(user(words("No <vis> here."))), LIMITS)
    (event,) = stream_answer(model, processor, broken, closed)
    assert event["type"] == "error"
    error = refused(event["error"])
    assert error.param == "messages[0]" and "sample" not in error.message


def test_command_line_without_ray(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r'pip install "perceptiongpt\[serve\]"'):
        serve.main(["--model", str(tmp_path)])


# ---- Ray Serve -------------------------------------------------------------------------------------------------------


needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (extra `serve`)")
QUESTION = "Find the red circle."


class Server:
    """`serve.py` in a process of its own."""

    def __init__(self, log: Path, *arguments: str):
        from processes import free_port

        self.port = int(free_port())
        command = [sys.executable, serve.__file__, "--port", str(self.port), *arguments]
        self.log = log.open("w+")
        self.process = subprocess.Popen(
            command, stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        )
        end = time.monotonic() + 240
        while "/v1/chat/completions" not in self.printed():
            assert self.process.poll() is None and time.monotonic() < end, self.printed()[-4000:]
            time.sleep(0.5)

    def printed(self) -> str:
        return Path(self.log.name).read_text()

    def connection(self, given: bytes) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", "/v1/chat/completions", given, {"Content-Type": "application/json"})
        return connection

    def ask(self, given: bytes) -> tuple[int, dict, dict]:
        """(status, content, headers)"""
        response = self.connection(given).getresponse()
        return response.status, json.loads(response.read()), dict(response.headers)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    arguments = [
        "--model",
        str(serve.Path(serve.__file__).parent),
        "--name",
        "root",
        "--replicas",
        "2",
        "--cpus",
        "0.5",
    ]
    arguments += ["--max_batch_size", "2", "--max_queue", "2", "--max_body_mb", "0.5", "--max_image_pixels", "150000"]
    server = Server(folder / "log.txt", *arguments)
    yield server
    server.stop()


def photo() -> Image.Image:
    return Image.open(Path(serve.__file__).parent / "examples/shapes.jpg").convert("RGB")


def question(**keys) -> bytes:
    return body(user({"type": "image", "image": data_url(photo())}, words(QUESTION)), **keys)


def assert_same_objects(found: list[dict], expected: list[dict]) -> None:
    """Equal but for what the last bits of float32 change where rows share a batch."""
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one["box"] == pytest.approx(other["box"], abs=0.01)
        assert one["score"] == pytest.approx(other["score"], abs=1e-4) and one["phrase"] == other["phrase"]
        assert coco_mask.iou([one["mask"]], [other["mask"]], [0])[0, 0] > 0.999


@needs_ray
@pytest.mark.slow
def test_answers_over_http_are_those_of_predict(server, tmp_path):
    from perceptiongpt import predict

    photo().save(tmp_path / "photo.png")
    root = str(Path(serve.__file__).parent)
    arguments = ["--model", root, "--image", str(tmp_path / "photo.png"), "--text", QUESTION, "--max_new_tokens", "32"]
    assert predict.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    (expected,) = json.loads((tmp_path / "out/predictions.json").read_text())
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(server.ask, [question(max_tokens=32)] * 4))
    for status, content, _ in answers:
        message = content["choices"][0]["message"]
        assert status == 200 and content["model"] == "root" and message["content"] == expected["text"]
        assert_same_objects(message["objects"], expected["objects"])
    lines = server.connection(question(max_tokens=32, stream=True)).getresponse().read().decode().split("\n\n")
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line and not line.endswith("[DONE]")]
    assert "".join(delta.get("content", "") for delta in deltas) == expected["text"]
    streamed = {}
    for one in (one for delta in deltas for one in delta.get("objects", [])):
        streamed.setdefault(one["index"], {}).update(one)
    assert_same_objects(list(streamed.values()), expected["objects"])
    status, grounded, _ = server.ask(question(max_tokens=32, ground=True))
    assert status == 200 and grounded["choices"][0]["message"]["objects"][0]["box"] == pytest.approx(
        expected["objects"][0]["box"], abs=0.01
    )
