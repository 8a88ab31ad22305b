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

from adaattn_compiler.kernels.through_op import with_unit_stride
from adaattn_compiler.kernels.triton.source import (
    EMPTY_ROWS,
    ENTROPY,
    FORWARD,
    MIXED,
    Configuration,
    forward_source,
    units,
)
from adaattn_compiler.kernels.triton.tables import BlockTable
from adaattn_compiler.spec import AttentionSpec

# As in tile.py.
_BY_MASK = 2


@dataclass(frozen=True)
class Tiles:
    """Rows and keys of a tile; what the compiler is told beside."""

    rows: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Products:
    """How q k^T and p v are multiplied.

    Of float32 factors "ieee", "tf32x3" or "tf32"; "bf16", "fp16": factors are rounded to it first
    (what float16 cannot hold becomes infinite).
    """

    qk: str = "ieee"
    pv: str = "ieee"


@dataclass(frozen=True)
class Alternative:
    """What heads do instead whose flag is above 0; those below 0 are left out.

    flags: int32 [B|1,H|1], read on the device. table: other blocks of keys, for tiles of the same
    size; None: the same. products: None: the same. skip: float32 [H], see softmax.py; None: nothing
    is skipped.
    """

    flags: torch.Tensor
    table: BlockTable | None = None
    products: Products | None = None
    skip: torch.Tensor | None = None

    @property
    def differs(self) -> bool:
        """Whether it is one: else flags say only which heads are there."""
        return any(part is not None for part in (self.table, self.products, self.skip))


@dataclass(frozen=True)
class Wanted:
    """What is written beside the output where a tensor is given, contiguous and float32.

    lse, entropy (of the weights, a sink's share one of them) and score_maximum (of the keys) in
    natural units: [B,H,M]. statistics: [B,H,M,2], the score that weights are taken from, in the
    kernel's units, and their sum, from which the backward pass starts.
    """

    lse: torch.Tensor | None = None
    statistics: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    score_maximum: torch.Tensor | None = None


def forward(
    made_for: Configuration,
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    v_BGNE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int] = (),
    *,
    tiles: Tiles = Tiles(),
    precision: str | Products = "ieee",
    lse: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    score_maximum: torch.Tensor | None = None,
    table: BlockTable | None = None,
    alternative: Alternative | None = None,
    lazy: bool = False,
    by_descriptor: bool = False,
    programs: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B,H,M,E], laid out as [B,M,H,E].

    table: the blocks of keys that rows meet, for tiles of the same size; without one they are those
    of the mask's closed form. lazy: outputs are rescaled only when the maximum has grown by much.
    by_descriptor: see forward.py; launched directly on a GPU it wants `triton.set_allocator`, which
    Inductor sees to. ValueError where keys or values do not lie as it needs them. programs: so many
    take the tiles in turn; None: one each. out: to be written, where it is there already.
    For the rest see `Wanted`, `Alternative`.
    """
    batch, heads, rows, _ = q_BHMD.shape
    if out is None:
        out = q_BHMD.new_empty(batch, rows, heads, v_BGNE.shape[3]).transpose(1, 2)
    wanted = Wanted(lse, statistics, entropy, score_maximum)
    given = (q_BHMD, k_BGND, v_BGNE, out)
    _launch(
        made_for,
        given,
        operands,
        params,
        tiles,
        precision,
        wanted,
        table,
        alternative,
        lazy=lazy,
        by_descriptor=by_descriptor,
        programs=programs,
    )
    return out


def fused_entropy_estimate(
    made_for: Configuration,
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int] = (),
    *,
    tiles: Tiles = Tiles(),
    precision: str | Products = "ieee",
    table: BlockTable | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(entropy, score_maximum, lse), float32 [B,H,M] each, as `Wanted` has them; without values."""
    shape = q_BHMD.shape[:3]
    entropy, maximum, lse = (q_BHMD.new_empty(shape, dtype=torch.float32) for _ in range(3))
    wanted = Wanted(lse, None, entropy, maximum)
    _launch(
        made_for, (q_BHMD, k_BGND, None, None), operands, params, tiles, precision, wanted, table
    )
    return entropy, maximum, lse


