"""Which blocks of a mask are attended wholly, partly or not at all, without the mask itself.

A predicate over (q, k) is a tree of And and Or over comparisons. What of it depends on q alone, on
k alone or on q - k alone (causal, windows, prefixes, dilation, in any combination) is computed for
every value of that one variable and counted per block: exact, in O(M + N + blocks). What is left
(`floor(q / C) == floor(k / C)`) is a comparison of `f(q) + g(k) + rest(q, k)`: f and g have exact
ranges per block, the rest a range by interval arithmetic. Verdicts meet by three-valued logic, so
the answer is sound for any predicate, and a comparison that reads data or is not understood only
leaves its blocks partial.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Or

from adaattn_compiler.kernels.evaluate import evaluate
from adaattn_compiler.predicates import normalized
from adaattn_compiler.spec import Load, M, N, k, param, q

# k - q, as the one variable of a predicate that depends on nothing else.
_STEP = sympy.Symbol("step", integer=True)


@dataclass(frozen=True)
class BlockStructure:
    """Verdicts on blocks, bool [Qb, Kb].

    full: every element is surely attended. partial: some may be and some may not. Of a block that
    is neither, surely no element is attended.
    """

    partial: torch.Tensor
    full: torch.Tensor


def block_structure(
    mask: Any, M: int, N: int, block_q: int, block_k: int, params: Sequence[int] = ()
) -> BlockStructure:
    """The blocks of a predicate on M rows and N columns; ragged last blocks end with the mask.

    params: the values of p0, p1, ...; what depends on b or h or reads a tensor is not known.
    """
    grid = _Grid(M, N, block_q, block_k)
    verdict = _verdict(normalized(_with_sizes(mask, M, N, params)), grid)
    shape = (grid.rows.first.numel(), grid.columns.first.numel())
    every = verdict.every.expand(shape)
    return BlockStructure(verdict.some.expand(shape) & ~every, every.contiguous())


def block_lists(
    structure: BlockStructure,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices), as BlockMask has them.

    Counts are int32 [1, 1, Qb]; indices int32 [1, 1, Qb, W], ascending, 0 where not used, with W
    the largest count (at least 1). Lists of queries by key block are not made of these: BlockMask
    would need W = Kb for that (`compute_q_blocks=False`).
    """
    return *_listed(structure.partial), *_listed(structure.full)


def density(structure: BlockStructure) -> float:
    """The fraction of blocks that have to be computed."""
    blocks = structure.partial.numel()
    return float((structure.partial | structure.full).sum()) / blocks if blocks else 0.0


def _listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    counts = chosen.sum(-1, dtype=torch.int32)
    width = max(1, int(counts.max())) if counts.numel() else 1
    row, column = chosen.nonzero(as_tuple=True)
    place = chosen.cumsum(-1)[row, column] - 1
    indices = torch.zeros(chosen.shape[0], width, dtype=torch.int32)
    indices[row, place] = column.to(torch.int32)
    return counts[None, None], indices[None, None]


def _with_sizes(mask: Any, rows: int, columns: int, params: Sequence[int]) -> Any:
    sizes = {M: rows, N: columns, **{param(i): value for i, value in enumerate(params)}}
    return sympy.sympify(mask).xreplace({s: sympy.Integer(size) for s, size in sizes.items()})


# -- blocks of one variable ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """Intervals of one variable: `values` are all its values in order, `first` and `last` the
    places in it (inclusive) of each block's own, shaped to broadcast to [Qb, Kb]."""

    values: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor

    @staticmethod
    def of(size: int, block: int, shape: tuple[int, int]) -> _Blocks:
        """The positions of an axis, cut into blocks."""
        first = torch.arange(0, size, block)
        last = (first + block - 1).clamp(max=size - 1)
        return _Blocks(torch.arange(size), first.reshape(shape), last.reshape(shape))

    def counted(self, holds: torch.Tensor) -> _Verdict:
        """The verdict on a condition that is known for every value."""
        total = torch.zeros(len(holds) + 1, dtype=torch.int32)
        torch.cumsum(holds, 0, dtype=torch.int32, out=total[1:])
        count = total[self.last + 1] - total[self.first]
        return _Verdict(count == self.last - self.first + 1, count > 0)

    def bounded(self, numbers: torch.Tensor) -> _Range:
        """The range of a number that is known for every value, in each block of an axis."""
        block = int(self.last.flatten()[0]) + 1
        places = torch.arange(self.first.numel() * block).clamp(max=len(numbers) - 1)
        table = numbers[places].reshape(-1, block)
        return _Range(
            table.amin(1).reshape(self.first.shape), table.amax(1).reshape(self.first.shape)
        )


