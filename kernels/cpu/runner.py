"""Runs the library of a spec, keeping the block lists of the lengths that it has met."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import sympy
import torch

from adaattn_compiler.kernels.blocks import BlockStructure, block_structure
from adaattn_compiler.kernels.cpu.call import (
    DONE,
    NO_MEMORY,
    NOT_FINITE,
    SCORES_IN_BFLOAT16,
    VALUES_IN_BFLOAT16,
    Arguments,
    Plan,
    backward,
    forward,
)
from adaattn_compiler.kernels.cpu.dropout import dropped_by_hash
from adaattn_compiler.kernels.cpu.library import library
from adaattn_compiler.kernels.cpu.source import (
    Configuration,
    gradient_operands,
    gradient_source_of,
    source_of,
)
from adaattn_compiler.kernels.kept import Kept
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.reference import attention_by_rows, gradients_by_rows
from adaattn_compiler.kernels.through_op import with_unit_stride
from adaattn_compiler.spec import AttentionSpec, Load, OperandSpec, b, h, k, q

# Rows and keys of a block (forward.h, pack.h).
BLOCK = (64, 64)
# Up to so many rows the library finds for itself which blocks are attended to (decode.h): a cache
# that grows has another length in each call.
_FEW_ROWS = 8
_KEPT_LENGTHS = 16


def configuration_of(problem: Problem, mixed: bool = False) -> Configuration:
    """What a problem's library is generated for; mixed: see Configuration."""
    return Configuration(
        problem.spec,
        _name(problem.dtype),
        problem.shape.head_dim,
        problem.shape.value_dim,
        tuple(_name(dtype) for dtype in problem.dtypes_of_operands()),
        mixed,
    )


def plan_of(problem: Problem, mixed: bool = False) -> str:
    """A problem as text from which its runner can be made anew in any process."""
    made_for = configuration_of(problem, mixed)
    return repr(
        {
            "kernel": "cpp",
            "spec": made_for.spec.serialize(),
            "dtype": made_for.dtype,
            "dims": (made_for.head_dim, made_for.value_dim),
            "operands": made_for.operands,
            "mixed": made_for.mixed,
        }
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def cpp_runner(plan: str) -> CppRunner:
    """The runner of a plan, one for a process. Raises CannotBuild, NoCode."""
    fields = ast.literal_eval(plan)
    head_dim, value_dim = fields["dims"]
    made_for = Configuration(
        AttentionSpec.deserialize(fields["spec"]),
        fields["dtype"],
        head_dim,
        value_dim,
        fields["operands"],
        fields["mixed"],
    )
    return CppRunner(made_for)


class CppRunner:
    """A library with the plans of the lengths that it has met."""

    carries_nan = True

    def __init__(self, made_for: Configuration) -> None:
        self.spec = made_for.spec
        self.made_for = made_for
        self._library = library(source_of(made_for))
        self._dtype = getattr(torch, made_for.dtype)
        self._dtypes = tuple(getattr(torch, name) for name in made_for.operands)
        self._plans: Kept[Plan] = Kept(_KEPT_LENGTHS)

    def __call__(
        self,
        q_BHMD: torch.Tensor,
        k_BGND: torch.Tensor,
        v_BGNE: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        plan: Plan | None = None,
        seed: int = 0,
        lse: torch.Tensor | None = None,
        statistics: torch.Tensor | None = None,
        skipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B,H,M,E], laid out as [B,M,H,E]; ValueError for tensors that it was not made for.

        plan: other block lists, biases, precision and skipping than the spec's own. seed: of
        dropout. lse, statistics, skipped: to be written (see Arguments).
        """
        self._check(q_BHMD, k_BGND, v_BGNE, operands)
        batch, heads, rows, _ = q_BHMD.shape
        given_plan = plan
        if plan is None:
            plan = self._forward_plan(rows, k_BGND.shape[2], params)
        else:
            _check_plan(plan, (batch, heads, rows, k_BGND.shape[2]), self.made_for.mixed)
        if skipped is not None:
            _check_counts(skipped, (batch, heads))
            skipped.zero_()
        out = q_BHMD.new_empty(batch, rows, heads, v_BGNE.shape[3]).transpose(1, 2)
        arguments = Arguments(
            with_unit_stride(q_BHMD),
            with_unit_stride(k_BGND),
            with_unit_stride(v_BGNE),
            out,
            self._stored(operands),
            params,
            plan,
            seed,
            lse,
            statistics,
            skipped,
        )
        status = forward(self._library, arguments)
        if not _is_done(status):
            # Skipped and masked keys would not carry NaN where it belongs; written out, it does.
            if skipped is not None:
                skipped.zero_()
            spec, extra = self.spec, list(operands)
            if given_plan is not None:
                sizes = (rows, k_BGND.shape[2])
                spec, extra = _with_plan(spec, extra, given_plan, sizes)
            dropped = dropped_by_hash(spec.dropout_p, seed, rows)
            return attention_by_rows(
                q_BHMD, k_BGND, v_BGNE, extra, params, spec, lse=lse, dropped=dropped
            )
        return out

    @functools.cached_property
    def differentiable(self) -> frozenset[int]:
        """The operands to which a gradient can flow."""
        return gradient_operands(self.spec)

    @functools.cached_property
    def _gradient_library(self) -> ctypes.CDLL:
        return library(gradient_source_of(self.made_for))

    def build_backward(self) -> None:
        """Build what `backward` needs. Raises CannotBuild, NoCode."""
        assert self._gradient_library

    def backward(
        self,
        grad_out: torch.Tensor,
        arguments: Arguments,
        wanted: Sequence[bool],
    ) -> list[torch.Tensor]:
        """The gradients of q, k and v, and of the operands that are wanted, as those are shaped.

        arguments: with out and statistics as the forward pass left them; its plan is not read.
        """
        qkv = (arguments.q, arguments.k, arguments.v)
        operands = arguments.operands
        self._check(*qkv, operands)
        plan = self._exact_plan(qkv[0].shape[2], qkv[1].shape[2], arguments.params)
        grads = [
            t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in qkv
        ]
        copies = [
            _gradient_copies(operand) if want else None
            for operand, want in zip(operands, wanted, strict=True)
        ]
        given = dataclasses.replace(
            arguments,
            q=with_unit_stride(arguments.q),
            k=with_unit_stride(arguments.k),
            v=with_unit_stride(arguments.v),
            out=with_unit_stride(arguments.out),
            operands=self._stored(operands),
            plan=plan,
        )
        status = backward(self._gradient_library, given, with_unit_stride(grad_out), grads, copies)
        if not _is_done(status):
            return gradients_by_rows(
                grad_out,
                qkv,
                operands,
                arguments.params,
                self.spec,
                wanted,
                dropped_by_hash(self.spec.dropout_p, arguments.seed, qkv[0].shape[2]),
            )
        found = zip(copies, operands, strict=True)
        return grads + [c.sum(0).to(o.dtype) for c, o in found if c is not None]

    def _stored(self, operands: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            with_unit_stride(operand.to(dtype))
            for operand, dtype in zip(operands, self._dtypes, strict=True)
        ]

    def _forward_plan(self, rows: int, columns: int, params: Sequence[int]) -> Plan:
        if rows > _FEW_ROWS:
            return self._exact_plan(rows, columns, params)
        blocks = -(-columns // BLOCK[1])
        masked = self.spec.mask != sympy.true
        return self._plans.get(blocks, lambda: Plan(*_every_block(blocks, masked)))

    def _exact_plan(self, rows: int, columns: int, params: Sequence[int]) -> Plan:
        """The lists of the spec's own mask."""

        def made() -> Plan:
            return Plan(*lists_of(block_structure(self.spec.mask, rows, columns, *BLOCK, params)))

        return self._plans.get((rows, columns, *params), made)

    def _check(
        self,
        q_BHMD: torch.Tensor,
        k_BGND: torch.Tensor,
        v_BGNE: torch.Tensor,
        operands: Sequence[torch.Tensor],
    ) -> None:
        """The library checks nothing: what it was not made for would read wild memory."""
        head_dim, value_dim = self.made_for.head_dim, self.made_for.value_dim
        batch, heads, rows = q_BHMD.shape[:3]
        group, columns = heads // self.spec.group, k_BGND.shape[2]
        if heads % self.spec.group:
            raise ValueError(f"{heads} query heads in groups of {self.spec.group}")
        wanted = (
            ("q", q_BHMD, (batch, heads, rows, head_dim)),
            ("k", k_BGND, (batch, group, columns, head_dim)),
            ("v", v_BGNE, (batch, group, columns, value_dim)),
        )
        for name, tensor, shape in wanted:
            if tensor.dtype != self._dtype or tensor.shape != shape:
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the kernel was made for "
                    f"{self._dtype} {shape}"
                )
        if len(operands) != len(self.spec.operands):
            raise ValueError(f"{len(operands)} operands instead of {len(self.spec.operands)}")
        for operand, kind in zip(operands, self.spec.operands, strict=True):
            if operand.dim() != kind.rank:
                raise ValueError(f"an operand of {operand.dim()} axes instead of {kind.rank}")


