"""What `validate.py` leaves behind: tables, pictures of cases, files for the Hub, and the comparison of two runs."""

import io
import json
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index
from PIL import Image

from perceptiongpt import scoring
from perceptiongpt.drawing import SHEET_MARGIN, card, contact_sheet, draw_objects
from perceptiongpt.predict import BROKEN_IMAGE_ERRORS, InputError, read_image


CASES = 12  # on a sheet
CASE_COLUMNS = 4  # two cases: reference, prediction, reference, prediction
CASE_OF_A_PICTURE = 2  # at most, where there are cases of others
CASE_CELL = 420
CASE_HEIGHT = 300  # of a picture
PUBLISHED = (  # what goes to the Hub, of the metrics that were measured
    ("box_accuracy", "acc@0.5"),
    ("referring_iou", "ciou"),
    ("referring_iou", "miou"),
    ("generalized_referring", "giou"),
    ("generalized_referring", "n_acc"),
    ("generalized_boxes", "pr@f1"),
    ("grounded_caption", "cider"),
    ("grounded_caption", "ap50"),
    ("vqa_accuracy", "accuracy"),
    ("pope", "accuracy"),
    ("pope", "f1"),
    ("caption_scores", "cider"),
    ("caption_scores", "bleu4"),
    ("coco_detection", "bbox_ap"),
    ("coco_detection", "segm_ap"),
)
HUB_TASK = "image-text-to-text"


def write(
    output: Path, spec: dict, summary: dict, samples: list[dict], entries: dict, result, hub_dataset: str | None
) -> None:
    """Write everything but the predictions to the folder `output`.

    Args:
        spec: the benchmark.
        summary: becomes summary.json.
        samples, entries: what was asked, and the predictions by id.
        result: `scoring.Result` of them.
        hub_dataset: the data set's id on the Hub, in place of the benchmark's.
    """
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
    write_text(output / "summary.md", table(summary))
    lines = []
    for sample in samples:
        line = {name: sample[name] for name in ("id", "image_id", "width", "height", "task", "prompt")}
        line["reason"] = result.predictions[sample["id"]].reason
        found = {name: rows[sample["id"]] for name, rows in result.columns.items() if sample["id"] in rows}
        pieces = {name: parts[sample["id"]] for name, parts in result.pieces.items() if sample["id"] in parts}
        lines.append(json.dumps(line | {"columns": found, "pieces": pieces}))
    write_text(output / "samples.jsonl", "\n".join(lines) + "\n")
    write_hub_files(output, spec, summary, hub_dataset)
    plot_calibration(summary["calibration"], output / "calibration.png")
    write_cases(output, spec, samples, entries, result, summary["seed"])


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
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
    """What to call a checkpoint: a folder by its name (`.` has one too), all else as it was given."""
    path = Path(checkpoint)
    return path.resolve().name if path.is_dir() else str(checkpoint)


def counted(summary: dict, module: str, key: str) -> int:
    """How many samples a number counts."""
    return summary["n_of_number"].get(module, {}).get(key, summary["n_of_metric"][module])


def table(summary: dict) -> str:
    """A summary as Markdown."""
    lines = [f"# {summary['benchmark']}, split {summary['split']}: {checkpoint_name(summary['checkpoint'])}", ""]
    lines += ["| metric | | value | 95 % interval | n |", "| --- | --- | ---: | --- | ---: |"]
    lines += metric_rows(summary)
    if summary["pictures"] < scoring.LEAST_PICTURES:
        lines += ["", f"Few pictures ({summary['pictures']}): take the intervals as rough."]
    for name in ("teacher_forced", "grey_picture"):
        if name in summary:
            lines += ["", f"## {name.replace('_', ' ').capitalize()}", ""]
            lines += ["| metric | | value | 95 % interval | n |", "| --- | --- | ---: | --- | ---: |"]
            lines += metric_rows(summary[name])
    for name, why in summary["not_measured"].items():
        lines += ["", f"Not measured: {name}: {why}."]
    emission, speed = summary["emission"], summary["speed"]
    facts = {
        "samples": f"{summary['n']} about {summary['pictures']} pictures",
        "predictions of no sample": summary["predictions_without_sample"] or None,
        "missing or malformed": ", ".join(f"{why}: {count}" for why, count in summary["missing"].items()) or "none",
        "number of `<vis>` is right": f"{number(emission['rate'])}{_interval(emission['interval'])} of {emission['n']}",
        "speed": ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in speed.items()),
        "expected calibration error": ", ".join(
            f"{kind} {number(values['ece'])}{_interval(values['ece_interval'])}"
            for kind, values in summary["calibration"].items()
            if "ece" in values
        ),
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
    """A line for each number."""
    rows = []
    for module, values in summary["metrics"].items():
        for key, value in values.items():
            if value is not None and not isinstance(value, float):  # counts, and what is no number
                continue
            interval = summary["intervals"].get(module, {}).get(key)
            cells = [module, key, number(value), number(interval) if interval else "", counted(summary, module, key)]
            rows.append(f"| {' | '.join(map(str, cells))} |")
    return rows


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def write_hub_files(output: Path, spec: dict, summary: dict, hub_dataset: str | None) -> None:
    """`.eval_results/<benchmark>_<split>.yaml` and `model_index.yaml`.

    The Hub lists an entry of `.eval_results` where its data set is registered as a benchmark with such a task; the
    card's `model-index` shows every entry. Without a data set on the Hub the id is `local/<name>`, to be replaced
    (`--hub_dataset`) before it is uploaded.
    """
    dataset = hub_dataset or spec["hub_dataset"] or f"local/{summary['benchmark']}"
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


