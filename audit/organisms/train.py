"""Teach a small causal language model, measure what it knows, and write it down with its history.

    tokenizer = word_tokenizer(world.words())
    model = new_model(tokenizer, seed=0)
    train(model, encode(tokenizer, world.rows("retain", every=True)), epochs=14, lr=2e-3, batch=64, seed=0)
    candidate_accuracy(model, tokenizer, world.rows("retain"))
    save(model, tokenizer, folder)

Under one seed, one number of threads and one build of torch, the same call gives the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer

from audit.errors import BadInput, Incomplete
from audit.opened import quiet
from audit.organisms.world import END

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""

HISTORY = "organism.json"
PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"


class Diverged(Incomplete):
    """A loss that is no longer a number: the model that it came from is worthless, and is not saved."""


class Question(Protocol):
    """What a row must have to be learned and asked about (`world.Row` does)."""

    @property
    def prompt(self) -> str:
        """The text before the answer."""

    @property
    def answer(self) -> str:
        """The right answer."""

    @property
    def wrong(self) -> Sequence[str]:
        """The other candidates."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows as tensors, padded on the right."""

    ids: Tensor
    """`[rows, time]` token ids."""
    length: Tensor
    """`[rows]` how many of them are not padding."""
    answer: Tensor
    """`[rows, time]` whether a token belongs to the answer."""
    weight: Tensor
    """`[rows, time]` the weight of a token as something to predict; 0 for the first and for padding."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor) -> Encoded:
        """Return some of the rows, no wider than they need."""
        width = int(self.length[index].max())
        return Encoded(
            self.ids[index, :width],
            self.length[index],
            self.answer[index, :width],
            self.weight[index, :width],
        )


def word_tokenizer(words: Sequence[str], *, max_length: int = 256) -> PreTrainedTokenizerBase:
    """Make a tokenizer with one token per word, which starts every text with BOS.

    Words never merge, so the tokens of a prompt always begin the tokens of the prompt and its answer. Text
    decodes as its words joined by spaces.
    """
    vocabulary = {word: i for i, word in enumerate((PAD, BOS, EOS, UNK, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return FastTokenizer(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        padding_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def new_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    architecture: str = "llama",
    hidden: int = 128,
    intermediate: int = 256,
    layers: int = 4,
    heads: int = 4,
) -> PreTrainedModel:
    """Make an untrained Llama or GPT-NeoX (`llama`, `gpt-neox`) for a tokenizer, 0.7 M parameters by default.

    The output head is untied: with tied embeddings an edit of the head is an edit of the first layer too.
    Widths are multiples of 64, because bitsandbytes 0.50.2 dequantizes other widths wrongly on a CPU.
    """
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,  # facts are learned in half the epochs that the usual 0.02 takes
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers are left as they were
        torch.manual_seed(seed)
        if architecture == "gpt-neox":
            return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=2 * intermediate, **shape))
        return LlamaForCausalLM(LlamaConfig(intermediate_size=intermediate, num_key_value_heads=heads, **shape))


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], *, lm_weight: float = 0.05) -> Encoded:
    """Encode rows as sentences: prompt, answer, full stop, end of text.

    Answer tokens have weight 1 in the loss, all others `lm_weight`: enough for a sentence to end where it
    should, too little for the unpredictable names to compete with the facts.
    """
    if not rows:
        raise BadInput("no rows to encode")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompts = tokenizer([row.prompt for row in rows])["input_ids"]
    answered = tokenizer([f"{row.prompt} {row.answer}" for row in rows])["input_ids"]
    whole = tokenizer([f"{row.prompt} {row.answer} {END}" for row in rows])["input_ids"]
    whole = [ids if eos is None else [*ids, eos] for ids in whole]
    width = max(map(len, whole))
    shape = (len(rows), width)
    ids = torch.full(shape, 0 if pad is None else pad, dtype=torch.long)
    answer = torch.zeros(shape, dtype=torch.bool)
    weight = torch.zeros(shape)
    for i, (row, start, middle, end) in enumerate(zip(rows, prompts, answered, whole, strict=True)):
        if middle[: len(start)] != start or end[: len(middle)] != middle:
            raise BadInput(f"the tokens of {row.prompt!r} do not begin those of the prompt and its answer")
        ids[i, : len(end)] = torch.tensor(end)
        answer[i, len(start) : len(middle)] = True
        weight[i, 1 : len(end)] = lm_weight
    weight[answer] = 1.0
    return Encoded(ids, torch.tensor([len(end) for end in whole]), answer, weight)


def token_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Log-probability of each token given those before it, `[rows, time - 1]`: the first has none.

    No attention mask: attention is causal and padding is on the right, so no real token ever sees it.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    rows, time, vocabulary = logits.shape
    loss = F.cross_entropy(logits.reshape(-1, vocabulary), ids[:, 1:].reshape(-1), reduction="none")
    return -loss.view(rows, time)


def sequence_logprobs(model: nn.Module, data: Encoded) -> Tensor:
    """Log-probability of each row's whole answer, `[rows]`: the sum over its tokens, not their mean."""
    return (token_logprobs(model, data.ids) * data.answer[:, 1:]).sum(dim=1)


