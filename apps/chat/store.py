"""The chat database: SQLite with a write-ahead log, so that a killed process loses nothing that was finished.

Synchronous, for one thread (database.py runs it in one). Knows records and SQL; does not know how answers are made.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from apps.chat.migrations import migrate
from apps.chat.records import Attachment, Chat, Hit, Message, Preset, Role, Status
from apps.server.replies import Refusal
from edgert.errors import EdgertError

_BUSY_S = 10.0  # another process may be writing
_MAX_TITLE_CHARS = 60
MAX_CHATS_LISTED = 500
_MAX_HITS = 50
_MAX_WORDS = 16
_FORGET_ATTACHMENTS_MS = 24 * 3600 * 1000  # those that no message took
_NOW_COLUMNS = ("title", "system", "model", "settings", "leaf_id")


def new_id() -> str:
    return secrets.token_hex(12)


def now_ms() -> int:
    return int(time.time() * 1000)


def title_of(text: str) -> str:
    """A title for a chat that begins with `text`."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_TITLE_CHARS else f"{line[:_MAX_TITLE_CHARS - 1].rstrip()}\N{HORIZONTAL ELLIPSIS}"


class Store:
    """The open database. Every method is one transaction. Raises Refusal (404) for what is not there."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`; answers that a killed process left unfinished become `interrupted`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            migrate(self._db)
        except sqlite3.Error as error:
            raise EdgertError(f"{path}: {error}", "Move the file away, or free some disk space.") from error
        self._db.row_factory = sqlite3.Row
        with self._change():
            self._db.execute("UPDATE messages SET status = 'interrupted' WHERE status = 'writing'")
            self._db.execute("DELETE FROM attachments WHERE message_id IS NULL AND created_ms < ?",
                             (now_ms() - _FORGET_ATTACHMENTS_MS,))

    def close(self) -> None:
        self._db.close()

    def _change(self) -> AbstractContextManager[Any]:
        self._db.execute("BEGIN IMMEDIATE")
        return self._db

    def chats(self) -> list[Chat]:
        """The newest first."""
        rows = self._db.execute("SELECT * FROM chats ORDER BY updated_ms DESC, id LIMIT ?", (MAX_CHATS_LISTED,))
        return [_chat(row) for row in rows]

    def every_chat(self) -> list[Chat]:
        return [_chat(row) for row in self._db.execute("SELECT * FROM chats ORDER BY created_ms, id")]

    def chat(self, chat_id: str) -> Chat:
        row = self._db.execute("SELECT * FROM chats WHERE id = ?", (chat_id,)).fetchone()
        if row is None:
            raise _missing("chat")
        return _chat(row)

    def create_chat(self, title: str, system: str = "", model: str | None = None,
                    settings: Mapping[str, Any] | None = None) -> Chat:
        chat = Chat(new_id(), title, system, model, settings or {}, None, now_ms(), now_ms())
        with self._change():
            self._db.execute("INSERT INTO chats VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (
                chat.id, title, system, model, json.dumps(chat.settings), None, chat.created_ms, chat.updated_ms))
        return chat

    def change_chat(self, chat_id: str, **values: Any) -> Chat:
        """Set some of title, system, model, settings, leaf_id."""
        assert values.keys() <= set(_NOW_COLUMNS)
        chat = self.chat(chat_id)
        if values.get("leaf_id") is not None and self.message(values["leaf_id"]).chat_id != chat.id:
            raise _missing("message")
        if "settings" in values:
            values["settings"] = json.dumps(values["settings"])
        with self._change():
            for name, value in values.items():
                self._db.execute(f"UPDATE chats SET {name} = ? WHERE id = ?", (value, chat_id))
        return self.chat(chat_id)

    def delete_chat(self, chat_id: str) -> None:
        with self._change():
            if self._db.execute("DELETE FROM chats WHERE id = ?", (chat_id,)).rowcount == 0:
                raise _missing("chat")

    def messages(self, chat_id: str) -> list[Message]:
        """The whole tree, in the order of writing."""
        rows = self._db.execute("SELECT * FROM messages WHERE chat_id = ? ORDER BY serial", (chat_id,)).fetchall()
        attached: dict[str, list[Attachment]] = {}
        for row in self._db.execute("SELECT a.* FROM attachments a JOIN messages m ON m.id = a.message_id "
                                    "WHERE m.chat_id = ? ORDER BY a.rowid", (chat_id,)):
            attached.setdefault(row["message_id"], []).append(_attachment(row))
        return [_message(row, attached.get(row["id"], ())) for row in rows]

    def message(self, message_id: str) -> Message:
        row = self._db.execute("SELECT * FROM messages WHERE id = ?", (message_id,)).fetchone()
        if row is None:
            raise _missing("message")
        attached = self._db.execute("SELECT * FROM attachments WHERE message_id = ? ORDER BY rowid", (message_id,))
        return _message(row, [_attachment(one) for one in attached])

    def branch(self, message_id: str) -> list[Message]:
        """The conversation from its beginning to this message."""
        path: list[Message] = []
        here: str | None = message_id
        while here is not None:
            path.append(self.message(here))
            here = path[-1].parent_id
        return path[::-1]

    def add_message(self, chat_id: str, parent_id: str | None, role: Role, content: str, *, status: Status = "done",
                    model: str | None = None, attachment_ids: Sequence[str] = ()) -> Message:
        """Append a message and show its branch. Attachments that no message has yet become its own."""
        self.chat(chat_id)
        if parent_id is not None and self.message(parent_id).chat_id != chat_id:
            raise _missing("message")
        message_id, now = new_id(), now_ms()
        with self._change():
            self._db.execute("INSERT INTO messages (id, chat_id, parent_id, role, content, status, model, created_ms) "
                             "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                             (message_id, chat_id, parent_id, role, content, status, model, now))
            for attachment_id in attachment_ids:
                self._db.execute("UPDATE attachments SET message_id = ? WHERE id = ? AND message_id IS NULL",
                                 (message_id, attachment_id))
            self._db.execute("UPDATE chats SET leaf_id = ?, updated_ms = ? WHERE id = ?", (message_id, now, chat_id))
        return self.message(message_id)

    def write(self, message_id: str, content: str, status: Status, *, model: str | None = None,
              error: Mapping[str, Any] | None = None, figures: Mapping[str, Any] | None = None) -> None:
        """An answer's text so far, or at its end. The message may have been deleted meanwhile."""
        with self._change():
            self._db.execute("UPDATE messages SET content = ?, status = ?, model = coalesce(?, model), error = ?, "
                             "figures = ? WHERE id = ?",
                             (content, status, model, _json(error), _json(figures), message_id))

    def add_attachment(self, name: str, content: str, n_tokens: int) -> Attachment:
        attachment = Attachment(new_id(), None, name, content, n_tokens)
        with self._change():
            self._db.execute("INSERT INTO attachments VALUES (?, NULL, ?, ?, ?, ?)",
                             (attachment.id, name, content, n_tokens, now_ms()))
        return attachment

    def copy_attachments(self, from_id: str, to_id: str) -> None:
        """An edited message keeps the files of the one that it replaces."""
        with self._change():
            for one in self.message(from_id).attachments:
                self._db.execute("INSERT INTO attachments VALUES (?, ?, ?, ?, ?, ?)",
                                 (new_id(), to_id, one.name, one.content, one.n_tokens, now_ms()))

    def search(self, text: str) -> list[Hit]:
        """Messages and titles with words that begin like those of `text`, the best first."""
        words = "".join(char if char.isalnum() else " " for char in text).split()[:_MAX_WORDS]
        if not words:
            return []
        rows = self._db.execute(
            "SELECT f.chat_id, f.message_id, c.title, "
            "snippet(found, 0, char(2), char(3), '\N{HORIZONTAL ELLIPSIS}', 14) AS snippet "
            "FROM found f JOIN chats c ON c.id = f.chat_id WHERE found MATCH ? ORDER BY rank LIMIT ?",
            (" ".join(f'"{word}"*' for word in words), _MAX_HITS))
        return [Hit(row["chat_id"], row["message_id"], row["title"], row["snippet"]) for row in rows]

    def presets(self) -> list[Preset]:
        rows = self._db.execute("SELECT * FROM presets ORDER BY name")
        return [Preset(row["id"], row["name"], row["system"], json.loads(row["settings"])) for row in rows]

    def save_preset(self, name: str, system: str, settings: Mapping[str, Any]) -> Preset:
        """Under a name that has one already, the new one replaces it."""
        preset = Preset(new_id(), name, system, settings)
        with self._change():
            self._db.execute("DELETE FROM presets WHERE name = ?", (name,))
            self._db.execute("INSERT INTO presets VALUES (?, ?, ?, ?)",
                             (preset.id, name, system, json.dumps(settings)))
        return preset

    def delete_preset(self, preset_id: str) -> None:
        with self._change():
            if self._db.execute("DELETE FROM presets WHERE id = ?", (preset_id,)).rowcount == 0:
                raise _missing("preset")

    def insert_all(self, chat: Chat, messages: Iterable[Message]) -> None:
        """A whole chat from elsewhere, all or nothing; parents come before children."""
        with self._change():
            self._db.execute("INSERT INTO chats VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (
                chat.id, chat.title, chat.system, chat.model, json.dumps(chat.settings), chat.leaf_id, chat.created_ms,
                chat.updated_ms))
            for one in messages:
                self._db.execute(
                    "INSERT INTO messages (id, chat_id, parent_id, role, content, status, error, model, figures, "
                    "created_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (one.id, chat.id, one.parent_id, one.role, one.content, one.status, _json(one.error), one.model,
                     _json(one.figures), one.created_ms))
                for file in one.attachments:
                    self._db.execute("INSERT INTO attachments VALUES (?, ?, ?, ?, ?, ?)",
                                     (file.id, one.id, file.name, file.content, file.n_tokens, one.created_ms))


def _chat(row: sqlite3.Row) -> Chat:
    return Chat(row["id"], row["title"], row["system"], row["model"], json.loads(row["settings"]), row["leaf_id"],
                row["created_ms"], row["updated_ms"])


def _message(row: sqlite3.Row, attachments: Iterable[Attachment]) -> Message:
    return Message(row["id"], row["chat_id"], row["parent_id"], row["role"], row["content"], row["status"],
                   _value(row["error"]), row["model"], _value(row["figures"]), row["created_ms"], tuple(attachments))


def _attachment(row: sqlite3.Row) -> Attachment:
    return Attachment(row["id"], row["message_id"], row["name"], row["content"], row["n_tokens"])


def _json(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value)


def _value(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _missing(what: str) -> Refusal:
    return Refusal(404, f"there is no such {what}", "It may have been deleted in another window.", "not_found")
