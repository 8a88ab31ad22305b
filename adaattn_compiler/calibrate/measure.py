"""What each candidate does to each head on sample inputs: its error and its time."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from adaattn_compiler.calibrate.basis import bases_of_keys
from adaattn_compiler.calibrate.board import Tensors, exactly
from adaattn_compiler.calibrate.candidates import candidates_for
from adaattn_compiler.calibrate.gather import Numbers, gathered
from adaattn_compiler.calibrate.times import Timekeeping, Times
from adaattn_compiler.decision import HeadDecision, KeyBasis
from adaattn_compiler.kernels.audit import relative_error
from adaattn_compiler.kernels.cpu.decided import AS_DECIDED, DecidedRunner
from adaattn_compiler.kernels.cpu.runner import plan_of
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.envelope import guard_statistics, names
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.runtime.averages import MovingAverages
from adaattn_compiler.runtime.state import new_state


def unguarded(problem: Problem, heads: Sequence[HeadDecision]) -> DecidedRunner:
    """A runner of decisions that no guard stops and nothing audits."""
    open_low = ((float("-inf"),) * len(heads),) * len(names())
    open_high = ((float("inf"),) * len(heads),) * len(names())
    limit = (float("inf"),) * len(heads)
    base = plan_of(problem, mixed=problem.dtype == torch.float32)
    return DecidedRunner(DecidedPlan(base, tuple(heads), open_low, open_high, limit, limit, 0))


def decided(runner: DecidedRunner, tensors: Tensors) -> torch.Tensor:
    """Its result, every head as decided."""
    q, k, v, operands, params = tensors
    flags = torch.full(q.shape[:2], AS_DECIDED, dtype=torch.int32)
    return runner(q, k, v, operands, params, flags, new_state(q.shape[1]))


class Stale(Exception):
    """What was measured earlier is not of this model as it runs now."""


@dataclass(frozen=True)
class Call:
    """Of one call of a site. errors: [candidates, heads]. low, high: of each statistic of the
    inputs over the batch, [9, heads]. rows, columns: lengths. statistics: what the heads do."""

    errors: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    rows: int
    columns: int
    statistics: Numbers = field(default_factory=dict)


# The calls of each site in one sample.
Sample = dict[SiteKey, list[Call]]


@dataclass
class SiteMeasurements:
    """Of one site. errors: for each sample [candidates, heads], relative L2 of the head's output.
    seconds: [candidates, heads], of one head (times.py). low, high: the range of each statistic of
    the inputs (kernels/envelope.py), [9, heads]. rows, columns: the lengths that were seen.
    statistics: of the heads, averaged in the order of the calls. bases: of the key heads, by rank
    (calibrate/basis.py): where a candidate has a basis, each head has its own.
    """

    key: SiteKey
    problem: Problem
    candidates: tuple[HeadDecision, ...]
    seconds: torch.Tensor
    errors: list[torch.Tensor] = field(default_factory=list)
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    statistics: MovingAverages = field(default_factory=MovingAverages)
    bases: Mapping[int, tuple[KeyBasis, ...]] = field(default_factory=dict)

    def decided(self, chosen: Sequence[int]) -> tuple[HeadDecision, ...]:
        """The decision of each head, of the number of its candidate."""
        group = self.problem.spec.group
        return tuple(self._own(self.candidates[c], head // group) for head, c in enumerate(chosen))

    def took(self, chosen: Sequence[int]) -> float:
        """Seconds of all heads together, of the number of each head's candidate."""
        return float(self.seconds[list(chosen), range(len(chosen))].sum())

    def _own(self, candidate: HeadDecision, kv_head: int) -> HeadDecision:
        if candidate.basis is None:
            return candidate
        return replace(candidate, basis=self.bases[candidate.basis.rank][kv_head])

    def add(self, call: Call) -> None:
        """One more call."""
        self.errors.append(call.errors)
        self.low = call.low if self.low is None else torch.minimum(self.low, call.low)
        self.high = call.high if self.high is None else torch.maximum(self.high, call.high)
        self.rows.append(call.rows)
        self.columns.append(call.columns)
        self.statistics = self.statistics.updated(call.statistics)

    def p99(self) -> torch.Tensor:
        """[candidates, heads] over the samples."""
        return torch.stack(self.errors).quantile(0.99, 0)

    def mean(self) -> torch.Tensor:
        """[candidates, heads] over the samples."""
        return torch.stack(self.errors).mean(0)


