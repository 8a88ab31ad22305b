"""Expressions as C++: what they compute beside kernels/evaluate.py, what is refused, the text."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sympy
import torch
from check import assert_as_accurate

from adaattn_compiler.kernels.cpu.expressions import ELEMENTS, NoCpp, Row, sizes_of
from adaattn_compiler.kernels.cpu.kernel import CppKernel
from adaattn_compiler.kernels.cpu.library import library
from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.evaluate import evaluate_dense
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.spec import (
    AttentionSpec,
    EmptyRow,
    Load,
    M,
    N,
    OperandSpec,
    S,
    Where,
    b,
    h,
    k,
    param,
    q,
)

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
    "bool": sympy.Ne(Load(BOOL, k), 0),
    "two types": sympy.Eq(Load(BYTE, k), Load(SIGNED_BYTE, q) + 100),
    "beyond 32 bits": sympy.Ge(q * k, 2**31 + 500_000),
    "beyond float32's whole numbers": sympy.Ge(Load(LIMITS, k), 41 * q + 2**30),
    "run-time number of 40 bits": sympy.Ge(param(1) - k, 0),
    "float and number": sympy.Gt(Load(FLOAT, k), sympy.Float(0.1)),
    "float and float": sympy.Le(Load(HALF, k), Load(BRAIN, q)),
    "float64": sympy.Lt(Load(DOUBLE, k), 0),
    "score": sympy.Gt(S, 0),
    "chosen": sympy.Ge(Where(sympy.Lt(k, 9), q, q - k), Where(sympy.Ge(q, 9), 9, k)),
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
    "absolute": sympy.Abs(S),
    "largest": sympy.Max(S, 0),
    "largest of three": sympy.Max(S, Load(FLOAT, k), sympy.Float(0.25)),
    "least": sympy.Min(S, Load(FLOAT, k), 1),
    "floor": sympy.floor(S),
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
    "float64": S + Load(DOUBLE, k) * Load(DOUBLE, q),
    "scalar": S + Load(SCALAR),
    "chosen load": Where(sympy.Lt(k, q), Load(FLOAT, k), Load(FLOAT, q)),
    "int64 and float": S + Load(BOOL, k) * Load(HEADS, h),
}
# Whose tables are of few rows and keys.
TABLES: dict[str, Any] = {
    "table": S + Load(TABLE, 3, k),
    "table by column": Load(TABLE, sympy.Min(k, 31), q),
    "table by distance": Load(TABLE, h, sympy.Abs(k - q)),
    "nested": Load(TABLE, Load(PLACES, k), q),
    "nested twice": Load(TABLE, Load(PLACES, Load(PLACES, q)), k),
    "all axes": Load(ALL, b, h, q, k),
    "some axes": Load(ALL, 0, h, 0, k) * Load(ALL, b, 0, q, 0),
    "swapped": Load(ALL, b, 3, k, q),
}


def source_of_forms(forms: Sequence[Any], elements: Sequence[str]) -> str:
    """A function for each form, which computes it for a square of rows and keys."""
    parts = ['#include "expressions.h"']
    for number, form in enumerate(forms):
        row = Row(elements)
        text = row.printed(form)
        lines = "\n    ".join(row.statements)
        sizes = "\n  ".join(sizes_of(len(PARAMS), form))
        parts.append(f"""
