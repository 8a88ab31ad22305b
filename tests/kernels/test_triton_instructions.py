"""What the inner loops of generated kernels are made of, by their machine code."""

from __future__ import annotations

import pytest
import torch
from specs import SPECS

from adaattn_compiler.kernels.triton.compile import compiled_backward, compiled_forward
from adaattn_compiler.kernels.triton.disassembly import Loop, product_loops
from adaattn_compiler.kernels.triton.launch import Tiles
from adaattn_compiler.kernels.triton.launch_backward import GRAD_KV, backward_tiles
from adaattn_compiler.kernels.triton.source import Configuration

pytest.importorskip("triton")

TILES = {64: Tiles(128, 128, 8, 3), 128: Tiles(128, 128, 8, 2)}


def forward_loops(name: str, head_dim: int, *, ragged: bool = False) -> tuple[Loop, Loop]:
    """Of whole blocks and of those that the mask cuts, on sm_90."""
    made_for, dims = Configuration(SPECS[name][0], halves=True), (head_dim, head_dim)
    tiles = TILES[head_dim]
    switches = {"has_lse": False, "has_statistics": False, "ragged": ragged}
    built = compiled_forward(made_for, "bfloat16", dims, tiles, 90, **switches)
    whole, cut = product_loops(built.cubin)
    return whole, cut


def scores(tiles: Tiles) -> float:
    """That a thread computes in a block."""
    return tiles.rows * tiles.keys / (32 * tiles.warps)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_score_takes_the_instructions_that_it_must(head_dim: int) -> None:
    whole, cut = forward_loops("causal", head_dim)
    for_each = scores(TILES[head_dim])
    outputs = TILES[head_dim].rows * head_dim / (32 * TILES[head_dim].warps)
    rows = 8  # what is done once for the two rows of a thread
    must = {"MUFU": for_each, "FFMA": for_each, "FMNMX": for_each, "FADD": for_each}
    for name, count in {**must, "FMUL": outputs}.items():
        assert count <= whole.instructions[name] <= count + rows
    assert "FSEL" not in whole.instructions or whole.instructions["FSEL"] <= rows
    assert whole.count < 9 * for_each
    assert whole.count < cut.count < 15 * for_each
    assert (whole.spills, cut.spills) == (0, 0)


def test_the_end_of_keys_is_looked_for_only_where_it_cuts_a_block() -> None:
    whole, cut = forward_loops("causal", 128)
    whole_of_any, cut_of_any = forward_loops("causal", 128, ragged=True)
    for_each = scores(TILES[128])
    assert whole_of_any.count < 1.05 * whole.count
    assert cut_of_any.count > cut.count + for_each


def test_softcap_takes_one_reciprocal_and_no_exponential_of_its_own() -> None:
    whole, _ = forward_loops("softcap", 128)
    for_each = scores(TILES[128])
    assert whole.instructions["MUFU"] <= 2 * for_each + 8  # exp2 and the reciprocal
    assert whole.count < 28 * for_each
    assert "CALL" not in whole.instructions


def test_gradients_divide_by_no_sum() -> None:
    tiles = backward_tiles(64, 64, torch.bfloat16, 90)
    made_for = Configuration(SPECS["causal"][0])
    found = compiled_backward(made_for, "bfloat16", (64, 64), tiles, 90)[GRAD_KV]
    whole, _ = product_loops(found.cubin)
    for_each = scores(tiles.keys)
    assert whole.instructions["MUFU"] == for_each
    assert whole.count < 13 * for_each
