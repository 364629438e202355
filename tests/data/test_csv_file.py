from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data import load_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "pics").mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (6, 6), (i, i, i)).save(tmp_path / "data" / "pics" / f"{i}.png")
    return tmp_path / "data"


def table(folder: Path, text: str) -> str:
    (folder / "table.csv").write_text(text, encoding="utf-8")
    return f"csv:{folder / 'table.csv'}"


def test_given_splits(folder: Path) -> None:
    rows = [("train", 0, "red_fox"), ("train", 1, "owl"), ("Validation", 2, "owl"), ("test", 3, "red_fox")]
    text = "path,label,split\n" + "".join(f"pics/{i}.png,{y},{s}\n" for s, i, y in rows)
    train = load_dataset(table(folder, text))
    assert train.classnames == ("owl", "red fox")
    assert [(s.source, s.label) for s in train.samples] == [("pics/0.png", 1), ("pics/1.png", 0)]
    assert [s.source for s in load_dataset(f"csv:{folder / 'table.csv'}", "val").samples] == ["pics/2.png"]
    assert train[0][0].getpixel((0, 0)) == (0, 0, 0)


def test_a_seeded_cut_and_other_column_names(folder: Path) -> None:
    name = table(folder, "\ufefffile;kind\n" + "".join(f"pics/{i}.png;{'ab'[i % 2]}\n" for i in range(12)))
    options = {"path_column": "file", "label_column": "kind", "delimiter": ";"}
    found = [
        {s.source for s in load_dataset(name, split, **options).samples} for split in ("train", "val", "test")
    ]
    assert [len(f) for f in found] == [8, 2, 2]
    assert len(set.union(*found)) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column 'path'; the header has nothing"),
        ("picture,label\n", "line 1: no column 'path'; the header has picture, label"),
        ("path,labels\n", "line 1: no column 'label'.*Did you mean 'labels'"),
        ("path,label,spilt\n", "line 1: column 'spilt' looks like 'split'"),
        ("path,label\n", "no rows"),
        ("path,label\npics/0.png,a\n,b\n", "line 3: column 'path' is empty"),
        ("path,label\npics/0.png,\n", "line 2: column 'label' is empty"),
        ("path,label\npics/0.png\n", "line 2: column 'label' is empty"),
        (
            "path,label,split\npics/0.png,a,tarin\n",
            "line 2: column 'split' is 'tarin'; use train, val or test",
        ),
        ("path,label,split\npics/0.png,a,train\npics/1.png,b,\n", "line 3: column 'split' is empty"),
        ("path,label\npics/0.png,a\npics/0.png,b\n", "line 3: the image 'pics/0.png' is on line 2 already"),
        ("path,label\n../secret.png,a\n", r"line 2: the path '\.\./secret\.png' leaves"),
        ("path,label\npics/../../secret.png,a\n", "line 2: the path .* leaves"),
        ("path,label\n/etc/passwd,a\n", "line 2: the path '/etc/passwd' leaves"),
        ("path,label\npics\\..\\..\\secret.png,a\n", "line 2: the path .* leaves"),
        ("path,label\nC:/secret.png,a\n", "line 2: the path .* leaves"),
        ("path,label,split\npics/0.png,a,train\n", "at least two classes; found one, 'a'"),
        ("path,label,split\npics/0.png,A b,train\npics/1.png,a_b,train\n", "two classes are called 'a b'"),
        ("path,label,split\npics/0.png,a,test\npics/1.png,b,test\n", "the split 'train' is empty"),
    ],
)
def test_mistakes_name_line_and_column(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(table(folder, text))


def test_links_are_followed_or_forbidden(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "elsewhere.png")
    os.symlink(tmp_path / "elsewhere.png", folder / "pics" / "link.png")
    name = table(folder, "path,label,split\npics/link.png,a,train\npics/0.png,b,train\n")
    assert load_dataset(name, validation=False)[0][0].getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(DataError, match=r"line 2: 'pics/link\.png' is a symbolic link"):
        load_dataset(name, links="forbid")


def test_missing_files_and_tables(folder: Path) -> None:
    name = table(folder, "path,label,split\npics/0.png,a,train\npics/99.png,b,train\n")
    with pytest.raises(DataError, match=r"pics/99\.png \(does not exist\)"):
        load_dataset(name)
    with pytest.raises(DataError, match="there is no file"):
        load_dataset(f"csv:{folder / 'none.csv'}")
    (folder / "table.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(DataError, match="no readable CSV table in UTF-8"):
        load_dataset(name)
