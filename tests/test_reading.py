"""Reading annotation files: packed, large, broken and hostile ones."""

import bz2
import gzip
import io
import json
import os
import pickle
import tarfile
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
from PIL import Image

from perceptiongpt.data import reading
from perceptiongpt.data.conversation import usual_files
from perceptiongpt.data.reading import (
    MissingImage,
    Problems,
    find_coco_image,
    find_image,
    image_size,
    load_plain_pickle,
    open_file,
    open_members,
    plain_name,
    read_json,
    read_jsonl,
    read_records,
    safe_join,
    stream_json_array,
)


CONTENT = json.dumps([{"id": i, "text": "é" * i} for i in range(5)]).encode()


def pack(folder: Path, name: str, content: bytes = CONTENT, members=("inside/a.json",)) -> Path:
    path = folder / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in members:
                archive.writestr(member, content)
            archive.writestr("__MACOSX/inside/._a.json", b"x")
    elif ".tar" in name:
        with tarfile.open(path, f"w:{name.rsplit('.', 1)[1]}") as archive:
            for member in members:
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    else:
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.zip", "a.tar.xz", "a.tar.gz"])
def test_packed_and_plain_files_read_alike(tmp_path, name):
    path = pack(tmp_path, name)
    assert read_json(path) == json.loads(CONTENT)
    with open_file(path) as stream:
        assert list(stream_json_array(stream)) == json.loads(CONTENT)
    assert [record for _, record in read_records(path)] == json.loads(CONTENT)
    whole = path.read_bytes()
    for cut in (len(whole) // 3, 8):  # also behind the last file of an archive
        path.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=name):
            read_json(path)


@pytest.mark.parametrize("packed", ["a.json.gz", "a.zip", "a.tar.xz", "a.tar.gz"])
@pytest.mark.parametrize("name", ["a.json.gzip", "a.json", "download"])
def test_packing_is_known_by_the_content(tmp_path, packed, name):
    path = pack(tmp_path, packed).rename(tmp_path / name)
    assert read_json(path) == json.loads(CONTENT)


def test_bzip2_and_what_is_not_packed_at_all(tmp_path):
    (tmp_path / "a.json").write_bytes(bz2.compress(CONTENT))
    (tmp_path / "b.json.gz").write_bytes(CONTENT)  # as browsers store a download that they have unpacked
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "b.json.gz") == json.loads(CONTENT)


def test_of_two_copies_none_is_chosen_silently(tmp_path):
    pack(tmp_path, "a.json.gz")
    assert usual_files(tmp_path, ["a.json", "b.json"]) == [tmp_path / "a.json.gz"]
    pack(tmp_path, "a.json")
    with pytest.raises(ValueError, match=r"a.json.* and .*a.json.* have the same name; say with --annotations"):
        usual_files(tmp_path, ["a.json"])
    assert [plain_name(name) for name in ("x/a.json.gzip", "a.tar.xz", "refs(unc).p", "a.JSON.GZ")] == [
        "a.json", "a", "refs(unc).p", "a.JSON"
    ]  # fmt: skip


def test_archives_of_several_files(tmp_path):
    for name in ("b.zip", "b.tar.xz"):
        path = pack(tmp_path, name, members=("x/a.json", "x/b.json", "x/c.txt"))
        assert [member for member, _ in open_members(path, "*.json")] == ["x/a.json", "x/b.json"]
        assert read_json(path, "b.json") == json.loads(CONTENT)
        with pytest.raises(ValueError, match="3 files"):
            open_file(path)
    with pytest.raises(ValueError, match="nothing.json"):
        open_file(tmp_path / "nothing.json")


# ---- json ------------------------------------------------------------------------------------------------------------


class OneByOne(io.BytesIO):
    """Gives few bytes at a time, so that every value is cut somewhere."""

    def read(self, size=-1):
        return super().read(3)


