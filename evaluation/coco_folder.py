"""Finding the instances file and the images in a user's own COCO folder, however it is arranged."""

import re
from pathlib import Path

from perceptiongpt.data.reading import read_json, safe_join
from perceptiongpt.inference import InputError


SPLIT_NAMES = {"val": ("val", "valid", "validation")}  # names that users give to files and folders of a split
IMAGES_TO_LOOK_FOR = 20  # file names of the annotations, looked for in each folder
JSON_FILE = re.compile(r"\.json(\.(gz|gzip|xz|zip))?$")
DEPTHS = ("", "*/", "*/*/")


def find_coco_files(data: Path, splits: list[str], images: str | bool | None = None) -> dict:
    """Arguments of the source `coco` for a folder with an instances file, and images, up to two folders deep.

    Args:
        data: the folder.
        splits: in order of preference. A file belongs to a split if its name, or the name of a folder above it, says
            so; a single file may have any name.
        images: the folder of the images, or False for none; None: look for it below `data`.

    Raises:
        InputError: there is no such file, several fit, or the images are not there.
    """
    files = [path for depth in DEPTHS for path in sorted(data.glob(f"{depth}*")) if JSON_FILE.search(path.name)]
    instances = [path for path in files if path.name.startswith("instances")]
    instances = instances or [path for path in files if len(files) == 1 or is_instances(path)]
    if not instances:
        raise InputError(f"--data {data}: holds no COCO instances file; name it with --annotations")
    split = next((split for split in splits if any(is_named_after(path, data, split) for path in instances)), None)
    found = instances if split is None else [path for path in instances if is_named_after(path, data, split)]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(data)) for path in found)
        raise InputError(f"--data {data}: several files fit; choose one of {names} with --annotations or --split")
    if images is None:
        images = find_coco_images(data, found[0])
    return {"annotations": [str(found[0])], "images": images, "split": split or "all"}


def is_named_after(path: Path, data: Path, split: str) -> bool:
    """Whether a file below `data`, or a folder between the two, has the name of a split."""
    words = "|".join(map(re.escape, SPLIT_NAMES.get(split, (split,))))
    places = path.relative_to(data).as_posix().split(".json")[0]
    return bool(re.search(rf"(^|[/_.-])({words})(20\d\d)?($|/)", places))


def is_instances(path: Path) -> bool:
    """Whether a JSON file has the lists of a COCO instances file."""
    try:
        content = read_json(path)
    except ValueError:  # another JSON file of the user, which may be broken
        return False
    keys = ("images", "annotations", "categories")
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys)


def find_coco_images(data: Path, instances: Path) -> str:
    """The folder below `data` that holds most of the first images of an instances file; the nearest one in a tie.

    Raises:
        InputError: the file lists no images, or no folder holds any of them.
    """
    try:
        names = [str(record["file_name"]) for record in read_json(instances)["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{instances}: is not a COCO instances file with images: {error!r}") from error
    names = names[:IMAGES_TO_LOOK_FOR]
    stem = instances.name.split(".json")[0].removeprefix("instances_")
    below = [path for depth in DEPTHS[1:] for path in sorted(data.glob(depth)) if path.is_dir()]
    below.sort(key=lambda path: path.name != stem)
    found = {folder: sum(_is_image_in(folder, name) for name in names) for folder in [instances.parent, data, *below]}
    best = max(found, key=found.get)
    if not found[best]:
        raise InputError(
            f"--data {data}: none of the images {names[:3]} .. of {instances.name} is there; give --images"
        )
    return str(best)


def _is_image_in(folder: Path, name: str) -> bool:
    try:
        return safe_join(folder, name).is_file()
    except ValueError:  # a name that leads out of the folder; the reader of the records reports it
        return False
