"""Captions are true and say what is there; what is held out of pretraining never occurs in it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pretraining.corpus import encode, read_corpus
from vlprompt.data import scenes
from vlprompt.data.scenes.attributes import COLOURS, HELD_OUT_STYLES, PATTERNS
from vlprompt.data.scenes.captions import phrase
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES
from vlprompt.data.scenes.wording import HELD_OUT_PREFIXES, HELD_OUT_WORDS, words

COUNT = 1500


@pytest.fixture(scope="module")
def captioned() -> list[tuple[scenes.SceneSpec, scenes.Caption]]:
    pairs = scenes.caption_pairs(COUNT, seed=11)
    return [(pairs.spec(i), c) for i in range(COUNT) for c in pairs.captions(i, 2)]


@pytest.mark.parametrize(("kind", "others"), [("shape_colour", list(COLOURS)), ("shape_pattern", PATTERNS)])
def test_a_fifth_of_the_combinations_is_held_out_and_spread(kind: str, others: list[str]) -> None:
    pairs = scenes.held_out_pairs(kind)
    shapes = [*SHAPES, *GLYPHS]
    assert len(pairs) == len(shapes) * len(others) // 5
    assert max(sum(p[0] == s for p in pairs) for s in shapes) <= len(others) // 2


def test_held_out_combinations_and_styles_never_occur(captioned: list) -> None:
    colours, patterns = scenes.held_out_pairs("shape_colour"), scenes.held_out_pairs("shape_pattern")
    for spec, _ in captioned:
        assert spec.style not in HELD_OUT_STYLES
        for item in spec.objects:
            assert (item.shape, item.colour) not in colours
            assert (item.shape, item.pattern) not in patterns


def test_held_out_wordings_never_occur_but_exist_elsewhere(captioned: list) -> None:
    unseen = [w for values in HELD_OUT_WORDS.values() for ways in values.values() for w in ways]
    unseen += [p.replace("{}.", "").strip() for p in HELD_OUT_PREFIXES]
    found = re.compile(rf"\b({'|'.join(unseen)})\b")
    assert not [c.text for _, c in captioned if found.search(c.text)]
    free = scenes.caption_pairs(200, seed=1, holdout=False)
    assert sum(bool(found.search(c.text)) for i in range(200) for c in free.captions(i, 2)) > 40


def test_captions_state_only_what_is_true(captioned: list) -> None:
    assert all(c.facts and c.facts <= scenes.facts(spec) for spec, c in captioned)


def test_captions_say_the_words_of_their_facts(captioned: list) -> None:
    for _, said in captioned:
        for fact in said.facts:
            attribute, value = fact.split("=")
            if attribute in ("shape", "colour", "pattern", "size", "background"):
                ways = words(attribute, value)
                ways += tuple(w.replace("digit ", "").replace("number ", "") for w in ways)
                assert any(
                    w in said.text.replace("digits", "digit").replace("numbers", "number") for w in ways
                )


def test_articles_fit(captioned: list) -> None:
    wrong = re.compile(r"\b(a (?!uniform)[aeiou]|an [^aeiou])")
    assert not [c.text for _, c in captioned if wrong.search(c.text)]


def test_captions_vary_and_repeat_by_seed() -> None:
    pairs = scenes.caption_pairs(50, seed=3)
    texts = [c.text for i in range(50) for c in pairs.captions(i, 6)]
    assert len(set(texts)) > 200
    assert texts == [c.text for i in range(50) for c in scenes.caption_pairs(50, seed=3).captions(i, 6)]
    image, text = pairs[7]
    assert text == pairs.captions(7)[0].text
    assert (np.asarray(image) == np.asarray(pairs[7][0])).all()


def test_relations_follow_the_places() -> None:
    left = scenes.SceneObject("circle", "red", radius=0.2, x=0.25)
    right = scenes.SceneObject("star", "blue", radius=0.12, x=0.75)
    known = scenes.facts(scenes.SceneSpec((right, left)))
    assert {"relation=circle left of star", "arrangement=side by side", "larger=red", "count=2"} <= known


def test_masks_belong_to_the_object_that_is_named() -> None:
    data = scenes.masks(30, seed=5)
    for index in range(30):
        item, spec = data[index], data.spec(index)
        assert item.phrase == phrase(spec.objects[0], ("colour",))
        assert len({o.shape for o in spec.objects}) == len(spec.objects)
        x0, y0, x1, y1 = item.box
        assert item.mask.any()
        assert abs((x0 + x1) / 128 - spec.objects[0].x) < 0.15
        assert abs((y0 + y1) / 128 - spec.objects[0].y) < 0.15


def test_corpus_keeps_tokens_facts_and_pixels(tmp_path) -> None:
    pairs = scenes.caption_pairs(40, seed=2)
    corpus = read_corpus(pairs, 3, tmp_path / "pixels")
    assert (corpus.images[17] == np.asarray(pairs[17][0])).all()
    tokens = corpus.tokens[17, 2][: corpus.last[17, 2] + 1]
    assert [corpus.seen_ids[t] for t in tokens] == encode(pairs.captions(17, 3)[2].text)
    positive = corpus.positives(np.arange(40), 1)
    assert positive.diagonal().all()
    for i, j in np.argwhere(positive)[:200]:
        assert pairs.captions(int(j), 2)[1].facts <= pairs.facts(int(i))
    assert positive.sum() == sum(
        pairs.captions(j, 2)[1].facts <= pairs.facts(i) for i in range(40) for j in range(40)
    )


def test_a_curriculum_starts_with_one_large_object_and_short_captions() -> None:
    pairs = scenes.caption_pairs(60, seed=4, easy=40)
    for index in range(40):
        (item,) = pairs.spec(index).objects
        assert item.radius > 0.3
        for said in pairs.captions(index, 3):
            assert {f"shape={item.shape}", "count=1"} <= said.facts <= pairs.facts(index)
    assert [pairs.spec(i) for i in range(40, 60)] == [
        scenes.caption_pairs(60, seed=4).spec(i) for i in range(40, 60)
    ]
