"""A model's chat template, rendered where it can do no harm: in a process of its own, with little time and memory.

    with Renderer(file, template, special_tokens) as renderer:
        renderer.render("Who wrote Hamlet?")

A template is a program that came with the model. transformers renders it in a sandbox, which keeps it from the
interpreter, but neither from looping for years nor from filling the memory. So it is rendered by the other half of this
module's pair (`audit.rendering_worker`), which may neither write files nor start processes, and is ended when an answer
takes too long. The answer is the text that `apply_chat_template` gives.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audit.errors import Refused

SECONDS = 10.0
_START = 120.0  # importing takes one second, or many where the machine is busy
_LONGEST = 1 << 20
_WORKER = Path(__file__).with_name("rendering_worker.py")


class Renderer:
    """One chat template, and the process that renders it; started with the first prompt.

    Args:
        file: where the template lies, for messages.
        template: its text.
        special: what templates are told of special tokens, by name.
        seconds: how long one rendering may take.
    """

    def __init__(self, file: Path, template: str, special: Mapping[str, Any], seconds: float = SECONDS) -> None:
        self._file, self._seconds = file, seconds
        self._task = {"chat_template": template, "special": dict(special), "longest": _LONGEST}
        self._known: dict[str, str] = {}
        self._fault: Refused | None = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, prompt: str) -> str:
        """The text of a conversation that holds this one message of a user, up to where the answer begins.

        Raises:
            Refused: the template fails, or takes too much time, memory or text. It is not asked again then.
        """
        with self._lock:
            if prompt not in self._known:
                if self._fault is None:
                    self._fault = self._ask(prompt)
                if self._fault is not None:
                    raise self._fault
            return self._known[prompt]

    def _ask(self, prompt: str) -> Refused | None:
        """Learn one rendering, or why there is none."""
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(self._task | {"prompt": prompt}).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(_line(process, self._seconds))
        except TimeoutError:
            return self._end(f"takes more than {self._seconds:g} seconds")
        except (OSError, ValueError):  # it was ended, by the limits that it lives under
            return self._end("ends the process that renders it")
        if "text" not in answer:
            return self._end(f"fails ({answer['error']})")
        self._known[prompt] = answer["text"]
        return None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            # -P: this folder's modules have names that others have too.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )
            weakref.finalize(self, _kill, self._process)
            try:
                _line(self._process, _START)
            except (TimeoutError, OSError, ValueError):
                raise RuntimeError("the process that renders chat templates does not start") from None
        return self._process

    def _end(self, reason: str) -> Refused:
        self.close()
        return Refused(
            f"{self._file}: its chat template {reason}", "remove the template, or audit with --template plain"
        )

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            _kill(self._process)
            self._process = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """What the process says next, of bounded length. Raises TimeoutError, or ValueError if it says too much or ends."""
    assert process.stdout is not None
    said, until = b"", time.monotonic() + seconds
    while not said.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise TimeoutError
        piece = os.read(process.stdout.fileno(), 1 << 16)
        said += piece
        if not piece or len(said) > 8 * _LONGEST:
            raise ValueError
    return said
