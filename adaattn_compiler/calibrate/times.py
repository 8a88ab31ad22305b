"""How long each candidate takes for each head of a site.

Most take the same time for any tensors of a shape: one call with all heads alike tells, for all
sites alike. What depends on the tensors is timed at each site: blocks that are chosen in a call,
and skipping, where each head leaves out what its scores allow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adaattn_compiler.decision import HeadDecision
from adaattn_compiler.kernels.timing import Way, least_seconds

# Calls that are timed at each site by itself, at least so many of each, and for so long.
_OWN_ROUNDS, _OWN_SECONDS = 2, 0.5
# Of its time without skipping a head takes at least so much: counts say little at the ends.
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Times:
    """Of a site. candidates: a short name for them all; seconds: of each, [candidates][heads]: of
    one head in a call with all heads alike."""

    candidates: str
    seconds: tuple[tuple[float, ...], ...]


class Timekeeping:
    """What was timed, by kinds of sites."""

    def __init__(self) -> None:
        self._of_kinds: dict[Hashable, list[float]] = {}

    def seconds(
        self,
        kind: Hashable,
        candidates: Sequence[HeadDecision],
        ways: Sequence[Way],
        skipped: Callable[[int], torch.Tensor],
    ) -> tuple[tuple[float, ...], ...]:
        """[candidates][heads]. kind: sites of the same have the same candidates and sizes. ways: to
        call each; skipped: how often rows of each head skip a block, [H], of a candidate's number.
        """
        if kind not in self._of_kinds:
            self._of_kinds[kind] = least_seconds(ways)
        together = list(self._of_kinds[kind])
        own = [i for i, candidate in enumerate(candidates) if _depends_on_tensors(candidate)]
        measured = least_seconds([ways[i] for i in own], _OWN_ROUNDS, _OWN_SECONDS)
        for i, seconds in zip(own, measured, strict=True):
            together[i] = seconds
        of_decisions = dict(zip(candidates, together, strict=True))
        return tuple(
            _by_head(candidate, of_decisions, skipped(i)) for i, candidate in enumerate(candidates)
        )


def _depends_on_tensors(candidate: HeadDecision) -> bool:
    return candidate.skip is not None or candidate.selection is not None


def _by_head(
    candidate: HeadDecision, together: Mapping[HeadDecision, float], skipped: torch.Tensor
) -> tuple[float, ...]:
    """The heads share what they save by skipping as they skip; all else they share alike."""
    heads = len(skipped)
    whole = together.get(dataclasses.replace(candidate, skip=None), together[candidate])
    saved = max(whole - together[candidate], 0.0)
    share = skipped.double() / max(int(skipped.sum()), 1)
    if saved == 0.0 or not bool(share.any()):
        return (together[candidate] / heads,) * heads
    return tuple((whole / heads - saved * share).clamp(min=_LEAST_SHARE * whole / heads).tolist())
