"""Runs the kernels for statistics of some rows (statistics.py), and adds up what they write."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaattn_compiler.decision import BLOCK
from adaattn_compiler.kernels.device import target_here
from adaattn_compiler.kernels.evaluate import is_printable
from adaattn_compiler.kernels.printing import NoCode
from adaattn_compiler.kernels.scored_rows import (
    OF_A_ROW,
    sampled_places,
    sampled_ranks,
    shuts_out,
)
from adaattn_compiler.kernels.through_op import with_unit_stride
from adaattn_compiler.kernels.triton.kernel import LEAST_CAPABILITY, LONGEST, WIDEST_HEAD
from adaattn_compiler.kernels.triton.launch import (
    Tiles,
    launchable,
    loaded,
    operand_arguments,
    products_of,
    shared_constants,
)
from adaattn_compiler.kernels.triton.launch_decode import splits_for, tiles_for_few_rows
from adaattn_compiler.kernels.triton.op import DTYPES
from adaattn_compiler.kernels.triton.source import LOG2_E, Configuration, statistics_source
from adaattn_compiler.spec import AttentionSpec, EmptyRow

# Of the kernel for sampled scores; its rows and keys are not read.
SAMPLING = Tiles(1, BLOCK, 4, 2)


# -- what has no kernel ----------------------------------------------------------------------------


def statistics_refusal(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
) -> str | None:
    """Why these kernels cannot take an attention on this machine; None where they can."""
    if q_BHMD.device.type != "cuda":
        return "only on CUDA"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = target_here().capability
    if capability is None or capability < LEAST_CAPABILITY:
        return f"not for {target_here().name}: sm_80 and later"
    return refusal_of_form(q_BHMD, k_BGND, operands, params, spec)


def refusal_of_form(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
) -> str | None:
    """The same, whatever the machine is."""
    if q_BHMD.dtype not in DTYPES or k_BGND.dtype != q_BHMD.dtype:
        return f"not for {q_BHMD.dtype} and {k_BGND.dtype}"
    if q_BHMD.shape[3] > WIDEST_HEAD:
        return f"not for head dimensions above {WIDEST_HEAD}"
    if max(q_BHMD.shape[2], k_BGND.shape[2]) > LONGEST:
        return f"not for lengths above {LONGEST}"
    if not all(isinstance(param, int) for param in params):
        return "a run-time number that is no integer, and no operand"
    try:
        return _code_refusal(made_for(spec, operands))
    except NoCode as error:
        return str(error)


@functools.lru_cache(maxsize=256)
def _code_refusal(made_for: Configuration) -> str | None:
    spec = made_for.spec
    for expression in (spec.score, spec.mask, spec.sink):
        if expression is not None and not is_printable(expression):
            return f"no code for {expression}"
    try:
        statistics_source(made_for)
    except NoCode as error:
        return str(error)
    return None


def made_for(spec: AttentionSpec, operands: Sequence[torch.Tensor]) -> Configuration:
    """What the kernels of a spec are generated for."""
    return Configuration(spec, tuple(str(o.dtype).removeprefix("torch.") for o in operands))


def statistics_tiles(pairs: int, head_dim: int, itemsize: int) -> Tiles:
    """Tiles that compile without spills; pairs: of query heads and rows of one key head; itemsize:
    bytes."""
    if itemsize > 2:
        return tiles_for_few_rows(pairs, head_dim, itemsize)
    return Tiles(16, BLOCK, 4, 2) if pairs <= 16 else Tiles(32, BLOCK, 8, 2)


# -- what is known of rows -------------------------------------------------------------------------


def row_statistics(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
    *,
    rows: int,
    turn: int,
    tiles: Tiles | None = None,
    splits: int | None = None,
) -> dict[str, torch.Tensor]:
    """By name what `statistics._kept` has of a sample of rows, float32, without waiting for a GPU.

    NaN of a key that none of the rows attends to is not seen. tiles: at least 16 rows, and keys
    that divide BLOCK. splits: programs that share the keys of a tile of rows.
    """
    at = sampled_places(q_BHMD, q_BHMD.shape[2], rows, turn)
    given = SampledRows.of(q_BHMD, k_BGND, operands, params, spec, at)
    tiles = tiles or given.usual_tiles()
    steps = _steps(given, tiles, splits)
    kept = _of_rows(steps)
    diagonal = given.at + (k_BGND.shape[2] - q_BHMD.shape[2])
    kept["sample"] = _sample(given, steps, sampled_ranks(diagonal, turn, kept["count"][..., None]))
    if spec.empty_row is EmptyRow.UNIFORM and spec.sink is None:
        return _uniform(kept, diagonal, k_BGND.shape[2])
    return kept


@dataclass(frozen=True)
class SampledRows:
    """Rows of q, as kernels take them: few: those `at`, [B,H,R,D]; rows: M."""

    few: torch.Tensor
    k: torch.Tensor
    at: torch.Tensor
    rows: int
    made_for: Configuration
    rest: tuple[Any, ...]  # params and operands, as kernels take them

    @staticmethod
    def of(
        q: torch.Tensor,
        k: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        spec: AttentionSpec,
        at: torch.Tensor,
    ) -> SampledRows:
        few = with_unit_stride(q.index_select(2, at))
        rest = (*params, *operand_arguments(operands))
        return SampledRows(few, with_unit_stride(k), at, q.shape[2], made_for(spec, operands), rest)

    @property
    def spec(self) -> AttentionSpec:
        return self.made_for.spec

    @property
    def sizes(self) -> tuple[int, ...]:
        """Strides and lengths, as both kernels take them."""
        batch, heads, count, _ = self.few.shape
        strides = (*self.few.stride()[:3], *self.k.stride()[:3])
        return (*strides, batch, heads, count, self.rows, self.k.shape[2])

    def usual_tiles(self) -> Tiles:
        pairs = self.spec.group * self.few.shape[2]
        return statistics_tiles(pairs, self.few.shape[3], self.few.dtype.itemsize)

    def constants(self, tiles: Tiles) -> dict[str, Any]:
        return statistics_constants(self.spec, self.few.shape[3], tiles)


@dataclass(frozen=True)
class _Steps:
    """What the first kernel writes: float32 sums [4,steps,B,H,R] and so on, see statistics.py.

    in_block: steps of a block of BLOCK keys.
    """

    sums: torch.Tensor
    count: torch.Tensor
    bits: torch.Tensor
    near: torch.Tensor
    sink: torch.Tensor | None
    tiles: Tiles

    def by_row(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B,H,R,steps] of [steps,B,H,R]."""
        return tensor.movedim(0, -1)

    def by_block(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums over the steps of each block, [B,H,R,blocks] of [B,H,R,steps]."""
        of_blocks = (*tensor.shape[:-1], -1, BLOCK // self.tiles.keys)
        return tensor.reshape(of_blocks).sum(-1, dtype=tensor.dtype)


def _steps(given: SampledRows, tiles: Tiles, splits: int | None) -> _Steps:
    few, k, spec = given.few, given.k, given.spec
    batch, heads, count, _ = few.shape
    kv_heads = heads // spec.group
    steps = -(-k.shape[2] // BLOCK) * (BLOCK // tiles.keys)
    if splits is None:
        splits = splits_for(batch, kv_heads, k.shape[2], target_here().multiprocessors)
    shape = (steps, batch, heads, count)
    found = _Steps(
        sums=few.new_empty((4, *shape), dtype=torch.float32),
        count=few.new_empty(shape, dtype=torch.int32),
        bits=few.new_empty(shape, dtype=torch.int64),
        near=few.new_full((*shape[1:], 2 * BLOCK - 1), float("-inf"), dtype=torch.float32),
        sink=None if spec.sink is None else few.new_empty(shape[1:], dtype=torch.float32),
        tiles=tiles,
    )
    kernel = launchable(loaded(statistics_source(given.made_for)).fused_row_statistics)
    row_tiles = -(-spec.group * count // tiles.rows)
    kernel[(splits * row_tiles * batch * kv_heads,)](
        *(few, k, given.at, found.sums, found.count, found.bits, found.near, found.sink),
        *given.sizes,
        *(steps, splits),
        *given.rest,
        **given.constants(tiles),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return found


def statistics_constants(spec: AttentionSpec, head_dim: int, tiles: Tiles) -> dict[str, Any]:
    """What `fused_row_statistics` is specialized for."""
    if tiles.rows < 16 or BLOCK % tiles.keys:
        raise ValueError(f"{tiles}: at least 16 rows, and keys that divide {BLOCK}, are wanted")
    shared = shared_constants(spec, (head_dim, head_dim), tiles)
    names = ("GROUP", "HEAD_DIM", "HAS_SINK", "BLOCK_M", "BLOCK_N", "BLOCK_D")
    return {
        **{name: shared[name] for name in names},
        "SCALE": spec.scale,
        "UNIT": LOG2_E,
        "SHUTS_OUT": shuts_out(spec),
        "NEAR": BLOCK,
        "QK": products_of("ieee").qk,
    }


def sample_constants(spec: AttentionSpec, head_dim: int, tiles: Tiles) -> dict[str, Any]:
    """What `sampled_scores` is specialized for."""
    names = ("SCALE", "GROUP", "HEAD_DIM", "BLOCK_N", "BLOCK_D")
    whole = statistics_constants(spec, head_dim, tiles)
    return {**{name: whole[name] for name in names}, "SAMPLES": OF_A_ROW}


def _of_rows(steps: _Steps) -> dict[str, torch.Tensor]:
    """Sums of all steps, from one reference: the largest score of the row, or the sink."""
    m, total, product, least = (steps.by_row(part) for part in steps.sums.unbind())
    count = steps.by_row(steps.count)
    most = m.amax(-1)
    largest = most if steps.sink is None else torch.maximum(most, steps.sink)
    largest = largest.clamp(min=torch.finfo(torch.float32).min)
    # Where nothing weighs anything m is -inf, beside which 0 would be NaN.
    shift = torch.where(total == 0, 0.0, m - largest[..., None])
    factor = shift.exp()
    return {
        "count": count.sum(-1, dtype=torch.int32),
        "present": (steps.by_block(count) > 0).sum(-1, dtype=torch.int32),
        "most": most,
        "least": least.amin(-1),
        "rest": torch.zeros_like(most) if steps.sink is None else (steps.sink - largest).exp(),
        "top": (most - largest).exp(),
        "products": (factor * (product + shift * total)).sum(-1),
        "blocks": steps.by_block(factor * total),
        "near": steps.near,
    }


def _sample(given: SampledRows, steps: _Steps, ranks: torch.Tensor) -> torch.Tensor:
    """Scores [B,H,R,OF_A_ROW] of the attended keys of such ranks among those of their row."""
    count = steps.by_row(steps.count).contiguous()
    so_far = count.cumsum(-1, dtype=torch.int32)
    step = torch.searchsorted(so_far, ranks.contiguous()).clamp_(max=count.shape[-1] - 1)
    rank = ranks - (so_far - count).gather(-1, step)
    found = torch.empty_like(rank, dtype=torch.float32)
    kernel = launchable(loaded(statistics_source(given.made_for)).sampled_scores)
    kernel[(found.shape[:3].numel(),)](
        *(given.few, given.k, given.at, steps.bits),
        *(step.to(torch.int32), rank.contiguous(), found),
        *given.sizes,
        *given.rest,
        **sample_constants(given.spec, given.few.shape[3], steps.tiles),
        num_warps=SAMPLING.warps,
        num_stages=SAMPLING.stages,
    )
    return found


def _uniform(
    kept: dict[str, torch.Tensor], diagonal: torch.Tensor, columns: int
) -> dict[str, torch.Tensor]:
    """Rows without a key attend to all, with a score of 0."""
    device = diagonal.device
    blocks = kept["blocks"].shape[-1]
    starts = torch.arange(0, blocks * BLOCK, BLOCK, device=device)
    places = diagonal[:, None] + torch.arange(1 - BLOCK, BLOCK, device=device)
    outside = (places < 0) | (places >= columns)
    numbers = {"count": columns, "present": blocks, "top": 1.0}
    alike = {
        **{name: torch.full_like(found, numbers.get(name, 0.0)) for name, found in kept.items()},
        "blocks": (columns - starts).clamp(max=BLOCK).to(torch.float32),
        "near": torch.zeros(outside.shape, device=device).masked_fill_(outside, float("-inf")),
    }
    empty = kept["count"] == 0
    return {
        name: torch.where(empty if found.dim() == 3 else empty[..., None], alike[name], found)
        for name, found in kept.items()
    }
