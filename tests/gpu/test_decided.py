"""Heads as a policy decides, on the device: against float64, and without waiting for it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from decided import BF16, WINDOW, Seen, inputs, policy_for, stack
from decided_on_gpu import HALF, PARTS, assert_right, gpu_plan, problem_named
from decided_on_gpu import WINDOW as NEAR
from decided_plans import flags_of
from on_gpu import on_device, poisoned
from specs import random_inputs

import adaattn_compiler
from adaattn_compiler.decision import EXACT, HeadDecision, Pattern, Pooling, Selection
from adaattn_compiler.kernels.decided import DecidedPlan
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.kernels.triton.decided import attention_as_decided
from adaattn_compiler.runtime.state import new_state

pytestmark = pytest.mark.gpu

CHOSEN = HeadDecision(selection=Selection(0.4, window=0, sinks=0))
MEANS = HeadDecision(pooling=Pooling(Pattern(0), 16))
SKIPPING = HeadDecision(skip=60.0)  # so much that nothing is left out that counts


@contextlib.contextmanager
def not_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def given(problem: Problem) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """q, k and v; operands; flags."""
    qkv, operands = map(on_device, random_inputs(problem))
    return qkv, operands, flags_of(problem).cuda()


def through(problem: Problem, plan: DecidedPlan) -> torch.Tensor:
    qkv, operands, flags = given(problem)
    state = new_state(len(plan.heads)).cuda()
    text = plan.serialize()
    with poisoned():
        return attention_as_decided(*qkv, operands, problem.param_hints, flags, state, text).cpu()


@pytest.mark.parametrize("name", ["gqa", "sink", "dense bias", "plain"])
def test_each_head_is_computed_as_decided(name: str) -> None:
    problem = problem_named(name)
    # Heads that share keys may differ; only without a mask are blocks chosen that leave some out.
    heads = (EXACT, NEAR, HALF, CHOSEN if name == "plain" else SKIPPING)
    assert_right(problem, heads, through(problem, gpu_plan(problem, heads, PARTS, rows=4)))


@pytest.mark.parametrize("last", [CHOSEN, SKIPPING, MEANS], ids=str)
def test_a_call_does_not_wait_for_the_device(last: HeadDecision) -> None:
    problem = problem_named("gqa")
    plan = gpu_plan(problem, (EXACT, NEAR, HALF, last), PARTS, rows=4)
    text, state = plan.serialize(), new_state(4).cuda()
    qkv, operands, flags = given(problem)

    def call() -> None:
        attention_as_decided(*qkv, operands, problem.param_hints, flags, state, text)

    call()  # compiles, and keeps tables on the device
    with not_waiting():
        call()


@pytest.mark.parametrize("cudagraphs", [False, True])
def test_a_model_runs_as_decided(cudagraphs: bool) -> None:
    """Each call counts, whether it is launched or replayed."""
    model, x = stack(), inputs()
    policy = policy_for(Seen(model, x), (WINDOW, BF16))
    true = copy.deepcopy(model).double()(x.double()).detach()
    model, x = model.cuda(), x.cuda()
    options = {"measure": False, "kernels": "triton", "policy": policy}
    options["triton.cudagraphs"] = cudagraphs
    fast = torch.compile(model, backend="adaattn", options=options)
    with torch.no_grad():
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            fast(x)
        torch.compiler.cudagraph_mark_step_begin()
        with not_waiting():
            out = fast(x)
    error = float((out.cpu() - true).norm() / true.norm())
    assert 1e-6 < error < 0.01
    for site in adaattn_compiler.stats(model).sites:
        found = [(head.calls, head.as_decided, head.demoted) for head in site.heads]
        assert found == [(5, 5, False)] * 2, site.name
