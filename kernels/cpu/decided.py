"""Runs an attention on the CPU with each head as decided, or exactly where a guard says so.

One launch for all heads: their block lists, precisions and thresholds are arguments of it
(`Plan` of call.py), chosen by the flags of the call.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from adaattn_compiler.decision import HeadDecision, Precision
from adaattn_compiler.kernels.blocks import BlockStructure, block_structure
from adaattn_compiler.kernels.cpu.call import Plan
from adaattn_compiler.kernels.cpu.runner import BLOCK, cpp_runner, lists_of
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.envelope import guard_statistics
from adaattn_compiler.kernels.evaluate import evaluate_dense
from adaattn_compiler.kernels.kept import Kept
from adaattn_compiler.kernels.patterns import kept_blocks
from adaattn_compiler.kernels.probe import Probe, probe, probed_rows
from adaattn_compiler.runtime.state import Column
from adaattn_compiler.spec import Load, M, N, param
from adaattn_compiler.spec import k as key
from adaattn_compiler.spec import q as row

_KEPT_LENGTHS = 16
# Weight of what was before in the moving averages of audits; audits before a head may be demoted.
_KEEP, _LEAST_AUDITS = 0.9, 4

# Flags: what a head of a batch item does in a call.
AS_DECIDED, LEFT_ENVELOPE, FAILED_PROBE, DEMOTED = 1, 0, -1, -2


@functools.cache
def decided_runner(plan: str) -> DecidedRunner:
    """The runner of a plan, one for a process. Raises CannotBuild, NoCode, ValueError."""
    return DecidedRunner(DecidedPlan.deserialize(plan))


@dataclass(frozen=True)
class _Lists:
    """Block lists of one pair of lengths. offsets: [1,H,row blocks + 1], those of the exact heads
    after those as decided; both are places in `blocks`. kept: bool [H, row blocks, key blocks]."""

    decided: torch.Tensor
    exact: torch.Tensor
    blocks: torch.Tensor
    kept: torch.Tensor
    all_decided: Plan


class DecidedRunner:
    """A library with the plans of the lengths that it has met."""

    def __init__(self, plan: DecidedPlan) -> None:
        self.plan = plan
        self._base = cpp_runner(plan.base)
        self.spec = self._base.spec
        mixed = self._base.made_for.mixed  # else tensors have few bits already
        modes = [_mode(head) if mixed else 0 for head in plan.heads]
        self._modes = torch.tensor([modes], dtype=torch.int32)
        thresholds = [float("inf") if head.skip is None else head.skip for head in plan.heads]
        self._skip = torch.tensor([thresholds]) if min(thresholds) < float("inf") else None
        self._low, self._high = (torch.tensor(x)[:, None] for x in (plan.low, plan.high))
        self._probed = any(head.pattern is not None for head in plan.heads)
        # A bias of -inf may shut out what a pattern keeps.
        self._may_be_empty = self._probed and self.spec.score.has(Load)
        self._most_by_probe = torch.tensor([plan.probe])
        self._budgets = torch.tensor(plan.budgets, dtype=torch.float64)
        self._lists: Kept[_Lists] = Kept(_KEPT_LENGTHS)
        self._lock = threading.Lock()

    def check(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(flags int32 [B,H], probed rows int64 [R], those rows exactly, float32 [B,H,R,E])."""
        flags = self._inside(guard_statistics(q, k, v))
        at, found = self._probe(q, k, v, operands, params, int(state[0, Column.CALLS]))
        if found is None:
            exact = q.new_empty(*q.shape[:2], 0, v.shape[3], dtype=torch.float32)
        else:
            exact = found.exact
            good = found.error <= self._most_by_probe  # NaN is not
            flags = torch.where((flags > 0) & ~good, FAILED_PROBE, flags)
        flags = torch.where(state[:, Column.DEMOTED] > 0, DEMOTED, flags)
        return flags.to(torch.int32), torch.tensor(at, dtype=torch.int64), exact

    def _inside(self, statistics: torch.Tensor) -> torch.Tensor:
        inside = (statistics >= self._low) & (statistics <= self._high)
        return inside.all(0).to(torch.int32)

    def _probe(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        turn: int,
    ) -> tuple[list[int], Probe | None]:
        if self.plan.rows == 0:
            return [], None
        rows, columns = q.shape[2], k.shape[2]
        at = probed_rows(rows, self.plan.rows, turn)
        at += at[-1:] * (self.plan.rows - len(at))
        kept = self._lists_of(rows, columns, params).kept if self._probed else None
        return at, probe(q, k, v, operands, params, self.spec, at, kept)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        flags: torch.Tensor,
        at: torch.Tensor,
        exact: torch.Tensor,
        state: torch.Tensor,
    ) -> torch.Tensor:
        """[B,H,M,E], laid out as [B,M,H,E]; what happened is added to the state."""
        out = None
        if bool((flags == AS_DECIDED).any()):
            out = self._as_decided(q, k, v, operands, params, flags == AS_DECIDED)
        if out is None:
            flags = flags.clamp(max=LEFT_ENVELOPE)
            out = self._base(q, k, v, operands, params)
        self._audit(out, flags, at, exact, state)
        return out

    def _as_decided(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        which: torch.Tensor,
    ) -> torch.Tensor | None:
        """None where a pattern left a row without a key."""
        plan = self._plan(self._lists_of(q.shape[2], k.shape[2], params), which)
        if not self._may_be_empty:
            return self._base(q, k, v, operands, params, plan)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        out = self._base(q, k, v, operands, params, plan, lse=lse)
        return None if bool(torch.isneginf(lse).any()) else out

    def _plan(self, lists: _Lists, as_decided: torch.Tensor) -> Plan:
        if bool(as_decided.all()):
            return lists.all_decided
        offsets = torch.where(as_decided[..., None], lists.decided, lists.exact)
        modes = torch.where(as_decided, self._modes, 0).to(torch.int32)
        skip = None
        if self._skip is not None:
            skip = torch.where(as_decided, self._skip, float("inf"))
        return Plan(offsets, lists.blocks, modes=modes, skip=skip)

    def _lists_of(self, rows: int, columns: int, params: Sequence[int]) -> _Lists:
        return self._lists.get(
            (rows, columns, *params), lambda: self._made_lists(rows, columns, params)
        )

    def _made_lists(self, rows: int, columns: int, params: Sequence[int]) -> _Lists:
        structure = block_structure(self.spec.mask, rows, columns, *BLOCK, params)
        kept = torch.stack([kept_blocks(head, rows, columns) for head in self.plan.heads])
        if not self._sees_itself(rows, columns, params):
            kept = torch.ones_like(kept)
        parts = [
            lists_of(BlockStructure(structure.partial & near, structure.full & near))
            for near in (*kept, torch.ones_like(kept[0]))
        ]
        starts = torch.tensor([0, *(len(blocks) for _, blocks in parts)]).cumsum(0)
        offsets = [part[0] + start for part, start in zip(parts, starts.tolist(), strict=False)]
        blocks = torch.cat([blocks for _, blocks in parts])
        decided = torch.cat(offsets[:-1], 1).to(torch.int32)
        exact = offsets[-1].to(torch.int32).expand_as(decided)
        every = Plan(decided, blocks, modes=self._modes, skip=self._skip)
        return _Lists(decided, exact, blocks, kept, every)

    def _sees_itself(self, rows: int, columns: int, params: Sequence[int]) -> bool:
        """Whether every row attends to the key at its own position, which every pattern keeps: if
        not, a pattern might leave a row without a key."""
        at = row + (columns - rows)
        sizes = {M: rows, N: columns, **{param(i): n for i, n in enumerate(params)}}
        places = torch.arange(rows)
        if rows > columns:
            return False
        mask = sympy.sympify(self.spec.mask).subs(key, at).subs(sizes)
        seen = evaluate_dense(mask, {row: places}, (), partial=True)
        return bool(torch.as_tensor(seen).all())

    def _audit(
        self,
        out: torch.Tensor,
        flags: torch.Tensor,
        at: torch.Tensor,
        exact: torch.Tensor,
        state: torch.Tensor,
    ) -> None:
        """Count, compare the probed rows with what was computed, demote what is over its budget."""
        seen = torch.zeros_like(state)
        seen[:, Column.CALLS] = flags.shape[0]
        pairs = (
            (Column.AS_DECIDED, AS_DECIDED),
            (Column.LEFT_ENVELOPE, LEFT_ENVELOPE),
            (Column.FAILED_PROBE, FAILED_PROBE),
        )
        for column, flag in pairs:
            seen[:, column] = (flags == flag).sum(0)
        with self._lock:
            if len(at):
                self._compare(out[:, :, at], flags == AS_DECIDED, exact, state)
            state += seen

    def _compare(
        self,
        given: torch.Tensor,
        as_decided: torch.Tensor,
        exact: torch.Tensor,
        state: torch.Tensor,
    ) -> None:
        chosen = as_decided[..., None, None]
        wrong = torch.where(chosen, given.to(exact.dtype) - exact, 0).square().sum((0, 2, 3))
        whole = torch.where(chosen, exact, 0).square().sum((0, 2, 3))
        audited = as_decided.any(0)
        first = state[:, Column.AUDITS] == 0
        for column, value in ((Column.WRONG, wrong), (Column.WHOLE, whole)):
            before = state[:, column]
            mean = torch.where(first, value, _KEEP * before + (1 - _KEEP) * value)
            state[:, column] = torch.where(audited, mean, before)
        error = (wrong / whole.clamp(min=1e-30)).sqrt()
        worst = state[:, Column.WORST]
        state[:, Column.WORST] = torch.where(audited, torch.maximum(worst, error), worst)
        state[:, Column.AUDITS] += audited
        mean_error = (state[:, Column.WRONG] / state[:, Column.WHOLE].clamp(min=1e-30)).sqrt()
        over = audited & ~(mean_error <= self._budgets)
        over &= state[:, Column.AUDITS] >= _LEAST_AUDITS
        state[:, Column.DEMOTED] = torch.maximum(state[:, Column.DEMOTED], over.double())


def _mode(head: HeadDecision) -> int:
    """A head's bits of Mode (call.h)."""
    return (head.scores == Precision.BF16) + 2 * (head.values == Precision.BF16)
