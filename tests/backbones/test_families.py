"""One small member of every family of towers: equal to open_clip, and open to prompts, adapters and masks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.families import (
    FAMILIES,
    IMAGE_FAMILIES,
    TEXT_FAMILIES,
    TRANSFORMERS,
    family_backbone,
    load_page_maker,
)
from vlprompt.backbones import Backbone, PixelPrompts, VisualPrompts
from vlprompt.backbones.layout import slot
from vlprompt.backbones.lexicon import Lexicon
from vlprompt.backbones.reweighted import ReweightedBackbone
from vlprompt.backbones.weight_masks import maskable
from vlprompt.core.errors import BackboneError
from vlprompt.learners import create_learner

NAMES = ("dog", "red circle", "humming bird")
TEXTS = [
    "a photo of a dog.",
    "",
    "this is my large, clean humming bird",
    "a picture of the red circle.",
    "dog " * 60,
]
ROTARY = ("EVA-02", "PE-Core", "NaFlex ViT, rotary")
SHUT = ("CLIP ResNet", "MobileCLIP-S", "ConvNeXt", "Swin", "ViT with relative positions")


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_image_features_are_open_clips(name: str) -> None:
    """As it is, with no prompt tokens, block by block, and with pixels that are 0."""
    backbone = family_backbone(name)
    with torch.no_grad():
        expected = backbone.model.encode_image(images(), normalize=True)

    close(backbone.encode_image(images()), expected)
    close(backbone.encode_image(images(), PixelPrompts(torch.zeros(3, 32, 32))), expected)
    if name not in SHUT:
        for insertion in ("after_cls", "append"):
            none = torch.zeros(1, 0, backbone.vision.width)
            close(backbone.encode_image(images(), VisualPrompts(none, insertion)), expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # the tower sees the image


@pytest.mark.parametrize("name", FAMILIES)
def test_text_features_are_open_clips(name: str) -> None:
    backbone = family_backbone(name)
    tokenizer = backbone.text.require_tokenizer()
    with torch.no_grad():
        expected = backbone.model.encode_text(
            tokenizer.rows(TEXTS, backbone.text.context_length), normalize=True
        )
    close(backbone.encode_text(TEXTS), expected)
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # the tower reads the words


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_a_learned_context_equals_the_words_it_copies(name: str) -> None:
    backbone = family_backbone(name)
    learner = create_learner("coop", backbone, NAMES, init="a photo of the")
    expected = backbone.encode_text([f"a photo of the {n}." for n in NAMES])
    close(learner.class_weights().detach(), expected)

    # Contexts of several images at once equal one pass each.
    contexts = torch.stack([learner.context.detach(), noise(4, backbone.text.width)])
    together = backbone.text.encode(learner.layout, contexts)
    for one, context in zip(together, contexts, strict=True):
        close(one, backbone.text.encode(learner.layout, context), 2e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_sentences_of_transformers_are_as_long_as_the_longest(name: str) -> None:
    backbone = family_backbone(name)
    lengths: list[int] = []
    layer = backbone.text.blocks[0]
    handle = layer.register_forward_hook(lambda _, __, output: lengths.append(_states(output).shape[1]))
    backbone.encode_text(["a dog", "a large dog"])
    handle.remove()
    assert lengths == [len(backbone.text.sentence("a large dog"))]


def test_the_pooler_of_maxima_leaves_padding_out() -> None:
    """open_clip's own pass of it stops with an error; this is what it is meant to be."""
    maker = load_page_maker()
    family = maker.Family("maxima", "", lambda: maker._hugging_face("bert", "max_pooler"), "words")
    backbone = maker.build(family)
    tower = backbone.text
    texts = ["a dog", "a photo of the large dog"]

    expected = []
    for text in texts:
        row = torch.tensor([tower.sentence(text)])
        states = tower.inner.transformer(input_ids=row).last_hidden_state
        expected.append(tower.inner.proj(states.max(1).values)[0])
    close(backbone.text.encode_strings(texts), torch.stack(expected).detach())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_deep_text_prompts_that_copy_states_change_nothing(name: str) -> None:
    """Before every layer the context's states are replaced by what they are anyway."""
    tower = family_backbone(name).text
    sentence = tower.sentence("a photo of a dog")
    start = len(tower.require_tokenizer().start)
    words = tower.embed_tokens(sentence[start : start + 2])
    layout = tower.layout([[*sentence[:start], slot(0), slot(1), *sentence[start + 2 :]]])

    states: list[Tensor] = []
    handles = [
        b.register_forward_hook(lambda _, __, output: states.append(_states(output))) for b in tower.blocks
    ]
    expected = tower.encode(layout, words)
    for handle in handles:
        handle.remove()
    deep = torch.stack([state[0, start : start + 2] for state in states[:-1]])

    close(tower.encode(layout, words, deep), expected)
    assert not torch.allclose(tower.encode(layout, words, noise(*deep.shape)), expected, atol=1e-3)


