"""What happened at every attention of a model, and what would on another device.

`explain(model, *args, **kwargs)` captures and analyses a model as `torch.compile` would, without
Inductor, and returns a record for each attention that was seen. With `target="sm_90"` each record
says in addition what the kernel generated for that device takes: it need not be there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaattn_compiler.options import parse_options
from adaattn_compiler.passes.decide import chooser_of
from adaattn_compiler.passes.pipeline import rewrite
from adaattn_compiler.records import Asked, SiteRecord, decided_so_far, numbered, records
from adaattn_compiler.report import dump, log_sites, predictions, sources, table
from adaattn_compiler.target import DeviceTarget, target_named

_OTHER_OPTIONS = (
    "the model was compiled before, maybe with options: those are not taken over, pass options="
)
_DISABLED = "AdaAttn is disabled (enabled=False): every graph goes to Inductor"
_TRAINING = (
    "analysed for training (gradients are on): under torch.no_grad() other kernels may be chosen"
)
_NO_GRAPH = (
    "torch.compile captured no graph: all that the model calls is disabled for it, or it was "
    "compiled too often (torch.compiler.reset() forgets that)"
)
_NOT_RUN = (
    "stopped where the first graph would run, and the model breaks there: attentions after it are "
    "not seen (run=True goes on)"
)
_NO_TRITON = (
    "Triton is not installed: what would be generated for the target is not known (pip install "
    "triton; it compiles without a GPU)"
)
_FORWARD_ONLY = "figures for the target are of the forward pass"
_SOUGHT = "no attention found (a softmax between two matrix products, or an SDPA call)"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; `print` shows it as a table.

    sites: a record for each attention, in order.
    notes: on what was analysed, and on graphs that were left alone.
    graphs: how many graphs were captured.
    seconds: time of each pass, and under "kernels" of choosing and building them.
    failed: how many of the graphs could not be analysed (the notes say why).
    target: the name of the device that predictions are for, where one was asked for.
    """

    sites: tuple[SiteRecord, ...]
    notes: tuple[str, ...] = ()
    graphs: int = 1
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    failed: int = 0
    target: str | None = None

    def __str__(self) -> str:
        """Aligned tables of what was found and, for a target, of what it takes there; where they
        were asked for the sources, each once."""
        is_elsewhere = self.target is not None
        rows = [table(self.sites, self.graphs, is_elsewhere)] if self.sites else []
        if self.target is not None:
            rows += predictions(self.sites)
        return "\n".join([self._head(), *rows, *self.notes, *sources(self.sites)])

    def _head(self) -> str:
        graphs = f"{self.graphs} graph{'' if self.graphs == 1 else 's'}"
        if self.sites:
            lowered = sum(site.lowered for site in self.sites)
            return f"{lowered} of {len(self.sites)} attention sites lowered, {graphs}"
        return f"{_SOUGHT if self.failed < self.graphs else 'nothing was analysed'}, {graphs}"

    def to_json(self) -> str:
        """The same, for machines."""
        return json.dumps(dataclasses.asdict(self), indent=2)


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    source: bool = False,
    target: str | DeviceTarget | None = None,
    run: bool = True,
    **kwargs: Any,
) -> Explanation:
    """Capture and analyse `model(*args, **kwargs)` without compiling it.

        with torch.no_grad():
            explanation = explain(model, tokens, options={"kernels": "sdpa"})
        print(explanation)                             # a table
        [s.reason for s in explanation.sites if not s.lowered]

    Call it as the model will be called: with gradients on, only kernels with a backward can be
    chosen.

    The model runs once, uncompiled: what a call changes (counters of BatchNorm, caches, the state
    of random numbers) it changes here too. Kernels may be measured and built, and the measurements
    kept in `cache_dir`. In online mode the record of a site says what the compiled model has
    gathered or decided there by now, as `stats` does. What is compiled already stays so (before
    torch 2.13, which cannot keep compilations apart, `torch.compiler.reset()` is called).

    options, dynamic: as given to torch.compile. source: show the code that is generated for each
    site: C++, or Triton for a target. target: a GPU by name or capability ("H200", "sm_90"), or a
    `DeviceTarget`: what the attentions that are lowered here would take there, forward; kernels are
    compiled for it, nothing has to be there. run: False stops where the first graph would run, so
    that inputs may be of any size and of no value. Where the model has arguments of these names,
    wrap it: `explain(lambda x: model(x, dynamic=True), x)`.

    Raises ValueError for an unknown option or target, and what the model itself raises.
    """
    ours, _ = parse_options(options)
    device = target_named(target) if isinstance(target, str) else target
    if not isinstance(device, (DeviceTarget, type(None))):
        raise ValueError(f"target {target!r}: a name such as 'H200' or 'sm_90', or a DeviceTarget")
    asked = Asked(source, True, device)
    if not ours.enabled:
        return Explanation((), (_DISABLED,), 0)
    graphs: list[_Graph] = []

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        chooser = chooser_of(ours, graph_module, inputs)
        analysis = rewrite(graph_module, inputs, ours, chooser)
        so_far = decided_so_far(analysis, graph_module, inputs)
        sites = records(analysis, len(graphs), asked, so_far)
        log_sites(sites, analysis.failure)
        dump(graph_module, analysis, sites, ours.dump_dir)
        graphs.append(_Graph(sites, analysis.failure, analysis.seconds))
        forward: Callable[..., Any] = graph_module.forward if run else _stop
        return forward

    breaks = _breaks()
    with _apart() as settings, contextlib.suppress(_Stopped):
        torch.compile(model, backend=backend, dynamic=dynamic, **settings)(*args, **kwargs)
    notes = [_NOT_RUN] if not run and _breaks() > breaks else []
    if options is None and isinstance(model, torch._dynamo.OptimizedModule):
        notes.append(_OTHER_OPTIONS)
    return _explanation(graphs, notes, asked)


