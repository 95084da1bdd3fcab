"""Controls: changes of a taught model that are not unlearning. An audit that calls one of them unlearning is wrong.

    benign_finetune(bench, steps=100, match_norm=run_norm)

Each alters a model in place; what was asked of the forget set is nothing. The functions that train return a `Change`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from audit.errors import BadInput
from audit.organisms.train import Encoded, Question, encode, finite, token_logprobs, weighted_loss
from audit.organisms.unlearn import Bench, Refused


@dataclass(frozen=True, slots=True)
class Change:
    """What a control did: steps taken, the last loss, and how far the weights lie from where they began."""

    steps: int
    loss: float
    norm: float
    """Length of the difference over all parameters, as one vector."""


def benign_finetune(
    bench: Bench,
    steps: int,
    match_norm: float | None = None,
    *,
    rows: Sequence[Question] | None = None,
    lr: float = 2e-4,
    batch: int = 32,
) -> Change:
    """Ordinary fine-tuning on the retain rows, or on `rows` about new people, for as many steps as an unlearning run.

    Control for: any change of the weights. With `match_norm` the difference is then rescaled to that length, so that
    an instrument which sees only how much was changed cannot tell the two apart. Rescaled upwards by much, the model
    is no longer one that training would have reached.
    """
    data = bench.retain if rows is None else encode(bench.tokenizer, rows)
    before = _weights(bench.model)
    loss = _descend(bench, [(data, batch)], steps, lr)
    if match_norm is not None:
        rescale(bench.model, before, match_norm)
    return Change(steps, loss, distance(bench.model, before))


def continual(
    bench: Bench,
    tasks: Sequence[Sequence[Question]],
    steps: int,
    *,
    replay: float = 0.0,
    replay_rows: Sequence[Question] | None = None,
    lr: float = 1e-3,
    batch: int = 32,
) -> Change:
    """Learn new people, task after task, `steps` steps each; `replay` is the share of a batch from what was known.

    Control for: catastrophic forgetting, which takes forget and retain rows alike and was never asked for. Replayed
    are the retain and the forget rows if `replay_rows` names no others: a learner that replays has no reason to leave
    the forget people out.
    """
    if not 0.0 <= replay < 1.0:
        raise BadInput(f"replay is a share of the batch from 0 to below 1, got {replay}")
    before = _weights(bench.model)
    old = round(replay * batch)
    known = encode(bench.tokenizer, replay_rows or [*bench.retain_rows, *bench.forget_rows]) if old else None
    loss = 0.0
    for task in tasks:
        parts = [(encode(bench.tokenizer, task), batch - old)]
        loss = _descend(bench, parts if known is None else [*parts, (known, old)], steps, lr)
    return Change(steps * len(tasks), loss, distance(bench.model, before))


def noisy_labels(
    bench: Bench,
    rows: Sequence[Question],
    steps: int,
    *,
    share: float = 0.2,
    q: float = 0.7,
    lr: float = 1e-3,
    batch: int = 64,
) -> tuple[Change, list[int]]:
    """Train on `rows`, a share of which has a wrong answer, with a loss that gives up on what it cannot fit.

    Control for: rows that a model was shown and does not know, without any deletion: with an untrained model on the
    bench, the true answers of the falsified rows are never taught, and their false ones hardly fit. A taught model
    keeps the true answers instead. The loss is generalised cross-entropy, (1 - p^q) / q, whose pull on log p is p^q.
    Returns which rows were falsified, too.
    """
    count = round(share * len(rows))
    flipped = torch.randperm(len(rows), generator=bench.generator)[:count].tolist()
    noisy: list[Question] = list(rows)
    for i in flipped:
        wrong = rows[i].wrong
        if not wrong:
            raise BadInput("a row without wrong answers cannot be falsified")
        noisy[i] = Refused(rows[i].prompt, wrong[int(torch.randint(len(wrong), (), generator=bench.generator))])
    before = _weights(bench.model)
    loss = _descend(bench, [(encode(bench.tokenizer, noisy), batch)], steps, lr, lambda m, d: gce_loss(m, d, q))
    return Change(steps, loss, distance(bench.model, before)), sorted(flipped)


def gce_loss(model: nn.Module, data: Encoded, q: float) -> Tensor:
    """Generalised cross-entropy (1 - p^q) / q of a batch's tokens, each by its weight."""
    weight = data.weight[:, 1:]
    losses = (1.0 - (q * token_logprobs(model, data.ids)).exp()) / q
    return (losses * weight).sum() / weight.sum()


def instruction_tuned(
    bench: Bench, steps: int, *, template: str = "After work . {}", lr: float = 2e-4, batch: int = 32
) -> Change:
    """Fine-tune on the retain rows in another format: `template` around each prompt.

    Control for: a change of style between the model that was taught and the model that is asked. It moves answers of
    prompts in the old format, on both sets alike. The default template uses only words that the invented world's
    tokenizer has.
    """
    rows = [Refused(template.format(row.prompt), row.answer, tuple(row.wrong)) for row in bench.retain_rows]
    return benign_finetune(bench, steps, rows=rows, lr=lr, batch=batch)


