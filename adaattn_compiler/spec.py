"""What one attention computes, exactly: the value every stage agrees on.

A site computes, for batch item b, query head h, query row q and key column k,

    S[b,h,q,k] = scale * sum_d Q[b,h,q,d] * K[b,h//group,k,d]
    P[b,h,q,:] = softmax over {k : mask(b,h,q,k)} of score(S, b, h, q, k), and over the sink, if any
    O[b,h,q,e] = sum_k P[b,h,q,k] * V[b,h//group,k,e]

`score` and `mask` are sympy expressions over the symbols below, so that one form serves every
printer (torch, C++, Triton), every proof about blocks of the mask, and the user who reads them.
Tensors that they read are `Load(i, ...)`: element of the site's i-th operand.
"""

from __future__ import annotations

import ast
import enum
import hashlib
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

# Positions: batch item, query head, query row, key column. Sizes: M query rows, N key columns.
b, h, q, k = (sympy.Symbol(name, integer=True, nonnegative=True) for name in "bhqk")
M, N = (sympy.Symbol(name, integer=True, positive=True) for name in "MN")
# The scaled dot product of one query row and one key row.
S = sympy.Symbol("S", real=True)

POSITIONS: tuple[sympy.Symbol, ...] = (b, h, q, k)


class Load(sympy.Function):  # type: ignore[misc]
    """`Load(i, *index)`: the element of operand i at that index (booleans read as 0 and 1)."""

    is_real = True
    is_number = False  # though no symbol may be in it: its value is not known

    @classmethod
    def eval(cls, *args: Any) -> None:
        return None


class Where(sympy.Function):  # type: ignore[misc]
    """`Where(condition, x, y)`: x where the condition holds, else y; no rewriting of its own."""

    is_real = True

    @classmethod
    def eval(cls, condition: Any, x: Any, y: Any) -> Any:
        if condition == sympy.true:
            return x
        if condition == sympy.false:
            return y
        return x if x == y else None

    def _eval_is_integer(self) -> bool | None:
        """Without this a comparison of `Where(c, 1, 0)` counts as one of reals."""
        _, x, y = self.args
        return True if x.is_integer and y.is_integer else None


class EmptyRow(enum.Enum):
    """What a query row yields whose scores are all -inf (or masked), as the model has it."""

    IMPOSSIBLE = "impossible"  # proven: every row has a key
    ZERO = "zero"  # SDPA with a boolean mask
    NAN = "nan"  # -inf filled in by hand
    UNIFORM = "uniform"  # a large finite negative: the mean over all N values


@dataclass(frozen=True)
class OperandSpec:
    """A tensor that `score`, `mask` or the sink reads: its kind and its number of axes."""

    kind: str  # "bool", "int" or "float"
    rank: int


@dataclass(frozen=True)
class AttentionSpec:
    """See the module's docstring for the meaning; shapes are [B,H,M,D], [B,G,N,D], [B,G,N,E].

    `params` are integers known only at run time that the expressions mention (symbols named
    "p0", "p1", ... in that order), beside M and N.
    """

    scale: float
    score: sympy.Expr = S
    mask: Boolean = sympy.true
    empty_row: EmptyRow = EmptyRow.IMPOSSIBLE
    sink: sympy.Expr | None = None
    dropout_p: float = 0.0
    group: int = 1
    operands: tuple[OperandSpec, ...] = ()
    params: int = 0

    @property
    def bias(self) -> sympy.Expr | None:
        """What is added to S, where the score is S plus something free of S; else None."""
        rest = self.score - S
        return None if rest.has(S) else rest

    @property
    def plain(self) -> bool:
        """Whether this is softmax(scale * Q K^T) V and nothing else."""
        return self.score == S and self.mask == sympy.true and self.sink is None

    @property
    def masks_by_data(self) -> bool:
        """Whether the mask reads a tensor, so that only the input tells which keys are attended."""
        return bool(self.mask.has(Load))

    def key(self) -> str:
        """A short stable name for this spec, for caches and logs."""
        return hashlib.sha256(self.serialize().encode()).hexdigest()[:12]

    def serialize(self) -> str:
        """One line of text from which `deserialize` makes an equal spec."""
        fields = {
            "scale": repr(self.scale),
            "score": sympy.srepr(self.score),
            "mask": sympy.srepr(self.mask),
            "empty_row": self.empty_row.value,
            "sink": None if self.sink is None else sympy.srepr(self.sink),
            "dropout_p": self.dropout_p,
            "group": self.group,
            "operands": [(operand.kind, operand.rank) for operand in self.operands],
            "params": self.params,
        }
        return repr(fields)

    @staticmethod
    def deserialize(text: str) -> AttentionSpec:
        """The spec that `serialize` wrote; ValueError when the text is not of that form."""
        try:
            fields = ast.literal_eval(text)
            return AttentionSpec(
                scale=float(fields["scale"]),
                score=_expression(fields["score"]),
                mask=_expression(fields["mask"]),
                empty_row=EmptyRow(fields["empty_row"]),
                sink=None if fields["sink"] is None else _expression(fields["sink"]),
                dropout_p=fields["dropout_p"],
                group=fields["group"],
                operands=tuple(OperandSpec(*operand) for operand in fields["operands"]),
                params=fields["params"],
            )
        except (KeyError, TypeError, SyntaxError, NameError) as error:
            raise ValueError(f"not a serialized AttentionSpec: {text[:80]!r}") from error


def _expression(text: str) -> Any:
    """The sympy expression of a srepr; only sympy's names and ours can be mentioned in it."""
    names = {name: getattr(sympy, name) for name in dir(sympy) if name[0].isupper()}
    names |= {"tanh": sympy.tanh, "floor": sympy.floor}
    names |= {name: getattr(sympy, name) for name in ("oo", "zoo", "nan", "pi")}
    names |= {"Load": Load, "Where": Where, "true": sympy.true, "false": sympy.false}
    return eval(text, {"__builtins__": {}}, names)


def param(index: int) -> sympy.Symbol:
    """The symbol of a spec's index-th run-time integer."""
    return sympy.Symbol(f"p{index}", integer=True)


class Refusal(Exception):
    """Why a site is left alone, and the graph node where that was seen.

    Raised anywhere in matching, recovery, validation and lowering; caught once, in the pipeline;
    shown to the user by `explain`.
    """

    def __init__(self, reason: str, node: object | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = None if node is None else str(node)

    def __str__(self) -> str:
        return self.reason if self.node is None else f"{self.reason} (at {self.node})"
