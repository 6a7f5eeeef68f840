"""A model that answers requests of the chat endpoint: a batch at once, or one as a stream. Nothing of Ray here."""

from collections.abc import Iterator
from contextlib import suppress
from threading import Event, Thread

import torch
from transformers import StoppingCriteriaList

from perceptiongpt.inference import RefusedError, answer_each, prepare_inputs
from perceptiongpt.pipeline_perceptiongpt import EventCriteria
from perceptiongpt.serving.messages import ChatRequest


def answer_requests(model, processor, requests: list[ChatRequest]) -> list[dict]:
    """The result of each request as `inference.answer` gives it; `{"error": why}` for what the processor refuses.

    Requests whose options agree are answered in one batch.
    """
    results = [None] * len(requests)
    groups = {}
    for index, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.options.items())), []).append(index)
    for indices in groups.values():
        conversations = [requests[index].messages for index in indices]
        sizes = [requests[index].sizes or None for index in indices]
        answers = answer_each(model, processor, conversations, sizes, **requests[indices[0]].options)
        for index, result in zip(indices, answers, strict=True):
            results[index] = {name: result[name] for name in ("error", "text", "objects", "finished") if name in result}
    return results


def stream_answer(model, processor, request: ChatRequest, closed: Event) -> Iterator[dict]:
    """The events of `ObjectIteratorStreamer` for one request, and last `{"type": "end", "finished": bool}`; for what
    the processor refuses `{"type": "error", "error": why}` alone.

    Args:
        closed: ends the generation once it is set.
    """
    options = dict(request.options)
    streamer = processor.object_streamer(
        request.sizes or None, threshold=options.pop("threshold"), mask_format=options.pop("mask_format")
    )
    try:
        inputs = prepare_inputs(model, processor, [request.messages], add_generation_prompt=True)
    except RefusedError as error:
        yield {"type": "error", "error": str(error)}
        return
    sequences = []

    @torch.no_grad()
    def generate() -> None:
        criteria = StoppingCriteriaList([EventCriteria(closed)])
        with suppress(BaseException):  # `generate` hands an error to the streamer, which raises it below
            sequences.append(
                model.generate(
                    **inputs, **{"do_sample": False, **options}, streamer=streamer, stopping_criteria=criteria
                )
            )

    thread = Thread(target=generate)
    thread.start()
    try:
        yield from streamer
    finally:
        closed.set()
        thread.join()
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [-1 if ends is None else ends])
    answer = sequences[0][0, inputs["input_ids"].shape[1] :].cpu()
    yield {"type": "end", "finished": bool(torch.isin(answer, ends).any())}
