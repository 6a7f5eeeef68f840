"""Drawn and pasted scenes: exact annotations, expressions that mean what they say, and the fixed test set."""

import hashlib
import json
import math
import pickle
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from perceptiongpt.data.scenes.bench import (
    BENCH,
    BENCH_COMBINATIONS,
    FIRST_TEST_SEED,
    bench_baselines,
    scene_details,
)
from perceptiongpt.data.scenes.dataset import USUAL_TASKS, ScenesDataset, scenes_rows
from perceptiongpt.data.scenes.expressions import ODD_ONE, with_article
from perceptiongpt.data.scenes.pictures import COLORS, HELD_OUT, PATTERNS, SHAPES
from perceptiongpt.data.schema import POINT_TASKS, decode_rle, validate_row
from perceptiongpt.geometry_perceptiongpt import deepest_pixel


PICTURES = 40
BENCH_SAMPLES = 200  # ten blocks
TINY_COCO = "tiny_coco"
NOUNS = (*SHAPES, "dot", "shape")


# ---- an independent reading of the expressions -----------------------------------------------------------------------

RELATION = (
    r"to the left of|to the right of|above|below|closest to|farthest from|partly hidden by|partly covering"
    r"|larger than|smaller than"
)
CORNER = r"center|(?:top|bottom) (?:left|right) corner"
RANKS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
RIDDLES = {
    "one that would roll away": {"circle", "ring", "dot"},
    "one without any corners": {"circle", "ring", "dot"},
    "one that would fit on a finger": {"ring"},
    "one with three sides": {"triangle"},
    "one that twinkles at night": {"star"},
    "one that stands for love": {"heart"},
    "one that marks a hospital": {"cross"},
    "one shaped like a bee's cell": {"hexagon"},
    "one that shows the way": {"arrow"},
    "one that falls when it rains": {"drop"},
    "one that looks like the young moon": {"crescent"},
    "one as white as snow": {"white"},
    "one that has the color of grass": {"green"},
    "one that has the color of a ripe tomato": {"red"},
    "one that has the color of a lemon": {"yellow"},
    "one as black as coal": {"black"},
    "one that has the color of chocolate": {"brown"},
    "one that has the color of a carrot": {"orange"},
}
ANIMALS = {"bark": "dog", "purrs": "cat", "moo": "cow", "wool": "sheep", "neck": "giraffe", "trunk": "elephant"}
THINGS = {"stripes": "zebra", "time": "clock", "rain": "umbrella", "reader": "book", "rails": "train"}
KINDS_OF_THINGS = {"fly": {"bird", "airplane", "kite"}, "peeled": {"banana", "orange"}}
PASTED_RIDDLES = KINDS_OF_THINGS | {word: {name} for word, name in (ANIMALS | THINGS).items()}


