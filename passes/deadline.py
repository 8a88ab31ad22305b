"""A limit for the time that the analysis of a graph may take."""

from __future__ import annotations

import time
from dataclasses import dataclass


class OutOfTime(Exception):
    """The analysis took too long; the graph is left as it is."""


@dataclass(frozen=True)
class Deadline:
    """seconds: what was allowed; end: when that is over, on the clock of time.monotonic()."""

    seconds: float
    end: float

    @staticmethod
    def after(seconds: float) -> Deadline:
        """A deadline that many seconds from now."""
        return Deadline(seconds, time.monotonic() + seconds)

    def check(self) -> None:
        """OutOfTime once it has passed. Called wherever work is done by the piece."""
        if time.monotonic() > self.end:
            raise OutOfTime(
                f"analysis took longer than {self.seconds:g} s (option analysis_seconds)"
            )


NO_DEADLINE = Deadline(float("inf"), float("inf"))
