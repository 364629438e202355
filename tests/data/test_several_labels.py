"""Cards of images with several labels: objects marked difficult, COCO's objects, and what misses a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.data.layouts import make, write_image
from vlprompt import evaluate, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.classification.page import add_predictions
from vlprompt.core.errors import ConfigError, DataError, UnknownNameError
from vlprompt.data import FeatureCache, ImageDataset, cards_dir, load_card
from vlprompt.data.base import NO_LABEL
from vlprompt.data.prepare import status
from vlprompt.experiments.report import RunRecord
from vlprompt.learners import create_learner

LISTS = Path("VOCdevkit/VOC2007/ImageSets/Main")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """The lists, with one image in each part all of whose objects are difficult."""
    card = load_card("voc2007")
    make(card, card.source, tmp_path)
    for split, part in (("train", "trainval"), ("test", "test")):
        write_image(tmp_path / f"VOCdevkit/VOC2007/JPEGImages/{split}_hard.jpg", 3)
        for label, name in enumerate(card.source.options["own_names"]):
            path = tmp_path / LISTS / f"{name}_{part}.txt"
            path.write_text(f"{path.read_text()}{split}_hard {' 0' if label == 3 else '-1'}\n")
    return tmp_path


def truth_of_lists(root: Path, data: ImageDataset, part: str) -> np.ndarray:
    """(n, C) of what the files say, read the slow way: one image and one class after the other."""
    names = load_card("voc2007").source.options["own_names"]
    table = np.full((len(data), len(names)), 99)
    for row, sample in enumerate(data.samples):
        for column, name in enumerate(names):
            for line in (root / LISTS / f"{name}_{part}.txt").read_text().splitlines():
                image, value = line.split()
                if f"{image}.jpg" == sample.source:
                    table[row, column] = {"1": 1, "-1": 0, "0": -1}[value]
    return table


def test_difficult_objects_are_neither_there_nor_absent(voc: Path) -> None:
    test = load_dataset("voc2007", "test", root=voc)
    truth = truth_of_lists(voc, test, "test")
    assert (truth == -1).sum() == 19 * 2 + 1
    np.testing.assert_array_equal(test.multi_hot(), truth)

    hard = [sample.source for sample in test.samples].index("test_hard.jpg")
    assert test.samples[hard].classes == ()
    assert test.labels[hard] == NO_LABEL
    assert test[hard][1] == NO_LABEL
    assert test.multi_hot()[hard].tolist() == [0, 0, 0, -1, *[0] * 16]


@pytest.mark.parametrize(("difficult", "value"), [("present", 1), ("negative", 0)])
def test_difficult_objects_as_others_count_them(voc: Path, difficult: str, value: int) -> None:
    ignored = load_dataset("voc2007", "test", root=voc).multi_hot()
    test = load_dataset("voc2007", "test", root=voc, difficult=difficult)
    np.testing.assert_array_equal(test.multi_hot(), np.where(ignored == -1, value, ignored))
    assert test.info["split_source"].endswith(f"difficult objects: {difficult}")


def test_images_of_difficult_objects_alone_are_not_trained_on_and_are_counted(voc: Path) -> None:
    train = load_dataset("voc2007", "train", root=voc)
    assert len(train) == 20 * 3
    assert train.info["without_label"] == 1
    assert len(load_dataset("voc2007", "train", root=voc, difficult="present")) == 20 * 3 + 1
    few = load_dataset("voc2007", "test", root=voc, shots=2)  # no shots of "no class"
    assert NO_LABEL not in few.labels
    assert len(few) == 40


def test_a_part_of_the_classes_has_the_images_that_show_one(voc: Path) -> None:
    test = load_dataset("voc2007", "test", root=voc)
    order = list(reversed(range(20)))
    assert len(test.keep_classes(order)) == len(test)  # all classes: the fixed test set is whole
    np.testing.assert_array_equal(test.keep_classes(order).multi_hot(), test.multi_hot()[:, order])
    some = test.keep_classes([3, 4])
    assert len(some) == 4
    assert "test_hard.jpg" not in {s.source for s in some.samples}
    assert some.multi_hot().tolist() == [[1, -1], [1, -1], [0, 1], [0, 1]]


def test_no_metric_counts_difficult_objects(voc: Path, backbone: Backbone) -> None:
    """Whatever is said of them: figures are those of every other pair of image and class alone."""
    test = load_dataset("voc2007", "test", root=voc)
    learner = create_learner("zero_shot", backbone, test.classnames)
    figures = evaluate(learner, test, metrics=["map", "cf1", "of1", "accuracy"])
    logits = torch.cat([learner(learner.preprocess(test[i][0])[None]) for i in range(len(test))]).double()
    assert figures["map"] == pytest.approx(slow_map(logits.numpy(), test.multi_hot()), abs=1e-6)
    assert figures["score"] == figures["map"]

    # An image of difficult objects alone has no place among the answers that a report shows.
    record = RunRecord(title="x")
    add_predictions(record, learner, test, FeatureCache())
    assert record.labels is not None
    assert len(record.labels) == len(test) - 1


def slow_map(scores: np.ndarray, truth: np.ndarray) -> float:
    """Mean over classes of the mean, over positives, of the precision at the score of each; pairs of -1 left out."""
    values = []
    for c in range(scores.shape[1]):
        pairs = [(s, t) for s, t in zip(scores[:, c], truth[:, c], strict=True) if t != -1]
        positives = [s for s, t in pairs if t == 1]
        precisions = []
        for threshold in positives:
            above = [t for s, t in pairs if s >= threshold]
            precisions.append(sum(above) / len(above))
        if precisions:
            values.append(sum(precisions) / len(precisions))
    return sum(values) / len(values)


def test_training_on_known_truth_alone(voc: Path, backbone: Backbone) -> None:
    train = load_dataset("voc2007", "train", root=voc)
    learner = create_learner("clip_adapter", backbone, train.classnames)
    result = fit(learner, train, epochs=1, lr=1e-3, batch_size=30, callbacks=[])
    assert np.isfinite(result.history[-1]["loss"])


@pytest.mark.filterwarnings("ignore:.*is it whole")
def test_what_voc_misses_is_named(voc: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ignore'"):
        load_dataset("voc2007", "test", root=voc, difficult="ignored")
    with pytest.raises(DataError, match="voc2007 has no split 'val', only train, test"):
        load_dataset("voc2007", "val", root=voc)
    (voc / LISTS / "sheep_trainval.txt").unlink()
    with pytest.raises(DataError, match=r"voc2007: the list .*sheep_trainval\.txt is missing"):
        load_dataset("voc2007", "train", root=voc)
    assert len(load_dataset("voc2007", "test", root=voc)) == 41  # its own lists are there
    (voc / "VOCdevkit/VOC2007/JPEGImages/test0000.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of the 41 images that ImageSets/Main \(test\) lists are missing"):
        load_dataset("voc2007", "test", root=voc)
    with pytest.raises(DataError, match="looked for VOCdevkit/VOC2007/JPEGImages"):
        load_dataset("voc2007", "test", root=voc / "elsewhere")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """COCO's layout, with one image in each part that shows no object."""
    card = load_card("coco2014")
    make(card, card.source, tmp_path)
    for part in card.source.options["parts"].values():
        path = tmp_path / "coco2014" / part["annotations"]
        content = json.loads(path.read_text())
        write_image(tmp_path / "coco2014" / part["images"] / "empty.jpg", 0)
        content["images"].append({"id": 5000, "file_name": "empty.jpg", "width": 640, "height": 480})
        path.write_text(json.dumps(content))
    return tmp_path


