"""tar:PATTERN with labels: webdataset's archives as a classification data set."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import vlprompt
from tests.commands import Command
from tests.data.shards import write_shard
from vlprompt.adaptation.stream import adapt_dataset
from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.data.catalog import open_split
from vlprompt.data.fingerprint import data_fingerprint
from vlprompt.data.loading import Loader

NAMES = ("circle", "square", "star")


def png(colour: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), (colour % 256, colour // 256, 7)).save(out, "PNG")
    return out.getvalue()


def numbered(first: int, count: int, label: Callable[[int], bytes]) -> dict[str, bytes]:
    """Members of some samples, each image of a colour of its own."""
    members = {}
    for number in range(first, first + count):
        members[f"{number:06d}.png"] = png(number)
        members[f"{number:06d}.cls"] = label(number)
    return members


def colours(data: ImageDataset) -> list[int]:
    pixels = [data[i][0].getpixel((0, 0)) for i in range(len(data))]
    return [red + 256 * green for red, green, _ in pixels]  # type: ignore[misc]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three archives of ten images; the class is the number of the image modulo 3."""
    for shard in range(3):
        labels = numbered(10 * shard, 10, lambda number: NAMES[number % 3].encode())
        write_shard(tmp_path / f"s-{shard:03d}.tar", labels.items())
    return tmp_path


def test_archives_are_a_data_set_that_is_cut_where_no_name_says_a_split(shards: Path) -> None:
    name = f"tar:{shards}/s-{{000..002}}.tar"
    parts = {split: load_dataset(name, split) for split in ("train", "val", "test")}
    seen = [colour for part in parts.values() for colour in colours(part)]
    assert sorted(seen) == list(range(30))
    assert [len(part) for part in parts.values()] == [18, 6, 6]
    for part in parts.values():
        assert part.classnames == NAMES
        assert part.labels == [colour % 3 for colour in colours(part)]
    assert parts["train"].info["archives"] == 3

    # The same images are in the same part, whatever further archives there are.
    write_shard(shards / "s-003.tar", numbered(30, 10, lambda number: NAMES[number % 3].encode()).items())
    more = {split: set(colours(load_dataset(f"tar:{shards}/*.tar", split))) for split in parts}
    kept = sum(len(more[split] & set(colours(part))) for split, part in parts.items())
    assert kept >= 27

    assert sorted(colours(load_dataset(name, "all"))) == list(range(30))
    drawn = load_dataset(name, "train", shots=2, seed=3)
    assert [drawn.labels.count(label) for label in range(3)] == [2, 2, 2]
    assert colours(drawn) == colours(load_dataset(name, "train", shots=2, seed=3))


@pytest.mark.parametrize("pattern", ["{}-{:03d}.tar", "imagenet_{}_{}.tar", "{}/{:03d}.tar", "{}{}.tar"])
def test_names_of_archives_or_folders_say_splits(tmp_path: Path, pattern: str) -> None:
    for first, split in enumerate(("train", "validation", "test")):
        for part in (0, 1):
            members = numbered(20 * first + 10 * part, 10, lambda number: str(number % 3).encode())
            write_shard(
                tmp_path / pattern.format(split, part), {"classes.txt": b"a\nb\nc\n", **members}.items()
            )
    name = f"tar:{tmp_path}/**/*.tar" if "/" in pattern else f"tar:{tmp_path}/*.tar"
    if "/" in pattern:
        name = f"tar:{tmp_path}/*/*.tar"
    for first, split in enumerate(("train", "val", "test")):
        data = load_dataset(name, split)
        assert colours(data) == list(range(20 * first, 20 * first + 20))
        assert data.info["split_source"] == "names of the archives"
    assert len(load_dataset(name, "train", splits="cut")) == 36


