"""What the page may read: no folder but those that were named, and not too much."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vlprompt.core.errors import DataError
from vlprompt.demo.limits import MAX_TEXT, Limits, check_text_length, checked_folders


@pytest.fixture
def limits(tmp_path: Path) -> Limits:
    """Those of a page that may read ``open`` alone, beside which ``secret`` lies."""
    for name in ("open/below", "secret"):
        (tmp_path / name).mkdir(parents=True)
    return Limits(images=2, folders=checked_folders([tmp_path / "open"]))


def test_a_folder_and_what_is_below_it_may_be_read(limits: Limits, tmp_path: Path) -> None:
    assert limits.folder(str(tmp_path / "open")) == tmp_path / "open"
    assert limits.folder(f"  {tmp_path}/open/below/ ") == tmp_path / "open" / "below"
    assert limits.folder(f"{tmp_path}/secret/../open") == tmp_path / "open"


@pytest.mark.parametrize(
    "text", ["{}/secret", "{}", "{}/open/../secret", "{}/opens", "/", "~", "open/../..", "{}/nowhere"]
)
def test_other_folders_may_not_whether_they_exist_or_not(limits: Limits, tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"lies outside what the page may read: .*open"):
        limits.folder(text.format(tmp_path))


def test_a_link_does_not_lead_out(limits: Limits, tmp_path: Path) -> None:
    os.symlink(tmp_path / "secret", tmp_path / "open" / "link")
    with pytest.raises(DataError, match="outside"):
        limits.folder(str(tmp_path / "open" / "link"))


def test_the_first_folder_is_shown_as_one_would_type_it(
    limits: Limits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert limits.first_folder() == str(tmp_path / "open")
    monkeypatch.chdir(tmp_path)
    assert limits.first_folder() == "open"
    assert limits.folder(limits.first_folder()) == tmp_path / "open"
    assert Limits().first_folder() == ""


def test_mistakes_are_sentences(limits: Limits, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*missing"):
        limits.folder(f"{tmp_path}/open/missing")
    with pytest.raises(DataError, match="Type the folder"):
        limits.folder("  ")
    with pytest.raises(DataError, match="zero character"):
        limits.folder("a\0b")
    with pytest.raises(DataError, match=r"may read no folder.*--folder PATH"):
        Limits().folder(str(tmp_path))
    with pytest.raises(DataError, match="--folder: there is no folder"):
        checked_folders([tmp_path / "missing"])


def test_images_are_counted(limits: Limits) -> None:
    limits.check_count(2)
    with pytest.raises(DataError, match=r"3 images are too many at once; the limit is 2.*--max-images"):
        limits.check_count(3)
    with pytest.raises(DataError, match="no image yet"):
        limits.check_count(0)
    assert 40_000_000 < limits.upload_bytes < 41_000_000


def test_texts_are_measured() -> None:
    assert check_text_length(" a ", "x") == "a"
    with pytest.raises(DataError, match="The phrase: 20,001 characters are too many"):
        check_text_length("a" * (MAX_TEXT + 1), "The phrase")
