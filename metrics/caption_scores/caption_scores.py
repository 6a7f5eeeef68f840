"""Captions against several human ones: CIDEr-D, BLEU, ROUGE-L and, where there is Java, METEOR."""

import contextlib
import functools
import io
import re
import shutil
import subprocess
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from perceptiongpt.metrics import shared


class CaptionScores(shared.StoredMetric):
    description = """CIDEr-D (times 1, so 1.2 is what papers print as 120), BLEU-1 to 4, ROUGE-L and METEOR as
pycocoevalcap computes them, over texts split into words by the Penn Treebank tokeniser of the field's scripts. Both
METEOR and that tokeniser are Java programs; without Java METEOR is left out and a tokeniser in Python takes its place.
CIDEr weighs words by how rare they are among the references of the whole set: numbers of two sets, or of a part and the
whole, cannot be compared."""
    citation = "Vedantam, Zitnick, Parikh. CIDEr: Consensus-based Image Description Evaluation. CVPR 2015."
    inputs = """
Args:
    predictions: a caption (text) per picture; what is missing or blank counts as an empty text.
    references: the human captions of each picture: a list of texts.
    tokenizer: "ptb" (needs Java), "python", or None: "ptb" where there is Java. Texts split by one and by the other
        are not to be compared (they differ in about one caption of 2,000).
    meteor: whether to compute METEOR; None: where there is Java.
    per_sample: also return `samples`, with the `cider` and `rouge_l` of each, and `meteor` where it is computed (that
        of the set is not their mean: it is computed from the summed counts).

Returns:
    cider, bleu1, bleu2, bleu3, bleu4, rouge_l, meteor: None if there are no rows; meteor only where it is computed.
    tokenizer: which one it was. n: number of rows. problems: {reason: number of predictions}.
"""

    def score(self, predictions, references, problems, tokenizer: str | None = None, meteor: bool | None = None):
        captions = shared.read_predictions(predictions, shared.parse_text, problems)
        references = shared.read_references(references, parse_captions)
        return score_captions([caption or "" for caption in captions], references, tokenizer, meteor)


def score_captions(
    captions: list[str], references: list[list[str]], tokenizer: str | None = None, meteor: bool | None = None
) -> tuple[dict, list[dict]]:
    """The results of `CaptionScores` and, per caption, its CIDEr and ROUGE-L, and METEOR where it is computed."""
    tokenizer = tokenizer or ("ptb" if have_java() else "python")
    if tokenizer not in ("ptb", "python"):
        raise ValueError(f"tokenizer is {tokenizer!r}, expected 'ptb', 'python' or None")
    meteor = have_java() if meteor is None else meteor
    if (meteor or tokenizer == "ptb") and not have_java():
        raise ValueError("METEOR and the tokenizer 'ptb' need Java")
    names = ["cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"] + ["meteor"] * meteor
    if not captions:
        return dict.fromkeys(names) | {"tokenizer": tokenizer}, []
    tokenize = tokenize_ptb if tokenizer == "ptb" else tokenize_python
    texts = iter(tokenize([*captions, *(text for group in references for text in group)]))
    predicted = {index: [next(texts)] for index in range(len(captions))}
    human = {index: [next(texts) for _ in group] for index, group in enumerate(references)}
    for index, group in human.items():
        if not any(group):
            raise ValueError(f"references[{index}]: there is no word in {references[index]}")
    with contextlib.redirect_stdout(io.StringIO()):
        cider, ciders = Cider().compute_score(human, predicted)
        bleu, _ = Bleu(4).compute_score(human, predicted, verbose=0)
        rouge, rouges = Rouge().compute_score(human, predicted)
        scores, columns = [cider, *bleu, rouge], {"cider": ciders, "rouge_l": rouges}
        if meteor:
            score, columns["meteor"] = start_meteor().compute_score(human, predicted)
            scores.append(score)
    results = dict(zip(names, map(float, scores), strict=True)) | {"tokenizer": tokenizer}
    samples = [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    return results, samples


def parse_captions(value) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError("expected a list of texts")
    return value


@functools.cache
def have_java() -> bool:
    """Whether a Java that runs is on the path."""
    program = shutil.which("java")
    return bool(program) and subprocess.run([program, "-version"], capture_output=True).returncode == 0


@functools.cache
def start_meteor() -> Meteor:
    """The Java program, started once: it reads its tables for seconds."""
    return Meteor()


def tokenize_ptb(texts: list[str]) -> list[str]:
    """Words of each text with blanks between, as `pycocoevalcap`'s tokeniser gives them, without its temporary file."""
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "\n".join(" ".join(text.split()) for text in texts) + "\n"
    command += ["-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input=lines.encode("utf-8", errors="replace"), capture_output=True)
    tokenized = done.stdout.decode("utf-8").split("\n")[:-1]
    if done.returncode or len(tokenized) != len(texts):
        message = done.stderr.decode("utf-8", errors="replace")[-500:]
        raise RuntimeError(f"the tokeniser gave {len(tokenized)} lines for {len(texts)} texts: {message}")
    return [_without_punctuation(line.split()) for line in tokenized]


# In order: contracted words, abbreviations and initials, numbers, words with inner hyphens, slashes, full stops or
# apostrophes, then runs of dots and dashes, then any other character alone.
PYTHON_TOKEN = re.compile(
    r"""
    can(?=not\b) | (?<=can)not\b | (?:gon|wan)(?=na\b) | (?<=gon)na\b | (?<=wan)na\b
    | (?:'|’)(?:s|m|d|ll|re|ve)\b | n(?:'|’)t\b
    | '\d0s\b
    | (?:[^\W\d_]\.)(?:[^\W\d_]\.)+ | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|no)\.(?=\s\S)
    | [-+]?\d+(?:[.,:/-]\d+)*(?:st|nd|rd|th|s)?(?:-\w+)*
    | \w+?(?=n(?:'|’)t\b)
    | \w+(?:[-/.@]\w+)*
    | \.{3} | -{2,} | \S
    """,
    re.VERBOSE,
)
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
PYTHON_PUNCTUATION = {"’", "‘", "“", "”", '"', "…", "–", "—"}


def tokenize_python(texts: list[str]) -> list[str]:
    """As `tokenize_ptb`, without Java: lower case, contractions split ("do n't", "it 's"), punctuation left out."""
    tokenized = []
    for text in texts:
        tokens = PYTHON_TOKEN.findall(text.lower())
        tokens = [BRACKETS.get(token, token.replace("’", "'")) for token in tokens if token not in PYTHON_PUNCTUATION]
        tokenized.append(_without_punctuation(tokens))
    return tokenized


def _without_punctuation(tokens: list[str]) -> str:
    return " ".join(token for token in tokens if token not in ptbtokenizer.PUNCTUATIONS)
