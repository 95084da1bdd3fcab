"""What is sent to a server, and what is read from its answers; nothing in an answer is taken on trust.

Log-probabilities of given tokens are had in one of three ways, by what the server knows:

=================  ==========================================================================================
prompt_logprobs    vLLM: the prompt's own tokens, each with the likeliest at its place, in one request
echo               the older completions API: the same, with tokens as text rather than as ids
forced             one request a scored token: the prompt up to it, one token to be written, which a bias of
                   100 forces to be the one in question; the server reports its log-probability before the
                   bias, as llama.cpp does. That it does so is tested first (`probe`)
=================  ==========================================================================================

Only ids pass: a token that is known by its text alone could be another of the same text. What a server does not
return has no number here: a token outside the likeliest is read from where it is named itself, or not at all.

Trap: llama.cpp tells nothing of a written token that ends within a character of several bytes. In its place a whole
one is forced, and the token looked for among the likeliest, of which many are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from audit.endpoint.client import Answer, Ask, Declined, Unreadable
from audit.tokens import Drawn, Tokens

ROUNDING = 1e-3
"""How far above 0 a log-probability may lie from rounding, nats; it is then 0."""

FORCE = 100
_DEEP = 1000
"""Of so many likeliest tokens the server is asked where the token itself cannot be forced."""

_EXTRAS = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
"""What vLLM and llama.cpp would else take from the model's folder or their own defaults."""


@dataclass(frozen=True)
class Capabilities:
    """What a server can be asked, as found out by asking (`probe`).

    Attributes:
        api: completions or chat.
        served: the name that its answers bear.
        extras: does it take the sampling options that are not OpenAI's?
        limit: the name of the option that bounds an answer's length.
        ids: does it take a prompt as token ids?
        scores: how log-probabilities of given tokens are had: prompt_logprobs, echo, forced, or "": not at all.
        likeliest: how many of the likeliest tokens at a place are returned, with their ids.
        whole: are those the whole vocabulary?
        context: tokens of prompt and answer together, at most; 0: it does not say.
        version: what the server says of itself and of the model.
        repeats: were two equal requests answered alike?
    """

    api: str
    served: str = ""
    extras: bool = True
    limit: str = "max_tokens"
    ids: bool = False
    scores: str = ""
    likeliest: int = 0
    whole: bool = False
    context: int = 0
    version: str = ""
    repeats: bool = True


@dataclass(frozen=True)
class Scored:
    """One token at its place.

    Attributes:
        logprob: nats.
        match: is it the likeliest?
        likeliest: (id, log-probability), likeliest first; as many as were asked for, or none where ids are not told.
    """

    logprob: float
    match: bool
    likeliest: tuple[tuple[int, float], ...] = ()


