"""What happened at every attention of a model.

`explain(model, *args, **kwargs)` captures and analyses a model as `torch.compile` would, without
Inductor, and returns a record for each attention that was seen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from adaattn_compiler.options import parse_options
from adaattn_compiler.passes.lower import Lowered
from adaattn_compiler.passes.pipeline import Analysis, rewrite
from adaattn_compiler.passes.site import Refused
from adaattn_compiler.predicates import describe


@dataclass(frozen=True)
class SiteRecord:
    """One attention.

    name: path of the module it is in; ordinal: its number within that module; kind: "attention";
    lowered: whether a kernel of ours or a chosen one computes it now; reason: why not, when not;
    spelling: how the model writes its softmax; mask: in words; kernel: what computes it; decision:
    how exactly ("exact" without a policy); shape: sizes as captured ("B1 H8 G2 M64 N64 D32").
    """

    name: str
    ordinal: int
    kind: str
    lowered: bool
    reason: str | None
    spelling: str
    mask: str | None
    kernel: str | None
    decision: str | None
    shape: str | None
    score: str | None = None
    why: str | None = None
    graph: int = 0


@dataclass(frozen=True)
class Explanation:
    """The sites of a model, in order; notes on graphs that were left alone; time of the passes."""

    sites: tuple[SiteRecord, ...]
    notes: tuple[str, ...] = ()
    graphs: int = 1
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """An aligned table."""
        lowered = sum(site.lowered for site in self.sites)
        head = f"{lowered} of {len(self.sites)} attention sites lowered, {self.graphs} graph(s)"
        rows = [_HEADER, *(_row(site) for site in self.sites)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([head, *(lines if self.sites else []), *self.notes])

    def to_json(self) -> str:
        """The same, for machines."""
        return json.dumps(dataclasses.asdict(self), indent=2)


_HEADER = ("site", "spelling", "mask", "shape", "kernel", "decision", "reason")


def _row(site: SiteRecord) -> tuple[str, ...]:
    name = site.name or "(root)"
    return (
        f"{name}#{site.ordinal}" if site.ordinal else name,
        site.spelling,
        site.mask or "-",
        site.shape or "-",
        site.kernel or "inductor",
        site.decision or "-",
        site.reason or "",
    )


def records(analysis: Analysis, graph: int = 0) -> tuple[SiteRecord, ...]:
    """The records of one graph's sites."""
    counts: dict[str, int] = {}
    found: list[SiteRecord] = []
    for result in analysis.results:
        name = result.site.name if isinstance(result, Lowered) else result.name
        ordinal = counts.get(name, 0)
        counts[name] = ordinal + 1
        found.append(
            _lowered_record(result, ordinal, graph)
            if isinstance(result, Lowered)
            else _refused_record(result, ordinal, graph)
        )
    return tuple(found)


def _lowered_record(result: Lowered, ordinal: int, graph: int) -> SiteRecord:
    site, shape = result.site, result.problem.shape
    batch, rows, columns = shape.hints
    sizes = f"B{batch} H{shape.heads} G{shape.kv_heads} M{rows} N{columns} D{shape.head_dim}"
    if shape.value_dim != shape.head_dim:
        sizes += f" E{shape.value_dim}"
    return SiteRecord(
        site.name,
        ordinal,
        "attention",
        True,
        None,
        site.spelling,
        describe(site.spec.mask),
        result.choice.kernel.name,
        "exact",
        sizes,
        str(site.spec.score),
        result.choice.why,
        graph,
    )


def _refused_record(result: Refused, ordinal: int, graph: int) -> SiteRecord:
    return SiteRecord(
        result.name,
        ordinal,
        "attention",
        False,
        result.reason,
        result.spelling,
        None,
        None,
        None,
        None,
        graph=graph,
    )


def explain(
    model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Explanation:
    """Capture and analyse `model(*args, **kwargs)`; runs the model once, uncompiled.

    options: as given to torch.compile. Raises ValueError for an unknown option and what the model
    itself raises.
    """
    ours, _ = parse_options(options)
    found: list[SiteRecord] = []
    notes: list[str] = []
    seconds: dict[str, float] = {}
    graphs = 0

    def backend(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        analysis = rewrite(graph_module, inputs, ours)
        found.extend(records(analysis, graphs))
        if analysis.failure is not None:
            notes.append(f"graph {graphs} was left to Inductor: {analysis.failure}")
        for name, spent in analysis.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + spent
        graphs += 1
        forward: Callable[..., Any] = graph_module.forward
        return forward

    torch.compiler.reset()
    try:
        torch.compile(model, backend=backend)(*args, **kwargs)
    finally:
        torch.compiler.reset()
    return Explanation(tuple(found), tuple(notes), graphs, seconds)


__all__ = ["Explanation", "Refused", "SiteRecord", "explain", "records"]
