"""`adaattn-calibrate`, as it is typed."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_model
import torch

from adaattn_compiler.calibrate import cli
from adaattn_compiler.calibrate.cli import main
from adaattn_compiler.calibrate.progress import Bar, spent
from adaattn_compiler.calibrate.subjects import from_folder
from adaattn_compiler.policy import Policy

MODEL = ("tiny_model:build", "--data", "tiny_model:batches")


class Said:
    """What a command printed and how it ended."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        try:
            self.status = main(arguments)
        except SystemExit as end:  # argparse's own
            self.status = int(end.code or 0)
        self.out, self.error = capsys.readouterr()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers with 256 tokens and no tokenizer, and one with 300."""
    transformers = pytest.importorskip("transformers")
    made = tmp_path_factory.mktemp("hf")
    for name, vocabulary in (("bytes", 256), ("words", 300)):
        config = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=512,
            dtype=torch.float32,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(made / name)
    (made / "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(4096)))
    return made


# -- what is written -------------------------------------------------------------------------------


def test_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, *MODEL, "--budget", "1%", "--samples", "2")
    assert said.status == 0, said.error
    policy = Policy.load("policy.json")
    assert policy.summary() in said.out
    assert policy.provenance.budget.value == 0.01
    assert [site.label for site in policy.sites] == list(tiny_model.SITES)
    assert "measuring candidates: 0 of 2" in said.error
    assert "x as fast as exact, as predicted head by head" in said.out
    assert "written: policy.json, policy.html" in said.out
    assert "<title>Calibration of tiny_model:build</title>" in Path("policy.html").read_text()
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_file()) == [
        "policy.html",
        "policy.json",
    ]


def test_perplexity_and_names_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    arguments = ("--max-perplexity-change", "0.5", "--seed", "7", "--preset", "speed")
    said = Said(capsys, *MODEL, *arguments, "-o", "sub/p.json", "--report", "sub/r.html")
    assert said.status == 0, said.error
    policy = Policy.load("sub/p.json")
    assert policy.provenance.seed == 7
    assert policy.provenance.budget.kind == "max_perplexity_change"
    assert "perplexity_change" in policy.provenance.results
    assert "holding the model to the budget: try " in said.error
    assert Path("sub/r.html").exists()


def test_folder_of_transformers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, sizes = str(folder / "text.txt"), ("--length", "256", "--samples", "2")
    model = ("--hf", str(folder / "bytes"), "--text", text, *sizes)
    said = Said(capsys, *model, "--output-budget", "0.1", "--no-report")
    assert said.status == 0, said.error
    assert f"the bytes of {text} are the tokens" in said.error
    policy = Policy.load("policy.json")
    assert [site.name for site in policy.sites] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
    assert not Path("policy.html").exists()


def test_text_by_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(300)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    shutil.copytree(folder / "words", tmp_path / "model")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(f"w{i:03d}"[-4:] for i in range(100, 300)))
    found = from_folder(str(tmp_path / "model"), str(tmp_path / "text"), 16, 2, None)
    assert found.said == ""
    tokens = [kwargs["input_ids"].tolist() for _, kwargs in found.batches]
    assert tokens == [[list(range(100, 116))], [list(range(200, 216))]]


def test_interrupt_leaves_what_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "__call__", _interrupting(Bar.__call__))
        said = Said(capsys, *MODEL, "--budget", "0.01")
    assert said.status == 130
    assert "interrupted; the same command goes on from policy.json.partial" in said.error
    assert not Path("policy.json").exists()
    said = Said(capsys, *MODEL, "--budget", "0.01")
    assert said.status == 0
    assert "going on from policy.json.partial: 1 sample is measured already" in said.error
    assert Path("policy.json").exists()
    assert not Path("policy.json.partial").exists()


Call = Callable[[Bar, str, int, int], None]


def _interrupting(call: Call) -> Call:
    def interrupted(self: Bar, stage: str, done: int, of: int) -> None:
        call(self, stage, done, of)
        if done == 1:
            raise KeyboardInterrupt

    return interrupted


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name one of MODULE:FUNCTION and --hf DIR"),
        (("m:f", "--hf", "x"), "name one of MODULE:FUNCTION and --hf DIR"),
        (("m:f", "--text", "x"), "--text says nothing to MODULE:FUNCTION"),
        (("--hf", "x", "--data", "m:b"), "--data says nothing to --hf"),
        (("--hf", "x"), "--hf needs --text FILE"),
        (("m:f",), "give one of --budget, --output-budget and --max-perplexity-change"),
        (("m:f", "--budget", "1", "--output-budget", "1"), "give one of --budget"),
        (("m:f", "--budget", "0"), "'0': write a number above 0, at most 1, as 0.001 or 0.1%"),
        (("m:f", "--budget", "5"), "--budget: '5': write a number above 0, at most 1, as 0.001"),
        (("m:f", "--output-budget", "101%"), "--output-budget: '101%': write a number"),
        (("m:f", "--max-perplexity-change", "1.5"), "'1.5': write a number above 0, at most 1"),
        (("m:f", "--budget", "nan"), "'nan': write a number above 0"),
        (("m:f", "--max-perplexity-change", "much%"), "'much%': write a number"),
        (("m:f", "--samples", "0"), "'0' is no whole number from 1"),
        (("m:f", "--preset", "fast"), "invalid choice: 'fast'"),
        (("m:f", "--budget", "1", "--seed", "-1"), "--seed -1: it must be from 0"),
        (("m:f", "--budget", "1", "-o", "no/p.json"), "there is no folder no; make it first"),
        (("m:f", "--budget", "1", "-o", "p.html"), "-o p.html: the report would replace it"),
        (("m:f", "--budget", "1", "--report", "policy.json"), "the report would replace it"),
        (("m:f", "--budget", "1", "-o", "."), ". is a folder; name a file in it"),
        (("m:f", "--budget", "1", "--report", "x", "--no-report"), "leave one out"),
        (("m:f", "--budget", "1"), "m:f: No module named 'm'"),
        (("tiny_model:build", "--budget", "1"), "gives no inputs: add --data"),
        (("tiny_model:SITES", "--budget", "1"), "a function that returns the model is wanted"),
        ((*MODEL[:2], "tiny_model:HEADS", "--budget", "1"), "a list of batches is wanted"),
        (("--hf", "x", "--text", "y", "--budget", "1"), "no config.json there"),
    ],
)
def test_misuse_is_explained(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Said(capsys, *arguments)
    assert (said.status, said.out) == (2, "")
    assert says in said.error


@pytest.mark.parametrize(
    ("model", "arguments", "says"),
    [
        ("bytes", ("--text", "none.txt"), "--text 'none.txt': no such file"),
        ("bytes", ("--length", "1024"), "takes at most 512 tokens"),
        ("bytes", ("--length", "512", "--samples", "9"), "equal stretches has 455 tokens"),
        ("words", (), "no tokenizer there, and the vocabulary has 300 tokens, not the 256 bytes"),
        ("bytes", ("--dtype", "float1"), "no dtype 'float1'"),
    ],
)
def test_folders_that_do_not_fit(
    model: str,
    arguments: tuple[str, ...],
    says: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = ("--text", str(folder / "text.txt"), "--length", "256", "--budget", "1")
    said = Said(capsys, "--hf", str(folder / model), *usual, *arguments)
    assert said.status == 2
    assert says in said.error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tiny_model:build_none", "--data", "tiny_model:plain"), "no attention to calibrate"),
        (("tiny_model:build", "--data", "tiny_model:wrong"), "IndexError"),
    ],
)
def test_model_that_fails(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Said(capsys, *arguments, "--budget", "1%")
    assert said.status == 1
    assert says in said.error
    assert "Traceback" not in said.error
    assert not Path("policy.json").exists()


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    said = Said(capsys, "--help")
    assert said.status == 0
    assert "adaattn-calibrate --hf models/llama" in said.out
    assert "0.1%" in said.out
    assert cli._EPILOG in said.out


# -- how far it is ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal() -> None:
    now, out = [0.0], Terminal()
    bar = Bar(out, lambda: now[0])
    bar("measuring", 2, 8)  # two were measured before
    now[0] = 10.0
    bar("measuring", 4, 8)
    assert out.getvalue().endswith(
        "\rmeasuring [############............] 4/8, 10 s, about 20 s left"
    )
    bar.say("a line")
    now[0] = 70.0
    bar("holding", 1, 0)
    bar.close()
    said, measured, held, rest = (line.split("\r")[-1] for line in out.getvalue().split("\n"))
    assert (said, measured, held, rest) == (
        "a line",
        "measuring: 1 min 10 s",
        "holding: 0.0 s",
        "",
    )


def test_lines_elsewhere() -> None:
    now, out = [0.0], io.StringIO()
    bar = Bar(out, lambda: now[0])
    for i in range(25):
        bar("measuring", i, 25)
        now[0] += 1.0
    bar.close()
    assert out.getvalue().splitlines() == [
        "measuring: 0 of 25, 0.0 s",
        "measuring: 10 of 25, 10 s, about 15 s left",
        "measuring: 20 of 25, 20 s, about 5.0 s left",
        "measuring: 25 s",
    ]


def test_times_in_words() -> None:
    assert [spent(s) for s in (0.04, 9.94, 12.4, 200, 3900)] == [
        "0.0 s",
        "9.9 s",
        "12 s",
        "3 min 20 s",
        "1 h 5 min",
    ]
