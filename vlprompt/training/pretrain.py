"""Contrastive pretraining of the embedded ``tiny`` CLIP on captioned scenes.

CLIP's objective (Radford et al., ICML 2021, section 2.3) with one correction: every caption that is true of a picture
counts as a positive, shared equally, as in UniCL (Yang et al., CVPR 2022, eq. 3). With captions as short as "a red
object" a batch is full of pairs that are true by accident, and calling them false would punish what must be learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlprompt.backbones.tiny_weights import build_model, pack_state
from vlprompt.data.scenes.pairs import CaptionPairs
from vlprompt.data.scenes.render import render
from vlprompt.data.scenes.tasks import GENERATOR, build
from vlprompt.errors import ConfigError
from vlprompt.files import write_json, write_tensors
from vlprompt.seeding import derive_seed, numpy_rng
from vlprompt.training.batches import Batch, epoch_plan
from vlprompt.training.callbacks import Callback
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["CaptionBatches", "ContrastiveModule", "ZeroShot", "read_corpus"]

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
    pictures: int = Field(73728, ge=2, description="captioned scenes that are drawn once")
    captions: int = Field(
        8, ge=1, description="captions per picture; epoch e reads caption e modulo this number"
    )
    shift: int = Field(2, ge=0, description="pictures are moved by up to so many pixels each way")
    seed: int = Field(1, ge=0, description="seeds scenes, captions and the initial weights")
    train: TrainOptions = TrainOptions()

    @classmethod
    def read(cls, path: Path) -> PretrainOptions:
        """Read a YAML file.

        Raises:
            ConfigError: If the file is missing or something in it is wrong; all mistakes at once.
        """
        try:
            return cls.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {})
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ConfigError(problems, str(path)) from error
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError([str(error)], str(path)) from error


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
    pairs = CaptionPairs(options.pictures, options.seed)
    corpus = read_corpus(pairs, options.captions, folder / "scenes.u8", workers)
    module = ContrastiveModule(corpus["seen_ids"], options.seed)
    batches = CaptionBatches(corpus, options.train.batch_size, options.train.seed, options.shift)
    identity = options.model_dump(mode="json", exclude={"train"})
    ship = _Ship(module, folder)
    validate = ZeroShot(module, WATCHED)
    Trainer(module, batches, options.train, folder, validate, [ship], identity).run(resume)
    return ship.path


class _Ship(Callback):
    """Writes the packed weights and the history after every epoch, so that a look at either needs no end of the run."""

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
    """Trains the tiny CLIP on the tokens that occur; the rest of the vocabulary has no rows and costs nothing.

    Args:
        seen_ids: CLIP token ids that occur in the captions, sorted; batches hold indices into them.
        seed: Seeds the initialisation.
    """

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
            batch: ``image`` (B, 3, H, W) uint8, ``text`` (B, T) indices of seen tokens, ``last`` (B,) position of the
                end-of-text token, ``positive`` (B, B) bool: is caption j true of picture i?
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
        corpus: What :func:`read_corpus` returned.
        batch_size: Pairs per global batch.
        seed: The run's seed.
        shift: Pictures are moved by up to so many pixels each way.
    """

    def __init__(self, corpus: dict[str, Any], batch_size: int, seed: int, shift: int = 2) -> None:
        self.corpus, self.batch_size, self.seed, self.shift = corpus, batch_size, seed, shift

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        return epoch_plan(len(self.corpus["images"]), self.batch_size, self.seed, epoch)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`; the batch is what the module's loss reads."""
        draw = epoch % self.corpus["tokens"].shape[1]
        tokens = self.corpus["tokens"][indices, draw].astype(np.int64)
        last = self.corpus["last"][indices, draw].astype(np.int64)
        truth = self.corpus["truth"][indices].astype(np.float32)
        stated = self.corpus["stated"][indices, draw]
        positive = np.ones((len(indices), len(indices)), bool)
        for place in range(stated.shape[1]):  # a caption is true where every fact it states is true
            column = stated[:, place]
            positive &= (truth[:, column] > 0) | (column < 0)[None]
        images = self._shifted(np.stack([self.corpus["images"][i] for i in indices]), epoch, int(indices[0]))
        return {
            "image": torch.from_numpy(images).permute(0, 3, 1, 2),
            "text": torch.from_numpy(tokens[:, : last.max() + 1]),
            "last": torch.from_numpy(last),
            "positive": torch.from_numpy(positive),
        }

    def _shifted(self, images: NDArray[np.uint8], epoch: int, first: int) -> NDArray[np.uint8]:
        reach, side = self.shift, images.shape[1]
        wide = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode="edge")
        offsets = numpy_rng(self.seed, "shift", epoch, first).integers(0, 2 * reach + 1, (len(images), 2))
        return np.stack([w[y : y + side, x : x + side] for w, (y, x) in zip(wide, offsets, strict=True)])


def read_corpus(pairs: CaptionPairs, captions: int, cache: Path, workers: int = 1) -> dict[str, Any]:
    """Render pictures and tokenise captions once, before training.

    Args:
        pairs: The captioned scenes.
        captions: Captions per picture.
        cache: File the pixels are kept in (memory-mapped); reused if it is complete.
        workers: Processes.

    Returns:
        ``images`` (N, H, W, 3) uint8, ``tokens`` (N, captions, T) indices into ``seen_ids``, ``last`` (N, captions),
        ``truth`` (N, facts) bool, ``stated`` (N, captions, at most) fact numbers or -1, ``seen_ids``.
    """
    images = _render_all(pairs, cache, workers)
    texts: list[list[str]] = []
    known: dict[str, int] = {}
    truths, stated = [], []
    for index in range(len(pairs)):
        drawn = pairs.captions(index, captions)
        texts.append([c.text for c in drawn])
        truths.append([known.setdefault(f, len(known)) for f in sorted(pairs.facts(index))])
        stated.append([[known.setdefault(f, len(known)) for f in sorted(c.facts)] for c in drawn])
    truth = np.zeros((len(pairs), len(known)), bool)
    for row, numbers in zip(truth, truths, strict=True):
        row[numbers] = True
    most = max(len(f) for row in stated for f in row)
    padded = np.array([[f + [-1] * (most - len(f)) for f in row] for row in stated], np.int32)
    return {"images": images, "truth": truth, "stated": padded, **_tokenise(texts)}


def _tokenise(texts: list[list[str]]) -> dict[str, Any]:
    """Tokenise with CLIP's BPE and renumber the tokens that occur 0, 1, 2, ..."""
    ids = {text: _encode(text) for row in texts for text in row}
    seen = sorted({i for row in ids.values() for i in row})
    place = {token: number for number, token in enumerate(seen)}
    longest = max(len(row) for row in ids.values())
    tokens = np.zeros((len(texts), len(texts[0]), longest), np.uint16)
    last = np.zeros(tokens.shape[:2], np.uint8)
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            tokens[i, j, : len(ids[text])] = [place[t] for t in ids[text]]
            last[i, j] = len(ids[text]) - 1
    return {"tokens": tokens, "last": last, "seen_ids": seen}


@lru_cache(maxsize=1)
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


def _encode(text: str) -> list[int]:
    tokenizer = _tokenizer()
    return [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]


def _render_all(pairs: CaptionPairs, cache: Path, workers: int) -> NDArray[np.uint8]:
    shape = (len(pairs), pairs.size, pairs.size, 3)
    cache = cache.with_name(f"{cache.stem}-{derive_seed(pairs.seed, GENERATOR, pairs, shape):x}.u8")
    if not (cache.is_file() and cache.stat().st_size == int(np.prod(shape))):
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(".part")
        pixels = np.memmap(part, np.uint8, "w+", shape=shape)
        chunks = [range(i, min(i + 512, len(pairs))) for i in range(0, len(pairs), 512)]
        with ProcessPoolExecutor(workers) as pool:
            for chunk, rendered in zip(
                chunks, pool.map(_render_chunk, [pairs] * len(chunks), chunks), strict=True
            ):
                pixels[chunk.start : chunk.stop] = rendered
        pixels.flush()
        part.replace(cache)
    return np.memmap(cache, np.uint8, "r", shape=shape)


def _render_chunk(pairs: CaptionPairs, chunk: range) -> NDArray[np.uint8]:
    return np.stack([render(pairs.spec(i), pairs.size).image for i in chunk])


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
            rows = [_encode(t.format(c)) for t in data.templates for c in data.classnames]
            known = [[place[token] for token in row] for row in rows]
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
