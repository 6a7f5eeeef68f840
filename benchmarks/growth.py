"""How the cost of an answer grows: with the size of the image, signals, questions, words and processes.

    python benchmarks/growth.py
    python benchmarks/growth.py --size 0.5B --repeats 3

All weights are random. Every number is the median of a few calls in milliseconds, and its ratio to the first one of its
row. Processes each have a model and one thread; their number is answers per second of all of them together.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch
from measuring import SIZES, TEXT_TOKENS, Floors, build, print_machine, prompts, seconds
from speed import Forced


SIDES = (1, 2, 3)  # times the usual side of an image
SIGNALS = (0, 1, 4, 16)
QUESTIONS = (1, 4, 16, 64)
LENGTHS = (16, 64, 256)  # tokens of a question, and of an answer
PROCESSES = (1, 2)


def print_row(name: str, measured: dict[int, float]) -> None:
    """A row of the table."""
    first = next(iter(measured.values()))
    cells = (f"{count}: {1e3 * value:.1f} ({value / first:.2f}x)" for count, value in measured.items())
    print(f"{name:<44}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


def answers_in(size: str, duration: float, done: multiprocessing.Queue) -> None:
    """One process: how many answers a model gives in a time."""
    torch.set_num_threads(1)
    model, _ = build(size, "cpu", torch.float32)
    inputs = prompts(model, 1, "cpu", torch.float32)
    model.ground(**inputs)
    count, end = 0, time.perf_counter() + duration
    while time.perf_counter() < end:
        model.ground(**inputs)
        count += 1
    done.put(count / duration)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=5, help="of each number of processes")
    options = parser.parse_args()
    size, device, dtype = options.size, "cpu", torch.float32

    def median(run: Callable[[], object]) -> float:
        run()
        return statistics.median(seconds(run) for _ in range(options.repeats))

    model, _ = build(size, device, dtype)
    side = model.config.image_size
    print_machine(size, device, dtype, Floors(model, model.config.image_seq_length + TEXT_TOKENS, device, dtype))

    measured = {}
    for times in SIDES:
        larger, _ = build(size, device, dtype, side * times)
        inputs = prompts(larger, 1, device, dtype)
        measured[side * times] = median(lambda model=larger, inputs=inputs: model.ground(**inputs))
    print_row("ground(), side of the image", measured)

    inputs = prompts(model, 1, device, dtype)
    measured = {}
    for count in SIGNALS:
        # Words stand in for the others, so that all prompts are of one length.
        behind = [model.config.vis_token_id] * count + [10] * (max(SIGNALS) - count)
        ids = torch.cat([inputs["input_ids"], torch.tensor([behind])], dim=1)
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if count:
            given["boxes"] = torch.tensor([[0.2, 0.2, 0.6, 0.6]]).expand(1, count, -1)
        measured[count] = median(lambda given=given: model.ground(**given))
    print_row("ground(), boxes in the prompt", measured)

    length, vis = inputs["input_ids"].shape[1], model.config.vis_token_id
    measured = {}
    for count in SIGNALS:
        tokens = [vis] * count + [10] * (max(SIGNALS) - count)
        measured[count] = median(
            lambda tokens=tokens: model.generate(
                **inputs,
                max_new_tokens=len(tokens),
                do_sample=False,
                return_dict_in_generate=True,
                logits_processor=[Forced(length, tokens)],
            )
        )
    print_row(f"generate(), objects among {max(SIGNALS)} tokens", measured)

    measured = {}
    for count in QUESTIONS:
        phrases = prompts(model, count, device, dtype)
        measured[count] = median(lambda phrases=phrases: model.ground(prefix=model.encode_prefix(**phrases), **phrases))
    print_row("ground(), questions about one image", measured)

    measured = {}
    for tokens in LENGTHS:
        question = prompts(model, 1, device, dtype, tokens)
        measured[tokens] = median(lambda question=question: model.ground(**question))
    print_row("ground(), tokens of the question", measured)
    measured = {}
    for tokens in LENGTHS:
        measured[tokens] = median(
            lambda tokens=tokens: model.generate(
                **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        )
    print_row("generate(), tokens of the answer", measured)

    spawn = multiprocessing.get_context("spawn")
    rates = {}
    for count in PROCESSES:
        done = spawn.Queue()
        running = [spawn.Process(target=answers_in, args=(size, options.seconds, done)) for _ in range(count)]
        for process in running:
            process.start()
        rates[count] = sum(done.get() for _ in running)
        for process in running:
            process.join()
    cells = (f"{count}: {rate:.1f}/s ({rate / rates[1]:.2f}x)" for count, rate in rates.items())
    print(f"{'answers of so many processes':<44}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
