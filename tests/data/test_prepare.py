"""``vlprompt data`` against a server on this machine: fetch, resume, check, refuse, explain."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.commands import Command
from tests.data.layouts import data_of, make
from tests.data.serving import Site, serve
from vlprompt.core.errors import DataError
from vlprompt.data import load_card, load_dataset
from vlprompt.data.prepare import fetch, status


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve() as running:
        yield running


def archive_of(split: bool = True) -> tuple[bytes, bytes]:
    """Return a packed folder ``mine/jpg`` of two classes, and its split file."""
    out, rows = io.BytesIO(), []
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for i in range(12):
            info, data = tarfile.TarInfo(f"jpg/{i}.jpg"), data_of(i % 2)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            rows.append([f"{i}.jpg", i % 2, ("cat", "dog")[i % 2]])
    return out.getvalue(), json.dumps({"train": rows[:6], "val": rows[6:8], "test": rows[8:]}).encode()


@pytest.fixture
def mine(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A card whose archive and split file are served here; returns the root of data."""
    site.files["mine.tar.gz"], site.files["split_mine.json"] = archive_of()
    card = {
        "title": "Mine", "task": "classification", "paper": "none", "licence": "mine", "templates": ["a {}."],
        "classnames": ["cat", "dog"], "by_hand": "Unpack mine.tar.gz to ROOT/mine/jpg.", "traps": ["Cats move."],
        "archives": [
            {"urls": [site.url("mine.tar.gz")], "mb": 1, "into": "mine", "checksum": sha(site, "mine.tar.gz")}
        ],
        "splits": {
            "file": "split_mine.json", "url": "https://example.org", "mirror": site.url("split_mine.json"),
            "checksum": sha(site, "split_mine.json"), "sizes": {"train": 6, "val": 2, "test": 4},
        },
        "source": {"kind": "images", "options": {"folders": ["mine"], "images": "jpg"}},
    }  # fmt: skip
    cards = tmp_path / "cards"
    cards.mkdir()
    (cards / "mine.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.setenv("VLPROMPT_CARDS", str(cards))
    return tmp_path / "data"


def sha(site: Site, name: str) -> str:
    return f"sha256:{hashlib.sha256(site.files[name]).hexdigest()}"


def test_fetch_check_and_use(mine: Path, site: Site, command: Command) -> None:
    answer = command("data", "check", "mine", "--root", mine)
    assert (answer.status, answer.out.splitlines()[0]) == (1, "mine: absent")
    answer = command("data", "prepare", "mine", "--root", mine)
    assert answer.status == 0
    assert "trap: Cats move." in answer.out
    assert answer.out.splitlines()[-1] == "mine: ready (train 6, val 2, test 4)"
    assert "mine.tar.gz: 0 of 0 MB" in answer.err
    assert not (mine / ".downloads" / "mine").exists()
    data = load_dataset("mine", "test", root=mine)
    assert data.classnames == ("cat", "dog")
    asked = len(site.asked)
    assert (
        command("data", "prepare", "mine", "--root", mine, "--decode").status == 0
    )  # nothing is fetched twice
    assert len(site.asked) == asked


def test_load_dataset_downloads_only_if_asked(mine: Path, site: Site) -> None:
    with pytest.raises(
        DataError,
        match=r"mine is not in .*`vlprompt data prepare mine`, or pass download=True \(1 MB\).*By hand",
    ):
        load_dataset("mine", root=mine)
    assert site.asked == []
    assert len(load_dataset("mine", root=mine, download=True)) == 6


def test_an_interrupted_download_is_resumed(mine: Path, site: Site, command: Command) -> None:
    whole = site.files["mine.tar.gz"]
    (mine / ".downloads" / "mine").mkdir(parents=True)
    (mine / ".downloads" / "mine" / "mine.tar.gz.part").write_bytes(whole[:100])
    assert command("data", "prepare", "mine", "--root", mine).status == 0
    assert site.asked[0] == ("mine.tar.gz", 100)


def test_a_wrong_checksum_leaves_nothing(mine: Path, site: Site, command: Command) -> None:
    site.files["mine.tar.gz"] += b"x"
    answer = command("data", "prepare", "mine", "--root", mine)
    assert answer.status == 1
    assert "wrong checksum" in answer.err
    assert "By hand: Unpack mine.tar.gz" in answer.err
    assert not [p for p in mine.rglob("*") if p.is_file()]


def test_only_the_split_file_is_missing(mine: Path, site: Site, command: Command) -> None:
    assert command("data", "prepare", "mine", "--root", mine).status == 0
    (mine / "mine" / "split_mine.json").unlink()
    site.asked.clear()
    with pytest.raises(
        DataError, match=r"split_mine\.json is missing\. Fetch it with `vlprompt data prepare mine`"
    ):
        load_dataset("mine", root=mine)
    assert command("data", "prepare", "mine", "--root", mine).status == 0
    assert site.asked == [("split_mine.json", 0)]


def test_a_damaged_image_and_a_missing_one(mine: Path, command: Command) -> None:
    command("data", "prepare", "mine", "--root", mine)
    (mine / "mine" / "jpg" / "8.jpg").write_bytes(b"no image")
    answer = command("data", "check", "mine", "--root", mine, "--decode")
    assert answer.status == 1
    assert "mine: incomplete (train 6, val 2, test 4)" in answer.out
    assert "1 of 4 images can't be read: 8.jpg" in answer.out
    (mine / "mine" / "jpg" / "9.jpg").unlink()
    answer = command("data", "check", "mine", "--root", mine)
    assert answer.status == 1
    assert "1 of the 12 images that split_mine.json lists are missing" in answer.out


def test_what_lies_there_is_not_overwritten(mine: Path, command: Command) -> None:
    (mine / "mine").mkdir(parents=True)
    (mine / "mine" / "notes.txt").write_text("mine")
    (mine / "mine" / "jpg").write_text("a file called like the folder")
    answer = command("data", "prepare", "mine", "--root", mine)
    assert answer.status == 1
    assert "is in the way; move it elsewhere" in answer.err
    (mine / "mine" / "jpg").unlink()
    assert command("data", "prepare", "mine", "--root", mine).status == 0
    assert (mine / "mine" / "notes.txt").read_text() == "mine"


def test_sets_that_nobody_serves_say_what_to_put_where(tmp_path: Path, command: Command) -> None:
    answer = command("data", "prepare", "stanford_cars", "--root", tmp_path)
    assert answer.status == 1
    assert "authors' pages have been gone since 2023" in answer.out
    assert "it can't be downloaded automatically" in answer.err
    assert "ROOT/stanford_cars/cars_train/00001.jpg" in answer.err
    with pytest.raises(
        DataError, match=r"It can't be downloaded automatically.*bffea656d6f425cba3c91c6d8333"
    ):
        load_dataset("stanford_cars", root=tmp_path)


def test_unknown_names_and_no_names(command: Command) -> None:
    answer = command("data", "prepare", "eurosta")
    assert answer.status == 2
    assert "Did you mean 'eurosat'" in answer.err
    assert command("data", "prepare").status == 2


def test_check_of_everything_lists_all_cards(tmp_path: Path, command: Command) -> None:
    make(load_card("svhn"), load_card("svhn").source, tmp_path)
    answer = command("data", "check", "--root", tmp_path)
    lines = dict(line.split(": ", 1) for line in answer.out.splitlines() if not line.startswith(" "))
    assert answer.status == 0
    assert lines["digits"] == "ready (train 898, val 359, test 540)"
    assert lines["eurosat"] == "absent (95 MB to fetch)"
    assert lines["imagenet"] == "absent (by hand)"
    assert lines["svhn"] == "incomplete (test 20)"  # a miniature is not the whole


def test_nested_archives_and_the_order_of_moves(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caltech-101's form: a zip that holds the tar that holds the images."""
    import zipfile

    card = load_card("caltech101")
    made = tmp_path / "made"
    make(card, card.source, made)
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        archive.add(made / "caltech-101" / "101_ObjectCategories", "101_ObjectCategories")
    with zipfile.ZipFile(tmp_path / "caltech-101.zip", "w") as outer:
        outer.writestr("caltech-101/101_ObjectCategories.tar.gz", inner.getvalue())
        outer.writestr("caltech-101/show_annotation.m", "%")
    site.files["caltech-101.zip"] = (tmp_path / "caltech-101.zip").read_bytes()
    site.files["split.json"] = (made / "caltech-101" / "split_zhou_Caltech101.json").read_bytes()
    served = json.loads(card.model_dump_json(exclude={"name"}))
    served["archives"][0] |= {"urls": [site.url("caltech-101.zip")], "checksum": sha(site, "caltech-101.zip")}
    served["splits"] |= {
        "mirror": site.url("split.json"), "checksum": sha(site, "split.json"),
        "sizes": {"train": 300, "val": 100, "test": 200},
    }  # fmt: skip
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "caltech101.yaml").write_text(yaml.safe_dump(served))
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path / "cards"))
    found = fetch(load_card("caltech101"), tmp_path / "data")
    assert (found.state, found.problems) == ("ready", ())
    assert sorted(p.name for p in (tmp_path / "data" / "caltech-101").iterdir()) == [
        "101_ObjectCategories",
        "show_annotation.m",
        "split_zhou_Caltech101.json",
    ]
    assert status(load_card("caltech101"), tmp_path / "data", decode=True).state == "ready"


def test_all_offline(command: Command) -> None:
    answer = command("data", "check", "--offline")
    assert answer.status == 0
    assert "digits: ready (train 898, val 359, test 540)" in answer.out
    assert "scenes/shape: ready" in answer.out
