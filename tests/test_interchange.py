"""Other tools' results read and written: published layouts, hand-worked numbers, and every way there and back."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_record import empty, sample
from scipy import stats
from worlds import audit_here, build_tiny, quiet_scan, tiny_case

from audit.errors import BadInput
from audit.evidence import Evidence
from audit.interchange.captures import captured, write_captures
from audit.interchange.logs import FORMATS, Log, Metric, from_record, read_log, truth_ratios, write_log
from audit.record import FINDING_COLUMNS, Record
from detectors.knowledge import answer_probability, forget_quality, forget_truth_ratio, rouge_l_recall, truth_ratio
from detectors.memorization import exact_memorization, extraction_strength

# As saves/eval/…/TOFU_EVAL.json: probabilities and losses by row, lists where a row has several answers, membership
# attacks with both of their sets, metrics without rows, and the NaN that Python's json writes.
TOFU_EVAL = """{
    "forget_Q_A_PARA_Prob": {"agg_value": 0.3, "value_by_index": {"0": {"prob": 0.5, "avg_loss": 0.6931471805599453},
                                                                  "1": {"prob": 0.1, "avg_loss": 2.302585092994046}}},
    "forget_Q_A_PERT_Prob": {"agg_value": 0.2, "value_by_index": {"0": {"prob": [0.25, 0.25], "avg_loss": [1.4, 1.4]},
                                                                  "1": {"prob": [0.2, 0.1], "avg_loss": [1.6, 2.3]}}},
    "forget_Q_A_ROUGE": {"agg_value": 0.75, "value_by_index": {
        "0": {"rouge1_recall": 1.0, "rougeL_f1": 0.5, "rougeL_recall": 1.0, "input": "Who?", "ground_truth": "Ada.",
              "generation": "Ada Lovelace."}, "1": null}},
    "forget_quality": {"agg_value": 0.04},
    "forget_truth_ratio": {"agg_value": 0.75, "value_by_index": {"0": {"score": 0.5}, "1": {"score": 1.0}}},
    "mia_min_k": {"forget": {"agg_value": 2.5, "value_by_index": {"0": {"score": 2.5}}},
                  "holdout": {"agg_value": 3.5, "value_by_index": {"0": {"score": 3.5}}}, "auc": 0.9, "agg_value": 0.9},
    "model_utility": {"agg_value": NaN},
    "privleak": {"agg_value": -80.0}
}"""

# As eval_log_aggregated.json of locuslab/tofu: a file name, a measure, a row; losses per token.
TOFU = {
    "eval_log.json": {
        "avg_gt_loss": {"0": 0.0, "1": math.log(2)},
        "gt_loss": {"0": 0.0, "1": 3 * math.log(2)},
        "num_token_gt": {"0": 4, "1": 3},
        "rougeL_recall": {"0": 1.0, "1": 0.5},
        "avg_paraphrased_loss": {"0": math.log(2), "1": math.log(2)},
        "average_perturb_loss": {"0": [math.log(8), math.log(8)], "1": [0.0, 0.0]},
    },
    "eval_log_forget.json": {
        "avg_gt_loss": {"0": math.log(4), "1": math.log(2), "2": 0.0},
        "rougeL_recall": {"0": 0.0, "1": 0.5, "2": 1.0},
        "rouge1_recall": {"0": 0.5, "1": 0.5, "2": 1.0},
        "generated_text": {"0": ["Q0", "no", "yes"], "1": ["Q1", "no yes", "yes"], "2": ["Q2", "yes", "yes"]},
        "avg_paraphrased_loss": {"0": math.log(4), "1": math.log(2), "2": 1.0},
        "average_perturb_loss": {"0": [math.log(2)] * 2, "1": [math.log(2), math.log(8)], "2": [1.0, 1.0]},
    },
    "eval_real_author_wo_options.json": {
        "avg_gt_loss": {"0": 0.0},
        "avg_paraphrased_loss": {"0": 0.0},
        "average_perturb_loss": {"0": [math.log(4), math.log(4)]},
    },
}

MUSE = {"name": "npo", "verbmem_f": 25.0, "privleak": -99.5, "knowmem_f": 62.5, "knowmem_r": 50.0}

# As results_….json of the lm-evaluation-harness.
LM_EVAL = {
    "results": {
        "mmlu_anatomy": {"alias": "anatomy", "acc,none": 0.5, "acc_stderr,none": 0.04, "sample_len": 135},
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.01,
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": "N/A",
        },
    },
    "group_subtasks": {},
    "versions": {"mmlu_anatomy": 1.0, "gsm8k": 3.0},
    "n-samples": {"mmlu_anatomy": {"original": 135, "effective": 135}},
    "config": {"model": "hf"},
}


def put(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), "utf-8")
    return path


@cache
def audited(model: str, *more: str) -> tuple[Path, Record]:
    """A model of the tiny world, scanned by three instruments; `more`: models beside it, `role=model`."""
    out = build_tiny().folder / "-".join(["interchange", model, *more])
    models = {"target": model} | dict(pair.split("=") for pair in more)
    case = tiny_case(models, ("forget", "holdout", "retain"), only="knowledge,memorization,membership")
    return out, quiet_scan(case, out)


@cache
def evidence() -> Evidence:
    case = tiny_case({"target": "unlearned"}, ("forget", "holdout", "retain"), only="knowledge,memorization,membership")
    return captured(case, audited("unlearned")[0])


# --- the frame


def test_a_record_as_a_frame():
    record = sample()
    frame = record.to_frame()
    assert list(frame.columns) == list(FINDING_COLUMNS)
    assert frame["id"].tolist() == [finding.id for finding in record.findings]
    for finding, (_, row) in zip(record.findings, frame.iterrows(), strict=True):
        for column, value in (("estimate", finding.estimate), ("ci95_low", finding.ci95[0]), ("n", finding.n)):
            assert (math.isnan(row[column]) and value is None) or row[column] == value
        assert row["verdict"] == finding.verdict.value
        assert row["controls_failed"] == sum(control.passed is False for control in finding.controls)
    assert frame.groupby("question", sort=False)["n"].sum().sum() == sum(f.n for f in record.findings)
    assert pd.concat({"a": frame, "b": frame}).shape == (2 * len(frame), len(FINDING_COLUMNS))


def test_a_record_without_findings_is_a_frame_without_rows_of_the_same_types():
    assert empty().to_frame().empty
    kinds = sample().to_frame().dtypes
    assert empty().to_frame().dtypes[kinds == "float64"].eq("float64").all()


# --- published layouts


def test_an_open_unlearning_log_is_read(tmp_path):
    log = read_log(put(tmp_path / "TOFU_EVAL.json", TOFU_EVAL))
    assert truth_ratios(log).tolist() == [0.5, 1.0]
    assert log["forget_quality"] == Metric(0.04)
    assert log["model_utility"].value is None
    assert log["mia_min_k"].value == 0.9
    assert log["mia_min_k"].parts["holdout"].rows["0"] == {"score": 3.5}
    assert log["forget_Q_A_PERT_Prob"].rows["1"]["avg_loss"] == [1.6, 2.3]
    assert set(log["forget_Q_A_ROUGE"].rows) == {"0"}, "a row that was not measured is none"
    summary = read_log(put(tmp_path / "TOFU_SUMMARY.json", {"forget_quality": 0.04, "model_utility": None}))
    assert summary == {"forget_quality": Metric(0.04), "model_utility": Metric(None)}


def test_a_tofu_log_is_read_with_tofu_s_aggregates(tmp_path):
    log = read_log(put(tmp_path / "eval_log_aggregated.json", TOFU))
    assert log["retain_Q_A_Prob"].value == pytest.approx(0.75)
    assert log["forget_Q_A_Prob"].column("prob") == pytest.approx([0.25, 0.5, 1.0])
    # r = p(wrong) / p(right), geometric means: 2, 1/2 and 1; forget: mean of min(r, 1/r)
    assert truth_ratios(log) == pytest.approx([2.0, 0.5, 1.0])
    assert log["forget_truth_ratio"].value == pytest.approx((0.5 + 0.5 + 1) / 3)
    # retain: r = 1/4 and 2; mean of max(0, 1 - r)
    assert log["retain_Truth_Ratio"].value == pytest.approx(0.75 / 2)
    assert log["ra_Truth_Ratio"].value == pytest.approx(0.75)
    assert "ra_Q_A_PARA_Prob" not in log, "the answer stood in for a paraphrase"
    said = {"rougeL_recall": 0.5, "rouge1_recall": 0.5, "input": "Q1", "generation": "no yes", "ground_truth": "yes"}
    assert log["forget_Q_A_ROUGE"].rows["1"] == said


def test_forget_quality_between_logs_is_tofu_s(tmp_path):
    """TOFU's code tests 1 / r of both models; KS is the same for any monotone map."""
    rng = np.random.default_rng(0)

    def made(shift: float) -> tuple[dict[str, object], np.ndarray]:
        right, wrong = rng.normal(2, 0.5, 40), rng.normal(2 + shift, 0.5, (40, 5))
        measures = {
            "avg_gt_loss": dict(enumerate(right)),
            "avg_paraphrased_loss": dict(enumerate(right)),
            "average_perturb_loss": dict(enumerate(wrong.tolist())),
        }
        return {"eval_log_forget.json": measures}, np.exp(wrong.mean(axis=1) - right)

    (target, one), (retrained, two) = made(0.3), made(0.0)
    logs = [read_log(put(tmp_path / f"{i}.json", data)) for i, data in enumerate((target, retrained))]
    d, p = forget_quality(*map(truth_ratios, logs))
    expected = stats.ks_2samp(one, two)
    assert (d, p) == pytest.approx((expected.statistic, expected.pvalue))


