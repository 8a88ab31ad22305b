"""Times that depend on nothing but what is computed, for tests of which decision is taken.

A head takes its share of the key blocks, half of the time in each product; bfloat16 takes 0.4 of
what float32 does. What has to be chosen or averaged in a call costs a little more.
"""

from __future__ import annotations

import pytest
import torch

from adaattn_compiler.calibrate import chosen
from adaattn_compiler.calibrate.board import Tensors
from adaattn_compiler.calibrate.measure import Measuring, SiteMeasurements
from adaattn_compiler.decision import BLOCK, HeadDecision, Precision
from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.patterns import kept_blocks
from adaattn_compiler.kernels.problem import Problem

_OF_PRODUCT = {Precision.FP32: 0.5, Precision.BF16: 0.2}
_CHOOSING, _SKIPPING = 1.1, 0.95


def cost(decision: HeadDecision, problem: Problem) -> float:
    """Of one head, the exact one being 1."""
    _, rows, columns = problem.shape.hints
    structure = block_structure(problem.spec.mask, rows, columns, BLOCK, BLOCK, ())
    allowed = structure.partial | structure.full
    share = float((kept_blocks(decision, rows, columns) & allowed).sum() / allowed.sum())
    if decision.pooling is not None:
        share += (1 - share) / decision.pooling.keys
    if decision.nystrom is not None:
        share = 2 * decision.nystrom.landmarks / columns
    if decision.selection is not None:
        share *= _CHOOSING * decision.selection.mass
    if decision.skip is not None:
        share *= _SKIPPING
    scores = _OF_PRODUCT[decision.scores]
    if decision.basis is not None:
        scores *= decision.basis.rank / problem.shape.head_dim
    return share * (scores + _OF_PRODUCT[decision.values])


def by_what_is_computed(patch: pytest.MonkeyPatch) -> None:
    """Calibration takes these for the times that it measures."""

    def seconds_of(
        self: Measuring, site: SiteMeasurements, tensors: Tensors
    ) -> tuple[tuple[float, ...], ...]:
        heads = site.problem.shape.heads
        return tuple(
            (1e-3 * cost(candidate, site.problem) / heads,) * heads for candidate in site.candidates
        )

    patch.setattr(Measuring, "_seconds_of", seconds_of)
    patch.setattr(chosen, "least_seconds", lambda ways: [2e-3, 1e-3])


def bfloat16_is_rounded_to() -> bool:
    """Whether decisions for bfloat16 change anything on this machine."""
    return bool(torch.cpu._is_avx512_bf16_supported())
