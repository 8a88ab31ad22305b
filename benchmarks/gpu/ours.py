"""Our generated kernels, launched directly, with what compiled code would keep made once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Inputs, Tiling

Attention = Callable[..., Any]


def our_forward(tiling: Tiling) -> Callable[[Case, Inputs], Attention]:
    """The generated kernel; blocks by the mask's closed form, as where it is lowered to."""

    def make(case: Case, inputs: Inputs) -> Attention:
        from adaattn_compiler.kernels.triton.launch import forward

        made_for, tiles = _configured(case, tiling)
        device = inputs.qkv[0].device
        how: dict[str, Any] = {"lazy": tiling.lazy, "by_descriptor": tiling.by_descriptor}
        if tiling.persistent:
            how["programs"] = torch.cuda.get_device_properties(device).multi_processor_count
        if tiling.by_descriptor:
            _allow_scratch(device)

        def attention(q: Any, k: Any, v: Any, *operands: Any) -> Any:
            with _unseen():
                return forward(made_for, q, k, v, operands, tiles=tiles, **how)

        return attention

    return make


def our_decode(tiling: Tiling) -> Callable[[Case, Inputs], Attention]:
    """The generated kernels for few rows, with as many splits of the keys as the device is wide."""

    def make(case: Case, inputs: Inputs) -> Attention:
        from adaattn_compiler.kernels.triton.launch import Tiles
        from adaattn_compiler.kernels.triton.launch_decode import decode, splits_for
        from adaattn_compiler.kernels.triton.source import Configuration

        shape = case.shape
        tiles = Tiles(tiling.rows, tiling.keys, tiling.warps, tiling.stages)
        made_for = Configuration(
            case.form.spec, ("float32",) * case.form.operands, halves=case.dtype.itemsize == 2
        )
        width = torch.cuda.get_device_properties(inputs.qkv[0].device).multi_processor_count
        splits = splits_for(shape.batch, shape.kv_heads, shape.columns, width)

        def attention(q: Any, k: Any, v: Any, *operands: Any) -> Any:
            with _unseen():
                return decode(made_for, q, k, v, operands, splits=splits, tiles=tiles)

        return attention

    return make


def our_backward(tiling: Tiling) -> Callable[[Case, Inputs], Attention]:
    """The generated kernels, forward with this tiling, and backward with tiles of its own."""

    def make(case: Case, inputs: Inputs) -> Attention:
        from adaattn_compiler.kernels.triton.launch import forward
        from adaattn_compiler.kernels.triton.launch_backward import backward, backward_tiles

        made_for, tiles = _configured(case, tiling)
        theirs = backward_tiles(case.shape.dim, case.shape.dim, case.dtype)

        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
                statistics = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
                with _unseen():
                    out = forward(made_for, q, k, v, (), tiles=tiles, statistics=statistics)
                ctx.save_for_backward(q, k, v, out, statistics)
                return out

            @staticmethod
            def backward(ctx: Any, grad: Any) -> Any:
                with _unseen():  # in a thread of its own, where that is not known yet
                    return tuple(backward(made_for, grad, *ctx.saved_tensors, (), tiles=theirs))

        both: Any = Attention.apply
        return lambda q, k, v: both(q, k, v)

    return make


def _configured(case: Case, tiling: Tiling) -> tuple[Any, Any]:
    """What the kernel is made for, and its tiles."""
    from adaattn_compiler.kernels.triton.launch import Tiles
    from adaattn_compiler.kernels.triton.source import Configuration

    made_for = Configuration(
        case.form.spec, ("float32",) * case.form.operands, halves=case.dtype.itemsize == 2
    )
    return made_for, Tiles(tiling.rows, tiling.keys, tiling.warps, tiling.stages)


def _unseen() -> AbstractContextManager[None]:
    """Launches as they are. Where torch's tracing may see them each takes the host a millisecond,
    more than the device may be kept waiting for. Private torch, which has it from 2.6 on."""
    try:
        from torch._library.triton import set_wrap_triton_enabled
    except ImportError:
        return nullcontext()
    return set_wrap_triton_enabled(False)


def _allow_scratch(device: torch.device) -> None:
    """Memory for descriptors, which compiled code has from Inductor."""
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(allocate)
