from __future__ import annotations

import os
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.folders import tree
from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import load_dataset


def fill(folder: Path, count: int, ending: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng([i, len(folder.name)]).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.{ending}")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for name, count in (("maine_coon", 10), ("Pug", 5), ("shiba_inu", 3)):
        fill(tmp_path / "pets" / name, count)
    return tmp_path / "pets"


def parts(path: Path, **options: object) -> dict[str, list[str]]:
    loaded = {s: load_dataset(f"folder:{path}", s, **options) for s in ("train", "val", "test")}  # type: ignore[arg-type]
    return {s: [x.source for x in d.samples] for s, d in loaded.items()}


def test_class_folders_are_cut_per_class(pets: Path) -> None:
    data = load_dataset(f"folder:{pets}")
    assert data.classnames == ("Pug", "maine coon", "shiba inu")  # byte order of the folder names
    assert data.templates == ("a photo of a {}.",)
    found = parts(pets)
    assert len(set(chain(*found.values()))) == 18
    counts = {s: Counter(p.split("/")[0] for p in found[s]) for s in found}
    assert counts["train"] == {"maine_coon": 6, "Pug": 3, "shiba_inu": 1}
    assert counts["val"] == {"maine_coon": 2, "Pug": 1, "shiba_inu": 1}
    assert counts["test"] == {"maine_coon": 2, "Pug": 1, "shiba_inu": 1}
    image, label = data[0]
    assert image.mode == "RGB"
    assert data.classnames[label] == "Pug"


def test_the_cut_is_the_same_wherever_the_folder_lies(pets: Path, tmp_path: Path) -> None:
    shutil.copytree(pets, tmp_path / "else" / "pets")
    assert parts(pets) == parts(tmp_path / "else" / "pets")
    assert parts(pets) != parts(pets, split_seed=1)
    draws = [load_dataset(f"folder:{p}", shots=1).info["indices"] for p in (pets, tmp_path / "else" / "pets")]
    assert draws[0] == draws[1]


def test_a_new_image_moves_at_most_one_other_per_part(pets: Path) -> None:
    before = parts(pets)
    fill(pets / "maine_coon", 11)
    after = parts(pets)
    for split in before:
        assert len(set(before[split]) - set(after[split])) <= 1


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    for split, count in (("train", 4), (val, 2), ("test", 3)):
        for name in ("cat", "dog"):
            fill(tmp_path / split / name, count)
    found = parts(tmp_path)
    assert {s: len(p) for s, p in found.items()} == {"train": 8, "val": 4, "test": 6}
    assert all(p.startswith(f"{val}/") for p in found["val"])


def test_a_missing_val_is_a_fifth_of_train(tmp_path: Path) -> None:
    for split, count in (("train", 10), ("test", 3)):
        for name in ("cat", "dog"):
            fill(tmp_path / split / name, count)
    found = parts(tmp_path)
    assert {s: len(p) for s, p in found.items()} == {"train": 16, "val": 4, "test": 6}
    assert not set(found["train"]) & set(found["val"])
    assert "val is 20 % of train" in load_dataset(f"folder:{tmp_path}", "val").info["split_source"]


def test_a_missing_test_is_said(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            fill(tmp_path / split / name, 2)
    with pytest.raises(DataError, match=r"no folder for the split 'test'; found \['train', 'val'\]"):
        load_dataset(f"folder:{tmp_path}", "test")


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    for name in ("train", "car"):
        fill(tmp_path / name, 5)
    assert load_dataset(f"folder:{tmp_path}").classnames == ("car", "train")


def test_a_strange_class_in_test_is_named(tmp_path: Path) -> None:
    for path in ("train/cat", "train/dog", "test/cat", "test/cow"):
        fill(tmp_path / path, 2)
    with pytest.raises(DataError, match="'cow' has no images in"):
        load_dataset(f"folder:{tmp_path}", "test")


def test_two_folders_for_one_split(tmp_path: Path) -> None:
    for path in ("train/cat", "val/cat", "valid/cat"):
        fill(tmp_path / path, 2)
    with pytest.raises(DataError, match="mean the split 'val'"):
        load_dataset(f"folder:{tmp_path}")


def test_hidden_files_endings_and_depth(pets: Path) -> None:
    fill(pets / "Pug" / "more" / "deep", 2, "JPG")
    fill(pets / ".trash", 3)
    shutil.copy(pets / "Pug" / "000.png", pets / "Pug" / ".000.png")
    (pets / "Pug" / "notes.txt").write_text("not an image")
    found = list(chain(*parts(pets).values()))
    assert len(found) == 20
    assert "Pug/more/deep/001.JPG" in found
    assert len(list(chain(*parts(pets, extensions=["png"]).values()))) == 18


def test_links_are_followed_or_forbidden(pets: Path, tmp_path: Path) -> None:
    """Caches of the Hub, DVC and git-annex put links where images are expected; scratch disks, links to folders."""
    fill(tmp_path / "outside", 4)
    os.symlink(tmp_path / "outside" / "000.png", pets / "Pug" / "leaves.png")
    os.symlink(tmp_path / "outside", pets / "elsewhere")
    images = list(chain(*parts(pets).values()))
    assert {"Pug/leaves.png", "elsewhere/003.png"} <= set(images)
    assert len(images) == 18 + 1 + 4
    with pytest.raises(DataError, match=r"elsewhere is a symbolic link, and links='forbid'"):
        load_dataset(f"folder:{pets}", links="forbid")


def test_names_from_classnames_txt_and_options(pets: Path) -> None:
    (pets / "classnames.txt").write_text("# folder = name\nmaine_coon = Maine Coon cat\nPug pug dog\n")
    assert load_dataset(f"folder:{pets}").classnames == ("pug dog", "Maine Coon cat", "shiba inu")
    renamed = load_dataset(f"folder:{pets}", classnames={"shiba_inu": "Shiba", "pug dog": "pug"})
    assert renamed.classnames == ("pug", "Maine Coon cat", "Shiba")
    assert load_dataset(f"folder:{pets}", classnames=["a", "b", "c"]).classnames == ("a", "b", "c")
    (pets / "classnames.txt").write_text("\nbeagle = Beagle\n")
    with pytest.raises(DataError, match=r"line 2: no class folder begins 'beagle = Beagle'"):
        load_dataset(f"folder:{pets}")


def test_bad_classnames_and_templates(pets: Path) -> None:
    with pytest.raises(UnknownNameError, match="'shiba_inu'"):
        load_dataset(f"folder:{pets}", classnames={"shiba_inus": "Shiba"})
    with pytest.raises(DataError, match="needs 3 names in order, or a mapping; got 2 names"):
        load_dataset(f"folder:{pets}", classnames=["a", "b"])
    with pytest.raises(DataError, match=r"exactly one \{\}"):
        load_dataset(f"folder:{pets}", templates=["a photo"])
    assert load_dataset(f"folder:{pets}", templates=["my {}."]).templates == ("my {}.",)


def test_empty_class_folder(pets: Path) -> None:
    (pets / "beagle").mkdir()
    with pytest.raises(DataError, match=r"no images in the class folder 'beagle'.*empty_class='skip'"):
        load_dataset(f"folder:{pets}")
    with pytest.warns(UserWarning, match="left out: 'beagle'"):
        assert len(load_dataset(f"folder:{pets}", empty_class="skip").classnames) == 3


def test_one_class_folder(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 5)
    with pytest.raises(DataError, match="at least two classes; found one, 'cat'"):
        load_dataset(f"folder:{tmp_path}")


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in class folders"):
        load_dataset(f"folder:{tmp_path}")
    fill(tmp_path, 3)
    with pytest.raises(DataError, match="3 images lie directly in it"):
        load_dataset(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="there is no folder"):
        load_dataset(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="there is no folder"):
        load_dataset("folder:")


def test_duplicate_names_are_refused_until_renamed(tmp_path: Path) -> None:
    for name in ("red_fox", "Red fox", "owl"):
        fill(tmp_path / name, 3)
    with pytest.raises(DataError, match="'Red fox' and 'red_fox'"):
        load_dataset(f"folder:{tmp_path}")
    renamed = load_dataset(f"folder:{tmp_path}", classnames={"red_fox": "small red fox"})
    assert renamed.classnames == ("Red fox", "owl", "small red fox")


def test_empty_class_name(tmp_path: Path) -> None:
    for name in ("_", "owl"):
        fill(tmp_path / name, 3)
    with pytest.raises(DataError, match=r"the class from '_' .* has an empty name"):
        load_dataset(f"folder:{tmp_path}")


def test_too_few_images_to_cut(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 5)
    fill(tmp_path / "dog", 2)
    with pytest.raises(DataError, match="class 'dog' has 2 images, too few to cut into train, val, test"):
        load_dataset(f"folder:{tmp_path}")


def test_corrupt_image(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        fill(tmp_path / name, 40)
    whole = load_dataset(f"folder:{tmp_path}")
    broken = str(whole.samples[3].source)
    (tmp_path / broken).write_bytes(b"\xff\xd8\xff\xe0 cut short")
    with pytest.warns(UserWarning, match=f"1 of 48 images can't be read: {broken}"):
        kept = load_dataset(f"folder:{tmp_path}")
    assert kept.info["skipped"] == [broken]
    assert len(kept) == 47
    with pytest.raises(DataError, match=broken):
        load_dataset(f"folder:{tmp_path}", on_bad_image="error")
    with pytest.raises(DataError, match="max_bad_share"):
        load_dataset(f"folder:{tmp_path}", max_bad_share=0.0)


def test_unknown_layout_and_option(pets: Path) -> None:
    with pytest.raises(UnknownNameError, match="'splits'"):
        load_dataset(f"folder:{pets}", layout="split")
    with pytest.raises(DataError, match="Did you mean 'layout'"):
        load_dataset(f"folder:{pets}", layuot="classes")


def test_class_folders_one_deeper_than_the_splits_are_no_one_class(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{split}/images/{name}" for split in ("train", "test") for name in ("cat", "dog")))
    for split in ("train", "test", "all"):
        with pytest.raises(DataError, match=r"As the one class 'images'.*classes 'cat', 'dog', one folder"):
            load_dataset(f"folder:{tmp_path}", split)


@pytest.mark.parametrize("inner", ["{kind}/{split}", "{split}/{kind}"])
def test_a_detection_layout_is_called_by_its_name(tmp_path: Path, inner: str) -> None:
    for split in ("train", "val"):
        tree(tmp_path, inner.format(kind="images", split=split))
        labels = tmp_path / inner.format(kind="labels", split=split)
        labels.mkdir(parents=True)
        (labels / "000.txt").write_text("0 .5 .5 .2 .2\n")
    with pytest.raises(DataError, match="YOLO's layout"):
        load_dataset(f"folder:{tmp_path}", "train")


def test_archives_and_films_among_images_are_named(tmp_path: Path) -> None:
    tree(tmp_path, "cat", "dog")
    for name in ("more.zip", "cat/more.tar.gz", "dog/film.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(
        UserWarning, match=r"3 entries are left out, no image by its ending: 'cat/more.tar.gz'"
    ):
        load_dataset(f"folder:{tmp_path}", "train")


def test_a_folder_of_archives_says_to_unpack_them(tmp_path: Path) -> None:
    (tmp_path / "train.zip").write_bytes(b"x")
    with pytest.raises(DataError, match=r"It holds 'train.zip', which can't be read here: unpack"):
        load_dataset(f"folder:{tmp_path}", "train")
