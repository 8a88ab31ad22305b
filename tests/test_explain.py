"""What `explain` says of a model: its records, its table, its JSON."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import bert, llama, tokens

from adaattn_compiler import Explanation, Prediction, SiteRecord, explain


class Block(torch.nn.Module):
    """One causal attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(
            part.view(*x.shape[:2], 2, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        scores = (q @ k.mT / 8**0.5).masked_fill(above, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class SdpaBlock(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        first = F.scaled_dot_product_attention(q, k, v)
        second = F.scaled_dot_product_attention(first, k, v)
        return second.transpose(1, 2).flatten(2)


class NotUnderstood(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        return ((q @ k.mT).softmax(-1).sqrt() @ v).transpose(1, 2).flatten(2)


class WithGraphBreak(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(), SdpaBlock(), NotUnderstood()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        torch._dynamo.graph_break()
        return self.third(x)


@pytest.fixture(scope="module")
def broken() -> Explanation:
    torch.manual_seed(0)
    with torch.no_grad():
        return explain(WithGraphBreak(), torch.randn(2, 6, 16))


def test_every_attention_has_a_record(broken: Explanation) -> None:
    assert [(site.name, site.ordinal, site.graph) for site in broken.sites] == [
        ("first", 0, 0),
        ("second", 0, 0),
        ("second", 1, 0),
        ("third", 0, 1),
    ]
    assert broken.graphs == 2
    assert broken.failed == 0
    assert {site.kind for site in broken.sites} == {"attention"}


def test_a_lowered_site_says_what_computes_it(broken: Explanation) -> None:
    site = broken.sites[0]
    assert site.lowered
    assert site.reason is None
    assert (site.spelling, site.mask, site.decision) == ("softmax", "causal", "exact")
    assert site.kernel is not None
    assert site.why
    assert site.shape == "B2 H2 G2 M6 N6 D8"


def test_a_refused_site_says_why(broken: Explanation) -> None:
    site = broken.sites[3]
    assert not site.lowered
    assert site.reason is not None
    assert "sqrt" in site.reason
    assert (site.kernel, site.mask, site.decision, site.shape) == (None, None, None, None)


def test_a_site_says_where_it_is_written(broken: Explanation) -> None:
    first = NotUnderstood.forward.__code__.co_firstlineno
    assert broken.sites[3].where == f"{__file__}:{first + 2}"
    assert str(broken).splitlines()[-2].endswith(f"[{__file__}:{first + 2}]")
    assert all(site.where is not None for site in broken.sites)


def test_every_field_of_a_record_is_documented() -> None:
    for field in dataclasses.fields(SiteRecord):
        assert f" {field.name}: " in (SiteRecord.__doc__ or ""), field.name


def _record(fields: dict[str, Any]) -> SiteRecord:
    prediction = fields.pop("prediction")
    return SiteRecord(**fields, prediction=prediction and Prediction(**prediction))


def test_json_holds_the_same(broken: Explanation) -> None:
    read = json.loads(broken.to_json())
    sites = tuple(_record(site) for site in read["sites"])
    assert sites == broken.sites
    again = Explanation(sites, tuple(read["notes"]), read["graphs"], read["seconds"])
    assert again == broken


def test_time_of_each_pass_is_kept(broken: Explanation) -> None:
    assert {"canonicalize", "match", "validate", "lower"} <= broken.seconds.keys()
    assert all(spent >= 0 for spent in broken.seconds.values())


def test_table_is_aligned(broken: Explanation) -> None:
    head, header, *rows, note = str(broken).splitlines()
    assert head == "3 of 4 attention sites lowered, 2 graphs"
    assert len(rows) == 4
    for word in ("site", "spelling", "mask", "kernel"):
        at = header.index(word)
        assert all(row[at - 2 : at] == "  " and row[at] != " " for row in rows)
    assert rows[2].startswith("0      second#1 ")
    assert rows[3].startswith("1      third ")
    assert "inductor" in rows[3]
    assert note.startswith("2 graphs: the model breaks")


def test_sites_of_one_name_are_told_apart_across_graphs() -> None:
    class Twice(SdpaBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(x)

    with torch.no_grad():
        explanation = explain(Twice(), torch.randn(2, 6, 16))
    assert [site.ordinal for site in explanation.sites] == [0, 1, 2, 3]
    assert explanation.graphs == len({site.graph for site in explanation.sites}) == 2


_LOWERED = SiteRecord(
    "layers.0.attn", 0, "attention", True, None, "softmax", "causal", "sdpa", "exact", "B1 H2"
)
_REFUSED = SiteRecord(
    "", 1, "attention", False, "no kernel", "sdpa", None, None, None, None, graph=1, where="m.py:3"
)


def test_table_as_printed() -> None:
    assert str(Explanation((_LOWERED, _REFUSED))) == (
        "1 of 2 attention sites lowered, 1 graph\n"
        "site           spelling  mask    shape  kernel    decision  reason\n"
        "layers.0.attn  softmax   causal  B1 H2  sdpa      exact\n"
        "(root)#1       sdpa      -       -      inductor  -         no kernel [m.py:3]"
    )


def test_table_of_several_graphs_as_printed() -> None:
    notes = ("graph 1 was left to Inductor: x",)
    assert str(Explanation((_LOWERED, _REFUSED), notes, 2)) == (
        "1 of 2 attention sites lowered, 2 graphs\n"
        "graph  site           spelling  mask    shape  kernel    decision  reason\n"
        "0      layers.0.attn  softmax   causal  B1 H2  sdpa      exact\n"
        "1      (root)#1       sdpa      -       -      inductor  -         no kernel [m.py:3]\n"
        "graph 1 was left to Inductor: x"
    )


def test_model_without_attention() -> None:
    explanation = explain(torch.nn.Linear(4, 4), torch.randn(2, 4))
    assert explanation.sites == ()
    assert str(explanation) == (
        "no attention found (a softmax between two matrix products, or an SDPA call), 1 graph"
    )
    assert json.loads(explanation.to_json())["sites"] == []


def test_graph_that_could_not_be_analysed_is_not_said_to_have_no_attention() -> None:
    explanation = explain(Block(), torch.randn(2, 6, 16), options={"analysis_seconds": 1e-9})
    head, note = str(explanation).splitlines()
    assert head == "nothing was analysed, 1 graph"
    assert explanation.failed == 1
    assert note == (
        "graph 0 was left to Inductor: analysis took longer than 1e-09 s (option "
        "analysis_seconds); raise analysis_seconds to go on for longer"
    )


def test_disabled_compiler_explains_nothing() -> None:
    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model ran")

    explanation = explain(never, torch.randn(2), options={"enabled": False})
    assert (explanation.sites, explanation.graphs) == ((), 0)
    assert explanation.notes == (
        "AdaAttn is disabled (enabled=False): every graph goes to Inductor",
    )


def test_model_of_which_nothing_is_captured() -> None:
    inner = torch.compiler.disable(Block())
    explanation = explain(lambda x: inner(x), torch.randn(2, 6, 16))
    assert explanation.graphs == 0
    assert str(explanation).startswith("nothing was analysed, 0 graphs")
    assert "captured no graph" in str(explanation)


def test_plain_function_and_keyword_arguments() -> None:
    def attention(q: torch.Tensor, *, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).softmax(-1) @ v

    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    (site,) = explain(attention, q, k=k, v=v).sites
    assert site.lowered
    assert site.mask == "none"


def test_models_of_many_layers() -> None:
    with torch.no_grad():
        explanation = explain(llama("sdpa", layers=32), input_ids=tokens(16), use_cache=False)
    assert len(explanation.sites) == 32
    assert {site.name for site in explanation.sites} == {
        f"model.layers.{i}.self_attn" for i in range(32)
    }
    assert all(site.lowered and site.mask == "causal" for site in explanation.sites)


def test_grad_mode_and_training_are_the_callers() -> None:
    explanation = explain(bert("eager").train(), input_ids=tokens(16))
    assert all(site.lowered and site.training for site in explanation.sites)
    (note,) = explanation.notes
    assert note.startswith("analysed for training (gradients are on)")
    with torch.no_grad():
        explanation = explain(bert("eager").eval(), input_ids=tokens(16))
    assert not any(site.training for site in explanation.sites)
    assert explanation.notes == ()


def test_refused_site_says_that_it_was_analysed_for_training() -> None:
    explanation = explain(NotUnderstood(), torch.randn(2, 6, 16))
    assert explanation.sites[0].training
    assert any("analysed for training" in note for note in explanation.notes)


def test_the_only_kernel_that_can_says_why_the_others_cannot() -> None:
    options = {"kernels": "sdpa,strips,flex"}
    (site,) = explain(Block(), torch.randn(2, 6, 16), options=options).sites
    assert site.kernel == "sdpa"
    assert site.why is not None
    others = r"strips: .*backward.*; flex: .*backward.*; cpp: not allowed .*"
    assert re.fullmatch(rf"the only one that can \({others}\)", site.why)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown option 'nonsense'"):
        explain(torch.nn.Linear(4, 4), torch.randn(2, 4), options={"nonsense": 1})


def test_errors_of_the_model_are_its_own() -> None:
    def wrong(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("the model's own")

    with pytest.raises(KeyError, match="the model's own"):
        explain(wrong, torch.randn(2))


def test_a_model_stays_as_it_was() -> None:
    model, x = Block(), torch.randn(2, 6, 16)
    before, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    explain(model, x)
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_compiled_model_can_be_explained() -> None:
    model, x = Block(), torch.randn(2, 6, 16)
    (site,) = explain(torch.compile(model, backend="eager"), x).sites
    assert site.lowered


# -- beside what the user compiles -----------------------------------------------------------------


def _counting(counts: list[int]) -> Any:
    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(len(inputs))
        return graph_module.forward

    return backend


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters,
    reason="compilations cannot be kept apart before torch 2.13",
)
def test_what_is_compiled_stays_compiled() -> None:
    model, counts = WithGraphBreak(), list[int]()
    compiled = torch.compile(model, backend=_counting(counts))
    with torch.no_grad():
        compiled(torch.randn(2, 6, 16))
        assert len(counts) == 2
        explanations = [explain(model, torch.randn(2, 6 + i, 16)) for i in range(20)]
        compiled(torch.randn(2, 6, 16))
        assert len(counts) == 2
        shapes = [explanation.sites[0].shape for explanation in explanations]
    assert shapes == [f"B2 H2 G2 M{6 + i} N{6 + i} D8" for i in range(20)]


def test_lengths_explained_make_nothing_dynamic() -> None:
    model, seen = Block(), list[Any]()

    def backend(graph_module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(type(size) for x in inputs if isinstance(x, torch.Tensor) for size in x.shape)
        return graph_module.forward

    with torch.no_grad():
        for length in (5, 6, 7):
            explain(model, torch.randn(2, length, 16))
        torch.compile(model, backend=backend)(torch.randn(2, 8, 16))
    assert set(seen) == {int}


def test_explained_again_and_again_before_the_model_is_compiled() -> None:
    model, x, counts = Block(), torch.randn(2, 6, 16), list[int]()
    with torch.no_grad():
        for _ in range(20):
            assert len(explain(model, x).sites) == 1
        torch.compile(model, backend=_counting(counts))(x)
    assert len(counts) == 1


def test_dynamic_is_that_of_the_compiler(tmp_path: Path) -> None:
    options = {"dump_dir": tmp_path}
    with torch.no_grad():
        for dynamic in (None, True):
            explain(Block(), torch.randn(2, 6, 16), dynamic=dynamic, options=options)
    fixed, symbolic = (tmp_path / f"graph_{i}_before.txt" for i in (0, 1))
    assert "[2, 6, 16]" in fixed.read_text()
    assert "[2, 6, 16]" not in symbolic.read_text()


# -- what it leaves to read ------------------------------------------------------------------------


def test_graphs_are_written_as_by_compiling(tmp_path: Path) -> None:
    with torch.no_grad():
        explain(Block(), torch.randn(2, 6, 16), options={"dump_dir": tmp_path})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "graph_0_after.txt",
        "graph_0_before.txt",
    ]
    after = (tmp_path / "graph_0_after.txt").read_text()
    assert after.startswith("# site ")
    assert after.splitlines()[1].startswith("# (root)  softmax   causal  B2 H2 G2 M6 N6 D8 ")
    assert '"f32[2, 2, 6, 8]"' in after


def test_sites_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad(), caplog.at_level(logging.INFO, "adaattn_compiler"):
        explain(WithGraphBreak(), torch.randn(2, 6, 16))
    said = [record.getMessage() for record in caplog.records]
    assert any(message.startswith("first: softmax, mask causal -> sdpa (") for message in said)
    (refused,) = (message for message in said if message.startswith("third: "))
    assert f"[{__file__}:" in refused


def test_source_is_shown_where_it_is_asked_for() -> None:
    def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(q.shape[2])
        keep = (place[:, None] >= place) & (place[:, None] - place < 64)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    tensors = torch.randn(3, 1, 8, 512, 64)
    options = {"kernels": "cpp", "measure": False}
    explanation = explain(window, *tensors, options=options, source=True)
    (site,) = explanation.sites
    assert site.kernel == "cpp"
    assert site.source is not None
    assert "mask: causal & window(64)" in site.source
    assert "const bool keep = !kMasked | " in site.source
    assert site.source in str(explanation)
    assert explain(window, *tensors, options=options).sites[0].source is None
    other = explain(window, *tensors, options={"kernels": "sdpa"}, source=True)
    assert other.sites[0].source is None


def test_options_of_a_compiled_model_are_said_not_to_be_taken_over() -> None:
    compiled = torch.compile(SdpaBlock(), backend="adaattn", options={"kernels": "strips"})
    x = torch.randn(2, 64, 16)
    with torch.no_grad():
        plain = explain(compiled, x)
        given = explain(compiled, x, options={"kernels": "strips"})
    assert any("pass options=" in note for note in plain.notes)
    assert not any("pass options=" in note for note in given.notes)
    assert {site.kernel for site in given.sites} == {"strips"}
