"""
The one image reader: whatever users and data sets have becomes an upright RGB image.

The orientation that a camera wrote (EXIF) is applied, transparent pixels are composited on white, and 16-bit images are
scaled to 8 bits instead of being clipped.
"""

import base64
import binascii
import importlib
import io
import os
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb


URL_TIMEOUT = 60.0  # seconds
SHOWN_CHARACTERS = 200  # of a path or URL in an error message
TURNED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def read_image(source, name: str = "image") -> Image.Image:
    """
    Reads an image from any of its usual forms.

    Args:
        source: a path; an `http(s)://` URL; a data URI or a bare base64 string; the bytes of an image file; a PIL
            image; an array or tensor of shape `(H, W)`, `(H, W, C)` or `(C, H, W)` with values in 0..1 (float), 0..255
            or 0..65535; or the `{"path": ..., "bytes": ...}` of a row of a data set.
        name (`str`): what error messages call it.

    Returns:
        `PIL.Image.Image`: RGB, upright, transparency composited on white.

    Raises:
        ValueError: naming the image, if it does not exist or cannot be read.
    """
    if isinstance(source, Mapping):
        content, path = source.get("bytes"), source.get("path")
        if content is None:
            return read_image(path, name)
        source, place = content, path
    else:
        is_text = isinstance(source, (str, os.PathLike))
        place = source if is_text else getattr(source, "filename", None)
    name = f"{name} ({str(place)[:SHOWN_CHARACTERS]})" if place else name
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        if isinstance(source, (np.ndarray, torch.Tensor)):
            return array_to_image(source)
        with Image.open(_file_of(source)) as opened:
            return to_rgb(opened)
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError(f"{name}: cannot be read as an image: {type(error).__name__}: {error}") from error


def _file_of(source) -> str | os.PathLike | io.BytesIO:
    """What `PIL.Image.open` takes: a path, or the bytes of an image file as a stream."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    if isinstance(source, os.PathLike):
        return source
    if not isinstance(source, str) or not source:
        raise TypeError(f"{source!r:.60} is not a path, a URL, bytes, a PIL image, an array or a tensor")
    if source.startswith(("http://", "https://")):
        httpx = importlib.import_module("httpx")  # the client that transformers itself depends on
        response = httpx.get(source, timeout=URL_TIMEOUT, follow_redirects=True)
        return io.BytesIO(response.raise_for_status().content)
    is_uri = source.startswith("data:image/")
    if not is_uri and os.path.isfile(source):
        return source
    try:
        content = base64.b64decode("".join((source.partition(",")[2] if is_uri else source).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        if is_uri:
            raise
        raise FileNotFoundError("there is no such file, and it is neither a URL nor base64") from error
    return io.BytesIO(content)


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as an upright RGB image, transparency composited on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits, which `convert` would clip to white
        return array_to_image(np.asarray(image))
    return Image.fromarray(convert_to_rgb(image, return_numpy=True))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of a PIL image after its EXIF orientation is applied; the pixels are not decoded."""
    turned = image.getexif().get(Image.ExifTags.Base.Orientation) in TURNED_ORIENTATIONS
    return image.size[::-1] if turned else image.size


def array_to_image(array) -> Image.Image:
    """
    An array or tensor as an RGB image.

    Raises:
        ValueError: another shape than `(H, W)`, `(H, W, C)` or `(C, H, W)`, or values outside every usual range.
    """
    array = array.cpu().numpy() if isinstance(array, torch.Tensor) else array
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or array.ndim == 3 and array.shape[-1] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"the array has the shape {array.shape}; expected (H, W), (H, W, C) or (C, H, W)")
    if array.dtype == bool:
        array = array * 255
    elif array.dtype.kind == "f" and array.max() <= 1:
        array = (array * 255).round()
    elif array.dtype == np.uint16 or array.dtype.kind in "ui" and array.max() > 255:
        array = array // 257
    if not ((array >= 0) & (array <= 255)).all():
        raise ValueError(f"the array's values lie in {array.min()}..{array.max()}; expected 0..1, 0..255 or 0..65535")
    array = array.astype(np.uint8)
    return to_rgb(Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array))


def split_batches(images):
    """`images` with the images of each 4-D array or tensor in place of it."""
    if not isinstance(images, (list, tuple)):
        return list(images) if getattr(images, "ndim", 0) == 4 else images
    split = []
    for image in images:
        if getattr(image, "ndim", 0) == 4:
            split.extend(image)
        else:
            split.append(split_batches(image))
    return split
