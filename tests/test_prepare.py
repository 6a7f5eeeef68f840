"""data/prepare.py and data/sources.py: what shards hold, stops at any moment, refusals, the sheet, the command line."""

import hashlib
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image
from pyarrow import parquet

from drawn_rows import drawn_rows
from perceptiongpt.data import prepare as preparing
from perceptiongpt.data.formats import coco
from perceptiongpt.data.formats.coco import load_coco
from perceptiongpt.data.prepare import prepare, read_summary
from perceptiongpt.data.preview import draw_row, preview_rows
from perceptiongpt.data.schema import row_features
from perceptiongpt.data.sources import (
    COMMON_ARGUMENTS,
    SOURCES,
    default_split,
    load_source,
    prepared_files,
    rows,
    source_arguments,
    source_help,
)


@pytest.fixture
def source(monkeypatch, tmp_path):
    """Lets `prepare("drawn", ..)` read a list of rows, whose pictures are files; the test may change the list."""
    found = drawn_rows(4)
    for row in found:
        path = tmp_path / f"{row['image_id']}.png"
        if not path.exists():
            row["image"].save(path)
        row["image"] = {"path": str(path), "bytes": None}

    def read(name, split, problems, images=None, **arguments):
        for row in found:
            if row is None:
                problems.report("drawn: record", "is broken")
            else:
                yield row | {"split": split} | ({"image": None} if images is False else {})

    monkeypatch.setattr(preparing, "raw_rows", read)
    monkeypatch.setattr(preparing, "default_split", lambda name: "train")
    return found


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_shards_hold_the_rows(source, tmp_path):
    output = tmp_path / "out"
    summary = prepare("drawn", output, split="train", rows_per_shard=6)
    assert [path.name for path in sorted(output.glob("*.parquet"))] == [
        f"train-{index:05d}-of-00004.parquet" for index in range(4)
    ]
    prepare("drawn", output, split="testA", pictures="embed", rows_per_shard=50)
    data = load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert set(data) == {"train", "testA"} and data["train"].features == row_features()
    for split in data:
        assert len(data[split]) == len(source)
        for row, expected in zip(data[split], source, strict=True):
            with Image.open(expected["image"]["path"]) as picture:
                assert row["image"].tobytes() == picture.convert("RGB").tobytes()
            assert {key: value for key, value in row.items() if key != "image"} == {
                **{key: value for key, value in expected.items() if key != "image"},
                "split": split,
            }
    stored = parquet.read_table(output / "testA-00000-of-00001.parquet")["image"][0].as_py()
    assert stored["bytes"] == Path(source[0]["image"]["path"]).read_bytes() and stored["path"] == "0.png"
    assert (summary["rows"], summary["images"], summary["shards"], summary["clipped"]) == (20, 4, 4, 0)
    assert summary["tasks"]["refer"] == {"rows": 12, "boxes": 8, "masks": 8, "points": 0}
    assert summary["tasks"]["dialogue"] == {"rows": 4, "boxes": 16, "masks": 12, "points": 0}
    assert read_summary(output)["train"] == summary


def test_stopped_at_every_step_gives_the_same_bytes(source, tmp_path, monkeypatch):
    arguments = {"rows_per_shard": 6, "pictures": "embed"}
    prepare("drawn", tmp_path / "whole", **arguments)
    expected = contents(tmp_path / "whole")
    replace = os.replace

    class Killed(BaseException):
        pass

    steps = 0
    while True:
        steps += 1
        left = steps

        def stops(*paths):
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            replace(*paths)

        output = tmp_path / f"stopped_{steps}"
        with monkeypatch.context() as patch:
            patch.setattr(preparing.os, "replace", stops)
            killed = False
            try:
                prepare("drawn", output, **arguments)
            except Killed:
                killed = True
        if not killed:
            break
        prepare("drawn", output, **arguments)
        assert contents(output) == expected
    assert steps > 12  # settings, four shards and their reports, summary, four names, card, summary


