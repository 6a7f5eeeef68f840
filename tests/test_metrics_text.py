"""Metrics of texts: VQA accuracy, POPE, captions."""

import gzip
import json
import math
from collections import Counter

import pytest

from metric_inputs import compute
from perceptiongpt.metrics.caption_scores import caption_scores
from perceptiongpt.metrics.vqa_accuracy.vqa_accuracy import normalise


PYTHON = {"tokenizer": "python", "meteor": False}
needs_java = pytest.mark.skipif(not caption_scores.have_java(), reason="no Java")


@pytest.mark.parametrize(
    ("prediction", "answers", "accuracy"),
    [
        # One, two, three, four of ten gave the answer; those who did have a match less among the others.
        ("cat", ["cat"] + ["dog"] * 9, 9 * (1 / 3) / 10),
        ("cat", ["cat"] * 2 + ["dog"] * 8, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        ("cat", ["cat"] * 3 + ["dog"] * 7, (3 * (2 / 3) + 7) / 10),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1),
        ("cow", ["cat"] * 4 + ["dog"] * 6, 0),
        # All the same: compared as they stand. Not all the same: both sides are normalised.
        ("Cat.", ["cat"] * 10, 0),
        ("Cat.", ["cat"] * 9 + ["dog"], 1),
        ("cat\n", ["\tcat "] * 10, 1),
        ("two", ["2"] * 10, 0),
        ("two", ["2"] * 9 + ["3"], 1),
        ("2", ["two"] * 5 + ["Two"] * 5, 1),
        ("none", ["0"] * 5 + ["zero"] * 5, 1),
        ("a dog", ["The dog!"] * 5 + ["dog"] * 5, 1),
        ("dont know", ["don't know"] * 5 + ["dont know"] * 5, 1),
        ("a", ["the"] * 5 + ["an"] * 5, 1),
        ("", ["the"] * 5 + ["an"] * 5, 0),
        ("black-white", ["black white"] * 9 + ["x"], 1),
        ("3,000", ["3000"] * 9 + ["x"], 1),
        ("1.50", ["150"] * 9 + ["x"], 0),
        ("10:30 a.m.", ["10:30 am"] * 9 + ["x"], 1),
    ],
)
def test_vqa_by_hand(prediction, answers, accuracy, tmp_path):
    assert compute("vqa_accuracy", tmp_path, [prediction], [answers])["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("red,white and blue , too", "redwhite and blue too"),  # one mark beside a blank removes all of its kind
        ("3,000 black-white", "3000 blackwhite"),  # a comma between digits does so for every kind
        ("Couldntve, shes", "couldntve shes"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("somebody'd", "somebodyd"),
        ("its were well", "its were well"),
        ("." * 40, "." * 8),
        ("u.s.a. 1.5", "usa 1.5"),
        ("Ten of THE an one", "10 of 1"),
    ],
)
def test_vqa_normalisation(text, normalised):
    assert normalise(text) == normalised


def test_vqa_equals_the_official_script_on_real_answers(data_dir, tmp_path):
    """The number is that of the official script (VQA v2's `vqaEval.py`), run on these predictions."""
    with gzip.open(data_dir / "vqav2" / "vqa_annotations_valid.json.gz", "rt") as file:
        references = [[answer["answer"] for answer in record["answers"]] for record in json.load(file)["annotations"]]
    disguises = [
        str.upper,
        str,
        lambda text: f"The {text}.",
        lambda text: text.replace("'", ""),
        lambda text: text.replace("2", "two").replace("1", "One") + "!",
        lambda text: f" a\t{text} ,\n",
        lambda text: text.replace(" ", "-"),
        str.title,
    ]
    predictions = [disguises[i % 8](answers[i % 10]) for i, answers in enumerate(references)]
    results = compute("vqa_accuracy", tmp_path, predictions, references)
    assert results["accuracy"] == pytest.approx(0.6733875459507782, abs=1e-12)
    assert (results["n"], results["problems"]) == (8977, {})


