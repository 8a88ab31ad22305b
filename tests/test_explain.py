"""What `explain` says of a model: its records, its table, its JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from families import bert, llama, tokens

from adaattn_compiler import Explanation, SiteRecord, explain


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


def test_fields_named_in_the_readme_exist() -> None:
    names = {field.name for field in dataclasses.fields(SiteRecord)}
    wanted = "name ordinal kind lowered reason spelling mask kernel decision"
    assert set(wanted.split()) <= names


def test_json_holds_the_same(broken: Explanation) -> None:
    read = json.loads(broken.to_json())
    sites = tuple(SiteRecord(**site) for site in read["sites"])
    assert sites == broken.sites
    again = Explanation(sites, tuple(read["notes"]), read["graphs"], read["seconds"])
    assert again == broken


def test_time_of_each_pass_is_kept(broken: Explanation) -> None:
    assert {"canonicalize", "match", "validate", "lower"} <= broken.seconds.keys()
    assert all(spent >= 0 for spent in broken.seconds.values())


def test_table_is_aligned(broken: Explanation) -> None:
    head, header, *rows = str(broken).splitlines()
    assert head == "3 of 4 attention sites lowered, 2 graph(s)"
    assert len(rows) == 4
    for word in ("spelling", "mask", "kernel"):
        at = header.index(word)
        assert all(row[at - 2 : at] == "  " and row[at] != " " for row in rows)
    assert rows[2].startswith("second#1 ")
    assert "inductor" in rows[3]


def test_table_as_printed() -> None:
    record = SiteRecord(
        "layers.0.attn", 0, "attention", True, None, "softmax", "causal", "sdpa", "exact", "B1 H2"
    )
    refused = SiteRecord(
        "", 1, "attention", False, "no kernel", "sdpa", None, None, None, None, graph=1
    )
    explanation = Explanation((record, refused), ("graph 1 was left to Inductor: x",), 2)
    assert str(explanation) == (
        "1 of 2 attention sites lowered, 2 graph(s)\n"
        "site           spelling  mask    shape  kernel    decision  reason\n"
        "layers.0.attn  softmax   causal  B1 H2  sdpa      exact\n"
        "(root)#1       sdpa      -       -      inductor  -         no kernel\n"
        "graph 1 was left to Inductor: x"
    )


def test_model_without_attention() -> None:
    explanation = explain(torch.nn.Linear(4, 4), torch.randn(2, 4))
    assert explanation.sites == ()
    assert str(explanation) == "0 of 0 attention sites lowered, 1 graph(s)"
    assert json.loads(explanation.to_json())["sites"] == []


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
    assert all(site.lowered for site in explanation.sites)


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
