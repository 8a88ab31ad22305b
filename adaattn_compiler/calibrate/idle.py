"""Why a policy leaves everything exact although less work was tried: what its measurements say.

On a busy machine, or where calls are so short that their fixed costs are all that is timed, a
window over half of the keys takes as long as all of them, and nothing seems to be worth choosing.
What a candidate has to do can be counted, and does not depend on that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adaattn_compiler.calibrate.measure import SiteMeasurements
from adaattn_compiler.decision import BLOCK, HeadDecision, describe_head
from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.cpu.decided_lists import decisions_at
from adaattn_compiler.kernels.patterns import kept_blocks
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy import LARGEST_BUDGET, Budget, Policy

# A candidate with at most this share of the exact one's blocks should be faster than it.
_LESS = 0.75


@dataclass(frozen=True)
class _Tried:
    """A candidate of a site. work, time: shares of the exact one's."""

    key: SiteKey
    candidate: HeadDecision
    work: float
    time: float
    keys: int


def idle(
    policy: Policy, sites: Mapping[SiteKey, SiteMeasurements], budget: Budget, limit: float
) -> str:
    """In words, where every head is exact and candidates with much less to do were no faster; else
    "". limit: of a head's error, where the budget is one of that."""
    if any(not site.decision.is_exact for site in policy.sites):
        return ""
    most = limit if budget.kind == "budget" else LARGEST_BUDGET
    tried = [each for key, site in sites.items() for each in _with_less_work(key, site, most)]
    if not tried:
        return ""
    best = min(tried, key=lambda each: each.time)
    if best.time < 1:  # fast enough, and not chosen for what it does to the model
        return ""
    return (
        f"no head is other than exact, as nothing was faster: {describe_head(best.candidate)} at "
        f"{best.key.name or '(root)'} does {best.work:.0%} of the work and took {best.time:.2f} "
        "times as long as exact, the least of all that do less. The machine was busy, or the "
        f"samples are too short to tell ({best.keys} keys): calibrate anew while nothing else "
        "runs, or on longer samples"
    )


def _with_less_work(key: SiteKey, site: SiteMeasurements, most: float) -> Iterator[_Tried]:
    """Candidates that some head could take by its error."""
    able, seconds = (site.p99() <= most).any(1).tolist(), site.seconds.sum(1).tolist()
    for number, candidate in enumerate(site.candidates):
        work = _work(site, candidate) if able[number] else 1.0
        if work <= _LESS:
            time = seconds[number] / seconds[0]
            yield _Tried(key, candidate, work, time, site.problem.shape.hints[2])


def _work(site: SiteMeasurements, candidate: HeadDecision) -> float:
    """The share of the exact one's blocks; 1 where that is not known before a call."""
    if candidate.pattern is None:
        return 1.0
    problem = site.problem
    _, rows, columns = problem.shape.hints
    params = problem.param_hints
    ((head,), _) = decisions_at(problem.spec, (candidate,), (rows, columns), params)
    structure = block_structure(problem.spec.mask, rows, columns, BLOCK, BLOCK, params)
    allowed = structure.partial | structure.full
    kept = kept_blocks(head, rows, columns) & allowed
    return float(kept.sum()) / max(float(allowed.expand_as(kept).sum()), 1.0)
