"""What each strategy learns: counts of the published table, start values, and the published code's defects avoided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones import Backbone, VisualPrompts
from vlprompt.backbones.layout import slot
from vlprompt.core.errors import VLPromptError
from vlprompt.segmentation import STRATEGIES, create_segmenter
from vlprompt.segmentation.strategies import Strategy


class _Towers:
    """The widths and depths of CLIPSeg's towers, without their 150 million weights."""

    def __init__(self, dim: int = 512) -> None:
        towers = (
            type("Tower", (), {"width": w, "layers": 12, "require_prompts": lambda self: None})
            for w in (512, 768)
        )
        self.text, self.vision = (tower() for tower in towers)
        self.dim = dim


def _count(name: str, depth: int, dim: int = 512, **options: Any) -> int:
    if name in ("coop", "cocoop", "maple"):
        options["init"] = ""
    built: Strategy = STRATEGIES.get(name).target(_Towers(dim), depth=depth, **options)  # type: ignore[arg-type]
    return sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(
    ("name", "at_one", "at_eleven"),
    [
        ("coop", 2_048, 22_528),
        ("vpt", 3_072, 33_792),
        ("cocoop", 68_160, 749_760),
        ("maple", 85_568, 941_248),
        ("shared_separate", 83_456, 918_016),
    ],
)
def test_as_many_parameters_as_published(name: str, at_one: int, at_eleven: int) -> None:
    assert (_count(name, 1), _count(name, 11)) == (at_one, at_eleven)


def test_as_many_parameters_as_published_elsewhere() -> None:
    assert _count("cocoop", 11, dim=1024) == 1_110_208  # CRIS
    assert _count("shared_attention", 1) == 10_503_936
    assert _count("shared_attention", 2, shared=False) == 2 * 10_503_936  # 115,543,296 at depth 11
    assert _count("shared_attention", 2) == 10_503_936 + 5_120  # ours by default: one layer for all depths


def test_a_decoder_has_as_many_parameters_as_published(backbone: Backbone) -> None:
    from vlprompt.segmentation._cris import CrisDecoder
    from vlprompt.segmentation._film import FilmDecoder

    assert sum(p.numel() for p in FilmDecoder(768, 512, 16).parameters()) == 1_073_153
    new = create_segmenter("clipseg", backbone, "vpt", last_layer="new", context_length=1)
    assert new.num_trainable() - 64 == 1_601 + 1
    tuned = create_segmenter("clipseg", backbone, "vpt", last_layer="tuned", context_length=1)
    assert tuned.num_trainable() - 64 == 64 * 8 * 8 + 1
    cris = CrisDecoder((512, 1024, 1024), 512)
    from vlprompt.segmentation._last_layer import NewLastLayer

    assert sum(p.numel() for p in NewLastLayer(cris.width, 64).parameters()) == 34_369 + 1


@pytest.mark.parametrize("model", ["clipseg", "cris"])
@pytest.mark.parametrize("strategy", ["coop", "cocoop", "vpt", "maple"])
def test_the_new_last_layer_is_blended_in_alike_and_learns(
    model: str, strategy: str, backbone: Backbone, images: Tensor
) -> None:
    """In the published code the layer is unused with two strategies and added unblended with a third."""
    options: dict[str, Any] = {"width": 16, "heads": 2} if model == "cris" else {"hidden": 16}
    plain = create_segmenter(model, backbone, strategy, **options)
    new = create_segmenter(model, backbone, strategy, last_layer="new", **options)
    texts = ["cat", "dog"]
    layer: Any = new.new_layer
    new(images[:2], texts).square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in layer.parameters())
    with torch.no_grad():
        layer.ratio.fill_(0.0)
        torch.testing.assert_close(new(images[:2], texts), plain(images[:2], texts))
        layer.ratio.fill_(0.25)
        layer.paint.weight.zero_()
        layer.paint.bias.fill_(2.0)
        torch.testing.assert_close(new(images[:2], texts), 0.75 * plain(images[:2], texts) + 0.5)


