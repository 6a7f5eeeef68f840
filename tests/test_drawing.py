"""drawing.py: what is drawn where, at any size."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from perceptiongpt.drawing import LEAST_LONGER_SIDE, SHEET_MARGIN, card, contact_sheet, draw_objects


def make_object(box, mask=None, phrase="the red cup", score=0.9):
    return {"box": box, "mask": mask, "phrase": phrase, "score": score}


@pytest.mark.parametrize("size", [(1, 1), (17, 400), (640, 480), (1500, 900)])
def test_any_size(size):
    box = [0.0, 0.0, float(size[0]), float(size[1])]
    drawn = draw_objects(Image.new("RGB", size), {"objects": [make_object(box), make_object(box, phrase=None)]})
    assert max(drawn.size) == max(LEAST_LONGER_SIDE, *size)
    assert np.asarray(drawn).any()


def test_nothing_found_leaves_the_image_alone():
    image = Image.new("RGB", (600, 300), "teal")
    drawn = draw_objects(image, {"objects": []})
    assert np.array_equal(np.asarray(drawn), np.asarray(image))


@pytest.mark.parametrize("as_rle", [False, True])
def test_mask_and_box_are_drawn_in_place(as_rle):
    mask = np.zeros((600, 800), dtype=np.uint8, order="F")
    mask[200:300, 400:500] = 1
    given = coco_mask.encode(mask) if as_rle else mask.astype(bool)
    image = Image.new("RGB", (800, 600), "white")
    drawn = np.asarray(draw_objects(image, {"objects": [make_object([400.0, 200.0, 500.0, 300.0], given)]}))
    inside, outside = drawn[220:280, 420:480], drawn[350:, :]
    assert (inside != 255).any(axis=-1).all() and (outside == 255).all()
    assert np.asarray(image).min() == 255  # the image that was given stays as it was


def test_objects_have_their_own_colours():
    boxes = [[100.0 * index + 10, 50.0, 100.0 * index + 90, 150.0] for index in range(8)]
    drawn = draw_objects(Image.new("RGB", (800, 600)), {"objects": [make_object(box) for box in boxes]})
    assert len({drawn.getpixel((int(box[0]) + 40, 150)) for box in boxes}) == 8


def test_an_object_without_a_label_is_not_hidden():
    box = [300.0, 200.0, 306.0, 206.0]
    drawn = {}
    for label in ("", "0.93"):
        picture = draw_objects(Image.new("RGB", (600, 400)), {"objects": [make_object(box)]}, labels=[label])
        drawn[label] = (np.asarray(picture) != 0).any(axis=-1)
    assert not drawn[""][:190].any() and not drawn[""][:, 320:].any() and drawn[""].any()
    assert drawn["0.93"].sum() > 2 * drawn[""].sum()


@pytest.mark.parametrize("size", [(100, 50), (2000, 1000)])
def test_size_to_draw_at(size):
    mask = np.ones(size[::-1], dtype=bool)
    objects = [make_object([0.0, 0.0, *map(float, size)], mask)]
    assert draw_objects(Image.new("RGB", size), {"objects": objects}, longer_side=300).size == (300, 150)


def test_a_card_cuts_what_does_not_fit():
    picture = Image.new("RGB", (200, 100), "teal")
    plain, long, longer = (card(picture, "reference", "Where is it? " * times, 300) for times in (0, 50, 500))
    assert plain.width == long.width == 300 and plain.height < long.height == longer.height < 250
    for one in (plain, long):
        pixels = np.asarray(one)
        place = (pixels == (0, 128, 128)).all(axis=-1)
        assert place.sum() == 200 * 100 and place[:, 50:250].sum() == 200 * 100  # all of the picture, in the middle
        assert (pixels[: int(place.any(1).argmax())].min(axis=-1) < 100).any()  # the title is above it


def test_caption_goes_below():
    drawn = draw_objects(Image.new("RGB", (600, 400)), {"objects": []}, caption="There is no zebra. " * 20)
    assert drawn.width == 600 and drawn.height > 450
    assert (np.asarray(drawn)[:400] == 0).all() and np.asarray(drawn)[400:].min() == 0


def test_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="cannot be drawn"):
        draw_objects(
            Image.new("RGB", (60, 40)), {"objects": [make_object([0, 0, 9, 9], np.ones((60, 40), dtype=bool))]}
        )


def test_contact_sheet_stays_small(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (500, 700, 3), dtype=np.uint8)
    path = contact_sheet([Image.fromarray(noise)] * 5, columns=3, path=tmp_path / "new/sheet.jpg", max_bytes=200_000)
    assert path.stat().st_size <= 200_000
    with Image.open(path) as sheet:
        assert sheet.width > sheet.height > 100
    sizes = [(400, 100), (400, 200), (100, 400)]
    path = contact_sheet([Image.new("RGB", size) for size in sizes], 2, tmp_path / "rows.png", cell=208)
    with Image.open(path) as sheet:  # rows no higher than they need to be
        assert sheet.size == (2 * 208, 100 + SHEET_MARGIN + 200 + SHEET_MARGIN)
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([], columns=2, path=tmp_path / "none.jpg")


def test_points_are_drawn_in_place():
    found = {**make_object([400.0, 200.0, 500.0, 300.0]), "point": [700.0, 500.0]}
    drawn = np.asarray(draw_objects(Image.new("RGB", (800, 600), "white"), {"objects": [found]}))
    assert (drawn[500, 700] != 255).any() and (drawn[450:550, 650:690] == 255).all()
