"""What is made on the host once and kept on a device, for as long as anything reads it there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

Tensors = tuple[torch.Tensor, ...]


def is_recording() -> bool:
    """Whether the current stream is recorded as a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def kept_on_device(
    most: int, make: Callable[..., Sequence[torch.Tensor]]
) -> Callable[[torch.device], Callable[..., Tensors]]:
    """What `make` makes on the CPU of its (hashable) arguments, as a function of a device and them.

    The `most` results that were asked for last are kept; those that a CUDA graph reads are kept for
    good, for it is replayed without asking. Results are not to be written to.
    """

    @functools.lru_cache(maxsize=most)
    def kept(device: torch.device, *args: Hashable) -> Tensors:
        return _copied(make(*args), device)

    @functools.cache
    def recorded(device: torch.device, *args: Hashable) -> Tensors:
        return kept(device, *args)

    def on(device: torch.device) -> Callable[..., Tensors]:
        return functools.partial(recorded if is_recording() else _noted(kept), device)

    return on


def _noted(kept: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """With a note to the allocator that the current stream reads the tensors: it knows only of the
    stream that made them. Given up, they stay until that has happened."""

    def found(device: torch.device, *args: Hashable) -> Tensors:
        tensors = kept(device, *args)
        if device.type == "cuda":
            for tensor in tensors:
                tensor.record_stream(torch.cuda.current_stream(device))
        return tensors

    return found


def _copied(tensors: Sequence[torch.Tensor], device: torch.device) -> Tensors:
    """By a thread of its own: all memory that the thread of a CUDA graph takes while it warms up
    belongs to the graph, which may not be kept, and while it records nothing may wait, as copies
    from the host do."""
    if device.type != "cuda":
        return tuple(tensor.to(device, copy=True) for tensor in tensors)

    def copied() -> Tensors:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            found = tuple(tensor.to(device) for tensor in tensors)
        stream.synchronize()
        return found

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(copied).result()
