"""A plan of an attention whose heads are computed as a policy decided, as a graph carries it.

Its text holds all that changes the result (decisions, envelope, budgets), so that no cache serves a
graph that was made under another policy.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adaattn_compiler.decision import (
    HeadDecision,
    KeyBasis,
    Nystrom,
    Pattern,
    Pooling,
    Precision,
    Selection,
)


@dataclass(frozen=True)
class DecidedPlan:
    """base: the plan of the kernel that computes it. heads: how. low, high: of each statistic
    (kernels/envelope.py), of each head, what a guard lets through. limit: the relative error of
    each head, on the audited rows of one call, above which that call computes it exactly. budgets:
    the moving average of that error at which it is demoted. rows: how many query rows each call
    audits; 0: none.
    """

    base: str
    heads: tuple[HeadDecision, ...]
    low: tuple[tuple[float, ...], ...]
    high: tuple[tuple[float, ...], ...]
    limit: tuple[float, ...]
    budgets: tuple[float, ...]
    rows: int

    def serialize(self) -> str:
        """One line of text from which `deserialize` makes an equal plan, in any process."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**fields, "heads": [written_head(head) for head in self.heads]})

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def deserialize(text: str) -> DecidedPlan:
        """ValueError where the text is not of that form."""
        try:
            fields = {name: _frozen(value) for name, value in json.loads(text).items()}
            return DecidedPlan(**{**fields, "heads": tuple(map(read_head, fields["heads"]))})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not a plan by decisions: {text[:80]!r}") from error


def _frozen(value: Any) -> Any:
    """A value of JSON with tuples for lists."""
    if isinstance(value, list):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {name: _frozen(item) for name, item in value.items()}
    return value


def written_head(head: HeadDecision) -> dict[str, Any]:
    """A decision's fields that are not the exact head's, in literals."""
    fields = dataclasses.asdict(head)
    precise = {name: fields[name].value for name in ("scores", "values")}
    return {name: value for name, value in {**fields, **precise}.items() if value is not None}


def read_head(fields: Mapping[str, Any]) -> HeadDecision:
    """The decision that `written_head` wrote."""
    given = _frozen(dict(fields))
    for name in ("scores", "values"):
        given[name] = Precision(given[name])
    if "pattern" in given:
        given["pattern"] = Pattern(**given["pattern"])
    if "selection" in given:
        given["selection"] = Selection(**given["selection"])
    if "pooling" in given:
        pooling = given["pooling"]
        given["pooling"] = Pooling(Pattern(**pooling["near"]), pooling["keys"])
    if "nystrom" in given:
        given["nystrom"] = Nystrom(**given["nystrom"])
    if "basis" in given:
        given["basis"] = KeyBasis(**given["basis"])
    return HeadDecision(**given)
