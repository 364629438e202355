"""How ``photo`` reads words that nobody taught it: as the taught phrase that stands for what is most like them.

``weights/photo_lexicon.json.gz`` gives such a phrase for every concrete noun of WordNet: "ketch" is read as a phrase
for sailing vessels. The phrases were found without images (see ``tools/pretraining/photo_lexicon.py``).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.backbones.lexicon import Lexicon
from vlprompt.backbones.tokenizer import TextTokenizer

__all__ = ["LEXICON", "LexiconTokenizer", "shipped_lexicon"]

#: Where the lexicon lies inside the package.
LEXICON = Path(str(files("vlprompt.backbones"))) / "weights" / "photo_lexicon.json.gz"


class LexiconTokenizer:
    """A tokenizer that reads every text through a lexicon first.

    Args:
        inner: CLIP's tokenizer.
        lexicon: What words are read as.
    """

    def __init__(self, inner: TextTokenizer, lexicon: Lexicon) -> None:
        self._inner = inner
        self.lexicon = lexicon
        self.start = inner.start
        self.end = inner.end
        self.pad = inner.pad
        self.context_length = inner.context_length

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words alone."""
        return self._inner.encode(self.lexicon.read(text)[0])

    def rows(self, texts: Sequence[str], length: int) -> Tensor:
        """Return (N, length) padded rows."""
        return self._inner.rows([self.lexicon.read(t)[0] for t in texts], length)


@lru_cache(maxsize=1)
def shipped_lexicon() -> Lexicon:
    """Return the lexicon in the package."""
    content: dict[str, Any] = json.loads(gzip.decompress(LEXICON.read_bytes()))
    return Lexicon(content["taught"], content["readings"], content["parts"], content["plain"])
