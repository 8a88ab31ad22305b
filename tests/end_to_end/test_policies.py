"""Models compiled with a policy: as decided inside the envelope, exactly outside of it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from decided import BF16, WINDOW, Seen, inputs, policy_for, stack
from torch.testing import FileCheck

import adaattn_compiler
from adaattn_compiler import Explanation
from adaattn_compiler.decision import EXACT, HeadDecision, Pattern
from adaattn_compiler.policy import Policy

WINDOWS = (WINDOW, HeadDecision(pattern=Pattern(64)))


def compiled(model: torch.nn.Module, policy: Policy | None, **options: object) -> torch.nn.Module:
    # cpp: what is exact is computed by the kernel that policies use, so that it is the same bits.
    given = {"measure": False, "kernels": "cpp", **options}
    if policy is not None:
        given["policy"] = policy
    return torch.compile(model, backend="adaattn", options=given)


def explained(model: torch.nn.Module, x: torch.Tensor, policy: Policy) -> Explanation:
    with torch.no_grad():
        return adaattn_compiler.explain(model, x, options={"measure": False, "policy": policy})


def run(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def exact(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.compiler.reset()
    out = run(compiled(model, None), x)
    torch.compiler.reset()
    return out


def relative(given: torch.Tensor, true: torch.Tensor) -> float:
    return float((given.double() - true.double()).norm() / true.double().norm())


def test_inside_its_envelope_a_model_runs_as_decided() -> None:
    model, x = stack(), inputs()
    policy = policy_for(Seen(model, x))
    fast = compiled(model, policy)
    out = run(fast, x)
    for _ in range(7):  # heads that do not share keys are audited in turns
        run(fast, x)
    true = run(copy.deepcopy(model).double(), x.double())
    assert 1e-6 < relative(out, true) < 0.01
    found = adaattn_compiler.stats(model).sites
    assert [site.name for site in found] == ["layers.0", "layers.1"]
    for head in (head for site in found for head in site.heads):
        assert (head.calls, head.as_decided, head.audits, head.demoted) == (8, 8, 1, False)
        assert head.error is not None
        assert head.error < 0.1
    assert "layers.1" in str(adaattn_compiler.stats(model))


def test_explain_says_what_the_heads_do() -> None:
    model, x = stack(), inputs()
    found = explained(model, x, policy_for(Seen(model, x)))
    assert [site.decision for site in found.sites] == ["1 x window 64, 1 x dense bf16"] * 2


def test_the_guard_stands_in_the_graph(tmp_path) -> None:
    model, x = stack(depth=1), inputs()
    policy = policy_for(Seen(model, x))
    run(compiled(model, policy, dump_dir=tmp_path), x)
    (after,) = tmp_path.rglob("*after*")
    check = FileCheck().check("adaattn_state").check_count("adaattn.guarded_attention(", 1, True)
    check.check_not("adaattn.attention(").run(after.read_text())


class Decoding(torch.nn.Module):
    """The last rows of causal attention."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, columns = q.shape[2], k.shape[2]
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_a_step_of_generation_is_refused_in_words() -> None:
    q, k, v = (torch.randn(1, 2, 256, 16) for _ in range(3))
    policy, options = policy_for(Seen(Decoding(), q, k, v)), {"measure": False}
    with torch.no_grad():
        found = adaattn_compiler.explain(
            Decoding(), q[:, :, -1:], k, v, options={**options, "policy": policy}
        )
    says = found.sites[0].refused or ""
    assert ": here mask is none, was causal; query length is 1, was from 128 to 256; " in says
    assert says in str(found)


@pytest.mark.parametrize("shift", ["larger", "one-hot", "all alike"])
def test_inputs_of_another_kind_are_computed_exactly(shift: str) -> None:
    model, x = stack(depth=1), inputs()
    policy = policy_for(Seen(model, x))
    other = {
        "larger": 30 * x,
        "one-hot": torch.nn.functional.one_hot(torch.arange(256) % 32, 32).float()[None],
        "all alike": x[:, :1].expand(-1, 256, -1).contiguous(),
    }[shift]
    out = run(compiled(model, policy), other)
    assert all(head.left_envelope == 1 for head in adaattn_compiler.stats(model).sites[0].heads)
    assert torch.equal(out, exact(model, other))


