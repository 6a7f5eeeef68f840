"""The app: what stands behind its buttons, and the page itself in a real browser."""

import ast
import json
import re
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import browser as browsers
from perceptiongpt.webapp import start
from perceptiongpt.webapp.assistant import MOST_NEW_TOKENS, Assistant
from perceptiongpt.webapp.downloads import export
from perceptiongpt.webapp.drawing import COLORS, draw, object_colors, view
from perceptiongpt.webapp.markup import answer_markup, chat_messages
from perceptiongpt.webapp.page import EXAMPLES, LARGEST_FILE, SECONDS_KEPT, build, launch, plain_editor, region_text
from perceptiongpt.webapp.session import (
    MOST_LETTERS,
    MOST_MEGAPIXELS,
    Session,
    Turn,
    ask,
    click,
    conversation,
    given_region,
    open_image,
    question_content,
    stroke_mask,
    view_scale,
)
from perceptiongpt.webapp.start import find_model, main
from processes import free_port


ROOT = Path(__file__).parents[1]
ANSWER = "<p>the red cup</p><vis> and <p>two dogs</p><vis><vis>"


@pytest.fixture(scope="module")
def assistant(tiny_model_dir) -> Assistant:
    torch.manual_seed(0)
    return Assistant(tiny_model_dir)


@pytest.fixture
def photo(tmp_path) -> str:
    image = Image.new("RGB", (60, 40), "gray")
    ImageDraw.Draw(image).rectangle([10, 10, 30, 30], fill="red")
    image.save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def session(assistant, photo) -> Session:
    return open_image(assistant, photo)


def written(assistant: Assistant, answer: str) -> dict:
    """Arguments of `generate` with which any model writes an answer."""
    tokenizer = assistant.processor.tokenizer
    ids, start = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id], []

    def allowed(_, so_far: torch.Tensor) -> list[int]:
        start[:] = start or [len(so_far)]
        return [ids[len(so_far) - start[0]]]

    return {"prefix_allowed_tokens_fn": allowed}


def asked(assistant, session, question="What is here?", answer=ANSWER, drawn=None) -> list:
    return list(ask(assistant, session, question, drawn, **written(assistant, answer)))


def refused(message: str):
    return pytest.raises(gr.Error, match=message)


# ---- images ----------------------------------------------------------------------------------------------------------


def test_an_image_opens(session):
    assert session.size == (40, 60) and session.image.mode == "RGB" and session.name == "photo.png"
    assert view(session).size == (640, 427)


def test_files_that_are_not_images(assistant, photo, tmp_path):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not an image")
    cut.write_bytes(Path(photo).read_bytes()[:80])
    with refused("not an image that can be read"):
        open_image(assistant, str(text))
    with refused("The image cannot be used: .*cut.png") as raised:
        open_image(assistant, str(cut))
    assert str(tmp_path) not in str(raised.value)
    with refused("Upload an image first"):
        open_image(assistant, None)


def claim_size(path: str, width: int, height: int, target: Path) -> None:
    """A copy of a PNG whose header claims another size."""
    content = Path(path).read_bytes()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    target.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


