"""Contrastive pretraining of the embedded ``tiny`` CLIP on captioned scenes.

CLIP's objective (Radford et al., ICML 2021, section 2.3) with one correction: every caption that is true of
a picture counts as a positive, shared equally, as in UniCL (Yang et al., CVPR 2022, eq. 3). With captions
as short as "a red object" a batch is full of pairs that are true by accident, and calling them false would
punish what must be learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlprompt.backbones.tiny_weights import build_model, load_state, pack_state
from vlprompt.config import read_yaml
from vlprompt.data.scenes.corpus import Corpus, encode, read_corpus
from vlprompt.data.scenes.pairs import CaptionPairs
from vlprompt.data.scenes.tasks import build
from vlprompt.errors import ConfigError
from vlprompt.files import write_json, write_tensors
from vlprompt.seeding import derive_seed, numpy_rng
from vlprompt.signature import describe_problems
from vlprompt.training.batches import Batch, epoch_plan
from vlprompt.training.callbacks import Callback
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["CaptionBatches", "ContrastiveModule", "PretrainOptions", "ZeroShot", "pretrain"]

#: Data sets that a run is watched on.
WATCHED = (
    ("colour", "plain"),
    ("shape", "plain"),
    ("pattern", "plain"),
    ("glyph", "plain"),
    ("shape", "inverted"),
)

_MAX_LOGIT_SCALE = float(np.log(100.0))  # CLIP's bound


class PretrainOptions(BaseModel):
    """Options of :func:`pretrain`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pretrain_tiny"
    pictures: int = Field(65536, ge=2, description="captioned scenes that are drawn once")
    easy: int = Field(0, ge=0, description="so many of them are easy (one large object, short captions)")
    easy_epochs: int = Field(0, ge=0, description="first epochs, on the easy pictures alone")
    balanced: bool = Field(
        False, description="more captions about one attribute, rarer attributes more often"
    )
    captions: int = Field(
        8, ge=1, description="captions per picture; epoch e reads caption e modulo this number"
    )
    shift: int = Field(2, ge=0, description="pictures are moved by up to so many pixels each way")
    watch: int = Field(200, ge=1, description="pictures per data set whose zero-shot accuracy is watched")
    seed: int = Field(1, ge=0, description="seeds scenes, captions and the initial weights")
    start: str = Field("", description="packed weights to go on from; empty: random ones")
    train: TrainOptions = TrainOptions()

    @classmethod
    def read(cls, cfg: str | Path, overrides: Sequence[str] = ()) -> PretrainOptions:
        """Read a configuration file (see :func:`vlprompt.config.read_yaml`).

        Raises:
            ConfigError: With every mistake at once.
            UnknownNameError: If there is no such file.
        """
        try:
            return cls.model_validate(read_yaml(cfg, overrides))
        except ValidationError as error:
            raise ConfigError(describe_problems(error, cls), str(cfg)) from error


def pretrain(options: PretrainOptions, folder: Path, *, resume: bool = False, workers: int = 1) -> Path:
    """Run a pretraining from drawing the pictures to packed weights.

    Args:
        options: What to run.
        folder: Pixels, checkpoint, ``history.json`` and ``tiny.safetensors`` go here.
        resume: Continue from the checkpoint in the folder, if there is one.
        workers: Processes that draw pictures.

    Returns:
        Path of the packed weights.
    """
    pairs = CaptionPairs(options.pictures, options.seed, easy=options.easy, balanced=options.balanced)
    corpus = read_corpus(pairs, options.captions, folder / "scenes.u8", workers)
    module = ContrastiveModule(corpus.seen_ids, options.seed)
    if options.start:
        module.load_packed(Path(options.start))
    curriculum = (options.easy, options.easy_epochs)
    batches = CaptionBatches(corpus, options.train.batch_size, options.train.seed, options.shift, curriculum)
    identity = options.model_dump(mode="json", exclude={"train"})
    ship = _Ship(module, folder)
    validate = ZeroShot(module, WATCHED, options.watch)
    Trainer(module, batches, options.train, folder, validate, [ship], identity).run(resume)
    return ship.path


