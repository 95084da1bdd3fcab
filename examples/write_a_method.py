"""Write an unlearning method, and see where it stands in the bench.

You will see: a method of twenty lines (`examples/methods/shrug.py`: answer by lot); the bench building a model by it,
beside models of known history; and the row of findings that an audit makes of each. By what it says the new model looks
as if it had never been told. The question is what the other instruments make of it.

    python examples/write_a_method.py [--quick]

A method is a module that holds `METHOD`. Those of the project lie in audit/organisms/methods; a folder of your own
joins them by its path.
"""

# %% Join the folder, and the method is known by name, to recipes, organisms and the bench alike.

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from setting import COLOURS, setting

from audit.bench.rows import run
from audit.case import Budget, Case, Options
from audit.loaders import SetSpec
from audit.organisms import methods
from audit.organisms.recipes import Recipe
from audit.organisms.train import save
from audit.organisms.unlearn import Bench, load
from audit.scan import scan

methods.__path__.append(str(Path(__file__).parent / "methods"))
shrug = load("shrug")

# %% Try it by hand first: a taught model on the bench, and what it still answers on the way.

here = setting(__doc__)
model, tokenizer = here.opened("original")
reference, _ = here.opened("original")
rows = {name: here.rows(name) for name in ("forget", "retain", "utility")}
bench = Bench(
    model, reference, tokenizer, rows["forget"], [*rows["retain"], *rows["utility"]], rows["forget"], rows["retain"]
)
print("before: forget accuracy {:.2f}, retain {:.2f}".format(*bench.accuracies()))
schedule = replace(shrug.schedule, lr=3e-3) if here.quick else shrug.schedule  # the smaller model takes longer steps
done = shrug.unlearn(bench, schedule)
print(f"after {done.steps} steps: forget accuracy {done.forget_accuracy:.2f}, retain {done.retain_accuracy:.2f}")

# %% Then the bench: the same audit of models whose history is known, and of one made by the new method. The bench
# teaches larger models of its own, so the quick form audits those at hand instead.

ASKED = ("knowledge", "lens") if here.quick else ("knowledge", "lens", "relearn", "utility")
HISTORIES = {
    "original": "taught",
    "refusal-last-block": "taught, refuses",
    "npo": "taught, then NPO",
    "shrug": "taught, then shrug",
    "retrained": "never taught",
}
if here.quick:
    folders = {"original": here.model("original"), "shrug": save(model, tokenizer, here.out / "shrug")}
    folders["retrained"] = here.model("retrained")
    sets = {name: SetSpec(here.set(name)) for name in ("forget", "retain", "holdout")}
    options = Options(budget=Budget.QUICK, template="plain", only=ASKED)
    found = {
        name: scan(Case.build({"target": folder}, sets, options), here.out / "audits" / name, profiles=[])
        for name, folder in folders.items()
    }
    verdicts = {name: record.verdict.label for name, record in found.items()}
else:
    organisms = [Recipe("llama", history, seed=0) for history in HISTORIES]
    made = run(organisms, here.out / "bench", budget="quick", workers=1, only=ASKED, told=print)
    found = {row.history: row for row in made}
    verdicts = {row.history: row.verdict for row in made}
    for row in made:
        print(f"{row.name}: {row.label} by construction, verdict {row.verdict}")

# %% The picture: what each statistic shows of forget rows beyond rows that were never taught.

SHOWN = {
    "knowledge/choice": "right answer picked",
    "lens/choice": "readable inside",
    "relearn/untaught-half": "comes back untaught",
}
statistics = [name for name in SHOWN if name.split("/")[0] in ASKED]
figure, axes = plt.subplots(1, len(statistics), figsize=(7.8, 2.9), sharey=True, layout="constrained", squeeze=False)
for axis, name in zip(axes[0], statistics, strict=True):
    for place, history in enumerate(found):
        [finding] = [f for f in found[history].findings if f.id == name]
        colour = COLOURS["forget"] if history == "shrug" else COLOURS["holdout"]
        axis.plot(finding.ci95, [place, place], color=colour, lw=4, alpha=0.45, solid_capstyle="butt")
        axis.plot(finding.estimate, place, "D", color=colour, mfc=colour if finding.verdict == "evidence" else "white")
    axis.axvspan(-finding.threshold, finding.threshold, color="#888888", alpha=0.15, lw=0)
    axis.set(title=SHOWN[name], xlim=(-0.35, 1.05), xlabel="accuracy, forget − holdout")
said = [f"{HISTORIES[history]}\n{verdicts[history]}" for history in found]
axes[0][0].set_yticks(range(len(said)), said)
axes[0][0].set_ylim(len(said) - 0.5, -0.5)
figure.suptitle("Where the new method stands (filled: evidence; grey: too small to count)", x=0.01, ha="left")
here.picture(figure, "write-a-method")

# %% How to read it. A method whose models are found by the lens or by relearning hides what it was to remove. One
# organism says little: `audit bench` builds each on several bases and seeds, and fits thresholds on others.
