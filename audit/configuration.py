"""What a folder's JSON and templates may make a loader do: run code, look elsewhere, or never end.

Each function takes what was parsed and raises Refused, naming the file. Nothing is rendered, compiled or loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from audit.errors import Refused

_MAX_TEMPLATE = 1 << 20  # the longest chat templates in use take some 20 kB
_MAX_PATTERN = 4096  # the longest pre-tokenizer in use takes some 600 characters
_MAX_GROWTH = 4096  # how often longer normalizing may make a text
_MAX_TOKENS = 1 << 24
_RETOKENIZE = "audit the model with the tokenizer it was trained with"
_RESIZE = "remove those tokens, or give the model rows for them"

_ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]*://|\\\\[^\\])", re.I | re.A)
# What leads from any object to the interpreter; no chat template needs it.
_INNER = re.compile(
    r"__(class|base|bases|mro|subclasses|globals|builtins|import|init|dict|code|self|getattribute|reduce)__"
)
_LOADS = re.compile(r"\{%[-+]?\s*(include|import|extends|from)\b")
# A group that holds nothing but a repetition and is repeated itself, such as (a+)+: each match may take 2^n steps.
_NESTED = re.compile(r"\((\?:)?(\[[^\]]*\]|\\[pP]\{[^}]*\}|\\?[^()\\])[+*]\)([+*]|\{\d+,\d*\})")
_DTYPES = re.compile(r"(torch\.)?(auto|half|float|double|bool|b?float\d+|u?int\d+|complex\d+|(float|int|uint)\d+_?\w*)")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")


def refuse_own_code(path: Path, value: Any) -> None:
    """Refuse a configuration that names classes of the folder's own code, at any depth."""
    if any(key == "auto_map" and item not in (None, False) for key, item in _pairs(value)):
        raise Refused(
            f"{path}: custom code, which an audit never runs (auto_map)",
            "save the model as a class that transformers has",
            "auto_map",
        )


def refuse_code(path: Path, value: Any) -> None:
    """Refuse any other configuration key, however deep, that makes a loader load code, other files or weights."""
    for key, item in _pairs(value):
        if key in ("trust_remote_code", "custom_pipelines") and item not in (None, False):
            raise Refused(f"{path}: custom code, which an audit never runs ({key})", f"remove {key}")
        texts = item.values() if isinstance(item, dict) else [item]
        if "_implementation" in key and any(isinstance(text, str) and "/" in text for text in texts):
            # attn_implementation = "someone/kernel": transformers fetches that from the Hub and runs it.
            raise Refused(
                f"{path}: custom code, which an audit never runs ({key[:80]!r} names a repository)", f"remove {key}"
            )
        if key in ("transformers_weights", "fast_tokenizer_files") and item is not None:
            raise Refused(f"{path}: {key} makes transformers load other files than the usual ones", f"remove {key}")
        if key == "class_name" and item in ("Lambda", "__lambda__"):
            raise Refused(f"{path}: a Keras Lambda layer, which is code that an audit never runs", "remove it")
        if key in ("py/object", "py/reduce", "py/function", "py/type"):
            raise Refused(f"{path}: {key} makes jsonpickle load Python objects, which can run code", f"remove {key}")
        if key in ("use_pretrained_backbone", "base_model_name_or_path") and item not in (None, False, ""):
            raise Refused(f"{path}: {key} makes a loader fetch another model", "audit a folder that is whole")
    for key in ("dtype", "torch_dtype"):  # deeper down, quantizers have names of their own
        item = value.get(key) if isinstance(value, dict) else None
        if isinstance(item, str) and not _DTYPES.fullmatch(item):
            raise Refused(f"{path}: {key} names no data type ({item[:40]!r})", "name one, such as float32")


def refuse_addresses(path: Path, value: Any) -> None:
    """Refuse a configuration any of whose texts is an address (https://…, s3://…, a Windows share)."""
    for key, item in _pairs(value):
        for text in item if isinstance(item, list) else [item]:
            if isinstance(text, str) and _ADDRESS.match(text):
                raise Refused(f"{path}: {key[:80]!r} points to the network ({text[:80]!r})", f"remove {key[:80]!r}")


