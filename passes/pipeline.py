"""The way of a graph, on one screen.

    Dynamo graph -> expanded -> canonical view -> sites -> uses, gradients, validation -> rewritten

The bodies of higher-order ops (activation checkpointing) go the same way, each as a graph of its
own.

Every stage is a function from values to values. What goes wrong in one leaves the graph (or the
site) alone, with the reason; nothing here can fail a compilation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from adaattn_compiler.options import Options
from adaattn_compiler.passes.bodies import in_order, rewrite_bodies, with_bodies
from adaattn_compiler.passes.canonicalize import canonicalize
from adaattn_compiler.passes.choices import Chooser
from adaattn_compiler.passes.deadline import Deadline, OutOfTime
from adaattn_compiler.passes.expand import expand
from adaattn_compiler.passes.gradients import check_gradients
from adaattn_compiler.passes.lower import Lowered, lower
from adaattn_compiler.passes.match import match
from adaattn_compiler.passes.prove import prove_masks
from adaattn_compiler.passes.site import Refused
from adaattn_compiler.passes.symbols import settle, settle_sdpa, symbols_to_settle
from adaattn_compiler.passes.uses import check_uses
from adaattn_compiler.passes.validate import validate
from adaattn_compiler.spec import Refusal

log = logging.getLogger("adaattn_compiler")


@dataclass(frozen=True)
class Analysis:
    """A graph after the passes.

    graph_module: the rewritten graph, or None where the original is to be used.
    results: what became of each attention that was seen.
    assumes: inputs whose values the rewriting relies on.
    states: the sites whose states it takes after its other inputs, in that order.
    failure: why the whole graph was left alone.
    seconds: time spent in each pass, and under "kernels" on choosing and building them.
    """

    graph_module: fx.GraphModule | None
    results: tuple[Lowered | Refused, ...] = ()
    assumes: frozenset[int] = frozenset()
    states: tuple[Lowered, ...] = ()
    failure: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def rewrite(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    chooser: Chooser | None = None,
) -> Analysis:
    """Find and lower the attentions of a Dynamo graph. Never raises.

    chooser: asked first how to compute a site; not in bodies of higher-order ops.
    """
    # What the passes run on fake tensors is not the user's to save (checkpointing counts it).
    with torch.autograd.graph.saved_tensors_hooks(_same, _same):
        return _rewritten(graph_module, inputs, options, chooser)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _rewritten(
    graph_module: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    chooser: Chooser | None,
) -> Analysis:
    timer = _Timer()
    deadline = Deadline.after(options.analysis_seconds)

    def rewrite_body(body: fx.GraphModule, known: Sequence[Any]) -> Analysis:
        return rewrite(body, known, options)

    try:
        expanded = timer("expand", expand, graph_module)
        bodies = timer("bodies", rewrite_bodies, expanded, inputs, rewrite_body)
        timer("symbols", settle_sdpa, expanded.graph)
        view = timer("canonicalize", canonicalize, expanded, inputs, deadline)
        found = timer("match", match, view)
        if settle(expanded.graph, symbols_to_settle(found)):
            view = timer("canonicalize", canonicalize, expanded, inputs, deadline)
            found = timer("match", match, view)
        found = timer("uses", check_uses, view, found)
        found = timer("gradients", check_gradients, view, found)
        if options.validate:
            found = timer("validate", validate, view, found)
            found = timer("prove", prove_masks, view, found)
        rewritten = timer("lower", lower, expanded, view, found, options, chooser)
        results = in_order(rewritten.results, bodies, expanded.graph)
        # Where nothing was lowered in it, the graph as it was before its calls were expanded.
        outcome = with_bodies(graph_module, rewritten.graph_module, bodies)
    except Refusal as refusal:
        return Analysis(None, failure=str(refusal), seconds=timer.seconds)
    except OutOfTime as error:
        # The first line: torch appends where in its own run of the graph that was.
        failure = f"{str(error).splitlines()[0]}; raise analysis_seconds to go on for longer"
        log.warning("the graph goes to Inductor as it is: %s", failure)
        return Analysis(None, failure=failure, seconds=timer.seconds)
    except Exception as error:
        log.warning("analysis failed, the graph goes to Inductor as it is: %r", error)
        log.debug("where analysis failed", exc_info=True)
        return Analysis(None, failure=f"analysis failed: {error!r}", seconds=timer.seconds)
    lowered = [result for result in rewritten.results if isinstance(result, Lowered)]
    timer.split("lower", "kernels", sum(result.seconds for result in lowered))
    assumes = [result.site.assumes for result in lowered] + [body.assumes for body in bodies]
    return Analysis(
        outcome,
        results,
        frozenset().union(*assumes),
        () if outcome is None else rewritten.states,
        seconds=timer.seconds,
    )


class _Timer:
    """Runs passes and keeps their times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def split(self, whole: str, name: str, seconds: float) -> None:
        """Count a part of one pass under a name of its own."""
        self.seconds[whole] -= seconds
        self.seconds[name] = seconds

    def __call__(self, name: str, stage: Any, *args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return stage(*args)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
            log.debug("pass %s: %.1f ms", name, 1e3 * self.seconds[name])
