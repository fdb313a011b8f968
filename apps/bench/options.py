"""The options of `edgert bench`, and what they ask for as values. Imports nothing heavy: `edgert --help` needs them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.cli.arguments import add_cluster_options, token_count, whole
from edgert.errors import UsageError
from edgert.units import parse_bytes

if TYPE_CHECKING:
    from apps.bench.contenders import Setup
    from apps.bench.speed import SpeedTest

_CELSIUS = re.compile(r"(\d{1,3})(?:\s*°?C)?", re.IGNORECASE)
_MAX_SETUPS = 100
_MIN_CONTEXT = 8  # what Runtime asks for at least
_TEMPLATE_TOKENS = 64  # that a chat template puts around the text whose first token is timed
_MAX_DELAY_S = 3600.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a path, a name of `edgert list`, or user/repo:quant")
    _add_tests(parser)
    _add_model(parser)
    _add_fairness(parser)
    _add_output(parser)
    add_cluster_options(parser)


def _add_tests(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tests")
    group.add_argument("-p", "--n-prompt", action="append", metavar="LIST", help="tokens of a prompt (512); 0 is none")
    group.add_argument("-n", "--n-gen", action="append", metavar="LIST", help="tokens to generate (128); 0 is none")
    group.add_argument("-pg", action="append", default=[], metavar="P,N", help="a prompt and then an answer, timed "
                                                                               "together")
    group.add_argument("-d", "--n-depth", action="append", metavar="LIST", help="tokens in the cache before (0)")
    group.add_argument("-r", "--repetitions", type=whole, default=5, metavar="N", help="of every test (5)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model; a list measures every combination")
    group.add_argument("--memory", type=_list_of(parse_bytes), metavar="LIST",
                       help="budgets for the whole process, such as 512M,1G; weights beyond one stream from disk")
    group.add_argument("--threads", type=_list_of(whole), metavar="LIST",
                       help="threads that compute (default: physical cores)")
    group.add_argument("--batch", type=_list_of(whole), default=[512], metavar="LIST",
                       help="tokens that prefill at once (512)")
    group.add_argument("--layout", type=_list_of(_layout), default=["auto"], metavar="LIST",
                       help="of the weights: auto (what is fastest here), plain, repack")
    group.add_argument("--kv-type", choices=("f16", "q8_0"), default="f16", help="precision of the KV cache")
    group.add_argument("--context", type=token_count, metavar="N", help="tokens that the cache is opened for (default: "
                                                                        "as many as the tests need)")
    group.add_argument("--models-dir", metavar="DIR", type=Path, action="append", default=[],
                       help="a directory with GGUF files; may be given several times")


def _add_fairness(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to measure")
    group.add_argument("--baseline", choices=("llama.cpp",), metavar="llama.cpp",
                       help="measure it in turn with edgert, and print the ratio")
    group.add_argument("--limit", action="store_true", help="hold each contender in a control group of --memory's size")
    group.add_argument("--cold", action="store_true", help="forget the model's pages in the page cache before opening")
    group.add_argument("--no-predict", action="store_true", help="leave predictions out, and the calibration that they "
                                                                 "need, once on a device (up to 10 s)")
    group.add_argument("--delay", type=_seconds, default=0.0, metavar="S", help="seconds to wait before each test (0)")
    group.add_argument("--cooldown-to", type=_celsius, metavar="50C", help="wait before each test until the device is "
                                                                           "as cool as this")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", choices=("md", "csv", "json", "jsonl", "sql", "table"), metavar="FORMAT",
                       help="md, csv, json, jsonl, sql or table (on a terminal: table; else: md)")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the results; a name that ends in .svg or .png")
    group.add_argument("--report", type=Path, metavar="DIR", help="write one page, report.html, and results.json there")
    group.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"),
                       help="compare two results of `-o json` instead of measuring")


@dataclass(frozen=True, slots=True)
class Sweep:
    """Every combination that is measured, and the columns that vary."""

    setups: tuple[Setup, ...]
    varies: tuple[str, ...]


def tests_of(args: argparse.Namespace) -> tuple[SpeedTest, ...]:
    """Raises UsageError for lists that are none, and where there is nothing to measure."""
    from apps.bench.ranges import parse_pair
    from apps.bench.speed import combinations

    pairs = [parse_pair(pair) for pair in args.pg]
    tests = combinations(_numbers(args.n_prompt, 512), _numbers(args.n_gen, 128), pairs, _numbers(args.n_depth, 0))
    if not tests:
        raise UsageError("there is nothing to measure", "Ask for tokens with -p, -n or -pg.")
    return tuple(tests)


def sweep_of(args: argparse.Namespace, tests: Sequence[SpeedTest]) -> Sweep:
    """Raises UsageError for too many combinations, and for a context that does not hold the tests."""
    from apps.bench.contenders import Setup
    from edgert.cpu import usable_cores

    needed = max(test.n_tokens for test in tests)
    if args.context is not None and args.context < needed:
        raise UsageError(f"a context of {args.context} tokens does not hold a test of {needed}",
                         f"Ask for --context {needed} or more, or for shorter tests.")
    context = args.context or max(_MIN_CONTEXT, needed + _TEMPLATE_TOKENS)
    lists = {"budget": args.memory or [None], "threads": args.threads or [usable_cores()], "batch": args.batch,
             "layout": args.layout}
    setups = [Setup(memory, threads, batch, layout, args.kv_type, context)
              for memory, threads, batch, layout in product(*lists.values())]
    if len(setups) > _MAX_SETUPS:
        raise UsageError(f"these are {len(setups)} combinations", f"At most {_MAX_SETUPS} can be measured at once.")
    return Sweep(tuple(setups), tuple(name for name, values in lists.items()
                                      if len(values) > 1 or (name == "budget" and values != [None])))


def _numbers(lists: list[str] | None, default: int) -> list[int]:
    from apps.bench.ranges import parse_numbers

    return [default] if lists is None else [number for text in lists for number in parse_numbers(text)]


def _list_of(parse: Any) -> Any:
    def parse_list(text: str) -> list[Any]:
        return [parse(part.strip()) for part in text.split(",")]

    return parse_list


def _layout(text: str) -> str:
    if text not in ("auto", "plain", "repack"):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, plain, repack")
    return text


def _celsius(text: str) -> float:
    match = _CELSIUS.fullmatch(text)
    if match is None or not 20 <= int(match[1]) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a temperature from 20C to 100C, such as 50C")
    return float(match[1])


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _MAX_DELAY_S:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to {_MAX_DELAY_S:.0f}")
    return value