@pytest.mark.parametrize("indent", [None, 1])
def test_lists_are_streamed_whatever_stands_around_them(indent):
    items = [1, -2.5e-7, 1234567890, 'a\\"]},é\n', None, True, [], {}, [[1], {"b": "]"}], {"c": {"d": [1.0, "x"]}}]
    text = {"info": {"items": 3, "x": [1]}, "other": [{"items": [0]}, 5], "data": {"skip": "s", "items": items}, "z": 1}
    for content, keys in ((text, ("data", "items")), (items, ()), ({"items": []}, ("items",))):
        data = json.dumps(content, indent=indent, ensure_ascii=False).encode()
        expected = [] if content == {"items": []} else items
        for stream in (OneByOne(data), io.BytesIO(data), io.BytesIO(b"\xef\xbb\xbf" + data)):
            assert list(stream_json_array(stream, *keys)) == expected
    assert list(stream_json_array(io.BytesIO(b"[1, 2]"), "items", bare=True)) == [1, 2]


@pytest.mark.parametrize(
    ("text", "keys", "message"),
    [
        ('[{"a": 1}, {"a": ', (), "item 1.*truncated"),
        ('[{"a": 1}, {"a": 2}', (), "the file ends"),
        ('[{"a": 1} {"a": 2}]', (), "expected ',]'"),
        ('{"items": [1]}', (), "expected a json list"),
        ('{"items": [1]}', ("things",), "no key 'things'"),
        ('{"items": {"a": 1}}', ("items",), "expected a json list under"),
        ("[1, 2] 3", (), "after the end"),
        ('{"items": [1], "z": [2', ("items",), "truncated: it ends with '2'"),
        ('{"items": [1]', ("items",), "truncated: it ends with ''"),
        ("", (), "expected a json list"),
        ('["' + "\xff" * 3, (), "truncated"),
        ("[" * 200_000, (), "nested too deeply"),
    ],
)
def test_broken_lists_are_one_clear_error(tmp_path, text, keys, message):
    path = tmp_path / "list.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error, open_file(path) as stream:
        list(stream_json_array(stream, *keys))
    assert str(path) in str(error.value)


def test_memory_stays_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1 << 16)
    region = json.dumps({"region_id": 1, "phrase": "a dog on the left of a fence", "x": 1, "y": 2})
    path = tmp_path / "regions.json"
    path.write_text(
        '{"first": [' + ",".join([region] * 10_000) + '], "regions": [' + ",".join([region] * 10_000) + "]}"
    )
    tracemalloc.start()
    with open_file(path) as stream:
        assert sum(1 for _ in stream_json_array(stream, "regions")) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 1.4e6 and peak < 6e5


def test_a_broken_item_does_not_pull_in_the_rest_of_the_file():
    stream = io.BytesIO(b'[{"a": 1}, {"a" 2}' + b', {"a": 3}' * 1_000_000)
    with pytest.raises(ValueError, match="item 1"):
        list(stream_json_array(stream))
    assert stream.tell() < 3e6


