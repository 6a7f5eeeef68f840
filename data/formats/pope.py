"""POPE (json lines: image, text, label yes or no) as rows of the schema, task `vqa`."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from perceptiongpt.data.conversation import (
    Draw,
    ImageFinder,
    Turn,
    chosen_tasks,
    clean_text,
    coco_image_id,
    each_record,
    get,
    make_row,
    usual_files,
)
from perceptiongpt.data.reading import Problems, read_records
from perceptiongpt.data.templates import render_turn


KINDS = ("random", "popular", "adversarial")


def pope_rows(
    root: str | Path,
    *,
    split: str = "test",
    annotations: Iterable[str | Path] | None = None,
    images: str | Path | bool | None = None,
    tasks: Iterable[str] | None = None,
    seed: int = 0,
    evaluation: bool = False,
    limit: int | None = None,
    problems: Problems | None = None,
) -> Iterator[dict]:
    """Yield one row per question; the answer is yes or no.

    Args:
        root: folder with `coco_pope_random.json`, `coco_pope_popular.json`, `coco_pope_adversarial.json` (any of them;
            also packed) and the images in `val2014`.
        split: one of these three kinds, or any other name for all three; POPE as a whole is a test set.
        annotations: the files, if they are elsewhere.
        images: the folder of images, or of COCO's folders of images; False: rows without images.
        tasks: `vqa`.
        seed, evaluation: seed of the drawn prompts; True: the fixed evaluation prompt.
        limit: read only the first `limit` questions of each file.
        problems: collects bad records; None: the first one raises.
    """
    chosen_tasks(tasks, ["vqa"], "pope")
    root = Path(root)
    kinds = (split,) if split in KINDS else KINDS
    files = list(annotations or usual_files(root, [f"coco_pope_{kind}.json" for kind in kinds]))
    if not files:
        raise ValueError(f"{root}: there is no coco_pope_{kinds[0]}.json; name the files as annotations")
    finder = ImageFinder(images, root, root / "images")
    draw = Draw("pope", seed, evaluation)

    def make(record) -> list[dict]:
        number, name = get(record, "question_id", of=(int, str)), get(record, "image")
        question, label = clean_text(get(record, "text"), "text"), get(record, "label")
        if label not in ("yes", "no"):
            raise ValueError(f"label is {label!r}, expected 'yes' or 'no'")
        image_id = coco_image_id(name)
        columns = finder.columns(name, coco_id=None if image_id is None else int(image_id))
        columns |= {"source": "pope", "image_id": image_id or Path(name).stem, "split": split}
        return [make_row("vqa", [Turn(*render_turn("vqa", question, label, draw(name, number, question)))], columns)]

    for path in files:
        yield from each_record(islice(read_records(path, problems=problems), limit), make, problems)
