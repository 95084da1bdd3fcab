"""The bench: what instruments, and verdicts, make of models whose history is known.

    rows = run(plan("quick"), Path("bench"))        # builds organisms, scans them, keeps one row each
    print(tables.of(rows))

`pool` says which organisms; `rows` builds and scans them in worker processes and keeps what was found, one file an
organism, so that a bench that was stopped goes on; `tables` turns rows into the two tables, and nothing else.
"""