@pytest.mark.parametrize("insertion", ["after_cls", "append"])
@pytest.mark.parametrize("name", ROTARY)
def test_prompt_tokens_have_no_rotary_position(name: str, insertion: str) -> None:
    """timm's attention leaves its first tokens unturned; let it take the prompts for some of them."""
    backbone = family_backbone(name)
    tower = backbone.vision
    tokens = noise(2, 3, tower.width)
    got = tower.encode(images(), VisualPrompts(tokens, insertion))

    visual: Any = copy.deepcopy(tower.visual)
    trunk = visual.trunk
    special = trunk.num_prefix_tokens
    for block in trunk.blocks:
        block.attn.num_prefix_tokens = special + 3
    if hasattr(trunk, "embeds"):
        x, grid = trunk.embeds(images())
        rope = trunk.rope.get_embed(shape=grid)
    else:
        x, rope = trunk._pos_embed(trunk.patch_embed(images()))

    # After the class token or behind the patches: attention doesn't know an order, only who turns.
    first = tokens[:1].expand(3, -1, -1)
    x = (
        trunk.norm_pre(torch.cat([x, first], dim=1))
        if insertion == "append"
        else torch.cat([trunk.norm_pre(x), first], 1)
    )
    x = torch.cat([x[:, :special], x[:, -3:], x[:, special:-3]], dim=1)
    for i, block in enumerate(trunk.blocks):
        if i == 1:
            x = torch.cat([x[:, :special], tokens[1:].expand(3, -1, -1), x[:, special + 3 :]], dim=1)
        x = block(x, rope=rope)
    x = torch.cat([x[:, :special], x[:, special + 3 :]], dim=1)
    close(got, visual.head(trunk.forward_head(trunk.norm(x))))


