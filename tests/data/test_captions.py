"""Sources of pairs and the store: what is read, what is refused, what a killed or damaged build keeps."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.shards import write_shard
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError, UnknownNameError
from vlprompt.data.captions import open_captions
from vlprompt.data.captions.store import build_store
from vlprompt.data.scenes.attributes import HELD_OUT_STYLES

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


def _image(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    (place / "deep").mkdir(parents=True)
    for number, colour in enumerate(COLOURS):
        name = f"deep/{number}.x" if number else "0"
        (place / f"{name}.png").write_bytes(_image(colour))
        (place / f"{name}.txt").write_text(f" image\n number  {number} ")
    return place


def test_scenes_never_show_what_was_held_out() -> None:
    source = open_captions("scenes:40@5")
    assert len(source) == 40
    assert source.image(3).size == (64, 64)
    assert source.caption(3) == open_captions("scenes:50@5").caption(3)
    assert not {source.pairs.spec(i).style for i in range(40)} & HELD_OUT_STYLES  # type: ignore[attr-defined]


def test_a_folder_pairs_images_with_texts_of_their_name(folder: Path) -> None:
    (folder / "lonely.png").write_bytes(_image((0, 0, 0)))
    with pytest.warns(UserWarning, match="1 of 4 images have no caption"):
        source = open_captions(f"folder:{folder}")
    assert [source.caption(i) for i in range(3)] == [f"image number {i}" for i in range(3)]
    assert [source.image(i).getpixel((0, 0)) for i in range(3)] == list(COLOURS)
    before = source.identity()
    (folder / "0.txt").write_text("something else")
    with pytest.warns(UserWarning, match="no caption"):
        assert open_captions(f"folder:{folder}").identity() != before


@pytest.mark.parametrize(("name", "delimiter"), [("pairs.csv", ","), ("pairs.tsv", "\t")])
def test_a_table_pairs_two_columns(folder: Path, name: str, delimiter: str) -> None:
    lines = ["title,filepath,score", '"red, mostly",0.png,1', "green,deep/1.x.png,2"]
    text = "\n".join(lines)
    if delimiter == "\t":
        text = text.replace('"red, mostly"', "red; mostly").replace(",", "\t").replace(";", ",")
    (folder / name).write_text(text)
    source = open_captions(f"csv:{folder / name}")
    assert [source.caption(i) for i in range(2)] == ["red, mostly", "green"]
    assert source.image(1).getpixel((0, 0)) == COLOURS[1]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("caption,url\na,http://x/1.jpg", "no column of images.*downloaded first"),
        ("image,words\na.png,b", "no column of captions"),
        ("image,caption\n,b", "line 2: column 'image' is empty"),
        ("image,caption\n../secret.png,b", "line 2: .*leaves the table's folder"),
        ("image,caption", "no image with a caption"),
    ],
)
def test_a_wrong_table_is_told_by_line_and_column(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_captions(f"csv:{tmp_path / 't.csv'}")


def test_tar_files_as_webdataset_writes_them(tmp_path: Path) -> None:
    first = {
        "a/1.png": _image(COLOURS[0]),
        "a/1.txt": b"red ",
        "a/2.txt": b"no image",
        "b/1.txt": b"blue",
    }
    last = {"b/1.seg.png": b"another file", "b/1.png": _image(COLOURS[2])}
    write_shard(tmp_path / "0.tar", {**first, **last}.items())
    captions = {"caption": "green\nleaf", "width": 8}
    second = {"9.json": json.dumps(captions).encode(), "9.PNG": _image(COLOURS[1])}
    write_shard(tmp_path / "1.tar", second.items())
    with pytest.warns(UserWarning, match="left out") as warned:
        source = open_captions(f"tar:{tmp_path}/*.tar")
    messages = " ".join(str(warning.message) for warning in warned)
    assert "1 captions have no image and are left out, first 0.tar: a/2.txt" in messages
    assert "1 images have no caption and are left out, first 0.tar: b/1.seg.png" in messages
    assert [source.caption(i) for i in range(len(source))] == ["red", "blue", "green leaf"]
    assert [source.image(i).getpixel((0, 0)) for i in range(3)] == [COLOURS[0], COLOURS[2], COLOURS[1]]
    (tmp_path / "2.tar").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match=r"2\.tar is no readable tar file"):
        open_captions(f"tar:{tmp_path}/*.tar")


def _pair(key: str, caption: bytes, ending: str = "txt") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", _image(COLOURS[0])), (f"{key}.{ending}", caption)]


def test_one_bad_caption_is_named_and_costs_its_pair_alone(tmp_path: Path) -> None:
    bad = {
        "latin": (b"caf\xe9", "txt"), "json": (b"{", "json"), "deep": (b"[" * 100_000, "json"),
        "number": (b'{"caption": 5}', "json"), "long": (b"x" * (2 << 20), "txt"),
    }  # fmt: skip
    members = [pair for i in range(5) for pair in _pair(f"good{i}", b"fine")]
    for key, (data, ending) in bad.items():
        path = write_shard(tmp_path / "s.tar", members + _pair(key, data, ending))
        with pytest.warns(
            UserWarning, match=rf"1 captions can't be read .*, first s\.tar: {key}\.{ending} \("
        ):
            source = open_captions(f"tar:{path}")
        assert [source.caption(i) for i in range(len(source))] == ["fine"] * 5


def test_captions_as_people_write_them(tmp_path: Path) -> None:
    members = [
        *_pair("a", "\ufeffwith a mark".encode()),
        *_pair("b", json.dumps({"caption": ["first", "second"]}).encode(), "json"),
        *_pair("c", json.dumps({"caption": ["only"]}).encode(), "json"),
        *_pair("d", b"\xef\xbb\xbf" + json.dumps({"caption": "text"}).encode(), "json"),
    ]
    with pytest.warns(UserWarning, match=r"1 samples have several captions, .*, first s\.tar: b\.json"):
        source = open_captions(f"tar:{write_shard(tmp_path / 's.tar', members)}")
    assert [source.caption(i) for i in range(len(source))] == ["with a mark", "first", "only", "text"]
    with (
        pytest.warns(UserWarning, match="1 images have no caption"),
        pytest.raises(DataError, match="no image with"),
    ):
        open_captions(f"tar:{write_shard(tmp_path / 's.tar', _pair('e', b'{}', 'json'))}")


def test_keys_with_points_do_not_vanish(tmp_path: Path) -> None:
    members = [pair for i in range(50) for pair in _pair(f"image.{i:04d}", f"number {i}".encode())]
    members += [pair for i in range(50) for pair in _pair(f"{i}", b"plain")]
    source = open_captions(f"tar:{write_shard(tmp_path / 's.tar', members)}")
    assert len(source) == 100
    assert source.caption(7) == "number 7"
    assert source.image(7).size == (8, 6)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.png", "a.jpg", "a.txt"], r"holds a\.jpg beside a\.png: one key, two images"),
        (["a.png", "a.txt", "a.png"], r"holds a\.png twice: one key, two images"),
        (["a.png", "a.txt", "a.txt"], r"holds a\.txt twice"),
        (["a.png", "a.txt", "a.caption"], r"two different captions of a\.caption"),
    ],
)
def test_one_key_means_one_pair(names: list[str], message: str, tmp_path: Path) -> None:
    members = [(name, _image(COLOURS[0]) if "g" in name else name.encode()) for name in names]
    with pytest.raises(DataError, match=message):
        open_captions(f"tar:{write_shard(tmp_path / 's.tar', members)}")


@pytest.mark.parametrize("packer", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_shards_are_read(packer: Callable[[bytes], bytes], tmp_path: Path) -> None:
    members = [("0.png", _image(COLOURS[1])), ("0.txt", b"green"), *_pair("1", b"red")]
    plain = write_shard(tmp_path / "s.tar", members)
    packed = tmp_path / "s.tar.packed"
    packed.write_bytes(packer(plain.read_bytes()))
    source = open_captions(f"tar:{packed}")
    assert [source.caption(i) for i in range(2)] == ["green", "red"]
    with ThreadPoolExecutor(4) as pool:  # a store reads images in threads
        images = list(pool.map(source.image, [0, 1] * 20))
    assert [image.getpixel((0, 0)) for image in images] == [COLOURS[1], COLOURS[0]] * 20

    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(DataError, match="no readable tar file"):
        open_captions(f"tar:{packed}")
    packed.write_bytes(packer(bytes(80 << 20)))  # 80 MiB of nothing in a few bytes
    with pytest.raises(DataError, match=r"would unpack to more than|no readable tar file"):
        open_captions(f"tar:{packed}")


def test_addresses_and_ranges_of_shards(tmp_path: Path) -> None:
    folder = tmp_path / "my shards"
    folder.mkdir()
    for number in (8, 9, 10):
        write_shard(folder / f"s-{number:03d}.tar", _pair("0", str(number).encode()))
    write_shard(folder / "odd[1].tar", _pair("0", b"odd"))

    def captions(name: str) -> list[str]:
        source = open_captions(f"tar:{name}")
        return [source.caption(i) for i in range(len(source))]

    assert captions(f"{folder}/s-{{008..010}}.tar") == ["8", "9", "10"]
    assert captions(f"{folder}/s-*.tar") == ["8", "9", "10"]
    assert captions(f"{folder}/odd[1].tar") == ["odd"]
    assert captions((folder / "s-009.tar").as_uri()) == ["9"]
    assert captions(f"file:{folder}/s-009.tar") == ["9"]
    for name in ("https://example.org/s.tar", "s3://bucket/s.tar", "pipe:cat s.tar", "file://server/s.tar"):
        with pytest.raises(DataError, match="Download the archives first"):
            open_captions(f"tar:{name}")
    os.mkfifo(folder / "pipe.tar")
    with pytest.raises(DataError, match="no regular file"):
        open_captions(f"tar:{folder}/pipe.tar")


def test_archives_that_lie_about_sizes(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "s.tar", _pair("0", b"red"))
    whole = path.read_bytes()
    path.write_bytes(whole[:600])
    with pytest.raises(DataError, match=r"s\.tar is no readable tar file"):
        open_captions(f"tar:{path}")
    info = tarfile.TarInfo("0.png")
    info.pax_headers = {"size": "-1024"}  # leads back to itself
    path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + whole)
    with pytest.raises(DataError, match=r"s\.tar"):
        open_captions(f"tar:{path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('image,caption\n0.png,"a lone quote\n0.png,b\n0.png,c\n', "a quotation mark is not closed"),
        (
            'image,caption\n0.png,"a lone quote\n0.png,b\n0.png,c"\n',
            r"lines 2 to 4 are one row: a quotation mark",
        ),
        ("image,caption\n0.png,red, green\n", r"line 2: 3 fields, but the header has 2"),
        ("image,caption\n0.png\n", r"line 2: column 'caption' is empty"),
        ("image;caption\n0.png;red; green\n", r"line 2: 3 fields, but the header has 2"),
    ],
)
def test_tables_of_captions_lose_nothing_silently(text: str, message: str, folder: Path) -> None:
    (folder / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_captions(f"csv:{folder / 't.csv'}")


@pytest.mark.parametrize(
    "text",
    [
        "file_name, caption\n0.png, red\n",
        "image;caption\n0.png;red\n",
        "image\tcaption\n0.png\tred\n",
        "image,caption\n0.png,red\n,\n\n,\n",
        "\ufeffimage,caption\n./0.png,red\n",
        "image,caption\n{folder}/0.png,red\n",
    ],
)
def test_tables_of_captions_as_people_write_them(text: str, folder: Path) -> None:
    (folder / "t.csv").write_text(text.replace("{folder}", str(folder)))
    source = open_captions(f"csv:{folder / 't.csv'}")
    assert [source.caption(i) for i in range(len(source))] == ["red"]
    assert source.image(0).size == (8, 6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scenes:many", "COUNT at least 1"),
        ("scenes:", "write scenes:COUNT"),
        ("folder:nowhere", "no folder 'nowhere'"),
        ("csv:nowhere.csv", "no file"),
        ("tar:nowhere*.tar", "no archive matches"),
    ],
)
def test_a_name_that_means_nothing_is_explained(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_captions(name)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'folder'"):
        open_captions("foldr:x")


def test_a_store_holds_what_the_backbone_says(backbone: Backbone, tmp_path: Path) -> None:
    store = build_store("scenes:10", backbone, tmp_path / "store", shard=4)
    source = open_captions("scenes:10")
    pixels = torch.stack([backbone.preprocess(source.image(i)) for i in range(10)])
    texts = [source.caption(i) for i in range(10)]
    torch.testing.assert_close(store.image.all(), backbone.encode_image(pixels), rtol=0, atol=2e-3)
    torch.testing.assert_close(store.text.all(), backbone.encode_text(texts), rtol=0, atol=2e-3)
    assert torch.equal(store.image.take([9, 0, 4]), store.image.all()[[9, 0, 4]])
    assert store.caption(7) == texts[7]
    assert torch.equal(store.pixels(7, backbone.preprocess), pixels[7])
    assert {s.dtype for s in store.image.shards} == {torch.float16}


def test_a_build_that_was_cut_keeps_its_shards(backbone: Backbone, tmp_path: Path) -> None:
    whole = build_store("scenes:10", backbone, tmp_path / "whole", shard=4)
    cut = tmp_path / "cut"

    def stop(what: str, done: int, total: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_store("scenes:10", backbone, cut, shard=4, progress=stop)
    kept = {p.name: p.stat().st_mtime_ns for p in cut.glob("*.safetensors")}
    assert len(kept) == 2
    (cut / "shard-00001.safetensors").write_bytes(b"half of a shard")
    resumed = build_store("scenes:10", backbone, cut, shard=4)
    assert torch.equal(resumed.image.all(), whole.image.all())
    assert torch.equal(resumed.text.all(), whole.text.all())
    assert (cut / "shard-00000.safetensors").stat().st_mtime_ns == kept["shard-00000.safetensors"]
    assert resumed.digest == whole.digest


def test_another_store_is_refused_by_what_differs(
    backbone: Backbone, make_backbone: object, tmp_path: Path
) -> None:
    build_store("scenes:6", backbone, tmp_path, shard=4)
    with pytest.raises(CheckpointError, match=r"count is 6 there and 7 here"):
        build_store("scenes:7", backbone, tmp_path, shard=4)
    with pytest.raises(CheckpointError, match=r"backbone is "):
        build_store("scenes:6", make_backbone(seed=3), tmp_path, shard=4)  # type: ignore[operator]


def test_unreadable_images_are_left_out_and_told(
    backbone: Backbone, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "deep" / "1.x.png").write_bytes(b"no image")
    store = build_store(f"folder:{folder}", backbone, tmp_path / "store")
    assert store.index.tolist() == [0, 2]
    assert list(store.skipped) == [1]
    assert "1.x.png" in store.skipped[1]
    assert "1 of 3 images can't be read" in caplog.text
    assert store.caption(1) == "image number 2"
    assert np.isfinite(store.image.all().numpy()).all()
