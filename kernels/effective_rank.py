"""How many ranks the attention matrix of a head has, without forming it.

P = softmax(score(Q K^T)) is applied to a few columns at a time (randomized_svd.py): P X is
attention with V = X, P^T Y is summed over tiles of rows. With singular values s_1 >= s_2 >= ...,
the effective rank is the least k with

    s_1^2 + ... + s_k^2 >= energy (sum of all s^2),

the rank of the best approximation whose squared relative error (Frobenius) is at most 1 - energy.
It is that of P, not of the scores: the rank of Q K^T is at most D whatever the attention does.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adaattn_compiler.decision import Representation
from adaattn_compiler.kernels.randomized_svd import Factors, finite, randomized_svd
from adaattn_compiler.kernels.reference import attention_by_rows
from adaattn_compiler.kernels.scored_rows import sampled_places, scored_rows
from adaattn_compiler.kernels.statistics import compensated_sum, head_statistics
from adaattn_compiler.kernels.triton.launch_rowproducts import row_products_by_tiles
from adaattn_compiler.kernels.triton.launch_statistics import statistics_refusal
from adaattn_compiler.spec import AttentionSpec, EmptyRow

log = logging.getLogger("adaattn_compiler")

# What computes attention exactly: (q, k, v, operands, params) -> [B,H,M,E], with a spec of group 1.
Exact = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Sequence[int]], torch.Tensor
]

ENERGIES = (0.95, 0.99)
# Low rank pays below this share of the keys.
LOW_RANK_BELOW = 0.5
PROXIES = ("entropy", "norm", "spectral")
_FIRST_RANK = 32
# The widest values that the kernels take.
_COLUMNS_AT_ONCE = 256


# -- rules ----------------------------------------------------------------------------------------


def effective_ranks(
    singular_values: torch.Tensor, energy: float, total: torch.Tensor | None = None, beyond: int = 0
) -> torch.Tensor:
    """int64 [...] of [..., n], descending: the least k whose squares sum to `energy` of the total.

    total: [...], the sum of all squares, where some are not among the n; if the n fall short, the
    answer is `beyond`. A matrix of zeros has rank 0.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy!r}; it must be above 0, at most 1")
    if not singular_values.isfinite().all():
        raise ValueError("singular values that are not finite")
    sums = singular_values.double().square().cumsum(-1)
    whole = sums[..., -1] if total is None else torch.maximum(total.double(), sums[..., -1])
    # Rounding of the values themselves must not make energy 1 unreachable.
    slack = 4 * torch.finfo(singular_values.dtype).eps if total is not None else 0.0
    short = sums < ((energy - slack) * whole)[..., None]
    ranks = torch.where(whole > 0, short.sum(-1) + 1, 0)
    return torch.where(short.all(-1), beyond, ranks)


def effective_rank(singular_values: torch.Tensor | Sequence[float], energy: float) -> int:
    """That of one whole spectrum."""
    return int(effective_ranks(torch.as_tensor(singular_values), energy))


def literal_rank(singular_values: torch.Tensor | Sequence[float], threshold: float = 0.95) -> int:
    """The rule as first described: squares of S / sum(S), added up to the threshold; 0 if never.

    Flawed, and here for comparison only: sum (s / sum s)^2 is 1 where there is one singular value
    and less with each more (1/n for n alike): 0.95 is reached by nearly rank one alone, with k = 1.
    Divided by its own sum it is `effective_rank`.
    """
    values = torch.as_tensor(singular_values).double()
    reached = (values / values.sum()).square().cumsum(-1) >= threshold
    return int(reached.double().argmax()) + 1 if bool(reached.any()) else 0


def chosen_representation(rank: int, columns: int) -> Representation:
    """Low rank where the effective rank is below half the keys, else dense."""
    return Representation.LOW_RANK if rank < LOW_RANK_BELOW * columns else Representation.DENSE


# -- attention -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spectrum:
    """Largest singular values [B,H,n], descending, and the sum of all squares, [B,H].

    size: min(M, N), the rank of a head whose values here hold too little of the energy.
    """

    values: torch.Tensor
    total: torch.Tensor
    size: int

    def effective_rank(self, energy: float) -> torch.Tensor:
        """int64 [B,H]; where n values do not reach the energy: size, which never says low rank."""
        return effective_ranks(self.values, energy, self.total, self.size)

    @property
    def norm(self) -> torch.Tensor:
        """[B,H]: the spectral norm."""
        return self.values[..., 0]


