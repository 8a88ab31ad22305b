"""Which blocks of keys a head's pattern keeps, for given lengths.

Patterns speak of blocks of BLOCK rows by BLOCK keys (adaattn_compiler/decision.py); what they keep
is met with what the spec's mask leaves, so that nothing masked is ever attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from adaattn_compiler.decision import BLOCK, HeadDecision, Pattern
from adaattn_compiler.kernels.evaluate import evaluate_dense
from adaattn_compiler.spec import Load, M, N, b, h, param
from adaattn_compiler.spec import k as key
from adaattn_compiler.spec import q as row


def pattern_blocks(
    pattern: Pattern, rows: int, columns: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """bool [row blocks, key blocks]: what a pattern keeps of M rows and N keys, the mask apart.

    Row q stands at position q + N - M. A block is kept where any of its keys is within the window
    of any of its rows, one of the first `sinks`, in a stripe or on the stride.
    """
    first_row = torch.arange(0, rows, BLOCK, device=device)[:, None] + (columns - rows)
    last_row = (first_row + BLOCK - 1).clamp(max=columns - 1)
    block = torch.arange(-(-columns // BLOCK), device=device)[None]
    first_key = block * BLOCK
    last_key = (first_key + BLOCK - 1).clamp(max=columns - 1)
    kept = (last_key >= first_row - pattern.window) & (first_key <= last_row + pattern.window)
    kept = kept | (first_key < pattern.sinks)
    if pattern.stride:
        kept = kept | (block % pattern.stride == 0)
    if pattern.stripes:
        kept = kept | torch.isin(block, torch.tensor(pattern.stripes, device=device))
    return kept


def kept_blocks(decision: HeadDecision, rows: int, columns: int) -> torch.Tensor:
    """bool [row blocks, key blocks] of the keys that a head meets one by one."""
    near = decision.pooling.near if decision.pooling is not None else decision.pattern
    if near is not None:
        return pattern_blocks(near, rows, columns)
    return torch.ones(-(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.bool)


def sees_itself(mask: Any, rows: int, columns: int, params: Sequence[int]) -> bool:
    """Whether every row surely attends to the key at its own position, which every pattern keeps:
    if not, a pattern might leave a row without a key."""
    if rows > columns:
        return False
    sizes = {M: rows, N: columns, **{param(i): n for i, n in enumerate(params)}}
    own = sympy.sympify(mask).subs(key, row + (columns - rows)).subs(sizes)
    if own.has(b, h, Load):
        return False
    seen = evaluate_dense(own, {row: torch.arange(rows)}, (), partial=True)
    return bool(torch.as_tensor(seen).all())
