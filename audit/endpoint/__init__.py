"""Models behind an OpenAI-compatible API, audited at text access, or at that of log-probabilities.

    audit scan --endpoint http://127.0.0.1:8000/v1 --model NAME --forget forget.jsonl --holdout holdout.jsonl

To the rest of the pipeline an endpoint is one more kind of model: it has an inventory (`probe`: what the server can
be asked, found out by asking), opens as a target, and an engine answers the plan's requests (`target`). Below that
`wire` writes requests and reads answers, trusting none, and `client` carries them: time-outs, retries, rate, budget,
and a file for every answer before anybody reads it. `address` says which server, and is all that a case knows of it.
"""
