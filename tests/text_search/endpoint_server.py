"""A server on a real socket that speaks OpenAI's chat protocol, well or badly, as a test tells it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Endpoint:
    """What the server answers, one after the other, and what it was asked.

    A plan is a list of: text (the content of a good reply), a number (an HTTP status), ``"raw:..."`` (a body that is
    no completion), ``"slow"`` (nothing, for two seconds), ``"drip"`` (a byte now and then, for ever), ``"elsewhere"``
    (a redirection to itself) or ``"drop"`` (the connection is closed).
    """

    def __init__(self, plan: Sequence[str | int], usage: dict[str, int] | None) -> None:
        self.plan = list(plan)
        self.usage = usage
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""


@contextmanager
def serve(*plan: str | int, usage: dict[str, int] | None = None) -> Iterator[Endpoint]:
    endpoint = Endpoint(plan, usage)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            place = len(endpoint.bodies)
            endpoint.bodies.append(json.loads(body))
            endpoint.keys.append(self.headers.get("Authorization"))
            answer = endpoint.plan[min(place, len(endpoint.plan) - 1)]

            if answer == "slow":
                time.sleep(2)
                return
            if answer == "drip":
                with contextlib.suppress(OSError):  # until nobody reads any more
                    self._drip()
                return
            if answer == "elsewhere":
                self.send_response(307)
                self.send_header("Location", self.path)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if answer == "drop":
                self.connection.close()
                return
            if isinstance(answer, int):
                self._send(answer, json.dumps({"error": {"message": f"no, {endpoint.keys[-1]}"}}))
            elif answer.startswith("raw:"):
                self._send(200, answer.removeprefix("raw:"))
            else:
                self._send(200, json.dumps(_completion(answer, endpoint.usage)))

        def _drip(self) -> None:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            while True:
                self.wfile.write(b" ")
                time.sleep(0.02)

        def _send(self, status: int, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status in (429, 500, 503):
                self.send_header("retry-after-ms", "10")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Write nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _completion(content: str, usage: dict[str, int] | None) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        ],
    }
    if usage is not None:
        reply["usage"] = {**usage, "total_tokens": sum(usage.values())}
    return reply
