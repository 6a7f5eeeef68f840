"""POPE: does the model claim that absent objects are present?"""

import re

from perceptiongpt.metrics import shared


class Pope(shared.StoredMetric):
    description = """Accuracy, precision, recall, F1 (positive: yes) and the share of yes of POPE. Answers are read as
the official script reads them: the text before the first full stop is split at blanks, its commas removed; it means no
if it has the word "No", "not" or "no", else yes. The strict_ results ignore case and punctuation and also need a yes:
"no" or "not" means no, else "yes" means yes, and an answer with neither is wrong."""
    citation = "Li et al. Evaluating Object Hallucination in Large Vision-Language Models. EMNLP 2023."
    inputs = """
Args:
    predictions: the answer (text) to each question. None and blank text count as missing and are wrong in both
        readings (the official script reads blank text as yes).
    references: "yes" or "no" for each question.
    per_sample: also return `samples`, with `reference`, `correct`, `strict_correct`, and `answer` and `strict_answer`
        (how it was read: "yes", "no" or None) of each.

Returns:
    accuracy, precision, recall, f1, yes_ratio: a wrong answer counts as the opposite of the reference in precision and
        recall; yes_ratio is the share of answers read as yes. Precision, recall and F1 are 0 without a right yes;
        accuracy and yes_ratio are None if there are no rows.
    strict_accuracy, strict_precision, ...: the same for the strict reading.
    n: number of rows. problems: {reason: number of predictions}; "neither yes nor no" concerns the strict reading only.
"""

    def score(self, predictions, references, problems):
        answers = shared.read_predictions(predictions, shared.parse_text, problems)
        labels = shared.read_references(references, parse_label)
        readings = {
            "": [answer and read_officially(answer) for answer in answers],
            "strict_": [answer and read_strictly(answer) for answer in answers],
        }
        silent = sum(reading is None for answer, reading in zip(answers, readings["strict_"], strict=True) if answer)
        if silent:
            problems["neither yes nor no"] += silent
        results, samples = {}, [{"reference": label} for label in labels]
        for prefix, read in readings.items():
            right = [reading == label for reading, label in zip(read, labels, strict=True)]
            for sample, correct, reading in zip(samples, right, read, strict=True):
                sample |= {f"{prefix}correct": correct, f"{prefix}answer": reading}
            hits = sum(correct for correct, label in zip(right, labels, strict=True) if label == "yes")
            false_alarms = sum(not correct for correct, label in zip(right, labels, strict=True) if label == "no")
            positives = labels.count("yes")
            results |= {
                f"{prefix}accuracy": shared.mean(right),
                f"{prefix}precision": hits / max(hits + false_alarms, 1),
                f"{prefix}recall": hits / max(positives, 1),
                f"{prefix}f1": 2 * hits / max(hits + false_alarms + positives, 1),
                f"{prefix}yes_ratio": shared.share(read.count("yes"), len(read)),
            }
        return results, samples


def parse_label(value) -> str:
    if value not in ("yes", "no"):
        raise ValueError("expected 'yes' or 'no'")
    return value


def read_officially(answer: str) -> str:
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read_strictly(answer: str) -> str | None:
    words = set(re.findall(r"\w+", answer.lower().split(".")[0]))
    if {"no", "not"} & words:
        return "no"
    return "yes" if "yes" in words else None
