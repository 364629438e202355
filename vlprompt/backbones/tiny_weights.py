"""The embedded ``tiny`` CLIP: its architecture, and its weights packed into a few megabytes.

Weights are float16, and of CLIP's 49,408 token embeddings only those that pretraining read are stored; the
others get small seeded values when the weights are loaded, so that prompts may hold any word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

from vlprompt.backbones.stem import ConvStem
from vlprompt.core.errors import BackboneError
from vlprompt.core.files import read_tensors
from vlprompt.core.seeding import torch_rng

__all__ = ["WEIGHTS", "build_model", "load_state", "model_config", "pack_state", "seen_token_ids"]

#: Where the packed weights lie inside the package.
WEIGHTS = Path(str(files("vlprompt.backbones"))) / "weights" / "tiny.safetensors"

_TABLE = "token_embedding.weight"
_ROWS = "token_embedding.seen_rows"
_IDS = "token_embedding.seen_ids"
_UNSEEN_STD = 0.02  # what open_clip initialises token embeddings with


def model_config() -> dict[str, Any]:
    """Return the architecture in open_clip's model_config format."""
    return json.loads((files("vlprompt.backbones") / "tiny.json").read_text(encoding="utf-8"))


def build_model(norm: bool = False) -> CLIP:
    """Return the architecture with random weights.

    Args:
        norm: With batch norm in the stem, as pretraining needs it.
    """
    model = CLIP(**model_config())
    model.visual.conv1 = ConvStem(model.visual.conv1.out_channels, norm)
    return model


def pack_state(model: CLIP, seen_ids: Sequence[int]) -> dict[str, Tensor]:
    """Return a model's tensors as they are shipped.

    Args:
        model: A CLIP whose ``token_embedding`` has the full vocabulary.
        seen_ids: Token ids that pretraining read; only their embeddings are kept.

    Returns:
        Float16 tensors by name, with the table of embeddings replaced by its seen rows and their ids.
    """
    state = {
        name: tensor.detach().half() for name, tensor in model.state_dict().items() if name != "attn_mask"
    }
    ids = torch.tensor(sorted(set(seen_ids)), dtype=torch.int32)
    table = state.pop(_TABLE)
    return {**state, _ROWS: table[ids.long()].clone(), _IDS: ids}


def load_state(model: CLIP, path: Path | None = None, what: str = "tiny", elsewhere: str = "-") -> None:
    """Put shipped weights into a model of their architecture, in place.

    Args:
        model: The CLIP to fill; keeps its dtype and device.
        path: A packed file; default: that of ``tiny``, a model of :func:`model_config`.
        what: What to call the model in error messages, and what seeds embeddings that are not stored.
        elsewhere: Beginning of the names of parameters that come from elsewhere.

    Raises:
        BackboneError: If the file does not fit the architecture.
        CheckpointError: If the file is missing or damaged.
    """
    packed, _ = read_tensors(path or WEIGHTS)
    state = {**packed, **_unpack_table(packed, model, path or WEIGHTS, what)}
    state.pop(_ROWS, None), state.pop(_IDS, None)

    wanted = {name for name, _ in model.named_parameters() if not name.startswith(elsewhere)}
    if problem := sorted(wanted ^ (set(state) & wanted)) or sorted(set(state) - set(model.state_dict())):
        raise BackboneError(
            f"{path or WEIGHTS} does not fit the {what} CLIP: {problem[0]!r} is missing or unknown."
        )

    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    except RuntimeError as error:
        raise BackboneError(f"{path or WEIGHTS} does not fit the {what} CLIP: {error}") from error


@lru_cache(maxsize=1)
def seen_token_ids() -> tuple[int, ...]:
    """Return the ids of the tokens whose embeddings were pretrained, in order."""
    return tuple(read_tensors(WEIGHTS)[0][_IDS].tolist())


def _unpack_table(packed: Mapping[str, Tensor], model: CLIP, path: Path, what: str) -> dict[str, Tensor]:
    if _ROWS not in packed or _IDS not in packed:
        raise BackboneError(f"{path} holds no packed token embeddings; it was not written by pack_state.")

    vocabulary, width = model.token_embedding.weight.shape
    rows = packed[_ROWS].float()

    ids = packed[_IDS].long()
    if rows.shape[1] != width or int(ids.max()) >= vocabulary:
        raise BackboneError(
            f"{path}: embeddings {tuple(rows.shape)} do not fit a table of {(vocabulary, width)}."
        )

    table = torch.randn(vocabulary, width, generator=torch_rng(0, what, "unseen tokens")) * _UNSEEN_STD
    table[ids] = rows
    return {_TABLE: table}
