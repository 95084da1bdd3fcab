"""Relearning without the facts: do they come back when the model is trained on something that does not state them?

What is measured: the target is fine-tuned on text that teaches none of the tested facts, in several tiers of relevance,
all with the same steps, batch and learning rate, each on fresh weights, and asked again at several steps.

    related     what stands before the answers of forget and holdout rows, without the answers
    given       the case's `relearn` set, without rows that hold an answer; only beside a retrained model
    retain      half of the retain rows; the other half is asked
    unrelated   the utility set; without one, the words of the same retain rows, shuffled

    recovered_g(tier, step) = share of group g whose right answer is preferred,   g = forget, holdout
    finding                 = recovered_forget - recovered_holdout, for the tier and step where it is largest

Nothing was taught, so what comes back was there. The holdout facts are the never-taught control in the very same model;
a retrained model, where given, is trained in the same ways, and its difference taken off. Tier and step were chosen,
and that is paid for (`attacks.alteration`, which also says what `came back` asks).

Source: BLUR, Hu et al. 2025 (arXiv 2506.15699), for tiers of relevance; Hu et al. 2024 (arXiv 2406.13356) for public
text without the answers; Yoon et al. 2026 (arXiv 2602.03379): the tiers of BLUR differ in their number of steps, and
in syntax as much as in topic. Hence one budget, the largest step taken, and questions whose form is the tested one.

Traps:

- *A prompt may state another fact's answer*: a prompt that holds an answer of its own entity is left out.
- *`given` is about the forget entities only*: it may teach of them what nobody teaches of the holdout entities, so it
  is used beside a retrained model alone, which is trained on it too.
- *Plain passages have nothing before their answer*: without prompts there is no tier `related`.
- *Shuffled words match no syntax*: as tier `unrelated` they are the weaker stand-in. Give a utility set.
- *Fine-tuning makes every model forget*: the untaught half of the retain rows, after the last tier and step, is the
  positive control.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from attacks.alteration import Alteration, Altering, Bools
from attacks.recall import SETS, recalled, tested
from attacks.recovery import Group, curve_figure, summary
from attacks.relearn import Recipe, fine_tune, recipe_for
from audit.case import Case
from audit.contrast import Statistic
from audit.evidence import Evidence
from audit.instrument import Stage
from audit.loaders import Example
from audit.progress import part_of
from audit.record import Finding
from audit.statistics import halves
from audit.tokens import Tokens

if TYPE_CHECKING:
    from audit.opened import OpenModel
    from audit.target import Target

__all__ = ["RelearnTiers", "shuffled", "silent", "unanswered"]

TIERS = ("related", "given", "retain", "unrelated")
_STEPS = {"quick": (20,), "standard": (10, 20, 40), "thorough": (10, 20, 40, 80)}
_SOURCE = "BLUR (arXiv 2506.15699); Hu et al. 2024, arXiv 2406.13356; arXiv 2602.03379"


def unanswered(rows: Sequence[Example]) -> list[str]:
    """The distinct prompts of rows, in order, without those that hold an answer to a row of the same entity."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(row.entity or row.id, set()).add(_words(row.answer))
    kept = (row.prompt for row in rows if row.prompt.strip() and not _holds(row.prompt, answers[row.entity or row.id]))
    return list(dict.fromkeys(kept))


def silent(rows: Sequence[Example], asked: Sequence[Example]) -> list[Example]:
    """The rows, in order, that hold none of the answers of the rows that are asked."""
    answers = {_words(row.answer) for row in asked}
    return [row for row in rows if not _holds(f"{row.prompt} {row.answer}", answers)]


def shuffled(texts: Sequence[str], seed: int) -> list[str]:
    """As many texts, as long, of the same words: all words of all of them in random order."""
    words = [word for text in texts for word in text.split()]
    drawn = iter(np.random.default_rng(seed).permutation(np.array(words, dtype=object)).tolist())
    return [" ".join(next(drawn) for _ in text.split()) for text in texts]


def tiers(case: Case, target: Target) -> dict[str, list[Tokens]]:
    """What is trained on, by tier; those that the case has nothing for are left out."""
    asked = tested(case, "forget") + (tested(case, "holdout") if "holdout" in case.sets else ())
    touched = [row for row, a in zip(tested(case, "retain"), _taught(case), strict=True) if a]
    made: dict[str, list[Tokens]] = {"related": [_whole(target, prompt) for prompt in unanswered(asked)]}
    if "relearn" in case.sets and "retrained" in case.models:
        made["given"] = [target.question(row) for row in silent(tested(case, "relearn"), asked)]
    made["retain"] = [target.question(row) for row in touched]
    if "utility" in case.sets:
        made["unrelated"] = [target.question(row) for row in tested(case, "utility")]
    else:
        texts = shuffled([f"{row.prompt} {row.answer}" for row in touched], case.options.seed)
        made["unrelated"] = [target.encode("", text) for text in texts]
    return {tier: made[tier] for tier in TIERS if made.get(tier)}