def test_zero_shot_has_no_learning_last_layer(backbone: Backbone) -> None:
    assert create_segmenter("clipseg", backbone, last_layer="tuned").num_trainable() == 0


@pytest.mark.parametrize("strategy", ["coop", "maple", "cocoop"])
def test_context_starts_from_the_phrase(strategy: str, backbone: Backbone) -> None:
    built = create_segmenter("clipseg", backbone, strategy, depth=2, init="a photo of a")
    phrase = backbone.text.embed_tokens(backbone.text.require_tokenizer().encode("a photo of a"))
    context: Any = built.strategy.context
    assert torch.equal(context[0], phrase)
    assert context.shape == (2, 4, 64)
    assert float(context[1].std()) == pytest.approx(0.02, rel=0.2)
    shallow = create_segmenter("clipseg", backbone, strategy, depth=1, init="a photo of a").strategy.context
    assert torch.equal(shallow[0], context[0])  # type: ignore[index]
    with pytest.raises(VLPromptError, match="init=' ' has no token"):
        create_segmenter("clipseg", backbone, strategy, init=" ")


def test_a_network_of_the_image_does_not_drown_the_phrase(backbone: Backbone, images: Tensor) -> None:
    """Published shifts have unit variance at the start, fifty times the size of random context."""
    built = create_segmenter("clipseg", backbone, "cocoop", init="")
    rows: Any = built.strategy(backbone.image_embeddings(images)).text
    shift = rows - built.strategy.context  # type: ignore[operator]
    assert shift.shape == (6, 1, 4, 64)
    assert float(shift.std()) == pytest.approx(0.02, rel=0.2)
    assert float((shift[0] - shift[1]).abs().max()) > 1e-3
    visual: Any = create_segmenter("clipseg", backbone, "maple", init="").strategy().vision
    assert float(visual.std()) == pytest.approx(0.02, rel=0.2)


def test_shared_prompts_mix(backbone: Backbone) -> None:
    strategy = create_segmenter("clipseg", backbone, "shared_attention", depth=2).strategy
    context: Any = strategy.context
    strategy().text[1, 0].sum().backward()
    touched = context.grad.abs().amax(-1) > 0
    assert touched.tolist() == [[False] * 4, [True] * 4]  # the row's own tokens, all of them, and no others


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (
            "shared_attention",
            {"attention_heads": 7},
            r"attention_heads=7 does not divide the joint width 64 \+ 64",
        ),
        ("maple", {"low_rank": True, "intermediate_dim": [8, 8]}, "low_rank needs one number as rank"),
        ("cocoop", {"low_rank": True, "intermediate_dim": None}, "low_rank needs one number as rank"),
    ],
)
def test_options_that_make_no_sense(
    strategy: str, options: dict[str, Any], message: str, backbone: Backbone
) -> None:
    with pytest.raises(VLPromptError, match=message):
        create_segmenter("clipseg", backbone, strategy, **options)


@pytest.mark.parametrize("hidden", [None, 8, [8, 6]])
@pytest.mark.parametrize("norm", [True, False])
def test_projections_have_the_layers_that_were_asked_for(hidden: Any, norm: bool) -> None:
    """The published helper forgets norm and bias where there is no hidden layer."""
    from vlprompt.segmentation.strategies._projection import projection

    kinds = [type(m).__name__ for m in projection(5, 7, hidden, norm=norm)]
    between = {None: [], 8: ["Linear", "ReLU"]}.get(
        hidden if not isinstance(hidden, list) else 0, ["Linear", "ReLU"] * 2
    )
    assert kinds == [*between, "Linear", *(["LayerNorm"] if norm else [])]
    assert projection(5, 7, hidden, norm=norm, bias=False)[-1].bias is None
    assert projection(5, 7, 4, low_rank=True, norm=False)[0].weight.shape == (4, 5)
    assert [m.weight.shape for m in projection(5, 7, 9, low_rank=True, norm=False)] == [(7, 5)]


