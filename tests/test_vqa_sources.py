"""Sources of questions and answers, conversations, and data sets by a column mapping."""

import gzip
import io
import json
import zipfile
from collections import Counter

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from pycocotools.coco import COCO

from perceptiongpt.data.formats.hub import hub_rows
from perceptiongpt.data.formats.llava import llava_rows
from perceptiongpt.data.formats.pope import pope_rows
from perceptiongpt.data.formats.viscot import viscot_rows
from perceptiongpt.data.formats.vqav2 import most_given_answer, okvqa_rows, vqav2_rows
from perceptiongpt.data.reading import Problems
from perceptiongpt.data.schema import decode_rle, row_features, validate_row


def checked(rows) -> list[dict]:
    """The rows as a list, each valid."""
    rows = list(rows)
    for index, row in enumerate(rows):
        validate_row(row, index, with_images=row["image"] is not None)
    return rows


def of_task(rows, task: str) -> list[dict]:
    return [row for row in rows if row["task"] == task]


def texts(row) -> list[str]:
    return [message["content"] for message in row["messages"]]


def write(path, content):
    path.write_text("\n".join(map(json.dumps, content)) if path.suffix == ".jsonl" else json.dumps(content))
    return path


# ---- VQA v2, OK-VQA, POPE --------------------------------------------------------------------------------------------


def test_vqav2_answers(data_dir):
    files = [data_dir / f"vqav2/vqa_{kind}_valid.json.gz" for kind in ("annotations", "questions")]
    rows = checked(vqav2_rows(data_dir, split="val", annotations=files, images=False, evaluation=True))
    contents = [json.loads(gzip.decompress(file.read_bytes())) for file in files]
    answers = {one["question_id"]: one for one in contents[0]["annotations"]}
    assert len(rows) == len(contents[1]["questions"]) == 8977
    for row, question in zip(rows, contents[1]["questions"], strict=True):
        text = " ".join(question["question"].split())
        assert texts(row)[0] == f"<image>{text[0].upper()}{text[1:]} Answer with a word or a short phrase."
        assert texts(row)[1] == answers[question["question_id"]]["multiple_choice_answer"].strip()
        assert row["image_id"] == str(question["image_id"])


def test_vqav2_with_pictures(data_dir):
    files = [data_dir / f"vqav2/in_stock_{kind}.json" for kind in ("questions", "annotations")]
    rows = checked(vqav2_rows(data_dir, annotations=files, images=data_dir / "coco128"))
    assert len(rows) == 28
    assert all(row["image"]["path"].endswith(f"{int(row['image_id']):012d}.jpg") and row["width"] > 0 for row in rows)


def test_vqav2_usual_files(tmp_path):
    question = {"image_id": 42, "question": "What is it? ", "question_id": 420}
    annotation = {"question_id": 420, "image_id": 42, "answers": [{"answer": a} for a in ("cat", "dog", "dog", "cat")]}
    with zipfile.ZipFile(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json.zip", "w") as archive:
        archive.writestr("questions.json", json.dumps({"info": {}, "questions": [question]}))
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [annotation]})
    (tmp_path / "val2014").mkdir()
    PILImage.new("RGB", (9, 7)).save(tmp_path / "val2014/COCO_val2014_000000000042.jpg")
    (row,) = checked(vqav2_rows(tmp_path, split="val", evaluation=True))
    assert texts(row)[1] == "cat" and (row["width"], row["height"]) == (9, 7)
    with pytest.raises(ValueError, match="no v2_OpenEnded_mscoco_train2014_questions.json"):
        list(vqav2_rows(tmp_path))
    null = annotation | {"multiple_choice_answer": "cow", "answers": None}
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [null]})
    with pytest.raises(ValueError, match="record 0: 'answers' is 'None', expected list"):
        list(vqav2_rows(tmp_path, split="val", evaluation=True))
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(ValueError, match="record 0: question 420 has no annotation"):
        list(vqav2_rows(tmp_path, split="val"))
    assert most_given_answer(annotation | {"multiple_choice_answer": "cow"}) == "cow"


