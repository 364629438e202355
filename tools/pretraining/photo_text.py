"""Teaches the text tower of ``photo`` to land on the classifier rows of what it reads; no image is needed.

A phrase's target is the normalised mean of the unit rows of the classes it stands for, in the space spanned by the
first d principal directions of the classifier's rows. Two losses: the cosine to that target, and cross entropy of
the 1,000 rows against the phrase's classes. The tower is taught first, then a wider end for it (see
:mod:`pretraining.photo_head`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretraining import RECIPES
from pretraining.mixed import Mixed, mixed
from pretraining.photo_head import HeadModule, landing_losses, state_batches
from pretraining.photo_scale import calibrate
from pretraining.photo_sentences import SentenceBatches
from pretraining.photo_words import Vocabulary, WordNet, read_vocabulary
from vlprompt.backbones.lite0 import class_rows, expected_features, load_lite0
from vlprompt.backbones.photo_weights import build_photo_model, model_config, pack_photo
from vlprompt.core.files import write_json, write_tensors
from vlprompt.core.seeding import seeded_modules
from vlprompt.core.trainable import Trainable
from vlprompt.training.batches import Batch
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["PhotoTextOptions", "SayEpochs", "TextModule", "pretrain_text"]

_GROUPS = 6  # of sentences by length
_UNSEEN_STD = 0.02  # of embeddings that nobody taught
_ENDS = ("ln_final.", "text_projection")  # what the head replaces


class PhotoTextOptions(BaseModel):
    """Options of :func:`pretrain_text`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pretrain_photo_text"
    wordnet: Path = Field(Path("/usr/share/wordnet"), description="folder of WordNet 3.0's noun files")
    held_out: float = Field(0.05, ge=0, lt=1, description="share of compound synonyms that are kept back")
    photos: Path | None = Field(None, description="photographs, see photo-vit, to calibrate the scale on")
    classes_kept_back: int = Field(30, ge=0, description="of those photographs' classes")
    scale: float = Field(30.0, gt=0, description="factor on cosines where there are no photographs")
    seed: int = Field(
        1, ge=0, description="seeds the initial weights, what is kept back, and the photographs"
    )
    train: TrainOptions = TrainOptions()
    precision: Mixed = Field("fp32", description="of the products in train; weights stay float32")
    head: TrainOptions = Field(TrainOptions(), description="of the layers after the tower, see photo_head")
    views: int = Field(8, ge=1, description="sentences per phrase that those layers read")


