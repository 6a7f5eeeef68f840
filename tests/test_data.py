"""The row schema, the prompt templates and the coco source."""

import json
import tracemalloc
from collections import Counter, defaultdict

import numpy as np
import pytest
from datasets import Dataset, Features
from PIL import Image
from pycocotools.coco import COCO

from drawn_rows import drawn_rows
from perceptiongpt.data.formats.coco import (
    COCO_TASKS,
    coco_rows,
    load_coco,
    read_instances,
    refer_expressions,
    segmentation_to_rle,
)
from perceptiongpt.data.mixtures import Part
from perceptiongpt.data.reading import Problems
from perceptiongpt.data.schema import POINT_TASKS, decode_rle, row_features, row_to_messages, validate_row
from perceptiongpt.data.sources import load_source


TINY_COCO = ("tiny_coco/annotations/instances_train2017.json", "tiny_coco/train2017")
COCO128 = ("coco128/instances_train2017.json", "coco128/train2017")


USUAL_TASKS = tuple(task for task in COCO_TASKS if task not in POINT_TASKS)


@pytest.fixture(scope="module")
def tiny_rows(data_dir):
    return list(coco_rows(*(data_dir / part for part in TINY_COCO), USUAL_TASKS))


@pytest.fixture(scope="module")
def tiny_coco(data_dir):
    return COCO(str(data_dir / TINY_COCO[0]))


def changed(row: dict, **changes) -> dict:
    return {**row, **changes}


# ---- schema ----------------------------------------------------------------------------------------------------------


def test_rows_go_through_datasets_and_come_back():
    rows = drawn_rows(1)
    back = Dataset.from_list(rows, features=row_features())
    for row, same in zip(rows, back, strict=True):
        assert validate_row(same)[1] == 0
        assert {key: row[key] for key in row if key != "image"} == {key: same[key] for key in same if key != "image"}


def test_files_from_before_there_were_points_are_read(tmp_path):
    features = Features({name: feature for name, feature in row_features().items() if name != "points"})
    rows = [{name: row[name] for name in features} for row in drawn_rows(1)]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    loaded = load_source("parquet", root=tmp_path)
    assert loaded.features == row_features() and validate_row(loaded[3])[0]["points"] == [None] * 4
    part = Part("drawn", [str(tmp_path / "train-00000-of-00001.parquet")])
    assert validate_row(part.read(0, 3), with_images=False)[0]["points"] == [None] * 4
    Dataset.from_list(list(loaded), features=row_features()).to_parquet(tmp_path / "val-00000-of-00001.parquet")
    assert load_source("parquet", root=tmp_path, split="val")[3]["messages"] == loaded[3]["messages"]


def test_messages_are_split_into_content_items():
    row = drawn_rows(1)[3]
    user, assistant = row_to_messages(row)
    assert [item["type"] for item in user["content"]] == ["image", "text", "box", "text"]
    assert [item["type"] for item in assistant["content"]] == ["region"] * 3
    assert assistant["content"][0]["box"] == row["boxes"][1]
    grounded = changed(row, messages=[{"role": "user", "content": "<image>What?"}])
    grounded["messages"].append({"role": "assistant", "content": "A <p>red cup</p><vis>."})
    grounded |= {"boxes": row["boxes"][:1], "masks": [None], "points": [None], "task": "grounded_vqa"}
    pointed = changed(row, boxes=[None] * 4, points=[[3.5, 4.5], None, [1.0, 2.0], [0.0, 0.0]])
    user, assistant = row_to_messages(pointed)
    assert user["content"][2] == {"type": "point", "point": [3.5, 4.5]}
    assert [item["type"] for item in assistant["content"]] == ["mask", "region", "region"]
    assert assistant["content"][1] == {"type": "region", "mask": row["masks"][2], "point": [1.0, 2.0]}
    texts = [item.get("text") for item in row_to_messages(grounded)[1]["content"]]
    assert texts == ["A <p>red cup</p>", None, "."]
    with pytest.raises(ValueError, match="<vis>"):
        row_to_messages(changed(row, boxes=[], masks=[]))
    pointed = changed(row, points=[[3.0, 4.0], None, [5.0, 6.0], None], boxes=[None, *row["boxes"][1:]])
    user, assistant = row_to_messages(pointed)
    assert user["content"][2] == {"type": "point", "point": [3.0, 4.0]}
    assert assistant["content"][1] == {
        "type": "region",
        "box": row["boxes"][2],
        "mask": row["masks"][2],
        "point": [5.0, 6.0],
    }