class Solver:
    """Finds the objects that an English expression is about, from the objects' attributes and masks alone."""

    def __init__(self, scene):
        self.size, self.pasted, self.objects = scene.size, scene.pasted, []
        visible = np.full((scene.size, scene.size), -1)
        for number, one in enumerate(scene.objects):
            mask = decode_rle(one.mask).astype(bool)
            assert (visible[mask] == -1).all()  # masks of what is visible share no pixel
            visible[mask] = number
        for number, one in enumerate(scene.objects):
            rows, columns = np.nonzero(visible == number)
            x, y, form = one.window
            whole = np.zeros((scene.size, scene.size), dtype=bool)
            whole[y : y + form.shape[0], x : x + form.shape[1]] = form
            assert whole[rows, columns].all()
            owners = visible[whole]
            self.objects.append(
                {
                    "number": number,
                    "words": {one.shape, one.color, one.pattern, "shape"},
                    "name": one.shape,
                    "values": (one.shape, one.color, one.pattern),
                    "x": (columns.min() + columns.max() + 1) / 2,
                    "y": (rows.min() + rows.max() + 1) / 2,
                    "side": one.side,
                    "area": len(rows),
                    "covers": {other: (owners == other).mean() for other in set(owners.tolist()) - {number}},
                    "box": [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1],
                }
            )

    def solve(self, text: str) -> set[int]:
        return {one["number"] for one in self.find(text)}

    def noun(self, text: str) -> list[dict]:
        if self.pasted:
            return [one for one in self.objects if one["name"] == text]
        *words, last = text.split()
        assert last in NOUNS and all(word in (*PATTERNS, *COLORS) for word in words), text
        return [one for one in self.objects if {*words, last} <= one["words"]]

    def find(self, text: str) -> list[dict]:
        if match := re.fullmatch(r"(.+?) that is neither (\w+) nor (\w+)", text):
            return [one for one in self.noun(match[1]) if not one["words"] & {match[2], match[3]}]
        if match := re.fullmatch(rf"(.+?) that is not ({RELATION}) the (.+)", text):
            yes = [one["number"] for one in self.find(f"{match[1]} {match[2]} the {match[3]}")]
            return [one for one in self.noun(match[1]) if one["number"] not in yes]
        if match := re.fullmatch(r"(.+?) that is not (?:an? )?(\w+)", text):
            return [one for one in self.noun(match[1]) if match[2] not in one["words"]]
        if match := re.fullmatch(rf"(.+?) ({RELATION}) the (?!(?:{CORNER})$)(.+)", text):
            (anchor,) = self.find(match[3])
            others = [one for one in self.noun(match[1]) if one is not anchor]
            return self.related(match[2], others, anchor)
        if match := re.fullmatch(rf"(.+) closest to the ({CORNER})", text):
            x = self.size * (0.5 if match[2] == "center" else "right" in match[2])
            y = self.size * (0.5 if match[2] == "center" else "bottom" in match[2])
            return [min(self.noun(match[1]), key=lambda one: math.dist((one["x"], one["y"]), (x, y)))]
        if match := re.fullmatch(r"(.+) farthest to the (left|right)", text):
            return [self.ranked(match[1], match[2])[0]]
        if match := re.fullmatch(r"(left|right|top|bottom)most (.+)", text):
            return [self.ranked(match[2], match[1])[0]]
        if match := re.fullmatch(rf"({'|'.join(RANKS)}) (.+) from the (left|right|top|bottom)", text):
            return self.ranked(match[2], match[3])[RANKS.index(match[1]) :][:1]
        if match := re.fullmatch(r"(second )?(largest|smallest) (.+)", text):
            order = sorted(self.noun(match[3]), key=lambda one: one["side"], reverse=match[2] == "largest")
            by_area = sorted(self.noun(match[3]), key=lambda one: one["area"], reverse=match[2] == "largest")
            rank = 1 if match[1] else 0
            assert order[rank] is by_area[rank]
            return [order[rank]]
        if match := re.fullmatch(r"(larger|smaller) (.+)", text):
            two = self.noun(match[2])
            assert len(two) == 2
            return [(max if match[1] == "larger" else min)(two, key=lambda one: one["side"])]
        if text == ODD_ONE:
            odd = []
            for part in range(3):
                count = Counter(one["values"][part] for one in self.objects)
                odd += [one for one in self.objects if len(count) == 2 and count[one["values"][part]] == 1]
            return odd
        if self.pasted and text.startswith("one "):
            (names,) = [names for word, names in PASTED_RIDDLES.items() if word in text.split()]
            return [one for one in self.objects if one["name"] in names]
        if text in RIDDLES:
            return [one for one in self.objects if one["words"] & RIDDLES[text]]
        return self.noun(text)

    def ranked(self, noun: str, end: str) -> list[dict]:
        axis = "x" if end in ("left", "right") else "y"
        return sorted(self.noun(noun), key=lambda one: one[axis], reverse=end in ("right", "bottom"))

    def related(self, relation: str, others: list[dict], anchor: dict) -> list[dict]:
        def distance(one):
            return math.dist((one["x"], one["y"]), (anchor["x"], anchor["y"]))

        if relation in ("closest to", "farthest from"):
            return [(min if relation == "closest to" else max)(others, key=distance)]
        holds = {
            "to the left of": lambda one: one["x"] < anchor["x"],
            "to the right of": lambda one: one["x"] > anchor["x"],
            "above": lambda one: one["y"] < anchor["y"],
            "below": lambda one: one["y"] > anchor["y"],
            "partly hidden by": lambda one: one["covers"].get(anchor["number"], 0) > 0,
            "partly covering": lambda one: anchor["covers"].get(one["number"], 0) > 0,
            "larger than": lambda one: one["side"] > anchor["side"] and one["area"] > anchor["area"],
            "smaller than": lambda one: one["side"] < anchor["side"] and one["area"] < anchor["area"],
        }[relation]
        return [one for one in others if holds(one)]


