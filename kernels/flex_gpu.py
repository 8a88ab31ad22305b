"""What flex_attention needs on GPUs only: which problems it takes, and what the host gives a call.

Nothing in a call may wait for the device. Block lists and sizes are kept in pinned memory of the
host, and copied at each call. Were they kept on the device, those made while torch warms up a CUDA
graph would lie in the graph's memory, where only its results may stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from adaattn_compiler.kernels.flex_inductor import GPU_STRIDES
from adaattn_compiler.kernels.problem import Problem, Shape
from adaattn_compiler.kernels.through_op import code_refusal
from adaattn_compiler.spec import EmptyRow

# Rows and columns of a block of the mask.
BLOCK = (128, 128)
# As torch has sizes of tiles for.
_WIDEST_HEAD = 256
# CUDA's for the second axis of a grid.
_MOST_OF_GRID = 65535
_MOST_OF_32_BITS = 2**31 - 1


def has_whole_blocks(problem: Problem) -> bool:
    """Whether both lengths are known, and multiples of a block, that of the keys with the sink."""
    shape = problem.shape
    if shape.rows is None or shape.columns is None or problem.spec.sink is not None:
        return False
    return shape.rows % BLOCK[0] == 0 and shape.columns % BLOCK[1] == 0


def gpu_refusal(problem: Problem) -> str | None:
    """Why flex_attention cannot take a problem on a GPU; None where it can."""
    if problem.device != "cuda":
        return "only on CUDA"
    if problem.requires_grad:
        return "no backward here"
    if problem.spec.dropout_p > 0:
        return "no dropout"
    if problem.spec.empty_row not in (EmptyRow.IMPOSSIBLE, EmptyRow.ZERO):
        return "a row without a key is 0"
    return _gpu_shape_refusal(problem.shape) or code_refusal(problem)


def _gpu_shape_refusal(shape: Shape) -> str | None:
    for dim in (shape.head_dim, shape.value_dim):
        # The template takes others above 16 (16 is its least), but with loads of single elements.
        if dim % GPU_STRIDES or dim > _WIDEST_HEAD:
            return f"not for a head dimension of {dim}"
    batch, rows, _ = shape.hints
    if batch > _MOST_OF_GRID:
        return f"not for a batch of {batch}"
    if rows < BLOCK[0] and shape.columns is None:
        return "few rows, and block lists made on the host for each number of keys"
    return None


def is_wide(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an offset in one of the tensors, or in the result, may take more than 32 bits."""
    q_BHMD, _, v_BGNE = tensors[:3]
    elements = [q_BHMD.shape[:3].numel() * v_BGNE.shape[3]]
    for tensor in tensors:
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        elements.append(1 + sum((size - 1) * stride for size, stride in steps))
    return max(elements) > _MOST_OF_32_BITS


def with_aligned_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only where its strides are not what the kernel was compiled for."""
    *strides, last = tensor.stride()
    aligned = last == 1 and all(stride % GPU_STRIDES == 0 for stride in strides)
    return tensor if aligned else tensor.contiguous()


# Bytes: Inductor copies arguments that do not begin at a multiple of 16.
_ALIGNMENT = 16


@dataclass(frozen=True)
class StagedInputs:
    """Block lists and numbers of a call in one piece of the host's memory, to be copied at once."""

    memory: torch.Tensor  # bytes
    shapes: tuple[tuple[int, ...], ...]  # of the block lists
    count: int  # of the numbers, which come first

    @staticmethod
    def of(lists: Sequence[torch.Tensor], numbers: Sequence[int]) -> StagedInputs:
        lists = _of_one_width(lists)
        pieces = [torch.tensor([n]) for n in numbers] + [*lists]
        memory = torch.cat([_padded(piece) for piece in pieces])
        if torch.cuda.is_available():
            memory = memory.pin_memory()
        return StagedInputs(memory, tuple(tuple(t.shape) for t in lists), len(numbers))

    def on(self, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(block lists, numbers) on a device, views of one copy that nothing waits for."""
        copy = self.memory.to(device, non_blocking=True)
        start = self.count * _ALIGNMENT
        numbers = copy[:start].view(torch.int64)[:: _ALIGNMENT // 8].unbind()
        lists: list[torch.Tensor] = []
        for shape in self.shapes:
            end = start + 4 * math.prod(shape)
            lists.append(copy[start:end].view(torch.int32).view(shape))
            start = end + -end % _ALIGNMENT
        return lists, list(numbers)


def _padded(piece: torch.Tensor) -> torch.Tensor:
    """Its bytes, filled up so that what follows is aligned."""
    content = piece.contiguous().reshape(-1).view(torch.uint8)
    return F.pad(content, (0, -len(content) % _ALIGNMENT))


def _of_one_width(lists: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Block lists whose two tables of indices are equally wide (see `compile_flex`)."""
    counts, indices, full_counts, full_indices = lists
    width = max(indices.shape[-1], full_indices.shape[-1])
    wide, full_wide = (
        F.pad(table, (0, width - table.shape[-1])) for table in (indices, full_indices)
    )
    return [counts, wide, full_counts, full_wide]
