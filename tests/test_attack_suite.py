"""The whole attack suite on a model that never knew: nothing may come back."""

from __future__ import annotations

from worlds import quiet_scan, tiny_case

from audit.contrast import ALPHA
from audit.instrument import load, names
from audit.record import Outcome, Question, Side

ATTACKS = [
    name
    for name in names()
    if load(name).question == Question.RECOVERY
    and load(name).modality != "image"
    and load(name).missing(tiny_case(only=[name])) is None
]


def test_no_attack_brings_back_what_was_never_there(tmp_path):
    case = tiny_case({"target": "retrained", "original": "original"}, only=ATTACKS, budget="standard")
    record = quiet_scan(case, tmp_path)
    assert record.not_run == []
    assert {finding.instrument for finding in record.findings} == set(ATTACKS)
    assert len(ATTACKS) > 15
    for finding in record.findings:
        assert finding.side != Side.REMAINS, finding.id
        assert finding.verdict in (Outcome.NONE, Outcome.INCONCLUSIVE), finding.id
        # With fewer entities no effect could have been evidence, and silence would be no test.
        assert finding.smallest_p is not None
        assert finding.smallest_p * len(record.findings) <= ALPHA, finding.id
