"""The RefCOCO family in every form, gRefCOCO, refcocos and ReasonSeg, against values read independently."""

import gzip
import json
import pickle
import tarfile
import zipfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from perceptiongpt.data.formats.grefcoco import grefcoco_rows
from perceptiongpt.data.formats.minigpt4_rec import minigpt4_rec_rows
from perceptiongpt.data.formats.reasonseg import reasonseg_rows, target_and_ignore
from perceptiongpt.data.formats.refcocos import refcocos_rows
from perceptiongpt.data.formats.refer import refer_rows
from perceptiongpt.data.formats.shikra_rec import shikra_rec_rows
from perceptiongpt.data.leakage import refcoco_family_eval_images
from perceptiongpt.data.reading import Problems
from perceptiongpt.data.schema import decode_rle, validate_row
from perceptiongpt.data.sources import rows as checked_rows


SIDES = ("height", "width")
# val expressions and pictures of RefCOCO unc, RefCOCO+ unc, RefCOCOg umd, as published
VAL_SETS = {"refcoco": (10_834, 1_500), "refcoco+": (10_758, 1_500), "refcocog": (4_896, 1_300)}
SHIKRA_FILES = {
    "refcoco": "refcoco_rec_jsonl/REC_refcoco_unc_val.jsonl.gz",
    "refcoco+": "refcoco_rec_jsonl/REC_refcoco+_unc_val.jsonl.gz",
    "refcocog": "refcoco_rec_jsonl/REC_refcocog_umd_val.jsonl.gz",
}


def phrase_of(row: dict) -> str:
    """The expression of a row made with the evaluation prompt "Find {phrase}."."""
    return row["messages"][0]["content"].removeprefix("<image>Find ").removesuffix(".")


def quiet_coco(path: Path, capsys) -> COCO:
    coco = COCO(path)
    capsys.readouterr()
    return coco


def make_ref(ann: dict, number: int, split: str = "train", texts=("the thing",), **changes) -> dict:
    return {
        "ref_id": number,
        "ann_id": ann["id"],
        "category_id": ann["category_id"],
        "image_id": ann["image_id"],
        "file_name": f"COCO_train2014_{ann['image_id']:012d}_{number}.jpg",
        "split": split,
        "sent_ids": [10 * number + i for i in range(len(texts))],
        "sentences": [
            {"tokens": text.split(), "raw": text.upper(), "sent_id": 10 * number + i, "sent": text}
            for i, text in enumerate(texts)
        ],
    } | changes


@pytest.fixture
def tiny(data_dir, tmp_path):
    """A REFER folder whose refs are all instances of tiny_coco, pickled as Python 2 would; (folder, refs, pictures)."""
    source = data_dir / "tiny_coco/annotations/instances_train2017.json"
    annotations = json.loads(source.read_bytes())["annotations"]
    refs = [make_ref(ann, i, texts=("first one", "same text")[: 1 + i % 2]) for i, ann in enumerate(annotations)]
    folder = tmp_path / "root" / "refcoco"
    folder.mkdir(parents=True)
    (folder / "instances.json").write_bytes(source.read_bytes())
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    return tmp_path / "root", refs, data_dir / "tiny_coco/train2017"


def rewrite(root: Path, refs, name: str = "refcoco/refs(unc).p") -> None:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(json.dumps(refs).encode() if name.endswith("json") else pickle.dumps(refs, protocol=2))


# ---- REFER -----------------------------------------------------------------------------------------------------------


def test_boxes_and_masks_equal_pycocotools_pixel_for_pixel(tiny, capsys):
    root, refs, images = tiny
    coco = quiet_coco(root / "refcoco/instances.json", capsys)
    rows = list(refer_rows(root, dataset="refcoco", images=images, evaluation=True))
    expected = [(ref, sentence) for ref in refs for sentence in ref["sentences"]]
    assert len(rows) == len(expected) == 705
    kinds = Counter()
    for row, (ref, sentence) in zip(rows, expected, strict=True):
        ann, image = coco.anns[ref["ann_id"]], coco.imgs[ref["image_id"]]
        x, y, w, h = ann["bbox"]
        assert row["boxes"] == [[x, y, x + w, y + h]] and row["task"] == "refer"
        assert np.array_equal(decode_rle(row["masks"][0]), coco.annToMask(ann))
        assert phrase_of(row) == sentence["sent"] and row["messages"][1]["content"] == "<vis>"
        assert (row["width"], row["height"], row["image_id"]) == (image["width"], image["height"], str(image["id"]))
        assert row["image"]["path"] == str(images / image["file_name"]) and row["split"] == "train"
        kinds["crowd" if ann["iscrowd"] else "several" if len(ann["segmentation"]) > 1 else "one"] += 1
    assert kinds["crowd"] and kinds["several"] > 30