def test_bad_lines_are_errors_or_counted(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n\n[2]\n{"a": 3}\n{"a": ')
    with pytest.raises(ValueError, match="lines.jsonl: line 3"):
        list(read_jsonl(path))
    problems = Problems(skip=True)
    assert [record["a"] for _, record in read_records(path, problems=problems)] == [1, 3]
    assert problems.counts == {"broken record": 2} and "line 5" in problems.examples[1]
    other = Problems(skip=True, keep=3, examples=["x", "y"])
    other.update(problems)
    assert other.counts == problems.counts and len(other.examples) == 4
    for _ in range(9):
        problems.report("a", MissingImage("is gone"))
    other.update(problems)
    assert other.counts == {"broken record": 4, "image not found": 9}
    of_each = [sum(text.startswith(reason) for text in other.examples) for reason in other.counts]
    assert of_each == [3, 3] and "image not found: a: is gone" in other.examples

    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    truncated = path.rename(tmp_path / "lines.jsonl.gz")
    problems = Problems(skip=True)
    list(read_jsonl(truncated, problems))
    assert problems.counts == {"truncated or broken file": 1}


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(Hostile.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_only_plain_data_comes_out_of_a_pickle(tmp_path, protocol):
    path = tmp_path / "refs(unc).p"
    plain = [{"a": [1, 2.5, None, True, "é", 2**70], "b": ("x", {})}]
    path.write_bytes(pickle.dumps(plain, protocol))
    assert load_plain_pickle(path) == plain

    Hostile.path = tmp_path / "made"
    for value in (Hostile(), [Hostile()], OrderedDict(a=1), {1, 2}, b"bytes", os.getcwd, Path("x"), 1j):
        path.write_bytes(pickle.dumps([{"a": 1}, value], protocol))
        with pytest.raises(ValueError, match="plain"):
            load_plain_pickle(path)
    assert not Hostile.path.exists()


def test_pickles_of_python_2_and_broken_ones(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9 \\xe9'\np3\nsS'id'\nL7L\nsVx\\u00e9\nI01\nsa.")
    assert load_plain_pickle(path) == [{"sent": "café é", "id": 7, "xé": True}]
    path.write_bytes(b"\x80\x02]q\x00}q\x01(U\x04sentq\x02U\x03abcq\x03u.")  # protocol 2; the dictionary is on top
    assert load_plain_pickle(path) == {"sent": "abc"}
    loop = []
    loop.append(loop)
    path.write_bytes(pickle.dumps(loop))
    assert len(load_plain_pickle(path)) == 1
    path.write_bytes(pickle.dumps([1], 0) + b"\n")
    assert load_plain_pickle(path) == [1]
    behind = pickle.dumps([1], 0) + b"cos\nsystem\n(S'x'\ntR."
    broken = (b"", b"not a pickle", pickle.dumps([{"a": 1}] * 9)[:-5])
    for content in (*broken, b"cos\nsystem\n(S'x'\ntR.", b"Pid\n.", b"\x80\x02}}U\x01aK\x01sb.", behind):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="refs.p"):
            load_plain_pickle(path)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../a.jpg", "/etc/passwd", "a/../../b.jpg", "C:\\a.jpg", "..\\a.jpg", "\\a", "", " ", "a\0b", None, 7]
    + ["a" * 300 + ".jpg", "a/" * 3000 + "b.jpg"],
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError):
        safe_join(tmp_path, name)


def test_names_in_the_working_folder_wherever_it_is(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert safe_join(".", "c.jpg").absolute() == tmp_path / name / "c.jpg"


def test_links_in_the_folder_are_followed(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir(), (outside / "more").mkdir(parents=True)
    for name in ("a.jpg", "more/b.jpg"):
        Image.new("RGB", (4, 3)).save(outside / name)
    (inside / "link.jpg").symlink_to(outside / "a.jpg")
    (inside / "folder").symlink_to(outside / "more")
    (inside / "train2017").symlink_to("..")
    for name in ("link.jpg", "folder/b.jpg", "train2017/in/link.jpg"):
        assert find_image(inside, name) == inside / name and image_size(inside / name) == (4, 3)
    for name in ("folder/../a.jpg", "../out/a.jpg", str(outside / "a.jpg")):
        with pytest.raises(ValueError, match="leaves the folder"):
            safe_join(inside, name)


def test_coco_pictures_are_found_under_either_name(tmp_path):
    for name in ("train2014/COCO_train2014_000000000009.jpg", "000000000012.jpg", "val2017/000000000025.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 3)).save(tmp_path / name)
        assert find_coco_image(tmp_path, int(name[-6:-4])) == tmp_path / name
        assert find_image(tmp_path / Path(name).parent, "elsewhere/" + Path(name).name) == tmp_path / name
    assert find_coco_image(tmp_path / "train2014", 9, "000000000009.jpg").parent.name == "train2014"
    with pytest.raises(ValueError, match="image 10 is not in"):
        find_coco_image(tmp_path, 10)
    with pytest.raises(ValueError, match="leaves"):
        find_coco_image(tmp_path, 9, "../a.jpg")
    path = tmp_path / "000000000012.jpg"
    assert image_size(path) == (4, 3)
    (tmp_path / "cut.jpg").write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut.jpg"):
        image_size(tmp_path / "cut.jpg")
