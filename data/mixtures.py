"""Training on several sources at once: an endless, interleaved, resumable stream of batches.

A mixture is a list of parts. Each is a prepared folder, or a source by name, which is prepared first:

    data:
      train:
        mixture:
          - {source: parquet, root: prepared/refcoco, split: train, weight: 2}
          - {source: visual_genome, root: vg, weight: 1, per_epoch: 100000}
        leave_out: [refer]          # folders of the RefCOCO family: images of its val and test splits are not used

In an epoch every part gives each of its rows once, or `per_epoch` of them (other rows in the next epoch). `weight` is
the proportion in which the parts are drawn. `datasets.interleave_datasets` orders references to rows, so resuming
reads none of the rows that are skipped.
"""

import json
import re
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, interleave_datasets
from pyarrow import compute, parquet
from torch.utils.data import get_worker_info

from perceptiongpt.data.collator import image_key
from perceptiongpt.data.leakage import LeftOutImages, refcoco_family_eval_images
from perceptiongpt.data.prepare import prepare
from perceptiongpt.data.scenes.dataset import ScenesDataset
from perceptiongpt.data.schema import describe_row, row_features, row_images
from perceptiongpt.data.sources import default_split, prepared_files
from perceptiongpt.data.templates import stable_generator
from perceptiongpt.images_perceptiongpt import read_image


MIXTURE_DEFAULTS = {
    "mixture": None,
    "seed": 0,
    "leave_out": [],  # files or folders for `refcoco_family_eval_images`
    # Visual Genome's image_data.json: COCO's numbers of its images, which llava and viscot use, too.
    "image_data": None,
    "stopping_strategy": "all_exhausted_without_replacement",  # of `datasets.interleave_datasets`
    "token_budget": None,  # most tokens of a batch, with padding; None: `per_device_train_batch_size` rows
    "window": 512,  # rows among which rows of similar length, or of one image, are grouped
    "cache": None,  # where sources by name are prepared; default: OUTPUT/prepared
}
PART_KEYS = ("weight", "per_epoch", "questions")  # `questions` is for `DrawnPart` only
PREPARE_KEYS = ("pictures", "num_proc", "on_error", "rows_per_shard")  # passed on to `prepare`
CACHED_GROUPS = 2  # row groups that a part keeps in memory


