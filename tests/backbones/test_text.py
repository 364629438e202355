"""The fast text tower gives what a full pass over 77 padded tokens gives, in value and in gradient."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from vlprompt.backbones import Backbone, packed
from vlprompt.backbones.layout import PromptLayout
from vlprompt.backbones.text import TextTower
from vlprompt.core.errors import VLPromptError
from vlprompt.learners._context import context_layout

NAMES = ("dog", "red circle", "red circle small", "hummingbird", "boeing 737-800", "annual crop land")
PLACES = [(p, s) for p in ("end", "middle", "front") for s in (False, True)]
Encoder = Callable[[PromptLayout, Tensor | None, Tensor | None], Tensor]


def noise(seed: int, *shape: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradients(encode: Encoder, layout: PromptLayout, *inputs: Tensor | None) -> list[Tensor]:
    """Features, and the gradient of one fixed scalar of them with respect to each input that is given."""
    leaves = [None if i is None else i.clone().requires_grad_() for i in inputs]
    out = encode(layout, *leaves)
    weights = noise(99, *out.shape[-2:])
    given = [leaf for leaf in leaves if leaf is not None]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), given)]


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Features within 1e-5; gradients within 1e-4 of their largest entry."""
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=1e-5)
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def in_full(tower: TextTower) -> Encoder:
    return lambda layout, context, deep=None: tower.encode_plain(layout, context, deep, length=77)


def test_the_fast_path_is_what_is_tested(backbone: Backbone) -> None:
    assert backbone.text.packable
    assert backbone.text.refusal is None


@pytest.mark.parametrize(("position", "specific"), PLACES)
def test_equals_a_full_pass(backbone: Backbone, position: str, specific: bool) -> None:
    tower = backbone.text
    layout = context_layout(tower, NAMES, 7, position, specific)
    context = noise(1, layout.slots, tower.width)
    assert layout.slots == 7 * (len(NAMES) if specific else 1)
    got = value_and_gradients(tower.encode, layout, context)
    assert_same(got, value_and_gradients(in_full(tower), layout, context))


@pytest.mark.parametrize("specific", [False, True])
@pytest.mark.parametrize("position", ["end", "front"])
def test_groups_equal_one_pass_each(backbone: Backbone, position: str, specific: bool) -> None:
    tower = backbone.text
    layout = context_layout(tower, NAMES, 5, position, specific)
    context = noise(2, 4, layout.slots, tower.width)
    assert tower.encode(layout, context).shape == (4, len(NAMES), backbone.dim)

    def looped(layout: PromptLayout, context: Tensor) -> Tensor:
        return torch.stack([in_full(tower)(layout, c) for c in context])

    got = value_and_gradients(tower.encode, layout, context)
    assert_same(got, value_and_gradients(looped, layout, context))


@pytest.mark.parametrize("grouped", ["neither", "both", "context", "deep"])
@pytest.mark.parametrize("position", ["end", "middle"])
@pytest.mark.parametrize("depth", [1, 2])
def test_deep_prompts_equal_a_full_pass(backbone: Backbone, position: str, depth: int, grouped: str) -> None:
    tower = backbone.text
    layout = context_layout(tower, NAMES, 4, position)
    context, deep = noise(3, 3, 4, tower.width), noise(4, 3, depth, 4, tower.width)
    context = context if grouped in ("both", "context") else context[0]
    deep = deep if grouped in ("both", "deep") else deep[0]
    got = value_and_gradients(tower.encode, layout, context, deep)
    assert_same(got, value_and_gradients(in_full(tower), layout, context, deep))
    assert not torch.allclose(got[0], tower.encode(layout, context), atol=1e-3)


def test_deep_prompts_of_a_class_of_its_own(backbone: Backbone) -> None:
    tower = backbone.text
    layout = context_layout(tower, NAMES, 2, "front", class_specific=True)
    inputs = noise(5, layout.slots, tower.width), noise(6, 2, layout.slots, tower.width)
    got = value_and_gradients(tower.encode, layout, *inputs)
    assert_same(got, value_and_gradients(in_full(tower), layout, *inputs))


@pytest.mark.parametrize("seed", range(10))
def test_random_class_lists(backbone: Backbone, seed: int) -> None:
    tower, draw = backbone.text, random.Random(seed)
    words = ["red", "dog", "circle", "staffordshire", "737-800", "a", "of", "extraordinarily"]
    names = [" ".join(draw.choices(words, k=draw.randint(1, draw.choice([2, 5, 14])))) for _ in range(20)]
    names = names[: draw.choice([1, 2, 20])] + names[: draw.choice([0, 1])]  # sometimes a repeated one
    count, position = draw.choice([1, 2, 5, 16]), draw.choice(["end", "middle", "front"])
    layout = context_layout(tower, names, count, position, draw.random() < 0.3)
    context = noise(seed, layout.slots, tower.width)
    got = value_and_gradients(tower.encode, layout, context)
    assert_same(got, value_and_gradients(in_full(tower), layout, context))


