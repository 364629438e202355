"""Folders as people have them: what is a split, what is an image, and that nothing is left out uncounted."""

from __future__ import annotations

import os
import shutil
import socket
import unicodedata
import warnings
from pathlib import Path

import pytest

from tests.data.folders import fill, image, tree
from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.data.fingerprint import data_fingerprint
from vlprompt.data.listing import list_folder


def sizes(name: str, **options: object) -> dict[str, int]:
    return {s: len(load_dataset(name, s, **options)) for s in ("train", "val", "test")}  # type: ignore[arg-type]


# --- splits


@pytest.mark.parametrize(
    "test", ["testing", "eval", "tst", "test_set", "TEST", "test-images", "testdata", "evaluation"]
)
def test_spellings_of_test_beside_train(tmp_path: Path, test: str) -> None:
    name = tree(tmp_path, "train/cat", "train/dog", f"{test}/cat", f"{test}/dog", count=5)
    assert load_dataset(name, "test").classnames == ("cat", "dog")
    assert sizes(name) == {"train": 8, "val": 2, "test": 10}


@pytest.mark.parametrize("val", ["dev", "valid_set", "development", "Validation"])
def test_spellings_of_val(tmp_path: Path, val: str) -> None:
    name = tree(tmp_path, *(f"{s}/{c}" for s in ("training", val, "tst") for c in ("cat", "dog")), count=2)
    assert sizes(name) == {"train": 4, "val": 4, "test": 4}


def test_a_split_of_an_unknown_name_is_an_error_with_both_readings(tmp_path: Path) -> None:
    name = tree(tmp_path, "train/cat", "train/dog", "holdout/cat", "holdout/dog")
    with pytest.raises(DataError, match=r"As splits.*'cat', 'dog'.*split_folders=.*layout='classes'"):
        load_dataset(name)
    assert sizes(name, split_folders={"train": "train", "test": "holdout"})["test"] == 6
    assert load_dataset(name, layout="classes").classnames == ("holdout", "train")


def test_splits_of_unknown_names_only(tmp_path: Path) -> None:
    name = tree(tmp_path, "2019/cat", "2019/dog", "2020/cat", "2020/dog")
    with pytest.raises(DataError, match=r"'2019', '2020' can be read in two ways"):
        load_dataset(name)
    assert sizes(name, split_folders={"train": "2019", "test": "2020"}, validation=True)["test"] == 6
    with pytest.raises(UnknownNameError, match="'2019'"):
        load_dataset(name, split_folders={"train": "2018"})


def test_class_folders_with_other_folders_in_them_are_classes(tmp_path: Path) -> None:
    name = tree(tmp_path, "animals/cat", "animals/dog", "plants/rose", "plants/oak")
    assert load_dataset(name).classnames == ("animals", "plants")
    other = tree(tmp_path / "one", "cat/images", "dog/images")
    assert load_dataset(other).classnames == ("cat", "dog")  # one class 'images' would be no data set


def test_train_beside_strange_folders(tmp_path: Path) -> None:
    name = tree(tmp_path, "train/cat", "train/dog", "extras")
    with pytest.raises(DataError, match=r"can be read in two ways.*layout='splits'.*layout='classes'"):
        load_dataset(name)
    tree(tmp_path, "test/cat", "test/dog")
    with pytest.warns(UserWarning, match=r"'extras' \(3 images\) beside .*: left out"):
        assert len(load_dataset(name, "test")) == 6


def test_flat_split_folders_are_an_error(tmp_path: Path) -> None:
    name = tree(tmp_path, "train", "test")
    with pytest.raises(DataError, match=r"hold images, but no class folders.*layout='classes'"):
        load_dataset(name)
    assert load_dataset(name, layout="classes").classnames == ("test", "train")


def test_two_folders_for_one_split_name_the_option(tmp_path: Path) -> None:
    name = tree(tmp_path, *(f"{s}/{c}" for s in ("train", "eval", "test") for c in ("cat", "dog")))
    with pytest.raises(DataError, match=r"both 'eval' and 'test' mean the split 'test'.*split_folders="):
        load_dataset(name)
    chosen = {"train": "train", "val": "eval", "test": "test"}
    assert sizes(name, split_folders=chosen) == {"train": 6, "val": 6, "test": 6}


def test_a_wrapping_folder_is_named(tmp_path: Path) -> None:
    name = tree(tmp_path, "images/cat", "images/dog")
    with pytest.raises(DataError, match=r"its only folder, 'images'.*/images\."):
        load_dataset(name)


