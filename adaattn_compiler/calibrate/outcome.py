"""What a choice does to the whole model: error of its outputs, KL divergence, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from adaattn_compiler.calibrate.board import Board, Handler, exactly
from adaattn_compiler.calibrate.ranks import ALONE, Ranks

Batch = tuple[tuple[Any, ...], dict[str, Any]]
# Of the logits of a batch so many elements are kept to compare with.
_MOST_ELEMENTS = 1 << 25
_IGNORED = -100


@dataclass(frozen=True)
class Outcome:
    """Of a choice, beside the exact model on the same batches.

    output_error: relative L2 of all floating outputs. kl: mean over tokens, natural units. nll:
    change of the mean negative log-likelihood of the batches' own tokens, and its standard error.
    None where the model gives no logits.
    """

    output_error: float
    kl: float | None = None
    nll: float | None = None
    nll_error: float | None = None

    @property
    def perplexity_change(self) -> float | None:
        """Relative: 0.001 is 0.1%."""
        return None if self.nll is None else math.expm1(self.nll)


@dataclass(frozen=True)
class _Exact:
    outputs: list[torch.Tensor]
    logits: torch.Tensor | None
    losses: torch.Tensor | None


@dataclass(frozen=True)
class _Part:
    """What one batch adds to an outcome: sums of squares, and of each token."""

    wrong: float
    whole: float
    divergences: torch.Tensor | None = None
    changes: torch.Tensor | None = None


class Judge:
    """Runs choices on the batches and compares with what the exact model gave."""

    def __init__(self, board: Board, batches: Sequence[Batch], ranks: Ranks = ALONE) -> None:
        self._board = board
        self._batches = batches
        self._ranks = ranks
        self._exact: list[_Exact | None] = [None] * len(batches)

    @property
    def has_logits(self) -> bool:
        """Whether perplexity can be measured."""
        return self._exact_of(0).losses is not None

    def run(self, handler_of: Callable[[int], Handler], batches: Sequence[int]) -> Outcome:
        """The outcome on some batches, shared by the ranks; handler_of: of a batch's number."""
        own = {i: self._part(i, handler_of(i)) for i in self._ranks.own(batches)}
        found = {i: part for parts in self._ranks.gather(own) for i, part in parts.items()}
        # Of the first rank: others might round otherwise, and then decide otherwise.
        return self._ranks.from_first(_joined([found[i] for i in batches]))

    def _part(self, i: int, handler: Handler) -> _Part:
        exact = self._exact_of(i)
        args, kwargs = self._batches[i]
        output = self._board.run(args, kwargs, handler)
        wrong = whole = 0.0
        for given, true in zip(_floats(output), exact.outputs, strict=True):
            wrong += float((_some(given).double() - true.double()).square().sum())
            whole += float(true.double().square().sum())
        logits = _logits(output)
        losses = None if logits is None else _losses(logits, self._batches[i])
        if losses is None or exact.losses is None or exact.logits is None or logits is None:
            return _Part(wrong, whole)
        divergences = _divergence(exact.logits, _some(logits))
        return _Part(wrong, whole, divergences, losses - exact.losses)

    def _exact_of(self, i: int) -> _Exact:
        found = self._exact[i]
        if found is None:
            args, kwargs = self._batches[i]
            output = self._board.run(args, kwargs, exactly)
            logits = _logits(output)
            losses = None if logits is None else _losses(logits, self._batches[i])
            kept = None if losses is None or logits is None else _some(logits).clone()
            outputs = [_some(tensor).clone() for tensor in _floats(output)]
            found = self._exact[i] = _Exact(outputs, kept, losses)
        return found


def _joined(parts: Sequence[_Part]) -> Outcome:
    wrong, whole = sum(part.wrong for part in parts), sum(part.whole for part in parts)
    error = math.sqrt(wrong / whole) if whole else 0.0
    changes = [part.changes for part in parts if part.changes is not None]
    if not changes:
        return Outcome(error)
    change = torch.cat(changes).double()
    deviation = float(change.std()) / math.sqrt(max(len(change), 1))
    divergences = [part.divergences for part in parts if part.divergences is not None]
    kl = float(torch.cat(divergences).double().mean())
    return Outcome(error, kl, float(change.mean()), deviation)


def _floats(output: Any) -> list[torch.Tensor]:
    """The floating tensors of an output, caches aside."""
    logits = _logits(output)
    if logits is not None:
        return [logits]
    leaves = pytree.tree_leaves(output)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _logits(output: Any) -> torch.Tensor | None:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return found if isinstance(found, torch.Tensor) and found.dim() == 3 else None


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Every so-manieth token where there are very many elements."""
    if tensor.numel() <= _MOST_ELEMENTS or tensor.dim() < 2:
        return tensor
    return tensor[:, :: -(-tensor.numel() // _MOST_ELEMENTS)]


def _divergence(exact: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """KL(exact || given) of each token."""
    p, q = (x.float().log_softmax(-1) for x in (exact, given))
    return (p.exp() * (p - q)).sum(-1).flatten()


def _losses(logits: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    """The negative log-likelihood of each next token; None where the batch has no tokens."""
    args, kwargs = batch
    tokens = kwargs.get("labels", kwargs.get("input_ids", args[0] if args else None))
    if not isinstance(tokens, torch.Tensor) or tokens.shape != logits.shape[:2]:
        return None
    wanted = tokens[:, 1:].flatten()
    known = wanted != _IGNORED
    log_p = logits[:, :-1].flatten(0, 1)[known].float().log_softmax(-1)
    return -log_p.gather(1, wanted[known][:, None]).flatten()
