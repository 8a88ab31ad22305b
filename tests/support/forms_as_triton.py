"""The forms of forms.py as two Triton kernels; one reads tables, at small positions only."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from forms import CONDITIONS, FORMS, TABLES, operands

from adaattn_compiler.kernels.triton.expressions import Tile
from adaattn_compiler.kernels.triton.source import FUNCTIONS, operand_strides

GROUPS: dict[str, dict[str, Any]] = {
    "elements": {name: form for name, form in FORMS.items() if name not in TABLES},
    "tables": TABLES,
}
# Arguments of a kernel before the operands' own.
FIXED = ("out_ptr", "products_ptr", "first", "b", "h", "M", "N", "p0", "p1", "p2")


def _dtypes() -> list[str]:
    return [str(tensor.dtype).removeprefix("torch.") for tensor in operands()]


def operand_arguments() -> list[tuple[str, torch.Tensor | int]]:
    """By name: each operand's tensor and strides."""
    found: list[tuple[str, torch.Tensor | int]] = []
    for i, tensor in enumerate(operands()):
        found.append((f"operand{i}_ptr", tensor))
        found += zip(operand_strides(i, tensor.dim()), tensor.stride(), strict=False)
    return found


def write_module(path: Path) -> ModuleType:
    """A module with a kernel for each group: a square of rows and keys for each form in turn."""
    path.write_text(FUNCTIONS + "".join(_kernel(name) for name in GROUPS))
    spec = importlib.util.spec_from_file_location("forms_as_triton_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _kernel(group: str) -> str:
    arguments = ", ".join([*FIXED, *(name for name, _ in operand_arguments())])
    tile = Tile(_dtypes())
    stores = []
    for number, (name, form) in enumerate(GROUPS[group].items()):
        text = tile.printed(form)
        value = f"tl.where({text}, 1.0, 0.0)" if name in CONDITIONS and text != "True" else text
        stores.append(f"""
    # {name}
    out = tl.zeros([BLOCK, BLOCK], tl.float64) + {value}
    tl.store(out_ptr + {number} * SQUARE * SQUARE + place, out, mask=inside)""")
    return f"""

@triton.jit
def {group}({arguments}, SQUARE: tl.constexpr, BLOCK: tl.constexpr):
    q_place, k_place = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    q, k = first + q_place, first + k_place
    q_inside, k_inside = q_place < SQUARE, k_place < SQUARE
    inside = q_inside & k_inside
    place = q_place * SQUARE + k_place
    S = tl.load(products_ptr + place, mask=inside, other=0)
{"".join(stores)}
"""
