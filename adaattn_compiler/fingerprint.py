"""Fingerprints: short names for a model's weights and for data, the same in every process."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

# Elements of one tensor that are looked at: enough that a step of training, another seed or another
# dtype shows, few enough that a model of many gigabytes takes seconds.
_SAMPLED = 4096
_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_fingerprint(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """32 hexadecimal digits for `model.named_parameters()`.

    Of each tensor the name, the dtype, the shape, and the bits of at most 4096 elements at fixed
    positions, one in each of as many stretches: a change of the others is not seen. Device,
    strides, the order of the parameters and the names that wrappers add (`_orig_mod.`) make no
    difference.
    """
    digests = sorted(
        f"{_unwrapped(name)!r} {_sampled_digest(name, tensor)}" for name, tensor in named_parameters
    )
    return _named("weights", digests)


def data_fingerprint(batches: Iterable[Any]) -> str:
    """32 hexadecimal digits for data: tensors, numbers, texts and None, in nested mappings and
    sequences. Whole tensors are read; device, strides and the order of names make no difference.

    TypeError for anything else inside.
    """
    return _named("data", [_digest(batch) for batch in batches])


def _named(kind: str, digests: Sequence[str]) -> str:
    # The number is that of this way of making them.
    text = "\n".join([f"adaattn {kind} 1", *digests])
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _sampled_digest(name: str, tensor: torch.Tensor) -> str:
    if tensor.is_meta:
        raise ValueError(f"parameter {name!r} has no data (device meta): load the weights first")
    if hasattr(tensor, "__tensor_flatten__"):  # quantized weights, which are several tensors
        inner, _ = tensor.__tensor_flatten__()
        return " ".join(f"{part} {_sampled_digest(name, getattr(tensor, part))}" for part in inner)
    return _tensor_digest(tensor, _sampled(_integers(tensor)))


def _sampled(tensor: torch.Tensor) -> torch.Tensor:
    """The elements at the fixed positions. Indexed by axis: flattening could copy it all."""
    count = tensor.numel()
    if count <= _SAMPLED:
        return tensor.reshape(-1)
    where = torch.tensor(_positions(count), device=tensor.device)
    return tensor[torch.unravel_index(where, tensor.shape)]


@functools.lru_cache(maxsize=64)
def _positions(count: int) -> tuple[int, ...]:
    """One in each of as many stretches, by a multiplicative hash: not in step with rows."""
    starts = [i * count // _SAMPLED for i in range(_SAMPLED + 1)]
    return tuple(
        start + (i * 2654435761 + 40503) % 2**32 % (end - start)
        for i, (start, end) in enumerate(itertools.pairwise(starts))
    )


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """Its bits as integers, whatever the dtype; nothing is copied unless it is lazily negated."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.view(_AS_INTEGERS[plain.element_size()])


def _tensor_digest(tensor: torch.Tensor, elements: torch.Tensor) -> str:
    raw = elements.cpu().contiguous().numpy().tobytes()
    start = f"{tensor.dtype} {tuple(tensor.shape)} "
    return start + hashlib.blake2b(raw, digest_size=16).hexdigest()


def _digest(value: Any) -> str:
    """A text for a nested value, different for different ones."""
    if isinstance(value, torch.Tensor):
        return f"tensor {_tensor_digest(value, _integers(value))}"
    if isinstance(value, Mapping):
        members = sorted(f"{name!r}: {_digest(each)}" for name, each in value.items())
        return f"{{{', '.join(members)}}}"
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if isinstance(value, Sequence):
        return f"[{', '.join(_digest(each) for each in value)}]"
    raise TypeError(
        f"data holds a {type(value).__name__}, which has no fingerprint; it must hold tensors, "
        "numbers, texts and None, in mappings and sequences"
    )
