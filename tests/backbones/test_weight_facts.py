"""How images are prepared, and which activation is used, belong to the weights and not to the architecture."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image
from safetensors.torch import save_file

from tests.backbones.architectures import SMALL_CONFIG, architecture, tags
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.checkpoints.facts import Facts, facts_of_file, facts_of_tag, resolve_facts
from vlprompt.backbones.preprocessing import transform_of
from vlprompt.core.errors import BackboneError, ConfigError, UnknownNameError

SMALL = "facts-of-vlprompt"
TAGGED = [
    (name, tag) for name in open_clip.list_models() for tag in open_clip.list_pretrained_tags_by_model(name)
]
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "resize_mode": "squash"}
UNASKED = Facts("asked for")


@pytest.fixture(scope="module", autouse=True)
def small_architecture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with architecture(tmp_path_factory.mktemp("configs"), SMALL, SMALL_CONFIG):
        yield


@pytest.fixture(scope="module")
def small(small_architecture: None) -> Backbone:
    return create_backbone(SMALL, seed=3)


@pytest.fixture
def weights(small: Backbone, tmp_path: Path) -> str:
    """A file of weights that says nothing of itself."""
    path = tmp_path / "weights.safetensors"
    save_file({n: t.contiguous() for n, t in small.model.state_dict().items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 110, 3), np.uint8))


def test_preprocessing_equals_open_clips_for_every_tag(photo: Image.Image) -> None:
    assert len(TAGGED) > 100
    for name, tag in TAGGED:
        size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
        theirs = merge_preprocess_dict(asdict(PreprocessCfg()), open_clip.get_pretrained_cfg(name, tag))
        facts = resolve_facts(name, Path("weights.pt"), UNASKED, [facts_of_tag(name, tag)])
        ours = {**facts.preprocess, "size": size}
        assert PreprocessCfg(**ours) == PreprocessCfg(**{**theirs, "size": size}), (name, tag)

        if size <= 256:  # the pixels follow from the same values; the small ones are cheap to compare as well
            expected = image_transform_v2(PreprocessCfg(**{**theirs, "size": size}), is_train=False)(photo)
            assert torch.equal(transform_of(PreprocessCfg(**ours))(photo), expected), (name, tag)


def test_a_file_has_the_preprocessing_that_all_tags_of_its_architecture_agree_in() -> None:
    for name in sorted({name for name, _ in TAGGED}):
        readings = [facts_of_tag(name, tag) for other, tag in TAGGED if other == name]
        same = all(r.preprocess == readings[0].preprocess for r in readings)
        if same and len({r.quick_gelu for r in readings}) == 1:
            facts = resolve_facts(name, Path("weights.pt"), UNASKED, [])
            assert facts.preprocess == readings[0].preprocess
            assert facts.quick_gelu == readings[0].quick_gelu
        else:
            with pytest.raises(BackboneError, match="does not say how its weights were trained"):
                resolve_facts(name, Path("weights.pt"), UNASKED, [])


def test_siglip2_and_mobileclip_are_not_prepared_like_clip() -> None:
    siglip = resolve_facts("ViT-B-32-SigLIP2-256", Path("x.pt"), UNASKED, []).preprocess
    assert siglip["mean"] == siglip["std"] == (0.5, 0.5, 0.5)
    assert siglip["resize_mode"] == "squash"
    mobile = resolve_facts("MobileCLIP-S1", Path("x.pt"), UNASKED, []).preprocess
    assert (mobile["mean"], mobile["interpolation"]) == ((0.0, 0.0, 0.0), "bilinear")


def test_where_tags_differ_the_error_says_what_to_type() -> None:
    with pytest.raises(BackboneError) as caught:
        resolve_facts("ViT-B-16", Path("mine.pt"), UNASKED, [])
    message = str(caught.value)
    assert "mine.pt does not say" in message
    assert "quick_gelu true: openai, dfn2b, metaclip_400m and 1 more" in message
    assert "quick_gelu false: laion400m_e31, laion400m_e32" in message
    assert "weights_of='openai' in Python, backbone.weights_of=openai in a configuration" in message
    assert "quick_gelu=True in Python, backbone.quick_gelu=true in a configuration" in message
    assert "resize_mode" not in message  # in that they agree

    with pytest.raises(BackboneError) as caught:
        resolve_facts("ViT-H-14", Path("mine.pt"), Facts("asked for", quick_gelu=True), [])
    message = str(caught.value)
    assert "preprocess={'resize_mode': 'shortest'}" in message
    assert "backbone.preprocess.resize_mode=shortest" in message
    assert "quick_gelu" not in message  # it was asked for


def test_what_is_typed_then_is_what_is_used(weights: str, small: Backbone) -> None:
    with tags(SMALL, first={"quick_gelu": True}, second=INCEPTION):
        with pytest.raises(BackboneError, match="quick_gelu true: first"):
            create_backbone(SMALL, weights)

        first = create_backbone(SMALL, weights, weights_of="first")
        second = create_backbone(SMALL, weights, weights_of="second")
        both = create_backbone(
            SMALL,
            weights,
            quick_gelu=True,
            preprocess={"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
        )
        with pytest.raises(UnknownNameError, match="Did you mean 'second'"):
            create_backbone(SMALL, weights, weights_of="secund")

    assert first.fingerprint["activation"] == "quickgelu"
    assert first.fingerprint["preprocess"] == small.fingerprint["preprocess"]
    assert second.fingerprint["activation"] == "gelu"
    assert second.fingerprint["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert both.fingerprint["activation"] == "quickgelu"
    assert both.fingerprint["preprocess"] == second.fingerprint["preprocess"]


def test_a_tag_of_another_architecture_is_named_with_it(weights: str) -> None:
    like = create_backbone(SMALL, weights, weights_of="ViT-B-32-SigLIP2-256/webli")
    assert like.fingerprint["preprocess"]["std"] == [0.5, 0.5, 0.5]


def test_without_tags_the_default_is_said_aloud(weights: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="vlprompt.backbones"):
        create_backbone(SMALL, weights)
    assert "has no published weights" in caplog.text
    assert "resize_mode shortest" in caplog.text
    assert "weights_of=" in caplog.text


def test_open_clips_card_beside_a_file_is_what_counts(weights: str) -> None:
    model = {**SMALL_CONFIG, "quick_gelu": True}
    preprocess = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    card = Path(weights).parent / "open_clip_config.json"
    card.write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))

    backbone = create_backbone(SMALL, weights)
    assert backbone.fingerprint["activation"] == "quickgelu"
    assert backbone.fingerprint["preprocess"] == {"size": [32, 32], **preprocess}
    assert create_backbone(SMALL, str(Path(weights).parent)).fingerprint["id"] == backbone.fingerprint["id"]

    asked = create_backbone(SMALL, weights, quick_gelu=False, resize="longest", preprocess={"fill_color": 9})
    assert asked.fingerprint["activation"] == "gelu"
    assert asked.fingerprint["preprocess"]["resize_mode"] == "longest"
    assert asked.fingerprint["preprocess"]["fill_color"] == 9


def test_a_card_of_another_architecture_is_refused(weights: str) -> None:
    other = {**SMALL_CONFIG, "vision_cfg": {**SMALL_CONFIG["vision_cfg"], "width": 48}}
    card = Path(weights).parent / "open_clip_config.json"
    card.write_text(json.dumps({"model_cfg": other}))
    with pytest.raises(BackboneError, match=r"vision_cfg\.width 48, .* has 32.*local-dir:"):
        create_backbone(SMALL, weights)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"other": 1}'])
def test_a_damaged_card_is_named(weights: str, text: str) -> None:
    card = Path(weights).parent / "open_clip_config.json"
    card.write_text(text)
    with pytest.raises(BackboneError, match="open_clip_config"):
        create_backbone(SMALL, weights)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"shortest_edge": 32}, "resample": 3, "image_mean": [0.1] * 3, "image_std": [0.2] * 3},
         {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}),
        ({"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
         {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}),
        ({"size": 32, "do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
         {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}),
    ],
)  # fmt: skip
def test_transformers_card_beside_a_file(weights: str, processor: Any, expected: Any) -> None:
    folder = Path(weights).parent
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}})
    )
    backbone = create_backbone(SMALL, weights)
    assert backbone.fingerprint["preprocess"] == {"size": [32, 32], **expected}
    assert backbone.fingerprint["activation"] == "gelu"


def test_a_published_file_is_known_by_its_place_and_by_its_checksum(tmp_path: Path) -> None:
    entry = open_clip.get_pretrained_cfg("ViT-B-16", "laion2b_s34b_b88k")
    folder = tmp_path / f"models--{entry['hf_hub'].strip('/').replace('/', '--')}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    assert facts_of_file("ViT-B-16", folder / "open_clip_model.safetensors").quick_gelu is False

    # The right name with other bytes is another file.
    fake = tmp_path / Path(open_clip.get_pretrained_cfg("ViT-B-16", "openai")["url"]).name
    fake.write_bytes(b"other")
    assert facts_of_file("ViT-B-16", fake) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocess": {"meen": [0.5] * 3}}, r"preprocess\.meen: unknown key; did you mean 'mean'"),
        ({"preprocess": {"std": [0.5, 0.5, 0]}}, r"preprocess\.std\.2"),
        ({"preprocess": {"interpolation": "cubic"}}, "'bicubic' or 'bilinear'"),
        ({"preprocess": {"resize_mode": "squash"}, "resize": "shortest"}, "leave one of them out"),
        ({"quick_gelo": True}, "did you mean 'quick_gelu'"),
        ({"weights_of": "openai"}, "weights_of: it belongs to weights from a file, and random weights"),
    ],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_backbone(SMALL, **options)


def test_every_backbone_can_prepare_its_images_in_another_way(photo: Image.Image) -> None:
    tiny = create_backbone("tiny")
    squashed = create_backbone("tiny", resize="squash")
    assert squashed.fingerprint["preprocess"] == {**tiny.fingerprint["preprocess"], "resize_mode": "squash"}
    assert squashed.fingerprint["id"] != tiny.fingerprint["id"]

    expected = np.asarray(photo.resize((64, 64), Image.Resampling.BICUBIC), np.float32) / 255
    mean, std = (np.array(tiny.fingerprint["preprocess"][key], np.float32) for key in ("mean", "std"))
    pixels = squashed.preprocess(photo).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels, (expected - mean) / std, atol=1e-5)

    with pytest.raises(ConfigError, match=r"backbone 'tiny'.*\n.*quick_gelu: unknown key"):
        create_backbone("tiny", quick_gelu=True)
