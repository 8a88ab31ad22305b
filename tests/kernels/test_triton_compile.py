"""Generated Triton, compiled for GPUs that need not be there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forms import SQUARE
from forms_as_triton import FIXED, GROUPS, operand_arguments, write_module

from adaattn_compiler.kernels.printing import NoCode
from adaattn_compiler.kernels.triton.expressions import Tile
from adaattn_compiler.spec import Load, k

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("group", GROUPS)
def test_every_form_compiles(group: str, capability: int, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = write_module(tmp_path / "forms.py")
    signature = dict.fromkeys(FIXED, "i32") | {
        "out_ptr": "*fp64",
        "products_ptr": "*fp32",
        "p1": "i64",
    }
    for name, value in operand_arguments():
        signature[name] = f"*{TYPES[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
    sizes = {"SQUARE": SQUARE, "BLOCK": 16}
    signature |= dict.fromkeys(sizes, "constexpr")
    source = ASTSource(getattr(module, group), signature, constexprs=sizes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


def test_operand_without_a_form_is_refused() -> None:
    with pytest.raises(NoCode, match=r"no Triton type for torch\.uint16"):
        Tile(["uint16"]).printed(Load(0, k))
