"""Draw what the model found on its image, and put images side by side. Needs the `demo` extra (supervision)."""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from perceptiongpt.signals_perceptiongpt import SIGNALS


COLORS = "#FF3B5C #1E90FF #2ECC40 #FF9F1C #B14AED #00CFCF #F5E027 #F564E3 #A0522D #7FDBB6 #3D5AFE #C0D72F".split()
FONT_SHARE = 0.03  # of the shorter side
LEAST_FONT_SIZE = 15
LEAST_LONGER_SIDE = 512
CARD_FONT_SIZE = 16
CARD_LINES = 4
SHEET_MARGIN = 8


def _font_path() -> str:
    import matplotlib  # comes with supervision; its font knows far more letters than the one in PIL

    return str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))


def _mask_array(mask, height: int, width: int) -> np.ndarray:
    if mask is None:
        return np.zeros((height, width), dtype=bool)
    if isinstance(mask, dict):
        from pycocotools import mask as coco_mask

        mask = coco_mask.decode(mask)
    mask = np.asarray(mask, dtype=bool)
    if mask.shape != (height, width):
        raise ValueError(f"a mask of {mask.shape} cannot be drawn on an image of (height, width) = {(height, width)}.")
    return mask


def draw_objects(
    image: Image.Image,
    result: dict,
    *,
    caption: str | None = None,
    labels: Sequence[str] | None = None,
    longer_side: int | None = None,
) -> Image.Image:
    """Draw boxes, masks, points, phrases and scores on a copy of an image.

    Args:
        image: the image that was asked about.
        result: one entry of `processor.post_process_generation`. Of each of `result["objects"]` it draws `box` (xyxy,
            pixels of `image`), `mask` (bool array of shape `(height, width)`, COCO RLE, or None), `point` (xy, pixels
            of `image`), `phrase` (an object without one gets a number) and `score` (unless None). Of each of
            `result["looks"]`, if there are any, it draws a thin white frame around `crop`.
        caption: text for a strip below the image, such as the model's answer.
        labels: text beside each object instead of its phrase and score; an empty string for no text.
        longer_side: of the drawn image, in pixels; by default the image's own, but at least 512, so that labels can be
            read.

    Returns:
        An RGB image.

    Raises:
        ValueError: a mask does not have the image's size.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
        import supervision as sv

    objects = result["objects"]
    masks = [_mask_array(found["mask"], image.height, image.width) for found in objects]
    scale = (longer_side or max(LEAST_LONGER_SIDE, *image.size)) / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    canvas = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    font_size = max(LEAST_FONT_SIZE, round(FONT_SHARE * min(size)))
    if objects:
        resized = [np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
        detections = sv.Detections(
            xyxy=np.array([found["box"] for found in objects], dtype=np.float32) * scale,
            mask=np.stack(resized),
            class_id=np.arange(len(objects)),
        )
        labels = labels or [
            f"{found['phrase'] or f'object {number}'}" + ("" if found["score"] is None else f" {found['score']:.2f}")
            for number, found in enumerate(objects, 1)
        ]
        has_label = np.array([bool(label) for label in labels])
        palette = sv.ColorPalette.from_hex(COLORS)
        # Black letters on light colours, white ones on dark.
        light = [0.299 * color.r + 0.587 * color.g + 0.114 * color.b > 140 for color in palette.colors]
        text_palette = sv.ColorPalette.from_hex(["#000000" if is_light else "#FFFFFF" for is_light in light])
        annotators = [
            sv.MaskAnnotator(palette, opacity=0.45),
            sv.BoxAnnotator(palette, thickness=max(2, font_size // 7)),
        ]
        for annotator in annotators:
            canvas = annotator.annotate(canvas, detections)
        canvas = sv.RichLabelAnnotator(
            palette,
            text_color=text_palette,
            font_path=_font_path(),
            font_size=font_size,
            text_padding=max(2, font_size // 5),
            smart_position=True,
            max_line_length=max(8, int(size[0] / (0.65 * font_size))),
        ).annotate(canvas, detections[has_label], [label for label in labels if label])
        dots = [name for name, signal in SIGNALS.items() if signal.drawn_as == "dot"]
        for index, found in enumerate(objects):
            for x, y in (np.array(found[name]) * scale for name in dots if found.get(name) is not None):
                radius = font_size / 3
                ImageDraw.Draw(canvas).ellipse(
                    (x - radius, y - radius, x + radius, y + radius),
                    fill=palette.by_idx(index).as_rgb(),
                    outline="white",
                    width=max(1, font_size // 10),
                )
    for look in result.get("looks", ()):
        if look["crop"] is not None:
            left, top, right, bottom = (side * scale for side in look["crop"])
            for inset, color in ((0, "black"), (1, "white"), (2, "black")):
                frame = (left + inset, top + inset, right - 1 - inset, bottom - 1 - inset)
                ImageDraw.Draw(canvas).rectangle(frame, outline=color)
    return _with_caption(canvas, caption, font_size) if caption else canvas


def _with_caption(image: Image.Image, caption: str, font_size: int) -> Image.Image:
    font = ImageFont.truetype(_font_path(), font_size)
    margin = font_size // 2
    text = textwrap.fill(caption, max(8, int((image.width - 2 * margin) / (0.6 * font_size))))
    bottom = ImageDraw.Draw(image).multiline_textbbox((margin, margin), text, font=font)[3]
    canvas = Image.new("RGB", (image.width, image.height + int(bottom) + margin), "white")
    canvas.paste(image)
    ImageDraw.Draw(canvas).multiline_text((margin, image.height + margin), text, font=font, fill="black")
    return canvas


def card(image: Image.Image, title: str, text: str, width: int) -> Image.Image:
    """An image between its title and at most `CARD_LINES` lines of text, on white.

    Args:
        image: an image no wider than `width`.
        title, text: the words above and below it, cut where they do not fit.
        width: of the card, in pixels.
    """
    font = ImageFont.truetype(_font_path(), CARD_FONT_SIZE)
    line, letters = CARD_FONT_SIZE * 5 // 4, int(width / (0.6 * CARD_FONT_SIZE))
    lines = textwrap.wrap(text, letters, max_lines=CARD_LINES, placeholder=" ...")
    canvas = Image.new("RGB", (width, image.height + line * (1 + len(lines)) + line // 2), "white")
    drawing = ImageDraw.Draw(canvas)
    drawing.text((width // 2, line // 2), title, font=font, fill="black", anchor="mm")
    canvas.paste(image, ((width - image.width) // 2, line))
    for number, words in enumerate(lines):
        drawing.text((0, line * (1.75 + number) + image.height), words, font=font, fill="black", anchor="lm")
    return canvas


def contact_sheet(
    images: Sequence[Image.Image], columns: int, path: str | Path, *, cell: int = 480, max_bytes: int = 200_000
) -> Path:
    """Save images side by side as one JPEG or PNG of at most `max_bytes` bytes.

    Each is shrunk to fit a square cell; a row is as high as its highest image.

    Args:
        images: the images, in reading order.
        columns: cells in a row.
        path: file to write, ending in .jpg or .png.
        cell: side of a cell in pixels, its margin included.
        max_bytes: first a JPEG's quality, then the sheet's size is reduced until the file is no larger.

    Returns:
        `path`.

    Raises:
        ValueError: there are no images.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image.")
    columns = min(columns, len(images))
    inside = cell - SHEET_MARGIN
    small = [image.convert("RGB") for image in images]
    for image in small:
        image.thumbnail((inside, inside))
    rows = [small[start : start + columns] for start in range(0, len(small), columns)]
    heights = [max(image.height for image in row) + SHEET_MARGIN for row in rows]
    sheet = Image.new("RGB", (columns * cell, sum(heights)), "white")
    for number, row in enumerate(rows):
        for column, image in enumerate(row):
            left, top = column * cell + (cell - image.width) // 2, sum(heights[:number]) + SHEET_MARGIN // 2
            sheet.paste(image, (left, top))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    quality, is_png = 90, path.suffix.lower() == ".png"
    while True:
        sheet.save(path, **({} if is_png else {"quality": quality}), optimize=True)
        if path.stat().st_size <= max_bytes or min(sheet.size) < 64:
            return path
        if quality > 60 and not is_png:
            quality -= 10
        else:
            sheet = sheet.resize((sheet.width * 4 // 5, sheet.height * 4 // 5), Image.Resampling.LANCZOS)
