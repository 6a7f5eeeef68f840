"""Draw what the model found on its picture, and put pictures side by side. Needs the `demo` extra (supervision)."""

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont


COLORS = "#FF3B5C #1E90FF #2ECC40 #FF9F1C #B14AED #00CFCF #F5E027 #F564E3 #A0522D #7FDBB6 #3D5AFE #C0D72F".split()
FONT_SHARE = 0.03  # of the shorter side
LEAST_FONT_SIZE = 15
LEAST_LONGER_SIDE = 512


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
        raise ValueError(f"a mask of {mask.shape} cannot be drawn on a picture of (height, width) = {(height, width)}.")
    return mask


def draw_objects(image: Image.Image, result: dict, *, caption: str | None = None) -> Image.Image:
    """Draw boxes, masks, phrases and scores on a copy of a picture.

    Args:
        image: the picture that was asked about.
        result: one entry of `processor.post_process_generation`: of each of `result["objects"]`, `box` (xyxy, pixels of
            `image`), `mask` (bool array of shape `(height, width)`, COCO RLE, or None), `phrase` (an object without
            one is called by its number) and `score` (if not None) are drawn.
        caption: text for a strip below the picture, such as the model's answer.

    Returns:
        An RGB picture. One whose longer side is below 512 pixels is enlarged first, so that labels can be read.

    Raises:
        ValueError: a mask is not of the picture's size.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OpenCV", category=UserWarning)
        import supervision as sv

    objects = result["objects"]
    masks = [_mask_array(found["mask"], image.height, image.width) for found in objects]
    scale = max(1.0, LEAST_LONGER_SIDE / max(image.size))
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
        labels = [
            f"{found['phrase'] or f'object {number}'}" + ("" if found["score"] is None else f" {found['score']:.2f}")
            for number, found in enumerate(objects, 1)
        ]
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
        ).annotate(canvas, detections, labels)
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


def contact_sheet(
    images: Sequence[Image.Image], columns: int, path: str | Path, *, cell: int = 480, max_bytes: int = 200_000
) -> Path:
    """Save pictures side by side, each shrunk to fit a square cell, as one JPEG or PNG of at most `max_bytes` bytes.

    Args:
        images: the pictures, in reading order.
        columns: cells in a row.
        path: file to write, ending in .jpg or .png.
        cell: side of a cell in pixels.
        max_bytes: a JPEG's quality, then the size of the sheet, goes down until the file is no larger.

    Returns:
        `path`.

    Raises:
        ValueError: no pictures.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture.")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * cell), "white")
    for index, image in enumerate(images):
        small = image.convert("RGB")
        small.thumbnail((cell - 8, cell - 8))
        left, top = index % columns * cell, index // columns * cell
        sheet.paste(small, (left + (cell - small.width) // 2, top + (cell - small.height) // 2))
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
