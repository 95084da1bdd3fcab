"""Recipes: built once, found again by digest, the same weights twice, and honest about what failed."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from audit.errors import BadInput
from audit.inventory import take_inventory
from audit.organisms import recipes
from audit.organisms.recipes import BASES, HISTORIES, Family, Recipe, build, histories, history_of, read_history
from audit.organisms.train import Diverged
from audit.organisms.unlearn import Method, names
from audit.organisms.world import make_world


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A world of a few people, taught in seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(
        recipes, "make_world", lambda seed: make_world(seed, forget=4, retain=6, holdout=4, public=4, unknown=1)
    )
    monkeypatch.setattr(recipes, "_EPOCHS", 2)
    monkeypatch.setattr(recipes, "_fault", lambda history, measured: None)
    yield
    torch.set_num_threads(threads)


def weights(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_every_history_says_what_it_is():
    assert len(names()) >= 20
    for name in histories():
        history = history_of(name)
        assert history.label in ("not-unlearned", "deleted", "suppressed", "unlearned")
        assert bool(history.taught) != bool(history.parent)
    assert history_of("retrained-then-refusal").label == "deleted"
    assert history_of("refusal-last-block").label == "suppressed"


@pytest.mark.parametrize("base", BASES)
def test_an_organism_is_a_model_folder_built_once_and_the_same_twice(base, tmp_path):
    first = build(Recipe(base, "original", 0), tmp_path / "a")
    second = build(Recipe(base, "original", 0), tmp_path / "b")
    assert weights(first) == weights(second)
    assert take_inventory(first).architecture in ("LlamaForCausalLM", "GPTNeoXForCausalLM")
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert build(Recipe(base, "original", 0), tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before


def test_a_descendant_builds_its_parent_and_names_it(tmp_path, monkeypatch):
    class Nothing(Method):
        name, reference = "nothing", "none"

        def unlearn(self, bench, schedule, progress=None):
            with torch.no_grad():
                next(iter(bench.model.parameters())).add_(1.0)
            return bench.finished(1)

    monkeypatch.setattr(recipes.unlearn, "load", lambda name: Nothing())
    folder = build(Recipe("llama", "npo", 3), tmp_path)
    told = read_history(folder)
    parent = tmp_path / "llama-original-3"
    assert told["parent"] == {"name": parent.name, "sha256": weights(parent)}
    assert weights(folder) != weights(parent)
    assert told["label"] == "unlearned" and told["broken"] is None


def test_a_diverged_organism_is_kept_and_marked(tmp_path, monkeypatch):
    class Explodes(Method):
        name, reference = "explodes", "none"

        def unlearn(self, bench, schedule, progress=None):
            raise Diverged("the loss is nan at step 3")

    monkeypatch.setattr(recipes.unlearn, "load", lambda name: Explodes())
    told = read_history(build(Recipe("llama", "ga", 0), tmp_path))
    assert told["broken"].startswith("diverged: the loss is nan")


def test_another_digest_is_built_anew(tmp_path):
    folder = build(Recipe("llama", "never-taught", 0), tmp_path)
    story = json.loads((folder / "organism.json").read_text())
    (folder / "organism.json").write_text(json.dumps(story | {"recipe_digest": "0" * 16}))
    build(Recipe("llama", "never-taught", 0), tmp_path)
    assert read_history(folder)["recipe_digest"] == Recipe("llama", "never-taught", 0).digest


def test_seeds_share_nothing_but_bases_share_the_world():
    assert Family("llama", 0).world == Family("gpt-neox", 0).world != Family("llama", 1).world
    digests = {Recipe(base, history, seed).digest for base in BASES for history in HISTORIES for seed in (0, 1)}
    assert len(digests) == len(BASES) * len(HISTORIES) * 2


def test_an_unknown_base_or_history_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no base named 'mamba'"):
        build(Recipe("mamba", "original", 0), tmp_path)
    with pytest.raises(BadInput, match="no unlearning method named 'hope'"):
        build(Recipe("llama", "hope", 0), tmp_path)


def test_faults_are_found(monkeypatch):
    monkeypatch.undo()
    good = {"retain_accuracy": 1.0, "forget_accuracy": 0.1}
    assert recipes._fault(history_of("npo"), good) is None
    assert "destroyed" in recipes._fault(history_of("ga"), good | {"retain_accuracy": 0.2})
    assert "nothing came of it" in recipes._fault(history_of("npo"), good | {"forget_accuracy": 0.9})
    assert "did not learn" in recipes._fault(HISTORIES["original"], {"retain_accuracy": 0.5, "forget_accuracy": 0.4})
