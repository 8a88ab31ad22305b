"""States of models that run under a policy or decide online: kept with each, found again by it.

A state belongs to a parameter of the model (the first of the site's module), under a policy and a
site: another compilation of the same model, for other lengths, goes on with it. Parameters are held
weakly: with the model its states are gone.

Whose parameters they are is asked in each call: Dynamo takes parameters as inputs, and runs one
compiled graph for all models of a class that are compiled with the same options.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from adaattn_compiler.fingerprint import weights_fingerprint
from adaattn_compiler.runtime.state import HEADS_ONLY, Column, StateForm, new_state

log = logging.getLogger("adaattn_compiler")

# In place of a policy's key, where decisions are made in the first calls.
ONLINE = "online"


@dataclass(frozen=True)
class StateKey:
    """A site of a model, and by the key of which policy it is computed, or ONLINE; form: of its
    state. What was gathered by another plan is another state."""

    policy: str
    name: str
    ordinal: int
    form: StateForm = HEADS_ONLY


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
            return new_state(heads, device, key.form)
        with self._lock:
            states: dict[StateKey, torch.Tensor] = self._found.setdefault(owner, {})
            if key not in states or states[key].shape[0] != heads + key.form.rows:
                states[key] = new_state(heads, device, key.form)
            return states[key]

    def known(self, owner: torch.Tensor, key: StateKey) -> torch.Tensor | None:
        """A site's state where it has one: nothing is made."""
        with self._lock:
            states: dict[StateKey, torch.Tensor] = self._found.get(owner, {})
            return states.get(key)

    def of_model(self, parameters: Iterable[torch.Tensor]) -> list[tuple[StateKey, torch.Tensor]]:
        """All states that belong to any of these parameters."""
        with self._lock:
            found = [self._found.get(parameter, {}) for parameter in parameters]
            return [entry for states in found for entry in states.items()]


# The one value of this package that changes while a process runs: what is in it is weak.
STATES = States()


@dataclass(frozen=True)
class BoundSite:
    """A site of a compiled graph. parameters: the paths of those of its module, or else of the
    model, and which of the graph's inputs they are. weights: the fingerprint that they must have
    (fingerprint.py); None: any."""

    key: StateKey
    heads: int
    device: str
    parameters: tuple[tuple[str, int], ...]
    weights: str | None = None

    def owner(self, inputs: Sequence[Any]) -> torch.Tensor | None:
        """The parameter that the state belongs to; None where the graph takes none."""
        return inputs[self.parameters[0][1]] if self.parameters else None

    def state(self, inputs: Sequence[Any]) -> torch.Tensor:
        """That of the model that these inputs are of; one that leaves all heads exact where it has
        other weights than the policy is for."""
        if self.weights is not None:
            own = [(path, inputs[place]) for path, place in self.parameters]
            if weights_fingerprint(own) != self.weights:
                return self._refused()
        return STATES.of(self.owner(inputs), self.key, self.heads, self.device)

    def _refused(self) -> torch.Tensor:
        log.warning(
            "policy %s: %s of another model has other weights than it was calibrated for, it is "
            "computed exactly",
            self.key.policy,
            self.key.name or "(root)",
        )
        state = new_state(self.heads, self.device, self.key.form)
        state[: self.heads, Column.DEMOTED] = 1
        return state


# Of which parameters, and the states.
_Found = tuple[tuple["weakref.ref[torch.Tensor]", ...], tuple[torch.Tensor, ...]]


class BoundStates:
    """The states of a compiled graph's sites, of whichever model it is called for.

    inputs: of the model that it was compiled for.
    """

    def __init__(self, sites: Sequence[BoundSite], inputs: Sequence[Any]) -> None:
        self._sites = tuple(sites)
        self._places = tuple(site.parameters[0][1] for site in sites if site.parameters)
        self._latest = self._found(inputs, {})

    def of(self, inputs: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """The states that go with these inputs, in the order of the sites."""
        owners, states = self._latest
        for owner, place in zip(owners, self._places, strict=True):
            if owner() is not inputs[place]:
                # States of sites without parameters are the graph's.
                own = {s: t for s, t in zip(self._sites, states, strict=True) if not s.parameters}
                owners, states = self._latest = self._found(inputs, own)
                break
        return states

    def _found(self, inputs: Sequence[Any], own: Mapping[BoundSite, torch.Tensor]) -> _Found:
        owners = tuple(weakref.ref(inputs[place]) for place in self._places)
        return owners, tuple(own[s] if s in own else s.state(inputs) for s in self._sites)
