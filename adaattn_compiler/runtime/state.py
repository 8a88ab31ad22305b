"""What a site's heads have met since a model was compiled under a policy: one tensor for each site.

The tensor is an input of the compiled graph, beside the user's, so that it may change from call to
call and belongs to one model. float64 [H, len(Column)], with more rows below where the heads are
decided online.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch


class Column(enum.IntEnum):
    """calls: batch items seen. as_decided: of these, computed as decided. left_envelope and
    failed_audit: of the others, why exactly. audits: calls whose rows were compared. wrong, whole:
    moving averages of |given - exact|^2 and |exact|^2, summed over the compared rows. worst: the
    largest relative error of one call. demoted: 1 where the head is computed exactly from then on.
    square: the moving average of |given - exact|^4, from which the uncertainty of `wrong` follows.
    """

    CALLS = 0
    AS_DECIDED = 1
    LEFT_ENVELOPE = 2
    FAILED_AUDIT = 3
    AUDITS = 4
    WRONG = 5
    WHOLE = 6
    WORST = 7
    DEMOTED = 8
    SQUARE = 9


@dataclass(frozen=True)
class StateForm:
    """What a state has after the rows of its heads, nothing for a policy's. rows: how many more.
    plan: the text of the plan that they are of (kernels/online.py)."""

    rows: int = 0
    plan: str = ""


HEADS_ONLY = StateForm()


def new_state(
    heads: int, device: torch.device | str = "cpu", form: StateForm = HEADS_ONLY
) -> torch.Tensor:
    """The state of a site that nothing has run through."""
    return torch.zeros(heads + form.rows, len(Column), dtype=torch.float64, device=device)


@dataclass(frozen=True)
class HeadStats:
    """One head's state, to be read. error: the moving average of its relative error (L2) on audited
    rows; None before the first audit."""

    calls: int
    as_decided: int
    left_envelope: int
    failed_audit: int
    audits: int
    error: float | None
    worst: float | None
    demoted: bool

    @property
    def nothing_left_out(self) -> int:
        """Calls that were exact for no other reason than their lengths, at which its pattern is
        dropped; 0 where it was demoted, as calls since then are among the rest."""
        known = self.as_decided + self.left_envelope + self.failed_audit
        return 0 if self.demoted else self.calls - known


def head_stats(state: torch.Tensor) -> tuple[HeadStats, ...]:
    """The rows of a state."""
    return tuple(_head(row) for row in state.detach().cpu().tolist())


def _head(row: list[float]) -> HeadStats:
    audits = int(row[Column.AUDITS])
    error = (row[Column.WRONG] / max(row[Column.WHOLE], 1e-300)) ** 0.5
    return HeadStats(
        calls=int(row[Column.CALLS]),
        as_decided=int(row[Column.AS_DECIDED]),
        left_envelope=int(row[Column.LEFT_ENVELOPE]),
        failed_audit=int(row[Column.FAILED_AUDIT]),
        audits=audits,
        error=error if audits else None,
        worst=row[Column.WORST] if audits else None,
        demoted=bool(row[Column.DEMOTED]),
    )
