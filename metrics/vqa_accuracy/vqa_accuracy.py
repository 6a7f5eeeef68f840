"""VQA accuracy, as the evaluation script of VQA v2 (and of OK-VQA) computes it."""

import re

from perceptiongpt.metrics import shared


# A word with one missing apostrophe gets it back. "its", "were", "well" and "ill" are words of their own.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
WITH_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTIONS
    for place, character in enumerate(word)
    if character == "'"
}
WITH_APOSTROPHES["somebody'd"] = "somebodyd"  # a bug of the script, kept because its numbers depend on it
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)))) | {
    "none": "0"
}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOPS_REMOVED = 32  # the script passes re.UNICODE, whose value is 32, as the argument `count`


class VQAAccuracy(shared.StoredMetric):
    description = """VQA accuracy: for each subset of all human answers but one, min(matches / 3, 1), averaged over the
subsets and over the questions. Unless all human answers are the same text, predictions and answers are normalised first
(lower case, contractions, numbers as digits, articles, punctuation)."""
    citation = "Goyal et al. Making the V in VQA Matter. CVPR 2017."
    inputs = """
Args:
    predictions: the answer (text) to each question; a missing or blank answer is wrong.
    references: the human answers to each question: a list of texts, ten in VQA v2 and OK-VQA.
    per_sample: also return `samples`, with the `accuracy` of each.

Returns:
    accuracy: None if there are no rows.
    n: number of rows. problems: {reason: number of predictions}.
"""

    def score(self, predictions, references, problems):
        predictions = shared.read_predictions(predictions, shared.parse_text, problems)
        references = shared.read_references(references, parse_answers)
        pairs = zip(predictions, references, strict=True)
        accuracies = [
            0.0 if given is None else question_accuracy(clean_blanks(given), answers) for given, answers in pairs
        ]
        return {"accuracy": shared.mean(accuracies)}, [{"accuracy": accuracy} for accuracy in accuracies]


def parse_answers(value) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(answer, str) for answer in value):
        raise ValueError("expected a list of texts")
    return [clean_blanks(answer) for answer in value]


def question_accuracy(prediction: str, answers: list[str]) -> float:
    """Accuracy of one prediction against the human answers to its question."""
    if len(set(answers)) > 1:
        prediction, answers = normalise(prediction), [normalise(answer) for answer in answers]
    matches = answers.count(prediction)
    # Leaving out an answer that matches leaves one match fewer.
    left_out = [min((matches - (answer == prediction)) / 3, 1) for answer in answers]
    return sum(left_out) / len(left_out)


def clean_blanks(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise(text: str) -> str:
    """The official normalisation. A mark that stands anywhere beside a blank is removed; other marks become blanks."""
    has_comma_number = DIGIT_COMMA_DIGIT.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_blank or has_comma_number else " ")
    cleaned = FULL_STOP.sub("", cleaned, count=FULL_STOPS_REMOVED)
    words = [NUMBERS.get(word, word) for word in cleaned.lower().split()]
    return " ".join(WITH_APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)
