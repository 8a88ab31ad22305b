"""What each head's attention is like, from some of its rows, computed exactly.

A sample of R query rows, one of each of R equal parts, takes R/M of the scores; of them everything
here is computed in one pass, tile by tile (scored_rows.py), whatever the spec's mask, score, sink
and groups. Nothing M x N exists.

The distribution of a row is over the keys that it attends to and the sink, if there is one:

    p_k = exp(score_k) / Z,   Z = sum_k exp(score_k) + exp(sink),   entropy = -sum p log p
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from adaattn_compiler.decision import BLOCK
from adaattn_compiler.kernels.scored_rows import (
    ScoredRows,
    exponentials,
    sampled_ranks,
    sampled_rows,
    scored_rows,
)
from adaattn_compiler.kernels.triton.launch_statistics import row_statistics, statistics_refusal
from adaattn_compiler.spec import AttentionSpec

log = logging.getLogger("adaattn_compiler")

SCORE_QUANTILES = (0.01, 0.5, 0.99)
ENTROPY_QUANTILES = (0.1, 0.5, 0.9)
_TOP_SHARE = 8  # one of so many blocks, rounded up
# Elements that stay in a processor's cache.
_CACHED = 2**18


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
    given = (q_BHMD, k_BGND, operands, params, spec)
    refused = statistics_refusal(*given)
    if refused is None:
        kept = row_statistics(*given, rows=rows, turn=turn)
        return statistics_of(kept, (q_BHMD, k_BGND, v_BGNE), spec)
    if q_BHMD.device.type == "cuda":
        log.debug("statistics of heads by torch functions: %s", refused)
    kept = _kept_by_tiles(given, sampled_rows(q_BHMD.shape[2], rows, turn), turn)
    return statistics_of(kept, (q_BHMD, k_BGND, v_BGNE), spec)


def statistics_of(
    kept: dict[str, torch.Tensor],
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    spec: AttentionSpec,
) -> HeadStatistics:
    """What follows from what was kept of rows (`_kept`), by whatever means, and from q, k, v."""
    q, k, v = qkv
    measures = _measures(kept, spec.sink is not None)
    magnitudes = (_magnitude(q, 1), _magnitude(k, spec.group), _magnitude(v, spec.group))
    return _of_heads(measures, magnitudes)


# -- of each tile: what takes all scores of a row --------------------------------------------------

_Given = tuple[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], Sequence[int], AttentionSpec]


def _kept_by_tiles(given: _Given, at: Sequence[int], turn: int) -> dict[str, torch.Tensor]:
    """`_kept` of all rows, [B,H,R] or [B,H,R,n] each."""
    q, k, *_ = given
    kept: dict[str, torch.Tensor] = {}
    for tile, scored in scored_rows(*given, at):
        for name, found in _kept(scored, turn).items():
            if name not in kept:
                width = (-(-k.shape[2] // BLOCK),) if name == "blocks" else found.shape[3:]
                kept[name] = found.new_zeros(*q.shape[:2], len(at), *width)
            # Blocks of keys that no row of the tile attends to may be missing.
            whole = kept[name] if name != "blocks" else kept[name][..., : found.shape[-1]]
            whole[tile] = found
    return kept


def _kept(scored: ScoredRows, turn: int) -> dict[str, torch.Tensor]:
    """By name, each to be broadcast to [b,h,r], or [b,h,r,n]; what is left to do costs little.

    count: attended keys; present: blocks with any. most, least: attended scores. rest, top:
    weights of the sink and of the most likely key, beside the larger of which all are; products:
    the sum of weights and their logarithms. blocks: sums of weights by BLOCK keys. near: scores of
    keys at most BLOCK - 1 away from the row's position, -inf where there is none. sample: scores.
    """
    finite, attended = scored.finite, scored.attended
    count, present = _counts(scored)
    sample = _sample(scored, turn)
    # Two tensors as large as the tile, written over and over: making more takes as long as using.
    scores = finite.clone() if attended is None else finite - attended.drop
    least = scores.amin(-1)
    if attended is not None:
        torch.add(finite, attended.drop, out=scores)
    near = _near(scores, scored.diagonal)
    shifted, weights, *per_row = exponentials(scores, scored.sink, into=finite)
    rest, most, top = (values[..., 0] for values in per_row)
    return {
        "count": count,
        "present": present,
        "most": most,
        "least": least,
        "rest": rest,
        "top": top,
        "products": torch.linalg.vecdot(shifted, weights),
        "blocks": _in_blocks(weights).sum(-1),
        "near": near,
        "sample": sample,
    }


def _counts(scored: ScoredRows) -> tuple[torch.Tensor, torch.Tensor]:
    """How many keys are attended to, and in how many blocks; int32."""
    columns = scored.finite.shape[-1]
    if scored.attended is None:
        of_all = (columns, -(-columns // BLOCK))
        count, present = torch.tensor(of_all, dtype=torch.int32, device=scored.finite.device)
        return count, present
    counts = scored.attended.counts
    # Blocks over which the number of attended keys grows.
    ends = torch.arange(BLOCK, columns + BLOCK, BLOCK, device=counts.device)
    so_far = counts[..., ends.clamp(max=columns) - 1]
    grows = so_far.diff(dim=-1, prepend=torch.zeros_like(so_far[..., :1])) > 0
    return counts[..., -1], grows.sum(-1, dtype=torch.int32)


def _in_blocks(weights: torch.Tensor) -> torch.Tensor:
    """[..., N] as [..., blocks, BLOCK], zeros at the end."""
    missing = -weights.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(weights, (0, missing)) if missing else weights
    return padded.reshape(*padded.shape[:-1], -1, BLOCK)


def _near(scores: torch.Tensor, diagonal: torch.Tensor) -> torch.Tensor:
    steps = torch.arange(1 - BLOCK, BLOCK, device=scores.device)
    places = diagonal[:, None] + steps
    outside = (places < 0) | (places >= scores.shape[-1])
    places = places.clamp(0, scores.shape[-1] - 1).expand(*scores.shape[:2], -1, -1)
    return scores.gather(-1, places).masked_fill_(outside, float("-inf"))


def _sample(scored: ScoredRows, turn: int) -> torch.Tensor:
    """Scores of each row, one of each of OF_A_ROW equal parts of the keys that it attends to."""
    scores = scored.finite
    if scored.attended is None:
        every = torch.full((), scores.shape[-1], dtype=torch.int32, device=scores.device)
        places = sampled_ranks(scored.diagonal, turn, every).long() - 1
    else:  # the place of the j-th attended key, for some j
        counts = scored.attended.counts
        wanted = sampled_ranks(scored.diagonal, turn, counts[..., -1:])
        counts = counts.expand(*wanted.shape[:-1], -1).contiguous()
        places = torch.searchsorted(counts, wanted).clamp_(max=scores.shape[-1] - 1)
    return scores.gather(-1, places.expand(*scores.shape[:3], -1))


# -- of each row -----------------------------------------------------------------------------------


def _measures(kept: dict[str, torch.Tensor], has_sink: bool) -> dict[str, torch.Tensor]:
    """[B,H,R] by name, to be read where "counted"; "sample" [B,H,R,OF_A_ROW] as it is."""
    blocks, rest = kept["blocks"], kept["rest"]
    keys = blocks.sum(-1)
    total = keys + rest
    # -sum p log p with p = weight / total; that of the sink is entr(rest).
    entropy = total.log() - (kept["products"] - torch.special.entr(rest)) / total
    choices = (kept["count"] + has_sink).to(entropy)
    return {
        "counted": kept["count"] > 0,
        "score_max": torch.maximum(kept["most"], -kept["least"]),
        "entropy": entropy,
        "entropy_normalized": torch.where(choices > 1, entropy / choices.log(), 0.0),
        "saturation": kept["top"] / total,
        "top_block_mass": _top_block_mass(blocks, keys, kept["present"]),
        "global_entropy": torch.special.entr(blocks / keys[..., None]).sum(-1),
        "local_entropy": _local_entropy(kept["near"]),
        "counted_locally": (kept["near"] != float("-inf")).any(-1),
        "sample": kept["sample"],
    }


def _top_block_mass(
    blocks: torch.Tensor, keys: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    last = ((present.long() + _TOP_SHARE - 1) // _TOP_SHARE - 1).clamp(min=0)
    most = -(-blocks.shape[-1] // _TOP_SHARE)
    sums = blocks.topk(most, -1).values.cumsum(-1)
    return sums.gather(-1, last[..., None])[..., 0] / keys


def _local_entropy(near: torch.Tensor) -> torch.Tensor:
    shifted, weights, *_ = exponentials(near)
    total = weights.sum(-1)
    entropy: torch.Tensor = total.log() - torch.linalg.vecdot(shifted, weights) / total
    return entropy


# -- of each head ----------------------------------------------------------------------------------


def _magnitude(tensor: torch.Tensor, group: int) -> torch.Tensor:
    """[B,H] of [B,heads,length,dim]; least and most by themselves, as abs would make a copy."""
    rows = tensor.shape[2]
    if tensor.device.type == "cpu":  # so few that the second reading is of the processor's cache
        rows = max(_CACHED * rows // max(tensor.numel(), 1), 1)
    parts = tensor.split(rows, 2)
    ends = [(part.amax(2), part.amin(2)) for part in parts]
    most, least = (torch.stack(each) for each in zip(*ends, strict=True))
    most, least = most.amax((0, -1)), least.amin((0, -1))
    found = torch.maximum(most, -least)
    return found.to(torch.promote_types(tensor.dtype, torch.float32)).repeat_interleave(group, -1)


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
    last = ((~ordered.isnan()).sum(-1, keepdim=True) - 1).to(values)
    # By numbers: a tensor of levels would have to be copied to a GPU, which waits for it.
    places = torch.cat([last * level for level in levels], -1).round().long().clamp(min=0)
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
