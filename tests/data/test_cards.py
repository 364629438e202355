from __future__ import annotations

from pathlib import Path

import pytest
import torchvision
import yaml

from vlprompt.core.errors import ConfigError, DataError, UnknownNameError
from vlprompt.data import cards_dir, list_datasets, load_card, load_dataset
from vlprompt.data.cards import card_names, check_classnames
from vlprompt.data.splits import is_inside

GOOD = {
    "title": "Mine",
    "task": "classification",
    "paper": "none",
    "licence": "mine",
    "classnames": ["cat", "dog"],
    "templates": ["a {}."],
    "source": {"kind": "images", "options": {"folders": ["mine"]}},
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path))
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize("name", card_names())
def test_every_card_says_what_a_result_and_a_person_need(name: str) -> None:
    card = load_card(name)
    assert name in list_datasets()
    assert "test" in card.splits.sizes
    if card.source.kind == "digits":
        return
    assert card.verified
    assert "ROOT" in card.by_hand
    for archive in card.archives:
        assert is_inside(archive.into or "x")
        assert archive.checksum or any("checksum" in t for t in (*card.traps, *card.verified))
    if card.splits.file:
        assert card.splits.file.startswith("split_zhou_")
        assert card.splits.checksum
        assert "drive.google.com" in str(card.splits.url)
        assert str(card.splits.mirror).endswith(f"/splits/{card.splits.file}")


# Class count, parts and template of the few-shot protocol: CoOp, 2109.01134, appendix A, and its DATASETS.md.
FEW_SHOT = {
    "caltech101": (100, 4128, 1649, 2465, "a photo of a {}."),
    "oxford_pets": (37, 2944, 736, 3669, "a photo of a {}, a type of pet."),
    "stanford_cars": (196, 6509, 1635, 8041, "a photo of a {}."),
    "oxford_flowers": (102, 4093, 1633, 2463, "a photo of a {}, a type of flower."),
    "food101": (101, 50500, 20200, 30300, "a photo of {}, a type of food."),
    "fgvc_aircraft": (100, 3334, 3333, 3333, "a photo of a {}, a type of aircraft."),
    "sun397": (397, 15880, 3970, 19850, "a photo of a {}."),
    "dtd": (47, 2820, 1128, 1692, "{} texture."),
    "eurosat": (10, 13500, 5400, 8100, "a centered satellite photo of {}."),
    "ucf101": (101, 7639, 1898, 3783, "a photo of a person doing {}."),
}


@pytest.mark.parametrize("name", FEW_SHOT)
def test_the_few_shot_protocols_facts(name: str) -> None:
    card, (classes, train, val, test, template) = load_card(name), FEW_SHOT[name]
    assert len(card.classnames) == classes
    assert card.splits.sizes == {"train": train, "val": val, "test": test}
    assert card.templates == (template,)
    assert card.metric == "accuracy"


# Classes, train, test, number of templates and measure: ELEVATER's vision_datasets.json, prompts.py and dataset files.
ELEVATER = {
    "caltech-101": (102, 3060, 6084, 34, "mean_per_class"),
    "cifar-10": (10, 50000, 10000, 18, "accuracy"),
    "cifar-100": (100, 50000, 10000, 18, "accuracy"),
    "country211": (211, 31650, 21100, 5, "accuracy"),
    "dtd": (47, 1880, 1880, 8, "accuracy"),
    "eurosat_clip": (10, 5000, 5000, 3, "accuracy"),
    "fer-2013": (7, 28709, 3589, 6, "accuracy"),
    "fgvc-aircraft-2013b-variants102": (100, 3334, 3333, 2, "mean_per_class"),
    "food-101": (101, 75750, 25250, 1, "accuracy"),
    "gtsrb": (43, 26640, 12630, 3, "accuracy"),
    "hateful-memes": (2, 8500, 500, 1, "roc_auc"),
    "kitti-distance": (4, 6347, 711, 1, "accuracy"),
    "mnist": (10, 60000, 10000, 1, "accuracy"),
    "oxford-flower-102": (102, 1020, 6149, 1, "mean_per_class"),
    "oxford-iiit-pets": (37, 3680, 3669, 1, "mean_per_class"),
    "patch-camelyon": (2, 262144, 32768, 1, "accuracy"),
    "rendered-sst2": (2, 6920, 1821, 1, "accuracy"),
    "resisc45_clip": (45, 3150, 25200, 18, "accuracy"),
    "stanford-cars": (196, 8144, 8041, 8, "accuracy"),
    "voc-2007-classification": (20, 2501, 4952, 1, "map_11_point_elevater"),
}


def test_elevaters_facts() -> None:
    names = [n.removeprefix("elevater_") for n in card_names() if n.startswith("elevater_")]
    assert sorted(names) == sorted(ELEVATER)
    for name, (classes, train, test, templates, metric) in ELEVATER.items():
        card = load_card(f"elevater_{name}")
        assert (len(card.classnames), len(card.templates), card.metric) == (classes, templates, metric), name
        assert card.splits.sizes == {"train": train, "test": test}, name
    assert sum(classes for classes, *_ in ELEVATER.values()) == 1151  # MVLPT's joint label space


