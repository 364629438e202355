"""What every adapter promises, and what is special to one: zero-shot where nothing moves, order, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from vlprompt import create_adapter, create_learner, list_adapters
from vlprompt.adaptation import ADAPTERS, Adapter
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation._tuning import Rule, Tuner
from vlprompt.adaptation.objectives import dispersion, marginal_entropy
from vlprompt.adaptation.tda import DynamicAdapter
from vlprompt.adaptation.views import ViewPlan, open_images
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.backbones.image_only import without_text
from vlprompt.core.errors import BackboneError, CheckpointError, ConfigError, DataError, UnknownNameError
from vlprompt.core.options import options_model
from vlprompt.learners import Learner

NAMES = ["dog", "red circle", "hummingbird", "American staffordshire terrier", "cat"]
OPTIONS: dict[str, dict[str, Any]] = {
    "difftpt": {"generated": 0, "views": 12},
    "tda": {"views": 12},
    "promptalign": {"views": 12},
}


def make_image(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    rng = torch.Generator().manual_seed(seed)
    small = torch.rand(3, 6, 6, generator=rng)
    pixels = torch.nn.functional.interpolate(small[None], size, mode="bilinear")[0]
    return Image.fromarray((255 * pixels.permute(1, 2, 0)).byte().numpy())


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [make_image(i) for i in range(5)]


def build(name: str, start: Backbone | Learner, **options: Any) -> Adapter:
    given = {**views_of(name, 12), **OPTIONS.get(name, {}), **options}
    if name == "promptalign":
        start = start if isinstance(start, Learner) else create_learner("maple", start, NAMES, depth=2)
        given["statistics"] = statistics(start)
    return create_adapter(name, start, NAMES, **given)


def views_of(name: str, count: int) -> dict[str, int]:
    """Return the option of so many views, for adapters that look at more than the image itself."""
    return {"views": count} if "views" in options_model(ADAPTERS.get(name).target).model_fields else {}


def statistics(learner: Learner) -> Any:
    from vlprompt.adaptation.promptalign import SourceStatistics

    height, width = learner.backbone.vision.visual.grid_size
    tokens = 1 + height * width + learner.visual_prompts().tokens.shape[1]  # type: ignore[operator]
    shape = (2, min(3, learner.backbone.vision.layers), tokens, learner.backbone.vision.width)
    return SourceStatistics(torch.zeros(shape), torch.ones(shape), learner.backbone.features_id)


@pytest.mark.parametrize("name", list_adapters())
def test_half_precision_predicts_nearly_the_same(name: str, images: list[Image.Image]) -> None:
    probs = []
    for precision in ("fp32", "bf16"):
        # With these statistics its steps are all alignment, whose signs differ between precisions: small ones, then.
        options = {"lr": 1e-3} if name == "promptalign" else {}
        adapter = build(name, create_backbone("tiny", precision=precision), **options)
        assert all(p.dtype == torch.float32 for p in adapter.learner.learned_parameters().values())
        predictions = adapter.predict(images)
        assert predictions.probs.dtype == torch.float32
        probs.append(predictions.before)
        probs.append(predictions.probs)
    before, after, rough_before, rough_after = probs
    torch.testing.assert_close(rough_before, before, rtol=0, atol=0.05)
    torch.testing.assert_close(rough_after, after, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", list_adapters())
def test_predictions_are_typed_and_the_learner_is_left_alone(
    name: str, backbone: Backbone, images: list[Image.Image]
) -> None:
    adapter = build(name, backbone)
    before = {n: p.clone() for n, p in adapter.learner.named_parameters()}
    predictions = adapter.predict(images)
    assert len(predictions) == 5
    assert predictions.probs.shape == predictions.before.shape == (5, 5)
    torch.testing.assert_close(predictions.probs.sum(-1), torch.ones(5))
    assert predictions.labels == [NAMES[c] for c in predictions.probs.argmax(-1)]
    assert torch.equal(predictions.confidence, predictions.probs.max(-1).values)
    assert predictions.entropy.shape == (5,)
    assert predictions.kept.shape == (5, adapter.plan.count)
    assert int(predictions.views_kept.min()) >= 1
    assert predictions.seconds.shape == (5, 3)
    assert bool((predictions.seconds[:, 1:] > 0).all())
    assert all(torch.equal(p, before[n]) for n, p in adapter.learner.named_parameters())
    assert all(p.grad is None for p in adapter.learner.parameters())
    logits = adapter.learner(torch.stack([backbone.preprocess(p) for p in images])).detach()
    torch.testing.assert_close(predictions.before, logits.softmax(-1), rtol=1e-4, atol=1e-5)
    assert (ADAPTERS.get(name).summary, ADAPTERS.get(name).paper) != ("", "")


@pytest.mark.parametrize(
    "name", [n for n in list_adapters() if ADAPTERS.get(n).target.granularity == "image"]
)
def test_order_and_company_never_change_an_episode(
    name: str, backbone: Backbone, images: list[Image.Image]
) -> None:
    adapter = build(name, backbone)
    together = adapter.predict(images)
    order = [3, 1, 4, 0, 2]
    permuted = adapter.predict([images[i] for i in order])
    assert torch.equal(permuted.probs, together.probs[order])
    alone = torch.cat([adapter.predict(p).probs for p in images])
    torch.testing.assert_close(alone, together.probs, rtol=1e-4, atol=1e-5)
    assert adapter.state() == {}


@pytest.mark.parametrize("name", ["tpt", "ctpt", "difftpt"])
@pytest.mark.parametrize("still", [{"steps": 0}, {"lr": 0.0}])
def test_where_nothing_moves_it_is_zero_shot(
    name: str, still: dict[str, Any], backbone: Backbone, images: list[Image.Image]
) -> None:
    predictions = build(name, backbone, **still).predict(images)
    torch.testing.assert_close(predictions.probs, predictions.before, rtol=1e-4, atol=1e-6)


def test_weight_decay_alone_moves_the_prompt(backbone: Backbone) -> None:
    coop = create_learner("coop", backbone, NAMES, init="a photo of a")
    embeddings, mask = torch.randn(1, 4, backbone.dim), torch.ones(1, 4, dtype=torch.bool)
    flat = Tuner(coop, lambda z, k, w: 0.0 * z.sum((-1, -2)), Rule(1, 0.1, weight_decay=0.5))
    start = coop.context.detach()
    torch.testing.assert_close(flat.tune(embeddings, mask).prompts["context"][0], 0.95 * start)


def test_the_first_step_of_adamw_is_bounded_by_its_rate(
    backbone: Backbone, images: list[Image.Image]
) -> None:
    adapter = build("tpt", backbone, lr=5e-3, weight_decay=0.01)
    assert isinstance(adapter, PromptAdapter)
    views = adapter.encode(open_images(images, backbone))
    mask = adapter.select(adapter.view_logits(views.embeddings), views.embeddings, 0)
    start = dict(adapter.learner.named_parameters())["context"].detach()
    delta = adapter.tuner.tune(views.embeddings, mask).prompts["context"] - start
    moved = (delta + 5e-3 * 0.01 * start).abs()
    assert float(moved.max()) <= 5e-3 * (1 + 1e-5)
    assert float(moved.median()) > 0.9 * 5e-3  # sign descent, whatever the gradient's size


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["tpt", "ctpt"])
def test_cached_views_and_one_shared_pass_equal_the_obvious_loop(
    name: str, steps: int, backbone: Backbone, images: list[Image.Image]
) -> None:
    spread = 50.0 if name == "ctpt" else 0.0
    adapter = build(name, backbone, steps=steps, share=0.3)
    got = adapter.predict(images[:3])
    for i, image in enumerate(open_images(images[:3], backbone)):
        pixels = adapter.plan.make(image, backbone)
        coop = create_learner("coop", backbone, NAMES, init="a photo of a").train()
        optimizer = torch.optim.AdamW(coop.parameters(), lr=5e-3)
        chosen = None
        for _ in range(steps):  # views encoded again in every step, every sentence padded to its full length
            text = backbone.text.encode_plain(coop.layout, coop.context, length=77)
            weights = text / text.norm(dim=-1, keepdim=True)
            logits = backbone.logit_scale * backbone.encode_image(pixels) @ weights.T
            uncertainty = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
            chosen = uncertainty.argsort()[:3] if chosen is None else chosen
            loss = marginal_entropy(logits[chosen]) - spread * dispersion(weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = coop.eval()(pixels[:1]).softmax(-1)[0]
        torch.testing.assert_close(got.probs[i], after, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("method", ["coop", "kgcoop", "prograd", "maple", "ivlp", "vpt", "upt"])
def test_any_learner_with_prompts_is_a_start(
    method: str, backbone: Backbone, images: list[Image.Image]
) -> None:
    learner = create_learner(method, backbone, NAMES)
    adapter = create_adapter("tpt", learner, views=8, share=0.5, steps=2)
    together = adapter.predict(images[:3])
    assert float((together.probs - together.before).abs().max()) > 1e-4
    torch.testing.assert_close(adapter.predict(images[1]).probs[0], together.probs[1], rtol=1e-4, atol=1e-5)
    assert int(together.views_kept[0]) == 4
    uncertain = [marginal(adapter, p, images[0]) for p in (0, 2)]
    assert uncertain[1] < uncertain[0]  # what it minimises went down


def marginal(adapter: Adapter, steps: int, image: Image.Image) -> float:
    """Marginal entropy of the kept views after some steps."""
    assert isinstance(adapter, PromptAdapter)
    views = adapter.encode(open_images(image, adapter.backbone))
    mask = adapter.select(adapter.view_logits(views.embeddings), views.embeddings, 0)
    tuner = Tuner(adapter.learner, adapter.loss, Rule(steps, 1e-3))
    if adapter.needs_pixels:
        prompts = tuner.tune_through_images(views.pixels, mask).prompts
    else:
        prompts = tuner.tune(views.embeddings, mask).prompts
    learner = adapter.learner.with_classes(NAMES).train()  # a copy
    learner.load_trainable_state({n: p[0] for n, p in prompts.items()})
    pixels = adapter.plan.make(open_images(image, adapter.backbone)[0], adapter.backbone)
    return float(marginal_entropy(learner(pixels)[mask[0]].detach()))


def test_other_classes_are_named_with_a_learners_prompts(
    backbone: Backbone, images: list[Image.Image]
) -> None:
    learner = create_learner("coop", backbone, NAMES, context_length=4)
    adapter = create_adapter("tpt", learner, ["owl", "green square"], views=4)
    assert adapter.predict(images[0]).probs.shape == (1, 2)
    assert learner.classnames == tuple(NAMES)


def test_the_gradient_can_be_transformed(backbone: Backbone, images: list[Image.Image]) -> None:
    plain = build("tpt", backbone, optimizer="sgd", lr=0.1).predict(images).probs
    same = build("tpt", backbone, optimizer="sgd", lr=0.1, transform=lambda g: g).predict(images).probs
    half = {"optimizer": "sgd", "lr": 0.2, "transform": lambda g: {n: 0.5 * x for n, x in g.items()}}
    assert torch.equal(same, plain)
    torch.testing.assert_close(build("tpt", backbone, **half).predict(images).probs, plain)
    shapes: list[dict[str, tuple[int, ...]]] = []

    def look(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes.append({n: tuple(g.shape) for n, g in gradients.items()})
        return gradients

    for start in ("coop", "maple"):  # one row per image, whichever way it is tuned
        learner = create_learner(start, backbone, NAMES)
        create_adapter("tpt", learner, views=4, transform=look).predict(images[0])
        assert shapes[-1] == {n: (1, *p.shape) for n, p in learner.trainable_state().items()}


def test_difftpt_without_generated_views_and_filters_is_tpt(
    backbone: Backbone, images: list[Image.Image]
) -> None:
    tpt = build("tpt", backbone, views=64).predict(images[:2])
    options = {"views": 64, "generated": 0, "cosine_share": 1.0, "share": 0.1, "steps": 1}
    for variant in ("code", "paper"):
        diff = build("difftpt", backbone, variant=variant, **options).predict(images[:2])
        assert torch.equal(diff.kept, tpt.kept)
        assert torch.equal(diff.probs, tpt.probs)


def test_tda_starts_as_zero_shot_and_keeps_what_it_may(backbone: Backbone, images: list[Image.Image]) -> None:
    silent = build("tda", backbone, views=1, alpha=0.0, negative_alpha=0.0).predict(images)
    torch.testing.assert_close(silent.probs, silent.before, rtol=1e-4, atol=1e-5)
    adapter = build("tda", backbone, views=1, slots=2, uncertain=(0.0, 1.0))
    assert isinstance(adapter, DynamicAdapter)
    first = adapter.predict([make_image(i) for i in range(40)])
    assert bool((adapter.entropy.isfinite().sum(1) <= 2).all())
    assert int(adapter.entropy.isfinite().sum()) == sum(
        min(2, int((first.before.argmax(-1) == c).sum())) for c in range(5)
    )
    crowded = int(first.before.argmax(-1).mode().values)
    lowest = torch.special.entr(first.before).sum(-1)[first.before.argmax(-1) == crowded].sort().values[:2]
    torch.testing.assert_close(adapter.entropy[crowded].sort().values, lowest, rtol=1e-3, atol=1e-5)
    assert not torch.equal(adapter.predict(images[0]).probs, first.probs[:1])  # it learned from the stream
    adapter.reset()
    assert torch.equal(adapter.predict([make_image(i) for i in range(40)]).probs, first.probs)


def test_tda_equals_its_equations(backbone: Backbone) -> None:
    stream = [make_image(i) for i in range(12)]
    options = {"views": 1, "slots": 2, "negative_slots": 2, "uncertain": (0.0, 0.7), "unlikely": 0.1}
    got = build("tda", backbone, **options).predict(stream)
    learner = create_learner("zero_shot", backbone, NAMES).eval()
    good: dict[int, list[tuple[float, Tensor]]] = {}
    bad: dict[int, list[tuple[float, Tensor, Tensor]]] = {}
    for image, expected in zip(stream, got.probs, strict=True):
        with torch.no_grad():
            f = backbone.encode_image(backbone.preprocess(image)[None])[0]
            z = backbone.logit_scale * learner.class_weights() @ f
        p = z.softmax(0)
        entropy = float(-(p * p.log()).sum())
        c = int(z.argmax())
        good[c] = sorted([*good.get(c, []), (entropy, f)], key=lambda k: k[0])[:2]
        if 0 < entropy / torch.log2(torch.tensor(5.0)) < 0.7:
            mask = ((p > 0.1) & (p < 1)).float()
            bad[c] = sorted([*bad.get(c, []), (entropy, f, mask)], key=lambda k: k[0])[:2]
        for label, keys in good.items():
            z = z + torch.eye(5)[label] * sum(2.0 * torch.exp(-5 * (1 - f @ k)) for _, k in keys)
        for keys3 in bad.values():
            z = z - sum(0.117 * torch.exp(-(1 - f @ k)) * mask for _, k, mask in keys3)
        torch.testing.assert_close(expected, z.softmax(0), rtol=1e-3, atol=1e-5)
    assert bad


def test_boost_adds_an_images_own_views_and_forgets_them(
    backbone: Backbone, images: list[Image.Image]
) -> None:
    plain, boosted = (build("tda", backbone, share=0.5, boost=b, boost_slots=2) for b in (False, True))
    assert float((plain.predict(images).probs - boosted.predict(images).probs).abs().max()) > 1e-5
    assert all(torch.equal(t, boosted.state()[n]) for n, t in plain.state().items())


def test_online_state_survives_a_stop(backbone: Backbone, images: list[Image.Image]) -> None:
    whole = build("tda", backbone).predict(images).probs
    first = build("tda", backbone)
    first.predict(images[:3])
    second = build("tda", backbone)
    second.load_state(first.state())
    assert torch.equal(second.predict(images[3:]).probs, whole[3:])
    with pytest.raises(CheckpointError, match="does not fit tda"):
        second.load_state({"keys": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="keeps no state"):
        build("mta", backbone).load_state({"keys": torch.zeros(1)})


def test_alignment_pulls_token_statistics_to_the_source(
    backbone: Backbone, images: list[Image.Image], tmp_path: Path
) -> None:
    from vlprompt.adaptation.promptalign import SourceStatistics, source_statistics
    from vlprompt.data import load_dataset

    learner = create_learner("maple", backbone, NAMES, depth=2)
    data = load_dataset("digits", "val", shots=2)
    measured = source_statistics(learner, data, batch_size=7)
    seen: list[Tensor] = []
    handle = backbone.vision.blocks[1].register_forward_hook(lambda m, i, o: seen.extend((i[0], o)))
    learner.embed_images(torch.stack([backbone.preprocess(image) for image, _ in data]))
    handle.remove()
    for side, states in enumerate(seen):
        torch.testing.assert_close(measured.means[side, 1], states.mean(0), rtol=1e-4, atol=1e-4)
        variances = states.var(0, unbiased=False)
        torch.testing.assert_close(measured.variances[side, 1], variances, rtol=1e-3, atol=1e-4)
    prompts = learner.visual_prompts()
    inserted = measured.means[
        0, 1, -prompts.tokens.shape[1] :
    ]  # what entered block 1 is this layer's prompt itself
    torch.testing.assert_close(inserted, prompts.tokens[1].detach(), rtol=1e-4, atol=1e-4)
    measured.save(tmp_path / "statistics.safetensors")
    options: dict[str, Any] = {"views": 6, "share": 0.5, "lr": 1e-3, "steps": 4}
    aligned = create_adapter(
        "promptalign", learner, statistics=str(tmp_path / "statistics.safetensors"), **options
    )
    alone = create_adapter("promptalign", learner, statistics=measured, weight=0.0, **options)
    tpt = create_adapter("tpt", learner, **options)
    assert torch.equal(alone.predict(images[:2]).probs, tpt.predict(images[:2]).probs)
    assert not torch.equal(aligned.predict(images[:2]).probs, tpt.predict(images[:2]).probs)
    leaving = create_adapter("promptalign", learner, statistics=measured, variant="paper", **options)
    assert not torch.equal(leaving.predict(images[:2]).probs, aligned.predict(images[:2]).probs)
    with pytest.raises(ConfigError, match="variant=code aligns the first layers - 1 blocks"):
        create_adapter("promptalign", learner, statistics=measured, layers=1)
    other = SourceStatistics(measured.means, measured.variances, "another")
    with pytest.raises(CheckpointError, match="another backbone"):
        create_adapter("promptalign", learner, statistics=other)
    with pytest.raises(DataError, match="moves prompts of the image tower; coop has none"):
        create_adapter("promptalign", create_learner("coop", backbone, NAMES), statistics=measured)
    longer = create_learner("maple", backbone, NAMES, depth=2, context_length=3)
    with pytest.raises(CheckpointError, match="other prompts"):
        create_adapter("promptalign", longer, statistics=measured, views=2).predict(images[0])


class TestViews:
    def test_views_follow_seed_and_image_alone(self, backbone: Backbone, images: list[Image.Image]) -> None:
        for augment in ("crop_flip", "augmix"):
            plan = ViewPlan(6, augment, seed=3)
            first, second = open_images(images[:2], backbone)
            made = plan.make(first, backbone)
            assert made.shape == (6, 3, 32, 32)
            assert torch.equal(made[0], backbone.preprocess(images[0]))
            assert torch.equal(plan.make(open_images(images[0].copy(), backbone)[0], backbone), made)
            assert torch.equal(ViewPlan(9, augment, 3).make(first, backbone)[:6], made)
            for other in (plan.make(second, backbone), ViewPlan(6, augment, 4).make(first, backbone)):
                assert not torch.equal(other[1:], made[1:])
            assert len({row.numpy().tobytes() for row in made}) == 6

    def test_crops_keep_the_share_they_are_told(self, backbone: Backbone) -> None:
        half = Image.new("RGB", (64, 64), "white")
        half.paste("black", (0, 0, 64, 8))  # a border that small crops miss
        first = open_images(half, backbone)[0]
        seen = {
            share: [float(v.min()) < -1 for v in ViewPlan(40, f"crop_flip{share}").make(first, backbone)[1:]]
            for share in ("", ":0.9")
        }
        assert all(seen[":0.9"])
        assert not all(seen[""])
        for wrong in ("crop", "crop_flip:0", "crop_flip:1.5", "augmix:"):
            with pytest.raises(ConfigError, match="augment"):
                build("zero", backbone, augment=wrong)

    def test_an_image_is_the_same_however_it_is_given(
        self, backbone: Backbone, images: list[Image.Image], tmp_path: Path
    ) -> None:
        adapter = build("mta", backbone)
        images[0].save(tmp_path / "a.png")
        array = torch.from_numpy(__import__("numpy").array(images[0])).permute(2, 0, 1)
        ways = [images[0], [images[0]], str(tmp_path / "a.png"), tmp_path / "a.png", array, array[None]]
        results = [adapter.predict(way).probs for way in ways]
        assert all(torch.equal(r, results[0]) for r in results)

    def test_preprocessed_pixels_are_view_0_exactly(
        self, backbone: Backbone, images: list[Image.Image]
    ) -> None:
        pixels = torch.stack([backbone.preprocess(p) for p in images])
        predictions = build("zero", backbone).predict(pixels)
        torch.testing.assert_close(predictions.before, build("zero", backbone).predict(images).before)
        ready = ViewPlan(5).make(open_images(images[0], backbone)[0], backbone)
        assert build("zero", backbone).predict(ready[None]).kept.shape == (1, 5)


class TestMistakes:
    @pytest.mark.parametrize("empty", [[], torch.zeros(0, 3, 32, 32)])
    def test_an_empty_batch(self, empty: Any, backbone: Backbone) -> None:
        with pytest.raises(DataError, match="the batch is empty"):
            build("zero", backbone).predict(empty)

    def test_a_broken_image_is_named(self, backbone: Backbone, tmp_path: Path) -> None:
        make_image(0).save(tmp_path / "good.png")
        (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:80])
        with pytest.raises(DataError, match=r"broken\.png"):
            build("zero", backbone).predict([tmp_path / "good.png", tmp_path / "broken.png"])
        with pytest.raises(DataError, match=r"absent\.png"):
            build("zero", backbone).predict(tmp_path / "absent.png")

    def test_tensors_of_other_shapes(self, backbone: Backbone) -> None:
        for wrong in (torch.zeros(2, 3, 16, 16), torch.zeros(3, 32), torch.zeros(2, 1, 32, 32)):
            with pytest.raises(DataError, match="got"):
                build("zero", backbone).predict(wrong)
        with pytest.raises(DataError, match="got int"):
            build("zero", backbone).predict([3])  # type: ignore[list-item]

    def test_class_names(self, backbone: Backbone) -> None:
        with pytest.raises(DataError, match="at least two classes"):
            create_adapter("tpt", backbone, ["dog"])
        with pytest.raises(ConfigError, match="classnames: required"):
            create_adapter("zero", backbone)

    def test_names_and_options(self, backbone: Backbone) -> None:
        with pytest.raises(UnknownNameError, match="Did you mean 'difftpt'"):
            create_adapter("diftpt", backbone, NAMES)
        with pytest.raises(ConfigError, match=r"share: .*\n.*stepps: unknown key; did you mean 'steps'"):
            create_adapter("tpt", backbone, NAMES, share=0, stepps=3)
        with pytest.raises(ConfigError, match="a learner brings its own prompts"):
            create_adapter("tpt", create_learner("coop", backbone, NAMES), init="a sketch of a")
        with pytest.raises(ConfigError, match="63 generated views per image were asked for"):
            create_adapter("difftpt", backbone, NAMES)

    @pytest.mark.parametrize("method", ["zero_shot", "linear_probe", "cocoop", "clip_adapter"])
    def test_learners_without_prompts_of_their_own(self, method: str, backbone: Backbone) -> None:
        with pytest.raises(
            DataError, match=rf"{method} has no prompts that test-time tuning could move.*coop"
        ):
            create_adapter("tpt", create_learner(method, backbone, NAMES))

    def test_feature_space_methods_take_any_learner(
        self, backbone: Backbone, images: list[Image.Image]
    ) -> None:
        learner = create_learner("clip_adapter", backbone, NAMES)
        for name in ("zero", "mta", "tda"):
            assert create_adapter(name, learner, views=4).predict(images).probs.shape == (5, 5)

    def test_a_tower_that_takes_no_context(self, backbone: Backbone) -> None:
        odd = without_text(backbone)
        with pytest.raises(BackboneError, match="can't be learned on this backbone"):
            create_adapter("tpt", odd, NAMES)
