"""Both sides of `parity`: what the engine captures and the instruments' functions make of it, and `published`.

Ours come from one capture of everything that is compared, as a scan captures: packed batches, shared beginnings,
float32. The others read texts from the same case and share nothing else with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from scipy import stats
from sklearn.metrics import roc_auc_score

from attacks.quantize import round_channels
from audit import asking, statistics
from audit.case import Case
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import AnyRequest, Patched, Request
from audit.quantities import MOMENTS, TOKEN, hidden
from audit.record import Finding, Question
from audit.scan import capture
from audit.target import Target
from audit.tokens import Tokens
from benchmarks import published
from benchmarks.published import Plain, Scored
from detectors import knowledge, membership, memorization, remind
from detectors.neighbours import nearest_tokens, perturb
from probes.patching import unlearning_depth
from probes.similarity import cka_rows, linear_cka

Floats = NDArray[np.float64]

AIM = 1e-4
_READ = 8  # tokens of an answer where states are put in
_NEIGHBORS = 15


@dataclass(frozen=True)
class Line:
    """A metric by both sides, row by row: NaN where it is not defined. Shown are the means over rows."""

    metric: str
    ours: Floats
    theirs: Floats
    source: str

    @property
    def difference(self) -> float:
        """The largest over rows; infinite where only one side has a number."""
        a, b = np.atleast_1d(self.ours), np.atleast_1d(self.theirs)
        if a.shape != b.shape or (np.isnan(a) != np.isnan(b)).any():
            return math.inf
        return float(np.nanmax(np.abs(a - b), initial=0.0))

    @property
    def cells(self) -> list[str]:
        """The row of the table."""
        ours, theirs = (f"{np.nanmean(side):.6g}" for side in (self.ours, self.theirs))
        n = int(np.isfinite(np.atleast_1d(self.ours)).sum())
        return [self.metric, ours, theirs, f"{self.difference:.1e}", str(n), self.source]


@dataclass(frozen=True)
class Deviation:
    """What published code gives on the same rows, and why it is not the definition's number."""

    metric: str
    published: str
    ours: str
    why: str

    @property
    def cells(self) -> list[str]:
        """The row of the table."""
        return [self.metric, self.published, self.ours, self.why]


def number(value: float) -> str:
    """Four digits of it."""
    return f"{value:.4g}"


def before(row: Example) -> str:
    """The text before an answer."""
    return f"Question: {row.prompt}\nAnswer:"


def prefix_of(case: Case) -> str:
    """ReCaLL's prefix: the shortest of the holdout rows, for the context is short."""
    row = min(case.rows("holdout"), key=lambda row: len(row.prompt) + len(row.answer))
    return " ".join(f"{row.prompt} {row.answer}".split())


