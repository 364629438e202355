"""Work on shards: equal to the work on single images, wherever it is done and however often it is killed."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlprompt
from tests.data.folders import image
from tests.shards.archives import png, write_tar
from vlprompt.classification.predict import predict
from vlprompt.core.errors import CheckpointError, DataError, VLPromptError
from vlprompt.data.captions.store import build_store
from vlprompt.saved.prompts import save
from vlprompt.shards.job import Job, JobOutcome, run_job
from vlprompt.shards.on_ray import spread
from vlprompt.shards.reading import find_shards, read_shard

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three archives of three images; the second has one that is none, and a file that is no image."""
    for number in range(3):
        members = {f"{number}/{i}.png": png((number, i)) for i in range(3)}
        if number == 1:
            members |= {"1/bad.jpg": b"no image", "1/notes.md": b"words", ".hidden.png": png(0)}
        write_tar(tmp_path / "data" / f"{number:04d}.tar", members)
    return tmp_path / "data"


def encode(shards: Path, folder: Path, on: str = "serial", **changes: Any) -> JobOutcome:
    return run_job(
        Job(kind="encode", data=f"tar:{shards}/*.tar", folder=str(folder), batch_size=2, **changes), on
    )


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "parts").iterdir())}


def test_features_are_those_of_the_backbone(shards: Path, tmp_path: Path) -> None:
    outcome = encode(shards, tmp_path / "out")
    assert (outcome.images, outcome.unreadable, outcome.left_out) == (10, 1, {".md": 1})
    backbone = vlprompt.create_backbone("tiny")

    table = parquet.read_table(tmp_path / "out" / "parts" / "0001.tar.parquet")
    assert table.column("image").to_pylist() == ["1/0.png", "1/1.png", "1/2.png", "1/bad.jpg"]
    rows = table.column("feature").to_pylist()
    assert rows[3] is None
    assert "1/bad.jpg" in table.column("error").to_pylist()[3]
    for i in range(3):
        expected = backbone.encode_image(backbone.preprocess(image((1, i), (32, 32)))[None])
        torch.testing.assert_close(torch.tensor(rows[i])[None], expected, atol=1e-5, rtol=0)


def test_a_killed_job_goes_on_with_the_shards_that_are_left(shards: Path, tmp_path: Path) -> None:
    encode(shards, tmp_path / "whole")
    whole = parts(tmp_path / "whole")
    calls: list[int] = []

    def dies(what: str, done: int, total: int) -> None:
        calls.append(done)
        if done == 2:
            raise KeyboardInterrupt

    job = Job(kind="encode", data=f"tar:{shards}/*.tar", folder=str(tmp_path / "killed"), batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        run_job(job, progress=dies)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "parts").iterdir()}
    assert len(kept) == 2
    outcome = run_job(job)
    assert outcome.done_before == 2
    assert parts(tmp_path / "killed") == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    write_tar(shards / "0002.tar", {"new.png": png("new")})  # another shard of the same name is done again
    write_tar(shards / "0003.tar", {"more.png": png("more")})
    again = run_job(job)
    assert (again.done_before, again.images) == (2, 9)


def test_lists_hold_bytes_or_paths(tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "beside.png").write_bytes(png(2))
    bytes_of = [png(0), png(1), None]
    parquet.write_table(arrow.table({"key": ["a", "b", "c"], "image": bytes_of}), folder / "bytes.parquet")
    parquet.write_table(arrow.table({"image": ["beside.png", "gone.png"]}), folder / "paths.parquet")
    left_out: Counter[str] = Counter()
    rows = list(read_shard(folder / "bytes.parquet", "parquet", left_out))
    assert [(row.name, row.data) for row in rows] == list(zip("abc", bytes_of, strict=True))
    assert "no image here" in rows[2].error
    rows = list(read_shard(folder / "paths.parquet", "parquet", left_out))
    assert rows[0].data == png(2)
    assert "is no file" in rows[1].error
    with pytest.raises(DataError, match="Did you mean 'image'"):
        list(read_shard(folder / "paths.parquet", "parquet", left_out, column="imag"))


def test_captions_stand_beside_images(tmp_path: Path) -> None:
    members = {"a.png": png(0), "a.txt": b"a  cat\n", "b.png": png(1)}
    members |= {"c.txt": b"nothing", "d.txt": b"a dog", "d.png": png(2)}
    path = write_tar(tmp_path / "a.tar", members)
    left_out: Counter[str] = Counter()
    rows = [(row.name, row.caption) for row in read_shard(path, "tar", left_out, captions=True)]
    assert rows == [("a.png", "a cat"), ("d.png", "a dog")]
    assert left_out == {"images without a caption": 1, "captions without an image": 1}


