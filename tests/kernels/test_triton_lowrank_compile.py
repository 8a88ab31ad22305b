"""The near and far field in one kernel, compiled for GPUs not at hand, and seen by torch."""

from __future__ import annotations

import pytest
import torch
from specs import SPECS
from torch.fx.experimental.proxy_tensor import make_fx

from adaattn_compiler.kernels.triton.compile import compiled_lowrank
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.launch_lowrank import (
    FarTable,
    fused_lowrank_attention,
    near_and_far,
    pooled,
)
from adaattn_compiler.kernels.triton.source import Configuration, lowrank_source
from adaattn_compiler.kernels.triton.tables import BlockTable

pytest.importorskip("triton")

# Bytes of shared memory that a program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


@pytest.mark.parametrize(
    ("name", "capability", "head_dim", "tiles", "centroids"),
    [
        ("gqa", 80, 64, Tiles(128, 64, 8, 3), 4),
        ("sink", 80, 128, Tiles(128, 32, 8, 3), 1),
        ("gqa", 90, 128, Tiles(128, 64, 8, 3), 4),
        ("softcap", 90, 64, Tiles(128, 128, 8, 3), 16),
    ],
)
def test_kernel_compiles_without_spills(
    name: str, capability: int, head_dim: int, tiles: Tiles, centroids: int
) -> None:
    spec = SPECS[name][0]
    made_for = Configuration(spec, ("float32",) * len(spec.operands))
    dims = (head_dim, head_dim)
    compiled = compiled_lowrank(made_for, "bfloat16", dims, tiles, capability, centroids)
    assert compiled.spills == 0
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    assert compiled.ptx.count(instruction) >= 6  # of whole blocks, of those cut, of centroids
    assert compiled.shared_memory <= SHARED[capability]


def test_source_is_of_one_kernel_and_what_it_calls() -> None:
    source = lowrank_source(Configuration(SPECS["softcap"][0]))
    assert source.count("\ndef fused_lowrank_attention(") == 1
    assert source.count("\ndef visit_blocks(") == source.count("\ndef visit_block(") == 1
    assert "fused_qk_softmax_av(" not in source


def test_torch_sees_one_launch_whatever_the_sizes() -> None:
    spec, tiles = SPECS["gqa"][0], Tiles()
    near, far = near_and_far(spec, 300, 300, tiles, 1)

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: torch.Tensor
    ) -> torch.Tensor:
        given = {
            "near": BlockTable(tables[0], tables[1], near.full_run),
            "far": FarTable(tables[2], tables[3]),
            "pooled": pooled(k, v, tiles.keys, 4),
        }
        return fused_lowrank_attention(Configuration(spec), q, k, v, [], **given, tiles=tiles)

    tensors = [torch.randn(2, heads, 300, 16) for heads in (4, 2, 2)]
    tables = [near.table, near.blocks, far.table, far.blocks]
    traced = make_fx(attention, tracing_mode="symbolic")(*tensors, *tables)
    names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert any("sym_size" in name for name in names)
    assert names.count("triton_kernel_wrapper_mutation") == 1