def test_finished_shards_are_kept_unless_the_source_changed(source, tmp_path, monkeypatch):
    written = []
    write = preparing._write_shard
    monkeypatch.setattr(preparing, "_write_shard", lambda *arguments: written.append(arguments[2]) or write(*arguments))
    good = source[15]
    source[15] = {**good, "boxes": [[0, 0, 10**6, 9]]}
    with pytest.raises(ValueError, match="row 15 .*outside"):
        prepare("drawn", tmp_path / "out", rows_per_shard=6)
    assert written == [0, 6, 12]
    source[15] = good
    source[2] = {**source[2], "image_id": "other"}
    prepare("drawn", tmp_path / "out", rows_per_shard=6)
    assert written == [0, 6, 12, 0, 12, 18]
    prepare("drawn", tmp_path / "out", rows_per_shard=6)  # done: nothing is read again
    assert len(written) == 6
    with pytest.raises(ValueError, match="rows_per_shard=6 .now 7.*another output"):
        prepare("drawn", tmp_path / "out", rows_per_shard=7)


def test_a_command_that_was_wrong_binds_nobody(source, tmp_path):
    """Until a shard is finished other settings are taken; and a bad record may be skipped with what is finished."""
    source[10] = {**source[10], "boxes": [[0, 0, 10**6, 9]]}
    with pytest.raises(ValueError, match="row 10 .*outside"):
        prepare("drawn", tmp_path / "out", rows_per_shard=20)
    with pytest.raises(ValueError, match="row 10 .*outside"):
        prepare("drawn", tmp_path / "out", rows_per_shard=4)
    with pytest.raises(ValueError, match="rows_per_shard=4 .now 6"):
        prepare("drawn", tmp_path / "out", rows_per_shard=6)
    with pytest.raises(ValueError, match="pictures='path' .now 'embed'"):
        prepare("drawn", tmp_path / "out", rows_per_shard=4, on_error="skip", pictures="embed")
    prepare("drawn", tmp_path / "out", rows_per_shard=4, on_error="skip")
    prepare("drawn", tmp_path / "fresh", rows_per_shard=4, on_error="skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert read_summary(tmp_path / "out")["train"]["rows"] == 19
    with pytest.raises(ValueError, match="on_error='skip' .now 'raise'"):
        prepare("drawn", tmp_path / "out", rows_per_shard=4)


def test_names_of_splits(source, tmp_path):
    for split, rows_per_shard in (("test-dev", 6), ("test", 20)):
        with pytest.raises(ValueError, match=f"holds no {split}-"):
            prepared_files(tmp_path / "out", split)
        prepare("drawn", tmp_path / "out", split=split, rows_per_shard=rows_per_shard, pictures="embed")
    assert [len(prepared_files(tmp_path / "out", split)) for split in ("test", "test-dev")] == [1, 4]
    data = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in data.items()} == {"test": 20, "test_dev": 20}
    for split in ("../x", "a/b", "", ".x"):
        with pytest.raises(ValueError, match="cannot be a file's name"):
            prepare("drawn", tmp_path / "new", split=split)
    with pytest.raises(ValueError, match="limit 0 must be at least 1"):
        prepare("drawn", tmp_path / "new", limit=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        prepare("drawn", tmp_path / "file/out")
    assert not (tmp_path / "new").exists()


def test_bad_records_raise_or_are_counted_and_listed(source, tmp_path):
    source[3] = None
    source[8] = {**source[8], "boxes": source[8]["boxes"][:1]}
    source[11] = {**source[11], "width": 1000}
    source[19] = {**source[19], "image": {"path": str(tmp_path / "gone.png"), "bytes": None}}
    (tmp_path / "cut.png").write_bytes(Path(source[0]["image"]["path"]).read_bytes()[:60])
    source[16] = {**source[16], "image": {"path": str(tmp_path / "cut.png"), "bytes": None}}
    with pytest.raises(ValueError, match="drawn: record: is broken"):
        prepare("drawn", tmp_path / "raise")
    summary = prepare("drawn", tmp_path / "skip", on_error="skip", rows_per_shard=4)
    assert summary["rows"] == 15
    assert summary["left_out"] == {"broken record": 1, "image not found": 1, "row breaks the schema": 3}
    listed = "\n".join(summary["examples"])
    assert all(text in listed for text in ("is broken", "row 7", "row 10", "1000 x", "gone.png", "cut.png"))
    with pytest.raises(ValueError, match="on_error 'ignore'"):
        prepare("drawn", tmp_path / "no", on_error="ignore")
    source[:] = [None]
    with pytest.raises(ValueError, match="gives no rows.*1 x broken record, such as: .*is broken"):
        prepare("drawn", tmp_path / "none", on_error="skip")


def test_few_examples_of_each_reason_are_printed(source, tmp_path, capsys):
    for index in range(9):
        source[index] = {**source[index], "image": {"path": str(tmp_path / "gone.png"), "bytes": None}}
    source[11] = {**source[11], "width": 1000}
    summary = prepare("drawn", tmp_path / "out", on_error="skip")
    assert len(summary["examples"]) == 10
    preparing.print_summary("train", summary)
    printed = capsys.readouterr().out
    assert printed.count("gone.png: there is no such image") == preparing.EXAMPLES_PRINTED
    assert "9 x image not found" in printed and "the annotations say 1000 x" in printed


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (3, [1, 2]), (5, [1, 4]), (7, [1, 6]), (20, [1, 12])])
def test_a_task_of_few_rows_leaves_its_share_to_the_others(source, tmp_path, count, expected):
    refer = [row for row in source if row["task"] == "refer"]
    other = next(row for row in source if row["task"] == "dialogue")
    source[:] = [*refer[:6], other, *refer[6:]]
    prepare("drawn", tmp_path / "out", rows_per_shard=5)
    found = [row["task"] for row in preview_rows(tmp_path / "out", "train", count)]
    assert [found.count(task) for task in ("dialogue", "refer") if task in found] == expected


