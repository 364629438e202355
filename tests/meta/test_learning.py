"""Meta-training against loops written out by hand: MAML's gradients, the inner step, the second order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.meta.conftest import MakeEpisodes
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.learners import Learner
from vlprompt.learners._context import context_layout
from vlprompt.meta.episodes import Episode, EpisodeBatches, Side
from vlprompt.meta.learning import MetaPrompts
from vlprompt.meta.options import MetaOptions
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

NAMES = ("dog", "red circle")
PROMPTED = ("coop", "cocoop", "kgcoop", "prograd", "vpt", "upt", "maple", "ivlp", "promptsrc", "mvlpt")


def _module(
    backbone: Backbone, learner: str = "coop", regulator: str = "identity", **options: object
) -> MetaPrompts:
    sizes = {"coop": {"context_length": 3}, "vpt": {"visual_length": 2}}.get(learner, {})
    meta = MetaOptions.model_validate({"regulator": {"name": regulator}, "inner_lr": 0.5, **options})
    return MetaPrompts(create_learner(learner, backbone, NAMES, **sizes).train(), meta)


def _by_hand(backbone: Backbone, context: Tensor, side: Side) -> Tensor:
    """CoOp's cross entropy by a full padded pass over every sentence."""
    layout = context_layout(backbone.text, side.names, len(context))
    weights = F.normalize(backbone.text.encode_plain(layout, context, length=77), dim=-1)
    logits = backbone.logit_scale * F.normalize(side.batch["embedding"], dim=-1) @ weights.T
    return -logits.log_softmax(1)[range(len(logits)), side.batch["label"]].mean()


def _maml(
    backbone: Backbone, context: Tensor, episode: Episode, rate: float, steps: int, longest: float = torch.inf
) -> Tensor:
    """First-order MAML: the query's gradient at the adapted prompts; inner gradients are cut to a length."""
    moved = context.detach().clone()
    for _ in range(steps):
        leaf = moved.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_by_hand(backbone, leaf, episode.support), leaf)
        moved = moved - rate * gradient * min(1.0, longest / float(gradient.norm()))
    leaf = moved.requires_grad_()
    return torch.autograd.grad(_by_hand(backbone, leaf, episode.query), leaf)[0]


@pytest.mark.parametrize(("steps", "longest"), [(1, None), (2, None), (2, 0.1)])
def test_without_a_regulator_it_is_first_order_maml(
    backbone: Backbone, make_episodes: MakeEpisodes, steps: int, longest: float | None
) -> None:
    module = _module(backbone, inner_steps=steps, inner_clip=longest)
    episodes = [make_episodes().draw(i) for i in range(2)]
    total = torch.stack(list(module.loss({"episodes": episodes}).values())).sum()
    (found,) = torch.autograd.grad(total, module.learner.context)
    own = module.learner.context
    expected = torch.stack(
        [_maml(backbone, own, e, 0.5, steps, longest or torch.inf) for e in episodes]
    ).mean(0)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("regulator", ["identity", "diagonal", "low_rank"])
def test_the_inner_step_at_the_start_is_that_of_sgd(
    backbone: Backbone, make_episodes: MakeEpisodes, regulator: str
) -> None:
    module, episode = _module(backbone, regulator=regulator), make_episodes().draw(3)
    before = module.learner.context.detach().clone()
    classifier = module._classifier(episode.support)
    situation = module._situation(episode.support)
    moved = module.adapt(classifier, module.theta(), episode.support.batch, situation).theta["context"]

    other = module.learner.with_classes(episode.support.names)
    optimizer = torch.optim.SGD([other.context], lr=0.5)
    sum(other.loss(episode.support.batch).values()).backward()
    optimizer.step()
    torch.testing.assert_close(moved, other.context, rtol=1e-6, atol=1e-7)
    assert torch.equal(module.learner.context, before)  # functional: nothing is moved in place


@pytest.mark.parametrize("regulator", ["diagonal", "low_rank", "gated", "two_gradients"])
def test_the_regulator_is_taught_by_the_query(
    backbone: Backbone, make_episodes: MakeEpisodes, regulator: str
) -> None:
    """Its gradient through the whole episode equals central differences along itself."""
    options = {"name": regulator, **({"agreement": 0.0} if regulator == "gated" else {})}
    module, episode = _module(backbone, regulator=regulator, inner_lr=0.2), make_episodes().draw(1)
    module = MetaPrompts(module.learner, module.options.model_copy(update={"regulator": options}))
    phi = list(module.regulator.parameters())
    with torch.no_grad():
        for parameter in phi:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(module.episode_losses(episode)["query"], phi, allow_unused=True)
    gradient = [torch.zeros_like(p) if g is None else g for g, p in zip(found, phi, strict=True)]
    norm = torch.stack([g.norm() for g in gradient]).norm()
    assert norm > 0
    step, values = 0.02, []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, g in zip(phi, gradient, strict=True):
                parameter += sign * step * g / norm
        values.append(float(module.episode_losses(episode)["query"].detach()))
        with torch.no_grad():
            for parameter, g in zip(phi, gradient, strict=True):
                parameter -= sign * step * g / norm
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(norm), rel=0.05)


def test_the_second_order_gradient_equals_finite_differences(
    backbone: Backbone, make_episodes: MakeEpisodes
) -> None:
    episode, slopes = make_episodes().draw(2), {}
    for again in (True, False):
        module = _module(backbone, second_order=again, inner_lr=2.0)
        context = module.learner.context
        (gradient,) = torch.autograd.grad(module.episode_losses(episode)["query"], context)
        if again:
            direction = gradient / gradient.norm()
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    context += sign * 2e-3 * direction
                values.append(float(module.episode_losses(episode)["query"].detach()))
                with torch.no_grad():
                    context -= sign * 2e-3 * direction
            measured = (values[0] - values[1]) / 4e-3
        slopes[again] = float((gradient * direction).sum().detach())
    assert slopes[True] == pytest.approx(measured, rel=0.03)
    assert abs(slopes[False] - measured) > 3 * abs(slopes[True] - measured)


