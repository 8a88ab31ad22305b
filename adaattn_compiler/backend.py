"""The Dynamo backend: `torch.compile(model, backend="adaattn")`.

A captured graph goes through the passes; what comes out goes to Inductor with the user's own
options. If anything of ours fails, Inductor gets the graph as it was.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from adaattn_compiler.options import parse_options
from adaattn_compiler.passes.pipeline import rewrite
from adaattn_compiler.records import records
from adaattn_compiler.report import dump, log_sites
from adaattn_compiler.runtime.assumptions import Assumptions

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
    analysis = rewrite(graph_module, example_inputs, ours)
    sites = records(analysis)
    log_sites(sites, analysis.failure)
    dump(graph_module, analysis, sites, ours.dump_dir)
    if analysis.graph_module is None:
        return _inductor(graph_module, example_inputs, mode, inductors)
    original = copy.deepcopy(graph_module) if analysis.assumes else graph_module
    try:
        compiled = _inductor(analysis.graph_module, example_inputs, mode, inductors)
    except torch._dynamo.exc.RestartAnalysis:
        raise
    except Exception as error:
        log.warning("Inductor failed on the rewritten graph, it gets the original: %r", error)
        log.debug("where Inductor failed", exc_info=True)
        return _inductor(graph_module, example_inputs, mode, inductors)
    if not analysis.assumes:
        return compiled
    return Assumptions.of(
        analysis.assumes,
        example_inputs,
        compiled,
        lambda: _compiled_later(original, mode, inductors),
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
