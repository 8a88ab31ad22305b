"""Compiles generated modules for GPUs that need not be there, and says what they take.

Private Triton, checked with 3.7 (torch 2.13): `triton.compile` of an `ASTSource`, and its metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adaattn_compiler.kernels.triton.disassembly import said_of
from adaattn_compiler.kernels.triton.gradient_source import backward_source
from adaattn_compiler.kernels.triton.launch import (
    Products,
    Tiles,
    constants,
    loaded,
    shared_constants,
)
from adaattn_compiler.kernels.triton.launch_backward import BackwardTiles, specialized
from adaattn_compiler.kernels.triton.launch_decode import (
    COMBINING,
    combine_constants,
    decode_constants,
)
from adaattn_compiler.kernels.triton.launch_lowrank import lowrank_constants
from adaattn_compiler.kernels.triton.launch_rowproducts import row_products_constants
from adaattn_compiler.kernels.triton.launch_statistics import (
    SAMPLING,
    sample_constants,
    statistics_constants,
)
from adaattn_compiler.kernels.triton.source import (
    FORWARD,
    Configuration,
    decode_source,
    forward_source,
    lowrank_source,
    row_products_source,
    statistics_source,
)

# By the name that a torch dtype has without "torch.".
TYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "bool": "i1",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target: its code, and of each program the bytes of shared memory and of
    registers spilled to memory; registers: of each thread."""

    ptx: str
    cubin: bytes = field(repr=False)
    shared_memory: int
    registers: int
    spills: int


def compiled_forward(
    made_for: Configuration,
    dtype: str,
    dims: tuple[int, int],
    tiles: Tiles,
    capability: int,
    precision: str | Products = "ieee",
    **switches: Any,
) -> Compiled:
    """The forward kernel for q, k, v of a dtype and of head dimensions D and E, as `launch` has it.

    capability: 80, 90. switches: of `constants`.
    """
    usual = {"has_lse": True, "has_statistics": True}
    fixed = constants(made_for.spec, dims, tiles, precision, **{**usual, **switches})
    types = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), dtype),
        **dict.fromkeys(("lse_ptr", "statistics_ptr", "entropy_ptr", "maximum_ptr"), "float32"),
        "skip_ptr": "float32",
        **dict.fromkeys(("table_ptr", "blocks_ptr", "flags_ptr"), "int32"),
        **dict.fromkeys(("alternative_table_ptr", "alternative_blocks_ptr"), "int32"),
    }
    kernel = getattr(loaded(forward_source(made_for)), FORWARD)
    return compiled(kernel, made_for, types, fixed, tiles, capability)


def compiled_decode(
    made_for: Configuration,
    dtype: str,
    dims: tuple[int, int],
    tiles: Tiles,
    capability: int,
    *,
    split: bool,
    precision: str | Products = "ieee",
) -> tuple[Compiled, Compiled]:
    """The kernel for few rows, and the one that adds splits up."""
    module = loaded(decode_source(made_for))
    shared = shared_constants(made_for.spec, dims, tiles)
    types = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), dtype),
        **dict.fromkeys(("lse_ptr", "partial_ptr", "sums_ptr"), "float32"),
    }
    fixed = decode_constants(shared, split, True, precision)
    return (
        compiled(module.fused_decode, made_for, types, fixed, tiles, capability),
        compiled(
            module.combine_splits,
            made_for,
            types,
            combine_constants(shared, True),
            COMBINING,
            capability,
        ),
    )


def compiled_lowrank(
    made_for: Configuration,
    dtype: str,
    dims: tuple[int, int],
    tiles: Tiles,
    capability: int,
    centroids: int,
    precision: str | Products = "ieee",
    **switches: Any,
) -> Compiled:
    """The kernel with a far field of so many centroids to a block; switches: its constants'."""
    tensors = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_far_ptr", "v_far_ptr")
    types = {
        **dict.fromkeys(tensors, dtype),
        **dict.fromkeys(("lse_ptr", "log_count_ptr"), "float32"),
        **dict.fromkeys(("near_ptr", "near_blocks_ptr", "far_ptr", "far_blocks_ptr"), "int32"),
        "flags_ptr": "int32",
    }
    fixed = lowrank_constants(
        made_for.spec, dims, tiles, precision, centroids=centroids, **switches
    )
    kernel = loaded(lowrank_source(made_for)).fused_lowrank_attention
    return compiled(kernel, made_for, types, fixed, tiles, capability)


