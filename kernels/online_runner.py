"""Runs a site that decides for itself (online.py): exactly while it gathers, then as decided."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adaattn_compiler.kernels.audit import audited_rows, relative_error
from adaattn_compiler.kernels.cpu.decided import AS_DECIDED, LEFT_ENVELOPE, DecidedRunner
from adaattn_compiler.kernels.cpu.runner import cpp_runner
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.envelope import guard_statistics, names
from adaattn_compiler.kernels.heuristic import nearest, ranks_of, seed_decisions
from adaattn_compiler.kernels.kept import Kept
from adaattn_compiler.kernels.online import (
    ALL_EXACT,
    MOST_TRIALS,
    WORTH,
    Array,
    Count,
    Found,
    Memory,
    OnlinePlan,
    chosen,
    decided_plan,
)
from adaattn_compiler.kernels.reference import attention_by_rows
from adaattn_compiler.kernels.statistics import head_statistics
from adaattn_compiler.kernels.through_op import all_finite
from adaattn_compiler.kernels.timing import least_seconds
from adaattn_compiler.runtime.state import Column, new_state

# Of q, k, v, operands and params.
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Sequence[int]]

# Sites with decisions of their own whose runners are kept: others are made anew when they run.
_KEPT_SITES = 512
# Turns of audits that a call looks at.
_TURNS = 16
# Rounds that are timed: at least so many, more while they take no longer than this together. What
# is chosen is timed a few times in all, and with more care: a busy machine must not undo it.
_ROUNDS, _SECONDS = 2, 0.05
_LAST_ROUNDS, _LAST_SECONDS = 5, 0.5


@functools.cache
def online_runner(plan: str) -> OnlineRunner:
    """The runner of a plan, one for a process. Raises CannotBuild, NoCode, ValueError."""
    return OnlineRunner(OnlinePlan.deserialize(plan))


@dataclass(frozen=True)
class _Site:
    """What a site has decided. rows, columns: lengths at which it holds."""

    runner: DecidedRunner
    rows: range
    columns: range


class OnlineRunner:
    """All sites of a plan; what differs between them stands in their states."""

    # Of all runners: what is done under it is a few additions.
    _lock = threading.Lock()

    def __init__(self, plan: OnlinePlan) -> None:
        self.plan = plan
        self._base = cpp_runner(plan.base)
        self._sites: Kept[_Site] = Kept(_KEPT_SITES)
        self._shape = (plan.heads + plan.further_rows, len(Column))

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        state: torch.Tensor,
    ) -> torch.Tensor:
        """[B,H,M,E]; what happened is added to the state."""
        self._check(state)
        if not (q.numel() and k.numel() and v.numel()):
            return attention_by_rows(q, k, v, operands, params, self._base.spec)
        given: Tensors = (q, k, v, operands, params)
        further = state.numpy()[self.plan.heads :]
        if further.flat[Count.DECIDED] == ALL_EXACT:
            return self._exactly(given, state)
        if further.flat[Count.DECIDED]:
            # What was gathered does not change any more: it is the key to what is made of it.
            site = self._sites.get(further.tobytes(), lambda: self._site(state))
            return self._as_decided(given, site, state[: self.plan.heads])
        memory, exact = Memory.of(self.plan, state), self._base(*given)
        turn = None
        if all_finite(q, k, v):  # else there is nothing to be learned from it
            with self._lock:
                turn = memory.begin(self.plan)
        with self._lock:
            state.numpy()[: self.plan.heads, Column.CALLS] += q.shape[0]
        if turn is not None:
            self._gather(given, exact, memory, turn)
        return exact

    # -- as decided ----------------------------------------------------------------------------

    def _as_decided(self, given: Tensors, site: _Site, heads: torch.Tensor) -> torch.Tensor:
        """heads: their rows of the state."""
        q, k, v, operands, params = given
        flags = site.runner.check(q, k, v, heads)
        if q.shape[2] not in site.rows or k.shape[2] not in site.columns:
            flags.clamp_(max=LEFT_ENVELOPE)
        return site.runner(q, k, v, operands, params, flags, heads)

    def _site(self, state: torch.Tensor) -> _Site:
        memory = Memory.of(self.plan, state)
        runner = DecidedRunner(decided_plan(self.plan, memory, memory.chosen))
        return _Site(runner, *memory.lengths)

    def _exactly(self, given: Tensors, state: torch.Tensor) -> torch.Tensor:
        """Where all heads are exact; some calls later, what was not faster once is tried again."""
        q, k, v = given[:3]
        exact, numbers = self._base(*given), state.numpy()
        with self._lock:
            numbers[: self.plan.heads, Column.CALLS] += q.shape[0]
        if not 0 < numbers[self.plan.heads :].flat[Count.TRIALS] < MOST_TRIALS:
            return exact
        memory = Memory.of(self.plan, state)
        with self._lock:
            due = memory.is_due(self.plan, q.shape[2], k.shape[2])
        if due and all_finite(q, k, v):
            self._decide(given, memory)
        return exact

    def _check(self, state: torch.Tensor) -> None:
        fits = state.dtype == torch.float64 and state.shape == self._shape
        if not fits or not state.is_contiguous():
            raise ValueError(
                f"state {state.dtype} {tuple(state.shape)}: contiguous float64 {self._shape}"
            )

    # -- gathering -----------------------------------------------------------------------------

    def _gather(self, given: Tensors, exact: torch.Tensor, memory: Memory, turn: int) -> None:
        found = None
        try:
            found = self._measured(given, exact, turn)
        finally:  # so that a call that fails does not leave the site gathering for ever
            with self._lock:
                last = memory.end(self.plan, found)
        if last:
            self._decide(given, memory)

    def _measured(self, given: Tensors, exact: torch.Tensor, turn: int) -> Found:
        tried = self.plan.tried(turn)
        ways = [
            functools.partial(_run, runner, given)
            for runner in (self._candidates[i] for i in tried)
        ]
        outs = [way() for way in ways]  # first, and not timed: lists are made
        exactly, *seconds = least_seconds(
            [lambda: self._base(*given), *ways], _ROUNDS, _SECONDS, warm=True
        )
        statistics = guard_statistics(*given[:3])
        return Found(
            tried,
            _stacked([relative_error(out.float(), exact.float()).amax(0) for out in outs]),
            _stacked([self._audited(out, exact) for out in outs]),
            np.array(seconds) / exactly,
            statistics.amin(1).double().numpy(),
            statistics.amax(1).double().numpy(),
            given[0].shape[2],
            given[1].shape[2],
            self._proposed(given) if turn == 0 and self.plan.heuristic is not None else None,
        )

    def _audited(self, out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        """[H]: the largest error that one of some turns of audits sees."""
        turns = _TURNS if self.plan.rows else 0
        found = out.new_zeros(out.shape[1], dtype=torch.float32)
        for turn in range(turns):
            at = audited_rows(out.shape[2], self.plan.rows, turn)
            errors = relative_error(out[:, :, at].float(), exact[:, :, at].float())
            found = torch.maximum(found, errors.amax(0))
        return found

    def _proposed(self, given: Tensors) -> Array:
        """What the heuristic says of each head, as numbers of `chosen`."""
        q, k, v, operands, params = given
        statistics = head_statistics(q, k, v, operands, params, self._base.spec)
        ranks = ranks_of(q, k, self._base.spec, operands, params)
        wanted = seed_decisions(statistics, ranks, k.shape[2])
        return np.array([nearest(decision, self.plan.candidates) + 1 for decision in wanted])

    @functools.cached_property
    def _candidates(self) -> list[DecidedRunner]:
        """All heads alike, with no guard and no audit."""
        heads = self.plan.heads
        low, high = (((bound,) * heads,) * len(names()) for bound in (-np.inf, np.inf))
        limit = (np.inf,) * heads
        return [
            DecidedRunner(DecidedPlan(self.plan.base, (c,) * heads, low, high, limit, limit, 0))
            for c in self.plan.candidates
        ]

    def _decide(self, given: Tensors, memory: Memory) -> None:
        """Choose, and take the choice where this call, with guards and audits, is faster by it."""
        numbers, exact, decided = chosen(self.plan, memory), 0.0, 0.0
        if numbers.any():
            runner = DecidedRunner(decided_plan(self.plan, memory, numbers))
            state = new_state(self.plan.heads)
            q, k, v, operands, params = given

            def guarded() -> torch.Tensor:
                flags = runner.check(q, k, v, state)
                return runner(q, k, v, operands, params, flags, state)

            exact, decided = least_seconds(
                [lambda: self._base(*given), guarded], _LAST_ROUNDS, _LAST_SECONDS
            )
            if not decided < WORTH * exact:
                numbers = np.zeros_like(numbers)
        with self._lock:
            memory.settle(numbers, exact, decided)


def _run(runner: DecidedRunner, given: Tensors) -> torch.Tensor:
    """Its result, every head as decided."""
    q, k, v, operands, params = given
    flags = torch.full(q.shape[:2], AS_DECIDED, dtype=torch.int32)
    return runner(q, k, v, operands, params, flags, new_state(q.shape[1]))


def _stacked(rows: Sequence[torch.Tensor]) -> Array:
    found: Array = torch.stack(list(rows)).double().numpy()
    return found
