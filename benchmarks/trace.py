"""Fingerprints of models of known history: the table that the trace detectors are trained on, and how good they are.

    python -m benchmarks.trace --bench bench --rows trace-rows          # bench: the folder that `audit bench` filled

For every organism that was changed from its original (or from the retrained model), every original beside itself, and
fine-tunes matched to every unlearned one, the numbers that the trace detectors use are computed as in a scan and
kept. Then the tables are printed: AUROC of unlearned against {original, ordinary edits, matched fine-tunes}, by access
and prompts, each model judged by a classifier that saw neither its history nor its family. `--write` replaces the table
in the package.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from audit.case import Case, Options
from audit.evidence import Evidence
from audit.gather import Run, capture_one
from audit.instrument import Instrument
from audit.inventory import take_inventory
from audit.loaders import SetSpec
from audit.organisms.families import BASES, Family
from audit.organisms.histories import history_of
from audit.organisms.recipes import Recipe, read_history
from audit.progress import SILENT
from audit.target import Target
from detectors.fingerprint import TABLE, Features, Table, held_out_scores, write_table
from detectors.trace_activations import TraceActivations
from detectors.trace_logits import TraceLogits
from detectors.trace_text import TraceText
from detectors.tracing import asked_sets

NULLS, STEPS = 2, 30
_ASKING = (TraceLogits(), TraceActivations(), TraceText())


def changed(root: Path) -> list[Recipe]:
    """The originals, and the organisms that were changed from a taught model, whole, and their parents built too."""
    found = []
    for folder in sorted(root.iterdir()):
        story = read_history(folder)
        if story is None or story["broken"]:
            continue
        recipe = Recipe(**story["recipe"])
        history = history_of(recipe.history)
        if (
            (history.method or history.change or recipe.history == "original")
            and "+" not in recipe.history
            and (root / parent_of(recipe).name).is_dir()
        ):
            found.append(recipe)
    return found


def parent_of(recipe: Recipe) -> Recipe:
    """What it is compared with: what it was made of (the original, or the retrained model), an original with itself."""
    return Recipe(recipe.base, history_of(recipe.history).parent or recipe.history, recipe.seed, recipe.world)


def rows_of(recipe: Recipe, bench: Path) -> Iterator[dict[str, Any]]:
    """A row for the organism, and for fine-tunes matched to it if it was unlearned."""
    from audit.matched import change_by_site, fine_tune_matched
    from audit.weights import Folder
    from detectors.trace import _data, budget_for

    with tempfile.TemporaryDirectory() as scratch:
        case, evidence, run, original = captured(recipe, bench, Path(scratch), _ASKING)
        folders = case.models
        unlearned = bool(history_of(recipe.history).method)
        name = recipe.history.removeprefix("retrained-then-")
        yield _row(recipe, case, evidence, "target", name, unlearned)
        if not unlearned:
            return
        radii, data = change_by_site(Folder(folders["target"]), Folder(folders["original"])), _data(case, original)
        for k in range(NULLS):
            original.release()
            kind = (k + hash_of(recipe.name)) % len(data)
            rate = budget_for(case, original).learning_rate
            for _ in fine_tune_matched(original.model, data[kind], radii, steps=STEPS, learning_rate=rate, seed=k):
                pass
            view = original.altered(f"null@{k}", f"{recipe.name}/{k}")
            view.adopt(original)
            capture_one(run, view, evidence, run.instruments)
            yield _row(recipe, case, evidence, view.role, f"matched-{('retain', 'narrow', 'other')[kind]}", False)


def captured(
    recipe: Recipe, bench: Path, scratch: Path, asking: Sequence[Instrument]
) -> tuple[Case, Evidence, Run, Target]:
    """The case of an organism beside what it was made of, and what some instruments ask of both, captured."""
    torch.set_num_threads(1)
    sets = Family(recipe.base, recipe.seed, recipe.world).write_sets(bench / "data", f"{recipe.family}-{recipe.seed}")
    organisms = bench / "organisms"
    folders = {"target": organisms / recipe.name, "original": organisms / parent_of(recipe).name}
    case = Case.build(folders, {name: SetSpec(path) for name, path in sets.items()}, Options(device="cpu"))
    run, evidence = Run(case, scratch, SILENT, list(asking), []), Evidence()
    for role, folder in folders.items():
        target = Target(role, take_inventory(folder), device="cpu", dtype=torch.float32, template="auto")
        capture_one(run, target, evidence, run.instruments)
    if run.not_run:
        raise RuntimeError(run.not_run[0].reason)
    return case, evidence, run, target


def hash_of(text: str) -> int:
    """The same number for the same text in every process."""
    return sum(text.encode())


def _row(recipe: Recipe, case: Case, evidence: Evidence, role: str, history: str, unlearned: bool) -> dict[str, Any]:
    use = {name: np.ones(len(evidence.sequences(role, f"trace/{name}")), dtype=bool) for name in asked_sets(case)}
    texts = {name: np.ones(len(evidence.texts(role, f"trace-text/{name}")), dtype=bool) for name in use}
    features: Features = {}
    alone = replace(case, models={"target": case.models["target"]})
    for instrument, rows in zip(_ASKING, (use, use, texts), strict=True):
        features |= instrument.features(case, evidence, role, rows)
        if not isinstance(instrument, TraceActivations):
            features |= instrument.features(alone, evidence, role, rows)
    return {
        "history": history,
        "family": f"{recipe.family}-{recipe.seed}",
        "of": recipe.name,
        "unlearned": unlearned,
        "edited_retrained": unlearned and recipe.history.startswith("retrained-then-"),
        "features": features,
    }


def one(task: tuple[Recipe, Path, Path]) -> str:
    """Compute and keep the rows of one organism, unless they are there."""
    recipe, bench, out = task
    path = out / f"{recipe.name}.json"
    if not path.is_file():
        made = list(rows_of(recipe, bench))
        path.with_suffix(".tmp").write_text(json.dumps(made))
        path.with_suffix(".tmp").rename(path)
    return recipe.name


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as arrays, with the features that all of them have; a retrained model's edits are left out."""
    rows = [row for row in rows if not row["edited_retrained"]]
    names = sorted(set.intersection(*(set(row["features"]) for row in rows)))
    values = np.array([[row["features"][name] for name in names] for row in rows])
    finite = np.isfinite(values).all(0)
    return Table(
        tuple(np.array(names)[finite].tolist()),
        values[:, finite],
        np.array([row["unlearned"] for row in rows]),
        tuple(row["history"] for row in rows),
        tuple(row["family"] for row in rows),
    )


