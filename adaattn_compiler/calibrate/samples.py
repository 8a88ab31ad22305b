"""Measuring sample by sample: kept after each, gone on with after an interruption, shared by ranks.

What is measured of a sample does not depend on the others, so that it makes no difference in which
process, and in which order, samples are measured. Times are measured once, on the first sample, by
the first rank while the others wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaattn_compiler.calibrate.board import Board, Tensors
from adaattn_compiler.calibrate.measure import (
    Call,
    Measuring,
    Sample,
    SiteMeasurements,
    Stale,
    ranges,
)
from adaattn_compiler.calibrate.outcome import Batch
from adaattn_compiler.calibrate.progress import Progress
from adaattn_compiler.calibrate.ranks import ALONE, Ranks
from adaattn_compiler.calibrate.resume import Begun, Journal
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.passes.choices import SiteKey

# How far statistics of the same inputs may lie apart: sums may run in another order.
_SAME = 1e-3


def measured(
    board: Board,
    batches: Sequence[Batch],
    progress: Progress,
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> dict[SiteKey, SiteMeasurements]:
    """All sites with all candidates' errors on all samples. journal: the first rank's."""
    begun = ranks.from_first(Begun() if journal is None else journal.begun)
    if begun.samples:
        try:
            return _Samples(board, batches, progress, journal, ranks, begun).measured()
        except Stale as stale:
            if journal is not None:
                journal.disowned(str(stale))
    return _Samples(board, batches, progress, journal, ranks, Begun()).measured()


class _Samples:
    """The samples of one calibration, some of them measured before."""

    def __init__(
        self,
        board: Board,
        batches: Sequence[Batch],
        progress: Progress,
        journal: Journal | None,
        ranks: Ranks,
        begun: Begun,
    ) -> None:
        self._board = board
        self._batches = batches
        self._progress = progress
        self._journal = journal
        self._ranks = ranks
        self._samples = dict(begun.samples)
        self._measuring = Measuring(begun.times)

    def measured(self) -> dict[SiteKey, SiteMeasurements]:
        self._say()
        self._first()
        missing = [i for i in range(len(self._batches)) if i not in self._samples]
        for start in range(0, len(missing), self._ranks.count):
            self._round(missing[start : start + self._ranks.count])
        return self._assembled()

    def _first(self) -> None:
        """The first sample, before all others on every rank: sites are as it shows them."""
        if 0 in self._samples:
            return self._look(0)
        if self._ranks.is_first:
            self._measure(0)
        found = (self._samples.get(0, {}), self._measuring.times)
        self._samples[0], self._measuring.times = self._ranks.from_first(found)
        if not self._ranks.is_first:
            self._look(0)
        self._keep()

    def _round(self, numbers: Sequence[int]) -> None:
        """At most one sample for each rank."""
        found: dict[int, Sample] = {}
        for i in self._ranks.own(numbers):
            self._measure(i)
            found[i] = self._samples[i]
        for samples, times in reversed(self._ranks.gather((found, self._measuring.times))):
            self._samples.update(samples)
            self._measuring.times.update(times)
        self._keep()

    def _measure(self, i: int) -> None:
        self._measuring.sample, self._measuring.turn = {}, i
        self._board.run(*self._batches[i], self._measuring)
        self._samples[i] = self._measuring.sample

    def _look(self, i: int) -> None:
        """Only make the sites of a measured sample known. Raises Stale where it was of others."""
        seen = _Checked(self._measuring, self._samples[i])
        self._board.run(*self._batches[i], seen)

    def _keep(self) -> None:
        if self._journal is not None:
            self._journal.keep(Begun(self._samples, self._measuring.times))
        self._say()

    def _say(self) -> None:
        self._progress("measuring candidates", len(self._samples), len(self._batches))

    def _assembled(self) -> dict[SiteKey, SiteMeasurements]:
        sites, times = self._measuring.sites, self._measuring.times
        for i, sample in sorted(self._samples.items()):
            if any(key not in sites for key in sample):
                self._look(i)
            for key, calls in sample.items():
                for call in calls:
                    sites[key].add(call)
        # Of the first rank that saw a site, for all.
        for key, site in sites.items():
            site.seconds = torch.tensor(times[key].seconds, dtype=torch.float64)
        return sites


class _Checked:
    """The handler that makes sites known, if their inputs are those that were measured."""

    def __init__(self, measuring: Measuring, sample: Sample) -> None:
        self._measuring = measuring
        self._calls = {key: iter(calls) for key, calls in sample.items()}

    def __call__(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        call: Call | None = next(self._calls.get(key, iter(())), None)
        low, high = ranges(tensors)
        if call is None or not (_alike(low, call.low) and _alike(high, call.high)):
            raise Stale(f"{key.name or '(root)'} meets other inputs now")
        return self._measuring.look(key, problem, tensors)


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=_SAME, atol=1e-6)
