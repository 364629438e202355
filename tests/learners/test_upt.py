"""UPT against MVLPT's code, and what mixing means: who sees whom, once per evaluation, and what a residual keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import read_golden, small_clip
from tests.golden.visual_learners import check_case, put
from vlprompt import create_learner, evaluate, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import DataError
from vlprompt.learners._unified import PromptMixer

GOLDEN = read_golden("upt_small")
NAMES = ["dog", "red circle", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_unified_family_of_mvlpt(case: str, golden_backbone: Backbone) -> None:
    """The cases "transformer", "shallow" and "specific" are its modules fed as they expect (see the recipe)."""
    options = GOLDEN["cases"][case]["options"]
    learner = create_learner("upt", golden_backbone, GOLDEN["classnames"], **options).train()
    spread = {}
    for name, tensor in learner.trainable_state().items():
        if name in ("context", "visual"):
            spread[name] = {"context": 0.02, "visual": 0.04}[name]
        elif "norm" in name:
            spread[name] = 0.1
        else:
            spread[name] = 0.02 if "bias" in name else tensor.shape[1] ** -0.5
    put(case, spread, learner)
    check_case(GOLDEN, case, learner)


@pytest.mark.parametrize(
    ("kind", "crosses"), [("transformer", True), ("tokenwise", False), ("mlp", False), ("identity", False)]
)
def test_who_sees_whom(kind: str, crosses: bool) -> None:
    """MVLPT swaps the axes of tokens and batch, so that in its code no prompt ever sees another ("tokenwise")."""
    mixer = PromptMixer(24, 40, width=16, kind=kind)
    text = torch.randn(3, 24, generator=torch.Generator().manual_seed(0), requires_grad=True)
    visual = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    new_text, new_visual = mixer(text, visual)
    assert new_text.shape == text.shape
    assert new_visual.shape == visual.shape
    to_text, to_visual = torch.autograd.grad(
        new_text[0].square().sum(), (text, visual), allow_unused=True, materialize_grads=True
    )
    assert to_text[0].any()
    assert to_text[1:].any() == crosses
    assert to_visual.any() == crosses


def test_one_side_of_the_common_width_needs_no_projection() -> None:
    mixer = PromptMixer(16, 40, width=16)
    assert not list(mixer.text_in.parameters())
    assert mixer(torch.zeros(2, 16), torch.zeros(1, 2, 40))[0].shape == (2, 16)


def test_the_start_depends_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = (PromptMixer(24, 40, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert not torch.equal(one["text_in.weight"], other["text_in.weight"])


def test_mixing_happens_once_per_evaluation(backbone: Backbone) -> None:
    data = load_dataset("digits", "train", shots=1, seed=1)
    learner = create_learner("upt", backbone, data.classnames)
    count = []
    learner.mixer.register_forward_hook(lambda *_: count.append(1))
    scores = evaluate(learner, data, batch_size=3)
    assert len(count) == 1
    images = torch.stack([backbone.preprocess(data[i][0]) for i in range(len(data))])
    loss = F.cross_entropy(learner.train()(images), torch.tensor(data.labels))
    assert scores["nll"] == pytest.approx(loss.item(), rel=1e-4)
    assert len(count) > 1


def test_a_phrase_survives_only_beside_a_residual(backbone: Backbone) -> None:
    ids = backbone.text.require_tokenizer().encode("a photo of a")
    phrase = backbone.text.embed_tokens(ids)

    def likeness(residual: bool) -> Tensor:
        learner = create_learner("upt", backbone, NAMES, init="a photo of a", residual=residual)
        return F.cosine_similarity(learner.prompts()[0], phrase).min()

    assert likeness(True) > 0.6
    assert likeness(False) < 0.5


def test_class_specific_context_is_bound_to_its_classes(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("upt", backbone, NAMES, class_specific=True)
    assert learner.context.shape == (12, 64)
    assert learner(images).shape == (6, 3)
    with pytest.raises(DataError, match="one set of parameters per class"):
        learner.with_classes(["ring", "cross"])
