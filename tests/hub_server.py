"""A server on this machine that speaks the Hub's API: files, new repositories, branches, commits, large files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import huggingface_hub.constants
import pytest

COMMIT = "a" * 40
TOKEN = "hf_of_the_owner"


@dataclass
class StoredRepository:
    """A repository.

    Attributes:
        commits: Folder of every commit.
        branches: Branch to commit.
        private: Whether a token is needed.
    """

    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False


class HubServer:
    """What the Hub answers.

    Attributes:
        folder: Where commits are kept.
        repositories: By name.
        status: Answer to every request, if not 0.
        cut: Files of which only half is sent.
        asked: Method and path of every request.
        open_to_all: Whether anyone may write; else whoever has :data:`TOKEN`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, StoredRepository] = {}
        self.status = 0
        self.cut: set[str] = set()
        self.asked: list[str] = []
        self.open_to_all = True
        self.address = ""
        self.large: dict[str, bytes] = {}

    def add(self, name: str, files: Path) -> None:
        """Make a repository of one commit, whose files are those of a folder at the time of asking."""
        self.repositories[name] = StoredRepository({COMMIT: files}, {"main": COMMIT})

    def commit(self, name: str, branch: str, files: dict[str, bytes]) -> str:
        """Add files to a branch."""
        repository = self.repositories[name]
        before = repository.commits.get(repository.branches.get(branch, ""))
        content = {path.name: path.read_bytes() for path in before.iterdir()} if before else {}
        content |= files

        count = sum(len(stored.commits) for stored in self.repositories.values())
        oid = hashlib.sha1(f"{name} {count}".encode()).hexdigest()
        repository.commits[oid] = self.folder / oid
        repository.commits[oid].mkdir(parents=True)
        for path, data in content.items():
            (repository.commits[oid] / path).write_bytes(data)
        repository.branches[branch] = oid
        return oid


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        self._file(body=True)

    def do_PUT(self) -> None:
        content = self._content()
        self.hub.asked.append(f"PUT {self.path}")
        self.hub.large[self.path.rpartition("/")[2]] = content
        self._send(200)

    def do_POST(self) -> None:
        content = self._content()
        path = unquote(self.path)
        self.hub.asked.append(f"POST {path}")
        if self.hub.status:
            return self._refuse(self.hub.status)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if not self.hub.open_to_all and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401)
        if path == "/api/repos/create":
            return self._create(json.loads(content))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._large_files(json.loads(content))

        owner, name, verb, revision = path.removeprefix("/api/models/").split("/", 3)
        repository = f"{owner}/{name}"
        if repository not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound")
        branches = self.hub.repositories[repository].branches
        if verb == "branch":
            if revision in branches:
                return self._refuse(409)
            branches[revision] = branches.get("main", "")
            return self._json({})
        if revision not in branches:
            return self._refuse(404, "RevisionNotFound")
        if verb == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(content)["files"]
            ]
            return self._json({"files": modes})

        files = {}
        for line in content.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.large[entry["value"]["oid"]]
        oid = self.hub.commit(repository, revision, files)
        return self._json(
            {"commitUrl": f"{self.hub.address}/{repository}/commit/{oid}", "commitOid": oid, "success": True}
        )

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._refuse(409, content={"url": f"{self.hub.address}/{name}"})
        is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repositories[name] = StoredRepository(private=is_private)
        self.hub.commit(name, "main", {})
        return self._json({"url": f"{self.hub.address}/{name}"})

    def _large_files(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                "oid": item["oid"],
                "size": item["size"],
                "actions": {"upload": {"href": f"{self.hub.address}/large/{item['oid']}"}},
            }
            for item in asked["objects"]
        ]
        return self._json({"transfer": "basic", "objects": objects})

    def _file(self, body: bool) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.hub.status:
            return self._refuse(self.hub.status, "RepoNotFound" if self.hub.status == 401 else "")

        name, _, rest = self.path.lstrip("/").partition("/resolve/")
        repository = self.hub.repositories.get(name)
        is_owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not is_owner):
            return self._refuse(404, "RepoNotFound")

        revision, _, file = rest.partition("/")
        oid = repository.branches.get(unquote(revision), revision)
        if oid not in repository.commits:
            return self._refuse(404, "RevisionNotFound")
        path = repository.commits[oid] / file
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", oid=oid)

        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", oid)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and file in self.hub.cut:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif body:
            self.wfile.write(content)
        return None

    def _content(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))

        chunks = b""
        while size := int(self.rfile.readline(), 16):
            chunks += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return chunks

    def _refuse(self, status: int, code: str = "", content: Any = None, oid: str = "") -> None:
        headers = {"X-Error-Code": code} if code else {}
        if oid:
            headers["X-Repo-Commit"] = oid
        self._send(status, json.dumps(content or {}).encode(), headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serve_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Run a Hub on this machine in the real one's place, with an empty cache, until the block ends."""
    hub = HubServer(tmp_path / "commits")
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    hub.address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    huggingface_hub.close_session()  # the client goes through the proxies that were set when it was made
    yield hub
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
