"""A call of a backward pass: what its kernels have in common, and how they are launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from adaattn_compiler.kernels.through_op import with_unit_stride
from adaattn_compiler.kernels.triton.launch import (
    Tiles,
    broadcast_strides,
    launchable,
    operand_arguments,
)
from adaattn_compiler.kernels.triton.source import Configuration
from adaattn_compiler.kernels.triton.tables import BlockTable
from adaattn_compiler.spec import M, N, param


@dataclass(frozen=True)
class Specialized:
    """A kernel by its name, with its tiles and constants."""

    kernel: str
    tiles: Tiles
    constants: Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """sizes: B, H, M, N; shared: the arguments that all kernels take."""

    made_for: Configuration
    module: ModuleType
    specialized: Mapping[str, Specialized]
    sizes: tuple[int, int, int, int]
    shared: Mapping[str, Any]

    def launch(self, name: str, programs: Any, **arguments: Any) -> None:
        """A kernel with as many programs."""
        found = self.specialized[name]
        kernel = launchable(getattr(self.module, found.kernel))
        kernel[(programs,)](
            **self.shared,
            **arguments,
            **found.constants,
            num_warps=found.tiles.warps,
            num_stages=found.tiles.stages,
        )

    def blocks(self, name: str) -> tuple[Any, Any]:
        """How many there are of rows and of keys."""
        its = self.specialized[name].tiles
        return -(-self.sizes[2] // its.rows), -(-self.sizes[3] // its.keys)

    def sums(self, count: int, length: int) -> torch.Tensor:
        """float32 [count, B, H, length], to be written."""
        return self.like("q").new_empty((count, *self.sizes[:2], length), dtype=torch.float32)

    def numbers(self) -> dict[Any, Any]:
        """The values of M, N and the run-time numbers."""
        params = {param(i): self.shared[name] for i, name in enumerate(self.made_for.params)}
        return {M: self.sizes[2], N: self.sizes[3], **params}

    def like(self, name: str) -> torch.Tensor:
        """An input, as kernels are given it."""
        tensor: torch.Tensor = self.shared[f"{name}_ptr"]
        return tensor


def shared_arguments(
    made_for: Configuration,
    given: Sequence[torch.Tensor],
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    terms: torch.Tensor,
) -> dict[str, Any]:
    """given: q, k, v and the gradient of the output; terms: float32 [3,B,H,M], of rows."""
    tensors = [with_unit_stride(tensor.to(given[0].dtype)) for tensor in given]
    axes = {"q": "bhm", "k": "bgn", "v": "bgn", "grad_out": "bhm"}
    found: dict[str, Any] = {}
    for (name, of), tensor in zip(axes.items(), tensors, strict=True):
        found |= {f"{name}_ptr": tensor, **stride_arguments(_SHORT.get(name, name), of, tensor)}
    found |= {"terms_ptr": terms, "terms_step": terms.stride(0)}
    found |= {"H": given[0].shape[1], "M": given[0].shape[2], "N": given[1].shape[2]}
    found |= zip(made_for.params, params, strict=True)
    found |= zip(made_for.operands, operand_arguments(operands), strict=True)
    return found


# What strides of gradients are called.
_SHORT = {"grad_out": "go", "grad_q": "gq", "grad_k": "gk", "grad_v": "gv", "out": "o"}


def stride_arguments(name: str, axes: str, tensor: torch.Tensor) -> dict[str, Any]:
    return {f"stride_{name}{axis}": tensor.stride(i) for i, axis in enumerate(axes)}


def table_arguments(table: BlockTable | None, device: torch.device) -> dict[str, Any]:
    if table is None:
        return {"table_ptr": None, "blocks_ptr": None, "stride_tb": 0, "stride_th": 0}
    by_batch_and_head = table.table.to(device)
    stride_b, stride_h = broadcast_strides(by_batch_and_head)
    return {
        "table_ptr": by_batch_and_head,
        "blocks_ptr": table.blocks.to(device),
        "stride_tb": stride_b,
        "stride_th": stride_h,
    }


def laid_out_like(tensor: torch.Tensor) -> torch.Tensor:
    batch, heads, length, dim = tensor.shape
    return tensor.new_empty(batch, length, heads, dim).transpose(1, 2)
