"""Where a look goes: crops inside the image, frames there and back, and pixels as the image processor makes them."""

import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaImageProcessorPil

from perceptiongpt import PerceptionGPTConfig
from perceptiongpt.geometry_perceptiongpt import boxes_from_square, boxes_to_square
from perceptiongpt.look_geometry_perceptiongpt import (
    WHOLE_SHARE,
    crop_frame,
    crop_pixel_values,
    into_frame,
    look_crop,
    out_of_frame,
)
from rows import tiny_config


SIDES = st.integers(1, 4000)
ANY_NUMBER = st.floats(allow_nan=True, allow_infinity=True)
INSIDE = st.floats(0, 1)
MARGINS, MIN_SIDES = st.floats(1, 4), st.integers(1, 600)


def pixel_box(shares, height, width):
    """A box of any size inside an image, from four numbers in 0..1."""
    x0, x1 = sorted(shares[:2])
    y0, y1 = sorted(shares[2:])
    return [x0 * width, y0 * height, x1 * width, y1 * height]


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.tuples(*[st.one_of(ANY_NUMBER, st.floats(-1e4, 1e4))] * 4), MARGINS, MIN_SIDES)
def test_any_box_has_a_crop_inside_the_image(height, width, box, margin, min_side):
    crop = look_crop(box, height, width, margin, min_side)
    if crop is None:
        return
    left, top, right, bottom = crop
    assert all(isinstance(value, int) for value in crop)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert max(right - left, bottom - top) < WHOLE_SHARE * max(height, width)
    assert right - left == width or right - left >= min_side
    assert bottom - top == height or bottom - top >= min_side
    assert right - left == bottom - top or width == right - left or height == bottom - top  # a square where it can be


@settings(max_examples=100, deadline=None)
@given(SIDES, SIDES, st.tuples(*[INSIDE] * 4), MARGINS, MIN_SIDES)
def test_a_crop_holds_its_box(height, width, shares, margin, min_side):
    x0, y0, x1, y1 = box = pixel_box(shares, height, width)
    crop = look_crop(box, height, width, margin, min_side)
    if crop is not None:
        left, top, right, bottom = crop
        assert left <= x0 + 0.5 and top <= y0 + 0.5 and right >= x1 - 0.5 and bottom >= y1 - 0.5


def test_boxes_without_a_place_are_the_middle_of_the_image():
    for box in ([math.nan] * 4, [math.inf, 0, 1, 2], [-math.inf, 0, math.inf, 5]):
        assert look_crop(box, 1000, 2000, 1.5, 100) == (950, 450, 1050, 550)
    assert look_crop([300, 400, 300, 400], 1000, 2000, 1.5, 100) == (250, 350, 350, 450)


def test_nearly_the_whole_image_is_no_look():
    assert look_crop([0, 0, 100, 100], 120, 120, 1.5, 10) is None
    assert look_crop([0, 0, 1, 1], 100, 100, 1.0, 90) is None
    assert look_crop([0, 0, 1, 1], 100, 100, 1.0, 89) == (0, 0, 89, 89)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, st.tuples(*[INSIDE] * 4), st.tuples(*[INSIDE] * 4), MARGINS, MIN_SIDES)
def test_into_the_frame_and_back(height, width, looked_at, shares, margin, min_side):
    crop = look_crop(pixel_box(looked_at, height, width), height, width, margin, min_side)
    if crop is None:
        return
    frame = torch.tensor(crop_frame(crop, height, width))
    boxes = torch.tensor([pixel_box(shares, height, width)])
    there = into_frame(boxes_to_square(boxes, height, width), frame)
    # The frame is what the processor's own geometry says of an image that is the crop.
    left, top, right, bottom = crop
    own = boxes_to_square(boxes - torch.tensor([left, top] * 2), bottom - top, right - left)
    scale = max(1.0, float(own.abs().max()))
    assert (there - own).abs().max() < 1e-3 * scale
    back = boxes_from_square(out_of_frame(there, frame), height, width)
    assert (back - boxes).abs().max() < 0.5
    torch.testing.assert_close(out_of_frame(into_frame(boxes[:, :2] / 4000, frame), frame), boxes[:, :2] / 4000)


@pytest.mark.parametrize("size", [(90, 160), (400, 300), (31, 640), (64, 64)])
@pytest.mark.parametrize("mean, std", [((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)), ((0.5,) * 3, (0.5,) * 3)])
def test_pixels_are_those_of_the_image_processor(size, mean, std):
    height, width = size
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 7 + 2, width // 7 + 2, 3), dtype=np.uint8))
    array = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).copy()
    array[: height // 2, : width // 3] = rng.integers(0, 256, (height // 2, width // 3, 3))
    image = Image.fromarray(array)
    processor = LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size={"height": 48, "width": 48}, image_mean=mean, image_std=std
    )
    pixels = torch.from_numpy(array).permute(2, 0, 1)
    for crop in ((3, 5, 20, 22), (0, 0, width, height), (0, 2, width, 9), (width // 2, 0, width, height)):
        expected = processor(image.crop(crop), return_tensors="pt")["pixel_values"][0]
        found = crop_pixel_values(pixels, crop, 48, torch.tensor(mean), torch.tensor(std))
        # In steps of a byte: rounding differs by one where the reference rounds between its two passes.
        steps = (found - expected).abs() * torch.tensor(std)[:, None, None] * 255
        assert steps.max() < 2.01 and steps.mean() < 0.3


def test_a_config_without_looks_says_nothing_of_them():
    config = tiny_config()
    assert not [name for name in config.to_diff_dict() if name.startswith("look_")]
    looking = tiny_config(look_max=2, look_tokens=4)
    assert (looking.look_token_id, looking.look_end_token_id, looking.look_pad_token_id) == (104, 105, 106)
    again = PerceptionGPTConfig.from_dict(looking.to_diff_dict())
    assert (again.look_max, again.look_tokens, again.look_min_side, again.look_frame) == (2, 4, 16, "image")
    assert tiny_config(look_max=1).look_tokens == tiny_config().image_seq_length


@pytest.mark.parametrize(
    "wrong",
    [
        {"look_max": -1},
        {"look_max": 1, "look_tokens": 5},
        {"look_max": 1, "look_margin": 0.5},
        {"look_max": 1, "look_min_side": -3},
        {"look_max": 1, "look_encoder": "another"},
        {"look_max": 1, "look_frame": "grid"},
        {"look_max": 1, "reserved_token_ids": [104, 105]},
        {"look_max": 1, "look_frame": "crop", "mask_image_size": 64},
    ],
)
def test_impossible_looks_are_refused(wrong):
    with pytest.raises(StrictDataclassError, match="look|Look"):
        tiny_config(**wrong)