def test_lengths_at_which_nothing_is_left_out_are_said() -> None:
    model, x = stack(depth=1), inputs(rows=8)
    policy = policy_for(Seen(model, x))
    (site,) = explained(model, x, policy).sites
    assert site.decision == "2 x exact"
    assert site.refused == "8 query rows or fewer are computed exactly"
    assert torch.equal(run(compiled(model, policy), x), exact(model, x))
    found = adaattn_compiler.stats(model)
    assert [(head.calls, head.as_decided) for head in found.sites[0].heads] == [(1, 0)] * 2
    assert "exact in 1: no pattern at their lengths" in str(found)


def test_sites_of_two_policies_are_told_apart() -> None:
    model, x = stack(depth=1), inputs()
    seen = Seen(model, x)
    first, second = policy_for(seen), policy_for(seen, (BF16, BF16))
    run(compiled(model, first), x)
    assert first.key() not in str(adaattn_compiler.stats(model))
    torch.compiler.reset()
    run(compiled(model, second), x)
    found = adaattn_compiler.stats(model)
    assert {site.policy for site in found.sites} == {first.key(), second.key()}
    for policy in (first, second):
        assert f"layers.0 (policy {policy.key()})" in str(found)


def test_a_batch_item_of_another_kind_does_not_change_the_others() -> None:
    model, x = stack(depth=1), inputs(batch=2)
    policy = policy_for(Seen(model, x))
    mixed = torch.stack([x[0], 30 * x[1]])
    out = run(compiled(model, policy), mixed)
    heads = adaattn_compiler.stats(model).sites[0].heads
    assert [(head.as_decided, head.left_envelope) for head in heads] == [(1, 1)] * 2
    true = exact(model, mixed)
    assert torch.equal(out[1], true[1])
    assert not torch.equal(out[0], true[0])


def test_a_pattern_that_does_not_do_is_found_before_the_call() -> None:
    """The second head looks everywhere: a window is far off, on any rows that are probed."""
    model, x = stack(depth=1), inputs()
    policy = policy_for(Seen(model, x), WINDOWS, limit=0.05)
    fast = compiled(model, policy)
    for _ in range(7):  # the first head's turn, and nobody's
        run(fast, x)
    out = run(fast, x)
    first, second = adaattn_compiler.stats(model).sites[0].heads
    assert (first.as_decided, second.failed_audit) == (8, 1)
    torch.testing.assert_close(out[..., 16:], exact(model, x)[..., 16:], rtol=0, atol=1e-6)


def test_a_head_over_its_budget_is_demoted() -> None:
    model, x = stack(depth=1), inputs()
    seen = Seen(model, x)
    fast = compiled(model, policy_for(seen, (EXACT, BF16), budget=1e-5))
    for _ in range(130):
        out = run(fast, x)
    first, second = adaattn_compiler.stats(model).sites[0].heads
    assert not first.demoted
    assert second.demoted
    assert (second.audits, second.as_decided) == (16, 128)  # in every eighth call
    assert torch.equal(out, exact(model, x))


def test_without_audited_rows_nothing_is_probed() -> None:
    model, x = stack(depth=1), inputs()
    fast = compiled(model, policy_for(Seen(model, x), (EXACT, BF16), budget=1e-5), audit_rows=0)
    for _ in range(6):
        run(fast, x)
    second = adaattn_compiler.stats(model).sites[0].heads[1]
    assert (second.as_decided, second.audits, second.error) == (6, 0, None)


