"""Looks in what the processor takes and gives: crops in answers that are given, and looks that the model took."""

import re

import numpy as np
import torch
from PIL import Image

from .configuration_perceptiongpt import (
    IMAGE_TOKEN,
    LOOK_END_TOKEN,
    LOOK_PAD_TOKEN,
    LOOK_TOKEN,
    REENC_TOKEN,
    VIS_TOKEN,
)
from .geometry_perceptiongpt import boxes_from_square, decode_mask, mask_to_square
from .look_geometry_perceptiongpt import crop_frame, crop_mask


LOOK_PATTERN = re.compile(f"{re.escape(LOOK_TOKEN)}((?:{re.escape(LOOK_PAD_TOKEN)})*){re.escape(LOOK_END_TOKEN)}")
MARKERS = re.compile(f"{re.escape(IMAGE_TOKEN)}|{re.escape(VIS_TOKEN)}|{LOOK_PATTERN.pattern}")


def look_text(look_tokens: int) -> str:
    """What stands for a look in a text: `<look>`, a pad for each token of its crop, `</look>`."""
    return LOOK_TOKEN + LOOK_PAD_TOKEN * look_tokens + LOOK_END_TOKEN


def check_crop(crop, height: int, width: int) -> tuple[int, int, int, int]:
    """A crop as four ints; `ValueError` unless it is xyxy in whole pixels inside a `(height, width)` image."""
    try:
        left, top, right, bottom = (int(value) for value in crop)
        whole = [left, top, right, bottom] == list(crop)
    except (TypeError, ValueError):
        whole = False
    if not whole or not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"crop {crop!r:.80}: expected [x0, y0, x1, y1] in whole pixels of a {width} x {height} image, not empty"
        )
    return left, top, right, bottom


def reenc_text(reenc_queries: int) -> str:
    """What stands for an image that is encoded again in a text: `<reenc>`, and once more for each of its pads."""
    return REENC_TOKEN * (1 + reenc_queries)


