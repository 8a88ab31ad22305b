"""One record for each attention that the passes saw in a graph."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from adaattn_compiler.kernels.online_stats import online_stats
from adaattn_compiler.kernels.predict import (
    Prediction,
    counted_here,
    predicted,
    source_for,
)
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.passes.lower import Lowered
from adaattn_compiler.passes.pipeline import Analysis
from adaattn_compiler.passes.site import Refused
from adaattn_compiler.passes.weights import GraphWeights
from adaattn_compiler.predicates import describe
from adaattn_compiler.runtime.state import head_stats
from adaattn_compiler.runtime.states import ONLINE, STATES, StateKey
from adaattn_compiler.target import DeviceTarget


@dataclass(frozen=True)
class SiteRecord:
    """One attention.

    name: path of the module it is in, empty for the model itself.
    ordinal: its number among those of the same name, from 0.
    kind: "attention".
    lowered: whether it was replaced by a kernel that AdaAttn chose; else Inductor has it as it is.
    reason: why it was not lowered; None where it was.
    spelling: how the model writes it: "sdpa", "softmax", ...
    mask: in words: "causal & window(512)", "key padding", "none", ...
    kernel: what computes it: "sdpa", "strips", "flex" or "cpp"; on a GPU "sdpa", "cudnn", "flash",
    "efficient" or "triton".
    decision: how exactly it is computed: "exact", or what the heads do by a policy; in online mode
    "online: " and what the site has gathered, or decided, by now.
    shape: sizes as captured, "B1 H8 G2 M64 N64 D32": batch, query heads, key/value heads, query
    length, key length, head dimension; E, the head dimension of V, where it differs.
    score: what is done to the scaled product S of a query and a key before the softmax: "S" alone,
    "S + Load(0, h, q, k)" (a bias that is the first of the tensors it reads), ...
    why: how the kernel was chosen: the only one that can, by estimate, or measured, with times.
    graph: the number of the graph that it is in.
    where: "file:line" of the model's source, where known.
    training: whether a gradient flows through it.
    source: what was generated and compiled for it, where the kernel is "cpp" and it was asked for;
    with a target, the Triton module for that instead.
    prediction: what it takes at least, counted: on the target that was asked for, with the kernel
    generated for it, else on the device that the tensors are on.
    refused: why it is not computed as a policy has it, where there is a policy.

    mask, kernel, decision, shape, score, why and prediction are None for a site that was not
    lowered.
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
    where: str | None = None
    training: bool = False
    source: str | None = None
    prediction: Prediction | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Asked:
    """What records say beside what was found: the source generated, figures for a target."""

    source: bool = False
    figures: bool = False
    target: DeviceTarget | None = None

    def source_of(self, result: Lowered) -> str | None:
        if not self.source:
            return None
        if self.target is not None and self.target.capability is not None:
            return source_for(result.problem, self.target)
        return result.choice.kernel.source(result.problem)

    def prediction_of(self, result: Lowered) -> Prediction | None:
        if self.target is not None:
            return predicted(result.problem, self.target)
        return counted_here(result.problem) if self.figures else None


def records(
    analysis: Analysis,
    graph: int = 0,
    asked: Asked = Asked(),
    so_far: Mapping[SiteKey, str] = MappingProxyType({}),
) -> tuple[SiteRecord, ...]:
    """The records of one graph's sites. so_far: what `decided_so_far` says of them."""
    return numbered(
        _lowered_record(result, graph, asked, so_far)
        if isinstance(result, Lowered)
        else _refused_record(result, graph)
        for result in analysis.results
    )


def decided_so_far(
    analysis: Analysis, graph_module: fx.GraphModule, inputs: Sequence[Any]
) -> dict[SiteKey, str]:
    """What sites that decide for themselves have gathered or decided, by calls of this model before
    now; not of those that nothing has run through."""
    weights = GraphWeights(graph_module, inputs)
    found: dict[SiteKey, str] = {}
    for site in analysis.states:
        places = weights.places(site.key.name) or weights.places("")
        state = _state_of(site, inputs[places[0][1]]) if places else None
        if state is not None:
            found[site.key] = _online_in_words(site, state)
    return found


def _state_of(site: Lowered, owner: torch.Tensor) -> torch.Tensor | None:
    key = StateKey(ONLINE, site.key.name, site.key.ordinal, site.choice.form)
    return STATES.known(owner, key) if site.choice.form.plan else None


def _online_in_words(site: Lowered, state: torch.Tensor) -> str:
    words = f"online: {online_stats(site.choice.form.plan, state)}"
    demoted = sum(head.demoted for head in head_stats(state[: site.problem.shape.heads]))
    return f"{words}; {demoted} demoted since, exact" if demoted else words


def numbered(sites: Iterable[SiteRecord]) -> tuple[SiteRecord, ...]:
    """The records with ordinals that tell those of one name apart."""
    counts: dict[str, int] = {}
    found: list[SiteRecord] = []
    for site in sites:
        ordinal = counts.get(site.name, 0)
        counts[site.name] = ordinal + 1
        found.append(dataclasses.replace(site, ordinal=ordinal))
    return tuple(found)


def _lowered_record(
    result: Lowered, graph: int, asked: Asked, so_far: Mapping[SiteKey, str]
) -> SiteRecord:
    site, kernel = result.site, result.choice.kernel
    known = so_far.get(result.key) if result.choice.stateful else None
    return SiteRecord(
        name=site.name,
        ordinal=0,
        kind="attention",
        lowered=True,
        reason=None,
        spelling=site.spelling,
        mask=describe(site.spec.mask),
        kernel=kernel.name,
        decision=known or result.choice.decision,
        shape=_sizes(result),
        score=str(site.spec.score),
        why=result.choice.why,
        graph=graph,
        where=_source(site.anchor),
        training=site.requires_grad,
        source=asked.source_of(result),
        prediction=asked.prediction_of(result),
        refused=result.choice.refused,
    )


def _refused_record(result: Refused, graph: int) -> SiteRecord:
    return SiteRecord(
        name=result.name,
        ordinal=0,
        kind="attention",
        lowered=False,
        reason=result.reason,
        spelling=result.spelling,
        mask=None,
        kernel=None,
        decision=None,
        shape=None,
        graph=graph,
        where=_source(result.anchor),
        training=bool(getattr(result.anchor.meta.get("fake"), "requires_grad", False)),
    )


def _sizes(result: Lowered) -> str:
    shape = result.problem.shape
    batch, rows, columns = shape.hints
    text = f"B{batch} H{shape.heads} G{shape.kv_heads} M{rows} N{columns} D{shape.head_dim}"
    return text if shape.value_dim == shape.head_dim else f"{text} E{shape.value_dim}"


def _source(anchor: fx.Node) -> str | None:
    """The innermost line of the model that Dynamo noted for a node of the view."""
    trace = anchor.meta.get("origin", anchor).meta.get("stack_trace") or ""
    lines = re.findall(r'File "(.+?)", line (\d+)', trace)
    return ":".join(lines[-1]) if lines else None