def test_okvqa_questions_without_answers(data_dir):
    rows = checked(okvqa_rows(data_dir / "okvqa", images=False))
    assert len(rows) == 9009 and {len(row["messages"]) for row in rows} == {1}
    assert {row["source"] for row in rows} == {"okvqa"}


def test_a_blank_among_ten_answers_is_passed_over(tmp_path):
    question = {"question_id": 7, "image_id": 9, "question": "What is it?"}
    answers = [{"answer": text} for text in (" ", "cup", "mug", "cup")]
    files = [
        write(tmp_path / "questions.json", {"questions": [question]}),
        write(tmp_path / "annotations.json", {"annotations": [{"question_id": 7, "image_id": 9, "answers": answers}]}),
    ]
    (row,) = checked(okvqa_rows(tmp_path, annotations=files, images=False, evaluation=True))
    assert texts(row)[1] == "cup" and row["answers"] == [" ", "cup", "mug", "cup"]
    with pytest.raises(ValueError, match="no answers"):
        most_given_answer({"answers": answers[:1]})


def test_pope(data_dir, tmp_path):
    rows = checked(pope_rows(data_dir / "pope", images=False, evaluation=True))
    assert len(rows) == 6000 and Counter(texts(row)[1] for row in rows) == {"yes": 3000, "no": 3000}
    assert len(list(pope_rows(data_dir / "pope", split="random", images=False))) == 3000
    assert rows[0]["image_id"] == "310196" and texts(rows[0])[0].startswith(
        "<image>Is there a snowboard in the image? "
    )
    record = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is it?", "label": "maybe"}
    for change, message in (({}, "line 1: label is 'maybe'"), ({"text": "a <vis>?"}, "contains '<vis>'")):
        with pytest.raises(ValueError, match=message):
            list(pope_rows(tmp_path, annotations=[write(tmp_path / "a.jsonl", [record | change])], images=False))


# ---- LLaVA -----------------------------------------------------------------------------------------------------------


def test_llava_files(data_dir):
    rows = checked(llava_rows(data_dir / "llava", images=False))
    records = [json.loads(line) for line in (data_dir / "llava/caps_boxes_coco2014_val_80.jsonl").open()]
    captions = sum(len(record["captions"]) for record in records)
    assert Counter(row["task"] for row in rows) == {"caption": captions, "vqa": 180}
    answered = [row for row in of_task(rows, "vqa") if len(row["messages"]) == 2]
    assert len(answered) == 90 and rows[0]["image_id"] == "296284"


def test_llava_conversations(tmp_path):
    said = ["What is it?\n<image>", "A cat.\n\nA black one.", "Why?", "It is born so."]
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(said)]
    record = {"id": "000000000025", "image": "coco/train2017/000000000025.jpg", "conversations": turns}

    def read(*records, **arguments):
        return list(
            llava_rows(tmp_path, annotations=[write(tmp_path / "a.json", list(records))], images=False, **arguments)
        )

    (row,) = checked(read(record))
    assert texts(row) == ["<image>What is it?", "A cat.\n\nA black one.", "Why?", "It is born so."]
    assert (row["task"], row["image_id"]) == ("dialogue", "25")
    problems = Problems()
    boxes = [turns[0], {"from": "gpt", "value": "It is at [0.12, 0.3, 0.5, 1.0]."}]
    no_picture = {"id": "1", "conversations": turns}
    assert read(no_picture, {**record, "conversations": boxes}, problems=problems) == []
    assert problems.counts == {"conversation without an image": 1, "boxes written as numbers": 1}
    for change, message in (
        (turns[:3], "the speakers are"),
        (turns[1:], "the speakers are"),
        ([turns[0], turns[1], turns[0], turns[1]], "must stand once"),
        ([turns[0], {"from": "gpt", "value": "See <vis>."}], "contains '<vis>'"),
        ([turns[0], {"from": "gpt"}], "there is no 'value'"),
        ("talk", "expected list"),
    ):
        with pytest.raises(ValueError, match=f"record 0: .*{message}"):
            read({**record, "conversations": change})


