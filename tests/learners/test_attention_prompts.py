"""apt and kv_prompts: the authors' numbers, equations against loops, one against the other's identity, places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprompt
from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.trajectories import check_start, check_trajectory
from tests.golden.visual_learners import put
from tests.golden.weights import filled
from vlprompt.backbones import Backbone
from vlprompt.backbones.attention import keys_values_of
from vlprompt.backbones.packed import is_packable_block
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.backbones.vision import VisualPrompts
from vlprompt.core.errors import BackboneError, ConfigError
from vlprompt.learners.apt import AttentionTerm

GOLDEN = read_golden("apt_small")
build: Any = vlprompt.create_learner  # whose results have members of their own
NAMES = ["dog", "red circle", "American staffordshire terrier"]
CONV = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16}
TIMM = {
    "timm_model_name": "test_vit",
    "timm_model_pretrained": False,
    "timm_pool": "token",
    "image_size": 32,
}


def disturbed(name: str, backbone: Backbone, **options: Any) -> Any:
    """A learner whose every number has left its start."""
    learner = build(name, backbone, NAMES, **options)
    put(name, dict.fromkeys(learner.learned_parameters(), 0.3), learner)
    return learner.eval()


# --- apt


def test_apt_equals_the_authors_code(tokenizer: TextTokenizer) -> None:
    """Forward, gradient, and twenty steps of AdamW with the learner's own groups."""
    backbone = small_clip(GOLDEN, tokenizer)
    options = {"tokens": GOLDEN["tokens"], "rank": GOLDEN["rank"]}
    learner = build("apt", backbone, GOLDEN["classnames"], **options)
    with torch.no_grad():
        for name, parameter in learner.learned_parameters().items():
            last = name.rsplit(".", 1)[1]
            std = 0.2 if last == "gain" else 0.3
            parameter.copy_(filled(f"apt/{last}", parameter.shape, std))

    close(filled("images", (4,), 1.0), GOLDEN["first_image_values"])
    images = filled("images", (3, 3, *backbone.image_size), 1.0)
    batch = {"image": images, "label": torch.tensor(GOLDEN["labels"])}
    golden = GOLDEN["case"]
    check_start(golden, learner, batch)
    check_trajectory(golden["trajectory"], learner, batch, lr=1e-3, optimizer="adamw", weight_decay=0.01)


def test_the_term_is_the_papers_equation() -> None:
    """Row by row, prompt by prompt, value by value."""
    width, count, rank = 5, 3, 2
    tokens, down, up = (
        filled("p", (count, width), 1.0),
        filled("d", (width, rank), 1.0),
        filled("u", (rank, width), 1.0),
    )
    normed, attended = filled("x", (2, 4, width), 1.0), filled("a", (2, 4, width), 1.0)
    gain, gate = torch.tensor(0.3), torch.tensor(-0.7)

    expected = torch.zeros_like(attended)
    for image in range(2):
        for token in range(4):
            x = normed[image, token]
            keys = [tokens[m] + (tokens[m] @ down) @ up for m in range(count)]
            scores = [max(0.0, float(x @ key)) for key in keys]
            for column in range(width):
                read = sum(scores[m] * float(tokens[m, column]) for m in range(count))
                value = float(attended[image, token, column]) - 0.7 * max(scores) * read
                expected[image, token, column] = torch.tensor(0.3).exp() * value

    term = AttentionTerm(tokens, tokens + (tokens @ down) @ up, gain, gate)
    torch.testing.assert_close(term(normed, attended), expected, rtol=1e-5, atol=1e-5)


def test_the_peak_carries_no_gradient_unless_asked() -> None:
    """With one prompt of one number: w E = relu(x k)^2 p, of whose two factors one is held."""
    one = torch.tensor([[2.0]])
    key = torch.tensor([[3.0]], requires_grad=True)
    x, zero = torch.tensor([[0.5]]), torch.zeros(1, 1)
    for detach, expected in ((True, 0.5 * 1.5 * 2.0), (False, 2 * 0.5 * 1.5 * 2.0)):
        value = AttentionTerm(one, key, detach_peak=detach)(x, zero).sum()
        assert float(torch.autograd.grad(value, key)[0]) == pytest.approx(expected)


