"""Runs an attention on the CPU with each head as decided, or exactly where a guard says so.

One launch for all heads: their block lists, precisions and thresholds are arguments of it
(`Plan` of call.py), chosen by the flags of the call. Then some rows are audited; where a head is
too far off, the call is repeated with that head exact.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import sympy
import torch

from adaattn_compiler.decision import HeadDecision, Precision
from adaattn_compiler.kernels.audit import audited_rows
from adaattn_compiler.kernels.cpu.call import (
    SCORES_IN_BFLOAT16,
    VALUES_IN_BFLOAT16,
    Judgement,
    Plan,
)
from adaattn_compiler.kernels.cpu.decided_lists import (
    DecidedLists,
    decided_lists,
    decisions_at,
    heads_that_become_exact,
)
from adaattn_compiler.kernels.cpu.parts import parts_of
from adaattn_compiler.kernels.cpu.plans import lists_by_head
from adaattn_compiler.kernels.cpu.runner import cpp_runner
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.kept import Kept
from adaattn_compiler.kernels.selection import selected_blocks
from adaattn_compiler.runtime.state import Column
from adaattn_compiler.spec import Load

_KEPT_LENGTHS = 16
# Rows that the library audits at once.
_ROWS_AT_ONCE = 8
# Weight of what was before in the moving averages of audits, which count as many audits as a plain
# mean of so many; audits before a head may be demoted; standard errors by which it must be over its
# budget (decided.h has the same).
_KEEP, _LEAST_AUDITS, _SURE = 0.98, 16, 2.0
_MOST_COUNTED = (1 + _KEEP) / (1 - _KEEP)
# The query heads of a key head are audited in one of so many calls (decided.h has the same).
_TURNS = 8
# So that nothing is divided by 0.
_LEAST_SUM = 1e-200

# Flags: what a head of a batch item does in a call. ALL_KEYS: exact, as there is nothing that the
# head may leave out at these lengths.
AS_DECIDED, LEFT_ENVELOPE, FAILED_AUDIT, DEMOTED, ALL_KEYS = 1, 0, -1, -2, -3
_COUNTED = (
    (Column.AS_DECIDED, AS_DECIDED),
    (Column.LEFT_ENVELOPE, LEFT_ENVELOPE),
    (Column.FAILED_AUDIT, FAILED_AUDIT),
)

Array = npt.NDArray[Any]


@functools.cache
def decided_runner(plan: str) -> DecidedRunner:
    """The runner of a plan, one for a process. Raises CannotBuild, NoCode, ValueError."""
    return DecidedRunner(DecidedPlan.deserialize(plan))


@dataclass(frozen=True)
class _Prepared:
    """Of one pair of lengths. all_decided: the plan with all heads as decided. judgement: of a call
    with it. exact: the heads that are exact at these lengths and not as decided, bool [H]; None
    where there are none."""

    lists: DecidedLists
    all_decided: Plan
    judgement: Judgement
    exact: torch.Tensor | None

    def flags(self, flags: torch.Tensor) -> torch.Tensor:
        """Those of a call, heads that are exact at these lengths called so."""
        if self.exact is None:
            return flags
        return flags.masked_fill((flags == AS_DECIDED) & self.exact, ALL_KEYS)


class DecidedRunner:
    """A library with the plans of the lengths that it has met."""

    def __init__(self, plan: DecidedPlan) -> None:
        self.plan = plan
        self._base = cpp_runner(plan.base)
        self.spec = self._base.spec
        mixed = self._base.made_for.mixed  # else tensors have few bits already
        modes = [_mode(head) if mixed else 0 for head in plan.heads]
        self._modes = torch.tensor([modes], dtype=torch.int32)
        thresholds = [math.inf if head.skip is None else head.skip for head in plan.heads]
        self._skip = None
        if min(thresholds) < math.inf:
            self._skip = torch.tensor([thresholds], dtype=torch.float32)
        self._limits, self._budgets = np.array(plan.limit), np.array(plan.budgets)
        self._bounds = (torch.tensor(plan.low), torch.tensor(plan.high))
        # A bias of -inf may shut out all that a pattern keeps.
        patterns = any(head.pattern or head.selection for head in plan.heads)
        self._selections = {head.selection for head in plan.heads} - {None}
        self._may_be_empty = patterns and self.spec.score.has(Load)
        self._parts = parts_of(self._base.made_for, plan.heads, self._modes, self._skip)
        self._kept: Kept[_Prepared] = Kept(_KEPT_LENGTHS)
        self._lock = threading.Lock()

    def check(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """Flags, int32 [B,H]: AS_DECIDED, LEFT_ENVELOPE or DEMOTED."""
        self._check_heads(q)
        return self._base.guard(q, k, v, self._bounds, state)

    def _check_heads(self, q: torch.Tensor) -> None:
        if q.shape[1] != len(self.plan.heads):
            raise ValueError(f"{q.shape[1]} heads; the plan decides about {len(self.plan.heads)}")

    def guarded(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        state: torch.Tensor,
    ) -> torch.Tensor:
        """The same with the flags of `check`."""
        self._check_heads(q)
        self._base.check(q, k, v, operands)
        flags = self._base.guard(q, k, v, self._bounds, state, checked=True)
        return self(q, k, v, operands, params, flags, state, checked=True)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        flags: torch.Tensor,
        state: torch.Tensor,
        checked: bool = False,
    ) -> torch.Tensor:
        """[B,H,M,E], laid out as [B,M,H,E]; what happened is added to the state. checked: whether
        q, k, v and operands are known to fit."""
        if not checked:
            self._check_heads(q)
        if not (q.numel() and k.numel()):  # nothing to decide about
            return self._base(q, k, v, operands, params)
        if not self._selections and not self._parts:
            ready = self._prepared(q.shape[2], k.shape[2], params)
            own = ready.flags(flags)
            by_plan = (ready.all_decided, own, ready.judgement, state)
            done = self._base.decided(q, k, v, operands, params, *by_plan, checked=checked)
            if done is not None:
                return done
        return self._in_steps(q, k, v, operands, params, flags, state)

    def skipped(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
    ) -> torch.Tensor:
        """How often a row of each head skips a block in the launch of all heads, int64 [B,H]."""
        counts = torch.zeros(q.shape[:2], dtype=torch.int64)
        plan = self._prepared(q.shape[2], k.shape[2], params).all_decided
        self._base(q, k, v, operands, params, plan, skipped=counts, checked=True)
        return counts

    def _in_steps(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        flags: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """What decided.h does in one call, for what it does not do: blocks that are chosen in the
        call, parts, and inputs that are not finite."""
        given = (q, k, v, operands, params)
        flags = self._prepared(q.shape[2], k.shape[2], params).flags(flags)
        out = self._computed(*given, flags)
        if out is None:
            flags = flags.clamp(max=FAILED_AUDIT)
            out = self._base(*given)
        tried, sums = flags.numpy() == AS_DECIDED, None
        calls = int(state[0, Column.CALLS])
        turn = tried & self._whose_turn(calls // len(tried))
        if self.plan.rows and turn.any():
            sums = self._audited(*given, out, calls).numpy()
            # Where one head is off, the others may be: those whose turn it is not count, too.
            off = tried & ~(_errors(sums) <= self._limits)
            if not (off & turn).any():
                tried, off = turn, off & turn
            if off.any():
                flags = torch.from_numpy(
                    np.where(off, FAILED_AUDIT, flags.numpy()).astype(np.int32)
                )
                again = self._computed(*given, flags)
                assert again is not None  # fewer heads have a pattern than before
                out = again
        with self._lock:
            self._note(tried, flags.numpy(), sums, state.numpy())
        return out

    def _computed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        flags: torch.Tensor,
    ) -> torch.Tensor | None:
        """None where a pattern left a row without a key, or something is not finite."""
        which = flags == AS_DECIDED
        if not bool(which.any()):
            return self._base(q, k, v, operands, params)
        ready = self._prepared(q.shape[2], k.shape[2], params)
        lists, plan = ready.lists, self._plan(ready, which)
        if self._selections and not lists.whole:
            plan = self._selected(lists, which, plan, q, k)
        if not self._may_be_empty and not lists.parts:
            return self._base(q, k, v, operands, params, plan, checked=True)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        out = self._base(q, k, v, operands, params, plan, lse=lse, checked=True)
        given = (q, k, v, operands, params)
        for part, own in zip(self._parts, lists.parts, strict=False):  # none where rows are few
            its = which & part.heads
            if bool(its.any()) and not part.join(given, own, its, out, lse):
                return None
        return None if self._may_be_empty and bool(torch.isneginf(lse).any()) else out

    # -- audits --------------------------------------------------------------------------------

    def _audited(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        out: torch.Tensor,
        turn: int,
    ) -> torch.Tensor:
        """The sums of |out - exact|^2 and |exact|^2 over the audited rows, float64 [B,H,2]."""
        at = audited_rows(q.shape[2], self.plan.rows, turn)
        parts = (at[i : i + _ROWS_AT_ONCE] for i in range(0, len(at), _ROWS_AT_ONCE))
        sums = [self._base.audit(q, k, v, out, operands, params, part) for part in parts]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    def _whose_turn(self, calls: int) -> Array:
        """bool [H]: the query heads of every so-manieth key head."""
        heads = np.arange(len(self.plan.heads)) // self.spec.group
        turns: Array = (calls + heads) % _TURNS == 0
        return turns

    def _note(self, tried: Array, flags: Array, sums: Array | None, state: Array) -> None:
        """Count what the heads did, average their errors, demote those over their budgets.

        tried: [B,H], which were computed as decided at first and audited: their errors count,
        whether they stayed so or not.
        """
        state[:, Column.CALLS] += len(flags)
        for column, flag in _COUNTED:
            state[:, column] += np.count_nonzero(flags == flag, 0)
        if sums is None:
            return
        tried = tried & np.isfinite(sums[..., 1])  # else nothing was seen of their errors
        audited: Array = np.any(tried, axis=0)
        found = sums.sum(0, where=tried[..., None])
        means = state[:, Column.WRONG : Column.WHOLE + 1]
        # The plain mean until that would change less than the moving average does.
        before = state[:, Column.AUDITS, None]
        keep = np.where(audited[:, None], np.minimum(before / (before + 1), _KEEP), 1.0)
        means *= keep
        means += (1 - keep) * found
        squares = state[:, Column.SQUARE]
        squares *= keep[:, 0]
        squares += (1 - keep[:, 0]) * found[:, 0] ** 2
        state[:, Column.AUDITS] += audited
        state[:, Column.WORST] = np.fmax(state[:, Column.WORST], _errors(found))
        over = audited & ~(_errors(_surely(state)) <= self._budgets)
        over &= state[:, Column.AUDITS] >= _LEAST_AUDITS
        state[over, Column.DEMOTED] = 1

    # -- lists ---------------------------------------------------------------------------------

    def _plan(self, ready: _Prepared, as_decided: torch.Tensor) -> Plan:
        if bool(as_decided.all()):
            return ready.all_decided
        lists = ready.lists
        offsets = torch.where(as_decided[..., None], lists.decided, lists.exact)
        modes = torch.where(as_decided, self._modes, 0).to(torch.int32)
        skip = None
        if self._skip is not None:
            skip = torch.where(as_decided, self._skip, math.inf)
        return Plan(offsets, lists.blocks, modes=modes, skip=skip)

    def _selected(
        self,
        lists: DecidedLists,
        as_decided: torch.Tensor,
        plan: Plan,
        q: torch.Tensor,
        k: torch.Tensor,
    ) -> Plan:
        """The plan with the blocks that this call's queries and keys choose."""
        structure = lists.structure
        allowed = structure.partial | structure.full
        seen = torch.where(as_decided[..., None, None], lists.kept, allowed)
        for selection in self._selections:
            assert selection is not None
            theirs = torch.tensor([head.selection == selection for head in self.plan.heads])
            whole = None if self.spec.mask == sympy.true else structure.full
            found = selected_blocks(selection, q, k, self.spec.scale, allowed, whole)
            seen = torch.where((as_decided & theirs)[..., None, None], found, seen)
        chosen = lists_by_head(seen, structure.partial, lists.order)
        return dataclasses.replace(plan, **_named(chosen))

    def _prepared(self, rows: int, columns: int, params: Sequence[int]) -> _Prepared:
        return self._kept.get((rows, columns, *params), lambda: self._made(rows, columns, params))

    def _made(self, rows: int, columns: int, params: Sequence[int]) -> _Prepared:
        sizes = (rows, columns)
        lists = decided_lists(self.spec, self.plan.heads, self._parts, sizes, params)
        judgement = Judgement(
            lists.exact[0, 0].contiguous(),
            torch.from_numpy(self._limits),
            torch.from_numpy(self._budgets),
            self.plan.rows,
            self.spec.mask != sympy.true,
            self._may_be_empty,
        )
        every = Plan(lists.decided, lists.blocks, modes=self._modes, skip=self._skip)
        heads, mixed = self.plan.heads, self._base.made_for.mixed
        exact = heads_that_become_exact(
            heads, decisions_at(self.spec, heads, sizes, params)[0], mixed
        )
        return _Prepared(lists, every, judgement, exact)


def _named(lists: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(("offsets", "blocks"), lists, strict=True))


def _mode(head: HeadDecision) -> int:
    """A head's bits of Mode (call.h)."""
    scores = SCORES_IN_BFLOAT16 if head.scores == Precision.BF16 else 0
    return scores | (VALUES_IN_BFLOAT16 if head.values == Precision.BF16 else 0)


def _surely(state: Array) -> Array:
    """What the averages of |out - exact|^2 are at least, as far as so few rows can tell, beside
    those of |exact|^2, [H,2]: an average of few audits is of whether it met one of the few rows
    that are far off in most heads."""
    wrong, whole = state[:, Column.WRONG], state[:, Column.WHOLE]
    counted = state[:, Column.AUDITS].clip(1, _MOST_COUNTED)
    error = np.sqrt((state[:, Column.SQUARE] - wrong**2).clip(0) / counted)
    least: Array = np.stack([(wrong - _SURE * error).clip(0), whole], -1)
    return least


def _errors(sums: Array) -> Array:
    """Relative errors of sums [...,2]; huge where the exact rows are 0 and the others are not."""
    errors: Array = np.sqrt(sums[..., 0] / np.maximum(sums[..., 1], _LEAST_SUM))
    return errors
