"""What was saved comes back to the last bit; what is damaged, hostile or another backbone's is refused by name."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlprompt import create_learner, load, save
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.core.errors import CheckpointError, ConfigError, UnknownNameError, VLPromptError
from vlprompt.learners import LEARNERS, Learner

ROOT = Path(__file__).parents[2]
NAMES = ("dog", "red circle", "hummingbird")


def trained(name: str, backbone: Backbone, images: Tensor, **options: Any) -> Learner:
    """A learner whose values are not those it starts with."""
    learner = create_learner(name, backbone, NAMES, ("art of the {}.",), **options)
    if learner.prepares:
        learner.prepare(backbone.image_embeddings(images)[None], torch.tensor([0, 1, 2, 0, 1, 2]))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return learner.eval()


@pytest.fixture
def learner(backbone: Backbone, images: Tensor) -> Learner:
    return trained("coop", backbone, images, context_length=4, position="middle")


@pytest.fixture
def saved(learner: Learner, tmp_path: Path) -> Path:
    return save(learner, tmp_path / "prompt")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the card in both places it is kept, leaving the tensors alone."""
    card = json.loads((folder / "prompt.json").read_text())
    changed = change(card) or card
    (folder / "prompt.json").write_text(json.dumps(changed))
    tensors, _ = contents(folder)
    save_file(tensors, folder / "prompt.safetensors", {"card": json.dumps(changed)})


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(str(folder / "prompt.safetensors"), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("name", LEARNERS.names())
def test_every_learner_comes_back_to_the_last_bit(
    name: str, backbone: Backbone, images: Tensor, tmp_path: Path
) -> None:
    learner = trained(name, backbone, images)
    assert save(learner, tmp_path / "new" / "prompt", {"val/accuracy": 0.5}) == tmp_path / "new" / "prompt"
    loaded = load(tmp_path / "new" / "prompt", backbone)
    assert type(loaded) is type(learner)
    assert (loaded.classnames, loaded.templates) == (learner.classnames, learner.templates)
    assert (loaded.method, loaded.options) == (name, learner.options)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images), learner(images))


def test_options_travel(learner: Learner, saved: Path, backbone: Backbone, images: Tensor) -> None:
    loaded = load(saved, backbone)
    assert loaded.options == {"context_length": 4, "position": "middle"}
    assert loaded.layout.sentences == learner.layout.sentences
    other = loaded.with_classes(["tulip", "dog"])
    with torch.no_grad():
        assert torch.equal(other(images), learner.with_classes(["tulip", "dog"])(images))


def test_the_card_says_everything_and_the_tensors_are_only_what_was_learned(
    learner: Learner, saved: Path, backbone: Backbone
) -> None:
    card = json.loads((saved / "prompt.json").read_text())
    assert card["method"] == "coop"
    assert card["backbone"] == backbone.fingerprint
    assert card["classnames"] == list(NAMES)
    assert card["templates"] == ["art of the {}."]
    assert set(contents(saved)[0]) == {"context"}
    assert sorted(p.name for p in saved.iterdir()) == ["prompt.json", "prompt.safetensors"]


def test_saving_over_an_older_one(learner: Learner, saved: Path, backbone: Backbone, images: Tensor) -> None:
    other = trained("linear_probe", backbone, images)
    save(other, saved)
    loaded = load(saved, backbone)
    with torch.no_grad():
        assert torch.equal(loaded(images), other(images))


def test_a_backbone_is_built_from_its_name(tmp_path: Path, images: Tensor) -> None:
    backbone = create_backbone("tiny", "random")
    larger = torch.nn.functional.interpolate(images, 64)
    learner = trained("coop", backbone, larger)
    with torch.no_grad():
        loaded = load(save(learner, tmp_path))
        assert loaded.backbone is not backbone
        assert torch.equal(loaded(larger), learner(larger))
    other = create_backbone("tiny", "random", seed=1)
    with pytest.raises(CheckpointError, match=r"another backbone.*\n  - weights: saved '\w+', given '\w+'$"):
        load(tmp_path, other)


