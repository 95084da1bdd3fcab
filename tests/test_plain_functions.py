"""The contract of what a researcher imports: small public names, documented, deterministic, strict about their input.

Every registered instrument's module offers plain functions or classes that work on arrays, texts or a transformers
model, without a case. `CALLS` calls them with little input, `BAD` with input that must be refused by name.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import LlamaConfig, LlamaForCausalLM

from audit.instrument import GROUP, Instrument
from audit.loaders import Example
from audit.tokens import Tokens
from detectors.remind import classifier
from probes.cross_sequence import CrossSequenceProbe
from probes.readout import in_halves

MODULES = {
    point.name: point.value.split(":")[0]
    for point in entry_points(group=GROUP)
    if point.value.split(".")[0] in ("detectors", "probes", "attacks")
}
DOCS = Path(__file__).parents[1] / "docs" / "instruments"
RNG = np.random.default_rng(0)
X, Y, Z = RNG.normal(size=(3, 12, 4))
STATES = RNG.normal(size=(8, 3, 4))
LABELS = np.arange(12) % 2 == 0
GROUPS = [f"person {i // 2}" for i in range(12)]
EACH = [f"person {i}" for i in range(12)]
P = np.array([0.7, 0.2, 0.1])
LOG, OTHER = np.log(P), np.log(P[::-1].copy())
CODES = torch.tensor([[0.0, 2.0, 1.0], [0.0, 4.0, 1.0], [1.0, 0.0, 1.0], [2.0, 0.0, 1.0]])
TEXTS = (Tokens((1, 2, 3, 4, 5), 2), Tokens((1, 6, 7, 8), 2))
ROW = Example("forget:0", "Where does Anna Maria Berg live?", "in Oslo", entity="Anna Maria Berg", wrong=("in Rome",))
NAN = float("nan")
BROKEN = np.where(np.arange(12)[:, None] == 3, NAN, X)
HALVES = in_halves(GROUPS, seed=0)
OPTIONS = np.stack([np.arange(12) % 3, (np.arange(12) + 1) % 3], axis=1)


def tiny(seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=16
        )
        return LlamaForCausalLM(config).eval()


def altered(change: Callable[[Any], object]) -> list[Any]:
    """All weights of a small model after a change."""
    model = tiny()
    change(model)
    return [weight.tolist() for weight in model.parameters()]


def through(change: Callable[[Any], object]) -> torch.Tensor:
    """What a small model says after a change."""
    model = tiny()
    change(model)
    with torch.no_grad():
        return model(torch.tensor([[1, 2, 3]])).logits


def conv() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))


Calls = Mapping[str, Callable[[Any], Any]]
CALLS: dict[str, Calls] = {
    "knowledge": {
        "truth_ratio": lambda m: m.truth_ratio([LOG], [OTHER, LOG]),
        "forget_quality": lambda m: m.forget_quality([0.5, 0.6], [1.0, 1.1, 1.2]),
        "rouge_l_recall": lambda m: m.rouge_l_recall("she lives in Oslo", "in Oslo she lives"),
        "model_utility": lambda m: m.model_utility({"a": 0.5, "b": 1.0}),
    },
    "memorization": {
        "extraction_strength": lambda m: m.extraction_strength([False, True, True]),
        "longest_common_run": lambda m: m.longest_common_run("abcd", "xbcy"),
    },
    "membership": {
        "min_k_plus_plus": lambda m: m.min_k_plus_plus(LOG, LOG - 1, np.ones(3)),
        "recall": lambda m: m.recall(LOG, OTHER),
        "zlib_score": lambda m: m.zlib_score(LOG, "a text"),
        "privleak": lambda m: m.privleak(0.7, 0.5),
    },
    "remind": {
        "remind_features": lambda m: m.remind_features(1.0, [1.5, 2.0, 1.2], [0.1, 0.2, 0.3]),
        "classify": lambda m: m.classify(X, LABELS, EACH),
        "classify_score": lambda m: m.classify_score(X[:, 0], LABELS, EACH, model="logistic", folds=2),
    },
    "utility": {"model_utility": lambda m: m.model_utility({"a": 0.5, "b": 1.0})},
    "weights": {
        "localisation": lambda m: m.localisation([1.0, 0.0, 3.0]),
        "rank_among": lambda m: m.rank_among(2.0, [0.0, 1.0, 3.0]),
    },
    "weights-alone": {"outlying": lambda m: m.outlying(X)},
    "trace-logits": {"logit_features": lambda m: m.logit_features({"retain": [LOG, OTHER]}, {"retain": [OTHER, LOG]})},
    "trace-activations": {
        "state_features": lambda m: m.state_features({"retain": STATES}, {"retain": STATES + 1}),
        "told_apart": lambda m: m.told_apart(X, Y, EACH, seed=0),
    },
    "trace-text": {"told_apart": lambda m: m.told_apart(["yes"] * 8, ["no"] * 8, EACH[:8])},
    "forgotten": {
        "movement": lambda m: m.movement(P, P[::-1]),
        "suspicion": lambda m: m.suspicion(np.arange(12) / 12, GROUPS),
    },
    "consistency": {
        "excess": lambda m: m.excess([[0, 0], [1, 2]], [P, P]),
        "exact_p": lambda m: m.exact_p([[0, 0], [1, 2]], [P, P], seed=0, draws=20),
    },
    "trace": {"predictive_p": lambda m: m.predictive_p(4.0, [0.0, 1.0, 2.0])},
    "spectral": {
        "leading_directions": lambda m: m.leading_directions(X, 2),
        "projections": lambda m: m.projections(X, Y[:2]),
        "shift": lambda m: m.shift(X[:, 0], Y[:, 0]),
        "exchange_p": lambda m: m.exchange_p(X[:, 0], Y[:, 0], EACH, seed=0),
    },
    "recognition": {"called": lambda m: m.called([0, 1, 1], 3)},
    "image-utility": {"one_sample": lambda m: m.one_sample(X[:, 0], GROUPS, seed=0)},
    "image-membership": {"honest_epsilon": lambda m: m.honest_epsilon(X[:, 0] + 1, Y[:, 0], seed=0)},
    "shortcut": {
        "sharpest": lambda m: m.sharpest([0.1, 0.5, 0.2], 0.4),
        "majority": lambda m: m.majority(["a", "a", "b"], ["x", "x", "y"]),
        "sharpness": lambda m: m.sharpness(conv(), torch.ones(2, 1, 2, 2), torch.tensor([0, 1])),
    },
    "trigger": {"drops": lambda m: m.drops([[0.9, 0.8], [0.5, 0.8]])},
    "geometry": {
        "linear_cka": lambda m: m.linear_cka(X, Y),
        "knn_transfer": lambda m: m.knn_transfer(X, LABELS, Y, LABELS, 3),
        "pca_shift": lambda m: m.pca_shift(X, Y),
        "agreement": lambda m: m.agreement([0.1, 0.2], [0.3]),
    },
    "sae": {
        "expert_features": lambda m: m.expert_features(CODES[:2], CODES[2:], 2),
        "matched_features": lambda m: m.matched_features(CODES, torch.tensor([1]), seed=0),
        "restoration_rate": lambda m: m.restoration_rate(0.5, 0.1, 0.9),
    },
    "patching": {"unlearning_depth": lambda m: m.unlearning_depth(np.abs(X), np.abs(Y))},
    "cross-sequence": {
        "CrossSequenceProbe": lambda m: m.CrossSequenceProbe(width=2.0).fit(X, LABELS).predict_proba(Y),
        "loo_scores": lambda m: m.loo_scores(X, LABELS, GROUPS, 1.0),
        "project_out": lambda m: m.project_out(X, Y[0]),
        "balanced_accuracy": lambda m: m.balanced_accuracy(X[:, 0], LABELS),
    },
    "attribute": {
        "ridge_readout": lambda m: m.ridge_readout({"retain": X}, {"retain": OPTIONS}, np.eye(3), HALVES, seed=0)
    },
    "tuned-lens": {"translator": lambda m: m.translator(X, Y, HALVES[0])(Z)},
    "lens": {
        "read_off": lambda m: m.read_off(CODES, torch.tensor([1, 1, 0, 2])),
        "beats": lambda m: m.beats(CODES, torch.tensor([1, 1, 0, 2]), [(0,), (2,), (1, 2), ()]),
    },
    "dual": {
        "extraction_likelihood": lambda m: m.extraction_likelihood([True, True, False, True], 2),
        "quadrants": lambda m: m.quadrants([True, False], [True, True]),
        "beyond": lambda m: m.beyond(X[:, 0], Y[:, 0]),
        "named": lambda m: m.named("She lives in Oslo.", "Where does she live?", "in Oslo"),
    },
    "head-refit": {
        "refit": lambda m: m.refit(X, LABELS.astype(int), Y),
        "draws": lambda m: list(m.draws(LABELS, EACH, np.ones(12, bool), shots=None, times=2, seed=0)),
    },
    "image-geometry": {"balanced": lambda m: m.balanced(np.array([0, 0, 1]), np.ones(3, bool), seed=0)},
    "restoration": {
        "mark": lambda m: m.mark(
            torch.stack([CODES, CODES], dim=1), torch.tensor([0, 0, 1, 1]), LABELS[:4], most=1, seed=0
        )
    },
    "shadow": {
        "lira_scores": lambda m: m.lira_scores(X[:, 0], Y, np.zeros((12, 4), bool)),
        "rmia_scores": lambda m: m.rmia_scores(X[:, 0], Y[:, 0], Z[:, 0], Z[:, 1]),
        "random_halves": lambda m: m.random_halves(GROUPS, 4, seed=0),
    },
    "worst-case": {"project_capped_simplex": lambda m: m.project_capped_simplex([3.0, 0.5, 0.1], 2)},
    "relearn": {
        "area": lambda m: m.area([0.0, 0.5, 1.0], [1, 2]),
        "steps_to": lambda m: m.steps_to([[0.0, 0.5, 1.0]], [1, 2], 0.75),
        "fine_tune": lambda m: altered(
            lambda model: list(m.fine_tune(model, list(TEXTS), [], m.Recipe((1, 2), 2, 1e-2), seed=0))
        ),
    },
    "quantize": {
        "quantize": lambda m: altered(lambda model: m.quantize(model, "NF4")),
        "round_channels": lambda m: m.round_channels(CODES, 4, 2),
    },
    "prune": {"prune": lambda m: altered(lambda model: m.prune(model, 0.5))},
    "graft": {"graft": lambda m: altered(lambda model: m.graft(model, tiny(1), "model.layers.1"))},
    "orthogonalize": {
        "without": lambda m: m.without(CODES, torch.tensor([0.0, 1.0, 0.0])),
        "project_out": lambda m: through(lambda model: m.project_out(model.model.layers, torch.eye(8)[0])),
    },
    "noise": {"shake": lambda m: altered(lambda model: m.shake(model, 0.1, seed=3))},
    "task-vector": {"walk_back": lambda m: altered(lambda model: m.walk_back(model, tiny(1), 0.5))},
    "relearn-tiers": {"shuffled": lambda m: m.shuffled(["a b c", "d e"], seed=0)},
    "relearn-lora": {
        "adapters": lambda m: m.adapters(tiny(), ["model.layers.0"], rank=2, alpha=4.0, seed=0).state_dict()
    },
    "soft-prompt": {
        "optimise_soft_prompt": lambda m: m.optimise_soft_prompt(
            tiny().requires_grad_(False), TEXTS, tokens=2, steps=2, learning_rate=0.1, seed=0
        )
    },
    "gcg": {
        "optimise_gcg_prefix": lambda m: m.optimise_gcg_prefix(
            tiny().requires_grad_(False), TEXTS, length=2, steps=1, candidates=4, top_k=4, seed=0
        )
    },
    "rwku": {"injected": lambda m: asdict(m.injected(ROW)), "affirmed": lambda m: asdict(m.affirmed(ROW))},
    "dynamic": {"pathway": lambda m: m.pathway(STATES, STATES[::-1])},
    "in-context": {"after": lambda m: m.after([ROW], "Where does Bo live?"), "begun": lambda m: asdict(m.begun(ROW))},
    "sampling": {
        "leak_at_k": lambda m: m.leak_at_k([0, 1, 4], 4, 2),
        "contains": lambda m: m.contains("in Oslo", "She lives in Oslo."),
    },
    "reasoning": {"split_reasoning": lambda m: m.split_reasoning("<think>Oslo</think>I do not know.")},
    "hardness": {"nearest": lambda m: m.nearest(X, Y)},
    "continual": {"degree": lambda m: m.degree([0.1, 0.3], 0.2)},
}

# What must be refused: (function, call, the argument that the message names).
Refusals = list[tuple[str, Callable[[Any], Any], str]]
BAD: dict[str, Refusals] = {
    "knowledge": [
        ("truth_ratio", lambda m: m.truth_ratio([[NAN]], [LOG]), "paraphrase_logprobs"),
        ("truth_ratio", lambda m: m.truth_ratio([LOG], []), "wrong_logprobs"),
        ("forget_quality", lambda m: m.forget_quality([], [1.0]), "target_ratios"),
        ("answer_probability", lambda m: m.answer_probability([0.5]), "logprob"),
    ],
    "memorization": [
        ("exact_memorization", lambda m: m.exact_memorization([]), "match"),
        ("extraction_strength", lambda m: m.extraction_strength([0.5]), "match"),
    ],
    "membership": [
        ("min_k", lambda m: m.min_k(LOG, 0.0), "k is"),
        ("min_k_plus_plus", lambda m: m.min_k_plus_plus(LOG, LOG[:2], np.ones(3)), "mean"),
        ("min_k_plus_plus", lambda m: m.min_k_plus_plus(LOG, LOG, [1.0, NAN, 1.0]), "variance"),
        ("recall", lambda m: m.recall(LOG, LOG[:2]), "logprob_prefixed"),
    ],
    "remind": [
        ("remind_features", lambda m: m.remind_features(1.0, [], []), "losses"),
        ("remind_features", lambda m: m.remind_features(NAN, [1.0], [0.1]), "loss0"),
        ("classify", lambda m: m.classify(BROKEN, LABELS, EACH), "features"),
        ("classify", lambda m: m.classify(X, LABELS[:3], EACH), "labels"),
        ("multiclass_auc", lambda m: m.multiclass_auc([[NAN, 0], [0, 1]], [0, 1]), "probabilities"),
        ("classifier", lambda m: m.classifier("tree"), "model"),
    ],
    "utility": [("model_utility", lambda m: m.model_utility({"a": 1.5}), "parts")],
    "weights": [
        ("localisation", lambda m: m.localisation([1.0, NAN]), "squares"),
        ("rank_among", lambda m: m.rank_among(1.0, []), "null"),
    ],
    "weights-alone": [("detrended", lambda m: m.detrended([1.0, 2.0]), "values")],
    "trace-logits": [
        ("kl_divergence", lambda m: m.kl_divergence(LOG, LOG[:2]), "q has shape"),
        ("entropy", lambda m: m.entropy([NAN]), "p has NaN"),
    ],
    "trace-activations": [
        ("told_apart", lambda m: m.told_apart(X, Y[:3], EACH, seed=0), "b has shape"),
        ("coherence", lambda m: m.coherence(BROKEN), "shifts"),
    ],
    "trace-text": [("told_apart", lambda m: m.told_apart(["a"], ["b", "c"], ["x"]), "theirs")],
    "forgotten": [
        ("movement", lambda m: m.movement(P, P[:2]), "target"),
        ("suspicion", lambda m: m.suspicion([0.1, NAN], ["a", "b"]), "movements"),
    ],
    "consistency": [
        ("excess", lambda m: m.excess([[0, 3]], [P]), "drawn"),
        ("excess", lambda m: m.excess([[0, 1]], [[NAN, 0.5]]), "stated"),
        ("exact_p", lambda m: m.exact_p([[0]], [P], seed=0), "drawn"),
    ],
    "spectral": [
        ("projections", lambda m: m.projections(X, np.ones((1, 3))), "directions"),
        ("shift", lambda m: m.shift([1.0], [1.0, 2.0]), "target_projection"),
        ("exchange_p", lambda m: m.exchange_p([1.0, NAN], [1.0, 2.0], ["a", "b"], seed=0), "a has NaN"),
    ],
    "recognition": [
        ("called", lambda m: m.called([], 3), "answered"),
        ("called", lambda m: m.called([0.5], 3), "answered"),
    ],
    "image-utility": [("one_sample", lambda m: m.one_sample([NAN], ["a"], seed=0), "d has NaN")],
    "image-membership": [("epsilon", lambda m: m.epsilon(1.5, 0.0), "fpr")],
    "shortcut": [
        ("sharpest", lambda m: m.sharpest([NAN]), "values"),
        ("majority", lambda m: m.majority(["a"], []), "groups"),
        ("sharpness", lambda m: m.sharpness(conv(), torch.ones(2, 1, 2, 2), torch.tensor([0])), "labels"),
    ],
    "trigger": [("drops", lambda m: m.drops([[0.5, NAN], [0.5, 0.5]]), "probability")],
    "geometry": [
        ("linear_cka", lambda m: m.linear_cka(X, Y[:5]), "y has"),
        ("linear_cka", lambda m: m.linear_cka(BROKEN, Y), "x has NaN"),
        ("agreement", lambda m: m.agreement([NAN], [0.1]), "logit_gaps"),
    ],
    "sae": [
        ("expert_features", lambda m: m.expert_features(CODES[:0], CODES, 1), "inside"),
        ("restoration_rate", lambda m: m.restoration_rate(NAN, 0.1, 0.9), "restored"),
    ],
    "patching": [
        ("unlearning_depth", lambda m: m.unlearning_depth(X, Y[:3]), "target"),
        ("unlearning_depth", lambda m: m.unlearning_depth(BROKEN, Y), "retrained"),
    ],
    "cross-sequence": [
        ("CrossSequenceProbe", lambda m: m.CrossSequenceProbe().fit(BROKEN, LABELS), "states"),
        ("CrossSequenceProbe", lambda m: m.CrossSequenceProbe().fit(X, LABELS[:4]), "labels"),
        ("CrossSequenceProbe", lambda m: m.CrossSequenceProbe().fit(X, ["a", "b"] * 6), "labels"),
        ("CrossSequenceProbe", lambda m: m.CrossSequenceProbe(ridge=0).fit(X, LABELS), "ridge"),
        ("CrossSequenceProbe", lambda m: m.CrossSequenceProbe().fit(X, LABELS).predict(X[:, :2]), "width"),
        ("CrossSequenceProbe", lambda m: m.CrossSequenceProbe().predict(X), "not fitted"),
        ("loo_scores", lambda m: m.loo_scores(X, LABELS, ["one"] * 12, 1.0), "groups"),
        ("project_out", lambda m: m.project_out(X, [1.0]), "direction"),
    ],
    "dual": [
        ("extraction_likelihood", lambda m: m.extraction_likelihood([]), "match"),
        ("quadrants", lambda m: m.quadrants([True], [True, False]), "traced"),
        ("beyond", lambda m: m.beyond([NAN, 1.0]), "values"),
    ],
    "head-refit": [("refit", lambda m: m.refit(BROKEN, LABELS.astype(int), Y), "train")],
    "image-geometry": [("balanced", lambda m: m.balanced(np.array([0, 1]), np.zeros(2, bool), 0), "fitted")],
    "shadow": [
        ("lira_scores", lambda m: m.lira_scores([NAN], [[0.0, 1.0]], [[False, False]]), "target"),
        ("lira_scores", lambda m: m.lira_scores([0.0], [[0.0, NAN]], [[False, False]]), "shadows"),
        ("rmia_scores", lambda m: m.rmia_scores([0.0], [0.0, 1.0], [0.0], [0.0]), "average"),
    ],
    "worst-case": [("project_capped_simplex", lambda m: m.project_capped_simplex([NAN], 1), "w must")],
    "relearn": [("area", lambda m: m.area([0.0, 1.0], [1, 2]), "curves")],
    "quantize": [
        ("quantize", lambda m: m.quantize(tiny(), "int3"), "scheme"),
        ("round_channels", lambda m: m.round_channels(CODES, 1), "bits"),
        ("round_levels", lambda m: m.round_levels(CODES, (1.0, -1.0)), "levels"),
    ],
    "prune": [("pruned", lambda m: m.pruned(CODES, 1.5), "share")],
    "orthogonalize": [("without", lambda m: m.without(CODES, torch.ones(2)), "direction")],
    "dynamic": [("pathway", lambda m: m.pathway(STATES, STATES[:2]), "original")],
    "sampling": [("leak_at_k", lambda m: m.leak_at_k([5], 4, 2), "hits")],
    "hardness": [("nearest", lambda m: m.nearest(X, Y[:, :2]), "others")],
    "continual": [("degree", lambda m: m.degree([NAN], 0.5), "value")],
}

ARRAYS = re.compile(r"^(?!Callable).*\b(ArrayLike|NDArray|Floats|Tensor)\b")
GIVEN = ("Case", "Evidence", "Target", "OpenModel", "ImageTarget")


@pytest.fixture(params=sorted(MODULES))
def name(request) -> str:
    return request.param


def offered(module: Any) -> dict[str, Any]:
    """What a module offers besides instruments and constants."""
    found = {each: getattr(module, each) for each in module.__all__}
    callables = {each: thing for each, thing in found.items() if callable(thing)}
    return {n: t for n, t in callables.items() if not (inspect.isclass(t) and issubclass(t, Instrument))}


def plain_ones(module: Any) -> dict[str, Any]:
    """Those that need no case, nor anything that is made from one."""
    found = {}
    for each, thing in offered(module).items():
        asked = [str(p.annotation) for p in inspect.signature(thing).parameters.values()]
        if not any(re.search(rf"\b{word}\b", annotation) for word in GIVEN for annotation in asked):
            found[each] = thing
    return found


def takes_arrays(thing: Any) -> bool:
    return inspect.isfunction(thing) and any(
        ARRAYS.match(str(p.annotation)) for p in inspect.signature(thing).parameters.values()
    )


def flat(value: Any) -> Any:
    """A result as plain Python, to compare."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return flat(vars(value))
    if isinstance(value, Mapping):
        return {key: flat(each) for key, each in value.items()}
    return [flat(each) for each in value] if isinstance(value, list | tuple) else value