@pytest.mark.parametrize(
    ("answer", "officially", "strictly"),
    [
        ("Yes", "yes", "yes"),
        ("No", "no", "no"),
        ("no, there is none", "no", "no"),
        ("There is not.", "no", "no"),
        ("NO.", "yes", "no"),
        ("NO", "yes", "no"),
        ("No!", "yes", "no"),
        ("Nothing", "yes", None),
        ("None.", "yes", None),
        ("I cannot see. No", "yes", None),
        ("Yes. There is no cup.", "yes", "yes"),
        ("Yes, there is no cup.", "no", "no"),
        ("There is a cup.", "yes", None),
        ("No,yes", "yes", "no"),
        ("yesterday", "yes", None),
        (".no", "yes", None),
    ],
)
def test_pope_readings(answer, officially, strictly, tmp_path):
    for label in ("yes", "no"):
        results = compute("pope", tmp_path, [answer], [label])
        assert results["accuracy"] == (officially == label)
        assert results["strict_accuracy"] == (strictly == label)
        assert results["yes_ratio"] == (officially == "yes")
        assert results["strict_yes_ratio"] == (strictly == "yes")
        assert results["problems"] == ({} if strictly else {"neither yes nor no": 1})


def test_pope_by_hand(tmp_path):
    predictions = ["Yes", "yes it is", "no", "No", "Maybe", "Maybe", "yes", "", None]
    references = ["yes", "yes", "yes", "no", "no", "yes", "no", "yes", "no"]
    results = compute("pope", tmp_path, predictions, references)
    # Read officially, "Maybe" is a yes: 3 right yes, 2 wrong yes, 1 missing on a no; 5 are to be found.
    assert results["accuracy"] == 4 / 9
    assert (results["precision"], results["recall"]) == (3 / 6, 3 / 5)
    assert results["f1"] == pytest.approx(2 * 0.5 * 0.6 / 1.1)
    assert results["yes_ratio"] == 5 / 9
    # Strictly, "Maybe" is wrong, whatever was right.
    assert results["strict_accuracy"] == 3 / 9
    assert (results["strict_precision"], results["strict_recall"]) == (2 / 5, 2 / 5)
    assert results["strict_yes_ratio"] == 3 / 9
    assert results["problems"] == {"missing": 2, "neither yes nor no": 2}


def test_pope_says_how_it_read_each_answer(tmp_path):
    samples = compute("pope", tmp_path, ["NO.", None], ["no", "yes"], per_sample=True)["samples"]
    first = {"reference": "no", "correct": False, "answer": "yes", "strict_correct": True, "strict_answer": "no"}
    second = {"reference": "yes", "correct": False, "answer": None, "strict_correct": False, "strict_answer": None}
    assert samples == [first, second]


def test_pope_of_real_questions(data_dir, tmp_path):
    with open(data_dir / "pope" / "coco_pope_random.json") as lines:
        labels = [json.loads(line)["label"] for line in lines]
    always = compute("pope", tmp_path, ["Yes."] * len(labels), labels)
    assert (always["n"], always["accuracy"], always["recall"], always["yes_ratio"]) == (3000, 0.5, 1, 1)
    assert always["f1"] == pytest.approx(2 / 3)
    never = compute("pope", tmp_path, ["No."] * len(labels), labels)
    assert (never["accuracy"], never["precision"], never["f1"], never["yes_ratio"]) == (0.5, 0, 0, 0)


@pytest.mark.parametrize(
    ("answer", "right", "own_right", "of_color", "of_pattern", "of_shape"),
    [
        ("A striped red circle, partly hidden by a blue star.", 1, 1, 1, 1, 1),
        ("the circle is RED and striped; hidden by a star that is blue", 1, 1, 1, 1, 1),
        ("A striped red circle.", 0, 1, 1, 1, 1),
        ("A striped red circle, partly hidden by a red star.", 0, 1, 1, 1, 1),
        ("A striped blue star, partly hidden by a red circle.", 0, 0, 0, 1, 0),
        ("A striped red red circle, partly hidden by a blue star.", 0, 0, 0, 1, 1),
        ("A dotted red circle, partly hidden by a blue star.", 0, 0, 1, 0, 1),
        ("A red circle, partly hidden by a blue star.", 0, 0, 1, 0, 1),
        ("A striped red ring, partly hidden by a plain blue star.", 0, 0, 1, 1, 0),
        ("", 0, 0, 0, 0, 0),
    ],
)
def test_attributes_by_hand(answer, right, own_right, of_color, of_pattern, of_shape, tmp_path):
    reference = "A striped red circle, partly hidden by a blue star."
    results = compute("attributes_right", tmp_path, [answer], [reference])
    assert (results["attributes_right"], results["own_attributes_right"]) == (right, own_right)
    assert [results[f"{kind}_right"] for kind in ("color", "pattern", "shape")] == [of_color, of_pattern, of_shape]


