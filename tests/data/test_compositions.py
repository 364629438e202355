"""Seen and unseen compositions: coverage, disjointness, and no image in two phases."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import load_dataset
from vlprompt.data.compositions import (
    CompositionDataset,
    composition_dataset,
    split_compositions,
)
from vlprompt.data.triggers import DEFAULT_TRIGGERS


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("triggers", "objects"), [(8, 20), (6, 10), (3, 4)])
def test_compositions_are_disjoint_and_everything_is_seen(seed: int, triggers: int, objects: int) -> None:
    split = split_compositions(triggers, objects, 0.3, seed)
    assert not (split.seen & (split.unseen_val | split.unseen_test)).any()
    assert not (split.unseen_val & split.unseen_test).any()
    assert split.seen[0].all()
    assert split.seen[1:].any(0).all()
    assert split.seen.any(1).all()
    unseen = (~split.seen).sum()
    assert unseen == round(0.3 * (triggers - 1) * objects)
    assert unseen == split.unseen_val.sum() + split.unseen_test.sum()
    assert abs(int(split.unseen_val.sum()) - int(split.unseen_test.sum())) <= 1


def test_the_seed_decides() -> None:
    first, again, other = (split_compositions(8, 20, 0.3, seed).seen for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_impossible_share_is_refused() -> None:
    with pytest.raises(DataError, match="every trigger and every object must be seen once, which leaves"):
        split_compositions(3, 4, 0.9)
    with pytest.raises(DataError, match="at least one trigger, two objects"):
        split_compositions(1, 4)


@pytest.fixture(scope="module")
def phases() -> dict[str, CompositionDataset]:
    return {split: load_dataset("triggered:digits", split, copies=2) for split in ("train", "val", "test")}  # type: ignore[misc]


def test_phases_show_what_they_may_and_share_no_image(phases: dict[str, CompositionDataset]) -> None:
    bases: dict[str, set[object]] = {}
    for split, data in phases.items():
        assert data.compositions is not None
        compositions = set(zip(data.trigger_labels, data.labels, strict=True))
        allowed = data.compositions.allowed(split)
        assert compositions == {(int(t), int(c)) for t, c in np.argwhere(allowed)}
        bases[split] = {s.source.base for s in data.samples}
        counts = Counter(s.source.base for s in data.samples)
        assert set(counts.values()) == {3}
    assert not bases["train"] & bases["val"]
    assert not bases["train"] & bases["test"]
    assert not bases["val"] & bases["test"]


def test_compositions_of_an_object_are_equally_frequent(phases: dict[str, CompositionDataset]) -> None:
    data = phases["train"]
    for label in range(10):
        counts = Counter(t for t, c in zip(data.trigger_labels, data.labels, strict=True) if t and c == label)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_images_have_the_native_size_and_keys_tell_triggers_apart(
    phases: dict[str, CompositionDataset],
) -> None:
    data = phases["train"]
    assert {data[i][0].size for i in range(6)} == {(32, 32)}
    assert len({data.key(i) for i in range(60)}) == 60
    clean, triggered = data[0][0], data[1][0]
    assert data.trigger_labels[:2][0] == 0 < data.trigger_labels[1]
    assert np.any(np.asarray(clean) != np.asarray(triggered))


def test_shots_are_images_per_composition() -> None:
    data = load_dataset("triggered:digits", "train", shots=3, copies=2)
    assert isinstance(data, CompositionDataset)
    counts = Counter(zip(data.trigger_labels, data.labels, strict=True))
    assert set(counts.values()) == {3}
    assert data.compositions is not None
    assert len(counts) == data.compositions.seen.sum()


def test_wrong_lists_of_triggers_are_refused() -> None:
    base = load_dataset("digits", "val")
    with pytest.raises(DataError, match="begins with 'clean'"):
        composition_dataset(base, ["badnets", "sig"])
    with pytest.raises(DataError, match="begins with 'clean'"):
        composition_dataset(base, ["clean", "sig", "sig"])
    with pytest.raises(UnknownNameError, match="Did you mean 'badnets'"):
        composition_dataset(base, ["clean", "badnet"])
    with pytest.raises(DataError, match="name the data set to put triggers into"):
        load_dataset("triggered:", "val")
    assert DEFAULT_TRIGGERS[0] == "clean"
