"""Sources with boxes and masks: Flickr30k Entities, Shikra's lines, Visual Genome, panoptic, LVIS, captions."""

import gzip
import json
import re
import tarfile
import tracemalloc
import zipfile
from collections import Counter, defaultdict
from pathlib import PurePosixPath
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from perceptiongpt.data.formats.coco import COCO_TASKS
from perceptiongpt.data.formats.coco_captions import coco_captions_rows
from perceptiongpt.data.formats.coco_panoptic import coco_panoptic_rows, plain_name
from perceptiongpt.data.formats.flickr30k_entities import flickr30k_entities_rows
from perceptiongpt.data.formats.lvis import lvis_rows
from perceptiongpt.data.formats.shikra_flickr import shikra_flickr_rows
from perceptiongpt.data.formats.visual_genome import visual_genome_rows
from perceptiongpt.data.reading import Problems
from perceptiongpt.data.schema import DIRECT_TASKS, TASKS, decode_rle, validate_row


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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---- Flickr30k Entities ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flickr_files(data_dir):
    """{picture: {"xml", "txt"}} of the packed val split, read here by other means."""
    files = defaultdict(dict)
    with tarfile.open(data_dir / "flickr30k_entities/Flickr30kEntities_val.tar.xz") as archive:
        for entry in archive:
            name, _, kind = PurePosixPath(entry.name).name.rpartition(".")
            files[name][kind] = archive.extractfile(entry).read().decode()
    return files


def test_flickr_val_has_14433_phrases_with_boxes(data_dir, flickr_files):
    rows = checked(
        flickr30k_entities_rows(
            data_dir / "flickr30k_entities",
            split="val",
            annotations=[data_dir / "flickr30k_entities/Flickr30kEntities_val.tar.xz"],
            images=False,
            tasks=["spotting_caption"],
            evaluation=True,
        )
    )
    phrases, expected = 0, {}
    for name, files in flickr_files.items():
        boxes = defaultdict(list)
        for element in ElementTree.fromstring(files["xml"]).iter("object"):
            if element.find("bndbox") is not None:
                for chain in element.findall("name"):
                    boxes[chain.text].append([float(value.text) - 1 for value in element.find("bndbox")])
        for line in files["txt"].splitlines():
            chains = re.findall(r"\[/EN#(\d+)/", line)
            phrases += sum(chain in boxes for chain in chains)
            wanted = [sorted(boxes[chain], key=lambda box: box[:2]) for chain in chains if chain in boxes]
            if wanted:
                plain = re.sub(r"\[/EN#\S+ ([^]]*)\]", r"\1", line).strip()
                expected[name, plain] = [box for group in wanted for box in group]
    assert len(flickr_files) == 1000 and phrases == 14433
    assert sum(text.count("<p>") for row in rows for text in texts(row)) == 14433
    found = {(row["image_id"], re.sub(r"</?p>|<vis>", "", texts(row)[1])): row["boxes"] for row in rows}
    assert found == expected


def test_flickr_folders_with_pictures(data_dir):
    rows = checked(flickr30k_entities_rows(data_dir / "flickr30k_entities", split="train"))
    assert len({row["image_id"] for row in rows}) == 14
    count = Counter(row["task"] for row in rows)
    assert count["caption"] == 70 and count["dialogue"] == 14 and min(count.values()) > 0
    poker = [row for row in rows if row["image_id"] == "36979"]
    assert texts(of_task(poker, "caption")[0])[1].endswith(
        "A group of friends playing cards and trying to bluff each other into making a terrible mistake ."
    )
    first = of_task(poker, "spotting_caption")[0]
    assert re.search(r"<p>A group of friends</p>(<vis>){5} playing <p>cards</p><vis> and trying", texts(first)[1])
    assert first["boxes"][0] == [1.0, 69.0, 174.0, 371.0]
    for row in of_task(rows, "dialogue"):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(texts(row)) // 2)
    problems = Problems()
    list(flickr30k_entities_rows(data_dir / "flickr30k_entities", split="train", problems=problems))
    assert problems.counts == {"on the split's list, but without annotations": 29783 - 14}
    with pytest.raises(ValueError, match="no list testA.txt"):
        list(flickr30k_entities_rows(data_dir / "flickr30k_entities", split="testA"))


XML = """<annotation><size><width>100</width><height>80</height><depth>3</depth></size>
<object><name>7</name><name>8</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>80</ymax></bndbox></object>
<object><name>7</name><bndbox><xmin>0</xmin><ymin>11</ymin><xmax>21</xmax><ymax>31</ymax></bndbox></object>
<object><name>9</name><scene>1</scene><nobndbox>0</nobndbox></object></annotation>"""
SENTENCES = "[/EN#7/people/other Two men] near [/EN#8/scene a wall] , [/EN#9/scene outside] [/EN#0/notvisual it] .\n"


