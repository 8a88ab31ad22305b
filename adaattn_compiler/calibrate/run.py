"""`calibrate`: from a model and sample inputs to a policy.

measure every candidate at every site -> weigh heads -> choose -> hold to the budget -> envelope
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_compiler.calibrate.apply import Applying, Auditing
from adaattn_compiler.calibrate.board import Board
from adaattn_compiler.calibrate.chosen import Timing, only_faster
from adaattn_compiler.calibrate.chosen import in_words as slower_in_words
from adaattn_compiler.calibrate.draft import provenance, site_policy
from adaattn_compiler.calibrate.given import asked_for, batches_of
from adaattn_compiler.calibrate.idle import idle
from adaattn_compiler.calibrate.measure import SiteMeasurements
from adaattn_compiler.calibrate.outcome import Batch, Judge, Outcome
from adaattn_compiler.calibrate.progress import Progress, no_progress
from adaattn_compiler.calibrate.ranks import ALONE, Ranks
from adaattn_compiler.calibrate.resume import Journal
from adaattn_compiler.calibrate.samples import measured
from adaattn_compiler.calibrate.seed import (
    Proposing,
    in_words,
    proposed,
    within_head_by_head,
    within_together,
)
from adaattn_compiler.calibrate.select import (
    Selection,
    backed_off,
    by_price,
    decisions,
    options_of,
    within,
)
from adaattn_compiler.calibrate.weigh import weighed
from adaattn_compiler.kernels.heuristic import HEURISTICS
from adaattn_compiler.options import Options as RunOptions
from adaattn_compiler.options import parse_options
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy import Budget, Policy

log = logging.getLogger("adaattn_compiler")

# How much of a budget a preset uses.
PRESETS = {"quality": 0.5, "balanced": 0.8, "speed": 1.0}
_WEIGHING_BATCHES = 2
_AUDITED_TURNS = 16


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Mapping[str, Any] | tuple[Any, ...]],
    *,
    budget: float | None = None,
    output_budget: float | None = None,
    max_perplexity_change: float | None = None,
    preset: str = "balanced",
    seed: int = 0,
    heuristic: str | None = None,
    progress: Progress = no_progress,
) -> Policy:
    """Measure a model on sample inputs and decide how each of its heads is computed.

    batches: dictionaries of keyword arguments or tuples of arguments of the model, such as it will
    run on. Exactly one budget: `budget`, the relative error (L2) of each head's output;
    `output_budget`, that of the model's outputs; `max_perplexity_change`, relative (0.001 is 0.1%),
    for models that give logits [B, N, vocabulary] for tokens `input_ids` [B, N] (or `labels`).
    progress: told (stage, how many are done, of how many: 0 where that is not known).
    preset: how much of it to use: "quality" half, "balanced" 0.8, "speed" all. The same for the
    same seed, as far as the machine's times are. heuristic: "seed" takes what fixed thresholds
    propose (kernels/heuristic.py; to compare with, not recommended) where that keeps to the budget.
    Raises ValueError for what is not so, and where there is nothing to calibrate.
    """
    asked = asked_for(budget, output_budget, max_perplexity_change)
    given = batches_of(batches)
    found = calibration(model, given, asked, preset, seed, progress, heuristic=heuristic)
    for words in filter(None, (found.said, found.idle)):
        log.warning("%s", words)
    return found.policy


@dataclass(frozen=True)
class Calibration:
    """A policy, and what it was decided by. chosen: (exact, decided) seconds of each site that is
    not all exact, measured as it will run. said: of the heuristic, where there is one, and of sites
    that were slower as decided (chosen.py). idle: why nothing was chosen, where that is not for its
    errors (calibrate/idle.py)."""

    policy: Policy
    sites: Mapping[SiteKey, SiteMeasurements]
    chosen: Mapping[SiteKey, tuple[float, float]]
    said: str = ""
    idle: str = ""


def calibration(
    model: Callable[..., Any],
    batches: Sequence[Batch],
    budget: Budget,
    preset: str = "balanced",
    seed: int = 0,
    progress: Progress = no_progress,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
    heuristic: str | None = None,
) -> Calibration:
    """As `calibrate`, with all that was measured. journal: what is measured is kept in it, and what
    it has is not measured again. ranks: shared by them; each must have the same model and data."""
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it must be one of {', '.join(PRESETS)}")
    if heuristic not in (None, *HEURISTICS):
        raise ValueError(f"heuristic is {heuristic!r}; it must be {', '.join(HEURISTICS)}, or None")
    torch.manual_seed(seed)
    run = _Run(model, batches, budget, PRESETS[preset], progress, journal, ranks, heuristic)
    return run.result(seed)


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
        heuristic: str | None,
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
        self.heuristic = heuristic
        self.said = ""

    def result(self, seed: int) -> Calibration:
        if self.budget.kind == "max_perplexity_change" and not self.judge.has_logits:
            raise ValueError(
                "max_perplexity_change wants a model that gives `logits` for `input_ids` or "
                "`labels`; use output_budget or budget"
            )
        sites = self._measured()
        if not sites:
            refused = "; ".join(f"{k.name}: {why}" for k, why in self.board.refused.items())
            raise ValueError(f"no attention to calibrate was found ({refused or 'none seen'})")
        selection = self._selected(sites)
        timed = self._timed(selection, sites)
        selection = only_faster(selection, timed)
        outcome = self._outcome(selection, sites)
        largest = self._audited(selection, sites)
        entries = tuple(
            site_policy(site, selection[k], largest.get(k), self.budget, self.board.weights[k])
            for k, site in sites.items()
        )
        origin = provenance(self.model, self.batches, self.budget, seed, outcome)
        policy = Policy(entries, origin)
        said = "\n".join(filter(None, (self.said, slower_in_words(timed))))
        why_idle = idle(policy, sites, self.budget, self.limit)
        kept = {key: times for key, times in timed.items() if any(selection[key])}
        return Calibration(policy, sites, kept, said, why_idle)

    # -- stages --------------------------------------------------------------------------------

    def _measured(self) -> dict[SiteKey, SiteMeasurements]:
        return measured(self.board, self.batches, self.progress, self.journal, self.ranks)

    def _selected(self, sites: Mapping[SiteKey, SiteMeasurements]) -> Selection:
        if self.heuristic is not None:
            return self._proposed(sites)
        if self.budget.kind == "budget":
            return {key: within(options_of(site), self.limit) for key, site in sites.items()}
        options = weighed(
            sites, lambda choice: self._outcome(choice, sites, _WEIGHING_BATCHES), self.progress
        )
        holds = self._keeps(sites)
        best = by_price(options, holds)
        return best if holds(best) else backed_off(options, best, holds)

    def _proposed(self, sites: Mapping[SiteKey, SiteMeasurements]) -> Selection:
        proposing = Proposing()
        self.progress("asking the heuristic", 0, 1)
        self.board.run(*self.batches[0], proposing)
        self.progress("asking the heuristic", 1, 1)
        # Of the first rank: others might round otherwise.
        wanted = self.ranks.from_first(proposed(sites, proposing.proposals))
        if self.budget.kind == "budget":
            found = within_head_by_head(sites, wanted, self.limit)
        else:
            found = within_together(sites, wanted, self._keeps(sites))
        self.said = in_words(wanted, found)
        return found

    def _keeps(self, sites: Mapping[SiteKey, SiteMeasurements]) -> Callable[[Selection], bool]:
        """Whether a selection keeps to the budget, as measured."""
        tried = itertools.count(1)

        def holds(selection: Selection) -> bool:
            self.progress("holding the model to the budget", next(tried), 0)
            return self._holds(self._outcome(selection, sites))

        return holds

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
