"""The guard refuses what no page of ours sends, and the browser is told to load nothing from elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from vlprompt.demo.guard import Guard, is_loopback

NAMES = frozenset(("localhost", "127.0.0.1", "::1"))
HERE = {"host": "127.0.0.1:7860"}
Message = MutableMapping[str, Any]


async def page(scope: Message, receive: Any, send: Any) -> None:
    """A page that answers everything, with headers that are weaker than the guard's."""
    headers = [(b"content-type", b"text/html"), (b"content-security-policy", b"default-src *")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


def ask(
    path: str, headers: dict[str, str], method: str = "GET", names: frozenset[str] = NAMES, kind: str = "http"
) -> list[Message]:
    """Return what a guarded page sends back."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    scope = {
        "type": kind,
        "path": path,
        "method": method,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(Guard(page, names, 1000)(scope, receive, send))
    return sent


def status(*arguments: Any, **keywords: Any) -> int:
    return int(ask(*arguments, **keywords)[0]["status"])


def test_a_page_of_ours_is_answered_under_every_name_of_this_machine() -> None:
    for host in ("127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860"):
        assert status("/", {"host": host}) == 200, host
    assert status("/", {"host": "192.0.2.1:7860"}, names=frozenset()) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "[", "10.0.0.1"]
)
def test_a_foreign_name_that_leads_here_is_refused(host: str) -> None:
    assert status("/", {"host": host}) == 421
    assert status("/config", {}) == 421


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:9999", "https://127.0.0.1"]
)
def test_another_page_may_ask_for_nothing(origin: str) -> None:
    for names in (NAMES, frozenset[str]()):
        answer = ask("/gradio_api/queue/join", {**HERE, "origin": origin}, "POST", names)
        assert answer[0]["status"] == 403
        assert b"no request from another" in answer[1]["body"]


def test_the_page_itself_may_ask() -> None:
    own = {**HERE, "origin": "http://127.0.0.1:7860"}
    assert status("/gradio_api/queue/join", own, "POST") == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://example.org/x",
        "/gradio_api/vibe-edit/",
        "/gradio_api/run/predict",
        "/gradio_api/runs",
        "/monitoring",
        "/docs",
        "/openapi.json",
        "/gradio_api/mcp/",
        "/gradio_api/deep_link",
    ],
)
def test_what_the_page_does_not_need_is_not_there(path: str) -> None:
    assert status(path, HERE) == 404
    assert status(path, HERE, "POST") == 404


def test_an_upload_says_how_long_it_is_and_is_not_longer_than_it_may_be() -> None:
    for path in ("/gradio_api/upload", "/gradio_api/upload/"):
        assert status(path, {**HERE, "content-length": "1000"}, "POST") == 200
        assert status(path, {**HERE, "content-length": "1001"}, "POST") == 413
        assert status(path, {**HERE, "content-length": "-1"}, "POST") == 411
        assert status(path, HERE, "POST") == 411


@pytest.mark.parametrize("path", ["/", "/gradio_api/proxy=x"])
def test_every_answer_tells_the_browser_to_load_nothing_from_elsewhere(path: str) -> None:
    headers = ask(path, HERE)[0]["headers"]
    policies = [value.decode() for name, value in headers if name == b"content-security-policy"]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'self'")
    assert "http" not in policies[0]
    assert "*" not in policies[0]
    assert (b"x-content-type-options", b"nosniff") in headers


def test_nobody_speaks_over_websockets() -> None:
    assert ask("/", HERE, kind="websocket") == [{"type": "websocket.close", "code": 1008}]


def test_what_is_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.4", "example.org", ""))
