"""A small HTTP server on 127.0.0.1 that knows byte ranges, and misbehaves as it is told."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Site:
    """What is served, how, and what was asked for.

    Attributes:
        files: Path to bytes.
        cut_after: Bytes after which a connection is dropped, once per entry, in turn.
        ranges: Whether ranges are understood.
        stall: Seconds of silence before the body.
        asked: (path, first byte) of every request.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: list[int] = field(default_factory=list)
    ranges: bool = True
    stall: float = 0.0
    status: int = 0
    asked: list[tuple[str, int]] = field(default_factory=list)

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


@contextmanager
def serve() -> Iterator[Site]:
    """Run a site until the block ends."""
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _answer(self, site)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        site.address = f"http://127.0.0.1:{running.server_port}"
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield site
        running.shutdown()


def _answer(handler: http.server.BaseHTTPRequestHandler, site: Site) -> None:
    name = handler.path.lstrip("/")
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    first = int(asked[1]) if asked and site.ranges else 0
    site.asked.append((name, int(asked[1]) if asked else 0))
    if site.status or name not in site.files:
        handler.send_error(site.status or 404)
        return
    body = site.files[name]
    if asked and site.ranges and first >= len(body):
        handler.send_error(416)
        return
    handler.send_response(206 if asked and site.ranges else 200)
    if asked and site.ranges:
        handler.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
    handler.send_header("Content-Length", str(len(body) - first))
    handler.end_headers()
    time.sleep(site.stall)
    rest = body[first:]
    rest = rest[: site.cut_after.pop(0)] if site.cut_after else rest
    with contextlib.suppress(OSError):  # the client gave up, as some tests want it to
        handler.wfile.write(rest)
    handler.close_connection = True
