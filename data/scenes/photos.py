"""Real images for scenes: photos for backgrounds, and objects cut out of them along their COCO masks."""

from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from perceptiongpt.data.formats.coco import read_instances, segmentation_to_rle
from perceptiongpt.data.reading import safe_join
from perceptiongpt.geometry_perceptiongpt import decode_mask, tight_box
from perceptiongpt.images_perceptiongpt import to_rgb, upright_size


POOL_PHOTOS, CACHED_PHOTOS = 32, 96  # photos that neighbouring scenes share, and those that a worker keeps
CACHED_MASKS = 4096  # of cut-outs
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
LEAST_CUTOUT_SIDE = 24  # pixels of the photo
LEAST_CUTOUT_WIDTH = 8  # pixels of the photo, of the shorter side
BORDER = 2  # pixels; what comes nearer to the photo's edge may be cut off by it
CUTOUT_PHOTO_SIDE = 320  # pixels to which a photo is reduced before objects are cut out
LEAST_PASTED_SIDE = 3  # pixels of the scene, of the shorter side
LARGEST_SCALE = 2  # an object that would have to be enlarged more is blurred


class Photos:
    """The images of a folder, for backgrounds; each worker keeps the last `CACHED_PHOTOS` it read, at low resolution.

    Raises:
        ValueError: the folder has no image.
    """

    def __init__(self, folder: str | Path):
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)
        if not self.paths:
            raise ValueError(f"{folder}: holds no image ({', '.join(sorted(PHOTO_SUFFIXES))})")

    def choose(self, rng: Random, pool: Random) -> Path:
        """One of the `POOL_PHOTOS` images that `pool` chooses."""
        pool = [self.paths[pool.randrange(len(self.paths))] for _ in range(POOL_PHOTOS)]
        return rng.choice(pool)

    @staticmethod
    def background(path: Path, size: int, rng: Random) -> np.ndarray:
        """A random square crop, uint8 (size, size, 3)."""
        photo = _read_photo(path, 3 * size)[0]
        side = min(photo.size) * rng.uniform(0.5, 1.0)
        x, y = rng.uniform(0, photo.width - side), rng.uniform(0, photo.height - side)
        return np.array(photo.resize((size, size), Image.Resampling.BILINEAR, (x, y, x + side, y + side)))


