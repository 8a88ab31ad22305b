"""From the loop axes of two matrix products to the axes of attention.

A model may fold batch and heads into one dimension, split the queries of a group over rows, or
keep five dimensions. Here the digits that index maps cut those axes into are sorted into the four
that a spec knows: b, h, q and k, with h = g * group + (its place in the group), where g is the
key/value head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import sympy

from adaattn_compiler.passes.index_map import (
    ONE,
    Axis,
    Digit,
    Index,
    NotAffine,
    Size,
    exact_quotient,
)
from adaattn_compiler.spec import b, h, k, q

# A row axis cut in two is a group of query heads and their queries up to this many heads.
_LARGEST_GROUP = 64


@dataclass(frozen=True)
class AttentionAxes:
    """The canonical axes of a site, and each digit of the products' axes in terms of them.

    group is the number of query heads that share a key/value head.
    """

    batch: Axis
    head: Axis
    query: Axis
    key: Axis
    group: Size
    atoms: tuple[tuple[Digit, Index], ...]

    @property
    def names(self) -> dict[Axis, sympy.Expr]:
        """The symbol of each canonical axis (0 for one of size 1, which no index mentions)."""
        return {self.batch: b, self.head: h, self.query: q, self.key: k}

    @property
    def kv_head(self) -> Index:
        """h // group, as an index."""
        heads = exact_quotient(self.head.size, self.group)
        return Index() if heads == 1 else Index(((Digit(self.head, self.group, heads), ONE),))

    def renamed(self, index: Index) -> Index:
        """An index over the products' axes, over the canonical axes instead."""
        out = Index((), index.constant)
        for digit, coef in index.terms:
            out = out.plus(self._digit(digit).scaled(coef))
        return out

    def _digit(self, digit: Digit) -> Index:
        if all(digit.axis != atom.axis for atom, _ in self.atoms):
            return Index(((digit, ONE),))  # canonical already, or D or E
        end = sympy.expand(digit.div * digit.extent)
        total = Index()
        covered = ONE
        for atom, canonical in self.atoms:
            if atom.axis == digit.axis and within(atom, digit.div, end):
                total = total.plus(canonical.scaled(exact_quotient(atom.div, digit.div)))
                covered = sympy.expand(covered * atom.extent)
        if sympy.expand(covered - digit.extent) != 0:
            raise NotAffine(f"{digit} is not made of whole atoms")
        return total


def _divides(divisor: Size, size: Size) -> bool:
    try:
        exact_quotient(size, divisor)
    except NotAffine:
        return False
    return True


def within(atom: Digit, start: Size, end: Size) -> bool:
    """Whether an atom of an axis lies between two strides of it."""
    return _divides(start, atom.div) and _divides(sympy.expand(atom.div * atom.extent), end)


def atoms_of(axis: Axis, digits: Iterable[Digit]) -> list[Digit]:
    """The finest digits of an axis that all the given ones are made of, outermost first."""
    if axis.size == 1:
        return []
    cuts: list[Size] = [ONE, axis.size]
    for digit in digits:
        if digit.axis == axis:
            cuts += [digit.div, sympy.expand(digit.div * digit.extent)]
    ordered: list[Size] = []
    for cut in cuts:
        if cut in ordered:
            continue
        place = next((i for i, other in enumerate(ordered) if _divides(cut, other)), len(ordered))
        ordered.insert(place, cut)
    for low, high in itertools.pairwise(ordered):
        exact_quotient(high, low)  # NotAffine where the cuts are no chain
    pairs = list(itertools.pairwise(ordered))
    return [Digit(axis, low, exact_quotient(high, low)) for low, high in reversed(pairs)]


