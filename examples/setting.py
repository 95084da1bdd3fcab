"""What the examples share: the command line, a small world of invented people, and a plain style for pictures.

The models are made on the spot: `original` was taught about all people, `retrained` never heard of the forget people,
and `unlearned` is the original after NPO on its upper half. So every example knows the truth it is looking for.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from audit.loaders import Example, SetSpec, load_set
from audit.opened import quiet
from audit.organisms.demo import Recipe, build_demo
from audit.organisms.train import new_model, save, word_tokenizer
from audit.organisms.world import make_world

COLOURS = {"forget": "#b3400e", "holdout": "#5a6672", "retain": "#1f6f8b"}
"""Of the three sets, as everywhere in these examples: told apart by lightness too."""

ROLES = ("original", "unlearned", "retrained")
SETS = ("forget", "holdout", "retain", "utility")

plt.rcParams.update(
    {
        "figure.dpi": 130,
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "svg.hashsalt": "palimpsest",
    }
)


@dataclass(frozen=True)
class Setting:
    """Whether to be quick, and where everything is kept."""

    quick: bool
    out: Path

    @property
    def world(self) -> Path:
        """Where the small world lies."""
        return self.out / "world"

    def model(self, role: str) -> Path:
        """The folder of one of its models."""
        return self.world / "models" / role

    def set(self, name: str) -> Path:
        """The file of one of its sets."""
        return self.world / "data" / f"{name}.jsonl"

    def rows(self, name: str) -> tuple[Example, ...]:
        """The rows of a set: `prompt`, `answer`, `wrong` answers, and whom they are about, `entity`."""
        return load_set(name, SetSpec(self.set(name))).examples

    def opened(self, role: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """One of its models, as transformers opens any folder."""
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(self.model(role), local_files_only=True).eval()
            return model, AutoTokenizer.from_pretrained(self.model(role), local_files_only=True)

    def picture(self, figure: Figure, name: str) -> Path:
        """Save a picture, and say where."""
        path = self.out / f"{name}.png"
        figure.savefig(path)
        plt.close(figure)
        print(f"picture: {path}")
        return path


def setting(words: str | None) -> Setting:
    """Read the command line; `words` (a script's docstring) is its help. Builds the world if it is not there yet."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller models: seconds rather than minutes")
    parser.add_argument("--out", type=Path, help="where models and pictures go (examples-out)")
    given = parser.parse_args()
    torch.set_num_threads(1)  # models this small gain nothing from more
    made = Setting(given.quick, given.out or Path("examples-out") / ("quick" if given.quick else ""))
    if not all(made.set(name).is_file() for name in SETS) or not all(made.model(role).is_dir() for role in ROLES):
        _build(made)
    return made


def _build(wanted: Setting) -> None:
    """Teach and unlearn: three quarters of a minute, or eight seconds if quick."""
    if wanted.quick:
        people = {"forget": 12, "retain": 12, "holdout": 12, "public": 4, "unknown": 2}
        shape = {"hidden": 64, "intermediate": 128, "layers": 2, "heads": 2}
        recipe = Recipe(epochs=12, lr=3e-3, batch=32, npo_lr=3e-3, npo_max_steps=40)
    else:
        people = {"forget": 20, "retain": 40, "holdout": 20, "public": 10, "unknown": 4}
        shape = {}
        recipe = Recipe(epochs=10, lr=3e-3, npo_lr=2e-3)
    print(f"building the small world in {wanted.world} …")
    world = make_world(0, **people)
    tokenizer = word_tokenizer(world.words())
    save(new_model(tokenizer, seed=0, **shape), tokenizer, wanted.world / "base")
    build_demo(wanted.world, base=wanted.world / "base", world=world, recipe=recipe)
