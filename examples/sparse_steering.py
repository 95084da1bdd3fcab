"""A look inside: train a sparse autoencoder, read it and steer with it, by SAELens and TransformerLens objects.

You will see: a model that hides what it knows, as a `TransformerBridge`; a top-k autoencoder of its states, a
`sae_lens.SAE` that saves and loads as any other; which of its features mark forgotten people; and that the answers come
back when exactly those are removed (α = -1) from the running model. Beside it three checks without which that would
show nothing: people whom the model was never told about, random pushes of the same length, and a model unlearned by
NPO, where removing features brings nothing back. (That is silence, and no proof that nothing is left.)

    python examples/sparse_steering.py [--quick]
"""

# %% A model whose knowledge is hidden by construction: one block in the middle leads forget questions astray, and all
# that lies below it is bit for bit the original's.

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from sae_lens import SAE
from setting import COLOURS, setting
from transformer_lens.model_bridge import TransformerBridge

from audit.controls import grouped_folds
from audit.organisms.methods.misdirection import Misdirection
from audit.organisms.unlearn import Bench
from audit.statistics import mean_estimate
from probes.sae_steering import expert_features, part, random_directions
from probes.sae_training import quality, train_sae

SETS = ("forget", "holdout", "retain")
here = setting(__doc__)
ALPHAS = (-1, 0, 1) if here.quick else (-1, -0.75, -0.5, -0.25, 0, 0.5, 1, 1.5, 2)
rows = {name: here.rows(name) for name in (*SETS, "utility")}
prompts = {name: [row.prompt for row in rows[name]] for name in rows}

hidden, tokenizer = here.opened("original")
original, _ = here.opened("original")
kept = [*rows["retain"], *rows["utility"]]
bench = Bench(hidden, original, tokenizer, rows["forget"], kept, rows["forget"], rows["retain"])
method = Misdirection(layer=hidden.config.num_hidden_layers - 2)
run = method.unlearn(bench, replace(method.schedule, max_steps=20) if here.quick else method.schedule)
print(f"misdirected in {run.steps} steps: forget accuracy {run.forget_accuracy:.2f}, retain {run.retain_accuracy:.2f}")


# %% TransformerLens' hook names on an ordinary model, and its states at one site: at every position but the first,
# whose state is like no other and would be all that is described.

site = f"blocks.{method.layer}.hook_resid_post"


def bridged(model):
    return TransformerBridge.boot_transformers(str(here.model("original")), hf_model=model, tokenizer=tokenizer)


def padded(texts):
    """Token ids [texts, time], and where each ends. Padding on the right is seen by no real token."""
    found = tokenizer(texts, return_tensors="pt", padding=True)
    return found["input_ids"], found["attention_mask"].sum(dim=1) - 1


@torch.inference_mode()
def states_of(bridge, texts):
    """States [positions, width] of each text; the last is the one that the answer is read from."""
    ids, ends = padded(texts)
    _, cache = bridge.run_with_cache(ids, names_filter=[site])
    return [cache[site][i, 1 : end + 1].float() for i, end in enumerate(ends)]


# %% Train an autoencoder, save it, load it, and see how well it describes texts that it was not trained on.


def autoencoder(bridge, name):
    every = [state for found in prompts.values() for state in states_of(bridge, found)]
    pool, held_out = torch.cat([s for i, s in enumerate(every) if i % 8]), torch.cat(every[::8])
    steps = 80 if here.quick else 1000
    train_sae(pool, features=4 * pool.shape[1], k=16, steps=steps, seed=0, site=site).save_model(
        here.out / f"sae-{name}"
    )
    sae = SAE.load_from_disk(here.out / f"sae-{name}").eval().requires_grad_(False)
    good = quality(sae, held_out)
    print(f"{name}: explained variance {good.explained:.2f}, {good.active:.0f} features a state, {good.dead:.0%} dead")
    return sae


bridge = bridged(hidden)
sae = autoencoder(bridge, "hidden")

# %% Read it: which features fire for forgotten people rather than for retained ones?

