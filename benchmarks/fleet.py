"""A fleet on a Ray cluster of two nodes, one of which is killed in mid-run; every record against that of a single scan.

    python -m benchmarks.fleet FLEET.toml --out WORK [--kill-after 10]

Both nodes are processes of this machine with one worker each; the one without the driver is killed, with all that runs
on it, once so many jobs are done. The single scans follow, each from the `case.toml` that its job kept, one after the
other and without anybody's evidence. Prints a Markdown table. A fleet in WORK is gone on with, and nobody is killed if
it is done already.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch

from audit.case import Case, Options, read_case
from audit.errors import AuditError
from audit.fleet.file import Job, read_fleet
from audit.fleet.run import run
from audit.fleet.shelf import Failure, Shelf
from audit.record import Record
from audit.scan import scan


def where(_: Record) -> str:
    """The node that makes this."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def single(folder: Path, out: Path) -> Record | Failure:
    """The same audit by itself."""
    shutil.rmtree(out, ignore_errors=True)
    name, models, specs, raw = read_case(folder / "case.toml")
    try:
        return scan(Case.build(models, specs, Options.parse(raw, "case"), name), out)
    except AuditError as error:
        return Failure(str(error), error.exit_code)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def main() -> None:
    """Run the fleet, kill the node, compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet")
    parser.add_argument("file", type=Path, metavar="FLEET.toml")
    parser.add_argument("--out", type=Path, required=True, help="where results and evidence go")
    parser.add_argument("--kill-after", type=int, default=10, help="jobs")
    given = parser.parse_args()
    fleet, shelf = read_fleet(given.file), Shelf(str(given.out / "fleet"))

    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    began, done, killed = time.monotonic(), 0, ""

    def told(job: Job, said: str) -> None:
        nonlocal done, killed
        done += 1
        print(f"{done}/{len(fleet.jobs)} {job.name}: {said}", file=sys.stderr, flush=True)
        if done == given.kill_after:
            killed = other.node_id
            cluster.remove_node(other, allow_graceful=False)
            print(f"killed the node {killed}", file=sys.stderr, flush=True)

    work = str(given.out.resolve() / "evidence")
    run(fleet, shelf, told=told, faces={"node.txt": where}, address=cluster.address, work=work)
    seconds = time.monotonic() - began
    cluster.shutdown()
    torch.set_num_threads(1)
    equal, failed, on_killed, tokens, alone = 0, 0, 0, 0, 0
    began = time.monotonic()
    for job in fleet.jobs:
        found = shelf.get(job.folder)
        if not isinstance(found, Record):
            failed += 1
            print(f"no record: {job.name}: {found}")
            continue
        other_record = single(given.out / "fleet" / job.folder, given.out / "single")
        same = isinstance(other_record, Record) and other_record.comparable() == found.comparable()
        print(f"{job.name}: {'equal' if same else 'NOT EQUAL'}", file=sys.stderr, flush=True)
        equal += same
        on_killed += (shelf.read(f"{job.folder}/node.txt") or b"").decode() == killed
        tokens += found.cost.forward_tokens
        alone += other_record.cost.forward_tokens if isinstance(other_record, Record) else 0
    lone = time.monotonic() - began
    jobs = len(fleet.jobs)
    print("| | jobs | records | equal to the single scan's | made on the killed node | tokens | time |")
    print("|---|---|---|---|---|---|---|")
    print(f"| fleet | {jobs} | {jobs - failed} | {equal} | {on_killed} | {tokens:,} | {seconds:.0f} s |")
    print(f"| single scans | {jobs - failed} | {jobs - failed} | | | {alone:,} | {lone:.0f} s |")


if __name__ == "__main__":
    main()
