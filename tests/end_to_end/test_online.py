"""mode="online": exact while a site gathers, then as it decided, exactly outside of what it saw."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
import torch
from decided import PROVENANCE, Layer, inputs, stack

import adaattn_compiler
from adaattn_compiler.decision import EXACT
from adaattn_compiler.kernels import online_runner
from adaattn_compiler.kernels.online import MOST_TRIALS, OnlinePlan
from adaattn_compiler.kernels.online_stats import OnlineStats
from adaattn_compiler.options import parse_options
from adaattn_compiler.policy import Policy
from adaattn_compiler.runtime.state import Column, new_state
from adaattn_compiler.runtime.states import STATES
from adaattn_compiler.said import warn_once

CALLS = 3
PROVIDED = Policy((), PROVENANCE)


@pytest.fixture(autouse=True)
def _twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may depend on times: all that is inexact takes half."""
    monkeypatch.setattr(online_runner, "least_seconds", _seconds(0.5))


def _seconds(share: float) -> Callable[..., list[float]]:
    def seconds(ways: Sequence[Callable[[], object]], *_: float, **__: bool) -> list[float]:
        for way in ways:
            way()
        return [1.0, *[share] * (len(ways) - 1)]

    return seconds


def compiled(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    # cpp: what is exact is computed by the kernel that decisions use, so that it is the same bits.
    given = {"measure": False, "kernels": "cpp", "mode": "online", "online_calls": CALLS, **options}
    given = {name: value for name, value in given.items() if value is not None}
    return torch.compile(model, backend="adaattn", options=given)


def run(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def exact(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.compiler.reset()
    out = run(compiled(model, mode=None, online_calls=None), x)
    torch.compiler.reset()
    return out


def gathered(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    """A model whose sites have decided."""
    fast = compiled(model, **options)
    for seed in range(CALLS):
        run(fast, inputs(seed=seed))
    return fast


def online(model: torch.nn.Module) -> OnlineStats:
    (site,) = adaattn_compiler.stats(model).sites
    assert site.policy == "online"
    assert site.online is not None
    return site.online


def relative(given: torch.Tensor, true: torch.Tensor) -> float:
    return float((given.double() - true.double()).norm() / true.double().norm())


def test_a_site_gathers_exactly_and_then_decides() -> None:
    model = stack(depth=1)
    fast, true = compiled(model), copy.deepcopy(model).double()
    outs = []
    for seed in range(CALLS):
        if seed:
            assert str(online(model)) == f"gathering, {seed} of {CALLS} calls"
        outs.append(run(fast, inputs(seed=seed)))
    found = online(model)
    assert found.decisions is not None
    # The first head sees its neighbours alone, the second all keys alike.
    local, diffuse = found.decisions
    assert local.pattern is not None
    assert diffuse.pattern is None
    out = run(fast, inputs(seed=9))
    assert 1e-6 < relative(out, run(true, inputs(seed=9).double())) < 0.01
    for head in adaattn_compiler.stats(model).sites[0].heads:
        assert (head.calls, head.as_decided, head.demoted) == (CALLS + 1, 1, False)
    for seed in range(CALLS):
        assert torch.equal(outs[seed], exact(model, inputs(seed=seed)))


def test_each_head_keeps_to_its_budget() -> None:
    model = stack(depth=1)
    gathered(model, online_budget=1e-5)
    found = online(model)
    assert found.decisions is not None
    # In fewer bits nothing is that near; of a steep bias a window is.
    assert found.decisions[1] == EXACT
    assert found.decisions[0].pattern is not None
    assert found.decisions[0].scores is EXACT.scores
    assert re.search(r"errors from [\d.e-]+ on, over 8e-06", found.reasons[1])


def test_of_gaussian_attention_nothing_is_left_out() -> None:
    model = stack(depth=1, slopes=(0.0, 0.0))
    fast = gathered(model, online_budget=1e-4)
    assert online(model).decisions == (EXACT, EXACT)
    x = inputs(seed=9)
    assert torch.equal(run(fast, x), exact(model, x))
    assert str(adaattn_compiler.stats(model)).count("1 x exact (errors from") == 2


def test_what_is_not_faster_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_runner, "least_seconds", _seconds(0.97))
    model = stack(depth=1)
    gathered(model)
    found = online(model)
    assert found.decisions == (EXACT, EXACT)
    assert found.reasons == ("nothing within the budget is faster",) * 2


def test_a_choice_that_is_slower_with_its_guards_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def seconds(ways: Sequence[Callable[[], object]], *_: float, **__: bool) -> list[float]:
        return _seconds(0.5 if len(ways) > 2 else 1.1)(ways)  # candidates; the whole choice

    monkeypatch.setattr(online_runner, "least_seconds", seconds)
    model = stack(depth=1)
    gathered(model)
    found = online(model)
    assert found.decisions == (EXACT, EXACT)
    assert found.reasons == ("with guards and audits not faster",) * 2
    assert found.seconds == (1.0, 1.1)
    assert "tried 1 of 4 times, again in 3 calls" in str(found)


def test_a_choice_that_was_not_faster_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    share = 1.1

    def seconds(ways: Sequence[Callable[[], object]], *_: float, **__: bool) -> list[float]:
        return _seconds(0.5 if len(ways) > 2 else share)(ways)

    monkeypatch.setattr(online_runner, "least_seconds", seconds)
    model = stack(depth=1)
    fast, true = gathered(model), copy.deepcopy(model).double()
    share = 0.5  # the machine is quiet again
    for seed in range(CALLS - 1):
        run(fast, inputs(seed=seed))
        assert online(model).decisions == (EXACT, EXACT)
        assert online(model).again_in == CALLS - 1 - seed
    run(fast, inputs(seed=5))
    found = online(model)
    assert found.decisions is not None
    assert found.decisions[0].pattern is not None
    assert found.again_in is None
    assert 1e-6 < relative(run(fast, inputs(seed=9)), run(true, inputs(seed=9).double())) < 0.01


def test_trials_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = 0

    def seconds(ways: Sequence[Callable[[], object]], *_: float, **__: bool) -> list[float]:
        nonlocal trials
        trials += len(ways) == 2
        return _seconds(0.5 if len(ways) > 2 else 1.1)(ways)

    monkeypatch.setattr(online_runner, "least_seconds", seconds)
    model = stack(depth=1)
    fast = gathered(model)
    for _ in range(5 * CALLS):
        run(fast, inputs())
    assert trials == MOST_TRIALS
    found = online(model)
    assert (found.trials, found.again_in) == (MOST_TRIALS, None)
    assert "tried 4 of 4 times" in str(found)
    assert "again" not in str(found)
    x = inputs(seed=9)
    assert torch.equal(run(fast, x), exact(model, x))


@pytest.mark.parametrize("shift", ["larger", "one-hot", "all alike", "not finite"])
def test_inputs_of_another_kind_are_computed_exactly(shift: str) -> None:
    model = stack(depth=1)
    fast, x = gathered(model), inputs(seed=9)
    if shift == "not finite":
        x[0, 200, 3] = float("nan")
    other = {
        "larger": 30 * x,
        "one-hot": torch.nn.functional.one_hot(torch.arange(256) % 32, 32).float()[None],
        "all alike": x[:, :1].expand(-1, 256, -1).contiguous(),
        "not finite": x,
    }[shift]
    out = run(fast, other)
    assert [h.left_envelope for h in adaattn_compiler.stats(model).sites[0].heads] == [1, 1]
    torch.testing.assert_close(out, exact(model, other), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [257, 320, 127])
def test_other_lengths_are_computed_exactly(rows: int) -> None:
    model = stack(depth=1)
    options = {"mode": "online", "online_calls": CALLS, "measure": False, "kernels": "cpp"}
    fast = torch.compile(model, backend="adaattn", dynamic=True, options=options)
    for seed in range(CALLS):
        run(fast, inputs(seed=seed))
    shorter = run(fast, inputs(rows=192, seed=9))
    out = run(fast, inputs(rows=rows, seed=9))
    assert [h.left_envelope for h in adaattn_compiler.stats(model).sites[0].heads] == [1, 1]
    assert torch.equal(out, exact(model, inputs(rows=rows, seed=9)))
    assert not torch.equal(shorter, exact(model, inputs(rows=192, seed=9)))


def test_a_call_that_is_not_finite_teaches_nothing() -> None:
    model = stack(depth=1)
    fast, x = compiled(model), inputs()
    x[0, 5] = float("inf")
    for _ in range(CALLS):
        run(fast, x)
    assert online(model).gathered == 0
    gathered(model)
    assert online(model).decisions is not None


def test_a_head_over_its_budget_is_demoted() -> None:
    model = stack(depth=1)
    fast = gathered(model, audit_rows=8)
    assert online(model).decisions is not None
    with torch.no_grad():  # what no guard looks at: q, k and v are as they were
        model.layers[0].slopes[0] = 0.0
    for seed in range(130):  # sixteen audits, each in every eighth call
        run(fast, inputs(seed=seed))
    first, second = adaattn_compiler.stats(model).sites[0].heads
    assert (first.demoted, second.demoted) == (True, False)
    out, x = run(fast, inputs(seed=130)), inputs(seed=130)
    assert torch.equal(out[..., :16], exact(model, x)[..., :16])
    assert not torch.equal(out[..., 16:], exact(model, x)[..., 16:])


def test_two_models_do_not_mix() -> None:
    one, two = stack(0, depth=1), stack(1, depth=1, slopes=(0.0, 2.0))
    fast = compiled(one), compiled(two)
    for seed in range(CALLS):
        run(fast[0], inputs(seed=seed))
    assert online(one).decisions is not None
    with pytest.raises(ValueError, match="has run no site"):
        adaattn_compiler.stats(two)
    run(fast[1], inputs())
    assert online(two).gathered == 1
    for seed in range(1, CALLS):
        run(fast[1], inputs(seed=seed))
    first, second = online(one).decisions, online(two).decisions
    assert first is not None
    assert second is not None
    assert first[0].pattern is not None
    assert first[1].pattern is None
    assert second[0].pattern is None
    assert second[1].pattern is not None


def test_models_that_share_a_parameter_do_not_mix() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self, scale: torch.nn.Parameter, seed: int) -> None:
            super().__init__()
            self.scale = scale
            torch.manual_seed(seed)
            self.layer = Layer()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x * self.scale)

    scale = torch.nn.Parameter(torch.ones(()))
    one, two = Scaled(scale, 0).eval(), Scaled(scale, 1).eval()
    gathered(one)
    run(compiled(two), inputs())
    assert (online(one).gathered, online(two).gathered) == (CALLS, 1)


def test_a_copy_of_a_model_starts_anew() -> None:
    model = stack(depth=1)
    gathered(model)
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match="has run no site"):
        adaattn_compiler.stats(other)


