"""One run over a benchmark: samples, predictions, numbers, files."""

import argparse
import functools
import json
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download

from perceptiongpt.data.reading import Problems
from perceptiongpt.data.schema import ONE_OBJECT_TASKS
from perceptiongpt.evaluation import reporting
from perceptiongpt.evaluation.answers import PREDICTIONS, answer, answer_teacher_forced, predict_all
from perceptiongpt.evaluation.benchmarks import Benchmark, find_benchmark
from perceptiongpt.evaluation.measures import FIRST_OBJECT, MEASURES, TEACHER_FORCED, metrics_without_reference
from perceptiongpt.evaluation.predictions import given_predictions, references
from perceptiongpt.evaluation.results import Scorer
from perceptiongpt.evaluation.samples import complete_options, describe_samples, is_scenes_bench, read_samples
from perceptiongpt.evaluation.scenes_bench import bench_details
from perceptiongpt.inference import InputError, check_name, checkpoint_hash, load


RUN_FILE = "run.json"
# What has to be the same for two runs to have the same predictions.
RUN_KEYS = (
    "model", "checkpoint_sha256", "revision", "benchmark", "split", "data", "images", "annotations", "seed", "prompt",
    "max_new_tokens", "dtype", "ground",
)  # fmt: skip
LONGEST_WAIT = timedelta(days=7)  # for the other processes: one may be done long before another
PACKAGES = ("perceptiongpt", "torch", "transformers", "pycocotools")


MAIN, GREY, FORCED = "main", "grey_image", "teacher_forced"  # passes over the samples; the last two have a folder each


def validate(options: argparse.Namespace, command: str) -> dict | None:
    """Run one benchmark and write everything to `options.output`.

    Args:
        options: of `validate.py`.
        command: the command line, for the summary.

    Returns:
        The summary; None in processes other than the first.

    Raises:
        InputError: the user has to correct something; found before the model is loaded where possible.
    """
    benchmark = find_benchmark(options.benchmark)
    if options.teacher_forced and not TEACHER_FORCED & set(benchmark.metrics):
        names = " or ".join(sorted(TEACHER_FORCED))
        raise InputError(f"--teacher_forced: needs a benchmark that is measured by {names}; {benchmark.name} is not")
    if options.ground:
        check_ground(benchmark)
    if options.model:
        check_name(options.model)
    complete_options(options, benchmark)

    # Without `cpu`, processes that torchrun starts on a machine without accelerator would not form a group.
    on_cpu = str(options.device) == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)
    problems = Problems()
    samples = read_samples(benchmark, options, problems)
    output = Path(options.output or Path("outputs", f"{benchmark.name}_{options.split}".replace("/", "_")))
    run = {}
    if state.is_main_process:
        run = describe_run(options, benchmark, samples)
        check_run(output, run, options.overwrite)
    state.wait_for_everyone()

    absent = metrics_without_reference(benchmark.metrics, samples)
    measured = {name: tasks for name, tasks in benchmark.metrics.items() if name not in absent}
    scorer = Scorer(measured, options.threshold, not options.no_intervals)
    model, others = None, 0
    if options.predictions:
        entries, others = given_predictions(Path(options.predictions), samples)
        passes = {MAIN: (samples, entries)}
    else:
        model, processor = load(options.model, str(options.device or state.device), options.dtype)
        passes = answer_passes(model, processor, benchmark, samples, scorer, output, options, state)
    if not state.is_main_process:
        return None

    _, entries = passes.pop(MAIN)
    result = scorer.score(samples, entries)
    summary = {
        "benchmark": benchmark.name,
        "checkpoint": run["model"],
        "checkpoint_sha256": run["checkpoint_sha256"],
        "revision": run["revision"],
        "command": command,
        "split": options.split,
        "n": len(samples),
        "predictions_without_sample": others,
        "images": len({sample["image_id"] for sample in samples}),
        "seed": options.seed,
        "prompt": run["prompt"],
        "decoding": describe_decoding(options),
        "resolution": {"compared at": "original image"},
        "threshold": {"score": options.threshold, "mask": "logit > 0"},
        "max_new_tokens": options.max_new_tokens,
        "note": benchmark.note,
        "data": {
            "source": benchmark.source,
            "root": options.data,
            "annotations": options.annotations,
            "images": options.images,
            "left out": dict(problems.counts),
        },
        "versions": {name: version(name) for name in PACKAGES},
    }
    if model is not None:
        summary["resolution"] |= model_resolution(model.config)
        summary |= {"dtype": str(model.dtype), "device": str(model.device), "batch_size": options.batch_size}
        summary["processes"] = state.num_processes
    summary |= result.summary() | {"not_measured": absent}
    for name, (some, beside) in passes.items():
        chosen = TEACHER_FORCED if name == FORCED else set(measured)
        modules = {module: tasks for module, tasks in measured.items() if module in chosen}
        found = Scorer(modules, options.threshold, not options.no_intervals).score(some, beside).summary()
        summary[name] = {key: found[key] for key in ("metrics", "intervals", "n_of_metric", "n_of_number")}
    if is_scenes_bench(options.split):
        summary |= bench_details(samples, result, options)
    reporting.write(output, benchmark, summary, samples, entries, result, options.hub_dataset)
    return summary


