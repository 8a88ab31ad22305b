"""`calibrate`: from a model and sample inputs to a policy.

measure every candidate at every site -> weigh heads -> choose -> hold to the budget -> envelope
"""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from adaattn_compiler.calibrate.apply import Applying, Auditing
from adaattn_compiler.calibrate.board import Board
from adaattn_compiler.calibrate.chosen import Timing
from adaattn_compiler.calibrate.measure import SiteMeasurements
from adaattn_compiler.calibrate.outcome import Batch, Judge, Outcome
from adaattn_compiler.calibrate.ranks import ALONE, Ranks
from adaattn_compiler.calibrate.resume import Journal
from adaattn_compiler.calibrate.samples import measured
from adaattn_compiler.calibrate.select import (
    Options,
    Selection,
    backed_off,
    by_price,
    decisions,
    options_of,
    within,
)
from adaattn_compiler.decision import SiteDecision
from adaattn_compiler.fingerprint import data_fingerprint, weights_fingerprint
from adaattn_compiler.kernels.decided_kernel import AUDIT_ERROR
from adaattn_compiler.kernels.envelope import names
from adaattn_compiler.options import Options as RunOptions
from adaattn_compiler.options import parse_options
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy import (
    Budget,
    Envelope,
    MeasuredError,
    Policy,
    Provenance,
    Range,
    Seconds,
    SitePolicy,
)
from adaattn_compiler.target import cpu_target

# How much of a budget a preset uses.
PRESETS = {"quality": 0.5, "balanced": 0.8, "speed": 1.0}
# Heads up to which the weight of each is measured by itself; above it, of each site's together.
_MOST_WEIGHED_HEADS = 128
_WEIGHING_BATCHES = 2
# The error at which a head's weight is measured, about.
_WEIGHING_ERROR = 0.05
_AUDITED_TURNS = 16
# Room beyond what calibration saw; the least budget of a head that has none from the user.
_ROOM, _LEAST_BUDGET = 2.0, 0.005

Progress = Callable[[str, int, int], None]


def no_progress(stage: str, done: int, of: int) -> None:
    """Says nothing."""


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Mapping[str, Any] | tuple[Any, ...]],
    *,
    budget: float | None = None,
    output_budget: float | None = None,
    max_perplexity_change: float | None = None,
    preset: str = "balanced",
    seed: int = 0,
    progress: Progress = no_progress,
) -> Policy:
    """Measure a model on sample inputs and decide how each of its heads is computed.

    batches: dictionaries of keyword arguments or tuples of arguments of the model, such as it will
    run on. Exactly one budget: `budget`, the relative error (L2) of each head's output;
    `output_budget`, that of the model's outputs; `max_perplexity_change`, relative (0.001 is 0.1%),
    for models that give logits [B, N, vocabulary] for tokens `input_ids` [B, N] (or `labels`).
    progress: told (stage, how many are done, of how many: 0 where that is not known).
    preset: how much of it to use: "quality" half, "balanced" 0.8, "speed" all. The same for the
    same seed, as far as the machine's times are. Raises ValueError for what is not so, and where
    there is nothing to calibrate.
    """
    asked = asked_for(budget, output_budget, max_perplexity_change)
    return calibration(model, batches_of(batches), asked, preset, seed, progress).policy


@dataclass(frozen=True)
class Calibration:
    """A policy, and what it was decided by. chosen: (exact, decided) seconds of each site that is
    not all exact, measured as it will run."""

    policy: Policy
    sites: Mapping[SiteKey, SiteMeasurements]
    chosen: Mapping[SiteKey, tuple[float, float]]


