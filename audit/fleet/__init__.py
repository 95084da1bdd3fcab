"""A fleet: many models on many cases, one record each. `fleet.toml` -> jobs -> Ray -> a shelf of records.

    file.py    what `fleet.toml` says, as a list of jobs: a model and a case each
    shelf.py   where results lie: a folder, or any address that fsspec knows
    run.py     the jobs as tasks of a Ray cluster, this machine's own or another

A job is an ordinary scan and ends in an ordinary record: the very one that `audit scan` makes of the same case on one
thread. The record is also what resumes a fleet: a job whose record is there already is not run again. The page about
all of them is made by `reports.fleet`.
"""
