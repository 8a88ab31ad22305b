"""What some heads of a site attend to in a launch of its own, joined to the launch of all heads.

means of keys   far keys by the means of neighbouring ones (Pooling of decision.py)
landmarks       no key by itself: rows and keys by their landmarks (Nystrom)
key basis       all that the head sees, scored in fewer dimensions (KeyBasis)

A part leaves to the launch of all heads what is not its own; both go into one softmax
(CppRunner.join). kernels/reference.py has each in float64.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from adaattn_compiler.decision import BLOCK, HeadDecision, KeyBasis
from adaattn_compiler.kernels.blocks import BlockStructure
from adaattn_compiler.kernels.cpu.call import Plan
from adaattn_compiler.kernels.cpu.plans import lists_by_head
from adaattn_compiler.kernels.cpu.runner import CppRunner, cpp_runner, text_of
from adaattn_compiler.kernels.cpu.source import Configuration
from adaattn_compiler.kernels.means import means_of_runs, means_of_whole_runs
from adaattn_compiler.kernels.nystrom import landmark_values
from adaattn_compiler.spec import AttentionSpec, EmptyRow, Load, OperandSpec, h
from adaattn_compiler.spec import k as key
from adaattn_compiler.spec import q as row

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Sequence[int]]

# Whether a block of rows attends to a mean, by head: bool [H, row blocks, means].
_FAR = sympy.Ne(Load(0, h, sympy.floor(row / BLOCK), key), 0)


@dataclass(frozen=True)
class PartLists:
    """Of one pair of lengths. offsets [1,H,row blocks + 1] and blocks: as a Plan's, the lists of
    heads of other parts empty. far: see _FAR; None where no list is cut by it."""

    offsets: torch.Tensor
    blocks: torch.Tensor
    far: torch.Tensor | None = None

    def of(
        self, which: torch.Tensor, modes: torch.Tensor, skip: torch.Tensor | None = None
    ) -> Plan:
        """The plan in which heads of batch items that are not `which`, bool [B,H], see nothing."""
        offsets = torch.where(which[..., None], self.offsets, 0).to(torch.int32)
        return Plan(offsets, self.blocks, modes=modes, skip=skip)


class Part(abc.ABC):
    """heads: bool [H], whose part it is. modes, skip: of all heads, as a Plan has them."""

    def __init__(
        self, heads: torch.Tensor, modes: torch.Tensor, skip: torch.Tensor | None = None
    ) -> None:
        self.heads = heads
        self._theirs = heads[:, None, None]
        self._modes = modes
        self._skip = skip

    def split(
        self, kept: torch.Tensor, structure: BlockStructure, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the launch of all heads keeps, what is this part's), both bool [H, row blocks, key
        blocks]; kept: what the heads' patterns keep of the mask's blocks, of N keys."""
        return kept & ~self._theirs, kept & self._theirs

    @abc.abstractmethod
    def lists(self, own: torch.Tensor, structure: BlockStructure, columns: int) -> PartLists:
        """own: what is this part's (`split`)."""

    @abc.abstractmethod
    def join(
        self,
        given: Tensors,
        lists: PartLists,
        which: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> bool:
        """Join this part to out and lse for `which` heads, bool [B,H]; False, both then half
        written, where something is not finite."""


def parts_of(
    made_for: Configuration,
    heads: Sequence[HeadDecision],
    modes: torch.Tensor,
    skip: torch.Tensor | None,
) -> tuple[Part, ...]:
    """The parts of a site's heads. Raises CannotBuild, NoCode."""
    found: list[Part] = []
    for pooled in _each([head.pooling.keys if head.pooling else None for head in heads]):
        found.append(_MeansOfKeys(made_for, *pooled, modes))
    for landmarks in _each([head.nystrom.landmarks if head.nystrom else None for head in heads]):
        found.append(_Landmarks(made_for, *landmarks, modes))
    for rank, theirs in _each([head.basis.rank if head.basis else None for head in heads]):
        bases = [head.basis if its else None for head, its in zip(heads, theirs, strict=True)]
        found.append(_InBasis(made_for, rank, theirs, bases, modes, skip))
    return tuple(found)


def _each(sizes: Sequence[int | None]) -> list[tuple[int, torch.Tensor]]:
    """Every size that there is, with the heads that have it, bool [H]."""
    found = sorted({size for size in sizes if size is not None})
    return [(size, torch.tensor([own == size for own in sizes])) for size in found]


class _MeansOfKeys(Part):
    """Whole blocks that the mask leaves and the pattern does not keep, `keys` keys by a mean."""

    def __init__(
        self, made_for: Configuration, keys: int, heads: torch.Tensor, modes: torch.Tensor
    ) -> None:
        super().__init__(heads, modes)
        self._keys = keys
        spec = made_for.spec
        self._runner = _runner(
            made_for,
            spec=AttentionSpec(
                spec.scale,
                spec.score,
                _FAR,
                EmptyRow.ZERO,
                group=spec.group,
                operands=(OperandSpec("bool", 3),),
            ),
            operands=("bool",),
        )

    def split(
        self, kept: torch.Tensor, structure: BlockStructure, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.arange(1, kept.shape[-1] + 1) * BLOCK <= columns
        far = structure.full & whole & ~kept & self._theirs
        allowed = structure.full | structure.partial
        return kept | (allowed & ~far & self._theirs), far

    def lists(self, own: torch.Tensor, structure: BlockStructure, columns: int) -> PartLists:
        by_mean = own.repeat_interleave(BLOCK // self._keys, -1)
        far = torch.nn.functional.pad(by_mean, (0, -by_mean.shape[-1] % BLOCK))
        blocks = far.unflatten(-1, (-1, BLOCK))
        return PartLists(*lists_by_head(blocks.any(-1)[None], ~blocks.all(-1)), far)

    def join(
        self,
        given: Tensors,
        lists: PartLists,
        which: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> bool:
        q, k, v, _, _ = given
        assert lists.far is not None
        width = lists.far.shape[-1]
        k, v = (means_of_whole_runs(tensor, self._keys, width) for tensor in (k, v))
        plan = lists.of(which, self._modes)
        log_count = math.log(self._keys)
        return self._runner.join(q, k, v, [lists.far], (), plan, out, lse, log_count)


class _Landmarks(Part):
    """Attention to means of keys, with values that give means of rows what those get exactly."""

    def __init__(
        self, made_for: Configuration, count: int, heads: torch.Tensor, modes: torch.Tensor
    ) -> None:
        super().__init__(heads, modes)
        self._count = count
        self._group = made_for.spec.group
        spec = dataclasses.replace(made_for.spec, group=1, empty_row=EmptyRow.ZERO)
        self._runner = _runner(made_for, spec=spec)

    def lists(self, own: torch.Tensor, structure: BlockStructure, columns: int) -> PartLists:
        landmarks = -(-columns // self._run_of(columns))
        shape = (len(self.heads), own.shape[1], -(-landmarks // BLOCK))
        none_is_cut = torch.zeros((), dtype=torch.bool)
        return PartLists(*lists_by_head(self._theirs.expand(shape)[None], none_is_cut))

    def _run_of(self, length: int) -> int:
        """How many rows or keys have one landmark."""
        return -(-length // self._count)

    def join(
        self,
        given: Tensors,
        lists: PartLists,
        which: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> bool:
        q, k, v, _, _ = given
        heads = which.any(0).nonzero().flatten()
        its_k, its_v = k[:, heads // self._group], v[:, heads // self._group]
        q_means, k_means = (
            means_of_runs(tensor, self._run_of(tensor.shape[2])) for tensor in (q[:, heads], its_k)
        )
        exact = self._runner(q_means, its_k, its_v, (), ())
        values = landmark_values(q_means, k_means, exact, self._runner.spec.scale)
        every_k, every_v = (_among(part, heads, q.shape[1]) for part in (k_means, values))
        return self._runner.join(
            q, every_k, every_v, (), (), lists.of(which, self._modes), out, lse
        )


class _InBasis(Part):
    """All that the heads see, scored by Q and K in a basis of few directions."""

    def __init__(
        self,
        made_for: Configuration,
        rank: int,
        heads: torch.Tensor,
        bases: Sequence[KeyBasis | None],
        modes: torch.Tensor,
        skip: torch.Tensor | None,
    ) -> None:
        super().__init__(heads, modes, skip)
        spec = dataclasses.replace(made_for.spec, sink=None, empty_row=EmptyRow.ZERO)
        self._runner = _runner(made_for, spec=spec, head_dim=rank)
        nothing = torch.zeros(made_for.head_dim, rank)
        dtype = getattr(torch, made_for.dtype)
        each = [nothing if basis is None else basis.tensor() for basis in bases]
        self._of_heads = torch.stack(each).to(dtype)
        # Heads that share keys have one basis, those of them that have any.
        groups = torch.stack(each).unflatten(0, (-1, spec.group))
        used = heads.view(-1, spec.group).to(torch.int8).argmax(1)
        self._of_keys = groups[torch.arange(len(groups)), used].to(dtype)

    def lists(self, own: torch.Tensor, structure: BlockStructure, columns: int) -> PartLists:
        return PartLists(*lists_by_head(own[None], structure.partial))

    def join(
        self,
        given: Tensors,
        lists: PartLists,
        which: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> bool:
        q, k, v, operands, params = given
        plan = lists.of(which, self._modes, self._skip)
        turned = (q @ self._of_heads, k @ self._of_keys)
        return self._runner.join(*turned, v, operands, params, plan, out, lse)


def _among(part: torch.Tensor, heads: torch.Tensor, count: int) -> torch.Tensor:
    """[B,count,...] with `part` [B,len(heads),...] at `heads`, elsewhere 0."""
    every = part.new_zeros(part.shape[0], count, *part.shape[2:])
    every[:, heads] = part
    return every


def _runner(made_for: Configuration, **changes: Any) -> CppRunner:
    return cpp_runner(text_of(dataclasses.replace(made_for, **changes)))