def check_expressions(dataset: ScenesDataset, pictures: int, every_task: bool = True) -> Counter:
    """Solve every expression of the rows, and compare the row's boxes and masks with those of what was found."""
    kinds = Counter()
    for index in range(pictures):
        rows = dataset.image_rows(index) if every_task else [dataset[index]]
        details = dataset.details(index, every_task)
        solver = Solver(details[0]["scene"])
        for row, detail in zip(rows, details, strict=True):
            if detail["text"] is None:
                continue
            found = solver.solve(detail["text"])
            assert found == set(detail["targets"]), (detail["text"], found, detail["targets"])
            assert row["task"] == "reasoning" or detail["text"] in row["messages"][0]["content"]
            assert (len(found) == 0) == (row["task"] == "no_target")
            assert row["boxes"] == sorted(solver.objects[number]["box"] for number in found)
            assert row["task"] not in ("refer", "reasoning") or len(found) == 1
            kinds[detail["kind"]] += 1
    return kinds


def test_the_solver_itself():
    """On what holds for any scene, and on words that no scene knows."""
    scene = ScenesDataset(1, 3, split="train").details(0)[0]["scene"]
    solver = Solver(scene)
    left = min(scene.objects, key=lambda one: one.x)
    assert solver.solve("leftmost shape") == {left.index} == solver.solve("first shape from the left")
    assert solver.solve("shape") == set(range(len(scene.objects)))
    assert solver.solve("shape that is not to the left of the rightmost shape") == solver.solve("rightmost shape")
    with pytest.raises(AssertionError):
        solver.solve("shape of things to come")


# ---- drawn scenes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def test_rows():
    return list(scenes_rows(split="test", seed=FIRST_TEST_SEED, limit=PICTURES))


def test_every_task_and_every_row_is_valid(test_rows):
    tasks = Counter(row["task"] for row in test_rows)
    assert set(tasks) == set(USUAL_TASKS)
    assert min(tasks.values()) > PICTURES / 4
    for index, row in enumerate(test_rows):
        assert validate_row(row, index)[1] == 0
        for box, mask in zip(row["boxes"], row["masks"], strict=True):
            if box is not None and mask is not None:
                rows, columns = np.nonzero(decode_rle(mask))
                assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    dialogues = [row for row in test_rows if row["task"] == "dialogue"]
    assert all(len(row["messages"]) >= 4 for row in dialogues)
    asked = ["<vis>" in "".join(m["content"] for m in row["messages"] if m["role"] == "user") for row in dialogues]
    assert any(asked) and not all(asked)


def test_points_are_asked_for_by_name():
    usual = ScenesDataset(1, FIRST_TEST_SEED, split="test").image_rows(0)
    more = ScenesDataset(1, FIRST_TEST_SEED, split="test", tasks=(*USUAL_TASKS, *POINT_TASKS)).image_rows(0)
    assert more[: len(usual)] == usual and not any(point for row in usual for point in row["points"])
    tasks = Counter()
    for row in scenes_rows(split="test", tasks=POINT_TASKS, limit=10, evaluation=True):
        tasks[row["task"]] += 1
        row, prompt = validate_row(row)[0], row["messages"][0]["content"].removeprefix("<image>")
        *given, last = row["points"]
        if row["task"] == "point_to_mask":
            assert prompt == "Segment the object at the point <vis>." and last is None
            assert row["boxes"][0] is None and row["masks"][0] is None and row["boxes"][1] is not None
            ((x, y),) = given
            assert decode_rle(row["masks"][1])[int(y), int(x)]
        else:
            assert prompt.startswith("Point at every " if row["task"] == "point_all" else "Point at the ")
            assert row["boxes"] == sorted(row["boxes"]) and (given == [] or row["task"] == "point_all")
            assert row["points"] == [deepest_pixel(decode_rle(mask)) for mask in row["masks"]]
    assert set(tasks) == set(POINT_TASKS) and min(tasks.values()) >= 7


def test_expressions_have_exactly_their_referents():
    kinds = check_expressions(ScenesDataset(120, FIRST_TEST_SEED, split="test"), 120)
    assert set(kinds) == {
        "attribute", "position", "ordinal", "relation", "size", "superlative", "negation", "none", "reasoning"
    }  # fmt: skip
    assert min(kinds.values()) >= 4


