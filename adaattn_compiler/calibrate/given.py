"""What a calibration is given: batches and a budget, checked at the edge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adaattn_compiler.calibrate.outcome import Batch
from adaattn_compiler.policy import LARGEST_BUDGET, Budget


def batches_of(batches: Iterable[Mapping[str, Any] | tuple[Any, ...]]) -> list[Batch]:
    """As (args, kwargs). ValueError where one is neither, or there is none."""
    found = [_batch(batch) for batch in batches]
    if not found:
        raise ValueError("batches is empty; give at least one")
    return found


def asked_for(
    budget: float | None, output_budget: float | None, max_perplexity_change: float | None
) -> Budget:
    """The one that is given. ValueError where that is none, several, or out of range."""
    kinds = {
        "budget": budget,
        "output_budget": output_budget,
        "max_perplexity_change": max_perplexity_change,
    }
    given = {kind: value for kind, value in kinds.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{', '.join(given) or 'no budget'} given; give one of {', '.join(kinds)}")
    ((kind, value),) = given.items()
    if not 0 < value <= LARGEST_BUDGET:
        raise ValueError(
            f"{kind} is {value}; it must be above 0, at most {LARGEST_BUDGET:g} (write 5% as 0.05)"
        )
    return Budget(kind, float(value))


def _batch(batch: Mapping[str, Any] | tuple[Any, ...]) -> Batch:
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise ValueError(
        f"a batch is {type(batch).__name__}; it must be a dictionary of keyword arguments or a "
        "tuple of arguments"
    )
