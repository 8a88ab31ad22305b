"""What this device reaches at best: copies, and matrix products of random data."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.timed import Settings
from benchmarks.gpu.timing import in_turns, spread


def measure(_: str, settings: Settings) -> dict[str, Any]:
    """Bytes read and written a second, and operations of a bfloat16 product a second."""
    if settings.warm:
        return {}
    size, elements = (64, 1 << 10) if settings.dry else (8192, 1 << 30)
    kind = torch.float32 if settings.dry else torch.bfloat16
    a, b = (torch.randn(size, size, device=settings.device, dtype=kind) for _ in range(2))
    source = torch.randint(0, 99, (elements,), device=settings.device, dtype=torch.int16)
    target = torch.empty_like(source)
    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    samples = in_turns(calls, settings.stopwatch, settings.seconds, 20).samples
    work = {"product": 2.0 * size**3 / 1e12, "copy": 2.0 * source.nbytes / 1e12}
    units = {"product": "tflops", "copy": "terabytes_per_second"}
    return {
        "subjects": {
            name: {
                "device_ms": spread([1e3 * s.device for s in found]),
                units[name]: work[name] / spread([s.device for s in found])["median"],
            }
            for name, found in samples.items()
        }
    }
