"""The Dynamo backend: `torch.compile(model, backend="adaattn")`.

A captured graph goes through the passes; what comes out goes to Inductor with the user's own
options. If anything of ours fails, Inductor gets the graph as it was.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaattn_compiler.options import parse_options
from adaattn_compiler.passes.decide import chooser_of
from adaattn_compiler.passes.lower import Lowered
from adaattn_compiler.passes.pipeline import Analysis, rewrite
from adaattn_compiler.passes.weights import GraphWeights
from adaattn_compiler.policy import Policy
from adaattn_compiler.records import SiteRecord, records
from adaattn_compiler.report import dump, log_sites
from adaattn_compiler.runtime.assumptions import Assumptions
from adaattn_compiler.runtime.states import ONLINE, BoundSite, BoundStates, StateKey

log = logging.getLogger("adaattn_compiler")

Compiled = Callable[..., Any]


def adaattn(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compile one Dynamo graph.

    mode and options are those of torch.compile; keys of `Options` are ours, all others Inductor's.
    Raises ValueError for an unknown option or a bad value of ours, and what Inductor raises for a
    mode or a value of its own that it does not take.
    """
    ours, inductors = parse_options(options)
    _settings(mode, inductors)  # a fault in these is the user's, not one of our graph
    if not ours.enabled:
        return _inductor(graph_module, example_inputs, mode, inductors)
    chooser = chooser_of(ours, graph_module, example_inputs)
    analysis = rewrite(graph_module, example_inputs, ours, chooser)
    sites = records(analysis)
    log_sites(sites, analysis.failure)
    _warn_of_idle_policy(ours.policy, sites)
    dump(graph_module, analysis, sites, ours.dump_dir)
    if analysis.graph_module is None:
        return _inductor(graph_module, example_inputs, mode, inductors)
    original = copy.deepcopy(graph_module) if analysis.assumes else graph_module
    states = states_of(analysis, graph_module, example_inputs, ours.policy)
    try:
        inputs = [*example_inputs, *states.of(example_inputs)]
        compiled = _inductor(analysis.graph_module, inputs, mode, inductors)
    except torch._dynamo.exc.RestartAnalysis:
        raise
    except Exception as error:
        log.warning("Inductor failed on the rewritten graph, it gets the original: %r", error)
        log.debug("where Inductor failed", exc_info=True)
        return _inductor(graph_module, example_inputs, mode, inductors)
    if analysis.states:
        compiled = WithStates(compiled, states)
    if not analysis.assumes:
        return compiled
    return Assumptions.of(
        analysis.assumes,
        example_inputs,
        compiled,
        lambda: _compiled_later(original, mode, inductors),
    )


def _warn_of_idle_policy(policy: Policy | None, sites: Sequence[SiteRecord]) -> None:
    """A policy that none of a graph's sites follows is likely to be another model's."""
    refused = [s.refused for s in sites if s.refused is not None and s.decision == "exact"]
    if policy is not None and refused and len(refused) == sum(site.lowered for site in sites):
        log.warning(
            "policy %s: none of the %d attentions of a graph follows it, they are exact (%s); "
            "`explain` says why of each",
            policy.key(),
            len(refused),
            refused[0],
        )


@dataclass(frozen=True)
class WithStates:
    """A compiled graph that takes the states of its sites after its other inputs."""

    compiled: Compiled
    states: BoundStates

    def __call__(self, *inputs: Any) -> Any:
        return self.compiled(*inputs, *self.states.of(inputs))


def states_of(
    analysis: Analysis,
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    policy: Policy | None,
) -> BoundStates:
    """The states of an analysis's sites."""
    weights = GraphWeights(graph_module, inputs)
    return BoundStates([_bound(site, weights, policy) for site in analysis.states], inputs)


def _bound(site: Lowered, weights: GraphWeights, policy: Policy | None) -> BoundSite:
    name, ordinal = site.key.name, site.key.ordinal
    decided = None if policy is None else policy.site(name, ordinal)
    return BoundSite(
        StateKey(ONLINE if policy is None else policy.key(), name, ordinal, site.choice.form),
        site.problem.shape.heads,
        site.problem.device,
        weights.places(name) or weights.places(""),
        None if decided is None else decided.weights,
    )


def _inductor(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    mode: str | None,
    options: dict[str, Any],
) -> Compiled:
    """What backend="inductor" would do with this graph and these settings."""
    compiled: Compiled = _settings(mode, options)(graph_module, inputs)
    return compiled


def _settings(mode: str | None, options: dict[str, Any]) -> Any:
    """torch's own wrapper of Inductor, which checks a mode and options when it is made."""
    if mode is None or not options:
        return torch._TorchCompileInductorWrapper(mode, options or None, None)
    wrapper = torch._TorchCompileInductorWrapper(mode, None, None)
    wrapper.apply_options(options)
    return wrapper


def _compiled_later(
    graph_module: fx.GraphModule, mode: str | None, options: dict[str, Any]
) -> Compiled:
    """What Inductor makes of a graph when it is called, Dynamo seeing to its sizes and guards."""

    def inductor(captured: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        return _inductor(captured, inputs, mode, options)

    compiled: Compiled = torch.compile(graph_module, backend=inductor)
    return compiled
