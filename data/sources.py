"""The sources by name: every annotation format in `data/`, as a stream of checked rows or as a data set.

A source is a generator function of the arguments `COMMON_ARGUMENTS` and its own that yields rows of `data/schema.py`;
docs/data.md says how to add one.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets import Dataset, DatasetInfo, Features, load_dataset
from pyarrow import nulls
from pyarrow.parquet import read_schema
from pyarrow.types import is_list

from perceptiongpt.data.reading import Problems
from perceptiongpt.data.schema import describe_row, row_features, validate_row


# name -> module in this folder : function
SOURCES = {
    "coco": "formats.coco:coco_folder_rows",
    "coco_captions": "formats.coco_captions:coco_captions_rows",
    "coco_panoptic": "formats.coco_panoptic:coco_panoptic_rows",
    "lvis": "formats.lvis:lvis_rows",
    "refer": "formats.refer:refer_rows",
    "shikra_rec": "formats.shikra_rec:shikra_rec_rows",
    "minigpt4_rec": "formats.minigpt4_rec:minigpt4_rec_rows",
    "grefcoco": "formats.grefcoco:grefcoco_rows",
    "refcocos": "formats.refcocos:refcocos_rows",
    "reasonseg": "formats.reasonseg:reasonseg_rows",
    "visual_genome": "formats.visual_genome:visual_genome_rows",
    "flickr30k_entities": "formats.flickr30k_entities:flickr30k_entities_rows",
    "shikra_flickr": "formats.shikra_flickr:shikra_flickr_rows",
    "vqav2": "formats.vqav2:vqav2_rows",
    "okvqa": "formats.vqav2:okvqa_rows",
    "pope": "formats.pope:pope_rows",
    "llava": "formats.llava:llava_rows",
    "viscot": "formats.viscot:viscot_rows",
    "scenes": "scenes.dataset:scenes_rows",
    "hub": "formats.hub:hub_rows",
}
COMMON_ARGUMENTS = (
    "root",
    "split",
    "annotations",
    "images",
    "tasks",
    "seed",
    "evaluation",
    "limit",
    "problems",
)


def source_function(name: str) -> Callable[..., Iterator[dict]]:
    """The generator function of a source; `ValueError` for a name that is none of `SOURCES`."""
    if name not in SOURCES:
        raise ValueError(f"source {name!r} is none of {', '.join(SOURCES)}")
    module, function = SOURCES[name].split(":")
    return getattr(importlib.import_module(f"perceptiongpt.data.{module}"), function)


def source_arguments(name: str) -> dict[str, inspect.Parameter]:
    """The arguments that a source takes, by name."""
    return dict(inspect.signature(source_function(name)).parameters)


def default_split(name: str) -> str:
    """The split that a source takes if none is named: `test` for a test set, else mostly `train`."""
    return source_arguments(name)["split"].default


def source_help(name: str) -> tuple[str, dict[str, str]]:
    """From the docstring of a source: (what it yields, what each of its arguments means)."""
    function = source_function(name)
    summary, entries = _read_docstring(function)
    head = inspect.cleandoc(inspect.getmodule(function).__doc__ or "")
    return f"{head}\n\n{summary}", {
        argument: entries[argument] for argument in source_arguments(name) if argument in entries
    }


def _read_docstring(function: Callable, asked: tuple = ()) -> tuple[str, dict[str, str]]:
    """(what stands before `Args:`, entry per argument), with tasks and other listed names instead of their constant.

    What is "as in `x_rows`", or not described, is taken from the other function that the docstring names; `asked` are
    those that led here.
    """
    module = inspect.getmodule(function)

    def listed(match: re.Match) -> str:
        value = getattr(module, match[1], None)
        is_list = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        return ", ".join(value) if is_list else match[0]

    text = re.sub(r"`([A-Z_]+)`", listed, inspect.getdoc(function) or "")
    sources, entries = {place.split(":")[1]: source for source, place in SOURCES.items()}, {}
    for other in re.findall(r"`(\w+_rows)`", text):
        named = source_function(sources[other]) if other in sources else getattr(module, other, None)
        if named not in (None, function, *asked):
            entries = {**_read_docstring(named, (*asked, function))[1], **entries}
    summary, _, arguments = text.partition("\n\nArgs:\n")
    for found in re.finditer(r"^    ([a-z_, ]+): (.*(?:\n {8}.*)*)", arguments.split("\n\n")[0], re.MULTILINE):
        entry = " ".join(found[2].split())
        for argument in found[1].split(", "):
            if argument not in entries or "as in `" not in entry:
                entries[argument] = entry
    return summary, entries


def raw_rows(name: str, **arguments) -> Iterator[dict]:
    """The rows of a source before they are checked. Without a `root`, it is the folder of the annotations.

    Raises:
        ValueError: for an argument that the source does not take, or if it gets neither `root` nor `annotations`.
    """
    known = source_arguments(name)
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"source {name!r} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    if isinstance(arguments.get("annotations"), (str, Path)):
        arguments["annotations"] = [arguments["annotations"]]
    if known["root"].default is inspect.Parameter.empty and arguments.get("root") is None:
        if not arguments.get("annotations"):
            also = ", or annotations: the files themselves" if "annotations" in known else ""
            raise ValueError(f"source {name!r} needs a root: the folder with the files of that data set{also}")
        first = Path(arguments["annotations"][0])
        arguments["root"] = first if first.is_dir() else first.parent
    if isinstance(arguments.get("tasks"), str):
        arguments["tasks"] = [arguments["tasks"]]
    return source_function(name)(arguments.pop("root", None), **arguments)


def rows(name: str, **arguments) -> Iterator[dict]:
    """The rows of a source, each checked against the schema. A bad one raises, or is counted in `problems`.

    Args:
        name: one of `SOURCES`.
        arguments: of the source; `images=False` makes rows without images.
    """
    problems = arguments.setdefault("problems", Problems())
    with_images = arguments.get("images") is not False
    for index, row in enumerate(raw_rows(name, **arguments)):
        try:
            yield validate_row(row, index, with_images)[0]
        except ValueError as error:
            problems.report(describe_row(row, index), error, "row breaks the schema")


def load_source(source: str = "coco", **arguments) -> Dataset:
    """The rows of a source, or of a prepared folder (`source="parquet"`, `root`, `split`), as a `datasets.Dataset`."""
    features = row_features()
    if source == "parquet":
        files = prepared_files(**arguments)
        schema = read_schema(files[0])
        several = is_list(schema.field("image").type)
        features = row_features(several)
        there = {name: features[name] for name in features if name in schema.names}  # no others, such as label_masks'
        dataset = load_dataset(
            "parquet", data_files=files, split="train", features=Features(there), columns=list(there)
        )
        table = dataset.data
        for name in set(features) - set(there):  # points, in a folder from before there were any
            table = table.append_column(name, nulls(len(dataset), features.arrow_schema.field(name).type))
        # Made anew, since the cache knows a plain `datasets.Image` only.
        return Dataset(table, DatasetInfo(features=features))
    found = list(rows(source, **arguments))
    return Dataset.from_dict({name: [row[name] for row in found] for name in features}, features=features)


def prepared_files(root: str | Path, split: str = "train") -> list[str]:
    """The shards of one split of a prepared folder, in order; `ValueError` if there are none or some are missing."""
    found = list(Path(root).glob(f"{split}-[0-9]*.parquet"))  # `test-*` would be the shards of `test-dev`, too
    found = found or [path for path in Path(root).glob(f"{split}-*.parquet") if "-of-" not in path.name]
    files = sorted(map(str, found))
    if not files:
        there = {re.sub(r"(-\d+-of)?-[^-]*$", "", path.stem) for path in Path(root).glob("*-*.parquet")}
        there = f"there are the splits {', '.join(sorted(there))}" if there else "there is no other split either"
        raise ValueError(
            f"{root}: holds no {split}-*.parquet ({there}); make them with python -m perceptiongpt.data.prepare"
        )
    expected = [f"{split}-{index:05d}-of-{len(files):05d}.parquet" for index in range(len(files))]
    if "-of-" in files[0] and [Path(file).name for file in files] != expected:
        raise ValueError(f"{root}: the shards of {split!r} are not whole: {[Path(file).name for file in files][:5]}")
    return files