def test_muse_results_are_read(tmp_path):
    log = read_log(put(tmp_path / "muse.json", MUSE))
    assert {name: metric.value for name, metric in log.items()} == {
        "forget_verbmem_ROUGE": 0.25, "forget_knowmem_ROUGE": 0.625, "retain_knowmem_ROUGE": 0.5, "privleak": -99.5,
    }  # fmt: skip


def test_lm_eval_results_are_read(tmp_path):
    log = read_log(put(tmp_path / "results.json", LM_EVAL))
    assert log == {
        "mmlu_anatomy/acc": Metric(0.5, stderr=0.04, n=135),
        "gsm8k/exact_match,strict-match": Metric(0.25, stderr=0.01),
        "gsm8k/exact_match,flexible-extract": Metric(0.5),
    }


# --- there and back

numbers = st.floats(-1e6, 1e6)
rows = st.dictionaries(
    st.integers(0, 99).map(str),
    st.dictionaries(
        st.sampled_from(["score", "prob", "avg_loss"]), numbers | st.lists(numbers, max_size=3), min_size=1
    ),
    max_size=4,
)
plain = st.builds(Metric, st.none() | numbers, rows)
nested = st.builds(Metric, st.none() | numbers, rows, st.dictionaries(st.sampled_from(["forget", "holdout"]), plain))


