"""Masks for property tests: each as a predicate, and as what it means on index tensors.

The meaning is written beside the predicate, in torch, so that nothing under test computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from hypothesis import strategies as st

from adaattn_compiler.spec import Where, k, q

Meaning = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mask:
    """A predicate and the same over index tensors q [M,1] and k [N]."""

    predicate: Any
    meaning: Meaning

    def dense(self, rows: int, columns: int) -> torch.Tensor:
        """bool [M,N]."""
        found = self.meaning(torch.arange(rows).reshape(-1, 1), torch.arange(columns))
        return found.expand(rows, columns)

    def __and__(self, other: Mask) -> Mask:
        return Mask(
            sympy.And(self.predicate, other.predicate),
            lambda r, c: self.meaning(r, c) & other.meaning(r, c),
        )

    def __or__(self, other: Mask) -> Mask:
        return Mask(
            sympy.Or(self.predicate, other.predicate),
            lambda r, c: self.meaning(r, c) | other.meaning(r, c),
        )

    def __invert__(self) -> Mask:
        return Mask(sympy.Not(self.predicate), lambda r, c: ~self.meaning(r, c))


def causal(offset: int = 0) -> Mask:
    return Mask(sympy.Ge(q + offset, k), lambda r, c: r + offset >= c)


def window(size: int) -> Mask:
    return Mask(sympy.Lt(q - k, size), lambda r, c: r - c < size)


def around(size: int) -> Mask:
    return Mask(sympy.Le(sympy.Abs(q - k), size), lambda r, c: (r - c).abs() <= size)


def prefix(size: int) -> Mask:
    return Mask(sympy.Lt(k, size), lambda r, c: (c < size).expand(len(r), -1))


def rows_from(first: int) -> Mask:
    return Mask(sympy.Ge(q, first), lambda r, c: (r >= first).expand(-1, len(c)))


def chunk(size: int, offset: int = 0) -> Mask:
    return Mask(
        sympy.Eq(sympy.floor((q + offset) / size), sympy.floor(k / size)),
        lambda r, c: (r + offset) // size == c // size,
    )


def dilated(step: int, offset: int = 0) -> Mask:
    return Mask(
        sympy.Eq(sympy.Mod(q - k + offset, step), 0), lambda r, c: (r - c + offset) % step == 0
    )


def slanted(across: int, down: int, offset: int) -> Mask:
    return Mask(
        sympy.Gt(across * q, down * k + offset), lambda r, c: across * r > down * c + offset
    )


def product(step: int) -> Mask:
    return Mask(sympy.Ne(sympy.Mod(q * k, step), 0), lambda r, c: r * c % step != 0)


def extremes(size: int) -> Mask:
    return Mask(
        sympy.Ge(sympy.Max(q - size, size - k), sympy.Min(k, 2 * q)),
        lambda r, c: torch.maximum(r - size, size - c) >= torch.minimum(c, 2 * r),
    )


def chosen(size: int) -> Mask:
    return Mask(
        sympy.Ge(Where(sympy.Lt(k, size), q, q - k), Where(sympy.Ge(q, size), size, k)),
        lambda r, c: torch.where(c < size, r, r - c) >= torch.where(r >= size, size, c),
    )


def summed_floors(size: int) -> Mask:
    return Mask(
        sympy.Eq(sympy.floor((q + k) / size), 2),
        lambda r, c: torch.div(r + c, size, rounding_mode="floor") == 2,
    )


_SMALL = st.integers(1, 9)
_SIGNED = st.integers(-7, 7)

# The masks of the field, in which blocks are to be told exactly.
common = st.one_of(
    st.builds(causal),
    st.builds(causal, _SIGNED),
    st.builds(window, _SMALL),
    st.builds(prefix, st.integers(0, 12)),
    st.builds(chunk, _SMALL),
)
# And others, in which a verdict has only to be sound.
atoms = st.one_of(
    common,
    st.builds(around, _SMALL),
    st.builds(rows_from, _SMALL),
    st.builds(chunk, _SMALL, _SIGNED),
    st.builds(dilated, _SMALL, _SIGNED),
    st.builds(slanted, _SIGNED, _SIGNED, _SIGNED),
    st.builds(product, _SMALL),
    st.builds(extremes, _SMALL),
    st.builds(chosen, _SMALL),
    st.builds(summed_floors, _SMALL),
)


def trees(leaves: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
    """And, Or and Not over leaves."""
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda x, y: x & y, inner, inner),
            st.builds(lambda x, y: x | y, inner, inner),
            st.builds(lambda x: ~x, inner),
        ),
        max_leaves=5,
    )
