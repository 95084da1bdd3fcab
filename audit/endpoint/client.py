"""Asks one server: with time-outs, retries, a rate, a budget, and a file for every answer before it is used.

An answer is read and checked by whoever asked (`Ask.read`) before it is kept: one that is truncated, or holds fewer
numbers than were asked for, is asked for again and never becomes evidence. What was kept is never asked for twice,
by this run or a later one. When attempts run out, the scan ends as incomplete and says what could not be had.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from audit.endpoint.address import KEY, Endpoint, credential
from audit.errors import AuditError, BadInput, Incomplete
from audit.record import write_atomically

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
Answer = Mapping[str, Any]

_MOST_BYTES = 64 << 20
_MOST_PATIENCE = 300.0
"""Seconds between two attempts, at most: who is told to come back later ends instead, and goes on another day."""

_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
_SECRET = 8
"""A key this long is looked for in answers; shorter ones, such as EMPTY, are no secrets."""


class Unreadable(Exception):
    """An answer that is not what was asked for: it is asked for again."""


class Declined(Incomplete):
    """The server says that it will not, or cannot, answer such a request: asking again would not help."""


class _Passing(Exception):
    """A failure that may pass. `after`: seconds that the server asks to wait; `sent`: it may have been answered."""

    def __init__(self, reason: str, *, after: float = 0.0, sent: bool = False) -> None:
        super().__init__(reason)
        self.after = after
        self.sent = sent


@dataclass(frozen=True)
class Ask(Generic[T]):
    """One request.

    Attributes:
        path: below the endpoint's URL.
        body: what is sent, as JSON; nothing is sent where it is None.
        read: from the answer to what is wanted of it; raises `Unreadable` if the answer is not sound.
        tokens: of the prompt, and of the answer at most: an estimate where the tokenizer is not known.
        repeat: which asking this is, where the same is asked more than once on purpose.
    """

    path: str
    body: Mapping[str, Any] | None
    read: Callable[[Answer], T]
    tokens: tuple[int, int] = (0, 0)
    repeat: int = 0

    @cached_property
    def key(self) -> str:
        """Content address: SHA-256 (first 32 hex digits) over all that determines the answer."""
        return hashlib.sha256(_canonical([self.path, self.body, self.repeat])).hexdigest()[:32]


class Client:
    """The way to one endpoint.

    Args:
        endpoint: which, and at what rate and cost.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.folder: Path | None = None
        self.sent = 0
        self._lock = threading.Lock()
        self._key = credential(endpoint)
        self._pace = _Pace(60.0 / endpoint.requests_per_minute if endpoint.requests_per_minute else 0.0)
        self._ledger = _Ledger(endpoint)

    def keep(self, folder: Path) -> None:
        """From now on keep answers here, use those that lie here, and count what they cost."""
        self.folder = folder
        self._ledger.open(folder / "ledger.txt")

    @property
    def used(self) -> tuple[int, int]:
        """Tokens of prompts and of answers so far, in all runs that kept their answers in this folder."""
        return self._ledger.used

    def held(self, ask: Ask[Any]) -> bool:
        """Does the answer lie on disk?"""
        return self.folder is not None and self._path(self.folder, ask).is_file()

    def price(self, tokens: tuple[int, int]) -> float:
        """What so many tokens cost."""
        return self._ledger.price(tokens)

    def afford(self, tokens: tuple[int, int]) -> None:
        """Raises Incomplete if so many more tokens would exceed the budget."""
        self._ledger.afford(tokens)

    def ask(self, ask: Ask[T]) -> T:
        """One answer, read.

        Raises:
            Incomplete: none was to be had.
            BadInput: the server takes no such key, or sends elsewhere.
        """
        return self.ask_all([ask])[0]

    def ask_all(self, asks: Sequence[Ask[T]]) -> list[T]:
        """Answers in the order of the asks, `concurrency` of them at a time.

        One that fails for good ends all: what was answered until then is kept.
        """
        found = {ask.key: self._kept(ask) for ask in asks}
        missing = {ask.key: ask for ask in asks if found[ask.key] is None}
        if missing:
            _ = self._http  # made here, not by several threads at once
            stop = threading.Event()
            pool = ThreadPoolExecutor(self.endpoint.concurrency, thread_name_prefix="endpoint")
            try:
                futures = {key: pool.submit(self._fetch, ask, stop) for key, ask in missing.items()}
                done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
                failed = [error for future in done if (error := future.exception()) is not None]
                if failed:
                    raise next((e for e in failed if not isinstance(e, _Stopped)), failed[0])
                found |= {key: (future.result(),) for key, future in futures.items()}
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
        answers = []
        for ask in asks:
            kept = found[ask.key]
            assert kept is not None
            answers.append(kept[0])
        return answers

    def scrubbed(self, text: str) -> str:
        """A server's words for a person to read: short, and without the key, should the server repeat it."""
        if self._key:
            text = text.replace(self._key, "…")
        return " ".join(text.split())[:300]

    # --- disk -----------------------------------------------------------------------------------------

    def _path(self, folder: Path, ask: Ask[Any]) -> Path:
        return folder / ask.key[:2] / f"{ask.key}.json"

    def _kept(self, ask: Ask[T]) -> tuple[T] | None:
        """What was answered before, read again; nothing if there is no whole and sound answer."""
        if self.folder is None:
            return None
        try:
            known = json.loads(self._path(self.folder, ask).read_bytes())
            if known["sha256"] != hashlib.sha256(_canonical(known["answer"])).hexdigest():
                return None
            return (ask.read(known["answer"]),)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, Unreadable):
            return None

    def _keep(self, ask: Ask[Any], answer: Answer) -> None:
        if self.folder is not None:
            held = {"path": ask.path, "body": ask.body, "repeat": ask.repeat, "answer": answer}
            held["sha256"] = hashlib.sha256(_canonical(answer)).hexdigest()
            write_atomically(self._path(self.folder, ask), _canonical(held), sync=False)

    # --- network --------------------------------------------------------------------------------------

    def _fetch(self, ask: Ask[T], stop: threading.Event) -> T:
        """Ask until there is a sound answer; keep it."""
        from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt
        from tenacity.wait import wait_random_exponential

        backoff = wait_random_exponential(multiplier=self.endpoint.backoff, max=60)

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(error.after if isinstance(error, _Passing) else 0.0, float(backoff(state)))

        def sleep(seconds: float) -> None:
            if stop.wait(seconds):
                raise _Stopped

        attempts = Retrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_after_attempt(self.endpoint.retries + 1),
            wait=pause,
            sleep=sleep,
            reraise=True,
        )
        try:
            answer, value = attempts(self._attempt, ask, stop)
        except _Passing as error:
            made = f"{self.endpoint.retries + 1} attempts" if self.endpoint.retries else "the only attempt"
            raise Incomplete(
                f"{self.endpoint.url}{ask.path}: request {ask.key[:8]}: {error}, at the last of {made}; what was "
                "answered is kept, the same command goes on from there"
            ) from None
        self._keep(ask, answer)
        found: T = value
        return found

    def _attempt(self, ask: Ask[T], stop: threading.Event) -> tuple[Answer, T]:
        if not self._pace.turn(stop):
            raise _Stopped
        reserved = spent = self._ledger.reserve(ask.tokens)
        try:
            answer = self._exchange(ask)
            spent = _usage(answer, ask.tokens)
            return answer, ask.read(answer)
        except Unreadable as error:
            raise _Passing(f"an answer that cannot be used: {error}") from None
        except _Passing as error:
            if not error.sent:
                spent = (0, 0)
            if error.after > _MOST_PATIENCE:
                raise Incomplete(f"{self.endpoint.url}: {error}, and asks to wait {error.after:.0f} s") from None
            self._pace.hold(error.after)
            raise
        except AuditError:
            spent = (0, 0)
            raise
        finally:
            self._ledger.settle(reserved, spent)

    def _exchange(self, ask: Ask[Any]) -> Answer:
        """Send once, and read the answer as JSON."""
        import httpx

        with self._lock:
            self.sent += 1
        method, data = ("GET", None) if ask.body is None else ("POST", _canonical(ask.body))
        try:
            with self._http.stream(method, self.endpoint.url + ask.path, content=data) as response:
                content = self._content(response)
                self._refuse_status(ask, response, content)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _Passing(f"cannot be reached ({type(error).__name__})") from None
        except httpx.TimeoutException:
            raise _Passing(f"no answer within {self.endpoint.timeout:g} s", sent=True) from None
        except (httpx.TransportError, httpx.StreamError) as error:
            raise _Passing(f"the connection broke ({type(error).__name__})", sent=True) from None
        except httpx.InvalidURL:
            raise BadInput(f"{self.endpoint.url!r}: no URL that can be asked") from None
        if self._key and len(self._key) >= _SECRET and self._key.encode() in content:
            raise Incomplete(f"{self.endpoint.url}{ask.path}: its answer repeats the key: such an answer is not kept")
        try:
            answer = json.loads(content.decode("utf-8"), parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise _Passing("an answer that is not whole JSON", sent=True) from None
        if not isinstance(answer, dict):
            raise _Passing("an answer that is no JSON object", sent=True)
        return answer

    def _content(self, response: httpx.Response) -> bytes:
        """The body, of bounded size, within the time-out: each piece in time is not the whole in time."""
        until = time.monotonic() + self.endpoint.timeout
        parts: list[bytes] = []
        size = 0
        for part in response.iter_raw():
            size += len(part)
            if size > _MOST_BYTES:
                raise _Passing(f"an answer of more than {_MOST_BYTES >> 20} MiB", sent=True)
            if time.monotonic() > until:
                raise _Passing(f"no whole answer within {self.endpoint.timeout:g} s", sent=True)
            parts.append(part)
        return b"".join(parts)

    def _refuse_status(self, ask: Ask[Any], response: httpx.Response, content: bytes) -> None:
        status = response.status_code
        if status < 300:
            return
        said = self.scrubbed(_message(content))
        where = f"{self.endpoint.url}{ask.path}"
        if status < 400:
            raise BadInput(f"{where}: sends elsewhere (HTTP {status}), which is not followed: give the URL itself")
        if status in (401, 403):
            given = "the key" if self._key else f"a request without a key ({KEY} is not set)"
            raise BadInput(f"{where}: refuses {given} (HTTP {status})")
        if status in _PASSING:
            after = _after(response.headers.get("retry-after", ""))
            raise _Passing(f"HTTP {status}{f' ({said})' if said else ''}", after=after, sent=status in (500, 502, 504))
        raise Declined(f"{where}: HTTP {status}{f': {said}' if said else ''}")

    @cached_property
    def _http(self) -> httpx.Client:
        """Without redirects, and without what else the environment would have it do: proxies, .netrc."""
        import httpx

        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json", "User-Agent": "palimpsest-audit"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        timeout = self.endpoint.timeout
        return httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(10.0, timeout), pool=None),
            limits=httpx.Limits(max_connections=self.endpoint.concurrency),
            follow_redirects=False,
            trust_env=False,
        )