def test_attributes_of_drawn_regions_are_all_known(tmp_path):
    from perceptiongpt.data.sources import rows

    arguments = {"split": "test", "seed": 10**6, "tasks": ["region_caption"], "limit": 20, "evaluation": True}
    texts = [row["messages"][-1]["content"] for row in rows("scenes", **arguments)]
    results = compute("attributes_right", tmp_path, texts, texts)
    assert results["attributes_right"] == 1 and results["n"] == 20
    others = compute("attributes_right", tmp_path, texts[1:] + texts[:1], texts)
    assert others["attributes_right"] < 0.2
    with pytest.raises(ValueError, match=r"references\[0\]: names no colour, pattern or shape"):
        compute("attributes_right", tmp_path, ["a red star"], ["a thing"])


def ngrams(text: str, size: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))


def cider_d(captions: list[str], references: list[list[str]]) -> float:
    """CIDEr-D after section 4 of the paper and its appendix: clipped tf-idf cosines, a length penalty, times ten."""
    total = 0.0
    for caption, group in zip(captions, references, strict=True):
        for size in (1, 2, 3, 4):
            found_in = Counter(
                gram for texts in references for gram in set().union(*(ngrams(text, size) for text in texts))
            )

            def weigh(text, size=size, found_in=found_in):
                counts = ngrams(text, size)
                return {
                    gram: count * (math.log(len(references)) - math.log(max(found_in[gram], 1)))
                    for gram, count in counts.items()
                }

            own = weigh(caption)
            for text in group:
                other = weigh(text)
                overlap = sum(min(weight, other[gram]) * other[gram] for gram, weight in own.items() if gram in other)
                lengths = math.hypot(*own.values()) * math.hypot(*other.values())
                penalty = math.exp(-((len(caption.split()) - len(text.split())) ** 2) / (2 * 6**2))
                total += 10 * penalty * (overlap / lengths if lengths else 0) / 4 / len(group)
    return total / len(captions)


def bleu(captions: list[str], references: list[list[str]], order: int) -> float:
    """Corpus BLEU, the closest reference's length (of equals the shorter), no smoothing."""
    length = sum(len(caption.split()) for caption in captions)
    wanted, product = 0, 1.0
    for caption, group in zip(captions, references, strict=True):
        own = len(caption.split())
        wanted += min((abs(len(text.split()) - own), len(text.split())) for text in group)[1]
    for size in range(1, order + 1):
        right = total = 0
        for caption, group in zip(captions, references, strict=True):
            allowed = Counter()
            for text in group:
                allowed |= ngrams(text, size)
            right += (ngrams(caption, size) & allowed).total()
            total += ngrams(caption, size).total()
        product *= right / total
    return product ** (1 / order) * min(1, math.exp(1 - wanted / length))


@pytest.fixture(scope="module")
def coco_captions(data_dir) -> tuple[list[str], list[list[str]]]:
    """A caption and the four others of each picture of `tiny_coco`."""
    with open(data_dir / "tiny_coco" / "annotations" / "captions_train2017.json") as file:
        groups: dict[int, list[str]] = {}
        for annotation in json.load(file)["annotations"]:
            groups.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [group[0] for group in groups.values()], [group[1:] for group in groups.values()]


def test_captions_agree_with_the_formulas(coco_captions, tmp_path):
    captions, references = coco_captions
    results = compute("caption_scores", tmp_path, captions, references, 8, **PYTHON)
    texts = caption_scores.tokenize_python(captions)
    groups = [caption_scores.tokenize_python(group) for group in references]
    assert results["cider"] == pytest.approx(cider_d(texts, groups), abs=1e-9)
    for order in (1, 2, 3, 4):
        assert results[f"bleu{order}"] == pytest.approx(bleu(texts, groups, order), abs=1e-6)
    assert results["tokenizer"] == "python" and "meteor" not in results


def test_cider_idf_is_of_the_whole_set(coco_captions, tmp_path):
    captions, references = coco_captions
    halves = [compute("caption_scores", tmp_path, captions[i::2], references[i::2], **PYTHON) for i in (0, 1)]
    whole = compute("caption_scores", tmp_path, captions, references, 1, **PYTHON)
    assert abs(sum(half["cider"] for half in halves) / 2 - whole["cider"]) > 0.01
    # Of a single picture every word is in all references: no word is worth anything.
    assert compute("caption_scores", tmp_path, captions[:1], [captions[:1]], **PYTHON)["cider"] == 0


def test_rouge_by_hand(tmp_path):
    # Longest common subsequence "a man a horse" of 5 words and of 6: P 4/5, R 4/6, beta 1.2.
    expected = (1 + 1.2**2) * (4 / 5) * (4 / 6) / (4 / 6 + 1.2**2 * 4 / 5)
    results = compute("caption_scores", tmp_path, ["a man on a horse"], [["A man rides a brown horse."]], **PYTHON)
    assert results["rouge_l"] == pytest.approx(expected)
    assert results["bleu1"] == pytest.approx(4 / 5 * math.exp(1 - 6 / 5))


