"""Singular values and vectors of matrices that are only applied, to a few columns at a time.

    Halko, Martinsson, Tropp: Finding structure with randomness, SIAM Review 53 (2011),
    algorithms 4.3 and 4.4 (range, power iterations, orthogonalized) and 5.1 (SVD of the small
    rest).

Of the order of (2 + 2 power) (rank + oversampling) applications to one column, and a QR each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# [..., columns, l] -> [..., rows, l], the same matrix or one for each of the leading axes.
Apply = Callable[[torch.Tensor], torch.Tensor]
# U [..., rows, k], S [..., k], V [..., columns, k]: the matrix is about U diag(S) V^T.
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def randomized_svd(
    apply: Apply,
    apply_transposed: Apply,
    rows: int,
    columns: int,
    rank: int,
    *,
    oversampling: int = 10,
    power: int = 1,
    seed: int = 0,
    like: torch.Tensor | None = None,
) -> Factors:
    """The `rank` largest singular values and vectors, of as many matrices as `apply` stands for.

    like: its dtype and device are those of the work (float32 without). The same seed gives the same
    result. ValueError for a rank that the matrix cannot have, and where an entry is not finite.
    """
    if not 1 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank} of a {rows} x {columns} matrix")
    if oversampling < 0 or power < 0:
        raise ValueError(f"oversampling {oversampling} and power {power} must be 0 or more")
    like = torch.empty(0) if like is None else like
    count = min(rank + oversampling, rows, columns)
    generator = torch.Generator().manual_seed(seed)  # of the CPU, so that devices agree
    test = torch.randn(columns, count, generator=generator, dtype=like.dtype).to(like.device)
    basis = _orthonormal(apply(test))
    for _ in range(power):
        basis = _orthonormal(apply_transposed(basis))
        basis = _orthonormal(apply(basis))
    small = finite(apply_transposed(basis))  # A^T Q = V S U'^T
    v, s, u = torch.linalg.svd(small, full_matrices=False)
    return basis @ u.mT[..., :rank], s[..., :rank], v[..., :rank]


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(finite(columns)).Q
    return q


def finite(found: torch.Tensor) -> torch.Tensor:
    """What is given; ValueError where an entry of it is not finite."""
    if not found.isfinite().all():
        raise ValueError("the matrix has entries that are not finite")
    return found
