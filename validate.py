"""Evaluate a checkpoint on a benchmark: numbers with intervals, images of the failures, files for the Hub.

    python validate.py --model DIR --benchmark refcoco --split val --data refer/ --images coco/train2014 --output out/a
    python validate.py --model DIR --benchmark scenes_refer --seed 1234567 --limit 500 --output out/b
    python validate.py --model DIR --benchmark coco --data my_labels/ --output out/c      # instances file and images
    accelerate launch --config_file recipes/accelerate/ddp.yaml validate.py --model DIR --benchmark pope ...
    python validate.py --list_samples --benchmark refcoco --data refer/ --images coco/train2014 > samples.jsonl
    python validate.py --predictions answers.jsonl --benchmark refcoco --data refer/ --output out/e
    python validate.py --compare out/a/summary.json out/f/summary.json

The model writes its own answers (free-running, greedy); boxes, masks and points are compared in pixels of the original
image. The same command continues a run that was stopped. OUTPUT then holds:

| file | content |
| --- | --- |
| `predictions.jsonl` | per sample: prompt, answer, objects (masks as COCO RLE), error |
| `summary.json`, `summary.md` | every number with its 95 % interval, and how it was measured |
| `samples.jsonl` | per sample what each metric counted; `--compare` reads it |
| `worst.jpg`, `random.jpg` | cases: the reference on the left, the prediction on the right |
| `calibration.png` | scores compared with the truth |
| `.eval_results/*.yaml`, `model_index.yaml` | for the model's repository on the Hub and for its card |

docs/evaluating.md explains them; `recipes/benchmarks/*.yaml` define the benchmarks.
"""

import argparse
import math
import os
import shlex
import sys

from accelerate import PartialState

from perceptiongpt.evaluation import reporting
from perceptiongpt.evaluation.benchmarks import read_benchmarks
from perceptiongpt.evaluation.comparison import compare
from perceptiongpt.evaluation.run import list_samples, validate
from perceptiongpt.inference import InputError, hide_progress_bars_in_logs


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    summary, _, epilog = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="validate.py", description=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--model", help="folder of a checkpoint, or a repository id on the Hub")
    parser.add_argument("--predictions", metavar="FILE", help="evaluate these (JSON lines) instead of a model's")
    parser.add_argument("--benchmark", help="a name, or a YAML file with one benchmark; --list shows the names")
    parser.add_argument("--split", help="default: the benchmark's first")
    parser.add_argument("--data", metavar="DIR", help="the folder that the benchmark's source reads")
    parser.add_argument("--images", metavar="DIR", help="the images, if they are elsewhere")
    parser.add_argument("--annotations", nargs="+", metavar="FILE", help="the annotation files, if they are elsewhere")
    parser.add_argument("--no_images", action="store_true", help="with --predictions: score without the images")
    parser.add_argument("--limit", type=int, help="only the first LIMIT samples")
    parser.add_argument("--seed", type=int, help="of drawn scenes (test: from 10^6 on) and of coco's expressions")
    parser.add_argument("--output", metavar="DIR", help="default: outputs/<benchmark>_<split>")
    parser.add_argument("--overwrite", action="store_true", help="delete the predictions in OUTPUT first")
    parser.add_argument("--teacher_forced", action="store_true", help="also measure along the reference answers")
    parser.add_argument("--ground", action="store_true", help="answers to questions for one object end with it")
    parser.add_argument("--no_intervals", action="store_true", help="skip the intervals, and with them the resampling")
    parser.add_argument("--threshold", type=float, default=0.0, help="leave out objects that score less")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, help="default: the benchmark's")
    parser.add_argument("--device", help="such as cpu or cuda:1; default: the accelerator of the process")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--hub_dataset", metavar="ID", help="the data set on the Hub that .eval_results names")
    parser.add_argument("--compare", nargs=2, metavar="SUMMARY", help="two summaries: do they differ beyond chance?")
    parser.add_argument("--list", action="store_true", help="print the benchmarks with their splits and metrics")
    parser.add_argument(
        "--list_samples", action="store_true",
        help="print the benchmark's samples (id, prompt, image) as JSON lines; with --output, save drawn images there",
    )  # fmt: skip
    parsed = parser.parse_args(arguments)
    if not parsed.compare and not parsed.list:
        if not parsed.benchmark:
            parser.error("--benchmark is missing; --list shows the names")
        if not parsed.list_samples and bool(parsed.model) == bool(parsed.predictions):
            parser.error("give either --model or --predictions")
        if parsed.no_images and (parsed.model or parsed.images):
            parser.error("--no_images needs --predictions and excludes --images")
        for name in ("batch_size", "max_new_tokens", "limit"):
            if getattr(parsed, name) is not None and getattr(parsed, name) < 1:
                parser.error(f"argument --{name}: {getattr(parsed, name)} is not a positive number")
        if not math.isfinite(parsed.threshold):
            parser.error(f"argument --threshold: {parsed.threshold} is not a finite number")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    hide_progress_bars_in_logs()
    try:
        if options.list:
            for name, benchmark in read_benchmarks().items():
                splits, metrics = ", ".join(map(str, benchmark.splits)), ", ".join(benchmark.metrics)
                print(f"{name}: splits {splits}; metrics {metrics}")
        elif options.list_samples:
            list_samples(options)
        elif options.compare:
            print(compare(*options.compare, options.output, not options.no_intervals))
        else:
            summary = validate(options, shlex.join(["validate.py", *words]))
            if summary is not None:
                print(reporting.table(summary))
            PartialState().destroy_process_group()  # its threads may outlive the interpreter
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
