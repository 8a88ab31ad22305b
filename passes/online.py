"""Decide online: which sites decide for themselves from their first calls (kernels/online.py)."""

from __future__ import annotations

from dataclasses import replace

from adaattn_compiler.kernels.choose import Choice, choose
from adaattn_compiler.kernels.online_kernel import OnlineKernel
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.options import Options
from adaattn_compiler.passes.choices import Chooser, Exact, SiteKey
from adaattn_compiler.passes.site import Site
from adaattn_compiler.runtime.state import StateForm


def online_chooser(options: Options) -> Chooser:
    """Answers that a site decides for itself, where there is something to decide."""
    kernel = OnlineKernel(
        options.online_budget, options.online_calls, options.audit_rows, options.heuristic
    )
    known: dict[Problem, Choice] = {}

    def chosen(key: SiteKey, site: Site, problem: Problem) -> Choice | Exact:
        reason = kernel.refusal(problem)
        if reason is not None:
            return Exact(reason)
        if problem not in known:
            known[problem] = choose(problem, options)
        exact = known[problem]
        if exact.kernel.name != kernel.name:
            # Heads that stay exact would be slower than they are now.
            why = f"{exact.kernel.label} is the faster exact kernel here, decisions are for cpp"
            return replace(exact, why=f"exact: {why}; {exact.why}", refused=why)
        plan = kernel.plan(problem)
        return Choice(
            kernel,
            f"online, within {options.online_budget:g}; exactly: {exact.why}",
            exact.times,
            decision=f"online: gathers for {options.online_calls} calls",
            stateful=True,
            form=StateForm(plan.further_rows, plan.serialize()),
        )

    return chosen
