"""Comparison of two runs on the same samples: what differs, and is it more than chance?"""

import json
import math
from pathlib import Path

import numpy as np

from perceptiongpt.evaluation.intervals import (
    RESAMPLES,
    SAME,
    Z95,
    column_table,
    draw_weights,
    percentiles,
    resampled_sums,
    resampled_values,
    sample_groups,
)
from perceptiongpt.evaluation.measures import MEASURES
from perceptiongpt.evaluation.reporting import number, write_text
from perceptiongpt.evaluation.results import compute, whole_set_function
from perceptiongpt.inference import InputError


SHOWN_SAMPLES = 20  # of those that only one run has right


def read_run(path: str) -> tuple[dict, dict[str, dict]]:
    """(the summary's head, what each sample counted by id) of a summary.json, or of the folder that holds it."""
    file = Path(path, "summary.json") if Path(path).is_dir() else Path(path)
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        lines = file.with_name("samples.jsonl").read_text(encoding="utf-8").splitlines()
        samples = [{"inputs": {}, **json.loads(line)} for line in lines]  # older files have no inputs
        head = {name: summary[name] for name in ("benchmark", "split", "seed", "checkpoint")}
        return head, {sample["id"]: sample for sample in samples}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--compare {path}: no summary.json with its samples.jsonl: {error!r}") from error


def paired_differences(first: dict[str, dict], second: dict[str, dict], name: str, intervals: bool = True) -> dict:
    """Two runs on the same samples by one metric.

    Args:
        first, second: id -> {`image_id`, `columns`: {metric: columns}, `inputs`: {metric: inputs}}, with the same ids.
        name: the metric.
        intervals: whether to resample whole-set results.

    Returns:
        `n`; `estimates`: result -> {`a`, `b`, `difference` (b - a), `interval`, `p` (two-sided, of no difference)};
        and, if the metric says whether a sample is right, `gained` and `lost`: the ids that only b, only a has right.
    """
    measure, runs = MEASURES[name], (first, second)
    ids = [one for one in first if all(name in run[one]["columns"] or name in run[one]["inputs"] for run in runs)]
    images, result, estimates = [first[one]["image_id"] for one in ids], {"n": len(ids)}, {}
    if measure.columns:
        tables = [column_table([run[one]["columns"][name] for one in ids]) for run in runs]
        for column in set(tables[0]) & set(tables[1]):
            same = abs(tables[1][column] - tables[0][column]) < SAME
            tables[1][column] = np.where(same, tables[0][column], tables[1][column])
        groups = sample_groups(images)
        weights = draw_weights(groups, RESAMPLES)
        sums = [resampled_sums(table, groups, weights) for table in tables]
        wholes = [{column: values.sum() for column, values in table.items()} for table in tables]
        for key, ratio in measure.ratios.items():
            a, b = (float(ratio.of(whole)) for whole in wholes)
            first_drawn, second_drawn = map(ratio.of, sums)
            drawn = second_drawn - first_drawn
            drawn = drawn[np.isfinite(drawn)]
            if math.isfinite(a) and math.isfinite(b) and len(drawn):
                p = min(1.0, 2 * (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + len(drawn)))
                estimates[key] = _difference(a, b, percentiles(drawn), float(p))
        if "hit" in tables[0]:
            pairs = list(zip(ids, *(table["hit"] > 0 for table in tables), strict=True))
            result["gained"] = [one for one, was, now in pairs if now and not was]
            result["lost"] = [one for one, was, now in pairs if was and not now]
    if measure.whole_set and all(name in run[one]["inputs"] for run in runs for one in ids):
        inputs = [[run[one]["inputs"][name] for one in ids] for run in runs]
        estimates |= _whole_set_differences(name, inputs, images, intervals)
    return result | {"estimates": estimates}


