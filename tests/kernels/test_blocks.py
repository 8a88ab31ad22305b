"""Block structure against the dense mask: sound for any predicate, exact for those of the field."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from masks import Mask, atoms, causal, chunk, dilated, prefix, product, rows_from, trees, window
from torch.nn.attention.flex_attention import create_block_mask

from adaattn_compiler.kernels.blocks import (
    BlockStructure,
    block_lists,
    block_structure,
    density,
)
from adaattn_compiler.spec import Load, M, N, b, h, k, param, q


def dense_blocks(mask: torch.Tensor, block_q: int, block_k: int) -> BlockStructure:
    """The true structure of a dense mask, block by block."""
    parts = [list(row.split(block_k, 1)) for row in mask.split(block_q, 0)]
    full = torch.tensor([[bool(part.all()) for part in row] for row in parts])
    some = torch.tensor([[bool(part.any()) for part in row] for row in parts])
    return BlockStructure(some & ~full, full)


def assert_sound(found: BlockStructure, true: BlockStructure) -> None:
    assert found.full.shape == true.full.shape
    assert not (found.full & found.partial).any()
    assert not (found.full & ~true.full).any()
    empty = ~(found.full | found.partial)
    assert not (empty & (true.full | true.partial)).any()


def assert_exact(found: BlockStructure, true: BlockStructure) -> None:
    assert torch.equal(found.full, true.full)
    assert torch.equal(found.partial, true.partial)


sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))


@given(trees(atoms), sizes)
def test_any_predicate_is_sound(mask: Mask, size: tuple[int, int, int, int]) -> None:
    rows, columns, block_q, block_k = size
    found = block_structure(mask.predicate, rows, columns, block_q, block_k)
    assert_sound(found, dense_blocks(mask.dense(rows, columns), block_q, block_k))


combinations = st.sampled_from(
    [
        lambda o, w, p, c: causal(),
        lambda o, w, p, c: causal(o),
        lambda o, w, p, c: causal() & window(w),
        lambda o, w, p, c: causal(o) & window(w),
        lambda o, w, p, c: prefix(p) | causal(),
        lambda o, w, p, c: prefix(p) | causal(o),
        lambda o, w, p, c: (prefix(p) | causal()) & window(w),
        lambda o, w, p, c: prefix(p) | (causal() & window(w)),
        lambda o, w, p, c: chunk(c),
        lambda o, w, p, c: chunk(c) & causal(),
        lambda o, w, p, c: chunk(c, o) & causal(o),
        lambda o, w, p, c: chunk(c) & causal() & window(w),
        lambda o, w, p, c: dilated(w) & causal(),
        lambda o, w, p, c: dilated(c, o) & causal() & window(w),
        lambda o, w, p, c: prefix(p) & rows_from(w),
        lambda o, w, p, c: ~causal(o),
        lambda o, w, p, c: ~(causal() & window(w)),
    ]
)


@given(
    combinations,
    st.integers(-7, 7),
    st.integers(1, 20),
    st.integers(0, 20),
    st.integers(1, 9),
    sizes,
)
def test_masks_of_the_field_are_exact(
    build, offset: int, width: int, first: int, size: int, shape: tuple[int, int, int, int]
) -> None:
    rows, columns, block_q, block_k = shape
    mask = build(offset, width, first, size)
    found = block_structure(mask.predicate, rows, columns, block_q, block_k)
    true = dense_blocks(mask.dense(rows, columns), block_q, block_k)
    assert_sound(found, true)
    # Of a union two parts may fill a block that neither fills.
    if not isinstance(mask.predicate, sympy.Or):
        assert_exact(found, true)
    assert density(found) == density(true)


@pytest.mark.parametrize("rows", [1, 5, 64, 300])
@pytest.mark.parametrize("columns", [1, 130, 256])
def test_masks_of_the_field_are_exact_at_blocks_of_128(rows: int, columns: int) -> None:
    for mask in (
        causal(),
        causal(columns - rows),
        causal() & window(100),
        prefix(100) | causal(),
        chunk(48) & causal(),
        dilated(3) & causal(),
    ):
        found = block_structure(mask.predicate, rows, columns, 128, 128)
        assert_exact(found, dense_blocks(mask.dense(rows, columns), 128, 128))


def test_conjunction_with_data_keeps_what_is_empty() -> None:
    static = causal() & window(20)
    padding = sympy.Ne(Load(0, b, k), 0)
    alone = block_structure(static.predicate, 100, 100, 16, 16)
    both = block_structure(sympy.And(static.predicate, padding), 100, 100, 16, 16)
    assert not both.full.any()
    assert torch.equal(both.partial, alone.partial | alone.full)


def test_disjunction_with_data_keeps_what_is_full() -> None:
    static = causal()
    alone = block_structure(static.predicate, 100, 100, 16, 16)
    both = block_structure(
        sympy.Or(static.predicate, sympy.Ne(Load(0, q), Load(0, k))), 100, 100, 16, 16
    )
    assert torch.equal(both.full, alone.full)
    assert torch.equal(both.partial, ~alone.full)


@pytest.mark.parametrize(
    "unknown",
    [
        sympy.Ge(h + q, k),
        sympy.Ge(b, k),
        sympy.Ne(Load(0, b, h, q, k), 0),
        sympy.Lt(k, Load(0, b)),
        sympy.Ge(sympy.Function("f", integer=True)(q, k), 0),
        sympy.Ge(sympy.Function("f", integer=True)(k), 0),
        sympy.Ge(sympy.Function("f", integer=True)(q - k), 0),
        sympy.Ge(q**7, k),
        sympy.Eq(sympy.Mod(q * k, k + 1), 0),
        sympy.Eq(sympy.floor(q / (k + 1)), 2),
    ],
)
def test_what_is_not_known_is_partial(unknown: sympy.Basic) -> None:
    for mask in (unknown, sympy.Not(unknown)):
        found = block_structure(mask, 20, 20, 8, 8)
        assert found.partial.all()
        assert not found.full.any()


def test_sizes_and_parameters_are_substituted() -> None:
    mask = sympy.And(sympy.Ge(q + N - M, k), sympy.Lt(k, param(1)), sympy.Ge(q, param(0)))
    found = block_structure(mask, 12, 20, 4, 4, params=(2, 9))
    r, c = torch.arange(12).reshape(-1, 1), torch.arange(20)
    assert_exact(found, dense_blocks((r + 8 >= c) & (c < 9) & (r >= 2), 4, 4))


@pytest.mark.parametrize("mask", [sympy.true, sympy.false, True, False])
def test_constants(mask: object) -> None:
    found = block_structure(mask, 10, 7, 4, 4)
    assert found.full.shape == (3, 2)
    assert not found.partial.any()
    assert found.full.all() == bool(mask)
    assert density(found) == float(bool(mask))


def test_an_empty_mask_has_no_blocks() -> None:
    found = block_structure(causal().predicate, 0, 7, 4, 4)
    assert found.full.shape == (0, 2)
    assert density(found) == 0.0
    counts, indices, *_ = block_lists(found)
    assert counts.shape == (1, 1, 0)
    assert indices.shape == (1, 1, 0, 1)


@given(st.integers(0, 2**20), st.integers(1, 6), st.integers(1, 7))
@example(0, 3, 4)
def test_lists_name_each_block_once_in_order(seed: int, rows: int, columns: int) -> None:
    drawn = torch.randint(0, 3, (rows, columns), generator=torch.Generator().manual_seed(seed))
    if seed == 0:
        drawn.zero_()
    structure = BlockStructure(drawn == 1, drawn == 2)
    counts, indices, full_counts, full_indices = block_lists(structure)
    for chosen, number, places in (
        (structure.partial, counts, indices),
        (structure.full, full_counts, full_indices),
    ):
        assert number.dtype == places.dtype == torch.int32
        assert number.shape == (1, 1, rows)
        assert places.shape == (1, 1, rows, max(1, int(chosen.sum(-1).max())))
        for row in range(rows):
            wanted = chosen[row].nonzero().flatten().tolist()
            assert int(number[0, 0, row]) == len(wanted)
            listed = places[0, 0, row].tolist()
            assert listed[: len(wanted)] == wanted
            assert not any(listed[len(wanted) :])


def test_lists_are_those_of_flex_attention() -> None:
    mask = prefix(40) | (causal() & window(200))
    lists = block_lists(block_structure(mask.predicate, 512, 640, 128, 128))

    def mask_mod(b, h, q, k):
        return (k < 40) | ((q >= k) & (q - k < 200))

    theirs = create_block_mask(mask_mod, None, None, 512, 640, device="cpu", BLOCK_SIZE=128)
    for count, indices, their_count, their_indices in (
        (*lists[:2], theirs.kv_num_blocks, theirs.kv_indices),
        (*lists[2:], theirs.full_kv_num_blocks, theirs.full_kv_indices),
    ):
        assert torch.equal(count, their_count)
        for row, number in enumerate(count.flatten().tolist()):
            assert torch.equal(indices[0, 0, row, :number], their_indices[0, 0, row, :number])


def test_density_counts_blocks_to_compute() -> None:
    structure = block_structure((causal() & window(128)).predicate, 1024, 1024, 128, 128)
    assert density(structure) == (8 + 7) / 64
    assert int(structure.full.sum()) == 0


def test_long_sequences_need_no_mask_tensor() -> None:
    """A dense mask of this size would be 64 GiB."""
    size = 1 << 18
    mask = chunk(5000) & causal() & window(1000) | prefix(3)
    structure = block_structure(mask.predicate, size, size, 512, 512)
    assert structure.full.shape == (512, 512)
    assert structure.partial[:, 0].all()


def test_a_term_that_is_not_understood_spares_its_neighbours() -> None:
    mask = product(3) & causal()
    found = block_structure(mask.predicate, 64, 64, 8, 8)
    assert torch.equal(found.partial, torch.ones(8, 8, dtype=torch.bool).tril())
