"""Which blocks of keys a head's pattern keeps, for given lengths.

Patterns speak of blocks of BLOCK rows by BLOCK keys (adaattn_compiler/decision.py); what they keep
is met with what the spec's mask leaves, so that nothing masked is ever attended to.
"""

from __future__ import annotations

import torch

from adaattn_compiler.decision import BLOCK, HeadDecision, Pattern


def pattern_blocks(pattern: Pattern, rows: int, columns: int) -> torch.Tensor:
    """bool [row blocks, key blocks]: what a pattern keeps of M rows and N keys, the mask apart.

    Row q stands at position q + N - M. A block is kept where any of its keys is within the window
    of any of its rows, one of the first `sinks`, in a stripe or on the stride.
    """
    first_row = torch.arange(0, rows, BLOCK)[:, None] + (columns - rows)
    last_row = (first_row + BLOCK - 1).clamp(max=columns - 1)
    block = torch.arange(-(-columns // BLOCK))[None]
    first_key = block * BLOCK
    last_key = (first_key + BLOCK - 1).clamp(max=columns - 1)
    kept = (last_key >= first_row - pattern.window) & (first_key <= last_row + pattern.window)
    kept = kept | (first_key < pattern.sinks)
    if pattern.stride:
        kept = kept | (block % pattern.stride == 0)
    if pattern.stripes:
        kept = kept | torch.isin(block, torch.tensor(pattern.stripes))
    return kept


def kept_blocks(decision: HeadDecision, rows: int, columns: int) -> torch.Tensor:
    """bool [row blocks, key blocks] of the keys that a head meets one by one."""
    near = decision.pooling.near if decision.pooling is not None else decision.pattern
    if near is not None:
        return pattern_blocks(near, rows, columns)
    return torch.ones(-(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.bool)
