"""What one site's decisions are on a GPU: in which ways heads are computed, and by which kernels.

A launch has one pair of products, one size of means, one rank or number of landmarks: heads that
differ there go in launches of their own, over the same output. Which blocks of keys they meet
differs by head inside of one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.utils._python_dispatch import _disable_current_modes

from adaattn_compiler.decision import HeadDecision, KeyBasis, Precision
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.triton.launch import Products, Tiles
from adaattn_compiler.kernels.triton.launch_decode import splits_for, tiles_for_few_rows
from adaattn_compiler.kernels.triton.plan import TritonPlan, plan_of
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.spec import Load, M, OperandSpec, param, q
from adaattn_compiler.target import DeviceTarget

_PRODUCTS = {
    Precision.FP32: "ieee",
    Precision.TF32: "tf32",
    Precision.BF16: "bf16",
    Precision.FP16: "fp16",
}
_LARGEST_HALF, _LARGEST = 65504.0, torch.finfo(torch.float32).max
# No mean is of more rows or keys (kernel.py has the same).
_LONGEST = 1 << 30
# More than what rounding adds to a basis and its products.
_ROUNDED = 1.01
_KEPT_BASES = 4096


@dataclass(frozen=True)
class Way:
    """How heads are computed that are not exact: by which products, and by at most one of: of how
    many keys the means are that stand for what is far, in how many dimensions scores are taken
    (KeyBasis), and through how many landmarks (Nystrom). 0: of all keys as they are."""

    products: Products
    pooled: int = 0
    rank: int = 0
    landmarks: int = 0

    @property
    def direct(self) -> bool:
        """Whether q, k and v are what is met."""
        return not (self.pooled or self.rank or self.landmarks)

    def place(self) -> tuple[int, int, int, str]:
        """By which ways are in order, the direct ones first."""
        return self.pooled, self.landmarks, self.rank, str(self.products)


@dataclass(frozen=True)
class GpuDecisions:
    """A plan by decisions, of tensors of one width.

    attention: the kernel of all heads. audit: that of a few rows, which stand anywhere (`audited`).
    ways: first the direct ones. of_heads: by head the number of its way, from 1; 0: exactly. wide:
    whether the tensors are float32.
    """

    plan: DecidedPlan
    attention: TritonPlan
    audit: TritonPlan
    ways: tuple[Way, ...]
    of_heads: tuple[int, ...]
    wide: bool

    @property
    def direct(self) -> int:
        """How many of the ways are direct."""
        return sum(way.direct for way in self.ways)

    @property
    def pools(self) -> bool:
        """Whether means stand for what is far in one of them."""
        return any(way.pooled for way in self.ways)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the bases in which scores are taken, each once."""
        return tuple(sorted({way.rank for way in self.ways} - {0}))

    @property
    def patterned(self) -> bool:
        """Whether a head has blocks of its own in every call."""
        return any(head.pattern for head in self.plan.heads)

    @property
    def selections(self) -> tuple[Any, ...]:
        """How blocks are chosen in a call, each once."""
        found = (head.selection for head in self.plan.heads)
        return tuple(dict.fromkeys(each for each in found if each is not None))

    @property
    def skips(self) -> bool:
        """Whether a head leaves out blocks whose scores are low."""
        return any(head.skip is not None for head in self.plan.heads)

    @property
    def may_be_empty(self) -> bool:
        """Whether a bias of -inf may shut out all that a head keeps."""
        return any(map(is_sparse, self.plan.heads)) and self.attention.made_for.spec.score.has(Load)

    @property
    def largest(self) -> tuple[tuple[float, ...], ...]:
        """The largest magnitude of q, k and v, by head, that it is computed with; infinite where
        any will do: where what is not finite shows in the result as it does in the exact one."""
        return tuple(
            tuple(_largest(head, part, self.wide) for head in self._heads) for part in "qkv"
        )

    @property
    def _heads(self) -> tuple[HeadDecision, ...]:
        """Those of way 0 as exact ones, whatever they were called."""
        pairs = zip(self.plan.heads, self.of_heads, strict=True)
        return tuple(head if way else HeadDecision() for head, way in pairs)


