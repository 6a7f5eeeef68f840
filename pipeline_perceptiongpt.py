"""`pipeline("perception", model=..., trust_remote_code=True)`: questions about images in, objects in pixels out."""

from collections.abc import Iterator, Sized

from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .signals_perceptiongpt import SIGNALS


OUTPUT_NAMES = (
    "sequences",
    "object_valid",
    "positions",
    "prompt_length",
    *(name for signal in SIGNALS.values() for name in signal.result_names),
)


# Longest answer without an object, such as "There is no cup.", where neither config nor call sets one.
GROUND_MAX_NEW_TOKENS = 128


class PerceptionPipeline(Pipeline):
    """
    Asks a PerceptionGPT model about images.

    ```python
    pipe = pipeline("perception", model=repo, trust_remote_code=True)
    pipe("photo.jpg", "the red cup")                              # one dict
    pipe(["a.jpg", "b.jpg"], "the red cup", batch_size=2)         # a list of dicts
    pipe({"image": "photo.jpg", "text": "What is this?", "box": [x0, y0, x1, y1]})
    pipe(messages, max_new_tokens=64, threshold=0.3, mask_format="rle")
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = True

    def __call__(self, inputs, text: str | list[str] | None = None, **kwargs):
        """
        Args:
            inputs: an image (PIL image, array, path or URL); a dict with `image` (or a list of them), `text` and, for
                a question about a region, any of `box`, `mask` and `point`, which then follow the text; a conversation
                as in `apply_chat_template`; or a list, dataset or generator of these.
            text (`str` or `list[str]`, *optional*): the question about the image, or one for each.
            batch_size, num_workers (`int`, *optional*): as in every pipeline.
            threshold, mask_format (*optional*): as in `post_process_generation`.
            ground (`bool`, defaults to `False`):
                The questions ask for one object each: it is read from the prompt by the model's `ground`, without a
                token being decoded. An answer that does not begin with an object is written to its end.
            kwargs: for `generate`, or `ground`, which takes `max_new_tokens` and `signals`.

        Returns:
            Per input the dict of `post_process_generation`, in pixels of the original image; a list of them with
            `num_return_sequences`.
        """
        if text is not None:
            if isinstance(inputs, (list, tuple)):
                texts = [text] * len(inputs) if isinstance(text, str) else list(text)
                if len(texts) != len(inputs):
                    raise ValueError(f"{len(texts)} texts were given for {len(inputs)} images")
                inputs = [{"image": image, "text": one} for image, one in zip(inputs, texts, strict=True)]
            elif isinstance(text, str):
                inputs = {"image": inputs, "text": text}
            else:
                inputs = [{"image": inputs, "text": one} for one in text]
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, generate_kwargs: dict | None = None, **kwargs):
        postprocess = {name: kwargs.pop(name) for name in ("threshold", "mask_format") if name in kwargs}
        forward = {"ground": kwargs.pop("ground")} if "ground" in kwargs else {}
        generate_kwargs = {**(generate_kwargs or {}), **kwargs}
        if generate_kwargs:
            forward["generate_kwargs"] = generate_kwargs
        return {}, forward, postprocess

    def preprocess(self, inputs) -> dict:
        """One input as messages with its images loaded, and the (height, width) of each of them."""
        messages = getattr(inputs, "messages", None) or _as_messages(inputs)
        loaded, sizes = [], []
        for message in messages:
            content = message["content"]
            if not isinstance(content, str):
                content = [dict(item) for item in content]
                for item in content:
                    if item.get("type") == "image":
                        source = next(
                            (item[key] for key in ("image", "url", "path", "base64") if item.get(key) is not None), None
                        )
                        item["image"] = self.processor.load_image(source, f"image {len(sizes)}")
                        sizes.append((item["image"].height, item["image"].width))
            loaded.append({**message, "content": content})
        return {"messages": loaded, "sizes": sizes}

    def _forward(self, model_inputs: list[dict], generate_kwargs: dict | None = None, ground: bool = False) -> dict:
        inputs = self.processor.apply_chat_template(
            [row["messages"] for row in model_inputs],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding_side": "left"},
        ).to(self.device, self.dtype)
        if ground:
            length = self.model.generation_config.max_new_tokens or GROUND_MAX_NEW_TOKENS
            output = self.model.ground(**inputs, **{"max_new_tokens": length, **(generate_kwargs or {})})
        else:
            generate_kwargs = self._prepare_generate_kwargs(generate_kwargs or {}, return_dict_in_generate=True)
            output = self.model.generate(**inputs, **generate_kwargs)
        answer = {name: output[name] for name in OUTPUT_NAMES if name in output}
        return {**answer, "sizes": [row["sizes"] or None for row in model_inputs]}

    def postprocess(self, model_outputs: dict, **kwargs) -> list:
        """Per input its result, or a list of results with `num_return_sequences`."""
        sizes = model_outputs.pop("sizes")
        per_input = len(model_outputs["sequences"]) // len(sizes)
        target_sizes = [size for size in sizes for _ in range(per_input)]
        results = self.processor.post_process_generation(model_outputs, target_sizes, **kwargs)
        if per_input == 1:
            return results
        return [results[start : start + per_input] for start in range(0, len(results), per_input)]

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Iterator:
        # The library pads tensors of rows that were processed alone; here the processor sees the batch as a whole.
        dataset_class = PipelineDataset if isinstance(inputs, Sized) else PipelineIterator
        dataset = dataset_class(inputs, self.preprocess, preprocess_params)
        for batch in DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=list):
            yield from self.postprocess(self.forward(batch, **forward_params), **postprocess_params)

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))


def _as_messages(inputs: dict) -> list[dict]:
    if not isinstance(inputs, dict) or not inputs.keys() <= {"image", "text", *SIGNALS} or "text" not in inputs:
        raise ValueError(
            f"The perception pipeline got {str(inputs)[:80]}; expected an image and a text, a dict with 'image' and "
            f"'text' and perhaps {', '.join(map(repr, SIGNALS))}, or messages."
        )
    images = inputs.get("image", [])
    images = images if isinstance(images, (list, tuple)) else [images]
    signals = {key: inputs[key] for key in SIGNALS if inputs.get(key) is not None}
    content = [{"type": "image", "image": image} for image in images]
    if signals:
        content.append({"type": "text", "text": f"{inputs['text'].rstrip()} "})
        content.append({"type": "region" if len(signals) > 1 else next(iter(signals)), **signals})
    else:
        content.append({"type": "text", "text": inputs["text"]})
    return [{"role": "user", "content": content}]