class Wire:
    """Requests to one model on one server.

    Args:
        model: the name it is asked by.
        can: what the server can be asked.
        instead: the token to force in place of one, where that is no whole character; else the same.
    """

    def __init__(self, model: str, can: Capabilities, instead: Callable[[int], int] = lambda token: token) -> None:
        self.model = model
        self.can = can
        self._instead = instead

    # --- text -----------------------------------------------------------------------------------------

    def write(
        self,
        prompt: str | tuple[int, ...],
        new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
        repeat: int = 0,
    ) -> Ask[str]:
        """What the model goes on with: greedily, or drawn at a temperature from all that it may write."""
        body: dict[str, Any] = {"model": self.model, self.can.limit: new_tokens, "temperature": temperature, "top_p": 1}
        body |= _EXTRAS if self.can.extras else {}
        body |= {} if seed is None else {"seed": seed}
        if self.can.api == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
        path = "/chat/completions" if self.can.api == "chat" else "/completions"

        def read(answer: Answer) -> str:
            choice = self._choice(answer, None if isinstance(prompt, str) else len(prompt))
            return _said(choice["message"]) if self.can.api == "chat" else _text(choice.get("text"), "text")

        return Ask(path, body, read, (length(prompt), new_tokens), repeat)

    def drawn(self, prompt: str | tuple[int, ...], new_tokens: int, drawn: Drawn | None, i: int) -> Ask[str]:
        """The i-th of several draws, or the greedy continuation."""
        if drawn is None:
            return self.write(prompt, new_tokens)
        return self.write(prompt, new_tokens, temperature=drawn.temperature, seed=drawn.seeds[i] & 0x7FFFFFFF)

    # --- log-probabilities ----------------------------------------------------------------------------

    def score(self, tokens: Tokens, likeliest: int = 1, repeat: int = 0) -> list[Ask[list[Scored]]]:
        """The requests whose answers, one after the other, are the scored tokens of a sequence."""
        if self.can.scores == "forced":
            places = range(tokens.start, len(tokens.ids))
            return [self._forced(tokens.ids[:at], tokens.ids[at], likeliest, repeat) for at in places]
        by = {"prompt_logprobs": self._prompt_logprobs, "echo": self._echo}[self.can.scores]
        return [by(tokens, likeliest, repeat)]

    def likeliest(self, ids: tuple[int, ...], count: int, repeat: int = 0) -> Ask[list[Scored]]:
        """The likeliest tokens after ids, as many as the server returns up to `count`: the first of them scored."""
        body = self._one_more(ids) | {"logprobs": count}

        def read(answer: Answer) -> list[Scored]:
            written, found = _next(self._choice(answer, len(ids)))
            return [_ranked(found, written, len(found))]

        return Ask("/completions", body, read, (len(ids), 1), repeat)

    def _forced(self, ids: tuple[int, ...], token: int, likeliest: int, repeat: int) -> Ask[list[Scored]]:
        forced = self._instead(token)
        likeliest = likeliest if forced == token or self.can.whole else max(likeliest, _DEEP)
        body = self._one_more(ids) | {"logprobs": likeliest, "logit_bias": {str(forced): FORCE}}

        def read(answer: Answer) -> list[Scored]:
            written, found = _next(self._choice(answer, len(ids)), least=likeliest)
            if written != forced:
                raise Unreadable(f"token {written} was written, {forced} was forced")
            if token not in found:
                raise Declined(
                    f"no log-probability of token {token} is to be had, which is no whole character and not among the "
                    f"{likeliest} likeliest; leave its row out, or audit at --access text"
                )
            return [_ranked(found, token, likeliest)]

        return Ask("/completions", body, read, (len(ids), 1), repeat)

    def _prompt_logprobs(self, tokens: Tokens, likeliest: int, repeat: int) -> Ask[list[Scored]]:
        body = self._one_more(tokens.ids) | {"prompt_logprobs": likeliest}

        def read(answer: Answer) -> list[Scored]:
            choice = self._choice(answer, len(tokens.ids))
            rows = _list(choice.get("prompt_logprobs", answer.get("prompt_logprobs")), "prompt_logprobs")
            if len(rows) != len(tokens.ids):
                raise Unreadable(f"prompt_logprobs of {len(rows)} tokens, {len(tokens.ids)} were sent")
            return [_at(rows[at], tokens.ids[at], likeliest) for at in range(tokens.start, len(rows))]

        return Ask("/completions", body, read, (len(tokens.ids), 1), repeat)

    def _echo(self, tokens: Tokens, likeliest: int, repeat: int) -> Ask[list[Scored]]:
        body = self._one_more(tokens.ids) | {"echo": True, "logprobs": max(1, likeliest)}

        def read(answer: Answer) -> list[Scored]:
            found = self._choice(answer, len(tokens.ids)).get("logprobs")
            found = found if isinstance(found, dict) else {}
            names, values, tops = (
                _list(found.get(key), f"logprobs.{key}") for key in ("tokens", "token_logprobs", "top_logprobs")
            )
            # The prompt's tokens, and the one that is written after them.
            if {len(names), len(values), len(tops)} != {len(tokens.ids) + 1}:
                raise Unreadable(f"log-probabilities of {len(values)} tokens, {len(tokens.ids) + 1} were asked for")
            return [_echoed(values[at], tops[at]) for at in range(tokens.start, len(tokens.ids))]

        return Ask("/completions", body, read, (len(tokens.ids), 1), repeat)

    def _one_more(self, ids: tuple[int, ...]) -> dict[str, Any]:
        """A prompt of ids, after which one token is written."""
        body: dict[str, Any] = {"model": self.model, "prompt": list(ids), self.can.limit: 1, "temperature": 0}
        return body | {"top_p": 1} | (_EXTRAS if self.can.extras else {})

    # --- what every answer is checked for -----------------------------------------------------------------

    def _choice(self, answer: Answer, sent: int | None) -> dict[str, Any]:
        """The one choice of an answer, of the model that was asked, to a prompt of as many tokens as were `sent`."""
        if self.can.served and answer.get("model") != self.can.served:
            raise Unreadable(f"it comes from model {str(answer.get('model'))[:80]!r}, not {self.can.served!r}")
        choices = _list(answer.get("choices"), "choices")
        if len(choices) != 1 or not isinstance(choices[0], dict):
            raise Unreadable(f"{len(choices)} choices, 1 was asked for")
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if sent is not None and counted is not None and counted != sent:
            raise Unreadable(f"a prompt of {counted} tokens was read, {sent} were sent")
        choice: dict[str, Any] = choices[0]
        if choice.get("finish_reason") in (None, "abort", "error"):
            raise Unreadable(f"it was broken off (finish_reason {choice.get('finish_reason')!r})")
        return choice


