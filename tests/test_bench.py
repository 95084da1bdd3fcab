"""The bench: its tables against counting by hand, its rows kept and found again, a plug-in's row for nothing."""

from __future__ import annotations

import json
import sys
from itertools import product
from statistics import fmean

import pytest
import torch
from typer.testing import CliRunner
from worlds import audit_here

from audit import instrument
from audit.bench import pool
from audit.bench.fit import FLOOR, MARGIN, fit, held_out, label_of, scanned_alike, thresholds
from audit.bench.hidden import hidden_lines, together
from audit.bench.rows import Row, read_rows, run, write_rows
from audit.bench.tables import alike, tables, truth
from audit.bench.text import markdown
from audit.errors import BadInput
from audit.organisms import families
from audit.organisms.families import Teaching
from audit.organisms.histories import BY_CONSTRUCTION
from audit.organisms.recipes import Recipe
from audit.organisms.world import make_world
from audit.profile import Domain, fitting, read_profile, shipped
from audit.record import Control, Finding, InstrumentCost, Label, Outcome, Question, Side

SEES = Control(name="positive control", description="retain", estimate=0.9, passed=True, gates="silence")


def finding(identity: str, question: Question, effect: float, **values) -> Finding:
    """Measured tightly: an effect beyond 0.1 is significant, a smaller one excludes 0.1."""
    loud = abs(effect) >= 0.1
    given = {
        "id": identity,
        "instrument": identity.split("/")[0],
        "question": question,
        "statistic": identity,
        "split": "forget vs holdout",
        "estimate": effect,
        "ci95": (effect - 0.02, effect + 0.02),
        "n": 40,
        "orientation": "more is left",
        "null": "as never taught",
        "p_value": 1e-4 if loud else 0.5,
        "threshold": 0.1,
        "controls": [SEES],
        "reference": "nobody 2024",
        "verdict": Outcome.EVIDENCE if loud else Outcome.NONE,
        "side": (Side.REMAINS if effect > 0 else Side.BEYOND) if loud else Side.NEITHER,
    }
    return Finding(**given | values)


def row(label: str, effect: float, *, history: str = "", seed: int = 0, family: str = "llama", **values) -> Row:
    """An organism in which every statistic shows the same effect; over-unlearned ones avoid right answers."""
    history = history or label
    findings = [
        finding("knowledge/choice", Question.LEAKAGE, effect, decides=(True, True)),
        finding("lens/choice", Question.REPRESENTATION, max(effect, 0.0)),
        finding("relearn/pace", Question.RECOVERY, max(effect, 0.0)),
    ]
    given = {
        "key": "0", "name": f"{family}-{history}-{seed}", "family": family, "seed": seed, "history": history,
        "label": label, "control": False, "findings": findings, "verdict": Label.INCONCLUSIVE, "parameters": 100,
        "entities": 40, "cost": {"lens": InstrumentCost(seconds=2.0)},
    }  # fmt: skip
    return Row(**given | values)


def benched() -> list[Row]:
    """Two bases, two seeds: what every class should look like."""
    made = []
    for family, seed in product(("llama", "gpt-neox"), (0, 1)):
        where = {"family": family, "seed": seed}
        made += [
            row("not-unlearned", 0.85, history="original", **where),
            row("suppressed", 0.3, history="hidden", **where),
            row("deleted", 0.01, history="retrained", **where),
            row("deleted", 0.03, history="retrained-other-seed", **where),
            row("over-unlearned", -0.12, history="beyond", **where),
            row("unlearned", 0.2, history="npo", method="npo", **where),
        ]
    return made


# --- the tables


def test_truth_is_what_was_done():
    assert [truth(row(label, 0), Question.LEAKAGE) for label in ("not-unlearned", "suppressed", "deleted")] == [
        True, True, False,
    ]  # fmt: skip
    assert truth(row("unlearned", 0), Question.RECOVERY) is None
    assert truth(row("unlearned", 0), Question.TRACE) is True
    assert truth(row("deleted", 0), Question.TRACE) is False
    assert truth(row("deleted", 0, method="refusal-head"), Question.TRACE) is None
    assert truth(row("changed", 0), Question.TRACE) is False
    assert truth(row("deleted", 0), Question.UTILITY) is None


