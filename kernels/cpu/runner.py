"""Runs the library of a spec, keeping the block lists of the lengths that it has met."""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import sympy
import torch

from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.cpu.call import (
    DONE,
    NO_MEMORY,
    NOT_FINITE,
    Arguments,
    Judgement,
    Plan,
    backward,
    decided,
    forward,
    guard,
)
from adaattn_compiler.kernels.cpu.dropout import dropped_by_hash
from adaattn_compiler.kernels.cpu.library import library
from adaattn_compiler.kernels.cpu.plans import (
    BLOCK,
    check_counts,
    check_flags,
    check_plan,
    check_state,
    every_block,
    lists_of,
    with_plan,
)
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
from adaattn_compiler.spec import AttentionSpec

# Up to so many rows the library finds for itself which blocks are attended to (decode.h): a cache
# that grows has another length in each call.
FEW_ROWS = 8
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
    return text_of(configuration_of(problem, mixed))


def text_of(made_for: Configuration) -> str:
    """What a library is generated for, as `plan_of` has it."""
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
        checked: bool = False,
    ) -> torch.Tensor:
        """[B,H,M,E], laid out as [B,M,H,E]; ValueError for tensors that it was not made for.

        plan: other block lists, biases, precision and skipping than the spec's own; checked:
        whether it is known to fit. seed: of dropout. lse, statistics, skipped: to be written (see
        Arguments).
        """
        self.check(q_BHMD, k_BGND, v_BGNE, operands)
        batch, heads, rows, _ = q_BHMD.shape
        given_plan = plan
        if plan is None:
            plan = self._forward_plan(rows, k_BGND.shape[2], params)
        elif not checked:
            check_plan(plan, (batch, heads, rows, k_BGND.shape[2]), self.made_for.mixed)
        if skipped is not None:
            check_counts(skipped, (batch, heads))
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
                spec, extra = with_plan(spec, extra, given_plan, sizes)
            dropped = dropped_by_hash(spec.dropout_p, seed, rows)
            return attention_by_rows(
                q_BHMD, k_BGND, v_BGNE, extra, params, spec, lse=lse, dropped=dropped
            )
        return out

    def guard(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bounds: Sequence[torch.Tensor],
        state: torch.Tensor,
        checked: bool = False,
    ) -> torch.Tensor:
        """Whether the statistics of q, k and v are within bounds: int32 [B,H], 1 or 0, -2 where
        the state says that the head is demoted. bounds: low and high, contiguous float32 [9,H]
        (kernels/envelope.py). checked: whether tensors are known to fit (`check`)."""
        if not checked:
            self.check(q, k, v, None)
        batch, heads = q.shape[:2]
        check_state(state, heads)
        if not (q.numel() and k.numel()):
            return torch.zeros((batch, heads), dtype=torch.int32)
        flags = torch.empty((batch, heads), dtype=torch.int32)
        qkv = (with_unit_stride(q), with_unit_stride(k), with_unit_stride(v))
        guard(self._library, qkv, bounds, state, flags)
        return flags

    def decided(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        plan: Plan,
        flags: torch.Tensor,
        judgement: Judgement,
        state: torch.Tensor,
        checked: bool = False,
    ) -> torch.Tensor | None:
        """[B,H,M,E], laid out as [B,M,H,E]: each head by the plan or exactly, as flags (int32
        [B,H], 1 by the plan) and an audit have it; what happened is added to the state.

        None, and the state as it was, where something is not finite. checked: as of `guard`.
        """
        if not checked:
            self.check(q, k, v, operands)
        batch, heads, rows, _ = q.shape
        check_flags(flags, state, (batch, heads))
        out = q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)
        q, k, v = (with_unit_stride(tensor) for tensor in (q, k, v))
        given = Arguments(q, k, v, out, self._stored(operands), params, plan)
        status = decided(self._library, given, flags.contiguous(), judgement, state)
        return out if _is_done(status) else None

    def join(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        plan: Plan,
        out: torch.Tensor,
        lse: torch.Tensor,
        log_count: float = 0.0,
    ) -> bool:
        """Join what these keys give to out [B,H,M,E] and lse, float32 [B,H,M], which hold what
        others gave, as if all had been in one softmax. log_count: added to all scores, the
        logarithm of how many keys each of these stands for. Not for eight rows or fewer.

        False, out and lse then half written, where something is not finite.
        """
        self.check(q, k, v, operands)
        assert q.shape[2] > FEW_ROWS
        assert out.stride(-1) == 1
        q, k, v = (with_unit_stride(tensor) for tensor in (q, k, v))
        stored = self._stored(operands)
        given = Arguments(
            q, k, v, out, stored, params, plan, lse=lse, joins=True, log_count=log_count
        )
        return _is_done(forward(self._library, given))

    def audit(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
        places: Sequence[int],
    ) -> torch.Tensor:
        """The sums of |out - exact|^2 and |exact|^2 over some query rows, float64 [B,H,2].

        out: [B,H,M,E], as a call made it of the same tensors. places: at most eight rows. Rows
        without a key count as right; where something is not finite the sums are NaN.
        """
        assert out.stride(-1) == 1
        assert 0 < len(places) <= FEW_ROWS
        sums = torch.zeros(*out.shape[:2], 2, dtype=torch.float64)
        q, k, v = (with_unit_stride(tensor) for tensor in (q, k, v))
        plan = self._every_plan(k.shape[2])
        stored = self._stored(operands)
        given = Arguments(q, k, v, out, stored, params, plan, places=places, compared=sums)
        return sums if _is_done(forward(self._library, given)) else sums.fill_(float("nan"))

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
        self.check(*qkv, operands)
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
        if rows > FEW_ROWS:
            return self._exact_plan(rows, columns, params)
        return self._every_plan(columns)

    def _every_plan(self, columns: int) -> Plan:
        """For few rows: every key, for the library to see which are attended to."""
        blocks = -(-columns // BLOCK[1])
        masked = self.spec.mask != sympy.true
        return self._plans.get(blocks, lambda: Plan(*every_block(blocks, masked)))

    def _exact_plan(self, rows: int, columns: int, params: Sequence[int]) -> Plan:
        """The lists of the spec's own mask."""

        def made() -> Plan:
            return Plan(*lists_of(block_structure(self.spec.mask, rows, columns, *BLOCK, params)))

        return self._plans.get((rows, columns, *params), made)

    def check(
        self,
        q_BHMD: torch.Tensor,
        k_BGND: torch.Tensor,
        v_BGNE: torch.Tensor,
        operands: Sequence[torch.Tensor] | None,
    ) -> None:
        """The library checks nothing: what it was not made for would read wild memory.

        operands: None where they are not read.
        """
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
        if operands is None:
            return
        if len(operands) != len(self.spec.operands):
            raise ValueError(f"{len(operands)} operands instead of {len(self.spec.operands)}")
        for operand, kind in zip(operands, self.spec.operands, strict=True):
            if operand.dim() != kind.rank:
                raise ValueError(f"an operand of {operand.dim()} axes instead of {kind.rank}")


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
