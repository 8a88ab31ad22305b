"""Policies for tests: one of each kind of decision, and arbitrary ones."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from adaattn_compiler.decision import (
    EXACT,
    HeadDecision,
    KeyBasis,
    Nystrom,
    Pattern,
    Pooling,
    Precision,
    Selection,
    SiteDecision,
)
from adaattn_compiler.policy import (
    Budget,
    Envelope,
    MeasuredError,
    Policy,
    Provenance,
    Range,
    Seconds,
    SitePolicy,
)

BF16 = HeadDecision(scores=Precision.BF16, values=Precision.BF16)
BASIS = KeyBasis.of(torch.eye(64)[:, :8])
# A head of each representation.
HEADS = (
    EXACT,
    BF16,
    HeadDecision(pattern=Pattern(256, sinks=64), scores=Precision.BF16, values=Precision.BF16),
    HeadDecision(selection=Selection(0.95), skip=12.0),
    HeadDecision(pooling=Pooling(Pattern(128, 64, (3, 5), 4), 16), values=Precision.FP16),
    BF16,
)


def site(name: str = "layers.0.self_attn", ordinal: int = 0, **changes: Any) -> SitePolicy:
    fields: dict[str, Any] = {
        "name": name,
        "ordinal": ordinal,
        "spec": "0123456789ab",
        "kv_heads": 2,
        "head_dim": 64,
        "value_dim": 64,
        "dtype": "bfloat16",
        "decision": SiteDecision(HEADS),
        "envelope": Envelope(
            Range(16, 4096),
            Range(16, 4096),
            {"q_rms": (Range(0.5, 2.0),) * 6, "k_amax": (Range(0, 9.5), Range(0, 8))},
        ),
        "budget": (0.01, 0.01, 0.02, 0.02, 0.05, 0.01),
        "error": (None, *(MeasuredError(0.001 * i, 0.002 * i) for i in range(1, 6))),
        "seconds": Seconds(1e-3, 4e-4, measured=True),
    }
    return SitePolicy(**(fields | changes))


PROVENANCE = Provenance(
    versions={"adaattn": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
    device="NVIDIA H200",
    weights="0" * 32,
    data="f" * 32,
    created="2026-01-31T12:00:00Z",
    seed=7,
    budget=Budget("max_perplexity_change", 0.005),
    results={"perplexity": 12.5, "perplexity exact": 12.48},
)
POLICY = Policy((site(), site("layers.0.self_attn", 1), site("layers.1.self_attn")), PROVENANCE)


def _counts(most: int = 2**31 - 1) -> st.SearchStrategy[int]:
    return st.integers(0, most)


_finite = st.floats(-1e300, 1e300)
_errors = st.floats(0, 1e300)
_budgets = st.floats(0, 1)
_words = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
_patterns = st.builds(
    Pattern, _counts(), _counts(), st.lists(_counts(), max_size=4).map(tuple), _counts()
)
_precisions = st.sampled_from(Precision)
_kinds: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"pattern": _patterns}),
    st.fixed_dictionaries(
        {
            "selection": st.builds(
                Selection,
                st.floats(0, 1, exclude_min=True),
                st.sampled_from(("pooled", "antidiagonal")),
                _counts(),
                _counts(),
            )
        }
    ),
    st.fixed_dictionaries(
        {"pooling": st.builds(Pooling, _patterns, st.sampled_from((8, 16, 32, 64)))}
    ),
    st.fixed_dictionaries({"nystrom": st.builds(Nystrom, st.sampled_from((16, 64, 256)))}),
    st.fixed_dictionaries(
        {"basis": st.sampled_from((BASIS, KeyBasis.of(torch.ones(3, 24))))},
        optional={"pattern": _patterns},
    ),
)
_heads = st.builds(
    lambda kind, scores, values, skip: HeadDecision(
        **kind, scores=scores, values=values, skip=skip
    ),
    _kinds,
    _precisions,
    _precisions,
    st.none() | st.floats(0, 1e300, exclude_min=True),
)


def _ranges(bound: st.SearchStrategy[Any]) -> st.SearchStrategy[Range]:
    return st.tuples(bound, bound).map(lambda ends: Range(*sorted(ends)))


@st.composite
def _sites(draw: st.DrawFn, name: str, ordinal: int) -> SitePolicy:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 2))
    per_head = {"min_size": heads, "max_size": heads}
    counts = st.sampled_from((heads, kv_heads))
    ranges = counts.flatmap(lambda n: st.lists(_ranges(_finite), min_size=n, max_size=n).map(tuple))
    measured = st.none() | st.builds(MeasuredError, _errors, _errors)
    return SitePolicy(
        name=name,
        ordinal=ordinal,
        spec=draw(st.text("0123456789abcdef", min_size=12, max_size=12)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 512)),
        value_dim=draw(st.integers(1, 512)),
        dtype=draw(st.sampled_from(("float32", "bfloat16", "float16", "float64"))),
        decision=SiteDecision(tuple(draw(st.lists(_heads, **per_head)))),
        envelope=Envelope(
            draw(_ranges(_counts())),
            draw(_ranges(_counts())),
            draw(st.dictionaries(_words, ranges, max_size=3)),
        ),
        budget=tuple(draw(st.lists(_budgets, **per_head))),
        error=tuple(draw(st.lists(measured, **per_head))),
        seconds=draw(st.none() | st.builds(Seconds, _errors, _errors, st.booleans())),
        training=draw(st.booleans()),
        computes=draw(st.none() | st.dictionaries(_words, _words, max_size=3)),
    )


_fingerprints = st.text("0123456789abcdef", min_size=32, max_size=32)
_provenances = st.builds(
    Provenance,
    versions=st.dictionaries(_words, _words, max_size=2).map(
        lambda more: {"adaattn": "0.1.0", "torch": "2", "python": "3"} | more
    ),
    device=_words,
    weights=_fingerprints,
    data=_fingerprints,
    created=st.datetimes().map(lambda when: when.replace(microsecond=0).isoformat()),
    seed=st.integers(0, 2**64 - 1),
    budget=st.builds(
        Budget, st.sampled_from(("budget", "output_budget", "max_perplexity_change")), _budgets
    ),
    results=st.dictionaries(_words, _finite, max_size=2),
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that a file can hold."""
    places = st.tuples(st.just("") | _words, st.integers(0, 3))
    names = draw(st.lists(places, unique=True, max_size=3))
    return Policy(tuple(draw(_sites(*place)) for place in names), draw(_provenances))