@pytest.mark.parametrize("towers", ["image", "text", "both"])
def test_the_identity_start_is_zero_shot(towers: str, backbone: Backbone, images: Tensor) -> None:
    expected = build("zero_shot", backbone, NAMES).eval()(images)
    learner = build("apt", backbone, NAMES, towers=towers, start="identity").eval()
    torch.testing.assert_close(learner(images), expected, rtol=0, atol=2e-5)
    published = build("apt", backbone, NAMES, towers=towers).eval()
    assert not torch.allclose(published(images), expected, atol=1e-3)
    without_prompts = [name for name in learner.learned_parameters() if name.endswith("gate")]
    learner.loss({"image": images, "label": torch.tensor([0, 1, 2, 0, 1, 2])})["cross_entropy"].backward()
    for name in without_prompts:
        gradient = learner.learned_parameters()[name].grad
        assert gradient is not None
        assert gradient.all()  # the gates open at once


def test_kept_keys_do_what_the_matrices_do(backbone: Backbone) -> None:
    learner = disturbed("apt", backbone)
    prompts = learner.prompts["image"]
    x, a = filled("x", (2, 5, 64), 1.0), filled("a", (2, 5, 64), 1.0)
    for i, term in enumerate(prompts.terms()):
        unfolded = prompts.tokens[i] + prompts.tokens[i] @ prompts.down[i] @ prompts.up[i]
        kept = AttentionTerm(prompts.tokens[i], unfolded.detach().clone(), prompts.gain[i])
        torch.testing.assert_close(kept(x, a), term(x, a), rtol=1e-5, atol=1e-5)


