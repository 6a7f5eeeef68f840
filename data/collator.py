"""Rows of the schema -> one training batch: labels, what each `<vis>` is read as, jitter, packing, padding.

All randomness is drawn here, per row, from (seed, epoch, content of the row): the same row in the same epoch gets the
same draw, whatever batch, process or worker it is in. (A row of a stream says its `epoch` itself.) The click of a
`point_to_mask` row is among the draws: anywhere inside its object.
"""

import copy
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence

import torch
from datasets import List
from torch.utils.data import Dataset

from perceptiongpt.configuration_perceptiongpt import IMAGE_TOKEN, LOOK_PAD_TOKEN, REENC_TOKEN
from perceptiongpt.data.looks import Looks
from perceptiongpt.data.schema import describe_row, row_images, row_to_messages
from perceptiongpt.data.templates import stable_generator
from perceptiongpt.geometry_perceptiongpt import decode_mask, interior_point
from perceptiongpt.signals_perceptiongpt import FIRST_SIGNALS, SIGNALS


IGNORED_LABEL = -100
CLICK_TASK = "point_to_mask"
# At inference only boxes are fed back, so an answer is read as its box most of the time.
READ_PROBABILITIES = {"box": 0.6, "mask": 0.2, "both": 0.2}
# The keyword of `forward` that stands in for each kind of images.
TOWER_STATES = {"pixel_values": "tower_states", "mask_pixel_values": "mask_tower_states"}
AUTO = "auto"
AUTO_PACK = 8  # questions of an image in a row: see docs/training.md for what more and fewer cost