@settings(max_examples=25)
@given(st.dictionaries(st.from_regex(r"[a-z]{3,8}(_[A-Z]{1,4}){0,2}", fullmatch=True), nested, min_size=1, max_size=4))
def test_open_unlearning_there_and_back(tmp_path_factory, log: Log):
    path = tmp_path_factory.mktemp("log") / "log.json"
    write_log(log, path, "open-unlearning")
    assert read_log(path) == log


names = st.from_regex(r"[a-z]{3,8}(/[a-z-]{2,6}){0,2}(,[a-z]{4,6})?", fullmatch=True)
measured = st.builds(Metric, numbers, stderr=st.none() | st.floats(0, 1e3), n=st.just(7))


@settings(max_examples=25)
@given(st.dictionaries(names, measured, min_size=1, max_size=5))
def test_lm_eval_there_and_back(tmp_path_factory, log: Log):
    path = tmp_path_factory.mktemp("log") / "results.json"
    write_log(log, path, "lm-eval")
    assert read_log(path) == log


@pytest.mark.parametrize(("data", "to"), [(TOFU, "tofu"), (MUSE, "muse"), (LM_EVAL, "lm-eval")])
def test_what_was_read_is_written_back(tmp_path, data, to):
    log = read_log(put(tmp_path / "in.json", data))
    write_log(log, tmp_path / "out.json", to)
    again = read_log(tmp_path / "out.json")
    assert again == log
    write_log(log, tmp_path / "open.json", "open-unlearning")
    values = {name: metric.value for name, metric in read_log(tmp_path / "open.json").items()}
    assert values == {name: metric.value for name, metric in log.items()}


