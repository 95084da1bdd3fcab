"""The dual metric: EL by its definition, bands by hand, and every quadrant planted in a tiny world."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import _scratch, one_thread, open_target, tiny_case

from audit.case import Case
from audit.evidence import Evidence
from audit.gather import Run, capture_all
from audit.plan import Generate
from audit.progress import SILENT
from audit.record import Finding
from audit.scan import take_inventories
from detectors.knowledge import Knowledge
from probes.attribute import ridge_readout
from probes.dual import Dual, beyond, extraction_likelihood, named, quadrants, readout_ranks
from probes.readout import in_halves
from reports.plots import draw

# --- what is said


def test_named_by_hand():
    assert named("in Paris, they say", "Alma lives in", "Paris") == 1
    assert named("PARIS", "Alma lives in", "paris") == 1
    assert named("a parish", "Alma lives in", "Paris") == 0, "whole words"
    assert named("the red house", "Where does Alma live?", "the red mill") == pytest.approx(2 / 3)
    assert named("Alma was here", "Where does Alma live?", "Alma lives in Oslo") == 0, "what was asked is no answer"
    assert named("Alma", "Alma is", "Alma") == 1, "unless the answer is nothing else"
    assert named("?", "What is it?", "?!") == 0


def test_extraction_likelihood_by_hand():
    assert extraction_likelihood([1]) == extraction_likelihood([1] * 3) == extraction_likelihood([1] * 12) == 1
    assert extraction_likelihood([0]) == extraction_likelihood([1, 0, 1]) == 0, "a short answer is said whole or not"
    # T = 12, n = 10: prefixes of 0, 1, 2 tokens, with 3, 2, 1 n-grams to come.
    assert extraction_likelihood([0] + [1] * 11) == pytest.approx((0 + 1 + 1) / 3)
    assert extraction_likelihood([1] * 11 + [0]) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert extraction_likelihood([1, 1, 0, 1], n=1) == pytest.approx((2 / 4 + 1 / 3 + 0 + 1) / 4)
    for match, n in (([], 10), ([[1]], 10), ([1], 0)):
        with pytest.raises(ValueError, match="needed"):
            extraction_likelihood(match, n)


def by_definition(text: list[int], match: list[bool], after: list[int], n: int) -> float:
    """Jang et al.'s EL_n of a model that writes `after[i]` at place i once it has slipped, however it slipped."""
    length, overlaps = len(text), []
    n = min(n, length)

    def grams(tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

    for t in range(length - n + 1):
        written, slipped = [], False
        for i in range(t, length):
            written.append(after[i] if slipped else text[i] if match[i] else -1)
            slipped = slipped or not match[i]
        found = grams(written)
        overlaps.append(sum(gram in set(grams(text[t:])) for gram in found) / len(found))
    return float(np.mean(overlaps))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_extraction_likelihood_is_jang_s_where_nothing_comes_back_after_a_slip(data):
    length, n = data.draw(st.integers(1, 16)), data.draw(st.integers(1, 11))
    text = list(range(length))  # all different: what follows a slip can only repeat it by having the token
    match = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    found = extraction_likelihood(match, n)
    assert found == pytest.approx(by_definition(text, match, [-1] * length, n))
    after = data.draw(st.lists(st.integers(0, length - 1), min_size=length, max_size=length))
    assert found <= by_definition(text, match, after, n) + 1e-12, "a lower bound in any case"


# --- bands and quadrants


def test_beyond_a_band_by_hand():
    assert beyond([18, 19, 19.1, 30], np.arange(20)).tolist() == [False, False, True, True], "of 20, all are in it"
    assert beyond([94, 95, 96], np.arange(100)).tolist() == [False, False, True]
    alone = beyond(np.arange(20))
    assert alone.tolist() == [False] * 19 + [True], "each against the others"
    assert not beyond(np.ones(30)).any(), "the tied are not beyond"
    both = beyond(np.stack([np.arange(20), -np.arange(20)], axis=1))
    assert (both.sum(axis=0) == 1).all()
    assert both[-1].tolist() == [True, False]


@pytest.mark.parametrize("entities", [12, 40])
def test_never_taught_entities_are_as_often_beyond_the_band_as_its_own(entities):
    rng = np.random.default_rng(entities)
    own, new = [], []
    for _ in range(400):
        band = rng.normal(size=entities)
        own.append(beyond(band).mean())
        new.append(beyond(rng.normal(size=entities), band).mean())
    assert np.mean(new) < 0.1
    assert np.mean(own) == pytest.approx(np.mean(new), abs=0.02)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_quadrants_are_counted(places):
    found = quadrants([a for a, _ in places], [b for _, b in places])
    corners = {"retained": (1, 1), "obfuscation": (0, 1), "erasure": (0, 0), "guessed": (1, 0)}
    assert found == {name: places.count(corner) / len(places) for name, corner in corners.items()}


def test_ranks_are_those_of_the_attribute_readout():
    rng = np.random.default_rng(3)
    rows, tokens = 48, 7
    code = rng.normal(size=(tokens, 24))
    sets = ("retain", "forget", "holdout")
    right = {name: rng.integers(0, tokens, rows) for name in sets}
    options = {}
    for name in sets:
        options[name] = np.array([[r, *(o for o in range(tokens) if o != r)] for r in right[name]])
        options[name][: rows // 2, -2:] = -1
    noise = {"retain": 0.5, "forget": 1.0, "holdout": 50.0}
    states = {name: code[right[name]] + noise[name] * rng.normal(size=(rows, 24)) for name in sets}
    likeness = rng.normal(size=(tokens, 9))
    likeness = likeness @ likeness.T
    halves = in_halves([f"person {i // 3}" for i in range(rows)], seed=0)
    ranks = readout_ranks(states, options, likeness, halves)
    wins, _ = ridge_readout(states, options, likeness, halves, seed=0)
    for name in sets:
        assert (ranks[name] == 1).astype(float).tolist() == wins[name].tolist()
        wrong = np.where(np.arange(rows) < rows // 2, tokens - 3, tokens - 1)
        beaten = ranks[name] * wrong
        assert beaten == pytest.approx(beaten.round()), "of as many wrong options as a row has"
    assert 0.2 < wins["forget"].mean() < 1, "neither all nor none"
    assert ranks["holdout"].mean() == pytest.approx(0.5, abs=0.15)
    assert ranks["forget"].mean() > 0.7


def test_a_readout_that_is_unsure_of_all_it_reads_is_at_chance():
    """States that were all pushed to one place, as by a refusal: right answers do not lag, and do not lead either."""
    rng = np.random.default_rng(4)
    rows, tokens = 120, 6
    code = rng.normal(size=(tokens, 16))
    right = {name: rng.integers(0, tokens, rows) for name in ("retain", "forget", "holdout")}
    options = {name: np.array([[r, *(o for o in range(tokens) if o != r)] for r in of]) for name, of in right.items()}
    states = {name: code[rng.permutation(of) if name == "holdout" else of] for name, of in right.items()}
    states["forget"] = np.full((rows, 16), 0.01) + 1e-6 * rng.normal(size=(rows, 16))
    halves = in_halves([f"person {i // 4}" for i in range(rows)], seed=0)
    ranks = readout_ranks(states, options, np.eye(tokens), halves)
    assert ranks["forget"].mean() == pytest.approx(0.5, abs=0.1)
    assert ranks["holdout"].mean() == pytest.approx(0.5, abs=0.15)


# --- a tiny world


@cache
def captured(made: str, original: bool = False) -> tuple[Case, Evidence]:
    models = {"target": made, **({"original": "original"} if original else {})}
    case = tiny_case(models, ("forget", "retain", "holdout"))
    run = Run(case, _scratch() / "dual", SILENT, [Dual()], [])
    with one_thread():
        evidence = capture_all(run, take_inventories(case))
    assert not run.not_run
    return case, evidence


class Mixed:
    """The evidence of a model that has the inside of one and speaks like another."""

    def __init__(self, inside: Evidence, outside: Evidence) -> None:
        self.inside, self.outside = inside, outside

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inside, name)

    def texts(self, role: str, name: str) -> list[str]:
        return self.outside.texts(role, name)

    def iterate(self, role: str, name: str, *quantities: str) -> Iterator[Any]:
        of = self.outside if name.endswith("/answer") else self.inside
        return of.iterate(role, name, *quantities)


@cache
def found_in(inside: str, outside: str) -> dict[str, Finding]:
    case, evidence = captured(inside)
    mixed: Any = Mixed(evidence, captured(outside)[1])
    return {finding.id: finding for finding in Dual().measure(case, mixed)}


def shares(finding: Finding, name: str, role: str = "target") -> dict[str, float]:
    assert finding.table is not None
    [row] = [row for row in finding.table.rows if row[:2] == [role, name]]
    return dict(zip(finding.table.columns[2:6], row[2:6], strict=True))


@pytest.mark.parametrize(
    ("inside", "outside", "quadrant"),
    [
        ("original", "original", "retained"),
        ("original", "retrained", "obfuscation"),
        ("retrained", "retrained", "erasure"),
        ("retrained", "original", "guessed"),
    ],
)
def test_each_quadrant_is_found_where_it_was_planted(inside, outside, quadrant):
    finding = found_in(inside, outside)["dual/obfuscation"]
    assert shares(finding, "forget")[quadrant] > 0.6, "most; a band of twelve is a rough one"
    assert shares(finding, "holdout")["erasure"] > 0.8, "and those who were never taught are where nothing is"
    assert finding.controls[0].passed, "retained entities leave a trace"
    if quadrant == "obfuscation":
        assert finding.estimate > 0.8
        assert finding.p_value < 0.01
    else:
        assert abs(finding.estimate) < 0.2
        assert finding.p_value > 0.05


def test_what_is_said_is_seen_and_decides_nothing():
    spoken, silent = found_in("retrained", "original"), found_in("original", "retrained")
    for name in ("dual/mention", "dual/extraction"):
        assert spoken[name].estimate > 0.5
        assert spoken[name].p_value < 0.01
        assert abs(silent[name].estimate) < 0.2
        assert spoken[name].decides == (False, False)
    assert spoken["dual/obfuscation"].decides == (True, False)


def test_mention_is_what_the_model_writes_when_asked():
    case, _ = captured("original")
    target, rows = open_target("original"), case.rows("forget", 40)
    request = next(r for r in Dual().requests(case, target) if r.name == "forget/continued")
    assert isinstance(request, Generate)
    said = []
    for row in rows:
        [ids] = target.generate([target.encode_prompt(row.prompt)], request.new_tokens)
        said.append(float(row.answer in target.decode(ids).split()))
    finding = found_in("original", "original")["dual/mention"]
    assert finding.level == pytest.approx(np.mean(said))
    # The tiny world's answers are one word: extraction is whether that word comes first.
    first = [target.generate([target.encode_prompt(row.prompt)], 1)[0][0] for row in case.rows("forget")]
    right = [target.encode(row.prompt, row.answer).ids[-1] for row in case.rows("forget")]
    extraction = found_in("original", "original")["dual/extraction"]
    assert extraction.level == pytest.approx(np.mean(np.equal(first, right)))


def test_the_picture_shows_every_entity_and_the_band():
    figure = found_in("original", "retrained")["dual/obfuscation"].figure
    assert figure is not None
    assert {s.label: len(s.x) for s in figure.series} == {"forget": 12, "holdout": 12, "retain": 12}
    [limit] = figure.reference_lines.values()
    points = {s.label: s for s in figure.series}
    assert limit == pytest.approx(max(points["holdout"].y), rel=1e-5), "of twelve, the largest"
    assert min(points["forget"].y) > limit
    assert np.mean(points["forget"].x) < 0.2 < np.mean(points["retain"].x)
    assert draw(figure).startswith("<svg")


def test_with_the_original_it_says_what_persists():
    case, evidence = captured("unlearned", original=True)
    finding = Dual().measure(case, evidence)[-1]
    [persistence] = [c for c in finding.controls if c.name == "persistence"]
    assert persistence.passed is None, "shown, and gates nothing"
    here, before = shares(finding, "forget"), shares(finding, "forget", "original")
    traced = {name: of["retained"] + of["obfuscation"] for name, of in (("target", here), ("original", before))}
    assert traced["original"] > 0.8
    assert persistence.n == round(traced["original"] * 12)
    assert persistence.estimate <= traced["target"] / traced["original"] + 1e-9
    assert finding.controls[0].passed


def test_requests_are_those_of_others():
    case, target = tiny_case({"target": "original"}), open_target("original")
    asked = {r.name: r for r in Knowledge().requests(case, target)}
    made = {r.name: r for r in Dual().requests(case, target)}
    assert set(made) - set(asked) == {"dual/forget", "dual/holdout", "dual/retain"}
    for name in set(made) & set(asked):
        assert made[name] == asked[name]
    assert Dual().requests(case, target.altered("someone@1", "recipe")) == []


def test_missing_says_what_it_cannot_do_without():
    assert Dual().missing(tiny_case({"target": "original"})) is None
    assert Dual().missing(tiny_case({"target": "original"}, ("forget", "retain"))) == "needs the holdout set"
    case = tiny_case({"target": "original"})
    few = dict(case.sets)
    few["holdout"] = type(few["holdout"])("holdout", "", few["holdout"].examples[:12], "")
    reason = Dual().missing(Case(case.name, case.models, case.specs, few, case.options))
    assert reason == "needs at least 8 entities in the holdout set"