def test_val_comes_from_train_and_other_splits_are_not_made_up(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0.tar", numbered(0, 30, lambda number: NAMES[number % 3].encode()).items())
    name = f"tar:{tmp_path}/train-*.tar"
    train, val = load_dataset(name), load_dataset(name, "val")
    assert [len(train), len(val)] == [24, 6]
    assert not set(colours(train)) & set(colours(val))
    assert len(load_dataset(name, validation=False)) == 30
    with pytest.raises(UnknownNameError, match=r"unknown split.*'test'.*Known: train\..*splits='cut'"):
        load_dataset(name, "test")

    write_shard(tmp_path / "other.tar", numbered(30, 3, lambda number: NAMES[number % 3].encode()).items())
    with pytest.raises(DataError, match=r"train-0\.tar says train, that of other\.tar says no split"):
        load_dataset(f"tar:{tmp_path}/*.tar")
    write_shard(tmp_path / "train-val.tar", [])
    with pytest.raises(DataError, match=r"train-val\.tar says train and val"):
        load_dataset(f"tar:{tmp_path}/train*.tar")


def test_numbers_need_names_from_the_caller_a_list_or_the_labels(tmp_path: Path) -> None:
    members = numbered(0, 12, lambda number: f" {number % 3}\n".encode())
    name = f"tar:{write_shard(tmp_path / 's.tar', members.items())}"
    with pytest.raises(
        DataError, match=r"doesn't say what its classes are called. .*labels 0 to 2.*classnames\.txt"
    ):
        load_dataset(name)
    assert open_split(name, "train").classnames == (
        "0",
        "1",
        "2",
    )  # what is there is fingerprinted all the same
    assert len(data_fingerprint(name)) == 12
    assert load_dataset(name, classnames=list(NAMES)).classnames == NAMES
    with pytest.raises(DataError, match="classnames needs 3 names in order"):
        load_dataset(name, classnames=["a", "b"])

    (tmp_path / "classnames.txt").write_text("red thing\nblue_thing\ngreen\nunseen\n")
    assert load_dataset(name).classnames == ("red thing", "blue thing", "green", "unseen")
    (tmp_path / "classnames.txt").write_text("red\nblue\n")
    with pytest.raises(DataError, match="the list has 2 class names, but labels go up to 2"):
        load_dataset(name)

    inside = write_shard(tmp_path / "b" / "s.tar", {"classes.txt": b"x\ny\nz\n", **members}.items())
    assert load_dataset(f"tar:{inside}").classnames == ("x", "y", "z")
    (tmp_path / "b" / "classnames.txt").write_text("x\ny\nq\n")
    with pytest.raises(DataError, match=r"s\.tar and .*classnames\.txt hold different lists"):
        load_dataset(f"tar:{inside}")


def json_shard(path: Path, records: list[object]) -> str:
    members = {}
    for number, record in enumerate(records):
        members[f"{number}.jpg"] = png(number)
        members[f"{number}.json"] = json.dumps(record).encode()
    return f"tar:{write_shard(path, members.items())}"


def test_labels_in_json(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    both = [{"label": n % 2, "class_name": NAMES[n % 2], "width": 8} for n in range(8)]
    data = load_dataset(json_shard(path, both), "all")
    assert (data.classnames, data.labels) == (NAMES[:2], [0, 1] * 4)

    names = [{"cls": NAMES[1 - n % 2]} for n in range(8)]
    data = load_dataset(json_shard(path, names), "all")
    assert (data.classnames, data.labels) == (NAMES[:2], [1, 0] * 4)

    other = json_shard(path, [{"kind": n % 2, "label": 5} for n in range(8)])
    assert load_dataset(other, "all", label_key="kind", classnames=["a", "b"]).labels == [0, 1] * 4

    with pytest.raises(DataError, match=r"may be 'label' or 'target'; say which: label_key='label'"):
        load_dataset(json_shard(path, [{"label": 1, "target": 0}]), "all")
    twice = json_shard(path, [{"label": n > 0, "label_name": NAMES[n]} for n in range(3)])
    with pytest.raises(DataError, match=r"no image with a label\. 3 labels can't be read"):
        load_dataset(twice, "all")  # true and false are no numbers
    twice = json_shard(path, [{"label": min(n, 1), "label_name": NAMES[n]} for n in range(3)])
    with pytest.raises(DataError, match=r"class 1 is 'star' at s\.tar@2\.jpg and 'square' before"):
        load_dataset(twice, "all")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"5.json": b'{"label": 1}', "5.png": png(5), "5.cls": b"2"},
            r"the label of 5 is 1, and 2 in 5\.cls",
        ),
        (
            {"5.png": png(5), "5.cls": b"circle"},
            r"all numbers or all names; s\.tar@0{6}\.png has 0, s\.tar@5\.png 'circle'",
        ),
        ({"5.png": png(5), "5.jpg": png(6)}, r"holds 5\.jpg beside 5\.png: one key, two images"),
        ({"5.png": png(5), "5.cls": b"1", "5.CLS": b"1"}, r"holds 5\.CLS twice"),
        ({"classes.txt": b"\n"}, r"classes\.txt names no class"),
        ({"classes.txt": b"\xff"}, r"classes\.txt is no list of class names"),
    ],
)
def test_contradictions_are_errors(tmp_path: Path, extra: dict[str, bytes], message: str) -> None:
    members = numbered(0, 4, lambda number: str(number % 2).encode())
    path = write_shard(tmp_path / "s.tar", {**members, **extra}.items())
    with pytest.raises(DataError, match=message):
        load_dataset(f"tar:{path}", "all", classnames=["a", "b"])