def calibration(
    model: Callable[..., Any],
    batches: Sequence[Batch],
    budget: Budget,
    preset: str = "balanced",
    seed: int = 0,
    progress: Progress = no_progress,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> Calibration:
    """As `calibrate`, with all that was measured. journal: what is measured is kept in it, and what
    it has is not measured again. ranks: shared by them; each must have the same model and data."""
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    torch.manual_seed(seed)
    return _Run(model, batches, budget, PRESETS[preset], progress, journal, ranks).result(seed)


def batches_of(batches: Iterable[Mapping[str, Any] | tuple[Any, ...]]) -> list[Batch]:
    """As (args, kwargs). ValueError where one is neither, or there is none."""
    found = [_batch(batch) for batch in batches]
    if not found:
        raise ValueError("batches is empty; give at least one")
    return found


def asked_for(
    budget: float | None, output_budget: float | None, max_perplexity_change: float | None
) -> Budget:
    kinds = {
        "budget": budget,
        "output_budget": output_budget,
        "max_perplexity_change": max_perplexity_change,
    }
    given = {kind: value for kind, value in kinds.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{', '.join(given) or 'no budget'} given; give one of {', '.join(kinds)}")
    ((kind, value),) = given.items()
    if not 0 < value < math.inf:
        raise ValueError(f"{kind} is {value}; it must be above 0")
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


class _Run:
    """One calibration."""

    def __init__(
        self,
        model: Callable[..., Any],
        batches: Sequence[Batch],
        budget: Budget,
        share: float,
        progress: Progress,
        journal: Journal | None,
        ranks: Ranks,
    ) -> None:
        self.model = model
        self.batches = batches
        self.budget = budget
        self.limit = budget.value * share
        self.progress = progress
        # Kernels are not to be measured where all sites go to the board.
        self.board = Board(model, parse_options({"measure": False})[0])
        self.judge = Judge(self.board, batches, ranks)
        self.journal = journal
        self.ranks = ranks

    def result(self, seed: int) -> Calibration:
        sites = self._measured()
        if not sites:
            refused = "; ".join(f"{k.name}: {why}" for k, why in self.board.refused.items())
            raise ValueError(f"no attention to calibrate was found ({refused or 'none seen'})")
        if self.budget.kind == "max_perplexity_change" and not self.judge.has_logits:
            raise ValueError(
                "max_perplexity_change wants a model that gives `logits` for `input_ids` or "
                "`labels`; use output_budget or budget"
            )
        selection = self._selected(sites)
        outcome = self._outcome(selection, sites)
        largest = self._audited(selection, sites)
        policy = Policy(
            tuple(
                self._site(site, selection[key], largest.get(key)) for key, site in sites.items()
            ),
            self._provenance(seed, outcome),
        )
        return Calibration(policy, sites, self._timed(selection, sites))

    # -- stages --------------------------------------------------------------------------------

    def _measured(self) -> dict[SiteKey, SiteMeasurements]:
        return measured(self.board, self.batches, self.progress, self.journal, self.ranks)

    def _selected(self, sites: Mapping[SiteKey, SiteMeasurements]) -> Selection:
        if self.budget.kind == "budget":
            return {key: within(options_of(site), self.limit) for key, site in sites.items()}
        options = self._weighed(sites)
        tried = 0

        def holds(selection: Selection) -> bool:
            nonlocal tried
            tried += 1
            self.progress("holding the model to the budget", tried, 0)
            return self._holds(self._outcome(selection, sites))

        best = by_price(options, holds)
        return best if holds(best) else backed_off(options, best, holds)

    def _weighed(self, sites: Mapping[SiteKey, SiteMeasurements]) -> dict[SiteKey, Options]:
        """What a head's error does to the model, as measured of one error of each."""
        heads = [(key, head) for key, site in sites.items() for head in range(_heads(site))]
        if len(heads) <= _MOST_WEIGHED_HEADS:
            groups = [[place] for place in heads]
        else:
            groups = [[(key, head) for head in range(_heads(site))] for key, site in sites.items()]
        weights = {
            key: torch.zeros(_heads(site), dtype=torch.float64) for key, site in sites.items()
        }
        for i, group in enumerate(groups):
            self.progress("weighing heads", i, len(groups))
            damage, squares = self._damage_of(group, sites)
            for key, head in group:
                weights[key][head] = damage / squares if squares else 0.0
        return {key: options_of(site, weights[key]) for key, site in sites.items()}

    def _damage_of(
        self, group: Sequence[tuple[SiteKey, int]], sites: Mapping[SiteKey, SiteMeasurements]
    ) -> tuple[float, float]:
        """(what it does to the model, the sum of squared errors) of some heads disturbed."""
        selection = {key: [0] * _heads(site) for key, site in sites.items()}
        squares = 0.0
        for key, head in group:
            error = sites[key].mean()[:, head]
            distance = (error.clamp(min=1e-9) / _WEIGHING_ERROR).log().abs()
            distance[0] = float("inf")
            selection[key][head] = int(distance.argmin())
            squares += float(error[selection[key][head]]) ** 2
        chosen = {key: tuple(c) for key, c in selection.items()}
        outcome = self._outcome(chosen, sites, _WEIGHING_BATCHES)
        damage = outcome.output_error**2 if outcome.kl is None else outcome.kl
        return max(damage, 0.0), squares

    def _outcome(
        self,
        selection: Selection,
        sites: Mapping[SiteKey, SiteMeasurements],
        most: int | None = None,
    ) -> Outcome:
        applying = Applying(decisions(selection, sites))
        return self.judge.run(lambda i: applying, range(len(self.batches))[:most])

    def _holds(self, outcome: Outcome) -> bool:
        if self.budget.kind == "output_budget":
            return outcome.output_error <= self.limit
        assert outcome.nll is not None
        assert outcome.nll_error is not None
        assert outcome.kl is not None
        # Other text than this must be within it, too: KL, and twice the uncertainty, are counted.
        limit = math.log1p(self.limit)
        return max(outcome.nll, 0.0) + 2 * outcome.nll_error <= limit and outcome.kl <= limit

    def _audited(
        self, selection: Selection, sites: Mapping[SiteKey, SiteMeasurements]
    ) -> dict[SiteKey, torch.Tensor]:
        rows = RunOptions().audit_rows
        auditing = Auditing(decisions(selection, sites), rows, _AUDITED_TURNS)
        own = self.ranks.own(self.batches)
        for i, (args, kwargs) in enumerate(own):
            self.progress("drawing envelopes", i, len(own))
            self.board.run(args, kwargs, auditing)
        largest: dict[SiteKey, torch.Tensor] = {}
        for found in self.ranks.gather(auditing.largest):
            for key, error in found.items():
                largest[key] = torch.maximum(largest.get(key, error), error)
        return largest

    def _timed(
        self, selection: Selection, sites: Mapping[SiteKey, SiteMeasurements]
    ) -> dict[SiteKey, tuple[float, float]]:
        """By the first rank, while the others wait: they would be in its way."""
        timing = Timing(decisions(selection, sites))
        if self.ranks.is_first:
            self.progress("timing the choice", 0, 1)
            self.board.run(*self.batches[0], timing)
            self.progress("timing the choice", 1, 1)
        return self.ranks.from_first(timing.seconds)

    # -- what is written -----------------------------------------------------------------------

    def _site(
        self, site: SiteMeasurements, chosen: tuple[int, ...], audited: torch.Tensor | None
    ) -> SitePolicy:
        heads = range(_heads(site))
        p99, mean = site.p99(), site.mean()
        errors = tuple(
            MeasuredError(float(mean[c, i]), float(p99[c, i]))
            for i, c in zip(heads, chosen, strict=True)
        )
        shape = site.problem.shape
        own = self.budget.kind == "budget"
        seen = p99.new_zeros(2, len(heads)) if audited is None else audited
        budgets = tuple(
            self.budget.value
            if own
            else max(_ROOM * error.p99, _ROOM * float(seen[1, i]), _LEAST_BUDGET)
            for i, error in enumerate(errors)
        )
        seconds = Seconds(
            site.seconds[0], sum(site.seconds[c] for c in chosen) / len(chosen), measured=True
        )
        return SitePolicy(
            site.key.name,
            site.key.ordinal,
            site.problem.spec.key(),
            shape.kv_heads,
            shape.head_dim,
            shape.value_dim,
            str(site.problem.dtype).removeprefix("torch."),
            SiteDecision(tuple(site.candidates[c] for c in chosen)),
            _envelope(site, audited, budgets),
            budgets,
            errors,
            seconds,
            weights=self.board.weights[site.key],
        )

    def _provenance(self, seed: int, outcome: Outcome) -> Provenance:
        results = {
            "output_error": outcome.output_error,
            "kl": outcome.kl,
            "perplexity_change": outcome.perplexity_change,
        }
        parameters = getattr(self.model, "named_parameters", lambda: ())
        return Provenance(
            versions={
                "adaattn": metadata.version("adaattn-compiler"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            device=cpu_target(torch.get_num_threads()).name,
            weights=weights_fingerprint(parameters()),
            data=data_fingerprint(self.batches),
            created=datetime.date.today().isoformat(),
            seed=seed,
            budget=self.budget,
            results={name: value for name, value in results.items() if value is not None},
        )


def _heads(site: SiteMeasurements) -> int:
    return site.problem.shape.heads


def _envelope(
    site: SiteMeasurements, audited: torch.Tensor | None, budgets: Sequence[float]
) -> Envelope:
    assert site.low is not None
    assert site.high is not None
    statistics = {
        name: tuple(_widened(name, float(a), float(b)) for a, b in zip(low, high, strict=True))
        for name, low, high in zip(names(), site.low, site.high, strict=True)
    }
    if audited is not None:
        limits = (
            max(_ROOM * float(seen), budget)
            for seen, budget in zip(audited[0], budgets, strict=True)
        )
        statistics[AUDIT_ERROR] = tuple(Range(0.0, limit) for limit in limits)
    # Shorter texts leave less out; longer ones were not seen.
    return Envelope(
        Range(max(min(site.rows) // 2, 1), max(site.rows)),
        Range(max(min(site.columns) // 2, 1), max(site.columns)),
        statistics,
    )


def _widened(name: str, low: float, high: float) -> Range:
    """With room; of a share, half of what is left to 1."""
    if name.endswith("_mean"):
        return Range(0.0, high + (1 - high) / 2)
    return Range(low / _ROOM, high * _ROOM)