@pytest.fixture
def flickr_folder(tmp_path):
    """A function that writes one picture's files, changed, packed as asked, and reads them."""

    def read(xml=XML, sentences=SENTENCES, packed=False, **arguments):
        files = {"Annotations/5.xml": xml, "Sentences/5.txt": sentences}
        if packed:
            with zipfile.ZipFile(tmp_path / "annotations.zip", "w") as archive:
                for name, content in files.items():
                    archive.writestr(name, content)
        else:
            for name, content in files.items():
                write(tmp_path / name, content)
        write(tmp_path / "val.txt", "5\n")
        return list(flickr30k_entities_rows(tmp_path, split="val", images=False, evaluation=True, **arguments))

    return read


def test_flickr_chains_and_boxes(flickr_folder):
    rows = flickr_folder()
    caption = of_task(rows, "spotting_caption")[0]
    assert texts(caption)[1] == "<p>Two men</p><vis><vis> near <p>a wall</p><vis> , outside it ."
    assert caption["boxes"] == [[-1.0, 10.0, 20.0, 30.0], [0.0, 0.0, 99.0, 79.0], [0.0, 0.0, 99.0, 79.0]]
    assert validate_row(caption, with_images=False)[0]["boxes"][0] == [0.0, 10.0, 20.0, 30.0]
    assert [texts(row) for row in of_task(rows, "refer")] == [
        ["<image>Find two men.", "<vis><vis>"],
        ["<image>Find a wall.", "<vis>"],
    ]
    assert texts(of_task(rows, "region_caption")[0])[1] == "a wall"


def test_flickr_captions_end_where_lines_end(flickr_folder):
    rows = flickr_folder(sentences="[/EN#7/people/other/tall Two\x85men] stand .\nThey\u2028wait .\n")
    assert [texts(row)[1] for row in of_task(rows, "caption")] == ["Two men stand .", "They wait ."]


def test_flickr_captions_that_do_not_describe_their_picture_are_counted(flickr_folder, tmp_path):
    (tmp_path / "UNRELATED_CAPTIONS").write_text("# image caption\n5 2\n6 1\n")
    problems = Problems()
    rows = flickr_folder(sentences="Two men .\nA joke .\n", leave_out_unrelated=True, problems=problems)
    assert [texts(row)[1] for row in of_task(rows, "caption")] == ["Two men ."]
    assert problems.counts == {"caption listed in UNRELATED_CAPTIONS": 1}


def test_flickr_packed_is_the_same(flickr_folder, tmp_path):
    packed = flickr_folder(packed=True)
    assert not (tmp_path / "Annotations").exists() and packed == flickr_folder()


def test_flickr_same_words_for_two_things_are_not_asked_for(flickr_folder):
    rows = flickr_folder(sentences="[/EN#7/people A man] and [/EN#8/people a man] .\n")
    assert len(of_task(rows, "spotting_caption")) == 1 and not of_task(rows, "refer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xml": XML[:200]}, "image 5: truncated or broken xml"),
        ({"xml": XML.replace("<xmax>21<", "<xmax>103<")}, "image 5: box of chain 7, less 1,.* outside"),
        ({"xml": XML.replace("<xmax>21<", "<xmax>0<")}, "has no area"),
        ({"xml": XML.replace("<xmax>21<", "<xmax>wide<")}, "bndbox/xmax is 'wide', expected a whole number"),
        ({"xml": XML.replace("<name>9</name>", "")}, "names \\[\\], expected numbers"),
        ({"xml": "<!DOCTYPE a [<!ENTITY b 'c'>]>" + XML}, "defines entities"),
        ({"sentences": "[/EN#7/people Two men near a wall .\n"}, "sentence 1: a phrase is not"),
        ({"sentences": "Look at <vis> .\n"}, "contains '<vis>'"),
        ({"sentences": "[/EN#7/people Two <p> men] .\n"}, "contains '<p>'"),
        ({"sentences": "\n"}, "no sentences"),
    ],
)
def test_flickr_broken_files(flickr_folder, change, message):
    with pytest.raises(ValueError, match=message):
        flickr_folder(**change)
    problems = Problems(skip=True)
    assert flickr_folder(**change, problems=problems) == [] and sum(problems.counts.values()) == 1


# ---- Shikra's lines --------------------------------------------------------------------------------------------------