class Cutouts:
    """Real objects of a COCO-format folder, to be pasted.

    The layout is COCO's own, `annotations/instances_<name>.json` and `<name>/` (the json may lie beside the folder of
    images; of several the first whose folder is there; `images/` is taken if there is none). Crowd regions, objects
    cut off by the border and those whose box is smaller than `LEAST_CUTOUT_SIDE` pixels are not pasted. Images made
    so carry the licences of the photos they come from (`images[].license` in the json).

    Raises:
        ValueError: no annotations, no images, or no object that can be pasted.
    """

    def __init__(self, root: str | Path):
        root = Path(root)
        files = sorted([*root.glob("annotations/instances*.json"), *root.glob("instances*.json")])
        if not files:
            raise ValueError(f"{root}: no annotations/instances*.json; expected a folder in COCO's layout")
        own = [root / file.stem.removeprefix("instances_") for file in files]
        found = next((pair for pair in zip(files, own, strict=True) if pair[1].is_dir()), (files[0], root / "images"))
        annotations, self.folder = found
        if not self.folder.is_dir():
            raise ValueError(f"{root}: has neither a folder {own[0].name!r} nor 'images'")
        records, instances, categories = read_instances(annotations)
        self.categories = sorted(set(categories.values()))
        self.photos, self.names = [], {}
        for record in records:
            path, width, height = safe_join(self.folder, record["file_name"]), record["width"], record["height"]
            self.names[path] = {categories[one["category_id"]] for one in instances[record["id"]]}
            usable = []
            for one in instances[record["id"]]:
                name = f"{annotations}: annotation {one.get('id')!r} of image {record['id']!r}"
                x, y, w, h = _bbox(one, name)
                inside = min(x, y, width - x - w, height - y - h) >= BORDER
                large = max(w, h) >= LEAST_CUTOUT_SIDE and min(w, h) >= LEAST_CUTOUT_WIDTH
                if not one.get("iscrowd") and inside and large:
                    usable.append((categories[one["category_id"]], one["segmentation"], (width, height), name))
            if usable:
                self.photos.append((path, usable))
        if not self.photos:
            raise ValueError(f"{annotations}: no object can be pasted (whole, and {LEAST_CUTOUT_SIDE} pixels or more)")
        self.paths = sorted(self.names)
        self._masks = lru_cache(maxsize=CACHED_MASKS)(self._cut)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_masks"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._masks = lru_cache(maxsize=CACHED_MASKS)(self._cut)

    def _cut(self, photo: int, number: int) -> tuple[Image.Image, tuple[int, int, int, int]] | None:
        """The mask of one object, cut to its tight box, and that box (xyxy pixels of the photo)."""
        _, segmentation, (width, height), name = self.photos[photo][1][number]
        rle = segmentation_to_rle(segmentation, height, width, name)
        if rle is None:
            return None
        mask = decode_mask(rle, height, width)
        x0, y0, x1, y1 = map(int, tight_box(mask))
        return Image.fromarray(mask[y0:y1, x0:x1] * np.uint8(255)), (x0, y0, x1, y1)

    def choose(self, rng: Random, pool: Random, count: int) -> tuple[list[tuple[str, int, int]], Path]:
        """`count` objects as (category, photo, number in it), and a photo whose annotations hold none of their kinds.

        The objects come from a few photos, in which categories occur several times.
        """
        photos = [pool.randrange(len(self.photos)) for _ in range(POOL_PHOTOS)]
        grounds = [self.paths[pool.randrange(len(self.paths))] for _ in range(POOL_PHOTOS)]
        by_category = defaultdict(list)
        for photo in set(photos):
            for number, (category, *_) in enumerate(self.photos[photo][1]):
                by_category[category].append((category, photo, number))
        categories = rng.sample(sorted(by_category), min(len(by_category), rng.choice((1, 2, 2, 3, 3, 4))))
        free = [path for path in sorted(set(grounds)) if not self.names[path] & set(categories)]
        ground = rng.choice(free) if free else None
        return [rng.choice(by_category[rng.choice(categories)]) for _ in range(count)], ground

    def cut(self, photo: int, number: int, side: float, rng: Random) -> tuple[np.ndarray, np.ndarray] | None:
        """One object scaled to a longer side of `side` pixels, perhaps mirrored: float32 (h, w, 3), uint8 alpha (h, w);
        None if it is thinner than a pixel or would have to be enlarged more than twice."""
        cut = self._masks(photo, number)
        if cut is None:
            return None
        mask, (x0, y0, x1, y1) = cut
        path, usable = self.photos[photo]
        photo, original = _read_photo(path, CUTOUT_PHOTO_SIDE)
        if original != usable[number][2]:
            raise ValueError(f"{path}: is {original} pixels (width, height), the annotations say {usable[number][2]}")
        shrunk = photo.width / original[0]
        scale = side / max(mask.size)
        width, height = max(round(mask.width * scale), 1), max(round(mask.height * scale), 1)
        if min(width, height) < LEAST_PASTED_SIDE or scale > LARGEST_SCALE * shrunk:
            return None
        box = tuple(value * shrunk for value in (x0, y0, x1, y1))
        box = (*box[:2], min(box[2], photo.width), min(box[3], photo.height))
        patch = photo.resize((width, height), Image.Resampling.BILINEAR, box)
        alpha = mask.resize((width, height), Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            patch, alpha = (one.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for one in (patch, alpha))
        return np.asarray(patch, dtype=np.float32), np.asarray(alpha)


def _bbox(annotation: dict, name: str) -> list[float]:
    values = annotation["bbox"]
    if not isinstance(values, list) or len(values) != 4 or not all(isinstance(one, (int, float)) for one in values):
        raise ValueError(f"{name}: bbox {values!r} is not [x, y, width, height]")
    return values


@lru_cache(maxsize=CACHED_PHOTOS)
def _read_photo(path: Path, least_side: int) -> tuple[Image.Image, tuple[int, int]]:
    """An upright photo in RGB, reduced while its longer side stays above `least_side`, and its original size."""
    try:
        with Image.open(path) as photo:
            original = upright_size(photo)
            photo.draft("RGB", (least_side, least_side))
            photo = to_rgb(photo)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
    if max(photo.size) > 2 * least_side:
        photo = photo.reduce(max(photo.size) // least_side)
    return photo, original
