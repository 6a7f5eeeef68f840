"""The page: components of Gradio, and which function stands behind which of them."""

import gradio as gr
from PIL import Image

from . import FOLDER
from .assistant import Assistant
from .downloads import export
from .drawing import GIVEN_COLOR, view
from .markup import chat_messages, rounded
from .session import MOST_LETTERS, REGION_PLACEHOLDER, SHORTEST_LONGER_SIDE, Session, ask, click, open_image, view_scale


EXAMPLES = (
    ("examples/shapes.jpg", "Find every square."),
    ("examples/cat.jpg", "Find the red circle."),
    ("examples/coffee.jpg", "Find the blue star."),
)
MOST_WAITING = 32  # questions, of all users
LARGEST_FILE = "50mb"
SECONDS_KEPT = 3600  # an image and its conversation after their last use
ANSWER_TAB = "answer"
INTRODUCTION = f"""# PerceptionGPT
Ask about an image. What the model finds is drawn in the colour of its words. To ask about a region, click two corners
of a box, or paint a mask; `{REGION_PLACEHOLDER}` in a question stands for it, else it follows the question."""


def region_text(session: Session | None) -> str:
    """What the clicks say, in words."""
    if session is None or not session.clicks:
        return "To ask about a part of the image, click two corners of a box."
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


def warn(refused: gr.Error) -> None:
    """Tell a user what cannot be done. Gradio would lay the word "Error" over all that an event may change."""
    gr.Warning(refused.message, title=refused.title)


def build(assistant: Assistant) -> gr.Blocks:
    """The page. Its functions do nothing but put the results of those above into its components."""
    examples = [(str(FOLDER / name), question) for name, question in EXAMPLES if (FOLDER / name).is_file()]
    with gr.Blocks(title="PerceptionGPT", analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as page:
        gr.Markdown(INTRODUCTION)
        state = gr.State(None, time_to_live=SECONDS_KEPT)
        with gr.Row():
            with gr.Column():
                file = gr.File(label="Image", file_types=["image"], type="filepath", height=140, elem_id="file")
                with gr.Tabs() as tabs:
                    with gr.Tab("Answer and box", id=ANSWER_TAB):
                        shown = gr.Image(
                            label="Click two corners of a box", show_label=False,  # it would lie on the image
                            interactive=False, format="png", buttons=["fullscreen"], elem_id="shown",
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
            try:
                return path, *show(open_image(assistant, path))
            except gr.Error as refused:
                warn(refused)
                return None, *show(None)

        def on_new(session):
            return show(session and Session(session.image, session.name))

        def on_example(index):
            path, text = examples[index]
            return path, text, *show(open_image(assistant, path))

        def on_click(session, event: gr.SelectData):
            try:
                click(session, *event.index)
            except gr.Error as refused:
                warn(refused)
                return gr.skip(), gr.skip()
            return view(session), region_text(session)

        def on_clear(session):
            if session is not None:
                session.clicks.clear()
            return session and view(session), plain_editor(session), region_text(session)

        def on_ask(session, text, drawn):
            unchanged = gr.skip()
            try:
                for event in ask(assistant, session, text, drawn):
                    if event == "text":
                        yield "", chat_messages(session, is_open=True), *[unchanged] * 7
                    elif event == "object":  # the image is sent where something new is on it
                        image, tab = view(session), gr.Tabs(selected=ANSWER_TAB)
                        yield (
                            "",
                            chat_messages(session, is_open=True),
                            image,
                            unchanged,
                            unchanged,
                            tab,
                            *[unchanged] * 3,
                        )
            except gr.Error as refused:
                warn(refused)
                yield [unchanged] * 9
                return
            files = [gr.DownloadButton(value=path, interactive=True) for path in export(session)]
            shows_answer = gr.Tabs(selected=ANSWER_TAB)
            values = view(session), plain_editor(session), region_text(session)
            yield "", chat_messages(session), *values, shows_answer, *files

        private = {"api_visibility": "private"}
        file.upload(on_file, file, [file, *opened], **private)
        file.clear(lambda: show(None), None, opened, **private)
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