def test_refs_in_a_json_list_of_several_data_sets(data_dir):
    root = data_dir / "refcoco_mini"
    refs = json.loads((root / "refs_joined.json").read_bytes())
    annotations = {ann["id"]: ann for ann in json.loads((root / "instances.json").read_bytes())["annotations"]}
    options = {"split": None, "images": data_dir / "coco128", "evaluation": True}
    rows = list(checked_rows("refer", root=root, **options))
    expected = [(ref, sentence["sent"]) for ref in refs for sentence in ref["sentences"]]
    assert len(rows) == len(expected) == 18
    for row, (ref, text) in zip(rows, expected, strict=True):
        x, y, w, h = annotations[ref["ann_id"]]["bbox"]
        assert np.allclose(row["boxes"], [[x, y, x + w, y + h]], atol=1e-9)
        assert phrase_of(row) == text and row["split"] == ref["split"] and row["image_id"] == str(ref["image_id"])
        assert Path(row["image"]["path"]).name == f"{ref['image_id']:012d}.jpg"  # not the ref's file_name
    same = list(refer_rows("nowhere", annotations=[root / "refs_joined.json"], **options))  # instances lie beside it
    assert same == list(refer_rows(root, **options))
    parts = [("refcoco", None, "testB", 8), ("refcoco+", "unc", "testB", 6), ("refcocog", "umd", "val", 4)]
    for dataset, split_by, split, count in parts:
        own = refer_rows(root, dataset=dataset, split_by=split_by, **(options | {"split": split}))
        assert len(list(own)) == count
    with pytest.raises(ValueError, match="no refs of split 'train'; found {'testB': 4, 'val': 2}"):
        next(refer_rows(root, **(options | {"split": "train"})))


def test_a_wrong_data_set_or_partition_is_told_what_there_is(data_dir, tiny):
    there = "found {'refcoco\\+ by unc': 2, 'refcoco by unc': 2, 'refcocog by umd': 2}"
    for wrong in ({"dataset": "foo"}, {"split_by": "foo"}, {"dataset": "refcoco", "split_by": "umd"}):
        asked = f"--dataset {wrong.get('dataset', '.any.')} --split_by {wrong.get('split_by', '.any.')}"
        with pytest.raises(ValueError, match=f"no refs of {asked}; {there}"):
            list(refer_rows(data_dir / "refcoco_mini", split="val", images=False, **wrong))
    with pytest.raises(ValueError, match="there is no foo/refs.*; there are refcoco: choose with --dataset"):
        list(refer_rows(tiny[0], dataset="foo", images=False))


def test_original_records_under_every_partition(data_dir, tmp_path):
    source = json.loads((data_dir / "refcoco_original_schema/refcoco_first14_refs.json").read_bytes())["ref"]
    annotations = {ref["ann_id"]: ref["ann"] for ref in source}
    image = {"id": 460986, "file_name": "COCO_train2014_000000460986.jpg", "width": 640, "height": 480}
    groups = {}
    for ref in source:
        plain = {key: value for key, value in ref.items() if key not in ("ann", "dataset", "dataset_partition")}
        groups.setdefault((ref["dataset"], ref["dataset_partition"]), []).append(plain)
    for (dataset, partition), refs in groups.items():
        rewrite(tmp_path, refs, f"{dataset}/refs({partition}).p")
        instances = {"info": {}, "images": [image], "annotations": list(annotations.values()), "categories": []}
        (tmp_path / dataset / "instances.json").write_text(json.dumps(instances))
    assert set(groups) == {(d, p) for d in ("refcoco", "refcocog") for p in ("google",)} | {
        ("refcoco", "unc"),
        ("refcoco+", "unc"),
        ("refcocog", "umd"),
    }
    for (dataset, partition), refs in groups.items():
        for split in {ref["split"] for ref in refs}:
            rows = list(refer_rows(tmp_path, dataset=dataset, split_by=partition, split=split, images=False))
            texts = [s["sent"] for ref in refs if ref["split"] == split for s in ref["sentences"]]
            assert len(rows) == len(texts)
            for row, text in zip(rows, texts, strict=True):
                assert text.lower() in row["messages"][0]["content"].lower() and row["image"] is None
                validate_row(row, with_images=False)
    # without split_by: the one the field reports on (unc, umd)
    assert len(list(refer_rows(tmp_path, dataset="refcocog", images=False))) == 4
    with pytest.raises(ValueError, match="several data sets.*refcoco"):
        next(refer_rows(tmp_path, images=False))
    with pytest.raises(ValueError, match="no refs by 'umd', only by google, unc"):
        next(refer_rows(tmp_path, dataset="refcoco", split_by="umd", images=False))
    # of google's RefCOCOg, the same picture is in train and val; it does not count unless it is named
    assert refcoco_family_eval_images(tmp_path / "refcocog/refs(google).p") == {"460986"}
    with pytest.raises(ValueError, match="no images of a val or test split"):
        refcoco_family_eval_images(tmp_path)
    # packed as they are downloaded, in a folder or one alone
    packed = tmp_path / "packed"
    packed.mkdir()
    refs = [
        make_ref({"id": 1, "category_id": 1, "image_id": i}, i, split)
        for i, split in ((3, "train"), (5, "val"), (7, "test"))
    ]
    for dataset, partitions in (("refcoco", ["unc"]), ("refcocog", ["google", "umd"])):
        with zipfile.ZipFile(packed / f"{dataset}.zip", "w") as archive:
            for partition in partitions:
                kept = [{**ref, "split": "val"} for ref in refs] if partition == "google" else refs
                archive.writestr(f"{dataset}/refs({partition}).p", pickle.dumps(kept, 0))
    assert refcoco_family_eval_images(packed) == {"5", "7"} == refcoco_family_eval_images(packed / "refcocog.zip")
    named = data_dir / "refcoco_original_schema"
    assert refcoco_family_eval_images(named) == {"460986"}  # its list is called refcoco_first14_refs.json
    # records that carry their annotation need no instances file, but a picture
    path = tmp_path / "joined.json"
    path.write_text(json.dumps(source))
    Image.new("RGB", (640, 480)).save(tmp_path / "COCO_train2014_000000460986.jpg")
    assert len(list(refer_rows(tmp_path / "x", annotations=[path], split=None, images=tmp_path))) == sum(
        len(ref["sentences"]) for ref in source
    )