def test_a_row_may_lack_the_column_of_points():
    row = drawn_rows(1)[3]
    without = {name: value for name, value in row.items() if name != "points"}
    assert validate_row(without)[0] == validate_row(row)[0]
    assert row_to_messages(without) == row_to_messages(row)


def test_small_overhang_is_clipped_and_counted():
    row = drawn_rows(1)[0]
    width = row["width"]
    fixed, clipped = validate_row(changed(row, points=[[-0.5, 3]], boxes=[[0, 3, width, 9]]))
    assert clipped == 1 and fixed["points"] == [[0.0, 3.0]]
    width = row["width"]
    fixed, clipped = validate_row(changed(row, boxes=[[-0.5, 3, width + 1.0, 9]]))
    assert clipped == 1 and fixed["boxes"] == [[0.0, 3.0, float(width), 9.0]]
    with pytest.raises(ValueError, match="row 7 .*outside"):
        validate_row(changed(row, boxes=[[0, 3, width + 1.5, 9]]), index=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [[0, 0, float("nan"), 4]]}, "not finite"),
        ({"boxes": [[5, 5, 2, 9]]}, "no area"),
        ({"boxes": [[5, 5, 5, 9]]}, "no area"),
        ({"boxes": [[1, 2, 3]]}, "four numbers"),
        ({"boxes": ["abcd"]}, "four numbers"),
        ({"boxes": [[0, 0, 10**400, 4]]}, "four numbers"),
        ({"image_id": "\ud83d"}, "not Unicode"),
        ({"image_id": 7}, "not a string"),
        ({"boxes": [None], "masks": [None]}, "slot 0 has none of box, mask, point"),
        ({"boxes": [], "masks": []}, "1 <vis> in the messages"),
        ({"points": [[1, 2], None]}, "1 <vis> in the messages, but 1 boxes, 1 masks, 2 points"),
        ({"points": [[1, 2, 3]]}, "slot 0: .*not two numbers"),
        ({"points": [[1, float("nan")]]}, "not finite"),
        ({"points": [[-2, 5]]}, "2 px outside"),
        ({"points": [[5, 100]]}, "px outside"),
        ({"masks": [{"size": [3, 3], "counts": "09"}]}, r"expected \[height, width\]"),
        ({"masks": [{"size": [3, 3]}]}, "compressed COCO RLE"),
        ({"task": "seek"}, "none of caption"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "human", "content": "<image>"}]}, "not a role"),
        ({"messages": [{"role": "user", "content": "Find it <image>"}]}, "must open with 1 <image>"),
        ({"image": None}, "no image"),
        ({"width": 0}, "0 x"),
    ],
)
def test_malformed_rows(changes, message):
    with pytest.raises(ValueError, match=message):
        validate_row(changed(drawn_rows(1)[0], **changes), index=0)


def test_direct_answers_and_phrases_have_one_form():
    row = drawn_rows(1)[0]
    user = row["messages"][0]
    with pytest.raises(ValueError, match="answer of this task"):
        validate_row(changed(row, messages=[user, {"role": "assistant", "content": "Here: <vis>"}]))
    with pytest.raises(ValueError, match="do not pair up"):
        validate_row(changed(row, task="dialogue", messages=[user, {"role": "assistant", "content": "<p>it<vis>"}]))
    with pytest.raises(ValueError, match="missing columns"):
        validate_row({"messages": []})


