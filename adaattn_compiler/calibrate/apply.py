"""Handlers that compute sites as chosen, and watch what guards will see of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adaattn_compiler.calibrate.board import Tensors, exactly
from adaattn_compiler.calibrate.measure import decided, unguarded
from adaattn_compiler.decision import EXACT, HeadDecision
from adaattn_compiler.kernels.cpu.decided import DecidedRunner
from adaattn_compiler.kernels.patterns import kept_blocks
from adaattn_compiler.kernels.probe import probe, probed_rows
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


class Probing:
    """The handler that notes the largest error of the kept blocks on probed rows, by head."""

    def __init__(self, decisions: Decisions, rows: int, turns: int) -> None:
        self.largest: dict[SiteKey, torch.Tensor] = {}
        self._apply = Applying(decisions)
        self._decisions = decisions
        self._rows = rows
        self._turns = turns

    def __call__(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        heads = self._decisions.get(key, ())
        if any(head.pattern is not None for head in heads):
            for turn in range(self._turns):
                found = self._probe(heads, problem, tensors, turn)
                before = self.largest.get(key, found)
                self.largest[key] = torch.maximum(before, found)
        return self._apply(key, problem, tensors)

    def _probe(
        self, heads: tuple[HeadDecision, ...], problem: Problem, tensors: Tensors, turn: int
    ) -> torch.Tensor:
        q, k, v, operands, params = tensors
        rows, columns = q.shape[2], k.shape[2]
        kept = torch.stack([kept_blocks(head, rows, columns) for head in heads])
        at = probed_rows(rows, self._rows, turn)
        return probe(q, k, v, operands, params, problem.spec, at, kept).error.amax(0)
