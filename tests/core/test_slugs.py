"""Names of files out of any text: injective, readable, inside the folder; those of classes can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlprompt.core.slugs import folder_word, slug, text_of

TEXTS = [
    "my dog", "my_dog", "my-dog", "my  dog", "My dog", "tv/monitor", "tv-monitor", "scenes/shape", "scenes-shape",
    "a", "a.", ".a", "..", ".", "../../x", "/etc/x", "a\\b", "a:b", "folder:/x/y", "folder:/z/y", "folder:/x/y/",
    "x" * 300, "x" * 301, "", " ", "é", "e\u0301", "con", "COM1", "a\nb", "a\x00b", "100%", "100%25", "a%2Fb",
    "__MACOSX", "scenes/a/b", "scenes/..", "-a", "a-", "\udce9",
]  # fmt: skip


def test_no_two_texts_share_a_name() -> None:
    for name in (slug, folder_word):
        words = [name(text) for text in TEXTS]
        assert len(set(words)) == len(words)
    looks_like_one = slug("my dog")
    assert slug(looks_like_one) != looks_like_one


@pytest.mark.parametrize("text", [text for text in TEXTS if text])
def test_names_stay_inside_a_folder(text: str, tmp_path: Path) -> None:
    for word in (slug(text), folder_word(text)):
        assert Path(word).name == word
        assert word not in (".", "..")
        assert "\0" not in word
        (tmp_path / word).mkdir()
        assert [path.name for path in tmp_path.iterdir()] == [word]
        (tmp_path / word).rmdir()


def test_plain_names_stay_readable() -> None:
    assert slug("coop") == "coop"
    assert slug("scenes/shape") == "scenes-shape"
    assert slug("scenes/shape@sketch") == "scenes-shape@sketch"
    assert slug("ViT-B-16") == "ViT-B-16"
    assert slug("my dog").startswith("my-dog-")
    assert folder_word("traffic light") == "traffic light"
    assert folder_word("tv/monitor") == "tv%2Fmonitor"


@pytest.mark.parametrize("text", [text for text in TEXTS if text and len(text) < 200])
def test_names_of_classes_are_read_back(text: str) -> None:
    assert text_of(folder_word(text)) == text


def test_other_names_of_folders_stay_what_they_are() -> None:
    for word in ("100% wool", "%zz", "a%2fb", "plain"):
        assert text_of(word) == word
