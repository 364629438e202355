"""The honest protocol: what no prediction may depend on, encodings that are shared, states that survive, bad images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vlprompt
from tests.adaptation.test_adapters import build, views_of
from vlprompt import create_adapter, list_adapters, load_dataset
from vlprompt.adaptation import ADAPTERS, Adapter, Predictions
from vlprompt.adaptation.stream import EncodedStream, adapt_dataset
from vlprompt.backbones import Backbone
from vlprompt.core.errors import NonFiniteError
from vlprompt.data import ImageDataset
from vlprompt.data.base import Sample

FEATURES = ["bca", "dmn", "dpe", "ecalp", "oga", "onzeta", "stata", "tda", "tps", "transclip"]
MEMORY = ["bca", "dmn", "dpe", "ecalp", "oga", "onzeta", "tda"]


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("scenes/size@sketch", "val").subset(range(0, 60, 5))


def adapters_for(
    data: ImageDataset, backbone: Backbone, names: list[str], **options: Any
) -> dict[str, Adapter]:
    few = {"views": 3, "augment": "crop_flip", "share": 0.4, **options}
    return {name: create_adapter(name, backbone, data.classnames, **few) for name in names}


@pytest.fixture(scope="module")
def whole(data: ImageDataset, backbone: Backbone) -> dict[str, Predictions]:
    return adapt_dataset(adapters_for(data, backbone, FEATURES), data, batch_size=5)


@pytest.mark.parametrize("name", list_adapters())
def test_labels_and_the_name_of_the_set_change_nothing(
    name: str, data: ImageDataset, backbone: Backbone
) -> None:
    from dataclasses import replace

    few = data.subset(range(4))
    options = {**views_of(name, 3), **({"generated": 0} if name == "difftpt" else {})}
    if name == "promptalign":
        adapter = build(name, backbone, views=3)
        few = replace(few, classnames=adapter.classnames)
    else:
        adapter = create_adapter(name, backbone, few.classnames, **options)

    wrong = tuple(Sample(sample.source, (sample.label + 1) % len(few.classnames)) for sample in few.samples)
    right = adapt_dataset({"a": adapter}, few)["a"]
    for other in (replace(few, samples=wrong), replace(few, name="imagenet_a")):
        assert torch.equal(adapt_dataset({"a": adapter}, other)["a"].probs, right.probs)


@pytest.mark.parametrize("name", [n for n in FEATURES if n not in ("stata", "transclip")])
def test_what_comes_later_changes_nothing(
    name: str, data: ImageDataset, backbone: Backbone, whole: dict[str, Predictions]
) -> None:
    cut = adapt_dataset(adapters_for(data, backbone, [name]), data.subset(range(7)), batch_size=5)
    torch.testing.assert_close(cut[name].probs, whole[name].probs[:7], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["stata", "transclip"])
def test_a_method_sees_its_own_batch_whatever_is_in_memory(
    name: str, data: ImageDataset, backbone: Backbone
) -> None:
    adapters = adapters_for(data, backbone, [name], batch=5)
    results = [adapt_dataset(adapters, data, batch_size=size)[name].probs for size in (1, 7, 16)]
    assert all(torch.equal(probs, results[0]) for probs in results)
    assert len(results[0]) == 12  # the last two are a batch of their own
    alone = adapt_dataset(adapters, data.subset([10, 11]))[name].probs
    assert torch.equal(alone, results[0][10:])


def test_all_orders_share_one_encoding(data: ImageDataset, backbone: Backbone, monkeypatch: Any) -> None:
    calls: list[int] = []
    embed = backbone.vision.encode
    monkeypatch.setattr(
        backbone.vision, "encode", lambda images, *rest: calls.append(len(images)) or embed(images, *rest)
    )
    adapters = adapters_for(data, backbone, FEATURES)
    # One view is the image itself, which is view 0 of every plan.
    adapters["single"] = create_adapter("ecalp", backbone, data.classnames, views=1, augment="augmix")
    encoded = EncodedStream(adapters)
    first = adapt_dataset(adapters, data, encoded=encoded)
    assert sum(calls) == 12 * 3

    for order in range(1, 20):
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(order)).tolist()
        again = adapt_dataset(adapters, data.subset(rows), encoded=encoded)
    assert sum(calls) == 12 * 3
    assert torch.equal(again["tps"].probs, first["tps"].probs[rows])  # takes every image alone
    assert any(not torch.equal(again[name].probs, first[name].probs[rows]) for name in MEMORY)


@pytest.mark.parametrize("name", MEMORY)
def test_state_is_saved_loaded_and_forgotten(
    name: str, data: ImageDataset, backbone: Backbone, whole: dict[str, Predictions]
) -> None:
    images = [image for image, _ in data]
    adapter = adapters_for(data, backbone, [name])[name]
    adapter.reset()
    first = adapter.predict(images[:7])
    state = adapter.state()
    rest = adapter.predict(images[7:])
    other = adapters_for(data, backbone, [name])[name]
    other.load_state(state)
    assert torch.equal(other.predict(images[7:]).probs, rest.probs)
    adapter.reset()
    assert torch.equal(adapter.predict(images[:7]).probs, first.probs)


@pytest.mark.parametrize("batch", [5, None])
def test_a_killed_stream_of_every_granularity_goes_on_to_the_bit(
    batch: int | None, data: ImageDataset, backbone: Backbone, tmp_path: Path
) -> None:
    def fresh() -> dict[str, Adapter]:
        adapters = adapters_for(data, backbone, MEMORY)
        return {**adapters, **adapters_for(data, backbone, ["stata", "transclip"], batch=batch)}

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    uninterrupted = adapt_dataset(fresh(), data, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        adapt_dataset(fresh(), data, folder=tmp_path, batch_size=4, progress=stop)
    again = adapt_dataset(fresh(), data, folder=tmp_path, batch_size=4)
    for label, predictions in uninterrupted.items():
        assert torch.equal(again[label].probs, predictions.probs), label
        assert again[label].scores.keys() == predictions.scores.keys()


def test_a_damaged_image_is_refused_by_name_and_the_stream_goes_on(
    data: ImageDataset, backbone: Backbone, monkeypatch: Any, tmp_path: Path
) -> None:
    names = ["bca", "ecalp", "stata", "zero"]
    good = [row for row in range(12) if row != 6]
    expected = adapt_dataset(adapters_for(data, backbone, names), data.subset(good))

    bad = backbone.preprocess(data[6][0])
    embed = backbone.vision.encode

    def damaged(images: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows = embed(images, *rest)
        return rows * float("nan") if torch.equal(images[0], bad) else rows

    monkeypatch.setattr(backbone.vision, "encode", damaged)
    with pytest.raises(NonFiniteError, match=r"the embedding of .* is NaN or infinite"):
        adapt_dataset(adapters_for(data, backbone, names), data)

    adapters = adapters_for(data, backbone, names)
    for _ in range(2):  # the second time from the files
        got = adapt_dataset(adapters, data, folder=tmp_path, batch_size=4, on_bad_image="skip")
        for label in names:
            assert bool(got[label].probs[6].isnan().all())
            torch.testing.assert_close(got[label].probs[good], expected[label].probs, rtol=1e-4, atol=1e-6)

    images = [image for image, _ in data]
    streamed = list(vlprompt.adapt_stream(adapters["zero"], images, on_bad_image="skip"))
    assert len(streamed) == 11


def test_predictions_come_as_images_come(data: ImageDataset, backbone: Backbone) -> None:
    images = [image for image, _ in data]
    adapter = adapters_for(data, backbone, ["bca"])["bca"]
    together = adapter.predict(images).probs
    adapter.reset()

    taken: list[int] = []

    def camera() -> Any:
        for number, image in enumerate(images):
            taken.append(number)
            yield image

    stream = vlprompt.adapt_stream(adapter, camera())
    first = next(stream)
    assert taken == [0]
    rest = list(stream)
    probs = torch.cat([first.probs, *(predictions.probs for predictions in rest)])
    torch.testing.assert_close(probs, together, rtol=1e-4, atol=1e-6)

    batches = adapters_for(data, backbone, ["stata"], batch=5)["stata"]
    assert [len(p) for p in vlprompt.adapt_stream(batches, images)] == [5, 5, 2]


def test_scores_of_unknown_images_come_with_predictions(whole: dict[str, Predictions]) -> None:
    every = {"msp", "mcm", "max_logit", "energy", "neg_entropy", "variance"}
    for name, predictions in whole.items():
        after = {score for score in predictions.scores if not score.startswith("before_")}
        assert after == ({"msp"} if name in ("ecalp", "oga", "tda") else every), name
        assert {f"before_{score}" for score in every} <= predictions.scores.keys()
        torch.testing.assert_close(predictions.scores["msp"], predictions.confidence)


def test_every_method_says_what_it_needs_to_be_compared() -> None:
    for name in list_adapters():
        target = ADAPTERS.get(name).target
        assert target.granularity in ("image", "stream", "batch", "dataset")
    named_first = {name for name in list_adapters() if not ADAPTERS.get(name).target.updates_first}
    assert named_first == {"bca", "onzeta"}
