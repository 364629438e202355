"""CLIP and SigLIP of transformers, from files, folders and built models: equal to what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.tokenizer import HFTokenizer
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from tests.backbones.architectures import architecture
from tests.backbones.test_tokenizers import build_folder
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.errors import BackboneError

TEXT = {
    "hidden_size": 32, "intermediate_size": 65, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 20, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407,
}  # fmt: skip
VISION = {
    "hidden_size": 48, "intermediate_size": 95, "num_hidden_layers": 2, "num_attention_heads": 3,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
TEXTS = ["a dog", "a photo of the red cat", "hat " * 40]


def build(kind: str, **text: Any) -> Any:
    """Return a small random model of transformers."""
    torch.manual_seed(5)
    if kind.startswith("clip"):
        act = {"clip": "quick_gelu", "clip_gelu": "gelu", "clip_tanh": "gelu_pytorch_tanh"}[kind]
        config = CLIPConfig(
            text_config={**TEXT, "hidden_act": act, **text}, vision_config={**VISION, "hidden_act": act},
            projection_dim=24,
        )  # fmt: skip
        model = CLIPModel(config)
    else:
        small = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 48,
                 "num_attention_heads": 3, "projection_size": 48}  # fmt: skip
        model = SiglipModel(SiglipConfig(text_config={**TEXT, **small, **text}, vision_config=VISION))

    with torch.no_grad():  # the initial biases are zero and the norms are one: that would hide a mistake
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(build_folder(folder, "t5"))


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save a model with its image processor, and a tokenizer if it needs one."""
    model.save_pretrained(folder, **options)
    size = {"height": 32, "width": 32}
    SiglipImageProcessor(size=size, resample=3).save_pretrained(folder)
    if isinstance(model, SiglipModel):
        build_folder(folder, "t5")
    return folder


def assert_equal(backbone: Backbone, model: Any, ids: torch.Tensor | None = None) -> None:
    """Compare both towers, the scale and the bias with transformers."""
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tower = backbone.text
    rows = tower.require_tokenizer().rows(TEXTS, tower.context_length) if ids is None else ids
    with torch.no_grad():
        output = model(input_ids=rows, pixel_values=images)
    torch.testing.assert_close(backbone.encode_image(images), output.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(backbone.encode_text(TEXTS), output.text_embeds, rtol=0, atol=1e-5)

    ours = backbone.encode_image(images) @ backbone.encode_text(TEXTS).T
    logits = ours * backbone.logit_scale + backbone.logit_bias
    torch.testing.assert_close(logits, output.logits_per_image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "clip_gelu", "clip_tanh", "siglip"])
@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_folders(kind: str, form: str, tmp_path: Path) -> None:
    if form == "sharded" and kind not in ("clip", "siglip"):
        pytest.skip("the parts don't depend on the activation")
    model = build(kind)
    save(model, tmp_path, max_shard_size="100KB" if form == "sharded" else "5GB")
    if form == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    backbone = create_backbone(f"local-dir:{tmp_path}")
    assert_equal(backbone, model)
    assert backbone.fingerprint["preprocess"] == {"size": [32, 32], **PREPROCESS}
    assert backbone.vision.layers == 2
    assert backbone.text.refusal is None


def test_prompts_enter_a_converted_siglip(tmp_path: Path) -> None:
    import vlprompt

    save(build("siglip"), tmp_path)
    backbone = create_backbone(f"local-dir:{tmp_path}")
    images = torch.randn(2, 3, 32, 32)
    for method in ("coop", "vpt"):
        learner = vlprompt.create_learner(method, backbone, ["dog", "cat"])
        F.cross_entropy(learner(images), torch.tensor([0, 1])).backward()


CLIP_ARCHITECTURE = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8,
                   "mlp_ratio": 95.5 / 48},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2,
                 "mlp_ratio": 65.5 / 32},
}  # fmt: skip


@pytest.mark.parametrize("custom", [False, True])
def test_a_file_of_transformers_in_an_architecture_of_open_clip(tmp_path: Path, custom: bool) -> None:
    model = build("clip")
    save(model, tmp_path)
    with architecture(tmp_path, "clip-of-vlprompt", {**CLIP_ARCHITECTURE, "custom_text": custom}) as name:
        for path in (tmp_path, tmp_path / "model.safetensors"):
            backbone = create_backbone(name, str(path))
            assert backbone.fingerprint["activation"] == "quickgelu"  # the card beside it says so
            assert backbone.fingerprint["preprocess"] == {"size": [32, 32], **PREPROCESS}
            assert_equal(backbone, model)


