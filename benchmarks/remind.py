"""REMIND asks for 15 near-copies of every text, which differ from it from the first changed token on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from audit.case import Case
from audit.plan import Request, merge
from audit.quantities import TOKEN
from audit.target import Target
from audit.tokens import Tokens
from benchmarks.materials import STORIES, TOFU, demo_case, open_target, tofu_case
from benchmarks.plain import by_engine, differences, in_words, one_by_one
from benchmarks.timing import Line, Settings, ratio, seconds_of, take_turns
from detectors.remind import Remind


def remind(settings: Settings) -> Iterator[Line]:
    """REMIND's own requests: without shared prefixes, and one text at a time, over with them."""
    for name, target, case in _subjects(settings):
        texts = _texts(case, target, 96 if settings.small else None)
        times, results = take_turns(
            {
                "shared": partial(by_engine, target, texts, (TOKEN,)),
                "unshared": partial(by_engine, target, texts, (TOKEN,), share=False),
                "loop": partial(one_by_one, target.model, texts, moments=False),
            },
            settings.repeats,
        )
        for side, label in (("unshared", "without shared prefixes"), ("loop", "one text at a time")):
            value, low, high = ratio(times[side], times["shared"])
            yield Line(
                "remind",
                f"{name}, {len(texts)} texts: {label} / with shared prefixes",
                value,
                low,
                high,
                detail=f"{seconds_of({k: times[k] for k in ('shared', side)})}; "
                f"{in_words(differences(results['shared'], results[side]))}",
            )
        tokens = {share: _forward_tokens(target, texts, share=share) for share in (True, False)}
        saved = tokens[False] / tokens[True]
        detail = f"{tokens[False]:,} and {tokens[True]:,} tokens"
        yield Line("remind", f"{name}: tokens passed without / with sharing", saved, saved, saved, detail=detail)


def _subjects(settings: Settings) -> Iterator[tuple[str, Target, Case]]:
    case = demo_case(settings.work)
    yield "demo unlearned", open_target(case.models["target"]), case
    if STORIES.is_dir() and TOFU.is_dir():
        yield "stories260k, TOFU", open_target(STORIES), tofu_case(STORIES)


def _texts(case: Case, target: Target, limit: int | None) -> tuple[Tokens, ...]:
    requests = Remind().requests(case, target)
    return tuple(dict.fromkeys(text for request in requests for text in request.sequences[:limit]))


def _forward_tokens(target: Target, texts: tuple[Tokens, ...], *, share: bool) -> int:
    from audit.capture import Engine

    batches = Engine(target, share=share).batches(merge([Request("benchmark", texts)]))
    return sum(batch.forward_tokens for batch in batches)
