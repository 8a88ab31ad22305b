"""Compiles generated modules for GPUs that need not be there, and says what they take.

Private Triton, checked with 3.7 (torch 2.13): `triton.compile` of an `ASTSource`, its metadata, and
the `cuobjdump` in Triton's package.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaattn_compiler.kernels.triton.launch import Tiles, constants, loaded
from adaattn_compiler.kernels.triton.source import Configuration, forward_source

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
    shared_memory: int
    registers: int
    spills: int


def compiled_forward(
    made_for: Configuration,
    dtype: str,
    dims: tuple[int, int],
    tiles: Tiles,
    capability: int,
    precision: str = "ieee",
) -> Compiled:
    """The forward kernel for q, k, v of a dtype and of head dimensions D and E, as `launch` has it.

    capability: 80, 90. Tensors are taken to be aligned to 16 bytes, rows to 16 elements.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = loaded(forward_source(made_for)).fused_qk_softmax_av
    fixed = constants(
        made_for.spec, dims, tiles, precision, has_lse=True, has_statistics=True, full_run=True
    )
    pointers = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), dtype),
        **dict.fromkeys(("lse_ptr", "statistics_ptr"), "float32"),
        **dict.fromkeys(("table_ptr", "blocks_ptr"), "int32"),
        **{f"operand{i}_ptr": name for i, name in enumerate(made_for.dtypes)},
    }
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{TYPES[pointers[name]]}"
        else:
            signature[name] = "i64" if name in made_for.params else "i32"
        if name in pointers or re.fullmatch("stride_[qkvo][bhgmn]", name):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    built = triton.compile(source, target=target, options=options)
    return Compiled(built.asm["ptx"], built.metadata.shared, *_resources(built.asm["cubin"]))


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of them that are spilled)."""
    import triton

    package = Path(triton.__file__).parent
    tool = package / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command: list[Any] = [tool, "-res-usage", file]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]
