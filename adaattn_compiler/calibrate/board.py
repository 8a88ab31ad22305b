"""The attentions of a model in calibration: each site's call goes to whoever wants to see it.

The model is captured and analysed as it would be to run (so that sites, specs and problems are
those of later by construction); then its graph runs as it stands, without Inductor, and each site
calls the board's present handler with its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from adaattn_compiler.kernels.choose import Choice
from adaattn_compiler.kernels.cpu.kernel import CppKernel
from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.decided_kernel import decision_refusal
from adaattn_compiler.kernels.problem import Attention, Problem, Sizes
from adaattn_compiler.options import Options
from adaattn_compiler.passes.choices import Exact, SiteKey
from adaattn_compiler.passes.pipeline import rewrite
from adaattn_compiler.passes.site import Site
from adaattn_compiler.passes.weights import GraphWeights

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor], list[int]]
# What a site computes in the present run: of its key, problem, (q, k, v, operands, params).
Handler = Callable[[SiteKey, Problem, Tensors], torch.Tensor]


def exactly(key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
    """The handler that computes what the exact kernel does."""
    return cpp_runner(plan_of(problem))(*tensors)


class Board:
    """A compiled model whose sites can be watched and computed otherwise. Not for two threads.

    refused: why a site is not to be calibrated; weights: the fingerprint of its module's.
    """

    def __init__(self, model: Callable[..., Any], options: Options) -> None:
        self.refused: dict[SiteKey, str] = {}
        self.weights: dict[SiteKey, str | None] = {}
        self._options = options
        self._handler: Handler = exactly
        self._compiled = torch.compile(model, backend=self._backend)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], handler: Handler = exactly) -> Any:
        """The model's result, its sites computed by `handler`."""
        self._handler = handler
        with torch.no_grad():
            return self._compiled(*args, **kwargs)

    def call(self, key: SiteKey, problem: Problem, tensors: Tensors) -> torch.Tensor:
        """One site's result by the present handler."""
        return self._handler(key, problem, tensors)

    def _backend(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        weights = GraphWeights(graph_module, inputs)

        def chosen(key: SiteKey, site: Site, problem: Problem) -> Choice | Exact:
            self.weights[key] = weights.under(key.name)
            return self._chosen(key, problem)

        analysis = rewrite(graph_module, inputs, self._options, chosen)
        rewritten = analysis.graph_module
        return graph_module.forward if rewritten is None else rewritten.forward

    def _chosen(self, key: SiteKey, problem: Problem) -> Choice | Exact:
        refusal = CppKernel().refusal(problem) or decision_refusal(problem, ())
        if refusal is not None:
            self.refused[key] = refusal
            return Exact()
        return Choice(_Watched(self, key), "watched")


class _Watched:
    """A kernel whose call is the board's."""

    name = label = "watched"
    only_measured = False
    seconds_to_build = 0.0

    def __init__(self, board: Board, key: SiteKey) -> None:
        self._board = board
        self._key = key

    def refusal(self, problem: Problem) -> str | None:
        return None

    def cost(self, problem: Problem) -> float:
        return 0.0

    def prepare(self, problem: Problem) -> None:
        pass

    def source(self, problem: Problem) -> str | None:
        return None

    def build(self, problem: Problem) -> Attention:
        def watched(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            operands: list[torch.Tensor],
            params: list[int],
        ) -> torch.Tensor:
            if isinstance(q, FakeTensor):
                batch, heads, rows, _ = q.shape
                return q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)
            return self._board.call(self._key, problem, (q, k, v, operands, params))

        def attention(
            q_BHMD: Any, k_BGND: Any, v_BGNE: Any, operands: Sequence[Any], sizes: Sizes
        ) -> Any:
            given = (q_BHMD, k_BGND, v_BGNE, list(operands), list(sizes.params))
            return q_BHMD.tracer.create_proxy("call_function", watched, given, {})

        return attention