def test_names_are_those_of_single_images(shards: Path, tmp_path: Path) -> None:
    learner = vlprompt.create_learner(
        "zero_shot", vlprompt.create_backbone("tiny"), ["circle", "square", "star"]
    )
    save(learner, tmp_path / "prompt")
    job = Job(
        kind="predict",
        data=f"tar:{shards}/0000.tar",
        folder=str(tmp_path / "out"),
        prompt=str(tmp_path / "prompt"),
        topk=2,
    )
    run_job(job)
    rows = parquet.read_table(tmp_path / "out" / "parts" / "0000.tar.parquet").to_pylist()
    expected = predict(learner, [image((0, i), (32, 32)) for i in range(3)], 2)
    assert [row["labels"] for row in rows] == [row["labels"] for row in expected]
    np.testing.assert_allclose([r["probs"] for r in rows], [r["probs"] for r in expected], atol=1e-5)


def test_pairs_are_the_store_that_meta_training_makes_of_images(tmp_path: Path) -> None:
    backbone = vlprompt.create_backbone("tiny")
    for number in range(2):
        members: dict[str, bytes] = {}
        for i in range(3):
            members |= {f"{i}.png": png((number, i)), f"{i}.txt": f"a red circle {i}".encode()}
        write_tar(tmp_path / "data" / f"{number}.tar", members)

    name = f"tar:{tmp_path}/data/*.tar"
    run_job(Job(kind="pairs", data=name, folder=str(tmp_path / "out")))
    expected = build_store(name, backbone, tmp_path / "expected")
    store = build_store(f"encoded:{tmp_path}/out", backbone, tmp_path / "store")
    assert [store.caption(i) for i in range(6)] == [expected.caption(i) for i in range(6)]
    torch.testing.assert_close(store.image.all(), expected.image.all(), atol=1e-3, rtol=0)
    torch.testing.assert_close(store.text.all(), expected.text.all(), atol=1e-3, rtol=0)

    with pytest.raises(CheckpointError, match="another backbone"):
        build_store(f"encoded:{tmp_path}/out", vlprompt.create_backbone("photo"), tmp_path / "other")
    with pytest.raises(DataError, match="no pixels"):
        store.pixels(0, backbone.preprocess)
    with pytest.raises(DataError, match="vlprompt encode --pairs"):
        build_store(f"encoded:{tmp_path}/nowhere", backbone, tmp_path / "nothing")


def test_mistakes(shards: Path, tmp_path: Path) -> None:
    encode(shards, tmp_path / "out")
    with pytest.raises(CheckpointError, match="another work"):
        run_job(Job(kind="pairs", data=f"tar:{shards}/*.tar", folder=str(tmp_path / "out")))
    with pytest.raises(DataError, match="no archive matches"):
        find_shards(f"tar:{shards}/*.zip")

    (shards / "0000.tar").write_bytes(b"\x00" * 10 + b"garbage" * 200)
    shutil.rmtree(tmp_path / "out")
    outcome = encode(shards, tmp_path / "out")
    assert [part.shard for part in outcome.failed] == ["0000.tar"]
    assert "no readable tar file" in outcome.failed[0].error
    assert outcome.images == 7  # the others have their results
    assert "0000.tar" in json.loads((tmp_path / "out" / "summary.json").read_text())["failed"]


