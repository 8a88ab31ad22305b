"""What a user can set: `torch.compile(model, backend="adaattn", options={...})`.

Keys that are ours are fields of `Options`; all others are Inductor's and are handed on to it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Options:
    """Settings of one compilation, frozen once made.

    enabled: False hands every graph to Inductor as it is.
    validate: run each matched slice against its replacement on small random inputs.
    measure: let kernels compete on this machine where a guess does not settle it.
    kernels: names of the kernels that may be chosen.
    cache_dir: folder of what was measured and built.
    dump_dir: folder for the graphs before and after, or None.
    analysis_seconds: the longest that finding and checking the attentions of one graph may take
    (choosing kernels not counted); after that the graph is Inductor's as it is.
    """

    enabled: bool = True
    validate: bool = True
    measure: bool = True
    kernels: tuple[str, ...] = ("sdpa", "strips", "flex")
    cache_dir: Path = Path("~/.cache/adaattn")
    dump_dir: Path | None = None
    analysis_seconds: float = 120.0

    @staticmethod
    def names() -> tuple[str, ...]:
        """The keys that are ours."""
        return tuple(field.name for field in dataclasses.fields(Options))


_KNOWN_KERNELS = ("sdpa", "strips", "flex")


def parse_options(given: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """(our options, those for Inductor), from what the user gave and the environment.

    Raises ValueError naming the key, the value and what is valid.
    """
    ours: dict[str, Any] = _from_environment()
    inductors: dict[str, Any] = {}
    for key, value in (given or {}).items():
        if key in Options.names():
            ours[key] = _checked(key, value)
        elif _is_inductors(key):
            inductors[key] = value
        else:
            raise ValueError(
                f"unknown option {key!r}: AdaAttn's are {', '.join(Options.names())}; others must "
                "be options of Inductor (torch._inductor.list_options() lists them)"
            )
    return Options(**ours), inductors


def _is_inductors(key: str) -> bool:
    from torch._inductor import list_options

    return key.replace("-", "_") in list_options()


def _from_environment() -> dict[str, Any]:
    """The environment's settings; the only place that reads it."""
    found: dict[str, Any] = {}
    for name in Options.names():
        variable = f"ADAATTN_{name.upper()}"
        text = os.environ.get(variable)
        if text:
            try:
                found[name] = _checked(name, _parsed(name, text))
            except ValueError as error:
                raise ValueError(f"{variable}={text!r} in the environment: {error}") from None
    return found


def _parsed(name: str, text: str) -> Any:
    if name in ("enabled", "validate", "measure"):
        words = {"1": True, "true": True, "0": False, "false": False}
        if text.lower() not in words:
            raise ValueError("it must be 0 or 1")
        return words[text.lower()]
    if name == "analysis_seconds":
        return float(text)  # its ValueError names the text
    if name == "kernels":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _checked(key: str, value: Any) -> Any:
    """The value in the field's own type; ValueError where it has another."""
    if key in ("enabled", "validate", "measure"):
        if not isinstance(value, bool):
            raise ValueError(f"option {key}={value!r}: it must be True or False")
        return value
    if key == "kernels":
        names = (value,) if isinstance(value, str) else value
        known = ", ".join(_KNOWN_KERNELS)
        if not isinstance(names, (tuple, list)) or not names:
            raise ValueError(f"option kernels={value!r}: it must name kernels; known are {known}")
        if any(name not in _KNOWN_KERNELS for name in names):
            raise ValueError(f"option kernels={value!r}: known are {known}")
        return tuple(names)
    if key == "analysis_seconds":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"option {key}={value!r}: it must be a number of seconds above 0")
        return float(value)
    if value is None and key == "dump_dir":
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"option {key}={value!r}: it must be a path")
    return Path(value).expanduser()
