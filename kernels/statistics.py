"""What each head's attention is like, from some of its rows, computed exactly.

A sample of R query rows, one of each of R equal parts, takes R/M of the scores; of them everything
here is computed in one pass, tile by tile (scored_rows.py), whatever the spec's mask, score, sink
and groups. Nothing M x N exists.

The distribution of a row is over the keys that it attends to and the sink, if there is one:

    p_k = exp(score_k) / Z,   Z = sum_k exp(score_k) + exp(sink),   entropy = -sum p log p
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from adaattn_compiler.decision import BLOCK
from adaattn_compiler.kernels.scored_rows import (
    Attended,
    ScoredRows,
    exponentials,
    sampled_rows,
    scored_rows,
)
from adaattn_compiler.spec import AttentionSpec

# Scores of each row that quantiles are taken of.
_OF_A_ROW = 32
SCORE_QUANTILES = (0.01, 0.5, 0.99)
ENTROPY_QUANTILES = (0.1, 0.5, 0.9)
_TOP_SHARE = 8  # one of so many blocks, rounded up


@dataclass(frozen=True)
class HeadStatistics:
    """Tensors [B,H], or [B,H,n]; float32, float64 where the inputs are; NaN where those are.

    q_max, k_max, v_max: largest magnitude of the whole tensor, those of a key head for each query
    head of its group. All others are of the sampled rows that attend to any key, 0 where none does:

    score_max: largest magnitude of a score (as the spec has it, natural units).
    score_quantiles: of log2 |score| over attended keys, each row weighing the same, by
        SCORE_QUANTILES; a score of 0 counts as the smallest normal float, NaN is left out.
    entropy: mean over rows, nats; n keys alike give log n. entropy_variance: its variance over
        rows. entropy_quantiles: of rows, by ENTROPY_QUANTILES.
    entropy_normalized: mean of entropy / log(attended keys, and the sink); 0 for a single one.
    saturation: mean of the largest weight of a key.
    top_block_mass: mean share of the keys' mass in the heaviest eighth (rounded up) of a row's
        attended blocks of 64 keys. Chosen row by row: what 64 rows would share holds less.
    local_entropy: nats, of the keys at most 63 away from the row's position (row + N - M),
        renormalized; over the rows that attend to any of them.
    global_entropy: nats, of the masses of the blocks of 64 keys, renormalized.
    """

    q_max: torch.Tensor
    k_max: torch.Tensor
    v_max: torch.Tensor
    score_max: torch.Tensor
    score_quantiles: torch.Tensor
    entropy: torch.Tensor
    entropy_variance: torch.Tensor
    entropy_quantiles: torch.Tensor
    entropy_normalized: torch.Tensor
    saturation: torch.Tensor
    top_block_mass: torch.Tensor
    local_entropy: torch.Tensor
    global_entropy: torch.Tensor

    @property
    def importance(self) -> torch.Tensor:
        """[B,H]: 1 - entropy_normalized: 0 for a head that averages, 1 for one that chooses."""
        return 1 - self.entropy_normalized

    def by_head(self) -> dict[str, list[float]]:
        """[H] by name: maxima over the batch, else means; quantiles by "entropy_0.5" and so on."""
        found: dict[str, list[float]] = {}
        for field in fields(self):
            tensor: torch.Tensor = getattr(self, field.name)
            of_heads = tensor.amax(0) if field.name.endswith("_max") else tensor.mean(0)
            if tensor.dim() == 2:
                found[field.name] = of_heads.tolist()
                continue
            levels = SCORE_QUANTILES if field.name == "score_quantiles" else ENTROPY_QUANTILES
            name = field.name.removesuffix("_quantiles")
            for level, values in zip(levels, of_heads.unbind(-1), strict=True):
                found[f"{name}_{level}"] = values.tolist()
        return found


def head_statistics(
    q_BHMD: torch.Tensor,
    k_BGND: torch.Tensor,
    v_BGNE: torch.Tensor,
    operands: Sequence[torch.Tensor],
    params: Sequence[int],
    spec: AttentionSpec,
    *,
    rows: int = 32,
    turn: int = 0,
) -> HeadStatistics:
    """Of `rows` rows of each head (all, where there are no more); others with each turn.

    ValueError where there is no row or no key.
    """
    if rows < 1 or 0 in (q_BHMD.shape[2], k_BGND.shape[2]):
        raise ValueError(f"{rows} rows of {tuple(q_BHMD.shape)} by {tuple(k_BGND.shape)}")
    at = sampled_rows(q_BHMD.shape[2], rows, turn)
    measures: dict[str, torch.Tensor] = {}
    for tile, scored in scored_rows(q_BHMD, k_BGND, operands, params, spec, at):
        for name, found in _measures(scored, turn).items():
            if name not in measures:
                shape = (*q_BHMD.shape[:2], len(at), *found.shape[3:])
                measures[name] = found.new_empty(shape)
            measures[name][tile] = found
    k_max, v_max = (_magnitude(tensor, spec.group) for tensor in (k_BGND, v_BGNE))
    return _of_heads(measures, (_magnitude(q_BHMD, 1), k_max, v_max))


# -- of each row -----------------------------------------------------------------------------------


def _measures(scored: ScoredRows, turn: int) -> dict[str, torch.Tensor]:
    """[b,h,r] by name, to be read where "counted"; "sample": [b,h,r,_OF_A_ROW]."""
    scores, attended = scored.scores, scored.attended
    shifted, weights, *per_row = exponentials(scores, scored.sink)
    rest, most, top = (values[..., 0] for values in per_row)
    blocks = _in_blocks(weights).sum(-1)
    keys = blocks.sum(-1)
    total = keys + rest
    # -sum p log p with p = weight / total; that of the sink is entr(rest).
    sums = shifted.mul_(weights).sum(-1) - torch.special.entr(rest)
    entropy = total.log() - sums / total
    count = blocks.new_tensor(scores.shape[-1]) if attended is None else attended.counts[..., -1]
    choices = (count + (scored.sink is not None)).to(scores)
    local_entropy, counted_locally = _local_entropy(scores, scored.diagonal)
    found = {
        "counted": count > 0,
        "score_max": torch.maximum(most, -_least_score(scored)),
        "entropy": entropy,
        "entropy_normalized": torch.where(choices > 1, entropy / choices.log(), 0.0),
        "saturation": top / total,
        "top_block_mass": _top_block_mass(blocks, keys, attended),
        "global_entropy": torch.special.entr(blocks / keys[..., None]).sum(-1),
        "local_entropy": local_entropy,
        "counted_locally": counted_locally,
    }
    found = {name: values.expand(scores.shape[:3]) for name, values in found.items()}
    return {**found, "sample": _sample(scored, turn)}


def _in_blocks(weights: torch.Tensor) -> torch.Tensor:
    """[..., N] as [..., blocks, BLOCK], zeros at the end."""
    missing = -weights.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    return padded.reshape(*padded.shape[:-1], -1, BLOCK)


def _least_score(scored: ScoredRows) -> torch.Tensor:
    attended = scored.attended
    finite = scored.finite if attended is None else scored.finite - attended.drop
    return finite.amin(-1)


def _top_block_mass(
    blocks: torch.Tensor, keys: torch.Tensor, attended: Attended | None
) -> torch.Tensor:
    count = torch.as_tensor(blocks.shape[-1], device=blocks.device)
    if attended is not None:  # blocks over which the number of attended keys grows
        columns = attended.counts.shape[-1]
        ends = torch.arange(BLOCK, columns + BLOCK, BLOCK, device=blocks.device)
        so_far = attended.counts[..., ends.clamp(max=columns) - 1]
        count = (so_far.diff(dim=-1, prepend=torch.zeros_like(so_far[..., :1])) > 0).sum(-1)
    last = ((count + _TOP_SHARE - 1) // _TOP_SHARE - 1).clamp(min=0)
    sums = blocks.sort(-1, descending=True).values.cumsum(-1)
    return sums.gather(-1, last.expand(keys.shape)[..., None])[..., 0] / keys


def _local_entropy(
    scores: torch.Tensor, diagonal: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats, whether the row attends to a key so near)."""
    steps = torch.arange(1 - BLOCK, BLOCK, device=scores.device)
    places = diagonal[:, None] + steps
    inside = (places >= 0) & (places < scores.shape[-1])
    places = places.clamp(0, scores.shape[-1] - 1).expand(*scores.shape[:2], -1, -1)
    near = scores.gather(-1, places).masked_fill(~inside, float("-inf"))
    shifted, weights, *_ = exponentials(near)
    total = weights.sum(-1)
    entropy = total.log() - torch.linalg.vecdot(shifted, weights) / total
    return entropy, (near != float("-inf")).any(-1)


