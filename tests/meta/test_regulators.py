"""Regulators: identity where promised, the formulas by hand, and gradients that equal finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.core.errors import ConfigError, DataError, UnknownNameError
from vlprompt.meta.regulators import REGULATORS, Regulator, Situation, create_regulator

SHAPES = {"context": torch.Size((3, 8)), "visual": torch.Size((2, 3, 6))}
DIM = 5


def _random(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in SHAPES.items()}


def _situation(dtype: torch.dtype = torch.float32) -> Situation:
    features = F.normalize(torch.randn(DIM, generator=torch.Generator().manual_seed(9), dtype=dtype), dim=0)
    return Situation(features, _random(7, dtype))


def _moved(regulator: Regulator, seed: int = 3) -> Regulator:
    """Away from the start, so that nothing is hidden by zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in regulator.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return regulator


def test_all_forms_are_registered() -> None:
    assert REGULATORS.names() == ["diagonal", "gated", "identity", "low_rank", "two_gradients"]
    with pytest.raises(UnknownNameError, match="Did you mean 'diagonal'"):
        create_regulator("diagnal", SHAPES, DIM)
    with pytest.raises(ConfigError, match=r"rnk.*did you mean 'rank'"):
        create_regulator("low_rank", SHAPES, DIM, rnk=3)


@pytest.mark.parametrize("name", ["identity", "diagonal", "low_rank"])
def test_nothing_changes_at_the_start(name: str) -> None:
    gradients = _random()
    regulated = create_regulator(name, SHAPES, DIM)(gradients, Situation())
    assert all(torch.equal(regulated[n], g) for n, g in gradients.items())


@pytest.mark.parametrize("name", REGULATORS.names())
def test_shapes_stay_and_what_is_no_prompt_passes(name: str) -> None:
    regulator = _moved(create_regulator(name, SHAPES, DIM))
    gradients = {**_random(), "mixer.weight": torch.ones(2, 2)}
    regulated = regulator(gradients, _situation())
    assert {n: r.shape for n, r in regulated.items()} == {n: g.shape for n, g in gradients.items()}
    assert regulated["mixer.weight"] is gradients["mixer.weight"]
    half = regulator({n: g.bfloat16() for n, g in _random().items()}, _situation())
    assert {r.dtype for r in half.values()} == {torch.float32}


@pytest.mark.parametrize("name", REGULATORS.names())
def test_both_signs_come_out(name: str) -> None:
    """A last layer behind a ReLU, as in one relative's code, could never turn a number negative."""
    regulator = _moved(create_regulator(name, SHAPES, DIM))
    for sign in (1, -1):
        gradients = {n: sign * g.abs() for n, g in _random().items()}
        regulated = regulator(gradients, _situation())["context"]
        assert (regulated.sign() == sign).any()
    if name == "gated":
        other = F.normalize(regulator.transform["context"](torch.randn(20, 8)), dim=-1)
        assert other.min() < 0 < other.max()


@pytest.mark.parametrize("name", [n for n in REGULATORS.names() if n != "identity"])
def test_its_gradient_equals_finite_differences(name: str) -> None:
    """phi enters the query's loss of a two-class toy through theta' = theta - alpha R(g)."""
    regulator = _moved(create_regulator(name, {"context": SHAPES["context"]}, DIM).double())
    theta = _random(1, torch.float64)["context"]
    gradient, situation = {"context": _random(2, torch.float64)["context"]}, _situation(torch.float64)
    classes = torch.randn(2, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    images = torch.randn(6, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    label = torch.tensor([0, 1, 0, 1, 1, 0])

    names = [n for n, _ in regulator.named_parameters()]

    def query_loss(*values: Tensor) -> Tensor:
        call = torch.func.functional_call(
            regulator, dict(zip(names, values, strict=True)), (gradient, situation)
        )
        moved = theta - 0.5 * call["context"]
        return F.cross_entropy(images @ (classes @ moved).T, label)

    values = [p.detach().clone().requires_grad_() for p in regulator.parameters()]
    assert torch.autograd.gradcheck(query_loss, values)
    assert any(g.abs().max() > 0 for g in torch.autograd.grad(query_loss(*values), values))


def test_low_rank_by_hand() -> None:
    regulator = _moved(create_regulator("low_rank", SHAPES, DIM, rank=2))
    gradients = _random()
    up, down = regulator.up["context"], regulator.down["context"]
    expected = [row + up @ (down @ row) for row in gradients["context"]]
    regulated = regulator(gradients, Situation())["context"]
    torch.testing.assert_close(regulated, torch.stack(expected))


def test_gated_by_hand() -> None:
    regulator = _moved(create_regulator("gated", SHAPES, DIM, rank=4))
    gradients, situation = _random(), _situation()
    first, _, last = regulator.transform["context"]
    hidden, _, out = regulator.gate
    c = torch.sigmoid(out(torch.relu(hidden(situation.features))))
    expected = []
    for row in gradients["context"]:
        other = last(torch.relu(first(row / row.norm())))
        expected.append((1 - c) * other / other.norm() * row.norm() + c * row)
    torch.testing.assert_close(regulator(gradients, situation)["context"], torch.stack(expected))
    with pytest.raises(DataError, match="mean feature"):
        regulator(gradients, Situation())


def test_the_gate_is_taught_how_far_to_trust() -> None:
    regulator = create_regulator("gated", {"context": SHAPES["context"]}, DIM, agreement=2.0)
    gradients, situation = _random(), _situation()
    regulated = regulator(gradients, situation)
    loss = regulator.auxiliary(regulated, {"context": regulated["context"].detach()}, 1.0, situation)
    assert loss is not None
    torch.testing.assert_close(loss, 2.0 * (1 - regulator.openness(situation)) ** 2)
    opposed = {"context": -regulated["context"].detach()}
    loss = regulator.auxiliary(regulated, opposed, -1.0, situation)
    torch.testing.assert_close(loss, 2.0 * regulator.openness(situation) ** 2)


def test_two_gradients_by_hand() -> None:
    regulator = _moved(create_regulator("two_gradients", SHAPES, DIM, share=4))
    gradients, situation = _random(), _situation()
    regulated = regulator(gradients, situation)["visual"]
    for layer in range(2):
        task, general = gradients["visual"][layer].flatten(), situation.general["visual"][layer].flatten()
        first, second = regulator.gates["visual"][layer]
        gamma = torch.sigmoid(second(first(torch.cat([task, general])))).repeat_interleave(4)[:18]
        torch.testing.assert_close(regulated[layer].flatten(), task + gamma * general)


def test_the_bound_holds_by_length_and_keeps_the_direction() -> None:
    for factor in (100.0, 0.001, -3.0):
        regulator = create_regulator("diagonal", SHAPES, DIM, bound=4.0)
        with torch.no_grad():
            regulator.scale["context"].fill_(factor)
        gradients = _random()
        regulated = regulator(gradients, Situation())["context"]
        ratio = float((regulated.norm() / gradients["context"].norm()).detach())
        assert ratio == pytest.approx(min(max(abs(factor), 0.25), 4.0))
        assert torch.equal(regulated.sign(), gradients["context"].sign() * (1 if factor > 0 else -1))
    with pytest.raises(ConfigError, match="above 1"):
        create_regulator("diagonal", SHAPES, DIM, bound=0.5)


def test_options_are_kept() -> None:
    options: dict[str, Any] = {"rank": 3, "seed": 2, "bound": 2.0}
    assert create_regulator("low_rank", SHAPES, DIM, **options).options == options