def test_only_a_test_folder(tmp_path: Path) -> None:
    name = tree(tmp_path, "test/cat", "test/dog")
    assert load_dataset(name, "test").classnames == ("cat", "dog")
    with pytest.raises(DataError, match="no folder for the split 'train'"):
        load_dataset(name)


def test_images_in_no_class_folder_are_counted(tmp_path: Path) -> None:
    name = tree(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog")
    image(1).save(tmp_path / "cover.png")
    image(2).save(tmp_path / "train" / "stray.png")
    with pytest.warns(UserWarning, match="left out") as caught:
        assert len(load_dataset(name, "test")) == 6
    messages = " ".join(str(w.message) for w in caught)
    assert "1 image lies directly in it" in messages
    assert "1 image lies directly in 'train'" in messages


# --- what is listed


def test_what_is_no_regular_file_is_named_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = tree(tmp_path, "cat", "dog", count=5)
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    os.symlink("loop.jpg", tmp_path / "cat" / "loop.jpg")
    os.symlink("gone.jpg", tmp_path / "cat" / "dead.jpg")
    os.symlink("/dev/zero", tmp_path / "cat" / "zero.png")
    os.symlink("..", tmp_path / "cat" / "up")
    with socket.socket(socket.AF_UNIX) as server, warnings.catch_warnings(record=True) as caught:
        monkeypatch.chdir(tmp_path / "cat")  # a socket's path may hold 107 bytes, so it is bound by its name
        server.bind("socket.png")
        warnings.simplefilter("always")
        assert load_dataset(name, "all").classnames == ("cat", "dog")
        assert len(load_dataset(name, "all")) == 10
    messages = {str(w.message).partition(": ")[2] for w in caught}
    assert messages == {
        "1 entry is left out, a named pipe: 'cat/pipe.jpg'.",
        "1 entry is left out, a link that leads to itself: 'cat/loop.jpg'.",
        "1 entry is left out, a link to nothing: 'cat/dead.jpg'.",
        "1 entry is left out, a device: 'cat/zero.png'.",
        "1 entry is left out, a socket: 'cat/socket.png'.",
        "1 entry is left out, a link to a folder that it lies in: 'cat/up'.",
    }


def test_links_in_circles_end(tmp_path: Path) -> None:
    for one in "abcdef":
        (tmp_path / one).mkdir()
        for other in "abcdef":
            os.symlink(tmp_path / other, tmp_path / one / other)
    image(0).save(tmp_path / "a" / "0.png")
    assert "a/0.png" in list_folder(tmp_path, tmp_path).images


@pytest.mark.parametrize("ending", ["avif", "jp2", "webp", "bmp"])
def test_formats_that_pillow_reads_are_images(tmp_path: Path, ending: str) -> None:
    name = tree(tmp_path, "cat", "dog")
    fill(tmp_path / "cat", 3, ending)
    assert len(load_dataset(name, "all")) == 9


def test_heic_is_an_image_that_says_what_it_needs(tmp_path: Path) -> None:
    name = tree(tmp_path, "cat", "dog", count=10)
    (tmp_path / "cat" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + b"\0" * 64)
    with pytest.warns(
        UserWarning, match=r"1 of 21 images can't be read: cat/phone\.HEIC \(it is HEIC.*pillow-heif"
    ):
        assert len(load_dataset(name, "all")) == 20


def test_what_systems_and_editors_leave_is_no_data(tmp_path: Path) -> None:
    name = tree(tmp_path, "cat", "dog")
    for path in ("cat/.ipynb_checkpoints", "__MACOSX/cat", ".git", "cat/__MACOSX"):
        fill(tmp_path / path, 2)
    shutil.copy(tmp_path / "cat" / "000.png", tmp_path / "cat" / "._000.png")
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    data = load_dataset(name, "all")
    assert (data.classnames, len(data)) == (("cat", "dog"), 6)
    assert len(list_folder(tmp_path, tmp_path).skipped) == 6  # each entry once, not what lies in it


def test_images_that_can_not_be_read_by_us_are_counted(tmp_path: Path) -> None:
    name = tree(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "raw.CR2").write_bytes(b"x")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match=r"1 entry is left out, no image by its ending: 'cat/raw\.CR2'"):
        load_dataset(name, "all")


# --- validation


