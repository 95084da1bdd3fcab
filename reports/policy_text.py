"""How an audit fared against a policy, for a terminal: what failed and why, and how many rules hold."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from audit.policy import PolicyResult
from reports import words
from reports.escape import one_line


def policy_summary(result: PolicyResult) -> RenderableType:
    """One line if every rule holds, else a table of those that do not."""
    failed = [ruling for ruling in result.rulings if not ruling.passed]
    count = words.plural(len(result.rulings), "rule")
    if not failed:
        return Text(f"✓ Policy passed: {count}, all held.", style="green")
    table = Table("it was asked that", "but", box=box.SIMPLE_HEAD, padding=(0, 1))
    for ruling in failed:
        table.add_row(Text(one_line(ruling.rule, 200)), Text(one_line(ruling.reason, 300)))
    return Group(Text(f"✗ Policy failed: {len(failed)} of {count} not held.", style="bold red"), table)
