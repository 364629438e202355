from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data import load_card, load_dataset

# The copies made here are small, and their split files are made up.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not the published one")
NOT_WHOLE = pytest.mark.filterwarnings("ignore:.*is it whole")


def image_file(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade % 256, shade // 256 % 256, 7)).save(path)


def make_eurosat(root: Path, per_class: int = 10) -> None:
    folders = load_card("eurosat").source.options["class_folders"]
    for c, name in enumerate(folders):
        for i in range(1, per_class + 1):
            image_file(root / "eurosat" / "2750" / name / f"{name}_{i}.jpg", 100 * c + i)


def make_pets(root: Path, folder: str = "oxford_pets", per_class: int = 10) -> None:
    """Write the real layout: capitals for cats, 1-based numbers that ignore case, .mat files between."""
    cats = {"abyssinian", "bengal", "birman", "bombay", "british_shorthair"}
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    for number, name in enumerate(load_card("oxford_pets").classnames, 1):
        stem = name.replace(" ", "_")
        stem = stem.title() if stem in cats else stem
        for i in range(1, per_class + 1):
            image_file(root / folder / "images" / f"{stem}_{i}.jpg", 100 * number + i)
            part = "trainval" if i <= per_class // 2 else "test"
            lists[part].append(f"{stem}_{i} {number} {1 if stem in cats else 2} 1")
    (root / folder / "images" / "Abyssinian_100.mat").write_bytes(b"")
    (root / folder / "annotations").mkdir()
    for part, lines in lists.items():
        (root / folder / "annotations" / f"{part}.txt").write_text("\n".join(sorted(lines)) + "\n")


def make_dtd(root: Path, folder: str = "dtd", per_class: int = 12) -> None:
    labels: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for c, name in enumerate(load_card("dtd").classnames):
        for i in range(per_class):
            image_file(root / folder / "images" / name / f"{name}_{i:04d}.jpg", 100 * c + i)
            labels[("train", "val", "test")[i % 3]].append(f"{name}/{name}_{i:04d}.jpg")
    (root / folder / "labels").mkdir()
    for part, lines in labels.items():
        (root / folder / "labels" / f"{part}1.txt").write_text("\n".join(lines) + "\n")


def published(images: Path, names: list[str], of_class: dict[str, int]) -> dict[str, list[list[object]]]:
    """Return a split in the published format: shuffled order, underscored names, a third each."""
    content: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    paths = sorted(images.rglob("*.jpg"), key=lambda p: hashlib.md5(p.name.encode()).hexdigest())
    for i, path in enumerate(paths):
        label = of_class[path.parent.name]
        content[("train", "val", "test")[i % 3]].append(
            [path.relative_to(images).as_posix(), label, names[label].replace(" ", "_")]
        )
    return content


@NOT_WHOLE
def test_eurosat_is_cut_as_the_protocol_does_and_the_cut_is_stored(tmp_path: Path) -> None:
    make_eurosat(tmp_path)
    loaded = {s: load_dataset("eurosat", s, root=tmp_path) for s in ("train", "val", "test")}
    assert {s: set(Counter(d.labels).values()) for s, d in loaded.items()} == {
        "train": {5},
        "val": {2},
        "test": {3},
    }
    assert len({s.source for d in loaded.values() for s in d.samples}) == 100
    train = loaded["train"]
    assert train.classnames[9] == "Sea or Lake"
    assert all(s.source.startswith("SeaLake/") for s in train.samples if s.label == 9)
    assert train.templates == ("a centered satellite photo of {}.",)
    assert train.info["split_source"].startswith("split_local_eurosat.json sha256 ")
    image_file(tmp_path / "eurosat" / "2750" / "River" / "River_99.jpg", 5)  # a stored cut stays as it is
    assert load_dataset("eurosat", root=tmp_path).samples == train.samples


@NOT_WHOLE
def test_the_cut_is_the_same_on_another_machine(tmp_path: Path) -> None:
    for where in ("a", "b"):
        make_eurosat(tmp_path / where)
    first, second = (load_dataset("eurosat", root=tmp_path / where, shots=2, seed=1) for where in ("a", "b"))
    assert first.samples == second.samples
    stored = [(tmp_path / w / "eurosat" / "split_local_eurosat.json").read_bytes() for w in ("a", "b")]
    assert stored[0] == stored[1]


def test_a_part_of_the_data_set_is_noticed(tmp_path: Path) -> None:
    make_eurosat(tmp_path)
    with pytest.warns(UserWarning, match=r"100 images in .*, 27000 expected"):
        load_dataset("eurosat", root=tmp_path)
    (tmp_path / "eurosat" / "2750" / "Forest" / "Forest_3.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 of the 100 images that split_local_eurosat\.json lists are missing"
    ):
        load_dataset("eurosat", root=tmp_path)


@pytest.mark.parametrize("place", ["dtd", "dtd/dtd"])
def test_the_published_split_file_comes_first(tmp_path: Path, place: str) -> None:
    make_dtd(tmp_path, place)
    names = list(load_card("dtd").classnames)
    content = published(tmp_path / place / "images", names, {n: i for i, n in enumerate(names)})
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps(content))
    for split in ("train", "val", "test"):
        data = load_dataset("dtd", split, root=tmp_path)
        assert [[s.source, s.label, data.classnames[s.label]] for s in data.samples] == content[split]
        assert data.info["split_source"].startswith("split_zhou_DescribableTextures.json sha256 ")
        assert data[0][0].size == (8, 8)


