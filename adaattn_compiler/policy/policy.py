"""`Policy`: decisions for a model's sites, to be read, shown, edited and merged."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaattn_compiler.decision import HeadDecision, SiteDecision
from adaattn_compiler.policy.composites import Record
from adaattn_compiler.policy.error import PolicyError, shown
from adaattn_compiler.policy.fields import POLICY_FIELDS, VERSION
from adaattn_compiler.policy.file import parsed, read_text, write_text, written
from adaattn_compiler.policy.parts import FrozenMap, Provenance, SitePolicy
from adaattn_compiler.policy.table import table


@dataclass(frozen=True)
class Policy:
    """Decisions for a model's sites, and where they come from.

    A value: every edit gives a new policy. An edit empties `provenance.results`, and the errors and
    seconds of what it decides anew: they were measured of something else.
    """

    sites: tuple[SitePolicy, ...]
    provenance: Provenance
    version: int = VERSION

    def __post_init__(self) -> None:
        first: dict[tuple[str, int], int] = {}
        for index, site in enumerate(self.sites):
            same = first.setdefault((site.name, site.ordinal), index)
            if same != index:
                reason = f"is {site.label} again, as sites[{same}] is; a site must be there once"
                raise PolicyError(("sites", index), reason)

    # ------------------------------------------------------------------------------------ files

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Policy:
        """The policy of a file; PolicyError, with the file and the field at fault."""
        try:
            return Policy.from_json(read_text(Path(path)))
        except PolicyError as error:
            raise PolicyError(error.path, error.reason, os.fspath(path)) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        write_text(Path(path), self.to_json())

    @staticmethod
    def from_json(text: str) -> Policy:
        """The policy of a text; PolicyError, with the field at fault."""
        value = parsed(text)
        _check_version(value)
        FORM.check(value, ())
        policy: Policy = FORM.build(value, ())
        return policy

    def to_json(self) -> str:
        """The text of its file; PolicyError where that could not be read again."""
        value = FORM.write(self)
        FORM.check(value, ())
        return written(value) + "\n"

    # ------------------------------------------------------------------------------------- uses

    def site(self, name: str, ordinal: int = 0) -> SitePolicy | None:
        """What is decided for a site; None where nothing is."""
        for site in self.sites:
            if (site.name, site.ordinal) == (name, ordinal):
                return site
        return None

    def mismatch(self, weights: str) -> str | None:
        """Why this policy is not for a model with this fingerprint; None where it is."""
        if weights == self.provenance.weights:
            return None
        return (
            f"the policy was calibrated for other weights (fingerprint {self.provenance.weights}; "
            f"the model's is {weights}): calibrate this model, or load the weights that it is for"
        )

    def key(self) -> str:
        """A short stable name for all that changes what is computed: sites, decisions, envelopes
        and budgets; not for what was measured, when or where, or is said in words."""
        sites = sorted(self.sites, key=lambda site: (site.name, site.ordinal))
        bare = [
            dataclasses.replace(
                s, error=(None,) * s.heads, seconds=None, statistics=None, computes=None
            )
            for s in sites
        ]
        content = POLICY_FIELDS["sites"].form.write(bare)
        text = json.dumps([self.version, content], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    # ------------------------------------------------------------------------------------ edits

    def with_site(self, site: SitePolicy) -> Policy:
        """With this site in place of the one of its name and ordinal, or as the last."""
        return self._of(_updated(self.sites, (site,)))

    def replaced(
        self,
        name: str,
        ordinal: int = 0,
        *,
        decision: SiteDecision | HeadDecision | None = None,
        head: int | None = None,
        budget: float | None = None,
    ) -> Policy:
        """With another decision, another budget or both for a site, or for one head of it. A
        HeadDecision is for each of the heads, unless `head` says for which."""
        site = self._existing(name, ordinal)
        return self.with_site(site.replaced(decision=decision, head=head, budget=budget))

    def without(self, name: str, ordinal: int = 0) -> Policy:
        """Without a site, which is then computed exactly."""
        gone = self._existing(name, ordinal)
        return self._of(tuple(site for site in self.sites if site is not gone))

    def merged(self, other: Policy) -> Policy:
        """With the other's sites, which win over this one's, and the other's provenance."""
        if other.provenance.weights != self.provenance.weights:
            reason = (
                f"is {other.provenance.weights} in the one and {self.provenance.weights} in the "
                "other; only policies for the same weights can be merged"
            )
            raise PolicyError(("provenance", "weights"), reason)
        sites = _updated(self.sites, other.sites)
        return other._of(sites)

    def _of(self, sites: tuple[SitePolicy, ...]) -> Policy:
        """With these sites; what was measured end to end is not theirs if they are others."""
        if sites == self.sites:
            return self
        provenance = dataclasses.replace(self.provenance, results=FrozenMap())
        return dataclasses.replace(self, sites=sites, provenance=provenance)

    def _existing(self, name: str, ordinal: int) -> SitePolicy:
        found = self.site(name, ordinal)
        if found is None:
            near = difflib.get_close_matches(name, [site.name for site in self.sites], n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise PolicyError((), f"has no site {name!r}, ordinal {ordinal}{hint}")
        return found

    # ------------------------------------------------------------------------------------ shown

    def summary(self) -> str:
        """A table: for each site its heads, what is decided for them, errors and budgets."""
        origin, allowed = self.provenance, self.provenance.budget
        within = f"within {allowed.kind} {allowed.value:g}"
        calibrated = f"calibrated {within} on {origin.device}, {origin.created}"
        results = [f"{name}: {value:g}" for name, value in sorted(origin.results.items())]
        return "\n".join([str(self), calibrated, *results, *table(self.sites)])

    def __str__(self) -> str:
        heads = [head for site in self.sites for head in site.decision.heads]
        changed = sum(not head.is_exact for head in heads)
        return (
            f"policy {self.key()}: {len(self.sites)} sites, "
            f"{changed} of {len(heads)} heads not exact"
        )


# How a whole policy stands in its file.
FORM = Record(lambda sites, provenance, version: Policy(sites, provenance, version), POLICY_FIELDS)


def schema() -> dict[str, Any]:
    """The JSON Schema of the file, as published in schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:adaattn:policy:{VERSION}",
        "title": "AdaAttn policy",
        "description": "How each attention of a model is computed, head by head, and inside of "
        "which envelope. Beyond this schema, a reader checks that a site is there once, that low "
        "is at most high, that kv_heads divides the number of heads, and that a statistic has a "
        "range for each head or each key/value head.",
        **FORM.schema(),
    }


def _check_version(value: Any) -> None:
    """First of all: another format's other fields would be called unknown."""
    found = value.get("version") if isinstance(value, dict) else None
    if isinstance(found, int) and not isinstance(found, bool) and found != VERSION:
        raise PolicyError(
            ("version",),
            f"is {shown(found)}; this AdaAttn reads version {VERSION}: calibrate the model anew, "
            "or use the AdaAttn that wrote the file",
        )


def _updated(
    sites: tuple[SitePolicy, ...], others: tuple[SitePolicy, ...]
) -> tuple[SitePolicy, ...]:
    """With the others in place of those of their name and ordinal, new ones last."""
    found = {(site.name, site.ordinal): site for site in (*sites, *others)}
    return tuple(found.values())
