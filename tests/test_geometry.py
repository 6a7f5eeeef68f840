"""Pixels to the padded square and back: boxes, masks, and the picture itself."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from torch.nn import functional as F
from transformers import LlavaImageProcessorPil

from perceptiongpt.geometry_perceptiongpt import (
    box_iou,
    boxes_from_square,
    boxes_to_square,
    clip_box,
    decode_mask,
    deepest_pixel,
    encode_rle,
    interior_point,
    letterbox,
    mask_depth,
    mask_to_polygons,
    mask_to_square,
    rle_runs,
    sample_mask_logits,
    tight_box,
)


settings.register_profile("repeatable", deadline=None, database=None, derandomize=True)
settings.load_profile("repeatable")

SIDES = st.integers(1, 3000)
MASKS = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 2**32 - 1)).map(
    lambda drawn: np.random.default_rng(drawn[2]).random(drawn[:2]) < 0.6
)


@given(height=SIDES, width=SIDES, shares=st.tuples(*[st.floats(0, 1)] * 4))
def test_a_box_comes_back_from_the_square(height, width, shares):
    box = torch.tensor(shares) * torch.tensor([width, height, width, height])
    square = boxes_to_square(box, height, width)
    assert square.dtype == torch.float32
    assert square.min() >= 0 and square.max() <= 1
    assert (boxes_from_square(square, height, width) - box).abs().max() < 0.01


def test_boxes_in_the_padding_are_clipped_to_the_picture():
    assert boxes_from_square([[0.0, 0.0, 1.0, 1.0]], 50, 100).tolist() == [[0, 0, 100, 50]]
    assert boxes_to_square([0, 0, 100, 50], 50, 100).tolist() == [0, 0.25, 1, 0.75]


@pytest.mark.parametrize("height, width", [(121, 200), (200, 121), (160, 160), (37, 250)])
def test_the_image_processor_puts_pixels_where_boxes_go(height, width):
    size = 64
    image_processor = LlavaImageProcessorPil(
        do_pad=True, do_center_crop=False, size={"height": size, "width": size}, do_normalize=False, do_rescale=False
    )
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([columns, rows, np.full_like(rows, 255)], axis=-1).astype(np.uint8)
    pixels = image_processor([Image.fromarray(picture)], return_tensors="np")["pixel_values"][0]
    centres = (np.arange(size) + 0.5) / size
    expected = boxes_from_square(np.stack(np.broadcast_arrays(*[centres] * 4), -1), height, width).numpy() - 0.5
    inside = lambda values, length: np.flatnonzero((values > 8) & (values < length - 8))  # noqa: E731
    x, y = inside(expected[:, 0], width), inside(expected[:, 1], height)
    assert len(x) > 4 and len(y) > 4
    assert np.abs(pixels[0][np.ix_(y, x)] - expected[x, 0]).max() < 0.75  # half of it is rounding to whole numbers
    assert np.abs(pixels[1][np.ix_(y, x)] - expected[y, 1][:, None]).max() < 0.75


@given(height=st.integers(1, 60), width=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_a_mask_never_becomes_empty(height, width, size, seed):
    mask = np.zeros((height, width), dtype=bool)
    assert mask_to_square(mask, size).sum() == 0
    y, x = np.random.default_rng(seed).integers([height, width])
    mask[y, x] = True
    lit = np.argwhere(mask_to_square(mask, size))
    side, top, left = letterbox(height, width)
    assert len(lit) > 0
    centre = (lit.mean(0) + 0.5) / size
    assert np.abs(centre - (np.array([y + top, x + left]) + 0.5) / side).max() <= 1 / size


@given(mask=MASKS, size=st.integers(1, 9))
def test_masks_are_resampled_by_area(mask, size):
    side, top, left = letterbox(*mask.shape)
    square = np.zeros((side, side))
    square[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    fine = np.kron(square, np.ones((size, size)))  # each cell is now side x side whole pixels
    coverage = fine.reshape(size, side, size, side).mean((1, 3))
    if mask.any() and (coverage >= 0.5).any():
        np.testing.assert_array_equal(mask_to_square(mask, size), coverage >= 0.5)


@pytest.mark.parametrize("height, width", [(30, 50), (51, 30), (40, 40), (1, 7)])
def test_logits_are_sampled_as_on_a_canvas_of_the_padded_square(height, width):
    logits = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    side, top, left = letterbox(height, width)
    canvas = F.interpolate(logits[None], (side, side), mode="bilinear", align_corners=False)[0]
    expected = canvas[:, top : top + height, left : left + width]
    torch.testing.assert_close(sample_mask_logits(logits, height, width), expected, atol=1e-5, rtol=0)
    assert sample_mask_logits(logits.bfloat16(), height, width).dtype == torch.float32
    assert sample_mask_logits(logits[:0], height, width).shape == (0, height, width)


def test_a_mask_comes_back_from_the_square():
    rows, columns = np.mgrid[:300, :500]
    mask = (rows - 140) ** 2 + (columns - 260) ** 2 < 90**2
    logits = torch.from_numpy(mask_to_square(mask, 128))[None] - 0.5
    back = sample_mask_logits(logits, 300, 500)[0].numpy() > 0
    assert (mask & back).sum() / (mask | back).sum() > 0.97


@given(mask=MASKS)
def test_rle_equals_pycocotools(mask):
    encoded = encode_rle(mask)
    reference = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert encoded == {"size": list(mask.shape), "counts": reference["counts"].decode()}
    if not mask.any():
        return
    for counts in (encoded["counts"], reference["counts"], rle_runs(encoded["counts"])):
        np.testing.assert_array_equal(decode_mask({**encoded, "counts": counts}, *mask.shape), mask)


def test_rle_of_a_large_mask_equals_pycocotools():
    mask = np.random.default_rng(0).random((600, 400)) < 0.001
    np.testing.assert_array_equal(decode_mask(encode_rle(mask), 600, 400), mask)


def _fill_holes(mask):
    """Fills background that is not joined to the border, corners counting as joints."""
    outside = np.pad(np.zeros_like(mask), 1, constant_values=True)
    free = ~np.pad(mask, 1)
    while True:
        padded = np.pad(outside, 1)
        height, width = outside.shape
        grown = free & np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)
        if (grown == outside).all():
            return ~outside[1:-1, 1:-1]
        outside = grown


@given(mask=MASKS)
def test_polygons_draw_the_mask_again(mask):
    polygons = mask_to_polygons(mask)
    if not mask.any():
        assert polygons == []
        return
    assert all(len(polygon) >= 8 and all(type(value) is float for value in polygon) for polygon in polygons)
    np.testing.assert_array_equal(decode_mask(polygons, *mask.shape), _fill_holes(mask))


def test_polygons_keep_only_outer_corners():
    mask = np.zeros((10, 10), dtype=bool)
    mask[2:5, 3:9] = True
    mask[3, 5:7] = False
    assert mask_to_polygons(mask) == [[3, 2, 9, 2, 9, 5, 3, 5]]


@pytest.mark.parametrize(
    "mask",
    [
        np.eye(4, 6) > 0,
        np.eye(4, 6),
        np.eye(4, 6, dtype=np.uint8) * 255,
        torch.eye(6)[:4] > 0,
        Image.fromarray(np.eye(4, 6, dtype=np.uint8) * 255),
        Image.fromarray(np.eye(4, 6) > 0),
        Image.fromarray(np.eye(4, 6, dtype=np.uint8) * 255).convert("RGB"),
        {"size": [4, 6], "counts": [0, 1, 4, 1, 4, 1, 4, 1, 8]},
    ],
    ids=["bool", "float", "uint8", "tensor", "L", "1", "RGB", "runs"],
)
def test_every_form_of_a_mask_is_read(mask):
    np.testing.assert_array_equal(decode_mask(mask, 4, 6), np.eye(4, 6) > 0)


def test_polygons_may_be_points_or_flat():
    flat = decode_mask([[1, 1, 5, 1, 5, 3, 1, 3]], 4, 6)
    np.testing.assert_array_equal(decode_mask([np.array([[1, 1], [5, 1], [5, 3], [1, 3]])], 4, 6), flat)
    assert tight_box(flat) == [1, 1, 5, 3]


@pytest.mark.parametrize(
    "mask, message",
    [
        (np.ones((5, 6), dtype=bool), r"shape \(5, 6\).*expected \(height, width\) = \(4, 6\)"),
        (np.ones((4, 6, 1), dtype=bool), "shape"),
        (np.zeros((4, 6), dtype=bool), "empty"),
        (np.full((4, 6), 0.3), "floats other than 0 and 1"),
        (np.full((4, 6), np.nan), "floats other than 0 and 1"),
        ("mask.png", "is a str"),
        ({"size": [6, 4], "counts": [24]}, "size"),
        ({"size": [4, 6]}, "not run lengths"),
        ({"counts": [24]}, "size None"),
        ({"size": [4, 6], "counts": [5, 3]}, "sum up to 8"),
        ({"size": [4, 6], "counts": [30, -6]}, "not run lengths"),
        ({"size": [4, 6], "counts": [24]}, "empty"),
        ({"size": [4, 6], "counts": "zzzz"}, "broken"),
        ({"size": [4, 6], "counts": "~~é"}, "broken"),
        ({"size": [4, 6], "counts": "52203"}, "sum up to"),
        ({"size": [4, 6], "counts": ""}, "sum up to 0"),
        ({"size": [4, 6], "counts": "P"}, "ends too early"),
        ([[1, 1, 3, 3]], "2 points; expected at least 3"),
        ([[1, 1, 3, 3, 2]], "is not numbers"),
        ([["a", "b", "c"]], "is not numbers"),
        ([[True, False] * 3] * 4, "is not numbers"),
        ([[0, 0, 60, 0, 60, 40]], "outside the 6 x 4 image"),
        ([[0, 0, 3, float("nan"), 3, 3]], "outside the 6 x 4 image"),
        ([], "without polygons"),
        ([[1, 1, 1, 1, 1, 1]], "empty"),
    ],
)
def test_a_bad_mask_is_an_error_that_says_why(mask, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(mask, 4, 6)


@pytest.mark.parametrize(
    "box, clipped",
    [
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([-1, -0.5, 7, 5], [0, 0, 6, 4]),
        (np.array([0, 0, 6, 4.5]), [0, 0, 6, 4]),
        (torch.tensor([1, 2, 3, 4]), [1, 2, 3, 4]),
    ],
)
def test_a_box_may_overhang_by_a_pixel(box, clipped):
    assert clip_box(box, 4, 6) == clipped


@pytest.mark.parametrize(
    "box, message",
    [
        ([1, 2, float("nan"), 4], "not finite"),
        ([1, 2, float("inf"), 4], "not finite"),
        ([3, 2, 1, 4], "inverted"),
        ([1, 4, 3, 2], "inverted"),
        ([1, 2, 1, 4], "no area"),
        ([-1, 0, 0, 4], "no area"),
        ([0, 0, 7.1, 4], "1.1 px outside the 6 x 4 image"),
        ([-1.5, 0, 3, 4], "outside the 6 x 4 image"),
        ([1, 2, 3], "not four numbers"),
        ([], "not four numbers"),
        (["a", 0, 1, 1], "not four numbers"),
        (7, "not four numbers"),
        ("tight", "not four numbers"),
    ],
)
def test_a_bad_box_is_an_error_that_says_why(box, message):
    with pytest.raises(ValueError, match=message):
        clip_box(box, 4, 6)


def test_annotations_of_real_photos_are_read_as_pycocotools_reads_them(data_dir):
    annotations = json.loads(next((data_dir / "tiny_coco").rglob("instances*.json")).read_text())
    images = {image["id"]: image for image in annotations["images"]}
    for annotation in annotations["annotations"]:
        image = images[annotation["image_id"]]
        height, width = image["height"], image["width"]
        reference = coco_mask.frPyObjects(annotation["segmentation"], height, width)
        reference = coco_mask.merge(reference) if isinstance(reference, list) else reference
        mask = decode_mask(annotation["segmentation"], height, width)
        np.testing.assert_array_equal(mask, coco_mask.decode(reference) > 0)
        x, y, box_width, box_height = coco_mask.toBbox(reference)
        assert tight_box(mask) == [x, y, x + box_width, y + box_height]


@given(mask=MASKS)
def test_depth_is_the_distance_to_the_nearest_pixel_outside(mask):
    outside = np.argwhere(~np.pad(mask, 1)) - 1
    expected = [
        [np.sqrt(((outside - (y, x)) ** 2).sum(1).min()) for x in range(mask.shape[1])] for y in range(len(mask))
    ]
    np.testing.assert_allclose(mask_depth(mask), expected)


def test_the_deepest_pixel_is_where_one_would_point():
    ring = np.zeros((40, 60), dtype=bool)
    ring[5:35, 10:20] = True  # a bar ten pixels wide, joined to a thin one
    ring[5:7, 10:50] = True
    x, y = deepest_pixel(ring)
    assert 14 <= x <= 16 and 14 < y < 24 and ring[int(y), int(x)]
    assert deepest_pixel(np.ones((3, 9), dtype=bool)) == [4.5, 1.5]  # of a ridge of equal depth the middle


@given(mask=MASKS, seed=st.integers(0, 9))
def test_points_lie_inside_their_mask(mask, seed):
    if mask.any():
        generator = np.random.default_rng(seed)
        depth = mask_depth(mask)
        for x, y in (deepest_pixel(mask), interior_point(mask, generator)):
            assert mask[int(y), int(x)]
        assert depth[int(deepest_pixel(mask)[1]), int(deepest_pixel(mask)[0])] == depth.max()


def test_clicks_keep_off_the_edge_and_cover_the_interior():
    disc = np.hypot(*np.mgrid[-20:21, -20:21]) <= 18
    depth, generator = mask_depth(disc), np.random.default_rng(0)
    clicks = {tuple(interior_point(disc, generator)) for _ in range(2000)}
    depths = [depth[int(y), int(x)] for x, y in clicks]
    assert min(depths) >= 0.25 * depth.max() and max(depths) == depth.max() and len(clicks) > 400


@pytest.mark.parametrize(
    "boxes, others, expected",
    [
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7),
        ([[0, 0, 2, 2], [4, 4, 5, 5]], [0, 0, 2, 2], [1, 0]),
        ([[[0, 0, 2, 2]]], [[[0, 0, 2, 4], [2, 0, 4, 2]]], [[0.5, 0]]),
    ],
)
def test_box_iou_broadcasts(boxes, others, expected):
    np.testing.assert_allclose(box_iou(boxes, others), expected)
