"""A complete case of known history in about a minute: a world, three models, four sets.

    case = build_demo(Path("audit-demo"))

writes `models/original` (taught everything), `models/retrained` (taught the same without the forget people,
so it never knew them) and `models/unlearned` (the original after NPO) as ordinary Hugging Face folders, and
`data/forget.jsonl`, `retain.jsonl`, `holdout.jsonl`, `utility.jsonl` in the columns of TOFU.

The retrained model starts from the same initial weights as the original, as both would from one pretrained
base, and sees its rows in another order for the same number of epochs: it differs by the forget set and by
order, so by fewer steps too.

The unlearned model is the original after NPO on its upper half: embeddings and lower layers are bit for bit
the original's, which is a fact of its making. That it hides rather than deletes is not: NPO has no ground
truth. Its settings were chosen on seeds 0 and 1 so that relearning still finds the knowledge, so these models
show what an audit looks like and must not calibrate one.

With `base` (a folder with a pretrained causal model) all three are that model, fully fine-tuned, with its own
tokenizer; answers then are several tokens long, and the world is smaller. The unlearning was not tuned there:
in the one trial it overshot (forget accuracy below chance) and relearning did not bring the knowledge back.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from audit.opened import quiet
from audit.organisms.datasets import Dealt
from audit.organisms.methods.npo import Npo
from audit.organisms.train import (
    Question,
    answer_nll,
    candidate_accuracy,
    encode,
    new_model,
    save,
    train,
    word_tokenizer,
)
from audit.organisms.unlearn import Bench, Schedule
from audit.organisms.world import Row, World, make_world

StageProgress = Callable[[str, int, int], None]
"""Called with the stage, the steps done and the steps in all."""

ROLES = ("original", "retrained", "unlearned")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the demo's models are trained and unlearned."""

    epochs: int = 8
    lr: float = 1.4e-3
    batch: int = 64
    npo_lr: float = 1e-3
    npo_layers: float = 0.5
    """The share of the layers, from the top, that NPO may change, with the final norm and an untied head."""
    npo_beta: float = 0.1
    npo_retain_weight: float = 4.0
    npo_batch: int = 32
    npo_max_steps: int = 400
    npo_check_every: int = 5
    forget_goal: float = 0.14
    retain_goal: float = 0.96


FROM_SCRATCH = Recipe()
FROM_BASE = Recipe(epochs=15, lr=3e-3, npo_max_steps=300, retain_goal=0.95)
FROM_BASE_SIZES = {"forget": 20, "retain": 30, "holdout": 20, "public": 20, "unknown": 2}
"""A smaller world: names cut into pieces make sentences three times as long, and slower to learn."""


@dataclass(frozen=True, slots=True)
class DemoCase:
    """Where a demo lies, and what its models were measured to know when they were made."""

    folder: Path
    models: Mapping[str, Path]
    sets: Mapping[str, Path]
    measured: Mapping[str, Mapping[str, float]]
    """Per model: `<set>_accuracy` (of ten candidates, chance 0.10) and `<set>_nll` (nats per answer)."""
    seconds: Mapping[str, float]
    """Wall time per stage."""


def demo_sets(world: World | Dealt) -> dict[str, list[Row]]:
    """Choose the sets of an audit: at most 40 people each, 20 for utility, and one phrasing per fact."""
    return {
        "forget": world.rows("forget"),
        "retain": world.rows("retain", people=40),
        "holdout": world.rows("holdout"),
        "utility": world.rows("public", people=20),
    }


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row.as_json(), ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Sequence[Question]]
) -> dict[str, float]:
    """Candidate accuracy and answer loss of one model on every set."""
    measured = {}
    for name, rows in sets.items():
        measured[f"{name}_accuracy"] = candidate_accuracy(model, tokenizer, rows)
        measured[f"{name}_nll"] = answer_nll(model, tokenizer, rows)
    return measured


