"""Images as cameras, phones and instruments write them."""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.folders import fill, image, tree
from vlprompt.core.errors import DataError
from vlprompt.core.pixels import to_rgb
from vlprompt.data import load_dataset, read_image, verify
from vlprompt.data.base import Sample
from vlprompt.data.decoding import Decoding, decode
from vlprompt.data.images import FileReader, ImageDataset


def greys(path: Path, value_range: tuple[float, float] | None = None) -> list[int]:
    return np.asarray(read_image(path, Decoding(value_range=value_range)))[0, :, 0].tolist()


def one(path: Path) -> ImageDataset:
    return ImageDataset(
        "mine", "train", (Sample(path.name, 0),), ("a", "b"), ("{}",), FileReader(path.parent)
    )


# --- orientation


def jpeg_with_exif(block: bytes) -> bytes:
    buffer = io.BytesIO()
    image(1, (16, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    segment = b"Exif\0\0" + block
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def exif_block(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()[6:]


MALFORMED = [
    b"",
    b"II",
    b"MM\0*\0\0\0\x08\xff\xff",
    b"II*\0\xff\xff\xff\xff",
    b"garbage garbage",
    exif_block(6)[:-7],
    exif_block(3).replace(b"\x12\x01\x03\0", b"\x12\x01\x0c\0"),
    exif_block(99),
]


@pytest.mark.parametrize("block", MALFORMED)
@pytest.mark.filterwarnings("ignore")
def test_a_malformed_block_stops_nothing(tmp_path: Path, block: bytes) -> None:
    """Checking and reading agree: such an image is sound, and stays as it lies."""
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_with_exif(block))
    assert verify(one(path)).bad == ()
    assert read_image(path).size == (16, 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_opened_image_is_turned_as_its_path_is(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_with_exif(exif_block(orientation)))
    from_path = read_image(path)
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(to_rgb(opened)), np.asarray(from_path))
    assert from_path.size == ((16, 8) if orientation < 5 else (8, 16))
    assert np.array_equal(np.asarray(to_rgb(from_path)), np.asarray(from_path))  # only once
    assert np.array_equal(np.asarray(decode(path.read_bytes(), "a")), np.asarray(from_path))


# --- more than 8 bits


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 2048, 4095]], np.uint16), [0, 127, 255]),  # 12 bits in 16
        (np.array([[0, 512, 1023]], np.uint16), [0, 127, 255]),
        (np.array([[0, 257, 65535]], np.uint16), [0, 1, 255]),
        (np.array([[0, 100, 255]], np.uint16), [0, 100, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 127, 255]),  # signed
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 100.4, 255.0]], np.float32), [0, 100, 255]),
        (np.array([[-500.0, 0.0, 500.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.5, np.inf]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.nan, np.nan]], np.float32), [0, 0, 0]),
        (np.array([[7, 7, 7]], np.int32), [7, 7, 7]),
        (np.array([[0, 50_000, 100_000]], np.int32), [0, 127, 255]),
        (np.array([[-7, -7, -7]], np.int32), [0, 0, 0]),
    ],
)
def test_deep_greys_are_scaled_by_their_range(
    tmp_path: Path, values: np.ndarray, expected: list[int]
) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert greys(tmp_path / "a.tif") == expected


def test_the_range_that_a_file_declares_comes_before_the_measured_one(tmp_path: Path) -> None:
    values = Image.fromarray(np.array([[0, 1000, 2000]], np.uint16))
    values.save(tmp_path / "a.tif", tiffinfo={281: 3999})
    assert greys(tmp_path / "a.tif") == [0, 63, 127]
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095))
    assert greys(tmp_path / "a.pgm") == [0, 127, 255]
    (tmp_path / "dark.pgm").write_bytes(b"P5 3 1 4095\n" + struct.pack(">3H", 0, 128, 256))
    assert max(greys(tmp_path / "dark.pgm")) <= 16


def test_the_range_can_be_set_and_is_named(tmp_path: Path) -> None:
    name = tree(tmp_path, "cat", "dog")
    for folder in ("cat", "dog"):
        for number in range(3):
            pixels = np.full((4, 4), 1000 + 1000 * number, np.uint16)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number:03d}.png")
    with pytest.warns(
        UserWarning, match=r"values 0 to 4095 \(measured\) scaled to 8 bits \(4 images\).*value_range="
    ):
        measured = load_dataset(name, "all")
    with pytest.warns(UserWarning, match=r"values 0 to 8000 \(set\) scaled"):
        chosen = load_dataset(name, "all", value_range=[0, 8000])
    assert [chosen[i][0].getpixel((0, 0))[0] for i in range(3)] == [31, 63, 95]
    assert measured.key(0) != chosen.key(0)  # stored features are not shared
    with pytest.raises(DataError, match="what becomes black and what becomes white"):
        load_dataset(name, "all", value_range=[3, 3])


# --- large ones


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_photograph_of_108_megapixels_is_read(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    Image.new("RGB", (12032, 9024), (200, 40, 40)).save(path, quality=30)
    large = read_image(path)
    assert large.size == (6016, 4512)  # decoded at half its size
    assert np.abs(np.array(large.getpixel((3000, 2000))) - (200, 40, 40)).max() < 6
    assert verify(one(path)).bad == ()
    with pytest.raises(DataError, match=r"12032 x 9024 pixels, more than 50,000,000 \(max_pixels\)"):
        read_image(path, Decoding(max_pixels=50_000_000))


def test_the_limit_is_an_option_up_to_pillows_own(tmp_path: Path) -> None:
    name = tree(tmp_path, "cat", "dog")
    assert len(load_dataset(name, "all", max_pixels=48)) == 6
    with pytest.raises(DataError, match="more than 47"):
        load_dataset(name, "all", max_pixels=47)
    with pytest.raises(DataError, match="must be 1 to 178,956,970"):
        load_dataset(name, "all", max_pixels=178_956_971)


# --- files that are none


def test_pipes_and_devices_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    for path, kind in (
        (tmp_path / "a.jpg", "a named pipe"),
        (Path("/dev/zero"), "a device"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(DataError, match=f"it is {kind}, not a regular file"):
            read_image(path)
    with pytest.raises(DataError, match="named pipe"):
        FileReader(tmp_path).key("a.jpg")
    assert "named pipe" in verify(one(tmp_path / "a.jpg")).bad[0].reason
    with pytest.raises(DataError, match="null character"):
        read_image("a\0b.jpg")
    with pytest.raises(DataError, match="name"):
        read_image("x" * 5000 + ".jpg")


def test_programs_are_not_started_by_a_file(tmp_path: Path) -> None:
    """Pillow would hand PostScript to Ghostscript, whatever the file's ending."""
    (tmp_path / "a.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    )
    with pytest.raises(DataError, match="no image in a known format"):
        read_image(tmp_path / "a.jpg")


def test_avif_and_jpeg_2000_are_read(tmp_path: Path) -> None:
    for ending in ("avif", "jp2"):
        fill(tmp_path, 1, ending)
        assert read_image(tmp_path / f"000.{ending}").size == (8, 6)
