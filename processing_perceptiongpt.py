"""Images, text and signals into tensors, and what the model generated back into objects in pixels."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Unpack

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ImageProcessingMixin, LlavaImageProcessorPil, ProcessorMixin
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging

from .answer_perceptiongpt import AnswerReader
from .chat_perceptiongpt import (
    CHAT_TEMPLATE,
    answer_spans,
    chat_form,
    end_answers,
    flatten_messages,
    shape_contents,
)
from .configuration_perceptiongpt import (
    IMAGE_TOKEN,
    PHRASE_END_TOKEN,
    PHRASE_START_TOKEN,
    RESERVED_TOKENS,
    VIS_TOKEN,
    add_perception_tokens,
)
from .images_perceptiongpt import read_image, split_batches
from .look_processing_perceptiongpt import LookProcessorMixin
from .signal_mask_perceptiongpt import check_mask_format
from .signals_perceptiongpt import FIRST_SIGNALS, SIGNALS, choose_signals, refuse_signal, take_signal_inputs
from .streaming_perceptiongpt import ObjectIteratorStreamer


if TYPE_CHECKING:
    # Named so that `save_pretrained` copies the file of `pipeline("perception")` beside this one.
    from .pipeline_perceptiongpt import PerceptionPipeline  # noqa: F401

logger = logging.get_logger(__name__)


class PerceptionBatch(BatchFeature):
    """A `BatchFeature` whose coordinates stay float32 when it is cast: bfloat16 boxes are bins of pixels."""

    def to(self, *args, **kwargs) -> "PerceptionBatch":
        names = [name for signal in SIGNALS.values() for name in signal.float32_names]
        names += ["look_frames", "look_image_stats"]
        coordinates = {name: self.data[name] for name in names if isinstance(self.data.get(name), torch.Tensor)}
        super().to(*args, **kwargs)
        for name, value in coordinates.items():
            self.data[name] = value.to(self.data[name].device)
        return self


class PerceptionGPTProcessor(LookProcessorMixin, ProcessorMixin):
    r"""
    Joins an image processor that pads to the square with a tokenizer that knows `<image>`, `<vis>`, `<p>` and `</p>`.

    Args:
        image_processor (`LlavaImageProcessor`): with `do_pad=True`, without centre crop, resizing to a square.
        tokenizer (`PreTrainedTokenizerBase`): after `add_perception_tokens`.
        chat_template (`str`, *optional*): by default the tokenizer's own, else `CHAT_TEMPLATE`.
        image_seq_length (`int`): number of `<image>` tokens per image, `config.image_seq_length`.
        mask_size (`int`): side M of the masks that go in, `config.mask_config.size`.
        mask_image_size (`int`, *optional*): side in pixels of `mask_pixel_values`, `config.mask_image_size`.
        signals (`list[str]`, defaults to `["box", "mask"]`): the checkpoint's signals, `config.signals`.
        look_tokens (`int`, defaults to 0): `config.look_tokens` of a checkpoint that looks again.
        look_frame (`str`, defaults to `"image"`), reenc_queries (`int`, defaults to 0): those of the config.
    """

    text_kwargs = {"padding": True}
    skip_tensor_conversion = [*ProcessorMixin.skip_tensor_conversion, "look_images"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_seq_length: int = 576,
        mask_size: int = 192,
        mask_image_size: int | None = None,
        signals: list[str] | tuple[str, ...] = FIRST_SIGNALS,
        look_tokens: int = 0,
        look_frame: str = "image",
        reenc_queries: int = 0,
    ):
        self.signals = choose_signals(signals)
        self.image_seq_length = image_seq_length
        self.mask_size = mask_size
        self.mask_image_size = mask_image_size
        self.image_token, self.vis_token = IMAGE_TOKEN, VIS_TOKEN
        tokens = [IMAGE_TOKEN, VIS_TOKEN, PHRASE_START_TOKEN, PHRASE_END_TOKEN]
        ids = tokenizer.convert_tokens_to_ids(tokens)
        if None in ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"The tokenizer does not know all of {tokens}; call `add_perception_tokens` on it first.")
        self.image_token_id, self.vis_token_id, self.phrase_start_token_id, self.phrase_end_token_id = ids
        template = chat_template or tokenizer.chat_template or CHAT_TEMPLATE
        default = template.get("default") if isinstance(template, dict) else template
        if not chat_template and default:
            problem = chat_form(default, tokenizer).problem
            if problem:
                logger.warning(f"PerceptionGPT's own chat template is used in place of the tokenizer's: {problem}.")
                template = CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=template)
        self._set_up_looks(look_tokens, look_frame, reenc_queries)

    @classmethod
    def from_backbones(cls, vision: str, text: str, config) -> "PerceptionGPTProcessor":
        """
        The processor of a new model over two backbones.

        Args:
            vision (`str`): folder or id of the vision backbone; its mean and standard deviation are taken, CLIP's if
                it comes without an image processor.
            text (`str`): folder or id of the language model; its tokenizer gets the new tokens and pads left. One
                without a padding token pads with its unknown token, else with its end token, else a reserved one:
                what is padding is told by the attention mask alone.
            config (`PerceptionGPTConfig`): gives every size.
        """
        tokenizer = AutoTokenizer.from_pretrained(text, padding_side="left")
        add_perception_tokens(tokenizer)
        if tokenizer.chat_template is None:  # checkpoints such as LLaVA's may keep it in a file of the processor
            tokenizer.chat_template = cls.get_processor_dict(text)[0].get("chat_template")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token or RESERVED_TOKENS[-1]
        try:
            normalization, _ = ImageProcessingMixin.get_image_processor_dict(vision)
        except OSError:
            normalization = {}
        side = config.image_size
        image_processor = LlavaImageProcessorPil(
            do_pad=True,
            do_center_crop=False,
            size={"height": side, "width": side},
            image_mean=normalization.get("image_mean", OPENAI_CLIP_MEAN),
            image_std=normalization.get("image_std", OPENAI_CLIP_STD),
        )
        return cls(
            image_processor,
            tokenizer,
            image_seq_length=config.image_seq_length,
            mask_size=config.mask_config.size if config.mask_config else 0,
            mask_image_size=config.mask_image_size,
            signals=config.signals,
            look_tokens=config.look_tokens if config.look_max else 0,
            look_frame=config.look_frame,
            reenc_queries=config.reenc_queries,
        )

    @property
    def model_input_names(self) -> list[str]:
        finer = ["mask_pixel_values"] if self.mask_image_size else []
        finer += ["look_images", "look_image_stats"] if self.look_tokens else []
        signals = [SIGNALS[name] for name in self.signals]
        return [
            *super().model_input_names,
            *finer,
            *(signal.plural for signal in signals),
            *(signal.valid_name for signal in signals),
            *(signal.read_name for signal in signals),
        ]

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.image_seq_length

    def __call__(
        self,
        images=None,
        text=None,
        boxes=None,
        masks=None,
        points=None,
        signal_image_index=None,
        look_crops=None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> PerceptionBatch:
        """
        Args:
            images: the images, a list per text or all in reading order: PIL images, arrays, paths, URLs or base64
                strings; an array or tensor with four dimensions is a batch of them.
            text (`str` or `list[str]`): with one `<image>` where each image and one `<vis>` where each signal stands.
            boxes (`list[list]`, *optional*): per text one entry per `<vis>`: xyxy in pixels of its original image,
                `"tight"` for the tight box of its mask, or `None` where it carries no box.
            masks (`list[list]`, *optional*): likewise: whatever [`decode_mask`] reads, or `None`.
            points (`list[list]`, *optional*): likewise: xy in pixels of its original image, or `None`.
            signal_image_index (`list[list[int | None]]`, *optional*): per `<vis>` the index of its image in its row;
                by default the last one before it.
            look_crops (`list[list]`, *optional*):
                Per text one entry for each look in it, see [`look_text`], which stands right behind its `<vis>`: the
                crop, xyxy in whole pixels of its original image, or `None` for a look that saw none and has no pads.
                Without `look_crops` the pads are for crops that the caller gives the model.
            kwargs: for the image processor and the tokenizer, such as `return_tensors="pt"`.

        Returns:
            [`PerceptionBatch`]: `input_ids`, `attention_mask`, `pixel_values` and `mask_pixel_values` where they
            apply; always, of the checkpoint's signals, `boxes` `(B, K, 4)` float32 xyxy in 0..1 of the padded square,
            `masks` `(B, K, M, M)` uint8 on that square, `points` `(B, K, 2)` float32 xy in 0..1 of it, and `(B, K)`
            bool `boxes_valid`, `boxes_read` and so on; and `signal_image_index` `(B, K)` if it was given. Of a
            checkpoint that looks again `look_images`, the originals as a list of uint8 `(3, H, W)`, and
            `look_image_stats` `(2, 3)`, their mean and standard deviation; with `look_crops` also `look_pixel_values`
            `(crops, 3, S, S)` and `look_frames` `(B, N, 4)` float32.

        Raises:
            ValueError: naming the sample, whatever is wrong with an image or a signal, or their number.
        """
        given = {"boxes": boxes, "masks": masks, "points": points, **take_signal_inputs(kwargs)}
        if text is None:
            raise ValueError("The processor needs `text`; for images alone call `processor.image_processor`.")
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(one_text, str) for one_text in texts):
            raise ValueError(f"`text` is {text!r:.80}; expected a string or a list of strings")
        texts = list(texts)
        image_rows = self._load_images(images, texts)
        signals = self._signals(texts, image_rows, given, signal_image_index)
        flat_images = [image for row in image_rows for image in row] or None
        data = super().__call__(images=flat_images, text=texts, **kwargs).data
        for sample, (ids, one_text) in enumerate(zip(data["input_ids"], texts, strict=True)):
            found, expected = int((np.asarray(ids) == self.vis_token_id).sum()), one_text.count(VIS_TOKEN)
            if found != expected:
                raise ValueError(f"sample {sample}: {found} of {expected} {VIS_TOKEN} are left; truncate less")
        return_tensors = _tensor_type(data["input_ids"])
        signals |= self._given_looks(texts, image_rows, given, signals, signal_image_index, look_crops)
        if self.look_tokens and flat_images:
            data |= self._original_images(flat_images, return_tensors)
        if self.mask_image_size and flat_images:
            size = {"height": self.mask_image_size, "width": self.mask_image_size}
            finer = self._resize(flat_images, size=size, return_tensors=return_tensors)
            data["mask_pixel_values"] = finer["pixel_values"]
        return PerceptionBatch(
            {**data, **signals}, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion
        )

    def _load_images(self, images, texts: list[str]) -> list[list[Image.Image]]:
        """The images of each text, upright and RGB."""
        images = split_batches(images)
        counts = [text.count(IMAGE_TOKEN) for text in texts]
        if images is None:
            rows = [[] for _ in texts]
        elif isinstance(images, (list, tuple)) and images and all(isinstance(row, (list, tuple)) for row in images):
            rows = images
        else:
            flat = list(images) if isinstance(images, (list, tuple)) else [images]
            if len(flat) != sum(counts):
                raise ValueError(f"{len(flat)} images were given for {sum(counts)} {IMAGE_TOKEN} in the text")
            ends = np.cumsum(counts)
            rows = [flat[end - count : end] for count, end in zip(counts, ends, strict=True)]
        if len(rows) != len(texts):
            raise ValueError(f"`images` holds {len(rows)} lists for {len(texts)} texts")
        for sample, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if len(row) != count:
                raise ValueError(f"sample {sample}: {len(row)} images were given for {count} {IMAGE_TOKEN} in the text")
        loaded = {}  # an image that stands in many rows is read once
        for sample, row in enumerate(rows):
            for index, image in enumerate(row):
                if id(image) not in loaded:
                    loaded[id(image)] = self.load_image(image, f"sample {sample}, image {index}")
        return [[loaded[id(image)] for image in row] for row in rows]

    def _process_images(self, images, **kwargs):
        pixels = self._resize(images, **kwargs)
        return pixels, [self.replace_image_token(pixels, index, **kwargs) for index in range(len(images))]

    def _resize(self, images: list, **kwargs) -> BatchFeature:
        """What the image processor makes of images, of which one that stands in many rows is resized once."""
        unique = {id(image): image for image in images}
        pixels = self.image_processor(list(unique.values()), **kwargs)
        if len(unique) < len(images):
            numbers = {key: number for number, key in enumerate(unique)}
            index = [numbers[id(image)] for image in images]
            values = pixels["pixel_values"]
            pixels["pixel_values"] = [values[number] for number in index] if isinstance(values, list) else values[index]
        return pixels

    def load_image(self, image, name: str = "image") -> Image.Image:
        """
        An image as the model sees it before padding: upright, RGB, transparency on white.

        Args:
            image: whatever [`read_image`] reads: a path, a URL, bytes, base64, a PIL image, an array or a tensor.
            name (`str`): what errors call it.

        Raises:
            ValueError: there is no such image, it cannot be read, or it is too thin to survive resizing.
        """
        image = read_image(image, name)
        side = self.image_processor.size["height"]
        if min(image.size) * side < max(image.size):
            raise ValueError(
                f"{name}: {image.width} x {image.height} pixels are too thin, resized to {side} pixels its shorter "
                f"side is below one pixel; expected a ratio of at most {side}"
            )
        return image

    def _signals(self, texts, image_rows, given: dict, signal_image_index=None) -> dict[str, np.ndarray]:
        """
        The tensors of the checkpoint's signals, and `signal_image_index` if it was given, as arrays.

        Args:
            texts (`list[str]`), signal_image_index: as in [`__call__`].
            image_rows (`list[list[PIL.Image.Image]]`): the images of each text; only their sizes are read.
            given (`dict[str, list[list]]`): `boxes`, `masks` and so on, as in [`__call__`].
        """
        counts = [text.count(VIS_TOKEN) for text in texts]
        for signal in SIGNALS.values():
            for sample, row in enumerate(given.get(signal.plural) or []):
                if any(value is not None for value in row):
                    refuse_signal(signal.name, self.signals, f"sample {sample}: ")
        signals = [SIGNALS[name] for name in self.signals]
        columns = {signal.name: given.get(signal.plural) for signal in signals}
        columns["image"] = signal_image_index
        for name, rows in columns.items():
            keyword = SIGNALS[name].plural if name in SIGNALS else "signal_image_index"
            if rows is None:
                columns[name] = rows = [[None] * count for count in counts]
            if len(rows) != len(texts):
                raise ValueError(f"`{keyword}` holds {len(rows)} lists for {len(texts)} texts; expected one per text")
            for sample, (row, count) in enumerate(zip(rows, counts, strict=True)):
                if len(row) != count:
                    raise ValueError(f"sample {sample}: {len(row)} {keyword} for {count} {VIS_TOKEN} in the text")
        shape = (len(texts), max(counts, default=0))
        values = {signal.name: signal.empty(*shape, self.mask_size) for signal in signals}
        valid = {signal.name: np.zeros(shape, dtype=bool) for signal in signals}
        indices = np.zeros(shape, dtype=np.int64)
        for sample, text in enumerate(texts):
            images = image_rows[sample]
            markers = re.findall(f"{IMAGE_TOKEN}|{VIS_TOKEN}", text)
            before = [markers[:at].count(IMAGE_TOKEN) - 1 for at, token in enumerate(markers) if token == VIS_TOKEN]
            for slot, last in enumerate(before):
                item = {name: rows[sample][slot] for name, rows in columns.items()}
                index = last if item["image"] is None else item["image"]
                try:
                    height, width = self._size_of_slot(images, index)
                    if all(item[signal.name] is None for signal in signals):
                        raise ValueError(f"carries no signal; expected at least one of {', '.join(self.signals)}")
                    for signal in signals:
                        value = signal.complete(item[signal.name], item, height, width)
                        if value is not None:
                            values[signal.name][sample, slot] = signal.parse(value, height, width, self.mask_size)
                            valid[signal.name][sample, slot] = True
                except ValueError as error:
                    raise ValueError(f"sample {sample}, {VIS_TOKEN} {slot}: {error}") from error
                indices[sample, slot] = index
        tensors = {signal.plural: values[signal.name] for signal in signals}
        tensors |= {signal.valid_name: valid[signal.name] for signal in signals}
        tensors |= {signal.read_name: valid[signal.name].copy() for signal in signals}
        if any(index is not None for row in columns["image"] for index in row):
            tensors["signal_image_index"] = indices
        return tensors

    @staticmethod
    def _size_of_slot(images: list[Image.Image], index: int) -> tuple[int, int]:
        if not images:
            raise ValueError("a signal in a row without an image; expected an image before it")
        if index == -1:
            raise ValueError('stands before the first image of its row; move it, or say "image": n')
        if not isinstance(index, (int, np.integer)) or not 0 <= index < len(images):
            raise ValueError(f"belongs to image {index!r}, but its row has the images 0 to {len(images) - 1}")
        return images[index].height, images[index].width

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """
        As in the library, with signals in the content.

        Contents are strings or lists of `{"type": "image", "image": ..}`, `{"type": "text", "text": ..}`,
        `{"type": "box", "box": [x0, y0, x1, y1]}`, `{"type": "mask", "mask": ..}`, `{"type": "point", "point": [x, y]}`
        and `{"type": "region", ..}` with any of `box`, `mask` and `point` in one `<vis>`, in every role; and right
        behind one of these `{"type": "look", "crop": [x0, y0, x1, y1]}`, `None` for a look that saw no crop. A signal
        belongs to the last image before it unless it says `"image": n`. In the assistant's turns a mask without a box
        gets its tight box. Lists are joined to one string, with nothing in between, before the template sees them; a
        template that reads lists only, such as LLaVA's, gets that string as a text item, after one item for each image
        that opens the message. Where a template writes nothing after an answer, the answer ends with the tokenizer's
        end token. Where a template knows `enable_thinking`, it is off unless asked for.

        Returns:
            What [`__call__`] does, and with `return_assistant_tokens_mask=True` also `assistant_masks` `(B, L)`: 1 on
            the tokens of the assistant's turns, their end-of-turn tokens included.

        Raises:
            ValueError: `<image>` or `<vis>` inside a text, a malformed content item, a row whose assistant turns leave
                no token in the mask, a template whose answers cannot be told from their prompts.
        """
        if kwargs.get("sanitize_control_tokens"):
            raise ValueError(f"`sanitize_control_tokens` would take {IMAGE_TOKEN} and {VIS_TOKEN} out of their places.")
        template = self._chosen_template(chat_template)
        if "enable_thinking" in template:
            kwargs.setdefault("enable_thinking", False)
        if len(conversation) == 0:
            raise ValueError("The conversation is empty; expected at least one message.")
        conversations, is_batched = self._normalize_conversations(conversation)
        rows = [
            flatten_messages(sample, messages, self.signals, self.look_tokens, self.reenc_queries)
            for sample, messages in enumerate(conversations)
        ]
        form = chat_form(template, self.tokenizer)
        if form.problem:
            logger.warning_once(f"The chat template is not fit for conversations about images: {form.problem}.")
        end = None if form.ends_answers else self.tokenizer.eos_token
        is_open = bool(kwargs.get("continue_final_message"))
        texts = [shape_contents(end_answers(messages, end, is_open), form.content) for messages, _, _ in rows]
        if not tokenize:
            kwargs["add_generation_prompt"] = add_generation_prompt
            prompts = super().apply_chat_template(texts, template, **kwargs)
            return prompts if is_batched else prompts[0]

        processor_kwargs = dict(processor_kwargs or {})
        processor_kwargs.setdefault("images", [images for _, images, _ in rows])
        for name in (*self.signals, "image"):
            argument = SIGNALS[name].plural if name in SIGNALS else "signal_image_index"
            processor_kwargs[argument] = [[slot[name] for slot in slots] for _, _, slots in rows]
        looks = [[slot["look"] for slot in slots if "look" in slot] for _, _, slots in rows]
        if any("crop" in look for row in looks for look in row):
            processor_kwargs["look_crops"] = [[look["crop"] for look in row] for row in looks]
        wants_mask = return_assistant_tokens_mask and return_dict
        if wants_mask and not form.marks_answers:
            processor_kwargs |= {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        output = super().apply_chat_template(
            texts,
            template,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=return_dict,
            return_assistant_tokens_mask=wants_mask and form.marks_answers,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )
        if not wants_mask:
            return output
        if not form.marks_answers:
            kwargs.pop("return_tensors", None)

            def render(messages: list[dict], prompts_answer: bool) -> str:
                rendered = ProcessorMixin.apply_chat_template(
                    self, [messages], template, add_generation_prompt=prompts_answer, **kwargs
                )
                return rendered[0]

            spans = [answer_spans(sample, messages, render, end) for sample, messages in enumerate(texts)]
            output = self._adjust_assistant_masks_indices(output, spans)
            output.convert_to_tensors(_tensor_type(output["input_ids"]))
        for sample, (messages, mask) in enumerate(zip(texts, output["assistant_masks"], strict=True)):
            if any(message["role"] == "assistant" for message in messages) and not np.any(np.asarray(mask)):
                raise ValueError(
                    f"sample {sample}: no token of its assistant turns is left; the chat template drops them, or "
                    "truncation does"
                )
        return output

    def _chosen_template(self, name_or_template: str | None) -> str:
        """The text of a template: the processor's default, one that it keeps under a name, or the one that is given."""
        kept = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = kept.get(name_or_template or "default", name_or_template)
        if template is None:
            raise ValueError(f"None of the chat templates {sorted(kept)} is named 'default': pass `chat_template`.")
        return template

    def _adjust_assistant_masks_indices(self, processed_dict, generation_indices):
        # The library walks over the offsets one by one, which takes ten times as long over a tensor.
        processed_dict["offset_mapping"] = [np.asarray(row).tolist() for row in processed_dict["offset_mapping"]]
        return super()._adjust_assistant_masks_indices(processed_dict, generation_indices)

    def post_process_generation(
        self, output, target_sizes=None, threshold: float = 0.0, mask_format: str | None = "bool"
    ) -> list[dict]:
        """
        What `generate(..., return_dict_in_generate=True)` returned, as text and objects in pixels.

        Args:
            output (`ModelOutput`): `sequences` `(S, L)`, `object_valid`, `positions` `(S, K)`, `prompt_length`, and of
                each signal values and scores: `boxes` `(S, K, 4)`, `mask_logits` `(S, K, h, w)`, `points` `(S, K, 2)`,
                `object_scores`, `object_mask_scores`, `object_point_scores` `(S, K)`.
            target_sizes (*optional*): per sequence the (height, width) of its original image, or a list of them
                where it has several: what the model emits belongs to the last. Without it boxes are xyxy in 0..1
                of the padded square and masks are grids over that square.
            threshold (`float`): objects that score less are left out.
            mask_format: `"bool"`, `"rle"` (COCO, compressed), `"polygons"` (COCO, holes filled) or `None` for no masks.

        Returns:
            `list[dict]`, one per sequence:
            - **text** (`str`) -- the answer alone, without special tokens.
            - **objects** (`list[dict]`) -- `phrase` and `span`, its (start, end) in `text` (`None` for a bare
              `<vis>`), `box` as four floats and `score`, `mask` and `mask_score`, `point` as two floats and
              `point_score`, and `image`, the index of its image.
            - **boxes** `(N, 4)` float32, **masks** `(N, H, W)` bool (a list in other formats, `None` without),
              **points** `(N, 2)` float32, **scores** `(N,)` of the boxes, **text_labels** and **labels**, both the
              phrases.

            A checkpoint without a signal has none of its entries. One that looks again has **looks** (`list[dict]`):
            `kind`, `"look"`, or `"reenc"` where it encoded the whole image again; `box`, where it looked; `crop`, what
            it saw, xyxy in pixels of the original image (`None` if that would have been nearly all of it); `object`,
            the index of the object that it looked at; and `position` of the token in the sequence. An object that the
            model found again right behind a look is listed once, as it was found then.
        """
        check_mask_format(mask_format)
        values = output if isinstance(output, Mapping) else vars(output)
        signals = [SIGNALS[name] for name in self.signals]
        signals = [signal for signal in signals if values.get(signal.result_names[0]) is not None]
        first, *others = signals
        sequences = values["sequences"]
        if target_sizes is None:
            target_sizes = [None] * len(sequences)
        if len(target_sizes) != len(sequences):
            raise ValueError(
                f"`target_sizes` has {len(target_sizes)} entries for {len(sequences)} sequences; expected one for each"
            )
        results = []
        for row, ids in enumerate(sequences.tolist()):
            text, phrases = self._split_answer(ids, int(values["prompt_length"]))
            sizes = np.asarray([] if target_sizes[row] is None else target_sizes[row], dtype=np.int64).reshape(-1, 2)
            size = tuple(sizes[-1].tolist()) if len(sizes) else None
            image = self.last_image(ids, sizes)
            scores = {signal.name: values[signal.result_names[1]][row].float() for signal in signals}
            keep = values["object_valid"][row].bool() & ~(scores[first.name] < threshold)
            keep &= ~self._are_refined(ids, values["positions"][row])
            frames = values.get("object_frames")
            frames = {} if frames is None else {"frames": frames[row][keep]}
            presented = {
                signal.name: signal.present(values[signal.result_names[0]][row][keep], size, mask_format, **frames)
                for signal in signals
            }
            positions = values["positions"][row][keep].tolist()
            spans = [phrases.get(position) for position in positions]
            labels = [text[slice(*span)] if span else None for span in spans]
            columns = {
                "phrase": labels,
                "span": spans,
                first.name: presented[first.name][1],
                **{signal.score_name: scores[signal.name][keep].tolist() for signal in signals},
                **{signal.name: presented[signal.name][1] for signal in others},
                "image": [image] * len(labels),
            }
            result = {
                "text": text,
                "objects": [dict(zip(columns, found, strict=True)) for found in zip(*columns.values(), strict=True)],
                **{signal.plural: presented[signal.name][0] for signal in signals},
                "scores": scores[first.name][keep].cpu(),
                "text_labels": labels,
                "labels": list(labels),
            }
            if values.get("look_positions") is not None:
                result["looks"] = self._taken_looks(values, row, ids, size, positions)
            results.append(result)
        return results

    def _split_answer(self, ids: list[int], prompt_length: int) -> tuple[str, dict[int, tuple[int, int]]]:
        """The clean answer in a sequence, and at the position of each `<vis>` that has one its phrase's span in it."""
        reader, phrases = self.answer_reader(), {}
        for position in range(prompt_length, len(ids)):
            reader.read(ids[position])
            if ids[position] == self.vis_token_id and reader.phrase is not None:
                phrases[position] = reader.phrase
        return reader.text(), phrases

    def answer_reader(self) -> AnswerReader:
        """Reads one answer token by token."""
        return AnswerReader(self.tokenizer, self.vis_token_id, self.phrase_start_token_id, self.phrase_end_token_id)

    def last_image(self, ids: list[int], sizes) -> int:
        """The index of the image that objects of a sequence belong to, its tokens and the known sizes of its images."""
        return max(ids.count(self.image_token_id) // self.image_seq_length, len(sizes), 1) - 1

    def object_streamer(
        self, target_size=None, threshold: float = 0.0, mask_format: str | None = "bool", timeout: float | None = None
    ) -> ObjectIteratorStreamer:
        """For `generate(streamer=...)`: iterates over text and objects as they come, see [`ObjectIteratorStreamer`]."""
        return ObjectIteratorStreamer(self, target_size, threshold, mask_format, timeout)


def _tensor_type(values) -> str | None:
    return {torch.Tensor: "pt", np.ndarray: "np"}.get(type(values))


PerceptionGPTProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["PerceptionBatch", "PerceptionGPTProcessor"]
