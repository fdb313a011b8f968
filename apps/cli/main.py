"""The `edgert` command: finds the subcommand, runs it, and turns what went wrong into words and an exit status.

Imports only the standard library's light parts until a command runs: `edgert --help` answers in 0.1 s.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import edgert
from apps.bench import command as bench
from apps.cli import distill, models, plan, run, serve
from apps.cli.arguments import Parser, add_common_options
from apps.cli.interrupts import Terminated, exit_status
from apps.cli.messages import complain, logging_to_stderr
from apps.cluster import command as cluster
from edgert.errors import EdgertError, Interrupted, UsageError

_SIGPIPE, _SIGTERM = 13, 15  # not every platform names them
_EXIT_CODES = """\
exit status:
  0  done                       7  a download failed
  1  any other error            8  no space on the disk
  2  wrong usage                9  ggml's libraries are missing or unknown
  3  model not found           10  invalid grammar or JSON schema
  4  model file not usable     11  the computation failed
  5  not enough memory        130  interrupted by Ctrl-C (143: by SIGTERM)
  6  context too short          12  devices do not work together

`edgert COMMAND --help` says more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace(verbose=0, log_json=False)
    try:
        args = _parse(words)
        with logging_to_stderr(args.verbose, args.log_json):
            status = int(args.func(args))
            if sys.stdout is not None:
                sys.stdout.flush()
            return status
    except BrokenPipeError:  # `| head` has seen enough
        _forget_stdout()
        return exit_status(_SIGPIPE)
    except EdgertError as error:
        return _fail(error, args)
    except KeyboardInterrupt:
        return _fail(Interrupted("interrupted"), args)
    except Terminated:
        return exit_status(_SIGTERM)
    except MemoryError:
        return _fail(_NoMemory("out of memory", "Close other programs, or ask for a shorter --context."), args)
    except Exception as error:
        more = "" if args.verbose else "; run again with -v for details"
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return _fail(EdgertError(said, f"This is a defect in edgert{more}."), args, error)


class _NoMemory(EdgertError):
    """Python itself got no memory; nobody knows how much was asked for."""

    exit_code = 5


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        return argparse.Namespace(verbose=0, log_json=False, func=lambda _: UsageError.exit_code)
    try:
        return parser.parse(words)
    except SystemExit:  # argparse has answered --help or --version itself
        return argparse.Namespace(verbose=0, log_json=False, func=lambda _: 0)


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="edgert", description="Run language models on devices that are too small for them.",
                    epilog=_EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"edgert {edgert.__version__}")
    parser.set_defaults(verbose=0, log_json=False)
    add_common_options(parser)
    subparsers: argparse._SubParsersAction[Any] = parser.add_subparsers(title="commands", metavar="COMMAND",
                                                                        required=True)
    run.add_subcommand(subparsers)
    plan.add_subcommand(subparsers)
    serve.add_subcommands(subparsers)
    models.add_subcommands(subparsers)
    distill.add_subcommand(subparsers)
    bench.add_subcommand(subparsers)
    for subparser in (*subparsers.choices.values(), *cluster.add_subcommands(subparsers)):
        add_common_options(subparser)
    return parser


def _fail(error: EdgertError, args: argparse.Namespace, defect: Exception | None = None) -> int:
    complain(error, args.log_json, defect if args.verbose else None)
    return error.exit_code


def _forget_stdout() -> None:
    """Let Python's own flush at exit go nowhere instead of failing once more."""
    with suppress(OSError, ValueError):  # not a file, as under a test's capture
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
