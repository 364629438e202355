"""Hostile images, tables, trees and lists: no exception but our own, no hang, nothing written outside.

The default budget takes seconds. VLPROMPT_FUZZ=N multiplies it; ``make test-slow`` runs it ten times larger.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.test_deep import png, tiff
from vlprompt.core.errors import VLPromptError
from vlprompt.core.names import check_classnames, class_key, clean_classname, printable
from vlprompt.data import load_dataset, read_image
from vlprompt.data.captions import open_captions
from vlprompt.data.decoding import decode
from vlprompt.data.images import FileReader
from vlprompt.data.inputs import image_inputs
from vlprompt.data.overview import look_at
from vlprompt.data.splits import read_split
from vlprompt.data.unpack import unpack
from vlprompt.data.zipped import ZipReader
from vlprompt.experiments.tasks import read_experiment

BUDGET = int(os.environ.get("VLPROMPT_FUZZ", "1"))
LIMIT = 20  # seconds that one input may take


def fuzzed(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on so many inputs, times the budget; inputs are the same every time unless the budget is raised."""
    return settings(
        max_examples=examples * BUDGET,
        deadline=None,
        derandomize=BUDGET == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@contextlib.contextmanager
def only_our_errors() -> Iterator[None]:
    """Let errors for users pass, and fail at anything else or at a hang."""

    def stop(*_: object) -> None:
        raise AssertionError(f"an input took more than {LIMIT} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except VLPromptError as error:
        printable(str(error)).encode()  # can be text everywhere
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def sandbox() -> Iterator[Path]:
    """Yield a folder in another one, and check that nothing appeared beside it."""
    with tempfile.TemporaryDirectory() as outer:
        root = Path(outer, "data")
        root.mkdir()
        yield root
        assert os.listdir(outer) == ["data"]


# --- images


def _encoded(fmt: str, mode: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif.tobytes()} if fmt in ("JPEG", "PNG", "WEBP", "AVIF") else {}
    Image.fromarray(pixels).convert(mode).save(buffer, fmt, **options)
    return buffer.getvalue()


SEEDS = [
    _encoded(fmt, mode)
    for fmt, mode in (
        ("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16"), ("GIF", "P"),
        ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("TIFF", "I"), ("WEBP", "RGB"), ("PPM", "RGB"), ("PPM", "L"),
        ("JPEG2000", "RGB"), ("AVIF", "RGB"), ("TGA", "RGB"),
    )
]  # fmt: skip
DEEP = np.random.default_rng(2).integers(0, 4096, (6, 5, 4)).astype(np.uint16)
SEEDS += [
    png(DEEP),
    png(DEEP[..., :3]),
    png(DEEP[..., :2]),
    tiff(DEEP),
    tiff(DEEP[..., :3], ">", deflated=True),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Return an image with bytes changed, cut off, put in or doubled."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, max(0, len(data) - 1)))
        what = draw(st.sampled_from(("change", "cut", "insert", "double", "large")))
        if what == "change" and data:
            data[position] = draw(st.integers(0, 255))
        elif what == "cut":
            del data[position:]
        elif what == "insert":
            data[position:position] = draw(st.binary(min_size=1, max_size=8))
        elif what == "double":
            data += data[position:]
        else:
            data[position : position + 4] = draw(
                st.sampled_from((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
            )
    return bytes(data)


def read_error(path: Path) -> VLPromptError | None:
    """Return the error of reading an image; None if it can be read."""
    try:
        assert read_image(path).mode == "RGB"
    except VLPromptError as error:
        return error
    return None


@fuzzed(150)
@given(damaged() | st.binary(max_size=64))
def test_images(data: bytes) -> None:
    """Checking and reading agree about every input."""
    with sandbox() as root:
        path = root / "a.jpg"
        path.write_bytes(data)
        reason = FileReader(root).check("a.jpg")
        with only_our_errors():
            assert (read_error(path) is None) == (not reason), reason
        with only_our_errors():
            decode(data, "a")
        with only_our_errors():
            assert [i.name for i in image_inputs([data, io.BytesIO(data)])] == ["image 0", "image 1"]


# --- tables

PIECES = st.sampled_from(
    [*"ab.,;\t|\"'\n\r\\/ #=-0", "\0", "é", "\ufeff", "../", "a.png", "train", "test", "label", "path"]
)
CELLS = st.lists(PIECES, max_size=6).map("".join)


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """Return something like a table."""
    header = draw(
        st.sampled_from(
            ["path,label", "path;label;split", "image\tclass", "image,caption,x", "", '"path,label']
        )
    )
    rows = draw(st.lists(st.lists(CELLS | st.just("a.png"), max_size=4), max_size=6))
    separator = draw(st.sampled_from(",;\t|"))
    text = "\n".join([header, *(separator.join(row) for row in rows)])
    data = text.encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])), "surrogatepass")
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


@fuzzed(150)
@given(tables() | st.binary(max_size=60))
def test_tables(data: bytes) -> None:
    with sandbox() as root:
        (root / "t.csv").write_bytes(data)
        Image.new("RGB", (4, 4)).save(root / "a.png")
        for split in ("train", "val", "test", "all"):
            with only_our_errors():
                dataset = load_dataset(f"csv:{root / 't.csv'}", split)
                for sample in dataset.samples:
                    assert (root / sample.source).resolve().is_relative_to(root.resolve())
        with only_our_errors():
            open_captions(f"csv:{root / 't.csv'}")


# --- trees

NAMES = st.sampled_from(
    [
        "train",
        "test",
        "val",
        "eval",
        "dev",
        "cat",
        "dog",
        "images",
        "__MACOSX",
        ".hidden",
        "caf\u00e9",
        "cafe\u0301",
        "a\nb",
    ]
) | st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="/\0"), min_size=1, max_size=6)
FILES = st.sampled_from(["file", "png", "pipe", "link", "up", "loop", "dead", "device", "bytes"])


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[list[str], str]]:
    """Return folders and what lies in each."""
    return draw(st.lists(st.tuples(st.lists(NAMES, max_size=3), FILES), max_size=12))


