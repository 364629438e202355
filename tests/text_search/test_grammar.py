"""The offline grammar: what it can say, what it recombines, and that it ends."""

from __future__ import annotations

import numpy as np
import pytest

from tests.text_search.conftest import ToyScorer
from vlprompt.core.errors import ConfigError
from vlprompt.text_search.proposers import PROPOSERS, create_proposer
from vlprompt.text_search.proposers.base import Candidate, Request
from vlprompt.text_search.proposers.grammar import Grammar

SMALL = {
    "opening": [""],
    "adjective": ["", "old"],
    "medium": ["", "photo"],
    "determiner": ["a"],
    "kind": [""],
    "place": ["", "outdoors"],
}
ALL = {
    "a {}.",
    "a old {}.",
    "a photo of a {}.",
    "an old photo of a {}.",
    "a {} outdoors.",
    "a old {} outdoors.",
    "a photo of a {} outdoors.",
    "an old photo of a {} outdoors.",
}


def _request(history: list[str], count: int = 50, seed: int = 0, seen: set[str] | None = None) -> Request:
    toy = ToyScorer({"photo": 1.0})
    candidates = [Candidate(text, toy.score([text])[0], 0) for text in history]
    known = {text.casefold() for text in history} if seen is None else seen
    return Request(1, count, candidates, known, np.random.default_rng(seed))


def test_a_small_grammar_is_said_completely_and_once() -> None:
    grammar = Grammar(phrases=SMALL)
    first = grammar.propose(_request([]))
    assert sorted(first.texts) == sorted(ALL)
    assert not first.exhausted
    second = grammar.propose(_request([], seen={text.casefold() for text in first.texts}))
    assert (list(second.texts), second.exhausted) == ([], True)


def test_words_of_hand_written_templates_take_part() -> None:
    grammar = Grammar(phrases=SMALL)
    texts = grammar.propose(_request(["the colour is {} objects."])).texts
    assert "an old photo of a {} objects." in texts
    assert "the colour is {} outdoors." in texts


@pytest.mark.parametrize(
    "template", ["a photo of a {}.", "this is the {} from above.", "{}.", "my own words, {}!"]
)
def test_a_template_is_taken_apart_and_put_together(template: str) -> None:
    head, tail = Grammar().parse(template)
    before = f"{head.text()} " if head.text() else ""
    assert f"{before}{{}}{tail.text()}.".replace("!.", "!") == template


def test_proposals_follow_the_seed_and_the_history() -> None:
    grammar = Grammar()
    history = ["a blurry photo of the {}.", "a sketch of a {} outdoors."]
    texts = list(grammar.propose(_request(history, 8, 3)).texts)
    assert texts == list(grammar.propose(_request(history, 8, 3)).texts)
    assert texts != list(grammar.propose(_request(history, 8, 4)).texts)
    assert len(set(texts)) == 8


def test_without_fresh_sentences_all_are_children() -> None:
    grammar = Grammar(fresh=0)
    texts = grammar.propose(_request(["a blurry photo of the {} outdoors."], 40)).texts
    parts = {"blurry", "photo", "the", "outdoors"}
    for text in texts:  # one slot of the four was changed
        assert len(parts - set(text.replace(".", "").replace(",", "").split())) <= 1


def test_wrong_phrases_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'medium'"):
        create_proposer("grammar", {"phrases": {"mediun": ["photo"]}})
    with pytest.raises(ConfigError, match=r"phrases\.place: it needs at least one phrase"):
        create_proposer("grammar", {"phrases": {"place": []}})


def test_every_proposer_says_what_it_is() -> None:
    assert {"grammar", "chat", "local", "clusters", "retrieval", "replay"} <= set(PROPOSERS.names())
    for entry in PROPOSERS:
        assert 10 <= len(entry.summary) <= 80
        assert entry.target.__doc__


@pytest.mark.parametrize("secret", ["api_key", "token"])
def test_a_key_among_the_options_is_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(ConfigError, match="environment variable") as caught:
        create_proposer("chat", {"model": "m", secret: "sk-secret"})
    assert "sk-secret" not in str(caught.value)


def test_options_that_are_missing_or_unknown_are_named() -> None:
    with pytest.raises(ConfigError, match="model: required, but missing"):
        create_proposer("chat", {})
    with pytest.raises(ConfigError, match="frech: unknown key; did you mean 'fresh'"):
        create_proposer("grammar", {"frech": 1})
