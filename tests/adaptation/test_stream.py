"""Streams over data sets: what stops goes on, and results are those of each method alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlprompt import create_adapter, load_dataset
from vlprompt.adaptation import Adapter
from vlprompt.adaptation.stream import adapt_dataset, read_predictions
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.data import ImageDataset


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("scenes/size@sketch", "val").subset(range(0, 60, 6))


@pytest.fixture(scope="module")
def adapters(backbone: Backbone, data: ImageDataset) -> dict[str, Adapter]:
    names = {"tpt": {"share": 0.5}, "mta": {}, "tda": {"share": 0.5}, "other": {"seed": 5}}
    return {
        label: create_adapter(
            "zero" if label == "other" else label, backbone, data.classnames, views=4, **options
        )
        for label, options in names.items()
    }


def test_a_stream_gives_what_predict_gives(adapters: dict[str, Adapter], data: ImageDataset) -> None:
    steps: list[tuple[int, int]] = []
    predictions = adapt_dataset(adapters, data, batch_size=4, progress=lambda *step: steps.append(step))
    assert steps == [(4, 10), (8, 10), (10, 10)]
    for label, adapter in adapters.items():
        adapter.reset()
        alone = adapter.predict([image for image, _ in data])
        torch.testing.assert_close(predictions[label].probs, alone.probs, rtol=1e-4, atol=1e-5)
        assert torch.equal(predictions[label].kept, alone.kept)


def test_a_stopped_stream_goes_on_where_it_was(
    adapters: dict[str, Adapter], data: ImageDataset, tmp_path: Path
) -> None:
    whole = adapt_dataset(adapters, data, batch_size=4)

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt_dataset(adapters, data, folder=tmp_path, batch_size=4, progress=stop)
    for adapter in adapters.values():
        adapter.reset()  # another process would know nothing
    times = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("0*.safetensors")}
    assert len(times) == 2
    again = adapt_dataset(adapters, data, folder=tmp_path, batch_size=4)
    assert all(torch.equal(again[label].probs, whole[label].probs) for label in adapters)
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in times} == times
    for label, adapter in adapters.items():
        assert torch.equal(read_predictions(tmp_path, label, adapter.classnames).probs, whole[label].probs)

    with pytest.raises(CheckpointError, match="other images or methods"):
        adapt_dataset(adapters, data.subset(range(1, 9)), folder=tmp_path, batch_size=4)


def test_a_folder_without_predictions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no predictions"):
        read_predictions(tmp_path, "tpt", ["a"])


def test_other_class_names_and_empty_streams(adapters: dict[str, Adapter], data: ImageDataset) -> None:
    with pytest.raises(DataError, match="other class names than the adapter 'tpt'"):
        adapt_dataset(adapters, load_dataset("digits", "val"))
    with pytest.raises(DataError, match="nothing to adapt to, 0 images"):
        adapt_dataset(adapters, data.subset([]))