@pytest.mark.parametrize("kind", ["relation", "size", "negation", "reasoning"])
def test_rare_kinds_alone(kind):
    dataset = ScenesDataset(40, FIRST_TEST_SEED + 1, split="test", tasks=["refer"], kinds=[kind])
    assert set(check_expressions(dataset, 40, every_task=False)) == {kind}


def test_words_fit_what_they_are_about():
    assert with_article("orange arrow") == "an orange arrow" and with_article("scissors") == "a pair of scissors"
    texts = defaultdict(list)
    for row in scenes_rows(seed=2, limit=150, tasks=["detect", "region_caption", "dialogue"], images=False):
        texts[row["task"]].append(" ".join(message["content"] for message in row["messages"]))
    # Nobody asks for every object that is nearest to something, or for every larger one of two.
    single = (
        r"(each|every|every single|is a|show a|any|give me) (larger|smaller|[a-z]+( [a-z]+){0,2} (closest|farthest)) "
    )
    assert not [text for text in texts["detect"] if re.search(single, text)]
    assert any("partly hidden by another " in text for text in texts["region_caption"])
    for text in texts["region_caption"]:
        if found := re.search(r"an? (.+), partly hidden by an? (.+)\.", text, re.IGNORECASE):
            assert found[1] != found[2]
    answers = [text for text in texts["dialogue"] if "have the same color as it? No" in text]
    assert len(answers) > 10 and all("No, that one is " in text for text in answers)


def test_counts_and_descriptions_agree_with_the_objects(test_rows):
    numbers = "none one two three four five six seven eight nine ten eleven twelve".split()
    checked = 0
    for row in test_rows:
        match = re.search(r"[Hh]ow many (.+?) are there", row["messages"][0]["content"])
        if row["task"] == "grounded_vqa" and match:
            said = [
                number
                for number in range(13)
                if re.search(rf"\b{numbers[number]}\b", row["messages"][1]["content"].lower())
            ]
            assert said == [len(row["boxes"])]
            checked += 1
    assert checked > 3
    captions = [row for row in test_rows if row["task"] == "spotting_caption"]
    for row in captions:
        for phrase, slots in re.findall(r"<p>(.+?)</p>((?:<vis>)+)", row["messages"][1]["content"]):
            count = len(slots) // len("<vis>")
            assert phrase.split()[0].lower() in (("a", "an") if count == 1 else (numbers[count],))


def test_a_plain_object_has_the_color_it_is_said_to_have():
    seen = Counter()
    names, palette = list(COLORS), np.array(list(COLORS.values()), dtype=float)
    dataset = ScenesDataset(80, 5)
    for index in range(80):
        scene = dataset.details(index)[0]["scene"]
        for one in scene.objects:
            if one.pattern == "plain" and one.side > 14 and one.hidden < 0.3:
                color = np.median(scene.image[decode_rle(one.mask) > 0], axis=0)
                seen[names[np.linalg.norm(palette - color, axis=1).argmin()] == one.color] += 1
    assert seen[True] > 100 and seen[False] <= 0.03 * seen[True]


def test_shapes_have_the_form_of_their_name():
    """Area by the square of the diameter, which no turn changes, and whether the form is convex and without a hole."""
    expected = {
        "circle": (math.pi / 4, True),
        "square": (0.5, True),
        "triangle": (3**0.5 / 4, True),
        "star": (0.34, False),
        "diamond": (0.33, True),
        "cross": (0.5, False),
        "ring": (math.pi / 4 * (1 - 0.55**2), False),
        "heart": (0.55, False),
        "hexagon": (3**0.5 * 3 / 8, True),
        "crescent": (None, False),
        "arrow": (None, False),
        "drop": (None, True),
    }
    assert set(expected) == set(SHAPES)
    forms = defaultdict(list)
    dataset = ScenesDataset(120, 6)
    for index in range(120):
        for one in dataset.details(index)[0]["scene"].objects:
            if one.side > 24:
                forms[one.shape].append(one.window[2])
    for name, (share, is_convex) in expected.items():
        form = forms[name][0]
        points = np.argwhere(form)
        diameter = np.linalg.norm(points[:, None] - points[None], axis=-1).max() + 0.7
        assert share is None or abs(form.sum() / diameter**2 - share) < 0.06, (name, form.sum() / diameter**2)
        # Convex: nearly every pixel halfway between two pixels of the form belongs to it.
        pairs = np.random.default_rng(0).integers(0, len(points), (4000, 2))
        middle = (points[pairs[:, 0]] + points[pairs[:, 1]] + 1) // 2
        inside = form[middle[:, 0], middle[:, 1]].mean()
        assert (inside > 0.994) == is_convex, (name, inside)


