"""Between which keys rows attend, in closed form, beside the mask itself."""

from __future__ import annotations

import pytest
import sympy
import torch
from specs import CAUSAL, PADDING, WINDOW

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.triton.ranges import (
    Ranges,
    blocks_of_ranges,
    key_ranges,
    ranges_are_exact,
    row_ranges,
)
from adaattn_compiler.spec import M, N, k, param, q

LAST_ROWS = sympy.Ge(q + N - M - k, 0)
CHUNKS = sympy.Eq(sympy.floor(q / 24), sympy.floor(k / 24))
INTERVALS = {
    "all": sympy.true,
    "causal": CAUSAL,
    "strictly causal": sympy.Gt(q, k),
    "window": WINDOW,
    "both sides": sympy.And(sympy.Ge(q - k + 17, 0), sympy.Ge(k - q + 9, 0)),
    "last rows": LAST_ROWS,
    "last rows in a window": sympy.And(LAST_ROWS, sympy.Ge(k - q - N + M + 19, 0)),
    "chunks": CHUNKS,
    "causal chunks": sympy.And(CAUSAL, CHUNKS),
    "chunk before": sympy.And(CAUSAL, sympy.Le(sympy.floor(q / 24) - sympy.floor(k / 24), 1)),
    "prefix": sympy.Or(CAUSAL, sympy.Lt(k, param(0))),
    "first rows": sympy.Lt(q, 40),
    "keys beyond": sympy.Ge(k, 70),
    "steps": sympy.Ge(2 * q - 3 * k, 0),
    "none": sympy.false,
}
HOLES = {
    "sinks and a window": sympy.And(CAUSAL, sympy.Or(sympy.Lt(k, 4), WINDOW)),
    "dilated": sympy.Eq(sympy.Mod(sympy.floor(k / 32), 3), 0),
    "not the diagonal": sympy.Ne(q, k),
}
SIZES = [(90, 90), (33, 130), (130, 33), (1, 65), (64, 64)]


def attended(mask: object, rows: int, columns: int, params: tuple[int, ...]) -> torch.Tensor:
    if mask in (sympy.true, sympy.false):
        return torch.full((rows, columns), mask == sympy.true)
    sizes = (1, 1, rows, columns)
    values = positions((mask,), torch.empty(0), sizes)
    return evaluate_dense(mask, values, [], params).expand(rows, columns)


def by_blocks(keep: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(some, every) of each block."""
    parts = [strip.split(block[1], 1) for strip in keep.split(block[0])]
    some = torch.tensor([[bool(part.any()) for part in strip] for strip in parts])
    every = torch.tensor([[bool(part.all()) for part in strip] for strip in parts])
    return some, every


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", [*INTERVALS, *HOLES])
def test_ranges_hold(name: str, sizes: tuple[int, int]) -> None:
    mask = (INTERVALS | HOLES)[name]
    keep = attended(mask, *sizes, (21,))
    for ranges, kept in ((key_ranges(mask), keep), (row_ranges(mask), keep.T)):
        some, every = by_blocks(kept, (32, 16))
        visited, full = visited_by(ranges, mask, sizes, rows=kept is keep)
        assert not (some & ~visited).any()
        assert not (full & ~every).any()


def visited_by(
    ranges: Ranges, mask: object, sizes: tuple[int, int], rows: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if rows:
        return blocks_of_ranges(ranges, sizes, (32, 16), (21,))
    # Keys' rows are asked for with the names of sizes exchanged, too.
    exchange = {M: N, N: M}
    exchanged = Ranges(
        *(
            type(part)(*(sympy.sympify(e).xreplace(exchange) for e in (part.low, part.high)))
            for part in (ranges.some, ranges.every)
        )
    )
    return blocks_of_ranges(exchanged, sizes[::-1], (32, 16), (21,))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", INTERVALS)
def test_intervals_are_exact(name: str, sizes: tuple[int, int]) -> None:
    mask = INTERVALS[name]
    some, every = by_blocks(attended(mask, *sizes, (21,)), (32, 16))
    visited, full = blocks_of_ranges(key_ranges(mask), sizes, (32, 16), (21,))
    assert torch.equal(visited, some)
    assert torch.equal(full, every)
    assert ranges_are_exact(mask, sizes, (32, 16), (21,))


@pytest.mark.parametrize("name", HOLES)
def test_holes_are_no_intervals(name: str) -> None:
    assert not ranges_are_exact(HOLES[name], (300, 300), (32, 16))


def test_data_leaves_what_is_known_beside_it() -> None:
    visited, full = blocks_of_ranges(key_ranges(sympy.And(CAUSAL, PADDING)), (90, 90), (32, 16))
    some, _ = by_blocks(attended(CAUSAL, 90, 90, ()), (32, 16))
    assert torch.equal(visited, some)
    assert not full.any()
    assert ranges_are_exact(sympy.And(CAUSAL, PADDING), (90, 90), (32, 16))
