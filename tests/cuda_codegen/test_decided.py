"""A policy's decisions in CUDA graphs: two ops, and launches in place of them that compile."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_capture import Captured, cuda, fake_gpu
from decided_capture import captured_as_decided
from torch.testing import FileCheck

from adaattn_compiler.decision import (
    EXACT,
    HeadDecision,
    KeyBasis,
    Nystrom,
    Pattern,
    Pooling,
    Precision,
    Selection,
)
from adaattn_compiler.passes import decide
from adaattn_compiler.target import TARGETS

WINDOW = HeadDecision(pattern=Pattern(128, 64))
STRIPES = HeadDecision(pattern=Pattern(64, 0, (2,), 4))
CHOSEN = HeadDecision(selection=Selection(0.9))
ANTIDIAGONAL = HeadDecision(selection=Selection(0.9, "antidiagonal"))
MEANS = HeadDecision(pooling=Pooling(Pattern(128), 16))
BF16 = HeadDecision(scores=Precision.BF16, values=Precision.BF16)
SKIP = HeadDecision(skip=8.0)
IN_BASIS = HeadDecision(basis=KeyBasis.of(torch.eye(64)[:, :32]))
IN_SMALL_BASIS = HeadDecision(basis=KeyBasis.of(torch.eye(64)[:, :24]), skip=8.0)
LANDMARKS = HeadDecision(nystrom=Nystrom(64))
# Bytes of shared memory that a program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024}
TF32 = HeadDecision(scores=Precision.TF32, values=Precision.TF32)
FORWARD, MIXED, LOWRANK = "fused_qk_softmax_av", "fused_mixed_precision", "fused_lowrank_attention"
AUDIT = ["fused_decode", "combine_splits"]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def bidirectional(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def inputs(
    dtype: torch.dtype = torch.bfloat16, dim: int = 64, groups: int = 4, rows: int = 512
) -> tuple[Any, ...]:
    return tuple(cuda(2, heads, rows, dim, dtype=dtype) for heads in (4, groups, groups))


def taken(
    heads: Sequence[HeadDecision], make: Any = inputs, function: Any = causal, **how: Any
) -> Captured:
    with fake_gpu(), torch.no_grad():
        return captured_as_decided(function, *make(), heads=heads, **how)


CASES: dict[str, tuple[Sequence[HeadDecision], Any, list[str]]] = {
    "patterns": ((EXACT, WINDOW, STRIPES, WINDOW), inputs, [MIXED, *AUDIT, MIXED]),
    "patterns d128": (
        (EXACT, WINDOW, STRIPES, WINDOW),
        lambda: inputs(dim=128, groups=2),
        [MIXED, *AUDIT, MIXED],
    ),
    "chosen": ((EXACT, CHOSEN, ANTIDIAGONAL, WINDOW), inputs, [MIXED, *AUDIT, MIXED]),
    "means": ((MEANS,) * 4, inputs, [FORWARD, LOWRANK, *AUDIT, FORWARD]),
    "all kinds": (
        (EXACT, WINDOW, CHOSEN, MEANS),
        lambda: inputs(dim=128, groups=2),
        [MIXED, LOWRANK, *AUDIT, MIXED],
    ),
    "skip": (
        (EXACT, SKIP, dataclasses.replace(WINDOW, skip=8.0), WINDOW),
        lambda: inputs(dim=128),
        [MIXED, *AUDIT, MIXED],
    ),
    "products": (
        (BF16, TF32, dataclasses.replace(BF16, pattern=Pattern(64)), EXACT),
        lambda: inputs(torch.float32),
        [MIXED, MIXED, *AUDIT, MIXED],
    ),
    "bases": (
        (IN_BASIS, dataclasses.replace(IN_BASIS, pattern=Pattern(128)), EXACT, IN_SMALL_BASIS),
        inputs,
        [FORWARD, MIXED, MIXED, *AUDIT, FORWARD],
    ),
    "landmarks": (
        (LANDMARKS, WINDOW, LANDMARKS, EXACT),
        lambda: inputs(groups=2, rows=500),
        [MIXED, FORWARD, FORWARD, AUDIT[0], MIXED],
    ),
    "landmarks and bases": (
        (LANDMARKS, dataclasses.replace(BF16, nystrom=Nystrom(16)), EXACT, IN_BASIS),
        lambda: inputs(torch.float32),
        [FORWARD, MIXED, *4 * [FORWARD], *AUDIT, FORWARD],
    ),
}
# Of those that need one without a mask.
FUNCTIONS = dict.fromkeys(("landmarks", "landmarks and bases"), bidirectional)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_site_becomes_launches_that_compile(
    name: str, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, make, launched = CASES[name]
    target = TARGETS["A100" if capability == 80 else "H100"]
    monkeypatch.setattr(decide, "target_here", lambda: target)
    found = taken(heads, make, FUNCTIONS.get(name, causal))
    assert [site.reason for site in found.sites] == [None]
    assert found.sites[0].decision.count(" x ") == len(set(heads))
    check = FileCheck().check_count("adaattn.check_envelope](", 1, exactly=True)
    check.check_count("adaattn.attention_as_decided](", 1, exactly=True).run(found.rewritten)
    assert [launch.name for launch in found.launches] == launched
    for launch in found.launches:
        compiled = launch.compiled(capability)
        assert compiled.spills == 0, (launch.name, compiled.spills)
        assert compiled.shared_memory <= SHARED[capability]


# What would make the host wait, or needs it.
WAITING = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "_assert", "device_put")


@pytest.mark.parametrize("name", ["all kinds", "products", "chosen", "landmarks and bases"])
def test_nothing_waits_for_the_device(name: str) -> None:
    heads, make, _ = CASES[name]
    found = taken(heads, make, FUNCTIONS.get(name, causal))
    targets = [str(node.target) for graph in found.graphs for node in graph.graph.nodes]
    assert [target for target in targets if any(word in target for word in WAITING)] == []
    assert any("decided_numbers" in target for target in targets)


def test_lengths_at_run_time_take_the_same_launches() -> None:
    heads = (EXACT, WINDOW, CHOSEN, MEANS)
    with fake_gpu(), torch.no_grad():
        found = captured_as_decided(causal, *inputs(), heads=heads, dynamic=True)
    assert [site.reason for site in found.sites] == [None]
    assert found.sites[0].decision.count(" x ") == 4
    assert [launch.name for launch in found.launches] == [MIXED, LOWRANK, *AUDIT, MIXED]
    assert not isinstance(found.launches[0].arguments["M"], int)


def test_landmarks_and_bases_of_lengths_at_run_time() -> None:
    """One graph for all lengths above the number of landmarks."""
    heads = (LANDMARKS, EXACT, LANDMARKS, IN_BASIS)
    with fake_gpu(), torch.no_grad():
        found = captured_as_decided(bidirectional, *inputs(), heads=heads, dynamic=True)
    launched = [FORWARD, MIXED, FORWARD, FORWARD, *AUDIT, FORWARD]
    assert [launch.name for launch in found.launches] == launched
    placeholders = found.graphs[0].graph.find_nodes(op="placeholder")
    given = [node.meta["val"] for node in placeholders]
    q = next(each for each in given if isinstance(each, torch.Tensor))
    batch, _, length, _ = q.shape
    guards = [guard.expr for guard in q.fake_mode.shape_env.guards]
    for rows in (66, 128, 500, 513, 4096, 65000):
        sizes = {batch.node.expr: 2, length.node.expr: rows}
        assert not [guard for guard in guards if guard.subs(sizes) == False]  # noqa: E712


def test_the_state_is_written_in_place() -> None:
    found = taken((EXACT, WINDOW, EXACT, WINDOW))
    graph = found.graphs[0].graph
    (out,) = graph.find_nodes(op="output")
    states = [node for node in out.args[0] if node.meta["val"].dtype == torch.float64]
    assert [state.meta["val"].shape[0] for state in states] == [4]


def test_without_audits_nothing_is_computed_twice() -> None:
    found = taken((EXACT, WINDOW, EXACT, WINDOW), rows=0)
    assert [launch.name for launch in found.launches] == [MIXED]


def test_mask_with_holes_is_listed_for_exact_heads_too() -> None:
    def holes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2], device=q.device)[:, None]
        keys = torch.arange(k.shape[2], device=q.device)
        keep = (rows >= keys) & ((rows - keys < 200) | (keys < 4))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    found = taken((EXACT, WINDOW, CHOSEN, EXACT), function=holes)
    assert [site.reason for site in found.sites] == [None]
    assert [launch.name for launch in found.launches] == [MIXED, *AUDIT, MIXED]
    assert all(found.launches[i].arguments["LISTED"] for i in (0, 3))


# -- near misses -----------------------------------------------------------------------------------


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def with_mask() -> tuple[Any, ...]:
    return (*inputs(), torch.ones(2, 512, device="cuda") > 0)


REFUSED: dict[str, tuple[HeadDecision, Any, Any, str]] = {
    "data": (WINDOW, padded, with_mask, "the mask depends on the input"),
    "few rows": (WINDOW, causal, lambda: inputs(rows=16), "16 query rows or fewer"),
    "16 bits": (BF16, causal, inputs, "multiplied as it is"),
    "skip": (dataclasses.replace(MEANS, skip=8.0), causal, inputs, "skips blocks beside means"),
    "bias": (
        MEANS,
        biased,
        lambda: (*inputs(), cuda(1, 4, 512, 512)),
        "the score of a centroid is of the product alone",
    ),
    "means": (
        HeadDecision(pooling=Pooling(Pattern(128), 64)),
        causal,
        lambda: inputs(torch.float32),
        "holds the keys of a mean",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_launch_does_is_exact_and_said(name: str) -> None:
    decision, function, make, why = REFUSED[name]
    found = taken((decision,) * 4, make, function)
    (site,) = found.sites
    assert site.decision == "exact"
    assert why in (site.why or "")
    FileCheck().check_not("check_envelope").check_not("as_decided").run(found.rewritten)