def test_a_profile_is_made_of_rows_that_hold_all_statistics():
    rows = benched()
    short = rows[1].model_copy(update={"findings": rows[1].findings[:2]})
    guarded = row("suppressed", 0, history="guard", access="text").model_copy(update={"findings": []})
    assert scanned_alike([rows[0], short, *rows[2:], guarded]) == [rows[0], *rows[2:], guarded]


def test_what_is_hidden_is_ranked_by_history_and_judged_by_other_families():
    rows = benched()
    lines = hidden_lines(rows)
    assert [line.statistic for line in lines] == ["lens/choice", "relearn/pace", "", "", ""]
    assert all(line.by_history["hidden"].estimate == 1.0 and line.by_history["hidden"].n == 4 for line in lines)
    both = lines[-1]
    assert both.found.estimate == 1.0 and both.false_positives.estimate == 0.0 and both.false_positives.n == 8
    # An effect of 0.3 in units of the threshold of 0.1: the others stay below it.
    joint = together([r for r in rows if r.label in ("suppressed", "deleted")], ["lens/choice"], "llama-0")
    assert joint["llama-hidden-0"] == pytest.approx(3.0)
    # One family's never-taught model that stands out is a false alarm there, and raises the others' threshold.
    odd = [row("deleted", 0.2, history="retrained") if r.name == "llama-retrained-0" else r for r in rows]
    judged = hidden_lines(odd)[-1]
    assert judged.false_positives.estimate == pytest.approx(1 / 8)
    assert judged.found.estimate == pytest.approx(4 / 4)


def test_faithfulness_is_the_share_of_pairs_in_the_right_order():
    suppressed, never = [0.3, 0.05, 0.2, 0.2], [0.1, 0.0, 0.2]
    rows = [row("suppressed", e, history=f"s{i}") for i, e in enumerate(suppressed)]
    rows += [row("deleted", e, history=f"d{i}") for i, e in enumerate(never)]
    [line] = [x for x in tables(rows).instruments if x.instrument == "lens"]
    by_hand = fmean((a > b) + 0.5 * (a == b) for a, b in product(suppressed, never))
    assert line.suppressed.estimate == pytest.approx(by_hand)
    assert line.taught is None  # nobody was taught and left alone
    assert line.false_positives.estimate == pytest.approx(2 / 3) and line.false_positives.n == 3
    assert line.power.estimate == pytest.approx(3 / 4)
    assert line.seconds == 2.0


def test_a_statistic_that_points_down_is_turned():
    def turned(label, effect):
        down = finding("membership/privleak", Question.LEAKAGE, effect, sides=(Side.BEYOND, Side.REMAINS))
        return row(label, 0.0, history=f"{label}{effect}", findings=[down])

    rows = [turned("suppressed", -0.4), turned("suppressed", -0.3), turned("deleted", 0.0), turned("deleted", 0.2)]
    assert tables(rows).instruments[0].suppressed.estimate == 1.0


def test_an_instruments_line_is_its_largest_statistic():
    def two(label, small, large):
        found = [finding("a/x", Question.LEAKAGE, small), finding("a/y", Question.LEAKAGE, large, threshold=0.5)]
        return row(label, 0, history=f"{label}{small}", findings=found)

    rows = [
        two("suppressed", 0.3, 0.0),
        two("suppressed", 0.31, 0.0),
        two("deleted", 0.0, 0.6),
        two("deleted", 0.1, 1.0),
    ]
    whole, x, y = tables(rows).instruments
    assert (whole.statistic, x.statistic, y.statistic) == ("", "x", "y")
    assert (whole.suppressed.estimate, x.suppressed.estimate, y.suppressed.estimate) == (1.0, 1.0, 0.0)


def test_robustness_by_hand():
    def at(history, level):
        return row(
            "unlearned", 0, history=history, findings=[finding("lens/choice", Question.REPRESENTATION, 0, level=level)]
        )

    rows = [
        at("npo", 0.2), at("npo+nf4", 0.3), at("npo+relearned", 0.5),
        at("retrained", 0.1), at("retrained+relearned", 0.2),
    ]  # fmt: skip
    [line] = tables(rows).instruments
    assert line.q == pytest.approx(1 - 0.1 / 0.5)
    assert line.r == pytest.approx(1 - 0.2 / 0.4)  # changes of 0.3 and 0.1
    assert line.harmonic == pytest.approx(2 / (1 / line.q + 1 / line.r))
    assert alike(0, 0) == 1 and alike(1, -1) == 0 and alike(0.2, 0.2) == 1


