"""A bound on memory (`--memory 8GB`), and how it is shared out between a model's weights and the passes through it.

What is bounded is, on the CPU, the resident memory of the process: what it and its libraries have allocated, their
code, and whatever pages of weight files are mapped at the moment. What the system keeps of files that nobody has mapped
is not counted: it gives that back when it is asked for memory. On a GPU it is the device's memory as well.

    limit = LIBRARIES + a quarter of the rest for batches + what remains for weights

Weights that fit into what remains are loaded whole. Where they do not, Accelerate keeps as many blocks as fit and reads
the others from the folder's own files whenever a pass comes to them, one module at a time. All shares follow from
the limit and the model's shape, and from nothing measured at run time: the same limit gives the same batches.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from audit.errors import BadInput

LIBRARIES = 700_000_000
"""Python, torch, transformers, the instruments, the sets, and evidence at hand; `benchmarks.memory` measures it."""

TOKENS = 4096
"""Tokens a batch, where memory allows it."""

LOGITS = 2**23
"""Logits at a time, where memory allows it: 32 MiB of float32."""

_LOGITS_COPIES = 6  # logits, log-probabilities, probabilities, what is computed of them
_LARGE = 4 << 20
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{i}b": (1024 if i else 1000) ** power for power, letter in enumerate("kmgt", 1) for i in ("", "i")
}


def parse_bytes(value: Any, where: str) -> int:
    """A bound as it is stated: `8GB` (10^9 bytes each), `512MiB` (2^20 each), or a number of bytes.

    Raises:
        BadInput: it is none of these, or less than the libraries alone take.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower(), re.ASCII)
    if isinstance(value, bool) or found is None or found[2] not in _UNITS:
        raise BadInput(f"{where}: memory {value!r} is no number of bytes, such as 8GB or 512MiB")
    count = int(float(found[1]) * _UNITS[found[2]])
    if count <= LIBRARIES:
        raise BadInput(f"{where}: memory {value!r}: the libraries alone take about {spelled(LIBRARIES)}")
    return count


def spelled(count: int) -> str:
    """A number of bytes for people: `6.4 GB`, `850 MB`, `12 kB`."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f} {unit}"
    return f"{count} bytes"


@dataclass(frozen=True)
class Memory:
    """What one model may take.

    Attributes:
        limit: bytes in all.
        weights: bytes of the model's weights in memory.
        module: bytes that the module with most weights takes while it is read: as stored, and as used.
        token: bytes that a token of a batch takes, at most.
        whose: `stated`, or `GPU's` where it is the device that sets the limit.
        mapped: bytes of files that lie in memory too while whole weights are loaded, being stored in another dtype.
    """

    limit: int
    weights: int
    module: int
    token: int
    whose: str = "stated"
    mapped: int = 0

    @property
    def batches(self) -> int:
        """Bytes for a batch and its logits."""
        return (self.limit - LIBRARIES) // 4

    @property
    def tokens(self) -> int:
        """Tokens a batch, padding included."""
        return min(TOKENS, max(1, self.batches // 2 // self.token))

    @property
    def logits(self) -> int:
        """Logits at a time."""
        return min(LOGITS, self.batches // 2 // (4 * _LOGITS_COPIES))

    def holds(self, copies: float = 1) -> bool:
        """Can the weights be loaded whole, and do so many copies of them fit beside a batch?"""
        room = self.limit - LIBRARIES
        return self.weights + self.mapped <= room and copies * self.weights <= room - self.batches

    @property
    def streams(self) -> bool:
        """Can weights that do not fit be read module by module?"""
        return self._kept >= 0

    @property
    def kept(self) -> int:
        """Bytes of weights that stay in memory while others are read.

        Raises:
            BadInput: not even the module with most weights fits.
        """
        if not self.streams:
            least = LIBRARIES + self.module * 4 // 3 + 1
            raise BadInput(
                f"the {self.whose} memory ({spelled(self.limit)}) does not hold the model's largest module, of "
                f"{spelled(self.module)} while it is read: at least {spelled(least)} would be needed at this dtype"
            )
        return self._kept

    @property
    def _kept(self) -> int:
        return self.limit - LIBRARIES - self.batches - self.module

    def lacking(self, copies: float = 1) -> str:
        """Why what takes so many copies of the weights does not run."""
        if not self.holds():
            return (
                f"the weights ({spelled(self.weights)}) do not fit in the {self.whose} memory ({spelled(self.limit)})"
            )
        return (
            f"altering the weights takes {copies:g} times their {spelled(self.weights)}, which does not fit in the "
            f"{self.whose} memory ({spelled(self.limit)})"
        )


def token_bytes(config: Any, itemsize: int) -> int:
    """What a token of a batch takes at most in a transformer of this configuration.

    That is: what flows through a block, keys and values of all blocks (twice while they are copied), and the states
    recorded after every block.
    """
    width, layers = int(config.hidden_size), int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    head = int(getattr(config, "head_dim", None) or width // heads)
    numbers = 8 * width + 3 * inner + 4 * layers * keys * head + (layers + 1) * width
    return itemsize * numbers + 16 * width  # norms are computed in float32


def physical() -> int:
    """Bytes of main memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def give_back() -> None:
    """Have the C library return large blocks to the system when they are freed.

    Left alone it keeps them, up to 32 MiB each, for the next one of that size: weights that were read and let go would
    stay in the process, and it would grow by as much again.
    """
    if sys.platform == "linux":
        mmap_threshold = -3
        ctypes.CDLL(None).mallopt(mmap_threshold, _LARGE)


def is_shortage(error: BaseException) -> bool:
    """Did an allocation fail, in torch (on a GPU or not), in NumPy or in Python?"""
    import torch

    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "not enough memory" in said)
    )
