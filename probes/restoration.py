"""Restoration in image classifiers: does a forgotten class come back when the sparse features that mark it are put in?

What is measured: after several blocks, a sparse autoencoder (`probes.sae_training`) describes the states of all patches
and of the class token. **Expert features** of a class are those that fire more in its images than in other classes',
chosen on one half of the images and used on the other. While the target looks at an image of the class, something is
added to its states h, f = encode(h), and it is counted how often the class is the answer:

    own:       h' = h + α Σ_{j in E} f_j d_j                            the target's own features, amplified
    original:  h' = h + α Σ_{j in E} (f_j(original) - f_j) d_j          at patches, the original's values carried over
               h' = h + α (h(original) - h)                             at the class token
    R(α) = (accuracy(α) - accuracy(0)) / (accuracy of the original - accuracy(0)), clipped to [0, 1];  α = 0, 1, 5, 10

The two arms say different things. *Own* adds nothing that the target does not have: what comes back was in it, below
the block that hides it. *Original* is the published test. At α = 1 it replaces the class token by the original's, so it
measures whether the blocks above and the head still read the class, whatever the network below has kept: a model that
was retrained from the original's checkpoint "restores", and one whose head alone was edited does not. It decides
nothing.

Source: Suppression or Deletion, arXiv 2602.18505, and its code (github.com/Yurim990507/suppression-or-deletion: block 9
of ViT-B, α 1, 5, 10). Its code encodes patches without the autoencoder's own top-k, and puts W_d f' + b in the patches'
place, so that α = 0 changes them too; here only the change is added, and α = 0 changes nothing. Rate, choice of
features, the own arm and the controls are this project's, 2026.

Traps:

- *Never taught*: images of the holdout class are steered by experts of theirs, and a retrained model in the same way.
- *Any push may restore*: evidence needs 0.1 more than a push of the same length in random directions gives.
- *An edit of the head, or of all blocks*, is seldom undone by amplifying: silence is not deletion.
- *No class token* (Swin, ResNet, ConvNeXT): the decision is read from a mean, which is no place to write; only the
  places are steered.
- *Above the last block* patches of a ViT are not read any more; there the class token is all.
- *Labels*: whose experts are used is told by the image's true class, in both arms and for all sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from audit.case import Case
from audit.contrast import Statistic, against_never_taught
from audit.errors import BadInput
from audit.evidence import Evidence
from audit.instrument import Access, Attack, Stage
from audit.loaders import Example
from audit.plan import Request
from audit.quantities import TOKEN, recorded_by_attack
from audit.record import Control, Finding, Question, Side
from audit.statistics import halves
from probes.lens import read_layers
from probes.restoration_curves import Floats, Won, figure_of, table_of
from probes.restoration_steering import AMPLIFIED, Described, Dictionary, describe, learn, mark, restore
from probes.sae_controls import GOOD, dictionary, gain, rate, unchanged
from probes.sae_steering import expert_features, restoration_rate

if TYPE_CHECKING:
    from audit.image_target import ImageTarget

__all__ = ["Restoration", "expert_features", "mark", "restoration_rate"]

_SOURCE = "Suppression or Deletion, arXiv 2602.18505; own arm, rate and choice of features: this project, 2026"
_COMPARED = ("forget", "holdout", "retain")
_BUDGETS = {"quick": (2, 200, 60), "standard": (4, 400, 150), "thorough": (12, 2000, 10**9)}
"""Blocks, steps of training of an autoencoder, and images of a set that are steered."""
_FEWEST = 8  # images of a set: half of them choose the features
_MOST_STATES = 50_000  # that an autoencoder is trained on
_HELD_OUT = 8  # one image in so many tells how good it is
_STAGE = "restoration"

OWN = Statistic(
    "own", "sparse features: the class is the answer with the model's own expert features amplified", "accuracy",
    "the class comes back when the model's own features of it are amplified", (0.0, 1.0), 0.1, _SOURCE,
)  # fmt: skip
FROM_ORIGINAL = Statistic(
    "original", "sparse features: the class is the answer with the original's activations carried over", "accuracy",
    "the upper blocks and the head still read the original's activations", (0.0, 1.0), 0.1, _SOURCE, (False, False),
)  # fmt: skip

RESTORED = recorded_by_attack("restoration")
"""By kind of steering: is the class the answer? [1, blocks, alphas] each."""
DESCRIBED = recorded_by_attack("restoration-dictionaries")
"""What `describe` tells of the target's dictionaries and of the original's, [1, blocks, 2, ...] each."""


class Restoration(Attack):
    """Does a class come back when features that mark it are amplified, or carried over from the original?"""

    name = "restoration"
    title = "Do sparse features bring the class back?"
    question = Question.REPRESENTATION
    access = Access.WEIGHTS
    sets = ("forget", "retain", "holdout")
    roles = ("original",)
    modality = "image"
    reference = _SOURCE

    def __init__(self) -> None:
        self._learned: dict[str, Dictionary] = {}
        """The original's, which serve target and retrained model."""

    def missing(self, case: Case) -> str | None:
        """Halves of images, and classes to tell apart."""
        for name in _COMPARED:
            if name in case.sets and len(set(case.clusters(_rows(case, name)))) < _FEWEST:
                return f"needs at least {_FEWEST} images in the {name} set to choose features on half"
        if all(name in case.sets for name in _COMPARED) and len(_classes(case, *_COMPARED)) < 2:
            return "needs images of at least two classes"
        return super().missing(case)

    def requests(self, case: Case, target: ImageTarget) -> list[Request]:
        """What each model answers; at the stage what it recorded, and how good its dictionaries are on other images."""
        _, _, stage = target.role.partition("+")
        if stage not in ("", _STAGE):
            return []
        made = []
        for name in _COMPARED:
            shown = tuple(map(target.show, _rows(case, name)))
            made.append(Request(f"restoration/{name}", shown, (RESTORED if stage else TOKEN,)))
        if stage:
            _, held = _split(case)
            extra = {"layers": _layers(case, target), "known": [name in ("retain", "utility") for name, _ in held]}
            shown = tuple(target.show(row) for _, row in held)
            made.append(Request("restoration/dictionaries", shown, (DESCRIBED,), extra))
        return made

    def cost(self, case: Case, target: ImageTarget) -> str:
        """What is trained."""
        _, steps, _ = _BUDGETS[case.options.budget.value]
        return f": autoencoders of {len(_layers(case, target))} blocks of two models, {steps} steps each"

    def stages(self, case: Case, target: ImageTarget) -> list[Stage]:
        """One of the target, and one of the retrained model: each with all that is put into it."""
        if target.role not in ("target", "retrained"):
            return []

        options, original = case.options, case.inventoried("original").digest
        sets = ",".join(case.sets[name].digest for name in (*_COMPARED, "utility") if name in case.sets)
        used = f"{_layers(case, target)}/{_BUDGETS[options.budget.value]}/{AMPLIFIED}/{options.seed}/{options.dtype}"
        return [Stage(_STAGE, f"{used}/{options.budget}/{sets}/{original}")]

    def run(self, case: Case, target: ImageTarget, tick: Any) -> Iterator[Stage]:
        """Train the dictionaries, and steer, block by block; the target's weights stay as they are."""
        import torch

        [stage] = self.stages(case, target)
        original, layers, seed = _original(case, target), _layers(case, target), case.options.seed
        rows = [row for name in _COMPARED for row in _rows(case, name)]
        taught, held = ([row for _, row in part] for part in _split(case))
        classes, held_classes = (
            torch.tensor([target.label(row.answer) for row in some], device=target.device) for some in (rows, held)
        )
        _, steps, _ = _BUDGETS[case.options.budget.value]
        each = 2 * steps + len(rows)

        def train(model: ImageTarget, site: str, begun: int) -> Dictionary:
            def show(done: int, _: int) -> None:
                tick(begun + done, each * len(layers))

            return learn(model, site, _pixels(taught), most=_MOST_STATES, steps=steps, seed=seed, tick=show)

        restored, told = [], []
        for i, layer in enumerate(layers):
            site = f"blocks.{layer}.hook_resid_post"
            mine = train(target, site, i * each)
            known = f"{site}/{stage.recipe}"
            if known not in self._learned:
                self._learned[known] = train(original, site, i * each + steps)
            models = Described(target, mine), Described(original, self._learned[known])
            restored.append(restore(*models, site, _pixels(rows), classes, _in_a(case, rows), seed))
            told.append([describe(of, site, _pixels(held), held_classes) for of in models])
            tick((i + 1) * each, each * len(layers))
        by_kind = {kind: np.stack([found[kind] for found in restored], axis=1) for kind in restored[0]}
        quality = {
            key: torch.stack([torch.stack([of[key] for of in both], dim=1) for both in told], dim=1).cpu().numpy()
            for key in told[0][0]
        }
        recorded = [
            *((target.show(row), {RESTORED.name: _nth(by_kind, i)}) for i, row in enumerate(rows)),
            *((target.show(row), {DESCRIBED.name: _nth(quality, i)}) for i, row in enumerate(held)),
        ]
        yield Stage(stage.name, stage.recipe, recorded)

    def measure(self, case: Case, evidence: Evidence) -> list[Finding]:
        """Forget images steered by the features of their class against holdout images steered by those of theirs."""
        roles = tuple(
            role for role in ("target", "retrained") if evidence.has(f"{role}+{_STAGE}", "restoration/forget")
        )
        won = {(role, name): _won(evidence, role, name) for role in roles for name in _COMPARED}
        layers = evidence.extra(f"target+{_STAGE}", "restoration/dictionaries")["layers"]
        rows = {name: _rows(case, name) for name in _COMPARED}
        known = [row["match"][0] for row in evidence.iterate("original", "restoration/forget", TOKEN.name)]
        reference, forget = float(np.mean(known)), won["target", "forget"]
        who, seed = case.clusters(rows["forget"]), case.options.seed
        same = unchanged(np.concatenate([(each["none"] != each["plain"]).ravel() for each in won.values()]))

        def found(statistic: Statistic, arm: str, of: int, alphas: tuple[float, ...]) -> Finding:
            """One arm: accuracy by block, mean over these αs; `of`: whose dictionary it steers by."""
            chosen = [AMPLIFIED.index(alpha) for alpha in alphas]

            def score(role: str, name: str, kind: str = "all") -> Floats:
                return np.asarray(won[role, name][f"{arm} {kind}"][:, :, chosen].mean(axis=2))

            finding = against_never_taught(
                self, case, evidence, statistic, score, columns=("block", layers), rows=rows, roles=roles
            )
            best = int(np.argmax([f"block {layer:g}" == finding.layer for layer in layers]))
            restored, noise = (score("target", "forget", kind)[:, best] for kind in ("all", "random"))
            before = forget["plain"][:, 0, 0]
            controls = [
                *finding.controls,
                *_dictionaries(evidence, roles, of),
                same,
                gain(restored, before, noise, who, threshold=statistic.threshold, seed=seed),
                rate(restored, before, reference, who, seed),
                *([] if "retrained" in roles else _two_classes(case)),
            ]
            shown = {
                "figure": figure_of(arm, won, reference, layers, alphas[0]),
                "table": table_of(arm, won, reference, layers),
            }
            return finding.model_copy(update={"controls": controls, **shown})

        own = found(OWN, "own", 0, AMPLIFIED[1:])
        carried = found(FROM_ORIGINAL, "original", 1, AMPLIFIED[:1])
        return [own, carried.model_copy(update={"sides": (Side.NEITHER, Side.NEITHER)})]