def test_refs_from_archives_and_under_the_2014_names(tiny, tmp_path):
    root, refs, images = tiny
    expected = list(refer_rows(root, dataset="refcoco", images=False))
    with zipfile.ZipFile(tmp_path / "refcoco.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (root / "refcoco").iterdir():
            archive.write(file, f"refcoco/{file.name}")
        archive.writestr("refcoco/refs(google).p", pickle.dumps([]))
    assert list(refer_rows(tmp_path, dataset="refcoco", images=False)) == expected
    options = {"annotations": [tmp_path / "refcoco.zip"], "split_by": "unc", "images": False}
    assert list(refer_rows("nowhere", **options)) == expected
    with tarfile.open(tmp_path / "refcoco.tar.xz", "w:xz", preset=0) as archive:
        archive.add(root / "refcoco", "refcoco")
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        archive.write(root / "refcoco/refs(unc).p", "some/data.p")
    alone = [tmp_path / "one.zip", root / "refcoco/instances.json"]
    assert list(refer_rows("nowhere", annotations=alone, images=False)) == expected
    moved = (root / "refcoco/instances.json").rename(tmp_path / "coco_2014.json")
    assert list(refer_rows(root, dataset="refcoco", annotations=[moved], images=False)) == expected
    moved.rename(root / "refcoco/instances.json")
    (tmp_path / "refcoco.zip").unlink()
    assert list(refer_rows(tmp_path, dataset="refcoco", images=False)) == expected
    packed = tmp_path / "packed"
    packed.mkdir()
    for file in (root / "refcoco").iterdir():
        (packed / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes(), 1))
    assert list(refer_rows(packed, images=False)) == expected

    folder = root / "images/mscoco/images/train2014"
    folder.mkdir(parents=True)
    for ref in refs[:20]:
        name = f"{ref['image_id']:012d}.jpg"
        if not (folder / f"COCO_train2014_{name}").exists():
            (folder / f"COCO_train2014_{name}").write_bytes((images / name).read_bytes())
    rewrite(root, refs[:20])
    rows = list(refer_rows(root, dataset="refcoco"))
    assert {Path(row["image"]["path"]).parent for row in rows} == {folder} and len(rows) == 30
    assert list(refer_rows(root, dataset="refcoco", limit=7)) == rows[:7]


