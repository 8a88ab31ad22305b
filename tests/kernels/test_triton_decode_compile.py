"""Triton for few rows, row statistics and flagged heads, compiled for GPUs not at hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from specs import SPECS
from torch.fx.experimental.proxy_tensor import make_fx

from adaattn_compiler.kernels.triton.compile import Compiled, compiled_decode, compiled_forward
from adaattn_compiler.kernels.triton.launch import (
    Products,
    Tiles,
    forward,
    fused_entropy_estimate,
)
from adaattn_compiler.kernels.triton.launch_decode import decode, tiles_for_few_rows
from adaattn_compiler.kernels.triton.source import Configuration, decode_source, forward_source

pytest.importorskip("triton")

# Bytes of shared memory that a program may have, with which two fit into a multiprocessor.
HALF_SHARED = {80: 82 * 1024, 90: 114 * 1024}
USUAL = {"bool": "bool", "int": "int64", "float": "float32"}


def configured(name: str) -> Configuration:
    spec = SPECS[name][0]
    return Configuration(spec, tuple(USUAL[operand.kind] for operand in spec.operands))


def uses_tensor_cores(compiled: Compiled) -> bool:
    return "wgmma.mma_async" in compiled.ptx or "mma.sync" in compiled.ptx


@pytest.mark.parametrize(
    ("name", "capability", "pairs", "head_dim"),
    [
        ("gqa", 80, 8, 128),
        ("gqa", 90, 4, 128),
        ("gqa", 90, 64, 128),
        ("gqa", 80, 32, 256),
        ("sink", 90, 8, 64),
        ("causal padding uniform", 80, 16, 64),
        ("causal distance", 90, 8, 128),
        ("softcap", 90, 8, 128),
    ],
)
def test_few_rows_compile_without_spills(
    name: str, capability: int, pairs: int, head_dim: int
) -> None:
    tiles = tiles_for_few_rows(pairs, head_dim, 2)
    dims = (head_dim, head_dim)
    attends, combines = compiled_decode(
        configured(name), "bfloat16", dims, tiles, capability, split=True
    )
    assert attends.spills == combines.spills == 0
    assert uses_tensor_cores(attends)
    # 64 rows of a tile are many; programs of fewer must not be alone on a multiprocessor.
    alone = 1 if tiles.rows < 64 else 2
    assert attends.shared_memory <= alone * HALF_SHARED[capability]
    assert combines.shared_memory <= 4096


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_few_rows_of_float32_compile_without_spills(head_dim: int) -> None:
    tiles = tiles_for_few_rows(8, head_dim, 4)
    dims = (head_dim, head_dim)
    attends, _ = compiled_decode(configured("gqa"), "float32", dims, tiles, 90, split=False)
    assert attends.spills == 0
    assert attends.shared_memory <= HALF_SHARED[90]


@pytest.mark.parametrize(
    ("capability", "tiles"), [(80, Tiles(128, 32, 8, 3)), (90, Tiles(128, 64, 8, 3))]
)
def test_row_statistics_compile_without_spills(capability: int, tiles: Tiles) -> None:
    causal, dims = configured("causal"), (128, 128)
    wanted = {"has_entropy": True, "has_maximum": True, "has_statistics": False}
    beside = compiled_forward(causal, "bfloat16", dims, tiles, capability, **wanted)
    alone = compiled_forward(
        causal, "bfloat16", dims, tiles, capability, has_values=False, **wanted
    )
    assert beside.spills == alone.spills == 0
    assert uses_tensor_cores(alone)
    assert alone.shared_memory < beside.shared_memory  # K and no V


@pytest.mark.parametrize(("capability", "head_dim"), [(80, 64), (90, 128)])
def test_lazy_rescaling_compiles_without_spills(capability: int, head_dim: int) -> None:
    dims, tiles = (head_dim, head_dim), Tiles(128, 64, 8, 2)
    compiled = compiled_forward(
        configured("causal"), "bfloat16", dims, tiles, capability, lazy=True
    )
    assert compiled.spills == 0
    assert uses_tensor_cores(compiled)


@pytest.mark.parametrize("capability", [80, 90])
def test_heads_of_half_precision_take_tensor_cores(capability: int) -> None:
    # The exact heads' products are of ordinary instructions.
    flags = {"has_flags": True, "alternative": Products("bf16", "bf16")}
    tiles, causal = Tiles(32, 16, 4, 2), configured("causal")
    without = compiled_forward(causal, "float32", (32, 32), tiles, capability)
    mixed = compiled_forward(causal, "float32", (32, 32), tiles, capability, **flags)
    assert not uses_tensor_cores(without)
    assert uses_tensor_cores(mixed)
    assert mixed.spills == 0


def test_products_of_one_kernel_may_differ() -> None:
    products = Products("tf32x3", "bf16")
    tiles = Tiles(64, 32, 4, 2)
    compiled = compiled_forward(configured("causal"), "float32", (64, 64), tiles, 80, products)
    assert compiled.spills == 0
    assert ".tf32.tf32" in compiled.ptx
    assert ".bf16.bf16" in compiled.ptx


def test_statistics_are_made_of_the_weights_exponentials() -> None:
    causal, tiles = configured("causal"), Tiles(64, 64, 4, 2)
    plain = compiled_forward(causal, "bfloat16", (64, 64), tiles, 90)
    wanted = compiled_forward(causal, "bfloat16", (64, 64), tiles, 90, has_entropy=True)
    assert wanted.ptx.count("st.global") > plain.ptx.count("st.global")
    assert wanted.ptx.count("ex2.approx") == plain.ptx.count("ex2.approx")


def test_kernels_have_their_names() -> None:
    source = forward_source(configured("causal"))
    for name in ("fused_qk_softmax_av", "fused_entropy_estimate", "fused_mixed_precision"):
        assert source.count(f"def {name}(") == 1
    assert "def fused_decode(" in decode_source(configured("causal"))


LAUNCH = "triton_kernel_wrapper_mutation"


def launches(function: Callable[..., object], *heads_and_lengths: tuple[int, int]) -> int:
    """How many launches torch sees where no size is known."""
    given = [torch.randn(2, heads, length, 16) for heads, length in heads_and_lengths]
    traced = make_fx(function, tracing_mode="symbolic")(*given, torch.randn(4))
    names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert any("sym_size" in name for name in names)
    return names.count(LAUNCH)


def test_torch_sees_launches_whatever_the_sizes() -> None:
    made_for = Configuration(SPECS["sink"][0], ("float32",))

    def few_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> object:
        return decode(made_for, q, k, v, [s], splits=3, keys=(k.shape[2] - 60, k.shape[2]))

    def rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> object:
        return forward(made_for, q, k, v, [s])

    def entropy(q: torch.Tensor, k: torch.Tensor, s: torch.Tensor) -> object:
        return fused_entropy_estimate(made_for, q, k, [s])

    assert launches(few_rows, (4, 3), (2, 90), (2, 90)) == 2
    assert launches(rows, (4, 70), (2, 90), (2, 90)) == 1
    assert launches(entropy, (4, 70), (2, 90)) == 1
