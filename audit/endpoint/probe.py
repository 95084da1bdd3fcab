"""What a server can be asked, found out by asking: the inventory of a model that lies elsewhere.

    probed = probe(Client(endpoint))
    probed.can, probed.access, probed.limits

Asked anew at the start of every run: evidence is kept under what was found, so that a server which changed between
two runs finds none of the other's. Only a plain refusal, or an answer without what was asked for, shows that
something cannot be had. What fails in passing is tried again like any request, and ends the scan if it does not pass.

Traps:

- *Log-probabilities after the bias.* Where a token is forced by a bias, a server may report how likely the bias made
  it. Tested with a token that is not the likeliest, whose number is known from where nothing was forced.
- *Another tokenizer.* With the wrong one every id is another word, and every number is wrong without looking so. The
  words that the server names beside ids are compared with the tokenizer's own.
- *Names.* The model that answers is the one that a server says answers; which weights those are it alone knows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from audit.endpoint.client import Answer, Ask, Client, Declined, Unreadable
from audit.endpoint.wire import Capabilities, Wire
from audit.errors import BadInput
from audit.instrument import Access
from audit.inventory import Inventory, take_inventory
from audit.tokens import Tokens

_TEXT = "The old man walked to the house and said that it was a good day."
_CANARY = 16
_FEWEST_NAMES = 3
_MOST_WHOLE = 1 << 13
"""A distribution over so many tokens is asked for whole, at some 90 bytes each."""


@dataclass(frozen=True, kw_only=True)
class Probed(Inventory):
    """An endpoint's inventory: no files but the tokenizer's, and what the server can be asked."""

    client: Client
    can: Capabilities
    tokenizer: Inventory | None

    @property
    def access(self) -> Access:
        """What can be seen of the model."""
        return Access.LOGPROBS if self.can.scores else Access.TEXT

    @property
    def limits(self) -> list[str]:
        """For the record: where the model is, and what could be asked of it."""
        can, endpoint = self.can, self.client.endpoint
        why = "of which it tells none" if can.ids else "which are not sent to it as ids, or are counted as others"
        scores = {
            "": f"no log-probability of given tokens, {why if endpoint.tokenizer else 'for want of a tokenizer'}",
            "prompt_logprobs": "log-probabilities of given tokens by prompt_logprobs",
            "echo": "log-probabilities of given tokens by echo",
            "forced": "log-probabilities of given tokens, each forced by a bias and reported before it",
        }[can.scores]
        top = ""
        if can.scores:
            top = ", the whole distribution" if can.whole else f", the {can.likeliest} likeliest at a place"
        names = f"{endpoint.url}, {can.api} API, model {endpoint.model!r}"
        return [
            f"{names}{'' if can.served == endpoint.model else f', which answers as {can.served!r}'}: which weights "
            f"answered, its operator alone knows ({can.version or 'it says nothing of them'})",
            f"seen: text, {scores}{top}; no beam search; equal requests answered "
            f"{'alike' if can.repeats else 'differently'}",
        ]


def probe(client: Client) -> Probed:
    """Ask what can be asked, some ten short requests.

    Raises:
        BadInput: no such model there, no API that is known, no access for this key, or another model's tokenizer.
        Refused: the tokenizer's folder is not safe.
        Incomplete: no answer was to be had.
    """
    endpoint = client.endpoint
    folder = None if endpoint.tokenizer is None else take_inventory(endpoint.tokenizer, tokenizer_only=True)
    about = _about(client)
    can = _writes(client, replace(Capabilities("completions"), context=_context(about), version=_version(about)))
    if folder is not None and can.api == "completions":
        can = _scores(client, can, _Names(folder))
    steady = asdict(replace(can, repeats=True))
    told = json.dumps([endpoint.url, endpoint.model, steady, "" if folder is None else folder.digest], sort_keys=True)
    parameters = _meta(about).get("n_params", 0)
    return Probed(
        root=Path() if folder is None else folder.root,
        files=() if folder is None else folder.files,
        digest=hashlib.sha256(told.encode()).hexdigest(),
        format="endpoint" if folder is None else folder.format,
        architecture=f"behind a {can.api} API",
        parameters=parameters if type(parameters) is int and parameters > 0 else 0,
        dtype="unknown",
        weight_files=() if folder is None else folder.weight_files,
        tokenizer_files=() if folder is None else folder.tokenizer_files,
        tensors=() if folder is None else folder.tensors,
        identities={} if folder is None else folder.identities,
        client=client,
        can=can,
        tokenizer=folder,
    )


def _about(client: Client) -> dict[str, Any]:
    """What the server says of the model in its list; nothing if it has no list."""
    try:
        listed = client.ask(Ask("/models", None, lambda answer: answer)).get("data")
    except Declined:
        return {}
    found = {str(row.get("id")): row for row in listed if isinstance(row, dict)} if isinstance(listed, list) else {}
    if found and client.endpoint.model not in found:
        named = client.scrubbed(", ".join(sorted(found)[:8]))
        raise BadInput(f"{client.endpoint.url}: no model named {client.endpoint.model!r} (there: {named})")
    return found.get(client.endpoint.model, {})


def _meta(about: dict[str, Any]) -> dict[str, Any]:
    """What llama.cpp says of a model."""
    found = about.get("meta")
    return found if isinstance(found, dict) else {}


def _context(about: dict[str, Any]) -> int:
    for value in (about.get("max_model_len"), _meta(about).get("n_ctx"), about.get("context_length")):
        if type(value) is int and value > 1:
            return value
    return 0


def _version(about: dict[str, Any]) -> str:
    """What a server says of a model and does not change by itself, in one line."""
    told = {key: about.get(key) for key in ("owned_by", "root", "parent")}
    told |= {key: _meta(about).get(key) for key in ("n_params", "size", "n_vocab", "ftype")}
    return ", ".join(f"{key} {str(value)[:60]}" for key, value in told.items() if value not in (None, ""))


# --- text -------------------------------------------------------------------------------------------------------


def _writes(client: Client, can: Capabilities) -> Capabilities:
    """The first API, and the options, that an answer comes by; asked twice, to see whether it comes out the same."""
    asked = client.endpoint.api
    reasons = []
    for api in ("completions", "chat") if asked == "auto" else (asked,):
        for extras, limit in ((True, "max_tokens"), (False, "max_tokens"), (False, "max_completion_tokens")):
            if limit != "max_tokens" and api != "chat":
                continue
            can = replace(can, api=api, extras=extras, limit=limit)
            wire = Wire(client.endpoint.model, can)
            try:
                answers = [client.ask(_whole(wire.write(_TEXT, _CANARY, repeat=i))) for i in range(2)]
            except Declined as error:
                reasons.append(str(error))
                continue
            served, build = str(answers[0].get("model", "")), answers[0].get("system_fingerprint")
            version = ", ".join(part for part in (can.version, f"build {build}" if build else "") if part)
            alike = len({json.dumps(answer.get("choices")) for answer in answers}) == 1
            return replace(can, served=served, version=client.scrubbed(version), repeats=alike)
    raise BadInput(f"{client.endpoint.url}: neither way of asking is answered: {'; '.join(dict.fromkeys(reasons))}")


def _whole(ask: Ask[Any]) -> Ask[Answer]:
    """The same request; its answer is checked, and handed on as it is."""

    def read(answer: Answer) -> Answer:
        ask.read(answer)
        return answer

    return Ask(ask.path, ask.body, read, ask.tokens, ask.repeat)


# --- log-probabilities ------------------------------------------------------------------------------------------


class _Names:
    """The words of a tokenizer, to compare with a server's; `ids`: a prompt of words from all over it."""

    def __init__(self, folder: Inventory) -> None:
        from audit.target import Target

        self.folder = folder
        self._tokenizer = Target("target", folder).tokenizer
        self.size = len(self._tokenizer)
        some = [i for i in range(0, self.size, max(1, self.size // 500)) if self._word(i).isalnum()]
        start = self._tokenizer.bos_token_id
        self.ids = (*(() if start is None else (start,)), *some[:: max(1, len(some) // _CANARY)][:_CANARY])

    def compare(self, url: str, named: Iterable[tuple[int, str]]) -> None:
        """Raises BadInput if a word is another there, or if too few are named to tell."""
        same = set()
        for token, theirs in named:
            ours, theirs = self._word(token), _plain(theirs)
            if not ours or not theirs or "�" in ours + theirs or theirs.startswith("<0x"):
                continue  # parts of characters, and control tokens, are shown in many ways
            if ours != theirs:
                raise BadInput(
                    f"{self.folder.root}: not the tokenizer of the model at {url}: token {token} is {ours[:40]!r} "
                    f"here and {theirs[:40]!r} there"
                )
            same.add(token)
        if len(same) < _FEWEST_NAMES:
            raise BadInput(f"{self.folder.root}: {url} names no tokens, so that it cannot be told to be its tokenizer")

    def _word(self, token: int) -> str:
        return _plain(self._tokenizer.decode([token])) if token < self.size else ""


def _plain(word: str) -> str:
    return word.replace("▁", " ").replace("Ġ", " ").strip()


def _scores(client: Client, can: Capabilities, names: _Names) -> Capabilities:
    """The first way in which log-probabilities of given tokens are had; none, if none is."""
    model, url = client.endpoint.model, client.endpoint.url
    if not _takes_ids(client, Wire(model, can), names.ids):
        return can
    can = replace(can, ids=True)
    whole = Tokens(names.ids, 1)
    for scores, field in (("prompt_logprobs", "prompt_logprobs"), ("echo", "echo")):
        wire = Wire(model, replace(can, scores=scores))
        (ask,) = wire.score(whole)
        answer = _given(client, ask, field)
        if answer is None:
            continue
        names.compare(url, _named(answer, names.ids))
        most = _most(client, wire, names) if scores == "prompt_logprobs" else (0, False)
        return replace(can, scores=scores, likeliest=most[0], whole=most[1])
    return _forced(client, can, names)


def _takes_ids(client: Client, wire: Wire, ids: tuple[int, ...]) -> bool:
    """Is a prompt of ids taken, and counted as what it is? A server may refuse it, or put a token before it."""
    body = wire.write(ids, 1).body
    try:
        answer = client.ask(Ask("/completions", body, lambda answer: answer, (len(ids), 1)))
    except Declined:
        return False
    usage = answer.get("usage")
    return isinstance(usage, dict) and usage.get("prompt_tokens") == len(ids)


def _given(client: Client, ask: Ask[Any], field: str) -> Answer | None:
    """An answer that holds what was asked for; None if the server does not know of it."""

    def read(answer: Answer) -> Answer | None:
        if not _answers(answer, field):
            return None
        ask.read(answer)
        return answer

    try:
        return client.ask(Ask(ask.path, ask.body, read, ask.tokens, ask.repeat))
    except Declined:
        return None


def _answers(answer: Answer, field: str) -> bool:
    """Does it hold the field at all? A server that does not know an option passes over it."""
    try:
        choice = answer["choices"][0]
        if field == "echo":  # else only the one token that was written is scored
            return len(choice["logprobs"]["token_logprobs"]) > 1
        return bool(choice.get(field, answer.get(field)))
    except (KeyError, IndexError, TypeError, AttributeError):
        return False


def _named(answer: Answer, ids: tuple[int, ...]) -> list[tuple[int, str]]:
    """Ids with the words that the server gives them."""
    choice = answer["choices"][0]
    found = choice.get("logprobs")
    if isinstance(found, dict) and isinstance(found.get("tokens"), list):
        return list(zip(ids, map(str, found["tokens"]), strict=False))
    rows = choice.get("prompt_logprobs", answer.get("prompt_logprobs"))
    places = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [(int(key), str(v.get("decoded_token", ""))) for row in places for key, v in row.items()]


def _most(client: Client, wire: Wire, names: _Names) -> tuple[int, bool]:
    """How many of the likeliest tokens are returned, and whether they are all."""
    for count in (20, 5, 1):
        (ask,) = wire.score(Tokens(names.ids[:2], 1), count)
        if _given(client, ask, "prompt_logprobs") is not None:
            return count, False
    return 0, False


def _forced(client: Client, can: Capabilities, names: _Names) -> Capabilities:
    """Can a token be forced, and is its log-probability that of before? As llama.cpp does."""
    wire, url = Wire(client.endpoint.model, replace(can, scores="forced")), client.endpoint.url
    for count in dict.fromkeys((names.size + 1024 if names.size <= _MOST_WHOLE else 20, 20, 5)):
        ask = wire.likeliest(names.ids, count)

        def read(answer: Answer, ask: Any = ask) -> tuple[Answer, Any] | None:
            try:
                places = answer["choices"][0]["logprobs"]["content"]
                known = isinstance(places[0]["id"], int)
            except (KeyError, IndexError, TypeError):
                known = False
            return (answer, ask.read(answer)[0]) if known else None

        try:
            found = client.ask(Ask(ask.path, ask.body, read, ask.tokens))
        except Declined:
            continue
        if found is None or len(found[1].likeliest) < 2:
            return can
        answer, place = found
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        names.compare(url, [(int(row["id"]), str(row.get("token", ""))) for row in top])
        second, logprob = place.likeliest[1]
        if not _reports_before_bias(client, wire, names.ids, second, logprob):
            return can
        total = math.fsum(math.exp(value) for _, value in place.likeliest)
        whole = names.size <= len(place.likeliest) < count and abs(total - 1) < 1e-3
        return replace(can, scores="forced", likeliest=len(place.likeliest), whole=whole)
    return can


def _reports_before_bias(client: Client, wire: Wire, ids: tuple[int, ...], token: int, logprob: float) -> bool:
    (ask,) = wire.score(Tokens((*ids, token), len(ids)))

    def read(answer: Answer) -> bool:
        try:
            scored = ask.read(answer)[0]
        except Unreadable:
            return False  # the bias was passed over, or the token is not told
        return abs(scored.logprob - logprob) < 0.05 and not scored.match

    try:
        return client.ask(Ask(ask.path, ask.body, read, ask.tokens))
    except Declined:
        return False