@pytest.mark.parametrize("dynamic", [None, True])
def test_lengths_outside_the_envelope_are_another_graph(dynamic: bool | None) -> None:
    model = stack(depth=1)
    policy = policy_for(Seen(model, inputs()))
    options = {"policy": policy, "measure": False, "kernels": "cpp"}
    fast = torch.compile(model, backend="adaattn", options=options, dynamic=dynamic)
    outs = {rows: run(fast, inputs(rows=rows)) for rows in (256, 192, 320)}
    (site,) = adaattn_compiler.stats(model).sites
    assert [head.as_decided for head in site.heads] == [2, 2]
    assert torch.equal(outs[320], exact(model, inputs(rows=320)))
    assert not torch.equal(outs[192], exact(model, inputs(rows=192)))


def test_another_models_policy_is_refused_site_by_site() -> None:
    model, x = stack(), inputs()
    policy = policy_for(Seen(model, x))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[1].qkv.weight += 0.01
    first, second = explained(other, x, policy).sites
    assert first.decision != "exact"
    assert second.decision == "exact"
    assert "other weights" in (second.why or "")


def test_two_models_and_two_policies_do_not_mix() -> None:
    one, two, x = stack(0, depth=1), stack(1, depth=1), inputs()
    first = policy_for(Seen(one, x), (EXACT, BF16))
    second = policy_for(Seen(two, x), (WINDOW, EXACT))
    alone = [run(compiled(one, first), x), run(compiled(two, second), x)]
    torch.compiler.reset()
    fast = compiled(one, first), compiled(two, second)
    for _ in range(2):
        assert torch.equal(run(fast[0], x), alone[0])
        assert torch.equal(run(fast[1], x), alone[1])
    assert {site.policy for site in adaattn_compiler.stats(one).sites} == {first.key()}
    assert {site.policy for site in adaattn_compiler.stats(two).sites} == {second.key()}


def test_the_same_model_under_another_policy_is_compiled_anew() -> None:
    model, x = stack(depth=1), inputs()
    seen = Seen(model, x)
    coarse, fine = policy_for(seen, (WINDOW, BF16)), policy_for(seen, (EXACT, EXACT))
    assert not torch.equal(run(compiled(model, coarse), x), exact(model, x))
    torch.compiler.reset()
    assert torch.equal(run(compiled(model, fine), x), exact(model, x))


def test_what_comes_later_does_not_change_what_was_before() -> None:
    model, x = stack(), inputs()
    fast = compiled(model, policy_for(Seen(model, x)))
    before = run(fast, x)
    changed = x.clone()
    changed[:, 130:] += 0.1
    after = run(fast, changed)
    torch.testing.assert_close(after[:, :130], before[:, :130], rtol=0, atol=0)


def test_training_is_exact() -> None:
    model, x = stack(depth=1).train(), inputs()
    policy = policy_for(Seen(model, x))
    fast = compiled(model, policy)
    fast(x).sum().backward()
    grad = model.layers[0].qkv.weight.grad.clone()
    model.zero_grad()
    torch.compiler.reset()
    compiled(model, None)(x).sum().backward()
    assert torch.equal(grad, model.layers[0].qkv.weight.grad)
    with pytest.raises(ValueError, match="has run no site under a policy"):
        adaattn_compiler.stats(model)


def test_threads_share_a_state() -> None:
    model, x = stack(depth=1), inputs()
    fast = compiled(model, policy_for(Seen(model, x)))
    run(fast, x)
    threads = [threading.Thread(target=lambda: [run(fast, x) for _ in range(8)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(head.calls == 33 for head in adaattn_compiler.stats(model).sites[0].heads)


def test_an_input_that_is_not_finite_is_computed_exactly() -> None:
    model, x = stack(depth=1), inputs()
    fast = compiled(model, policy_for(Seen(model, x)))
    x[0, 200, 3] = float("nan")
    torch.testing.assert_close(run(fast, x), exact(model, x), rtol=0, atol=0, equal_nan=True)
    assert all(head.left_envelope == 1 for head in adaattn_compiler.stats(model).sites[0].heads)
