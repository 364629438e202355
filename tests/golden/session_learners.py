"""What the golden tests of incremental learners share: a plain ViT, two sessions, and learned values by their names."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor

from tests.golden.text_learners import close
from tests.golden.trajectories import golden_images
from tests.golden.visual_learners import agree
from tests.golden.weights import clip_state, filled
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.learners import Learner

__all__ = ["check_all_sessions", "fill", "plain_vit", "second_session", "session_batch"]


def plain_vit(golden: dict[str, Any], tokenizer: TextTokenizer) -> Backbone:
    """Build a golden file's ViT: no norm before the blocks, and no projection behind them."""
    dim, size, layers, width, patch, length, words, text_width, heads, text_layers = golden["sizes"]
    vision = {
        "image_size": size,
        "layers": layers,
        "width": width,
        "head_width": width // golden["heads"],
        "patch_size": patch,
        "no_ln_pre": True,
    }
    text = {"context_length": length, "vocab_size": words, "width": text_width, "heads": heads}
    with torch.random.fork_rng():
        model = CLIP(dim, vision, {**text, "layers": text_layers})
    state = clip_state({name: t.shape for name, t in model.state_dict().items()})
    model.load_state_dict({**state, "visual.proj": torch.eye(width)})
    facts = {"architecture": "golden", "pretrained": None}
    return wrap_open_clip(model, {"size": size}, tokenizer, facts)


def fill(golden: dict[str, Any], learner: Learner) -> Learner:
    """Give a learner the recipe's values."""
    state = learner.trainable_state()
    assert set(state) == set(golden["spread"])
    for name, (std, mean) in golden["spread"].items():
        state[name] = filled(name, state[name].shape, std, mean)
    learner.load_trainable_state(state)
    return learner


def second_session(name: str, golden: dict[str, Any], backbone: Backbone, **options: Any) -> Learner:
    """Return a learner of the second session, with the recipe's values."""
    sessions = [golden["first"], golden["second"]]
    learner = create_learner(name, backbone, golden["second"], sessions=sessions, head="linear", **options)
    return fill(golden, learner)


def session_batch(golden: dict[str, Any], learner: Learner) -> dict[str, Tensor]:
    """Return the recipe's images and labels."""
    close(filled("images", (4,), 1.0), golden["first_image_values"])
    return {"image": golden_images(learner), "label": torch.tensor(golden["labels"])}


def check_all_sessions(golden: dict[str, Any], expected: dict[str, Any], learner: Learner) -> None:
    """Compare the logits of the classes of both sessions."""
    both = learner.with_classes([*golden["first"], *golden["second"]]).eval()
    with torch.no_grad():
        logits = both(golden_images(learner))
    agree("all sessions", logits, torch.tensor(expected["all"]), 1e-4 * float(logits.abs().max()))
