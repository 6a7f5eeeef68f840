"""Reading annotation files, packed or plain, of any size, without trusting their content.

Errors are `ValueError`s that name the file, the record, the value and what was expected. Errors in single records go
through `Problems`, so that the user can choose to stop, or to skip and count them.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from PIL import Image

from perceptiongpt.images_perceptiongpt import upright_size


PACKING_SUFFIXES = (".gz", ".gzip", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".txz", ".tbz2")
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}  # by a file's first bytes
ZIP_STARTS = (b"PK\3\4", b"PK\5\6")
TAR_NAME = re.compile(r"\.(tar(\.\w+)?|t[gx]z|tbz2)$", re.IGNORECASE)
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)
CHUNK_BYTES = 1 << 20
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 2000
COCO_NAMES = (
    "COCO_train2014_{:012d}.jpg",
    "COCO_val2014_{:012d}.jpg",
    "{:012d}.jpg",
)
COCO_FOLDERS = ("", "train2014", "val2014", "train2017", "val2017")


class MissingImage(ValueError):
    """An image that is in none of the folders searched."""


@dataclass
class Problems:
    """Bad records: the first one raises an error, or all are counted and the first few of each kind listed.

    Attributes:
        skip: count and go on instead of raising.
        keep: how many messages to list per reason.
        counts: how often each reason occurred, including those of `leave_out`.
        examples: the first messages of each reason, as "<reason>: <where>: <message>".
        by_task: per task and reason, how many rows it could not make of records that other tasks may use.
    """

    skip: bool = False
    keep: int = 20
    counts: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    by_task: dict[str, Counter] = field(default_factory=dict)

    def report(self, where: str, problem: str | ValueError, reason: str = "broken record") -> None:
        """Raise `ValueError` for a bad record, or with `skip` count it, so that the caller goes on without it.

        A `MissingImage` is always counted as "image not found".
        """
        message = str(problem).removeprefix(f"{where}: ")
        if not self.skip:
            raise ValueError(f"{where}: {message}")
        reason = "image not found" if isinstance(problem, MissingImage) else reason
        self.counts[reason] += 1
        self._list(f"{reason}: {where}: {message}")

    def _list(self, example: str) -> None:
        reason = f"{example.partition(': ')[0]}: "
        if sum(other.startswith(reason) for other in self.examples) < self.keep:
            self.examples.append(example)

    def leave_out(self, reason: str, count: int = 1) -> None:
        """Count what the format itself excludes (a crowd region, a flag); this is never an error."""
        if count:
            self.counts[reason] += count

    def leave_out_row(self, task: str, reason: str, count: int = 1) -> None:
        """Count rows that one task cannot make of an intact record."""
        if count:
            self.by_task.setdefault(task, Counter())[reason] += count

    def update(self, other: "Problems") -> None:
        """Add the counts and examples of another process or file."""
        self.counts.update(other.counts)
        for task, counts in other.by_task.items():
            self.by_task.setdefault(task, Counter()).update(counts)
        for example in other.examples:
            self._list(example)


# ---- files -----------------------------------------------------------------------------------------------------------


class _Unpacked(io.RawIOBase):
    """A binary stream whose read errors name the file; closes what it was opened from."""

    def __init__(self, path: Path, stream: BinaryIO, *owners):
        self.name, self.stream, self.owners = str(path), stream, owners

    def readable(self) -> bool:
        return True

    def _read(self, size: int) -> bytes:
        try:
            return self.stream.read(size)
        except BROKEN as error:
            raise ValueError(f"{self.name}: truncated or broken: {error}") from error

    def readall(self) -> bytes:
        return self._read(-1)

    def readinto(self, buffer) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            for owner in (self.stream, *self.owners):
                owner.close()
        super().close()


def open_file(path: str | Path, member: str = "*") -> BinaryIO:
    """Open a file for reading bytes: plain, gzip, xz, bzip2, zip and tar alike, told apart by their content.

    Args:
        path: the file.
        member: a pattern for the name (folders left away) of the one file wanted from a zip or tar.

    Raises:
        ValueError: if there is no such file, it is broken (also later, while reading), or the archive does not hold
            exactly one such member.
    """
    path = Path(path)
    owners = ()
    try:
        if is_archive(path):
            names = [name for name, _ in _members(path, member)]
            if len(names) != 1:
                raise ValueError(f"{path}: holds {len(names)} files named {member!r}, expected one: {names[:5]}")
            members = _members(path, member)
            stream, owners = next(members)[1], (members,)
        else:
            with path.open("rb") as file:
                start = file.read(max(map(len, COMPRESSIONS)))
            unpack = next((unpack for magic, unpack in COMPRESSIONS.items() if start.startswith(magic)), open)
            stream = unpack(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be opened: {error.strerror or error}") from error
    return io.BufferedReader(_Unpacked(path, stream, *owners), CHUNK_BYTES)


def open_members(path: str | Path, pattern: str = "*") -> Iterator[tuple[str, bytes]]:
    """Yield (name inside, content) of each file of a zip, a tar or a folder whose base name matches `pattern`.

    The contents are read one by one; nothing is written to disk. A folder is read in sorted order.
    """
    path = Path(path)
    if path.is_dir():
        for file in sorted(path.rglob(pattern)):
            if file.is_file():
                yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    for name, stream in _members(path, pattern):
        yield name, _Unpacked(path, stream).readall()


def is_archive(path: str | Path) -> bool:
    """Whether a file is a zip or a tar, compressed or not: by its content, and if it is damaged by its name."""
    path = Path(path)
    return path.is_file() and (is_zip(path) or is_tar(path))


def is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in ZIP_STARTS or path.name.lower().endswith(".zip")


def is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path) or TAR_NAME.search(path.name) is not None
    except BROKEN:
        return TAR_NAME.search(path.name) is not None


def plain_name(path: str | Path) -> str:
    """The name of a file without the endings that packing adds: "a.json" for "a.json.gz"."""
    name = Path(path).name
    while suffix := next((suffix for suffix in PACKING_SUFFIXES if name.lower().endswith(suffix)), None):
        name = name[: -len(suffix)]
    return name


def without_copies(paths: Iterable[Path]) -> list[Path]:
    """The files, if no two of them seem to be the same, plain and packed or in two folders.

    Raises:
        ValueError: naming both files, so that the user can choose one.
    """
    found = {}
    for path in paths:
        other = found.setdefault(plain_name(path), path)
        if other != path:
            raise ValueError(f"{other} and {path} have the same name; say with --annotations which one to read")
    return list(found.values())


def member_names(path: str | Path) -> list[str]:
    """The names of the files in a zip or tar; none for any other file."""
    path = Path(path)
    return [name for name, _ in _members(path, "*")] if is_archive(path) else []


def _members(path: Path, pattern: str) -> Iterator[tuple[str, BinaryIO]]:
    """(name, stream) per matching file of an archive, which is closed with this generator."""

    def wanted(name: str) -> bool:
        base = PurePosixPath(name).name
        return fnmatch(base, pattern) and not name.startswith("__MACOSX/") and not base.startswith("._")  # Finder's

    try:
        if is_zip(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if not entry.is_dir() and wanted(entry.filename):
                        yield entry.filename, archive.open(entry)
        else:
            with tarfile.open(path) as archive:
                for entry in archive:
                    if entry.isfile() and wanted(entry.name):
                        yield entry.name, archive.extractfile(entry)
                while archive.fileobj.read(CHUNK_BYTES):  # behind the last file: only there a cut end shows
                    pass
    except (*BROKEN, RuntimeError, NotImplementedError) as error:  # the last two: encrypted or unknown zip entries
        raise ValueError(f"{path}: cannot be read as an archive: {error}") from error


def safe_join(folder: str | Path, name: str) -> Path:
    """`folder / name`, which need not exist, for a name that an annotation file gives.

    Raises:
        ValueError: if the name is empty, too long, absolute, or climbs out with `..`.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ValueError(f"{name!r} is not a file name")
    lengths = [len(part.encode(errors="replace")) for part in PurePosixPath(name).parts]
    if max(lengths, default=0) > MAX_NAME_BYTES or sum(lengths) > MAX_PATH_BYTES:  # the system's error is no ValueError
        raise ValueError(f"file name {name[:60]!r}.. is too long")
    for flavour in (PurePosixPath(name), PureWindowsPath(name)):
        if flavour.is_absolute() or flavour.drive or flavour.root or ".." in flavour.parts:
            raise ValueError(f"file name {name!r} leaves the folder {folder}")
    # A link that lies in the folder is followed: its owner put it there (linked photos, the Hub's cache), no file name.
    return Path(folder) / name


