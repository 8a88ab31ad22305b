"""`adaattn-explain`, as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaattn_compiler.cli import main
from adaattn_compiler.kernels.triton.kernel import TritonKernel
from adaattn_compiler.subjects import tensor_of

MODEL = """
import torch
import torch.nn.functional as F


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 32)

    def forward(self, ids, twice=False):
        x = self.embed(ids).unflatten(-1, (2, 16)).transpose(1, 2)
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.scaled_dot_product_attention(x, x, x) if twice else x


model, number = Model(), 3


def build():
    return Model()


def build_with_inputs():
    return Model(), (torch.zeros(1, 24, dtype=torch.long),)


def build_wrong():
    raise RuntimeError("no weights here")


def build_number():
    return number


def batches():
    yield {"ids": torch.zeros(2, 40, dtype=torch.long), "twice": True}
    raise AssertionError("more than one batch")


listed = [(torch.zeros(3, 56, dtype=torch.long),)]
empty = []
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the folder that the command runs in."""
    (tmp_path / "cli_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "cli_models"
    sys.modules.pop("cli_models", None)


class Said:
    """What a command printed and how it ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        try:
            self.status = main(arguments)
        except SystemExit as end:  # argparse's own
            self.status = int(end.code or 0)
        self.out, self.error = capsys.readouterr()


ESTIMATED = ("--options", "measure=0", "kernels=sdpa")


