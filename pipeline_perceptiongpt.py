"""`pipeline("perception", model=..., trust_remote_code=True)`: questions about images in, objects in pixels out."""

from collections.abc import Iterator, Sized
from contextlib import suppress
from threading import Event, Thread

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Pipeline, StoppingCriteria, StoppingCriteriaList
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .signals_perceptiongpt import SIGNALS


OUTPUT_NAMES = (
    "sequences",
    "object_valid",
    "positions",
    "prompt_length",
    "object_frames",
    "look_positions",
    "look_boxes",
    "look_crops",
    *(name for signal in SIGNALS.values() for name in signal.result_names),
)
# Longest answer without an object, such as "There is no cup.", where neither config nor call sets one.
GROUND_MAX_NEW_TOKENS = 128
# Most questions about one image that are answered side by side: what they add to its shared keys and values is small.
QUESTIONS_AT_ONCE = 16
# Stands in a text where the box, mask or point goes; without it they follow the text.
REGION_PLACEHOLDER = "<region>"
# By task the prompts of `data/templates.yaml` that checkpoints are evaluated with; of `region_vqa` one of training.
PROMPTS = {
    "detect": "Find every {phrase}.",
    "refer": "Find {phrase}.",
    "box_to_mask": "Segment the object in <region>.",
    "point_to_mask": "Segment the object at the point <region>.",
    "caption": "Describe the image in one sentence.",
    "spotting_caption": "Describe the image and mark what you mention.",
    "region_caption": "Describe the region <region> briefly.",
    "region_vqa": "Look at <region>. {phrase}",
}