class PerceptionCollator:
    """Collate rows of the schema (`data/schema.py`), or lists of rows that share an image, into a batch.

    Args:
        processor: a `PerceptionGPTProcessor`.
        config: the model's config; needed for `pack` only, to tell what packing cannot do.
        seed: of all draws.
        box_jitter: standard deviation of the jitter on an answer's box where it is read, as a share of its side.
        read_probabilities: how often an answer's `<vis>` is read as which signals, `{"box": 0.5, "box+point": 0.5}`;
            `both` is `box+mask`. Of the signals drawn those count that the `<vis>` has; where it has none of them, and
            in prompts, it is read as whatever it has.
        pack: at most so many questions of one image share a row behind their image, under a block-diagonal mask:
            consecutive rows of the same image, or the lists that `group_rows_by_image` makes. None: no packing.
            `auto`: `AUTO_PACK`, or None where the language model cannot take such a mask (`choose_pack`).
        max_length: a longer row is an error (cutting it would cut signals off).
        cache_rows: keep so many processed rows in memory. Draws are made anew each time.
        mask_targets: with `pack`, learn at most so many masks of a packed row, drawn anew in each epoch, of those
            that have another signal, too: decoding masks takes most of a training step. None: all.
        feature_cache: a `training.features.FeatureCache`, from which images are taken that it has.
        looks: for a model that looks again (its config is needed, too) the arguments of `Looks`; None: its defaults.

    Returns (from a call):
        `input_ids`, `labels` (B, L), `attention_mask` (B, L) or, where a row holds several questions, bool
        (B, 1, L, L) with `position_ids` (B, L);
        `pixel_values` (images, 3, S, S); the signals of the processor (B, K, ...), see `forward`, with K = 0 for values
        that no row of the batch has, so that their modules need not run; `boxes_noise` (B, K, 4) float32, such that
        boxes + noise are valid boxes; with a finer mask path `mask_pixel_values` of those images of which a mask is
        wanted, and `mask_image_index` (images,), their rows in it or -1. With a feature cache `tower_states` stand in
        for `pixel_values` if it has all images of the batch; otherwise `pixel_values_keys` tell under which keys it
        wants them. The same for `mask_pixel_values`, with `mask_tower_states` and `mask_pixel_values_keys`. Where rows
        look again `look_pixel_values` (crops, 3, S, S) and `look_frames` (B, N, 4) float32.
    """

    def __init__(
        self,
        processor,
        config=None,
        seed: int = 0,
        box_jitter: float = 0.02,
        read_probabilities: dict[str, float] | None = None,
        pack: int | str | None = None,
        max_length: int | None = None,
        cache_rows: int = 0,
        mask_targets: int | None = None,
        feature_cache=None,
        looks: dict | None = None,
    ):
        self.readings, self.weights = parse_readings(
            READ_PROBABILITIES if read_probabilities is None else read_probabilities
        )
        if not 0 <= box_jitter <= 0.1:
            raise ValueError(f"box_jitter is a share of a box's side between 0 and 0.1, got {box_jitter}")
        self.processor = processor
        self.signals = [SIGNALS[name] for name in processor.signals]
        self.image_token_id, self.vis_token_id = processor.tokenizer.convert_tokens_to_ids(["<image>", "<vis>"])
        look_pads = [LOOK_PAD_TOKEN] if processor.look_tokens else []
        unwritten = processor.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, *look_pads])
        self.never_written = torch.tensor(unwritten)  # tokens that stand for images and crops
        reenc = processor.tokenizer.convert_tokens_to_ids(REENC_TOKEN)
        self.reenc_token_id = reenc if processor.reenc_queries else -1
        self.pad_token_id = processor.tokenizer.pad_token_id
        if self.pad_token_id is None:
            self.pad_token_id = processor.tokenizer.eos_token_id
        self.seed, self.box_jitter, self.draws_clicks = seed, box_jitter, True
        self.pack, self.window = choose_pack(pack, config)
        self.looks = None
        if getattr(config, "look_max", 0):
            self.looks = Looks(processor, config, **(looks or {}))
            if self.looks.drop and not takes_packed_mask(config):
                raise ValueError(
                    "looks.drop hides images by a 4-D mask, which flash attention cannot take: set it to 0"
                )
        elif looks:
            raise ValueError("collator.looks is for a model that looks again: `look_max` of its config is 0")
        self.is_auto, self.feature_cache = pack == AUTO, feature_cache
        self.max_length, self.cache_rows, self.mask_targets = max_length, cache_rows, mask_targets
        self._cache = OrderedDict()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by dataloader workers that live on

    def set_epoch(self, epoch: int) -> None:
        """Make the draws those of another epoch, here and in every running worker."""
        self._epoch.fill_(epoch)

    def length(self, row: dict) -> tuple[int, int]:
        """How many tokens a row will have, and how many of them come up to and with its last image.

        No image is opened: each `<image>` stands for `image_seq_length` tokens.
        """
        tokenizer = self.processor.tokenizer
        row = self._rewrite(row)
        text = self.processor.apply_chat_template(row_to_messages(row))
        starts = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not starts).input_ids
        images = [index for index, token in enumerate(ids) if token == self.image_token_id]
        more = len(images) * (self.processor.image_seq_length - 1)
        return len(ids) + more, images[-1] + 1 + more if images else 0

    def for_evaluation(self) -> "PerceptionCollator":
        """
        The same collator without draws: no jitter, all masks, clicks as they are stored, and answers read as at
        inference, by what is fed back, wherever they have it.
        """
        collator = copy.copy(self)
        fed_back = {signal.name for signal in self.signals if signal.fed_back}
        collator.box_jitter, collator.readings, collator.weights = 0.0, [fed_back], [1.0]
        collator.draws_clicks, collator.mask_targets = False, None
        collator.looks = None if self.looks is None else self.looks.for_evaluation()
        collator._cache = OrderedDict()
        return collator

    def _rewrite(self, row: dict) -> dict:
        """A row with the looks that it is to have."""
        return row if self.looks is None else self.looks.rewrite(row, self.seed, row.get("epoch", int(self._epoch)))

    def __call__(self, features: Sequence[dict | list[dict]]) -> dict[str, torch.Tensor]:
        features = [
            [self._rewrite(row) for row in feature] if isinstance(feature, list) else self._rewrite(feature)
            for feature in features
        ]
        if self.pack is None:
            rows = [self._encode(feature) for feature in features]
        else:
            rows = [row for group in self._groups(features) for row in self._pack(group)]
        if self.max_length is not None:
            for row in rows:
                if len(row["input_ids"]) > self.max_length:
                    raise ValueError(f"{row['name']}: {len(row['input_ids'])} tokens, max_length is {self.max_length}")
        return self._pad(rows)

    def _encode(self, row: dict, processed: dict | None = None) -> dict:
        """One row as unpadded tensors (no batch dimension), with its draws; `processed` where it is so already."""
        encoded = dict(self._process(row) if processed is None else processed)
        answer, valid = encoded["answer"], {signal.name: encoded[signal.valid_name] for signal in self.signals}
        identity = [row[key] for key in ("source", "image_id", "split", "task", "messages")]
        for name, signal in SIGNALS.items():
            # A column without values leaves the draws as they were before there was the column.
            values = row.get(signal.plural)
            if name in FIRST_SIGNALS or any(value is not None for value in values or []):
                identity.append(values)
        generator = stable_generator(self.seed, row.get("epoch", int(self._epoch)), identity)

        drawn = generator.choice(len(self.readings), size=len(answer), p=self.weights)
        chosen = {
            name: valid[name] & torch.tensor([name in self.readings[index] for index in drawn], dtype=torch.bool)
            for name in valid
        }
        is_drawn = answer & torch.stack(list(chosen.values())).any(0)
        for signal in self.signals:
            encoded[signal.read_name] = torch.where(is_drawn, chosen[signal.name], valid[signal.name])
            if signal.takes_noise:
                noise = signal.draw_noise(encoded[signal.plural], generator, self.box_jitter)
                stands_in = (answer & valid[signal.name]).reshape(-1, *[1] * (noise.ndim - 1))
                encoded[signal.noise_name] = noise * stands_in
        if self.draws_clicks and row["task"] == CLICK_TASK:
            encoded["points"] = self._draw_click(row, encoded, generator)
        return encoded if self.looks is None else self.looks.encode(row, encoded, generator)

    def _draw_click(self, row: dict, encoded: dict, generator) -> torch.Tensor:
        """The points of a row whose prompt is a click, with the click somewhere else inside the object."""
        (clicked,) = (~encoded["answer"]).nonzero().flatten().tolist()
        (asked_for,) = encoded["answer"].nonzero().flatten().tolist()
        height, width = row["height"], row["width"]
        click = interior_point(decode_mask(row["masks"][asked_for], height, width), generator)
        points = encoded["points"].clone()
        points[clicked] = torch.from_numpy(SIGNALS["point"].parse(click, height, width, self.processor.mask_size))
        return points

    def _process(self, row: dict) -> dict:
        """What does not change from epoch to epoch, kept for the last `cache_rows` rows."""
        if not self.cache_rows:
            return self._process_rows([row])[0]
        images = [(image.size, zlib.crc32(image.tobytes())) for image in row_images(row)]
        key = repr((images, row["messages"], [row.get(signal.plural) for signal in self.signals]))
        if key not in self._cache:
            (self._cache[key],) = self._process_rows([row])
            if len(self._cache) > self.cache_rows:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _process_rows(self, rows: list[dict]) -> list[dict]:
        """Rows without their draws, one call of the processor for all; the pixels of each are with it."""
        processor = self.processor
        batch = processor.apply_chat_template(
            [row_to_messages(row) for row in rows],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": len(rows) > 1, "padding_side": "right"},
        )
        lengths = batch["attention_mask"].sum(1).tolist()
        assistant = torch.as_tensor(batch["assistant_masks"]).bool()
        values_and_flags = [name for signal in self.signals for name in (signal.plural, signal.valid_name)]
        processed, images = [], 0
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            ids = batch["input_ids"][index, :length]
            supervised = assistant[index, :length] & ~torch.isin(ids, self.never_written)
            is_reenc = ids == self.reenc_token_id
            supervised[1:] &= ~(is_reenc[1:] & is_reenc[:-1])  # those behind the first are its pads
            if not supervised.any():
                raise ValueError(f"{describe_row(row)}: no token of the assistant is supervised: {row['messages']}")
            is_vis = ids == self.vis_token_id
            one = {key: batch[key][index, : int(is_vis.sum())] for key in values_and_flags}
            one["input_ids"] = ids
            one["labels"] = ids.where(supervised, torch.full_like(ids, IGNORED_LABEL))
            one["answer"] = supervised[is_vis]
            image_tokens = (ids == self.image_token_id).cumsum(0)
            one["slot_image"] = image_tokens[is_vis] // processor.image_seq_length - 1
            own_images = slice(images, images := images + len(row_images(row)))
            one |= {key: batch[key][own_images] for key in ("pixel_values", "mask_pixel_values") if key in batch}
            one["name"] = describe_row(row)
            processed.append(one)
        return processed

    def _process_packed(self, rows: list[dict]) -> list[dict]:
        """Rows about one image without their draws; the image is read and resized once."""
        if self.cache_rows or self.processor.tokenizer.pad_token_id is None:
            return [self._process(row) for row in rows]
        return self._process_rows([{**row, "image": rows[0]["image"]} for row in rows])

    def _groups(self, features) -> list[list[dict]]:
        groups = []
        for feature in features:
            rows = feature if isinstance(feature, list) else [feature]
            key = image_key(rows[0])
            packs = groups and not isinstance(feature, list) and key is not None and key == image_key(groups[-1][0])
            if packs and len(groups[-1]) < self.pack:
                groups[-1].extend(rows)
            else:
                groups.append(list(rows))
        return groups

    def _pack(self, rows: list[dict]) -> list[dict]:
        """Rows about one image as one row; with `auto`, questions that cannot share it get rows of their own."""
        encoded = [self._encode(row, done) for row, done in zip(rows, self._process_packed(rows), strict=True)]
        if not self.is_auto:
            return [self._join(encoded, rows)]
        groups = defaultdict(list)
        for index, one in enumerate(encoded):
            prefix = self._prefix(one)
            alone = prefix == 0 or (one["labels"][: prefix + 1] != IGNORED_LABEL).any()
            alone |= (one["input_ids"] == self.reenc_token_id).any()
            groups[index if alone else tuple(one["input_ids"][:prefix].tolist())].append(index)
        images = {key: encoded[0][key] for key in ("pixel_values", "mask_pixel_values") if key in encoded[0]}
        return [
            self._join([{**images, **encoded[index]} for index in group], [rows[index] for index in group])
            for group in groups.values()
        ]

    def _prefix(self, encoded: dict) -> int:
        """How many tokens of a row come up to and with its last image."""
        positions = (encoded["input_ids"] == self.image_token_id).nonzero()
        return int(positions[-1]) + 1 if len(positions) else 0

    def _join(self, encoded: list[dict], rows: list[dict]) -> dict:
        """Questions about one image behind its tokens, which are there once; each sees the image and itself."""
        ids, prefix = [row["input_ids"] for row in encoded], self._prefix(encoded[0])
        for row, other in zip(encoded, ids, strict=True):
            if len(rows) > 1 and (prefix == 0 or not torch.equal(other[:prefix], ids[0][:prefix])):
                raise ValueError(f"{row['name']}: does not begin with the same image as {encoded[0]['name']}")
            if len(rows) > 1 and (row["labels"][: prefix + 1] != IGNORED_LABEL).any():
                raise ValueError(f"{row['name']}: an answer directly behind the image cannot be packed")
            if len(rows) > 1 and (other == self.reenc_token_id).any():
                raise ValueError(f"{row['name']}: an answer that encodes its image again cannot be packed")
        lengths = [len(other) - prefix for other in ids]
        length = prefix + sum(lengths)
        if self.window is not None and length > self.window:
            raise ValueError(
                f"{encoded[0]['name']}: {length} packed tokens exceed the sliding window of {self.window}; "
                "pack fewer questions"
            )
        inputs = [name for signal in self.signals for name in signal.input_names]
        packed = {key: torch.cat([row[key] for row in encoded]) for key in (*inputs, "answer", "slot_image")}
        for key in ("input_ids", "labels"):
            packed[key] = torch.cat([encoded[0][key][:prefix], *(row[key][prefix:] for row in encoded)])
        for key in ("pixel_values", "mask_pixel_values"):
            if key in encoded[0]:
                packed[key] = encoded[0][key]
        question = torch.repeat_interleave(torch.arange(len(rows) + 1), torch.tensor([prefix, *lengths]))
        same_or_prefix = (question[:, None] == question[None, :]) | (question[None, :] == 0)
        packed["attention_mask"] = same_or_prefix & torch.ones(length, length, dtype=torch.bool).tril()
        if self.looks is not None:
            packed |= self._join_looks(encoded, prefix, lengths, packed)
        packed["position_ids"] = torch.cat(
            [torch.arange(prefix), *(torch.arange(prefix, prefix + block) for block in lengths)]
        )
        packed["name"], packed["questions"] = encoded[0]["name"], len(rows)
        if self.mask_targets is not None and {"mask"} < {signal.name for signal in self.signals}:
            self._limit_masks(packed, rows)
        return packed

    def _join_looks(self, encoded: list[dict], prefix: int, lengths: list[int], packed: dict) -> dict:
        """The crops of packed questions; images are hidden in the mask from those that do not see them."""
        is_image, start = packed["input_ids"] == self.image_token_id, prefix
        hides = False
        for row, length in zip(encoded, lengths, strict=True):
            if row["hidden_from"] is not None:
                first = start + row["hidden_from"] - prefix
                packed["attention_mask"][first : start + length, is_image] = False
                hides = True
            start += length
        pixels = [row["look_pixel_values"] for row in encoded if row["look_pixel_values"] is not None]
        frames = torch.cat([row["look_frames"] for row in encoded])
        return {"look_pixel_values": torch.cat(pixels) if pixels else None, "look_frames": frames, "hides": hides}

    def _limit_masks(self, packed: dict, rows: list[dict]) -> None:
        """Leave `mask_targets` of the answers' masks: neither are the others learned, nor are they read."""
        others = [signal for signal in self.signals if signal.name != "mask"]
        has_other = sum(packed[signal.valid_name] for signal in others) > 0
        found = (packed["answer"] & packed["masks_valid"] & has_other).nonzero()[:, 0]
        identity = [[row[key] for key in ("source", "image_id", "split", "messages")] for row in rows]
        generator = stable_generator(self.seed, rows[0].get("epoch", int(self._epoch)), "masks", identity)
        dropped = found[torch.from_numpy(generator.permutation(len(found))[self.mask_targets :])]
        packed["masks_valid"][dropped] = False
        for signal in others:  # what was read as its mask alone is read as what else it has
            alone = packed["masks_read"][dropped] & ~packed[signal.read_name][dropped]
            packed[signal.read_name][dropped] |= alone & packed[signal.valid_name][dropped]
        packed["masks_read"][dropped] = False

    def _pad(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        slots = max(len(row["answer"]) for row in rows)
        batch = {
            "input_ids": _stack([row["input_ids"] for row in rows], length, self.pad_token_id),
            "labels": _stack([row["labels"] for row in rows], length, IGNORED_LABEL),
        }
        for signal in self.signals:
            flags = (signal.valid_name, signal.read_name)
            batch |= {name: _stack([row[name] for row in rows], slots, 0) for name in flags}
            held = slots if batch[signal.valid_name].any() else 0
            for name in signal.input_names:
                if name not in flags:
                    batch[name] = _stack([row[name][:held] for row in rows], held, 0)
        if self.looks is not None:
            rows = [self._hide_images(row) for row in rows]
            pixels = [row["look_pixel_values"] for row in rows if row["look_pixel_values"] is not None]
            if pixels:
                batch["look_pixel_values"] = torch.cat(pixels)
                most = max(len(row["look_frames"]) for row in rows)
                batch["look_frames"] = _stack([row["look_frames"] for row in rows], most, 0)
        if not any(row.get("questions", 1) > 1 or row.get("hides") for row in rows):
            # A plain mask, which attention is fastest under.
            ones = [torch.ones_like(row["input_ids"]) for row in rows]
            batch["attention_mask"] = _stack(ones, length, 0)
        else:
            # A padding position sees itself: a row of a mask that allows nothing turns into NaN.
            mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
            for i, row in enumerate(rows):
                own = len(row["input_ids"])
                mask[i, :own, :own] = row.get("attention_mask", torch.ones(own, own, dtype=torch.bool).tril())
            batch["attention_mask"] = mask[:, None]
            positions = [row.get("position_ids", torch.arange(len(row["input_ids"]))) for row in rows]
            batch["position_ids"] = _stack(positions, length, 0)
        images = [row["pixel_values"] for row in rows if "pixel_values" in row]
        if images:
            self._add_images(batch, "pixel_values", torch.cat(images))
        self._add_mask_images(rows, batch)
        return batch

    def _hide_images(self, row: dict) -> dict:
        """A row by itself with a mask of its own, where some of its tokens do not see its images."""
        hidden_from = row.get("hidden_from")
        if hidden_from is None:
            return row
        length = len(row["input_ids"])
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        mask[hidden_from:, row["input_ids"] == self.image_token_id] = False
        return {**row, "attention_mask": mask, "hides": True}

    def _add_images(self, batch: dict, name: str, pixel_values: torch.Tensor) -> None:
        """Put images into a batch, or what the tower made of them if the feature cache has them all."""
        if self.feature_cache is not None:
            keys = self.feature_cache.keys(pixel_values)
            states = self.feature_cache.read(keys)
            if states is not None:
                batch[TOWER_STATES[name]] = states
                return
            batch[f"{name}_keys"] = keys
        batch[name] = pixel_values

    def _add_mask_images(self, rows: list[dict], batch: dict) -> None:
        """Keep the finer pixels of those images only of which a mask is wanted."""
        rows = [row for row in rows if "mask_pixel_values" in row]
        if not rows:
            return
        wanted = []
        for row in rows:
            of_image = [row[signal.valid_name] for signal in self.signals if signal.reads_image]
            targets = row["slot_image"][row["answer"] & torch.stack(of_image).any(0)]
            wanted.append(torch.isin(torch.arange(len(row["mask_pixel_values"])), targets))
        wanted = torch.cat(wanted)
        if wanted.any():
            self._add_images(batch, "mask_pixel_values", torch.cat([row["mask_pixel_values"] for row in rows])[wanted])
            batch["mask_image_index"] = (wanted.cumsum(0) - 1).where(wanted, torch.tensor(-1))


def parse_readings(read_probabilities: dict[str, float]) -> tuple[list[set[str]], list[float]]:
    """Sets of signals that an answer may be read as, and the probability of each.

    Raises:
        ValueError: unknown signals, or probabilities that do not add up to 1.
    """
    # In this order whatever the order given: the draws depend on it.
    names = [*READ_PROBABILITIES, *(name for name in read_probabilities if name not in READ_PROBABILITIES)]
    weights = [read_probabilities.get(name, 0.0) for name in names]
    readings = [{"box", "mask"} if name == "both" else set(name.split("+")) for name in names]
    if set().union(*readings) - set(SIGNALS) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(
            f"read_probabilities {read_probabilities} do not share 1 among {', '.join(SIGNALS)} and sums of them, such "
            "as box+mask"
        )
    return readings, weights


def _stack(tensors: list[torch.Tensor], length: int, value) -> torch.Tensor:
    """Stack tensors of unlike first dimension, padded at the end with `value`."""
    batch = tensors[0].new_full((len(tensors), length, *tensors[0].shape[1:]), value)
    for padded, tensor in zip(batch, tensors, strict=True):
        padded[: len(tensor)] = tensor
    return batch


def answer_slots(input_ids: torch.Tensor, labels: torch.Tensor, vis_token_id: int, slots: int) -> torch.Tensor:
    """Which signal slots are supervised: bool (B, slots), True where the label at the slot's `<vis>` is not -100.

    Args:
        input_ids, labels: of shape (B, L).
        vis_token_id: the id of `<vis>`.
        slots: K of the batch's signal tensors.
    """
    is_vis = input_ids == vis_token_id
    slot = (is_vis.cumsum(1) - 1).clamp(min=0)
    supervised = torch.zeros(len(input_ids), max(slots, 1), dtype=torch.int64, device=input_ids.device)
    supervised.scatter_add_(1, slot.clamp(max=max(slots, 1) - 1), (is_vis & (labels != IGNORED_LABEL)).long())
    return supervised[:, :slots] > 0


def image_key(row: dict) -> tuple | None:
    """What rows of the same image have in common; None for a row that cannot be packed (several images)."""
    if isinstance(row.get("image"), (list, tuple)) or row.get("image_id") is None:
        return None
    return row.get("source"), row.get("split"), row["image_id"]


def choose_pack(pack: int | str | None, config) -> tuple[int | None, int | None]:
    """What a recipe's `pack` comes to under a model's config.

    Args:
        pack: the most questions in a row; `auto`: `AUTO_PACK` where any row may be packed, that is under attention that
            takes a 4-D mask (eager, sdpa, flex) and has no sliding window; None: no packing.
        config: the model's config.

    Returns:
        the most questions in a row, None for no packing, and the most tokens in a packed row, None for any number.

    Raises:
        ValueError: `pack` is something else, or a number that this config does not allow (`packing_window`).
    """
    if pack is None:
        return None, None
    if pack == AUTO:
        if config is not None and not takes_packed_mask(config):
            return None, None
        return (AUTO_PACK if packing_window(config) is None else None), None
    if isinstance(pack, bool) or not isinstance(pack, int) or pack < 1:
        raise ValueError(
            f"pack is {pack!r}; expected {AUTO!r}, a number of questions from 1 on, or null for no packing"
        )
    return pack, packing_window(config)


def takes_packed_mask(config) -> bool:
    """Whether the attention of a config's language model takes a mask of its own for each row; flash does not."""
    return "flash" not in (getattr(config.get_text_config(), "_attn_implementation", None) or "")


def packing_window(config) -> int | None:
    """The longest row that may be packed under this config, or None for any.

    Raises:
        ValueError: without a config, or for flash attention, which takes no block-diagonal mask.
    """
    if config is None:
        raise ValueError("packing needs the model's config: PerceptionCollator(processor, config=model.config, ...)")
    text_config = config.get_text_config()
    if not takes_packed_mask(config):
        raise ValueError(
            f"packing needs a 4-D attention mask, which {text_config._attn_implementation!r} does not take; use 'sdpa'"
        )
    layer_types = getattr(text_config, "layer_types", None)
    slides = "sliding_attention" in layer_types if layer_types else getattr(text_config, "use_sliding_window", True)
    return getattr(text_config, "sliding_window", None) if slides else None


class GroupedRows(Dataset):
    """Lists of rows of one image; the image is opened once per list. Made by `group_rows_by_image`."""

    def __init__(self, dataset, groups: list[list[int]]):
        self.dataset, self.groups = dataset, groups
        self._without_image = dataset.remove_columns("image") if hasattr(dataset, "remove_columns") else dataset

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[dict]:
        first, *others = self.groups[index]
        first = self.dataset[first]
        return [first, *({**self._without_image[other], "image": first["image"]} for other in others)]


def group_rows_by_image(dataset, max_questions: int, seed: int = 0) -> GroupedRows:
    """Group the rows of a data set (or list of rows) by image, at most `max_questions` to a group.

    Rows belong together if source, split and image_id agree. The grouping depends on `seed` alone.
    """
    if max_questions < 1:
        raise ValueError(f"max_questions must be at least 1, got {max_questions}")
    names = ("source", "split", "image_id")
    if hasattr(dataset, "select_columns"):
        keys = [tuple(row[name] for name in names) for row in dataset.select_columns(list(names))]
        several = isinstance(dataset.features["image"], List)
    else:
        keys, several = [tuple(row[name] for name in names) for row in dataset], False
    images = defaultdict(list)
    for index, key in enumerate(keys):
        images[(index,) if several or key[-1] is None else key].append(index)
    groups = []
    for key, indices in images.items():
        order = stable_generator(seed, key).permutation(len(indices))
        indices = [indices[i] for i in order]
        groups.extend(indices[start : start + max_questions] for start in range(0, len(indices), max_questions))
    return GroupedRows(dataset, groups)