def build_demo(
    out: Path,
    *,
    seed: int = 0,
    base: Path | None = None,
    recipe: Recipe | None = None,
    world: World | None = None,
    progress: StageProgress | None = None,
) -> DemoCase:
    """Make the world, the three models and the sets under `out`, and return where everything lies.

    The same seed gives the same world and data, and on the same machine the same weights.
    """
    recipe = recipe or (FROM_SCRATCH if base is None else FROM_BASE)
    world = world or make_world(seed, **({} if base is None else FROM_BASE_SIZES))
    sets = demo_sets(world)
    paths = {name: write_jsonl(out / "data" / f"{name}.jsonl", rows) for name, rows in sets.items()}
    folders = {role: out / "models" / role for role in ROLES}
    forget = world.rows("forget", every=True)
    kept = world.rows("retain", "public", "unknown", every=True)
    tokenizer, start = _start(world, seed, base)
    seconds: dict[str, float] = {}
    measured: dict[str, Mapping[str, float]] = {}
    common = {
        "schema": "palimpsest/organism/1",
        "seed": seed,
        "parameters": sum(p.numel() for p in start.parameters()),
        "initial_weights": f"random, seed {seed}" if base is None else f"pretrained, {base.name}",
        "forget_set": {"rows": len(sets["forget"]), "sha256": _digest(paths["forget"])},
        "recipe": asdict(recipe),
    }

    def taught(role: str, rows: Sequence[Row], order: int) -> PreTrainedModel:
        began = time.perf_counter()
        model = copy.deepcopy(start)
        data = encode(tokenizer, rows)
        losses = train(
            model,
            data,
            epochs=recipe.epochs,
            lr=recipe.lr,
            batch=recipe.batch,
            seed=order,
            progress=_stage(progress, role),
        )
        measured[role] = measure(model, tokenizer, sets)
        seconds[role] = time.perf_counter() - began
        history = {
            **common,
            "role": role,
            "label": "taught" if role == "original" else "never-taught",
            "method": "full training" if base is None else "full fine-tuning",
            "order_seed": order,
            "steps": len(losses),
            "exposures_per_forget_fact": recipe.epochs * 3 if role == "original" else 0,
            "measured": measured[role],
        }
        save(model, tokenizer, folders[role], history)
        return model

    original = taught("original", forget + kept, 1000 * seed + 1)
    taught("retrained", kept, 1000 * seed + 2)

    began = time.perf_counter()
    changes = _upper(original, recipe.npo_layers)
    unlearned = copy.deepcopy(original)
    bench = Bench(unlearned, original, tokenizer, forget, kept, sets["forget"], sets["retain"], seed=1000 * seed + 3)
    schedule = Schedule(
        lr=recipe.npo_lr,
        batch=recipe.npo_batch,
        max_steps=recipe.npo_max_steps,
        check_every=recipe.npo_check_every,
        forget_goal=recipe.forget_goal,
        retain_goal=recipe.retain_goal,
        trainable=changes,
    )
    method = Npo(beta=recipe.npo_beta, retain_weight=recipe.npo_retain_weight)
    run = method.unlearn(bench, schedule, _stage(progress, "unlearned"))
    measured["unlearned"] = measure(unlearned, tokenizer, sets)
    seconds["unlearned"] = time.perf_counter() - began
    history = {
        **common,
        "role": "unlearned",
        # An approximate method has no ground truth beyond its own name.
        "label": "approximately-unlearned",
        "method": "NPO, sequence form, with retain loss, upper layers only",
        "unchanged": [name for name, _ in original.named_parameters() if not changes(name)],
        "parent": {
            "role": "original",
            "sha256": _digest(folders["original"] / "model.safetensors"),
        },
        "order_seed": 1000 * seed + 3,
        "steps": run.steps,
        "stopped": "both goals met" if run.stopped else "step limit",
        "measured": measured["unlearned"],
    }
    save(unlearned, tokenizer, folders["unlearned"], history)
    return DemoCase(out, folders, paths, measured, seconds)


def _start(world: World, seed: int, base: Path | None) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if base is None:
        tokenizer = word_tokenizer(world.words())
        return tokenizer, new_model(tokenizer, seed=seed)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
        model = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, dtype="float32", **options)
    return tokenizer, model


def _upper(model: PreTrainedModel, share: float) -> Callable[[str], bool]:
    """Tell by name which parameters lie in the upper `share` of the layers or above them all.

    A tied head is the embedding too, which lies below everything, so it is left alone.
    """
    layers = int(model.config.num_hidden_layers)
    first = layers - max(1, round(share * layers))
    allowed = [f"model.layers.{i}." for i in range(first, layers)] + ["model.norm.", "lm_head."]
    return lambda name: name.startswith(tuple(allowed))


def _stage(progress: StageProgress | None, stage: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