class PerceptionPipeline(Pipeline):
    """
    Asks a PerceptionGPT model about images.

    ```python
    pipe = pipeline("perception", model=repo, trust_remote_code=True)
    pipe("photo.jpg", "Find the red cup.")                              # one dict
    pipe("photo.jpg", ["Find the red cup.", "Find every plate."])       # a list of dicts; the image is encoded once
    pipe(["a.jpg", "b.jpg"], "Find the red cup.", batch_size=2)         # a list of dicts
    pipe(KeyDataset(dataset, "image"), "Find every dog.", batch_size=8)  # an iterator, as for a generator
    pipe("photo.jpg", "What is in <region>?", box=[x0, y0, x1, y1])
    pipe(messages, max_new_tokens=64, threshold=0.3, mask_format="rle")

    for event in pipe("photo.jpg", "What is here?", stream=True):       # text and objects as they come
        print(event)

    pipe.detect("photo.jpg", "dog")
    pipe.segment("photo.jpg", "the red cup")
    pipe.segment("photo.jpg", box=[x0, y0, x1, y1])
    pipe.caption("photo.jpg")
    pipe.describe_region("photo.jpg", box=[x0, y0, x1, y1])
    pipe.ask("photo.jpg", "What colour is the cup?")
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True

    def __call__(self, inputs, text: str | list | None = None, **kwargs):
        """
        Args:
            inputs: an image (PIL image, array, path or URL); a dict with `image` (or a list of them), `text` and, for
                a question about a region, any of `box`, `mask` and `point`; a conversation as in
                `apply_chat_template`; or a list, data set or generator of these.
            text (`str` or `list`, *optional*):
                The question about the image. A list holds several questions about one image, which is encoded once;
                about a list of images, one question or a list of questions for each; about a data set or a generator,
                questions that are asked about each image. `<region>` in it stands for the box, mask or point, which
                otherwise follows the text.
            box, mask, point (*optional*):
                With `text`: a region of the image, in its pixels; or a list of regions, one for each question or for
                each image. Images of a data set or a generator bring their regions in dicts.
            batch_size, num_workers (`int`, *optional*): as in every pipeline.
            threshold, mask_format (*optional*): as in `post_process_generation`.
            ground (`bool`, defaults to `False`):
                The questions ask for one object each: it is read from the prompt by the model's `ground`, without a
                token being decoded. An answer that does not begin with an object is written to its end.
            stream (`bool`, defaults to `False`):
                For one question about one input: returns an iterator over text and objects as they are generated, the
                events of [`ObjectIteratorStreamer`]. Closing it ends generation.
            kwargs: for `generate`, or `ground`, which takes `max_new_tokens` and `signals`.

        Returns:
            Per input the dict of `post_process_generation`, in pixels of the original image: a list of them with
            `num_return_sequences`, and a list with an entry for each where there are several questions or regions.
            Data sets and generators give an iterator, which reads no further than the next batch.
        """
        regions = {name: value for name in SIGNALS if (value := kwargs.pop(name, None)) is not None}
        if text is not None:
            inputs = _with_questions(inputs, text, regions)
        elif regions:
            raise ValueError(
                f"{', '.join(map(repr, regions))} came without a text; expected a question about the region"
            )
        return super().__call__(inputs, **kwargs)

    # ---- what is asked most ------------------------------------------------------------------------------------------

    def detect(self, images, phrase: str | list, **kwargs):
        """
        Every object of a kind: a result whose `objects` are all of them, none if there is none.

        Args:
            images: as `inputs` of [`__call__`].
            phrase (`str` or `list`): a noun without its article, "dog" or "red cup"; lists as `text` of [`__call__`].
            kwargs: as in [`__call__`].
        """
        return self(images, _fill("detect", phrase), **kwargs)

    def segment(self, images, phrase: str | list | None = None, *, box=None, mask=None, point=None, **kwargs):
        """
        The object that a phrase names, or that a box, a rough mask or a point shows: its box and its mask.

        Args:
            images: as `inputs` of [`__call__`].
            phrase (`str` or `list`, *optional*): with its article, "the left cup"; lists as `text` of [`__call__`].
            box, mask, point (*optional*):
                In place of a phrase; as in [`__call__`]. Where the items of a data set bring the regions, use
                [`__call__`] with the text "Segment the object in <region>."
            kwargs: as in [`__call__`]. `ground=True` decodes no token, but finds one object for "two cups".

        Raises:
            ValueError: a phrase and a region, or neither.
        """
        regions = {"box": box, "mask": mask, "point": point}
        given = [name for name, value in regions.items() if value is not None]
        if (phrase is None) == (not given):
            raise ValueError(
                f"`segment` got {'neither' if phrase is None else 'both'}; expected a phrase, or any of {list(regions)}"
            )
        if given:
            text = PROMPTS["point_to_mask" if given == ["point"] else "box_to_mask"]
        else:
            text = _fill("refer", phrase)
        return self(images, text, **regions, **kwargs)

    def caption(self, images, grounded: bool = False, **kwargs):
        """
        A sentence about the image.

        Args:
            images: as `inputs` of [`__call__`].
            grounded (`bool`, defaults to `False`): the objects that the sentence mentions are found, too.
            kwargs: as in [`__call__`].
        """
        return self(images, PROMPTS["spotting_caption" if grounded else "caption"], **kwargs)

    def describe_region(self, images, box=None, *, mask=None, point=None, **kwargs):
        """
        A few words about what is inside a box or a mask, or at a point.

        Args:
            images: as `inputs` of [`__call__`].
            box, mask, point: as in [`__call__`]; at least one of them.
            kwargs: as in [`__call__`].

        Raises:
            ValueError: there is no region.
        """
        return self(images, PROMPTS["region_caption"], box=box, mask=mask, point=point, **kwargs)

    def ask(self, images, question: str | list, *, box=None, mask=None, point=None, **kwargs):
        """
        The answer to a question about the image, or about a region of it.

        Args:
            images: as `inputs` of [`__call__`].
            question (`str` or `list`): in your own words, also with `<region>` in it; lists as in [`__call__`].
            box, mask, point (*optional*): what the question is about; as in [`__call__`]. Where the items of a data set
                bring the regions, say in the question where they stand: "Look at <region>. What is it?"
            kwargs: as in [`__call__`].
        """
        regions = {"box": box, "mask": mask, "point": point}
        if any(value is not None for value in regions.values()):
            question = _about_region(question)
        return self(images, question, **regions, **kwargs)

    # ---- the steps of a pipeline -------------------------------------------------------------------------------------

    def _sanitize_parameters(self, generate_kwargs: dict | None = None, **kwargs):
        postprocess = {name: kwargs.pop(name) for name in ("threshold", "mask_format") if name in kwargs}
        forward = {name: kwargs.pop(name) for name in ("ground", "stream") if name in kwargs}
        generate_kwargs = {**(generate_kwargs or {}), **kwargs}
        if generate_kwargs:
            forward["generate_kwargs"] = generate_kwargs
        return {}, forward, postprocess

    def preprocess(self, inputs) -> dict:
        """
        One input as conversations with their images loaded, each once.

        Returns:
            `dict`: `conversations`; `sizes`, the (height, width) of the images that all of them are about; and
            `several`, whether a list of results is expected.
        """
        chat = getattr(inputs, "messages", None)
        conversations, several = ([chat], False) if chat else _as_conversations(inputs)
        images = {}
        loaded = []
        for messages in conversations:
            sizes, loaded_messages = [], []
            for message in messages:
                content = message["content"]
                if not isinstance(content, str):
                    content = [dict(item) for item in content]
                    for item in content:
                        if item.get("type") == "image":
                            source = next(
                                (item[key] for key in ("image", "url", "path", "base64") if item.get(key) is not None),
                                None,
                            )
                            if id(source) not in images:
                                images[id(source)] = self.processor.load_image(source, f"image {len(sizes)}")
                            item["image"] = images[id(source)]
                            sizes.append((item["image"].height, item["image"].width))
                loaded_messages.append({**message, "content": content})
            loaded.append(loaded_messages)
        return {"conversations": loaded, "sizes": sizes, "several": several}

    def _forward(self, model_inputs: list[dict], generate_kwargs: dict | None = None, ground: bool = False) -> dict:
        """
        Answers a batch of inputs: those with one question together, of the others each by itself.

        Returns:
            `dict`: `answers`, a list with the tensors and `sizes` of each call of the model; `rows`, per question, in
            the order of the answers, the index of its input; and `several` of each input.
        """
        generate_kwargs = generate_kwargs or {}
        single = [index for index, one in enumerate(model_inputs) if len(one["conversations"]) == 1]
        answers, rows = [], []
        if single:
            conversations = [model_inputs[index]["conversations"][0] for index in single]
            answer = self._answer(self._prepare(conversations), generate_kwargs, ground)
            answers.append({**answer, "sizes": [model_inputs[index]["sizes"] for index in single]})
            rows += single
        for index, one in enumerate(model_inputs):
            conversations, sizes = one["conversations"], one["sizes"]
            if len(conversations) == 1:
                continue
            at_once = QUESTIONS_AT_ONCE
            inputs, prefix = self._prepare(conversations[:at_once]), None
            if sizes and self._has_dynamic_cache(generate_kwargs):
                prefix = self.model.encode_prefix(**inputs)
                if any(prefix.is_sliding):  # such rows share a prefix only where they are of one length
                    at_once, inputs = 1, self._prepare(conversations[:1])
            for start in range(0, len(conversations), at_once):
                some = conversations[start : start + at_once]
                inputs = self._prepare(some) if start else inputs
                answer = self._answer(inputs, {**generate_kwargs, "prefix": prefix}, ground)
                answers.append({**answer, "sizes": [sizes] * len(some)})
            rows += [index] * len(conversations)
        return {"answers": answers, "rows": rows, "several": [one["several"] for one in model_inputs]}

    def _prepare(self, conversations: list[list[dict]]):
        """Conversations as the model takes them."""
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding_side": "left"},
        ).to(self.device, self.dtype)

    def _answer(self, inputs, generate_kwargs: dict, ground: bool) -> dict:
        """What `post_process_generation` needs of the model's output."""
        if ground:
            length = self.model.generation_config.max_new_tokens or GROUND_MAX_NEW_TOKENS
            output = self.model.ground(**inputs, **{"max_new_tokens": length, **generate_kwargs})
        else:
            generate_kwargs = self._prepare_generate_kwargs(generate_kwargs, return_dict_in_generate=True)
            output = self.model.generate(**inputs, **generate_kwargs)
        return {name: output[name] for name in OUTPUT_NAMES if name in output}

    def _has_dynamic_cache(self, generate_kwargs: dict) -> bool:
        """Whether `generate` will use the kind of cache that a prefix can start."""
        settings = self._prepare_generate_kwargs(generate_kwargs)
        configs = (settings.get("generation_config"), self.model.generation_config)

        def setting(name: str):
            values = (settings.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        return setting("use_cache") is not False and not setting("cache_implementation")

    def postprocess(self, model_outputs: dict, **kwargs) -> list:
        """Per input its result, or a list of results with `num_return_sequences` and for several questions."""
        results = []
        for answer in model_outputs["answers"]:
            sizes = [size or None for size in answer.pop("sizes")]
            per_row = len(answer["sequences"]) // len(sizes)
            target_sizes = [size for size in sizes for _ in range(per_row)]
            found = self.processor.post_process_generation(answer, target_sizes, **kwargs)
            rows = [found[start : start + per_row] for start in range(0, len(found), per_row)]
            results += [row[0] if per_row == 1 else row for row in rows]
        by_input = [[] for _ in model_outputs["several"]]
        for index, result in zip(model_outputs["rows"], results, strict=True):
            by_input[index].append(result)
        return [found if many else found[0] for found, many in zip(by_input, model_outputs["several"], strict=True)]

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Iterator:
        if forward_params.pop("stream", False):
            raise ValueError("`stream=True` is for one question about one input; got several inputs.")
        # The library pads tensors of rows that were processed alone; here the processor sees the batch as a whole.
        dataset_class = PipelineDataset if isinstance(inputs, Sized) else PipelineIterator
        dataset = dataset_class(inputs, self.preprocess, preprocess_params)
        loader = DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=list)
        return (
            result
            for batch in loader
            for result in self.postprocess(self.forward(batch, **forward_params), **postprocess_params)
        )

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        if forward_params.pop("stream", False):
            return self._stream(self.preprocess(inputs, **preprocess_params), postprocess_params, **forward_params)
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))

    def _stream(self, row: dict, options: dict, generate_kwargs: dict | None = None, ground: bool = False) -> Iterator:
        """The events of one question, which `preprocess` has seen; `options` are those of `postprocess`."""
        if row["several"] or ground:
            raise ValueError(
                f"`stream=True` is for one question about one input, word by word; got "
                f"{'`ground=True`' if ground else 'a list of questions'}."
            )
        streamer = self.processor.object_streamer(row["sizes"] or None, **options)
        generate_kwargs = dict(generate_kwargs or {})
        closed = Event()
        criteria = [*(generate_kwargs.pop("stopping_criteria", None) or []), EventCriteria(closed)]
        generate_kwargs = self._prepare_generate_kwargs(
            generate_kwargs, streamer=streamer, stopping_criteria=StoppingCriteriaList(criteria)
        )
        inputs = self._prepare(row["conversations"])

        def run() -> None:
            with suppress(BaseException), self.device_placement():  # `generate` hands an error to the streamer
                self.model.generate(**inputs, **generate_kwargs)

        def events() -> Iterator[dict]:
            thread = Thread(target=run)
            thread.start()
            try:
                yield from streamer
            finally:
                closed.set()
                thread.join()

        return events()