def test_scenes_vary_and_stay_within_their_bounds():
    dataset = ScenesDataset(200, 8)
    counts, backgrounds, shapes, sides, hidden = set(), Counter(), Counter(), [], 0
    for index in range(200):
        scene = dataset.details(index)[0]["scene"]
        counts.add(len(scene.objects))
        backgrounds[scene.background] += 1
        for one in scene.objects:
            shapes[one.shape] += 1
            sides.append(max(one.box[2] - one.box[0], one.box[3] - one.box[1]))
            hidden += one.hidden > 0.05
            assert one.hidden <= 0.56 and one.area > 0
            assert (one.color, one.shape) not in HELD_OUT
    assert counts == set(range(2, 13))
    assert set(backgrounds) == {"plain", "gradient", "noise", "texture"} and min(backgrounds.values()) > 15
    assert set(shapes) == {*SHAPES, "dot"}
    assert min(sides) <= 5 and max(sides) >= 50
    assert 0.1 < hidden / len(sides) < 0.5


def test_rows_depend_on_split_seed_and_index_alone():
    dataset = ScenesDataset(1000, 4, questions=3)
    first = dataset[700]
    dataset[3], dataset[701]
    again = ScenesDataset(701, 4, questions=3)[700]
    assert first == again and len(first) == 3
    assert np.array_equal(np.asarray(first[0]["image"]), np.asarray(again[0]["image"]))
    assert first == pickle.loads(pickle.dumps(dataset))[700]
    picture = dataset.image_rows(700)
    assert list(scenes_rows(seed=4, start=700, limit=1)) == picture
    assert len({row["image_id"] for row in first}) == 1 and first[0]["image"] is first[1]["image"]
    pictures = [ScenesDataset(1000, seed, split=split)[700]["image"].tobytes() for seed, split in (
        (4, "train"), (5, "train"), (4, "val"), (FIRST_TEST_SEED, "test")
    )]  # fmt: skip
    assert len(set(pictures)) == 4
    with pytest.raises(IndexError):
        dataset[1000]


# Of the first rows of a seed: a digest of what they say, and the mean brightness of their images. Numbers reported on
# these splits rely on them.
PINNED = [
    (BENCH, FIRST_TEST_SEED, "6aaefa1a78df3f5e", 137.549),
    (BENCH_COMBINATIONS, FIRST_TEST_SEED, "286206f4e91c33f6", 134.238),
    ("test", FIRST_TEST_SEED, "130fcdf7d3a4c64e", 134.504),
    ("train", 0, "8ec07db424243343", 141.008),
]


@pytest.mark.parametrize(("split", "seed", "expected", "brightness"), PINNED)
def test_rows_of_a_seed_never_change(split, seed, expected, brightness):
    digest = hashlib.blake2b(digest_size=8)
    means = []
    for row in scenes_rows(split=split, seed=seed, limit=40 if split.startswith(BENCH) else 10):
        means.append(float(np.asarray(row["image"], dtype=np.float64).mean()))
        digest.update(json.dumps({key: row[key] for key in row if key not in ("image", "points")}).encode())
    assert digest.hexdigest() == expected and np.mean(means) == pytest.approx(brightness, abs=0.01)


@pytest.mark.parametrize("task", ["region_caption", "region_vqa"])
def test_regions_are_given_as_asked(task):
    given = Counter()
    for form in ("box", "mask", "both", "point"):
        for row in scenes_rows(split="test", tasks=[task], given_by=form, limit=4):
            ((box, mask, point),) = zip(row["boxes"], row["masks"], row["points"], strict=True)
            assert (box is not None, mask is not None, point is not None) == (
                form in ("box", "both"), form in ("mask", "both"), form == "point"
            )  # fmt: skip
            given[form] += 1
    assert set(given.values()) == {4}


