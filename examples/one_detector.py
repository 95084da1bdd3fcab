"""One detector on one model: is a text still familiar to it? Min-K++, as a plain function on arrays.

You will see: how to score texts with a model that you loaded yourself, without an audit; that the forget answers are as
familiar to the original model as its training data; that they look unseen, or less than that, to the unlearned one; and
why a number of one model means nothing before it is compared with that of a model that never saw the texts.

    python examples/one_detector.py [--quick]
"""

# %% A small world, and three models of it whose history is known.

import matplotlib.pyplot as plt
import numpy as np
import torch
from setting import COLOURS, ROLES, setting

from audit.statistics import auc_two_sample
from detectors.membership import min_k_plus_plus

SHOWN = ("forget", "holdout")
here = setting(__doc__)
print(here.rows("forget")[0].prompt, "→", here.rows("forget")[0].answer)


# %% Score one answer: for each of its tokens the log-probability, and its mean and variance over the vocabulary.


@torch.inference_mode()
def familiarity(model, tokenizer, prompt, answer):
    """Min-K++ of an answer after its prompt: in standard deviations, larger = more like training data."""
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(f"{prompt} {answer}")["input_ids"]])
    logp = model(ids).logits[0, start - 1 : -1].log_softmax(-1)  # [answer tokens, vocabulary]
    p = logp.exp()
    mean = (p * logp).sum(-1)
    variance = (p * (logp - mean[:, None]) ** 2).sum(-1)
    of_token = logp.gather(1, ids[0, start:, None])[:, 0]
    return min_k_plus_plus(of_token, mean, variance, k=0.2)


# %% Every row of two sets, under every model. People are the unit of independence, not rows.

scores = {}
for role in ROLES:
    model, tokenizer = here.opened(role)  # transformers' own, nothing of this project
    for name in SHOWN:
        scored = [familiarity(model, tokenizer, row.prompt, row.answer) for row in here.rows(name)]
        scores[role, name] = np.array(scored)

people = {name: [row.entity for row in here.rows(name)] for name in SHOWN}
areas = {}
for role in ROLES:
    pair = scores[role, "forget"], scores[role, "holdout"]
    area = areas[role] = auc_two_sample(*pair, people["forget"], people["holdout"], seed=0)
    print(f"{role:>9}: AUC {area.value:.2f} [{area.lo:.2f}, {area.hi:.2f}], p = {area.p_value:.2g}")

# %% The picture: at each share of unseen answers that one is willing to accuse, what share of forget answers is found?

colours = {"original": COLOURS["retain"], "unlearned": COLOURS["forget"], "retrained": COLOURS["holdout"]}
figure, (curve, bars) = plt.subplots(1, 2, figsize=(7.6, 3.5), width_ratios=(1.15, 1), layout="constrained")
for place, role in enumerate(ROLES):
    cuts = np.sort(np.concatenate([scores[role, name] for name in SHOWN]))[::-1]
    accused, found = ([np.mean(scores[role, name] >= cut) for cut in cuts] for name in ("holdout", "forget"))
    curve.plot([0, *accused], [0, *found], color=colours[role], lw=1.8, ls=("-", "-", "--")[place], label=role)
    area = areas[role]
    bars.plot([area.lo, area.hi], [place, place], color=colours[role], lw=4, alpha=0.45, solid_capstyle="butt")
    bars.plot(area.value, place, "D", color=colours[role])
    bars.annotate(f"{role}: {area.value:.2f}", (area.value, place), (0, 9), textcoords="offset points", ha="center")
curve.plot([0, 1], [0, 1], color="#888888", lw=0.8, ls=":")
curve.set(aspect="equal", xlabel="holdout answers accused", ylabel="forget answers found", title="ROC curves")
curve.legend(loc="lower right")
bars.axvline(0.5, color="#888888", lw=0.8, ls=":")
bars.set(
    xlim=(0, 1), ylim=(2.6, -0.7), yticks=[], xlabel="0.5: cannot be told from unseen", title="area under them, 95 %"
)
figure.suptitle("Min-K++: does the answer look like training data?", x=0.01, ha="left")
here.picture(figure, "one-detector")

# %% What it says. The retrained model never saw either set, and its AUC is near 0.5: the split is fair. The unlearned
# model's answers are no longer familiar. That is all: an edit of its output would do the same, with everything still
# inside. See `sparse_steering.py` for a look inside, and docs/verdicts.md for how an audit puts such things together.