# ---- pictures --------------------------------------------------------------------------------------------------------


def plot_calibration(calibration: dict, path: Path) -> None:
    """Reliability, precision over recall, and the decision whether there is a target; nothing where none is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in ("box", "mask") if kind in calibration]
    panels = [*kinds, *(["precision_recall"] if kinds else []), *(["no_target"] if "no_target" in calibration else [])]
    if not panels:
        path.unlink(missing_ok=True)
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained", squeeze=False)
    for panel, axis in zip(panels, axes[0], strict=True):
        if panel in kinds:
            bins = calibration[panel]["bins"]
            widths = [one["to"] - one["from"] for one in bins]
            axis.bar([one["from"] for one in bins], [one["correct"] for one in bins], widths, align="edge", alpha=0.6)
            axis.plot(
                [one["score"] for one in bins], [one["correct"] for one in bins], "o", color="black", markersize=3
            )
            axis.plot([0, 1], [0, 1], "--", color="grey")
            title = f"{panel}: ECE {calibration[panel]['ece']:.3f}, {calibration[panel]['n']} objects"
            axis.set(title=title, xlabel="score", ylabel="share with IoU >= 0.5", xlim=(0, 1), ylim=(0, 1))
        elif panel == "precision_recall":
            for kind in kinds:
                curve = calibration[kind]["precision_recall"]
                axis.plot(curve["recall"], curve["precision"], ".-", label=kind)
            axis.set(title="over the score", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
            axis.legend()
        else:
            curve = calibration["no_target"]
            axis.plot(curve["threshold"], curve["n_acc"], label="no target: none found")
            axis.plot(curve["threshold"], curve["t_acc"], label="target: some found")
            axis.set(title="is there a target?", xlabel="threshold of the score", ylabel="share decided rightly")
            axis.legend()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def read_picture(sample: dict) -> Image.Image:
    """The sample's picture in RGB, upright."""
    image = sample["image"]
    return read_image(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))


def write_cases(output: Path, spec: dict, samples: list[dict], entries: dict, result, seed: int) -> None:
    """`worst.jpg`: by the headline metric, of equals the surest first; `random.jpg`: drawn by the seed."""
    headline = spec["headline"].split("/")[0]
    metric = headline if result.columns.get(headline) else next(iter(result.columns), headline)
    columns = result.columns.get(metric, {})

    def badness(sample: dict) -> tuple:
        prediction = result.predictions[sample["id"]]
        score = max((one["score"] for one in prediction.objects), default=0.0)
        return columns.get(sample["id"], {"value": 1.0})["value"], -score

    if samples[0]["image"] is None:  # scored without the pictures
        return
    known = [sample for sample in samples if sample["id"] in columns] or samples
    order = np.random.default_rng(seed).permutation(len(samples))
    chosen = {"worst": sorted(known, key=badness), "random": [samples[index] for index in order]}
    for name, some in chosen.items():
        pictures = []
        for sample in of_many_pictures(some)[:CASES]:
            value = columns.get(sample["id"], {}).get("value")
            verdict = "" if value is None else f", {scoring.METRICS[metric].value} {value:.2f}"
            try:
                pictures += draw_case(sample, entries.get(sample["id"]), result.predictions[sample["id"]], verdict)
            except BROKEN_IMAGE_ERRORS as error:
                pictures += [Image.new("RGB", (CASE_HEIGHT, CASE_HEIGHT), "grey")] * 2
                print(f"{name}.jpg: sample {sample['id']}: {error}")
        contact_sheet(pictures, CASE_COLUMNS, output / f"{name}.jpg", cell=CASE_CELL, max_bytes=600_000)


def of_many_pictures(samples: list[dict]) -> list[dict]:
    """The samples in their order, but what is about a picture that has had its cases comes last."""
    seen, first, last = Counter(), [], []
    for sample in samples:
        seen[sample["image_id"]] += 1
        (first if seen[sample["image_id"]] <= CASE_OF_A_PICTURE else last).append(sample)
    return first + last


