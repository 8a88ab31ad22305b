"""Handlers that compute sites as chosen, and watch what audits will see of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adaattn_compiler.calibrate.board import Tensors, exactly
from adaattn_compiler.calibrate.measure import decided, unguarded
from adaattn_compiler.decision import EXACT, HeadDecision
from adaattn_compiler.kernels.audit import audited_rows, relative_error
from adaattn_compiler.kernels.cpu.decided import DecidedRunner
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.passes.choices import SiteKey

Decisions = Mapping[SiteKey, tuple[HeadDecision, ...]]


class Applying:
    """The handler that computes each site as decided; sites without a decision exactly."""

    def __init__(self, decisions: Decisions) -> None:
        self._decisions = decisions
        self._runners: dict[tuple[SiteKey, Problem], DecidedRunner] = {}

    def __call__(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        heads = self._decisions.get(key)
        if heads is None or all(head == EXACT for head in heads):
            return exactly(key, problem, tensors)
        if (key, problem) not in self._runners:
            self._runners[key, problem] = unguarded(problem, heads)
        return decided(self._runners[key, problem], tensors)


class Auditing:
    """The handler that notes the errors that audits will see: of each site the largest, [2,H], of
    one call, and of the turns of a sample together."""

    def __init__(self, decisions: Decisions, rows: int, turns: int) -> None:
        self.largest: dict[SiteKey, torch.Tensor] = {}
        self._apply = Applying(decisions)
        self._rows = rows
        self._turns = turns

    def __call__(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        out, exact = self._apply(key, problem, tensors), exactly(key, problem, tensors)
        turns = [audited_rows(out.shape[2], self._rows, turn) for turn in range(self._turns)]
        every = [row for at in turns for row in at]
        of_calls = torch.stack([_error_at(out, exact, at) for at in turns]).amax(0)
        found = torch.stack([of_calls, _error_at(out, exact, every)])
        self.largest[key] = torch.maximum(self.largest.get(key, found), found)
        return out


def _error_at(out: torch.Tensor, exact: torch.Tensor, at: list[int]) -> torch.Tensor:
    """The largest over the batch, by head, on some rows."""
    return relative_error(out[:, :, at].double(), exact[:, :, at].double()).amax(0)
