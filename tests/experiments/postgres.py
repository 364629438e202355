"""A PostgreSQL server in a temporary folder, where one is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_DEBIAN = Path("/usr/lib/postgresql")
_NOBODY = "nobody"  # a server refuses to run as root


@contextmanager
def postgres_server() -> Iterator[str]:
    """Start a server of its own and yield the address of its database; skip the test where none is installed."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed")

    with tempfile.TemporaryDirectory(prefix="vlprompt-postgres-") as name:
        folder = Path(name)
        user = _user(folder)
        data = folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]

        def call(program: str, *arguments: str) -> None:
            subprocess.run(
                [str(programs / program), *arguments],
                check=True,
                user=user,
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stdin=subprocess.DEVNULL,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            )

        call("initdb", "-D", str(data), "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync")
        settings = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        call("pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", settings, "start")
        try:
            yield f"postgresql+psycopg://tester@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")


def _programs() -> Path | None:
    """Return the folder of initdb and pg_ctl: on the path, or where Debian puts them."""
    on_path = shutil.which("pg_ctl")
    if on_path is not None:
        return Path(on_path).parent
    versions = sorted(_DEBIAN.glob("*/bin/pg_ctl"))
    return versions[-1].parent if versions else None


def _user(folder: Path) -> int | None:
    """Return the user that the server runs as, who owns the folder; None for the one of the tests."""
    if os.getuid() != 0:
        return None
    nobody = pwd.getpwnam(_NOBODY)
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    return nobody.pw_uid