def damage(path: Path, how: str) -> Path:
    """Write an archive of twenty images that is damaged behind the first of them."""
    whole = write_tar(path, {f"{i}.png": png(i) for i in range(20)}).read_bytes()
    half = len(whole) // 2 // 512 * 512
    packed = gzip.compress(whole, mtime=0)
    middle = len(packed) // 2
    header = next(i for i in range(half, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar")
    content = {
        "cut inside a member": whole[: half + 100],
        "a header": whole[:header] + b"?" + whole[header + 1 :],
        "a packed byte": packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :],
        "cut while packed": packed[:middle],
    }
    path.write_bytes(content[how])
    return path


@pytest.mark.parametrize("how", ["cut inside a member", "a header", "a packed byte", "cut while packed"])
@pytest.mark.parametrize("captions", [False, True])
def test_no_damaged_archive_passes_for_a_shorter_one(tmp_path: Path, how: str, captions: bool) -> None:
    path = damage(tmp_path / "a.tar", how)
    with pytest.raises(DataError, match="no readable tar file"):
        list(read_shard(path, "tar", Counter(), captions=captions))


def test_what_may_be_missing_behind_the_end_of_an_archive_is_counted(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "one.tar", {"a.png": png(0)}).read_bytes()
    cases = {
        one: {},
        one.rstrip(b"\0") + b"\0" * (-len(one.rstrip(b"\0")) % 512): "no end mark",
        one + one: "behind their end mark",
    }
    for content, reason in cases.items():
        (tmp_path / "a.tar").write_bytes(content)
        left_out: Counter[str] = Counter()
        assert len(list(read_shard(tmp_path / "a.tar", "tar", left_out))) == 1
        assert bool(left_out) == bool(reason)
        assert all(reason in sentence for sentence in left_out)


def test_a_damaged_list_costs_its_own_shard(tmp_path: Path) -> None:
    data = tmp_path / "lists [old]"
    data.mkdir()
    offsets = arrow.py_buffer(np.array([0, 2], dtype=np.int32).tobytes())
    no_text = arrow.Array.from_buffers(arrow.string(), 1, [None, offsets, arrow.py_buffer(b"\xff\xfe")])
    images = arrow.array([png(0)])
    parquet.write_table(arrow.table({"image": images, "name": no_text}), data / "a.parquet")
    parquet.write_table(arrow.table([images, images], names=["image", "image"]), data / "b.parquet")
    named = {"image": [png(0), png(1)], "name": ["x", None]}
    parquet.write_table(arrow.table(named), data / "c.parquet")

    job = Job(kind="encode", data=f"parquet:{data}/*.parquet", folder=str(tmp_path / "out"))
    outcome = run_job(job)
    assert [part.shard for part in outcome.failed] == ["a.parquet", "b.parquet"]
    assert "2 columns called 'image'" in outcome.failed[1].error
    names = parquet.read_table(tmp_path / "out" / "parts" / "c.parquet.parquet").column("image")
    assert names.to_pylist() == ["x", "c.parquet:1"]

    with pytest.raises(CheckpointError, match="another work \\(column\\)"):
        run_job(job.model_copy(update={"column": "picture"}))
    strange = next(read_shard(data / "c.parquet", "parquet", Counter(), column="name"))
    assert "is no file of an image" in strange.error


def test_a_shard_that_comes_by_anothers_name_is_done_itself(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "b" / "0.tar", {"b.png": png(0)})
    job = Job(kind="encode", data=f"tar:{tmp_path}/data/*/0.tar", folder=str(tmp_path / "out"))
    run_job(job)
    write_tar(
        tmp_path / "data" / "a" / "0.tar", {"a.png": png(1)}
    )  # of the same size, and first in the order
    run_job(job)
    table = parquet.read_table(tmp_path / "out" / "parts" / "0.tar.parquet")
    assert table.column("image").to_pylist() == ["a.png"]


@pytest.mark.slow
def test_a_ray_that_is_started_here_refuses_what_it_has_no_room_for(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(VLPromptError, match="needs 500 cores, 0 GPUs, and this machine has 1 cores"):
        encode(shards, tmp_path / "out", "ray:cores=1,cpus=500")


@pytest.mark.slow
@pytest.mark.parametrize(
    "on", ["processes:2", "ray:cores=2,memory=1GiB,retries=1,workers=2", "slurm:local,jobs=2"]
)
def test_results_are_the_same_bytes_wherever_they_are_made(shards: Path, tmp_path: Path, on: str) -> None:
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}.get(on.partition(":")[0], "pyarrow"))
    encode(shards, tmp_path / "serial")
    encode(shards, tmp_path / "spread", on)
    assert parts(tmp_path / "spread") == parts(tmp_path / "serial")


class Dies:
    """Ends its own process over one item."""

    def __call__(self, item: str) -> dict[str, Any]:
        if item == "deadly":
            os._exit(1)
        return {"item": item}


@pytest.mark.slow
def test_a_shard_that_kills_its_actor_is_not_tried_for_ever() -> None:
    pytest.importorskip("ray")
    with pytest.raises(VLPromptError, match=r"Ray gave up: .* started again 1 times \(retries=\)"):
        list(spread(Dies, (), ["deadly"], "ray:cores=1,retries=1"))
    assert list(spread(Dies, (), ["harmless"], "ray:cores=1,retries=1")) == [{"item": "harmless"}]
