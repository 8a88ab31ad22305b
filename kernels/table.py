"""What was measured, on disk: safe for several processes, and for a disk that fails.

One JSON file a problem, in a folder for the machine and the versions. A file is written aside and
renamed, so a reader sees all of it or none; what cannot be read counts as not measured, what cannot
be written is measured again next time (said once).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from pathlib import Path

import torch

from adaattn_compiler.kernels.device import facts_of_device
from adaattn_compiler.said import warn_once


class MeasurementTable:
    """Times of kernels by name, in seconds, for each key."""

    def __init__(self, cache_dir: Path, device: str = "cpu") -> None:
        self._folder = cache_dir.expanduser() / "measured" / machine(device)

    def get(self, key: str) -> dict[str, float] | None:
        """The times under a key; None where there are none that can be read."""
        try:
            times = json.loads((self._folder / f"{key}.json").read_text())
            found = {str(name): float(seconds) for name, seconds in times.items()}
            return found if all(0 < t < float("inf") for t in found.values()) else None
        except (OSError, ValueError, AttributeError, TypeError):
            return None

    def put(self, key: str, times: dict[str, float]) -> None:
        """Write the times under a key."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(times, file)
                os.replace(name, self._folder / f"{key}.json")
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            warn_once(
                f"measurements cannot be kept in {self._folder} ({error}): they are made again "
                "each time"
            )


def machine(device: str = "cpu") -> str:
    """A short name for what measurements depend on beside the problem."""
    facts = (
        torch.__version__,
        platform.machine(),
        _processor(),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.get_num_threads()),
        str(torch.backends.mkl.is_available()),
        *(facts_of_device() if device == "cuda" else ()),
    )
    return hashlib.sha256("|".join(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())
