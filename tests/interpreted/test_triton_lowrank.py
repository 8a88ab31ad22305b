"""Near keys exactly and far ones by centroids, in one launch, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import sympy
import torch
from check import assert_as_accurate
from specs import CAUSAL, SPECS, oracle, problem_of, random_inputs

from adaattn_compiler.kernels.evaluate import evaluate_dense, positions
from adaattn_compiler.kernels.low_rank import pooling_refusal
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import lowrank_attention
from adaattn_compiler.kernels.triton.launch import Tiles, forward
from adaattn_compiler.kernels.triton.launch_lowrank import (
    FarTable,
    Pooled,
    fused_lowrank_attention,
    near_and_far,
    pooled,
)
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.kernels.triton.tables import BlockTable
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, OperandSpec, Refusal, S, k, q

SMALL = Tiles(16, 16)
LENGTH = 50
Tables = tuple[BlockTable, FarTable]


def problem_named(
    name: str, dtype: torch.dtype = torch.float32, rows: int = LENGTH, columns: int = LENGTH
) -> Problem:
    problem = problem_of(name, dtype, rows=rows, columns=columns)
    shapes = tuple((2, columns) if len(shape) == 2 else shape for shape in problem.operand_shapes)
    return dataclasses.replace(problem, operand_shapes=shapes)


def tables_of(problem: Problem, near_blocks: int | Sequence[int]) -> Tables:
    _, *sizes = problem.shape.hints
    return near_and_far(problem.spec, *sizes, SMALL, near_blocks, problem.param_hints)


def through(problem: Problem, tables: Tables, centroids: int, **switches: object) -> torch.Tensor:
    (q_, k_, v), operands = random_inputs(problem)
    names = tuple(str(o.dtype).removeprefix("torch.") for o in operands)
    given = {"near": tables[0], "far": tables[1], "pooled": pooled(k_, v, SMALL.keys, centroids)}
    made_for = Configuration(problem.spec, names)
    every = {**given, **switches, "tiles": SMALL}
    return fused_lowrank_attention(made_for, q_, k_, v, operands, problem.param_hints, **every)


def listed(problem: Problem, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
    """(near, far), bool [1,H,M,J]: the blocks of keys that tables have for each row."""
    near, far = tables
    _, rows, columns = problem.shape.hints
    heads = near.table.shape[1]
    found = torch.zeros(2, heads, -(-rows // SMALL.rows), -(-columns // SMALL.keys), dtype=bool)
    for head in range(heads):
        for block, (full, full_count, cut, cut_count) in enumerate(near.table[0, head].tolist()):
            run = torch.arange(full, full + full_count)
            found[0, head, block, run if near.full_run else near.blocks[run].long()] = True
            found[0, head, block, near.blocks[cut : cut + cut_count].long()] = True
            first, count = far.table[0, head, block].tolist()
            found[1, head, block, far.blocks[first : first + count].long()] = True
    by_row = found.repeat_interleave(SMALL.rows, 2)[:, :, :rows]
    return by_row[:1], by_row[1:]


def exactly(
    problem: Problem,
    tables: Tables,
    centroids: int | Pooled,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The definition, of the same centroids, in a dtype."""
    tensors, operands = random_inputs(problem)
    means = centroids
    if isinstance(means, int):
        means = pooled(*tensors[1:], SMALL.keys, means)
    near, far = listed(problem, tables)
    near = near.repeat_interleave(SMALL.keys, -1)[..., : problem.shape.hints[2]]
    return lowrank_attention(
        [tensor.to(dtype) for tensor in tensors],
        [tensor.to(dtype) for tensor in (means.k, means.v, means.log_count)],
        [o.to(dtype) if o.is_floating_point() else o for o in operands],
        problem.param_hints,
        problem.spec,
        near,
        far,
    )


def assert_as_defined(problem: Problem, tables: Tables, centroids: int, **switches: object) -> None:
    ours = through(problem, tables, centroids, **switches)
    exact = exactly(problem, tables, centroids, torch.float64)
    assert_as_accurate(ours, exactly(problem, tables, centroids, problem.dtype), exact)


@pytest.mark.parametrize(
    ("name", "dtype", "near_blocks", "centroids"),
    [
        ("plain", torch.float32, 0, 1),
        ("causal", torch.float32, 1, 4),
        ("gqa", torch.float32, 2, 2),
        ("gqa", torch.float16, 2, 2),
        ("window", torch.float16, 1, 8),
        ("softcap", torch.float32, 2, 4),
        ("sink", torch.float32, 1, 2),
        ("sink", torch.float16, 1, 2),
        ("sink of masked rows", torch.float32, 1, 4),
        ("prefix at run time", torch.float32, 1, 4),
    ],
    ids=str,
)
def test_feature_is_as_accurate_as_eager(
    name: str, dtype: torch.dtype, near_blocks: int, centroids: int
) -> None:
    problem = problem_named(name, dtype)
    tables = tables_of(problem, near_blocks)
    assert tables[1].table[..., 1].any()
    assert_as_defined(problem, tables, centroids)


