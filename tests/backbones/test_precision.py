"""Backbones in half precision, traced graphs, and the warning about a fast path that is lost."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

import vlprompt
from tests.families import FAMILIES, family_backbone, load_page_maker
from vlprompt import fit, load_dataset
from vlprompt.backbones import Backbone, create_backbone, text_towers
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.classification.config import ClassificationConfig
from vlprompt.core.devices import available_devices
from vlprompt.core.errors import BackboneError, CheckpointError, ConfigError
from vlprompt.core.precision import Precision
from vlprompt.experiments.folder import RunFolder
from vlprompt.learners import LEARNERS, create_learner

NAMES = ("dog", "red circle", "humming bird")
TEXTS = ["a photo of a dog.", "this is my large red circle"]
MAKER = load_page_maker()


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def in_half(name: str, dtype: torch.dtype) -> Backbone:
    """A family's member in half precision, leaving the shared one as it is."""
    family = next(family for family in MAKER.FAMILIES if family.name == name)
    return MAKER.build(family).to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "fp16"]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_half_precision_are_float32_and_near(name: str, dtype: torch.dtype) -> None:
    full = family_backbone(name)
    half = in_half(name, dtype)
    assert half.logit_scale == full.logit_scale
    for got, expected in (
        (half.encode_image(images()), full.encode_image(images())),
        (half.encode_text(TEXTS), full.encode_text(TEXTS)),
    ):
        assert got.dtype == torch.float32
        assert F.cosine_similarity(got, expected).min() > (0.99 if dtype == torch.bfloat16 else 0.9999)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["tiny", "photo", "photo-vit"])
def test_embedded_backbones_are_built_in_a_precision(name: str, precision: Precision) -> None:
    full = create_backbone(name)
    half = create_backbone(name, precision=precision)
    assert (full.precision, half.precision) == ("fp32", precision)
    assert (half.logit_scale, half.logit_bias) == (full.logit_scale, full.logit_bias)
    assert half.model.logit_scale.dtype == torch.float32

    # What was learned fits both; their features are kept apart.
    assert half.fingerprint == full.fingerprint
    assert half.origin == full.origin
    assert (full.features_id, half.features_id) == (
        full.fingerprint["id"],
        f"{full.fingerprint['id']}-{precision}",
    )

    pixels = torch.randn(4, 3, *full.image_size, generator=torch.Generator().manual_seed(3))
    for got, expected in (
        (half.encode_image(pixels), full.encode_image(pixels)),
        (half.encode_text(TEXTS), full.encode_text(TEXTS)),
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.norm(dim=-1), torch.ones(len(got)))
        assert F.cosine_similarity(got, expected).min() > 0.999


def test_a_prompt_learned_in_half_precision_loads_in_float32_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = create_learner("coop", create_backbone("tiny", precision="bf16"), NAMES)
    folder = vlprompt.save(learner, tmp_path)

    with caplog.at_level(logging.WARNING, logger="vlprompt.saved"):
        full = vlprompt.load(folder)
        assert [record.getMessage() for record in caplog.records] == [
            f"{folder} was learned on a backbone in bf16 and is used in fp32: figures may differ a little."
        ]
        caplog.clear()
        half = vlprompt.load(folder, backbone={"precision": "bf16", "device": "cpu"})
        assert not caplog.records

    assert (full.backbone.precision, half.backbone.precision) == ("fp32", "bf16")
    assert torch.equal(full.trainable_state()["context"], learner.trainable_state()["context"])


def test_a_run_is_another_one_in_another_precision_and_the_same_on_another_device(tmp_path: Path) -> None:
    def folder(**backbone: str) -> Path:
        content = {"task": "classification", "output": str(tmp_path), "data": {"name": "digits"}}
        config = ClassificationConfig.model_validate({**content, "backbone": {"name": "tiny", **backbone}})
        return RunFolder(config, {}).path

    assert folder() == folder(device="cuda:1") == folder(device="cpu", precision="fp32")
    assert folder() != folder(precision="bf16")


def test_training_does_not_go_on_in_another_precision(tmp_path: Path) -> None:
    data = load_dataset("digits", "train", shots=1, seed=1)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 10, "checkpoint_seconds": 0}
    tower = create_backbone("tiny", "random")
    fit(create_learner("coop", tower, data.classnames), data, folder=tmp_path, **options)
    tower.set_precision("bf16")
    with pytest.raises(CheckpointError, match="precision"):
        fit(create_learner("coop", tower, data.classnames), data, folder=tmp_path, resume=True, **options)


def test_a_built_model_keeps_its_precision_unless_another_is_asked_for() -> None:
    model = open_clip.create_model("ViT-S-32-alt", precision="pure_bf16", pretrained=None)
    facts = {"weights_of": "ViT-B-16/openai", "architecture": "ViT-S-32-alt"}
    assert create_backbone(model, **facts).precision == "bf16"
    assert create_backbone(model, precision="fp32", **facts).precision == "fp32"


def test_devices_and_precisions_that_are_not_there_are_refused_before_anything_is_read() -> None:
    there = ", ".join(available_devices())
    with pytest.raises(BackboneError, match=f"there is no device 'cuda:63' here. There is: {there}"):
        create_backbone("tiny", "/no/such/weights", device="cuda:63")
    with pytest.raises(ConfigError, match=r"'gpu' is no device. Known: cpu, cuda, cuda:N"):
        create_backbone("tiny", device="gpu")
    with pytest.raises(ConfigError, match=r"precision: .*'fp32', 'bf16' or 'fp16', got 'half'"):
        create_backbone("tiny", precision="half")  # type: ignore[arg-type]