# --- tables -------------------------------------------------------------------------------------------------


def views(names: Sequence[str]) -> dict[str, list[str]]:
    """What an auditor sees, and the features there are of it."""

    def kind(name: str) -> str:
        body = name.removeprefix("alone.")
        if body.startswith(("text.", "text-")):
            return "text"
        return "states" if len(body.split(".")) == 3 else "logits"

    made = {}
    for relevant in (False, True):
        with_original = [n for n in names if not n.startswith("alone.") and kind(n) != "text"]
        both = [n for n in with_original if relevant or "forget" not in n]
        made[f"logits and states, original, {'all' if relevant else 'irrelevant'} prompts"] = both
    for alone in (False, True):
        for what in ("logits", "states", "text"):
            for relevant in (False, True):
                chosen = [
                    n for n in names
                    if n.startswith("alone.") == alone and kind(n) == what and (relevant or "forget" not in n)
                ]  # fmt: skip
                prompts = "all prompts" if relevant else "irrelevant prompts"
                if chosen:
                    made[f"{what}, {'no original' if alone else 'original'}, {prompts}"] = chosen
    return made


def auroc(scores: np.ndarray, positive: np.ndarray, history: np.ndarray) -> tuple[float, float, float]:
    """Area under the ROC curve, with a 95 % interval that resamples histories."""
    from sklearn.metrics import roc_auc_score

    rng, groups = np.random.default_rng(0), {h: np.flatnonzero(history == h) for h in np.unique(history)}
    draws = []
    for _ in range(500):
        picked = np.concatenate([groups[h] for h in rng.choice(list(groups), len(groups))])
        if len(np.unique(positive[picked])) == 2:
            draws.append(roc_auc_score(positive[picked], scores[picked]))
    return float(roc_auc_score(positive, scores)), float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


