"""The generated Triton kernels, backward, in Triton's interpreter, against autograd in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import sympy
import torch
from check import assert_as_accurate
from specs import SPECS, problem_of, random_inputs

from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.triton.launch import Tiles, forward
from adaattn_compiler.kernels.triton.launch_backward import (
    BackwardTiles,
    backward,
    backward_tables,
    gradient_refusal,
)
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.kernels.triton.tables import BlockTable
from adaattn_compiler.spec import (
    AttentionSpec,
    EmptyRow,
    Load,
    M,
    OperandSpec,
    S,
    Where,
    b,
    h,
    k,
    param,
    q,
)

CAUSAL = sympy.Ge(q - k, 0)
SMALL = BackwardTiles(Tiles(64, 32), Tiles(32, 64), Tiles(32, 32))
SQUARE = BackwardTiles(Tiles(64, 64), Tiles(64, 64), Tiles(64, 64))
Tensors = list[torch.Tensor]


def ours(
    spec: AttentionSpec,
    grad_out: torch.Tensor,
    qkv: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    tiles: BackwardTiles = SMALL,
    *,
    listed: bool = True,
) -> Tensors:
    """The gradients of q, k, v and of all float operands, from the forward kernel's statistics."""
    made_for = Configuration(spec, tuple(str(o.dtype).removeprefix("torch.") for o in operands))
    statistics = torch.full((*qkv[0].shape[:3], 2), float("nan"))
    out = forward(made_for, *qkv, operands, params, tiles=Tiles(64, 64), statistics=statistics)
    wanted = [operand.is_floating_point() for operand in operands]
    sizes = (qkv[0].shape[2], qkv[1].shape[2])
    table, key_table = backward_tables(spec, *sizes, tiles, params) if listed else (None, None)
    given = (grad_out, *qkv, out, statistics, operands, params, wanted)
    return backward(made_for, *given, tiles=tiles, table=table, key_table=key_table)