def _sample(scored: ScoredRows, turn: int) -> torch.Tensor:
    """Scores of each row, one of each of _OF_A_ROW equal parts of the keys that it attends to."""
    scores = scored.finite
    share = ((scored.diagonal + turn) * 0.6180339887498949) % 1.0
    part = (torch.arange(_OF_A_ROW, device=scores.device) + share[:, None].double()) / _OF_A_ROW
    if scored.attended is None:
        places = (part * scores.shape[-1]).long()
    else:  # the place of the j-th attended key, for some j
        counts = scored.attended.counts
        wanted = (part * counts[..., -1:]).int() + 1
        counts = counts.expand(*wanted.shape[:-1], -1).contiguous()
        places = torch.searchsorted(counts, wanted).clamp_(max=scores.shape[-1] - 1)
    return scores.gather(-1, places.expand(*scores.shape[:3], -1))


# -- of each head ----------------------------------------------------------------------------------


def _magnitude(tensor: torch.Tensor, group: int) -> torch.Tensor:
    """[B,H] of [B,heads,length,dim]; least and most by themselves, as abs would make a copy."""
    most = torch.maximum(tensor.amax((-2, -1)), -tensor.amin((-2, -1)))
    return most.to(torch.promote_types(tensor.dtype, torch.float32)).repeat_interleave(group, -1)


