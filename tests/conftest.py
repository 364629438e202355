"""Shared fixtures: small random CLIPs that build in milliseconds and read words with CLIP's own tokenizer."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor

from tests.commands import Answer, Command
from vlprompt.backbones import Backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.tokenizer import TextTokenizer, wrap_tokenizer
from vlprompt.cli.app import main

SIZE = 32  # pixels

# What a shell starts with & ignores Ctrl-C, and so would every command that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _working_directory() -> Iterator[None]:
    """Fails a test that leaves the working directory changed: those after it would not find their files."""
    before = Path.cwd()
    yield
    after = Path.cwd()
    os.chdir(before)
    assert after == before, "the test left the working directory changed"


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """CLIP's byte pairs, from the files that open_clip ships."""
    return wrap_tokenizer(open_clip.SimpleTokenizer())


@pytest.fixture(scope="session")
def make_backbone(tokenizer: TextTokenizer) -> Callable[..., Backbone]:
    """Builder of small random backbones: 3 layers of width 64 on both sides, 32 px, joint dimension 48."""

    def make(
        text: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        *,
        custom: bool = False,
        seed: int = 0,
        **model: Any,
    ) -> Backbone:
        tower = {"layers": 3, "width": 64, "heads": 2, **(text or {})}
        visual = {
            "image_size": SIZE,
            "layers": 3,
            "width": 64,
            "head_width": 32,
            "patch_size": 8,
            **(vision or {}),
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built = (CustomTextCLIP if custom else CLIP)(48, visual, tower, **model)
            _spread(built)
        facts = {"architecture": "small", "pretrained": None}
        return wrap_open_clip(built, {"size": SIZE}, tokenizer, facts)

    return make


@pytest.fixture(scope="session")
def backbone(make_backbone: Callable[..., Backbone]) -> Backbone:
    """One small backbone for all tests. Nothing may change it."""
    return make_backbone()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``vlprompt`` in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # error messages are not wrapped

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Answer(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="session")
def images() -> Tensor:
    """(6, 3, 32, 32) noise."""
    return torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Work in one thread, as the processes of an executor do on a small machine: sums depend on the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _spread(model: torch.nn.Module) -> None:
    """Make words and blocks count: initial values let sentences nearly coincide and scaled layers do nothing."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_embedding" in name or name.endswith("positional_embedding"):
                parameter.mul_(10)
            elif name.endswith(".gamma"):
                parameter.fill_(0.5)
            elif name.endswith(".bias"):
                parameter.normal_(std=0.05)


def pytest_collection_finish() -> None:
    """Leave what is imported out of garbage collection: walking torch's objects takes longer than many a test."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Leave out what a file leaves behind, too: a million objects of compilers after the tests that compile."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