def test_one_text_row_is_a_learned_context_in_the_sentence(backbone: Backbone, images: Tensor) -> None:
    """Depth 1 is the library's own insertion: [start, context, phrase, end]."""
    built = create_segmenter("clipseg", backbone, "coop", init="", context_length=3)
    tower = backbone.text
    layout = tower.layout([tower.sentence(slot(0), slot(1), slot(2), "a cat")])
    feature = tower.encode(layout, built.strategy.context[0])  # type: ignore[index]
    logits = built(images[:1], feature)
    torch.testing.assert_close(built(images[:1], ["a cat"]), logits, rtol=1e-4, atol=1e-5)


def test_visual_rows_enter_as_maple_s(backbone: Backbone, images: Tensor) -> None:
    """The feature of the whole image with appended prompts is the image tower's own."""
    from vlprompt.backbones.taps import first_state, run_taps

    rows = 0.5 * torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))
    taps = run_taps(backbone.vision, first_state(backbone.vision, images), (0, 2), rows, pooled=True)
    expected = backbone.vision.encode(images, VisualPrompts(rows, "append"))
    torch.testing.assert_close(taps.pooled, expected, rtol=1e-4, atol=1e-5)
    assert [s.shape for s in taps.states] == [(6, 17, 64)] * 2


def test_states_are_recorded_before_rows_replace_them(backbone: Backbone, images: Tensor) -> None:
    from vlprompt.backbones.taps import first_state, run_taps

    x = first_state(backbone.vision, images)
    rows = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    kept = run_taps(backbone.vision, x, (0,), rows, keep_prompts=True).states[0]
    assert kept.shape == (6, 20, 64)
    assert torch.equal(kept[:, 17:], rows[1].expand(6, -1, -1))  # the published order: what goes into block 1
    left = run_taps(backbone.vision, x, (0,), rows).states[0]
    assert torch.equal(left, kept[:, :17])


@pytest.mark.parametrize("count", [1, 4, 8])
def test_prompts_never_leak_into_the_image(count: int, backbone: Backbone, images: Tensor) -> None:
    built = create_segmenter("clipseg", backbone, "vpt", context_length=count)
    assert built(images[:2], ["cat", "dog"]).shape == (2, 1, 32, 32)
    # Prompts nobody attends to change nothing: a huge negative key is out of reach, so ask with none at all.
    empty = create_segmenter("clipseg", backbone)
    from vlprompt.segmentation.strategies import Rows

    built.strategy.forward = lambda image=None: Rows(vision=torch.zeros(1, 0, 64))  # type: ignore[assignment]
    torch.testing.assert_close(built(images[:2], ["cat", "dog"]), empty(images[:2], ["cat", "dog"]))


def test_positions_are_interpolated_and_sides_padded(backbone: Backbone) -> None:
    from vlprompt.backbones.taps import first_state, padded, resized_positions

    visual = backbone.vision.visual
    table = visual.positional_embedding
    assert resized_positions(table, (4, 4), (4, 4)) is table
    wide = resized_positions(table, (4, 8), (4, 4))
    assert wide.shape == (33, 64)
    assert torch.equal(wide[0], table[0])
    expected = F.interpolate(table[1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2), size=(4, 8), mode="bicubic")
    torch.testing.assert_close(wide[1:].reshape(4, 8, 64), expected[0].permute(1, 2, 0))
    image = torch.randn(1, 3, 29, 37, generator=torch.Generator().manual_seed(0))
    grown = padded(image, 8)
    assert grown.shape == (1, 3, 32, 40)
    assert torch.equal(grown[..., :29, :37], image)
    assert torch.equal(grown[..., 31, :37], image[..., 28, :])
    assert first_state(backbone.vision, image).shape == (1, 1 + 4 * 5, 64)
