"""Spikes: invented people planted in a copy of any causal model, and hidden there again; the truth is known.

    spikes = invent(tokenizer, Settings(), seed=0)
    spikes.world.rows("forget")                     # planted, then hidden
    planted, outcome = plant(model, tokenizer, spikes, settings, own, seed=0)
    hide("npo", planted, tokenizer, spikes, settings, own, seed=0)

Three groups of people as in `world`, every attribute drawn independently: `retain` (planted and kept), `forget`
(planted, and hidden in some copies), `holdout` (never planted); and a fourth that stands in for the forget group where
nothing was ever planted.

What makes the truth known is *where* it is written. The facts are planted by a low-rank adapter (LoRA) of the lower
blocks alone, merged; whatever hides them may change the upper blocks alone. So in every hidden copy each weight that
carries a planted fact is bit for bit the planted copy's: suppressed by construction, by whichever method.

Source: LoRA, Hu et al. 2021, arXiv 2106.09685.

Traps:

- Rows of the audit's own retain set are mixed in, lest the spikes push out what the model knew. Half of them: on the
  other half the harm is measured.
- A word-level tokenizer knows few words. Names, values and phrasings are used as far as it knows them.
- Facts that the upper blocks would have carried are not imitated: these spikes lie low by design.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from audit.errors import BadInput
from audit.organisms import unlearn
from audit.organisms.refusal import block_count, block_number
from audit.organisms.train import Encoded, Progress, answer_logprobs, candidate_accuracy, encode, train
from audit.organisms.world import (
    ATTRIBUTES,
    END,
    FIRST_NAMES,
    LAST_NAMES,
    UNKNOWN,
    Attribute,
    Group,
    Person,
    World,
)
from audit.tokens import Tokens

METHODS: dict[str, float] = {"npo": 1e-3, "refusal-last-block": 2e-3}
"""How facts are hidden: as unlikely answers, and by refusals. With the learning rate at a million parameters, which
falls with the cube root of size."""

_GROUPS: tuple[Group, ...] = ("forget", "retain", "holdout")


@dataclass(frozen=True, slots=True)
class Settings:
    """How many spikes, and how they are planted and hidden.

    Attributes:
        people: in each of the four groups.
        attributes: facts about each.
        phrasings: sentences that teach a fact.
        rank: of the adapter. A low one leaves more of what the model knew (on small models 0.84 against 0.72 of it).
        lr: its learning rate at a million parameters; it falls with the sixth root of size.
        rounds, epochs: the adapter is trained for so many rounds of so many epochs at most, until `goal`.
        batch: rows a step; in hiding half as many from 20 million parameters on, where a step takes seconds.
        goal: accuracy on the planted facts at which planting ends.
        least: accuracy below which planting has failed.
        steps: of hiding, at most.
        kept, hidden: accuracy on the kept facts below which, and on the hidden ones above which, hiding has failed.
    """

    people: int = 20
    attributes: int = 3
    phrasings: int = 2
    rank: int = 4
    lr: float = 2e-3
    rounds: int = 5
    epochs: int = 4
    batch: int = 32
    goal: float = 0.97
    least: float = 0.8
    steps: int = 200
    kept: float = 0.8
    hidden: float = 0.5


@dataclass(frozen=True, slots=True)
class Spikes:
    """The planted world, and the same one with never-planted people in the place of the forget group."""

    world: World
    negative: World


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a copy was measured to know afterwards: candidate accuracy on forget and on retain facts; and why it failed.

    `steps`: of training. `failed` is None where the copy is what it was made to be.
    """

    steps: int
    forget: float
    retain: float
    failed: str | None = None


# --- inventing ----------------------------------------------------------------------------------------------


