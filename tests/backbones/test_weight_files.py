"""Every file of weights that people own: what wraps them, what layout they are in, and what does not fit."""

from __future__ import annotations

import io
import json
import logging
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.backbones.architectures import SMALL_CONFIG, architecture
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.checkpoints import WeightsError
from vlprompt.backbones.checkpoints.archive import is_archive, read_archive
from vlprompt.core.errors import BackboneError

SMALL = "files-of-vlprompt"
State = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def small_architecture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with architecture(tmp_path_factory.mktemp("configs"), SMALL, SMALL_CONFIG):
        yield


@pytest.fixture(scope="module")
def small(small_architecture: None) -> Backbone:
    return create_backbone(SMALL, seed=3, logit_scale=20)


@pytest.fixture
def state(small: Backbone) -> State:
    return {name: tensor.clone() for name, tensor in small.model.state_dict().items()}


def _prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


WRAPPERS: dict[str, Callable[[State], Any]] = {
    "trainer": lambda s: {
        "epoch": 3,
        "name": "run",
        "state_dict": _prefixed(s, "module."),
        "optimizer": {"state": {}},
    },
    "compiled": lambda s: {"state_dict": _prefixed(s, "_orig_mod.")},
    "compiled_parts": lambda s: {n.replace("visual.", "visual._orig_mod."): t for n, t in s.items()},
    "distributed_compiled": lambda s: _prefixed(s, "module._orig_mod."),
    "model_prefix": lambda s: _prefixed(s, "model."),
    "deep_prefix": lambda s: _prefixed(s, "module.model.clip."),
    "model": lambda s: {"model": s, "epoch": 1},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": 0.1},
    "nested": lambda s: {"state": 1, "model": {"state_dict": s}},
    "half": lambda s: {n: t.half() if t.is_floating_point() else t for n, t in s.items()},
}


@pytest.mark.parametrize("form", WRAPPERS)
def test_what_wraps_weights(small: Backbone, state: State, tmp_path: Path, images: Tensor, form: str) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save(WRAPPERS[form](state), path)
    loaded = create_backbone(SMALL, str(path))
    atol = 1e-2 if form == "half" else 0
    torch.testing.assert_close(loaded.encode_image(images), small.encode_image(images), rtol=0, atol=atol)
    torch.testing.assert_close(loaded.encode_text(["a dog"]), small.encode_text(["a dog"]), rtol=0, atol=atol)
    assert loaded.logit_scale == pytest.approx(small.logit_scale, rel=1e-3)


def test_parts_of_a_sharded_file_and_folders(small: Backbone, state: State, tmp_path: Path) -> None:
    names = sorted(state)
    shards = {"model-1-of-2.safetensors": names[:9], "model-2-of-2.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({n: state[n].contiguous() for n in part}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {n: file for file, part in shards.items() for n in part}}))

    for path in (index, tmp_path):
        assert create_backbone(SMALL, str(path)).fingerprint["id"] == small.fingerprint["id"]

    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"2 parts, of which 1 are missing: model-2-of-2\.safetensors"):
        create_backbone(SMALL, str(tmp_path))


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/weights.safetensors", 5])
def test_an_index_names_files_beside_it_alone(tmp_path: Path, name: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BackboneError, match="no index of weights"):
        create_backbone(SMALL, str(tmp_path))


def test_folders_that_are_not_clear(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"holds none of open_clip_model\.safetensors"):
        create_backbone(SMALL, str(tmp_path))
    for epoch in (1, 2):
        (tmp_path / f"epoch_{epoch}.pt").touch()
    with pytest.raises(BackboneError, match=r"2 files of weights \(epoch_1\.pt, epoch_2\.pt\); name one"):
        create_backbone(SMALL, str(tmp_path))


