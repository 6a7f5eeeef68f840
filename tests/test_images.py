"""The image reader: every form of an image gives the same pixels, and every error names the image."""

import base64

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from perceptiongpt.data.mixtures import Mixture, Part
from perceptiongpt.data.schema import row_features
from perceptiongpt.images_perceptiongpt import read_image, upright_size


SIZE = (30, 20)


@pytest.fixture(scope="module")
def transparent() -> Image.Image:
    """Opaque red on the left, transparent black on the right: white once it is composited."""
    pixels = np.zeros((SIZE[1], SIZE[0], 4), dtype=np.uint8)
    pixels[:, :15] = (255, 0, 0, 255)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def file(transparent, tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "transparent.png"
    transparent.save(path)
    return path


@pytest.fixture
def url(file, monkeypatch) -> str:
    def get(url, **_):
        return httpx.Response(
            404 if "missing" in url else 200, content=file.read_bytes(), request=httpx.Request("GET", url)
        )

    monkeypatch.setattr(httpx, "get", get)
    return "https://example.org/transparent.png"


def assert_red_and_white(image: Image.Image) -> None:
    pixels = np.asarray(image)
    assert (image.mode, image.size) == ("RGB", SIZE)
    assert (pixels[:, :15] == (255, 0, 0)).all() and (pixels[:, 15:] == 255).all()


def test_every_form_gives_the_same_image(file, transparent, url):
    content = file.read_bytes()
    encoded = base64.b64encode(content).decode()
    array = np.asarray(transparent)
    forms = {
        "path": file,
        "text": str(file),
        "url": url,
        "bytes": content,
        "data uri": "data:image/png;base64," + encoded,
        "base64": encoded,
        "base64 in lines": base64.encodebytes(content).decode(),
        "PIL": transparent,
        "array": array,
        "channels first": np.moveaxis(array, -1, 0),
        "tensor": torch.from_numpy(array / 255),
        "row with bytes": {"path": "transparent.png", "bytes": content},
        "row with path": {"path": str(file), "bytes": None},
    }
    for form, source in forms.items():
        try:
            assert_red_and_white(read_image(source))
        except Exception as error:
            raise AssertionError(form) from error


def test_palette_transparency_and_16_bits(tmp_path):
    palette = Image.new("P", SIZE, 0)
    palette.putpalette([0, 0, 0] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert np.asarray(read_image(tmp_path / "palette.png")).min() == 255
    Image.fromarray(np.full(SIZE[::-1], 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (np.asarray(read_image(tmp_path / "deep.png")) == 128).all()


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == SIZE[::-1]
    with Image.open(tmp_path / "turned.jpg") as opened:
        assert upright_size(opened) == SIZE[::-1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "gone.png",
            r"sample 3 \(gone.png\): cannot be read as an image: FileNotFoundError: .*neither a URL nor base64",
        ),
        ("Z29uZQ==", "UnidentifiedImageError"),
        ("data:image/png;base64,?", "data:image/png"),
        ("https://example.org/missing.png", "https://example.org/missing.png.*404"),
        (b"text", "sample 3: cannot be read"),
        ({"path": "gone.png", "bytes": None}, "gone.png"),
        ({"path": None, "bytes": None}, "None is not a path"),
        (7, "7 is not a path, a URL, bytes"),
        ("", "'' is not a path"),
    ],
)
def test_errors_name_the_image(source, message, url):
    with pytest.raises(ValueError, match=f"(?s)^sample 3.*{message}" if "sample" not in message else message):
        read_image(source, "sample 3")


def test_training_rows_are_composited_on_white(transparent, tmp_path):
    from datasets import Dataset

    from perceptiongpt.data.preview import draw_row
    from perceptiongpt.data.schema import row_to_messages
    from perceptiongpt.data.sources import load_source

    row = {
        "image": transparent,
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}],
        "boxes": [],
        "masks": [],
        "points": [],
        "task": "vqa",
        "source": "drawn",
        "image_id": "0",
        "split": "train",
        "width": SIZE[0],
        "height": SIZE[1],
    }
    features = row_features()
    dataset = Dataset.from_list([{**dict.fromkeys(features), **row}], features=features)
    assert_red_and_white(read_image(row_to_messages(dataset[0])[0]["content"][0]["image"]))
    dataset.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    assert_red_and_white(load_source("parquet", root=tmp_path)[0]["image"])
    several = [{**dataset.with_format("arrow")[0].to_pylist()[0]}]
    several[0]["image"] = [several[0]["image"]] * 2
    Dataset.from_list(several, features=row_features(True)).to_parquet(tmp_path / "val-00000-of-00001.parquet")
    for image in load_source("parquet", root=tmp_path, split="val")[0]["image"]:
        assert_red_and_white(image)
    mixture = Mixture([Part("drawn", [str(tmp_path / "train-00000-of-00001.parquet")])], batch_size=1)
    assert_red_and_white(next(iter(mixture))["rows"][0]["image"])
    drawn = np.asarray(draw_row(row))
    assert (drawn == 255).all(-1).any() and not (drawn[:10] == 0).all(-1).any()