def test_shikra_gives_what_the_original_gives(data_dir, tmp_path):
    original = of_task(flickr30k_entities_rows(data_dir / "flickr30k_entities", evaluation=True), "spotting_caption")
    lines = []
    for number, row in enumerate(original):
        boxes, groups = list(row["boxes"]), []
        for marks in re.findall(r"</p>((?:<vis>)+)", texts(row)[1]):
            start = sum(map(len, groups))
            groups.append(list(range(start, start + len(marks) // 5))[::-1])
        sentence = re.sub(r"(<vis>)+", "", texts(row)[1]).replace("<p>", "<ph_st>").replace("</p>", "<ph_ed>")
        record = {"id": number, "image_id": int(row["image_id"]), "boxes": boxes, "sentence": sentence}
        lines.append(json.dumps({**record, "boxes_seq": groups}))
    (tmp_path / "CWB_flickr30k_train.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    images = data_dir / "flickr30k_entities/flickr30k-images"
    rows = checked(shikra_flickr_rows(tmp_path, images=images, evaluation=True))
    for row, same in zip(original, of_task(rows, "spotting_caption"), strict=True):
        assert {**row, "source": "shikra_flickr"} == same
    assert len(of_task(rows, "caption")) == len(lines)


SHIKRA = {"id": 0, "image_id": 5, "boxes": [[1, 2, 30, 40], [5.5, 6, 7, 8]], "width": 50, "height": 50}
SHIKRA |= {"sentence": "<ph_st>A man<ph_ed>, in <ph_st>rain<ph_ed>.", "boxes_seq": [[0, 1], []]}
REASONED = {"img_path": "9.jpg", "boxes": [[1, 2, 30, 40], [5, 6, 7, 8]], "width": 50, "height": 50}
REASONED |= {
    "question": "Is <ph_st>he<ph_ed> tall?",
    "question_boxes_seq": [[1]],
    "answer": "Yes.",
    "answer_boxes_seq": [[0]],
}
REASONED |= {"cot_with_ans": "Beside <ph_st>the tree<ph_ed>, yes."}


def read_shikra(tmp_path, record, **arguments):
    file = write(tmp_path / "lines.jsonl", json.dumps(record) + "\n")
    return list(shikra_flickr_rows(tmp_path, annotations=[file], images=False, evaluation=True, **arguments))


def test_shikra_captions_and_reasoning(tmp_path):
    rows = read_shikra(tmp_path, SHIKRA)
    assert texts(rows[0])[1] == "<p>A man</p><vis><vis>, in rain."
    assert rows[0]["boxes"] == [[1.0, 2.0, 30.0, 40.0], [5.5, 6.0, 7.0, 8.0]]
    (row,) = checked(read_shikra(tmp_path, REASONED))
    assert row["task"] == "grounded_vqa" and row["boxes"] == [[5.0, 6.0, 7.0, 8.0], [1.0, 2.0, 30.0, 40.0]]
    assert texts(row)[0].startswith("<image>Is <p>he</p><vis> tall? ") and row["image_id"] == "9"
    assert texts(row)[1] == "Beside <p>the tree</p><vis>, yes."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes_seq": [[0, 2], []]}, "line 1: boxes_seq\\[0\\] is \\[0, 2\\], expected numbers of the 2 boxes"),
        ({"boxes_seq": [[0]]}, "2 phrases in 'sentence', but 'boxes_seq' is"),
        ({"sentence": "<ph_ed>A man<ph_st>"}, "do not pair up"),
        ({"sentence": "<ph_st>A <vis><ph_ed>"}, "contains '<vis>'"),
        ({"boxes": [[1, 2, 60, 40], [5, 6, 7, 8]]}, "outside the 50 x 50 image"),
        ({"boxes": "none"}, "'boxes' is 'none', expected list"),
        ({"width": None}, "'width' is 'None', expected int"),
    ],
)
def test_shikra_broken_lines(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_shikra(tmp_path, {**SHIKRA, **change})


def test_shikra_needs_sizes(tmp_path):
    record = {key: value for key, value in SHIKRA.items() if key not in ("width", "height")}
    with pytest.raises(ValueError, match="size is in no annotation file"):
        read_shikra(tmp_path, record)


# ---- Visual Genome ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def genome(data_dir):
    """The json content of the Visual Genome fragments by kind."""
    contents = {}
    for name in ("region_descriptions", "objects", "question_answers"):
        (path,) = (data_dir / "visual_genome").glob(f"{name}*.zip")
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member.endswith(".json"):
                    contents[PurePosixPath(member).name.removesuffix(".json")] = json.loads(archive.read(member))
    return contents


def test_visual_genome_agrees_with_the_files(data_dir, genome):
    rows = checked(visual_genome_rows(data_dir / "visual_genome", images=False, evaluation=True))
    regions = [region for image in genome["region_descriptions"] for region in image["regions"]]
    captions = of_task(rows, "region_caption")
    assert len(captions) == len(regions) == 1278
    for region, row in zip(regions, captions, strict=True):
        x, y = region["x"], region["y"]
        assert texts(row)[1] == " ".join(region["phrase"].split()) and row["image_id"] == str(region["image_id"])
        assert row["boxes"] == [[x, y, x + region["width"], y + region["height"]]]
    assert any(region["phrase"] != region["phrase"].strip() for region in regions)
    names = Counter(
        (image["image_id"], one["names"][0].strip()) for image in genome["objects"] for one in image["objects"]
    )
    assert len(of_task(rows, "detect")) == len(names)
    questions = [question for image in genome["question_answers"] for question in image["qas"]]
    assert [texts(row)[1] for row in of_task(rows, "vqa")] == [" ".join(q["answer"].split()) for q in questions]
    sizes = {str(image["image_id"]): (image["width"], image["height"]) for image in genome["image_data"]}
    assert all((row["width"], row["height"]) == sizes[row["image_id"]] for row in rows)
    for row in of_task(rows, "dialogue"):
        assert 2 <= len(row["boxes"]) == len(texts(row)) // 2 <= 4
    phrases = Counter(
        (region["image_id"], " ".join(region["phrase"].lower().split()).rstrip(". ")) for region in regions
    )
    singles = sum(count == 1 for count in phrases.values())
    assert len(of_task(rows, "refer")) == singles + sum(
        len({tuple(one[k] for k in "xywh") for one in image["objects"] if one["names"][0].strip() == name}) == 1
        for image in genome["objects"]
        for name in {one["names"][0].strip() for one in image["objects"]}
    )


def test_visual_genome_versions_give_the_same_rows(genome, tmp_path):
    def renamed(entry, names):
        return {names.get(key, key): value for key, value in entry.items()}

    new, old = tmp_path / "v1_2", tmp_path / "v1_0"
    regions, objects = genome["region_descriptions"], genome["objects"]
    for folder in (new, old):
        write(folder / "image_data.json", genome["image_data"])
    write(new / "region_descriptions.json", regions)
    write(new / "objects_v1_2.json", objects)
    old_regions = [
        {"id": one["id"], "regions": [renamed(r, {"region_id": "id", "image_id": "image"}) for r in one["regions"]]}
        for one in regions
    ]
    old_objects = [
        {"id": one["image_id"], "objects": [renamed(o, {"object_id": "id"}) for o in one["objects"]]} for one in objects
    ]
    (old / "region_descriptions.json.gz").write_bytes(gzip.compress(json.dumps(old_regions).encode()))
    with zipfile.ZipFile(old / "objects.json.zip", "w") as archive:
        archive.writestr("objects.json", json.dumps(old_objects))
    assert list(visual_genome_rows(new, images=False)) == list(visual_genome_rows(old, images=False))


def small_genome(folder, qas=(), regions=(), **image):
    region = {"region_id": 1, "image_id": 3, "phrase": "A red cup. ", "x": 2, "y": 3, "width": 10, "height": 20}
    write(folder / "image_data.json", [{"image_id": 3, "url": "", "width": 100, "height": 50, "coco_id": 9} | image])
    write(
        folder / "region_descriptions.json", [{"id": 3, "regions": [region, *({**region, **one} for one in regions)]}]
    )
    if qas:
        write(folder / "question_answers.json", [{"id": 3, "qas": list(qas)}])
    return folder


def test_visual_genome_questions_with_objects(tmp_path):
    cup = {"object_id": 8, "names": ["cup"], "x": 1, "y": 2, "w": 10, "h": 20}
    wall = {"object_id": 9, "names": ["wall"], "x": 0, "y": 0, "w": 100, "h": 50}
    question = {"qa_id": 5, "image_id": 3, "question": "What stands there?", "answer": "A Cup.", "q_objects": []}
    other = {**question, "qa_id": 6, "question": "Where is the cup?", "answer": "Outside.", "q_objects": [cup]}
    folder = small_genome(tmp_path, [{**question, "a_objects": [cup]}, {**other, "a_objects": [wall]}])
    rows = checked(visual_genome_rows(folder, images=False, evaluation=True))
    first, second = of_task(rows, "grounded_vqa")
    assert texts(first)[1] == "A <p>Cup</p><vis>." and first["boxes"] == [[1, 2, 11, 22]]
    assert texts(second)[1] == "<p>wall</p><vis>: Outside." and second["boxes"] == [[0, 0, 100, 50]]
    (region,) = of_task(rows, "region_vqa")
    assert texts(region)[0].startswith("<image>Look at <vis>. Where is the cup?") and texts(region)[1] == "Outside."


def test_visual_genome_bad_regions_are_skipped_alone(tmp_path):
    bad = [{"x": 95}, {"phrase": "  "}, {"phrase": "a <image>"}, {"height": 0}, {"y": "3"}]
    good = {"region_id": 2, "phrase": "a red cup"}
    folder = small_genome(tmp_path, regions=[*bad, good])
    problems = Problems(skip=True)
    rows = list(visual_genome_rows(folder, images=False, problems=problems))
    assert problems.counts == {"broken record": 5}
    # Both say "a red cup": neither can be asked for.
    assert Counter(row["task"] for row in rows) == {"region_caption": 2}
    for message, region in zip(
        ("outside", "expected a text", "'<image>'", "no area", "expected int"), bad, strict=True
    ):
        with pytest.raises(ValueError, match=f"record 0, image 3: .*{message}"):
            list(visual_genome_rows(small_genome(tmp_path, regions=[region]), images=False))


def test_of_two_versions_of_visual_genome_none_is_chosen_silently(tmp_path):
    folder = small_genome(tmp_path)
    other = folder / "region_descriptions_v1.2.json"
    other.write_bytes((folder / "region_descriptions.json").read_bytes())
    with pytest.raises(ValueError, match="holds region_descriptions.json, region_descriptions_v1.2.json; say with"):
        list(visual_genome_rows(folder, images=False))
    files = [other, folder / "image_data.json"]
    assert len(list(visual_genome_rows(folder, annotations=files, images=False, tasks=["refer"]))) == 1


def test_visual_genome_questions_with_broken_objects(tmp_path):
    question = {"qa_id": 5, "image_id": 3, "question": "What?", "answer": "A cup.", "q_objects": 7, "a_objects": []}
    with pytest.raises(ValueError, match="record 0, image 3: the objects of question 5 are 7, expected a list"):
        list(visual_genome_rows(small_genome(tmp_path, [question]), images=False))


def test_visual_genome_packed_together_and_truncated(genome, tmp_path):
    folder, packed = tmp_path / "plain", tmp_path / "packed.tar.gz"
    for name, content in genome.items():
        write(folder / f"{name}.json", content)
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, "visual_genome")
    rows = list(visual_genome_rows(folder, images=False))
    assert list(visual_genome_rows(tmp_path, annotations=[packed], images=False)) == rows
    whole = (folder / "region_descriptions.json").read_text()
    (folder / "region_descriptions.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="region_descriptions.json: item \\d: .*truncated"):
        list(visual_genome_rows(folder, images=False))
    problems = Problems(skip=True)
    kept = list(visual_genome_rows(folder, images=False, problems=problems))
    assert problems.counts == {"truncated or broken file": 1}
    assert 0 < len(of_task(kept, "region_caption")) < len(of_task(rows, "region_caption"))
    assert of_task(kept, "vqa") == of_task(rows, "vqa")


def test_visual_genome_files_splits_and_pictures(tmp_path):
    folder = small_genome(tmp_path)
    splits = write(tmp_path / "splits.json", {"train": [1, 2], "val": [3]})
    assert list(visual_genome_rows(folder, split="train", images=False, split_file=splits)) == []
    assert len(list(visual_genome_rows(folder, split="val", images=False, split_file=splits))) == 2
    with pytest.raises(ValueError, match="unknown tasks \\['vqa'\\]"):
        list(visual_genome_rows(folder, tasks=["vqa"], images=False))
    with pytest.raises(ValueError, match="no Visual Genome file"):
        list(visual_genome_rows(folder / "image_data.json", images=False))
    with pytest.raises(ValueError, match="expected one with a key of regions"):
        list(visual_genome_rows(folder, annotations=[write(tmp_path / "a.json", [{"x": 1}])], images=False))
    with pytest.raises(ValueError, match="image '3.*' is not in"):
        list(visual_genome_rows(folder))
    (folder / "VG_100K_2").mkdir()
    Image.new("RGB", (100, 50)).save(folder / "VG_100K_2/3.jpg")
    assert checked(visual_genome_rows(folder))[0]["image"]["path"].endswith("VG_100K_2/3.jpg")
    with pytest.raises(ValueError, match="is 100 x 50 pixels, the annotations say 90 x 50"):
        list(visual_genome_rows(small_genome(tmp_path, width=90)))


def test_visual_genome_memory_is_flat(tmp_path):
    def peak(images: int) -> int:
        region = {"region_id": 1, "image_id": 1, "phrase": "a cup", "x": 1, "y": 1, "width": 5, "height": 5}
        regions = ",".join(json.dumps({"id": i, "regions": [region] * 2, "note": "x" * 30000}) for i in range(images))
        folder = tmp_path / str(images)
        write(folder / "region_descriptions.json", f"[{regions}]")
        write(folder / "image_data.json", [{"image_id": i, "url": "", "width": 9, "height": 9} for i in range(images)])
        tracemalloc.start()
        count = sum(1 for _ in visual_genome_rows(folder, images=False, tasks=["refer"]))
        assert count == 0  # the phrase is always the same
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(400) < peak(100) * 1.2 + 500_000


# ---- COCO panoptic ---------------------------------------------------------------------------------------------------


def test_panoptic_agrees_with_the_pngs(data_dir):
    folder = data_dir / "coco_val2017_subset"
    rows = checked(coco_panoptic_rows(folder, split="val"))
    content = json.loads((folder / "panoptic_val2017.json").read_text())
    expected, classes = Counter(), {one["id"]: one["name"] for one in content["categories"]}
    for annotation in content["annotations"]:
        colors = np.asarray(Image.open(folder / "panoptic_val2017" / annotation["file_name"])).astype(int)
        ids = colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]
        for segment in annotation["segments_info"]:
            if not segment["iscrowd"]:
                mask = ids == segment["id"]
                assert mask.sum() == segment["area"]
                x, y, w, h = segment["bbox"]
                expected[str(annotation["image_id"]), mask.tobytes(), (x, y, x + w, y + h)] += 1
    found = Counter()
    for row in of_task(rows, "box_to_mask"):
        assert row["boxes"][0] == row["boxes"][1]
        found[row["image_id"], decode_rle(row["masks"][1]).astype(bool).tobytes(), tuple(row["boxes"][1])] += 1
    assert found == expected and len(content["annotations"]) == 15
    assert len(of_task(rows, "region_caption")) == sum(expected.values())
    forms = {
        (box is None, mask is None)
        for row in of_task(rows, "region_caption")
        for box, mask in zip(row["boxes"], row["masks"])
    }
    assert forms == {(True, False), (False, True), (False, False)}
    present = defaultdict(set)
    for annotation in content["annotations"]:
        present[str(annotation["image_id"])] |= {classes[one["category_id"]] for one in annotation["segments_info"]}
    for row in of_task(rows, "no_target"):
        name = texts(row)[1].removeprefix("There is no ").removesuffix(".")
        assert name in set(classes.values()) - present[row["image_id"]]
    assert len(of_task(rows, "spotting_caption")) == len(of_task(rows, "no_target")) == 15
    assert all(row["task"] not in DIRECT_TASKS or set(texts(row)[-1]) for row in rows)
    known = coco_panoptic_rows(folder, split="val", tasks=["region_caption"], evaluation=True)
    assert all(row["boxes"] == [None] for row in known)


def test_panoptic_names():
    names = {"wall-brick": "brick wall", "sky-other-merged": "sky", "door-stuff": "door", "tree-merged": "tree"}
    names |= {"window-blind": "window blind", "traffic light": "traffic light"}
    assert {name: plain_name(name) for name in names} == names


def small_panoptic(folder, **segment):
    ids = np.zeros((20, 30, 3), np.uint8)
    ids[5:10, 5:15] = (1, 2, 3)
    masks = folder / "annotations/panoptic_train2017"
    masks.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(masks / "7.png")
    segment = {"id": 1 + 2 * 256 + 3 * 65536, "category_id": 1, "iscrowd": 0, "bbox": [5, 5, 10, 5]} | segment
    content = {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 30, "height": 20}],
        "annotations": [{"image_id": 7, "file_name": "7.png", "segments_info": [segment]}],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "wall-wood", "isthing": 0}],
    }
    write(folder / "annotations/panoptic_train2017.json", content)
    return coco_panoptic_rows(folder, images=False)