@pytest.mark.parametrize("name", [name for name in IMAGE_FAMILIES if name not in ("CLIP ResNet", "ConvNeXt")])
def test_low_rank_updates_of_the_image_tower_equal_changed_weights(name: str) -> None:
    backbone = family_backbone(name)
    learner = create_learner("clip_lora", backbone, NAMES, encoder="vision", matrices=["q", "v"], dropout=0.0)
    _change(learner)
    got = learner.embed_images(images())

    merged = copy.deepcopy(backbone.vision)
    _merge(merged.attention, learner.vision)
    close(got, merged.encode(images()), 3e-5)
    assert not torch.allclose(got, backbone.vision.encode(images()), atol=1e-3)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_low_rank_updates_of_the_text_tower_equal_changed_weights(name: str) -> None:
    backbone = family_backbone(name)
    learner = create_learner("clip_lora", backbone, NAMES, encoder="text", matrices=["q", "v"], dropout=0.0)
    _change(learner)
    got = learner.class_weights()

    merged = copy.deepcopy(backbone.text)
    _merge(merged.attention, learner.text)
    close(got, F.normalize(merged.encode(learner.layout), dim=-1), 3e-5)
    assert not torch.allclose(got, backbone.class_weights(NAMES, learner.templates), atol=1e-3)


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_a_mask_reaches_every_weight_that_it_names(name: str) -> None:
    """Each weight alone, switched off: the features are those of a copy of the tower whose weight is zero."""
    backbone = family_backbone(name)
    names = list(maskable(backbone.vision.visual))
    kinds = set(maskable(backbone.vision.visual).values())
    assert kinds >= {"mlp.in", "mlp.out"} or kinds >= {"attention.in", "conv"}
    plain = backbone.image_embeddings(images())

    for weight in names[:: max(1, len(names) // 8)]:
        view = ReweightedBackbone(backbone, {weight: torch.zeros_like})
        zeroed = copy.deepcopy(backbone.vision.visual)
        zeroed.get_parameter(weight).data.zero_()
        output = zeroed(images())
        close(view.image_embeddings(images()), output[0] if isinstance(output, tuple) else output)
    everything = ReweightedBackbone(backbone, dict.fromkeys(names, torch.zeros_like))
    assert not torch.allclose(everything.image_embeddings(images()), plain, atol=1e-3)


def test_a_view_knows_what_its_backbone_knows() -> None:
    """Facts that are written down after a backbone was built come along: device, origin, words, hashes."""
    backbone = copy.deepcopy(family_backbone("CLIP"))
    backbone.about = "drawn shapes"
    backbone.lexicon = Lexicon(["ship"], {"ketch": "ship"}, [], [])
    backbone.asked_device = torch.device("cpu")

    view = ReweightedBackbone(backbone, {})
    for name, fact in vars(backbone).items():
        assert vars(view)[name] is fact or name == "_modules", name
    assert view.text is backbone.text
    assert dict(view.named_parameters()).keys() == dict(backbone.named_parameters()).keys()


def test_a_weight_that_no_layer_reads_is_refused() -> None:
    """Replacing what the tower never asks for would do nothing, in silence."""
    backbone = copy.deepcopy(family_backbone("CLIP"))
    backbone.vision.visual.spare = torch.nn.Linear(4, 4)
    view = ReweightedBackbone(backbone, {"spare.weight": torch.zeros_like})
    with pytest.raises(BackboneError, match=r"1 weights .* can't be replaced.*Linear.weight"):
        view.image_embeddings(images())


@pytest.mark.parametrize("name", SHUT)
def test_towers_without_tokens_say_that_pixels_work(name: str) -> None:
    backbone = family_backbone(name)
    with pytest.raises(BackboneError, match=r"What works here: vpt, .*where=pixels"):
        create_learner("maple", backbone, NAMES)
    with pytest.raises(BackboneError, match="where=pixels"):
        create_learner("vpt", backbone, NAMES, where="tokens")
    assert list(create_learner("vpt", backbone, NAMES).trainable_state()) == ["frame"]


def _states(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _change(learner: Any) -> None:
    """Let the update, which starts at zero, do something."""
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if ".up." in name:
                parameter.copy_(noise(*parameter.shape, seed=len(name)))


@torch.no_grad()
def _merge(places: Any, updates: Any) -> None:
    """Add updates to the weights themselves."""
    for place, update in zip(places, updates.values(), strict=True):
        change = update.weight_update()
        if not place.layers:
            place.attention.in_proj_weight += change
            continue
        sizes = [layer.out_features for layer in place.layers]
        for layer, part in zip(place.layers, change.split(sizes), strict=True):
            layer.weight += part


def test_half_of_the_backbone_families_take_tokens() -> None:
    """The list above is complete: every other family takes prompt tokens."""
    for name in IMAGE_FAMILIES:
        backbone: Backbone = family_backbone(name)
        assert (backbone.vision.refusal is None) == (name not in SHUT), name


@pytest.mark.parametrize("name", IMAGE_FAMILIES)
def test_a_tower_goes_on_from_its_states(name: str) -> None:
    """Exactly, after any number of blocks, with and without prompt tokens and adapters."""
    backbone = family_backbone(name)
    tower = backbone.vision
    if not tower.layers:
        with pytest.raises(BackboneError, match="visual prompts can't be learned"):
            backbone.image_states(images())
        return

    whole = backbone.image_embeddings(images())
    for blocks in (0, tower.layers - 1):
        assert torch.equal(backbone.image_embeddings(backbone.image_states(images(), blocks)), whole)

    tokens = torch.randn(tower.layers, 2, tower.width, generator=torch.Generator().manual_seed(0))
    for insertion in ("after_cls", "append"):
        prompts = VisualPrompts(tokens, insertion)
        expected = backbone.image_embeddings(images(), prompts)
        assert torch.equal(backbone.image_embeddings(backbone.image_states(images()), prompts), expected)
