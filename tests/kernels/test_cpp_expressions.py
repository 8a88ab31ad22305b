"""Expressions as C++: what they compute beside kernels/evaluate.py, what is refused, the text."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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
from forms import (
    BATCH_ITEM,
    CAUSAL,
    COLUMNS,
    CONDITIONS,
    FORMS,
    HEAD,
    LARGE,
    PARAMS,
    REAL,
    ROWS,
    SMALL,
    SQUARE,
    TABLES,
    WHOLE,
    Compute,
    assert_form_is_right,
    operands,
    products,
)

from adaattn_compiler.kernels.cpu.expressions import ELEMENTS, Row, sizes_of
from adaattn_compiler.kernels.cpu.kernel import CppKernel
from adaattn_compiler.kernels.cpu.library import library
from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.printing import NoCode
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.spec import (
    AttentionSpec,
    EmptyRow,
    Load,
    OperandSpec,
    S,
    Where,
    b,
    h,
    k,
    q,
)


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
    every = list(FORMS.values())
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


@pytest.mark.parametrize("first", [SMALL, LARGE])
@pytest.mark.parametrize("name", [*WHOLE, *CONDITIONS])
def test_whole_numbers_and_conditions_are_exact(name: str, first: int, compute: Compute) -> None:
    assert_form_is_right(name, first, compute)


@pytest.mark.parametrize("first", [SMALL, LARGE])
@pytest.mark.parametrize("name", REAL)
def test_real_numbers_are_those_of_float32(name: str, first: int, compute: Compute) -> None:
    assert_form_is_right(name, first, compute)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_read_where_they_should(name: str, compute: Compute) -> None:
    assert_form_is_right(name, SMALL, compute)


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
    with pytest.raises(NoCode, match=message):
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
