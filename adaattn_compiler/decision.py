"""How a head is computed: representation, rank or density, and precision of each stage.

A decision is a value that can stand in a file, in a cache key and in a message. Keys are counted as
the site has them: row q of M stands at position q + N - M among the N keys. Patterns speak of
blocks of BLOCK rows by BLOCK keys, the same on every device, so that one decision computes the same
everywhere.
"""

from __future__ import annotations

import base64
import enum
from dataclasses import dataclass

import numpy as np
import torch

# Rows and keys of a block of a pattern.
BLOCK = 64


def _check(holds: bool, name: str, value: object, valid: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {valid}")


class Precision(enum.Enum):
    """What the operands of a product are rounded to; tensors of fewer bits stay as they are, so
    that FP32 is what the exact kernel does. Sums are float32 in each."""

    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"


class Representation(enum.Enum):
    """Which keys a row meets, and whether each by itself."""

    DENSE = "dense"
    BLOCK_SPARSE = "block-sparse"
    LOW_RANK = "low-rank"


@dataclass(frozen=True)
class Pattern:
    """Fixed blocks: those that hold a key within `window` of one of their rows' positions (before
    and after), the first `sinks` keys, `stripes` (numbers of key blocks that every row sees), and
    every `stride`-th key block (0: none)."""

    window: int
    sinks: int = 0
    stripes: tuple[int, ...] = ()
    stride: int = 0

    def __post_init__(self) -> None:
        _check(self.window >= 0, "window", self.window, "0 or more keys")
        _check(self.sinks >= 0, "sinks", self.sinks, "0 or more keys")
        _check(self.stride >= 0, "stride", self.stride, "0 (none) or more blocks")
        _check(all(s >= 0 for s in self.stripes), "stripes", self.stripes, "numbers of blocks")


@dataclass(frozen=True)
class Selection:
    """Blocks chosen in each call, by scores of pooled queries and keys ("pooled") or of every
    `stride`-th antidiagonal ("antidiagonal"), the highest first, up to a share of the estimated
    softmax mass; a window and first keys always (in keys)."""

    mass: float
    by: str = "pooled"
    window: int = BLOCK
    sinks: int = BLOCK

    def __post_init__(self) -> None:
        _check(0 < self.mass <= 1, "mass", self.mass, "above 0, at most 1")
        _check(self.by in ("pooled", "antidiagonal"), "by", self.by, "'pooled' or 'antidiagonal'")
        _check(self.window >= 0, "window", self.window, "0 or more keys")
        _check(self.sinks >= 0, "sinks", self.sinks, "0 or more keys")


@dataclass(frozen=True)
class Pooling:
    """Low rank: blocks of `near` (a Pattern) key by key, all others through the means of `keys`
    neighbouring keys and of their values, weighted by how many they stand for."""

    near: Pattern
    keys: int

    def __post_init__(self) -> None:
        _check(self.keys in (8, 16, 32, 64), "keys", self.keys, "8, 16, 32 or 64")


@dataclass(frozen=True)
class Nystrom:
    """Low rank, without a mask: all rows and keys through as many landmarks each, means of
    neighbouring ones (kernels/nystrom.py)."""

    landmarks: int

    def __post_init__(self) -> None:
        valid = (16, 32, 64, 128, 256)
        _check(self.landmarks in valid, "landmarks", self.landmarks, "16, 32, 64, 128 or 256")


@dataclass(frozen=True)
class KeyBasis:
    """Scores in `rank` dimensions: Q and K times an orthonormal basis of directions in which the
    keys of calibration lay. matrix: float32 [D, rank], row by row, in base64."""

    rank: int
    matrix: str

    def __post_init__(self) -> None:
        _check(self.rank > 0 and self.rank % 8 == 0, "rank", self.rank, "a multiple of 8")
        self.tensor()

    @staticmethod
    def of(basis: torch.Tensor) -> KeyBasis:
        """Of a tensor [D, rank]."""
        numbers = basis.detach().cpu().to(torch.float32).contiguous().numpy()
        return KeyBasis(basis.shape[1], base64.b64encode(numbers.astype("<f4").tobytes()).decode())

    def tensor(self) -> torch.Tensor:
        """float32 [D, rank]. ValueError where the matrix is of another size, or not finite."""
        try:
            numbers = np.frombuffer(base64.b64decode(self.matrix, validate=True), "<f4")
        except ValueError:
            numbers = np.zeros(0, "<f4")
        fits = len(numbers) > 0 and len(numbers) % self.rank == 0
        valid = f"finite float32 numbers in base64, {self.rank} for each dimension of the head"
        _check(fits and bool(np.isfinite(numbers).all()), "matrix", self.matrix[:20], valid)
        return torch.from_numpy(numbers.astype(np.float32)).view(-1, self.rank)


@dataclass(frozen=True)
class HeadDecision:
    """How one head is computed; without arguments: exactly.

    pattern, selection, pooling, nystrom: at most one; which of them says the representation. basis:
    in which scores are computed, not with selection, pooling or nystrom. scores and
    values: precision of Q K^T and P V. skip: blocks whose scores all lie by more than this
    (natural units) below the maxima of their rows so far are not exponentiated; None: none are.
    """

    pattern: Pattern | None = None
    selection: Selection | None = None
    pooling: Pooling | None = None
    nystrom: Nystrom | None = None
    basis: KeyBasis | None = None
    scores: Precision = Precision.FP32
    values: Precision = Precision.FP32
    skip: float | None = None

    def __post_init__(self) -> None:
        ways = (self.pattern, self.selection, self.pooling, self.nystrom)
        given = [way for way in ways if way is not None]
        names = "pattern, selection, pooling, nystrom"
        _check(len(given) <= 1, names, given, "at most one of them")
        alone = self.basis is None or given == [self.pattern] or not given
        _check(alone, "basis", "given", "without selection, pooling and nystrom")
        _check(self.skip is None or self.skip > 0, "skip", self.skip, "above 0, or None")
        if self.skip is not None:  # a whole number is the same decision as the float in a file
            object.__setattr__(self, "skip", float(self.skip))

    @property
    def representation(self) -> Representation:
        if self.pooling is not None or self.nystrom is not None or self.basis is not None:
            return Representation.LOW_RANK
        sparse = self.pattern is not None or self.selection is not None
        return Representation.BLOCK_SPARSE if sparse else Representation.DENSE

    @property
    def is_exact(self) -> bool:
        return self == EXACT


EXACT = HeadDecision()


@dataclass(frozen=True)
class SiteDecision:
    """The decisions of a site's heads, in order."""

    heads: tuple[HeadDecision, ...]

    @property
    def is_exact(self) -> bool:
        return all(head.is_exact for head in self.heads)


def describe_head(decision: HeadDecision) -> str:
    """A decision in a few words: "exact", "dense bf16", "window 256 + 64 sinks bf16", ..."""
    words = [_keys_in_words(decision)]
    if decision.scores == decision.values:
        words += [decision.scores.value] if decision.scores != Precision.FP32 else []
    else:
        words.append(f"{decision.scores.value}/{decision.values.value}")
    if decision.basis is not None:
        words.append(f"rank {decision.basis.rank}")
    if decision.skip is not None:
        words.append(f"skip {decision.skip:g}")
    return "exact" if decision.is_exact else " ".join(words)


def _keys_in_words(decision: HeadDecision) -> str:
    if decision.pattern is not None:
        return _pattern_in_words(decision.pattern)
    if decision.selection is not None:
        return f"{decision.selection.by} mass {decision.selection.mass:g}"
    if decision.nystrom is not None:
        return f"{decision.nystrom.landmarks} landmarks"
    if decision.pooling is not None:
        return f"{_pattern_in_words(decision.pooling.near)} + means of {decision.pooling.keys}"
    return "dense"


def _pattern_in_words(pattern: Pattern) -> str:
    words = f"window {pattern.window}"
    if pattern.sinks:
        words += f" + {pattern.sinks} sinks"
    if pattern.stripes:
        words += f" + {len(pattern.stripes)} stripes"
    if pattern.stride:
        words += f" + one block in {pattern.stride}"
    return words
