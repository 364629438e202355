"""Readers of foreign files on damaged and hostile ones: an error of ours, in time, and nothing written elsewhere.

The quick tests try a few dozen inputs of every kind, the same in every run; ``-m slow`` tries a thousand others, or as
many as ``VLPROMPT_FUZZ_INPUTS`` says.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import io
import json
import os
import signal
import tarfile
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vlprompt
from tests.security.conftest import CornerScanner
from vlprompt.backbones import Backbone
from vlprompt.concepts.embedding import Concepts
from vlprompt.core.errors import VLPromptError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.data import load_segmentation
from vlprompt.data.captions import open_captions
from vlprompt.data.coco_masks import object_mask
from vlprompt.data.segmentation import MaskRule, read_mask
from vlprompt.data.segmentation.convert import convert_coco, convert_indexed
from vlprompt.detection.data import read_coco
from vlprompt.security.folder import scan_folder
from vlprompt.training.state import Progress, load_checkpoint, save_checkpoint

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

QUICK = 25  # inputs of each kind
LONG = int(os.environ.get("VLPROMPT_FUZZ_INPUTS", "1000"))  # more for a long search
SECONDS = 20  # for one input, on a busy machine

Draw = Callable[..., Any]
Check = Callable[[Path, Any], None]

# --- what is tried

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**63), 10**30]),
    st.floats(allow_nan=True),
    st.sampled_from(["", "x", "..", "../../x", "/etc/passwd", "a\0b", "\ud800", "7", "a" * 300]),
    st.just([]), st.just([[]]), st.just({}), st.lists(st.integers(-2, 9), max_size=4),
)  # fmt: skip


@st.composite
def damaged_json(draw: Draw, value: Any) -> Any:
    """A JSON value with one to three nodes replaced, removed or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        parent: Any = None
        node = value
        while isinstance(node, (dict, list)) and node and draw(st.integers(0, 9)):
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else list(range(len(node)))))
            parent, node = node, node[key]
        if parent is None:
            continue

        kind = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if kind == "remove":
            del parent[key]
        elif kind == "double" and isinstance(parent, list):
            parent.append(node)
        else:
            parent[key] = copy.deepcopy(draw(ODD))  # strategies may hand out one list twice
    return value


@st.composite
def damaged_bytes(draw: Draw, whole: bytes) -> bytes:
    """Bytes of a whole file, cut, flipped, filled or repeated somewhere."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        place = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["flip", "flip", "set", "cut", "remove", "insert", "repeat"]))
        if kind == "flip":
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[place] = draw(st.sampled_from([0, 1, 32, 47, 48, 127, 128, 255]))
        elif kind == "cut":
            del data[place:]
        elif kind == "remove":
            del data[place : place + draw(st.integers(1, 64))]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=32))
        else:
            data += data[place : place + 600]
    return bytes(data)


def png(mode: str = "L") -> bytes:
    out = io.BytesIO()
    bar = np.zeros((8, 12), np.uint8)
    bar[2:5, 3:9] = 255
    Image.fromarray(bar).convert(mode).save(out, "PNG")
    return out.getvalue()


@st.composite
def mask_file(draw: Draw) -> bytes:
    """A mask of any mode, size and values, whole or damaged."""
    mode = draw(st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "I", "F", "CMYK"]))
    size = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    image = Image.new("L", size)
    image.putdata(
        draw(
            st.lists(
                st.sampled_from([0, 1, 7, 127, 255]), min_size=size[0] * size[1], max_size=size[0] * size[1]
            )
        )
    )
    out = io.BytesIO()
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    if mode == "P":
        image.putpalette(draw(st.binary(min_size=768, max_size=768)))
    options = {"transparency": draw(st.integers(0, 255))} if mode == "P" and draw(st.booleans()) else {}
    image.save(out, "TIFF" if mode in ("F", "CMYK", "I") else "PNG", **options)
    return draw(damaged_bytes(out.getvalue())) if draw(st.booleans()) else out.getvalue()


NAMES = st.one_of(
    st.sampled_from([
        "a.png", "a.jpg", "a.txt", "a.json", "a.caption", "b.1.png", "b.1.txt", "../x.png", "/x.txt", "d/", ".h.png",
    ]),
    st.text(max_size=12),
)  # fmt: skip


@st.composite
def tar_file(draw: Draw) -> bytes:
    """An archive of any members, perhaps damaged, perhaps compressed."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for _ in range(draw(st.integers(0, 5))):
            info = tarfile.TarInfo(draw(NAMES).replace("\ud800", "") or "x")
            info.type = draw(
                st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
            )
            data = draw(st.one_of(st.just(png("RGB")), st.just(b'{"caption": "x"}'), st.binary(max_size=40)))
            info.size = len(data) if info.type == tarfile.REGTYPE else 0
            with contextlib.suppress(ValueError, UnicodeError):
                tar.addfile(info, io.BytesIO(data) if info.size else None)
    data = out.getvalue()
    if draw(st.booleans()):
        data = draw(damaged_bytes(data))
    if draw(st.integers(0, 3)) == 0:
        data = gzip.compress(data)
        data = draw(damaged_bytes(data)) if draw(st.booleans()) else data
    return data