def attention_svd(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    spec: AttentionSpec,
    operands: Sequence[torch.Tensor] = (),
    params: Sequence[int] = (),
    *,
    rank: int,
    oversampling: int = 10,
    power: int = 1,
    seed: int = 0,
    exact: Exact | None = None,
) -> Factors:
    """U [B,H,M,k], S [B,H,k], V [B,H,N,k] of each head's P; rows without a key are zero rows.

    exact: attention by `one_head_spec(spec)`; by strips of rows in torch, if none is given.
    """
    rows, columns = q_BHMD.shape[2], k_BGND.shape[2]
    wide = torch.promote_types(q_BHMD.dtype, torch.float32)
    q, k = q_BHMD.to(wide), k_BGND.to(wide).repeat_interleave(spec.group, 1)
    single = one_head_spec(spec)

    def attended(part: torch.Tensor) -> torch.Tensor:
        if exact is None:
            return attention_by_rows(q, k, part, operands, params, single)
        return exact(q, k, part, operands, params)

    def apply(x: torch.Tensor) -> torch.Tensor:
        every = x.expand(*q.shape[:2], *x.shape[-2:])
        return torch.cat([attended(part) for part in every.split(_COLUMNS_AT_ONCE, -1)], -1)

    def apply_transposed(y: torch.Tensor) -> torch.Tensor:
        sums = y.new_zeros(*q.shape[:2], columns, y.shape[-1])
        for (batch, heads, at), tile in scored_rows(q, k, operands, params, single, range(rows)):
            weights = tile.weights()
            sums[batch, heads, : weights.shape[-1]] += weights.mT @ y[batch, heads, at]
        return sums

    return randomized_svd(
        apply,
        apply_transposed,
        rows,
        columns,
        rank,
        oversampling=oversampling,
        power=power,
        seed=seed,
        like=q,
    )


def one_head_spec(spec: AttentionSpec) -> AttentionSpec:
    """With keys for each query head, no dropout, and zero rows where the model has NaN."""
    empty = EmptyRow.ZERO if spec.empty_row is EmptyRow.NAN else spec.empty_row
    return dataclasses.replace(spec, group=1, dropout_p=0.0, empty_row=empty)


def attention_spectrum(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    spec: AttentionSpec,
    operands: Sequence[torch.Tensor] = (),
    params: Sequence[int] = (),
    *,
    rank: int,
    oversampling: int = 10,
    power: int = 1,
    seed: int = 0,
    exact: Exact | None = None,
) -> Spectrum:
    """The `rank` largest singular values of each head's P, and ||P||_F^2, exactly, of all rows.

    Takes 2 + 2 power times P or its transpose times rank + oversampling columns: a calibration's
    work, of the order of dense attention. `sampled_spectrum` is the cheap estimate.
    """
    _, values, _ = attention_svd(
        q_BHMD,
        k_BGND,
        spec,
        operands,
        params,
        rank=rank,
        oversampling=oversampling,
        power=power,
        seed=seed,
        exact=exact,
    )
    rows = range(q_BHMD.shape[2])
    squares = values.new_zeros(*q_BHMD.shape[:3])
    for where, tile in scored_rows(q_BHMD, k_BGND, operands, params, spec, rows):
        squares[where] = tile.weights().square_().sum(-1)
    return Spectrum(values, compensated_sum(squares), min(q_BHMD.shape[2], k_BGND.shape[2]))


def sampled_spectrum(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    spec: AttentionSpec,
    operands: Sequence[torch.Tensor] = (),
    params: Sequence[int] = (),
    *,
    rows: int = 32,
    turn: int = 0,
) -> Spectrum:
    """Singular values of R sampled rows of P times sqrt(M / R): R/M of the scores.

    The sum of squares estimates ||P||_F^2 without bias, and the first values those of P, where few
    directions are shared by many rows. It cannot tell more than R: a head of full rank reports
    about energy R, so that an answer near R says "at least this", one far below says "low".
    """
    products = row_products(q_BHMD, k_BGND, spec, operands, params, rows=rows, turn=turn)
    # Of the products of rows, in float64, for the roots of small eigenvalues.
    scaled = finite(products).double() * (q_BHMD.shape[2] / products.shape[-1])
    squares = torch.linalg.eigvalsh(scaled).clamp_(min=0).flip(-1)
    size = min(q_BHMD.shape[2], k_BGND.shape[2])
    return Spectrum(squares.sqrt().to(products), squares.sum(-1).to(products), size)


