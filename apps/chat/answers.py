"""Answers of the chat app: made on the server's side, saved as they grow, followed by any number of pages.

An answer belongs to its message, not to a connection: a page that is reloaded finds it going on. Knows jobs and the
database; does not know HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from apps.chat.database import Database
from apps.chat.records import Chat, Message, Status
from apps.server.asked import Asked, Ended, Event, Prefill, Text, Waiting
from apps.server.fields import Fields
from apps.server.host import Host, Job
from apps.server.openai_requests import read_sampling
from apps.server.replies import Refusal, error_body
from edgert.errors import EdgertError

# What a killed server may lose of an answer that it was writing.
_SAVE_S = 2.0
_MAX_TOKENS = 2**31 - 1
_SUMMARY = ("Summarise the conversation so far, so that it can be continued from the summary alone: what was asked, "
            "what was found and decided, what is still open. Answer with the summary only.")
_STATUSES: Mapping[str, Status] = {"cancelled": "stopped"}


class Running:
    """One answer in the making. Followers read its text from wherever they are: nothing is queued for them."""

    def __init__(self, message: Message, job: Job) -> None:
        self.message, self.job = message, job
        self.text = ""
        self.n_tokens = 0
        self.first_s: float | None = None
        self.progress: Mapping[str, Any] | None = None
        self.end: Mapping[str, Any] | None = None
        self._changed = asyncio.Event()

    def note(self, event: Event) -> None:
        """Take what came from the model."""
        if isinstance(event, Text):
            self.first_s = self.first_s or time.monotonic()
            self.text += event.text
            self.n_tokens += event.n_tokens
            self.progress = None
        elif isinstance(event, Prefill | Waiting):
            self.progress = {"kind": type(event).__name__.lower(), **asdict(event)}
        self.changed()

    def changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @property
    def tokens_per_s(self) -> float | None:
        if self.first_s is None or self.n_tokens < 2:
            return None
        return round((self.n_tokens - 1) / max(1e-6, time.monotonic() - self.first_s), 2)

    async def follow(self) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        """Named events: the text so far, what is added, progress, and the end."""
        n_sent, progress = len(self.text), None
        yield "snapshot", {"content": self.text}
        while True:
            changed = self._changed
            if len(self.text) > n_sent:
                added, n_sent = self.text[n_sent:], len(self.text)
                yield "delta", {"text": added, "n_tokens": self.n_tokens, "tokens_per_second": self.tokens_per_s}
            elif self.progress is not None and self.progress != progress:
                progress = self.progress
                yield "progress", progress
            elif self.end is not None:
                yield "end", self.end
                return
            else:
                await changed.wait()


class Answers:
    """All answers in the making. `close` stops them; what they have said is saved."""

    def __init__(self, host: Host, database: Database) -> None:
        self._host, self._database = host, database
        self._running: dict[str, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def running(self, message_id: str) -> Running | None:
        return self._running.get(message_id)

    async def start(self, chat: Chat, parent_id: str, client: str, *, model: str | None = None) -> Message:
        """A new answer to the message `parent_id`, beside those that it has. Raises QueueFull, ModelNotFound."""
        branch = await self._database.do(lambda store: store.branch(parent_id))
        if branch[-1].chat_id != chat.id or branch[-1].role != "user":
            raise Refusal(400, "only a user's message can be answered")
        job = await self._host.submit(model or chat.model, asked_of(chat, branch), client)
        return await self._begin(chat, parent_id, job)

    async def summarise(self, chat: Chat, leaf_id: str, client: str) -> tuple[Chat, Message]:
        """A new chat that begins with a summary of this one, made by the model from as much as it can read."""
        branch = await self._database.do(lambda store: store.branch(leaf_id))
        asked = asked_of(chat, branch, then=_SUMMARY)
        job = await self._host.submit(chat.model, asked, client)
        new = await self._database.do(lambda store: store.create_chat(f"{chat.title} (continued)"[:200], chat.system,
                                                                      chat.model, chat.settings))
        request = "Summarise our conversation so far."
        first = await self._database.do(lambda store: store.add_message(new.id, None, "user", request))
        return new, await self._begin(new, first.id, job)

    async def _begin(self, chat: Chat, parent_id: str, job: Job) -> Message:
        try:
            message = await self._database.do(lambda store: store.add_message(
                chat.id, parent_id, "assistant", "", status="writing", model=job.name))
        except BaseException:
            job.cancel()
            raise
        running = self._running[message.id] = Running(message, job)
        task = asyncio.create_task(self._write(running), name="answer")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return message

    async def _write(self, running: Running) -> None:
        """Follow the job to its end, whoever looks on, and save."""
        status: Status = "stopped"
        error: Mapping[str, Any] | None = None
        figures: Mapping[str, Any] | None = None
        saved_s = time.monotonic()
        try:
            async for event in running.job:
                running.note(event)
                if isinstance(event, Ended):
                    status, figures = _STATUSES.get(event.finish_reason, "done"), self._figures(event)
                elif time.monotonic() - saved_s > _SAVE_S:
                    saved_s = time.monotonic()
                    await self._save(running, "writing")
        except EdgertError as raised:
            status, error = "failed", error_body(raised)["error"]
        finally:
            running.job.cancel()
            await asyncio.shield(self._save(running, status, error, figures))
            with suppress(EdgertError):
                running.message = await self._database.do(lambda store: store.message(running.message.id))
            running.end = {"message": running.message.to_dict()}
            running.changed()
            del self._running[running.message.id]

    async def _save(self, running: Running, status: Status, error: Mapping[str, Any] | None = None,
                    figures: Mapping[str, Any] | None = None) -> None:
        message_id, text = running.message.id, running.text
        await self._database.do(lambda store: store.write(message_id, text, status, model=running.job.name, error=error,
                                                          figures=figures))

    def _figures(self, event: Ended) -> Mapping[str, Any]:
        loaded = self._host.loaded
        return {"prompt_tokens": event.prompt_tokens, "completion_tokens": event.completion_tokens,
                "cached_tokens": event.cached_tokens, "timings": event.timings, "finish_reason": event.finish_reason,
                "memory": event.memory, "left_out": event.left_out,
                "context_length": loaded.process.info["context_length"] if loaded else None}

    def stop(self, message_id: str) -> bool:
        """End an answer within one token; whether there was one."""
        running = self._running.get(message_id)
        if running is not None:
            running.job.cancel()
        return running is not None

    async def close(self) -> None:
        for running in list(self._running.values()):
            running.job.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)
        for task in list(self._tasks):
            task.cancel()


def asked_of(chat: Chat, branch: Sequence[Message], then: str | None = None) -> Asked:
    """What the model is asked: the system prompt, the branch, the chat's parameters; perhaps one request more, which
    is then about as many of the turns as the model can read.

    Answers that failed before they said anything are passed over.
    """
    messages = [{"role": "system", "content": chat.system}] if chat.system.strip() else []
    messages += [{"role": one.role, "content": with_files(one)} for one in branch if one.content or one.attachments]
    if then is not None:
        messages.append({"role": "user", "content": then})
    settings = Fields(chat.settings, "settings")
    return Asked(messages=tuple(messages), sampling=read_sampling(settings),
                 max_tokens=settings.whole("max_tokens", 1, _MAX_TOKENS),
                 keep_oldest=then is None and not settings.flag("leave_out"))


def with_files(message: Message) -> str:
    """A message's text with its files before it, each under its name."""
    files = [f"File {one.name}:\n\n{one.content}\n\n(end of {one.name})\n\n" for one in message.attachments]
    return "".join(files) + message.content