def test_rows_without_pictures(source, tmp_path):
    for row in source:
        Path(row["image"]["path"]).unlink(missing_ok=True)
    summary = prepare("drawn", tmp_path / "out", pictures="none")
    assert summary["rows"] == 20
    assert load_source("parquet", root=tmp_path / "out")[0]["image"] is None
    (row,) = preview_rows(tmp_path / "out", "train", 1)
    assert draw_row(row).width >= 400
    no_size = row | {"messages": row["messages"][:1], "boxes": [], "masks": [], "width": 0, "height": 0}
    assert draw_row(no_size).width >= 400


@pytest.mark.slow
def test_several_processes_and_a_killed_one(tmp_path, data_dir):
    """The command itself, on real annotations, killed with all its processes left to find out for themselves."""
    command = [sys.executable, "-m", "perceptiongpt.data.prepare", "coco", "--root", str(data_dir / "tiny_coco")]
    command += ["--rows_per_shard", "20", "--embed_images"]
    subprocess.run([*command, "--output", str(tmp_path / "whole")], check=True, timeout=300)
    expected = {name: value for name, value in contents(tmp_path / "whole").items()}
    output = tmp_path / "killed"
    kills = 0
    for wait in (1, 3, 5):
        process = subprocess.Popen([*command, "--output", str(output), "--num_proc", "2"])
        shards = len(list((output / ".train").glob("*.json")))
        while process.poll() is None and len(list((output / ".train").glob("*.json"))) < shards + 1 + wait:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run([*command, "--output", str(output), "--num_proc", "2"], check=True, timeout=300)
    assert kills == 3 and contents(output) == expected


