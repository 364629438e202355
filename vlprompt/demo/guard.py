"""Who may talk to the page, and what the page may load: in front of Gradio, for every request."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

__all__ = ["POLICY", "Guard", "is_loopback"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio writes and compiles scripts in the page
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
"""The browser loads and sends nothing elsewhere, whatever the page holds."""

_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)

# What the page needs of Gradio. The rest of its routes fetch, record or edit, and nobody here asks for that.
_PAGES = ("/", "/config", "/favicon.ico", "/manifest.json", "/robots.txt", "/theme.css")
_FOLDERS = ("/assets/", "/static/")
_CALLS = ("cancel", "file=", "heartbeat/", "info", "queue/", "reset", "startup-events", "theme.css", "upload")
_UPLOAD = "/gradio_api/upload"


class Guard:
    """Refuses requests that no page of ours sends, and tells the browser to load nothing from elsewhere.

    A page of another site must not be able to use this one through the browser of whoever runs it: the name that was
    asked for must be this machine's (a foreign name may lead to loopback), and a request that was sent by a page must
    come from this one.

    Args:
        app: What is guarded.
        names: Host names that are this machine; empty for any.
        upload_bytes: The largest request that uploads files.
    """

    def __init__(self, app: App, names: frozenset[str], upload_bytes: int) -> None:
        self.app = app
        self.names = names
        self.upload_bytes = upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over WebSockets
            await send({"type": "websocket.close", "code": 1008})
            return

        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(str(scope["path"]), str(scope["method"]), headers):
            status, reason = refusal
            await _answer(send, status, reason)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in _HEADERS}
                others = [pair for pair in message.get("headers", ()) if pair[0].lower() not in own]
                message["headers"] = [*others, *_HEADERS]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, path: str, method: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """Return the status and the sentence for a request that is refused."""
        host = headers.get(b"host", "")
        if self.names and _name_of(host) not in self.names:
            return 421, "This page answers under the names of this machine alone."

        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "This page takes no request from another one."

        if not _is_needed(path):
            return 404, "There is no such page."

        if path.rstrip("/") == _UPLOAD and method == "POST":
            length = headers.get(b"content-length", "")
            if not length.isdecimal():
                return 411, "An upload must say how long it is."
            if int(length) > self.upload_bytes:
                return 413, f"At most {self.upload_bytes / 1e6:.0f} MB can be uploaded at once."
        return None


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name_of(host: str) -> str:
    """Return the name or address in a ``Host`` header, without the port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_needed(path: str) -> bool:
    api = "/gradio_api/"
    if path.startswith(api):
        return path.removeprefix(api).startswith(_CALLS)
    return path in _PAGES or path.startswith(_FOLDERS)


async def _answer(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
