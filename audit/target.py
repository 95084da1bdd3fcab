"""An opened language model: tokenizer, weights, and the canonical names of the places inside it.

The tokenizer is read at once; the weights when a pass, or an instrument, first needs them (`audit.opened`).

Places inside the model carry TransformerLens' hook names (`blocks.3.hook_resid_post`). They are resolved
through its architecture adapters to the Hugging Face modules themselves, and recorded by plain hooks there:
wrapping the model in a `TransformerBridge` changes its attention kernel, and with it the last digits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Encoding, Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList, PreTrainedTokenizerFast

from audit.errors import BadInput, Refused
from audit.finetune import text_loss
from audit.inventory import Inventory
from audit.memory import spelled, token_bytes
from audit.opened import OpenModel, quiet
from audit.rendering import Renderer
from audit.tokens import Drawn, Tokens, common_prefix

if TYPE_CHECKING:
    from audit.loaders import Example
    from audit.passes import TextPass

Template = str
_PROBE = "In 1984, naïve Zoë wrote: «What's 2+2?»"
_QA = "Question: {prompt}\nAnswer:"


class Target(OpenModel):
    """A causal language model under audit, or one it is compared with.

    Args:
        role: `target`, `original` or `retrained`; an attacked model is `target+relearn@20`.
        inventory: what `take_inventory` found in the folder.
        device: a torch device.
        dtype: of the weights in memory.
        template: how a prompt becomes text: `auto`, `chat`, `qa`, `plain`, or a string with `{prompt}`.
        limit: bytes of memory that the scan may take.
    """

    factory = AutoModelForCausalLM

    def __init__(
        self,
        role: str,
        inventory: Inventory,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        template: Template = "auto",
        limit: int | None = None,
    ) -> None:
        super().__init__(role, inventory, device=device, dtype=dtype, template=template, limit=limit)
        self.truncated: set[tuple[int, ...]] = set()
        self._context_length: int | None = None
        # Instruments ask for the same texts again, and an attack at every stage: views share this.
        self._encoded: dict[tuple[str, str], Tokens] = {}
        # One object for each token id: Python would make a new one, of 32 bytes, for every token of every text.
        self._numbers: dict[int, int] = {}
        with quiet():
            self.tokenizer = self._load(AutoTokenizer)
            if not self._as_stored():
                self.tokenizer = self._load(PreTrainedTokenizerFast)
        if self.tokenizer.is_fast:  # asked directly, as transformers would set it up
            backend = self.tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = self.tokenizer.split_special_tokens
        if template == "chat" and not self.tokenizer.chat_template:
            raise BadInput(f"{inventory.root}: template 'chat' asked for, but the tokenizer has none")
        self.context(_PROBE)  # a chat template that never ends is told here, not amid a scan; views share its process

    def _as_stored(self) -> bool:
        """Does the tokenizer split text as the folder's own `tokenizer.json` does?

        For some model types (Qwen2, Phi-3) transformers builds the class it knows for the type from the vocabulary
        alone, whatever pre-tokenizer and model the file names: another tokenizer than the one the model was trained
        with, and nothing says so.
        """
        path = self.inventory.root / "tokenizer.json"
        if type(self.tokenizer) is PreTrainedTokenizerFast or not self.tokenizer.is_fast or not path.is_file():
            return True
        stored = Tokenizer.from_file(str(path))
        words = sorted(stored.get_vocab())
        probe = " ".join([_PROBE, *words[:: max(1, len(words) // 40)]])
        loaded = self._split(self.tokenizer.backend_tokenizer, probe, special=False).ids
        return bool(self._split(stored, probe, special=False).ids == loaded)

    def _split(self, backend: Tokenizer, text: str, *, special: bool) -> Encoding:
        """What a fast tokenizer makes of a text. Its patterns give up after ten million steps, and it then panics."""
        try:
            return backend.encode(text, add_special_tokens=special)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # which is no Exception, and has no other name
                raise
            reason = f"its tokenizer gives up on {text[:40]!r} ({str(error)[:80]})"
            raise Refused(f"{self.inventory.root}: {reason}", "audit the model with a tokenizer that works") from None

    def passes(self, share: bool) -> TextPass:
        """Packed batches, with common beginnings computed once."""
        from audit.passes import TextPass

        return TextPass(self, share)

    @property
    def cut(self) -> int:
        """How many texts were longer than the context, and lost a part."""
        return len(self.truncated)

    # --- text to tokens -------------------------------------------------------------------------------

    def context(self, prompt: str) -> tuple[str, str, bool]:
        """The text before the answer, the separator before it, and whether special tokens are to be added."""
        if not prompt:
            return "", "", True
        template = self.template
        if template == "auto":
            template = "chat" if self.tokenizer.chat_template else "qa" if prompt.rstrip().endswith("?") else "plain"
        if template == "chat":
            return self._renderer.render(prompt), "", False
        form = {"qa": _QA, "plain": "{prompt}"}.get(template, template)
        return form.replace("{prompt}", prompt.rstrip()), " ", True

    @cached_property
    def _renderer(self) -> Renderer:
        names = {file.path for file in self.inventory.files}
        places = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json", *self.inventory.weight_files)
        file = self.inventory.root / next(name for name in places if name in names)
        return Renderer(file, self.tokenizer.get_chat_template(), self.tokenizer.special_tokens_map)

    def encode(self, prompt: str, answer: str) -> Tokens:
        """Tokenize prompt and answer together; scored is every token that carries a part of the answer.

        Tokenizing them apart would differ from what the model saw in training wherever a merge crosses the
        boundary. A text longer than the context loses its beginning (with a prompt) or its end (without).
        """
        return self._tokens(prompt, answer)

    def loss(self, rows: Sequence[Tokens]) -> torch.Tensor:
        """Over all scored tokens of the batch."""
        return text_loss(self.model, rows)

    def question(self, example: Example) -> Tokens:
        """An example's prompt with its answer, which is scored."""
        return self.encode(example.prompt, example.answer)

    def decision(self, prompt: str, answer: str) -> Tokens:
        """A prompt up to its answer's first token, which is scored; a passage without a prompt up to its last."""
        tokens = self.encode(prompt, answer)
        return tokens.begun(1) if prompt else Tokens(tokens.ids, len(tokens.ids) - 1)

    def _tokens(self, prompt: str, answer: str) -> Tokens:
        known = self._encoded.get((prompt, answer))
        if known is None:
            known = self._encoded[prompt, answer] = self._encode_answer(prompt, answer)
        return known

    def _encode_answer(self, prompt: str, answer: str) -> Tokens:
        before, separator, special = self.context(prompt)
        text = before + separator + answer
        ids, offsets = self._encode(text, special)
        if offsets is not None:
            # Not the separator: where it is a token of its own, that token carries nothing of the answer.
            boundary = len(before) + len(separator)
            start = next((i for i, (_, end) in enumerate(offsets[: len(ids)]) if end > boundary), len(ids))
        else:
            start = common_prefix(ids, self._encode(before, special)[0])
        ids, start = self._fit(ids, start, keep_end=bool(prompt))
        if len(ids) < 2:
            ids = (self._any_start(), *(ids or (self._any_start(),)))
        # The first token of a text without a BOS has no predecessor: it cannot be scored.
        return Tokens(ids, min(max(start, 1), len(ids) - 1))

    def encode_prompt(self, prompt: str, room: int = 0) -> tuple[int, ...]:
        """Token ids to generate from, leaving `room` tokens of context free."""
        before, _, special = self.context(prompt)
        ids = self._encode(before, special)[0]
        limit = max(1, self.context_length - room)
        return ids[-limit:] if ids else (self._any_start(),)

    def encode_opening(self, passage: str) -> tuple[int, ...]:
        """Token ids of the first half of a plain passage, to generate from."""
        ids = self._tokens("", passage).ids
        return ids[: max(1, len(ids) // 2)]

    def _encode(self, text: str, special: bool) -> tuple[tuple[int, ...], list[tuple[int, int]] | None]:
        """Token ids without the end of text that some tokenizers add: it is no answer, and nothing follows it.

        With them, where the tokenizer knows, each token's place in the text. A fast tokenizer is asked directly: what
        transformers wraps around a call takes five times as long as the call.
        """
        offsets: list[tuple[int, int]] | None = None
        if self.tokenizer.is_fast:
            found = self._split(self.tokenizer.backend_tokenizer, text, special=special)
            ids, specials, offsets = found.ids, found.special_tokens_mask, found.offsets
        else:
            encoded = self.tokenizer(text, add_special_tokens=special, return_special_tokens_mask=True, verbose=False)
            ids, specials = list(encoded["input_ids"]), encoded["special_tokens_mask"]
        end = len(ids)
        while end > 1 and specials[end - 1] and ids[end - 1] == self.tokenizer.eos_token_id:
            end -= 1
        if ids and (largest := max(ids)) >= self.vocabulary:  # on a GPU no reading fails so late, or so badly
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise BadInput(
                f"{self.inventory.root}: no row for the token {str(token)[:40]!r} ({largest}), in {text[:40]!r}"
            )
        return tuple(map(self._numbers.setdefault, ids[:end], ids)), offsets

    def decode(self, ids: tuple[int, ...]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _fit(self, ids: tuple[int, ...], start: int, *, keep_end: bool) -> tuple[tuple[int, ...], int]:
        excess = len(ids) - self.context_length
        if excess <= 0:
            return ids, start
        self.truncated.add(ids)  # texts, however often they are encoded
        return (ids[excess:], start - excess) if keep_end else (ids[: self.context_length], start)

    def _any_start(self) -> int:
        tokenizer = self.tokenizer
        return self._first(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)

    @property
    def padding_id(self) -> int:
        """A token to pad generation prompts with; it is masked out."""
        tokenizer = self.tokenizer
        return self._first(tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)

    def _first(self, *tokens: int | None) -> int:
        """The first of these that there is, and that the model has a row for."""
        return next((int(token) for token in tokens if token is not None and token < self.vocabulary), 0)

    @property
    def special_ids(self) -> frozenset[int]:
        """Token ids that no perturbation may use."""
        return frozenset(self.tokenizer.all_special_ids)

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model gives a probability; needs no weights."""
        return int(self._config.vocab_size)

    @property
    def context_length(self) -> int:
        """Longest sequence the model takes; 2048 where the configuration does not say."""
        if self._context_length is None:
            config = self.model.config if self._model is not None else self._config
            length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
            self._context_length = int(length) if length else 2048
        return self._context_length

    # --- answers --------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        new_tokens: int,
        barred: Sequence[frozenset[int]] = (),
        drawn: Drawn | None = None,
        beams: int = 1,
    ) -> list[tuple[int, ...]]:
        """Continuations of a batch of prompts, each at most `new_tokens` long; greedy ones if nothing else is said.

        Args:
            prompts: token ids to go on from.
            new_tokens: length of a continuation, at most.
            barred: per prompt, tokens that are never written; none if not given.
            drawn: draw one of each prompt instead.
            beams: width of a beam search instead: all that it ends with, prompt after prompt, likeliest first.
        """
        rules: list[Any] = [_Barred([tokens for tokens in barred for _ in range(beams)])] if any(barred) else []
        if drawn is not None:
            rules.append(_Draw(drawn))
        pad, model = self.padding_id, self.model
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=beams,
                num_return_sequences=beams,
                repetition_penalty=1.0,
                pad_token_id=pad,
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=LogitsProcessorList(rules),
            )
        return [tuple(row) for row in out[:, width:].tolist()]

    # --- memory ---------------------------------------------------------------------------------------

    @property
    def token_bytes(self) -> int:
        """By the configuration: see `audit.memory`."""
        return token_bytes(self._config.get_text_config(), self.dtype.itemsize)

    # --- places ---------------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        """Number of transformer blocks; needs no weights."""
        return int(self._config.num_hidden_layers)

    @property
    def blocks(self) -> list[str]:
        """Module paths of the blocks."""
        return [f"{self._places['blocks']}.{i}" for i in range(self.layers)]

    @property
    def output_head(self) -> torch.nn.Module:
        """The unembedding; where weights are tied, the embedding too."""
        head: torch.nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def final_norm(self) -> torch.nn.Module:
        """The normalisation before the unembedding."""
        module: torch.nn.Module = self.model.get_submodule(self._places["ln_final"])
        return module

    def embedding(self) -> torch.Tensor:
        """Token embeddings, shape [vocabulary, width], float32 on the CPU.

        Raises:
            BadInput: they, and as much again to work with them, do not fit in the memory that is stated.
        """
        module = self.model.get_input_embeddings()
        needed = 2 * 4 * module.weight.numel()
        if self.memory is not None and needed > self.memory.batches:
            raise BadInput(
                f"{self.inventory.root}: to work with its embedding takes {spelled(needed)}, which does not fit beside "
                f"the model in the {self.memory.whose} memory ({spelled(self.memory.limit)})"
            )
        return self.weights_of(module)["weight"].float().cpu()

    @property
    def _places(self) -> dict[str, str]:
        if not hasattr(self, "_places_cache"):
            config = self.model.config
            known = KNOWN_PLACES.get(config.model_type)
            self._places_cache = dict(zip(PARTS, known, strict=True)) if known else canonical_places(config)
        return self._places_cache

    def site(self, name: str) -> tuple[torch.nn.Module, str]:
        """The module behind a canonical hook name, and whether its `input` or `output` is meant.

        Names: `hook_embed`, `blocks.{i}.hook_resid_pre|hook_resid_post|hook_attn_out|hook_mlp_out`,
        `ln_final.hook_in|hook_out`.

        Raises:
            BadInput: no such place in this architecture.
        """
        places = self._places
        block = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name)
        try:
            if block is not None:
                path, side = (
                    f"{places['blocks']}.{block[1]}",
                    "input" if block[2] in ("hook_resid_pre", "hook_in") else "output",
                )
                if block[2] in ("hook_attn_out", "hook_mlp_out"):
                    path += "." + places[block[2].split("_")[1]]
                elif block[2] not in ("hook_resid_pre", "hook_resid_post", "hook_in", "hook_out"):
                    raise KeyError(name)
            else:
                path, side = {
                    "hook_embed": (places["embed"], "output"),
                    "ln_final.hook_in": (places["ln_final"], "input"),
                    "ln_final.hook_out": (places["ln_final"], "output"),
                }[name]
            return self.model.get_submodule(path), side
        except (KeyError, AttributeError):
            raise BadInput(f"{self.inventory.root}: no place named {name!r} in {self.inventory.architecture}") from None


class _Barred:
    """A logits processor: row by row, tokens that must not come next."""

    def __init__(self, tokens: Sequence[frozenset[int]]) -> None:
        self._rows = [row for row, barred in enumerate(tokens) for _ in barred]
        self._columns = [token for barred in tokens for token in sorted(barred)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        scores = scores.clone()
        scores[self._rows, self._columns] = -torch.inf
        return scores


class _Draw:
    """A logits processor after which the likeliest token is one drawn from softmax(scores / temperature).

    Gumbel's trick (argmax of scores / T - log Exp(1)), and each row has random numbers of its own: what is drawn does
    not hang on what else is in the batch, nor on the device.
    """

    def __init__(self, drawn: Drawn) -> None:
        self._temperature = drawn.temperature
        self._random = [torch.Generator().manual_seed(seed) for seed in drawn.seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        # In float32 one draw in 2^24 would be exactly 0, and its token certain.
        rows = [torch.empty(scores.shape[1], dtype=torch.float64).exponential_(generator=g) for g in self._random]
        return scores / self._temperature - torch.stack(rows).log().to(scores)


PARTS = ("embed", "blocks", "ln_final", "attn", "mlp")
_LLAMA = ("model.embed_tokens", "model.layers", "model.norm", "self_attn", "mlp")
KNOWN_PLACES = {
    "gpt2": ("transformer.wte", "transformer.h", "transformer.ln_f", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", "attention", "mlp"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
"""What `canonical_places` finds, by `model_type`, where that is known: TransformerLens takes a second to import."""


def canonical_places(config: Any) -> dict[str, str]:
    """Module paths of the canonical components, from TransformerLens' adapter for the architecture."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

    architecture = determine_architecture_from_hf_config(config)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(
        build_bridge_config_from_hf(config, architecture, architecture, torch.float32)
    )
    mapping = adapter.get_component_mapping()
    places = {part: mapping[part].name for part in ("embed", "blocks", "ln_final")}
    # The sublayer's contribution to the residual stream: after its own norm, where it has one (Gemma 2, OLMo 2).
    block = mapping["blocks"]
    aliases = getattr(block, "hook_aliases", {})
    for part in ("attn", "mlp"):
        alias = aliases.get(f"hook_{part}_out", f"{part}.hook_out")
        alias = alias if isinstance(alias, str) else alias[0]
        path, component = [], block
        for step in alias.removesuffix(".hook_out").split("."):
            component = component.submodules[step]
            path.append(component.name)
        places[part] = ".".join(path)
    return places
