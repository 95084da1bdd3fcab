"""The forward pass that records.

One engine serves every instrument. It runs the body of the model on packed batches, applies the unembedding to
the scored positions only and in chunks, reduces each chunk to the quantities asked for, and hands the rows on.
A `[batch, time, vocabulary]` tensor never exists.

Batches need no attention mask. In a plain batch the padding lies on the right, where causal attention never
looks; in a shared batch all prefixes have one length, so the cache has no holes. What is computed is therefore
the plain forward pass, and `Engine.noise` measures how close to it the numbers are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch

from audit.errors import BadInput
from audit.plan import Batch, Generate, Work, pack
from audit.quantities import TOKEN, View
from audit.target import Target
from audit.tokens import Tokens

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
_LOGITS_ELEMENTS = 2**23  # 32 MiB of float32 logits at a time


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
        token_budget: tokens a batch, padding included.
        share: compute common prefixes once (off for benchmarks, and for models without a plain key-value cache).
    """

    target: Target
    token_budget: int = 4096
    share: bool = True
    forward_tokens: int = 0
    _ready: bool = field(default=False, repr=False)
    _whole: bool = field(default=False, repr=False)

    # --- passes ---------------------------------------------------------------------------------------

    def run(self, batch: Batch) -> list[Row]:
        """Capture one batch; a row for each of its works, in their order."""
        with torch.inference_mode():
            self._prepare()
            if batch.prefix and not self.share:  # planned before the model was there to be asked
                batch = Batch(0, tuple((row,) for row in batch.inputs))
            rows = self._run(batch)
        self.forward_tokens += batch.forward_tokens
        return rows

    def batches(self, works: Sequence[Work]) -> list[Batch]:
        """`works` packed for `run`; the same works give the same batches, which is what makes a scan repeatable."""
        # Starting a batch costs about as much as 10^8 multiplications, whatever lies in it.
        overhead = min(512, 10**8 // max(1, self.target.inventory.parameters))
        return pack(works, token_budget=self.token_budget, share=self.share, overhead=overhead)

    def plain(self, tokens: Tokens) -> Arrays:
        """`TOKEN` for one sequence by the model's own forward pass: the reference all batching must equal."""
        with torch.inference_mode():
            ids = torch.tensor([tokens.ids], device=self.target.device)
            logits = self.target.model(input_ids=ids, use_cache=False).logits[0].float()
            scored = ids[0, tokens.start :]
            view = View(logits[tokens.start - 1 : -1], scored, {}, [()] * tokens.scored, _same, _same)
            return _to_numpy(TOKEN.compute(view))

    def noise(self, rows: Iterable[tuple[Tokens, Arrays]]) -> float:
        """Largest difference in log-probability between captured rows and the plain pass, in nats."""
        differences = [
            float(np.abs(values["logprob"] - self.plain(tokens)["logprob"]).max()) for tokens, values in rows
        ]
        return max(differences, default=0.0)

    def _prepare(self) -> None:
        """Check once that body and head taken apart equal the whole, and that the cache can be shared."""
        if self._ready:
            return
        self._model = self.target.model
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        probe = torch.arange(min(12, self.target.context_length), device=self.target.device)[None] % vocabulary
        whole = self._model(input_ids=probe, use_cache=False).logits
        self._body, self._head = self._model.base_model, _head(self._model)
        state = self._body(input_ids=probe, use_cache=True)
        apart = self._head(state[0])
        tolerance = 1e-4 * max(1.0, float(whole.abs().max()))
        if apart.shape != whole.shape or float((apart - whole.float()).abs().max()) > tolerance:
            self._body, self._head = self._model, _same  # an unusual head: let the model apply it itself
            self._whole = True
            state = self._body(input_ids=probe, use_cache=True)
        self._chunk = max(1, _LOGITS_ELEMENTS // whole.shape[-1])
        self.share = self.share and self._cache_can_be_shared(getattr(state, "past_key_values", None), probe, whole)
        self._ready = True

    def _cache_can_be_shared(self, cache: Any, probe: torch.Tensor, whole: torch.Tensor) -> bool:
        if (
            cache is None
            or probe.shape[1] < 12
            or not all(hasattr(layer, "keys") for layer in getattr(cache, "layers", [None]))
        ):
            return False
        prefix = self._body(input_ids=probe[:, :6], use_cache=True).past_key_values
        index = torch.zeros(2, dtype=torch.long, device=self.target.device)
        state = self._body(input_ids=probe[:, 6:].expand(2, -1), past_key_values=_take(prefix, index), use_cache=True)
        difference = self._head(state[0])[1] - whole[0, 6:].float()
        return float(difference.abs().max()) <= 1e-3 * max(1.0, float(whole.abs().max()))

    def _run(self, batch: Batch) -> list[Row]:
        device = self.target.device
        works = batch.works
        inputs = [row.ids[batch.prefix :] for row in batch.inputs]
        width = max(map(len, inputs))
        padded = torch.tensor([ids + (0,) * (width - len(ids)) for ids in inputs], device=device)
        cache = None
        if batch.prefix:
            prefixes = torch.tensor([group[0].ids[: batch.prefix] for group in batch.groups], device=device)
            members = [i for i, group in enumerate(batch.groups) for _ in group]
            cache = _take(
                self._body(input_ids=prefixes, use_cache=True).past_key_values,
                torch.tensor(members, device=device),
            )
        positions = [
            range(row * width + work.tokens.start - 1 - batch.prefix, row * width + len(inputs[row]))
            for row, source in enumerate(batch.inputs)
            for work in source.works
        ]
        # Works that want the same go side by side, whatever they lie between: head and quantities then run on many.
        kinds = {wanted: kind for kind, wanted in enumerate(dict.fromkeys(work.quantities for work in works))}
        order = sorted(range(len(works)), key=[kinds[work.quantities] for work in works].__getitem__)
        flat = torch.tensor(list(chain.from_iterable(positions[i] for i in order)), device=device)
        sites = sorted({site for wanted in kinds for quantity in wanted for site in quantity.sites})
        with _Recording(self.target, sites, flat) as states:
            output = self._body(input_ids=padded, past_key_values=cache, use_cache=cache is not None)
        final = output[0].flatten(0, 1)[flat]
        rows = dict(zip(order, self._reduce([works[i] for i in order], final, states), strict=True))
        return [rows[i] for i in range(len(works))]

    def _reduce(self, works: Sequence[Work], final: torch.Tensor, states: dict[str, torch.Tensor]) -> list[Row]:
        """Apply head and quantities to runs of works that want the same, `_chunk` positions at a time."""
        rows = [Row(work.tokens, {}) for work in works]
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
            for chunk in range(begin, end, self._chunk):
                stop = min(chunk + self._chunk, end)
                view = View(
                    final[chunk:stop],
                    tokens[chunk - begin : stop - begin].to(final.device),
                    {site: state[chunk:stop] for site, state in states.items()},
                    rivals[chunk - begin : stop - begin],
                    self._head,
                    self._norm,
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

    def _norm(self, state: torch.Tensor) -> torch.Tensor:
        if self._whole:
            raise BadInput(f"{self.target.inventory.root}: its unembedding cannot be applied to inner states")
        normed: torch.Tensor = self.target.final_norm(state)
        return normed

    # --- generation -----------------------------------------------------------------------------------

    def prompt_batches(self, request: Generate) -> list[tuple[tuple[int, ...], ...]]:
        """The distinct prompts of a request, longest first, packed for `generate`."""
        prompts = sorted(set(request.prompts), key=lambda prompt: (-len(prompt), prompt))
        size = max(1, self.token_budget // (len(prompts[0]) + request.new_tokens)) if prompts else 1
        return [tuple(prompts[i : i + size]) for i in range(0, len(prompts), size)]

    def generate(self, prompts: Sequence[tuple[int, ...]], new_tokens: int) -> list[tuple[int, ...]]:
        """Greedy continuations of a batch of prompts, each at most `new_tokens` long."""
        written = self.target.generate(prompts, new_tokens)
        self.forward_tokens += sum(map(len, prompts)) + sum(map(len, written))
        return written


def _head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """From final states [..., width] to logits [..., vocabulary] in float32, with the known scalings."""
    unembed = model.get_output_embeddings()
    config = model.config
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)

    def head(state: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = unembed(state).float()
        if scale is not None:
            logits = logits * scale
        if divisor is not None:
            logits = logits / divisor
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    return head


def _same(state: torch.Tensor) -> torch.Tensor:
    return state.float()


def _take(cache: Any, index: torch.Tensor) -> Any:
    """A key-value cache whose row i is row `index[i]` of `cache`, which stays as it is."""
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in taken.layers:
        layer.keys, layer.values = layer.keys.index_select(0, index), layer.values.index_select(0, index)
    return taken


class _Recording:
    """Record the states at `sites`, rows `flat` of [batch * time, width] only, while the block runs."""

    def __init__(self, target: Target, sites: Sequence[str], flat: torch.Tensor) -> None:
        self._target, self._sites, self._flat = target, sites, flat
        self._handles: list[Any] = []

    def __enter__(self) -> dict[str, torch.Tensor]:
        states: dict[str, torch.Tensor] = {}
        for site in self._sites:
            module, side = self._target.site(site)

            def keep(value: Any, site: str = site) -> None:
                state = value[0] if isinstance(value, tuple) else value
                states[site] = state.flatten(0, -2)[self._flat]

            if side == "output":
                hook = module.register_forward_hook(lambda _m, _i, out, keep=keep: keep(out))
            else:
                hook = module.register_forward_pre_hook(
                    lambda _m, args, kwargs, keep=keep: keep(args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            self._handles.append(hook)
        return states

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _to_numpy(values: dict[str, torch.Tensor]) -> Arrays:
    return {key: (value.float() if value.is_floating_point() else value).cpu().numpy() for key, value in values.items()}