_BY_HISTORY = (
    "logits and states, original, irrelevant prompts",
    "logits and states, original, all prompts",
    "logits, original, irrelevant prompts",
    "logits, original, all prompts",
    "states, original, all prompts",
    "text, original, all prompts",
)


def show(table: Table) -> None:
    """All tables, as Markdown."""
    y, history = table.unlearned, np.array(table.histories)
    matched = np.array([name.startswith("matched-") for name in table.histories])
    plain = ~y & ~matched
    print(
        f"{y.sum()} unlearned models of {len(set(history[y]))} methods; {plain.sum()} originals and ordinary edits of "
        f"{len(set(history[plain]))} kinds; {matched.sum()} matched fine-tunes; {len(set(table.families))} families.\n"
    )
    _header(
        "seen", "features", "AUROC against all others [95 %]", "against ordinary edits", "against matched fine-tunes",
        "unlearned found at 5 % of matched", "ordinary edits alarmed there", "unlearned found at 1 % of all others",
    )  # fmt: skip
    kept = {}
    for name, columns in views(table.names).items():
        s = kept[name] = held_out_scores(table, columns)
        whole = auroc(s, y, history)
        edits, nulls = (auroc(s[y | part], y[y | part], history[y | part])[0] for part in (plain, matched))
        at5, at1 = np.quantile(s[matched], 0.95), np.quantile(s[~y], 0.99)
        shares = " | ".join(f"{np.mean(s[part] > at):.0%}" for part, at in ((y, at5), (plain, at5), (y, at1)))
        area = f"**{whole[0]:.3f}** [{whole[1]:.3f}, {whole[2]:.3f}]"
        print(f"| {name} | {len(columns)} | {area} | {edits:.3f} | {nulls:.3f} | {shares} |")
    print("\nShare of models above the threshold (99 % of all others below), by history:\n")
    _header("history", "unlearned", "n", *_BY_HISTORY)
    for h in sorted(set(history), key=lambda h: (not y[history == h][0], h)):
        i = history == h
        cells = [f"{np.mean(kept[n][i] > np.quantile(kept[n][~y], 0.99)):.0%}" for n in _BY_HISTORY]
        print(f"| {h} | {'yes' if y[i][0] else 'no'} | {i.sum()} | " + " | ".join(cells) + " |")
    _which(table)
    _permuted(table)