def test_command_line_on_real_photos(data_dir, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    arguments = ["coco", "--root", str(data_dir / "tiny_coco"), "--output", str(output), "--limit", "6"]
    arguments += ["--tasks", "refer", "detect", "box_to_mask", "--min_area_share", "0.02", "--preview", "4"]
    preparing.main([*arguments, "--embed_images"])
    printed = capsys.readouterr().out
    assert "refer" in printed and "left out" in printed and "preview-train.png" in printed
    with Image.open(output / "preview-train.png") as sheet:
        assert sheet.format == "PNG" and sheet.width == 4 * 512
    expected = load_coco(
        data_dir / "tiny_coco/annotations/instances_train2017.json",
        data_dir / "tiny_coco/train2017",
        tasks=("refer", "detect", "box_to_mask"),
        min_area_share=0.02,
        limit=6,
    )
    found = load_source("parquet", root=output)
    assert len(found) == len(expected) and found.remove_columns("image")[:] == expected.remove_columns("image")[:]
    assert json.loads((output / "summary.json").read_text())["train"]["rows"] == len(expected)

    uploads = []

    class FakeApi:
        def create_repo(self, *args, **kwargs):
            uploads.append((args, kwargs))

        def upload_folder(self, **kwargs):
            uploads.append(kwargs)

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    preparing.main([*arguments[:-2], "--embed_images", "--push_to_hub", "me/mine"])
    assert uploads[0][0] == ("me/mine",) and uploads[1]["folder_path"] == str(output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco", "--push_to_hub", "me/mine"], "needs --embed_images"),
        (["coco", "--no_images", "--embed_images"], "exclude each other"),
        (["refer", "--min_area_share", "1"], "unrecognized"),
        (["nothing"], "invalid choice"),
        (["refer"], "needs a root: the folder with the files of that data set, or annotations"),
    ],
)
def test_wrong_command_lines(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        preparing.main([*arguments, "--output", str(tmp_path / "out")])
    assert message in capsys.readouterr().err + str(stop.value)


@pytest.mark.parametrize("name", SOURCES)
def test_help_says_what_a_source_takes(name, capsys):
    with pytest.raises(SystemExit) as stop:
        preparing.main([name, "--help"])
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split("the source " + name)[-1].split())
    assert f"Default: {default_split(name)}." in words
    assert (
        " root: " in words
        and "split" in words
        and f"Default: {default_split(name)}." in words
        and "as in `" not in words
        and "_TASKS" not in words
    )
    for argument in source_arguments(name):
        assert argument in ("split", "problems") or source_help(name)[1].get(argument), argument


def test_docstrings_that_name_each_other(monkeypatch):
    def one_rows(root):
        """One, as `two_rows`, `one_rows` and `other_rows`."""

    def two_rows(root):
        """Two, as `one_rows`.

        Args:
            root: a folder with
                files.
        """

    for function in (one_rows, two_rows):
        monkeypatch.setattr(sys.modules[__name__], function.__name__, function, raising=False)
    monkeypatch.setattr("perceptiongpt.data.sources.source_function", lambda name: one_rows)
    assert source_help("one")[1] == {"root": "a folder with files."}


def test_options_of_several_words(monkeypatch):
    def own(*words):
        return preparing.read_command_line(["--output", "out", *words]).own

    pairs = ["phrase=answer", "image=photo"]
    assert own("hub", "--columns", *pairs, "--name", "a b") == {"columns": pairs, "name": "a b"}
    assert own("hub", "--columns", " ".join(pairs)) == {"columns": pairs}
    assert own("hub", "--columns", "{image: photo}") == {"columns": {"image": "photo"}}
    assert own("scenes", "--kinds", "plain", "--size", "64") == {"kinds": ["plain"], "size": 64}
    assert own("coco", "--image_ids", "9", "25") == own("coco", "--image_ids", "[9, 25]") == {"image_ids": [9, 25]}


