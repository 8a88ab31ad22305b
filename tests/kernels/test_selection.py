"""Blocks chosen in each call: by their estimates, and in the kernel."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from decided_plans import flags_of, plan_for
from specs import problem_of, random_inputs

from adaattn_compiler.decision import BLOCK, EXACT, HeadDecision, Pattern, Selection
from adaattn_compiler.kernels.blocks import block_structure
from adaattn_compiler.kernels.cpu.decided import DecidedRunner
from adaattn_compiler.kernels.cpu.runner import cpp_runner, plan_of
from adaattn_compiler.kernels.patterns import pattern_blocks
from adaattn_compiler.kernels.selection import estimated, selected_blocks
from adaattn_compiler.runtime.state import new_state

WAYS = ("pooled", "antidiagonal")
SCALE = 0.3


def blocky(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries that look at one block of keys each: its number is the row block's times 3."""
    generator = torch.Generator().manual_seed(seed)
    key_blocks = -(-columns // BLOCK)
    directions = torch.nn.functional.normalize(
        torch.randn(key_blocks, 32, generator=generator), dim=-1
    )
    wanted = (torch.arange(rows) // BLOCK * 3) % key_blocks
    q = 60 * directions[wanted]
    k = directions[torch.arange(columns) // BLOCK]
    noise = 0.01 * torch.randn(columns, 32, generator=generator)
    return q[None, None], (k + noise)[None, None], wanted


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize(("rows", "columns"), [(512, 512), (300, 500), (64, 130)])
def test_the_block_that_a_row_block_looks_at_is_chosen(by: str, rows: int, columns: int) -> None:
    q, k, wanted = blocky(rows, columns)
    allowed = torch.ones(-(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.bool)
    selection = Selection(0.9, by, window=0, sinks=0)
    found = selected_blocks(selection, q, k, SCALE, allowed)[0, 0]
    always = pattern_blocks(Pattern(0), rows, columns)
    for block in range(len(found)):
        chosen = set((found[block] & ~always[block]).nonzero().flatten().tolist())
        assert chosen <= {int(wanted[block * BLOCK])}
        assert found[block, wanted[block * BLOCK]]


@pytest.mark.parametrize("by", WAYS)
def test_of_equal_blocks_as_many_are_kept_as_the_mass_takes(by: str) -> None:
    q, k = torch.zeros(2, 4, 640, 16), torch.zeros(2, 2, 640, 16)
    allowed = torch.ones(10, 10, dtype=torch.bool)
    for mass, count in ((0.35, 4), (0.75, 8), (1.0, 10)):
        found = selected_blocks(Selection(mass, by, 0, 0), q, k, SCALE, allowed)
        assert found.shape == (2, 4, 10, 10)
        counts = found.sum(-1)
        assert int(counts.min()) >= count
        assert int(counts.max()) <= count + 1  # the window


@pytest.mark.parametrize("by", WAYS)
def test_nothing_masked_is_chosen_and_estimates_sum_to_one(by: str) -> None:
    problem = problem_of("causal", rows=300, columns=300)
    (q, k, _), _ = random_inputs(problem)
    structure = block_structure(problem.spec.mask, 300, 300, BLOCK, BLOCK)
    allowed = structure.partial | structure.full
    weights, own = estimated(by, q, k, SCALE, allowed, structure.full)
    assert bool((weights[..., ~structure.full] == 0).all())
    torch.testing.assert_close(weights.sum(-1) + own, torch.ones(2, 4, 5))
    found = selected_blocks(Selection(0.99, by), q, k, SCALE, allowed, structure.full)
    assert not bool((found & ~allowed).any())
    assert bool(found[..., structure.partial].all())
    assert not bool(
        selected_blocks(Selection(0.1, by, 0, 0), q, k, SCALE, allowed, structure.full)[
            ..., structure.full
        ].all()
    )
    assert bool((found.sum(-1) >= 1).all())


@pytest.mark.parametrize("by", WAYS)
def test_heads_choose_in_each_call(by: str) -> None:
    """Only the heads whose flag is set, each from its own queries; the others exactly."""
    problem = problem_of("gqa", rows=320, columns=320)
    tensors, operands = random_inputs(problem)
    chosen = HeadDecision(selection=Selection(0.3, by, window=0, sinks=0))
    runner = DecidedRunner(plan_for(problem, (EXACT, chosen, chosen, EXACT)))
    flags = flags_of(problem)
    flags[1, 2] = 0
    out = runner(*tensors, operands, (), flags, new_state(4))
    exact = cpp_runner(plan_of(problem))(*tensors, operands, ())
    same = (out == exact).all(-1).all(-1)
    assert same.tolist() == [[True, False, False, True], [True, False, True, True]]


@pytest.mark.parametrize("by", WAYS)
def test_the_whole_mass_is_exact(by: str) -> None:
    problem = problem_of("gqa", rows=320, columns=320)
    tensors, operands = random_inputs(problem)
    every = HeadDecision(selection=Selection(1.0, by, window=320))
    out = DecidedRunner(plan_for(problem, (every,) * 4))(
        *tensors, operands, (), flags_of(problem), new_state(4)
    )
    assert torch.equal(out, cpp_runner(plan_of(problem))(*tensors, operands, ()))


def test_patterns_and_choices_share_a_launch() -> None:
    problem = problem_of("gqa", rows=320, columns=320)
    tensors, operands = random_inputs(problem)
    window = HeadDecision(pattern=Pattern(0))
    chosen = HeadDecision(selection=Selection(0.3, window=0, sinks=0))
    both = DecidedRunner(plan_for(problem, (window, chosen, EXACT, window)))
    one = DecidedRunner(plan_for(problem, (window, EXACT, EXACT, window)))
    outs = [r(*tensors, operands, (), flags_of(problem), new_state(4)) for r in (both, one)]
    assert torch.equal(outs[0][:, [0, 2, 3]], outs[1][:, [0, 2, 3]])
    assert not torch.equal(outs[0][:, 1], outs[1][:, 1])


@pytest.mark.parametrize(
    ("name", "rows"), [("causal", 320), ("last rows", 320), ("last rows", 170)]
)
def test_a_choice_is_the_same_where_later_tokens_change(name: str, rows: int) -> None:
    """Blocks of a row block are chosen by rows up to its first: what follows changes nothing, of
    the same block neither."""
    problem = problem_of(name, rows=rows, columns=320)
    (q, k, v), _ = random_inputs(problem)
    for by in WAYS:
        decided = HeadDecision(selection=Selection(0.3, by, 0, 0))
        runner = DecidedRunner(plan_for(problem, (decided,) * 4, rows=0))
        before = runner(q, k, v, [], (), flags_of(problem), new_state(4))
        for place in (rows - 1, rows - 30, rows - 64, rows - 100):
            changed = [tensor.clone() for tensor in (q, k, v)]
            changed[0][:, :, place:] *= -9
            for tensor in changed[1:]:
                tensor[:, :, place + 320 - rows :] *= -9
            after = runner(*changed, [], (), flags_of(problem), new_state(4))
            assert torch.equal(before[:, :, :place], after[:, :, :place])
            assert not torch.equal(before[:, :, place:], after[:, :, place:])


@pytest.mark.parametrize("wrong", [{"mass": 0.0}, {"mass": 1.5}, {"mass": 0.5, "by": "luck"}])
def test_a_wrong_selection_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="it must be"):
        dataclasses.replace(Selection(0.5), **wrong)
