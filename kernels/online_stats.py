"""What a site that decides for itself has gathered and decided, to be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from adaattn_compiler.decision import EXACT, HeadDecision, describe_head
from adaattn_compiler.kernels.online import (
    MOST_TRIALS,
    SHARE,
    WORTH,
    Count,
    Memory,
    OnlinePlan,
    decisions,
)


@dataclass(frozen=True)
class OnlineStats:
    """One site. gathered: of so many calls. decisions: by head; None as long as it gathers.

    reasons: by head, why it is exact; empty where it is not. proposed: by head, what the heuristic
    wanted, where there is one. seconds: of the last call that gathered, exactly and as decided with
    guards and audits; None where nothing was decided that could be timed. trials: how often what
    was chosen was timed and was not faster. again_in: after how many more calls it is timed once
    more; None where it is not.
    """

    gathered: int
    calls: int
    decisions: tuple[HeadDecision, ...] | None = None
    reasons: tuple[str, ...] = ()
    proposed: tuple[HeadDecision, ...] | None = None
    seconds: tuple[float, float] | None = None
    trials: int = 0
    again_in: int | None = None

    def __str__(self) -> str:
        if self.decisions is None:
            return f"gathering, {self.gathered} of {self.calls} calls"
        return f"decided after {self.gathered} calls: {self._decided()}{self._proposed()}"

    def _decided(self) -> str:
        words = map(describe_head, self.decisions or ())
        named = (f"{w} ({why})" if why else w for w, why in zip(words, self.reasons, strict=True))
        times = self.seconds
        took = f"; {1e3 * times[0]:.3g} -> {1e3 * times[1]:.3g} ms" if times else ""
        return counted(named) + took + self._tried()

    def _tried(self) -> str:
        if not self.trials:
            return ""
        times = f"; tried {self.trials} of {MOST_TRIALS} times"
        return times if self.again_in is None else f"{times}, again in {self.again_in} calls"

    def _proposed(self) -> str:
        if self.proposed is None:
            return ""
        return f"; proposed: {counted(map(describe_head, self.proposed))}"


def counted(words: Iterable[str]) -> str:
    """ "2 x exact, 1 x dense bf16"."""
    return ", ".join(f"{count} x {word}" for word, count in Counter(words).most_common())


def online_stats(text: str, state: torch.Tensor) -> OnlineStats:
    """Of a plan's text and a state of it."""
    plan = OnlinePlan.deserialize(text)
    memory = Memory.of(plan, state.detach().cpu())
    gathered = int(memory.counts[Count.ENDED])
    if not memory.decided:
        return OnlineStats(gathered, plan.calls)
    times = (memory.counts[Count.EXACT_SECONDS], memory.counts[Count.DECIDED_SECONDS])
    found = decisions(plan, memory.chosen)
    return OnlineStats(
        gathered,
        plan.calls,
        found,
        tuple("" if d != EXACT else _reason(plan, memory, i) for i, d in enumerate(found)),
        None if plan.heuristic is None else decisions(plan, memory.proposed),
        (float(times[0]), float(times[1])) if times[0] else None,
        int(memory.counts[Count.TRIALS]),
        plan.calls - int(memory.counts[Count.WAITED]) if memory.may_try_again else None,
    )


def _reason(plan: OnlinePlan, memory: Memory, head: int) -> str:
    """Why a head is exact."""
    asked = np.ones(len(plan.candidates), dtype=bool)
    if plan.heuristic is not None:
        asked = np.arange(1, len(plan.candidates) + 1) == memory.proposed[head]
        if not asked.any():
            return "as proposed"
    limit = SHARE * plan.budget
    measured = asked & (memory.tried >= plan.tries)
    if not measured.any():
        return "nothing could be measured"
    within = measured & (memory.errors[:, head] <= limit)
    if not within.any():
        return f"errors from {memory.errors[measured, head].min():.2g} on, over {limit:.2g}"
    if not (np.median(memory.shares, 0)[within] < WORTH).any():
        return "nothing within the budget is faster"
    return "with guards and audits not faster"