def test_position_ids_and_wrappers_of_older_versions(tmp_path: Path) -> None:
    model = build("clip")
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["module.text_model.embeddings.position_ids"] = torch.arange(20)[None]
    state["module.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    model.config.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path)
    assert_equal(create_backbone(f"local-dir:{tmp_path}"), model)


def test_what_a_folder_does_not_say_is_asked_for(tmp_path: Path) -> None:
    model = build("clip")
    model.save_pretrained(tmp_path)
    name = f"local-dir:{tmp_path}"
    with pytest.raises(BackboneError, match=r"no preprocessor_config\.json.*weights_of='ViT-B-16/openai'"):
        create_backbone(name)
    like = create_backbone(name, weights_of="ViT-B-32-SigLIP2-256/webli")
    assert like.fingerprint["preprocess"] == {"size": [32, 32], **PREPROCESS}
    assert create_backbone(name, preprocess=PREPROCESS).fingerprint["id"] == like.fingerprint["id"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blip"}, "no open_clip_config.json, and no config.json of a CLIP or SigLIP"),
        ({"vision_config": {**VISION, "hidden_act": "silu"}}, "'silu' .images. can't be used"),
        ({"text_config": {**TEXT, "hidden_size": 33}}, "describes no model that can be built"),
        ({"projection_dim": 25}, "of another shape"),
    ],
)
def test_folders_that_can_not_be_used(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save(build("clip"), tmp_path)
    card = tmp_path / "config.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), **change}))
    with pytest.raises(BackboneError, match=message):
        create_backbone(f"local-dir:{tmp_path}")


# Models that were built already.


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_built_models_of_transformers(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    processor = SiglipImageProcessor(size={"height": 32, "width": 32}, resample=3)
    tokenizer = None if kind == "clip" else tokenizer_of(tmp_path)
    backbone = create_backbone(model, preprocess=processor, tokenizer=tokenizer)
    assert_equal(backbone, model)
    assert backbone.fingerprint["preprocess"] == {"size": [32, 32], **PREPROCESS}
    assert any(parameter.requires_grad for parameter in model.parameters())  # it was copied


def test_pixels_equal_those_of_an_image_processor() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    backbone = create_backbone(build("clip"), preprocess=processor)
    expected = processor(image, return_tensors="pt").pixel_values[0]
    # transformers may resize with torch, which rounds in another way than PIL.
    assert float((backbone.preprocess(image) - expected).abs().mean()) < 0.02


def test_built_models_of_open_clip() -> None:
    torch.manual_seed(2)
    model = open_clip.create_model(
        "ViT-S-32-alt", force_preprocess_cfg={"mean": (0.5,) * 3, "std": (0.5,) * 3}
    )
    backbone = create_backbone(model, architecture="ViT-S-32-alt")
    assert backbone.fingerprint["preprocess"]["mean"] == [0.5] * 3
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode_image(images), model.encode_image(images, normalize=True))
        rows = open_clip.get_tokenizer("ViT-S-32-alt")(TEXTS)
        torch.testing.assert_close(
            backbone.encode_text(TEXTS), model.encode_text(rows, normalize=True), rtol=0, atol=1e-5
        )
    assert backbone.fingerprint["architecture"] == "ViT-S-32-alt"


def test_what_a_built_model_does_not_say_is_asked_for(tmp_path: Path) -> None:
    model = build("siglip")
    with pytest.raises(BackboneError, match=r"the SiglipModel does not say how its images are prepared"):
        create_backbone(model)
    with pytest.raises(BackboneError, match="name the architecture with the tag"):
        create_backbone(model, weights_of="openai")

    silent = create_backbone(model, weights_of="ViT-B-16-SigLIP/webli")
    assert silent.fingerprint["preprocess"] == {"size": [32, 32], **PREPROCESS}
    with pytest.raises(BackboneError, match=r"without its tokenizer.*tokenizer="):
        silent.encode_text(["a dog"])
    with pytest.raises(BackboneError, match="Linear is no model of open_clip or transformers"):
        create_backbone(torch.nn.Linear(2, 2), preprocess=PREPROCESS)

    tokenizer = HFTokenizer(str(build_folder(tmp_path, "t5")), context_length=20)
    assert_equal(create_backbone(model, preprocess=PREPROCESS, tokenizer=tokenizer), model)
