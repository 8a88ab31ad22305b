"""What `adaattn-explain` is told to explain: a model with the arguments of one call.

From the user's own code, from a configuration of transformers, or attention alone.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from adaattn_compiler.kernels.measure import first_line

_RANDOM = (
    "the weights are random (--hf reads the config.json alone), and a policy is for those that it "
    "was calibrated with: name a function that loads them, MODULE:FUNCTION, to see it applied"
)


class Fault(Exception):
    """What is wrong with what the user gave; is_usage: with the command, not with the model."""

    def __init__(self, message: str, *, is_usage: bool = True) -> None:
        super().__init__(message)
        self.is_usage = is_usage


@dataclass(frozen=True)
class Subject:
    """A model and one call of it; options that suit it, unless the user gives others. said: what
    the user should know of it where there is a policy."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    said: str = ""


# -- the user's own code ---------------------------------------------------------------------------


def from_code(name: str, data: str | None, shapes: Sequence[str], train: bool) -> Subject:
    """A model made by "module:function", and the first of its batches, or tensors of shapes."""
    if data is not None and shapes:
        raise Fault("--data and --shape both give the arguments: leave one out")
    random = tuple(map(tensor_of, shapes))
    made = made_by(name)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not callable(model):
        raise Fault(
            f"{name}() returned {type(model).__name__}: a model is wanted, or (model, inputs)"
        )
    if data is not None:
        inputs = _first_batch(data)
    elif random:
        inputs = random
    if inputs is None:
        raise Fault(f"{name} gives no inputs: add --shape 1x1024:int64 or --data module:batches")
    args, kwargs = arguments_of(inputs)
    return Subject(in_mode(model, train), args, kwargs)


def made_by(name: str) -> Any:
    """What the function "module:function" returns."""
    function = named(name)
    if not callable(function) or isinstance(function, torch.nn.Module):
        raise Fault(
            f"{name} is {type(function).__name__}: a function that returns the model is wanted"
        )
    try:
        return function()
    except Exception as error:
        raise Fault(f"{name}() raised {first_line(error)}", is_usage=False) from error


def named(name: str) -> Any:
    """What "module:name" is; modules of the current folder are found, too."""
    module_name, colon, path = name.partition(":")
    if not colon or not module_name or not path:
        raise Fault(f"{name!r}: write it as module:name, such as my_package.models:build")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise Fault(f"{name}: {error}; is it installed, or in this folder?") from error
    except Exception as error:
        raise Fault(
            f"importing {module_name} raised {first_line(error)}", is_usage=False
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise Fault(f"{name}: {module_name} has no {part!r}")
        found = getattr(found, part)
    return found


def _first_batch(name: str) -> Any:
    batches = named(name)
    try:
        batches = batches() if callable(batches) else batches
        return next(iter(batches))
    except StopIteration:
        raise Fault(f"{name} is empty: one batch is wanted") from None
    except Exception as error:
        raise Fault(f"{name} gave no batch: {first_line(error)}", is_usage=False) from error


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a batch: a dictionary, a tuple or a list, or a single argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def tensor_of(text: str) -> torch.Tensor:
    """A random tensor of "2x16x64", or of another type by "2x16:int64"."""
    sizes, colon, name = text.partition(":")
    dtype = dtype_of(name) if colon else torch.float32
    try:
        shape = tuple(int(size) for size in sizes.split("x"))
    except ValueError:
        raise Fault(f"--shape {text!r}: write it as 1x1024 or 1x1024:int64") from None
    if min(shape) < 0:
        raise Fault(f"--shape {text!r}: sizes are not below 0")
    if dtype.is_floating_point:
        return torch.randn(shape).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise Fault(f"no dtype {name!r}: bfloat16, float16, float32, int64, ...")
    return found


def in_mode(model: Any, train: bool) -> Any:
    """The model, in training mode or not; what has no modes as it is."""
    return model.train(train) if isinstance(model, torch.nn.Module) else model


# -- transformers ----------------------------------------------------------------------------------


def from_config(folder: str, batch: int, length: int, dtype: str | None, train: bool) -> Subject:
    """The model of a folder's config.json with random weights, given random token ids."""
    if not (Path(folder) / "config.json").is_file():
        raise Fault(f"--hf {folder!r}: no config.json there; give the folder that has one")
    wanted = None if dtype is None else dtype_of(dtype)
    try:
        import transformers
    except ModuleNotFoundError:
        raise Fault(
            "--hf needs transformers: pip install 'adaattn-compiler[hf]'", is_usage=False
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        config.use_cache = False
        model = _class_of(transformers, config)(config)
    except Exception as error:
        raise Fault(
            f"--hf {folder!r} could not be built: {first_line(error)}", is_usage=False
        ) from error
    model = model.to(wanted or getattr(config, "dtype", None) or torch.float32)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise Fault(
            f"--hf {folder!r}: {config.model_type} takes no token ids; build it by MODULE:FUNCTION"
        )
    ids = torch.randint(vocabulary, (batch, length))
    names = ["input_ids", *(["decoder_input_ids"] if config.is_encoder_decoder else [])]
    return Subject(in_mode(model, train), (), dict.fromkeys(names, ids), said=_RANDOM)


def _class_of(transformers: Any, config: Any) -> Callable[[Any], Any]:
    """The class that the configuration names, else the family's causal language model or model."""
    for name in config.architectures or ():
        if hasattr(transformers, name):
            found: Callable[[Any], Any] = getattr(transformers, name)
            return found
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping
    auto = transformers.AutoModelForCausalLM if known else transformers.AutoModel
    built: Callable[[Any], Any] = auto.from_config
    return built


# -- attention alone -------------------------------------------------------------------------------


def attention(mask: str, sizes: tuple[int, int, int, int, int], dtype: str, train: bool) -> Subject:
    """SDPA on q [B,H,N,D], k and v [B,G,N,D]: "causal", "window=N" (and causal) or "none".

    The tensors are fake: they take no memory, and nothing can be run or measured.
    """
    batch, heads, kv_heads, length, head_dim = sizes
    if heads % kv_heads:
        raise Fault(f"--heads {heads} is no multiple of --kv-heads {kv_heads}")
    floating = dtype_of(dtype)
    if not floating.is_floating_point:
        raise Fault(f"--dtype {dtype}: attention is of floating-point numbers")

    def empty(count: int) -> torch.Tensor:
        return torch.empty(batch, count, length, head_dim, dtype=floating, requires_grad=train)

    with FakeTensorMode():
        args = (empty(heads), empty(kv_heads), empty(kv_heads))
    return Subject(_attention_of(mask), args, options={"measure": False})


def _attention_of(mask: str) -> Callable[..., torch.Tensor]:
    name, _, number = mask.partition("=")
    if mask in ("causal", "none"):

        def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=mask == "causal", enable_gqa=True
            )

        return plain
    if name != "window" or not number.isdecimal() or int(number) == 0:
        raise Fault(f"--attention {mask!r}: causal, none, or window=512 (keys that a query sees)")
    width = int(number)

    def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[2], device=q.device)
        distance = at[:, None] - at
        seen = (distance >= 0) & (distance < width)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    return windowed
