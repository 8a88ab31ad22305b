"""What is known of each row of an attention's scores, computed apart from any kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from specs import random_inputs

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.spec import EmptyRow, S


class RowStatistics(NamedTuple):
    """[B,H,M] each; the entropy and the log-sum-exp are of the keys and the sink."""

    entropy: torch.Tensor
    score_maximum: torch.Tensor
    lse: torch.Tensor


def row_statistics(
    problem: Problem, dtype: torch.dtype, tensors: list[torch.Tensor] | None = None
) -> RowStatistics:
    """Of a problem's random inputs, or of tensors, in a dtype."""
    spec = problem.spec
    given, operands = random_inputs(problem)
    q, k = ((tensors or given)[i].to(dtype) for i in (0, 1))
    operands = [o.to(dtype) if o.is_floating_point() else o for o in operands]
    sizes = (*q.shape[:3], k.shape[2])
    values = positions((spec.score, spec.mask, spec.sink), q, sizes)
    values[S] = q @ k.repeat_interleave(spec.group, 1).mT * spec.scale
    scores = evaluate_dense(spec.score, values, operands, problem.param_hints)
    keep = torch.as_tensor(evaluate_dense(spec.mask, values, operands, problem.param_hints))
    scores = scores.expand(sizes).masked_fill(~keep.expand(sizes), float("-inf"))
    largest = scores.amax(-1)
    if spec.sink is not None:
        sink = evaluate_dense(spec.sink, values, operands, problem.param_hints)
        scores = torch.cat([scores, sink.expand(*sizes[:3], 1)], -1)
    entropy = torch.special.entr(scores.softmax(-1)).sum(-1)
    empty = (scores == float("-inf")).all(-1)
    if spec.empty_row is EmptyRow.ZERO:
        entropy = entropy.masked_fill(empty, 0)
    if spec.empty_row is EmptyRow.UNIFORM:
        entropy = entropy.masked_fill(empty, torch.tensor(sizes[3]).log().item())
    return RowStatistics(entropy, largest, scores.logsumexp(-1))
