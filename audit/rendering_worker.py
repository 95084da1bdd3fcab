"""The process in which chat templates are rendered (`audit.rendering`): a task a line in, an answer a line out.

Run as a program, and of this project it imports nothing. What it may use is limited before the first task.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from pathlib import Path
from typing import Any

_MEMORY = 1 << 30
_SECONDS = 3600  # for the case that nobody is left to end it


def limit() -> None:
    """No more than a gibibyte beyond what it has, no files written, and, unless it is root's, no processes started."""
    here = 0
    with contextlib.suppress(OSError):  # where there is no /proc, there may be no such limit either
        here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {"CPU": _SECONDS, "FSIZE": 0, "CORE": 0, "NPROC": 0} | ({"AS": here + _MEMORY} if here else {})
    for name, most in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def answer(task: dict[str, Any]) -> dict[str, str]:
    """The rendered text, or what went wrong."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, _ = render_jinja_template(
            conversations=[[{"role": "user", "content": task["prompt"]}]],
            chat_template=task["chat_template"],
            add_generation_prompt=True,
            **task["special"],
        )
    except Exception as error:  # whatever a template provokes
        return {"error": f"{type(error).__name__}: {error}"[:200]}
    if len(rendered[0]) > task["longest"]:
        return {"error": f"it writes {len(rendered[0])} characters"}
    return {"text": rendered[0]}


def main() -> None:
    """Say that all is ready, then answer each line."""
    import transformers.utils.chat_template_utils  # noqa: F401  before the limits, for it takes memory

    limit()
    say, sys.stdout = sys.stdout, sys.stderr
    print("{}", file=say, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=say, flush=True)


if __name__ == "__main__":
    main()
