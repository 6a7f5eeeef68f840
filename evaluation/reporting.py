"""The files that a run writes: tables, what each sample counted, and entries for the Hub."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from perceptiongpt.evaluation.benchmarks import Benchmark
from perceptiongpt.evaluation.cases import plot_calibration, write_cases
from perceptiongpt.evaluation.intervals import LEAST_IMAGES
from perceptiongpt.evaluation.results import Result


PUBLISHED = (  # the results that go to the Hub
    ("box_accuracy", "acc@0.5"),
    ("referring_iou", "ciou"),
    ("referring_iou", "miou"),
    ("generalized_referring", "giou"),
    ("generalized_referring", "n_acc"),
    ("generalized_boxes", "pr@f1"),
    ("point_accuracy", "points_in_mask"),
    ("attributes_right", "attributes_right"),
    ("grounded_caption", "cider"),
    ("grounded_caption", "ap50"),
    ("vqa_accuracy", "accuracy"),
    ("pope", "accuracy"),
    ("pope", "f1"),
    ("caption_scores", "cider"),
    ("caption_scores", "bleu4"),
    ("coco_detection", "bbox_ap"),
    ("coco_detection", "segm_ap"),
    ("coco_detection", "segm_ap50"),
)
HUB_TASK = "image-text-to-text"


def write(
    output: Path,
    benchmark: Benchmark,
    summary: dict,
    samples: list[dict],
    entries: dict,
    result: Result,
    hub_dataset: str | None,
) -> None:
    """Write everything but the predictions to the folder `output`.

    Args:
        summary: becomes summary.json.
        samples, entries: what was asked, and the predictions by id.
        hub_dataset: the data set's id on the Hub, if not the benchmark's.
    """
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
    write_text(output / "summary.md", table(summary))
    lines = []
    for sample in samples:
        line = {name: sample[name] for name in ("id", "image_id", "width", "height", "task", "prompt")}
        line["reason"] = result.predictions[sample["id"]].reason
        found = {name: rows[sample["id"]] for name, rows in result.columns.items() if sample["id"] in rows}
        inputs = {name: some[sample["id"]] for name, some in result.inputs.items() if sample["id"] in some}
        lines.append(json.dumps(line | {"columns": found, "inputs": inputs}))
    write_text(output / "samples.jsonl", "\n".join(lines) + "\n")
    write_hub_files(output, benchmark, summary, hub_dataset)
    plot_calibration(summary["calibration"], output / "calibration.png")
    write_cases(output, benchmark, samples, entries, result, summary["seed"])


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is never there in part."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ---- tables ----------------------------------------------------------------------------------------------------------


def number(value) -> str:
    """A value, or an interval, for a table."""
    if isinstance(value, list):
        return " .. ".join(map(number, value))
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return "-" if value is None else str(value)


def checkpoint_name(checkpoint: str) -> str:
    """The name of a checkpoint: of a folder its own name (also for `.`), of a repository its id."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else str(checkpoint)


def counted(summary: dict, module: str, key: str) -> int:
    """The number of samples that a result counts."""
    return summary["n_of_number"].get(module, {}).get(key, summary["n_of_metric"][module])


