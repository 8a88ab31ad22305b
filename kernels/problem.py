"""What a kernel is asked to compute, and what it answers: the seam between passes and kernels.

A kernel is offered a `Problem` and says why it cannot take it, or nothing. If it is chosen,
`build` gives a function of (q, k, v, operands, sizes) made of torch functions, torch ops and
`adaattn::` ops only: it is called with tensors, and with proxies when a graph is written, so that
the graph holds nothing that torch's caches do not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from adaattn_compiler.spec import AttentionSpec


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem: an int, or None where it is known only at run time; hints beside."""

    batch: int | None
    heads: int
    kv_heads: int
    rows: int | None
    columns: int | None
    head_dim: int
    value_dim: int
    hints: tuple[int, int, int] = (1, 1, 1)  # batch, rows, columns as seen when compiling

    @property
    def dynamic(self) -> bool:
        """Whether any size is known only at run time."""
        return None in (self.batch, self.rows, self.columns)


@dataclass(frozen=True)
class Problem:
    """One attention to lower: q [B,H,M,D], k [B,G,N,D], v [B,G,N,E] of one dtype.

    operand_shapes, operand_dtypes and param_hints: sizes and types of the spec's operands, and its
    run-time numbers, as seen when compiling.
    """

    spec: AttentionSpec
    shape: Shape
    dtype: torch.dtype
    device: str
    requires_grad: bool
    operand_shapes: tuple[tuple[int, ...], ...] = ()
    param_hints: tuple[Any, ...] = ()
    operand_dtypes: tuple[torch.dtype, ...] = ()

    def dtypes_of_operands(self) -> tuple[torch.dtype, ...]:
        """Those that were seen, or else what operands of their kind usually have."""
        usual = {"bool": torch.bool, "int": torch.int64, "float": torch.float32}
        return self.operand_dtypes or tuple(usual[o.kind] for o in self.spec.operands)

    def work(self, attended: float = 1.0) -> float:
        """Operations of the two products over a share of all (row, key) pairs, or what reading q, k
        and v takes in the time of so many operations."""
        shape = self.shape
        batch, rows, columns = shape.hints
        dims = shape.head_dim + shape.value_dim
        products = 2.0 * batch * shape.heads * rows * columns * dims * attended
        elements = batch * (shape.heads * rows + shape.kv_heads * columns) * dims
        return max(products, _OPERATIONS_PER_BYTE * self.dtype.itemsize * elements)


def number_type(dtype: torch.dtype) -> torch.dtype:
    """The type of operands that are numbers: what torch computes in where a Python float meets a
    tensor of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Of one core: some 100 billion operations and 15 billion bytes a second.
_OPERATIONS_PER_BYTE = 7.0


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call: ints, or nodes of the graph that is being written.

    memo: what the calls of one graph may share (a mask that several layers use). state: of the
    site's heads (runtime/state.py), for kernels that keep one.
    """

    batch: Any
    heads: int
    rows: Any
    columns: Any
    params: tuple[Any, ...] = ()
    memo: dict[Any, Any] = field(default_factory=dict)
    state: Any = None

    @property
    def scores(self) -> tuple[Any, int, Any, Any]:
        """B, H, M, N."""
        return self.batch, self.heads, self.rows, self.columns


Attention = Callable[[Any, Any, Any, Sequence[Any], Sizes], Any]


class Kernel(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str:
        """As `explain` shows it and options name it."""

    @property
    def label(self) -> str:
        """The name, told apart from others of that name that take part beside it."""

    @property
    def only_measured(self) -> bool:
        """Whether only running it tells if it can: it is not chosen by estimate."""

    @property
    def seconds_to_build(self) -> float:
        """About how long building it takes; 0 where nothing has to be compiled."""

    def refusal(self, problem: Problem) -> str | None:
        """Why this kernel cannot take the problem; None where it can."""

    def cost(self, problem: Problem) -> float:
        """A rough guess of its time, in seconds: the order in which kernels are tried."""

    def build(self, problem: Problem) -> Attention:
        """The function that computes it."""

    def prepare(self, problem: Problem) -> None:
        """Start building it, where that takes long, without waiting; failures show in `build`."""

    def source(self, problem: Problem) -> str | None:
        """What is compiled for the problem, to be read; None where that is torch's own code."""
