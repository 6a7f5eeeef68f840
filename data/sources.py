"""The sources by name: every annotation format of `data/` as a stream of checked rows, or as a data set.

A source is a generator function of the arguments `COMMON_ARGUMENTS` and its own that yields rows of `data/schema.py`;
docs/data.md says how to add one.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

from datasets import Dataset, load_dataset
from pyarrow.parquet import read_schema
from pyarrow.types import is_list

from perceptiongpt.data.reading import Problems
from perceptiongpt.data.schema import describe_row, row_features, validate_row


# name -> module in this folder : function
SOURCES = {
    "coco": "coco:coco_folder_rows",
    "coco_captions": "coco_captions:coco_captions_rows",
    "coco_panoptic": "coco_panoptic:coco_panoptic_rows",
    "lvis": "lvis:lvis_rows",
    "refer": "refer:refer_rows",
    "shikra_rec": "shikra_rec:shikra_rec_rows",
    "minigpt4_rec": "minigpt4_rec:minigpt4_rec_rows",
    "grefcoco": "grefcoco:grefcoco_rows",
    "refcocos": "refcocos:refcocos_rows",
    "reasonseg": "reasonseg:reasonseg_rows",
    "visual_genome": "visual_genome:visual_genome_rows",
    "flickr30k_entities": "flickr30k_entities:flickr30k_entities_rows",
    "shikra_flickr": "shikra_flickr:shikra_flickr_rows",
    "vqav2": "vqav2:vqav2_rows",
    "okvqa": "vqav2:okvqa_rows",
    "pope": "pope:pope_rows",
    "llava": "llava:llava_rows",
    "viscot": "viscot:viscot_rows",
    "scenes": "scenes:scenes_rows",
    "hub": "hub:hub_rows",
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


def raw_rows(name: str, **arguments) -> Iterator[dict]:
    """The rows of a source before they are checked.

    Raises:
        ValueError: for an argument that the source does not take, or a `root` that it needs.
    """
    known = source_arguments(name)
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"source {name!r} takes no {', '.join(unknown)}; it takes {', '.join(known)}")
    if known["root"].default is inspect.Parameter.empty and arguments.get("root") is None:
        raise ValueError(f"source {name!r} needs a root: the folder with the files of that data set")
    if isinstance(arguments.get("annotations"), str):
        arguments["annotations"] = [arguments["annotations"]]
    if isinstance(arguments.get("tasks"), str):
        arguments["tasks"] = [arguments["tasks"]]
    return source_function(name)(arguments.pop("root", None), **arguments)


def rows(name: str, **arguments) -> Iterator[dict]:
    """The rows of a source, each checked against the schema. A bad one raises, or is counted in `problems`.

    Args:
        name: one of `SOURCES`.
        arguments: of the source; `images=False` makes rows without pictures.
    """
    problems = arguments.setdefault("problems", Problems())
    with_images = arguments.get("images") is not False
    for index, row in enumerate(raw_rows(name, **arguments)):
        try:
            yield validate_row(row, index, with_images)[0]
        except ValueError as error:
            problems.report(describe_row(row, index), str(error), "row breaks the schema")


def load_source(source: str = "coco", **arguments) -> Dataset:
    """The rows of a source, or of a prepared folder (`source="parquet"`, `root`, `split`), as a `datasets.Dataset`."""
    features = row_features()
    if source == "parquet":
        files = prepared_files(**arguments)
        several = is_list(read_schema(files[0]).field("image").type)
        features = row_features(several)  # and no further columns, such as those of label_masks
        return load_dataset("parquet", data_files=files, split="train", features=features, columns=list(features))
    found = list(rows(source, **arguments))
    return Dataset.from_dict({name: [row[name] for row in found] for name in features}, features=features)


def prepared_files(root: str | Path, split: str = "train") -> list[str]:
    """The shards of one split of a prepared folder, in order; `ValueError` if there are none or some are missing."""
    found = list(Path(root).glob(f"{split}-[0-9]*.parquet"))  # `test-*` would be the shards of `test-dev`, too
    found = found or [path for path in Path(root).glob(f"{split}-*.parquet") if "-of-" not in path.name]
    files = sorted(map(str, found))
    if not files:
        raise ValueError(f"{root}: holds no {split}-*.parquet; make them with python -m perceptiongpt.data.prepare")
    expected = [f"{split}-{index:05d}-of-{len(files):05d}.parquet" for index in range(len(files))]
    if "-of-" in files[0] and [Path(file).name for file in files] != expected:
        raise ValueError(f"{root}: the shards of {split!r} are not whole: {[Path(file).name for file in files][:5]}")
    return files
