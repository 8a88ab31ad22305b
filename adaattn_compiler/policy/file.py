"""JSON text and files: read with every fault as a PolicyError, written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from adaattn_compiler.policy.composites import Repeated
from adaattn_compiler.policy.error import PolicyError

# A hundred layers of a hundred heads take a tenth of this; what is larger is no policy.
_LARGEST = 64 << 20
_WIDTH = 100


def parsed(text: str) -> Any:
    """The JSON value of a text; PolicyError, with the place, where it is none."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        what = "is empty" if not text.strip() else f"is not JSON: {error.msg}, at {place}"
        raise PolicyError((), f"{what}; it must be one JSON object") from None
    except RecursionError:
        raise PolicyError((), "is nested too deeply; a policy has ten levels") from None
    except PolicyError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise PolicyError((), f"is not JSON that can be read: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; one that gives a name twice as `Repeated`, to be refused where it lies."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            break
        seen.add(name)
    return Repeated(name)


def _refuse_constant(name: str) -> Any:
    raise PolicyError((), f"has the number {name}, which is not JSON; numbers must be finite")


def written(value: Any, indent: str = "") -> str:
    """A JSON value as text: what fits in a line stands in one."""
    line = json.dumps(value, allow_nan=False)
    if not isinstance(value, (dict, list)) or len(indent) + len(line) <= _WIDTH:
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        members = [f"{json.dumps(name)}: {written(each, inner)}" for name, each in value.items()]
    else:
        members = [written(each, inner) for each in value]
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    lines = ",\n".join(inner + member for member in members)
    return f"{opening}\n{lines}\n{indent}{closing}"


def read_text(path: Path) -> str:
    """The text of a file; PolicyError where there is none that a policy could be in."""
    try:
        # Not a pipe or a device, which might never end.
        if path.exists() and not path.is_file():
            raise PolicyError((), "is not a file; give the path of a policy's JSON file")
        with path.open("rb") as file:
            raw = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, PolicyError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise PolicyError((), f"cannot be read: {reason}") from None
    if len(raw) > _LARGEST:
        raise PolicyError((), f"is larger than {_LARGEST >> 20} MiB; no policy is")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PolicyError((), f"is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: who reads it meanwhile, or after a crash, has the old or the new."""
    target = Path(os.path.realpath(path))  # a link is followed, not replaced
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a loss of power, too; not all systems can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