# --- what is read -------------------------------------------------------------------------------------------


def _layers(case: Case, target: ImageTarget) -> list[int]:
    """After which blocks is steered: evenly spaced ones that end with the last."""
    return read_layers(target.layers, _BUDGETS[case.options.budget.value][0])


def _rows(case: Case, name: str) -> tuple[Example, ...]:
    return case.rows(name, _BUDGETS[case.options.budget.value][2])


def _classes(case: Case, *names: str) -> set[str]:
    return {row.answer for name in names for row in _rows(case, name)}


Named = list[tuple[str, Example]]


def _split(case: Case) -> tuple[Named, Named]:
    """Images, by set: those that the autoencoders are trained on, and those that tell how good they are."""
    named = [(name, row) for name in (*_COMPARED, "utility") if name in case.sets for row in case.rows(name)]
    return [image for i, image in enumerate(named) if i % _HELD_OUT], named[::_HELD_OUT]


def _pixels(rows: list[Example]) -> list[Any]:
    return [row.picture.pixels for row in rows if row.picture is not None]


def _in_a(case: Case, rows: list[Example]) -> Any:
    """Which half each image belongs to: half of the images of every class."""
    names, who = np.array([row.answer for row in rows]), np.array(case.clusters(tuple(rows)))
    chosen = np.zeros(len(rows), dtype=bool)
    for name in np.unique(names):
        chosen[names == name] = halves(who[names == name], case.options.seed)
    return chosen