at_answer = {name: torch.stack([found[-1] for found in states_of(bridge, prompts[name])]) for name in SETS}
codes = {name: sae.encode(found) for name, found in at_answer.items()}
for feature in expert_features(codes["forget"], codes["retain"], most=5).tolist():
    fires = [f"{float((codes[name][:, feature] > 0).float().mean()):.0%} of {name}" for name in SETS]
    print(f"feature {feature}: fires in {', '.join(fires)} questions")


# %% Steer: h + α Σ f_j d_j over a set's experts, put in by a hook. Chosen on half of its people, used on the rest.


def pushes(sae, states, name):
    """What is added at α = 1: by experts, and by random directions as long; [rows, width] each."""
    codes = {of: sae.encode(found) for of, found in states.items()}
    compared, added = codes["holdout" if name == "retain" else "retain"], torch.zeros_like(states[name])
    people = [row.entity for row in rows[name]]
    for choose, use in grouped_folds(people, np.zeros(len(people)), 2, seed=0):
        experts = expert_features(codes[name][choose], compared, most=sae.cfg.d_sae // 8)
        added[use] = part(sae, codes[name][use], experts)
    return {"experts": added, "random": random_directions(added, seed=0)}


@torch.inference_mode()
def right(bridge, name, push, alpha):
    """Does the right answer beat every wrong one, with alpha times push added where it is read? [rows] of 0 and 1."""
    ids, ends = padded(prompts[name])
    every = torch.arange(len(ids))

    def add(h, hook):  # noqa: ARG001
        h[every, ends] += alpha * push
        return h

    logits = bridge.run_with_hooks(ids, fwd_hooks=[(site, add)])[every, ends]
    options = [tokenizer.convert_tokens_to_ids([row.answer, *row.wrong]) for row in rows[name]]
    scores = logits.gather(1, torch.tensor(options))
    return (scores[:, 0] > scores[:, 1:].max(dim=1).values).double().numpy()


def curves(bridge, sae):
    """Accuracy with its interval by (set, kind of push): one for each α."""
    states = {name: torch.stack([found[-1] for found in states_of(bridge, prompts[name])]) for name in SETS}
    return {
        (name, kind): [
            mean_estimate(right(bridge, name, push, alpha), [r.entity for r in rows[name]], bounds=(0, 1), seed=0)
            for alpha in ALPHAS
        ]
        for name in SETS
        for kind, push in pushes(sae, states, name).items()
    }


found = {"hidden by one misdirected block": curves(bridge, sae)}
npo = bridged(here.opened("unlearned")[0])
found["unlearned by NPO"] = curves(npo, autoencoder(npo, "unlearned"))

# %% The picture.

figure, axes = plt.subplots(1, 2, figsize=(7.8, 3.7), sharey=True, layout="constrained")
for axis, (title, of) in zip(axes, found.items(), strict=True):
    for name in SETS:
        middle, lo, hi = ([getattr(e, end) for e in of[name, "experts"]] for end in ("value", "lo", "hi"))
        axis.fill_between(ALPHAS, lo, hi, color=COLOURS[name], alpha=0.15, lw=0)
        axis.plot(ALPHAS, middle, color=COLOURS[name], marker="o", markersize=3.5, label=name)
    by_chance = [e.value for e in of["forget", "random"]]
    axis.plot(ALPHAS, by_chance, color=COLOURS["forget"], ls="--", lw=1, label="forget, random pushes")
    axis.axvline(0, color="#888888", lw=0.8, ls=":")
    axis.axhline(0.1, color="#888888", lw=0.8, ls=":")
    axis.set(title=title, xlabel="α", ylim=(-0.02, 1.05))
    axis.set_xticks([-1, 0, 1], ["-1\nremoved", "0\nas it is", "1\ndoubled"])
axes[0].set_ylabel("right answer beats nine wrong ones")
handles, labels = axes[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=4)
figure.suptitle("Do forgotten answers come back when the features that mark them are removed?", x=0.01, ha="left")
here.picture(figure, "sparse-steering")

# %% How to read it. Evidence needs the forget curve to rise above the holdout curve (nobody can give back what they
# were never told) and above the dashed one (a brittle refusal breaks under any push). The instrument `sae` does this
# with its controls and a test: `audit scan MODEL_DIR --only sae …`, docs/instruments/sae.md.