def test_the_two_registries_are_not_mixed_up() -> None:
    """Same images, other names or another order: each protocol keeps its own."""
    cars, their_cars = (load_card(n).classnames for n in ("stanford_cars", "elevater_stanford-cars"))
    assert cars[1] == "2012 Acura RL Sedan"
    assert their_cars[1] == "Acura RL Sedan 2012"
    moved = {" ".join([*n.split()[1:], n.split()[0]]).replace("/", " ") for n in cars}
    assert moved == {n.replace("/", " ") for n in their_cars}
    assert load_card("eurosat").classnames[2] == "Herbaceous Vegetation Land"
    assert load_card("elevater_eurosat_clip").classnames[2] == "brushland or shrubland"
    ours, theirs = (load_card(n).classnames for n in ("oxford_flowers", "elevater_oxford-flower-102"))
    assert [(i, a) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b] == [
        (15, "globe-flower"),
        (59, "pink-yellow dahlia"),
        (92, "ball moss"),
    ]
    faces = load_card("elevater_fer-2013").classnames  # FER2013 itself has neutral last
    assert faces == ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised")


def test_imagenets_names_are_clips_but_for_two_that_no_text_can_tell_apart() -> None:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    names = load_card("imagenet").classnames
    assert [(i, a, b) for i, (a, b) in enumerate(zip(names, IMAGENET_CLASSNAMES, strict=True)) if a != b] == [
        (744, "projectile", "missile"),
        (836, "sunglass", "sunglasses"),
    ]
    assert load_card("imagenet").traps[0].startswith("CLIP's list calls two classes missile")


def test_archives_are_those_of_torchvision() -> None:
    """The facts that an installed torchvision knows too: it is newer than the card whenever they differ."""
    tv = torchvision.datasets
    gtsrb = Path(str(tv.gtsrb.__file__)).read_text(encoding="utf-8")
    caltech = Path(str(tv.caltech.__file__)).read_text(encoding="utf-8")
    known = {
        "oxford_pets": [(u, m) for u, m in tv.OxfordIIITPet._RESOURCES],
        "dtd": [(tv.DTD._URL, tv.DTD._MD5)],
        "food101": [(tv.Food101._URL, tv.Food101._MD5)],
        "fgvc_aircraft": [(tv.FGVCAircraft._URL, None)],
        "elevater_country211": [(tv.Country211._URL, tv.Country211._MD5)],
        "elevater_rendered-sst2": [(tv.RenderedSST2._URL, tv.RenderedSST2._MD5)],
        "stl10": [(tv.STL10.url, tv.STL10.tgz_md5)],
        "svhn": [(tv.SVHN.split_list[s][0], tv.SVHN.split_list[s][2]) for s in ("train", "test")],
        "mnist": [(tv.MNIST.mirrors[0] + f, m) for f, m in tv.MNIST.resources],
        "oxford_flowers": [
            (tv.Flowers102._download_url_prefix + f, m) for f, m in tv.Flowers102._file_dict.values()
        ],
        "voc2012_seg": [tuple(tv.voc.DATASET_YEAR_DICT["2012"][k] for k in ("url", "md5"))],
        "elevater_voc-2007-classification": [
            (tv.voc.DATASET_YEAR_DICT[y]["url"], tv.voc.DATASET_YEAR_DICT[y]["md5"])
            for y in ("2007", "2007-test")
        ],
    }
    known["voc2007"] = known["elevater_voc-2007-classification"]
    for name, facts in known.items():
        card = {url: archive.checksum for archive in load_card(name).archives for url in archive.urls}
        for url, md5 in facts:
            assert card[url] == (md5 and f"md5:{md5}"), name
    for name, text in (("gtsrb", gtsrb), ("elevater_gtsrb", gtsrb), ("caltech101", caltech)):
        for archive in load_card(name).archives:
            assert archive.file in text
            assert str(archive.checksum).removeprefix("md5:") in text


def test_a_card_of_ones_own_is_listed_and_overrides(own: Path) -> None:
    own.write_text(yaml.safe_dump(GOOD))
    assert "mine" in list_datasets()
    assert load_card("mine").title == "Mine"
    assert (cards_dir() / "eurosat.yaml").is_file()


def test_all_mistakes_of_a_card_at_once(own: Path) -> None:
    bad = {**GOOD, "titel": "x", "classnames": ["cat", "Cat"], "templates": ["a photo"], "metric": "f1"}
    del bad["paper"]
    own.write_text(yaml.safe_dump(bad))
    with pytest.raises(ConfigError) as caught:
        load_card("mine")
    message = str(caught.value)
    assert "5 problems" in message
    unknown, missing = "'titel'. Did you mean 'title'", "paper: Field required"
    for part in (unknown, missing, "two classes are called", "exactly one {}", "metric: Input should be"):
        assert part in message


@pytest.mark.parametrize(("text", "message"), [("a: [", "not valid YAML"), ("- 1", "is a mapping")])
def test_a_card_that_is_no_card(own: Path, text: str, message: str) -> None:
    own.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_card("mine")


def test_wrong_source_options_name_the_card(own: Path, tmp_path: Path) -> None:
    own.write_text(yaml.safe_dump({**GOOD, "source": {"kind": "images", "options": {"folder": "x"}}}))
    with pytest.raises(ConfigError, match=r"card mine: source\.options: 2 problems"):
        load_dataset("mine", root=tmp_path)
    own.write_text(yaml.safe_dump({**GOOD, "source": {"kind": "imags"}}))
    with pytest.raises(UnknownNameError, match="'images'"):
        load_dataset("mine", root=tmp_path)


def test_unknown_card() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'eurosat'"):
        load_card("eurosta")


def test_classname_rules() -> None:
    check_classnames(["cat", "dog"], "here")
    with pytest.raises(DataError, match="here: the class from ' _' \\(number 1\\) has an empty name"):
        check_classnames(["cat", " _"], "here")
    with pytest.raises(DataError, match="two classes are called 'big cat'"):
        check_classnames(["Big_Cat", "big  cat"], "here")
