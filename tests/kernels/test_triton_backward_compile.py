"""The generated backward kernels, compiled for GPUs that need not be there."""

from __future__ import annotations

import re

import pytest
import torch
from specs import SPECS

from adaattn_compiler.kernels.triton.compile import Compiled, compiled_backward
from adaattn_compiler.kernels.triton.launch_backward import backward_tiles
from adaattn_compiler.kernels.triton.source import Configuration

# Bytes of shared memory that a program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024}


def compiled_with_defaults(
    name: str, dtype: torch.dtype, head_dim: int, capability: int, precision: str = "ieee"
) -> dict[str, Compiled]:
    pytest.importorskip("triton")
    spec = SPECS[name][0]
    usual = {"bool": "bool", "int": "int64", "float": "float32"}
    made_for = Configuration(spec, tuple(usual[operand.kind] for operand in spec.operands))
    tiles = backward_tiles(head_dim, head_dim, dtype, capability)
    chosen = [i for i, operand in enumerate(spec.operands) if operand.kind == "float"]
    text = str(dtype).removeprefix("torch.")
    dims = (head_dim, head_dim)
    return compiled_backward(made_for, text, dims, tiles, capability, precision, chosen)


def assert_fits(kernel: Compiled, capability: int) -> None:
    assert kernel.spills == 0
    assert kernel.shared_memory <= SHARED[capability]


@pytest.mark.parametrize(
    ("name", "head_dim", "capability"),
    [
        ("causal", 64, 80),
        ("causal", 64, 90),
        ("causal", 128, 80),
        ("causal", 128, 90),
        ("causal", 256, 80),
        ("causal", 256, 90),
        ("softcap", 128, 80),
        ("softcap", 128, 90),
        ("alibi", 128, 90),
        ("alibi", 64, 80),
        ("causal distance", 128, 90),
        ("dense bias", 64, 90),
        ("sink", 64, 90),
    ],
)
def test_default_tiles_need_no_memory_for_registers(
    name: str, head_dim: int, capability: int
) -> None:
    found = compiled_with_defaults(name, torch.bfloat16, head_dim, capability)
    for kernel in found.values():
        assert_fits(kernel, capability)
        assert "mma.sync" in kernel.ptx or "wgmma.mma_async" in kernel.ptx
    if capability == 90 and head_dim < 256:
        for each in ("attention_grad_q", "attention_grad_kv"):
            assert "wgmma.mma_async" in found[each].ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_floats_compile(capability: int) -> None:
    found = compiled_with_defaults("causal", torch.float32, 64, capability)
    for kernel in found.values():
        assert_fits(kernel, capability)
        assert "mma.sync" not in kernel.ptx


def test_floats_in_three_parts_take_tensor_cores() -> None:
    found = compiled_with_defaults("causal", torch.float32, 64, 80, "tf32x3")
    for kernel in found.values():  # nothing chooses these products; a few registers are spilled
        assert kernel.spills <= 32
        assert kernel.shared_memory <= SHARED[80]
        assert "mma.sync" in kernel.ptx


def test_nothing_is_added_atomically() -> None:
    found = compiled_with_defaults("causal distance", torch.bfloat16, 64, 90)
    assert len(found) == 4
    assert not any(re.search(r"\b(atom|red)\.", kernel.ptx) for kernel in found.values())