@pytest.mark.parametrize("learner", [entry.name for entry in LEARNERS])
def test_every_learner_learns_in_float32_on_a_bfloat16_backbone(learner: str) -> None:
    backbone = in_half("CLIP", torch.bfloat16)
    trained = MAKER.train_one_step(backbone, learner)
    assert {p.dtype for p in trained.learned_parameters().values()} <= {torch.float32}
    assert {t.dtype for t in trained.trainable_state().values() if t.is_floating_point()} <= {torch.float32}
    assert trained.eval()(images()).dtype == torch.float32


def test_models_of_open_clips_mixed_precision_work() -> None:
    """Matrices in bfloat16, norms and embeddings in float32."""
    model = open_clip.create_model("ViT-S-32-alt", precision="bf16", pretrained=None)
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.float32, torch.bfloat16}
    tokenizer = family_backbone("CLIP").text.tokenizer
    backbone = wrap_open_clip(model, {"size": 224}, tokenizer, {"architecture": "mixed", "pretrained": None})
    pixels = torch.randn(2, 3, *backbone.image_size)
    for name in ("coop", "vpt", "clip_lora"):
        logits = create_learner(name, backbone, NAMES)(pixels)
        assert logits.dtype == torch.float32
        logits.sum().backward()


TRACED = (
    "zero_shot",
    "coop",
    "cocoop",
    "vpt",
    "maple",
    "clip_lora",
    "clip_adapter",
    "tip_adapter",
    "linear_probe",
    "amt",
)


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("learner", TRACED)
def test_learners_can_be_exported(learner: str, quiet: None) -> None:
    built = create_learner(learner, family_backbone("CLIP"), NAMES).eval()
    with torch.no_grad():
        exported = torch.export.export(built, (images(),)).module()
        expected = built(images())
        torch.testing.assert_close(exported(images()), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["coop", "vpt"])
@pytest.mark.parametrize("family", ["EVA-02", "CoCa", "BERT text", "ConvNeXt"])
def test_other_families_can_be_exported(family: str, learner: str, quiet: None) -> None:
    built = create_learner(learner, family_backbone(family), NAMES).eval()
    with torch.no_grad():
        exported = torch.export.export(built, (images(),)).module()
        torch.testing.assert_close(exported(images()), built(images()), rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "learner", ["coop", "cocoop", "vpt", "maple", "clip_lora", "clip_adapter", "tip_adapter"]
)
def test_compilation_finds_no_graph_break(learner: str, quiet: None) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    built = create_learner(learner, family_backbone("CLIP"), NAMES).train()
    found = torch._dynamo.explain(built)(images())
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


class OtherAttention(nn.Module):
    """An attention that isn't torch's own, with another name for its matrix."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.inner = attention

    def forward(self, *arguments: Tensor, **options: Any) -> Any:
        return self.inner(*arguments, **options)


def test_a_lost_fast_path_is_said_once(
    make_backbone: Callable[..., Backbone], backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    """As if a new open_clip had other blocks: the result is the same, and a warning says why it takes longer."""
    text_towers._warn_once.cache_clear()
    model: Any = copy.deepcopy(make_backbone().model)
    for block in model.transformer.resblocks:
        assert isinstance(block, ResidualAttentionBlock)
        block.attn = OtherAttention(block.attn)

    with caplog.at_level(logging.WARNING, logger="vlprompt.backbones"):
        facts = {"architecture": "small", "pretrained": None}
        slow = wrap_open_clip(model, {"size": 32}, backbone.text.tokenizer, facts)
        wrap_open_clip(model, {"size": 32}, backbone.text.tokenizer, facts)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    for part in ("ResidualAttentionBlock", "3.0 to 3.3", open_clip.__version__, "slower"):
        assert part in lines[0]
    assert not slow.text.packable
    torch.testing.assert_close(slow.encode_text(TEXTS), backbone.encode_text(TEXTS), rtol=0, atol=1e-5)


def test_no_warning_where_the_path_was_never_fast(
    make_backbone: Callable[..., Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    text_towers._warn_once.cache_clear()
    make_backbone()
    make_backbone({"no_causal_mask": True, "pool_type": "last"}, custom=True)
    make_backbone({"embed_cls": True}, custom=True)
    assert caplog.records == []


def test_the_scale_follows_the_weights_but_not_their_rounding() -> None:
    """100 is no number of bfloat16: exp of its rounded logarithm is 98.9."""
    backbone = copy.deepcopy(family_backbone("CLIP"))
    with torch.no_grad():
        backbone.model.logit_scale.fill_(100.0).log_()
    assert backbone.logit_scale == pytest.approx(100, rel=1e-6)
    backbone.to(torch.bfloat16)
    assert float(backbone.model.logit_scale.float().exp()) < 99
    assert backbone.logit_scale == pytest.approx(100, rel=1e-6)
    with torch.no_grad():
        backbone.model.logit_scale.fill_(2.0)
    assert backbone.logit_scale == pytest.approx(2.718281828**2, rel=1e-6)