def test_same_text_of_two_objects_stays_two_rows_and_prompts_depend_on_the_seed(tiny):
    root, refs, _ = tiny
    pair = [ref for ref in refs if ref["image_id"] == refs[0]["image_id"]][:2]
    twins = [{**ref, "sentences": [{"sent": "the one", "sent_id": 1}]} for ref in pair]
    rewrite(root, twins)
    first, second = refer_rows(root, dataset="refcoco", images=False, evaluation=True)
    assert first["messages"] == second["messages"] and first["boxes"] != second["boxes"]
    rewrite(root, refs)
    draws = [
        [row["messages"][0]["content"] for row in refer_rows(root, dataset="refcoco", images=False, seed=s, limit=40)]
        for s in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_masks_from_boxes_and_region_captions(tiny):
    root, refs, _ = tiny
    rows = list(refer_rows(root, dataset="refcoco", images=False, tasks=["box_to_mask", "region_caption"]))
    assert Counter(row["task"] for row in rows) == {"box_to_mask": len(refs), "region_caption": 705}
    given = Counter()
    for row in rows:
        validate_row(row, with_images=False)
        if row["task"] == "box_to_mask":
            assert row["masks"][0] is None and row["masks"][1] and row["boxes"][0] == row["boxes"][1]
        else:
            given[row["boxes"][0] is not None, row["masks"][0] is not None] += 1
    assert min(given[pair] for pair in ((True, False), (False, True), (True, True))) > 150
    with pytest.raises(ValueError, match="unknown tasks.*vqa"):
        next(refer_rows(root, tasks=["vqa"]))


BAD_REFS = [
    ({"image_id": "9"}, "'image_id' is '9'"),
    ({"image_id": 10**9}, "image 1000000000 is not in the instances"),
    ({"ann_id": 1}, "annotation 1 is not in the instances"),
    ({"ann_id": [1]}, "is not an integer"),
    ({"sentences": "dog"}, "'sentences' is 'dog'"),
    ({"sentences": ["dog"]}, "not a list of objects"),
    ({"sentences": [{"sent": "  "}]}, "sentence 0: expression"),
    ({"sentences": [{"sent": 3}]}, "'sent' is '3'"),
    ({"sentences": [{"sent": "a <vis>"}]}, "marker"),
    ({"sentences": [{}]}, "there is no 'sent' or 'raw'"),
    ({"split": None}, "'split'"),
    ({"sentences": []}, None),
]


@pytest.mark.parametrize(("change", "message"), BAD_REFS)
def test_bad_refs_are_one_error_or_counted(tiny, change, message):
    root, refs, _ = tiny
    rewrite(root, [refs[0], {**refs[2], **change}, refs[4]])
    options = {"dataset": "refcoco", "images": False}
    problems = Problems(skip=True)
    assert len(list(refer_rows(root, problems=problems, **options))) == 2
    if message is None:
        assert problems.counts == {"ref without a sentence": 1}
        return
    assert problems.counts.total() == 1 and message.split(".*")[0] in problems.examples[0]
    with pytest.raises(ValueError, match=message) as error:
        list(refer_rows(root, **options))
    assert "refs(unc).p: ref 1 (ref_id 2)" in str(error.value)


def test_missing_columns_broken_files_and_hostile_names(tiny, tmp_path):
    root, refs, images = tiny
    refs = refs[:12]
    options = {"dataset": "refcoco", "images": images}
    rewrite(root, [{key: value for key, value in refs[0].items() if key != "ann_id"}])
    with pytest.raises(ValueError, match=r"ref 0 \(ref_id 0\): the ref lacks \['ann_id'\]"):
        list(refer_rows(root, **options))
    rewrite(root, refs)
    path = root / "refcoco/instances.json"
    content = json.loads(path.read_bytes())

    def fails(message, **changes):
        images, annotations = ({item["id"]: item for item in content[key]} for key in ("images", "annotations"))
        images = {**images, refs[0]["image_id"]: images[refs[0]["image_id"]] | changes.get("image", {})}
        annotations = {**annotations, refs[0]["ann_id"]: annotations[refs[0]["ann_id"]] | changes.get("ann", {})}
        path.write_text(json.dumps({"images": list(images.values()), "annotations": list(annotations.values())}))
        with pytest.raises(ValueError, match=message):
            list(refer_rows(root, **options))
        problems = Problems(skip=True)
        assert len(list(refer_rows(root, problems=problems, **options))) < 18 and problems.counts.total() >= 1

    fails("leaves the folder", image={"file_name": "../../secret.jpg"})
    fails("pixels, the annotations say", image={"width": 17})
    fails("'width' is", image={"width": "640"})
    fails("outside the", ann={"bbox": [0, 0, 5000, 5]})
    fails("is not \\[x, y, width, height\\]", ann={"bbox": [0, 0, "5", 5]})
    fails("has no area", ann={"bbox": [0, 0, 0, 5]})
    fails("'segmentation' is 'x'", ann={"segmentation": "x"})
    size = [next(item[side] for item in content["images"] if item["id"] == refs[0]["image_id"]) for side in SIDES]
    fails("do not sum up", ann={"segmentation": {"size": size, "counts": [3]}})
    fails("belongs to image", ann={"image_id": 1})

    whole = json.dumps(content).encode()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="instances.json"):
        list(refer_rows(root, **options))
    path.unlink()
    with pytest.raises(ValueError, match="no instances.json"):
        list(refer_rows(root, **options))
    path.write_bytes(whole)
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs)[:-100])
    with pytest.raises(ValueError, match=r"refs\(unc\).p: not a pickle"):
        list(refer_rows(root, **options))
    for change in (Path("x"), print):
        (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps([refs[0], {**refs[1], "split": change}]))
        with pytest.raises(ValueError, match="not a pickle of plain"):
            list(refer_rows(root, **options))
    with pytest.raises(ValueError, match="there is no refcoco"):
        list(refer_rows(tmp_path / "nowhere", dataset="refcoco"))