def test_training_never_shows_or_names_what_is_held_out():
    words = [f"{color} {shape}" for color, shape in HELD_OUT]
    assert len({color for color, _ in HELD_OUT}) == len({shape for _, shape in HELD_OUT}) == len(SHAPES)
    texts = []
    for row in scenes_rows(limit=100, images=False):
        assert row["task"] != "reasoning" and row["image"] is None
        texts.append(" ".join(message["content"] for message in row["messages"]))
    text = " ".join(texts)
    assert not [word for word in words if re.search(rf"\b{word}\b", text)]
    assert not [riddle for riddle in (*RIDDLES, ODD_ONE) if riddle in text]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": FIRST_TEST_SEED}, "never trained on"),
        ({"seed": 3, "split": "test"}, "from 10\\^6 on"),
        ({"seed": 3, "split": BENCH}, "from 10\\^6 on"),
        ({"seed": -1}, "whole numbers"),
        ({"split": "dev"}, "none of train"),
        ({"tasks": ["reasoning"]}, "kept from the split"),
        ({"kinds": ["reasoning"]}, "kept from the split"),
        ({"tasks": ["seek"]}, "none of caption"),
        ({"kinds": ["none"]}, "none of attribute"),
        ({"seed": FIRST_TEST_SEED, "split": BENCH, "size": 64}, "is defined at 128"),
        ({"seed": FIRST_TEST_SEED, "split": BENCH, "tasks": ["refer"]}, "its own tasks"),
        ({"seed": FIRST_TEST_SEED, "split": BENCH, "given_by": ["box"]}, "its own tasks"),
        ({"given_by": ["scribble"]}, "none of box, mask, both, point"),
        ({"size": 8}, "32 to 2048 pixels"),
        ({"size": 4096}, "32 to 2048 pixels"),
        ({"size": "large"}, "32 to 2048 pixels"),
        ({"start": -1}, "whole number from 0 on"),
        ({"kinds": []}, "no kinds were given"),
        ({"annotations": ["x.json"]}, "no annotation files"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        next(iter(scenes_rows(**arguments)))


def test_a_split_has_seeds_of_its_own_unless_one_is_given():
    for split, seed in (("train", 0), ("test", FIRST_TEST_SEED), (BENCH, FIRST_TEST_SEED)):
        (row, *_) = scenes_rows(split=split, limit=1, images=False)
        assert row["image_id"] == f"{seed}-0"


def test_one_kind_or_task_may_be_named_without_a_list():
    dataset = ScenesDataset(5, tasks="refer", kinds="ordinal")
    assert {dataset.details(index)[0]["kind"] for index in range(5)} == {"ordinal"}
    with pytest.raises(ValueError, match="weights of \\['seek'\\]"):
        ScenesDataset(5, weights={"seek": 1})


@pytest.mark.parametrize("size", [32, 64, 224])
def test_other_sizes(size):
    for row in scenes_rows(limit=3, size=size):
        validate_row(row)
        assert row["image"].size == (size, size)


def test_questions_about_one_picture_pack(tiny_model):
    from perceptiongpt.data.collator import PerceptionCollator

    model, processor = tiny_model
    collator = PerceptionCollator(processor, model.config, pack=6)
    dataset = ScenesDataset(100, 1, questions=6)
    batch = collator([dataset[0], dataset[1]])
    assert len(batch["input_ids"]) == 2 and len(batch["pixel_values"]) == 2
    slots = max(sum(len(row["boxes"]) for row in dataset[index]) for index in (0, 1))
    assert batch["boxes"].shape[:2] == (2, slots)


# ---- scenes-bench-1 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[BENCH, BENCH_COMBINATIONS])
def bench(request):
    dataset = ScenesDataset(BENCH_SAMPLES, FIRST_TEST_SEED, split=request.param)
    return dataset, [dataset.details(index)[0] for index in range(BENCH_SAMPLES)]


def test_places_hold_for_edges_and_centres_alike(bench):
    """The leftmost object is the leftmost by its left edge, its right edge and its centre."""
    ends = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
    checked = Counter()
    for detail in bench[1]:
        text, solver = detail["text"], Solver(detail["scene"])
        if found := re.fullmatch(r"(left|right|top|bottom)most (.+)", text):
            end, noun, rank = found[1], found[2], 0
        elif found := re.fullmatch(rf"({'|'.join(RANKS)}) (.+) from the (left|right|top|bottom)", text):
            end, noun, rank = found[3], found[2], RANKS.index(found[1])
        elif found := re.fullmatch(r"(.+) farthest to the (left|right)", text):
            end, noun, rank = found[2], found[1], 0
        if not found or detail["kind"] not in ("position", "ordinal"):
            continue
        axis, sign = ends[end]
        for weights in ((1, 0), (0, 1), (1, 1)):
            order = sorted(
                solver.noun(noun),
                key=lambda one: sign * (weights[0] * one["box"][axis] + weights[1] * one["box"][axis + 2]),
            )
            assert (order[rank]["number"],) == detail["targets"], (text, weights)
        checked[detail["kind"]] += 1
    assert min(checked["position"], checked["ordinal"]) > 10


def test_the_bench_is_as_it_was_defined(bench):
    dataset, details = bench
    kinds = Counter(detail["kind"] for detail in details)
    assert kinds["attribute"] == 50 and kinds["relation"] == 40 and kinds["negation"] == 10 and kinds["none"] == 20
    assert kinds["position"] + kinds["ordinal"] == 50 and kinds["size"] + kinds["superlative"] == 30
    scenes = [detail["scene"] for detail in details]
    assert all(scene.size == 128 for scene in scenes)
    plain = sum(scene.background in ("plain", "gradient") for scene in scenes)
    assert plain == 100
    counts = Counter(len(scene.objects) for scene in scenes)
    assert set(counts) == set(range(3, 10)) and min(counts.values()) > 12
    objects = [one for scene in scenes for one in scene.objects]
    for scene in scenes:
        visible = [one.area / one.window[2].sum() for one in scene.objects]
        assert min(visible) >= 0.4
        assert sum(share < 0.95 for share in visible) >= 0.3 * len(visible)
    # Log-uniform from 10 to 56: the largest distance between the two distribution functions.
    sides = np.sort([math.log(one.side / 10) / math.log(5.6) for one in objects])
    assert 0 <= sides[0] and sides[-1] <= 1
    assert np.abs(sides - np.linspace(0, 1, len(sides))).max() < 1.63 / math.sqrt(len(sides))
    drawn = [max(one.window[2].shape) for one in objects]
    assert all(side <= extent <= side + 1 for side, extent in zip([one.side for one in objects], drawn, strict=True))
    groups = Counter("<16" if d["side"] < 16 else "16-32" if d["side"] <= 32 else ">32" for d in details if d["side"])
    assert min(groups.values()) > 20
    targets = [detail["scene"].objects[detail["targets"][0]] for detail in details if detail["targets"]]
    held = {(one.color, one.shape) in HELD_OUT for one in targets}
    assert held == {dataset.split == BENCH_COMBINATIONS}
    if dataset.split == BENCH:
        assert not any((one.color, one.shape) in HELD_OUT for one in objects)


def test_bench_rows_and_their_details(bench):
    dataset, details = bench
    check_expressions(dataset, 60, every_task=False)
    for index in range(0, BENCH_SAMPLES, 40):
        row = dataset[index]
        validate_row(row)
        assert row["task"] == ("no_target" if details[index]["kind"] == "none" else "refer")
        assert row["messages"][0]["content"] == f"<image>Find the {details[index]['text']}."
        found = scene_details(row["split"], row["image_id"])
        assert {key: found[key] for key in found if key != "scene"} == {
            key: details[index][key] for key in found if key != "scene"
        }


def test_trivial_answers_do_not_pass_the_bench():
    values = bench_baselines(120, FIRST_TEST_SEED + 17)
    assert values["samples"] == 108
    assert values["random_of_class"] < 0.45 and values["largest"] < 0.35


# ---- photos ----------------------------------------------------------------------------------------------------------


def test_backgrounds_from_photos(data_dir):
    dataset = ScenesDataset(30, 0, photos=data_dir / TINY_COCO)
    backgrounds = Counter(dataset.details(index)[0]["scene"].background for index in range(30))
    assert backgrounds["photo"] >= 4 and len(backgrounds) >= 3
    assert dataset[0]["image_id"] == "photos-0-0"


def test_pasted_objects(data_dir):
    folder = data_dir / TINY_COCO
    dataset = ScenesDataset(80, FIRST_TEST_SEED, split="test", paste=folder)
    kinds = check_expressions(dataset, 40)
    assert {"attribute", "position", "relation", "none"} <= set(kinds)
    shown, hidden = set(), 0
    for index in range(40):
        scene = dataset.details(index)[0]["scene"]
        assert 2 <= len(scene.objects) <= 12
        categories = {one.shape for one in scene.objects}
        shown |= categories
        hidden += sum(one.hidden > 0.05 for one in scene.objects)
        if scene.background == "photo":
            assert not categories & scene.behind and not set(scene.absent) & (categories | scene.behind)
    assert len(shown) > 12 and hidden > 10
    for row in dataset.image_rows(3):
        validate_row(row)
    assert pickle.loads(pickle.dumps(dataset))[7] == dataset[7]


def test_a_pasted_object_keeps_its_form(data_dir):
    """The mask in the scene is the original mask, scaled and perhaps mirrored."""
    from pycocotools.coco import COCO

    coco = COCO(str(data_dir / TINY_COCO / "annotations/instances_train2017.json"))
    originals = defaultdict(list)
    for one in coco.anns.values():
        if not one["iscrowd"] and one["area"] > 0:
            rows, columns = np.nonzero(coco.annToMask(one))
            mask = np.zeros((np.ptp(rows) + 1, np.ptp(columns) + 1), dtype=np.uint8)
            mask[rows - rows.min(), columns - columns.min()] = 255
            originals[coco.cats[one["category_id"]]["name"]].append(Image.fromarray(mask))
    dataset = ScenesDataset(10, 0, paste=data_dir / TINY_COCO)
    for index in range(10):
        for one in dataset.details(index)[0]["scene"].objects:
            form = one.window[2]
            best = 0
            for mask in originals[one.shape]:
                scaled = np.asarray(mask.resize(form.shape[::-1], Image.Resampling.BOX)) >= 128
                for candidate in (scaled, scaled[:, ::-1]):
                    best = max(best, (candidate & form).sum() / max((candidate | form).sum(), 1))
            assert best > 0.95


def write_coco(folder, change=lambda content: None, name="own"):
    """A folder in COCO's layout: three times the same square object on one photo."""
    square = {"bbox": [20, 20, 60, 60], "segmentation": [[20, 20, 80, 20, 80, 80, 20, 80]], "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 160}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": number, "image_id": 1, "category_id": 1, **square} for number in range(3)],
    }
    change(content)
    (folder / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (200, 160), "teal").save(folder / name / "a.png")
    (folder / f"instances_{name}.json").write_text(json.dumps(content))
    return folder


