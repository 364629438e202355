from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.layouts import make, write_image
from vlprompt.core.errors import DataError
from vlprompt.data import FileReader, ImageDataset, Sample, load_card, load_dataset
from vlprompt.data.elevater import elevater_draw, elevater_indices

GOLDEN = json.loads((Path(__file__).parent / "elevater_golden.json").read_text())
WHOLE = pytest.mark.filterwarnings("ignore:.*is it whole")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['set']}-{c['shots']}-{c['seed']}")
def test_the_very_images_of_the_reference(case: dict) -> None:
    """Single- and multi-label lists, 1 to 20 shots; the recipe stands in the golden file."""
    labels = [tuple(x) for x in GOLDEN["labels"][case["set"]]]
    classes = 1 + max(max(x) for x in labels)
    train, val = elevater_indices(labels, classes, case["shots"], case["seed"])
    assert (train, val) == (case["train"], case["val"])


@pytest.mark.parametrize(
    ("shots", "train", "val"), [(1, 1, 1), (2, 1, 1), (5, 4, 1), (20, 16, 4), (50, 40, 10)]
)
def test_four_fifths_train_and_a_fifth_validates(shots: int, train: int, val: int) -> None:
    parts = [load_dataset("digits", s, shots=shots, sampling="elevater") for s in ("train", "val")]
    assert [set(Counter(p.labels).values()) for p in parts] == [{train}, {val}]
    drawn = [set(p.info["indices"]) for p in parts]
    assert drawn[0] == drawn[1] if shots == 1 else not drawn[0] & drawn[1]
    whole = load_dataset("digits", "train")
    assert [whole.samples[i] for i in parts[0].info["indices"]] == list(parts[0].samples)


def test_the_draw_depends_on_nothing_but_list_shots_and_seed() -> None:
    first, again, other = (load_dataset("digits", shots=5, seed=s, sampling="elevater") for s in (1, 1, 2))
    assert first.samples == again.samples != other.samples
    assert len(load_dataset("digits", "test", sampling="elevater")) == 540


def test_unreadable_images_are_passed_over(tmp_path: Path) -> None:
    for i in range(60):
        write_image(tmp_path / f"{i}.png", i % 3)
    samples = tuple(Sample(f"{i}.png", i % 3) for i in range(60))
    data = ImageDataset("mine", "train", samples, ("a", "b", "c"), ("{}",), FileReader(tmp_path))
    before = elevater_draw(data, "train", 5, 1)
    victim = before.info["indices"][0]
    (tmp_path / f"{victim}.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=f"{victim}.png"):
        after = elevater_draw(data, "train", 5, 1, on_bad_image="skip")
    assert set(Counter(after.labels).values()) == {4}
    assert victim not in after.info["indices"]
    assert after.info["skipped"] == [f"{victim}.png"]
    kept = set(before.info["indices"]) - {victim}
    assert (
        len(kept & set(after.info["indices"])) >= len(kept) - 1
    )  # the others stay, but for who moves to val
    with pytest.raises(DataError, match=f"{victim}.png"):
        elevater_draw(data, "train", 5, 1)


@pytest.mark.parametrize("shots", [0, -1, 1.5, True])
def test_impossible_shots(shots: object) -> None:
    with pytest.raises(DataError, match="shots must be a whole number"):
        load_dataset("digits", shots=shots, sampling="elevater")  # type: ignore[arg-type]


def voc(root: Path) -> None:
    card = load_card("elevater_voc-2007-classification")
    assert card.source.otherwise is not None
    make(card, card.source.otherwise, root)


@WHOLE
def test_several_labels_are_one_sample_that_can_be_split(tmp_path: Path) -> None:
    voc(tmp_path)
    name = "elevater_voc-2007-classification"
    test = load_dataset(name, "test", root=tmp_path)
    assert test.multi_label
    assert test.samples[0].classes == (0, 1)  # the object, and one that is hard to see
    assert test.labels[0] == 0
    assert test.multi_hot().shape == (40, 20)
    assert test.multi_hot()[0].tolist() == [1, 1, *[0] * 18]
    whole = load_dataset(name, "train", root=tmp_path)
    assert whole.multi_label
    assert len(whole) == 60
    train = whole.one_label_each()
    assert not train.multi_label
    assert len(train) == 60 + 57  # 3 images of each class; all but the last class's have a second label
    assert np.bincount(train.labels).tolist() == [3, *[6] * 19]
    val = load_dataset(name, "val", root=tmp_path, shots=2, sampling="elevater")
    assert val.multi_label
    assert set(val.multi_hot().sum(0)) >= {1}


def test_a_part_of_the_classes_keeps_the_labels_that_are_left(tmp_path: Path) -> None:
    voc(tmp_path)
    test = load_dataset("elevater_voc-2007-classification", "test", root=tmp_path)
    some = test.keep_classes([1, 5])
    assert some.classnames == ("bicycle", "bus")
    assert {s.label for s in some.samples} == {(0,), (1,)}
    assert len(some) == 8  # classes 0 and 1 show a bicycle, 4 and 5 the other
    single = replace(test, samples=tuple(Sample(s.source, s.classes[0]) for s in test.samples))
    assert not single.multi_label
    assert {s.label for s in single.keep_classes([1, 5]).samples} == {0, 1}


def test_cards_of_the_benchmark_are_drawn_its_way_unless_told(tmp_path: Path) -> None:
    make(load_card("elevater_mnist"), load_card("elevater_mnist").source, tmp_path)
    train = load_dataset("elevater_mnist", shots=2, root=tmp_path)
    assert (train.info["sampling"], len(train)) == ("elevater", 10)
    assert len(load_dataset("elevater_mnist", "val", shots=2, root=tmp_path)) == 10
    told = load_dataset("elevater_mnist", shots=2, root=tmp_path, sampling="private")
    assert (told.info["sampling"], len(told)) == ("private", 20)
    assert load_dataset("digits", shots=2).info["sampling"] == "private"
    with pytest.raises(DataError, match=r"has no split 'val', only train, test\. Few-shot draws"):
        load_dataset("elevater_mnist", "val", root=tmp_path)


def test_marks_that_are_none_are_refused(tmp_path: Path) -> None:
    voc(tmp_path)
    lists = sorted(tmp_path.rglob("aeroplane_train.txt"))
    assert lists
    content = lists[0].read_text()
    lists[0].write_text(content.replace(" ", "\t"))
    assert len(load_dataset("elevater_voc-2007-classification", "train", root=tmp_path)) == 60

    lists[0].write_text(f"{content}\n000001 2\n")
    with pytest.raises(DataError, match=r"aeroplane_train\.txt, line \d+: expected '<image> <-1, 0 or 1>'"):
        load_dataset("elevater_voc-2007-classification", "train", root=tmp_path)