def test_sentences_up_to_the_limit(backbone: Backbone) -> None:
    tower = backbone.text
    names = [
        "a " * 57 + "b",
        "dog",
        "a " * 57 + "c",
        "a " * 30,
    ]  # 58 words, full stop, 16 slots, start and end
    layout = context_layout(tower, names, 16)
    assert layout.lengths[0] == tower.context_length
    context = noise(7, 16, tower.width)
    got = value_and_gradients(tower.encode, layout, context)
    assert_same(got, value_and_gradients(in_full(tower), layout, context))
    with pytest.raises(VLPromptError, match="has 78 tokens"):
        context_layout(tower, ["dog", "a " * 59], 16)


def test_no_context_at_all(backbone: Backbone) -> None:
    tower = backbone.text
    layout = tower.layout([tower.sentence(n) for n in NAMES])
    torch.testing.assert_close(tower.encode(layout), in_full(tower)(layout, None), rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 3])
def test_chunks_equal_one_piece(backbone: Backbone, monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    tower = backbone.text
    names = [f"{name} number {i}" for i in range(8) for name in NAMES]
    layout = context_layout(tower, names, 4)
    inputs = noise(8, groups, 4, tower.width), noise(9, groups, 2, 4, tower.width)
    whole = value_and_gradients(tower.encode, layout, *inputs)
    monkeypatch.setattr(tower, "memory", 1)
    per_group, per_tile = packed._chunks(tower, groups, layout.tiles)
    assert (len(per_group), len(per_tile)) == (groups, len(layout.tiles.sources))
    assert len(per_tile) > 3
    assert_same(value_and_gradients(tower.encode, layout, *inputs), whole)


def test_chunks_keep_less_for_the_backward_pass(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = backbone.text
    layout = context_layout(tower, [f"{name} {i}" for i in range(20) for name in NAMES], 4)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = tower.encode(layout, noise(10, 4, tower.width).requires_grad_())
            assert out.requires_grad
        return sum(sizes.values())

    whole = kept()
    monkeypatch.setattr(tower, "memory", 1)
    assert kept() < whole / 4


@pytest.mark.parametrize("quick", [False, True])
def test_strings_equal_open_clip(make_backbone: Callable[..., Backbone], quick: bool) -> None:
    backbone = make_backbone(quick_gelu=quick)
    texts = [
        "",
        "a photo of a dog.",
        "x " * 100,
        "Ünïcödé, emoji \N{DOG FACE} & <tags>",
        "A  PHOTO\tof a dog.",
    ]
    rows = backbone.text.tokenizer.rows(texts, 77)
    with torch.no_grad():
        expected = backbone.model.encode_text(rows)
    torch.testing.assert_close(backbone.text.encode_strings(texts), expected, rtol=0, atol=1e-5)
    got = backbone.encode_text(texts)
    torch.testing.assert_close(got, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-5)
    assert torch.equal(backbone.encode_text("dog"), backbone.encode_text(["dog"]))
    assert not got.requires_grad


def test_strings_in_batches(backbone: Backbone) -> None:
    texts = [f"{n} {i}" for i in range(5) for n in NAMES]
    whole = backbone.text.encode_strings(texts)
    torch.testing.assert_close(backbone.text.encode_strings(texts, batch=7), whole, rtol=0, atol=1e-5)


def test_fused_quick_gelu_has_open_clips_gradient(make_backbone: Callable[..., Backbone]) -> None:
    tower = make_backbone(quick_gelu=True).text
    layout = context_layout(tower, NAMES, 4)
    context = noise(11, 4, tower.width)
    got = value_and_gradients(tower.encode, layout, context)
    assert_same(got, value_and_gradients(in_full(tower), layout, context))


def obvious(tower: TextTower, sentence: Sequence[int], context: Tensor) -> Tensor:
    """One sentence's feature by the formulas of the paper, in float64, one head and one query at a time."""
    own = {n: p.detach().double() for n, p in tower.model.named_parameters()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * own[f"{name}.weight"] + own[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]

    words = [own["token_embedding.weight"][s] if s >= 0 else context[-1 - s].double() for s in sentence]
    x = torch.stack(words) + own["positional_embedding"][: len(sentence)]
    heads = tower.blocks[0].attn.num_heads
    for i in range(tower.layers):
        at = f"transformer.resblocks.{i}"
        stacked = norm(x, f"{at}.ln_1") @ own[f"{at}.attn.in_proj_weight"].T + own[f"{at}.attn.in_proj_bias"]
        attended = torch.zeros_like(x)
        width = x.shape[1] // heads
        for h in range(heads):
            columns = slice(h * width, (h + 1) * width)
            query, key, value = (part[:, columns] for part in stacked.split(x.shape[1], dim=1))
            for t in range(len(x)):
                scores = (key[: t + 1] @ query[t]) / width**0.5
                attended[t, columns] = scores.softmax(0) @ value[: t + 1]
        x = x + linear(attended, f"{at}.attn.out_proj")
        hidden = linear(norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        x = x + linear(hidden, f"{at}.mlp.c_proj")
    return norm(x[-1], "ln_final") @ own["text_projection"]


def test_equals_an_obvious_implementation(backbone: Backbone) -> None:
    tower = backbone.text
    layout = context_layout(tower, NAMES, 5, "middle")
    context = noise(12, 5, tower.width)
    expected = torch.stack([obvious(tower, s, context) for s in layout.sentences]).float()
    torch.testing.assert_close(tower.encode(layout, context), expected, rtol=0, atol=1e-5)


def test_gradient_equals_finite_differences(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone({"layers": 2})
    backbone.model.double()
    tower = backbone.text
    layout = context_layout(tower, NAMES, 3)
    context, weights = noise(13, 3, tower.width).double(), noise(14, len(NAMES), backbone.dim).double()

    def scalar(value: Tensor) -> Tensor:
        return (tower.encode(layout, value).double() * weights).sum()

    leaf = context.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(leaf), leaf)
    for seed in range(5):
        direction = noise(seed, 3, tower.width, scale=1.0).double()
        step = 1e-3 * direction  # features come back as float32: a smaller step would drown in their rounding
        numeric = (scalar(context + step) - scalar(context - step)) / 2e-3
        assert float((gradient * direction).sum()) == pytest.approx(float(numeric), rel=1e-3, abs=1e-3)


def test_frozen_weights_get_no_gradient(backbone: Backbone) -> None:
    layout = context_layout(backbone.text, NAMES, 4)
    backbone.text.encode(layout, noise(15, 4, 64).requires_grad_()).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())


def test_what_does_not_fit_is_refused(backbone: Backbone) -> None:
    tower = backbone.text
    layout = context_layout(tower, NAMES, 4)
    with pytest.raises(VLPromptError, match="refer to 4 context vectors, 0 were given"):
        tower.encode(layout)
    with pytest.raises(VLPromptError, match="refer to 4 context vectors, 3 were given"):
        tower.encode(layout, noise(0, 3, 64))
    with pytest.raises(VLPromptError, match="context have width 63, the text tower has 64"):
        tower.encode(layout, noise(0, 4, 63))
    with pytest.raises(VLPromptError, match="3 layers of deep text prompts, the tower takes at most 2"):
        tower.encode(layout, noise(0, 4, 64), noise(0, 3, 4, 64))
    with pytest.raises(VLPromptError, match="deep prompts have width 32"):
        tower.encode(layout, noise(0, 4, 64), noise(0, 2, 4, 32))


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("grouped", [False, True])
def test_deep_prompts_of_one_block_that_differ_between_classes(
    backbone: Backbone, block: int, grouped: bool
) -> None:
    tower = backbone.text
    layout = context_layout(tower, NAMES, 3, class_specific=True)
    context, rows = (
        noise(20, 3, tower.width),
        noise(21, *((2,) if grouped else ()), layout.slots, tower.width),
    )

    def at_block(encode: Encoder) -> Encoder:
        return lambda layout, context, rows: encode(
            layout,
            context.repeat(len(NAMES), 1),
            {block: rows},  # type: ignore[dict-item]
        )

    got = value_and_gradients(at_block(tower.encode), layout, context, rows)
    assert_same(got, value_and_gradients(at_block(in_full(tower)), layout, context, rows))
    assert not torch.allclose(got[0], tower.encode(layout, context.repeat(len(NAMES), 1)), atol=1e-3)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_deep_prompts_of_the_first_slots_leave_the_others(backbone: Backbone, position: str) -> None:
    tower = backbone.text
    layout = context_layout(tower, NAMES, 5, position)
    context, deep = noise(22, 5, tower.width), noise(23, 2, 2, tower.width)
    got = value_and_gradients(tower.encode, layout, context, deep)
    assert_same(got, value_and_gradients(in_full(tower), layout, context, deep))
    assert got[1][2:].any()  # what no deep prompt replaces flows on from the bottom


def test_deep_prompts_by_block_are_those_of_one_tensor(backbone: Backbone) -> None:
    tower = backbone.text
    layout = context_layout(tower, NAMES, 4)
    context, deep = noise(24, 4, tower.width), noise(25, 2, 4, tower.width)
    assert torch.equal(
        tower.encode(layout, context, deep), tower.encode(layout, context, {2: deep[1], 1: deep[0]})
    )
    for block in (0, 3):
        with pytest.raises(VLPromptError, match=rf"before block {block}, .* blocks 1 to 2"):
            tower.encode(layout, context, {block: deep[0]})
