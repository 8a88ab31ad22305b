"""How far approximations can be off: statements about one query row, each with its proof.

For a row with scores s_k, weights w = softmax(s) and values v_k, attention is out = sum_k w_k v_k.
A sink is one more key of value 0, which is never left out. All bounds are of each element of `out`
by itself, over any leading axes; `spread` is max_k v_k - min_k v_k of an element's values, over the
keys that the row attends to (or more). They hold in exact arithmetic for what they name; errors of
stages that follow one another add up (the second stage's quantities are then those that the first
one leaves: `reweighed` says how far weights can move).

Two facts carry them all. Of two rows of weights w and w', with TV = sum_k |w'_k - w_k| / 2,

    |sum_k (w'_k - w_k) v_k| <= TV spread                                                      (1)

since the differences sum to 0: TV of weight moves, from some values to others. And if
w'_k is proportional to w_k e^(d_k) with all d_k in an interval of length h, then

    TV <= tanh(h / 4)                                                                          (2)

TV = w'(A) - w(A) for the set A of keys that gain. With a = w(A) the odds of A grow by at most e^h,
so w'(A) <= a e^h / (a e^h + 1 - a); the difference is largest at a = 1 / (1 + e^(h/2)), where it is
tanh(h/4). (h is the distance of w and w' in Hilbert's projective metric, and tanh(h/4) the number
of Birkhoff's contraction theorem.) Both are attained: by two keys.
"""

from __future__ import annotations

import math

import torch

from adaattn_compiler.decision import Precision

# Unit roundoff: what rounding to nearest changes a normal number by at most, relative to it.
UNITS = {
    Precision.FP32: 2.0**-24,
    Precision.TF32: 2.0**-11,
    Precision.BF16: 2.0**-8,
    Precision.FP16: 2.0**-11,
}


def left_out(mass: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Keys that are not met: fixed patterns, and blocks chosen in each call.

    mass: the exact weight p of the keys left out. With the means m and m' of the values of those
    kept and of those left out, each by their weights, out = (1 - p) m + p m', and what is computed
    is m: |m - out| = p |m - m'| <= p spread. (At most 2 p max |v|.)
    """
    return mass * spread


def skipped_mass(keys: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """The exact weight of keys that were skipped as each lies by at least `threshold` below a key
    that was kept.

    That one weighs 1, say, and those n together at most x = n e^-threshold: x / (1 + x).
    """
    relative = keys * (-threshold).exp()
    return relative / (1 + relative)


def reweighed(width: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """Scores that are off by d_k, all of a row in an interval of length `width` (twice the largest
    |d_k|, at most): (1) and (2). With a spread of 1, by how much weights can move (TV)."""
    return torch.tanh(width / 4) * spread


def rounded_products(magnitude: torch.Tensor, terms: int, operands: Precision) -> torch.Tensor:
    """A sum of products x_i y_i whose operands are rounded, and which is summed in float32.

    magnitude: sum_i |x_i y_i|. Rounding both operands changes a product by at most u (2 + u) of it;
    n products of float32 and their sum, in any order, err by at most n u' / (1 - n u') of the sum
    of magnitudes (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1).
    Without overflow and underflow.
    """
    return magnitude * ((1 + _both(operands)) * (1 + _sum(terms)) - 1)


def rounded_values(magnitude: torch.Tensor, operands: Precision) -> torch.Tensor:
    """Weights and values that are rounded before they are multiplied, the weights' sum taken
    before that: magnitude sum_k w_k |v_k|, for its weights as they are when they are rounded."""
    return magnitude * _both(operands)


def moved_magnitude(
    magnitude: torch.Tensor, width: torch.Tensor, largest: torch.Tensor
) -> torch.Tensor:
    """sum_k w'_k |v_k| at most, from sum_k w_k |v_k|, where scores are off as in `reweighed`;
    largest: max_k |v_k|."""
    return torch.minimum(magnitude + reweighed(width, largest), largest)


def by_means(
    radius: torch.Tensor, mass: torch.Tensor, inside: torch.Tensor, spread: torch.Tensor
) -> torch.Tensor:
    """Keys in clusters, each cluster met through the mean of its keys and of its values, its score
    that of the mean key and the logarithm of how many it stands for. [..., E].

    radius: of each cluster c [..., C], the largest |s_k - s_c| of its keys from the score of their
    mean; at most scale |q| max |k_k - k_c|. mass: its exact weight [..., C]. inside: the spread of
    its own values [..., C, E]. spread: that of all values [..., E]. Scores are linear in k (no
    softcap); keys that are met themselves add nothing.

    Let x_k = s_k - s_c, which are 0 on average, and r = radius_c. A cluster's exact weight is to
    what it is given as mean(e^x) to 1, and 1 <= mean(e^x) <= cosh r: from below by Jensen, from
    above since e^x lies under its chord from -r to r (Hoeffding 1963, lemma 1). So the logarithms
    of weights of clusters and near keys move within an interval of length max_c log cosh r, and by
    (2) the result by at most tanh of a quarter of that, times the spread. Inside a cluster weights
    are equal where they should be proportional to e^x, x in an interval of length 2 r: by (1) and
    (2) its mean is off by at most tanh(r/2) times its spread, and that counts by the cluster's
    weight.
    """
    # log cosh r without overflow.
    log_cosh = radius + torch.log1p(torch.exp(-2 * radius)) - math.log(2)
    moved = reweighed(log_cosh.amax(-1, keepdim=True), spread)
    share = mass * torch.tanh(radius / 2)
    return moved + (share[..., None] * inside).sum(-2)


def projected(outside_q: torch.Tensor, outside_k: torch.Tensor, scale: float) -> torch.Tensor:
    """How far scores are off, at most, where both q and k are projected onto a subspace:
    scale |q's part outside| |k's part outside|.

    The parts inside are orthogonal to those outside: q k - (Pq)(Pk) = (q - Pq)(k - Pk), which is at
    most that by Cauchy and Schwarz.
    """
    return abs(scale) * outside_q * outside_k


def _both(operands: Precision) -> float:
    unit = UNITS[operands]
    return unit * (2 + unit)


def _sum(terms: int) -> float:
    share = terms * UNITS[Precision.FP32]
    return share / (1 - share)
