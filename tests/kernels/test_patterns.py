"""Which blocks patterns keep, against the definition key by key."""

from __future__ import annotations

import pytest
import torch

from adaattn_compiler.decision import BLOCK, HeadDecision, Pattern, Pooling
from adaattn_compiler.kernels.patterns import kept_blocks, pattern_blocks

PATTERNS = [
    Pattern(0),
    Pattern(64),
    Pattern(100, sinks=1),
    Pattern(63, sinks=65, stripes=(2, 5)),
    Pattern(10, stride=3),
    Pattern(5000),
]
LENGTHS = [(256, 256), (200, 200), (64, 300), (1, 130), (130, 130), (100, 400)]


def by_definition(pattern: Pattern, rows: int, columns: int) -> torch.Tensor:
    row = torch.arange(rows)[:, None]
    key = torch.arange(columns)[None]
    block = key // BLOCK
    kept = (key - (row + columns - rows)).abs() <= pattern.window
    kept |= block * BLOCK < pattern.sinks
    kept |= torch.isin(block, torch.tensor(pattern.stripes, dtype=torch.int64))
    if pattern.stride:
        kept |= block % pattern.stride == 0
    row_blocks, key_blocks = -(-rows // BLOCK), -(-columns // BLOCK)
    out = torch.zeros(row_blocks, key_blocks, dtype=torch.bool)
    for i in range(row_blocks):
        for j in range(key_blocks):
            out[i, j] = kept[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK].any()
    return out


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("rows", "columns"), LENGTHS)
def test_blocks_are_those_that_hold_a_kept_key(pattern: Pattern, rows: int, columns: int) -> None:
    found = pattern_blocks(pattern, rows, columns)
    assert torch.equal(found, by_definition(pattern, rows, columns))


def test_every_row_keeps_the_key_at_its_own_position() -> None:
    for rows, columns in LENGTHS:
        found = pattern_blocks(Pattern(0), rows, columns)
        at = torch.arange(rows)
        assert bool(found[at // BLOCK, (at + columns - rows) // BLOCK].all())


def test_a_dense_head_keeps_all_and_a_pooled_one_what_is_near() -> None:
    near = Pattern(64, 64)
    assert bool(kept_blocks(HeadDecision(), 200, 200).all())
    pooled = kept_blocks(HeadDecision(pooling=Pooling(near, 16)), 500, 500)
    assert torch.equal(pooled, pattern_blocks(near, 500, 500))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": -1}, "window is -1; it must be 0 or more keys"),
        ({"window": 1, "sinks": -2}, "sinks is -2"),
        ({"window": 1, "stripes": (-1,)}, "stripes is"),
        ({"window": 1, "stride": -3}, "stride is -3"),
    ],
)
def test_a_wrong_pattern_is_refused_by_name(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Pattern(**wrong)


def test_one_head_has_one_representation() -> None:
    with pytest.raises(ValueError, match="at most one"):
        HeadDecision(pattern=Pattern(1), pooling=Pooling(Pattern(1), 8))