def test_panoptic_zip_and_broken_files(tmp_path):
    rows = checked(small_panoptic(tmp_path))
    assert Counter(row["task"] for row in rows)["refer"] == 1 and "no_target" not in {row["task"] for row in rows}
    with zipfile.ZipFile(tmp_path / "pngs.zip", "w") as archive:
        archive.write(tmp_path / "annotations/panoptic_train2017/7.png", "panoptic_train2017/7.png")
    assert list(coco_panoptic_rows(tmp_path, images=False, masks=tmp_path / "pngs.zip")) == rows
    opened = []
    with pytest.MonkeyPatch.context() as patch:
        real = zipfile.ZipFile
        patch.setattr(zipfile, "ZipFile", lambda path, *mode: opened.append(path) or real(path, *mode))
        content = json.loads((tmp_path / "annotations/panoptic_train2017.json").read_text())
        twice = write(tmp_path / "twice.json", {**content, "annotations": content["annotations"] * 2})
        assert len(list(coco_panoptic_rows(tmp_path, annotations=[twice], images=False, masks=tmp_path / "pngs.zip")))
    assert len(opened) == 1  # train's zip lists 118,287 names
    for segment, message in (
        ({"id": 5}, "segment 5 has no pixel"),
        ({"category_id": 3}, "category 3, which is not listed"),
        ({"bbox": [5, 5, 50, 5]}, "outside the 30 x 20 image"),
        ({"bbox": None}, "'bbox' is 'None', expected list"),
    ):
        with pytest.raises(ValueError, match=f"annotation 0: .*{message}"):
            list(small_panoptic(tmp_path, **segment))
    assert list(small_panoptic(tmp_path, iscrowd=1)) == []
    packed = bytearray((tmp_path / "pngs.zip").read_bytes())
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        packed[packed.index(mark) + flags] |= 1  # says that the file is encrypted
    (tmp_path / "pngs.zip").write_bytes(packed)
    with pytest.raises(ValueError, match="7.png in .*pngs.zip cannot be read as an image: .*encrypted"):
        list(coco_panoptic_rows(tmp_path, images=False, masks=tmp_path / "pngs.zip"))
    (tmp_path / "annotations/panoptic_train2017/7.png").write_bytes(b"PNG")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        list(coco_panoptic_rows(tmp_path, images=False))