def test_images_that_are_too_large_are_not_decoded(assistant, photo, tmp_path, monkeypatch):
    claim_size(photo, 10_000, 5_000, tmp_path / "large.png")
    claim_size(photo, 20_000, 10_000, tmp_path / "bomb.png")
    Image.new("L", (3_000, 1)).save(tmp_path / "thin.png")
    with refused("below one pixel"):
        open_image(assistant, str(tmp_path / "thin.png"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with refused("has 50 megapixels; at most 40 are allowed"):
        open_image(assistant, str(tmp_path / "large.png"))
    with refused("far more than 40 megapixels"):
        open_image(assistant, str(tmp_path / "bomb.png"))


# ---- regions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corners", [[(10, 20), (30, 35)], [(30, 20), (10, 35)], [(30, 35), (10, 20)]])
def test_two_clicks_are_a_box(session, corners):
    scale = view_scale(session.image)
    for x, y in corners:
        click(session, x * scale, y * scale)
    assert session.box == pytest.approx([10, 20, 30, 35]) and region_text(session) == "Box 10, 20, 30, 35"
    edge = np.asarray(view(session))[round(20 * scale) + 2, round(20 * scale)]
    assert edge.min() > 200  # the box is drawn in white
    click(session, 0, 0)
    assert session.box is None and session.clicks == [(0, 0)]


def test_clicks_that_make_no_box(session):
    with refused("Upload an image first"):
        click(None, 1, 1)
    click(session, 100, 100)
    with refused("make no box"):
        click(session, 103, 300)
    assert len(session.clicks) == 1
    with refused("one corner only"):
        given_region(session, None, ["box", "mask"])


def test_a_stroke_is_a_mask(session):
    layer = Image.new("RGBA", plain_editor(session)["background"].size)
    ImageDraw.Draw(layer).rectangle([320, 0, 639, 426], fill="white")
    drawn = {"background": None, "layers": [layer], "composite": None}
    mask = stroke_mask(drawn, session.size)
    assert mask.shape == (40, 60) and mask[:, 31:].all() and not mask[:, :29].any()
    assert given_region(session, drawn, ["box", "mask"]).keys() == {"mask"}
    with refused("does not know a mask"):
        given_region(session, drawn, ["box"])
    for empty in (None, plain_editor(session), {"layers": [Image.new("RGBA", (640, 427))]}):
        assert stroke_mask(empty, session.size) is None


def test_one_click_is_a_point_where_the_checkpoint_knows_points(session):
    click(session, 320, 0)
    assert given_region(session, None, ["box", "point"]) == {"point": [pytest.approx(30), 0]}


def test_the_region_stands_where_the_question_says(session):
    box, mask = [1, 2, 3, 4], np.ones((40, 60), dtype=bool)
    item = {"type": "box", "box": box}
    assert question_content(" What is <region>? ", {"box": box}, []) == [
        {"type": "text", "text": "What is "},
        item,
        {"type": "text", "text": "?"},
    ]
    assert question_content("What?", {"box": box}, []) == [{"type": "text", "text": "What? "}, item]
    both = question_content("<region>", {"box": box, "mask": mask}, [])
    assert [one["type"] for one in both] == ["region"] and both[0]["mask"] is mask


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "Write a question"),
        (" \n ", "Write a question"),
        ("a" * 501, "has 501 letters; at most 500"),
        ("Find <vis>.", "&lt;vis&gt; has a meaning of its own"),
        ("Find <image>.", "&lt;image&gt; has a meaning of its own"),
        ("What is <region>?", "click a box or paint a mask"),
    ],
)
def test_questions_that_are_refused_leave_the_session_as_it_was(assistant, session, question, message):
    with refused(message):
        asked(assistant, session, question)
    assert session.turns == []
    with refused("Upload an image first"):
        asked(assistant, None, "Find it.")


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_words_and_objects_stream_as_they_are_completed(assistant, session):
    seen = []
    for event in ask(assistant, session, "What is here?", None, **written(assistant, ANSWER)):
        (turn,) = session.turns
        boxes = [found["box"] for found in turn.objects]
        seen.append((event, turn.text, boxes, chat_messages(session, event != "answer")[-1]["content"], view(session)))
    events = [event for event, *_ in seen]
    assert events.count("object") == 3 and events.count("answer") == 1 and events[-1] == "answer"
    first = events.index("object")
    assert set(events[:first]) == {"text"} and "text" in events[first:]  # the first object does not wait for the end
    _, text, (box,), markup, picture = seen[first]
    assert text == "the red cup" and markup.endswith("&#8230;") and f">{text} 1</span>" in markup
    x0, y0, x1, y1 = (value * view_scale(session.image) for value in box)
    assert picture.getpixel((round((x0 + x1) / 2), round(y1) - 1)) == ImageColor.getrgb(COLORS[0])
    texts = [text for _, text, *_ in seen]
    assert all(longer.startswith(shorter) for shorter, longer in zip(texts, texts[1:], strict=False))
    assert turn.text == texts[-1] == "the red cup and two dogs" and turn.finished
    assert [found["phrase"] for found in turn.objects] == ["the red cup", "two dogs", "two dogs"]
    assert all(found["mask"].shape == (40, 60) for found in turn.objects)
    torch.testing.assert_close(torch.tensor(seen[-2][2]), torch.tensor(boxes), atol=1e-3, rtol=0)