class TextModule(nn.Module, Trainable):
    """The text tower, on the tokens that occur; the rest of the vocabulary costs nothing.

    Args:
        lite0: The network with its classifier.
        seen_ids: CLIP token ids that occur; batches hold their numbers.
        seed: Seeds the initial weights.
    """

    rows: Tensor

    def __init__(self, lite0: nn.Module, seen_ids: list[int], seed: int) -> None:
        super().__init__()
        self.seen_ids, self.lite0 = seen_ids, [lite0]  # in a list: no part of what is trained and saved

        with seeded_modules(seed, "photo", "initialisation"):
            self.clip = CLIP(**model_config())
            full = self.clip.token_embedding.weight
            self.clip.token_embedding = nn.Embedding.from_pretrained(full[seen_ids].clone(), freeze=False)

        rows = class_rows(lite0)
        self.projection = _principal(rows, model_config()["embed_dim"])
        self.clip.visual = nn.Identity()
        self.clip.logit_scale.requires_grad_(False)
        self.head: HeadModule | None = None
        self.register_buffer("rows", F.normalize(rows @ self.projection, dim=-1), persistent=False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return both losses of a batch of :class:`SentenceBatches`."""
        return landing_losses(self.encode(batch["text"], batch["last"]).float(), batch["members"], self.rows)

    def encode(self, text: Tensor, last: Tensor) -> Tensor:
        """Return unit features (B, d) of token numbers (B, T), read at position ``last`` (B,)."""
        states = self.states(text, last)
        if self.head is not None:
            return self.head(states)
        return F.normalize(self.clip.ln_final(states) @ self.clip.text_projection, dim=-1)

    def states(self, text: Tensor, last: Tensor) -> Tensor:
        """Return (B, W) states of the end of text, before the last norm.

        Sentences of like length are run together, or most of the work would be padding.
        """
        order = last.argsort(stable=True)
        parts = [self._states(text[p, : int(last[p].max()) + 1], last[p]) for p in order.chunk(_GROUPS)]
        return torch.cat(parts)[order.argsort()]

    def _states(self, text: Tensor, last: Tensor) -> Tensor:
        clip = self.clip
        length = text.shape[1]
        unknown = text == len(self.seen_ids)
        x = clip.token_embedding(text.masked_fill(unknown, 0))
        x = torch.where(unknown[..., None], torch.randn_like(x) * _UNSEEN_STD, x)
        x = clip.transformer(
            x + clip.positional_embedding[:length], attn_mask=clip.attn_mask[:length, :length]
        )

        return x[torch.arange(len(x)), last]

    def trainable_state(self) -> dict[str, Tensor]:
        """Return every parameter by name."""
        return {n: t.detach() for n, t in self.clip.state_dict().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put parameters back, strictly."""
        self.clip.load_state_dict(dict(state), strict=True)

    def model(self, scale: float) -> CLIP:
        """Return ``photo`` as it is now, with a factor on cosines.

        Raises:
            ValueError: If there is no head yet.
        """
        if self.head is None:
            raise ValueError("the text tower has no head yet.")

        lite0 = self.lite0[0]
        with seeded_modules(0, "photo", "unseen tokens"):
            model = build_photo_model(lite0)

        state = {n: t for n, t in self.trainable_state().items() if not n.startswith(_ENDS)}
        rows = state.pop("token_embedding.weight")
        model.load_state_dict(state, strict=False)
        model.ln_final.load_state_dict(self.head.norm.state_dict())

        with torch.no_grad():
            model.text_projection.copy_(self.head.projection)
            model.token_embedding.weight[self.seen_ids] = rows
            model.visual.projection.copy_(self.projection)
            model.visual.mean.copy_(expected_features(lite0))
            model.logit_scale.fill_(torch.tensor(scale).log())

        return model.eval()


def _principal(rows: Tensor, dim: int) -> Tensor:
    """Return (1280, d) orthonormal principal directions of rows, each with its largest entry positive."""
    directions = torch.linalg.svd(rows.double(), full_matrices=False).Vh[:dim]
    signs = directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    return (directions * signs).T.float().contiguous()


class Watch:
    """How well names, hypernyms and held-out words are read.

    Args:
        module: What is trained.
        batches: What it reads.
    """

    def __init__(self, module: TextModule, batches: SentenceBatches) -> None:
        self.module = module
        self.batches = batches
        words = batches.vocabulary
        kinds = {k: words.of_kind(k) for k in dict.fromkeys(words.kinds)}
        self.parts = {**kinds, "held_out": sorted(words.held_out)}

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return per kind of phrase: ``top`` whether the nearest row is one it stands for, and the mean ``cosine``."""
        figures: dict[str, float] = {}
        for kind, numbers in self.parts.items():
            if not numbers:
                continue

            texts = [f"a photo of a {self.batches.vocabulary.phrases[i]}." for i in numbers]
            batch = self.batches.tokens(texts)
            members = self.batches.members(numbers)
            text = self.module.encode(batch["text"], batch["last"]).float()
            target = F.normalize(members @ self.module.rows, dim=-1)
            nearest = (text @ self.module.rows.T).argmax(1)
            figures[f"{kind}/top"] = float((members[torch.arange(len(members)), nearest] > 0).float().mean())
            figures[f"{kind}/cosine"] = float((text * target).sum(-1).mean())

        return {"accuracy": figures["name/top"], **figures}


@RECIPES.register(
    "photo-text",
    summary="the text tower of `photo` on names of ImageNet's classes and WordNet; reads no image",
    options=PhotoTextOptions,
    ships="vlprompt/backbones/weights/photo.safetensors",
)
def pretrain_text(options: PhotoTextOptions, folder: Path, *, resume: bool = False, workers: int = 1) -> Path:
    """Train the text tower, calibrate the scale, and pack.

    Args:
        options: What to run.
        folder: Checkpoint, ``history.json`` and ``photo.safetensors`` go here.
        resume: Continue from the checkpoint in the folder, if there is one.
        workers: Not used: sentences are made as they are needed.

    Returns:
        Path of the packed weights.
    """
    lite0 = load_lite0()
    vocabulary = read_vocabulary(WordNet(options.wordnet), options.held_out, options.seed)
    batches = SentenceBatches(vocabulary, options.train.batch_size, options.train.seed)
    module = TextModule(lite0, batches.seen_ids, options.seed)
    identity = options.model_dump(
        mode="json", exclude={"train", "head", "views", "wordnet", "photos", "scale"}
    )
    watch = Watch(module, batches)
    progress = Trainer(
        mixed(module, options.precision), batches, options.train, folder, watch, [SayEpochs(folder)], identity
    ).run(resume)
    history = progress.history + _teach_head(module.eval(), batches, options, folder / "head", watch, resume)
    model = module.model(options.scale)
    calibration = {"scale": options.scale}

    if options.photos is not None:
        calibration = calibrate(model, options.photos, options.classes_kept_back, options.seed)
        model.logit_scale.data.fill_(torch.tensor(calibration["scale"]).log())

    path = folder / "photo.safetensors"
    about = {
        "words": _about_words(vocabulary),
        "read": history[-1] if history else {},
        **calibration,
    }
    write_tensors(path, pack_photo(model, batches.seen_ids), {"facts": about, "history": history})

    return path


def _teach_head(
    module: TextModule,
    batches: SentenceBatches,
    options: PhotoTextOptions,
    folder: Path,
    watch: Watch,
    resume: bool,
) -> list[dict[str, Any]]:
    states = state_batches(module, batches, options.head.batch_size, options.head.seed, options.views)
    members = batches.members(range(len(batches.vocabulary.phrases)))
    module.head = HeadModule(module.clip.ln_final, module.rows, members, options.seed)
    trainer = Trainer(module.head, states, options.head, folder, watch, [SayEpochs(folder)])
    return trainer.run(resume).history


def _about_words(vocabulary: Vocabulary) -> dict[str, Any]:
    held_out = [vocabulary.phrases[i] for i in sorted(vocabulary.held_out)]
    return {"phrases": len(vocabulary.phrases) - len(held_out), "held_out": held_out}


class SayEpochs(Callback):
    """Writes the history and one line after every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Write the file and the line."""
        write_json(self.folder / "history.json", trainer.progress.history)
        line = " ".join(f"{k} {v:.4g}" for k, v in record.items())
        print(line, f"{trainer.progress.seconds:.0f} s", flush=True)