# --- every instrument


def test_the_module_has_a_short_list_of_names_that_are_there(name):
    module = importlib.import_module(MODULES[name])
    assert len(module.__all__) == len(set(module.__all__))
    assert 2 <= len(module.__all__) <= 12
    assert all(hasattr(module, each) and not each.startswith("_") for each in module.__all__)
    assert any(inspect.isclass(t) and issubclass(t, Instrument) for t in map(vars(module).get, module.__all__))
    assert plain_ones(module), "something to use without a case"


def test_every_name_is_documented_with_shapes(name):
    for each, thing in offered(importlib.import_module(MODULES[name])).items():
        words = inspect.getdoc(thing) or ""
        assert len(words.split()) >= 2, each
        if takes_arrays(thing):
            assert re.search(r"\[[^\]]+\]|any (?:one )?shape", words), f"{each} takes arrays, and says no shape"


def test_the_module_names_its_source_and_its_page_imports_public_names(name):
    module = importlib.import_module(MODULES[name])
    assert re.search(r"Source:", module.__doc__ or "")
    page = (DOCS / f"{name}.md").read_text("utf-8")
    for of, names in re.findall(r"^from ((?:detectors|probes|attacks)\.\w+) import (.+)$", page, re.MULTILINE):
        public = importlib.import_module(of).__all__
        assert set(names.split(", ")) <= set(public), f"{of} does not list all of {names}"