def test_another_backbone_is_refused_field_by_field(
    saved: Path, backbone: Backbone, make_backbone: Callable[..., Backbone]
) -> None:
    others = {
        "weights": make_backbone(seed=1),
        "activation": make_backbone(quick_gelu=True),
        "preprocess": wrap_open_clip(
            backbone.model,
            {"size": 32, "interpolation": "bilinear"},
            backbone.text.tokenizer,
            {"architecture": "small", "pretrained": None},
        ),
        "architecture": wrap_open_clip(
            backbone.model,
            {"size": 32},
            backbone.text.tokenizer,
            {"architecture": "large", "pretrained": None},
        ),
    }
    for field, other in others.items():
        with pytest.raises(CheckpointError, match="trained on another backbone") as caught:
            load(saved, other)
        named = [line.split(":")[0].strip(" -") for line in str(caught.value).splitlines()[1:]]
        assert named == [field]


def test_the_place_of_the_weights_does_not_matter(
    saved: Path, backbone: Backbone, learner: Learner, images: Tensor
) -> None:
    facts = {"architecture": "small", "pretrained": "elsewhere/weights.safetensors"}
    moved = wrap_open_clip(backbone.model, {"size": 32}, backbone.text.tokenizer, facts)
    with torch.no_grad():
        assert torch.equal(load(saved, moved)(images), learner(images))


@pytest.mark.parametrize("cut", [0, 7, 100, -4])
def test_truncated_tensors(saved: Path, backbone: Backbone, cut: int) -> None:
    path = saved / "prompt.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"prompt\.safetensors is not a readable safetensors file"):
        load(saved, backbone)


def test_one_flipped_bit(saved: Path, backbone: Backbone) -> None:
    path = saved / "prompt.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its own checksum"):
        load(saved, backbone)


def test_swapped_tensors(saved: Path, backbone: Backbone) -> None:
    tensors, _ = contents(saved)
    save_file({"context": tensors["context"] + 1}, saved / "prompt.safetensors")
    with pytest.raises(CheckpointError, match="does not match its own checksum"):
        load(saved, backbone)