def _original(case: Case, target: ImageTarget) -> ImageTarget:
    """The original beside the target: to keep its states of all patches instead would take more memory."""
    from audit.image_target import ImageTarget

    inventory = case.inventoried("original")
    original = ImageTarget("original", inventory, device=str(target.device), dtype=target.dtype)
    if original.layers != target.layers:
        raise BadInput(f"the original has {original.layers} blocks, the {target.role} model {target.layers}")
    return original


def _nth(arrays: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {key: array[i : i + 1] for key, array in arrays.items()}


# --- what it means ------------------------------------------------------------------------------------------


def _won(evidence: Evidence, role: str, name: str) -> Won:
    """What `probes.restoration_curves` draws."""
    rows = evidence.scores(f"{role}+{_STAGE}", f"restoration/{name}", RESTORED.name)
    plain = [row["match"] for row in evidence.iterate(role, f"restoration/{name}", TOKEN.name)]
    by_kind = {kind: np.concatenate([row[kind] for row in rows]).astype(float) for kind in rows[0]}
    return {"plain": np.array(plain, dtype=float)[:, :, None], **by_kind}


def _dictionaries(evidence: Evidence, roles: tuple[str, ...], of: int) -> list[Control]:
    """Of the target's dictionaries (0), or the original's (1), the worst: on images they were not trained on."""
    explained, recovered, active, n = [], [], [], 0
    for role in (f"{role}+{_STAGE}" for role in roles):
        images = evidence.scores(role, "restoration/dictionaries", DESCRIBED.name)
        known = np.array(evidence.extra(role, "restoration/dictionaries")["known"])
        error, spread, fired, nll = (
            np.concatenate([image[key][:, :, of] for image in images]) for key in ("error", "spread", "active", "nll")
        )
        there = spread.sum(axis=0) > 0  # no class token, nothing to describe
        explained.append(float((1 - error.sum(axis=0)[there] / spread.sum(axis=0)[there]).min()))
        plain, rebuilt, averaged = nll[known].mean(axis=0).T
        recovered.append(float(((averaged - rebuilt) / np.maximum(averaged - plain, 1e-9)).min()))
        active.append(float(fired.mean()))
        n = len(images)
    said = (
        f"at the worst of the blocks, and of class token and patches: explained variance {min(explained):.2f}, and "
        f"{min(recovered):.2f} of the loss on retained images recovered that the mean state would cost (each at least "
        f"{GOOD:g}), on images it was not trained on; {np.mean(active):.1f} features a state"
    )
    return dictionary(min(explained), min(recovered), said, n)


def _two_classes(case: Case) -> list[Control]:
    """Where one class is compared with another: said, for nothing takes off what they differ in."""
    forget, holdout = _classes(case, "forget"), _classes(case, "holdout")
    if forget & holdout:
        return []
    said = (
        f"{', '.join(sorted(forget))} against {', '.join(sorted(holdout))}: one class may be easier to bring back than "
        "another; a retrained model would take that off"
    )
    return [Control(name="one class against another", description=said)]