class Measuring:
    """The handler that measures all candidates at each site, and answers exactly.

    sites: those seen, nothing added to them. times: those known from before are not measured again.
    sample: the calls since it was last emptied; turn: its number, so that statistics are of other
    rows in each. Effective ranks are of the first call of a site in the first.
    """

    def __init__(self, times: Mapping[SiteKey, Times] | None = None) -> None:
        self.sites: dict[SiteKey, SiteMeasurements] = {}
        self.times: dict[SiteKey, Times] = dict(times or {})
        self.sample: Sample = {}
        self.turn = 0
        self._timekeeping = Timekeeping()
        self._runners: dict[tuple[object, ...], DecidedRunner] = {}

    def __call__(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        exact = exactly(key, problem, tensors)
        site = self._site(key, problem, tensors)
        found = [
            relative_error(decided(runner, tensors).float(), exact.float()).amax(0)
            for runner in self._runners_of(site)[1:]
        ]
        errors = torch.stack([torch.zeros_like(exact[0, :, 0, 0]).float(), *found])
        lengths = tensors[0].shape[2], tensors[1].shape[2]
        ranks = self.turn == 0 and key not in self.sample
        numbers = gathered(tensors, problem.spec, self.turn, ranks)
        call = Call(errors, *ranges(tensors), *lengths, numbers)
        self.sample.setdefault(key, []).append(call)
        return exact

    def look(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        """The handler that makes sites known whose errors and times were measured elsewhere."""
        self._site(key, problem, tensors)
        return exactly(key, problem, tensors)

    def _site(self, key: SiteKey, problem: Problem, tensors: Tensors) -> SiteMeasurements:
        if key not in self.sites:
            candidates = candidates_for(problem)
            ranks = {c.basis.rank for c in candidates if c.basis is not None}
            bases = {rank: bases_of_keys(tensors[1], rank) for rank in ranks}
            site = SiteMeasurements(key, problem, candidates, torch.zeros(0), bases=bases)
            name = _name_of(site.candidates)
            known = self.times.get(key)
            if known is None:
                known = Times(name, self._seconds_of(site, tensors))
            elif known.candidates != name:
                raise Stale(f"other candidates are tried for {key.name or '(root)'} now")
            self.times[key] = known
            site.seconds = torch.tensor(known.seconds, dtype=torch.float64)
            self.sites[key] = site
        _check_heads(key, self.sites[key].problem, problem)
        return self.sites[key]

    def _runners_of(self, site: SiteMeasurements) -> list[DecidedRunner]:
        return [self._runner_of(site, i) for i in range(len(site.candidates))]

    def _runner_of(self, site: SiteMeasurements, number: int) -> DecidedRunner:
        """With that candidate for all heads; sites alike share it, but for bases of keys."""
        own = site.key if site.candidates[number].basis is not None else None
        kind = (_kind(site.problem), number, own)
        if kind not in self._runners:
            heads = [number] * site.problem.shape.heads
            self._runners[kind] = unguarded(site.problem, site.decided(heads))
        return self._runners[kind]

    def _seconds_of(
        self, site: SiteMeasurements, tensors: Tensors
    ) -> tuple[tuple[float, ...], ...]:
        runners = self._runners_of(site)
        ways = [functools.partial(decided, runner, tensors) for runner in runners]
        ways[0] = functools.partial(exactly, site.key, site.problem, tensors)

        def skipped(number: int) -> torch.Tensor:
            if site.candidates[number].skip is None:
                return torch.zeros(site.problem.shape.heads)
            return runners[number].skipped(*tensors).sum(0)

        return self._timekeeping.seconds(_kind(site.problem), site.candidates, ways, skipped)


def _check_heads(key: SiteKey, first: Problem, problem: Problem) -> None:
    """That a site has the heads that it had at first. It need not: passes/lone_axis.py."""
    was, now = (f"{p.shape.heads} heads, {p.shape.kv_heads} of keys" for p in (first, problem))
    if was != now:
        raise ValueError(
            f"{key.name or '(root)'} has {was}, in one sample and {now}, in another: its batch "
            "cannot be told from its heads. Calibrate on samples of one batch size, or give the "
            "attention tensors [B, H, length, D]"
        )


def _kind(problem: Problem) -> tuple[object, ...]:
    return (problem.spec, problem.shape, problem.dtype)


def _name_of(candidates: Sequence[HeadDecision]) -> str:
    return hashlib.blake2b(repr(tuple(candidates)).encode(), digest_size=8).hexdigest()


def ranges(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high) of each statistic of the inputs over the batch, [9, heads]."""
    statistics = guard_statistics(*tensors[:3])
    return statistics.amin(1), statistics.amax(1)
