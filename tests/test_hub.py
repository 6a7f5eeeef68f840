"""Data sets by a column mapping, in the layouts that are found on the Hub, saved in local folders."""

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from perceptiongpt.data.reading import Problems
from perceptiongpt.data.schema import decode_rle
from perceptiongpt.data.sources import rows as checked_rows


SIZE = (20, 10)
COCO_NAME = "COCO_train2014_000000000009.jpg"


@pytest.fixture
def folder(tmp_path):
    """`folder(records)` -> a data set of these records; their pictures `a.jpg` and COCO's number 9 lie beside it."""
    Image.new("RGB", SIZE).save(tmp_path / "a.jpg")
    Image.new("RGB", SIZE).save(tmp_path / "000000000009.jpg")

    def save(*records: dict) -> Path:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path

    return save


def read(root: Path, columns: str, **options) -> list[dict]:
    return list(checked_rows("hub", root=root, columns=columns, evaluation=True, **options))


def question(row: dict) -> str:
    return row["messages"][0]["content"]


def test_several_texts_are_about_one_object_each(folder):
    boxes = [[10, 1, 15, 9], [1, 1, 5, 9], [6, 1, 8, 9]]
    columns = "image=i phrase=t box=b"
    root = folder({"i": "a.jpg", "t": ["the cup", "a bowl", "the cup"], "b": boxes})
    rows = read(root, columns)
    assert [(row["task"], row["boxes"]) for row in rows] == [
        ("refer", [boxes[2], boxes[0]]),  # the same text: several instances, from left to right
        ("refer", [boxes[1]]),
        ("region_caption", [boxes[1]]),
    ]
    assert question(rows[0]) == "<image>Find the cup." and rows[0]["messages"][1]["content"] == "<vis><vis>"
    one = read(folder({"i": "a.jpg", "t": ["the cup", "red one"], "b": boxes[:1]}), columns, tasks=["refer"])
    assert [(question(row), row["boxes"]) for row in one] == [
        ("<image>Find the cup.", boxes[:1]),
        ("<image>Find red one.", boxes[:1]),
    ]
    with pytest.raises(ValueError, match="record 0: 2 texts about 3 objects"):
        read(folder({"i": "a.jpg", "t": ["the cup", "a bowl"], "b": boxes}), columns)


def test_coco_pictures_are_known_by_their_names(folder, monkeypatch):
    record = {"i": COCO_NAME, "t": "a cup", "b": [1, 1, 5, 9], "n": 7, "m": None}
    columns = "image=i phrase=t box=b"
    rows = read(folder(record), columns)
    assert rows[0]["image_id"] == "9" and rows[0]["image"]["path"].endswith("/000000000009.jpg")
    assert read(folder(record), columns + " image_id=n")[0]["image_id"] == "7"
    # the number of a record is no number of a picture
    root = folder({**record, "i": "a.jpg"})
    monkeypatch.chdir(root)
    assert read(root, columns)[0]["image_id"] == read(Path("."), columns)[0]["image_id"] == f"{root.name} 0"
    with pytest.raises(ValueError, match="record 0: there is no image_id"):
        read(folder(record), columns + " image_id=m")


def test_columns_of_jxu124(folder, tmp_path):
    record = {"sent_ids": [1, 2], "file_name": "COCO_train2014_000000000009_0.jpg", "ann_id": 3, "ref_id": 4}
    record |= {"image_id": 9, "split": "train", "sentences": [{"raw": "Cup", "sent": "cup"}], "raw_anns": "{}"}
    record |= {"image_path": f"coco/train2014/{COCO_NAME}", "bbox": [1.5, 1, 5, 9.25], "captions": ["cup", "the cup"]}
    rows = list(checked_rows("hub", root=folder(record), images=tmp_path, evaluation=True))
    assert [row["task"] for row in rows].count("refer") == 2
    assert all(row["boxes"] == [[1.5, 1, 5, 9.25]] and row["image_id"] == "9" for row in rows)


def test_rows_without_pictures_take_their_size_from_columns(folder):
    record = {"i": "far/away.jpg", "t": "a cup", "b": [0.5, 0.1, 1, 1], "w": 20, "h": 10}
    columns, options = "image=i phrase=t box=b", {"box_format": "xyxy_relative", "images": False}
    (row, _) = read(folder(record), columns + " width=w height=h", **options)
    assert (row["image"], row["boxes"], row["width"], row["height"]) == (None, [[10, 1, 20, 10]], 20, 10)
    assert read(folder({**record, "i": "a.jpg"}), columns, **options)[0]["width"] == 20  # the picture is there
    (caption,) = read(folder(record), "image=i caption=t", images=False)
    assert caption["width"] == caption["height"] == 0
    for change, message, mapping in (
        ({}, "the image's size is in no", ""),
        ({"w": "20"}, "'width' is '20'", " width=w height=h"),
        ({"i": "../a.jpg"}, "leaves the folder", " width=w height=h"),
        ({"i": "a.jpg", "w": 21}, "20 x 10 pixels, the annotations say 21", " width=w height=h"),
    ):
        with pytest.raises(ValueError, match=message):
            wanted = options | ({"images": None} if "w" in change and change["w"] == 21 else {})
            read(folder({**record, **change}), columns + mapping, **wanted)