def test_a_home_folder(
    state: State, small: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(state, tmp_path / "w.pt")
    assert create_backbone(SMALL, "~/w.pt").fingerprint["id"] == small.fingerprint["id"]
    for missing in ("~/no.ckpt", "no.ckpt", "epoch_3.pt", "./here", "some/where"):
        with pytest.raises(BackboneError, match="no such file or folder"):
            create_backbone(SMALL, missing)


def test_a_file_of_several_models(small: Backbone, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    other = {name: tensor + 1 for name, tensor in state.items()}

    torch.save({"model": state, "state_dict": other}, path)
    with pytest.raises(BackboneError, match=r"several models: 'state_dict', 'model'.*part='state_dict'"):
        create_backbone(SMALL, str(path))
    assert create_backbone(SMALL, str(path), part="model").fingerprint["id"] == small.fingerprint["id"]

    torch.save({"model": other, "model_ema": state}, path)
    assert create_backbone(SMALL, str(path), part="model_ema").fingerprint["id"] == small.fingerprint["id"]

    torch.save({**_prefixed(other, "teacher."), **_prefixed(state, "student.")}, path)
    with pytest.raises(BackboneError, match=r"several models: 'student\.', 'teacher\.'"):
        create_backbone(SMALL, str(path))
    loaded = create_backbone(SMALL, str(path), part="student", leave_out=["teacher"])
    assert loaded.fingerprint["id"] == small.fingerprint["id"]
    with pytest.raises(BackboneError, match=r"nothing in it is called 'pupil'.*'student\.'"):
        create_backbone(SMALL, str(path), part="pupil")


def test_an_extra_head_is_left_out_when_asked_alone(small: Backbone, state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({**state, "head.weight": torch.ones(3, 24), "head.bias": torch.ones(3)}, path)
    with pytest.raises(BackboneError) as caught:
        create_backbone(SMALL, str(path))
    message = str(caught.value)
    assert "2 unexpected (head.weight, head.bias)" in message
    assert "leave_out=['head'] in Python, backbone.leave_out=[head] in a configuration" in message

    assert create_backbone(SMALL, str(path), leave_out=["head"]).fingerprint["id"] == small.fingerprint["id"]
    with pytest.raises(BackboneError, match="nothing in it is called 'heads'"):
        create_backbone(SMALL, str(path), leave_out=["heads"])


def test_weights_without_a_scale(
    small: Backbone, state: State, tmp_path: Path, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pt"
    del state["logit_scale"]
    torch.save(state, path)
    with caplog.at_level(logging.WARNING, logger="vlprompt.backbones"):
        loaded = create_backbone(SMALL, str(path))
    assert "no logit_scale" in caplog.text
    assert torch.equal(loaded.encode_image(images), small.encode_image(images))
    assert create_backbone(SMALL, str(path), logit_scale=50).logit_scale == pytest.approx(50, rel=1e-5)


def test_what_does_not_fit_is_listed(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    broken = {n: t for n, t in state.items() if not n.startswith("transformer.resblocks.1")}
    broken["ln_final.weight"] = torch.ones(48)
    broken["extra"] = torch.ones(1)
    torch.save(broken, path)
    with pytest.raises(BackboneError) as caught:
        create_backbone(SMALL, str(path))
    message = str(caught.value)
    assert "12 missing (transformer.resblocks.1.ln_1.weight" in message
    assert "and 2 more" in message
    assert "1 unexpected (extra)" in message
    assert "1 of another shape (ln_final.weight is (48,), not (32,))" in message


def test_the_length_of_a_text_belongs_to_the_weights(state: State, tmp_path: Path) -> None:
    state["positional_embedding"] = torch.randn(120, 32)
    torch.save(state, tmp_path / "long.pt")
    backbone = create_backbone(SMALL, str(tmp_path / "long.pt"))
    assert backbone.text.context_length == 120
    long = backbone.encode_text(["a dog " * 45, "a dog " * 50])
    assert not torch.allclose(long[0], long[1])


# TorchScript archives, such as OpenAI published CLIP in.


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _modules(state: State) -> nn.Module:
    """Return a tree of modules that holds tensors under their names, as OpenAI's model does."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(tensor.half()))
    return root


class Published(nn.Module):
    """A model with OpenAI's names, half precision, and its settings among the buffers."""

    def __init__(self, state: State, quick: bool) -> None:
        super().__init__()
        for name, child in _modules(state).named_children():
            self.add_module(name, child)
        for name in ("positional_embedding", "text_projection", "logit_scale"):
            self.register_parameter(name, nn.Parameter(state[name].half()))
        for name, value in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(value))
        self.activation = Quick() if quick else nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x)


@pytest.mark.parametrize("kind", ["script", "trace"])
@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_openais_archives(
    state: State, small: Backbone, tmp_path: Path, images: Tensor, kind: str, quick: bool
) -> None:
    model = Published(state, quick)
    built = torch.jit.script(model) if kind == "script" else torch.jit.trace(model, torch.randn(3))
    path = tmp_path / "weights.pt"
    built.save(str(path))

    loaded = create_backbone(SMALL, str(path))
    assert loaded.fingerprint["activation"] == ("quickgelu" if quick else "gelu")
    torch.testing.assert_close(
        loaded.model.visual.conv1.weight, small.model.visual.conv1.weight.half().float(), rtol=0, atol=0
    )
    if not quick:
        torch.testing.assert_close(loaded.encode_image(images), small.encode_image(images), rtol=0, atol=1e-2)


class Recorder:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (self.marker,)


def _archive(path: Path, description: bytes, records: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", description)
        file.writestr("a/constants.pkl", b"\x80\x02).")
        file.writestr("a/code/__torch__.py", "class A(Module): pass")
        for name, content in (records or {}).items():
            file.writestr(name, content)
    return path


def _module(attributes: bytes) -> bytes:
    """Return the description of one module with attributes, as TorchScript writes it."""
    return b"\x80\x02c__torch__\nA\n)\x81}(" + attributes + b"ub."


def _name(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _tensor(count: int, offset: int, size: int, stride: int, key: str = "0") -> bytes:
    storage = b"(" + _name("storage") + b"ctorch\nFloatStorage\n" + _name(key) + _name("cpu")
    storage += b"J" + count.to_bytes(4, "little", signed=True) + b"tQ"
    numbers = b"J" + offset.to_bytes(4, "little", signed=True)
    numbers += (
        b"(J"
        + size.to_bytes(4, "little", signed=True)
        + b"t(J"
        + stride.to_bytes(4, "little", signed=True)
        + b"t"
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def test_a_tensor_is_read_from_bytes_that_were_written_by_hand(tmp_path: Path) -> None:
    numbers = torch.arange(6.0).numpy().tobytes()
    path = _archive(tmp_path / "a.pt", _module(_name("w") + _tensor(6, 1, 2, 3)), {"a/data/0": numbers})
    assert is_archive(path)
    assert read_archive(path).tensors["w"].tolist() == [1.0, 4.0]


@pytest.mark.parametrize(
    "tensor", [_tensor(6, 0, 7, 1), _tensor(6, 5, 2, 3), _tensor(6, -1, 2, 1), _tensor(6, 0, 2, -1),
               _tensor(9, 0, 2, 1), _tensor(-6, 0, 2, 1), _tensor(6, 0, 2, 1, "1"), _tensor(6, 0, 2, 1, "../data.pkl")]
)  # fmt: skip
def test_tensors_that_reach_beyond_their_numbers(tmp_path: Path, tensor: bytes) -> None:
    path = _archive(tmp_path / "a.pt", _module(_name("w") + tensor), {"a/data/0": bytes(24)})
    with pytest.raises(WeightsError):
        read_archive(path)


HOSTILE = {
    "global": b"cos\nsystem\n(" + _name("true") + b"tR.",
    "builtins": b"cbuiltins\neval\n(" + _name("1") + b"tR.",
    "inside": _module(_name("w") + b"cos\nmkdir\n(" + _name("x") + b"tR"),
    "getattr": _module(_name("w") + b"cbuiltins\ngetattr\n(ctorch\nFloatStorage\n" + _name("x") + b"tR"),
    "torch_load": _module(_name("w") + b"ctorch\nload\n(" + _name("x") + b"tR"),
    "torch_name": _module(_name("w") + b"ctorch.serialization\nload\n(" + _name("x") + b"tR"),
    "dunder": b"c__torch__.os\nsystem\n(" + _name("true") + b"tR.",
    "reduce_module": b"c__torch__\nA\n(" + _name("x") + b"tR.",
    "build_tensor": _module(_name("w") + _tensor(6, 0, 2, 1) + b"}" + _name("__class__") + b"Nsb"),
    "slots": b"c__torch__\nA\n)\x81N}" + _name("values") + b"Ns\x86b.",
    "extension": b"\x80\x02\x82\x01.",
    "no_module": b"\x80\x02N.",
    "empty": b"",
    "no_stop": b"\x80\x02N",
    "deep": b"\x80\x02" + b"(" * 100_000 + b".",
    "storage_name": _module(_name("w") + b"(" + _name("storage") + b"ctorch\nStorage\n" + _name("0") + b"NK\x01tQ"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives_are_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = _archive(tmp_path / "a.pt", HOSTILE[name], {"a/data/0": bytes(24)})
    with pytest.raises(BackboneError, match=r"a\.pt can't be loaded into files-of-vlprompt"):
        create_backbone(SMALL, str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_code_in_an_archive_never_runs(tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    path = _archive(tmp_path / "a.pt", pickle.dumps(Recorder(marker), protocol=2))
    with pytest.raises(BackboneError, match="it holds more than plain tensors"):
        create_backbone(SMALL, str(path))
    assert not marker.exists()


def test_a_damaged_archive(state: State, tmp_path: Path) -> None:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as file:
        file.writestr("a/data.pkl", _module(_name("w") + _tensor(6, 0, 2, 1)))
        file.writestr("a/constants.pkl", b"")
        file.writestr("a/data/0", bytes(24))
    path = tmp_path / "a.pt"
    for length in range(20, len(whole.getvalue()), 37):
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises(BackboneError):
            create_backbone(SMALL, str(path))
