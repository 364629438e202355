"""Which words stand for which classes, on a WordNet small enough to work it out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pretraining.photo_sentences import UNKNOWN, SentenceBatches, said
from pretraining.photo_words import Vocabulary, WordNet, plain_words, read_vocabulary
from tests.tools.pretraining.wordnet import write_wordnet
from vlprompt.core.errors import DataError
from vlprompt.data.imagenet import synset_ids

RETRIEVER, PERSIAN = (synset_ids("imagenet").index(i) for i in ("n02099601", "n02123394"))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return read_vocabulary(WordNet(write_wordnet(tmp_path_factory.mktemp("wordnet"))), 0.5, 1)


def meaning(vocabulary: Vocabulary, phrase: str) -> tuple[str, tuple[int, ...], str]:
    i = vocabulary.phrases.index(phrase)
    return vocabulary.kinds[i], vocabulary.members[i], vocabulary.above[i]


def test_words_stand_for_the_classes_below_them(vocabulary: Vocabulary) -> None:
    assert meaning(vocabulary, "golden retriever") == ("name", (RETRIEVER,), "dog")
    assert meaning(vocabulary, "dog") == ("hypernym", (RETRIEVER,), "animal")
    assert meaning(vocabulary, "beast")[1] == tuple(sorted((RETRIEVER, PERSIAN)))
    assert len(meaning(vocabulary, "entity")[1]) == 1000
    assert meaning(vocabulary, "dogs")[:2] == ("plural", (RETRIEVER,))


def test_of_several_meanings_the_first_that_has_classes_counts(vocabulary: Vocabulary) -> None:
    # The more frequent "cat", a guy, has no class below it.
    assert meaning(vocabulary, "cat")[1] == (PERSIAN,)


def test_common_kinds_of_known_things_stand_for_what_they_are_kinds_of(vocabulary: Vocabulary) -> None:
    assert meaning(vocabulary, "toy dog") == ("near", (RETRIEVER,), "dog")
    assert "lapdog" not in vocabulary.phrases  # no text uses it
    assert "guy" not in vocabulary.phrases  # a kind of something that is everything


def test_only_compounds_are_held_out_and_no_name(vocabulary: Vocabulary) -> None:
    kept_back = {vocabulary.phrases[i] for i in vocabulary.held_out}
    assert kept_back
    assert kept_back < {"domestic dog", "house cat", "persian cat", "golden retriever"}
    assert all(vocabulary.kinds[i] != "name" for i in vocabulary.held_out)
    assert not kept_back & set(vocabulary.above)
    batches = SentenceBatches(vocabulary, 64, 1)
    assert not set(batches.rows) & vocabulary.held_out


def test_what_is_not_wordnet_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install wordnet-base"):
        WordNet(tmp_path)
    folder = write_wordnet(tmp_path / "other")
    text = (folder / "data.noun").read_text().replace("\n02099601 ", "\n02099602 ")
    (folder / "data.noun").write_text(text)
    with pytest.raises(DataError, match=r"02099601.*version 3\.0"):
        read_vocabulary(WordNet(folder), 0, 1)


def test_sentences_hold_their_phrase() -> None:
    rng = np.random.default_rng(0)
    drawn = [said("golden retriever", "dog", ["big"], rng) for _ in range(400)]
    assert all("golden retriever" in text for text in drawn)
    assert len(set(drawn)) > 80
    assert any("a type of dog" in text for text in drawn)
    assert 10 < max(text.count(UNKNOWN) for text in drawn) <= 16


def test_batches_are_repeatable_and_say_which_classes_are_meant(vocabulary: Vocabulary) -> None:
    batches, again = (SentenceBatches(vocabulary, 32, 5) for _ in range(2))
    part = batches.plan(3)[0]
    batch, same = batches.fetch(part, 3), again.fetch(part, 3)
    assert all(batch[key].equal(same[key]) for key in batch)
    assert not batch["text"].equal(batches.fetch(part, 4)["text"][:, : batch["text"].shape[1]])
    assert batch["members"].sum(1).tolist() == pytest.approx([1.0] * 32)
    end, unknown = len(batches.seen_ids) - 1, len(batches.seen_ids)
    assert batches.seen_ids[end] == 49407
    assert (batch["text"].gather(1, batch["last"][:, None]) == end).all()
    assert int(batches.tokens([f"{UNKNOWN} dog", "xylophonist"])["text"].max()) == unknown


def test_plain_words_are_sentences_of_yaml_strings() -> None:
    found = plain_words()
    assert all(isinstance(w, str) and all(isinstance(m, str) for m in ms) for w, ms in found["words"].items())
    assert all(isinstance(a, str) for a in found["adjectives"])