def refuse_templates(path: Path, value: Any) -> None:
    """Refuse chat templates, however deep in a configuration, as `refuse_template` does."""
    for key, item in _pairs(value):
        if isinstance(item, str) and (key == "template" or key.startswith("chat_template")):
            refuse_template(path, item)
        elif key.startswith("chat_template") and isinstance(item, dict):
            for text in item.values():
                if isinstance(text, str):
                    refuse_template(path, text)


def refuse_template(path: Path, text: str) -> None:
    """Refuse a chat template that reaches into the interpreter, loads other templates or is absurdly long.

    transformers renders in a sandbox that forbids the first two as well; what only takes long is not told here.
    """
    if len(text) > _MAX_TEMPLATE:
        raise Refused(f"{path}: a chat template of more than {_MAX_TEMPLATE} characters", "remove it")
    if found := _INNER.search(text):
        raise Refused(f"{path}: a chat template that reaches into the interpreter ({found[0]})", "remove it")
    if found := _LOADS.search(text):
        raise Refused(f"{path}: a chat template that loads another ({found[1]})", "write it in one piece")


def refuse_tokenizer(path: Path, value: Any) -> None:
    """Refuse a `tokenizer.json` whose steps can take forever or fill the memory, or whose ids are no numbers."""
    steps = {name: value.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
    for key, item in _pairs(steps):
        if key == "Regex" and isinstance(item, str):
            if len(item) > _MAX_PATTERN:
                raise Refused(f"{path}: a pattern of more than {_MAX_PATTERN} characters", _RETOKENIZE)
            if found := _NESTED.search(item):
                reason = f"the pattern {found[0][:80]!r} repeats a repetition, and may never end"
                raise Refused(f"{path}: {reason}", _RETOKENIZE)
    for name, step in steps.items():
        growth = 1
        for key, item in _pairs({"": step}):
            if key in ("content", "prepend") and isinstance(item, str):
                growth = min(growth * max(1, len(item)), _MAX_GROWTH + 1)
        if growth > _MAX_GROWTH:
            raise Refused(f"{path}: its {name} can make a text more than {_MAX_GROWTH} times as long", _RETOKENIZE)
    for token, number in _ids(value):
        if type(number) is not int or not 0 <= number < _MAX_TOKENS:
            raise Refused(
                f"{path}: token {str(token)[:40]!r} has the id {str(number)[:40]}, not 0 to {_MAX_TOKENS - 1}",
                _RETOKENIZE,
            )


def refuse_misfit(
    tokenizer: Path, value: Any, config: Any, embeddings: Iterable[tuple[str, tuple[int, ...], Path]]
) -> None:
    """Refuse a tokenizer with ids that the model has no row for: it would read whatever lies there, or crash.

    Args:
        tokenizer: where `value`, the parsed `tokenizer.json`, lies.
        config: the parsed `config.json`.
        embeddings: name, shape and file of tensors, of which those that embed tokens are looked at.
    """
    largest = max((number for _, number in _ids(value)), default=-1)
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    for part in parts:
        size = part.get("vocab_size") if isinstance(part, dict) else None
        if type(size) is int and largest >= size:
            reason = f"has the id {largest}, beyond the vocab_size of {size} in config.json"
            raise Refused(f"{tokenizer}: {reason}", _RESIZE, "ids")
    for name, shape, file in embeddings:
        if _EMBEDDINGS.search(name) and len(shape) == 2 and largest >= shape[0]:
            reason = f"has the id {largest}, beyond the {shape[0]} rows of {name[:80]!r} in {file}"
            raise Refused(f"{tokenizer}: {reason}", _RESIZE, "ids")


def _ids(tokenizer: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Token and id for each entry of the vocabulary and of the added tokens."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    elif isinstance(vocabulary, list):  # Unigram: pieces with their scores
        yield from ((piece, i) for i, piece in enumerate(vocabulary))
    added = tokenizer.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict):
            yield token.get("content"), token.get("id")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of every object in a JSON document, however deep."""
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield from node.items()
            pending += node.values()
        elif isinstance(node, list):
            pending += node
