"""Colours of 16 bits a channel in PNG and TIFF, from files, bytes, opened images and archives."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.pixels import to_rgb
from vlprompt.data import read_image
from vlprompt.data.decoding import Decoding, decode, read_with_note
from vlprompt.data.images import FileReader
from vlprompt.data.inputs import open_image
from vlprompt.data.zipped import ZipReader

Array = np.ndarray[Any, Any]

# (H, W, channels): a 12-bit photograph, whose upper bytes alone would be almost black.
COLOURS = np.random.default_rng(0).integers(0, 4096, (5, 7, 4)).astype(np.uint16)
COLOURS[0, 0, :3] = 4095
COLOURS[..., 3] = 65535
EXPECTED = COLOURS[..., :3].astype(int) * 255 // 4095


def png(values: Array, chunks: bytes = b"") -> bytes:
    """A PNG of 16 bits a channel, whose rows take all of the filters 0, 1 and 2."""
    height, width, channels = values.shape
    step = 2 * channels
    rows = [np.frombuffer(row.astype(">u2").tobytes(), np.uint8).astype(int) for row in values]
    raw = b""
    for y, row in enumerate(rows):
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        above = rows[y - 1] if y else np.zeros_like(row)
        subtracted = (np.zeros_like(row), left, above)[y % 3]
        raw += bytes([y % 3]) + ((row - subtracted) % 256).astype(np.uint8).tobytes()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def tiff(
    values: Array, order: str = "<", *, deflated: bool = False, planes: bool = False, **tags: list[int]
) -> bytes:
    """A TIFF of 16 bits a channel; further tags as ``t262=[0]``."""
    height, width, channels = values.shape
    parts = [values[..., i] for i in range(channels)] if planes else [values]
    data = [part.astype(f"{order}u2").tobytes() for part in parts]
    data = [zlib.compress(part) for part in data] if deflated else data

    entries: dict[int, list[int]] = {
        256: [width], 257: [height], 258: [16] * channels, 259: [8 if deflated else 1],
        262: [2 if channels > 2 else 1], 273: [0] * len(data), 277: [channels], 278: [height],
        279: [len(part) for part in data], 284: [2 if planes else 1],
    }  # fmt: skip
    entries |= {int(name[1:]): numbers for name, numbers in tags.items()}

    end = 8 + 2 + 12 * len(entries) + 4
    place = end + sum(4 * len(numbers) for numbers in entries.values() if len(numbers) > 1)
    for index, part in enumerate(data):
        entries[273][index] = place
        place += len(part)

    directory = far = b""
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            far, packed = far + packed, struct.pack(f"{order}I", end + len(far))
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed

    start = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    return start + struct.pack(f"{order}H", len(entries)) + directory + bytes(4) + far + b"".join(data)


FILES = {
    "png": png(COLOURS[..., :3]),
    "png with alpha": png(COLOURS),
    **{
        f"tiff {order} {deflated} {channels}": tiff(COLOURS[..., :channels], order, deflated=deflated)
        for order in "<>"
        for deflated in (False, True)
        for channels in (3, 4)
    },
}


@pytest.mark.parametrize("kind", FILES)
def test_all_bits_of_a_channel_count(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(FILES[kind])
    np.testing.assert_array_equal(np.asarray(read_image(path)), EXPECTED)
    np.testing.assert_array_equal(np.asarray(decode(FILES[kind], "a")), EXPECTED)
    np.testing.assert_array_equal(np.asarray(open_image(Image.open(path))), EXPECTED)

    reader = FileReader(tmp_path)
    assert reader.check("a.png") == ""
    assert reader.note("a.png") == "values 0 to 4095 (measured) scaled to 8 bits"
    assert "16 bits a channel: values 0 to 4095 (measured)" in read_with_note(path)[1]

    ranged = FileReader(tmp_path, Decoding(value_range=(0, 2047)))
    assert ranged.note("a.png") == "values 0 to 2047 (set) scaled to 8 bits"
    expected = np.minimum(COLOURS[..., :3].astype(int), 2047) * 255 // 2047
    np.testing.assert_array_equal(np.asarray(ranged.read("a.png")), expected)


def test_eight_bits_take_no_other_way(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 60, (6, 5, 3)).astype(np.uint8)
    for ending in ("png", "tif"):
        Image.fromarray(pixels).save(tmp_path / f"a.{ending}")
        np.testing.assert_array_equal(np.asarray(read_image(tmp_path / f"a.{ending}")), pixels)
        assert FileReader(tmp_path).note(f"a.{ending}") == ""


def test_the_range_of_a_tiff_is_what_it_declares(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(COLOURS[..., :3], t281=[16383] * 3))
    expected = COLOURS[..., :3].astype(int) * 255 // 16383
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.tif")), expected)


@pytest.mark.parametrize("deflated", [False, True])
def test_planes_that_would_be_misread_are_refused(tmp_path: Path, deflated: bool) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(COLOURS[..., :3], planes=True, deflated=deflated))
    assert "plane of its own" in FileReader(tmp_path).check("a.tif")
    with pytest.raises(DataError, match=r"a\.tif.*save it with interleaved channels"):
        read_image(tmp_path / "a.tif")


def test_transparency_of_sixteen_bits_lies_on_white(tmp_path: Path) -> None:
    colours = np.full((2, 2, 4), 65535, np.uint16)
    colours[..., 1:3] = 0
    colours[0, 0, 3] = 0
    assert np.asarray(decode(png(colours), "a"))[0].tolist() == [[255, 255, 255], [255, 0, 0]]

    key = struct.pack(">HHH", 65535, 0, 0)
    chunk = struct.pack(">I", 6) + b"tRNS" + key + struct.pack(">I", zlib.crc32(b"tRNS" + key))
    colours[1, 1, 0] = 65534
    pixels = np.asarray(decode(png(colours[..., :3], chunk), "a"))
    assert pixels[0].tolist() == [[255, 255, 255]] * 2
    assert pixels[1, 1].tolist() == [254, 0, 0]


def test_greys_with_alpha_keep_all_bits() -> None:
    greys = COLOURS[..., :2].copy()
    greys[..., 1] = 65535
    pixels = np.asarray(decode(png(greys), "a"))
    expected = greys[..., 0].astype(int) * 255 // 4095
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, 2))


def test_greys_whose_zero_is_white_are_not_negatives() -> None:
    greys = COLOURS[..., :1]
    positive = np.asarray(decode(tiff(greys), "a")).astype(int)
    negative = np.asarray(decode(tiff(greys, t262=[0]), "a"))
    np.testing.assert_array_equal(negative, 255 - positive)


def test_orientation_is_applied_to_deep_colours() -> None:
    turned = np.asarray(decode(tiff(COLOURS[..., :3], t274=[6]), "a"))
    np.testing.assert_array_equal(turned, np.rot90(EXPECTED, -1))


def test_an_image_that_was_decoded_before_is_taken_as_it_is() -> None:
    image = Image.open(io.BytesIO(FILES["png"]))
    image.load()
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), COLOURS[..., :3] >> 8)


@pytest.mark.parametrize("damage", [40, 60, -30])
def test_damage_is_found_by_checking_and_reading(tmp_path: Path, damage: int) -> None:
    for name in ("png", "tiff < True 3", "tiff < False 3"):
        (tmp_path / name).write_bytes(FILES[name][:damage])
        assert FileReader(tmp_path).check(name)
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


def test_archives_have_a_range_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, data in {"colour.png": FILES["png"], "grey.png": png(COLOURS[..., :1])}.items():
            archive.writestr(name, data)
            (tmp_path / name).write_bytes(data)

    for limits in (None, (0.0, 2047.0)):
        zipped = ZipReader(tmp_path, Decoding(value_range=limits))
        unpacked = FileReader(tmp_path, Decoding(value_range=limits))
        for name in ("colour.png", "grey.png"):
            source = f"a.zip@{name}"
            np.testing.assert_array_equal(np.asarray(zipped.read(source)), np.asarray(unpacked.read(name)))
            assert zipped.check(source) == ""
            assert zipped.note(source) == unpacked.note(name) != ""
            assert zipped.note(name) == unpacked.note(name)
            assert zipped.key(source) == unpacked.key(name)


def test_nothing_is_said_on_the_way() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in FILES.values():
            decode(data, "a")
