"""Parsing of the command line: one parser for every command, the options that several share, and their values.

Knows argparse and how a slip of the fingers is answered. Imports nothing heavy: `edgert --help` builds all of this.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgert.errors import UsageError
from edgert.units import parse_bytes

if TYPE_CHECKING:
    from edgert.runtime import Runtime
    from edgert.speculation import Speculate
    from tensorpar.workers import ClusterOptions

_TOKENS = re.compile(r"(\d{1,12})(k?)", re.IGNORECASE | re.ASCII)
_MAX_WHOLE = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UsageErrors that name the near option or command."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation that works today may be ambiguous tomorrow; and `--max-token` is better answered as a slip.
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "), f"See `{self.prog} --help`.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(args or ())
        self._refuse_unknown(words)
        parsed, rest = super().parse_known_args(words, namespace)
        # argparse gives an optional positional its default as soon as the one before it is read; what follows an
        # option (`run MODEL --temp 0 "prompt"`) is left over.
        explicit, words = rest[:1] == ["--"], [word for i, word in enumerate(rest) if i or word != "--"]
        for action in self._get_positional_actions():
            is_missing = action.nargs == "?" and getattr(parsed, action.dest) is action.default
            if is_missing and words and (explicit or not _is_option(words[0])):
                setattr(parsed, action.dest, words.pop(0))
        return parsed, words

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The options of the whole command line. Raises UsageError; SystemExit after --help and --version."""
        parsed, rest = self.parse_known_args(words)
        if rest and _is_option(rest[0]):
            self._unknown_option(rest[0])
        if rest:
            raise UsageError(f"there is an argument too many: {rest[0]!r}", "Put a prompt of several words in quotes.")
        assert isinstance(parsed, argparse.Namespace)
        return parsed

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Name an unknown option before argparse takes its value for a positional, or misses one."""
        has_commands = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        for word in words:
            if word == "--" or (has_commands and not word.startswith("-")):
                return
            name = word.partition("=")[0]
            if name.startswith("--") and _is_option(name) and name not in self._option_string_actions:
                self._unknown_option(name)

    def _unknown_option(self, name: str) -> NoReturn:
        raise UsageError(f"there is no option {name}", did_you_mean(name, self._option_string_actions) +
                         f"See `{self.prog} --help`.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            raise UsageError(f"there is no command {value!r}", did_you_mean(str(value), action.choices) +
                             f"See `{self.prog} --help`.")
        super()._check_value(action, value)


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and " " not in word


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """`Did you mean ...? `, or nothing where no name is near."""
    near = difflib.get_close_matches(word[:100], list(names), n=1)
    return f"Did you mean {near[0]}? " if near else ""


def kv_budget(text: str) -> int | str:
    """`512`, `2k` or `full`: how many cached tokens a step attends to."""
    return text if text == "full" else token_count(text)


def whole(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 12 else 0
    if not 1 <= number <= _MAX_WHOLE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {_MAX_WHOLE}")
    return number


def above_zero(what: str, below: float) -> Callable[[str], float]:
    """Reads a number of `what` above 0."""
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < below:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {what} above 0")
        return value

    return read


def token_count(text: str) -> int:
    """`8192` or `8k`: a number of tokens, k for 1024 of them."""
    match = _TOKENS.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 8192 or 8k")
    return int(match[1]) * (1024 if match[2] else 1)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes. The defaults are main's own, so that `edgert -v run` and `edgert run -v` both count."""
    group = parser.add_argument_group("messages")
    group.add_argument("-v", "--verbose", action="count", default=argparse.SUPPRESS,
                       help="say on standard error what is done, and timings; -vv says more")
    group.add_argument("--log-json", action="store_true", default=argparse.SUPPRESS,
                       help="write messages as one JSON object a line")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, and how it is opened."""
    parser.add_argument("model", metavar="MODEL", help="a path, a name of `edgert list`, or user/repo:quant")
    add_engine_options(parser)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """How a model is opened."""
    group = parser.add_argument_group("model")
    group.add_argument("--memory", type=parse_bytes, metavar="SIZE",
                       help="memory for the whole process, such as 600M; weights beyond it stream from disk")
    group.add_argument("--threads", type=whole, metavar="N", help="threads that compute (default: physical cores)")
    group.add_argument("--kv-type", choices=("f16", "q8_0"), default="f16", help="precision of the KV cache")
    group.add_argument("--kv-budget", type=kv_budget, metavar="N",
                       help="cached tokens that a step attends to, chosen anew for each; full is all of them "
                            "(default: all, unless --memory has no room for a long --context)")
    group.add_argument("--kv-store", type=Path, metavar="DIR",
                       help="where keys and values lie that have no room in memory")
    group.add_argument("--layout", choices=("auto", "plain", "repack"), default="auto",
                       help="layout of the weights; auto takes what is fastest here")
    group.add_argument("--batch", type=whole, default=512, metavar="N", help="tokens that prefill at once (512)")
    group.add_argument("--models-dir", metavar="DIR", type=Path, action="append", default=[],
                       help="a directory with GGUF files; may be given several times")


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Whether other devices compute too."""
    group = parser.add_argument_group("cluster")
    group.add_argument("--cluster", action="store_true", help="use the paired devices where that is faster")
    group.add_argument("--devices", type=_devices, default="auto", metavar="N",
                       help="use so many, or `all` who are there (default: auto, the fastest)")
    group.add_argument("--peer", action="append", default=[], metavar="HOST:PORT",
                       help="where a paired device is, if it is not found; may be given several times")
    group.add_argument("--wire", choices=("f32", "f16", "q8"), default="f32",
                       help="how partial results travel; shorter is faster on a slow network (f32)")


def _devices(text: str) -> int | str:
    return text if text in ("auto", "all") else whole(text)


def cluster_options(args: argparse.Namespace) -> ClusterOptions | None:
    """What `add_cluster_options` asked for; None without --cluster. Raises ClusterError on a device that leads none."""
    if not getattr(args, "cluster", False):
        return None
    from apps.cluster.extra import require_packages

    require_packages()
    from edgert.paths import Paths
    from tensorpar.members import Membership, parse_address
    from tensorpar.workers import ClusterOptions

    Membership.leading(Paths.of_user())
    return ClusterOptions(args.devices, tuple(map(parse_address, args.peer)), args.wire)


def open_runtime(args: argparse.Namespace, context: int | None, trace: Path | None = None,
                 speculate: Speculate = "auto", session: str | None = None) -> Runtime:
    """The Runtime that `add_model_options` asked for. Raises what Runtime.load raises."""
    from edgert.runtime import Runtime

    return Runtime.load(args.model, memory=args.memory, context=context, threads=args.threads, batch=args.batch,
                        kv_type=args.kv_type, layout=args.layout, models_dirs=args.models_dir, trace=trace,
                        speculate=speculate, cluster=cluster_options(args), kv_budget=args.kv_budget,
                        kv_store=args.kv_store, session=session)