def compiled_statistics(
    made_for: Configuration, dtype: str, head_dim: int, tiles: Tiles, capability: int
) -> tuple[Compiled, Compiled]:
    """The kernel for statistics of rows, and the one for their sampled scores."""
    module = loaded(statistics_source(made_for))
    types = {
        **dict.fromkeys(("q_ptr", "k_ptr"), dtype),
        **dict.fromkeys(("sums_ptr", "near_ptr", "sink_ptr", "out_ptr"), "float32"),
        **dict.fromkeys(("count_ptr", "step_ptr", "rank_ptr"), "int32"),
        **dict.fromkeys(("at_ptr", "bits_ptr"), "int64"),
    }
    given = (made_for.spec, head_dim, tiles)
    return (
        compiled(
            module.fused_row_statistics,
            made_for,
            types,
            statistics_constants(*given),
            tiles,
            capability,
        ),
        compiled(
            module.sampled_scores, made_for, types, sample_constants(*given), SAMPLING, capability
        ),
    )


def compiled_row_products(
    made_for: Configuration, dtype: str, head_dim: int, tiles: Tiles, capability: int
) -> Compiled:
    """The kernel for products of rows."""
    types = {
        **dict.fromkeys(("q_ptr", "k_ptr"), dtype),
        **dict.fromkeys(("products_ptr", "sums_ptr", "sink_ptr"), "float32"),
        "at_ptr": "int64",
    }
    fixed = row_products_constants(made_for.spec, head_dim, tiles)
    kernel = loaded(row_products_source(made_for)).fused_row_products
    return compiled(kernel, made_for, types, fixed, tiles, capability)


def compiled_backward(
    made_for: Configuration,
    dtype: str,
    dims: tuple[int, int],
    tiles: BackwardTiles,
    capability: int,
    precision: str = "ieee",
    chosen: Sequence[int] = (),
) -> dict[str, Compiled]:
    """The kernels of the backward pass by name; chosen: the operands that want a gradient."""
    module = loaded(backward_source(made_for))
    inputs = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")
    sums = ("statistics", "terms", "sink_sums", "row_sums", "column_sums", "sums", "bias")
    types = {
        **{f"{name}_ptr": dtype for name in inputs},
        **{f"{name}_ptr": "float32" for name in sums},
        **dict.fromkeys(("table_ptr", "blocks_ptr"), "int32"),
    }
    return {
        name: compiled(
            getattr(module, each.kernel), made_for, types, each.constants, each.tiles, capability
        )
        for name, each in specialized(made_for, dims, tiles, precision, chosen).items()
    }


def compiled(
    kernel: Any,
    made_for: Configuration,
    types: Mapping[str, str],
    fixed: Mapping[str, Any],
    tiles: Tiles,
    capability: int,
) -> Compiled:
    """A kernel of a generated module; types: what pointers lead to; fixed: its constants.

    Tensors are taken to be aligned to 16 bytes, rows to 16 elements; other arguments are 32-bit.
    """
    pointers = {**types, **{f"operand{i}_ptr": name for i, name in enumerate(made_for.dtypes)}}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{TYPES[pointers[name]]}"
        else:
            signature[name] = "i64" if name in made_for.params else "i32"
        if name in pointers or re.fullmatch("stride_g?[qkvo]f?[bhgmn]", name):
            aligned[(place,)] = [["tt.divisibility", 16]]
    return built_for(capability, kernel, signature, fixed, aligned, (tiles.warps, tiles.stages))


def built_for(
    capability: int,
    kernel: Any,
    signature: Mapping[str, str],
    fixed: Mapping[str, Any],
    aligned: Mapping[tuple[int], Any],
    how: tuple[int, int],
) -> Compiled:
    """A kernel as Triton compiles it; aligned: what is known of arguments, by their places; how:
    warps and stages."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, dict(signature), constexprs=dict(fixed), attrs=dict(aligned))
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": how[0], "num_stages": how[1]}
    built = triton.compile(source, target=target, options=options)
    code, cubin = built.asm["ptx"], built.asm["cubin"]
    return Compiled(code, cubin, built.metadata.shared, *_resources(cubin))


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of them that are spilled)."""
    text = said_of(cubin, "cuobjdump", "-res-usage")
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]
