"""A saved prompt of every kind of backbone is usable again, from another folder, by the commands alone."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import vlprompt
from tests.backbones.architectures import SMALL_CONFIG, architecture, tags
from tests.commands import Command
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import CheckpointError
from vlprompt.saved.weight_masks import fold, read_masks

SMALL = "saved-of-vlprompt"
NAMES = ["circle", "square"]


@pytest.fixture(scope="module", autouse=True)
def small_architecture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with architecture(tmp_path_factory.mktemp("configs"), SMALL, SMALL_CONFIG):
        yield


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with weights of the small architecture."""
    folder = tmp_path / "work"
    (folder / "weights").mkdir(parents=True)
    state = create_backbone(SMALL, seed=3).model.state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "weights" / "small.safetensors")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    Image.new("RGB", (40, 30), "white").save(folder / "a.png")
    return folder


def _masked() -> Backbone:
    learner = vlprompt.create_learner("amt", create_backbone("tiny"), NAMES)
    vlprompt.save(learner, "masks")
    return fold(learner.backbone, read_masks("masks", learner.backbone))


def _tagged() -> Backbone:
    with tags(SMALL, first={"quick_gelu": True}, second={"resize_mode": "squash"}):
        return create_backbone(SMALL, "weights/small.safetensors", weights_of="second")


