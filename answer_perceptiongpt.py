"""What the tokens of an answer say: its clean text, and which phrase in it each `<vis>` stands for."""


class AnswerReader:
    """
    Reads an answer token by token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`)
        vis_token_id, phrase_start_token_id, phrase_end_token_id (`int`): of `<vis>`, `<p>` and `</p>`.

    Attributes:
        phrase (`tuple[int, int]`, *optional*): where in the text the phrase of a `<vis>` read last stands.
    """

    def __init__(self, tokenizer, vis_token_id: int, phrase_start_token_id: int, phrase_end_token_id: int):
        self.tokenizer = tokenizer
        self.vis_token_id = vis_token_id
        self.phrase_start_token_id, self.phrase_end_token_id = phrase_start_token_id, phrase_end_token_id
        self.phrase = None
        self._ids, self._text, self._decoded, self._start = [], "", "", None
        self._last = None  # what `_decode` saw last, and what it returned

    def read(self, token: int) -> None:
        """Takes the next token."""
        if token in (self.vis_token_id, self.phrase_start_token_id, self.phrase_end_token_id):
            decoded, piece = self._decode()
            self._decoded, self._text = decoded, self._text + piece
            if piece.strip() and token == self.vis_token_id:
                self.phrase = None
            if token == self.phrase_start_token_id:
                self._start, self.phrase = len(self._text), None
            elif token == self.phrase_end_token_id and self._start is not None:
                inside = self._text[self._start :]
                first = self._start + len(inside) - len(inside.lstrip())
                self.phrase = (first, first + len(inside.strip())) if inside.strip() else None
                self._start = None
        self._ids.append(token)

    def text(self) -> str:
        """The text so far, without special tokens and without blanks at its end."""
        return (self._text + self._decode()[1]).rstrip()

    def certain_text(self) -> str:
        """The part of the text that no further token changes: without a letter of which bytes are missing."""
        return self.text().rstrip("\ufffd").rstrip()

    def _decode(self) -> tuple[str, str]:
        """All tokens decoded, and of that what came after the last marker, without blanks that follow a blank."""
        if self._last is not None and self._last[0] == (len(self._ids), self._decoded):
            return self._last[1]
        # Decoding from the start each time: tokenizers treat the blanks at the start of a text in their own way.
        decoded = self.tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        piece = decoded[len(self._decoded) :]
        if not self._text:
            piece = piece.lstrip()
        elif self._text[-1].isspace():
            piece = piece.lstrip(" ")
        self._last = (len(self._ids), self._decoded), (decoded, piece)
        return decoded, piece
