"""How far a calibration is, on a terminal as a bar, elsewhere as a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

# Told (stage, how many are done, of how many: 0 where that is not known).
Progress = Callable[[str, int, int], None]

_WIDTH = 24
# Seconds between lines where there is no terminal.
_BETWEEN_LINES = 10.0


def no_progress(stage: str, done: int, of: int) -> None:
    """Says nothing."""


class Bar:
    """Called with (stage, done, of), of being 0 where it is not known. `close` ends its line."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._is_terminal = out.isatty()
        self._stage = ""
        self._begun = self._written = 0.0
        self._first = self._done = self._of = 0
        self._drawn = 0  # characters of the line that stands on the terminal

    def __call__(self, stage: str, done: int, of: int) -> None:
        now = self._clock()
        is_new = stage != self._stage
        if is_new:
            self._finish()
            self._stage, self._begun, self._first = stage, now, done
        self._done, self._of = done, of
        if self._is_terminal:
            self._draw(self._line(now))
        elif is_new or now - self._written >= _BETWEEN_LINES:
            self._written = now
            self._print(self._line(now))

    def say(self, text: str) -> None:
        """A line of its own."""
        if self._drawn:
            self._draw("")
        self._print(text)

    def close(self) -> None:
        """The last stage is over, or broken off."""
        self._finish()
        self._stage = ""

    def _finish(self) -> None:
        if not self._stage:
            return
        line = f"{self._stage}: {spent(self._clock() - self._begun)}"
        if self._drawn:
            self._draw("")
        self._print(line)

    def _line(self, now: float) -> str:
        elapsed = now - self._begun
        if not self._of:
            return f"{self._stage}: try {self._done}, {spent(elapsed)}"
        line = f"{self._stage}: {self._done} of {self._of}"
        if self._is_terminal:
            full = min(_WIDTH * self._done // self._of, _WIDTH)
            line = f"{self._stage} [{'#' * full}{'.' * (_WIDTH - full)}] {self._done}/{self._of}"
        return f"{line}, {spent(elapsed)}{self._left(elapsed)}"

    def _left(self, elapsed: float) -> str:
        """By what was done since the stage began; what was done before took no time now."""
        done, missing = self._done - self._first, self._of - self._done
        if done <= 0 or missing <= 0:
            return ""
        return f", about {spent(elapsed / done * missing)} left"

    def _draw(self, line: str) -> None:
        line = line[:119]  # a line that wraps cannot be drawn over
        self._out.write(f"\r{line.ljust(self._drawn)}" + ("" if line else "\r"))
        self._out.flush()
        self._drawn = len(line)

    def _print(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


def spent(seconds: float) -> str:
    """A time as one says it: 0.4 s, 12 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