def table(summary: dict) -> str:
    """A summary as Markdown."""
    lines = [f"# {summary['benchmark']}, split {summary['split']}: {checkpoint_name(summary['checkpoint'])}", ""]
    lines += ["| metric | | value | 95 % interval | n |", "| --- | --- | ---: | --- | ---: |"]
    lines += metric_rows(summary)
    if summary["images"] < LEAST_IMAGES:
        lines += ["", f"Only {summary['images']} images: the intervals are rough."]
    for name in ("teacher_forced", "grey_image"):
        if name in summary:
            lines += ["", f"## {name.replace('_', ' ').capitalize()}", ""]
            lines += ["| metric | | value | 95 % interval | n |", "| --- | --- | ---: | --- | ---: |"]
            lines += metric_rows(summary[name])
    for name, why in summary["not_measured"].items():
        lines += ["", f"Not measured: {name}: {why}."]
    emission, speed = summary["emission"], summary["speed"]
    facts = {
        "samples": f"{summary['n']} about {summary['images']} images",
        "predictions without a sample": summary["predictions_without_sample"] or None,
        "missing or malformed": ", ".join(f"{why}: {count}" for why, count in summary["missing"].items()) or "none",
        "number of `<vis>` is right": f"{number(emission['rate'])}{_interval(emission['interval'])} of {emission['n']}",
        "speed": ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in speed.items()),
        "expected calibration error": ", ".join(
            f"{kind} {number(values['ece'])}{_interval(values['ece_interval'])}"
            for kind, values in summary["calibration"].items()
            if "ece" in values
        ),
        "annotations": ", ".join(summary["data"]["annotations"] or ()),
        "prompt": "; ".join(f"{task}: {prompt}" for task, prompt in summary["prompt"].items()),
        "seed": summary["seed"],
        "decoding": f"{summary['decoding']}, at most {summary['max_new_tokens']} tokens",
        "resolution": ", ".join(f"{key} {value}" for key, value in summary["resolution"].items()),
        "threshold": ", ".join(f"{key} {value}" for key, value in summary["threshold"].items()),
        "checkpoint, SHA-256": summary["checkpoint_sha256"],
        "left out of the data": ", ".join(f"{why}: {n}" for why, n in summary["data"]["left out"].items()),
        "note": summary["note"],
        "interval": summary["interval"],
        "command": f"`{summary['command']}`",
    }
    lines += ["", "| | |", "| --- | --- |"]
    lines += [
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |"
        for name, value in facts.items()
        if value not in (None, "")
    ]
    for name, groups in summary.get("breakdown", {}).items():
        if isinstance(groups, dict) and groups:
            keys = list(next(iter(groups.values())))
            lines += ["", f"| {name} | {' | '.join(keys)} |", f"| --- |{' ---: |' * len(keys)}"]
            lines += [f"| {group} | {' | '.join(map(number, row.values()))} |" for group, row in groups.items()]
        else:
            lines += ["", f"{name}: {number(groups)}"]
    if "without a model, acc@0.5" in summary:
        found = summary["without a model, acc@0.5"]
        lines += ["", "Acc@0.5 without a model: " + ", ".join(f"{name} {number(one)}" for name, one in found.items())]
    return "\n".join(lines) + "\n"


def _interval(interval: list[float] | None) -> str:
    return f" ({number(interval)})" if interval else ""


def metric_rows(summary: dict) -> list[str]:
    """A row for each number."""
    rows = []
    for module, values in summary["metrics"].items():
        for key, value in values.items():
            if value is not None and not isinstance(value, float):  # counts and texts
                continue
            interval = summary["intervals"].get(module, {}).get(key)
            cells = [module, key, number(value), number(interval) if interval else "", counted(summary, module, key)]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def write_hub_files(output: Path, benchmark: Benchmark, summary: dict, hub_dataset: str | None) -> None:
    """`.eval_results/<benchmark>_<split>.yaml` and `model_index.yaml`.

    The Hub shows an entry of `.eval_results` if its data set is registered as a benchmark with this task; the card's
    `model-index` shows every entry. Without a data set on the Hub the id is `local/<name>`: name one with
    `--hub_dataset` before the upload.
    """
    dataset = hub_dataset or benchmark.hub_dataset or f"local/{summary['benchmark']}"
    split, date = str(summary["split"]), datetime.now(UTC).strftime("%Y-%m-%d")
    notes = f"seed {summary['seed']}; {summary['command']}"
    entries, results = [], []
    for module, key in PUBLISHED:
        value = summary["metrics"].get(module, {}).get(key)
        if value is None:
            continue
        interval = summary["intervals"].get(module, {}).get(key)
        n = counted(summary, module, key)
        entry_notes = f"{module}, {key}; {summary['decoding']}; n = {n}; {notes}"
        if interval:
            entry_notes += f"; 95 % interval {interval[0]:.4f} to {interval[1]:.4f}"
        task = re.sub(r"[^\w.-]+", "_", f"{summary['benchmark']}_{split}_{module}_{key}")
        entries.append(EvalResultEntry(dataset, task, value, date=date, notes=entry_notes))
        results.append(
            EvalResult(
                task_type=HUB_TASK,
                dataset_type=dataset,
                dataset_name=summary["benchmark"],
                metric_type=module,
                metric_value=value,
                dataset_split=split,
                metric_name=f"{module}, {key}",
                metric_args={"interval_95": interval, "n": n, "command": summary["command"]},
            )
        )
    folder = output / ".eval_results"
    folder.mkdir(exist_ok=True)
    name = re.sub(r"[^\w.+-]+", "_", f"{summary['benchmark']}_{split}.yaml")
    write_text(folder / name, yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, width=1000))
    model_name = Path(checkpoint_name(summary["checkpoint"])).name
    index = {"model-index": eval_results_to_model_index(model_name, results)}
    write_text(output / "model_index.yaml", yaml.safe_dump(index, sort_keys=False, width=1000))
