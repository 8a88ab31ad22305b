"""Whether an outer axis that stands alone is the batch or the heads.

Where K and V tell a batch and a head apart, the inner one is the head. Where they have but one such
axis (one head, one key head, a batch of one, or both folded into one), its size does not say which
of them it is. The tensors that the operands are views of mostly do: heads stand beside the head
dimension in a projection's result [B, M, H*D], a dimension of size 1 holds the place of the other,
and a linear layer maps a whole batch alike.

Nothing that is computed depends on it; what a site is called does. A batch that is taken for heads
makes a policy that is good for one batch size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adaattn_compiler.passes.axes import overlaps
from adaattn_compiler.passes.canonical_view import call_name, meta_of, opaque
from adaattn_compiler.passes.index_map import Axis, Digit, Index
from adaattn_compiler.passes.views import Access


@dataclass(frozen=True)
class Layouts:
    """What Q, K and V are views of, each from the product's operand up."""

    chains: tuple[tuple[Access, ...], ...]
    batch: Axis
    query: Axis
    key: Axis

    def is_batch(self, lone: Digit, group: Sequence[Digit]) -> bool | None:
        """Whether the lone axis is the batch; None where nothing tells. group: the axes of the
        query heads that share a key head, if any."""
        q, k, v = self.chains
        # A decoding step's only row looks like an axis of size 1.
        order = (q, k, v) if self.query.size != 1 else (k, v, q)
        for chain in order:
            for access in reversed(chain):
                told = self._told(access, chain, lone, group)
                if told is not None:
                    return told
        return None

    def _told(
        self, access: Access, chain: Sequence[Access], lone: Digit, group: Sequence[Digit]
    ) -> bool | None:
        """What one tensor of a chain tells."""
        place = _place(access.index, [lone])
        if place is None:
            return None
        axes = access.index[place].axes
        if axes - {self.batch, self.query, self.key}:
            return False  # beside the head dimension
        if axes != {self.batch}:
            return True  # beside the rows, as a flat projection has them
        if _place(access.index[place : place + 1], group) is not None:
            return None  # folded together with the group: either may be
        ones = self._ones(access, access is chain[0])
        if any(one < place for one in ones):
            return False  # [1, H, ...]
        if _is_projected(access):
            return True
        if chain is self.chains[0] and _place(access.index, group) is not None:
            return True  # [B, H, ...] of queries
        if ones and (not group or access is chain[-1]):  # else put in for the group to repeat
            return True  # [B, 1, ...]
        return None

    def _ones(self, access: Access, is_operand: bool) -> list[int]:
        """The dimensions of size 1 that are not of rows, keys or numbers of a head."""
        ones = [place for place, size in enumerate(meta_of(access.node).shape) if size == 1]
        if is_operand:
            return [one for one in ones if one < len(access.index) - 2]
        seen = set().union(*(position.axes for position in access.index))
        lengths, numbers = {self.query, self.key}, seen - {self.batch, self.query, self.key}
        return ones if seen & lengths and numbers else []


def _place(index: Sequence[Index], atoms: Iterable[Digit]) -> int | None:
    """The dimension that one of these digits runs along."""
    for place, position in enumerate(index):
        digits = [digit for digit, _ in position.terms]
        if any(overlaps(atom, digits) for atom in atoms):
            return place
    return None


def _is_projected(access: Access) -> bool:
    """Whether it is the result of a linear layer, which knows of no heads outside of its last
    dimension."""
    return access.node.target is opaque and call_name(access.node) == "linear"