@pytest.mark.parametrize(("rows", "columns"), [(1, 130), (33, 65), (31, 64), (1, 1), (0, 40)])
def test_any_lengths_are_right(rows: int, columns: int) -> None:
    problem = problem_named("last rows", rows=rows, columns=columns)
    assert_as_defined(problem, tables_of(problem, 2), 4)


def test_centroids_are_rescaled_lazily_as_keys_are() -> None:
    problem = problem_named("gqa")
    assert_as_defined(problem, tables_of(problem, 1), 4, lazy=True)


@pytest.mark.parametrize("name", ["padding", "causal padding uniform"])
def test_what_data_masks_is_near(name: str) -> None:
    problem = problem_named(name, rows=20)
    tables = tables_of(problem, 0)
    assert not tables[1].table[..., 1].any()
    made = oracle(problem, torch.float32), oracle(problem, torch.float64)
    assert_as_accurate(through(problem, tables, 1), *made)


@pytest.mark.parametrize("name", ["plain", "sink"])
def test_nothing_far_is_the_forward_kernel(name: str) -> None:
    problem = problem_named(name, rows=20)
    (q_, k_, v), operands = random_inputs(problem)
    tables = tables_of(problem, 100)
    assert not tables[1].table[..., 1].any()
    made_for = Configuration(problem.spec, ("float32",) * len(operands))
    alone = forward(made_for, q_, k_, v, operands, tiles=SMALL, table=tables[0])
    assert torch.equal(through(problem, tables, 2), alone)


@pytest.mark.parametrize("name", ["plain", "sink"])
def test_a_centroid_for_each_key_is_exact_attention(name: str) -> None:
    problem = problem_named(name, rows=20)
    made = oracle(problem, torch.float32), oracle(problem, torch.float64)
    lse = torch.empty(2, 4, 20)
    assert_as_accurate(through(problem, tables_of(problem, 0), SMALL.keys, lse=lse), *made)
    (q_, k_, v), operands = random_inputs(problem)
    wanted = torch.empty(2, 4, 20)
    made_for = Configuration(problem.spec, ("float32",) * len(operands))
    forward(made_for, q_, k_, v, operands, tiles=SMALL, lse=wanted)
    assert torch.allclose(lse, wanted, rtol=1e-6, atol=1e-6)


def test_keys_that_are_alike_lose_nothing() -> None:
    problem = problem_named("last rows", rows=20)
    (q_, k_, v), _ = random_inputs(problem)
    k_, v = (t[:, :, ::4].repeat_interleave(4, 2)[:, :, :LENGTH] for t in (k_, v))
    near, far = tables_of(problem, 1)
    assert far.table[..., 1].any()
    means = pooled(k_, v, SMALL.keys, 4)
    given = {"near": near, "far": far, "pooled": means, "tiles": SMALL}
    ours = fused_lowrank_attention(Configuration(problem.spec), q_, k_, v, [], **given)
    wanted = forward(Configuration(problem.spec), q_, k_, v, [], tiles=SMALL)
    assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6)


def test_heads_are_near_and_far_each_their_own() -> None:
    problem = problem_named("gqa")
    splits = [0, 2, 3, 100]
    tables = tables_of(problem, splits)
    for together, *apart in zip(
        listed(problem, tables),
        *(listed(problem, tables_of(problem, split)) for split in splits),
        strict=True,
    ):
        assert torch.equal(together, torch.cat(apart, 1))
    assert len(set(tables[1].table[0, :, :, 1].sum(-1).tolist())) == 4
    assert_as_defined(problem, tables, 2)


