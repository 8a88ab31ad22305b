"""What a user can set: `torch.compile(model, backend="adaattn", options={...})`.

Keys that are ours are fields of `Options`; all others are Inductor's and are handed on to it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaattn_compiler.policy import LARGEST_BUDGET, Policy, PolicyError
from adaattn_compiler.said import warn_once

_KNOWN_KERNELS = ("sdpa", "strips", "flex", "cpp", "triton", "cudnn", "flash", "efficient")


@dataclass(frozen=True)
class Options:
    """Settings of one compilation, frozen once made.

    Given as `torch.compile(model, backend="adaattn", options={"measure": False})`, or in the
    environment: `ADAATTN_MEASURE=0`, and so on, each name in capitals (0, 1, true or false for a
    switch, names with commas between them for kernels; an empty value counts as none). What is
    given wins over the environment, the environment over the defaults.

    enabled (True): False hands every graph to Inductor as it is.
    validate (True): run each matched slice against its replacement on small random inputs.
    measure (True): let kernels compete on this machine where an estimate does not settle it.
    kernels (all): names of those that may be chosen, as a list or as "sdpa,strips".
    cache_dir (~/.cache/adaattn): folder in which measurements are kept.
    dump_dir (None): folder for each graph before and after, as text.
    analysis_seconds (120): the longest that finding and checking the attentions of one graph may
    take (choosing kernels not counted); after that Inductor gets the graph as it is.
    policy (None): a `Policy`, or the path of its file; without one everything is exact.
    audit_rows (2): how many query rows each call of a site that has a policy computes exactly, too,
    and compares: a head that is too far off there is exact in that call; 0 for none.
    mode (None): "online": without a policy, each site measures in its first calls what its heads
    may leave out, and then runs by that, guarded and audited.
    online_calls (8): how many calls of a site that takes; they are exact, and slower.
    online_budget (0.01): the relative error (L2) that a head's output may have by that.
    heuristic (None): "seed": in that mode, what a head tries is proposed by fixed thresholds.
    """

    enabled: bool = True
    validate: bool = True
    measure: bool = True
    kernels: tuple[str, ...] = _KNOWN_KERNELS
    cache_dir: Path = Path("~/.cache/adaattn")
    dump_dir: Path | None = None
    analysis_seconds: float = 120.0
    policy: Policy | None = None
    audit_rows: int = 2
    mode: str | None = None
    online_calls: int = 8
    online_budget: float = 0.01
    heuristic: str | None = None

    @staticmethod
    def names() -> tuple[str, ...]:
        """The keys that are ours."""
        return tuple(field.name for field in dataclasses.fields(Options))


_MOST_ROWS, _MOST_CALLS = 64, 1 << 16
_CHOICES = {"mode": ("online",), "heuristic": ("seed",)}
_NUMBERS = {
    "analysis_seconds": "a number of seconds above 0",
    "online_budget": f"a relative error above 0, at most {LARGEST_BUDGET:g} (write 5% as 0.05)",
}
_COUNTS = {
    "audit_rows": (0, _MOST_ROWS, "a number of rows"),
    "online_calls": (1, _MOST_CALLS, "a number of calls"),
}
_NEEDS = {
    "online_calls": "mode='online'",
    "online_budget": "mode='online' (calibrate's argument is budget)",
    "heuristic": "mode='online' (calibrate has an argument of that name)",
    "audit_rows": "a policy or mode='online'",
}
_SWITCHES = ("enabled", "validate", "measure")
_PREFIX = "ADAATTN_"
_BENCHMARKS_PREFIX = "ADAATTN_BENCH_"


def parse_options(given: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """(our options, those for Inductor), from what the user gave and the environment.

    Raises ValueError naming the key, the value and what is valid.
    """
    environment = _from_environment(given)
    ours = dict(environment)
    inductors: dict[str, Any] = {}
    for key, value in (given or {}).items():
        if not isinstance(key, str):
            raise ValueError(f"option {key!r}: the name of an option must be a string")
        if key in Options.names():
            try:
                is_file = key == "policy" and isinstance(value, (str, os.PathLike))
                ours[key] = _kept(value, given) if is_file else _checked(key, value)
            except ValueError as error:
                raise ValueError(f"option {key}={value!r}: {error}") from None
        elif key.replace("-", "_") in _inductors_names():
            inductors[key] = value
        else:
            raise ValueError(
                f"unknown option {key!r}{_nearest(key, (*Options.names(), *_inductors_names()))}: "
                f"AdaAttn's are {', '.join(Options.names())}; others must be options of Inductor "
                "(torch._inductor.list_options() lists them)"
            )
    options = Options(**ours)
    _check_together(options)
    _check_effects(options, given or {}, environment)
    return options, inductors


def _check_together(options: Options) -> None:
    if options.mode is not None and options.policy is not None:
        raise ValueError(
            f"options policy and mode={options.mode!r}: a policy has decided already; leave one out"
        )


def _check_effects(
    options: Options, given: Mapping[str, Any], environment: Mapping[str, Any]
) -> None:
    """ValueError for an option that has no effect beside the others. In the environment, which is
    for other compilations, too, it is warned of."""
    for name in _idle(options):
        what = f"it does nothing without {_NEEDS[name]}: set that, too, or leave this out"
        if given.get(name) is not None:
            raise ValueError(f"option {name}={given[name]!r}: {what}")
        if environment.get(name) is not None:
            warn_once(f"{_PREFIX}{name.upper()} in the environment: {what}")


def _idle(options: Options) -> tuple[str, ...]:
    """The options that say nothing beside what `mode` and `policy` are."""
    if options.mode is not None:
        return ()
    return tuple(name for name in _NEEDS if options.policy is None or name != "audit_rows")


def _inductors_names() -> list[str]:
    from torch._inductor import list_options

    return list_options()


def _nearest(name: str, known: Iterable[str]) -> str:
    """A suggestion for a name that is not known, where one is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _from_environment(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The environment's settings; the only place that reads it. given: the options beside it."""
    variables = {_PREFIX + name.upper(): name for name in Options.names()}
    found: dict[str, Any] = {}
    for variable, name in variables.items():
        text = os.environ.get(variable)
        if text:
            try:
                found[name] = (
                    _kept(text, given) if name == "policy" else _checked(name, _parsed(name, text))
                )
            except ValueError as error:
                raise ValueError(f"{variable}={text!r} in the environment: {error}") from None
    ours = [variable for variable in os.environ if variable.startswith(_PREFIX)]
    for variable in ours:
        if variable not in variables and not variable.startswith(_BENCHMARKS_PREFIX):
            warn_once(
                f"{variable} in the environment is not known{_nearest(variable, variables)} and "
                f"does nothing: known are {', '.join(variables)}"
            )
    return found


def _parsed(name: str, text: str) -> Any:
    """The value that a text of the environment stands for."""
    if name in _SWITCHES:
        words = {"1": True, "true": True, "0": False, "false": False}
        if text.lower() not in words:
            raise ValueError("it must be 1 or true, 0 or false")
        return words[text.lower()]
    if name in _COUNTS and text.isdecimal():
        return int(text)
    if name in _NUMBERS:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"it must be {_NUMBERS[name]}") from None
    return text