def test_validation_takes_only_what_is_needed(tmp_path: Path) -> None:
    name = tree(tmp_path, *(f"{s}/{c}" for s in ("train", "test") for c in "abc"), count=5)
    train = load_dataset(name)
    assert len(train) == 12
    assert train.info["cut_for_validation"] == [3, 15]
    assert "3 of its 15 images" in train.info["split_source"]
    assert len(load_dataset(name, validation=False)) == 15
    with pytest.raises(DataError, match="none is cut from train: validation=False"):
        load_dataset(name, "val", validation=False)


def test_one_training_image_a_class(tmp_path: Path) -> None:
    name = tree(tmp_path, *(f"{s}/{c}" for s in ("train", "test") for c in "abc"), count=1)
    assert len(load_dataset(name)) == len(load_dataset(name, validation=False)) == 3
    with pytest.raises(DataError, match=r"every class has a single image.*validate_on=none"):
        load_dataset(name, "val")


def test_without_validation_a_folder_without_splits_keeps_its_test_images(tmp_path: Path) -> None:
    name = tree(tmp_path, "a", "b", count=10)
    with_val = {s: {x.source for x in load_dataset(name, s).samples} for s in ("train", "val", "test")}
    whole = load_dataset(name, validation=False)
    assert {x.source for x in whole.samples} == with_val["train"] | with_val["val"]
    assert {x.source for x in load_dataset(name, "test", validation=False).samples} == with_val["test"]
    fill(tmp_path / "c", 2)
    assert len(load_dataset(name, "test", validation=False)) == 5
    with pytest.raises(DataError, match="'c' has 2 images"):
        load_dataset(name)


# --- everything, one class


def test_everything_is_the_test_set_when_asked(tmp_path: Path) -> None:
    name = tree(tmp_path, "cat", count=1)
    data = load_dataset(name, "all")
    assert (data.classnames, len(data), data.split) == (("cat",), 1, "all")
    with pytest.raises(DataError, match="at least two classes"):
        load_dataset(tree(tmp_path / "x", "cat", count=5))
    both = tree(tmp_path / "y", "train/cat", "test/cat", "test/dog", "train/dog")
    assert len(load_dataset(both, "all")) == 12
    with pytest.raises(DataError, match="split 'all' is for your own images"):
        load_dataset("digits", "all")


# --- damaged images


