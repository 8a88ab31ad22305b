"""The GPU that is there, if any: its target, and how what runs on it is timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from importlib import metadata

import torch

from adaattn_compiler.target import DeviceTarget, target_named, target_of

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


# What the host may take to start a call; the device is kept busy twice as long as was seen, within
# these.
_LEAST_WAIT, _MOST_WAIT = 3e-5, 5e-3
_CYCLES_A_SECOND = 2.0e9


def timer_of(call: Callable[[], object], device: str) -> Callable[[], float]:
    """A function that runs a call and gives its seconds; on a GPU those that it takes there.

    There the device waits first for as long as the host takes to start the call, which in compiled
    code is less than where a kernel competes. (Replaying a CUDA graph would need no wait. But a
    capture that fails, as it does where a kernel waits for the device, leaves torch's stream of
    captures the current one and its random numbers unusable, for the whole process.)
    """
    if device != "cuda":
        return functools.partial(_seconds_on_host, call)
    torch.cuda.synchronize()
    wait = 2 * _seconds_on_host(call)
    torch.cuda.synchronize()
    return functools.partial(_seconds_on_gpu, call, min(max(wait, _LEAST_WAIT), _MOST_WAIT))


def _seconds_on_host(call: Callable[[], object]) -> float:
    """Until the call returns."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_gpu(call: Callable[[], object], wait: float) -> float:
    """From when the device begins with a call to its end."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Private, old and stable; without it the host's part counts.
    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is not None:
        sleep(int(wait * _CYCLES_A_SECOND))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
