"""L2P, DualPrompt and CODA-Prompt against the authors' code, and where they differ from it on purpose."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.session_learners import check_all_sessions, fill, plain_vit, second_session, session_batch
from tests.golden.text_learners import read_golden
from tests.golden.trajectories import check_start, check_trajectory, golden_images
from tests.golden.visual_learners import agree
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.learners import Learner
from vlprompt.learners.coda_prompt import CodaPrompt

L2P = read_golden("l2p_small")
DUAL = read_golden("dual_prompt_small")
CODA = read_golden("coda_prompt_small")
DUAL_OPTIONS = {"general_length": 2, "general_blocks": 1, "expert_length": 4, "expert_blocks": 2}
CODA_OPTIONS = {"components": 3, "length": 4, "depth": 2}
ADAM = {"lr": 0.001, "optimizer": "adam", "weight_decay": 0.0}


@pytest.fixture(scope="module")
def vit(tokenizer: TextTokenizer) -> Backbone:
    return plain_vit(L2P, tokenizer)


@pytest.fixture(scope="module")
def l2p(vit: Backbone) -> Callable[[], Learner]:
    options = {"pool": 6, "length": 4, "top": 2, "head": "linear"}
    return lambda: fill(L2P, create_learner("l2p", vit, L2P["first"], **options))


def cosines(learner: Learner, keys: Tensor) -> Tensor:
    query = F.normalize(learner.backbone.image_embeddings(golden_images(learner)), dim=-1)
    return query @ F.normalize(keys.detach(), dim=-1).T


def test_l2p_equals_the_authors_code(l2p: Callable[[], Learner]) -> None:
    learner = l2p()
    batch = session_batch(L2P, learner)
    losses = check_start(L2P, learner, batch)
    for name, value in L2P["losses"].items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4)
    check_trajectory(L2P["trajectory"], learner, batch, **ADAM)


def test_an_image_pulls_its_own_keys_alone(l2p: Callable[[], Learner]) -> None:
    """Smith et al.'s code also pulls those that other images of the batch have chosen."""
    learner = l2p()
    similarity = cosines(learner, learner.keys)  # type: ignore[arg-type]
    chosen = similarity.topk(2, dim=1).indices
    own = sum(1 - similarity[i, k] for i in range(3) for k in chosen[i].tolist())
    everyone = sum(1 - similarity[i, k] for i in range(3) for row in chosen for k in row.tolist())

    losses = learner.train().loss(session_batch(L2P, learner))
    assert losses["keys"].item() == pytest.approx(float(own) / 3, rel=1e-4)
    assert L2P["own_prompt_loss"] == pytest.approx(float(everyone), rel=1e-4)
    assert len({tuple(sorted(row.tolist())) for row in chosen}) > 1  # or both would say the same


def test_dual_prompt_equals_the_authors_code(vit: Backbone) -> None:
    learner = second_session("dual_prompt", DUAL, vit, **DUAL_OPTIONS)
    batch = session_batch(DUAL, learner)
    check_all_sessions(DUAL, DUAL, learner)
    losses = check_start(DUAL, learner, batch)
    for name, value in DUAL["losses"].items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4)
    check_trajectory(DUAL["trajectory"], learner, batch, **ADAM)


def test_a_session_has_one_key_and_the_batch_its_mean(vit: Backbone) -> None:
    """Smith et al.'s code has a key in every block, and adds up images and blocks: here two blocks have the same."""
    learner = second_session("dual_prompt", DUAL, vit, **DUAL_OPTIONS)
    keys = torch.stack([learner.trainable_state()[f"experts.{number}.key"] for number in (0, 1)])
    similarity = cosines(learner, keys)
    assert similarity.argmax(1).tolist() == [
        1,
        1,
        0,
    ]  # what each image finds afterwards; all learn the second

    loss = learner.train().loss(session_batch(DUAL, learner))["keys"].item()
    assert loss == pytest.approx(float((1 - similarity[:, 1]).mean()), rel=1e-4)
    assert DUAL["own_prompt_loss"] == pytest.approx(2 * 3 * loss, rel=1e-4)


@pytest.mark.parametrize(("case", "weight"), [("plain", 0.0), ("orthogonality", 0.1)])
def test_coda_prompt_equals_the_authors_code(case: str, weight: float, vit: Backbone) -> None:
    expected = CODA["cases"][case]
    learner = second_session("coda_prompt", CODA, vit, orthogonality=weight, **CODA_OPTIONS)
    batch = session_batch(CODA, learner)
    check_all_sessions(CODA, expected, learner)
    losses = check_start(expected, learner, batch)
    assert set(losses) == set(expected["losses"])
    for name, value in expected["losses"].items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4)
    check_trajectory(expected["trajectory"], learner, batch, **ADAM)


def parts_of(learner: Learner, number: int) -> dict[str, Tensor]:
    """Return a session's components by name, one matrix for each block."""
    state = learner.trainable_state()
    return {name: state[f"parts.{number}.{name}"].flatten(2) for name in ("prompts", "keys", "attention")}


def test_a_new_session_starts_as_in_the_authors_code(vit: Backbone) -> None:
    learner = second_session("coda_prompt", CODA, vit, **CODA_OPTIONS)
    assert isinstance(learner, CodaPrompt)
    for rows in parts_of(learner, 0).values():
        rows.zero_()
        for block in range(2):
            for number in range(3):
                rows[block, number, 3 * number + block] = 2.0

    learner.begin_session()
    for name, rows in parts_of(learner, 1).items():
        kept = CODA["started"][name]
        agree(name, rows.flatten()[:: kept["every"]], torch.tensor(kept["values"]), 1e-5)


def test_new_components_are_at_right_angles_to_learned_ones(vit: Backbone) -> None:
    """Learned components lean towards each other; new ones have no part of what any of them spans."""
    first = create_learner("coda_prompt", vit, CODA["first"], **CODA_OPTIONS)
    for rows in parts_of(first, 0).values():
        rows += 0.5 * rows[:, :1]
    second = first.extend(CODA["second"])

    for earlier, newest in zip(parts_of(second, 0).values(), parts_of(second, 1).values(), strict=True):
        for block in range(2):
            products = newest[block] @ newest[block].T
            torch.testing.assert_close(products, torch.eye(3), rtol=0, atol=1e-5)
            assert float((F.normalize(earlier[block], dim=-1) @ newest[block].T).abs().max()) < 1e-5
            assert float((earlier[block] @ earlier[block].T - torch.eye(3)).abs().max()) > 0.1


def test_orthogonality_is_the_squared_distance_from_the_identity(vit: Backbone) -> None:
    learner = second_session("coda_prompt", CODA, vit, orthogonality=2.0, **CODA_OPTIONS)
    expected = 0.0
    for first, second in zip(parts_of(learner, 0).values(), parts_of(learner, 1).values(), strict=True):
        for block in range(2):
            rows = [*first[block], *second[block]]
            for i, one in enumerate(rows):
                for j, other in enumerate(rows):
                    expected += 2.0 * (float(one @ other) - (i == j)) ** 2 / len(rows) ** 2
    losses = learner.train().loss(session_batch(CODA, learner))
    assert losses["orthogonality"].item() == pytest.approx(expected, rel=1e-4)
