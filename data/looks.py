"""Looks in training: which answers look again, at what, and what the model is shown there.

A row of the schema marks a look with `<look>` right behind the `<vis>` that it is at; what follows may rest on it, and
a `<vis>` right behind it is the same object, found again. The box that the look is at stands in for a prediction: it is
moved and scaled, and the crop is cut around what became of it, as at inference.
"""

import math
import re
from collections.abc import Sequence

import torch

from perceptiongpt.configuration_perceptiongpt import LOOK_MARKER, REENC_MARKER, VIS_TOKEN
from perceptiongpt.data.schema import describe_row, row_images
from perceptiongpt.data.templates import stable_generator
from perceptiongpt.geometry_perceptiongpt import (
    boxes_from_square,
    boxes_to_square,
    decode_mask,
    mask_to_square,
    tight_box,
)
from perceptiongpt.look_geometry_perceptiongpt import crop_frame, crop_mask, look_crop
from perceptiongpt.signals_perceptiongpt import SIGNALS


LOOK = VIS_TOKEN + LOOK_MARKER
WRONG_SIDES = (0.05, 0.4)  # least and largest side of the box of a wrong look, as a share of the square


class Looks:
    """
    The looks of a collator's rows.

    Args:
        processor, config: of the model that is trained; `config.look_max` must not be 0.
        below: targets smaller than this share of their image's longer side are looked at and found again; None: only
            rows that mark their looks have any.
        scale: least and largest factor, log-uniform, by which the box of a look is scaled.
        shift: by how much of its side it is moved at most, in each direction.
        wrong: how often a row's first look is somewhere else, None for 0.1. It is followed by the right one, where
            the answer may have one look more, or else by what the first view shows. Always 0 with `look_frame: crop`:
            what lies outside a crop cannot be said in its frame.
        drop: how often tokens behind a look that is not wrong do not see the first view.
    """

    def __init__(
        self,
        processor,
        config,
        below: float | None = None,
        scale: tuple[float, float] = (0.8, 2.0),
        shift: float = 0.25,
        wrong: float | None = None,
        drop: float = 0.3,
    ):
        in_crops = config.look_frame == "crop"
        wrong = (0.0 if in_crops else 0.1) if wrong is None else wrong
        low, high = scale
        if not 0 < low <= high or not 0 <= shift <= 0.5 or not 0 <= wrong <= 1 or not 0 <= drop <= 1:
            raise ValueError(
                f"looks: scale {scale}, shift {shift}, wrong {wrong}, drop {drop}; expected two factors above 0, a "
                "share of at most 0.5, and two probabilities"
            )
        if below is not None and not 0 < below <= 1:
            raise ValueError(f"looks: below is a share of the image's side in 0..1, got {below}")
        if wrong and in_crops:
            raise ValueError("looks: wrong looks need `look_frame: image`; set looks.wrong to 0")
        self.processor, self.config = processor, config
        self.below, self.scale, self.shift, self.wrong, self.drop = below, (low, high), shift, wrong, drop

    def for_evaluation(self) -> "Looks":
        """The same looks without draws: at what the row says, and the first view is seen."""
        return Looks(self.processor, self.config, self.below, (1.0, 1.0), 0.0, 0.0, 0.0)

    # ---- which rows look ---------------------------------------------------------------------------------------------

    def rewrite(self, row: dict, seed: int = 0, epoch: int = 0) -> dict:
        """A row with its looks: those that `below` adds, and perhaps a wrong one (`wrong_look`)."""
        if self.below is not None and not any(LOOK_MARKER in message["content"] for message in row["messages"]):
            row = self._look_at_small_targets(row)
        contents = [message["content"] for message in row["messages"]]
        for content in contents:
            count = self._count(content)
            if count > self.config.look_max:
                most = self.config.look_max
                raise ValueError(f"{describe_row(row)}: {count} looks in an answer, `look_max` of the model is {most}")
        first = next((index for index, content in enumerate(contents) if LOOK in content), None)
        if first is None or not self.wrong:
            return row
        identity = [row[key] for key in ("source", "image_id", "split", "task", "messages")]
        if stable_generator(seed, epoch, "wrong look", identity).random() >= self.wrong:
            return row
        content = contents[first]
        if self._count(content) < self.config.look_max:
            slot = ("".join(contents[:first]) + content[: content.index(LOOK)]).count(VIS_TOKEN)
            messages = list(row["messages"])
            messages[first] = {**messages[first], "content": content.replace(LOOK, LOOK + LOOK, 1)}
            return {**_repeat_slots(row, [slot]), "messages": messages, "wrong_look": True}
        is_found_again = content[content.index(LOOK) + len(LOOK) :].startswith(VIS_TOKEN)
        return {**row, "wrong_look": True} if is_found_again else row

    @staticmethod
    def _count(content: str) -> int:
        """How often an answer looks, in either way."""
        return content.count(LOOK) + content.count(REENC_MARKER)

    def _look_at_small_targets(self, row: dict) -> dict:
        """Each small target of an answer, unless it has too many, looked at and found again."""
        if len(row_images(row)) > 1:
            return row
        longest = max(row["width"], row["height"])
        slot, small, messages = 0, [], []
        for message in row["messages"]:
            pieces = re.split(f"({re.escape(VIS_TOKEN)})", message["content"])
            slots = range(slot, slot := slot + len(pieces) // 2)
            found = [one for one in slots if message["role"] == "assistant" and self._is_small(row, one, longest)]
            if len(found) + self._count(message["content"]) <= self.config.look_max:
                small += found
                for one in found:
                    pieces[2 * (one - slots.start) + 1] = LOOK + VIS_TOKEN
            messages.append({**message, "content": "".join(pieces)})
        return {**_repeat_slots(row, small), "messages": messages} if small else row

    def _is_small(self, row: dict, slot: int, longest: int) -> bool:
        box, mask = row["boxes"][slot], row["masks"][slot]
        if box is None and mask is not None:
            box = tight_box(decode_mask(mask, row["height"], row["width"]))
        return box is not None and max(box[2] - box[0], box[3] - box[1]) < self.below * longest

    # ---- what they are at --------------------------------------------------------------------------------------------

    def encode(self, row: dict, encoded: dict, generator) -> dict:
        """
        A row of the collator with the crops of its looks.

        Args:
            row: the row, after [`rewrite`].
            encoded: its tensors, with pads for a crop at every look; its draws are made.
            generator: draws boxes, and whether the first view is seen.

        Returns:
            The tensors with `look_pixel_values` `(crops, 3, S, S)`, `look_frames` `(crops, 4)` and `hidden_from`, the
            position from which on tokens do not see images (None: all see them). A look whose crop would be nearly the
            whole image has lost its pads.
        """
        config, encoded = self.config, dict(encoded)
        ids = encoded["input_ids"]
        starts = (ids == config.look_token_id).nonzero()[:, 0].tolist()
        encoded |= {"look_pixel_values": None, "look_frames": torch.zeros(0, 4), "hidden_from": None}
        if not starts:
            return encoded
        for signal in map(SIGNALS.get, self.processor.signals):  # these tensors may be shared with other epochs
            for name in signal.input_names:
                encoded[name] = encoded[name].clone()
        slot_of = (ids == config.vis_token_id).cumsum(0) - 1
        kept = torch.ones(len(ids), dtype=torch.bool)
        crops, frames, seen = [], [], []
        images = [self.processor.load_image(image) for image in row_images(row)]
        for number, start in enumerate(starts):
            slot = int(slot_of[start])
            image = images[int(encoded["slot_image"][slot])]
            if not encoded["answer"][slot] or not encoded["boxes_valid"][slot]:
                raise ValueError(
                    f"{describe_row(row)}: a look is at a {VIS_TOKEN} of an answer that has a box or a mask"
                )
            is_wrong = number == 0 and bool(row.get("wrong_look"))
            box = self._wrong_box(image, generator) if is_wrong else self._moved_box(encoded["boxes"][slot], generator)
            self._read_as_box(encoded, slot)
            encoded["boxes_noise"][slot] = box - encoded["boxes"][slot]
            size = image.height, image.width
            crop = look_crop(boxes_from_square(box, *size).tolist(), *size, config.look_margin, config.look_min_side)
            if crop is None:
                kept[start + 1 : start + 1 + config.look_tokens] = False
                continue
            crops.append(image.crop(crop))
            frames.append(crop_frame(crop, *size))
            seen.append(start)
            end = start + config.look_tokens + 1
            if config.look_frame == "crop" and end + 1 < len(ids) and ids[end + 1] == config.vis_token_id:
                self._into_crop(row, encoded, slot + 1, crop, size)
        if crops:
            encoded["look_pixel_values"] = torch.from_numpy(self.processor.crop_pixels(crops))
            encoded["look_frames"] = torch.tensor(frames)
            if self.drop and not row.get("wrong_look") and generator.random() < self.drop:
                encoded["hidden_from"] = int(kept[: seen[0] + config.look_tokens + 2].sum())
        for name in ("input_ids", "labels"):
            encoded[name] = encoded[name][kept]
        return encoded

    def _moved_box(self, box: torch.Tensor, generator) -> torch.Tensor:
        """A box as a prediction of it might be, inside the square."""
        low, high = map(math.log, self.scale)
        shift = torch.tensor(generator.uniform(-self.shift, self.shift, 2), dtype=torch.float32)
        scale = math.exp(generator.uniform(low, high))
        side = box[2:] - box[:2]
        centre = (box[2:] + box[:2]) / 2 + shift * side
        moved = torch.cat([centre - scale * side / 2, centre + scale * side / 2])
        return box if self.scale == (1.0, 1.0) and not self.shift else moved.clamp(0, 1)

    @staticmethod
    def _wrong_box(image, generator) -> torch.Tensor:
        """A square anywhere in an image."""
        longest = max(image.size)
        side = min(generator.uniform(*WRONG_SIDES) * longest, *image.size)
        x, y = (generator.uniform(0, length - side) for length in image.size)
        return boxes_to_square([x, y, x + side, y + side], image.height, image.width)

    def _read_as_box(self, encoded: dict, slot: int) -> None:
        for signal in map(SIGNALS.get, self.processor.signals):
            encoded[signal.read_name][slot] = signal.name == "box"

    def _into_crop(self, row: dict, encoded: dict, slot: int, crop, size: tuple[int, int]) -> None:
        """A slot that is decoded in a crop: read as its box, and its mask lies on the crop's square."""
        self._read_as_box(encoded, slot)
        encoded["boxes_read"][slot] = encoded["boxes_valid"][slot]
        if encoded.get("masks_valid") is None or not encoded["masks_valid"][slot]:
            return
        mask = crop_mask(decode_mask(row["masks"][slot], *size), crop)
        encoded["masks_valid"][slot] = known = bool(mask.any())
        square = mask_to_square(mask, self.processor.mask_size) if known else 0 * encoded["masks"][slot].numpy()
        encoded["masks"][slot] = torch.from_numpy(square)


def _repeat_slots(row: dict, slots: Sequence[int]) -> dict:
    """A row in which the values of some slots stand twice, one behind the other."""
    columns = {}
    for signal in SIGNALS.values():
        values = row.get(signal.plural)
        if values:
            columns[signal.plural] = [value for slot, value in enumerate(values) for _ in range(1 + (slot in slots))]
    return {**row, **columns}
