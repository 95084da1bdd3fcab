"""What Palimpsest costs, as ratios of two times (or of memory over model size) taken in one run on one machine.

    python -m benchmarks                      # all of them; the first run also builds the models
    python -m benchmarks capture remind       # some of them
    python -m benchmarks --json > ratios.json

- `scan`: a scan's wall time over the passes through the models that no scan could do without (aim: at most 1.3).
- `capture`: one text at a time in plain transformers over the engine, at equal numbers (aim: at least 4).
- `bridge`: TransformerLens' `run_with_cache` over the engine, for the states after all blocks.
- `remind`: REMIND's passes without shared prefixes, and one text at a time, over the passes with them.
- `streaming`: the states after all blocks of 1,000 passages, captured to disk, over the plain passes (aim: at most
  1.3), and peak memory by number of passages (aim: no growth).
- `memory`: a scan's peak memory over the bytes of the model's weights.

Apart from these, `python -m benchmarks.parity` compares numbers: ours beside independent implementations.

Sides that are compared take turns, `--repeats` times each after one round that does not count, and the ratio is
that of their medians; beside it stand the least and the greatest ratio of one turn, which show how quiet the
machine was. Threads are what torch takes by default. Every difference in numbers is measured in the same run.
Models are built once and kept in `--work`. `--small` shrinks everything, to see that it works: no numbers for the
record.
"""
