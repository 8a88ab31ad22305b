"""Plans of a call (call.py): block lists of a structure, checks, and what a plan says as a spec."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import sympy
import torch

from adaattn_compiler.kernels.blocks import BlockStructure
from adaattn_compiler.kernels.cpu.call import SCORES_IN_BFLOAT16, VALUES_IN_BFLOAT16, Plan
from adaattn_compiler.runtime.state import Column
from adaattn_compiler.spec import AttentionSpec, Load, OperandSpec, b, h, k, q

# Rows and keys of a block (forward.h, pack.h).
BLOCK = (64, 64)


def lists_of(structure: BlockStructure) -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets, blocks) of a Plan, for every batch item and head alike."""
    return lists_by_head((structure.partial | structure.full)[None, None], structure.partial)


def lists_by_head(
    seen: torch.Tensor, partial: torch.Tensor, order: Order | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets, blocks) of a Plan whose heads see blocks of their own.

    seen: bool [B|1, H|1, row blocks, key blocks]; partial: which of them the mask cuts, expands to
    the same. order: of the heads that have one; the others' blocks ascend.
    """
    counts = seen.sum(-1, dtype=torch.int32)
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view(counts.shape)
    offsets = torch.cat([(ends - counts)[..., :1], ends], -1)
    partial = partial.expand_as(seen)
    if order is None:
        column = seen.nonzero()[:, 3]
    else:
        seen, partial = order.of(seen), order.of(partial)
        column = order.columns(seen)
    return offsets, (2 * column + partial[seen]).to(torch.int32)


@dataclass(frozen=True)
class Order:
    """In which order rows meet blocks of keys. heads: bool [H], whose blocks are in it. ranked:
    int64 [row blocks, key blocks], the numbers of the key blocks in that order."""

    heads: torch.Tensor
    ranked: torch.Tensor

    def padded(self) -> Order:
        """With one more head, whose blocks ascend."""
        return Order(torch.nn.functional.pad(self.heads, (0, 1)), self.ranked)

    def of(self, blocks: torch.Tensor) -> torch.Tensor:
        """[B, H, row blocks, key blocks] as the heads meet them."""
        theirs = blocks.gather(-1, self.ranked.expand_as(blocks))
        return torch.where(self.heads[:, None, None], theirs, blocks)

    def columns(self, seen: torch.Tensor) -> torch.Tensor:
        """The numbers of the blocks that are seen, one after another; seen: in this order."""
        _, head, row, place = seen.nonzero().unbind(1)
        return torch.where(self.heads[head], self.ranked[row, place], place)


def every_block(blocks: int, masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets, blocks) of a Plan for one block of rows that may meet every key."""
    offsets = torch.tensor([[[0, blocks]]], dtype=torch.int32)
    return offsets, torch.arange(int(masked), 2 * blocks, 2, dtype=torch.int32)


def check_plan(plan: Plan, sizes: tuple[int, int, int, int], mixed: bool) -> None:
    """ValueError where a plan does not fit a call."""
    batch, heads, rows, columns = sizes
    if plan.modes is not None:
        _check_modes(plan.modes, (batch, heads), mixed)
    if plan.skip is not None:
        _check_of_heads("skip", plan.skip, torch.float32, (batch, heads))
        if not bool((plan.skip > 0).all()):
            raise ValueError("skip must be above 0 for every head (inf: nothing is skipped)")
    lists, blocks, bias = plan.offsets, plan.blocks, plan.key_bias
    row_blocks, key_blocks = -(-rows // BLOCK[0]), -(-columns // BLOCK[1])
    lead = lists.shape[0] in (1, batch) and lists.shape[1] in (1, heads)
    if lists.dtype != torch.int32 or lists.stride(-1) != 1 or not lead:
        raise ValueError(
            f"offsets {lists.dtype} {tuple(lists.shape)}: int32 [B|1, H|1, blocks + 1]"
        )
    if lists.shape[2] != row_blocks + 1:
        raise ValueError(f"{lists.shape[2]} offsets for {row_blocks} blocks of query rows")
    if (
        bool((lists.diff(dim=-1) < 0).any())
        or int(lists.min()) < 0
        or int(lists.max()) > len(blocks)
    ):
        raise ValueError(f"offsets must ascend within the {len(blocks)} blocks")
    if blocks.dtype != torch.int32 or blocks.dim() != 1 or not blocks.is_contiguous():
        raise ValueError(f"blocks {blocks.dtype} {tuple(blocks.shape)}: a contiguous int32 vector")
    if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < 2 * key_blocks:
        raise ValueError(f"blocks must be below {2 * key_blocks}, twice the number of key blocks")
    if bias is not None:
        lead = bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
        if bias.dtype != torch.float32 or not lead or bias.shape[2] != columns:
            raise ValueError(f"key_bias {bias.dtype} {tuple(bias.shape)}: float32 [B|1, H|1, N]")
        if bias.stride(2) != 1:
            raise ValueError(f"key_bias has {bias.stride(2)} as its last stride: 1")


def _check_modes(modes: torch.Tensor, heads: tuple[int, int], mixed: bool) -> None:
    _check_of_heads("modes", modes, torch.int32, heads)
    every = SCORES_IN_BFLOAT16 | VALUES_IN_BFLOAT16
    if modes.numel() and not 0 <= int(modes.min()) <= int(modes.max()) <= every:
        raise ValueError(f"modes from {int(modes.min())} to {int(modes.max())}: 0 to {every}")
    if not mixed and bool(modes.any()):
        raise ValueError("bfloat16 in a plan: the kernel was not made for mixed precision")


def _check_of_heads(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    """ValueError unless there is one element for each head, or one that some share."""
    fits = tensor.dim() == 2 and all(
        size in (1, whole) for size, whole in zip(tensor.shape, heads, strict=True)
    )
    if tensor.dtype != dtype or not fits or tensor.device.type != "cpu":
        wanted = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)}: {wanted} [B|1, H|1]")


