"""Expressions as torch computations, against loops in Python that know nothing of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from masks import Mask, atoms, trees

from adaattn_compiler.kernels.evaluate import (
    dense_bias,
    evaluate,
    evaluate_dense,
    positions,
    rank_of,
)
from adaattn_compiler.spec import POSITIONS, AttentionSpec, Load, M, N, S, Where, b, h, k, param, q

SIZES = (2, 3, 4, 5)  # B, H, M, N
Values = dict[str, int]


@dataclass(frozen=True)
class Formula:
    """An expression, and its value at one position, in Python's numbers."""

    expression: Any
    at: Callable[[Values], Any]


def table(*shape: int) -> torch.Tensor:
    """Numbers that differ from each other, so that none stands for another."""
    return torch.arange(math.prod(shape)).reshape(shape) * 7 % 101 - 40


OPERANDS = (
    table(2, 5),
    table(2, 3, 4, 5),
    table(3),
    table(8),
    table(2, 1, 1, 5),
    torch.tensor(3),
    table(2, 4),
)

_loads: list[Formula] = [
    Formula(Load(0, b, k), lambda at: int(OPERANDS[0][at["b"], at["k"]])),
    Formula(Load(6, b, q), lambda at: int(OPERANDS[6][at["b"], at["q"]])),
    Formula(Load(0, b, N - 1 - k), lambda at: int(OPERANDS[0][at["b"], 4 - at["k"]])),
    Formula(Load(0, 1, k), lambda at: int(OPERANDS[0][1, at["k"]])),
    Formula(Load(0, 0, 2), lambda at: int(OPERANDS[0][0, 2])),
    Formula(Load(1, b, h, q, k), lambda at: int(OPERANDS[1][at["b"], at["h"], at["q"], at["k"]])),
    Formula(Load(1, b, 0, q, k), lambda at: int(OPERANDS[1][at["b"], 0, at["q"], at["k"]])),
    Formula(Load(1, 1, h, 0, k), lambda at: int(OPERANDS[1][1, at["h"], 0, at["k"]])),
    Formula(
        Load(1, b, h, 3, N - 1 - q), lambda at: int(OPERANDS[1][at["b"], at["h"], 3, 4 - at["q"]])
    ),
    Formula(
        Load(1, b, h, q, sympy.Mod(k + q, 5)),
        lambda at: int(OPERANDS[1][at["b"], at["h"], at["q"], (at["k"] + at["q"]) % 5]),
    ),
    Formula(Load(2, h), lambda at: int(OPERANDS[2][at["h"]])),
    Formula(Load(2, sympy.floor(k / 2)), lambda at: int(OPERANDS[2][at["k"] // 2])),
    Formula(Load(3, k - q + M - 1), lambda at: int(OPERANDS[3][at["k"] - at["q"] + 3])),
    Formula(Load(4, b, 0, 0, k), lambda at: int(OPERANDS[4][at["b"], 0, 0, at["k"]])),
    Formula(Load(5), lambda at: int(OPERANDS[5])),
    Formula(Load(3, Load(5) + k - q), lambda at: int(OPERANDS[3][3 + at["k"] - at["q"]])),
    Formula(
        Load(0, b, Where(k < 2, k + 3, k - 2)),
        lambda at: int(OPERANDS[0][at["b"], at["k"] + 3 if at["k"] < 2 else at["k"] - 2]),
    ),
]
_leaves = st.one_of(
    st.sampled_from(
        [
            Formula(q, lambda at: at["q"]),
            Formula(k, lambda at: at["k"]),
            Formula(h, lambda at: at["h"]),
            Formula(b, lambda at: at["b"]),
            Formula(M, lambda at: 4),
            Formula(N, lambda at: 5),
            Formula(param(0), lambda at: -3),
            Formula(param(1), lambda at: 2),
        ]
    ),
    st.sampled_from(_loads),
    st.builds(lambda n: Formula(sympy.Integer(n), lambda at: n), st.integers(-9, 9)),
)


def _binary(make: Callable[..., Any], compute: Callable[..., Any]) -> Any:
    return lambda x, y: Formula(
        make(x.expression, y.expression), lambda at: compute(x.at(at), y.at(at))
    )


_pairs = st.sampled_from(
    [
        _binary(lambda x, y: x + y, lambda x, y: x + y),
        _binary(lambda x, y: x - y, lambda x, y: x - y),
        _binary(lambda x, y: x * y, lambda x, y: x * y),
        _binary(sympy.Max, max),
        _binary(sympy.Min, min),
        _binary(lambda x, y: Where(x >= y, x, 2 * y), lambda x, y: x if x >= y else 2 * y),
        _binary(
            lambda x, y: Where(sympy.Or(sympy.Eq(x, y), x < 0), y, 1),
            lambda x, y: y if x == y or x < 0 else 1,
        ),
    ]
)


def _unary(make: Callable[..., Any], compute: Callable[..., Any]) -> Any:
    return lambda x, n: Formula(make(x.expression, n), lambda at: compute(x.at(at), n))


_singles = st.sampled_from(
    [
        _unary(lambda x, n: sympy.floor(x / n), lambda x, n: x // n),
        _unary(lambda x, n: sympy.floor((x - 1) / n), lambda x, n: (x - 1) // n),
        _unary(lambda x, n: sympy.Mod(x, n), lambda x, n: x % n),
        _unary(lambda x, n: sympy.Abs(x - n), lambda x, n: abs(x - n)),
        _unary(lambda x, n: -x, lambda x, n: -x),
        _unary(lambda x, n: x**2, lambda x, n: x**2),
        _unary(lambda x, n: x**3, lambda x, n: x**3),
        _unary(lambda x, n: Where(sympy.Ne(x, n), 1, 0), lambda x, n: int(x != n)),
    ]
)
formulas = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.builds(lambda make, x, y: make(x, y), _pairs, inner, inner),
        st.builds(lambda make, x, n: make(x, n), _singles, inner, st.integers(1, 5)),
    ),
    max_leaves=4,
)


def computed(expression: Any) -> torch.Tensor:
    """The expression on all of [B,H,M,N]."""
    expression = sympy.sympify(expression)
    values = positions((expression,), OPERANDS[0], SIZES)
    found = evaluate_dense(expression, values, OPERANDS, (-3, 2))
    return torch.as_tensor(found).expand(SIZES)


def looped(formula: Formula) -> torch.Tensor:
    """The same by four loops."""
    out = torch.empty(SIZES, dtype=torch.float64)
    for place in itertools.product(*(range(size) for size in SIZES)):
        out[place] = float(formula.at(dict(zip("bhqk", place, strict=True))))
    return out


@given(formulas)
def test_expressions_are_what_loops_compute(formula: Formula) -> None:
    choices = sympy.sympify(formula.expression).atoms(sympy.Max, sympy.Min, Where)
    chosen_by = [choice.args[:1] if choice.func is Where else choice.args for choice in choices]
    assume(all(part.has(*POSITIONS) for parts in chosen_by for part in parts))  # see below
    assert torch.equal(computed(formula.expression).double(), looped(formula))


@pytest.mark.parametrize("formula", _loads, ids=lambda formula: str(formula.expression))
def test_loads_are_read_at_their_index(formula: Formula) -> None:
    assert torch.equal(computed(formula.expression).double(), looped(formula))


@given(trees(atoms), st.integers(1, 9), st.integers(1, 9))
def test_masks_are_what_they_mean(mask: Mask, rows: int, columns: int) -> None:
    values = positions((mask.predicate,), torch.zeros(()), (1, 1, rows, columns))
    found = torch.as_tensor(evaluate_dense(mask.predicate, values, ()))
    assert found.dtype == torch.bool
    assert torch.equal(found.expand(rows, columns), mask.dense(rows, columns))


@pytest.mark.parametrize("relation", [sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt, sympy.Eq, sympy.Ne])
def test_comparisons(relation: Any) -> None:
    symbols = {q: torch.arange(3)[:, None], k: torch.arange(3)}
    found = evaluate(relation(q, k), symbols, lambda *_: None)
    for r, c in itertools.product(range(3), range(3)):
        assert bool(found[r, c]) == bool(relation(sympy.Integer(r), sympy.Integer(c)))


@pytest.mark.parametrize(
    ("expression", "at"),
    [
        (sympy.Max(q - 2, 0), lambda at: max(at["q"] - 2, 0)),
        (sympy.Max(0, k - q), lambda at: max(0, at["k"] - at["q"])),
        (sympy.Min(2, k), lambda at: min(2, at["k"])),
        (sympy.Max(-1, q - k, h - 1), lambda at: max(-1, at["q"] - at["k"], at["h"] - 1)),
        (sympy.Min(M, k, N - q), lambda at: min(4, at["k"], 5 - at["q"])),
        (Where(sympy.Ge(N, M + 1), k, q), lambda at: at["k"]),
        (Where(sympy.Ge(M, N), k, 3), lambda at: 3),
        (sympy.Max(M, N) - k, lambda at: 5 - at["k"]),
        (sympy.Max(sympy.Float(0.5), k), lambda at: max(0.5, at["k"])),
    ],
)
def test_choices_may_be_among_numbers(expression: Any, at: Any) -> None:
    assert torch.equal(computed(expression).double(), looped(Formula(expression, at)))


@pytest.mark.parametrize("constant", [sympy.true, sympy.false, sympy.Integer(3), sympy.Float(0.5)])
def test_constants_are_numbers(constant: Any) -> None:
    assert rank_of(constant) == 0
    assert evaluate_dense(constant, {}, ()) == constant


def test_floats_stay_floats() -> None:
    slope = Load(0, h) * (k - q)
    slopes = torch.tensor([0.5, 0.25, 0.125])
    values = positions((slope,), slopes, SIZES)
    found = evaluate_dense(slope, values, (slopes,))
    assert found.dtype == torch.float32
    assert found.shape == (3, 4, 5)
    wanted = slopes.view(3, 1, 1) * (torch.arange(5) - torch.arange(4)[:, None])
    assert torch.equal(found, wanted)
    soft = 2.5 * sympy.tanh(S / 2.5)
    scores = torch.randn(2, 3, 4, 5)
    assert torch.equal(evaluate_dense(soft, {S: scores}, ()), 2.5 * torch.tanh(scores * (1 / 2.5)))


def test_booleans_of_operands_are_conditions() -> None:
    padding = torch.tensor([[True, False, True], [False, False, True]])
    kept = sympy.And(sympy.Ne(Load(0, b, k), 0), q >= k)
    found = evaluate_dense(kept, positions((kept,), padding, (2, 1, 3, 3)), (padding,))
    wanted = padding[:, None, None] & torch.ones(3, 3, dtype=torch.bool).tril()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("expression", "shape"),
    [
        (q - k, (4, 5)),
        (k + 0 * q, (5,)),
        (q + 1, (4, 1)),
        (h + k, (3, 1, 5)),
        (b + 1, (2, 1, 1, 1)),
        (Load(0, b, k), (2, 1, 1, 5)),
        (Load(2, h), (3, 1, 1)),
    ],
)
def test_only_axes_that_are_mentioned_have_a_size(expression: Any, shape: tuple[int, ...]) -> None:
    values = positions((expression,), OPERANDS[0], SIZES)
    assert evaluate_dense(expression, values, OPERANDS).shape == shape
    assert rank_of(expression) == len(shape)


@pytest.mark.parametrize(
    "expression", [sympy.exp(q), sympy.sqrt(q), q**7, sympy.Function("f")(k), 1 / q**2]
)
def test_what_has_no_torch_form_is_refused(expression: Any) -> None:
    with pytest.raises(NotImplementedError):
        evaluate(expression, {q: torch.arange(3), k: torch.arange(3)}, lambda *_: None)


def test_bias_is_what_is_added_to_the_product() -> None:
    values = positions((k - q,), OPERANDS[0], SIZES)
    assert dense_bias(AttentionSpec(1.0), values, ()) is None
    found = dense_bias(AttentionSpec(1.0, score=S + k - q), values, ())
    assert torch.equal(found, torch.arange(5) - torch.arange(4)[:, None])
    with pytest.raises(NotImplementedError, match="not a sum"):
        dense_bias(AttentionSpec(1.0, score=sympy.tanh(S)), values, ())
