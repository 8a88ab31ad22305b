"""Devices that code is generated for, apart from the device of the example tensors.

Rates are those of the vendors' data sheets: dense (no structured sparsity), sums in float32, at the
clock that the sheet takes. What a kernel reaches is less; bounds made of them are bounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

_KIB, _MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class DeviceTarget:
    """One device.

    capability: CUDA's, as in sm_90; None for a CPU. clock: in Hz. rates: operations of matrix
    products a second by the dtype of the factors (a product and a sum are two), where the device
    has them. bandwidth: of its memory, bytes a second. shared_memory: bytes that a program may
    have.
    """

    name: str
    capability: tuple[int, int] | None
    multiprocessors: int
    clock: float
    rates: tuple[tuple[str, float], ...]
    bandwidth: float
    shared_memory: int
    cache: int  # bytes of the last level
    exponentials_per_clock: int = 16  # of one multiprocessor

    def rate(self, dtype: str) -> float:
        """Operations a second for factors of a dtype. ValueError where the device has none."""
        found = dict(self.rates).get(dtype)
        if found is None:
            has = ", ".join(name for name, _ in self.rates)
            raise ValueError(f"{self.name} multiplies no {dtype}; it has {has}")
        return found

    @property
    def exponentials(self) -> float:
        """Base-2 exponentials a second."""
        return self.exponentials_per_clock * self.multiprocessors * self.clock


def _rates(
    half: float, tf32: float, single: float, fp8: float | None
) -> tuple[tuple[str, float], ...]:
    """In units of 10^12."""
    found = {"float32": single, "tf32": tf32, "bfloat16": half, "float16": half}
    if fp8 is not None:
        found["float8_e4m3fn"] = fp8
    return tuple((dtype, rate * 1e12) for dtype, rate in found.items())


_A100 = DeviceTarget(
    name="A100",
    capability=(8, 0),
    multiprocessors=108,
    clock=1.41e9,
    rates=_rates(312, 156, 19.5, None),
    bandwidth=2.039e12,
    shared_memory=163 * _KIB,
    cache=40 * _MIB,
)
_H100 = DeviceTarget(
    name="H100",
    capability=(9, 0),
    multiprocessors=132,
    clock=1.83e9,
    rates=_rates(989.4, 494.7, 66.9, 1978.9),
    bandwidth=3.35e12,
    shared_memory=227 * _KIB,
    cache=50 * _MIB,
)
_L40S = DeviceTarget(
    name="L40S",
    capability=(8, 9),
    multiprocessors=142,
    clock=2.52e9,
    rates=_rates(362.05, 183, 91.6, 733),
    bandwidth=8.64e11,
    shared_memory=99 * _KIB,
    cache=96 * _MIB,
)
_RTX_4090 = DeviceTarget(
    name="RTX 4090",
    capability=(8, 9),
    multiprocessors=128,
    clock=2.52e9,
    rates=_rates(165.2, 82.6, 82.6, 330.3),
    bandwidth=1.008e12,
    shared_memory=99 * _KIB,
    cache=72 * _MIB,
)

# A800 and H800 differ from A100 and H100 in what links them, H200 from H100 in its memory.
_ALL = (
    _A100,
    replace(_A100, name="A800"),
    _H100,
    replace(_H100, name="H800"),
    replace(_H100, name="H200", bandwidth=4.8e12),
    _L40S,
    _RTX_4090,
)
TARGETS: Mapping[str, DeviceTarget] = MappingProxyType({target.name: target for target in _ALL})


def cpu_target(cores: int) -> DeviceTarget:
    """Cores with AVX-512, each with some 100 billion operations a second and 15 billion bytes.

    No data sheet: measured on servers, to compare plans with each other.
    """
    rates = tuple((dtype, 1e11 * cores) for dtype in ("float32", "float16"))
    return DeviceTarget(
        name=f"CPU of {cores} cores",
        capability=None,
        multiprocessors=cores,
        clock=3e9,
        rates=(*rates, ("bfloat16", 2e11 * cores)),
        bandwidth=1.5e10 * cores,
        shared_memory=_MIB,
        cache=32 * _MIB,
        exponentials_per_clock=1,
    )


def target_of(name: str, capability: tuple[int, int]) -> DeviceTarget:
    """The target of a device that is there; of one that has no sheet here, the nearest's rates."""
    for target in sorted(_ALL, key=lambda target: len(target.name), reverse=True):
        if target.name.casefold() in name.casefold():
            return target
    older = [t for t in _ALL if t.capability is not None and t.capability <= capability]
    nearest = max(older or _ALL[:1], key=lambda target: target.capability or (0, 0))
    return replace(nearest, name=name, capability=capability)


def target_named(name: str) -> DeviceTarget:
    """By the device's name, or as "sm_90": the first of that capability. ValueError for others."""
    wanted = name.strip().casefold()
    for target in _ALL:
        assert target.capability is not None
        capability = "sm_{}{}".format(*target.capability)
        if wanted in (target.name.casefold(), target.name.casefold().replace(" ", ""), capability):
            return target
    raise ValueError(f"no target {name!r}: one of {', '.join(TARGETS)}, sm_80, sm_89, sm_90")