def length(prompt: str | tuple[int, ...]) -> int:
    """Tokens of a prompt; of text about one for every three characters."""
    return len(prompt) // 3 + 1 if isinstance(prompt, str) else len(prompt)


def _said(message: Any) -> str:
    """An answer in a chat, its reasoning, where the server takes it out of the text, put back before it."""
    if not isinstance(message, dict):
        raise Unreadable("no message")
    content = message.get("content")
    if content is None and isinstance(message.get("refusal"), str):
        content = message["refusal"]
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str):
        return f"<think>{_text(thought, 'reasoning')}</think>{_text(content or '', 'content')}"
    return _text(content, "content")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unreadable(f"no {name}")
    return value.encode("utf-8", "replace").decode()  # half a surrogate pair is no character


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, list):
        raise Unreadable(f"no {name}")
    return value


def _logprob(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Unreadable(f"{str(value)[:40]!r} is no log-probability")
    if value > ROUNDING:
        raise Unreadable(f"a log-probability of {value:g}, above 0")
    return min(float(value), 0.0)


def _id(value: Any) -> int:
    """A token's id, as a number, its digits, or vLLM's `token_id:7`."""
    text = str(value).removeprefix("token_id:") if not isinstance(value, bool) else ""
    if not (text.isascii() and text.isdecimal()):
        raise Unreadable(f"{str(value)[:40]!r} is no token id")
    return int(text)


def _ranked(found: dict[int, float], token: int, likeliest: int) -> Scored:
    """A token among the likeliest at its place; fewer of these than were asked for is no answer."""
    order = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))
    if len(order) < likeliest:
        raise Unreadable(f"{len(order)} log-probabilities at a place, {likeliest} were asked for")
    if token not in found:
        raise Unreadable(f"no log-probability of token {token}")
    return Scored(found[token], order[0][0] == token, tuple(order[:likeliest]))


def _at(row: Any, token: int, likeliest: int) -> Scored:
    """A place of vLLM's `prompt_logprobs`: by token id, the token's own number and those of the likeliest."""
    if not isinstance(row, dict):
        raise Unreadable("prompt_logprobs without a place")
    found = {_id(key): _logprob(_field(value, "logprob")) for key, value in row.items()}
    rank = next((_field(value, "rank") for key, value in row.items() if _id(key) == token), None)
    # A row without its likeliest token would make the next one look like it: the token's rank tells.
    if type(rank) is not int or len(found) < likeliest + (rank > likeliest):
        raise Unreadable(f"{len(found)} log-probabilities at a place of token {token}, more were asked for")
    return _ranked(found, token, likeliest)


def _echoed(value: Any, top: Any) -> Scored:
    """A place of an echo: ids are not told, but whether anything is likelier can be seen."""
    if not isinstance(top, dict) or not top:
        raise Unreadable("a place without its likeliest token")
    logprob = _logprob(value)
    return Scored(logprob, logprob >= max(map(_logprob, top.values())))


def _next(choice: dict[str, Any], least: int = 1) -> tuple[int, dict[int, float]]:
    """The one token that was written, and log-probabilities at its place by id: its own, and those of the likeliest."""
    found = choice.get("logprobs")
    places = _list(found.get("content") if isinstance(found, dict) else None, "logprobs.content")
    if len(places) != 1 or not isinstance(places[0], dict):
        raise Unreadable(f"log-probabilities of {len(places)} tokens, 1 was asked for")
    top = _list(places[0].get("top_logprobs"), "top_logprobs")
    ranked = {_id(_field(one, "id")): _logprob(_field(one, "logprob")) for one in top}
    if len(ranked) < least:  # before the token itself, which may be none of them, is added
        raise Unreadable(f"{len(ranked)} log-probabilities at a place, {least} were asked for")
    written, own = _id(places[0].get("id")), _logprob(places[0].get("logprob"))
    if abs(ranked.setdefault(written, own) - own) > ROUNDING:
        raise Unreadable(f"two log-probabilities of token {written}")
    return written, ranked


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None
