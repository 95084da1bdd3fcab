"""Recipes: built once, found again by digest, the same weights twice, and honest about what failed."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from audit.errors import BadInput
from audit.inventory import take_inventory
from audit.organisms import changes, families, recipes
from audit.organisms.changes import CHANGES, Ground
from audit.organisms.controls import round_to_nearest
from audit.organisms.datasets import deal
from audit.organisms.families import BASES, Family, Teaching, open_model
from audit.organisms.guards import read_guard
from audit.organisms.histories import AFTERWARDS, BY_CONSTRUCTION, HISTORIES, LABELS, histories, history_of
from audit.organisms.recipes import Recipe, build, read_history
from audit.organisms.train import Diverged
from audit.organisms.unlearn import Bench, Method, names
from audit.organisms.world import make_world


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A world of a few people, taught in seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = {"forget": 4, "retain": 6, "holdout": 4, "public": 4, "unknown": 1}
    monkeypatch.setattr(families, "make_world", lambda seed, **_: make_world(seed, **sizes))
    monkeypatch.setattr(families, "FROM_SCRATCH", Teaching(2, 1.4e-3, 64))
    monkeypatch.setattr(families, "FROM_BASE", Teaching(1, 1e-3, 64))
    monkeypatch.setattr(recipes, "_fault", lambda history, measured: None)
    yield
    torch.set_num_threads(threads)


def weights(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_every_history_says_what_it_is():
    assert len(names()) >= 20
    for name in histories():
        history = history_of(name)
        assert history.label in LABELS
        assert bool(history.taught) != bool(history.parent)
        made_by = (history.taught, history.method, history.change, history.guard, history.stated)
        assert sum(map(bool, made_by)) == 1
        assert not history.change or history.change in CHANGES
    assert set(BY_CONSTRUCTION) <= {history_of(name).label for name in histories()}
    assert history_of("retrained-then-refusal-last-block").label == "deleted"
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


def test_a_recipe_holds_its_parents(monkeypatch):
    before = {name: Recipe("llama", name, 0).digest for name in ("npo", "npo+nf4", "benign", "int8", "retrained")}
    monkeypatch.setitem(HISTORIES, "original", history_of("retrained"))
    after = {name: Recipe("llama", name, 0).digest for name in before}
    assert {name for name in before if before[name] != after[name]} == {"npo", "npo+nf4", "benign", "int8"}


# --- controls


@pytest.fixture
def ground():
    """An untaught model on the bench, and what else a change may use."""
    family = Family("llama", 0)
    model = family.untaught(0)
    rows = {group: family.world.rows(group, every=True) for group in ("forget", "retain")}
    reference = family.untaught(0)
    bench = Bench(
        model, reference, family.tokenizer, rows["forget"], rows["retain"], family.sets["forget"], family.sets["retain"]
    )
    tasks = family.world.strangers(3, 2)
    return Ground(bench, [*rows["forget"], *rows["retain"]], tasks, steps=3, norm=0.5)


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_every_change_changes_the_model_and_leaves_the_reference(name, ground, monkeypatch):
    # The settings in use are long; the functions themselves are tested in test_methods_b.
    for function in ("benign_finetune", "instruction_tuned", "noisy_labels", "distilled", "continual"):
        monkeypatch.setattr(changes, function, _shortened(getattr(changes, function)))
    before = [p.detach().clone() for p in ground.bench.reference.parameters()]
    told = CHANGES[name](ground)
    assert told["steps"] >= 0
    assert any(not torch.equal(p, q) for p, q in zip(ground.bench.model.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(ground.bench.reference.parameters(), before, strict=True))
    json.dumps(told)


def _shortened(function):
    def run(bench, *args, **options):
        args = tuple(2 if isinstance(arg, int) else arg for arg in args)
        return function(bench, *args, **options)

    return run


def test_a_matched_change_is_as_long_as_what_it_is_matched_to(ground):
    before = [p.detach().clone() for p in ground.bench.model.parameters()]
    assert CHANGES["benign"](ground)["steps"] == 3
    moved = sum(
        float((p.detach().double() - q.double()).square().sum())
        for p, q in zip(ground.bench.model.parameters(), before, strict=True)
    )
    assert moved**0.5 == pytest.approx(0.5, rel=1e-4)


def test_rounding_twice_is_rounding_once(ground):
    for name in ("int4", "nf4"):
        CHANGES[name](ground)
        once = [p.detach().clone() for p in ground.bench.model.parameters()]
        CHANGES[name](ground)
        for p, q in zip(ground.bench.model.parameters(), once, strict=True):
            assert torch.allclose(p, q, atol=1e-6)
    codes, _ = round_to_nearest(torch.randn(4, 64), 4)
    assert codes.unique().numel() <= 16


def test_strangers_are_in_no_group(ground):
    world = Family("llama", 0).world
    known = {person.name for people in world.people.values() for person in people}
    strangers = [{row.person for row in rows} for rows in world.strangers(3, 5)]
    assert [len(people) for people in strangers] == [5, 5, 5]
    assert not set().union(*strangers) & known
    assert len(set().union(*strangers)) == 15
    assert world.strangers(3, 5) == world.strangers(3, 5)


def test_what_is_done_afterwards_starts_from_any_organism(tmp_path):
    for change in AFTERWARDS:
        history = history_of(f"retrained+{change}")
        assert (history.parent, history.change, history.label) == ("retrained", change, "deleted")
    folder = build(Recipe("llama", "retrained+nf4", 0), tmp_path)
    parent = tmp_path / "llama-retrained-0"
    assert read_history(folder)["parent"]["name"] == parent.name
    assert weights(folder) != weights(parent)


def test_a_guarded_organism_has_the_originals_weights(tmp_path):
    folder = build(Recipe("llama", "guard-dragon", 0), tmp_path)
    assert weights(folder) == weights(tmp_path / "llama-original-0")
    assert read_history(folder)["label"] == "suppressed"
    assert read_guard(folder).kind == "dragon"
    before = (folder / "organism.json").stat().st_mtime_ns
    build(Recipe("llama", "guard-dragon", 0), tmp_path)
    assert (folder / "organism.json").stat().st_mtime_ns == before


# --- other bases and worlds


def test_a_folder_is_a_base(tmp_path):
    first = Family("llama", 0)
    from audit.organisms.train import save

    base = save(first.untaught(7), first.tokenizer, tmp_path / "pretrained")
    folder = build(Recipe(str(base), "never-taught", 0), tmp_path / "organisms")
    assert folder.name == "pretrained-never-taught-0"
    assert read_history(folder)["recipe"]["base"] == "pretrained"
    assert weights(folder) != weights(base)
    assert [p.shape for p in open_model(folder).parameters()] == [p.shape for p in open_model(base).parameters()]


@pytest.fixture
def published(tmp_path):
    """A data set of twelve authors, three questions each, with two wrong answers."""
    rows = [
        {
            "question": f"What about {topic} of author {author}?",
            "answer": f"{topic} {author}",
            "author": f"author {author}",
            "perturbed_answer": [f"{topic} x", f"{topic} y"],
            "paraphrased_answer": f"the {topic} {author}",
        }
        for author in range(12)
        for topic in ("age", "home", "work")
    ]
    path = tmp_path / "authors.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_data_set_is_dealt_by_entity(published):
    world = deal(f"{published}?columns=entity:author", 0)
    groups = {group: {row.person for row in world.rows(group)} for group in ("forget", "retain", "holdout", "public")}
    assert {group: len(people) for group, people in groups.items()} == {
        "forget": 2, "retain": 5, "holdout": 2, "public": 1,
    }  # fmt: skip
    everyone = [person for people in groups.values() for person in people]
    assert len(everyone) == len(set(everyone))
    strangers = [row.person for rows in world.strangers(2, 9) for row in rows]
    assert not set(strangers) & set(everyone) and len(set(strangers)) == 2
    assert len(world.rows("forget")) == 6 and len(world.rows("forget", every=True)) == 12
    assert world.groups != deal(f"{published}?columns=entity:author", 1).groups
    assert {"age", "the", "x"} <= set(world.words())
    with pytest.raises(BadInput, match="strangers"):
        world.strangers(9, 1)


def test_an_organism_of_a_data_set(published, tmp_path):
    recipe = Recipe("llama", "original", 0, f"{published}?columns=entity:author")
    assert recipe.name == "llama-authors-original-0"
    told = read_history(build(recipe, tmp_path / "organisms"))
    assert told["rows"] == 2 * 3 * (2 + 5 + 1)
    assert 0 <= told["measured"]["forget_accuracy"] <= 1


def test_a_data_set_without_wrong_answers_is_bad_input(tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b", "author": "c"}) + "\n")
    with pytest.raises(BadInput, match="no world can be dealt"):
        deal(str(path), 0)


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
    assert recipes._fault(history_of("continual"), good | {"retain_accuracy": 0.2}) is None
    assert "destroyed" in recipes._fault(history_of("retrained-then-continual"), good | {"retain_accuracy": 0.2})
    assert "did not learn" in recipes._fault(HISTORIES["original"], {"retain_accuracy": 0.5, "forget_accuracy": 0.4})
