"""Expressions of every form, what they read and what they are: for printers to be held to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import sympy
import torch

from adaattn_compiler.kernels.evaluate import evaluate_dense
from adaattn_compiler.spec import Load, M, N, S, Where, b, h, k, param, q

# Sizes of the call, the batch item and the head that are looked at, and squares of this many rows
# and keys: one where positions are small, one where their product does not fit in 32 bits.
ROWS, COLUMNS, BATCH_ITEM, HEAD, SQUARE = 50_040, 50_100, 1, 2, 40
SMALL, LARGE = 0, 50_000
PARAMS = (7, 1 << 40, -3)

BOOL, BYTE, SIGNED_BYTE, SHORT, INT, LONG = range(6)
FLOAT, BRAIN, HALF, DOUBLE = range(6, 10)
SCALAR, TABLE, PLACES, HEADS, ALL, LIMITS, SLOPES = range(10, 17)
FEW = 32


@functools.cache
def operands() -> list[torch.Tensor]:
    """A vector [COLUMNS] of each type, and tables of other shapes."""
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int, dtype: torch.dtype, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size or (COLUMNS,), generator=generator, dtype=dtype)

    def real(dtype: torch.dtype, *size: int) -> torch.Tensor:
        return torch.randn(size or (COLUMNS,), generator=generator, dtype=torch.float64).to(dtype)

    return [
        whole(0, 2, torch.int64).bool(),
        whole(0, 256, torch.uint8),
        whole(-128, 128, torch.int8),
        whole(-(1 << 15), 1 << 15, torch.int16),
        whole(-(1 << 31), 1 << 31, torch.int64).to(torch.int32),
        whole(-(1 << 40), 1 << 40, torch.int64),
        real(torch.float32),
        real(torch.bfloat16),
        real(torch.float16),
        real(torch.float64),
        real(torch.float32, 1)[0],
        real(torch.float32, FEW, SQUARE),
        whole(0, FEW, torch.int64),
        real(torch.float32, 4),
        real(torch.float32, 2, 4, SQUARE, SQUARE).transpose(1, 2).contiguous().transpose(1, 2),
        # Multiples of 41, of which x * (1 / 41) is not always whole, and a number beyond float32's.
        torch.arange(COLUMNS) * 41 + (1 << 30),
        torch.tensor([3, 1 << 20, -(1 << 20), 5], dtype=torch.int32),
    ]


def fraction(top: Any, bottom: Any) -> Any:
    return sympy.floor(top / bottom)


CAUSAL, ODD = sympy.Ge(q - k, 0), sympy.Eq(sympy.Mod(k, 2), 1)

# Computed in whole numbers: exactly.
WHOLE: dict[str, Any] = {
    "position": q,
    "batch and head": 10 * b + h,
    "sizes": M + N - k,
    "negated": -k,
    "difference": q - k - 5,
    "number": sympy.Integer(-5),
    "number of 32 bits": sympy.Integer(2**31),
    "least number of 32 bits": sympy.Integer(-(2**31)),
    "number of 40 bits": sympy.Integer(-(2**40)),
    "sum past 32 bits": q + 2**31 - 1,
    "window past 32 bits": k - q + 2**31 - 2,
    "product": q * k,
    "product and number": 100_000 * q - 7,
    "product of three": q * k * (k - q),
    "product of a sum": (q - k) * (q + k),
    "square": q**2,
    "cube": (k - q) ** 3,
    "fourth power": (k + 1) ** 4,
    "size times position": M * q - N * k,
    "floor": fraction(q - k, 3),
    "floor of a number below": fraction(2 * q - 3 * k, -7),
    "floor of a product": fraction(q * k, 1000),
    "floor by a run-time number": fraction(q - k, param(0)),
    "floor by one below zero": fraction(q - k, param(2)),
    "remainder": sympy.Mod(q - k, 5),
    "remainder by a number below": sympy.Mod(q - k, -5),
    "remainder of a product": sympy.Mod(q * k, 2**33 + 1),
    "remainder by a run-time number": sympy.Mod(k - q, param(0)),
    "remainder by one below zero": sympy.Mod(k - q, param(2)),
    "absolute": sympy.Abs(q - k),
    "largest": sympy.Max(q - 20, k, 7),
    "largest of a product": sympy.Max(q * k, k - q, 2**35),
    "least": sympy.Min(q - 20, k, 25),
    "run-time number of 40 bits": param(1) - k,
    "run-time product": param(0) * q * k,
    "chosen": Where(CAUSAL, q * k, -k),
    "chosen in a choice": Where(CAUSAL, Where(ODD, q, k), Where(sympy.Ne(q, 3), 5, -(2**40))),
    "bool": 3 * Load(BOOL, k) - Load(BOOL, q),
    "int8": q + Load(SIGNED_BYTE, k),
    "int16": q + Load(SHORT, k),
    "uint8": q - Load(BYTE, k),
    "int32": Load(INT, k) + k + 2**31 - 1,
    "int32 of a row": Load(INT, q) - q,
    "int64": Load(LONG, k) - Load(LONG, q),
    "int32 times position": Load(SLOPES, h) * (q - k),
    "int32 times int32": Load(SLOPES, 1) * Load(SLOPES, h),
    "absolute int32": sympy.Abs(Load(INT, k)),
    "remainder of int64": sympy.Mod(Load(LONG, k), 2**35 + 1),
    "floor of int64": fraction(Load(LIMITS, k), 41),
    "floor by int32": fraction(q * k, Load(SLOPES, 3)),
    "nested": Load(LONG, Load(PLACES, k)),
    "nested by row": Load(INT, Load(PLACES, q) + 1) - k,
    "nested by both": Load(LONG, Load(PLACES, k) + Load(PLACES, q)),
    "nested in a choice": Where(ODD, Load(LONG, Load(PLACES, k)), Load(INT, q)),
}
CONDITIONS: dict[str, Any] = {
    "ge": sympy.Ge(q, k + 3),
    "gt": sympy.Gt(q, k + 3),
    "le": sympy.Le(2 * q, k),
    "lt": sympy.Lt(q, 2 * k),
    "eq": sympy.Eq(q, k),
    "ne": sympy.Ne(q, k),
    "and": sympy.And(CAUSAL, ODD, sympy.Lt(q - k, 9)),
    "or": sympy.Or(sympy.Lt(q, k), ODD, sympy.Eq(q, 9)),
    "not": sympy.Not(sympy.And(CAUSAL, ODD)),
    "nested logic": sympy.Or(sympy.And(CAUSAL, ODD), sympy.Not(sympy.Or(CAUSAL, sympy.Ge(k, 9)))),
    "true": sympy.true,
    "bool as condition": sympy.Ne(Load(BOOL, k), 0),
    "two types": sympy.Eq(Load(BYTE, k), Load(SIGNED_BYTE, q) + 100),
    "beyond 32 bits": sympy.Ge(q * k, 2**31 + 500_000),
    "beyond float32's whole numbers": sympy.Ge(Load(LIMITS, k), 41 * q + 2**30),
    "run-time number compared": sympy.Ge(param(1) - k, 0),
    "float and number": sympy.Gt(Load(FLOAT, k), sympy.Float(0.1)),
    "float and float": sympy.Le(Load(HALF, k), Load(BRAIN, q)),
    "float64 below zero": sympy.Lt(Load(DOUBLE, k), 0),
    "score above zero": sympy.Gt(S, 0),
    "chosen and compared": sympy.Ge(Where(sympy.Lt(k, 9), q, q - k), Where(sympy.Ge(q, 9), 9, k)),
}
# Computed in float32.
REAL: dict[str, Any] = {
    "score": S,
    "scaled": S / 3 + sympy.pi,
    "squared": S**2 - 1,
    "powers": S**3 + S**4 / 8,
    "inverse": 1 / (S**2 + 1),
    "inverse of a position": k / (q + 1),
    "half a product": q * k / 2,
    "root of two": sympy.sqrt(2) * S,
    "tanh": 5 * sympy.tanh(S / 5),
    "tanh of large numbers": sympy.tanh(100 * S),
    "tanh of a position": sympy.tanh(k - q),
    "absolute score": sympy.Abs(S),
    "score or zero": sympy.Max(S, 0),
    "largest of three": sympy.Max(S, Load(FLOAT, k), sympy.Float(0.25)),
    "least of three": sympy.Min(S, Load(FLOAT, k), 1),
    "floor of a score": sympy.floor(S),
    "floor of a third": fraction(8 * S, 3),
    "floor of a float": fraction(Load(HALF, k) * 16, 7),
    "infinite": Where(CAUSAL, S, -sympy.oo),
    "large fill": Where(CAUSAL, S, sympy.Float(torch.finfo(torch.float32).min)),
    "whole fill": Where(CAUSAL, S, sympy.Integer(-(10**9))),
    "small number": S * sympy.Float(1e-30),
    "slope": S + (k - q) * Load(HEADS, h),
    "float32": S + Load(FLOAT, k),
    "bfloat16": S * Load(BRAIN, k),
    "float16": S - Load(HALF, q),
    "float64 of both": S + Load(DOUBLE, k) * Load(DOUBLE, q),
    "scalar": S + Load(SCALAR),
    "chosen load": Where(sympy.Lt(k, q), Load(FLOAT, k), Load(FLOAT, q)),
    "int64 and float": S + Load(BOOL, k) * Load(HEADS, h),
}
# Whose tables are of few rows and keys.
TABLES: dict[str, Any] = {
    "table": S + Load(TABLE, 3, k),
    "table by column": Load(TABLE, sympy.Min(k, 31), q),
    "table by distance": Load(TABLE, h, sympy.Abs(k - q)),
    "nested in a table": Load(TABLE, Load(PLACES, k), q),
    "nested twice": Load(TABLE, Load(PLACES, Load(PLACES, q)), k),
    "all axes": Load(ALL, b, h, q, k),
    "some axes": Load(ALL, 0, h, 0, k) * Load(ALL, b, 0, q, 0),
    "swapped": Load(ALL, b, 3, k, q),
}

FORMS = {**WHOLE, **CONDITIONS, **REAL, **TABLES}
assert len(FORMS) == len(WHOLE) + len(CONDITIONS) + len(REAL) + len(TABLES), "names are shared"


def products() -> torch.Tensor:
    return torch.randn(SQUARE, SQUARE, generator=torch.Generator().manual_seed(1)) * 3


def expected(form: Any, first: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The same by kernels/evaluate.py."""
    at = torch.arange(first, first + SQUARE)
    values = {b: torch.tensor(BATCH_ITEM), h: torch.tensor(HEAD), q: at[:, None], k: at}
    values |= {S: products().to(dtype), M: torch.tensor(ROWS), N: torch.tensor(COLUMNS)}
    # What they read as: torch's own bytes have no 256, and its booleans no difference.
    read = [o.to(dtype) if o.is_floating_point() else o.long() for o in operands()]
    found = torch.as_tensor(evaluate_dense(form, values, read, PARAMS, partial=True))
    return found.expand(SQUARE, SQUARE)


Compute = Callable[[Any, int], torch.Tensor]


def assert_form_is_right(name: str, first: int, compute: Compute) -> None:
    """What a language makes of a form, in float64, beside kernels/evaluate.py.

    Whole numbers and conditions exactly, others with the error of float32.
    """
    form = FORMS[name]
    ours, exact = compute(form, first), expected(form, first)
    if name in WHOLE or name in CONDITIONS:
        assert not exact.is_floating_point()
        assert torch.equal(ours, exact.double())
        return
    eager = expected(form, first, torch.float32).double()
    finite = exact.isfinite()
    assert torch.equal(ours[~finite], exact[~finite])
    eps = torch.finfo(torch.float32).eps
    error = (ours - exact)[finite].abs()
    yardstick = (eager - exact)[finite].abs().max()
    assert bool((error <= 2 * yardstick + 4 * eps * exact[finite].abs()).all())