class RelearnTiers(Altering):
    """Do facts come back under fine-tuning that does not state them?"""

    name = "relearn-tiers"
    title = "Does it come back when something else is taught?"
    modality = "text"
    reference = _SOURCE
    statistic = Statistic(
        "recovered", "fine-tuning that states none of the facts: right answers preferred", "accuracy",
        "training on other text brings forgotten facts back", (0.0, 1.0), 0.15, _SOURCE,
    )  # fmt: skip

    def asked(self, case: Case, name: str) -> Bools:
        """All but the retain rows that a tier teaches."""
        return ~_taught(case) if name == "retain" else super().asked(case, name)

    def alterations(self, case: Case, target: OpenModel) -> list[Alteration]:
        """Every tier, trained on up to every tested step."""
        recipe = recipe_for(case, target)
        used = ",".join(case.sets[name].digest for name in (*SETS, "utility", "relearn") if name in case.sets)
        given = f"{recipe.batch}/{recipe.learning_rate}/{case.options.seed}/{case.options.budget.value}/{used}"
        return [
            Alteration(
                f"{tier} {step}",
                partial(_train, case=case, tier=tier, recipe=replace(recipe, steps=(step,))),
                f"{tier}/{step}/{given}/{target.template}/{'retrained' in case.models}",
            )
            for tier in tiers(case, target)  # type: ignore[arg-type]
            for step in _STEPS[case.options.budget.value]
        ]

    def run(self, case: Case, target: OpenModel, tick: Any) -> Iterator[Stage]:
        """One run a tier, visited at every tested step: as if each had been trained up to by itself, and cheaper."""
        recipe = replace(recipe_for(case, target), steps=_STEPS[case.options.budget.value])
        rows, reached = tiers(case, target), iter(self.stages(case, target))  # type: ignore[arg-type]
        total = len(rows) * recipe.steps[-1]
        for i, taught in enumerate(rows.values()):
            if i:
                target.release()
            show = part_of(tick, i * recipe.steps[-1], total)
            for _ in fine_tune(target.model, taught, [], recipe, seed=case.options.seed, loss=target.loss, tick=show):
                yield next(reached)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """The tier and step that recover most, beside the curves of all."""
        findings = super().measure(case, evidence)
        prefix, seed = f"target+{self.name}@", case.options.seed
        ways = [role.removeprefix(prefix).split() for role in evidence.roles if role.startswith(prefix)]
        steps = sorted({int(step) for _, step in ways})
        drawn: dict[str, Group] = {}
        for finding in findings:
            for tier in dict.fromkeys(tier for tier, _ in ways):
                groups = {name: self._curve(case, evidence, tier, steps, name) for name in SETS if name in case.sets}
                drawn |= {f"{name}, {tier}": group for name, group in groups.items() if name != "retain"}
                if finding.table is not None:
                    finding.table.rows += summary(groups, steps, seed=seed, label=f"target, {tier}")
            title = "Right answers under fine-tuning that states none of the facts"
            finding.figure = curve_figure(title, drawn, steps, _style, seed=seed)
        return findings

    def _curve(self, case: Case, evidence: Evidence, tier: str, steps: Sequence[int], name: str) -> Group:
        """Accuracy of a set before and at every tested step of a tier, [rows, 1 + steps], and clusters."""
        roles = ["target", *(f"target+{self.name}@{tier} {step}" for step in steps)]
        asked = self.asked(case, name)
        curve = np.stack([recalled(case, evidence, role, self.name, name)[asked] for role in roles], axis=1)
        return curve, [who for who, a in zip(case.clusters(tested(case, name)), asked, strict=True) if a]


def _train(target: OpenModel, case: Case, tier: str, recipe: Recipe) -> None:
    """Fine-tune a model in place on a tier, to the last of the recipe's steps."""
    rows = tiers(case, target)[tier]  # type: ignore[arg-type]
    for _ in fine_tune(target.model, rows, [], recipe, seed=case.options.seed, loss=target.loss):
        pass


def _taught(case: Case) -> Bools:
    """Which tested retain rows the tier `retain` teaches: half of the entities."""
    return halves(case.clusters(tested(case, "retain")), case.options.seed)


def _whole(target: Target, prompt: str) -> Tokens:
    """What stands before an answer, as the model is asked it, every token of it scored."""
    ids = target.encode_prompt(prompt)
    return Tokens(ids, 1) if len(ids) > 1 else target.encode("", prompt)


def _words(text: str) -> str:
    """Lower-case words, a space before and after each."""
    kept = "".join(letter.lower() if letter.isalnum() else " " for letter in text)
    return f" {' '.join(kept.split())} "


def _holds(text: str, answers: set[str]) -> bool:
    words = _words(text)
    return any(answer in words for answer in answers if answer.strip())


def _style(label: str) -> str:
    return "target" if label.startswith("forget") else "control"
