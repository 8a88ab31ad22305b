"""Attention in strips of query rows, each with the keys that its rows can see at all.

For a strip of rows the mask leaves a range of keys (a band for a window, a growing prefix for a
causal mask). The strip's queries meet those keys alone, in torch's own fused CPU kernel, under the
mask and bias of the strip: work and memory follow the band, nothing of size M x N exists, and
nothing has to be compiled. What the fused kernel cannot say is written out, still by strips: a
score that is no sum (softcap). A sink is folded in by the log-sum-exp that the kernel returns:
softmax with one more logit s is the softmax without it times sigmoid(LSE - s).

Source of the recurrence: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.evaluate import evaluate_dense, has_key, rank_of
from adaattn_compiler.kernels.kept import Kept
from adaattn_compiler.kernels.problem import Attention, Problem
from adaattn_compiler.kernels.through_op import (
    all_finite,
    op_call,
    op_refusal,
    training_refusal,
)
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, M, N, S, b, h, k, q

aten = torch.ops.aten

# Rows of a strip, the same where its bias becomes a tensor (for memory's sake), and the step to
# which its keys' range is rounded.
_ROWS, _ROWS_WITH_BIAS, _STEP = 256, 128, 64
# Lengths whose ranges and masks are kept.
_KEPT_LENGTHS = 8
# Masks of strips are kept up to this many elements for one length.
_KEPT_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class StripsKernel:
    """See the module's docstring."""

    name: str = "strips"
    label: str = "strips"
    only_measured: bool = False
    seconds_to_build: float = 0.0

    def refusal(self, problem: Problem) -> str | None:
        return training_refusal(problem) or op_refusal(problem)

    def cost(self, problem: Problem) -> float:
        """The work of the ranges, with what a mask and a bias by strips add."""
        shape, spec = problem.shape, problem.spec
        _, rows, columns = shape.hints
        ranges = key_ranges(spec.mask, rows, columns, problem.param_hints, strip_rows(spec))
        attended = sum((last - first) * count for _, count, first, last in ranges)
        work = problem.work(attended / max(rows * columns, 1))
        if spec.bias is None or shape.head_dim != shape.value_dim:
            return work * 3.0
        by_distance = vector_of_distances(spec) is not None
        return work * (1.15 if spec.bias == 0 or by_distance else 2.5) + 2e4 * len(ranges)

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        return None

    def build(self, problem: Problem) -> Attention:
        plan = repr({"kernel": "strips", "spec": problem.spec.serialize()})
        strips_runner(plan)  # made now: a failure must be known before the graph is written
        return op_call(plan)


def vector_of_distances(spec: AttentionSpec) -> int | None:
    """Which operand is the whole bias as a vector over k - q, where one is; else None."""
    for load in spec.score.atoms(Load):
        if spec.bias == load and load.args[1:] == (h, k - q + M - 1):
            return int(load.args[0])
    return None


# (first row, rows, first key, past the last key)
Range = tuple[int, int, int, int]


def strip_rows(spec: AttentionSpec) -> int:
    """How many rows a strip has."""
    return _ROWS if spec.bias == 0 or vector_of_distances(spec) is not None else _ROWS_WITH_BIAS


def key_ranges(
    mask: Any, rows: int, columns: int, params: Sequence[int], per_strip: int = _ROWS
) -> list[Range]:
    """The strips of rows, each with the range of keys that its rows may attend to."""
    structure = block_structure(mask, rows, columns, per_strip, _STEP, params)
    seen = structure.partial | structure.full
    ranges: list[Range] = []
    for strip in range(seen.shape[0]):
        blocks = seen[strip].nonzero()
        start = strip * per_strip
        count = min(per_strip, rows - start)
        if blocks.numel() == 0:
            ranges.append((start, count, 0, 0))
            continue
        first, last = int(blocks[0]) * _STEP, (int(blocks[-1]) + 1) * _STEP
        ranges.append((start, count, first, min(last, columns)))
    return ranges


@functools.cache
def strips_runner(plan: str) -> StripsRunner:
    """The runner of a plan, one for a process."""
    return StripsRunner(AttentionSpec.deserialize(ast.literal_eval(plan)["spec"]))


