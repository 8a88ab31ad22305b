"""An attention on a GPU with each head as decided, or exactly where a guard or an audit says so.

What kernels/cpu/decided.py does, by launches and torch functions that never wait for the device:
flags, rows, tables and the state are tensors, and what depends on their values is chosen by them.

    flags    of `check`: 1 as decided; 0, -2 exactly
    out      launches, each of the heads that are computed alike; the first of the exact ones, too
    audit    some rows, which the state says, exactly; heads that are off get flag -1
    out      those of them that are off, exactly, by one more launch: the others are absent in it
    state    counts, averages, demotions

The functions do not ask for the device: they run on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from adaattn_compiler.kernels.envelope import guard_statistics
from adaattn_compiler.kernels.selection import selected_blocks
from adaattn_compiler.kernels.triton.decided_parts import through_landmarks, turned
from adaattn_compiler.kernels.triton.decided_plan import GpuDecisions, Way, decisions_of
from adaattn_compiler.kernels.triton.decided_state import AS_DECIDED, DEMOTED, FAILED_AUDIT, noted
from adaattn_compiler.kernels.triton.decided_tables import (
    BUDGET,
    HIGH,
    LARGEST,
    LIMIT,
    LOW,
    SELECTION,
    SKIP,
    WAY,
    bases_of,
    decided_bases,
    decided_numbers,
    decided_tables,
    is_wide,
    lists_of,
    numbers_of,
    spread,
    table_shapes,
    tile_counts,
    without_bases,
)
from adaattn_compiler.kernels.triton.launch import Alternative, forward
from adaattn_compiler.kernels.triton.launch_decode import decode
from adaattn_compiler.kernels.triton.launch_lowrank import FarTable, fused_lowrank_attention, pooled
from adaattn_compiler.kernels.triton.op import check as check_tensors
from adaattn_compiler.kernels.triton.tables import BlockTable
from adaattn_compiler.runtime.state import Column

# Steps between audited rows (kernels/audit.py).
_GOLDEN = 0.6180339887498949
# So that nothing is divided by 0.
_LEAST_SUM = 1e-200


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, plan: str
) -> torch.Tensor:
    """Flags, int32 [B,H]: AS_DECIDED, 0 (the statistics left the envelope) or DEMOTED."""
    found = decisions_of(plan, is_wide(q))
    demoted = state[:, Column.DEMOTED] > 0
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        inside = torch.zeros(q.shape[:2], dtype=torch.bool, device=q.device)
    else:
        given = decided_numbers(q, numbers_of(plan, is_wide(q)))
        numbers = given.to(torch.float32)[:, None]
        statistics = guard_statistics(q, k, v)
        inside = ((statistics >= numbers[LOW]) & (statistics <= numbers[HIGH])).all(0)
        inside = inside & _is_small_enough(found, (q, k, v), numbers[LARGEST])
    flags = torch.where(demoted, DEMOTED, torch.where(inside, AS_DECIDED, 0))
    return flags.to(torch.int32)


def _is_small_enough(
    found: GpuDecisions, qkv: Sequence[torch.Tensor], largest: torch.Tensor
) -> torch.Tensor:
    """Whether no element is NaN or too large for the heads, [B,H]; largest: [3,1,H].

    Each element is looked at, where that matters: what a pattern leaves out does not show.
    """
    inside = torch.ones(qkv[0].shape[:2], dtype=torch.bool, device=qkv[0].device)
    for tensor, every, bound in zip(qkv, found.largest, largest, strict=True):
        if min(every) < float("inf"):
            most = torch.linalg.vector_norm(tensor, float("inf"), (-2, -1))
            most = most.repeat_interleave(qkv[0].shape[1] // tensor.shape[1], 1)
            inside = inside & ((most <= bound) | (bound == float("inf")))
    return inside


@dataclass(frozen=True)
class _Call:
    """What a call is given, with the plan's numbers [26,H], bases, and tables by name.

    lse: [B,H,M], to be written, where rows may lose all keys.
    """

    found: GpuDecisions
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    operands: Sequence[torch.Tensor]
    params: Sequence[int]
    numbers: torch.Tensor
    bases: Sequence[torch.Tensor]
    tables: Mapping[str, torch.Tensor]
    lse: torch.Tensor | None

    @property
    def skip(self) -> torch.Tensor | None:
        """By head, float32; None where nothing is skipped."""
        return self.numbers[SKIP].to(torch.float32) if self.found.skips else None

    def listed(self, name: str) -> BlockTable | None:
        """None where there are no such tables."""
        if f"{name}_table" not in self.tables:
            return None
        return BlockTable(self.tables[f"{name}_table"], self.tables[f"{name}_blocks"], False)


def attention_as_decided(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    flags: torch.Tensor,
    state: torch.Tensor,
    plan: str,
) -> torch.Tensor:
    """[B,H,M,E], laid out as [B,M,H,E]; what happened is added to the state.

    ValueError for tensors that the plan is not for.
    """
    found = decisions_of(plan, is_wide(q))
    check_tensors(found.attention, q, k, v, operands, params)
    _check_flags(flags, state, q)
    rows, columns = q.shape[2], k.shape[2]
    if 0 in (q.shape[0], rows, columns):
        out = forward(
            found.attention.made_for, q, k, v, operands, params, tiles=found.attention.tiles
        )
        nothing = torch.zeros((*flags.shape, 2), dtype=torch.float64, device=q.device)
        _write(state, noted(state, flags, nothing[..., 0] > 0, nothing, state[:, 0]))
        return out
    shapes = table_shapes(found, rows, columns)
    made = decided_tables(q, rows, columns, params, without_bases(plan)) if shapes else []
    numbers = decided_numbers(q, numbers_of(plan, found.wide))
    bases = decided_bases(q, bases_of(plan, found.wide)) if found.ranks else []
    tables = dict(zip(shapes, made, strict=True))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if found.may_be_empty else None
    call = _Call(found, (q, k, v), operands, params, numbers, bases, tables, lse)
    tried = flags == AS_DECIDED
    theirs = _blocks(call)
    out, lost = _computed(call, theirs, tried)
    off, counted, sums = _judged(call, out, tried, state, lost)
    if off is not None:
        flags = torch.where(off, FAILED_AUDIT, flags).to(torch.int32)
        _first(call, theirs, torch.where(off, 0, -1), out)
    _write(state, noted(state, flags, counted, sums, numbers[BUDGET]))
    return out


def _check_flags(flags: torch.Tensor, state: torch.Tensor, q: torch.Tensor) -> None:
    if flags.dtype != torch.int32 or flags.shape != q.shape[:2]:
        raise ValueError(f"flags {flags.dtype} {tuple(flags.shape)}: int32 [B,H] is wanted")
    if state.dtype != torch.float64 or state.dim() != 2 or state.shape[0] != q.shape[1]:
        raise ValueError(f"state {state.dtype} {tuple(state.shape)}: float64, H rows are wanted")


def _write(state: torch.Tensor, columns: torch.Tensor) -> None:
    state[:, : columns.shape[1]].copy_(columns)


# -- launches --------------------------------------------------------------------------------------


def _computed(
    call: _Call, theirs: BlockTable | None, tried: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the output of all heads, which of them are not to be used, [B,H], None: nothing tells);
    theirs: the blocks of those without means, as decided."""
    found, lost = call.found, None
    way = torch.where(tried, call.numbers[WAY], 0.0)
    # Those that are exact go with the heads of the first way, if that is direct.
    taken = 1 if found.direct else -1
    out = _first(call, theirs, torch.where(way == 0, 0, torch.where(way == 1, taken, -1)), None)
    for number, each in enumerate(found.ways, 1):
        flags = torch.where(way == number, 1, -1).to(torch.int32)
        alternative = Alternative(flags, theirs, each.products, call.skip)
        if each.pooled:
            _pooled(call, each, flags, out)
        elif each.landmarks:
            heads = [head for head, own in enumerate(found.of_heads) if own == number]
            its = through_landmarks(found.attention, call.qkv, each, heads, flags, out)
            lost = its if lost is None else lost | its
        elif each.rank:
            _direct(_in_basis(call, each.rank), alternative, out)
        elif number > 1:
            _direct(call, alternative, out)
    return out, lost