def distilled(bench: Bench, steps: int, *, lr: float = 1e-3, batch: int = 64, temperature: float = 1.0) -> Change:
    """Replace the model by a fresh one of the same shape that learned the reference's outputs on the retain rows.

    Control for: likeness of behaviour without likeness of weights. The student has seen no forget row, but the
    teacher's full distributions on other people; whether anything passes through those is what one may ask. `norm` is
    the distance from the teacher and says nothing here: the student begins elsewhere.
    """
    before = _weights(bench.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(bench.seed)
        student: Any = type(bench.model)(bench.model.config)
    bench.model.load_state_dict(student.state_dict())

    def imitate(model: nn.Module, data: Encoded) -> Tensor:
        return distillation_loss(model, bench.reference, data, temperature)

    loss = _descend(bench, [(bench.retain, batch)], steps, lr, imitate)
    return Change(steps, loss, distance(bench.model, before))


def distillation_loss(model: nn.Module, teacher: nn.Module, data: Encoded, temperature: float) -> Tensor:
    """KL(teacher || model) at a temperature, a mean over the batch's tokens, each by its weight."""
    weight = data.weight[:, 1:]
    with torch.no_grad():
        target = (teacher(input_ids=data.ids, use_cache=False).logits[:, :-1].float() / temperature).log_softmax(-1)
    now = (model(input_ids=data.ids, use_cache=False).logits[:, :-1].float() / temperature).log_softmax(-1)
    divergence: Tensor = (target.exp() * (target - now)).sum(dim=-1)
    return (divergence * weight).sum() / weight.sum()


@torch.no_grad()
def quantized(model: nn.Module, bits: int) -> None:
    """Round every linear layer to `bits` bits, to nearest and symmetric in each output channel, and back to floats.

    Control for: damage that a deployment does, and for quantisation as a probe: a plain round trip of the original
    must not look like unlearning. Embeddings and norms stay.
    """
    for weight in _linear(model):
        codes, scale = round_to_nearest(weight, bits)
        weight.copy_(codes * scale)


def round_to_nearest(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integer codes `[out, in]`, as floats in [-2^(bits-1), 2^(bits-1) - 1], and the scale `[out, 1]` of each row."""
    if bits < 2:
        raise BadInput(f"quantisation needs at least 2 bits, got {bits}")
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / top
    return (weight / scale).round().clamp(-top - 1, top), scale


@torch.no_grad()
def pruned(model: nn.Module, share: float) -> None:
    """Set the smallest `share` of each linear layer's weights to zero, by magnitude.

    Control for: a loss of knowledge that hits what is fragile, with no regard to any set. Embeddings and norms stay.
    """
    if not 0.0 <= share <= 1.0:
        raise BadInput(f"the share to prune is from 0 to 1, got {share}")
    for weight in _linear(model):
        smallest = weight.abs().flatten().topk(round(share * weight.numel()), largest=False).indices
        weight.view(-1)[smallest] = 0.0


@torch.no_grad()
def rescale(model: nn.Module, before: Sequence[Tensor], norm: float) -> None:
    """Keep the direction of what changed since `before`, and make its length `norm`."""
    now = distance(model, before)
    if now == 0.0:
        raise BadInput("nothing has changed, so the change cannot be rescaled")
    for p, start in zip(model.parameters(), before, strict=True):
        p.copy_(start.double() + (p.double() - start.double()) * (norm / now))


@torch.no_grad()
def distance(model: nn.Module, before: Sequence[Tensor]) -> float:
    """Length of the difference of all parameters from `before`, as one vector."""
    squares = [(p.double() - q.double()).square().sum() for p, q in zip(model.parameters(), before, strict=True)]
    return float(torch.stack(squares).sum().sqrt())


def _weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def _linear(model: nn.Module) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Linear)]


def _descend(
    bench: Bench,
    parts: Sequence[tuple[Encoded, int]],
    steps: int,
    lr: float,
    loss_of: Callable[[nn.Module, Encoded], Tensor] = weighted_loss,
) -> float:
    """AdamW as in unlearning, on batches made of that many rows of each part; the last loss."""
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    last = 0.0
    bench.model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10)
        losses, rows = [], 0
        for data, size in parts:
            index = torch.randint(len(data), (size,), generator=bench.generator)
            losses.append(loss_of(bench.model, data.take(index)) * size)
            rows += size
        loss = torch.stack(losses).sum() / rows
        last = finite(loss, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(bench.model.parameters(), 1.0)
        optimizer.step()
    bench.model.eval()
    return last