def test_the_masks_of_an_answer_are_decoded_once(assistant, session, monkeypatch):
    decoded, decode = [], assistant.model.model.decode_signals

    def counted(hidden_states, *args, **kwargs):
        found = decode(hidden_states, *args, **kwargs)
        decoded.extend(len(hidden_states) for _ in range("mask" in found))
        return found

    monkeypatch.setattr(assistant.model.model, "decode_signals", counted)
    asked(assistant, session)
    assert decoded == [3]


def test_a_second_turn_reads_the_first_as_it_was_written(assistant, session):
    for x, y in ((100, 100), (300, 300)):
        click(session, x, y)
    box = session.box
    asked(assistant, session, "What is <region>?")
    assert session.clicks == [] and session.turns[0].region == {"box": box}
    prompt, _ = assistant.prepare(conversation(session)[:1])
    asked(assistant, session, "And now?", "it is")
    assert [turn.text for turn in session.turns] == ["the red cup and two dogs", "it is"]
    inputs, _ = assistant.prepare(conversation(session)[:3])
    ids, start = inputs["input_ids"][0].tolist(), prompt["input_ids"].shape[1]
    answer = assistant.processor.tokenizer(ANSWER, add_special_tokens=False).input_ids
    assert ids[:start] == prompt["input_ids"][0].tolist() and ids[start : start + len(answer)] == answer
    # In pixels of the padded square of side 60: 10 rows above the image.
    expected = torch.tensor([box, *(found["box"] for found in session.turns[0].objects)]) + torch.tensor([0, 10, 0, 10])
    torch.testing.assert_close(inputs["boxes"][0] * 60, expected, atol=1e-3, rtol=0)
    assert inputs["masks_valid"].sum() == 0  # a box alone is fed back


def test_a_stroke_reaches_the_model(assistant, session, monkeypatch):
    layer = Image.new("RGBA", (60, 40))
    layer.paste("white", (30, 0, 60, 40))
    given, prepare = [], assistant.prepare
    monkeypatch.setattr(assistant, "prepare", lambda messages: given.append(prepare(messages)) or given[-1])
    asked(assistant, session, "Segment it.", "<vis>", {"layers": [layer]})
    ((inputs, _),) = given
    mask = inputs["masks"][0, 0].bool()
    middle = mask.shape[0] // 2
    assert inputs["masks_valid"].tolist() == [[True]] and mask[middle, -2] and not mask[middle, 1]
    assert session.turns[0].region["mask"][:, 30:].all()
    assert asked(assistant, session, "And?", "<vis>") == ["object", "answer"]  # nothing is said


def test_an_answer_that_has_no_end_or_no_room(assistant, session, monkeypatch):
    list(ask(assistant, session, "Go on.", None, max_new_tokens=3, min_new_tokens=3))
    assert not session.turns[0].finished and "cut off" in answer_markup(session.turns[0]).replace("&#40;", "(")
    used = assistant.prepare(conversation(session))[0]["input_ids"].shape[1]
    config = assistant.model.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", used + 20)
    with refused("too long for this model: start a new one"):
        asked(assistant, session)
    assert len(session.turns) == 1


def test_an_error_of_the_model_is_raised_and_leaves_no_turn(assistant, session):
    def fail(*_):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        list(ask(assistant, session, "Find it.", None, prefix_allowed_tokens_fn=fail))
    assert session.turns == []
    assert asked(assistant, session)[-1] == "answer"  # the next question is answered


def test_a_user_who_goes_ends_the_generation(assistant, session):
    steps = []
    arguments = written(assistant, "one two three " * 60)
    allowed = arguments["prefix_allowed_tokens_fn"]
    arguments["prefix_allowed_tokens_fn"] = lambda *args: steps.append(time.sleep(0.005)) or allowed(*args)
    answer = ask(assistant, session, "Count.", None, **arguments)
    next(answer)
    answer.close()
    assistant.worker.submit(int).result(timeout=60)
    assert len(steps) < 100 and session.turns == []


