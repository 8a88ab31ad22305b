"""Captures CUDA graphs under a policy, as cuda_capture.py does without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cuda_capture import Captured
from decided import PROVENANCE
from torch import fx
from torch._functorch.aot_autograd import aot_module_simplified
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from adaattn_compiler.decision import HeadDecision, SiteDecision
from adaattn_compiler.kernels.choose import Choice
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.options import Options
from adaattn_compiler.passes.choices import Exact, SiteKey
from adaattn_compiler.passes.decide import policy_chooser
from adaattn_compiler.passes.pipeline import Analysis, rewrite
from adaattn_compiler.passes.site import Site
from adaattn_compiler.policy import Envelope, Policy, Range, SitePolicy
from adaattn_compiler.runtime.state import new_state


class _AnyWeights:
    """No site's weights are known."""

    def under(self, name: str) -> None:
        return None


def site_policy(key: SiteKey, problem: Problem, heads: Sequence[HeadDecision]) -> SitePolicy:
    """These decisions for one site, whatever its statistics."""
    shape = problem.shape
    lengths = Range(1, 1 << 16)
    return SitePolicy(
        key.name,
        key.ordinal,
        problem.spec.key(),
        shape.kv_heads,
        shape.head_dim,
        shape.value_dim,
        str(problem.dtype).removeprefix("torch."),
        SiteDecision(tuple(heads)),
        Envelope(lengths, lengths, {"audit_error": (Range(0, 0.1),) * shape.heads}),
        (0.1,) * shape.heads,
        (None,) * shape.heads,
    )


def captured_as_decided(
    function: Callable[..., Any],
    *args: Any,
    heads: Sequence[HeadDecision],
    rows: int = 2,
    dynamic: bool | None = None,
) -> Captured:
    """Capture a function under a policy with these decisions for each of its sites."""
    torch.compiler.reset()
    analyses: list[Analysis] = []
    graphs: list[fx.GraphModule] = []

    def chosen(key: SiteKey, site: Site, problem: Problem) -> Choice | Exact:
        policy = Policy((site_policy(key, problem, heads),), PROVENANCE)
        return policy_chooser(policy, rows, _AnyWeights())(key, site, problem)

    def inductor(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph_module)
        forward: Callable[..., Any] = graph_module.forward
        return forward

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        with unset_fake_temporarily():  # as when Dynamo calls a backend
            analysis = rewrite(graph_module, inputs, Options(kernels=("triton",)), chosen)
        analyses.append(analysis)
        module = analysis.graph_module or graph_module
        found = [(site.problem.shape.heads, site.problem.device) for site in analysis.states]
        with detect_fake_mode(inputs):
            states = [new_state(*each) for each in found]
        run: Callable[..., Any] = aot_module_simplified(
            module,
            [*inputs, *states],
            fw_compiler=inductor,
            bw_compiler=inductor,
            inference_compiler=inductor,
        )
        return lambda *given: run(*given, *states)

    result = torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return Captured(tuple(analyses), tuple(graphs), result)
