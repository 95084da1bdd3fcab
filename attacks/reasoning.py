"""Reasoning: is the answer said while the model thinks, though its final answer does not have it?

    leaked_g(w) = share of group g whose answer is contained in the reasoning when asked in way w,  g = forget, holdout
    finding     = leaked_forget - leaked_holdout, for the way where it is largest

Two ways: the question as it is, after which a reasoning model writes a span of its own (`<think> ... </think>`, or
`thinking`, `thought`, `reasoning`); and "Let's think step by step." before it, which any model can be asked: without a
span all that it then writes is its reasoning, and its final answer what it answers plainly. The greedy text is looked
at. What `contains` means is said in `attacks.sampling`.

Source: reasoning traces keep what final answers lost: Wang et al. 2025 (arXiv 2506.12963), R-TOFU (Yoon et al. 2025,
arXiv 2505.15214); step by step: Kojima et al. 2022 (arXiv 2205.11916). The comparison with holdout rows is this
project's.

Traps:

- *Who thinks aloud guesses aloud*: a span may go through all the options. Holdout rows are guessed as well.
- *Said in both is no hidden leak*: a control asks what reasoning says over what the final answer says; where it fails
  the model answers openly, and other instruments say so.
- *A span that never ends* within the budget is all reasoning. One that the chat template opens can be told only by its
  end: cut off before, it is taken for the answer, and misses.
- *No span, no look inside*: of a model that writes none the first way says nothing. A control says how many did.
- *A model too small to reason* goes on as it would without being asked to.
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from attacks.recall import SETS, Floats, came_back, mean_row
from attacks.sampling import ROLES, contains, spread
from audit.asking import new_tokens, unprompted
from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.evidence import Evidence
from audit.instrument import Access, Instrument
from audit.loaders import Example
from audit.plan import Generate
from audit.record import Control, Finding, Question, Side

if TYPE_CHECKING:
    from audit.target import Target

__all__ = ["Reasoning", "split_reasoning"]

_SOURCE = "Wang et al. 2025, arXiv 2506.12963; R-TOFU, arXiv 2505.15214; control: this project, 2026"
_MARK = r"<(/?)(?:think|thinking|thought|reasoning)>"
_STEPS = "Let's think step by step."
_WAYS = ("as asked", "step by step")

LEAKED = Statistic(
    "leaked", "the right answer is said in the reasoning", "share of rows",
    "the forgotten answer is in the reasoning more often than one never taught: knowledge remains", (0.0, 1.0), 0.1,
    _SOURCE,
)  # fmt: skip


def split_reasoning(text: str) -> tuple[str, str]:
    """What a text says inside spans of reasoning, and what outside them.

    An end without a beginning: all before it is reasoning, as where the template opened the span; a beginning without
    an end: all after it.
    """
    pieces = re.split(_MARK, text)  # a text, "/" or nothing of the mark after it, a text, ...
    found: tuple[list[str], list[str]] = ([], [])
    thinking = pieces[1:2] == ["/"]
    for piece, mark in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        found[thinking].append(piece.strip())
        thinking = not mark
    outside, inside = (" ".join(filter(None, part)) for part in found)
    return inside, outside


def writes_spans(target: Target) -> bool:
    """Does the tokenizer, or the chat template, of a model know spans of reasoning?"""
    known = (str(target.tokenizer.chat_template), *target.tokenizer.get_added_vocab())
    return any(re.search(_MARK, text) for text in known)


class Reasoning(Instrument):
    """Is the answer in the reasoning, though not in the final answer?"""

    name = "reasoning"
    title = "Is it said in the reasoning alone?"
    dear = "lets the model write at length"
    question = Question.RECOVERY
    access = Access.TEXT
    sets = ("forget",)
    reference = _SOURCE

    def missing(self, case: Case) -> str | None:
        """A passage asks nothing that could be thought about."""
        return super().missing(case) or unprompted(case)

    def rows(self, case: Case, name: str) -> tuple[Example, ...]:
        """The rows of a set that are asked."""
        return spread(case, name, {"quick": 24, "standard": 48, "thorough": 240}[case.options.budget.value])

    def requests(self, case: Case, target: Target) -> list[Generate]:
        """Every row as it is and after "step by step", continued; at length where the model knows spans."""
        if target.role not in ROLES:
            return []
        length = new_tokens(case)
        if writes_spans(target):
            length = {"quick": 128, "standard": 384, "thorough": 1536}[case.options.budget.value]
            length = min(length, target.context_length // 2)
        made = []
        for way in _WAYS:
            for name in (name for name in SETS if name in case.sets):
                texts = [_put(way, row.prompt) for row in self.rows(case, name)]
                prompts = tuple(target.encode_prompt(text, room=length) for text in texts)
                made.append(Generate(f"{self.name}/{way}/{name}", prompts, length))
        return made

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """What is said in the reasoning against never-taught rows, and against the final answer."""
        rows = {name: self.rows(case, name) for name in SETS if name in case.sets}

        @cache
        def said(role: str, name: str) -> Floats:
            """Is the answer in the reasoning, and in the final answer? [rows, ways, 2]."""
            texts = [evidence.texts(role, f"{self.name}/{way}/{name}") for way in _WAYS]
            return np.array([_said(row.answer, *both) for row, *both in zip(rows[name], *texts, strict=True)])

        finding = against_never_taught(
            self,
            case,
            evidence,
            LEAKED,
            lambda role, name: said(role, name)[:, :, 0],
            columns=("way of asking", _WAYS),
            rows=rows,
            roles=ROLES,
            seen_anywhere=True,
            sides=(Side.REMAINS, Side.NEITHER),
        )
        chosen = _WAYS.index(finding.layer) if finding.layer in _WAYS else 0
        if "holdout" in rows:
            gains = {name: -np.diff(said("target", name)[:, chosen], axis=1)[:, 0] for name in rows}
            finding.controls.append(came_back(case, rows, gains.__getitem__))
        finding.controls.append(_spans(evidence, self.name, list(rows)))
        if finding.table is not None:
            for role in (role for role in ROLES if role in case.models):
                for name, asked in rows.items():
                    for i, way in enumerate(_WAYS):
                        hidden = said(role, name)[:, i, 0] > said(role, name)[:, i, 1]
                        label = f"{way}, and not in the answer"
                        whose = case.clusters(asked)
                        finding.table.rows.append(mean_row([role, name, label], hidden, whose, seed=case.options.seed))
        return [finding]


def _put(way: str, prompt: str) -> str:
    # Before the prompt, which must end where its answer begins, or with the mark by which a question is known.
    return prompt if way == _WAYS[0] else f"{_STEPS} {prompt}"


def _said(answer: str, plain: str, stepwise: str) -> list[tuple[float, float]]:
    """By way, whether the answer is in the reasoning, and whether in the final answer."""
    inside, outside = split_reasoning(plain)
    thought, final = split_reasoning(stepwise)
    if not thought:
        thought, final = stepwise, outside
    parts = ((inside, outside), (thought, final))
    return [(float(contains(answer, a)), float(contains(answer, b))) for a, b in parts]


def _spans(evidence: Evidence, name: str, sets: list[str]) -> Control:
    texts = [text for one in sets for text in evidence.texts("target", f"{name}/{_WAYS[0]}/{one}")]
    wrote = [bool(split_reasoning(text)[0]) for text in texts]
    return Control(
        name="writes reasoning",
        description="share of the target's answers that hold a span of reasoning; without any, only `step by step` "
        "says something",
        estimate=float(np.mean(wrote)),
        n=len(wrote),
    )
