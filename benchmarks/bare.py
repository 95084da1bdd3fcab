"""Passes through a model with nothing around them: what a scan's time is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from audit.capture import Engine
from audit.plan import Batch, Generate, Request, merge
from audit.target import Target
from benchmarks.timing import Clock


@dataclass(frozen=True)
class _Inputs:
    """A batch as tensors: shared prefixes and which of them each row continues, rows, and scored positions."""

    prefixes: torch.Tensor | None
    members: torch.Tensor
    rows: torch.Tensor
    scored: torch.Tensor


class Passes:
    """The batches that the engine makes of some requests, ready to run without the engine."""

    def __init__(self, target: Target, requests: list[Request | Generate]) -> None:
        engine = Engine(target)
        with torch.inference_mode():
            engine.passes.prepare()  # whether prefixes can be shared is found out by trying
        batches = engine.batches(merge([r for r in requests if isinstance(r, Request)]))
        self.tokens = sum(batch.forward_tokens for batch in batches)
        self._inputs = [_tensors(batch) for batch in batches]
        self._target, self._engine = target, engine
        self._prompts = [
            (prompts, request)
            for request in {r.name: r for r in requests if isinstance(r, Generate)}.values()
            for prompts in engine.prompt_batches(request)
        ]

    def run(self, clock: Clock) -> None:
        """Pass everything through the model as it is now."""
        with torch.inference_mode():
            for inputs in self._inputs:
                with clock.part("body"):
                    states = self._body(inputs)
                with clock.part("head"):
                    self._head(states)
        for prompts, request in self._prompts:
            with clock.part("answers"):
                self._engine.answer(request, prompts)
        self.tokens += self._engine.forward_tokens
        self._engine.forward_tokens = 0

    def _body(self, inputs: _Inputs) -> torch.Tensor:
        body = self._target.model.base_model
        cache: DynamicCache | None = None
        if inputs.prefixes is not None:
            cache = body(input_ids=inputs.prefixes, use_cache=True).past_key_values
            assert cache is not None
            cache.batch_select_indices(inputs.members)
        states = body(input_ids=inputs.rows, past_key_values=cache, use_cache=cache is not None)[0]
        scored: torch.Tensor = states.flatten(0, 1)[inputs.scored]
        return scored

    def _head(self, states: torch.Tensor) -> None:
        head = self._target.model.get_output_embeddings()
        chunk = self._engine.chunk
        for first in range(0, len(states), chunk):
            head(states[first : first + chunk])


def _tensors(batch: Batch) -> _Inputs:
    ids = [row.ids[batch.prefix :] for row in batch.inputs]
    width = max(map(len, ids))
    scored = [
        torch.arange(work.tokens.start - 1 - batch.prefix, len(ids[i])) + i * width
        for i, source in enumerate(batch.inputs)
        for work in source.works
    ]
    return _Inputs(
        torch.tensor([group[0].ids[: batch.prefix] for group in batch.groups]) if batch.prefix else None,
        torch.tensor([i for i, group in enumerate(batch.groups) for _ in group]),
        torch.tensor([[*row, *([0] * (width - len(row)))] for row in ids]),
        torch.cat(scored),
    )
