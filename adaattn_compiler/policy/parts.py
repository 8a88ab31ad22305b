"""What a policy is made of: sites with their decisions and envelopes, and where they come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adaattn_compiler.decision import HeadDecision, SiteDecision
from adaattn_compiler.policy.error import PolicyError, shown

T = TypeVar("T")

# The largest error that may be allowed: that of an output of zeros, relative to the true one. A
# larger budget would hold nothing to anything, and is likely to be a percentage.
LARGEST_BUDGET = 1.0
HEAD_BUDGET = "a relative error from 0 to 1 (write 5% as 0.05)"


class FrozenMap(Mapping[str, T]):
    """A mapping that does not change, with a hash, so that what holds one is a value."""

    def __init__(self, entries: Mapping[str, T] | None = None) -> None:
        self._entries = dict(entries or {})

    def __getitem__(self, name: str) -> T:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return f"FrozenMap({self._entries!r})"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them: `x in Range(0, 1)`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError(f"low is {self.low}, high {self.high}; both must be finite")
        if self.low > self.high:
            raise ValueError(f"low is {self.low}; it must be at most high, {self.high}")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Envelope:
    """Inside of what a site was calibrated; outside of it, it is computed exactly.

    rows, columns: query and key lengths. statistics: by name ("q_rms", "k_amax", ...), one range
    for each head or for each key/value head.
    """

    rows: Range
    columns: Range
    statistics: Mapping[str, tuple[Range, ...]] = field(default_factory=FrozenMap)

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", FrozenMap(self.statistics))

    def admits(self, rows: int, columns: int) -> bool:
        """Whether these lengths lie in it."""
        return rows in self.rows and columns in self.columns


@dataclass(frozen=True)
class MeasuredError:
    """Relative L2 error of a head's output in calibration: the mean, and the 99th percentile."""

    mean: float
    p99: float


@dataclass(frozen=True)
class Seconds:
    """What a site takes on the device of the policy: exactly, and as decided; measured there, or
    predicted."""

    exact: float
    decided: float
    measured: bool