def _grow(root: Path, entries: list[tuple[list[str], str]]) -> None:
    for number, (parts, kind) in enumerate(entries):
        folder = root.joinpath(*(part for part in parts if part not in (".", "..")))
        with contextlib.suppress(OSError):  # names that this file system refuses
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number}.png"
            if kind == "png":
                Image.new("RGB", (3 + number, 4)).save(path)
            elif kind == "file":
                path.write_bytes(b"no image")
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "bytes":
                Image.new("RGB", (4, 4)).save(path)
                os.rename(path, os.fsencode(folder) + b"/\xff%d.png" % number)
            else:
                targets = {
                    "link": "0.png",
                    "up": "..",
                    "loop": path.name,
                    "dead": "nowhere",
                    "device": "/dev/zero",
                }
                os.symlink(targets[kind], path)


@fuzzed(40)
@given(trees(), st.sampled_from(["auto", "splits", "classes"]), st.text(max_size=30))
def test_trees(entries: list[tuple[list[str], str]], layout: str, names: str) -> None:
    with sandbox() as root:
        _grow(root, entries)
        (root / "classnames.txt").write_bytes(names.encode("utf-8", "surrogatepass"))
        for split in ("train", "val", "test", "all"):
            with only_our_errors():
                dataset = load_dataset(f"folder:{root}", split, layout=layout)
                assert len(dataset.classnames) == len({class_key(name) for name in dataset.classnames})
                assert all(image.mode == "RGB" for image, _ in (dataset[i] for i in range(len(dataset))))
        with only_our_errors():
            look_at(f"folder:{root}")
        with only_our_errors():
            open_captions(f"folder:{root}")


# --- archives

INNER_NAMES = st.sampled_from(
    [
        "a.png",
        "b/a.png",
        "../a.png",
        "/a.png",
        "b/../../a.png",
        "..\\a.png",
        "C:\\a.png",
        "b/",
        "",
        ".",
        "a.png/b",
    ]
) | st.text(max_size=6)
SOUND = png(DEEP[..., :3])


