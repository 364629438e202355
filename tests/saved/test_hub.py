"""Prompts on the Hub: pushed to a server on this machine that speaks its API, and loaded again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

import vlprompt
from tests.backbones.architectures import SMALL_CONFIG, architecture
from tests.hub_server import TOKEN, HubServer, serve_hub
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import read_tensors
from vlprompt.learners import Learner, create_learner
from vlprompt.saved.hub import push
from vlprompt.saved.paths import find_prompts, prompt_folder
from vlprompt.saved.prompts import save

REPO = "someone/flowers"
SMALL = "pushed-of-vlprompt"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve_hub(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def learner() -> Learner:
    learner = create_learner(
        "coop", create_backbone("tiny"), classnames=["rose | thorn", "<b>tulip</b>"], context_length=2
    )
    for parameter in learner.learned_parameters().values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    return learner.eval()


@pytest.fixture
def prompt(learner: Learner, tmp_path: Path) -> Path:
    return save(learner, tmp_path / "prompt", {"accuracy": 0.75}, {"data": "flowers", "shots": 16, "seed": 1})


def latest(hub: HubServer) -> Path:
    """Return the folder of the last commit of the main branch."""
    repository = hub.repositories[REPO]
    return repository.commits[repository.branches["main"]]


def test_what_is_pushed_is_what_is_loaded(hub: HubServer, prompt: Path, learner: Learner) -> None:
    name = push(prompt, REPO, licence="mit")
    assert name.startswith(f"{REPO}@")
    assert any(request.startswith("PUT /large/") for request in hub.asked)  # tensors go as large files

    images = torch.rand(3, 3, *learner.backbone.image_size)
    for place in (REPO, name, f"hf-hub:{REPO}", f"hf-hub:{name}"):
        again = vlprompt.load(place)
        assert torch.equal(again(images), learner(images))
    assert find_prompts([REPO]) == [str(prompt_folder(REPO))]


def test_the_cache_serves_without_a_network(
    hub: HubServer, prompt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(prompt, REPO)
    vlprompt.load(REPO)
    asked = len(hub.asked)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert vlprompt.load(REPO).method == "coop"
    assert len(hub.asked) == asked
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        push(prompt, REPO)
    with pytest.raises(CheckpointError, match=r"no folder 'some/other' here; .*the cache has no copy"):
        vlprompt.load("some/other")


def test_a_commit_stays_what_it_was(hub: HubServer, prompt: Path, learner: Learner) -> None:
    first = push(prompt, REPO)
    before = learner.trainable_state()["context"].clone()
    with torch.no_grad():
        next(iter(learner.learned_parameters().values())).add_(1.0)
    save(learner, prompt)
    second = push(prompt, REPO)

    assert first != second
    assert torch.equal(vlprompt.load(first).trainable_state()["context"], before)
    assert torch.equal(vlprompt.load(second).trainable_state()["context"], before + 1)


def test_a_branch(hub: HubServer, prompt: Path) -> None:
    push(prompt, REPO)
    push(prompt, REPO, revision="better")
    push(prompt, REPO, revision="better")  # one that is there
    assert vlprompt.load(f"{REPO}@better").method == "coop"
    with pytest.raises(CheckpointError, match="there is no revision 'best'"):
        vlprompt.load(f"{REPO}@best")


def test_a_private_repository(
    hub: HubServer, prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.open_to_all = False
    with pytest.raises(CheckpointError, match=r"not logged in.*\(401\).*hf auth login.*HF_TOKEN"):
        push(prompt, REPO, private=True)

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push(prompt, REPO, private=True)
    assert hub.repositories[REPO].private
    assert vlprompt.load(REPO).method == "coop"

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(CheckpointError, match="there is no such repository, or it is not open to everyone"):
        vlprompt.load(REPO)


def test_the_card_says_what_is_known_and_breaks_nothing(hub: HubServer, prompt: Path) -> None:
    push(prompt, REPO, licence="cc-by-4.0")
    text = (latest(hub) / "README.md").read_text()

    header = text.split("---")[1]
    assert "license: cc-by-4.0" in header
    assert "library_name: vlprompt" in header
    assert "pipeline_tag: zero-shot-image-classification" in header
    assert "[arXiv 2109.01134](https://arxiv.org/abs/2109.01134)" in text
    assert "| data | flowers |" in text
    assert "| accuracy | 0.75 |" in text
    assert f'vlprompt.load("{REPO}")' in text
    assert "rose \\| thorn, &lt;b>tulip&lt;/b>" in text


def test_a_model_card_that_a_person_wrote_is_kept(hub: HubServer, prompt: Path) -> None:
    push(prompt, REPO)
    hub.commit(REPO, "main", {"README.md": b"My own words."})
    push(prompt, REPO)
    assert (latest(hub) / "README.md").read_bytes() == b"My own words."


def test_no_folder_of_this_machine_is_published(hub: HubServer, tmp_path: Path) -> None:
    private = tmp_path / "secret project"
    private.mkdir()
    weights = private / "weights.safetensors"
    (tmp_path / "configs").mkdir()
    with architecture(tmp_path / "configs", SMALL, SMALL_CONFIG):
        state = create_backbone(SMALL, seed=3).model.state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
        backbone = create_backbone(SMALL, str(weights), quick_gelu=True)
        _check_publishing(hub, backbone, weights, tmp_path)


def _check_publishing(hub: HubServer, backbone: Backbone, weights: Path, tmp_path: Path) -> None:
    prompt = save(create_learner("zero_shot", backbone, classnames=["a", "b"]), tmp_path / "prompt")
    assert "secret project" in (prompt / "prompt.json").read_text()

    push(prompt, REPO)
    commit = latest(hub)
    for path in commit.iterdir():
        assert b"secret project" not in path.read_bytes(), path.name
    _, metadata = read_tensors(commit / "prompt.safetensors")
    assert metadata["card"] == json.loads((commit / "prompt.json").read_text())

    with pytest.raises(CheckpointError, match="--backbone pretrained=PATH"):
        vlprompt.load(REPO)
    assert vlprompt.load(REPO, {"pretrained": str(weights)}).method == "zero_shot"


def test_failures_are_sentences(hub: HubServer, prompt: Path) -> None:
    with pytest.raises(CheckpointError, match="a name on the Hub looks like user/name"):
        push(prompt, "a/b/c")
    with pytest.raises(CheckpointError, match="no saved prompt at"):
        push(prompt.parent / "nothing", REPO)

    hub.status = 500
    with pytest.raises(CheckpointError, match=f"hf-hub:{REPO} could not be pushed to"):
        push(prompt, REPO)
    hub.status = 0

    push(prompt, REPO)
    hub.add("someone/weights", prompt.parent)
    with pytest.raises(
        CheckpointError, match=r"holds no saved prompt.*create_backbone\('hf-hub:someone/weights'\)"
    ):
        vlprompt.load("someone/weights")


def test_half_a_file_is_no_prompt(hub: HubServer, prompt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(prompt, REPO)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
    hub.cut = {"prompt.safetensors"}
    with pytest.raises(
        CheckpointError, match=r"prompt\.safetensors of hf-hub:someone/flowers could not be fetched"
    ):
        vlprompt.load(REPO)
    hub.cut = set()
    assert vlprompt.load(REPO).method == "coop"


def test_a_folder_comes_before_the_hub(
    hub: HubServer, prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone").mkdir()
    prompt.rename(tmp_path / "someone" / "flowers")
    assert vlprompt.load(REPO).method == "coop"
    assert hub.asked == []
    with pytest.raises(CheckpointError, match="there is no such repository"):
        vlprompt.load(f"hf-hub:{REPO}")
