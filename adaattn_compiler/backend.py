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

from adaattn_compiler.explain import records
from adaattn_compiler.options import Options, parse_options
from adaattn_compiler.passes.pipeline import Analysis, rewrite
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
    Raises ValueError for an unknown option or a bad value.
    """
    ours, inductors = parse_options(options)
    if not ours.enabled:
        return _inductor(graph_module, example_inputs, mode, inductors)
    analysis = rewrite(graph_module, example_inputs, ours)
    _report(analysis)
    _dump(graph_module, analysis, ours)
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
    if mode is not None and options:
        wrapper = torch._TorchCompileInductorWrapper(mode, None, None)
        wrapper.apply_options(options)
    else:
        wrapper = torch._TorchCompileInductorWrapper(mode, options or None, None)
    compiled: Compiled = wrapper(graph_module, inputs)
    return compiled


def _compiled_later(
    graph_module: fx.GraphModule, mode: str | None, options: dict[str, Any]
) -> Compiled:
    """What Inductor makes of a graph when it is called, Dynamo seeing to its sizes and guards."""

    def inductor(captured: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
        return _inductor(captured, inputs, mode, options)

    compiled: Compiled = torch.compile(graph_module, backend=inductor)
    return compiled


def _report(analysis: Analysis) -> None:
    """One line in the log for each site, and one for a graph that was left alone."""
    if analysis.failure is not None:
        log.info("graph left to Inductor: %s", analysis.failure)
    for site in records(analysis):
        if site.lowered:
            log.info(
                "%s: %s, mask %s -> %s (%s)",
                site.name,
                site.spelling,
                site.mask,
                site.kernel,
                site.why,
            )
        else:
            log.info("%s: %s, left to Inductor: %s", site.name, site.spelling, site.reason)


def _dump(graph_module: fx.GraphModule, analysis: Analysis, options: Options) -> None:
    """The graph before and after, where the user asked for it."""
    if options.dump_dir is None:
        return
    try:
        options.dump_dir.mkdir(parents=True, exist_ok=True)
        number = len(list(options.dump_dir.glob("graph_*_before.txt")))
        (options.dump_dir / f"graph_{number}_before.txt").write_text(str(graph_module.graph))
        if analysis.graph_module is not None:
            (options.dump_dir / f"graph_{number}_after.txt").write_text(
                str(analysis.graph_module.graph)
            )
    except OSError as error:
        log.warning("graphs could not be written to %s: %s", options.dump_dir, error)