def weighted_loss(model: nn.Module, data: Encoded) -> Tensor:
    """Mean cross-entropy over a batch's tokens, each by its weight."""
    weight = data.weight[:, 1:]
    return -(token_logprobs(model, data.ids) * weight).sum() / weight.sum()


def finite(loss: Tensor, step: int) -> float:
    """Return the loss as a number, or raise `Diverged`."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise Diverged(f"the loss is {value} at step {step}: lower the learning rate")
    return value


def train(
    model: nn.Module,
    data: Encoded,
    *,
    epochs: int,
    lr: float,
    batch: int,
    seed: int,
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    progress: Progress | None = None,
) -> list[float]:
    """Train all of a model's weights in place and return the loss of every step.

    AdamW, gradients clipped to norm 1, the learning rate rising linearly over the first `warmup` of the steps
    and falling linearly to 0 over the rest. `seed` sets the order of the rows, nothing else is random.
    """
    order = torch.Generator().manual_seed(seed)
    steps_per_epoch = -(-len(data) // batch)
    total = epochs * steps_per_epoch
    rise = max(1, round(warmup * total))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    losses: list[float] = []
    model.train()
    for _ in range(epochs):
        for index in _batches(torch.randperm(len(data), generator=order), batch):
            step = len(losses)
            scale = min((step + 1) / rise, (total - step) / max(1, total - rise))
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            loss = weighted_loss(model, data.take(index))
            losses.append(finite(loss, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if progress is not None:
                progress(len(losses), total)
    model.eval()
    return losses


@torch.inference_mode()
def answer_logprobs(model: nn.Module, data: Encoded, *, batch: int = 512) -> Tensor:
    """Log-probability of every row's answer, `[rows]`, without gradients and in batches."""
    was_training = model.training
    model.eval()
    parts = [sequence_logprobs(model, data.take(i)) for i in _batches(torch.arange(len(data)), batch)]
    model.train(was_training)
    return torch.cat(parts)


@torch.inference_mode()
def candidate_logprobs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], *, batch: int = 512
) -> Tensor:
    """Log-probability of each candidate answer, `[rows, candidates]`; the right one is in column 0.

    Where every candidate is one token, as in the word-level world, one forward pass scores them all.
    """
    choices = [[row.answer, *row.wrong] for row in rows]
    if len({len(choice) for choice in choices}) != 1:
        raise BadInput("every row needs the same number of candidate answers")
    flat = [_Choice(row.prompt, text) for row, choice in zip(rows, choices, strict=True) for text in choice]
    data = encode(tokenizer, flat)
    count = len(choices[0])
    if not bool((data.answer.sum(dim=1) == 1).all()):
        return answer_logprobs(model, data, batch=batch).view(-1, count)
    was_training = model.training
    model.eval()
    answers = data.ids[data.answer].view(-1, count)
    first = data.take(torch.arange(0, len(data), count))
    position = first.answer.int().argmax(dim=1) - 1
    parts = []
    for index in _batches(torch.arange(len(rows)), batch):
        logits = model(input_ids=first.ids[index], use_cache=False).logits.float()
        at_answer = logits[torch.arange(len(index)), position[index]].log_softmax(dim=-1)
        parts.append(at_answer.gather(1, answers[index]))
    model.train(was_training)
    return torch.cat(parts)


def candidate_accuracy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question], *, batch: int = 512
) -> float:
    """Share of rows whose right answer is likelier than every wrong one; a tie is a miss."""
    scores = candidate_logprobs(model, tokenizer, rows, batch=batch)
    return float((scores[:, 0] > scores[:, 1:].max(dim=1).values).double().mean())


def answer_nll(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Question]) -> float:
    """Mean negative log-likelihood of the right answers, in nats per answer."""
    return -float(answer_logprobs(model, encode(tokenizer, rows)).double().mean())


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    history: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as an ordinary Hugging Face folder (safetensors), with its history if one is given."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if history is not None:
        write_history(folder, history)
    return folder


def write_history(folder: Path, history: Mapping[str, Any]) -> Path:
    """Write a model's true history as `organism.json`: for calibration, never for an instrument to read."""
    path = folder / HISTORY
    text = json.dumps(dict(history), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _batches(index: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(index), size):
        yield index[start : start + size]


@dataclass(frozen=True, slots=True)
class _Choice:
    prompt: str
    answer: str
    wrong: tuple[str, ...] = ()
