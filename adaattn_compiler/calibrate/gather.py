"""Statistics of heads in calibration: what each call's attention is like, as plain numbers.

They decide nothing: errors are measured. They say, beside the decisions, what the heads do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from adaattn_compiler.calibrate.board import Tensors
from adaattn_compiler.kernels.effective_rank import ENERGIES, sampled_spectrum
from adaattn_compiler.kernels.statistics import head_statistics
from adaattn_compiler.spec import AttentionSpec

# Of each head, by name.
Numbers = Mapping[str, tuple[float, ...]]

# Rows of a call that statistics are of; others in each sample.
ROWS = 16
# Rows by which ranks are estimated, of any length: a head of full rank comes near to so many.
RANK_ROWS = 128


def gathered(tensors: Tensors, spec: AttentionSpec, turn: int, ranks: bool) -> Numbers:
    """Of one call: turn chooses the rows that are looked at; ranks: effective ranks as well, which
    take several times as long. What is not finite for each head is left out."""
    q, k, v, operands, params = tensors
    found = head_statistics(q, k, v, operands, params, spec, rows=ROWS, turn=turn).by_head()
    if ranks:
        found |= _ranks(tensors, spec)
    return {
        name: tuple(values)
        for name, values in found.items()
        if all(math.isfinite(value) for value in values)
    }


def rank_name(energy: float) -> str:
    """That of an effective rank among the statistics."""
    return f"effective_rank_{energy}"


def _ranks(tensors: Tensors, spec: AttentionSpec) -> dict[str, list[float]]:
    """Of the first batch item: the least that they may be, where they are near RANK_ROWS."""
    q, k, _, operands, params = tensors
    try:
        found = sampled_spectrum(q[:1], k[:1], spec, operands, params, rows=RANK_ROWS)
    except ValueError:  # an entry that is not finite has no singular values
        return {}
    return {
        rank_name(energy): found.effective_rank(energy)[0].double().tolist() for energy in ENERGIES
    }