def test_dtd_official_fold(tmp_path: Path) -> None:
    make_dtd(tmp_path)
    data = load_dataset("dtd", "val", root=tmp_path, split_source="lists")
    assert [s.source for s in data.samples][:2] == ["banded/banded_0001.jpg", "banded/banded_0004.jpg"]
    assert set(Counter(data.labels).values()) == {4}
    assert "labels/val1.txt" in data.info["split_source"]
    assert not list(tmp_path.rglob("split_local*"))


@NOT_WHOLE
@pytest.mark.parametrize("folder", ["oxford_pets", "oxford-iiit-pet"])
def test_pets_follow_the_official_lists(tmp_path: Path, folder: str) -> None:
    make_pets(tmp_path, folder)
    loaded = {s: load_dataset("oxford_pets", s, root=tmp_path) for s in ("train", "val", "test")}
    assert {s: set(Counter(d.labels).values()) for s, d in loaded.items()} == {
        "train": {4},
        "val": {1},
        "test": {5},
    }
    official = {
        x.split()[0] for x in (tmp_path / folder / "annotations" / "test.txt").read_text().splitlines()
    }
    assert {s.source.removesuffix(".jpg") for s in loaded["test"].samples} == official
    for data in loaded.values():
        for sample in data.samples:
            breed = sample.source.rsplit("_", 1)[0].lower().replace("_", " ")
            assert data.classnames[sample.label] == breed


