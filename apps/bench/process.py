"""Starts a contender's process, asks it, and ends it. Every wait has a deadline, and ends when it is stopped."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from edgert.errors import ComputeError, EdgertError, from_fields

# A prompt on a device that is too slow for its model takes half an hour; what takes longer hangs.
ANSWER_DEADLINE_S = 3600.0
_END_DEADLINE_S = 10.0
_MAX_LINE_BYTES = 64 * 2**20  # of an answer: a few numbers for each token


class Stopped(Exception):
    """Somebody stopped the measurement while an answer was awaited."""


class ContenderCrashed(ComputeError):
    """A contender's process has ended by itself."""

    def __init__(self, who: str, how: str, next_step: str = "Give it more memory, or try another model file.") -> None:
        super().__init__(f"{who}'s process {how}", next_step)


class ContenderProcess:
    """One contender's process. One question at a time; `stop` may come from any thread or from a signal."""

    def __init__(self, name: str, *, groups: Sequence[Path] = (), verbosity: int = 0, log_json: bool = False) -> None:
        """Start it, in the control groups whose `cgroup.procs` these are."""
        self.name, self._buffer, self._stopped = name, b"", False
        command = [sys.executable, "-P", "-m", "apps.bench.worker", str(verbosity), "1" if log_json else "0",
                   str(os.getpid())]
        if groups:  # a shell enters them, so that every byte of what it becomes is counted
            enter = "".join('echo $$ > "$1" && shift && ' for _ in groups)
            command = ["/bin/sh", "-c", f'{enter}exec "$@"', "sh", *map(str, groups), *command]
        search_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": search_path},
            start_new_session=True)  # Ctrl-C on the terminal is for whoever asks

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, op: str, deadline_s: float = ANSWER_DEADLINE_S, **asked: Any) -> dict[str, Any]:
        """The answer. Raises the EdgertError that it was, ContenderCrashed, and Stopped after `stop`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"op": op, **asked}).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._read_line(deadline_s))
        except (BrokenPipeError, EOFError):
            raise self._how_it_ended() from None
        if "error" in answer:
            raise from_fields(answer["error"])
        return dict(answer)

    def _read_line(self, deadline_s: float) -> bytes:
        assert self._process.stdout is not None
        pipe, deadline = self._process.stdout.fileno(), time.monotonic() + deadline_s
        while b"\n" not in self._buffer:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.stop()
                raise EdgertError(f"{self.name} has not answered for {deadline_s:.0f} s", "Ask for smaller tests.")
            part = os.read(pipe, 2**16)
            if not part or len(self._buffer) > _MAX_LINE_BYTES:
                raise EOFError
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _how_it_ended(self) -> Exception:
        if self._stopped:
            return Stopped()
        try:
            status = self._process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return ContenderCrashed(self.name, "does not answer")
        if status == -signal.SIGKILL:
            return ContenderCrashed(self.name, "was killed (out of memory?)")
        how = f"ended with status {status}" if status >= 0 else f"was ended by {signal.Signals(-status).name}"
        return ContenderCrashed(self.name, how)

    def stop(self) -> None:
        """End it at once; whoever waits for an answer gets Stopped."""
        self._stopped = True
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let it end in order, or by force. Safe to call twice."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(_END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.stop()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