# ---- gRefCOCO --------------------------------------------------------------------------------------------------------


@pytest.fixture
def grefs(tiny):
    """gRefCOCO records over tiny_coco: two or three targets, one, none, with a crowd, of crowds alone."""
    root, refs, images = tiny
    content = json.loads((root / "refcoco/instances.json").read_bytes())
    by_image = {}
    for ann in content["annotations"]:
        by_image.setdefault(ann["image_id"], []).append(ann)
    crowd = next(ann for ann in content["annotations"] if ann["iscrowd"])
    plain = [ann for ann in by_image[crowd["image_id"]] if not ann["iscrowd"]]
    several = next(anns for anns in by_image.values() if len(anns) > 5 and not any(a["iscrowd"] for a in anns))

    def ref(number: int, anns: list[dict], ids=None, texts=("all of them", "the lot")):
        ids = [ann["id"] for ann in anns] if ids is None else ids
        categories = [ann["category_id"] for ann in anns] if ids != [-1] else [-1]
        base = make_ref(anns[0], number, "val", texts)
        return base | {"ann_id": ids, "category_id": categories, "no_target": ids == [-1]}

    records = [
        ref(0, several[:3]),
        ref(1, several[3:4]),
        ref(2, several, [-1], texts=("The purple cow.", "an  owl")),
        ref(3, [crowd, plain[0]]),
        ref(4, [crowd]),
        ref(5, several[:2], [several[0]["id"], several[1]["id"], several[0]["id"]], texts=("twice named",)),
    ]
    rewrite(root, records, "grefcoco/grefs(unc).json")
    (root / "grefcoco/instances.json").write_text(json.dumps(content))
    return root, records, images


def test_several_targets_none_and_crowds(grefs, capsys):
    root, records, images = grefs
    coco = quiet_coco(root / "grefcoco/instances.json", capsys)
    problems = Problems()
    rows = list(grefcoco_rows(root, split="val", images=images, evaluation=True, problems=problems))
    for row in rows:
        validate_row(row)
    assert [row["task"] for row in rows] == ["refer"] * 4 + ["no_target"] * 2 + ["refer"] * 3
    assert [len(row["boxes"]) for row in rows] == [3, 3, 1, 1, 0, 0, 1, 1, 2]
    assert problems.counts == {"crowd among the targets": 1, "expression about crowds only": 2}
    assert [rows[4]["messages"][i]["content"] for i in (0, 1)] == [
        "<image>Find The purple cow.",
        "There is no purple cow.",
    ]
    assert rows[5]["messages"][1]["content"] == "There is no owl."
    several = sorted((coco.anns[i] for i in records[0]["ann_id"]), key=lambda ann: ann["bbox"][:2])
    assert rows[0]["messages"][1]["content"] == "<vis><vis><vis>"
    for ann, box, mask in zip(several, rows[0]["boxes"], rows[0]["masks"], strict=True):
        x, y, w, h = ann["bbox"]
        assert box == [x, y, x + w, y + h] and np.array_equal(decode_rle(mask), coco.annToMask(ann))
    x, y, w, h = coco.anns[records[3]["ann_id"][1]]["bbox"]
    assert rows[6]["boxes"] == [[x, y, x + w, y + h]]
    kept = grefcoco_rows(root, split="val", images=images, evaluation=True, tasks=["no_target"])
    assert list(kept) == rows[4:6]
    ids = {str(record["image_id"]) for record in records}
    assert refcoco_family_eval_images(root / "grefcoco") == refcoco_family_eval_images(root) == ids  # refcoco: train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"no_target": True}, "no_target is True, but"),
        ({"ann_id": [-1], "no_target": False}, "no_target is False, but"),
        ({"ann_id": []}, "is not a list of integers"),
        ({"ann_id": ["1"]}, "is not a list of integers"),
        ({"ann_id": [1, 2], "no_target": False}, r"annotations \[1, 2\] are not in"),
    ],
)
def test_contradictions_are_errors(grefs, change, message):
    root, records, _ = grefs
    rewrite(root, [records[0] | change, records[1]], "grefcoco/grefs(unc).json")
    with pytest.raises(ValueError, match=message):
        list(grefcoco_rows(root, split="val", images=False))
    problems = Problems(skip=True)
    assert len(list(grefcoco_rows(root, split="val", images=False, problems=problems))) == 2
    assert problems.counts.total() == 1