def test_each_panoptic_file_has_its_own_pngs(tmp_path):
    for part, name in (("a", "panoptic_train2017"), ("b", "panoptic_val2017")):
        list(small_panoptic(tmp_path / part))
        for path in (tmp_path / part / "annotations").iterdir():
            path.rename(path.with_name(path.name.replace("panoptic_train2017", name)))
    (tmp_path / "b/annotations/panoptic_val2017/7.png").unlink()
    files = [tmp_path / "a/annotations/panoptic_train2017.json", tmp_path / "b/annotations/panoptic_val2017.json"]
    assert list(coco_panoptic_rows(tmp_path, annotations=files[:1], images=False))
    with pytest.raises(ValueError, match="7.png in .*panoptic_val2017 cannot be read"):
        list(coco_panoptic_rows(tmp_path, annotations=files, images=False))


# ---- LVIS ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lvis(data_dir):
    """Instances of real photos in the form of LVIS v1."""
    content = json.loads((data_dir / "tiny_coco/annotations/instances_train2017.json").read_text())
    for image in content["images"]:
        del image["file_name"]
        present = {one["category_id"] for one in content["annotations"] if one["image_id"] == image["id"]}
        image["not_exhaustive_category_ids"] = sorted(present)[:1]
        image["neg_category_ids"] = [category for category in (2, 3, 90) if category not in present]
    content["annotations"] = [one for one in content["annotations"] if not one.pop("iscrowd")]
    for category in content["categories"]:
        category["name"] = category["name"].replace(" ", "_")
    return content


