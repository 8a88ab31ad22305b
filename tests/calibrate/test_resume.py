"""A calibration that is broken off, and one that several processes share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_model
import torch

from adaattn_compiler.calibrate import cli
from adaattn_compiler.calibrate.given import batches_of
from adaattn_compiler.calibrate.measure import Call, Times
from adaattn_compiler.calibrate.outcome import Batch
from adaattn_compiler.calibrate.resume import Begun, Journal, Key, key_of, read, written
from adaattn_compiler.calibrate.run import calibration
from adaattn_compiler.passes.choices import SiteKey
from adaattn_compiler.policy import Budget, Policy

BUDGET = Budget("budget", 0.05)
KEY = Key("weights", "data", 0, "CPU", "torch 2")
# Of the processes of tests; the same in each, since calibration of one does not go on in another.
THREADS = "1"
ARGUMENTS = ("tiny_model:build", "--data", "tiny_model:batches", "--budget", "0.05", "--no-report")


@pytest.fixture(autouse=True)
def _alike(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times that are always the same, and threads as other tests have them."""
    tiny_model.fixed_times(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(int(THREADS))
    yield
    torch.set_num_threads(threads)


def _batches(count: int = 3) -> list[Batch]:
    return batches_of(tiny_model.batches(count))


def _journal(path: Path, said: list[str], model: torch.nn.Module | None = None) -> Journal:
    return Journal(path, key_of(model or tiny_model.build(), _batches(), 0), said.append)


def _policy(journal: Journal | None, stop_at: int = 99, budget: Budget = BUDGET) -> Policy:
    """The tiny model's; broken off when so many samples are measured."""

    def progress(stage: str, done: int, of: int) -> None:
        if stage == "measuring candidates" and done == stop_at:
            raise KeyboardInterrupt

    model = tiny_model.build()
    return calibration(model, _batches(), budget, progress=progress, journal=journal).policy


# -- the file --------------------------------------------------------------------------------------


def test_text_holds_every_bit() -> None:
    errors = torch.tensor([[0.1, float("nan")], [float("inf"), 1e-38]])
    numbers = {"entropy": (1 / 3, 1e-300), "q_max": (0.1, 2.0)}
    call = Call(errors, torch.rand(9, 2), torch.rand(9, 2), 7, 300, numbers)
    site = SiteKey("a.b", 1)
    begun = Begun({3: {site: [call, call]}}, {site: Times("name", ((0.1, 1 / 3), (0.3, 1e-9)))})
    key, found = read(written(KEY, begun))
    assert (key, found.times) == (KEY, begun.times)
    (again, _) = found.samples[3][site]
    assert (again.rows, again.columns, again.statistics) == (7, 300, numbers)
    for name in ("errors", "low", "high"):
        assert getattr(again, name).numpy().tobytes() == getattr(call, name).numpy().tobytes()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read (JSONDecodeError"),
        ("[]", "cannot be read (TypeError"),
        ('{"format": "another"}', "its format is 'another'"),
        (written(Key("others", "data", 0, "CPU", "torch 2"), Begun()), "begun with other weights"),
        (written(Key("weights", "x", 1, "CPU", "torch 2"), Begun()), "other data and other seed"),
    ],
)
def test_what_is_of_another_calibration_is_ignored(text: str, says: str, tmp_path: Path) -> None:
    path, said = tmp_path / "p.json.partial", list[str]()
    path.write_text(text)
    assert Journal(path, KEY, said.append).begun == Begun()
    assert says in "".join(said)
    assert "is ignored, and replaced" in said[0]


# -- broken off and gone on with -------------------------------------------------------------------


def test_going_on_gives_the_same_policy(tmp_path: Path) -> None:
    whole = _policy(None)
    path, said = tmp_path / "p.json.partial", list[str]()
    with pytest.raises(KeyboardInterrupt):
        _policy(_journal(path, said), stop_at=2)
    assert said == []
    journal = _journal(path, said)
    assert "2 samples are measured already" in said[0]
    assert sorted(journal.begun.samples) == [0, 1]
    assert _policy(journal).to_json() == whole.to_json()