class _Grid:
    """The blocks of q, of k and of k - q."""

    def __init__(self, rows: int, columns: int, block_q: int, block_k: int) -> None:
        self.rows = _Blocks.of(rows, block_q, (-1, 1))
        self.columns = _Blocks.of(columns, block_k, (1, -1))
        self.steps = _Blocks(
            torch.arange(1 - rows, columns),
            self.columns.first - self.rows.last + rows - 1,
            self.columns.last - self.rows.first + rows - 1,
        )

    def of(self, expression: Any) -> tuple[sympy.Symbol, Any, _Blocks] | None:
        """(variable, expression over it, its blocks) of what depends on one variable only."""
        if not _is_over_rows_and_columns(expression):
            return None
        if not expression.has(k):
            return q, expression, self.rows
        if not expression.has(q):
            return k, expression, self.columns
        moved = _over_steps(expression)
        return None if moved.has(q) else (_STEP, moved, self.steps)


def _is_over_rows_and_columns(expression: Any) -> bool:
    """Whether an expression reads nothing but q and k."""
    return expression.free_symbols <= {q, k} and not expression.has(Load)


def _over_steps(expression: Any) -> Any:
    """An expression with q + step for k; q is gone where it depends on k - q only."""
    if isinstance(expression, (And, Or, Relational)):
        return expression.func(*(_over_steps(arg) for arg in expression.args))
    return sympy.expand(expression.xreplace({k: q + _STEP}))


def _values(expression: Any, variable: sympy.Symbol, blocks: _Blocks) -> torch.Tensor:
    """An expression of one variable, for every value of it."""
    found = evaluate(expression, {variable: blocks.values}, _no_load)
    return torch.as_tensor(found).expand(len(blocks.values))


def _no_load(number: int, index: tuple[sympy.Expr, ...]) -> Any:
    raise NotImplementedError("a tensor's values are not known")


# -- conditions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Verdict:
    """every: a condition surely holds on the whole block; some: it may hold somewhere in it."""

    every: torch.Tensor
    some: torch.Tensor

    def __and__(self, other: _Verdict) -> _Verdict:
        return _Verdict(self.every & other.every, self.some & other.some)

    def __or__(self, other: _Verdict) -> _Verdict:
        return _Verdict(self.every | other.every, self.some | other.some)


_UNKNOWN = _Verdict(torch.tensor(False), torch.tensor(True))


def _verdict(predicate: Any, grid: _Grid) -> _Verdict:
    """What is known of a predicate in normal form, by blocks."""
    if predicate in (sympy.true, sympy.false):
        holds = torch.tensor(predicate == sympy.true)
        return _Verdict(holds, holds)
    single = grid.of(predicate)
    if single is not None:
        variable, expression, blocks = single
        try:
            return blocks.counted(_values(expression, variable, blocks).bool())
        except NotImplementedError:
            pass
    if isinstance(predicate, (And, Or)):
        return _joined(predicate, grid)
    if isinstance(predicate, Relational):
        return _compared(predicate, grid)
    return _UNKNOWN


def _joined(predicate: Any, grid: _Grid) -> _Verdict:
    """And or Or: the parts that depend on the same one variable are judged together."""
    groups: dict[Any, list[Any]] = {}
    for part in predicate.args:
        single = grid.of(part)
        groups.setdefault(part if single is None else single[0], []).append(part)
    if len(groups) == 1:  # already tried as one
        groups = {part: [part] for part in predicate.args}
    total: _Verdict | None = None
    for parts in groups.values():
        verdict = _verdict(predicate.func(*parts), grid)
        if total is None:
            total = verdict
        else:
            total = total & verdict if isinstance(predicate, And) else total | verdict
    assert total is not None
    return total


def _compared(relation: Relational, grid: _Grid) -> _Verdict:
    """A comparison of expressions over both q and k."""
    found = _range(sympy.expand(relation.lhs - relation.rhs), grid)
    return _UNKNOWN if found is None else _VERDICTS[type(relation)](found.low, found.high)


def _equal(low: torch.Tensor, high: torch.Tensor) -> _Verdict:
    return _Verdict((low == 0) & (high == 0), (low <= 0) & (high >= 0))


def _different(low: torch.Tensor, high: torch.Tensor) -> _Verdict:
    equal = _equal(low, high)
    return _Verdict(~equal.some, ~equal.every)