def test_lvis_says_only_what_is_known(data_dir, lvis, tmp_path):
    write(tmp_path / "lvis_v1_train.json", lvis)
    rows = checked(lvis_rows(tmp_path, images=data_dir / "tiny_coco"))
    images = {str(image["id"]): image for image in lvis["images"]}
    names = {category["name"].replace("_", " "): category["id"] for category in lvis["categories"]}
    by_image = defaultdict(Counter)
    for one in lvis["annotations"]:
        by_image[str(one["image_id"])][one["category_id"]] += 1
    count = Counter(row["task"] for row in rows)
    assert count["box_to_mask"] == count["region_caption"] == len(lvis["annotations"]) == 465
    assert count["no_target"] == 50
    assert count["detect"] == sum(len(set(by_image[i]) - set(images[i]["not_exhaustive_category_ids"])) for i in images)
    for row in of_task(rows, "no_target"):
        absent = names[texts(row)[1].removeprefix("There is no ").removesuffix(".")]
        assert absent in images[row["image_id"]]["neg_category_ids"]
    for row in rows:
        assert row["image"]["path"].endswith(f"train2017/{int(row['image_id']):012d}.jpg") and row["split"] == "train"
    evaluation = lvis_rows(tmp_path, images=False, tasks=["refer", "detect"], evaluation=True)
    for row in evaluation:
        phrase = texts(row)[0].removeprefix("<image>Find ").removeprefix("every ").rstrip(".")
        name = max((name for name in names if name in phrase), key=len)
        assert names[name] not in images[row["image_id"]]["not_exhaustive_category_ids"]


