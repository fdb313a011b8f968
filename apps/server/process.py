"""The server's side of a model's process: starts it, sends frames, gives each answer's events, notices its death.

Knows asyncio and the protocol of worker.py. Does not know who asks, nor when a model should be loaded (host.py).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from apps.server.asked import Asked, Ended, Event, Prefill, Text, ToolCall
from apps.server.frames import Frame, encode, receive
from apps.server.settings import LoadOptions
from edgert.errors import EdgertError, ModelCrashed, from_fields

# A model of 100 GiB from a slow disk; beyond this, nobody waits any more.
_LOAD_DEADLINE_S = 15 * 60.0
# Without any frame at all: a token of a model that streams from a slow card takes a minute, a prefill ticks.
_SILENCE_DEADLINE_S = 10 * 60.0
# ggml looks for a cancellation between two operations.
_CANCEL_DEADLINE_S = 30.0
_COUNT_DEADLINE_S = 60.0
_CLOSE_DEADLINE_S = 5.0


class ModelProcess:
    """One process with one loaded model. `pid` and `info` (worker's `describe`, as of the last answer) are
    there while it lives."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._number = 0
        self._mailboxes: dict[int, asyncio.Queue[Frame]] = {}
        self._reader = asyncio.create_task(self._read(), name="model-frames")
        self._crash: ModelCrashed | None = None
        self.info: Frame = {}

    @classmethod
    async def load(cls, path: Path, options: LoadOptions) -> Self:
        """Start a process and load `path` there. Raises what Runtime.load raises, and ModelCrashed."""
        search_path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "apps.server.worker", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, env={**os.environ, "PYTHONPATH": search_path},
            start_new_session=True)  # Ctrl-C on the terminal is for the server, which then ends the process in order
        self = cls(process)
        try:
            self.info = await self._ask({"op": "load", "path": str(path), "options": options.to_frame()},
                                        _LOAD_DEADLINE_S)
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._crash is None

    async def answer(self, asked: Asked, cancelled: asyncio.Event) -> AsyncIterator[Event]:
        """The events of one answer, the last one Ended. Raises EdgertError of any kind, ModelCrashed among them.

        Setting `cancelled` ends it within one token, still with Ended.
        """
        number, mailbox = self._open()
        canceller = asyncio.create_task(self._cancel_when(cancelled, number), name="cancel")
        try:
            self._write({"op": "answer", "id": number, "asked": asked.to_frame()})
            while True:
                frame = await self._next(mailbox, _SILENCE_DEADLINE_S)
                event = _event(frame)
                if isinstance(event, Ended):
                    self.info |= {"plan": event.plan, "memory": event.memory}
                    yield event
                    return
                yield event
        finally:
            canceller.cancel()
            del self._mailboxes[number]

    async def _cancel_when(self, cancelled: asyncio.Event, number: int) -> None:
        await cancelled.wait()
        self._write({"op": "cancel", "id": number})
        await asyncio.sleep(_CANCEL_DEADLINE_S)
        self._kill("does not stop")

    async def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, without a template; also while an answer is made."""
        counts = (await self._ask({"op": "count", "texts": list(texts)}, _COUNT_DEADLINE_S))["counts"]
        return [int(count) for count in counts]

    async def check(self, asked: Asked) -> None:
        """Raise what the request would be refused with: a prompt that is too long, a template that fails."""
        await self._ask({"op": "check", "asked": asked.to_frame()}, _COUNT_DEADLINE_S)

    async def close(self) -> None:
        """End the process: in order if it does so soon, else by force. Safe to call twice."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                await self._process.wait()
        except TimeoutError:
            self._kill("does not end")
            await self._process.wait()
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader

    def _kill(self, how: str) -> None:
        self._crash = self._crash or ModelCrashed(how)
        if self._process.returncode is None:
            with suppress(ProcessLookupError):  # not Process.kill, which may swallow the status that tells how it ended
                os.kill(self._process.pid, signal.SIGKILL)

    def _open(self) -> tuple[int, asyncio.Queue[Frame]]:
        self._number += 1
        mailbox: asyncio.Queue[Frame] = asyncio.Queue()  # bounded by the context: an answer cannot be longer
        self._mailboxes[self._number] = mailbox
        return self._number, mailbox

    async def _ask(self, frame: Frame, deadline_s: float) -> Frame:
        number, mailbox = self._open()
        try:
            self._write({**frame, "id": number})
            return await self._next(mailbox, deadline_s)
        finally:
            del self._mailboxes[number]

    def _write(self, frame: Frame) -> None:
        stdin = self._process.stdin
        if self._crash is not None:
            raise self._crash
        if stdin is not None and not stdin.is_closing():
            stdin.write(encode(frame))  # a request at a time: what is buffered is bounded by the largest of them

    async def _next(self, mailbox: asyncio.Queue[Frame], deadline_s: float) -> Frame:
        try:
            async with asyncio.timeout(deadline_s):
                frame = await mailbox.get()
        except TimeoutError:
            self._kill("does not answer")
            raise ModelCrashed("does not answer") from None
        if frame["event"] == "error":
            raise from_fields(frame)
        return frame

    async def _read(self) -> None:
        """Hand each frame to whoever waits for it; at the end, tell all of them."""
        assert self._process.stdout is not None
        with suppress(EdgertError):
            while (frame := await receive(self._process.stdout)) is not None:
                mailbox = self._mailboxes.get(frame.get("id", 0))
                if mailbox is not None:  # whoever asked may have gone
                    mailbox.put_nowait(frame)
        try:
            async with asyncio.timeout(_CLOSE_DEADLINE_S):
                self._crash = ModelCrashed(_how(await self._process.wait()))
        except TimeoutError:  # it lives, but does not keep to the protocol
            self._kill("has broken its protocol")
            await self._process.wait()
        crash = self._crash or ModelCrashed("has ended")
        for mailbox in self._mailboxes.values():
            mailbox.put_nowait({"event": "error", "kind": "ModelCrashed", "message": crash.message,
                                "next_step": crash.next_step, "fields": {"how": crash.how}})


def _how(status: int) -> str:
    if status >= 0:
        return f"has ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    return f"was ended by {name}" + (" (perhaps the machine was out of memory)" if name == "SIGKILL" else "")


def _event(frame: Mapping[str, Any]) -> Event:
    match frame["event"]:
        case "text":
            return Text(frame["text"], frame["n_tokens"], frame.get("logprobs"))
        case "prefill":
            return Prefill(frame["n_done"], frame["n_total"], frame["n_cached"], frame["time_ms"])
        case "tool_call":
            return ToolCall(frame["name"], frame["arguments"])
        case "ended":
            return Ended(frame["finish_reason"], frame["prompt_tokens"], frame["completion_tokens"],
                         frame["cached_tokens"], frame["timings"], frame["memory"], frame["plan"], frame["left_out"])
    raise ModelCrashed("has broken its protocol")