@pytest.mark.parametrize("name", PROMPTED)
def test_every_learner_of_prompts_can_be_meta_trained(
    name: str, backbone: Backbone, make_episodes: MakeEpisodes
) -> None:
    module = _module(backbone, name, "low_rank")
    pixels = not module.learner.static_images
    episode = make_episodes(pixels=pixels, ways=3, support=1).draw(0)
    torch.stack(list(module.loss({"episodes": [episode]}).values())).sum().backward()
    assert set(module.regulator.shapes) == {
        n for n, _ in module.learner.named_parameters() if n in ("context", "deep_context", "visual")
    }
    for prompt in module.regulator.shapes:
        assert module.learner.get_parameter(prompt).grad.abs().max() > 0, prompt
        assert module.regulator.up[prompt].grad.abs().max() > 0, prompt


@pytest.mark.parametrize("name", ["zero_shot", "linear_probe", "tip_adapter", "clip_lora"])
def test_learners_without_shared_prompts_refuse(name: str, backbone: Backbone) -> None:
    with pytest.raises(DataError, match="nothing can be meta-learned"):
        MetaPrompts(create_learner(name, backbone, NAMES), MetaOptions())


class _Stop(Callback):
    """Kills a run in the middle of an epoch, as a user would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def _train(
    backbone: Backbone, make_episodes: MakeEpisodes, folder: Path, *stops: Callback, resume: bool = False
) -> MetaPrompts:
    module = _module(backbone, regulator="low_rank", average=0.8)
    options = TrainOptions(epochs=2, lr=0.01, optimizer="adamw", checkpoint_seconds=0, seed=4)
    trainer = Trainer(module, EpisodeBatches(make_episodes(), 2), options, folder, callbacks=stops)
    trainer.run(resume)
    return module


def test_a_killed_run_ends_with_the_same_bits(
    backbone: Backbone, make_episodes: MakeEpisodes, tmp_path: Path
) -> None:
    whole = _train(backbone, make_episodes, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        _train(backbone, make_episodes, tmp_path / "cut", _Stop(3))
    resumed = _train(backbone, make_episodes, tmp_path / "cut", resume=True)
    ours, theirs = whole.trainable_state(), resumed.trainable_state()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(whole.learner.context, whole.mean["context"])  # the running mean is what is kept


def test_groups_have_rates_of_their_own_and_are_clipped_apart(
    backbone: Backbone, make_episodes: MakeEpisodes
) -> None:
    module = _module(backbone, regulator="diagonal", regulator_lr=0.25)
    options = TrainOptions(optimizer="adamw", weight_decay=0.1)
    trainer = Trainer(module, EpisodeBatches(make_episodes(), 2), options)
    prompts, phi = trainer.optimizer.param_groups
    assert (prompts["weight_decay"], phi["weight_decay"], phi["rate"]) == (0.1, 0.0, 0.25)
    gradients = {
        "learner.context": torch.full((3, 64), 10.0),
        "regulator.scale.context": torch.full((3, 64), 1e-3),
    }
    clipped = module.transform_gradients(gradients)
    assert float(clipped["learner.context"].norm()) == pytest.approx(1.0)
    assert torch.equal(clipped["regulator.scale.context"], gradients["regulator.scale.context"])


def test_figures_on_held_out_domains_are_those_of_the_steps(
    backbone: Backbone, make_episodes: MakeEpisodes
) -> None:
    module, episode = _module(backbone, regulator="diagonal"), make_episodes().draw(5)
    numbers = module.evaluate([episode])
    learner: Learner = module.learner.with_classes(episode.query.names)
    with torch.no_grad():
        hit = learner.batch_logits(episode.query.batch).argmax(1) == episode.query.batch["label"]
    assert numbers["unadapted_accuracy"] == pytest.approx(float(hit.float().mean()))
    assert numbers["accuracy"] == numbers["plain_accuracy"]  # at the start the regulator does nothing
    moved = module.learner.context.detach() - 0.5 * _slope(backbone, module.learner.context, episode.support)
    assert numbers["loss"] == pytest.approx(float(_by_hand(backbone, moved, episode.query)), rel=1e-4)


@pytest.mark.parametrize("learner", ["coop", "vpt"])
def test_an_evaluating_learner_is_asked_anew_at_every_prompt(
    backbone: Backbone, make_episodes: MakeEpisodes, learner: str
) -> None:
    module = _module(backbone, learner)
    module.eval()  # in which mode learners keep what their prompts alone decide
    side = make_episodes(pixels=learner == "vpt").draw(5).query
    classifier, theta = module._classifier(side), {n: t.detach() for n, t in module.theta().items()}
    other = {n: 10 * t for n, t in theta.items()}
    with torch.no_grad():
        before = classifier.logits(theta, side.batch)
        moved = classifier.logits(other, side.batch)
        assert not torch.equal(before, moved)
        assert torch.equal(before, classifier.logits(theta, side.batch))
        classifier.logits(other, side.batch)
        assert torch.equal(before, classifier(lambda learner: learner.batch_logits(side.batch)))


def _slope(backbone: Backbone, context: Tensor, side: Side) -> Tensor:
    leaf = context.detach().clone().requires_grad_()
    return torch.autograd.grad(_by_hand(backbone, leaf, side), leaf)[0]
