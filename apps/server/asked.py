"""What a client wants of a model, whichever API it spoke: the values that travel to the model's process.

Checked by whoever made it (openai_requests.py, ollama_routes.py, apps/chat); the process takes it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

ChatMessage = Mapping[str, Any]
ToolUse = Literal["none", "auto", "required"]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Functions that the model may call: {"name", "description", "parameters"} each; `name` where it must be one."""

    functions: tuple[Mapping[str, Any], ...]
    use: ToolUse = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. Either `messages` (through the chat template) or `prompt` (a text as it is, or token ids).

    `keep_oldest` False leaves out the oldest turns where the conversation does not fit: only on the user's word.
    """

    messages: tuple[ChatMessage, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    tools: ToolChoice | None = None
    logprobs: int | None = None
    keep_oldest: bool = True

    def to_frame(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_frame(cls, frame: Mapping[str, Any]) -> Self:
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value
                                  for name, value in frame.items()}
        if values.get("tools") is not None:
            tools = values["tools"]
            values["tools"] = ToolChoice(tuple(tools["functions"]), tools["use"], tools["name"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Waiting:
    """How many requests are ahead of this one; or which model is loaded for it."""

    place: int
    loading: str | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """How much of the prompt is done, in tokens; `n_cached` of them were in the KV cache before."""

    n_done: int
    n_total: int
    n_cached: int
    time_ms: float


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer, of one token or some. `logprobs` are in OpenAI's shape, where they were asked for."""

    text: str
    n_tokens: int = 1
    logprobs: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model calls; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How the answer ended, with its figures: token counts, timings in llama-server's names, memory, the plan."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    timings: Mapping[str, Any]
    memory: Mapping[str, Any]
    plan: Mapping[str, Any]
    left_out: int = 0  # messages that were left out because the caller asked for that


Event = Waiting | Prefill | Text | ToolCall | Ended
