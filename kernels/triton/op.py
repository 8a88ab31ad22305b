"""`adaattn::triton_attention`: the generated kernels as ops that Inductor sees through.

In compiled code the ops are gone: what are left are launches of user-defined Triton kernels, which
Inductor loads, launches, captures into CUDA graphs and keeps in its caches as its own. The plan is
text, so that a graph that holds it runs in any process. In training the forward pass also returns
each row's statistics, from which the backward one starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from adaattn_compiler.kernels.on_device import kept_on_device
from adaattn_compiler.kernels.triton.launch import forward
from adaattn_compiler.kernels.triton.launch_backward import backward
from adaattn_compiler.kernels.triton.launch_decode import decode
from adaattn_compiler.kernels.triton.plan import TritonPlan, tables_of
from adaattn_compiler.kernels.triton.readings import differentiable
from adaattn_compiler.kernels.triton.tables import BlockTable

# Of q, k and v.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Without Triton there is nothing to see through, and torch would warn of it for each op.
_op = torch.library.triton_op if find_spec("triton") else torch.library.custom_op


@_op("adaattn::triton_attention", mutates_args=())
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
    that is no plan, and for tensors that the plan is not for. Has no gradient.
    """
    return _forward(q, k, v, operands, params, tables, TritonPlan.deserialize(plan))


@_op("adaattn::triton_attention_training", mutates_args=())
def triton_attention_training(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    tables: Sequence[torch.Tensor],
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with a gradient: the result, and float32 statistics [B,H,M,2]."""
    statistics = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
    found = TritonPlan.deserialize(plan)
    if found.splits or found.backward is None:
        raise ValueError("the plan has no backward pass: it was made for inference")
    return _forward(q, k, v, operands, params, tables, found, statistics), statistics


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    tables: Sequence[torch.Tensor],
    plan: TritonPlan,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    check(plan, q, k, v, operands, params)
    if plan.splits:
        return decode(
            plan.made_for,
            q,
            k,
            v,
            operands,
            params,
            splits=plan.splits,
            tiles=plan.tiles,
            precision=plan.precision,
        )
    on_device = _on_device(plan, q, k, tables)
    return forward(
        plan.made_for,
        q,
        k,
        v,
        operands,
        params,
        tiles=plan.tiles,
        precision=plan.precision,
        statistics=statistics,
        table=on_device[0] if on_device else None,
    )


@_op("adaattn::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    statistics: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    tables: Sequence[torch.Tensor],
    wanted: Sequence[bool],
    plan: str,
) -> list[torch.Tensor]:
    """The gradients of q, k and v, and of the operands that are wanted, in this order.

    Those of q, k and v are laid out as [B,length,heads,dim]. Raises ValueError as the forward does.
    """
    found = TritonPlan.deserialize(plan)
    check(found, q, k, v, operands, params)
    on_device = _on_device(found, q, k, tables)
    return backward(
        found.made_for,
        grad_out,
        q,
        k,
        v,
        out,
        statistics,
        operands,
        params,
        wanted,
        tiles=found.backward,
        precision=found.precision,
        table=on_device[1] if on_device else None,
        key_table=on_device[2] if on_device else None,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, operands, params, tables, plan = inputs
    ctx.save_for_backward(q, k, v, *output, *operands, *tables)
    ctx.mark_non_differentiable(output[1])
    ctx.operands, ctx.tables, ctx.params, ctx.plan = len(operands), len(tables), params, plan


def _gradients(ctx: Any, grad_out: torch.Tensor, _: Any) -> tuple[Any, ...]:
    q, k, v, out, statistics, *rest = ctx.saved_tensors
    operands, tables = rest[: ctx.operands], rest[ctx.operands :]
    can = differentiable(TritonPlan.deserialize(ctx.plan).made_for.spec)
    needed = ctx.needs_input_grad[3]
    wanted = [i in can and bool(needed[i]) for i in range(ctx.operands)]
    found = triton_attention_backward(
        grad_out, q, k, v, out, statistics, operands, ctx.params, tables, wanted, ctx.plan
    )
    of_operands = list(found[3:])
    spread = [of_operands.pop(0) if want else None for want in wanted]
    # An empty list counts as one of tensors, one of numbers does not.
    nothing: list[Any] | None = None if ctx.params else []
    return (*found[:3], spread, nothing, [None] * ctx.tables, None)


triton_attention_training.register_autograd(_gradients, setup_context=_setup)


# -- tables ----------------------------------------------------------------------------------------


@torch.library.custom_op("adaattn::triton_tables", mutates_args=())
def triton_tables(like: torch.Tensor, rows: int, columns: int, plan: str) -> list[torch.Tensor]:
    """The tables of a plan's blocks for sizes that are known, on a tensor's device (BlockTable)."""
    return [part.clone() for part in _tables(like.device)(rows, columns, plan)]


def _parts_of_tables(rows: int, columns: int, plan: str) -> list[torch.Tensor]:
    found = tables_of(TritonPlan.deserialize(plan), rows, columns)
    return [part for table in found for part in _parts(table)]


# Tables of so many plans and lengths, some megabytes each at most.
_tables = kept_on_device(256, _parts_of_tables)


@triton_tables.register_fake
def _fake_tables(like: torch.Tensor, rows: int, columns: int, plan: str) -> list[torch.Tensor]:
    parts = _parts_of_tables(rows, columns, plan)
    return [like.new_empty(part.shape, dtype=torch.int32) for part in parts]


def _parts(table: BlockTable) -> tuple[torch.Tensor, torch.Tensor]:
    return table.table, table.blocks


def _on_device(
    plan: TritonPlan, q: torch.Tensor, k: torch.Tensor, tables: Sequence[torch.Tensor]
) -> list[BlockTable]:
    """What `triton_tables` made, with what is known of it by the sizes alone."""
    if not plan.listed:
        return []
    known = tables_of(plan, int(q.shape[2]), int(k.shape[2]))
    if len(tables) != 2 * len(known):
        raise ValueError(
            f"{len(tables)} tables for a plan that lists its blocks: the {2 * len(known)} of "
            "adaattn::triton_tables are wanted"
        )
    shapes = [part.shape for table in known for part in _parts(table)]
    if [table.shape for table in tables] != shapes:
        raise ValueError(f"tables of other sizes than {q.shape[2]} rows and {k.shape[2]} keys")
    pairs = zip(tables[::2], tables[1::2], known, strict=True)
    return [BlockTable(table, blocks, like.full_run) for table, blocks, like in pairs]


# -- what the kernels do not look at ---------------------------------------------------------------


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
    if q.dtype not in DTYPES:
        raise ValueError(f"q is {q.dtype}: the kernels take {', '.join(map(str, DTYPES))}")
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
    for operand in operands:
        if operand.device != q.device:
            raise ValueError(f"an operand is on {operand.device}, q on {q.device}")
    if len(params) != spec.params:
        raise ValueError(f"{len(params)} run-time numbers instead of {spec.params}")
