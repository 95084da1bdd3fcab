"""Policies: bounds over a record that fail closed, and what is written of a scan is what that scan passes."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_record import empty, sample
from typer.testing import CliRunner

import cli
from audit.errors import BadInput, Incomplete
from audit.policy import FindingRules, Policy, check, emit, read_policy, to_toml, write_policy
from audit.record import Label, Outcome, Record, Side
from reports.attestation import ATTESTATION

NF4 = "quantize/gain-after-nf4-quantization"  # 0.74 [0.61, 0.84], evidence
NEIGHBOR = "utility/neighbor-accuracy,-against-original"  # -0.17 [-0.24, -0.1], damage
RETAIN = "utility/retain-accuracy,-against-the-original"  # -0.012 [-0.031, 0.006]


def read(tmp_path: Path, text: str) -> Policy:
    (tmp_path / "policy.toml").write_text(text, "utf-8")
    return read_policy(tmp_path / "policy.toml")


def found(record: Record, name: str):
    return next(finding for finding in record.findings if finding.id == name)


# by hand, against the numbers in sample_record.py
HOLDS = {
    'verdict.allow = ["suppressed"]': True,
    'verdict.allow = ["deleted", "inconclusive"]': False,
    "verdict.allow = []": False,
    "verdict.max_false_positive = 0.064": True,
    "verdict.max_false_positive = 0.0639": False,
    "verdict.min_power = 0.81": True,
    "verdict.min_power = 0.82": False,
    'instruments.require = ["lens", "relearn"]': True,
    'instruments.require = ["lens", "sae"]': False,  # did not run
    'instruments.require = ["prune"]': False,  # crashed
    'instruments.require = ["unheard-of"]': False,
    "instruments.max_failed = 2": True,
    "instruments.max_failed = 1": False,
    'coverage.require = ["trace", "leakage", "representation", "recovery", "utility"]': True,
    "utility.max_damage = 0.24": True,  # neighbours: 0 - -0.24
    "utility.max_damage = 0.239": False,
    f'utility = {{ max_damage = 0.031, id = "{RETAIN}" }}': True,
    f'utility = {{ max_damage = 0.03, id = "{RETAIN}" }}': False,
    'utility = { max_damage = 9, id = "lens/*" }': False,  # which looks for no damage
    f'finding = [{{ id = "{NF4}", max_estimate = 0.74 }}]': True,
    f'finding = [{{ id = "{NF4}", max_estimate = 0.73 }}]': False,
    f'finding = [{{ id = "{NF4}", max_upper = 0.84 }}]': True,
    f'finding = [{{ id = "{NF4}", max_upper = 0.83 }}]': False,
    f'finding = [{{ id = "{NF4}", min_lower = 0.61, min_estimate = 0.74 }}]': True,
    f'finding = [{{ id = "{NF4}", min_lower = 0.62 }}]': False,
    'finding = [{ id = "quantize/*", max_upper = 0.84 }]': True,
    'finding = [{ id = "quantize/*", max_upper = 0.5 }]': False,  # int8 holds, NF4 does not
    'finding = [{ id = "quantize/*", outcomes = ["none", "evidence"] }]': True,
    'finding = [{ id = "lens/*", outcomes = ["none"] }]': False,
    'finding = [{ id = "*paraphrased*", max_estimate = 1e9 }]': False,  # not computed
    'finding = [{ id = "*paraphrased*", max_upper = 1e9 }]': False,
    'finding = [{ id = "nowhere/*", max_upper = 1e9 }]': False,
    'finding = [{ id = "lens/*" }]': True,
    'finding = [{ id = "nowhere/*" }]': False,
}


@pytest.mark.parametrize("text", HOLDS)
def test_rules_hold_or_not(tmp_path, text):
    result = check(read(tmp_path, text), sample())
    assert result.passed is HOLDS[text], result.rulings
    assert result.rulings and all(ruling.rule and ruling.reason for ruling in result.rulings)


def test_reasons_are_in_words(tmp_path):
    text = 'instruments.require = ["prune", "sae", "gone"]\ncoverage.require = ["trace"]\nverdict.allow = ["deleted"]'
    result = check(read(tmp_path, text), sample())
    assert {ruling.rule: ruling.reason for ruling in result.rulings} == {
        "the verdict is one of: deleted": "it is suppressed",
        "prune has run": "it crashed: RuntimeError: shapes cannot be multiplied (9x8 and 7x2)",
        "sae has run": "it did not run: needs a sparse autoencoder for layer 12",
        "gone has run": "it was not asked for",
        "question trace is answered": "2 of 3 findings decide, the others are inconclusive",
    }
    assert [ruling.passed for ruling in result.rulings] == [False, False, False, False, True]


def test_nothing_measured_passes_nothing(tmp_path):
    for text in HOLDS:
        if text not in ('verdict.allow = ["deleted", "inconclusive"]', *(t for t in HOLDS if "max_failed" in t)):
            assert not check(read(tmp_path, text), empty()).passed, text


def test_a_question_with_nothing_but_inconclusive_findings_is_not_answered(tmp_path):
    record = sample()
    for finding in record.findings:
        if finding.question.value == "trace":
            finding.verdict = Outcome.INCONCLUSIVE
    assert not check(read(tmp_path, 'coverage.require = ["trace"]'), record).passed


def test_the_bound_over_layers_counts_and_not_the_interval(tmp_path):
    record = sample()
    found(record, NF4).bound = 0.9
    assert not check(read(tmp_path, f'finding = [{{ id = "{NF4}", max_upper = 0.84 }}]'), record).passed


def test_damage_may_lie_on_either_side(tmp_path):
    record = sample()
    damaged = found(record, NEIGHBOR)
    damaged.sides, damaged.ci95 = (Side.DAMAGE, Side.NEITHER), (-0.5, 0.3)
    rule = f'utility = {{ max_damage = %s, id = "{NEIGHBOR}" }}'
    assert check(read(tmp_path, rule % 0.3), record).passed
    assert not check(read(tmp_path, rule % 0.29), record).passed
    damaged.sides = (Side.DAMAGE, Side.DAMAGE)
    assert not check(read(tmp_path, rule % 0.49), record).passed
    damaged.ci95 = (None, 0.0)
    assert not check(read(tmp_path, rule % 9), record).passed, "an end that is missing rules nothing out"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "asks for nothing"),
        ("version = 1\n[verdict]\n[instruments]\n[coverage]\n", "asks for nothing"),
        ("version = 2\n", "version"),
        ("verdict.alow = ['deleted']", "verdict.alow"),
        ("verdict.allow = ['clean']", "verdict.allow.0"),
        ("finding = [{ max_upper = 1 }]", "finding.0.id"),
        ("finding = [{ id = 'a', max_upper = nan }]", "finding.0.max_upper"),
        ("instruments.max_failed = -1", "max_failed"),
        ("verdict = [", "not TOML"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(tmp_path, text, named):
    with pytest.raises(BadInput, match=named):
        read(tmp_path, text)


def test_no_policy():
    with pytest.raises(BadInput, match="cannot be read"):
        read_policy(Path("nowhere.toml"))


# --- no worse than today --------------------------------------------------------------------------------------


def test_emitted_by_hand():
    rules = {rules.id: rules for rules in emit(sample()).finding}
    assert rules[NF4].max_upper == 0.94 and rules[NF4].min_lower == 0.51 and rules[NF4].outcomes is None
    assert rules[NEIGHBOR].min_lower == -0.29 and rules[NEIGHBOR].max_upper == -0.05
    assert rules[RETAIN].outcomes == [Outcome.NONE]
    assert emit(sample(), margin=0).finding[0].max_upper == 0.16


@pytest.mark.parametrize("make", [sample, empty])
def test_what_is_written_of_a_scan_that_scan_passes(tmp_path, make):
    write_policy(emit(make(), margin=0), tmp_path / "policy.toml")
    policy = read_policy(tmp_path / "policy.toml")
    assert policy == emit(make(), margin=0)
    assert check(policy, make()).passed


def worse_label(record):
    record.verdict.label = Label.NOT_UNLEARNED


def more_comes_back(record):
    found(record, NF4).ci95 = (0.7, 0.95)


def more_damage(record):
    found(record, RETAIN).ci95 = (-0.09, 0.006)


def silence_breaks(record):
    found(record, RETAIN).verdict = Outcome.EVIDENCE


def nothing_computed(record):
    found(record, NF4).ci95 = (None, None)


def one_crashes(record):
    record.findings = [finding for finding in record.findings if finding.instrument != "lens"]


def errors_unknown(record):
    record.verdict.false_positive_rate.upper95 = None


def power_drops(record):
    record.verdict.power.lower95 = 0.5


WORSE = (worse_label, more_comes_back, more_damage, silence_breaks, nothing_computed, one_crashes, errors_unknown)


@pytest.mark.parametrize("worsen", [*WORSE, power_drops])
def test_a_worse_audit_fails(worsen):
    policy, record = emit(sample()), sample()
    assert check(policy, record).passed
    worsen(record)
    assert not check(policy, record).passed


def test_a_change_within_the_margin_passes():
    policy, record = emit(sample()), sample()
    found(record, NF4).ci95 = (0.62, 0.93)
    record.verdict.label = Label.DELETED
    assert check(policy, record).passed


@settings(max_examples=40, deadline=None)
@given(
    st.text(min_size=1, max_size=20),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.floats(0, 1e6, allow_nan=False),
)
def test_any_finding_can_be_written_and_read(name, low, width):
    record = sample()
    record.findings, record.examples = record.findings[:1], []
    (finding,) = record.findings
    finding.id, finding.ci95 = name, (low, low + width)
    policy = Policy.model_validate(tomllib.loads(to_toml(emit(record, margin=0))))
    assert check(policy, record).passed
    assert policy.finding[0].max_upper >= low + width and policy.finding[0].min_lower <= low
    finding.ci95 = (low, math.nextafter(policy.finding[0].max_upper, math.inf))
    assert not check(policy, record).passed


def test_an_id_is_no_pattern_when_written():
    record = sample()
    record.findings[0].id, record.findings[1].id = "a*", "ab"
    assert [rules.id for rules in emit(record).finding[:2]] == ["a[*]", "ab"]
    assert Policy(finding=[FindingRules(id="a[*]")]) == Policy.model_validate({"finding": [{"id": "a[*]"}]})
    assert 'id = "a[*]"' in to_toml(emit(record))


# --- the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    sample().write(tmp_path / "record.json")
    return tmp_path


def run(*words: object):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_check_keeps_its_result(folder):
    assert run("check", folder, "--emit-policy", folder / "policy.toml").exit_code == 0
    done = run("check", folder, "--policy", folder / "policy.toml")
    assert done.exit_code == 0 and "all held" in done.output
    kept = json.loads((folder / "policy.json").read_text("utf-8"))
    assert kept["passed"] and len(kept["record"]) == len(kept["policy"]) == 64
    (folder / "policy.toml").write_text('verdict.allow = ["deleted"]')
    done = run("check", folder, "--policy", folder / "policy.toml", "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["rulings"][0]["reason"] == "it is suppressed"
    assert not json.loads((folder / "policy.json").read_text("utf-8"))["passed"]


def test_check_leaves_a_signed_folder_alone(folder):
    (folder / ATTESTATION).write_text("{}")
    (folder / "policy.toml").write_text('verdict.allow = ["suppressed"]')
    done = run("check", folder, "--policy", folder / "policy.toml")
    assert done.exit_code == 0 and "is signed" in done.output and not (folder / "policy.json").exists()


def test_check_wants_something_to_do(folder):
    assert isinstance(run("check", folder).exception, BadInput)


@pytest.mark.parametrize(
    ("policy", "fail_on", "code"),
    [
        ('verdict.allow = ["suppressed"]', "evidence", Incomplete),  # it passes, but two instruments crashed
        ('verdict.allow = ["deleted"]', "never", 1),
        (None, "never", Incomplete),
    ],
)
def test_scan_exits_by_its_policy(tmp_path, monkeypatch, policy, fail_on, code):
    assert outcome(tmp_path, monkeypatch, sample(), policy, fail_on) == code


@pytest.mark.parametrize(
    ("policy", "fail_on", "code"),
    [
        ('verdict.allow = ["suppressed"]', "evidence", 0),  # whatever --fail-on says
        ('verdict.allow = ["deleted"]', "never", 1),
        (None, "evidence", 1),
        (None, "never", 0),
    ],
)
def test_a_complete_scan_exits_by_its_policy(tmp_path, monkeypatch, policy, fail_on, code):
    record = sample()
    record.not_run = []
    assert outcome(tmp_path, monkeypatch, record, policy, fail_on) == code
    assert (tmp_path / "policy.json").exists() == (policy is not None)


def outcome(tmp_path, monkeypatch, record, policy, fail_on):
    monkeypatch.setattr(cli, "_scan_and_report", lambda *_, **__: record)
    rules = None
    if policy is not None:
        rules = tmp_path / "policy.toml"
        rules.write_text(policy)
    try:
        cli._audit(None, tmp_path, fail_on=fail_on, as_json=False, policy=rules, emit_policy=tmp_path / "today.toml")
    except Incomplete as error:
        return type(error)
    except cli.typer.Exit as left:
        return left.exit_code
    finally:
        assert check(read_policy(tmp_path / "today.toml"), record).passed
    return 0


def test_a_policy_that_cannot_be_read_stops_before_the_scan(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_scan_and_report", lambda *_, **__: pytest.fail("scanned"))
    (tmp_path / "policy.toml").write_text("verdict.alow = []")
    with pytest.raises(BadInput):
        cli._audit(None, tmp_path, fail_on="never", as_json=False, policy=tmp_path / "policy.toml")