def test_threads_gather_together() -> None:
    model, calls = stack(depth=1), 6
    fast = compiled(model, online_calls=calls)
    xs = [inputs(seed=seed) for seed in range(6)]
    outs: dict[tuple[int, int], torch.Tensor] = {}
    run(fast, xs[0])

    def work(number: int) -> None:
        for i, x in enumerate(xs):
            outs[number, i] = run(fast, x)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = online(model)
    assert found.gathered == calls
    assert found.decisions is not None
    assert found.decisions[0].pattern is not None
    assert all(head.calls == 19 for head in adaattn_compiler.stats(model).sites[0].heads)
    decided = [run(fast, x) for x in xs]
    exactly = [exact(model, x) for x in xs]
    for (_, i), out in outs.items():  # nothing in between
        assert torch.equal(out, decided[i]) or torch.equal(out, exactly[i])


def test_training_is_exact_and_says_so() -> None:
    model, x = stack(depth=1).train(), inputs()
    compiled(model)(x).sum().backward()
    grad = model.layers[0].qkv.weight.grad.clone()
    model.zero_grad()
    torch.compiler.reset()
    compiled(model, mode=None, online_calls=None)(x).sum().backward()
    assert torch.equal(grad, model.layers[0].qkv.weight.grad)
    options = {"mode": "online", "measure": False}
    (site,) = adaattn_compiler.explain(model, x, options=options).sites
    assert site.decision == "exact"
    assert "a gradient is wanted" in (site.refused or "")
    for remedy in ("torch.no_grad()", "torch.inference_mode()", "train it without them"):
        assert remedy in (site.refused or "")