def test_what_has_no_label_is_left_out_and_counted(tmp_path: Path) -> None:
    extra = {
        "a.png": png(100), "b.cls": b"1", "c.png": png(101), "c.cls": b"\xe9", "d.png": png(102), "d.json": b"[1]",
        "e.png": png(103), "e.cls": b"-1", "f.png": png(104), "f.json": b'{"label": 1.5}', "readme.md": b"hello",
        "g.png": png(105), "g.cls": b"", "h.png": png(106), "h.json": b'{"label": 123456789}', "._x.png": b"mac",
        "i.png": png(107), "i.json": b"[" * 100_000,
    }  # fmt: skip
    members = numbered(0, 40, lambda number: str(number % 2).encode())
    path = write_shard(tmp_path / "s.tar", {**members, **extra}.items())
    with pytest.warns(UserWarning, match="left out") as warned:
        data = load_dataset(f"tar:{path}", "all", classnames=["a", "b"])
    assert len(data) == 40
    counts = data.info["left_out"]
    assert sum(counts.values()) == 10  # every member but the hidden one is counted with its sample
    assert counts["images have no label and are left out"] == 2
    assert counts["labels have no image and are left out"] == 1
    assert counts["labels can't be read and are left out"] == 6
    messages = " ".join(str(warning.message) for warning in warned)
    assert "6 labels can't be read and are left out, first s.tar: c.cls" in messages
    assert "1 members are no images and no labels and are left out, first s.tar: readme.md" in messages

    only = write_shard(tmp_path / "t.tar", {"a.png": png(1), "a.txt": b"a caption"}.items())
    with pytest.raises(DataError, match=r"no image with a label\. 1 members .*; 1 images have no label"):
        load_dataset(f"tar:{only}")


def test_unreadable_images_are_skipped_as_everywhere(tmp_path: Path) -> None:
    members = numbered(0, 40, lambda number: str(number % 2).encode())
    members["000003.png"] = members["000003.png"][:40]
    path = write_shard(tmp_path / "s.tar", members.items())
    with pytest.warns(UserWarning, match=r"1 of 40 images can't be read: s\.tar@000003\.png"):
        data = load_dataset(f"tar:{path}", "all", classnames=["a", "b"])
    assert len(data) == 39
    with pytest.raises(DataError, match=r"s\.tar@000003\.png"):
        load_dataset(f"tar:{path}", "all", classnames=["a", "b"], on_bad_image="error")


def change_a_header(data: bytes) -> bytes:
    """Change the header of a member in the middle, which tarfile would take for the end."""
    place = next(i for i in range(4096, len(data), 512) if data[i + 257 : i + 262] == b"ustar")
    return data[:place] + b"?" + data[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:15000], lambda data: b"x" * 2000, lambda data: data[:600], change_a_header],
)
def test_damaged_archives_are_named(shards: Path, damage: Callable[[bytes], bytes]) -> None:
    path = shards / "s-001.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"s-001\.tar is no readable tar file"):
        load_dataset(f"tar:{shards}/*.tar")


def test_an_archive_that_is_cut_between_two_members_is_counted(shards: Path) -> None:
    path = shards / "s-001.tar"
    path.write_bytes(path.read_bytes()[: 8 * 1024])  # four of its ten images
    with pytest.warns(
        UserWarning, match=r"1 archives have no end mark and may be cut short, first s-001\.tar"
    ):
        data = load_dataset(f"tar:{shards}/*.tar", "all")
    assert len(data) == 24
    assert data.info["left_out"] == {"archives have no end mark and may be cut short": 1}


@pytest.mark.parametrize("packer", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_archives_hold_the_same(
    shards: Path, tmp_path: Path, packer: Callable[[bytes], bytes]
) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in sorted(shards.glob("*.tar")):
        (packed / f"{path.name}.x").write_bytes(packer(path.read_bytes()))
    plain = load_dataset(f"tar:{shards}/*.tar", "all")
    data = load_dataset(f"tar:{packed}/*.x", "all")
    assert (data.labels, colours(data)) == (plain.labels, colours(plain))
    assert [data.key(i) for i in range(30)] == [plain.key(i) for i in range(30)]

    # Forked workers share the position of the unpacked file, and another process opens the archive anew.
    with Loader(lambda index: data[index][0].getpixel((0, 0))[0], workers=2) as loader:
        assert list(loader.stream(list(range(30)) * 4)) == colours(plain) * 4
    assert colours(pickle.loads(pickle.dumps(data))) == colours(plain)

    whole = (packed / "s-001.tar.x").read_bytes()
    (packed / "s-001.tar.x").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"s-001\.tar\.x is no readable tar file"):
        load_dataset(f"tar:{packed}/*.x", "all")