class Part:
    """The rows of one prepared folder that may be trained on.

    Args:
        name: for messages.
        files: its parquet files.
        weight: how often it is drawn, relative to the other parts.
        per_epoch: the most rows in an epoch; None: all.
        is_left_out: takes a row's source, `image_id` and image paths; returns whether to leave the row out.
    """

    def __init__(
        self,
        name: str,
        files: list[str],
        weight: float = 1.0,
        per_epoch: int | None = None,
        is_left_out: Callable[[str, str, tuple[str | None, ...]], bool] | None = None,
    ):
        if not weight > 0 or (per_epoch is not None and per_epoch < 1):
            raise ValueError(f"{name}: weight {weight} and per_epoch {per_epoch} must be above 0")
        self.name, self.weight, self.per_epoch = name, float(weight), per_epoch
        self.groups = []  # (file, its row group)
        groups, rows, images = [], [], set()
        self.left_out_rows = self.unanswered_rows = 0
        for file in files:
            content = parquet.ParquetFile(file, pre_buffer=False)
            for group in range(content.num_row_groups):
                count = content.metadata.row_group(group).num_rows
                if _lacks_images(content.metadata.row_group(group)):
                    raise ValueError(f"{name}: {file} was prepared without its images and cannot be trained on")
                kept = np.flatnonzero(_are_answered(content, group)).astype(np.int32)
                self.unanswered_rows += count - len(kept)
                if is_left_out is not None:
                    keys = _images_of(content, group)
                    left_out = {key for key in dict.fromkeys(keys) if is_left_out(*key)}
                    stays = [keys[row] not in left_out for row in kept]
                    images |= left_out
                    self.left_out_rows += len(stays) - sum(stays)
                    kept = kept[stays]
                rows.append(kept)
                groups.append(np.full(len(kept), len(self.groups), dtype=np.int32))
                self.groups.append((file, group))
        self.left_out_images = len(images)
        self._group = np.concatenate(groups) if groups else np.zeros(0, np.int32)
        self._row = np.concatenate(rows) if rows else np.zeros(0, np.int32)
        self._tables = OrderedDict()
        if not len(self):
            reasons = f"{self.left_out_rows} were left out, {self.unanswered_rows} have no answer"
            raise ValueError(f"{name}: has no rows to train on; {reasons}")

    def __len__(self) -> int:
        return len(self._row)

    def epoch(self, seed: int, epoch: int, by_image: bool) -> tuple[np.ndarray, np.ndarray]:
        """(group, row) of an epoch's rows, in its random order: of row groups, and of rows or images within each."""
        starts = np.flatnonzero(np.diff(self._group, prepend=-1))
        blocks = np.split(np.arange(len(self)), starts[1:])
        generator = stable_generator(seed, self.name, epoch)
        chosen, count = [], 0
        for index in generator.permutation(len(blocks)):
            block = blocks[index]
            if by_image:
                block = self._by_image(block, generator)
            else:
                block = generator.permutation(block)
            chosen.append(block)
            count += len(block)
            if self.per_epoch is not None and count >= self.per_epoch:
                break
        order = np.concatenate(chosen)[: self.per_epoch]
        return self._group[order], self._row[order]

    def _by_image(self, block: np.ndarray, generator) -> np.ndarray:
        images = self._table(self._group[block[0]]).column("image_id").to_pylist()
        rows_of = defaultdict(list)
        for index in block:
            rows_of[images[self._row[index]]].append(index)
        rows_of = list(rows_of.values())
        return np.concatenate([rows_of[i] for i in generator.permutation(len(rows_of))])

    def _table(self, group: int):
        if group not in self._tables:
            file, index = self.groups[group]
            content = parquet.ParquetFile(file, pre_buffer=False)
            columns = [name for name in row_features() if name in content.schema_arrow.names]
            self._tables[group] = content.read_row_group(index, columns, use_threads=False)
            if len(self._tables) > CACHED_GROUPS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(group)
        return self._tables[group]

    def read(self, group: int, row: int) -> dict:
        """A row as it is stored; its image is not read yet."""
        return self._table(group).slice(row, 1).to_pylist()[0]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_tables": OrderedDict()}


def _lacks_images(group) -> bool:
    """Whether no row of a row group has an image, embedded or by path, according to its metadata."""
    columns = [group.column(index) for index in range(group.num_columns)]
    columns = [column for column in columns if column.path_in_schema in ("image.bytes", "image.path")]
    found = [column.statistics and column.statistics.null_count == group.num_rows for column in columns]
    return bool(found) and all(found)


def _are_answered(content: parquet.ParquetFile, group: int) -> np.ndarray:
    """Whether each row of a group has a turn of the assistant; questions alone are for evaluation."""
    (roles,) = (path for path in (column.path for column in content.schema) if re.fullmatch(r"messages\..*role", path))
    messages = content.read_row_group(group, [roles], use_threads=False).column("messages").combine_chunks()
    of_assistant = compute.equal(compute.struct_field(messages.flatten(), "role"), "assistant")
    rows = compute.list_parent_indices(messages).to_numpy()
    answered = np.zeros(len(messages), dtype=bool)
    answered[rows[of_assistant.to_numpy(zero_copy_only=False)]] = True
    return answered


def _images_of(content: parquet.ParquetFile, group: int) -> list[tuple[str, str, tuple[str | None, ...]]]:
    """(source, `image_id`, paths of the images) of each row of a group; embedded images are not read."""
    paths = [name for name in (column.path for column in content.schema) if re.fullmatch(r"image\..*\bpath", name)]
    rows = content.read_row_group(group, ["source", "image_id", *paths], use_threads=False).to_pylist()
    return [
        (row["source"], row["image_id"], tuple(image["path"] if image else None for image in row_images(row)))
        for row in rows
    ]


