"""Mask tuning against the authors' code, the obvious way to mask a tower, and what the trainer makes of it."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip
from tests.golden.weights import filled
from vlprompt import create_backbone, create_learner, fit, load_dataset
from vlprompt.artefacts import read
from vlprompt.backbones import Backbone
from vlprompt.backbones.masks import maskable
from vlprompt.backbones.reweighted import ReweightedBackbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.data import ImageDataset
from vlprompt.errors import BackboneError, ConfigError, NonFiniteError, UnknownNameError
from vlprompt.learners import Learner
from vlprompt.learners._masks import Importance, agreement, choose, gradient_dropout
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.training.batches import epoch_plan
from vlprompt.training.callbacks import Callback

GOLDEN = read_golden("ramt_small")
NAMES = ["dog", "red circle", "hummingbird", "boeing 737-800"]
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
FORMS = ("amt", "mmt", "pmt")
TOWERS: dict[str, dict[str, Any]] = {
    "vit": {},
    "timm": {"vision": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear",
                        "timm_model_pretrained": False}, "custom": True},
    "resnet": {"vision": {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16}},
}  # fmt: skip
# Adam without decay at a rate that can switch weights off in a few steps.
RECIPE: dict[str, Any] = {
    "optimizer": "adamw", "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 0.0, "callbacks": [],
}  # fmt: skip


@pytest.fixture(scope="module", params=list(TOWERS))
def tower(request: pytest.FixtureRequest, make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone(**TOWERS[request.param])


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits", "train", shots=2, seed=1)


@pytest.fixture
def batch(images: Tensor) -> dict[str, Tensor]:
    return {"image": images, "label": LABELS}


def scatter(learner: Learner, share: float = 0.2, seed: int = 3) -> Learner:
    """Switch some weights off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for score in learner.scores.values():
            score[torch.rand(score.shape, generator=generator) < share] = 0.001
    return learner


def obvious(learner: Learner, scores: dict[str, Tensor], images: Tensor) -> Tensor:
    """Embeddings of a copy of the tower whose weights are products, all made at once; straight-through by hand."""
    visual = copy.deepcopy(learner.backbone.vision.visual)
    weights = {}
    for name, score in scores.items():
        hard = (score.detach() > learner.threshold).float()
        weights[name] = visual.get_parameter(name).detach() * (hard + score - score.detach())
    return torch.func.functional_call(visual, weights, (images,))


def named_scores(learner: Learner) -> dict[str, Tensor]:
    return {key.replace("/", "."): score for key, score in learner.scores.items()}


# --- what is masked


def test_weights_of_a_vision_transformer_and_their_sizes() -> None:
    with torch.device("meta"):
        visual = CLIP(**open_clip.get_model_config("ViT-B-16")).visual
    sizes: dict[str, int] = {}
    for name, kind in maskable(visual).items():
        sizes[kind] = sizes.get(kind, 0) + visual.get_parameter(name).numel()
    assert sizes["attention.in"] + sizes["attention.out"] == 28_311_552
    assert sizes["mlp.in"] + sizes["mlp.out"] == 56_623_104
    assert sizes["patch"] == 589_824
    assert sum(sizes.values()) == 85_524_480


def test_groups_of_every_kind_of_tower(tower: Backbone) -> None:
    names = {form: set(create_learner(form, tower, NAMES).kinds) for form in FORMS}
    weights = {n for n, p in tower.vision.visual.named_parameters() if p.dim() in (2, 4)}
    head = {n for n in weights if n == "proj" or "head" in n or "positional" in n}
    assert names["pmt"] == weights - head
    assert not names["amt"] & names["mmt"]
    patch = names["pmt"] - names["amt"] - names["mmt"]
    assert len(patch) == (3 if tower.vision.kind == "conv" else 1)  # a ResNet's stem, a ViT's patch embedding
    assert set(create_learner("amt", tower, NAMES, patch=True).kinds) == names["amt"] | patch


