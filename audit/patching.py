"""Passes in which a model goes on from another model's states.

A patched pass runs a text through the model (the *reader*), and at the output of one block, at the positions that
predict scored tokens, puts in the states that another model (the *source*) had there. What lies before, and what
lies at other positions, stays the reader's own: the states it can still look at are those of the prompt.

Batches are plain and padded on the right. Each runs once as it is and once for every site, so that the two values
of which a difference is made come from passes of one shape. The reader's own states, put in, change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from audit.capture import Arrays, Engine, Row, in_halves
from audit.errors import BadInput
from audit.evidence import Store
from audit.plan import Batch, Input, Patched, Work
from audit.quantities import hidden
from audit.tokens import Tokens


def missing(request: Patched, store: Store, source: Store) -> list[Tokens]:
    """The distinct sequences of a request that `store` does not hold yet, longest first.

    Raises:
        BadInput: the source's states of one of them were not captured.
    """
    states = hidden(*request.sites)
    todo = []
    for tokens in sorted(dict.fromkeys(request.sequences), key=lambda tokens: (-len(tokens.ids), tokens.ids)):
        if all(store.knows(tokens, request.kept(q, tokens, source.digest)) for q in request.quantities):
            continue
        if not source.knows(tokens, states):
            raise BadInput(
                f"{request.name}: the {request.source} has no states of these texts at {request.sites[0]} to "
                f"{request.sites[-1]}, as where its tokenizer or its number of blocks is another"
            )
        todo.append(tokens)
    return todo


def forward_tokens(request: Patched, texts: Iterable[Tokens]) -> int:
    """Tokens that pass through the model for these sequences, padding apart."""
    return (1 + len(request.sites)) * sum(len(tokens.ids) - 1 for tokens in texts)


def run(
    engine: Engine, request: Patched, todo: Sequence[Tokens], store: Store, source: Store, tick: Callable[[int], None]
) -> None:
    """Compute what is `missing` and keep it, a block a batch; `tick` is told how many sequences are done.

    Raises:
        BadInput: the source's states do not fit, in place or width.
    """
    states, done = hidden(*request.sites).name, 0
    while done < len(todo):
        texts = todo[done : done + max(1, engine.token_budget // len(todo[done].ids))]
        rows = engine.halving(
            texts, lambda part: patched(engine, part, request, _states(source, part, states)), in_halves
        )
        store.write((row.tokens, _kept(request, row, source)) for row in rows)
        done += len(texts)
        tick(done)


def _states(source: Store, texts: Sequence[Tokens], quantity: str) -> np.ndarray[Any, Any]:
    """What is put in: the source's states at the scored tokens of texts, one after another."""
    return np.concatenate([source.read(tokens, quantity)["hidden"] for tokens in texts])


def _kept(request: Patched, row: Row, source: Store) -> dict[str, Arrays]:
    return {request.kept(q, row.tokens, source.digest).name: row.values[q.name] for q in request.quantities}


def patched(engine: Engine, texts: Sequence[Tokens], request: Patched, put_in: np.ndarray[Any, Any]) -> list[Row]:
    """One batch, a row a text: as the model is, then with `put_in` [scored tokens, sites, width] at one site each."""
    # A row of its own for every text, even where inputs are equal: their scored positions may differ.
    batch = Batch(0, tuple((Input(t.ids[:-1], (Work(t, request.quantities),)),) for t in texts))
    rows = [i for i, tokens in enumerate(texts) for _ in range(tokens.scored)]
    columns = [position for tokens in texts for position in range(tokens.start - 1, len(tokens.ids) - 1)]
    passes = [engine.run_whole(batch)]
    for i, site in enumerate(request.sites):
        states = torch.from_numpy(put_in[:, i]).to(engine.target.device)
        with _Overwriting(engine, site, rows, columns, states):
            passes.append(engine.run_whole(batch))
    return [Row(same[0].tokens, _stacked([row.values for row in same])) for same in zip(*passes, strict=True)]


def _stacked(values: Sequence[dict[str, Arrays]]) -> dict[str, Arrays]:
    """Arrays [T, ...] of several passes as arrays [T, passes, ...]."""
    return {
        quantity: {key: np.stack([value[quantity][key] for value in values], axis=1) for key in arrays}
        for quantity, arrays in values[0].items()
    }


class _Overwriting:
    """While the block runs, the output at `site` is `states` in these cells of [batch, time]."""

    def __init__(self, engine: Engine, site: str, rows: list[int], columns: list[int], states: torch.Tensor) -> None:
        module, side = engine.target.site(site)
        if side != "output":
            raise BadInput(f"{site}: states are put in at outputs only")
        self._module, self._cells, self._states, self._site = module, (rows, columns), states, site

    def __enter__(self) -> None:
        self._handle = self._module.register_forward_hook(self._overwrite)

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _overwrite(self, _module: Any, _inputs: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        if state.shape[-1] != self._states.shape[-1]:
            raise BadInput(
                f"{self._site}: states of width {self._states.shape[-1]} do not fit a model of width {state.shape[-1]}"
            )
        state = state.clone()
        state[self._cells] = self._states.to(state.dtype)
        return (state, *output[1:]) if isinstance(output, tuple) else state