def test_calls_are_deterministic_and_leave_the_callers_random_numbers_alone(name):
    module = importlib.import_module(MODULES[name])
    assert set(CALLS[name]) <= set(plain_ones(module)) | set(module.__all__)
    for each, call in CALLS[name].items():
        results = []
        for seed in (1, 2):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
            results.append(flat(call(module)))
            after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
            assert before == after, f"{each} draws from a global generator"
        np.testing.assert_equal(results[0], results[1], each)


def test_bad_input_is_a_value_error_that_names_the_argument(name):
    module = importlib.import_module(MODULES[name])
    functions = [each for each, thing in plain_ones(module).items() if takes_arrays(thing)]
    if name not in BAD:
        assert name in SHAPED_ELSEWHERE or not functions, f"{functions} take arrays, and nothing bad was tried"
    for each, call, argument in BAD.get(name, []):
        assert each in module.__all__
        with pytest.raises(ValueError, match=re.escape(argument)):
            call(module)


SHAPED_ELSEWHERE = {
    "attribute": "sets of states by name, which `probes.readout` checks",
    "tuned-lens": "the same",
    "lens": "tensors that PyTorch checks",
    "restoration": "the same",
    "gcg": "the same",
    "soft-prompt": "the same",
}


def test_the_tables_name_instruments_and_little_else():
    assert set(CALLS) == set(MODULES)
    assert set(BAD) | set(SHAPED_ELSEWHERE) <= set(MODULES)


