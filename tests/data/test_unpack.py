from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from vlprompt.core.errors import DataError
from vlprompt.data.unpack import unpack
from vlprompt.data.zipped import ZipReader


def tar_of(path: Path, *members: tuple[str, object]) -> Path:
    """Write a tar; a member's content is bytes, or the fields of a TarInfo."""
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
                continue
            for key, value in dict(content).items():  # type: ignore[call-overload]
                setattr(info, key, value)
            archive.addfile(info)
    return path


def everything(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_tar(tmp_path: Path, name: str) -> None:
    link = {"type": tarfile.SYMTYPE, "linkname": "../x/1.jpg"}
    archive = tar_of(tmp_path / name, ("data/x/1.jpg", b"one"), ("data/y/2.jpg", link))
    unpack(archive, tmp_path / "out")
    assert (tmp_path / "out" / "data" / "y" / "2.jpg").read_bytes() == b"one"


def test_zip_and_gz(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("2750/Forest/Forest_1.jpg", b"one")
        archive.mkdir("2750/River") if hasattr(archive, "mkdir") else archive.writestr("2750/River/", b"")
    unpack(tmp_path / "a.zip", tmp_path / "out")
    (tmp_path / "y.h5.gz").write_bytes(gzip.compress(b"labels"))
    unpack(tmp_path / "y.h5.gz", tmp_path / "out")
    assert (tmp_path / "out" / "2750" / "Forest" / "Forest_1.jpg").read_bytes() == b"one"
    assert (tmp_path / "out" / "y.h5").read_bytes() == b"labels"


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("../evil", b"x"),
        ("a/../../evil", b"x"),
        ("/tmp/evil", b"x"),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "/etc"}),
        ("a/link", {"type": tarfile.SYMTYPE, "linkname": "../../evil"}),
        ("hard", {"type": tarfile.LNKTYPE, "linkname": "../evil"}),
        ("device", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}),
        ("pipe", {"type": tarfile.FIFOTYPE}),
    ],
)
def test_tar_members_that_leave_are_refused(tmp_path: Path, member: str, content: object) -> None:
    archive = tar_of(tmp_path / "a.tar", ("good.jpg", b"one"), (member, content))
    with pytest.raises(DataError, match="refused"):
        unpack(archive, tmp_path / "in" / "out")
    assert everything(tmp_path / "in") == ["out"]  # nothing was written, neither in the folder nor beside it


def test_a_file_behind_a_link_that_an_earlier_member_made(tmp_path: Path) -> None:
    """Two links, each inside on paper, that lead out together; and one that existed before."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").symlink_to(outside)
    archive = tar_of(tmp_path / "a.tar", ("old/evil.txt", b"x"))
    with pytest.raises(DataError, match="behind a link that leaves the folder"):
        unpack(archive, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("old/evil.txt", b"x")
    with pytest.raises(DataError, match="behind a link that leaves the folder"):
        unpack(tmp_path / "a.zip", tmp_path / "out")
    steps = {"type": tarfile.SYMTYPE, "linkname": "."}
    further = {"type": tarfile.SYMTYPE, "linkname": "a/b/c/../../.."}
    archive = tar_of(tmp_path / "b.tar", ("a/b/c", steps), ("d", further), ("d/../evil.txt", b"x"))
    with pytest.raises(DataError, match="refused"):
        unpack(archive, tmp_path / "new" / "out")
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "new" / "evil.txt").exists()


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil", "C:\\evil"])
def test_zip_members_that_leave_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.jpg", b"one")
        archive.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(DataError, match="leaves the folder: refused, nothing was unpacked"):
        unpack(tmp_path / "a.zip", tmp_path / "in" / "out")
    assert everything(tmp_path / "in") == ["out"]


def test_zip_links_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="the link 'link': refused"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.zip", "a.gz"])
def test_damaged_archives_are_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b not an archive")
    with pytest.raises(DataError, match=r"the archive .* is damaged"):
        unpack(tmp_path / name, tmp_path / "out")


def test_a_truncated_archive(tmp_path: Path) -> None:
    archive = tar_of(tmp_path / "a.tar.gz", ("a.bin", bytes(range(256)) * 4000))
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(DataError, match="is damaged"):
        unpack(archive, tmp_path / "out")


def test_unknown_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match="no archive of a known kind"):
        unpack(tmp_path / "a.rar", tmp_path / "out")


def test_a_zip_in_a_way_of_packing_that_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", b"x" * 100)
    path.write_bytes(_with_method(path.read_bytes(), 9))  # Deflate64, as Windows packs large files
    with pytest.raises(DataError, match=r"can't be unpacked here: .*Pack it anew"):
        unpack(path, tmp_path / "out")

    reader = ZipReader(tmp_path)
    assert "can't read 'a.png'" in reader.check("a.zip@a.png")
    with pytest.raises(DataError, match=r"can't read 'a\.png' of .*a\.zip"):
        reader.read("a.zip@a.png")


@pytest.mark.parametrize("flag", [1, 0x800])
def test_damaged_members_of_a_zip_are_named(tmp_path: Path, flag: int) -> None:
    """Encrypted, or with a name that is no UTF-8 though the archive says so."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("\xe9.png", b"x" * 100)
    data = path.read_bytes().replace("\xe9".encode(), b"\xff\xff")
    for start, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.index(start) + place
        data = data[:at] + flag.to_bytes(2, "little") + data[at + 2 :]
    path.write_bytes(data)

    with pytest.raises(DataError, match=r"a\.zip"):
        unpack(path, tmp_path / "out")
    with pytest.raises(DataError, match=r"a\.zip"):
        _read_all(ZipReader(tmp_path), "a.zip")


def test_a_member_of_gigabytes_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.png", b"x" * 1000)
    data = path.read_bytes()
    at = data.index(b"PK\x01\x02") + 24
    path.write_bytes(data[:at] + (1 << 31).to_bytes(4, "little") + data[at + 4 :])
    assert "2,147,483,648 bytes: no image" in ZipReader(tmp_path).check("a.zip@a.png")


def _read_all(reader: ZipReader, archive: str) -> None:
    for name in reader.members(archive):
        reader.read(f"{archive}@{name}")


def _with_method(data: bytes, method: int) -> bytes:
    """Return a zip that says another way of packing, in both headers of its member."""
    for start, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.index(start) + place
        data = data[:at] + method.to_bytes(2, "little") + data[at + 2 :]
    return data


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", {"type": tarfile.SYMTYPE, "linkname": "a.png"})], "leads to itself: refused"),
        (
            [
                ("a.png", {"type": tarfile.SYMTYPE, "linkname": "b.png"}),
                ("b.png", {"type": tarfile.SYMTYPE, "linkname": "a.png"}),
            ],
            "leads to itself: refused",
        ),
        ([("a.png", {"type": tarfile.LNKTYPE, "linkname": "nothing.png"})], "is damaged.*nothing.png"),
        ([("a.png", {"type": tarfile.LNKTYPE, "linkname": "a.png"})], "is damaged.*a.png"),
    ],
)
def test_links_that_lead_nowhere_are_one_sentence(
    tmp_path: Path, members: list[tuple[str, object]], reason: str
) -> None:
    archive = tar_of(tmp_path / "a.tar", ("good.jpg", b"one"), *members)
    with pytest.raises(DataError, match=reason):
        unpack(archive, tmp_path / "out")