def obvious_features(tower: Any, pixels: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Image features (B, d) of the paper's equations, block after block, with nothing hooked into the tower."""
    x = tower.stream.norm_before(tower.stream.embed(pixels)[0])
    for i, block in enumerate(tower.blocks):
        own = tower.kind == "vit"
        normed = (block.ln_1 if own else block.norm1)(x)
        attended = block.attn(normed, normed, normed, need_weights=False)[0] if own else block.attn(normed)
        tokens, down, up = state["tokens"][i], state["down"][i], state["up"][i]
        scores = (normed @ (tokens + tokens @ down @ up).T).relu()
        term = scores.max(-1, keepdim=True).values.detach() * (scores @ tokens)

        x = x + (block.ls_1 if own else block.ls1)(state["gain"][i].exp() * (attended + term))
        inner = block.mlp((block.ln_2 if own else block.norm2)(x))
        x = x + (block.ls_2 if own else block.ls2)(inner)
    return tower.finish(x)


@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_five_steps_equal_a_loop_without_hooks(kind: str, make_backbone: Callable[..., Backbone]) -> None:
    """All learned numbers after five steps of gradient descent, each group at its own rate."""
    backbone = make_backbone(**({"vision": TIMM, "custom": True} if kind == "timm" else {}))
    learner = disturbed("apt", backbone, tokens=5, rank=2).train()
    pixels = filled("pixels", (4, 3, *backbone.image_size), 1.0)
    labels = torch.tensor([0, 1, 2, 0])
    prefix = "prompts.image."
    state = {
        name.removeprefix(prefix): tensor.detach().clone().requires_grad_()
        for name, tensor in learner.learned_parameters().items()
    }
    weights = learner.class_weights().detach()
    rates = {name: 0.01 if name == "gain" else 0.1 for name in state}
    start = {name: tensor.detach().clone() for name, tensor in state.items()}

    for _ in range(5):
        features = torch.nn.functional.normalize(obvious_features(backbone.vision, pixels, state), dim=-1)
        logits = backbone.logit_scale * features @ weights.T
        loss = torch.nn.functional.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(state.values()))
        with torch.no_grad():
            for (name, tensor), gradient in zip(state.items(), gradients, strict=True):
                tensor -= rates[name] * gradient

    groups = learner.parameter_groups()
    learned = learner.learned_parameters()
    optimizer = torch.optim.SGD(
        [{"params": [learned[n] for n in g["names"]], "lr": 0.1 * g.get("rate", 1.0)} for g in groups]
    )
    for _ in range(5):
        optimizer.zero_grad()
        sum(learner.loss({"image": pixels, "label": labels}).values()).backward()
        optimizer.step()

    for name, expected in state.items():
        got = learned[f"{prefix}{name}"]
        assert (expected - start[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gains_and_gates_have_a_rate_of_their_own(backbone: Backbone) -> None:
    learner = build("apt", backbone, NAMES, towers="both", start="identity")
    first, second = learner.parameter_groups()
    assert second["rate"] == 0.1
    assert second["weight_decay"] == 0
    assert set(second["names"]) == {f"prompts.{t}.{n}" for t in ("image", "text") for n in ("gain", "gate")}
    assert {*first["names"], *second["names"]} == set(learner.learned_parameters())
    assert build("apt", backbone, NAMES, gain=False).parameter_groups() == []


# --- kv_prompts


def heads_of(block: Any, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (R, W) of a block's weights."""
    if is_packable_block(block):
        projected = normed @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
    else:
        projected = block.attn.qkv(normed)
    query, key, value = projected.chunk(3, -1)
    return query, key, value


def attention_by_heads(query: Tensor, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Softmax attention head by head, (R, W), and each head's sum of exponentials, (R, H)."""
    size = query.shape[1] // heads
    columns, sums = [], []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights = (query[:, part] @ key[:, part].T / size**0.5).exp()
        columns.append(weights @ value[:, part] / weights.sum(-1, keepdim=True))
        sums.append(weights.sum(-1))
    return torch.cat(columns, 1), torch.stack(sums, 1)


@pytest.mark.parametrize("learn", ["tokens", "keys"])
@pytest.mark.parametrize("kind", ["vit", "timm"])
def test_kv_prompts_are_the_exact_attention(
    kind: str, learn: str, make_backbone: Callable[..., Backbone]
) -> None:
    """Over concatenated keys, and as APT's identity: (1 - l) attention(X) + l attention(P)."""
    backbone = make_backbone(**({"vision": TIMM, "custom": True} if kind == "timm" else {}))
    learner = disturbed("kv_prompts", backbone, learn=learn, tokens=3, blocks=[1])
    block = backbone.vision.blocks[1]
    seen: dict[str, Tensor] = {}
    norm = block.ln_1 if kind == "vit" else block.norm1
    project = block.attn.out_proj if kind == "vit" else block.attn.proj
    hook = norm.register_forward_hook(lambda _, __, output: seen.update(normed=output[0]))
    behind = (block.ln_2 if kind == "vit" else block.norm2).register_forward_hook(
        lambda _, inputs, __: seen.update(after=inputs[0][0])
    )
    before = block.register_forward_pre_hook(lambda _, inputs: seen.update(before=inputs[0][0]))
    images = filled("images", (2, 3, *backbone.image_size), 1.0)
    if kind == "vit":  # the block is run by hand there
        seen["before"] = backbone.vision.states(images, 1).tokens[0]
    learner.embed_images(images)
    for handle in (hook, behind, before):
        handle.remove()

    query, key, value = heads_of(block, seen["normed"])
    if learn == "keys":
        own_key, own_value = learner.tokens["image"][0], learner.values["image"][0]
    else:
        _, own_key, own_value = heads_of(block, norm(learner.tokens["image"][0]))
    heads = int(block.attn.num_heads)
    together, _ = attention_by_heads(query, torch.cat([own_key, key]), torch.cat([own_value, value]), heads)
    got = seen["after"] - seen["before"]
    torch.testing.assert_close(got, project(together), rtol=1e-4, atol=1e-4)

    of_tokens, sums = attention_by_heads(query, key, value, heads)
    of_prompts, prompt_sums = attention_by_heads(query, own_key, own_value, heads)
    share = (prompt_sums / (sums + prompt_sums)).repeat_interleave(query.shape[1] // heads, 1)
    mixed = (1 - share) * of_tokens + share * of_prompts
    torch.testing.assert_close(mixed, together, rtol=1e-4, atol=1e-5)


def test_before_one_block_they_are_vpt_without_the_prompts_own_output(backbone: Backbone) -> None:
    """In the last block nobody reads that output, so there both say the same, to the last digits."""
    learner = disturbed("kv_prompts", backbone, blocks=[2], tokens=4)
    images = filled("images", (2, 3, *backbone.image_size), 1.0)
    tower = backbone.vision
    x = tower.states(images, 2).tokens
    prompts = learner.tokens["image"].expand(2, -1, -1)
    x = tower.blocks[2](torch.cat([x[:, :1], prompts, x[:, 1:]], 1))
    expected = tower.finish(torch.cat([x[:, :1], x[:, 5:]], 1))
    torch.testing.assert_close(learner.embed_images(images), expected, rtol=1e-4, atol=2e-5)

    deep = tower.encode(images, VisualPrompts(filled("deep", (3, 4, 64), 0.3)))
    several = build("kv_prompts", backbone, NAMES, tokens=4).eval()
    assert not torch.allclose(several.embed_images(images), deep, atol=1e-3)


def test_learned_keys_start_where_learned_tokens_do(backbone: Backbone, images: Tensor) -> None:
    both: dict[str, Any] = {"towers": "both", "tokens": 2, "seed": 3}
    tokens = build("kv_prompts", backbone, NAMES, **both).eval()
    keys = build("kv_prompts", backbone, NAMES, learn="keys", **both).eval()
    torch.testing.assert_close(tokens(images), keys(images), rtol=0, atol=1e-4)
    pair = keys_values_of(backbone.text.blocks[0], tokens.tokens["text"][0])
    torch.testing.assert_close(pair.keys, keys.tokens["text"][0])
    count = lambda learner: sum(p.numel() for p in learner.learned_parameters().values())  # noqa: E731
    assert count(keys) == 2 * count(tokens)


# --- both


@pytest.mark.parametrize("name", ["apt", "kv_prompts"])
@pytest.mark.parametrize("context_length", [0, 4])
def test_packed_sentences_equal_padded_ones(name: str, context_length: int, backbone: Backbone) -> None:
    learner = disturbed(name, backbone, towers="text", context_length=context_length)
    assert learner.static_images
    tower = backbone.text
    padded = tower.encode_plain(learner.layout, learner.context, adapters=learner._adapters("text"))
    torch.testing.assert_close(learner.class_embeddings(), padded, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(padded, tower.encode(learner.layout, learner.context), atol=1e-2)


@pytest.mark.parametrize("name", ["apt", "kv_prompts"])
def test_chosen_blocks(name: str, backbone: Backbone, images: Tensor) -> None:
    learner = disturbed(name, backbone, blocks=[2, 1, 2])
    assert learner.places == {"image": (1, 2)}
    assert learner.frozen_stages() == 2
    states = backbone.image_states(images, 1)
    torch.testing.assert_close(learner(states), learner(images), rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="blocks: the image tower has blocks 0 to 2, got 3"):
        build(name, backbone, NAMES, blocks=[0, 3])


@pytest.mark.parametrize("name", ["apt", "kv_prompts"])
def test_other_classes_and_other_backbones(
    name: str, backbone: Backbone, images: Tensor, make_backbone: Callable[..., Backbone]
) -> None:
    learner = disturbed(name, backbone, towers="both", context_length=2)
    moved = learner.with_classes([*reversed(NAMES)])
    torch.testing.assert_close(moved(images), learner(images).flip(-1), rtol=0, atol=1e-4)
    with pytest.raises(BackboneError, match=r"image tower's blocks can't be edited .*ResNet.*towers=text"):
        build(name, make_backbone(vision=CONV), NAMES)
    assert build(name, make_backbone(vision=CONV), NAMES, towers="text").static_images
