"""A guarded model, as who asks it sees it: prompts go in, answers come out.

    record = scan(case, out, open_target=open_guarded)        # with `access = "text"` in the case

What could look past the guard (weights, hidden states, log-probabilities) raises `NoAccess`. See `guards`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from audit.errors import NoAccess
from audit.inventory import Inventory
from audit.organisms.guard_kinds import Guard, Reply
from audit.organisms.guards import read_guard
from audit.served import Served
from audit.target import Target
from audit.tokens import Drawn, Tokens


class GuardedTarget(Served):
    """A target with a guard before it, at text access.

    The guard reads a prompt as the model's tokens say it, template included, so an answer depends on the tokens alone
    and may be kept as evidence. It is kept under a digest of its own.

    Args:
        target: the model behind the guard; its tokenizer and folder are shared.
        guard: what decides.
    """

    def __init__(self, target: Target, guard: Guard) -> None:
        vars(self).update(vars(target))
        self.guard = guard
        self.digest = hashlib.sha256(f"{target.digest}\n{guard.to_json()}".encode()).hexdigest()
        self._model = None
        self._behind = target

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        new_tokens: int,
        barred: Sequence[frozenset[int]] = (),
        drawn: Drawn | None = None,
        beams: int = 1,
    ) -> list[tuple[int, ...]]:
        """What is answered to each prompt: the guard's own words, or the model's under its conditions."""
        replies = [self.guard.reply(self.decode(prompt)) for prompt in prompts]
        said = [self._plain("" if reply.said is None else reply.said)[:new_tokens] for reply in replies]
        written = [ids for ids in said for _ in range(beams)]
        asked = [i for i, reply in enumerate(replies) if reply.said is None]
        if asked:
            given = [self._preceded(prompts[i], replies[i], new_tokens) for i in asked]
            never = [self._tokens_of(replies[i].forbidden) | (barred[i] if barred else frozenset()) for i in asked]
            draw = drawn and replace(drawn, seeds=tuple(drawn.seeds[i] for i in asked))
            answers = self._behind.generate(given, new_tokens, never, draw, beams)
            for j, i in enumerate(asked):
                written[i * beams : (i + 1) * beams] = answers[j * beams : (j + 1) * beams]
        return written

    def _preceded(self, prompt: tuple[int, ...], reply: Reply, new_tokens: int) -> tuple[int, ...]:
        """The prompt after what the guard shows, of which the beginning is cut where the context is too short."""
        if not reply.before:
            return prompt
        shown: list[str] = []
        for question, answer in reply.before:
            before, separator, _ = self.context(question)
            shown.append(f"{before}{separator}{answer}\n")
        start = next((i for i, token in enumerate(prompt) if token not in self.special_ids), len(prompt))
        room = max(0, self.context_length - new_tokens - len(prompt))
        ids = self._plain("".join(shown))
        return (*prompt[:start], *ids[max(0, len(ids) - room) :], *prompt[start:])

    def _tokens_of(self, words: Sequence[str]) -> frozenset[int]:
        """Every token that writes a part of one of the words, at a text's beginning or within it, in any usual case."""
        forms = {form for word in words for form in (word, word.lower(), word.upper(), word.capitalize())}
        ids = {i for form in forms for text in (form, f" {form}") for i in self._plain(text)}
        return frozenset(i for i in ids - self.special_ids if any(c.isalnum() for c in self.decode((i,))))

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def release(self) -> None:
        """Forget the weights behind the guard."""
        self._behind.release()

    # --- what is out of reach -------------------------------------------------------------------------

    def _refuse(self, what: str) -> NoReturn:
        raise NoAccess(f"{self.inventory.root}: guarded, and open at text access only: no {what}")

    @property
    def model(self) -> Any:
        """Out of reach, and with it embeddings, hidden states and every pass but `generate`."""
        self._refuse("weights")

    def encode(self, prompt: str, answer: str) -> Tokens:  # noqa: ARG002
        """Out of reach: texts are encoded with their answers in order to be scored."""
        self._refuse("log-probabilities")

    def _refuse_weights(self) -> NoReturn:
        self._refuse("weights")


def open_guarded(role: str, inventory: Inventory, **options: Any) -> Target:
    """Open a folder as `Target`, with its guard before it if there is one: to be given to `scan` as `open_target`."""
    target = Target(role, inventory, **options)
    guard = read_guard(inventory.root)
    return target if guard is None else GuardedTarget(target, guard)