class LookProcessorMixin:
    """
    What `PerceptionGPTProcessor` does for a checkpoint that looks again.

    Attributes:
        look_tokens (`int`): pads of a look, `config.look_tokens`; 0 for a checkpoint that does not look.
        look_frame (`str`): `config.look_frame`.
        reenc_queries (`int`): `config.reenc_queries`.
    """

    def _set_up_looks(self, look_tokens: int, look_frame: str, reenc_queries: int) -> None:
        self.look_tokens, self.look_frame, self.reenc_queries = look_tokens, look_frame, reenc_queries
        tokens = [LOOK_TOKEN, LOOK_END_TOKEN]
        self.look_token_id, self.look_end_token_id = self.tokenizer.convert_tokens_to_ids(tokens)
        resample = getattr(self.image_processor, "resample", None)
        if look_tokens and resample != Image.Resampling.BICUBIC:
            raise ValueError(
                f"The model resizes crops bicubically, the image processor has `resample` {resample!r}: expected "
                f"{int(Image.Resampling.BICUBIC)} of a checkpoint that looks again."
            )

    def to_dict(self) -> dict:
        """As in the library; the processor of a checkpoint that does not look says nothing of looks."""
        saved = super().to_dict()
        left_out = (*(() if self.look_tokens else ("look_",)), *(() if self.reenc_queries else ("reenc_",)))
        return {name: value for name, value in saved.items() if not name.startswith(left_out)}

    def _original_images(self, images: list[Image.Image], return_tensors: str | None) -> dict:
        """`look_images` and `look_image_stats` for `generate`."""
        arrays = {id(image): np.asarray(image).transpose(2, 0, 1).copy() for image in images}
        stats = np.array([self.image_processor.image_mean, self.image_processor.image_std], dtype=np.float32)
        if return_tensors == "pt":
            arrays, stats = {key: torch.from_numpy(array) for key, array in arrays.items()}, torch.from_numpy(stats)
        return {"look_images": [arrays[id(image)] for image in images], "look_image_stats": stats}

    def _given_looks(
        self, texts: list[str], image_rows, given: dict, signals: dict, signal_image_index, look_crops
    ) -> dict:
        """
        The tensors of looks that texts hold, as arrays. Masks of `signals` that belong into a crop are moved there.

        Args:
            texts, image_rows, given, signal_image_index: as in [`_signals`], whose result is `signals`.
            look_crops (`list[list]`, *optional*): as in [`__call__`].
        """
        if not self.look_tokens:
            if any(look_crops or []):
                raise ValueError("`look_crops` were given, but this checkpoint does not look again")
            return {}
        crops_of_rows, frames_of_rows = [], []
        for sample, text in enumerate(texts):
            looks = list(LOOK_PATTERN.finditer(text))
            if len(looks) != max(text.count(token) for token in (LOOK_TOKEN, LOOK_END_TOKEN)):
                raise ValueError(
                    f"sample {sample}: a look is {LOOK_TOKEN}, its pads and {LOOK_END_TOKEN}; the text holds other "
                    f"tokens of looks: {text[-80:]!r}"
                )
            if look_crops is not None and len(look_crops[sample]) != len(looks):
                raise ValueError(f"sample {sample}: {len(look_crops[sample])} `look_crops` for {len(looks)} looks")
            crops, frames = [], []
            for number, (look, slot, last_image) in enumerate(self._places(sample, text)):
                pads = len(look[1]) // len(LOOK_PAD_TOKEN)
                if look_crops is None:
                    if pads not in (0, self.look_tokens):
                        raise ValueError(f"sample {sample}, look {number}: {pads} pads; expected {self.look_tokens}")
                    continue
                crop = look_crops[sample][number]
                if pads != (self.look_tokens if crop is not None else 0):
                    raise ValueError(f"sample {sample}, look {number}: {pads} pads do not fit the crop {crop}")
                if crop is None:
                    continue
                index = signal_image_index[sample][slot] if signal_image_index is not None else None
                image = image_rows[sample][last_image if index is None else index]
                try:
                    crop = check_crop(crop, image.height, image.width)
                    if self.look_frame == "crop" and text.startswith(VIS_TOKEN, look.end()):
                        self._move_mask(signals, given, sample, slot + 1, crop, image)
                except ValueError as error:
                    raise ValueError(f"sample {sample}, look {number}: {error}") from error
                crops.append(image.crop(crop))
                frames.append(crop_frame(crop, image.height, image.width))
            crops_of_rows.append(crops)
            frames_of_rows.append(frames)
        flat = [crop for crops in crops_of_rows for crop in crops]
        if not flat:
            return {}
        frames = np.zeros((len(texts), max(map(len, frames_of_rows)), 4), dtype=np.float32)
        for row, own in zip(frames, frames_of_rows, strict=True):
            row[: len(own)] = np.asarray(own, dtype=np.float64).reshape(-1, 4)
        return {"look_pixel_values": self.crop_pixels(flat), "look_frames": frames}

    @staticmethod
    def _places(sample: int, text: str):
        """Each look of a text with the slot of the `<vis>` before it, and the image before that."""
        images = slots = 0
        vis_end = None
        for marker in MARKERS.finditer(text):
            if marker[0] == IMAGE_TOKEN:
                images += 1
            elif marker[0] == VIS_TOKEN:
                slots, vis_end = slots + 1, marker.end()
            elif marker.start() != vis_end:
                raise ValueError(f"sample {sample}: a look stands right behind the {VIS_TOKEN} that it is at")
            else:
                yield marker, slots - 1, images - 1

    def _move_mask(self, signals: dict, given: dict, sample: int, slot: int, crop, image: Image.Image) -> None:
        """Puts the mask of a slot that is decoded in a crop on that crop's square, where it is learned, not read."""
        if "mask" not in self.signals or not signals["masks_valid"][sample, slot]:
            return
        mask = crop_mask(decode_mask(given["masks"][sample][slot], image.height, image.width), crop)
        known = bool(mask.any())
        signals["masks_valid"][sample, slot] = known
        signals["masks_read"][sample, slot] = False
        signals["masks"][sample, slot] = mask_to_square(mask, self.mask_size) if known else 0

    def crop_pixels(self, crops: list[Image.Image]) -> np.ndarray:
        """`pixel_values` `(crops, 3, S, S)` of crops, which are images like any other."""
        return np.asarray(self._resize(crops, return_tensors="np")["pixel_values"])

    # ---- what the model did ------------------------------------------------------------------------------------------

    def _are_refined(self, ids: list[int], positions: torch.Tensor) -> torch.Tensor:
        """[`_is_refined`] for several positions."""
        refined = [self._is_refined(ids, position) for position in positions.tolist()]
        return torch.tensor(refined, dtype=torch.bool, device=positions.device)

    def _is_refined(self, ids: list[int], position: int) -> bool:
        """Whether the `<vis>` at a position was looked at and found again right behind that look."""
        follow = [self.look_token_id, self.look_end_token_id, self.vis_token_id]
        return bool(self.look_tokens) and ids[position + 1 : position + 4] == follow

    def _taken_looks(self, values, row: int, ids: list[int], size, positions: list[int]) -> list[dict]:
        """
        The looks of a sequence for the user.

        Args:
            values: the output of `generate`; `row` of it has the tokens `ids`.
            size (*optional*): (height, width) of its image.
            positions (`list[int]`): of its objects that are returned.
        """
        looks = []
        columns = (values[name][row].cpu() for name in ("look_positions", "look_boxes", "look_crops"))
        for position, box, crop in zip(*columns, strict=True):
            position = int(position)
            if position < 0:
                continue
            is_crop = ids[position] == self.look_token_id
            found = position + 2 if self._is_refined(ids, position - 1) else position - 1
            box = box if size is None else boxes_from_square(box, *size)
            looks.append(
                {
                    "kind": "look" if is_crop else "reenc",
                    "box": box.tolist(),
                    "crop": crop.tolist() if crop.any() else None,
                    "object": positions.index(found) if is_crop and found in positions else None,
                    "position": position,
                }
            )
        return looks


__all__ = ["LookProcessorMixin", "look_text", "reenc_text"]