class DrawnPart:
    """Scenes that are drawn during training, different ones in every epoch.

    Args:
        name, weight: as in `Part`.
        per_epoch: the number of rows in an epoch.
        questions: the number of rows per image.
        arguments: arguments of `ScenesDataset`.
    """

    left_out_rows = left_out_images = unanswered_rows = 0

    def __init__(self, name: str, weight: float = 1.0, per_epoch: int = 10_000, questions: int = 1, **arguments):
        if not weight > 0 or per_epoch < questions:
            raise ValueError(f"{name}: weight {weight} must be above 0, per_epoch {per_epoch} at least {questions}")
        self.name, self.weight, self.per_epoch, self.questions = name, float(weight), per_epoch, questions
        self.dataset = ScenesDataset(2**31 - 1, questions=questions, **arguments)
        self._drawn = (None, [])

    def __len__(self) -> int:
        return self.per_epoch

    def epoch(self, seed: int, epoch: int, by_image: bool) -> tuple[np.ndarray, np.ndarray]:
        """(image, question) of an epoch's rows."""
        row = np.arange(self.per_epoch)
        first = epoch * -(-self.per_epoch // self.questions)
        return (first + row // self.questions).astype(np.int32), (row % self.questions).astype(np.int32)

    def read(self, group: int, row: int) -> dict:
        """A row with its image. Questions about a scene of which there are fewer than asked for come again."""
        if self._drawn[0] != group:
            self._drawn = (group, self.dataset[group])
        rows = self._drawn[1]
        return rows[row % len(rows)]


class Mixture(torch.utils.data.IterableDataset):
    """An endless stream of batches (lists of rows, or of lists of rows of one image) over several parts.

    Each process and each of its dataloader workers draws its own rows; together they draw an epoch's rows exactly once.
    Use it with `DataLoader(mixture, batch_size=None, collate_fn=MixtureCollator(collator))`.

    Args:
        parts: the parts to mix.
        batch_size: items in a batch, if there is no `token_budget`.
        token_budget: the most tokens in a batch, with padding; rows of similar length then share a batch.
        length: returns of a row the number of its tokens, and of those up to and with its last image. Needed for
            `token_budget`.
        pack: the most rows of one image that make an item (a list); None: each row is an item.
        window: rows among which rows of similar length or of one image are grouped.
        seed, stopping_strategy: see `MIXTURE_DEFAULTS`.
        process, processes: the index of this process, and how many there are.
    """

    def __init__(
        self,
        parts: list[Part | DrawnPart],
        batch_size: int = 8,
        token_budget: int | None = None,
        length: Callable[[dict], tuple[int, int]] | None = None,
        pack: int | None = None,
        window: int = 512,
        seed: int = 0,
        stopping_strategy: str = "all_exhausted_without_replacement",
        process: int = 0,
        processes: int = 1,
    ):
        if token_budget is not None and length is None:
            raise ValueError("a token budget needs a function that gives the length of a row")
        self.parts, self.batch_size, self.token_budget, self.length = parts, batch_size, token_budget, length
        self.pack, self.seed, self.stopping_strategy = pack, seed, stopping_strategy
        self.window = window if pack or token_budget else batch_size
        self.process, self.processes = process, processes
        self._state = {"workers": None, "next_worker": 0, "states": {}}

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """The position of this process behind the batches that `took` was called for; json can hold it."""
        return {"processes": self.processes, **json.loads(json.dumps(self._state))}

    def load_state_dict(self, state: dict) -> None:
        """Continue behind the last batch of `state`, which another process or run may have written.

        Raises:
            ValueError: if it was made with another number of processes. (Workers are checked when they start.)
        """
        if state["processes"] != self.processes:
            raise ValueError(
                f"the stream was saved by {state['processes']} processes and cannot be continued by {self.processes}"
            )
        self._state = {key: state[key] for key in self._state}

    def took(self, state: str) -> None:
        """Note that the batch with this `state` has been used."""
        state = json.loads(state)
        worker, workers = state.pop("worker"), state.pop("workers")
        self._state["workers"], self._state["next_worker"] = workers, (worker + 1) % workers
        self._state["states"][str(worker)] = state

    # ---- stream ------------------------------------------------------------------------------------------------------

    def references(self, epoch: int, consumer: int = 0, consumers: int = 1):
        """The rows of one consumer in one epoch as a streaming `datasets.IterableDataset` of (part, group, row)."""
        streams, weights = [], []
        for index, part in enumerate(self.parts):
            groups, rows = part.epoch(self.seed, epoch, self.pack is not None)
            groups, rows = (np.array_split(values, consumers)[consumer] for values in (groups, rows))
            if len(rows):
                columns = {"part": np.full(len(rows), index, dtype=np.int32), "group": groups, "row": rows}
                streams.append(Dataset.from_dict(columns).to_iterable_dataset())
                weights.append(part.weight)
        if not streams:
            raise ValueError(f"{sum(map(len, self.parts))} rows are too few for {consumers} processes and workers")
        drawn = stable_generator(self.seed, "order", epoch, consumer)
        return interleave_datasets(
            streams,
            probabilities=(np.array(weights) / sum(weights)).tolist(),
            seed=int(drawn.integers(2**31)),
            stopping_strategy=self.stopping_strategy,
        )

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        if self._state["workers"] not in (None, workers):
            raise ValueError(
                f"the stream was left with {self._state['workers']} dataloader workers and cannot be taken up with "
                f"{workers}; set training.dataloader_num_workers"
            )
        # `datasets` would share the stream among the workers a second time, and leave all but one with nothing.
        torch.utils.data._utils.worker._worker_info = None
        # The loader asks its workers in turn, from the first on: that one goes on where it is the next one's turn.
        worker = (worker + self._state["next_worker"]) % workers
        state = self._state["states"].get(str(worker), {"epoch": 0, "stream": None, "served": 0})
        epoch, served = state["epoch"], state["served"]
        while True:
            stream = self.references(epoch, self.process * workers + worker, self.processes * workers)
            if state["stream"] is not None:
                stream.load_state_dict(state["stream"])
            iterator = iter(stream)
            start = state["stream"]
            while window := [self._read(reference, epoch) for reference in islice(iterator, self.window)]:
                batches, end = self._cut(window, epoch), stream.state_dict()
                for index, batch in enumerate(batches[served:], served + 1):
                    # Behind the last batch of a window the next one begins; behind another, this one is read again.
                    is_last = index == len(batches)
                    place = {"stream": end if is_last else start, "served": 0 if is_last else index}
                    place = json.dumps({"epoch": epoch, **place, "worker": worker, "workers": workers})
                    yield {"rows": [open_images(item) for item in batch], "state": place}
                start, served = end, 0
            epoch, state = epoch + 1, {"stream": None}

    def _read(self, reference: dict, epoch: int) -> dict:
        return {**self.parts[reference["part"]].read(reference["group"], reference["row"]), "epoch": epoch}

    def _cut(self, rows: list[dict], epoch: int) -> list[list]:
        """Rows -> batches of rows, or of lists of rows of one image."""
        items = rows
        if self.pack is not None:
            rows_of = defaultdict(list)
            for index, row in enumerate(rows):
                rows_of[image_key(row) or index].append(row)
            items = [
                found[start : start + self.pack]
                for found in rows_of.values()
                for start in range(0, len(found), self.pack)
            ]
        if self.token_budget is None:
            return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        lengths = [self._length(item) for item in items]
        batches, batch = [], []
        for index in np.argsort(lengths, kind="stable"):  # from short to long: the last one is the longest
            if lengths[index] > self.token_budget:
                row = items[index] if self.pack is None else items[index][0]
                raise ValueError(f"{describe_row(row)}: {lengths[index]} tokens, the budget is {self.token_budget}")
            if batch and (len(batch) + 1) * lengths[index] > self.token_budget:
                batches.append(batch)
                batch = []
            batch.append(items[index])
        batches.append(batch)
        order = stable_generator(self.seed, "batches", epoch, len(rows), lengths).permutation(len(batches))
        return [batches[index] for index in order]

    def _length(self, item: dict | list[dict]) -> int:
        if isinstance(item, dict):
            return self.length(item)[0]
        lengths = [self.length(row) for row in item]
        return lengths[0][1] + sum(length - prefix for length, prefix in lengths)


class MixtureCollator:
    """A collator for the batches of a `Mixture`. It adds `stream_state`, for `Mixture.took` once the batch is used."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, batch: dict) -> dict:
        return {**self.collator(batch["rows"]), "stream_state": batch["state"]}


def open_images(item: dict | list[dict]) -> dict | list[dict]:
    """Read the image of a row, or the one that a list of rows shares."""
    if isinstance(item, list):
        first = open_images(item[0])
        return [first, *({**row, "image": first["image"]} for row in item[1:])]
    images = []
    for stored in row_images(item):
        if stored is None:
            raise ValueError(f"{describe_row(item)}: was prepared without its image and cannot be trained on")
        images.append(read_image(stored, describe_row(item)) if isinstance(stored, dict) else stored)
    return {**item, "image": images if isinstance(item["image"], list) else images[0]}


# ---- from a recipe ---------------------------------------------------------------------------------------------------


def load_parts(settings: dict, cache: str | Path) -> list[Part | DrawnPart]:
    """The parts of a recipe's mixture (`MIXTURE_DEFAULTS`).

    Sources by name are prepared under `cache` first; `scenes` are drawn while training.

    Raises:
        ValueError: for whatever is wrong with a part, or if Visual Genome's images cannot be compared with those to
            be left out for want of `image_data`.
    """
    is_left_out = None
    if settings["leave_out"]:
        paths = [settings["leave_out"]] if isinstance(settings["leave_out"], str) else settings["leave_out"]
        is_left_out = LeftOutImages(refcoco_family_eval_images(*paths), settings["image_data"])
    parts = []
    names = Counter()
    for entry in settings["mixture"]:
        entry = dict(entry)
        source, own = entry.pop("source", "coco"), {key: entry.pop(key) for key in PART_KEYS if key in entry}
        if source == "scenes":
            if "root" in entry:
                entry["photos"] = entry.pop("root")
            try:
                parts.append(DrawnPart(source, **own, **entry))
            except TypeError as error:
                raise ValueError(f"scenes in a mixture: {error}") from error
            continue
        if "questions" in own:
            raise ValueError(f"{source}: only scenes, which are drawn while training, take questions")
        if source == "parquet":
            root, split = entry["root"], entry.get("split", "train")
        else:
            split = entry.get("split") or default_split(source)
            digest = blake2b(json.dumps(entry, sort_keys=True, default=str).encode(), digest_size=6).hexdigest()
            root = Path(cache) / f"{source}-{digest}"
            prepare(source, root, **entry)
        name = Path(root).name if source == "parquet" else source
        names[name] += 1
        name = name if names[name] == 1 else f"{name} ({names[name]})"
        parts.append(Part(name, prepared_files(root, split), is_left_out=is_left_out, **own))
    return parts


def print_parts(parts: list[Part]) -> None:
    """Print the parts, and how many rows and images each leaves out."""
    total = sum(part.weight for part in parts)
    print(f"{'':<28}{'':>12}{'rows of':>12}{'':>9}{'rows':>12}{'images':>12}")
    print(f"{'part':<28}{'rows':>12}{'an epoch':>12}{'drawn':>9}{'left out':>12}{'left out':>12}")
    for part in parts:
        epoch = min(len(part), part.per_epoch or len(part))
        share = f"{part.weight / total:.1%}"
        print(
            f"{part.name:<28}{len(part):>12,}{epoch:>12,}{share:>9}{part.left_out_rows:>12,}{part.left_out_images:>12,}"
        )
    for part in parts:
        if part.unanswered_rows:
            print(f"{part.name}: {part.unanswered_rows:,} rows without an answer are left out")