def test_lvis_broken_records(lvis, tmp_path):
    image = {**lvis["images"][0]}
    del image["neg_category_ids"]
    write(tmp_path / "lvis_v1_train.json", {**lvis, "images": [image], "annotations": []})
    with pytest.raises(ValueError, match="there is no 'neg_category_ids'"):
        list(lvis_rows(tmp_path, images=False))
    assert list(lvis_rows(tmp_path, images=False, tasks=["box_to_mask"])) == []
    write(
        tmp_path / "lvis_v1_train.json", {**lvis, "images": [{**image, "neg_category_ids": [99999]}], "annotations": []}
    )
    with pytest.raises(ValueError, match="neg_category_ids \\[99999\\] are not listed"):
        list(lvis_rows(tmp_path, images=False))
    image["neg_category_ids"] = [[2]]
    write(tmp_path / "lvis_v1_train.json", {**lvis, "images": [image], "annotations": []})
    with pytest.raises(ValueError, match="neg_category_ids is .* expected numbers of categories"):
        list(lvis_rows(tmp_path, images=False))
    with pytest.raises(ValueError, match="no lvis_v1_val.json"):
        list(lvis_rows(tmp_path, split="val"))


# ---- captions --------------------------------------------------------------------------------------------------------


def test_coco_captions(data_dir):
    rows = checked(coco_captions_rows(data_dir / "tiny_coco", evaluation=True))
    content = json.loads((data_dir / "tiny_coco/annotations/captions_train2017.json").read_text())
    expected = Counter((str(one["image_id"]), " ".join(one["caption"].split())) for one in content["annotations"])
    assert Counter((row["image_id"], texts(row)[1]) for row in rows) == expected and len(rows) == 250
    assert any(one["caption"] != one["caption"].strip() for one in content["annotations"])
    assert len(list(coco_captions_rows(data_dir / "tiny_coco", images=False, limit=3))) == 15