def test_every_source_has_the_common_arguments():
    for name in SOURCES:
        found = source_arguments(name)
        assert set(COMMON_ARGUMENTS) <= set(found), name
        keywords = [argument for argument in found.values() if argument.name != "root"]
        assert all(argument.kind is inspect.Parameter.KEYWORD_ONLY for argument in keywords), name
    with pytest.raises(ValueError, match="none of coco"):
        source_arguments("cocoo")
    with pytest.raises(ValueError, match="takes no rot"):
        next(rows("coco", rot="x"))


def test_coco_by_its_usual_folders_and_with_bad_records_left_out(data_dir, tmp_path):
    import perceptiongpt.data.reading as reading

    root = data_dir / "tiny_coco"
    by_root = list(rows("coco", root=root, limit=3))
    files = {"annotations": [root / "annotations/instances_train2017.json"], "images": root / "train2017"}
    assert by_root == list(rows("coco", **files, limit=3))
    without = list(rows("coco", root=root, limit=3, images=False))
    assert [{**row, "image": None} for row in by_root] == without

    content = json.loads(files["annotations"][0].read_bytes())
    content["annotations"][0]["image_id"] = -1
    content["annotations"][1]["bbox"] = [0, 0, 10**6, 4]
    del content["images"][2]["width"]
    broken = tmp_path / "instances.json"
    broken.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks"):
        list(rows("coco", annotations=[broken], images=root / "train2017"))
    problems = reading.Problems(skip=True)
    found = list(rows("coco", annotations=[broken], images=root / "train2017", problems=problems))
    gone = str(content["images"][2]["id"])
    assert found and gone not in {row["image_id"] for row in found}
    assert problems.counts["broken record"] >= 3 and any("lacks ['width']" in text for text in problems.examples)


def test_what_each_task_leaves_out_is_counted(data_dir, tmp_path, capsys):
    arguments = ["--root", str(data_dir / "tiny_coco"), "--output", str(tmp_path), "--min_area_share", "0.02"]
    preparing.main(["coco", *arguments, "--tasks", "refer", "detect", "box_to_mask", "--limit", "12"])
    tasks = json.loads((tmp_path / "summary.json").read_text())["train"]["tasks"]
    small, alone = coco.TOO_SMALL, coco.NO_EXPRESSION
    assert tasks["box_to_mask"]["left_out"].keys() == {small} and tasks["refer"]["left_out"].keys() >= {small, alone}
    instances = [tasks["box_to_mask"]["rows"] + tasks["box_to_mask"]["left_out"][small]]
    instances.append(tasks["refer"]["rows"] + sum(tasks["refer"]["left_out"].values()))
    assert instances[0] == instances[1] > tasks["refer"]["rows"]
    assert f"no row of refer: {tasks['refer']['left_out'][alone]} x {alone}" in capsys.readouterr().out


def test_annotations_alone_are_enough(data_dir):
    file = data_dir / "pope" / "coco_pope_random.json"
    assert len(list(rows("pope", annotations=file, images=False, limit=3))) == 3


def test_a_test_set_is_not_called_train(data_dir, tmp_path, capsys):
    preparing.main(["pope", "--root", str(data_dir / "pope"), "--output", str(tmp_path), "--no_images", "--limit", "2"])
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == ["test-00000-of-00001.parquet"]
    with pytest.raises(SystemExit):
        preparing.main(["pope", "--help"])
    assert "Default: test." in capsys.readouterr().out


def test_prepared_files_are_whole(tmp_path):
    with pytest.raises(ValueError, match="no other split.*data.prepare"):
        prepared_files(tmp_path)
    for name in ("val-00000-of-00001.parquet", "test-dev-00000-of-00001.parquet", "mine-all.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds no train-\*.parquet \(there are the splits mine, test-dev, val\)"):
        prepared_files(tmp_path)
    (tmp_path / "train-00001-of-00002.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="not whole"):
        prepared_files(tmp_path)