def changed_coco(root: Path, **fields: object) -> Iterator[None]:
    """Write other content into the test part's annotations, and put them right again."""
    path = root / "coco2014/annotations/instances_val2014.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **fields}))
    yield
    path.write_text(before)


def test_cocos_labels_are_the_classes_of_its_objects(coco: Path) -> None:
    train, test = (load_dataset("coco2014", split, root=coco) for split in ("train", "test"))
    assert len(train) == 240
    assert train.info["without_label"] == 1
    assert len(test) == 161
    expected = np.zeros((161, 80), dtype=int)
    for n in range(160):
        expected[n, [n % 80, (n + 1) % 80]] = 1
    np.testing.assert_array_equal(test.multi_hot(), expected)
    assert test.labels[-1] == NO_LABEL
    assert test.classnames[0] == "person"
    assert test.info["metric"] == "map"


def test_what_coco_misses_is_named(coco: Path) -> None:
    with pytest.raises(DataError, match="coco2014 has no split 'val', only train, test"):
        load_dataset("coco2014", "val", root=coco)
    with pytest.raises(DataError, match="looked for coco2014/val2014 or coco/val2014"):
        load_dataset("coco2014", "test", root=coco / "elsewhere")

    categories = json.loads((coco / "coco2014/annotations/instances_val2014.json").read_text())["categories"]
    for _ in changed_coco(coco, categories=[{**categories[0], "name": "human"}, *categories[1:]]):
        with pytest.raises(DataError, match=r"has 80 classes and the card 80, and they differ, .* 'human'"):
            load_dataset("coco2014", "test", root=coco)
    for _ in changed_coco(coco, annotations=[{"id": 1, "image_id": 77777, "category_id": 1}]):
        with pytest.raises(DataError, match="annotation 1 belongs to image 77777, which is not listed"):
            load_dataset("coco2014", "test", root=coco)

    (coco / "coco2014/val2014/empty.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 161 images are missing, first .*val2014/empty\.jpg"):
        load_dataset("coco2014", "test", root=coco)
    (coco / "coco2014/annotations/instances_val2014.json").unlink()
    with pytest.raises(DataError, match=r"val2014 is there, but its annotations .* are missing"):
        load_dataset("coco2014", "test", root=coco)
    assert status(load_card("coco2014"), coco).state == "incomplete"