class EventCriteria(StoppingCriteria):
    """Ends generation after an event."""

    def __init__(self, event: Event):
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return input_ids.new_full((len(input_ids),), self.event.is_set(), dtype=torch.bool)


class QuestionDataset(Dataset):
    """
    The images of a data set, each with the same question.

    Args:
        dataset: with a length; its items are images, or dicts as the pipeline takes them, without their text.
        question (`dict`): what the pipeline takes beside `image`.
    """

    def __init__(self, dataset, question: dict):
        self.dataset = dataset
        self.question = question

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return _with_question(self.dataset[index], self.question)


def _fill(task: str, phrase):
    """The prompt of a task about a phrase, or a list of them."""
    if isinstance(phrase, (list, tuple)):
        return [_fill(task, one) for one in phrase]
    return PROMPTS[task].format(phrase=phrase)


def _about_region(question):
    """A question, or a list of them, about a region; one that says where the region stands stays as it is."""
    if isinstance(question, (list, tuple)):
        return [_about_region(one) for one in question]
    return question if REGION_PLACEHOLDER in question else _fill("region_vqa", question)


def _with_question(image, question: dict) -> dict:
    """An image, or a dict that holds it and its regions, with a question."""
    return {**image, **question} if isinstance(image, dict) and "image" in image else {"image": image, **question}


