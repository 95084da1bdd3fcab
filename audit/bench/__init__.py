"""The bench: what instruments, and verdicts, make of models whose history is known.

    found = rows.run(pool.quick(), Path("bench"), budget="standard")    # builds, scans, keeps one row each
    print(text.markdown(tables.tables(found)))

`pool` says which organisms; `rows` builds and scans them in worker processes and keeps what was found, one file an
organism, so that a bench that was stopped goes on; `tables` turns rows into the two tables, and nothing else (`text`
draws them); `fit` makes a reference profile of them.
"""
