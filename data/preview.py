"""Looking at a prepared folder: a few rows of every task, drawn with their questions and answers."""

from pathlib import Path

from PIL import Image, ImageDraw
from pyarrow import parquet

from perceptiongpt.configuration_perceptiongpt import IMAGE_TOKEN, PHRASE_END_TOKEN, PHRASE_START_TOKEN, VIS_TOKEN
from perceptiongpt.data.schema import decode_rle, describe_row, row_images, row_slots
from perceptiongpt.data.sources import prepared_files
from perceptiongpt.drawing import draw_objects
from perceptiongpt.geometry_perceptiongpt import tight_box
from perceptiongpt.images_perceptiongpt import read_image


UNKNOWN_SIZE = (640, 480)  # pixels of the grey image that is drawn where the size is unknown, too


def preview_rows(root: str | Path, split: str, count: int) -> list[dict]:
    """`count` rows of a prepared split (all, if it has fewer), evenly spread over the tasks and over the files."""
    files = prepared_files(root, split)
    places, tasks = [], {}
    for file in files:
        for index, task in enumerate(parquet.read_table(file, columns=["task"])["task"].to_pylist()):
            tasks.setdefault(task, []).append(len(places))
            places.append((file, index))
    chosen, left = {}, count
    # The smallest first: what a task lacks of its share goes to the others.
    for done, task in enumerate(sorted(tasks, key=lambda task: (len(tasks[task]), task))):
        found = tasks[task]
        share = min(-(-left // (len(tasks) - done)), len(found))
        chosen[task] = [found[(2 * i + 1) * len(found) // (2 * share)] for i in range(share)]
        left -= share
    rows = []
    for file, index in (places[place] for task in sorted(chosen) for place in chosen[task]):
        content = parquet.ParquetFile(file)
        for group in range(content.num_row_groups):
            size = content.metadata.row_group(group).num_rows
            if index < size:
                rows += content.read_row_group(group).slice(index, 1).to_pylist()
                break
            index -= size
    return rows


def draw_row(row: dict):
    """A row's (first) image with its boxes and masks, numbered as in the conversation below it.

    Without an image at hand they are drawn on grey.
    """
    stored = row_images(row)[0]
    if stored is None:
        size = (row["width"], row["height"]) if row["width"] else UNKNOWN_SIZE
        image = Image.new("RGB", size, "#B0B0B0")
    else:
        image = read_image(stored, describe_row(row))
    lines, number = [], 0
    for message in row["messages"]:
        first, *others = message["content"].replace(IMAGE_TOKEN, "").split(VIS_TOKEN)
        for other in others:
            number += 1
            first += f"[{number}]{other}"
        first = first.replace(PHRASE_START_TOKEN, "").replace(PHRASE_END_TOKEN, " ")
        lines.append(f"{'Q' if message['role'] == 'user' else 'A'}: {first}")
    objects = []
    radius = max(image.size) / 100
    for number, slot in enumerate(row_slots(row), 1):
        box, mask, point = slot.get("box"), slot.get("mask"), slot.get("point")
        if point is not None:
            disc = [point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius]
            ImageDraw.Draw(image).ellipse(disc, fill="red", outline="white")
        if box is None:
            box = disc if mask is None else tight_box(decode_rle(mask))
        objects.append({"box": box, "mask": mask, "phrase": f"[{number}]", "score": None})
    return draw_objects(image, {"objects": objects}, caption=f"{row['task']} | " + " | ".join(lines))
