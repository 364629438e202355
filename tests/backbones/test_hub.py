"""``hf-hub:org/name`` and ``local-dir:PATH``: a folder, a cache, and a stand-in that speaks the Hub's API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.backbones.architectures import SMALL_CONFIG
from tests.backbones.test_transformers_models import assert_equal, build, save
from tests.hub_server import COMMIT, HubServer, serve_hub
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.checkpoints.loading import build_model
from vlprompt.core.errors import BackboneError, ConfigError

REPO = "someone/model"
CARD = {
    "model_cfg": {**SMALL_CONFIG, "quick_gelu": True},
    "preprocess_cfg": {
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
        "interpolation": "bilinear",
        "resize_mode": "squash",
    },
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The files of a model that open_clip pushed to the Hub."""
    folder = tmp_path / "repository"
    folder.mkdir()
    torch.manual_seed(7)
    state = build_model(CARD["model_cfg"]).state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(CARD))
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server on this machine in the Hub's place, with the repository, and an empty cache."""
    with serve_hub(tmp_path, monkeypatch) as server:
        server.add(REPO, repository)
        yield server


def check(backbone: Backbone, images: Tensor, folder: Path) -> None:
    """Compare with what open_clip builds of the same folder."""
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        expected = model.encode_image(images, normalize=True)
        rows = open_clip.get_tokenizer(f"local-dir:{folder}")(["a dog"])
        words = model.encode_text(rows, normalize=True)
    torch.testing.assert_close(backbone.encode_image(images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(backbone.encode_text(["a dog"]), words, rtol=0, atol=1e-5)
    image = Image.new("RGB", (40, 60), (10, 200, 90))
    assert torch.equal(backbone.preprocess(image), preprocess(image))
    assert backbone.fingerprint["activation"] == "quickgelu"


def test_a_local_folder(repository: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = create_backbone(f"local-dir:{repository}")
    check(backbone, images, repository)
    assert backbone.origin == {"name": f"local-dir:{repository}"}

    monkeypatch.setenv("HOME", str(repository.parent))
    monkeypatch.chdir(repository)
    for name in ("local-dir:~/repository", "local-dir:."):
        again = create_backbone(name, resize="longest")
        assert again.fingerprint["weights"] == backbone.fingerprint["weights"]
        assert again.origin["name"] == f"local-dir:{repository}"


def test_folders_that_are_none(repository: Path) -> None:
    with pytest.raises(BackboneError, match=r"no such folder: no/where"):
        create_backbone("local-dir:no/where")
    with pytest.raises(ConfigError, match="brings its own weights; leave 'openai' out"):
        create_backbone(f"local-dir:{repository}", "openai")

    (repository / "open_clip_config.json").unlink()
    with pytest.raises(BackboneError, match=r"no open_clip_config\.json.*Name the architecture"):
        create_backbone(f"local-dir:{repository}")
    (repository / "open_clip_model.safetensors").unlink()
    with pytest.raises(BackboneError, match="no weights file at"):
        create_backbone(f"local-dir:{repository}")


def test_the_hub_and_then_its_cache_alone(
    hub: HubServer, repository: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = create_backbone(f"hf-hub:{REPO}")
    check(online, images, repository)
    assert any(path.endswith("open_clip_model.safetensors") for path in hub.asked)

    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = create_backbone(f"hf-hub:{REPO}")
    assert offline.fingerprint == online.fingerprint
    assert len(hub.asked) == asked


def test_a_revision_and_a_cache_of_ones_own(hub: HubServer, tmp_path: Path) -> None:
    cache = tmp_path / "mine"
    backbone = create_backbone(f"hf-hub:{REPO}@{COMMIT}", cache_dir=str(cache))
    assert backbone.fingerprint["activation"] == "quickgelu"
    assert (cache / "models--someone--model" / "snapshots" / COMMIT / "open_clip_config.json").is_file()
    with pytest.raises(BackboneError, match="there is no revision 'v9'"):
        create_backbone(f"hf-hub:{REPO}@v9")


def test_transformers_models_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    model = build("clip")
    save(model, folder, max_shard_size="100KB")
    hub.add(REPO, folder)
    assert_equal(create_backbone(f"hf-hub:{REPO}"), model)


def test_a_repository_that_is_not_open(hub: HubServer) -> None:
    hub.status = 401
    with pytest.raises(BackboneError, match=r"not open to everyone \(401\).*hf auth login.*local-dir:PATH"):
        create_backbone(f"hf-hub:{REPO}")
    hub.status = 0
    with pytest.raises(BackboneError, match="there is no such repository"):
        create_backbone("hf-hub:someone/other")
    with pytest.raises(BackboneError, match="a name on the Hub looks like org/name"):
        create_backbone("hf-hub:a/b/c")


def test_weights_that_are_not_there_are_never_replaced_by_random_ones(
    hub: HubServer, repository: Path
) -> None:
    (repository / "open_clip_model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"has no weights: none of open_clip_model\.safetensors"):
        create_backbone(f"hf-hub:{REPO}")
    (repository / "open_clip_config.json").unlink()
    with pytest.raises(BackboneError, match=r"has no card: none of open_clip_config\.json"):
        create_backbone(f"hf-hub:{REPO}")


def test_half_a_file(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
    hub.cut = {"open_clip_model.safetensors"}
    with pytest.raises(
        BackboneError, match=r"open_clip_model\.safetensors of hf-hub:someone/model could not be fetched"
    ):
        create_backbone(f"hf-hub:{REPO}")

    hub.cut = set()
    assert create_backbone(f"hf-hub:{REPO}").fingerprint["activation"] == "quickgelu"


def test_without_a_network_and_without_a_copy(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        BackboneError, match=r"can't be reached, and the cache has no copy.*create_backbone\('tiny'\)"
    ):
        create_backbone(f"hf-hub:{REPO}")
    assert hub.asked == []


@pytest.mark.parametrize(
    "task", ["classification/quickstart.yaml", "adaptation/tta_tiny.yaml", "segmentation/tunevlseg_tiny.yaml"]
)
def test_configurations_take_these_names(task: str, tmp_path: Path) -> None:
    from vlprompt.experiments.tasks import read_experiment

    for name in (f"hf-hub:{REPO}", f"local-dir:{tmp_path}/nowhere"):
        experiment = read_experiment(task, [f"backbone.name={name}"])
        assert any(name.partition(":")[2] in sentence for sentence in experiment.missing())