class StripsRunner:
    """Computes a spec's attention, keeping the ranges and masks of the lengths that it has met."""

    carries_nan = False

    def __init__(self, spec: AttentionSpec) -> None:
        self.spec = spec
        self._distances = vector_of_distances(spec)
        self._loaded = sorted({int(load.args[0]) for load in spec.score.atoms(Load)})
        # Whether rows without a key yield something else than the fused kernel leaves there.
        self._empty_rows = spec.sink is None and spec.empty_row in (
            EmptyRow.UNIFORM,
            EmptyRow.NAN,
        )
        self._lengths: Kept[_Length] = Kept(_KEPT_LENGTHS)

    def __call__(
        self,
        q_BHMD: torch.Tensor,
        k_BGND: torch.Tensor,
        v_BGNE: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
    ) -> torch.Tensor:
        """[B,H,M,E], laid out as [B,M,H,E]."""
        batch, heads, rows, _ = q_BHMD.shape
        out = q_BHMD.new_empty(batch, rows, heads, v_BGNE.shape[3]).transpose(1, 2)
        length = self._length(rows, k_BGND.shape[2], tuple(params), q_BHMD.dtype)
        finite = self._empty_rows and all_finite(*(operands[i] for i in self._loaded))
        for strip in length.ranges:
            start, count, first, last = strip
            target = out[:, :, start : start + count]
            target.copy_(
                self._strip(
                    q_BHMD[:, :, start : start + count],
                    k_BGND[:, :, first:last],
                    v_BGNE[:, :, first:last],
                    _Context(self.spec, strip, operands, params, length, v_BGNE, finite),
                )
            )
        return out

    def _length(
        self, rows: int, columns: int, params: tuple[int, ...], dtype: torch.dtype
    ) -> _Length:
        def made() -> _Length:
            ranges = key_ranges(self.spec.mask, rows, columns, params, strip_rows(self.spec))
            return _Length(rows, columns, ranges, {})

        return self._lengths.get((rows, columns, params, dtype), made)

    def _strip(
        self, q_BHRD: torch.Tensor, k_BGLD: torch.Tensor, v_BGLE: torch.Tensor, at: _Context
    ) -> torch.Tensor:
        batch, heads, rows, _ = q_BHRD.shape
        if k_BGLD.shape[2] == 0:
            nothing = q_BHRD.new_zeros(batch, heads, rows, v_BGLE.shape[3])
            return at.with_empty_rows(nothing, torch.zeros((), dtype=torch.bool))
        keep = at.keep()
        fused = self.spec.bias is not None and q_BHRD.shape[3] == v_BGLE.shape[3]
        if not fused:
            out, lse = _written_out(q_BHRD, k_BGLD, v_BGLE, keep, at)
        else:
            out, lse = self._fused(q_BHRD, k_BGLD, v_BGLE, keep, at)
        if self.spec.sink is not None:
            return _with_sink(out, lse, at)
        if self._empty_rows:
            return at.with_empty_rows(out, at.has_key(keep))
        return out

    def _fused(
        self,
        q_BHRD: torch.Tensor,
        k_BGLD: torch.Tensor,
        v_BGLE: torch.Tensor,
        keep: torch.Tensor | None,
        at: _Context,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(result, log-sum-exp) by torch's fused kernel.

        With a bias by distance the rows run backward: the bias is then a view of the vector.
        """
        mask: torch.Tensor | None
        backward = self._distances is not None
        if self._distances is not None:
            q_BHRD = q_BHRD.flip(2)
            bias = at.distances_backward(self._distances, q_BHRD.dtype)
            mask = bias if keep is None else torch.where(keep.flip(2), bias, float("-inf"))
        else:
            mask = at.additive_mask(keep, q_BHRD.dtype)
        if mask is not None:
            mask = mask.expand(-1, -1, q_BHRD.shape[2], -1)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q_BHRD, k_BGLD, v_BGLE, 0.0, False, attn_mask=mask, scale=self.spec.scale
        )
        return (out.flip(2), lse.flip(2)) if backward else (out, lse)


@dataclass(frozen=True)
class _Length:
    """What is known of one pair of lengths: strips, and masks that need no data."""

    rows: int
    columns: int
    ranges: list[Range]
    masks: dict[Range, torch.Tensor | None]

    def kept_elements(self) -> int:
        return sum(mask.numel() for mask in self.masks.values() if mask is not None)


@dataclass(frozen=True)
class _Context:
    """One strip: where it lies and what its expressions read."""

    spec: AttentionSpec
    strip: Range
    operands: Sequence[torch.Tensor]
    params: Sequence[int]
    length: _Length
    v: torch.Tensor
    bias_is_finite: bool

    def values(self) -> dict[Any, Any]:
        """The strip's positions and the sizes."""
        start, count, first, last = self.strip
        device = self.v.device
        heads = self.v.shape[1] * self.spec.group
        return {
            b: torch.arange(self.v.shape[0], device=device).reshape(-1, 1, 1, 1),
            h: torch.arange(heads, device=device).reshape(-1, 1, 1),
            q: torch.arange(start, start + count, device=device).reshape(-1, 1),
            k: torch.arange(first, last, device=device),
            M: self.length.rows,
            N: self.length.columns,
        }

    def evaluated(self, expression: Any, more: dict[Any, Any] | None = None) -> torch.Tensor:
        """An expression on the strip, with four axes."""
        values = {**self.values(), **(more or {})}
        value = evaluate_dense(expression, values, self.operands, self.params, partial=True)
        tensor = torch.as_tensor(value, device=self.v.device)
        return tensor[(None,) * (4 - tensor.dim()) + (...,)]

    def has_key(self, keep: torch.Tensor | None) -> torch.Tensor:
        """Whether each row of the strip has a key; keep: the strip's mask."""
        if self.bias_is_finite:
            return torch.ones((), dtype=torch.bool) if keep is None else keep.any(-1, keepdim=True)
        found = has_key(self.spec, self.values(), self.operands, self.params, partial=True)
        return torch.as_tensor(found)

    def keep(self) -> torch.Tensor | None:
        """The strip's mask; None where all is attended."""
        mask = self.spec.mask
        if mask == sympy.true:
            return None
        if self.spec.masks_by_data or rank_of(mask) > 2:
            return self.evaluated(mask)
        if self.strip in self.length.masks:
            return self.length.masks[self.strip]
        keep: torch.Tensor | None = self.evaluated(mask)
        assert keep is not None
        if bool(keep.all()):
            keep = None
        if keep is None or self.length.kept_elements() + keep.numel() <= _KEPT_ELEMENTS:
            self.length.masks[self.strip] = keep
        return keep

    def additive_mask(self, keep: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        """Bias and mask as one float tensor for the fused kernel."""
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        if self.spec.bias == 0:
            if keep is None:
                return None
            zero = torch.zeros((), dtype=kind)
            return torch.where(keep, zero, float("-inf"))
        bias = self.evaluated(self.spec.bias).to(kind)
        return bias if keep is None else torch.where(keep, bias, float("-inf"))

    def distances_backward(self, operand: int, dtype: torch.dtype) -> torch.Tensor:
        """The strip's bias, its last row first: [1,H,rows,keys], a view of the vector [H, M+N-1].

        Element (i, j) is that of distance (first + j) - (start + count - 1 - i).
        """
        start, count, first, last = self.strip
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        vector = self.operands[operand].to(kind).contiguous()
        offset = first - (start + count - 1) + self.length.rows - 1
        heads, width = vector.shape
        view = vector.as_strided((heads, count, last - first), (width, 1, 1), offset)
        return view[None]

    def with_empty_rows(self, out: torch.Tensor, has_key: torch.Tensor) -> torch.Tensor:
        """Rows without a key as the spec has them; out holds anything there."""
        if bool(has_key.all()):
            return out
        if self.spec.empty_row is EmptyRow.NAN and self.spec.sink is None:
            return torch.where(has_key, out, float("nan"))
        if self.spec.empty_row is EmptyRow.UNIFORM and self.spec.sink is None:
            mean = self.v.mean(2, keepdim=True).repeat_interleave(self.spec.group, 1)
            return torch.where(has_key, out, mean)
        return torch.where(has_key, out, torch.zeros((), dtype=out.dtype))


def _written_out(
    q_BHRD: torch.Tensor,
    k_BGLD: torch.Tensor,
    v_BGLE: torch.Tensor,
    keep: torch.Tensor | None,
    at: _Context,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, log-sum-exp) with the strip's scores in memory, in float32 or better."""
    spec = at.spec
    kind = torch.float64 if q_BHRD.dtype == torch.float64 else torch.float32
    keys = k_BGLD.repeat_interleave(spec.group, 1).transpose(-1, -2)
    product = (q_BHRD @ keys).to(kind) * spec.scale
    scores = at.evaluated(spec.score, {S: product})
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1)
    if keep is not None and spec.empty_row is not EmptyRow.IMPOSSIBLE:
        weights = weights.masked_fill(torch.isneginf(lse)[..., None], 0.0)
    return weights.to(v_BGLE.dtype) @ v_BGLE.repeat_interleave(spec.group, 1), lse


def _with_sink(out: torch.Tensor, lse: torch.Tensor, at: _Context) -> torch.Tensor:
    """The softmax that also counts the sink's logit."""
    sink = at.evaluated(at.spec.sink).to(lse.dtype)
    weight = torch.sigmoid(lse[..., None] - sink)
    # All of an infinite weight: exp(inf - inf).
    weight = weight.masked_fill(sink == float("inf"), float("nan"))
    return (out * weight).to(out.dtype)