def test_the_broken_and_the_attacked_are_in_no_pool():
    rows = [*benched(), row("deleted", 0.9, history="retrained+nf4"), row("unlearned", 0, history="ga", broken="gone")]
    made = tables(rows)
    assert made.organisms == tables(benched()).organisms
    assert made.broken == {"llama-ga-0": "gone"}
    assert "llama-ga-0: gone" in markdown(made)


def test_the_confusion_matrix_counts():
    rows = benched()
    made = tables(rows, lambda r: Label.DELETED if r.label == "deleted" else Label.SUPPRESSED).verdicts
    assert made.counts["suppressed"]["suppressed"] == 4
    assert made.counts["not-unlearned"]["suppressed"] == 4
    assert made.by_history["retrained"]["deleted"] == 4
    assert made.balanced_accuracy.estimate == pytest.approx((0 + 1 + 1 + 0) / 4)
    assert made.false_positives.estimate == 0 and made.false_positives.n == 8
    assert 0.3 < made.false_positives.hi < 0.4  # 1 - 0.025^(1/8)
    assert set(made.counts) == {*BY_CONSTRUCTION, "unlearned"}


# --- the fit


def test_thresholds_are_the_largest_effects_of_the_never_taught():
    fitted = thresholds([row("deleted", 0.06), row("deleted", -0.04)])
    assert fitted["knowledge/choice"] == pytest.approx((0.1, MARGIN * 0.04))
    assert fitted["lens/choice"] == pytest.approx((0.1, FLOOR * 0.1))
    assert thresholds([row("deleted", 0.2)])["lens/choice"] == pytest.approx((MARGIN * 0.2, FLOOR * 0.1))


def test_held_out_verdicts_are_fitted_on_the_unlike(monkeypatch):
    from audit.bench import fit as module

    rows = benched()
    used: list[tuple[Row, ...]] = []
    monkeypatch.setattr(module, "thresholds", lambda never: used.append(tuple(never)) or {})
    verdict = held_out(rows)
    for one in rows:
        verdict(one)
        for other in used[-1]:
            assert other.family != one.family and other.seed != one.seed and other.history != one.history
    assert {len(group) for group in used} == {1, 2}


def test_a_fit_finds_the_classes_and_counts_its_errors():
    profile = fit(benched(), name="made", budget="standard")
    assert profile.balanced_accuracy[0] == 1.0
    assert profile.false_positives.estimate == 0 and profile.false_positives.n == 8
    assert profile.false_positives.upper95 == pytest.approx(1 - 0.05 ** (1 / 8))
    assert profile.power.estimate == 1 and profile.power.lower95 == pytest.approx(0.05 ** (1 / 4))
    assert profile.organisms["deleted"] == 8
    wrong = [r if r.name != "llama-retrained-0" else row("deleted", 0.5, history="retrained") for r in benched()]
    assert fit(wrong, name="made", budget="standard").false_positives.estimate == pytest.approx(1 / 8)


def test_a_fit_needs_enough_that_was_scanned_alike():
    with pytest.raises(BadInput, match="a profile needs 8"):
        fit(benched()[:6], name="few", budget="standard")
    odd = benched()
    odd[0] = odd[0].model_copy(update={"findings": odd[0].findings[:2]})
    with pytest.raises(BadInput, match="relearn/pace was not found in all"):
        fit(odd, name="odd", budget="standard")


def test_a_fitted_threshold_changes_a_verdict():
    edited = row("deleted", 0.12)
    assert label_of(edited, {}) == Label.SUPPRESSED
    raised = {"knowledge/choice": (0.2, 0.2), "lens/choice": (0.2, 0.2), "relearn/pace": (0.2, 0.2)}
    assert label_of(edited, raised) == Label.INCONCLUSIVE


# --- profiles


