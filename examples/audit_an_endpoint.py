"""Audit an endpoint: a model that cannot be opened, only asked, through an OpenAI-compatible API.

You will see: a server of sixty lines with vLLM's `prompt_logprobs`, which stands for somebody else's; the same audit at
text access, and at that of log-probabilities with the model's tokenizer; that the original is found out in both; and
that of the unlearned model an endpoint shows little, whatever may be inside.

    python examples/audit_an_endpoint.py [--quick]

From the command line: audit scan --endpoint URL --model NAME [--tokenizer DIR] --forget … --holdout …
"""

# %% A server, so that there is something to ask. It knows nothing of audits.

import json
import threading
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import matplotlib.pyplot as plt
import torch
from setting import COLOURS, setting

from audit.case import Budget, Case, Options
from audit.endpoint.address import Endpoint
from audit.loaders import SetSpec
from audit.scan import scan

NAME = "suspect"
here = setting(__doc__)


@cache
def spelled(tokenizer):
    """Every token as text."""
    return [tokenizer.decode([i]) for i in range(len(tokenizer))]


@torch.inference_mode()
def complete(model, tokenizer, asked):
    """Greedy text after a prompt; of the prompt's own tokens, if asked, how likely each was."""
    words = spelled(tokenizer)
    prompt = asked["prompt"] if isinstance(asked["prompt"], list) else tokenizer(asked["prompt"])["input_ids"]
    logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    tokens = list(prompt)
    for _ in range(asked.get("max_tokens", 16)):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    choice = {"index": 0, "finish_reason": "stop", "text": tokenizer.decode(tokens[len(prompt) :]), "logprobs": None}
    if (count := asked.get("prompt_logprobs")) is not None:
        told = [None]
        for token, at in zip(prompt[1:], logprobs, strict=False):
            best = at.argsort(descending=True).tolist()
            ranks = {i: rank for rank, i in enumerate(best, 1) if rank <= count or i == token}
            values = at.tolist()
            said = {str(i): {"logprob": values[i], "rank": r, "decoded_token": words[i]} for i, r in ranks.items()}
            told.append(said)
        choice["prompt_logprobs"] = told
    usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens) - len(prompt)}
    return {"id": "1", "model": NAME, "choices": [choice], "usage": usage}


@contextmanager
def served(model, tokenizer):
    """The URL of the model's API, while the block runs."""
    alone = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            """Quietly."""

        def do_GET(self):
            """The models there are."""
            self.answer(200, {"object": "list", "data": [{"id": NAME, "object": "model", "max_model_len": 64}]})

        def do_POST(self):
            """Completions; no chat."""
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/completions":
                return self.answer(404, {"error": {"message": f"no {self.path} here"}})
            with alone:
                return self.answer(200, complete(model, tokenizer, asked))

        def answer(self, status, said):
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


# %% The same audit of two models, with and without the tokenizer. Where the folder would stand, there is an endpoint.

few = 42 if here.quick else None  # seven people a set, or all: every row is asked of the server one request an answer
sets = {name: SetSpec(here.set(name), limit=few) for name in ("forget", "retain", "holdout")}
options = Options(budget=Budget.QUICK, template="plain", only=("knowledge", "membership"))
audits = {}
for role in ("original", "unlearned"):
    with served(*here.opened(role)) as url:
        for access, tokenizer in (("text", None), ("logprobs", here.model("retrained"))):
            case = Case.build({"target": Endpoint(url, NAME, tokenizer=tokenizer)}, sets, options, name=role)
            record = audits[role, access] = scan(case, here.out / "audits" / f"endpoint-{role}-{access}")
            ran = {finding.id for finding in record.findings}
            print(f"{role:>9}, {access:>8}: {record.verdict.label.value}, {len(ran)} findings, "
                  f"{len(record.not_run)} that it could not have")  # fmt: skip
print("stated of the endpoint:", *(each for each in record.verdict.limits if each.startswith("target: ")), sep="\n- ")

# %% What cannot be asked is said: every finding that needs more than the endpoint gives, by name.

for row in audits["unlearned", "text"].not_run:
    print(f"not run: {row.instrument}: {row.reason}")

# %% The picture: each finding of each audit, with its interval.

names = [f.id for f in audits["original", "logprobs"].findings if f.id != "membership/privleak"]  # which is in per cent
figure, axes = plt.subplots(1, 2, figsize=(8.2, 0.36 * len(names) + 1.3), sharey=True, layout="constrained")
for axis, access in zip(axes, ("text", "logprobs"), strict=True):
    for role, colour, shift in (("original", COLOURS["retain"], -0.14), ("unlearned", COLOURS["forget"], 0.14)):
        of = {f.id: f for f in audits[role, access].findings}
        for place, name in enumerate(names):
            if name in of and None not in of[name].ci95 and of[name].estimate is not None:
                effect = [value - of[name].null_value for value in (*of[name].ci95, of[name].estimate)]
                axis.plot(effect[:2], [place + shift] * 2, color=colour, lw=3, alpha=0.45, solid_capstyle="butt")
                axis.plot(effect[2], place + shift, "D", color=colour, ms=4, label=role if place == 0 else None)
            elif role == "original":
                axis.text(0.02, place, "not at this access", color="#888888", va="center", fontsize=7)
    axis.axvline(0, color="#888888", lw=0.8, ls=":")
    axis.set(yticks=range(len(names)), yticklabels=names, xlim=(-1, 1.05), title=f"{access} access")
    axis.set_xlabel("forget over holdout; 0: as never taught")
axes[0].invert_yaxis()
handles = [plt.Line2D([], [], color=c, marker="D", ms=4, lw=3, label=r) for r, c in
           (("original", COLOURS["retain"]), ("unlearned", COLOURS["forget"]))]  # fmt: skip
figure.legend(handles=handles, loc="upper right", ncols=2)
figure.suptitle("What an endpoint shows", x=0.01, ha="left")
here.picture(figure, "audit-an-endpoint")

# %% What it says. The original gives its answers away to anyone who asks. The unlearned model does not, and no audit of
# an endpoint can end in `deleted`: nothing inside was looked at, and nothing could be relearned. That is what
# `sparse_steering.py` and a scan of the folder are for.