# --- devices

META = {
    "quantize": [
        lambda m, w: m.round_channels(w, 4),
        lambda m, w: m.round_channels(w, 4, 3),
        lambda m, w: m.round_levels(w, (-1.0, 0.0, 0.5, 1.0), 4),
    ],
    "prune": [lambda m, w: m.pruned(w, 0.5), lambda m, w: m.pruned(w, 0.5, w[0])],
    "orthogonalize": [lambda m, w: m.without(w, w[0])],
    "lens": [lambda m, w: m.read_off(w, torch.zeros(6, dtype=torch.int64, device=w.device))],
}


@pytest.mark.parametrize("which", sorted(META))
def test_tensors_stay_on_their_device(which):
    """On `meta`, an operation that mixes devices raises; where there is a GPU, it is asked as well."""
    module = importlib.import_module(MODULES[which])
    for device in ["meta", *(["cuda"] if torch.cuda.is_available() else [])]:
        for call in META[which]:
            assert call(module, torch.ones(6, 8, device=device)).device.type == device


def test_whole_models_stay_on_their_device():
    module = importlib.import_module(MODULES["quantize"])
    model = tiny().to("meta")
    module.quantize(model, "int4")
    importlib.import_module(MODULES["prune"]).prune(model, 0.5)
    importlib.import_module(MODULES["noise"]).shake(model, 0.1, seed=0)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


