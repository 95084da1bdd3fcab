"""Results of other evaluations, and records, as one kind of log: metrics by name, with their values by row.

    log = read_log(Path("saves/eval/tofu_retain90/TOFU_EVAL.json"))
    log["forget_truth_ratio"].value, log["forget_truth_ratio"].rows["0"]["score"]
    write_log(read_log(Path("audit-out")), Path("TOFU_EVAL.json"), "open-unlearning")

Names are open-unlearning's, which the others' are translated to:

===================  ==============================================================================================
open-unlearning      `TOFU_EVAL.json`, `MUSE_EVAL.json`: {metric: {agg_value, value_by_index: {row: {…}}}}, and the
                     `…_SUMMARY.json` beside them: {metric: number}
TOFU                 `eval_log_aggregated.json`: {file: {measure: {row: number, list or texts}}}; losses are per token
MUSE                 {verbmem_f, knowmem_f, knowmem_r, privleak}, in percent
lm-eval              `results_….json`: {results: {task: {"metric,filter": number, "metric_stderr,filter": number}},
                     n-samples: {task: {…}}}; a name `task/metric` here, and `task` alone for the metric `value`
record               `record.json`: findings as `instrument/statistic`, their standard error the 95 % interval's width
                     over 3.92; forget rows as open-unlearning's metrics, where these are the same
===================  ==============================================================================================

Sources: locuslab/open-unlearning at d3d7cf9 (`src/evals`), locuslab/tofu at 8c49eee (`evaluate_util.py`), swj0419/
muse_bench (`eval.py`), EleutherAI/lm-evaluation-harness (`result_schema.py`).

What a record cannot say is left out: it keeps no paraphrases' losses, and its ROUGE is TOFU's recall where MUSE has F1.
A truth ratio is p(wrong) / p(right) in all of them; open-unlearning adds 1e-10 to denominators, and its aggregate of a
forget set is the mean of min(r, 1/r), that of a retain set the mean of max(0, 1 - r).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from audit.errors import BadInput
from audit.record import Finding, Record, write_atomically

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """One metric of one model.

    Attributes:
        value: over all rows; None where the writer had none.
        rows: by row, what was measured of it: numbers, lists of numbers, texts.
        parts: metrics of its own by name, as membership attacks have `forget` and `holdout`.
        stderr: standard error of `value`, where the writer gave one.
        n: how many rows, or independent units, are behind `value`, where the writer said so.
    """

    value: float | None
    rows: Mapping[str, Row] = field(default_factory=dict)
    parts: Mapping[str, Metric] = field(default_factory=dict)
    stderr: float | None = None
    n: int | None = None

    def column(self, measure: str) -> NDArray[np.float64]:
        """One measure of all rows that have it, [n]. Raises ValueError where none has a number there."""
        found = [row[measure] for row in self.rows.values() if _is_number(row.get(measure))]
        if not found:
            raise ValueError(f"no row has a number for {measure!r}")
        return np.array(found, dtype=np.float64)


Log = dict[str, Metric]


def truth_ratios(log: Mapping[str, Metric]) -> NDArray[np.float64]:
    """Truth ratios of the forget rows, p(wrong) / p(right), [n]: what forget quality compares.

    Raises:
        BadInput: the log has none.
    """
    try:
        return log["forget_truth_ratio"].column("score")
    except (KeyError, ValueError):
        raise BadInput("the log has no forget_truth_ratio with a score for each row") from None


# --- reading ------------------------------------------------------------------------------------------------


def read_log(path: Path) -> Log:
    """The log in a file of any known kind, or in an audit folder.

    Raises:
        BadInput: no such file, not JSON, or of no kind that is known.
    """
    path = path / "record.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable JSON log ({error})") from None
    if not isinstance(data, dict) or not data:
        raise BadInput(f"{path}: a log is a JSON object that is not empty")
    try:
        if "schema_version" in data and "findings" in data:
            return from_record(Record.read(path))
        if isinstance(data.get("results"), dict):
            return _from_lm_eval(data)
        if set(data) & set(_TOFU_FILES):
            return _from_tofu(data)
        if set(data) & set(_MUSE) - {"privleak"}:
            return {_MUSE[key]: Metric(_number(data[key], key) / _percent(key)) for key in _MUSE if key in data}
        return {name: _from_open_unlearning(value, name) for name, value in data.items()}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as problem:
        raise BadInput(f"{path}: not laid out as a log: {problem}") from None


def _from_open_unlearning(value: Any, name: str) -> Metric:
    if _is_number(value) or value is None:  # a summary
        return Metric(_maybe(value))
    if not isinstance(value, dict) or not {"agg_value", "value_by_index"} & set(value):
        raise ValueError(f"{name} is neither a number nor an object with agg_value")
    rows = value.get("value_by_index") or {}
    if not isinstance(rows, dict) or not all(row is None or isinstance(row, dict) for row in rows.values()):
        raise ValueError(f"{name}.value_by_index is no object of objects")
    aggregate = value.get("agg_value")
    if aggregate is not None and not _is_number(aggregate, finite=False):
        raise ValueError(f"{name}.agg_value is {aggregate!r}, no number")
    parts = {key: part for key, part in value.items() if isinstance(part, dict) and "agg_value" in part}
    return Metric(
        _maybe(aggregate),
        {str(index): row for index, row in rows.items() if row is not None},
        {key: _from_open_unlearning(part, f"{name}.{key}") for key, part in parts.items()},
    )


def _from_lm_eval(data: Mapping[str, Any]) -> Log:
    log: Log = {}
    counts = data.get("n-samples", {})
    for task, measured in data["results"].items():
        if not isinstance(measured, dict):
            raise ValueError(f"results.{task} is no object of metrics")
        n = counts.get(task, {}).get("effective") if isinstance(counts, dict) else None
        for key, value in measured.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):  # alias, name, sample_len; errors are read with their metric
                continue
            error = measured.get(f"{metric}_stderr,{kind}")  # "N/A" where there is none
            name = task if metric == _VALUE else f"{task}/{metric}"
            log[name if kind == "none" else f"{name},{kind}"] = Metric(
                None if value is None else _number(value, f"results.{task}.{key}"),
                stderr=_maybe(error),
                n=n if isinstance(n, int) else None,
            )
    return log


def _from_tofu(data: Mapping[str, Any]) -> Log:
    log: Log = {}
    for file, part in _TOFU_FILES.items():
        if file not in data:
            continue
        measures = data[file]
        if not isinstance(measures, dict) or not all(isinstance(rows, dict) for rows in measures.values()):
            raise ValueError(f"{file} is no object of measures by row")
        losses = {kind: measures[key] for key, kind in _TOFU_LOSSES.items() if key in measures}
        for kind, rows in losses.items():
            metric = _probabilities(rows, f"{file}.{kind}")
            if kind != "Q_A_PARA_Prob" or part in _TRUTH:  # elsewhere the answer stands in for its paraphrase
                log[f"{part}_{kind}"] = metric
        if "rougeL_recall" in measures:
            log[f"{part}_Q_A_ROUGE"] = _rouge(measures)
        if {"Q_A_PARA_Prob", "Q_A_PERT_Prob"} <= set(losses):
            right, wrong = losses["Q_A_PARA_Prob"], losses["Q_A_PERT_Prob"]
            ratios = {i: math.exp(right[i] - float(np.mean(wrong[i]))) for i in right if i in wrong}
            log[_truth(part)] = _truth_metric(ratios, part)
    return log


def _probabilities(losses: Mapping[str, Any], where: str) -> Metric:
    rows, means = {}, []
    for index, loss in losses.items():
        many = loss if isinstance(loss, list) else [loss]
        if not many or not all(_is_number(each) for each in many):
            raise ValueError(f"{where}.{index} is {loss!r}, no loss per token")
        likely = [math.exp(-each) for each in many]
        rows[str(index)] = {"prob": likely if isinstance(loss, list) else likely[0], "avg_loss": loss}
        means.append(float(np.mean(likely)))
    return Metric(float(np.mean(means)) if means else None, rows)


def _rouge(measures: Mapping[str, Any]) -> Metric:
    texts = measures.get("generated_text", {})
    rows: dict[str, Row] = {}
    for index, recall in measures["rougeL_recall"].items():
        row: dict[str, Any] = {"rougeL_recall": _number(recall, f"rougeL_recall.{index}")}
        if index in measures.get("rouge1_recall", {}):
            row["rouge1_recall"] = measures["rouge1_recall"][index]
        if index in texts:
            row |= dict(zip(("input", "generation", "ground_truth"), texts[index], strict=False))
        rows[str(index)] = row
    return Metric(_mean(row["rougeL_recall"] for row in rows.values()), rows)


def _truth_metric(ratios: Mapping[str, float], part: str) -> Metric:
    r = np.array(list(ratios.values()))
    closeness = np.minimum(r, 1 / np.maximum(r, np.finfo(float).tiny))
    return Metric(
        _mean(closeness if part == "forget" else np.maximum(0, 1 - r)),
        {str(index): {"score": ratio} for index, ratio in ratios.items()},
    )


# --- records ------------------------------------------------------------------------------------------------

_ROW_SCORES = {
    "exact memorization": "exact_memorization",
    "extraction strength": "extraction_strength",
}
_FINDINGS = {
    "membership/loss": "mia_loss",
    "membership/zlib": "mia_zlib",
    "membership/privleak": "privleak",
}


def from_record(record: Record) -> Log:
    """The findings as `instrument/statistic`, and the forget rows as the metrics that open-unlearning has of them.

    Rows are numbered as the record keeps them, which is fewer than the forget set has where a budget was spent.
    """
    log = {finding.id: _finding(finding) for finding in record.findings}
    log |= {name: Metric(log[key].value) for key, name in _FINDINGS.items() if key in log}
    if "privleak" in log and "retrained" not in record.models and log["privleak"].value is not None:
        # Without a retrained model the reference is 0.5: PrivLeak is 100 - 200 times the AUC of Min-K 40 %.
        log["mia_min_k"] = Metric((100 - log["privleak"].value) / 200)
    known = {str(i): row for i, row in enumerate(record.examples)}
    scores = {i: row.scores for i, row in known.items()}

    def of_rows(name: str) -> dict[str, float]:
        return {i: value for i, each in scores.items() if (value := each.get(name)) is not None}

    if probabilities := of_rows("probability"):
        losses = {i: {"prob": p, "avg_loss": -math.log(p) if p > 0 else None} for i, p in probabilities.items()}
        log["forget_Q_A_Prob"] = Metric(_mean(probabilities.values()), losses)
    if ratios := of_rows("truth ratio"):
        log["forget_truth_ratio"] = _truth_metric(ratios, "forget")
    if recalls := of_rows("ROUGE-L recall"):
        texts = {
            i: {"input": known[i].prompt, "generation": known[i].generated, "ground_truth": known[i].answer}
            for i in recalls
        }
        rows = {i: {"rougeL_recall": recall} | texts[i] for i, recall in recalls.items()}
        log["forget_Q_A_ROUGE"] = Metric(_mean(recalls.values()), rows)
    for score, name in _ROW_SCORES.items():
        if values := of_rows(score):
            log[name] = Metric(_mean(values.values()), {i: {"score": value} for i, value in values.items()})
    return log


def _finding(finding: Finding) -> Metric:
    lo, hi = finding.ci95
    error = None if lo is None or hi is None else (hi - lo) / (2 * _NORMAL)
    return Metric(finding.estimate, stderr=error, n=finding.n)


# --- writing ------------------------------------------------------------------------------------------------


def write_log(log: Mapping[str, Metric], path: Path, to: str) -> None:
    """Write a log as another tool would, as far as that has names for what is in it.

    Raises:
        BadInput: it has none, or there is no such format.
    """
    if to not in _WRITERS:
        raise BadInput(f"no format {to!r}: there are {', '.join(_WRITERS)}")
    data = _WRITERS[to](log)
    if not data:
        raise BadInput(f"nothing to write: {to} has no name for any of {', '.join(sorted(log)) or 'nothing'}")
    write_atomically(path, (json.dumps(_jsonable(data), indent=4, allow_nan=False, ensure_ascii=False) + "\n").encode())


def _to_open_unlearning(log: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: _written(log[name]) for name in sorted(log)}


def _written(metric: Metric) -> dict[str, Any]:
    value: dict[str, Any] = {name: _written(part) for name, part in metric.parts.items()}
    value["agg_value"] = metric.value
    if metric.rows:
        value["value_by_index"] = dict(metric.rows)
    return value


def _to_tofu(log: Mapping[str, Metric]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for file, part in _TOFU_FILES.items():
        measures: dict[str, Any] = {}
        for key, kind in _TOFU_LOSSES.items():
            kind = kind if part in _TRUTH or key != "avg_paraphrased_loss" else "Q_A_Prob"
            if f"{part}_{kind}" in log:
                measures[key] = {i: row.get("avg_loss") for i, row in log[f"{part}_{kind}"].rows.items()}
        if rows := log.get(f"{part}_Q_A_ROUGE", _NOTHING).rows:
            for measure in ("rougeL_recall", "rouge1_recall"):
                if found := {i: row[measure] for i, row in rows.items() if measure in row}:
                    measures[measure] = found
            said = ("input", "generation", "ground_truth")
            if texts := {i: [row[key] for key in said] for i, row in rows.items() if set(said) <= set(row)}:
                measures["generated_text"] = texts
        if rows := log.get(_truth(part), _NOTHING).rows:
            measures["truth_ratio"] = {i: row.get("score") for i, row in rows.items()}
        if measures:
            data[file] = measures
    return data


def _to_muse(log: Mapping[str, Metric]) -> dict[str, Any]:
    named = {key: log[name].value for key, name in _MUSE.items() if name in log}
    return {key: None if value is None else value * _percent(key) for key, value in named.items()}


def _to_lm_eval(log: Mapping[str, Metric]) -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {}
    counts: dict[str, set[int | None]] = {}
    for name, metric in sorted(log.items()):
        plain, comma, kind = name.rpartition(",")
        plain, kind = (plain, kind) if comma else (name, "none")
        task, slash, measure = plain.rpartition("/")
        task, measure = (task, measure) if slash else (plain, _VALUE)
        row = results.setdefault(task, {"alias": task})
        row[f"{measure},{kind}"] = metric.value
        error = metric.stderr if metric.stderr is not None else _standard_error(metric)
        row[f"{measure}_stderr,{kind}"] = "N/A" if error is None else error
        counts.setdefault(task, set()).add(metric.n if metric.n is not None else len(metric.rows) or None)
    if not results:
        return {}
    one = {task: n for task, several in counts.items() if len(several) == 1 and (n := next(iter(several))) is not None}
    return {"results": results, "n-samples": {task: {"original": n, "effective": n} for task, n in one.items()}}


def _standard_error(metric: Metric) -> float | None:
    """Of a mean of single numbers by row; None where `value` is no such mean."""
    for measure in ("prob", "rougeL_recall", "score"):
        try:
            values = metric.column(measure)
        except ValueError:
            continue
        if len(values) > 1 and metric.value is not None and abs(values.mean() - metric.value) < _SAME:
            return float(values.std(ddof=1) / math.sqrt(len(values)))
    return None


_WRITERS: dict[str, Callable[[Mapping[str, Metric]], dict[str, Any]]] = {
    "open-unlearning": _to_open_unlearning,
    "tofu": _to_tofu,
    "muse": _to_muse,
    "lm-eval": _to_lm_eval,
}
FORMATS = tuple(_WRITERS)


# --- names and numbers --------------------------------------------------------------------------------------

_TOFU_FILES = {
    "eval_log_forget.json": "forget",
    "eval_log.json": "retain",
    "eval_real_author_wo_options.json": "ra",
    "eval_real_world_wo_options.json": "wf",
}
_TOFU_LOSSES = {
    "avg_gt_loss": "Q_A_Prob",
    "avg_paraphrased_loss": "Q_A_PARA_Prob",
    "average_perturb_loss": "Q_A_PERT_Prob",
}
_MUSE = {
    "verbmem_f": "forget_verbmem_ROUGE",
    "knowmem_f": "forget_knowmem_ROUGE",
    "knowmem_r": "retain_knowmem_ROUGE",
    "privleak": "privleak",
}
_TRUTH = ("forget", "retain")  # the parts that have paraphrases
_NOTHING = Metric(None)
_VALUE = "value"
_NORMAL = 1.959963984540054  # standard errors from the middle to the end of a 95 % interval
_SAME = 1e-9


def _truth(part: str) -> str:
    return "forget_truth_ratio" if part == "forget" else f"{part}_Truth_Ratio"


def _percent(key: str) -> float:
    return 1.0 if key == "privleak" else 100.0  # PrivLeak is in percent everywhere


def _is_number(value: Any, *, finite: bool = True) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (not finite or math.isfinite(value))


def _number(value: Any, where: str) -> float:
    if not _is_number(value, finite=False):
        raise ValueError(f"{where} is {value!r}, no number")
    return float(value)


def _maybe(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is neither is written as null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
