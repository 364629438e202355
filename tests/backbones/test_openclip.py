"""Building backbones by name: weights from tags and files, honest failures, and a fingerprint that tells them apart."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vlprompt.backbones import Backbone, VisualPrompts, create_backbone, list_backbones
from vlprompt.backbones.openclip import _weights_arguments, wrap_open_clip
from vlprompt.core.errors import BackboneError, DataError, UnknownNameError
from vlprompt.learners import create_learner

SMALL = "test-of-vlprompt"
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module", autouse=True)
def small_architecture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give open_clip an architecture that builds at once, for as long as this file's tests run."""
    path = tmp_path_factory.mktemp("configs") / f"{SMALL}.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)
    yield
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
    del open_clip.factory._MODEL_CONFIGS[SMALL]


@pytest.fixture(scope="module")
def small(small_architecture: None) -> Backbone:
    return create_backbone(SMALL, seed=3)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown backbone 'ViT-B16'\. Did you mean 'ViT-B-16'"):
        create_backbone("ViT-B16")
    assert {"tiny", "ViT-B-16", "RN50", SMALL} <= set(list_backbones())


def test_images_are_cropped_or_squashed_as_asked(small: Backbone) -> None:
    pixels = np.zeros((60, 180, 3), np.uint8)
    pixels[:, :60, 0] = 255  # only a crop of the middle loses the red third on the left
    image = Image.fromarray(pixels)
    squash = create_backbone(SMALL, seed=3, resize="squash")
    assert small.preprocess(image).shape == squash.preprocess(image).shape
    red = [b.preprocess(image)[0] for b in (small, squash)]
    assert float(red[0][:, 4:-4].max() - red[0][:, 4:-4].min()) < 0.1
    assert float(red[1][:, 0].mean() - red[1][:, -1].mean()) > 1
    assert small.fingerprint["id"] != squash.fingerprint["id"]


def test_an_unknown_tag_is_answered_with_what_exists() -> None:
    with pytest.raises(
        UnknownNameError, match=r"weights tag of ViT-B-16 .* openai.*path of a local weights file"
    ):
        create_backbone("ViT-B-16", "opanai")
    with pytest.raises(BackboneError, match=r"no weights file at no/such\.safetensors"):
        create_backbone("ViT-B-16", "no/such.safetensors")


@pytest.mark.parametrize(("name", "tag"), [("ViT-B-16", "openai"), ("ViT-B-32", "laion2b_s34b_b79k")])
def test_weights_that_cannot_be_fetched(
    name: str, tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(BackboneError) as caught:
        create_backbone(name, tag, cache_dir=str(tmp_path))
    message = str(caught.value)
    assert f"the weights of {name}/{tag} could not be fetched" in message
    assert "pass pretrained=PATH" in message
    assert "create_backbone('tiny')" in message
    assert "\n" not in message


@pytest.mark.parametrize("form", ["safetensors", "state_dict", "checkpoint"])
def test_weights_from_a_file(small: Backbone, tmp_path: Path, form: str, images: Tensor) -> None:
    state = {name: tensor.contiguous() for name, tensor in small.model.state_dict().items()}
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "state_dict":
        torch.save(state, path)
    else:  # as open_clip's training writes it, from several processes
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, path)
    loaded = create_backbone(SMALL, str(path))
    assert torch.equal(loaded.encode_image(images), small.encode_image(images))
    assert torch.equal(loaded.encode_text(["a dog"]), small.encode_text(["a dog"]))
    assert loaded.fingerprint["weights"] == small.fingerprint["weights"]
    assert loaded.fingerprint["id"] == small.fingerprint["id"]
    assert loaded.fingerprint["pretrained"] == str(path)
    assert loaded.name == f"{SMALL}/{path}"


