"""Exponential moving averages of statistics, for each head, as a value that can be kept in a file.

With decay d and values x_1, ..., x_t, starting from nothing,

    sum_t = d sum_(t-1) + (1 - d) x_t            mean_t = sum_t / (1 - d^t)

The division takes out the start from 0 (Kingma, Ba: Adam, 2015, section 3): the mean is that of all
values with weights d^(t-i), and the first mean is x_1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_VERSION = 1


@dataclass(frozen=True)
class Average:
    """Of one statistic, by head: sums as above, and of how many values they are."""

    sums: tuple[float, ...]
    count: int

    def means(self, decay: float) -> tuple[float, ...]:
        """By head."""
        share = 1 - decay**self.count
        return tuple(total / share for total in self.sums)


@dataclass(frozen=True)
class MovingAverages:
    """Averages by the statistic's name; decay: how much of the past a new value leaves."""

    decay: float = 0.99
    averages: Mapping[str, Average] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is {self.decay!r}; it must be at least 0, below 1")

    def updated(self, statistics: Mapping[str, Sequence[float]]) -> MovingAverages:
        """With one more value for each head of these statistics; others stay as they are.

        ValueError for a value that is not finite (one would stay in the average for ever), and for
        another number of heads than before.
        """
        new = {name: self._updated(name, values) for name, values in statistics.items()}
        return MovingAverages(self.decay, {**self.averages, **new})

    def _updated(self, name: str, values: Sequence[float]) -> Average:
        for head, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(f"{name} of head {head} is {value!r}; it must be finite")
        before = self.averages.get(name, Average((0.0,) * len(values), 0))
        _check_heads(name, len(before.sums), len(values))
        sums = tuple(
            self.decay * total + (1 - self.decay) * value
            for total, value in zip(before.sums, values, strict=True)
        )
        return Average(sums, before.count + 1)

    def means(self) -> dict[str, tuple[float, ...]]:
        """By name and head."""
        return {name: average.means(self.decay) for name, average in self.averages.items()}

    def merged(self, other: MovingAverages) -> MovingAverages:
        """Of two streams of values (two processes, say): counts add up.

        Which values came first is not known: means weigh by 1 - d^t, what each stream has seen of a
        full average, so that a stream that has just begun moves one of long standing little.
        """
        if other.decay != self.decay:
            raise ValueError(f"decays differ: {self.decay!r} and {other.decay!r}")
        both = {**self.averages, **other.averages}
        for name in self.averages.keys() & other.averages.keys():
            pair = (self.averages[name], other.averages[name])
            both[name] = _merged(name, *pair, self.decay)
        return MovingAverages(self.decay, both)

    def to_json(self) -> str:
        """Text from which `from_json` makes an equal value, to the bit: floats by their repr."""
        averages = {
            name: {"sums": average.sums, "count": average.count}
            for name, average in sorted(self.averages.items())
        }
        fields = {"version": _VERSION, "decay": self.decay, "averages": averages}
        return json.dumps(fields, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> MovingAverages:
        """ValueError where the text is not what `to_json` writes."""
        try:
            fields = json.loads(text)
            if fields["version"] != _VERSION:
                raise ValueError(f"averages of version {fields['version']!r}, not {_VERSION}")
            averages = {name: _read(name, of) for name, of in fields["averages"].items()}
            return MovingAverages(float(fields["decay"]), averages)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not moving averages: {text[:80]!r}") from error


def _read(name: str, fields: Mapping[str, Any]) -> Average:
    sums, count = tuple(float(total) for total in fields["sums"]), fields["count"]
    if type(count) is not int or count < 1 or not all(math.isfinite(total) for total in sums):
        raise ValueError(f"{name}: {count!r} values with sums {sums}")
    return Average(sums, count)


def _merged(name: str, one: Average, other: Average, decay: float) -> Average:
    _check_heads(name, len(one.sums), len(other.sums))
    count = one.count + other.count
    # mean = (sum_1 + sum_2) / (w_1 + w_2) with w = 1 - d^t, as sum / w is each one's mean.
    share = (1 - decay**count) / ((1 - decay**one.count) + (1 - decay**other.count))
    sums = tuple((a + b) * share for a, b in zip(one.sums, other.sums, strict=True))
    return Average(sums, count)


def _check_heads(name: str, before: int, now: int) -> None:
    if before != now:
        raise ValueError(f"{name} of {now} heads, after {before}")