def _with_plan(
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


def _is_done(status: int) -> bool:
    """False where something is NaN or infinite."""
    if status == NO_MEMORY:
        raise MemoryError("no memory for the packed queries, keys and values")
    assert status in (DONE, NOT_FINITE)
    return status == DONE


# Gradients of operands up to this many elements have a copy for each thread.
_COPIED_ELEMENTS = 1 << 20


def _gradient_copies(operand: torch.Tensor) -> torch.Tensor:
    """Zeros for an operand's gradient [copies, *shape]: see GradientSums in gradients.h."""
    if operand.numel() > _COPIED_ELEMENTS:
        return torch.zeros(1, *operand.shape)
    return torch.zeros(torch.get_num_threads(), *operand.shape, dtype=torch.float64)


def lists_of(structure: BlockStructure) -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets, blocks) of a Plan, for every batch item and head alike."""
    seen = structure.partial | structure.full
    counts = seen.sum(-1, dtype=torch.int32)
    offsets = torch.zeros(1, 1, len(counts) + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[0, 0, 1:])
    row, column = seen.nonzero(as_tuple=True)
    return offsets, (2 * column + structure.partial[row, column]).to(torch.int32)


def _every_block(blocks: int, masked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(offsets, blocks) of a Plan for one block of rows that may meet every key."""
    offsets = torch.tensor([[[0, blocks]]], dtype=torch.int32)
    return offsets, torch.arange(int(masked), 2 * blocks, 2, dtype=torch.int32)


def _check_plan(plan: Plan, sizes: tuple[int, int, int, int], mixed: bool) -> None:
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


def _check_counts(skipped: torch.Tensor, heads: tuple[int, int]) -> None:
    fits = skipped.shape == heads and skipped.is_contiguous() and skipped.device.type == "cpu"
    if skipped.dtype != torch.int64 or not fits:
        raise ValueError(
            f"skipped {skipped.dtype} {tuple(skipped.shape)}: contiguous int64 {heads}"
        )