def check_counts(skipped: torch.Tensor, heads: tuple[int, int]) -> None:
    fits = skipped.shape == heads and skipped.is_contiguous() and skipped.device.type == "cpu"
    if skipped.dtype != torch.int64 or not fits:
        raise ValueError(
            f"skipped {skipped.dtype} {tuple(skipped.shape)}: contiguous int64 {heads}"
        )


def check_flags(flags: torch.Tensor, state: torch.Tensor, heads: tuple[int, int]) -> None:
    """ValueError unless there is a flag for each batch item and head, and a state for each head."""
    if flags.dtype != torch.int32 or flags.shape != heads:
        raise ValueError(f"flags {flags.dtype} {tuple(flags.shape)}: int32 {heads}")
    check_state(state, heads[1])


def check_state(state: torch.Tensor, heads: int) -> None:
    """ValueError unless there is a row for each head."""
    wanted = (heads, len(Column))
    if state.dtype != torch.float64 or state.shape != wanted or not state.is_contiguous():
        raise ValueError(f"state {state.dtype} {tuple(state.shape)}: contiguous float64 {wanted}")


def with_plan(
    spec: AttentionSpec, operands: list[torch.Tensor], plan: Plan, sizes: tuple[int, int]
) -> tuple[AttentionSpec, list[torch.Tensor]]:
    """A spec and operands that say what a plan adds: its blocks as a mask, its bias by key."""
    allowed = _attended(plan, sizes)
    at = len(operands)
    lead = [axis if size > 1 else 0 for axis, size in zip((b, h), allowed.shape, strict=False)]
    mask = sympy.And(spec.mask, sympy.Ne(Load(at, *lead, q, k), 0))
    score, kinds, found = spec.score, [OperandSpec("bool", 4)], [allowed]
    if plan.key_bias is not None:
        shape = plan.key_bias.shape
        lead = [axis if size > 1 else 0 for axis, size in zip((b, h), shape, strict=False)]
        score = score + Load(at + 1, *lead, k)
        kinds.append(OperandSpec("float", 3))
        found.append(plan.key_bias)
    added = dataclasses.replace(spec, mask=mask, score=score, operands=(*spec.operands, *kinds))
    return added, [*operands, *found]


def _attended(plan: Plan, sizes: tuple[int, int]) -> torch.Tensor:
    """Which keys a plan's lists let each row see: bool [B|1, H|1, M, N]."""
    batch, heads, ends = plan.offsets.shape
    allowed = torch.zeros(batch, heads, ends - 1, -(-sizes[1] // BLOCK[1]), dtype=torch.bool)
    for place, lists in enumerate(plan.offsets.flatten(0, 1).tolist()):
        for row, (start, end) in enumerate(itertools.pairwise(lists)):
            blocks = plan.blocks[start:end].long() >> 1
            allowed[place // heads, place % heads, row, blocks] = True
    wide = allowed.repeat_interleave(BLOCK[0], 2).repeat_interleave(BLOCK[1], 3)
    return wide[:, :, : sizes[0], : sizes[1]]
