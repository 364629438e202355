"""Wrappers forward every hook, whoever adds one."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from vlprompt.core.errors import CheckpointError
from vlprompt.core.trainable import Hooks, OwnRate, Trainable, TransparentWrapper, Wrapper, groups_by_rate


class _Recorder(nn.Module, Trainable):
    """Remembers which of its hooks are called."""

    combines_gradients = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.calls: list[str] = []


def _record(name: str) -> Any:
    def hook(self: _Recorder, *arguments: Any, **options: Any) -> str:
        self.calls.append(name)
        return name

    return hook


HOOKS = [name for name, member in vars(Hooks).items() if inspect.isfunction(member)]
for _name in HOOKS:
    setattr(_Recorder, _name, _record(_name))


class _Plain(Wrapper):
    def __init__(self, inner: Trainable) -> None:
        self.inner = inner

    @property
    def wrapped(self) -> Trainable:
        return self.inner


class _Transparent(TransparentWrapper):
    def __init__(self, inner: Trainable) -> None:
        self.inner = inner

    @property
    def wrapped(self) -> Trainable:
        return self.inner


@pytest.mark.parametrize("kind", [_Plain, _Transparent])
@pytest.mark.parametrize("name", HOOKS)
def test_a_wrapper_forwards_every_hook(kind: Any, name: str) -> None:
    inner = _Recorder()
    outer = kind(kind(inner))
    count = len(inspect.signature(getattr(Hooks, name)).parameters) - 1
    assert getattr(outer, name)(*range(count)) == name
    assert inner.calls == [name]
    assert outer.combines_gradients


def test_a_transparent_wrapper_learns_what_it_wraps() -> None:
    inner = _Recorder()
    outer = _Transparent(inner)
    assert list(outer.learned_parameters()) == ["weight"]
    outer.load_trainable_state({"weight": torch.ones(2)})
    assert torch.equal(inner.weight, torch.ones(2))
    outer.train(False)
    assert not inner.training


def test_hooks_do_nothing_by_default() -> None:
    class Quiet(nn.Module, Trainable):
        pass

    quiet = Quiet()
    gradients = {"weight": torch.ones(2)}
    assert not quiet.combines_gradients
    assert quiet.transform_gradients(gradients) is gradients
    assert quiet.parameter_groups() == []
    assert quiet.running_state() == {}
    combined = quiet.combine_gradients({"a": [torch.ones(2)], "b": [torch.full((2,), 2.0)]})
    assert torch.equal(combined[0], torch.full((2,), 3.0))


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    inner = _Recorder()
    state = {"weight": torch.full((2,), torch.nan), "foreign": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="foreign is unknown; weight is not finite"):
        inner.load_trainable_state(state)
    assert torch.equal(inner.weight, torch.zeros(2))


def test_parts_with_a_rate_make_groups() -> None:
    class Slow(nn.Linear, OwnRate):
        rate = 0.1

    fast = Slow(2, 2)
    fast.rate = 3.0
    model = nn.Sequential(nn.Linear(2, 2), Slow(2, 2), nn.Sequential(fast))
    model[0].bias.requires_grad_(False)
    assert groups_by_rate(model) == [
        {"names": ["0.weight"]},
        {"names": ["1.weight", "1.bias"], "rate": 0.1},
        {"names": ["2.0.weight", "2.0.bias"], "rate": 3.0},
    ]
    assert groups_by_rate(nn.Linear(2, 2)) == []