class Compared(Instrument):
    """Asks for all that is compared, as instruments ask."""

    name = "parity"
    title = "Are our numbers the published ones?"
    question = Question.LEAKAGE
    access = Access.WEIGHTS

    def requests(self, case: Case, target: Target) -> list[AnyRequest]:
        """What the instruments ask for, of the roles that need it."""
        sites = tuple(f"blocks.{i}.hook_resid_post" for i in range(target.layers))
        forget = case.rows("forget")
        read = tuple(target.encode(row.prompt, row.answer).begun(_READ) for row in forget)
        made: list[AnyRequest] = [Request("read", read, (hidden(*sites),))]
        if target.role == "original":
            made += [Patched(f"read/{source}", read, source, sites) for source in ("target", "retrained")]
        states = tuple(target.decision(row.prompt, row.answer) for row in forget)
        made.append(Request("states", states, (hidden(*sites),)))
        if target.role == "target":
            sets = list(case.sets)
            prefix = prefix_of(case)
            prefixed = tuple(target.encode(f"{prefix}\n{row.prompt}", row.answer) for row in forget)
            made += asking.answers(case, target, sets, (TOKEN, MOMENTS))
            made += asking.options(case, target, sets)
            made += asking.continuations(case, target, [name for name in sets if name != "holdout"])
            made.append(Request("prefixed", prefixed))
            made.append(self._neighbours(case, target))
        if target.role == "retrained":
            made += asking.answers(case, target, ["forget", "holdout"])
            made += asking.options(case, target, ["forget"])
        return made

    def _neighbours(self, case: Case, target: Target) -> Request:
        texts = [target.encode(row.prompt, row.answer) for row in case.rows("forget")]
        embedding, special = target.embedding().numpy(), target.special_ids
        sequences, distances = [], []
        for i, text in enumerate(texts):
            allowed = [p for p in range(text.start, len(text.ids)) if text.ids[p] not in special]
            near, steps = nearest_tokens(embedding, [text.ids[p] for p in allowed], k=20, exclude=special)
            rng = np.random.default_rng(i)
            others, lengths = perturb(text.ids, allowed, near, steps, n=_NEIGHBORS, fraction=0.3, rng=rng)
            sequences += [text, *(Tokens(ids, text.start) for ids in others)]
            distances.append(lengths)
        return Request("neighbours", tuple(sequences), extra={"distances": distances})

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Nothing: the numbers are compared outside."""
        raise NotImplementedError


class BothSides:
    """Everything that is compared, for one case: `lines` and `deviations`."""

    def __init__(self, case: Case, folder: Path, dtype: torch.dtype) -> None:
        self.case = case
        self.evidence = capture(case, folder, instruments=[Compared()])
        self.plain = {role: Plain(path, dtype) for role, path in case.models.items()}
        # Of the independent side each is computed once.
        self.answers, self.options = cache(self._answers), cache(self._options)
        self.written, self.states, self.depths = cache(self._written), cache(self._states), cache(self._depths)

    def lines(self) -> Iterator[Line]:
        """Every definition that another implementation is faithful to."""
        yield from self._membership()
        yield from self._memorization()
        yield from self._knowledge()
        yield from self._utility()
        yield from self._representation()
        yield from self._remind()
        yield from self._quantized()

    # --- the independent side

    def _answers(self, role: str, name: str) -> list[Scored]:
        return [self.plain[role].answer(before(row), row.answer) for row in self.case.rows(name)]

    def _options(self, role: str, name: str, field: str) -> list[list[Scored]]:
        rows = self.case.rows(name)
        return [[self.plain[role].answer(before(row), text) for text in getattr(row, field)] for row in rows]

    def _written(self, name: str) -> list[str]:
        length = asking.new_tokens(self.case)
        return [self.plain["target"].greedy(before(row), length) for row in asking.continued_rows(self.case, name)]

    def _states(self, role: str, first: bool = False) -> list[Floats]:
        """After every block [rows, width], at the prompt's last token, or the first of all."""
        plain, found = self.plain[role], []
        for row in self.case.rows("forget"):
            ids, start = plain.tokens(before(row), row.answer)
            raw, _ = plain.states(ids[:start])
            found.append([np.asarray(state[0 if first else -1].double()) for state in raw])
        return [np.array(block) for block in zip(*found, strict=True)]

    def _depths(self, as_published: bool) -> Floats:
        original, retrained, target = (self.plain[role] for role in ("original", "retrained", "target"))
        values = []
        for row in self.case.rows("forget"):
            ids, first = target.tokens(before(row), row.answer)
            cut = ids[: first + _READ]
            values.append(published.depth_score(original, retrained, target, cut, first, as_published=as_published))
        return np.array(values)

    def right_and_wrong(self, name: str, role: str = "target") -> list[tuple[list[Scored], list[Scored]]]:
        """Of every row its paraphrases, or its answer where it has none, and its wrong answers."""
        right = self.options(role, name, "paraphrases")
        every = zip(self.answers(role, name), right, self.options(role, name, "wrong"), strict=True)
        return [(several or [own], wrong) for own, several, wrong in every]

    # --- ours

    def captured(self, name: str) -> list[dict[str, Any]]:
        """Arrays of every answer of a set."""
        return self.evidence.scores("target", f"{name}/answer")

    def logprobs(self, name: str, role: str = "target") -> list[Any]:
        """Log-probabilities of every answer of a set."""
        return asking.logprobs(self.evidence, role, f"{name}/answer")

    def wrong(self, name: str, role: str = "target") -> list[list[Any]]:
        """Log-probabilities of the wrong answers of a set."""
        return asking.grouped(self.case, self.evidence, role, name, "wrong")

    def ratios(self, name: str, role: str = "target") -> Floats:
        """Truth ratios of a set."""
        right = asking.grouped(self.case, self.evidence, role, name, "paraphrase")
        every = zip(self.logprobs(name, role), right, self.wrong(name, role), strict=True)
        return np.array([knowledge.truth_ratio(several or [own], wrong) for own, several, wrong in every])

    # --- what is compared

    def _membership(self) -> Iterator[Line]:
        def plus_plus(values: Any, _: Example) -> float:
            return membership.min_k_plus_plus(values["logprob"], values["mean"], values["variance"])

        sign = "open-unlearning, sign turned"
        scores: dict[str, tuple[Callable[[Any, Example], float], Callable[[Scored, Example], float], str]] = {
            "loss": (lambda v, _: membership.loss_score(v["logprob"]), lambda s, _: -s.loss, sign),
            "zlib": (
                lambda v, row: membership.zlib_score(v["logprob"], row.answer),
                lambda s, row: -published.zlib_ratio(s, row.answer),
                sign,
            ),
            "Min-K, 0.2": (
                lambda v, _: membership.min_k(v["logprob"]),
                lambda s, _: published.lowest(s.logprob, 0.2),
                sign,
            ),
            "Min-K, 0.4": (
                lambda v, _: membership.min_k(v["logprob"], 0.4),
                lambda s, _: published.lowest(s.logprob, 0.4),
                sign,
            ),
            "Min-K++, 0.2": (plus_plus, lambda s, _: published.lowest(published.normalised(s), 0.2), sign),
            "Min-K++, 0.2 ": (
                plus_plus,
                lambda s, _: published.lowest(published.normalised(s, floor=0.0), 0.2),
                "mink-plus-plus: variance without a floor",
            ),
        }
        areas = {}
        for metric, (mine, other, source) in scores.items():
            ours, theirs = [], []
            for name in ("forget", "holdout"):
                rows = self.case.rows(name)
                ours.append([mine(v, row) for v, row in zip(self.captured(name), rows, strict=True)])
                theirs.append([other(s, row) for s, row in zip(self.answers("target", name), rows, strict=True)])
            yield Line(metric.strip(), np.concatenate(ours), np.concatenate(theirs), source)
            labels = np.repeat([1, 0], [len(side) for side in theirs])
            areas[metric] = statistics.auc(*ours), float(roc_auc_score(labels, np.concatenate(theirs)))
        for metric in ("loss", "Min-K++, 0.2"):
            yield Line(f"AUC of {metric}", *map(np.array, areas[metric]), "scikit-learn; forget against holdout")
        mine_, other_ = areas["Min-K, 0.4"]
        leak = membership.privleak(mine_, 0.45).value, published.privleak(other_, 0.45)
        yield Line("PrivLeak, reference 0.45", *map(np.array, leak), "open-unlearning, percent")
        prefixed = zip(self.logprobs("forget"), asking.logprobs(self.evidence, "target", "prefixed"), strict=True)
        prefix, plain = prefix_of(self.case), self.plain["target"]
        texts = [(f"Question: {prefix}\n{row.prompt}\nAnswer:", row.answer) for row in self.case.rows("forget")]
        after = np.array([plain.answer(*text).loss for text in texts])
        alone = np.array([scored.loss for scored in self.answers("target", "forget")])
        ours_ = np.array([membership.recall(a, b) for a, b in prefixed])
        yield Line("ReCaLL", ours_, after / alone, "its paper: the same tokens in both passes")

    def _memorization(self) -> Iterator[Line]:
        ours = [values["match"] for values in self.captured("forget")]
        theirs = [scored.match for scored in self.answers("target", "forget")]
        yield Line(
            "exact memorization",
            np.array([memorization.exact_memorization(m) for m in ours]),
            np.array([m.sum() / len(m) for m in theirs]),
            "open-unlearning",
        )
        yield Line(
            "extraction strength",
            np.array([memorization.extraction_strength(m) for m in ours]),
            np.array([published.extraction_strength(m) for m in theirs]),
            "its definition; open-unlearning's code below",
        )

    def _knowledge(self) -> Iterator[Line]:
        yield Line(
            "probability",
            np.array([knowledge.answer_probability(x) for x in self.logprobs("forget")]),
            np.array([math.exp(-s.loss) for s in self.answers("target", "forget")]),
            "open-unlearning, TOFU",
        )
        pairs = zip(self.logprobs("neighbor"), self.wrong("neighbor"), strict=True)
        shares = map(published.share, self.answers("target", "neighbor"), self.options("target", "neighbor", "wrong"))
        yield Line(
            "probability among options",
            np.array([knowledge.normalized_probability(own, wrong) for own, wrong in pairs]),
            np.array(list(shares)),
            "open-unlearning; real authors",
        )
        pairs_of = {role: self.right_and_wrong("forget", role) for role in ("target", "retrained")}
        theirs = {role: np.array([published.truth_ratio(*pair) for pair in pairs]) for role, pairs in pairs_of.items()}
        ours = {role: self.ratios("forget", role) for role in theirs}
        r, ratio = ours["target"], theirs["target"]
        yield Line("truth ratio", r, ratio, "open-unlearning, TOFU: means of losses")
        likely = np.array([published.truth_probability(*pair) for pair in pairs_of["target"]])
        yield Line("truth ratio, right / (right + wrong)", 1 / (1 + r), likely, "open-unlearning's `prob_mean`")
        closeness = np.minimum(ratio, 1 / (ratio + 1e-10)).mean()
        forget = np.array(knowledge.forget_truth_ratio(r))
        yield Line("truth ratio, forget aggregate", forget, closeness, "open-unlearning, TOFU")
        kept = np.array([published.truth_ratio(*pair) for pair in self.right_and_wrong("retain")])
        retain = np.array(knowledge.retain_truth_ratio(self.ratios("retain")))
        yield Line("truth ratio, retain aggregate", retain, np.maximum(0, 1 - kept).mean(), "open-unlearning, TOFU")
        d, p = knowledge.forget_quality(r, ours["retrained"])
        gap = published.largest_gap(ratio.tolist(), theirs["retrained"].tolist())
        yield Line("forget quality, D", np.array(d), np.array(gap), "by definition")
        inverse = [1 / (values + 1e-10) for values in theirs.values()]
        yield Line("forget quality, p", np.array(p), np.array(stats.ks_2samp(*inverse).pvalue), "TOFU's code, on 1 / r")

    def _utility(self) -> Iterator[Line]:
        stemmed, words = RougeScorer(["rougeL"], use_stemmer=True), DefaultTokenizer(use_stemmer=True).tokenize
        parts: dict[str, float] = {}
        others: list[float] = []
        recalls: list[tuple[float, float, float]] = []
        for name in ("retain", "neighbor", "utility"):
            rows = asking.continued_rows(self.case, name)
            said = zip(rows, self.evidence.texts("target", f"{name}/continued"), self.written(name), strict=True)
            found = [
                (
                    knowledge.rouge_l_recall(row.answer, ours),
                    float(stemmed.score(row.answer, theirs)["rougeL"].recall),
                    published.common_subsequence(words(row.answer), words(theirs)) / len(words(row.answer)),
                )
                for row, ours, theirs in said
            ]
            recalls += found
            truths = [published.truth_ratio(*pair) for pair in self.right_and_wrong(name)]
            others += [fmean(each[1] for each in found), fmean(max(0.0, 1 - r) for r in truths)]
            parts[f"{name}/rouge"] = fmean(each[0] for each in found)
            parts[f"{name}/truth"] = knowledge.retain_truth_ratio(self.ratios(name))
            own, answers = self.logprobs(name), self.answers("target", name)
            if name == "retain":
                parts[f"{name}/probability"] = fmean(map(knowledge.answer_probability, own))
                others.append(fmean(math.exp(-scored.loss) for scored in answers))
            else:
                parts[f"{name}/probability"] = fmean(map(knowledge.normalized_probability, own, self.wrong(name)))
                others.append(fmean(map(published.share, answers, self.options("target", name, "wrong"))))
        mine, scorer, table = map(np.array, zip(*recalls, strict=True))
        yield Line("ROUGE-L recall", mine, scorer, "rouge_score on plain greedy text, stemmed as in TOFU")
        yield Line("ROUGE-L recall", mine, table, "the textbook's table of common subsequences")
        utility = np.array(knowledge.model_utility(parts)), np.array(harmonic_mean(others))
        yield Line("model utility", *utility, "TOFU's nine parts: retain rows, real authors, world facts")

    def _representation(self) -> Iterator[Line]:
        def blocks(role: str) -> Floats:
            states = np.stack([arrays["hidden"][0] for arrays in self.evidence.iterate(role, "states")])
            return np.moveaxis(states.astype(np.float64), 1, 0)

        ours = list(zip(blocks("target"), blocks("original"), strict=True))
        theirs = list(zip(self.states("target"), self.states("original"), strict=True))
        biased = np.array([published.cka(a, b) for a, b in theirs])
        debiased = np.array([published.cka_debiased(a, b) for a, b in theirs])
        where = "target and original, last prompt token, by block"
        plain = np.array([linear_cka(a, b, debiased=False) for a, b in ours])
        yield Line("CKA, biased", plain, biased, f"UDS's code; {where}")
        yield Line("CKA, debiased", np.array([linear_cka(a, b) for a, b in ours]), debiased, "Song et al. 2012, eq. 5")
        shares = np.array([cka_rows(a, b).mean() for a, b in ours])
        yield Line("CKA, debiased, mean of the rows' shares", shares, debiased, "the same")
        lost = {}
        for source in ("retrained", "target"):
            values = [v["logprob"].mean(axis=0) for v in self.evidence.patched("original", f"read/{source}")]
            lost[source] = np.array([each[0] - each[1:] for each in values])
        depths = unlearning_depth(lost["retrained"], lost["target"])
        yield Line("UDS", depths, self.depths(False), "its paper: the blocks' own outputs put in")

    def _remind(self) -> Iterator[Line]:
        sequences = self.evidence.sequences("target", "neighbours")
        ours = np.array([-v["logprob"].mean() for v in self.evidence.iterate("target", "neighbours")])
        theirs = np.array([self.plain["target"].scored(t.ids, t.start).loss for t in sequences])
        yield Line("REMIND, losses of texts and neighbours", ours, theirs, "shared beginnings / one by one")
        distances = self.evidence.extra("target", "neighbours")["distances"]
        rows = zip(ours.reshape(-1, 1 + _NEIGHBORS), theirs.reshape(-1, 1 + _NEIGHBORS), distances, strict=True)
        features = [
            (remind.remind_features(a[0], a[1:], d), published.remind_features(b[0], b[1:].tolist(), d.tolist()))
            for a, b, d in rows
        ]
        mine, other = (np.array(side) for side in zip(*features, strict=True))
        scale = np.maximum(np.abs(other), 1.0)
        source = "our own formulas, for none are public; relative where above 1"
        yield Line("REMIND, 15 features", (mine / scale).ravel(), (other / scale).ravel(), source)

    def _quantized(self) -> Iterator[Line]:
        weight = self.plain["target"].model.model.layers[0].mlp.down_proj.weight.detach().float()
        scale, zero = weight.abs().amax(dim=1) / 127, torch.zeros(len(weight), dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
        source = "torch.fake_quantize_per_channel_affine; one matrix"
        yield Line("int8 rounding", round_channels(weight, 8).numpy().ravel(), rounded.numpy().ravel(), source)

    def deviations(self) -> Iterator[Deviation]:
        """What published code does otherwise, on the same rows."""
        plain, rows = self.plain["target"], self.case.rows("forget")
        answers = self.answers("target", "forget")
        strength = [published.extraction_strength(s.match, as_published=True) for s in answers]
        ours = [memorization.extraction_strength(v["match"]) for v in self.captured("forget")]
        raised = sum(a != b for a, b in zip(strength, ours, strict=True))
        yield Deviation(
            "extraction strength: open-unlearning",
            number(fmean(strength)),
            number(fmean(ours)),
            f"the loop over k ends at L - 1 if nothing matches: {raised} of {len(ours)} rows have 1/L for 0",
        )
        short = [published.lowest(s.logprob, 0.05, at_least_one=False) for s in self.answers("target", "neighbor")]
        yield Deviation(
            "Min-K 0.05: MUSE; Min-K++: mink-plus-plus, ReCaLL",
            f"NaN on {sum(map(math.isnan, short))} of {len(short)} rows",
            number(fmean(membership.min_k(v["logprob"], 0.05) for v in self.captured("neighbor"))),
            "int(k L) is 0 for fewer than 1/k tokens (real authors' names), and the mean of nothing NaN; here one "
            "token at least, as in open-unlearning",
        )
        yield self._recall(plain, [row.answer for row in rows])
        depths, faithful = self.depths(True), self.depths(False)
        yield Deviation(
            "UDS: its code",
            number(float(np.nanmean(depths))),
            number(float(np.nanmean(faithful))),
            "the last block is given `hidden_states[-1]`, which has been through the final norm, and so is normalised "
            f"twice; differs on {int((np.abs(depths - faithful) > AIM).sum())} of {len(depths)} rows",
        )
        spread = max(float(np.ptp(block, axis=0).max()) for block in self.states("target", True))
        yield Deviation(
            "CKA at token 0: Representational_Analysis_Tools",
            f"0 / 0: rows differ by {spread:.0e}",
            number(linear_cka(self.states("target")[-1], self.states("original")[-1])),
            "the first token has seen no prompt, so that centred states are 0; here the last prompt token, last block",
        )
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(2, 64, 768))
        yield Deviation(
            "CKA in batches: UUEF",
            number(published.cka(x, y)),
            number(linear_cka(x, y)),
            "biased where rows are fewer than dimensions: 64 rows of random numbers, width 768; here debiased",
        )
        paper = [published.truth_ratio_of_paper(right, wrong) for right, wrong in self.right_and_wrong("forget")]
        yield Deviation(
            "truth ratio: TOFU's paper",
            number(fmean(paper)),
            number(fmean(self.ratios("forget"))),
            "the paper averages probabilities, its code losses (a geometric mean); here as the code",
        )
        texts = [plain.tokens(before(row), row.answer) for row in rows]
        ended = [plain.scored([*ids, plain.tokenizer.eos_token_id], first).loss for ids, first in texts]
        yield Deviation(
            "loss with the end of text: open-unlearning, TOFU",
            number(fmean(ended)),
            number(fmean(scored.loss for scored in answers)),
            "an end token is appended; it counts for probabilities and truth ratios, not for Min-K, EM and ES; here "
            "for none",
        )
        said = list(zip(asking.continued_rows(self.case, "retain"), self.written("retain"), strict=True))
        muse = RougeScorer(["rougeL"], use_stemmer=False)
        yield Deviation(
            "ROUGE-L: MUSE",
            number(fmean(muse.score(row.answer, text)["rougeL"].fmeasure for row, text in said)),
            number(fmean(knowledge.rouge_l_recall(row.answer, text) for row, text in said)),
            "another definition under the name: F1 without stemming; here TOFU's recall with it",
        )
        labels = np.repeat(np.arange(3), 50)
        score = rng.normal(size=150) + labels
        fair = remind.classify_score(score, labels, np.arange(150))
        yield Deviation(
            "REMIND's baselines: three-class AUC",
            number(fmean(float(roc_auc_score(labels == c, score)) for c in range(3))),
            number(remind.multiclass_auc(fair, labels)),
            "the mean of three one-against-the-rest AUCs of one number is 1/2 by identity; here the classifier that "
            "REMIND has too (random numbers of means 0, 1 and 2)",
        )

    def _recall(self, plain: Plain, texts: Sequence[str]) -> Deviation:
        prefix = prefix_of(self.case)
        official = [published.recall_official(plain, prefix, text) for text in texts]
        ours = []
        for text in texts:
            after, start = plain.tokens(prefix, text)
            alone, first = plain.tokens("", text)
            longer = len(after) - len(alone)
            assert after[start:] == alone[start - longer :], "the same tokens"
            pair = plain.scored(alone, first).logprob, plain.scored(after, longer + first).logprob
            ours.append(membership.recall(*pair))
        return Deviation(
            "ReCaLL: its code, answers as texts",
            number(fmean(official)),
            number(fmean(ours)),
            "the prefixed pass begins the text with a second BOS and scores one token more than the plain pass; rank "
            f"correlation over rows {stats.spearmanr(official, ours).statistic:.2f}",
        )
