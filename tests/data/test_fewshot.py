from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data import FileReader, ImageDataset, Reader, Sample, base_new, few_shot, load_dataset
from vlprompt.data.fewshot import coop_indices


class Words(Reader):
    """A reader of nothing: these tests are about which samples are drawn."""

    def read(self, source: str) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def key(self, source: str) -> str:
        return source


def toy(name: str = "toy", split: str = "train", per_class: int = 20, classes: int = 5) -> ImageDataset:
    samples = [Sample(f"{split}-{c}-{i}", c) for c in range(classes) for i in range(per_class)]
    random.Random(3).shuffle(samples)
    names = tuple(f"class {c}" for c in range(classes))
    return ImageDataset(name, split, tuple(samples), names, ("{}",), Words())


def sources(dataset: ImageDataset) -> list[str]:
    return [s.source for s in dataset.samples]


def test_shots_per_class_without_replacement() -> None:
    chosen = few_shot(toy(), 4, seed=1)
    assert len(set(sources(chosen))) == 20
    assert sorted(chosen.labels) == sorted(list(range(5)) * 4)
    assert [toy().samples[i] for i in chosen.info["indices"]] == list(chosen.samples)


def test_positions_follow_the_samples_of_every_part() -> None:
    drawn = few_shot(toy(), 4, seed=1)
    for part in (drawn.subset([3, 1, 8]), drawn.keep_classes([4, 1]), base_new(drawn, "new")):
        assert [toy().samples[i].source for i in part.info["indices"]] == sources(part)


def test_same_draw_whatever_was_drawn_before() -> None:
    first = sources(few_shot(toy("a"), 4, seed=1))
    few_shot(toy("b"), 8, seed=2)
    random.seed(5)
    random.random()
    assert sources(few_shot(toy("a"), 4, seed=1)) == first


@pytest.mark.parametrize("other", [{"name": "b"}, {"split": "test"}])
def test_draw_depends_on_name_and_split(other: dict[str, str]) -> None:
    assert few_shot(toy(**other), 4).info["indices"] != few_shot(toy(), 4).info["indices"]


def test_draw_depends_on_seed_and_shots() -> None:
    assert sources(few_shot(toy(), 4, seed=1)) != sources(few_shot(toy(), 4, seed=2))
    four, eight = (few_shot(toy(), k) for k in (4, 8))
    assert sources(four)[:4] != sources(eight)[:4]


def test_val_takes_at_most_four() -> None:
    assert len(few_shot(toy(split="val"), 16)) == 5 * 4
    assert len(few_shot(toy(split="val"), 2)) == 5 * 2


def reference_loop(labels: list[int], shots: int) -> list[int]:
    """The protocol's draws, written out on Python's global random, with items instead of positions."""
    tracker: dict[int, list[tuple[int, int]]] = {}
    for position, label in enumerate(labels):
        tracker.setdefault(label, []).append((position, label))
    chosen: list[tuple[int, int]] = []
    for items in tracker.values():
        chosen.extend(random.sample(items, shots) if len(items) >= shots else items)
    return [position for position, _ in chosen]


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_coop_compat_equals_the_global_stream(shots: int, seed: int) -> None:
    train, val = (
        toy(per_class=12),
        toy(split="val", per_class=3),
    )  # 16 shots: train takes all; 4 of val: takes all
    random.seed(seed)
    expected = [reference_loop(d.labels, k) for d, k in ((train, shots), (val, min(shots, 4)))]
    found = coop_indices(train.labels, val.labels, shots, seed)
    assert [[i for group in part for i in group] for part in found] == expected


@pytest.mark.filterwarnings("ignore:.*shots asked for")
def test_coop_compat_val_follows_train_in_one_stream() -> None:
    train, val = toy(), toy(split="val")
    random.seed(2)
    expected = [reference_loop(train.labels, 8), reference_loop(val.labels, 4)]
    assert few_shot(train, 8, 2, sampling="coop_compat").info["indices"] == expected[0]
    assert few_shot(val, 8, 2, sampling="coop_compat", train=train).info["indices"] == expected[1]
    with pytest.raises(DataError, match="needs the train split"):
        few_shot(val, 8, 2, sampling="coop_compat")
    with pytest.raises(DataError, match="keeps 'test' whole"):
        few_shot(toy(split="test"), 8, 2, sampling="coop_compat")


def test_coop_compat_through_the_catalogue() -> None:
    train, val = (load_dataset("digits", split) for split in ("train", "val"))
    random.seed(1)
    expected = [reference_loop(train.labels, 16), reference_loop(val.labels, 4)]
    for split, indices in zip(("train", "val"), expected, strict=True):
        assert (
            load_dataset("digits", split, shots=16, seed=1, sampling="coop_compat").info["indices"] == indices
        )


def test_shots_above_what_exists() -> None:
    data = toy(per_class=3)
    with pytest.warns(UserWarning, match="8 shots asked for, but 'class 0' has 3"):
        assert len(few_shot(data, 8)) == 15
    with pytest.raises(DataError, match=r"'class 0' has 3.*Ask for at most 3"):
        few_shot(data, 8, strict_shots=True)


@pytest.mark.parametrize("shots", [0, -1, 2.5, True, "4"])
def test_impossible_shots(shots: object) -> None:
    with pytest.raises(DataError, match="whole number of at least 1"):
        few_shot(toy(), shots)  # type: ignore[arg-type]


def test_private_draw_replaces_a_broken_image(tmp_path: Path) -> None:
    data = replace(toy(per_class=8, classes=2), reader=FileReader(tmp_path))
    for sample in data.samples:
        Image.new("RGB", (4, 4)).save(tmp_path / sample.source, "PNG")
    whole = few_shot(data, 4)
    broken = whole.samples[0].source
    (tmp_path / broken).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=broken):
        mended = few_shot(data, 4, on_bad_image="skip", max_bad_share=0.1)
    assert len(mended) == 8
    assert mended.info["skipped"] == [broken]
    assert set(sources(whole)) - set(sources(mended)) == {broken}
    with pytest.raises(DataError, match=broken):
        few_shot(data, 4, on_bad_image="error")
    with pytest.raises(DataError, match="max_bad_share"):
        few_shot(data, 4, on_bad_image="skip", max_bad_share=0.05)


@pytest.mark.parametrize(("count", "base"), [(2, 1), (5, 3), (6, 3), (47, 24)])
def test_base_gets_the_middle_class(count: int, base: int) -> None:
    data = toy(per_class=2, classes=count)
    first, second = base_new(data, "base"), base_new(data, "new")
    assert first.classnames == data.classnames[:base]
    assert second.classnames == data.classnames[base:]
    assert set(first.labels) == set(range(base))
    assert set(second.labels) == set(range(count - base))
    assert len(first) + len(second) == len(data)


def test_base_images_are_those_of_the_run_over_all_classes() -> None:
    chosen = load_dataset("digits", shots=4, seed=2)
    base = load_dataset("digits", shots=4, seed=2, classes="base")
    assert base.info["indices"] == [
        i for i, y in zip(chosen.info["indices"], chosen.labels, strict=True) if y < 5
    ]
    assert base.info["classes"] == "base"
    whole = load_dataset("digits")
    assert [whole.samples[i].source for i in base.info["indices"]] == sources(base)


def test_unknown_half() -> None:
    with pytest.raises(DataError, match="'all', 'base', 'new'"):
        base_new(toy(), "old")  # type: ignore[arg-type]
