"""The stage: a folder with exactly the files that a model repository on the Hub needs, and no others."""

import fnmatch
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open


MODEL_TYPE = "perceptiongpt"
CARD_NAME = "README.md"
EVALUATION_FOLDER = ".eval_results"
IMAGE_FOLDER = "images"
SPACE_FILE = "space.json"  # of a Space: the model that it shows

CONFIG_FILES = ("config.json", "generation_config.json")
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What an earlier publication may have left in a repository, and what would mislead a loader or a reader there.
OWN_FILES = (
    *CONFIG_FILES,
    *PROCESSOR_FILES,
    *WEIGHT_FILES,
    *ADAPTER_FILES,
    "*_perceptiongpt.py",
    f"{EVALUATION_FOLDER}/*.yaml",
    f"{IMAGE_FOLDER}/answers.jpg",
)

REASONS_LEFT_OUT = {
    "checkpoint-*": "state to resume training from",
    "adapter": "merged into the weights; --adapter_only publishes it alone",
    "recipe.yaml": "quoted in the card",
    "trainer_state.json": "log of the training",
    "losses.png": "log of the training",
    CARD_NAME: "a new card is generated; --card publishes a given one",
    "*.bin": "pickled: only safetensors are published",
    "*.pt": "pickled: only safetensors are published",
    "*.pth": "pickled: only safetensors are published",
}


class PublishError(ValueError):
    """Something that keeps a checkpoint from being published; the message is one line and says what to do."""


@dataclass
class Stage:
    """A staged repository.

    Attributes:
        folder: where its files are.
        left_out: by name, the reason why an entry of the source folder is not staged.
    """

    folder: Path
    left_out: dict[str, str] = field(default_factory=dict)

    def files(self) -> list[tuple[str, int]]:
        """(path in the repository, size in bytes) of every file, sorted."""
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted((path.relative_to(self.folder).as_posix(), path.stat().st_size) for path in paths)

    def table(self) -> str:
        """The files with their sizes, and what was left out."""
        files = self.files()
        lines = [f"{readable_size(size):>10}  {path}" for path, size in files]
        lines.append(f"{readable_size(sum(size for _, size in files)):>10}  in {len(files)} files")
        if self.left_out:
            lines.append("not published:")
            lines += [f"            {name} ({reason})" for name, reason in sorted(self.left_out.items())]
        return "\n".join(lines)


def readable_size(size: float) -> str:
    """Bytes with a unit, in powers of 1000 as the Hub counts."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def read_json(path: Path) -> dict:
    """The mapping in a JSON file.

    Raises:
        PublishError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise PublishError(f"{path} holds a {type(content).__name__}, expected a mapping")
    return content


def check_checkpoint(source: str | Path) -> dict:
    """Check that a folder holds a whole PerceptionGPT checkpoint.

    Returns:
        The content of its config.json.

    Raises:
        PublishError: a file is missing, unreadable or of another model; the message says what to do.
    """
    source = Path(source)
    if not source.is_dir():
        raise PublishError(f"{source} is not a folder")
    if not (source / "config.json").exists():
        unfinished = sorted(path.name for path in source.glob("checkpoint-*"))
        if unfinished:
            raise PublishError(
                f"{source} holds {unfinished[-1]} but no final model: finish it, `train.py --output {source} --resume`"
            )
        if (source / ADAPTER_FILES[0]).exists():
            raise PublishError(f"{source} is an adapter: publish the folder that holds it with --adapter_only")
        raise PublishError(f"{source} is not a checkpoint: it has no config.json")
    config = read_json(source / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise PublishError(f"{source} holds a model of the type {config.get('model_type')!r}, expected {MODEL_TYPE!r}")
    for name in ("auto_map", "custom_pipelines"):
        if name not in config:
            raise PublishError(f"{source}/config.json has no {name}: save the model again with save_pretrained")
    read_json(source / "processor_config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if not (source / name).exists() and not (name == "tokenizer.json" and (source / "tokenizer.model").exists()):
            raise PublishError(f"{source} has no {name}: save the processor there with save_pretrained")
    for path in weight_files(source):
        check_safetensors(path)
    return config


def weight_files(source: Path) -> list[Path]:
    """The safetensors of a checkpoint: one file, or the shards that its index names.

    Raises:
        PublishError: there are none, or a shard is missing.
    """
    single, index = source / WEIGHT_FILES[0], source / WEIGHT_FILES[2]
    if single.exists():
        return [single]
    if not index.exists():
        raise PublishError(f"{source} has no weights: neither {single.name} nor {index.name}")
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    missing = [name for name in names if not (source / name).exists()]
    if missing or not names:
        raise PublishError(f"{source}: {index.name} names shards that are missing: {', '.join(missing) or 'all'}")
    return [source / name for name in names]


def check_safetensors(path: Path) -> None:
    """Raise `PublishError` unless a safetensors file is whole."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise PublishError(f"{path} cannot be read ({error}): the file is damaged or was cut off") from error


def code_files(source: Path, *configs: dict) -> list[Path]:
    """The Python files that `auto_map` and `custom_pipelines` of the configs name, and those that they import.

    Raises:
        PublishError: one of them is missing.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    named = {target for config in configs for target in config.get("auto_map", {}).values()}
    named |= {pipeline["impl"] for config in configs for pipeline in config.get("custom_pipelines", {}).values()}
    found = set()
    for module in sorted({target.split(".")[0] for target in named}):
        path = source / f"{module}.py"
        if not path.exists():
            raise PublishError(f"{source} has no {path.name}, which its configuration names: save the model again")
        try:
            found |= {path, *map(Path, get_relative_import_files(path))}
        except OSError as error:
            raise PublishError(f"{source}: {path.name} imports a file that is missing: {error}") from error
    return sorted(found)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`; where the file system has no links, a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def named_files(source: Path, names: tuple[str, ...]) -> list[Path]:
    """Those of the named files that exist."""
    return [source / name for name in names if (source / name).is_file()]


def stage_checkpoint(source: str | Path, folder: str | Path) -> Stage:
    """Stage the code, weights, configuration, processor and tokenizer of a checkpoint.

    Args:
        source: a folder that `train.py` or `save_pretrained` wrote.
        folder: the stage; it is made, or must be empty.

    Raises:
        PublishError: the source is not a whole checkpoint, or the stage is not empty.
    """
    source = Path(source)
    config = check_checkpoint(source)
    files = [
        *named_files(source, (*CONFIG_FILES, *PROCESSOR_FILES)),
        *weight_files(source),
        *named_files(source, WEIGHT_FILES[2:] if not (source / WEIGHT_FILES[0]).exists() else ()),
        *code_files(source, config, read_json(source / "processor_config.json")),
        *sorted((source / EVALUATION_FOLDER).glob("*.yaml")),
    ]
    return fill_stage(source, folder, files)


def fill_stage(source: Path, folder: str | Path, files: list[Path]) -> Stage:
    """A stage of the given files of a source folder; every other entry of it is listed as left out."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise PublishError(f"the stage {folder} is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        # Scripts and weights may be links into a cache; only their place in the folder counts.
        link_or_copy(path, folder / path.relative_to(source))
    taken = {path.relative_to(source).parts[0] for path in files}
    left_out = {path.name: reason_left_out(path.name) for path in source.iterdir() if path.name not in taken}
    return Stage(folder, {name: reason for name, reason in left_out.items() if name != "__pycache__"})


def reason_left_out(name: str) -> str:
    matches = [reason for pattern, reason in REASONS_LEFT_OUT.items() if fnmatch.fnmatch(name, pattern)]
    return matches[0] if matches else "not part of a model repository"
