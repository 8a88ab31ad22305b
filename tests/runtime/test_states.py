"""States belong to the model that a graph is called for, whichever it was compiled for."""

from __future__ import annotations

import copy
import gc
import logging

import pytest
import torch
from decided import Seen, inputs, policy_for, stack

import adaattn_compiler
from adaattn_compiler.policy import Policy
from adaattn_compiler.runtime.state import Column, StateForm, new_state
from adaattn_compiler.runtime.states import BoundSite, BoundStates, StateKey, States


def compiled(model: torch.nn.Module, policy: Policy | None) -> torch.nn.Module:
    options = {"measure": False, "kernels": "cpp"}
    if policy is not None:
        options["policy"] = policy
    return torch.compile(model, backend="adaattn", options=options)


def run(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_another_model_under_the_same_policy_is_exact_though_no_graph_is_made_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = stack(depth=1), inputs()
    policy = policy_for(Seen(model, x))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].qkv.weight += 0.01
    decided = run(compiled(model, policy), x)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with caplog.at_level(logging.WARNING, "adaattn_compiler"):
        given = run(compiled(other, policy), x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert "other weights" in caplog.text
    again = run(compiled(model, policy), x)
    torch.compiler.reset()
    assert torch.equal(given, run(compiled(other, None), x))
    assert torch.equal(again, decided)
    torch.compiler.reset()
    assert not torch.equal(decided, run(compiled(model, None), x))


def test_models_of_the_same_weights_have_states_of_their_own() -> None:
    one, x = stack(depth=1), inputs()
    policy = policy_for(Seen(one, x))
    two = copy.deepcopy(one)
    fast = compiled(one, policy), compiled(two, policy)
    for turns, model in ((3, fast[0]), (2, fast[1]), (1, fast[0])):
        for _ in range(turns):
            run(model, x)
    calls = [adaattn_compiler.stats(m).sites[0].heads[0].calls for m in (one, two)]
    assert calls == [4, 2]


# -- the parts -------------------------------------------------------------------------------------

KEY = StateKey("p", "layer", 0)


def test_a_graph_finds_the_state_of_whom_it_is_called_for() -> None:
    one, two = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    bound = BoundStates([BoundSite(KEY, 2, "cpu", (("layer.w", 1),))], [None, one])
    (first,), (second,) = bound.of([None, one]), bound.of([None, two])
    assert first is not second
    assert bound.of([None, one])[0] is first
    assert bound.of([5, two])[0] is second


def test_a_site_without_parameters_has_a_state_of_the_graph() -> None:
    one, two = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    sites = [BoundSite(KEY, 2, "cpu", ()), BoundSite(StateKey("p", "x", 0), 2, "cpu", (("w", 0),))]
    bound = BoundStates(sites, [one])
    first, second = bound.of([one]), bound.of([two])
    assert first[0] is second[0]
    assert first[1] is not second[1]


def test_the_form_of_a_state_is_part_of_its_key() -> None:
    states, owner = States(), torch.nn.Parameter(torch.randn(3))
    further = StateKey("online", "layer", 0, StateForm(4, "a plan"))
    assert states.of(owner, KEY, 2, "cpu").shape == (2, len(Column))
    assert states.of(owner, further, 2, "cpu").shape == (6, len(Column))
    assert new_state(2).shape == (2, len(Column))
    assert [key for key, _ in states.of_model([owner])] == [KEY, further]


def test_with_its_owner_a_state_is_gone() -> None:
    states, owner = States(), torch.nn.Parameter(torch.randn(3))
    states.of(owner, KEY, 2, "cpu")
    other = torch.nn.Parameter(torch.randn(3))
    del owner
    gc.collect()
    assert states.of_model([other]) == []
    assert len(states._found) == 0
