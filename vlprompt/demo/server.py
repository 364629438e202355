"""Serving the page until Ctrl-C."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import fastapi
import gradio as gr
import uvicorn

from vlprompt.core.errors import VLPromptError
from vlprompt.demo.guard import Guard, is_loopback
from vlprompt.demo.limits import Limits
from vlprompt.demo.page import CSS, TEXTS, THEME

__all__ = ["listen", "serve"]

_GRACE = 1  # seconds that open connections have at the end; the page holds one for ever


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: A name or an address of this machine.
        port: 0 takes a free one.

    Raises:
        VLPromptError: If it can't be had; says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # where it would let two servers have one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        raise VLPromptError(
            f"can't listen on {host}, port {port}: {error.strerror or error}. --port 0 takes a free port."
        ) from None
    return listening


def serve(
    page: gr.Blocks,
    listening: socket.socket,
    host: str,
    limits: Limits,
    files: Path,
    say: Callable[[str], None],
) -> None:
    """Serve the page until the process is told to end.

    Args:
        page: See :func:`vlprompt.demo.page.build_page`.
        listening: See :func:`listen`.
        host: What it listens on, as the user wrote it.
        limits: Of uploads.
        files: A folder of this page's own files, which it may show.
        say: Called with the address as soon as the page can be opened.
    """
    port = listening.getsockname()[1]
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        server_name=host,
        server_port=port,
        allowed_paths=[str(files)],
        max_file_size=limits.megabytes * 1_000_000,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        i18n=TEXTS,
        theme=THEME,
        css_paths=CSS,
    )
    # On loopback the page has three names; elsewhere nobody here knows all names of the machine.
    names = frozenset(("localhost", "127.0.0.1", "::1", host)) if is_loopback(host) else frozenset[str]()
    guarded = Guard(app, names, limits.upload_bytes)

    config = uvicorn.Config(
        guarded, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=_GRACE
    )
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{port}")
    uvicorn.Server(config).run(sockets=[listening])