def test_the_embedded_backbone_can_be_masked() -> None:
    tiny = create_backbone("tiny", "random")
    learner = scatter(create_learner("ramt", tiny, NAMES))
    images = filled("images", (2, 3, *tiny.image_size), 1.0)
    torch.testing.assert_close(learner.embed_images(images), obvious(learner, named_scores(learner), images))
    assert sum(kind == "patch" for kind in maskable(tiny.vision.visual).values()) == 6


def test_weights_by_name(backbone: Backbone) -> None:
    learner = create_learner("amt", backbone, NAMES, tensors=["*resblocks.1.*"])
    assert list(learner.kinds) == [
        "transformer.resblocks.1.attn.in_proj_weight",
        "transformer.resblocks.1.attn.out_proj.weight",
    ]
    with pytest.raises(UnknownNameError, match=r"weight of the image tower.*resblocks\.7"):
        create_learner("amt", backbone, NAMES, tensors=["*resblocks.7.*"])
    with pytest.raises(ConfigError, match="no weights to mask in attention"):
        create_learner("amt", backbone, NAMES, tensors=["*mlp*"])
    with pytest.raises(ConfigError, match=r"threshold: 0\.02 must be below init, 0\.01"):
        create_learner("amt", backbone, NAMES, threshold=0.02)


# --- the masked tower


@pytest.mark.parametrize("form", FORMS)
def test_it_starts_as_zero_shot_to_the_last_bit(form: str, tower: Backbone, images: Tensor) -> None:
    zero = create_learner("zero_shot", tower, NAMES).eval()
    learner = create_learner(form, tower, NAMES).eval()
    with torch.no_grad():
        assert torch.equal(learner(images), zero(images))


