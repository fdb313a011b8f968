"""What the chat database holds, as values: chats, messages in a tree, attachments, presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["done", "writing", "stopped", "failed", "interrupted"]
Role = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file's text, part of a message once that is sent."""

    id: str
    message_id: str | None
    name: str
    content: str
    n_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For the page, which does not need the text again."""
        return {"id": self.id, "name": self.name, "n_tokens": self.n_tokens, "n_chars": len(self.content)}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `parent_id` None begins a conversation; siblings are other versions of the same turn.

    `figures` are an answer's token counts, timings and memory; `error` says why it failed.
    """

    id: str
    chat_id: str
    parent_id: str | None
    role: Role
    content: str
    status: Status
    error: Mapping[str, Any] | None
    model: str | None
    figures: Mapping[str, Any] | None
    created_ms: int
    attachments: tuple[Attachment, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__ if name != "attachments"}
        return {**values, "attachments": [one.to_dict() for one in self.attachments]}


@dataclass(frozen=True, slots=True)
class Chat:
    """One conversation. `leaf_id` is the message that the shown branch ends with; `settings` are its parameters."""

    id: str
    title: str
    system: str
    model: str | None
    settings: Mapping[str, Any]
    leaf_id: str | None
    created_ms: int
    updated_ms: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Preset:
    """A system prompt and parameters under a name."""

    id: str
    name: str
    system: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Hit:
    """Where a search found something. `snippet` marks what was found between U+0002 and U+0003."""

    chat_id: str
    message_id: str
    title: str
    snippet: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