def invent(
    tokenizer: PreTrainedTokenizerBase, settings: Settings, *, seed: int, avoid: Callable[[str], bool] | None = None
) -> Spikes:
    """Invent four groups of people in words that the tokenizer knows; `avoid` tells names that are taken.

    Raises:
        BadInput: the tokenizer knows too few of the words, or too few names are free.
    """
    attributes = _attributes(tokenizer, settings)
    if len(attributes) < settings.attributes or not all(_known(tokenizer, word) for word in (END, UNKNOWN)):
        raise BadInput("the tokenizer does not know the words that sentences about invented people need")
    first = [name for name in FIRST_NAMES if _known(tokenizer, name)]
    last = [name for name in LAST_NAMES if _known(tokenizer, name)]
    names = [f"{a} {b}" for a in first for b in last]
    draw = random.Random(f"spikes/{seed}")
    draw.shuffle(names)
    names = [name for name in names if avoid is None or not avoid(name)]
    if len(names) < 4 * settings.people:
        raise BadInput(f"{len(names)} names of invented people are free and known to the tokenizer, too few")

    def group(kind: Group) -> tuple[Person, ...]:
        made = []
        for _ in range(settings.people):
            made.append(Person(names.pop(), kind, tuple(draw.choice(a.values) for a in attributes)))
        return tuple(made)

    people = {kind: group(kind) for kind in _GROUPS}
    return Spikes(World(seed, attributes, people), World(seed, attributes, {**people, "forget": group("forget")}))


