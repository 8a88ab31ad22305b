"""Buffers whose values a graph was compiled for, checked on every call.

A mask kept as a module's buffer can be changed by its owner. Each call compares the buffer's
version counter with the one seen when compiling; only where that moved are the values compared,
and where those changed, the call (and every later one with such values) takes the graph as it was
before rewriting. Writes through `.data` do not move the counter, and are not seen.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

log = logging.getLogger("adaattn_compiler")

Compiled = Callable[..., Any]


class Assumptions:
    """A compiled graph, called while its assumptions hold, and what is called where they do not."""

    def __init__(
        self,
        digests: dict[int, bytes],
        compiled: Compiled,
        fallback: Callable[[], Compiled],
    ) -> None:
        self._digests = digests
        self._compiled = compiled
        self._make_fallback = fallback
        self._fallback: Compiled | None = None
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], int, bool]] = {}
        self._said = False
        self._lock = threading.Lock()

    @staticmethod
    def of(
        positions: Iterable[int],
        inputs: Sequence[Any],
        compiled: Compiled,
        fallback: Callable[[], Compiled],
    ) -> Assumptions:
        """Assume that the inputs at these positions keep the values that they have now.

        fallback makes what is called otherwise, for any sizes that the compiled graph takes.
        """
        return Assumptions({p: _digest(inputs[p]) for p in positions}, compiled, fallback)

    def __call__(self, *inputs: Any) -> Any:
        for position in self._digests:
            if not self._holds(position, inputs[position]):
                return self._other()(*inputs)
        return self._compiled(*inputs)

    def _holds(self, position: int, tensor: torch.Tensor) -> bool:
        version = _version(tensor)
        seen = self._seen.get(position)
        # By reference, not by id: a new tensor may be given the id of one that is gone.
        if seen is not None and seen[0]() is tensor and seen[1] == version and version >= 0:
            return seen[2]
        holds = _digest(tensor) == self._digests[position]
        self._seen[position] = (weakref.ref(tensor), version, holds)
        if not holds and not self._said:
            self._said = True
            log.warning(
                "a mask kept as a buffer (input %d) changed after compiling: while it differs, the "
                "graph runs as it was before rewriting",
                position,
            )
        return holds

    def _other(self) -> Compiled:
        with self._lock:
            if self._fallback is None:
                self._fallback = self._make_fallback()
            return self._fallback


def _version(tensor: torch.Tensor) -> int:
    """The version counter; -1 for inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


def _digest(tensor: torch.Tensor) -> bytes:
    raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes() + str(tuple(tensor.shape)).encode()).digest()