def test_captions_missing_and_perfect(coco_captions, tmp_path):
    captions, references = coco_captions
    nothing = compute("caption_scores", tmp_path, [None] * 25 + [" \n"] * 25, references, **PYTHON)
    assert nothing["cider"] == nothing["rouge_l"] == 0 and nothing["bleu4"] < 1e-6
    assert nothing["problems"] == {"missing": 50}
    perfect = compute("caption_scores", tmp_path, captions, [[caption] for caption in captions], **PYTHON)
    assert perfect["cider"] == pytest.approx(10) and perfect["bleu4"] == pytest.approx(1)
    assert perfect["rouge_l"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"references\[0\]: there is no word"):
        compute("caption_scores", tmp_path, ["a"], [["..."]], **PYTHON)
    with pytest.raises(ValueError, match="tokenizer is 'spacy'"):
        compute("caption_scores", tmp_path, ["a"], [["a"]], tokenizer="spacy")


def test_without_java_there_is_a_fallback(coco_captions, tmp_path, monkeypatch):
    expected = compute("caption_scores", tmp_path, *coco_captions, **PYTHON)
    monkeypatch.setenv("PATH", "")
    caption_scores.have_java.cache_clear()
    try:
        # The loaded metric is a copy of the module with a cache of its own; the function is what it calls.
        results, _ = caption_scores.score_captions(*coco_captions)
        with pytest.raises(ValueError, match="need Java"):
            caption_scores.score_captions(*coco_captions, tokenizer="ptb")
    finally:
        caption_scores.have_java.cache_clear()
    assert results == {name: value for name, value in expected.items() if name not in ("n", "problems")}


TOKENISED = [
    ("A man's dog (big) isn't here.", "a man 's dog -lrb- big -rrb- is n't here"),
    ("a well-dressed man -- running... fast!", "a well-dressed man running fast"),
    ("can't cannot gonna, they’ll", "ca n't can not gon na they 'll"),
    ("3,000 at 10:30; $5.00 50% U.S. Mr. Smith", "3,000 at 10:30 $ 5.00 50 % u.s. mr. smith"),
    ('he said "no"\n\nand “yes”', "he said no and yes"),
    ("", ""),
]


def test_tokenisers():
    texts, words = zip(*TOKENISED, strict=True)
    assert caption_scores.tokenize_python(texts) == list(words)
    if caption_scores.have_java():
        assert caption_scores.tokenize_ptb(texts) == list(words)


def test_a_text_is_tokenised_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        caption_scores, "tokenize_python", lambda texts: asked.append(texts) or [f"<{t}>" for t in texts]
    )
    caption_scores._words_of.cache_clear()
    try:
        assert caption_scores.tokenize(["a", "b", "a"], "python") == ["<a>", "<b>", "<a>"]
        assert caption_scores.tokenize(["b", "c"], "python") == ["<b>", "<c>"]
    finally:
        caption_scores._words_of.cache_clear()
    assert asked == [["a", "b", "a"], ["c"]]


@needs_java
def test_tokenisers_agree_on_real_captions(coco_captions):
    captions, references = coco_captions
    texts = captions + [text for group in references for text in group]
    assert caption_scores.tokenize_python(texts) == caption_scores.tokenize_ptb(texts)


@needs_java
@pytest.mark.slow
def test_java_agrees_with_pycocoevalcap(coco_captions, tmp_path):
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions, references = coco_captions
    predicted = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(captions)})
    human = PTBTokenizer().tokenize({i: [{"caption": text} for text in group] for i, group in enumerate(references)})
    results = compute("caption_scores", tmp_path, captions, references, 8, per_sample=True)
    each = [sample["meteor"] for sample in results.pop("samples")]
    assert each == pytest.approx(Meteor().compute_score(human, predicted)[1], abs=1e-6)
    assert results["tokenizer"] == "ptb"
    assert results["cider"] == pytest.approx(Cider().compute_score(human, predicted)[0], abs=1e-9)
    assert results["meteor"] == pytest.approx(Meteor().compute_score(human, predicted)[0], abs=1e-6)
    # An empty caption is scored, not skipped.
    worse = compute("caption_scores", tmp_path, [None, *captions[1:]], references)
    assert 0 < worse["meteor"] < results["meteor"]
