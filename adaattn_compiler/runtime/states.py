"""States of the models that run under a policy: kept with each model, found again by it.

A state belongs to a model's parameters (the first that a graph takes as an input), under a policy
and a site: another compilation of the same model, for other lengths, goes on with it. Parameters
are held weakly: with the model its states are gone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from adaattn_compiler.runtime.state import new_state


@dataclass(frozen=True)
class StateKey:
    """A site of a model, and by the key of which policy it is computed."""

    policy: str
    name: str
    ordinal: int


class States:
    """The states of all models of a process; safe for several threads."""

    def __init__(self) -> None:
        self._found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def of(
        self,
        owner: torch.Tensor | None,
        key: StateKey,
        heads: int,
        device: torch.device | str,
    ) -> torch.Tensor:
        """A site's state, made where there is none; owner: a parameter of the model, if any."""
        if owner is None:
            return new_state(heads, device)
        with self._lock:
            states: dict[StateKey, torch.Tensor] = self._found.setdefault(owner, {})
            if key not in states or states[key].shape[0] != heads:
                states[key] = new_state(heads, device)
            return states[key]

    def of_model(self, parameters: Iterable[torch.Tensor]) -> dict[StateKey, torch.Tensor]:
        """All states that belong to any of these parameters."""
        found: dict[StateKey, torch.Tensor] = {}
        with self._lock:
            for parameter in parameters:
                found.update(self._found.get(parameter, {}))
        return found


# The one value of this package that changes while a process runs: what is in it is weak.
STATES = States()