def test_dropout_is_refused_with_its_remedy() -> None:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.1)

    options = {"mode": "online", "measure": False}
    qkv = (torch.randn(1, 2, 256, 16) for _ in range(3))
    (site,) = adaattn_compiler.explain(attention, *qkv, options=options).sites
    assert "dropout is on here: call model.eval() first" in (site.refused or "")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_both_remedies_for_a_gradient_are_ones(
    context: Callable[[], AbstractContextManager[None]],
) -> None:
    model = stack(depth=1)
    fast = compiled(model)
    for seed in range(CALLS + 1):
        with context():
            fast(inputs(seed=seed))
    assert online(model).decisions is not None


def test_explain_says_how_long_it_gathers() -> None:
    options = {"mode": "online", "online_calls": 5, "kernels": "cpp", "measure": False}
    with torch.no_grad():
        found = adaattn_compiler.explain(stack(depth=1), inputs(), options=options)
    (site,) = found.sites
    assert site.decision == "online: gathers for 5 calls"
    assert "within 0.01" in (site.why or "")


def explained(model: torch.nn.Module, **options: object) -> list[str | None]:
    given = {"measure": False, "kernels": "cpp", "mode": "online", "online_calls": CALLS, **options}
    with torch.no_grad():
        found = adaattn_compiler.explain(model, inputs(), options=given)
    for site in found.sites:
        assert str(site.decision) in str(found)
    return [site.decision for site in found.sites]


