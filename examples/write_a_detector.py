"""Write a detector: from a plain function to a finding with its control, and a verdict on it.

You will see: a statistic that asks how sure the model is of its next word, without being told the right one; its
comparison with what was never taught, its interval and its positive control, all of which come from one call; three
audits by it alone, of the original, the unlearned and the retrained model; and why it must not decide by itself.

    python examples/write_a_detector.py [--quick]
"""

# %% First the plain function, on arrays. It can be tested by hand, and used without an audit.

import matplotlib.pyplot as plt
import numpy as np
from setting import COLOURS, ROLES, setting

from audit import asking
from audit.case import Case, Options
from audit.contrast import Statistic, against_never_taught
from audit.instrument import Access, Instrument
from audit.loaders import SetSpec
from audit.quantities import top_k
from audit.record import Question
from audit.scan import scan


def lead(top_logprobs):
    """By how much the likeliest token beats the second, from their log-probabilities [T, 2]: nats, mean over T."""
    likeliest, second = np.asarray(top_logprobs, dtype=float).T
    return float((likeliest - second).mean())


assert lead([[-0.5, -2.5], [-1.0, -2.0]]) == 1.5  # (2 + 1) / 2


# %% Then the instrument: what it asks of the models, and what it makes of the answers.

LEAD = Statistic(
    name="lead",
    words="lead of the likeliest next token over the second",
    unit="nats",
    orientation="the model is surer of what it would say about forgotten subjects",
    bounds=None,
    threshold=0.1,
    reference="an example, 2026",
    decides=(False, False),  # a model that was taught to refuse is sure of itself too
)


class Sure(Instrument):
    """Does the model know what it would say, whatever that is?"""

    name = "sure"
    title = "Is the model sure of what it would say?"
    question = Question.LEAKAGE
    access = Access.LOGPROBS
    reference = LEAD.reference

    def requests(self, case, target):
        """The two likeliest tokens wherever an answer's tokens stand; one pass serves all instruments."""
        return asking.answers(case, target, asking.compared(case, target.role), (top_k(2),))

    def measure(self, case, evidence):
        """Forget rows against rows that were never taught."""

        def score(role, name):
            rows = evidence.iterate(role, f"{name}/answer", top_k(2).name)
            return np.array([lead(row["top_logprobs"]) for row in rows])

        return [against_never_taught(self, case, evidence, LEAD, score)]


# %% Three audits by it. In an installed package an entry point makes it known by name, see examples/plugin.

here = setting(__doc__)
sets = {name: SetSpec(here.set(name)) for name in ("forget", "retain", "holdout")}
found = {}
for role in ROLES:
    case = Case.build({"target": here.model(role)}, sets, Options(template="plain"), name=role)
    record = scan(case, here.out / "audits" / f"sure-{role}", instruments=[Sure()])
    [finding] = found[role] = record.findings
    lo, hi = finding.ci95
    print(f"{role:>9}: {finding.estimate:+.2f} nats [{lo:+.2f}, {hi:+.2f}], {finding.verdict.value}. {finding.reason}")
    print(f"{'':>9}  positive control: {finding.controls[0].estimate:+.2f}, passed: {finding.controls[0].passed}")

# %% The picture: the difference that each finding states, and the rows behind it.

figure, axes = plt.subplots(1, 3, figsize=(7.8, 3.2), sharey=True, layout="constrained")
for axis, role in zip(axes, ROLES, strict=True):
    [finding] = found[role]
    for place, series in enumerate(finding.figure.series if finding.figure else ()):
        spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(series.x))
        axis.plot(place + spread, series.x, ".", color=COLOURS[series.label], alpha=0.35, markersize=4, mew=0)
        axis.plot([place - 0.3, place + 0.3], [np.mean(series.x)] * 2, color=COLOURS[series.label], lw=2)
        label = {"color": COLOURS[series.label], "ha": "center", "transform": axis.get_xaxis_transform()}
        axis.text(place, 1.02, series.label, **label)
    lo, hi = finding.ci95
    axis.set_xlabel(f"{role}\nforget − holdout {finding.estimate:+.1f} [{lo:+.1f}, {hi:+.1f}]")
    axis.set_xticks([])
axes[0].set_ylabel("lead of the likeliest token, nats")
figure.suptitle("How sure is the model of what it would say?", x=0.01, ha="left")
here.picture(figure, "write-a-detector")

# %% What it says. The original is surer of forgotten people than of strangers, as it is of those it kept. The retrained
# one is not: it was told of neither. The unlearned one is surest of all, of something wrong, and by the same statistic
# looks as if it knew. And where its positive control fails, its silence would be worth nothing either. So this detector
# decides nothing alone (`decides`). Where it stands among the others: `audit bench`, docs/bench.md.
