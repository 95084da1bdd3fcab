"""Published metrics, written again from their papers and codes on plain transformers: what `parity` compares with.

Nothing of the engine or the instruments is used here: one text at a time goes through a Hugging Face model, without
batches or caches, and formulas follow these codes line by line, in other words than theirs:

- open-unlearning: locuslab/open-unlearning at d3d7cf9, `src/evals/metrics/{memorization,privacy,utility,utils}.py` and
  `mia/{loss,zlib,min_k,min_k_plus_plus}.py`
- TOFU: locuslab/tofu at 8c49eee, `evaluate_util.py` and `aggregate_eval_stat.py`
- MUSE: the metrics that jaechan-repo/muse_bench was published with, as zzwjames/FailureLLMUnlearning at 1882021 carries
  them on, `metrics/{privleak,logger}.py`
- Min-K++: zjysteven/mink-plus-plus at 5596c65, `run.py`
- ReCaLL: ruoyuxie/recall at c231641, `src/run.py`
- UDS: gnueaj/unlearning-depth-score at a6dabd4, `compute_uds.py`; its CKA at 89ff8d3,
  `scripts/compute_representation_baselines.py`
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """The answer's tokens of one text: log p, whether each was the argmax, and moments of log p over the vocabulary."""

    logprob: Floats
    match: NDArray[np.bool_]
    mean: Floats
    variance: Floats

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats a token."""
        return float(-self.logprob.mean())


class Plain:
    """A causal language model of a folder, one text at a time."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        """The transformer blocks of a Llama-like model."""
        blocks: Sequence[torch.nn.Module] = self.model.model.layers
        return blocks

    def tokens(self, before: str, answer: str) -> tuple[list[int], int]:
        """Ids of the whole text, and the place of the first that carries a character of the answer."""
        joined = self.tokenizer(f"{before} {answer}" if before else answer, return_offsets_mapping=True)
        begins = len(before) + 1 if before else 0
        ends = [end for _, end in joined["offset_mapping"]]
        first = next(i for i, end in enumerate(ends) if end > begins)
        return joined["input_ids"], max(first, 1)

    @torch.inference_mode()
    def distributions(self, ids: Sequence[int]) -> torch.Tensor:
        """log p of the next token after each, [T, vocabulary]."""
        logits = self.model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return torch.nn.functional.log_softmax(logits, dim=-1)

    def scored(self, ids: Sequence[int], first: int) -> Scored:
        """What a text's tokens from `first` on are given."""
        logs = self.distributions(ids)[first - 1 : -1]
        wanted = torch.tensor(list(ids[first:]))
        p = logs.exp()
        mean = (p * logs).sum(-1)
        variance = (p * torch.square(logs)).sum(-1) - torch.square(mean)
        own = logs.gather(-1, wanted[:, None])[:, 0]
        return Scored(
            *(np.asarray(x) for x in (own.double(), logs.argmax(-1) == wanted, mean.double(), variance.double()))
        )

    def answer(self, before: str, answer: str) -> Scored:
        """An answer's tokens after the text before it."""
        return self.scored(*self.tokens(before, answer))

    @torch.inference_mode()
    def greedy(self, before: str, new_tokens: int) -> str:
        """What the model writes next: the likeliest token, so many times, or until it ends the text."""
        ids = torch.tensor([self.tokenizer(before)["input_ids"]])
        whole = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        return str(self.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True))

    @torch.inference_mode()
    def states(self, ids: Sequence[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """After every block [T, width]: as the blocks give them, and as `output_hidden_states` does."""
        raw: list[torch.Tensor] = []
        handles = [block.register_forward_hook(lambda _m, _i, out: raw.append(_first(out)[0])) for block in self.blocks]
        try:
            out = self.model(torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
        finally:
            for handle in handles:
                handle.remove()
        return raw, [state[0] for state in out.hidden_states[1:]]

    @contextmanager
    def patched(self, block: int, states: torch.Tensor, places: slice) -> Iterator[None]:
        """Within, the output of a block is another at some places: `states` [T, width] of the same text."""

        def put_in(_module: Any, _inputs: Any, out: Any) -> Any:
            own = _first(out).clone()
            own[0, places] = states[places].to(own.dtype)
            return (own, *out[1:]) if isinstance(out, tuple) else own

        handle = self.blocks[block].register_forward_hook(put_in)
        try:
            yield
        finally:
            handle.remove()


def _first(out: Any) -> torch.Tensor:
    state: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return state


# --- membership ---------------------------------------------------------------------------------------------


def zlib_ratio(scored: Scored, text: str) -> float:
    """Loss over the length of the compressed text, larger = likelier a non-member (open-unlearning's sign)."""
    return scored.loss / len(zlib.compress(text.encode("utf-8")))


def lowest(values: Floats, k: float, *, at_least_one: bool = True) -> float:
    """Mean of the lowest k of the values. MUSE, Min-K++ and ReCaLL have no `at_least_one`: NaN of fewer than 1/k."""
    count = int(len(values) * k)
    count = max(1, count) if at_least_one else count
    return sum(sorted(values.tolist())[:count]) / count if count else math.nan


def normalised(scored: Scored, floor: float = 1e-6) -> Floats:
    """Min-K++'s z of each token; `floor` is open-unlearning's, Min-K++ and ReCaLL have none."""
    return (scored.logprob - scored.mean) / np.sqrt(np.maximum(scored.variance, floor) if floor else scored.variance)


def recall_official(model: Plain, prefix: str, text: str) -> float:
    """ReCaLL as published: the prefixed pass begins the text with a second BOS, and scores its first token too."""
    own, before = model.tokenizer(text)["input_ids"], model.tokenizer(prefix)["input_ids"]
    return model.scored([*before, *own], len(before)).loss / model.scored(own, 1).loss


def privleak(auc: float, reference: float) -> float:
    """open-unlearning's, from AUCs that are larger where the forget set looks like training data."""
    return ((1 - auc) - (1 - reference)) / (1 - reference + 1e-10) * 100


# --- memorization and knowledge -----------------------------------------------------------------------------


def extraction_strength(match: NDArray[np.bool_], *, as_published: bool = False) -> float:
    """1 - k / L for the first k from which all tokens match; published, the loop ends at L - 1 if none does."""
    length = len(match)
    for k in range(length):
        if match[k:].all():
            return 1 - k / length
    return 1 - (length - 1) / length if as_published else 0.0


def truth_ratio(right: Sequence[Scored], wrong: Sequence[Scored], epsilon: float = 1e-10) -> float:
    """open-unlearning's: means of losses over the variants, then p(wrong) / (p(right) + 1e-10)."""
    p_right = math.exp(-sum(s.loss for s in right) / len(right))
    p_wrong = math.exp(-sum(s.loss for s in wrong) / len(wrong))
    return p_wrong / (p_right + epsilon)


def truth_ratio_of_paper(right: Sequence[Scored], wrong: Sequence[Scored]) -> float:
    """TOFU's equation 1: the mean over wrong answers of p(a|q)^(1/|a|), over that of the paraphrase."""
    p_wrong = [math.exp(-s.loss) for s in wrong]
    return sum(p_wrong) / len(p_wrong) / (sum(math.exp(-s.loss) for s in right) / len(right))


def truth_probability(right: Sequence[Scored], wrong: Sequence[Scored]) -> float:
    """open-unlearning's `prob_mean`: right / (right + wrong + 1e-10)."""
    p_right = math.exp(-sum(s.loss for s in right) / len(right))
    p_wrong = math.exp(-sum(s.loss for s in wrong) / len(wrong))
    return p_right / (p_right + p_wrong + 1e-10)


def share(right: Scored, wrong: Sequence[Scored]) -> float:
    """open-unlearning's `probability_w_options`."""
    p = math.exp(-right.loss)
    return p / (p + sum(math.exp(-s.loss) for s in wrong) + 1e-10)


def largest_gap(a: Sequence[float], b: Sequence[float]) -> float:
    """The Kolmogorov-Smirnov D by its definition: the largest distance of two empirical distribution functions."""
    return max(abs(sum(x <= t for x in a) / len(a) - sum(x <= t for x in b) / len(b)) for t in [*a, *b])


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, by the textbook's table."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


# --- representation -----------------------------------------------------------------------------------------


def cka(x: Floats, y: Floats) -> float:
    """Linear CKA, biased: |Y'X|² / (|X'X| |Y'Y|) of centred features (UDS's code, Kornblith et al., equation 6)."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    return float(((y.T @ x) ** 2).sum() / np.sqrt(((x.T @ x) ** 2).sum() * ((y.T @ y) ** 2).sum()))


def cka_debiased(x: Floats, y: Floats) -> float:
    """The same with HSIC_1 of Song et al. 2012, equation 5: linear kernels without their diagonals."""

    def hsic(k: Floats, one: Floats) -> float:
        n = len(k)
        k, one = k - np.diag(np.diag(k)), one - np.diag(np.diag(one))
        last = 2 / (n - 2) * float(np.ones(n) @ k @ one @ np.ones(n))
        return float(np.trace(k @ one) + k.sum() * one.sum() / ((n - 1) * (n - 2)) - last) / (n * (n - 3))

    k, one = x @ x.T, y @ y.T
    return hsic(k, one) / math.sqrt(hsic(k, k) * hsic(one, one))


def depth_score(
    reader: Plain, retrained: Plain, target: Plain, ids: Sequence[int], first: int, *, as_published: bool = False
) -> float:
    """UDS of one text, NaN where no layer of the retrained model lacks the answer.

    Published, the states put in are `output_hidden_states`, of which the last has been through the final norm: put in
    before that norm, it is normalised twice.
    """
    kept = reader.scored(ids, first).logprob.mean()
    lost = {}
    for name, source in (("retrained", retrained), ("target", target)):
        states = source.states(ids)[1 if as_published else 0]
        lost[name] = []
        for block, state in enumerate(states):
            with reader.patched(block, state, slice(first - 1, len(ids) - 1)):
                lost[name].append(float(kept - reader.scored(ids, first).logprob.mean()))
    above = gained = 0.0
    for d1, d2 in zip(lost["retrained"], lost["target"], strict=True):
        if d1 > 0.05:
            above += d1
            gained += d1 * min(max(d2 / d1, 0.0), 1.0)
    return gained / above if above else math.nan


# --- REMIND -------------------------------------------------------------------------------------------------


def remind_features(loss: float, losses: Sequence[float], distances: Sequence[float]) -> list[float]:
    """The 15 features as this project defines them (no formulas are public), by Python's own arithmetic."""
    from statistics import fmean, pstdev, pvariance

    pairs = sorted(zip(distances, losses, strict=True))
    steps = [each - loss for each in losses]
    slopes = [abs(each - loss) / max(d, 1e-3) for d, each in pairs]
    jumps = [b - a for (_, a), (_, b) in pairwise(pairs)]
    return [
        loss, fmean(losses), max(losses), min(losses), pvariance(losses), pstdev(losses), pvariance(steps),
        fmean(slopes), max(slopes), pvariance(slopes), pstdev(jumps) if jumps else 0.0,
        fmean([2 * (each - loss) / max(d, 1e-3) ** 2 for d, each in pairs]), fmean(steps), max(steps), min(steps),
    ]  # fmt: skip