def _carded(folder: str = "card") -> Backbone:
    Path(folder).mkdir()
    shutil.copy("weights/small.safetensors", folder)
    (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL_CONFIG}))
    return create_backbone(f"local-dir:{folder}")


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "tiny": lambda: create_backbone("tiny"),
    "tiny_squashed": lambda: create_backbone("tiny", resize="squash"),
    "tiny_random": lambda: create_backbone("tiny", "random", seed=4),
    "random": lambda: create_backbone(SMALL, seed=9),
    "squashed": lambda: create_backbone(SMALL, resize="squash", quick_gelu=True),
    "prepared": lambda: create_backbone(
        SMALL, preprocess={"mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    ),
    "relative": lambda: create_backbone(SMALL, "weights/small.safetensors", quick_gelu=True),
    "folder": lambda: create_backbone(SMALL, "weights"),
    "part": lambda: create_backbone(SMALL, "weights/small.safetensors", logit_scale=30, resize="longest"),
    "cache_dir": lambda: create_backbone(SMALL, "weights/small.safetensors", cache_dir="cache"),
    "tag": _tagged,
    "local_dir": _carded,
    "masks": _masked,
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_it_is_usable_from_another_folder(
    kind: str, work: Path, elsewhere: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    backbone = BACKBONES[kind]()
    learner = vlprompt.create_learner("coop", backbone, NAMES, context_length=2)
    image = Image.open(elsewhere / "a.png")
    expected = learner(backbone.preprocess(image)[None])
    vlprompt.save(learner, "prompt")

    monkeypatch.chdir(elsewhere)
    loaded = vlprompt.load(work / "prompt")
    assert loaded.backbone.fingerprint["id"] == backbone.fingerprint["id"]
    assert torch.equal(loaded(loaded.backbone.preprocess(image)[None]), expected)

    answer = command("predict", work / "prompt", "a.png")
    assert answer.status == 0, answer.err

    # What was loaded is saved with all that is needed to load it again.
    vlprompt.save(loaded, "again")
    assert vlprompt.load("again").backbone.fingerprint["id"] == backbone.fingerprint["id"]


def _saved(kind: str) -> None:
    vlprompt.save(vlprompt.create_learner("coop", BACKBONES[kind](), NAMES, context_length=2), "prompt")


@pytest.mark.parametrize("kind", ["relative", "local_dir", "masks"])
def test_a_folder_that_was_moved_as_a_whole(
    kind: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(kind)
    monkeypatch.chdir(tmp_path)
    work.rename(tmp_path / "moved")
    assert list(vlprompt.load(tmp_path / "moved" / "prompt").classnames) == NAMES


def test_weights_that_lie_near_the_prompt_are_known_by_their_hash(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved("relative")
    other = create_backbone(SMALL, seed=5).model.state_dict()
    weights = work / "weights" / "small.safetensors"
    weights.rename(work / "small.safetensors")
    save_file({n: t.contiguous() for n, t in other.items()}, weights)  # another file in the old place
    monkeypatch.chdir(tmp_path)
    assert vlprompt.load(work / "prompt").backbone.origin["pretrained"] == str(work / "small.safetensors")

    (work / "small.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"trained on another backbone.*\n.*weights: saved"):
        vlprompt.load(work / "prompt")


def test_weights_that_are_nowhere_can_be_named(
    work: Path, elsewhere: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    _saved("relative")
    shutil.move(work / "weights" / "small.safetensors", elsewhere / "moved.safetensors")
    monkeypatch.chdir(elsewhere)

    answer = command("predict", work / "prompt", "a.png")
    assert answer.status == 2
    assert "--backbone pretrained=PATH" in answer.err
    assert str(work / "weights" / "small.safetensors") in answer.err

    answer = command("predict", work / "prompt", "a.png", "--backbone", "pretrained=moved.safetensors")
    assert answer.status == 0, answer.err
    loaded = vlprompt.load(work / "prompt", {"pretrained": "moved.safetensors"})
    assert loaded.backbone.fingerprint["activation"] == "quickgelu"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("pretrainde=x", "did you mean 'pretrained'"),
        ("quick_gelu=maybe", "backbone.quick_gelu"),
        ("pretrained=no.ckpt", "no weights file at"),
        ("resize=squash", "preprocess: saved"),
    ],
)
def test_bad_changes(work: Path, elsewhere: Path, command: Command, word: str, message: str) -> None:
    _saved_in(work)
    answer = command("predict", work / "prompt", elsewhere / "a.png", "--backbone", word)
    assert answer.status == 2
    assert message in answer.err


def _saved_in(work: Path) -> None:
    backbone = create_backbone(SMALL, str(work / "weights" / "small.safetensors"))
    vlprompt.save(vlprompt.create_learner("coop", backbone, NAMES, context_length=2), work / "prompt")


@pytest.mark.parametrize("words", [("predict", "a.png"), ("evaluate", "--data", "digits"), ("masks",)])
def test_every_command_that_loads_takes_it(
    work: Path, elsewhere: Path, command: Command, words: tuple[str, ...]
) -> None:
    _saved_in(work)
    answer = command(words[0], work / "prompt", *words[1:], "--backbone", "pretrained=no.ckpt")
    assert answer.status == 2
    assert "no.ckpt" in answer.err


@pytest.mark.parametrize("words", [("scan",), ("segment", "predict"), ("segment", "evaluate"), ("predict",),
                                   ("evaluate",), ("masks",)])  # fmt: skip
def test_help_names_it(words: tuple[str, ...], command: Command) -> None:
    assert "--backbone" in command(*words, "--help").out


def test_what_no_file_can_name_is_asked_for(work: Path) -> None:
    model = open_clip.create_model(SMALL)
    built = create_backbone(model, architecture=SMALL)
    vlprompt.save(vlprompt.create_learner("coop", built, NAMES, context_length=2), "prompt")
    with pytest.raises(CheckpointError, match=r"built by hand.*backbone=create_backbone\(model"):
        vlprompt.load("prompt")
    assert list(vlprompt.load("prompt", built).classnames) == NAMES

    torch.save(model.state_dict(), "w.pt")
    assert list(vlprompt.load("prompt", {"name": SMALL, "pretrained": "w.pt"}).classnames) == NAMES

    mine = create_backbone(SMALL, tokenizer=open_clip.SimpleTokenizer())
    vlprompt.save(vlprompt.create_learner("coop", mine, NAMES, context_length=2), "prompt")
    with pytest.raises(CheckpointError, match="tokenizer that no file can name"):
        vlprompt.load("prompt")


@pytest.mark.parametrize("kind", ["squashed", "tiny"])
def test_cards_of_older_versions(work: Path, kind: str) -> None:
    """They have a fingerprint alone; the preprocessing and the activation in it count."""
    _saved(kind)
    from vlprompt.core.files import read_tensors, write_tensors

    tensors, metadata = read_tensors(Path("prompt/prompt.safetensors"))
    del metadata["card"]["origin"]
    write_tensors(Path("prompt/prompt.safetensors"), tensors, metadata)
    Path("prompt/prompt.json").write_text(json.dumps(metadata["card"]))
    fingerprint = vlprompt.load("prompt").backbone.fingerprint
    assert fingerprint["id"] == metadata["card"]["backbone"]["id"]


@pytest.mark.parametrize(
    "origin",
    [{"name": 3}, {"name": "tiny", "relative": 5}, {"name": "tiny", "unsaved": 7}, {"name": "tiny", "sead": 1},
     {"name": "tiny", "preprocess": "x"}, {"name": "local-dir:/no/where"}, {"name": "tiny", "masks": 7},
     {"name": "ViT-S-32", "pretrained": "/no/file.pt"}, {"name": "tiny", "seed": "x"}, []],
)  # fmt: skip
def test_hostile_origins(work: Path, origin: Any) -> None:
    _saved("tiny")
    from vlprompt.core.errors import VLPromptError
    from vlprompt.core.files import read_tensors, write_tensors

    tensors, metadata = read_tensors(Path("prompt/prompt.safetensors"))
    metadata["card"]["origin"] = origin
    write_tensors(Path("prompt/prompt.safetensors"), tensors, metadata)
    Path("prompt/prompt.json").write_text(json.dumps(metadata["card"]))
    with contextlib.suppress(VLPromptError):
        assert list(vlprompt.load("prompt").classnames) == NAMES
