"""Every error that edgert raises on purpose, with its exit code and the user's next step.

Knows what went wrong and what to do about it; does not know how it is shown (apps/cli prints it).
Each error carries its figures as fields, so that a program can act on them without reading the text.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any, ClassVar


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MiB"


class EdgertError(Exception):
    """Root of the tree. `exit_code` is the command's exit status; `next_step` is one sentence for the user."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message}\n{self.next_step}" if self.next_step else self.message


class UsageError(EdgertError):
    """What was asked for makes no sense: an empty prompt, a bad size, options that exclude each other."""

    exit_code = 2


class InvalidRequest(UsageError):
    """A request that a client sent is not one: `param` names what is wrong in it."""

    def __init__(self, message: str, next_step: str = "", param: str | None = None) -> None:
        super().__init__(message, next_step)
        self.param = param


class QueueFull(EdgertError):
    """More requests wait than the server takes; `retry_after_s` is when there may be room."""

    def __init__(self, n_waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{n_waiting} requests are waiting already", f"Try again in {retry_after_s} s.")
        self.n_waiting = n_waiting
        self.retry_after_s = retry_after_s


class ModelNotFound(EdgertError):
    """No file, name or repository answers to `model`; `near` holds similar names that do exist."""

    exit_code = 3

    def __init__(self, model: str, near: tuple[str, ...] = (),
                 next_step: str = "See `edgert list`, or give the path of a .gguf file.") -> None:
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        super().__init__(f"no model answers to {model!r}", hint + next_step)
        self.model = model
        self.near = near


class ModelFileError(EdgertError):
    """The model file is damaged, lies about itself, or asks for what edgert cannot compute."""

    exit_code = 4

    def __init__(self, path: str, problem: str, next_step: str = "Fetch the file again, or try another one.") -> None:
        super().__init__(f"{path}: {problem}", next_step)
        self.path = path
        self.problem = problem


class UnsupportedArchitecture(ModelFileError):
    """The file is sound, but its `general.architecture` has no file in edgert/architectures."""

    def __init__(self, path: str, architecture: str, supported: tuple[str, ...]) -> None:
        super().__init__(path, f"architecture {architecture!r} is not supported",
                         f"Supported architectures: {', '.join(supported)}.")
        self.architecture = architecture
        self.supported = supported


class HeadRefused(ModelFileError):
    """A retrieval head that does not belong to the model, is damaged, or is none that edgert writes."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, f"retrieval head: {problem}",
                         "Make one with `edgert distill`, or use the model without.")


class TemplateError(ModelFileError):
    """The file's chat template does not parse, fails, or exceeds its bounds."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, f"chat template: {problem}", "Use --raw to send the prompt without a template.")


class OutOfMemory(EdgertError):
    """An allocation was refused: `needed_bytes` for `what`."""

    exit_code = 5

    def __init__(self, what: str, needed_bytes: int,
                 next_step: str = "Ask for a shorter --context, or close other programs.") -> None:
        super().__init__(f"out of memory: {what} needs {_mib(needed_bytes)}", next_step)
        self.what = what
        self.needed_bytes = needed_bytes


class BudgetTooSmall(OutOfMemory):
    """`needed_bytes` exceed the budget; `smallest_bytes` is the least budget that works."""

    def __init__(self, what: str, needed_bytes: int, budget_bytes: int, smallest_bytes: int) -> None:
        super().__init__(what, needed_bytes, f"The budget is {_mib(budget_bytes)}; "
                         f"the smallest that works is {_mib(smallest_bytes)}.")
        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes


class ContextOverflow(EdgertError):
    """`n_tokens` do not fit in a context of `context_length` tokens. Nothing is ever cut silently."""

    exit_code = 6

    def __init__(self, n_tokens: int, context_length: int, trained_length: int | None = None) -> None:
        limit = f" (the model was trained for {trained_length})" if trained_length else ""
        super().__init__(f"the prompt has {n_tokens} tokens, the context holds {context_length}{limit}",
                         "Shorten the prompt, or ask for more with --context.")
        self.n_tokens = n_tokens
        self.context_length = context_length
        self.trained_length = trained_length


class DownloadError(EdgertError):
    """A model could not be fetched. What has arrived is kept as `.partial` and resumed next time."""

    exit_code = 7


class ChecksumMismatch(DownloadError):
    """The whole file arrived, but its SHA-256 is not the published one."""

    def __init__(self, name: str, expected: str, actual: str) -> None:
        super().__init__(f"{name}: SHA-256 is {actual}, expected {expected}",
                         "The damaged file was removed; pull again.")
        self.expected = expected
        self.actual = actual


def is_full(error: OSError) -> bool:
    """Whether it is that a disk, or a user's part of it, has no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class NoSpace(EdgertError):
    """The disk that holds `directory` has `free_bytes`, and `needed_bytes` are needed."""

    exit_code = 8

    def __init__(self, directory: str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{directory}: {_mib(needed_bytes)} are needed, {_mib(free_bytes)} are free",
                         "Free some space, or take another disk: set EDGERT_HOME, or name a --kv-store.")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class NativeLibraryError(EdgertError):
    """ggml's libraries are missing, of a version that edgert does not know, or unusable on this platform."""

    exit_code = 9


class GrammarError(EdgertError):
    """A JSON schema or grammar is invalid or exceeds edgert's bounds."""

    exit_code = 10


class ComputeError(EdgertError):
    """ggml reported a failure while computing; the answer so far stays valid."""

    exit_code = 11


class KVStoreError(ComputeError):
    """Keys and values on disk are damaged, gone, or cannot be written. Nothing was computed from them."""

    def __init__(self, path: str, problem: str,
                 next_step: str = "Ask again: the text is computed anew. If it happens again, check the disk.") -> None:
        super().__init__(f"{path}: {problem}", next_step)
        self.path = path
        self.problem = problem


class DiskSilent(ComputeError):
    """A disk has not answered for `seconds`. It may yet write into memory that it was given: nothing there counts, and
    nothing is computed anew until edgert is."""

    def __init__(self, path: str, seconds: float) -> None:
        super().__init__(f"{path}: the disk has not answered for {seconds:.0f} s",
                         "Look at the disk, or name another --kv-store; then start edgert again.")


class ClusterError(EdgertError):
    """The devices do not work together: not paired, not reachable, of another version, or lost."""

    exit_code = 12


class PeerLost(ClusterError):
    """The device of `rank` went away or fell silent during a step; what it was to add is missing."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(f"device {rank} was lost: {why}", "Start `edgert cluster up` on it again.")
        self.rank = rank
        self.why = why


class ModelCrashed(ComputeError):
    """The process that computes a model has ended, or does not answer; a new one is started for the next request."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the model's process {how}", "Ask again: it is started anew. If it ends again, try another "
                         "model file, or less --context.")
        self.how = how


class Interrupted(EdgertError):
    """The user pressed Ctrl-C before there was anything to keep."""

    exit_code = 130


def to_fields(error: EdgertError) -> dict[str, Any]:
    """The error as plain values that can pass to another process."""
    fields = {name: value for name, value in vars(error).items()
              if name not in ("message", "next_step") and isinstance(value, str | int | float | None)}
    return {"kind": type(error).__name__, "message": error.message, "next_step": error.next_step, "fields": fields}


def from_fields(told: Mapping[str, Any]) -> EdgertError:
    """The error that another process raised, of its own class and with its figures."""
    kind = globals().get(str(told["kind"]), EdgertError)
    if not (isinstance(kind, type) and issubclass(kind, EdgertError)):
        kind = EdgertError
    error = kind.__new__(kind)
    EdgertError.__init__(error, str(told["message"]), str(told["next_step"]))
    for name, value in told["fields"].items():
        setattr(error, name, value)
    return error
