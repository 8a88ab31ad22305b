"""`adaattn::triton_attention`: the generated kernel as an op that Inductor sees through.

In compiled code the op is gone: what is left are launches of user-defined Triton kernels, which
Inductor loads, launches, captures into CUDA graphs and keeps in its caches as its own. The plan is
text, so that a graph that holds it runs in any process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adaattn_compiler.kernels.triton.launch import forward
from adaattn_compiler.kernels.triton.plan import TritonPlan, table_of
from adaattn_compiler.kernels.triton.tables import BlockTable


@torch.library.triton_op("adaattn::triton_attention", mutates_args=())
def triton_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    tables: Sequence[torch.Tensor],
    plan: str,
) -> torch.Tensor:
    """Attention of q [B,H,M,D], k [B,G,N,D] and v [B,G,N,E] as a plan says: [B,H,M,E].

    operands and params are those of the plan's spec, tables those of `triton_tables` where the plan
    lists its blocks, else none. Returns memory laid out as [B,M,H,E]. Raises ValueError for text
    that is no plan, and for tensors that the plan is not for.
    """
    found = TritonPlan.deserialize(plan)
    check(found, q, k, v, operands, params)
    return forward(
        found.made_for,
        q,
        k,
        v,
        operands,
        params,
        tiles=found.tiles,
        precision=found.precision,
        table=_table(found, q, k, tables),
    )


@torch.library.custom_op("adaattn::triton_tables", mutates_args=())
def triton_tables(
    like: torch.Tensor, rows: int, columns: int, params: Sequence[int], plan: str
) -> list[torch.Tensor]:
    """The table of a plan's blocks for sizes that are known, on a tensor's device (BlockTable)."""
    table = table_of(TritonPlan.deserialize(plan), rows, columns, tuple(params))
    return [tensor.to(like.device, copy=True) for tensor in (table.table, table.blocks)]


@triton_tables.register_fake
def _fake_tables(
    like: torch.Tensor, rows: int, columns: int, params: Sequence[int], plan: str
) -> list[torch.Tensor]:
    table = table_of(TritonPlan.deserialize(plan), rows, columns, tuple(params))
    return [like.new_empty(t.shape, dtype=torch.int32) for t in (table.table, table.blocks)]


def _table(
    plan: TritonPlan, q: torch.Tensor, k: torch.Tensor, tables: Sequence[torch.Tensor]
) -> BlockTable | None:
    if not plan.listed:
        return None
    if len(tables) != 2:
        raise ValueError(f"{len(tables)} tables for a plan that lists its blocks: two are wanted")
    # That full blocks follow each other is a property of the sizes, which are known.
    known = table_of(plan, int(q.shape[2]), int(k.shape[2]), ())
    return BlockTable(tables[0], tables[1], known.full_run)


def check(
    plan: TritonPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
) -> None:
    """ValueError for what would read wild memory. Sizes known only at run time are the caller's."""
    spec = plan.made_for.spec
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4 or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}: four axes, "
                f"{q.dtype} on {q.device} are wanted, as q has"
            )
    heads, groups = q.shape[1], k.shape[1]
    if heads != groups * spec.group or v.shape[1] != groups or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} are not "
            f"[B,H,M,D], [B,H/{spec.group},N,D] and [B,H/{spec.group},N,E]"
        )
    same = ((q.shape[0], k.shape[0]), (k.shape[0], v.shape[0]), (k.shape[2], v.shape[2]))
    for here, there in same:
        if isinstance(here, int) and isinstance(there, int) and here != there:
            raise ValueError(
                f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} differ in B or N"
            )
    found = [str(operand.dtype).removeprefix("torch.") for operand in operands]
    ranks = [operand.dim() for operand in operands]
    if found != list(plan.made_for.dtypes) or ranks != [o.rank for o in spec.operands]:
        wanted = list(zip(plan.made_for.dtypes, (o.rank for o in spec.operands), strict=True))
        raise ValueError(f"operands {found} of {ranks} axes: {wanted} are wanted")
    if len(params) != spec.params:
        raise ValueError(f"{len(params)} run-time numbers instead of {spec.params}")
