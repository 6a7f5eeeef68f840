"""Captions against several human ones: CIDEr-D, BLEU, ROUGE-L and, if Java is installed, METEOR."""

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
    description = """CIDEr-D (1.2 is what papers print as 120), BLEU-1 to 4, ROUGE-L and METEOR, as pycocoevalcap
computes them over words of the Penn Treebank tokeniser. METEOR and that tokeniser are Java programs: without
Java, METEOR is left out and a tokeniser in Python is used. CIDEr weighs words by how rare they are among the references
of the whole set, so numbers of two sets, or of a part and the whole, do not compare."""
    citation = "Vedantam, Zitnick, Parikh. CIDEr: Consensus-based Image Description Evaluation. CVPR 2015."
    inputs = """
Args:
    predictions: a caption (text) per image; a missing or blank one counts as an empty text.
    references: the human captions of each image: a list of texts.
    tokenizer: "ptb" (needs Java), "python", or None: "ptb" if Java is installed. Numbers of the two do not compare
        (about one caption in 2,000 differs).
    meteor: whether to compute METEOR; None: if Java is installed.
    per_sample: also return `samples`, with the `cider` and `rouge_l` of each, and `meteor` if it is computed (METEOR
        of the set is not their mean: it is computed from summed counts).

Returns:
    cider, bleu1, bleu2, bleu3, bleu4, rouge_l, meteor: None if there are no rows; meteor only where it is computed.
    tokenizer: the one that was used. n: number of rows. problems: {reason: number of predictions}.
"""

    def score(self, predictions, references, problems, tokenizer: str | None = None, meteor: bool | None = None):
        captions = shared.read_predictions(predictions, shared.parse_text, problems)
        references = shared.read_references(references, parse_captions)
        return score_captions([caption or "" for caption in captions], references, tokenizer, meteor)


def score_captions(
    captions: list[str], references: list[list[str]], tokenizer: str | None = None, meteor: bool | None = None
) -> tuple[dict, list[dict]]:
    """The results of `CaptionScores`, and per caption its CIDEr, its ROUGE-L and, if it is computed, its METEOR."""
    tokenizer = tokenizer or ("ptb" if have_java() else "python")
    if tokenizer not in ("ptb", "python"):
        raise ValueError(f"tokenizer is {tokenizer!r}, expected 'ptb', 'python' or None")
    meteor = have_java() if meteor is None else meteor
    if (meteor or tokenizer == "ptb") and not have_java():
        raise ValueError("METEOR and the tokenizer 'ptb' need Java")
    names = ["cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l"] + ["meteor"] * meteor
    if not captions:
        return dict.fromkeys(names) | {"tokenizer": tokenizer}, []
    texts = iter(tokenize([*captions, *(text for group in references for text in group)], tokenizer))
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
    """Whether a working Java is on the path."""
    program = shutil.which("java")
    return bool(program) and subprocess.run([program, "-version"], capture_output=True).returncode == 0


@functools.cache
def start_meteor() -> Meteor:
    """The Java program, started once because it reads its tables for seconds; it counts the words of a caption once."""
    meteor = Meteor()
    count_words = functools.cache(meteor._stat)
    meteor._stat = lambda caption, references: count_words(caption, tuple(references))
    return meteor


def tokenize(texts: list[str], tokenizer: str) -> list[str]:
    """Words of each text with blanks between them. A text is split once: resampling asks for it again and again."""
    words = _words_of(tokenizer)
    missing = [text for text in texts if text not in words]
    if missing:
        split = tokenize_ptb if tokenizer == "ptb" else tokenize_python
        words.update(zip(missing, split(missing), strict=True))
    return [words[text] for text in texts]


@functools.cache
def _words_of(tokenizer: str) -> dict[str, str]:
    return {}


def tokenize_ptb(texts: list[str]) -> list[str]:
    """Words of each text with blanks between them, as `pycocoevalcap`'s tokeniser splits it."""
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


# In order: contractions, abbreviations and initials, numbers, words with inner hyphens, slashes, full stops or
# apostrophes, runs of dots and dashes, any other single character.
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
    """As `tokenize_ptb`, but without Java: lower case, split contractions ("do n't", "it 's"), no punctuation."""
    tokenized = []
    for text in texts:
        tokens = PYTHON_TOKEN.findall(text.lower())
        tokens = [BRACKETS.get(token, token.replace("’", "'")) for token in tokens if token not in PYTHON_PUNCTUATION]
        tokenized.append(_without_punctuation(tokens))
    return tokenized


def _without_punctuation(tokens: list[str]) -> str:
    return " ".join(token for token in tokens if token not in ptbtokenizer.PUNCTUATIONS)