def _of_heads(
    rows: dict[str, torch.Tensor], magnitudes: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> HeadStatistics:
    counted, counted_locally = rows["counted"], rows["counted_locally"]
    entropy = _mean(rows["entropy"], counted)
    names = ("entropy_normalized", "saturation", "top_block_mass", "global_entropy")
    logarithms = rows["sample"].abs().clamp(min=torch.finfo(entropy.dtype).tiny).log2()
    every = counted[..., None].expand(logarithms.shape)
    return HeadStatistics(
        *magnitudes,
        score_max=torch.where(counted, rows["score_max"], 0.0).amax(-1),
        score_quantiles=_quantiles(logarithms.flatten(2), every.flatten(2), SCORE_QUANTILES),
        entropy=entropy,
        entropy_variance=_mean((rows["entropy"] - entropy[..., None]).square(), counted),
        entropy_quantiles=_quantiles(rows["entropy"], counted, ENTROPY_QUANTILES),
        local_entropy=_mean(rows["local_entropy"], counted_locally),
        **{name: _mean(rows[name], counted) for name in names},
    )


def _mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[B,H] of [B,H,R]."""
    return torch.where(counted, values, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)


def _quantiles(
    values: torch.Tensor, counted: torch.Tensor, levels: Sequence[float]
) -> torch.Tensor:
    """[B,H,levels] of [B,H,n], each the nearest of the values."""
    ordered = torch.where(counted, values, float("nan")).sort(-1).values  # NaN comes last
    count = (~ordered.isnan()).sum(-1, keepdim=True)
    places = ((count - 1) * values.new_tensor(levels)).round().long().clamp(min=0)
    return torch.where(counted.any(-1, keepdim=True), ordered.gather(-1, places), 0.0)


def compensated_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last axis with an error as if added in twice the precision, then rounded.

    Neumaier's compensation (1974), by halves instead of one by one: what each addition rounds off,
    a + b - (a + b) exactly (Knuth's TwoSum), is kept and added up beside the sums.
    """
    lost = torch.zeros_like(values)
    while (count := values.shape[-1]) > 1:
        if count % 2:
            values, lost = (torch.nn.functional.pad(x, (0, 1)) for x in (values, lost))
        (x, y), (of_x, of_y) = values.chunk(2, -1), lost.chunk(2, -1)
        values = x + y
        back = values - x
        lost = of_x + of_y + ((x - (values - back)) + (y - back))
    return (values + lost).sum(-1)