@pytest.mark.parametrize("counts", ["", "abc\x7f", "09", "0", "oooooooooooooooooooo", "ÿÿ"])
def test_broken_rle_is_an_error_and_no_crash(counts):
    with pytest.raises(ValueError):
        decode_rle({"size": [6, 5], "counts": counts})


# ---- coco ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [TINY_COCO, COCO128])
def test_rows_agree_with_counts_from_pycocotools(data_dir, files, tiny_rows):
    annotations, images = (data_dir / part for part in files)
    rows = tiny_rows if files == TINY_COCO else list(coco_rows(annotations, images, USUAL_TASKS))
    coco = COCO(str(annotations))
    by_category = defaultdict(list)
    for annotation in coco.anns.values():
        by_category[annotation["image_id"], annotation["category_id"]].append(annotation)
    crowds = sum(annotation["iscrowd"] for annotation in coco.anns.values())
    assert (len(coco.anns), len(coco.imgs)) == ((470, 50) if files == TINY_COCO else (361, 45))
    assert files != TINY_COCO or crowds == 5
    clean = {key: group for key, group in by_category.items() if not any(one["iscrowd"] for one in group)}
    count = Counter(row["task"] for row in rows)
    assert count["box_to_mask"] == len(coco.anns) - crowds
    assert count["detect"] == len(clean)
    assert count["no_target"] == len(coco.imgs)
    assert 0 < count["refer"] <= count["box_to_mask"]
    singles = sum(len(group) == 1 for group in clean.values())
    prompts = [row["messages"][0]["content"] for row in rows if row["task"] == "refer"]
    assert sum("the " in prompt.lower() for prompt in prompts) >= singles


def test_rows_are_valid_and_masks_equal_pycocotools(tiny_coco, tiny_rows):
    wanted = {
        (str(annotation["image_id"]), tiny_coco.annToRLE(annotation)["counts"].decode())
        for annotation in tiny_coco.anns.values()
        if not annotation["iscrowd"]
    }
    seen = set()
    for index, row in enumerate(tiny_rows):
        if row["task"] == "box_to_mask":
            validate_row(row, index)
        masks = {(row["image_id"], mask["counts"]) for mask in row["masks"] if mask is not None}
        assert masks <= wanted
        seen |= masks
        if row["task"] == "detect":
            corners = [box[:2] for box in row["boxes"]]
            assert corners == sorted(corners)
    assert seen == wanted


def test_images_are_opened_when_a_row_is_read(data_dir):
    for row in load_coco(*(data_dir / part for part in TINY_COCO), limit=3):
        assert row["image"].size == (row["width"], row["height"]) and row["image"].mode == "RGB"


def test_points_lie_in_the_masks_of_real_objects(data_dir):
    files = [data_dir / part for part in TINY_COCO]
    rows = list(coco_rows(*files, ("box_to_mask", *POINT_TASKS), limit=6))
    tasks = Counter(row["task"] for row in rows)
    assert tasks["point_to_mask"] == tasks["box_to_mask"] >= tasks["point"] > 10 and tasks["point_all"] > 5
    for row in rows:
        given = row["masks"][1:] if row["task"] == "point_to_mask" else row["masks"]
        for mask, (x, y) in zip(given, [point for point in row["points"] if point], strict=False):
            assert decode_rle(mask)[int(y), int(x)]


def test_crowd_rle_and_multi_polygons_equal_pycocotools(tiny_coco):
    kinds = Counter()
    for annotation in tiny_coco.anns.values():
        record, segmentation = tiny_coco.imgs[annotation["image_id"]], annotation["segmentation"]
        if not kinds["single"] or annotation["iscrowd"] or len(segmentation) > 1:
            mask = decode_rle(segmentation_to_rle(segmentation, record["height"], record["width"]))
            assert (mask == tiny_coco.annToMask(annotation)).all()
        kinds["crowd" if annotation["iscrowd"] else "multi" if len(segmentation) > 1 else "single"] += 1
    assert (kinds["crowd"], kinds["multi"]) == (5, 38)


