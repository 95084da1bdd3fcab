"""How inputs go through a model: batches of texts, or of images, to states and logits at the scored positions.

A `Pass` packs works into batches, runs one, and hands back the state that enters the unembedding (or the classifier)
at every scored position, with the states at any other places. What is recorded of them is the engine's business
(`audit.capture`), and the same for text and images.

Batches of text need no attention mask. In a plain batch the padding lies on the right, where causal attention never
looks; in a shared batch all prefixes have one length, so the cache has no holes. What is computed is therefore
the plain forward pass.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from audit.errors import BadInput
from audit.plan import Batch, Work, pack
from audit.tokens import Drawn, Tokens

if TYPE_CHECKING:
    from audit.opened import OpenModel
    from audit.target import Target

States = dict[str, torch.Tensor]


class Pass(ABC):
    """One model's way from a batch to what is recorded of it."""

    def __init__(self, target: OpenModel) -> None:
        self.target = target
        self._ready = False

    def prepare(self) -> None:
        """Load the weights, and check once that body and head taken apart equal the whole."""
        if not self._ready:
            self._prepare()
            self._ready = True

    @abstractmethod
    def _prepare(self) -> None: ...

    @abstractmethod
    def batches(self, works: Sequence[Work], token_budget: int) -> list[Batch]:
        """`works` packed for `run`; needs no weights."""

    @abstractmethod
    def run(self, batch: Batch, order: Sequence[int], sites: Sequence[str]) -> tuple[torch.Tensor, States]:
        """States at the scored positions of the batch's works in this order, [N, width]: final, and at each site."""

    @abstractmethod
    def head(self, state: torch.Tensor) -> torch.Tensor:
        """From final states [..., width] to logits [..., outputs] in float32."""

    @abstractmethod
    def norm(self, state: torch.Tensor) -> torch.Tensor:
        """An inner state made ready for the head."""

    @abstractmethod
    def plain(self, tokens: Tokens) -> torch.Tensor:
        """Logits at the scored positions by the model's own forward pass: what all batching must equal."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Number of tokens, or classes, that get a probability."""

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],  # noqa: ARG002
        new_tokens: int,  # noqa: ARG002
        drawn: Drawn | None = None,  # noqa: ARG002
        beams: int = 1,  # noqa: ARG002
    ) -> list[tuple[int, ...]]:
        """Continuations. Raises BadInput where the model writes nothing."""
        raise BadInput(f"{self.target.inventory.root}: {self.target.inventory.architecture} writes no text")


class TextPass(Pass):
    """Through a causal language model.

    Args:
        target: the opened model.
        share: compute common prefixes once (found out to be impossible without a plain key-value cache).
    """

    target: Target

    def __init__(self, target: Target, share: bool) -> None:
        super().__init__(target)
        self.share = share
        self._whole = False

    def batches(self, works: Sequence[Work], token_budget: int) -> list[Batch]:
        """Grouped by shared prefix, sorted by length."""
        # Starting a batch costs about as much as 10^8 multiplications, whatever lies in it.
        overhead = min(512, 10**8 // max(1, self.target.inventory.parameters))
        return pack(works, token_budget=token_budget, share=self.share, overhead=overhead)

    def _prepare(self) -> None:
        """Also: can the cache be shared?"""
        self._model = self.target.model
        vocabulary = self._model.get_input_embeddings().weight.shape[0]
        probe = torch.arange(min(12, self.target.context_length), device=self.target.device)[None] % vocabulary
        whole = self._model(input_ids=probe, use_cache=False).logits
        self._outputs = int(whole.shape[-1])
        self._body, self._head = self._model.base_model, _head(self._model)
        state = self._body(input_ids=probe, use_cache=True)
        apart = self._head(state[0])
        tolerance = 1e-4 * max(1.0, float(whole.abs().max()))
        if apart.shape != whole.shape or float((apart - whole.float()).abs().max()) > tolerance:
            self._body, self._head = self._model, _same  # an unusual head: let the model apply it itself
            self._whole = True
            state = self._body(input_ids=probe, use_cache=True)
        self.share = self.share and self._cache_can_be_shared(getattr(state, "past_key_values", None), probe, whole)

    @property
    def outputs(self) -> int:
        """Size of the vocabulary that the logits are of."""
        return self._outputs

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

    def run(self, batch: Batch, order: Sequence[int], sites: Sequence[str]) -> tuple[torch.Tensor, States]:
        """States at the positions that predict the scored tokens."""
        if batch.prefix and not self.share:  # planned before the model was there to be asked
            batch = Batch(0, tuple((row,) for row in batch.inputs))
        device = self.target.device
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
        flat = torch.tensor(list(chain.from_iterable(positions[i] for i in order)), device=device)
        with Recording(self.target, sites, lambda state: state.flatten(0, -2)[flat]) as states:
            output = self._body(input_ids=padded, past_key_values=cache, use_cache=cache is not None)
        return output[0].flatten(0, 1)[flat], states

    def head(self, state: torch.Tensor) -> torch.Tensor:
        """The unembedding, with the known scalings."""
        return self._head(state)

    def norm(self, state: torch.Tensor) -> torch.Tensor:
        """The norm before the unembedding. Raises BadInput where head and body could not be taken apart."""
        if self._whole:
            raise BadInput(f"{self.target.inventory.root}: its unembedding cannot be applied to inner states")
        normed: torch.Tensor = self.target.final_norm(state)
        return normed

    def generate(
        self, prompts: Sequence[tuple[int, ...]], new_tokens: int, drawn: Drawn | None = None, beams: int = 1
    ) -> list[tuple[int, ...]]:
        """Continuations, each at most `new_tokens` long."""
        return self.target.generate(prompts, new_tokens, drawn=drawn, beams=beams)

    def plain(self, tokens: Tokens) -> torch.Tensor:
        """One text, without cache, padding or neighbours."""
        ids = torch.tensor([tokens.ids], device=self.target.device)
        logits: torch.Tensor = self.target.model(input_ids=ids, use_cache=False).logits[0].float()
        return logits[tokens.start - 1 : -1]


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


class Recording:
    """Record the states at `sites` while the block runs, each as `keep` makes it of what the module passes on."""

    def __init__(self, target: OpenModel, sites: Sequence[str], keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._target, self._sites, self._keep = target, sites, keep
        self._handles: list[Any] = []

    def __enter__(self) -> States:
        states: States = {}
        for site in self._sites:
            module, side = self._target.site(site)

            def keep(value: Any, site: str = site) -> None:
                states[site] = self._keep(value[0] if isinstance(value, tuple) else value)

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