@st.composite
def archives(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return a zip, a tar or a gz, of any members, perhaps damaged."""
    ending = draw(st.sampled_from([".zip", ".zip", ".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".gz"]))
    members = draw(st.lists(st.tuples(INNER_NAMES, st.binary(max_size=20) | st.just(SOUND)), max_size=4))
    out = io.BytesIO()
    with warnings.catch_warnings(), contextlib.suppress(ValueError, UnicodeError):
        warnings.simplefilter("ignore")  # names that occur twice
        if ending == ".zip":
            with zipfile.ZipFile(
                out, "w", draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
            ) as packed:
                for name, data in members:
                    packed.writestr(zipfile.ZipInfo(name), data)
        elif ending == ".gz":
            out.write(gzip.compress(SOUND))
        else:
            with tarfile.open(fileobj=out, mode=f"w:{ending[5:]}") as tar:
                for name, data in members:
                    info = tarfile.TarInfo(name)
                    info.type = draw(st.sampled_from([tarfile.REGTYPE] * 4 + [*b"123456"]))
                    info.type = info.type if isinstance(info.type, bytes) else bytes([info.type])
                    info.linkname = draw(st.sampled_from(["a.png", "..", "/etc", "../../x"]))
                    info.size = len(data) if info.isreg() else 0
                    tar.addfile(info, io.BytesIO(data))

    whole = bytearray(out.getvalue())
    for _ in range(draw(st.integers(0, 3))):
        if whole:
            place = draw(st.integers(0, len(whole) - 1))
            whole[place] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(whole))) if draw(st.integers(0, 4)) == 0 else len(whole)
    return ending, bytes(whole[:cut])


@fuzzed(120)
@given(archives())
def test_archives(archive: tuple[str, bytes]) -> None:
    ending, data = archive
    with sandbox() as root:
        path = root / f"x{ending}"
        path.write_bytes(data)
        before = set(os.listdir(root))
        with only_our_errors():
            unpack(path, root / "out")
        assert set(os.listdir(root)) <= before | {"out"}
        for found in (root / "out").rglob("*"):
            assert found.resolve().is_relative_to(root.resolve())

        reader = ZipReader(root)
        with only_our_errors():
            for name in sorted(reader.members(path.name)):
                source = f"{path.name}@{name}"
                reason = reader.check(source)
                assert (_zip_error(reader, source) is None) == (not reason), reason
                with only_our_errors():
                    reader.key(source)


def _zip_error(reader: ZipReader, source: str) -> VLPromptError | None:
    try:
        reader.read(source)
    except VLPromptError as error:
        return error
    return None


# --- configurations

LINES = st.sampled_from(
    [
        "task: classification", "task: security", "task: segmentation", "task: adaptation", "task: detection",
        "task: generation", "task: [", "data: {name: digits}", "data: {name: []}", "data: {name: '${data.name}'}",
        "data: [1]", "learner: {name: coop}", "learner: {name: coop, context_length: -1}", "learner: coop",
        "protocol: {seeds: [1, 1], shots: [0]}", "protocol: {name: coop-fewshot, shots: [1], seeds: [1]}",
        "_base_: x.yaml", "_base_: ../x.yaml", "_base_: [x.yaml, y.yaml]", "train: {epochs: .nan}",
        "train: {lr: 1e999}",
        "backbone: {name: tiny}", "methods: {a: null}", "methods: {zero_shot: {}}", "output: ..", "? [a]: b", "- a",
        "&a [*a]", "x: !!python/object:os.system {}", "a: &a [1]\nb: [*a, *a]", "1: 2", "yes: no", "\t", "---", "'",
    ]
) | st.text(max_size=12)  # fmt: skip


@fuzzed(60)
@given(st.lists(LINES, max_size=7).map("\n".join) | st.text(max_size=30), st.lists(LINES, max_size=2))
def test_configurations(text: str, overrides: list[str]) -> None:
    with sandbox() as root:
        path = root / "x.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        for words in ([], [word.replace(": ", "=", 1) for word in overrides]):
            with only_our_errors():
                assert read_experiment(path, words).cells()


# --- split files and names

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
ENTRIES = st.lists(
    st.tuples(
        st.text(max_size=8), st.integers(-1, 3) | st.just(10**30), st.sampled_from(["cat", "dog", ""])
    ).map(list)
    | JSON,
    max_size=4,
)
SPLIT_FILES = st.fixed_dictionaries({"train": ENTRIES, "val": ENTRIES | JSON, "test": ENTRIES}) | JSON


@fuzzed(150)
@given(SPLIT_FILES.map(json.dumps).map(str.encode) | st.binary(max_size=40) | st.just(b"[" * 100_000))
def test_split_files(data: bytes) -> None:
    with sandbox() as root:
        path = root / "split.json"
        path.write_bytes(data)
        with only_our_errors():
            read_split(path)


@fuzzed(200)
@given(
    st.lists(st.text(max_size=12) | st.integers() | st.booleans() | st.none(), max_size=4)
    | st.text(max_size=5)
)
def test_class_names(names: object) -> None:
    with only_our_errors():
        checked = check_classnames(names, "here")  # type: ignore[arg-type]
        assert checked == tuple(clean_classname(name) for name in names)  # type: ignore[attr-defined]


@fuzzed(200)
@given(st.text() | st.binary(max_size=20).map(os.fsdecode))
def test_names_in_messages_stay_on_one_line(name: str) -> None:
    text = printable(name)
    assert text.isprintable() or text == ""
    text.encode()


@pytest.mark.slow
def test_a_larger_budget() -> None:
    """Run this file in a process of its own, ten times as long."""
    import subprocess
    import sys

    environment = {**os.environ, "VLPROMPT_FUZZ": os.environ.get("VLPROMPT_FUZZ_SLOW", "10")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    ended = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], check=False)
    assert ended.returncode == 0
