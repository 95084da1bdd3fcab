"""An opened endpoint, and the engine that has the plan's requests answered.

Without a tokenizer of the model's own, a text's tokens are its characters: the planner and the evidence store need
ids to go by, and these determine what is sent, which is the text. With one, ids are the model's, and are what is sent.
What the server writes is text in either case, and is kept as such: see `written`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch

from audit.capture import Arrays, Engine, Row
from audit.endpoint.client import Ask
from audit.endpoint.probe import Probed
from audit.endpoint.wire import Scored, Wire
from audit.errors import BadInput, NoAccess
from audit.opened import OpenModel
from audit.passes import TextPass
from audit.plan import AnyRequest, Batch, Generate, Input, Request, Work, merge
from audit.quantities import TOKEN, Quantity, View
from audit.served import Served
from audit.tokens import Drawn, Tokens

_UNKNOWN_CONTEXT = 2048
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_TURNS = 16
"""Requests in a batch, for each that is under way at a time: a batch is written as evidence when it is whole."""


def written(text: str) -> tuple[int, ...]:
    """Text as ids that no token has, -1 - code point: how another tokenizer would cut it is not known."""
    return tuple(-1 - ord(character) for character in text)


class Characters:
    """In a tokenizer's place where there is none: ids are code points. Only what a target asks of one."""

    is_fast = False
    chat_template = None
    bos_token_id = eos_token_id = pad_token_id = unk_token_id = None
    all_special_ids: ClassVar[list[int]] = []

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Code points of a text."""
        return {"input_ids": [ord(c) for c in text], "special_tokens_mask": [0] * len(text)}

    def __len__(self) -> int:
        """As many as there can be."""
        return sys.maxunicode + 1

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        """Text of code points."""
        return "".join(map(chr, ids))

    def get_added_vocab(self) -> dict[str, int]:
        """None."""
        return {}


class EndpointTarget(Served):
    """A model behind an API: prompts go in, answers come out, and log-probabilities where the server tells them.

    Args:
        role: `target`, `original` or `retrained`.
        inventory: what `probe` found.
        template: how a prompt becomes text, as for any model. A chat API applies the server's own.
    """

    searches = False
    inventory: Probed
    _whole: int | None = None

    def __init__(
        self,
        role: str,
        inventory: Probed,
        *,
        device: str,
        dtype: torch.dtype,
        template: str = "auto",
        limit: int | None = None,
    ) -> None:
        if inventory.tokenizer is not None and inventory.can.ids:
            super().__init__(role, inventory, device=device, dtype=dtype, template=template, limit=limit)
        else:
            OpenModel.__init__(self, role, inventory, device=device, dtype=dtype, template=template, limit=limit)
            self.truncated = set()
            self._encoded, self._numbers = {}, {}
            self.tokenizer = Characters()
            if template == "chat" and inventory.can.api != "chat":
                raise BadInput(f"{self.url}: template 'chat' needs the chat API, or the model's tokenizer")
        self.wire = Wire(inventory.client.endpoint.model, inventory.can, self._forced_for)
        self.client = inventory.client

    @property
    def memory(self) -> None:
        """Nothing to share out: no weights are held here."""
        return

    @property
    def url(self) -> str:
        """Where it is."""
        return self.inventory.client.endpoint.url

    # --- text -----------------------------------------------------------------------------------------

    def context(self, prompt: str) -> tuple[str, str, bool]:
        """As for any model; in a chat the prompt is a message, and the server's template makes text of it."""
        if self.inventory.can.api == "chat" and self.template in ("auto", "chat"):
            return prompt, " ", False
        return super().context(prompt)

    def encode_opening(self, passage: str) -> tuple[int, ...]:
        """The first half of a passage: of its tokens, or else of its words."""
        if not isinstance(self.tokenizer, Characters):
            return super().encode_opening(passage)
        words = passage.split()
        return tuple(map(ord, " ".join(words[: max(1, len(words) // 2)])))

    def decode(self, ids: tuple[int, ...]) -> str:
        """Text of what the server wrote, or of a prompt."""
        if ids and ids[0] >= 0:
            return super().decode(ids)
        return "".join(chr(-1 - i) for i in ids)

    @property
    def context_length(self) -> int:
        """As the server says, less the one token that is always written; where only it can count, no limit."""
        if isinstance(self.tokenizer, Characters):
            return 10**9
        said = self.inventory.can.context
        return said - 1 if said else _UNKNOWN_CONTEXT

    @property
    def vocabulary(self) -> int:
        """Tokens that have a probability: as many as the server returned of the whole, or the tokenizer has."""
        return self.inventory.can.likeliest if self.inventory.can.whole else len(self.tokenizer)

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        new_tokens: int,
        barred: Sequence[frozenset[int]] = (),
        drawn: Drawn | None = None,
        beams: int = 1,
    ) -> list[tuple[int, ...]]:
        """What the server writes after each prompt, as `written` text; `new_tokens` are the server's."""
        if any(barred) or beams > 1:
            self._refuse("search for answers, nor have some tokens not written")
        return [written(text) for text in self.client.ask_all(self.writes(prompts, new_tokens, drawn))]

    def writes(self, prompts: Sequence[tuple[int, ...]], new_tokens: int, drawn: Drawn | None) -> list[Ask[str]]:
        """The requests behind `generate`."""
        known = not isinstance(self.tokenizer, Characters)
        sent = [prompt if known else self.decode(prompt) for prompt in prompts]
        return [self.wire.drawn(prompt, new_tokens, drawn, i) for i, prompt in enumerate(sent)]

    # --- log-probabilities ----------------------------------------------------------------------------

    def encode(self, prompt: str, answer: str) -> Tokens:
        """As for any model. Raises NoAccess at text access: texts are encoded with answers in order to be scored."""
        if not self.inventory.can.scores:
            self._refuse("see log-probabilities")
        return super().encode(prompt, answer)

    def gives(self, quantity: Quantity) -> bool:
        """A token's own log-probability; the k likeliest, if so many are returned; of whole distributions, all."""
        can = self.inventory.can
        if can.whole and not quantity.sites:
            return True
        return bool(can.scores) and (quantity is TOKEN or 0 < _top(quantity) <= can.likeliest)

    @property
    def special_ids(self) -> frozenset[int]:
        """As for any model; and tokens whose log-probability may not be told, being no whole characters."""
        if self.inventory.can.scores != "forced" or self.inventory.can.whole:
            return super().special_ids
        return super().special_ids | {i for i in range(len(self.tokenizer)) if self._partial(i)}

    def _partial(self, token: int) -> bool:
        return str(self.tokenizer.decode([token])).endswith("�")

    def _forced_for(self, token: int) -> int:
        """The token itself, or one that is whole."""
        if not self._partial(token):
            return token
        if self._whole is None:
            self._whole = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        return self._whole

    def embedding(self) -> torch.Tensor:
        """Token embeddings of the model that lies beside the tokenizer: the original, if there is one."""
        from safetensors import safe_open

        tables = [tensor for tensor in self.inventory.tensors if tensor.name.endswith(_EMBEDDINGS)]
        if not tables or not tables[0].file.endswith(".safetensors"):
            self._refuse("see embeddings, and beside the tokenizer lies no model that has them")
        with safe_open(self.inventory.root / tables[0].file, "pt") as file:
            weight: torch.Tensor = file.get_tensor(tables[0].name)
        return weight.float()

    def engine(self) -> Engine:
        """Has the plan's requests answered by the server."""
        return EndpointEngine(self)

    # --- what is out of reach -------------------------------------------------------------------------

    def _refuse(self, what: str) -> NoReturn:
        raise NoAccess(f"{self.url}: an endpoint: one cannot {what}")

    @property
    def model(self) -> Any:
        """Out of reach."""
        self._refuse("see weights")

    def passes(self, share: bool) -> TextPass:  # noqa: ARG002
        """Out of reach: the server runs the model."""
        self._refuse("see a forward pass")

    def _refuse_weights(self) -> NoReturn:
        self._refuse("alter weights")

    def release(self) -> None:
        """Nothing is held."""


@dataclass
class EndpointEngine(Engine):
    """An engine whose passes are made by a server: batches are what is asked for at a time."""

    target: EndpointTarget

    def __post_init__(self) -> None:
        self._before = sum(self.target.client.used)

    def forecast(self, requests: Sequence[AnyRequest]) -> str:
        """What is about to be asked, in words. Raises Incomplete where the prompts alone exceed the budget."""
        client = self.target.client
        asks: dict[str, Ask[Any]] = {}
        for work in merge(r for r in requests if isinstance(r, Request)):
            asks |= {ask.key: ask for ask in self._asks(work.tokens, _needed(work.quantities))}
        for request in (r for r in requests if isinstance(r, Generate)):
            for prompts in self.prompt_batches(request):
                asks |= {ask.key: ask for ask in self._written(request, prompts)}
        todo = [ask for ask in asks.values() if not client.held(ask)]
        if not todo:
            return ""
        tokens = sum(ask.tokens[0] for ask in todo), sum(ask.tokens[1] for ask in todo)
        client.afford((tokens[0], 0))
        price = f", at most {client.price(tokens):.4g} at the given prices" if client.price((1, 1)) else ""
        kept = f", {len(asks) - len(todo):,} more are on disk" if len(asks) > len(todo) else ""
        return (
            f"{self.target.role} behind {self.target.url}: {len(todo):,} requests, about {tokens[0]:,} tokens of "
            f"prompts and at most {tokens[1]:,} of answers{price}{kept}"
        )

    def batches(self, works: Sequence[Work]) -> list[Batch]:
        """Works in their order, so many that a kill loses little and all connections are busy."""
        size = _TURNS * self.target.client.endpoint.concurrency
        inputs = [Input(work.tokens.ids[:-1], (work,)) for work in works]
        return [Batch(0, tuple((row,) for row in inputs[i : i + size])) for i in range(0, len(inputs), size)]

    def run(self, batch: Batch) -> list[Row]:
        """One batch of sequences, scored by the server."""
        scored = self._score([(work.tokens, _needed(work.quantities)) for work in batch.works])
        rows = [
            Row(work.tokens, {quantity.name: _values(quantity, work.tokens, places) for quantity in work.quantities})
            for work, places in zip(batch.works, scored, strict=True)
        ]
        self._count()
        return rows

    def plain(self, tokens: Tokens) -> Arrays:
        """`TOKEN` of one sequence, asked for a second time: what the server's own numbers differ by."""
        return _values(TOKEN, tokens, self._score([(tokens, 1)], repeat=1)[0])

    def prompt_batches(self, request: Generate) -> list[tuple[tuple[int, ...], ...]]:
        """The distinct prompts of a request in batches, in a fixed order."""
        prompts = sorted(set(request.prompts))
        size = max(1, _TURNS * self.target.client.endpoint.concurrency // len(request.ways))
        return [tuple(prompts[i : i + size]) for i in range(0, len(prompts), size)]

    def generate(
        self, prompts: Sequence[tuple[int, ...]], new_tokens: int, drawn: Drawn | None = None, beams: int = 1
    ) -> list[tuple[int, ...]]:
        """What the server writes."""
        texts = self.target.generate(prompts, new_tokens, drawn=drawn, beams=beams)
        self._count()
        return texts

    def _count(self) -> None:
        """Tokens as the server counts them, or else as estimated; those found on disk passed through nothing."""
        self.forward_tokens = sum(self.target.client.used) - self._before

    def _written(self, request: Generate, prompts: Sequence[tuple[int, ...]]) -> list[Ask[str]]:
        rows, drawn = self.drawing(request, prompts)
        return self.target.writes(rows, request.new_tokens, drawn)

    def _asks(self, tokens: Tokens, likeliest: int, repeat: int = 0) -> list[Ask[list[Scored]]]:
        return self.target.wire.score(tokens, likeliest or self.target.inventory.can.likeliest, repeat)

    def _score(self, wanted: Sequence[tuple[Tokens, int]], repeat: int = 0) -> list[list[Scored]]:
        """Per sequence, its scored tokens: all requests of all sequences under way together."""
        asks = [self._asks(tokens, likeliest, repeat) for tokens, likeliest in wanted]
        answers = iter(self.target.client.ask_all([ask for many in asks for ask in many]))
        return [[scored for _ in many for scored in next(answers)] for many in asks]


def _top(quantity: Quantity) -> int:
    """How many of the likeliest `top_k` asks for; 0 for another quantity."""
    name, _, count = quantity.name.partition("-")
    return int(count) if name == "top" and count.isdecimal() else 0


def _needed(quantities: Sequence[Quantity]) -> int:
    """How many of the likeliest tokens must be known; 0 for the whole distribution."""
    counts = [1 if quantity is TOKEN else _top(quantity) for quantity in quantities]
    return max(counts) if all(counts) else 0


def _values(quantity: Quantity, tokens: Tokens, places: Sequence[Scored]) -> Arrays:
    """A quantity as a pass would record it."""
    if quantity is TOKEN:
        return {
            "logprob": np.array([place.logprob for place in places], np.float32),
            "match": np.array([place.match for place in places]),
        }
    if count := _top(quantity):
        kept = [place.likeliest[:count] for place in places]
        return {
            "top_ids": np.array([[i for i, _ in place] for place in kept]),
            "top_logprobs": np.array([[p for _, p in place] for place in kept], np.float32),
        }
    whole = torch.full((len(places), len(places[0].likeliest)), torch.nan)
    for row, place in zip(whole, places, strict=True):
        ids, logprobs = zip(*place.likeliest, strict=True)
        row[list(ids)] = torch.tensor(logprobs)
    if whole.isnan().any():
        raise BadInput("a distribution over other tokens than the first so many")
    scored = torch.tensor(tokens.ids[tokens.start :])
    rivals = [tokens.rivals, *([()] * (tokens.scored - 1))]
    found = quantity.compute(View(whole, scored, {}, rivals, _same, _same))
    return {key: (v.float() if v.is_floating_point() else v).numpy() for key, v in found.items()}


def _same(state: torch.Tensor) -> torch.Tensor:
    return state