def _whole_set_differences(name: str, inputs: list[list[dict]], images: list[str], intervals: bool) -> dict[str, dict]:
    """Differences of what only the metric itself can compute. Both runs are resampled with the same draws."""
    measure = MEASURES[name]
    values = [compute(name, some)[0] for some in inputs]
    keys = [key for key in measure.whole_set if all(found.get(key) is not None for found in values)]
    drawn = None
    if intervals and keys:
        first, second = (
            resampled_values(whole_set_function(name, measure, some), images, keys, f"{name} of {run}")
            for run, some in zip("ab", inputs, strict=True)
        )
        drawn = {key: second[key] - first[key] for key in keys}
    found = {}
    for key in keys:
        a, b = (one[key] for one in values)
        interval = p = None
        known = drawn[key][np.isfinite(drawn[key])] if drawn else ()
        if len(known) > 1:
            deviation = float(known.std(ddof=1))
            interval = [b - a - Z95 * deviation, b - a + Z95 * deviation]
            # Of a normal distribution around 0; equal resamples with a difference leave no doubt.
            p = math.erfc(abs(b - a) / deviation / math.sqrt(2)) if deviation > 0 else float(abs(b - a) < SAME)
        found[key] = _difference(a, b, interval, p)
    return found


def _difference(a: float, b: float, interval: list[float] | None, p: float | None) -> dict:
    return {"a": a, "b": b, "difference": b - a, "interval": interval, "p": p}


def compare(first: str, second: str, output: str | None = None, intervals: bool = True) -> str:
    """Compare two runs; returns Markdown, and with `output` writes comparison.json and comparison.md to that folder.

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
        name for name in MEASURES
        if any(name in run[sample][part] for run in (a, b) for sample in common for part in ("columns", "inputs"))
    ]  # fmt: skip
    result = {
        "a": one | {"summary": first},
        "b": other | {"summary": second},
        "n": len(common),
        "only in a": len(a) - len(common),
        "only in b": len(b) - len(common),
        "metrics": {name: paired_differences(a_common, b_common, name, intervals) for name in names},
    }
    text = comparison_table(result, a)
    if output:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.json", json.dumps(result, indent=1))
        write_text(folder / "comparison.md", text)
    return text


def comparison_table(result: dict, samples: dict[str, dict]) -> str:
    """The result of a comparison as Markdown; `samples` tells the prompts."""
    one, other, found = result["a"], result["b"], result["metrics"]
    lines = [f"# {one['benchmark']}, split {one['split']}: {result['n']} samples that both runs have", ""]
    lines += [
        f"a: {one['checkpoint']} (`{one['summary']}`)",
        "",
        f"b: {other['checkpoint']} (`{other['summary']}`)",
        "",
    ]
    if result["only in a"] or result["only in b"]:
        lines += [f"Not compared: {result['only in a']} samples only in a, {result['only in b']} only in b.", ""]
    lines += ["| metric | | a | b | b - a | 95 % interval | p |", "| --- | --- | ---: | ---: | ---: | --- | ---: |"]
    for name, values in found.items():
        for key, row in values["estimates"].items():
            interval = " .. ".join(f"{side:+.4f}" for side in row["interval"] or [])
            p = "" if row["p"] is None else f"{row['p']:.3f}"
            cells = [name, key, number(row["a"]), number(row["b"]), f"{row['difference']:+.4f}", interval, p]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| metric | right only in b | right only in a |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {len(one['gained'])} | {len(one['lost'])} |" for name, one in found.items() if "gained" in one
    ]
    for name, values in found.items():
        for what, title in (("gained", "right only in b"), ("lost", "right only in a")):
            ids = values.get(what, [])
            if ids:
                first = f" (the first {SHOWN_SAMPLES})" if len(ids) > SHOWN_SAMPLES else ""
                lines += ["", f"{name}, {title}{first}:", ""]
                lines += [f"- {sample}: {samples[sample]['prompt']}" for sample in ids[:SHOWN_SAMPLES]]
    return "\n".join(lines) + "\n"