def test_a_tag_wins_over_a_file_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("openai").write_text("not weights")
    assert _weights_arguments("ViT-B-16", "openai") == {"pretrained": "openai", "quick_gelu": True}


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["pickle", "torch", "inside"])
def test_code_in_a_weights_file_never_runs(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "it_ran", tmp_path / "weights.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    elif form == "torch":
        torch.save(Bomb(marker), path)
    else:
        torch.save({"state_dict": {"logit_scale": torch.zeros(())}, "optimizer": Bomb(marker)}, path)
    with pytest.raises(
        BackboneError, match=r"can't be loaded into test-of-vlprompt: it holds more than plain tensors"
    ):
        create_backbone(SMALL, str(path))
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "the bomb is a dud"


@pytest.mark.parametrize(
    "damage", ["truncated", "truncated_torch", "empty", "text", "folder", "other", "no_tensors"]
)
def test_files_that_are_no_weights_of_this_architecture(small: Backbone, tmp_path: Path, damage: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in small.model.state_dict().items()}
    path = tmp_path / ("weights.pt" if damage == "truncated_torch" else "weights.safetensors")
    if damage == "other":
        state["ln_final.weight"] = torch.ones(48)
    if damage == "truncated_torch":
        torch.save(state, path)
    elif damage == "folder":
        path.mkdir()
    else:
        save_file({} if damage == "no_tensors" else state, path)
    if damage.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage in ("empty", "text"):
        path.write_bytes(b"" if damage == "empty" else b"<html>404</html>")
    with pytest.raises(BackboneError) as caught:
        create_backbone(SMALL, str(path))
    assert str(path) in str(caught.value)
    assert SMALL in str(caught.value)


def test_the_activation_is_the_one_the_weights_were_trained_with() -> None:
    assert _weights_arguments("ViT-B-32", "openai")["quick_gelu"] is True
    assert "quick_gelu" not in _weights_arguments("ViT-B-32", "laion2b_s34b_b79k")
    assert "quick_gelu" not in _weights_arguments("ViT-B-32-quickgelu", "openai")
    assert _weights_arguments("ViT-B-16", "dfn2b")["quick_gelu"] is True
    for name in ("ViT-B-32", "ViT-B-32-quickgelu", "ViT-B-16", "ViT-L-14", "ViT-H-14", "RN50"):
        built = bool(open_clip.get_model_config(name).get("quick_gelu", False))
        for tag in open_clip.list_pretrained_tags_by_model(name):
            trained = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
            assert _weights_arguments(name, tag).get("quick_gelu", built) == trained


def test_fingerprint_tells_weights_activation_and_preprocessing_apart(small: Backbone) -> None:
    same = create_backbone(SMALL, seed=3)
    assert same.fingerprint == small.fingerprint
    facts = {"architecture": SMALL, "pretrained": None}
    preprocess = {"size": 32, "mean": (0.5, 0.5, 0.5)}
    quick = create_backbone(SMALL, quick_gelu=True, seed=3)
    changed = {
        "weights": create_backbone(SMALL, seed=4),
        "activation": quick,
        "preprocess": wrap_open_clip(small.model, preprocess, small.text.tokenizer, facts),
    }
    for field, other in changed.items():
        differs = {k for k in small.fingerprint if small.fingerprint[k] != other.fingerprint[k]}
        assert differs == {field, "id"}
    assert (small.fingerprint["activation"], quick.fingerprint["activation"]) == ("gelu", "quickgelu")


def test_one_changed_value_changes_the_fingerprint(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone()
    with torch.no_grad():
        backbone.model.ln_final.bias[7] += 1e-3
    facts = {"architecture": "small", "pretrained": None}
    changed = wrap_open_clip(backbone.model, {"size": 32}, backbone.text.tokenizer, facts)
    assert changed.fingerprint["weights"] != backbone.fingerprint["weights"]


def test_random_weights_come_from_their_seed_and_disturb_no_other_draw(small: Backbone) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    built = create_backbone(SMALL, seed=3)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(built.model.positional_embedding, small.model.positional_embedding)
    assert not torch.equal(
        create_backbone(SMALL).model.positional_embedding, small.model.positional_embedding
    )


def test_preprocessing_makes_the_towers_input(small: Backbone) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    pixels = small.preprocess(image)
    assert pixels.shape == (3, *small.image_size) == (3, 32, 32)
    assert torch.equal(pixels, small.preprocess(image.copy()))
    assert small.preprocess(image.convert("L")).shape == (3, 32, 32)
    assert small.encode_image(pixels[None]).shape == (1, small.dim) == (1, 24)


def test_class_names_are_read_as_learners_read_them(small: Backbone) -> None:
    templates = ["a photo of a {}."]
    expected = small.class_weights(["red dog"], templates)
    assert torch.equal(small.class_weights(["red_dog"], templates), expected)


def test_scale_and_zero_shot_weights(small: Backbone) -> None:
    assert small.logit_scale == pytest.approx(1 / 0.07, rel=1e-5)
    weights = small.class_weights(["dog", "cat"], ["a photo of a {}.", "the {}"])
    assert weights.shape == (2, 24)
    torch.testing.assert_close(weights.norm(dim=-1), torch.ones(2))


# What each takes: prompts in its image tower, learned context in its text tower; or the reason why not.
FAMILIES = {
    "ViT-B-32": ("", ""),
    "RN50": ("not a sequence of tokens", ""),
    "convnext_base": ("not a sequence of tokens", ""),
    "MobileCLIP-S1": ("not a sequence of tokens", ""),
    "EVA02-B-16": ("", ""),
    "ViTamin-S": ("", ""),
    "coca_ViT-B-32": ("", ""),
    "ViT-B-16-SigLIP": ("", "needs the 'transformers' package"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_architectures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    no_prompts, no_context = FAMILIES[name]
    backbone = create_backbone(name)
    images = torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(0))
    features = backbone.encode_image(images)
    assert features.shape == (2, backbone.dim)
    assert bool(features.isfinite().all())
    if no_prompts:
        with pytest.raises(BackboneError, match=no_prompts):
            backbone.vision.require_prompts()
    else:
        prompts = torch.zeros(2, 4, backbone.vision.width, requires_grad=True)
        backbone.encode_image(images, VisualPrompts(prompts)).square().sum().backward()
        assert bool(prompts.grad.isfinite().all())
    if no_context:
        with pytest.raises(BackboneError, match=no_context):
            create_learner("coop", backbone, ["dog", "cat"], context_length=2)
    else:
        learner = create_learner("coop", backbone, ["dog", "cat"], context_length=2)
        F.cross_entropy(learner(images), torch.tensor([0, 1])).backward()
        assert float(learner.context.grad.abs().max()) > 0
        assert bool(learner.context.grad.isfinite().all())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="it would be built")
def test_a_text_tower_of_a_package_that_is_missing() -> None:
    with pytest.raises(BackboneError, match=r"xlm-roberta-base-ViT-B-32 can't be built: .*transformers"):
        create_backbone("xlm-roberta-base-ViT-B-32")


def test_random_weights_are_said(small: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    """A beginner who names no weights would take chance for the method's accuracy."""
    assert "weights are random" in small.describe()
    create_backbone(SMALL)
    assert f"{SMALL}: Its weights are random" in caplog.text


def test_any_mode_is_prepared_as_its_file_would_be_read(small: Backbone) -> None:
    greys = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    deep = Image.fromarray(greys.astype(np.uint16) * 257)
    assert torch.equal(small.preprocess(deep), small.preprocess(Image.fromarray(greys)))

    clear = Image.new("RGBA", (40, 50), (0, 0, 0, 0))
    assert torch.equal(small.preprocess(clear), small.preprocess(Image.new("RGB", (40, 50), "white")))
    with pytest.raises(DataError, match="takes a PIL image; got ndarray"):
        small.preprocess(greys)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got uint8, raw pixels"),
        (torch.zeros(3, 32, 32), r"got \(3, 32, 32\)"),
        (torch.zeros(1, 32, 32, 3), r"got \(1, 32, 32, 3\)"),
        (torch.zeros(1, 3, 48, 32), "reads 32 x 32 .* got 48 x 32"),
        (Image.new("RGB", (32, 32)), "got Image. vlprompt.predict"),
    ],
)
def test_images_that_were_not_prepared_are_refused(small: Backbone, images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        small.encode_image(images)


@pytest.mark.parametrize(("texts", "message"), [([], "no texts"), (["a", None], "a string; got NoneType")])
def test_texts_that_are_none_are_refused(small: Backbone, texts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        small.encode_text(texts)