@dataclass(frozen=True)
class SitePolicy:
    """The decision for one site, and what it holds for.

    name, ordinal: the module's path, and the site's number among those of that path, from 0.
    spec: `AttentionSpec.key()`. dtype: of Q, K and V. training: whether a gradient flows through.
    budget: for each head the relative L2 error that is allowed at run time.
    error: for each head what was measured in calibration; None where this decision was not.
    seconds: None where not known. weights: fingerprint of the parameters of the module and those in
    it; None where it has none, or that is not to be checked. statistics: what each head does when
    it is computed exactly, by name (docs/statistics.md): nothing is decided by them. computes: what
    `spec` stands for, in words by name (spec_in_words.py), to say how another site differs.
    """

    name: str
    ordinal: int
    spec: str
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    decision: SiteDecision
    envelope: Envelope
    budget: tuple[float, ...]
    error: tuple[MeasuredError | None, ...]
    seconds: Seconds | None = None
    training: bool = False
    weights: str | None = None
    statistics: Mapping[str, tuple[float, ...]] | None = None
    computes: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.statistics is not None:
            object.__setattr__(self, "statistics", FrozenMap(self.statistics))
        if self.computes is not None:
            object.__setattr__(self, "computes", FrozenMap(self.computes))
        for head, budget in enumerate(self.budget):
            if not 0 <= budget <= LARGEST_BUDGET:
                reason = f"is {shown(budget)}; it must be {HEAD_BUDGET}"
                raise PolicyError(("heads", head, "budget"), reason)
        for what in ("budget", "error"):
            if len(getattr(self, what)) != self.heads:
                raise PolicyError((what,), f"has {len(getattr(self, what))} {self._per_head}")
        for name, values in (self.statistics or {}).items():
            if len(values) != self.heads:
                raise PolicyError(("statistics", name), f"has {len(values)} {self._per_head}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise PolicyError(
                ("kv_heads",), f"is {self.kv_heads}; it must divide {self.heads} heads"
            )
        for name, ranges in self.envelope.statistics.items():
            if len(ranges) not in (self.heads, self.kv_heads):
                reason = (
                    f"has {len(ranges)} {self._per_head}, or for each of {self.kv_heads} kv heads"
                )
                raise PolicyError(("envelope", "statistics", name), reason)

    @property
    def heads(self) -> int:
        """Its number of query heads."""
        return len(self.decision.heads)

    @property
    def label(self) -> str:
        """Its name as tables show it: the ordinal where it is not the first."""
        name = self.name or "(root)"
        return f"{name}#{self.ordinal}" if self.ordinal else name

    @property
    def _per_head(self) -> str:
        return f"entries; it must have one for each of {self.heads} heads"

    def replaced(
        self,
        *,
        decision: SiteDecision | HeadDecision | None = None,
        head: int | None = None,
        budget: float | None = None,
    ) -> SitePolicy:
        """With another decision, another budget or both, for all heads alike or for one. What was
        measured of a head that is decided anew, and of the site's time, is forgotten."""
        chosen = self._chosen(head)
        heads = self._decided(decision, chosen)
        anew = [new != old for new, old in zip(heads, self.decision.heads, strict=True)]
        given = enumerate(self.budget)
        return dataclasses.replace(
            self,
            decision=SiteDecision(heads),
            budget=tuple(b if budget is None or i not in chosen else budget for i, b in given),
            error=tuple(None if new else e for new, e in zip(anew, self.error, strict=True)),
            seconds=None if any(anew) else self.seconds,
        )

    def _chosen(self, head: int | None) -> range:
        if head is None:
            return range(self.heads)
        if not 0 <= head < self.heads:
            raise ValueError(f"head is {head}; {self.label} has heads 0 to {self.heads - 1}")
        return range(head, head + 1)

    def _decided(
        self, decision: SiteDecision | HeadDecision | None, chosen: range
    ) -> tuple[HeadDecision, ...]:
        if isinstance(decision, SiteDecision):
            if len(decision.heads) != len(chosen) or len(chosen) != self.heads:
                reason = f"{self.label} has {self.heads} heads; give as many, or a HeadDecision"
                raise ValueError(f"decision is one of {len(decision.heads)} heads; {reason}")
            return decision.heads
        old = enumerate(self.decision.heads)
        return tuple(d if decision is None or i not in chosen else decision for i, d in old)

    def mismatch(
        self,
        *,
        spec: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: str,
        training: bool,
        weights: str | None = None,
        computes: Mapping[str, str] | None = None,
        lengths: tuple[int, int] | None = None,
    ) -> str | None:
        """Why this is not for a site that is so; None where it is. computes: what its spec stands
        for; lengths: of queries and keys as seen; both only to say how another spec differs."""
        present: dict[str, Any] = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "dtype": dtype,
            "training": training,
        }
        if training and not self.training:
            return "gradients are on; the policy is for inference (use torch.no_grad())"
        if spec != self.spec:
            return self._computes_otherwise(spec, computes or {}, lengths)
        for what, value in present.items():
            calibrated = getattr(self, what)
            if calibrated != value:
                return f"the policy was calibrated for {what} {calibrated}; here it is {value}"
        if self.weights is not None and weights != self.weights:
            return "the policy was calibrated for other weights of this module"
        return None

    def _computes_otherwise(
        self, spec: str, computes: Mapping[str, str], lengths: tuple[int, int] | None
    ) -> str:
        """How another spec differs. A file of before, or of another hand, has a key and no words:
        then what is here."""
        if self.computes is None:
            words = [f"{what} is {here}" for what, here in computes.items()]
            intro = "another attention, which its file does not describe"
        else:
            words = [
                f"{what} is {here}, was {was}"
                for what, here in computes.items()
                if here != (was := self.computes.get(what, "not described"))
            ]
            intro = "another attention"
        words += self._other_lengths(lengths)
        here = f": here {'; '.join(words)}" if words else ""
        return (
            f"the policy was calibrated for {intro} (spec {self.spec}, here {spec}){here}; "
            "calibrate on inputs such as these, or leave it exact"
        )

    def _other_lengths(self, lengths: tuple[int, int] | None) -> list[str]:
        seen = zip(("query", "key"), lengths or (), self._lengths, strict=False)
        return [
            f"{what} length is {length}, was from {known.low:g} to {known.high:g}"
            for what, length, known in seen
            if length not in known
        ]

    @property
    def _lengths(self) -> tuple[Range, Range]:
        return self.envelope.rows, self.envelope.columns


@dataclass(frozen=True)
class Budget:
    """What calibration was allowed.

    kind: "budget" (relative error of each head), "output_budget" (of the model's output) or
    "max_perplexity_change".
    """

    kind: str
    value: float


@dataclass(frozen=True)
class Provenance:
    """Where a policy comes from.

    versions: of "adaattn", "torch", "python" and what else matters. device: its name. weights,
    data: fingerprints (fingerprint.py). created: an ISO 8601 date, with or without the time.
    results: measured end to end of the policy as it was calibrated, by name ("perplexity", ...);
    editing a policy empties them.
    """

    versions: Mapping[str, str]
    device: str
    weights: str
    data: str
    created: str
    seed: int
    budget: Budget
    results: Mapping[str, float] = field(default_factory=FrozenMap)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", FrozenMap(self.versions))
        object.__setattr__(self, "results", FrozenMap(self.results))

    def differences(self, versions: Mapping[str, str], device: str) -> tuple[str, ...]:
        """What is otherwise here than where the policy was calibrated, in words."""
        present = {**versions, "device": device}
        calibrated = {**self.versions, "device": self.device}
        return tuple(
            f"{what} was {calibrated[what]}, here it is {value}"
            for what, value in present.items()
            if what in calibrated and calibrated[what] != value
        )
