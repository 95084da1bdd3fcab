"""The engine against the plain ways of recording the same: a loop over texts, and TransformerLens' run_with_cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from audit.opened import quiet
from audit.quantities import MOMENTS, TOKEN, hidden
from audit.target import Target
from audit.tokens import Tokens
from benchmarks.materials import answers, answers_and_options, subjects
from benchmarks.plain import Rows, by_engine, differences, in_words, one_by_one
from benchmarks.timing import Line, Settings, ratio, seconds_of, take_turns

_EQUAL = 1e-5  # nats; the contract of `audit.capture`


def capture(settings: Settings) -> Iterator[Line]:
    """Log-probability, match, mean and variance of every scored token: the loop's time over the engine's.

    Both start from token ids and end in arrays; the engine's planning and its self-checks count as its time.
    """
    for name, target, examples in subjects(settings.work, settings.small):
        for kind, sequences in (
            ("answers", answers(target, examples)),
            ("answers and wrong answers", answers_and_options(target, examples)),
        ):
            times, results = take_turns(
                {
                    "engine": partial(by_engine, target, sequences, (TOKEN, MOMENTS)),
                    "loop": partial(one_by_one, target.model, sequences),
                },
                settings.repeats,
            )
            worst = differences(results["engine"], results["loop"])
            value, low, high = ratio(times["loop"], times["engine"])
            yield Line(
                "capture",
                f"{name}, {len(sequences)} {kind}: one text at a time / engine",
                value,
                low,
                high,
                "≥ 4, equal to 1e-5",
                value >= 4 and worst["logprob"] <= _EQUAL,
                f"{seconds_of(times)}; {in_words(worst)}",
            )


def bridge(settings: Settings) -> Iterator[Line]:
    """States after every block at every position that predicts: run_with_cache's time over the engine's.

    The bridge gets the same texts less their last token (nothing is predicted after it), records the same hooks
    only, and is timed one text at a time and in padded batches of the engine's token budget. It runs its own
    attention kernel, which is why its states differ in the last digits.
    """
    for name, target, examples in subjects(settings.work, settings.small):
        sequences = tuple(Tokens(t.ids, 1) for t in answers(target, examples))
        sites = tuple(f"blocks.{i}.hook_resid_post" for i in range(target.layers))
        wrapped = _bridge(target)
        times, results = take_turns(
            {
                "engine": partial(by_engine, target, sequences, (hidden(*sites),)),
                "one by one": partial(_cached, wrapped, sequences, sites, budget=1),
                "batches": partial(_cached, wrapped, sequences, sites, budget=4096),
            },
            settings.repeats,
        )
        for side, label in (("one by one", "one text at a time"), ("batches", "in batches")):
            worst = differences(results["engine"], results[side])
            value, low, high = ratio(times[side], times["engine"])
            yield Line(
                "bridge",
                f"{name}, {len(sequences)} texts, {len(sites)} blocks: run_with_cache {label} / engine",
                value,
                low,
                high,
                detail=f"{seconds_of({k: times[k] for k in ('engine', side)})}; {in_words(worst)}",
            )


def _bridge(target: Target) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            target.inventory.root, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        )
    return TransformerBridge.boot_transformers(
        str(target.inventory.root), hf_model=model.eval(), tokenizer=target.tokenizer, device="cpu"
    )


def _cached(bridge: Any, sequences: tuple[Tokens, ...], sites: tuple[str, ...], *, budget: int) -> Rows:
    rows: Rows = {}
    with torch.inference_mode():
        for texts in _batches(sequences, budget):
            width = max(len(t.ids) for t in texts) - 1
            ids = torch.tensor([[*t.ids[:-1], *([0] * (width + 1 - len(t.ids)))] for t in texts])
            _, cache = bridge.run_with_cache(ids, names_filter=list(sites), return_type=None)
            states = torch.stack([cache[site] for site in sites], dim=2)
            for text, state in zip(texts, states, strict=True):
                rows[text] = {"hidden": state[: len(text.ids) - 1].numpy()}
    return rows


def _batches(sequences: tuple[Tokens, ...], budget: int) -> Iterator[list[Tokens]]:
    batch: list[Tokens] = []
    for text in sorted(sequences, key=lambda t: -len(t.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > budget:
            yield batch
            batch = []
        batch.append(text)
    yield batch