def test_explain_says_what_is_gathered_and_decided_by_now() -> None:
    model = stack(depth=2, slopes=(1.0, 0.0))
    fast = compiled(model)
    run(fast, inputs())
    assert explained(model) == [f"online: gathering, 1 of {CALLS} calls"] * 2
    assert explained(model) == [f"online: gathering, 1 of {CALLS} calls"] * 2  # it does not gather
    for seed in range(1, CALLS):
        run(fast, inputs(seed=seed))
    known = [f"online: {site.online}" for site in adaattn_compiler.stats(model).sites]
    assert explained(model) == known
    assert "online: decided after 3 calls: 1 x window" in known[0]
    # Of another model, or by another budget, nothing is known.
    assert explained(stack(depth=1)) == [f"online: gathers for {CALLS} calls"]
    assert explained(model, online_budget=0.5) == [f"online: gathers for {CALLS} calls"] * 2
    assert run(fast, inputs(seed=9)) is not None
    assert [f"online: {site.online}" for site in adaattn_compiler.stats(model).sites] == known


def test_explain_says_why_a_site_decided_to_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_runner, "least_seconds", _seconds(0.97))
    model = stack(depth=1)
    gathered(model)
    why = "nothing within the budget is faster"
    assert explained(model) == [f"online: decided after {CALLS} calls: 2 x exact ({why})"]


def test_explain_says_how_many_heads_are_demoted() -> None:
    model = stack(depth=1)
    gathered(model)
    ((_, state),) = STATES.of_model(model.parameters())
    state[1, Column.DEMOTED] = 1
    (said,) = explained(model)
    assert (said or "").endswith("; 1 demoted since, exact")


def test_where_another_exact_kernel_is_faster_it_stays() -> None:
    options = {"mode": "online", "kernels": "sdpa,strips", "measure": False}
    with torch.no_grad():
        found = adaattn_compiler.explain(stack(depth=1), inputs(), options=options)
    (site,) = found.sites
    assert (site.decision, site.kernel) == ("exact", "sdpa")
    assert "the faster exact kernel" in (site.refused or "")


def test_seed_decisions_are_held_to_the_budget() -> None:
    model = stack(depth=1)
    gathered(model, heuristic="seed", online_budget=0.02)
    found = online(model)
    assert found.proposed is not None
    assert found.decisions is not None
    for decision, proposed, reason in zip(
        found.decisions, found.proposed, found.reasons, strict=True
    ):
        assert decision in (proposed, EXACT)
        assert (decision == EXACT) == bool(reason)
    assert "proposed" in str(adaattn_compiler.stats(model))
    strict = stack(depth=1)
    gathered(strict, heuristic="seed", online_budget=1e-9)
    assert online(strict).decisions == (EXACT, EXACT)
    assert online(strict).proposed == found.proposed


