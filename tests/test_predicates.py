"""Normal form, simplification, proofs and names of masks, against masks written out."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import (
    Mask,
    around,
    atoms,
    causal,
    chunk,
    dilated,
    prefix,
    rows_from,
    slanted,
    trees,
    window,
)
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Or

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.predicates import (
    describe,
    has_key_in_every_row,
    lower_bound,
    normalized,
    simplified,
)
from adaattn_compiler.spec import Load, M, N, Where, b, h, k, param, q

sizes = st.tuples(st.integers(1, 14), st.integers(1, 14))


def dense(predicate: object, rows: int, columns: int, *operands: torch.Tensor) -> torch.Tensor:
    predicate = sympy.sympify(predicate)
    values = positions((predicate,), torch.zeros(()), (2, 3, rows, columns))
    found = evaluate_dense(predicate, values, operands)
    return torch.as_tensor(found).expand(rows, columns)


def is_normal(predicate: object) -> bool:
    if isinstance(predicate, (And, Or)):
        return all(is_normal(arg) for arg in predicate.args)
    if isinstance(predicate, Relational):
        return isinstance(predicate, (sympy.Ge, sympy.Eq, sympy.Ne)) and predicate.rhs == 0
    return predicate in (sympy.true, sympy.false)


# -- normal form -----------------------------------------------------------------------------------


@settings(max_examples=200)
@given(trees(atoms), sizes)
def test_normal_form_means_the_same(mask: Mask, size: tuple[int, int]) -> None:
    found = normalized(mask.predicate)
    assert is_normal(found)
    assert torch.equal(dense(found, *size), mask.dense(*size))


@given(trees(atoms), trees(atoms), sizes)
def test_exclusive_or_and_its_kin_mean_the_same(x: Mask, y: Mask, size: tuple[int, int]) -> None:
    ours, theirs = x.dense(*size), y.dense(*size)
    for predicate, meaning in (
        (sympy.Xor(x.predicate, y.predicate), ours ^ theirs),
        (sympy.Not(sympy.Xor(x.predicate, y.predicate)), ~(ours ^ theirs)),
        (sympy.Implies(x.predicate, y.predicate), ~ours | theirs),
        (sympy.Equivalent(x.predicate, y.predicate), ours == theirs),
        (sympy.ITE(x.predicate, y.predicate, sympy.Ge(q, 3)), None),
    ):
        found = normalized(predicate)
        assert is_normal(found)
        if meaning is None:
            meaning = torch.where(ours, theirs, (torch.arange(size[0]) >= 3)[:, None])
        assert torch.equal(dense(found, *size), meaning)


@pytest.mark.parametrize(
    ("relation", "normal"),
    [
        (q >= k, sympy.Ge(q - k, 0)),
        (q > k, sympy.Ge(q - k - 1, 0)),
        (q <= k, sympy.Ge(k - q, 0)),
        (q < k, sympy.Ge(k - q - 1, 0)),
        (sympy.Not(q < k), sympy.Ge(q - k, 0)),
        (sympy.Eq(q, k), normalized(sympy.Eq(k - q, 0))),
        (sympy.true, sympy.true),
        (True, sympy.true),
        (False, sympy.false),
    ],
)
def test_integers_are_compared_with_zero(relation: object, normal: object) -> None:
    assert normalized(relation) == normal


def test_equal_comparisons_have_one_form() -> None:
    same = [q - k >= 2, q >= k + 2, k + 1 < q, sympy.Not(q - 1 <= k), 2 + k <= q]
    assert len({normalized(relation) for relation in same}) == 1
    segments = [sympy.Eq(Load(0, b, q), Load(0, b, k)), sympy.Eq(Load(0, b, k), Load(0, b, q))]
    assert len({normalized(relation) for relation in segments}) == 1


def test_a_condition_that_is_a_symbol_stays() -> None:
    symbol = sympy.Symbol("symbol")
    assert normalized(sympy.Not(symbol)) == sympy.Not(symbol)
    assert normalized(sympy.Or(sympy.Not(symbol), q < k)).has(symbol)


def test_reals_are_left_as_they_are() -> None:
    relation = sympy.Gt(Load(0, b, k), sympy.Float(0.5))
    assert normalized(relation) == relation


def test_a_choice_in_an_index_is_not_parted() -> None:
    """Either load alone would read outside the tensor."""
    wrapped = Where(k - 3 < 0, k - 3 + N, k - 3)
    mask = sympy.And(sympy.Ne(Load(0, wrapped), 0), sympy.Eq(Where(q > 2, q, k), Load(1, wrapped)))
    found = normalized(mask)
    assert {load.args[1] for load in found.atoms(Load)} == {wrapped}
    operands = torch.tensor([1, 0, 1, 1, 0]), torch.tensor([3, 4, 0, 1, 2])
    places = (torch.arange(5) - 3) % 5
    rows = torch.arange(6)[:, None]
    ids = operands[1][places]
    wanted = (operands[0][places] != 0) & (torch.where(rows > 2, rows, torch.arange(5)) == ids)
    assert torch.equal(dense(found, 6, 5, *operands), wanted)


def test_nested_choices_are_parted() -> None:
    inner = Where(q > k, q, k)
    mask = sympy.Ge(Where(sympy.Ge(inner, 3), inner, -1), 0)
    r, c = torch.arange(7)[:, None], torch.arange(5)
    found = normalized(mask)
    assert not found.has(Where)
    assert torch.equal(dense(found, 7, 5), torch.maximum(r, c) >= 3)


# -- bounds and simplification ---------------------------------------------------------------------


@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(-9, 9), sizes)
def test_lower_bound_is_the_least_value(down: int, across: int, rest: int, size) -> None:
    rows, columns = size
    bound = lower_bound(down * q + across * k + rest)
    r, c = torch.arange(rows)[:, None], torch.arange(columns)
    assert bound.subs({M: rows, N: columns}) == int((down * r + across * c + rest).min())


@pytest.mark.parametrize(
    "expression",
    [
        q * k,
        q**2,
        sympy.floor(q / 2),
        sympy.Mod(k, 3) + q,
        param(0) * q,
        b * k,
        Load(0, b, k) + q,
        sympy.Abs(Load(0, b)),
    ],
)
def test_lower_bound_of_what_is_not_linear_is_not_known(expression: sympy.Expr) -> None:
    assert lower_bound(expression) is None


@settings(max_examples=200)
@given(trees(atoms), sizes, st.booleans())
def test_simplification_means_the_same(mask: Mask, size: tuple[int, int], known: bool) -> None:
    facts = {M: size[0], N: size[1]} if known else None
    for predicate in (mask.predicate, normalized(mask.predicate)):
        found = simplified(predicate, facts)
        assert torch.equal(dense(found, *size), mask.dense(*size))


@pytest.mark.parametrize("relation", [sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt, sympy.Eq, sympy.Ne])
def test_simplification_reads_both_sides(relation: type[Relational]) -> None:
    for number in range(-2, 9):
        for difference in (q, -q, q - k, q + 2 * k):
            predicate = relation(difference, number)
            found = simplified(predicate, {M: 4, N: 3})
            values = dense(predicate, 4, 3)
            assert torch.equal(dense(found, 4, 3), values)
            certain = bool(values.all()) or not values.any()
            # Bounds tell all but equality of a number inside the range.
            if relation not in (sympy.Eq, sympy.Ne):
                assert (found in (sympy.true, sympy.false)) == certain


def test_what_holds_everywhere_is_dropped() -> None:
    facts = {M: 8, N: 8}
    assert simplified(normalized((causal() & window(8)).predicate), facts) == sympy.Ge(q - k, 0)
    assert simplified(normalized((causal() & window(7)).predicate), facts) != sympy.Ge(q - k, 0)
    assert simplified(normalized(prefix(8).predicate), facts) == sympy.true
    assert simplified(normalized(prefix(7).predicate), facts) != sympy.true
    assert simplified(normalized(prefix(8).predicate)) != sympy.true
    assert simplified(normalized(causal(7).predicate), facts) == sympy.true
    assert simplified(normalized(causal(-8).predicate), facts) == sympy.false
    assert simplified(sympy.Ge(N - 1 - k, 0)) == sympy.true
    assert simplified(sympy.Lt(k, N)) == sympy.true
    assert simplified(sympy.Ge(q - M, 0)) == sympy.false
    assert simplified(sympy.Ge(q + param(0), 0)) == sympy.Ge(q + param(0), 0)


# -- rows without keys -----------------------------------------------------------------------------


@settings(max_examples=300)
@given(trees(atoms), sizes)
def test_a_key_in_every_row_is_a_proof(mask: Mask, size: tuple[int, int]) -> None:
    every = bool(mask.dense(*size).any(-1).all())
    for predicate in (mask.predicate, normalized(mask.predicate)):
        if has_key_in_every_row(predicate, {M: size[0], N: size[1]}):
            assert every


@settings(max_examples=200)
@given(trees(atoms))
def test_a_key_in_every_row_without_sizes_holds_for_all_sizes(mask: Mask) -> None:
    if has_key_in_every_row(normalized(mask.predicate)):
        for size in ((1, 1), (1, 9), (9, 1), (5, 5), (4, 11), (11, 4)):
            assert mask.dense(*size).any(-1).all()


@pytest.mark.parametrize("rows", [1, 5, 8, 13])
@pytest.mark.parametrize("columns", [1, 5, 8, 13])
def test_rows_with_keys_are_found(rows: int, columns: int) -> None:
    """Not only sound: the masks that models have are decided."""
    facts = {M: rows, N: columns}
    past = columns - rows
    for mask in (
        causal(),
        causal(past),
        causal(past) & window(3),
        causal(past) & window(3 - past),
        causal() & window(3),
        causal() & chunk(4),
        causal(past) & chunk(4, past),
        causal() & dilated(3),
        prefix(2) | causal(-4),
        prefix(0) | causal(-1),
        window(3),
        around(2),
        rows_from(0),
        slanted(0, 1, -1),
    ):
        every = bool(mask.dense(rows, columns).any(-1).all())
        found = has_key_in_every_row(normalized(mask.predicate), facts)
        assert not found or every
        if rows <= columns and mask.dense(rows, columns).any(-1).all():
            assert found, mask.predicate


@pytest.mark.parametrize(
    ("mask", "rows", "columns"),
    [
        (causal(-1), 4, 4),  # the first row
        (window(2), 9, 4),  # rows beyond the last key's window
        (causal() & window(2), 9, 4),
        (causal(2) & window(-1), 8, 9),  # the window's last key is one row's too few
        (window(-3) & causal(), 4, 4),
        (dilated(3, 1) & causal(), 1, 4),
        (dilated(2) & ~causal() & ~window(1), 4, 4),
        (chunk(4), 9, 4),
        (chunk(2, 5) & causal(), 4, 4),
        (prefix(0), 1, 1),
        (prefix(2) & ~causal(), 4, 4),
        (rows_from(1) & causal(), 4, 4),
        (~causal(), 1, 1),
    ],
)
def test_rows_without_keys_are_not_denied(mask: Mask, rows: int, columns: int) -> None:
    assert not mask.dense(rows, columns).any(-1).all()
    assert not has_key_in_every_row(mask.predicate, {M: rows, N: columns})


def test_no_keys_at_all_are_not_denied() -> None:
    assert not has_key_in_every_row(causal().predicate, {M: 4, N: 0})


def test_data_is_no_proof() -> None:
    padding = sympy.Ne(Load(0, b, k), 0)
    facts = {M: 4, N: 4}
    assert not has_key_in_every_row(padding, facts)
    assert not has_key_in_every_row(sympy.And(causal().predicate, padding), facts)
    assert not has_key_in_every_row(sympy.Ge(Load(0, b), k), facts)
    assert has_key_in_every_row(sympy.Or(causal().predicate, padding), facts)
    assert has_key_in_every_row(sympy.Eq(Load(0, b, q), Load(0, b, k)), facts)
    assert not has_key_in_every_row(sympy.Eq(Load(0, b, q), Load(0, b, k)), {M: 5, N: 4})
    assert not has_key_in_every_row(sympy.Eq(Load(0, b, q), Load(1, b, k)), facts)


def test_integers_of_the_run_are_no_proof() -> None:
    assert not has_key_in_every_row(sympy.Ge(q + param(0), k), {M: 4, N: 4})
    assert has_key_in_every_row(sympy.Ge(q + param(0) ** 2, k), {M: 4, N: 4})
    assert has_key_in_every_row(sympy.Ge(q + N - M, k), {M: 3, N: 8})
    assert not has_key_in_every_row(sympy.Ge(q + N - M, k))
    assert not has_key_in_every_row(sympy.Ge(h, k + 1), {M: 4, N: 4})
    assert has_key_in_every_row(sympy.Ge(h, k), {M: 4, N: 4})


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (True, "none"),
        (sympy.true, "none"),
        (False, "all masked"),
        (q >= k, "causal"),
        (k <= q, "causal"),
        (sympy.Not(k > q), "causal"),
        (q + 5 >= k, "causal(+5)"),
        (q > k, "causal(-1)"),
        (q + N - M >= k, "causal(-M + N)"),
        (q + param(0) >= k, "causal(+p0)"),
        (q - k < 512, "window(512)"),
        (k > q - 512, "window(512)"),
        (sympy.And(q >= k, q - k < 512), "causal & window(512)"),
        (sympy.Abs(q - k) <= 4, "window(±4)"),
        (sympy.Abs(k - q) < 5, "window(±4)"),
        (k > q, "after(1)"),
        (k < 7, "prefix(7)"),
        (sympy.Or(k < 7, q >= k), "causal | prefix(7)"),
        (sympy.And(sympy.Or(k < 7, q >= k), q - k < 9), "(causal | prefix(7)) & window(9)"),
        (sympy.Or(sympy.And(q >= k, q - k < 9), k < 4), "causal & window(9) | prefix(4)"),
        (sympy.And(k < 7, q < 7), "prefix(7) & q <= 6"),
        (k >= 7, "k >= 7"),
        (sympy.Eq(sympy.floor(q / 64), sympy.floor(k / 64)), "chunk(64)"),
        (sympy.Ne(sympy.floor(q / 64), sympy.floor(k / 64)), "not chunk(64)"),
        (sympy.Eq(sympy.floor((q + 3) / 64), sympy.floor(k / 64)), "chunk(64, +3)"),
        (sympy.And(sympy.Eq(sympy.floor(k / 8), sympy.floor(q / 8)), k <= q), "causal & chunk(8)"),
        (sympy.Eq(sympy.Mod(q - k, 4), 0), "dilated(4)"),
        (sympy.Eq(sympy.Mod(k - q, 4), 0), "dilated(4)"),
        (sympy.Ne(sympy.Mod(q - k, 4), 0), "not dilated(4)"),
        (sympy.Eq(sympy.Mod(q - k + 1, 4), 0), "dilated(4, +1)"),
        (sympy.Eq(q, k), "diagonal"),
        (sympy.Ne(q, k), "not diagonal"),
        (sympy.Eq(Load(0, b, q), Load(0, b, k)), "segment(0)"),
        (sympy.Eq(Load(1, b, k), Load(0, b, q)), "segment(0, 1)"),
        (sympy.Ne(Load(0, b, q), Load(0, b, k)), "not segment(0)"),
        (
            sympy.And(q >= k, sympy.Eq(Load(0, b, q), Load(0, b, k))),
            "causal & segment(0)",
        ),
        (sympy.Ne(Load(0, b, k), 0), "key padding"),
        (sympy.Eq(Load(0, b, k), 0), "key padding"),
        (sympy.Ne(Load(0, b, 0, 0, k), 0), "key padding"),
        (sympy.Lt(k, Load(0, b)), "key padding"),
        (sympy.Gt(Load(0, k), sympy.Float(0.5)), "key padding"),
        (sympy.And(q >= k, sympy.Ne(Load(0, b, k), 0)), "causal & key padding"),
        (sympy.Ne(Load(0, b, h, q, k), 0), "tensor[bhqk]"),
        (sympy.Eq(Load(0, q, k), 0), "not tensor[qk]"),
        (sympy.Ne(Load(0, b, q), 0), "tensor[bq]"),
    ],
)
def test_names_of_masks(mask: object, name: str) -> None:
    assert describe(mask) == name


@given(trees(atoms), trees(atoms))
def test_any_mask_has_a_name(x: Mask, y: Mask) -> None:
    for mask in (x.predicate, sympy.Xor(x.predicate, y.predicate)):
        assert describe(mask)
        assert "Load" not in describe(sympy.And(mask, sympy.Ne(Load(0, b, k), 0)))


@pytest.mark.parametrize(
    "odd",
    [
        sympy.Ge(sympy.Function("f")(q), k),
        sympy.Eq(sympy.Mod(q * k, 3), 1),
        sympy.Eq(sympy.floor(q / 3) - sympy.floor(q / 4), 0),
        sympy.Eq(sympy.floor(q * k / 3) - sympy.floor(b / 4), 0),
        sympy.Eq(sympy.floor(q / M), sympy.floor(k / N)),
        sympy.Eq(sympy.floor(q / param(0)), sympy.floor(k / param(0))),
        sympy.Eq(sympy.floor(q / 3) - 2 * sympy.floor(k / 3), 0),
        sympy.Eq(Load(0, q) + Load(1, k), Load(2, b)),
        sympy.Gt(Load(0, sympy.Mod(q, 3), k), Load(1, b, h)),
        sympy.Ge(sympy.Max(q, 3), sympy.Min(k, 3)),
        sympy.Symbol("symbol"),
        sympy.Not(sympy.Symbol("symbol")),
    ],
)
def test_an_odd_mask_has_a_name(odd: object) -> None:
    assert isinstance(describe(odd), str)
    assert isinstance(describe(sympy.And(odd, q >= k)), str)