extern "C" void form_{number}(const Operand* operands, const int64_t* params, int first_row,
                              int first_key, const float* products, double* out) {{
  Call call{{}};
  call.operands = operands, call.params = params;
  call.rows = {ROWS}, call.columns = {COLUMNS};
  const int b = {BATCH_ITEM}, h = {HEAD};
  {sizes}
  for (int q = first_row; q < first_row + {SQUARE}; ++q) {{
    {lines}
    for (int k = first_key; k < first_key + {SQUARE}; ++k) {{
      const float S = *products++;
      *out++ = {text};
    }}
  }}
}}""")
    return "\n".join(parts)


@pytest.fixture(scope="module")
def compute() -> Callable[[Any, int], torch.Tensor]:
    """What C++ makes of a form in the square that starts at a row and a key."""
    every = [*WHOLE.values(), *CONDITIONS.values(), *REAL.values(), *TABLES.values()]
    tensors = operands()
    names = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    built = library(source_of_forms(every, [ELEMENTS[name] for name in names]))
    held = [(t.data_ptr(), *(*t.stride(), 0, 0, 0, 0)[:4]) for t in tensors]
    layout = (ctypes.c_int64 * (5 * len(held)))(*(number for one in held for number in one))
    params = (ctypes.c_int64 * len(PARAMS))(*PARAMS)

    def computed(form: Any, first: int) -> torch.Tensor:
        out = torch.empty(SQUARE, SQUARE, dtype=torch.float64)
        given = products()
        function = built[f"form_{every.index(form)}"]
        function(
            layout,
            params,
            first,
            first,
            ctypes.c_void_p(given.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
        )
        return out

    # Alive as long as what reads them.
    computed.tensors = tensors  # type: ignore[attr-defined]
    return computed


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


@pytest.mark.parametrize("first", [SMALL, LARGE])
@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_exact(name: str, first: int, compute: Compute) -> None:
    exact = expected(WHOLE[name], first)
    assert not exact.is_floating_point()
    assert torch.equal(compute(WHOLE[name], first), exact.double())


@pytest.mark.parametrize("first", [SMALL, LARGE])
@pytest.mark.parametrize("name", CONDITIONS)
def test_conditions_are_exact(name: str, first: int, compute: Compute) -> None:
    exact = expected(CONDITIONS[name], first)
    assert exact.dtype == torch.bool
    assert torch.equal(compute(CONDITIONS[name], first), exact.double())


@pytest.mark.parametrize("first", [SMALL, LARGE])
@pytest.mark.parametrize("name", [*REAL, *(f"table: {name}" for name in TABLES)])
def test_real_numbers_are_those_of_float32(name: str, first: int, compute: Compute) -> None:
    if name.startswith("table: "):
        form, first = TABLES[name.removeprefix("table: ")], SMALL
    else:
        form = REAL[name]
    ours, exact = compute(form, first), expected(form, first)
    eager = expected(form, first, torch.float32).double()
    finite = exact.isfinite()
    assert torch.equal(ours[~finite], exact[~finite])
    eps = torch.finfo(torch.float32).eps
    error = (ours - exact)[finite].abs()
    yardstick = (eager - exact)[finite].abs().max()
    assert bool((error <= 2 * yardstick + 4 * eps * exact[finite].abs()).all())


def test_index_is_read_only_where_its_branch_is_taken() -> None:
    # Far outside the tensor, where nothing may be read.
    place = Where(sympy.Ge(q, k), 0, 2**40)
    guarded = Where(sympy.Ge(q, k), Load(0, h, q - k), Load(0, 0, 0))
    chosen = Where(sympy.Ge(q, k), Load(0, h, place), -1)
    spec = AttentionSpec(
        0.5,
        S + guarded + chosen + Where(sympy.Ge(k, 2**30), Load(0, k * 2**30, q), 0),
        operands=(OperandSpec("float", 2),),
    )
    length, heads = 70, 2
    table = torch.randn(heads, length)
    index = torch.arange(length)
    distance = index[:, None] - index
    ours, eager, exact = _attention(
        spec,
        [table],
        lambda dtype: torch.where(
            distance >= 0,
            table[:, distance.clamp(min=0)].to(dtype) + table[:, :1, None].to(dtype),
            table[0, 0].to(dtype) - 1,
        ),
    )
    assert_as_accurate(ours, eager, exact)


def _attention(
    spec: AttentionSpec,
    given: Sequence[torch.Tensor],
    bias: Callable[[torch.dtype], torch.Tensor],
    dtypes: tuple[torch.dtype, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A kernel's result, and eager's in float32 and float64 with a bias [H,M,N] in place of it."""
    qkv = [torch.randn(2, 2, 70, 8) for _ in range(3)]
    shape = Shape(2, 2, 2, 70, 70, 8, 8)
    plan = plan_of(Problem(spec, shape, torch.float32, "cpu", False, operand_dtypes=dtypes))
    ours = cpp_runner(plan)(qkv[0], qkv[1], qkv[2], given, ())
    plain = AttentionSpec(spec.scale, S + Load(0, h, q, k), operands=(OperandSpec("float", 3),))

    def expected(dtype: torch.dtype) -> torch.Tensor:
        wide = [tensor.to(dtype) for tensor in qkv]
        return reference_attention(wide[0], wide[1], wide[2], [bias(dtype)], (), plain)

    return ours, expected(torch.float32), expected(torch.float64)


def test_operands_may_be_of_any_type_and_layout() -> None:
    dtypes = (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
    kinds = ["float" if d.is_floating_point else "int" for d in dtypes]
    spec = AttentionSpec(
        0.5,
        S + sum(Load(i, h, k) / (i + 1) for i in range(len(dtypes))),
        operands=tuple(OperandSpec(kind, 2) for kind in kinds),
    )
    data = [(torch.randn(2, 70) * 3).to(d) for d in dtypes]
    data[0] = torch.rand(2, 70) > 0.5
    data[1] = torch.randint(0, 256, (2, 70), dtype=torch.uint8)

    def bias(dtype: torch.dtype) -> torch.Tensor:
        total = sum(d.to(dtype) / (i + 1) for i, d in enumerate(data))
        return torch.as_tensor(total)[:, None].expand(2, 70, 70)

    layouts: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda tensor: tensor,
        lambda tensor: tensor.t().contiguous().t(),
        lambda tensor: tensor.repeat_interleave(2, 1)[:, ::2],
        lambda tensor: torch.cat([tensor, tensor], 1)[:, 70:],
    ]
    for layout in layouts:
        torch.manual_seed(0)
        assert_as_accurate(*_attention(spec, [layout(d) for d in data], bias, dtypes))


