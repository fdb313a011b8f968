"""The process that holds a model: reads requests as frames on standard input, writes answers on standard output.

One request at a time, since one sequence fits in memory; cancelling and counting tokens go on beside it. It may die
at any moment (ggml ends the process on a failed check): the server lives on. Started by process.py.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from apps.server.asked import Asked
from apps.server.frames import Frame, encode, read_frame
from edgert.errors import EdgertError, to_fields

if TYPE_CHECKING:
    from apps.server.answering import Answering
    from edgert.runtime import Runtime
    from tensorpar.workers import ClusterOptions

# The server sends one request at a time; a few more may be on their way when it cancels.
_MAX_PENDING = 16
# When the server is gone, a running step has this long to notice its cancellation.
_LAST_STEP_S = 10.0


class Worker:
    """Two threads: the main one loads and computes, the other reads frames."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests, self._answers = requests, answers
        self._pending: queue.Queue[Frame | None] = queue.Queue(_MAX_PENDING)
        self._writing, self._lock = threading.Lock(), threading.Lock()
        self._running: tuple[int, Answering] | None = None
        self._cancelled: set[int] = set()
        self._runtime: Runtime | None = None

    def run(self) -> None:
        """Until the server closes the stream."""
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        while (frame := self._pending.get()) is not None:
            if frame["op"] == "load":
                self._attempt(frame, self._load)
            else:
                self._attempt(frame, self._answer)
        if self._runtime is not None:
            self._runtime.close()

    def _read(self) -> None:
        while (frame := read_frame(self._requests)) is not None:
            if frame["op"] == "cancel":
                self._cancel(frame["id"])
            elif frame["op"] == "count":
                self._attempt(frame, self._count)
            elif frame["op"] == "check":
                self._attempt(frame, self._check)
            else:
                self._pending.put(frame)
        with self._lock:
            running = self._running
        if running is not None:
            running[1].cancel()
        threading.Timer(_LAST_STEP_S, os._exit, (1,)).start()
        self._pending.put(None)

    def _attempt(self, frame: Frame, do: Any) -> None:
        """Answer a failure with a frame instead of ending."""
        try:
            do(frame)
        except EdgertError as error:
            self._send({"event": "error", "id": frame["id"], **to_fields(error)})
        except MemoryError:
            self._send({"event": "error", "id": frame["id"], "kind": "OutOfMemory", "message": "out of memory",
                        "next_step": "Ask for a shorter --context, or close other programs.", "fields": {}})
        except Exception as error:
            self._send({"event": "error", "id": frame["id"], "kind": "EdgertError",
                        "message": f"{type(error).__name__}: {error}"[:500],
                        "next_step": "This is a defect in edgert.", "fields": {}})

    def _load(self, frame: Frame) -> None:
        from apps.server.answering import describe
        from edgert.runtime import Runtime

        given = frame["options"]
        store = given.get("kv_store")
        options = {**given, "models_dirs": [Path(one) for one in given["models_dirs"]],
                   "kv_store": None if store is None else Path(store),
                   "cluster": _cluster(given["cluster"])}
        self._runtime = Runtime.load(Path(frame["path"]), **options)
        self._send({"event": "loaded", "id": frame["id"], **describe(self._runtime)})

    def _answer(self, frame: Frame) -> None:
        from apps.server.answering import Answering

        assert self._runtime is not None  # the server loads first
        number = frame["id"]

        def emit(event: Frame) -> None:
            self._send({"id": number, **event})

        answering = Answering(self._runtime, Asked.from_frame(frame["asked"]), emit)
        with self._lock:
            self._running = number, answering
            if number in self._cancelled:
                answering.cancel()
        try:
            answering.run()
        finally:
            with self._lock:
                self._running = None
                self._cancelled.clear()

    def _count(self, frame: Frame) -> None:
        if self._runtime is None:
            raise EdgertError("no model is loaded")
        counts = [len(self._runtime.tokenize(text, add_special=False, parse_special=False)) for text in frame["texts"]]
        self._send({"event": "counted", "id": frame["id"], "counts": counts})

    def _check(self, frame: Frame) -> None:
        from apps.server.answering import Answering

        if self._runtime is not None:
            Answering(self._runtime, Asked.from_frame(frame["asked"]), self._send).check()
        self._send({"event": "checked", "id": frame["id"]})

    def _cancel(self, number: int) -> None:
        with self._lock:
            if self._running is not None and self._running[0] == number:
                self._running[1].cancel()
            else:
                self._cancelled.add(number)

    def _send(self, frame: Frame) -> None:
        data = encode(frame)
        with self._writing:
            self._answers.write(data)
            self._answers.flush()


def _cluster(values: Mapping[str, Any] | None) -> ClusterOptions | None:
    """What LoadOptions.to_frame made of it, as it was."""
    if values is None:
        return None
    from tensorpar.workers import ClusterOptions

    return ClusterOptions(**{**values, "peers": tuple(map(tuple, values["peers"]))})


def main() -> None:
    """Keep standard output for frames alone: whatever else is printed goes to standard error."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        try:
            Worker(sys.stdin.buffer, answers).run()
        except BrokenPipeError:  # the server is gone
            os._exit(1)


if __name__ == "__main__":
    main()
