"""Scanning: verdicts in order, whatever the images are, in memory and in folders, through kills and hostile files."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlprompt
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError, NonFiniteError
from vlprompt.data import FileReader, ImageDataset, load_dataset
from vlprompt.data.base import Sample
from vlprompt.data.listing import list_images
from vlprompt.learners import create_learner
from vlprompt.learners._calibration import threshold_at
from vlprompt.metrics.verdicts import Verdicts
from vlprompt.security import folder as folder_module
from vlprompt.security.folder import scan_folder
from vlprompt.security.photographs import false_alarms, sample_photographs
from vlprompt.security.scan import scan

ROOT = Path(__file__).parents[2]


def marked(name: str) -> bool:
    return int(Path(name).stem) % 5 == 0


def bomb() -> bytes:
    """A PNG of a few bytes that claims to be 60,000 pixels a side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A folder of everything an image should not be."""
    root = tmp_path / "strange"
    root.mkdir()
    grey = Image.new("L", (20, 20), 100)
    (root / "bomb.png").write_bytes(bomb())
    grey.save(
        root / "animated.gif", save_all=True, append_images=[Image.new("L", (20, 20), g) for g in (9, 99)]
    )
    frames = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 255, (3, 20, 30, 3)).astype(np.uint8)
    first, *others = map(Image.fromarray, noise)
    first.save(frames, "GIF", save_all=True, append_images=others)
    (root / "cut.gif").write_bytes(frames.getvalue()[: len(frames.getvalue()) * 3 // 4])
    Image.new("CMYK", (20, 20), (0, 200, 0, 0)).save(root / "cmyk.jpg")
    Image.fromarray(np.full((20, 20), 30_000, np.uint16)).save(root / "deep.png")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3)).astype(np.uint8)).save(
        whole, "PNG"
    )
    (root / "truncated.png").write_bytes(whole.getvalue()[:2000])
    (root / "empty.png").write_bytes(b"")
    Image.new("L", (1, 900_000)).save(root / "thread.png")
    (root / "text.jpg").write_text("no image")
    (root / "fine.png").write_bytes(whole.getvalue())
    (tmp_path / "outside.png").write_bytes(whole.getvalue())
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    (root / "broken\nname.png").write_bytes(whole.getvalue())
    (root / ".hidden.png").write_bytes(whole.getvalue())
    (root / "notes.txt").write_text("not asked for")
    return root


def test_rows_are_in_order_and_say_what_was_seen(corner: Any, image_folder: Path) -> None:
    report = scan(image_folder, corner, batch_size=4)
    names = [row["image"] for row in report]
    assert names == sorted(names)
    assert len(report) == 23
    for row in report:
        assert row["verdict"] == ("poisoned" if marked(row["image"]) else "clean")
        assert (row["trigger"], row["object"]) == (
            ("badnets", "bright") if marked(row["image"]) else ("clean", "dark")
        )
    assert len(report.suspects) == 5
    assert [r["score"] for r in report.suspects] == sorted(
        (r["score"] for r in report.suspects), reverse=True
    )
    assert corner.batches == [4] * 5 + [3]
    table = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["image"] for row in table] == names
    assert "badnets on bright" in str(report)


def test_other_kinds_of_input_give_the_same_verdicts(corner: Any, image_folder: Path) -> None:
    by_folder = scan(image_folder, corner)
    files = [image_folder / row["image"] for row in by_folder]
    by_list = scan(files, corner, batch_size=5)
    by_image = scan([Image.open(f) for f in files], corner, workers=1)
    scores = [row["score"] for row in by_folder]
    assert [row["score"] for row in by_list] == scores
    assert [row["score"] for row in by_image] == scores
    assert by_image[3]["image"] == "image 3"
    assert scan(files[0], corner)[0]["score"] == scores[0]
    assert {r["verdict"] for r in scan(files, corner, threshold=0.0)} == {"poisoned"}


def test_a_data_set_and_a_real_scanner(backbone: Backbone) -> None:
    data = load_dataset("triggered:digits", "val").subset(range(6))
    learner = create_learner("dbom", backbone, data.classnames)
    report = vlprompt.scan(data, learner)
    assert len(report) == 6
    assert all(row["object"] in data.classnames for row in report)
    with pytest.raises(DataError, match="zero_shot is no scanner"):
        vlprompt.scan(data, create_learner("zero_shot", backbone, data.classnames))


def test_what_is_suspected_is_left_out_or_mended(corner: Any, image_folder: Path, tmp_path: Path) -> None:
    names = sorted(p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.png"))
    (image_folder / names[3]).write_bytes(b"")
    samples = tuple(Sample(name, 0) for name in names)
    reader, drawn = FileReader(image_folder), {"indices": list(range(100, 123))}
    data = ImageDataset("marks", "train", samples, ("dark", "bright"), ("a {}.",), reader, drawn)
    report = scan(data, corner)
    whole = [s for s in samples if s.source != names[3]]

    cleaned = report.cleaned(data)
    assert [s.source for s in cleaned.samples] == [s.source for s in whole if not marked(s.source)]
    assert [names[i - 100] for i in cleaned.info["indices"]] == [s.source for s in cleaned.samples]
    assert cleaned.info["scan"] == {"poisoned": len(report.suspects), "unreadable": 1, "mended": False}
    mended = report.cleaned(data, mend=True)
    assert [(s.source, s.label) for s in mended.samples] == [(s.source, int(marked(s.source))) for s in whole]

    with pytest.raises(DataError, match="this report of 23 images is not one of marks \\(22\\)"):
        report.cleaned(data.subset(range(22)))
    with pytest.raises(DataError, match="'bright' is no class of marks"):
        report.cleaned(replace(data, classnames=("dark", "light")), mend=True)
    corner.judge = lambda rows: Verdicts(torch.ones(len(rows)))
    with pytest.raises(DataError, match="can't be mended: the scanner names no object"):
        scan(data, corner).cleaned(data, mend=True)


def test_everything_strange_is_named_and_stops_nothing(corner: Any, strange: Path, tmp_path: Path) -> None:
    outcome = scan_folder(strange, corner, tmp_path / "out", batch_size=3)
    rows = {r["image"]: r for r in json.loads((tmp_path / "out" / "report.json").read_text())}
    assert outcome.total == len(rows) == 12
    for name, reason in {
        "bomb.png": "decompression bomb",
        "truncated.png": "truncated",
        "empty.png": "the file is empty",
        "thread.png": "its sides are too unequal: 1 x 900000 pixels",
        "text.jpg": "no image in a known format",
        "broken\nname.png": "holds a control character",
    }.items():
        assert rows[name]["verdict"] == "unreadable"
        assert reason in rows[name]["note"]
        assert rows[name]["score"] is None
    assert outcome.unreadable == 6
    assert rows["link.png"]["verdict"] == rows["fine.png"]["verdict"]
    assert rows["link.png"]["score"] == rows["fine.png"]["score"]
    assert outcome.passed_over == {".txt": 1}
    assert rows["animated.gif"]["note"] == "animated: only the first of 3 frames was looked at"
    assert rows["cut.gif"]["note"].startswith("animated, but not all frames can be read")
    assert rows["cmyk.jpg"]["note"] == "converted to 8-bit RGB from CMYK"
    assert rows["deep.png"]["note"].startswith("converted to 8-bit RGB from I")
    assert rows["fine.png"]["note"] == ""
    cleaned = (tmp_path / "out" / "cleaned.txt").read_text().splitlines()
    assert set(cleaned) <= {"animated.gif", "cut.gif", "cmyk.jpg", "deep.png", "fine.png", "link.png"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "decompression bomb" in page


def test_the_folder_scan_writes_what_scan_says(corner: Any, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = scan_folder(image_folder, corner, out, batch_size=4, top=7)
    expected = scan(image_folder, corner).rows
    assert json.loads((out / "report.json").read_text()) == expected
    assert [r["image"] for r in csv.DictReader((out / "report.csv").open())] == [r["image"] for r in expected]
    assert (out / "cleaned.txt").read_text().splitlines() == [
        r["image"] for r in expected if not marked(r["image"])
    ]
    assert (outcome.total, outcome.poisoned, outcome.unreadable) == (23, 5, 0)
    page = (out / "report.html").read_text()
    worst = sorted(expected, key=lambda r: -r["score"])[:7]
    places = [page.index(f"{row['image']}") for row in worst]
    assert places == sorted(places)
    assert page.count("<figure") == 7
    assert "http" not in page.replace("http-equiv", "")


def test_a_scan_that_was_killed_ends_with_the_same_files(
    corner: Any, image_folder: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    scan_folder(image_folder, corner, whole, batch_size=4)
    scan_folder(image_folder, corner, broken, batch_size=4)
    rows = (broken / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (broken / "rows.jsonl").write_bytes(b"".join(rows[:9]) + rows[9][:20])  # killed in the middle of a line
    for name in ("report.csv", "report.json", "cleaned.txt", "report.html"):
        (broken / name).unlink()
    corner.batches.clear()
    scan_folder(image_folder, corner, broken, batch_size=4, resume=True)
    assert sum(corner.batches) == 23 - 9
    for name in ("rows.jsonl", "report.csv", "report.json", "cleaned.txt", "report.html"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


def test_another_scan_is_not_continued(corner: Any, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scan_folder(image_folder, corner, out)
    with pytest.raises(CheckpointError, match="holds another scan \\(threshold differs\\)"):
        scan_folder(image_folder, corner, out, threshold=0.1, resume=True)
    (out / "scan.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        scan_folder(image_folder, corner, out, resume=True)
    with pytest.raises(DataError, match="lies inside the scanned folder"):
        scan_folder(image_folder, corner, image_folder / "out")
    with pytest.raises(DataError, match="there is no folder"):
        scan_folder(image_folder / "nowhere", corner, out)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        scan_folder(tmp_path / "none", corner, out)


def test_names_are_sorted_on_disk_a_few_at_a_time(
    corner: Any, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_SORTED_AT_ONCE", 4)
    scan_folder(image_folder, corner, tmp_path / "out")
    names = [json.loads(line) for line in (tmp_path / "out" / "listing.jsonl").read_text().splitlines()]
    expected = sorted(p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.png"))
    assert names == expected


def test_few_images_are_in_memory_at_once(corner: Any, tmp_path: Path) -> None:
    from vlprompt.data.loading import using_workers
    from vlprompt.security.scan import DecodedImage, row_stream

    alive = most = 0

    def items() -> Iterator[int]:
        nonlocal alive, most
        for i in range(200):
            alive += 1
            most = max(most, alive)
            yield i

    def decode(i: int) -> DecodedImage:
        return DecodedImage(str(i), corner.backbone.preprocess(Image.new("RGB", (32, 32))))

    for workers in (0, 1):
        alive = most = 0
        with using_workers(workers):
            for _ in row_stream(decode, items(), corner, 0.5, batch_size=5):
                alive -= 1
        assert most <= 5 * 4  # a batch that is judged and three that are decoded


@pytest.mark.slow
def test_the_exit_status_of_the_command_says_whether_something_is_suspected(
    image_folder: Path, tmp_path: Path
) -> None:
    backbone = vlprompt.create_backbone("tiny")
    learner = create_learner("dbom", backbone, ["a", "b"])
    vlprompt.save(learner, tmp_path / "prompt")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vlprompt", "scan", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )

    always = ("--detector", str(tmp_path / "prompt"), "--output", str(tmp_path / "out"))
    marked_all = run(str(image_folder), *always, "--threshold", "0")
    assert marked_all.returncode == 3, marked_all.stderr
    assert "23 images: 23 suspected, 0 unreadable" in marked_all.stdout
    assert run(str(image_folder), *always, "--threshold", "1").returncode == 0
    assert (tmp_path / "out" / "cleaned.txt").read_text().count("\n") == 23
    for threshold in ("2", "nan", "-0.1", "inf"):
        refused = run(str(image_folder), *always, "--threshold", threshold)
        assert refused.returncode == 2
        assert "the threshold must be a number in [0, 1]" in refused.stderr
    wrong = run(str(image_folder / "nowhere"), *always)
    assert wrong.returncode == 2
    assert "there is no folder" in wrong.stderr


def test_training_and_scanning_prepare_images_alike(backbone: Backbone, tmp_path: Path) -> None:
    """A photograph of any size takes the way of the training images: to the native size first."""
    train = load_dataset("triggered:digits", "train", copies=1, native_size=24).subset(range(40))
    learner = create_learner("dbom", backbone, train.classnames)
    vlprompt.fit(learner, train, None, epochs=1, batch_size=8)
    assert learner.native_size == 24

    rng = np.random.default_rng(0)
    photograph = Image.fromarray(rng.integers(0, 255, (90, 150, 3)).astype(np.uint8))
    small = photograph.resize((24, 24), Image.Resampling.BICUBIC)
    expected = learner.embed_images(backbone.preprocess(small)[None])
    assert torch.equal(learner.embed_images(learner.preprocess(photograph)[None]), expected)
    score = round(float(learner.judge(expected).score[0]), 6)
    photograph.save(tmp_path / "photograph.png")
    assert scan(tmp_path, learner)[0]["score"] == score
    assert scan([photograph], learner)[0]["score"] == score
    scan_folder(tmp_path, learner, tmp_path.parent / "of_photograph")
    rows = json.loads((tmp_path.parent / "of_photograph" / "report.json").read_text())
    assert rows[0]["score"] == score

    vlprompt.save(learner, tmp_path / "saved")
    assert vlprompt.load(tmp_path / "saved", backbone).native_size == 24
    assert learner.with_classes(["one", "two"]).native_size == 24


def test_clean_photographs_have_many_sizes() -> None:
    images = sample_photographs()
    assert len(images) == 100
    sides = {max(image.size) for image in images}
    assert min(sides) < 32
    assert max(sides) > 400
    assert len({image.size for image in images}) > 50
    assert next(image.tobytes() for image in sample_photographs(3)) == images[0].tobytes()


def test_false_alarms_are_counted_by_the_way_that_a_scan_takes(corner: Any, image_folder: Path) -> None:
    assert false_alarms(corner, str(image_folder)) == 5 / 23
    suspected = sum(row["verdict"] == "poisoned" for row in scan(sample_photographs(), corner))
    assert false_alarms(corner) == suspected / 100
    with pytest.raises(DataError, match="there is no folder"):
        false_alarms(corner, str(image_folder / "nowhere"))


@pytest.mark.parametrize("threshold", [float("nan"), 2, -0.1, float("inf"), "0.5", True])
def test_a_threshold_that_would_suspect_nothing_is_refused(
    corner: Any, image_folder: Path, tmp_path: Path, threshold: Any
) -> None:
    with pytest.raises(DataError, match=r"threshold must be a number in \[0, 1\]"):
        scan(image_folder, corner, threshold=threshold)
    with pytest.raises(DataError, match=r"threshold must be a number in \[0, 1\]"):
        scan_folder(image_folder, corner, tmp_path / "out", threshold=threshold)


def test_a_detector_whose_own_threshold_is_no_number_is_refused(corner: Any, image_folder: Path) -> None:
    for own in (float("nan"), 1.5):
        type(corner).threshold = property(lambda _, own=own: own)
        try:
            with pytest.raises(DataError, match="the threshold that corner chose"):
                scan(image_folder, corner)
            assert len(scan(image_folder, corner, threshold=0.9)) == 23
        finally:
            type(corner).threshold = property(lambda _: 0.9)


@pytest.mark.parametrize(
    "counts", [{"batch_size": 0}, {"batch_size": -3}, {"batch_size": 1.5}, {"workers": -1}]
)
def test_impossible_numbers_are_refused(
    corner: Any, image_folder: Path, tmp_path: Path, counts: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match=r"must be .*whole number from [01] on"):
        scan(image_folder, corner, **counts)
    with pytest.raises(DataError, match=r"must be .*whole number from [01] on"):
        scan_folder(image_folder, corner, tmp_path / "out", **counts)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_calls_nothing_clean(
    corner: Any, image_folder: Path, tmp_path: Path, bad: float
) -> None:
    corner.judge = lambda rows: Verdicts(torch.full((len(rows),), bad))
    with pytest.raises(NonFiniteError, match=r"png: the score of corner is"):
        scan(image_folder, corner)
    with pytest.raises(NonFiniteError, match=r"png: the score of corner is"):
        scan_folder(image_folder, corner, tmp_path / "out")
    assert not (tmp_path / "out" / "cleaned.txt").exists()
    with pytest.raises(NonFiniteError):
        threshold_at(torch.tensor([0.1, bad]), 0.05)


def test_a_folder_that_is_not_there_is_no_unreadable_image(corner: Any, image_folder: Path) -> None:
    with pytest.raises(DataError, match="there is no folder and no image"):
        scan(image_folder / "imges", corner)
    with pytest.raises(DataError, match="there is no folder and no image"):
        scan(str(image_folder / "imges"), corner)


def test_a_scan_with_other_weights_is_not_continued(
    backbone: Backbone, image_folder: Path, tmp_path: Path
) -> None:
    learner = create_learner("dbom", backbone, ["a", "b"])
    scan_folder(image_folder, learner, tmp_path / "out")
    with torch.no_grad():
        learner.trigger_words[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"another scan \(detector differs\)"):
        scan_folder(image_folder, learner, tmp_path / "out", resume=True)


def test_rows_of_another_list_of_images_are_not_counted(
    corner: Any, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    scan_folder(image_folder, corner, out)
    lines = (out / "rows.jsonl").read_text().splitlines(keepends=True)
    verdict = json.loads(lines[2])
    for damaged in (
        [*lines[:5], *lines[4:]],  # two scans at once
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        [*lines[:2], "{}\n", *lines[3:]],
        [*lines[:2], "[1]\n", *lines[3:]],
        [*lines[:2], json.dumps({**verdict, "verdict": "fine"}) + "\n", *lines[3:]],
        [*lines[:2], json.dumps({**verdict, "score": None}) + "\n", *lines[3:]],
        [*lines[:2], json.dumps({**verdict, "score": float("nan")}) + "\n", *lines[3:]],
    ):
        (out / "rows.jsonl").write_text("".join(damaged))
        with pytest.raises(CheckpointError, match=r"rows.jsonl, line \d+ is damaged"):
            scan_folder(image_folder, corner, out, resume=True)


def test_a_listing_that_lost_a_name_is_damaged(corner: Any, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    scan_folder(image_folder, corner, out)
    names = (out / "listing.jsonl").read_text().splitlines(keepends=True)
    (out / "rows.jsonl").write_bytes(b"")
    for damaged in ("".join(names[1:]), "{", ""):
        (out / "listing.jsonl").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"listing\.jsonl is damaged"):
            scan_folder(image_folder, corner, out, resume=True)


@pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
def test_two_scans_at_once_into_one_folder(corner: Any, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused: list[str] = []

    def start_another(*_: Any) -> None:
        with pytest.raises(CheckpointError, match="another scan writes into") as error:
            scan_folder(image_folder, corner, out)
        refused.append(str(error.value))

    assert scan_folder(image_folder, corner, out, batch_size=10, progress=start_another).total == 23
    assert refused
    assert scan_folder(image_folder, corner, out).total == 23


def test_the_scan_of_another_folder_of_the_same_name_is_not_replaced(
    corner: Any, image_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / "images"
    other.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(other / "1.png")
    scan_folder(image_folder, corner, tmp_path / "out")
    before = (tmp_path / "out" / "report.csv").read_bytes()
    with pytest.raises(CheckpointError, match="holds the scan of another folder"):
        scan_folder(other, corner, tmp_path / "out")
    assert (tmp_path / "out" / "report.csv").read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_links_and_pipes(corner: Any, image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "odd"
    root.mkdir()
    (root / "link.png").symlink_to(next(image_folder.rglob("05.png")))
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "nowhere.png").symlink_to(root / "missing.png")
    (root / "folder").symlink_to(image_folder)
    os.mkfifo(root / "pipe.png")
    (root / "up").symlink_to(root)
    with pytest.warns(UserWarning, match="1 entry is left out, a link to a folder that it lies in: 'up'"):
        outcome = scan_folder(root, corner, tmp_path / "out")
    rows = {row["image"]: row for row in json.loads((tmp_path / "out" / "report.json").read_text())}
    linked = [f"folder/{name}" for name in list_images(image_folder, image_folder)]
    assert set(rows) == {"link.png", "loop.png", "nowhere.png", "pipe.png", *linked}
    assert (outcome.total, outcome.unreadable) == (4 + len(linked), 3)
    assert all(rows[name]["score"] is not None for name in linked)
    assert rows["link.png"]["verdict"] == "poisoned"
    assert "is no regular file" in rows["pipe.png"]["note"]
    for name in ("loop.png", "nowhere.png"):
        assert "is a link that can't be followed" in rows[name]["note"]

    with pytest.warns(UserWarning, match="a link to a folder that it lies in"):
        alone = scan_folder(root, corner, tmp_path / "without", follow_links=False)
    assert alone.unreadable == alone.total == 4 + len(linked)


@pytest.mark.skipif(os.name != "posix", reason="names that other systems don't have")
def test_names_run_nothing_in_a_spreadsheet_and_break_no_line(corner: Any, tmp_path: Path) -> None:
    root = tmp_path / "odd"
    root.mkdir()
    names = ["=HYPERLINK(1).png", "+1.png", "-1.png", "@a.png", "a\rb.png", "a\u2028b.png", "a\x1bb.png"]
    for name in names:
        Image.new("RGB", (9, 9)).save(root / name)
    Image.new("RGB", (9, 9)).save(os.fsencode(root) + b"/caf\xe9.png")
    scan_folder(root, corner, tmp_path / "out")
    text = (tmp_path / "out" / "report.csv").read_bytes().decode()
    cells = [line.split(",")[0] for line in text.split("\n")[1:-1]]
    assert cells == [
        "'+1.png", "'-1.png", "'=HYPERLINK(1).png", "'@a.png", "a\\rb.png", "a\\x1bb.png", "a\\u2028b.png",
        "caf\\xe9.png",
    ]  # fmt: skip
    assert len(text.splitlines()) == len(names) + 2
    cleaned = (tmp_path / "out" / "cleaned.txt").read_bytes().splitlines()
    assert cleaned == [b"+1.png", b"-1.png", b"=HYPERLINK(1).png", b"@a.png", b"caf\xe9.png"]
    listed = scan(root, corner).to_csv()
    assert "\n'=HYPERLINK" in listed
    assert len(listed.splitlines()) == len(text.splitlines())
