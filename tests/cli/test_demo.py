"""``vlprompt demo``: what it says before a page is served. The page itself: tests/demo/test_page.py."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.commands import Command


def test_without_gradio_it_says_how_to_install_it(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    answer = command("demo")
    assert answer.status == 2
    assert answer.err.count("\n") == 1
    assert answer.err.startswith("error: the page needs gradio (")
    assert answer.err.endswith("pip install 'vlprompt[demo]'.\n")


def test_mistakes_are_messages(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the page is an extra")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for words, message in (
            (("--folder", "nowhere"), "--folder: there is no folder nowhere"),
            (("nowhere",), "no saved prompt at 'nowhere'"),
            (("--backbone", "name=tinny"), "Did you mean 'tiny'"),
            (("--class", "circle"), "at least two classes"),
            (("--port", port), f"can't listen on 127.0.0.1, port {port}: "),
            (("--host", "no.such.host.invalid"), "can't listen on no.such.host.invalid"),
        ):
            answer = command("demo", *words)
            assert answer.status == 2, words
            assert message in answer.err, answer.err
            assert answer.out == ""
    assert list(tmp_path.iterdir()) == []