TABLE = st.lists(
    st.sampled_from([
        "image", "caption", ",", ";", "\t", '"', "\n", "\r\n", "a.png", "red", "\0", "é", " ", "../x", "\ufeff",
    ]),
    max_size=30,
).map("".join)  # fmt: skip

SHAPE = st.one_of(
    st.lists(st.lists(st.one_of(st.integers(-40, 40), st.floats()), max_size=9), max_size=3),
    st.fixed_dictionaries({
        "size": st.sampled_from([[8, 12], [12, 8], [8], None, [10**9, 10**9]]),
        "counts": st.one_of(st.text(max_size=12), st.lists(st.integers(-1, 100), max_size=6), st.none(), ODD),
    }),
    ODD,
)  # fmt: skip

SIZES = {"width": 12, "height": 8}
COCO = {
    "images": [{"id": 1, "file_name": "a.png", **SIZES}, {"id": 2, "file_name": "b.png", **SIZES}],
    "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 1, 4, 4], "iscrowd": 0,
         "segmentation": [[2.0, 1.0, 6.0, 1.0, 6.0, 5.0]]},
        {"id": 2, "image_id": 2, "category_id": 9, "bbox": [0, 0, 9, 8], "iscrowd": 1,
         "segmentation": {"size": [8, 12], "counts": [0, 16, 80]}},
    ],
}  # fmt: skip
RECORDS = [
    {"img_name": "a.png", "mask_name": "a.png", "prompts": {"p0": "", "p1": ["a dog"]}, "class": "dog"}
]

# --- how it is read


def _images(folder: Path) -> None:
    for place in ("images", "masks"):
        (folder / place).mkdir(exist_ok=True)
        for name in ("a.png", "b.png"):
            (folder / place / name).write_bytes(png("RGB"))


def check_coco(folder: Path, raw: Any) -> None:
    source = folder / "in"
    _images(source)
    if isinstance(raw, bytes):
        (source / "c.json").write_bytes(raw)
    else:
        (source / "c.json").write_text(json.dumps(raw))
    with contextlib.suppress(VLPromptError):
        data = read_coco(source / "c.json", source / "images")
        assert all(np.isfinite(entry.boxes).all() for entry in data.objects)
    with contextlib.suppress(VLPromptError):
        convert_coco(source / "c.json", source / "images", folder / "out")
        load_segmentation(f"per_class:{folder / 'out'}", "train")


def check_shape(folder: Path, shape: Any) -> None:
    with contextlib.suppress(VLPromptError):
        assert object_mask(shape, (12, 8), "x").shape == (8, 12)


def check_mask(folder: Path, data: bytes) -> None:
    path = folder / "in" / "m.png"
    path.write_bytes(data)
    for rule, values in (
        (MaskRule(), ()),
        (MaskRule(127), ()),
        (MaskRule(ignore=(255,)), ()),
        (MaskRule(), (1, 7)),
    ):
        with contextlib.suppress(VLPromptError):
            assert set(np.unique(read_mask(path, rule, values))) <= {0, 1, 255}
    with contextlib.suppress(VLPromptError):
        convert_indexed(folder / "in", folder / "in", {"a": 1, "../b": 7}, folder / "out")


def check_tar(folder: Path, data: bytes) -> None:
    (folder / "in" / "s.tar").write_bytes(data)
    with contextlib.suppress(VLPromptError):
        source = open_captions(f"tar:{folder / 'in' / 's.tar'}")
        for index in range(len(source)):
            assert source.caption(index)
            with contextlib.suppress(VLPromptError):
                source.image(index)


def check_table(folder: Path, text: str) -> None:
    (folder / "in" / "a.png").write_bytes(png())
    (folder / "in" / "t.csv").write_text(text, newline="")
    with contextlib.suppress(VLPromptError):
        source = open_captions(f"csv:{folder / 'in' / 't.csv'}")
        assert all(source.caption(index) for index in range(len(source)))


def check_records(folder: Path, records: Any) -> None:
    _images(folder / "in")
    (folder / "in" / "anns").mkdir()
    (folder / "in" / "anns" / "train.json").write_text(json.dumps(records))
    for prompt in (1, -1):
        with contextlib.suppress(VLPromptError):
            data = load_segmentation(f"prompts:{folder / 'in'}", "train", prompt=prompt)
            assert data[0].mask.shape == (8, 12)