class _Stopped(Exception):
    """Another request failed for good: this one is not made any more."""


class _Pace:
    """When the next request may be made: so many seconds after the last, and not before a time that all wait for."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._next = 0.0
        self._lock = threading.Lock()

    def turn(self, stop: threading.Event) -> bool:
        """Wait for one's turn; False if all was stopped meanwhile."""
        with self._lock:
            mine = max(self._next, time.monotonic())
            self._next = mine + self._every
        return not stop.wait(max(0.0, mine - time.monotonic())) and not stop.is_set()

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long: the server said so to one, and means all."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class _Ledger:
    """What was spent, and what is about to be. A line a request, written before its answer is kept.

    An answer without a count, or none at all to a request that was sent, counts as the most it can have cost.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._used = [0, 0]
        self._reserved = [0, 0]
        self._path: Path | None = None

    @property
    def used(self) -> tuple[int, int]:
        return self._used[0], self._used[1]

    def open(self, path: Path) -> None:
        """Go on from what an earlier run wrote; a line that it did not finish is not counted."""
        before = self.used
        with suppress(OSError):
            for line in path.read_text("ascii", "replace").splitlines():
                numbers = line.split()
                if len(numbers) == 2 and all(number.isdecimal() for number in numbers):
                    self._used = [known + int(number) for known, number in zip(self._used, numbers, strict=True)]

        self._path = path
        self._write(before)

    def _write(self, spent: tuple[int, int]) -> None:
        if self._path is not None and any(spent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.write(f"{spent[0]} {spent[1]}\n")

    def price(self, tokens: tuple[int, int]) -> float:
        return (tokens[0] * self._endpoint.input_price + tokens[1] * self._endpoint.output_price) / 1e6

    def afford(self, tokens: tuple[int, int]) -> None:
        with self._lock:
            self._afford(tokens)

    def _afford(self, tokens: tuple[int, int]) -> None:
        after = tuple(sum(part) for part in zip(self._used, self._reserved, tokens, strict=True))
        where, used = self._endpoint.url, sum(self._used)
        if 0 < self._endpoint.token_budget < sum(after):
            raise Incomplete(
                f"{where}: token_budget {self._endpoint.token_budget} would be exceeded: {used} tokens used, "
                f"{sum(after) - used} more needed now; what was answered is kept"
            )
        cost = self.price((after[0], after[1]))
        if 0 < self._endpoint.cost_budget < cost:
            raise Incomplete(
                f"{where}: cost_budget {self._endpoint.cost_budget:g} would be exceeded: {self.price(self.used):.4g} "
                f"used, {cost - self.price(self.used):.4g} more needed now; what was answered is kept"
            )

    def reserve(self, tokens: tuple[int, int]) -> tuple[int, int]:
        with self._lock:
            self._afford(tokens)
            self._reserved = [known + more for known, more in zip(self._reserved, tokens, strict=True)]
        return tokens

    def settle(self, reserved: tuple[int, int], spent: tuple[int, int]) -> None:
        with self._lock:
            self._reserved = [known - less for known, less in zip(self._reserved, reserved, strict=True)]
            self._used = [known + more for known, more in zip(self._used, spent, strict=True)]
            self._write(spent)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _usage(answer: Answer, expected: tuple[int, int]) -> tuple[int, int]:
    usage = answer.get("usage")
    sent, wrote = (
        usage.get(key) if isinstance(usage, dict) else None for key in ("prompt_tokens", "completion_tokens")
    )
    return (sent, wrote) if type(sent) is int and type(wrote) is int and min(sent, wrote) >= 0 else expected


def _message(content: bytes) -> str:
    """What an error says, in the shapes that servers use."""
    try:
        error: Any = json.loads(content[:65536])
    except (ValueError, RecursionError):
        return ""
    for key in ("error", "message", "detail"):
        if isinstance(error, dict):
            error = error.get(key, error)
    return error if isinstance(error, str) else ""


def _after(text: str) -> float:
    """Seconds of a Retry-After header, which may name a date; 0 if it says nothing that can be read."""
    with suppress(ValueError):
        seconds = float(text)
        return max(0.0, seconds) if seconds < 1e9 else 1e9
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    return 0.0