def _first(
    call: _Call, theirs: BlockTable | None, flags: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    """Heads of flag 0 exactly, those of flag 1 in the first way, by one kernel for any flags."""
    flags = flags.to(torch.int32)
    if not call.found.direct:
        return _direct(call, Alternative(flags), out)
    first = call.found.ways[0].products
    return _direct(call, Alternative(flags, theirs, first, call.skip), out)


def _direct(call: _Call, alternative: Alternative, out: torch.Tensor | None) -> torch.Tensor:
    """One launch of heads without means."""
    attention = call.found.attention
    return forward(
        attention.made_for,
        *call.qkv,
        call.operands,
        call.params,
        tiles=attention.tiles,
        precision=attention.precision,
        lse=call.lse,
        table=call.listed("exact"),
        alternative=alternative,
        out=out,
    )


def _in_basis(call: _Call, rank: int) -> _Call:
    """The same with queries and keys in the heads' bases of a rank."""
    first = 2 * call.found.ranks.index(rank)
    (of_heads, of_keys), (q, k, v) = call.bases[first : first + 2], call.qkv
    return dataclasses.replace(call, qkv=(turned(q, of_heads), turned(k, of_keys), v))


def _pooled(call: _Call, way: Way, flags: torch.Tensor, out: torch.Tensor) -> None:
    """The heads of a way with means."""
    attention = call.found.attention
    near, far = call.listed("near"), call.listed("far")
    assert near is not None
    assert far is not None
    fused_lowrank_attention(
        attention.made_for,
        *call.qkv,
        call.operands,
        call.params,
        near=near,
        far=FarTable(far.table, far.blocks),
        pooled=pooled(*call.qkv[1:], attention.tiles.keys, attention.tiles.keys // way.pooled),
        tiles=attention.tiles,
        precision=way.products,
        lse=call.lse,
        flags=flags,
        out=out,
    )


def _blocks(call: _Call) -> BlockTable | None:
    """Those of heads without means, as decided; None: the same as exact ones."""
    if "kept" not in call.tables:
        return call.listed("fixed")
    q, k, _ = call.qkv
    tables, attention = call.tables, call.found.attention
    seen = tables["kept"].expand(q.shape[0], *tables["kept"].shape)
    for number, selection in enumerate(call.found.selections):
        theirs = (call.numbers[SELECTION] == number)[:, None, None]
        spec = attention.made_for.spec
        whole = None if spec.mask == sympy.true else tables["whole"]
        chosen = selected_blocks(selection, q, k, spec.scale, tables["allowed"], whole)
        seen = torch.where(theirs, chosen | tables["forced"], seen)
    tile = (attention.tiles.rows, attention.tiles.keys)
    counts = tile_counts(call.found, q.shape[2], k.shape[2])
    return lists_of(spread(seen, tile, counts) & tables["tiles"], tables["cut"])


# -- audits ----------------------------------------------------------------------------------------


def _judged(
    call: _Call,
    out: torch.Tensor,
    tried: torch.Tensor,
    state: torch.Tensor,
    lost: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """(which heads are off, [B,H], None: nothing tells; whose sums count; sums [B,H,2]); lost: as
    `_computed` has it."""
    apart = tried & (call.numbers[WAY] > 0)
    if call.lse is not None:
        empty = torch.isneginf(call.lse).any(-1)
        lost = empty if lost is None else lost | empty
    lost = None if lost is None else apart & lost
    nothing = torch.zeros((*tried.shape, 2), dtype=torch.float64, device=tried.device)
    if not call.found.plan.rows:
        return lost, torch.zeros_like(tried), nothing
    at = audited_rows(state, call.qkv[0].shape[2], call.found.plan.rows)
    sums = _sums(call, out, at)
    finite = sums.isfinite().all(-1)
    errors = (sums[..., 0] / sums[..., 1].clamp(min=_LEAST_SUM)).sqrt()
    off = apart & ~(errors <= call.numbers[LIMIT])
    counted = tried & finite
    if lost is not None:
        off, counted = off | lost, counted & ~lost
    return off, counted, torch.where(counted[..., None], sums, nothing)


def audited_rows(state: torch.Tensor, rows: int, count: int) -> torch.Tensor:
    """int64 [R], as `kernels.audit.audited_rows` has them in the turn that a state is at."""
    count = min(count, rows)
    share = torch.remainder(state[0, Column.CALLS] * _GOLDEN, 1.0)
    parts = torch.arange(count, dtype=torch.float64, device=state.device)
    return ((parts + share) * rows / count).to(torch.int64).clamp(max=rows - 1)


def _sums(call: _Call, out: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The sums of |out - exact|^2 and |exact|^2 over some rows, float64 [B,H,2].

    Rows that are NaN in both are alike: so they are where a row has no key.
    """
    q, k, v = call.qkv
    audit = call.found.audit
    exact = decode(
        audit.made_for,
        q.index_select(2, at),
        k,
        v,
        [*call.operands, at],
        [*call.params, q.shape[2]],
        splits=audit.splits,
        tiles=audit.tiles,
        precision=audit.precision,
    ).to(torch.float64)
    wrong = out.index_select(2, at).to(torch.float64) - exact
    alike = exact.isnan() & out.index_select(2, at).isnan()
    parts = [torch.where(alike, 0.0, part).square().sum((-2, -1)) for part in (wrong, exact)]
    return torch.stack(parts, -1)