def is_sparse(head: HeadDecision) -> bool:
    """Whether a head does not meet every key for itself."""
    return any(part is not None for part in (head.pattern, head.selection, head.pooling))


def is_low_rank(head: HeadDecision) -> bool:
    """Whether a head's scores are of other rows or keys than those that there are."""
    return any(part is not None for part in (head.pooling, head.nystrom, head.basis))


def _largest(head: HeadDecision, part: str, wide: bool) -> float:
    half = (head.values if part == "v" else head.scores) == Precision.FP16
    if head.basis is not None and part != "v":
        # So that no product with the basis, of the tensors' type, is infinite.
        largest = _LARGEST_HALF if half or not wide else _LARGEST
        return largest / max(_ROUNDED * _gain(head.basis), 1.0)
    if half:
        return _LARGEST_HALF
    if head.nystrom is not None:  # so that no sum of rows or keys is infinite
        return _LARGEST / _LONGEST
    if part != "q" and (is_sparse(head) or head.skip is not None):
        return _LARGEST
    return math.inf


@functools.lru_cache(maxsize=_KEPT_BASES)
def _gain(basis: KeyBasis) -> float:
    """By how much the largest magnitude of a row may grow in a basis."""
    with _disable_current_modes():  # while torch traces an op, too, it is made of numbers
        return float(basis.tensor().abs().sum(0).max())


@functools.cache
def decisions_of(plan: str, wide: bool) -> GpuDecisions:
    """What a plan says of float32 tensors, or of those of fewer bits. ValueError: it is none."""
    found = DecidedPlan.deserialize(plan)
    texts = found.base.split("\n")
    if len(texts) != 2:
        raise ValueError(f"not a plan by decisions for a GPU: {found.base[:80]!r}")
    attention, audit = map(TritonPlan.deserialize, texts)
    exact = Way(Products(attention.precision, attention.precision))
    heads = [_way(head, wide, exact) for head in found.heads]
    every = {way for way in heads if way is not None}
    ways = sorted(every, key=Way.place)
    of_heads = tuple(0 if way is None else 1 + ways.index(way) for way in heads)
    return GpuDecisions(found, attention, audit, tuple(ways), of_heads, wide)


def _way(head: HeadDecision, wide: bool, exact: Way) -> Way | None:
    """None where a head is computed exactly; tensors of fewer bits stay as they are."""
    products = exact.products
    if wide:
        pairs = ((head.scores, products.qk), (head.values, products.pv))
        own = (whole if p == Precision.FP32 else _PRODUCTS[p] for p, whole in pairs)
        products = Products(*own)
    way = Way(
        products,
        0 if head.pooling is None else head.pooling.keys,
        0 if head.basis is None else head.basis.rank,
        0 if head.nystrom is None else head.nystrom.landmarks,
    )
    return way if is_sparse(head) or head.skip is not None or way != exact else None


# -- plans -----------------------------------------------------------------------------------------


def base_of(problem: Problem, tiles: Tiles, target: DeviceTarget, rows: int) -> str:
    """The kernels of a problem, as `DecidedPlan.base` has them; rows: that a call audits."""
    attention = plan_of(problem, tiles, target)
    shape = problem.shape
    batch, _, columns = shape.hints
    widest = max(shape.head_dim, shape.value_dim)
    audit = TritonPlan(
        audited(attention.made_for),
        tiles_for_few_rows(problem.spec.group * max(rows, 1), widest, problem.dtype.itemsize),
        splits=splits_for(batch, shape.kv_heads, columns, target.multiprocessors),
    )
    return "\n".join((attention.serialize(), audit.serialize()))


def audited(made_for: Configuration) -> Configuration:
    """The same attention for some of its rows: where each of them stands is one operand more, and
    how many there are in all one number more."""
    spec = made_for.spec
    place = {q: Load(len(spec.operands), q), M: param(spec.params)}

    def placed(expression: Any) -> Any:
        return None if expression is None else sympy.sympify(expression).xreplace(place)

    few = dataclasses.replace(
        spec,
        score=placed(spec.score),
        mask=placed(spec.mask),
        sink=placed(spec.sink),
        operands=(*spec.operands, OperandSpec("int", 1)),
        params=spec.params + 1,
    )
    return Configuration(few, (*made_for.dtypes, "int64"), made_for.halves)
