"""The model behind the page: it answers one question after another, whoever asks."""

import html
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import gradio as gr
import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, StoppingCriteriaList


MOST_NEW_TOKENS = 256
LEAST_NEW_TOKENS = 16  # with less room for an answer the conversation is over


def refusal(message: str) -> gr.Error:
    """What a user did that cannot be done, to be raised: the page shows it, and everything stays as it was."""
    return gr.Error(html.escape(message, quote=False), print_exception=False, title="Please change this")


class StopWhenSet(StoppingCriteria):
    """Ends a generation whose user has gone."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


class Assistant:
    """A model that answers one question after another, whoever asks: the questions of all users wait in one line.

    Args:
        model: a folder or a repository id.
        revision: branch, tag or commit of the repository.

    Raises:
        ValueError: the model is none of PerceptionGPT, or its code is older than the page.
    """

    def __init__(self, model: str, revision: str | None = None):
        hub = {"revision": revision, "trust_remote_code": True}
        self.name = model
        self.processor = AutoProcessor.from_pretrained(model, **hub)
        if not hasattr(self.processor, "object_streamer"):
            raise ValueError("its processor streams no objects: publish it again with the code of this version")
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model = AutoModelForImageTextToText.from_pretrained(model, dtype="auto", **hub).eval().to(device)
        self.worker = ThreadPoolExecutor(max_workers=1)

    def prepare(self, messages: list[dict]):
        """The tensors of a conversation, and how many tokens its answer may have.

        Raises:
            gr.Error: the processor does not accept it, or there is no room for an answer.
        """
        try:
            inputs = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except ValueError as error:
            raise refusal(f"The model does not take this question: {error}.") from error
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        room = MOST_NEW_TOKENS if longest is None else longest - inputs["input_ids"].shape[1]
        if room < LEAST_NEW_TOKENS:
            raise refusal("The conversation is too long for this model: start a new one.")
        return inputs.to(self.model.device, self.model.dtype), min(room, MOST_NEW_TOKENS)

    def answer(self, messages: list[dict], size: tuple[int, int], **generate_kwargs) -> Iterator[dict]:
        """Answer a conversation.

        Args:
            messages: as `apply_chat_template` takes them.
            size: (height, width) of the image.
            generate_kwargs: for `model.generate`, in place of greedy decoding.

        Yields:
            The parts of the answer as they are completed, `{"type": "text", "text"}` and `{"type": "object", ...}`
            without masks, which are decoded at the end in one batch; at last the dict of `post_process_generation` with
            `type` `"answer"`, `content`, the answer as content items of a message, and `finished`, whether the model
            ended it.
        """
        inputs, most_tokens = self.prepare(messages)
        streamer = self.processor.object_streamer(target_size=size, mask_format=None)
        gone = threading.Event()
        generation = self.worker.submit(
            torch.no_grad()(self.model.generate),
            **inputs,
            **{"do_sample": False, "max_new_tokens": most_tokens, **generate_kwargs},
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([StopWhenSet(gone)]),
            return_dict_in_generate=True,
        )
        # An error before the first token ends the stream, too; `result` raises it.
        generation.add_done_callback(lambda _: streamer.end())
        try:
            yield from streamer
        finally:
            gone.set()
        output = generation.result()
        (result,) = self.processor.post_process_generation(output, target_sizes=[size])
        ids = output.sequences[0, output.prompt_length :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        length = next((index for index, token in enumerate(ids) if token in ends), len(ids))
        content = self.answer_content(ids[:length], [found["box"] for found in result["objects"]])
        for found in result["objects"]:
            if found.get("mask") is not None:
                found["mask"] = np.asarray(found["mask"])
        yield {**result, "type": "answer", "content": content, "finished": length < len(ids)}

    def answer_content(self, ids: list[int], boxes: list[list[float]]) -> list[dict]:
        """An answer as content items of a history: its text, and a box at each `<vis>`, as it was fed back.

        Args:
            ids: the answer's tokens, without its end.
            boxes: one per `<vis>`, xyxy in pixels of the image.
        """
        content, start = [], 0
        positions = [index for index, token in enumerate(ids) if token == self.processor.vis_token_id]
        for position, box in zip([*positions, len(ids)], [*boxes, None], strict=True):
            if text := self.processor.tokenizer.decode(ids[start:position], skip_special_tokens=False):
                content.append({"type": "text", "text": text})
            if box is not None:
                content.append({"type": "box", "box": box})
            start = position + 1
        return content