def _launch(
    made_for: Configuration,
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    tiles: Tiles,
    precision: str | Products,
    wanted: Wanted,
    table: BlockTable | None,
    alternative: Alternative | None = None,
    *,
    lazy: bool = False,
    by_descriptor: bool = False,
    programs: int | None = None,
) -> None:
    """given: q, k, v and the output to be written; the last two may be missing."""
    spec = made_for.spec
    q, k, v = (None if tensor is None else with_unit_stride(tensor) for tensor in given[:3])
    assert q is not None
    assert k is not None
    if by_descriptor:
        _check_descriptors(k, v)
    out = given[3]
    batch, heads, rows, head_dim = q.shape
    columns = k.shape[2]
    other = None if alternative is None else alternative.table or table
    tables = [
        None if tensor is None else tensor.to(q.device)
        for tensor in (
            None if table is None else table.table,
            None if table is None else table.blocks,
            None if alternative is None else alternative.flags,
            None if alternative is None else alternative.skip,
            None if other is None else other.table,
            None if other is None else other.blocks,
        )
    ]
    kernel = launchable(kernel_of(made_for, has_values=v is not None, alternative=alternative))
    total = -(-rows // tiles.rows) * batch * heads
    kernel[(total if programs is None else programs,)](
        q,
        k,
        v,
        out,
        wanted.lse,
        wanted.statistics,
        wanted.entropy,
        wanted.score_maximum,
        *tables,
        *q.stride()[:3],
        *k.stride()[:3],
        *(stride for tensor in (v, out) for stride in _strides(tensor)),
        *(stride for place in (0, 2, 4) for stride in broadcast_strides(tables[place])),
        total,
        heads,
        rows,
        columns,
        *params,
        *operand_arguments(operands),
        **constants(
            spec,
            (head_dim, head_dim if v is None else v.shape[3]),
            tiles,
            precision,
            has_values=v is not None,
            has_lse=wanted.lse is not None,
            has_statistics=wanted.statistics is not None,
            has_entropy=wanted.entropy is not None,
            has_maximum=wanted.score_maximum is not None,
            lazy=lazy,
            by_descriptor=by_descriptor,
            persistent=programs is not None,
            listed=table is not None,
            full_run=table is None or table.full_run,
            has_flags=alternative is not None,
            has_alternative=alternative is not None and alternative.differs,
            has_skip=alternative is not None and alternative.skip is not None,
            alternative=None if alternative is None else alternative.products,
            alternative_listed=other is not None,
            alternative_full_run=other is None or other.full_run,
            ragged=not (isinstance(columns, int) and columns % tiles.keys == 0),
        ),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def kernel_of(made_for: Configuration, *, has_values: bool, alternative: Alternative | None) -> Any:
    """The forward kernel, by the name of what it is used for."""
    name = FORWARD if has_values else ENTROPY
    if alternative is not None and alternative.products is not None:
        name = MIXED
    return getattr(loaded(forward_source(made_for)), name)


def _check_descriptors(*tensors: torch.Tensor | None) -> None:
    """ValueError for rows that do not begin at multiples of 16 bytes."""
    for tensor in tensors:
        if tensor is None:
            continue
        unit = 16 // tensor.element_size()
        places = (tensor.storage_offset(), *tensor.stride()[:-1])
        if any(place % unit for place in places) or tensor.stride(2) == 0:
            raise ValueError(
                f"keys or values of strides {tuple(tensor.stride())} from {places[0]} on: "
                f"descriptors need multiples of {unit} elements"
            )


def _strides(tensor: torch.Tensor | None) -> Sequence[int]:
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]


def broadcast_strides(tensor: torch.Tensor | None) -> Sequence[int]:
    """Of the axes B and H, 0 where an axis has one element for all."""
    if tensor is None:
        return 0, 0
    return tuple(tensor.stride(axis) if tensor.shape[axis] > 1 else 0 for axis in (0, 1))


def operand_arguments(operands: Sequence[torch.Tensor]) -> list[Any]:
    """Operands as kernels take them: each with the strides of all axes but the last."""
    return [part for o in map(with_unit_stride, operands) for part in (o, *o.stride()[:-1])]


def constants(
    spec: AttentionSpec,
    dims: tuple[int, int],
    tiles: Tiles,
    precision: str | Products = "ieee",
    *,
    has_values: bool = True,
    has_lse: bool = False,
    has_statistics: bool = False,
    has_entropy: bool = False,
    has_maximum: bool = False,
    lazy: bool = False,
    by_descriptor: bool = False,
    persistent: bool = False,
    listed: bool = False,
    full_run: bool = True,
    has_flags: bool = False,
    has_alternative: bool | None = None,
    has_skip: bool = False,
    alternative: Products | None = None,
    alternative_listed: bool = False,
    alternative_full_run: bool = True,
    ragged: bool = True,
) -> dict[str, Any]:
    """What the forward kernel is specialized for; has_alternative: None: as has_flags. ragged: the
    last block of keys may have fewer."""
    products = products_of(precision)
    other = alternative or products
    return {
        **shared_constants(spec, dims, tiles),
        "HAS_VALUES": has_values,
        "HAS_LSE": has_lse,
        "HAS_STATISTICS": has_statistics,
        "HAS_ENTROPY": has_entropy,
        "HAS_MAXIMUM": has_maximum,
        "HAS_FLAGS": has_flags,
        "HAS_ALTERNATIVE": has_flags if has_alternative is None else has_alternative,
        "HAS_SKIP": has_skip,
        "QK": products.qk,
        "PV": products.pv,
        "ALTERNATIVE_QK": other.qk,
        "ALTERNATIVE_PV": other.pv,
        "LAZY": lazy,
        "BY_DESCRIPTOR": by_descriptor,
        "PERSISTENT": persistent,
        "LISTED": listed,
        "FULL_RUN": full_run,
        "ALTERNATIVE_LISTED": alternative_listed,
        "ALTERNATIVE_FULL_RUN": alternative_full_run,
        "CUT": True if ragged else _BY_MASK,
    }


def products_of(precision: str | Products) -> Products:
    """A precision of both products, or one of each."""
    return Products(precision, precision) if isinstance(precision, str) else precision


def shared_constants(spec: AttentionSpec, dims: tuple[int, int], tiles: Tiles) -> dict[str, Any]:
    """What each template is specialized for; dims: D and E."""
    scale, unit = units(spec)
    return {
        "SCALE": scale,
        "UNIT": unit,
        "GROUP": spec.group,
        "HEAD_DIM": dims[0],
        "VALUE_DIM": dims[1],
        "HAS_SINK": spec.sink is not None,
        "EMPTY_ROW": EMPTY_ROWS[spec.empty_row],
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "BLOCK_D": power_of_two(dims[0]),
        "BLOCK_E": power_of_two(dims[1]),
    }


def power_of_two(size: int) -> int:
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
