from __future__ import annotations

import hashlib
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.serving import Site, serve
from vlprompt.core.errors import DataError
from vlprompt.data import download as module
from vlprompt.data.checksums import checksum, matches
from vlprompt.data.download import download

BODY = bytes(range(256)) * 40000  # 10 MB, several blocks
SHA = f"sha256:{hashlib.sha256(BODY).hexdigest()}"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve() as running:
        running.files["a.zip"] = BODY
        yield running


def test_a_file_arrives_and_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int | None]] = []
    path = download([site.url("a.zip")], tmp_path / "in" / "a.zip", SHA, progress=lambda *s: steps.append(s))
    assert path.read_bytes() == BODY
    assert steps[-1] == ("a.zip", len(BODY), len(BODY))
    assert [s[1] for s in steps] == sorted(s[1] for s in steps)
    download([site.url("a.zip")], path, SHA)
    assert len(site.asked) == 1
    assert [p.name for p in path.parent.iterdir()] == ["a.zip"]


def test_a_dropped_connection_is_continued_where_it_ended(site: Site, tmp_path: Path) -> None:
    site.cut_after = [3_000_000, 2_000_000]
    path = download([site.url("a.zip")], tmp_path / "a.zip", SHA)
    assert path.read_bytes() == BODY
    assert site.asked == [("a.zip", 0), ("a.zip", 3_000_000), ("a.zip", 5_000_000)]


def test_a_killed_download_is_continued_by_the_next(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(BODY[:4_000_000])
    assert download([site.url("a.zip")], tmp_path / "a.zip", SHA).read_bytes() == BODY
    assert site.asked == [("a.zip", 4_000_000)]
    assert not (tmp_path / "a.zip.part").exists()


def test_what_was_whole_but_not_yet_renamed_is_only_checked(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(BODY)
    assert download([site.url("a.zip")], tmp_path / "a.zip", SHA).read_bytes() == BODY


def test_a_first_half_of_another_version_is_fetched_anew(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(b"x" * 4_000_000)
    assert download([site.url("a.zip")], tmp_path / "a.zip", SHA).read_bytes() == BODY
    assert site.asked == [("a.zip", 4_000_000), ("a.zip", 0)]


def test_a_place_without_ranges_sends_all_again(site: Site, tmp_path: Path) -> None:
    site.ranges, site.cut_after = False, [3_000_000]
    assert download([site.url("a.zip")], tmp_path / "a.zip", SHA).read_bytes() == BODY
    assert [first for _, first in site.asked] == [0, 3_000_000]


def test_a_wrong_checksum_is_refused_and_nothing_kept(site: Site, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a\.zip could not be fetched.*wrong checksum sha256:.*the file was removed"
    ):
        download([site.url("a.zip")], tmp_path / "a.zip", "sha256:" + "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_another_file_in_its_place_is_left_alone(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_text("mine")
    with pytest.raises(DataError, match=r"is not the file that is expected .*Move it away"):
        download([site.url("a.zip")], tmp_path / "a.zip", SHA)
    assert (tmp_path / "a.zip").read_text() == "mine"
    assert site.asked == []


def test_the_next_place_is_tried(site: Site, tmp_path: Path) -> None:
    site.files["bad.zip"] = b"<html>please log in</html>"
    path = download([site.url("gone.zip"), site.url("bad.zip"), site.url("a.zip")], tmp_path / "a.zip", SHA)
    assert path.read_bytes() == BODY
    with pytest.raises(DataError, match=r"gone\.zip: HTTP 404 Not Found; .*bad\.zip: wrong checksum"):
        download([site.url("gone.zip"), site.url("bad.zip")], tmp_path / "b.zip", SHA)


def test_a_silent_place_times_out(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.stall = 3.0
    monkeypatch.setattr(module, "_RETRIES", 1)
    with pytest.raises(DataError, match="timed out"):
        download([site.url("a.zip")], tmp_path / "a.zip", SHA, timeout=0.3)


def test_a_place_in_trouble_is_asked_again_then_given_up(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    site.status = 503
    with pytest.raises(DataError, match="HTTP 503"):
        download([site.url("a.zip")], tmp_path / "a.zip", SHA)
    assert len(site.asked) == 4


def test_a_disk_that_is_too_small_is_noticed_first(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**7, 9 * 10**6, 10**6))
    with pytest.raises(DataError, match=r"0\.0 GB free, a\.zip\.part needs 0\.0 GB more"):
        download([site.url("a.zip")], tmp_path / "a.zip", SHA)


def test_checksums_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "hello.txt"
    path.write_bytes(b"hello\n")
    assert (
        checksum(path, "git") == "git:ce013625030ba8dba906f756967f9e9ca394464a"
    )  # what git hash-object says
    assert checksum(path, "md5") == "md5:b1946ac92492d2347c6235b4d2611184"
    assert matches(path, "sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03")
    assert not matches(path, "sha256:" + "0" * 64)
    assert matches(path, None)