@pytest.mark.parametrize(
    ("total", "damaged", "fine"), [(30, 1, True), (6, 1, True), (6, 3, False), (60, 4, False)]
)
def test_a_floor_in_images_beside_the_share(tmp_path: Path, total: int, damaged: int, fine: bool) -> None:
    name = tree(tmp_path, "test/cat", "test/dog", count=total // 2)
    for number in range(damaged):
        (tmp_path / "test" / "cat" / f"{number:03d}.png").write_bytes(b"damaged")
    if fine:
        with pytest.warns(UserWarning, match=f"{damaged} of {total} images can't be read"):
            data = load_dataset(name, "test")
        assert len(data.info["skipped"]) == damaged
    else:
        with pytest.raises(DataError, match=r"max_bad_share\).*max_bad_images"):
            load_dataset(name, "test")
        with pytest.warns(UserWarning, match="They are skipped"):
            load_dataset(name, "test", max_bad_share=0.6)
    with pytest.raises(DataError, match="max_bad_images is a whole number"):
        load_dataset(name, "test", max_bad_images=-1)


# --- names


def test_decomposed_letters_mean_the_same_class_in_all_splits(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    name = tree(tmp_path, f"train/{composed}", "train/bar", f"test/{decomposed}", "test/bar")
    (tmp_path / "classnames.txt").write_text(f"{decomposed} = coffee house\n", encoding="utf-8")
    test = load_dataset(name, "test")
    assert test.classnames == ("bar", "coffee house")
    assert len(test) == 6


def test_two_spellings_of_one_class_in_a_split(tmp_path: Path) -> None:
    name = tree(tmp_path, *(unicodedata.normalize(form, "café") for form in ("NFC", "NFD")), "bar")
    with pytest.raises(DataError, match="two classes are called 'café'"):
        load_dataset(name)


def test_image_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = tree(tmp_path, "cat", "dog", count=10)
    os.rename(tmp_path / "cat" / "000.png", os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
    (tmp_path / "cat" / "001.png").write_bytes(b"damaged")
    os.rename(tmp_path / "cat" / "001.png", os.fsencode(tmp_path / "cat") + b"/\xff.png")
    with pytest.warns(UserWarning, match=r"cat/\\xff\.png"):
        data = load_dataset(name, "all")
    assert len(data) == 19
    assert len(data_fingerprint(name)) == 12
    assert data[0][0].size == (8, 6)


def test_class_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    name = tree(tmp_path, "cat", "dog")
    os.rename(tmp_path / "dog", os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"'caf\\\\xe9' is not UTF-8"):
        load_dataset(name)


def test_long_names_and_line_breaks(tmp_path: Path) -> None:
    long = "x" * 200
    name = tree(tmp_path, f"train/{long}", "train/two\nlines", f"test/{long}", "test/two\nlines")
    assert load_dataset(name, "test").classnames == ("two lines", long)


@pytest.mark.parametrize(
    ("classnames", "message"),
    [
        ("cat", "needs 2 names in order, or a mapping; got str 'cat'"),
        ([1, 2], "a class name is text; got 1, a number.*quotation marks"),
        ([True, False], "a class name is text; got True, a truth value"),
        ({"cat": False}, "a class name is text; got False"),
        (["café", "cafe\u0301"], "two classes are called"),
        (["\uff21\uff22", "ab"], "two classes are called"),
        (["black &amp; white", "Black & white"], "two classes are called"),
        (["cat's eye", "cat\u2019s eye"], "two classes are called"),
    ],
)
def test_class_names_of_all_kinds(tmp_path: Path, classnames: object, message: str) -> None:
    name = tree(tmp_path, "cat", "dog")
    with pytest.raises(DataError, match=message):
        load_dataset(name, classnames=classnames)  # type: ignore[arg-type]


# --- classnames.txt


def test_a_list_of_more_classes_than_the_folder_has(tmp_path: Path) -> None:
    name = tree(tmp_path, "n01", "n02")
    (tmp_path / "classnames.txt").write_text("n03 fox\nN02 = dog\nn01 cat\nn04 = owl\n")
    with pytest.warns(UserWarning, match=r"2 lines are about no folder that is here.*'n03 fox', 'n04 = owl'"):
        assert load_dataset(name).classnames == ("cat", "dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01 cat\nn0 2 dog\n", r"line 2: no class folder begins 'n0 2 dog'.*'n02'"),
        ("n01 cat\nn01 dog\nn02 x", "line 2: the folder 'n01' is on line 1 already"),
        ("n01 =\nn02 x", "line 1: no class name behind"),
    ],
)
def test_mistakes_in_the_list_of_classes(tmp_path: Path, text: str, message: str) -> None:
    name = tree(tmp_path, "n01", "n02")
    (tmp_path / "classnames.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_dataset(name)


def test_a_list_of_classes_in_another_encoding(tmp_path: Path) -> None:
    name = tree(tmp_path, "n01", "n02")
    (tmp_path / "classnames.txt").write_bytes(b"n01 caf\xe9\n")
    with pytest.raises(DataError, match=r"classnames\.txt is no text in UTF-8"):
        load_dataset(name)


# --- options of the wrong type


@pytest.mark.parametrize(
    "options",
    [
        {"extensions": "png"},
        {"extensions": 5},
        {"split_seed": "first"},
        {"layout": ["splits"]},
        {"split_folders": "train"},
        {"max_pixels": 10**12},
        {"value_range": [5]},
        {"links": None},
        {"seed": "1"},
        {"shots": "2"},
        {"max_bad_share": "all"},
    ],
)
def test_options_of_the_wrong_type_are_said(tmp_path: Path, options: dict[str, object]) -> None:
    name = tree(tmp_path, "cat", "dog")
    with pytest.raises((DataError, UnknownNameError)):
        load_dataset(name, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ["~nobody_of_this_name/x", "x" * 5000, "a\0b", "https://example.org/x"])
def test_paths_that_can_not_be(argument: str) -> None:
    for kind in ("folder", "csv"):
        with pytest.raises(DataError):
            load_dataset(f"{kind}:{argument}")


def test_train_is_the_same_object_whatever_the_listing_order(tmp_path: Path) -> None:
    first = load_dataset(tree(tmp_path / "one", "b", "a", count=9))
    second = load_dataset(tree(tmp_path / "two", "a", "b", count=9))

    def sources(data: ImageDataset) -> list[object]:
        return [sample.source for sample in data.samples]

    assert sources(first) == sources(second)