def test_a_profile_fits_its_own_cases_and_no_others(tmp_path):
    profile = fit(benched(), name="made", budget="standard", release="1")
    path = tmp_path / "profile.json"
    path.write_text(profile.to_json())
    assert read_profile(path) == profile
    case = profile.domain.model_copy(update={"parameters": (100, 100), "entities": (40, 40)})
    assert fitting(case, [profile]) == (profile, [])
    for change, word in (
        ({"budget": "quick"}, "budget is quick"),
        ({"access": "text"}, "access is text"),
        ({"roles": ("target",)}, "models are target"),
        ({"sets": ("forget", "retain", "utility")}, "no holdout set"),
        ({"parameters": (10**9, 10**9)}, "1,000,000,000"),
        ({"entities": (2, 2)}, "forget entities: 2"),
        ({"statistics": case.statistics[1:]}, "knowledge/choice"),
    ):
        found, reasons = fitting(case.model_copy(update=change), [profile])
        assert found is None and word in reasons[0], (change, reasons)


def test_what_a_profile_has_not_measured_decides_nothing():
    profile = fit(benched(), name="made", budget="standard", release="1")
    case = profile.domain.model_copy(update={"parameters": (100, 100), "entities": (40, 40)})
    more = case.model_copy(update={"statistics": (*case.statistics, "new/one")})
    assert fitting(more, [profile]) == (profile, [])
    row = next(row for row in benched() if row.findings)
    known = next(f for f in row.findings if f.id in profile.domain.statistics and any(f.decides))
    new = known.model_copy(update={"id": "new/one", "fitted": None})
    assert profile.unmeasured([known, new]) == ["new/one"]
    first, second = profile.applied([known, new])
    assert first.decides == known.decides
    assert second.decides == (False, False)


def test_kept_rows_are_judged_by_a_profile_that_is_named(tmp_path, monkeypatch, capsys):
    rows, path = tmp_path / "rows.jsonl.gz", tmp_path / "profile.json"
    write_rows(benched(), rows)
    profile = fit(benched(), name="made", budget="standard")
    blind = profile.model_copy(update={"name": "blind", "thresholds": dict.fromkeys(profile.thresholds, (9.0, 9.0))})
    said = {}
    for each in (profile, blind):
        path.write_text(each.to_json())
        assert audit_here(monkeypatch, "bench", "--rows", rows, "--profile", path) == 0
        said[each.name] = capsys.readouterr().out
        assert f"the thresholds of the profile {each.name}" in " ".join(said[each.name].split())
    verdicts = {name: text.partition("## Verdicts")[2] for name, text in said.items()}
    assert verdicts["made"] != verdicts["blind"].replace("blind", "made")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": "other"}'])
