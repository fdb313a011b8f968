"""Runs requests one after another on one model's process: the queue, loading on demand, unloading when idle.

Knows order, deadlines and cancellation. Does not know HTTP, nor what an answer is for.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from apps.server.asked import Asked, Ended, Event, Prefill, Text, Waiting
from apps.server.measures import Measures
from apps.server.process import ModelProcess
from apps.server.settings import LoadOptions, ServerSettings
from apps.server.shelf import Shelf
from apps.server.turns import Turns
from edgert.errors import EdgertError, QueueFull

_MAX_RETRY_AFTER_S = 120
_TEMPLATE_TOKENS = 64  # what stands around a message, and before the first one


@dataclass(frozen=True, slots=True)
class Loaded:
    """Which model a process holds, and how it was loaded."""

    name: str
    path: Path
    options: LoadOptions
    process: ModelProcess


class Job:
    """One request on its way: iterate for its events (the last one Ended); `cancel` ends it, also while it waits.

    The iteration raises EdgertError. Whoever leaves it early calls `cancel`.
    """

    def __init__(self, name: str, path: Path, client: str, asked: Asked | None) -> None:
        self.name, self.path, self.client, self.asked = name, path, client, asked
        self.cancelled = asyncio.Event()
        self.started_s = time.monotonic()
        self.place = 0
        self._events: asyncio.Queue[Event | EdgertError | None] = asyncio.Queue()  # bounded by the context's length

    def cancel(self) -> None:
        self.cancelled.set()

    def put(self, event: Event | EdgertError | None) -> None:
        """For the host: an event, an error, or the end."""
        self._events.put_nowait(event)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self._events.get()
        if event is None:
            self._events.put_nowait(None)  # for whoever asks again
            raise StopAsyncIteration
        if isinstance(event, EdgertError):
            raise event
        return event


class Host:
    """Use as an async context: one task runs the jobs while it is open."""

    def __init__(self, settings: ServerSettings, shelf: Shelf, measures: Measures) -> None:
        self.shelf, self.measures = shelf, measures
        self.settings = settings
        self.load_options = settings.load
        self.loaded: Loaded | None = None
        self.loading: str | None = None
        self.running: Job | None = None
        self.progress: Event | None = None  # the running job's last word about its prompt or its end
        self._turns: Turns[Job] = Turns(settings.max_waiting)
        self._something = asyncio.Event()
        self._cancelled_waiting: set[asyncio.Task[None]] = set()
        self._mean_s = 5.0  # of a request, for Retry-After

    @property
    def n_waiting(self) -> int:
        return len(self._turns)

    async def submit(self, model: str | None, asked: Asked | None, client: str) -> Job:
        """Queue a request (with `asked` None, only loading). Raises QueueFull and ModelNotFound."""
        if self._turns.is_full:
            self.measures.refused.inc()
            raise QueueFull(self.n_waiting, self._retry_after_s())
        name, path = await self.shelf.find(model)
        job = Job(name, path, client, asked)
        self._turns.add(client, job)
        self._tell_places()
        self._something.set()
        watcher = asyncio.create_task(self._leave_when_cancelled(job), name="leave-queue")
        self._cancelled_waiting.add(watcher)
        watcher.add_done_callback(self._cancelled_waiting.discard)
        return job

    async def ready(self, model: str | None, client: str, options: LoadOptions | None = None) -> Loaded:
        """Load a model (again, where `options` differ) and wait for it. Raises what loading raises."""
        if options is not None:
            self.load_options = options
        job = await self.submit(model, None, client)
        try:
            async for _ in job:
                pass
        finally:
            job.cancel()
        assert self.loaded is not None
        return self.loaded

    async def count_tokens(self, model: str | None, texts: Sequence[str], client: str) -> list[int]:
        """Tokens of each text. Loads the model if it is not; does not wait for the running answer."""
        name, _ = await self.shelf.find(model)
        loaded = self.loaded
        if loaded is None or loaded.name != name or not loaded.process.alive:
            loaded = await self.ready(model, client)
        return await loaded.process.count_tokens(texts)

    async def check(self, job: Job) -> None:
        """For a job that has to wait: refuse now a prompt that would be refused later, if its model is loaded."""
        loaded = self.loaded
        if job.place and job.asked is not None and loaded is not None and loaded.path == job.path and (
                may_overflow(job.asked, loaded.process.info["context_length"])):
            await loaded.process.check(job.asked)

    async def unload(self) -> None:
        """Give the model's memory back now; for an idle host."""
        loaded, self.loaded = self.loaded, None
        if loaded is not None:
            await loaded.process.close()

    def _retry_after_s(self) -> int:
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(self._mean_s * (self.n_waiting + 1) / 4)))

    def _tell_places(self) -> None:
        answering = self.running is not None and self.running.asked is not None  # nobody's answer: only loading
        for place, job in enumerate(self._turns.in_order(), int(answering)):
            if job.place != place:
                job.place = place
                job.put(Waiting(place))

    async def _leave_when_cancelled(self, job: Job) -> None:
        await job.cancelled.wait()
        if self._turns.remove(job):
            job.put(None)
            self._tell_places()

    async def _run(self) -> None:
        while True:
            job = self._turns.take()
            if job is None:
                self._something.clear()
                try:
                    async with asyncio.timeout(self.settings.keep_alive_s):
                        await self._something.wait()
                except TimeoutError:
                    await self.unload()
                    await self._something.wait()
                continue
            await self._do(job)

    async def _do(self, job: Job) -> None:
        self.running, started_s = job, time.monotonic()
        self._tell_places()
        try:
            process = await self._process_for(job)
            if job.asked is not None:
                await self._answer(job, job.asked, process)
        except EdgertError as error:
            self.measures.failed.labels(kind=type(error).__name__).inc()
            job.put(error)
        finally:
            self.running = self.progress = None
            job.put(None)
            job.cancel()  # ends its watcher
            self._mean_s = 0.8 * self._mean_s + 0.2 * (time.monotonic() - started_s)

    async def _answer(self, job: Job, asked: Asked, process: ModelProcess) -> None:
        last_s = 0.0
        async for event in process.answer(asked, job.cancelled):
            now_s = time.monotonic()
            if isinstance(event, Text):
                self.measures.tokens(event.n_tokens, now_s - (last_s or job.started_s), is_first=not last_s)
                last_s, self.progress = now_s, None  # the prompt is read
            elif isinstance(event, Prefill | Ended):
                self.progress = event
                if isinstance(event, Ended):
                    self.measures.ended(event, job.name)
                    used = event.prompt_tokens + event.completion_tokens
                    self.measures.context_used(used / process.info["context_length"])
            job.put(event)

    async def _process_for(self, job: Job) -> ModelProcess:
        loaded = self.loaded
        if loaded is not None and loaded.process.alive and (loaded.path, loaded.options) == (
                job.path, self.load_options):
            return loaded.process
        job.put(Waiting(0, loading=job.name))
        self.loading = job.name
        try:
            await self.unload()
            process = await ModelProcess.load(job.path, self.load_options)
        finally:
            self.loading = None
        self.loaded = Loaded(job.name, job.path, replace(self.load_options), process)
        return process

    async def __aenter__(self) -> Self:
        self._runner = asyncio.create_task(self._run(), name="host")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.running is not None:
            self.running.cancel()
        for job in self._turns.in_order():
            job.cancel()
        self._runner.cancel()
        with suppress(asyncio.CancelledError):
            await self._runner
        for watcher in list(self._cancelled_waiting):
            watcher.cancel()
        await self.unload()


def may_overflow(asked: Asked, context_length: int) -> bool:
    """Whether a prompt can have so many tokens: a token is a byte at least, and a template adds little to a message.
    Counting them takes the model's process milliseconds from whoever is being answered."""
    n_bytes = len(json.dumps(asked.to_frame()))
    return n_bytes + _TEMPLATE_TOKENS * (1 + len(asked.messages)) >= context_length
