"""The fields of the policy file: the form of each part, and what it means.

All fields are given but those that are optional, so that a default that changes in the code changes
the meaning of no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaattn_compiler.decision import (
    HeadDecision,
    KeyBasis,
    Nystrom,
    Pattern,
    Pooling,
    Precision,
    Selection,
    SiteDecision,
)
from adaattn_compiler.policy.composites import Field, ListOf, Made, MapOf, Record
from adaattn_compiler.policy.forms import LARGEST, Form, Integer, Number, OneOf, Switch, Text
from adaattn_compiler.policy.parts import (
    HEAD_BUDGET,
    LARGEST_BUDGET,
    Budget,
    Envelope,
    MeasuredError,
    Provenance,
    Range,
    Seconds,
    SitePolicy,
)

VERSION = 1
DTYPES = ("float64", "float32", "bfloat16", "float16")
BUDGETS = ("budget", "output_budget", "max_perplexity_change")

_SIZE = 2**31 - 1

# Control characters would break tables; lone surrogates cannot be printed or stored.
_CHARACTER = r"[^\u0000-\u001f\u007f\ud800-\udfff]"
_WORDS = Text(rf"{_CHARACTER}{{1,500}}", "1 to 500 characters, none of them a control character")
_NAME = Text(rf"{_CHARACTER}{{0,500}}", "at most 500 characters, none of them a control character")
_FINGERPRINT = Text("[0-9a-f]{32}", "32 hexadecimal digits, as adaattn_compiler.fingerprint makes")
_SPEC = Text("[0-9a-f]{12}", "12 hexadecimal digits, as AttentionSpec.key() gives them")
_DATE = Text(
    r"[0-9]{4}-[01][0-9]-[0-3][0-9](?:T[0-2][0-9]:[0-5][0-9]:[0-5][0-9](?:Z|[+-][0-2][0-9]:[0-5][0-9])?)?",
    'a date as "2026-01-31" or "2026-01-31T12:00:00Z"',
)
_ERROR = Number("a relative error, 0 or more", minimum=0)
_HEAD_BUDGET = Number(HEAD_BUDGET, minimum=0, maximum=LARGEST_BUDGET)
_SECONDS = Number("seconds, 0 or more", minimum=0)
_FINITE = Number(f"a finite number of at most {LARGEST:g}")
_COUNT = Integer(1, _SIZE)
_LENGTH = Integer(0, _SIZE, "a number of tokens")
_KEYS = Integer(0, _SIZE, "a number of keys")
_BLOCKS = Integer(0, _SIZE, "a number of blocks")


def _same(*words: str) -> OneOf:
    return OneOf({word: word for word in words})


def _range(bound: Form) -> Made:
    pair = ListOf(bound, "two numbers, [low, high]", 2, 2)
    return Made(pair, lambda ends: Range(*ends), lambda found: (found.low, found.high))


_PATTERN = Record(
    Pattern,
    {
        "window": Field(_KEYS, "keys before and after a row's position that it sees"),
        "sinks": Field(_KEYS, "first keys, which every row sees"),
        "stripes": Field(
            ListOf(_BLOCKS, "a list of numbers of blocks"), "key blocks that every row sees"
        ),
        "stride": Field(_BLOCKS, "every how manieth key block is seen; 0: none"),
    },
)
_SELECTION = Record(
    Selection,
    {
        "mass": Field(
            Number("above 0, at most 1", above=0, maximum=1),
            "share of the estimated softmax mass that the chosen blocks hold",
        ),
        "by": Field(_same("pooled", "antidiagonal"), "how blocks are scored"),
        "window": Field(_KEYS, "keys around a row's position that are always seen"),
        "sinks": Field(_KEYS, "first keys, which are always seen"),
    },
)
_POOLING = Record(
    Pooling,
    {
        "near": Field(_PATTERN, "blocks that are computed key by key"),
        "keys": Field(OneOf({n: n for n in (8, 16, 32, 64)}), "keys that share one mean elsewhere"),
    },
)
_NYSTROM = Record(
    Nystrom,
    {
        "landmarks": Field(
            OneOf({n: n for n in (16, 32, 64, 128, 256)}), "means that rows, and keys, go through"
        )
    },
)
_BASIS = Record(
    KeyBasis,
    {
        "rank": Field(
            OneOf({n: n for n in range(8, 257, 8)}), "dimensions in which scores are computed"
        ),
        "matrix": Field(
            Text("[A-Za-z0-9+/]+={0,2}", "numbers in base64"),
            "orthonormal directions, float32 (little-endian) [D, rank] row by row, in base64",
        ),
    },
)
_PRECISION = OneOf({precision.value: precision for precision in Precision})
_DECISION: Mapping[str, Field] = {
    "pattern": Field(_PATTERN, "fixed blocks of keys", optional=True),
    "selection": Field(_SELECTION, "blocks of keys chosen in each call", optional=True),
    "pooling": Field(_POOLING, "near keys each by itself, others by their means", optional=True),
    "nystrom": Field(_NYSTROM, "all rows and keys through landmarks", optional=True),
    "basis": Field(_BASIS, "scores in few directions of the keys", optional=True),
    "scores": Field(_PRECISION, "what Q and K are rounded to in their product"),
    "values": Field(_PRECISION, "what P and V are rounded to in their product"),
    "skip": Field(
        Number("above 0", above=0),
        "blocks this far below the maximum (natural units) are left out; not given: none are",
        optional=True,
    ),
}
_MEASURED = Record(
    MeasuredError,
    {
        "mean": Field(_ERROR, "mean over the rows of the calibration data"),
        "p99": Field(_ERROR, "its 99th percentile"),
    },
)


def _head(budget: float, error: MeasuredError | None, **decision: Any) -> tuple[Any, ...]:
    return HeadDecision(**decision), budget, error


def _head_parts(head: tuple[HeadDecision, float, MeasuredError | None]) -> dict[str, Any]:
    decision, budget, error = head
    return {**{n: getattr(decision, n) for n in _DECISION}, "budget": budget, "error": error}


# In the file a head has its decision, budget and error together, so that none can be one short.
_HEAD = Record(
    _head,
    {
        **_DECISION,
        "budget": Field(
            _HEAD_BUDGET, "relative L2 error of its output that is allowed at run time"
        ),
        "error": Field(_MEASURED, "what was measured of this decision", optional=True),
    },
    parts=_head_parts,
    exclusive=("pattern", "selection", "pooling", "nystrom"),
)
_ENVELOPE = Record(
    Envelope,
    {
        "rows": Field(_range(_LENGTH), "query lengths"),
        "columns": Field(_range(_LENGTH), "key lengths"),
        "statistics": Field(
            MapOf(_WORDS, ListOf(_range(_FINITE), "a list of [low, high], one for each head", 1)),
            "by name, a range for each head or each key/value head",
        ),
    },
)


def _site(heads: tuple[Any, ...], training: bool, **rest: Any) -> SitePolicy:
    decisions, budget, error = zip(*heads, strict=True)
    return SitePolicy(
        decision=SiteDecision(decisions), budget=budget, error=error, training=training, **rest
    )


def _site_parts(site: SitePolicy) -> dict[str, Any]:
    heads = list(zip(site.decision.heads, site.budget, site.error, strict=True))
    return {**{n: getattr(site, n) for n in _SITE.fields if n != "heads"}, "heads": heads}


_SITE = Record(
    _site,
    {
        "name": Field(_NAME, "path of the module; empty: the model itself"),
        "ordinal": Field(Integer(0, _SIZE), "its number among the sites of that name"),
        "spec": Field(_SPEC, "key of what is computed: scale, mask, bias, ..."),
        "kv_heads": Field(_COUNT, "number of key/value heads; divides that of the heads"),
        "head_dim": Field(_COUNT, "of Q and K"),
        "value_dim": Field(_COUNT, "of V"),
        "dtype": Field(_same(*DTYPES), "of Q, K and V"),
        "training": Field(Switch(), "whether a gradient flows through it"),
        "envelope": Field(_ENVELOPE, "inside of what it was calibrated"),
        "heads": Field(ListOf(_HEAD, "a list of heads, at least one", 1), "each head, in order"),
        "seconds": Field(
            Record(
                Seconds,
                {
                    "exact": Field(_SECONDS, "computed exactly"),
                    "decided": Field(_SECONDS, "computed as decided"),
                    "measured": Field(Switch(), "whether they were measured, not predicted"),
                },
            ),
            "what it takes on the device of the policy",
            optional=True,
        ),
        "statistics": Field(
            MapOf(_WORDS, ListOf(_FINITE, "a list of numbers, one for each head", 1)),
            "what heads do when computed exactly, by name; decides nothing",
            optional=True,
        ),
        "computes": Field(
            MapOf(_WORDS, _WORDS),
            "what spec stands for, in words by name: mask, score, ...; decides nothing",
            optional=True,
        ),
        "weights": Field(
            _FINGERPRINT,
            "fingerprint of the module's parameters; not given: they are not looked at",
            optional=True,
        ),
    },
    parts=_site_parts,
)
_BUDGET = Record(
    Budget,
    {
        "kind": Field(_same(*BUDGETS), "what is limited"),
        "value": Field(
            Number("a share from 0 to 1 (write 5% as 0.05)", minimum=0, maximum=LARGEST_BUDGET),
            "the limit",
        ),
    },
)
_PROVENANCE = Record(
    Provenance,
    {
        "versions": Field(MapOf(_WORDS, _WORDS, ("adaattn", "torch", "python")), "of software"),
        "device": Field(_WORDS, "name of the device that it was calibrated on"),
        "weights": Field(_FINGERPRINT, "fingerprint of the model's weights"),
        "data": Field(_FINGERPRINT, "fingerprint of the calibration data"),
        "created": Field(_DATE, "when"),
        "seed": Field(Integer(0, 2**64 - 1), "of all that was drawn at random"),
        "budget": Field(_BUDGET, "what calibration was allowed"),
        "results": Field(MapOf(_WORDS, _FINITE), "measured end to end, by name"),
    },
)
POLICY_FIELDS: Mapping[str, Field] = {
    "version": Field(OneOf({VERSION: VERSION}), "of this format"),
    "provenance": Field(_PROVENANCE, "where the policy comes from"),
    "sites": Field(ListOf(_SITE, "a list of sites"), "decisions, site by site"),
}