def test_what_is_no_profile_is_bad_input(text, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(BadInput, match="no reference profile"):
        read_profile(path)


def test_every_shipped_profile_is_whole():
    for profile in shipped():
        assert profile.false_positives.n > 0 and profile.false_positives.upper95 is not None
        assert isinstance(profile.domain, Domain) and profile.thresholds
        assert set(profile.thresholds) == set(profile.domain.statistics)


# --- rows


@pytest.fixture
def small(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = {"forget": 6, "retain": 8, "holdout": 6, "public": 4, "unknown": 1}
    monkeypatch.setattr(families, "make_world", lambda seed, **_: make_world(seed, **sizes))
    monkeypatch.setattr(families, "FROM_SCRATCH", Teaching(2, 1.4e-3, 64))
    monkeypatch.setattr("audit.organisms.recipes._fault", lambda history, measured: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A third party's instrument, installed as any other: a module and its entry point on the path."""
    (tmp_path / "toy_instrument.py").write_text(
        "from audit.instrument import Access, Instrument\n"
        "from audit.record import Finding, Question\n"
        "class Toy(Instrument):\n"
        "    name, title, question = 'toy', 'a toy', Question.REPRESENTATION\n"
        "    access, reference = Access.LOGPROBS, 'nobody'\n"
        "    def requests(self, case, target):\n"
        "        return []\n"
        "    def measure(self, case, evidence):\n"
        "        return [Finding(id='toy/one', instrument='toy', question=self.question, statistic='one', split='',\n"
        "            estimate=0.5, ci95=(0.4, 0.6), n=3, orientation='none', null='none', threshold=0.1,\n"
        "            reference='nobody')]\n"
    )
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[palimpsest.instruments]\ntoy = toy_instrument:Toy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("toy_instrument", None)


def test_rows_are_kept_and_a_plug_in_gets_its_line(small, tmp_path, request, monkeypatch):
    root = tmp_path / "bench"
    recipes = [Recipe("llama", "original", 0), Recipe("llama", "int8", 0)]
    # Of the installed ones a few: each costs the scan of two organisms.
    few = {"knowledge", "lens", "relearn", "utility", "toy"}
    monkeypatch.setattr("audit.bench.rows.everyday", lambda: [n for n in instrument.everyday() if n in few])
    seen: list[str] = []
    [alone] = run(recipes[:1], root, budget="quick", workers=1, only=["knowledge"])
    assert alone.instruments == ["knowledge"] == sorted({f.instrument for f in alone.findings})
    first = run(recipes, root, budget="quick", workers=1, told=lambda name, done, total: seen.append(name))
    assert seen == [r.name for r in recipes]
    assert [r.label for r in first] == ["not-unlearned", "not-unlearned"] and first[1].control
    assert all(r.findings and r.verdict is not None for r in first)
    assert not any(f.figure or f.table for r in first for f in r.findings)
    written = {path.name: path.stat().st_mtime_ns for path in (root / "rows").iterdir()}
    assert run(recipes, root, budget="quick", workers=1) == first
    assert {path.name: path.stat().st_mtime_ns for path in (root / "rows").iterdir()} == written
    assert read_rows(root) == sorted(first, key=lambda r: r.name)
    write_rows(first, tmp_path / "rows.jsonl.gz")
    assert read_rows(tmp_path / "rows.jsonl.gz") == first
    assert "toy" not in {line.instrument for line in tables(first).instruments}
    request.getfixturevalue("plugin")
    # Only the new instrument runs; what was found before is kept, and all is judged together.
    monkeypatch.setattr("detectors.knowledge.Knowledge.measure", None)
    again = run(recipes, root, budget="quick", workers=1)
    assert [f for f in again[0].findings if f.instrument != "toy"] == first[0].findings
    assert "toy" in again[0].instruments and "toy" not in first[0].instruments
    assert "toy" in {line.instrument for line in tables(again).instruments}
    assert "**toy**" in markdown(tables(again))


def test_rows_that_are_none_are_bad_input(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n")
    with pytest.raises(BadInput, match="no rows of a bench"):
        read_rows(path)
    with pytest.raises(BadInput, match="no rows of a bench"):
        read_rows(tmp_path / "nothing.gz")


# --- the pools


def test_the_full_pool_is_as_large_as_promised():
    recipes = pool.full()
    histories = {r.history for r in recipes}
    from audit.organisms.unlearn import names

    assert len(set(recipes)) == len(recipes) >= 150
    assert len(set(names()) & histories) >= 20
    assert {r.seed for r in recipes} == {0, 1, 2} and {r.base for r in recipes} == {"llama", "gpt-neox"}


def test_what_a_wave_starts_from_lies_in_the_waves_before():
    waves = pool.in_turn([Recipe("llama", "npo+nf4", 0), Recipe("llama", "benign", 0)])
    assert [sorted(r.history for r in wave) for wave in waves] == [["original"], ["npo"], ["benign", "npo+nf4"]]
    # A scan has the original beside it, so nothing is scanned before that is built.
    assert [[r.history for r in w] for w in pool.in_turn([Recipe("llama", "retrained", 0)])] == [
        ["original"], ["retrained"],
    ]  # fmt: skip
    assert all(r.history in {x.history for w in pool.in_turn(pool.quick()) for x in w} for r in pool.quick())


# --- the commands


def test_the_commands_on_kept_rows(tmp_path):
    import cli

    write_rows(benched(), tmp_path / "rows.jsonl.gz")
    runner = CliRunner()
    printed = runner.invoke(cli.app, ["bench", "--rows", str(tmp_path / "rows.jsonl.gz")])
    assert printed.exit_code == 0, printed.output
    assert "## Instruments" in printed.stdout and "## Verdicts" in printed.stdout
    data = json.loads(runner.invoke(cli.app, ["bench", "--rows", str(tmp_path / "rows.jsonl.gz"), "--json"]).stdout)
    assert data["verdicts"]["balanced_accuracy"]["estimate"] == 1.0
    made = tmp_path / "profile.json"
    done = runner.invoke(cli.app, ["calibrate", str(tmp_path / "rows.jsonl.gz"), "--to", str(made), "--name", "mine"])
    assert done.exit_code == 0, done.output
    assert read_profile(made).name == "mine"