def test_two_users_at_once_wait_for_each_other(assistant, photo, monkeypatch):
    inside, generate = [0, 0], assistant.model.generate

    def counted(*args, **kwargs):
        inside[0] += 1
        inside[1] = max(inside)
        try:
            return generate(*args, **kwargs)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(assistant.model, "generate", counted)
    answers = ["the cup<vis>", "<vis> two red dogs", "no cat"]
    sessions = [open_image(assistant, photo) for _ in answers]
    users = [
        threading.Thread(target=asked, args=(assistant, session, "What?", answer))
        for session, answer in zip(sessions, answers, strict=True)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join(60)
    assert inside == [0, 1]
    assert [session.turns[0].text for session in sessions] == ["the cup", "two red dogs", "no cat"]
    assert [len(session.turns[0].objects) for session in sessions] == [1, 1, 0]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def found(phrase=None, span=None, box=(10.0, 10.0, 30.0, 30.0), **others) -> dict:
    mask = np.zeros((40, 60), dtype=bool)
    mask[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
    return {"phrase": phrase, "span": span, "box": list(box), "score": 0.5, "mask": mask, "image": 0, **others}


@pytest.fixture
def answered(session) -> Session:
    """A session whose answer has two objects of one phrase, one of another, and one without."""
    text = "two <dogs> and *a cup*"
    objects = [
        found("two <dogs>", (0, 10), (2.0, 2.0, 12.0, 12.0)),
        found("two <dogs>", (0, 10), (20.0, 2.0, 30.0, 12.0)),
        found("*a cup*", (15, 22), (40.0, 20.0, 55.0, 35.0)),
        found(None, None, (2.0, 25.0, 20.0, 38.0), point=[10.0, 30.0]),
    ]
    session.turns = [Turn("What is <region>?", {"box": [1.0, 2.0, 3.0, 4.0]}, [], [], text, objects)]
    return session


def test_phrases_have_the_colours_of_their_objects(answered):
    turn = answered.turns[0]
    first, second, third = COLORS[:3]
    assert object_colors(turn.objects) == [first, first, second, third]
    markup = chat_messages(answered)[1]["content"]
    spans = re.findall(r'<span style="background-color: (#\w+);[^>]*>(.*?)</span>', markup)
    plain = [(color, re.sub(r"&#(\d+);", lambda code: chr(int(code[1])), words)) for color, words in spans]
    assert plain == [(first, "two <dogs> 1,2"), (second, "*a cup* 3"), (third, "object 4")]
    assert re.sub(r"&#(\d+);", lambda code: chr(int(code[1])), markup).endswith(" score 0.50")
    picture = draw(answered.image, turn.objects, {}, [], 10)
    for one, color in zip(turn.objects, (first, first, second, third), strict=True):
        x0, y0, x1, y1 = (round(value * 10) for value in one["box"])
        assert picture.getpixel(((x0 + x1) // 2, y1 - 1)) == ImageColor.getrgb(color)
        inside, outside = picture.getpixel(((x0 + x1) // 2, y1 - 30)), picture.getpixel((350, 350))
        assert inside != outside == (128, 128, 128)


def test_nothing_that_is_written_becomes_markup(session):
    evil = "<img src=x onerror=alert(1)> **bold** $$x$$ [a](http://b) `c`\n# head"
    session.turns = [Turn(evil, {}, [], [], evil, [])]
    question, answer = (message["content"] for message in chat_messages(session))
    assert question == answer and question.count("<") == 1 and "<br>" in question
    assert not re.search(r"[*$\[`>:/]", question.replace("<br>", "")) and "# " not in question


def test_the_answer_so_far_and_none_at_all(answered):
    answered.turns.append(Turn("And?", {}, [], text="so far"))
    assert chat_messages(answered, True)[-1]["content"] == "so far &#8230;"
    assert not any("&#8230;" in message["content"] for message in chat_messages(answered, True)[:-1])
    answered.turns[-1].text = ""
    assert chat_messages(answered, True)[-1]["content"] == "&#8230;"
    assert "no words and no object" in chat_messages(answered)[-1]["content"]
    assert len(chat_messages(answered)) == 4 and chat_messages(None) == []


def test_downloads_are_read_back(answered):
    answered.turns.append(Turn("And?", {"mask": answered.turns[0].objects[0]["mask"]}, [], [], "cup", [found()]))
    paths = export(answered)
    assert [Path(path).name for path in paths] == ["photo_answers.json", "photo_coco.json", "photo_drawn.png"]
    content = json.loads(Path(paths[0]).read_text())
    assert content["image"] == {"file_name": "photo.png", "width": 60, "height": 40}
    assert [len(turn["objects"]) for turn in content["turns"]] == [4, 1] and content["turns"][1]["question"] == "And?"
    assert coco_mask.decode(content["turns"][1]["region"]["mask"]).sum() == 100
    coco = COCO(paths[1])
    assert [one["name"] for one in coco.loadCats(coco.getCatIds())] == ["two <dogs>", "*a cup*", "object"]
    objects = [one for turn in answered.turns for one in turn.objects]
    for annotation, one in zip(coco.loadAnns(coco.getAnnIds()), objects, strict=True):
        assert np.array_equal(coco.annToMask(annotation), one["mask"]) and annotation["area"] == one["mask"].sum()
        x, y, width, height = annotation["bbox"]
        assert [x, y, x + width, y + height] == one["box"]
    assert Image.open(paths[2]).size == (640, 427)


# ---- starting --------------------------------------------------------------------------------------------------------


def test_it_needs_nothing_of_this_package():
    """A Space has these files alone."""
    names = set()
    for path in (ROOT / "app.py", *(ROOT / "webapp").glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    names = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert names == {"webapp", "gradio", "numpy", "torch", "PIL", "pycocotools", "transformers"}


def test_which_checkpoint_is_opened(tmp_path, monkeypatch):
    monkeypatch.delenv("PERCEPTIONGPT_MODEL", raising=False)
    assert find_model() == (str(ROOT), None)
    monkeypatch.setattr(start, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="no checkpoint here: give --model"):
        find_model()
    (tmp_path / "space.json").write_text('{"model": "ann/tiny", "revision": "abc"}')
    assert find_model() == ("ann/tiny", "abc")
    monkeypatch.setenv("PERCEPTIONGPT_MODEL", "bob/other")
    assert find_model() == ("bob/other", None)
    with pytest.raises(SystemExit, match="there is no such folder"):
        main(["--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="not a checkpoint that can be loaded"):
        main(["--model", str(tmp_path)])


def test_the_page_of_docs_names_these_limits():
    page = (ROOT / "docs/app.md").read_text(encoding="utf-8")
    size, letters, tokens = f"{MOST_MEGAPIXELS} megapixels (50 MB)", MOST_LETTERS, MOST_NEW_TOKENS
    assert f"Images have at most {size}, questions {letters} letters, answers {tokens} tokens" in page
    assert LARGEST_FILE == "50mb" and SECONDS_KEPT == 3600


# ---- in a browser ----------------------------------------------------------------------------------------------------


class Scripted(Assistant):
    """An assistant whose answers are given; their objects are the model's own."""

    def answer(self, messages, size):
        yield from super().answer(messages, size, **written(self, ANSWER))


@pytest.mark.slow
@pytest.mark.skipif(bool(browsers.missing_programs()), reason=f"not installed: {browsers.missing_programs()}")
def test_in_a_browser(tiny_model_dir, photo, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    page = build(Scripted(tiny_model_dir))
    _, url, _ = launch(
        page, server_name="127.0.0.1", server_port=int(free_port()), prevent_thread_lock=True, quiet=True
    )
    try:
        with browsers.browser(tmp_path) as browser:
            try:
                use_the_page(browser, url, photo, tmp_path)
            finally:
                browser.screenshot(tmp_path / "last.png")
            asked_for = [address for address in browser.requested() if not address.startswith((url, "ws://127.0.0.1"))]
            assert asked_for == []  # nothing comes from another server
    finally:
        page.close()


def use_the_page(browser: browsers.Browser, url: str, photo: str, tmp_path: Path) -> None:
    browser.open(url)
    question = browser.one("#question textarea")
    enter = "\ue007"

    def chat() -> str:
        return browser.one("#chat").text

    def toast(words: str) -> None:
        browser.wait(lambda: words in browser.one("body").text, words)

    def upload(path: str | Path) -> None:
        for button in browser.find("#file button[aria-label='Clear']"):
            button.click()
        browser.one("#file input[type=file]").type(str(path))

    def answers(count: int) -> None:
        """Wait until so many answers are complete, and a little, until the page takes the next question."""
        browser.wait(lambda: chat().count("two dogs 2,3") == count and "\u2026" not in chat(), f"answer {count}")
        time.sleep(1)

    def is_clean() -> bool:
        """Whether nothing is covered by the word that Gradio lays over what an error might have changed."""
        return not browser.run("return [...document.querySelectorAll('.error')].some(one => one.offsetParent)")

    question.type("Find the cup." + enter)
    toast("Upload an image first")
    browser.wait(lambda: browser.find("#examples tbody tr"), "examples")[1].click()
    browser.wait(lambda: "cat" in browser.one("#file").text and browser.find("#shown img"), "an example")
    browser.wait(lambda: browser.run("return arguments[0].value", question) == EXAMPLES[1][1], "its question")
    (tmp_path / "text.png").write_text("not an image")
    upload(tmp_path / "text.png")
    toast("not an image that can be read")
    browser.wait(lambda: "text.png" not in browser.one("#file").text, "a refused file to go")
    assert is_clean()
    upload(photo)
    browser.one("#shown img")
    browser.run("arguments[0].value = ''", question)
    question.type("What is here?" + enter)
    answers(1)
    colors = "return [...document.querySelectorAll('#chat span[style]')].map(s => getComputedStyle(s).backgroundColor)"
    expected = ["rgb({}, {}, {})".format(*ImageColor.getrgb(color)) for color in COLORS[:2]]
    assert browser.run(colors) == expected
    browser.screenshot(tmp_path / "answer.png")
    question.type(" " + enter)
    toast("Write a question")
    assert is_clean() and "two dogs 2,3" in chat()

    shown = browser.one("#shown img")
    browser.drag(shown, (0.25, 0.5))
    browser.wait(lambda: "Point 15, 20" in browser.one("#box_text").text, "a corner")
    browser.drag(browser.one("#shown img"), (0.75, 0.25))
    browser.wait(lambda: "Box 15, 10, 45, 20" in browser.one("#box_text").text, "a box")
    question.type("What is <region>?" + enter)
    browser.wait(lambda: "What is box 15, 10, 45, 20?" in chat(), "a question about a box")
    answers(2)
    browser.screenshot(tmp_path / "box.png")

    _, masks = browser.find("button[role=tab]")
    masks.click()
    canvas = browser.wait(lambda: browser.find("#editor canvas"), "the editor")[0]

    def red_pixels() -> bool:
        red, green, _ = np.moveaxis(browser.one("#editor").picture(), -1, 0)
        return (red - green > 200).sum() > 1000

    browser.wait(red_pixels, "the image in the editor")
    browser.drag(canvas, (0.45, 0.5), (0.5, 0.5), (0.55, 0.55))
    time.sleep(1)
    question.type("And <region>?" + enter)
    browser.wait(lambda: "And painted mask" in chat(), "a question about a mask")
    answers(3)
    browser.screenshot(tmp_path / "mask.png")

    browser.download_into(tmp_path / "downloads")
    browser.one("#json").click()
    (path,) = browser.wait(lambda: list((tmp_path / "downloads").glob("*.json")), "a download")
    content = json.loads(path.read_text())
    assert [list(turn["region"]) for turn in content["turns"]] == [[], ["box"], ["mask"]]
    mask = coco_mask.decode(content["turns"][2]["region"]["mask"])
    assert mask.shape == (40, 60) and 0 < mask.mean() < 0.5
    browser.one("#new").click()
    browser.wait(lambda: "dogs" not in chat(), "an empty conversation")