# What the range of a difference says of its comparison with 0.
_VERDICTS: dict[Any, Callable[[torch.Tensor, torch.Tensor], _Verdict]] = {
    sympy.Ge: lambda low, high: _Verdict(low >= 0, high >= 0),
    sympy.Gt: lambda low, high: _Verdict(low > 0, high > 0),
    sympy.Le: lambda low, high: _Verdict(high <= 0, low <= 0),
    sympy.Lt: lambda low, high: _Verdict(high < 0, low < 0),
    sympy.Eq: _equal,
    sympy.Ne: _different,
}


# -- numbers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Range:
    """The least and the largest value that a number may have in each block."""

    low: torch.Tensor
    high: torch.Tensor

    def __add__(self, other: _Range) -> _Range:
        return _Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: _Range) -> _Range:
        products = torch.stack(
            torch.broadcast_tensors(
                self.low * other.low,
                self.low * other.high,
                self.high * other.low,
                self.high * other.high,
            )
        )
        return _Range(products.amin(0), products.amax(0))


def _range(expression: sympy.Expr, grid: _Grid) -> _Range | None:
    """The range of an integer expression by blocks; None where it is not known.

    Summands of q alone and of k alone are independent, so that the range of their sum is exact.
    """
    if not _is_over_rows_and_columns(expression):
        return None
    single = grid.of(expression)
    if single is not None and single[0] != _STEP:
        variable, alone, blocks = single
        try:
            return blocks.bounded(_values(alone, variable, blocks))
        except NotImplementedError:
            return None
    rule = _RANGES.get(expression.func)
    return None if rule is None else rule(expression, grid)


def _sum(expression: sympy.Expr, grid: _Grid) -> _Range | None:
    rows = [term for term in expression.args if not term.has(k)]
    columns = [term for term in expression.args if term.has(k) and not term.has(q)]
    both = [term for term in expression.args if term.has(q) and term.has(k)]
    return _folded(
        [_range(sympy.Add(*part), grid) for part in (rows, columns) if part]
        + [_range(term, grid) for term in both],
        lambda x, y: x + y,
    )


def _product(expression: sympy.Expr, grid: _Grid) -> _Range | None:
    return _folded([_range(factor, grid) for factor in expression.args], lambda x, y: x * y)


def _folded(
    ranges: Sequence[_Range | None], function: Callable[[_Range, _Range], _Range]
) -> _Range | None:
    total: _Range | None = None
    for found in ranges:
        if found is None:
            return None
        total = found if total is None else function(total, found)
    return total


def _floor(expression: sympy.Expr, grid: _Grid) -> _Range | None:
    numerator, denominator = expression.args[0].as_numer_denom()
    found = _range(sympy.expand(numerator), grid)
    if found is None or not (denominator.is_Integer and denominator > 0):
        return None
    size = int(denominator)
    return _Range(found.low // size, found.high // size)


def _mod(expression: sympy.Expr, grid: _Grid) -> _Range | None:
    dividend, divisor = expression.args
    found = _range(sympy.expand(dividend), grid)
    if found is None or not (divisor.is_Integer and divisor > 0):
        return None
    size = int(divisor)
    whole = found.low // size == found.high // size  # one period: the remainder grows with it
    return _Range(
        torch.where(whole, found.low % size, 0), torch.where(whole, found.high % size, size - 1)
    )


def _absolute(expression: sympy.Expr, grid: _Grid) -> _Range | None:
    found = _range(expression.args[0], grid)
    if found is None:
        return None
    low, high = found.low.abs(), found.high.abs()
    crosses = (found.low < 0) & (found.high > 0)
    return _Range(torch.where(crosses, 0, torch.minimum(low, high)), torch.maximum(low, high))


def _extreme(choose: Callable[..., torch.Tensor]) -> Callable[..., _Range | None]:
    def extreme(expression: sympy.Expr, grid: _Grid) -> _Range | None:
        return _folded(
            [_range(arg, grid) for arg in expression.args],
            lambda x, y: _Range(choose(x.low, y.low), choose(x.high, y.high)),
        )

    return extreme


_RANGES: dict[Any, Callable[[sympy.Expr, _Grid], _Range | None]] = {
    sympy.Add: _sum,
    sympy.Mul: _product,
    sympy.floor: _floor,
    sympy.Mod: _mod,
    sympy.Abs: _absolute,
    sympy.Max: _extreme(torch.maximum),
    sympy.Min: _extreme(torch.minimum),
}
