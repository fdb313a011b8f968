"""The objects that OpenAI's API answers with, and llama-server's `timings` beside them. Pure functions."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from apps.server.asked import Ended, Event, Prefill, Text, ToolCall, Waiting

FINISH_REASONS = {"cancelled": "stop"}  # a client that cancels through another connection still reads an end


@dataclass(frozen=True, slots=True)
class Reply:
    """What all chunks of one answer share."""

    kind: Literal["chat", "completion"]
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
        """One chunk of a streamed answer."""
        chat = self.kind == "chat"
        return {"id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
                "object": "chat.completion.chunk" if chat else "text_completion", "created": self.created,
                "model": self.model, "choices": list(choices), **more}

    def text_prefix(self) -> tuple[str, str]:
        """What stands before and after the JSON text of a piece, since a chunk is made for each token."""
        choice = {"index": 0, "delta": {"content": "\0"}, "finish_reason": None} if self.kind == "chat" else \
            {"index": 0, "text": "\0", "logprobs": None, "finish_reason": None}
        before, _, after = json.dumps(self.chunk([choice]), separators=(",", ":")).partition('"\\u0000"')
        return before, after

    def piece(self, piece: Text, n_chars: int) -> dict[str, Any]:
        """A piece with logprobs; `n_chars` came before it."""
        if self.kind == "chat":
            return self.chunk([{"index": 0, "delta": {"content": piece.text}, "finish_reason": None,
                                "logprobs": {"content": list(piece.logprobs or ()), "refusal": None}}])
        return self.chunk([{"index": 0, "text": piece.text, "finish_reason": None,
                            "logprobs": old_logprobs(piece.logprobs or (), n_chars)}])

    def role(self) -> dict[str, Any]:
        """The first chunk of a chat."""
        return self.chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])

    def call(self, call: ToolCall, index: int) -> dict[str, Any]:
        """The chunk of a whole call."""
        return self.chunk([{"index": 0, "finish_reason": None,
                            "delta": {"tool_calls": [{"index": index, **tool_call(call)}]}}])

    def end(self, ended: Ended) -> dict[str, Any]:
        """The last chunk of the answer itself, with the figures that llama-server gives."""
        empty: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        reason = FINISH_REASONS.get(ended.finish_reason, ended.finish_reason)
        return self.chunk([{"index": 0, **empty, "logprobs": None, "finish_reason": reason}],
                          timings=dict(ended.timings))

    def progress(self, event: Event) -> dict[str, Any]:
        """For clients that asked for it, in llama-server's form where it has one."""
        if isinstance(event, Prefill):
            return self.chunk([], prompt_progress={"total": event.n_total, "processed": event.n_done,
                                                   "cache": event.n_cached, "time_ms": event.time_ms})
        assert isinstance(event, Waiting)
        return self.chunk([], queue={"requests_ahead": event.place, "loading": event.loading})

    def whole(self, text: str, calls: Sequence[ToolCall], logprobs: Sequence[Mapping[str, Any]] | None,
              ended: Ended) -> dict[str, Any]:
        """An answer that is not streamed."""
        reason = FINISH_REASONS.get(ended.finish_reason, ended.finish_reason)
        if self.kind == "chat":
            message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None,
                                       "refusal": None}
            if calls:
                message["tool_calls"] = [tool_call(call) for call in calls]
            choice = {"index": 0, "message": message, "finish_reason": reason,
                      "logprobs": None if logprobs is None else {"content": list(logprobs), "refusal": None}}
        else:
            choice = {"index": 0, "text": text, "finish_reason": reason,
                      "logprobs": None if logprobs is None else old_logprobs(logprobs, 0)}
        body = self.chunk([choice], usage=usage(ended), timings=dict(ended.timings))
        return {**body, "object": "chat.completion"} if self.kind == "chat" else body


def tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function",
            "function": {"name": call.name, "arguments": call.arguments}}


def usage(ended: Ended) -> dict[str, Any]:
    return {"prompt_tokens": ended.prompt_tokens, "completion_tokens": ended.completion_tokens,
            "total_tokens": ended.prompt_tokens + ended.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": ended.cached_tokens}}


def old_logprobs(tokens: Sequence[Mapping[str, Any]], n_chars: int) -> dict[str, Any]:
    """OpenAI's older form, of /v1/completions; `n_chars` of text came before the first of `tokens`."""
    offsets = []
    for token in tokens:
        offsets.append(n_chars)
        n_chars += len(token["token"])
    return {"tokens": [token["token"] for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [{one["token"]: one["logprob"] for one in token["top_logprobs"]} for token in tokens],
            "text_offset": offsets}
