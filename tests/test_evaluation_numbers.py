"""From predictions to numbers: checks, intervals, calibration, comparison."""

import json
import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from scipy.stats import binomtest

from metric_inputs import SIZE, made_entry, made_sample, noisy_set, perfect, rectangle
from perceptiongpt import metrics
from perceptiongpt.evaluation import intervals
from perceptiongpt.evaluation.comparison import paired_differences
from perceptiongpt.evaluation.detection import detection_tables, images_with_objects
from perceptiongpt.evaluation.intervals import Ratio
from perceptiongpt.evaluation.measures import MEASURES
from perceptiongpt.evaluation.predictions import (
    check_prediction,
    empty_mask,
    marked_phrases,
    plain_text,
    rectangle_mask,
    references,
)
from perceptiongpt.evaluation.results import Result, Scorer
from perceptiongpt.metrics.caption_scores import caption_scores


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Ten resamples of whole sets: AP takes a while."""
    monkeypatch.setattr(intervals, "WHOLE_SET_RESAMPLES", 10)


@pytest.fixture
def no_java(monkeypatch):
    """`grounded_caption` without METEOR, whose program takes seconds to start."""
    monkeypatch.setattr(caption_scores, "have_java", lambda: False)


def score(metric_names, samples: list[dict], entries, **options) -> Result:
    """The result of some metrics over all samples; `entries`: predictions by id, or in the order of the samples."""
    if isinstance(entries, list):
        entries = {sample["id"]: entry for sample, entry in zip(samples, entries, strict=True)}
    return Scorer(dict.fromkeys([metric_names] if isinstance(metric_names, str) else metric_names), **options).score(
        samples, entries
    )


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_an_empty_list_of_objects_of_another_model_is_not_about_vis():
    sample = made_sample(0, [(5, 5, 30, 30)])
    given = {"id": "0-0", "objects": []}
    reasons = {
        "no objects in the prediction": given,
        "no <vis> in the answer": given | {"finished": True},
        "cut off before any <vis>": given | {"finished": False},
        "answered that there is none": given | {"text": "There is no cup."},
    }
    for reason, entry in reasons.items():
        assert check_prediction(sample, entry, 0.0, {"box"}).reason == reason


def test_a_mask_alone_has_a_box():
    sample = made_sample(0, [(5, 5, 30, 30)])
    alone = {"objects": [{"mask": rectangle(5, 5, 30, 30, **SIZE)}]}
    result = score(["box_accuracy", "referring_iou"], [sample], [alone])
    assert result.metrics["box_accuracy"]["acc@0.9"] == result.metrics["referring_iou"]["ciou"] == 1
    assert result.missing == {}
    # A box that is there but malformed, or a mask without pixels, gives none.
    malformed = {"objects": [alone["objects"][0] | {"box": [1, 2, 3]}]}
    assert score("box_accuracy", [sample], [malformed]).missing == {"malformed box: box is not four finite numbers": 1}
    empty = {"objects": [{"mask": empty_mask(sample)}]}
    assert score("box_accuracy", [sample], [empty]).metrics["box_accuracy"]["acc@0.5"] == 0


def test_markers_in_given_texts_count_for_nothing(no_java):
    content = "<p>a red cup</p><vis> stands on <p>the old table</p><vis> near <p>number {}</p><vis>."
    samples, marked, plain = [], [], []
    for number, word in enumerate(("one", "two", "three")):
        answer = {"content": content.format(word), "boxes": [None] * 3, "masks": [None] * 3}
        samples.append(made_sample(number, [], task="spotting_caption") | {"answers": [answer]})
        marked.append({"text": answer["content"], "objects": []})
        plain.append({"text": plain_text(answer["content"]), "objects": []})
    first, second = (score("grounded_caption", samples, some, intervals=False) for some in (marked, plain))
    assert first.metrics["grounded_caption"]["cider"] == second.metrics["grounded_caption"]["cider"] > 1
    assert first.predictions["0-0"].text == "a red cup stands on the old table near number one."
    assert check_prediction(samples[0], {"text": "as  it\nis"}, 0, set()).text == "as  it\nis"


def test_phrases_of_an_answer():
    content = "<p>Two cups</p><vis><vis> beside <p>a dog</p><vis> and <vis>."
    assert marked_phrases(content) == ["Two cups", "Two cups", "a dog", None]
    assert plain_text(content) == "Two cups beside a dog and ."


def test_scores_of_a_signal_default_to_the_boxs():
    sample = made_sample(0, [(5, 5, 30, 30)])
    entry = {"objects": [{"box": [5, 5, 30, 30], "score": 0.4, "point_score": 0.9}]}
    (one,) = check_prediction(sample, entry, 0.0, {"box"}).objects
    assert (one["score"], one["mask_score"], one["point_score"]) == (0.4, 0.4, 0.9)
    assert not check_prediction(sample, entry, 0.5, {"box"}).objects


# ---- metrics ---------------------------------------------------------------------------------------------------------


def assert_sums_make_the_numbers(result: Result, name: str) -> None:
    """The ratios of the summed columns are the module's numbers, and each lies in its interval."""
    table = intervals.column_table(list(result.columns[name].values()))
    sums = {column: values.sum() for column, values in table.items()}
    for key, ratio in MEASURES[name].ratios.items():
        value = result.metrics[name][key]
        assert float(ratio.of(sums)) == pytest.approx(value, abs=1e-6), (name, key)
        low, high = result.intervals[name][key]
        assert low - 1e-9 <= value <= high + 1e-9 and low < high, (name, key)