def written_out(
    spec: AttentionSpec,
    grad_out: torch.Tensor,
    qkv: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    dtype: torch.dtype,
) -> Tensors:
    """The same by autograd through the oracle in a dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in qkv]
    extra = [o.detach().to(wide).requires_grad_() if o.is_floating_point() else o for o in operands]
    out = reference_attention(*inputs, extra, params, spec)
    wanted = [*inputs, *(operand for operand in extra if operand.is_floating_point())]
    found = torch.autograd.grad(out, wanted, grad_out.to(out.dtype), allow_unused=True)
    return [
        torch.zeros_like(tensor) if grad is None else grad
        for grad, tensor in zip(found, wanted, strict=True)
    ]


def inputs_of(problem: Problem, seed: int = 0) -> tuple[torch.Tensor, Tensors, Tensors]:
    """(gradient of the output, [q, k, v], operands)"""
    tensors, operands = random_inputs(problem, seed)
    shape = (*tensors[0].shape[:3], tensors[2].shape[3])
    generator = torch.Generator().manual_seed(seed + 1)
    grad_out = torch.randn(shape, generator=generator).to(problem.dtype)
    return grad_out, tensors, operands


def assert_gradients_are_right(
    problem: Problem, tiles: BackwardTiles = SMALL, slack: float = 0.0
) -> None:
    grad_out, qkv, operands = inputs_of(problem)
    given = (problem.spec, grad_out, qkv, operands, problem.param_hints)
    found = zip(
        ours(*given, tiles),
        written_out(*given, problem.dtype),
        written_out(*given, torch.float64),
        strict=True,
    )
    for mine, eager, exact in found:
        assert_as_accurate(mine, eager + slack, exact)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SPECS if gradient_refusal(SPECS[name][0]) is None),
        *((name, torch.float16) for name in ("gqa", "alibi", "sink")),
    ],
    ids=str,
)
def test_gradients_are_as_accurate_as_eager(name: str, dtype: torch.dtype) -> None:
    assert_gradients_are_right(problem_of(name, dtype), SQUARE)


P0 = param(0)
LENGTH = 37

# A way to read operands -> (score, sink, their shapes for B2 H2 and LENGTH rows and keys).
READ = {
    "dense, of all heads": (S + Load(0, b, q, k), None, [(2, 37, 37)]),
    "dense, of all": (S + Load(0, q, k), None, [(37, 37)]),
    "dense, straight and transposed": (
        S + Load(0, h, q, k) + Load(0, h, k, q),
        None,
        [(2, 37, 37)],
    ),
    "dense, moved": (S + Load(0, 1, k, q + P0, h), None, [(3, 37, 50, 2)]),
    "dense, turned": (S + Load(0, h, M - 1 - q, k), None, [(2, 37, 37)]),
    "dense, a choice": (
        S + Where(sympy.Ge(k - 7, 0), Load(0, h, q, k - 7), Load(1, h)),
        None,
        [(2, 37, 30), (2,)],
    ),
    "distance, of all": (S + Load(0, k - q + M - 1), None, [(73,)]),
    "distance, backwards": (S + Load(0, q - k + P0 + 35, b), None, [(90, 2)]),
    "distance, a choice": (
        S + Where(sympy.Ge(q - k, 0), Load(0, h, q - k), sympy.Integer(0)),
        None,
        [(2, 37)],
    ),
    "key": (S + Load(0, b, k), None, [(2, 37)]),
    "key of the head": (S + Load(0, h, k + P0), None, [(2, 43)]),
    "key, a choice": (
        S + Where(sympy.Ge(k - 2, 0), Load(0, h, k - 2), Load(1, h)),
        None,
        [(2, 35), (2,)],
    ),
    "row": (S * Load(0, b, q), None, [(2, 37)]),
    "factor": (S * Load(0, h) + Load(0, h), None, [(2,)]),
    "one number": (5 * sympy.tanh(S * Load(0, 0)), None, [(1,)]),
    "several": (S * Load(0, h) + Load(1, b, k) + Load(2, k - q + M), None, [(2,), (2, 37), (80,)]),
    "sink of rows": (S, Load(0, h, q) + Load(1, h), [(2, 37), (2,)]),
    "sink and score": (S * Load(0, h), 2 * Load(0, h), [(2,)]),
}


def reading(name: str) -> Problem:
    score, sink, shapes = READ[name]
    group = 2 if name in ("key of the head", "dense, of all heads", "distance, of all") else 1
    spec = AttentionSpec(
        0.3,
        score,
        CAUSAL if "choice" in name else sympy.true,
        sink=sink,
        group=group,
        operands=tuple(OperandSpec("float", len(shape)) for shape in shapes),
        params=int(score.has(P0)),
    )
    problem = problem_of("plain", rows=LENGTH, columns=LENGTH)
    return dataclasses.replace(
        problem,
        spec=spec,
        shape=dataclasses.replace(problem.shape, heads=2, kv_heads=2 // group),
        operand_shapes=tuple(shapes),
        param_hints=(5,) * spec.params,
    )


@pytest.mark.parametrize("name", READ)
def test_operands_receive_their_gradient_wherever_they_are_read(name: str) -> None:
    assert_gradients_are_right(reading(name))


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "rows", "columns"),
    [(16, 16, 1, 1), (40, 24, 33, 65), (72, 128, 31, 64), (33, 7, 70, 3)],
)
def test_any_dimensions_and_lengths_are_right(
    head_dim: int, value_dim: int, rows: int, columns: int
) -> None:
    problem = problem_of("last rows", rows=rows, columns=columns)
    shape = dataclasses.replace(problem.shape, head_dim=head_dim, value_dim=value_dim)
    # Rows before the first key have none.
    spec = dataclasses.replace(problem.spec, empty_row=EmptyRow.ZERO)
    problem = dataclasses.replace(problem, shape=shape, spec=spec)
    # A row of one key: eager's gradient of its score cancels to the last bit, ours to a rounding.
    assert_gradients_are_right(problem, slack=1e-6 if columns < 4 else 0.0)


@pytest.mark.parametrize("empty", [(0, 90), (90, 0)])
def test_nothing_has_no_gradient(empty: tuple[int, int]) -> None:
    problem = problem_of("sink of masked rows", rows=empty[0], columns=empty[1])
    grad_out, qkv, operands = inputs_of(problem)
    found = ours(problem.spec, grad_out, qkv, operands, ())
    for grad, like in zip(found, [*qkv, *operands], strict=True):
        assert grad.shape == like.shape
        assert not grad.any()


def test_rows_without_a_key_have_no_gradient() -> None:
    spec = AttentionSpec(0.3, mask=sympy.Ge(q - k - 10, 0), empty_row=EmptyRow.ZERO)
    problem = dataclasses.replace(problem_of("plain", rows=40, columns=40), spec=spec)
    grad_out, qkv, _ = inputs_of(problem)
    grad_q = ours(spec, grad_out, qkv, [], ())[0]
    assert not grad_q[:, :, :10].any()
    assert grad_q[:, :, 11:].all()


def test_strided_inputs_are_read_where_they_lie() -> None:
    problem = problem_of("gqa", rows=40, columns=40)
    grad_out, qkv, _ = inputs_of(problem)
    found = ours(problem.spec, grad_out, qkv, [], ())
    wide = [torch.cat([t, t], -1).repeat_interleave(2, 2) for t in (grad_out, *qkv)]
    apart = [t[:, :, ::2, :16] for t in wide]
    again = ours(problem.spec, apart[0], apart[1:], [], ())
    turned = [t.mT.contiguous().mT for t in (grad_out, *qkv)]
    once_more = ours(problem.spec, turned[0], turned[1:], [], ())
    for x, y, z in zip(found, again, once_more, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
        assert x.transpose(1, 2).is_contiguous()
    one = grad_out[:, :1, :1, :1].expand(grad_out.shape)
    same = ours(problem.spec, one.contiguous(), qkv, [], ())
    for x, y in zip(ours(problem.spec, one, qkv, [], ()), same, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("where", ["grad_out", "q", "k", "v"])
def test_nan_comes_through(where: str) -> None:
    problem = problem_of("plain", rows=40, columns=40)
    grad_out, qkv, _ = inputs_of(problem)
    named = dict(zip(("grad_out", "q", "k", "v"), (grad_out, *qkv), strict=True))
    named[where][0, 1, 20, 3] = float("nan")
    given = (problem.spec, grad_out, qkv, [], ())
    for mine, eager in zip(ours(*given), written_out(*given, torch.float32), strict=True):
        assert torch.equal(mine.isnan(), eager.isnan())


@pytest.mark.parametrize("name", ["last rows", "prefix at run time"])
def test_blocks_in_closed_form_are_those_of_tables(name: str) -> None:
    problem = problem_of(name, rows=75)
    grad_out, qkv, operands = inputs_of(problem)
    given = (problem.spec, grad_out, qkv, operands, problem.param_hints)
    for x, y in zip(ours(*given), ours(*given, listed=False), strict=True):
        assert torch.equal(x, y)


def test_gradients_are_the_same_each_time() -> None:
    problem = reading("several")
    grad_out, qkv, operands = inputs_of(problem)
    given = (problem.spec, grad_out, qkv, operands, problem.param_hints)
    for x, y in zip(ours(*given), ours(*given), strict=True):
        assert torch.equal(x, y)


def test_only_what_is_wanted_is_returned() -> None:
    problem = reading("several")
    grad_out, qkv, operands = inputs_of(problem)
    made_for = Configuration(problem.spec, ("float32",) * 3)
    statistics = torch.empty(*qkv[0].shape[:3], 2)
    out = forward(made_for, *qkv, operands, statistics=statistics)
    given = (made_for, grad_out, *qkv, out, statistics, operands, ())
    every = backward(*given, [True] * 3, tiles=SMALL)
    some = backward(*given, [False, True, False], tiles=SMALL)
    assert len(some) == 4
    assert torch.equal(some[3], every[4])
    assert len(backward(*given, [False] * 3, tiles=SMALL)) == 3


def test_tables_of_each_head_are_followed() -> None:
    """Half of the heads leave blocks out, by tables alone."""
    problem = problem_of("plain", rows=64, columns=64)
    spec = problem.spec
    grad_out, qkv, _ = inputs_of(problem)
    chunks = AttentionSpec(0.3, mask=sympy.Ge(sympy.floor(q / 32) - sympy.floor(k / 32), 0))
    square = BackwardTiles(Tiles(32, 32), Tiles(32, 32), Tiles(32, 32))
    pairs = [backward_tables(each, 64, 64, square) for each in (chunks, AttentionSpec(0.3))]
    table, keys = (_of_heads([pair[side] for pair in pairs]) for side in (0, 1))
    statistics = torch.empty(2, 4, 64, 2)
    made_for = Configuration(spec)
    out = forward(made_for, *qkv, [], tiles=Tiles(32, 32), statistics=statistics, table=table)
    given = (made_for, grad_out, *qkv, out, statistics, [])
    found = backward(*given, tiles=square, table=table, key_table=keys)
    mask = sympy.Or(chunks.mask, sympy.Ge(h - 2, 0))
    whole = dataclasses.replace(spec, mask=mask)
    eager, exact = (
        written_out(whole, grad_out, qkv, [], (), dtype) for dtype in (torch.float32, torch.float64)
    )
    for mine, same, truth in zip(found, eager, exact, strict=True):
        assert_as_accurate(mine, same, truth)


def _of_heads(tables: Sequence[BlockTable]) -> BlockTable:
    """Of two heads as the first table has it, and of two as the second; all blocks listed."""
    full, cut = [], []
    for table in tables:
        for _ in range(2):
            rows = table.table[0, 0].tolist()
            full.append([list(range(row[0], row[0] + row[1])) for row in rows])
            cut.append([table.blocks[row[2] : row[2] + row[3]].tolist() for row in rows])
    blocks: list[int] = []
    lines = []
    for full_of_head, cut_of_head in zip(full, cut, strict=True):
        for x, y in zip(full_of_head, cut_of_head, strict=True):
            lines.append([len(blocks), len(x), len(blocks) + len(x), len(y)])
            blocks += [*x, *y]
    shape = (1, len(full), len(full[0]), 4)
    table = torch.tensor(lines, dtype=torch.int32).reshape(shape)
    return BlockTable(table, torch.tensor(blocks, dtype=torch.int32), full_run=False)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (S + Load(0, h, sympy.floor(k / 2)), "operand 0 read at (h, floor(k/2))"),
        (S + Load(0, h, sympy.Mod(q, 4)), "operand 0 read at (h, Mod(q, 4))"),
        (S + Load(0, h, q + k), "operand 0 read at (h, k + q)"),
        (S + Load(0, h, 2 * k), "operand 0 read at (h, 2*k)"),
        (S + Load(0, k, k - q), "operand 0 read at (k, k - q)"),
        (S + Load(0, sympy.floor(h / 2), k), "operand 0 read at (floor(h/2), k)"),
        (S + Load(0, h, Load(1, b, k)), "operand 0 read at (h, Load(1, b, k))"),
        (sympy.Max(S, 0) + Load(0, h, k), "no derivative of Max"),
        (1 / S + Load(0, h, k), "no Triton of S**(-2)"),
    ],
    ids=str,
)
def test_what_has_no_kernel_is_refused(score: sympy.Expr, reason: str) -> None:
    spec = AttentionSpec(0.3, score, operands=(OperandSpec("float", 2), OperandSpec("int", 2)))
    assert reason in (gradient_refusal(spec) or "")
    if "operand" in reason:
        assert gradient_refusal(spec, [False, False]) is None


def test_rows_filled_with_a_number_and_dropout_are_refused() -> None:
    assert "row without a key" in (gradient_refusal(SPECS["causal padding uniform"][0]) or "")
    assert gradient_refusal(AttentionSpec(0.3, dropout_p=0.1)) == "no dropout"
