"""Descriptions of classes: where they come from, what is refused, and what they change."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlprompt import create_adapter, create_learner, load, load_dataset, save
from vlprompt.backbones import Backbone
from vlprompt.core.descriptions import Descriptions, class_texts
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data.cards import load_card
from vlprompt.data.descriptions import (
    DescriptionOptions,
    descriptor_sentence,
    waffle_sentences,
    with_descriptions,
)
from vlprompt.data.prepare import explain
from vlprompt.experiments.config import ImageOptions
from vlprompt.learners import LEARNERS

NAMES = ["dog", "red circle", "hummingbird"]
TEMPLATES = ["a photo of a {}.", "the {}."]
OWN = {
    "Dog": ["a dog barks.", "an animal, dog, runs."],
    "red_circle": ["a round red thing."],
    "hummingbird": ["it hums."],
}


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def animals(tmp_path: Path) -> list[tuple[Any, int]]:
    return [(Image.new("RGB", (8, 8)), label) for label in (0, 1, 2)]


def test_descriptions_written_from_the_templates_are_the_templates(backbone: Backbone) -> None:
    filled = {name: [t.format(name) for t in TEMPLATES] for name in NAMES}
    described = Descriptions(TEMPLATES, filled)
    expected = backbone.class_weights(NAMES, TEMPLATES)
    assert torch.equal(backbone.class_weights(NAMES, described), expected)
    turned = Descriptions(TEMPLATES, {name: texts[::-1] for name, texts in filled.items()})
    torch.testing.assert_close(backbone.class_weights(NAMES, turned), expected)
    both = Descriptions(TEMPLATES, filled, with_templates=True)  # every sentence twice
    torch.testing.assert_close(backbone.class_weights(NAMES, both), expected)


def test_a_class_is_the_centroid_of_its_own_sentences(backbone: Backbone) -> None:
    weights = backbone.class_weights(NAMES, Descriptions(TEMPLATES, OWN))
    for row, texts in zip(weights, OWN.values(), strict=True):
        mean = torch.stack([backbone.encode_text([text])[0] for text in texts]).mean(0)
        torch.testing.assert_close(row, F.normalize(mean, dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in LEARNERS.names() if n not in ("cones", "lasp")])
def test_every_learner_takes_them(name: str, backbone: Backbone, images: Tensor, tmp_path: Path) -> None:
    """Saved and loaded too; what reads sentences of classes reads these, whatever else it learns."""
    described = Descriptions(TEMPLATES, OWN)
    learner = create_learner(name, backbone, NAMES, described).eval()
    if learner.prepares:
        learner.prepare(backbone.image_embeddings(images)[None], torch.arange(6) % 3)
    save(learner, tmp_path)
    other = load(tmp_path, backbone)
    assert other.templates == described
    with torch.no_grad():
        assert torch.equal(other(images), learner(images))
        assert other.with_classes(NAMES[::-1]).templates == described if not learner.class_bound else True


def test_the_teacher_of_kgcoop_and_an_adapter_read_them(backbone: Backbone) -> None:
    described = Descriptions(TEMPLATES, OWN)
    weights = backbone.class_weights(NAMES, described)
    assert torch.equal(create_learner("kgcoop", backbone, NAMES, described).zero_shot, weights)  # type: ignore[arg-type]
    assert torch.equal(create_adapter("zero", backbone, NAMES, described).learner.class_weights(), weights)


def test_uneven_sentences_of_coprompt_begin_again(backbone: Backbone) -> None:
    learner: Any = create_learner("coprompt", backbone, NAMES, Descriptions(TEMPLATES, OWN))
    features = learner.sentence_features()
    assert features.shape == (2, 3, backbone.dim)
    torch.testing.assert_close(features[0, 1], features[1, 1])
    assert (features[0, 0] - features[1, 0]).abs().max() > 0.01


def test_a_file_of_sentences_is_matched_by_name(animals: list[Any], tmp_path: Path) -> None:
    path = written(tmp_path / "own.json", OWN)
    data = load_dataset(animals, classnames=NAMES, templates=TEMPLATES, descriptions=path)
    assert data.templates == Descriptions(TEMPLATES, OWN)
    assert list(data.templates) == TEMPLATES
    assert class_texts("Red Circle", data.templates) == ("a round red thing.",)
    plain = load_dataset(animals, classnames=NAMES, templates=TEMPLATES)
    assert set(data.fingerprint()) - set(plain.fingerprint()) == {"descriptions_hash"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({**OWN, "cat": ["a cat."]}, "1 keys name no class: 'cat'"),
        ({"dog": ["a dog."]}, "2 of 3 classes have no texts: 'red circle', 'hummingbird'"),
        ({**OWN, "dog": "a dog."}, "'dog' needs a list of texts; got 'a dog.'"),
        ({**OWN, "dog": []}, "'dog' needs a list of texts"),
        ([1], "is no mapping of classes to texts"),
    ],
)
def test_files_that_do_not_fit(content: Any, reason: str, animals: list[Any], tmp_path: Path) -> None:
    path = written(tmp_path / "own.json", content)
    with pytest.raises(DataError, match=reason):
        load_dataset(animals, classnames=NAMES, descriptions=path)
    (tmp_path / "own.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="is not JSON"):
        load_dataset(animals, classnames=NAMES, descriptions=path)


def test_unmatched_ones_are_counted(
    animals: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "own.json", {"dog": ["a dog."], "cat": ["a cat."]})
    options = {"source": str(path), "unmatched": "skip"}
    data = load_dataset(animals, classnames=NAMES, templates=TEMPLATES, descriptions=options)
    assert class_texts("dog", data.templates) == ("a dog.",)
    assert class_texts("hummingbird", data.templates) == ("a photo of a hummingbird.", "the hummingbird.")
    assert (
        "2 classes without descriptions have the templates; texts of 1 other names are left out"
        in caplog.text
    )


def test_a_configuration_passes_all_options_on(animals: list[Any]) -> None:
    for options in ({"source": "waffle", "draw": 2}, {"source": "grammar", "with_templates": True}):
        section = ImageOptions(descriptions=options)  # type: ignore[arg-type]
        data = load_dataset(animals, classnames=NAMES, **section.image_arguments())
        assert data.templates == load_dataset(animals, classnames=NAMES, descriptions=options).templates
    assert ImageOptions(descriptions={"source": "own.json"}).described() == ["own.json"]  # type: ignore[arg-type]


def test_options_that_have_no_effect_are_refused(animals: list[Any]) -> None:
    for options, reason in (
        ({"source": "waffle", "form": "descriptor"}, "'form' is of files only"),
        ({"source": "own.json", "pairs": 3}, "'pairs' is of source waffle only"),
        ({"source": "waffle", "drw": 3}, "did you mean 'draw'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            load_dataset(animals, classnames=NAMES, descriptions=options)


@pytest.mark.parametrize(
    ("descriptor", "sentence"),
    [
        ("four legs", "dog, which has four legs."),
        ("a wet nose.", "dog, which is a wet nose."),
        (
            "amber eyes",
            "dog, which has amber eyes.",
        ),  # not "a": the published rule takes any word that begins with it
        ("often barks", "dog, which often barks."),
        ("used for herding", "dog, which is used for herding."),
    ],
)
def test_descriptors_become_sentences(descriptor: str, sentence: str) -> None:
    assert descriptor_sentence("dog", descriptor) == sentence


def test_descriptors_are_told_from_sentences(
    animals: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "own.json", {name: ["four legs", "fur"] for name in NAMES})
    load_dataset(animals, classnames=NAMES, descriptions=path)
    assert "0 of 6 texts name their class; if they are descriptors, write form: descriptor" in caplog.text
    data = load_dataset(animals, classnames=NAMES, descriptions={"source": str(path), "form": "descriptor"})
    assert class_texts("dog", data.templates) == ("dog, which has four legs.", "dog, which has fur.")


def test_the_control_says_the_same_of_all_classes() -> None:
    sentences = waffle_sentences(NAMES, pairs=4, seed=3)
    tails = [[text.removeprefix(name) for text in texts] for name, texts in sentences.items()]
    assert tails[0] == tails[1] == tails[2]
    assert len(set(tails[0])) == 8
    words = [tail.removeprefix(", which has ").rstrip(".").split() for tail in tails[0]]
    assert {len(parts) for parts in words} == {1}  # 4 words in 3 names
    assert {len(parts[0]) for parts in words[1::2]} == {6}  # 23 characters in 4 words
    assert waffle_sentences(NAMES, 4, 3) == sentences
    assert waffle_sentences(NAMES, 4, 4) != sentences


def test_the_grammar_knows_other_words_for_what_scenes_name() -> None:
    data = load_dataset("scenes/shape", "test", descriptions="grammar")
    assert "a photo of a plus sign." in class_texts("cross", data.templates)
    own = load_dataset("scenes/shape_colour", "test", descriptions="grammar")
    assert [class_texts(name, own.templates)[0] for name in own.classnames[:2]] == [
        "a photo of a purple cloud.",
        "a photo of an orange arrow.",
    ]


def test_the_grammar_says_a_foreign_name_once() -> None:
    names = ["stop sign", "oil_painting"]
    described = with_descriptions(["a photo of a {}."], names, DescriptionOptions.of("grammar"), "mine")
    assert list(described.texts("stop sign")) == [
        "a photo of a stop sign.",
        "a picture of a stop sign.",
        "an image of a stop sign.",
        "a stop sign.",
        "this is a stop sign.",
        "there is a stop sign.",
    ]
    assert described.texts("oil_painting")[0] == "a photo of an oil painting."
    assert waffle_sentences(names, 2, 1)["oil_painting"][0].startswith("oil painting, which has ")


def test_descriptions_survive_processes_and_name_what_is_missing() -> None:
    described = Descriptions(TEMPLATES, OWN, with_templates=True)
    for copied in (pickle.loads(pickle.dumps(described)), copy.deepcopy(described)):
        assert copied == described
        assert hash(copied) == hash(described)
    assert described != tuple(TEMPLATES)
    assert described != Descriptions(TEMPLATES, OWN)
    with pytest.raises(DataError, match="the class 'cat' has no descriptions; there are some of 'dog'"):
        described.texts("cat")


def test_prepare_says_where_public_ones_are() -> None:
    text = explain(load_card("eurosat"))
    assert "github.com/sarahpratt/CuPL" in text
    assert "neither repository has a licence" in text


def test_a_file_with_a_byte_order_mark(animals: list[Any], tmp_path: Path) -> None:
    """As editors of Windows write it."""
    path = tmp_path / "own.json"
    content = json.dumps({name: [f"a {name}."] for name in NAMES})
    path.write_text(content, encoding="utf-8-sig")
    data = load_dataset(animals, classnames=NAMES, descriptions=path)
    assert list(class_texts("dog", data.templates)) == ["a dog."]