def test_centroids_of_heads_have_weights_of_their_own() -> None:
    problem = problem_named("gqa", rows=20)
    problem = dataclasses.replace(problem, spec=dataclasses.replace(problem.spec, mask=sympy.true))
    (_, k_, v), _ = random_inputs(problem)
    means = pooled(k_, v, SMALL.keys, 2)
    log_count = torch.randn(means.log_count.shape)
    log_count[0, 1, 2, 0] = log_count[1, 0, 3] = float("-inf")
    # Where they lie is another matter.
    parts = (means.k.mT.contiguous().mT, means.v.transpose(1, 2).contiguous().transpose(1, 2))
    weighed, tables = Pooled(*parts, log_count), tables_of(problem, 0)
    exact, eager = (
        exactly(problem, tables, weighed, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate(through(problem, tables, 2, pooled=weighed), eager, exact)


# -- centroids and tables --------------------------------------------------------------------------


@pytest.mark.parametrize("centroids", [1, 4, 16])
@pytest.mark.parametrize("columns", [1, 16, 40, 64])
def test_centroids_are_means_of_runs(centroids: int, columns: int) -> None:
    keys, values = torch.randn(2, 3, columns, 8), torch.randn(2, 3, columns, 5)
    means = pooled(keys, values, 16, centroids)
    assert means.k.shape == (2, 3, -(-columns // 16), centroids, 8)
    assert means.log_count.shape == means.k.shape[:-1]
    for tensor, ours in ((keys, means.k), (values, means.v)):
        runs = tensor.split(16 // centroids, 2)
        wanted = torch.stack([run.mean(2) for run in runs], 2)
        assert torch.allclose(ours.flatten(2, 3)[:, :, : len(runs)], wanted, atol=1e-6)
        assert not ours.flatten(2, 3)[:, :, len(runs) :].any()
        counts = [run.shape[2] for run in runs]
        found = means.log_count[0, 0].flatten().exp().round().tolist()
        assert found == counts + [0] * (len(found) - len(counts))


def test_centroids_of_half_precision_are_summed_in_float32() -> None:
    ones = torch.full((1, 1, 4096, 16), 1.0, dtype=torch.float16)
    ones[:, :, ::2] = 3.0
    means = pooled(ones, ones, 4096, 1)
    assert means.k.dtype == torch.float16
    assert (means.k == 2).all()
    assert means.log_count.dtype == torch.float32


@pytest.mark.parametrize(
    "name", ["plain", "causal", "window", "sink of masked rows", "last rows", "per head"]
)
@pytest.mark.parametrize(("rows", "columns"), [(75, 75), (20, 70), (64, 33)])
def test_near_and_far_are_the_mask(name: str, rows: int, columns: int) -> None:
    problem = problem_named(name, rows=rows, columns=columns)
    values = positions((problem.spec.mask,), torch.empty(0), (1, 4, rows, columns))
    keep = torch.as_tensor(evaluate_dense(problem.spec.mask, values, [], ()))
    keep = keep.expand(1, 4, rows, columns)
    near, far = (
        blocks.repeat_interleave(SMALL.keys, -1)[..., :columns]
        for blocks in listed(problem, tables_of(problem, [0, 1, 2, 100]))
    )
    assert not (near & far).any()
    assert (far <= keep).all()
    assert (keep <= near | far).all()
    assert not far[:, 3].any()
    counts = near.sum((0, 2, 3)).tolist()
    assert counts == sorted(counts)


def test_near_whole_blocks_are_those_beside_the_rows() -> None:
    problem = problem_named("last rows", rows=16, columns=80)
    near, _ = listed(problem, tables_of(problem, [0, 1, 2]))
    assert near[0, :, 0].tolist() == [[False] * 4 + [True]] * 2 + [[False] * 3 + [True] * 2]
    above = AttentionSpec(0.3, mask=sympy.Ge(q - k, 0))  # rows stand at the first keys
    beside = dataclasses.replace(problem, spec=above)
    near, far = listed(beside, near_and_far(above, 16, 80, SMALL, 1))
    assert near[0, 0, 0].tolist() == [True] + [False] * 4
    assert not far.any()


# -- refusals --------------------------------------------------------------------------------------

ALLOWED = ["plain", "causal", "gqa", "padding", "softcap", "sink", "window", "per head"]
REFUSED = ["alibi", "distance", "dense bias", "finite fill"]


def test_scores_of_the_product_alone_can_be_pooled() -> None:
    assert [pooling_refusal(SPECS[name][0]) for name in ALLOWED] == [None] * len(ALLOWED)


@pytest.mark.parametrize("name", REFUSED)
def test_scores_that_read_positions_are_refused(name: str) -> None:
    problem = problem_of(name)
    tensors, operands = random_inputs(problem)
    reason = pooling_refusal(problem.spec)
    assert reason is not None
    assert "the product alone" in reason
    near, far = near_and_far(AttentionSpec(0.3), 90, 90, SMALL, 1)
    given = {"near": near, "far": far, "pooled": pooled(*tensors[1:], 16, 2), "tiles": SMALL}
    with pytest.raises(Refusal, match="the product alone"):
        fused_lowrank_attention(
            Configuration(problem.spec, ("float32",)), *tensors, operands, **given
        )


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        (AttentionSpec(0.3, dropout_p=0.1), "dropout"),
        (AttentionSpec(0.3, S + Load(0), operands=(OperandSpec("float", 0),)), "the product alone"),
        (AttentionSpec(0.3, mask=CAUSAL, sink=k, empty_row=EmptyRow.ZERO), "the sink"),
    ],
    ids=["dropout", "a number of data", "sink of keys"],
)
def test_near_misses_are_refused(spec: AttentionSpec, part: str) -> None:
    assert part in (pooling_refusal(spec) or "")


@pytest.mark.parametrize("centroids", [0, 3, 32])
def test_centroids_must_divide_blocks(centroids: int) -> None:
    with pytest.raises(ValueError, match="centroids"):
        pooled(torch.randn(1, 1, 32, 8), torch.randn(1, 1, 32, 8), 16, centroids)


@pytest.mark.parametrize(("block_keys", "centroids"), [(32, 2), (32, 32)])
def test_centroids_of_other_tiles_are_refused(block_keys: int, centroids: int) -> None:
    problem = problem_named("plain")
    (_, k_, v), _ = random_inputs(problem)
    means = pooled(k_, v, block_keys, centroids)
    with pytest.raises(ValueError, match="centroids"):
        through(problem, tables_of(problem, 1), 2, pooled=means)
