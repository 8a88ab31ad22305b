"""A model with its inputs: what one call of a case is, and its result in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

Compiled = Callable[..., Any]


@dataclass(frozen=True)
class Workload:
    """training: a call is loss, backward, and the gradient of all parameters as one vector."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    training: bool = False

    def call(self, compiled: Compiled) -> torch.Tensor:
        """One call of the module, or of what it was compiled to."""
        if self.training:
            return self._gradient(compiled)
        with torch.no_grad():
            return _tensor_of(compiled(*self.args, **self.kwargs))

    def _gradient(self, compiled: Compiled) -> torch.Tensor:
        parameters = list(self.module.parameters())
        for parameter in parameters:
            parameter.grad = None
        compiled(*self.args, **self.kwargs).backward()
        return torch.cat([parameter.grad.flatten() for parameter in parameters])

    def to(self, dtype: torch.dtype) -> Workload:
        """With parameters, buffers and inputs of that type; integers stay."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if _is_floating(value) else value

        return Workload(
            self.module.to(dtype),
            tuple(cast(value) for value in self.args),
            {name: cast(value) for name, value in self.kwargs.items()},
            self.training,
        )

    def exact(self) -> torch.Tensor:
        """The result in float64, from the same (rounded) weights and inputs."""
        copy = Workload(deepcopy(self.module), self.args, self.kwargs, self.training)
        doubled = copy.to(torch.float64)
        with _in_float64():
            return doubled.call(doubled.module)


def _tensor_of(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


_NARROWER = (torch.float32, torch.bfloat16, torch.float16)


class _NoNarrowing(TorchFunctionMode):
    """Casts that a model writes (softmax in float32, say) go to float64 instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        widened = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*(_widened(arg) for arg in args), **widened)


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROWER else value


@contextmanager
def _in_float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _NoNarrowing():
            yield
    finally:
        torch.set_default_dtype(default)


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    """The greatest absolute difference; NaN in the same place is none."""
    difference = (result.double() - exact).abs()
    agree = torch.isnan(result) & torch.isnan(exact)
    return float(difference.masked_fill(agree, 0.0).max())
