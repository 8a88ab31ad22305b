"""`stats`: what the heads of a model have met that runs under a policy, or decides online."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaattn_compiler.kernels.online_stats import OnlineStats, online_stats
from adaattn_compiler.runtime.state import HeadStats, head_stats
from adaattn_compiler.runtime.states import ONLINE, STATES, StateKey

_HEADER = (
    *("site", "head", "calls", "as decided", "out of range", "failed audit"),
    *("audits", "error", "worst", ""),
)


@dataclass(frozen=True)
class SiteStats:
    """One site. policy: the key of the policy that it runs under, "online" where it decides for
    itself; heads: in order. online: what it has gathered and decided in that mode."""

    name: str
    ordinal: int
    policy: str
    heads: tuple[HeadStats, ...]
    online: OnlineStats | None = None

    @property
    def label(self) -> str:
        """Its name as tables show it."""
        name = self.name or "(root)"
        return f"{name}#{self.ordinal}" if self.ordinal else name

    @property
    def origin(self) -> str:
        """Where its decisions are from, which tells it apart under another policy."""
        return self.policy if self.policy == ONLINE else f"policy {self.policy}"


@dataclass(frozen=True)
class Stats:
    """Of a model: its sites in the order of their names. `print` it for a table, which names the
    policies where the model ran under several."""

    sites: tuple[SiteStats, ...]

    def __str__(self) -> str:
        several = len({site.policy for site in self.sites}) > 1
        labels = [f"{s.label} ({s.origin})" if several else s.label for s in self.sites]
        rows: list[tuple[str, ...]] = [_HEADER]
        for label, site in zip(labels, self.sites, strict=True):
            gathers = site.online is not None
            rows += [_row(label, i, head, gathers) for i, head in enumerate(site.heads)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = (
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )
        online = (
            f"{label}: {site.online}"
            for label, site in zip(labels, self.sites, strict=True)
            if site.online is not None
        )
        return "\n".join([*lines, *online])


def stats(model: torch.nn.Module) -> Stats:
    """What the heads of a model have met since it was compiled with a policy, or mode="online".

    model: the module, or what torch.compile made of it. Of each head: calls (batch items), how many
    were computed as decided, how many exactly and why, the moving average of the error on audited
    rows, whether it was demoted. Raises ValueError where the model does not run under a policy, or
    has not run yet.
    """
    inner = getattr(model, "_orig_mod", model)
    found = STATES.of_model(inner.parameters())
    if not found:
        raise ValueError(
            f"{type(inner).__name__} has run no site under a policy; compile it with "
            'options={"policy": ...} or {"mode": "online"}, run it in inference, and see `explain` '
            "for what became of its sites (calls at other lengths than the policy's are exact, and "
            "not counted)"
        )
    sites = (_site(key, state) for key, state in found)
    return Stats(
        tuple(sorted(sites, key=lambda site: (_natural(site.name), site.ordinal, site.policy)))
    )


def _site(key: StateKey, state: torch.Tensor) -> SiteStats:
    heads = head_stats(state[: len(state) - key.form.rows])
    online = online_stats(key.form.plan, state) if key.form.plan else None
    return SiteStats(key.name, key.ordinal, key.policy, heads, online)


def _natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Orders layers.2 before layers.10."""
    steps = name.split(".")
    return tuple((0, int(s), "") if s.isdecimal() else (1, 0, s) for s in steps)


def _row(label: str, head: int, found: HeadStats, gathers: bool) -> tuple[str, ...]:
    """gathers: whether calls may have been exact to learn from them."""
    errors = ("" if e is None else f"{e:.2e}" for e in (found.error, found.worst))
    counts = (found.calls, found.as_decided, found.left_envelope, found.failed_audit, found.audits)
    said = "demoted" if found.demoted else ""
    if found.nothing_left_out and not gathers:
        said = f"exact in {found.nothing_left_out}: no pattern at their lengths"
    return label, str(head), *map(str, counts), *errors, said
