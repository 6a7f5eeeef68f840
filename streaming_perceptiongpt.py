"""Text and objects while they are generated, on the library's interface for streamers."""

from queue import Queue

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from .signal_mask_perceptiongpt import check_mask_format
from .signals_perceptiongpt import SIGNALS


class ObjectIteratorStreamer(BaseStreamer):
    """
    Iterates over the parts of an answer while `generate` writes it in another thread, as `TextIteratorStreamer` does
    over its words.

    ```python
    streamer = processor.object_streamer(target_size=(image.height, image.width))
    Thread(target=model.generate, kwargs={**inputs, "streamer": streamer, "max_new_tokens": 64}).start()
    for event in streamer:
        print(event)
    ```

    An event is a `dict`:

    - `{"type": "text", "text"}` -- what the text goes on with. All of them joined are the `text` of
      `post_process_generation`.
    - `{"type": "object", "index", "phrase", "span", "box", "score", "image"}` as soon as the object is complete: the
      entries of an object of `post_process_generation` but the mask, and its number among all `<vis>` of the answer.
      Checkpoints with points have `point` and `point_score`, too; with `signals=["mask"]` the mask stands here
      instead of a box.
    - `{"type": "mask", "index", "mask", "mask_score"}` after the object of that number.

    Of a checkpoint that looks again an object comes once the next token tells that the model does not look at it; one
    that is looked at and found again right behind the look comes once, as it was found then.

    Masks are decoded one by one as their objects come, while `generate` waits; without `mask_format` the mask decoder
    does not run. (With `return_dict_in_generate=True` `generate` itself decodes all masks once more, after the loop,
    unless it gets `signals=["box"]`.)

    Args:
        processor (`PerceptionGPTProcessor`)
        target_size (*optional*):
            (height, width) of the original image, or a list of them where there are several: objects belong to the
            last. Without it boxes are xyxy in 0..1 of the padded square, and masks are grids over that square.
        threshold (`float`, defaults to 0.0): objects that score less are left out, and their masks not decoded.
        mask_format (`str`, *optional*, defaults to `"bool"`): as in `post_process_generation`; `None` for no masks.
        timeout (`float`, *optional*): seconds to wait for an event before `queue.Empty` is raised.

    Raises:
        `ValueError`: while it is filled, for more than one row, and for models other than PerceptionGPT. What
        `generate` raises is raised where the events are read, too.
    """

    def __init__(
        self,
        processor,
        target_size=None,
        threshold: float = 0.0,
        mask_format: str | None = "bool",
        timeout: float | None = None,
    ):
        check_mask_format(mask_format)
        self.processor = processor
        self.sizes = np.asarray([] if target_size is None else target_size, dtype=np.int64).reshape(-1, 2).tolist()
        self.threshold = threshold
        self.mask_format = mask_format
        self.timeout = timeout
        self.events = Queue()
        self.decode, self.names = None, []
        self._begin()

    def _begin(self) -> None:
        self.reader = None
        self.shown = 0  # letters of the text that have been handed out
        self.num_tokens = self.num_objects = 0
        self.held, self.behind = None, []  # an object that may be looked at, and the tokens since

    # ---- what `generate` calls ---------------------------------------------------------------------------------------

    def watch(self, decode, names: list[str]) -> None:
        """
        Called before the first token.

        Args:
            decode (`Callable[[int, list[str]], dict]`):
                Gives, for the number of a token in the answer and the names of signals, the values and scores that
                the token is decoded to, as in the output of `generate` for one sequence with one object.
            names (`list[str]`): the signals that there are.
        """
        self.decode = decode
        self.names = [name for name in names if self.mask_format is not None or SIGNALS[name].drawn_as != "mask"]

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then token after token."""
        if len(value) > 1:
            raise ValueError(f"Objects are streamed for one row at a time; got {len(value)} rows.")
        ids = value.flatten().tolist()
        if self.reader is None:
            if self.decode is None:
                raise ValueError("Objects are streamed by `generate` of a PerceptionGPT model only.")
            self.reader = self.processor.answer_reader()
            self.image = self.processor.last_image(ids, self.sizes)
            return
        for token in ids:
            self.reader.read(token)
            if self.held is not None:
                self._follow(token)
            if token == self.processor.vis_token_id:
                self._show(self.reader.text())
                self._find_object(self.num_tokens)
            else:
                self._show(self.reader.certain_text())
            self.num_tokens += 1

    def end(self) -> None:
        """Called after the last token."""
        if self.reader is not None:
            self._release()
            self._show(self.reader.text())
        self._finish(None)

    def fail(self, error: BaseException) -> None:
        """Called in place of `end` when `generate` raises."""
        self._finish(error)

    def _finish(self, event: BaseException | None) -> None:
        self.decode = None
        self._begin()
        self.events.put(event)

    def _show(self, text: str) -> None:
        if len(text) > self.shown:
            self.events.put({"type": "text", "text": text[self.shown :]})
            self.shown = len(text)

    def _find_object(self, step: int) -> None:
        """Takes note of a `<vis>`, and puts its object at once unless the model may look at it."""
        span = self.reader.phrase
        phrase = self.reader.text()[slice(*span)] if span else None
        self.held, self.behind = (step, self.num_objects, span, phrase), []
        self.num_objects += 1
        if not self.processor.look_tokens:
            self._release()

    def _follow(self, token: int) -> None:
        """Puts the object that is held unless the tokens behind it are a look and, at last, the object again."""
        self.behind.append(token)
        again = [self.processor.look_token_id, self.processor.look_end_token_id, self.processor.vis_token_id]
        if self.behind == again:
            self.held = None
        elif self.behind != again[: len(self.behind)]:
            self._release()

    def _release(self) -> None:
        if self.held is not None:
            held, self.held = self.held, None
            self._put_object(*held)

    def _put_object(self, step: int, index: int, span: tuple[int, int] | None, phrase: str | None) -> None:
        first = [name for name in self.names if not SIGNALS[name].reads_image] or self.names
        later = [name for name in self.names if name not in first]
        values = self._present(step, first)
        if first and values[SIGNALS[first[0]].score_name] < self.threshold:
            return
        self.events.put(
            {"type": "object", "index": index, "phrase": phrase, "span": span, **values, "image": self.image}
        )
        for name in later:
            self.events.put({"type": name, "index": index, **self._present(step, [name])})

    def _present(self, step: int, names: list[str]) -> dict:
        """Values and scores of some signals as they stand in an object of `post_process_generation`."""
        size = tuple(self.sizes[-1]) if self.sizes else None
        fields = self.decode(step, names) if names else {}
        presented = {}
        frames = {"frames": fields["object_frames"][0]} if "object_frames" in fields else {}
        for signal in (SIGNALS[name] for name in names):
            values, scores = (fields[name] for name in signal.result_names)
            (presented[signal.name],) = signal.present(values[0], size, self.mask_format, **frames)[1]
            presented[signal.score_name] = scores.float().item()
        return presented

    # ---- what the reader of the events calls -------------------------------------------------------------------------

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        event = self.events.get(timeout=self.timeout)
        if event is None:
            raise StopIteration
        if isinstance(event, BaseException):
            raise event
        return event
