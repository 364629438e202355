"""Class lists that are too long for one matrix of logits: a million names, encoded and searched in chunks.

A list is encoded once, a chunk of names after the other, into a folder that a killed build goes on from; the processes
of a ``torchrun`` take chunks in turn. Images are then compared with one chunk at a time, which gives the names and the
probabilities that the learner would give with all of them; or, when asked for, with the names that an index of faiss
finds near.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlprompt.classification.predict import Ranker
from vlprompt.core.errors import CheckpointError, DataError, VLPromptError, first_line
from vlprompt.core.files import read_tensors, write_atomic, write_json, write_tensors
from vlprompt.core.names import class_key, clean_classname, printable
from vlprompt.core.paths import user_path
from vlprompt.core.processes import meet, process_state
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import Learner
from vlprompt.learners._scanning import digest_of

__all__ = ["NameList", "build_name_list"]

_FACTS = "names.json"
_INDEX = "index.faiss"
_CHUNK = 4096  # names
_FLAT = 20_000  # names, up to which faiss compares all
_TRAINED_ON = 64  # names for each cell of an index
_PROBED = 32  # cells that are looked into
_LEAST = 2  # names of a learner
_SHOWN = 5  # of equal names
_SHOWN_LENGTH = 60  # characters of one
_NO_TENSOR = "none of them"  # a beginning that no tensor's name has

Progress = Callable[[str, int, int], None]


class NameList(Ranker):
    """Names in chunks on disk, and the learner whose classes they are.

    Args:
        learner: Says what an image is like.
        folder: What :func:`build_name_list` wrote.
        nearest: Whether only the names that an index finds near are compared, approximately and fast; probabilities are
            then shares among those. The index is built when it is first needed.

    Raises:
        CheckpointError: If the folder holds no whole list, or that of another learner.
        VLPromptError: If ``nearest`` is asked for and faiss isn't installed.
    """

    def __init__(self, learner: Learner, folder: str | Path, *, nearest: bool = False) -> None:
        self.learner = learner.eval()
        self.folder = user_path(folder)
        facts = _read_facts(self.folder)
        if facts["learner"] != _identity(learner):
            raise CheckpointError(
                f"{self.folder} holds names that another learner encoded. Remove it, or name another folder."
            )

        self.count = facts["count"]
        self.chunk = facts["chunk"]
        self._index = self._opened_index() if nearest else None

    @property
    def device(self) -> torch.device:
        """See :class:`Classifier`."""
        return self.learner.device

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        """See :class:`Classifier`."""
        return self.learner.preprocess

    def __len__(self) -> int:
        return self.count

    @torch.no_grad()
    def rank(self, images: Tensor, topk: int) -> tuple[list[list[str]], list[list[float]]]:
        """See :meth:`Ranker.rank`."""
        rows = F.normalize(self.learner.embed_images(images), dim=-1).float()
        return self.rank_rows(rows, topk)

    @torch.no_grad()
    def rank_rows(self, rows: Tensor, topk: int) -> tuple[list[list[str]], list[list[float]]]:
        """Return names and probabilities, best first.

        Args:
            rows: (B, d) unit-length image embeddings.
            topk: Names of each.
        """
        topk = min(topk, self.count)
        scores, numbers, total = self._all(rows, topk) if self._index is None else self._near(rows, topk)
        probabilities = (scores - total[:, None]).exp()
        return self._names(numbers.tolist()), probabilities.tolist()

    def _all(self, rows: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compare with every chunk; return the best logits (B, k), their numbers, and the logarithm of the sum (B,)."""
        best = torch.full((len(rows), 0), float("-inf"), device=rows.device)
        numbers = torch.empty((len(rows), 0), dtype=torch.long, device=rows.device)
        total = torch.full((len(rows),), float("-inf"), device=rows.device)

        for start, weights, _ in self.chunks():
            logits = self.learner.backbone.logit_scale * rows @ weights.to(rows.device).T
            total = torch.logaddexp(total, logits.logsumexp(1))
            values, places = logits.topk(min(topk, logits.shape[1]), dim=1)

            both = torch.cat([best, values], 1)
            all_numbers = torch.cat([numbers, places + start], 1)
            best, chosen = both.topk(min(topk, both.shape[1]), dim=1)
            numbers = all_numbers.gather(1, chosen)

        return best, numbers, total

    def _near(self, rows: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        """Compare with the names that the index finds; the sum is over those."""
        assert self._index is not None
        cosines, numbers = self._index.search(rows.cpu().numpy(), topk)
        logits = self.learner.backbone.logit_scale * torch.from_numpy(cosines)
        # An index that looks into few cells may find fewer names than were asked for.
        logits = logits.masked_fill(torch.from_numpy(numbers) < 0, float("-inf"))
        return logits, torch.from_numpy(numbers).clamp(min=0), logits.logsumexp(1)

    def chunks(self) -> Iterator[tuple[int, Tensor, list[str]]]:
        """Yield the number of the first name, the (n, d) unit-length weights and the n names of every chunk."""
        for start in range(0, self.count, self.chunk):
            yield (start, *_read_chunk(_path(self.folder, start // self.chunk)))

    def _names(self, numbers: Sequence[Sequence[int]]) -> list[list[str]]:
        """Return the names of numbers; of a chunk's file the header alone is read."""
        asked = sorted({number // self.chunk for line in numbers for number in line})
        names = {chunk: read_tensors(_path(self.folder, chunk), (_NO_TENSOR,))[1]["names"] for chunk in asked}
        return [[names[number // self.chunk][number % self.chunk] for number in line] for line in numbers]

    def _opened_index(self) -> Any:
        """Return faiss's index of all names, built if there is none yet."""
        faiss = _import_faiss()
        path = self.folder / _INDEX
        if not path.is_file():
            index = self._built_index(faiss)
            write_atomic(path, lambda temporary: faiss.write_index(index, str(temporary)))
        try:
            return faiss.read_index(str(path))
        except RuntimeError as error:
            raise CheckpointError(
                f"{path} is damaged: {first_line(error)} Remove it: it is built again."
            ) from error

    def _built_index(self, faiss: Any) -> Any:
        """Return an index: of inner products with all names, or with those of the nearest cells if there are many."""
        width = next(self.chunks())[1].shape[1]
        if self.count <= _FLAT:
            index = faiss.IndexFlatIP(width)
        else:
            cells = int(4 * self.count**0.5)
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
            share = min(1.0, _TRAINED_ON * cells / self.count)
            generator = torch_rng(0, "index of names")
            drawn = [w[torch.rand(len(w), generator=generator) < share] for _, w, _ in self.chunks()]
            index.train(torch.cat(drawn).numpy())
            index.nprobe = _PROBED

        for _, weights, _ in self.chunks():
            index.add(weights.numpy())
        return index


def build_name_list(
    learner: Learner,
    names: str | Path | Sequence[str],
    folder: str | Path,
    *,
    chunk: int = _CHUNK,
    progress: Progress | None = None,
) -> int:
    """Encode names that are not encoded yet, a chunk at a time; return how many there are.

    Args:
        learner: One whose classes have a vector each that depends on no image and no other class.
        names: A text file with a name a line, or the names.
        folder: Where the chunks are written; 2 KiB a name at d = 512. One list and one learner per folder.
        chunk: Names that are encoded together.
        progress: Called with ("names", done, total).

    Raises:
        CheckpointError: If the folder holds another list.
        DataError: If there are fewer than two names, one occurs twice, or the learner can't name other classes.
    """
    if type(learner).logits is not Learner.logits or learner.class_bound:
        raise DataError(
            f"{learner.title()} can't name a list in chunks: its logits need all classes, or an image, at once. "
            "Learners with one vector per class can, such as zero_shot, coop and maple."
        )
    count, digest = _survey(names)
    target = user_path(folder)
    facts = {"count": count, "names": digest, "chunk": chunk, "learner": _identity(learner)}
    state = process_state()
    if state.is_main_process:
        _claim(target, facts)
    meet()

    source = _each(names)
    learner.eval()
    for number, start in enumerate(range(0, count, chunk)):
        some = list(islice(source, chunk))
        if number % state.num_processes == state.process_index and not _is_whole(_path(target, number), some):
            _write_chunk(_path(target, number), learner, some)
        if progress is not None:
            progress("names", min(count, start + chunk), count)
    meet()
    return count


@torch.no_grad()
def _write_chunk(path: Path, learner: Learner, names: Sequence[str]) -> None:
    padded = names if len(names) >= _LEAST else [*names, "something else"]
    weights = learner.with_classes(padded).eval().class_weights()[: len(names)]
    write_tensors(path, {"weights": weights.float().cpu().contiguous()}, {"names": list(names)})


def _read_chunk(path: Path) -> tuple[Tensor, list[str]]:
    tensors, metadata = read_tensors(path)
    return tensors["weights"], list(metadata["names"])


def _is_whole(path: Path, names: Sequence[str]) -> bool:
    if not path.is_file():
        return False
    try:
        return _read_chunk(path)[1] == list(names)
    except VLPromptError:  # damaged: it is computed again
        return False


def _path(folder: Path, number: int) -> Path:
    return folder / f"names-{number:06d}.safetensors"


def _each(names: str | Path | Sequence[str]) -> Iterator[str]:
    """Yield clean names, a line of a file at a time."""
    if not isinstance(names, str | Path):
        yield from map(clean_classname, names)
        return
    path = user_path(names)
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from (clean_classname(line) for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}.") from error


def _survey(names: str | Path | Sequence[str]) -> tuple[int, str]:
    """Return how many names there are, and a digest of them. Of a name, eight bytes stay in memory."""
    state = hashlib.sha256()
    seen: set[bytes] = set()
    for name in _each(names):
        state.update(f"{name}\n".encode())
        key = hashlib.blake2b(class_key(name).encode(), digest_size=8).digest()
        if key in seen:
            equal = _equal_names(names, class_key(name))
            raise DataError(f"the list has names that a text tower can't tell apart: {equal}. Leave one out.")
        seen.add(key)

    if len(seen) < _LEAST:
        raise DataError(f"a list needs at least {_LEAST} names, got {len(seen)}.")
    return len(seen), state.hexdigest()[:16]


def _equal_names(names: str | Path | Sequence[str], key: str) -> str:
    """Return the names of a list that are equal to a text tower, each with its line or its number."""
    if isinstance(names, str | Path):
        with user_path(names).open(encoding="utf-8-sig") as file:
            equal = [f"{_shown(line)} (line {n})" for n, line in enumerate(file, 1) if class_key(line) == key]
    else:
        equal = [f"{_shown(name)} (number {n})" for n, name in enumerate(names, 1) if class_key(name) == key]
    return " and ".join(equal[:_SHOWN])


def _shown(name: str) -> str:
    return repr(printable(shorten(clean_classname(name), _SHOWN_LENGTH, placeholder=" ...")))


def _identity(learner: Learner) -> dict[str, Any]:
    return {
        "method": learner.method,
        "backbone": learner.backbone.features_id,
        "learned": digest_of(dict(learner.trainable_state())),
        "templates": list(learner.templates),
    }


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Mark a folder as that of a list, or refuse another's."""
    if not (folder / _FACTS).is_file():
        write_json(folder / _FACTS, facts)
        return
    other = _read_facts(folder)
    if other != facts:
        different = sorted(key for key in facts if facts[key] != other.get(key))
        raise CheckpointError(
            f"{folder} holds another list of names, or what another learner made of it ({', '.join(different)} differs)"
            ". Remove that folder, or name another."
        )


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        facts = dict(json.loads((folder / _FACTS).read_text(encoding="utf-8")))
        return {
            **facts,
            "count": int(facts["count"]),
            "chunk": int(facts["chunk"]),
            "learner": facts["learner"],
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder} holds no list of names: {error}.") from error


def _import_faiss() -> Any:
    try:
        import faiss  # an extra of the package
    except ImportError:
        raise VLPromptError("nearest names need faiss: pip install 'vlprompt[index]'.") from None
    return faiss