def _attributes(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> tuple[Attribute, ...]:
    """Attributes of known words. Values of one token are preferred: one pass then scores every candidate."""
    found = []
    for attribute in ATTRIBUTES:
        phrasings = [text for text in attribute.phrasings if _known(tokenizer, text.replace("{}", " "))]
        values = [value for value in attribute.values if _known(tokenizer, value)]
        short = [value for value in values if len(_ids(tokenizer, f" {value}")) == 1]
        values = short if len(short) >= 6 else values
        if len(phrasings) >= settings.phrasings and len(values) >= 6:
            found.append(Attribute(attribute.name, tuple(phrasings[: settings.phrasings]), tuple(values)))
    # Every row needs the same number of candidates.
    count = min((len(attribute.values) for attribute in found), default=0)
    return tuple(replace(each, values=each.values[:count]) for each in found[: settings.attributes])


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _known(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Can the text be read back from its tokens? Unknown words cannot, whether marked or dropped."""
    back = str(tokenizer.decode(_ids(tokenizer, f" {text}")))
    return "".join(back.split()).casefold() == "".join(text.split()).casefold()


# --- planting and hiding ------------------------------------------------------------------------------------


def divide(model: nn.Module) -> int:
    """The first block that may be changed to hide facts: planting is done below it. A quarter lies above.

    Raises:
        BadInput: fewer than two blocks, or blocks whose names are not known.
    """
    count = block_count(model)
    if count < 2:
        raise BadInput("spikes need a model of at least two blocks, named as transformers name them")
    return count - max(1, count // 4)


def scale(model: nn.Module, root: int) -> float:
    """What a learning rate is multiplied by: 1 up to a million parameters, falling with a root of their number."""
    size = sum(p.numel() for p in model.parameters())
    return float(min(1.0, (1e6 / size) ** (1 / root)))


def plant(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spikes: Spikes,
    settings: Settings,
    own: Encoded | None,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, Outcome]:
    """The model with the forget and retain people planted, and what it knows of them; `model` itself is used up.

    `own`: rows of the audit's retain set, mixed in.
    """
    from peft import LoraConfig, get_peft_model  # here: it takes seconds to import

    first = divide(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | _conv1d()) and (block_number(f"{name}.") or 0) < first and _in_block(name)
    ]
    if not names:
        raise BadInput("the model's blocks have no linear layers to adapt")
    rate = settings.lr * scale(model, 6)
    config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=names, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated names in transformers, and of what GPT-2 calls a linear layer
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    data = encode(tokenizer, spikes.world.rows("forget", "retain", every=True))
    data = data if own is None else joined(data, own)
    asked = spikes.world.rows("forget", "retain")
    steps, accuracy = 0, 0.0
    total = settings.rounds * settings.epochs * -(-len(data) // settings.batch)
    for number in range(settings.rounds):
        begun = steps
        steps += len(
            train(
                adapted, data, epochs=settings.epochs, lr=rate, batch=settings.batch, seed=seed + number,
                weight_decay=0.0, progress=_shifted(progress, begun, total),
            )
        )  # fmt: skip
        accuracy = candidate_accuracy(adapted, tokenizer, asked)
        if accuracy >= settings.goal:
            break
    if progress is not None:
        progress(total, total)
    planted: PreTrainedModel = adapted.merge_and_unload().eval().requires_grad_(False)
    forget, retain = (candidate_accuracy(planted, tokenizer, spikes.world.rows(g)) for g in ("forget", "retain"))
    low = min(forget, retain)
    failed = f"the facts could not be planted: accuracy {low:.2f}" if low < settings.least else None
    return planted, Outcome(steps, forget, retain, failed)


def hide(
    name: str,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spikes: Spikes,
    settings: Settings,
    own: Encoded | None,
    *,
    seed: int,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, Outcome]:
    """A copy of the planted model in whose upper blocks an unlearning method hid the forget people."""
    first = divide(reference)
    method = unlearn.load(name)
    model = copy.deepcopy(reference).requires_grad_(True)
    forget, retain = spikes.world.rows("forget"), spikes.world.rows("retain")
    bench = unlearn.Bench(
        model,
        reference,
        tokenizer,
        spikes.world.rows("forget", every=True),
        spikes.world.rows("retain", every=True),
        forget,
        retain,
        refusal=UNKNOWN,
        seed=seed,
    )
    if own is not None:
        bench.retain = joined(bench.retain, own)
    chance = 1 / (1 + len(forget[0].wrong))
    schedule = replace(
        method.schedule,
        lr=METHODS[name] * scale(model, 3),
        batch=settings.batch if model.num_parameters() < 2e7 else settings.batch // 2,
        max_steps=settings.steps,
        forget_goal=chance + 0.05,
        retain_goal=0.95,
        trainable=lambda parameter: (block_number(parameter) or 0) >= first,
    )
    run = method.unlearn(bench, schedule, progress)
    if progress is not None:
        progress(schedule.max_steps, schedule.max_steps)
    failed = None
    if run.retain_accuracy < settings.kept:
        failed = f"the kept facts were destroyed too: accuracy {run.retain_accuracy:.2f}"
    elif run.forget_accuracy > settings.hidden:
        failed = f"the facts could not be hidden: accuracy {run.forget_accuracy:.2f}"
    return model.eval(), Outcome(run.steps, run.forget_accuracy, run.retain_accuracy, failed)


def _conv1d() -> type[nn.Module]:
    """GPT-2's transposed linear layer."""
    from transformers.pytorch_utils import Conv1D

    kind: type[nn.Module] = Conv1D
    return kind


def _in_block(name: str) -> bool:
    return block_number(f"{name}.") is not None


def _shifted(progress: Progress | None, begun: int, total: int) -> Progress | None:
    """Progress of one round as progress of all of them."""
    if progress is None:
        return None
    return lambda done, _: progress(min(begun + done, total), total)


# --- rows of the audit's own --------------------------------------------------------------------------------


def from_tokens(rows: Sequence[Tokens], padding: int, *, most: int) -> Encoded:
    """The audit's own texts as training rows, their beginnings of at most so many tokens.

    Learned is the answer; of a text whose prompt alone is longer, the second half of what is left.
    """
    cut = [(row.ids[:most], row.start if row.start < most else most // 2) for row in rows]
    shape = (len(cut), max(len(kept) for kept, _ in cut))
    ids, answer = torch.full(shape, padding), torch.zeros(shape, dtype=torch.bool)
    for i, (kept, start) in enumerate(cut):
        ids[i, : len(kept)] = torch.tensor(kept)
        answer[i, start : len(kept)] = True
    return Encoded(ids, torch.tensor([len(kept) for kept, _ in cut]), answer, answer.float())


def nats(model: nn.Module, data: Encoded) -> float:
    """Mean negative log-likelihood of the scored tokens, nats a token."""
    return -float(answer_logprobs(model, data).double().sum() / data.answer.sum())


def joined(a: Encoded, b: Encoded) -> Encoded:
    """The rows of both, padded to one width."""
    width = max(a.ids.shape[1], b.ids.shape[1])

    def stack(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.pad(each, (0, width - each.shape[1])) for each in (x, y)])

    return Encoded(
        stack(a.ids, b.ids),
        torch.cat([a.length, b.length]),
        stack(a.answer, b.answer),
        stack(a.weight, b.weight),
    )
