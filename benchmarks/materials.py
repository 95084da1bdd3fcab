"""What is measured on: the demo's three models, stories260k, a large random model, and question-answer texts.

Everything made lies in the work folder and is made once. Data and stories260k come from `../shared` where that
exists; elsewhere the demo's world and original take their place, and the lines say so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from audit.case import Case, Options
from audit.loaders import Example, SetSpec, load_set, parse_set_spec
from audit.target import Target
from audit.tokens import Tokens

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models" / "stories260k"
TOFU = SHARED / "data" / "tofu"
PASSAGES = SHARED / "data" / "text" / "austen_prideprejudice.txt"


def demo_folder(work: Path) -> Path:
    """The demo's models and sets, built as `audit demo` builds them."""
    folder = work / "demo"
    if not (folder / "complete").is_file():
        from audit.organisms.demo import build_demo

        _say("building the demo's models, about a minute")
        build_demo(folder)
        (folder / "complete").touch()
    return folder


def demo_case(work: Path, budget: str = "standard", only: str = "") -> Case:
    """The case that `audit demo` scans, by the instruments named in `only`, or by all."""
    folder = demo_folder(work)
    models = {"target": "unlearned", "original": "original", "retrained": "retrained"}
    sets = {name: SetSpec(folder / "data" / f"{name}.jsonl") for name in ("forget", "retain", "holdout", "utility")}
    return Case.build(
        {role: folder / "models" / name for role, name in models.items()},
        sets,
        Options.parse({"budget": budget, "template": "plain", "only": only}, "benchmarks"),
        "demo",
    )


def tofu_case(model: Path) -> Case:
    """TOFU's forget set, and stand-ins for the others from its retain set, asked of any model."""
    specs = {
        "forget": f"{TOFU}/full.jsonl?split=forget01",
        "retain": f"{TOFU}/full.jsonl?split=retain90&limit=40",
        "holdout": f"{TOFU}/full.jsonl?split=retain90&offset=40&limit=40",
    }
    return Case.build({"target": model}, {n: parse_set_spec(s) for n, s in specs.items()}, Options(), "TOFU")


def small_case(model: Path, work: Path, rows: int, skip: tuple[str, ...]) -> Case:
    """A few rows of the demo's sets, asked of any model, at the quick budget."""
    sets = {
        name: SetSpec(demo_folder(work) / "data" / f"{name}.jsonl", limit=rows)
        for name in ("forget", "retain", "holdout")
    }
    options = {"budget": "quick", "template": "plain", "skip": skip}
    return Case.build({"target": model}, sets, Options.parse(options, "benchmarks"), "few rows")


def open_target(folder: Path) -> Target:
    """A model folder as a scan opens it, weights loaded."""
    from audit.inventory import take_inventory

    target = Target("target", take_inventory(folder), template="auto" if folder == STORIES else "plain")
    assert target.model is not None
    return target


def subjects(work: Path, small: bool) -> list[tuple[str, Target, tuple[Example, ...]]]:
    """(name, opened model, examples): stories260k with TOFU texts, if at hand, and the demo's original with its own."""
    found = []
    if STORIES.is_dir() and TOFU.is_dir():
        spec = parse_set_spec(f"{TOFU}/forget10_perturbed.jsonl?limit={20 if small else 200}")
        found.append(("stories260k, TOFU", open_target(STORIES), load_set("forget", spec).examples))
    case = demo_case(work)
    found.append(("demo original", open_target(case.models["original"]), case.rows("forget", 40 if small else None)))
    return found


def answers(target: Target, examples: tuple[Example, ...]) -> tuple[Tokens, ...]:
    """Right answers, one sequence an example, all distinct."""
    return tuple(dict.fromkeys(target.encode(e.prompt, e.answer) for e in examples))


def answers_and_options(target: Target, examples: tuple[Example, ...]) -> tuple[Tokens, ...]:
    """Right and wrong answers: what multiple choice and the truth ratio ask for, a prompt several times."""
    return tuple(dict.fromkeys(target.encode(e.prompt, text) for e in examples for text in (e.answer, *e.wrong)))


def passages(count: int) -> tuple[Example, ...]:
    """So many runs of a hundred words of a novel; there are 1,215."""
    return load_set("forget", SetSpec(PASSAGES, limit=count)).examples


def large_random(work: Path) -> Path:
    """A Llama of SmolLM2-135M's shape (538 MB in float32) with random weights and the demo's words."""
    folder = work / "smollm2-shape"
    if not (folder / "complete").is_file():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from audit.organisms.train import save, word_tokenizer
        from audit.organisms.world import make_world

        _say("writing a random model of SmolLM2-135M's shape")
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        save(LlamaForCausalLM(config), word_tokenizer(make_world().words()), folder)
        (folder / "complete").touch()
    return folder


def child(action: str, **options: Any) -> dict[str, Any]:
    """Run `benchmarks.child` in a fresh process and return what it measured."""
    command = [sys.executable, "-m", "benchmarks.child", action, json.dumps(options, default=str)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{action} failed:\n{done.stderr[-4000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _say(text: str) -> None:
    print(text, "…", file=sys.stderr, flush=True)
