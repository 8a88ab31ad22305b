"""The kernels of head statistics, compiled for GPUs not at hand, and seen by torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from specs import SPECS, problem_of, random_inputs
from torch.fx.experimental.proxy_tensor import make_fx

from adaattn_compiler.kernels.statistics import head_statistics, statistics_of
from adaattn_compiler.kernels.triton.compile import compiled_row_products, compiled_statistics
from adaattn_compiler.kernels.triton.launch_rowproducts import row_products_tiles
from adaattn_compiler.kernels.triton.launch_statistics import (
    row_statistics,
    statistics_refusal,
    statistics_tiles,
)
from adaattn_compiler.kernels.triton.source import Configuration, statistics_source

pytest.importorskip("triton")

# Bytes of shared memory that a program may have, with which four fit into a multiprocessor.
QUARTER_SHARED = {80: 41 * 1024, 90: 57 * 1024}
USUAL = {"bool": "bool", "int": "int64", "float": "float32"}


def configured(name: str) -> Configuration:
    spec = SPECS[name][0]
    return Configuration(spec, tuple(USUAL[operand.kind] for operand in spec.operands))


@pytest.mark.parametrize(
    ("name", "capability", "pairs", "head_dim", "dtype"),
    [
        ("gqa", 80, 64, 128, "bfloat16"),
        ("gqa", 90, 64, 256, "bfloat16"),
        ("sink", 90, 16, 128, "bfloat16"),
        ("dense bias", 80, 32, 128, "float16"),
        ("softcap", 90, 32, 64, "float32"),
    ],
)
def test_statistics_compile_without_spills(
    name: str, capability: int, pairs: int, head_dim: int, dtype: str
) -> None:
    itemsize = 4 if dtype == "float32" else 2
    tiles = statistics_tiles(pairs, head_dim, itemsize)
    scans, samples = compiled_statistics(configured(name), dtype, head_dim, tiles, capability)
    assert scans.spills == samples.spills == 0
    assert ("mma.sync" in scans.ptx) == (itemsize == 2)
    assert scans.shared_memory <= QUARTER_SHARED[capability]
    assert samples.shared_memory <= 4096


@pytest.mark.parametrize(
    ("name", "capability", "head_dim", "dtype"),
    [
        ("gqa", 80, 256, "bfloat16"),
        ("dense bias", 90, 128, "bfloat16"),
        ("dense bias", 80, 128, "float32"),
        ("sink", 90, 128, "float32"),
    ],
)
def test_products_of_rows_compile_without_spills(
    name: str, capability: int, head_dim: int, dtype: str
) -> None:
    tiles = row_products_tiles(head_dim, 4 if dtype == "float32" else 2)
    found = compiled_row_products(configured(name), dtype, head_dim, tiles, capability)
    assert found.spills == 0
    assert "tf32" in found.ptx
    assert found.shared_memory <= 2 * QUARTER_SHARED[capability]


def test_source_is_of_two_kernels_and_what_they_call() -> None:
    source = statistics_source(configured("softcap"))
    assert source.count("\ndef fused_row_statistics(") == 1
    assert source.count("\ndef sampled_scores(") == 1
    assert "fused_qk_softmax_av(" not in source


# What reads a tensor's values on the host, or copies a constant to the device.
WAITS = ("_local_scalar_dense", "aten.item", "nonzero", "lift_fresh", "is_nonzero")


@pytest.mark.parametrize("name", ["sink", "causal padding uniform"])
def test_nothing_waits_for_the_device(name: str) -> None:
    """Two launches and torch functions that need no value on the host, by fake tensors."""
    problem = problem_of(name, rows=640, columns=640)
    if problem.operand_shapes != ((4,),):
        problem = dataclasses.replace(problem, operand_shapes=((2, 640),))
    (q, k, v), operands = random_inputs(problem)

    def statistics(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor
    ) -> object:
        kept = row_statistics(q, k, rest, (), problem.spec, rows=32, turn=1, splits=2)
        return vars(statistics_of(kept, (q, k, v), problem.spec))

    graph = make_fx(statistics, tracing_mode="fake")(q, k, v, *operands).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    names = [str(node.target) for node in nodes]
    assert names.count("triton_kernel_wrapper_mutation") == 2
    assert not [each for each in names if any(wait in each for wait in WAITS)]
    found = [node.meta.get("val") for node in nodes]
    sizes = [each.numel() for each in found if isinstance(each, torch.Tensor)]
    assert max(sizes) < 2 * 4 * 32 * 640, "a tile of scores is in memory"


def test_cpu_tensors_keep_to_torch() -> None:
    problem = problem_of("gqa")
    (q, k, v), operands = random_inputs(problem)
    assert statistics_refusal(q, k, operands, (), problem.spec) == "only on CUDA"
    found = head_statistics(q.double(), k.double(), v.double(), operands, (), problem.spec)
    assert found.entropy.dtype == torch.float64
