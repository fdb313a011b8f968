"""Chats as files: Markdown for people, JSON for taking them elsewhere and back. Pure functions.

An imported file is a stranger's: every value is checked, and everything gets a new id.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from apps.chat.records import Attachment, Chat, Message, Role, Status
from apps.chat.store import new_id, now_ms
from apps.server.fields import Fields
from edgert.errors import InvalidRequest

FORMAT, VERSION = "edgert-chats", 1
MAX_CHATS, MAX_MESSAGES = 10_000, 20_000
_MAX_TITLE_CHARS, _MAX_NAME_CHARS = 200, 255
_MAX_MS = 2**53
_FENCE = re.compile(r"^\s*(`{3,})", re.MULTILINE)


def to_json(chats: Iterable[tuple[Chat, Sequence[Message]]]) -> dict[str, Any]:
    """Everything, all branches and the texts of attached files included."""
    return {"format": FORMAT, "version": VERSION, "chats": [
        {**chat.to_dict(), "messages": [
            {**one.to_dict(), "attachments": [{"name": file.name, "content": file.content, "n_tokens": file.n_tokens}
                                              for file in one.attachments]}
            for one in messages]} for chat, messages in chats]}


def to_markdown(chat: Chat, branch: Sequence[Message]) -> str:
    """The branch that is shown, with who said what, and how fast."""
    parts = [f"# {_line(chat.title)}"]
    if chat.system.strip():
        parts.append("\n".join(f"> {line}" for line in ("**System prompt**", "", *chat.system.splitlines())))
    for one in branch:
        at = datetime.fromtimestamp(one.created_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
        who = "You" if one.role == "user" else f"Assistant ({_line(one.model)})" if one.model else "Assistant"
        parts.append(f"## {who}, {at}")
        parts += [f"**File {_line(file.name)}**\n\n{_fenced(file.content)}" for file in one.attachments]
        parts.append(one.content)
        if one.figures is not None:
            parts.append(_figures(one.figures))
        if one.status in ("stopped", "interrupted", "failed"):
            parts.append(f"*({one.status})*")
    return "\n\n".join(parts) + "\n"


def _figures(figures: Mapping[str, Any]) -> str:
    speed = figures.get("timings", {}).get("predicted_per_second")
    return f"*{figures.get('completion_tokens')} tokens" + (f", {speed:.1f} tokens/s*" if speed else "*")


def _fenced(text: str) -> str:
    """In a fence that is longer than any inside."""
    longest = max((len(fence) for fence in _FENCE.findall(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def from_json(body: Any) -> list[tuple[Chat, list[Message]]]:
    """The chats of an exported file, with new ids. Raises InvalidRequest for anything else."""
    fields = Fields(body)
    if fields.raw("format") != FORMAT or fields.whole("version", 1, VERSION) is None:
        raise InvalidRequest("the file holds no chats of edgert", f"Export one with version {VERSION} of the format.")
    return [_chat(one, f"chats[{i}]") for i, one in enumerate(fields.items("chats", MAX_CHATS))]


def _chat(value: Any, where: str) -> tuple[Chat, list[Message]]:
    fields, chat_id = Fields(value, where), new_id()
    ids: dict[str, str] = {}
    messages = [_message(one, f"{where}.messages[{i}]", chat_id, ids)
                for i, one in enumerate(fields.items("messages", MAX_MESSAGES))]
    settings = fields.raw("settings") if fields.has("settings") else {}
    Fields(settings, f"{where}.settings")
    leaf = ids.get(fields.text("leaf_id", "") or "", messages[-1].id if messages else None)
    created_ms = fields.whole("created_ms", 0, _MAX_MS, now_ms()) or now_ms()
    chat = Chat(chat_id, fields.text("title", "", _MAX_TITLE_CHARS) or "Imported chat", fields.text("system", "") or "",
                fields.text("model", None, 4096), settings, leaf, created_ms,
                fields.whole("updated_ms", 0, _MAX_MS, created_ms) or created_ms)
    return chat, messages


def _message(value: Any, where: str, chat_id: str, ids: dict[str, str]) -> Message:
    fields = Fields(value, where)
    old, parent = fields.required_text("id", 64), fields.text("parent_id", None, 64)
    if old in ids or (parent is not None and parent not in ids):
        raise fields.wrong("parent_id" if old not in ids else "id", "ids in the order of writing, each once")
    ids[old] = new_id()
    role = cast(Role, fields.choice("role", ("user", "assistant"), "user"))
    status = cast(Status, fields.choice("status", ("done", "writing", "stopped", "failed", "interrupted"), "done"))
    figures, error = fields.raw("figures"), fields.raw("error")
    for name, one in (("figures", figures), ("error", error)):
        if one is not None:
            Fields(one, fields.name(name))
    files = tuple(_attachment(one, f"{where}.attachments[{i}]", ids[old])
                  for i, one in enumerate(fields.items("attachments", 100)))
    return Message(ids[old], chat_id, ids[parent] if parent else None, role, fields.text("content", "") or "",
                   "interrupted" if status == "writing" else status, error, fields.text("model", None, 4096), figures,
                   fields.whole("created_ms", 0, _MAX_MS, now_ms()) or now_ms(), files)


def _attachment(value: Any, where: str, message_id: str) -> Attachment:
    fields = Fields(value, where)
    return Attachment(new_id(), message_id, fields.required_text("name", _MAX_NAME_CHARS),
                      fields.text("content", "") or "", fields.whole("n_tokens", 0, 2**31 - 1, 0) or 0)


