"""Decide: which sites a policy speaks of, whether it may, and the kernel that does as it says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from adaattn_compiler.decision import HeadDecision, describe_head
from adaattn_compiler.kernels.choose import Choice
from adaattn_compiler.kernels.decided_gpu import DecidedGpuKernel
from adaattn_compiler.kernels.decided_kernel import DecidedKernel
from adaattn_compiler.kernels.device import target_here
from adaattn_compiler.kernels.problem import Problem
from adaattn_compiler.options import Options
from adaattn_compiler.passes.choices import Chooser, Exact, SiteKey
from adaattn_compiler.passes.online import online_chooser
from adaattn_compiler.passes.site import Site
from adaattn_compiler.passes.symbols import settle_range
from adaattn_compiler.passes.weights import GraphWeights
from adaattn_compiler.policy import Policy, SitePolicy
from adaattn_compiler.spec_in_words import spec_in_words


def chooser_of(
    options: Options, graph_module: fx.GraphModule, inputs: Sequence[Any]
) -> Chooser | None:
    """Who is asked first for the sites of a graph: the policy, where there is one."""
    if options.policy is None and options.mode is None:
        return None
    if options.policy is None:
        return online_chooser(options)
    weights = GraphWeights(graph_module, inputs)
    return policy_chooser(options.policy, options.audit_rows, weights)


def policy_chooser(policy: Policy, rows: int, weights: GraphWeights) -> Chooser:
    """Answers as a policy says; rows: how many each call audits."""

    def chosen(key: SiteKey, site: Site, problem: Problem) -> Choice | Exact:
        decided = policy.site(key.name, key.ordinal)
        if decided is None:
            return Exact("the policy has no such site")
        reason = _refusal(decided, site, problem, weights.under(key.name))
        if reason is not None:
            return Exact(reason)
        if decided.decision.is_exact:
            return Exact("as the policy has it")
        kernel = _kernel(decided, rows, problem)
        reason = kernel.refusal(problem)
        if reason is not None:
            return Exact(reason)
        why = f"policy {policy.key()}"
        heads, dropped = decided.decision.heads, ""
        if isinstance(kernel, DecidedKernel):
            heads, dropped = kernel.applied(problem)
        return Choice(kernel, why, decision=in_words(heads), stateful=True, refused=dropped or None)

    return chosen


def _kernel(decided: SitePolicy, rows: int, problem: Problem) -> DecidedKernel | DecidedGpuKernel:
    if problem.device == "cuda":
        return DecidedGpuKernel(decided, rows, target_here())
    return DecidedKernel(decided, rows)


def in_words(heads: Sequence[HeadDecision]) -> str:
    """Decisions, and how many heads each is for: "4 x window 256 + 64 sinks bf16, 2 x exact"."""
    counts = Counter(describe_head(head) for head in heads)
    return ", ".join(f"{count} x {words}" for words, count in counts.most_common())


def _refusal(decided: SitePolicy, site: Site, problem: Problem, weights: str | None) -> str | None:
    shape = problem.shape
    reason = decided.mismatch(
        spec=problem.spec.key(),
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        value_dim=shape.value_dim,
        dtype=str(problem.dtype).removeprefix("torch."),
        training=problem.requires_grad,
        weights=weights,
        computes=spec_in_words(problem.spec),
        lengths=shape.hints[1:],
    )
    if reason is not None:
        return reason
    for what, name, lengths in (
        ("query", "M", decided.envelope.rows),
        ("key", "N", decided.envelope.columns),
    ):
        low, high = int(lengths.low), int(lengths.high)
        if not settle_range(site.sizes[name], low, high, site.fake):
            return f"the policy was calibrated for {what} lengths from {low} to {high}"
    return None
