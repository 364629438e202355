"""``hf-hub:org/name`` and ``local-dir:PATH``: a folder, a cache, and a stand-in that speaks the Hub's API."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.backbones.architectures import SMALL_CONFIG
from tests.backbones.test_transformers_models import assert_equal, build, save
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.checkpoints.loading import build_model
from vlprompt.core.errors import BackboneError, ConfigError

REPO = "someone/model"
COMMIT = "a" * 40
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


class StandIn:
    """What the Hub answers.

    Attributes:
        folder: The files of the one repository.
        status: Answer to every request, if not 0.
        cut: Files of which only half is sent.
        asked: Paths that were asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status = 0
        self.cut: set[str] = set()
        self.asked: list[str] = []

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def log_message(self, *arguments: Any) -> None:
                pass

            def refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def answer(self, body: bool) -> None:
                hub.asked.append(self.path)
                prefix = f"/{REPO}/resolve/"
                if hub.status:
                    return self.refuse(hub.status, "RepoNotFound" if hub.status == 401 else "")
                if not self.path.startswith(prefix):
                    return self.refuse(404, "RepoNotFound")

                revision, _, name = self.path.removeprefix(prefix).partition("/")
                if revision not in ("main", COMMIT):
                    return self.refuse(404, "RevisionNotFound")
                file = hub.folder / name
                if not file.is_file():
                    return self.refuse(404, "EntryNotFound")

                content = file.read_bytes()
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if body:
                    self.wfile.write(content[: len(content) // 2] if name in hub.cut else content)
                return None

        return Handler


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A server on this machine in the Hub's place, and an empty cache."""
    stand_in = StandIn(repository)
    server = ThreadingHTTPServer(("127.0.0.1", 0), stand_in.handler())
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()

    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)

    yield stand_in
    server.shutdown()
    thread.join()
    server.server_close()


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
    hub: StandIn, repository: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = create_backbone(f"hf-hub:{REPO}")
    check(online, images, repository)
    assert any(path.endswith("open_clip_model.safetensors") for path in hub.asked)

    asked = len(hub.asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = create_backbone(f"hf-hub:{REPO}")
    assert offline.fingerprint == online.fingerprint
    assert len(hub.asked) == asked


def test_a_revision_and_a_cache_of_ones_own(hub: StandIn, tmp_path: Path) -> None:
    cache = tmp_path / "mine"
    backbone = create_backbone(f"hf-hub:{REPO}@{COMMIT}", cache_dir=str(cache))
    assert backbone.fingerprint["activation"] == "quickgelu"
    assert (cache / "models--someone--model" / "snapshots" / COMMIT / "open_clip_config.json").is_file()
    with pytest.raises(BackboneError, match="there is no revision 'v9'"):
        create_backbone(f"hf-hub:{REPO}@v9")


def test_transformers_models_on_the_hub(hub: StandIn, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    model = build("clip")
    save(model, folder, max_shard_size="100KB")
    hub.folder = folder
    assert_equal(create_backbone(f"hf-hub:{REPO}"), model)


def test_a_repository_that_is_not_open(hub: StandIn) -> None:
    hub.status = 401
    with pytest.raises(BackboneError, match=r"not open to everyone \(401\).*hf auth login.*local-dir:PATH"):
        create_backbone(f"hf-hub:{REPO}")
    hub.status = 0
    with pytest.raises(BackboneError, match="there is no such repository"):
        create_backbone("hf-hub:someone/other")
    with pytest.raises(BackboneError, match="a name on the Hub looks like org/name"):
        create_backbone("hf-hub:a/b/c")


def test_weights_that_are_not_there_are_never_replaced_by_random_ones(hub: StandIn) -> None:
    (hub.folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"has no weights: none of open_clip_model\.safetensors"):
        create_backbone(f"hf-hub:{REPO}")
    (hub.folder / "open_clip_config.json").unlink()
    with pytest.raises(BackboneError, match=r"has no card: none of open_clip_config\.json"):
        create_backbone(f"hf-hub:{REPO}")


def test_half_a_file(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits before it tries again
    hub.cut = {"open_clip_model.safetensors"}
    with pytest.raises(
        BackboneError, match=r"open_clip_model\.safetensors of hf-hub:someone/model could not be fetched"
    ):
        create_backbone(f"hf-hub:{REPO}")

    hub.cut = set()
    assert create_backbone(f"hf-hub:{REPO}").fingerprint["activation"] == "quickgelu"


def test_without_a_network_and_without_a_copy(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
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
