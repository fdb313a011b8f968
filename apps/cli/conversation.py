"""A conversation on a terminal: lines in, answers out, a history that the KV cache keeps from turn to turn.

Knows a person at a keyboard. Input history (the arrow keys) is in memory only: what was typed is nobody's business
after the conversation.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from signal import SIGTERM
from typing import TYPE_CHECKING, Any

from apps.cli.arguments import did_you_mean
from apps.cli.interrupts import Interrupts, exit_status
from apps.cli.messages import complain
from apps.cli.run import report, stream_answer
from apps.cli.terminal import AnswerStream, without_controls
from edgert.errors import ContextOverflow, EdgertError

if TYPE_CHECKING:
    from edgert.generation import Generation
    from edgert.runtime import Runtime
    from edgert.text.template import Message

_PROMPT, _MORE, _QUOTES = "> ", ". ", '"""'
_COMMANDS: Mapping[str, str] = {"/help": "show this", "/reset": "forget the conversation", "/exit": "leave"}
_HELP = "\n".join([*(f"{name:<8} {what}" for name, what in _COMMANDS.items()),
                   '"""      begins and ends a text of several lines', "Ctrl-C   stops an answer, which is kept",
                   "Ctrl-D   leaves"])
_COMMAND = re.compile(r"/\w*")


class Conversation:
    """What was said. Turns that failed or brought no answer leave no trace, so that user and model alternate."""

    def __init__(self, runtime: Runtime, *, raw: bool, system: str | None, options: Mapping[str, Any]) -> None:
        self.runtime = runtime
        self._raw, self._options = raw, options
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.reset()
        if runtime.session is not None:
            self._go_on(runtime.session.conversation)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self._messages = list(self._system)
        self._transcript = ""

    def _go_on(self, kept: Mapping[str, Any]) -> None:
        """Take up what a session holds; what is not of its form is left out."""
        turns = kept.get("messages")
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict) and turn.get("role") in ("user", "assistant") \
                    and isinstance(turn.get("content"), str):
                self._messages.append({"role": turn["role"], "content": turn["content"]})
        self._transcript = str(kept.get("transcript", ""))

    def start(self, text: str) -> Generation:
        """The answer to `text`, about to be made. Raises what Runtime.generate raises."""
        if self._raw:
            prompt = (self._transcript + text).encode("utf-8", errors="surrogateescape")
            return self.runtime.generate(prompt, **self._options)
        return self.runtime.chat([*self._messages, {"role": "user", "content": text}], **self._options)

    def keep(self, text: str, answer: str) -> None:
        """Add a turn, if there was an answer at all; in a session, for good. Raises KVStoreError, NoSpace."""
        if answer:
            self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            self._transcript += f"{text}{answer}\n"
        if self.runtime.session is not None:
            turns = self._messages[len(self._system):]
            self.runtime.save_session({"messages": turns, "transcript": self._transcript})


def converse(conversation: Conversation, output: AnswerStream, interrupts: Interrupts) -> int:
    """Hold the conversation until its user leaves; the exit status."""
    with suppress(ImportError):  # line editing, where Python has it; it must not be imported off a terminal
        importlib.import_module("readline")
    runtime = conversation.runtime
    _say(f"{runtime.model.path.stem}, a context of {runtime.context_length} tokens. /help shows what there is.")
    while True:
        try:
            status = _take_turn(conversation, output, interrupts)
            if status is not None:
                return status
        except KeyboardInterrupt:
            interrupts.forget()
            _say("\n/exit or Ctrl-D leaves.")
        except EOFError:
            _say("")
            return 0


def _take_turn(conversation: Conversation, output: AnswerStream, interrupts: Interrupts) -> int | None:
    """Read what the user says and act on it. The exit status once the conversation is over."""
    try:
        with interrupts.waiting():
            text = _read_turn(output.is_terminal)
    except UnicodeDecodeError:
        _say("That was not UTF-8.")
        return None
    command = text.strip()
    if command == "/exit":
        return 0
    if _COMMAND.fullmatch(command):
        _obey(command, conversation)
    elif command:
        _answer(conversation, text, output, interrupts)
        if interrupts.stopped_by == SIGTERM:
            return exit_status(SIGTERM)
    return None


def _answer(conversation: Conversation, text: str, output: AnswerStream, interrupts: Interrupts) -> None:
    try:
        generation = conversation.start(text)
        with interrupts.stopping(generation.cancel):
            try:
                stream_answer(generation, output)
            finally:
                conversation.keep(text, generation.text)
            report(generation, conversation.runtime)
    except ContextOverflow as error:
        complain(ContextOverflow(error.n_tokens, error.context_length))
        _say("/reset starts anew; the conversation so far is kept.")
    except EdgertError as error:
        complain(error)


def _obey(command: str, conversation: Conversation) -> None:
    if command == "/help":
        _say(_HELP)
    elif command == "/reset":
        conversation.reset()
        _say("The conversation is forgotten.")
    else:
        _say(f"There is no {command}. {did_you_mean(command, _COMMANDS)}/help shows what there is.")


def _read_turn(on_terminal: bool) -> str:
    """What the user says: a line, or everything between two `\"\"\"`. Raises EOFError at the end."""
    line = _read_line(_PROMPT, on_terminal)
    if not line.lstrip().startswith(_QUOTES):
        return line
    lines = [line.lstrip().removeprefix(_QUOTES)]
    while not lines[-1].rstrip().endswith(_QUOTES):
        lines.append(_read_line(_MORE, on_terminal))
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return "\n".join(lines).strip("\n")


def _read_line(prompt: str, on_terminal: bool) -> str:
    if on_terminal:
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # the answers go elsewhere, the prompt must not
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _say(text: str) -> None:
    print(without_controls(text), file=sys.stderr, flush=True)