def test_missing_files(
    saved: Path, backbone: Backbone, learner: Learner, images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no such file: .*nowhere.prompt\.safetensors"):
        load(tmp_path / "nowhere", backbone)
    (saved / "prompt.json").unlink()
    with torch.no_grad():  # the tensors carry the card as well
        assert torch.equal(load(saved, backbone)(images), learner(images))
    save_file(contents(saved)[0], saved / "prompt.safetensors")
    with pytest.raises(CheckpointError, match=r"no such file: .*prompt\.json"):
        load(saved, backbone)


HOSTILE: dict[str, tuple[type[VLPromptError], str, Callable[[dict[str, Any]], Any]]] = {
    "extra key": (CheckpointError, "run_me: unknown key", lambda c: {**c, "run_me": "rm"}),
    "missing key": (CheckpointError, "classnames: required", lambda c: c.pop("classnames") and None),
    "wrong type": (
        CheckpointError,
        "classnames: input should be a valid list",
        lambda c: {**c, "classnames": "ab"},
    ),
    "wrong items": (CheckpointError, r"classnames\.0: ", lambda c: {**c, "classnames": [1] * 20_000}),
    "long value": (CheckpointError, "format: ", lambda c: {**c, "format": "9" * 1_000_000}),
    "not a card": (CheckpointError, "not a prompt card of ours", lambda c: [c]),
    "newer": (CheckpointError, "was written by a newer vlprompt", lambda c: {**c, "format": 99}),
    "unknown method": (
        UnknownNameError,
        "unknown learner 'cop'. Did you mean 'coop'",
        lambda c: {**c, "method": "cop"},
    ),
    "module as method": (
        UnknownNameError,
        "unknown learner 'os.system'",
        lambda c: {**c, "method": "os.system"},
    ),
    "unknown option": (ConfigError, "shell: unknown key", lambda c: {**c, "options": {"shell": "rm"}}),
    "bad option": (ConfigError, "context_length: ", lambda c: {**c, "options": {"context_length": 10**9}}),
    "reserved option": (
        CheckpointError,
        "'backbone' is no option",
        lambda c: {**c, "options": {"backbone": "x"}},
    ),
    "other context": (
        CheckpointError,
        "context has shape",
        lambda c: {**c, "options": {"context_length": 5}},
    ),
    "format codes": (VLPromptError, "exactly one {}", lambda c: {**c, "templates": ["{:>9999999999}"]}),
    "no templates": (VLPromptError, "at least one template", lambda c: {**c, "templates": []}),
    "one class": (VLPromptError, "at least two classes", lambda c: {**c, "classnames": ["dog"]}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_cards_are_refused_in_a_short_sentence(saved: Path, backbone: Backbone, what: str) -> None:
    error, message, change = HOSTILE[what]
    edit(saved, change)
    with pytest.raises(error, match=message) as caught:
        load(saved, backbone)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00\xff", "null", "prompt"], ids=range(6))
def test_files_that_are_no_card(saved: Path, backbone: Backbone, text: str) -> None:
    (saved / "prompt.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"prompt\.json"):
        load(saved, backbone)


def test_a_bottomless_card_among_the_tensors(saved: Path, backbone: Backbone) -> None:
    save_file(contents(saved)[0], saved / "prompt.safetensors", {"card": "[" * 100_000})
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(saved, backbone)


@pytest.mark.parametrize(
    "backbone_card", [{}, {"architecture": None}, {"architecture": "tiny", "pretrained": 5}]
)
def test_a_backbone_that_can_not_be_built(saved: Path, backbone_card: dict[str, Any]) -> None:
    edit(saved, lambda card: {**card, "backbone": backbone_card})
    with pytest.raises(CheckpointError, match="names no backbone that can be built"):
        load(saved)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the kernel refuse to write a file beyond ``size`` bytes, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_old_artefact(
    learner: Learner, saved: Path, backbone: Backbone, images: Tensor
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = trained("coop", backbone, images, context_length=16)
    with (
        files_of_at_most(2000),
        pytest.raises(CheckpointError, match=r"could not write .*prompt\.safetensors"),
    ):
        save(other, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    save(other, saved)
    with torch.no_grad():
        assert torch.equal(load(saved, backbone)(images), other(images))


def test_a_folder_that_can_not_be_made(learner: Learner, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"could not write .*file.prompt.*Not a directory"):
        save(learner, tmp_path / "file" / "prompt")


FULL_DISK = """
import sys
from pathlib import Path
import torch
from vlprompt import create_backbone, create_learner, load, save
from vlprompt.core.errors import CheckpointError
disk = Path(sys.argv[1])
backbone = create_backbone("tiny", "random")
old = create_learner("coop", backbone, ["dog", "cat"], context_length=4)
save(old, disk / "prompt")
filling = (disk / "filling").open("wb", buffering=0)
try:
    while filling.write(bytes(4096)):
        pass
except OSError:
    pass
try:
    save(create_learner("coop", backbone, ["dog", "cat"], seed=2, context_length=64), disk / "prompt")
except CheckpointError as error:
    print(error)
left = sorted(path.name for path in (disk / "prompt").iterdir())
assert left == ["prompt.json", "prompt.safetensors"], left
assert torch.equal(load(disk / "prompt", backbone).context, old.context)
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs Linux's unshare")
def test_a_full_disk_leaves_the_old_artefact(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    alone = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*alone, mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*alone, f'{mount} && "$0" -c "$1" {tmp_path}', sys.executable, FULL_DISK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prompt.safetensors: No space left on device. The old file is kept." in done.stdout


def save_and_die(learner: Learner, folder: Path, at: str) -> int:
    """Save in a forked process that kills itself before it renames a file over ``at``; return its signal."""
    child = os.fork()
    if not child:

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "os.rename" and Path(arguments[1]).name == at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        save(learner, folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("at", ["prompt.safetensors", "prompt.json"])
def test_killed_while_saving_it_is_the_old_or_the_new_one(
    learner: Learner, saved: Path, backbone: Backbone, images: Tensor, at: str
) -> None:
    new = trained("coop", backbone, images, context_length=16, seed=4)
    assert save_and_die(new, saved, at) == -signal.SIGKILL
    expected = learner if at == "prompt.safetensors" else new
    with torch.no_grad():
        assert torch.equal(load(saved, backbone)(images), expected(images))
    save(new, saved)
    with torch.no_grad():
        assert torch.equal(load(saved, backbone)(images), new(images))
