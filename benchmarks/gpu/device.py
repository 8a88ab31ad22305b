"""The device, its driver and clocks, the versions, and which sources ran."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
_SOURCES = ("adaattn_compiler", "passes", "kernels", "benchmarks/gpu")
_FIELDS = (
    *("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm"),
    *("clocks.max.mem", "temperature.gpu", "power.draw", "pstate"),
)


def describe(revision: str | None = None) -> dict[str, Any]:
    """What figures depend on."""
    return {
        "device": _device(),
        "versions": {
            "torch": torch.__version__,
            "triton": version("triton"),
            "transformers": version("transformers"),
            "adaattn-compiler": version("adaattn-compiler"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "cores": len(os.sched_getaffinity(0)),
        "revision": revision or _revision(),
        "sources": sources(),
        "command": sys.argv[1:],
    }


def _device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"name": "CPU"}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "nvidia-smi": clocks(),
    }


def clocks() -> dict[str, str]:
    """What nvidia-smi reads now; empty where it cannot be run."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(_FIELDS, values, strict=False))


def result_name() -> str:
    """Of the file: device and versions, as in h200_torch2.11.0_triton3.6.0."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    name = re.sub(r"^nvidia\s+|geforce\s+", "", name.lower())
    torch_version = torch.__version__.partition("+")[0]
    text = f"{name}_torch{torch_version}_triton{version('triton')}"
    return re.sub(r"[^a-z0-9._]+", "_", text)


def version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _revision() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def sources(root: Path = ROOT) -> str:
    """A name for the state of the sources, which tells runs apart where there is no git; the same
    for a checkout and for a copy laid out as the package is installed."""
    files = {
        re.sub("^adaattn_compiler/(passes|kernels)/", r"\1/", str(file.relative_to(root))): file
        for folder in _SOURCES
        for file in (root / folder).rglob("*.py")
    }
    state = hashlib.sha256()
    for name in sorted(files):
        state.update(name.encode() + files[name].read_bytes())
    return state.hexdigest()[:16]