# ---- lists with a box per expression ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", VAL_SETS)
def test_complete_val_sets_in_the_forms_of_shikra_and_minigpt4(data_dir, dataset):
    options = {"split": "val", "dataset": dataset, "images": False, "evaluation": True}
    shikra = list(shikra_rec_rows(data_dir / "refcoco_rec_jsonl", **options))
    minigpt4 = list(minigpt4_rec_rows(data_dir / "refcoco_minigpt4", **options))
    path = data_dir / SHIKRA_FILES[dataset]
    expected = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(shikra) == len(minigpt4) == len(expected) == VAL_SETS[dataset][0]
    for row, same, record in zip(shikra, minigpt4, expected, strict=True):
        assert row["boxes"] == same["boxes"] == [record["bbox"]]
        assert row["messages"] == same["messages"] and phrase_of(row) == record["expression"].strip().rstrip(". ")
        assert row["image_id"] == same["image_id"] == str(record["image_id"]) and row["masks"] == [None]
        assert (row["width"], row["height"]) == (record["width"], record["height"]) and row["split"] == "val"
    for row in shikra[::100] + minigpt4[::100]:
        assert validate_row(row, with_images=False)[1] == 0

    ids = {str(record["image_id"]) for record in expected}
    assert refcoco_family_eval_images(path) == ids and len(ids) == VAL_SETS[dataset][1]
    assert refcoco_family_eval_images(data_dir / f"refcoco_minigpt4/{dataset}_val.json.gz") == ids
    if dataset == "refcocog":
        folders = (data_dir / "refcoco_rec_jsonl", data_dir / "refcoco_minigpt4")
        of_all, same = map(refcoco_family_eval_images, folders)
        assert of_all == same > ids


def test_lists_choose_files_and_splits(data_dir, tmp_path):
    root = data_dir / "refcoco_rec_jsonl"
    with pytest.raises(ValueError, match="no file .* split 'train'"):
        next(shikra_rec_rows(root, images=False))
    path = data_dir / SHIKRA_FILES["refcoco"]
    with pytest.raises(ValueError, match="nothing of split 'train'.*'val': 10834"):
        next(shikra_rec_rows(root, annotations=[path], images=False))
    with pytest.raises(ValueError, match="nothing of split 'testA'.*'val': 10834"):
        next(minigpt4_rec_rows(".", annotations=[data_dir / "refcoco_minigpt4/refcoco_val.json.gz"], split="testA"))
    with pytest.raises(ValueError, match="nothing of split 'val' and data set 'refcocog'"):
        next(shikra_rec_rows(root, annotations=[path], split="val", dataset="refcocog", images=False))
    row = {"img_path": "train2014/COCO_train2014_000000000009.jpg", "expression": "a", "bbox": [0, 0, 3, 2]}
    row |= {"dataset_name": "refcoco+", "height": 3, "width": 4}
    for name in ("REC_ref3_train.jsonl", "REC_refcoco_unc_testA.jsonl", "REC_refcocog_google_train.jsonl"):
        (tmp_path / name).write_text(json.dumps(row))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 3)).save(tmp_path / "images/COCO_train2014_000000000009.jpg")
    (only,) = shikra_rec_rows(tmp_path, dataset="refcoco+")
    assert only["split"] == "train" and only["image"]["path"].endswith("images/COCO_train2014_000000000009.jpg")
    assert only["image_id"] == "9"
    assert len(list(shikra_rec_rows(tmp_path, split_by="google"))) == 1
    assert [r["split"] for r in shikra_rec_rows(tmp_path, split=None)] == ["train", "testA", "train"]