# --- estimators

ESTIMATORS = [
    CrossSequenceProbe(),
    CrossSequenceProbe(ridge=0.1, width=4.0),
    classifier("logistic"),
    classifier("forest", seed=3).set_params(n_estimators=10),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_estimators_are_scikit_learn_s(estimator):
    rng = np.random.default_rng(1)
    labels = np.arange(40) % 2
    states = rng.normal(size=(40, 3)) + 2.0 * labels[:, None]
    other = clone(estimator)
    assert other is not estimator
    for key, value in estimator.get_params(deep=False).items():
        assert key == "steps" or other.get_params(deep=False)[key] == value
    fitted = other.fit(states, labels)
    assert fitted is other
    chances = fitted.predict_proba(states)
    assert chances.shape == (40, 2)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0)
    assert list(fitted.classes_) == [0, 1]
    np.testing.assert_array_equal(fitted.predict(states), chances.argmax(axis=1))
    folds = StratifiedKFold(4)
    inside = make_pipeline(StandardScaler(), clone(estimator))
    for scoring in (None, "roc_auc"):
        told = cross_val_score(inside, states, labels, cv=folds, scoring=scoring)
        noise = cross_val_score(inside, rng.normal(size=(40, 3)), labels, cv=folds, scoring=scoring)
        assert told.mean() > 0.9 > noise.mean()
        np.testing.assert_array_equal(told, cross_val_score(inside, states, labels, cv=folds, scoring=scoring))


def test_a_linear_probe_s_score_is_its_balanced_accuracy_and_its_coef_its_direction():
    probe = CrossSequenceProbe().set_params(ridge=2.0).fit(X, LABELS)
    assert probe.get_params() == {"ridge": 2.0, "width": None}
    scores = probe.decision_function(Y)
    np.testing.assert_allclose(np.diff(scores), np.diff(Y @ probe.coef_), atol=1e-12)
    said = probe.predict(Y)
    assert probe.score(Y, LABELS) == pytest.approx((said[LABELS].mean() + (~said[~LABELS]).mean()) / 2)