# -- what has no form ------------------------------------------------------------------------------


def refusal(spec: AttentionSpec, *dtypes: torch.dtype) -> str | None:
    shape = Shape(1, 4, 4, 8, 8, 8, 8)
    problem = Problem(spec, shape, torch.float32, "cpu", False, operand_dtypes=dtypes)
    return CppKernel().refusal(problem)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (S + sympy.Float(1e39), "1e\\+39 is beyond float32"),
        (Where(CAUSAL, S, sympy.Float(torch.finfo(torch.float64).min)), "is beyond float32"),
        (Where(CAUSAL, S, -(10**40)), "is beyond float32"),
        (Where(CAUSAL, S, sympy.nan), "nan is beyond float32"),
        (Where(CAUSAL, S, sympy.zoo), "not a real number"),
        (S + sympy.I, "not a real number"),
        (S**5, "S\\*\\*5"),
        (sympy.sqrt(S), "sqrt\\(S\\)"),
        (1 / (1 + sympy.exp(S)), "exp"),
        (sympy.sin(S), "sin"),
        (sympy.Function("unknown")(S), "unknown"),
        (sympy.Mod(S, 2), "not of whole numbers"),
    ],
)
def test_score_without_a_form_is_refused(score: Any, message: str) -> None:
    with pytest.raises(NoCpp, match=message):
        Row([]).printed(score)
    assert refusal(AttentionSpec(1.0, score)) is not None


def test_operand_without_a_form_is_refused() -> None:
    whole, six = OperandSpec("int", 1), OperandSpec("float", 6)
    spec = AttentionSpec(1.0, S + Load(0, k), operands=(whole,))
    for dtype in (torch.uint16, torch.float8_e4m3fn, torch.complex64):
        assert refusal(spec, dtype) == f"no C++ type for {dtype}"
    of_six_axes = AttentionSpec(1.0, S + Load(0, 0, b, h, 0, q, k), operands=(six,))
    assert refusal(of_six_axes) == "an operand of more than 4 axes"


def test_many_operands_have_names_of_their_own() -> None:
    number = 40
    spec = AttentionSpec(
        1.0,
        S + sympy.Add(*(Load(i, h) for i in range(number))),
        operands=(OperandSpec("float", 1),) * number,
    )
    assert refusal(spec) is None
    row = Row(["float"] * number)
    row.printed(spec.score)
    names = [statement.split()[2] for statement in row.statements]
    assert len(set(names)) == number


# -- the text --------------------------------------------------------------------------------------

_SCRIPT = """
import sympy
import torch
from adaattn_compiler.kernels.cpu.runner import configuration_of
from adaattn_compiler.kernels.cpu.source import source_of
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.spec import *
from adaattn_compiler.spec import b, h, k, q

causal, near = sympy.Ge(q - k, 0), sympy.Lt(sympy.Abs(q - k), 9)
same = sympy.Eq(Load(0, b, q), Load(0, b, k))
spec = AttentionSpec(
    0.25,
    S + Load(1, h) * (k - q) + sympy.Max(Load(2, h, k - q + M - 1), sympy.Min(S, q, k, N), 3),
    sympy.Or(sympy.And(causal, near, same, sympy.Ne(Load(0, b, k), 0)), sympy.Not(near | same)),
    EmptyRow.ZERO,
    Load(1, h) + sympy.tanh(Load(3, h)),
    operands=tuple(OperandSpec(*o) for o in (("int", 2), ("float", 1), ("float", 2), ("float", 1))),
)
shape = Shape(1, 4, 4, 8, 8, 8, 8)
for dtype in (torch.float32, torch.bfloat16):
    print(source_of(configuration_of(Problem(spec, shape, dtype, "cpu", False))))
"""


def test_text_is_the_same_in_every_process() -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(_SCRIPT, {})
    assert "attention_forward" in said.getvalue()
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == said.getvalue()


def test_other_specs_are_other_text() -> None:
    from adaattn_compiler.kernels.cpu.source import Configuration, source_of

    base = Configuration(AttentionSpec(0.25), "float32", 8, 8, ())
    others = [
        dataclasses.replace(base, dtype="bfloat16"),
        dataclasses.replace(base, head_dim=16),
        dataclasses.replace(base, value_dim=16),
        *(
            dataclasses.replace(base, spec=dataclasses.replace(base.spec, **changes))
            for changes in (
                {"scale": math.nextafter(0.25, 1)},
                {"score": 2 * S},
                {"mask": CAUSAL},
                {"empty_row": EmptyRow.UNIFORM},
                {"sink": sympy.Integer(0)},
                {"group": 2},
            )
        ),
    ]
    assert len({source_of(made_for) for made_for in (base, *others)}) == 1 + len(others)