@pytest.mark.parametrize("form", FORMS)
def test_output_and_gradient_equal_the_obvious_way(form: str, tower: Backbone, images: Tensor) -> None:
    learner = scatter(create_learner(form, tower, NAMES))
    before = {n: p.clone() for n, p in tower.vision.visual.named_parameters()}
    ours = learner.embed_images(images)
    expected = obvious(learner, named_scores(learner), images)
    torch.testing.assert_close(ours, expected)
    with torch.no_grad():
        assert (ours - tower.image_embeddings(images)).norm() > 0.02 * ours.norm()
    scores = list(learner.scores.values())
    target = filled("target", ours.shape, 1.0)
    gradients = torch.autograd.grad((ours * target).sum(), scores, retain_graph=True)
    for got, want in zip(gradients, torch.autograd.grad((expected * target).sum(), scores), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()) + 1e-7)
    for got, again in zip(gradients, torch.autograd.grad((ours * target).sum(), scores), strict=True):
        assert torch.equal(got, again)  # two backward passes through one graph
    after = dict(tower.vision.visual.named_parameters())
    assert all(torch.equal(after[n], p) and after[n].grad is None for n, p in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_copy_of_a_weight_outlives_its_layer(dtype: torch.dtype, tower: Backbone, images: Tensor) -> None:
    made: list[weakref.ref[Tensor]] = []
    scores = {
        n: tower.vision.visual.get_parameter(n).clone().requires_grad_()
        for n in maskable(tower.vision.visual)
    }

    def make(name: str) -> Callable[[Tensor], Tensor]:
        def product(weight: Tensor) -> Tensor:
            assert sum(ref() is not None for ref in made) <= 4  # those of one attention layer
            result = weight * (scores[name] > 0)
            if torch.is_grad_enabled():
                result = result + 0 * scores[name]
            made.append(weakref.ref(result))
            return result

        return product

    view = ReweightedBackbone(tower, {name: make(name) for name in scores})
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = view.image_embeddings(images).float().square().sum()
    assert len(made) == len(scores)
    assert not any(ref() is not None for ref in made)
    loss.backward()
    # All but the lowest weight are made again for the gradient of their input.
    assert len(made) >= 2 * len(scores) - 1


def test_an_error_inside_the_tower_leaves_the_weights_alone(backbone: Backbone, images: Tensor) -> None:
    learner = scatter(create_learner("pmt", backbone, NAMES)).eval()
    with torch.no_grad():
        expected = backbone.image_embeddings(images)
        block = backbone.vision.blocks[1]
        handle = block.mlp.c_proj.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner(images)
        handle.remove()
        assert torch.equal(backbone.image_embeddings(images), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())


def test_adapters_would_bypass_the_masks_and_are_refused(backbone: Backbone, images: Tensor) -> None:
    with pytest.raises(BackboneError, match="adapters of attention can't be combined"):
        create_learner("amt", backbone, NAMES, prompts="clip_lora")(images)
    text_only = create_learner(
        "amt", backbone, NAMES, prompts="clip_lora", prompt_options={"encoder": "text"}
    )
    assert text_only(images).shape == (6, 4)


# --- the gate


def test_agreement_in_closed_form() -> None:
    a = torch.tensor([1.0, -1.0, 3.0, -3.0, 1.0, 0.0, 2.0, 0.0, 1e-20, 1e-30])
    b = torch.tensor([5.0, -0.1, -1.0, 1.0, -10.0, 2.0, 0.0, 0.0, 1e-20, -1e-30])
    expected = torch.tensor([1, 1, 0.75, 0.75, 1 / 11, 1, 1, 1, 1, 0.5])
    torch.testing.assert_close(agreement(a, b), expected)


def test_agreement_is_the_papers_formula() -> None:
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    formula = 0.5 * (1 + a.sign() * (a + b) / (a.abs() + b.abs()))
    torch.testing.assert_close(agreement(a, b), formula)
    for scale in (1e-6, 1e-12):  # the published code's 1e-8 in the denominator would drop agreeing elements
        torch.testing.assert_close(agreement(scale * a, scale * b), formula)


@pytest.mark.parametrize(("factor", "dropped"), [(-10.0, 10 / 11), (-1.0, 0.5), (-0.1, 1 / 11), (2.0, 0.0)])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_share_of_dropped_elements(factor: float, dropped: float, strength: float) -> None:
    a = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    kept = gradient_dropout(a, factor * a, strength, torch.Generator().manual_seed(2))
    changed = kept != a
    assert float(changed.float().mean()) == pytest.approx(dropped, abs=0.01)
    torch.testing.assert_close(kept[changed], (1 - strength) * a[changed])


def test_draws_depend_on_seed_and_update_only(backbone: Backbone) -> None:
    """So two processes, which hold the same averaged gradients, take the same step."""

    def updates(seed: int) -> list[Tensor]:
        learner = create_learner("ramt", backbone, NAMES, seed=seed)
        task = [torch.ones_like(s) for s in learner.scores.values()]
        gradients = {"cross_entropy": task, "kl": [-t for t in task]}
        torch.manual_seed(len(NAMES))
        return [torch.cat([g.flatten() for g in learner.combine_gradients(gradients)]) for _ in range(2)]

    first, second = updates(1)
    assert not torch.equal(first, second)
    torch.rand(5)
    assert all(torch.equal(a, b) for a, b in zip(updates(1), (first, second), strict=True))
    assert not torch.equal(updates(2)[0], first)
    assert 0.4 < float(first.mean()) < 0.6


# --- losses


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.mark.parametrize(
    ("case", "form", "options"), [("attention", "ramt", {"patch": True}), ("all", "rpmt", {})]
)
def test_equals_the_authors_code(
    case: str, form: str, options: dict[str, Any], golden_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = GOLDEN["cases"][case]
    features = F.normalize(filled("class features", (4, golden_backbone.dim), 1.0), dim=-1)
    monkeypatch.setattr(Backbone, "class_weights", lambda *_: features)
    learner = create_learner(form, golden_backbone, GOLDEN["classnames"], **options).train()
    with torch.no_grad():
        for name, score in named_scores(learner).items():
            layer = name.removesuffix(".in_proj_weight").removesuffix(".weight")
            score.copy_(filled(f"scores/{layer}", score.shape, 0.004, 0.01))
    images = filled("images", (3, 3, *golden_backbone.image_size), 1.0)
    close(images.flatten()[:4], GOLDEN["first_image_values"])
    losses = learner.loss({"image": images, "label": torch.tensor(GOLDEN["labels"])})
    close(learner(images), golden["logits"])
    for name in ("cross_entropy", "norm_penalty", "kl"):
        close(losses[name], golden[name])
    scores = named_scores(learner)
    assert scores.keys() == golden["gradients"].keys()
    task = losses["cross_entropy"] + losses["norm_penalty"]
    first = torch.autograd.grad(task, list(scores.values()), retain_graph=True)
    second = torch.autograd.grad(losses["kl"], list(scores.values()))
    for (name, score), a, b in zip(scores.items(), first, second, strict=True):
        expected = golden["gradients"][name]
        assert int((score <= learner.threshold).sum()) == expected["masked"]
        for got, key in ((a, "task"), (b, "general")):
            want = torch.tensor(expected[key])
            got_some = got.flatten()[:: expected["every"]]
            torch.testing.assert_close(got_some, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
            assert float(got.norm()) == pytest.approx(expected[f"{key}_norm"], rel=1e-4)
        assert float(agreement(a, b).mean()) == pytest.approx(expected["keep_mean"], abs=1e-3)


def test_losses_equal_their_equations(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = scatter(create_learner("ramt", backbone, NAMES, ["art of the {}."], temperature=2.0)).train()
    frozen = create_learner("zero_shot", backbone, NAMES, ["art of the {}."])(batch["image"])
    logits = learner(batch["image"])
    p, p0 = (logits / 2).softmax(-1), (frozen / 2).softmax(-1)
    losses = learner.loss(batch)
    assert sorted(losses) == ["cross_entropy", "kl", "norm_penalty"]
    kl = 2.0**2 * (p0 * (p0.log() - p.log())).sum() / 6
    torch.testing.assert_close(losses["kl"], kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["cross_entropy"], F.cross_entropy(logits, LABELS))
    norm = 1e-4 * sum(s.square().sum().sqrt() for s in learner.scores.values())
    torch.testing.assert_close(losses["norm_penalty"], norm)
    assert sorted(create_learner("amt", backbone, NAMES, norm_weight=0).loss(batch)) == ["cross_entropy"]


def test_while_nothing_is_masked_the_frozen_model_has_nothing_to_say(
    backbone: Backbone, batch: dict[str, Tensor]
) -> None:
    learner = create_learner("ramt", backbone, NAMES).train()
    assert "kl" not in learner.loss(batch)
    next(iter(learner.scores.values())).data[0, 0] = learner.threshold  # at the threshold is off
    assert 0 < float(learner.loss(batch)["kl"].detach()) < 1e-3
    coop = create_learner("ramt", backbone, NAMES, prompts="coop").train()
    assert (
        float(coop.loss(batch)["kl"].detach()) > 1e-3
    )  # its words differ from the hand-written ones from the start


# --- training


def train(backbone: Backbone, data: ImageDataset, form: str = "ramt", epochs: int = 3, lr: float = 3e-3,
          fit_options: dict[str, Any] | None = None, **options: Any) -> Learner:  # fmt: skip
    learner = create_learner(form, backbone, data.classnames, data.templates, **options)
    fit(learner, data, epochs=epochs, lr=lr, batch_size=10, **RECIPE, **(fit_options or {}))
    return learner


def scores_of(learner: Learner) -> Tensor:
    return torch.cat([s.detach().flatten() for s in learner.scores.values()])


def test_without_regularity_it_is_plain_mask_tuning(backbone: Backbone, digits: ImageDataset) -> None:
    plain = scores_of(train(backbone, digits, "amt"))
    assert torch.equal(scores_of(train(backbone, digits, "ramt", gdr_lambda=0.0)), plain)
    gated = train(backbone, digits, "ramt")
    assert not torch.equal(scores_of(gated), plain)
    assert torch.equal(scores_of(train(backbone, digits, "amt", gdr_lambda=1.0)), scores_of(gated))
    assert float((plain <= 0.005).float().mean()) > 0.05  # the authors' code takes no step here


def test_training_follows_a_loop_written_out_by_hand(backbone: Backbone, digits: ImageDataset) -> None:
    """Adam on masks, from the obvious tower and the formulas."""
    learner = create_learner("amt", backbone, digits.classnames, digits.templates)
    scores = {n: s.detach().clone().requires_grad_() for n, s in named_scores(learner).items()}
    images = torch.stack([backbone.preprocess(digits[i][0]) for i in range(len(digits))])
    labels = torch.tensor(digits.labels)
    weights = backbone.class_weights(digits.classnames, digits.templates)
    optimizer = torch.optim.Adam(scores.values(), lr=3e-3)
    for _ in range(4):
        features = F.normalize(obvious(learner, scores, images), dim=-1)
        loss = F.cross_entropy(backbone.logit_scale * features @ weights.T, labels)
        loss = loss + 1e-4 * sum(s.norm() for s in scores.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fit(learner, digits, epochs=4, lr=3e-3, batch_size=len(digits), **RECIPE)
    same = [(learner.masks()[n] == (s > 0.005)).float().mean() for n, s in scores.items()]
    assert min(same) > 0.999  # Adam's step is a sign where gradients are rounding errors
    assert 0.05 < learner.figures()["masked_share"] < 0.6


def test_accumulation_does_not_change_the_step(backbone: Backbone, digits: ImageDataset) -> None:
    found = []
    for parts in (1, 4):
        learner = scatter(create_learner("ramt", backbone, digits.classnames, digits.templates))
        options = {**RECIPE, "optimizer": "sgd", "momentum": 0.0}
        fit(learner, digits, epochs=1, lr=1.0, batch_size=20, accumulation=parts, **options)
        found.append(scores_of(learner))
    moved = (found[0] - scores_of(scatter(create_learner("ramt", backbone, NAMES)))).abs()
    assert float(moved.max()) > 1e-3
    assert float(((found[0] - found[1]).abs() > 1e-4 * moved.max()).float().mean()) < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_takes_nearly_the_same_step(
    precision: str, backbone: Backbone, digits: ImageDataset
) -> None:
    steps = []
    start = scores_of(scatter(create_learner("ramt", backbone, digits.classnames)))
    for chosen in ("fp32", precision):
        learner = scatter(
            create_learner("ramt", backbone, digits.classnames, digits.templates, gdr_lambda=0.0)
        )
        options = {**RECIPE, "optimizer": "sgd", "momentum": 0.0}
        fit(learner, digits, epochs=1, lr=1.0, batch_size=20, precision=chosen, **options)
        steps.append(scores_of(learner) - start)
    assert float(F.cosine_similarity(*steps, dim=0)) > 0.98
    gated = train(backbone, digits, fit_options={"precision": precision})
    assert 0.01 < gated.figures()["masked_share"] < 0.9


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Gradients are averaged before the gate, and all draw the same: the same masks but for sums' last bits."""
    config = """
name: test
backbone: {name: tiny, pretrained: random}
learner: {name: ramt, norm_weight: 0}
data: {name: digits, validate_on: none}
train: {epochs: 3, lr: 300, batch_size: 10, optimizer: sgd, momentum: 0, weight_decay: 0, warmup_epochs: 0}
protocol: {shots: [2], seeds: [1]}
"""
    root, found = Path(__file__).parent.parent.parent, []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        (folder / "run.yaml").write_text(f"{config}output: {folder}\n")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, str(root / "tools/train.py"), "--cfg", str(folder / "run.yaml")],
                       env=environment, check=True, capture_output=True)  # fmt: skip
        (saved,) = folder.glob("test/*/prompt")
        figures = json.loads((saved.parent / "metrics.json").read_text())
        found.append(
            (
                read(saved)[1],
                figures["train/learned/masked_share"],
                figures["train/learned/dropped_gradient_share"],
            )
        )
    (one, off, dropped), (two, other_off, other_dropped) = found
    assert off > 0.01
    assert dropped > 0.01
    assert other_off == pytest.approx(off, rel=0.01)
    assert other_dropped == pytest.approx(dropped, rel=0.01)
    differing = sum(int(np.unpackbits((one[n] ^ two[n]).numpy()).sum()) for n in one)
    assert differing < 0.001 * 8 * sum(bits.numel() for bits in one.values())


class StopAt(Callback):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, trainer: Any, losses: dict[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise InterruptedError


def test_resume_is_bit_identical(backbone: Backbone, digits: ImageDataset, tmp_path: Path) -> None:
    whole = train(backbone, digits, epochs=4)
    options = {k: v for k, v in RECIPE.items() if k != "callbacks"} | {
        "epochs": 4,
        "lr": 3e-3,
        "batch_size": 10,
    }
    learner = create_learner("ramt", backbone, digits.classnames, digits.templates)
    with pytest.raises(InterruptedError):
        fit(learner, digits, folder=tmp_path, checkpoint_seconds=0, callbacks=[StopAt(5)], **options)
    resumed = create_learner("ramt", backbone, digits.classnames, digits.templates)
    fit(resumed, digits, folder=tmp_path, resume=True, callbacks=[], checkpoint_seconds=0, **options)
    assert torch.equal(scores_of(resumed), scores_of(whole))
    assert resumed.figures() == whole.figures()


def test_the_frozen_model_sees_a_picture_once(
    backbone: Backbone, digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached over fixed views, so the frozen tower runs before training only; masks come out as without a cache."""
    calls: list[int] = []
    original = Backbone.image_embeddings

    def counted(self: Backbone, images: Tensor, *rest: Any) -> Tensor:
        calls.append(len(images))
        return original(self, images, *rest)

    monkeypatch.setattr(Backbone, "image_embeddings", counted)
    cached = train(backbone, digits, fit_options={"augmentation": "flip", "views": 2})
    assert sum(calls) == 2 * len(digits)
    calls.clear()
    monkeypatch.setattr("vlprompt.training.fit.TrainingSource.repeats", False)
    fresh = train(backbone, digits, fit_options={"augmentation": "flip", "views": 2})
    assert len(calls) >= 4
    same = (scores_of(cached) > 0.005) == (scores_of(fresh) > 0.005)
    assert float(same.float().mean()) > 0.999


def test_it_forgets_less(backbone: Backbone, digits: ImageDataset) -> None:
    """A random frozen model contradicts the labels: plain masks leave it behind, gated ones less so."""
    drift = {}
    images = torch.stack([backbone.preprocess(digits[i][0]) for i in range(len(digits))])
    zero = create_learner("zero_shot", backbone, digits.classnames, digits.templates)(images).log_softmax(-1)
    for form in ("amt", "ramt"):
        learner = train(backbone, digits, form, epochs=6, norm_weight=0.0).eval()
        with torch.no_grad():
            logits = learner(images)
        drift[form] = float(F.kl_div(logits.log_softmax(-1), zero, reduction="batchmean", log_target=True))
        loss = F.cross_entropy(logits, torch.tensor(digits.labels))
        assert loss < F.nll_loss(zero, torch.tensor(digits.labels))
    assert drift["ramt"] < 0.7 * drift["amt"]


def test_scores_times_s_learn_at_rate_over_s(backbone: Backbone, digits: ImageDataset) -> None:
    plain = train(backbone, digits, "amt", norm_weight=0.0)
    options = {"init": 0.25, "threshold": 0.125, "norm_weight": 0.0}
    scaled = train(backbone, digits, "amt", lr=25 * 3e-3, **options)
    same = [
        float((a == b).float().mean())
        for a, b in zip(plain.masks().values(), scaled.masks().values(), strict=True)
    ]
    assert min(same) > 0.999


def test_too_few_steps_are_told(
    backbone: Backbone, digits: ImageDataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        learner = train(backbone, digits, epochs=1, lr=1e-3)
    assert (
        "ramt: no weight was switched off. Steps times rate must exceed init - threshold = 0.005"
        in caplog.text
    )
    assert learner.figures()["masked_share"] == 0


def test_figures(backbone: Backbone, digits: ImageDataset) -> None:
    learner = create_learner("ramt", backbone, digits.classnames, digits.templates)
    result = fit(learner, digits, epochs=3, lr=3e-3, batch_size=10, **RECIPE)
    masks = learner.masks()
    off = sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert result.metrics["learned/masked_share"] == pytest.approx(off)
    assert off > 0.01
    assert 0.05 < result.metrics["learned/dropped_gradient_share"] < 0.6
    assert 0 < result.metrics["learned/norm_gradient_share"] < 0.5
    assert {"cross_entropy", "kl", "norm_penalty"} <= set(result.history[-1])


# --- which weights


def test_importance_is_the_mean_gradient_over_batches(tower: Backbone, digits: ImageDataset) -> None:
    learner = create_learner("pmt", tower, digits.classnames, digits.templates, select="top", select_count=2)
    options = {**RECIPE, "batch_size": 10}
    fit(learner, digits, epochs=1, lr=1e-4, **options)
    visual = copy.deepcopy(tower.vision.visual).requires_grad_()
    images = torch.stack([tower.preprocess(digits[i][0]) for i in range(len(digits))])
    weights = tower.class_weights(digits.classnames, digits.templates)
    sums = {name: torch.zeros(2) for name in learner.kinds}
    plan = epoch_plan(len(digits), 10, 1, 0)
    for part in plan:
        features = F.normalize(visual(images[part]), dim=-1)
        loss = F.cross_entropy(tower.logit_scale * features @ weights.T, torch.tensor(digits.labels)[part])
        visual.zero_grad()
        loss.backward()
        for name in sums:
            parameter = visual.get_parameter(name)
            gradient = parameter.grad
            sums[name] += torch.stack(
                [gradient.abs().mean(), (gradient * parameter).abs().mean()]
            ).detach() / len(plan)
    for name, value in learner.importance.items():
        assert value.gradient == pytest.approx(float(sums[name][0]), rel=1e-3)
        assert value.saliency == pytest.approx(float(sums[name][1]), rel=1e-3)
        assert value.count == visual.get_parameter(name).numel()
    best = sorted(sums, key=lambda n: -float(sums[n][0]))[:2]
    assert {n for n in sums if learner.scores[n.replace(".", "/")].requires_grad} == set(best)


def test_choosing_by_kind_layer_and_number() -> None:
    found = {
        "a": Importance(4.0, 0, 1),
        "b": Importance(1.0, 0, 3),
        "c": Importance(2.0, 0, 2),
        "d": Importance(0.5, 0, 2),
    }
    kinds: dict[str, Any] = {"a": "attention.in", "b": "attention.in", "c": "mlp.in", "d": "mlp.in"}
    assert choose(found, kinds, "layer", 0.5, 1) == ["a", "c"]
    assert choose(found, kinds, "top", 0.5, 3) == ["a", "b", "c"]
    assert choose(found, kinds, "type", 0.5, 1) == ["a", "b"]  # (4 + 3) / 4 against (4 + 1) / 4
    assert choose(found, kinds, "all", 0.5, 1) == ["a", "b", "c", "d"]


def test_weights_that_were_not_chosen_stay_on(
    backbone: Backbone, digits: ImageDataset, images: Tensor
) -> None:
    learner = train(backbone, digits, "pmt", select="layer", select_share=0.5).eval()
    chosen = {k.replace("/", ".") for k, s in learner.scores.items() if s.requires_grad}
    assert 0 < len(chosen) < len(learner.kinds)
    assert {n for n, m in learner.masks().items() if not m.all()} <= chosen
    other = learner.with_classes(digits.classnames)
    with torch.no_grad():
        assert torch.equal(other(images), learner(images))


def test_selection_needs_training_data(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = create_learner("amt", backbone, NAMES, select="top").train()
    with pytest.raises(ConfigError, match="looks at the training data, which only fit shows"):
        learner.loss(batch)


# --- together with other learners


@pytest.mark.parametrize("prompts", ["coop", "maple", "cocoop", "vpt", "upt", "clip_adapter"])
def test_prompts_and_masks_learn_together(
    prompts: str, backbone: Backbone, digits: ImageDataset, images: Tensor
) -> None:
    learner = create_learner("ramt", backbone, digits.classnames, digits.templates, prompts=prompts)
    alone = create_learner(prompts, backbone, digits.classnames, digits.templates).eval()
    with torch.no_grad():
        torch.testing.assert_close(learner.eval()(images), alone(images))
    before = {n: t.clone() for n, t in learner.trainable_state().items()}
    fit(learner, digits, epochs=2, lr=4e-3, batch_size=10, **RECIPE)
    after = learner.trainable_state()
    assert all(not torch.equal(after[n], t) for n, t in before.items())
    assert {n for n in after if n.startswith("prompts.")}
    assert [n for n in after if "backbone" in n] == []
    restored = create_learner("ramt", backbone, digits.classnames, digits.templates, prompts=prompts).eval()
    restored.load_trainable_state(after)
    with torch.no_grad():
        assert torch.equal(restored(images), learner.eval()(images))


def test_masks_below_the_prompts_learn_too(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    learner = create_learner("pmt", backbone, NAMES, prompts="vpt").train()
    learner.loss(batch)["cross_entropy"].backward()
    assert all(float(score.grad.abs().max()) > 0 for score in learner.scores.values())


def test_only_masks_are_gated(backbone: Backbone, digits: ImageDataset) -> None:
    learner = scatter(create_learner("ramt", backbone, digits.classnames, prompts="coop")).train()
    learned = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    task = [torch.ones_like(p) for p in learned.values()]
    combined = learner.combine_gradients({"cross_entropy": task, "kl": [-10 * t for t in task]})
    for name, gradient in zip(learned, combined, strict=True):
        expected = 1.0 if name == "prompts.context" else 1 / 11
        assert float(gradient.mean()) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ("prograd", "combine_gradients"),
        ("tip_adapter", "prepare"),
        ("kgcoop", "a loss"),
        ("ramt", "combine_gradients"),
    ],
)
def test_what_has_its_own_way_of_training_is_refused(prompts: str, reason: str, backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match=f"{prompts} can't be trained together with masks: it has {reason}"):
        create_learner("ramt", backbone, NAMES, DEFAULT_TEMPLATES, prompts=prompts)


def test_options_of_prompts_are_checked(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="contxt_length"):
        create_learner("ramt", backbone, NAMES, prompts="coop", prompt_options={"contxt_length": 4})
    learner = create_learner("ramt", backbone, NAMES, prompts="coop", prompt_options={"context_length": 3})
    assert learner.prompts.context.shape[0] == 3


def test_a_gradient_that_is_not_finite_is_an_error(backbone: Backbone, digits: ImageDataset) -> None:
    learner = create_learner("ramt", backbone, digits.classnames, digits.templates)
    next(iter(learner.scores.values())).data.fill_(1e38)
    with pytest.raises(NonFiniteError):
        fit(learner, digits, epochs=1, lr=1e-3, batch_size=10, **RECIPE)
