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

# Blocks of a step of the CPU's softmax (kStepBlocks of forward.h): in the first nothing is skipped
# without its scores.
_FIRST_BLOCKS = 4


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


def nearest_first(rows: int, columns: int, tile: tuple[int, int] = (BLOCK, BLOCK)) -> torch.Tensor:
    """Blocks of keys by their distance from the rows' own position, int64 [row blocks, key blocks];
    the first keys, which many heads look at, among the nearest. tile: rows and keys of a block.

    Where a row has met its largest score early, more of the later blocks lie far below it.
    """
    key = torch.arange(-(-columns // tile[1]))
    own = ((torch.arange(0, rows, tile[0]) + columns - rows) // tile[1])[:, None]
    distance = 2 * (own - key).abs() + (key > own)
    # Of a causal row the last of the first step.
    distance[:, 0] = distance[:, 0].clamp(max=2 * (_FIRST_BLOCKS - 1) - 1)
    return distance.argsort(dim=-1, stable=True)


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