def _with_questions(inputs, text, regions: dict):
    """Images with the texts and regions that came beside them, in the form in which the pipeline takes them alone."""
    if isinstance(inputs, (list, tuple)):
        columns = {"text": [text] * len(inputs) if isinstance(text, str) else list(text)}
        for name, value in regions.items():
            columns[name] = list(value) if _is_several(name, value) else [value] * len(inputs)
        for name, column in columns.items():
            if len(column) != len(inputs):
                noun = "texts" if name == "text" else SIGNALS[name].plural
                raise ValueError(f"{len(column)} {noun} were given for {len(inputs)} images")
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [_with_question(image, row) for image, row in zip(inputs, rows, strict=True)]
    is_dataset = isinstance(inputs, Dataset)
    if not is_dataset and not isinstance(inputs, Iterator):
        return _with_question(inputs, {"text": text, **regions})
    if regions:
        raise ValueError(
            f"{', '.join(map(repr, regions))} came beside a data set or generator; expected them in its items, dicts "
            "with 'image'"
        )
    if is_dataset and isinstance(inputs, Sized):
        return QuestionDataset(inputs, {"text": text})
    return (_with_question(image, {"text": text}) for image in inputs)


def _is_several(name: str, value) -> bool:
    """Whether a region of a signal is a list of regions."""
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.ndim == (2 if isinstance(SIGNALS[name].column, list) else 3)
    if not isinstance(value, (list, tuple)) or not len(value):
        return False
    first = value[0]
    nested = isinstance(first, (list, tuple, np.ndarray, torch.Tensor))
    if isinstance(SIGNALS[name].column, list):
        return nested
    # One mask may be a list as well, of polygons: flat lists of numbers.
    if not nested or getattr(first, "ndim", 1) > 1:
        return True
    return len(first) > 0 and isinstance(first[0], (list, tuple, np.ndarray))


