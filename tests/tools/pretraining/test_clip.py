"""Pretraining of the embedded CLIP: what its batches and losses say, and that a run can be resumed and shipped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pretraining import read_recipe
from pretraining.batches import CaptionBatches
from pretraining.clip import PretrainOptions, pretrain
from pretraining.corpus import Corpus, encode, read_corpus
from pretraining.objective import _EMPHASIS, _WEIGHT, ContrastiveModule
from vlprompt.backbones.stem import ConvStem
from vlprompt.backbones.tiny_weights import build_model, load_state
from vlprompt.core.errors import ConfigError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.data.scenes.pairs import CaptionPairs
from vlprompt.data.scenes.sentences import attribute_sentences
from vlprompt.data.scenes.wording import HELD_OUT_WORDS
from vlprompt.training.options import TrainOptions


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return read_corpus(CaptionPairs(48, 3, easy=8), 2, tmp_path_factory.mktemp("corpus") / "scenes.u8")


def test_a_fused_stem_computes_the_same() -> None:
    torch.manual_seed(0)
    trained, shipped = ConvStem(24, norm=True), ConvStem(24)
    images = torch.rand(8, 3, 64, 64)
    for _ in range(3):  # running statistics that are not the initial ones
        trained(images)
    assert trained.training
    shipped.load_state_dict(trained.fused())
    assert trained.training  # fusing leaves the trained one as it was
    trained.eval()
    assert shipped(images).shape == (8, 24, 8, 8)
    assert torch.allclose(trained(images), shipped(images), atol=1e-5)
    assert not torch.allclose(trained.train()(images), shipped(images), atol=1e-2)


def test_sentences_about_attributes_hold_no_word_that_is_kept_back() -> None:
    kept_back = {w for values in HELD_OUT_WORDS.values() for words in values.values() for w in words}
    said = [t for values in attribute_sentences().values() for texts in values.values() for t in texts]
    assert not {w for w in kept_back for t in said if f" {w} " in f" {t.strip('.')} "}
    assert not [t for t in said if "sketch" in t or "inverted" in t or " a o" in t or "{" in t]


def test_no_sentence_names_two_values() -> None:
    for attribute, values in attribute_sentences().items():
        texts = [t for sentences in values.values() for t in sentences]
        assert len(texts) == len(set(texts)), attribute


def test_labels_are_the_facts_of_an_image(corpus: Corpus) -> None:
    pairs = CaptionPairs(48, 3, easy=8)
    named = attribute_sentences()
    for image in range(48):
        true = pairs.facts(image)
        for column, facts in enumerate(named.values()):
            expected = [number for number, fact in enumerate(facts) if fact in true]
            assert corpus.labels[image, column] == (expected[0] if expected else -1)
            assert len(expected) <= 1
    assert (corpus.labels >= 0).any(0).sum() >= 10


def test_a_batch_holds_one_sentence_for_every_value(corpus: Corpus) -> None:
    batch = CaptionBatches(corpus, 16, 1).fetch(np.arange(16), 0)
    named = attribute_sentences()
    assert batch["values"] == {name: len(values) for name, values in named.items()}
    row = 0
    for values in named.values():
        for texts in values.values():
            tokens = batch["sentence"][row, : int(batch["sentence_last"][row]) + 1]
            assert [corpus.seen_ids[t] for t in tokens] in [encode(t) for t in texts]
            row += 1
    assert row == len(batch["sentence"])


def test_the_attributes_loss_is_a_weighted_mean_of_cross_entropies(corpus: Corpus) -> None:
    batch = CaptionBatches(corpus, 16, 1).fetch(np.arange(16), 0)
    module = ContrastiveModule(corpus.seen_ids, 1).eval()
    with torch.no_grad():
        found = module.loss(batch)["attributes"]
        image = module.encode_image(batch["image"])
        text = module.encode_text(batch["sentence"], batch["sentence_last"])
        scores = module.clip.logit_scale.exp() * image @ text.T
    total, count = 0.0, 0
    for row in range(16):
        start = 0
        for column, (name, values) in enumerate(batch["values"].items()):
            label = int(batch["label"][row, column])
            if label >= 0:
                probability = scores[row, start : start + values].softmax(0)[label]
                total -= _EMPHASIS.get(name, 1.0) * float(probability.log())
                count += 1
            start += values
    assert float(found) == pytest.approx(_WEIGHT * total / count, rel=1e-4)


def test_the_shipped_model_computes_what_was_trained(corpus: Corpus, tmp_path: Path) -> None:
    module = ContrastiveModule(corpus.seen_ids, 1)
    batch = CaptionBatches(corpus, 16, 1).fetch(np.arange(16), 0)
    module.loss(batch)  # moves the running statistics
    module.eval()
    model = build_model()
    nn.init.zeros_(model.visual.proj)
    write_tensors(tmp_path / "packed", module.packed())
    load_state(model, tmp_path / "packed")
    pixels = (batch["image"].float() / 255 - module.mean) / module.std
    with torch.no_grad():
        ours, shipped = (
            module.encode_image(batch["image"]),
            nn.functional.normalize(model.eval().visual(pixels), dim=-1),
        )
    assert torch.allclose(ours, shipped, atol=5e-3)  # float16 weights


@pytest.mark.slow
def test_pretraining_runs_resumes_and_packs(tmp_path: Path) -> None:
    train = TrainOptions(
        epochs=2, batch_size=32, optimizer="adamw", lr=1e-3, schedule="cosine", warmup_epochs=0
    )
    options = PretrainOptions(images=64, easy=32, easy_epochs=1, captions=2, watch=4, train=train)
    path = pretrain(options, tmp_path / "whole")
    whole = read_tensors(path)[0]
    again = read_tensors(pretrain(options, tmp_path / "whole", resume=True))[0]
    model = build_model()
    load_state(model, path)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_wrong_configuration_names_every_mistake(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("recipe: clip\nimages: -1\ncaption: 3\ntrain: {epoch: 2}\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe(tmp_path / "bad.yaml")
    assert len(caught.value.problems) == 3