@pytest.fixture(scope="module")
def artefacts(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole files of each kind that we write ourselves."""
    root = tmp_path_factory.mktemp("artefacts")
    vlprompt.save(vlprompt.create_learner("coop", backbone, ["a", "b"]), root / "prompt")
    Concepts("detector", torch.ones(2, 3, 4), ("a", "b"), {"host": "x"}, {}).save(root / "c.safetensors")

    module = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    progress = Progress(epoch=1, history=[{"epoch": 0, "loss": 1.0}], best=0.5, best_epoch=0, seconds=1.0)
    save_checkpoint(root, progress, {"weights": module.state_dict()}, optimizer, {"options": {"lr": 0.1}})

    for number in range(3):
        (root / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (90 * number, 0, 0)).save(root / "photos" / f"{number}.png")
    scan_folder(root / "photos", CornerScanner(backbone), root / "scan")
    return root


def _load_checkpoint(folder: Path) -> None:
    optimizer = torch.optim.AdamW(nn.Linear(3, 2).parameters())
    with contextlib.suppress(VLPromptError):
        load_checkpoint(folder, optimizer, {"options": {"lr": 0.1}})


def _own_kinds(artefacts: Path, backbone: Backbone) -> dict[str, tuple[Any, Check]]:
    """Inputs and checks of the files that we write."""
    prompt = {path.name: path.read_bytes() for path in (artefacts / "prompt").iterdir()}
    card = json.loads(prompt["prompt.json"])
    checkpoint = (artefacts / "trainer.safetensors").read_bytes()
    tensors, metadata = read_tensors(artefacts / "trainer.safetensors")
    scan = {path.name: path.read_bytes() for path in (artefacts / "scan").iterdir()}

    def check_prompt(folder: Path, damage: Any) -> None:
        for name, data in prompt.items():
            (folder / "in" / name).write_bytes(data)
        if isinstance(damage, bytes):
            (folder / "in" / "prompt.safetensors").write_bytes(damage)
        else:
            (folder / "in" / "prompt.json").write_text(json.dumps(damage))
        with contextlib.suppress(VLPromptError):
            vlprompt.load(folder / "in", backbone)

    def check_concepts(folder: Path, data: bytes) -> None:
        (folder / "in" / "c.safetensors").write_bytes(data)
        with contextlib.suppress(VLPromptError):
            Concepts.load(folder / "in" / "c.safetensors", "detector")

    def check_checkpoint(folder: Path, damage: Any) -> None:
        path = folder / "in" / "trainer.safetensors"
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            write_tensors(path, tensors, damage if isinstance(damage, dict) else {"progress": damage})
        _load_checkpoint(folder / "in")

    def check_scan(folder: Path, damage: tuple[str, bytes]) -> None:
        for name, data in scan.items():
            (folder / "out" / name).write_bytes(data)
        (folder / "out" / damage[0]).write_bytes(damage[1])
        with contextlib.suppress(VLPromptError):
            outcome = scan_folder(artefacts / "photos", CornerScanner(backbone), folder / "out", resume=True)
            assert outcome.total == 3

    def scan_files() -> Any:
        return st.sampled_from(["rows.jsonl", "scan.json", "listing.jsonl"]).flatmap(
            lambda name: st.tuples(st.just(name), damaged_bytes(scan[name]))
        )

    return {
        "prompt": (st.one_of(damaged_bytes(prompt["prompt.safetensors"]), damaged_json(card)), check_prompt),
        "concepts": (damaged_bytes((artefacts / "c.safetensors").read_bytes()), check_concepts),
        "checkpoint": (st.one_of(damaged_bytes(checkpoint), damaged_json(metadata)), check_checkpoint),
        "scan": (scan_files(), check_scan),
    }


FOREIGN: dict[str, tuple[Any, Check]] = {
    "coco": (damaged_json(COCO), check_coco),
    "coco, bytes": (damaged_bytes(json.dumps(COCO).encode()), check_coco),
    "coco, shapes": (SHAPE, check_shape),
    "masks": (mask_file(), check_mask),
    "shards": (tar_file(), check_tar),
    "captions": (TABLE, check_table),
    "records": (damaged_json(RECORDS), check_records),
}
OWN = ("prompt", "concepts", "checkpoint", "scan")

# --- the tests


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Raise what no reader catches if an input takes too long."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt(f"an input took longer than {SECONDS} seconds")

    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _try(strategy: Any, check: Check, inputs: int) -> None:
    @hypothesis.settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        derandomize=inputs == QUICK,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def run(value: Any) -> None:
        with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            root = Path(place)
            folder = root / "deep" / "er"
            (folder / "in").mkdir(parents=True)
            (folder / "out").mkdir()
            with _in_time():
                check(folder, value)
            written = [path for path in root.rglob("*") if not path.is_relative_to(folder)]
            assert written == [root / "deep"]
            assert {path.name for path in folder.iterdir()} <= {"in", "out"}

    run()


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(kind: str) -> None:
    _try(*FOREIGN[kind], QUICK)


@pytest.mark.parametrize("kind", OWN)
def test_own_files(kind: str, artefacts: Path, backbone: Backbone) -> None:
    _try(*_own_kinds(artefacts, backbone)[kind], QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FOREIGN)
def test_many_foreign_files(kind: str) -> None:
    _try(*FOREIGN[kind], LONG)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OWN)
def test_many_own_files(kind: str, artefacts: Path, backbone: Backbone) -> None:
    _try(*_own_kinds(artefacts, backbone)[kind], LONG)