def _header(*columns: str) -> None:
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def _published(given: argparse.Namespace, recipes: Sequence[Recipe], workers: int) -> None:
    """Accuracy of telling a model from its original, prompts held out: the published setting."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(published, [(recipe, given.bench, given.rows) for recipe in recipes]))
    print("\nThe published setting: accuracy with which states are told from the original's, prompts held out:\n")
    print("| what | models | mean | least | greatest |\n|---|---|---|---|---|")
    unlearned = np.array([bool(history_of(recipe.history).method) for recipe in recipes])
    edited = np.array([recipe.history.startswith("retrained-then-") for recipe in recipes])
    values = np.array(found)
    for name, part in (("unlearned", unlearned & ~edited), ("ordinary edits", ~unlearned)):
        group = values[part]
        print(f"| {name} | {len(group)} | {group.mean():.3f} | {group.min():.3f} | {group.max():.3f} |")
    print("\n| history | mean |\n|---|---|")
    for history in sorted({recipe.history for recipe in recipes if not recipe.history.startswith("retrained-then-")}):
        group = values[[recipe.history == history for recipe in recipes]]
        print(f"| {history} | {group.mean():.3f} |")


def published(task: tuple[Recipe, Path, Path]) -> float:
    """The accuracy for one organism, over the prompts of all sets and the states of all blocks that are captured."""
    recipe, bench, out = task
    path = out / f"{recipe.name}.published"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            case, evidence, *_ = captured(recipe, bench, Path(scratch), (TraceActivations(),))
            path.write_text(str(float(TraceActivations().told_apart(case, evidence, "target").mean())))
    return float(path.read_text())


def _which(table: Table) -> None:
    """Which method: N-way, on families held out."""
    from detectors.fingerprint import _fit

    family, history = np.array(table.families), np.array(table.histories)
    names = next(columns for name, columns in views(table.names).items() if name == "logits, original, all prompts")
    x, use = table.columns(names), table.unlearned
    several = np.array([len(set(family[use & (history == h)])) > 1 for h in history]) & use
    right = top3 = 0
    for f in sorted(set(family[several])):
        train, test = several & (family != f), several & (family == f)
        model = _fit(x[train], history[train])
        order = np.argsort(-model.predict_proba(x[test]), 1)[:, :3]
        guess = model.classes_[order]
        right += int((guess[:, 0] == history[test]).sum())
        top3 += int((guess == history[test][:, None]).any(1).sum())
    n, k = int(several.sum()), len(set(history[several]))
    print(
        f"\nWhich of {k} methods (families held out, next-token distributions on all prompts): right {right / n:.0%}, "
        f"among the three likeliest {top3 / n:.0%}; chance {1 / k:.0%} and {3 / k:.0%}; n = {n}."
    )


def _permuted(table: Table) -> None:
    """Labels exchanged among histories within a family: what is left is chance."""
    names = next(columns for name, columns in views(table.names).items() if name == "logits, original, all prompts")
    rng, found = np.random.default_rng(0), []
    history = np.array(table.histories)
    kinds = sorted(set(history))
    for _ in range(20):
        label = dict(zip(kinds, rng.permutation([table.unlearned[history == h][0] for h in kinds]), strict=True))
        y = np.array([label[h] for h in history])
        s = held_out_scores(replace(table, unlearned=y), names)
        ok = np.isfinite(s)
        found.append(auroc(s[ok], y[ok], history[ok])[0])
    print(
        f"\nLabels permuted among histories, 20 times: AUROC {np.mean(found):.2f} "
        f"(least {min(found):.2f}, greatest {max(found):.2f})."
    )


def main() -> None:
    """Parse, compute what is missing, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trace", description="The trace detectors, measured.")
    parser.add_argument("--bench", type=Path, required=True, help="folder of `audit bench`: organisms and data")
    parser.add_argument("--rows", type=Path, required=True, help="where rows are kept")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="replace the table in the package")
    given = parser.parse_args()
    given.rows.mkdir(parents=True, exist_ok=True)
    recipes = [r for r in changed(given.bench / "organisms") if r.base in BASES]
    tasks = [(recipe, given.bench, given.rows) for recipe in recipes]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for i, name in enumerate(pool.map(one, tasks)):
            print(f"{i + 1}/{len(tasks)} {name}", file=sys.stderr, flush=True)
    rows = [row for recipe in recipes for row in json.loads((given.rows / f"{recipe.name}.json").read_text())]
    assert all(math.isfinite(v) for row in rows for v in row["features"].values())
    table = table_of(rows)
    if given.write:
        write_table(table, TABLE)
    show(table)
    _published(given, [recipe for recipe in recipes if recipe.history != "original"], given.workers)


if __name__ == "__main__":
    main()
