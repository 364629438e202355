"""What the embedded CLIP learns from: captions that fit, and the names of attributes.

Two parts. CLIP's objective (Radford et al., ICML 2021, section 2.3) with one correction: every
caption that is true of an image counts as a positive, shared equally, as in UniCL (Yang et al., CVPR 2022,
eq. 3). With captions as short as "a red object" a batch is full of pairs that are true by accident, and calling
them false would punish what must be learned. And, since captions of 64 images rarely hold all shapes, each
attribute by itself: the right sentence among one for every value.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlprompt.backbones.tiny_weights import build_model, pack_state
from vlprompt.core.seeding import derive_seed
from vlprompt.core.trainable import Trainable
from vlprompt.training.batches import Batch

__all__ = ["ContrastiveModule"]

_WEIGHT = 3.0  # of the attributes beside the captions
_EMPHASIS = {"shape": 3.0, "pattern": 2.0}  # the ones that are hard to see
_MAX_LOGIT_SCALE = float(np.log(100.0))  # CLIP's bound


class ContrastiveModule(nn.Module, Trainable):
    """Trains the tiny CLIP on the tokens that occur; the rest of the vocabulary costs nothing.

    Args:
        seen_ids: CLIP token ids that occur in the captions, sorted; batches hold indices into them.
        seed: Seeds the initialisation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, seen_ids: list[int], seed: int) -> None:
        super().__init__()
        self.seen_ids = seen_ids

        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "tiny", "initialisation"))
            self.clip = build_model(norm=True)
            full = self.clip.token_embedding.weight
            self.clip.token_embedding = nn.Embedding.from_pretrained(full[seen_ids].clone(), freeze=False)

        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1), False)
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1), False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the two directions of the contrastive loss, and that of the attributes.

        Args:
            batch: ``image`` (B, 3, H, W) uint8, ``text`` (B, T) indices of seen tokens, ``last`` (B,) place
                of the end-of-text token, ``positive`` (B, B) bool: caption j is true of image i;
                ``sentence`` (V, T) and ``sentence_last`` (V,), one sentence per value of every attribute,
                ``values`` from the A attributes to numbers that add up to V, and ``label`` (B, A), -1 where no
                value is true.
        """
        count = len(batch["text"])
        # For 64 patches the plain attention is faster on a CPU than the fused one, and as exact.
        with sdpa_kernel(SDPBackend.MATH):
            image = self.encode_image(batch["image"])
            text = self.encode_text(batch["text"], batch["last"])
            named = self.encode_text(batch["sentence"], batch["sentence_last"])

        scale = self.clip.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        logits = (scale * image.float() @ torch.cat([text, named]).float().T).float()
        return {
            **_contrast(logits[:, :count], batch["positive"].float()),
            "attributes": _named(logits[:, count:], batch["label"], batch["values"]),
        }

    def encode_image(self, image: Tensor) -> Tensor:
        """Return unit features (B, d) of uint8 images (B, 3, H, W)."""
        return F.normalize(self.clip.visual((image.float() / 255 - self.mean) / self.std), dim=-1)

    def encode_text(self, text: Tensor, last: Tensor) -> Tensor:
        """Return unit features (B, d) of seen-token indices (B, T), read at position ``last`` (B,)."""
        clip = self.clip
        length = text.shape[1]
        x = clip.token_embedding(text) + clip.positional_embedding[:length]
        x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
        x = clip.ln_final(x[torch.arange(len(x)), last])
        return F.normalize(x @ clip.text_projection, dim=-1)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return every parameter and running statistic by name."""
        return {n: t.detach() for n, t in self.clip.state_dict().items() if n != "attn_mask"}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put parameters back, strictly."""
        self.clip.load_state_dict(dict(state), strict=True)

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors to ship (see :func:`vlprompt.backbones.tiny_weights.pack_state`)."""
        model = build_model()
        stem = {f"visual.conv1.{n}": t for n, t in self.clip.visual.conv1.fused().items()}
        state = {n: t for n, t in self.trainable_state().items() if not n.startswith("visual.conv1.")}
        rows = state.pop("token_embedding.weight")
        model.load_state_dict({**state, **stem}, strict=False)

        with torch.no_grad():
            model.token_embedding.weight[self.seen_ids] = rows
        return pack_state(model, self.seen_ids)


def _contrast(logits: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """UniCL's two directions, from (B, B) logits and what is true."""
    rows = positive / positive.sum(1, keepdim=True)
    columns = positive / positive.sum(0, keepdim=True)
    return {
        "image_to_text": F.cross_entropy(logits, rows) / 2,
        "text_to_image": F.cross_entropy(logits.T, columns.T) / 2,
    }


def _named(logits: Tensor, labels: Tensor, values: Mapping[str, int]) -> Tensor:
    """Cross entropy over each attribute's values, a weighted mean over all (image, attribute) with a true one."""
    parts = [
        _EMPHASIS.get(name, 1.0) * F.cross_entropy(part, label, ignore_index=-1, reduction="sum")
        for name, part, label in zip(values, logits.split(list(values.values()), 1), labels.T, strict=True)
    ]
    return _WEIGHT * torch.stack(parts).sum() / (labels >= 0).sum()
