"""Putting weights into a model: what is missing, what is too much, and what has another shape, by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from torch import Tensor, nn

from vlprompt.backbones.checkpoints import WeightsError
from vlprompt.backbones.checkpoints.transformers_names import from_transformers, is_transformers

__all__ = ["load_tensors", "open_clip_names"]

log = logging.getLogger("vlprompt.backbones")

_SHOWN = 10
# OpenAI's archives carry these beside the weights; they are settings, which the architecture has by itself.
_SETTINGS = ("input_resolution", "context_length", "vocab_size")
_MASK = "attn_mask"  # made from the context length
_COUNTERS = "num_batches_tracked"  # of batch norms, which a frozen tower never reads


def open_clip_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of any layout that is known by open_clip's names; others stay as they are.

    Raises:
        WeightsError: If a layout is known, and something in it is missing.
    """
    named = from_transformers(tensors) if is_transformers(tensors) else dict(tensors)
    return {name: tensor for name, tensor in named.items() if name not in _SETTINGS}


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], leave_out: Sequence[str] = ()) -> None:
    """Put tensors into a model, in place.

    Args:
        model: Of open_clip.
        tensors: See :func:`open_clip_names`.
        leave_out: Beginnings of names that are not wanted.

    Raises:
        WeightsError: If they don't fit; lists what is missing, unexpected and misshapen.
    """
    state = _wanted(tensors, leave_out)
    state = convert_state_dict(model, state)

    expected = model.state_dict()
    if "positional_embedding" in state and "positional_embedding" not in expected:
        state = convert_to_custom_text_state_dict(state)

    state = {n: t for n, t in state.items() if n in expected or not _harmless(n)}
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in expected and state[name].numel() == 1:
            state[name] = state[name].reshape(expected[name].shape)

    _fit_positions(model, state, expected)
    _complete(state, expected)

    missing = [n for n in expected if n not in state and not _harmless(n)]
    unexpected = [n for n in state if n not in expected]
    misshapen = [
        f"{n} is {tuple(t.shape)}, not {tuple(expected[n].shape)}"
        for n, t in state.items()
        if n in expected and t.shape != expected[n].shape
    ]
    if missing or unexpected or misshapen:
        raise WeightsError(_misfit(missing, unexpected, misshapen))

    model.load_state_dict(state, strict=False)


def _wanted(tensors: Mapping[str, Tensor], leave_out: Sequence[str]) -> dict[str, Tensor]:
    state = dict(tensors)
    for beginning in leave_out:
        names = [n for n in state if n == beginning or n.startswith(f"{beginning.rstrip('.')}.")]
        if not names:
            raise WeightsError(f"nothing in it is called {beginning!r}, which leave_out names")

        log.info("%d tensors are left out: %s.", len(names), _listed(names))
        for name in names:
            del state[name]

    return state


def _harmless(name: str) -> bool:
    """Return whether a tensor may be in the file and not in the model, or the other way round."""
    return name.rpartition(".")[2] in (_MASK, _COUNTERS, "position_ids")


def _fit_positions(model: nn.Module, state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Interpolate an image tower's positions to another grid, as open_clip does, and say so."""
    name = "visual.positional_embedding"
    if name not in state or name not in expected or state[name].shape == expected[name].shape:
        return
    if state[name].dim() != 2 or state[name].shape[1] != expected[name].shape[1]:
        return  # another width: that is listed

    before = len(state[name])
    resize_pos_embed(state, model)
    log.warning("positions of %d tokens of the image tower are interpolated to %d.", before, len(state[name]))


def _complete(state: dict[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Add the scale and the bias of logits where a file has none; features don't depend on them."""
    for name in ("logit_scale", "logit_bias"):
        if name in expected and name not in state:
            start = expected[name].zero_() if name == "logit_bias" else expected[name]
            state[name] = start
            log.warning(
                "the weights have no %s; the architecture's initial %.4g is used. Features are right, but "
                "probabilities may be too flat: set model.%s where they matter.",
                *(name, float(start.reshape(-1)[0]), name),
            )


def _misfit(missing: Sequence[str], unexpected: Sequence[str], misshapen: Sequence[str]) -> str:
    parts = [
        f"{len(names)} {what} ({_listed(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    text = f"of its tensors, {'; '.join(parts)}"

    if unexpected and not missing and not misshapen:
        tops = list(dict.fromkeys(name.partition(".")[0] for name in unexpected))[:5]
        text += (
            f". If they are not needed, leave them out: leave_out={tops!r} in Python, "
            f"backbone.leave_out=[{', '.join(tops)}] in a configuration"
        )
    return text


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f", ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