@pytest.fixture
def renditions(tmp_path: Path) -> Path:
    card = load_card("imagenet_r_sessions")
    make(card, card.source, tmp_path)
    return tmp_path / "imagenet-rendition"


def test_imagenet_r_follows_the_users_lists(renditions: Path) -> None:
    train, test = (load_dataset("imagenet_r_sessions", s, root=renditions.parent) for s in ("train", "test"))
    assert not {s.source for s in train.samples} & {s.source for s in test.samples}
    assert (len(train), len(test)) == (600, 400)
    assert train.classnames == load_card("imagenet_r").classnames
    assert "imagenet-r_train.yaml sha256 " in train.info["split_source"]

    # Lists beside the class folders do as well.
    path = renditions / "imagenet-r_test.yaml"
    path.rename(renditions / "imagenet-r" / path.name)
    assert load_dataset("imagenet_r_sessions", "test", root=renditions.parent).samples == test.samples


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [", "no list of images in YAML"),
        ("- a", "needs 'data', a list of paths"),
        ("{data: [data/imagenet-r/n01443537/test_0.jpg], targets: [1, 2]}", r"as long as 'data' \(1\)"),
        (
            "{data: [data/imagenet-r/n00000000/a.jpg], targets: [1]}",
            "data entry 1: expected a path that ends in",
        ),
        (
            "{data: [data/imagenet-r/n01443537/..], targets: [1]}",
            "data entry 1: expected a path that ends in",
        ),
        ("{data: [7], targets: [1]}", "got '7'"),
        (
            "{data: [n01443537/test_0.jpg, a/n01443537/test_0.jpg], targets: [1, 1]}",
            "entry 2: .* is listed twice",
        ),
        (
            "{data: [n01443537/test_0.jpg, n01443537/test_1.jpg], targets: [1, 2]}",
            "entry 2: its target is 2, and",
        ),
        ("{data: [n01443537/gone.jpg], targets: [1]}", r"1 of the 1 images that imagenet-r_test\.yaml lists"),
        ("!!python/object/apply:os.system [echo]", "no list of images in YAML"),
    ],
)
def test_lists_that_are_none_are_refused(renditions: Path, text: str, message: str) -> None:
    (renditions / "imagenet-r_test.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset("imagenet_r_sessions", "test", root=renditions.parent)


def test_without_lists_nothing_is_drawn(renditions: Path) -> None:
    (renditions / "imagenet-r_test.yaml").unlink()
    with pytest.raises(
        DataError, match=r"the list imagenet-r_test\.yaml is not .*dataloaders/splits of github"
    ):
        load_dataset("imagenet_r_sessions", "test", root=renditions.parent)


def test_a_card_has_folders_or_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path))
    card = yaml.safe_load((cards_dir() / "imagenet_r.yaml").read_text())
    card["source"]["options"]["lists"] = {"test": "x.yaml"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(ConfigError, match="give either parts"):
        load_dataset("mine", "test", root=tmp_path)
