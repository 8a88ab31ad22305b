"""How a test compares: capture, rewrite, run, and judge against float64 with eager as yardstick."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaattn_compiler.explain import SiteRecord, records
from adaattn_compiler.options import Options
from adaattn_compiler.passes.pipeline import Analysis, rewrite


@dataclass(frozen=True)
class Outcome:
    """What the passes made of a function, and the error of what they made."""

    analyses: tuple[Analysis, ...]
    sites: tuple[SiteRecord, ...]
    result: Any
    eager: Any

    @property
    def graph(self) -> str:
        """The rewritten graph (of the first graph), as text for FileCheck."""
        module = self.analyses[0].graph_module
        return "" if module is None else str(module.graph)


def compiled_without_inductor(
    function: Callable[..., Any],
    options: Options,
    seen: list[Analysis],
    dynamic: bool | None = None,
) -> Callable[..., Any]:
    """The function as rewritten by the passes and run by torch, without Inductor."""

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        analysis = rewrite(graph_module, inputs, options)
        seen.append(analysis)
        return (analysis.graph_module or graph_module).forward

    return torch.compile(function, backend=backend, dynamic=dynamic)


def run(
    function: Callable[..., Any],
    *args: Any,
    options: Options | None = None,
    grad: bool = False,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Outcome:
    """Rewrite and run a function (or module) without Inductor."""
    torch.compiler.reset()
    seen: list[Analysis] = []
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        eager = function(*args, **kwargs)
        torch.manual_seed(1)
        result = compiled_without_inductor(function, options or Options(), seen, dynamic)(
            *args, **kwargs
        )
    sites = tuple(site for i, analysis in enumerate(seen) for site in records(analysis, i))
    for analysis in seen:
        assert analysis.failure is None, analysis.failure
    return Outcome(tuple(seen), sites, result, eager)


def in_float64(tree: Any) -> Any:
    """Floating-point tensors (or a module) as float64."""
    if isinstance(tree, torch.nn.Module):
        return copy.deepcopy(tree).double()
    if isinstance(tree, torch.Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, (list, tuple)):
        return type(tree)(in_float64(item) for item in tree)
    if isinstance(tree, dict):
        return {key: in_float64(value) for key, value in tree.items()}
    return tree


def assert_as_accurate(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """Our error against float64 is at most twice that of same-precision eager (and NaN alike)."""
    assert ours.shape == eager.shape
    assert ours.dtype == eager.dtype
    assert torch.equal(ours.isnan(), eager.isnan())
    scale = exact.nan_to_num().abs().max().item() if exact.numel() else 1.0
    tiny = 4 * torch.finfo(eager.dtype).eps * max(scale, 1e-30)
    error = _largest(ours.double() - exact)
    yardstick = _largest(eager.double() - exact)
    assert error <= 2 * yardstick + tiny, f"error {error:.3g}, eager's {yardstick:.3g}"


def _largest(difference: torch.Tensor) -> float:
    return difference.nan_to_num().abs().max().item() if difference.numel() else 0.0
