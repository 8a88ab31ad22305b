"""What is written into a policy: of each site its decision, envelope and budgets; where from."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from adaattn_compiler.calibrate.measure import SiteMeasurements
from adaattn_compiler.calibrate.outcome import Batch, Outcome
from adaattn_compiler.decision import SiteDecision
from adaattn_compiler.fingerprint import data_fingerprint, weights_fingerprint
from adaattn_compiler.kernels.decided_kernel import AUDIT_ERROR
from adaattn_compiler.kernels.envelope import ROOM, names, widened
from adaattn_compiler.policy import (
    LARGEST_BUDGET,
    Budget,
    Envelope,
    MeasuredError,
    Provenance,
    Range,
    Seconds,
    SitePolicy,
)
from adaattn_compiler.spec_in_words import spec_in_words
from adaattn_compiler.target import cpu_target

# The least budget of a head that has none from the user.
_LEAST_BUDGET = 0.005
_DIGITS = 6


def site_policy(
    site: SiteMeasurements,
    chosen: Sequence[int],
    audited: torch.Tensor | None,
    budget: Budget,
    weights: str | None,
) -> SitePolicy:
    """chosen: the number of each head's candidate. audited: [2,H], the largest errors that audits
    saw (apply.py), if any did. weights: the fingerprint of the site's module."""
    heads = range(site.problem.shape.heads)
    p99, mean = site.p99(), site.mean()
    errors = tuple(
        MeasuredError(float(mean[c, i]), float(p99[c, i]))
        for i, c in zip(heads, chosen, strict=True)
    )
    shape = site.problem.shape
    budgets = _budgets(errors, audited, budget)
    exact = [0] * shape.heads
    seconds = Seconds(site.took(exact), site.took(chosen), measured=False)  # heads alike
    return SitePolicy(
        site.key.name,
        site.key.ordinal,
        site.problem.spec.key(),
        shape.kv_heads,
        shape.head_dim,
        shape.value_dim,
        str(site.problem.dtype).removeprefix("torch."),
        SiteDecision(site.decided(chosen)),
        _envelope(site, audited, budgets),
        budgets,
        errors,
        seconds,
        weights=weights,
        statistics=_statistics(site) or None,
        computes=spec_in_words(site.problem.spec),
    )


def provenance(
    model: Any, batches: Sequence[Batch], budget: Budget, seed: int, outcome: Outcome
) -> Provenance:
    """Of a calibration that was done here."""
    results = {
        "output_error": outcome.output_error,
        "kl": outcome.kl,
        "perplexity_change": outcome.perplexity_change,
    }
    parameters = getattr(model, "named_parameters", lambda: ())
    return Provenance(
        versions={
            "adaattn": metadata.version("adaattn-compiler"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        device=cpu_target(torch.get_num_threads()).name,
        weights=weights_fingerprint(parameters()),
        data=data_fingerprint(batches),
        created=datetime.date.today().isoformat(),
        seed=seed,
        budget=budget,
        results={name: value for name, value in results.items() if value is not None},
    )


def _budgets(
    errors: Sequence[MeasuredError], audited: torch.Tensor | None, budget: Budget
) -> tuple[float, ...]:
    """Of each head: the user's, where that is of heads."""
    if budget.kind == "budget":
        return (budget.value,) * len(errors)
    seen = [0.0] * len(errors) if audited is None else audited[1].tolist()
    return tuple(
        min(max(ROOM * error.p99, ROOM * largest, _LEAST_BUDGET), LARGEST_BUDGET)
        for error, largest in zip(errors, seen, strict=True)
    )


def _statistics(site: SiteMeasurements) -> dict[str, tuple[float, ...]]:
    """To as many digits as mean anything."""
    return {
        name: tuple(float(f"{mean:.{_DIGITS}g}") for mean in means)
        for name, means in site.statistics.means().items()
    }


def _envelope(
    site: SiteMeasurements, audited: torch.Tensor | None, budgets: Sequence[float]
) -> Envelope:
    assert site.low is not None
    assert site.high is not None
    statistics = {
        name: tuple(
            Range(*widened(name, float(a), float(b))) for a, b in zip(low, high, strict=True)
        )
        for name, low, high in zip(names(), site.low, site.high, strict=True)
    }
    if audited is not None:
        limits = (
            max(ROOM * float(seen), budget)
            for seen, budget in zip(audited[0], budgets, strict=True)
        )
        statistics[AUDIT_ERROR] = tuple(Range(0.0, limit) for limit in limits)
    # Shorter texts leave less out; longer ones were not seen.
    return Envelope(
        Range(max(min(site.rows) // 2, 1), max(site.rows)),
        Range(max(min(site.columns) // 2, 1), max(site.columns)),
        statistics,
    )
