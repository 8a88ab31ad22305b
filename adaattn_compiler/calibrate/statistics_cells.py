"""What the report shows of each head's statistics: cells of heat maps, and rows of a table."""

from __future__ import annotations

import math

from adaattn_compiler.calibrate.cells import DecidedSite, step_of
from adaattn_compiler.calibrate.gather import rank_name
from adaattn_compiler.calibrate.pictures import Cell
from adaattn_compiler.decision import describe_head
from adaattn_compiler.kernels.effective_rank import ENERGIES

# The classes of effective ranks: from where on, and in words.
RANK_STEPS = {"s0": 0, "s1": 2, "s2": 4, "s3": 8, "s4": 16, "s5": 32, "s6": 64}
RANK_WORDS = {
    "s0": "1",
    "s1": "2 or 3",
    "s2": "4 to 7",
    "s3": "8 to 15",
    "s4": "16 to 31",
    "s5": "32 to 63",
    "s6": "64 and more",
}
# Of the table: each column's title, the statistic in it, and how it is written.
_COLUMNS = (
    ("entropy", "entropy", ".3g"),
    ("of the most", "entropy_normalized", ".0%"),
    ("variance", "entropy_variance", ".2g"),
    ("local", "local_entropy", ".3g"),
    ("global", "global_entropy", ".3g"),
    ("saturation", "saturation", ".0%"),
    ("top blocks", "top_block_mass", ".0%"),
    *((f"rank {energy:g}", rank_name(energy), ".0f") for energy in ENERGIES),
    ("max |q|", "q_max", ".3g"),
    ("max |k|", "k_max", ".3g"),
    ("max |v|", "v_max", ".3g"),
    ("max |score|", "score_max", ".3g"),
    ("log2 |score| 1%", "score_0.01", ".1f"),
    ("50%", "score_0.5", ".1f"),
    ("99%", "score_0.99", ".1f"),
)
TITLES = ("site", "head", "decision", *(title for title, _, _ in _COLUMNS))


def has_statistics(site: DecidedSite) -> bool:
    """Whether any were gathered."""
    return bool(site.policy.statistics)


def entropy_cell(site: DecidedSite, head: int) -> Cell:
    """Nats, colored by the share of the most that the head could have."""
    entropy, share = _value(site, head, "entropy"), _value(site, head, "entropy_normalized")
    if entropy is None or share is None:
        return Cell("s0", "", _tooltip(site, head))
    return Cell(step_of(share), f"{entropy:.1f}", _tooltip(site, head))


def rank_cell(site: DecidedSite, head: int) -> Cell:
    """Of the first energy."""
    rank = _value(site, head, rank_name(ENERGIES[0]))
    if rank is None:
        return Cell("s0", "", _tooltip(site, head))
    style = [name for name, begin in RANK_STEPS.items() if rank >= begin][-1]
    return Cell(style, f"{rank:.0f}", _tooltip(site, head))


def row(site: DecidedSite, head: int) -> tuple[str, ...]:
    """Of the table, by `TITLES`."""
    decision = describe_head(site.policy.decision.heads[head])
    values = (_written(_value(site, head, name), form) for _, name, form in _COLUMNS)
    return site.policy.label, str(head), decision, *values


def _tooltip(site: DecidedSite, head: int) -> str:
    label, number, decision, *values = row(site, head)
    known = dict(zip(TITLES[3:], values, strict=True))
    ranks = " and ".join(f"{known[f'rank {e:g}']} (energy {e:g})" for e in ENERGIES)
    return (
        f"{label}, head {number}: entropy {known['entropy']} nats, {known['of the most']} of the "
        f"most; effective rank {ranks}; decided: {decision}"
    )


def _value(site: DecidedSite, head: int, name: str) -> float | None:
    values = (site.policy.statistics or {}).get(name)
    return None if values is None else values[head]


def _written(value: float | None, form: str) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:{form}}"
