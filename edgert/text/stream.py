"""Turns tokens into text that is safe to show: whole characters, and nothing that may yet become a stop string.

Knows UTF-8 and stop strings; does not know the tokenizer (it is given `piece_of`) nor where the text goes.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from edgert.errors import UsageError

# What a client may ask for: enough for every chat format in use, and little work per token.
MAX_STOPS = 32
MAX_STOP_CHARS = 256


class TextStream:
    """One answer's text, token by token. `push` and `finish` give what can be shown; joined, that is the answer.

    The text ends before the stop string that is complete first (of several complete at the same character, before
    the longest). Bytes that are not UTF-8 become U+FFFD, as Python's incremental decoder has it.
    """

    def __init__(self, piece_of: Callable[[int], bytes], stop: Sequence[str] = ()) -> None:
        self._piece_of = piece_of
        self._stops = _checked(stop)
        self._starts = frozenset(one[:length] for one in self._stops for length in range(1, len(one)))
        self._longest_start = max(map(len, self._stops), default=1) - 1
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that can be shown now that `token_id` has come; empty after a stop string."""
        if self.stopped:
            return ""
        return self._advance(self._decoder.decode(self._piece_of(token_id)))

    def finish(self) -> str:
        """What was held back, at the end of the answer. An unfinished character becomes U+FFFD."""
        if self.stopped:
            return ""
        shown = self._advance(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return shown + held

    def _advance(self, new: str) -> str:
        text = self._held + new
        end = self._first_stop(text)
        if end is not None:
            self.stopped, self._held = True, ""
            return text[:end]
        keep = self._n_held(text)
        self._held = text[len(text) - keep:]
        return text[:len(text) - keep]

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first, the longest of equals."""
        found = [(start + len(one), start) for one in self._stops if (start := text.find(one)) >= 0]
        return min(found)[1] if found else None

    def _n_held(self, text: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        for length in range(min(self._longest_start, len(text)), 0, -1):
            if text[-length:] in self._starts:
                return length
        return 0


def _checked(stop: Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise UsageError(f"there are {len(stops)} stop strings", f"At most {MAX_STOPS} are possible.")
    for one in stops:
        if not isinstance(one, str) or not 0 < len(one) <= MAX_STOP_CHARS:
            raise UsageError(f"the stop string {str(one)[:40]!r} has {len(str(one))} characters",
                             f"Stop strings have 1 to {MAX_STOP_CHARS} characters.")
    return stops
