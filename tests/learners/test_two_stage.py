"""2SFS: the authors' numbers, which norms learn, two phases, and names with and without a vector of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.golden.text_learners import close, read_golden, small_clip, small_embeddings
from tests.golden.weights import filled
from tests.learners.twenty_steps import golden_images, train_twenty_steps
from vlprompt import create_learner, load, save
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import BackboneError, DataError
from vlprompt.learners import Learner

GOLDEN = read_golden("two_stage_small")
NAMES = ["dog", "red circle", "American staffordshire terrier"]
CONV = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16}


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


def norms_of(learner: Learner) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in learner.learned_parameters().items() if name != "head"}


def test_equals_the_authors_code(golden_backbone: Backbone) -> None:
    golden = GOLDEN["norms"]
    learner = create_learner("two_stage", golden_backbone, GOLDEN["classnames"])
    small_embeddings(GOLDEN, golden_backbone)  # checks the recipe's images
    with torch.no_grad():
        for name, parameter in norms_of(learner).items():
            parameter.copy_(filled(f"norms/{name}", parameter.shape, 0.1))
    learner.train().enter_phase(0, True)
    batch = {"image": golden_images(learner), "label": torch.tensor(GOLDEN["labels"])}
    losses = learner.loss(batch)
    losses["cross_entropy"].backward()
    close(losses["cross_entropy"], golden["loss"])
    for name, parameter in norms_of(learner).items():
        assert parameter.grad is not None
        torch.testing.assert_close(
            parameter.grad.norm(), torch.tensor(golden["gradients"][name]["norm"]), rtol=1e-4, atol=1e-6
        )
        close(parameter.grad.flatten()[::61], golden["gradients"][name]["every_61st"])
    learner.after_epoch(0, 1)  # the head becomes the tuned texts
    close(learner.eval()(golden_images(learner)), golden["logits"])


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=["without decay", "the paper's rate and decay"])
def test_twenty_steps_equal_the_authors(run: dict, golden_backbone: Backbone) -> None:
    """Both stages, the restart between them, and what is asked of trained and of other classes after it."""
    learner = create_learner("two_stage", golden_backbone, GOLDEN["classnames"])
    losses = train_twenty_steps(
        learner,
        GOLDEN["labels"],
        lr=run["lr"],
        weight_decay=run["weight_decay"],
        optimizer="adamw",
        schedule="cosine",
        final_lr=1e-6,
    )
    assert losses == pytest.approx(run["losses"], rel=1e-3)
    with torch.no_grad():
        logits = learner(golden_images(learner))
        torch.testing.assert_close(logits, torch.tensor(run["logits"]), rtol=1e-3, atol=1e-2)
        other = learner.with_classes(run["other_classes"])
        torch.testing.assert_close(
            other(golden_images(learner)), torch.tensor(run["other_logits"]), rtol=1e-3, atol=1e-2
        )
    assert other.head_places == [None, 2, None, 0]


def test_the_norms_that_learn_are_those_of_the_authors_code(golden_backbone: Backbone) -> None:
    """Theirs hands 6 more to the optimiser than it lets learn: the norms outside of the blocks, which stay frozen."""
    learner = create_learner("two_stage", golden_backbone, GOLDEN["classnames"])
    assert sorted(norms_of(learner)) == GOLDEN["learned"]
    frozen = [name for name in GOLDEN["handed_to_the_optimiser"] if "resblocks" not in name]
    assert frozen == [
        "ln_final.bias",
        "ln_final.weight",
        "visual.ln_post.bias",
        "visual.ln_post.weight",
        "visual.ln_pre.bias",
        "visual.ln_pre.weight",
    ]
    with_outer = create_learner("two_stage", golden_backbone, GOLDEN["classnames"], outer_norms=True)
    assert len(norms_of(with_outer)) == len(GOLDEN["learned"]) + len(frozen)


@pytest.mark.parametrize("outer", [False, True])
def test_it_starts_as_zero_shot(outer: bool, backbone: Backbone, images: torch.Tensor) -> None:
    learner = create_learner("two_stage", backbone, NAMES, outer_norms=outer).eval()
    expected = create_learner("zero_shot", backbone, NAMES).eval()(images)
    torch.testing.assert_close(learner(images), expected, rtol=0, atol=2e-5)


def test_outer_norms_learn_where_they_are_asked_for(backbone: Backbone, images: torch.Tensor) -> None:
    learner = create_learner("two_stage", backbone, NAMES, outer_norms=True).train()
    sum(learner.loss({"image": images, "label": torch.arange(6) % 3}).values()).backward()
    outer = {name: p for name, p in norms_of(learner).items() if ".outer." in name}
    assert sorted(outer) == sorted(
        f"{tower}.outer.{number}.{part}"
        for tower, count in (("text", 1), ("vision", 2))
        for number in range(count)
        for part in ("weight", "bias")
    )
    assert all(p.grad is not None and p.grad.any() for p in outer.values())


def test_the_second_stage_moves_the_head_alone_and_makes_no_graph_of_the_towers(
    backbone: Backbone, images: torch.Tensor
) -> None:
    learner = create_learner("two_stage", backbone, NAMES).train()
    learner.enter_phase(1, True)
    assert not learner.embed_images(images).requires_grad
    learner.loss({"image": images, "label": torch.arange(6) % 3})["cross_entropy"].backward()
    assert learner.head.grad is not None
    assert all(p.grad is None for p in norms_of(learner).values())


def test_the_head_starts_at_the_tuned_texts(backbone: Backbone) -> None:
    learner = create_learner("two_stage", backbone, NAMES).train()
    with torch.no_grad():
        for name, parameter in norms_of(learner).items():
            parameter.copy_(filled(name, parameter.shape, 0.1))
    before = learner.head.detach().clone()
    learner.enter_phase(1, is_new=False)  # a run that goes on keeps what it has
    assert torch.equal(learner.head, before)
    learner.enter_phase(1, is_new=True)
    tuned = F.normalize(learner.backbone.text.encode(learner.layout, adapters=learner.text.edits()), dim=-1)
    torch.testing.assert_close(learner.head.detach(), tuned.detach())
    assert not torch.allclose(learner.head, before, atol=1e-3)


def test_names_with_a_vector_and_names_without(
    backbone: Backbone, images: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = create_learner("two_stage", backbone, NAMES).eval()
    with torch.no_grad():
        for name, parameter in learner.learned_parameters().items():
            parameter.add_(filled(name, parameter.shape, 0.1))
    caplog.set_level("INFO", "vlprompt")
    other = learner.with_classes(["tulip", "Red_Circle", "blue square"])
    assert "two_stage: the head names 1 of 3 classes; without it: 'tulip', 'blue square'" in caplog.text
    assert other.head_places == [None, 1, None]
    new = learner.with_classes(["tulip", "blue square"])
    with torch.no_grad():
        logits = other(images)
        torch.testing.assert_close(logits[:, 1], learner(images)[:, 1], rtol=0, atol=1e-4)
        torch.testing.assert_close(logits[:, [0, 2]], new(images), rtol=0, atol=1e-4)
        # Back to the trained names, in another order, each has its vector again.
        back = new.with_classes(NAMES[::-1])
        assert torch.equal(back(images), learner(images).flip(1))
        save(other, tmp_path)
        loaded = load(tmp_path, backbone)
        assert loaded.head_classes == learner.head_classes
        assert torch.equal(loaded(images), logits)


def test_towers_it_can_t_edit_are_refused(make_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(BackboneError, match="image tower's blocks can't be edited"):
        create_learner("two_stage", make_backbone(vision=CONV), NAMES)


def test_tasks_can_t_share_its_head(backbone: Backbone) -> None:
    from vlprompt.classification.multitask import MultiTask

    learner = create_learner("two_stage", backbone, NAMES)
    with pytest.raises(DataError, match="two_stage keeps one set of values per class"):
        MultiTask(learner, {"a": (NAMES, ["a {}."]), "b": (["cat", "cow"], ["a {}."])})