def test_pictures_of_several_data_sets_keep_apart(tmp_path):
    """The same number in two folders is two pictures: rows that agree in `image_id` may share one."""
    for name, colour in (("vg/VG_100K/5.jpg", "red"), ("ocr_vqa/images/5.jpg", "blue")):
        (tmp_path / name).parent.mkdir(parents=True)
        PILImage.new("RGB", (8, 8), colour).save(tmp_path / name)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    records = [
        {"id": "5", "image": name, "conversations": turns} for name in ("vg/VG_100K/5.jpg", "ocr_vqa/images/5.jpg")
    ]
    rows = checked(llava_rows(tmp_path, annotations=[write(tmp_path / "llava.json", records)]))
    assert [row["image_id"] for row in rows] == ["vg/VG_100K/5", "ocr_vqa/images/5"]
    assert len({row["image"]["path"] for row in rows}) == 2

    for name in ("cot_image_data/gqa/5.jpg", "cot_image_data/flickr30k/5.jpg"):  # as the tar files unpack
        (tmp_path / name).parent.mkdir(parents=True)
        PILImage.new("RGB", (8, 8)).save(tmp_path / name)
    record = {"question": "What?", "answer": "It.", "image": "5.jpg", "width": 8, "height": 8, "bboxs": [[1, 1, 5, 5]]}
    (tmp_path / "metadata").mkdir()
    write(tmp_path / "metadata/gqa_cot_train.jsonl", [record | {"dataset": name} for name in ("gqa", "flickr30k")])
    rows = checked(viscot_rows(tmp_path, tasks=["vqa"]))
    assert [row["image_id"] for row in rows] == ["gqa/5", "flickr30k/5"]
    assert [row["image"]["path"].split("/")[-2] for row in rows] == ["gqa", "flickr30k"]
    for name in ("../5.jpg", "/5.jpg"):
        with pytest.raises(ValueError, match="leaves the folder"):
            list(viscot_rows(tmp_path, annotations=[write(tmp_path / "a.jsonl", [record | {"image": name}])]))


def test_llava_boxes_are_relative(tmp_path):
    PILImage.new("RGB", (200, 100)).save(tmp_path / "a.jpg")
    instances = [{"category": "cup", "bbox": [0.5, 0.1, 0.75, 0.5]}, {"category": "cup", "bbox": [0.1, 0.1, 0.2, 0.9]}]
    record = {"id": "a", "image": "a.jpg", "captions": ["Two cups. "], "instances": instances}
    file = write(tmp_path / "caps.jsonl", [record])
    rows = checked(llava_rows(tmp_path, annotations=[file], evaluation=True))
    (detect,) = of_task(rows, "detect")
    assert detect["boxes"] == [[20, 10, 40, 90], [100, 10, 150, 50]] and len(of_task(rows, "refer")) == 2
    problems = Problems()
    assert len(list(llava_rows(tmp_path, annotations=[file], images=False, problems=problems))) == 1
    assert problems.counts == {"relative boxes of an image of unknown size": 1}
    record["instances"][0]["bbox"][2] = 75
    with pytest.raises(ValueError, match="line 1: bbox .* of instance 0 is not relative"):
        list(llava_rows(tmp_path, annotations=[write(file, [record])]))


# ---- Visual-CoT ------------------------------------------------------------------------------------------------------


def test_viscot_benchmark(data_dir):
    rows = checked(viscot_rows(data_dir / "viscot", images=False))
    lines = gzip.decompress((data_dir / "viscot/benchmark_det_flickr30k.jsonl.gz").read_bytes()).splitlines()
    assert len(rows) == 1546 and {row["task"] for row in rows} == {"reasoning"}
    for row, record in zip(rows, map(json.loads, lines), strict=True):
        assert row["boxes"] == [record["bbox"]] and " ".join(record["expression"].split())[1:] in texts(row)[0]