def test_pets_published_split(tmp_path: Path) -> None:
    make_pets(tmp_path)
    names = list(load_card("oxford_pets").classnames)
    images = tmp_path / "oxford_pets" / "images"
    rows = [
        [p.name, names.index(n), n.replace(" ", "_")]
        for p in sorted(images.glob("*.jpg"))
        for n in [p.stem.rsplit("_", 1)[0].lower().replace("_", " ")]
    ]
    content = {"train": rows[::3], "val": rows[1::3], "test": rows[2::3]}
    (tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json").write_text(json.dumps(content))
    data = load_dataset("oxford_pets", "test", root=tmp_path, split_source="published")
    assert data.classnames == tuple(names)
    assert [s.source for s in data.samples] == [r[0] for r in content["test"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ("[]", "needs the keys train, val, test"),
        ({"train": [["a.jpg", 0]], "val": [], "test": []}, r"train entry 0: expected \[path, label"),
        ({"train": [["a.jpg", "0", "x"]], "val": [], "test": []}, "the label must be a whole number from 0"),
        ({"train": [["a.jpg", 1, "x"]], "val": [], "test": []}, "without gaps; 0 is missing"),
        ({"train": [["../a.jpg", 0, "x"]], "val": [], "test": []}, "leaves the image folder"),
        ({"train": [["/a.jpg", 0, "x"]], "val": [], "test": []}, "leaves the image folder"),
        ({"train": [["a.jpg", 0, "x"]], "val": [["b.jpg", 0, "y"]], "test": []}, "label 0 is 'y' here"),
        ({"train": [["a.jpg", 0, "x"]], "val": [], "test": []}, "has 1 classes, eurosat has 10"),
    ],
)  # fmt: skip
def test_damaged_split_files(tmp_path: Path, content: object, message: str) -> None:
    make_eurosat(tmp_path, per_class=3)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "eurosat" / "split_zhou_EuroSAT.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset("eurosat", root=tmp_path)


def test_a_split_file_whose_images_are_missing(tmp_path: Path) -> None:
    make_eurosat(tmp_path, per_class=3)
    options = load_card("eurosat").source.options["class_folders"]
    content = published(
        tmp_path / "eurosat" / "2750",
        list(load_card("eurosat").classnames),
        {n: i for i, n in enumerate(options)},
    )
    (tmp_path / "eurosat" / "split_zhou_EuroSAT.json").write_text(json.dumps(content))
    gone = str(content["test"][0][0])
    (tmp_path / "eurosat" / "2750" / gone).unlink()
    with pytest.raises(DataError, match=f"1 of the 30 images that split_zhou_EuroSAT.json lists.*{gone}"):
        load_dataset("eurosat", root=tmp_path)


def test_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("oxford_pets", root=tmp_path)
    message = str(caught.value)
    expected = ["oxford_pets/images or oxford-iiit-pet/images", "download=True", "812 MB", "images.tar.gz"]
    for part in [*expected, "digits", "scenes/shape", "VLPROMPT_DATA"]:
        assert part in message
    make_dtd(tmp_path)
    with pytest.raises(
        DataError, match=r"split_zhou_DescribableTextures\.json is missing\. .* get it from https://drive"
    ):
        load_dataset("dtd", root=tmp_path, split_source="published")


def test_no_network_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(
        DataError, match=r"dtd: dtd-r1\.0\.1\.tar\.gz could not be fetched\. .*By hand: Unpack dtd-r1\.0\.1"
    ) as caught:
        load_dataset("dtd", root=tmp_path, download=True)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_split_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(6):
        image_file(tmp_path / "mine" / "jpg" / f"{i}.jpg", i)
    rows = [[f"{i}.jpg", i % 2, ("a_cat", "dog")[i % 2]] for i in range(6)]
    card = {
        "title": "Mine", "task": "classification", "paper": "none", "licence": "none", "templates": ["{}"],
        "classnames": ["a cat", "dog"], "splits": {"file": "split.json", "url": "https://example.org/split.json"},
        "source": {"kind": "images", "options": {"folders": ["mine"], "images": "jpg"}},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.setenv("VLPROMPT_CARDS", str(tmp_path))
    with pytest.raises(
        DataError, match=r"split\.json is missing\. Fetch it with .* or get it from https://example\.org"
    ):
        load_dataset("mine", root=tmp_path)
    split = tmp_path / "mine" / "split.json"
    split.write_text(json.dumps({"train": rows[:2], "val": rows[2:4], "test": rows[4:]}))
    assert load_dataset("mine", "test", root=tmp_path).classnames == ("a cat", "dog")
    card["splits"]["checksum"] = f"sha256:{hashlib.sha256(split.read_bytes()).hexdigest()}"  # type: ignore[index]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(card))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset("mine", root=tmp_path)
        split.write_text(split.read_text() + "\n")  # a copy that somebody's editor saved
        load_dataset("mine", root=tmp_path)
    split.write_text(split.read_text().replace("5.jpg", "4.jpg"))
    with pytest.warns(UserWarning, match="is not the published one .*results made with it say sha256"):
        assert "sha256" in load_dataset("mine", root=tmp_path).info["split_source"]