def test_tofu_s_own_measures_come_back(tmp_path):
    """What TOFU's aggregation reads of a log: the same numbers after a detour through open-unlearning's names."""
    write_log(read_log(put(tmp_path / "in.json", TOFU)), tmp_path / "out.json", "tofu")
    back = json.loads((tmp_path / "out.json").read_text())
    for file, measures in TOFU.items():
        for measure in ("avg_gt_loss", "avg_paraphrased_loss", "average_perturb_loss", "rougeL_recall"):
            assert back[file].get(measure) == measures.get(measure), (file, measure)
    assert back["eval_log_forget.json"]["generated_text"] == TOFU["eval_log_forget.json"]["generated_text"]
    assert back["eval_log_forget.json"]["truth_ratio"] == pytest.approx({"0": 2.0, "1": 0.5, "2": 1.0})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "not a readable JSON log"),
        ("[1]", "a JSON object that is not empty"),
        ("{}", "a JSON object that is not empty"),
        ({"forget_quality": "good"}, "forget_quality is neither a number nor an object with agg_value"),
        ({"a": {"agg_value": "x"}}, "a.agg_value is 'x', no number"),
        ({"a": {"value_by_index": [1]}}, "a.value_by_index is no object of objects"),
        ({"results": {"mmlu": 1}}, "results.mmlu is no object of metrics"),
        ({"results": {"mmlu": {"acc,none": []}}}, "results.mmlu.acc,none is [], no number"),
        ({"eval_log.json": {"avg_gt_loss": {"0": "low"}}}, "eval_log.json.Q_A_Prob.0 is 'low', no loss per token"),
        ({"eval_log.json": {"avg_gt_loss": {"0": -1e9}}}, "not laid out as a log"),
        ({"knowmem_f": None}, "knowmem_f is None, no number"),
    ],
)
def test_what_is_no_log_is_bad_input_that_says_where(tmp_path, data, said):
    path = put(tmp_path / "x.json", data)
    with pytest.raises(BadInput) as caught:
        read_log(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- records


def test_a_record_s_rows_are_what_the_functions_give():
    """Every metric that an audit shares with open-unlearning, computed again from what was captured."""
    _, record = audited("unlearned")
    log = from_record(record)
    case = tiny_case({"target": "unlearned"}, ("forget", "holdout", "retain"), only="knowledge")
    forget = case.rows("forget")
    answers = evidence().scores("target", "forget/answer", "token")
    wrong = iter(evidence().scores("target", "forget/wrong", "token"))
    right = iter(evidence().scores("target", "forget/paraphrase", "token"))
    ratios = []
    for row, answer in zip(forget, answers, strict=True):
        phrased = [next(right)["logprob"] for _ in row.paraphrases] or [answer["logprob"]]
        ratios.append(truth_ratio(phrased, [next(wrong)["logprob"] for _ in row.wrong]))
    assert truth_ratios(log) == pytest.approx(ratios)
    assert log["forget_truth_ratio"].value == pytest.approx(forget_truth_ratio(ratios))
    assert log["forget_Q_A_Prob"].column("prob") == pytest.approx([answer_probability(a["logprob"]) for a in answers])
    assert log["exact_memorization"].column("score") == pytest.approx([exact_memorization(a["match"]) for a in answers])
    strength = [extraction_strength(a["match"]) for a in answers]
    assert log["extraction_strength"].column("score") == pytest.approx(strength)
    assert log["extraction_strength"].value == pytest.approx(np.mean(strength))
    for row in log["forget_Q_A_ROUGE"].rows.values():
        assert row["rougeL_recall"] == rouge_l_recall(row["ground_truth"], row["generation"])
    finding = next(f for f in record.findings if f.id == "knowledge/rouge")
    assert log["knowledge/rouge"].value == finding.estimate
    assert log["knowledge/rouge"].stderr == pytest.approx((finding.ci95[1] - finding.ci95[0]) / 3.92, rel=1e-3)


def test_a_retrained_model_s_log_stands_in_for_it(tmp_path):
    """Forget quality against a log, and the AUC that PrivLeak refers to, are those of a scan with the model itself."""
    _, both = audited("unlearned", "retrained=retrained")
    write_log(from_record(audited("retrained")[1]), tmp_path / "TOFU_EVAL.json", "open-unlearning")
    reference = read_log(tmp_path / "TOFU_EVAL.json")
    d, p = forget_quality(truth_ratios(from_record(audited("unlearned")[1])), truth_ratios(reference))
    control = next(c for f in both.findings for c in f.controls if c.name == "forget quality")
    assert d == pytest.approx(control.estimate)
    assert f"p = {p:.3g}" in control.description
    area, expected = from_record(audited("unlearned")[1])["mia_min_k"].value, reference["mia_min_k"].value
    leak = next(f for f in both.findings if f.id == "membership/privleak").estimate
    if leak is None:
        assert 1 - expected < 0.05
    else:
        assert leak == pytest.approx(100 * (expected - area) / (1 - expected))
    assert "mia_min_k" not in from_record(both), "there the reference is not 0.5"


def test_the_command_converts_to_every_format(monkeypatch, tmp_path, capsys):
    out, _ = audited("unlearned")
    for to in FORMATS:
        file = tmp_path / f"{to}.json"
        assert audit_here(monkeypatch, "convert", out, file, "--to", to) == 0
        assert set(read_log(file)) <= set(read_log(out))
    retrained = tmp_path / "retrained.json"
    assert audit_here(monkeypatch, "convert", audited("retrained")[0], retrained, "--to", "open-unlearning") == 0
    capsys.readouterr()
    words = ["convert", out, tmp_path / "log.json", "--to", "open-unlearning", "--reference", retrained]
    assert audit_here(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    expected = forget_quality(truth_ratios(read_log(out)), truth_ratios(read_log(retrained)))[1]
    assert f"p = {expected:.3g}" in said
    assert read_log(tmp_path / "log.json")["forget_quality"].value == pytest.approx(expected)


def test_what_cannot_be_converted_is_said(monkeypatch, tmp_path, capsys):
    summary = put(tmp_path / "summary.json", {"model_utility": 0.5})
    for words, said in (
        ((summary, tmp_path / "x", "--to", "muse"), "muse has no name for any of model_utility"),
        ((summary, tmp_path / "x", "--to", "csv"), "no format 'csv'"),
        ((tmp_path / "nowhere", tmp_path / "x", "--to", "muse"), "not a readable JSON log"),
        ((summary, tmp_path / "x", "--to", "lm-eval", "--reference", summary), "no forget_truth_ratio"),
        ((tmp_path, tmp_path / "x", "--to", "parquet"), "case.toml: cannot be read"),
    ):
        assert audit_here(monkeypatch, "convert", *words) == 2
        assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "x").exists()


# --- captures


def test_captures_as_parquet_hold_the_same_arrays(tmp_path):
    files = write_captures(evidence(), tmp_path)
    assert tmp_path / "target" / "forget" / "answer.parquet" in files
    frame = pd.read_parquet(tmp_path / "target" / "forget" / "answer.parquet")
    sequences, arrays = evidence().sequences("target", "forget/answer"), evidence().scores("target", "forget/answer")
    assert len(frame) == len(arrays) > 0
    for (_, row), tokens, values in zip(frame.iterrows(), sequences, arrays, strict=True):
        assert tuple(row["ids"]) == tokens.ids
        assert row["start"] == tokens.start
        assert set(values) == set(frame.columns) - {"row", "ids", "start"}
        for key, array in values.items():
            assert np.array_equal(row[key], array)
            assert row[key].dtype == array.dtype
    said = pd.read_parquet(tmp_path / "target" / "forget" / "continued.parquet")
    assert said["text"].tolist() == evidence().texts("target", "forget/continued")


def test_states_keep_their_shape(tmp_path):
    case = tiny_case({"target": "unlearned", "original": "original"}, ("forget", "retain"), only="geometry")
    states = captured(case, build_tiny().folder / "interchange-states")
    write_captures(states, tmp_path)
    frame = pd.read_parquet(tmp_path / "original" / "geometry" / "forget.parquet")
    for kept, values in zip(frame["hidden"], states.iterate("original", "geometry/forget"), strict=True):
        assert np.array_equal(np.array([[list(site) for site in token] for token in kept]), values["hidden"])


def test_the_command_writes_captures(monkeypatch, tmp_path, capsys):
    out, _ = audited("unlearned")
    assert audit_here(monkeypatch, "convert", out, tmp_path / "captures", "--to", "parquet") == 0
    files = sorted((tmp_path / "captures").rglob("*.parquet"))
    assert f"{len(files)} files" in capsys.readouterr().out
    assert len(files) >= 6