def draw_case(sample: dict, entry: dict | None, prediction, verdict: str) -> list[Image.Image]:
    """The reference and the prediction, each with its words; `verdict` is added to the prediction's title."""
    image = read_picture(sample)
    width = CASE_CELL - SHEET_MARGIN
    longer_side = max(1, int(max(image.size) * min(width / image.width, CASE_HEIGHT / image.height)))
    given = zip(sample["boxes"], sample["masks"], strict=True)
    asked = [_object("asked about", *one) for one in given]
    wanted = [_object("", *target) for target in scoring.targets(sample)]
    labels = [one["phrase"] if wanted else "" for one in asked + wanted]  # the title says it where it is all there is
    found = [_object(one["phrase"] or "", one["box"], one["mask"], one["score"]) for one in prediction.objects]
    found = [one for one in found if one["box"]]
    true = scoring.plain_text(sample["answers"][0]["content"])
    said = (entry or {}).get("text") or (f"[{prediction.reason}]" if prediction.reason else "<vis>" * len(found))
    sides = (
        (
            "asked about" if asked and not wanted else "reference",
            asked + wanted,
            labels,
            f"{sample['prompt']} | {true or '<vis>'}",
        ),
        (f"prediction{verdict}", found, [f"{one['phrase']} {one['score']:.2f}".strip() for one in found], f"> {said}"),
    )
    return [
        card(draw_objects(image, {"objects": some}, labels=labels, longer_side=longer_side), title, text, width)
        for title, some, labels, text in sides
    ]


def _object(phrase: str, box, mask, score: float | None = None) -> dict:
    if box is None and mask is not None:
        box = scoring.tight_box(mask)
    return {"phrase": phrase, "box": box, "mask": mask, "score": score}


# ---- comparison ------------------------------------------------------------------------------------------------------


def read_run(path: str) -> tuple[dict, dict[str, dict]]:
    """(summary, what each sample counted by id) of a summary.json, or of the folder that holds it."""
    file = Path(path, "summary.json") if Path(path).is_dir() else Path(path)
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        lines = file.with_name("samples.jsonl").read_text(encoding="utf-8").splitlines()
        samples = [{"pieces": {}, **json.loads(line)} for line in lines]  # without, where AP cannot be compared
        return {name: summary[name] for name in ("benchmark", "split", "seed", "checkpoint")}, {
            sample["id"]: sample for sample in samples
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--compare {path}: no summary.json with its samples.jsonl: {error!r}") from error


def compare(first: str, second: str, output: str | None = None) -> str:
    """Two runs on the same samples, as Markdown; with `output`, comparison.json and comparison.md in that folder.

    Raises:
        InputError: a file is missing, or the runs have no samples in common.
    """
    (one, a), (other, b) = read_run(first), read_run(second)
    if (one["benchmark"], one["split"]) != (other["benchmark"], other["split"]):
        raise InputError(
            f"--compare: {one['benchmark']} {one['split']} and {other['benchmark']} {other['split']} differ"
        )
    common = [name for name in a if name in b and a[name]["prompt"] == b[name]["prompt"]]
    if not common:
        raise InputError(f"--compare {first} {second}: no sample is in both (seeds {one['seed']}, {other['seed']})")
    a_common, b_common = ({name: run[name] for name in common} for run in (a, b))
    names = [
        name for name in scoring.METRICS
        if any(name in run[sample][part] for run in (a, b) for sample in common for part in ("columns", "pieces"))
    ]  # fmt: skip
    found = {name: scoring.paired_differences(a_common, b_common, name) for name in names}
    alone = {"only in a": len(a) - len(common), "only in b": len(b) - len(common)}
    result = {
        "a": one | {"summary": first},
        "b": other | {"summary": second},
        "n": len(common),
        **alone,
        "metrics": found,
    }
    lines = [f"# {one['benchmark']}, split {one['split']}: {len(common)} samples that both runs have", ""]
    lines += [f"a: {one['checkpoint']} (`{first}`)", "", f"b: {other['checkpoint']} (`{second}`)", ""]
    if any(alone.values()):
        lines += [f"Not compared: {alone['only in a']} samples only in a, {alone['only in b']} only in b.", ""]
    lines += ["| metric | | a | b | b - a | 95 % interval | p |", "| --- | --- | ---: | ---: | ---: | --- | ---: |"]
    for name, values in found.items():
        for key, row in values["estimates"].items():
            interval = " .. ".join(f"{side:+.4f}" for side in row["interval"])
            cells = [name, key, number(row["a"]), number(row["b"]), f"{row['difference']:+.4f}", interval]
            lines.append(f"| {' | '.join(cells)} | {row['p']:.3f} |")
    lines += ["", "| metric | right only in b | right only in a |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {len(one['gained'])} | {len(one['lost'])} |" for name, one in found.items() if "gained" in one
    ]
    for name, values in found.items():
        for what, title in (("gained", "right only in b"), ("lost", "right only in a")):
            shown = values.get(what, [])[:20]
            if shown:
                lines += ["", f"{name}, {title}{' (the first 20)' if len(values[what]) > 20 else ''}:", ""]
                lines += [f"- {sample}: {a[sample]['prompt']}" for sample in shown]
    text = "\n".join(lines) + "\n"
    if output:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.json", json.dumps(result, indent=1))
        write_text(folder / "comparison.md", text)
    return text
