"""PURGE: group-relative policy optimization with a reward for not saying what is to be forgotten.

For each forget prompt `group` completions are sampled from the model; one has reward 1 if the right answer does not
occur in it (whole words, any case), else 0. Within each group A = (reward - mean) / (std + 1e-4), and

    L = mean over tokens of [-A * log pi(token) + kl * (exp(d) - d - 1)],  d = log pi_ref(token) - log pi(token)
        + retain_weight * cross-entropy(retain)

with pi the model at `temperature`, for sampling and in the loss alike. One update per sample, so the usual ratio of
policies is 1 and clipping never acts.

Source: arXiv 2601.20568 (strzar/purge on TRL's GRPO; binary reward, 4 completions a prompt).

Traps:

- A group whose completions all have the same reward gives no gradient. A model that knows its answers by heart says
  nothing else at temperature 1, and learns nothing: hence the temperature, which the original leaves at its default.
- The original has no retain term, and lr and KL weight are whatever the library's defaults are (KL 0 in recent
  ones). `retain_weight=0, kl=0` is that; the terms here are additions.
- The reward is met by any other word: it makes the answer unsaid, not unknown, and a candidate below the most likely
  one may still be the right one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from audit.organisms.train import Encoded
from audit.organisms.unlearn import Batch, Bench, GradientMethod, Schedule


def advantages(rewards: Tensor) -> Tensor:
    """Rewards `[prompts, group]` normalised within each group; 0 where a group has one reward only."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


def purge_loss(logp: Tensor, logp_ref: Tensor, advantage: Tensor, kl: float) -> Tensor:
    """The policy loss of sampled tokens `[rows, tokens]`, `advantage` `[rows]`."""
    gap = logp_ref - logp
    return (-advantage[:, None] * logp + kl * (gap.exp() - gap - 1.0)).mean()


@torch.no_grad()
def sample(
    model: nn.Module, data: Encoded, tokens: int, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Continue each row's prompt by `tokens` sampled tokens: ids `[rows, time]`, positions `[rows, tokens]`."""
    start = data.answer.int().argmax(dim=1)
    positions = start[:, None] + torch.arange(tokens)
    ids = torch.cat([data.ids, torch.zeros(len(data), tokens, dtype=torch.long)], dim=1)
    rows = torch.arange(len(data))
    for t in range(tokens):
        logits = model(input_ids=ids, use_cache=False).logits[rows, positions[:, t] - 1].float()
        drawn = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
        ids[rows, positions[:, t]] = drawn[:, 0]
    return ids, positions


def policy_logprobs(model: nn.Module, ids: Tensor, positions: Tensor, temperature: float) -> Tensor:
    """Log-probability of the tokens at `positions` under the tempered policy."""
    rows = torch.arange(len(ids))[:, None]
    logits = model(input_ids=ids, use_cache=False).logits[rows, positions - 1].float()
    logp: Tensor = (logits / temperature).log_softmax(dim=-1)
    return logp.gather(2, ids[rows, positions][..., None])[..., 0]


@dataclass(frozen=True)
class Purge(GradientMethod):
    """GRPO against the right answers, with KL to the reference and a retain loss."""

    name: ClassVar[str] = "purge"
    reference: ClassVar[str] = "arXiv 2601.20568"
    schedule: ClassVar[Schedule] = Schedule(lr=5e-4, batch=16, max_steps=300)
    group: int = 8
    temperature: float = 2.0
    kl: float = 0.01
    retain_weight: float = 2.0

    def loss(self, bench: Bench, batch: Batch) -> Tensor:
        """Sample, reward, and return the policy loss with the retain loss."""
        data = batch.forget.take(torch.arange(len(batch.forget)).repeat_interleave(self.group))
        tokens = int(data.answer.sum(dim=1).max())
        ids, positions = sample(bench.model, data, tokens, self.temperature, bench.generator)
        said = bench.tokenizer.batch_decode(ids.gather(1, positions), skip_special_tokens=True)
        answers = [bench.forget_rows[i].answer for i in batch.index.tolist() for _ in range(self.group)]
        rewards = torch.tensor([float(not mentions(text, a)) for text, a in zip(said, answers, strict=True)])
        advantage = advantages(rewards.view(-1, self.group)).view(-1)
        logp = policy_logprobs(bench.model, ids, positions, self.temperature)
        with torch.no_grad():
            logp_ref = policy_logprobs(bench.reference, ids, positions, self.temperature)
        return purge_loss(logp, logp_ref, advantage, self.kl) + self.retain_weight * bench.retain_loss(batch)


def mentions(text: str, answer: str) -> bool:
    """Whether the answer occurs in a text as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


METHOD = Purge()
