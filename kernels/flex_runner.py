"""Runs flex_attention compiled for a spec, keeping block lists of the lengths that it has met."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import sympy
import torch

from adaattn_compiler.kernels.blocks import block_lists, block_structure
from adaattn_compiler.kernels.evaluate import has_key, positions
from adaattn_compiler.kernels.flex_gpu import (
    StagedInputs,
    is_wide,
    with_aligned_strides,
)
from adaattn_compiler.kernels.flex_inductor import FlexConfig, FlexVariant, compile_flex
from adaattn_compiler.kernels.flex_reads import Reads
from adaattn_compiler.kernels.kept import Kept
from adaattn_compiler.kernels.on_device import is_recording
from adaattn_compiler.kernels.through_op import with_unit_stride
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, M, N, S, Where, b, h, k, param, q

# Block lists kept for this many different lengths.
_KEPT_LENGTHS = 16


class FlexRunner:
    """A compiled kernel with what the host makes for the lengths that it has met."""

    carries_nan = False

    def __init__(self, spec: AttentionSpec, config: FlexConfig, device: str) -> None:
        self.spec = spec
        self.config = config
        self.device = device
        self._mask, self._score = _with_sink_column(spec)
        self._mask_reads, self._score_reads = Reads.of(self._mask), Reads.of(self._score)
        self._calls: dict[FlexVariant, Callable[[list[torch.Tensor]], torch.Tensor]] = {}
        self._lists: Kept[tuple[torch.Tensor, ...]] = Kept(_KEPT_LENGTHS)
        self._staged: Kept[StagedInputs] = Kept(_KEPT_LENGTHS)
        self._recorded: dict[Hashable, StagedInputs] = {}
        self._lock = threading.RLock()
        self._compiled(_first_variant(device))

    def _compiled(self, variant: FlexVariant) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        with self._lock:
            if variant not in self._calls:
                self._calls[variant] = self._compile(variant)
            return self._calls[variant]

    def _compile(self, variant: FlexVariant) -> Callable[[list[torch.Tensor]], torch.Tensor]:
        kinds = [_STORED[operand.kind] for operand in self.spec.operands]
        mask_mod = self._mask_reads.modifier(self._mask)
        score_mod = self._score_reads.modifier(self._score)
        return compile_flex(
            self.config,
            variant,
            lambda score, b_, h_, q_, k_, *captured: score_mod(
                {S: score, b: b_, h: h_, q: q_, k: k_}, captured
            ),
            lambda b_, h_, q_, k_, *captured: _truth(
                mask_mod({b: b_, h: h_, q: q_, k: k_}, captured), q_
            ),
            self._score_reads.operands(kinds),
            self._mask_reads.operands(kinds),
        )

    def __call__(
        self,
        q_BHMD: torch.Tensor,
        k_BGND: torch.Tensor,
        v_BGNE: torch.Tensor,
        operands: Sequence[torch.Tensor],
        params: Sequence[int],
    ) -> torch.Tensor:
        """[B,H,M,E], laid out as [B,M,H,E]; ValueError for operands of another form or dtype."""
        spec = self.spec
        self._check(q_BHMD, k_BGND, v_BGNE, operands)
        stored = [
            operand.to(q_BHMD.device, _STORED[kind.kind])
            for operand, kind in zip(operands, spec.operands, strict=True)
        ]
        if spec.sink is not None:
            k_BGND, v_BGNE = (_with_zero_row(t) for t in (k_BGND, v_BGNE))
        rows, columns = q_BHMD.shape[2], k_BGND.shape[2]
        sizes = {M: rows, N: columns, **{param(i): value for i, value in enumerate(params)}}
        values = [
            *self._score_reads.values(stored, sizes),
            *self._mask_reads.values(stored, sizes),
        ]
        lengths = (rows, columns, *params)
        if self.device == "cpu":
            return self._on_cpu((q_BHMD, k_BGND, v_BGNE), lengths, values, stored)
        return self._on_gpu((q_BHMD, k_BGND, v_BGNE), lengths, values)

    def _on_cpu(
        self,
        qkv: tuple[torch.Tensor, ...],
        lengths: tuple[int, ...],
        values: Sequence[torch.Tensor | int],
        stored: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        out = self._compiled(_first_variant("cpu"))(
            [
                *(with_unit_stride(t) for t in qkv),
                *self._lists.get(lengths, lambda: self._block_lists(lengths)),
                *(torch.as_tensor(value) for value in values),
            ]
        )
        return _with_empty_rows(out, qkv[0], qkv[2], stored, lengths[2:], self.spec)

    def _on_gpu(
        self,
        qkv: tuple[torch.Tensor, ...],
        lengths: tuple[int, ...],
        values: Sequence[torch.Tensor | int],
    ) -> torch.Tensor:
        """Without waiting for the device, and without keeping anything on it."""
        device = qkv[0].device
        numbers = tuple(value for value in values if isinstance(value, int))
        lists, scalars = self._inputs(lengths, numbers).on(device)
        given = iter(scalars)
        aligned = [with_aligned_strides(t) for t in qkv]
        tables = [value for value in values if isinstance(value, torch.Tensor)]
        return self._compiled(FlexVariant(device, wide=is_wide([*aligned, *tables])))(
            [
                *aligned,
                *lists,
                *(value if isinstance(value, torch.Tensor) else next(given) for value in values),
            ]
        )

    def _inputs(self, lengths: tuple[int, ...], numbers: tuple[int, ...]) -> StagedInputs:
        def made() -> StagedInputs:
            with torch.device("cpu"):  # whatever the default is
                return StagedInputs.of(self._block_lists(lengths), numbers)

        staged = self._staged.get((lengths, numbers), made)
        if is_recording():  # what is recorded copies from there for as long as it is replayed
            self._recorded[lengths, numbers] = staged
        return staged

    def _check(
        self,
        q_BHMD: torch.Tensor,
        k_BGND: torch.Tensor,
        v_BGNE: torch.Tensor,
        operands: Sequence[torch.Tensor],
    ) -> None:
        """The generated code checks nothing: what it was not made for would read wild memory."""
        config = self.config
        if q_BHMD.device.type != self.device:
            raise ValueError(f"q is on {q_BHMD.device}, the kernel was made for {self.device}")
        lengths = (q_BHMD.shape[2], k_BGND.shape[2])
        if config.whole and any(n % block for n, block in zip(lengths, config.block, strict=True)):
            raise ValueError(f"lengths {lengths} are no multiples of {config.block}")
        wanted = (
            (config.heads, config.head_dim),
            (config.kv_heads, config.head_dim),
            (config.kv_heads, config.value_dim),
        )
        for name, tensor, (heads, dim) in zip("qkv", (q_BHMD, k_BGND, v_BGNE), wanted, strict=True):
            if tensor.dtype != config.dtype or (tensor.shape[1], tensor.shape[3]) != (heads, dim):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the kernel was made for "
                    f"{config.dtype} with {heads} heads of {dim}"
                )
        if len(operands) != len(self.spec.operands):
            raise ValueError(f"{len(operands)} operands instead of {len(self.spec.operands)}")

    def _block_lists(self, lengths: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        rows, columns, *params = lengths
        return block_lists(block_structure(self._mask, rows, columns, *self.config.block, params))


def _first_variant(device: str) -> FlexVariant:
    """For the threads that there are now, or the GPU that is the current one."""
    if device == "cpu":
        return FlexVariant(torch.device(device), threads=torch.get_num_threads())
    return FlexVariant(torch.device(device, torch.cuda.current_device()))


# How operands of each kind are stored for the kernel.
_STORED = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}


def _with_sink_column(spec: AttentionSpec) -> tuple[Any, Any]:
    """(mask, score) over the keys and, where there is a sink, one column more that is the sink.

    N is then the number of columns, one more than that of the keys.
    """
    if spec.sink is None:
        return spec.mask, spec.score
    at_sink = sympy.Ge(k, N - 1)
    mask, score, sink = (e.subs(N, N - 1) for e in (spec.mask, spec.score, spec.sink))
    mask, score = (_reading_at_keys(e) for e in (mask, score))
    return sympy.Or(at_sink, mask), Where(at_sink, sink, score)


def _reading_at_keys(expression: Any) -> Any:
    """An expression that reads no tensor beyond the keys: its value at the sink counts for
    nothing, but is computed."""
    last = sympy.Min(k, N - 2)
    return expression.replace(
        Load, lambda number, *index: Load(number, *(i.subs(k, last) for i in index))
    )


def _truth(value: Any, like: Any) -> Any:
    """A modifier's condition as a tensor."""
    return like >= 0 if value is True else like < 0 if value is False else value


