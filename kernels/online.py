"""Decisions of a site by what its first calls were like: the plan, what is gathered, the choice.

A call that gathers measures some of the candidates, so that all of them have been measured a few
times in the end: their errors by head, their times beside the exact kernel's of the same call, and
the statistics that guards look at. Then each head takes the fastest candidate whose worst error
keeps to its budget, inside of the envelope that was seen, as if a policy said so.

What is gathered stands in the site's state (runtime/state.py), below the rows of its heads: a
tensor that belongs to one model, so that neither the graph nor any cache knows of it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adaattn_compiler.decision import EXACT, HeadDecision
from adaattn_compiler.kernels.decided import DecidedPlan, read_head, written_head
from adaattn_compiler.kernels.envelope import ROOM, names, widened
from adaattn_compiler.runtime.state import Column

# How much of the budget is used, as in calibration.
SHARE = 0.8
# Calls that each candidate is measured in, where there are so many.
_TRIES = 3
# What takes more than this share of the exact kernel's time is not worth being inexact for.
WORTH = 0.95
# How often a choice is timed before it is exact for good: the machine may have been busy.
MOST_TRIALS = 4
# Values of Count.DECIDED.
BY_HEAD, ALL_EXACT = 1, 2

Array = npt.NDArray[Any]


class Count(enum.IntEnum):
    """begun, ended: calls that gather. measured: of these, calls from which something was learned.
    decided: 1 from then on, 2 as long as all heads are exact. rows, columns: the least and most
    that were seen. exact, decided seconds: of the last call that was timed, by the exact kernel and
    as decided with its guards. trials: how often a choice was timed so and was not faster. waited:
    calls since the last."""

    BEGUN = 0
    ENDED = 1
    MEASURED = 2
    DECIDED = 3
    LEAST_ROWS = 4
    MOST_ROWS = 5
    LEAST_COLUMNS = 6
    MOST_COLUMNS = 7
    EXACT_SECONDS = 8
    DECIDED_SECONDS = 9
    TRIALS = 10
    WAITED = 11


@dataclass(frozen=True)
class OnlinePlan:
    """base: the plan of the kernel that computes it. heads: how many. candidates: what they may
    take beside exact; of equal times the first is taken. budget: the relative error (L2) of a
    head's output. calls: how many gather. rows: how many query rows each call audits. heuristic:
    what proposes each head's candidate ("seed": heuristic.py); None: all are tried.
    """

    base: str
    heads: int
    candidates: tuple[HeadDecision, ...]
    budget: float
    calls: int
    rows: int
    heuristic: str | None = None

    def serialize(self) -> str:
        """One line of text from which `deserialize` makes an equal plan, in any process."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**fields, "candidates": [written_head(c) for c in self.candidates]})

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def deserialize(text: str) -> OnlinePlan:
        """ValueError where the text is not of that form."""
        try:
            fields = json.loads(text)
            candidates = tuple(map(read_head, fields["candidates"]))
            return OnlinePlan(**{**fields, "candidates": candidates})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a plan of an online site: {text[:80]!r}") from error

    @property
    def tries(self) -> int:
        """In how many calls each candidate is measured."""
        return min(_TRIES, self.calls)

    @property
    def further_rows(self) -> int:
        """Rows of a state below those of its heads."""
        return -(-sum(math.prod(shape) for shape in _shapes(self).values()) // len(Column))

    def tried(self, turn: int) -> list[int]:
        """The candidates that are measured in a call, each in `tries` of them at least."""
        count = len(self.candidates)
        of_a_call = min(-(-count * self.tries // self.calls), count)
        return [(turn * of_a_call + i) % count for i in range(of_a_call)]


def _shapes(plan: OnlinePlan) -> dict[str, tuple[int, ...]]:
    """The parts of a memory, in order."""
    candidates, heads, statistics = len(plan.candidates), plan.heads, len(names())
    return {
        "counts": (len(Count),),
        "tried": (candidates,),
        "shares": (plan.tries, candidates),
        "errors": (candidates, heads),
        "audited": (candidates, heads),
        "low": (statistics, heads),
        "high": (statistics, heads),
        "proposed": (heads,),
        "chosen": (heads,),
    }


@dataclass(frozen=True)
class Found:
    """What one call tells. candidates: those that were measured; of each the errors and, on the
    rows that audits look at, the worst, [n,H]; shares: of the exact kernel's time. low, high: of
    each statistic, [9,H]. proposed: by the heuristic, for each head the candidate's number plus 1,
    0 for exact; None where it was not asked."""

    candidates: list[int]
    errors: Array
    audited: Array
    shares: Array
    low: Array
    high: Array
    rows: int
    columns: int
    proposed: Array | None = None


@dataclass(frozen=True)
class Memory:
    """A state's further rows, as views that write to it. Candidates by number: tried: calls that
    measured it. shares: of the exact kernel's time, in the last calls that did [tries, candidates].
    errors: the largest relative error of each head; audited: on the rows that audits look at. low,
    high: of each statistic. proposed, chosen: by head, the candidate's number plus 1, 0 for exact.
    """

    counts: Array
    tried: Array
    shares: Array
    errors: Array
    audited: Array
    low: Array
    high: Array
    proposed: Array
    chosen: Array

    @staticmethod
    def of(plan: OnlinePlan, state: torch.Tensor) -> Memory:
        """state: of the plan's form, contiguous."""
        flat, parts, start = state.numpy()[plan.heads :].reshape(-1), {}, 0
        for name, shape in _shapes(plan).items():
            end = start + math.prod(shape)
            parts[name] = flat[start:end].reshape(shape)
            start = end
        return Memory(**parts)

    def begin(self, plan: OnlinePlan) -> int | None:
        """This call's number among those that gather; None where so many have begun."""
        turn = int(self.counts[Count.BEGUN])
        if turn >= plan.calls:
            return None
        self.counts[Count.BEGUN] += 1
        return turn

    def end(self, plan: OnlinePlan, found: Found | None) -> bool:
        """Add what a call found; whether it is the last that gathers."""
        if found is not None:
            self._add(found)
        self.counts[Count.ENDED] += 1
        return int(self.counts[Count.ENDED]) == plan.calls

    def _add(self, found: Found) -> None:
        at, first = found.candidates, self.counts[Count.MEASURED] == 0
        self.shares[self.tried[at].astype(int) % len(self.shares), at] = found.shares
        self.tried[at] += 1
        # Not fmax: what was once not a number is never taken.
        self.errors[at] = np.maximum(self.errors[at], found.errors)
        self.audited[at] = np.maximum(self.audited[at], found.audited)
        self.low[:] = found.low if first else np.minimum(self.low, found.low)
        self.high[:] = found.high if first else np.maximum(self.high, found.high)
        for least, most, size in (
            (Count.LEAST_ROWS, Count.MOST_ROWS, found.rows),
            (Count.LEAST_COLUMNS, Count.MOST_COLUMNS, found.columns),
        ):
            self.counts[least] = size if first else min(self.counts[least], size)
            self.counts[most] = max(self.counts[most], size)
        if found.proposed is not None:
            self.proposed[:] = found.proposed
        self.counts[Count.MEASURED] += 1

    def settle(self, chosen: Array, exact: float, decided: float) -> None:
        """Decided, from now on or until the next trial. decided: 0 where nothing was timed."""
        self.chosen[:] = chosen
        self.counts[Count.TRIALS] += bool(decided) and not chosen.any()
        self.counts[Count.WAITED] = 0
        self.counts[Count.EXACT_SECONDS] = exact
        self.counts[Count.DECIDED_SECONDS] = decided
        # Last: other threads may go by it.
        self.counts[Count.DECIDED] = BY_HEAD if chosen.any() else ALL_EXACT

    @property
    def decided(self) -> bool:
        return bool(self.counts[Count.DECIDED])

    @property
    def may_try_again(self) -> bool:
        """Whether a choice that was not faster is timed again, later."""
        is_exact = self.counts[Count.DECIDED] == ALL_EXACT
        return bool(is_exact and 0 < self.counts[Count.TRIALS] < MOST_TRIALS)

    def is_due(self, plan: OnlinePlan, rows: int, columns: int) -> bool:
        """Count a call of these lengths; whether it is the one that tries again."""
        likely = rows in self.lengths[0] and columns in self.lengths[1]
        if not (self.may_try_again and likely):
            return False
        self.counts[Count.WAITED] += 1
        if self.counts[Count.WAITED] < plan.calls:
            return False
        self.counts[Count.WAITED] = 0
        return True

    @property
    def lengths(self) -> tuple[range, range]:
        """Rows and columns as they were seen; down to half, as shorter ones leave less out."""
        least_rows, most_rows, least_columns, most_columns = (
            int(self.counts[count])
            for count in (
                *(Count.LEAST_ROWS, Count.MOST_ROWS),
                *(Count.LEAST_COLUMNS, Count.MOST_COLUMNS),
            )
        )
        return (
            range(max(least_rows // 2, 1), most_rows + 1),
            range(max(least_columns // 2, 1), most_columns + 1),
        )


def chosen(plan: OnlinePlan, memory: Memory) -> Array:
    """For each head the fastest candidate within its budget, by number plus 1; 0: exact."""
    share = np.median(memory.shares, 0)  # calls differ in length, and in what else runs
    able = (memory.tried >= plan.tries) & (share < WORTH)
    allowed = able[:, None] & (memory.errors <= SHARE * plan.budget)
    if plan.heuristic is not None:
        allowed &= memory.proposed == np.arange(1, len(plan.candidates) + 1)[:, None]
    cost = np.where(allowed, share[:, None], np.inf)
    of_exact = np.ones((1, plan.heads))
    found: Array = np.concatenate([of_exact, cost]).argmin(0)
    return found


def decisions(plan: OnlinePlan, numbers: Array) -> tuple[HeadDecision, ...]:
    """What numbers of `chosen` stand for."""
    known = (EXACT, *plan.candidates)
    return tuple(known[int(i)] for i in numbers)


def decided_plan(plan: OnlinePlan, memory: Memory, numbers: Array) -> DecidedPlan:
    """The plan by which a site runs whose heads are decided so, inside of what was seen."""
    low, high = zip(
        *(
            _bounds(name, least, most)
            for name, least, most in zip(names(), memory.low, memory.high, strict=True)
        ),
        strict=True,
    )
    audited = np.concatenate([np.zeros((1, plan.heads)), memory.audited])
    seen = audited[numbers.astype(int), np.arange(plan.heads)]
    return DecidedPlan(
        base=plan.base,
        heads=decisions(plan, numbers),
        low=low,
        high=high,
        limit=tuple(np.maximum(ROOM * seen, plan.budget).tolist()),
        budgets=(plan.budget,) * plan.heads,
        rows=plan.rows,
    )


def _bounds(name: str, low: Array, high: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """By head, with room."""
    low, high = widened(name, low, high)
    return tuple(low.tolist()), tuple(high.tolist())
