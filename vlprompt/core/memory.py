"""How this process keeps memory that was freed, so that the next batch does not ask the system for it again.

A tower frees and asks for the same large buffers at every batch. glibc takes each block of more than 32 MiB from the
system and hands it back as soon as it is free, and smaller ones when they lie at the end of its heap. The system fills
every page with zeros again when it is first touched: 787,000 page faults for one batch of 64 photographs through
EfficientNet-Lite0, more time than the network itself takes.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

__all__ = ["SWITCH", "keep_freed_memory"]

SWITCH = "VLPROMPT_MALLOC"
"""Environment variable: ``system`` leaves the C library's allocator as it is."""

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4

_LARGEST = 2**31 - 1  # mallopt takes a C int


def keep_freed_memory() -> bool:
    """Let glibc take large blocks from its heap too, and keep up to 2 GiB at the end of the heap when they are freed.

    What a process holds can be larger by what lies free in between. It holds for the whole process, so commands do this
    when they start, and a library that is imported does not. Environment variables reach processes that are started
    from here: they decide for themselves.

    Returns:
        Whether it was done: False where :data:`SWITCH` is ``system``, and on systems without glibc.
    """
    if os.environ.get(SWITCH) == "system":
        return False
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
    return False
