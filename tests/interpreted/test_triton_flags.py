"""Heads that go another way inside one launch of a generated kernel, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import sympy
import torch
from check import assert_as_accurate
from specs import oracle, problem_of, random_inputs

from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import reference_attention
from adaattn_compiler.kernels.triton.launch import Alternative, Products, Tiles, forward
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.kernels.triton.tables import BlockTable, block_table
from adaattn_compiler.spec import AttentionSpec, k

SMALL = Tiles(16, 16)
ROWS, COLUMNS = 20, 50
EXACT, HALVES = Products(), Products("fp16", "fp16")
FLAGS = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0]], dtype=torch.int32)


def problem_named(name: str) -> Problem:
    problem = problem_of(name, rows=ROWS, columns=COLUMNS)
    shapes = tuple((2, COLUMNS) if len(shape) == 2 else shape for shape in problem.operand_shapes)
    return dataclasses.replace(problem, operand_shapes=shapes)


def through(
    problem: Problem, alternative: Alternative | None, precision: Products = EXACT
) -> torch.Tensor:
    tensors, operands = random_inputs(problem)
    names = tuple(str(o.dtype).removeprefix("torch.") for o in operands)
    made_for = Configuration(problem.spec, names)
    given = {"tiles": SMALL, "precision": precision, "alternative": alternative}
    return forward(made_for, *tensors, operands, problem.param_hints, **given)


def assert_heads_go_their_way(ours: torch.Tensor, flags: torch.Tensor, problem: Problem) -> None:
    """Those of flag 0 exactly as without flags; those of 1 as if everything had been rounded."""
    other = (flags != 0).expand(2, 4)
    exact = through(problem, None)
    assert torch.equal(ours[~other], exact[~other])
    assert not torch.equal(ours[other], exact[other])
    halves = dataclasses.replace(problem, dtype=torch.float16)
    eager, right = oracle(halves, torch.float16).float(), oracle(problem, torch.float64)
    assert_as_accurate(ours[other], eager[other], right[other])


@pytest.mark.parametrize("name", ["sink", "causal padding uniform", "softcap"])
def test_products_of_half_precision_are_for_flagged_heads_alone(name: str) -> None:
    problem = problem_named(name)
    assert_heads_go_their_way(through(problem, Alternative(FLAGS, None, HALVES)), FLAGS, problem)


@pytest.mark.parametrize("flags", [FLAGS[:1], FLAGS[:, :1], 5 * FLAGS[1:, :1]])
def test_flags_may_be_shared(flags: torch.Tensor) -> None:
    problem = problem_named("gqa")
    ours = through(problem, Alternative(flags, None, HALVES))
    other = (flags != 0).expand(2, 4)
    assert torch.equal(ours[other], through(problem, None, HALVES)[other])
    assert torch.equal(ours[~other], through(problem, None)[~other])


def test_no_flag_is_no_alternative() -> None:
    problem = problem_named("sink")
    ours = through(problem, Alternative(torch.zeros_like(FLAGS), None, HALVES))
    assert torch.equal(ours, through(problem, None))


@pytest.mark.parametrize("products", [Products("fp16", "ieee"), Products("ieee", "fp16")])
def test_each_product_has_a_precision_of_its_own(products: Products) -> None:
    problem = problem_named("gqa")
    ours = through(problem, None, products)
    half = [products.qk == "fp16", products.qk == "fp16", products.pv == "fp16"]
    tensors = [
        tensor.half().float() if rounded else tensor
        for tensor, rounded in zip(random_inputs(problem)[0], half, strict=True)
    ]
    exact = reference_attention(*(t.double() for t in tensors), [], (), problem.spec)
    if products.pv == "ieee":
        eager = reference_attention(*tensors, [], (), problem.spec)
    else:  # weights are rounded, too
        halves = [tensor.half() for tensor in tensors]
        eager = reference_attention(*halves, [], (), problem.spec).float()
    assert_as_accurate(ours, eager, exact)
    assert not torch.equal(ours, through(problem, None))


# -- other blocks ----------------------------------------------------------------------------------


def table_for(mask: object) -> BlockTable:
    structure = block_structure(mask, ROWS, COLUMNS, SMALL.rows, SMALL.keys)
    return block_table(structure, ragged=True)


def only(mask: object, problem: Problem) -> Problem:
    spec = dataclasses.replace(problem.spec, mask=sympy.And(problem.spec.mask, mask))
    return dataclasses.replace(problem, spec=spec)


# In blocks of 16: a run of full ones, full ones that do not follow each other, cut ones.
BLOCKS = {
    "first": sympy.Lt(k, 32),
    "every other": sympy.Eq(sympy.Mod(sympy.floor(k / 16), 2), 0),
}


@pytest.mark.parametrize(("name", "products"), [("first", None), ("every other", HALVES)])
def test_flagged_heads_take_other_blocks(name: str, products: Products | None) -> None:
    problem = dataclasses.replace(problem_named("plain"), spec=AttentionSpec(0.3))
    table = table_for(BLOCKS[name])
    assert table.full_run == (name == "first")
    ours = through(problem, Alternative(FLAGS, table, products))
    other = FLAGS != 0
    apart = through(only(BLOCKS[name], problem), None, products or EXACT)
    assert torch.equal(ours[~other], through(problem, None)[~other])
    assert torch.allclose(ours[other], apart[other], rtol=1e-6, atol=1e-6)


def test_heads_have_other_blocks_each() -> None:
    problem = dataclasses.replace(problem_named("plain"), spec=AttentionSpec(0.3))
    tables = [table_for(sympy.Lt(k, 16 * (1 + i))) for i in range(3)]
    table = torch.cat([tables[i].table for i in (0, 1, 2, 0)], 1)  # [1,H, blocks of rows, 4]
    other = Alternative(FLAGS, BlockTable(table, tables[0].blocks, True))
    ours = through(problem, other)
    ways = [through(only(sympy.Lt(k, 16 * (1 + i)), problem), None) for i in range(3)]
    exact = through(problem, None)
    for item, head in itertools.product(range(2), range(4)):
        way = ways[head % 3] if FLAGS[item, head] else exact
        assert torch.allclose(ours[item, head], way[item, head], rtol=1e-6, atol=1e-6)
