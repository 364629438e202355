"""Tables as spreadsheets and other programs write them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from tests.data.folders import fill, image
from vlprompt.core.errors import DataError
from vlprompt.data import ImageDataset, load_dataset
from vlprompt.data.captions import open_captions
from vlprompt.data.tables import read_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fill(tmp_path, 12)
    return tmp_path


def load(folder: Path, text: str | bytes, split: str = "all", **options: object) -> ImageDataset:
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "t.csv").write_bytes(data)
    return load_dataset(f"csv:{folder / 't.csv'}", split, **options)  # type: ignore[arg-type]


def pairs(data: ImageDataset) -> list[tuple[object, str]]:
    return [(sample.source, data.classnames[sample.classes[0]]) for sample in data.samples]


EXPECTED = [("000.png", "cat"), ("001.png", "dog")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\n000.png,cat\n001.png,dog\n", "separated by commas"),
        ("path;label\n000.png;cat\n001.png;dog\n", "separated by semicolons"),
        ("path\tlabel\n000.png\tcat\n001.png\tdog\n", "separated by tabs"),
        ("path|label\n000.png|cat\n001.png|dog\n", "separated by bars"),
        ("sep=;\npath;label\n000.png;cat\n001.png;dog\n", "separated by semicolons"),
        ("\ufeffpath, label\n000.png, cat\n001.png, dog\n", "separated by commas"),
        ('path, "label"\n"000.png", "cat"\n001.png , dog \n', "separated by commas"),
        ("path,label\n,\n000.png,cat\n,,,\n\n001.png,dog\n,\n", "separated by commas, 4 empty rows left out"),
        ("file_name,class\n000.png,cat\n001.png,dog\n", "separated by commas"),
        ("Filename,Label\n./000.png,cat\n.\\001.png,dog\n", "separated by commas"),
        ("image,category,score\r\n000.png,cat,1\r\n001.png,dog,2\r\n", "separated by commas"),
        ("path,label\r000.png,cat\r001.png,dog\r", "separated by commas"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*separated by")
def test_forms_of_one_table(folder: Path, text: str, said: str) -> None:
    data = load(folder, text)
    assert pairs(data) == EXPECTED
    assert data.info["table"] == said


def test_a_table_in_utf16(folder: Path) -> None:
    with pytest.warns(UserWarning, match="separated by tabs"):
        assert pairs(load(folder, "path\tlabel\n000.png\tcat\n001.png\tdog\n".encode("utf-16"))) == EXPECTED


def test_absolute_paths_inside_the_folder(folder: Path) -> None:
    assert pairs(load(folder, f"path,label\n{folder}/000.png,cat\n{folder}//./001.png,dog\n")) == EXPECTED
    with pytest.raises(DataError, match=r"line 2: the path '.*' leaves"):
        load(folder, f"path,label\n{folder}x/000.png,cat\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n000.png,cat\n./000.png,dog\n", "line 3.*on line 2 already, there with the label 'cat'"),
        (
            "path,label,split\na//000.png,cat,train\na/000.png,cat,test\n",
            "line 3: the image 'a/000.png' is on line 2 already, there in train, here in test",
        ),
        (
            "path,label,split\n000.png,cat,train\n001.png,dog,train\n002.png,dgo,test\n",
            "line 4: the class 'dgo' has no row in train .*Is it 'dog'",
        ),
        ("path,label\n000.png,cat\n001.png,dog,brown\n", "line 3: 3 fields, but the header has 2 columns"),
        ('path,label\n000.png,"cat\n001.png,dog\n002.png,dog"\n', "lines 2 to 4 are one row"),
        ('path,label\n000.png,"cat\n001.png,dog\n', "line 2: a quotation mark is not closed"),
        ('path,label\n000.png,"cat" x\n', "line 2: text follows a closing quotation mark"),
        ("path;label,x\n000.png;cat,1\n", "line 1: the header holds commas and semicolons.*delimiter="),
        ("image,file,label\na,b,c\n", "the columns 'image' and 'file' can both be 'path'.*path_column=NAME"),
        ("path,label\n000.png,ca\0t\n", "line 2: there is a null character"),
    ],
)
def test_mistakes_name_the_line(folder: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(folder, text)


def test_another_encoding_names_the_line(folder: Path) -> None:
    with pytest.raises(DataError, match=r"in UTF-8: line 3 holds the byte 0xe9.*CSV UTF-8"):
        load(folder, "path,label\n000.png,cat\n001.png,café\n".encode("latin-1"))


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n"])
def test_a_delimiter_is_one_character(folder: Path, delimiter: str) -> None:
    with pytest.raises(DataError, match="delimiter is one character"):
        load(folder, "path,label\n000.png,cat\n", delimiter=delimiter)


def test_names_that_were_decomposed_by_another_system(folder: Path) -> None:
    image(1).save(folder / unicodedata.normalize("NFD", "é.png"))
    data = load(folder, f"path,label\n{unicodedata.normalize('NFC', 'é.png')},cat\n001.png,dog\n")
    assert len(data) == 2


def test_a_missing_val_is_a_fifth_of_train(folder: Path) -> None:
    rows = [f"{i:03d}.png,{'ab'[i % 2]},{'train' if i < 10 else 'test'}\n" for i in range(12)]
    text = "path,label,split\n" + "".join(rows)
    sizes = {split: len(load(folder, text, split)) for split in ("train", "val", "test")}
    assert sizes == {"train": 8, "val": 2, "test": 2}
    assert len(load(folder, text, "train", validation=False)) == 10


# --- captions


def captions(folder: Path, text: str) -> list[str]:
    (folder / "c.csv").write_text(text, encoding="utf-8")
    source = open_captions(f"csv:{folder / 'c.csv'}")
    return [source.caption(index) for index in range(len(source))]


def test_a_lone_quotation_mark_swallows_nothing(folder: Path) -> None:
    rows = [f"{i:03d}.png,caption {i}\n" for i in range(12)]
    assert len(captions(folder, "image,caption\n" + "".join(rows))) == 12
    rows[2] = '002.png,"caption 2\n'
    with pytest.raises(DataError, match="line 4: a quotation mark is not closed"):
        captions(folder, "image,caption\n" + "".join(rows))
    rows[9] = '009.png,caption 9"\n'
    with pytest.raises(DataError, match="lines 4 to 11 are one row: a quotation mark on line 4"):
        captions(folder, "image,caption\n" + "".join(rows))


def test_a_comma_without_quotation_marks_cuts_nothing(folder: Path) -> None:
    assert captions(folder, 'image,caption\n000.png,"a cat, asleep"\n') == ["a cat, asleep"]
    with pytest.raises(DataError, match=r"line 2: 3 fields, .* the first surplus field is 'asleep'"):
        captions(folder, "image,caption\n000.png,a cat, asleep\n")


def test_captions_of_several_lines_and_inches(folder: Path) -> None:
    text = 'image,caption\n000.png,"a cat\nthat sleeps"\n001.png,a 12" disk\n'
    assert captions(folder, text) == ["a cat that sleeps", 'a 12" disk']


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{"file_name": "a.png", "label": "cat"}\n', "JSON"),
        (b"\xef\xbb\xbf \n[1]", "JSON"),
        (b"PK\x03\x04rest", "Excel workbook or a zip archive"),
        (b"\xd0\xcf\x11\xe0rest", "old Excel workbook"),
        (b"PAR1rest", "Parquet"),
        (b"\x1f\x8brest", "gzip"),
        (b"\xff\xd8\xff\xe0", "a JPEG image"),
        (b"a" * 257 + b"ustar", "tar archive"),
    ],
)
def test_files_of_other_formats_are_no_tables(tmp_path: Path, data: bytes, kind: str) -> None:
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(DataError, match=f"t.csv is no CSV table but .*{kind}"):
        read_table(tmp_path / "t.csv")


def test_addresses_are_no_paths(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\nhttps://example.org/a.jpg,cat\n")
    with pytest.raises(DataError, match=r"line 2: 'https://example.org/a.jpg' is an address"):
        load_dataset(f"csv:{tmp_path / 't.csv'}", "all")