class _Stopped(BaseException):
    """Instead of a graph's results; no model catches it."""


def _stop(*_: Any) -> Any:
    raise _Stopped


def _breaks() -> int:
    """How many graph breaks Dynamo has counted."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


@dataclass(frozen=True)
class _Graph:
    """What the analysis of one graph said."""

    sites: tuple[SiteRecord, ...]
    failure: str | None
    seconds: Mapping[str, float]


@contextmanager
def _apart() -> Iterator[dict[str, Any]]:
    """Settings of torch.compile under which what is compiled already stays, and is not met.

    Dynamo's memory of sizes is set aside too: otherwise a length that differs from an earlier one
    would make that dimension dynamic, here and then for the user.
    """
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        torch.compiler.reset()
        try:
            yield {}
        finally:
            torch.compiler.reset()
        return
    from torch._dynamo.pgo import get_code_state

    sizes = get_code_state()
    kept = dict(sizes)
    sizes.clear()
    try:
        yield {"isolate_recompiles": True}
    finally:
        sizes.clear()
        sizes.update(kept)


def _explanation(graphs: Sequence[_Graph], notes: Sequence[str], asked: Asked) -> Explanation:
    sites = numbered(site for graph in graphs for site in graph.sites)
    seconds: dict[str, float] = {}
    for graph in graphs:
        for name, spent in graph.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
    failed = sum(graph.failure is not None for graph in graphs)
    found = (*_notes(graphs, sites), *notes, *_target_notes(sites, asked.target))
    found += tuple(_source_notes(sites, asked)) if asked.source else ()
    device = None if asked.target is None else asked.target.name
    return Explanation(sites, found, len(graphs), seconds, failed, device)


def _notes(graphs: Sequence[_Graph], sites: Sequence[SiteRecord]) -> Iterator[str]:
    for number, graph in enumerate(graphs):
        if graph.failure is not None:
            yield f"graph {number} was left to Inductor: {graph.failure}"
    if any(site.training for site in sites):
        yield _TRAINING
    if not graphs:
        yield _NO_GRAPH
    if len(graphs) > 1:
        yield (
            f"{len(graphs)} graphs: the model breaks; an attention across a break is not found "
            '(TORCH_LOGS="graph_breaks" says where and why)'
        )


def _target_notes(sites: Sequence[SiteRecord], target: DeviceTarget | None) -> Iterator[str]:
    if target is None or target.capability is None or not sites:
        return
    if importlib.util.find_spec("triton") is None:
        yield _NO_TRITON
    if any(site.training for site in sites):
        yield _FORWARD_ONLY


def _source_notes(sites: Sequence[SiteRecord], asked: Asked) -> Iterator[str]:
    """Why there is no code to show, each reason once."""
    missing: dict[str, list[str]] = {}
    for site in sites:
        if site.lowered and site.source is None:
            missing.setdefault(_sourceless(site, asked.target), []).append(site.name or "(root)")
    for reason, names in missing.items():
        which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        yield f"no code to show for {which}: {reason}"


def _sourceless(site: SiteRecord, target: DeviceTarget | None) -> str:
    if target is None or target.capability is None:
        return f"{site.kernel} is not generated from the attention"
    found = site.prediction
    reason = None if found is None else found.refusal or found.note
    return reason or f"nothing is generated for {target.name}"


__all__ = ["Explanation", "SiteRecord", "explain", "records"]
