"""Bases in which the keys of each head lie, as far as few directions can hold them."""

from __future__ import annotations

import torch

from adaattn_compiler.decision import KeyBasis
from adaattn_compiler.kernels.randomized_svd import randomized_svd


def bases_of_keys(k_BGND: torch.Tensor, rank: int) -> tuple[KeyBasis, ...]:
    """For each key head the first `rank` principal directions of its keys.

    About their mean: what all keys have in common adds the same to all scores of a row, which no
    softmax sees. Where keys are not finite, any directions: what is measured with them will tell.
    """
    dim = k_BGND.shape[3]
    keys = k_BGND.transpose(0, 1).flatten(1, 2).double()
    keys = keys - keys.mean(1, keepdim=True)
    if keys.shape[1] < dim or not bool(keys.isfinite().all()):
        return (KeyBasis.of(torch.eye(dim)[:, :rank]),) * keys.shape[0]

    def directions(head: torch.Tensor) -> torch.Tensor:
        found = randomized_svd(
            lambda x: head @ x, lambda x: head.mT @ x, head.shape[0], dim, rank, power=2, like=head
        )
        return found[2]

    return tuple(KeyBasis.of(directions(head)) for head in keys)
