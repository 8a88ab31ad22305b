"""The processes that calibrate together: what each of them measured, for all of them.

Every rank has the whole model and all samples, runs its share of them, and comes to the same
decisions: what decisions depend on is gathered, or taken from the first rank.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """index: which this process is, of count."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share."""
        return items[self.index :: self.count]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order, on every rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.count == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0)
        received: T = held[0]
        return received


ALONE = Ranks()


def joined() -> Ranks:
    """The ranks that torchrun started, or this process alone. `left` ends it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def left(ranks: Ranks) -> None:
    """End what `joined` began."""
    if ranks.count > 1 and dist.is_initialized():
        dist.destroy_process_group()