def test_no_target_asks_for_what_is_absent(tiny_coco, tiny_rows):
    coco = tiny_coco
    for row in tiny_rows:
        if row["task"] == "no_target":
            name = row["messages"][1]["content"].removeprefix("There is no ").removesuffix(".")
            present = {coco.cats[one["category_id"]]["name"] for one in coco.imgToAnns[int(row["image_id"])]}
            assert name in {category["name"] for category in coco.cats.values()} - present
            assert name in row["messages"][0]["content"].lower()


def test_expressions_are_unambiguous():
    rng = np.random.default_rng(0)
    ordinals = {"second": 1, "third": 2, "fourth": 3, "fifth": 4, "sixth": 5}
    seen = Counter()
    for _ in range(300):
        corners, sides = rng.uniform(0, 80, (rng.integers(2, 7), 2)), rng.uniform(2, 20, (6, 2))
        boxes = np.concatenate([corners, corners + sides[: len(corners)]], axis=1)
        centres, areas = (boxes[:, :2] + boxes[:, 2:]) / 2, np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        # Each phrase, read independently: by box centres in order, by area in order.
        orders = {
            "left": np.argsort(centres[:, 0]),
            "right": np.argsort(-centres[:, 0]),
            "top": np.argsort(centres[:, 1]),
            "bottom": np.argsort(-centres[:, 1]),
        }
        for index, options in enumerate(refer_expressions("cup", boxes.tolist(), 100, 100)):
            for phrase in options:
                words = phrase.split()
                if words[1] in ("largest", "smallest"):
                    order = np.argsort(areas if words[1] == "smallest" else -areas)
                    found = order[0]
                    seen["size"] += 1
                elif words[1].endswith("most"):
                    found = orders[words[1].removesuffix("most")][0]
                    seen["most"] += 1
                else:
                    found = orders[words[-1]][ordinals[words[1]]]
                    seen["ordinal"] += 1
                assert found == index, (phrase, boxes)
    assert min(seen["size"], seen["most"], seen["ordinal"]) > 50
    close = [[10, 10, 20, 20], [11, 10, 21, 20]]
    assert refer_expressions("cup", close, 100, 100) == [[], []]
    assert refer_expressions("cup", close[:1], 100, 100) == [["the cup"]]


def test_area_share_limit_ids_and_seed(data_dir):
    files = [data_dir / part for part in TINY_COCO]
    all_rows = list(coco_rows(*files, tasks=("refer",)))
    large = list(coco_rows(*files, tasks=("refer", "detect"), min_area_share=0.05))
    for row in large:
        for x0, y0, x1, y1 in row["boxes"]:
            assert (x1 - x0) * (y1 - y0) >= 0.05 * max(row["width"], row["height"]) ** 2
    ids = [51191, 391895]
    assert {row["image_id"] for row in coco_rows(*files, image_ids=ids)} == {"51191", "391895"}
    assert len({row["image_id"] for row in coco_rows(*files, limit=3)}) == 3
    assert list(coco_rows(*files, tasks=("refer",))) == all_rows
    assert list(coco_rows(*files, tasks=("refer",), seed=1)) != all_rows
    prompts = {row["messages"][0]["content"][:12] for row in coco_rows(*files, tasks=("detect",), evaluation=True)}
    assert prompts == {"<image>Find "}
    with pytest.raises(ValueError, match="no images with the ids"):
        list(coco_rows(*files, image_ids=[1]))
    with pytest.raises(ValueError, match="unknown tasks"):
        list(coco_rows(*files, tasks=("referr",)))


