"""What a call adds to the state of its heads (runtime/state.py), by tensors alone."""

from __future__ import annotations

import torch

from adaattn_compiler.runtime.state import Column

# Flags and constants are those of kernels/cpu/decided.py.
AS_DECIDED, LEFT_ENVELOPE, FAILED_AUDIT, DEMOTED = 1, 0, -1, -2
_KEEP, _LEAST_AUDITS, _SURE = 0.98, 16, 2.0
_MOST_COUNTED = (1 + _KEEP) / (1 - _KEEP)
_LEAST_SUM = 1e-200


def noted(
    state: torch.Tensor,
    flags: torch.Tensor,
    counted: torch.Tensor,
    sums: torch.Tensor,
    budgets: torch.Tensor,
) -> torch.Tensor:
    """The columns of a state after a call, up to SQUARE; as `DecidedRunner._note` has them.

    flags: int32 [B,H], what the heads did. counted: bool [B,H], whose errors count; sums [B,H,2]:
    of |given - exact|^2 and |exact|^2. budgets: [H].
    """
    found = torch.where(counted[..., None], sums, 0.0).sum(0)
    audited = counted.any(0)
    before = state[:, Column.AUDITS]
    # The plain mean until that would change less than the moving average does.
    keep = torch.where(audited, (before / (before + 1)).clamp(max=_KEEP), 1.0)
    wrong = keep * state[:, Column.WRONG] + (1 - keep) * found[:, 0]
    whole = keep * state[:, Column.WHOLE] + (1 - keep) * found[:, 1]
    square = keep * state[:, Column.SQUARE] + (1 - keep) * found[:, 0].square()
    audits = before + audited
    # What `wrong` is at least, as far as so few rows can tell.
    deviation = (square - wrong.square()).clamp(min=0) / audits.clamp(1, _MOST_COUNTED)
    surely = (wrong - _SURE * deviation.sqrt()).clamp(min=0)
    over = audited & ~(_error(surely, whole) <= budgets) & (audits >= _LEAST_AUDITS)
    worst = torch.where(audited, _error(found[:, 0], found[:, 1]), 0.0)
    columns = {
        Column.CALLS: state[:, Column.CALLS] + flags.shape[0],
        Column.AS_DECIDED: _counted(state, Column.AS_DECIDED, flags == AS_DECIDED),
        Column.LEFT_ENVELOPE: _counted(state, Column.LEFT_ENVELOPE, flags == LEFT_ENVELOPE),
        Column.FAILED_AUDIT: _counted(state, Column.FAILED_AUDIT, flags == FAILED_AUDIT),
        Column.AUDITS: audits,
        Column.WRONG: wrong,
        Column.WHOLE: whole,
        Column.WORST: torch.maximum(state[:, Column.WORST], worst),
        Column.DEMOTED: torch.where(over, 1.0, state[:, Column.DEMOTED]),
        Column.SQUARE: square,
    }
    return torch.stack([columns[Column(place)] for place in range(len(columns))], -1)


def _counted(state: torch.Tensor, column: Column, which: torch.Tensor) -> torch.Tensor:
    return state[:, column] + which.sum(0)


def _error(wrong: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    return (wrong / whole.clamp(min=_LEAST_SUM)).sqrt()
