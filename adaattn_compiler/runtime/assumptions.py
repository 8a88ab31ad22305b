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
        fallback: Callable[[Sequence[Any]], Compiled],
    ) -> None:
        self._digests = digests
        self._compiled = compiled
        self._make_fallback = fallback
        self._fallback: Compiled | None = None
        self._seen: dict[int, tuple[int, int, bool]] = {}
        self._lock = threading.Lock()

    @staticmethod
    def of(
        positions: Iterable[int],
        inputs: Sequence[Any],
        compiled: Compiled,
        fallback: Callable[[Sequence[Any]], Compiled],
    ) -> Assumptions:
        """Assume that the inputs at these positions keep the values that they have now."""
        return Assumptions({p: _digest(inputs[p]) for p in positions}, compiled, fallback)

    def __call__(self, *inputs: Any) -> Any:
        for position in self._digests:
            if not self._holds(position, inputs[position]):
                return self._other(inputs)(*inputs)
        return self._compiled(*inputs)

    def _holds(self, position: int, tensor: torch.Tensor) -> bool:
        version = _version(tensor)
        seen = self._seen.get(position)
        if seen is not None and seen[:2] == (id(tensor), version) and version >= 0:
            return seen[2]
        holds = _digest(tensor) == self._digests[position]
        self._seen[position] = (id(tensor), version, holds)
        if not holds:
            log.warning(
                "a mask kept as a buffer (input %d) changed after compiling: from now on the graph "
                "runs as it was before rewriting",
                position,
            )
        return holds

    def _other(self, inputs: Sequence[Any]) -> Compiled:
        with self._lock:
            if self._fallback is None:
                self._fallback = self._make_fallback(inputs)
            return self._fallback


def _version(tensor: torch.Tensor) -> int:
    """The version counter; -1 for inference tensors, which have none."""
    return -1 if tensor.is_inference() else tensor._version


def _digest(tensor: torch.Tensor) -> bytes:
    raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(raw.tobytes() + str(tuple(tensor.shape)).encode()).digest()
