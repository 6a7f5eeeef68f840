"""The conversation as Markdown for a chatbot, phrases in the colours of their objects."""

from .drawing import GIVEN_COLOR, object_colors, text_color
from .session import REGION_PLACEHOLDER, Session, Turn


NO_PHRASE = "object"
NOTHING_SAID = "(no words and no object)"
MORE_COMES = "&#8230;"


def literal(text: str) -> str:
    """Text that neither Markdown nor HTML reads anything into."""
    lines = text.splitlines()
    return "<br>".join(
        "".join(one if one.isalnum() or one == " " else f"&#{ord(one)};" for one in line) for line in lines
    )


def marked(text: str, color: str) -> str:
    style = f"background-color: {color}; color: {text_color(color)}; border-radius: 4px; padding: 1px 4px"
    return f'<span style="{style}">{literal(text)}</span>'


def rounded(coordinates: list[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in coordinates)


def question_markup(turn: Turn) -> str:
    """A question, with its region in white."""
    if not turn.region:
        return literal(turn.question)
    names = [f"{name} {rounded(turn.region[name])}" for name in ("box", "point") if name in turn.region]
    names += ["painted mask"] if "mask" in turn.region else []
    question = turn.question if REGION_PLACEHOLDER in turn.question else f"{turn.question} {REGION_PLACEHOLDER}"
    return marked(" and ".join(names), GIVEN_COLOR).join(literal(part) for part in question.split(REGION_PLACEHOLDER))


def answer_markup(turn: Turn, is_open: bool = False) -> str:
    """An answer with its phrases in the colours of their objects, each with the numbers of those; then the others.

    Args:
        turn: the question and its answer, or what is there of it.
        is_open: whether more comes.
    """
    colors = object_colors(turn.objects)
    numbers, others = {}, []
    for number, (found, color) in enumerate(zip(turn.objects, colors, strict=True), 1):
        if found["span"]:
            numbers.setdefault(tuple(found["span"]), (color, []))[1].append(str(number))
        else:
            others.append(marked(f"{NO_PHRASE} {number}", color) + literal(f" score {found['score']:.2f}"))
    pieces, end = [], 0
    for (start, stop), (color, found) in sorted(numbers.items()):
        pieces += [literal(turn.text[end:start]), marked(f"{turn.text[start:stop]} {','.join(found)}", color)]
        end = stop
    markup = " ".join(filter(None, ["".join([*pieces, literal(turn.text[end:])]), *others]))
    if is_open:
        return f"{markup} {MORE_COMES}".strip()
    markup = markup or literal(NOTHING_SAID)
    return markup if turn.finished else f"{markup} {literal('(the answer was too long and is cut off)')}"


def chat_messages(session: Session | None, is_open: bool = False) -> list[dict]:
    """The conversation as a `Chatbot` shows it.

    Args:
        session: of the user.
        is_open: whether more of the last answer comes.
    """
    messages = []
    turns = session.turns if session else []
    for turn in turns:
        messages.append({"role": "user", "content": question_markup(turn)})
        messages.append({"role": "assistant", "content": answer_markup(turn, is_open and turn is turns[-1])})
    return messages
