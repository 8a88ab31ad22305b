"""The GPU that is there, if any: its target, and how what runs on it is timed."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from importlib import metadata

import torch

from adaattn_compiler.target import DeviceTarget, target_named, target_of

log = logging.getLogger("adaattn_compiler")

# What code is generated for where no GPU is there.
_ASSUMED = "sm_90"


def is_present(device: str) -> bool:
    """Whether a type of device can run something here."""
    return device != "cuda" or torch.cuda.is_available()


def target_here() -> DeviceTarget:
    """The target of the current GPU."""
    if not torch.cuda.is_available():
        return target_named(_ASSUMED)
    return _target(torch.cuda.current_device())


@functools.cache
def _target(index: int) -> DeviceTarget:
    return target_of(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


def facts_of_device() -> tuple[str, ...]:
    """What the speed of kernels on the current GPU depends on."""
    found = (
        torch.cuda.get_device_name(),
        str(torch.version.cuda),
        str(torch.backends.cudnn.version()),
    )
    return (*found, _version("triton"))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def seconds_of(call: Callable[[], object], device: str) -> float:
    """How long a call takes; on a GPU what it does there, from start to end."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """A call as a CUDA graph, so that what the host does in it is not counted.

    In compiled code launches cost less than where a kernel competes. As it is where it cannot be
    captured.
    """
    try:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        log.debug("timed without a CUDA graph: %s", error)
        torch.cuda.synchronize()
        return call
    return graph.replay