def attention_axes(
    batch: Axis,
    row: Axis,
    key: Axis,
    digits: Sequence[Digit],
    kv_digits: Sequence[Digit],
    query_digits: Sequence[Digit],
    is_batch: Callable[[Digit, Sequence[Digit]], bool | None],
) -> AttentionAxes:
    """Sort the digits of a product's batch and row axes into b, h and q.

    digits: all that occur anywhere in the site; kv_digits: those that K and V are read at;
    query_digits: those of the row axis that masks and biases tell apart; is_batch: whether a
    single outer axis is the batch, given those of a group of query heads (lone_axis.py).
    """
    batch_atoms = atoms_of(batch, digits)
    row_atoms = atoms_of(row, digits)
    shared = 0  # trailing batch atoms that K and V do not depend on
    while shared < len(batch_atoms) and not overlaps(batch_atoms[-1 - shared], kv_digits):
        shared += 1
    if shared == len(batch_atoms) and not _is_group_alone(batch_atoms, is_batch):
        shared = 0
    kv_atoms = batch_atoms[: len(batch_atoms) - shared]
    group_atoms = batch_atoms[len(batch_atoms) - shared :]
    leading = row_atoms[:-1]
    if leading and _is_group(leading, query_digits):
        group_atoms, row_atoms = [*group_atoms, *leading], row_atoms[-1:]
    # With more than one atom the last is the head.
    has_kv_head = len(kv_atoms) > 1 or not _is_lone_batch(kv_atoms, group_atoms, is_batch)
    batch_part = kv_atoms[:-1] if has_kv_head else kv_atoms
    head_part = [*(kv_atoms[-1:] if has_kv_head else []), *group_atoms]
    group = _product(group_atoms)
    axes = [Axis("b", _product(batch_part)), Axis("h", _product(head_part))]
    axes += [Axis("q", _product(row_atoms))]
    atoms = [
        pair
        for axis, parts in zip(axes, (batch_part, head_part, row_atoms), strict=True)
        for pair in _placed(axis, parts)
    ]
    new_key = Axis("k", key.size)
    if key.size != 1:
        atoms.append((Digit(key, ONE, key.size), Index.of_axis(new_key)))
    return AttentionAxes(axes[0], axes[1], axes[2], new_key, group, tuple(atoms))


def _is_lone_batch(
    kv_atoms: Sequence[Digit],
    group_atoms: Sequence[Digit],
    is_batch: Callable[[Digit, Sequence[Digit]], bool | None],
) -> bool:
    """Whether the one axis of K and V is the batch. Where nothing tells, one whose size is only
    known at run time is (a kernel is made for a number of heads), and a number is not."""
    if not kv_atoms:
        return False
    (lone,) = kv_atoms
    if not lone.extent.is_Integer and not group_atoms:
        return True
    told = is_batch(lone, group_atoms)
    return not lone.extent.is_Integer if told is None else told


def _is_group_alone(
    batch_atoms: Sequence[Digit], is_batch: Callable[[Digit, Sequence[Digit]], bool | None]
) -> bool:
    """Whether all query heads share one key head, with a batch of one."""
    if len(batch_atoms) != 1 or not batch_atoms[0].extent.is_Integer:
        return False
    return is_batch(batch_atoms[0], ()) is False


def overlaps(atom: Digit, digits: Sequence[Digit]) -> bool:
    """Whether one of the digits holds an atom of its axis."""
    end = sympy.expand(atom.div * atom.extent)
    return any(
        digit.axis == atom.axis
        and _divides(digit.div, atom.div)
        and _divides(end, sympy.expand(digit.div * digit.extent))
        for digit in digits
    )


def _is_group(leading: Sequence[Digit], query_digits: Sequence[Digit]) -> bool:
    """Whether the outer row digits are heads of a group rather than part of a query's place."""
    size = _product(leading)
    return bool(
        size.is_Integer
        and size <= _LARGEST_GROUP
        and not any(overlaps(atom, query_digits) for atom in leading)
    )


def _product(atoms: Sequence[Digit]) -> Size:
    return reduce(lambda total, atom: sympy.expand(total * atom.extent), atoms, ONE)


def _placed(axis: Axis, parts: Sequence[Digit]) -> list[tuple[Digit, Index]]:
    """Each part as a digit of the axis that they make up together, outermost first."""
    placed = []
    stride = ONE
    for part in reversed(parts):
        placed.append((part, Index(((Digit(axis, stride, part.extent), ONE),))))
        stride = sympy.expand(stride * part.extent)
    return placed