@pytest.fixture
def folder(tmp_path):
    """A function that writes a one-picture COCO folder with changes, and reads it."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg")
    Image.new("L", (40, 30)).save(tmp_path / "empty.png")

    def read(image: dict = {}, annotation: dict = {}, category: dict = {}, drop: tuple = (), more: list = ()):
        polygon = [5, 5, 15, 5, 15, 20, 5, 20]
        content = {
            "images": [
                {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30} | image,
                {"id": 2, "file_name": "empty.png", "width": 40, "height": 30},
            ],
            "annotations": [
                {"id": 9, "image_id": 1, "category_id": 3, "iscrowd": 0, "bbox": [5, 5, 10, 15]}
                | {"segmentation": [polygon]}
                | annotation,
                *more,
            ],
            "categories": [{"id": 3, "name": "dog"} | category, {"id": 4, "name": "cat"}],
        }
        for part, key in drop:
            del (content[part][0] if key else content)[key or part]
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return list(load_coco(tmp_path / "instances.json", tmp_path, tasks=COCO_TASKS))

    read.path = tmp_path
    return read


def test_a_folder_of_ones_own(folder):
    rows = folder()
    once = dict.fromkeys(("refer", "detect", "box_to_mask", *POINT_TASKS), 1)
    assert Counter(row["task"] for row in rows) == {**once, "no_target": 2}
    assert rows[0]["boxes"] == [[5.0, 5.0, 15.0, 20.0]] and rows[-1]["image"].mode == "RGB"
    assert decode_rle(rows[0]["masks"][0]).sum() == 150


def test_points_of_a_folder(folder):
    rows = {row["task"]: row for row in folder() if row["task"] in POINT_TASKS}
    assert set(rows) == set(POINT_TASKS)
    for row in rows.values():
        validate_row(row)
    assert rows["point"]["points"] == rows["point_all"]["points"] == [[9.5, 12.5]]
    assert rows["point"]["boxes"] == [[5, 5, 15, 20]] and rows["point"]["masks"][0] is not None
    (click, none), (no_box, box) = rows["point_to_mask"]["points"], rows["point_to_mask"]["boxes"]
    assert no_box is none is None and box == [5, 5, 15, 20]
    assert decode_rle(rows["point_to_mask"]["masks"][1])[int(click[1]), int(click[0])]


def test_an_instance_beside_a_crowd_region_is_segmented(folder):
    crowd = {"id": 8, "image_id": 1, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 5, 5]}
    crowd["segmentation"] = {"size": [30, 40], "counts": [100, 50, 1050]}
    tasks = Counter(row["task"] for row in folder(more=[crowd]))
    assert tasks == {"box_to_mask": 1, "point_to_mask": 1, "no_target": 2}  # "the dog" would not be clear


def test_what_cannot_be_a_target_makes_no_rows(folder):
    crowd = {"iscrowd": 1, "segmentation": {"size": [30, 40], "counts": [100, 50, 1050]}}
    for annotation in (crowd, {"bbox": [5, 5, 0, 15]}, {"segmentation": []}):
        rows = folder(annotation=annotation)
        assert [row["task"] for row in rows] == ["no_target", "no_target"]
        assert rows[0]["messages"][1]["content"] == "There is no cat."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"file_name": "gone.jpg"}}, "'gone.jpg': does not exist"),
        ({"image": {"file_name": "../a.jpg"}}, "leaves the folder"),
        ({"image": {"file_name": "x/../../a.jpg"}}, "leaves the folder"),
        ({"image": {"file_name": "..\\a.jpg"}}, "leaves the folder"),
        ({"image": {"file_name": "/etc/passwd"}}, "leaves the folder"),
        ({"image": {"file_name": "C:\\a.jpg"}}, "leaves the folder"),
        ({"image": {"file_name": "instances.json"}}, "cannot be read as an image"),
        ({"image": {"width": 41}}, "is 40 x 30 pixels, the annotations say 41 x 30"),
        ({"image": {"id": 2}}, "occurs twice"),
        ({"category": {"name": None}}, "category 3 has no name"),
        ({"category": {"name": "  "}}, "category 3 has no name"),
        ({"category": {"id": 5}}, "annotation 9 has the category 3, which is not listed"),
        ({"annotation": {"image_id": 7}}, "annotation 9 belongs to image 7, which is not listed"),
        ({"annotation": {"bbox": [5, 5, 40, 15]}}, "annotation 9 of image 1.*outside"),
        ({"annotation": {"bbox": [5, 5, float("nan"), 15]}}, "not finite"),
        ({"annotation": {"bbox": [5, 5, -3, 15]}}, "no area"),
        ({"annotation": {"bbox": "5 5 3 4"}}, r"not \[x, y, width, height\]"),
        ({"annotation": {"segmentation": [[1, 2, 3, 4]]}}, "three points"),
        ({"annotation": {"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}}, "three points"),
        ({"annotation": {"segmentation": {"size": [30, 40], "counts": [5, 5]}}}, "do not sum up"),
        ({"annotation": {"segmentation": {"size": [40, 30], "counts": [1200]}}}, r"RLE of size \[30, 40\]"),
        ({"annotation": {"segmentation": {"size": [30, 40], "counts": "a b"}}}, "RLE string"),
        ({"annotation": {"segmentation": {"size": None, "counts": [1200]}}}, r"RLE of size \[30, 40\]"),
        ({"annotation": {"segmentation": [[5, 5, 1e9, 5, 15, 20]]}}, "lies far outside the 40 x 30 image"),
        ({"annotation": {"image_id": [1]}}, "annotation 9 belongs to image \\[1\\], which is not listed"),
        ({"image": {"width": 10**6, "height": 10**6}}, "image 1: image of 1000000 x 1000000 pixels"),
        ({"image": {"width": None}}, "image 1: image of None x 30 pixels"),
        ({"category": {"id": None}}, "category 0 is .* expected id and name"),
        ({"drop": [("annotations", None)]}, "there is no key 'annotations'"),
        ({"drop": [("images", "file_name")]}, "image 1 lacks"),
        ({"drop": [("annotations", "segmentation")]}, "annotation 9 lacks"),
    ],
)
def test_hostile_annotations(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        folder(**changes)


def test_an_annotation_twice_is_one_target(folder):
    folder()
    content = json.loads((folder.path / "instances.json").read_text())
    content["annotations"] *= 2
    (folder.path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="annotation 9: this id occurs twice"):
        list(coco_rows(folder.path / "instances.json", folder.path))
    problems = Problems(skip=True)
    rows = list(coco_rows(folder.path / "instances.json", folder.path, ("detect",), problems=problems))
    assert [len(row["boxes"]) for row in rows] == [1] and problems.counts == {"broken record": 1}


def test_instances_are_held_packed(tmp_path):
    polygon = [0.5 + i % 30 for i in range(100)]
    annotation = {"image_id": 1, "category_id": 1, "bbox": [1.5, 1.5, 9.5, 9.5], "segmentation": [polygon]}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
        "annotations": [{"id": i, **annotation} for i in range(1500)],
        "categories": [{"id": 1, "name": "cup"}],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    del content
    tracemalloc.start()
    _, instances, _ = read_instances(file)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(instances[1]) == 1500 and instances[1][7] == {"id": 7, **annotation}
    assert held < 2 * file.stat().st_size


def test_truncated_picture_and_json(folder):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(folder.path / "a.jpg")
    whole = (folder.path / "a.jpg").read_bytes()
    (folder.path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="image 1, file .a.jpg.: .*cannot be read as an image"):
        folder()
    (folder.path / "instances.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="instances.json: .*truncated or not json"):
        list(coco_rows(folder.path / "instances.json", folder.path))
