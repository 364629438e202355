from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.pixels import to_rgb
from vlprompt.data import FileReader, ImageDataset, Sample, load_dataset, read_image, verify
from vlprompt.data.decoding import Decoding
from vlprompt.data.images import drop_bad


def make_image(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def dataset_of(folder: Path, names: list[str]) -> ImageDataset:
    samples = tuple(Sample(n, i % 2) for i, n in enumerate(names))
    return ImageDataset("mine", "train", samples, ("a", "b"), ("{}",), FileReader(folder))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = make_image()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees counter-clockwise to see it upright
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(
        np.asarray(read_image(tmp_path / "a.png")), np.asarray(image.rotate(-90, expand=True))
    )


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1", "LA", "RGBA", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    ending = "tif" if mode in ("CMYK", "YCbCr") else "png"
    path = tmp_path / f"a.{ending}"
    image = make_image().convert(mode)
    # Pillow before 13 can't read the YCbCr that it writes without a compression.
    image.save(path, compression="tiff_lzw" if mode == "YCbCr" else None)
    for found in (read_image(path), to_rgb(image)):
        assert found.mode == "RGB"
        assert found.size == (24, 16)


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    middle = read_image(tmp_path / "a.jpg").getpixel((8, 8))
    assert np.abs(np.array(middle) - (200, 40, 40)).max() < 12


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png"))[0, :, 0], np.arange(256))


def test_float_greys_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "a.tif")
    assert np.asarray(read_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_file_is_named(tmp_path: Path, ending: str, share: float) -> None:
    path = tmp_path / f"broken.{ending}"
    make_image(200, 150).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=f"broken.{ending}"):
        read_image(path)
    report = verify(dataset_of(tmp_path, [path.name]))
    assert [b.name for b in report.bad] == [path.name]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"hello, I am no image", "no image in a known format")],
)
def test_no_image_at_all(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=f"a.jpg: .*{reason}"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="does not exist"):
        read_image(tmp_path / "b.jpg")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12_000, 60_000])
def test_huge_declared_size_is_refused_before_decoding(tmp_path: Path, side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(DataError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png")


def test_a_thread_of_pixels_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (1, 501)).save(tmp_path / "thread.png")
    Image.new("RGB", (2, 1000)).save(tmp_path / "ribbon.png")
    with pytest.raises(DataError, match=r"thread\.png: its sides are too unequal: 1 x 501 pixels"):
        read_image(tmp_path / "thread.png")
    assert read_image(tmp_path / "ribbon.png").size == (2, 1000)


def test_key_follows_the_bytes_not_the_name(tmp_path: Path) -> None:
    make_image(seed=1).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    reader = FileReader(tmp_path)
    before = reader.key("a.png")
    assert before == reader.key("b.png")
    make_image(25, seed=2).save(tmp_path / "a.png")
    assert reader.key("a.png") != before
    with pytest.raises(DataError, match=r"gone\.png"):
        reader.key("gone.png")


def _forty_with_one_broken(folder: Path) -> ImageDataset:
    names = [f"{i:02d}.png" for i in range(40)]
    for i, name in enumerate(names):
        make_image(seed=i).save(folder / name)
    (folder / "07.png").write_bytes(b"\x89PNG\r\n")
    return dataset_of(folder, names)


def test_skip_names_counts_and_leaves_out(tmp_path: Path) -> None:
    data = _forty_with_one_broken(tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 40 images can't be read: 07\.png"):
        kept = drop_bad(data, "skip", max_share=0.05)
    assert len(kept) == 39
    assert "07.png" not in {s.source for s in kept.samples}
    assert kept.info["skipped"] == ["07.png"]


def test_error_policy_and_too_many_are_fatal(tmp_path: Path) -> None:
    data = _forty_with_one_broken(tmp_path)
    with pytest.raises(DataError, match=r"07\.png .*on_bad_image='skip'"):
        drop_bad(data, "error", max_share=0.05)
    with pytest.raises(DataError, match=r"2\.5% of 40, more than the 2\.0%"):
        drop_bad(data, "skip", max_share=0.02)


def test_verify_sees_a_file_that_changed(tmp_path: Path) -> None:
    data = _forty_with_one_broken(tmp_path)
    assert len(verify(data).bad) == 1
    make_image().save(tmp_path / "07.png")
    assert verify(data).bad == ()
    (tmp_path / "08.png").unlink()
    assert [b.reason for b in verify(data).bad] == ["does not exist"]


def test_quick_check_decodes_no_less_than_reading(tmp_path: Path) -> None:
    """A progressive JPEG cut anywhere is found by the reduced decoding of the verification pass too."""
    buffer = io.BytesIO()
    make_image(160, 120).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    for cut in range(10, len(whole) - 2, len(whole) // 12):
        path = tmp_path / f"{cut}.jpg"
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            read_image(path)
        assert len(verify(dataset_of(tmp_path, [path.name])).bad) == 1


@pytest.mark.parametrize(
    ("side", "size"), [(0, (800, 600)), (301, (800, 600)), (300, (400, 300)), (76, (200, 150))]
)
def test_large_jpegs_are_decoded_at_a_fraction(tmp_path: Path, side: int, size: tuple[int, int]) -> None:
    smooth = make_image(8, 6).resize((800, 600), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth.save(tmp_path / "a.jpg", quality=95, exif=exif)
    smooth.save(tmp_path / "a.png")

    image = read_image(tmp_path / "a.jpg", Decoding(jpeg_side=side))
    assert image.size == size[::-1]  # a quarter turn
    expected = smooth.rotate(-90, expand=True).resize(image.size, Image.Resampling.BOX)
    difference = np.abs(np.asarray(image, float) - np.asarray(expected, float))
    assert difference.mean() < 2  # of 255; the decoder's scaling and its losses
    assert read_image(tmp_path / "a.png", Decoding(jpeg_side=side)).size == (
        800,
        600,
    )  # only JPEGs know fractions


def test_how_jpegs_are_decoded_belongs_to_the_key_and_to_load_dataset(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            path = tmp_path / name / f"{number}.jpg"
            make_image(320, 240, seed=number).save(path, quality=95)

    whole = load_dataset(f"folder:{tmp_path}", "all")
    quick = load_dataset(f"folder:{tmp_path}", "all", jpeg_side=60)
    assert {quick[i][0].size for i in range(len(quick))} == {(80, 60)}
    assert whole[0][0].size == (320, 240)
    assert quick.key(0) == f"{whole.key(0)};side=60"
    corrupted = load_dataset(f"folder:{tmp_path}-c:fog:1", "test", jpeg_side=60)
    assert ";side=60|" in corrupted.key(0)
    with pytest.raises(DataError, match="jpeg_side is a whole number of at least 0; got -1"):
        load_dataset(f"folder:{tmp_path}", "all", jpeg_side=-1)
