"""CLIPSeg: transformers' weights in our towers, any image size, what is frozen, what the checkpoint says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt.backbones import Backbone, VisualPrompts, create_backbone
from vlprompt.backbones.taps import first_state, run_taps
from vlprompt.core.errors import BackboneError, ConfigError, VLPromptError
from vlprompt.segmentation import create_segmenter


def _reference(folder: Path, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is an optional extra")
    config = json.loads((folder / "config.json").read_text())
    return transformers.CLIPSegForImageSegmentation(
        transformers.CLIPSegConfig(**{**config, **changes})
    ).eval()


def _tokens(backbone: Backbone, texts: list[str]) -> dict[str, Tensor]:
    rows = [backbone.text.sentence(text) for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("refined", [False, True])
def test_random_weights_of_transformers_give_its_outputs(
    refined: bool, checkpoint: Path, tmp_path: Path
) -> None:
    """Saved by transformers itself, at the trained size and at a larger one."""
    torch.manual_seed(3)
    theirs = _reference(checkpoint, use_complex_transposed_convolution=refined)
    theirs.save_pretrained(tmp_path)
    backbone = create_backbone("clipseg", str(tmp_path))
    ours = create_segmenter("clipseg", backbone)
    texts = ["a cat", "something much longer, of many more words"]
    for size in (64, 96):
        images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            expected = theirs(
                **_tokens(backbone, texts), pixel_values=images, interpolate_pos_encoding=True
            ).logits
        torch.testing.assert_close(
            ours(images, texts)[:, 0], expected, rtol=2e-5, atol=1e-4
        )  # float32, on any CPU
        assert float(expected.std()) > 1e-3


def test_weights_by_name_go_through_the_hub_and_say_what_works_offline(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name: str, file: str) -> str:
        asked.append((name, file))
        if name != "someone/clipseg":
            raise OSError("unreachable")
        if file.endswith(".bin"):
            raise AssertionError("safetensors come first")
        return str(checkpoint / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert create_backbone("clipseg", "someone/clipseg").vision.layers == 5
    assert asked == [("someone/clipseg", "config.json"), ("someone/clipseg", "model.safetensors")]
    with pytest.raises(BackboneError, match=r"'no/where' are no folder here.*pass the folder.*tiny"):
        create_backbone("clipseg", "no/where")


def test_a_torch_file_is_read_without_running_its_code(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    torch.save({"clip.logit_scale": Path("code")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="is not readable as configuration and plain tensors"):
        create_backbone("clipseg", str(tmp_path))


def test_a_folder_without_weights_or_with_others_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BackboneError, match=r"needs config\.json, and model\.safetensors or pytorch_model\.bin"
    ):
        create_backbone("clipseg", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="does not hold CLIPSeg's towers"):
        create_backbone("clipseg", str(tmp_path))


def test_configurations_leave_out_what_has_transformers_default_value(
    checkpoint: Path, tmp_path: Path
) -> None:
    from vlprompt.backbones.clipseg import read_checkpoint

    (tmp_path / "config.json").write_text('{"vision_config": {"hidden_size": 8}}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    config, _ = read_checkpoint(str(tmp_path))
    assert config["vision_config"]["patch_size"] == 32
    assert config["vision_config"]["hidden_size"] == 8
    assert config["extract_layers"] == [3, 6, 9]
    assert not config["use_complex_transposed_convolution"]


def test_sizes_that_the_weights_do_not_have_are_refused(small: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"reduce: got 32, but the decoder of .* has 16"):
        create_segmenter("clipseg", small, reduce=32)
    assert create_segmenter("clipseg", small, weights="random", reduce=32).decoder.width == 32
    with pytest.raises(VLPromptError, match=r"taps=\(1, 2\): the decoder of .* reads 3 blocks"):
        create_segmenter("clipseg", small, taps=(1, 2))


def test_the_same_weights_may_be_read_at_other_depths(small: Backbone) -> None:
    """The published model was trained with (3, 7, 9) and is used with (3, 6, 9)."""
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    usual, other = create_segmenter("clipseg", small), create_segmenter("clipseg", small, taps=(1, 2, 4))
    assert not torch.allclose(usual(images, ["cat"]), other(images, ["cat"]))


@pytest.mark.parametrize("taps", [(), (2, 1), (1, 1, 2), (1, 9)])
def test_taps_are_ascending_blocks_that_exist(taps: tuple[int, ...], backbone: Backbone) -> None:
    with pytest.raises(VLPromptError, match="ascending numbers of blocks, 0 to 2"):
        create_segmenter("clipseg", backbone, taps=taps)


def test_other_taps_are_read(backbone: Backbone, images: Tensor) -> None:
    texts = ["cat"] * len(images)
    one = create_segmenter("clipseg", backbone, taps=(2,), hidden=32)
    assert len(one.decoder.layers) == 1
    assert one(images, texts).shape == (6, 1, 32, 32)


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 32])
def test_refined_upsampling_returns_to_pixels_for_any_patch(patch: int) -> None:
    """The published one multiplies patch // 4 by itself, which is 9 for a patch of 14."""
    from vlprompt.segmentation._film import FilmDecoder

    decoder = FilmDecoder(12, 8, patch, reduce=8, hidden=8, refined=True)
    assert decoder.upsample(torch.zeros(1, 8, 2, 3)).shape == (1, 1, 2 * patch, 3 * patch)


def test_blocks_above_the_last_tap_are_not_run(small: Backbone) -> None:
    ran = []
    hooks = [
        b.ln_1.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(small.vision.blocks)
    ]
    create_segmenter("clipseg", small)(torch.zeros(1, 3, 64, 64), ["cat"])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, 3]


def test_towers_of_timm_that_resize_their_positions_read_any_size(make_backbone: Any) -> None:
    timm = {
        "timm_model_name": "test_vit",
        "timm_pool": "token",
        "timm_proj": "linear",
        "timm_model_pretrained": False,
    }
    backbone = make_backbone(vision={**timm, "image_size": 160}, custom=True)
    segmenter = create_segmenter("clipseg", backbone, "vpt", hidden=16)
    assert segmenter(torch.zeros(1, 3, 160, 160), ["cat"]).shape == (1, 1, 160, 160)
    assert segmenter(torch.zeros(1, 3, 96, 160), ["cat"]).shape == (1, 1, 96, 160)  # it resizes its positions
    with pytest.raises(BackboneError, match="projects its tokens into the joint space"):
        create_segmenter("cris", backbone)


def test_rotary_towers_of_timm_read_their_own_size() -> None:
    """Prompts at the end of the sequence have no rotary position, as in the tower's own pass."""
    families = pytest.importorskip("tests.families", reason="families are built with transformers")
    maker = families.load_page_maker()
    backbone = maker.build(maker.Family("rotary", "", lambda: maker._timm(lambda: maker._eva02(depth=3))))
    segmenter = create_segmenter("clipseg", backbone, "vpt", hidden=16)
    assert segmenter(torch.zeros(1, 3, 32, 32), ["cat"]).shape == (1, 1, 32, 32)
    with pytest.raises(BackboneError, match=r"comes from timm and reads 32 x 32 pixels only, got 24 x 32"):
        segmenter(torch.zeros(1, 3, 24, 32), ["cat"])

    tower = backbone.vision
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    taps = run_taps(tower, first_state(tower, images), [0], prompts, pooled=True)
    expected = tower.encode(images, VisualPrompts(prompts, "append"))
    torch.testing.assert_close(taps.pooled, expected, rtol=0, atol=1e-5)
