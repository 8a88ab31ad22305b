"""Why a head of an attention cannot be computed by means of keys, by landmarks or in a basis."""

from __future__ import annotations

from collections.abc import Sequence

from adaattn_compiler.decision import HeadDecision, KeyBasis
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.spec import AttentionSpec, Load, S, k


def pooling_refusal(spec: AttentionSpec) -> str | None:
    """Why keys of an attention cannot be pooled; None where they can be."""
    if spec.dropout_p > 0:
        return "no dropout of keys that are pooled"
    if not spec.score.free_symbols <= {S} or spec.score.has(Load):
        return f"the score of a centroid is of the product alone, not {spec.score}"
    if spec.sink is not None and spec.sink.has(k):
        return f"the sink depends on the key: {spec.sink}"
    return None


def low_rank_refusal(problem: Problem, heads: Sequence[HeadDecision]) -> str | None:
    """Why the low-rank ones among decisions of a problem's heads do not go with it.

    heads: one for each query head, or any of them alone.
    """
    spec = problem.spec
    if any(head.pooling for head in heads) and (reason := pooling_refusal(spec)):
        return reason
    if any(head.nystrom for head in heads) and (not spec.plain or spec.dropout_p > 0):
        return "landmarks are for attention without a mask, a bias or a sink"
    return _basis_refusal(problem, [head.basis for head in heads])


def _basis_refusal(problem: Problem, bases: Sequence[KeyBasis | None]) -> str | None:
    dim = problem.shape.head_dim
    for basis in bases:
        if basis is not None and (basis.tensor().shape[0] != dim or basis.rank >= dim):
            shape = tuple(basis.tensor().shape)
            return f"a basis of keys is {shape}; it must be {dim} by less than that"
    size = problem.spec.group
    for first in range(0, len(bases), size):
        if len(set(bases[first : first + size]) - {None}) > 1:
            return "heads that share keys must share their basis"
    return None