def test_karpathy_split(data_dir, tmp_path):
    coco = json.loads((data_dir / "tiny_coco/annotations/captions_train2017.json").read_text())
    captions = defaultdict(list)
    for one in coco["annotations"]:
        captions[one["image_id"]].append({"raw": one["caption"], "tokens": []})
    images = [
        {"filepath": "train2017", "filename": image["file_name"], "cocoid": image["id"], "split": split}
        | {"sentences": captions[image["id"]]}
        for image, split in zip(coco["images"], ["train", "restval", "val", "test", "test"])
    ]
    with zipfile.ZipFile(tmp_path / "dataset_coco.json.zip", "w") as archive:
        archive.writestr("dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
    for split, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3, 4))):
        rows = checked(coco_captions_rows(tmp_path, split=f"karpathy_{split}", images=data_dir / "tiny_coco"))
        assert list(dict.fromkeys(row["image_id"] for row in rows)) == [str(images[i]["cocoid"]) for i in numbers]
        assert len(rows) == 5 * len(numbers) and rows[0]["split"] == f"karpathy_{split}"
    files = [tmp_path / "dataset_coco.json.zip", data_dir / "tiny_coco/annotations/captions_train2017.json"]
    sized = checked(coco_captions_rows(tmp_path, split="karpathy_test", annotations=files, images=False))
    assert len(sized) == 10 and sized[0]["width"] > 0
    with pytest.raises(ValueError, match="no images of the split 'karpathy_dev'"):
        list(coco_captions_rows(tmp_path, split="karpathy_dev"))
    broken = write(tmp_path / "broken.json", {"images": [{**images[3], "cocoid": []}]})
    with pytest.raises(ValueError, match="'cocoid' is '\\[\\]', expected int"):
        list(coco_captions_rows(tmp_path, split="karpathy_test", annotations=[broken], images=False))
    flickr = {"images": [{"filename": "12.jpg", "imgid": 0, "split": "test", "sentences": [{"raw": "A cat ."}]}]}
    file = write(tmp_path / "dataset_flickr30k.json", flickr)
    (row,) = checked(coco_captions_rows(tmp_path, split="karpathy_test", annotations=[file], images=False))
    assert row["image_id"] == "12" and (row["width"], row["height"]) == (0, 0)


def test_captions_with_problems(tmp_path):
    image = {"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}
    annotations = [{"id": 4, "image_id": 1, "caption": text} for text in ("A cat.\n", "  ", "Look: <image>")]
    annotations += [{"id": 5, "image_id": 2, "caption": "A dog."}, {"id": 6, "image_id": 1}]
    file = write(tmp_path / "annotations/captions_val2014.json", {"images": [image], "annotations": annotations})
    problems = Problems(skip=True)
    rows = list(coco_captions_rows(tmp_path, split="val", images=False, evaluation=True, problems=problems))
    assert [texts(row)[1] for row in rows] == ["A cat."] and problems.counts == {"broken record": 4}
    with pytest.raises(ValueError, match="annotation record 3: belongs to image 2, which is not listed"):
        list(coco_captions_rows(tmp_path, split="val", images=False))
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ValueError, match="truncated"):
        list(coco_captions_rows(tmp_path, split="val", images=False))


def test_tasks_are_those_of_the_schema():
    from perceptiongpt.data.formats import (
        coco_panoptic,
        flickr30k_entities,
        hub,
        llava,
        lvis,
        shikra_flickr,
        viscot,
        visual_genome,
    )

    offered = [*coco_panoptic.PANOPTIC_TASKS, *flickr30k_entities.FLICKR_TASKS, *hub.HUB_TASKS, *llava.LLAVA_TASKS]
    offered += [*lvis.LVIS_TASKS, *shikra_flickr.SHIKRA_TASKS, *viscot.VISCOT_TASKS]
    offered += [task for tasks in visual_genome.TASKS.values() for task in tasks]
    assert set(offered) | set(COCO_TASKS) == set(TASKS)