def test_images_are_read_where_they_lie(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set that does not fit on a disk twice: nothing is written to learn from it."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("TMPDIR", str(empty))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    data = load_dataset(f"tar:{shards}/s-*.tar", "all")
    assert len(colours(data)) == 30
    assert list(empty.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*") if path in before} == before


def test_another_archive_is_another_fingerprint(shards: Path) -> None:
    name = f"tar:{shards}/*.tar"
    first = data_fingerprint(name)
    assert first == data_fingerprint(name)
    labels = numbered(0, 10, lambda number: NAMES[(number + 1) % 3].encode())
    write_shard(shards / "s-000.tar", labels.items())
    assert data_fingerprint(name) != first
    assert data_fingerprint(f"tar:{shards}/no*.tar") == "absent"


def test_learning_scoring_and_adapting_from_archives(tmp_path: Path) -> None:
    """The same images in folders and in archives teach the same learner."""
    digits = load_dataset("digits", "train", shots=4, seed=1)
    members: dict[str, bytes] = {}
    for index in range(len(digits)):
        image, label = digits[index]
        out = io.BytesIO()
        image.save(out, "PNG")
        folder = tmp_path / "train" / digits.classnames[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:03d}.png").write_bytes(out.getvalue())
        members |= {f"{index:03d}.png": out.getvalue(), f"{index:03d}.cls": digits.classnames[label].encode()}
    write_shard(tmp_path / "train-0.tar", members.items())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        archives = load_dataset(f"tar:{tmp_path}/train-0.tar", validation=False)
    folders = load_dataset(f"folder:{tmp_path / 'train'}", "all")
    assert archives.classnames == folders.classnames
    order = sorted(range(len(folders)), key=lambda i: str(folders.samples[i].source).rpartition("/")[2])
    folders = folders.subset(order)

    backbone = vlprompt.create_backbone("tiny")
    metrics = []
    for data in (archives, folders):
        learner = vlprompt.create_learner("gda", backbone, data.classnames)
        vlprompt.fit(learner, data)
        metrics.append(vlprompt.evaluate(learner, data))
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    zero_shot = vlprompt.create_learner("zero_shot", backbone, archives.classnames)
    assert metrics[0]["accuracy"] > vlprompt.evaluate(zero_shot, archives)["accuracy"] + 0.3

    adapter = vlprompt.create_adapter("tda", backbone, archives.classnames)
    zeros = [data.subset(i for i in range(len(data)) if data.labels[i] == 0) for data in (archives, folders)]
    streams = [adapt_dataset({"tda": adapter}, data)["tda"].labels for data in zeros]
    assert len(streams[0]) == 4
    assert streams[0] == streams[1]


def test_a_run_on_archives(shards: Path, command: Command) -> None:
    done = command(
        "run", "gda_tiny.yaml", f"data.name=tar:{shards}/s-*.tar", "protocol.shots=[2]", "protocol.seeds=[1]"
    )
    assert done.status == 0, done.err
    folder = Path(done.last.partition(": ")[0]).parent
    scored = command("evaluate", folder, "--data", f"tar:{shards}/s-*.tar", "--all")
    assert json.loads(scored.out)["images"] == 30
    looked = command("data", "check", f"tar:{shards}/s-*.tar")
    assert looked.status == 0, looked.err
    assert "3 classes: 'circle', 'square', 'star'" in looked.out


def test_large_jpegs_in_archives_are_decoded_at_a_fraction(tmp_path: Path) -> None:
    members = {}
    for number in range(4):
        file = io.BytesIO()
        Image.new("RGB", (320, 240), (60 * number, 90, 30)).save(file, "JPEG")
        members |= {f"{number}.jpg": file.getvalue(), f"{number}.cls": str(number % 2).encode()}
    write_shard(tmp_path / "a.tar", members.items())

    whole = load_dataset(f"tar:{tmp_path / 'a.tar'}", "all", classnames=["a", "b"])
    quick = load_dataset(f"tar:{tmp_path / 'a.tar'}", "all", classnames=["a", "b"], jpeg_side=60)
    assert {quick[i][0].size for i in range(4)} == {(80, 60)}
    assert whole[0][0].size == (320, 240)
    assert quick.key(0) == f"{whole.key(0)};side=60"
