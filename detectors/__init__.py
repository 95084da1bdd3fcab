"""Detectors: statistics of a model's outputs, for the questions of trace, leakage and utility.

One file per instrument, and in each file two layers: plain functions on numpy arrays, which need no model
and no project, then the instrument that feeds them from captured evidence.

    >>> from detectors.membership import min_k
    >>> min_k([-0.1, -2.0, -0.3, -4.0, -0.2])
    -4.0

- `knowledge`: does the answer still come out (probability, truth ratio, multiple choice, ROUGE)?
- `memorization`: does the very wording still come out (exact match, extraction strength, verbatim runs)?
- `membership`: does the likelihood still tell a forgotten text from one that was never seen?
- `remind`: does the loss landscape around a text still tell forgotten, retained and unseen apart?

Output statistics see an edit of the outputs as readily as a loss of knowledge, so none of these can call a
model clean by itself; each needs the band of a model, or of holdout entities, that never saw the data.

Everywhere, one example is a set of 1-D arrays over its scored (answer) tokens, T >= 1 of them:
`logprob[T]` (log-probability of the true token, nats), `match[T]` (was the true token the most likely?),
`mean[T]` and `variance[T]` (of the log-probability under the model's own distribution). A score that must
tell members from others is larger for likelier members.
"""
