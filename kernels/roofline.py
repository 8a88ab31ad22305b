"""What an attention must do at least, counted, and how long a device takes for it.

Counted for a kernel that keeps scores on the chip: products and exponentials of the blocks that the
mask leaves, q and the result once, k and v once for each block of query rows. What is read again is
read from memory where the keys and values of the heads that run at a time do not fit into the last
cache. Source: Williams et al., "Roofline: an insightful visual performance model", 2009.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from adaattn_compiler.kernels.blocks import block_structure, density
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.target import DeviceTarget


@dataclass(frozen=True)
class Work:
    """Of one call: operations of products, exponentials, and bytes.

    least_bytes: each tensor once. tile_bytes: what the programs read and write, from wherever.
    resident_bytes: keys and values of one head. density: the share of blocks that the mask leaves.
    """

    dtype: str
    operations: float
    exponentials: float
    least_bytes: float
    tile_bytes: float
    resident_bytes: float
    density: float

    def memory_bytes(self, target: DeviceTarget) -> float:
        """From and to the device's memory, one head's rows after another's."""
        return self.least_bytes if self.resident_bytes <= target.cache else self.tile_bytes

    def seconds(self, target: DeviceTarget) -> float:
        """At least: the longest of what can go on at the same time."""
        return max(self.times(target).values())

    def times(self, target: DeviceTarget) -> dict[str, float]:
        """Seconds of what can go on at the same time. ValueError: the target has no such dtype."""
        return {
            "products": self.operations / target.rate(self.dtype),
            "exponentials": self.exponentials / target.exponentials,
            "memory": self.memory_bytes(target) / target.bandwidth,
        }


def work_of(problem: Problem, block_rows: int, block_keys: int) -> Work:
    """What a fused kernel does with tiles of that size, at the sizes seen when compiling."""
    shape, size = problem.shape, problem.dtype.itemsize
    batch, rows, columns = shape.hints
    mask = problem.spec.mask
    attended = density(
        block_structure(mask, rows, columns, block_rows, block_keys, problem.param_hints)
    )
    scores = batch * shape.heads * rows * columns * attended
    dims = shape.head_dim + shape.value_dim
    row_bytes = batch * shape.heads * rows * dims * size
    key_bytes = batch * shape.kv_heads * columns * dims * size
    operands = zip(problem.operand_shapes, problem.dtypes_of_operands(), strict=False)
    read_beside = sum(math.prod(sizes) * dtype.itemsize for sizes, dtype in operands)
    row_blocks = -(-rows // block_rows)
    return Work(
        dtype=str(problem.dtype).removeprefix("torch."),
        operations=2.0 * scores * dims,
        exponentials=scores,
        least_bytes=row_bytes + key_bytes + read_beside,
        tile_bytes=row_bytes + row_blocks * attended * key_bytes * problem.spec.group + read_beside,
        resident_bytes=key_bytes / max(batch * shape.kv_heads, 1),
        density=attended,
    )


def eager_bytes(problem: Problem) -> float:
    """What the same takes written out: scores, scale, mask, softmax and weights each a tensor.

    Of each [B,H,M,N] in the tensors' dtype: written by the product, read and written by the scale,
    by what adds or fills a mask or bias, and by the softmax, read by the second product.
    """
    shape, size = problem.shape, problem.dtype.itemsize
    batch, rows, columns = shape.hints
    passes = 2 + 2 + 2 + (0 if problem.spec.plain else 2)
    dims = shape.head_dim + shape.value_dim
    elements = batch * (shape.heads * rows + shape.kv_heads * columns) * dims
    return size * (passes * batch * shape.heads * rows * columns + elements)
