"""Very many names: in chunks, what the learner says of all of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import vlprompt
from tests.data.folders import image
from vlprompt.classification.name_list import NameList, build_name_list
from vlprompt.classification.predict import predict
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import Learner

NAMES = [f"{size} {colour} {thing}" for size in ("big", "small", "round") for colour in ("red", "blue", "green")
         for thing in ("cat", "dog", "star", "car", "tree")][:41]  # fmt: skip


@pytest.fixture(scope="module")
def learner() -> Learner:
    learner = vlprompt.create_learner("coop", vlprompt.create_backbone("tiny"), NAMES, context_length=3)
    return learner.eval()


def test_chunks_say_what_the_whole_list_says(learner: Learner, tmp_path: Path) -> None:
    build_name_list(learner, NAMES, tmp_path / "list", chunk=8)  # the last chunk is a single name
    rows = F.normalize(torch.randn(5, learner.backbone.dim, generator=torch_rng(0, "rows")), dim=-1)
    with torch.no_grad():
        expected = learner.logits(rows).softmax(-1).topk(7)
    names, probabilities = NameList(learner, tmp_path / "list").rank_rows(rows, 7)
    assert names == [[NAMES[i] for i in line] for line in expected.indices.tolist()]
    torch.testing.assert_close(torch.tensor(probabilities), expected.values, atol=1e-6, rtol=1e-4)


def test_images_are_named_by_a_list_as_by_the_learner(learner: Learner, tmp_path: Path) -> None:
    build_name_list(learner, NAMES, tmp_path / "list", chunk=16)
    images = [image(i, (32, 32)) for i in range(3)]
    by_list = predict(NameList(learner, tmp_path / "list"), images, 3)
    by_learner = predict(learner, images, 3)
    assert [row["labels"] for row in by_list] == [row["labels"] for row in by_learner]


def test_a_build_goes_on_with_the_chunks_that_are_left(learner: Learner, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join(NAMES) + "\n")

    def dies(what: str, done: int, total: int) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_name_list(learner, tmp_path / "names.txt", tmp_path / "list", chunk=8, progress=dies)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "list").glob("*.safetensors")}
    assert len(stamps) == 2
    assert build_name_list(learner, tmp_path / "names.txt", tmp_path / "list", chunk=8) == len(NAMES)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_an_index_finds_the_same_names(learner: Learner, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    build_name_list(learner, NAMES, tmp_path / "list", chunk=8)
    rows = F.normalize(torch.randn(5, learner.backbone.dim, generator=torch_rng(0, "rows")), dim=-1)
    near, shares = NameList(learner, tmp_path / "list", nearest=True).rank_rows(rows, 4)
    exact, _ = NameList(learner, tmp_path / "list").rank_rows(rows, 4)
    assert near == exact
    torch.testing.assert_close(torch.tensor(shares).sum(1), torch.ones(5))


def test_lists_that_can_not_be(learner: Learner, tmp_path: Path) -> None:
    equal = (
        f"'big red cat' .number {NAMES.index('big red cat') + 1}. and 'Big red cat' .number {len(NAMES) + 1}."
    )
    with pytest.raises(DataError, match=f"can't tell apart: {equal}"):
        build_name_list(learner, [*NAMES, "Big red cat"], tmp_path / "list")
    (tmp_path / "names.txt").write_text("\ufeffcat\r\n\r\n\uff43\uff41\uff54\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"'cat' \(line 1\) and '\uff43\uff41\uff54' \(line 3\)"):
        build_name_list(learner, tmp_path / "names.txt", tmp_path / "list")
    with pytest.raises(DataError, match="at least 2 names, got 1"):
        build_name_list(learner, ["one"], tmp_path / "list")
    cocoop = vlprompt.create_learner("cocoop", learner.backbone, NAMES)
    with pytest.raises(DataError, match="can't name a list in chunks"):
        build_name_list(cocoop, NAMES, tmp_path / "list")

    build_name_list(learner, NAMES[:4], tmp_path / "list")
    with pytest.raises(CheckpointError, match="another list of names"):
        build_name_list(learner, NAMES[:5], tmp_path / "list")
    other = vlprompt.create_learner("zero_shot", learner.backbone, NAMES)
    with pytest.raises(CheckpointError, match="another learner"):
        NameList(other, tmp_path / "list")


def test_a_byte_order_mark_is_no_part_of_a_name(learner: Learner, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfred cat\r\n\r\n  \r\nblue dog\r\n")
    assert build_name_list(learner, tmp_path / "names.txt", tmp_path / "list") == 2
    assert [names for _, _, names in NameList(learner, tmp_path / "list").chunks()] == [
        ["red cat", "blue dog"]
    ]


@pytest.mark.parametrize("content", ["[]", "{}", '{"count": "x"}', "nonsense"])
def test_damaged_facts_are_named(learner: Learner, tmp_path: Path, content: str) -> None:
    build_name_list(learner, NAMES, tmp_path / "list")
    (tmp_path / "list" / "names.json").write_text(content)
    with pytest.raises(CheckpointError, match="holds no list of names"):
        NameList(learner, tmp_path / "list")


def test_a_damaged_index_is_named(learner: Learner, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    build_name_list(learner, NAMES, tmp_path / "list")
    (tmp_path / "list" / "index.faiss").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"index\.faiss is damaged"):
        NameList(learner, tmp_path / "list", nearest=True)
