"""Answers and regions drawn on an image, each object in the colour of its phrase."""

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from .session import Session, view_scale


COLORS = "#FF3B5C #1E90FF #2ECC40 #FF9F1C #B14AED #00CFCF #F5E027 #F564E3 #A0522D #7FDBB6 #3D5AFE #C0D72F".split()
GIVEN_COLOR = "#FFFFFF"  # of the user's box and mask, on a dark edge
GIVEN_EDGE = "#202020"
DARK_TEXT_ABOVE = 140  # luma of a colour, 0..255
MASK_OPACITY = 0.45


def object_colors(objects: list[dict]) -> list[str]:
    """A colour per object; those of one phrase share theirs."""
    keys = [found["span"] if found["span"] else index for index, found in enumerate(objects)]
    order = list(dict.fromkeys(keys))
    return [COLORS[order.index(key) % len(COLORS)] for key in keys]


def text_color(color: str) -> str:
    """Black or white, whichever can be read on a colour."""
    red, green, blue = ImageColor.getrgb(color)
    return "#000000" if 0.299 * red + 0.587 * green + 0.114 * blue > DARK_TEXT_ABOVE else "#FFFFFF"


def tint(pixels: np.ndarray, mask: np.ndarray, color: str) -> None:
    """Lay a colour over the pixels of a mask that may have another size."""
    size = pixels.shape[1::-1]
    inside = np.asarray(Image.fromarray(np.asarray(mask, dtype=bool)).resize(size, Image.Resampling.NEAREST))
    shade = np.array(ImageColor.getrgb(color)) * MASK_OPACITY
    pixels[inside] = (pixels[inside] * (1 - MASK_OPACITY) + shade).astype(np.uint8)


def draw(
    image: Image.Image, objects: list[dict], region: dict, clicks: list[tuple[float, float]], scale: float
) -> Image.Image:
    """A copy of an image with what was found and what the user gave.

    Args:
        image: the image.
        objects: of `post_process_generation`, with masks as bool arrays.
        region: of the user, in white.
        clicks: corners of a box that is being made, xy in pixels of the image.
        scale: by how much the copy is larger.
    """
    size = tuple(max(1, round(side * scale)) for side in image.size)
    pixels = np.array(image.resize(size, Image.Resampling.BICUBIC))
    colors = object_colors(objects)
    if "mask" in region:
        tint(pixels, region["mask"], GIVEN_COLOR)
    for found, color in zip(objects, colors, strict=True):
        if found.get("mask") is not None:
            tint(pixels, found["mask"], color)
    canvas = Image.fromarray(pixels)
    drawing = ImageDraw.Draw(canvas)
    line = max(2, round(max(size) / 250))
    if "box" in region:
        box = [value * scale for value in region["box"]]
        drawing.rectangle(box, outline=GIVEN_EDGE, width=line + 2)
        drawing.rectangle([box[0] + 1, box[1] + 1, box[2] - 1, box[3] - 1], outline=GIVEN_COLOR, width=line)
    for found, color in zip(objects, colors, strict=True):
        drawing.rectangle([value * scale for value in found["box"]], outline=color, width=line)
        if found.get("point") is not None:
            dot(drawing, [value * scale for value in found["point"]], 2 * line, color)
    font, taken = ImageFont.load_default(max(14, round(min(size) * 0.03))), []
    for number, (found, color) in enumerate(zip(objects, colors, strict=True), 1):
        # The font that comes with PIL has Latin letters only; the number leads to the phrase in any case.
        phrase = found["phrase"] if found["phrase"] and found["phrase"].isascii() else ""
        label(drawing, f"{number} {phrase}".rstrip(), [value * scale for value in found["box"][:2]], font, color, taken)
    for corner in [region["point"], *clicks] if "point" in region else clicks:
        dot(drawing, [value * scale for value in corner], 2 * line, GIVEN_COLOR)
    return canvas


def dot(drawing: ImageDraw.ImageDraw, center: list[float], radius: float, color: str) -> None:
    x, y = center
    drawing.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color, outline=GIVEN_EDGE, width=2)


def label(drawing: ImageDraw.ImageDraw, text: str, corner: list[float], font, color: str, taken: list[list]) -> None:
    """A text on its colour, above the upper left corner of a box, or lower where there is no room.

    Args:
        drawing: of the image.
        text: the label.
        corner: xy of the box.
        font: of PIL.
        color: of the box.
        taken: xyxy of the labels that are there; this one is added.
    """
    width, height = drawing.im.size
    left, top, right, bottom = drawing.textbbox((0, 0), text, font=font)
    padding = 3
    box_width, box_height = right - left + 2 * padding, bottom - top + 2 * padding
    x = max(0, min(corner[0], width - box_width))
    y = max(0, min(corner[1] - box_height, height - box_height))
    while y + 2 * box_height < height and any(
        x < x1 and x0 < x + box_width and y < y1 and y0 < y + box_height for x0, y0, x1, y1 in taken
    ):
        y += box_height
    taken.append([x, y, x + box_width, y + box_height])
    drawing.rectangle(taken[-1], fill=color)
    drawing.text((x + padding - left, y + padding - top), text, font=font, fill=text_color(color))


def view(session: Session) -> Image.Image:
    """The image as the browser shows it: the last answer, and the clicks since then."""
    objects, region = [], {}
    if session.turns:
        objects, region = session.turns[-1].objects, session.turns[-1].region
    if session.clicks:
        region = {} if session.box is None else {"box": session.box}
    return draw(session.image, objects, region, session.clicks, view_scale(session.image))
