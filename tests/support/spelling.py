"""Attention written in many ways: what each must become, and how that is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from check import Outcome, assert_as_accurate, in_float64, run
from torch.overrides import TorchFunctionMode

from adaattn_compiler.options import Options
from adaattn_compiler.passes.lower import Lowered

B, H, M, N, D, E = 2, 3, 5, 7, 8, 6
SCALE = D**-0.5
INF = float("inf")
SDPA_ONLY = Options(kernels=("sdpa",))


def scored(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scaled products, written in one of the many ways."""
    return q @ k.transpose(-1, -2) * SCALE


def weighted(scores: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What follows the scores."""
    return torch.softmax(scores, -1) @ v


def lower_triangle(m: int, n: int) -> torch.Tensor:
    """Causal, the last query at the last key."""
    return torch.ones(m, n, dtype=torch.bool).tril(n - m)


@dataclass(frozen=True)
class Spelling:
    """One way to write attention.

    inputs: makes its arguments. mask: how the recovered mask is described. sites: how many there
    are. taken: whether the SDPA kernel can take it; if not, it must be matched and validated.
    spec: what must hold of each site's spec.
    """

    function: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    mask: str | None
    sites: int
    taken: bool
    dynamic: bool | None
    spec: Callable[[Any], bool] | None


class Spellings:
    """The spellings of one test module, added by decorating their functions."""

    def __init__(self) -> None:
        self.all: list[Spelling] = []

    def __call__(
        self,
        inputs: Callable[[], tuple[Any, ...]] | None = None,
        *,
        mask: str | None = "none",
        sites: int = 1,
        taken: bool = True,
        dynamic: bool | None = None,
        spec: Callable[[Any], bool] | None = None,
    ) -> Callable[[Any], Any]:
        def add(function: Any) -> Any:
            made = function() if isinstance(function, type) else function
            given = inputs or cross
            self.all.append(Spelling(made, given, mask, sites, taken, dynamic, spec))
            return function

        return add

    def parametrized(self) -> Any:
        """A decorator that runs a test for each spelling."""
        names = [getattr(s.function, "__name__", type(s.function).__name__) for s in self.all]
        assert len(set(names)) == len(names), "two spellings of one name"
        return pytest.mark.parametrize("spelling", self.all, ids=names)


def cross(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q [B,H,M,D], k [B,H,N,D], v [B,H,N,E]."""
    return tuple(torch.randn(B, H, *size, dtype=dtype) for size in ((M, D), (N, D), (N, E)))


def square(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """The same with M = N."""
    return tuple(torch.randn(B, H, N, size, dtype=dtype) for size in (D, D, E))


def with_extra(
    base: Callable[[], tuple[torch.Tensor, ...]], *extra: Callable[[], Any]
) -> Callable[[], tuple[Any, ...]]:
    """Inputs followed by others."""
    return lambda: (*base(), *(make() for make in extra))


def check_spelling(spelling: Spelling) -> Outcome:
    """Matched, validated, lowered where a kernel is there, and as accurate as eager."""
    inputs = spelling.inputs()
    outcome = run(spelling.function, *inputs, options=SDPA_ONLY, dynamic=spelling.dynamic)
    reasons = [site.reason for site in outcome.sites]
    assert len(outcome.sites) == spelling.sites, reasons
    for site in outcome.sites:
        if spelling.taken:
            assert site.lowered, site.reason
            assert spelling.mask is None or site.mask == spelling.mask
        else:
            assert site.reason is not None
            assert site.reason.startswith("no kernel can take it"), site.reason
    if spelling.spec is not None and spelling.taken:
        for result in outcome.analyses[0].results:
            assert isinstance(result, Lowered)
            assert spelling.spec(result.site.spec), result.site.spec
    compare(spelling.function, inputs, outcome)
    return outcome


def compare(function: Callable[..., Any], inputs: tuple[Any, ...], outcome: Outcome) -> None:
    """Every tensor of the result is as accurate as eager's."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), Float64():
            exact = in_float64(function)(*in_float64(inputs))
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, eager, wanted in zip(
        tensors(outcome.result), tensors(outcome.eager), tensors(exact), strict=True
    ):
        assert_as_accurate(ours, eager, wanted.double())


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested tuples."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)


class Float64(TorchFunctionMode):
    """Casts to a narrower floating-point type become casts to float64: what is meant, exactly."""

    _NARROW = (torch.float32, torch.bfloat16, torch.float16)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.double
        args = tuple(torch.float64 if _in(arg, self._NARROW) else arg for arg in args)
        kwargs = {
            key: torch.float64 if _in(value, self._NARROW) else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


def _in(value: Any, dtypes: tuple[torch.dtype, ...]) -> bool:
    return isinstance(value, torch.dtype) and value in dtypes
