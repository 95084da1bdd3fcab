"""The forward pass that records.

One engine serves every instrument and every kind of model. It runs packed batches (`audit.passes`), applies the
unembedding to the scored positions only and in chunks, reduces each chunk to the quantities asked for, and hands the
rows on. A `[batch, time, vocabulary]` tensor never exists. `Engine.noise` measures how close to the model's own forward
pass the numbers are. A batch for which memory does not suffice runs in halves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch

from audit.errors import Incomplete
from audit.memory import LOGITS, TOKENS, is_shortage
from audit.opened import OpenModel
from audit.passes import Pass
from audit.plan import AnyRequest, Batch, Generate, Work
from audit.quantities import TOKEN, View
from audit.tokens import Drawn, Tokens, content_key

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
_LOGITS_ELEMENTS = LOGITS
_Part = TypeVar("_Part")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Row:
    """What was recorded for one sequence: per quantity, arrays over its scored tokens."""

    tokens: Tokens
    values: dict[str, Arrays]


@dataclass
class Engine:
    """Runs batches through one model.

    Args:
        target: the opened model.
        token_budget: tokens a batch, padding included; 0: what the model's memory allows.
        share: compute common beginnings once, where the model can (off for benchmarks).
        halved: how many batches ran in halves for want of memory.
    """

    target: OpenModel
    token_budget: int = 0
    share: bool = True
    forward_tokens: int = 0
    halved: int = 0

    def __post_init__(self) -> None:
        if not self.token_budget:
            self.token_budget = TOKENS if self.target.memory is None else self.target.memory.tokens

    @cached_property
    def passes(self) -> Pass:
        """How inputs go through this model."""
        return self.target.passes(self.share)

    @property
    def chunk(self) -> int:
        """Positions whose logits are in memory at a time."""
        memory = self.target.memory
        most = _LOGITS_ELEMENTS if memory is None else min(_LOGITS_ELEMENTS, memory.logits)
        return max(1, most // self.passes.outputs)

    def run(self, batch: Batch) -> list[Row]:
        """Capture one batch; a row for each of its works, in their order.

        Raises:
            Incomplete: memory does not suffice for one of its inputs alone.
        """
        return self.halving(batch, self.run_whole, Batch.halves)

    def halving(
        self, part: _Part, run: Callable[[_Part], list[_Item]], halves: Callable[[_Part], tuple[_Part, _Part] | None]
    ) -> list[_Item]:
        """What `run` makes of a batch, or, where memory does not suffice, of its halves, and of theirs.

        Raises:
            Incomplete: it does not suffice for what cannot be halved any more.
        """
        try:
            return run(part)
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Not before: the error holds the frames that hold the memory.
        pair = halves(part)
        if pair is None:
            raise Incomplete(f"{self.target.inventory.root}: memory does not suffice for one input alone: {reason}")
        if self.target.device.type == "cuda":
            torch.cuda.empty_cache()
        self.halved += 1
        return [item for half in pair for item in self.halving(half, run, halves)]

    def run_whole(self, batch: Batch) -> list[Row]:
        """Capture one batch, which memory must suffice for."""
        works = batch.works
        # Works that want the same go side by side, whatever they lie between: head and quantities then run on many.
        kinds = {wanted: kind for kind, wanted in enumerate(dict.fromkeys(work.quantities for work in works))}
        order = sorted(range(len(works)), key=[kinds[work.quantities] for work in works].__getitem__)
        sites = sorted({site for wanted in kinds for quantity in wanted for site in quantity.sites})
        with torch.inference_mode():
            self.passes.prepare()
            final, states = self.passes.run(batch, order, sites)
            rows = dict(zip(order, self._reduce([works[i] for i in order], final, states), strict=True))
        self.forward_tokens += batch.forward_tokens
        return [rows[i] for i in range(len(works))]

    def batches(self, works: Sequence[Work]) -> list[Batch]:
        """`works` packed for `run`; the same works give the same batches, which is what makes a scan repeatable."""
        return self.passes.batches(works, self.token_budget)

    def forecast(self, requests: Sequence[AnyRequest]) -> str:  # noqa: ARG002
        """What answering will cost, in words, where that is to be said before it begins."""
        return ""

    def plain(self, tokens: Tokens) -> Arrays:
        """`TOKEN` for one sequence by the model's own forward pass: the reference all batching must equal."""
        with torch.inference_mode():
            logits = self.passes.plain(tokens)
            scored = torch.tensor(tokens.ids[tokens.start :], device=logits.device)
            view = View(logits, scored, {}, [()] * tokens.scored, _same, _same)
            return _to_numpy(TOKEN.compute(view))

    def affords(self, tokens: Tokens) -> bool:
        """Do the logits at all positions of a sequence fit in memory at once, as its plain pass makes them?"""
        memory = self.target.memory
        if memory is None:
            return True
        with torch.inference_mode():
            self.passes.prepare()
        return len(tokens.ids) * self.passes.outputs <= memory.logits

    def noise(self, rows: Iterable[tuple[Tokens, Arrays]]) -> float:
        """Largest difference in log-probability between captured rows and the plain pass, in nats."""
        differences = [
            float(np.abs(values["logprob"] - self.plain(tokens)["logprob"]).max()) for tokens, values in rows
        ]
        return max(differences, default=0.0)

    def _reduce(self, works: Sequence[Work], final: torch.Tensor, states: dict[str, torch.Tensor]) -> list[Row]:
        """Apply head and quantities to runs of works that want the same, `_chunk` positions at a time."""
        rows = [Row(work.tokens, {}) for work in works]
        size = self.chunk
        offsets = np.concatenate([[0], np.cumsum([work.tokens.scored for work in works])])
        first = 0
        while first < len(works):
            last = first
            while last < len(works) and works[last].quantities == works[first].quantities:
                last += 1
            parts: dict[str, list[dict[str, torch.Tensor]]] = {q.name: [] for q in works[first].quantities}
            tokens = torch.tensor([t for w in works[first:last] for t in w.tokens.ids[w.tokens.start :]])
            rivals = [r for w in works[first:last] for r in (w.tokens.rivals, *([()] * (w.tokens.scored - 1)))]
            begin, end = int(offsets[first]), int(offsets[last])
            for chunk in range(begin, end, size):
                stop = min(chunk + size, end)
                view = View(
                    final[chunk:stop],
                    tokens[chunk - begin : stop - begin].to(final.device),
                    {site: state[chunk:stop] for site, state in states.items()},
                    rivals[chunk - begin : stop - begin],
                    self.passes.head,
                    self.passes.norm,
                )
                for quantity in works[first].quantities:
                    parts[quantity.name].append(quantity.compute(view))
            for name, pieces in parts.items():
                joined = _to_numpy({key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]})
                for i in range(first, last):
                    low, high = offsets[i] - begin, offsets[i + 1] - begin
                    rows[i].values[name] = {key: array[low:high] for key, array in joined.items()}
            first = last
        return rows

    # --- generation -----------------------------------------------------------------------------------

    def prompt_batches(self, request: Generate) -> list[tuple[tuple[int, ...], ...]]:
        """The distinct prompts of a request, longest first, packed for `generate`."""
        prompts = sorted(set(request.prompts), key=lambda prompt: (-len(prompt), prompt))
        longest = len(prompts[0]) + request.new_tokens if prompts else 1
        size = max(1, self.token_budget // (longest * len(request.ways)))
        return [tuple(prompts[i : i + size]) for i in range(0, len(prompts), size)]

    def generate(
        self, prompts: Sequence[tuple[int, ...]], new_tokens: int, drawn: Drawn | None = None, beams: int = 1
    ) -> list[tuple[int, ...]]:
        """Continuations of a batch of prompts, each at most `new_tokens` long: see `Target.generate`."""
        written = self.passes.generate(prompts, new_tokens, drawn, beams)
        self.forward_tokens += beams * sum(map(len, prompts)) + sum(map(len, written))
        return written

    def answer(self, request: Generate, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """What a request asks for of one of its batches: prompt after prompt, in each of its ways.

        Raises:
            Incomplete: memory does not suffice for one of its prompts alone.
        """
        return self.halving(prompts, lambda part: self._answer(request, part), in_halves)

    def _answer(self, request: Generate, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        rows, drawn = self.drawing(request, prompts)
        return self.generate(rows, request.new_tokens, drawn, request.beams)

    def drawing(
        self, request: Generate, prompts: Sequence[tuple[int, ...]]
    ) -> tuple[Sequence[tuple[int, ...]], Drawn | None]:
        """The prompts to go on from, each as often as it is drawn from, and how it is drawn."""
        if not request.temperature:
            return prompts, None
        rows = [(prompt, i) for prompt in prompts for i in range(request.samples)]
        # What is drawn hangs on prompt and sample, not on the batch, nor on the temperature.
        keys = [f"{content_key(prompt)}/{i}/{request.seed}" for prompt, i in rows]
        seeds = tuple(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) for key in keys)
        return [p for p, _ in rows], Drawn(request.temperature, seeds)


def in_halves(items: Sequence[_Item]) -> tuple[Sequence[_Item], Sequence[_Item]] | None:
    """The first half and the rest; None of one item."""
    middle = len(items) // 2
    return (items[:middle], items[middle:]) if middle else None


def _same(state: torch.Tensor) -> torch.Tensor:
    return state.float()


def _to_numpy(values: dict[str, torch.Tensor]) -> Arrays:
    return {key: (value.float() if value.is_floating_point() else value).cpu().numpy() for key, value in values.items()}