@pytest.mark.parametrize(
    ("arguments", "shapes"),
    [
        (("build", "--shape", "1x8:int64"), ["B1 H2 G2 M8 N8 D16"]),
        (("build_with_inputs",), ["B1 H2 G2 M24 N24 D16"]),
        (("build", "--data", "cli_models:batches"), ["B2 H2 G2 M40 N40 D16"] * 2),
        (("build", "--data", "cli_models:listed"), ["B3 H2 G2 M56 N56 D16"]),
    ],
)
def test_model_of_ones_own(
    arguments: tuple[str, ...],
    shapes: list[str],
    package: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, *rest = arguments
    said = Said(capsys, f"{package}:{name}", *rest, *ESTIMATED, "--json")
    assert said.status == 0, said.error
    sites = json.loads(said.out)["sites"]
    assert [site["shape"] for site in sites] == shapes
    assert all(site["kernel"] == "sdpa" and not site["training"] for site in sites)


def test_training_and_dynamic_sizes(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (f"{package}:build", "--shape", "2x16:int64", "--train", "--dynamic", *ESTIMATED)
    said = Said(capsys, *arguments)
    assert said.status == 0
    assert "B2 H2 G2 M16 N16 D16" in said.out
    assert "analysed for training" in said.out


def test_attention_alone_of_any_length(capsys: pytest.CaptureFixture[str]) -> None:
    """17 GB of queries, 32 TB of scores: none of it is there."""
    sizes = ("--heads", "16", "--kv-heads", "4", "--length", "1048576", "--head-dim", "512")
    said = Said(capsys, "--attention", "causal", *sizes, "--options", "kernels=sdpa")
    assert said.status == 0, said.error
    assert "causal" in said.out
    assert "B1 H16 G4 M1048576 N1048576 D512" in said.out


def test_attention_on_a_target_shows_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    arguments = ("--attention", "window=256", "--length", "2048", "--target", "sm_80", "--source")
    said = Said(capsys, *arguments, "--options", "kernels=sdpa")
    assert said.status == 0, said.error
    for text in ("causal & window(256)", "on A100 (sm_80)", "mma.sync", "@triton.jit", ">= "):
        assert text in said.out


def test_configuration_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = ("--batch", "2", "--length", "48")
    said = Said(capsys, "--hf", str(tmp_path), *sizes, *ESTIMATED, "--json")
    assert said.status == 0, said.error
    sites = json.loads(said.out)["sites"]
    assert [site["name"] for site in sites] == [f"model.layers.{i}.self_attn" for i in range(2)]
    assert {(site["shape"], site["mask"]) for site in sites} == {("B2 H4 G2 M48 N48 D16", "causal")}
    assert sites[0]["prediction"]["least_bytes"] == 2 * 2 * (4 + 2) * 48 * 16 * 2  # bfloat16


def test_first_table_has_the_kernel_of_the_target(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    arguments = ("--attention", "causal", "--length", "256", "--target", "sm_80", *ESTIMATED)
    said = Said(capsys, *arguments)
    assert said.status == 0, said.error
    head, row = said.out.splitlines()[1:3]
    kernel = head.index("kernel")
    assert row[kernel:].split()[0] == "triton"
    said = Said(capsys, *arguments[:4], *ESTIMATED)
    assert said.out.splitlines()[2][kernel:].split()[0] == "sdpa"


def test_code_that_is_not_there_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--attention", "causal", "--length", "264", "--source", *ESTIMATED)
    said = Said(capsys, *arguments)
    assert "no code to show for (root): sdpa is not generated" in said.out
    monkeypatch.setattr(TritonKernel, "refusal", lambda *_: "Triton is not installed")
    said = Said(capsys, *arguments, "--target", "sm_90")
    assert "no code to show for (root): Triton is not installed" in said.out


WITHOUT_TRITON = """
import importlib.machinery, sys

find = importlib.machinery.PathFinder.find_spec

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else find(name, path, target)

known = importlib.machinery.PathFinder
sys.meta_path = [Finder if each is known else each for each in sys.meta_path]
from adaattn_compiler.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_triton_nothing_but_the_answer_is_said() -> None:
    arguments = ("--attention", "causal", "--length", "128", "--target", "sm_90", "--source")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, *arguments, *ESTIMATED],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "no code to show for (root): Triton is not installed" in done.stdout


def test_settings_of_triton_are_not_the_users_business(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
import warnings

def build_warning():
    warnings.warn("TRITON_DEFAULT_FP_FUSION is unset: it will be another one day")
    warnings.warn("the model is old")
    return Model()
"""
    with (tmp_path / "cli_models.py").open("a") as file:
        file.write(code)
    with pytest.warns(UserWarning, match="the model is old") as warned:
        said = Said(capsys, f"{package}:build_warning", "--shape", "1x8:int64", *ESTIMATED)
    assert said.status == 0, said.error
    assert [str(each.message) for each in warned] == ["the model is old"]


def test_random_weights_are_named_where_a_policy_does_not_apply(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    folder = Path(__file__).parent / "data" / "bytes_lm"
    arguments = ("--hf", str(folder), "--length", "1024", "--dtype", "float32")
    said = Said(capsys, *arguments, "--options", "measure=0", f"policy={folder / 'policy.json'}")
    assert said.status == 0, said.error
    assert "calibrated for other weights of this module" in said.out
    assert "the weights are random (--hf reads the config.json alone)" in said.out
    assert "random" not in Said(capsys, *arguments, *ESTIMATED).out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name one of MODULE:FUNCTION, --hf DIR and --attention MASK"),
        (("--attention", "causal", "--hf", "."), "name one of"),
        (("--attention", "alibi"), "--attention 'alibi': causal, none, or window=512"),
        (("--attention", "window=0"), "'window=0'"),
        (("--attention", "causal", "--heads", "6", "--kv-heads", "4"), "6 is no multiple"),
        (("--attention", "causal", "--dtype", "float31"), "no dtype 'float31'"),
        (("--attention", "causal", "--dtype", "int64"), "of floating-point numbers"),
        (("--attention", "causal", "--length", "0"), "'0' is no whole number from 1 to 1073741824"),
        (("--attention", "causal", "--run"), "its tensors have no values"),
        (("--attention", "causal", "--shape", "1x8"), "--shape says nothing to --attention"),
        (("--attention", "causal", "--target", "sm_70"), "no target 'sm_70'"),
        (("--attention", "causal", "--options", "measure"), "write it as name=value"),
        (("--attention", "causal", "--options", "measur=0"), "did you mean 'measure'"),
        (("--attention", "causal", "--options", "measure=maybe"), "must be True or False"),
        (
            ("--attention", "causal", "--options", "policy=no.json"),
            "option policy='no.json': the policy cannot be read",
        ),
        (("--hf", "nowhere"), "--hf 'nowhere': no config.json there"),
        (("cli_models",), "write it as module:name"),
        (("cli_moodels:build",), "is it installed, or in this folder?"),
        (("cli_models:bild",), "cli_models has no 'bild'"),
        (("cli_models:model",), "a function that returns the model is wanted"),
        (("cli_models:build_number",), "returned int: a model is wanted"),
        (("cli_models:build",), "gives no inputs: add --shape"),
        (("cli_models:build", "--heads", "2"), "--heads says nothing to MODULE:FUNCTION"),
        (("cli_models:build", "--shape", "1xtwo"), "--shape '1xtwo': write it as"),
        (("cli_models:build", "--data", "cli_models:empty"), "cli_models:empty is empty"),
        (("cli_models:build", "--shape", "1x8", "--data", "cli_models:listed"), "leave one out"),
    ],
)
def test_misuse_is_explained(
    arguments: tuple[str, ...], says: str, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Said(capsys, *arguments)
    assert said.status == 2
    assert says in said.error
    assert said.out == ""


def test_model_that_fails(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, f"{package}:build_wrong")
    assert (said.status, "raised RuntimeError: no weights here" in said.error) == (1, True)
    said = Said(capsys, f"{package}:build", "--shape", "1x8", *ESTIMATED)
    assert said.status == 1
    assert "Traceback" not in said.error
    assert "for token ids write 1x1024:int64" in said.error
    said = Said(capsys, f"{package}:build_wrong", "--traceback")
    assert "Traceback" in said.error


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "--help")
    assert said.status == 0
    assert "adaattn-explain --attention causal" in said.out


def test_tensors_of_shapes() -> None:
    assert tuple(tensor_of("2x3x4").shape) == (2, 3, 4)
    assert str(tensor_of("2x3").dtype) == "torch.float32"
    ids = tensor_of("5x7:int32")
    assert (str(ids.dtype), int(ids.min()) >= 0, int(ids.max()) <= 1) == ("torch.int32", True, True)
