"""Sampling: asked many times, does the model draw the answer that greedy decoding hides, or a beam search keep it?

    leak@k  = P(at least one of k answers drawn contains the right one),   estimated by 1 - C(n - c, k) / C(n, k)
    finding = leak@k of forget rows - leak@k of holdout rows, for the temperature and k where it is largest

of n answers drawn at temperature T from all that the model may write (no top-k, no top-p), c of which contain the right
one: the estimate has no bias, as 1 - (1 - c / n)^k has. A beam search of width b leaks a row if any of the b texts that
it ends with contains the answer.

An answer is contained if its words stand in the text, in order and next to each other, whatever their case and the
punctuation between; one of more than four words if its ROUGE-L recall is at least 1/2.

Source: leak@k: Reisizadeh et al. 2025 (arXiv 2511.04934); the estimator: Chen et al. 2021 (arXiv 2107.03374); sampling
against unlearning: Scholten et al. 2024 (arXiv 2410.03523). The comparison with holdout rows is this project's.

Traps:

- *Who guesses often guesses right*: with ten possible answers, eight draws of a model that knows nothing hit one in
  two. leak@k by itself means nothing; holdout rows, asked as often at the same temperature, are guessed as well.
- *The more draws, the smaller the excess*: guessing fills the holdout rows. k = 1 often separates best.
- *What was answered at once needed no attack*: a control asks what forget rows gained over the greedy answer.
- *A refusal that is nearly certain* hides what lies under it from any number of draws that can be paid for.
- *Drawn is drawn*: another seed gives other answers. Draws are made of prompt, number and the case's seed, the same
  whatever else is in the batch; temperatures share them, which makes their difference smaller than either's error.
- *Reasoning counts*: where the text holds a span of it, so does what is said there (see `reasoning`).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attacks.recall import SETS, Floats, came_back, mean_row
from audit.asking import new_tokens, unprompted
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Generate
from audit.record import Finding, Question, Side
from detectors.knowledge import rouge_l_recall

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["Sampling", "contains", "leak_at_k", "spread"]

ROLES = ("target", "retrained")
LONG = 4
"""Answers of more words are seldom said word by word; half of them, in order, is enough."""

_SOURCE = "leak@k: Reisizadeh et al. 2025, arXiv 2511.04934; control: this project, 2026"

LEAKS = Statistic(
    "leak", "leak@k: the right answer is among k answers drawn, or in a beam", "probability",
    "the forgotten answer is drawn more often than one never taught: knowledge remains", (0.0, 1.0), 0.1, _SOURCE,
)  # fmt: skip


def leak_at_k(hits: ArrayLike, n: int, k: int) -> Floats:
    """Unbiased estimate of the probability, [...], that one of k draws hits, from how many of n did, `hits` [...].

    Raises ValueError unless 1 <= k <= n and hits lie within 0..n.
    """
    counts = np.asarray(hits)
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and n, got k = {k}, n = {n}")
    if counts.size and (counts.min() < 0 or counts.max() > n):
        raise ValueError(f"hits must lie between 0 and n = {n}")
    of = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return np.asarray(of[counts])


def contains(answer: str, text: str) -> bool:
    """Does a text say an answer? Its words next to each other; of one longer than `LONG` words half, in order.

    Compared are letters and digits, NFKC and case-folded. In scripts without case, which may have no spaces either, an
    answer need not stand apart from its neighbours. Raises ValueError if `answer` is blank.
    """
    if not answer.strip():
        raise ValueError("answer is empty")
    wanted, said = (" ".join(re.findall(r"\w+", _folded(each))) for each in (answer, text))
    if len(wanted.split()) > LONG:
        return rouge_l_recall(answer, text) >= 0.5
    if not wanted:  # nothing but punctuation
        return answer.strip() in text
    if any(unicodedata.category(character) == "Lo" for character in wanted):
        return wanted in said
    return f" {wanted} " in f" {said} "


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def spread(case: Case, name: str, most: int) -> tuple[Example, ...]:
    """So many rows of a set, in file order, drawn by seed from its entities in turn: only entities are independent."""
    rows = case.rows(name)
    clusters, taken = case.clusters(rows), Counter[str]()
    turn = {}
    for i in np.random.default_rng(case.options.seed).permutation(len(rows)):
        turn[i] = taken[clusters[i]]
        taken[clusters[i]] += 1
    return tuple(rows[i] for i in sorted(sorted(turn, key=turn.__getitem__)[:most]))


@dataclass(frozen=True)
class Recipe:
    """The budget.

    Attributes:
        rows: of a set, at most.
        samples: answers drawn of each row at each temperature.
        temperatures: at which they are drawn.
        ks: of leak@k.
        beams: width of the beam search; 1: none.
    """

    rows: int
    samples: int
    temperatures: tuple[float, ...]
    ks: tuple[int, ...]
    beams: int


RECIPES: Mapping[str, Recipe] = {
    "quick": Recipe(24, 4, (1.0,), (1, 4), 1),
    "standard": Recipe(48, 8, (0.7, 1.0), (1, 8), 4),
    "thorough": Recipe(240, 32, (0.7, 1.0, 1.5), (1, 8, 32), 8),
}


class Sampling(Instrument):
    """Is the answer among many that are drawn?"""

    name = "sampling"
    title = "Does it come back when asked many times?"
    question = Question.RECOVERY
    access = Access.TEXT
    sets = ("forget",)
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """A passage asks nothing that could be answered."""
        return super().missing(case) or unprompted(case)

    def rows(self, case: Case, name: str) -> tuple[Example, ...]:
        """The rows of a set that are asked."""
        return spread(case, name, RECIPES[case.options.budget.value].rows)

    def requests(self, case: Case, target: Target) -> list[Generate]:
        """Of every row the greedy answer, answers drawn at each temperature, and those of a beam search."""
        if target.role not in ROLES:
            return []
        recipe, length, seed = RECIPES[case.options.budget.value], new_tokens(case), case.options.seed
        made: list[Generate] = []
        for name in (name for name in SETS if name in case.sets):
            prompts = tuple(target.encode_prompt(row.prompt, room=length) for row in self.rows(case, name))
            made.append(Generate(_request(name), prompts, length))
            made += [
                Generate(_request(name, t), prompts, length, samples=recipe.samples, temperature=t, seed=seed)
                for t in recipe.temperatures
            ]
            if recipe.beams > 1 and target.searches:
                made.append(Generate(_request(name, "beam"), prompts, length, beams=recipe.beams))
        return made

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """leak@k against never-taught rows, for every temperature, every k, and the beam search."""
        recipe = RECIPES[case.options.budget.value]
        rows = {name: self.rows(case, name) for name in SETS if name in case.sets}

        def hits(role: str, name: str, way: float | str, each: int) -> NDArray[np.intp]:
            """How many of the answers of each row contain the right one: [rows]."""
            texts = np.array(evidence.texts(role, _request(name, way)), dtype=object).reshape(-1, each)
            said = [[contains(row.answer, text) for text in of] for row, of in zip(rows[name], texts, strict=True)]
            return np.asarray(np.sum(said, axis=1))

        hits = cache(hits)

        def drawn(temperature: float, k: int, role: str, name: str) -> Floats:
            return leak_at_k(hits(role, name, temperature, recipe.samples), recipe.samples, k)

        columns: dict[str, Callable[[str, str], Floats]] = {
            f"{k} at T = {t:g}": partial(drawn, t, k) for t in recipe.temperatures for k in recipe.ks
        }
        if all(evidence.has(role, _request("forget", "beam")) for role in ROLES if role in case.models):
            columns[f"beam of {recipe.beams}"] = lambda role, name: hits(role, name, "beam", recipe.beams).clip(max=1.0)

        def score(role: str, name: str) -> Floats:
            return np.stack([column(role, name) for column in columns.values()], axis=1)

        def greedy(role: str, name: str) -> Floats:
            return np.asarray(hits(role, name, "greedy", 1), dtype=float)

        finding = against_never_taught(
            self,
            case,
            evidence,
            LEAKS,
            score,
            columns=("answers drawn", list(columns)),
            rows=rows,
            roles=ROLES,
            seen_anywhere=True,
            # A refusal is drawn in place of guesses too: fewer hits than holdout rows have are no reason for alarm.
            sides=(Side.REMAINS, Side.NEITHER),
        )
        chosen = columns[finding.layer or next(iter(columns))]
        if "holdout" in rows:
            finding.controls.append(came_back(case, rows, lambda name: chosen("target", name) - greedy("target", name)))
        if finding.table is not None:
            finding.table.rows += [
                mean_row([role, name, "greedy"], greedy(role, name), case.clusters(asked), seed=case.options.seed)
                for role in ROLES
                if role in case.models
                for name, asked in rows.items()
            ]
        return [finding]

    def examples(self, case: Case, evidence: Evidence) -> dict[str, dict[str, float | str]]:
        """Per forget row, the share of the answers drawn at the last temperature that contain the right one."""
        recipe = RECIPES[case.options.budget.value]
        texts = evidence.texts("target", _request("forget", recipe.temperatures[-1]))
        drill: dict[str, dict[str, float | str]] = {}
        for i, row in enumerate(self.rows(case, "forget")):
            drawn = texts[i * recipe.samples : (i + 1) * recipe.samples]
            drill[row.id] = {"drawn": float(np.mean([contains(row.answer, text) for text in drawn]))}
        return drill


def _request(name: str, way: float | str = "greedy") -> str:
    return f"sampling/{name}/{way}"