def _with_zero_row(tensor: torch.Tensor) -> torch.Tensor:
    batch, heads, _, dim = tensor.shape
    return torch.cat([tensor, tensor.new_zeros(batch, heads, 1, dim)], 2)


def _with_empty_rows(
    out: torch.Tensor,
    like: torch.Tensor,
    v_BGNE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
) -> torch.Tensor:
    """Rows without a key, which the kernel leaves 0, as the spec has them."""
    if spec.empty_row in (EmptyRow.IMPOSSIBLE, EmptyRow.ZERO):
        return out
    batch, heads, rows, _ = out.shape
    empty = ~_has_key(spec, like, (batch, heads, rows, v_BGNE.shape[2]), operands, params)
    if not bool(empty.any()):
        return out
    if spec.empty_row is EmptyRow.NAN:
        return out.masked_fill(empty, float("nan"))
    mean = v_BGNE.mean(2, keepdim=True).repeat_interleave(spec.group, 1)
    return torch.where(empty, mean, out)


def _has_key(
    spec: AttentionSpec,
    like: torch.Tensor,
    sizes: tuple[int, int, int, int],
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    strip: int = 256,
) -> torch.Tensor:
    """Whether each row has a key, [B|1,H|1,M,1], the mask being looked at strip by strip."""
    values = positions((spec.mask, spec.bias), like, sizes)
    every = values.get(q)
    if every is None:
        return torch.as_tensor(has_key(spec, values, operands, params))
    strips = []
    for start in range(0, sizes[2], strip):
        values[q] = every[start : start + strip]
        strips.append(has_key(spec, values, operands, params, partial=True))
    return torch.cat(strips, -2)
