"""`edgert plan`: what fits, how fast it will be and why, before a weight is read.

Knows options and what is printed where. The figures are made in plan_report.py, drawn in plan_plot.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.cli.arguments import above_zero, add_model_options, token_count, whole

if TYPE_CHECKING:
    from apps.cli.plan_report import Report
    from edgert.planning import EngineOptions, Planning

_DESCRIPTION = """\
Say how a model would run here: what stays in memory, what streams from disk,
how fast it will answer, what limits it, and the smallest memory that works. No
weight is read. The first time on a device, its disk and kernels are measured,
and the first time for a model, how long it computes; that takes some seconds.
"""


def add_subcommand(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add `plan`; its `func` takes the parsed arguments and returns the exit status."""
    parser = subparsers.add_parser("plan", help="what fits, how fast it will be, and why", description=_DESCRIPTION,
                                   usage="%(prog)s [options] [MODEL]")
    add_model_options(parser)
    next(action for action in parser._actions if action.dest == "model").nargs = "?"
    group = parser.add_argument_group("plan")
    group.add_argument("--context", type=token_count, metavar="N", help="tokens of prompt and answer together")
    group.add_argument("--prompt-tokens", type=whole, default=512, metavar="N",
                       help="the prompt whose time to first token is predicted (512)")
    group.add_argument("--target-tok-s", type=above_zero("tokens per second", 1e6), metavar="X",
                       help="find the smallest memory that gives X tokens/s")
    group.add_argument("--all", action="store_true", help="rank every model that is here")
    group.add_argument("--json", action="store_true", help="print one line of JSON")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw speed and memory over budget and context; "
                                                                 "a name that ends in .svg or .png")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Plan one model, or all of them."""
    from edgert.errors import UsageError

    if args.all == (args.model is not None):
        raise UsageError("plan takes a MODEL, or --all", "See `edgert plan --help`.")
    if args.all and (args.plot or args.target_tok_s):
        raise UsageError("--plot and --target-tok-s are for one model", "Name it instead of --all.")
    if args.plot is not None:
        from apps.cli.plan_plot import check_plot

        check_plot(args.plot)
    return _run_all(args) if args.all else _run_one(args)


def _run_one(args: argparse.Namespace) -> int:
    from apps.cli.plan_report import Report
    from edgert.models.catalog import Catalog
    from edgert.paths import Paths
    from edgert.planning import Planning

    paths = Paths.of_user()
    path = Catalog(paths, args.models_dir).find(args.model)
    with Planning.open(path, paths, _options(args)) as planning:
        _calibrate(planning)
        report = Report.of(planning, args.prompt_tokens, args.target_tok_s)
        if args.plot is not None:
            from apps.cli.plan_plot import plot

            plot(args.plot, planning, report)
    if args.json:
        print(json.dumps(report.to_dict()))
        return 0
    _print_report(report)
    return 0


def _run_all(args: argparse.Namespace) -> int:
    from apps.cli.plan_report import Report
    from edgert.errors import EdgertError
    from edgert.models.catalog import Catalog
    from edgert.paths import Paths
    from edgert.planning import Planning

    paths = Paths.of_user()
    reports: list[Report] = []
    refused: dict[str, str] = {}
    for entry in Catalog(paths, args.models_dir).list():
        try:
            with Planning.open(entry.path, paths, _options(args)) as planning:
                _calibrate(planning)
                reports.append(Report.of(planning, args.prompt_tokens, name=entry.name))
        except EdgertError as error:
            refused[entry.name] = str(error).replace("\n", " ")
    reports.sort(key=lambda report: -report.tok_s)
    if args.json:
        print(json.dumps({"models": [report.to_dict() for report in reports], "refused": refused}))
        return 0
    from apps.cli.plan_table import print_ranking

    print_ranking(reports, refused)
    return 0


def _options(args: argparse.Namespace) -> EngineOptions:
    from edgert.cpu import usable_cores
    from edgert.planning import EngineOptions

    return EngineOptions(args.memory, args.context, args.threads or usable_cores(), args.batch, args.kv_type,
                         args.layout, kv_budget=args.kv_budget, kv_store=args.kv_store)


def _calibrate(planning: Planning) -> None:
    if not planning.is_settled:
        again = " again, for other programs computed the last time" if planning.is_calibrated else ", once"
        print(f"measuring this device{again} (up to 10 s) ...", file=sys.stderr)
    elif not planning.is_rehearsed:
        print("measuring this model here, once (up to 4 s) ...", file=sys.stderr)
    planning.calibrate()


def _print_report(report: Report) -> None:
    from apps.cli.plan_table import print_report

    print_report(report)
