"""The report's page: whole, self-contained, and harmless whatever names a model has."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import pytest
import tiny_model
import torch

from adaattn_compiler.calibrate import pictures
from adaattn_compiler.calibrate.cells import DecidedSite, error_cell, keys_cell, kind_cell
from adaattn_compiler.calibrate.given import batches_of
from adaattn_compiler.calibrate.pictures import Point
from adaattn_compiler.calibrate.report import page, speedups
from adaattn_compiler.calibrate.run import Calibration, calibration
from adaattn_compiler.decision import HeadDecision, Pattern, describe_head
from adaattn_compiler.policy import Budget

EVIL = '<script>alert("1")</script>&'
_VOID = {"meta", "br", "rect", "line", "circle", "polyline"}


class Read(HTMLParser):
    """A page's tags, attributes and texts; tags that are not closed in order are refused."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


@pytest.fixture(scope="module")
def found() -> Calibration:
    """Of the tiny model, as measured, but with times that are always the same."""
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.fixed_times(patch)
        torch.compiler.reset()
        batches = batches_of(tiny_model.batches(2))
        return calibration(tiny_model.build(), batches, Budget("budget", 0.05))


@pytest.fixture(scope="module")
def read(found: Calibration) -> Read:
    return Read(page(found, "tiny_model:build", 12.5))


def test_every_head_of_every_site_is_there(read: Read) -> None:
    tooltips = read.texts["title"]
    for site in tiny_model.SITES:
        assert site in read.texts["h3"]
        for head in range(tiny_model.HEADS):
            ours = [text for text in tooltips if text.startswith(f"{site}, head {head}: ")]
            assert len(ours) == 6  # representation, precision, keys, error; entropy, rank
            assert "attends to" in ours[0]
            assert "(p99), budget 5%" in ours[0]
            assert "nats, " in ours[4]
            assert "effective rank " in ours[5]
    rows = read.tags.count("tr")
    assert rows > len(tiny_model.SITES) * tiny_model.HEADS


def test_it_says_what_it_is(read: Read, found: Calibration) -> None:
    texts = " ".join(text for each in read.texts.values() for text in each)
    assert read.texts["h1"] == ["Calibration of tiny_model:build"]
    assert "the cheapest way that the budget allows" in texts
    assert "budget of each head" in texts
    assert found.policy.key() in texts
    assert torch.__version__ in texts
    assert "12 s" in texts
    for heading in (
        "What each head does",
        "What each head is like",
        "Error against cost",
        "Where it comes from",
    ):
        assert heading in read.texts["h2"]


def test_every_candidate_is_a_point(read: Read, found: Calibration) -> None:
    candidates = sum(len(site.candidates) for site in found.sites.values())
    assert read.tags.count("circle") == candidates
    chosen = [text for text in read.texts["title"] if "; chosen by head" in text]
    decided = [set(map(describe_head, site.decision.heads)) for site in found.policy.sites]
    assert len(chosen) == sum(len(each) for each in decided)


def test_nothing_comes_from_elsewhere(read: Read, found: Calibration) -> None:
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(read.tags)
    assert not {"src", "href", "onclick"} & {name for name, _ in read.attributes}
    assert "url(" not in page(found, "x", 1.0)
    assert "prefers-color-scheme: dark" in "".join(read.texts["style"])


def test_names_are_escaped(found: Calibration) -> None:
    """Those of a model, its sites, its device and versions."""
    site, *others = found.policy.sites
    named = dataclasses.replace(site, name=EVIL)
    origin = dataclasses.replace(found.policy.provenance, device=EVIL)
    policy = dataclasses.replace(found.policy, sites=(named, *others), provenance=origin)
    (key, measured), *rest = found.sites.items()
    sites = {dataclasses.replace(key, name=EVIL): measured, **dict(rest)}
    text = page(dataclasses.replace(found, policy=policy, sites=sites), EVIL, 1.0)
    assert "<script" not in text
    read = Read(text)
    assert read.texts["h1"] == [f"Calibration of {EVIL}"]
    assert any(each.startswith(f"{EVIL}, head 0: ") for each in read.texts["title"])


def test_cells_say_what_was_decided(found: Calibration) -> None:
    site = found.policy.sites[0].replaced(decision=HeadDecision(pattern=Pattern(64)), head=1)
    key = next(iter(found.sites))
    decided = DecidedSite(site, found.sites[key], None)
    cell = kind_cell(decided, 1)
    assert (cell.style, cell.text) == ("window", "64")
    # Of the ten blocks of 4 x 4 that are causal: the diagonal and the one before it.
    assert keys_cell(decided, 1).text == "70"
    assert "error - (mean)" in error_cell(decided, 1).tooltip


def test_speedups_in_a_sentence(found: Calibration) -> None:
    key = next(iter(found.sites))
    text = speedups(dataclasses.replace(found, chosen={key: (0.002, 0.001)}))
    assert "as predicted head by head; " in text
    assert text.endswith("x measured")


def test_curves_of_errors_that_are_no_numbers() -> None:
    points = [
        Point("exact", 1.0, 0.0, 0.0, 0.0, (0,)),
        Point("broken", 0.5, 0.1, float("inf"), float("inf"), ()),
    ]
    text = pictures.curve("x", points, pictures.axes_of([points], None))
    assert "not finite" in text
    assert "nan" not in text