# ---- json and pickle -------------------------------------------------------------------------------------------------


class _JsonCursor:
    """Walks through a json text that arrives in pieces; holds one value and a piece of what follows."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.name = stream, str(getattr(stream, "name", None) or getattr(stream, "raw", stream))
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.position, self.ended = "", 0, False
        self.scan = json.JSONDecoder().raw_decode

    def fail(self, message: str):
        raise ValueError(f"{self.name}: {message}")

    def more(self) -> bool:
        """Read on; at least as much as is held, so that a long value is not scanned too often."""
        if self.ended:
            return False
        rest = self.text[self.position :]
        data = self.stream.read(max(CHUNK_BYTES, len(rest)))
        self.ended = not data
        try:
            self.text, self.position = rest + self.decode(data, final=self.ended), 0
        except UnicodeDecodeError as error:
            self.fail(f"is not UTF-8 text: {error}")
        return True

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self.position = _WHITE.match(self.text, self.position).end()
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def take(self, expected: str, where: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            self.fail(f"{where}: {'the file ends' if not found else f'found {found!r}'}, expected {expected!r}")
        self.position += 1
        return found

    def value(self, where: str):
        self.peek()
        while True:
            try:
                value, end = self.scan(self.text, self.position)
                if isinstance(value, (dict, list, str)) or end + 32 < len(self.text) or self.ended:
                    self.position = end
                    return value  # (a number near the end of what is held might go on)
            except RecursionError:
                self.fail(f"{where}: nested too deeply")
            except json.JSONDecodeError as error:
                if self.ended or (error.pos + 32 < len(self.text) and not error.msg.startswith("Unterminated")):
                    place = self.text[self.position : self.position + 60]
                    self.fail(f"{where}: truncated or not json ({error.msg}): {place!r}")
            self.more()

    def items(self, where: str) -> Iterator:
        """The values of the list that starts here."""
        self.take("[", where)
        if self.peek() == "]":
            self.position += 1
            return
        index = 0
        while True:
            yield self.value(f"{where} {index}".lstrip())
            index += 1
            if self.take(",]", f"{where} after {index} items".lstrip()) == "]":
                return

    def enter(self, key: str) -> None:
        """Go to the value of `key` in the object that starts here."""
        self.take("{", f"looking for the key {key!r}")
        while self.peek() != "}":
            name = self.value(f"looking for the key {key!r}")
            self.take(":", f"after the key {name!r}")
            if name == key:
                return
            self.skip(f"key {name!r}")
            if self.take(",}", f"after the key {name!r}") == "}":
                break
        self.fail(f"there is no key {key!r}")

    def finish(self) -> None:
        """Read what follows the list unparsed, and see that the file does not end in the middle of it."""
        end = self.text[self.position :].encode().rstrip()[-1:]
        while data := self.stream.read(CHUNK_BYTES):
            end = data.rstrip()[-1:] or end
        if end != b"}":
            self.fail(f"truncated: it ends with {end.decode(errors='replace')!r} behind the list, expected '}}'")

    def skip(self, where: str) -> None:
        if self.peek() == "[":
            for _ in self.items(where):
                pass
        else:
            self.value(where)


_WHITE = re.compile(r"[ \t\r\n]*")


def stream_json_array(stream: BinaryIO, *keys: str, bare: bool = False) -> Iterator:
    """Yield the items of a list in a json file one by one; memory holds one item and a megabyte of text.

    Args:
        stream: an open binary file, as `open_file` gives it.
        keys: where the list is: none for a file that is the list, `"annotations"` for COCO, and so on.
        bare: take a file that is just the list as well, though there are keys.

    Raises:
        ValueError: naming the file and the item, where the text is broken, ends early or holds no such list.
    """
    cursor = _JsonCursor(stream)
    is_inside = bool(keys) and not (bare and cursor.peek() == "[")
    if is_inside:
        for key in keys:
            cursor.enter(key)
    if cursor.peek() != "[":
        cursor.fail(f"expected a json list{f' under {list(keys)}' if keys else ''}, found {cursor.peek()!r}")
    yield from cursor.items("item")
    if is_inside:
        cursor.finish()
    elif cursor.peek():
        cursor.fail(f"text after the end of the list: {cursor.text[cursor.position :][:40]!r}")


def until_broken(items: Iterable, path: str | Path, problems: Problems) -> Iterator:
    """The items of a file up to where it is broken; the error then goes to `problems`."""
    items = iter(items)
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except ValueError as error:
            problems.report(str(path), str(error).removeprefix(f"{path}: "), "truncated or broken file")
            return
        yield item


def read_json(path: str | Path, member: str = "*"):
    """The whole content of a json file, packed or plain."""
    with open_file(path, member) as stream:
        data = stream.read()
    try:
        return json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: truncated or not json: {error}") from error


def read_jsonl(path: str | Path, problems: Problems | None = None) -> Iterator[tuple[str, dict]]:
    """Yield ("<file>: line <n>", record) of a file with one json object a line; empty lines are passed over."""
    problems = problems or Problems()
    with open_file(path) as stream:
        for number, line in enumerate(until_broken(stream, path, problems), 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                problems.report(where, f"truncated or not json: {error}")
                continue
            if isinstance(record, dict):
                yield where, record
            else:
                problems.report(where, f"expected an object, found {str(record)[:60]}")


def read_records(path: str | Path, *keys: str, problems: Problems | None = None) -> Iterator[tuple[str, dict]]:
    """Yield ("<file>: record <n>", record) of a json list, of the list under `keys`, or of json lines alike."""
    with open_file(path) as stream:
        first = stream.peek(64).lstrip(codecs.BOM_UTF8).lstrip()[:1]
        if first == b"[" or keys:
            problems = problems or Problems()
            records = until_broken(stream_json_array(stream, *keys, bare=True), path, problems)
            for number, record in enumerate(records):
                if isinstance(record, dict):
                    yield f"{path}: record {number}", record
                else:
                    problems.report(f"{path}: record {number}", f"expected an object, found {str(record)[:60]}")
            return
    yield from read_jsonl(path, problems)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, identifier):
        raise pickle.UnpicklingError("it refers to an object outside the file")


def _as_latin1(error: UnicodeDecodeError) -> tuple[str, int]:
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error("perceptiongpt_latin1", _as_latin1)  # Python 2 strings: UTF-8 where they are, else Latin-1


def load_plain_pickle(path: str | Path, member: str = "*"):
    """Load a pickle (any protocol, Python 2 ones too) of plain lists, tuples, dicts, strings, numbers, bools, None.

    Python 2 byte strings become `str`. No function or class is ever looked up, so nothing in the file can run.

    Raises:
        ValueError: if the pickle refers to anything else, or is broken.
    """
    with open_file(path, member) as stream:
        try:
            content = _PlainUnpickler(stream, encoding="utf-8", errors="perceptiongpt_latin1").load()
        except Exception as error:  # a broken pickle raises nearly anything
            message = f"{path}: not a pickle of plain lists, dicts, strings and numbers: {error}"
            raise ValueError(message) from error
        if rest := stream.read(64).strip():
            raise ValueError(f"{path}: the pickle is followed by {rest[:20]!r}; expected the end of the file")
    seen, waiting = set(), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, tuple, dict)):
            if id(value) not in seen:
                seen.add(id(value))
                waiting += [*value, *value.values()] if isinstance(value, dict) else value
        elif value is not None and not isinstance(value, (str, int, float)):
            raise ValueError(f"{path}: the pickle holds a {type(value).__name__}; expected plain data")
    return content


# ---- images --------------------------------------------------------------------------------------------------------


def find_coco_image(folder: str | Path, image_id: int, file_name: str | None = None) -> Path:
    """A COCO image by its id, under the 2014 or the 2017 name, in `folder` or its folder of that release.

    Args:
        folder: where the images are, or where `train2014`, `train2017`, ... are.
        image_id: COCO's number.
        file_name: a further name to look for first.

    Raises:
        MissingImage: if there is none.
        ValueError: if `file_name` leaves the folder.
    """
    names = [pattern.format(int(image_id)) for pattern in COCO_NAMES]
    for sub_folder in COCO_FOLDERS:
        base = Path(folder) / sub_folder
        for name in [file_name, *names] if file_name else names:
            path = safe_join(base, name) if name is file_name else base / name
            if path.is_file():
                return path
    looked_for = f"looked for {file_name or names[0]}, {names[-1]} and others"
    raise MissingImage(f"image {image_id} is not in {folder}; {looked_for}")


def find_image(folder: str | Path, name: str) -> Path:
    """The image `name` in `folder`: under its whole name, else under the last part of it.

    Raises:
        MissingImage: if there is none.
        ValueError: if the name leaves the folder.
    """
    for candidate in (name, PurePosixPath(name).name):
        path = safe_join(folder, candidate)
        if path.is_file():
            return path
    raise MissingImage(f"image {name!r} is not in {folder}")


@lru_cache(maxsize=4096)
def image_size(path: str | Path, whole: bool = True) -> tuple[int, int]:
    """(width, height) of an image, upright as `datasets` opens it; `whole` also checks that it is not truncated.

    Raises:
        MissingImage: if there is none.
        ValueError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            size = upright_size(image)
            if whole:
                image.draft(
                    "RGB", tuple(max(side // 8, 1) for side in image.size)
                )  # a JPEG is read whole, decoded small
                image.load()
    except FileNotFoundError as error:
        raise MissingImage(f"{path}: there is no such image") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
    return size
