"""What a calibration has measured so far, in a file beside the policy that is to be.

The file is replaced as a whole after each sample, so that whatever ends the process leaves one that
can be gone on with. Tensors are float32 and stand in it bit by bit, other numbers to the last
digit: a calibration that goes on from it decides as one that was never interrupted.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adaattn_compiler.calibrate.measure import Call, Sample
from adaattn_compiler.calibrate.outcome import Batch
from adaattn_compiler.calibrate.times import Times
from adaattn_compiler.fingerprint import data_fingerprint, weights_fingerprint
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy.file import write_text
from adaattn_compiler.target import cpu_target

_FORMAT = "adaattn calibration in progress 3"


@dataclass(frozen=True)
class Begun:
    """What is measured already: samples by their number, times by site."""

    samples: Mapping[int, Sample] = field(default_factory=dict)
    times: Mapping[SiteKey, Times] = field(default_factory=dict)


@dataclass(frozen=True)
class Key:
    """What measurements depend on. Not the budget: another one can go on from them."""

    weights: str
    data: str
    seed: int
    device: str
    versions: str

    def differences(self, other: Key) -> list[str]:
        """The names of what is otherwise."""
        names = [each.name for each in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


def key_of(model: Any, batches: list[Batch], seed: int) -> Key:
    """Of a calibration that is about to begin here."""
    versions = {"adaattn": metadata.version("adaattn-compiler"), "torch": torch.__version__}
    named = {**versions, "python": platform.python_version(), "byte order": sys.byteorder}
    parameters = getattr(model, "named_parameters", lambda: ())
    return Key(
        weights_fingerprint(parameters()),
        data_fingerprint(batches),
        seed,
        cpu_target(torch.get_num_threads()).name,
        ", ".join(f"{name} {version}" for name, version in named.items()),
    )


class Journal:
    """The file. begun: what it holds for this key. say: told what becomes of what is found."""

    def __init__(self, path: Path, key: Key, say: Callable[[str], None]) -> None:
        self.path = path
        self.begun = Begun()
        self._key = key
        self._say = say
        if path.exists():
            self._open()

    def keep(self, begun: Begun) -> None:
        """Replace the file."""
        self.begun = begun
        write_text(self.path, written(self._key, begun))

    def disowned(self, why: str) -> None:
        """What was found is not to be gone on with."""
        self.begun = Begun()
        self._say(f"{self.path} is ignored, and replaced: {why}")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _open(self) -> None:
        try:
            key, begun = read(self.path.read_text())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            return self.disowned(f"it cannot be read ({type(error).__name__}: {error})")
        different = self._key.differences(key)
        if different:
            return self.disowned(f"it was begun with other {' and other '.join(different)}")
        self.begun = begun
        many = len(begun.samples)
        words = "1 sample is" if many == 1 else f"{many} samples are"
        self._say(f"going on from {self.path}: {words} measured already")


# -- the file's text -------------------------------------------------------------------------------


def written(key: Key, begun: Begun) -> str:
    """JSON."""
    keys = list(begun.times)
    places = {site: i for i, site in enumerate(keys)}
    sites = [
        {"name": site.name, "ordinal": site.ordinal, **dataclasses.asdict(begun.times[site])}
        for site in keys
    ]
    samples = [
        {
            "number": number,
            "calls": [
                {"site": places[site], **_call_written(call)}
                for site, calls in sample.items()
                for call in calls
            ],
        }
        for number, sample in sorted(begun.samples.items())
    ]
    content = {"format": _FORMAT, "key": dataclasses.asdict(key), "sites": sites}
    return json.dumps({**content, "samples": samples}) + "\n"


def read(text: str) -> tuple[Key, Begun]:
    """Of such a text; any of a few errors where it is none."""
    content = json.loads(text)
    if content["format"] != _FORMAT:
        raise ValueError(f"its format is {content['format']!r}; this version reads {_FORMAT!r}")
    sites = [SiteKey(site["name"], site["ordinal"]) for site in content["sites"]]
    times = {
        key: Times(site["candidates"], tuple(map(tuple, site["seconds"])))
        for key, site in zip(sites, content["sites"], strict=True)
    }
    samples: dict[int, Sample] = {}
    for each in content["samples"]:
        sample = samples.setdefault(each["number"], {})
        for call in each["calls"]:
            sample.setdefault(sites[call["site"]], []).append(_call_read(call))
    return Key(**content["key"]), Begun(samples, times)


def _call_written(call: Call) -> dict[str, Any]:
    fields = {each.name: getattr(call, each.name) for each in dataclasses.fields(call)}
    return {
        name: _tensor_written(value) if isinstance(value, torch.Tensor) else value
        for name, value in fields.items()
    }


def _call_read(fields: Mapping[str, Any]) -> Call:
    errors, low, high = (_tensor_read(fields[name]) for name in ("errors", "low", "high"))
    statistics = {name: tuple(map(float, each)) for name, each in fields["statistics"].items()}
    return Call(errors, low, high, int(fields["rows"]), int(fields["columns"]), statistics)


def _tensor_written(tensor: torch.Tensor) -> dict[str, Any]:
    raw = tensor.float().contiguous().numpy().tobytes()
    return {"shape": list(tensor.shape), "float32": base64.b64encode(raw).decode()}


def _tensor_read(held: Mapping[str, Any]) -> torch.Tensor:
    raw = np.frombuffer(base64.b64decode(held["float32"]), dtype=np.float32)
    return torch.from_numpy(raw.copy()).view(held["shape"])