def test_masks_beside_boxes_stay_with_them(folder):
    squares = [[[x, 1, x + 4, 1, x + 4, 5, x, 5]] for x in (10, 2)]
    rles = []
    for polygons in squares:
        (row, _) = read(folder({"i": "a.jpg", "t": "x", "m": polygons}), "image=i phrase=t mask=m")
        rles.append(row["masks"][0])
    boxes = [[10, 1, 14, 5], [2, 1, 6, 5]]
    root = folder({"i": "a.jpg", "t": ["right", "left"], "b": boxes, "m": rles})
    rows = read(root, "image=i phrase=t box=b mask=m")
    assert Counter(row["task"] for row in rows) == {"refer": 2, "box_to_mask": 2, "region_caption": 2}
    for row in rows:
        for box, mask in zip(row["boxes"], row["masks"], strict=True):
            x0, y0, x1, y1 = map(int, box)
            assert mask is None or (decode_rle(mask)[y0:y1, x0:x1].all() and decode_rle(mask).sum() == 16)


GOOD = {"i": "a.jpg", "t": "a cup", "b": [1, 1, 5, 9], "q": "What?", "a": ["cup"]}
REFER, ASK = "image=i phrase=t box=b", "image=i question=q answer=a"


@pytest.mark.parametrize(
    ("columns", "change", "message"),
    [
        (REFER, {"t": None}, "there is no phrase"),
        (REFER, {"t": []}, "there is no phrase"),
        (REFER, {"b": None}, "neither a box nor a mask"),
        (REFER, {"b": []}, "neither a box nor a mask"),
        (REFER, {"b": [1, 1, 5]}, "is not four numbers"),
        (REFER, {"b": [5, 1, 1, 9]}, "has no area"),
        (REFER, {"b": [1, 1, None, 9]}, "are not numbers"),
        (REFER, {"b": [1, 1, 50, 9]}, "outside the 20 x 10 image"),
        (REFER, {"i": None}, "expected an image column or a path"),
        (REFER, {"i": "/etc/passwd"}, "leaves the folder .*--images FOLDER"),
        (REFER, {"i": "none.jpg"}, "none.jpg' is not in .*--images"),
        (ASK, {"a": []}, "there is no answer"),
        (ASK, {"q": None}, "question is 'None', expected a text"),
    ],
)
def test_bad_records_are_one_error_or_counted(folder, columns, change, message):
    root = folder(GOOD, {**GOOD, **change}, GOOD)
    with pytest.raises(ValueError, match=f"{root}, train: record 1: .*{message}"):
        read(root, columns)
    problems = Problems(skip=True)
    count = len(read(folder(GOOD, GOOD), columns))
    assert len(read(folder(GOOD, {**GOOD, **change}, GOOD), columns, problems=problems)) == count
    assert problems.counts == {"image not found" if "not in" in message else "broken record": 1}


def test_one_file_and_the_column_image_by_itself(tmp_path):
    record = {"image": "a.jpg", "t": "A dog.", "b": [1.0, 1.0, 5.0, 9.0]}
    Image.new("RGB", SIZE).save(tmp_path / "a.jpg")
    Dataset.from_list([record]).to_parquet(tmp_path / "mine.parquet")
    expected = read(tmp_path, {"image": "image", "phrase": "t", "box": "b"})
    for root in (tmp_path, tmp_path / "mine.parquet"):
        for columns in ("phrase=t box=b", ["phrase=t", "box=b"], {"phrase": "t", "box": "b"}):
            assert read(root, columns) == expected and len(expected) == 2
    Dataset.from_list([record]).rename_column("image", "i").to_parquet(tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match="no column has the role 'image'"):
        read(tmp_path, "phrase=t box=b")


def test_values_of_a_wrong_type(tmp_path):
    Image.new("RGB", SIZE).save(tmp_path / "a.jpg")
    Dataset.from_list([{**GOOD, "a": 3, "b": "1, 1, 5, 9"}]).to_parquet(tmp_path / "train.parquet")
    for columns, message in ((ASK, "answer is '3', expected a text"), (REFER, "box 1, 1, 5, 9 is not four numbers")):
        with pytest.raises(ValueError, match=f"record 0: {message}"):
            read(tmp_path, columns)


def test_records_that_no_task_fits_are_counted(folder):
    problems = Problems()
    record = {**GOOD, "b": [GOOD["b"], [6, 1, 8, 9]]}
    rows = read(folder(GOOD, record), REFER, tasks=["region_caption"], problems=problems)
    assert len(rows) == 1 and problems.counts == {"record that none of the tasks fits": 1}
    with pytest.raises(ValueError, match="image, phrase are enough for none of"):
        read(folder(GOOD), "image=i phrase=t")


def test_broken_and_empty_files(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no records"):
        read(folder(), REFER)
    root = folder(*[GOOD] * 50)
    whole = (root / "train.jsonl").read_bytes()
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(whole))
    assert read(root, REFER, annotations=[packed]) == read(root, REFER)
    packed.write_bytes(gzip.compress(whole)[:-30])
    (root / "train.jsonl").write_bytes(whole[:-20])
    for options in ({}, {"annotations": [packed]}):
        with pytest.raises(ValueError, match=str(root)):
            read(root, REFER, **options)