def test_what_is_measured_serves_another_budget(tmp_path: Path) -> None:
    path, wider = tmp_path / "p.json.partial", Budget("budget", 0.5)
    with pytest.raises(KeyboardInterrupt):
        _policy(_journal(path, []), stop_at=3)
    found = _policy(_journal(path, []), budget=wider)
    assert found.to_json() == _policy(None, budget=wider).to_json()


def test_other_times_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.json.partial"
    with pytest.raises(KeyboardInterrupt):
        _policy(_journal(path, []), stop_at=1)
    monkeypatch.undo()  # measured from here on, were they not in the file
    seconds = _policy(_journal(path, [])).sites[0].seconds
    assert seconds is not None
    assert seconds.exact == 0.002


def test_model_that_computes_otherwise_is_measured_anew(tmp_path: Path) -> None:
    """The same weights and data: its inputs tell."""
    path, said = tmp_path / "p.json.partial", list[str]()
    with pytest.raises(KeyboardInterrupt):
        _policy(_journal(path, said), stop_at=2)
    model = tiny_model.build(gain=3.0)
    journal = _journal(path, said, model)
    found = calibration(model, _batches(), BUDGET, journal=journal).policy
    assert "layers.0 meets other inputs now" in said[-1]
    assert found.to_json() == calibration(model, _batches(), BUDGET).policy.to_json()


# -- processes -------------------------------------------------------------------------------------


def _process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(tiny_model.__file__).parent), os.environ.get("PYTHONPATH", "")]
    found = os.pathsep.join(filter(None, paths))
    given = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": THREADS, **environment}
    given.pop("WORLD_SIZE", None)
    return subprocess.run(
        [sys.executable, *command], env=given, capture_output=True, text=True, timeout=300
    )


def test_killed_process_is_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, partial = tmp_path / "p.json", tmp_path / "p.json.partial"
    arguments = (*ARGUMENTS, "-o", str(output), "--threads", THREADS)
    killed = _process(tiny_model.__file__, *arguments, KILLED_AFTER="2")
    assert killed.returncode == -9, killed.stderr
    assert partial.exists()
    assert not output.exists()
    assert cli.main(arguments) == 0
    assert f"going on from {partial}: 2 samples" in capsys.readouterr().err
    assert not partial.exists()
    assert output.read_text() == _policy(None).to_json()


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    output = tmp_path / "p.json"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = (*ARGUMENTS, "-o", str(output), "--threads", THREADS)
    done = _process(*torchrun, tiny_model.__file__, *arguments)
    assert done.returncode == 0, done.stderr
    alone = _journal(tmp_path / "alone", [])
    policy = _policy(alone)
    assert output.read_text() == policy.to_json()
    _, shared = read((tmp_path / "p.json.partial").read_text())
    assert shared.times == alone.begun.times
    assert sorted(shared.samples) == [0, 1, 2]
    for number, sample in alone.begun.samples.items():
        for site, calls in sample.items():
            for ours, theirs in zip(calls, shared.samples[number][site], strict=True):
                torch.testing.assert_close(theirs.errors, ours.errors, rtol=0, atol=0)
    assert done.stdout.count("policy ") == 1  # one rank speaks


def test_ranks_with_different_models_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "p.json"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = ("tiny_model:build_by_rank", *ARGUMENTS[1:], "-o", str(output))
    done = _process(*torchrun, tiny_model.__file__, *arguments)
    assert done.returncode != 0
    assert "rank 1 has other weights than rank 0" in done.stderr
    assert not list(tmp_path.iterdir())


def test_file_is_json(tmp_path: Path) -> None:
    path = tmp_path / "p.json.partial"
    with pytest.raises(KeyboardInterrupt):
        _policy(_journal(path, []), stop_at=1)
    content = json.loads(path.read_text())
    assert [site["name"] for site in content["sites"]] == list(tiny_model.SITES)
    assert len(content["samples"]) == 1
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