def test_sums_of_columns_make_the_modules_numbers():
    samples, entries = noisy_set(0)
    for entry in entries.values():
        for one in entry["objects"]:
            one["point"] = [one["box"][0] + 4, one["box"][1] + 6]
    names = ["box_accuracy", "referring_iou", "generalized_referring", "generalized_boxes", "point_accuracy"]
    result = score(names, samples, entries)
    for name in names:
        assert_sums_make_the_numbers(result, name)
    low, high = result.emission["interval"]
    assert low < result.emission["rate"] < high
    without = score(names, samples, entries, intervals=False)
    assert without.metrics == result.metrics and without.intervals == {} and without.emission["interval"] is None
    assert without.calibration["box"]["ece_interval"] is None


def test_sums_of_answers_make_popes_numbers():
    answers = ["Yes.", "No.", "yes", "no, there is not", "Nothing", "NO.", "", "A dog. No cat.", "Yes", "I see none."]
    samples, entries = [], {}
    for number in range(60):
        label = ("yes", "no", "no")[number % 3]
        answer = [{"content": label.capitalize() + ".", "boxes": [], "masks": []}]
        samples.append(made_sample(number, [], task="vqa", image_id=str(number // 4)) | {"answers": answer})
        if number != 7:
            entries[samples[-1]["id"]] = {"text": answers[number * 7 % 11 % 10]}
    result = score("pope", samples, entries)
    assert_sums_make_the_numbers(result, "pope")
    shares = {key for key, value in result.metrics["pope"].items() if isinstance(value, float)}
    assert shares == set(result.intervals["pope"]) and len(shares) == 10


def test_attributes_of_a_region():
    answers = ["A striped red circle.", "A blue star, partly hidden by a green ring.", "A dotted pink heart."]
    samples = []
    for number, text in enumerate(answers * 4):
        answer = [{"content": text, "boxes": [], "masks": []}]
        samples.append(made_sample(number, [], task="region_caption") | {"answers": answer})
    texts = ["a circle, red and striped", "A blue star.", ""] * 4
    result = score("attributes_right", samples, [{"text": text} for text in texts])
    found = result.metrics["attributes_right"]
    assert (found["attributes_right"], found["own_attributes_right"]) == (1 / 3, 2 / 3)
    assert_sums_make_the_numbers(result, "attributes_right")


def test_ignored_pixels_count_for_neither_side():
    sample = made_sample(0, [(0, 0, 20, 20)], task="reasoning", ignore=rectangle(10, 0, 20, 20, **SIZE))
    result = score("referring_iou", [sample], [made_entry(sample, [(0, 0, 10, 20)])])
    assert result.metrics["referring_iou"]["ciou"] == 1


def test_only_the_answer_after_the_evidence_is_measured():
    mask = rectangle(1, 1, 9, 9, **SIZE)
    answers = [{"content": "<p>the red cup</p><vis>: Two.", "boxes": [[1, 1, 9, 9]], "masks": [mask]}]
    sample = made_sample(0, [], task="grounded_vqa") | {"answers": answers}
    for text, value in (("the blue dog: Two.", 1), ("the red cup: Three.", 0), ("Two", 1)):
        entry = made_entry(sample, []) | {"text": text}
        assert score("vqa_accuracy", [sample], [entry]).metrics["vqa_accuracy"]["accuracy"] == value


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_interval_of_a_share_is_wilsons_and_knows_that_samples_of_an_image_are_alike():
    hits, one = np.array([1.0] * 13 + [0.0] * 27), np.ones(40)
    low, high = intervals.share_interval(hits, one, np.arange(40))
    reference = binomtest(13, 40).proportion_ci(method="wilson")
    # The design effect of independent samples is estimated as n / (n - 1).
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=3e-3)
    assert intervals.share_interval(np.zeros(40), one, np.arange(40)) == pytest.approx(
        list(binomtest(0, 40).proportion_ci(method="wilson")), abs=1e-6
    )
    fourfold = [np.repeat(column, 4) for column in (hits, one, np.arange(40))]
    assert intervals.share_interval(*fourfold) == pytest.approx([low, high], abs=1e-9)  # no more known than before


def test_intervals_of_a_mean_are_as_wide_as_theory_says():
    values = np.random.default_rng(0).normal(0.4, 0.1, 400)
    rows, images = [{"value": value} for value in values], [str(i) for i in range(400)]
    half = 1.96 * values.std() / 20
    expected = pytest.approx([values.mean() - half, values.mean() + half], abs=2e-3)
    assert intervals.ratio_intervals(rows, {"mean": Ratio("value")}, images)["mean"] == expected


def test_whole_sets_are_resampled_by_image(monkeypatch):
    monkeypatch.setattr(intervals, "WHOLE_SET_RESAMPLES", 400)
    values = np.repeat(np.random.default_rng(0).normal(0.4, 0.1, 100), 3)  # three equal samples an image
    images = [str(index // 3) for index in range(300)]

    def mean(indices, copies):
        drawn = {(images[index], copy) for index, copy in zip(indices, copies, strict=True)}
        assert len(indices) == 300 and len(drawn) == 100  # whole images, and copies of one are told apart
        return {"mean": values[indices].mean(), "nothing": None}

    drawn = intervals.resampled_values(mean, images, ["mean", "nothing"], "means")
    half = 1.96 * values.std() / 10
    assert intervals.spread(0.4, drawn["mean"]) == pytest.approx([0.4 - half, 0.4 + half], rel=0.1, abs=0)
    assert intervals.spread(0.4, drawn["nothing"]) is None
    assert intervals.spread(0.999, drawn["mean"])[1] == 1 and intervals.spread(0.999, drawn["mean"], None)[1] > 1


def detection_set(seed: int, images: int = 12) -> tuple[list[dict], dict[str, dict]]:
    """Questions for two categories about images that hold objects of every size of COCO's, and rough answers.

    The mask of an object is the upper half of its box: often of a smaller one of COCO's three sizes.
    """

    def upper_half(box) -> list[float]:
        return [*box[:3], (box[1] + box[3]) / 2]

    rng = np.random.default_rng(seed)
    size, samples, entries = {"width": 400, "height": 300}, [], {}
    for number in range(2 * images):
        boxes = []
        for side in rng.choice([12, 20, 50, 80, 110, 150], rng.integers(0, 5)):
            x, y = rng.integers(0, [400 - side, 300 - side])
            boxes.append((x, y, x + side, y + side * 0.9))
        category = ("cup", "dog")[number % 2]
        sample = made_sample(number, [], task="detect" if boxes else "no_target", image_id=str(number // 2))
        sample |= size | {"phrase": category}
        answer = {"content": "<vis>" * len(boxes) or f"There is no {category}."}
        answer |= {"boxes": [list(map(float, box)) for box in boxes]}
        answer["masks"] = [rectangle_mask(sample, upper_half(box)) for box in boxes]
        sample["answers"] = [answer]
        objects = []
        for box in [*boxes, *boxes[: rng.integers(0, 2)]]:
            if rng.random() < 0.85:
                moved = (np.array(box) + rng.normal(0, 0.04, 4) * (box[2] - box[0])).tolist()
                mask = rectangle_mask(sample, upper_half(moved))
                objects.append({"box": moved, "mask": mask, "score": float(rng.random())})
        samples.append(sample)
        entries[sample["id"]] = {"id": sample["id"], "text": "", "objects": objects}
    return samples, entries


def test_an_image_that_is_drawn_twice_is_two_images():
    samples, entries = detection_set(1, images=6)
    inputs = [MEASURES["coco_detection"].inputs(one, Scorer({}).check(one, entries[one["id"]])) for one in samples]
    twice, copies = inputs + inputs[:4], [0] * len(inputs) + [1] * 4  # the first two images
    tables = detection_tables(twice, copies)
    copied = [given | {"image_id": given["image_id"] + "copy"} for given in inputs[:4]]
    assert len(tables["references"][0]["images"]) == 8
    found, renamed = (
        metrics.load("coco_detection").compute(**some) for some in (tables, detection_tables(inputs + copied))
    )
    assert found == renamed and found["n"] == 8
    assert found["bbox_ap"] != metrics.load("coco_detection").compute(**detection_tables(inputs))["bbox_ap"]


def test_ap_has_intervals():
    samples, entries = detection_set(1)
    result = score("coco_detection", samples, entries)
    assert set(result.intervals["coco_detection"]) == set(MEASURES["coco_detection"].estimates)
    for key, (low, high) in result.intervals["coco_detection"].items():
        assert 0 <= low <= result.metrics["coco_detection"][key] <= high <= 1 and high - low > 0.05, key
    # Of no detection at all: as wide as that of no hit among so many images.
    nothing = score("coco_detection", samples, {})
    inputs = list(nothing.inputs["coco_detection"].values())
    assert nothing.metrics["coco_detection"]["bbox_ap"] == 0
    for key, interval in nothing.intervals["coco_detection"].items():
        assert interval == intervals.wilson(0, images_with_objects(inputs, key)), key


def test_equal_resamples_do_not_make_an_interval_without_width():
    samples = [made_sample(number, [(5, 5, 25, 30)], image_id=str(number % 3)) for number in range(13)]
    names = ("box_accuracy", "referring_iou", "generalized_referring", "coco_detection")
    wrong, right = [made_entry(sample, [(40, 5, 55, 30)]) for sample in samples], [perfect(one) for one in samples]
    for entries, share in ((wrong, 0), (right, 1)):
        result = score(names, samples, entries)
        for module, found in result.intervals.items():
            for key, interval in found.items():
                value = result.metrics[module][key]
                if value is None:
                    assert interval is None, key
                else:
                    assert interval[0] <= value <= interval[1] and interval[1] - interval[0] > 0.01, key
        for key, n in (("referring_iou/ciou", 13), ("coco_detection/segm_ap", 3), ("coco_detection/bbox_ap_small", 3)):
            module, key = key.split("/")
            wilson = binomtest(n * share, n).proportion_ci(method="wilson")
            assert result.intervals[module][key] == pytest.approx([wilson.low, wilson.high], abs=1e-6), key
    assert intervals.wide_enough([0.4, 0.4], None, 3) is None  # CIDEr has no bounds


def test_one_large_object_does_not_make_ap_of_large_ones_certain():
    inputs = [{"image_id": str(n // 2), "true": [{"area": 100.0 + 9900 * (n == 0)}]} for n in range(24)]
    assert [images_with_objects(inputs, f"bbox_{key}") for key in ("ap", "ap50", "ap_large")] == [12, 12, 1]


def caption_set() -> tuple[list[dict], dict[str, dict]]:
    words = "a red cup stands on the old wooden table beside two small green apples".split()
    samples, entries = [], {}
    for number in range(12):
        texts = [" ".join(words[number % 3 + i :]) for i in range(2)]
        answers = [{"content": text, "boxes": [], "masks": []} for text in texts]
        samples.append(made_sample(number, [], task="caption") | {"answers": answers})
        text = " ".join(words[: 14 - number] if number % 2 else words[number % 5 :]).replace("stands", "standing")
        entries[samples[-1]["id"]] = made_entry(samples[-1], []) | {"text": text}
    return samples, entries


@pytest.mark.slow  # METEOR is
def test_captions_have_intervals_and_can_be_compared():
    samples, entries = caption_set()
    result = score("caption_scores", samples, entries)
    for key in ("cider", "bleu1", "bleu4", "rouge_l", "meteor"):
        low, high = result.intervals["caption_scores"][key]
        assert low < result.metrics["caption_scores"][key] < high, key
    worse = {name: entry | {"text": "blue dogs run"} for name, entry in entries.items()}
    other = score("caption_scores", samples, worse, intervals=False)
    found = paired_differences(run_of(samples, other), run_of(samples, result), "caption_scores")["estimates"]
    assert set(found) == {"cider", "rouge_l", "meteor", "bleu1", "bleu2", "bleu3", "bleu4"}
    for key in ("cider", "rouge_l", "meteor"):
        assert found[key]["interval"][0] > 0 and found[key]["p"] < 0.05, (key, found[key])


def test_ap50_of_grounded_captions_has_an_interval(no_java):
    samples, entries = noisy_set(2)
    for sample in samples:
        sample["answers"][0]["content"] = "<p>a cup</p><vis>" * len(sample["answers"][0]["boxes"]) or "nothing"
        entries[sample["id"]]["text"] = "a cup"
    result = score("grounded_caption", samples, entries)
    low, high = result.intervals["grounded_caption"]["ap50"]
    assert low <= result.metrics["grounded_caption"]["ap50"] <= high and high - low > 0.05
    assert result.intervals["grounded_caption"]["cider"] and "meteor" not in result.intervals["grounded_caption"]


# ---- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    samples = [made_sample(number, [(5, 5, 25, 30)]) for number in range(4)] + [made_sample(4, [], task="no_target")]
    right, wrong = (5, 5, 25, 30), (40, 5, 55, 30)
    boxes = [[right], [right], [wrong], [], [wrong]]
    scores = [[0.95], [0.55], [0.55], [], [0.25]]
    entries = {s["id"]: made_entry(s, b, p) for s, b, p in zip(samples, boxes, scores, strict=True)}
    found = Scorer({"box_accuracy": ["refer"]}).score(samples, entries).calibration
    # Bins 0.9-1: score .95, all right; 0.5-0.6: .55, half right; 0.2-0.3: .25, none right (there is no target).
    assert found["box"]["ece"] == pytest.approx(0.25 * 0.05 + 0.5 * 0.05 + 0.25 * 0.25)
    low, high = found["box"]["ece_interval"]
    assert 0 <= low < found["box"]["ece"] < high <= 1
    curve = found["box"]["precision_recall"]
    assert curve["threshold"] == [0.95, 0.55, 0.25]
    assert curve["precision"] == pytest.approx([1, 2 / 3, 2 / 4])
    assert curve["recall"] == pytest.approx([1 / 4, 2 / 4, 2 / 4])
    decided = found["no_target"]
    at = decided["threshold"].index(0.25)
    assert [decided["n_acc"][at], decided["n_acc"][at + 1]] == [0, 1]  # found from 0.25 on, none above
    assert [decided["t_acc"][0], decided["t_acc"][56], decided["t_acc"][96]] == [3 / 4, 1 / 4, 0]


def test_an_object_gets_a_target_that_no_surer_one_has():
    sample = made_sample(0, [(5, 5, 25, 30), (30, 5, 50, 30)], task="detect")
    entry = made_entry(sample, [(5, 5, 25, 30), (5, 5, 25, 29), (30, 5, 50, 30)], [0.3, 0.9, 0.6])
    found = score("generalized_boxes", [sample], [entry]).calibration
    for signal in ("box", "mask"):
        assert found[signal]["accuracy"] == pytest.approx(2 / 3)
        assert found[signal]["precision_recall"]["precision"] == pytest.approx([1, 1, 2 / 3])
    assert "point" not in found


# ---- comparison ------------------------------------------------------------------------------------------------------


def run_of(samples: list[dict], result: Result) -> dict[str, dict]:
    """What `samples.jsonl` holds, by id."""
    found = {}
    for sample in samples:
        parts = {
            part: {name: rows[sample["id"]] for name, rows in getattr(result, part).items() if sample["id"] in rows}
            for part in ("columns", "inputs")
        }
        found[sample["id"]] = json.loads(json.dumps({"image_id": sample["image_id"], **parts}))
    return found


def test_rounding_is_no_difference():
    samples, entries = noisy_set(3)
    result = Scorer({"box_accuracy": ["refer"]}).score(samples, entries)
    first, second = run_of(samples, result), run_of(samples, result)
    for row in second.values():
        for columns in row["columns"].values():
            columns["value"] -= 1e-7
    row = paired_differences(first, second, "box_accuracy")["estimates"]["miou"]
    assert (row["difference"], row["interval"], row["p"]) == (0, [0, 0], 1)


@pytest.mark.slow
def test_ap_is_compared_on_the_same_images():
    samples, entries = detection_set(2)
    results = []
    for seed, share in ((0, 0.6), (1, 1.0)):
        rng = np.random.default_rng(seed)
        some = {
            name: entry | {"objects": [one for one in entry["objects"] if rng.random() < share]}
            for name, entry in entries.items()
        }
        results.append(score("coco_detection", samples, some, intervals=False))
    runs = [run_of(samples, result) for result in results]
    found = paired_differences(*runs, "coco_detection")["estimates"]
    for key, row in found.items():
        assert [row["a"], row["b"]] == [one.metrics["coco_detection"][key] for one in results], key
    assert found["bbox_ap"]["interval"][0] > 0 and found["bbox_ap"]["p"] < 0.05
    assert set(found) == set(MEASURES["coco_detection"].estimates)
    without = paired_differences(*runs, "coco_detection", intervals=False)["estimates"]["bbox_ap"]
    assert without == found["bbox_ap"] | {"interval": None, "p": None}
    same = paired_differences(runs[0], runs[0], "coco_detection")["estimates"]["bbox_ap"]
    assert same["difference"] == 0 and same["p"] == 1


def test_boxes_of_references_are_tight_around_their_masks():
    sample = made_sample(0, [(5, 6, 25, 30)])
    sample["answers"][0]["boxes"] = [None]
    assert references(sample)[0]["box"] == [5.0, 6.0, 25.0, 30.0]
    x, y, width, height = coco_mask.toBbox(references(sample)[0]["mask"])
    assert [x, y, x + width, y + height] == references(sample)[0]["box"] and not math.isnan(x)