def row_products(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    spec: AttentionSpec,
    operands: Sequence[torch.Tensor] = (),
    params: Sequence[int] = (),
    *,
    rows: int = 32,
    turn: int = 0,
) -> torch.Tensor:
    """[B,H,R,R]: the products of R sampled rows of P with each other, on any device, float32 or
    wider; nothing here waits for a GPU. Of CUDA tensors by a kernel that keeps no weights."""
    given = (q_BHMD, k_BGND, operands, params, spec)
    refused = statistics_refusal(*given)
    if refused is None:
        return row_products_by_tiles(*given, rows=rows, turn=turn)
    if q_BHMD.device.type == "cuda":
        log.debug("products of rows by torch functions: %s", refused)
    at = sampled_places(q_BHMD, q_BHMD.shape[2], rows, turn)
    wide = torch.promote_types(q_BHMD.dtype, torch.float32)
    products = q_BHMD.new_empty(*q_BHMD.shape[:2], len(at), len(at), dtype=wide)
    for where, tile in scored_rows(q_BHMD, k_BGND, operands, params, spec, at, together=True):
        weights = tile.weights()
        products[where] = weights @ weights.mT
    return products


# -- choosing --------------------------------------------------------------------------------------


def select_rank(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    threshold: float = 0.95,
    *,
    spec: AttentionSpec | None = None,
    operands: Sequence[torch.Tensor] = (),
    params: Sequence[int] = (),
    seed: int = 0,
) -> torch.Tensor:
    """int64 [B,H]: the effective rank of each head at the threshold, min(M, N) from half of it on.

    As many singular values as are needed, doubling: what has not enough energy in half the ranks is
    dense anyway (`chosen_representation`). spec: softmax(Q K^T / sqrt(D)) where it is not given.
    """
    group = q_BHMD.shape[1] // k_BGND.shape[1]
    spec = spec or AttentionSpec(q_BHMD.shape[3] ** -0.5, group=group)
    most = max(min(q_BHMD.shape[2], k_BGND.shape[2]) // 2, 1)
    rank = min(_FIRST_RANK, most)
    while True:
        found = attention_spectrum(q_BHMD, k_BGND, spec, operands, params, rank=rank, seed=seed)
        ranks = found.effective_rank(threshold)
        if rank == most or bool((ranks <= rank).all()):
            return ranks
        rank = min(2 * rank, most)


def rank_proxy(
    name: str,
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    spec: AttentionSpec,
    operands: Sequence[torch.Tensor] = (),
    params: Sequence[int] = (),
    *,
    rows: int = 32,
    turn: int = 0,
) -> torch.Tensor:
    """[B,H], about how many ranks, from sampled rows; 1 for uniform attention by each name.

    "entropy": N / exp(mean entropy), that of an attention uniform in blocks of so many keys.
    "norm": ||P||_F^2, which bounds the stable rank ||P||_F^2 / ||P||_2^2 of a square P without a
    sink (its spectral norm is at least 1). "spectral": the effective rank of the rows, energy 0.95.
    The first two reach N; the last no more than the rows. None bounds the effective rank.
    """
    if name not in PROXIES:
        raise ValueError(f"no rank proxy {name!r}; there are {', '.join(PROXIES)}")
    if name == "entropy":
        found = head_statistics(
            q_BHMD, k_BGND, k_BGND, operands, params, spec, rows=rows, turn=turn
        )
        return k_BGND.shape[2] / found.entropy.exp()
    spectrum = sampled_spectrum(q_BHMD, k_BGND, spec, operands, params, rows=rows, turn=turn)
    return spectrum.total if name == "norm" else spectrum.effective_rank(0.95).to(spectrum.total)