def question_content(text: str, region: dict) -> list[dict]:
    """
    The content items of a question.

    Args:
        text (`str`): with `<region>` where the region stands; without it, the region follows the text.
        region (`dict`): the values of one region by signal, `{"box": [x0, y0, x1, y1]}`; empty for none.

    Raises:
        ValueError: the text names a region, and there is none.
    """
    if not region:
        if REGION_PLACEHOLDER in text:
            raise ValueError(
                f"The text names {REGION_PLACEHOLDER}, which needs any of {', '.join(map(repr, SIGNALS))}."
            )
        return [{"type": "text", "text": text}]
    region = {"type": "region" if len(region) > 1 else next(iter(region)), **region}
    if REGION_PLACEHOLDER not in text:
        text = f"{text.rstrip()} {REGION_PLACEHOLDER}"
    content = []
    for index, part in enumerate(text.split(REGION_PLACEHOLDER)):
        if index:
            content.append(region)
        if part:
            content.append({"type": "text", "text": part})
    return content


def _as_conversations(inputs: dict) -> tuple[list[list[dict]], bool]:
    """A conversation for each question of a dict, and whether questions or regions came as lists."""
    if not isinstance(inputs, dict) or not inputs.keys() <= {"image", "text", *SIGNALS} or "text" not in inputs:
        raise ValueError(
            f"The perception pipeline got {str(inputs)[:80]}; expected an image and a text, a dict with 'image' and "
            f"'text' and perhaps {', '.join(map(repr, SIGNALS))}, or messages."
        )
    images = inputs.get("image", [])
    images = images if isinstance(images, (list, tuple)) else [images]
    columns = {name: inputs[name] for name in SIGNALS if inputs.get(name) is not None}
    lists = {name for name, value in columns.items() if _is_several(name, value)}
    columns["text"] = inputs["text"]
    if isinstance(inputs["text"], (list, tuple)):
        lists.add("text")
    counts = {name: len(columns[name]) for name in sorted(lists)}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        raise ValueError(f"The lists of one question each have the lengths {counts}; expected one length, at least 1.")
    count = next(iter(counts.values()), 1)
    conversations = []
    for index in range(count):
        region = {name: value[index] if name in lists else value for name, value in columns.items()}
        content = [{"type": "image", "image": image} for image in images]
        content += question_content(region.pop("text"), region)
        conversations.append([{"role": "user", "content": content}])
    return conversations, bool(lists)