def test_viscot_forms_agree(tmp_path):
    question, answer, box = "What does he hold?", "A red cup.", [10, 20, 30, 40]
    record = {"question": question, "answer": answer, "image": "5.jpg", "width": 100, "height": 50, "bboxs": [box]}
    ask = f"<image>\n{question} Please provide the bounding box coordinate of the region that can help you."
    said = [ask, "[0.1, 0.2, 0.3, 0.4]", "<image>", answer]
    turns = [{"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(said)]
    pictures = ["cot/flickr30k/5.jpg", f"cot/flickr30k/5.jpg###{box}"]
    talk = {"image": pictures, "conversations": turns, "width": 100, "height": 50}
    file = write(tmp_path / "a.jsonl", [{**record, "dataset": "flickr30k"}, talk])
    rows = checked(viscot_rows(tmp_path, annotations=[file], images=False, evaluation=True))
    assert [row["task"] for row in rows[:4]] == ["reasoning", "grounded_vqa", "region_vqa", "vqa"]
    assert rows[:4] == rows[4:]
    assert texts(rows[1])[1] == "<p>this part</p><vis>: A red cup." and rows[1]["boxes"] == [[10.0, 20.0, 30.0, 40.0]]
    assert texts(rows[0])[1] == "It is <p>this</p><vis>." and rows[3]["boxes"] == []
    for change, message in (
        ({"bboxs": []}, "with the boxes"),
        ({"bboxs": [[10, 20, 130, 40]]}, "box 0: .*outside"),
        ({"answer": "<p>it</p>"}, "contains '<p>'"),
        ({"question": None}, "expected str"),
    ):
        with pytest.raises(ValueError, match=f"line 1: .*{message}"):
            list(viscot_rows(tmp_path, annotations=[write(file, [record | change])], images=False))
    with pytest.raises(ValueError, match="does not end with ###"):
        list(viscot_rows(tmp_path, annotations=[write(file, [{**talk, "image": [pictures[0]] * 2}])], images=False))


# ---- data sets by a column mapping -----------------------------------------------------------------------------------


def picture_bytes(width: int, height: int) -> bytes:
    data = io.BytesIO()
    PILImage.new("RGB", (width, height), "green").save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="module")
def refcoco_like(data_dir, tmp_path_factory):
    """(folder of parquet files with the columns of lmms-lab/RefCOCO, the annotations they were made of)."""
    coco = COCO(str(data_dir / "tiny_coco/annotations/instances_train2017.json"))
    annotations = [one for one in coco.anns.values() if not one["iscrowd"] and len(one["segmentation"]) == 1][:6]
    images = data_dir / "tiny_coco/train2017"
    records = [
        {
            "question_id": str(one["id"]),
            "image": {"bytes": (images / coco.imgs[one["image_id"]]["file_name"]).read_bytes(), "path": None},
            "question": "Please carefully observe the area.",
            "answer": ["The left one.", "other words"],
            "segmentation": one["segmentation"][0],
            "bbox": one["bbox"],
            "iscrowd": 0,
            "file_name": f"COCO_train2014_{one['image_id']:012d}_3.jpg",
        }
        for one in annotations
    ]
    numbers = List(Value("float32"))
    features = Features(
        {name: Value("string") for name in ("question_id", "question", "file_name")}
        | {"image": Image(), "answer": List(Value("string")), "segmentation": numbers, "bbox": numbers}
        | {"iscrowd": Value("int8")}
    )
    folder = tmp_path_factory.mktemp("hub")
    (folder / "data").mkdir()
    Dataset.from_list(records, features=features).to_parquet(folder / "data/val-00000-of-00001.parquet")
    return folder, coco, annotations


def test_hub_known_columns(refcoco_like):
    folder, coco, annotations = refcoco_like
    rows = checked(hub_rows(folder, split="val", evaluation=True))
    refer = of_task(rows, "refer")
    assert len(refer) == 2 * len(annotations) and texts(refer[0])[0] == "<image>Find the left one."
    for row, one in zip(refer[::2], annotations, strict=True):
        x, y, w, h = one["bbox"]
        assert row["boxes"][0] == [x, y, x + w, y + h]
        assert (decode_rle(row["masks"][0]) == coco.annToMask(one)).all()
        assert row["image_id"] == str(one["image_id"]) and row["image"]["bytes"]
    assert Counter(row["task"] for row in rows) == {"refer": 12, "box_to_mask": 6, "region_caption": 12}
    loaded = Dataset.from_list(rows[:2], features=row_features())
    assert loaded[0]["image"].size == (rows[0]["width"], rows[0]["height"])


def test_hub_mapping_and_errors(refcoco_like):
    folder = refcoco_like[0]
    mapping = "image=image question=question answer=answer image_id=question_id"
    rows = checked(hub_rows(folder, split="val", columns=mapping, images=False, limit=2, evaluation=True))
    assert [row["task"] for row in rows] == ["vqa", "vqa"] and rows[0]["image"] is None
    assert texts(rows[0])[1] == "The left one."
    for arguments, message in (
        ({"split": "train"}, "split 'train' cannot be read"),
        ({"columns": ["image"]}, "are not role=column"),
        ({"columns": {"image": "picture"}}, "no columns \\['picture'\\]"),
        ({"columns": {"picture": "image"}}, "unknown roles \\['picture'\\]"),
        ({"columns": {"image": "image", "box": "bbox"}, "box_format": "cxcywh"}, "box_format 'cxcywh'"),
        ({"columns": {"image": "image", "box": "bbox", "phrase": "answer"}}, "record 0: box"),
        ({"tasks": ["vqa"]}, "unknown tasks \\['vqa'\\]"),
    ):
        with pytest.raises(ValueError, match=message):
            list(hub_rows(folder, **{"split": "val", **arguments}))


def test_hub_several_boxes_masks_as_pictures_and_own_rows(tmp_path):
    mask = PILImage.new("L", (20, 10))
    mask.paste(255, (2, 3, 6, 8))
    data = io.BytesIO()
    mask.save(data, "PNG")
    record = {
        "picture": {"bytes": picture_bytes(20, 10), "path": None},
        "text": "cups",
        "boxes": [[0.5, 0.1, 0.9, 0.9], [0.1, 0.1, 0.3, 0.8]],
        "mask": {"bytes": data.getvalue(), "path": None},
    }
    features = Features(
        {"picture": Image(), "text": Value("string"), "boxes": List(List(Value("float64"))), "mask": Image()}
    )
    file = tmp_path / "a.parquet"
    Dataset.from_list([record], features=features).to_parquet(file)
    arguments = {"annotations": [file], "evaluation": True}
    columns = {"image": "picture", "phrase": "text", "box": "boxes"}
    (row,) = checked(hub_rows(tmp_path, columns=columns, box_format="xyxy_relative", **arguments))
    assert row["boxes"] == [[2.0, 1.0, 6.0, 8.0], [10.0, 1.0, 18.0, 9.0]] and texts(row)[1] == "<vis><vis>"
    rows = checked(hub_rows(tmp_path, columns={"image": "picture", "phrase": "text", "mask": "mask"}, **arguments))
    assert [row["task"] for row in rows] == ["refer", "region_caption"]
    found = decode_rle(rows[0]["masks"][0])
    assert found.sum() == 20 and found[3:8, 2:6].all()

    named = tmp_path / "named.jsonl"
    PILImage.new("RGB", (20, 10)).save(tmp_path / "a.png")
    columns = {"image": "file", "caption": "text"}
    for name, message in (("a.png", None), ("../a.png", "leaves the folder"), ("/etc/a.png", "leaves the folder")):
        arguments["annotations"] = [write(named, [{"file": name, "text": "a cup"}])]
        if message is None:
            assert checked(hub_rows(tmp_path, columns=columns, **arguments))[0]["width"] == 20
        else:
            with pytest.raises(ValueError, match=message):
                list(hub_rows(tmp_path, columns=columns, **arguments))

    own = tmp_path / "own"
    own.mkdir()
    Dataset.from_list(rows, features=row_features()).to_parquet(own / "train-00000-of-00001.parquet")
    for row, same in zip(rows, checked(hub_rows(own)), strict=True):
        assert {**same, "image": None} == {**row, "image": None} and same["image"]["bytes"] == row["image"]["bytes"]