def answer_passes(
    model,
    processor,
    benchmark: Benchmark,
    samples: list[dict],
    scorer: Scorer,
    output: Path,
    options: argparse.Namespace,
    state: PartialState,
) -> dict[str, tuple[list[dict], dict[str, dict]]]:
    """The samples and their predictions of each pass: the model's own answers, and what is measured beside them."""
    headline = benchmark.headline_metric

    def run_pass(title: str, folder: Path, how: Callable, some: list[dict], grey: bool = False) -> tuple:
        def answer_some(batch, images):
            return how(model, processor, batch, images, options.max_new_tokens)

        def running(sample, entry):
            return scorer.running(headline, sample, entry)

        hit = MEASURES[headline].hit
        return some, predict_all(some, folder, options.batch_size, answer_some, state, grey, running, title, hit)

    own = functools.partial(answer, ground=True) if options.ground else answer
    passes = {MAIN: run_pass(benchmark.name, output, own, samples)}
    if options.teacher_forced:
        with_target = [sample for sample in samples if references(sample)]
        passes[FORCED] = run_pass("teacher forced", output / FORCED, answer_teacher_forced, with_target)
    if is_scenes_bench(options.split):
        passes[GREY] = run_pass("grey images", output / GREY, own, samples, grey=True)
    return passes


def check_ground(benchmark: Benchmark) -> None:
    """`InputError` if `--ground` would change a number: if a metric looks at more than the first object."""
    for name, tasks in benchmark.metrics.items():
        asked = set(ONE_OBJECT_TASKS) & set(tasks or benchmark.tasks or ONE_OBJECT_TASKS)
        if asked and name not in FIRST_OBJECT:
            raise InputError(
                f"--ground: answers would end with their first object, but {benchmark.name} measures "
                f"{', '.join(sorted(asked))} with {name}, which counts all objects"
            )


def describe_decoding(options: argparse.Namespace) -> str:
    """How the answers came about, for the summary."""
    if options.predictions:
        return "given predictions"
    return "greedy, up to the first object where one is asked for" if options.ground else "free-running, greedy"


def model_resolution(config) -> dict:
    """The sides, in pixels, of what the model reads and of the masks that it writes."""
    found = {"model reads": config.image_size}
    if "mask" in config.signals:
        found |= {"masks from": config.mask_image_size or config.image_size, "mask logits": config.mask_config.size}
    return found


def list_samples(options: argparse.Namespace) -> None:
    """Print id, prompt and image of every sample as JSON lines; with `options.output`, save drawn images there."""
    benchmark = find_benchmark(options.benchmark)
    complete_options(options, benchmark)
    samples = read_samples(benchmark, options, Problems())
    for line in describe_samples(samples, Path(options.output) if options.output else None):
        print(json.dumps(line))


# ---- what a folder's predictions belong to ---------------------------------------------------------------------------


def describe_run(options: argparse.Namespace, benchmark: Benchmark, samples: list[dict]) -> dict:
    """What decides the predictions: the values of `RUN_KEYS`."""
    names = ("model", "split", "data", "images", "annotations", "seed", "max_new_tokens", "dtype")
    run = {name: getattr(options, name) for name in names}
    run["ground"] = options.ground or None  # as in runs that were begun before there was the option
    run |= {"benchmark": benchmark.name, "prompt": prompts_used(samples), "checkpoint_sha256": None, "revision": None}
    if options.predictions:
        return run | {"model": f"predictions in {options.predictions}"}
    return run | {"checkpoint_sha256": checkpoint_hash(options.model), "revision": hub_revision(options.model)}


def hub_revision(model: str) -> str | None:
    """The commit that a checkpoint on the Hub has now, or that the cache holds while offline; None of a folder."""
    if Path(model).is_dir():
        return None
    try:
        config = hf_hub_download(model, "config.json")
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: not a checkpoint that can be loaded: {error}") from error
    return Path(config).parent.name  # <cache>/models--<owner>--<name>/snapshots/<commit>/config.json


def prompts_used(samples: list[dict]) -> dict[str, str]:
    """The wordings that each task is asked in."""
    found = {}
    for sample in samples:
        found.setdefault(sample["task"], set()).add(sample["template"] or "the source's own words")
    return {task: " or ".join(sorted(wordings)) for task, wordings in sorted(found.items())}


def check_run(folder: Path, run: dict, overwrite: bool) -> None:
    """Prepare the output folder, and check that its predictions, if there are any, belong to the same run.

    Raises:
        InputError: the folder cannot be written to, or has the predictions of another run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RUN_FILE
        if overwrite:
            for old in (path, *folder.glob("predictions.*"), *folder.glob("*/predictions.*")):
                old.unlink(missing_ok=True)
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            other = [f"{key} {before.get(key)!r}, now {run[key]!r}" for key in RUN_KEYS if before.get(key) != run[key]]
            if other:
                raise InputError(
                    f"--output {folder}: has the predictions of another run ({'; '.join(other)}); give another "
                    "folder, or --overwrite"
                )
        elif (folder / PREDICTIONS).exists():
            raise InputError(f"--output {folder}: has predictions of an unknown run; give another folder")
        path.write_text(json.dumps(run, indent=1), encoding="utf-8")
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"--output {folder}: cannot be used: {error}") from error
