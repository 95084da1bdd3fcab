"""What other tools write, read; and what an audit found, written as they would write it.

- `logs`: results of open-unlearning, TOFU, MUSE and the lm-evaluation-harness, and records, as one kind of log
- `captures`: captured arrays as Parquet files

    from audit.interchange.logs import read_log, truth_ratios
    from detectors.knowledge import forget_quality

    d, p = forget_quality(truth_ratios(read_log("audit-out")), truth_ratios(read_log("retain90/TOFU_EVAL.json")))

A log says what was measured, and not how: template, precision, rows and scored tokens are the writer's own. Only who
knows that these agree can compare two logs.
"""
