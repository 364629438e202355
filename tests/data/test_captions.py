"""Sources of pairs and the store: what is read, what is refused, what a killed or damaged build keeps."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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


def _archive(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tar_files_as_webdataset_writes_them(tmp_path: Path) -> None:
    first = {
        "a/1.png": _image(COLOURS[0]),
        "a/1.txt": b"red ",
        "a/2.txt": b"no image",
        "b/1.txt": b"blue",
    }
    _archive(tmp_path / "0.tar", {**first, "b/1.seg.png": b"another file", "b/1.png": _image(COLOURS[2])})
    captions = {"caption": "green\nleaf", "width": 8}
    _archive(tmp_path / "1.tar", {"9.json": json.dumps(captions).encode(), "9.PNG": _image(COLOURS[1])})
    source = open_captions(f"tar:{tmp_path}/*.tar")
    assert [source.caption(i) for i in range(len(source))] == ["red", "blue", "green leaf"]
    assert [source.image(i).getpixel((0, 0)) for i in range(3)] == [COLOURS[0], COLOURS[2], COLOURS[1]]
    (tmp_path / "2.tar").write_bytes(b"x" * 1000)
    with pytest.raises(DataError, match=r"2\.tar is no readable tar file"):
        open_captions(f"tar:{tmp_path}/*.tar")


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