def test_of_several_annotation_files_the_one_with_pictures_is_pasted(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "instances_elsewhere.json").write_text("{}")
    assert ScenesDataset(2, paste=tmp_path).paste.folder == tmp_path / "own"


def test_a_turned_photo_is_pasted_upright(tmp_path):
    """The annotations are about the picture as it is shown."""
    write_coco(tmp_path)
    upright = np.zeros((160, 200, 3), dtype=np.uint8)
    upright[20:80, 20:80] = (250, 10, 10)
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6  # to be turned clockwise when shown
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "own" / "a.png", exif=exif)
    scene = ScenesDataset(1, 2, paste=tmp_path).details(0)[0]["scene"]
    for one in scene.objects:
        red, green, _ = scene.image[decode_rle(one.mask).astype(bool)].mean(0)
        assert red > 2 * green


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"segmentation": []}, "placed no two"),
        ({"segmentation": [[1, 2, 3]]}, "annotation . of image 1: polygon"),
        ({"bbox": "all"}, "annotation 0 of image 1: bbox 'all'"),
        ({"iscrowd": 1}, "no object can be pasted"),
        ({"width": "200"}, "image 1: image of 200 x 160"),
        ({"width": 220}, "the annotations say"),
        ({"file_name": "../a.png"}, "leaves the folder"),
    ],
)
def test_bad_annotations_are_not_pasted(tmp_path, changed, message):
    def change(content):
        for record in content["images"] if {"width", "file_name"} & set(changed) else content["annotations"]:
            record.update(changed)

    with pytest.raises(ValueError, match=message):
        list(scenes_rows(limit=2, paste=write_coco(tmp_path, change)))


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="holds no image"):
        ScenesDataset(1, photos=tmp_path)
    with pytest.raises(ValueError, match="no annotations"):
        ScenesDataset(1, paste=tmp_path)
    (tmp_path / "instances_own.json").write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(ValueError, match="neither a folder 'own' nor 'images'"):
        ScenesDataset(1, paste=tmp_path)
    (tmp_path / "own").mkdir()
    with pytest.raises(ValueError, match="no object can be pasted"):
        ScenesDataset(1, paste=tmp_path)
    (tmp_path / "own" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="broken.jpg: cannot be read"):
        list(scenes_rows(limit=20, photos=tmp_path / "own"))