def _checked(key: str, value: Any) -> Any:
    """The value in the field's own type; ValueError, with what is valid, where it has another."""
    if key in _SWITCHES:
        if not isinstance(value, bool):
            raise ValueError("it must be True or False")
        return value
    if key == "kernels":
        return _checked_kernels(value)
    if key in _NUMBERS:
        return _checked_number(key, value)
    if key in _COUNTS:
        return _checked_count(value, *_COUNTS[key])
    if key in _CHOICES:
        return _checked_choice(value, _CHOICES[key])
    if value is None and key in ("dump_dir", "policy"):
        return None
    if isinstance(value, Policy) and key == "policy":
        return value
    if not isinstance(value, (str, os.PathLike)):
        raise ValueError("it must be a path" + (", or a Policy" if key == "policy" else ""))
    path = Path(value).expanduser()
    return _loaded(path) if key == "policy" else path


class _Given:
    """Options as one call of torch.compile hands them over with each of its graphs: the same
    mapping each time. None is given by all calls that have no options: nothing tells them apart."""

    def __init__(self, options: Mapping[str, Any] | None) -> None:
        self._options = options  # kept alive, so that no other takes its place in memory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Given) and self._options is other._options

    def __hash__(self) -> int:
        return id(self._options)


def _kept(value: str | os.PathLike[str], given: Mapping[str, Any] | None) -> Policy:
    """The policy of a file, named in options or in the environment beside them, as it was when the
    first graph was compiled with these options: a file that changes between two graphs must not
    make a model of two policies. That it has is said."""
    path = Path(value).expanduser()
    first = _first_read(path, _Given(given))
    try:
        changed = Policy.load(path).key() != first.key()
    except PolicyError:
        changed = True
    if changed:
        warn_once(
            f"policy {path} has changed since a first graph was compiled with these options: "
            f"further graphs go by what it was (policy {first.key()}); call torch.compile again, "
            "with options of its own, for what it is now"
        )
    return first


@functools.lru_cache(maxsize=64)
def _first_read(path: Path, given: _Given) -> Policy:
    return _loaded(path)


def _loaded(path: Path) -> Policy:
    """A refusal does not name the file: the message that it becomes a part of does."""
    try:
        return Policy.load(path)
    except PolicyError as error:
        raise ValueError(str(PolicyError(error.path, error.reason))) from None


def _checked_number(key: str, value: Any) -> float:
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not value > 0 or (key == "online_budget" and value > LARGEST_BUDGET):
        raise ValueError(f"it must be {_NUMBERS[key]}")
    return float(value)


def _checked_count(value: Any, least: int, most: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"it must be {what} from {least} to {most}")
    return value


def _checked_choice(value: Any, known: tuple[str, ...]) -> str | None:
    if value is not None and value not in known:
        raise ValueError(f"it must be {' or '.join(map(repr, known))}, or None")
    return None if value is None else str(value)


def _checked_kernels(value: Any) -> tuple[str, ...]:
    """Names of kernels, from a list or from one text with commas between them."""
    names = value
    if isinstance(value, str):
        names = [name.strip() for name in value.split(",") if name.strip()]
    known = f"known are {', '.join(_KNOWN_KERNELS)}"
    if not isinstance(names, (tuple, list)) or not names:
        raise ValueError(f"it must be a list of kernels, or their names with commas, {known}")
    for name in names:
        if name not in _KNOWN_KERNELS:
            raise ValueError(f"unknown kernel {name!r}, {known}")
    return tuple(names)