BAD_LINES = [
    ({"bbox": [0, 0, 9, 2]}, "outside the 4 x 3 image"),
    ({"bbox": [2, 0, 1, 2]}, "has no area"),
    ({"bbox": [0, 0, "3", 2]}, "is not \\[x"),
    ({"bbox": [0, 0, float("nan"), 2]}, "not finite"),
    ({"bbox": None}, "'bbox' is 'None'"),
    ({"bbox": [0, 0, 10**400, 2]}, "too large"),
    ({"split": ["train"]}, "'split' is"),
    ({"expression": "", "sents": ""}, "expected a text"),
    ({"expression": "a \ud83d", "sents": "a \ud83d"}, "not Unicode"),
    ({"img_path": "../a.jpg", "img_id": "../a_1"}, "leaves the folder|not like COCO"),
    ({"img_path": "/a.jpg", "img_id": 3}, "leaves the folder|'img_id' is"),
    ({"width": "4"}, "'width' is '4'"),
    ({"width": 5}, "the annotations say 5 x 3"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LINES)
@pytest.mark.parametrize("source", ["shikra_rec", "minigpt4_rec"])
def test_bad_records_are_one_error_or_counted(tmp_path, source, change, message):
    Image.new("RGB", (4, 3)).save(tmp_path / "COCO_train2014_000000000009.jpg")
    good = {"img_path": "COCO_train2014_000000000009.jpg", "img_id": "COCO_train2014_000000000009_4", "height": 3}
    good |= {"expression": "a", "sents": "a", "bbox": [0, 0, 3, 2], "width": 4}
    missing = {key: value for key, value in good.items() if key != "bbox"}
    records = [good, good | change, missing, good]
    if source == "shikra_rec":
        rows, path = shikra_rec_rows, tmp_path / "REC_train.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        rows, path = minigpt4_rec_rows, tmp_path / "refcoco_train.json"
        path.write_text(json.dumps(records))
        if change.get("bbox") == [2, 0, 1, 2] or "split" in change:
            return  # in this form: one pixel wide; there is none
    stream = rows(tmp_path)
    next(stream)
    with pytest.raises(ValueError, match=message) as error:
        next(stream)
    assert f"{path}: {'line 2' if source == 'shikra_rec' else 'record 1'}" in str(error.value)
    problems = Problems(skip=True)
    assert len(list(rows(tmp_path, problems=problems))) == 2
    assert problems.counts.total() == 2 and "there is no 'bbox'" in problems.examples[1]
    if "leaves the folder" in message:
        with pytest.raises(ValueError, match=message):  # where the pictures are not opened, too
            list(rows(tmp_path, images=False))


def test_refcocos_with_and_without_a_target(data_dir, tmp_path):
    root = data_dir / "refcocos"
    records = json.loads((root / "refcocos_in_stock.json").read_bytes())
    rows = list(checked_rows("refcocos", root=root, images=data_dir / "coco_val2017_subset", evaluation=True))
    assert len(rows) == len(records) == 13
    assert Counter(row["task"] for row in rows) == {"refer": 10, "no_target": 3}
    for row, record in zip(rows, records, strict=True):
        assert row["boxes"] == ([] if record["solution"] is None else [record["solution"]])
        assert phrase_of(row) == record["normal_caption"] and row["image_id"] == str(int(record["file_name"][:12]))
        assert row["image"]["path"].endswith(record["image"]) and row["split"] == "test"
    assert rows[2]["messages"][1]["content"] == "There is no person outside the middle window."
    (tmp_path / "refcocos.json").write_text(json.dumps([records[0] | {"solution": None}]))
    with pytest.raises(ValueError, match="record 0: solution is None, but empty_case is False"):
        list(refcocos_rows(tmp_path, images=False))


# ---- ReasonSeg -------------------------------------------------------------------------------------------------------


def square(x0, y0, x1, y1) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


def shape(label: str, points, kind: str = "polygon") -> dict:
    return {"label": label, "labels": [label], "shape_type": kind, "points": points, "group_id": None, "flags": {}}


@pytest.fixture
def reasonseg(data_dir, tmp_path):
    """The two original files with blank pictures of a size that holds their polygons."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for path in (data_dir / "reasonseg" / split).glob("*.json"):
            (tmp_path / split / path.name).write_bytes(path.read_bytes())
            points = np.concatenate([s["points"] for s in json.loads(path.read_bytes())["shapes"]])
            size = tuple(int(side) for side in np.ceil(points.max(0)) + 20)
            Image.new("L", size).save(tmp_path / split / f"{path.stem}.jpg")
    return tmp_path


def test_original_files_give_a_row_per_text(reasonseg):
    for split, count in (("train", 6), ("val", 1)):
        (path,) = (reasonseg / split).glob("*.json")
        record = json.loads(path.read_bytes())
        rows = list(reasonseg_rows(reasonseg, split=split, evaluation=True))
        assert len(rows) == len(record["text"]) == count
        width, height = Image.open(path.with_suffix(".jpg")).size
        polygon = np.ravel(record["shapes"][0]["points"]).tolist()
        expected = coco_mask.decode(coco_mask.frPyObjects([polygon], height, width))[..., 0]
        ys, xs = np.nonzero(expected)
        for row, text in zip(rows, record["text"], strict=True):
            validate_row(row)
            assert text in row["messages"][0]["content"] and row["task"] == "reasoning" and row["ignore"] is None
            assert np.array_equal(decode_rle(row["masks"][0]), expected)
            assert row["boxes"] == [[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]]
            assert row["messages"][1]["content"].count("<vis>") == 1
        trained = list(reasonseg_rows(reasonseg, split=split))
        assert [row["masks"] for row in trained] == [row["masks"] for row in rows] and "ignore" not in trained[0]
        if split == "val":  # a phrase, not a question
            assert rows[0]["messages"][0]["content"] == f"<image>Find {record['text'][0]}."
        same = list(reasonseg_rows(reasonseg, split=split, annotations=[path], evaluation=True, images=False))
        assert [row["masks"] for row in same] == [row["masks"] for row in rows] and same[0]["image"] is None


def test_large_shapes_are_painted_first():
    inner, outer, ignored = square(6, 6, 9, 9), square(2, 2, 12, 12), square(5, 5, 10, 10)
    shapes = [shape("target", inner), shape("ignore", ignored), shape("flag", [[0, 0], [1, 1]]), shape("target", outer)]
    target, ignore = target_and_ignore(shapes, 20, 15)
    expected = np.zeros((15, 20), dtype=int)
    expected[2:12, 2:12], expected[5:10, 5:10], expected[6:9, 6:9] = 1, 2, 1
    assert np.array_equal(target, expected == 1) and np.array_equal(ignore, expected == 2)
    target, ignore = target_and_ignore([shape("target", outer), shape("ignore", outer)], 20, 15)
    assert target.sum() == 100 and not ignore.any()  # of the same area: the first


def test_ignored_regions_flags_and_old_encodings(tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (20, 15)).save(tmp_path / "val/a.jpg")
    shapes = [
        shape("target", square(2, 2, 12, 12)),
        shape("ignore", square(10, 2, 16, 12)),
        shape("flag", [[0, 0]] * 2),
    ]
    record = {"text": ["What is the café’s sign"], "is_sentence": True, "shapes": shapes}
    (tmp_path / "val/a.json").write_bytes(json.dumps(record, ensure_ascii=False).encode("cp1252"))
    problems = Problems()
    (row,) = reasonseg_rows(tmp_path, split="validation", evaluation=True, problems=problems)
    assert "café’s sign. Show" in row["messages"][0]["content"] and row["split"] == "val"
    assert row["ignore"]["size"] == [15, 20] and decode_rle(row["ignore"]).sum() == 60
    assert decode_rle(row["masks"][0]).sum() == 80 and row["boxes"] == [[2, 2, 10, 12]]
    assert problems.counts == {"flag shape": 1}
    with zipfile.ZipFile(tmp_path / "test.zip", "w") as archive:
        archive.write(tmp_path / "val/a.json", "test/a.json")
    (packed,) = reasonseg_rows(tmp_path, split="test", images=tmp_path / "val")
    assert packed["masks"] == row["masks"]
    (tmp_path / "val/a.jpg").unlink()
    with pytest.raises(ValueError, match="a.json: the image's size is in no"):
        list(reasonseg_rows(tmp_path, split="val", images=False))
    with pytest.raises(ValueError, match="no json files of split 'train'"):
        list(reasonseg_rows(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": [shape("ignore", square(1, 1, 5, 5))]}, "no pixel is target"),
        ({"shapes": [shape("thing", square(1, 1, 5, 5))]}, "'thing', expected"),
        ({"shapes": [shape("target", square(1, 1, 5, 5), "circle")]}, "circle 'target'"),
        ({"shapes": [shape("target", [[1, 1], [5, 5]])]}, "2 points"),
        ({"shapes": [shape("target", [[1, 1], [5, 5], [3, "2"]])]}, "is not \\[x, y\\]"),
        ({"shapes": [shape("target", square(1, 1, 50, 5))]}, "outside the 20 x 15 image"),
        ({"shapes": [shape("target", square(1, 1, 10**400, 5))]}, "outside the 20 x 15 image"),
        ({"shapes": [shape("target", square(1, 1, float("nan"), 5))]}, "outside the 20 x 15 image"),
        ({"shapes": {}}, "'shapes' is"),
        ({"text": [" "]}, "expected a text"),
        ({"text": 3}, "'text' is"),
        ({"is_sentence": "yes"}, "is_sentence is"),
    ],
)
def test_bad_reasonseg_files_are_one_error_or_counted(tmp_path, change, message):
    good = {"text": ["the thing"], "is_sentence": False, "shapes": [shape("target", square(1, 1, 5, 5))]}
    (tmp_path / "train").mkdir()
    for name, content in (("a", good), ("b", good | change), ("c", good)):
        Image.new("RGB", (20, 15)).save(tmp_path / f"train/{name}.jpg")
        (tmp_path / f"train/{name}.json").write_text(json.dumps(content))
    (tmp_path / "train/d.json").write_text(json.dumps(good)[:-9])
    stream = reasonseg_rows(tmp_path)
    with pytest.raises(ValueError, match=f"b.json: .*{message}"):
        list(islice(stream, 2))
    problems = Problems(skip=True)
    assert [row["image_id"] for row in reasonseg_rows(tmp_path, problems=problems)] == ["a", "c"]
    assert problems.counts.total() == 2 and "d.json: truncated" in problems.examples[1]