class _Ship(Callback):
    """Writes the packed weights and the history after every epoch."""

    def __init__(self, module: ContrastiveModule, folder: Path) -> None:
        self.module, self.folder, self.path = module, folder, folder / "tiny.safetensors"

    def on_epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Write both files and one line."""
        write_json(self.folder / "history.json", trainer.progress.history)
        write_tensors(self.path, self.module.packed(), {"history": trainer.progress.history})
        print(
            " ".join(f"{k} {v:.4g}" for k, v in record.items()),
            f"{trainer.progress.seconds:.0f} s",
            flush=True,
        )


class ContrastiveModule(nn.Module):
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
            self.clip = build_model()
            full = self.clip.token_embedding.weight
            self.clip.token_embedding = nn.Embedding.from_pretrained(full[seen_ids].clone(), freeze=False)
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1), False)
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1), False)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the two directions of the contrastive loss.

        Args:
            batch: ``image`` (B, 3, H, W) uint8, ``text`` (B, T) indices of seen tokens, ``last`` (B,) place
                of the end-of-text token, ``positive`` (B, B) bool: caption j is true of picture i.
        """
        # For 64 patches the plain attention is faster on a CPU than the fused one, and as exact.
        with sdpa_kernel(SDPBackend.MATH):
            image, text = self.encode_image(batch["image"]), self.encode_text(batch["text"], batch["last"])
        scale = self.clip.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()
        logits = (scale * image.float() @ text.float().T).float()
        positive = batch["positive"].float()
        rows, columns = positive / positive.sum(1, keepdim=True), positive / positive.sum(0, keepdim=True)
        return {
            "image_to_text": F.cross_entropy(logits, rows) / 2,
            "text_to_image": F.cross_entropy(logits.T, columns.T) / 2,
        }

    def encode_image(self, image: Tensor) -> Tensor:
        """Return unit features (B, d) of uint8 pictures (B, 3, H, W)."""
        return F.normalize(self.clip.visual((image.float() / 255 - self.mean) / self.std), dim=-1)

    def encode_text(self, text: Tensor, last: Tensor) -> Tensor:
        """Return unit features (B, d) of seen-token indices (B, T), read at position ``last`` (B,)."""
        clip, length = self.clip, text.shape[1]
        x = clip.token_embedding(text) + clip.positional_embedding[:length]
        x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
        x = clip.ln_final(x[torch.arange(len(x)), last])
        return F.normalize(x @ clip.text_projection, dim=-1)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return every parameter by name."""
        return {name: parameter.detach() for name, parameter in self.clip.named_parameters()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put parameters back, strictly."""
        self.clip.load_state_dict(dict(state), strict=True)

    def load_packed(self, path: Path) -> None:
        """Take the weights of a packed file, as :func:`~vlprompt.backbones.tiny_weights.load_state` reads them."""
        model = build_model()
        load_state(model, path)
        state = dict(model.named_parameters())
        state["token_embedding.weight"] = model.token_embedding.weight[self.seen_ids]
        self.load_trainable_state({name: tensor.detach() for name, tensor in state.items()})

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors to ship (see :func:`vlprompt.backbones.tiny_weights.pack_state`)."""
        model = build_model()
        state = {k: v for k, v in self.trainable_state().items() if k != "token_embedding.weight"}
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            model.token_embedding.weight[self.seen_ids] = self.clip.token_embedding.weight
        return pack_state(model, self.seen_ids)


class CaptionBatches:
    """Batches of pictures and captions; epoch e reads caption e modulo the number of captions per picture.

    Args:
        corpus: The captioned scenes.
        batch_size: Pairs per global batch.
        seed: The run's seed.
        shift: Pictures are moved by up to so many pixels each way.
        curriculum: How many first pictures are easy, and how many first epochs read only them (repeating them, so
            that every epoch has as many steps).
    """

    def __init__(
        self, corpus: Corpus, batch_size: int, seed: int, shift: int = 2, curriculum: tuple[int, int] = (0, 0)
    ) -> None:
        self.corpus, self.batch_size, self.seed, self.shift = corpus, batch_size, seed, shift
        self.easy, self.easy_epochs = curriculum

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        pictures = len(self.corpus.images)
        if epoch >= self.easy_epochs or not self.easy:
            return epoch_plan(pictures, self.batch_size, self.seed, epoch)
        passes = [
            epoch_plan(self.easy, self.batch_size, derive_seed(self.seed, "easy", turn), epoch)
            for turn in range(-(-pictures // self.easy))
        ]
        return [batch for turn in passes for batch in turn][: max(1, pictures // self.batch_size)]

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`; the batch is what the module's loss reads."""
        draw = epoch % self.corpus.tokens.shape[1]
        last = self.corpus.last[indices, draw].astype(np.int64)
        tokens = self.corpus.tokens[indices, draw, : last.max() + 1].astype(np.int64)
        images = self._shifted(np.stack([self.corpus.images[i] for i in indices]), epoch, int(indices[0]))
        return {
            "image": torch.from_numpy(images).permute(0, 3, 1, 2),
            "text": torch.from_numpy(tokens),
            "last": torch.from_numpy(last),
            "positive": torch.from_numpy(self.corpus.positives(indices, draw)),
        }

    def _shifted(self, images: NDArray[np.uint8], epoch: int, first: int) -> NDArray[np.uint8]:
        reach, side = self.shift, images.shape[1]
        wide = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
        offsets = numpy_rng(self.seed, "shift", epoch, first).integers(0, 2 * reach + 1, (len(images), 2))
        return np.stack([w[y : y + side, x : x + side] for w, (y, x) in zip(wide, offsets, strict=True)])


class ZeroShot:
    """Zero-shot accuracy on a few tasks' validation splits, to watch a pretraining run.

    Args:
        module: What is trained.
        names: Data sets as (task, style).
        pictures: At most so many pictures per data set, spread over its classes.
    """

    def __init__(
        self, module: ContrastiveModule, names: Sequence[tuple[str, str]], pictures: int = 200
    ) -> None:
        self.module, self.sets = module, {}
        place = {token: number for number, token in enumerate(module.seen_ids)}
        for task, style in names:
            data = build(task, "val", style)
            chosen = range(min(pictures, len(data)))
            images = np.stack([np.asarray(data[i][0]) for i in chosen])
            rows = [encode(t.format(c)) for t in data.templates for c in data.classnames]
            known = [
                [place[token] for token in row if token in place] for row in rows
            ]  # unread words say nothing
            self.sets[data.name] = (torch.from_numpy(images).permute(0, 3, 1, 2), data, known)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return the accuracy, in [0, 1], by data set, and their mean as ``"accuracy"``."""
        scores = {}
        for name, (images, data, rows) in self.sets.items():
            last = torch.tensor([len(row) - 1 for row in rows])
            text = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
            heads = (
                self.module.encode_text(text, last).view(len(data.templates), len(data.classnames), -1).sum(0)
            )
            guess = (self.module.encode_image(images) @ heads.T).argmax(1)
            scores[name] = float((guess == torch.tensor(data.labels[: len(images)])).float().mean())
        return {"accuracy": sum(scores.values()) / len(scores), **scores}
