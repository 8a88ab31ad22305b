"""The Nystrom form of an attention without a mask: rows and keys through means of them, landmarks.

With Q~ and K~ the landmarks of Q and K, and s the scale,

    softmax(s Q K^T) V  ~  softmax(s Q K~^T) pinv(softmax(s Q~ K~^T)) softmax(s Q~ K^T) V

read from the right: what the landmarks of the rows get exactly; values for the landmarks of the
keys with which their rows get just that; attention to those. Source: Xiong et al.,
"Nystromformer", 2021, section 3; the pseudo-inverse by the iteration of its equation 11.
"""

from __future__ import annotations

import torch

_ITERATIONS = 16


def landmark_values(
    q_BHLD: torch.Tensor, k_BHKD: torch.Tensor, exact_BHLE: torch.Tensor, scale: float
) -> torch.Tensor:
    """Values of landmarks of keys [B,H,K,E], with which the landmarks of rows get `exact`; in
    float32 or wider, of the type of `exact`."""
    wide = torch.promote_types(exact_BHLE.dtype, torch.float32)
    weights = (q_BHLD.to(wide) @ k_BHKD.to(wide).mT * scale).softmax(-1)
    return (pseudo_inverse(weights) @ exact_BHLE.to(wide)).to(exact_BHLE.dtype)


def pseudo_inverse(weights: torch.Tensor) -> torch.Tensor:
    """[..., K, L] of [..., L, K], near to the pseudo-inverse where the singular values that matter
    are not small; finite for rows that sum to 1."""
    largest = weights.abs().sum(-1).amax(-1) * weights.abs().sum(-2).amax(-1)
    found = weights.mT / largest[..., None, None]
    one = torch.eye(weights.shape[-2], dtype=weights.dtype, device=weights.device)
    for _ in range(_ITERATIONS):
        product = weights @ found
        inner = 7 * one - product
        inner = 15 * one - product @ inner
        found = 0.25 * found @ (13 * one - product @ inner)
    return found
