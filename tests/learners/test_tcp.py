"""TCP against the authors' code, a plain pass that splices its tokens in, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import read_golden, small_clip, small_embeddings
from tests.golden.trajectories import check_start, check_trajectory
from tests.golden.visual_learners import put
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import ConfigError, VLPromptError
from vlprompt.learners import LEARNERS, Learner

GOLDEN = read_golden("tcp_small")
NAMES = ["dog", "red circle", "American staffordshire terrier", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    learner = create_learner(
        "tcp", golden_backbone, GOLDEN["classnames"], [golden["template"]], **golden["options"]
    )
    spread = {name: 0.02 if name == "context" else 0.05 for name in learner.trainable_state()}
    put(case, spread, learner)

    batch = {"embedding": small_embeddings(GOLDEN, golden_backbone), "label": torch.tensor(GOLDEN["labels"])}
    check_start(golden, learner, batch)
    if "trajectory" not in golden:
        return
    recipe = LEARNERS.get("tcp").target.recipe.train
    options = {name: recipe[name] for name in ("lr", "optimizer", "eps")}
    check_trajectory(golden["trajectory"], learner, batch, **options)


def spliced(learner: Learner, block: int) -> Tensor:
    """Class embeddings by a plain pass of one class at a time, whose tokens 1 to M are replaced before a block."""
    tower = learner.backbone.text
    length = learner.context.shape[0]
    rows = []
    for name, tokens in zip(learner.classnames, learner.class_tokens(), strict=True):
        ids = tower.sentence(f"{name}.")
        words = tower.embed_tokens(ids)
        x = torch.cat([words[:1], learner.context, words[1:]])
        x = (x + tower.positions[: len(x)])[None]
        mask = tower.causal_mask[: x.shape[1], : x.shape[1]]
        for number, layer in enumerate(tower.blocks):
            if number == block:
                x = torch.cat([x[:, :1], tokens[None], x[:, 1 + length :]], dim=1)
            x = layer(x, attn_mask=mask)
        rows.append(tower.project(x[0, -1]))
    return torch.stack(rows)


@pytest.mark.parametrize("block", [1, 2])
def test_tokens_replace_the_context_whole(backbone: Backbone, block: int) -> None:
    """Nothing of the context is mixed in: the authors' mixing weight is read nowhere, and there is no option of it."""
    learner = create_learner("tcp", backbone, NAMES, block=block)
    torch.testing.assert_close(learner.class_embeddings(), spliced(learner, block), rtol=0, atol=1e-5)

    names = list(dict(learner.named_parameters()))
    parameters = [dict(learner.named_parameters())[n] for n in names if not n.startswith("backbone")]
    got = torch.autograd.grad(learner.class_embeddings().square().sum(), parameters)
    expected = torch.autograd.grad(spliced(learner, block).square().sum(), parameters)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))

    with pytest.raises(ConfigError, match="mix: unknown key"):
        create_learner("tcp", backbone, NAMES, mix=0.5)


def test_the_block_lies_two_thirds_of_the_way_up(make_backbone: Callable[..., Backbone]) -> None:
    for layers, block in ((12, 8), (3, 2), (2, 1), (6, 4)):
        learner = create_learner("tcp", make_backbone(text={"layers": layers}), NAMES)
        assert learner.block == block
    with pytest.raises(VLPromptError, match=r"block=6: the text tower has 6 blocks.*1 to 5"):
        create_learner("tcp", learner.backbone, NAMES, block=6)


def test_any_number_of_tokens_and_any_phrase(backbone: Backbone) -> None:
    """The authors' code makes four tokens of width 512, and starts from "a photo of a" whatever phrase it is given."""
    learner = create_learner("tcp", backbone, NAMES, context_length=3)
    assert learner.class_tokens().shape == (len(NAMES), 3, backbone.text.width)

    phrase = create_learner("tcp", backbone, NAMES, init="the origami")
    words = backbone.text.embed_tokens(backbone.text.sentence("the origami")[1:-1])
    assert torch.equal(phrase.context, words)
    assert phrase.class_tokens().shape == (len(NAMES), 2, backbone.text.width)


def test_sentences_end_as_the_template_does_where_that_is_asked_for(
    backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    templates = ["a photo of a {}, a type of pet."]
    plain = create_learner("tcp", backbone, NAMES, templates)
    with caplog.at_level("INFO"):
        long = create_learner("tcp", backbone, NAMES, templates, suffix_from_template=True)
    assert "', a type of pet.'" in caplog.text
    ends = [list(learner.layout.sentences[0][5:]) for learner in (plain, long)]
    assert ends == [backbone.text.sentence("dog.")[1:], backbone.text.sentence("dog, a type of pet.")[1:]]


def test_tokens_follow_the_classes(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("tcp", backbone, NAMES).eval()
    other = learner.with_classes(["ring", NAMES[1]]).eval()
    torch.testing.assert_close(other.class_tokens()[1], learner.class_tokens()[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(other(images)[:, 1], learner(images)[:, 1], rtol=0, atol=1e-4)
    tokens = F.normalize(other.class_tokens().detach(), dim=-1)
    assert float((tokens[0] - tokens[1]).abs().max()) > 0.01
