"""Every card reads a miniature copy of every real layout that it knows, and each image gets the class it shows."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.layouts import make, shown
from vlprompt.core.errors import DataError
from vlprompt.data import Card, load_card, load_dataset
from vlprompt.data.cards import SourceSpec, card_names
from vlprompt.data.catalog import open_split
from vlprompt.data.imagenet import synset_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*is it whole", "ignore:.*is not the published one")


def ways() -> Iterator[tuple[str, int]]:
    """Yield every card and the number of one of its sources."""
    for name in (n for n in card_names() if n not in card_names("segmentation")):
        source: SourceSpec | None = load_card(name).source
        number = 0
        while source is not None:
            if source.kind != "digits":
                yield name, number
            source, number = source.otherwise, number + 1


def source_of(card: Card, number: int) -> SourceSpec:
    source = card.source
    for _ in range(number):
        assert source.otherwise is not None
        source = source.otherwise
    return source


@pytest.mark.parametrize(("name", "number"), list(ways()), ids=lambda x: str(x))
def test_every_layout_of_every_card(name: str, number: int, tmp_path: Path) -> None:
    card = load_card(name)
    source = source_of(card, number)
    if source.options.get("format") == "h5" and importlib.util.find_spec("h5py") is None:
        pytest.skip("h5py is not installed")
    sizes = make(card, source, tmp_path)
    expected = dict(sizes)
    if "trainval" in expected or (source.options.get("shares") and "val" not in expected):
        whole = expected.pop("trainval", expected.get("train", 0))
        parts = {s: len(open_split(name, s, tmp_path)) for s in ("train", "val")}
        assert sum(parts.values()) == whole  # nothing is lost or counted twice
        assert 0 < parts["val"] < parts["train"]
        expected |= parts
    for split, size in expected.items():
        data = open_split(name, split, tmp_path)
        assert len(data) == size
        assert data.classnames == card.classnames
        assert data.templates == card.templates
        assert data.info["metric"] == card.metric
        chosen = range(0, len(data), max(1, len(data) // 60))
        for i in chosen:
            assert shown(data[i][0]) in data.samples[i].classes, data.samples[i]
        assert {c for s in data.samples for c in s.classes} == set(range(len(card.classnames)))


@pytest.mark.parametrize("name", ["imagenet_a", "imagenetv2", "imagenet_sketch"])
def test_test_only_sets_have_no_other_split(name: str, tmp_path: Path) -> None:
    make(load_card(name), load_card(name).source, tmp_path)
    with pytest.raises(DataError, match=f"{name} is for testing only: it has no split 'train', only test"):
        load_dataset(name, "train", root=tmp_path)


def test_imagenet_validates_on_train_never_on_test(tmp_path: Path) -> None:
    make(load_card("imagenet"), load_card("imagenet").source, tmp_path)
    val = {s.source for s in open_split("imagenet", "val", tmp_path).samples}
    train = {s.source for s in open_split("imagenet", "train", tmp_path).samples}
    assert not val & train
    assert "train" in str(open_split("imagenet", "val", tmp_path).reader)


def test_v2_numbers_are_not_sorted_as_text(tmp_path: Path) -> None:
    make(load_card("imagenetv2"), load_card("imagenetv2").source, tmp_path)
    data = open_split("imagenetv2", "test", tmp_path)
    assert data.samples[2].source.startswith("2/")
    assert data.samples[2].label == 2
    assert data.classnames[2] == "great white shark"


def test_variants_rank_among_their_own_classes() -> None:
    everything, some = synset_ids("imagenet"), synset_ids("imagenet-a")
    assert set(some) < set(everything)
    assert list(some) == sorted(some)
    assert (
        load_card("imagenet_a").classnames[0] == load_card("imagenet").classnames[everything.index(some[0])]
    )


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    make(load_card("imagenet_r"), load_card("imagenet_r").source, tmp_path)
    folder = tmp_path / "imagenet-rendition" / "imagenet-r" / "n01443537"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(
        DataError, match=r"1 of the 200 class folders .* missing or empty, for example n01443537"
    ):
        open_split("imagenet_r", "test", tmp_path)


def test_the_benchmarks_own_form_comes_first(tmp_path: Path) -> None:
    card = load_card("elevater_mnist")
    make(card, source_of(card, 1), tmp_path)
    assert (
        "official parts: train-images" in open_split("elevater_mnist", "train", tmp_path).info["split_source"]
    )
    make(card, card.source, tmp_path)
    data = open_split("elevater_mnist", "train", tmp_path)
    assert data.info["split_source"] == "the benchmark's train.txt; classes by number"
    assert data.samples[0].source == "train.zip@some folder/0_0.jpg"


def test_array_images_stand_upright(tmp_path: Path) -> None:
    """A mark in the top right corner stays there: rows and columns of the raw bytes are not mixed up."""
    for name in ("cifar10", "stl10", "svhn", "mnist"):
        make(load_card(name), load_card(name).source, tmp_path)
        image = open_split(name, "test", tmp_path)[0][0]
        assert image.getpixel((image.width - 1, 0)) == (255, 255, 255), name
        assert image.getpixel((0, image.height - 1)) != (255, 255, 255), name


def test_names_in_the_files_decide_which_number_is_which_class(tmp_path: Path) -> None:
    for name in ("cifar100", "elevater_cifar-100"):
        make(load_card("cifar100"), load_card("cifar100").source, tmp_path)
        data = open_split(name, "test", tmp_path)
        first = load_card("cifar100").classnames.index(data.classnames[data.samples[0].classes[0]])
        assert shown(data[0][0]) == first  # the colour is cifar100's label, whichever card reads it
    (tmp_path / "cifar-100-binary" / "fine_label_names.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"fine_label_names\.txt has other classes than the card"):
        open_split("cifar100", "test", tmp_path)