def test_the_op_is_one_that_torch_knows() -> None:
    model, x = stack(depth=1), inputs()
    run(compiled(model), x)
    ((key, _),) = STATES.of_model(model.parameters())
    plan = OnlinePlan.deserialize(key.form.plan)
    assert OnlinePlan.deserialize(plan.serialize()) == plan
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    state = new_state(plan.heads, "cpu", key.form)
    operands = [torch.tensor([2.0, 0.0])[:, None, None]]
    given = (q, k, v, operands, [], state, key.form.plan)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.adaattn.attention_online.default, given, test_utils=tests)
    with pytest.raises(ValueError, match=r"state torch\.float64"):
        torch.ops.adaattn.attention_online(*given[:5], state[:3].clone(), key.form.plan)
    with pytest.raises(ValueError, match="not a plan of an online site"):
        torch.ops.adaattn.attention_online(*given[:6], "{}")


@pytest.mark.parametrize("calls", [1, 2, 8, 100])
def test_every_candidate_is_tried_often_enough(calls: int) -> None:
    for count in range(1, 12):
        plan = OnlinePlan("", 1, (EXACT,) * count, 0.1, calls, 2)
        turns = [plan.tried(turn) for turn in range(calls)]
        assert all(len(set(tried)) == len(tried) for tried in turns)
        times = [sum(i in tried for tried in turns) for i in range(count)]
        assert min(times) >= plan.tries
        assert max(times) <= plan.tries + -(-calls // count)


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "onlin"}, "option mode='onlin': it must be 'online', or None"),
        ({"mode": True}, "option mode=True: it must be 'online'"),
        ({"online_budget": 0}, "option online_budget=0: .*above 0, at most 1"),
        ({"online_budget": 5}, "option online_budget=5: .*at most 1 .write 5% as 0.05.*"),
        ({"online_budget": True}, "option online_budget=True"),
        ({"online_budget": float("nan")}, "option online_budget=nan"),
        ({"online_calls": 0}, "option online_calls=0: .*from 1 to 65536"),
        ({"online_calls": 2.5}, r"option online_calls=2\.5: .*a number of calls"),
        ({"mode": "online", "heuristic": "sead"}, "option heuristic='sead': it must be 'seed'"),
        ({"heuristic": "seed"}, "heuristic='seed': it does nothing without mode='online'"),
        ({"online_calls": 4}, "option online_calls=4: it does nothing without mode='online'"),
        ({"online_budget": 0.1}, r"online_budget=0\.1: it does nothing .*or leave this out"),
        ({"online_budget": 0.1, "policy": PROVIDED}, "without mode='online'"),
        ({"audit_rows": 0}, "audit_rows=0: it does nothing without a policy or mode='online'"),
        ({"mode": "online", "policy": PROVIDED}, "policy and mode='online': .*leave one out"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_options(options)


def test_options_that_have_an_effect_are_taken() -> None:
    assert parse_options({"mode": "online", "online_budget": 0.1})[0].online_budget == 0.1
    assert parse_options({"mode": "online", "online_budget": 1})[0].online_budget == 1.0
    assert parse_options({"policy": PROVIDED, "audit_rows": 4})[0].audit_rows == 4


def test_what_does_nothing_in_the_environment_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    monkeypatch.setenv("ADAATTN_ONLINE_BUDGET", "0.03")
    for _ in range(2):  # the variable may be for another compilation than this
        assert parse_options({"policy": PROVIDED})[0].mode is None
    (message,) = (record.getMessage() for record in caplog.records)
    assert "ADAATTN_ONLINE_BUDGET in the environment: it does nothing without mode=" in message
    assert parse_options({"mode": "online"})[0].online_budget == 0.03


def test_options_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_options({"mode": None, "heuristic": None})[0].mode is None
    for name, text in (("MODE", "online"), ("ONLINE_CALLS", "3"), ("ONLINE_BUDGET", "0.002")):
        monkeypatch.setenv(f"ADAATTN_{name}", text)
    found, _ = parse_options({"online_calls": 4})
    assert (found.mode, found.online_calls, found.online_budget) == ("online", 4, 0.002)
    with pytest.raises(ValueError, match="leave one out"):
        parse_options({"policy": PROVIDED})
    monkeypatch.setenv("ADAATTN_ONLINE_BUDGET", "little")
    with pytest.raises(ValueError, match="ADAATTN_ONLINE_BUDGET='little' in the environment"):
        parse_options(None)
