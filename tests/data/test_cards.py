from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vlprompt.data import cards_dir, list_datasets, load_card, load_dataset
from vlprompt.data.cards import card_names, check_classnames
from vlprompt.errors import ConfigError, DataError, UnknownNameError

GOOD = {
    "title": "Mine",
    "task": "classification",
    "paper": "none",
    "licence": "mine",
    "classnames": ["cat", "dog"],
    "templates": ["a {}."],
    "source": {"kind": "split-json", "options": {"folders": ["mine"]}},
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path))
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize("name", card_names())
def test_every_card_says_what_a_result_and_a_person_need(name: str) -> None:
    card = load_card(name)
    assert card.traps
    assert set(card.splits.sizes) == {"train", "val", "test"}
    assert name in list_datasets()
    if card.source.kind != "digits":
        assert "ROOT" in card.by_hand
        assert card.urls
        assert str(card.splits.file).startswith("split_zhou_")
        assert "drive.google.com" in str(card.splits.url)


def test_protocol_facts() -> None:
    """Sizes, names and templates of the few-shot protocol (CoOp, 2109.01134, appendix A)."""
    facts = {n: load_card(n) for n in ("eurosat", "oxford_pets", "dtd")}
    assert {n: len(c.classnames) for n, c in facts.items()} == {"eurosat": 10, "oxford_pets": 37, "dtd": 47}
    assert {n: sum(c.splits.sizes.values()) for n, c in facts.items()} == {
        "eurosat": 27000,
        "oxford_pets": 7349,
        "dtd": 5640,
    }
    assert [c.templates[0] for c in facts.values()] == [
        "a centered satellite photo of {}.",
        "a photo of a {}, a type of pet.",
        "{} texture.",
    ]
    assert facts["eurosat"].classnames[3] == "Highway or Road"
    assert list(facts["oxford_pets"].classnames) == sorted(facts["oxford_pets"].classnames)
    assert list(facts["dtd"].classnames) == sorted(facts["dtd"].classnames)


def test_a_card_of_ones_own_is_listed_and_overrides(own: Path) -> None:
    own.write_text(yaml.safe_dump(GOOD))
    assert "mine" in list_datasets()
    assert load_card("mine").title == "Mine"
    assert (cards_dir() / "eurosat.yaml").is_file()


def test_all_mistakes_of_a_card_at_once(own: Path) -> None:
    bad = {**GOOD, "titel": "x", "classnames": ["cat", "Cat"], "templates": ["a photo"], "metric": "f1"}
    del bad["paper"]
    own.write_text(yaml.safe_dump(bad))
    with pytest.raises(ConfigError) as caught:
        load_card("mine")
    message = str(caught.value)
    assert "5 problems" in message
    unknown, missing = "'titel'. Did you mean 'title'", "paper: Field required"
    for part in (unknown, missing, "two classes are called", "exactly one {}", "metric: Input should be"):
        assert part in message


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- 1", "is a mapping")])
def test_a_card_that_is_no_card(own: Path, text: str, message: str) -> None:
    own.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_card("mine")


def test_wrong_source_options_name_the_card(own: Path, tmp_path: Path) -> None:
    own.write_text(yaml.safe_dump({**GOOD, "source": {"kind": "split-json", "options": {"folder": "x"}}}))
    with pytest.raises(ConfigError, match=r"card mine: source\.options: 2 problems"):
        load_dataset("mine", root=tmp_path)
    own.write_text(yaml.safe_dump({**GOOD, "source": {"kind": "split-jsn"}}))
    with pytest.raises(UnknownNameError, match="'split-json'"):
        load_dataset("mine", root=tmp_path)


def test_unknown_card() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'eurosat'"):
        load_card("eurosta")


def test_classname_rules() -> None:
    check_classnames(["cat", "dog"], "here")
    with pytest.raises(DataError, match="here: the class from ' _' \\(number 1\\) has an empty name"):
        check_classnames(["cat", " _"], "here")
    with pytest.raises(DataError, match="two classes are called 'big cat'"):
        check_classnames(["Big_Cat", "big  cat"], "here")
