"""`edgert bench`: options, progress, and results as they come. What is measured is in measure.py, how it looks in
formats.py.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.cli.arguments import add_model_options, open_runtime, whole

if TYPE_CHECKING:
    from apps.bench.formats import Format, Subject
    from apps.bench.measure import SpeedTest
    from apps.cli.interrupts import Interrupts
    from edgert.runtime import Runtime

_log = logging.getLogger(__name__)
_DESCRIPTION = """\
Measure a model's speed with llama-bench's tests, names and numbers: pp512 is a
prompt of 512 tokens, tg128 is 128 tokens generated one by one, @ d512 is with
512 tokens before them. Lists are 0,512 or 128-1024*2 or 100-500+100.
"""
_MIN_CONTEXT = 8  # what Runtime asks for at least


def add_subcommand(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `bench`; its `func` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser("bench", help="measure a model's speed", description=_DESCRIPTION,
                                   usage="%(prog)s [options] MODEL")
    add_model_options(parser)
    group = parser.add_argument_group("tests")
    group.add_argument("-p", "--n-prompt", action="append", metavar="LIST", help="tokens of a prompt (512); 0 is none")
    group.add_argument("-n", "--n-gen", action="append", metavar="LIST", help="tokens to generate (128); 0 is none")
    group.add_argument("-pg", action="append", default=[], metavar="P,N", help="a prompt and then an answer, timed "
                                                                               "together")
    group.add_argument("-d", "--n-depth", action="append", metavar="LIST", help="tokens in the cache before (0)")
    group.add_argument("-r", "--repetitions", type=whole, default=5, metavar="N", help="of every test (5)")
    parser.add_argument("-o", "--output", choices=("md", "jsonl", "json", "csv"), default="md",
                        help="how to print the results (md)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print. Ctrl-C ends it; tests that were done are printed."""
    from apps.bench.formats import format_named
    from apps.bench.measure import combinations
    from apps.bench.ranges import parse_pair
    from apps.cli.interrupts import Interrupts
    from edgert.errors import UsageError

    pairs = [parse_pair(pair) for pair in args.pg]
    tests = combinations(_numbers(args.n_prompt, 512), _numbers(args.n_gen, 128), pairs, _numbers(args.n_depth, 0))
    if not tests:
        raise UsageError("there is nothing to measure", "Ask for tokens with -p, -n or -pg.")
    context = max(_MIN_CONTEXT, *(test.n_tokens for test in tests))
    with Interrupts() as interrupts, open_runtime(args, context, speculate="off") as runtime:
        interrupts.raise_missed()
        form = format_named(args.output, describe_subject(runtime, args), [test.name for test in tests])
        return _measure_all(runtime, tests, args.repetitions, form, interrupts)


def _measure_all(runtime: Runtime, tests: list[SpeedTest], repetitions: int, form: Format,
                 interrupts: Interrupts) -> int:
    from apps.bench.measure import measure
    from apps.cli.interrupts import exit_status
    from edgert.ggml.backend import Cancelled

    progress = Progress(len(tests), repetitions)
    with interrupts.stopping(runtime.engine.cancel):
        _print(form.head())
        try:
            for number, test in enumerate(tests):
                _log.info("measuring", extra={"fields": {"test": test.name}})
                progress.show(number, test.name, None)
                result = measure(runtime.engine, test, repetitions, partial(progress.show, number, test.name))
                progress.clear()
                _print(form.row(result))
        except Cancelled:
            progress.clear()
        _print(form.foot())
    return 0 if interrupts.stopped_by is None else exit_status(interrupts.stopped_by)


class Progress:
    """One line on standard error that is written over, on a terminal only."""

    def __init__(self, n_tests: int, repetitions: int) -> None:
        self._n_tests, self._repetitions = n_tests, repetitions
        self._shows = sys.stderr is not None and sys.stderr.isatty()

    def show(self, number: int, name: str, done: int | None) -> None:
        """The test, and how many of its runs are done; None while it warms up."""
        what = "warm-up" if done is None else f"run {done + 1}/{self._repetitions}"
        self._write(f"\r\x1b[Ktest {number + 1}/{self._n_tests}, {name}: {what}")

    def clear(self) -> None:
        self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        if self._shows:
            print(text, end="", file=sys.stderr, flush=True)


def describe_subject(runtime: Runtime, args: argparse.Namespace) -> Subject:
    """What is measured, in llama-bench's words."""
    import edgert
    from apps.bench.formats import Subject
    from edgert.ggml.library import load_libraries
    from edgert.models.describe import describe

    model, n_params = describe(runtime.model.path), runtime.model.n_parameters
    size = f"{n_params / 1e9:.1f}B" if n_params >= 1e9 else f"{n_params / 1e6:.0f}M"
    return Subject(
        build_commit=f"edgert-{edgert.__version__}+ggml-{load_libraries().version}", cpu_info=cpu_name(),
        model_filename=str(model.path), model_type=f"{model.architecture} {size} {model.quantisation}",
        model_size=sum(model.block_bytes.values()), model_n_params=n_params, n_batch=runtime.engine.batch_size,
        n_threads=runtime.engine.backend.n_threads, type_kv=args.kv_type, layout=args.layout)


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def _numbers(lists: list[str] | None, default: int) -> list[int]:
    from apps.bench.ranges import parse_numbers

    return [default] if lists is None else [number for text in lists for number in parse_numbers(text)]


def _print(lines: Iterator[str]) -> None:
    for line in lines:
        print(line, flush=True)
