"""Loads generated modules and runs their kernels."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.through_op import with_unit_stride
from adaattn_compiler.kernels.triton.source import EMPTY_ROWS, Configuration, forward_source
from adaattn_compiler.kernels.triton.tables import BlockTable, block_table
from adaattn_compiler.spec import AttentionSpec, S

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile; what the compiler is told beside."""

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2


def forward(
    made_for: Configuration,
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    v_BGNE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int] = (),
    *,
    tiles: Tiles = Tiles(),
    precision: str = "ieee",
    lse: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    table: BlockTable | None = None,
) -> torch.Tensor:
    """[B,H,M,E], laid out as [B,M,H,E].

    precision: of products of float32 ("ieee", "tf32x3"). Written where they are given, contiguous
    and float32: lse [B,H,M]; statistics [B,H,M,2], the largest score of each row, in the kernel's
    units, and the sum of its weights, from which the backward pass starts. table: other blocks than
    those of the spec's mask, for tiles of the same size.
    """
    spec = made_for.spec
    batch, heads, rows, head_dim = q_BHMD.shape
    columns, value_dim = v_BGNE.shape[2:]
    q_BHMD, k_BGND, v_BGNE = (with_unit_stride(tensor) for tensor in (q_BHMD, k_BGND, v_BGNE))
    out = q_BHMD.new_empty(batch, rows, heads, value_dim).transpose(1, 2)
    if table is None:
        sizes = (rows, columns, tiles.rows, tiles.keys)
        table = block_table(
            block_structure(spec.mask, *sizes, params), ragged=columns % tiles.keys != 0
        )
    shared = table.table.to(q_BHMD.device)
    kernel = launchable(loaded(forward_source(made_for)).fused_qk_softmax_av)
    kernel[(-(-rows // tiles.rows), batch * heads)](
        q_BHMD,
        k_BGND,
        v_BGNE,
        out,
        lse,
        statistics,
        shared,
        table.blocks.to(q_BHMD.device),
        *q_BHMD.stride()[:3],
        *k_BGND.stride()[:3],
        *v_BGNE.stride()[:3],
        *out.stride()[:3],
        *(shared.stride(axis) if shared.shape[axis] > 1 else 0 for axis in (0, 1)),
        heads,
        rows,
        columns,
        *params,
        *(part for o in map(with_unit_stride, operands) for part in (o, *o.stride()[:-1])),
        **constants(
            spec,
            (head_dim, value_dim),
            tiles,
            precision,
            has_lse=lse is not None,
            has_statistics=statistics is not None,
            full_run=table.full_run,
        ),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def constants(
    spec: AttentionSpec,
    dims: tuple[int, int],
    tiles: Tiles,
    precision: str,
    *,
    has_lse: bool,
    has_statistics: bool,
    full_run: bool,
) -> dict[str, Any]:
    """What the forward kernel is specialized for."""
    plain = spec.score == S
    return {
        "SCALE": spec.scale * _LOG2_E if plain else spec.scale,
        "UNIT": 1.0 if plain else _LOG2_E,
        "GROUP": spec.group,
        "HEAD_DIM": dims[0],
        "VALUE_DIM": dims[1],
        "HAS_SINK": spec.sink is not None,
        "EMPTY_ROW": EMPTY_ROWS[spec.empty_row],
        "HAS_LSE": has_lse,
        "HAS_STATISTICS": has_statistics,
        "PRECISION": precision,
        "FULL_RUN": full_run,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "BLOCK_D": _power_of_two(dims[0]),
        "BLOCK_E": _power_of_two(dims[1]),
    }


def _power_of_two(size: int) -> int:
    """The least that holds a size, and that tensor cores take."""
    return max(1 << (size - 1).bit_length(), 16)


def launchable(kernel: Any) -> Any:
    """A kernel whose launches torch's tracing sees; as it is where Triton interprets it."""
    from triton.runtime.jit import JITFunction

    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


@functools.cache
def loaded(source: str) -> ModuleType:
    """The module of a source, from a file in torch's cache folder: Triton reads it there."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    name = hashlib.sha256(source.encode()).hexdigest()[:32]
    path = Path(cache_dir()) / "adaattn" / f"triton_{name}.py"
    if not path.exists() or path.read_text() != source:
        _write(path, source)
    spec: Any = importlib.util.spec_from_file_location(f"adaattn_triton_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".py", delete=False) as file:
        file.write(source)
    os.replace(file.name, path)
