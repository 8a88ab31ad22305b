"""Runs one kernel once on the device, for compute-sanitizer: `python sanitized.py CASE`.

Sizes are odd, so that every tile has an end to keep to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

ROWS, COLUMNS, DIM = 75, 131, 40


def _qkv(grad: bool = False, rows: int = ROWS) -> tuple[torch.Tensor, ...]:
    sizes = ((rows, 4), (COLUMNS, 2), (COLUMNS, 2))
    data = (
        torch.randn(2, length, heads, DIM, device="cuda", dtype=torch.bfloat16)
        for length, heads in sizes
    )
    return tuple(tensor.transpose(1, 2).requires_grad_(grad) for tensor in data)


def _spec() -> object:
    """Grouped heads, a window, capped scores and sinks."""
    import sympy

    from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, M, N, OperandSpec, S, h, k, q

    back = q + N - M - k
    return AttentionSpec(
        DIM**-0.5,
        5 * sympy.tanh(S / 5),
        sympy.And(sympy.Ge(back, 0), sympy.Ge(40 - back, 0)),
        EmptyRow.ZERO,
        sink=Load(0, h),
        group=2,
        operands=(OperandSpec("float", 1),),
    )


def forward_kernel() -> None:
    from adaattn_compiler.kernels.triton.launch import Tiles, forward
    from adaattn_compiler.kernels.triton.source import Configuration

    lse = torch.empty(2, 4, ROWS, device="cuda")
    sinks = torch.randn(4, device="cuda")
    made_for = Configuration(_spec(), ("float32",))
    forward(made_for, *_qkv(), [sinks], tiles=Tiles(64, 64, 4, 3), lse=lse)


def decoding_kernel() -> None:
    from adaattn_compiler.kernels.triton.launch_decode import decode
    from adaattn_compiler.kernels.triton.source import Configuration

    sinks = torch.randn(4, device="cuda")
    decode(Configuration(_spec(), ("float32",)), *_qkv(rows=3), [sinks], splits=3)


def backward_kernels() -> None:
    from adaattn_compiler.kernels.triton.launch import Tiles, forward
    from adaattn_compiler.kernels.triton.launch_backward import backward
    from adaattn_compiler.kernels.triton.source import Configuration

    made_for = Configuration(_spec(), ("float32",))
    sinks, qkv = torch.randn(4, device="cuda"), _qkv()
    statistics = torch.empty(2, 4, ROWS, 2, device="cuda")
    out = forward(made_for, *qkv, [sinks], tiles=Tiles(64, 64, 4, 2), statistics=statistics)
    backward(made_for, torch.randn_like(out), *qkv, out, statistics, [sinks], (), [True])


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = 5 * torch.tanh(q @ k.transpose(-1, -2) * (DIM**-0.5 / 5))
    return scores.softmax(-1) @ v


def compiled_model() -> None:
    with torch.no_grad():
        torch.compile(_attention, backend="adaattn", options={"measure": False})(*_qkv())


CASES: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (forward_kernel, decoding_kernel, backward_kernels, compiled_model)
}

if __name__ == "__main__":
    torch.manual_seed(0)
    CASES[sys.argv[1]]()
    torch.cuda.synchronize()
