"""Benchmarks: what is asked of which data, and which metrics measure the answers."""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from perceptiongpt.data.scenes.dataset import FIRST_TEST_SEED
from perceptiongpt.data.sources import source_arguments
from perceptiongpt.evaluation.measures import MEASURES
from perceptiongpt.inference import InputError


BENCHMARKS_FOLDER = Path(__file__).parents[1] / "recipes" / "benchmarks"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; `recipes/benchmarks/referring.yaml` explains the keys.

    Attributes:
        metrics: module of `metrics/` -> the tasks that it measures (None: all).
        headline: "module/key" of the number that stands for the benchmark.
        splits: their names in the source; the first is the default.
    """

    name: str
    source: str
    metrics: dict[str, list[str] | None]
    headline: str
    arguments: dict = field(default_factory=dict)
    tasks: list[str] | None = None
    splits: list[str | None] = field(default_factory=lambda: [None])
    prompt: dict[str, str] = field(default_factory=dict)
    group: bool = False
    max_new_tokens: int = 128
    limit: int | None = None
    seed: int = 0
    hub_dataset: str | None = None
    note: str | None = None

    @property
    def headline_metric(self) -> str:
        return self.headline.split("/")[0]


BENCHMARK_KEYS = [one.name for one in fields(Benchmark) if one.name != "name"]


def read_benchmarks(folder: Path = BENCHMARKS_FOLDER) -> dict[str, Benchmark]:
    """The benchmarks of every YAML file in a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        found |= read_benchmark_file(path)
    return found


def read_benchmark_file(path: Path) -> dict[str, Benchmark]:
    """The benchmarks of one YAML file, by name.

    Raises:
        InputError: the file is not YAML, or a key, source or metric does not exist.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(values, dict) for values in given.values()):
        raise InputError(f"{path}: expected benchmarks by name, each a mapping")
    return {name: _make_benchmark(path, name, values) for name, values in given.items()}


def _make_benchmark(path: Path, name: str, values: dict) -> Benchmark:
    for key in values:
        if key not in BENCHMARK_KEYS:
            near = difflib.get_close_matches(key, BENCHMARK_KEYS, n=1) or BENCHMARK_KEYS
            raise InputError(f"{path}: {name} has the unknown key {key!r}; did you mean {', '.join(near)}?")
    source, metrics = values.get("source"), values.get("metrics")
    if not source or not metrics:
        raise InputError(f"{path}: {name} needs a source and metrics")
    metrics = metrics if isinstance(metrics, dict) else dict.fromkeys(metrics, values.get("tasks"))
    headline = values.get("headline") or next(iter(metrics))
    for module in (*metrics, headline.split("/")[0]):
        if module not in MEASURES:
            raise InputError(f"{path}: {name} asks for the metric {module!r}; there are {', '.join(MEASURES)}")
    try:
        source_arguments(source)
    except ValueError as error:
        raise InputError(f"{path}: {name}: {error}") from error
    return Benchmark(**{**values, "name": name, "metrics": metrics, "headline": headline})


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name, or the only one of a YAML file."""
    if name.endswith((".yaml", ".yml")):
        found = read_benchmark_file(Path(name))
        if len(found) != 1:
            raise InputError(f"--benchmark {name}: holds {len(found)} benchmarks, expected one: {', '.join(found)}")
        return next(iter(found.values()))
    known = read_benchmarks()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise InputError(f"--benchmark {name}: there is no such benchmark; {hint}")
    return known[name]


def choose_split(benchmark: Benchmark, split: str | None, seed: int) -> str | None:
    """The given split, else the benchmark's first; of scenes the one that the seed belongs to."""
    if split is None and benchmark.source == "scenes" and seed < FIRST_TEST_SEED:
        return benchmark.splits[-1]
    return split or benchmark.splits[0]
