"""Which server is asked for which model, and how much it may cost. A case holds this where it else holds a folder.

    [models]
    target = { endpoint = "http://127.0.0.1:8000/v1", model = "suspect", tokenizer = "models/tokenizer" }

No credential is part of it: the key is read from the environment when the first request is made (`credential`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from audit.errors import BadInput

APIS = ("auto", "completions", "chat")
KEY = "PALIMPSEST_API_KEY"
OPENAI_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Endpoint:
    """A model behind an API.

    Attributes:
        url: of the API, such as http://127.0.0.1:8000/v1.
        model: the name that the server knows it by.
        api: completions, chat, or auto: the first of these that the server has.
        tokenizer: a folder with the model's tokenizer, without which log-probabilities belong to no token.
        concurrency: requests under way at a time.
        requests_per_minute: at most; 0: as fast as they are answered.
        timeout: seconds that an answer may take, all of it.
        retries: further attempts at a request that failed in a way that may pass.
        backoff: seconds before the first retry, doubled for each.
        token_budget: tokens of prompts and answers in all runs of an audit together; 0: no limit.
        input_price, output_price: of a million tokens, in whatever currency.
        cost_budget: the most that an audit may cost at these prices; 0: no limit.
    """

    url: str
    model: str
    api: str = "auto"
    tokenizer: Path | None = None
    concurrency: int = 8
    requests_per_minute: int = 0
    timeout: float = 60.0
    retries: int = 6
    backoff: float = 1.0
    token_budget: int = 0
    input_price: float = 0.0
    output_price: float = 0.0
    cost_budget: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", _checked(self.url))
        if not self.model or not self.model.isprintable():
            raise BadInput(f"{self.url}: which model? A name that can be printed")
        if self.api not in APIS:
            raise BadInput(f"{self.url}: api {self.api!r} is none of {', '.join(APIS)}")
        if self.concurrency < 1 or self.timeout <= 0:
            raise BadInput(f"{self.url}: concurrency must be at least 1, and timeout above 0")
        for name in _NUMBERS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"{self.url}: {name} {getattr(self, name)!r} is no number of at least 0")
        if self.cost_budget and not (self.input_price or self.output_price):
            raise BadInput(f"{self.url}: a cost_budget needs input_price and output_price")

    @property
    def name(self) -> str:
        """As a folder's name: what the record calls the model."""
        return self.model

    @property
    def server(self) -> tuple[str, int]:
        """Its host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme]

    @classmethod
    def parse(cls, raw: Mapping[str, Any], where: str, base: Path) -> Endpoint:
        """From the table of a case; unknown keys and values of another kind are bad input. Paths lie in `base`."""
        kinds = {field.name: str(field.type) for field in fields(cls)}
        kinds["endpoint"] = kinds.pop("url")
        values: dict[str, Any] = {}
        for key, value in raw.items():
            if key not in kinds:
                raise BadInput(f"{where}: unknown key {key!r} (known: {', '.join(sorted(kinds))})")
            accepted: tuple[type, ...] = {"int": (int,), "float": (int, float)}.get(kinds[key], (str,))
            if isinstance(value, bool) or not isinstance(value, accepted):
                raise BadInput(f"{where}: {key} = {value!r} is no {'number' if int in accepted else 'text'}")
            values["url" if key == "endpoint" else key] = base / str(value) if key == "tokenizer" else value
        if not {"url", "model"} <= set(values):
            raise BadInput(f"{where}: an endpoint needs its URL (endpoint) and the name of a model there (model)")
        return cls(**values)

    def dump(self) -> dict[str, str | int | float]:
        """As the table of a case: what is not left at its default, paths absolute."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "url"}
        defaults = {field.name: field.default for field in fields(self)}
        kept = {name: value for name, value in values.items() if value != defaults[name]}
        if self.tokenizer is not None:
            kept["tokenizer"] = str(self.tokenizer.resolve())
        return {"endpoint": self.url, **kept}


_NUMBERS = ("requests_per_minute", "retries", "backoff", "token_budget", "input_price", "output_price", "cost_budget")


def _checked(url: str) -> str:
    """The URL without a slash at its end. What cannot be one is refused, and so is one with a secret, unprinted."""
    try:
        parts = urlsplit(url)
        secret = "@" in parts.netloc or parts.query or parts.fragment
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise BadInput("the endpoint's URL cannot be read") from None
    if secret:
        raise BadInput(
            f"an endpoint's URL holds no user, password, query or fragment: it is written into the record. A key comes "
            f"from the environment ({KEY})"
        )
    if parts.scheme not in ("http", "https") or not host or not url.isprintable() or " " in url:
        raise BadInput(f"{url!r}: an endpoint is named by a URL, such as http://127.0.0.1:8000/v1")
    return url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


def credential(endpoint: Endpoint) -> str | None:
    """The key to send, from the environment; OpenAI's own to OpenAI only, for no other server should get it.

    Raises:
        BadInput: it holds what no header can, said without saying what.
    """
    host = urlsplit(endpoint.url).hostname or ""
    names = (KEY, OPENAI_KEY) if host == "openai.com" or host.endswith(".openai.com") else (KEY,)
    for name in names:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable() and " " not in key):
                raise BadInput(f"{name}: holds characters that no key has")
            return key
    return None
