"""Bases of keys: what calibration makes of them."""

from __future__ import annotations

import torch

from adaattn_compiler.calibrate.basis import bases_of_keys


def keys(rank: int, heads: int = 2, length: int = 300, dim: int = 32) -> torch.Tensor:
    """Keys that lie in `rank` directions beside one point, other ones for each head."""
    generator = torch.Generator().manual_seed(rank)
    spread = torch.randn(2, heads, length, rank, generator=generator)
    directions = torch.randn(heads, rank, dim, generator=generator)
    return spread @ directions + 7 * torch.randn(heads, 1, dim, generator=generator)


def test_keys_of_few_directions_lie_in_their_basis() -> None:
    k = keys(8)
    centered = k - k.mean((0, 2), keepdim=True)
    for head, basis in enumerate(bases_of_keys(k, 8)):
        turn = basis.tensor()
        assert torch.allclose(turn.T @ turn, torch.eye(8), atol=1e-5)
        lost = centered[:, head] - centered[:, head] @ turn @ turn.T
        assert float(lost.norm()) < 1e-4 * float(centered[:, head].norm())


def test_of_more_directions_the_largest_are_taken() -> None:
    k = keys(32)
    centered = (k - k.mean((0, 2), keepdim=True)).transpose(0, 1).flatten(1, 2)
    for head, basis in zip(centered, bases_of_keys(k, 16), strict=True):
        kept = (head @ basis.tensor()).square().sum()
        best = torch.linalg.svdvals(head.double())[:16].square().sum()
        assert 0.98 * best <= kept <= 1.0001 * best


def test_what_is_not_finite_has_a_basis_all_the_same() -> None:
    k = keys(8)
    k[0, 1, 3, 4] = float("nan")
    assert all(torch.isfinite(basis.tensor()).all() for basis in bases_of_keys(k, 8))


def test_the_same_keys_have_the_same_bases() -> None:
    assert bases_of_keys(keys(32), 16) == bases_of_keys(keys(32), 16)
